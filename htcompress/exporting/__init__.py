"""Leaving the format: dense weights for the original class, ONNX for other runtimes."""

from htcompress.exporting.dense import dense_tensors
from htcompress.exporting.export import Destination, Exported, export

__all__ = ["Destination", "Exported", "dense_tensors", "export"]
