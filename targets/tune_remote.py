# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""Kernels timed on a device that a tracker of TVM's RPC lends, from inside the worker process.

The tracker hands out one device of a key at a time and queues who asks for more. A device that
dies takes its session along; the tuner then asks the tracker for another one.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from typing import Any

import numpy as np

from qcompiler.targets.tune_worker import Bench
from qcompiler.types import Array

__all__ = ["RemoteBench", "RemoteError"]

_ANSWER_SECONDS = 5.0


class RemoteError(Exception):
    """No remote device; `kind` tells the parent whose fault it is."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


class RemoteBench(Bench):
    """Runs kernels of one workload on a borrowed device."""

    def __init__(self, host: str, port: int, key: str) -> None:
        """Borrow a device; waits while all of the key are lent to others.

        Raises:
            RemoteError: No tracker answers there, it knows no device of the key, or the device
                that it lent does not answer.
        """
        from tvm import rpc

        super().__init__()
        where = f"{host}:{port}"
        try:
            # TVM's client would try for a minute.
            socket.create_connection((host, port), timeout=_ANSWER_SECONDS).close()
            tracker = rpc.connect_tracker(host, port)
            servers = tracker.summary()["server_info"]
        except (OSError, RuntimeError, ValueError, KeyError) as error:
            raise RemoteError("tracker", f"no tracker answers at {where} ({error})") from error
        keys = sorted({str(entry["key"]).removeprefix("server:") for entry in servers})
        if key not in keys:
            listed = ", ".join(keys) or "none"
            raise RemoteError(
                "tracker",
                f"the tracker at {where} has no device of key {key!r}; its keys: {listed}",
            )
        try:
            self.session = tracker.request(key, max_retry=1)
            self.device = self.session.cpu(0)
        except (OSError, RuntimeError) as error:
            raise RemoteError(
                "lost", f"a device of key {key!r} does not answer ({error})"
            ) from error
        self.machine = f"rpc {key}"

    def _device(self) -> Any:
        return self.device

    def _module(self, path: str) -> Any:
        name = os.path.basename(path)
        self.session.upload(path, name)
        try:
            return self.session.load_module(name)
        finally:
            self.session.remove(name)  # the loaded library lives on; a board's disk is small

    def blame(self) -> str:
        """Ask the device whether it still answers: if it does, the kernel is to blame."""
        try:
            answer: Array = self._tensor(np.arange(2, dtype=np.int32)).numpy()
        except Exception:  # whatever a broken connection raises
            return "lost"
        return "failed" if answer.tolist() == [0, 1] else "lost"

    def open(self, inputs: Sequence[Array], expected: Array) -> None:
        """Start with a workload, as `Bench.open`; frees what the last one left on the device."""
        self.inputs = []
        super().open(inputs, expected)
