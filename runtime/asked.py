"""The inputs that a run needs samples of: those of the model, and those that it has after passes that change them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir

from ..ir.errors import NeedsData
from ..ir.scopes import values
from ..passes.base import Context
from ..passes.pipeline import Pipeline
from .check import brings_reference
from .draws import NoFeeds, random_feeds
from .feeds import Feeds, Labels, read_feeds
from .inputs import Feed
from .session import OrtRunner


@dataclass(frozen=True)
class Asked:
    """What samples must hold. ``after`` is the model as its interface will be, ``None`` where that stays.

    ``derived`` are inputs that it will have and that are values of the model now: they are computed, not asked for.
    """

    model: ir.Model
    after: ir.Model | None = None
    derived: tuple[str, ...] = ()

    @classmethod
    def of(cls, model: ir.Model, pipeline: Pipeline, ctx: Context) -> Asked:
        """Try the passes that change the interface, and no other, on a copy of the model.

        Where one of them needs data for that, the interface counts as staying: data are for the model as it is. Raises
        what these passes raise.
        """
        changers = [pass_ for pass_, _ in pipeline.steps() if brings_reference(pass_) and not pass_.keeps_inputs]
        if not changers:
            return cls(model)
        after = model.clone()
        after.meta.update(model.meta)
        try:
            Pipeline(tuple(changers)).run(after, ctx)
        except NeedsData:
            return cls(model)
        own = {value.name for value in model.graph.inputs}
        if [_signature(value) for value in after.graph.inputs] == [_signature(value) for value in model.graph.inputs]:
            return cls(model)
        inner = {value.name for value in values(model.graph)} - own
        return cls(model, after, tuple(value.name or "" for value in after.graph.inputs if value.name in inner))

    @property
    def interface(self) -> ir.Model:
        """A model with nothing but the inputs that samples are asked for."""
        if self.after is None:
            return self.model
        own = {value.name: value for value in self.model.graph.inputs}
        # Where only the type changes, samples are of the type that the model takes now; ``Fitted`` gives the other.
        last = [
            own[value.name] if value.name in own and own[value.name].type != value.type else value
            for value in self.after.graph.inputs
            if value.name not in self.derived
        ]
        names = {value.name for value in last}
        wanted = [value for value in self.model.graph.inputs if value.name not in names] + last
        copies = [
            ir.Value(name=one.name, type=one.type, shape=one.shape, const_value=one.const_value) for one in wanted
        ]
        return ir.Model(ir.Graph(copies, [], nodes=[]), ir_version=self.model.ir_version)

    def read(self, spec: Any, runner: OrtRunner, labels: Labels | None = None) -> Feeds:
        """``read_feeds`` for what is asked, with what is derived. Raises ``BadFeeds``."""
        if self.after is not None and isinstance(spec, Feeds):
            return spec
        return self._enriched(read_feeds(spec, self.interface, labels=labels), runner)

    def draw(self, seed: int, runner: OrtRunner) -> Feeds:
        """``random_feeds`` for what is asked, with what is derived. Raises ``NoFeeds``."""
        if self.after is None:
            return random_feeds(self.model, seed)
        before, after = (
            {value.name for value in model.graph.inputs if value.const_value is None}
            for model in (self.model, self.after)
        )
        if before <= after and not self.derived:
            return random_feeds(self.after, seed)
        if after - set(self.derived) <= before:
            return self._enriched(random_feeds(self.model, seed), runner)
        raise NoFeeds("the passes change the inputs in a way that no random feeds are drawn for")

    def _enriched(self, feeds: Feeds, runner: OrtRunner) -> Feeds:
        if not self.derived:
            return feeds
        names = {value.name for value in self.model.graph.inputs}
        bare = OrtRunner(threads=runner.threads, prepack=False)  # as the check computes what must be bit-identical

        def walk() -> Iterator[Feed]:
            kept: list[Mapping[str, Any]] = []

            def own() -> Iterator[Feed]:
                for feed in feeds:
                    kept.append(feed)
                    yield {name: array for name, array in feed.items() if name in names}

            for found in bare.run(self.model, own(), list(self.derived), level="off"):
                yield {**kept.pop(), **found}

        return dataclasses.replace(feeds, walk=walk)


def _signature(value: ir.Value) -> tuple[Any, ...]:
    return value.name, value.type, None if value.shape is None else tuple(value.shape), value.const_value is None
