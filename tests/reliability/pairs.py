"""ONNX's own test models in pairs: chained where the outputs of one fit the inputs of the other, and side by side.

``python -m tests.reliability.pairs --every 10`` tries all pairs among a part of the models of one node; prints counts,
and the pairs that are faulty: what is neither a valid model nor refused with a sentence. Exits 1 where there are any.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Iterator, Sequence

import onnx_ir as ir

from penjing.ir.errors import PenjingError
from penjing.ir.shapes import dims
from penjing.ir.unify import unlike_types
from penjing.ir.verify import problems
from penjing.passes.base import Context
from penjing.passes.pipeline import Pipeline

from .cases import Case, node_cases

Loaded = tuple[Case, ir.Model]


def loaded(cases: Sequence[Case]) -> list[Loaded]:
    """Each case with its model; without those that penjing takes not at all."""
    found = []
    for case in cases:
        try:
            found.append((case, ir.from_proto(case.model)))
        except Exception:
            continue
    return [(case, model) for case, model in found if problems(model) == []]


def chains(models: Sequence[Loaded]) -> Iterator[tuple[Loaded, Loaded]]:
    """Pairs in which the outputs of the first, in order, have the types and shapes that the second takes."""
    for one in models:
        for two in models:
            taken = [value for value in two[1].graph.inputs if not value.is_initializer()]
            given = list(one[1].graph.outputs)
            if taken and len(given) >= len(taken) and all(map(_fits, given, taken)):
                yield one, two


def _fits(given: ir.Value, taken: ir.Value) -> bool:
    one, two = dims(given), dims(taken)
    if given.type is None or taken.type is None or unlike_types(given.type, taken.type) or one is None or two is None:
        return False
    pairs = zip(one, two, strict=False)
    return len(one) == len(two) and all(a == b or not (isinstance(a, int) and isinstance(b, int)) for a, b in pairs)


def outcome(text: str, one: Loaded, two: Loaded) -> str:
    """``valid``, ``refused: ...``, or what is wrong with the merge."""
    model, partner = one[1].clone(), two[1].clone()
    try:
        Pipeline.parse(text).run(model, Context(models={"b": partner}))
    except PenjingError as error:
        return f"refused: {error}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    found = problems(model)
    return f"not valid: {found[0]}" if found else "valid"


def tried(text: str, pairs: Iterator[tuple[Loaded, Loaded]]) -> tuple[Counter[str], list[str]]:
    """How many were valid and refused, and the faults."""
    counts: Counter[str] = Counter()
    faults: list[str] = []
    for one, two in pairs:
        found = outcome(text, one, two)
        counts[found.partition(":")[0]] += 1
        if not found.startswith(("valid", "refused")):
            faults.append(f"{one[0].name} and {two[0].name}: {found}")
    return counts, faults


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--every", type=int, default=10)
    models = loaded(node_cases(every=parser.parse_args().every))
    print(f"{len(models):,} models of one node")
    bad: list[str] = []
    for text, pairs in {
        "merge-sequence{with=b}": chains(models),
        "merge-parallel{with=b}": ((one, two) for one in models for two in models[:40]),
        "ensemble{with=b}": chains(models),
    }.items():
        counts, faults = tried(text, pairs)
        bad += faults
        print(f"{text}: {', '.join(f'{count:,} {word}' for word, count in counts.items())}", flush=True)
    print("\n".join(bad[:50]) or "No faults.")
    sys.exit(bool(bad))


if __name__ == "__main__":
    main()
