"""How large a model is once its functions are put in the place of their calls, as those do who run it."""

from __future__ import annotations

from collections import Counter

import onnx_ir as ir

from .address import bodies

DEEPEST, MOST = 500, 1 << 22
"""Calls in calls that native code, which recurses, may be given; nodes that it may be given with all calls replaced."""

_Key = ir.OperatorIdentifier | None
_ENDLESS = 1 << 62


def overgrown(model: ir.Model) -> str | None:
    """Why the functions of ``model`` are too much for who runs it, as a clause; ``None`` where they are not."""
    depth, nodes = expansion(model)
    if depth >= _ENDLESS:
        return "a function calls itself"
    if depth > DEEPEST:
        return f"its functions call one another {depth} deep, and no more than {DEEPEST} are supported"
    if nodes > MOST:
        return f"it has {nodes:,} nodes once its functions take the place of their calls, over the {MOST:,} supported"
    return None


def expansion(model: ir.Model) -> tuple[int, int]:
    """How deep functions call one another, and the nodes there are with all calls replaced; 0 without functions.

    Functions that call the next one twice are 2^n nodes after n of them. Numbers end at 2^62, which also stands for a
    function that calls itself.
    """
    if not model.functions:
        return 0, 0
    contents: dict[_Key, tuple[int, Counter[_Key]]] = {None: _contents(model, model.graph)}
    contents |= {key: _contents(model, function.graph) for key, function in model.functions.items()}
    known: dict[_Key, tuple[int, int]] = {}
    seen: set[_Key] = set()
    stack: list[_Key] = [None]
    while stack:
        key = stack[-1]
        nodes, calls = contents[key]
        unknown = [callee for callee in calls if callee not in known]
        if key in known:
            stack.pop()
        elif not unknown:
            found = [(count, *known[callee]) for callee, count in calls.items()]
            depth = 1 + max((depth for _, depth, _ in found), default=-1)
            known[key] = min(depth, _ENDLESS), min(nodes + sum(count * size for count, _, size in found), _ENDLESS)
        elif key in seen:
            known[key] = _ENDLESS, _ENDLESS
        else:
            seen.add(key)
            stack += unknown
    return known[None]


def _contents(model: ir.Model, graph: ir.Graph | ir.Function) -> tuple[int, Counter[_Key]]:
    """The nodes of a graph and of all bodies in it, and which functions they call how often."""
    count, calls, waiting = 0, Counter[_Key](), [graph]
    while waiting:
        graph = waiting.pop()
        count += len(graph)
        for node in graph:
            if (key := node.op_identifier()) in model.functions:
                calls[key] += 1
            if node.attributes.data:
                waiting += [body for _, body in bodies(node)]
    return count, calls
