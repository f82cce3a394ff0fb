"""Pipelines and options as text: what is printed reads back as the same, and mistakes are sentences."""

from __future__ import annotations

import dataclasses
import itertools
import types
import typing
from typing import Any, Literal

import onnx_ir as ir
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from penjing.ir.errors import InvalidModel, UsageError
from penjing.passes.base import Context, Effect, Pass, Selection
from penjing.passes.options import field_types, format_value, keys
from penjing.passes.pipeline import Pipeline
from penjing.passes.registry import all_passes, all_pipelines, register

WORDS = st.text(st.characters(codec="utf-8", exclude_characters="\r"), min_size=1, max_size=12)


def values(annotation: Any) -> st.SearchStrategy[Any]:
    """Values that a field of this type may take."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Literal:
        return st.sampled_from(arguments)
    if origin in (typing.Union, types.UnionType):
        return st.one_of(*map(values, arguments))
    if origin is tuple:
        return st.lists(values(arguments[0]), max_size=3).map(tuple)
    if annotation is Selection:
        return st.lists(WORDS, min_size=1, max_size=3).map(lambda found: Selection(tuple(found)))
    return {
        bool: st.booleans(),
        int: st.integers(0, 1000),
        float: st.floats(0, 1, allow_nan=False),
        str: WORDS | st.sampled_from(["2:4"]),
        type(None): st.none(),
    }[annotation]


def test_every_pass_is_listed_and_documented() -> None:
    assert {"prune-magnitude", "fold-constants", "fold-batchnorm", "strip-metadata"} <= set(all_passes())
    assert all(cls.summary().endswith(".") for cls in all_passes().values())


@pytest.mark.parametrize("name", sorted(all_passes()))
@settings(max_examples=60, suppress_health_check=[HealthCheck.filter_too_much, HealthCheck.too_slow], deadline=None)
@given(data=st.data())
def test_text_round_trips_for_every_pass_with_every_option(name: str, data: st.DataObject) -> None:
    cls = all_passes()[name]
    fields = [item for item in dataclasses.fields(cls) if item.init]
    chosen = data.draw(st.lists(st.sampled_from(fields), unique_by=lambda item: item.name)) if fields else []
    options = {item.name: data.draw(values(field_types(cls)[item.name])) for item in chosen}
    try:
        made = cls(**options)
    except UsageError:
        return
    again = Pipeline.parse(str(made)).parts[0]
    assert again == made
    assert str(again) == str(made)


def test_every_option_of_every_pass_can_be_set_by_text() -> None:
    for name, cls in all_passes().items():
        for item in dataclasses.fields(cls):
            if item.init:
                assert settable(cls, item.name), f"{name}: {item.name}"


def settable(cls: type[Pass], field: str) -> bool:
    """Whether some value of this option, alone or beside one or two others, is accepted and read back from text."""
    kinds = {name: kind for name, kind in field_types(cls).items() if name in keys(cls).values()}
    default = next(item.default for item in dataclasses.fields(cls) if item.name == field)
    others = [name for name in kinds if name != field]
    for count in range(3):
        for beside in itertools.combinations(others, count):
            for chosen in itertools.product(*(samples(kinds[name]) for name in (field, *beside))):
                try:
                    made = cls(**dict(zip((field, *beside), chosen, strict=True)))
                except UsageError:
                    continue
                if chosen[0] != default and Pipeline.parse(str(made)).parts[0] == made:
                    return True
    return False


def samples(annotation: Any) -> list[Any]:
    """A few values of a type, among them every word of a Literal."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Literal:
        return list(arguments)
    if origin in (typing.Union, types.UnionType):
        return [value for argument in arguments for value in samples(argument)]
    if origin is tuple:
        each = samples(arguments[0])
        return [tuple(each), *((one,) for one in each)]
    if annotation is Selection:
        return [Selection(("*",))]
    found: list[Any] = {
        bool: [True, False],
        int: [1, 2],
        float: [0.5, 0.25],
        str: ["2:4", "word", "logits"],
        type(None): [],
    }[annotation]
    return found


def test_named_pipelines_print_as_their_names_and_expand() -> None:
    for name, steps in all_pipelines().items():
        pipeline = Pipeline.parse(f"{name},{name}")
        assert str(pipeline) == f"{name},{name}"
        assert Pipeline.parse(name).parts[0].expanded() == str(Pipeline.parse(steps))  # type: ignore[union-attr]
        assert {group for _, group in pipeline.steps()} == {name}


def test_printing_is_canonical() -> None:
    text = " prune-magnitude { scope=model   sparsity=.5 granularity=element only='op:Conv' } , clean "
    assert str(Pipeline.parse(text)) == "prune-magnitude{sparsity=0.5 scope=model only=op:Conv},clean"


@given(WORDS)
def test_any_text_survives_quoting(word: str) -> None:
    from penjing.passes.options import read_options

    register_probe()
    text = f"probe{{only={format_value((word,))}}}"
    assert Pipeline.parse(text).parts[0] == all_passes()["probe"](only=Selection((word,)))
    assert read_options(all_passes()["probe"], "probe", {"only": (word,)})


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("prune-magnitud{sparsity=0.5}", "no pass 'prune-magnitud'. Did you mean 'prune-magnitude'?"),
        ("prune-magnitude{sparsty=0.5}", "no option 'sparsty'. Did you mean 'sparsity'?"),
        ("prune-magnitude{sparsity=much}", "sparsity=much is not valid; it takes a number"),
        ("prune-magnitude{sparsity=0.5 scope=world}", "scope=world is not valid; it takes tensor or model"),
        ("prune-magnitude{sparsity=0.5", "expected an option or '}', found the end"),
        ("prune-magnitude{sparsity}", "expected '=' after 'sparsity', found '}'"),
        ("prune-magnitude{sparsity=0.5 sparsity=0.6}", "given twice"),
        ("clean,,clean", "expected the name of a pass, found ','"),
        ("clean clean", "expected ',' or the end"),
        ("clean{deep=true}", "The pipeline 'clean' takes no options"),
        ("", "expected the name of a pass, found the end"),
    ],
)
def test_mistakes_are_sentences(text: str, sentence: str) -> None:
    with pytest.raises(UsageError) as caught:
        Pipeline.parse(text)
    assert sentence in str(caught.value)


def test_selection_by_glob_operator_and_node(parse: Any) -> None:
    model = parse("m (float[1,2] x) => (float[1,2] y) <float[2,2] w = {1,2,3,4}> { [dense] y = MatMul (x, w) }")
    node = model.graph[0]
    assert node in Selection(("op:Mat*",))
    assert node in Selection(("node:den*",))
    assert node not in Selection(("op:Conv", "w*"))
    Selection(("w", "dense", "op:MatMul")).require_matches(model, "only")
    with pytest.raises(UsageError, match="keep=op:Matmul matches no weight and no node of the model"):
        Selection(("op:Matmul",)).require_matches(model, "keep")


def register_probe() -> None:
    @register("probe")
    class Probe(Pass):
        """A pass of this test's, which does nothing."""

        only: Selection = Selection()

        def run(self, model: ir.Model, ctx: Context) -> None:
            del model
            ctx.skip("model", "a probe does nothing")


def test_names_in_options_that_match_nothing_stop_the_pipeline(parse: Any) -> None:
    register_probe()
    model = parse("m (float[2] x) => (float[2] y) { y = Relu (x) }")
    with pytest.raises(UsageError, match="probe: only=Relo matches no weight and no node"):
        Pipeline.parse("probe{only=Relo}").run(model)


def test_the_verifier_runs_after_every_pass(parse: Any) -> None:
    class Breaks(Pass):
        """Leaves a value that nothing defines."""

        name = "breaks"

        def run(self, model: ir.Model, ctx: Context) -> None:
            del ctx
            model.graph[0].replace_input_with(0, ir.Value(name="nowhere"))

    model = parse("m (float[2] x) => (float[2] y) { y = Relu (x) }")
    with pytest.raises(InvalidModel, match=r"What breaks \(step 1\) left is not a valid model"):
        Pipeline((Breaks(),)).run(model)


def test_a_pass_runs_in_the_pass_manager_of_onnx_ir(parse: Any) -> None:
    register_probe()
    model = parse("m (float[2] x) => (float[2] y) { y = Relu (x) }")
    result = ir.passes.PassManager([all_passes()["probe"]()])(model)
    assert result.model is model
    assert not result.modified
    assert all_passes()["probe"]().effect() is Effect.SAME
