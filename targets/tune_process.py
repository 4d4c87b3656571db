# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""Worker processes of the tuner, from the parent's side: calls with a time limit.

A generated kernel may hang or end its process; both are ordinary answers here. The workers are
plain child processes with a pipe, so a script that calls `qcompiler.compile` needs no `__main__`
guard, and they die with the parent.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import queue
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Any, TypeVar, final

from qcompiler.targets.tune_worker import HEADER, send

T = TypeVar("T")


class WorkerError(Exception):
    """A call that failed; `status` as in `records.Status`."""

    status = "crashed"


class WorkerFailedError(WorkerError):
    """The worker answered with an error and lives on."""


class DeviceLostError(WorkerError):
    """The remote device that ran kernels for the worker answers no more."""


class TrackerError(WorkerError):
    """The tracker that lends devices does not answer, or has none to lend."""


class WorkerTimeoutError(WorkerError):
    """The worker did not answer in time and was ended."""

    status = "timeout"


class WorkerCrashedError(WorkerError):
    """The worker's process ended."""


_KINDS = {"failed": WorkerFailedError, "lost": DeviceLostError, "tracker": TrackerError}


@final
class Worker:
    """One worker process, started by the first call and again after one that ended it."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._errors: Any = None

    @property
    def alive(self) -> bool:
        """Whether the process that the last call used still runs."""
        return self._process is not None

    def _start(self) -> subprocess.Popen[bytes]:
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115  (closed by stop)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "qcompiler.targets.tune_worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env={
                **os.environ,
                # One thread is what can be timed reliably; candidates must share as well as the
                # default does, which is checked beforehand.
                "TVM_NUM_THREADS": "1",
                # The very code that runs here, wherever this process found it.
                "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
            },
            start_new_session=True,  # Ctrl-C is the parent's business
        )
        return self._process

    def call(self, name: str, *arguments: object, timeout: float) -> Any:
        """Call a function of the worker.

        Raises:
            WorkerFailedError: It raised.
            DeviceLostError: The remote device does not answer.
            TrackerError: No remote device can be had.
            WorkerTimeoutError: No answer within `timeout` seconds.
            WorkerCrashedError: The process ended.
        """
        process = self._process or self._start()
        if process.stdin is None or process.stdout is None:
            raise AssertionError("workers are started with pipes")
        deadline = time.monotonic() + timeout
        try:
            send(process.stdin, (name, arguments))
            header = self._read(process.stdout.fileno(), HEADER.size, deadline)
            reply = self._read(process.stdout.fileno(), HEADER.unpack(header)[0], deadline)
        except TimeoutError:
            self.stop()
            raise WorkerTimeoutError(f"{name} took more than {timeout:g} s") from None
        except (EOFError, BrokenPipeError):
            raise WorkerCrashedError(self._last_words(process)) from None
        except BaseException:  # an interrupt too: the pipe holds half an answer
            self.stop()
            raise
        kind, value = pickle.loads(reply)
        if kind != "ok":
            raise _KINDS[kind](value)
        return value

    @staticmethod
    def _read(handle: int, size: int, deadline: float) -> bytes:
        data = bytearray()
        while len(data) < size:
            ready, _, _ = select.select([handle], [], [], max(0.0, deadline - time.monotonic()))
            if not ready:
                raise TimeoutError
            part = os.read(handle, min(size - len(data), 1 << 20))
            if not part:
                raise EOFError
            data += part
        return bytes(data)

    def _last_words(self, process: subprocess.Popen[bytes]) -> str:
        status = process.wait()
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").strip().splitlines()
        self.stop()
        said = f": {lines[-1][:200]}" if lines else ""
        return f"the process ended with status {status}{said}"

    def stop(self) -> None:
        """End the process, if there is one."""
        process, self._process = self._process, None
        if process is None:
            return
        process.kill()
        for stream in (process.stdin, process.stdout, self._errors):
            if stream is not None:
                with contextlib.suppress(OSError):
                    stream.close()
        process.wait()


@final
class WorkerPool:
    """Several workers that serve calls in parallel."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._workers = [Worker() for _ in range(size)]
        self._idle: queue.SimpleQueue[Worker] = queue.SimpleQueue()
        for worker in self._workers:
            self._idle.put(worker)
        self._threads = ThreadPoolExecutor(size)

    def __enter__(self) -> WorkerPool:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for worker in self._workers:
            worker.stop()
        self._threads.shutdown(cancel_futures=True)

    def map(
        self, name: str, calls: Iterable[Sequence[object]], timeout: float
    ) -> list[WorkerError | None]:
        """Call a function with each of several arguments; return what went wrong with each."""
        return list(self._threads.map(self._one(name, timeout), calls))

    def _one(self, name: str, timeout: float) -> Callable[[Sequence[object]], WorkerError | None]:
        def run(arguments: Sequence[object]) -> WorkerError | None:
            worker = self._idle.get()
            try:
                worker.call(name, *arguments, timeout=timeout)
            except WorkerError as error:
                return error
            finally:
                self._idle.put(worker)
            return None

        return run
