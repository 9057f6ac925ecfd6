"""Writing a model as an ONNX file that is checked against it in onnxruntime."""

from .onnx import OnnxExportError, check_onnx, export_onnx


__all__ = ["OnnxExportError", "check_onnx", "export_onnx"]
