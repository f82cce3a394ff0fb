"""Weights with what sample data say of the inputs that they meet."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import onnx_ir as ir

from ...ir.weights import Weight
from ..base import Context
from ..feeds import Some
from .energy import energies
from .outputs import outputs
from .parts import Source

_RUNS = 256  # of the data, that tell how inputs occur together
_ENERGIES = 32  # that tell their energies, where only some weights ask for them


def weighed_by_energy(model: ir.Model, chosen: Sequence[Weight], ctx: Context) -> tuple[dict[Weight, Source], Reasons]:
    """What ``chosen`` hold, with the energies of their inputs; for those where they are not known, why."""
    sources, reasons = {weight: Source(weight.tensor) for weight in chosen}, dict[Weight, str]()
    for weight, found in energies(model, chosen, ctx).items():
        if isinstance(found, str):
            reasons[weight] = f"its elements weigh the same: {found}"
        else:
            sources[weight] = replace(sources[weight], energy=found)
    return sources, reasons


def weighed_by_outputs(model: ir.Model, chosen: Sequence[Weight], ctx: Context) -> tuple[dict[Weight, Source], Reasons]:
    """What ``chosen`` hold, with what their layers compute; with energies where that is unknown, and why it is."""
    sources, reasons = {weight: Source(weight.tensor) for weight in chosen}, dict[Weight, str]()
    for weight, found in outputs(model, chosen, ctx, Some(ctx.data, _RUNS)).items():
        if isinstance(found, str):
            reasons[weight] = f"it takes the nearest values: {found}"
        else:
            sources[weight] = Source.read_for(weight.tensor, found)
    for weight, energy in energies(model, list(reasons), ctx, Some(ctx.data, _ENERGIES)).items():
        if not isinstance(energy, str):
            sources[weight] = replace(sources[weight], energy=energy)
    return sources, reasons


Reasons = dict[Weight, str]
