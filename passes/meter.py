"""How much noise a change puts into a model, measured where noise of many small sources adds up."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx_ir as ir

from .base import Array, Outputs
from .judge import Fidelity, Judge, kept

_ENDING = frozenset(
    {"Softmax", "LogSoftmax", "Sigmoid", "Tanh", "HardSigmoid", "ArgMax", "ArgMin", "TopK"}
)  # with them noise no longer adds up
_MOVING = frozenset({"Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten", "Identity", "Cast"})


class Meter:
    """Noise over signal of the outputs, before Softmax, ArgMax and the like, in the run of the median.

    Where a model wavers between two answers, any noise flips it, and the sum over runs is mostly that of a few.
    """

    def __init__(self, model: ir.Model, judge: Judge, runs: int) -> None:
        self.model, self.judge, self.runs = model, judge, runs
        self.feeds = judge.some(runs)
        counted = (output for output in model.graph.outputs if output.name not in judge.besides)
        self.names = list(dict.fromkeys(filter(None, map(_before, counted))))
        self._kept = [] if judge.states or not self.names else kept(self._run(model))

    def noise(self, model: ir.Model) -> float:
        """That of ``model``, against the one that the meter was made with."""
        known = {value.name for node in model.graph for value in node.outputs}
        if self.judge.states or not self.names or not known.issuperset(self.names):
            return _share(self.judge.fidelity(model, runs=self.runs, metric=False))
        ratios: dict[str, list[float]] = {name: [] for name in self.names}
        for wanted, found in zip(self._kept or self._run(self.model), self._run(model), strict=True):
            for name, own in ratios.items():
                own.append(_ratio(wanted[name], found[name]))
        return max((float(np.median(own)) for own in ratios.values() if own), default=0.0)

    def _run(self, model: ir.Model) -> Iterator[Outputs]:
        return self.judge.runner.run(model, self.feeds, self.names)


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
        if ends and source.producer() is not None and not isinstance(source.type, ir.SequenceType | ir.OptionalType):
            found = source
    return found.name if found is not None else None


def _divides(value: ir.Value) -> bool:
    return any(user.op_type == "Div" and place == 0 for user, place in value.uses())


def _op_type(value: ir.Value) -> str:
    node = value.producer()
    return "" if node is None else node.op_type


def _is_float(value: ir.Value) -> bool:
    """Whether it is a tensor of floats that a node makes: a sequence or map of them has a dtype too."""
    made = value.producer() is not None and isinstance(value.type, ir.TensorType)
    return made and value.dtype is not None and value.dtype.is_floating_point()


def _ratio(wanted: Array, found: Array) -> float:
    if wanted.shape != found.shape:
        return 1.0
    finite = np.isfinite(wanted)  # a class that is masked is -inf in both
    signal = wanted[finite].astype(np.float64)
    noise = np.square(found[finite].astype(np.float64) - signal)
    ratio = float(noise.sum()) / (float(np.square(signal).sum()) or 1.0)
    return ratio if np.isfinite(ratio) else 1.0


def _share(found: Fidelity) -> float:
    """Of all that a run gives: noise, or where no output is a float how many cases differ."""
    if found.sqnr:
        return found.typical
    return max((lost / cases for lost, cases in found.flips.values()), default=0.0)
