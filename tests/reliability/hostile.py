"""Files that ask for more than they hold: what load, verify, clean and save take in memory and time for each.

``python -m tests.reliability.hostile --record`` writes hostile.md. Memory is the peak of RssAnon + RssShmem over the
value after imports, forks with what they have beyond that; the bound is twice the file, 500 MB and 1 KB a node.
"""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from onnx import AttributeProto, ModelProto, TensorProto, helper

from penjing.ir.intake import MOST

from .record import record

MILLION = 1_000_000
SECONDS = 400  # a case that takes longer hangs

Specimen = Callable[[int], bytes]
"""A file's bytes, from how many things it is to hold."""

_JOURNEY = """
import faulthandler, json, os, sys, threading, time
import numpy, onnx, onnx.shape_inference, onnx.reference
import penjing.passes.clean.constants
from penjing.ir.errors import PenjingError
from penjing.ir.files import load, save
from penjing.ir.verify import verify
from penjing.passes.base import Context
from penjing.passes.pipeline import Pipeline

def private(pid):
    fields = dict(line.split(":", 1) for line in open(f"/proc/{pid}/status") if ":" in line)
    return 1024 * sum(int(fields[key].split()[0]) for key in ("RssAnon", "RssShmem"))

def used():
    own = private("self")
    for pid in open(f"/proc/self/task/{os.getpid()}/children").read().split():
        try:
            own += max(0, private(pid) - private("self"))
        except (OSError, KeyError):  # it has ended
            pass
    return own

faulthandler.dump_traceback_later(float(sys.argv[2]), exit=True)
clean, done, peak = Pipeline.parse("clean"), threading.Event(), [0]
start, began = used(), time.perf_counter()

def watch():
    while not done.wait(0.01):
        peak[0] = max(peak[0], used() - start)

threading.Thread(target=watch, daemon=True).start()
times, said, nodes = {}, "", 0

def timed(word, call):
    before = time.perf_counter()
    result = call()
    times[word] = time.perf_counter() - before
    return result

try:
    model = timed("load", lambda: load(sys.argv[1]))
    nodes = len(model.graph)
    timed("verify", lambda: verify(model, "it"))
    timed("clean", lambda: clean.run(model, Context()))
    timed("save", lambda: save(model, sys.argv[1] + ".saved.onnx"))
except PenjingError as error:
    said = str(error).replace(sys.argv[1], "").strip(" :")
done.set()
peak[0] = max(peak[0], used() - start)
seconds = time.perf_counter() - began
print(json.dumps({"seconds": seconds, "peak": peak[0], "said": said, "times": times, "nodes": nodes}))
"""


@dataclass(frozen=True)
class Measured:
    """``peak`` and ``file`` in bytes; ``said`` is the refusal, or empty; ``times`` the seconds of each step done."""

    seconds: float
    peak: int
    said: str
    times: dict[str, float]
    nodes: int
    file: int

    def bound(self, things: int) -> int:
        """Bytes that may be taken for a file that holds that many nodes, or things in place of nodes."""
        return 2 * self.file + 500_000_000 + 1000 * things


def measure(path: Path, seconds: float = SECONDS) -> Measured:
    """What one file takes in a fresh process. Raises ``AssertionError`` where that crashes or hangs."""
    command = [sys.executable, "-W", "ignore", "-X", "faulthandler", "-c", _JOURNEY, str(path), str(seconds)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"exit code {done.returncode}: {done.stderr[-2000:]}"
    return Measured(**json.loads(done.stdout), file=path.stat().st_size)


# The wire format, for what would take too long to build ---------------------------------------------------------------


def varint(number: int) -> bytes:
    out = bytearray()
    while number > 127:
        out.append(number & 127 | 128)
        number >>= 7
    return bytes([*out, number])


def chunk(number: int, *contents: bytes) -> bytes:
    """A length-delimited field."""
    whole = b"".join(contents)
    return varint(number << 3 | 2) + varint(len(whole)) + whole


_FLOAT = b"\x12\x08\x0a\x06\x08\x01\x12\x02\x0a\x00"  # ValueInfoProto.type: float, one open dimension
OPSET = chunk(8, b"\x10\x11")


def model(*graph: bytes, more: bytes = OPSET) -> bytes:
    """IR version 8, opset 17, ``x`` in and ``y`` out, both float vectors."""
    ends = chunk(11, chunk(1, b"x"), _FLOAT) + chunk(12, chunk(1, b"y"), _FLOAT)
    return b"\x08\x08" + chunk(7, *graph, chunk(2, b"main"), ends) + more


def node(op_type: str, inputs: str = "x", outputs: str = "y", *attributes: bytes) -> bytes:
    """A NodeProto in its field of a graph; names apart by spaces."""
    names = [chunk(1, name.encode()) for name in inputs.split()] + [chunk(2, name.encode()) for name in outputs.split()]
    return chunk(1, *names, chunk(4, op_type.encode()), *(chunk(5, attribute) for attribute in attributes))


def chain(count: int, op_type: str = "Relu") -> bytes:
    """Valid: each reads the one before it."""
    inner = (node(op_type, f"v{i}" if i else "x", f"v{i + 1}" if i < count - 1 else "y") for i in range(count))
    return model(*inner)


def each(count: int, part: Callable[[bytes], bytes]) -> Iterator[bytes]:
    """A part for each of so many names."""
    return (part(b"i%d" % i) for i in range(count))


def _scalar(name: bytes) -> bytes:
    return chunk(5, b"\x10\x01", chunk(8, name), chunk(9, bytes(4)))


def _entry(key: bytes) -> bytes:
    return chunk(1, key) + chunk(2, b"value")


def _with_body(name: bytes) -> bytes:
    """A node with an empty graph, of an operator that nobody knows."""
    body = chunk(1, b"body") + b"\x32\x00\xa0\x01\x05"
    return chunk(1, chunk(1, b"x"), chunk(2, name), chunk(4, b"Keep"), chunk(5, body))


def function_chain(count: int, calls: int = 1) -> bytes:
    """Functions that call the next one, so and so often."""
    functions = []
    for i in range(count):
        callee = chunk(4, b"f%d" % (i + 1)) + chunk(7, b"l") if i < count - 1 else chunk(4, b"Relu")
        names = [b"a", *(b"t%d" % place for place in range(1, calls)), b"b"]
        body = b"".join(chunk(7, chunk(1, a), chunk(2, b), callee) for a, b in itertools.pairwise(names))
        imports = chunk(9, b"\x10\x11") + chunk(9, chunk(1, b"l"), b"\x10\x01")
        functions.append(
            chunk(25, chunk(1, b"f%d" % i), chunk(4, b"a"), chunk(5, b"b"), body, imports, chunk(10, b"l"))
        )
    call = chunk(1, chunk(1, b"x"), chunk(2, b"y"), chunk(4, b"f0"), chunk(7, b"l"))
    return model(call, more=OPSET + chunk(8, chunk(1, b"l"), b"\x10\x01") + b"".join(functions))


def nested(depth: int) -> bytes:
    """Graphs in graphs."""
    graph = b""
    for _ in range(depth):
        graph = node("If", "x", "y", chunk(1, b"then_branch") + chunk(6, graph) + b"\xa0\x01\x05")
    return model(graph)


def _tight(depth: int) -> bytes:
    """Graphs in graphs without a byte too many: each message is three lengths longer than the one in it."""
    parts: list[bytes] = []
    size = 0
    for _ in range(depth):
        for tag in (b"\x32", b"\x2a", b"\x0a"):  # AttributeProto.g, NodeProto.attribute, GraphProto.node
            head = tag + varint(size)
            parts.append(head)
            size += len(head)
    return b"\x08\x08" + b"\x3a" + varint(size) + b"".join(reversed(parts)) + OPSET


def _strings(count: int) -> bytes:
    """A tensor of empty strings, two bytes each."""
    tensor = chunk(5, b"\x08" + varint(count), b"\x10\x08", chunk(8, b"s"), b"\x32\x00" * count)
    return model(node("Relu"), tensor)


def _sparse(count: int) -> bytes:
    """Small sparse tensors, each 2^30 elements once dense."""
    indices = chunk(2, b"\x08\x01\x10\x07", chunk(9, bytes(8)))
    named = (chunk(1, b"\x08\x01\x10\x01", chunk(8, b"s%d" % i), chunk(9, bytes(4))) for i in range(count))
    return model(node("Relu"), *(chunk(15, name, indices, b"\x18" + varint(1 << 30)) for name in named))


def _large_dims(_: int) -> bytes:
    graph = helper.make_graph(
        [
            helper.make_node("Constant", [], ["s"], value_ints=[1 << 62]),
            helper.make_node("ConstantOfShape", ["s"], ["c"]),
            helper.make_node("Concat", ["c", "c"], ["d"], axis=0),
            helper.make_node("ReduceSum", ["d"], ["r"]),
            helper.make_node("Sub", ["v", "v"], ["w"]),
            helper.make_node("Add", ["x", "r"], ["y"]),
        ],
        "main",
        [
            helper.make_tensor_value_info("x", TensorProto.FLOAT, [1]),
            helper.make_tensor_value_info("v", TensorProto.INT64, [1 << 62]),
        ],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1])],
    )
    return _finished(graph)


def _doubling(count: int) -> bytes:
    """Constants that double: 2^count elements at the end."""
    nodes = [helper.make_node("Constant", [], ["c0"], value_floats=[1.0])]
    nodes += [helper.make_node("Concat", [f"c{i}", f"c{i}"], [f"c{i + 1}"], axis=0) for i in range(count)]
    nodes += [helper.make_node("ReduceMax", [f"c{count}"], ["m"]), helper.make_node("Add", ["x", "m"], ["y"])]
    ends = [[helper.make_tensor_value_info(name, TensorProto.FLOAT, [1])] for name in "xy"]
    return _finished(helper.make_graph(nodes, "main", *ends))


def _finished(graph: object) -> bytes:
    made: ModelProto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    return bytes(made.SerializeToString())


_INTS = bytes([AttributeProto.INT])
RELU = node("Relu")
SPECIMENS: dict[str, tuple[int, Specimen]] = {
    "empty nodes": (MILLION, lambda n: model(b"\x0a\x00" * n)),
    "nodes with an operator only": (MILLION, lambda n: model(chunk(1, chunk(4, b"Relu")) * n)),
    "nodes with an unlike operator each": (MILLION, lambda n: model(*each(n, lambda i: chunk(1, chunk(4, i))))),
    "initializers": (MOST - 10, lambda n: model(RELU, *each(n, _scalar))),
    "initializers of one name": (MILLION, lambda n: model(RELU, _scalar(b"w") * n)),
    "attributes of one node": (
        MOST - 10,
        lambda n: model(node("Relu", "x", "y", *each(n, lambda i: chunk(1, i) + b"\x18\x01\xa0\x01" + _INTS))),
    ),
    "values described": (MILLION, lambda n: model(RELU, *each(n, lambda i: chunk(13, chunk(1, i), _FLOAT)))),
    "metadata entries": (
        MILLION,
        lambda n: model(RELU, more=OPSET + b"".join(each(n, lambda i: chunk(14, _entry(i))))),
    ),
    "metadata entries of one node": (
        MILLION,
        lambda n: model(
            chunk(1, chunk(1, b"x"), chunk(2, b"y"), chunk(4, b"Relu"), *each(n, lambda i: chunk(9, _entry(i))))
        ),
    ),
    "inputs of one node": (MILLION, lambda n: model(node("Sum", "x " * n, "y"))),
    "outputs of one node": (MILLION, lambda n: model(node("Split", "x", " ".join(f"o{i}" for i in range(n))))),
    "graph inputs": (MOST - 10, lambda n: model(RELU, *each(n, lambda i: chunk(11, chunk(1, i), _FLOAT)))),
    "graph outputs": (MOST - 10, lambda n: model(RELU, chunk(12, chunk(1, b"y"), _FLOAT) * n)),
    "bodies": (MILLION // 10, lambda n: model(RELU, *each(n, _with_body))),
    "operator sets": (MILLION, lambda n: model(RELU, more=OPSET + b"".join(each(n, lambda i: chunk(8, chunk(1, i)))))),
    "empty functions": (MILLION, lambda n: model(RELU, more=OPSET + b"\xca\x01\x00" * n)),
    "functions that call one another": (10_000, function_chain),
    "functions that call the next one twice": (64, lambda n: function_chain(n, 2)),
    "graphs nested": (10_000, _tight),
    "strings in a tensor": (MILLION, _strings),
    "sparse tensors of 4 GB": (MILLION // 100, _sparse),
    "graphs in the place of one": (MILLION, lambda n: b"\x08\x08" + chunk(7, RELU) + b"\x3a\x00" * n + OPSET),
    "unknown fields": (MILLION, lambda n: model(RELU) + b"\xf8\x3f\x01" * n),
    "a vector of 2^62": (1, _large_dims),
    "doublings of a constant": (64, _doubling),
    "identities, valid": (MILLION, lambda n: chain(n, "Identity")),
    "nodes, valid": (MILLION, chain),
}
"""Name -> how many, and the file."""


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--only", nargs="*", default=list(SPECIMENS))
    options.add_argument("--record", action="store_true", help="write hostile.md")
    given = options.parse_args()
    faults = 0
    lines = ["| a file with | bytes | peak MB | bound | seconds | bound | load, verify, clean, save | outcome |"]
    lines += ["|---|--:|--:|--:|--:|--:|---|---|"]
    for name in given.only:
        count, specimen = SPECIMENS[name]
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "m.onnx")
            path.write_bytes(specimen(count))
            try:
                found = measure(path)
            except AssertionError as error:
                lines.append(f"| {count:,} {name} | {' '.join(str(error).split())[:100]} |")
                faults += 1
                print(lines[-1], flush=True)
                continue
        steps = ", ".join(f"{seconds:.1f}" for seconds in found.times.values())
        said = " ".join(found.said.split())[:100].replace("|", "\\|") or "passed"
        allowed = 10 + 15e-6 * count
        if found.peak > found.bound(count) or found.seconds > allowed:
            said = f"**over the bound**: {said}"
            faults += not name.endswith(", valid")  # honest files of that size are let in, and cost what they cost
        lines.append(
            f"| {count:,} {name} | {found.file:,} | {found.peak / 1e6:,.0f} | {found.bound(count) / 1e6:,.0f} | "
            f"{found.seconds:.1f} | {allowed:.0f} | {steps} | {said} |"
        )
        print(lines[-1], flush=True)
    if given.record:
        record("hostile", "python -m tests.reliability.hostile --record", "\n".join(lines))
    sys.exit(faults > 0)


if __name__ == "__main__":
    main()
