import contextlib
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest

from penjing.ir import files
from penjing.ir.errors import BadFile, UsageError
from penjing.models import zoo
from penjing.runtime import session
from penjing.runtime.session import (
    DoesNotRun,
    OrtRunner,
    bounded_run,
    limits,
    load,
    open_session,
    require_runnable,
    run_feed,
    why_not_runnable,
)

Parse = Callable[[str], ir.Model]
IMAGE = {"image": np.random.default_rng(0).standard_normal((4, 1, 28, 28)).astype(np.float32)}
X = np.array([1.0, -2.0], np.float32)


def logits(model: ir.Model) -> Any:
    return run_feed(open_session(model, prepack=True), IMAGE)["logits"]


@pytest.fixture
def net() -> ir.Model:
    return files.load(zoo.path("mlp"))


@pytest.fixture
def relu(parse: Parse) -> ir.Model:
    return parse("g (float[n] x) => (float[n] y) { m = Relu(x)  y = Neg(m) }")


def test_limits_are_the_newest_that_load(tmp_path: Path) -> None:
    opset, ir_version = limits()
    assert opset >= 22
    assert ir_version >= 10
    value = [onnx.helper.make_tensor_value_info(name, 1, [1]) for name in "xy"]
    graph = onnx.helper.make_graph([onnx.helper.make_node("Relu", ["x"], ["y"])], "g", value[:1], value[1:])
    for extra_opset, extra_ir, runs in [(0, 0, True), (1, 0, False), (0, 1, False)]:
        imports = [onnx.helper.make_opsetid("", opset + extra_opset)]
        model = onnx.helper.make_model(graph, opset_imports=imports, ir_version=ir_version + extra_ir)
        onnx.save(model, tmp_path / "m.onnx")
        with contextlib.nullcontext() if runs else pytest.raises(DoesNotRun):
            open_session(tmp_path / "m.onnx")


def test_newer_stamps_are_refused_in_a_sentence(relu: ir.Model) -> None:
    opset, ir_version = limits()
    relu.graph.opset_imports[""] = opset + 1
    with pytest.raises(BadFile) as refused:
        require_runnable(relu, "m.onnx")
    assert str(refused.value) == (
        f"m.onnx does not run here: opset {opset + 1} is newer than ONNX Runtime {session.version()} takes ({opset}); "
        f"export the model at opset {opset}, or install a newer onnxruntime."
    )
    relu.graph.opset_imports[""] = opset
    relu.ir_version = ir_version + 1
    assert why_not_runnable(relu) is None  # its contents need less, and it runs as what they need
    if ir_version < 14:
        relu.graph.inputs[0].type = ir.TensorType(ir.DataType.FLOAT6E2M3)
        assert why_not_runnable(relu) == (
            f"IR version 14 is newer than ONNX Runtime {session.version()} takes ({ir_version}), and value 'x' is "
            "float6e2m3, which needs it; install a newer onnxruntime."
        )


def test_load_refuses_what_does_not_run(tmp_path: Path, relu: ir.Model) -> None:
    next(iter(relu.graph)).op_type = "NoSuch"
    files.save(relu, tmp_path / "m.onnx")
    assert len(load(tmp_path / "m.onnx").graph) == 2
    with pytest.raises(BadFile, match=r"m\.onnx does not run here: No Op registered for NoSuch"):
        load(tmp_path / "m.onnx", runnable=True)


def test_reasons_are_short_and_the_log_is_silent(parse: Parse, capfd: pytest.CaptureFixture[str]) -> None:
    add = parse("g (float[n] x, float[m] z) => (float[k] y) { y = Add(x, z) }")
    next(iter(add.graph)).name = "sum"
    with pytest.raises(DoesNotRun) as failed:
        run_feed(open_session(add), {"x": np.ones(2, np.float32), "z": np.ones(3, np.float32)})
    assert str(failed.value).startswith("Add node 'sum': Attempting to broadcast an axis")
    with pytest.raises(DoesNotRun, match="File doesn't exist"):
        open_session("/no/such.onnx")
    assert capfd.readouterr() == ("", "")


def test_a_batch_that_is_open_in_name_only_is_told_of(parse: Parse) -> None:
    model = parse("""<ir_version: 8, opset_import: ["": 17]>
        m (float[n,4] x) => (float[1,2,2] y) <int64[3] s = {1, 2, 2}> { y = Reshape(x, s) }""")
    session = open_session(model)
    assert run_feed(session, {"x": np.ones((1, 4), np.float32)})["y"].shape == (1, 2, 2)
    with pytest.raises(DoesNotRun, match=r"takes one sample at a time.*folder of \.npz"):
        run_feed(session, {"x": np.ones((3, 4), np.float32)})


def test_unknown_level_has_the_nearest(relu: ir.Model) -> None:
    with pytest.raises(UsageError, match=r"no optimization level 'extend'.*Did you mean 'extended'"):
        open_session(relu, level="extend")


def test_runner_gives_every_run_and_intermediate_values(relu: ir.Model) -> None:
    runner = OrtRunner()
    runs = list(runner.run(relu, [{"x": X}, {"x": 2 * X}], level="off"))
    assert [run["y"].tolist() for run in runs] == [[-1.0, 0.0], [-2.0, 0.0]]
    [found] = runner.run(relu, [{"x": X}], ["m", "x"])
    assert {name: value.tolist() for name, value in found.items()} == {"m": [1.0, 0.0], "x": [1.0, -2.0]}
    assert [value.name for value in relu.graph.outputs] == ["y"]
    with pytest.raises(UsageError, match="no value 'mm' to fetch"):
        runner.run(relu, [], ["mm"])


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, ml_dtypes.int4, ml_dtypes.uint4])
def test_types_that_numpy_lacks_come_out(dtype: Any, parse: Parse) -> None:
    number = ir.DataType.from_numpy(np.dtype(dtype)).value
    name = onnx.TensorProto.DataType.Name(number).lower()
    text = f"g (float[3] x) => ({name}[3] y, float[3] z) {{ y = Cast<to={number}>(x)  z = Neg(x) }}"
    model = parse('<ir_version: 10, opset_import: ["": 21]>\n' + text)
    found = run_feed(open_session(model), {"x": np.array([1, 0, 3], np.float32)})
    assert found["y"].dtype == dtype
    assert found["y"].astype(np.float32).tolist() == [1.0, 0.0, 3.0]
    assert found["z"].tolist() == [-1.0, 0.0, -3.0]


@pytest.mark.parametrize(
    "name", ["bfloat16", "float8_e5m2", "float8_e4m3fn", "float8_e4m3fnuz", "int4", "uint4", "int2", "uint2"]
)
@pytest.mark.parametrize("shape", [(), (5,), (3, 1)])
def test_types_that_numpy_lacks_go_in(parse: Parse, name: str, shape: tuple[int, ...]) -> None:
    array = np.resize(np.array([1, 0, 1, 1, 0]), shape).astype(getattr(ml_dtypes, name))
    word = onnx.TensorProto.DataType.Name(ir.DataType.from_numpy(array.dtype).value).lower()
    dims = f"[{','.join(map(str, shape))}]" if shape else ""
    text = f"g ({word}{dims} x) => (float{dims} y) {{ y = Cast<to=1>(x) }}"
    model = parse('<ir_version: 13, opset_import: ["": 25]>\n' + text)
    found = run_feed(open_session(model), {"x": array})["y"]
    assert found.shape == shape
    assert found.tolist() == array.astype(np.float32).tolist()


def test_strings_sequences_and_optionals(parse: Parse) -> None:
    model = parse("g (string[n] x) => (string[n] y) { y = Identity(x) }")
    assert run_feed(open_session(model), {"x": np.array(["a", "bc"])})["y"].tolist() == ["a", "bc"]
    model = parse("g (float[2] x) => (seq(float[1]) y) { y = SplitToSequence(x) }")
    assert [part.tolist() for part in run_feed(open_session(model), {"x": X})["y"]] == [[1.0], [-2.0]]
    model = parse("g (optional(float[2]) x) => (optional(float[2]) y) { y = Identity(x) }")
    assert run_feed(open_session(model), {"x": None}) == {"y": None}


def test_weights_in_files_or_computed_when_read_run_like_any(tmp_path: Path, net: ir.Model) -> None:
    expected = logits(net)
    files.save(net, tmp_path / "m.onnx", external=True)
    mapped = files.load(tmp_path / "m.onnx")
    assert np.array_equal(logits(mapped), expected)
    assert any(isinstance(value.const_value, ir.ExternalTensor) for value in mapped.graph.initializers.values())
    for value in mapped.graph.initializers.values():
        tensor = value.const_value
        assert tensor is not None
        value.const_value = ir.LazyTensor(lambda t=tensor: ir.tensor(t.numpy()), tensor.dtype, tensor.shape)
    assert np.array_equal(logits(mapped), expected)


def test_large_models_are_mapped_from_their_folder_or_a_temporary_one(
    tmp_path: Path, net: ir.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = logits(net)
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    monkeypatch.setattr(session, "LARGE", 100_000)
    opened = open_session(net, prepack=True)
    assert not list(scratch.iterdir())  # it is mapped, so a process that is killed leaves nothing behind
    assert np.array_equal(run_feed(opened, IMAGE)["logits"], expected)

    files.save(net, tmp_path / "m.onnx", external=True)
    mapped = files.load(tmp_path / "m.onnx")
    opened = open_session(mapped, prepack=True)
    assert not list(scratch.iterdir())
    assert np.array_equal(run_feed(opened, IMAGE)["logits"], expected)
    next(tmp_path.glob("*.data")).unlink()  # still mapped, so still there for us
    assert np.array_equal(logits(mapped), expected)
    assert np.allclose(run_feed(open_session(mapped), IMAGE)["logits"], expected, atol=1e-4)


def test_score_is_the_metric_of_a_session(net: ir.Model) -> None:
    def outputs(opened: Any) -> float:
        return float(len(opened.get_outputs()))

    assert OrtRunner(outputs).score(net) == 1.0
    with pytest.raises(UsageError, match="No metric"):
        OrtRunner().score(net)


@pytest.mark.parametrize("returned", [float("nan"), None, "0.5", [1, 2]])
def test_a_metric_must_return_a_finite_number(returned: Any, net: ir.Model) -> None:
    with pytest.raises(UsageError, match=r"The metric m\.py:f returned .*; it must return a finite number"):
        OrtRunner(lambda _: returned, metric_name="m.py:f").score(net)


def test_a_metric_that_raises_is_named(net: ir.Model) -> None:
    def broken(_: Any) -> float:
        raise ValueError("no data")

    with pytest.raises(UsageError, match=r"The metric m\.py:broken raised ValueError: no data"):
        OrtRunner(broken, metric_name="m.py:broken").score(net)


def test_bounded_runs_stop_at_memory_and_time(parse: Parse, monkeypatch: pytest.MonkeyPatch) -> None:
    model = parse("g (int64[2] x) => (float[a, b] y) { y = ConstantOfShape(x) }")
    run = bounded_run(model, seconds=60)
    assert run({"x": np.array([2, 3])})["y"].shape == (2, 3)
    with pytest.raises(DoesNotRun, match="memory"):
        run({"x": np.array([1 << 15, 1 << 15])})
    with pytest.raises(DoesNotRun, match="does not end within 0 s"):
        bounded_run(model, seconds=0)({"x": np.array([2, 3])})


def test_runner_times_models_side_by_side(net: ir.Model) -> None:
    seconds = OrtRunner().time([net, net], [IMAGE])
    assert len(seconds) == 2
    assert min(seconds) > 0
