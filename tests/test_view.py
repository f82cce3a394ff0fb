"""Views: who feeds whom, which channels go together, where a model comes apart."""

from __future__ import annotations

from pathlib import Path

import networkx as nx
import onnx
import onnx_ir as ir
import pytest

from penjing.ir.view import channels, cuts, dataflow, reads

MODELS = Path(__file__).parent.parent / "models"


def read(text: str, *shapes: tuple[str, list[int]]) -> ir.Model:
    """Shapes inferred; the weights named are zeros of that shape."""
    for name, dims in shapes:
        size = 1
        for dim in dims:
            size *= dim
        text = text.replace(f"{name} = {{}}", f"{name} = {{{','.join(['0'] * size)}}}")
    proto = onnx.parser.parse_model('<ir_version: 8, opset_import: ["": 17]>' + text)
    return ir.from_proto(onnx.shape_inference.infer_shapes(proto, strict_mode=True))


def net(body: str, inputs: str, outputs: str, **weights: list[int]) -> ir.Model:
    held = ", ".join(f"float{dims} {name} = {{}}" for name, dims in weights.items())
    text = f"net ({inputs}) => ({outputs}) {f'<{held}>' if held else ''} {{ {body} }}"
    return read(text, *weights.items())


def residual() -> ir.Model:
    return net(
        """a = Conv <pads = [1,1,1,1]> (x, w1, b1)
           r = Relu(a)
           c = Conv <pads = [1,1,1,1]> (r, w2)
           s = Add(r, c)
           p = GlobalAveragePool(s)
           f = Flatten(p)
           y = Gemm <transB = 1> (f, w3)""",
        "float[N,3,8,8] x",
        "float[N,10] y",
        w1=[4, 3, 3, 3],
        b1=[4],
        w2=[4, 4, 3, 3],
        w3=[10, 4],
    )


def group(view: nx.Graph, name: str, axis: int) -> tuple[set[str], set[str]]:
    """The component of a value's axis: its vertices as ``name:axis``, and the reasons why it is closed."""
    vertex = next(v for v in view if v[0].name == name and v[1] == axis)
    members = nx.node_connected_component(view, vertex)
    reasons = {view.nodes[v]["closed"] for v in members if "closed" in view.nodes[v]}
    return {f"{value.name}:{place}" for value, place in members}, reasons


def ties(view: nx.Graph, one: tuple[str, int], other: tuple[str, int]) -> list[tuple[str, str, int, int]]:
    """Each tie between two axes: operator, name on the wide side, start, repeat."""
    ends = [next(v for v in view if (v[0].name, v[1]) == end) for end in (one, other)]
    return [(t.node.op_type, t.wide[0].name or "", t.start, t.repeat) for t in view.edges[ends[0], ends[1]]["ties"]]


def names(values: list[ir.Value]) -> list[str | None]:
    return [value.name for value in values]


# Dataflow


def test_dataflow_of_a_residual_net() -> None:
    model = residual()
    view = dataflow(model.graph)
    vertices = list(view)
    assert [v.name for v in vertices[:5]] == ["x", "w1", "b1", "w2", "w3"]
    assert vertices[5:] == list(model.graph)
    relu, conv, add = model.graph[1], model.graph[2], model.graph[3]
    assert list(view.successors(relu)) == [conv, add]
    assert view.edges[relu, add]["values"] == [relu.outputs[0]]
    assert nx.is_directed_acyclic_graph(view)


BRANCH = """
branch (bool c, float[4] x) => (float[4] y)
<float[4] k = {1, 2, 3, 4}>
{
   z = Relu(x)
   h = Neg(z)
   y = If(c) <
      then_branch = yes () => (float[4] a) {
         t = If(c) <
            then_branch = inner () => (float[4] i) { i = Add(z, k) },
            else_branch = other () => (float[4] o) { o = Abs(h) }
         >
         a = Exp(t)
      },
      else_branch = no () => (float[4] b) { b = Mul(h, k) }
   >
}
"""


def test_captures_count_as_inputs() -> None:
    model = read(BRANCH)
    branch = model.graph[2]
    assert names(reads(branch)) == ["c", "h", "k", "z"]
    view = dataflow(model.graph)
    assert {source.name for source in view.predecessors(branch)} == {"c", "k", model.graph[0].name, model.graph[1].name}
    body = branch.attributes["else_branch"].as_graph()
    assert [v.name for v in dataflow(body)] == ["h", "k", body[0].name]


# Cuts


def test_cuts_of_a_residual_net() -> None:
    assert names(cuts(residual().graph)) == ["x", "a", "r", "s", "p", "f", "y"]


def test_a_capture_keeps_a_value_open() -> None:
    """``z`` and ``h`` both reach into the body, so nothing between ``z`` and ``y`` is a cut."""
    model = read(BRANCH)
    assert names(cuts(model.graph)) == ["y"]
    model = read(BRANCH.replace("bool c, float[4] x", "float[4] x").replace("z = Relu(x)", "z = Relu(x) c = Seen(z)"))
    assert names(cuts(model.graph)) == ["x", "z", "y"]
    assert names(cuts(model.graph[3].attributes["else_branch"].as_graph())) == ["h", "b"]


def test_constants_and_dead_code_lie_on_no_path() -> None:
    body = "k = Exp(w) a = Mul(x, k) dead = Neg(x) late = Sqrt(k) y = Add(a, late)"
    assert names(cuts(net(body, "float[4] x", "float[4] y", w=[4]).graph)) == ["x", "a", "y"]


def test_a_random_value_is_not_drawn_twice() -> None:
    body = "k = RandomNormal <shape = [4]> () a = Mul(x, k) b = Add(a, k) y = Exp(b)"
    assert names(cuts(net(body, "float[4] x", "float[4] y").graph)) == ["x", "b", "y"]


def test_an_early_output_leaves_no_cut_after_it() -> None:
    model = net("a = Abs(x) b = Neg(a) c = Exp(b)", "float[4] x", "float[4] a, float[4] c")
    assert names(cuts(model.graph)) == ["x", "a"]
    assert cuts(net("y = Exp(w)", "float[4] x", "float[4] y", w=[4]).graph) == []


def test_cuts_are_the_articulations_of_all_paths() -> None:
    """Against the definition: without the value, no path is left."""
    model = net(
        """a = Abs(x) b, c = Split <axis = 0> (a) d = Add(b, c) e = Neg(d) f = Exp(d) g = Mul(e, f)
           h, i = Split <axis = 0> (g) j = Sin(h) k = Mul(j, i) y = Cos(k)""",
        "float[4] x",
        "float[1] y",
    )
    flow = nx.DiGraph()
    for node in model.graph:
        flow.add_edges_from((value, output) for value in node.inputs for output in node.outputs)
    (start,), (end,) = model.graph.inputs, model.graph.outputs
    expected = [
        value
        for value in nx.topological_sort(flow)
        if value in (start, end) or not nx.has_path(nx.restricted_view(flow, [value], []), start, end)
    ]
    assert names(cuts(model.graph)) == names(expected) == ["x", "a", "d", "g", "k", "y"]


# Channels


def test_a_residual_ties_the_whole_spine() -> None:
    view = channels(residual())
    assert group(view, "w1", 0) == (
        {"w1:0", "b1:0", "a:1", "r:1", "w2:1", "c:1", "w2:0", "s:1", "p:1", "f:1", "w3:1"},
        set(),
    )
    assert ties(view, ("r", 1), ("s", 1)) == [("Add", "s", 0, 1)]
    assert group(view, "w3", 0) == ({"w3:0", "y:1"}, {"graph output"})
    assert group(view, "w1", 1) == ({"w1:1", "x:1"}, {"graph input"})


def test_vertices_come_in_the_same_order_each_time() -> None:
    model = residual()
    assert list(channels(model)) == list(channels(model))
    assert list(channels(model).edges) == list(channels(model.graph).edges)


def test_depthwise_convolution_ties_in_and_out() -> None:
    model = net(
        "a = Conv(x, w) d = Conv <group = 4> (a, dw) y = Conv(d, v)",
        "float[1,3,8,8] x",
        "float[1,2,8,8] y",
        w=[4, 3, 1, 1],
        dw=[8, 1, 1, 1],
        v=[2, 8, 1, 1],
    )
    view = channels(model)
    assert group(view, "w", 0) == ({"w:0", "a:1", "dw:0", "d:1", "v:1"}, set())
    assert ties(view, ("a", 1), ("dw", 0)) == [("Conv", "dw", 0, 2)]


def test_grouped_convolution_closes() -> None:
    model = net(
        "a = Conv(x, w) y = Conv <group = 2> (a, g)",
        "float[1,3,8,8] x",
        "float[1,4,8,8] y",
        w=[4, 3, 1, 1],
        g=[4, 2, 1, 1],
    )
    assert group(channels(model), "w", 0) == ({"w:0", "a:1"}, {"axis of Conv"})


def test_concat_split_and_flatten_map_channels() -> None:
    model = net(
        """a = Conv(x, w) b = Conv(x, v) c = Concat <axis = 1> (a, b)
           sizes = Constant <value_ints = [2, 5]> () last = Constant <value_ints = [2, 3]> ()
           l, r = Split <axis = 1> (c, sizes) m = Mul(l, l)
           f = Flatten(r) y = MatMul(f, k) z = ReduceSum <keepdims = 0> (m, last)""",
        "float[1,3,2,2] x",
        "float[1,6] y, float[1,2] z",
        w=[4, 3, 1, 1],
        v=[3, 3, 1, 1],
        k=[20, 6],
    )
    view = channels(model)
    assert ties(view, ("a", 1), ("c", 1)) == [("Concat", "c", 0, 1)]
    assert ties(view, ("b", 1), ("c", 1)) == [("Concat", "c", 4, 1)]
    assert ties(view, ("r", 1), ("c", 1)) == [("Split", "c", 2, 1)]
    assert ties(view, ("r", 1), ("f", 1)) == [("Flatten", "f", 0, 4)]
    members, reasons = group(view, "w", 0)
    assert {"a:1", "b:1", "c:1", "r:1", "f:1", "k:0", "v:0", "l:1", "z:1"} <= members
    assert reasons == {"graph output"}
    assert "axis of Flatten" in group(view, "r", 2)[1]


def test_reshape_and_transpose_of_attention_heads() -> None:
    model = net(
        """q = MatMul(x, w) s = Constant <value_ints = [0, 0, 3, 4]> () h = Reshape(q, s)
           t = Transpose <perm = [0, 2, 1, 3]> (h) e = Exp(t)
           u = Transpose <perm = [0, 2, 1, 3]> (e) m = Constant <value_ints = [0, 0, 12]> ()
           o = Reshape(u, m) y = MatMul(o, v)""",
        "float[1,5,8] x",
        "float[1,5,2] y",
        w=[8, 12],
        v=[12, 2],
    )
    view = channels(model)
    members, reasons = group(view, "w", 1)
    assert members == {"w:1", "q:2", "h:2", "t:1", "e:1", "u:2", "o:2", "v:0"}
    assert reasons == set()
    assert ties(view, ("h", 2), ("q", 2)) == [("Reshape", "q", 0, 4)]
    assert group(view, "h", 3)[1] == {"axis of Reshape"}


def test_reshape_of_symbolic_sizes() -> None:
    shape = "s = Constant <value_ints = [-1, 4]> () f = Reshape(a, s) y = MatMul(f, k)"
    model = net(f"a = Conv(x, w) {shape}", "float[N,3,1,1] x", "float[M,2] y", w=[4, 3, 1, 1], k=[4, 2])
    assert {"a:1", "f:1", "k:0"} <= group(channels(model), "w", 0)[0]
    model = net(f"a = Conv(x, w) {shape}", "float[N,3,H,W] x", "float[M,2] y", w=[4, 3, 1, 1], k=[4, 2])
    assert group(channels(model), "w", 0) == ({"w:0", "a:1"}, {"axis of Reshape"})


def test_a_stretched_axis_is_tied_to_nothing_and_a_doubtful_one_is_closed() -> None:
    model = net("a = Conv(x, w) y = Mul(a, k)", "float[1,3,8,8] x", "float[1,4,8,8] y", w=[4, 3, 1, 1], k=[1, 1, 1])
    assert "k:0" not in group(channels(model), "w", 0)[0]
    model = net("y = Add(a, b)", "float[C] a, float[D] b", "float[E] y")
    view = channels(model)
    assert not view.edges
    model = net("g = Exp(a) h = Exp(b) j = Add(g, h) y = Exp(j)", "float[C] a, float[4] b", "float[4] y")
    assert group(channels(model), "h", 0)[1] >= {"graph input"}


def test_normalization_and_quantized_weights() -> None:
    model = net(
        """d = DequantizeLinear <axis = 0> (w, scale) a = Conv(x, d) n = BatchNormalization(a, g, b, m, s)
           t = Transpose <perm = [0, 2, 3, 1]> (n) l = LayerNormalization(t, lg, lb) y = MatMul(l, v)""",
        "float[1,3,8,8] x, int8[4,3,1,1] w",
        "float[1,8,8,2] y",
        scale=[4],
        g=[4],
        b=[4],
        m=[4],
        s=[4],
        lg=[4],
        lb=[4],
        v=[4, 2],
    )
    members, reasons = group(channels(model), "d", 0)
    vectors = {f"{name}:0" for name in ("scale", "w", "d", "g", "b", "m", "s", "lg", "lb", "v")}
    assert members == {*vectors, "a:1", "n:1", "t:3", "l:3"}
    assert reasons == {"graph input"}  # w, here


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("y = CumSum(a, one)", "CumSum"),
        ("y = Softmax <axis = 1> (a)", "axis of Softmax"),
        ("y = ReduceMax <axes = [1]> (a)", "axis of ReduceMax"),
        ("i = Constant <value_ints = [0, 2]> () y = Gather <axis = 1> (a, i)", "axis of Gather"),
        ("y = Slice(a, one, two, one)", "axis of Slice"),
        ("b = Trilu(a) y = Relu(b)", "Trilu"),
    ],
)
def test_what_is_not_carried_closes(body: str, reason: str) -> None:
    constants = "one = Constant <value_ints = [1]> () two = Constant <value_ints = [2]> ()"
    if "CumSum" in body:
        constants = "one = Constant <value_int = 1> ()"
    model = net(f"{constants} a = Conv(x, w) {body}", "float[1,3,2,2] x", "float[A,B,C,D] y", w=[4, 3, 1, 1])
    assert reason in group(channels(model), "w", 0)[1]


def test_a_body_ties_what_it_captures() -> None:
    model = read(
        """net (bool c, float[1,3] x) => (float[1,2] y) <float[3,4] w = {}, float[4,2] v = {}>
        {
            a = MatMul(x, w)
            y = If(c) <
                then_branch = yes () => (float[1,2] t) { r = Relu(a) t = MatMul(r, v) },
                else_branch = no () => (float[1,2] e) { e = MatMul(a, v) }
            >
        }""",
        ("w", [3, 4]),
        ("v", [4, 2]),
    )
    view = channels(model)
    assert group(view, "w", 1) == ({"w:1", "a:1", "r:1", "v:0"}, set())
    assert group(view, "v", 1)[1] == {"graph output"}


def test_the_bundled_cnn() -> None:
    proto = onnx.load(MODELS / "cnn-a-legacy.onnx")
    model = ir.from_proto(onnx.shape_inference.infer_shapes(proto))
    view = channels(model)
    weights = [n.inputs[1] for n in model.graph if n.op_type in ("Conv", "Gemm") and n.inputs[1] is not None]
    closed = [w for w in weights if group(view, str(w.name), 0)[1]]
    assert closed == weights[-1:]  # the classifier, which makes the output
    found = cuts(model.graph)
    assert found[0] is model.graph.inputs[0]
    assert found[-1] is model.graph.outputs[0]
    assert len(found) > 5
