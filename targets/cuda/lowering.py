# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""Graph[INTEGER] -> launches: the table of operators, and the products.

A row turns a node of the shaped graph (channels last) into launches, or says in words why not.
Elementwise operators and movement are in `lower_maps.py`, rows along an axis in `lower_rows.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from qcompiler import numerics
from qcompiler.errors import UnsupportedByTargetError
from qcompiler.ir import Graph, Node, Value
from qcompiler.passmanager import ProgressFn, no_progress
from qcompiler.targets.base import is_view
from qcompiler.targets.cuda.arch import Arch
from qcompiler.targets.cuda.blocked import blocked_conv, blocked_matmul
from qcompiler.targets.cuda.halves import with_halves
from qcompiler.targets.cuda.maps import Operand, map_launch, row_major
from qcompiler.targets.cuda.products import (
    MAX_FLOAT,
    ChooseTile,
    Epilogue,
    Product,
    Window,
    float_product_launch,
    product_launch,
    tile_of,
)
from qcompiler.targets.cuda.program import Argument, Launch, Step, Temporary
from qcompiler.targets.cuda.source import KernelText
from qcompiler.targets.cuda.windows import depthwise_launch
from qcompiler.types import WIDENED, Array, DType, PerGroup, QuantParams

EIGHT_BITS = (DType.INT8, DType.UINT8)
FLOATS = (DType.FLOAT32, DType.FLOAT16)
_LARGEST = 1 << 31  # kernels count elements in int32

Answer = tuple[Launch, ...] | str
"""Launches, or why there are none."""


@dataclass(frozen=True, slots=True)
class Maker:
    """What the rows of the table need to know besides the node.

    Attributes:
        arch: The GPU.
        choose: Picks the tile of a product.
    """

    arch: Arch
    choose: ChooseTile = tile_of

    def product(self, p: Product) -> Launch:
        """Return the launch of a product on tensor cores."""
        return product_launch(p, self.arch, self.choose(p, self.arch))


Row = Callable[[Maker, Node], Answer]
_ROWS: dict[str, Row] = {}


def row(*operators: str) -> Callable[[Row], Row]:
    """Enter a function into the table for some operators."""

    def enter(function: Row) -> Row:
        for name in operators:
            _ROWS[name] = function
        return function

    return enter


def lower_node(make: Maker, node: Node) -> Answer:
    """Return the launches of a node, or why there are none."""
    from qcompiler.targets.cuda import lower_dynamic, lower_maps, lower_rows  # enter their rows

    del lower_dynamic, lower_maps, lower_rows
    function = _ROWS.get(node.op.name)
    if function is None:
        return "no CUDA kernel exists for this operator"
    for v in (*node.operands, *node.outputs):
        if v.type.size >= _LARGEST:
            return f"{v.name} has {v.type.size} elements, kernels count to {_LARGEST - 1}"
    if any(v.type.size == 0 for v in node.outputs):
        return f"its result {node.outputs[0].type} has no elements"
    return function(make, node)


@dataclass
class Lowered:
    """A graph as launches.

    Attributes:
        graph: The graph as it was given.
        lowered: What the launches compute: the same, or a copy with half-precision values.
        arch: The GPU.
        steps: Launches per node, in order; views have none.
        views: Result of each view -> what it looks at.
        kernels: Kernel texts by name.
        notes: What the user should know, one sentence each.
    """

    graph: Graph
    lowered: Graph
    arch: Arch
    steps: list[Step]
    views: dict[Value, Value]
    kernels: dict[str, KernelText]
    notes: list[str] = field(default_factory=list)


def lower_graph(
    graph: Graph, arch: Arch, progress: ProgressFn = no_progress, choose: ChooseTile = tile_of
) -> Lowered:
    """Lower a verified, shaped INTEGER graph.

    Raises:
        UnsupportedByTargetError: All nodes that have no kernel, in one message.
    """
    given, graph = graph, with_halves(graph)
    maker = Maker(arch, choose)
    steps: list[Step] = []
    views: dict[Value, Value] = {}
    problems: list[str] = []
    refused: list[Node] = []
    for i, node in enumerate(graph.nodes):
        progress("lower", i, len(graph.nodes))
        if is_view(node):
            views[node.output] = node.input(0)
            continue
        answer = lower_node(maker, node)
        if isinstance(answer, str):
            problems.append(f"{node.name} ({node.op.name}): {answer}")
            refused.append(node)
        else:
            steps.append(Step(node.name, answer, sum(x.macs for x in answer)))
    for name, v in graph.outputs:
        if v.type.size == 0 and not v.is_constant:
            problems.append(f"the output {name!r} of shape {list(v.shape)} has no elements")
    if problems:
        raise UnsupportedByTargetError(
            f"{graph.name!r} cannot be compiled for {arch.name} because of:\n  "
            + "\n  ".join(problems),
            node=refused[0].name if refused else None,
            hint="compile for a CPU target, which also has TVM's operators",
        )
    progress("lower", len(graph.nodes), len(graph.nodes))
    notes = []
    if any(k.kind.endswith("_f16") for step in steps for k in (x.kernel for x in step.launches)):
        notes.append(
            "half precision on tensor cores: float results differ from the interpreter's by the "
            "rounding of half precision"
        )
    return Lowered(given, graph, arch, steps, views, _named(steps), notes)


def _named(steps: list[Step]) -> dict[str, KernelText]:
    """Give every distinct kernel a name and tell the steps."""
    names: dict[KernelText, str] = {}
    for step in steps:
        for launch in step.launches:
            name = names.setdefault(launch.kernel, f"{launch.kernel.kind}_{len(names)}")
            step.kernels.append(name)
    return {name: kernel for kernel, name in names.items()}


# ------------------------------------------------------------------- helpers for the rows


def grid(v: Value) -> QuantParams | None:
    """Return the per-tensor quantization of a value of 4, 8 or 16 bits, or None."""
    q, held = v.qparams, WIDENED.get(v.dtype, v.dtype)
    if q is None or not q.is_per_tensor or held not in (*EIGHT_BITS, DType.INT16, DType.UINT16):
        return None
    return q


def scalar(*factors: float, over: float = 1.0) -> float:
    """Return `numerics.multiplier` of numbers as a Python float that float32 holds exactly."""
    return float(numerics.multiplier(*factors, over=over).reshape(()))


def bounds(q: QuantParams) -> tuple[float, float, int]:
    """Return (low, high, zero point): the clamp range less the zero point."""
    return float(q.qmin - q.z), float(q.qmax - q.z), q.z


def transposed(source: Value, shape: tuple[int, ...], strides: tuple[int, ...]) -> Launch:
    """Return the launch that copies a value into a contiguous temporary of a shape."""
    size = math.prod(shape)
    to = Temporary(size * source.dtype.numpy.itemsize)
    out = Operand(to, source.dtype, row_major(shape))
    return map_launch("transpose", shape, to, out, [Operand(source, source.dtype, strides)],
                      "a")  # fmt: skip


# ------------------------------------------------------------------------------- products


@dataclass(frozen=True, slots=True)
class _Weights:
    """Constant weights: stored integers (or floats), zero points, scales, width."""

    data: Array
    zero: Array
    scale: Array
    bits: int
    dtype: DType


def _weights(w: Value) -> _Weights | str:
    """Return a constant's weights as int8 where they are quantized."""
    q = w.qparams
    if q is None:
        return "its weights are not quantized"
    data = w.array().astype(np.int16)
    zero = q.zero_point.astype(np.int64).reshape(-1)
    bits = max(int(q.qmax - q.qmin).bit_length(), 1)
    if w.dtype in (DType.UINT8, DType.UINT4):
        shift = 128 if w.dtype is DType.UINT8 else 8
        data, zero = data - shift, zero - shift
    elif w.dtype not in (DType.INT8, DType.INT4):
        return f"its weights are {w.dtype.value}, expected 8 bits or less"
    return _Weights(data.astype(np.int8), zero, q.scale.reshape(-1), bits, DType.INT8)


def _epilogue(node: Node, x: QuantParams, weight_scale: Array, columns: int) -> Epilogue | str:
    """Return the epilogue of an integer product."""
    out, bias, residual = node.output, node.optional(2), node.optional(3)
    values: Array | None = None
    if bias is not None:
        if not bias.is_constant or bias.type.size != columns:
            return "its bias is computed at run time"
        values = bias.array().reshape(-1).astype(np.int32)
    if out.qparams is None:
        if residual is not None:
            return "its float result has a residual"
        return Epilogue(DType.FLOAT32, numerics.multiplier(x.scale, weight_scale), values)
    o = grid(out)
    if o is None:
        return f"its result {out.type} is not quantized per tensor"
    low, high, zero = bounds(o)
    scale = numerics.multiplier(x.scale, weight_scale, over=o.scale)
    if residual is None:
        return Epilogue(out.dtype, scale, values, low=low, high=high, zero=zero)
    r = grid(residual)
    if r is None or residual.dtype.bits != out.dtype.bits:
        return f"its residual {residual.type} does not fit the result {out.type}"
    return Epilogue(
        out.dtype, scale, values, residual.dtype, r.z, scalar(r.s, over=o.s), low, high, zero
    )


def _float_epilogue(node: Node, columns: int) -> Epilogue | str:
    out, bias, residual = node.output, node.optional(2), node.optional(3)
    values: Array | None = None
    if bias is not None:
        if not bias.is_constant or bias.type.size != columns:
            return "its bias is computed at run time"
        values = bias.array().reshape(-1).astype(np.float32)
    if residual is not None and residual.shape != out.shape:
        return "its residual is broadcast"
    low, high = node.attr("act_min"), node.attr("act_max")
    return Epilogue(
        out.dtype, None, values, None if residual is None else residual.dtype,
        low=-MAX_FLOAT if low is None else float(low),
        high=MAX_FLOAT if high is None else float(high),
    )  # fmt: skip


def _window(node: Node) -> Window:
    """Return the geometry of a convolution with channels last."""
    (n, ih, iw, channels), (_, oh, ow, _) = node.input(0).shape, node.output.shape
    kh, kw = node.input(1).shape[2:]
    pads, strides, dilations = (node.attr(name) for name in ("pads", "strides", "dilations"))
    return Window(
        n, ih, iw, channels, oh, ow, kh, kw, (strides[0], strides[1]), (pads[0], pads[1]),
        (dilations[0], dilations[1]),
    )  # fmt: skip


@row("qconv", "conv")
def _conv(make: Maker, node: Node) -> Answer:
    x, w, out = node.input(0), node.input(1), node.output
    if x.type.rank != 4 or node.attr("layout") != "NHWC":
        return f"its operand {x.type} is not an image with channels last"
    if not w.is_constant:
        return "its weights are computed at run time"
    window = _window(node)
    columns, zero = out.shape[3], 0
    if node.op.name == "qconv":
        q = grid(x)
        if q is None or x.dtype not in EIGHT_BITS:
            return f"its operand {x.type} is not quantized per tensor in 8 bits"
        if w.qparams is not None and isinstance(w.qparams.granularity, PerGroup):
            return blocked_conv(make, node, window)
        found = _weights(w)
        if isinstance(found, str):
            return found
        epilogue, zero = _epilogue(node, q, found.scale, columns), q.z
    elif x.dtype in FLOATS and w.dtype in FLOATS:
        found = _Weights(w.array(), np.zeros(1, np.int64), np.ones(1), 32, w.dtype)
        epilogue = _float_epilogue(node, columns)
    else:
        return f"no kernel computes in {x.dtype.value}"
    if isinstance(epilogue, str):
        return epilogue
    group, channels, residual = int(node.attr("group")), window.channels, node.optional(3)
    data = found.data
    if group == channels and w.shape[1] == 1 and group > 1:
        if x.dtype in EIGHT_BITS:
            wide = data.astype(np.int16) - np.broadcast_to(found.zero, (columns,)).reshape(
                -1, 1, 1, 1
            ).astype(np.int16)
            data = wide.astype(np.int8) if not found.zero.any() else wide
        return (depthwise_launch(x, out, window, data[:, 0], x.dtype, epilogue,
                                 a_zero=zero, residual=residual),)  # fmt: skip
    if x.dtype in FLOATS and found.dtype is not x.dtype:
        return f"no kernel multiplies {x.dtype.value} by {found.dtype.value}"
    per_group, depth = columns // group, w.shape[1] * window.kh * window.kw
    # [O, I, KH, KW] -> [group, O, KH * KW * I]: K runs as the channels of a window lie in memory.
    packed = data.transpose(0, 2, 3, 1).reshape(group, per_group, depth)
    product = Product(
        x, None, window.batch * window.oh * window.ow, per_group, depth, group, x.dtype,
        found.dtype, epilogue, out, residual, window, a_row=channels, out_row=columns,
        a_offset=_times("z", channels // group, group), c_offset=_times("z", per_group, group),
        n_offset=_times("z", per_group, group), weights=packed, b_bits=found.bits,
        a_zero=zero, b_zero=found.zero,
    )  # fmt: skip
    if x.dtype is DType.FLOAT32:
        return (float_product_launch(product),)
    return (make.product(product),)


def _times(name: str, step: int, count: int) -> str:
    return f"{name} * {step}" if count > 1 else "0"


def _lead_offset(lead: tuple[int, ...], own: tuple[int, ...], step: int) -> str:
    """Return C++ text of where pair z of broadcast leading axes begins in an operand."""
    own = (*(1,) * (len(lead) - len(own)), *own)
    terms, inner, stride = [], 1, step
    for extent, mine in zip(reversed(lead), reversed(own), strict=True):
        if mine > 1:
            terms.append(f"z / {inner} % {extent} * {stride}")
            stride *= mine
        inner *= extent
    return " + ".join(terms) or "0"


@row("qmatmul", "matmul")
def _matmul(make: Maker, node: Node) -> Answer:
    a, b, out = node.input(0), node.input(1), node.output
    flip_a, flip_b = bool(node.attr("transpose_a")), bool(node.attr("transpose_b"))
    quantized = node.op.name == "qmatmul"
    a_shape = (1, *a.shape) if a.type.rank == 1 else a.shape
    b_shape = (*b.shape, 1) if b.type.rank == 1 else b.shape
    m, k = (a_shape[-1], a_shape[-2]) if flip_a else (a_shape[-2], a_shape[-1])
    columns = b_shape[-2] if flip_b else b_shape[-1]
    b_lead, a_lead = b_shape[:-2], a_shape[:-2]
    zero, b_zero, b_bits = 0, np.zeros(1, np.int64), 8
    weights: Array | None = None
    constant = b.is_constant and math.prod(b_lead) == 1
    b_dtype = b.dtype
    if quantized:
        aq = grid(a)
        if aq is None or a.dtype not in EIGHT_BITS:
            return f"its operand {a.type} is not quantized per tensor in 8 bits"
        zero = aq.z
        if constant and b.qparams is not None and isinstance(b.qparams.granularity, PerGroup):
            return blocked_matmul(make, node)
        if constant:
            found = _weights(b)
            if isinstance(found, str):
                return found
            weights, b_zero, b_bits, b_dtype = found.data, found.zero, found.bits, found.dtype
            scale = found.scale
        else:
            bq = grid(b)
            if bq is None or b.dtype not in EIGHT_BITS:
                return f"its operand {b.type} is not quantized per tensor in 8 bits"
            scale, b_zero = bq.scale.reshape(-1), bq.zero_point.astype(np.int64).reshape(-1)
        epilogue = _epilogue(node, aq, scale, columns)
    elif a.dtype in FLOATS and b.dtype is a.dtype:
        weights = b.array() if constant else None
        epilogue = _float_epilogue(node, columns)
    else:
        return f"no kernel computes in {a.dtype.value} and {b.dtype.value}"
    if isinstance(epilogue, str):
        return epilogue
    launches: list[Launch] = []
    left: Argument = a
    if flip_a:
        shape = (*a_lead, m, k)
        own = row_major(a_shape)
        launches.append(transposed(a, shape, (*own[:-2], own[-1], own[-2])))
        left = _result(launches[-1])
    right: Argument | None = None
    if weights is not None:
        flat = weights.reshape(b_shape[-2:])
        weights = np.ascontiguousarray(flat if flip_b else flat.T)[None]
    elif flip_b:
        right = b.array() if b.is_constant else b
    else:  # the tensor cores read rows of B along K
        own = row_major(b_shape)
        launches.append(transposed(b, (*b_lead, columns, k), (*own[:-2], own[-1], own[-2])))
        right = _result(launches[-1])
    lead = np.broadcast_shapes(a_lead, b_lead)
    joined = math.prod(b_lead) == 1  # one B for all rows: leading axes of A are rows
    rows, batch = (m * math.prod(lead), 1) if joined else (m, math.prod(lead))
    if batch > 65535:
        return f"it has {batch} independent products, a launch takes 65535"
    product = Product(
        left, right, rows, columns, k, batch, a.dtype, b_dtype, epilogue, out, node.optional(3),
        a_row=k, out_row=columns,
        a_offset="0" if joined else _lead_offset(lead, a_lead, m * k),
        b_offset="0" if joined else _lead_offset(lead, b_lead, columns * k),
        c_offset=_times("z", m * columns, batch), weights=weights, b_bits=b_bits, a_zero=zero,
        b_zero=b_zero,
    )  # fmt: skip
    if a.dtype is DType.FLOAT32:
        launches.append(float_product_launch(product))
    else:
        launches.append(make.product(product))
    return tuple(launches)


def _result(launch: Launch) -> Argument:
    """Return the buffer that a launch writes, as an argument of the next one."""
    return launch.result
