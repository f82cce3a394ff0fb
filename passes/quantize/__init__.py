"""Quantization passes: numbers in fewer bits, where ONNX Runtime gains by it and the outputs allow it."""
