# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""QDQ -> INTEGER: islands between dequantize and quantize become integer operators.

Before -> after:

    quantize(relu(add(conv(dequantize(x), dequantize(w), dequantize(b)), dequantize(r))))
    -> qconv(x, w, b, r), whose result type carries the clamp of relu in its range

A convolutional network then runs in integers from its first quantize to its last dequantize.
Works on the output of `insert_qdq` and on quantized models of other tools alike. With no quantized
value at all it only fuses bias, residual and clamp into the float products.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from qcompiler.ir import Graph, Node, Value
from qcompiler.numerics import table_entries
from qcompiler.ops import OpKind, Stage
from qcompiler.passes.float_products import float_products
from qcompiler.passes.fold_factors import fold_factors
from qcompiler.passes.free_bias import free_bias
from qcompiler.passes.fuse_blocks import fit_blocks
from qcompiler.passes.fuse_float import absorb_bias, fuse_float
from qcompiler.passes.fuse_grids import plain_grids
from qcompiler.passes.fuse_moves import (
    absorb_clamps,
    dequantized,
    fold_constants,
    fold_float_constants,
    hoist,
    merge_casts,
    params,
    requantize,
    retype,
    sink,
    succeed,
    until_stable,
)
from qcompiler.passes.fuse_parts import split_batches, split_groups
from qcompiler.passes.fuse_patterns import (
    RULES,
    Island,
    Weights,
    cone,
    cone_function,
    layer_norm_operands,
    product,
)
from qcompiler.passes.fuse_recurrent import fuse_recurrent
from qcompiler.passes.fuse_row_blocks import move_row_blocks
from qcompiler.passes.fuse_scales import move_scales
from qcompiler.passes.fuse_sixteen import split_sixteen_bits
from qcompiler.passes.fuse_wide import split_wide_weights
from qcompiler.passmanager import Pass, PassContext
from qcompiler.plan import TABLE_BINARY
from qcompiler.types import DType, TensorType


@dataclass(frozen=True)
class Fuse(Pass):
    """Turn quantize/dequantize islands into integer operators, and fuse float products."""

    name: ClassVar[str] = "fuse"
    stage: ClassVar[tuple[Stage, Stage]] = (Stage.QDQ, Stage.INTEGER)

    def run(self, graph: Graph, ctx: PassContext) -> bool:
        """Rewrite the graph; it always counts as modified, because its stage changes."""
        graph.stage = Stage.INTEGER
        absorb_bias(graph)
        fuse_recurrent(graph)
        until_stable(graph, fold_constants, merge_casts, absorb_clamps, sink, hoist)
        free_bias(graph)
        rewritten = move_row_blocks(graph)
        rewritten |= move_scales(graph)
        fold_factors(graph)
        rewritten |= split_groups(graph)
        rewritten |= split_batches(graph)
        if rewritten:
            until_stable(graph, sink, hoist)
        split_sixteen_bits(graph)
        fit_blocks(graph)
        split_wide_weights(graph)
        weights = Weights(graph)
        _islands(graph, weights)
        requantize(graph)
        _float_results(graph, weights)
        ctx.put(float_products(graph))
        plain_grids(graph)
        fuse_float(graph)
        fold_float_constants(graph)
        graph.eliminate_dead()
        retype(graph)
        graph.sort()
        return True


def _islands(graph: Graph, weights: Weights) -> None:
    """Try the pattern table on every quantize, in order."""
    for end in graph.nodes:
        if end.graph is None or end.op.name != "quantize":
            continue
        if dequantized(end.input(0)) is not None:
            continue
        found = Island.of(graph, end)
        for rule in RULES:
            if rule(found, weights) is not None:
                break


def _float_results(graph: Graph, weights: Weights) -> None:
    """Integer kernels whose result is read as a float: no rounding to 8 bits at all."""
    for node in graph.nodes:
        if node.graph is None:
            continue
        p = product(node, weights)
        if p is not None:
            attrs = {k: v for k, v in node.attrs.items() if k not in ("act_min", "act_max")}
            _replace(graph, node, p.op, p.operands, {**attrs, **p.attrs})
            continue
        operands = layer_norm_operands(graph, node)
        if operands is not None:
            _replace(graph, node, "qlayer_norm", operands, {"epsilon": node.attr("epsilon")})
    _float_tables(graph)


def _replace(
    graph: Graph,
    node: Node,
    op: str,
    inputs: tuple[Value | None, ...],
    attrs: dict[str, object],
) -> None:
    out = node.output
    new = graph.add(
        op,
        inputs,
        attrs,  # type: ignore[arg-type]
        types=[TensorType(out.shape, DType.FLOAT32)],
        before=node,
        sources=node.sources,
    )
    graph.replace_node(node, new.output)
    succeed(new, node, out)
    graph.eliminate_dead()


def _float_tables(graph: Graph) -> None:
    """An elementwise chain on 8-bit values whose result stays float is a table of floats."""
    for node in reversed(graph.nodes):
        if node.graph is None or not _elementwise(node):
            continue
        out = node.output
        if out.dtype is not DType.FLOAT32 or (
            out.uses
            and all(_elementwise(n) for n in out.users)
            and not graph.is_output(out)
            and cone(out.users[0].output) is not None
        ):
            continue
        found = cone(out)
        if found is None:
            continue
        root, nodes = found
        entries = table_entries(cone_function(out, root), params(root), None)
        held = graph.constant(entries.astype(np.float32), f"{out.name}_entries")
        sources = tuple(dict.fromkeys(s for n in reversed(nodes) for s in n.sources))
        new = graph.add(
            "table",
            [root, held],
            types=[TensorType(out.shape, DType.FLOAT32)],
            before=node,
            sources=sources,
        )
        graph.replace_node(node, new.output)
        succeed(new, node, out)
        graph.eliminate_dead()


def _elementwise(node: Node) -> bool:
    unary = node.op.kind is OpKind.UNARY and node.op.name != "table"
    return unary or node.op.name in TABLE_BINARY
