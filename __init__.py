"""penjing: checked, explained compiler passes that make trained ONNX models fit to deploy.

import penjing
model = penjing.load("model.onnx")
report = penjing.run(model, "clean,prune-magnitude{sparsity=0.5}")
penjing.save(model, "small.onnx")
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from .ir.errors import PenjingError as PenjingError
    from .ir.files import save as save
    from .ir.match import rule as rule
    from .passes.base import Context as Context
    from .passes.base import Effect as Effect
    from .passes.base import Pass as Pass
    from .passes.base import Selection as Selection
    from .passes.interop import register_onnx_ir as register_onnx_ir
    from .passes.interop import register_surgeon as register_surgeon
    from .passes.pipeline import Pipeline as Pipeline
    from .passes.registry import register as register
    from .runtime.run import BoundExceeded as BoundExceeded
    from .runtime.run import run as run
    from .runtime.session import load as load

_HOMES = {
    "BoundExceeded": "runtime.run",
    "Context": "passes.base",
    "Effect": "passes.base",
    "Pass": "passes.base",
    "PenjingError": "ir.errors",
    "Pipeline": "passes.pipeline",
    "Selection": "passes.base",
    "load": "runtime.session",
    "register": "passes.registry",
    "register_onnx_ir": "passes.interop",
    "register_surgeon": "passes.interop",
    "rule": "ir.match",
    "run": "runtime.run",
    "save": "ir.files",
}

__all__ = [*_HOMES]


def __getattr__(name: str) -> Any:
    """Names of the package's face, found in their rooms when first asked for, so that ``import penjing`` is quick."""
    from importlib import import_module

    if name not in _HOMES:
        raise AttributeError(f"module 'penjing' has no attribute '{name}'")
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)


def __dir__() -> list[str]:
    return [*globals(), *_HOMES]
