"""The model in memory, and the words to talk about it. Its classes are onnx_ir's own; import from the modules."""
