# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""ONNX models as graphs: opsets 7 to 28, external data, symbolic batch, quantized (QDQ) models.

Nodes are converted in topological order with all shapes known, so that shape arithmetic folds as
it comes. Operators without a converter stay whole as `opaque` nodes. What cannot be imported is
collected and reported at once.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import onnx
import onnx.checker
import onnx.reference
import onnx.shape_inference

from qcompiler import (
    onnx_import_composed,
    onnx_import_einsum,
    onnx_import_movement,
    onnx_import_nbits,
    onnx_import_norms,
    onnx_import_ops,
    onnx_import_qdq,
    onnx_import_quantized,
    onnx_import_recurrent,
)
from qcompiler.errors import ModelError, QCompilerError, ShapeError, UnsupportedOpError
from qcompiler.ir import Graph, Value
from qcompiler.onnx_import_context import (
    CONVERTERS,
    MAX_FOLDED_BYTES,
    Builder,
    OpContext,
    attributes_of,
    check_folded_size,
    find_schema,
    required_schema,
    standalone,
)
from qcompiler.onnx_import_control import (
    Branch,
    Unroller,
    convert_if,
    convert_loop,
    convert_scan,
    unroll_limit,
)
from qcompiler.onnx_import_function import function_body
from qcompiler.onnx_import_inputs import Declared, Extent, bind_inputs, declared_shape, mark_batch
from qcompiler.onnx_import_model import (
    NodeChecker,
    OnnxModel,
    label,
    needed_nodes,
    normal_domain,
    one_line,
    plain_reads,
    read_model,
    reads,
    subgraphs,
)
from qcompiler.onnx_import_tensors import (
    dtype_of,
    from_onnx_array,
    make_tensor,
    make_type,
    read_tensor,
    read_type,
    to_onnx_array,
)
from qcompiler.ops import OpKind, Stage
from qcompiler.types import Array, Shape, TensorType

__all__ = ["ModelSource", "OnnxModel", "input_shapes_of", "load_onnx", "model_digest", "read_model"]

CONVERTER_MODULES = (
    onnx_import_ops,
    onnx_import_norms,
    onnx_import_movement,
    onnx_import_qdq,
    onnx_import_nbits,
    onnx_import_quantized,
    onnx_import_einsum,
    onnx_import_recurrent,
    onnx_import_composed,
)
"""Modules whose import fills the table of converters."""

_CONTROL_FLOW = frozenset({"If", "Loop", "Scan"})
_INTEGERS_TOO = frozenset({"MatMul", "Gemm", "Resize", "Upsample"})
_REFERENCE_ERRORS = (
    *(RuntimeError, ValueError, TypeError, IndexError, KeyError),
    *(NotImplementedError, ArithmeticError, MemoryError),
)
_RANDOM = frozenset(
    {
        "RandomNormal",
        "RandomNormalLike",
        "RandomUniform",
        "RandomUniformLike",
        "Multinomial",
        "Bernoulli",
    }
)


ModelSource: TypeAlias = "str | os.PathLike[str] | onnx.ModelProto | OnnxModel"
"""What a model can be given as."""


def model_digest(model: ModelSource) -> str:
    """Return the sha256 of the model's file (of the serialized model if in memory), as hex.

    Raises:
        ModelError: Not a readable ONNX file.
    """
    return model.digest if isinstance(model, OnnxModel) else read_model(model).digest


def input_shapes_of(model: ModelSource) -> dict[str, tuple[Extent, ...] | None]:
    """Return the declared shape of every input: numbers, names of symbols, None where open.

    Raises:
        ModelError: Not a readable ONNX file.
    """
    proto = (model if isinstance(model, OnnxModel) else read_model(model)).proto.graph
    defaults = {t.name for t in proto.initializer}
    return {v.name: declared_shape(v) for v in proto.input if v.name not in defaults}


def load_onnx(
    model: ModelSource,
    *,
    input_shapes: Mapping[str, Sequence[int]] | None = None,
    freeze: Mapping[str, Array | float | bool] | None = None,
    sample_shapes: Mapping[str, Shape] | None = None,
    max_unrolled: int | None = None,
) -> Graph:
    """Import an ONNX model.

    Args:
        model: Path of the file, a model in memory, or what `read_model` returned.
        input_shapes: Shapes of inputs with symbolic extents, by name. A symbolic first extent is
            the batch, 1 unless given here; an extent named like one that is bound has its value.
        freeze: Inputs that become constants, by name.
        sample_shapes: Shapes of the arrays of samples, by name: where an extent is still open, the
            samples say what the model is used with.
        max_unrolled: Nodes that unrolled loops may amount to; None takes the environment variable
            QCOMPILER_MAX_UNROLLED, or 10,000.

    Returns:
        A verified graph at stage FLOAT, or QDQ if the model has quantized tensors. Its inputs and
        results carry the model's names in the model's order.

    Raises:
        ModelError: Not a readable, valid ONNX model.
        UnsupportedOpError: Operators or dtypes that cannot be imported, all of them at once.
        ShapeError: Shapes that do not fit, or symbolic extents without a value.
        UsageError: An unknown input name in `input_shapes` or `freeze`; a limit below 1.
    """
    source = model if isinstance(model, OnnxModel) else read_model(model)
    return _Importer(source, unroll_limit(max_unrolled)).run(
        dict(input_shapes or {}), dict(freeze or {}), dict(sample_shapes or {})
    )


@dataclass
class _Scope:
    """Names of one ONNX graph: values, not yet read initializers, and the graph around it.

    A name bound to None stands for a result that could not be imported.
    """

    values: dict[str, Value | None]
    initializers: dict[str, onnx.TensorProto]
    parent: _Scope | None = None


class _Importer:
    def __init__(self, model: OnnxModel, max_unrolled: int) -> None:
        self.model = model
        self.unroller = Unroller(max_unrolled)
        self.opsets = model.opsets
        proto = model.proto.graph
        taken = {v.name for v in proto.input} | {t.name for t in proto.initializer}
        taken.update(o for node in proto.node for o in node.output)
        self.graph = Graph(proto.name or "main")
        self.builder = Builder(self.graph, taken)
        self.checker = NodeChecker(self.opsets, int(model.proto.ir_version))
        self.unsupported: dict[tuple[str, str], list[str]] = {}
        self.counts: dict[str, int] = {}
        self.probing = False

    # ---------------------------------------------------------------------------- whole model

    def run(
        self,
        shapes: Mapping[str, Sequence[int]],
        freeze: dict[str, object],
        sample_shapes: dict[str, Shape],
    ) -> Graph:
        proto = self.model.proto.graph
        scope = _Scope({}, {t.name: t for t in proto.initializer})
        inputs = [self._declared(v) for v in proto.input if v.name not in scope.initializers]
        optional = [v.name for v in proto.input if v.name in scope.initializers]
        self._refuse_if_collected()
        bound = bind_inputs(inputs, shapes, freeze, optional, sample_shapes)
        for d in inputs:
            if d.name in bound.frozen:
                scope.values[d.name] = self.builder.constant(
                    bound.frozen[d.name], d.name, d.dtype, exact=True
                )
            else:
                type = TensorType(bound.shapes[d.name], d.dtype)
                scope.values[d.name] = self.graph.add_input(d.name, type)
        for name in optional:
            if name in freeze:
                _, dtype = read_tensor(scope.initializers[name], self.model.folder, repr(name))
                data = np.asarray(freeze[name], dtype.numpy)
                scope.values[name] = self.builder.constant(data, name, dtype, exact=True)
        self._convert_all(proto, scope, set())  # its results are read as they are typed
        self._refuse_if_collected()
        self._set_outputs(proto, scope, inputs)
        self.graph.eliminate_dead()
        if self._counts_steps(inputs, bound.shapes, freeze):
            for v in (*self.graph.inputs, *self.graph.output_values):
                v.batch_axis = None  # a run is one sequence: it cannot be cut into runs
        if any(v.type.is_quantized for v in self.graph.values()):
            self.graph.stage = Stage.QDQ
        return self.graph

    def _counts_steps(
        self, inputs: Sequence[Declared], shapes: Mapping[str, Shape], freeze: dict[str, object]
    ) -> bool:
        """Whether the open first extent of an input counts the steps of a recurrent operator.

        Then samples along it are one sequence, not a batch. Importing the model again with one
        step more tells.
        """
        steps = [n.input(0).shape[0] for n in self.graph.nodes if n.op.kind is OpKind.RECURRENT]
        first = [d.shape[0] for d in inputs if d.shape]
        open_first = {n for n in first if not isinstance(n, int)}
        if not steps or not open_first or self.probing:
            return False
        longer = {
            d.name: tuple(
                n + 1 if want in open_first and (want is not None or i == 0) else n
                for i, (want, n) in enumerate(zip(d.shape, shapes[d.name], strict=True))
            )
            for d in inputs
            if d.name not in freeze and d.shape is not None
        }
        probe = _Importer(self.model, self.unroller.limit)
        probe.probing = True
        try:
            other = probe.run(longer, freeze, {})
        except QCompilerError:
            return False
        found = [n.input(0).shape[0] for n in other.nodes if n.op.kind is OpKind.RECURRENT]
        return found != steps

    def _declared(self, info: onnx.ValueInfoProto) -> Declared:
        kind = info.type.WhichOneof("value")
        if kind != "tensor_type":
            self._collect("input", info.name, f"it is a {kind or 'value without type'}")
            kind = ""
        elem = info.type.tensor_type.elem_type
        try:
            dtype = dtype_of(elem if kind else onnx.TensorProto.FLOAT)
        except UnsupportedOpError as error:
            self._collect("input", info.name, error.message)
            dtype = dtype_of(onnx.TensorProto.FLOAT)
        return Declared(info.name, declared_shape(info), dtype)

    def _set_outputs(
        self, proto: onnx.GraphProto, scope: _Scope, inputs: Sequence[Declared]
    ) -> None:
        outputs: list[tuple[str, Value]] = []
        for info in proto.output:
            v = self._lookup(scope, info.name)
            if v is None:
                raise ModelError(f"nothing computes the output {info.name!r}")
            outputs.append((info.name, v))
        self.graph.set_outputs(outputs)
        shapes = {info.name: declared_shape(info) for info in proto.output}
        mark_batch(self.graph, inputs, shapes)

    # -------------------------------------------------------------------------------- problems

    def _collect(self, op: str, name: str, reason: str) -> None:
        self.unsupported.setdefault((op, reason), []).append(name)

    def _refuse_if_collected(self) -> None:
        if not self.unsupported:
            return
        lines = []
        for (op, reason), names in sorted(self.unsupported.items()):
            shown = ", ".join(repr(n) for n in names[:3])
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            lines.append(f"  {op} ({shown}{more}): {reason}")
        operators = tuple(sorted({op for op, _ in self.unsupported}))
        raise UnsupportedOpError(
            f"{self.model.name} cannot be compiled because of:\n" + "\n".join(lines),
            operators=operators,
        )

    # ----------------------------------------------------------------------------------- nodes

    def _lookup(self, scope: _Scope, name: str) -> Value | None:
        """Return the value of a name; None where it could not be imported."""
        at: _Scope | None = scope
        while at is not None:
            if name in at.values:
                return at.values[name]
            if name in at.initializers:
                data, dtype = read_tensor(
                    at.initializers[name], self.model.folder, f"initializer {name!r}"
                )
                at.values[name] = self.builder.constant(data, name, dtype, exact=True)
                return at.values[name]
            at = at.parent
        raise ModelError(f"{name!r} is read, and nothing defines it", value=name)

    def _convert_all(
        self, proto: onnx.GraphProto, scope: _Scope, plain: set[str] | None = None
    ) -> None:
        """Convert all nodes; `plain` are the results whose numbers are read, by default all."""
        nodes, outputs = needed_nodes(proto, self.model.name), {o.name for o in proto.output}
        read = {name for node in nodes for name in reads(node)} | outputs
        self.builder.plain |= plain_reads(nodes, outputs if plain is None else plain)
        for node in nodes:
            self._convert(node, scope, read)

    def _name(self, node: onnx.NodeProto) -> str:
        k = self.counts.get(node.op_type, 0)
        self.counts[node.op_type] = k + 1
        return self.builder.unique(node.name or f"{node.op_type}_{k}")

    def _convert(self, node: onnx.NodeProto, scope: _Scope, read: set[str]) -> None:
        domain = normal_domain(node.domain)
        name = self._name(node)
        try:
            self._check_known(node, domain)
            operands = [self._lookup(scope, n) if n else None for n in node.input]
            known = all(v is not None or not n for v, n in zip(operands, node.input, strict=True))
            if not known:
                results = None
            else:
                wanted = tuple(bool(o) and o in read for o in node.output)
                ctx = OpContext(
                    self.builder,
                    node,
                    name,
                    self.opsets[domain],
                    tuple(operands),
                    wanted,
                    attributes_of(node),
                )
                results = self._results(ctx, domain, scope)
        except UnsupportedOpError as error:
            self._collect(node.op_type, name, error.message)
            results = None
        except QCompilerError as error:
            if error.node is not None:
                raise
            kind = type(error) if isinstance(error, ModelError) else ModelError
            raise kind(f"{label(node)}: {error.message}", node=name, hint=error.hint) from None
        for i, output in enumerate(node.output):
            if output:
                scope.values[output] = results[i] if results and i < len(results) else None

    def _check_known(self, node: onnx.NodeProto, domain: str) -> None:
        """Refuse what cannot be imported whatever its operands; check the rest by its schema."""
        if node.op_type in _RANDOM and domain == "":
            raise UnsupportedOpError("its result is random")
        if (domain, node.op_type) in CONVERTERS and domain:
            return
        if find_schema(node.op_type, domain, self.opsets[domain]) is None:
            where = f"opset {self.opsets[domain]}" if not domain else f"domain {domain!r}"
            raise UnsupportedOpError(f"no operator of that name is known in {where}")
        self.checker.check(node)

    def _results(self, ctx: OpContext, domain: str, scope: _Scope) -> Sequence[Value | None] | None:
        self.builder.created.clear()
        if ctx.proto.op_type in _CONTROL_FLOW and domain == "":
            selected = self._control_flow(ctx, scope)
            self._take_names(ctx, selected)
            return selected
        results: Sequence[Value | None] | None = self._converted(ctx, domain)
        if results is None:
            expanded = self._expanded(ctx, domain, scope)
            if expanded is not None:
                return expanded
            results = self._opaque(ctx, domain)
        self._take_names(ctx, results)
        return results

    def _converted(self, ctx: OpContext, domain: str) -> Sequence[Value] | None:
        convert = CONVERTERS.get((domain, ctx.proto.op_type))
        if convert is None:
            return None
        try:
            return convert(ctx)
        except ShapeError:
            # Our rows take floats where ONNX takes integers too: such a node can stay opaque.
            # Of float operands the shapes really do not fit.
            integers = all(v is None or not v.dtype.is_float for v in ctx.inputs[:2])
            if ctx.proto.op_type in _INTEGERS_TOO and integers:
                return None
            raise

    def _take_names(self, ctx: OpContext, results: Sequence[Value | None]) -> None:
        """Give the results the model's names, and the node of the first one the node's name."""
        named = False
        for output, v in zip(ctx.proto.output, results, strict=False):
            if not output or v is None or v not in self.builder.created:
                continue
            del self.builder.created[v]
            v.name = self.graph.fresh(output)
            if v.producer is not None and not named:
                v.producer.name = self.graph.fresh(ctx.name)
                named = True

    # ----------------------------------------------------------------------------- control flow

    def _control_flow(self, ctx: OpContext, scope: _Scope) -> list[Value | None]:
        """Select between branches, or unroll a loop."""

        def open_graph(proto: onnx.GraphProto) -> Branch:
            # What does not depend on the graph's inputs is imported once for all iterations.
            shared = _Scope({}, {t.name: t for t in proto.initializer}, scope)
            nodes = needed_nodes(proto, self.model.name)
            read = {name for node in nodes for name in reads(node)}
            read |= {o.name for o in proto.output}
            for node in nodes:
                if node.op_type == "Constant":
                    self._convert(node, shared, read)

            def run(inputs: Sequence[Value | None]) -> list[Value | None]:
                names = [v.name for v in proto.input]
                inner = _Scope(dict(zip(names, inputs, strict=True)), {}, shared)
                for node in nodes:
                    if node.op_type != "Constant":
                        self._convert(node, inner, read)
                return [self._lookup(inner, o.name) for o in proto.output]

            return run

        if ctx.proto.op_type == "If":
            return convert_if(ctx, open_graph)
        convert = convert_loop if ctx.proto.op_type == "Loop" else convert_scan
        return convert(ctx, open_graph, self.unroller)

    # -------------------------------------------------------------------------------- functions

    def _expanded(
        self, ctx: OpContext, domain: str, scope: _Scope
    ) -> Sequence[Value | None] | None:
        """Import an operator that ONNX defines as a function by its body.

        None where it has no body, or something in the body cannot be imported: the operator can
        still stay opaque.
        """
        schema = find_schema(ctx.proto.op_type, domain, ctx.version)
        if schema is None or all(v is None or v.is_constant for v in ctx.inputs):
            return None
        types = [onnx.TypeProto() if v is None else make_type(v.type) for v in ctx.inputs]
        body = function_body(schema, ctx.proto, ctx.version, types)
        if body is None:
            return None
        inner = _Scope(dict(zip(body.input, ctx.inputs, strict=False)), {})
        outputs = [onnx.ValueInfoProto(name=o) for o in body.output[: len(ctx.proto.output)]]
        proto = onnx.GraphProto(node=body.node, output=outputs)
        kept = self.unsupported, self.opsets, self.checker
        self.unsupported = {}
        self.opsets = {**self.opsets, **{normal_domain(o.domain): o.version
                                         for o in body.opset_import}}  # fmt: skip
        self.checker = NodeChecker(self.opsets, int(self.model.proto.ir_version))
        try:
            self._convert_all(proto, inner)
            if self.unsupported:
                return None
            return [
                self._lookup(inner, o.name) if wanted else None
                for o, wanted in zip(outputs, ctx.wanted, strict=False)
            ]
        except ModelError:
            return None
        finally:
            self.unsupported, self.opsets, self.checker = kept

    # ------------------------------------------------------------------------------ opaque nodes

    def _opaque(self, ctx: OpContext, domain: str) -> Sequence[Value | None]:
        """Keep the node whole, or evaluate it where every operand is constant."""
        if any(True for _ in subgraphs(ctx.proto)):
            raise UnsupportedOpError("operators with inner graphs are not supported")
        schema = find_schema(ctx.proto.op_type, domain, ctx.version)
        if schema is None:
            raise UnsupportedOpError("this form of the operator is not supported")
        node = standalone(ctx, schema)
        if all(v is None or v.is_constant for v in ctx.inputs):
            folded = self._evaluate(ctx, node, domain)
            if folded is not None:
                return folded
        quantized = [v for v in ctx.inputs if v is not None and v.type.is_quantized]
        if quantized:
            raise UnsupportedOpError("it reads quantized integers")
        types = self._infer(ctx, node, schema, domain)
        results = iter(
            self.builder.emit(
                "opaque",
                ctx.inputs,
                {
                    "node": node.SerializeToString(deterministic=True),
                    "domain": domain,
                    "opset": ctx.version,
                },
                ctx.name,
                types=types,
            )
        )
        return [next(results) if o else None for o in node.output]

    def _infer(
        self, ctx: OpContext, node: onnx.NodeProto, schema: onnx.defs.OpSchema, domain: str
    ) -> list[TensorType]:
        types, data = {}, {}
        for name, v in zip(node.input, ctx.inputs, strict=False):
            if v is None:
                continue
            types[name] = make_type(v.type)
            if v.data is not None and v.type.size <= 1 << 16:
                data[name] = make_tensor(v.data, v.dtype, name)
        try:
            found = onnx.shape_inference.infer_node_outputs(
                schema,
                node,
                types,
                data,
                opset_imports=[onnx.helper.make_opsetid(domain, ctx.version)],
                ir_version=int(self.model.proto.ir_version),
            )
        except (onnx.shape_inference.InferenceError, onnx.checker.ValidationError) as error:
            raise ShapeError(one_line(error)) from None
        return [
            read_type(found.get(o, onnx.TypeProto()), f"its result {i}")
            for i, o in enumerate(node.output)
            if o
        ]

    def _evaluate(
        self, ctx: OpContext, node: onnx.NodeProto, domain: str
    ) -> Sequence[Value | None] | None:
        """Evaluate a node of constants by ONNX's reference; None where it cannot."""
        try:
            types = self._infer(ctx, node, required_schema(node, domain, ctx.version), domain)
        except (UnsupportedOpError, ShapeError):
            types = []  # the shape depends on the data: bounded by the operands
        for t in types:
            check_folded_size(t.shape, t.dtype, "a constant result")
        if sum(v.type.size * 8 for v in ctx.inputs if v is not None) > MAX_FOLDED_BYTES:
            return None
        feeds = {
            n: to_onnx_array(v.array(), v.dtype)
            for n, v in zip(node.input, ctx.inputs, strict=False)
            if v is not None
        }
        inputs = [
            onnx.helper.make_value_info(n, make_type(v.type))
            for n, v in zip(node.input, ctx.inputs, strict=False)
            if v is not None
        ]
        outputs = [onnx.helper.make_empty_tensor_value_info(o) for o in node.output if o]
        proto = onnx.helper.make_model(
            onnx.helper.make_graph([node], "constant", inputs, outputs),
            opset_imports=[onnx.helper.make_opsetid(domain, ctx.version)],
        )
        try:
            with np.errstate(all="ignore"):
                arrays = onnx.reference.ReferenceEvaluator(proto).run(None, feeds)
        except _REFERENCE_ERRORS:
            return None
        found = iter(arrays)
        results: list[Value | None] = []
        for o in node.output:
            if not o:
                results.append(None)
                continue
            data, dtype = from_onnx_array(np.asarray(next(found)))
            check_folded_size(data.shape, dtype, "a constant result")
            results.append(ctx.constant(data, dtype=dtype))
        return results
