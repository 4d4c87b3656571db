# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""Which kernel computes which product on a CPU: convolutions and matrix products of every kind.

Weights held in fewer bits (a cast or a dequantize of a constant) are taken as they are held; the
kernel widens them in registers.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import numpy as np

from qcompiler import numerics
from qcompiler.ir import Node, Value
from qcompiler.plan import summed_axis
from qcompiler.targets.choice import Tunable
from qcompiler.targets.cpu_lowering import (
    CpuLowering,
    grid,
    is_float32,
    is_per_tensor,
    row,
    scalar_multiplier,
    storage,
)
from qcompiler.targets.tvm_lower import KernelCall
from qcompiler.types import Array, DType, PerAxis, PerGroup


def _weights(w: Value) -> tuple[Array, Array] | None:
    """Return (int8 weights, float64-exact scales) of a constant with zero point 0, or None."""
    if not w.is_constant or w.qparams is None:
        return None
    data, q = w.array(), w.qparams
    if isinstance(q.granularity, PerGroup):
        return None
    if w.dtype is DType.UINT8 and (q.zero_point == 128).all():
        data = (data.astype(np.int16) - 128).astype(np.int8)
    elif w.dtype not in (DType.INT8, DType.INT4) or not q.is_symmetric:
        return None
    return data, q.scale


def _float_weights(node: Node) -> tuple[Any, tuple[Node, ...]] | None:
    """Return the constant weights of a float product, and the node that widens them, if any.

    Weights held in half precision or in integers (a cast or a dequantize of a constant, for this
    product only) are returned as they are held. None where the weights are computed.
    """
    from qcompiler.targets.kernels.weight_forms import GroupedWeights

    w = node.input(1)
    if w.is_constant:
        return w.array(), ()
    wide = w.producer
    if wide is None or len(w.uses) != 1 or wide.op.name not in ("cast", "dequantize"):
        return None
    held = wide.input(0)
    if not held.is_constant or w.dtype is not DType.FLOAT32:
        return None
    if held.dtype is DType.FLOAT16:
        return held.array(), (wide,)
    q = held.qparams
    if q is None or held.dtype.bits not in (4, 8) or w.type.rank < 2:
        return None
    axis = summed_axis(node)
    group = held.shape[axis]
    if isinstance(q.granularity, PerGroup):
        if q.granularity.axis != axis:
            return None
        group = q.granularity.group_size
    elif isinstance(q.granularity, PerAxis) and q.granularity.axis == axis:
        return None
    scale, zero = (np.broadcast_to(a, held.shape) for a in numerics.expanded(q, held.shape))
    codes, scale, zero = _turned_back(held.array(), scale, zero, held.dtype)
    return GroupedWeights(codes, scale, zero, held.dtype.bits, group), (wide,)


def _turned_back(
    codes: Array, scale: Array, zero: Array, storage: DType
) -> tuple[Array, Array, Array]:
    """Codes and zero points of the same products, with negative scales where these centre them.

    `s (q - z)` is `-s ((m - q) - (m - z))` with m the sum of the least and the greatest code. What
    came with a negative scale (see the importer) so needs no zero points in a kernel.
    """
    mirror = storage.min + storage.max
    middle = (mirror + 1) // 2
    turned = zero == middle - 1
    back = np.where(turned, mirror - codes.astype(np.int16), codes).astype(codes.dtype)
    return back, np.where(turned, -scale, scale), np.where(turned, middle, zero)


def _epilogue(
    node: Node, x: Value, weight_scale: Array, channels: int, *, biased: bool = True
) -> tuple[Any, Any] | None:
    """Return (Epilogue, GemmValues) of an integer product, or None where kernels lack it."""
    from qcompiler.targets.kernels.workload import Epilogue, GemmValues

    out, residual = node.output, node.optional(3)
    bias = node.optional(2) if biased else None
    if not is_per_tensor(x) or x.dtype is DType.INT16:
        return None
    if bias is not None and (not bias.is_constant or bias.type.size != channels):
        return None
    xq = grid(x)
    common: dict[str, Any] = {
        "bias": None if bias is None else bias.array().reshape(-1).astype(np.int32),
        "a_zero_point": xq.z,
        "a_qmin": xq.qmin,
        "a_qmax": xq.qmax,
        "a_spread": xq.spread,
    }
    if out.qparams is None:
        if residual is not None:
            return None
        multiplier = numerics.multiplier(xq.scale, weight_scale)
        values = GemmValues(multiplier=_per_channel(multiplier, channels), **common)
        return Epilogue("float32"), values
    if not is_per_tensor(out):
        return None
    oq = grid(out)
    multiplier = numerics.multiplier(xq.scale, weight_scale, over=oq.scale)
    extra: dict[str, Any] = {}
    if residual is not None:
        if not is_per_tensor(residual):
            return None
        rq = grid(residual)
        extra = {
            "residual_zero_point": rq.z,
            "residual_multiplier": scalar_multiplier(rq.s, over=oq.s),
        }
    values = GemmValues(
        multiplier=_per_channel(multiplier, channels),
        zero_point=oq.z,
        qmin=oq.qmin,
        qmax=oq.qmax,
        **common,
        **extra,
    )
    return Epilogue(storage(out), None if residual is None else storage(residual)), values


def _integer(
    self: CpuLowering, node: Node, w: Value, channels: int
) -> tuple[Array, Any, Any] | None:
    """Return (weights, Epilogue, GemmValues) of an integer product with constant weights."""
    weights = _weights(w)
    if weights is None:
        return _grouped(self, node)
    found = _epilogue(node, node.input(0), weights[1], channels)
    return None if found is None else (weights[0], *found)


def _grouped(self: CpuLowering, node: Node) -> tuple[Array, Any, Any] | None:
    """Return (weights, Epilogue, GemmValues) of a product of weights in groups, or None."""
    w, bias = node.input(1), node.optional(2)
    if w.qparams is None or not isinstance(w.qparams.granularity, PerGroup) or not w.is_constant:
        return None
    if bias is not None and not bias.is_constant:
        return None
    x, out, size = node.input(0), node.output, w.qparams.granularity.group_size
    channels = w.shape[0 if node.op.name == "qconv" else 1]
    # The epilogue of one scale in all: the scales of the groups take its place.
    unbiased = _epilogue(node, x, np.ones((), np.float32), channels, biased=False)
    if unbiased is None or size % self.isa.k_group:
        return None
    epilogue, values = unbiased
    over = 1.0 if out.qparams is None else out.qparams.scale
    scale, zero = numerics.expanded(w.qparams, w.shape)
    data, scale, zero = _turned_back(w.array(), scale, zero, w.dtype)
    values = dataclasses.replace(
        values,
        multiplier=None,
        addend=None if bias is None else numerics.multiplier(bias.array(), over=over),
        group_multiplier=numerics.multiplier(grid(x).scale, scale, over=over),
        group_zero=zero,
    )
    return data, dataclasses.replace(epilogue, group=size), values


def _per_channel(multiplier: Array, channels: int) -> Array:
    return np.ascontiguousarray(np.broadcast_to(multiplier.reshape(-1), (channels,)), np.float32)


def _float_epilogue(node: Node, channels: int) -> tuple[Any, Any] | None:
    from qcompiler.targets.kernels.workload import FLOATS, Epilogue, GemmValues

    if storage(node.output) not in FLOATS:  # double precision is left to TVM
        return None
    bias, residual = node.optional(2), node.optional(3)
    if bias is not None and (not bias.is_constant or bias.type.size != channels):
        return None
    if residual is not None and residual.shape != node.output.shape:
        return None
    values = GemmValues(
        bias=None if bias is None else bias.array().reshape(-1).astype(np.float32),
        act_min=node.attr("act_min"),
        act_max=node.attr("act_max"),
    )
    return Epilogue(storage(node.output), None if residual is None else storage(residual)), values


def _computes_in(self: CpuLowering, x: Value, w: Value, out: Value, held: Any) -> bool:
    """Whether kernels take these dtypes: float32, or activations and weights both in halves."""
    if is_float32(x, w, out):
        return True
    halves = x.dtype is DType.FLOAT16 and isinstance(held, np.ndarray)
    return halves and held.dtype == np.float16 and self.is_real(x, out)


def _stored(node: Node, constant: bool) -> str:
    """Return how the second operand of a matrix product is multiplied."""
    if constant and node.op.name == "qmatmul":
        return "int8"
    return storage(node.input(0 if constant else 1))


@row("qconv", "conv")
def _conv(self: CpuLowering, node: Node) -> KernelCall | None:
    x, w, out = node.input(0), node.input(1), node.output
    if x.type.rank != 4 or node.attr("layout") != "NHWC":
        return None
    channels = out.shape[3]
    widened: tuple[Node, ...] = ()
    found: tuple[Any, Any] | None
    if node.op.name == "qconv":
        integer = _integer(self, node, w, channels)
        if integer is None:
            return None
        data, found, a_dtype = integer[0], integer[1:], storage(x)
    else:
        found, held = _float_epilogue(node, channels), _float_weights(node)
        if found is None or held is None or not _computes_in(self, x, w, out, held[0]):
            return None
        (data, widened), a_dtype = held, storage(x)
    residual = node.optional(3)
    inputs = (x,) if residual is None else (x, residual)
    group = int(node.attr("group"))
    from qcompiler.targets.kernels import depthwise
    from qcompiler.targets.kernels.depthwise_float import (
        build_float_depthwise,
        pack_float_depthwise,
    )
    from qcompiler.targets.kernels.workload import ConvWorkload

    epilogue, values = found
    n, h, width, c = x.shape
    pads = node.attr("pads")
    workload = ConvWorkload(
        n, h, width, c, channels, data.shape[2], data.shape[3], epilogue,
        strides=tuple(node.attr("strides")), pads=(pads[0], pads[1], pads[2], pads[3]),
        dilations=tuple(node.attr("dilations")), groups=group, a_dtype=a_dtype,
    )  # fmt: skip
    if node.op.name == "conv" and group == c > 1:
        if widened and data.dtype != np.float16:
            return None
        packed = pack_float_depthwise(workload, data.astype(x.dtype.numpy), values)
        return KernelCall(
            "depthwise",
            ("depthwise", workload, packed.facts, packed.shapes),
            partial(build_float_depthwise, workload, self.isa, packed),
            inputs,
            packed.arrays,
            workload.macs,
            widened,
        )
    kernel = "depthwise" if depthwise.is_depthwise(workload) and c > 1 else "conv"
    return _chosen(self, Tunable(kernel, workload, self.isa, node, inputs, data, values), widened)


def _chosen(self: CpuLowering, tunable: Tunable, covers: tuple[Node, ...] = ()) -> KernelCall:
    """Return the call of a kernel with the parameters that `choose` picks."""
    from qcompiler.targets.choice import build_kernel

    params, packed = self.choose(tunable)
    kernel, workload = tunable.kernel, tunable.workload
    return KernelCall(
        "depthwise" if kernel == "depthwise" else tunable.node.op.name,
        (kernel, workload, self.isa.name, params, packed.facts, packed.shapes),
        partial(build_kernel, kernel, workload, self.isa, params, packed),
        tunable.inputs,
        packed.arrays,
        workload.macs,
        covers,
    )


@row("qmatmul", "matmul")
def _matmul(self: CpuLowering, node: Node) -> KernelCall | None:
    from qcompiler.targets.kernels.workload import MatmulWorkload

    a, b, out = node.input(0), node.input(1), node.output
    if a.type.rank < 2 or b.type.rank < 2 or 0 in out.shape:
        return None
    held = _float_weights(node) if node.op.name == "matmul" else None
    constant = (b.is_constant or held is not None) and b.type.rank == 2
    channels = out.shape[-1]
    data: Any = None
    widened: tuple[Node, ...] = ()
    if node.op.name == "matmul":
        found = _float_epilogue(node, channels)
        if constant and held is not None:
            data, widened = held
        if found is None or not _computes_in(self, a, b, out, data):
            return None
    elif constant:
        integer = _integer(self, node, b, channels)
        if integer is None:
            return None
        data, found = integer[0], integer[1:]
    else:
        if not is_per_tensor(b) or b.dtype is DType.INT16:
            return None
        found = _epilogue(node, a, grid(b).scale, channels)
        if found is None:
            return None
        found = found[0], dataclasses.replace(found[1], b_zero_point=grid(b).z)
    epilogue, values = found
    workload = MatmulWorkload(
        a.shape, b.shape, epilogue, a_dtype=storage(a),
        b_dtype=_stored(node, constant),
        b_constant=constant, transpose_a=node.attr("transpose_a"),
        transpose_b=node.attr("transpose_b"),
    )  # fmt: skip
    residual = node.optional(3)
    inputs = (a,) if constant else (a, b)
    inputs = inputs if residual is None else (*inputs, residual)
    return _chosen(self, Tunable("matmul", workload, self.isa, node, inputs, data, values), widened)


@row("dynamic_quantize")
def _dynamic_quantize(self: CpuLowering, node: Node) -> KernelCall | None:
    from qcompiler.targets.kernels.dynamic import DynamicQuantizeWorkload, dynamic_quantize

    x, q = node.input(0), node.outputs[0]
    if 0 in x.shape:
        return None
    run = {"row": x.shape[-1], "block": node.attr("block"), "tensor": 0}[node.attr("per")]
    w = DynamicQuantizeWorkload(x.shape, run, storage(q), grid(q).z)
    return self.call("dynamic_quantize", w, dynamic_quantize, (x,))


@row("dynamic_matmul")
def _dynamic_matmul(self: CpuLowering, node: Node) -> KernelCall | None:
    from qcompiler.targets.kernels.workload import Epilogue, GemmValues, MatmulWorkload

    a, b, scale, out = node.input(0), node.input(1), node.input(2), node.output
    bias, residual = node.optional(3), node.optional(4)
    if a.type.rank < 2 or 0 in out.shape or 0 in a.shape or not b.is_constant:
        return None
    if bias is not None and not bias.is_constant:
        return None
    added = None if residual is None else "float32"
    epilogue = Epilogue("float32", added, "row" if scale.type.rank else "tensor")
    aq = grid(a)
    values = GemmValues(
        a_zero_point=aq.z, a_qmin=aq.qmin, a_qmax=aq.qmax,
        act_min=node.attr("act_min"), act_max=node.attr("act_max"),
        addend=None if bias is None else bias.array(),
    )  # fmt: skip
    held, data = b.qparams, b.array()
    if held is not None and isinstance(held.granularity, PerGroup):
        size = held.granularity.group_size
        if size % self.isa.k_group:
            return None
        factors, zeros = numerics.expanded(held, b.shape)
        data, factors, zeros = _turned_back(data, factors, zeros, b.dtype)
        epilogue = dataclasses.replace(epilogue, row_scale="block", group=size)
        values = dataclasses.replace(values, group_multiplier=factors, group_zero=zeros)
    else:
        weights = _weights(b)
        if weights is None:
            return None
        multiplier = _per_channel(weights[1], out.shape[-1])
        values = dataclasses.replace(values, multiplier=multiplier)
    workload = MatmulWorkload(a.shape, b.shape, epilogue, a_dtype=storage(a))
    inputs = (a, scale) if residual is None else (a, residual, scale)
    return _chosen(self, Tunable("matmul", workload, self.isa, node, inputs, data, values))
