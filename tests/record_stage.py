"""Records what a stage of a real model sees, for tests that have no such model at hand.

    python tests/record_stage.py local-dir:MODEL_FOLDER IMAGES --block 7 --count 2 -o tests/stage_inputs/FILE

Kept are, for a few images: the tokens between attention and MLP, gain and bias of the norm behind them, the keys
averaged over heads, and the class attention; in half precision but for the last.
"""

from __future__ import annotations

import argparse

import torch
from safetensors.torch import save_file

from tokencut import compress
from tokencut.data.image_set import open_images
from tokencut.models.loading import load_model


def main() -> None:
    """Runs the model up to the block's stage and writes the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("images", help="training images: a folder or an archive of one")
    parser.add_argument("--block", type=int, default=7, help="1-based")
    parser.add_argument("--count", type=int, default=2)
    parser.add_argument("-o", "--output", required=True)
    args = parser.parse_args()
    dense = load_model(args.model).dense.float().eval()
    found = open_images(dense, args.images, limit=args.count)
    images = found.prepared.normalise(next(iter(found.batches(args.count))).images, torch.device("cpu"))
    model = compress(dense, layers=[args.block], keep=0.5)
    seen = {}
    model.stages[str(args.block)].register_forward_pre_hook(lambda _, inputs: seen.update(stage_input=inputs[0]))
    with torch.no_grad():
        model(images)
        stage_input, norm = seen["stage_input"], model.model.blocks[args.block - 1].norm2
        save_file(
            {
                "tokens": stage_input.tokens.features.half().contiguous(),
                "keys": stage_input.attention.keys().half().contiguous(),
                "class_attention": stage_input.attention.class_attention().contiguous(),
                "norm.weight": norm.weight.detach().half(),
                "norm.bias": norm.bias.detach().half(),
            },
            args.output,
        )


if __name__ == "__main__":
    main()
