# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""ONNX Runtime behind a small wall: the float oracle, calibration runs, and opaque nodes.

On x86 without VNNI the optimised int8 kernels of ONNX Runtime saturate and return wrong integers:
run quantized models with `optimization="basic"` or `"disabled"`.
"""

from __future__ import annotations

import ctypes
import math
import os
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnxruntime

from qcompiler.errors import DataError, ModelError
from qcompiler.four_bits import packed, unpacked
from qcompiler.types import Array, DType, Shape

Optimization = Literal["disabled", "basic", "all"]

_LEVELS = {
    "disabled": onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL,
    "basic": onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC,
    "all": onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL,
}

_NARROW = {"tensor(int4)": DType.INT4, "tensor(uint4)": DType.UINT4}
_ELEMENTS = {DType.UINT4: 21, DType.INT4: 22}
"""Numbers of the element types in ONNX."""

_state = onnxruntime.capi.onnxruntime_pybind11_state
_ERRORS: tuple[type[Exception], ...] = (
    _state.Fail,
    _state.InvalidArgument,
    _state.InvalidGraph,
    _state.InvalidProtobuf,
    _state.NoSuchFile,
    _state.NotImplemented,
    _state.RuntimeException,
    ValueError,
    RuntimeError,
)


class Session:
    """A model loaded by ONNX Runtime on the CPU.

    Attributes:
        input_names: Names that `run` takes.
        output_names: Names that `run` returns.
    """

    def __init__(
        self,
        model: bytes | str | os.PathLike[str],
        *,
        optimization: Optimization = "basic",
        threads: int = 1,
        extra_outputs: Sequence[str] = (),
        constants: Mapping[str, Array] | None = None,
    ) -> None:
        """Load a model.

        Args:
            model: Serialized model, or the path of a file.
            optimization: Graph optimisation level.
            threads: Threads inside an operator; 0 lets ONNX Runtime choose.
            extra_outputs: Inner values to return as well (makes the runtime keep them).
            constants: Initializers that the model declares without elements, by name.

        Raises:
            ModelError: ONNX Runtime refuses the model, or a name in `extra_outputs` is unknown.
        """
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = _LEVELS[optimization]
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 4
        if constants:  # read in place, so kept as long as the session
            self._constants = [np.ascontiguousarray(a) for a in constants.values()]
            held = [onnxruntime.OrtValue.ortvalue_from_numpy(a) for a in self._constants]
            options.add_external_initializers(list(constants), held)
        if extra_outputs:
            from qcompiler.onnx_export_node import with_outputs

            if not isinstance(model, bytes):
                try:
                    model = Path(model).read_bytes()
                except OSError as error:
                    raise ModelError(f"cannot read the model: {error}") from error
            model = with_outputs(model, extra_outputs)
        source: Any = model if isinstance(model, bytes) else os.fspath(model)
        try:
            self._session = onnxruntime.InferenceSession(
                source, options, providers=["CPUExecutionProvider"]
            )
        except _ERRORS as error:
            raise ModelError(f"ONNX Runtime cannot load the model: {error}") from error
        self.input_names = tuple(i.name for i in self._session.get_inputs())
        self.output_names = tuple(o.name for o in self._session.get_outputs())
        self._narrow = has_four_bits(self._session)

    def run(
        self, inputs: Mapping[str, Array], outputs: Sequence[str] | None = None
    ) -> dict[str, Array]:
        """Run the model on named arrays.

        Args:
            inputs: One array per input.
            outputs: Names to return; default: all.

        Raises:
            DataError: ONNX Runtime refuses the inputs or fails while running.
        """
        names = list(self.output_names if outputs is None else outputs)
        feed = {k: np.ascontiguousarray(v) for k, v in inputs.items()}
        try:
            if self._narrow:
                values = runner(self._session, feed, names)()
            else:
                values = self._session.run(names, feed)
        except _ERRORS as error:
            raise DataError(f"ONNX Runtime cannot run the model: {error}") from error
        return dict(zip(names, values, strict=True))


def has_four_bits(session: Any) -> bool:
    """Whether a session takes or returns 4-bit integers."""
    return any(v.type in _NARROW for v in (*session.get_inputs(), *session.get_outputs()))


def runner(
    session: Any, feeds: Mapping[str, Array], outputs: Sequence[str] | None = None
) -> Callable[[], list[Array]]:
    """Return what runs a session of ONNX Runtime on arrays, which are made ready once.

    Numpy has no arrays of 4-bit integers: ours hold one in a byte, ONNX Runtime's values two.

    Args:
        session: An `InferenceSession`.
        feeds: One array per input.
        outputs: Names of results; default: all.
    """
    if not has_four_bits(session):
        given = dict(feeds)
        return lambda: list(session.run(outputs, given))
    types = {i.name: i.type for i in session.get_inputs()}
    values = {k: _packed(a, _NARROW.get(types.get(k, ""))) for k, a in feeds.items()}
    return lambda: [_unpacked(v) for v in session.run_with_ort_values(outputs, values)]


def _packed(a: Array, dtype: DType | None) -> Any:
    """Return an array as a value of ONNX Runtime; two elements to a byte where they are 4 bits."""
    if dtype is None:
        return onnxruntime.OrtValue.ortvalue_from_numpy(a)
    raw = packed(a)
    made = onnxruntime.OrtValue.ortvalue_from_shape_and_type(list(a.shape), _ELEMENTS[dtype])
    ctypes.memmove(made.data_ptr(), raw, len(raw))
    return made


def _unpacked(value: Any) -> Array:
    """Do the reverse of `_packed`."""
    dtype = _NARROW.get(value.data_type())
    if dtype is None:
        return np.asarray(value.numpy())
    shape = tuple(value.shape())
    count = math.prod(shape)
    raw = np.frombuffer(ctypes.string_at(value.data_ptr(), (count + 1) // 2), np.uint8)
    return unpacked(raw, dtype, count).reshape(shape)


@lru_cache(maxsize=64)
def _node_session(
    node: bytes, domain: str, opset: int, operands: tuple[tuple[DType, Shape] | None, ...]
) -> tuple[Session, tuple[str, ...], tuple[str, ...]]:
    from qcompiler.onnx_export_node import single_node_model

    model, inputs, outputs = single_node_model(node, domain, opset, operands)
    return Session(model, optimization="disabled"), inputs, outputs


def run_node(
    node: bytes, domain: str, opset: int, arrays: Sequence[Array | None]
) -> tuple[Array, ...]:
    """Run one ONNX node.

    Args:
        node: Serialized NodeProto.
        domain: Its operator domain.
        opset: Version of that domain.
        arrays: Operands in the node's order; None where one is omitted.

    Returns:
        The results that the node names, in order.

    Raises:
        ModelError: ONNX Runtime does not know the operator.
        DataError: It fails on these operands.
    """
    operands = tuple(
        None if a is None else (DType.of(a.dtype), tuple(int(d) for d in a.shape)) for a in arrays
    )
    session, inputs, outputs = _node_session(node, domain, opset, operands)
    feed = dict(zip(inputs, (a for a in arrays if a is not None), strict=True))
    found = session.run(feed)
    return tuple(np.asarray(found[name]) for name in outputs)
