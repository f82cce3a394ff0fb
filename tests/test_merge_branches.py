"""Branches of one architecture computed together: what is fused, what is left apart and why; that it rounds only."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from merging import ends, merged, refused

from penjing.ir.errors import BadFile, NeedsData, UsageError
from penjing.ir.files import load, save
from penjing.ir.storage import StreamedTensor
from penjing.ir.text import text
from penjing.ir.verify import verify
from penjing.passes.base import Context, Feeds
from penjing.passes.merge.fuse_branches import FuseBranches
from penjing.passes.pipeline import Pipeline
from penjing.runtime.report import Report
from penjing.runtime.run import run
from penjing.runtime.session import DoesNotRun, OrtRunner, open_session, run_feed

MODELS = Path(__file__).parents[1] / "models"
ALWAYS = "fuse-branches{when=always}"
Parse = Callable[[str], ir.Model]
Arrays = Mapping[str, Any]


def filled(source: str, seed: int = 0, opset: int = 17) -> ir.Model:
    """A model in ONNX's text whose float constants, given as zeros or not at all, are drawn."""
    model = ir.from_onnx_text(f'<ir_version: 8, opset_import: ["": {opset}]>\n{source}')
    rng = np.random.default_rng(seed)
    for value in model.graph.initializers.values():
        tensor = value.const_value
        assert tensor is not None
        if tensor.dtype.is_floating_point() and tensor.size > 1:
            array = rng.standard_normal(tensor.shape.numpy()).astype(tensor.dtype.numpy()) / 3
            value.const_value = ir.tensor(np.abs(array) if "var" in (value.name or "") else array, name=value.name)
    return model


def zeros(**shapes: Sequence[int]) -> str:
    """Constants of text, to be filled."""
    made = []
    for name, shape in shapes.items():
        many = ",".join(["0"] * int(np.prod(shape)))
        made.append(f"float[{','.join(map(str, shape))}] {name} = {{{many}}}")
    return "<" + ", ".join(made) + ">"


def mlp(seed: int, widths: Sequence[int] = (16, 32, 32, 4), layer: str = "Gemm", opset: int = 17) -> ir.Model:
    """Gemm, Gemm with transB, or MatMul and Add, with Relu between."""
    lines, constants, last = [], {}, "x"
    for place, (inputs, outputs) in enumerate(itertools.pairwise(widths)):
        turned = layer == "transB"
        constants |= {f"w{place}": (outputs, inputs) if turned else (inputs, outputs), f"b{place}": (outputs,)}
        if layer == "MatMul":
            lines += [f"m{place} = MatMul({last}, w{place})", f"g{place} = Add(m{place}, b{place})"]
        else:
            lines.append(f"g{place} = Gemm{'<transB=1, alpha=0.5, beta=2.0>' * turned}({last}, w{place}, b{place})")
        last = f"g{place}"
        if place < len(widths) - 2:
            lines.append(f"r{place} = Relu({last})")
            last = f"r{place}"
    interface = f"m (float[N,{widths[0]}] x) => (float[N,{widths[-1]}] {last})"
    return filled(f"{interface} {zeros(**constants)} {{ {' '.join(lines)} }}", seed, opset)


CNN = """m (float[N,3,12,12] x) => (float[N,5] y) {constants} {{
  c = Conv<kernel_shape=[3,3], pads=[1,1,1,1]>(x, w) n = BatchNormalization(c, scale, shift, mean, var)
  r = Relu(n) d = Conv<kernel_shape=[3,3], pads=[1,1,1,1], group={channels}>(r, v, vb) a = Add(d, r) s = HardSigmoid(a)
  t = Mul(s, a) p = MaxPool<kernel_shape=[2,2], strides=[2,2]>(t) e = Conv(p, u) g = GlobalAveragePool(e)
  f = Flatten(g) y = Gemm<transB=1>(f, h, hb) }}"""


def cnn(seed: int, channels: int = 8) -> ir.Model:
    one = (channels,)
    shapes = {
        "w": (channels, 3, 3, 3), "scale": one, "shift": one, "mean": one, "var": one, "v": (channels, 1, 3, 3),
        "vb": one, "u": (channels, channels, 1, 1), "h": (5, channels), "hb": (5,),
    }  # fmt: skip
    return filled(CNN.format(constants=zeros(**shapes), channels=channels), seed)


def together(members: Sequence[ir.Model], how: str = "ensemble", options: str = "") -> ir.Model:
    """The members merged, not fused."""
    model, partners = members[0], {f"b{place}": member for place, member in enumerate(members[1:])}
    run(model, f"{how}{{with=({','.join(partners)}) {options}}}", models=partners, check="off")
    return model


def kinds(model: ir.Model) -> dict[str, int]:
    return dict(Counter(node.op_type for node in model.graph))


def said(report: Report) -> list[str]:
    ledger = report.passes[-1].ledger
    return [f"{one.subject}: {one.what}" for one in ledger.changes] + [f"{s.subject}: {s.reason}" for s in ledger.skips]


def outputs_are_near(model: ir.Model, before: ir.Model, feed: Arrays) -> None:
    """By more batches than the check has."""
    one, two = (run_feed(open_session(each), feed) for each in (before, model))
    for name, expected in one.items():
        assert two[name].shape == expected.shape
        np.testing.assert_allclose(two[name], expected, rtol=0, atol=1e-5 * max(1e-30, np.abs(expected).max(initial=0)))


def images(batch: int, *sizes: int, name: str = "x") -> dict[str, Any]:
    return {name: np.random.default_rng(batch).standard_normal((batch, *sizes)).astype(np.float32)}


# What is fused --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layer", ["Gemm", "transB", "MatMul"])
@pytest.mark.parametrize("opset", [11, 13, 18, 23])
def test_matrices_and_their_mean(layer: str, opset: int) -> None:
    model = together([mlp(seed, layer=layer, opset=opset) for seed in range(4)])
    before = model.clone()
    report = merged(model, ALWAYS)
    found = kinds(model)
    assert found == {"Transpose": 2, "Reshape": 2, "Conv": 3, "Relu": 2}
    assert "4 branches fused: " in said(report)[0]
    assert ends(model) == ends(before)
    for batch in (1, 3, 17):
        outputs_are_near(model, before, images(batch, 16))


def test_the_ledger_counts_branches_and_layers() -> None:
    model = together([mlp(seed) for seed in range(3)])
    report = merged(model, ALWAYS)
    (change,) = report.passes[-1].ledger.changes
    assert change.what == "3 branches fused: Gemm 3, Relu 2"
    assert change.numbers == {"branches": 3, "layers": 3, "nodes_before": 18, "nodes": 9}
    assert report.passes[-1].ledger.skips == []


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ("combine=sum", {"Conv": 3, "Relu": 2, "Transpose": 2, "Reshape": 2}),
        ("combine=weighted weights=(0.5, 0.25, 0.25)", {"Conv": 3, "Relu": 2, "Transpose": 2, "Reshape": 2}),
        ("combine=soft-vote scores=logits", {"Softmax": 1, "ReduceSum": 1, "Mul": 1}),
        ("combine=soft-vote scores=logits weights=(0.5, 0.25, 0.25)", {"Softmax": 1, "ReduceSum": 1, "Mul": 1}),
        ("combine=max", {"ReduceMax": 1}),
        ("combine=min", {"ReduceMin": 1}),
        ("combine=geometric scores=logits", {"LogSoftmax": 1, "ReduceSum": 1, "Mul": 1, "Exp": 1}),
        ("combine=median", {"Split": 1}),
        ("combine=hard-vote", {"Split": 1}),
    ],
)
def test_combinations(options: str, expected: dict[str, int]) -> None:
    model = together([mlp(seed) for seed in range(3)], options=options)
    before = model.clone()
    merged(model, ALWAYS)
    found = kinds(model)
    assert {kind: found.get(kind, 0) for kind in expected} == expected
    assert found["Conv"] == 3
    outputs_are_near(model, before, images(5, 16))


@pytest.mark.parametrize("options", ["outputs=separate", "outputs=concat", "outputs=concat axis=0"])
def test_outputs_side_by_side(options: str) -> None:
    model = together([mlp(seed) for seed in range(3)], "merge-parallel", options)
    before = model.clone()
    merged(model, ALWAYS)
    assert kinds(model).get("Split", 0) == (0 if options == "outputs=concat" else 1)
    assert ends(model) == ends(before)
    outputs_are_near(model, before, images(4, 16))


@pytest.mark.parametrize("channels", [8, 12, 16])
def test_convolutions_with_all_that_stands_between(channels: int) -> None:
    model = together([cnn(seed, channels) for seed in range(4)])
    before = model.clone()
    report = merged(model, ALWAYS)
    assert kinds(model)["Conv"] == 4  # the head too
    assert kinds(model)["BatchNormalization"] == kinds(model)["MaxPool"] == 1
    assert report.passes[-1].ledger.skips == []
    groups = [node.attributes.get_int("group", 1) for node in model.graph if node.op_type == "Conv"]
    assert groups == [1, 4 * channels, {8: 2, 12: 1, 16: 4}[channels], 1]
    outputs_are_near(model, before, images(3, 3, 12, 12))


def test_bundled_convolutions() -> None:
    model = together([load(MODELS / "cnn-a.onnx"), load(MODELS / "cnn-b.onnx")])
    before = model.clone()
    merged(model, ALWAYS)
    assert kinds(model)["Conv"] == 13
    assert kinds(model)["Conv"] * 2 == kinds(before)["Conv"] + kinds(before)["Gemm"]
    outputs_are_near(model, before, images(5, 1, 28, 28, name="image"))


def test_the_bundled_mlp_with_perturbed_weights() -> None:
    members = [load(MODELS / "mlp.onnx") for _ in range(3)]
    for seed, member in enumerate(members):
        rng = np.random.default_rng(seed)
        for value in member.graph.initializers.values():
            tensor = value.const_value
            assert tensor is not None
            if len(tensor.shape) == 2:
                array = tensor.numpy() + rng.standard_normal(tensor.shape.numpy()).astype(np.float32) / 100
                value.const_value = ir.tensor(array, name=value.name)
    model = together(members)
    before = model.clone()
    report = merged(model, ALWAYS)
    assert "3 branches fused: Gemm 4, Relu 3" in said(report)[0]
    outputs_are_near(model, before, images(5, 1, 28, 28, name="image"))


def test_matrices_need_a_sample() -> None:
    """ONNX Runtime has no convolution of no pixels: the manual page says so."""
    model = together([mlp(seed) for seed in range(3)])
    merged(model, ALWAYS)
    with pytest.raises(DoesNotRun, match="Invalid input shape"):
        run_feed(open_session(model), {"x": np.zeros((0, 16), np.float32)})
    assert "one sample at least" in (FuseBranches.__doc__ or "")


def test_one_sample_needs_no_transposition() -> None:
    members = [mlp(seed) for seed in range(3)]
    for member in members:
        for value in (*member.graph.inputs, *member.graph.outputs):
            value.shape = ir.Shape([1, value.shape[1]])  # type: ignore[index]
    model = together(members)
    merged(model, ALWAYS)
    assert kinds(model) == {"Reshape": 2, "Conv": 3, "Relu": 2}


def test_weights_in_constant_nodes(parse: Parse) -> None:
    branch = """w{i} = Constant<value = float[2,3] {{{i},2,3,4,5,6}}>() m{i} = MatMul(x, w{i})
      c{i} = Constant<value = float[3] {{1,{i},3}}>() a{i} = Add(m{i}, c{i}) y{i} = Tanh(a{i})"""
    body = " ".join(branch.format(i=place) for place in (1, 2))
    model = parse(f"m (float[N,2] x) => (float[N,3] y) {{ {body} y = Sum(y1, y2) }}")
    before = model.clone()
    merged(model, ALWAYS)
    assert kinds(model)["Conv"] == kinds(model)["Tanh"] == 1
    assert "Constant" not in kinds(model)
    outputs_are_near(model, before, images(3, 2))


def test_in_a_body() -> None:
    branch = "h{i} = MatMul(x, w{i}) r{i} = Sigmoid(h{i}) o{i} = MatMul(r{i}, v{i})"
    body = " ".join(branch.format(i=place) for place in (1, 2))
    constants = zeros(w1=(4, 8), w2=(4, 8), v1=(8, 2), v2=(8, 2))
    model = filled(
        f"""m (float[N,4] x, bool c) => (float[N,2] y) {constants} {{ y = If (c)
        <then_branch = t () => (float[N,2] a) {{ {body} a = Add(o1, o2) }},
         else_branch = e () => (float[N,2] b) {{ b = MatMul(x, z) z2 = Neg(b) }}> }}""".replace(
            "b = MatMul(x, z) z2 = Neg(b)", "q = MatMul(x, w1) b = MatMul(q, v1)"
        )
    )
    before = model.clone()
    report = merged(model, ALWAYS)
    then = next(
        attribute.value
        for node in model.graph
        for attribute in node.attributes.values()
        if attribute.name == "then_branch"
    )
    assert [node.op_type for node in then].count("Conv") == 2
    assert said(report)[0] == "If/then/h1, h2: 2 branches fused: MatMul 2, Sigmoid 1"
    verify(model)
    for condition in (True, False):
        outputs_are_near(model, before, {**images(3, 4), "c": np.array(condition)})


def test_in_a_function_they_are_left_apart() -> None:
    model = ir.from_onnx_text(
        """<ir_version: 8, opset_import: ["": 17, "own": 1]>
        m (float[N,4] x, float[4,8] v, float[4,8] w) => (float[N,8] y) { y = own.two (x, v, w) }
        <domain: "own", opset_import: ["": 17]>
        two (x, v, w) => (y) { a = MatMul (x, v)  b = MatMul (x, w)  y = Add (a, b) }"""
    )
    report = merged(model, ALWAYS)
    assert said(report) == ["own::two/x: read by 2 layers alike, in a function: left apart"]


def test_layers_side_by_side_in_one_model_are_branches_too() -> None:
    constants = zeros(a=(8, 3, 1, 1), b=(8, 3, 1, 1))
    model = filled(
        f"m (float[N,3,4,4] x) => (float[N,8,4,4] y) {constants} "
        "{ u = Conv(x, a) v = Conv(x, b) s = Exp(u) t = Tanh(v) y = Mul(s, t) }"
    )
    report = merged(model, ALWAYS)
    assert kinds(model) == {"Conv": 1, "Split": 1, "Exp": 1, "Tanh": 1, "Mul": 1}
    assert said(report)[1] == "u: the branches go on differently: it is read by Exp, 'v' by Tanh"


def test_golden_text_is_the_same_each_time() -> None:
    def made() -> str:
        model = together([cnn(seed) for seed in range(3)])
        merged(model, ALWAYS)
        return text(model)

    assert made() == made()


def test_large_weights_are_made_as_they_are_read(tmp_path: Path) -> None:
    members = [mlp(seed, (512, 520, 8)) for seed in range(2)]
    for place, member in enumerate(members):
        save(member, tmp_path / f"{place}.onnx")
    model = together([load(tmp_path / f"{place}.onnx") for place in range(2)])
    before = model.clone()
    merged(model, ALWAYS)
    lazy = [
        value.const_value
        for value in model.graph.initializers.values()
        if isinstance(value.const_value, StreamedTensor)
    ]
    assert [tuple(tensor.shape.numpy()) for tensor in lazy] == [(1040, 512, 1, 1)]
    outputs_are_near(model, before, images(2, 512))
    save(model, tmp_path / "fused.onnx")
    outputs_are_near(load(tmp_path / "fused.onnx"), before, images(2, 512))


# What is left apart ---------------------------------------------------------------------------------------------------


def test_nothing_matches() -> None:
    report = merged(mlp(0), ALWAYS)
    assert said(report) == ["model: there are no branches: no value is read by two layers that are built alike"]
    report = merged(load(MODELS / "vit.onnx"), ALWAYS)
    assert report.passes[-1].ledger.changes == []


def test_branches_that_differ_later() -> None:
    """Equal first layers, unlike second ones."""
    one, two = mlp(0, (16, 32, 32, 4)), mlp(1, (16, 32, 24, 4))
    model = together([one, two])
    report = merged(model, ALWAYS)
    assert kinds(model)["Conv"] == 1
    assert kinds(model)["Split"] == 1
    assert said(report)[1] == "g1: unlike its counterpart: it reads float32 [32, 32], and 'b0/g1' float32 [32, 24]"


def test_branches_of_two_architectures() -> None:
    model = together([mlp(0), mlp(1, (16, 48, 4)), mlp(2), mlp(3, (16, 48, 4)), mlp(4, (16, 8, 4))])
    report = merged(model, ALWAYS)
    assert [change.numbers["branches"] for change in report.passes[-1].ledger.changes] == [2, 2]
    assert any("no other layer that reads 'x' is built like Gemm" in line for line in said(report))


def test_unlike_attributes() -> None:
    constants = zeros(a=(8, 3, 3, 3), b=(8, 3, 3, 3), u=(8, 8, 3, 3), v=(8, 8, 3, 3))
    model = filled(
        f"""m (float[N,3,8,8] x) => (float[N,8,6,6] p, float[N,8,4,4] q) {constants} {{
        c = Conv<pads=[1,1,1,1]>(x, a) d = Conv<pads=[1,1,1,1]>(x, b) p = Conv(c, u)
        q = Conv<dilations=[2,2]>(d, v) }}"""
    )
    report = merged(model, ALWAYS)
    assert said(report)[1] == "p: unlike its counterpart: its dilations is not set, and of 'q' (2, 2)"


@pytest.mark.parametrize(
    ("source", "words"),
    [
        (
            "m (double[N,4] x) => (double[N,4] y) <double[4,4] a = {0}, double[4,4] b = {0}> "
            "{ u = MatMul(x, a) v = MatMul(x, b) y = Add(u, v) }",
            "its numbers are float64, and only float32 is fused",
        ),
        (
            "m (float[N,4] x, float[4,4] a, float[4,4] b) => (float[N,4] y) "
            "{ u = MatMul(x, a) v = MatMul(x, b) y = Add(u, v) }",
            "its weight is computed as the model runs",
        ),
        (
            "m (float[N,T,4] x) => (float[N,T,4] y) <float[4,4] a = {0}, float[4,4] b = {0}> "
            "{ u = MatMul(x, a) v = MatMul(x, b) y = Add(u, v) }",
            "what it reads is no matrix of samples",
        ),
        (
            "m (float[4,N] x) => (float[N,4] y) <float[4,4] a = {0}, float[4,4] b = {0}> "
            "{ u = Gemm<transA=1>(x, a) v = Gemm<transA=1>(x, b) y = Add(u, v) }",
            "it reads its input transposed",
        ),
        (
            "m (float[2,4] x) => (float[2,4] y) <float[4,4] a = {0}, float[4,4] b = {0}, float[2,1] c = {1,2}> "
            "{ u = Gemm(x, a, c) v = Gemm(x, b, c) y = Add(u, v) }",
            "its bias is not one number for each output",
        ),
    ],
)
def test_layers_that_cannot_be_fused(source: str, words: str) -> None:
    full = "{" + ",".join(str(place % 7) for place in range(16)) + "}"
    other = "{" + ",".join(str(place % 5) for place in range(16)) + "}"
    source = source.replace("a = {0}", f"a = {full}").replace("b = {0}", f"b = {other}")
    model = ir.from_onnx_text(f'<ir_version: 8, opset_import: ["": 17]>\n{source}')
    report = merged(model, ALWAYS)
    assert said(report) == [f"{said(report)[0].partition(':')[0]}: 2 like it are left apart: {words}"]


@pytest.mark.parametrize(
    ("node", "words"),
    [
        ("Transpose<perm=[0,1,3,2]>({})", "Transpose is not done for several branches at once"),
        ("ReduceMean<axes=[1], keepdims=1>({})", "it goes over the batch or the channels too"),
        ("Flatten<axis=2>({})", "it flattens other axes than those behind the batch"),
        ("Reshape({}, mixing)", "its shape may mix samples"),
        ("Add({}, per_sample)", "a constant that it reads differs from sample to sample"),
        ("Softmax<axis=1>({})", "it goes over other axes than the classes of a matrix"),
        ("Mul({}, wide)", "what it reads has other channels than what it makes"),
    ],
)
def test_operators_that_end_a_region(node: str, words: str) -> None:
    constants = zeros(a=(1, 3, 1, 1), b=(1, 3, 1, 1), per_sample=(2, 1, 1, 1), wide=(1, 3, 1, 1))[:-1]
    model = filled(
        f"m (float[2,3,4,4] x) => (y, z) {constants}, int64[3] mixing = {{1, -1, 4}}> "
        f"{{ u = Conv(x, a) v = Conv(x, b) y = {node.format('u')} z = {node.format('v')} }}"
    )
    before = model.clone()
    report = merged(model, ALWAYS)
    assert said(report)[1].partition(": ")[2] == words
    outputs_are_near(model, before, images(2, 3, 4, 4))


def test_quantized_branches_are_left_alone() -> None:
    model = together([mlp(seed, (16, 32, 4)) for seed in range(3)])
    rng = np.random.default_rng(0)
    run(
        model, "quantize-static{target=any}", data=[{"x": rng.standard_normal((4, 16)).astype(np.float32)}], check="off"
    )
    before = kinds(model)
    report = merged(model, ALWAYS)
    assert kinds(model) == before
    assert any("quantized" in line for line in said(report))


def test_only_and_keep() -> None:
    model = together([mlp(seed) for seed in range(2)], "merge-parallel")
    report = merged(model, "fuse-branches{when=always keep=w1}")
    assert kinds(model)["Gemm"] == 4
    assert any(line.endswith("kept by request") for line in said(report))
    model = together([mlp(seed) for seed in range(2)], "merge-parallel")
    report = merged(model, "fuse-branches{when=always only=op:Conv}") if "Conv" in kinds(model) else report
    model = together([mlp(seed) for seed in range(2)], "merge-parallel")
    report = merged(model, "fuse-branches{when=always only=(w0, b0/w0)}")
    assert kinds(model)["Gemm"] == 4
    assert any(line.endswith("not among those asked for") for line in said(report))
    assert "matches no weight and no node" in refused(mlp(0), "fuse-branches{keep=nothing}")


# Whether it is faster -------------------------------------------------------------------------------------------------


class Clock(OrtRunner):
    """Says that the first model takes 100 microseconds, and the other so many."""

    def __init__(self, together: float) -> None:
        super().__init__()
        self.together, self.asked = together, 0

    def time(self, models: Sequence[ir.Model], feeds: Feeds, seconds: float = 1.0) -> list[float]:
        self.asked += 1
        assert len(list(models[0].graph)) > len(list(models[1].graph))
        return [100e-6, self.together * 1e-6]


def timed(model: ir.Model, options: str, **given: Any) -> Context:
    ctx = Context(step="fuse-branches", **given)
    (report,) = Pipeline.of(f"fuse-branches{{{options}}}" if options else "fuse-branches").run(model, ctx)
    ctx.ledger.changes += report.ledger.changes
    ctx.ledger.skips += report.ledger.skips
    return ctx


def test_the_table_knows_tiny_from_wide() -> None:
    tiny = together([mlp(seed, (64, 64, 64, 64, 8)) for seed in range(8)])
    assert timed(tiny, "").ledger.changes[0].numbers["speedup"] > 1.3
    wide = together([mlp(seed, (512, 512, 512, 8)) for seed in range(2)], "merge-parallel")
    for value in wide.graph.inputs:
        value.shape = ir.Shape([1, 512])
    ledger = timed(wide, "").ledger
    assert ledger.changes == []
    assert "apart they are as fast by the table" in ledger.skips[0].reason


def test_odd_channels_stay_apart_and_narrow_ones_do_not() -> None:
    """A grouped convolution of 12 channels a group has no whole block; of 8 two neighbours share one."""

    def verdict(channels: int) -> Context:
        shapes = {"w": (channels, 3, 3, 3), "v": (channels, channels, 3, 3), "u": (channels, channels, 3, 3)}
        body = "a = Conv(x, w) r = Relu(a) b = Conv(r, v) s = Relu(b) y = Conv(s, u)"
        interface = f"m (float[1,3,28,28] x) => (float[1,{channels},22,22] y) {zeros(**shapes)}"
        return timed(together([filled(f"{interface} {{ {body} }}", seed) for seed in range(4)]), "")

    assert verdict(8).ledger.changes != []
    assert verdict(12).ledger.changes == []


def test_the_clock_decides_and_its_report_replays(tmp_path: Path) -> None:
    def fresh() -> ir.Model:
        return together([mlp(seed) for seed in range(3)])

    data, clock = [images(2, 16)], Clock(50)
    model = fresh()
    ledger = timed(model, "timing=measure", data=data, runner=clock).ledger
    assert clock.asked == 1
    assert [change.what for change in ledger.changes] == ["timed", "3 branches fused: Gemm 3, Relu 2"]
    assert ledger.changes[0].numbers == {"apart_ns": 100000.0, "together_ns": 50000.0}
    report = tmp_path / "report.json"
    changed = [{"subject": one.subject, "what": one.what, "numbers": one.numbers} for one in ledger.changes]
    report.write_text(json.dumps({"passes": [{"name": "fuse-branches", "changed": changed}]}))
    again = fresh()
    timed(again, f"decisions='{report}'")
    assert text(again) == text(model)
    other = together([mlp(seed, (16, 8, 4)) for seed in range(3)])
    with pytest.raises(BadFile, match=r"does not say how long .* takes"):
        timed(other, f"decisions='{report}'")
    left = fresh()
    ledger = timed(left, "timing=measure", data=data, runner=Clock(99)).ledger
    assert ledger.changes == []
    assert ledger.skips[0].reason == "apart they are as fast by the clock: together they take 0.99 of the time"


def test_what_cannot_be_asked() -> None:
    with pytest.raises(UsageError, match="exclude each other"):
        Pipeline.of("fuse-branches{timing=measure decisions=report.json}")
    with pytest.raises(UsageError, match="nothing to time"):
        Pipeline.of("fuse-branches{when=always timing=measure}")
    with pytest.raises(NeedsData, match="fuse-branches needs --data"):
        timed(together([mlp(seed) for seed in range(2)]), "timing=measure")
    with pytest.raises(BadFile, match="cannot be read"):
        timed(mlp(0), "decisions=nowhere.json")
