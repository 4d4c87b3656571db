# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""Float regions: operators without a kernel of ours go through TVM's own ONNX importer.

A run of such nodes is exported to ONNX, imported to Relax, legalized and fused as a module of its
own (so TVM's passes never touch our kernels), scheduled for a CPU, and its calls are copied into
our `main`, where memory planning sees one function.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qcompiler.errors import QCompilerError, UnsupportedByTargetError
from qcompiler.ir import Graph, Node, Value

_INLINE_BYTES = 4096  # constants up to this size may live in the library
_PARALLEL_FROM = 1 << 15  # elements; below that starting the thread pool costs more than it gains


def region_values(nodes: tuple[Node, ...], graph: Graph) -> tuple[list[Value], list[Value]]:
    """Return the run-time values that a run of nodes reads from outside and gives to outside."""
    inside = set(nodes)
    inputs: dict[Value, None] = {}
    outputs: dict[Value, None] = {}
    for node in nodes:
        for v in node.operands:
            if not v.is_constant and v.producer not in inside:
                inputs.setdefault(v)
        for v in node.outputs:
            if graph.is_output(v) or any(u not in inside for u in v.users):
                outputs.setdefault(v)
    return list(inputs), list(outputs)


@dataclass(frozen=True)
class FloatRegion:
    """A run of float nodes as a scheduled TVM module.

    Attributes:
        module: IRModule with `main`.
        inputs: Values that `main` takes, in order.
        outputs: Values that it returns, in order.
    """

    module: Any
    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]

    def large_constants(self) -> list[Any]:
        """Constants that belong among the parameters rather than into the library."""
        from tvm.ir.expr import GenericConst

        found: dict[Any, None] = {}
        for block in self.module["main"].body.blocks:
            for binding in block.bindings:
                for e in _operands(binding.value):
                    if isinstance(e, GenericConst) and e.value.numpy().nbytes > _INLINE_BYTES:
                        found[e] = None
        return list(found)

    def emit(
        self, bb: Any, env: Mapping[Value, Any], parameters: Mapping[Any, Any], prefix: str
    ) -> tuple[dict[Value, Any], tuple[str, ...]]:
        """Emit the region's calls into a dataflow block; return its results and the symbols called.

        Args:
            bb: Relax BlockBuilder inside a dataflow block.
            env: Value -> Relax expression.
            parameters: Large constant -> parameter of the function under construction.
            prefix: Prefix of function names, unique in the module under construction.
        """
        inliner = _Inliner(bb, self.module, parameters, prefix)
        results = inliner.inline([env[v] for v in self.inputs])
        return dict(zip(self.outputs, results, strict=True)), tuple(inliner.calls)


def _operands(value: Any) -> list[Any]:
    """Leaves of a binding's value."""
    fields = getattr(value, "args", None) or getattr(value, "fields", None) or ()
    leaves = []
    for e in fields:
        nested = _operands(e)
        leaves += nested or [e]
    return leaves


def import_region(nodes: tuple[Node, ...], graph: Graph, target: Any) -> FloatRegion:
    """Import a run of float nodes, in topological order, and schedule it for a CPU.

    Raises:
        UnsupportedByTargetError: TVM's importer or code generator refuses an operator.
    """
    import tvm
    from tvm import relax
    from tvm.relax.frontend.onnx import from_onnx

    from qcompiler.onnx_export import subgraph_to_onnx

    inputs, outputs = region_values(nodes, graph)
    model = subgraph_to_onnx(nodes, inputs, outputs)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about renaming values: names do not matter here
            module = from_onnx(model, keep_params_in_input=False)
        with target:
            module = tvm.transform.Sequential(
                [
                    relax.transform.DecomposeOpsForInference(),
                    relax.transform.CanonicalizeBindings(),
                    relax.backend.DispatchSampling(),
                    relax.backend.DispatchSortScan(),
                    relax.transform.LegalizeOps(),
                    relax.transform.AnnotateTIROpPattern(),
                    relax.transform.FoldConstant(),
                    relax.transform.FuseOps(),
                    relax.transform.FuseTIR(),
                    relax.transform.RewriteDataflowReshape(),
                    relax.transform.DeadCodeElimination(),
                ]
            )(module)
    # TVM's importer raises whatever its converters happen to hit; each is a refusal for us.
    except Exception as error:
        if isinstance(error, QCompilerError):
            raise
        what = ", ".join(sorted({_label(n) for n in nodes}))
        reason = (str(error).strip().splitlines() or [type(error).__name__])[-1]
        raise UnsupportedByTargetError(
            f"TVM cannot compile {what} (nodes {nodes[0].name} to {nodes[-1].name}): {reason}",
            node=nodes[0].name,
        ) from error
    return FloatRegion(schedule_module(module), tuple(inputs), tuple(outputs))


def _label(node: Node) -> str:
    return node.name if node.op.name == "opaque" else node.op.name


class _Inliner:
    """Copies the calls of an imported `main` into another function under construction."""

    def __init__(self, bb: Any, module: Any, parameters: Mapping[Any, Any], prefix: str) -> None:
        self.bb = bb
        self.module = module
        self.parameters = parameters
        self.prefix = prefix
        self.functions: dict[str, Any] = {}
        self.calls: list[str] = []

    def inline(self, args: list[Any]) -> list[Any]:
        from tvm import relax
        from tvm.ir.expr import GenericConst

        main = self.module["main"]
        env: dict[Any, Any] = dict(zip(main.params, args, strict=True))
        body = main.body
        for block in body.blocks:
            for binding in block.bindings:
                value = self._expr(binding.value, env)
                if isinstance(binding, relax.MatchCast):
                    env[binding.var] = self.bb.match_cast(value, binding.ty)
                elif isinstance(value, (relax.Var, GenericConst, relax.Tuple)):
                    env[binding.var] = value
                else:
                    env[binding.var] = self.bb.emit(value)
        result = self._expr(body.body, env)
        if isinstance(result, relax.Tuple):
            return list(result.fields)
        if isinstance(main.ret_ty, relax.TupleType):
            count = len(main.ret_ty.fields)
            return [self.bb.emit(relax.TupleGetItem(result, i)) for i in range(count)]
        return [result]

    def _expr(self, e: Any, env: Mapping[Any, Any]) -> Any:
        import tvm
        from tvm import relax

        if isinstance(e, relax.Var):
            return env[e]
        if e in self.parameters:
            return self.parameters[e]
        if isinstance(e, tvm.ir.GlobalVar):
            name = e.name_hint
            if name not in self.functions:
                symbol = f"{self.prefix}_{name}"
                function = self.module[e].without_attr("global_symbol")
                self.functions[name] = self.bb.add_func(function, symbol)
            self.calls.append(str(self.functions[name].name_hint))
            return self.functions[name]
        if isinstance(e, relax.Tuple):
            return relax.Tuple([self._expr(f, env) for f in e.fields])
        if isinstance(e, relax.TupleGetItem):
            return relax.TupleGetItem(self._expr(e.tuple_value, env), e.index)
        if isinstance(e, relax.Call):
            args = [self._expr(a, env) for a in e.args]
            return relax.Call(e.op, args, e.attrs, e.ty_args)
        return e


def schedule_module(module: Any) -> Any:
    """Inline what is elementwise, and run large outer loops on the thread pool."""
    from tvm import tirx

    for var, function in list(module.functions_items()):
        if isinstance(function, tirx.PrimFunc):
            module.update_func(var, _schedule(function))
    return module


def _schedule(function: Any) -> Any:
    import tvm
    from tvm.s_tir import Schedule
    from tvm.s_tir.schedule import ScheduleError

    if not (function.attrs and "s_tir" in function.attrs) and not _has_blocks(function):
        return function
    schedule = Schedule(tvm.IRModule({"main": function}))
    try:
        blocks = schedule.get_child_blocks(schedule.get_sblock("root"))
    except ScheduleError:
        return function
    for block in blocks[:-1]:
        try:
            schedule.compute_inline(block)
        except ScheduleError:
            continue  # a reduction, or read more than elementwise: it keeps its own loops
    for block in schedule.get_child_blocks(schedule.get_sblock("root")):
        try:
            _parallelize(schedule, block)
        except ScheduleError:
            continue
    return schedule.mod["main"]


def _has_blocks(function: Any) -> bool:
    return "sblock" in function.script()


def _parallelize(schedule: Any, block: Any) -> None:
    loops = schedule.get_loops(block)
    kinds = [str(v.iter_type) for v in schedule.get(block).iter_vars]
    total = 1
    spatial: list[Any] = []
    for loop, kind in zip(loops, kinds, strict=False):
        extent = schedule.get(loop).extent
        total *= int(extent)
        if kind == "0" and len(spatial) == len([s for s in spatial if s is not None]):
            spatial.append(loop)
    if total < _PARALLEL_FROM or len(spatial) < 2:
        return
    schedule.parallel(schedule.fuse(*spatial[:-1]))
