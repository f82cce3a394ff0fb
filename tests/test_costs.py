"""The cost table is well formed, answers between and beyond its points, and tells what is known of real kernels."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import onnx_ir as ir
import pytest

from penjing.ir.ops import OPERATORS
from penjing.passes.quantize.costs import Table, Target

costs = Table.of("cpu-vnni")


def value(shape: Sequence[int | str] | None, name: str = "v", *, constant: bool = False) -> ir.Value:
    made = ir.val(name, dtype=ir.DataType.FLOAT, shape=None if shape is None else ir.Shape(shape))
    if constant:
        tensor = ir.LazyTensor(lambda: None, ir.DataType.FLOAT, made.shape)  # type: ignore[arg-type, return-value]
        made.const_value = tensor
        ir.Graph([], [], nodes=[], initializers=[made])
    return made


def node(operator: str, *inputs: ir.Value, shape: Sequence[int], **attributes: object) -> ir.Node:
    made = ir.node(operator, inputs, attributes)  # type: ignore[arg-type]
    made.outputs[0].shape = ir.Shape(shape)
    return made


def conv(pixels: int, inputs: int, outputs: int, kernel: int, group: int = 1, x: ir.Value | None = None) -> ir.Node:
    side = math.isqrt(pixels)
    x = value([1, inputs, side, side]) if x is None else x
    weight = value([outputs, inputs // group, kernel, kernel], constant=True)
    return node("Conv", x, weight, shape=[1, outputs, side, side], group=group)


def matmul(rows: int, inputs: int, outputs: int) -> ir.Node:
    return node("MatMul", value([rows, inputs]), value([inputs, outputs], constant=True), shape=[rows, outputs])


def ratio(made: ir.Node) -> float:
    return costs.integer_cost(made) / costs.float_cost(made)


@pytest.mark.parametrize("target", ["cpu-vnni", "cpu-avx2"])
def test_the_tables_are_complete(target: Target) -> None:
    table = Table.of(target)
    for grid in table.grids.values():
        points = math.prod(len(axis) for axis in grid["axes"])
        assert all(axis == sorted(set(axis)) for axis in grid["axes"])
        for column, rates in grid.items():
            if column != "axes":
                assert len(rates) == points
                assert all(0 < rate < 1e4 for rate in rates)
    for row in table.elementwise.values():
        assert all(len(rates) == len(table.elements) and min(rates) > 0 for rates in row.values())
    known = {name for _, name in OPERATORS} | {
        "other",
        "residual Add",
        "MaxPool apart",
        "Resize floor",
        "Resize linear",
    }
    assert set(table.elementwise) <= known
    assert set(table.machine) == {"processor", "threads", "onnxruntime"}


def test_the_table_goes_with_the_package() -> None:
    text = (Path(__file__).parents[1] / "pyproject.toml").read_text()
    assert '"penjing.passes.quantize" = ["*.json"]' in text


def test_at_a_point_between_points_and_beyond_them() -> None:
    grid = costs.grids["matmul"]
    rows, inputs, outputs = grid["axes"]
    last = len(inputs) * len(outputs) - 1  # of the first number of rows
    work = rows[0] * inputs[-1] * outputs[-1]
    there = costs.float_cost(matmul(rows[0], inputs[-1], outputs[-1]))
    assert there == pytest.approx(work * grid["float"][last])
    half = costs.float_cost(matmul(rows[0], (inputs[-1] + inputs[-2]) // 2, outputs[-1]))
    assert costs.float_cost(matmul(rows[0], inputs[-2], outputs[-1])) < half < there
    assert costs.float_cost(matmul(rows[0], 4 * inputs[-1], outputs[-1])) == pytest.approx(4 * there)
    least = costs.float_cost(matmul(rows[0], inputs[0], outputs[0]))
    assert costs.float_cost(matmul(rows[0], 1, 1)) == pytest.approx(least)


@pytest.mark.parametrize(
    ("made", "least", "most"),
    [
        (conv(3136, 64, 64, 3), 0.15, 0.6),
        (conv(196, 256, 256, 3), 0.15, 0.6),
        (conv(784, 256, 64, 1), 0.15, 0.7),
        (conv(6400, 96, 96, 3, 96), 1.0, 4.0),  # depthwise
        (conv(196, 88, 88, 5, 88), 1.5, 5.0),
        (conv(784, 64, 64, 3, 16), 1.0, 6.0),  # groups of 4 channels
        (conv(12544, 3, 32, 3), 1.0, 5.0),  # the first one
        (conv(1, 32, 8, 1), 1.0, 8.0),  # of one pixel
        (matmul(128, 768, 768), 0.1, 0.5),
        (matmul(1, 1024, 1024), 0.1, 0.7),
        (matmul(4, 16, 16), 1.0, 6.0),
    ],
)
def test_layers_gain_and_lose_where_they_do_in_fact(made: ir.Node, least: float, most: float) -> None:
    """Bounds are wide: they hold on any machine of the table's kind."""
    assert least < ratio(made) < most


@pytest.mark.parametrize(
    ("operator", "slower"), [("Softmax", True), ("AveragePool", True), ("MaxPool", True), ("Mul", False)]
)
def test_some_integer_kernels_are_slow(operator: str, slower: bool) -> None:
    shape = [1, 64, 32, 32]
    inputs = [value(shape)] * (2 if operator == "Mul" else 1)
    found = ratio(node(operator, *inputs, shape=shape, kernel_shape=[3, 3]))
    assert found > 2 if slower else found < 2.5


def test_a_pool_of_integers_is_quick_behind_a_convolution() -> None:
    before = conv(1024, 64, 64, 3)
    relu = node("Relu", before.outputs[0], shape=[1, 64, 32, 32])
    pools = [
        node("MaxPool", x, shape=[1, 64, 16, 16], kernel_shape=[2, 2])
        for x in (relu.outputs[0], value([1, 64, 32, 32]))
    ]
    near, apart = map(costs.integer_cost, pools)
    assert apart > 4 * near


def test_what_merges_with_a_float_convolution_is_free() -> None:
    before = conv(3136, 64, 64, 3)
    relu = node("Relu", before.outputs[0], shape=[1, 64, 56, 56])
    assert costs.float_cost(relu) == 0
    assert costs.integer_cost(relu) == 0
    alone = node("Relu", value([1, 64, 56, 56]), shape=[1, 64, 56, 56])
    assert costs.float_cost(alone) > costs.call
    read_twice = conv(3136, 64, 64, 3)
    first, _ = (node("Relu", read_twice.outputs[0], shape=[1, 64, 56, 56]) for _ in range(2))
    assert costs.float_cost(first) > 0


def test_what_has_no_integer_kernel_is_never_chosen() -> None:
    up = node("ConvTranspose", value([1, 8, 4, 4]), value([8, 8, 2, 2], constant=True), shape=[1, 8, 8, 8])
    assert costs.integer_cost(up) == math.inf
    assert 0 < costs.float_cost(up) < math.inf
    assert costs.integer_cost(node("Tanh", value([8]), shape=[8])) == math.inf
    assert costs.dynamic_cost(conv(196, 64, 64, 3)) == math.inf
    assert costs.blocked_cost(matmul(1, 64, 64), 5) == math.inf


def test_dynamic_and_blocked_layers() -> None:
    one_row, many_rows = matmul(1, 1024, 1024), matmul(256, 1024, 1024)
    assert costs.dynamic_cost(many_rows) < costs.float_cost(many_rows) / 1.5
    assert costs.dynamic_cost(one_row) < costs.float_cost(one_row)
    assert costs.blocked_cost(one_row, 4) < costs.float_cost(one_row)
    assert costs.blocked_cost(many_rows, 4) > costs.dynamic_cost(many_rows)
    gates = [value([1, 1024, size], constant=True) for size in (256, 256)]
    lstm = node("LSTM", value([16, 1, 256]), *gates, shape=[16, 1, 1, 256])
    assert costs.dynamic_cost(lstm) < costs.float_cost(lstm)


def test_shapes_by_name_by_function_and_unknown() -> None:
    made = node("Tanh", value(["n", 1000], "x"), shape=[1, 1000])
    small = costs.float_cost(made)
    assert costs.float_cost(made, {"x": [64, 1000]}) > 8 * small
    assert costs.float_cost(made, lambda v: (64, 1000) if v.name == "x" else None) > 8 * small
    assert costs.float_cost(node("Tanh", value(None), shape=[1])) == costs.call
    assert costs.float_cost(node("Conv", value(None), value(None), shape=[1])) == costs.call


def test_operators_that_nobody_measured_cost_something() -> None:
    unknown = ir.node("Mystery", [value([1 << 20])], domain="elsewhere")
    assert costs.float_cost(unknown) > 10 * costs.call
    assert costs.float_cost(ir.node("Constant", [])) == 0


def test_crossings_grow_with_their_elements() -> None:
    for cost in (costs.quantize_cost, costs.dequantize_cost, costs.transpose_cost):
        assert costs.call <= cost(16) <= cost(4096) < cost(1 << 20) < cost(1 << 22)


@pytest.mark.parametrize("made", [conv(3136, 64, 64, 3), conv(784, 256, 64, 1), matmul(128, 768, 768)])
def test_without_integer_dot_products_layers_gain_less(made: ir.Node) -> None:
    avx2 = Table.of("cpu-avx2")
    gained = avx2.integer_cost(made) / avx2.float_cost(made)
    assert 1.3 * ratio(made) < gained < 1
    assert Table.of("any") is not avx2


def test_dynamic_layers_gain_less_too() -> None:
    avx2, made = Table.of("cpu-avx2"), matmul(256, 1024, 1024)
    assert avx2.dynamic_cost(made) / avx2.float_cost(made) > 1.3 * costs.dynamic_cost(made) / costs.float_cost(made)
