"""Random graphs through random pipelines of exact passes: valid after each pass, and the same in ONNX Runtime.

Every value is a float32 matrix. Graphs have branches and loops that capture outer values, calls of functions, tied
weights, Constant nodes, equal constants, unused nodes, several outputs, and outputs that are inputs or initializers.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from hypothesis import given, note, reject, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from penjing.ir.errors import UsageError
from penjing.ir.files import load, save
from penjing.ir.text import text
from penjing.ir.verify import verify
from penjing.passes.base import Context, Effect, Feeds, Outputs, Pass
from penjing.passes.pipeline import Pipeline
from penjing.passes.registry import all_passes
from penjing.runtime.compare import Judge
from penjing.runtime.session import DoesNotRun, OrtRunner

RUNNER = OrtRunner()
SHAPES = [(2, 3), (3, 2), (3, 3)]
NEED_DATA = {"smooth"}


def exact_passes() -> list[str]:
    """Every pass of penjing that with its defaults may run alone and promises the same outputs."""
    found = []
    for name, pass_ in all_passes().items():
        if not pass_.__module__.startswith("penjing.passes.") or pass_.__module__.startswith("penjing.passes.merge."):
            continue  # other tests register wrong ones; merges take other models
        with contextlib.suppress(UsageError):  # it has an option without a default
            if pass_().effect() is not Effect.LOSSY and name not in NEED_DATA:
                found.append(name)
    return found


PASSES = exact_passes()
PIPELINES = st.one_of(
    st.just("clean"), st.lists(st.sampled_from(PASSES), min_size=1, max_size=4, unique=True).map(",".join)
)

Shape = tuple[int, ...]
Draw = Callable[[st.SearchStrategy[Any]], Any]


@dataclass
class Shared:
    """What a graph, its bodies and its functions have in common."""

    names: int = 0  # given out so far
    functions: list[onnx.FunctionProto] = field(default_factory=list)


@dataclass
class Builder:
    """One graph in the making. ``values`` are those in sight with their shapes, outer ones too."""

    draw: Draw
    shared: Shared
    values: list[tuple[str, Shape]]
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    initializers: list[onnx.TensorProto] = field(default_factory=list)
    depth: int = 0

    def name(self, stem: str) -> str:
        self.shared.names += 1
        return f"{stem}{self.shared.names}"

    def pick(self, *shapes: Shape) -> tuple[str, Shape]:
        """A value in sight of one of some shapes, or a new constant where there is none."""
        found = [value for value in self.values if not shapes or value[1] in shapes]
        if found:
            return self.draw(st.sampled_from(found))
        return self.weight(shapes[0])

    def constant(self, array: np.ndarray) -> str:
        """An initializer or a Constant node."""
        name = self.name("c")
        if self.draw(st.booleans()):
            self.initializers.append(numpy_helper.from_array(array, name))
        else:
            self.nodes.append(helper.make_node("Constant", [], [name], value=numpy_helper.from_array(array)))
        return name

    def weight(self, shape: Shape) -> tuple[str, Shape]:
        """A constant in sight of later nodes, so that weights are tied; one of few, so that there are equal ones."""
        seed = self.draw(st.integers(0, 2))
        array = (
            np.random.default_rng(seed).normal(size=shape).astype(np.float32) if seed else np.ones(shape, np.float32)
        )
        found = (self.constant(array), shape)
        self.values.append(found)
        return found

    def node(self, op_type: str, inputs: list[str], shape: Shape, **attributes: Any) -> str:
        output = self.name("v")
        name = self.draw(st.sampled_from(["", f"n{len(self.nodes)}"]))  # none, or one that a body may have too
        self.nodes.append(helper.make_node(op_type, inputs, [output], name=name, **attributes))
        self.values.append((output, shape))
        return output

    def grow(self) -> None:
        self.draw(st.sampled_from(KINDS if self.depth < 2 else KINDS[2:]))(self)


def branches(graph: Builder) -> None:
    x, shape = graph.pick()
    total = graph.node("ReduceSum", [x], (1, 1))
    graph.values.pop()
    flag = graph.node("Greater", [total, graph.constant(np.zeros((1, 1), np.float32))], (1, 1))
    graph.values.pop()
    scalar = graph.node("Squeeze", [flag], ())
    graph.values.pop()
    bodies = {}
    for name in ("then_branch", "else_branch"):
        body, result = body_of(graph, shape)
        bodies[name] = helper.make_graph(body.nodes, name, [], [result], body.initializers)
    graph.node("If", [scalar], shape, **bodies)


def body_of(graph: Builder, shape: Shape, *carried: str) -> tuple[Builder, onnx.ValueInfoProto]:
    """A body that sees the graph's values and its own ``carried`` ones, with an output of ``shape``."""
    seen = [*graph.values, *((name, shape) for name in carried)]
    body = Builder(graph.draw, graph.shared, seen, depth=graph.depth + 1)
    for _ in range(graph.draw(st.integers(0, 3))):
        body.grow()
    inner, _ = body.pick(shape)
    output = body.node(graph.draw(st.sampled_from(["Identity", "Neg"])), [inner], shape)
    return body, helper.make_tensor_value_info(output, TensorProto.FLOAT, shape)


def loop(graph: Builder) -> None:
    x, shape = graph.pick()
    trips = graph.constant(np.array(graph.draw(st.integers(0, 2)), np.int64))
    count, go, state = graph.name("i"), graph.name("go"), graph.name("s")
    body, result = body_of(graph, shape, state)
    goes_on = body.node("Identity", [go], ())
    inputs = [
        helper.make_tensor_value_info(count, TensorProto.INT64, ()),
        helper.make_tensor_value_info(go, TensorProto.BOOL, ()),
        helper.make_tensor_value_info(state, TensorProto.FLOAT, shape),
    ]
    outputs = [helper.make_tensor_value_info(goes_on, TensorProto.BOOL, ()), result]
    graph.node(
        "Loop", [trips, "", x], shape, body=helper.make_graph(body.nodes, "body", inputs, outputs, body.initializers)
    )


def call(graph: Builder) -> None:
    """A function of two matrices of one shape, new or one that there is."""
    if not graph.shared.functions or graph.draw(st.booleans()):
        body = Builder(graph.draw, graph.shared, [("a", (2, 3)), ("b", (2, 3))], depth=2)
        for _ in range(graph.draw(st.integers(1, 3))):
            graph.draw(st.sampled_from([unary, binary, neutral]))(body)
        nodes = [number_as_node(tensor) for tensor in body.initializers] + body.nodes
        made = [output for node in body.nodes for output in node.output if node.op_type != "Constant"]
        graph.shared.functions.append(
            helper.make_function(
                "local",
                graph.name("F"),
                ["a", "b"],
                [graph.draw(st.sampled_from(made))],
                nodes,
                [helper.make_opsetid("", 17)],
            )
        )
    function = graph.draw(st.sampled_from(graph.shared.functions))
    x, shape = graph.pick((2, 3))
    y, _ = graph.pick(shape)
    graph.node(function.name, [x, y], shape, domain="local")


def number_as_node(tensor: onnx.TensorProto) -> onnx.NodeProto:
    """A function has no initializers."""
    return helper.make_node("Constant", [], [tensor.name], value=tensor)


def unary(graph: Builder) -> None:
    x, shape = graph.pick()
    graph.node(graph.draw(st.sampled_from(["Relu", "Neg", "Identity", "Tanh", "Dropout", "Sum", "Max"])), [x], shape)


def binary(graph: Builder) -> None:
    a, shape = graph.pick()
    b, _ = graph.pick(shape)
    graph.node(graph.draw(st.sampled_from(["Add", "Mul", "Sub", "Max"])), [a, b], shape)


def neutral(graph: Builder) -> None:
    x, shape = graph.pick()
    op_type, number = graph.draw(st.sampled_from([("Mul", 1), ("Div", 1), ("Sub", 0), ("Add", 0), ("Add", -0.0)]))
    spread = graph.draw(st.sampled_from([(), (1,), shape]))
    graph.node(op_type, [x, graph.constant(np.full(spread, number, np.float32))], shape)


def transpose(graph: Builder) -> None:
    x, shape = graph.pick()
    perm = graph.draw(st.sampled_from([[0, 1], [1, 0]]))
    graph.node("Transpose", [x], tuple(shape[axis] for axis in perm), perm=perm)


def reshape(graph: Builder) -> None:
    x, shape = graph.pick()
    choices = [(shape, shape), ((0, -1), shape), ((-1, shape[0]), shape[::-1]), (shape[::-1], shape[::-1])]
    target, found = graph.draw(st.sampled_from(choices))
    graph.node("Reshape", [x, graph.constant(np.array(target, np.int64))], found)


def reshape_like(graph: Builder) -> None:
    x, shape = graph.pick()
    like, _ = graph.pick(shape, shape[::-1])
    like_shape = dict(graph.values)[like]
    target = graph.node("Shape", [like], (2,))
    graph.values.pop()
    if graph.draw(st.booleans()):
        target = graph.node("Identity", [target], (2,))
        graph.values.pop()
    graph.node("Reshape", [x, target], like_shape)


def cast(graph: Builder) -> None:
    x, shape = graph.pick()
    wide = graph.node("Cast", [x], shape, to=graph.draw(st.sampled_from([TensorProto.FLOAT, TensorProto.DOUBLE])))
    graph.values.pop()
    graph.node("Cast", [wide], shape, to=TensorProto.FLOAT)


def matmul(graph: Builder) -> None:
    x, shape = graph.pick()
    w, wide = graph.weight((shape[1], 3)) if graph.draw(st.booleans()) else graph.pick((shape[1], 3))
    graph.node("MatMul", [x, w], (shape[0], wide[1]))


def gemm_and_norm(graph: Builder) -> None:
    x, shape = graph.pick()
    w, _ = graph.weight((shape[1], 3))
    b = graph.constant(np.float32([0.5, -1, 2]))
    h = graph.node("Gemm", [x, w, b], (shape[0], 3))
    if graph.draw(st.booleans()):
        graph.values.pop()  # else something else may use it, and the normalization stays
    numbers = [graph.constant(np.float32(row)) for row in ([1, 2, 0.5], [0, 1, -1], [0.1, 0, 3], [1, 0.25, 4])]
    graph.node("BatchNormalization", [h, *numbers], (shape[0], 3))


def split(graph: Builder) -> None:
    x, shape = graph.pick()
    outputs = [graph.name("v"), graph.name("v")]
    lengths = graph.constant(np.array([1, shape[0] - 1], np.int64))
    graph.nodes.append(helper.make_node("Split", [x, lengths], outputs, axis=0))
    graph.node("Concat", outputs[:: graph.draw(st.sampled_from([1, -1]))], shape, axis=0)


def slice_(graph: Builder) -> None:
    x, shape = graph.pick()
    start, end, axis = (graph.constant(np.array([number], np.int64)) for number in (0, 1 << 40, 1))
    graph.node("Slice", [x, start, end, axis], shape)


def expand(graph: Builder) -> None:
    x, shape = graph.pick()
    op_type, numbers = graph.draw(st.sampled_from([("Expand", shape), ("Tile", (1, 1)), ("Pad", (0, 0, 0, 0))]))
    graph.node(op_type, [x, graph.constant(np.array(numbers, np.int64))], shape)


KINDS = [
    *(branches, loop, call, unary, binary, neutral, transpose, reshape, reshape_like),
    *(cast, matmul, gemm_and_norm, split, slice_, expand),
]


@st.composite
def models(draw: Draw) -> onnx.ModelProto:
    inputs = [
        (f"x{at}", shape) for at, shape in enumerate(draw(st.lists(st.sampled_from(SHAPES), min_size=1, max_size=2)))
    ]
    graph = Builder(draw, Shared(), list(inputs))
    for _ in range(draw(st.integers(1, 8))):
        graph.grow()
    outputs = draw(st.lists(st.sampled_from(graph.values), min_size=1, max_size=4, unique=True))
    known = draw(st.booleans())  # whether the file says the sizes of the inputs

    def info(name: str, shape: Shape, sizes: bool) -> onnx.ValueInfoProto:
        dims = shape if sizes else [f"{name}_{axis}" for axis in range(len(shape))]
        return helper.make_tensor_value_info(name, TensorProto.FLOAT, dims)

    proto = helper.make_graph(
        graph.nodes,
        "g",
        [info(*value, known) for value in inputs],
        [info(*value, known or value not in inputs) for value in outputs],
        graph.initializers,
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("local", 1)]
    model = helper.make_model(proto, opset_imports=opsets, functions=graph.shared.functions, ir_version=8)
    return model, dict(inputs)


@settings(derandomize=True, max_examples=100, deadline=None, database=None)
@given(models(), PIPELINES, st.booleans())
def test_exact_passes_keep_their_promises(
    drawn: tuple[onnx.ModelProto, dict[str, Shape]], steps: str, runner: bool
) -> None:
    proto, shapes = drawn
    note(f"{steps} on\n{onnx.printer.to_text(proto)}")
    model = ir.from_proto(proto)
    verify(model)
    before = model.clone()
    pipeline = Pipeline.parse(steps)
    assert str(Pipeline.parse(str(pipeline))) == str(pipeline)
    ctx = Context(runner=RUNNER) if runner else Context()
    for pass_, _ in pipeline.steps():
        tells_what_it_changes(pass_, model, ctx)
    judge(before, model, pipeline, shapes)
    assert text(saved_and_loaded(model)) == text(model)
    if steps == "clean":
        once = text(model)
        assert not any(step.changed for step in pipeline.run(model, ctx))
        assert text(model) == once


def saved_and_loaded(model: ir.Model) -> ir.Model:
    with tempfile.TemporaryDirectory() as folder:
        save(model, f"{folder}/model.onnx")
        return load(f"{folder}/model.onnx")


def tells_what_it_changes(pass_: Pass, model: ir.Model, ctx: Context) -> None:
    """Without a change in the ledger the text is as before, and a second run finds nothing left to do."""
    for second in (False, True):
        before = text(model)
        (step,) = Pipeline.of(pass_).run(model, ctx)  # verifies the model
        assert step.changed or text(model) == before
        assert not (second and step.changed), step.ledger.changes


def judge(before: ir.Model, after: ir.Model, pipeline: Pipeline, shapes: dict[str, Shape]) -> None:
    """Outputs are bit-identical without optimizations, or within the bound of as many rounding passes as there are."""
    rounding = sum(pass_.effect() is Effect.ROUNDING for pass_, _ in pipeline.steps())
    rng = np.random.default_rng(0)
    feeds = [{name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}]
    try:
        plain, full = outputs(before, feeds)
    except DoesNotRun:  # ONNX Runtime 1.31 loses what a body in a body captures where the node that reads it is unused
        reject()
    new, new_full = outputs(after, feeds)
    verdict = Judge()
    if rounding:
        verdict.add(full, plain, new_full)
        assert verdict.breaches("rounding", rounding) == []
    else:
        verdict.add(plain, plain, new)
        assert verdict.breaches("same") == []


def outputs(model: ir.Model, feeds: Feeds) -> list[Outputs]:
    """Without ONNX Runtime's optimizations and with all of them."""
    return [next(iter(RUNNER.run(model, feeds, level=level))) for level in ("off", "all")]
