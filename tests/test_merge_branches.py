"""Branches of one architecture computed together: what is fused, what is left apart and why; that it rounds only."""

from __future__ import annotations

import itertools
import json
import re
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
from penjing.passes.merge.branches import Site, Unlike
from penjing.passes.merge.fuse_branches import FuseBranches
from penjing.passes.pipeline import Pipeline
from penjing.runtime.report import Report
from penjing.runtime.run import run
from penjing.runtime.session import DoesNotRun, OrtRunner, open_session, run_feed

MODELS = Path(__file__).parents[1] / "models"
ALWAYS = "fuse-branches{when=always}"
NO_BRANCHES = "there are no branches: no value is read by two Conv, Gemm or MatMul layers built alike"
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
        ("combine=max", {"Split": 1, "Max": 2, "ReduceMax": 0}),
        ("combine=min", {"Split": 1, "Min": 2, "ReduceMin": 0}),
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
    assert said(report) == [f"model: {NO_BRANCHES}"]
    report = merged(load(MODELS / "vit.onnx"), ALWAYS)
    assert report.passes[-1].ledger.changes == []


def test_branches_that_differ_later() -> None:
    """Equal first layers, unlike second ones."""
    one, two = mlp(0, (16, 32, 32, 4)), mlp(1, (16, 32, 24, 4))
    model = together([one, two])
    report = merged(model, ALWAYS)
    assert kinds(model)["Conv"] == 1
    assert kinds(model)["Split"] == 1
    assert (
        said(report)[1]
        == "g1: unlike its counterpart: as input 1 it reads float32 [32, 32], and 'b0/g1' float32 [32, 24]"
    )


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
    assert said(report) == [f"{said(report)[0].partition(':')[0]}: it and 1 like it are left apart: {words}"]


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


# What real files have -------------------------------------------------------------------------------------------------

PAIR = zeros(w1=(8, 16), w2=(8, 16), b1=(16,), b2=(16,), v1=(16, 16), v2=(16, 16))[:-1]
HIDDEN = "h1 = Gemm(x, w1, b1) h2 = Gemm(x, w2, b2)"


def two(behind: str, outputs: str = "float[N,16] y", more: str = "", inputs: str = "", opset: int = 17) -> ir.Model:
    """Two Gemm on ``x`` [N, 8] and what stands behind their outputs h1 and h2 [N, 16]."""
    return filled(f"m (float[N,8] x{inputs}) => ({outputs}) {PAIR}{more}> {{ {HIDDEN} {behind} }}", opset=opset)


def fused(model: ir.Model, feed: Arrays | None = None) -> list[str]:
    """What the ledger says; the fused model runs, and gives the same, with NaN where there was NaN."""
    before = model.clone()
    report = run(model, ALWAYS, check="off")
    given = feed or images(3, 8)
    one, other = (run_feed(open_session(each), given) for each in (before, model))
    for name, expected in one.items():
        assert other[name].dtype == expected.dtype
        assert other[name].shape == expected.shape
        narrow = expected.dtype == np.float16
        np.testing.assert_allclose(other[name], expected, rtol=3e-3 if narrow else 1e-5, atol=1e-5)
    return said(report)


@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize("operator", ["Gemm(h{i}, v{i}, {k})", "Clip(h{i}, {k}, six)"])
def test_an_input_that_only_one_branch_has(operator: str, side: int) -> None:
    model = two(
        " ".join(["k = Relu(c)", *(f"y{i} = {operator.format(i=i, k='k')}" for i in (1, 2))]),
        "float[N,16] y1, float[N,16] y2",
        ", float six = {6}",
        ", float[16] c" if "Gemm" in operator else ", float c",
    )
    port = 2 if "Gemm" in operator else 1
    node = next(node for node in model.graph if node.outputs[0].name == f"y{side + 1}")
    node.replace_input_with(port, None)
    c = np.arange(16, dtype=np.float32) if "Gemm" in operator else np.array(0.25, np.float32)
    lines = fused(model, {**images(3, 8), "c": c})
    sides = ["nothing", "what is computed"][:: -1 if side else 1]
    words = f"y1: unlike its counterpart: as input {port} it reads {sides[0]}, and 'y2' {sides[1]}"
    assert words in lines
    assert "2 branches fused: Gemm 1" in lines[0]


def test_an_input_left_out_at_the_end_is_one_that_is_not_there() -> None:
    model = two("y1 = Gemm(h1, v1) y2 = Gemm(h2, v2, b1)", "float[N,16] y1, float[N,16] y2")
    node = next(node for node in model.graph if node.outputs[0].name == "y2")
    node.replace_input_with(2, None)
    assert fused(model)[0].endswith("2 branches fused: Gemm 2")


def test_a_site_refuses_what_only_some_have() -> None:
    model = two("y1 = Gemm(h1, v1) y2 = Gemm(h2, v2, b1) y = Add(y1, y2)")
    nodes = tuple(node for node in model.graph if node.outputs[0].name in ("y1", "y2"))
    for order in (nodes, nodes[::-1]):
        with pytest.raises(Unlike, match="only some branches have its input 2"):
            Site(order, 17, {}).has(2)


@pytest.mark.parametrize(
    "combined",
    [
        "s = Add(g1, g2) y = Mul(s, c)",
        "y = Mean(g1, g2)",
        "y = Max(g1, g2)",
        "p = Mul(g1, c) q = Mul(g2, d) y = Sum(p, q)",
        "s = Sum(g1, g2) y = Div(s, d)",
    ],
)
@pytest.mark.parametrize("dtype", ["double", "float16"])
def test_a_cast_before_a_combination_of_floats(dtype: str, combined: str) -> None:
    model = two(
        f"g1 = Cast<to={11 if dtype == 'double' else 10}>(h1) g2 = Cast<to={11 if dtype == 'double' else 10}>(h2) "
        + combined,
        f"{dtype}[N,16] y",
        f", {dtype}[1] c = {{1}}, {dtype}[1] d = {{3}}",
    )
    for name, number in (("c", 0.5), ("d", 3)):
        array = np.array([number], np.float64 if dtype == "double" else np.float16)
        model.graph.initializers[name].const_value = ir.tensor(array, name=name)
    if (dtype, combined) == ("double", "y = Mean(g1, g2)"):  # which ONNX Runtime has for float32 only
        run(model, ALWAYS, check="off")
        run_feed(open_session(model), images(3, 8))
    else:
        fused(model)
    assert ("ReduceSum" in kinds(model)) == ("Max" not in combined)


@pytest.mark.parametrize("dtype", ["int32", "int64"])
@pytest.mark.parametrize(
    "combined",
    [
        "s = Add(g1, g2) y = Div(s, c)",
        "s = Add(g1, g2) y = Mul(s, c)",
        "y = Min(g1, g2)",
        "p = Div(g1, c) q = Div(g2, c) y = Add(p, q)",
    ],
)
def test_a_cast_before_a_combination_of_integers(dtype: str, combined: str) -> None:
    to = 6 if dtype == "int32" else 7
    more = f", {dtype} c = {{2}}, float ten = {{10}}"
    model = two(
        f"t1 = Mul(h1, ten) t2 = Mul(h2, ten) g1 = Cast<to={to}>(t1) g2 = Cast<to={to}>(t2) {combined}",
        f"{dtype}[N,16] y",
        more,
    )
    fused(model)
    assert ("ReduceSum" in kinds(model)) == ("Min" not in combined)


def test_integers_without_a_reduction_stay_a_sum() -> None:
    model = two("g1 = Cast<to=3>(h1) g2 = Cast<to=3>(h2) y = Add(g1, g2)", "int8[N,16] y")
    run(model, ALWAYS, check="off")
    assert kinds(model)["Split"] == kinds(model)["Add"] == 1


def test_factors_whose_product_does_not_fit_stay_apart() -> None:
    """2^-16 is less than float16 holds well."""
    model = two(
        "g1 = Cast<to=10>(h1) g2 = Cast<to=10>(h2) p = Mul(g1, c) q = Mul(g2, c) s = Add(p, q) y = Mul(s, c)",
        "float16[N,16] y",
        ", float16[1] c = {1}",
    )
    model.graph.initializers["c"].const_value = ir.tensor(np.array([2**-8], np.float16), name="c")
    fused(model)
    assert kinds(model)["Mul"] == 2


@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("side", ["b1", "b2"])
@pytest.mark.parametrize(
    "combined", ["y = Max(h1, h2)", "y = Min(h1, h2)", "y = Mean(h1, h2)", "p = Tanh(h1) q = Tanh(h2) y = Sum(p, q)"]
)
def test_a_branch_that_is_not_finite(number: float, side: str, combined: str) -> None:
    model = two(combined)
    bias = np.zeros(16, np.float32)
    bias[3] = number
    model.graph.initializers[side].const_value = ir.tensor(bias, name=side)
    fused(model)


@pytest.mark.parametrize(
    ("source", "feed", "line"),
    [
        (
            "(float[N,3,5,5] x) => (float[N,4,7,7] y, float[N,4,7,7] z) <float[3,4,3,3] w, float[3,4,3,3] v> "
            "{ y = ConvTranspose(x, w) z = ConvTranspose(x, v) }",
            images(2, 3, 5, 5),
            "x: read by 2 ConvTranspose, which stay apart: there is no rule for these",
        ),
        (
            "(float[8,N] x) => (float[4,N] y, float[4,N] z) <float[4,8] w, float[4,8] v> "
            "{ y = MatMul(w, x) z = MatMul(v, x) }",
            images(8, 3),
            "x: read by 2 MatMul with the weight on the left, which stay apart: there is no rule for these",
        ),
        (
            "(float[T,1,3] x) => (float[1,1,2] y, float[1,1,2] z) <float[1,2,3] w, float[1,2,2] r> "
            "{ a, y = RNN<hidden_size=2>(x, w, r) b, z = RNN<hidden_size=2>(x, w, r) }",
            images(4, 1, 3),
            "x: read by 2 RNN, which stay apart: there is no rule for these",
        ),
    ],
)
def test_layers_without_a_rule_are_told(source: str, feed: Arrays, line: str) -> None:
    shapes = re.findall(r"float\[([\d,]+)\] (\w)(?=[,>])", source.partition("<")[2])
    constants = zeros(**{name: tuple(map(int, sizes.split(","))) for sizes, name in shapes})
    source = re.sub(r"<float[^>]*>", lambda found: constants, source, count=1)
    assert fused(filled(f"m {source}"), feed) == [line]


def test_a_weight_on_the_left_ends_a_region() -> None:
    model = two(
        "y1 = MatMul(u1, h1) y2 = MatMul(u2, h2)",
        "float[N,16] y1, float[N,16] y2",
        ", float[3,3] u1 = {0,0,0,0,0,0,0,0,0}, float[3,3] u2 = {0,0,0,0,0,0,0,0,0}",
    )
    assert "y1: its weight is on the left" in fused(model)


@pytest.mark.parametrize("training", [True, False, None])
def test_dropout_is_fused_where_it_does_nothing(training: bool | None) -> None:
    told = "" if training is None else ", half, train"
    model = two(
        f"d1 = Dropout(h1{told}) d2 = Dropout(h2{told}) y = Mean(d1, d2)", more=", float half = {0.5}, bool train = {1}"
    )
    model.graph.initializers["train"].const_value = ir.tensor(np.array(bool(training)), name="train")
    if training:
        assert "d1: it is a Dropout that may be told to train" in said(run(model, ALWAYS, check="off"))
        assert kinds(model)["Dropout"] == 2
    else:
        assert fused(model)[0].endswith("Dropout 1")


@pytest.mark.parametrize(
    ("behind", "words"),
    [
        (
            "k1 = Reshape(b1, s) k2 = Reshape(b2, s) y1 = Gemm(h1, v1, k1) y2 = Gemm(h2, v2, k2)",
            "its input 2 is computed",
        ),
        ("k1 = Identity(v1) k2 = Identity(v2) y1 = Gemm(h1, k1) y2 = Gemm(h2, k2)", "its weight is computed"),
        ("k = Cast<to=1>(v1) y1 = Gemm(h1, k) y2 = Gemm(h2, k)", "its weight is computed"),
        (
            "k1 = Neg(b1) k2 = Neg(b2) y1 = Add(h1, k1) y2 = Add(h2, k2)",
            "what it reads as input 1 is not held together",
        ),
        (
            "k = Neg(b1) y1 = Add(h1, k) y2 = Add(h2, b2)",
            "unlike its counterpart: as input 1 it reads what is computed",
        ),
    ],
)
def test_what_depends_on_constants_only_is_told(behind: str, words: str) -> None:
    model = two(behind, "float[N,16] y1, float[N,16] y2", ", int64[1] s = {-1}")
    lines = fused(model)
    (line,) = [line for line in lines if words in line]
    assert line.endswith("; it depends on constants only, so fold-constants before this pass would help")


@pytest.mark.parametrize("shape", ["0,8", "N,0"])
def test_nothing_to_compute_is_left_apart(shape: str) -> None:
    inner = shape.partition(",")[2]
    model = ir.from_onnx_text(
        f'<ir_version: 8, opset_import: ["": 17]> m (float[{shape}] x) => (float[M,4] y, float[M,4] z) '
        f"{{ y = Gemm(x, w) z = Gemm(x, v) }}"
    )
    for node, name in zip(model.graph, "wv", strict=True):
        value = ir.Value(name=name, const_value=ir.tensor(np.zeros((int(inner), 4), np.float32), name=name))
        model.graph.register_initializer(value)
        node.replace_input_with(1, value)
    report = run(model, ALWAYS, check="off")
    assert kinds(model) == {"Gemm": 2}
    assert "no elements" in said(report)[0]


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
