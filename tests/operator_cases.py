# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""Run one operator, ours or ONNX Runtime's, and compare results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from hypothesis import strategies as st
from onnx import helper

from qcompiler.interpreter import run
from qcompiler.ir import Graph
from qcompiler.ops import Stage
from qcompiler.ort import Session
from qcompiler.types import DType, QuantParams, TensorType

OPSET = 22


def ort_node(
    op: str,
    arrays: Sequence[np.ndarray | None],
    attrs: Mapping[str, Any],
    *,
    constant: Sequence[int] = (),
    outputs: int = 1,
    opset: int = OPSET,
    domain: str = "",
) -> list[np.ndarray]:
    """Run one ONNX node in ONNX Runtime; operands named in `constant` are initializers."""
    names = ["" if a is None else f"i{k}" for k, a in enumerate(arrays)]
    outs = [f"o{k}" for k in range(outputs)]
    node = helper.make_node(op, names, outs, domain=domain, **attrs)
    infos, inits, feed = [], [], {}
    for k, a in enumerate(arrays):
        if a is None:
            continue
        if k in constant:
            inits.append(onnx.numpy_helper.from_array(np.asarray(a), names[k]))
        else:
            kind = helper.np_dtype_to_tensor_dtype(a.dtype)
            infos.append(helper.make_tensor_value_info(names[k], kind, a.shape))
            feed[names[k]] = a
    graph = helper.make_graph(
        [node], "g", infos, [onnx.ValueInfoProto(name=o) for o in outs], inits
    )
    opsets = [helper.make_opsetid("", opset)]
    if domain:
        opsets.append(helper.make_opsetid(domain, 1))
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    session = Session(model.SerializeToString(), optimization="disabled")
    return list(session.run(feed).values())


def ours(
    op: str,
    arrays: Sequence[np.ndarray | None],
    attrs: Mapping[str, Any] | None = None,
    *,
    qparams: Sequence[QuantParams | None] = (),
    result: TensorType | None = None,
    stage: Stage = Stage.FLOAT,
) -> list[np.ndarray]:
    """Build a one-node graph, verify it, and interpret it."""
    g = Graph("one", stage)
    values, feed = [], {}
    for k, a in enumerate(arrays):
        if a is None:
            values.append(None)
            continue
        q = qparams[k] if k < len(qparams) else None
        values.append(g.add_input(f"i{k}", TensorType(a.shape, DType.of(a.dtype), q)))
        feed[f"i{k}"] = a
    node = g.add(op, values, attrs, types=None if result is None else [result])
    g.set_outputs([(v.name, v) for v in node.outputs])
    g.verify()
    return list(run(g, feed).values())


def infer(op: str, types: Sequence[TensorType | None], **attrs: Any) -> TensorType:
    g = Graph("one", Stage.INTEGER)
    values = [None if t is None else g.add_input("x", t) for t in types]
    return g.add(op, values, attrs).outputs[0].type


def close(got: Sequence[np.ndarray], want: Sequence[np.ndarray], rtol=1e-5, atol=1e-5) -> None:
    assert len(got) == len(want)
    for a, b in zip(got, want, strict=True):
        assert a.dtype == b.dtype
        assert a.shape == b.shape
        if a.dtype.kind == "f":
            np.testing.assert_allclose(a, b, rtol=rtol, atol=atol)
        else:
            np.testing.assert_array_equal(a, b)


def fp(*shape: int) -> TensorType:
    return TensorType(shape, DType.FLOAT32)


def qp(scale: float = 0.1, zero: int = 10, storage: DType = DType.UINT8) -> QuantParams:
    return QuantParams(np.float32(scale), zero, storage, storage.min, storage.max)


def u8(*shape: int, q: QuantParams | None = None) -> TensorType:
    return TensorType(shape, DType.UINT8, q or qp())


@st.composite
def windows(draw: st.DrawFn, rank: int, pad_below_kernel: bool = False):
    kernel = tuple(draw(st.integers(1, 3)) for _ in range(rank))
    dilations = tuple(draw(st.integers(1, 2)) for _ in range(rank))
    strides = tuple(draw(st.integers(1, 3)) for _ in range(rank))
    most = [k - 1 if pad_below_kernel else 2 for k in kernel] * 2
    pads = tuple(draw(st.integers(0, m)) for m in most)
    extents = tuple(
        d * (k - 1) + 1 + draw(st.integers(0, 5)) for k, d in zip(kernel, dilations, strict=True)
    )
    return kernel, strides, pads, dilations, extents
