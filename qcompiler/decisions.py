# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""A network as an assignment problem, and its solution as a precision plan.

Items are the products with what joins their kernels, and the kernels between them that can follow
in integers. Each has the latency that the table measured; a product also has the loss that the
sensitivity analysis measured. Where neighbours disagree, a value is converted, once.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from qcompiler.assign import Cast, Group, Item, Moment, Option, Problem, Requirement, totals
from qcompiler.ir import Graph, Node, Value
from qcompiler.latency import LatencyTable, ModelTimes, RegionTime
from qcompiler.ops import OpKind
from qcompiler.passes.regions import Kind, Regions, analyse, integer_operands
from qcompiler.passes.sensitivity_report import NodeSensitivity, SensitivityReport, effects_of
from qcompiler.passes.single_node import Unit, units
from qcompiler.plan import Decision, PrecisionPlan, integer_group, obstacle_to, uniform
from qcompiler.printer import digest
from qcompiler.types import Precision

__all__ = ["Network", "network_of"]

CONVERSIONS = frozenset({"quantize", "dequantize", "requantize"})
_LAYOUT = frozenset({"transpose", "reshape", "cast"})
_LEAST_NOISE = 0.01
"""Times of kernels closer than this are equal: the choice between them is by loss."""
_NOISES = 2.0
"""Deviations of a measurement that count as noise."""

INTEGER = Precision.W8A8.value
FLOAT = Precision.FP32.value


@dataclass
class Network:
    """An assignment problem and what its names stand for.

    Attributes:
        graph: Canonical FLOAT graph.
        problem: The problem; items are named by their first node, options by precisions.
        products: Product -> the nodes of its kernel.
        followers: First node -> nodes of a kernel that has no product.
        units: Node -> the item that it belongs to; nodes outside always compute in float.
        casts: Key of a conversion -> (value, from, to).
        latency: Item -> precision -> seconds as measured, before equal ones were made equal.
        rates: Precision -> factor between a joint loss and the sum of single ones, as learned.
    """

    graph: Graph
    problem: Problem
    products: dict[str, tuple[str, ...]]
    followers: dict[str, tuple[str, ...]]
    units: dict[str, str]
    casts: dict[str, tuple[str, str, str]]
    latency: dict[str, dict[str, float]]
    rates: dict[str, float] = field(default_factory=dict)

    def plan(self, choices: Mapping[str, str], reasons: Mapping[str, str]) -> PrecisionPlan:
        """Return the plan of a choice.

        Args:
            choices: Item -> precision.
            reasons: Item -> why, as a sentence fragment.
        """
        start = uniform(self.graph)
        nodes: dict[str, Decision] = {}
        for node in self.graph.nodes:
            owner = self.units.get(node.name)
            if owner is None or node.name not in start.nodes:
                known = start.nodes.get(node.name, Decision(Precision.FP32, ""))
                if known.precision.is_integer:
                    known = Decision(Precision.FP32, "integers do not reach it")
                nodes[node.name] = known
                continue
            chosen = Precision.parse(choices[owner])
            member = start.nodes[node.name]
            if node.name != owner and (chosen.is_dynamic or chosen.is_weight_only):
                chosen = Precision.FP32  # only the product itself has such a form
            if chosen.is_integer and node.name != owner:
                # What joins a product's kernel is in integers whatever the product's widths are.
                chosen = Precision.W8A8 if member.precision.is_integer else Precision.FP32
            reason = reasons.get(owner, "chosen by measured latency and sensitivity")
            nodes[node.name] = Decision(chosen, reason)
        return PrecisionPlan(nodes, digest(self.graph))

    def choices(self, plan: PrecisionPlan) -> dict[str, str]:
        """Return the choice that a plan makes, as far as its precisions are among the options."""
        found = {}
        for item in self.problem.items:
            wanted = plan.precision(item.name).value
            if wanted not in item.options and plan.precision(item.name).is_integer:
                wanted = INTEGER
            found[item.name] = wanted if wanted in item.options else FLOAT
        return found

    def with_rates(self, rates: Mapping[str, float]) -> Network:
        """Return the network with losses scaled, by precision."""
        items = []
        for item in self.problem.items:
            options = {}
            for name, option in item.options.items():
                factor = rates.get(name, 1.0) / self.rates.get(name, 1.0)
                options[name] = dataclasses.replace(option, loss=option.loss * factor)
            items.append(Item(item.name, options))
        problem = dataclasses.replace(self.problem, items=tuple(items))
        return dataclasses.replace(self, problem=problem, rates=dict(rates))

    def with_fixed(self, fixed: Mapping[str, str]) -> Network:
        """Return the network with some items bound to an option."""
        problem = dataclasses.replace(self.problem, fixed={**self.problem.fixed, **fixed})
        return dataclasses.replace(self, problem=problem)

    def with_groups(self, nodes: Mapping[str, Collection[str]]) -> Network:
        """Return the network with parts that may have limits of their own.

        Args:
            nodes: Name of a part -> names of its nodes. A kernel across parts counts for the one
                of its last node; a conversion for the part that makes the value, or reads an input.
        """
        order = {n.name: i for i, n in enumerate(self.graph.nodes)}
        groups = {}
        for part, inside in nodes.items():
            of = {**self.followers, **self.products}
            items = frozenset(
                i.name for i in self.problem.items
                if max(of.get(i.name, (i.name,)), key=lambda n: order[n]) in inside
            )  # fmt: skip
            casts = frozenset(
                c.key for c in self.problem.casts
                if (c.source in items if c.source is not None else c.target in items)
            )  # fmt: skip
            groups[part] = Group(items, casts)
        problem = dataclasses.replace(self.problem, groups=groups)
        return dataclasses.replace(self, problem=problem)

    def with_memory(self) -> Network:
        """Return the network with what is held at each moment of a run (see `moments_of`)."""
        problem = dataclasses.replace(self.problem, moments=moments_of(self))
        return dataclasses.replace(self, problem=problem)


def network_of(
    graph: Graph,
    table: LatencyTable,
    precisions: Sequence[Precision],
    sensitivity: SensitivityReport | None = None,
) -> Network:
    """Return the assignment problem of a graph.

    Args:
        graph: Canonical FLOAT graph.
        table: Measured latencies; precisions that it lacks are left out.
        precisions: Of the target, best first.
        sensitivity: Losses; None where only latency matters.
    """
    return _Builder(graph, table, precisions, sensitivity).run()


def moments_of(network: Network) -> tuple[Moment, ...]:
    """Return what is held between kernels after each of them, by the choices of their items.

    A value takes a byte per element where its maker computes in integers and four where in float;
    it is held from the start of its kernel to the end of the last one that reads it, and so is what
    a conversion makes of it. Values inside a kernel and arguments of the model take nothing; views
    share what they are views of.
    """
    graph = network.graph
    regions = analyse(graph, uniform(graph))
    order = {n: i for i, n in enumerate(graph.nodes)}
    place = {n.name: i for n, i in order.items()}
    first, final = dict(order), dict(order)
    for members in (*network.products.values(), *network.followers.values()):
        inside = [place[m] for m in members]
        for m in members:
            first[graph.node(m)], final[graph.node(m)] = min(inside), max(inside)
    end = len(order)
    last: dict[Value, int] = {}
    for v in graph.values():
        if v.is_constant:
            continue
        inner = {network.units.get(n.name) for n in v.users}
        made = None if v.producer is None else network.units.get(v.producer.name)
        if made is not None and inner == {made} and not graph.is_output(v):
            continue  # inside one kernel
        root = v
        while root.producer is not None and root.producer.op.name == "reshape":
            root = root.producer.input(0)
        if root.producer is None or root.is_constant:
            continue
        until = max((final[n] for n in v.users), default=final[root.producer])
        last[root] = max(last.get(root, 0), end if graph.is_output(v) else until)
    named = {v.name: v for v in graph.values()}
    copies = []  # first and last moment of each conversion's result, its key and bytes
    for key, (name, _, to) in network.casts.items():
        v = named[name]
        start = 0 if v.producer is None else first[v.producer]
        until = end if graph.is_output(v) else max((final[n] for n in v.users), default=start)
        size = float(v.type.size * (4 if to == FLOAT else 1))
        copies.append((start, until, key, size))
    moments: dict[tuple[object, ...], Moment] = {}
    for node in graph.nodes:
        at = order[node]
        converted = {copy: size for start, until, copy, size in copies if start <= at <= until}
        live = tuple(
            v for v, until in last.items() if v.producer and first[v.producer] <= at <= until
        )
        present = (*live, *converted)
        if present in moments:
            continue
        held: dict[str, dict[str, float]] = {}
        base = 0.0
        for v in live:
            wide = v.type.size * v.dtype.bits / 8
            assert v.producer is not None
            owner = network.units.get(v.producer.name)
            if owner is None or v not in regions.primary:
                base += wide
                continue
            narrow = v.type.size * (2.0 if regions.primary[v] is Kind.S16 else 1.0)
            options = held.setdefault(owner, {})
            for name in network.problem.item(owner).options:
                size = narrow if Precision.parse(name).is_integer else wide
                options[name] = options.get(name, 0.0) + size
        moments[present] = Moment(held, base, converted)
    return tuple(moments.values())


class _Builder:
    def __init__(
        self,
        graph: Graph,
        table: LatencyTable,
        precisions: Sequence[Precision],
        sensitivity: SensitivityReport | None,
    ) -> None:
        self.graph = graph
        self.table = table
        self.precisions = [p for p in precisions if p.value in table.models]
        self.regions: Regions = analyse(graph, uniform(graph))
        self.found: tuple[Unit, ...] = units(graph)
        self.losses: dict[str, NodeSensitivity] | None = None
        if sensitivity is not None:
            self.losses = {n.node: n for n in sensitivity.nodes}
        self.sources: dict[str, list[str]] = {}
        for node in graph.nodes:
            for source in (node.name, *node.sources):
                self.sources.setdefault(source, []).append(node.name)
        self.owner: dict[str, str] = {}
        self.followers: dict[str, tuple[str, ...]] = {}

    def run(self) -> Network:
        """Build."""
        products = {u.node: u.members for u in self.found}
        for node, members in products.items():
            for member in members:
                self.owner[member] = node
        self._follow()
        placed = {p: self._place(self.table.models[p.value]) for p in self.precisions}
        base_times = placed.get(Precision.W8A8) or next(iter(placed.values()))
        items, latency = [], {}
        for name in products:
            options, measured = self._options(name, placed)
            if options:
                items.append(Item(name, options))
                latency[name] = measured
        for name in self.followers:
            options = {}
            for precision in (Precision.W8A8, *(p for p in self.precisions if not p.is_integer)):
                if precision in placed:
                    options[precision.value] = placed[precision].get(name, _NOTHING).option()
            items.append(Item(name, options))
            latency[name] = {p: o.latency for p, o in options.items()}
        names = {i.name for i in items}
        self.owner = {n: o for n, o in self.owner.items() if o in names}
        casts, meaning = self._casts(base_times)
        whole = self.table.models.get(INTEGER) or next(iter(self.table.models.values()))
        inside = sum(t.size for n, t in base_times.items() if n in names)
        outside = sum(t.seconds for n, t in base_times.items() if n not in names and n[:1] != "@")
        base = Option(
            outside + whole.calls * self.table.overhead, 0.0, float(max(whole.size - inside, 0))
        )
        problem = Problem(
            tuple(items), tuple(casts), (), tuple(self._requirements(names)), {}, base
        )
        problem = self._complete(problem, {n for n in products if n in names})
        return Network(
            self.graph,
            problem,
            {n: m for n, m in products.items() if n in names},
            {n: m for n, m in self.followers.items() if n in names},
            dict(self.owner),
            meaning,
            latency,
        )

    def _complete(self, problem: Problem, products: set[str]) -> Problem:
        """Give every kernel's time to something, so that uniform choices sum to what was measured.

        Layout changes and other kernels that only one of the models has are nobody's: those of the
        integer model are paid whatever is chosen, those of a float model by its products.
        """
        for precision in (Precision.W8A8, *(p for p in self.precisions if not p.is_integer)):
            model = self.table.models.get(precision.value)
            if model is None:
                continue
            choices = {
                i.name: precision.value if precision.value in i.options else _nearest(i, precision)
                for i in problem.items
            }
            fixed = model.calls * self.table.overhead
            rest = model.kernels + fixed - totals(problem, choices).latency
            if precision is Precision.W8A8:
                more = dataclasses.replace(problem.base, latency=problem.base.latency + rest)
                problem = dataclasses.replace(problem, base=more)
                continue
            share = rest / max(len(products), 1)
            items = []
            for item in problem.items:
                option = item.options.get(precision.value)
                if item.name in products and option is not None:
                    more = dataclasses.replace(option, latency=max(option.latency + share, 0.0))
                    item = Item(item.name, {**item.options, precision.value: more})
                items.append(item)
            problem = dataclasses.replace(problem, items=tuple(items))
        return problem

    # ------------------------------------------------------------------------- whose time it is

    def _follow(self) -> None:
        """Make an item of every integer kernel without a product."""
        model = self.table.models.get(INTEGER)
        if model is None:
            return
        waiting = [n for n in self.graph.nodes if n in self.regions.integer]
        waiting = [n for n in waiting if n.name not in self.owner]
        for region in model.regions:
            inside = self._nodes(region)
            members = tuple(
                n.name for n in waiting if n.name in inside and n.name not in self.owner
            )
            if members and not _is_conversion(region):
                self.followers[members[0]] = members
                self.owner.update(dict.fromkeys(members, members[0]))
        for node in waiting:  # those without a kernel of their own, such as views
            if node.name not in self.owner:
                self.followers[node.name] = (node.name,)
                self.owner[node.name] = node.name

    def _nodes(self, region: RegionTime) -> set[str]:
        return {n for source in region.nodes for n in self.sources.get(source, ())}

    def _place(self, model: ModelTimes) -> dict[str, _Share]:
        """Return the share of each item in a model's time; "@..." are conversions, "" the rest."""
        found: dict[str, _Share] = {}
        for region in model.regions:
            if _is_conversion(region):
                owners: list[str] = [f"@{_kind(region)} {self._converted(region)}"]
            else:
                inside = self._nodes(region)
                held = [self.owner[n] for n in inside if n in self.owner]
                heads = {o for o in held if o in inside and o not in self.followers}
                order = [n.name for n in self.graph.nodes]
                mains = heads or set(held)
                owners = sorted(mains, key=order.index) or [""]
            for owner in owners:
                share = found.setdefault(owner, _Share())
                share.add(region, len(owners))
        return found

    def _converted(self, region: RegionTime) -> str:
        """Return the name of the value that a conversion's region converts."""
        labels = (region.name, *region.nodes)
        fitting = [
            v.name for v in self.graph.values() if any(x.startswith(f"{v.name}_") for x in labels)
        ]
        if fitting:
            return max(fitting, key=len)
        made = [self.graph.node(n) for n in self._nodes(region)]
        return made[-1].outputs[0].name if made else region.name

    def _options(
        self, name: str, placed: Mapping[Precision, Mapping[str, _Share]]
    ) -> tuple[dict[str, Option], dict[str, float]]:
        """Return a product's options, and its latencies as measured."""
        node = self.graph.node(name)
        constant = node.input(1).is_constant
        options: dict[str, Option] = {}
        shares: dict[str, _Share] = {}
        measured: dict[str, float] = {}
        for precision in self.precisions:
            if not constant and precision not in (Precision.W8A8, Precision.W8A7, Precision.FP32):
                continue  # there are no weights
            if not precision.is_integer and obstacle_to(node, precision) is not None:
                continue  # it is float in the model of that precision
            if precision is Precision.W4A8_GROUP and integer_group(node) is None:
                continue  # the same as W4A8
            loss = self._loss(name, precision, constant)
            share = placed[precision].get(name)
            if loss is None or share is None:
                continue
            measured[precision.value] = share.seconds
            shares[precision.value] = share
            options[precision.value] = dataclasses.replace(share.option(), loss=loss)
        # Times within noise are made equal to the slowest safer one's: the loss decides.
        equal: dict[str, Option] = {}
        for key in sorted(options, key=lambda k: (options[k].loss, options[k].latency)):
            option = options[key]
            for other, held in equal.items():
                margin = max(_LEAST_NOISE, _NOISES * (shares[key].noise + shares[other].noise))
                if held.latency * (1 - margin) < option.latency < held.latency:
                    option = dataclasses.replace(option, latency=held.latency)
            equal[key] = option
        return {k: equal[k] for k in options}, measured

    def _loss(self, name: str, precision: Precision, constant: bool) -> float | None:
        if self.losses is None or precision is Precision.FP32:
            return 0.0
        found = self.losses.get(name)
        if found is None:
            return self._usual_loss() if precision is Precision.W8A8 else None
        weight, activation = effects_of(precision)
        effects = []
        if activation is not None:
            effects.append(found.activation.get(activation))
        if weight is not None and constant:
            effects.append(found.weight.get(weight))
        if not all(effects):
            return None
        loss = sum(e.loss for e in effects if e is not None)
        return loss if math.isfinite(loss) else 1e30

    def _usual_loss(self) -> float | None:
        """Return the mean loss of W8A8, for products that there was no time to analyse."""
        known = [
            n.activation["8"].loss + (n.weight["8"].loss if "8" in n.weight else 0.0)
            for n in (self.losses or {}).values()
            if "8" in n.activation
        ]
        found = [v for v in known if math.isfinite(v)]
        return sum(found) / len(found) if found else None

    # ------------------------------------------------------------------------------ conversions

    def _casts(
        self, base: Mapping[str, _Share]
    ) -> tuple[list[Cast], dict[str, tuple[str, str, str]]]:
        integer = frozenset(p.value for p in self.precisions if p.is_integer) | {INTEGER}
        floats = frozenset(p.value for p in self.precisions if not p.is_integer) | {FLOAT}
        casts: list[Cast] = []
        meaning: dict[str, tuple[str, str, str]] = {}
        for v in self.graph.values():
            if v.is_constant or not v.dtype.is_float:
                continue
            source = None if v.producer is None else self.owner.get(v.producer.name)
            outside = v.producer is None or source is None
            reads = {(n, i) for n in v.users for i, o in integer_operands(n) if o is v}
            for reader, index in v.uses:
                target = self.owner.get(reader.name)
                if target is not None and target == source:
                    continue
                as_integer = (reader, index) in reads and (reader, index) not in self.regions.fused
                if target is not None and as_integer:
                    key = f"quantize {v.name}"
                    price = _known(base, v, "quantize", self.table)
                    made = frozenset() if outside else floats
                    casts.append(Cast(key, price, source, made, target, integer))
                    meaning[key] = (v.name, FLOAT, INTEGER)
                if source is None or v not in self.regions.primary:
                    continue  # a float result of an integer kernel costs nothing of its own
                key = f"dequantize {v.name}"
                price = _known(base, v, "dequantize", self.table)
                wants = frozenset() if target is None else floats
                casts.append(Cast(key, price, source, integer, target, wants))
                meaning[key] = (v.name, INTEGER, FLOAT)
            if source is not None and self.graph.is_output(v) and v in self.regions.primary:
                key = f"dequantize {v.name}"
                price = _known(base, v, "dequantize", self.table)
                casts.append(Cast(key, price, source, integer))
                meaning[key] = (v.name, INTEGER, FLOAT)
        return casts, meaning

    # ----------------------------------------------------------------------------- requirements

    def _requirements(self, names: set[str]) -> Iterable[Requirement]:
        integer = frozenset(p.value for p in self.precisions if p.is_integer) | {INTEGER}
        for name, members in self.followers.items():
            if name in names:
                yield from self._follower(name, members, integer)
        narrow = frozenset(
            p.value for p in self.precisions if p.is_integer and p.activation_bits < 8
        )
        if not narrow:
            return
        same = narrow | {p.value for p in self.precisions if not p.is_integer}
        readers: dict[Value, list[str]] = {}
        for unit in self.found:
            if unit.node in names:
                readers.setdefault(_root(self.graph.node(unit.node).input(0)), []).append(unit.node)
        for group in readers.values():
            for a in group:
                for b in group:
                    if a != b:  # one value has one width
                        yield Requirement(a, narrow, ((b, same),))

    def _follower(
        self, name: str, members: Sequence[str], integer: frozenset[str]
    ) -> Iterable[Requirement]:
        """Say what a kernel without a product needs to be in integers (`regions.analyse`)."""
        form = frozenset({INTEGER})
        inside = {self.graph.node(m) for m in members}
        for node in inside:
            if node.op.name == "softmax":
                continue
            for _, v in integer_operands(node):
                if v.is_constant or v.producer in inside:
                    continue
                made = [] if v.producer is None else [v.producer]
                others = [n for n in v.users if n.op.kind is OpKind.COMPUTE]
                any_of = self._items([*made, *others], integer)
                if any_of:
                    yield Requirement(name, form, any_of)
        after = [r for n in inside for v in n.outputs for r in v.users if r not in inside]
        yield Requirement(name, form, self._items(after, integer))

    def _items(
        self, nodes: Iterable[Node], forms: frozenset[str]
    ) -> tuple[tuple[str, frozenset[str]], ...]:
        names = (self.owner.get(n.name) for n in nodes)
        return tuple((n, forms) for n in dict.fromkeys(names) if n is not None)


@dataclass
class _Share:
    """What an item has of a model's time and constants."""

    seconds: float = 0.0
    noise: float = 0.0
    size: float = 0.0

    def add(self, region: RegionTime, owners: int) -> None:
        seconds = (region.seconds or 0.0) / owners
        total = self.seconds + seconds
        if total > 0:
            self.noise = (self.noise * self.seconds + region.noise * seconds) / total
        self.seconds = total
        self.size += region.size / owners

    def option(self) -> Option:
        return Option(self.seconds, 0.0, self.size)


_NOTHING = _Share()


def _nearest(item: Item, precision: Precision) -> str:
    """Return the option that an item has in a model at a precision that it lacks."""
    wanted = INTEGER if precision.is_integer else FLOAT
    return wanted if wanted in item.options else next(iter(item.options))


def _is_conversion(region: RegionTime) -> bool:
    ops = set(region.ops)
    return bool(ops & CONVERSIONS) and ops <= CONVERSIONS | _LAYOUT


def _kind(region: RegionTime) -> str:
    return next(op for op in region.ops if op in CONVERSIONS)


def _known(base: Mapping[str, _Share], v: Value, kind: str, table: LatencyTable) -> float:
    """Return the time of a conversion: of its own kernel where the model has one."""
    found = base.get(f"@{kind} {v.name}")
    return table.cast(kind, v.shape) if found is None else found.seconds


def _root(v: Value) -> Value:
    """Return the value that a chain of movement started from: they share one grid."""
    while v.producer is not None and v.producer.op.kind is OpKind.MOVEMENT:
        v = v.producer.input(0)
    return v
