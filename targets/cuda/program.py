# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""A model as a list of kernel launches over a static memory plan.

What `program.json` of an artifact says (docs/cuda.md): device memory is one arena plus the
parameters; a launch names a kernel, its grid, and its arguments, all of them pointers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from qcompiler.ir import Graph, Value
from qcompiler.targets.cuda.source import KernelText
from qcompiler.types import Array

ALIGNMENT = 256
"""Alignment of every buffer, bytes: what cuMemAlloc promises, so that all wide accesses fit."""


@dataclass(eq=False, slots=True)
class Temporary:
    """A buffer between two launches of one node."""

    nbytes: int


@dataclass(frozen=True, slots=True)
class Status:
    """The word that kernels raise when an input breaks a rule (an index outside of its table)."""


Buffer = Value | Temporary
Argument = Value | Temporary | Status | Array
"""What a pointer points at; an array is a parameter."""


@dataclass(frozen=True, slots=True, eq=False)
class Launch:
    """One launch of a kernel.

    Attributes:
        kernel: Its text; equal texts become one kernel.
        grid: Blocks, three extents.
        threads: Threads of a block.
        arguments: Pointers in the order of the kernel's parameters.
        result: The buffer that it writes.
        shared: Bytes of dynamic shared memory.
        macs: Multiply-accumulates, 0 where that means nothing.
    """

    kernel: KernelText
    grid: tuple[int, int, int]
    threads: int
    arguments: tuple[Argument, ...]
    result: Buffer
    shared: int = 0
    macs: int = 0


@dataclass
class Step:
    """The launches of one node.

    Attributes:
        name: The node's name.
        launches: In order.
        macs: Multiply-accumulates of the node, 0 where that means nothing.
        kernels: Name of each launch's kernel, filled in when names are given.
    """

    name: str
    launches: tuple[Launch, ...]
    macs: int = 0
    kernels: list[str] = field(default_factory=list)


def nbytes(v: Value) -> int:
    """Return the size of a value's buffer."""
    return v.type.size * v.dtype.numpy.itemsize


class Plan:
    """Places buffers in the arena: two that live at once never overlap.

    A view (reshape) shares the buffer of what it looks at. Inputs live from the start, results to
    the end. First fit in the order of the launches, which is good for chains and blocks.
    """

    def __init__(
        self,
        graph: Graph,
        views: dict[Value, Value],
        launches: Sequence[Launch],
        *,
        reuse: bool = True,
    ) -> None:
        self.views = views
        self.offsets: dict[Buffer, int] = {}
        self.size = 0
        last: dict[Buffer, int] = {}
        for i, launch in enumerate(launches):
            for a in (*launch.arguments, launch.result):
                if isinstance(a, (Value, Temporary)):
                    last[self.root(a)] = i
        never = len(launches)
        for v in (*graph.output_values, *graph.inputs):
            last[self.root(v)] = never
        live: list[tuple[int, int, int]] = []  # offset, size, last use
        for v in graph.inputs:
            self._place(v, nbytes(v), never, live)
        for i, launch in enumerate(launches):
            if reuse:
                live = [b for b in live if b[2] >= i]
            buffer = self.root(launch.result)
            if buffer not in self.offsets:
                size = buffer.nbytes if isinstance(buffer, Temporary) else nbytes(buffer)
                self._place(buffer, size, last.get(buffer, i), live)

    def root(self, buffer: Buffer) -> Buffer:
        """Return the buffer that holds a value."""
        while isinstance(buffer, Value) and buffer in self.views:
            buffer = self.views[buffer]
        return buffer

    def _place(
        self, buffer: Buffer, size: int, until: int, live: list[tuple[int, int, int]]
    ) -> None:
        size = max(-(-size // ALIGNMENT) * ALIGNMENT, ALIGNMENT)
        offset = 0
        for start, length, _ in sorted(live):
            if offset + size <= start:
                break
            offset = max(offset, start + length)
        self.offsets[buffer] = offset
        live.append((offset, size, until))
        self.size = max(self.size, offset + size)


class Parameters:
    """Constant arrays, each stored once."""

    def __init__(self) -> None:
        self.arrays: list[Array] = []
        self.names: list[str] = []
        self._known: dict[tuple[str, tuple[int, ...], bytes], int] = {}

    def index(self, array: Array, name: str) -> int:
        """Return the number of an array's parameter."""
        array = np.ascontiguousarray(array).reshape(array.shape)
        key = (array.dtype.str, array.shape, array.tobytes())
        found = self._known.get(key)
        if found is None:
            found = self._known[key] = len(self.arrays)
            self.arrays.append(array)
            self.names.append(name)
        return found


def program_json(
    graph: Graph,
    views: dict[Value, Value],
    steps: Sequence[Step],
    parameters: Parameters,
    arch: str,
) -> dict[str, Any]:
    """Return program.json; the kernels of the steps must have their names."""
    launches = [launch for step in steps for launch in step.launches]
    plan = Plan(graph, views, launches)

    def reference(a: Argument, name: str) -> list[int | str]:
        if isinstance(a, Status):
            return ["status", 0]
        if isinstance(a, np.ndarray):
            return ["parameter", parameters.index(a, name)]
        root = plan.root(a)
        if isinstance(root, Value) and root.is_constant:
            return ["parameter", parameters.index(root.array(), root.name)]
        return ["arena", plan.offsets[root]]

    entries = []
    shared: dict[str, int] = {}
    for step in steps:
        for name, launch in zip(step.kernels, step.launches, strict=True):
            shared[name] = max(shared.get(name, 0), launch.shared)
            arguments = (*launch.arguments, launch.result)
            entries.append(
                {
                    "kernel": name,
                    "grid": list(launch.grid),
                    "threads": launch.threads,
                    "shared": launch.shared,
                    "arguments": [
                        reference(a, f"{step.name}.{i}") for i, a in enumerate(arguments)
                    ],
                }
            )
    return {
        "format": 1,
        "arch": arch,
        "arena": max(plan.size, ALIGNMENT),
        "inputs": [reference(v, v.name) for v in graph.inputs],
        "outputs": [reference(v, v.name) for v in graph.output_values],
        "kernels": shared,
        "launches": entries,
    }
