"""Each move leaves a valid model, bodies included, and the interface as it was."""

from __future__ import annotations

from collections.abc import Callable

import onnx_ir as ir
import pytest

from penjing.ir import edit
from penjing.ir.address import graphs
from penjing.ir.edit import Names, drop, fresh_name, insert_after, insert_before, prefix, rename, replace_uses
from penjing.ir.errors import UsageError
from penjing.ir.text import text
from penjing.ir.verify import verify

Parse = Callable[[str], ir.Model]

CHAIN = """g (float[2] x) => (float[2] y) <float[2] w = {1, 2}> {
    [first] a = Add(x, w)
    [second] y = Neg(a)
}"""
BRANCHES = """g (bool c, float[2] x) => (float[2] y) {
    [first] a = Neg(x)
    [choice] y = If (c) <
        then_branch = yes () => (float[2] t) { [inner] t = Abs(a) },
        else_branch = no () => (float[2] e) { [other] e = Exp(a) }
    >
}"""


def node(model: ir.Model, name: str) -> ir.Node:
    return next(node for _, graph in graphs(model) for node in graph if node.name == name)


def value(model: ir.Model, name: str) -> ir.Value:
    found = [*model.graph.inputs, *model.graph.initializers.values()]
    found += (value for _, graph in graphs(model) for node in graph for value in node.outputs)
    return next(value for value in found if value.name == name)


def lines(model: ir.Model) -> list[str]:
    """The nodes of the model without their names."""
    verify(model)
    return [line.split("#")[0].strip() for line in text(model).splitlines()[2:]]


def test_fresh_names_avoid_every_scope(parse: Parse) -> None:
    model = parse(BRANCHES)
    assert edit.scope_names(model) == {"c", "x", "a", "t", "e", "y"}
    names = Names(model)
    assert [names.fresh("new"), names.fresh("new"), names.fresh("t"), names.fresh("inner")] == [
        "new",
        "new_1",
        "t_1",
        "inner_1",
    ]
    assert "new" in names
    assert fresh_name(model, "new") == "new"
    assert fresh_name(names, "new") == "new_2"


def test_many_fresh_names_of_one_stem_are_cheap(parse: Parse) -> None:
    names = Names(parse(CHAIN))
    made = [names.fresh("a") for _ in range(20_000)]
    assert made[-1] == "a_20000"
    assert len(set(made)) == 20_000


def test_insert_before(parse: Parse) -> None:
    model = parse(CHAIN)
    made = ir.node("Abs", [value(model, "a")])
    insert_before(node(model, "second"), made, Names(model))
    assert lines(model) == [
        "%w: float32[2] = [1.0, 2.0]",
        "%a = Add(%x, %w)",
        "%second_Abs_1 = Abs(%a)",
        "%y = Neg(%a)",
    ]
    assert made.name == "second_Abs"


def test_insert_after_a_node_output_reaches_into_bodies(parse: Parse) -> None:
    model = parse(BRANCHES)
    new = insert_after(value(model, "a"), ir.node("Abs", [value(model, "a")], name="abs"), Names(model))
    assert new.name == "a_Abs"
    assert [line for line in lines(model) if "a_Abs" in line] == [
        "%a_Abs = Abs(%a)",
        "%t = Abs(%a_Abs)",
        "%e = Exp(%a_Abs)",
    ]


def test_insert_several_after_a_graph_output(parse: Parse) -> None:
    model = parse(CHAIN)
    old = value(model, "y")
    first = ir.node("Abs", [old])
    new = insert_after(old, [first, ir.node("Add", [first.outputs[0], old])], Names(model))
    assert lines(model)[1:] == [
        "%a = Add(%x, %w)",
        "%y_Add_1: float32[2] = Neg(%a)",
        "%y_Abs_1 = Abs(%y_Add_1)",
        "%y = Add(%y_Abs_1, %y_Add_1)",
    ]
    assert model.graph.outputs[0] is new
    assert (str(new.type), str(new.shape)) == ("FLOAT", "[2]")


@pytest.mark.parametrize("name", ["x", "w"])
def test_insert_after_an_input_or_initializer(parse: Parse, name: str) -> None:
    model = parse(CHAIN)
    insert_after(value(model, name), ir.node("Abs", [value(model, name)]), Names(model))
    reads = {"x": "%a = Add(%x_Abs_1, %w)", "w": "%a = Add(%x, %w_Abs_1)"}[name]
    assert lines(model)[1:3] == [f"%{name}_Abs_1 = Abs(%{name})", reads]


def test_insert_a_node_with_bodies_that_read_the_value(parse: Parse) -> None:
    model = parse("g (bool c, float[2] x) => (float[2] y) { a = Neg(x) y = Neg(a) }")
    a = value(model, "a")
    branches = {}
    for word in ("then", "else"):
        inner = ir.node("Abs", [a], name=word)
        inner.outputs[0].name = f"{word}_out"
        branches[f"{word}_branch"] = ir.Graph([], inner.outputs, nodes=[inner])
    insert_after(a, ir.node("If", [value(model, "c")], branches), Names(model))
    assert [line for line in lines(model) if "=" in line] == [
        "%a = Neg(%x)",
        "%a_If_1 = If(%c)",
        "%then_out = Abs(%a)",
        "%else_out = Abs(%a)",
        "%y = Neg(%a_If_1)",
    ]


def test_insert_after_a_value_in_no_graph(parse: Parse) -> None:
    with pytest.raises(UsageError, match="'loose' is in no graph"):
        insert_after(ir.val("loose"), ir.node("Abs", []), Names(parse(CHAIN)))


def test_replace_uses_moves_the_output_with_its_name(parse: Parse) -> None:
    model = parse(CHAIN)
    made = ir.node("Abs", [value(model, "a")])
    insert_before(node(model, "second"), made, Names(model))
    made.outputs[0].shape = ir.Shape([2])
    model.graph.outputs[0].shape = ir.Shape(["N"])
    old = value(model, "y")
    replace_uses(old, made.outputs[0], Names(model))
    assert model.graph.outputs[0] is made.outputs[0]
    assert text(model).splitlines()[1] == "graph g(%x: float32[2]) -> (%y: float32[N])"
    drop(node(model, "second"))
    assert lines(model)[1:] == ["%a = Add(%x, %w)", "%y = Abs(%a)"]
    assert old.name == "second_Abs_1"


def test_replace_uses_keeps_a_type_that_is_known_and_other(parse: Parse) -> None:
    model = parse(CHAIN)
    made = ir.node("Cast", [value(model, "a")], {"to": ir.DataType.FLOAT16})
    insert_before(node(model, "second"), made, Names(model))
    made.outputs[0].dtype = ir.DataType.FLOAT16
    replace_uses(value(model, "y"), made.outputs[0], Names(model))
    assert text(model).splitlines()[1] == "graph g(%x: float32[2]) -> (%y: float16[...])"


@pytest.mark.parametrize("name", ["x", "w"])
def test_replace_an_output_by_what_cannot_take_its_name(parse: Parse, name: str) -> None:
    model = parse(CHAIN)
    replace_uses(value(model, "y"), value(model, name), Names(model))
    drop(node(model, "second"))
    assert lines(model)[1:] == ["%a = Add(%x, %w)", f"%y = Identity(%{name})"]
    assert text(model).splitlines()[1] == "graph g(%x: float32[2]) -> (%y: float32[2])"


def test_replace_an_output_by_another_output(parse: Parse) -> None:
    model = parse("g (float[2] x) => (float[2] y, float[2] z) { [one] y = Neg(x) [two] z = Neg(x) }")
    replace_uses(value(model, "z"), value(model, "y"), Names(model))
    drop(node(model, "two"))
    assert lines(model) == ["%y = Neg(%x)", "%z = Identity(%y)"]
    assert [output.name for output in model.graph.outputs] == ["y", "z"]


def test_replace_the_output_of_a_body_by_an_outer_value(parse: Parse) -> None:
    model = parse(BRANCHES)
    replace_uses(value(model, "t"), value(model, "a"), Names(model))
    drop(node(model, "inner"))
    assert "%t = Identity(%a)" in lines(model)


def test_replace_uses_in_bodies(parse: Parse) -> None:
    model = parse(BRANCHES)
    replace_uses(value(model, "a"), value(model, "x"), Names(model))
    drop(node(model, "first"))
    assert {"%t = Abs(%x)", "%e = Exp(%x)"} < set(lines(model))


def test_replace_uses_leaves_some_and_itself(parse: Parse) -> None:
    model = parse(CHAIN)
    replace_uses(value(model, "a"), value(model, "x"), Names(model), but=[node(model, "second")])
    replace_uses(value(model, "a"), value(model, "a"), Names(model))
    assert lines(model)[-1] == "%y = Neg(%a)"


def test_an_output_that_is_an_input_cannot_be_replaced(parse: Parse) -> None:
    model = parse("g (float[2] x) => (float[2] x, float[2] y) { y = Neg(x) }")
    with pytest.raises(UsageError, match="'x' is input and output of a graph"):
        replace_uses(value(model, "x"), value(model, "y"), Names(model))


def test_drop_takes_bodies_along(parse: Parse) -> None:
    model = parse(BRANCHES)
    replace_uses(value(model, "y"), value(model, "a"), Names(model))
    drop(node(model, "choice"))
    assert lines(model) == ["%y = Neg(%x)"]
    assert value(model, "y").uses() == ()


def test_drop_refuses_what_is_used(parse: Parse) -> None:
    model = parse(CHAIN)
    for name in ("first", "second"):
        with pytest.raises(ValueError, match="still"):
            drop(node(model, name))
    loose = ir.node("Abs", [], name="loose")
    with pytest.raises(UsageError, match="The node 'loose' is in no graph"):
        drop(loose)
    assert len(lines(model)) == 3


def test_rename(parse: Parse) -> None:
    model = parse(CHAIN)
    names = Names(model)
    rename(value(model, "w"), "weight", names)
    rename(value(model, "a"), "w", names)
    rename(value(model, "w"), "w", names)
    assert lines(model) == ["%weight: float32[2] = [1.0, 2.0]", "%w = Add(%x, %weight)", "%y = Neg(%w)"]


def test_rename_names_the_clash(parse: Parse) -> None:
    model = parse(BRANCHES)
    with pytest.raises(UsageError) as caught:
        rename(value(model, "a"), "t", Names(model))
    assert str(caught.value) == (
        "The value 'a' cannot be renamed to 't': the name is taken, of 'choice/then/t'. "
        "Choose another, for example 't_1'."
    )
    with pytest.raises(UsageError, match="'a' cannot have an empty name"):
        rename(value(model, "a"), "", Names(model))


def test_prefix(parse: Parse) -> None:
    model = parse(
        "g (float[2] b) => (float[2] y) <float[2] a = {1, 2}, float[2] aa = {3, 4}> { [n] y = Sum(a, aa, b) }"
    )
    prefix(model, "a")
    assert lines(model) == [
        "%aa: float32[2] = [1.0, 2.0]",
        "%aaa: float32[2] = [3.0, 4.0]",
        "%ay = Sum(%aa, %aaa, %ab)",
    ]
    assert model.graph[0].name == "an"


def test_prefix_reaches_bodies_and_functions(parse: Parse) -> None:
    model = parse(BRANCHES)
    prefix(model, "p/")
    assert edit.scope_names(model) == {"p/c", "p/x", "p/a", "p/t", "p/e", "p/y"}
    assert "%p/t = Abs(%p/a)" in lines(model)
    model = parse(
        """<ir_version: 8, opset_import: ["": 17, "local": 1]> g (float[2] x) => (float[2] y) { y = local.F(x) }
        <domain: "local", opset_import: ["": 17]> F (x) => (y) { y = Neg(x) }"""
    )
    prefix(model, "p.")
    assert lines(model)[-1] == "%p.y = Neg(%p.x)"


def test_become(parse: Parse) -> None:
    model, other = parse(CHAIN), parse(BRANCHES)
    model.meta["penjing.path"], model.metadata_props["old"] = "/here", "gone"
    other.metadata_props["new"], other.producer_name = "there", "someone"
    expected = text(other)
    edit.become(model, other)
    assert text(model) == expected
    assert model.meta["penjing.path"] == "/here"
