"""What the tests share: small models written as text, and the switch that rewrites golden files."""

from __future__ import annotations

import signal
from collections.abc import Callable

import onnx_ir as ir
import pytest

HEADER = '<ir_version: 8, opset_import: ["": 17]>\n'


def pytest_configure() -> None:
    """A shell starts what runs in the background with Ctrl-C ignored, and so would every process of a test."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="rewrite the expected texts in tests/golden")


@pytest.fixture
def parse() -> Callable[[str], ir.Model]:
    """A model from ONNX's textual syntax, with opset 17 and IR version 8 where the text has no header."""

    def from_text(text: str) -> ir.Model:
        return ir.from_onnx_text(text if text.lstrip().startswith("<") else HEADER + text)

    return from_text
