"""Activation functions that exporters write in several operators, in those that ONNX Runtime has kernels for."""

from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir

from ...ir.constants import constant_array
from ...ir.match import Replacement, Rule, decline, rule
from ..base import Context, Effect, Pass, register
from ..rewrite import Tape, rewrite

_CLIPPED = "Clip(Add(x, offset), low, high)"


@register("fuse-activations")
class FuseActivations(Pass):
    """Write HardSigmoid and HardSwish as HardSigmoid and Mul, and constant Sub and Div as Add and Mul.

    Exporters of older opsets write x * min(max(x + 3, 0), 6) / 6 in four operators, each of which walks over the whole
    tensor; ONNX Runtime's CPU has kernels for the two that this leaves, in float as on integers.
    """

    def effect(self) -> Effect:
        """Rounding: (x + 3) / 6 is computed as x / 6 + 1/2."""
        return Effect.ROUNDING

    def run(self, model: ir.Model, ctx: Context) -> None:
        """Rewrites every graph, to a fixed point."""
        rewrite(model, RULES, ctx)


@rule(f"Div({_CLIPPED}, divisor)")
def hard_sigmoid_by_division(
    tape: Tape, x: ir.Value, offset: ir.Value, low: ir.Value, high: ir.Value, divisor: ir.Value
) -> Replacement:
    return _hard_sigmoid(tape, x, offset, low, high, _number(divisor))


@rule(f"Mul({_CLIPPED}, factor)")
def hard_sigmoid_by_multiplication(
    tape: Tape, x: ir.Value, offset: ir.Value, low: ir.Value, high: ir.Value, factor: ir.Value
) -> Replacement:
    return _hard_sigmoid(tape, x, offset, low, high, _reciprocal(factor))


@rule(f"Div(Mul(x, {_CLIPPED}), divisor)")
def hard_swish_by_division(
    tape: Tape, x: ir.Value, offset: ir.Value, low: ir.Value, high: ir.Value, divisor: ir.Value
) -> Replacement:
    return tape.Mul(x, _hard_sigmoid(tape, x, offset, low, high, _number(divisor)))  # type: ignore[no-any-return]


@rule(f"Mul(Mul(x, {_CLIPPED}), factor)")
def hard_swish_by_multiplication(
    tape: Tape, x: ir.Value, offset: ir.Value, low: ir.Value, high: ir.Value, factor: ir.Value
) -> Replacement:
    return tape.Mul(x, _hard_sigmoid(tape, x, offset, low, high, _reciprocal(factor)))  # type: ignore[no-any-return]


@rule("HardSwish(x)")
def hard_swish(tape: Tape, x: ir.Value) -> Replacement:
    _require_float(x)
    return tape.Mul(x, tape.HardSigmoid(x, alpha=1 / 6, beta=0.5))  # type: ignore[no-any-return]


@rule("Sub(x, c)")
def subtraction_of_constant(tape: Tape, x: ir.Value, c: ir.Value) -> Replacement:
    return tape.Add(x, tape.constant(-_plain(x, c), instead_of=c))  # type: ignore[no-any-return]


@rule("Div(x, c)")
def division_by_constant(tape: Tape, x: ir.Value, c: ir.Value) -> Replacement:
    array = _plain(x, c)
    with np.errstate(divide="ignore", over="ignore"):
        inverse = (1 / array.astype(np.float64)).astype(np.float32)
    if not np.isfinite(inverse).all() or np.any(np.abs(inverse) < np.finfo(np.float32).tiny):
        decline("the reciprocal is not a normal number")
    return tape.Mul(x, tape.constant(inverse, instead_of=c))  # type: ignore[no-any-return]


RULES: list[Rule] = [
    hard_swish_by_division,
    hard_swish_by_multiplication,
    hard_sigmoid_by_division,
    hard_sigmoid_by_multiplication,
    hard_swish,
    subtraction_of_constant,
    division_by_constant,
]


def _hard_sigmoid(tape: Tape, x: ir.Value, offset: ir.Value, low: ir.Value, high: ir.Value, divisor: float) -> ir.Value:
    """HardSigmoid(x) = min(max(alpha x + beta, 0), 1), of x in float32."""
    _require_float(x)
    if _number(low) != 0 or not math.isclose(_number(high), divisor, rel_tol=1e-6):
        decline("it does not go from 0 to 1")
    return tape.HardSigmoid(x, alpha=1 / divisor, beta=_number(offset) / divisor)  # type: ignore[no-any-return]


def _number(value: ir.Value) -> float:
    array = constant_array(value)
    if array is None or array.size != 1:
        decline("a number in it is not constant")
    return float(array.reshape(-1)[0])


def _reciprocal(value: ir.Value) -> float:
    number = _number(value)
    return 1 / number if number else decline("it multiplies by 0")


def _require_float(x: ir.Value) -> None:
    if x.dtype is not ir.DataType.FLOAT:
        decline("not of float32")


def _plain(x: ir.Value, c: ir.Value) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    """The float32 constant ``c`` of an operation on ``x``."""
    array = constant_array(c, 1 << 16)
    if x.dtype is not ir.DataType.FLOAT or array is None or constant_array(x, 1) is not None:
        decline("not a constant of float32")
    return np.asarray(array, np.float32)
