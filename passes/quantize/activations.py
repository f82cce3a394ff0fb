"""Activation functions that exporters write in several operators, in those that ONNX Runtime has kernels for."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from ...ir.constants import constant_array
from ...ir.edit import become
from ...ir.match import Replacement, Rule, decline, rule
from ...ir.opset import NoConversion, raise_opset
from ...ir.scopes import scopes
from ..base import Context, Effect, Pass, register
from ..rewrite import Tape, rewrite

_CLIPPED = "Clip(Add(x, offset), low, high)"


@register("fuse-activations")
class FuseActivations(Pass):
    """Write HardSigmoid, HardSwish and Gelu in few operators, and constant Sub and Div as Add and Mul.

    Exporters of older opsets write x * min(max(x + 3, 0), 6) / 6 in four operators, each of which walks over the whole
    tensor; ONNX Runtime's CPU has kernels for the two that this leaves, in float as on integers. For the nine of
    x / 2 * (1 + tanh(√(2/π) * (x + 0.044715 x³))) it has one, Gelu of opset 20, to which the model is raised for it.
    """

    def effect(self) -> Effect:
        """Rounding: (x + 3) / 6 is computed as x / 6 + 1/2."""
        return Effect.ROUNDING

    def run(self, model: ir.Model, ctx: Context) -> None:
        """Rewrites every graph, to a fixed point."""
        rewrite(model, RULES, ctx)
        if any(node.op_type == "Tanh" for scope in scopes(model) for node in scope.graph):
            _fuse_gelu(model, ctx)


def _fuse_gelu(model: ir.Model, ctx: Context) -> None:
    """Raises the opset only where that finds a Gelu."""
    trial, own = model.clone(), ctx.for_step(ctx.step)
    stamp = trial.opset_imports.get("", _GELU_OPSET)
    try:
        if stamp < _GELU_OPSET:
            raise_opset(trial, _GELU_OPSET)
    except NoConversion as error:
        ctx.skip("model", f"Gelu by tanh was not looked for: {error}")
        return
    if rewrite(trial, _gelu_rules(), own):
        if stamp < _GELU_OPSET:
            ctx.change("main graph", f"opset {stamp} to {_GELU_OPSET}, for Gelu")
        ctx.ledger.changes += own.ledger.changes
        become(model, trial)


@rule(f"Div({_CLIPPED}, divisor)")
def hard_sigmoid_by_division(
    tape: Tape, x: ir.Value, offset: ir.Value, low: ir.Value, high: ir.Value, divisor: ir.Value
) -> Replacement:
    return _hard_sigmoid(tape, x, offset, low, high, _number(divisor, x))


@rule(f"Mul({_CLIPPED}, factor)")
def hard_sigmoid_by_multiplication(
    tape: Tape, x: ir.Value, offset: ir.Value, low: ir.Value, high: ir.Value, factor: ir.Value
) -> Replacement:
    return _hard_sigmoid(tape, x, offset, low, high, _reciprocal(factor, x))


@rule(f"Div(Mul(x, {_CLIPPED}), divisor)")
def hard_swish_by_division(
    tape: Tape, x: ir.Value, offset: ir.Value, low: ir.Value, high: ir.Value, divisor: ir.Value
) -> Replacement:
    return tape.Mul(x, _hard_sigmoid(tape, x, offset, low, high, _number(divisor, x)))  # type: ignore[no-any-return]


@rule(f"Mul(Mul(x, {_CLIPPED}), factor)")
def hard_swish_by_multiplication(
    tape: Tape, x: ir.Value, offset: ir.Value, low: ir.Value, high: ir.Value, factor: ir.Value
) -> Replacement:
    return tape.Mul(x, _hard_sigmoid(tape, x, offset, low, high, _reciprocal(factor, x)))  # type: ignore[no-any-return]


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


@functools.cache
def _gelu_rules() -> list[Rule]:
    """One for each way to write it; made when a model has a Tanh, for both ways round of all of them are many."""
    return [rule(outer.format(inner))(function) for inner, function in _GELU_INNER.items() for outer in _GELU_OUTER]


def gelu_by_tanh(
    tape: Tape, x: ir.Value, cubic: ir.Value, root: ir.Value, one: ir.Value, half: ir.Value
) -> Replacement:
    _require_float(x)
    wanted = ((cubic, 0.044715), (root, math.sqrt(2 / math.pi)), (one, 1.0), (half, 0.5))
    if not all(math.isclose(_number(value, x), number, rel_tol=1e-5) for value, number in wanted):
        decline("its numbers are not those of Gelu")
    return tape.Gelu(x, approximate="tanh")  # type: ignore[no-any-return]


def gelu_by_tanh_and_power(
    tape: Tape, x: ir.Value, power: ir.Value, cubic: ir.Value, root: ir.Value, one: ir.Value, half: ir.Value
) -> Replacement:
    if _number(power, x) != 3:
        decline("its numbers are not those of Gelu")
    return gelu_by_tanh(tape, x, cubic, root, one, half)


def gelu_by_tanh_factored(
    tape: Tape, x: ir.Value, unit: ir.Value, cubic: ir.Value, root: ir.Value, one: ir.Value, half: ir.Value
) -> Replacement:
    if _number(unit, x) != 1:
        decline("its numbers are not those of Gelu")
    return gelu_by_tanh(tape, x, cubic, root, one, half)


_GELU_OPSET = 20
_GELU_INNER: dict[str, Callable[..., Replacement]] = {
    "Tanh(Mul(Add(x, Mul(Mul(Mul(x, x), x), cubic)), root))": gelu_by_tanh,
    "Tanh(Mul(Add(x, Mul(x, Mul(x, Mul(x, cubic)))), root))": gelu_by_tanh,
    "Tanh(Mul(Add(x, Mul(Pow(x, power), cubic)), root))": gelu_by_tanh_and_power,
    "Tanh(Mul(Mul(x, root), Add(Mul(Mul(x, cubic), x), unit)))": gelu_by_tanh_factored,
}
_GELU_OUTER = ("Mul(x, Mul(Add({}, one), half))", "Mul(Mul(x, half), Add({}, one))", "Mul(Mul(x, Add({}, one)), half)")


def _hard_sigmoid(tape: Tape, x: ir.Value, offset: ir.Value, low: ir.Value, high: ir.Value, divisor: float) -> ir.Value:
    """HardSigmoid(x) = min(max(alpha x + beta, 0), 1), of x in float32."""
    _require_float(x)
    if _number(low, x) != 0 or not math.isclose(_number(high, x), divisor, rel_tol=1e-6):
        decline("it does not go from 0 to 1")
    return tape.HardSigmoid(x, alpha=1 / divisor, beta=_number(offset, x) / divisor)  # type: ignore[no-any-return]


def _number(value: ir.Value, x: ir.Value) -> float:
    """The one number of a constant that gives the result no axis that ``x`` has not."""
    array = constant_array(value)
    if array is None or array.size != 1:
        decline("a number in it is not constant")
    if array.ndim > (0 if x.shape is None else x.shape.rank()):
        decline("a number in it has more axes than what it is applied to")
    return float(array.reshape(-1)[0])


def _reciprocal(value: ir.Value, x: ir.Value) -> float:
    number = _number(value, x)
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
