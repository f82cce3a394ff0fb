"""ONNX's own test models merged with one another: a part of ``reliability/pairs.py``, and its nine architectures."""

from __future__ import annotations

import zlib

import numpy as np
import onnx_ir as ir
from merging import merged
from reliability.cases import node_cases, whole_models
from reliability.pairs import chains, loaded, tried

from penjing.ir.errors import PenjingError
from penjing.ir.verify import problems
from penjing.passes.base import Context
from penjing.passes.pipeline import Pipeline
from penjing.runtime.session import OrtRunner


def test_pairs_of_one_node() -> None:
    models = loaded(node_cases(every=40))
    pairs = list(chains(models))
    assert len(pairs) > 15
    for text in ("merge-sequence{with=b}", "ensemble{with=b}"):
        counts, faults = tried(text, iter(pairs))
        assert faults == []
        assert counts["valid"] > 8, counts
    assert counts["refused"] < len(pairs) / 2
    counts, faults = tried("merge-parallel{with=b}", ((one, two) for one in models[:4] for two in models))
    assert (dict(counts), faults) == ({"valid": 4 * len(models)}, [])


def test_pairs_give_what_the_two_give_in_turn() -> None:
    """Those of a hash that run by themselves, on the inputs that come with the first."""
    models = [(case, model) for case, model in loaded(node_cases(every=40)) if runs(model, case.feeds)]
    proven = 0
    for (case, one), (_, two) in chains(models):
        if zlib.crc32(case.name.encode()) % 3 == 0:
            try:
                merged(one.clone(), "merge-sequence{with=b}", case.feeds, b=two)
                proven += 1
            except PenjingError as error:
                assert "does not take what it is fed" in str(error)  # noqa: PT017
    assert proven >= 3


def runs(model: ir.Model, feeds: list[dict[str, np.ndarray]]) -> bool:  # type: ignore[type-arg]
    try:
        list(OrtRunner().run(model, feeds))
    except Exception:
        return False
    return bool(feeds)


HEAD = '<ir_version: 8, opset_import: ["": 17]> '
MAKES = "m (float[M,150528] flat) => (float[M,3,224,224] i) <int64[4] s = {-1, 3, 224, 224}> { i = Reshape(flat, s) }"
READS = "r (float[M,1000] p) => (float[M,1000] q) { q = Neg(p) }"


def test_real_architectures_in_pairs() -> None:
    """Their weights are stubs, so that not all of them run: the graphs have to be valid, and hold what both held."""
    models = [ir.from_proto(case.model) for case in whole_models() if case.name.startswith("light/")]
    assert len(models) == 9
    makes, reads = ir.from_onnx_text(HEAD + MAKES), ir.from_onnx_text(HEAD + READS)
    for number, model in enumerate(models):
        (image,) = [value for value in model.graph.inputs if not value.is_initializer()]
        row = makes.clone()
        context = Context(models={"b": model, "c": reads})
        (entry,) = Pipeline.parse("merge-sequence{with=(b, c) adapt=reshape}").run(row, context)
        assert problems(row) == []
        assert [str(value.shape) for value in row.graph.inputs] == ["[1,150528]"]
        assert [str(value.shape) for value in row.graph.outputs] == ["[1,1000]"]
        weights = len(model.graph.inputs) - 1
        assert ("b", f"its {weights:,} weights are no inputs any more; IR version 3 had to list them") in [
            (change.subject, change.what) for change in entry.ledger.changes
        ]
        for other in (model, models[number - 1]):
            pair = model.clone()
            Pipeline.parse("merge-parallel{with=b inputs=share}").run(pair, Context(models={"b": other}))
            assert problems(pair) == []
            assert [value.name for value in pair.graph.inputs] == [image.name]
            assert len(pair.graph.outputs) == 2
            if other is model:
                assert len(pair.graph) == len(model.graph) + 1  # a copy of the output
