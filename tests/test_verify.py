"""Every invariant is broken by hand once, and what onnx itself ships is clean."""

from __future__ import annotations

import importlib.resources
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from penjing.ir.errors import InvalidModel
from penjing.ir.verify import problems, verify

Parse = Callable[[str], ir.Model]

CHAIN = """g (float[2] x) => (float[2] y) <float[2] w = {1, 2}> {
    [first] a = Add(x, w)
    [second] y = Neg(a)
}"""
BRANCHES = """g (bool c, float[2] x) => (float[2] y) {
    [first] a = Neg(x)
    [choice] v = If (c) <
        then_branch = yes () => (float[2] t) { [inner] t = Abs(a) },
        else_branch = no () => (float[2] e) { [other] e = Exp(a) }
    >
    [last] y = Neg(v)
}"""
LOOP = """g (int64 n, bool c, float[2] x) => (float[2] y) {
    [first] a = Neg(x)
    [loop] y = Loop (n, c, a) <body = b (int64 i, bool go, float[2] s) => (bool on, float[2] t) {
        [keep] on = Identity(go)
        [inner] t = Abs(s)
    }>
}"""
FUNCTION = """<ir_version: 8, opset_import: ["": 17, "local": 1]> g (float[2] x) => (float[2] y) {
    [call] y = local.F<slope = 0.5>(x)
}
<domain: "local", opset_import: ["": 17, "local": 1]> F <slope>(x) => (y) {
    [leaky] t = LeakyRelu<alpha: float = @slope>(x)
    [call] y = local.G(t)
}
<domain: "local", opset_import: ["": 17, "local": 1]> G (x) => (y) { [neg] y = Neg(x) }"""


def body(model: ir.Model, node: str, attribute: str) -> ir.Graph:
    return model.graph.node(node).attributes[attribute].as_graph()


def function(model: ir.Model, name: str) -> ir.Function:
    return model.functions["local", name, ""]


@pytest.mark.parametrize("source", [CHAIN, BRANCHES, LOOP, FUNCTION])
def test_a_valid_model_has_no_problems(parse: Parse, source: str) -> None:
    verify(parse(source))


def test_the_error_names_the_place(parse: Parse) -> None:
    model = parse(CHAIN)
    model.graph.node("second").op_type = ""
    with pytest.raises(InvalidModel, match=r"^What drop left is not a valid model:\n  second: .* no operator type"):
        verify(model, "What drop left")


def test_used_before_defined(parse: Parse) -> None:
    model = parse(CHAIN)
    model.graph.insert_before(model.graph.node("first"), model.graph.node("second"))
    assert problems(model) == [
        "second: input 0 'a' is used before node 'first' defines it: the order is wrong, or there is a cycle."
    ]


def test_cycle(parse: Parse) -> None:
    model = parse(CHAIN)
    model.graph.node("first").replace_input_with(0, model.graph.outputs[0])
    assert problems(model) == [
        "first: input 0 'y' is used before node 'second' defines it: the order is wrong, or there is a cycle."
    ]


def test_a_node_that_feeds_itself(parse: Parse) -> None:
    model = parse(CHAIN)
    model.graph.node("first").replace_input_with(1, model.graph.node("first").outputs[0])
    assert problems(model) == ["first: input 1 'a' is an output of the node itself."]


def test_a_body_that_reads_its_own_holder(parse: Parse) -> None:
    model = parse(BRANCHES)
    body(model, "choice", "then_branch").node("inner").replace_input_with(0, model.graph.node("choice").outputs[0])
    assert problems(model) == [
        "choice/then/inner: input 0 'v' is used before node 'choice' defines it: "
        "the order is wrong, or there is a cycle."
    ]


def test_a_capture_of_a_later_value(parse: Parse) -> None:
    model = parse(BRANCHES)
    model.graph.append(model.graph.node("first"))
    found = problems(model)
    assert found[0].startswith("choice/then/inner: input 0 'a' is used before node 'first' defines it")
    assert found[1].startswith("choice/else/other: input 0 'a' is used before node 'first' defines it")
    assert len(found) == 2


def test_a_value_of_a_sibling_body(parse: Parse) -> None:
    model = parse(BRANCHES)
    inner = body(model, "choice", "then_branch").node("inner")
    body(model, "choice", "else_branch").node("other").replace_input_with(0, inner.outputs[0])
    assert problems(model) == [
        "choice/else/other: input 0 't' is a value of the graph choice/then/, which cannot be seen from here."
    ]


def test_a_value_of_another_model(parse: Parse) -> None:
    model, other = parse(CHAIN), parse(CHAIN)
    model.graph.node("second").replace_input_with(0, other.graph.node("first").outputs[0])
    assert problems(model) == [
        "second: input 0 'a' is a value of a graph of another model, which cannot be seen from here."
    ]


def test_a_function_sees_nothing_of_the_main_graph(parse: Parse) -> None:
    model = parse(FUNCTION)
    function(model, "G").graph.node("neg").replace_input_with(0, model.graph.inputs[0])
    assert problems(model) == [
        "local::G/neg: input 0 'x' is a value of the main graph, which cannot be seen from here."
    ]


def test_a_detached_value(parse: Parse) -> None:
    model = parse(CHAIN)
    model.graph.node("second").replace_input_with(0, ir.val("stray"))
    assert problems(model) == [
        "second: input 0 'stray' is neither the output of a node nor an input or initializer of a graph."
    ]


def test_a_value_of_a_node_in_no_graph(parse: Parse) -> None:
    model = parse(CHAIN)
    loose = ir.node("Abs", [], name="loose")
    loose.outputs[0].name = "l"
    model.graph.node("second").replace_input_with(0, loose.outputs[0])
    assert problems(model) == ["second: input 0 'l' comes from node 'loose', which is in no graph."]


def test_a_graph_held_twice(parse: Parse) -> None:
    model = parse(BRANCHES)
    choice = model.graph.node("choice")
    choice.attributes["else_branch"] = ir.AttrGraph("else_branch", body(model, "choice", "then_branch"))
    assert "choice/else/: this graph is already in the model as choice/then/; give each place a clone." in problems(
        model
    )


def test_a_graph_that_holds_itself(parse: Parse) -> None:
    model = parse(CHAIN)
    model.graph.node("second").attributes["then_branch"] = ir.AttrGraph("then_branch", model.graph)
    assert problems(model) == [
        "second: Neg has no attribute 'then_branch', and so no use for a graph in it.",
        "second/then/: this graph is already in the model as the main graph; give each place a clone.",
    ]


def test_a_node_that_says_it_is_elsewhere(parse: Parse) -> None:
    model = parse(CHAIN)
    model.graph.node("second").graph = parse(CHAIN).graph
    assert problems(model)[0] == "second: the node is listed in this graph but says that it is in another, or in none."


def test_a_graph_output_that_nothing_defines(parse: Parse) -> None:
    model = parse(CHAIN)
    model.graph.outputs.append(ir.val("z"))
    assert problems(model) == ["z: the graph output is not defined by any node, input or initializer of the graph."]


def test_a_body_that_returns_an_outer_value(parse: Parse) -> None:
    model = parse(BRANCHES)
    body(model, "choice", "then_branch").outputs[0] = model.graph.node("first").outputs[0]
    assert problems(model) == [
        "choice/then/a: the graph output is a value of an outer graph; put an Identity in between."
    ]


def test_a_graph_output_without_a_name(parse: Parse) -> None:
    model = parse(CHAIN)
    model.graph.outputs[0].name = ""
    assert problems(model) == ["the main graph: a graph output has no name."]


def test_a_graph_input_without_a_name(parse: Parse) -> None:
    model = parse(CHAIN)
    model.graph.inputs[0].name = ""
    assert problems(model) == ["the main graph: a graph input or initializer has no name."]


def test_a_used_output_without_a_name(parse: Parse) -> None:
    model = parse(CHAIN)
    model.graph.node("first").outputs[0].name = ""
    assert problems(model) == ["first: output 0 has no name but is used."]


def test_an_omitted_output_needs_no_name_but_none_is_none(parse: Parse) -> None:
    model = parse(CHAIN)
    node = ir.node("Dropout", [model.graph.inputs[0]], num_outputs=2, name="drop")
    node.outputs[0].name, node.outputs[1].name = "d", ""
    model.graph.append(node)
    assert problems(model) == []
    node.outputs[1].name = None
    assert problems(model) == ["drop: output 1 has no name; '' stands for an output left out."]


def test_two_values_of_one_name(parse: Parse) -> None:
    model = parse(CHAIN)
    model.graph.node("first").outputs[0].name = "w"
    assert problems(model) == ["w: two values have this name, the later is an output of node 'first'; rename one."]


def test_two_inputs_of_one_name(parse: Parse) -> None:
    model = parse(CHAIN)
    model.graph.inputs.append(ir.val("x"))
    assert problems(model) == ["x: two graph inputs or initializers have this name; rename one."]


def test_a_node_output_that_hides_an_outer_name(parse: Parse) -> None:
    model = parse(BRANCHES)
    body(model, "choice", "then_branch").outputs[0].name = "x"
    assert problems(model) == [
        "choice/then/x: this name is that of a value visible from an outer graph, and of an output of node 'inner'; "
        "rename one."
    ]


def test_a_body_input_may_hide_an_outer_name_that_it_does_not_read(parse: Parse) -> None:
    model = parse(LOOP)
    inner = body(model, "loop", "body")
    inner.inputs[2].name = "a"
    assert problems(model) == []
    inner.node("inner").replace_input_with(0, model.graph.node("first").outputs[0])
    assert problems(model) == [
        "loop/body/inner: input 0 'a' is hidden by an input or initializer of a body with the same name; rename one."
    ]


def test_names_out_of_sight_may_be_taken_again(parse: Parse) -> None:
    model = parse(BRANCHES)
    for branch in ("then_branch", "else_branch"):
        body(model, "choice", branch).outputs[0].name = "v"
    assert problems(model) == []


def test_an_initializer_under_another_key(parse: Parse) -> None:
    model = parse(CHAIN)
    weights = model.graph.initializers
    weights.data["other"] = weights.data.pop("w")
    assert problems(model) == ["other: the initializer of this name calls itself 'w'."]


def test_an_initializer_without_a_tensor(parse: Parse) -> None:
    model = parse(CHAIN)
    model.graph.initializers["w"].const_value = None
    assert problems(model) == ["w: the initializer has no tensor; set its const_value."]


def test_an_initializer_of_another_type_and_shape(parse: Parse) -> None:
    model = parse(CHAIN)
    model.graph.initializers["w"].const_value = ir.tensor(np.zeros(3, np.int64))
    assert problems(model) == [
        "w: the value says FLOAT, its tensor is INT64.",
        "w: the value says shape [2], its tensor has [3].",
    ]


def test_a_symbolic_dimension_fits_any_size(parse: Parse) -> None:
    model = parse(CHAIN)
    model.graph.initializers["w"].shape = ir.Shape(["N"])
    assert problems(model) == []


def test_inputs_and_initializers_made_by_a_node(parse: Parse) -> None:
    model = parse(CHAIN)
    for value in (model.graph.inputs[0], model.graph.initializers["w"]):
        value._producer = model.graph.node("second")
    assert problems(model)[:2] == [
        "x: a graph input cannot be the output of a node.",
        "w: an initializer cannot be the output of a node.",
    ]


def test_an_output_that_names_another_producer(parse: Parse) -> None:
    model = parse(CHAIN)
    model.graph.node("first").outputs[0]._index = 1
    assert problems(model) == ["a: it is output 0 of node 'first', but its own link names another node or place."]


def test_a_use_that_is_not_listed(parse: Parse) -> None:
    model = parse(CHAIN)
    model.graph.node("first").outputs[0]._uses.clear()
    assert problems(model) == ["a: it does not list its use as input 0 of node 'second'."]


def test_a_use_that_is_not_there(parse: Parse) -> None:
    model = parse(CHAIN)
    model.graph.inputs[0]._add_usage(model.graph.node("second"), 0)
    assert problems(model) == ["x: it lists a use as input 0 of node 'second', which reads another value there."]


def test_a_use_by_a_node_in_no_graph(parse: Parse) -> None:
    model = parse(CHAIN)
    ir.node("Abs", [model.graph.inputs[0]], name="loose")
    assert problems(model) == ["x: it lists a use by node 'loose', which is in no graph of the model."]


def test_a_domain_that_is_not_imported(parse: Parse) -> None:
    model = parse(CHAIN)
    model.graph.node("second").domain = "com.microsoft"
    assert problems(model) == [
        "second: the model imports no opset for the domain 'com.microsoft' of com.microsoft::Neg."
    ]
    model = parse(FUNCTION)
    del function(model, "F").opset_imports["local"]
    assert problems(model) == ["local::F/call: the function imports no opset for the domain 'local' of local::G."]


def test_a_call_with_too_many_inputs(parse: Parse) -> None:
    model = parse(FUNCTION)
    call = model.graph.node("call")
    call.resize_inputs(2)
    assert problems(model) == ["call: the call has 2 inputs, the function local::F takes 1."]


def test_recursion(parse: Parse) -> None:
    model = parse(FUNCTION)
    neg = function(model, "G").graph.node("neg")
    neg.domain, neg.op_type = "local", "F"
    assert problems(model) == ["local::F/: a function must not call itself, found local::F -> local::G -> local::F."]


def test_a_function_with_an_initializer(parse: Parse) -> None:
    model = parse(FUNCTION)
    function(model, "G").graph.register_initializer(ir.val("k", const_value=ir.tensor([1.0], name="k")))
    assert problems(model) == ["local::G/: a function cannot hold initializers, found k; use Constant nodes."]


def test_a_function_under_another_key(parse: Parse) -> None:
    model = parse(FUNCTION)
    function(model, "G").name = "H"
    assert "local::H/: the model lists this function as local::G." in problems(model)


def test_a_reference_attribute_outside_a_function(parse: Parse) -> None:
    model = parse(CHAIN)
    model.graph.node("second").attributes.add(ir.RefAttr("alpha", "slope", ir.AttributeType.FLOAT))
    assert problems(model) == ["second: the attribute 'alpha' is '@slope', but in no function."]


def test_names_are_printed_without_control_characters(parse: Parse) -> None:
    model = parse(CHAIN)
    node = model.graph.node("second")
    node.name, node.op_type = "\x1b[31m", ""
    assert problems(model) == ["\\x1b[31m: the node has no operator type."]


def test_deep_nesting() -> None:
    condition, x = ir.val("c", dtype=ir.DataType.BOOL, shape=()), ir.val("x", dtype=ir.DataType.FLOAT, shape=(2,))
    node = ir.node("Neg", [x], name="deepest")
    for level in range(3_000):
        node.outputs[0].name = f"v{level}"
        graph = ir.Graph([], node.outputs, nodes=[node])
        node = ir.node("If", [condition], {"then_branch": graph, "else_branch": other(level)}, name=f"if{level}")
    graph = ir.Graph([condition, x], node.outputs, nodes=[node], opset_imports={"": 17})
    assert problems(ir.Model(graph, ir_version=8)) == []


def other(level: int) -> ir.Graph:
    node = ir.node("Constant", [], {"value_float": 1.0})
    node.outputs[0].name = f"e{level}"
    return ir.Graph([], node.outputs, nodes=[node])


def test_whole_models_of_the_onnx_package_are_clean(caplog: pytest.LogCaptureFixture) -> None:
    data = Path(str(importlib.resources.files("onnx") / "backend/test/data"))
    found = [path for path in sorted(data.rglob("*.onnx")) if "node" not in path.relative_to(data).parts]
    caplog.set_level("ERROR")
    loaded = ((path, ir.load(path)) for path in found)
    bad = {path: broken for path, model in loaded for part in (model, model.clone()) if (broken := problems(part))}
    assert len(found) >= 140
    assert bad == {}
