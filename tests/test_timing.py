"""Decisions by the clock and their replay, with a runner whose clock says what the test wants."""

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from penjing.ir.affine import S8, U8
from penjing.ir.errors import BadFile, PenjingError, UsageError
from penjing.ir.scopes import scopes
from penjing.passes.base import Context, Feeds
from penjing.passes.pipeline import Pipeline
from penjing.passes.quantize import timing_nets as nets
from penjing.passes.quantize.costs import Table
from penjing.passes.quantize.insertion import Grids
from penjing.passes.quantize.placement import Foretold
from penjing.passes.quantize.plan import Plan, prepare
from penjing.passes.quantize.timing import TIMED, Measured
from penjing.passes.quantize.timing_nets import Part
from penjing.runtime.kernels import kernels
from penjing.runtime.session import OrtRunner

Parse = Callable[[str], ir.Model]

NET = """m (float[1,16,12,12] x) => (float[1,16,12,12] y, float[1,12,16,32] z)
<float[16,16,3,3] w1, float[16] b1, float[16,16,3,3] w2, float[16] b2, float[16,1,3,3] w3,
 float[12,32] v, float[32] c> {
    c1 = Conv <pads = [1, 1, 1, 1]> (x, w1, b1)
    r1 = Relu (c1)
    c2 = Conv <pads = [1, 1, 1, 1]> (r1, w2, b2)
    r2 = Relu (c2)
    d = Conv <pads = [1, 1, 1, 1], group = 16> (r2, w3)
    s = Sigmoid (d)
    y = Add (s, r2)
    p = MaxPool <kernel_shape = [3, 3], pads = [1, 1, 1, 1]> (y)
    t = Transpose <perm = [0, 2, 1, 3]> (p)
    m = MatMul (t, v)
    a = Add (m, c)
    z = Softmax (a)
}"""


class Clock(OrtRunner):
    """Says that any part takes so many microseconds in float, and so many in its other form."""

    def __init__(self, in_float: float = 100.0, other: float = 10.0) -> None:
        super().__init__()
        self.forms = (in_float, other)
        self.timed = 0

    def time(self, models: Sequence[ir.Model], feeds: Feeds, seconds: float = 1.0) -> list[float]:
        self.timed += 1
        pairs = zip(self.forms, range(len(models) // 2), strict=False)
        return [seconds for spent, _ in pairs for seconds in (spent * 4e-6 + 1.0, 1.0)]  # a net more by 4 copies


class NoClock(OrtRunner):
    def time(self, models: Sequence[ir.Model], feeds: Feeds, seconds: float = 1.0) -> list[float]:
        raise AssertionError("nothing is to be timed")


@pytest.fixture
def model(parse: Parse) -> ir.Model:
    model = parse(NET)
    rng = np.random.default_rng(0)
    for value in dict.fromkeys(value for node in model.graph for value in node.inputs if value is not None):
        if value.producer() is None and not value.is_graph_input():
            assert value.shape is not None
            array = rng.standard_normal(value.shape.numpy()).astype(np.float32)
            value.const_value = ir.tensor(array, name=value.name)
            model.graph.register_initializer(value)
    return model


def feeds() -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(1)
    return [{"x": rng.standard_normal((1, 16, 12, 12)).astype(np.float32)} for _ in range(3)]


def run(model: ir.Model, text: str, runner: OrtRunner) -> tuple[bytes, dict[str, object]]:
    """The bytes of what a pass makes, and its part of the report."""
    work = model.clone()
    (step,) = Pipeline.of(text).run(work, Context(data=feeds(), runner=runner))
    changes = [vars(change) for change in step.ledger.changes]
    report = {"passes": [{"name": step.pass_.name, "changed": changes}]}
    return ir.to_proto(work).SerializeToString(deterministic=True), json.loads(json.dumps(report))


def timed(report: dict[str, object]) -> dict[str, dict[str, float]]:
    (entry,) = report["passes"]  # type: ignore[misc]
    return {change["subject"]: change["numbers"] for change in entry["changed"] if change["what"] == TIMED}


def layers(made: bytes) -> int:
    return kernels(ir.from_proto(onnx.ModelProto.FromString(made))).fused


@pytest.mark.parametrize(("integer", "expected"), [(10.0, 4), (1000.0, 0)])
def test_the_clock_decides_and_a_replay_does_so_again(
    integer: float, expected: int, model: ir.Model, tmp_path: Path
) -> None:
    clock = Clock(other=integer)
    made, report = run(model, "quantize-static{timing=measure}", clock)
    assert layers(made) == expected
    times = timed(report)
    assert clock.timed == len(times)
    assert times["Conv(pads=1,1,1,1) Relu of 1x16x12x12 16x16x3x3 16 to 1x16x12x12, uint8 x int8"] == {
        "float_ns": 100_000,
        "integer_ns": 1000 * integer,
    }
    file = tmp_path / "report.json"
    file.write_text(json.dumps(report))
    again, replayed = run(model, f"quantize-static{{decisions='{file}'}}", NoClock())
    assert again == made
    assert replayed == report


def test_equal_parts_are_timed_once_and_each_decision_has_its_figures(model: ir.Model) -> None:
    _, report = run(model, "quantize-static{timing=measure}", Clock())
    assert sum(subject.startswith("Conv") for subject in timed(report)) == 2  # of three
    (entry,) = report["passes"]  # type: ignore[misc]
    decided = [change for change in entry["changed"] if change["what"] == "Conv on integers"]
    assert len(decided) == 3
    assert all(change["numbers"] == {"float_ns": 100_000, "integer_ns": 10_000} for change in decided)


def test_the_search_goes_by_the_clock_too(model: ir.Model, tmp_path: Path) -> None:
    made, report = run(model, "quantize-auto{timing=measure min-sqnr=5 max-drop=0.1}", Clock())
    assert layers(made) == 4
    assert any("input quantized in each run" in subject for subject in timed(report))
    file = tmp_path / "report.json"
    file.write_text(json.dumps(report))
    assert run(model, f"quantize-auto{{decisions='{file}' min-sqnr=5 max-drop=0.1}}", NoClock())[0] == made


def test_what_does_not_run_by_itself_goes_by_the_table(model: ir.Model) -> None:
    class Broken(Clock):
        def time(self, models: Sequence[ir.Model], feeds: Feeds, seconds: float = 1.0) -> list[float]:
            raise PenjingError("it does not run")

    prepare(model, Context())
    plan, table, grids = Plan.of(model), Table.of("cpu-vnni"), Grids(U8, S8)
    costs = Measured(table, grids, Broken())
    for unit in plan.units[0][1]:
        told = Foretold(table).unit(unit, static_sizes)
        assert costs.unit(unit, static_sizes) == pytest.approx(told, rel=0.01)
    assert costs.quantize(4096) == pytest.approx(table.quantize_cost(4096), rel=0.01)


def static_sizes(value: ir.Value) -> tuple[int, ...]:
    return () if value.shape is None else tuple(value.shape.numpy())


def test_the_small_nets_run_and_hold_what_they_are_to_measure(model: ir.Model) -> None:
    """Both nets of each pair, in each form; in integer form the integer kernels are as many as there are copies."""
    prepare(model, Context())
    grids, runner = Grids(U8, S8), OrtRunner()
    (units,) = [members for _, members in Plan.of(model).units]
    parts = [Part.of_unit(unit, static_sizes) for unit in units]
    kinds = [[node.op_type for node in part.nodes] for part in parts]
    assert [kind[0] for kind in kinds] == [
        "Conv",
        "Conv",
        "Conv",
        "Sigmoid",
        "Add",
        "MaxPool",
        "Transpose",
        "MatMul",
        "Softmax",
    ]
    for part in parts:
        for pair in (nets.in_float(part), nets.on_integers(part, grids, None), nets.dynamic(part, grids)):
            for net in (pair.more, pair.less) if pair is not None else ():
                (outputs,) = runner.run(net, [pair.feed])
                assert len(outputs) >= pair.copies + 1
    convolution = nets.on_integers(parts[0], grids, None)
    assert convolution is not None
    assert [kernels(net).integer["QLinearConv"] for net in (convolution.more, convolution.less)] == [5, 1]
    addition = nets.on_integers(parts[4], grids, None)
    assert addition is not None
    assert [kernels(net).integer["QLinearAdd"] for net in (addition.more, addition.less)] == [5, 1]
    product = nets.dynamic(Part.of_layer(parts[7].nodes[0], static_sizes), grids)
    assert product is not None
    assert [kernels(net).integer["DynamicQuantizeMatMul"] for net in (product.more, product.less)] == [5, 1]
    assert nets.dynamic(parts[0], grids) is None


def test_crossings_are_timed_as_they_stand() -> None:
    runner = OrtRunner()
    for name, count, part in nets.crossings((256, 65536)):
        pair = nets.in_float(part)
        (outputs,) = runner.run(pair.more, [pair.feed])
        assert len(outputs) == pair.copies + 1
        assert math.prod(part.dims(part.sources[0])) == count
        assert name in str(part)


def test_recurrent_layers_have_a_dynamic_form(parse: Parse) -> None:
    model = parse(
        "m (float[4,1,32] x) => (y) <float[1,256,32] w, float[1,256,64] r> { y = LSTM <hidden_size = 64> (x, w, r) }"
    )
    for name, shape in (("w", (1, 256, 32)), ("r", (1, 256, 64))):
        value = next(value for value in model.graph[0].inputs if value is not None and value.name == name)
        value.const_value = ir.tensor(np.full(shape, 0.1, np.float32), name=name)
        model.graph.register_initializer(value)
    (scope,) = scopes(model)
    sizes = {"x": (4, 1, 32), "w": (1, 256, 32), "r": (1, 256, 64), "y": (4, 1, 1, 64)}
    part = Part.of_layer(scope.graph[0], lambda value: sizes[value.name or ""])
    pair = nets.dynamic(part, Grids(U8, S8))
    assert pair is not None
    (outputs,) = OrtRunner().run(pair.more, [pair.feed])
    assert len(outputs) == pair.copies + 1


@pytest.mark.parametrize("step", ["quantize-static", "quantize-auto"])
def test_options_that_exclude_each_other(step: str) -> None:
    with pytest.raises(UsageError, match="exclude each other"):
        Pipeline.of(f"{step}{{timing=measure decisions=report.json}}")
    with pytest.raises(UsageError, match="nothing to time"):
        Pipeline.of("quantize-static{timing=measure target=any}")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "cannot be read"),
        ("{", "is no report"),
        ("[1]", "holds nothing that quantize-static has timed"),
        ('{"passes": [{"name": "quantize-static", "changed": [{"what": "timed", "subject": "a"}]}]}', "nanoseconds"),
        (
            '{"passes": [{"name": "quantize-static", "changed": '
            '[{"what": "timed", "subject": "a", "numbers": {"float_ns": -1}}]}]}',
            "nanoseconds above 0",
        ),
        (
            '{"passes": [{"name": "quantize-static", "changed": '
            '[{"what": "timed", "subject": "a", "numbers": {"float_ns": 1}}]}]}',
            "report of another model",
        ),
        ('{"passes": [{"name": "prune", "changed": [{"what": "timed"}]}]}', "holds nothing"),
    ],
)
def test_reports_that_cannot_be_replayed(text: str | None, words: str, model: ir.Model, tmp_path: Path) -> None:
    file = tmp_path / "report.json"
    if text is not None:
        file.write_text(text)
    with pytest.raises(BadFile, match=words):
        run(model, f"quantize-static{{decisions='{file}'}}", NoClock())
