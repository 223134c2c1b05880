"""Models as ONNX or torch.export files."""
