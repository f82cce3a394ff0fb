"""How much noise a change puts into a model, measured where noise of many small sources adds up."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from .base import Array
from .judge import Fidelity, Judge

_ENDING = frozenset(
    {"Softmax", "LogSoftmax", "Sigmoid", "Tanh", "HardSigmoid", "ArgMax", "ArgMin", "TopK"}
)  # with them noise no longer adds up
_MOVING = frozenset({"Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten", "Identity", "Cast"})


class Meter:
    """Noise over signal of the outputs, before Softmax, ArgMax and the like, in the run of the median.

    Where a model wavers between two answers, any noise flips it, and the sum over runs is mostly that of a few.
    """

    def __init__(self, model: ir.Model, judge: Judge, runs: int) -> None:
        self.judge, self.runs = judge, runs
        self.feeds = judge.feeds[:: max(1, len(judge.feeds) // runs)]
        self.names = list(dict.fromkeys(filter(None, map(_before, model.graph.outputs))))
        self.wanted = [] if judge.states or not self.names else list(judge.runner.run(model, self.feeds, self.names))

    def noise(self, model: ir.Model) -> float:
        """That of ``model``, against the one that the meter was made with."""
        known = {value.name for node in model.graph for value in node.outputs}
        if not self.wanted or not known.issuperset(self.names):
            return _share(self.judge.fidelity(model, runs=self.runs, metric=False))
        found = self.judge.runner.run(model, self.feeds, self.names)
        pairs = list(zip(self.wanted, found, strict=True))
        return max(
            (_median([_ratio(wanted[name], other[name]) for wanted, other in pairs]) for name in self.names),
            default=0.0,
        )


def _before(output: ir.Value) -> str | None:
    """The value that ``output`` is made of, before operators that saturate or choose; None for integers that are not.

    What an exporter has taken apart is Softmax too: Exp over a sum of it.
    """
    value, found = output, output if _is_float(output) else None
    while (node := value.producer()) is not None and node.inputs and (source := node.inputs[0]) is not None:
        ends = node.op_type in _ENDING or (node.op_type == "Exp" and _divides(value))
        if not (ends or node.op_type in _MOVING or (node.op_type == "Div" and _op_type(source) == "Exp")):
            break
        value = source
        if ends and source.producer() is not None:
            found = source
    return found.name if found is not None else None


def _divides(value: ir.Value) -> bool:
    return any(user.op_type == "Div" and place == 0 for user, place in value.uses())


def _op_type(value: ir.Value) -> str:
    node = value.producer()
    return "" if node is None else node.op_type


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


def _share(found: Fidelity) -> float:
    """Of all that a run gives: noise, or where no output is a float how many cases differ."""
    if found.sqnr:
        return found.typical
    return max((lost / cases for lost, cases in found.flips.values()), default=0.0)


def _median(ratios: Sequence[float]) -> float:
    return float(np.median(ratios)) if ratios else 0.0
