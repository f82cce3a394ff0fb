"""Big models in little memory; what goes into the data file, where in it, and what never does."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import NodeProto, TensorProto, helper, numpy_helper
from reliability.big import MIB, foldable, layers, run_apart, sparse, with_body
from reliability.kills import check_no_orphans, check_tidy

from penjing.ir import files
from penjing.ir.errors import BadFile
from penjing.ir.files import load, save
from penjing.ir.layout import PAGE
from penjing.ir.storage import StreamedTensor, blocks
from penjing.ir.tensors import tensors
from penjing.passes.base import Context
from penjing.passes.pipeline import Pipeline

# Memory ---------------------------------------------------------------------------------------------------------------


def need_disk(folder: Path, size: float) -> None:
    if shutil.disk_usage(folder).free < 2 * size:
        pytest.skip(f"it needs {size / 1e9:.1f} GB of disk")


def test_13_gigabytes_are_loaded_verified_and_printed(tmp_path: Path) -> None:
    path = sparse(tmp_path)
    assert (tmp_path / "weights.data").stat().st_size > 13e9
    assert (tmp_path / "weights.data").stat().st_blocks * 512 < MIB
    found = run_apart("sparse", tmp_path)
    assert found["peak"] < 10e6
    assert found["lines"] > 30
    assert path.stat().st_size < 10_000


def test_inspect_reads_and_does_not_keep(tmp_path: Path) -> None:
    sparse(tmp_path, 0, 16_384)  # the table alone, 540 MB
    found = run_apart("sparse-inspect", tmp_path)
    assert found["peak"] < 30e6
    assert "536,870,912" in found["said"]


def test_passes_and_save_hold_no_weights(tmp_path: Path) -> None:
    """330 MB in five weights."""
    need_disk(tmp_path, 7e8)
    layers(tmp_path, 5)
    found = run_apart("layers", tmp_path)
    assert found["peak"] < 60e6
    assert found["did"]["prune-magnitude{sparsity=0.5 scope=model}"] == {"smallest elements set to zero": 5}
    assert "opset 17 to 21" in found["did"]["raise-opset"]
    check_no_orphans(tmp_path / "out.onnx")
    found = run_apart("layers-run", tmp_path)
    assert found["peak"] < 60e6
    assert "3 random feeds" in found["said"]


def test_what_clean_folds_is_not_held(tmp_path: Path) -> None:
    """630 MB, of which 420 are folded."""
    need_disk(tmp_path, 13e8)
    foldable(tmp_path, 4096)
    found = run_apart("foldable", tmp_path)
    assert found["peak"] < 80e6
    assert found["did"]["fold-constants"] == {"computed ahead": 40}
    assert sum(found["did"]["fold-batchnorm"].values()) == 3
    assert found["did"]["merge-duplicates"] == {"merged with an equal constant": 1}


def test_lazy_folds_are_those_of_arrays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same numbers, whether they are held or made anew; and a second run finds nothing to do."""
    path, found = foldable(tmp_path, 1024), []
    for large in (1 << 40, 0):
        for place in ("penjing.ir.batchnorm.LARGE", "penjing.passes.clean.constants.LARGE"):
            monkeypatch.setattr(place, large)
        model = load(path)
        Pipeline.parse("clean").run(model, Context())
        assert any(isinstance(tensor, StreamedTensor) for _, tensor in tensors(model)) == (large == 0)
        save(model, tmp_path / "out.onnx")
        found.append({item.name: item.read_bytes() for item in tmp_path.glob("out.onnx*")})
        steps = Pipeline.parse("clean").run(load(tmp_path / "out.onnx"), Context())
        assert not any(step.ledger.changes for step in steps)
    assert found[0] == found[1]


def test_a_lazy_fold_that_does_not_fit_is_declined(monkeypatch: pytest.MonkeyPatch) -> None:
    from penjing.ir.batchnorm import scaled_weight
    from penjing.ir.match import Declined

    layer = ir.node("Gemm", [ir.val("x"), ir.val("w")])
    weight = ir.tensor(np.full((4, 8), 3e38, np.float32), name="w")
    for large in (1 << 40, 0):
        monkeypatch.setattr("penjing.ir.batchnorm.LARGE", large)
        with pytest.raises(Declined, match="do not fit into float32"):
            scaled_weight(layer, weight, np.full(8, 2.0))
        made = scaled_weight(layer, weight, np.arange(8) / 8)
        np.testing.assert_array_equal(np.concatenate(list(blocks(made))), made.numpy().reshape(-1))


def test_over_two_gigabytes_go_to_a_data_file_by_themselves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the same rule at a thousandth: initializers, a body's, and Constant nodes that are too many together."""
    monkeypatch.setattr(files, "LARGE", 3 << 19)
    monkeypatch.setattr(files, "PROTOBUF_LIMIT", 1 << 21)

    def tensor(name: str, rows: int) -> ir.Tensor:
        return ir.Tensor(np.full((rows, 256), len(name), np.float32), name=name)

    def outside(rows: int, more: int) -> list[str]:
        """Names of what is in the data file, of a model with a weight of ``rows`` KiB and a Constant of ``more``."""
        model = with_body(tensor("w", rows), tensor("b", rows), tensor("c", more))
        save(model, tmp_path / "m.onnx")
        check_tidy(tmp_path / "m.onnx", bool(found := [t for _, t in tensors(load(tmp_path / "m.onnx")) if is_out(t)]))
        return sorted(t.name or "" for t in found)

    def is_out(tensor: ir.TensorProtocol) -> bool:
        return isinstance(tensor, ir.ExternalTensor)

    assert outside(400, 400) == []
    assert outside(600, 600) == ["b", "w"]
    assert outside(600, 1100) == ["b", "c", "w"]
    assert outside(200, 1600) == ["b", "c", "w"]
    with pytest.raises(BadFile, match=r"past the 2097152 of protobuf; save it with external data"):
        save(with_body(tensor("w", 900), tensor("b", 900), tensor("c", 900)), tmp_path / "n.onnx", external=False)
    texts = ir.StringTensor(np.array([b"x" * 1024] * 3000), name="texts")
    with pytest.raises(BadFile, match="past the 2097152 of protobuf"):
        save(with_body(texts, texts, texts), tmp_path / "n.onnx")
    assert not list(tmp_path.glob("n.onnx*"))


# Alignment ------------------------------------------------------------------------------------------------------------


def test_alignment_and_its_price(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    sizes = [*generator.integers(1, 1 << 12, 40), *generator.integers(1 << 12, 1 << 18, 40), 1 << 16, 1 << 20, 3 << 20]
    tape = ir.tape.Tape()
    for place, size in enumerate(generator.permutation(sizes)):
        tape.initializer(ir.tensor(generator.integers(0, 255, int(size), dtype=np.uint8), name=f"t{place}"))
    graph = ir.Graph([], [], nodes=[], initializers=tape.initializers, opset_imports={"": 17}, name="g")
    path = tmp_path / "m.onnx"
    save(ir.Model(graph, ir_version=8), path, external=True)
    check_tidy(path, True)
    assert check_no_orphans(path) < 1 / 16
    for _, tensor in tensors(load(path)):
        if not isinstance(tensor, ir.ExternalTensor):
            assert tensor.nbytes < 1024
            continue
        assert tensor.offset is not None
        step = PAGE if tensor.nbytes >= 1 << 20 else 4096 if tensor.nbytes >= PAGE else 64
        assert tensor.offset % step == 0


# What must stay inside ------------------------------------------------------------------------------------------------

LONG = 200  # elements; 1,600 bytes of int64, 800 of float32
F = TensorProto.FLOAT


def info(name: str, shape: list[Any] | None, kind: int = F) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, kind, shape)


def ones(name: str = "s", last: int = 3) -> TensorProto:
    return numpy_helper.from_array(np.array([1] * (LONG - 1) + [last], np.int64), name)


def main(nodes: list[NodeProto], held: list[TensorProto], functions: list[onnx.FunctionProto] | None = None) -> Any:
    """x float32 [300] -> y, beside a weight that is no shape: z = x + w. ``q`` becomes y, of no more than two axes."""
    weight = numpy_helper.from_array(np.arange(300, dtype=np.float32), "w")
    nodes = [*nodes, helper.make_node("Add", ["x", "w"], ["z"], name="add")]
    nodes.append(helper.make_node("Flatten", ["q"], ["y"], name="flat", axis=0))
    outputs = [helper.make_value_info("y", helper.make_tensor_type_proto(F, None)), info("z", [300])]
    graph = helper.make_graph(nodes, "main", [info("x", [300])], outputs, [weight, *held])
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("local", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=8, functions=functions)


def reshape() -> Any:
    return main([helper.make_node("Reshape", ["x", "s"], ["q"], name="r")], [ones(last=300)])


def split() -> Any:
    sizes = numpy_helper.from_array(np.array([2] * 100 + [1] * 100, np.int64), "s")
    outputs = ["q", *(f"q{place}" for place in range(LONG - 1))]
    return main([helper.make_node("Split", ["x", "s"], outputs, name="split", axis=0)], [sizes])


def through_identity() -> Any:
    nodes = [helper.make_node("Identity", ["s"], ["t"]), helper.make_node("Reshape", ["x", "t"], ["q"], name="r")]
    return main(nodes, [ones(last=300)])


def captured() -> Any:
    body = helper.make_graph(
        [helper.make_node("Reshape", ["x", "s"], ["o"], name="r")], "b", [], [info("o", [1] * (LONG - 1) + [300])]
    )
    condition = numpy_helper.from_array(np.array(True), "k")
    return main([helper.make_node("If", ["k"], ["q"], then_branch=body, else_branch=body)], [ones(last=300), condition])


def of_a_body() -> Any:
    body = helper.make_graph(
        [helper.make_node("Reshape", ["x", "s"], ["o"], name="r")], "b", [], [info("o", None)], [ones(last=300)]
    )
    condition = numpy_helper.from_array(np.array(True), "k")
    return main([helper.make_node("If", ["k"], ["q"], then_branch=body, else_branch=body)], [condition])


def through_a_function() -> Any:
    inner = [helper.make_node("Reshape", ["a", "b"], ["c"], name="r")]
    function = helper.make_function("local", "Shaped", ["a", "b"], ["c"], inner, [helper.make_opsetid("", 18)])
    return main([helper.make_node("Shaped", ["x", "s"], ["q"], domain="local")], [ones(last=300)], [function])


@pytest.mark.parametrize("make", [reshape, split, through_identity, captured, of_a_body, through_a_function])
def test_shapes_stay_in_the_model(tmp_path: Path, make: Callable[[], Any]) -> None:
    """More than 1 KiB of them; ONNX Runtime and onnx's shape inference refuse those that are in a data file."""
    import onnxruntime

    onnx.save(make(), tmp_path / "m.onnx")
    save(load(tmp_path / "m.onnx"), tmp_path / "o.onnx", external=True)
    for _ in range(2):
        held = {tensor.name: isinstance(tensor, ir.ExternalTensor) for _, tensor in tensors(load(tmp_path / "o.onnx"))}
        assert held.pop("w")
        assert "s" in held
        assert not any(held.values())
        onnx.shape_inference.infer_shapes(onnx.load(tmp_path / "o.onnx", load_external_data=False), data_prop=True)
        x = np.arange(300, dtype=np.float32)
        found = onnxruntime.InferenceSession(tmp_path / "o.onnx").run(["y", "z"], {"x": x})
        expected = onnxruntime.InferenceSession(tmp_path / "m.onnx").run(["y", "z"], {"x": x})
        for one, other in zip(found, expected, strict=True):
            np.testing.assert_array_equal(one, other)
        save(load(tmp_path / "o.onnx"), tmp_path / "o.onnx")


def test_shapes_that_came_from_a_data_file_go_into_the_model(tmp_path: Path) -> None:
    """As they do in models of exporters that put everything into one."""
    proto = main(
        [
            helper.make_node("Resize", ["r", "", "s"], ["u"], name="resize", mode="nearest"),
            helper.make_node("Constant", [], ["shape"], name="c", value=ones("held", 300)),
            helper.make_node("Reshape", ["x", "shape"], ["q"], name="r"),
            helper.make_node("Identity", ["x"], ["r"], name="i"),
        ],
        [numpy_helper.from_array(np.array([1.5] * 300, np.float32), "s")],
    )
    onnx.save(proto, tmp_path / "m.onnx", save_as_external_data=True, size_threshold=0, convert_attribute=True)
    save(load(tmp_path / "m.onnx"), tmp_path / "o.onnx")
    held = {tensor.name: isinstance(tensor, ir.ExternalTensor) for _, tensor in tensors(load(tmp_path / "o.onnx"))}
    assert held == {"w": True, "s": False, "held": False}
    check_no_orphans(tmp_path / "o.onnx")
