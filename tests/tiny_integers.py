"""Tiny models of one operator between DequantizeLinear and QuantizeLinear, and the rows of ``ir.kernels`` as such."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx.shape_inference
import onnx_ir as ir

from penjing.runtime.session import open_session, run_feed

SCALE, ZERO = 0.05, 100
IMAGE = (1, 8, 6, 6)


class Graph:
    """A model under construction, in which everything floats but what goes through ``quantized``."""

    def __init__(self, opset: int = 17) -> None:
        self.tape, self.opset = ir.tape.Tape(), opset
        self.inputs: list[ir.Value] = []
        self.outputs: list[ir.Value] = []
        self.random = np.random.default_rng(0)
        self.count = 0

    def constant(self, array: Any) -> ir.Value:
        self.count += 1
        return self.tape.initializer(ir.tensor(np.asarray(array), name=f"constant{self.count}"))

    def input(self, shape: Sequence[int | str], dtype: ir.DataType = ir.DataType.FLOAT) -> ir.Value:
        self.inputs.append(ir.val(f"x{len(self.inputs)}", dtype=dtype, shape=ir.Shape(shape)))
        return self.inputs[-1]

    def node(self, operator: str, *inputs: Any, outputs: int = 1, domain: str = "", **attributes: Any) -> ir.Value:
        """``inputs``: values, arrays and None."""
        given = [x if x is None or isinstance(x, ir.Value) else self.constant(x) for x in inputs]
        made = self.tape.op_multi_out(operator, given, attributes, num_outputs=outputs, domain=domain)
        for value in made:
            self.count += 1
            value.name = f"{operator}{self.count}"
        return made[0]

    def quantize(self, value: ir.Value, scale: float = SCALE, zero: int = ZERO, dtype: Any = np.uint8) -> ir.Value:
        return self.node("QuantizeLinear", value, np.float32(scale), np.asarray(zero, dtype))

    def quantized(self, value: ir.Value, scale: float = SCALE, zero: int = ZERO, dtype: Any = np.uint8) -> ir.Value:
        stored = self.quantize(value, scale, zero, dtype)
        return self.node("DequantizeLinear", stored, np.float32(scale), np.asarray(zero, dtype))

    def activation(self, shape: Sequence[int | str] = IMAGE, **parameters: Any) -> ir.Value:
        return self.quantized(self.input(shape), **parameters)

    def weight(self, shape: Sequence[int], axis: int | None = 0) -> ir.Value:
        """int8 of 7 bits, which no machine saturates, with a scale for each channel of ``axis``."""
        stored = self.random.integers(-63, 64, shape).astype(np.int8)
        sizes = () if axis is None else (shape[axis],)
        scale = self.random.uniform(0.002, 0.004, sizes).astype(np.float32)
        attributes = {} if axis is None else {"axis": axis}
        return self.node("DequantizeLinear", stored, scale, np.zeros(sizes, np.int8), **attributes)

    def model(self, *outputs: ir.Value) -> ir.Model:
        for value in outputs:
            if value.dtype is None:
                value.dtype = ir.DataType.FLOAT
        opsets = {"": self.opset, "com.microsoft": 1}
        initializers = self.tape.initializers
        graph = ir.Graph(self.inputs, outputs, nodes=self.tape.nodes, initializers=initializers, opset_imports=opsets)
        proto = ir.to_proto(ir.Model(graph, ir_version=8 if self.opset < 21 else 10))
        return ir.from_proto(onnx.shape_inference.infer_shapes(proto))


def built(make: Callable[[Graph], Any], opset: int = 17) -> ir.Model:
    """The model that ``make`` gives the outputs of."""
    graph = Graph(opset)
    found = make(graph)
    return graph.model(*(found if isinstance(found, tuple) else (found,)))


def only(model: ir.Model, operator: str) -> ir.Node:
    """Its one node of an operator."""
    (found,) = (node for node in model.graph if node.op_type == operator)
    return found


def steps_apart(model: ir.Model) -> float:
    """How far the integer kernels are from the simulation in float, in quantization steps."""
    random = np.random.default_rng(1)
    feed: dict[str, Any] = {}
    for value in model.graph.inputs:
        sizes = [size if isinstance(size, int) else 2 for size in value.shape or ()]
        feed[value.name or ""] = random.normal(size=sizes).astype(np.float32) * 2
        if value.dtype is ir.DataType.BOOL:
            feed[value.name or ""] = random.random(sizes) > 0.5
    off, on = (run_feed(open_session(model, level=level), feed) for level in ("off", "all"))
    return max(float(np.abs(off[name] - on[name]).max()) / SCALE for name in off)


# Rows -----------------------------------------------------------------------------------------------------------------


@dataclass
class Row:
    """An operator with attributes, on activations of these shapes and constants after them."""

    operator: str
    shapes: Sequence[Sequence[int]] = (IMAGE,)
    constants: Sequence[Any] = ()
    attributes: dict[str, Any] = field(default_factory=dict)
    opset: int = 17
    outputs: int = 1
    weight: Sequence[int] | None = None  # the shape of a second input that is an int8 constant
    axis: int | None = 0

    @property
    def name(self) -> str:
        words = [f"{key}={value}" for key, value in self.attributes.items()]
        return " ".join([self.operator, "x".join(map(str, self.shapes[0])), *words, f"opset{self.opset}"])

    def model(self, *, scale: float = SCALE, output: bool = True) -> ir.Model:
        """The operator between DequantizeLinear and, with ``output``, QuantizeLinear of that scale."""
        graph = Graph(self.opset)
        inputs = [graph.activation(shape) for shape in self.shapes]
        if self.operator == "Where":
            inputs.insert(0, graph.input(self.shapes[0], ir.DataType.BOOL))
        if self.weight is not None:
            inputs.append(graph.weight(self.weight, self.axis))
        graph.node(self.operator, *inputs, *self.constants, outputs=self.outputs, **self.attributes)
        made = list(graph.tape.nodes)[-1].outputs
        return graph.model(*(graph.quantized(value, scale) if output else value for value in made))


def ints(*numbers: int) -> Any:
    return np.array(numbers, np.int64)


TWICE = np.array([1, 1, 2, 2], np.float32)
BIAS = np.linspace(-1, 1, 8, dtype=np.float32)
SAME = {"pads": [1, 1, 1, 1]}
PAIR = (IMAGE, IMAGE)

INTEGER = [
    *(Row("Conv", weight=(8, 8, 3, 3), constants=[BIAS], attributes=SAME, opset=opset) for opset in (13, 17, 21, 23)),
    Row("Conv", weight=(8, 8, 1, 1)),
    Row("Conv", weight=(8, 8, 3, 3), axis=None),
    Row("Conv", weight=(8, 1, 3, 3), constants=[BIAS], attributes={"group": 8}),
    Row("Conv", weight=(16, 1, 3, 3), attributes={"group": 8}),
    Row("Conv", weight=(8, 2, 3, 3), attributes={"group": 4, "strides": [2, 2]}),
    Row("Conv", weight=(8, 8, 3, 3), attributes={"dilations": [2, 2]}),
    Row("Conv", weight=(8, 8, 3, 3), attributes={"auto_pad": "SAME_UPPER"}),
    Row("Conv", [(1, 3, 6, 6)], weight=(8, 3, 3, 3)),
    Row("Conv", [(1, 8, 12)], weight=(8, 8, 3)),
    Row("Conv", [(1, 8, 12)], weight=(8, 1, 3), attributes={"group": 8}),
    Row("Conv", [(1, 8, 4, 4, 4)], weight=(8, 8, 3, 3, 3)),
    Row("Conv", [IMAGE, (8, 8, 1, 1)]),
    *(Row("MatMul", [(4, 16)], weight=(16, 8), axis=1, opset=opset) for opset in (13, 17, 21)),
    Row("MatMul", [(2, 4, 16)], weight=(16, 8), axis=1),
    Row("MatMul", [(2, 4, 16)], weight=(2, 16, 8), axis=None),
    Row("MatMul", [(2, 4, 16), (2, 16, 8)]),
    Row("MatMul", [(16,)], weight=(16, 8), axis=1),
    *(Row("Gemm", [(4, 16)], weight=(16, 8), axis=1, constants=[BIAS], opset=opset) for opset in (13, 17, 21)),
    Row("Gemm", [(4, 16)], weight=(8, 16), axis=0, constants=[BIAS], attributes={"transB": 1}),
    Row("Gemm", [(16, 4)], weight=(16, 8), axis=1, constants=[BIAS], attributes={"transA": 1}),
    Row("Gemm", [(4, 16)], weight=(16, 8), axis=1, attributes={"alpha": 0.5}),
    Row("Gemm", [(4, 16), (16, 8)]),
    *(Row("Add", PAIR, opset=opset) for opset in (13, 17, 21)),
    Row("Add", [IMAGE, (6,)]),
    Row("Add", [(8, 1), (1, 6)]),
    Row("Mul", PAIR),
    Row("Mul", [IMAGE, (1, 8, 1, 1)]),
    Row("Concat", PAIR, attributes={"axis": 1}),
    Row("Concat", [IMAGE, IMAGE, IMAGE], attributes={"axis": -1}),
    Row("Where", PAIR),
    Row("Sigmoid"),
    Row("LeakyRelu", attributes={"alpha": 0.2}),
    Row("Softmax"),
    Row("Softmax", attributes={"axis": 1}),
    Row("AveragePool", attributes={"kernel_shape": [2, 2], "strides": [2, 2]}),
    Row("AveragePool", attributes={"kernel_shape": [3, 3], "ceil_mode": 1, "strides": [2, 2]}),
    Row("AveragePool", attributes={"kernel_shape": [3, 3], "count_include_pad": 1, **SAME}),
    Row("AveragePool", [(1, 8, 12)], attributes={"kernel_shape": [2]}),
    Row("AveragePool", [(1, 8, 4, 4, 4)], attributes={"kernel_shape": [2, 2, 2]}),
    Row("GlobalAveragePool"),
    Row("GlobalAveragePool", [(1, 8, 12)]),
    *(Row("MaxPool", attributes={"kernel_shape": [2, 2]}, opset=opset) for opset in (13, 17, 21)),
    Row("MaxPool", attributes={"kernel_shape": [2, 2], "dilations": [2, 2]}),
    Row("MaxPool", [(1, 8, 12)], attributes={"kernel_shape": [2]}),
    Row("Reshape", constants=[ints(1, -1)]),
    Row("Transpose", attributes={"perm": [0, 2, 3, 1]}),
    Row("Flatten"),
    Row("Identity"),
    Row("Squeeze", constants=[ints(0)]),
    Row("Unsqueeze", constants=[ints(0)]),
    Row("Slice", constants=[ints(0), ints(4), ints(1)]),
    Row("Slice", constants=[ints(-1), ints(-9), ints(2), ints(-1)]),
    Row("Split", attributes={"axis": 1}, outputs=2),
    Row("Split", constants=[ints(3, 3, 2)], attributes={"axis": 1}, outputs=3),
    Row("Gather", constants=[ints(0, 2)], attributes={"axis": 1}),
    Row("Gather", constants=[np.array(1)], attributes={"axis": 2}),
    Row("GatherElements", [(4, 4)], [np.zeros((2, 4), np.int64)]),
    Row("Expand", [(1, 8, 1)], [ints(2, 8, 4)]),
    Row("Tile", constants=[ints(1, 1, 2, 1)]),
    Row("DepthToSpace", attributes={"blocksize": 2}),
    Row("DepthToSpace", attributes={"blocksize": 2, "mode": "CRD"}),
    Row("ReduceMax", attributes={"axes": [2, 3]}),
    Row("ReduceMax", constants=[ints(1)], opset=18, attributes={"keepdims": 0}),
    Row("ReduceMin", attributes={"axes": [1]}),
    Row("Resize", constants=[None, TWICE], attributes={"mode": "nearest"}),
    Row("Resize", [(1, 8, 6)], [None, TWICE[1:]], {"mode": "nearest"}),
    *(
        Row(
            "Resize", constants=[None, TWICE], attributes={"coordinate_transformation_mode": mode, "nearest_mode": near}
        )
        for mode, near in (("asymmetric", "floor"), ("align_corners", "ceil"), ("half_pixel", "round_prefer_ceil"))
    ),
    Row("Resize", constants=[None, None, ints(1, 8, 9, 9)], attributes={"mode": "nearest"}),
]

ONES = np.ones(8, np.float32)
FLOATING = [
    Row("ConvTranspose", weight=(8, 4, 2, 2), axis=1),
    Row(
        "AveragePool",
        attributes={"kernel_shape": [3, 3], "ceil_mode": 1, "count_include_pad": 1, "strides": [2, 2], **SAME},
        opset=19,
    ),
    Row("Resize", constants=[None, TWICE], attributes={"mode": "linear"}),
    Row("Resize", constants=[None, TWICE], attributes={"mode": "cubic"}),
    Row("Gemm", [(4, 16)], weight=(16, 8), axis=1, constants=[BIAS], attributes={"alpha": 0.5}),
    Row("Gemm", [(4, 16)], weight=(16, 8), axis=1, constants=[BIAS], attributes={"beta": 0.5}),
    Row("Gemm", [(4, 16)], weight=(16, 8), axis=1, constants=[BIAS[None]]),
    Row("Gemm", [(4, 16)], weight=(16, 8), axis=1, constants=[BIAS[:1]]),
    *(Row(name, PAIR) for name in ("Sub", "Div", "Max", "Min", "Sum", "PRelu")),
    *(
        Row(name)
        for name in (
            *(
                "Relu",
                "HardSwish",
                "HardSigmoid",
                "Tanh",
                "Exp",
                "Sqrt",
                "Neg",
                "Erf",
                "Abs",
                "Elu",
                "Softplus",
                "Selu",
            ),
            *("Celu", "Log", "Reciprocal", "Sin", "GlobalMaxPool", "LogSoftmax"),
        )
    ),
    Row("Gelu", opset=20),
    Row("Mish", opset=18),
    Row("Clip", constants=[np.float32(-1), np.float32(1)]),
    Row("Pow", constants=[np.float32(2)]),
    Row("ReduceMean", attributes={"axes": [2, 3]}),
    Row("ReduceSum", constants=[ints(2)]),
    Row("Pad", constants=[ints(0, 0, 1, 1, 0, 0, 1, 1)]),
    Row("SpaceToDepth", attributes={"blocksize": 2}),
    Row("GatherND", [(4, 4)], [np.zeros((4, 1), np.int64)]),
    Row("CumSum", [(4, 4)], [np.array(1)]),
    Row("Trilu", [(4, 4)]),
    Row("LayerNormalization", [(1, 4, 8)], [ONES, ONES], {"axis": -1}),
    Row("InstanceNormalization", constants=[ONES, ONES]),
    Row("BatchNormalization", constants=[ONES, ONES, ONES, ONES]),
    Row("Einsum", [(4, 4), (4, 4)], attributes={"equation": "ij,jk->ik"}),
    Row("GridSample", [IMAGE, (1, 6, 6, 2)]),
]
