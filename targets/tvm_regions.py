# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""Float regions: operators without a kernel of ours go through TVM's own ONNX importer.

A run of such nodes is exported to ONNX, imported to Relax, legalized and fused as a module of its
own (so TVM's passes never touch our kernels), scheduled for a CPU, and its calls are copied into
our `main`, where memory planning sees one function.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qcompiler.errors import QCompilerError, UnsupportedByTargetError, UnsupportedOpError
from qcompiler.ir import Graph, Node, Value
from qcompiler.targets.branches import Guards, guarded
from qcompiler.types import DType

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

    @property
    def is_kernels(self) -> bool:
        """Whether it only calls generated kernels, which can be left out under a condition."""
        from tvm import relax

        for block in self.module["main"].body.blocks:
            for binding in block.bindings:
                value = getattr(binding, "value", None)
                if isinstance(value, relax.Call):
                    name = getattr(value.op, "name", "")
                    if name not in ("relax.call_tir", "relax.reshape"):
                        return False
        return True

    def emit(
        self,
        bb: Any,
        env: Mapping[Value, Any],
        parameters: Mapping[Any, Any],
        prefix: str,
        guards: Guards = (),
    ) -> tuple[dict[Value, Any], tuple[str, ...]]:
        """Emit the region's calls into a dataflow block; return its results and the symbols called.

        Args:
            bb: Relax BlockBuilder inside a dataflow block.
            env: Value -> Relax expression.
            parameters: Large constant -> parameter of the function under construction.
            prefix: Prefix of function names, unique in the module under construction.
            guards: Conditions under which the kernels run.
        """
        conditions = [env[g.condition] for g in guards]
        inliner = _Inliner(bb, self.module, parameters, prefix, guards, conditions)
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
        UnsupportedOpError: TVM has no converter for an operator.
        UnsupportedByTargetError: TVM's importer or code generator refuses an operator.
    """
    try:
        return _import(nodes, graph, target)
    except UnsupportedByTargetError:
        for node in nodes if len(nodes) > 1 else ():
            _import((node,), graph, target)  # names the one that TVM refuses, if it is one
        raise


def _import(nodes: tuple[Node, ...], graph: Graph, target: Any) -> FloatRegion:
    import tvm
    from tvm import relax

    from qcompiler.onnx_export import subgraph_to_onnx

    inputs, outputs = region_values(nodes, graph)
    _check_forms(nodes, inputs)
    model = subgraph_to_onnx(nodes, inputs, outputs)
    _check_operators(nodes, model)
    try:
        module = _from_onnx(model)
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
        where = repr(nodes[0].name)
        where += "" if len(nodes) == 1 else f" to {nodes[-1].name!r}"
        reason = (str(error).strip().splitlines() or [""])[-1]
        raise UnsupportedByTargetError(
            f"{what} ({where}): TVM cannot compile it: {type(error).__name__}: {reason}",
            node=nodes[0].name,
        ) from error
    _check_results(module, outputs)
    return FloatRegion(schedule_module(module), tuple(inputs), tuple(outputs))


_HELD_WIDER = (DType.INT4, DType.UINT4, DType.BFLOAT16)


def _check_forms(nodes: tuple[Node, ...], inputs: list[Value]) -> None:
    """Refuse forms that TVM compiles to other values than ONNX defines, or to code that fails.

    Raises:
        UnsupportedByTargetError: Such a form.
    """
    for node in nodes:
        reason = _wrong_form(node)
        for v in node.operands:
            if v in inputs and v.dtype in _HELD_WIDER:
                reason = f"{v.dtype.value} tensors are held wider than TVM expects"
        if reason:
            raise UnsupportedByTargetError(f"{_label(node)} ({node.name!r}): {reason}",
                                           node=node.name)  # fmt: skip


def _wrong_form(node: Node) -> str:
    """Return what is wrong with TVM's code for a node, or an empty text."""
    x = node.operands[0] if node.operands else None
    if x is None:
        return ""
    if node.op.name != "opaque":
        return ""
    from qcompiler.onnx_export_ops import opaque_proto

    proto = opaque_proto(node)
    text = {a.name: a.s.decode("utf-8", "replace") for a in proto.attribute if a.s}
    left = proto.op_type == "BitShift" and text.get("direction") == "LEFT"
    if left and x.dtype.value.startswith("int"):
        return "TVM shifts signed integers otherwise than ONNX where the shift is out of range"
    if proto.op_type == "RoiAlign" and text.get("mode") == "max":
        return "TVM takes the greatest sample before interpolating, ONNX after"
    if proto.op_type == "TopK" and x.dtype is DType.UINT64:
        return "TVM sorts no uint64"
    return ""


def _check_operators(nodes: tuple[Node, ...], model: Any) -> None:
    """Refuse operators that TVM's importer does not know, before it starts.

    Raises:
        UnsupportedOpError: Such operators, with the nodes of each.
    """
    from tvm.relax.frontend.onnx import onnx_frontend

    known = onnx_frontend._get_convert_map()
    unknown = {n.op_type for n in model.graph.node} - set(known) - {"Constant"}
    if not unknown:
        return
    held: dict[str, list[str]] = {op: [] for op in unknown}
    for node in nodes:
        names = held.get(_label(node))
        if names is not None:
            names.append(node.name)
    lines = [
        f"{op} ({', '.join(map(repr, names)) or repr(nodes[0].name)}): "
        "neither this compiler nor TVM has kernels for it"
        for op, names in sorted(held.items())
    ]
    raise UnsupportedOpError("\n  ".join(lines), operators=tuple(sorted(held)), node=nodes[0].name)


def _from_onnx(model: Any) -> Any:
    """Run TVM's importer without the lines that it prints on its own account."""
    from tvm.relax.frontend.onnx import onnx_frontend

    # It announces each failure by print() before it raises; the error says the same.
    vars(onnx_frontend)["print"] = _say_nothing
    importer = onnx_frontend.ONNXGraphImporter({}, "float32", keep_params_in_input=False)
    opset = next((o.version for o in model.opset_import if o.domain in ("", "ai.onnx")), 1)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about renaming values: names do not matter here
            return importer.from_onnx(model.graph, opset)
    except Exception:
        importer.bb._end_block()  # else its destructor complains on stderr about an open block
        raise


def _say_nothing(*args: object, **kwargs: object) -> None:
    del args, kwargs


def _check_results(module: Any, outputs: list[Value]) -> None:
    """Refuse a region whose results TVM types otherwise than ONNX does.

    Raises:
        UnsupportedByTargetError: Another dtype or shape, for which results are read wrongly.
    """
    returned = module["main"].ret_ty
    fields = list(getattr(returned, "fields", None) or [returned])
    for v, t in zip(outputs, fields, strict=True):
        node = v.producer
        if node is None:
            continue
        found = f"{t.dtype}{_extents(t.shape)}"
        if found != f"{v.dtype.numpy.name}{list(v.shape)}":
            raise UnsupportedByTargetError(
                f"{_label(node)} ({node.name!r}): TVM compiles it to {found}, "
                f"expected {v.dtype.value}{list(v.shape)}",
                node=node.name,
            )


def _extents(shape: Any) -> list[Any]:
    """Return an extent per axis; open ones as TVM writes them."""
    from tvm import tirx

    return [int(d) if isinstance(d, (int, tirx.IntImm)) else str(d) for d in shape or ()]


def _label(node: Node) -> str:
    from qcompiler.onnx_export_ops import opaque_proto

    return opaque_proto(node).op_type if node.op.name == "opaque" else node.op.name


class _Inliner:
    """Copies the calls of an imported `main` into another function under construction."""

    def __init__(
        self,
        bb: Any,
        module: Any,
        parameters: Mapping[Any, Any],
        prefix: str,
        guards: Guards = (),
        conditions: Sequence[Any] = (),
    ) -> None:
        self.guards = guards
        self.conditions = conditions
        self.results: dict[str, int] = {}
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
                if self.guards:
                    function = guarded(function, self.guards, self.results[name])
                self.functions[name] = self.bb.add_func(function, symbol)
            self.calls.append(str(self.functions[name].name_hint))
            return self.functions[name]
        if isinstance(e, relax.Tuple):
            return relax.Tuple([self._expr(f, env) for f in e.fields])
        if isinstance(e, relax.TupleGetItem):
            return relax.TupleGetItem(self._expr(e.tuple_value, env), e.index)
        if isinstance(e, relax.Call):
            if self.guards and getattr(e.op, "name", "") == "relax.call_tir":
                returned = e.ty_args[0]
                count = len(returned.fields) if isinstance(returned, relax.TupleType) else 1
                self.results[str(e.args[0].name_hint)] = count
            args = [self._expr(a, env) for a in e.args]
            if self.guards and getattr(e.op, "name", "") == "relax.call_tir":
                args[1] = relax.Tuple([*args[1].fields, *self.conditions])
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
