# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""Moves of quantize and dequantize nodes that change no value, and the clean-up around them.

`sink`: move(dequantize(q)) -> dequantize(move(q)); `hoist`: quantize(move(x)) -> move(quantize(x)).
Both are exact: movement only selects elements, and quantization is monotonic, so max_pool commutes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from qcompiler.errors import VerificationError
from qcompiler.ir import Graph, Node, Value
from qcompiler.numerics import dequantize, quantize
from qcompiler.ops import EvalContext, OpKind
from qcompiler.ops.movement import reshaped_grid
from qcompiler.plan import summed_axis
from qcompiler.types import DType, PerAxis, PerGroup, PerTensor, QuantParams, TensorType


def dequantized(value: Value | None) -> Value | None:
    """Return the quantized value that a float value is the dequantization of, if it is one."""
    if value is None or value.producer is None or value.producer.op.name != "dequantize":
        return None
    return value.producer.input(0)


def params(value: Value) -> QuantParams:
    """Return the quantization of a quantized value."""
    q = value.qparams
    if q is None:
        raise VerificationError(f"{value.name} is not quantized")
    return q


def succeed(new: Node, node: Node, value: Value | None = None) -> None:
    """Give a node the name of an erased one (plans are keyed by it), and its result's name."""
    new.name = node.name
    if value is not None:
        new.output.name = value.name


def adder(graph: Graph, node: Node) -> Callable[..., Value]:
    """Return what adds an operator before a node, in its name: name, operands, attributes."""

    def add(op: str, *operands: Value | None, **attrs: Any) -> Value:
        return graph.add(op, list(operands), attrs, before=node, sources=node.sources).output

    return add


def moves(node: Node) -> bool:
    """Whether the node only moves elements, whatever they stand for."""
    if node.op.kind is not OpKind.MOVEMENT:
        return False
    if node.op.name == "resize":
        return bool(node.attr("mode") == "nearest")
    if node.op.name == "pad" and node.attr("mode") == "constant":
        return float(node.attr("value")) == 0.0
    return True


def moved_operands(node: Node) -> tuple[int, ...]:
    """Return the indices of the operands that a movement node moves."""
    return tuple(range(len(node.inputs))) if node.op.name == "concat" else (0,)


# ------------------------------------------------------------------------------- constants


def fold_constants(graph: Graph) -> bool:
    """Evaluate quantize of constants, and movement of dequantized constants, in place."""
    changed = False
    for node in graph.nodes:
        if node.op.name == "quantize" and node.input(0).is_constant:
            q = params(node.output)
            data = quantize(node.input(0).array(), q)
            graph.replace_node(node, graph.constant(data, node.output.name, q))
            changed = True
        elif moves(node) and node.op.name != "concat":
            source = dequantized(node.input(0))
            rest = node.operands[1:]
            if source is None or not source.is_constant or len(node.outputs) != 1:
                continue
            if not params(source).is_per_tensor and node.op.name != "transpose":
                continue
            if any(not v.is_constant for v in rest):
                continue
            held = _moved_constant(graph, node, source)
            real = graph.add("dequantize", [held], before=node, sources=node.sources)
            graph.replace_node(node, real.output)
            changed = True
    return changed


def _moved_constant(graph: Graph, node: Node, source: Value) -> Value:
    rest = node.inputs[1:]
    types = [source.type, *(v.type if v is not None else None for v in rest)]
    results = node.op.infer(types, node.attrs)
    arrays = [source.array(), *(v.array() if v is not None else None for v in rest)]
    data = node.op.evaluate(arrays, node.attrs, EvalContext(tuple(types), results))[0]
    data = np.ascontiguousarray(data)
    return graph.constant(data, node.output.name, results[0].qparams)


def fold_float_constants(graph: Graph) -> bool:
    """Replace dequantized constants that float operators still read by float constants.

    Weights that a product takes in fewer bits stay as they are held.
    """
    changed = False
    for node in graph.nodes:
        if node.op.name == "dequantize" and node.input(0).is_constant:
            if takes_narrow_weights(node):
                continue
            source = node.input(0)
            data = dequantize(source.array(), params(source))
            graph.replace_node(node, graph.constant(data, node.output.name))
            changed = True
    return changed


def takes_narrow_weights(widening: Node) -> bool:
    """Whether the one reader of a dequantized constant multiplies by it, in groups along K.

    The scale may also be that of a column, or one in all. Weights of the result's other axes, or
    of convolutions with several groups, become floats.
    """
    held, out = widening.input(0), widening.output
    if len(out.uses) != 1 or held.qparams is None or held.dtype.bits not in (4, 8):
        return False
    node, at = out.uses[0]
    if at != 1 or node.op.name not in ("conv", "matmul") or node.input(0).is_constant:
        return False
    if node.op.name == "conv":
        if node.attr("group") != 1 or held.type.rank != 4:
            return False
    elif held.type.rank != 2 or node.input(0).type.rank < 2 or node.attr("transpose_a"):
        return False
    axis, scales = summed_axis(node), held.qparams.granularity
    if isinstance(scales, PerGroup):
        return scales.axis == axis and held.shape[axis] % scales.group_size == 0
    return isinstance(scales, PerTensor) or scales.axis != axis


# --------------------------------------------------------------------------------- moving


def sink(graph: Graph) -> bool:
    """Move dequantize behind movement operators; operands of a concat must share a grid."""
    changed = False
    for node in graph.nodes:
        if not moves(node):
            continue
        places = moved_operands(node)
        sources = [dequantized(node.inputs[i]) for i in places]
        found = [v for v in sources if v is not None]
        if len(found) < len(sources):
            continue
        if all(v.is_constant for v in (*found, *node.operands[len(places) :])):
            continue  # folded elsewhere
        grid = params(found[0])
        if not (grid.is_per_tensor or _moves_axis(node, found[0])) or any(
            not params(v).same_grid(grid) for v in found
        ):
            continue
        if not _zero_survives(node, grid):
            continue
        for i, v in zip(places, found, strict=True):
            graph.set_input(node, i, v)
        retype_node(graph, node)
        for out in node.outputs:
            uses, returned = out.uses, graph.is_output(out)
            if not uses and not returned:
                continue
            real = graph.add("dequantize", [out], name=f"{out.name}_dequantize")
            for reader, i in uses:
                graph.set_input(reader, i, real.output)
            if returned:
                graph.set_outputs([(n, real.output if v is out else v) for n, v in graph.outputs])
        changed = True
    if changed:
        graph.sort()
    return changed


def _moves_axis(node: Node, source: Value) -> bool:
    """Whether a value with scales along an axis has them along one after a movement."""
    if not isinstance(params(source).granularity, PerAxis):
        return False
    if node.op.name == "reshape":
        return reshaped_grid(source.type, node.output.shape) is not None
    return node.op.name == "transpose"


def _zero_survives(node: Node, grid: QuantParams) -> bool:
    """Whether the zeros that the operator writes lie inside the clamp range of the grid."""
    return node.op.name not in ("pad", "mask_tail") or grid.qmin <= grid.z <= grid.qmax


def absorb_clamps(graph: Graph) -> bool:
    """quantize(clip(x)) -> quantize(x) with the clip in the clamp range: rounding is monotonic."""
    changed = False
    for node in graph.nodes:
        if node.op.name != "quantize":
            continue
        clamp = node.input(0).producer
        if clamp is None or clamp.op.name not in ("relu", "clip"):
            continue
        if len(clamp.output.uses) != 1 or graph.is_output(clamp.output):
            continue
        q = params(node.output)
        if not q.is_per_tensor:
            continue
        lo, hi = (
            q_bound
            if bound is None
            else int(np.clip(quantize(np.float32(bound), q), q.qmin, q.qmax))
            for bound, q_bound in zip(clamp_bounds(clamp), (q.qmin, q.qmax), strict=True)
        )
        graph.set_type(node.output, TensorType(node.output.shape, q.storage, q.clamped(lo, hi)))
        for reader in node.output.users:
            if reader.op.kind is OpKind.MOVEMENT:
                retype_node(graph, reader)
        graph.set_input(node, 0, clamp.input(0))
        node.sources = tuple(dict.fromkeys((*clamp.sources, *node.sources)))
        graph.erase(clamp)
        changed = True
    return changed


def clamp_bounds(node: Node) -> tuple[float | None, float | None]:
    """Return (least, greatest) result of a relu or clip node; None = unbounded."""
    if node.op.name == "relu":
        return 0.0, None
    lo, hi = node.attr("min"), node.attr("max")
    if lo is not None and hi is not None and lo > hi:
        lo = hi  # ONNX: the upper bound wins
    return lo, hi


def hoist(graph: Graph) -> bool:
    """Move quantize before movement operators, to where it can join the kernel before it."""
    changed = False
    for node in reversed(graph.nodes):
        if not moves(node):
            continue
        readers = [n for v in node.outputs for n in v.users]
        if not readers or any(n.op.name != "quantize" for n in readers):
            continue
        if any(graph.is_output(v) or not v.uses for v in node.outputs):
            continue
        q = params(readers[0].output)
        if not q.is_per_tensor or any(params(n.output) != q for n in readers):
            continue
        places = moved_operands(node)
        if any(node.input(i).type.is_quantized for i in places):
            continue
        if len(places) == 1 and not _joins_kernel(graph, node.input(0)):
            continue
        for i in places:
            v = node.input(i)
            held = graph.add(
                "quantize",
                [v],
                types=[TensorType(v.shape, q.storage, q)],
                name=f"{v.name}_quantize",
                names=[f"{v.name}_q"],
            )
            graph.set_input(node, i, held.output)
        retype_node(graph, node)
        for out in node.outputs:
            for reader in out.users:
                graph.replace_node(reader, out)
        changed = True
    if changed:
        graph.sort()
    return changed


def _joins_kernel(graph: Graph, value: Value) -> bool:
    p = value.producer
    if p is None or len(value.users) != 1 or graph.is_output(value):
        return False
    return p.op.kind in (
        OpKind.COMPUTE,
        OpKind.BINARY,
        OpKind.UNARY,
        OpKind.REDUCE,
        OpKind.NORM,
        OpKind.MOVEMENT,
    )


# ------------------------------------------------------------------------------- clean-up


def retype_node(graph: Graph, node: Node) -> bool:
    """Infer the result types of a node again after its operands changed."""
    types = node.op.infer([v.type if v is not None else None for v in node.inputs], node.attrs)
    changed = False
    for v, t in zip(node.outputs, types, strict=True):
        if v.type != t:
            graph.set_type(v, t)
            changed = True
    return changed


def retype(graph: Graph) -> None:
    """Infer the types of movement results again: a fused clamp narrows the range they carry."""
    for node in graph.nodes:
        if node.op.kind is OpKind.MOVEMENT:
            retype_node(graph, node)


def merge_casts(graph: Graph) -> bool:
    """Merge quantize and dequantize nodes that do the same to the same value."""
    changed = False
    seen: dict[tuple[str, Value, TensorType], Node] = {}
    for node in graph.nodes:
        if node.op.name not in ("quantize", "dequantize", "requantize"):
            continue
        first = seen.setdefault((node.op.name, node.input(0), node.output.type), node)
        if first is not node:
            graph.replace_node(node, first.output)
            changed = True
    return changed


def requantize(graph: Graph) -> bool:
    """Shorten a quantize of a dequantized value: nothing on one grid, else a requantize."""
    changed = False
    for node in graph.nodes:
        if node.op.name != "quantize":
            continue
        source = dequantized(node.input(0))
        if source is None:
            continue
        have, want = params(source), params(node.output)
        if source.is_constant:
            data = quantize(dequantize(source.array(), have), want)
            graph.replace_node(node, graph.constant(data, node.output.name, want))
        elif have.same_grid(want) and want.qmin <= have.qmin and have.qmax <= want.qmax:
            graph.replace_node(node, source)
        elif have.same_grid(want) and _clamps_itself(graph, source):
            narrowed = have.clamped(want.qmin, want.qmax)
            graph.set_type(source, TensorType(source.shape, source.dtype, narrowed))
            graph.replace_node(node, source)
        elif have.is_per_tensor and want.is_per_tensor and have.storage is not DType.INT32:
            new = graph.add(
                "requantize",
                [source],
                types=[node.output.type],
                before=node,
                name=f"{source.name}_requantize",
                sources=node.sources,
            )
            old = node.output
            graph.replace_node(node, new.output)
            new.output.name = old.name
        else:
            continue
        graph.eliminate_dead()
        changed = True
    return changed


def _clamps_itself(graph: Graph, value: Value) -> bool:
    """Whether the kernel of a value clamps by its type, and only one dequantize reads it."""
    kernel = value.producer
    if kernel is None or not kernel.op.declared or kernel.op.name == "table":
        return False  # the entries of a table are fixed already
    if graph.is_output(value) or len(value.uses) != 1:
        return False
    real = value.uses[0][0].output
    return len(real.uses) == 1 and not graph.is_output(real)


def until_stable(graph: Graph, *steps: Callable[[Graph], bool]) -> bool:
    """Run the steps in turn until none changes the graph."""
    changed = False
    while True:
        round_changed = False
        for step in steps:
            round_changed |= step(graph)
        if not round_changed:
            return changed
        changed = True
