"""Weight sharing: each weight takes one of few values, found by k-means."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, NoReturn

import onnx_ir as ir

from ...ir.errors import UsageError
from ...ir.ops import Kind
from ...ir.references import is_annotated
from ...ir.sparse import SparseTensor
from ...ir.storage import LARGE, distinct
from ...ir.weights import Weight, weights
from ..base import Context, Effect, Pass, register
from ..selection import NOTHING, Selection, left_out
from .allocation import allocate
from .clustering import Codebook, NotFinite
from .grid import BINS
from .measured import weighed_by_energy, weighed_by_outputs
from .parts import Outcome, Source, codebook, grouped, shared, shared_by_group, tell, together

FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.DOUBLE)
NOT_FINITE = "holds NaN or infinity"


@register("share-weights")
class ShareWeights(Pass):
    """Let each weight of a layer, and each element of an embedding, take one of few shared values.

    ``bits=4`` or ``values=16`` says how many values there are: at most 2^bits, or exactly so many; without either it is
    16. They are the best ones in least squares: k-means solved exactly, not from random starts. Zeros stay zero, for 0
    is then one of the values. The file gets smaller only once ``pack-weights`` stores the values and indices.

    ``scope=tensor`` gives each weight values of its own, ``channel-group`` each ``group`` of its output channels,
    ``layer-kind`` all weights that one type of operator uses together, ``model`` all together.
    ``weighting=activations`` weighs the error of each weight by the energy (mean square) of the input channel that it
    meets in the sample data, so that the outputs of the layer change less. ``weighting=outputs`` goes further: of
    inputs that occur together the error of one weight is carried on to the next ones (GPTQ: Frantar et al. 2022, arXiv
    2210.17323), so that not each weight but the outputs of the layer stay nearest. It is the slowest, and by far the
    best where there are few values. 64 places in each of 256 runs of the data count. Weights of other layers than Conv,
    Gemm and MatMul, of more than 4,608 inputs or 128 MiB, and those whose moments would not fit into 512 MiB with the
    others', take the nearest.

    ``bits=auto`` chooses 2 to 256 values, or leaves them all, for each weight, such that the model becomes as small as
    it can within the bounds of the run (``--max-drop``, ``--min-sqnr``, ``--max-error``); without one, within an SQNR
    of 20 dB of each float output. It measures what each weight does to the outputs on the sample data, and keeps
    something in hand for other data. Where there are data it weighs by ``outputs``, whatever ``weighting`` says.

    The ledger tells for each weight its values, the signal-to-noise ratio in dB (none where it is exact), with
    ``weighting=outputs`` that of its layer's outputs, and the entropy in bits a weight. Biases,
    normalizations, scales, shapes and integers are left alone.
    """

    bits: int | Literal["auto"] | None = None
    values: int | None = None
    scope: Literal["tensor", "channel-group", "layer-kind", "model"] = "tensor"
    group: int = 16
    weighting: Literal["none", "activations", "outputs"] = "none"
    only: Selection = NOTHING
    keep: Selection = NOTHING

    def effect(self) -> Effect:
        return Effect.LOSSY

    def validate(self) -> None:
        if self.bits is not None and self.values is not None:
            _refuse("bits and values exclude each other; give one.")
        if isinstance(self.bits, int) and not 1 <= self.bits <= 16:
            _refuse(f"bits={self.bits} is out of range; it is 1 to 16, or auto.")
        if self.values is not None and not 2 <= self.values <= BINS:
            _refuse(f"values={self.values} is out of range; it is 2 to {BINS}.")
        if self.group < 1:
            _refuse(f"group={self.group} is out of range; it is 1 channel or more.")
        if self.bits == "auto" and self.scope != "tensor":
            _refuse("bits=auto chooses for each tensor; leave scope out.")

    def run(self, model: ir.Model, ctx: Context) -> None:
        """Raises ``NeedsData`` where the options need sample data and there are none."""
        sources = self._sources(model, self._choose(model, ctx), ctx)
        if self.bits == "auto":
            allocate(model, sources, str(self), ctx)
        elif self.scope == "tensor":
            for weight in sources:
                self._together([weight], sources, ctx)
        elif self.scope == "channel-group":
            for weight, source in sources.items():
                self._by_group(weight, source, ctx)
        elif self.scope == "model":
            self._together(list(sources), sources, ctx)
        else:
            kinds: dict[str, list[Weight]] = {}
            for weight in sources:
                kinds.setdefault(weight.uses[0].node.op_type, []).append(weight)
            for some in kinds.values():
                self._together(some, sources, ctx)

    @property
    def _clusters(self) -> int:
        return self.values or 2 ** (self.bits if isinstance(self.bits, int) else 4)

    # Which ------------------------------------------------------------------------------------------------------------

    def _choose(self, model: ir.Model, ctx: Context) -> list[Weight]:
        """The weights to share; a line in the ledger for each other constant."""
        chosen = []
        for weight in weights(model):
            reason = left_out(weight, self.only, self.keep) or _obstacle(weight)
            if reason is None:
                chosen.append(weight)
            else:
                ctx.skip(weight, reason)
        return chosen

    def _sources(self, model: ir.Model, chosen: Sequence[Weight], ctx: Context) -> dict[Weight, Source]:
        """What ``chosen`` weights hold, with what the sample data say of them; a line where they do not say it."""
        sources = {weight: Source(weight.tensor) for weight in chosen}
        if self.bits == "auto" or self.weighting == "none":
            return sources
        weigh = weighed_by_outputs if self.weighting == "outputs" else weighed_by_energy
        sources, reasons = weigh(model, chosen, ctx)
        for weight, reason in reasons.items():
            ctx.skip(weight, reason)
        return sources

    # How --------------------------------------------------------------------------------------------------------------

    def _together(self, chosen: Sequence[Weight], known: Mapping[Weight, Source], ctx: Context) -> None:
        """One codebook for all of ``chosen``, which are of one type each."""
        sources = {weight: known[weight] for weight in chosen}
        if len(sources) > 1:
            sources = {weight: source for weight, source in sources.items() if self._usable(weight, source, ctx)}
        elif any(self._few(weight, ctx) for weight in sources):
            return
        if not sources:
            return
        try:
            found = together(list(sources.values()))
        except NotFinite:
            ctx.skip(chosen[0], NOT_FINITE)
            return
        for weight, source in sources.items():
            book = codebook(found, self._clusters, weight.dtype)
            own = found if len(sources) == 1 else together([source])
            weight.replace(shared(source, book, str(self)))
            tell(weight, source, Outcome.of([(own, book)]), ctx)

    def _usable(self, weight: Weight, source: Source, ctx: Context) -> bool:
        try:
            together([source])
        except NotFinite:
            ctx.skip(weight, NOT_FINITE)
            return False
        return True

    def _by_group(self, weight: Weight, source: Source, ctx: Context) -> None:
        """A codebook for each group of output channels."""
        axis = weight.axes()[0]
        if axis is None:
            ctx.skip(weight, "its output-channel axis is not known, or its uses disagree on it")
            return
        if weight.size // weight.shape[axis] * self.group <= self._clusters:
            ctx.skip(weight, "each group of channels has no more elements than there would be values")
            return
        try:
            found = [(own, codebook(own, self._clusters, weight.dtype)) for own in grouped(source, axis, self.group)]
        except NotFinite:
            ctx.skip(weight, NOT_FINITE)
            return
        books: list[Codebook] = [book for _, book in found]
        make = shared_by_group(source, axis, self.group, books)
        if weight.nbytes >= LARGE and source.outputs is None:
            weight.replace(make, provenance=str(self))
        else:
            weight.replace(ir.Tensor(make(), dtype=weight.dtype, name=weight.tensor.name))
        tell(weight, source, Outcome.of(found), ctx, groups=len(books))

    def _few(self, weight: Weight, ctx: Context) -> bool:
        """Whether it has no more values than it would get."""
        count = distinct(weight.tensor, self._clusters)
        if weight.size > self._clusters and count is None:
            return False
        ctx.skip(weight, f"has no more than {self._clusters} values already")
        return True


def _refuse(message: str) -> NoReturn:
    raise UsageError(f"share-weights: {message}")


def _obstacle(weight: Weight) -> str | None:
    """Why a constant is no float weight of a layer, or cannot be changed; None where it can."""
    if weight.overridable:
        return "the model's caller may pass another tensor for it"
    if weight.kind not in (Kind.MATRIX, Kind.EMBEDDING):
        return f"not a weight of a layer: {weight.kind}"
    if weight.quantization is not None or weight.dtype.is_integer():
        return "integers, which quantize-weights stores in fewer bits"
    if weight.dtype not in FLOATS:
        return f"{weight.dtype.name.lower()}, not float, float16, bfloat16 or double"
    if any(node.op_type == "QuantizeLinear" for use in weight.uses for node in use.path):
        return "rounded to integers by QuantizeLinear behind it"
    if weight.size == 0:
        return "empty"
    if len(weight.shape) < 2:
        return "a vector, not a matrix"
    if isinstance(weight.tensor, SparseTensor):
        return "stored sparse, and would be dense once changed"
    if any(map(is_annotated, weight.values)):
        return "it has a quantization annotation"
    return None
