# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""One product at a time: run only what follows it, with its operands as inputs of the session.

A float network is cut before a product. What is alive at the cut is computed once per sample and
kept, as far as a memory bound allows. The rest of the network is cut again behind the product's
kernel: the kernel is a small model whose inputs are the live values and, apart from them, the
product's own two operands, so that one session serves every weight and activation that is tried;
what follows it has constant weights, which ONNX Runtime lays out for its fastest kernels; what no
change can reach runs once. The part before the product is never run again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from qcompiler.data import Batch
from qcompiler.ir import Graph, Node, Value
from qcompiler.onnx_export import subgraph_to_onnx
from qcompiler.ops import OpKind
from qcompiler.ort import Optimization, Session
from qcompiler.passes.regions import analyse
from qcompiler.passes.trails import needed_nodes
from qcompiler.plan import integer_obstacle, uniform
from qcompiler.types import Array

OPERANDS = ("operand/x", "operand/w")
"""Names under which a suffix model takes the product's operands."""


@dataclass(frozen=True)
class Unit:
    """A product and what joins its kernel.

    Attributes:
        node: Name of the product.
        op: Its operator.
        members: Names of the nodes that fuse into the same kernel, the product first.
        result: Name of the value that the kernel gives.
    """

    node: str
    op: str
    members: tuple[str, ...]
    result: str


def units(graph: Graph) -> tuple[Unit, ...]:
    """Return the products of a FLOAT graph that have an integer form, in order."""
    regions = analyse(graph, uniform(graph))
    found = []
    for node in graph.nodes:
        if node.op.kind is not OpKind.COMPUTE or integer_obstacle(node) is not None:
            continue
        members, value = [node.name], node.output
        while len(value.uses) == 1 and not graph.is_output(value):
            (reader, i) = value.uses[0]
            if reader not in regions.integer or (reader, i) not in regions.fused:
                break
            members.append(reader.name)
            value = reader.output
        found.append(Unit(node.name, node.op.name, tuple(members), value.name))
    return tuple(found)


@dataclass(frozen=True)
class Part:
    """Some nodes of a graph as a model.

    Attributes:
        model: Serialized ONNX, without the large constants.
        constants: Those, by name: the graph's own arrays.
    """

    model: bytes
    constants: Mapping[str, Array]

    def session(self, optimization: Optimization = "basic") -> Session:
        """Load it."""
        return Session(self.model, optimization=optimization, constants=self.constants)


@dataclass(frozen=True)
class Suffix:
    """What follows a cut, as up to three models, so that only what a change reaches runs again.

    Attributes:
        side: From live values to what follows the cut without depending on the
            product; None where nothing does.
        kernel: From `OPERANDS`, live and side values to the kernel's result.
        tail: From the kernel's result, live and side values to the outputs; None where the result
            is all there is.
        live: Names of the live values that they read.
        x: Name of the live value that is the product's first operand.
        w: Name of the second operand where that is computed; None where it is a constant.
        result: Name of the kernel's result.
        outputs: (output name of the graph, name in the model) of the outputs that depend on it.
    """

    side: Part | None
    kernel: Part
    tail: Part | None
    live: tuple[str, ...]
    x: str
    w: str | None
    result: str
    outputs: tuple[tuple[str, str], ...]


def suffix_of(graph: Graph, unit: Unit) -> Suffix:
    """Return the network from a product on, with the product's operands as inputs."""
    g = graph.clone()
    node = g.node(unit.node)
    index = g.nodes.index(node)
    x, w = node.input(0), node.input(1)
    names = (x.name, None if w.is_constant else w.name)
    for i, v in enumerate((x, w)):
        g.set_input(node, i, g.add_input(OPERANDS[i], v.type))
    after = g.nodes[index:]
    depends = {node}
    for n in after:
        if any(v.producer in depends for v in n.operands):
            depends.add(n)
    outputs = [(name, v) for name, v in g.outputs if v.producer in depends]
    result = next(v for n in after for v in n.outputs if v.name == unit.result)
    kernel = needed_nodes([n for n in after if n in depends], [result])
    beyond = [v for v in dict.fromkeys(v for _, v in outputs) if v is not result]
    inner = set(kernel)
    tail = needed_nodes([n for n in after if n in depends and n not in inner], beyond)
    others = [n for n in after if n not in depends]
    made = {v for n in others for v in n.outputs}
    reached = dict.fromkeys(v for n in (*kernel, *tail) for v in n.operands if v in made)
    side = needed_nodes(others, list(reached))
    inside = {v for n in after for v in n.outputs}
    read = dict.fromkeys(
        v.name
        for n in (*side, *kernel, *tail)
        for v in n.operands
        if not v.is_constant and v not in inside
    )
    live = (*(n for n in read if n not in OPERANDS), *(n for n in names if n is not None))
    return Suffix(
        _part(side, list(reached)) if reached else None,
        _part(kernel, [result]),
        _part(tail, beyond) if beyond else None,
        tuple(dict.fromkeys(live)),
        x.name,
        names[1],
        result.name,
        tuple((name, v.name) for name, v in outputs),
    )


def prefix_model(graph: Graph, wanted: Sequence[Value]) -> bytes:
    """Return the serialized model that computes some values of a FLOAT or QDQ graph."""
    needed = needed_nodes(graph.nodes, wanted)
    model: bytes = subgraph_to_onnx(needed, outputs=wanted).SerializeToString()
    return model


def _part(nodes: Sequence[Node], wanted: Sequence[Value]) -> Part:
    constants: dict[str, Array] = {}
    model = subgraph_to_onnx(nodes, outputs=wanted, apart=constants)
    return Part(model.SerializeToString(), constants)


@dataclass(frozen=True)
class Feed:
    """The live values of one run, or the model's inputs and the model that leads to them.

    Attributes:
        arrays: Values by name.
        prefix: Model from the inputs to the live values; None where `arrays` has them.
        samples: Samples of the run that are real.
        size: Samples that the arrays have room for.
        outputs: The float model's outputs by name; None where they are too large to keep.
    """

    arrays: dict[str, Array]
    prefix: Part | None
    samples: int
    size: int
    outputs: Mapping[str, Array] | None = None


class Walker:
    """Goes along a FLOAT graph and gives the live values before each product.

    As many runs are kept as fit the memory with what is live from the current cut on at most; as
    the network narrows, more do, and join.

    Args:
        graph: The graph.
        batches: Gives the runs, anew each time it is called.
        memory: Bytes that may be held for kept values.
        outputs: The float model's outputs of each run, if kept.
    """

    def __init__(
        self,
        graph: Graph,
        batches: Callable[[], Iterator[Batch]],
        memory: float,
        outputs: Sequence[Mapping[str, Array]] | None = None,
    ) -> None:
        self.graph = graph
        self.nodes = graph.nodes
        self.order = {n: i for i, n in enumerate(self.nodes)}
        self._batches = batches
        self._memory = memory
        self._outputs = outputs
        self._at = 0
        self._kept: list[Feed] = []
        self._largest: dict[int, int] = {}
        most = 0
        for index in sorted((self.order[graph.node(u.node)] for u in units(graph)), reverse=True):
            most = max(most, sum(_bytes(v) for v in self._live(index)))
            self._largest[index] = most
        room = self._room(max(most, sum(_bytes(v) for v in graph.inputs)))
        for i, batch in enumerate(batches()):
            if i == room:
                break
            self._kept.append(self._feed(i, batch, dict(batch.inputs), None))

    def feeds(self, unit: Unit) -> Iterator[Feed]:
        """Yield the runs at the cut before a product; the products must be asked for in order."""
        index = self.order[self.graph.node(unit.node)]
        self._advance(index)
        yield from self._kept
        room, kept = self._room(self._largest[index]), len(self._kept)
        prefix: Part | None = None
        session: Session | None = None
        for i, batch in enumerate(self._batches()):
            if i < kept:
                continue
            if prefix is None:
                prefix = self._model(0, index)
                session = None if prefix is None or room <= kept else prefix.session()
            given = dict(batch.inputs)
            if session is None or i >= room:
                yield self._feed(i, batch, given, prefix)
                continue
            given.update(session.run({n: given[n] for n in session.input_names}))
            live = {v.name for v in self._live(index)}
            self._kept.append(
                self._feed(i, batch, {n: a for n, a in given.items() if n in live}, None)
            )
            yield self._kept[-1]

    def _room(self, size: int) -> int:
        """Return how many runs of that many bytes fit."""
        return int(self._memory // max(size, 1))

    def _feed(
        self, index: int, batch: Batch, arrays: dict[str, Array], prefix: Part | None
    ) -> Feed:
        outputs = None if self._outputs is None else self._outputs[index]
        return Feed(arrays, prefix, batch.samples, batch.size, outputs)

    def _live(self, index: int) -> list[Value]:
        """Return the values made before a node that it or a later one reads."""
        before = {v for n in self.nodes[:index] for v in n.outputs} | set(self.graph.inputs)
        read = (v for n in self.nodes[index:] for v in n.operands)
        return [v for v in dict.fromkeys(read) if v in before]

    def _model(self, start: int, end: int) -> Part | None:
        """Return the model of a stretch of nodes that gives what is live after it."""
        stretch = self.nodes[start:end]
        inside = {v for n in stretch for v in n.outputs}
        wanted = [v for v in self._live(end) if v in inside]
        return _part(needed_nodes(stretch, wanted), wanted) if wanted else None

    def _advance(self, index: int) -> None:
        if index == self._at or not self._kept:
            self._at = index
            return
        model = self._model(self._at, index)
        session = None if model is None else model.session()
        names = {v.name for v in self._live(index)}
        for i, feed in enumerate(self._kept):
            found = dict(feed.arrays)
            if session is not None:
                found.update(session.run({n: found[n] for n in session.input_names}))
            kept = {n: a for n, a in found.items() if n in names}
            self._kept[i] = replace(feed, arrays=kept)
        self._at = index


def _bytes(value: Value) -> int:
    return value.type.size * value.dtype.bits // 8
