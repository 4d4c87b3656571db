# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""Graph[INTEGER] -> one TVM IRModule: our kernels and a Relax `main` that calls them in order.

    main(inputs..., parameters...) -> results

Every node becomes either a call of one of our generated kernels (`KernelCall`, from the target's
lowering table), a view (reshape), or part of a float region, which goes through TVM's own ONNX
importer (`tvm_regions`). Equal workloads share one PrimFunc. Packed constants are parameters of
`main`, so the library holds code only and the parameters can be mapped from the artifact.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from qcompiler.errors import UnsupportedByTargetError, UnsupportedOpError
from qcompiler.ir import Graph, Node, Value
from qcompiler.passmanager import ProgressFn, no_progress
from qcompiler.plan import precision_of
from qcompiler.targets.base import VIEWS, Region, is_view
from qcompiler.targets.branches import Guards, guarded, guards_of, in_order
from qcompiler.types import Array, Precision


@dataclass(frozen=True, slots=True)
class KernelCall:
    """How one node (or a group that ends in it) is computed by a generated kernel.

    Attributes:
        kernel: Name of the generator, for reports and symbol names.
        key: Everything that determines the PrimFunc; equal keys share one.
        build: Makes the PrimFunc for a symbol name.
        inputs: Values read at run time, in the kernel's argument order.
        constants: Packed arrays, after the inputs in the argument order.
        macs: Multiply-accumulates of one call, 0 where that means nothing.
        covers: Nodes computed by this call besides the node itself (their results are not needed
            elsewhere).
    """

    kernel: str
    key: Hashable
    build: Callable[[str], Any]
    inputs: tuple[Value, ...]
    constants: tuple[Array, ...] = ()
    macs: int = 0
    covers: tuple[Node, ...] = ()


LowerNode = Callable[[Node], "KernelCall | None"]
"""Returns how a node is computed, or None where no generator serves it."""


@dataclass
class Lowered:
    """An IRModule ready to build, and what goes beside it.

    Attributes:
        module: TVM IRModule with `main`.
        parameters: Packed constants in the order of `main`'s arguments after the inputs.
        parameter_names: Their names.
        regions: Kernel calls in order.
        graph: The graph that was lowered.
        notes: What the user should know, one sentence each.
    """

    module: Any
    parameters: list[Array]
    parameter_names: list[str]
    regions: list[Region]
    graph: Graph
    notes: list[str] = field(default_factory=list)


@dataclass
class _Plan:
    """What is emitted, in order: kernel calls, views, and float regions."""

    steps: list[Node | tuple[Node, ...]] = field(default_factory=list)
    calls: dict[Node, KernelCall] = field(default_factory=dict)
    guards: dict[Node, Guards] = field(default_factory=dict)


def lower_graph(
    graph: Graph, lower_node: LowerNode, target: Any, progress: ProgressFn = no_progress
) -> Lowered:
    """Lower a verified INTEGER graph.

    Args:
        graph: The graph, after the target's passes.
        lower_node: The target's lowering table.
        target: TVM target, for the float regions' code.
        progress: Called per node.

    Raises:
        UnsupportedByTargetError: Nodes that neither we nor TVM can compile, all in one message.
        CodegenError: A generator produced something TVM refuses.
    """
    return _Emitter(graph, target, progress).run(_plan(graph, lower_node))


def _plan(graph: Graph, lower_node: LowerNode) -> _Plan:
    plan = _Plan(guards=guards_of(graph))
    covered: set[Node] = set()
    # Consumers first: a call may cover its producers (quantize + transpose in one kernel).
    for node in reversed(graph.nodes):
        if node in covered or is_view(node):
            continue
        call = lower_node(node)
        if call is not None:
            plan.calls[node] = call
            covered.update(call.covers)
    run: list[Node] = []

    def flush() -> None:
        if run:
            plan.steps.append(tuple(run))
            run.clear()

    for node in in_order(graph, plan.guards) if plan.guards else graph.nodes:
        if node in covered:
            continue
        if run and plan.guards.get(node) != plan.guards.get(run[-1]):
            flush()
        if node in plan.calls or is_view(node):
            # A view in the middle of a float region would only cut it in two.
            if node.op.name in VIEWS and run and not node.input(0).type.is_quantized:
                run.append(node)
                continue
            flush()
            plan.steps.append(node)
        else:
            run.append(node)
    flush()
    return plan


class _Emitter:
    def __init__(self, graph: Graph, target: Any, progress: ProgressFn) -> None:
        from tvm import relax

        self.relax = relax
        self.graph = graph
        self.target = target
        self.progress = progress
        self.bb = relax.BlockBuilder()
        self.env: dict[Value, Any] = {}
        self.params: list[Any] = []
        self.arrays: list[Array] = []
        self.names: list[str] = []
        self.shared: dict[tuple[str, bytes], Any] = {}
        self.functions: dict[Hashable, Any] = {}
        self.regions: list[Region] = []

    def run(self, plan: _Plan) -> Lowered:
        relax = self.relax
        for name, v in self.graph.outputs:
            # TVM takes the strides of arrays without elements for wrong ones beyond one axis.
            if v.type.size == 0 and not v.is_constant:
                raise UnsupportedByTargetError(
                    f"the output {name!r} of shape {list(v.shape)} has no elements"
                )
        self.float_regions = _import_regions(plan, self.graph, self.target)
        # Where some part of a branch cannot be left out, nothing that it reads may be.
        free = all(r.is_kernels for s, r in self.float_regions.items() if plan.guards.get(s[0]))
        self.guards = plan.guards if free else {}
        inputs = [self._var(f"input{i}", v.shape, v) for i, v in enumerate(self.graph.inputs)]
        self.env.update(zip(self.graph.inputs, inputs, strict=True))
        # Parameters are arguments of main, so they must exist before its body is emitted.
        self._collect_parameters(plan)
        with self.bb.function("main", [*inputs, *self.params]):
            with self.bb.dataflow():
                for i, step in enumerate(plan.steps):
                    self.progress("lower", i, len(plan.steps))
                    if isinstance(step, tuple):
                        self._region(step)
                    elif step in plan.calls:
                        self._call(step, plan.calls[step])
                    else:
                        self._view(step)
                outs = [self._result(v) for v in self.graph.output_values]
                result = self.bb.emit_output(outs[0] if len(outs) == 1 else relax.Tuple(outs))
            self.bb.emit_func_output(result)
        self.progress("lower", len(plan.steps), len(plan.steps))
        return Lowered(self.bb.get(), self.arrays, self.names, self.regions, self.graph)

    # ---------------------------------------------------------------- parameters

    def _collect_parameters(self, plan: _Plan) -> None:
        self.call_params: dict[Node, list[Any]] = {}
        for step in plan.steps:
            nodes = step if isinstance(step, tuple) else (step,)
            for node in nodes:
                call = plan.calls.get(node)
                if call is not None:
                    self.call_params[node] = [
                        self._parameter(f"{node.name}.{i}", a) for i, a in enumerate(call.constants)
                    ]
                    operands: Sequence[Value] = call.inputs
                else:
                    operands = () if isinstance(step, tuple) else node.operands
                for v in operands:
                    if v.is_constant and v not in self.env:
                        self.env[v] = self._parameter(v.name, v.array())
        self.region_params: dict[Any, Any] = {
            constant: self._parameter(f"float{i}.{k}", constant.value.numpy())
            for i, region in enumerate(self.float_regions.values())
            for k, constant in enumerate(region.large_constants())
        }
        for v in self.graph.output_values:
            if v.is_constant and v not in self.env:
                self.env[v] = self._parameter(v.name, v.array())

    def _parameter(self, name: str, array: Array) -> Any:
        array = np.ascontiguousarray(array).reshape(array.shape)  # a scalar stays one
        key = (f"{array.dtype.str}{array.shape}", array.tobytes())
        found = self.shared.get(key)
        if found is None:
            dtype = array.dtype.name
            found = self.relax.Var(
                f"p{len(self.params)}", self.relax.TensorType(array.shape, dtype)
            )
            self.shared[key] = found
            self.params.append(found)
            self.arrays.append(array)
            self.names.append(name)
        return found

    def _var(self, name: str, shape: tuple[int, ...], v: Value) -> Any:
        return self.relax.Var(name, self.relax.TensorType(shape, v.dtype.numpy.name))

    # ------------------------------------------------------------------ emitting

    def _call(self, node: Node, call: KernelCall) -> None:
        relax = self.relax
        guards = self.guards.get(node, ())
        key = (call.key, tuple((g.when, g.condition.shape) for g in guards))
        function = self.functions.get(key)
        if function is None:
            symbol = f"{call.kernel}_{len(self.functions)}"
            built = call.build(symbol)
            if guards:
                built = guarded(built, guards, len(node.outputs))
            function = self.bb.add_func(built, symbol)
            self.functions[key] = function
        types = [relax.TensorType(v.shape, v.dtype.numpy.name) for v in node.outputs]
        args = [self.env[v] for v in call.inputs] + self.call_params[node]
        args += [self.env[g.condition] for g in guards]
        out = self.bb.emit(relax.call_tir(function, args, types[0] if len(types) == 1 else types))
        if len(types) == 1:
            self.env[node.output] = out
        else:
            for i, v in enumerate(node.outputs):
                self.env[v] = self.bb.emit(relax.TupleGetItem(out, i))
        covered = tuple(dict.fromkeys(s for n in (*call.covers, node) for s in n.sources))
        self.regions.append(
            Region(
                node.name,
                tuple(n.op.name for n in (*call.covers, node)),
                covered,
                precision_of(node),
                (str(function.name_hint),),
                call.macs,
            )
        )

    def _view(self, node: Node) -> None:
        shape = node.output.shape
        source = self.env[node.input(0)]
        if node.input(0).shape == shape:
            self.env[node.output] = source
        else:
            self.env[node.output] = self.bb.emit(self.relax.op.reshape(source, shape))

    def _region(self, nodes: tuple[Node, ...]) -> None:
        imported = self.float_regions[nodes]
        if not imported.outputs:
            return
        prefix = f"float{len(self.regions)}"
        guards = self.guards.get(nodes[0], ())
        results, symbols = imported.emit(self.bb, self.env, self.region_params, prefix, guards)
        self.env.update(results)
        self.regions.append(
            Region(
                nodes[0].name if len(nodes) == 1 else f"{nodes[0].name}..{nodes[-1].name}",
                tuple(n.op.name for n in nodes),
                tuple(dict.fromkeys(s for n in nodes for s in n.sources)),
                Precision.FP32,
                symbols,
            )
        )

    def _result(self, v: Value) -> Any:
        # A result must be a tensor of its own, not an input or a parameter.
        own = v
        while own.producer is not None and is_view(own.producer):
            own = own.producer.input(0)
        if own.producer is None:
            from tvm import topi

            return self.bb.emit_te(topi.identity, self.env[v])
        return self.env[v]


def _import_regions(plan: _Plan, graph: Graph, target: Any) -> dict[tuple[Node, ...], Any]:
    """Import every float region; all refusals become one error.

    Raises:
        UnsupportedOpError: Operators that neither we nor TVM have.
        UnsupportedByTargetError: Operators that TVM has, and refuses in this form.
    """
    from qcompiler.targets.tvm_regions import FloatRegion, import_region

    regions: dict[tuple[Node, ...], FloatRegion] = {}
    refused: list[UnsupportedOpError | UnsupportedByTargetError] = []
    for step in plan.steps:
        if not isinstance(step, tuple):
            continue
        try:
            regions[step] = import_region(step, graph, target)
        except (UnsupportedOpError, UnsupportedByTargetError) as error:
            refused.append(error)
    if refused:
        lines = "\n  ".join(e.message for e in refused)
        message = f"{graph.name!r} cannot be compiled because of:\n  {lines}"
        unknown = [e for e in refused if isinstance(e, UnsupportedOpError)]
        if unknown:
            operators = tuple(sorted({op for e in unknown for op in e.operators}))
            raise UnsupportedOpError(message, operators=operators, node=unknown[0].node)
        raise UnsupportedByTargetError(message, node=refused[0].node)
    return regions
