# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""Where the tuner's candidates run: a worker process on this machine, or a device behind it.

A candidate that crashes or hangs ends its worker, and the next call starts another. A remote device
that dies is replaced by another one of the tracker, and the call is made again there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np

from qcompiler.cpu import host_cpu
from qcompiler.errors import TuningError
from qcompiler.interpreter import evaluate, known
from qcompiler.ir import Node, Value
from qcompiler.ops import EvalContext
from qcompiler.targets.choice import Tunable
from qcompiler.targets.tune_process import (
    DeviceLostError,
    TrackerError,
    Worker,
    WorkerCrashedError,
    WorkerError,
    WorkerTimeoutError,
)
from qcompiler.types import Array, DType

__all__ = ["TaskBench", "machine_of", "random_operand", "right_result"]

_RUN_SECONDS = 60.0
_LEND_SECONDS = 120.0
"""How long to wait for a device while others use all of them."""
_DEVICES = 5
"""Devices asked for in turn; a tracker needs a moment to notice that one is gone."""

T = TypeVar("T")
Remote = tuple[str, int, str]
"""Host and port of a tracker, and the key of its devices."""


def machine_of(remote: Remote | None) -> str:
    """Return the name of what measures, for the records."""
    return host_cpu().name if remote is None else f"rpc {remote[2]}"


def random_operand(v: Value, rng: np.random.Generator) -> Array:
    """Return random data in a value's range, which kernels may rely on.

    Where the zero point is near the lowest code, as a rectifier leaves it: the time of some kernels
    depends on how large activations are. A fiftieth of the rows takes all codes all the same.
    """
    if v.dtype in (DType.FLOAT32, DType.FLOAT16):
        return rng.standard_normal(v.shape, np.float32).astype(v.dtype.numpy)
    low, high = v.dtype.min, v.dtype.max
    if v.qparams is not None:
        low, high = int(v.qparams.qmin), int(v.qparams.qmax)
    every = rng.integers(low, high, v.shape, v.dtype.numpy, endpoint=True)
    zero = None if v.qparams is None else int(np.max(v.qparams.zero_point))
    if zero is None or zero - low > (high - low) // 8 or not v.shape:
        return every
    small = np.rint(
        np.abs(rng.standard_normal(v.shape)) * ((high - zero) / 6) * rng.integers(0, 2, v.shape)
    )
    usual = np.minimum(small + zero, high).astype(v.dtype.numpy)
    return np.where(rng.random((*v.shape[:-1], 1)) < 0.02, every, usual)


def right_result(node: Node, arrays: list[Array | None]) -> Array:
    """Return what a node gives by the interpreter, in float32 where kernels multiply halves."""
    if all(a is None or a.dtype != np.float16 for a in arrays):
        return evaluate(node, arrays)[0]
    wide = [None if a is None else a.astype(np.float32) for a in arrays]
    types = tuple(None if v is None else v.type for v in node.inputs)
    context = EvalContext(types, tuple(v.type for v in node.outputs))
    (found,) = node.op.evaluate(wide, node.attrs, context)
    return np.asarray(found, node.output.dtype.numpy)


class TaskBench:
    """Runs one workload's kernels in a worker; every error of theirs is a `WorkerError`."""

    def __init__(self, remote: Remote | None = None) -> None:
        self.worker = Worker()
        self.remote = remote
        self.inputs: list[Array] = []
        self.expected: Array | None = None
        self.loaded: dict[int, tuple[str, Sequence[Array]]] = {}

    def connect(self) -> None:
        """Borrow a device; nothing to do where kernels run on this machine.

        Raises:
            TuningError: None can be had.
        """
        if self.remote is None:
            return
        host, port, key = self.remote
        last = ""
        for _ in range(_DEVICES):
            try:
                self.worker.call("connect", host, port, key, timeout=_LEND_SECONDS)
            except TrackerError as error:
                raise TuningError(
                    f"no device to measure on: {error}",
                    hint="start them: python -m tvm.exec.rpc_server --tracker HOST:PORT --key K; "
                    "what was measured so far is in the records",
                ) from None
            except WorkerTimeoutError:
                raise TuningError(
                    f"no device of key {key!r} got free within {_LEND_SECONDS:g} s",
                    hint="others use them: python -m tvm.exec.query_rpc_tracker shows the queue",
                ) from None
            except WorkerError as error:
                last = str(error)
                self.worker.stop()
            else:
                return
        raise TuningError(
            f"{_DEVICES} times in a row, the tracker at {host}:{port} lent a device that does not "
            f"answer: {last}",
            hint="restart the devices' servers; what was measured so far is in the records",
        )

    def open(self, tunable: Tunable, seed: int) -> None:
        """Make a workload's operands and its right result, by the interpreter."""
        rng = np.random.default_rng(seed)
        operands = {}
        for v in tunable.node.inputs:
            if v is not None and v not in operands:
                held = known(v)
                operands[v] = random_operand(v, rng) if held is None else held
        read = [None if v is None else operands[v] for v in tunable.node.inputs]
        self.expected = right_result(tunable.node, read)
        self.inputs = [operands[v] for v in tunable.inputs]
        self.loaded = {}
        self._surely(self._start)

    def _start(self) -> None:
        if not self.worker.alive:
            self.connect()
        self.worker.call("open", self.inputs, self.expected, timeout=_RUN_SECONDS)

    def _surely(self, step: Callable[[], T]) -> T:
        """Take a step, on another device if the first is lost on the way.

        Raises:
            WorkerCrashedError: That one was lost as well: the kernel is to blame, not the device.
        """
        try:
            return step()
        except DeviceLostError:
            self.worker.stop()
        try:
            return step()
        except DeviceLostError as error:
            self.worker.stop()
            raise WorkerCrashedError(f"two devices were lost over it: {error}") from None

    def _restore(self, but: int | None = None) -> None:
        """Give a new worker the workload and the kernels that the last one had."""
        if self.worker.alive:
            return
        self._start()
        for number, held in self.loaded.items():
            if number != but:
                self.worker.call("load", number, *held, timeout=_RUN_SECONDS)

    def load(self, number: int, path: str, constants: Sequence[Array]) -> tuple[bool, float]:
        """Run a kernel once; return whether its result is right, and its rough seconds.

        Raises:
            WorkerError: It did not run.
        """

        def step() -> tuple[bool, float]:
            self._restore(but=number)
            right, rough = self.worker.call("load", number, path, constants, timeout=_RUN_SECONDS)
            return bool(right), float(rough)

        self.loaded.pop(number, None)
        answer = self._surely(step)
        self.loaded[number] = (path, constants)
        return answer

    def compare(self, numbers: Sequence[int], rounds: int) -> dict[int, list[float]]:
        """Time loaded kernels side by side; return the seconds of each by round."""

        def step() -> dict[int, list[float]]:
            self._restore()
            found: dict[int, list[float]] = self.worker.call(
                "compare", list(numbers), rounds, timeout=_RUN_SECONDS
            )
            return found

        return self._surely(step)
