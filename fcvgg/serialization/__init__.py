"""Networks as files: bundles without code, ONNX and torch.export."""
