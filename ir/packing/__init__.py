"""Exact storages of tensors that standard operators decode, and that ONNX Runtime folds once, as it loads the model.

A storage says how the elements' values are held (as they are, as numbers of a palette, in a narrower type) and how
their places are (all, a bit for each, the gaps between them): ``values.py`` and ``places.py``; ``repeats.py`` holds
tensors that repeat a block. ``choose.py`` finds the smallest, ``write.py`` puts it into a model, and ``decoded.py``
computes what a decoder decodes: whatever the encoding, for it interprets the operators.
"""
