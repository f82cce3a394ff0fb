"""fold-columns: the same integers from ONNX Runtime's quick kernel, and the way back."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

import penjing
from penjing.ir.verify import verify
from penjing.ir.weights import weights
from penjing.models import zoo
from penjing.passes.base import Context
from penjing.passes.pipeline import Pipeline
from penjing.passes.quantize.columns import Folding, folding, is_small
from penjing.passes.quantize.costs import Table
from penjing.passes.quantize.fold_columns import FoldColumns, fold, plain, unfold
from penjing.passes.quantize.placement import Foretold, gains
from penjing.passes.quantize.plan import sizes_of
from penjing.passes.selection import Selection
from penjing.runtime.origins import match as match_values
from penjing.runtime.session import OrtRunner, optimized

Array = np.ndarray[tuple[int, ...], np.dtype[Any]]


class Layer:
    """A model of one Conv on integers, image to result, and what may be unlike that of a first layer."""

    def __init__(
        self,
        channels: int = 3,
        outputs: int = 16,
        window: tuple[int, int] = (3, 3),
        image: tuple[int | str, int | str] = (16, 16),
        activation: str = "Relu",
        bias: str = "steps",
        weight: type = np.int8,
        zero: int = 0,
        one_scale: bool = False,
        lowest: int = 0,
        read_twice: bool = False,
        last: bool = False,
        **attributes: Any,
    ) -> None:
        random, self.tape = np.random.default_rng(0), ir.tape.Tape()
        sides = (*image, channels) if last else (channels, *image)
        self.x = ir.val("image", dtype=ir.DataType.FLOAT, shape=ir.Shape(["batch", *sides]))
        self.constants: list[ir.Value] = []
        x = self.op("Transpose", self.x, perm=[0, 3, 1, 2]) if last else self.x
        x = self.pair(x, 0.02, 110)
        shape = (outputs, channels // attributes.get("group", 1), *window)
        stored = random.integers(-127, 128, shape).astype(weight)
        scale = np.float32(0.004) if one_scale else random.uniform(0.002, 0.006, outputs).astype(np.float32)
        zeros = np.full(scale.shape, zero, weight)
        w = self.op("DequantizeLinear", *map(self.constant, (stored, scale, zeros)), axis=0)
        inputs = [x, w]
        if bias == "steps":
            steps = [random.integers(-9000, 9000, outputs).astype(np.int32), (scale * np.float32(0.02))]
            inputs.append(self.op("DequantizeLinear", *map(self.constant, steps), axis=0))
        elif bias:
            inputs.append(self.constant(random.standard_normal(outputs).astype(np.float32)))
        y = self.tape.op("Conv", inputs, attributes={**attributes}, name="first")
        outside = [y] if read_twice else []
        if activation:
            y = self.op(activation, y, *map(self.constant, np.float32([0, 6]) if activation == "Clip" else []))
        y = self.pair(y, 6 / 255 if activation == "Clip" else 0.03, lowest if activation else 120)
        y.name, y.type = "result", ir.TensorType(ir.DataType.FLOAT)
        for value in outside:
            value.type = ir.TensorType(ir.DataType.FLOAT)
        graph = ir.Graph(
            [self.x],
            [y, *outside],
            nodes=self.tape.nodes,
            initializers=self.constants,
            opset_imports={"": 17},
            name="layer",
        )
        self.model = ir.Model(graph, ir_version=8)
        Pipeline.of("unify-names").run(self.model)
        height, width = (20 if isinstance(side, str) else side for side in image)
        sides = (height, width, channels) if last else (channels, height, width)
        self.feed = {"image": random.standard_normal((2, *sides)).astype(np.float32)}

    def op(self, kind: str, *inputs: ir.Value, **attributes: Any) -> ir.Value:
        return self.tape.op(kind, inputs, attributes=attributes)

    def constant(self, array: Any) -> ir.Value:
        array = np.asarray(array)
        tensor = ir.Tensor(array, name=f"c{len(self.constants)}")
        kind, shape = ir.TensorType(tensor.dtype), ir.Shape(array.shape)
        self.constants.append(ir.Value(name=tensor.name, type=kind, shape=shape, const_value=tensor))
        return self.constants[-1]

    def pair(self, x: ir.Value, scale: float, zero: int) -> ir.Value:
        numbers = [self.constant(np.float32(scale)), self.constant(np.uint8(zero))]
        return self.op("DequantizeLinear", self.op("QuantizeLinear", x, *numbers), *numbers)


@pytest.fixture(scope="module")
def digits() -> dict[str, Array]:
    return {"image": zoo.data("validation")["image"][:64]}


def outputs(model: ir.Model, feed: dict[str, Array]) -> list[Array]:
    return list(next(iter(OrtRunner().run(model, [feed]))).values())


def convs(model: ir.Model) -> list[ir.Node]:
    return [node for node in model.graph if node.op_type == "Conv"]


def folded(layer: Layer) -> ir.Model:
    model = layer.model.clone()
    Pipeline.of("infer-shapes").run(model)
    fold(model, Context(), folding)
    verify(model)
    return model


FOLDED: list[dict[str, Any]] = [
    {"pads": [1, 1, 1, 1], "strides": [2, 2]},
    {"pads": [1, 1, 1, 1]},
    {"channels": 1, "window": (5, 5), "pads": [2, 2, 2, 2], "activation": ""},
    {"channels": 1, "window": (5, 5), "pads": [2, 2, 2, 2], "last": True},
    {"channels": 2, "window": (3, 5), "pads": [0, 2, 0, 2], "strides": [3, 1]},
    {"window": (7, 7), "pads": [3, 3, 3, 3], "strides": [2, 2], "image": ("rows", 32), "outputs": 64},
    {"window": (7, 7), "pads": [2, 2, 3, 3], "strides": [2, 2]},
    {"window": (3, 3), "pads": [1, 0, 1, 1], "strides": [2, 2], "activation": "Clip"},
    {"window": (3, 3), "pads": [2, 2, 2, 2], "dilations": [2, 2]},
    {"window": (3, 3), "pads": [1, 3, 1, 3], "dilations": [1, 3], "bias": "floats"},
    {"window": (4, 4), "strides": [4, 4], "image": (16, 32), "bias": ""},
    {"window": (1, 1), "one_scale": True},
    {"window": (3, 4), "auto_pad": "SAME_UPPER"},
    {"window": (3, 4), "auto_pad": "SAME_LOWER", "strides": [1, 2]},
    {"channels": 1, "window": (16, 16), "strides": [16, 16], "image": (32, 64)},
    {"outputs": 4, "pads": [1, 1, 1, 1]},
    {"last": True, "pads": [1, 1, 1, 1]},
]


@pytest.mark.parametrize("kind", FOLDED, ids=str)
def test_the_same_integers_from_as_many_channels_as_the_quick_kernel_takes(kind: dict[str, Any]) -> None:
    layer = Layer(**kind)
    model = folded(layer)
    (conv,) = convs(model)
    assert conv.name == "first"
    assert "penjing.columns" in conv.metadata_props
    (weight,) = [
        weight for weight in weights(model) if any(use.node is conv for use in weight.uses) and len(weight.shape) == 4
    ]
    assert weight.shape[1] % 4 == 0
    assert weight.shape[0] % 8 == 0
    for expected, found in zip(outputs(layer.model, layer.feed), outputs(model, layer.feed), strict=True):
        assert np.array_equal(expected, found)
    assert len(np.unique(expected)) > 30


@pytest.mark.parametrize("kind", FOLDED, ids=str)
def test_and_back(kind: dict[str, Any]) -> None:
    layer = Layer(**kind)
    model = folded(layer)
    assert list(unfold(model, Context())) == ["first"]
    verify(model)
    (before,), (after,) = convs(layer.model), convs(model)
    assert after.name == "first"
    assert "penjing.columns" not in after.metadata_props
    assert [node.op_type for node in model.graph] == [node.op_type for node in layer.model.graph]
    stored = [{w.shape: w.array() for w in weights(some) if len(w.shape) == 4} for some in (layer.model, model)]
    assert stored[0].keys() == stored[1].keys()
    assert all(np.array_equal(array, stored[1][shape]) for shape, array in stored[0].items())
    slides = [folding(_known(some)) for some in (before, after)]
    assert slides[0] == slides[1] is not None
    assert np.array_equal(outputs(layer.model, layer.feed)[0], outputs(model, layer.feed)[0])


def _known(conv: ir.Node) -> ir.Node:
    assert conv.graph is not None
    Pipeline.of("infer-shapes").run(ir.Model(conv.graph, ir_version=8))
    return conv


@pytest.mark.parametrize(
    "kind",
    [
        {"image": (16, "columns")},
        {"image": (16, 18)},  # no multiple of 4
        {"pads": [1, 0, 1, 0]},  # the result is narrower than the image
        {"channels": 4, "pads": [1, 1, 1, 1]},  # quick as it is
        {"channels": 6, "group": 3, "outputs": 18, "pads": [1, 1, 1, 1]},
        {"weight": np.uint8, "zero": 128, "pads": [1, 1, 1, 1]},
        {"zero": 3, "pads": [1, 1, 1, 1]},
        {"read_twice": True, "pads": [1, 1, 1, 1]},  # then it is no integer kernel
        {"activation": "Sigmoid", "pads": [1, 1, 1, 1]},  # nor here
        {"outputs": 2, "pads": [1, 1, 1, 1]},  # too few of them even for four columns
        {"image": ("rows", 16), "auto_pad": "SAME_UPPER"},  # its padding depends on the rows
        {"window": (1, 3), "auto_pad": "SAME_UPPER", "strides": [4, 1]},  # rows that no window reads are cut off
        {"window": (3, 1), "auto_pad": "SAME_LOWER", "strides": [1, 4]},
        {"lowest": 5, "pads": [1, 1, 1, 1]},  # Relu is an operator of its own then
        {"lowest": 5, "activation": "Clip", "pads": [1, 1, 1, 1]},
    ],
    ids=str,
)
def test_what_cannot_be_folded_stays(kind: dict[str, Any]) -> None:
    layer = Layer(**kind)
    model = folded(layer)
    assert [node.op_type for node in model.graph] == [node.op_type for node in layer.model.graph]


def test_every_way_of_sliding_over_an_image() -> None:
    """The folded weight against the convolution by its definition."""
    random, count = np.random.default_rng(1), 0
    for channels, width, stride, dilation, left in itertools.product((1, 3), (1, 2, 3, 5), (1, 2, 3), (1, 2), range(4)):
        how = Folding(0, 24, stride * 4, stride, dilation, width, 0, left, 0, 0)
        weight, image = random.integers(-9, 9, (2, channels, 1, width)), random.integers(-9, 9, (channels, 24))
        blocks = np.pad(image, ((0, 0), (how.before * how.factor, (how.after + 1) * how.factor)))
        packed = how.folded(weight)
        assert packed.shape == (8, channels * how.factor, 1, how.blocks)
        assert np.array_equal(how.unfolded(packed), weight)
        padded = np.pad(image, ((0, 0), (left, 100)))
        for column in range(24 // stride):
            reads = padded[:, column * stride : column * stride + width * dilation : dilation]
            expected = (weight[:, :, 0] * reads).sum(axis=(1, 2))
            block, step = divmod(column, how.steps)
            window = blocks[:, block * how.factor : (block + how.blocks) * how.factor]
            seen = window.reshape(channels, how.blocks, how.factor).transpose(2, 0, 1).reshape(-1, how.blocks)
            assert np.array_equal((packed[2 * step : 2 * step + 2, :, 0] * seen).sum(axis=(1, 2)), expected)
            count += 1
    assert count > 1000


def test_the_text_of_a_folding_reads_back() -> None:
    how = Folding(0, 224, 4, 2, 1, 7, 3, 3, 2, 2)
    assert Folding.parse(str(how)) == how
    wrong = (
        "0 224 4 2 1 7 3 3 2 -2",
        "0 224 4 3 1 7 3 3 2 2",  # the stride does not divide the columns of a block
        "0 222 4 2 1 7 3 3 2 2",  # nor these the image
        "0 224 0 2 1 7 3 3 2 2",
        "0 224 4 0 1 7 3 3 2 2",
        "0 224 4 2 1 0 3 3 2 2",
    )
    for text in ("", "1 2 3", str(how) + " 1", *wrong):
        assert Folding.parse(text) is None


def test_onnx_runtime_puts_nothing_between() -> None:
    """One kernel for the layer, the shapes changed at no cost, the image turned once."""
    layer = Layer(pads=[1, 1, 1, 1], strides=[2, 2])
    kinds = [node.op_type for node in optimized(folded(layer)).graph]
    assert kinds == [
        "QuantizeLinear",
        "Transpose",
        "Reshape",
        "QLinearConv",
        "Reshape",
        "Transpose",
        "DequantizeLinear",
    ]


def test_what_was_changed_since_stays_folded() -> None:
    layer = Layer(pads=[1, 1, 1, 1])
    model = folded(layer)
    (weight,) = [weight for weight in weights(model) if len(weight.shape) == 4]
    array = weight.array().copy()
    array[-1, 0, 0, -1] += 1
    weight.replace(array)
    assert not unfold(model, Context())
    assert "penjing.columns" in convs(model)[0].metadata_props
    model = folded(layer)
    bias = convs(model)[0].inputs[2].producer().inputs[0]
    bias.const_value = ir.tensor(bias.const_value.numpy() + np.arange(64, dtype=np.int32), name=bias.name)
    assert not unfold(model, Context())


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("channels", [1, 3])
def test_what_was_moved_otherwise_since_stays_folded(channels: int, last: bool) -> None:
    """As ``clean`` does where the model's own Transposes meet these."""
    layer = Layer(channels, pads=[1, 1, 1, 1], last=last)
    for name in ("Transpose", "Reshape"):
        for place, node in enumerate(folded(layer).graph):
            if node.op_type != name or (last and place == 0):
                continue
            model = folded(layer)
            moved = model.graph[place]
            if name == "Transpose":
                moved.attributes["perm"] = ir.AttrInt64s("perm", [0, 2, 1, 3])
            else:
                shape = moved.inputs[1]
                assert shape is not None
                shape.const_value = ir.tensor(shape.const_value.numpy()[::-1].copy(), name=shape.name)  # type: ignore[union-attr]
            assert not unfold(model, Context())


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("rows", [16, "rows"])
def test_an_empty_batch_runs_too(channels: int, rows: int | str) -> None:
    layer = Layer(channels, pads=[1, 1, 1, 1], image=(rows, 16))
    empty = {"image": layer.feed["image"][:0]}
    assert outputs(folded(layer), empty)[0].shape == outputs(layer.model, empty)[0].shape


def test_numbers_that_a_caller_may_pass_are_left_alone() -> None:
    layer = Layer(pads=[1, 1, 1, 1])
    for name in layer.model.graph.initializers:
        model = layer.model.clone()
        model.graph.inputs.append(model.graph.initializers[name])
        Pipeline.of("infer-shapes").run(model)
        fold(model, Context(), folding)
        assert np.array_equal(outputs(model, layer.feed)[0], outputs(layer.model, layer.feed)[0])


def test_two_layers_of_one_name_in_two_branches() -> None:
    """Each is folded again as it was."""
    tape = ir.tape.Tape()
    which = ir.val("which", dtype=ir.DataType.BOOL, shape=ir.Shape([]))
    image = ir.val("image", dtype=ir.DataType.FLOAT, shape=ir.Shape([2, 3, 16, 16]))
    branches = []
    for stride in (1, 2):
        body = Layer(pads=[1, 1, 1, 1], strides=[stride, stride]).model.graph
        body.inputs[0].replace_all_uses_with(image)
        body.inputs.clear()
        branches.append(body)
    y = tape.op("If", [which], attributes={"then_branch": branches[0], "else_branch": branches[1]})
    y.name, y.type = "y", ir.TensorType(ir.DataType.FLOAT)
    graph = ir.Graph([which, image], [y], nodes=tape.nodes, opset_imports={"": 17}, name="branches")
    model = ir.Model(graph, ir_version=8)
    Pipeline.of("unify-names,infer-shapes").run(model)
    for body in branches:
        for node in body:
            node.name = "first" if node.op_type == "Conv" else node.name
    before = model.clone()
    fold(model, Context(), folding)
    with plain(model, Context()):
        assert all("penjing.columns" not in conv.metadata_props for body in _bodies(model) for conv in body)
    assert all(any("penjing.columns" in node.metadata_props for node in body) for body in _bodies(model))
    for chosen in (True, False):
        feed = {"which": np.array(chosen), "image": Layer().feed["image"]}
        assert np.array_equal(outputs(before, feed)[0], outputs(model, feed)[0])


def _bodies(model: ir.Model) -> list[ir.Graph]:
    (node,) = [node for node in model.graph if node.op_type == "If"]
    return [node.attributes[name].as_graph() for name in ("then_branch", "else_branch")]


def test_layers_kept_by_request_are_not_folded() -> None:
    """Nor those that were on integers before."""
    layer = Layer(outputs=64, pads=[1, 1, 1, 1], image=(64, 64))
    data = {"image": np.concatenate([layer.feed["image"]] * 4)}
    for step in ("quantize-static{keep=op:Conv}", "quantize-auto{keep=op:Conv}", "quantize-static"):
        model = layer.model.clone()
        penjing.run(model, step, data=data, check="off")
        assert all("penjing.columns" not in conv.metadata_props for conv in convs(model))


def test_weights_of_another_type_are_counted_as_they_will_run(digits: dict[str, Array]) -> None:
    for weights_of, wanted in (("s8", True), ("u8", False)):
        model = zoo.load("cnn-a")
        penjing.run(model, f"quantize-static{{weights={weights_of}}}", data=digits, check="off")
        first = convs(model)[0]
        assert ("penjing.columns" in first.metadata_props) is wanted
        assert (first.inputs[0].producer().op_type == "DequantizeLinear") is wanted  # type: ignore[union-attr]


def test_the_original_has_the_factor_where_the_quantized_model_has_it(digits: dict[str, Array]) -> None:
    """So that the first layer is rounded adaptively in a run of its own too."""
    model = zoo.load("cnn-a")
    penjing.run(model, "quantize-static", data=digits)
    saved = ir.from_proto(ir.to_proto(model))
    report = penjing.run(saved, "round-adaptively", data=digits, models={"original": zoo.load("cnn-a")})
    assert not [skip for step in report.passes for skip in step.ledger.skips if "1.weight" in skip.subject]


def test_the_pass_goes_by_the_table_and_tells() -> None:
    layer = Layer(channels=3, outputs=64, window=(7, 7), pads=[3, 3, 3, 3], strides=[2, 2], image=(112, 112))
    conv = _known(convs(layer.model)[0])
    how = folding(conv)
    assert how is not None
    assert gains(Table.of("cpu-vnni"), conv, how, sizes_of({}))
    assert not is_small(conv, how)  # as a part of nothing else
    assert Foretold(Table.of("cpu-vnni")).folding(conv, sizes_of({})) is None
    ctx = Context(step="fold-columns")
    model = layer.model.clone()
    FoldColumns().run(model, ctx)
    assert [change.what for change in ctx.ledger.changes] == ["columns folded into channels"]
    kept = Context(step="fold-columns")
    FoldColumns(keep=Selection(("op:Conv",))).run(layer.model, kept)
    assert "kept by request" in kept.ledger.skips[0].reason
    nothing = Context(step="fold-columns")
    FoldColumns().run(zoo.load("mlp"), nothing)
    assert [skip.subject for skip in nothing.ledger.skips] == ["model"]
    slow = Context(step="fold-columns")
    FoldColumns(target="cpu-avx2").run(layer.model, slow)
    assert "slower" in slow.ledger.skips[0].reason


def test_quantizing_ends_with_it_and_other_passes_see_the_layer_as_it_was(digits: dict[str, Array]) -> None:
    """Rounding and bias of the first layer are mended too, and what is dequantized is what was quantized."""
    mended = zoo.load("cnn-a")
    report = penjing.run(mended, "quantize-static,round-adaptively,correct-bias", data=digits)
    (first, *_) = convs(mended)
    assert "penjing.columns" in first.metadata_props
    address = first.name
    changed = [{change.subject for change in step.ledger.changes} for step in report.passes]
    assert all(address in subjects or "1.weight_quantized" in subjects for subjects in changed)
    penjing.run(mended, "dequantize", data=digits, check="off")
    shapes = [
        sorted(weight.shape for weight in weights(some) if len(weight.shape) == 4)
        for some in (mended, zoo.load("cnn-a"))
    ]
    assert shapes[0] == shapes[1]
    assert not [node for node in mended.graph if node.op_type == "Reshape"]


def test_blame_finds_the_layer(digits: dict[str, Array]) -> None:
    made = zoo.load("cnn-a")
    penjing.run(made, "quantize-auto", data=digits)
    found = {match.name: match for match in match_values(zoo.load("cnn-a"), made)}
    value = found["relu"].value
    assert [node.op_type for node in value.consumers()] == ["DequantizeLinear"]
    assert value.producer().op_type == "Transpose"
