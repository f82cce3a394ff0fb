"""The family that brings models to other versions of ONNX, so that other tools take them."""
