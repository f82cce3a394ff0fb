"""What a pass does, without reading Python: each file in ``golden/`` is a pipeline, a model, and the model after it.

Models given are in ONNX's textual syntax, that after it in penjing's; ``pytest --update-golden`` rewrites that. Between
stand partners, each after a line ``with NAME``.
"""

from pathlib import Path

import onnx_ir as ir
import pytest

from penjing.ir.text import text
from penjing.passes.base import Context
from penjing.passes.pipeline import Pipeline

FILES = sorted(Path(__file__).parent.joinpath("golden").glob("*.txt"))
RULE = "\n----\n"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_golden(path: Path, request: pytest.FixtureRequest) -> None:
    *given, expected = path.read_text(encoding="utf-8").split(RULE)
    pipeline, before, *others = given
    model = ir.from_onnx_text(before)
    partners = [other.removeprefix("with ").split("\n", 1) for other in others]
    context = Context(models={name: ir.from_onnx_text(body) for name, body in partners})
    Pipeline.parse(pipeline).run(model, context)
    found = text(model)
    if request.config.getoption("--update-golden"):
        path.write_text(RULE.join([*given, found]), encoding="utf-8")
        expected = found
    assert found == expected


def test_there_are_golden_files() -> None:
    assert len(FILES) >= 8
