"""Files made to harm: each is refused, or handled, with a sentence; nothing outside its folder is read, no terminal
moved, no memory or time taken that the file does not pay for."""

from __future__ import annotations

import os
import pty
import re
import socket
import subprocess
import sys
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import ModelProto, TensorProto, helper, numpy_helper
from reliability.hostile import SPECIMENS, function_chain, measure, nested

from penjing.ir.calls import DEEPEST, expansion
from penjing.ir.errors import BadFeeds, BadFile, InvalidModel
from penjing.ir.files import load, save
from penjing.ir.intake import MOST
from penjing.ir.text import text
from penjing.ir.verify import verify
from penjing.passes.base import Context
from penjing.passes.pipeline import Pipeline
from penjing.runtime.feeds import read_feeds
from penjing.runtime.session import DoesNotRun, why_not_runnable
from penjing.runtime.sizes import too_large

F = TensorProto.FLOAT
ATTACK = "\x1b]0;owned\x07\x1b[2J\x9b31m[red][/][link=file:///etc/passwd]"
"""Sets the title, clears the screen, and is markup to rich."""

CONTROL = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e]")


def info(name: str, shape: tuple[int | str, ...] = (4,), kind: int = F) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, kind, shape)


def model(
    nodes: list[onnx.NodeProto], *tensors: TensorProto, functions: Sequence[onnx.FunctionProto] = ()
) -> ModelProto:
    graph = helper.make_graph(nodes, "main", [info("x")], [info("y")], initializer=tensors)
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("local", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=8, functions=list(functions))


def constant(name: str, *values: int) -> onnx.NodeProto:
    return helper.make_node("Constant", [], [name], value_ints=values)


def written(folder: Path, proto: ModelProto, name: str = "m.onnx") -> Path:
    path = folder / name
    path.write_bytes(proto.SerializeToString())
    return path


def external(location: str, offset: str = "0", length: str = "16", dims: tuple[int, ...] = (4,)) -> TensorProto:
    tensor = TensorProto(name="w", dims=dims, data_type=F, data_location=TensorProto.EXTERNAL)
    for key, value in (("location", location), ("offset", offset), ("length", length)):
        tensor.external_data.add(key=key, value=value)
    return tensor


def with_data(folder: Path, *keys: str, dims: tuple[int, ...] = (4,)) -> Path:
    return written(folder, model([helper.make_node("Add", ["x", "w"], ["y"])], external(*keys, dims=dims)))


def refusal(path: Path) -> str:
    with pytest.raises((BadFile, InvalidModel)) as caught:
        verify(load(path), str(path))
    sentence = str(caught.value)
    assert sentence.startswith(str(path))
    assert not CONTROL.search(sentence)
    return sentence.removeprefix(str(path))


def cli(*words: object, code: int = 0) -> str:
    """Standard output and error of the command line, which ends with ``code``, without a character of control."""
    command = [sys.executable, "-m", "penjing", *map(str, words)]
    done = subprocess.run(command, capture_output=True, timeout=120, check=False)
    shown = (done.stdout + done.stderr).decode()
    assert done.returncode == code, shown
    assert not CONTROL.search(shown), ascii(CONTROL.search(shown))
    assert "an error of penjing itself" not in shown
    return " ".join(shown.split())


# Data files that lead elsewhere ---------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a data file, beside a secret, and with things that a location may name."""
    (tmp_path / "secret.bin").write_bytes(bytes(64))
    inside = tmp_path / "inside"
    (inside / "sub").mkdir(parents=True)
    (inside / "w.bin").write_bytes(np.arange(16, dtype=np.float32).tobytes())
    (inside / "link.bin").symlink_to("../secret.bin")
    (inside / "up").symlink_to("..")
    (inside / "zero").symlink_to("/dev/zero")
    (inside / "memory").symlink_to("/proc/self/mem")
    (inside / "loop").symlink_to("loop")
    (inside / "hard.bin").hardlink_to(tmp_path / "secret.bin")
    os.mkfifo(inside / "pipe")
    return inside


@pytest.mark.parametrize(
    ("location", "reason"),
    [
        ("../secret.bin", "lies outside the model's folder"),
        ("sub/../../secret.bin", "lies outside the model's folder"),
        ("up/secret.bin", "lies outside the model's folder"),
        ("link.bin", "lies outside the model's folder"),
        ("zero", "lies outside the model's folder"),
        ("memory", "lies outside the model's folder"),
        ("/dev/zero", "is an absolute path"),
        ("/proc/self/environ", "is an absolute path"),
        ("//etc/passwd", "is an absolute path"),
        ("loop", "cannot be opened"),
        ("hard.bin", "is a hard link"),
        ("pipe", "is not a regular file"),
        ("sub", "is not a regular file"),
        ("w.bin/x", "cannot be opened"),
        ("x" * 5000, "cannot be opened"),
        ("\ud800.bin".encode("utf-8", "surrogatepass").decode("latin-1"), "is missing"),
        (ATTACK, "is missing"),
    ],
)
def test_data_files_elsewhere(folder: Path, location: str, reason: str) -> None:
    assert reason in refusal(with_data(folder, location))


def test_a_socket_is_no_data_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)  # the path of a socket is short
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("s")
        assert "cannot be opened" in refusal(with_data(folder, "s"))


@pytest.mark.parametrize("part", ["w.bin", "sub/w.bin"])
def test_a_link_laid_after_the_check_is_not_followed(folder: Path, monkeypatch: pytest.MonkeyPatch, part: str) -> None:
    (folder / "sub" / "w.bin").write_bytes(bytes(64))
    path, resolve = with_data(folder, part), os.path.realpath

    def swap(name: str) -> str:
        found = resolve(name)
        if found.endswith(part):
            (folder / part.split("/")[0]).rename(folder / "old")
            (folder / part.split("/")[0]).symlink_to(".." if "/" in part else "../secret.bin")
            (folder.parent / "w.bin").write_bytes(bytes(64))
        return found

    monkeypatch.setattr(os.path, "realpath", swap)
    assert "cannot be opened" in refusal(path)


@pytest.mark.parametrize(
    "number",
    ["-1", str(1 << 63), str(1 << 64), "9" * 40, "1e9", "0x10", "\u0661\u0662", " 16", "+16", "1_6", "nan", "", "16\n"],
)
def test_numbers_that_are_none(folder: Path, number: str) -> None:
    for keys in (("w.bin", number), ("w.bin", "0", number)):
        assert "expected a count of bytes below 2^63" in refusal(with_data(folder, *keys))


def test_ranges_past_the_end(folder: Path) -> None:
    most = (1 << 63) - 1
    assert "which has 64; the file is cut short" in refusal(with_data(folder, "w.bin", str(most)))
    assert "which has 64; the file is cut short" in refusal(with_data(folder, "w.bin", "52"))
    huge = (1 << 60,)
    assert "which has 64; the file is cut short" in refusal(with_data(folder, "w.bin", "0", str(1 << 62), dims=huge))
    with pytest.raises(BadFile, match="external data have the length"):
        load(with_data(folder, "w.bin", "0", "64"))


def test_overlapping_ranges_are_kept_apart(folder: Path) -> None:
    tensors = []
    for name, offset in (("a", 0), ("b", 4), ("c", 0)):
        tensors.append(external("w.bin", str(offset), "32", (8,)))
        tensors[-1].name = name
    path = written(folder, model([helper.make_node("Relu", ["x"], ["y"])], *tensors))
    before = {name: np.array(value.const_value.numpy()) for name, value in load(path).graph.initializers.items()}
    found = load(path)
    save(found, path)  # over itself, whose data file it still reads
    again = load(path)
    assert before["b"][0] == 1
    for name, value in again.graph.initializers.items():
        np.testing.assert_array_equal(value.const_value.numpy(), before[name])


def test_a_model_as_its_own_data_file(folder: Path) -> None:
    path = with_data(folder, "m.onnx", "0", "16")
    assert load(path).graph.initializers["w"].const_value.nbytes == 16
    with pytest.raises(BadFile, match=r"m\.onnx holds weights of the model that is to be saved; name another file"):
        save(load(path), path)


# Numbers that are too large -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "dims", [[1 << 62], [1 << 62, 4], [1 << 32, 1 << 32], [1 << 62, 1 << 62, 0], [-1], [-(1 << 63)], [3, -4]]
)
def test_shapes_of_tensors(tmp_path: Path, dims: list[int]) -> None:
    relu = helper.make_node("Relu", ["x"], ["y"])
    tensor = TensorProto(name="w", dims=dims, data_type=F)
    found = refusal(written(tmp_path, model([relu], tensor)))
    assert f"'w' has the impossible shape {dims}" in found or "holds 0 entries where" in found
    sparse = onnx.SparseTensorProto(dims=dims)
    sparse.values.CopyFrom(numpy_helper.from_array(np.ones(1, np.float32), "s"))
    sparse.indices.CopyFrom(numpy_helper.from_array(np.zeros(1, np.int64), ""))
    proto = model([relu])
    proto.graph.sparse_initializer.add().CopyFrom(sparse)
    assert f"'s' has the impossible shape {dims}" in refusal(written(tmp_path, proto))


def chain(path: Path) -> str:
    """Load, verify, text, clean, save; the text of what was saved."""
    found = load(path)
    verify(found)
    Pipeline.parse("clean").run(found, Context())
    save(found, path.with_suffix(".saved.onnx"))
    return text(load(path.with_suffix(".saved.onnx")))


@pytest.mark.parametrize("size", [1 << 62, (1 << 63) - 1, -1, -(1 << 63)])
def test_shapes_of_values(tmp_path: Path, size: int) -> None:
    nodes = [helper.make_node("Sub", ["v", "v"], ["w"]), helper.make_node("Concat", ["w", "v"], ["c"], axis=0)]
    nodes += [helper.make_node("ConstantOfShape", ["c"], ["z"]), helper.make_node("Relu", ["x"], ["y"])]
    proto = model(nodes)
    proto.graph.input.append(info("v", (size,), TensorProto.INT64))
    proto.graph.value_info.append(info("w", (size, size), TensorProto.INT64))
    assert "Relu" in chain(written(tmp_path, proto))


BOMBS: dict[str, list[onnx.NodeProto]] = {
    "ConstantOfShape": [constant("s", 1 << 33), helper.make_node("ConstantOfShape", ["s"], ["z"])],
    "Expand": [constant("s", 1 << 33, 4), helper.make_node("Expand", ["x", "s"], ["z"])],
    "Tile": [constant("s", 1 << 33), helper.make_node("Tile", ["x", "s"], ["z"])],
    "Pad": [constant("s", 0, 1 << 40), helper.make_node("Pad", ["x", "s"], ["z"])],
    "Range": [
        *(helper.make_node("Constant", [], [name], value_int=value) for name, value in (("a", 0), ("b", 1 << 40))),
        helper.make_node("Constant", [], ["d"], value_int=1),
        helper.make_node("Range", ["a", "b", "d"], ["r"]),
        helper.make_node("Cast", ["r"], ["z"], to=F),
    ],
    "OneHot": [
        constant("i", 1, 2),
        helper.make_node("Constant", [], ["d"], value_int=1 << 40),
        helper.make_node("Constant", [], ["v"], value_floats=[0.0, 1.0]),
        helper.make_node("OneHot", ["i", "d", "v"], ["z"]),
    ],
    "EyeLike": [
        constant("s", 1 << 20, 1 << 20),
        helper.make_node("ConstantOfShape", ["s"], ["c"]),
        helper.make_node("EyeLike", ["c"], ["z"]),
    ],
    "Add of outer": [
        constant("s", 1 << 20, 1),
        constant("t", 1, 1 << 20),
        helper.make_node("ConstantOfShape", ["s"], ["a"]),
        helper.make_node("ConstantOfShape", ["t"], ["b"]),
        helper.make_node("Add", ["a", "b"], ["z"]),
    ],
    "Concat doubling": [
        helper.make_node("Constant", [], ["c0"], value_floats=[1.0]),
        *(helper.make_node("Concat", [f"c{i}", f"c{i}"], [f"c{i + 1}"], axis=0) for i in range(48)),
        helper.make_node("Relu", ["c48"], ["z"]),
    ],
    "RandomNormal": [helper.make_node("RandomNormal", [], ["z"], shape=[1 << 33])],
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_values_that_no_machine_holds(tmp_path: Path, bomb: str) -> None:
    """Neither folded nor run: a value alone is over the machine's memory."""
    nodes = [*BOMBS[bomb], helper.make_node("ReduceMax", ["z"], ["m"]), helper.make_node("Add", ["x", "m"], ["y"])]
    path = written(tmp_path, model(nodes))
    assert "ReduceMax" in chain(path)
    reason = too_large(load(path), available=1 << 34)
    assert reason is not None
    assert re.fullmatch(r"value '\w+' would take (.* GB|over 2\^64 bytes), and this machine has 17\.2 GB", reason)
    small = too_large(load(path), available=1 << 70)
    assert small is None


def test_the_commands_say_what_would_not_fit(tmp_path: Path) -> None:
    nodes = [constant("s", 1 << 45), helper.make_node("ConstantOfShape", ["s"], ["z"])]
    nodes += [helper.make_node("ReduceMax", ["z"], ["m"]), helper.make_node("Add", ["x", "m"], ["y"])]
    path, out = written(tmp_path, model(nodes)), tmp_path / "out.onnx"
    reason = "value 'z' would take 140,737.5 GB, and this machine has"
    assert f"check: not run ({reason}" in cli("run", path, "-p", "clean", "-o", out)
    assert out.exists()
    assert reason in cli("run", path, "-p", "clean", "-o", out, "--force", "--strict", code=1)
    assert reason in cli("run", path, "-p", "clean", "-o", out, "--force", "--max-error", "0.1", code=2)
    assert f"{path} does not run here: {reason}" in cli("compare", path, path, code=2)
    assert f"{path} does not run here: {reason}" in cli("bench", path, code=2)
    assert "ConstantOfShape 1" in cli("inspect", path)


LOOP = """<ir_version: 8, opset_import: ["": 17]> main (float[1] x) => (float[T, 1] y) {
    n = Constant <value_int = 4611686018427387904> ()  t = Constant <value = bool {1}> ()
    last, y = Loop (n, t, x) <body = b (int64 i, bool go, float[1] v) => (bool more, float[1] w, float[1] s)
        { more = Identity (go)  w = Add (v, v)  s = Identity (w) }> }"""


def test_a_loop_without_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from penjing.runtime.draws import NoFeeds, random_feeds

    path = written(tmp_path, onnx.parser.parse_model(LOOP))
    assert "Loop" in chain(path)
    with pytest.raises(NoFeeds, match=r"does not end within 1 s|no random feed ran|smaller than requested"):
        random_feeds(load(path), 0, seconds=1)


# Graphs that no walk should follow ------------------------------------------------------------------------------------


def _function(name: str, callee: str) -> onnx.FunctionProto:
    call = helper.make_node(callee, ["a"], ["b"], domain="local")
    return helper.make_function("local", name, ["a"], ["b"], [call], [helper.make_opsetid("local", 1)])


def _captures_itself() -> ModelProto:
    body = helper.make_graph([helper.make_node("Identity", ["y"], ["t"])], "body", [], [info("t")])
    nodes = [helper.make_node("Constant", [], ["c"], value=helper.make_tensor("c", TensorProto.BOOL, [], [True]))]
    return model([*nodes, helper.make_node("If", ["c"], ["y"], then_branch=body, else_branch=body)])


CYCLES: dict[str, tuple[Callable[[], ModelProto], str]] = {
    "two nodes": (
        lambda: model(
            [
                helper.make_node("Identity", ["b"], ["a"]),
                helper.make_node("Transpose", ["a"], ["b"]),
                helper.make_node("Gemm", ["x", "a", "b"], ["y"]),
            ]
        ),
        "is used before node 'Transpose' defines it: the order is wrong, or there is a cycle",
    ),
    "one node": (lambda: model([helper.make_node("Relu", ["y"], ["y"])]), "is an output of the node itself"),
    "a body that reads its own node": (_captures_itself, "the order is wrong, or there is a cycle"),
    "a function that calls itself": (
        lambda: model([helper.make_node("f", ["x"], ["y"], domain="local")], functions=[_function("f", "f")]),
        "a function must not call itself, found local::f -> local::f",
    ),
    "two functions that call each other": (
        lambda: model(
            [helper.make_node("f", ["x"], ["y"], domain="local")], functions=[_function("f", "g"), _function("g", "f")]
        ),
        "a function must not call itself, found local::f -> local::g -> local::f",
    ),
}


@pytest.mark.parametrize("cycle", CYCLES)
def test_cycles(tmp_path: Path, cycle: str) -> None:
    make, reason = CYCLES[cycle]
    path = written(tmp_path, make())
    assert reason in refusal(path)


def test_the_commands_refuse_cycles(tmp_path: Path) -> None:
    path = written(tmp_path, CYCLES["two nodes"][0]())
    assert "there is a cycle" in cli("run", path, "-p", "clean", "-o", tmp_path / "o.onnx", code=2)
    assert "does not run here" in cli("compare", path, path, code=2)
    cli("inspect", path)
    assert os.listdir(tmp_path) == ["m.onnx"]


def test_nesting(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(nested(40))
    assert "nests its graphs or types deeper than protobuf reads" in refusal(path)
    path.write_bytes(nested(25))
    assert "If" in text(load(path))


def test_functions_that_stand_for_too_much(tmp_path: Path) -> None:
    """A billion laughs, and a stack that would overflow: ONNX Runtime and shape inference never see them."""
    path = tmp_path / "m.onnx"
    path.write_bytes(function_chain(70, calls=2))
    assert expansion(load(path)) == (70, 1 << 62)
    assert str(why_not_runnable(load(path))).startswith("it has 4,611,686,018,427,387,904 nodes once its functions")
    path.write_bytes(function_chain(DEEPEST + 1))
    assert str(too_large(load(path))).startswith("its functions call one another 501 deep")
    chain(path)
    path.write_bytes(function_chain(99))  # since 1.32 ONNX Runtime itself takes no more than 100
    assert why_not_runnable(load(path)) is None


# Many ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["initializers", "attributes of one node", "graph inputs", "graph outputs"])
def test_too_many(name: str, tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(SPECIMENS[name][1](MOST + 1))
    with pytest.raises(BadFile, match=r"100,00\d .* at most 100,000 are supported"):
        load(path)


@pytest.mark.parametrize("name", [name for name in SPECIMENS if not name.endswith("valid")])
def test_many(tmp_path: Path, name: str) -> None:
    """All of a million are in the recorded run; what takes the square of the time hangs here, too."""
    most, specimen = SPECIMENS[name]
    count = most if name == "empty nodes" else min(most, 30_000)
    path = tmp_path / "m.onnx"
    path.write_bytes(specimen(count))
    found = measure(path, seconds=100)
    assert found.peak <= found.bound(count)


def test_what_is_no_model(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    path.touch()
    os.truncate(path, 3 << 30)  # a sparse file
    assert "has 3221225472 bytes; an ONNX file has at most" in refusal(path)
    os.truncate(path, (1 << 31) - 1)
    assert refusal(path) == " is not an ONNX file"
    for contents in (b"", b"{}", b"hello\n", b"\x08\x08" + b"\xff" * 11, b"\x08\x08\x3b\x3c", b"\x08\x08\x0f"):
        path.write_bytes(contents)
        assert re.search("is empty|is not an ONNX file|does not decode|holds no graph", refusal(path))


def test_fields_that_come_twice_or_are_unknown(tmp_path: Path) -> None:
    """Protobuf lets the last of a field win, merges messages and keeps what it does not know."""
    whole = model([helper.make_node("Relu", ["x"], ["y"])]).SerializeToString()
    path = tmp_path / "m.onnx"
    path.write_bytes(b"\x08\x05" + whole + b"\xf8\x3f\x01\xfb\x3f\xfc\x3f")  # two versions, a number and a group
    assert text(load(path)).startswith("model ir=8")
    path.write_bytes(b"\x08\x88\x80\x80\x80\x80\x80\x80\x80\x80\x00" + whole[2:])  # eight, in ten bytes
    assert text(load(path)).startswith("model ir=8")
    path.write_bytes(b"\x08\x88\x80\x80\x80\x80\x80\x80\x80\x80\x80\x00" + whole[2:])  # in eleven
    assert refusal(path) == " is not an ONNX file"
    path.write_bytes(whole + whole)
    assert re.search("two things make|twice|names no", refusal(path))


# Names that a terminal acts on ----------------------------------------------------------------------------------------


def attacked() -> ModelProto:
    """A sound model with control characters and markup in every place that holds text."""

    def words(place: str) -> str:
        return f"{place}{ATTACK}"

    call = helper.make_node(words("operator"), ["h"], ["y" + ATTACK], domain=words("domain"), name=words("call"))
    inner = helper.make_node("Relu", [words("formal")], [words("made")], name=words("inside"), doc_string=words("doc"))
    function = helper.make_function(
        words("domain"),
        words("operator"),
        [words("formal")],
        [words("made")],
        [inner],
        [helper.make_opsetid("", 17)],
        attributes=[words("attribute")],
        doc_string=words("doc"),
    )
    nodes = [
        helper.make_node("MatMul", ["x" + ATTACK, words("weight")], ["h"], name=words("node"), doc_string=words("doc")),
        call,
        helper.make_node("Constant", [], [words("text")], value_strings=[words("string")], name=words("constant")),
        helper.make_node("Identity", [words("text")], [words("unused")]),
    ]
    weight = numpy_helper.from_array(np.eye(4, dtype=np.float32), words("weight"))
    weight.doc_string = words("doc")
    ends = [info("x" + ATTACK, (words("dim"), 4)), info("y" + ATTACK, (words("dim"), 4))]
    graph = helper.make_graph(nodes, words("graph"), ends[:1], ends[1:], initializer=[weight], doc_string=words("doc"))
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid(words("domain"), 1)]
    made = helper.make_model(graph, opset_imports=opsets, ir_version=10, functions=[function])
    made.producer_name, made.producer_version, made.domain = words("producer"), words("version"), words("model")
    made.doc_string = words("doc")
    for owner in (made, made.graph, made.graph.node[0], made.graph.initializer[0], made.graph.input[0], function):
        owner.metadata_props.add(key=words("key"), value=words("value"))
    return made


def test_no_name_reaches_the_terminal(tmp_path: Path) -> None:
    path = written(tmp_path, attacked(), f"m{ATTACK.replace('/', '')}.onnx")
    out = tmp_path / f"out{ATTACK.replace('/', '')}.onnx"
    shown = cli("inspect", path)
    assert r"producer\x1b]0;owned\x07" in shown
    assert "[red][/][lin" in shown
    cli("inspect", path, "--json")
    assert "[red][/]" in cli("run", path, "-p", "clean", "-o", out, "--print", "all")
    cli(
        "run",
        path,
        "-p",
        "strip-metadata,prune-magnitude{sparsity=0.95}",
        "-o",
        out,
        "--force",
        "--max-error",
        "0",
        code=1,
    )
    assert "bit-identical" in cli("compare", path, path)
    cli("bench", path)
    cli("run", path, "-p", "clean", "-o", tmp_path / ATTACK / "o", code=2)
    cli("inspect", tmp_path / f"none{ATTACK.replace('/', '')}", code=2)
    cli("run", path, "-p", f"prune-magnitude{{keep='{ATTACK}'}}", "-o", out, "--force", code=2)


def test_no_name_reaches_a_real_terminal(tmp_path: Path) -> None:
    path = written(tmp_path, attacked())
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "penjing", "inspect", str(path)]
    with subprocess.Popen(command, stdout=theirs, stderr=theirs, env=os.environ | {"TERM": "xterm"}) as child:
        os.close(theirs)
        shown = b""
        while True:
            try:
                part = os.read(ours, 1 << 16)
            except OSError:  # the end of a terminal, on Linux
                break
            if not part:
                break
            shown += part
    os.close(ours)
    assert child.returncode == 0
    assert b"owned" in shown
    for sequence in (b"\x1b]0;", b"\x1b[2J", b"\xc2\x9b", b"\x07", b"\x1b]8;"):
        assert sequence not in shown


def _unknown_operator(proto: ModelProto) -> None:
    proto.graph.node[0].op_type = "Nothing" + ATTACK


def _unknown_domain(proto: ModelProto) -> None:
    proto.graph.node[0].domain = "nowhere" + ATTACK


def _unknown_attribute(proto: ModelProto) -> None:
    proto.graph.node[0].attribute.add(name="a" + ATTACK, i=1, type=onnx.AttributeProto.INT)


def _unknown_input(proto: ModelProto) -> None:
    proto.graph.node[0].input[0] = "v" + ATTACK


def _wrong_type(proto: ModelProto) -> None:
    proto.graph.input[0].type.tensor_type.elem_type = TensorProto.STRING
    proto.graph.node[0].name = "node" + ATTACK


def _wrong_shape(proto: ModelProto) -> None:
    proto.graph.node[0].op_type = "MatMul"
    proto.graph.node[0].name = "node" + ATTACK
    proto.graph.initializer[0].CopyFrom(numpy_helper.from_array(np.ones((3, 3), np.float32), "w"))


def _two_makers(proto: ModelProto) -> None:
    proto.graph.node.add(op_type="Relu" + ATTACK, input=["x"], output=["y"], name="again" + ATTACK)


@pytest.mark.parametrize(
    "change",
    [_unknown_operator, _unknown_domain, _unknown_attribute, _unknown_input, _wrong_type, _wrong_shape, _two_makers],
)
def test_no_error_of_others_reaches_the_terminal(tmp_path: Path, change: Callable[[ModelProto], None]) -> None:
    proto = model([helper.make_node("Add", ["x", "w"], ["y"])], numpy_helper.from_array(np.ones(4, np.float32), "w"))
    change(proto)
    path = written(tmp_path, proto)
    shown = cli("compare", path, path, code=2)
    assert "owned" in shown or change is _wrong_type
    try:
        reason = why_not_runnable(load(path))
    except (BadFile, DoesNotRun) as error:
        reason = str(error)
    assert reason
    assert not CONTROL.search(reason)


def test_text_that_is_no_text(tmp_path: Path) -> None:
    whole = attacked().SerializeToString()
    for place in (b"graph", b"node", b"weight", b"key", b"value", b"producer", b"dim", b"operator", b"attribute"):
        (tmp_path / "m.onnx").write_bytes(whole.replace(place + b"\x1b", b"\xff" * len(place) + b"\x1b"))
        assert "is not UTF-8" in refusal(tmp_path / "m.onnx")


# Sample data ----------------------------------------------------------------------------------------------------------


def feeds_refusal(tmp_path: Path, name: str = "x.npz") -> str:
    found = load(written(tmp_path, model([helper.make_node("Relu", ["x"], ["y"])])))
    with pytest.raises(BadFeeds) as caught:
        list(read_feeds(str(tmp_path / name), found))
    return str(caught.value)


def _archive(path: Path, header: str, contents: bytes = b"") -> None:
    head = header.encode().ljust(117) + b"\n"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x.npy", b"\x93NUMPY\x01\x00" + len(head).to_bytes(2, "little") + head + contents)


def test_sample_data(tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    _archive(path, "{'descr': '<f4', 'fortran_order': False, 'shape': (1099511627776,), }", bytes(16))
    assert "cannot be read as numpy arrays" in feeds_refusal(tmp_path)
    _archive(path, "{'descr': '|O', 'fortran_order': False, 'shape': (1,), }", b"\x80\x04.")
    assert "it holds Python objects" in feeds_refusal(tmp_path)
    _archive(path, "{'descr': __import__('os').abort(), 'fortran_order': False, 'shape': (1,)}")
    assert "cannot be read as numpy arrays" in feeds_refusal(tmp_path)
    path.write_bytes(b"PK\x03\x04" + bytes(100))
    assert "cannot be read as numpy arrays" in feeds_refusal(tmp_path)
    path.unlink()
    os.mkfifo(path)
    assert "x.npz is not one" in feeds_refusal(tmp_path)
    (tmp_path / "runs").mkdir()
    os.mkfifo(tmp_path / "runs" / "0.npz")
    assert "it is not a regular file" in feeds_refusal(tmp_path, "runs")


def test_an_archive_that_unpacks_to_more_than_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    np.savez_compressed(tmp_path / "x.npz", x=np.zeros((1 << 20, 4), np.float32))
    assert (tmp_path / "x.npz").stat().st_size < 1 << 16
    monkeypatch.setattr("penjing.runtime.feeds.machine_bytes", lambda: 1 << 24)
    assert "it unpacks to 0.0 GB, over half of this machine's memory" in feeds_refusal(tmp_path)
