"""Layers whose weights nobody trained: the filters of an audio front-end, which a model was trained behind.

A short-time Fourier transform, a constant-Q transform or a mel scale written as Conv or MatMul is exact by design, and
what comes after takes logarithms of its quietest outputs.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from ...ir.constants import constant_tensor

_LEAST_LENGTH = 64  # samples: the shortest window of a transform; learned kernels are shorter
_MOST_BYTES = 1 << 26
_SPARSE = 0.7  # the least share of zeros in a matrix of overlapping bands

REASON = "a bank of fixed filters, which stays exact"


def is_filter_bank(node: ir.Node) -> bool:
    """Whether a Conv filters one signal with long windows, or a MatMul sums bands that overlap."""
    if node.op_type not in ("Conv", "MatMul") or node.domain:
        return False
    tensor = constant_tensor(node.inputs[1])
    if tensor is None or tensor.dtype is not ir.DataType.FLOAT or tensor.nbytes > _MOST_BYTES:
        return False
    shape = tuple(tensor.shape.numpy())
    if node.op_type == "Conv":
        windows = [size for size in shape[2:] if size > 1]
        return shape[1] == 1 and len(windows) == 1 and windows[0] >= _LEAST_LENGTH
    array = tensor.numpy()
    zeros = 1 - np.count_nonzero(array) / max(array.size, 1)
    return len(shape) == 2 and bool((array >= 0).all() and _SPARSE <= zeros < 1) and _is_banded(array)


def _is_banded(matrix: np.ndarray[tuple[int, ...], np.dtype[np.float32]]) -> bool:
    """Whether the numbers above 0 in each column lie next to each other."""
    above = matrix > 0
    starts = above[0].astype(np.int64) + (above[1:] & ~above[:-1]).sum(axis=0)
    return bool((starts <= 1).all())
