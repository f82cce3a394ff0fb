"""Which units run on integers: the minimum cut against every possible choice, and what counts as a unit."""

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
import pytest

from penjing.ir.scopes import scopes
from penjing.passes.quantize.costs import Table
from penjing.passes.quantize.filters import is_filter_bank
from penjing.passes.quantize.placement import Foretold, place
from penjing.passes.quantize.plan import Plan
from penjing.passes.quantize.units import Role, Unit, find_units

Parse = Callable[[str], ir.Model]

RESIDUAL = """m (float[1,8,4,4] x) => (float[1,8,4,4] y, float[1,8,4,4] z)
<float[8,8,1,1] w, float[8] b> {
    c1 = Conv (x, w, b)
    r1 = Relu (c1)
    c2 = Conv (r1, w)
    e = Exp (c2)
    s = Sigmoid (c2)
    m = Mul (c2, s)
    a = Add (m, r1)
    y = Conv (a, w)
    z = Softsign (e)
}"""


@dataclass(frozen=True)
class Crossings(Foretold):
    """The way to integers and back, of a price each, whatever the size."""

    into: float
    out: float

    def quantize(self, elements: int) -> float:
        return self.into

    def dequantize(self, elements: int) -> float:
        return self.out

    def transpose(self, elements: int) -> float:
        return 0.0


@dataclass(frozen=True)
class Turned(Foretold):
    """One price to and from integers, and one of a Transpose of more than the eight elements that a pool leaves."""

    turn: float

    def quantize(self, elements: int) -> float:
        return 0.5

    def dequantize(self, elements: int) -> float:
        return 0.5

    def transpose(self, elements: int) -> float:
        return self.turn if elements > 8 else 0.0


def with_constants(model: ir.Model) -> ir.Model:
    """Every value that is only declared becomes an initializer; all others are float32, of one shape if unknown."""
    rng = np.random.default_rng(0)
    for node in model.graph:
        for value in node.inputs:
            if value is not None and value.producer() is None and not value.is_graph_input():
                if value.is_initializer():
                    continue
                assert value.shape is not None
                array = rng.standard_normal(value.shape.numpy()).astype(np.float32)
                value.const_value = ir.tensor(array, name=value.name)
                model.graph.register_initializer(value)
    for node in model.graph:
        for value in node.outputs:
            value.type = ir.TensorType(ir.DataType.FLOAT)
            value.shape = value.shape or ir.Shape([1, 8, 4, 4])
    return model


def test_what_is_inside_a_unit_is_as_large_as_what_it_makes(parse: Parse) -> None:
    """Of a symbolic size only what is observed is known, and values inside units are not observed."""
    model = parse(
        """m (float[1,8,h,4] x) => (float[1,8,h,4] y) <float[8,8,1,1] w> {
            c = Conv (x, w)
            y = Relu (c)
        }"""
    )
    plan = Plan.of(with_constants(model))
    sizes = plan.known({"x": (1, 8, 32, 4), "y": (1, 8, 32, 4)})
    assert {value.name: size for value, size in sizes.items()} == dict.fromkeys("xyc", (1, 8, 32, 4))


@pytest.mark.parametrize("seed", range(25))
def test_no_choice_is_cheaper_than_the_cut(seed: int, parse: Parse) -> None:
    """All 2^n choices are priced by the rules that the cut is built from, written out here once more."""
    model = with_constants(parse(RESIDUAL))
    units, left = find_units(next(scopes(model)))
    assert [unit.node.op_type for unit in units] == ["Conv", "Conv", "Sigmoid", "Mul", "Add", "Conv"]
    assert left == []
    rng = np.random.default_rng(seed)
    prices = {unit: tuple(float(price) for price in rng.integers(0, 100, 2)) for unit in units}
    into, out = (float(price) for price in rng.integers(0, 60, 2))
    crossings = Crossings(Table.of("cpu-vnni"), into, out)

    makers = {value: unit for unit in units for value in unit.outputs}
    readers: dict[ir.Value, set[Unit]] = {}
    for unit in units:
        for value in unit.sources:
            readers.setdefault(value, set()).add(unit)
    read_otherwise = {value for node in model.graph if node.op_type == "Exp" for value in node.inputs}
    read_otherwise |= set(model.graph.outputs)

    def price(chosen: set[Unit]) -> float:
        total = sum(prices[unit][unit in chosen] for unit in units)
        for value in {*makers, *readers}:
            on_integers = makers.get(value) in chosen
            some = readers.get(value, set())
            if not on_integers and some & chosen:
                total += into
            if on_integers and (some - chosen or value in read_otherwise):
                total += out
        return total

    found, cost = place(units, lambda value: (1, 8, 4, 4), lambda unit: prices[unit], crossings)
    best = min(price(set(some)) for n in range(len(units) + 1) for some in itertools.combinations(units, n))
    assert price(set(found)) == cost == best


def test_what_must_or_must_not_be_on_integers(parse: Parse) -> None:
    units, _ = find_units(next(scopes(with_constants(parse(RESIDUAL)))))
    first, last = units[0], units[-1]

    def costs(unit: Unit) -> tuple[float, float]:
        return (math.inf, 1e9) if unit is first else (1e9, math.inf) if unit is last else (1.0, 1.0)

    found, _ = place(units, lambda value: (1, 8, 4, 4), costs, Foretold(Table.of("cpu-vnni")))
    assert first in found
    assert last not in found


def test_a_unit_takes_in_bias_and_activation(parse: Parse) -> None:
    model = parse(
        """m (float[2,3,8] x, float[4,8] t) => (float[2,3,5] y, float[4,6] g, float[2,3,8] h)
        <float[8,5] w, float[5] b, float[6,8] v, float[6] c> {
            p = MatMul (x, w)
            y = Add (p, b)
            q = Gemm <transB = 1> (t, v, c)
            g = Relu (q)
            h = HardSigmoid (x)
        }"""
    )
    units, left = find_units(next(scopes(with_constants(model))))
    assert [[node.op_type for node in unit.nodes] for unit in units] == [
        ["MatMul", "Add"],
        ["Gemm", "Relu"],
        ["HardSigmoid"],
    ]
    assert [unit.role for unit in units] == [Role.LAYER, Role.LAYER, Role.CLAMP]
    assert [unit.needs_output for unit in units] == [False, True, True]
    assert left == []


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("y = Gemm <alpha = 2.0> (x, w, b)", "no integer kernel"),
        ("y = MatMul (w, x)", "first operand is constant"),
        ("v = Exp (w) y = Gemm (x, v)", "computed at run time"),
        ("y = ConvTranspose (i, k)", "no integer kernel"),
    ],
)
def test_layers_that_are_no_units_say_why(body: str, reason: str, parse: Parse) -> None:
    model = parse(
        f"m (float[8,8] x, float[1,8,4,4] i) => (y) <float[8,8] w, float[8] b, float[8,8,1,1] k> {{ {body} }}"
    )
    _, (left,) = find_units(next(scopes(with_constants(model))))
    assert reason in left.reason


@pytest.mark.parametrize(
    ("kind", "array", "fixed"),
    [
        ("Conv", np.ones((20, 1, 256), np.float32), True),
        ("Conv", np.ones((20, 1, 9), np.float32), False),
        ("Conv", np.ones((20, 2, 256), np.float32), False),
        ("Conv", np.ones((20, 1, 64, 64), np.float32), False),
        ("MatMul", np.maximum(0, 1 - np.abs(np.arange(100)[:, None] - 5 * np.arange(20)) / 5).astype(np.float32), True),
        ("MatMul", np.random.default_rng(0).standard_normal((100, 20)).astype(np.float32), False),
        ("MatMul", (np.random.default_rng(0).random((100, 20)) > 0.9).astype(np.float32), False),
    ],
)
def test_fixed_filters_are_known(kind: str, array: np.ndarray, fixed: bool) -> None:
    weight = ir.Value(name="w", const_value=ir.tensor(array, name="w"), shape=ir.Shape(array.shape))
    graph = ir.Graph([], [], nodes=[], initializers=[weight])
    node = ir.node(kind, [ir.Value(name="x"), weight])
    graph.append(node)
    assert is_filter_bank(node) == fixed


def test_what_follows_convolutions_stays_channels_last(parse: Parse) -> None:
    """A sum of integer convolutions is read by floats behind a Transpose, which a pool on integers makes small."""
    model = parse(
        """m (float[1,8,4,4] x) => (float[1,8] y) <float[8,8,1,1] w> {
            c1 = Conv (x, w)
            c2 = Conv (x, w)
            a = Add (c1, c2)
            p = GlobalAveragePool (a)
            y = Flatten (p)
        }"""
    )
    (scope,) = scopes(with_constants(model))
    units, _ = find_units(scope)
    pooled = next(unit for unit in units if unit.node.op_type == "GlobalAveragePool")

    def choose(unit: Unit) -> tuple[float, float]:
        return (1.0, 3.0) if unit is pooled else (9.0, 1.0)

    for turn, chosen in ((0.0, False), (4.0, True)):
        costs = Turned(Table.of("cpu-vnni"), turn)
        on_integers, _ = place(units, lambda value: tuple(value.shape or ()), choose, costs)  # type: ignore[arg-type]
        assert (pooled in on_integers) is chosen


def test_what_convolutions_read_is_turned_once_whoever_makes_it(parse: Parse) -> None:
    """A product on integers before two convolutions saves no Transpose: it is not channels-last."""
    model = parse(
        """m (float[1,8,4,4] x, float[1,8,4,4] z) => (float[1,8,4,4] y1, float[1,8,4,4] y2) <float[8,8,1,1] w> {
            m = Mul (x, z)
            y1 = Conv (m, w)
            y2 = Conv (m, w)
        }"""
    )
    (scope,) = scopes(with_constants(model))
    units, _ = find_units(scope)
    product = units[0]
    assert product.node.op_type == "Mul"

    def choose(unit: Unit) -> tuple[float, float]:
        return (1.0, 2.0) if unit is product else (900.0, 1.0)

    for turn in (0.0, 64.0):
        costs = Turned(Table.of("cpu-vnni"), turn)
        on_integers, spent = place(units, lambda value: tuple(value.shape or ()), choose, costs)  # type: ignore[arg-type]
        assert on_integers == units[1:]
        assert spent == 1.0 + 0.5 + turn + 2 * (
            1.0 + 0.5 + turn
        )  # the product, its rounding; the layers, their results
