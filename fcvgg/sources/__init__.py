"""Models from elsewhere: timm, Keras files and ONNX files, each read into a torch classifier.

Each module has one function ``read`` that gives an ``nn.Module`` in evaluation mode,
``(N, C, H, W) -> (N, K)``, and what the source says of its preprocessing, categories and native
size, for `fcvgg.convert`. Nothing in a file is run as code, and optional packages are imported
only when a source needs them.
"""

from fcvgg.sources import keras_file, onnx_file, timm_model

__all__ = ["keras_file", "onnx_file", "timm_model"]
