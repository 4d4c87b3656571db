# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""Which kernel computes which node on a CPU: the lowering table.

A row turns one node of a shaped INTEGER graph (channels last, unsigned activations) into a
`KernelCall`: the workload (what is computed), the packed constants, and how to build the PrimFunc.
A row answers None where no generator serves the node; float nodes then go through TVM.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable
from functools import partial
from typing import Any

import numpy as np

from qcompiler import numerics
from qcompiler.ir import Node, Value
from qcompiler.targets.base import Support, is_view
from qcompiler.targets.choice import Choose, default_choice
from qcompiler.targets.isa import Isa
from qcompiler.targets.tvm_lower import KernelCall
from qcompiler.types import WIDENED, Array, DType, QuantParams

Row = Callable[["CpuLowering", Node], "KernelCall | None"]
_ROWS: dict[str, Row] = {}


def row(*operators: str) -> Callable[[Row], Row]:
    """Enter a function into the table for some operators."""

    def enter(function: Row) -> Row:
        for name in operators:
            _ROWS[name] = function
        return function

    return enter


class CpuLowering:
    """The table bound to one row of the ISA table."""

    def __init__(self, isa: Isa, choose: Choose = default_choice) -> None:
        """Bind the table.

        Args:
            isa: The row.
            choose: Chooses the parameters of every kernel that has some.
        """
        from qcompiler.targets import cpu_moves, cpu_products, cpu_recurrent  # enter their rows

        del cpu_moves, cpu_products, cpu_recurrent
        self.isa = isa
        self.choose = choose

    def __call__(self, node: Node) -> KernelCall | None:
        """Return the kernel call of a node, or None."""
        function = _ROWS.get(node.op.name)
        return function(self, node) if function is not None else None

    def supports(self, node: Node) -> Support:
        """Say whether a generator serves the node."""
        if is_view(node):
            return Support(True)
        if node.op.name not in _ROWS:
            return Support(False, f"{node.op.name} has no kernel of ours; TVM compiles it")
        if self(node) is None:
            return Support(False, f"no {node.op.name} kernel takes these shapes or dtypes")
        return Support(True)

    def is_real(self, *values: Value | None) -> bool:
        """Whether every given value is a float tensor that kernels of the row compute with."""
        widths = (DType.FLOAT32, DType.FLOAT16) if self.isa.halves else (DType.FLOAT32,)
        return all(v is not None and v.dtype in widths for v in values)

    def call(
        self,
        kernel: str,
        workload: Hashable,
        build: Callable[..., Any],
        inputs: tuple[Value, ...],
        constants: tuple[Array, ...] = (),
        macs: int = 0,
        covers: tuple[Node, ...] = (),
    ) -> KernelCall:
        """Return a call of a generator of the form `build(workload, isa)`."""
        return KernelCall(
            kernel,
            (kernel, workload),
            partial(_named, build, workload, self.isa),
            inputs,
            constants,
            macs,
            covers,
        )


def _named(build: Callable[..., Any], workload: object, isa: Isa, symbol: str) -> Any:
    """Build a PrimFunc and give it the symbol that the module uses."""
    return build(workload, isa).with_attr("global_symbol", symbol)


def storage(v: Value) -> str:
    """Return the name of a value's storage dtype: that of bytes, where it is of 4 bits."""
    return WIDENED.get(v.dtype, v.dtype).value


def grid(v: Value) -> QuantParams:
    """Return the per-tensor quantization of a value, which must have one."""
    if v.qparams is None or not v.qparams.is_per_tensor:
        raise ValueError(f"{v.name} is not quantized per tensor")
    return v.qparams


def is_per_tensor(*values: Value | None) -> bool:
    """Whether every given value is quantized per tensor in 4, 8 or 16 bits."""
    return all(
        v is not None
        and v.qparams is not None
        and v.qparams.is_per_tensor
        and WIDENED.get(v.dtype, v.dtype) in (DType.UINT8, DType.INT8, DType.INT16)
        for v in values
    )


def is_float32(*values: Value | None) -> bool:
    """Whether every given value is a float32 tensor."""
    return all(v is not None and v.dtype is DType.FLOAT32 for v in values)


def scalar_multiplier(*factors: float, over: float = 1.0) -> float:
    """Return `numerics.multiplier` of numbers as a Python float that float32 holds exactly."""
    return float(numerics.multiplier(*factors, over=over).reshape(()))


# ------------------------------------------------------------------------------ elementwise


@row("quantize")
def _quantize(self: CpuLowering, node: Node) -> KernelCall | None:
    from qcompiler.targets.kernels.pointwise import (
        QuantizeChainWorkload,
        QuantizeWorkload,
        quantize,
        quantize_chain,
    )

    x, out = node.input(0), node.output
    if out.qparams is not None and not out.qparams.is_per_tensor:
        return _scaled(self, x, out, out.qparams)
    if not is_float32(x) or not is_per_tensor(out):
        return None
    q = grid(out)
    w = QuantizeWorkload(out.shape, q.s, q.z, storage(out), q.qmin, q.qmax)
    source, nodes, constants = steps_before(node)
    if not nodes:
        return self.call("quantize", w, quantize, (x,))
    read = iter(constants)
    steps = tuple((n.op.name, next(read).shape if len(n.inputs) > 1 else None) for n in nodes)
    chain = QuantizeChainWorkload(w, steps)
    return self.call("quantize", chain, quantize_chain, (source, *constants), covers=nodes)


def steps_before(
    node: Node, *, computed: bool = False
) -> tuple[Value, tuple[Node, ...], tuple[Value, ...]]:
    """Return what elementwise steps before a node start from, the steps, and their constants.

    The steps are those of `quantize_chain`, which nothing else reads; their other operands may be
    `computed` too.
    """
    from qcompiler.targets.kernels.pointwise import CHAINED

    value = node.input(0)
    nodes: list[Node] = []
    constants: list[Value] = []
    while (step := value.producer) is not None and step.op.name in CHAINED:
        alone = len(value.uses) == 1 and not (step.graph and step.graph.is_output(value))
        more = step.operands[1:]
        x = step.input(0)
        if not alone or not is_float32(*step.operands) or x.shape != value.shape:
            break
        if not (computed or all(v.is_constant for v in more)) or x.is_constant:
            break
        nodes.append(step)
        constants += more
        value = x
    return value, tuple(nodes[::-1]), tuple(constants[::-1])


@row("dequantize")
def _dequantize(self: CpuLowering, node: Node) -> KernelCall | None:
    from qcompiler.targets.kernels.pointwise import DequantizeWorkload, dequantize

    x = node.input(0)
    if x.qparams is not None and not x.qparams.is_per_tensor:
        return _scaled(self, x, node.output, x.qparams)
    if not is_per_tensor(x):
        return None
    q = grid(x)
    return self.call(
        "dequantize", DequantizeWorkload(x.shape, storage(x), q.s, q.z), dequantize, (x,)
    )


def _scaled(self: CpuLowering, x: Value, out: Value, q: QuantParams) -> KernelCall | None:
    """Return the call that quantizes or dequantizes by a scale per index or block of an axis."""
    from qcompiler.targets.kernels import scaled

    making = out.qparams is not None
    real, codes = (x, out) if making else (out, x)
    if not is_float32(real) or x.is_constant or 0 in x.shape or codes.dtype.bits > 16:
        return None
    if storage(codes) not in scaled.STORAGES:
        return None
    view, scale, zero = scaled.parameters(q, x.shape)
    w = scaled.ScaledWorkload(x.shape, view, scale.shape, storage(codes), q.qmin, q.qmax)
    build = scaled.quantize if making else scaled.dequantize
    return self.call("quantize" if making else "dequantize", w, build, (x,), (scale, zero))


@row("requantize")
def _requantize(self: CpuLowering, node: Node) -> KernelCall | None:
    from qcompiler.targets.kernels.pointwise import RequantizeWorkload, requantize

    x, out = node.input(0), node.output
    if not is_per_tensor(x, out):
        return None
    q, o = grid(x), grid(out)
    w = RequantizeWorkload(
        x.shape, storage(x), q.z, scalar_multiplier(q.s, over=o.s),
        storage(out), o.z, o.qmin, o.qmax,
    )  # fmt: skip
    return self.call("requantize", w, requantize, (x,))


@row("qadd", "qsub", "qmul")
def _qbinary(self: CpuLowering, node: Node) -> KernelCall | None:
    from qcompiler.targets.kernels.pointwise import QBinaryWorkload, qbinary

    a, b, out = node.input(0), node.input(1), node.output
    if not is_per_tensor(a, b) or not (is_per_tensor(out) or is_float32(out)):
        return None
    qa, qb = grid(a), grid(b)
    o = grid(out) if out.qparams is not None else None
    over = 1.0 if o is None else o.s
    if node.op.name == "qmul":
        ma, mb = scalar_multiplier(qa.s, qb.s, over=over), 1.0
    else:
        ma, mb = scalar_multiplier(qa.s, over=over), scalar_multiplier(qb.s, over=over)
    w = QBinaryWorkload(
        node.op.name[1:], a.shape, b.shape, storage(a), storage(b), qa.z, qb.z, ma, mb,
        storage(out), 0 if o is None else o.z, 0 if o is None else o.qmin,
        0 if o is None else o.qmax,
    )  # fmt: skip
    return self.call(node.op.name, w, qbinary, (a, b))


@row("table")
def _table(self: CpuLowering, node: Node) -> KernelCall | None:
    from qcompiler.targets.kernels.pointwise import TableWorkload, pack_table, table

    x, entries, out = node.input(0), node.input(1), node.output
    if x.dtype not in (DType.UINT8, DType.INT8) or not entries.is_constant:
        return None
    w = TableWorkload(x.shape, storage(x), storage(out))
    packed = pack_table(entries.array(), w, self.isa)
    return self.call("table", w, table, (x,), (packed,))


_FLOAT_BINARY = frozenset({"add", "sub", "mul", "div", "max", "min"})


@row(*_FLOAT_BINARY)
def _float_binary(self: CpuLowering, node: Node) -> KernelCall | None:
    from qcompiler.targets.kernels.pointwise import FloatBinaryWorkload, float_binary

    a, b = node.input(0), node.input(1)
    if not self.is_real(a, b, node.output) or 0 in node.output.shape:
        return None
    w = FloatBinaryWorkload(
        node.op.name, a.shape, b.shape,
        a_dtype=storage(a), b_dtype=storage(b), dtype=storage(node.output),
    )  # fmt: skip
    return self.call(node.op.name, w, float_binary, (a, b))


@row("relu", "clip")
def _clip(self: CpuLowering, node: Node) -> KernelCall | None:
    from qcompiler.targets.kernels.pointwise import ClipWorkload, clip

    x = node.input(0)
    if not self.is_real(x) or x.dtype is not node.output.dtype or 0 in x.shape:
        return None
    low = 0.0 if node.op.name == "relu" else node.attr("min")
    high = None if node.op.name == "relu" else node.attr("max")
    return self.call(node.op.name, ClipWorkload(x.shape, storage(x), low, high), clip, (x,))


@row("cast")
def _cast(self: CpuLowering, node: Node) -> KernelCall | None:
    from qcompiler.targets.kernels.pointwise import CastWorkload, cast_floats

    x, out = node.input(0), node.output
    if out.dtype in WIDENED:
        return _low_bits(self, x, out)
    if not self.is_real(x, out) or x.dtype is out.dtype or 0 in x.shape:
        return None
    w = CastWorkload(x.shape, storage(x), storage(out))
    return self.call("cast", w, cast_floats, (x,))


def _low_bits(self: CpuLowering, x: Value, out: Value) -> KernelCall | None:
    from qcompiler.targets.kernels.four_bits import LowBitsWorkload, low_bits

    if 0 in x.shape or not (x.dtype.is_integer or x.dtype in (DType.FLOAT32, DType.FLOAT64)):
        return None
    w = LowBitsWorkload(x.shape, storage(x), out.dtype is DType.INT4)
    return self.call("cast", w, low_bits, (x,))


# ---------------------------------------------------------------------- pooling, reductions


def _averaging(x: Value, out: Value) -> Any:
    """Return how a quantized average becomes its output."""
    from qcompiler.targets.kernels.pool import Averaging

    q = grid(x)
    if out.qparams is None:
        return Averaging(q.z, "float32", q.s)
    o = grid(out)
    return Averaging(q.z, storage(out), q.s, o.s, o.z, o.qmin, o.qmax)


@row("max_pool", "average_pool", "qaverage_pool")
def _pool(self: CpuLowering, node: Node) -> KernelCall | None:
    from qcompiler.targets.kernels import pool
    from qcompiler.targets.kernels.window import Window

    x, out, name = node.input(0), node.output, node.op.name
    if x.type.rank != 4 or node.attr("layout") != "NHWC":
        return None
    quantized = name == "qaverage_pool"
    if quantized and not (is_per_tensor(x) and (is_per_tensor(out) or is_float32(out))):
        return None
    if not quantized and not self.is_real(x, out) and not (name == "max_pool" and is_per_tensor(x)):
        return None
    if name == "max_pool" and x.dtype is not out.dtype:
        return None
    window = Window(
        x.shape[0], (x.shape[1], x.shape[2]), (out.shape[1], out.shape[2]),
        *(tuple(node.attr(k)) for k in ("kernel", "strides", "pads", "dilations")),
    )  # fmt: skip
    w = pool.PoolWorkload(
        window, x.shape[3], storage(x), _averaging(x, out) if quantized else None,
        name != "max_pool" and bool(node.attr("count_include_pad")),
        None if x.dtype is out.dtype or quantized else storage(out),
    )  # fmt: skip
    if name == "max_pool":
        return self.call(name, w, pool.max_pool, (x,))
    return self.call(name, w, pool.average_pool, (x,), (pool.pack_counts(w),))


_REDUCTIONS = {"reduce_sum": "sum", "reduce_max": "max", "reduce_min": "min"}


@row("qreduce_mean", "reduce_mean", *_REDUCTIONS)
def _reduce(self: CpuLowering, node: Node) -> KernelCall | None:
    from qcompiler.targets.kernels.pool import ReduceWorkload, reduce

    x, out, name = node.input(0), node.output, node.op.name
    quantized = name == "qreduce_mean"
    if quantized and not (is_per_tensor(x) and (is_per_tensor(out) or is_float32(out))):
        return None
    if not quantized and not self.is_real(x, out):
        return None
    axes = sorted(a % x.type.rank for a in node.attr("axes"))
    if not axes or 0 in x.shape:
        return None
    if name == "reduce_sum" and len(axes) == 1:
        chain = _sum_of_steps(self, node, axes[0])
        if chain is not None:
            return chain
    # Axes of extent 1 can join a run of neighbours without changing what is folded.
    first, last = axes[0], axes[-1]
    if any(x.shape[a] != 1 for a in range(first, last) if a not in axes):
        return None
    w = ReduceWorkload(
        _REDUCTIONS.get(name, "mean"), x.shape, out.shape,
        math.prod(x.shape[:first]), math.prod(x.shape[first : last + 1]),
        math.prod(x.shape[last + 1 :]), storage(x), _averaging(x, out) if quantized else None,
        None if x.dtype is out.dtype or quantized else storage(out),
    )  # fmt: skip
    return self.call(name, w, reduce, (x,))


def _sum_of_steps(self: CpuLowering, node: Node, axis: int) -> KernelCall | None:
    """Return the call that sums what elementwise steps make, or None where there are none."""
    from qcompiler.targets.kernels.sums import SumChainWorkload, sum_chain

    source, nodes, others = steps_before(node, computed=True)
    if not nodes or axis == source.type.rank - 1 or not is_float32(source, node.output):
        return None
    read = iter(others)
    covered, operands = list(nodes), [source]
    steps: list[tuple[str, tuple[tuple[int, ...], ...]]] = []
    for n in nodes:
        factors: tuple[Value, ...] = (next(read),) if len(n.inputs) > 1 else ()
        made = factors[0].producer if factors else None
        if made is not None and _is_outer_product(made):
            covered.append(made)
            factors = tuple(made.operands)
        operands += factors
        steps.append((n.op.name, tuple(v.shape for v in factors)))
    w = SumChainWorkload(source.shape, axis, tuple(steps), node.output.shape)
    return self.call("reduce_sum", w, sum_chain, tuple(operands), covers=tuple(covered))


def _is_outer_product(node: Node) -> bool:
    """Whether a node multiplies tensors that both are smaller than the result, for one reader."""
    out = node.output
    if node.op.name != "mul" or not is_float32(*node.operands, out) or len(out.uses) != 1:
        return False
    if node.graph is not None and node.graph.is_output(out):
        return False
    return all(v.type.size < out.type.size for v in node.operands)


# ------------------------------------------------------------------- softmax, normalization


@row("qsoftmax")
def _qsoftmax(self: CpuLowering, node: Node) -> KernelCall | None:
    from qcompiler.targets.kernels.norm import QSoftmaxWorkload, pack_softmax, qsoftmax
    from qcompiler.targets.kernels.scores import ScoresWorkload, softmax_scores

    x, out = node.input(0), node.output
    if 0 in x.shape:
        return None
    o = grid(out) if out.qparams is not None else None
    if is_float32(x):
        scores = ScoresWorkload(
            x.shape, int(node.attr("axis")), 1.0 if o is None else o.s, storage(out),
            *((0, 0, 0) if o is None else (o.z, o.qmin, o.qmax)),
        )  # fmt: skip
        return self.call("qsoftmax", scores, softmax_scores, (x,))
    if not is_per_tensor(x) or x.dtype is DType.INT16:
        return None
    w = QSoftmaxWorkload(
        x.shape, int(node.attr("axis")), storage(x), 1.0 if o is None else o.s, storage(out),
        *((0, 0, 0) if o is None else (o.z, o.qmin, o.qmax)),
    )  # fmt: skip
    table = pack_softmax(numerics.softmax_table(grid(x).s), w, self.isa)
    return self.call("qsoftmax", w, qsoftmax, (x,), (table,))


@row("qlayer_norm")
def _qlayer_norm(self: CpuLowering, node: Node) -> KernelCall | None:
    from qcompiler.targets.kernels.norm import QLayerNormWorkload, qlayer_norm

    x, gamma, beta, out = node.input(0), node.input(1), node.input(2), node.output
    if not is_per_tensor(x) or not gamma.is_constant or not beta.is_constant:
        return None
    o = grid(out) if out.qparams is not None else None
    w = QLayerNormWorkload(
        x.shape, storage(x), grid(x).s, float(node.attr("epsilon")), storage(out),
        *((1.0, 0, 0, 0) if o is None else (o.s, o.z, o.qmin, o.qmax)),
    )  # fmt: skip
    constants = (gamma.array().astype(np.float32), beta.array().astype(np.float32))
    return self.call("qlayer_norm", w, qlayer_norm, (x,), constants)


@row("softmax")
def _softmax(self: CpuLowering, node: Node) -> KernelCall | None:
    from qcompiler.targets.kernels.norm import FloatSoftmaxWorkload, float_softmax

    x = node.input(0)
    if not is_float32(x) or 0 in x.shape:
        return None
    w = FloatSoftmaxWorkload(x.shape, int(node.attr("axis")))
    return self.call("softmax", w, float_softmax, (x,))


@row("layer_norm")
def _layer_norm(self: CpuLowering, node: Node) -> KernelCall | None:
    from qcompiler.targets.kernels.norm import FloatLayerNormWorkload, float_layer_norm

    x, gamma, beta = node.input(0), node.optional(1), node.optional(2)
    axis, depth = int(node.attr("axis")) % max(x.type.rank, 1), x.shape[-1]
    if not is_float32(x) or 0 in x.shape or axis != x.type.rank - 1:
        return None
    constants = []
    for v, default in ((gamma, 1.0), (beta, 0.0)):
        if v is not None and (not v.is_constant or v.shape != (depth,) or not is_float32(v)):
            return None
        constants.append(np.full(depth, default, np.float32) if v is None else v.array())
    w = FloatLayerNormWorkload(x.shape, float(node.attr("epsilon")))
    return self.call("layer_norm", w, float_layer_norm, (x,), tuple(constants))


@row("instance_norm")
def _instance_norm(self: CpuLowering, node: Node) -> KernelCall | None:
    from qcompiler.targets.kernels.norm import FloatInstanceNormWorkload, float_instance_norm

    x, scale, bias = node.input(0), node.input(1), node.input(2)
    constant = scale.is_constant and bias.is_constant
    if not is_float32(x, scale, bias) or 0 in x.shape or not constant:
        return None
    w = FloatInstanceNormWorkload(x.shape, float(node.attr("epsilon")))
    return self.call("instance_norm", w, float_instance_norm, (x,), (scale.array(), bias.array()))


_UNARY = (
    "abs", "ceil", "elu", "erf", "exp", "floor", "gelu", "hard_sigmoid", "hard_swish",
    "leaky_relu", "log", "mish", "neg", "reciprocal", "round", "sigmoid", "silu", "softplus",
    "sqrt", "tanh",
)  # fmt: skip


@row(*_UNARY)
def _float_unary(self: CpuLowering, node: Node) -> KernelCall | None:
    from qcompiler.targets.kernels.pointwise import FloatUnaryWorkload, float_unary

    x = node.input(0)
    if not self.is_real(x, node.output) or 0 in x.shape:
        return None
    function = node.op.name
    if function == "gelu" and node.attr("approximate") == "tanh":
        function = "gelu_tanh"
    alpha, beta = (float(node.attr(k)) if k in node.attrs else 0.0 for k in ("alpha", "beta"))
    w = FloatUnaryWorkload(function, x.shape, alpha, beta, storage(x), storage(node.output))
    return self.call(function, w, float_unary, (x,))
