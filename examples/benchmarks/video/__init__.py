"""A stand-in for videos: `clips` writes them, `train_clips` makes a model, `measure_clips` measures its reductions."""
