# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""Branches that are not taken are not computed.

A graph has no control flow: an If whose condition is known only at run time is both branches and a
`where` that selects. What only one side of such a `where` reads need not run when the other side is
selected, so its kernels get the condition as one argument more and do nothing where it says no.
Nothing reads what they leave out, but for the `where`, which does not select it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qcompiler.ir import Graph, Node, Value
from qcompiler.types import DType

_VIEWS = frozenset({"reshape", "expand"})


@dataclass(frozen=True, slots=True)
class Guard:
    """A condition under which a node runs.

    Attributes:
        condition: A bool tensor of one element.
        when: The element for which the node runs.
    """

    condition: Value
    when: bool


Guards = tuple[Guard, ...]


def guards_of(graph: Graph) -> dict[Node, Guards]:
    """Return the guards of the nodes that only branches read, outermost first."""
    selections: dict[Value, list[Node]] = {}
    for node in graph.nodes:
        if node.op.name == "where" and node.input(0).type.size == 1:
            selections.setdefault(_root(node.input(0)), []).append(node)
    found: dict[Node, list[Guard]] = {}
    for condition, group in selections.items():
        if condition.is_constant or condition.dtype is not DType.BOOL:
            continue
        for when, operand in ((True, 1), (False, 2)):
            for node in _only_for(graph, group, operand):
                found.setdefault(node, []).append(Guard(condition, when))
    order = {n: i for i, n in enumerate(graph.nodes)}

    def depth(guard: Guard) -> int:
        return -1 if guard.condition.producer is None else order[guard.condition.producer]

    return {n: tuple(sorted(guards, key=depth)) for n, guards in found.items()}


def _root(v: Value) -> Value:
    while v.producer is not None and v.producer.op.name in _VIEWS:
        v = v.producer.input(0)
    return v


def _only_for(graph: Graph, group: Sequence[Node], operand: int) -> set[Node]:
    """Return the nodes whose results nothing reads but one side of some selections."""
    ends = set(group)
    inside: set[Node] = set()
    for node in reversed(graph.nodes):
        uses = [u for v in node.outputs for u in v.uses]
        if not uses or any(graph.is_output(v) for v in node.outputs):
            continue
        if all(reader in inside or (reader in ends and i == operand) for reader, i in uses):
            inside.add(node)
    return inside


def in_order(graph: Graph, guards: Mapping[Node, Guards]) -> list[Node]:
    """Return the nodes in an order in which conditions come before what they guard."""
    done: set[Node] = set()
    order: list[Node] = []
    for root in graph.nodes:
        stack = [root]
        while stack:
            node = stack[-1]
            if node in done:
                stack.pop()
                continue
            needed = [v.producer for v in node.operands if v.producer is not None]
            needed += [
                g.condition.producer
                for g in guards.get(node, ())
                if g.condition.producer is not None
            ]
            waiting = [n for n in needed if n not in done]
            if waiting:
                stack += waiting
            else:
                stack.pop()
                done.add(node)
                order.append(node)
    return order


def guarded(function: Any, guards: Guards, results: int) -> Any:
    """Return a PrimFunc that takes the conditions before its results, and obeys them.

    Args:
        function: The PrimFunc; its last `results` parameters are what it writes.
        guards: When it runs.
        results: Number of buffers that it writes.
    """
    from tvm import tirx

    params = list(function.params)
    body = function.body
    added: list[Any] = []
    for k, guard in reversed(list(enumerate(guards))):
        shape = guard.condition.shape
        buffer = tirx.decl_buffer(shape, "bool", f"condition{k}")
        flag = tirx.BufferLoad(buffer, [0] * len(shape))
        body = tirx.IfThenElse(flag if guard.when else tirx.Not(flag), body, None)
        added.insert(0, buffer)
    at = len(params) - results
    return tirx.PrimFunc(
        [*params[:at], *added, *params[at:]], body, function.ret_type, function.attrs
    )
