"""How much noise a change puts into a model, measured where noise of many small sources adds up."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from .base import Array
from .judge import Judge

_SATURATING = frozenset({"Softmax", "LogSoftmax", "Sigmoid", "Tanh", "HardSigmoid"})
_MOVING = frozenset({"Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten", "Identity", "Cast"})
_CHOOSING = frozenset({"ArgMax", "ArgMin", "TopK"})


class Meter:
    """Noise over signal of the outputs, those of Softmax and the like as they are before, in the run of the median.

    Where a model wavers between two answers, any noise flips it, and the sum over runs is mostly that of a few.
    """

    def __init__(self, model: ir.Model, judge: Judge, runs: int) -> None:
        self.judge, self.runs = judge, runs
        self.feeds = judge.feeds[:: max(1, len(judge.feeds) // runs)]
        self.names = list(dict.fromkeys(_before(value) for value in model.graph.outputs if _is_float(value)))
        self.wanted = [] if judge.states or not self.names else list(judge.runner.run(model, self.feeds, self.names))

    def noise(self, model: ir.Model) -> float:
        """That of ``model``, against the one that the meter was made with."""
        known = {value.name for node in model.graph for value in node.outputs}
        if not self.wanted or not known.issuperset(self.names):
            return self.judge.fidelity(model, runs=self.runs, metric=False).typical
        found = self.judge.runner.run(model, self.feeds, self.names)
        pairs = list(zip(self.wanted, found, strict=True))
        return max(
            (_median([_ratio(wanted[name], other[name]) for wanted, other in pairs]) for name in self.names),
            default=0.0,
        )


def _before(output: ir.Value) -> str:
    """The value that ``output`` is made of, before operators that saturate."""
    value, found = output, output
    while (
        (node := value.producer()) is not None and node.op_type in _SATURATING | _MOVING and node.inputs[0] is not None
    ):
        value = node.inputs[0]
        if node.op_type in _SATURATING and value.producer() is not None:
            found = value
    return found.name or ""


def _is_float(value: ir.Value) -> bool:
    return value.dtype is not None and value.dtype.is_floating_point()


def _ratio(wanted: Array, found: Array) -> float:
    if wanted.shape != found.shape:
        return 1.0
    signal, noise = wanted.astype(np.float64), found.astype(np.float64)
    with np.errstate(invalid="ignore"):
        np.square(np.subtract(noise, signal, out=noise), out=noise)
    power = float(np.square(signal, out=signal).sum())
    ratio = float(noise.sum()) / (power or 1.0)
    return ratio if np.isfinite(ratio) else 1.0


def _median(ratios: Sequence[float]) -> float:
    return float(np.median(ratios)) if ratios else 0.0
