"""What a pass does, without reading Python: each file in ``golden/`` is a pipeline, a model, and the model after it.

The first model is in ONNX's textual syntax, the second in penjing's; ``pytest --update-golden`` rewrites the second.
"""

from pathlib import Path

import onnx_ir as ir
import pytest

from penjing.ir.text import text
from penjing.passes.pipeline import Pipeline

FILES = sorted(Path(__file__).parent.joinpath("golden").glob("*.txt"))
RULE = "\n----\n"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_golden(path: Path, request: pytest.FixtureRequest) -> None:
    pipeline, before, expected = path.read_text(encoding="utf-8").split(RULE)
    model = ir.from_onnx_text(before)
    Pipeline.parse(pipeline).run(model)
    found = text(model)
    if request.config.getoption("--update-golden"):
        path.write_text(RULE.join([pipeline, before, found]), encoding="utf-8")
        expected = found
    assert found == expected


def test_there_are_golden_files() -> None:
    assert len(FILES) >= 8
