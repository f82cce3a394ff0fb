"""Parts of models, and the commands that merge."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import onnx_ir as ir
import pytest

from penjing import cli, cli_merge
from penjing.cli import main
from penjing.ir.errors import UsageError
from penjing.ir.files import load, save
from penjing.runtime.run import run

MODELS = Path(__file__).parents[1] / "models"
Parse = Callable[[str], ir.Model]

A = """a (float[N,4] x, float[N,3] u) => (float[N,3] y, float[N,3] z) <float[4,3] w = {1,2,3,4,5,6,7,8,9,10,11,12}>
{ h = MatMul(x,w) y = Tanh(h) g = Add(h, u) z = Exp(g) }"""


def part(model: ir.Model, text: str) -> tuple[list[str | None], list[str | None], list[str]]:
    """Inputs, outputs and operators of what the check has proven."""
    report = run(model, text)
    assert report.check.not_run is None
    assert all(segment["breaches"] == [] for segment in report.check.segments)
    graph = model.graph
    return [v.name for v in graph.inputs], [v.name for v in graph.outputs], [node.op_type for node in graph]


def test_a_backbone_and_a_head(parse: Parse) -> None:
    assert part(parse(A), "extract{outputs=h}") == (["x"], ["h"], ["MatMul"])
    model = parse(A)
    assert part(model, "extract{inputs=(h, u) outputs=z}") == (["h", "u"], ["z"], ["Add", "Exp"])
    assert str(model.graph.inputs[0].shape) == "[N,3]"
    assert list(model.graph.initializers) == []


def test_order_is_that_of_the_names(parse: Parse) -> None:
    assert part(parse(A), "extract{inputs=(u, h) outputs=(z, g, h)}")[:2] == (["u", "h"], ["z", "g", "h_output"])


def test_steps_after_a_cut_are_checked_too(parse: Parse) -> None:
    assert part(parse(A), "extract{inputs=(h, u)},clean,extract{outputs=z}")[0] == ["h", "u"]


def test_the_whole_is_no_part(parse: Parse) -> None:
    model = parse(A)
    report = run(model, "extract{inputs=(x, u) outputs=(y, z)}")
    assert [skip.reason for skip in report.passes[0].ledger.skips] == ["the part asked for is all of it"]


def test_a_weight_becomes_an_input(parse: Parse) -> None:
    model = parse(A)
    assert part(model, "extract{inputs=(x, w) outputs=h}") == (["x", "w"], ["h"], ["MatMul"])


def test_across_captures(parse: Parse) -> None:
    body = """m (float[N,3] x, bool c) => (float[N,3] y) <float[3] w = {1,2,3}> { h = Relu(x)
 y = If (c) <then_branch = t () => (float[N,3] a) { a = Add(h, w) },
             else_branch = e () => (float[N,3] b) { b = Neg(h) }> }"""
    assert part(parse(body), "extract{inputs=(h, c)}") == (["h", "c"], ["y"], ["If"])
    with pytest.raises(UsageError, match="the value 'a' is inside 'If/then'"):
        run(parse(body), "extract{outputs=a}")


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("extract", "extract needs inputs=..., outputs=... or both"),
        ("extract{outputs=hidden}", "extract has no value 'hidden'."),
        ("extract{outputs=gg}", "extract has no value 'gg'. Did you mean 'g'?"),
        ("extract{inputs=h outputs=z}", "the outputs also need the input 'u'; name it among the inputs"),
        ("extract{outputs=(h, h)}", "the output 'h' is named twice"),
    ],
)
def test_bad_input(parse: Parse, text: str, sentence: str) -> None:
    model = parse(A)
    with pytest.raises(UsageError) as error:
        run(model, text)
    assert sentence in str(error.value)
    assert len(model.graph) == 4


def test_external_data_stay_in_their_file(tmp_path: Path) -> None:
    save(load(MODELS / "mlp.onnx"), tmp_path / "a.onnx", external=True)
    model = load(tmp_path / "a.onnx")
    part(model, "extract{inputs=relu_1}")
    save(model, tmp_path / "head.onnx")
    (data,) = tmp_path.glob("head.onnx.*.data")
    assert data.stat().st_size < 200_000


# The commands ---------------------------------------------------------------------------------------------------------


def command(*arguments: object) -> int:
    with pytest.raises(SystemExit) as done:
        main([str(argument) for argument in arguments])
    return int(done.value.code or 0)


def test_commands_write_the_text_of_a_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "_latency", lambda *_: None)
    monkeypatch.setattr(cli_merge, "_tell_memory", lambda *_: None)
    out, report = tmp_path / "out.onnx", tmp_path / "report.json"
    mlp, cnn = MODELS / "mlp.onnx", MODELS / "cnn-a.onnx"
    common = ("-o", out, "--json", report, "--force")

    def pipeline() -> str:
        found: str = json.loads(report.read_text())["pipeline"]
        return found

    assert command("parallel", mlp, cnn, mlp, "--separate-inputs", "--prefix", "a,b,c", *common) == 0
    assert pipeline() == "merge-parallel{with=(cnn-a, mlp) inputs=separate prefix=(a, b, c)}"
    assert [v.name for v in load(out).graph.outputs] == ["a/logits", "b/logits", "c/logits"]
    assert command("parallel", mlp, cnn, "--concat", "1", *common) == 0
    assert pipeline() == "merge-parallel{with=(cnn-a) outputs=concat axis=1}"
    assert command("extract", mlp, "--outputs", "relu_1,logits", *common) == 0
    assert pipeline() == "extract{outputs=(relu_1, logits)}"
    assert command("extract", mlp, "--inputs", "relu_1", "-o", tmp_path / "head.onnx") == 0
    assert command("extract", mlp, "--outputs", "relu_1", "-o", tmp_path / "body.onnx") == 0
    assert command("chain", tmp_path / "body.onnx", tmp_path / "head.onnx", "--keep-outputs", *common) == 0
    assert pipeline() == "merge-sequence{with=(head) keep-outputs=true}"
    data = MODELS / "mnist-validation.npz"
    assert command("chain", mlp, cnn, "--map", "relu_2=view", "--adapt", "linear", "--fit", data, *common) == 0
    assert pipeline() == "merge-sequence{with=(cnn-a) map=('relu_2=view') adapt=(linear)}"


def test_memory_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Three sessions of one model take more than one that holds its weights once."""
    mlp, out = str(MODELS / "mlp.onnx"), str(tmp_path / "out.onnx")
    save(load(mlp), out)
    cli_merge._tell_memory([mlp, mlp, mlp], out)
    words = capsys.readouterr().out.split()
    assert words[:3] == ["memory", "to", "load"]
    assert float(words[3]) < float(words[-2])


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("chain",), "penjing chain merges two models or more; none was given."),
        (("parallel", "mlp.onnx"), "penjing parallel merges two models or more; one was given."),
        (("chain", "mlp.onnx", "absent.onnx"), "absent.onnx does not exist"),
        (("chain", "mlp.onnx", "mlp.onnx"), "one has 2 dimensions, the other 4"),
        (("chain", "mlp.onnx", "mlp.onnx", "--fit", "x.npz"), "--fit is for --adapt linear"),
        (("extract", "mlp.onnx"), "extract needs inputs=..."),
        (("extract", "mlp.onnx", "--outputs", "logit"), "Did you mean 'logits'?"),
    ],
)
def test_bad_commands(
    arguments: tuple[str, ...], sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = [str(MODELS / one) if one == "mlp.onnx" else one for one in arguments]
    assert command(*paths, "-o", tmp_path / "out.onnx") == 2
    said = capsys.readouterr().err
    assert sentence in said
    assert "Traceback" not in said
    assert not (tmp_path / "out.onnx").exists()
