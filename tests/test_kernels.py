"""What the table says of integer kernels, asked of the installed ONNX Runtime: for each row a tiny model, optimized."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from tiny_integers import (
    BIAS,
    FLOATING,
    IMAGE,
    INTEGER,
    ONES,
    SCALE,
    TWICE,
    ZERO,
    Graph,
    Row,
    built,
    ints,
    only,
    steps_apart,
)

from penjing.ir import kernels as table
from penjing.ir.affine import S8, U8, Affine
from penjing.ir.ops import OPERATORS
from penjing.runtime.kernels import Kernels, kernels
from penjing.runtime.session import DoesNotRun

integer_rows = pytest.mark.parametrize("row", INTEGER, ids=lambda row: row.name)


def names(found: Kernels) -> set[str]:
    return set(found.integer) - {"Transpose"}


@integer_rows
def test_row_runs_on_integers(row: Row) -> None:
    model = row.model()
    entry = table.integer(only(model, row.operator))
    assert entry is not None
    found = kernels(model)
    kernel = row.operator if entry.kernel == "itself" else entry.kernel
    gone = row.operator == "Identity"  # ONNX Runtime removes it
    moves = "Transpose" if row.operator == "Transpose" else kernel
    assert gone or moves in found.integer
    assert (found.floating, found.others) == ([], [])
    assert table.obstacle(only(model, row.operator)) is None
    assert steps_apart(model) < 1.01


@integer_rows
def test_row_with_other_scales(row: Row) -> None:
    """Only where the table says ``equal`` does another scale after the operator keep it in float."""
    model = row.model(scale=0.03)
    entry = table.integer(only(model, row.operator))
    assert entry is not None
    if row.operator == "Identity":
        return
    found = kernels(model)
    floating = [*found.floating, *found.others]
    assert [item.operator for item in floating] == ([row.operator] if entry.equal else [])
    if entry.equal:
        assert floating[0].reason == f"{row.operator} needs equal scales and zero points before and after it"


@integer_rows
def test_row_without_a_scale_after_it(row: Row) -> None:
    """Only where the table says so does an operator run on integers without a QuantizeLinear behind it."""
    model = row.model(output=False)
    node = only(model, row.operator)
    entry = table.integer(node)
    assert entry is not None
    found = kernels(model)
    if entry.needs_output and not (row.operator == "Gemm" and len(node.inputs) < 3) and not table.moves_along(node):
        (item,) = (*found.floating, *found.others)
        assert item.operator == row.operator
        assert "output" in item.reason
    elif not table.moves_along(node):
        assert found.floating == []
        assert names(found) <= {"MatMulIntegerToFloat", "QGemm"}


@pytest.mark.parametrize("row", FLOATING, ids=lambda row: row.name)
def test_row_stays_in_float(row: Row) -> None:
    model = row.model()
    node = only(model, row.operator)
    assert table.integer(node) is None
    if row.operator == "AveragePool":  # it runs, but not right
        assert steps_apart(model) > 1.01
        return
    assert names(kernels(model)) == set()
    reason = table.obstacle(node)
    assert reason is not None
    assert reason.startswith(f"ONNX Runtime has no integer kernel for {row.operator}")


def test_every_row_of_the_table_is_tried() -> None:
    said = {entry.name for entry in OPERATORS.values() if entry.integer is not None}
    assert said == {row.operator for row in INTEGER}


def test_a_dilated_average_pool_is_refused_for_it_does_not_load() -> None:
    row = Row("AveragePool", attributes={"kernel_shape": [2, 2], "dilations": [2, 2]}, opset=19)
    assert table.integer(only(row.model(), "AveragePool")) is None
    with pytest.raises(DoesNotRun):
        kernels(row.model())


def test_types_other_than_float32_have_no_kernel() -> None:
    graph = Graph()
    x = graph.input(IMAGE, ir.DataType.DOUBLE)
    model = graph.model(graph.node("Sigmoid", x))
    assert table.integer(only(model, "Sigmoid")) is None


# Activation functions -------------------------------------------------------------------------------------------------


def activated(
    function: str, *limits: Any, scale: float, zero: int, dtype: Any = np.uint8, between: bool = False
) -> Any:
    def make(graph: Graph) -> ir.Value:
        y = graph.node("Conv", graph.activation(), graph.weight((8, 8, 1, 1)))
        y = graph.quantized(y) if between else y
        return graph.quantized(graph.node(function, y, *map(np.float32, limits)), scale, zero, dtype)

    return built(make)


@pytest.mark.parametrize(
    ("function", "limits", "scale", "zero", "dtype", "fuses"),
    [
        ("Relu", (), SCALE, 0, np.uint8, True),
        ("Relu", (), SCALE, 1, np.uint8, False),
        ("Relu", (), SCALE, 128, np.uint8, False),
        ("Relu", (), SCALE, -128, np.int8, True),
        ("Relu", (), SCALE, 0, np.int8, False),
        ("Clip", (0, 6), 6 / 255, 0, np.uint8, True),
        ("Clip", (0, 6), 0.01, 0, np.uint8, True),
        ("Clip", (0, 6), 0.0236, 0, np.uint8, False),
        ("Clip", (0, 6), 6 / 255, 1, np.uint8, False),
        ("Clip", (-1, 1), 1.9 / 255, 128, np.uint8, True),
        ("Clip", (-1, 1), 2.1 / 255, 128, np.uint8, False),
        ("Clip", (-8, 8), SCALE, ZERO, np.uint8, True),
    ],
)
def test_relu_and_clip_fuse_where_the_scale_cuts_off_as_much(
    function: str, limits: tuple[float, ...], scale: float, zero: int, dtype: Any, fuses: bool
) -> None:
    model = activated(function, *limits, scale=scale, zero=zero, dtype=dtype)
    condition = table.fused_activation(only(model, "Conv"), only(model, function))
    assert condition is not None
    grid = U8 if dtype is np.uint8 else S8
    assert condition.hold(Affine(np.float32(scale), np.asarray(zero, dtype), grid)) is fuses  # type: ignore[arg-type]
    found = kernels(model)
    assert found.fused == fuses
    if not fuses:
        assert found.floating[0].reason == f"the QuantizeLinear after {function} reaches beyond what that lets through"


@pytest.mark.parametrize("function", ["LeakyRelu", "Sigmoid"])
def test_functions_with_a_kernel_need_a_scale_before_them(function: str) -> None:
    beside, between = (activated(function, scale=SCALE, zero=ZERO, between=between) for between in (False, True))
    assert table.fused_activation(only(beside, "Conv"), only(beside, function)) is None
    assert kernels(beside).summary() == "0 of 1 layers in integer kernels"
    assert kernels(between).integer == {"QLinearConv": 1, f"QLinear{function}": 1, "Transpose": 2}


@pytest.mark.parametrize("function", ["HardSwish", "Tanh", "Elu"])
def test_functions_without_a_kernel_need_a_scale_before_them(function: str) -> None:
    found = kernels(activated(function, scale=SCALE, zero=ZERO))
    assert found.fused == 0
    assert "has no scale" in found.floating[0].reason
    assert function in found.floating[0].reason
    assert kernels(activated(function, scale=SCALE, zero=ZERO, between=True)).fused == 1


def test_silu_is_three_kernels_with_a_scale_at_each_step_and_none_without() -> None:
    def silu(graph: Graph, quantized: Callable[..., ir.Value]) -> ir.Value:
        y = quantized(graph.node("Conv", graph.activation(), graph.weight((8, 8, 1, 1))))
        return graph.quantized(graph.node("Mul", y, quantized(graph.node("Sigmoid", y))))

    found = kernels(built(lambda graph: silu(graph, graph.quantized)))
    assert {"QLinearConv", "QLinearSigmoid", "QLinearMul"} <= set(found.integer)
    assert kernels(built(lambda graph: silu(graph, lambda value: value))).fused == 0


def test_relu_alone_vanishes_between_equal_scales() -> None:
    def make(graph: Graph) -> ir.Value:
        return graph.quantized(graph.node("Relu", graph.activation(zero=0)), zero=0)

    assert kernels(built(make)).quantizers == {"QuantizeLinear": 1, "DequantizeLinear": 1}


# Biases ---------------------------------------------------------------------------------------------------------------


def biased(
    shape: Sequence[int | str], bias: Any, *, output: bool = True, between: bool = False, after: str = "", **how: Any
) -> ir.Model:
    """MatMul and Add."""

    def make(graph: Graph) -> ir.Value:
        y = graph.node("MatMul", graph.activation(shape), graph.weight((16, 8), 1))
        y = graph.quantized(y) if between else y
        b = graph.quantized(graph.constant(bias)) if between else bias
        y = graph.node("Add", y, b)
        y = graph.node(after, y) if after else y
        return graph.quantized(y, zero=0 if after else ZERO) if output else y

    return built(make, **how)


@pytest.mark.parametrize("shape", [(4, 16), (2, 4, 16)])
@pytest.mark.parametrize("opset", [13, 17, 21])
def test_matmul_and_its_bias_are_one_kernel_with_a_scale_behind_both(shape: tuple[int, ...], opset: int) -> None:
    model = biased(shape, BIAS, opset=opset)
    found = table.matmul_bias(only(model, "MatMul"))
    assert found is not None
    assert (found.add, found.flat) == (only(model, "Add"), True)
    assert kernels(model).integer["QGemm"] == 1
    assert steps_apart(model) < 1.01


def test_matmul_and_bias_without_a_scale_are_a_float_gemm() -> None:
    (item,) = kernels(biased((2, 4, 16), BIAS, output=False)).floating
    assert item.operator == "MatMul"
    assert item.reason == "ONNX Runtime makes a Gemm of it and its bias, and that has no output scale"


def test_a_bias_of_one_row_makes_a_float_gemm_of_a_flat_matmul_only() -> None:
    flat, deep = biased((4, 16), BIAS[None]), biased((2, 4, 16), BIAS[None])
    found = table.matmul_bias(only(flat, "MatMul"))
    assert found is not None
    assert not found.flat
    assert kernels(flat).floating[0].reason == "ONNX Runtime makes a Gemm of it and its bias, which is not [N]"
    assert table.matmul_bias(only(deep, "MatMul")) is None
    assert kernels(deep).integer["MatMulIntegerToFloat"] == 1


def test_a_bias_with_scales_around_it_is_an_add() -> None:
    assert kernels(biased((2, 4, 16), BIAS, between=True)).integer == {"QLinearMatMul": 1, "QLinearAdd": 1}


def test_relu_behind_a_bias_fuses_only_into_a_flat_matmul() -> None:
    """Between the Gemm that ONNX Runtime makes of a deep one and the Relu comes a Reshape."""
    flat, deep = biased((4, 16), BIAS, after="Relu"), biased((2, 4, 16), BIAS, after="Relu")
    assert kernels(flat).fused == 1
    assert table.fused_activation(only(flat, "Add"), only(flat, "Relu")) is not None
    assert kernels(deep).fused == 0
    assert table.fused_activation(only(deep, "Add"), only(deep, "Relu")) is None


def conv_bias(scale: float, dtype: Any) -> ir.Model:
    def make(graph: Graph) -> ir.Value:
        weight = graph.weight((8, 8, 1, 1))
        scales = graph.tape.nodes[-1].inputs[1].const_value.numpy() * np.float32(SCALE * scale)  # type: ignore[union-attr]
        bias = graph.node("DequantizeLinear", np.ones(8, dtype), scales, np.zeros(8, dtype), axis=0)
        return graph.quantized(graph.node("Conv", graph.activation(), weight, bias))

    return built(make)


def test_a_bias_of_integers_has_the_product_of_the_scales() -> None:
    assert kernels(conv_bias(1, np.int32)).fused == 1
    wrong, narrow = kernels(conv_bias(2, np.int32)), kernels(conv_bias(1, np.int8))
    product = "the scale of its bias is not the product of the scales of its input and weight"
    assert wrong.floating[0].reason == product
    assert narrow.floating[0].reason == "its bias is quantized, but not to int32"


# Around a layer -------------------------------------------------------------------------------------------------------


def around(*, before: Callable[[Graph], ir.Value] | None = None, after: Callable[..., Any], opset: int = 17) -> Any:
    def make(graph: Graph) -> Any:
        x = before(graph) if before else graph.activation()
        return after(graph, graph.node("Conv", x, graph.weight((8, 8, 1, 1))))

    return kernels(built(make, opset))


def test_fan_out_keeps_a_layer_in_float() -> None:
    found = around(after=lambda graph, y: (graph.quantized(y), graph.quantized(y, 0.04)))
    assert "fans out to 2 readers" in found.floating[0].reason
    found = around(after=lambda graph, y: (graph.quantized(y), y))
    assert "is an output of the graph" in found.floating[0].reason
    found = around(after=lambda graph, y: (graph.quantized(y), graph.node("Tanh", y)))
    assert "fans out to 2 readers" in found.floating[0].reason


def test_fan_out_behind_the_quantizer_does_not() -> None:
    def readers(graph: Graph, y: ir.Value) -> tuple[ir.Value, ...]:
        y = graph.quantized(y)
        return graph.node("Tanh", y), graph.node("Sin", y)

    assert around(after=readers).fused == 1


def test_sixteen_bits_stay_in_float() -> None:
    found = around(after=lambda graph, y: graph.quantized(y, dtype=np.uint16), opset=21)
    assert found.fused == 0
    found = around(before=lambda graph: graph.activation(dtype=np.uint16), after=Graph.quantized, opset=21)
    assert "uint16, and integer kernels take 8 bits" in found.floating[0].reason


def test_signed_activations_fuse_while_each_has_one_reader() -> None:
    def twice(graph: Graph, y: ir.Value) -> ir.Value:
        y = graph.quantized(y, zero=0, dtype=np.int8)
        sides = [
            graph.quantized(graph.node("Conv", y, graph.weight((8, 8, 1, 1))), zero=0, dtype=np.int8) for _ in "ab"
        ]
        return graph.quantized(graph.node("Add", *sides), zero=0, dtype=np.int8)

    def signed(graph: Graph) -> ir.Value:
        return graph.activation(zero=0, dtype=np.int8)

    assert around(before=signed, after=lambda graph, y: graph.quantized(y, zero=0, dtype=np.int8)).fused == 1
    assert around(before=signed, after=twice).fused < 3


def test_a_float_input_keeps_a_layer_in_float() -> None:
    found = around(before=lambda graph: graph.input(IMAGE), after=Graph.quantized)
    assert found.floating[0].reason == "its input 'x0' is not quantized"


@pytest.mark.parametrize("operator", ["Add", "Mul", "Concat"])
def test_every_operand_needs_a_scale(operator: str) -> None:
    attributes = {"axis": 1} if operator == "Concat" else {}

    def make(graph: Graph) -> ir.Value:
        return graph.quantized(graph.node(operator, graph.activation(), np.ones(IMAGE, np.float32), **attributes))

    assert "is not quantized" in kernels(built(make)).others[0].reason


MOVES = {
    "Reshape": ([ints(1, 8, 36, 1)], {}),
    "Transpose": ([], {"perm": [0, 1, 3, 2]}),
    "MaxPool": ([], {"kernel_shape": [2, 2]}),
    "Slice": ([ints(0), ints(4), ints(2)], {}),
    "Identity": ([], {}),
    "Squeeze": ([ints(0)], {}),
    "Unsqueeze": ([ints(0)], {}),
    "Flatten": ([], {}),
    "Split": ([], {"axis": 1}),
    "Expand": ([ints(2, 8, 6, 6)], {}),
    "Tile": ([ints(1, 1, 2, 1)], {}),
    "Gather": ([ints(0, 1)], {"axis": 2}),
    "Resize": ([None, TWICE], {"mode": "nearest"}),
    "DepthToSpace": ([], {"blocksize": 2}),
    "ReduceMax": ([], {"axes": [2]}),
}


@pytest.mark.parametrize("operator", MOVES)
@pytest.mark.parametrize("forward", [True, False])
def test_which_operators_a_scale_moves_over(operator: str, forward: bool) -> None:
    constants, attributes = MOVES[operator]

    def make(graph: Graph) -> ir.Value:
        y = graph.node("Sigmoid", graph.activation())
        y = graph.quantized(y) if forward else y
        y = graph.node(operator, y, *constants, **attributes)
        y = y if forward else graph.quantized(y)
        return graph.quantized(graph.node("LeakyRelu", y))

    model = built(make)
    found = kernels(model)
    moves = {"QLinearSigmoid", "QLinearLeakyRelu"} <= set(found.integer)
    assert table.moves_along(only(model, operator)) is moves
    assert ({item.operator for item in found.others} == set()) is moves


def test_padding_before_a_convolution_becomes_its_own() -> None:
    def pad(graph: Graph) -> ir.Value:
        return graph.node("Pad", graph.activation(), ints(0, 0, 1, 1, 0, 0, 1, 1))

    found = around(before=pad, after=Graph.quantized)
    assert found.integer["QLinearConv"] == 1


# Weights --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("operator", "shape", "weight", "attributes", "right", "wrong"),
    [
        ("Conv", IMAGE, (8, 8, 1, 1), {}, 0, 1),
        ("MatMul", (4, 16), (16, 16), {}, 1, 0),
        ("Gemm", (4, 16), (16, 16), {}, 1, 0),
        ("Gemm", (4, 16), (16, 16), {"transB": 1}, 0, 1),
    ],
)
def test_scales_along_input_channels_are_wrong_in_silence(
    operator: str, shape: Any, weight: Any, attributes: Any, right: int, wrong: int
) -> None:
    models = [
        Row(operator, [shape], weight=weight, axis=axis, attributes=attributes).model() for axis in (right, wrong)
    ]
    node = only(models[0], operator)
    assert table.weight_axis(node) == right
    assert steps_apart(models[0]) < 1.01
    if operator == "MatMul" and not kernels(models[1]).fused:  # from ONNX Runtime 1.32 on
        assert steps_apart(models[1]) < 1.01
    else:
        assert kernels(models[1]).fused == 1
        assert steps_apart(models[1]) > 1.01


def test_a_matrix_of_three_dimensions_has_one_scale() -> None:
    model = Row("MatMul", [(2, 4, 16)], weight=(2, 16, 8), axis=2).model()
    node = only(model, "MatMul")
    assert table.weight_axis(node) is None
    with contextlib.suppress(DoesNotRun):  # before ONNX Runtime 1.32
        assert steps_apart(model) < 1.01


def test_a_constant_first_operand_is_unsigned() -> None:
    def make(dtype: Any) -> ir.Model:
        def product(graph: Graph) -> ir.Value:
            a = graph.node("DequantizeLinear", np.ones((4, 16), dtype), np.float32(SCALE), np.asarray(0, dtype))
            return graph.quantized(graph.node("MatMul", a, graph.activation((16, 8))))

        return built(product)

    assert kernels(make(np.uint8)).fused == 1
    assert "where uint8 is needed" in kernels(make(np.int8)).floating[0].reason


# Counting -------------------------------------------------------------------------------------------------------------


def test_recurrent_layers_and_layers_in_bodies_are_counted(parse: Callable[[str], ir.Model]) -> None:
    model = parse("""
        net (bool c, float[4, 8] x, float[8, 8] w) => (float[4, 8] y)
        {
            y = If (c) <
                then_branch = t () => (float[4, 8] a) { a = MatMul (x, w) },
                else_branch = e () => (float[4, 8] b) { b = Tanh (x) }
            >
        }
    """)
    found = kernels(model)
    assert found.layers == 1
    assert found.summary() == "0 of 1 layers in integer kernels"
    assert [item.reason for item in found.floating] == ["its input 'x' is not quantized"]
    assert found.floating[0].address.endswith(only_body_node(model))


def only_body_node(model: ir.Model) -> str:
    (node,) = (node for node in model.graph.all_nodes() if node.op_type == "MatMul")
    return node.name or node.op_type


def test_layers_that_quantize_as_they_run_are_in_integer_kernels() -> None:
    def make(graph: Graph) -> ir.Value:
        weight = graph.random.integers(-127, 128, (16, 8)).astype(np.int8)
        return graph.node("DynamicQuantizeMatMul", graph.input((4, 16)), weight, ONES, domain="com.microsoft")

    found = kernels(built(make))
    assert (found.fused, found.layers, found.integer) == (1, 1, {"DynamicQuantizeMatMul": 1})


def test_layers_of_constants_are_computed_ahead_and_do_not_count() -> None:
    def make(graph: Graph) -> ir.Value:
        y = graph.node("MatMul", np.ones((4, 4), np.float32), np.ones((4, 4), np.float32))
        return graph.node("Add", graph.input((4, 4)), y)

    assert kernels(built(make)).layers == 0


def test_bounds_are_those_of_constants() -> None:
    clip = activated("Clip", 0, 6, scale=SCALE, zero=0)
    assert table.bounds(only(clip, "Clip")) == table.Bounds(0, 6)
    relu = activated("Relu", scale=SCALE, zero=0)
    assert table.bounds(only(relu, "Relu")) == table.Bounds(0, math.inf)
    assert table.bounds(only(relu, "Conv")) is None


def test_a_model_too_large_to_look_into_is_refused_in_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("penjing.runtime.session.WHOLE", 100)
    with pytest.raises(DoesNotRun, match="only of a smaller model can the kernels be seen"):
        kernels(Row("Conv", weight=(8, 8, 3, 3)).model())


def test_computations_of_shapes_are_not_missed() -> None:
    def make(graph: Graph) -> ir.Value:
        x = graph.input(("n", 8, 6, 6))
        sizes = graph.node("Concat", graph.node("Slice", graph.node("Shape", x), ints(0), ints(2)), ints(36), axis=0)
        return graph.node("Sigmoid", graph.node("Reshape", x, sizes))

    assert [item.operator for item in kernels(built(make)).others] == ["Reshape", "Sigmoid"]
