"""The text of a model says all that matters, is stable, and holds nothing that a terminal would act on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir

from penjing.ir.address import addresses, graphs, printable
from penjing.ir.text import diff, text

Parse = Callable[[str], ir.Model]

SUBGRAPH = """g (bool c, float[N,2] x) => (float[N,2] y) <float[2] k = {1, 2.5}> {
    [choice] v = If (c) <
        then_branch = yes () => (float[N,2] t) <float[2] h = {3, 4}> { [inner] t = Add(x, h) },
        else_branch = no () => (float[N,2] e) { [other] e = LeakyRelu<alpha = 0.1>(x) }
    >
    [clip] y = Clip(v, , k)
}"""
FUNCTION = """<ir_version: 8, opset_import: ["": 17, "local": 1]> g (float[2] x) => (float[2] y) {
    [call] y = local.F<slope = 0.5>(x)
}
<domain: "local", opset_import: ["": 17]> F <slope>(x) => (y) { [leaky] y = LeakyRelu<alpha: float = @slope>(x) }"""


def chain(tensor: ir.TensorProtocol) -> ir.Model:
    x = ir.val("x", dtype=ir.DataType.FLOAT, shape=("batch", 2))
    w = ir.val("w", const_value=tensor)
    node = ir.node("Mul", [x, w], name="scale")
    node.outputs[0].name = "y"
    graph = ir.Graph([x], node.outputs, nodes=[node], initializers=[w], opset_imports={"": 17}, name="g")
    return ir.Model(graph, ir_version=8)


def line(model: ir.Model, start: str, *, digests: bool = False) -> str:
    return next(line.strip() for line in text(model, digests=digests).splitlines() if line.strip().startswith(start))


def through_protobuf(model: ir.Model) -> ir.Model:
    return ir.from_proto(ir.to_proto(model))


def test_bodies_stand_beneath_their_node(parse: Parse) -> None:
    assert text(parse(SUBGRAPH)) == (
        "model ir=8 opsets={ai.onnx: 17}\n"
        "graph g(%c: bool[], %x: float32[N,2]) -> (%y: float32[N,2])\n"
        "  %k: float32[2] = [1.0, 2.5]\n"
        "  %v = If(%c)  # choice\n"
        "    then: yes() -> (%t: float32[N,2])\n"
        "      %h: float32[2] = [3.0, 4.0]\n"
        "      %t = Add(%x, %h)  # inner\n"
        "    else: no() -> (%e: float32[N,2])\n"
        "      %e = LeakyRelu(%x) {alpha=0.1}  # other\n"
        "  %y = Clip(%v, _, %k)  # clip\n"
    )


def test_functions_follow_with_their_attributes(parse: Parse) -> None:
    assert text(parse(FUNCTION)) == (
        "model ir=8 opsets={ai.onnx: 17, local: 1}\n"
        "graph g(%x: float32[2]) -> (%y: float32[2])\n"
        "  %y = local::F(%x) {slope=0.5}  # call\n"
        "function local::F(%x) -> (%y) {slope} opsets={ai.onnx: 17}\n"
        "  %y = LeakyRelu(%x) {alpha=@slope}  # leaky\n"
    )


def test_the_same_text_through_clone_and_protobuf(parse: Parse) -> None:
    for model in (parse(SUBGRAPH), parse(FUNCTION), chain(ir.tensor(np.arange(40, dtype=np.float32)))):
        assert text(model.clone()) == text(model) == text(through_protobuf(model))


def test_types_of_sequences_optionals_and_unknown_shapes(parse: Parse) -> None:
    model = parse("g (seq(float[N,?]) s, optional(seq(int64)) o, float x) => (seq(float[N,?]) t) { t = Identity(s) }")
    model.graph.inputs[2].shape = None
    assert line(model, "graph") == (
        "graph g(%s: sequence(float32[N,?]), %o: optional(sequence(int64[])), %x: float32[...])"
        " -> (%t: sequence(float32[N,?]))"
    )


def test_inferred_types_are_shown(parse: Parse) -> None:
    model = parse("g (float[2] x) => (float[2] y) { a = Neg(x) y = Neg(a) }")
    value = model.graph[0].outputs[0]
    value.dtype, value.shape = ir.DataType.FLOAT, ir.Shape(["N", 3])
    assert line(model, "%a") == "%a: float32[N,3] = Neg(%x)"


def test_attributes_are_sorted_and_long_lists_cut() -> None:
    x = ir.val("x")
    half = ir.TypeAndShape(ir.TensorType(ir.DataType.FLOAT16), ir.Shape([1, "N"]))
    attributes = {
        "zeros": [0] * 100,
        "name": 'say "hi"\x1b[0m',
        "flag": 1,
        "floats": [0.1, 2.0],
        "tensor": ir.tensor(np.array([1, 2], np.int64)),
        "type": ir.Attr("type", ir.AttributeType.TYPE_PROTO, half),
        "empty": ir.Attr("empty", ir.AttributeType.INTS, []),
    }
    node = ir.node("Custom", [x], attributes, domain="local", num_outputs=3, name="n")
    for value, name in zip(node.outputs, ("", "b", ""), strict=True):
        value.name = name
    model = ir.Model(ir.Graph([x], [node.outputs[1]], nodes=[node], opset_imports={"": 17, "local": 1}), ir_version=8)
    shown = line(model, "_, %b")
    assert shown.startswith(
        "_, %b = local::Custom(%x) {empty=[], flag=1, floats=[0.1, 2.0], name='say \"hi\"\\x1b[0m', "
        "tensor=int64[2] [1, 2], type=float16[1,N], zeros=[0, 0, 0, 0, 0, 0, 0, 0, ... 100 in all #"
    )
    assert shown == line(through_protobuf(model), "_, %b")


def test_small_tensors_by_value_others_by_digest() -> None:
    assert line(chain(ir.tensor(np.float32([0.1, -0.0]))), "%w") == "%w: float32[2] = [0.1, -0.0]"
    assert line(chain(ir.tensor(np.float32(3))), "%w") == "%w: float32[] = 3.0"
    assert line(chain(ir.tensor(["a\nb", "c"])), "%w") == "%w: string[2] = ['a\\nb', 'c']"
    one, two = (line(chain(ir.tensor(np.full(9, value, np.float16))), "%w") for value in (1, 2))
    assert one.startswith("%w: float16[9] = #")
    assert len(one) == len("%w: float16[9] = #") + 12
    assert one != two


def test_large_tensors_by_provenance_unless_digests_are_asked_for(tmp_path: Path) -> None:
    array = np.ones((1024, 300), np.float32)
    (tmp_path / "weights.data").write_bytes(b"\0" * 64 + array.tobytes())
    external = ir.ExternalTensor(
        "weights.data", 64, array.nbytes, ir.DataType.FLOAT, shape=ir.Shape(array.shape), name="w", base_dir=tmp_path
    )
    lazy = Lazy(lambda: ir.tensor(array), ir.DataType.FLOAT, ir.Shape(array.shape))
    lazy.provenance = "lazy: prune-magnitude(sparsity=0.5)"
    memory = ir.tensor(array)
    assert line(chain(external), "%w") == "%w: float32[1024,300] = weights.data@64+1228800"
    assert line(chain(lazy), "%w") == "%w: float32[1024,300] = lazy: prune-magnitude(sparsity=0.5)"
    assert line(chain(memory), "%w") == "%w: float32[1024,300] = in memory"
    whole = {line(chain(tensor), "%w", digests=True) for tensor in (external, lazy, memory)}
    assert len(whole) == 1
    assert len(whole.pop().partition("#")[2]) == 64


class Lazy(ir.LazyTensor):
    provenance: str


def test_names_hold_no_control_characters() -> None:
    model = chain(ir.tensor([1.0, 2.0]))
    model.graph.name = "a b"
    model.graph[0].name = "\x1b]0;title\x07"
    model.graph.inputs[0].name = "x\u202e, %y"
    model.graph.inputs[0].shape = ir.Shape(["n\r", 2])
    model.metadata_props["key\n"] = "value\x9b31m"
    assert text(model) == (
        "model ir=8 opsets={ai.onnx: 17}\n"
        "  metadata \"key\\n\" = 'value\\x9b31m'\n"
        'graph "a b"(%"x\\u202e, %y": float32["n\\r",2]) -> (%y)\n'
        "  %w: float32[2] = [1.0, 2.0]\n"
        '  %y = Mul(%"x\\u202e, %y", %w)  # \\x1b]0;title\\x07\n'
    )


def test_printable_keeps_distinct_names_distinct() -> None:
    assert printable("encoder/ß.0") == "encoder/ß.0"
    assert printable("a\x07") == "a\\x07"
    assert printable("a\\x07") == "a\\\\x07"


def test_notes_are_compact() -> None:
    model = chain(ir.tensor([1.0, 2.0]))
    node = model.graph[0]
    node.doc_string, node.metadata_props["k"] = "scales", "v"
    assert line(model, "%y") == "%y = Mul(%x, %w)  # scale doc 'scales' meta {k='v'}"
    node.metadata_props["trace"] = "line\n" * 100
    before = line(model, "%y")
    assert before.startswith("%y = Mul(%x, %w)  # scale doc 'scales' meta {2: #")
    node.metadata_props["trace"] += "."
    assert line(model, "%y") != before


def test_deep_nesting() -> None:
    x = ir.val("x")
    node = ir.node("Neg", [x], name="deepest")
    for level in range(1_500):
        node.outputs[0].name = f"v{level}"
        body = ir.Graph([], node.outputs, nodes=[node])
        node = ir.node("Custom", [], {"body": body}, domain="local", name="n")
    model = ir.Model(ir.Graph([x], node.outputs, nodes=[node], opset_imports={"": 17}), ir_version=8)
    assert text(model).count("\n") == 2 + 2 * 1_500 + 1
    assert len(addresses(model)) == 2 * 1_501 + 1


def test_addresses(parse: Parse) -> None:
    model = parse(SUBGRAPH)
    model.graph.node("choice").name = "clip"
    assert [prefix for prefix, _ in graphs(model)] == ["", "clip/then/", "clip/else/"]
    found = " ".join(addresses(model).values())
    assert found == "c x k clip v clip y clip/then/h clip/then/inner clip/then/t clip/else/other clip/else/e"


def test_addresses_of_nodes_with_one_name_differ(parse: Parse) -> None:
    model = parse(SUBGRAPH)
    bodies = [attribute.as_graph().clone(True) for attribute in model.graph[0].attributes.values()]
    node = ir.node("If", [model.graph.inputs[0]], {"then_branch": bodies[0], "else_branch": bodies[1]}, name="choice")
    model.graph.append(node)
    node = ir.node("Switch", [], {"branches": [bodies[0].clone(True), bodies[1].clone(True)]}, name="s")
    model.graph.append(node)
    assert [prefix for prefix, _ in graphs(model)] == [
        "",
        "choice/then/",
        "choice/else/",
        "choice#2/then/",
        "choice#2/else/",
        "s/branches.0/",
        "s/branches.1/",
    ]


def test_functions_come_last_with_their_domain(parse: Parse) -> None:
    model = parse(FUNCTION)
    assert [prefix for prefix, _ in graphs(model)] == ["", "local::F/"]


def test_diff_has_one_line_of_context() -> None:
    before = "".join(f"{number}\n" for number in range(9))
    assert diff(before, before) == ""
    assert diff(before, before.replace("4\n", "four\n")) == (
        "--- before\n+++ after\n@@ -4,3 +4,3 @@\n 3\n-4\n+four\n 5\n"
    )
    assert diff("", "a\n") == "--- before\n+++ after\n@@ -0,0 +1 @@\n+a\n"


def test_diff_applies() -> None:
    """What it keeps and adds is the text after, what it keeps and removes the text before, also for repeated lines."""
    random = np.random.default_rng(0)
    for size in (0, 3, 30, 200):
        old, new = ("".join(f"{number}\n" for number in random.integers(0, 60, size)) for _ in range(2))
        lines = diff(old, new + "end\n" * 4).splitlines(keepends=True)
        hunks = [line for line in lines[2:] if not line.startswith("@@")]
        kept = [line[1:] for line in hunks if line[0] != "+"]
        added = [line[1:] for line in hunks if line[0] != "-"]
        remaining = iter(old.splitlines(keepends=True))
        assert all(line in remaining for line in kept)
        remaining = iter((new + "end\n" * 4).splitlines(keepends=True))
        assert all(line in remaining for line in added)
        assert len(added) - len(kept) == 4
