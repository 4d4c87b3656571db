# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""The worker process of the tuner: builds kernels, or runs and times them.

Started as `python -m qcompiler.targets.tune_worker`. It answers requests from standard input on
what was standard output, each a length and a pickle; only its parent is on the other end. It ends
when the parent does, however that ends.
"""

from __future__ import annotations

import os
import pickle
import struct
import sys
from collections.abc import Sequence
from typing import IO, Any

import numpy as np

from qcompiler.cpu import allow_tiles
from qcompiler.types import Array

HEADER = struct.Struct("<Q")
SYMBOL = "main"

_FLUSH_BYTES = 4 << 20
"""Evicted before a timed call: in a model, a kernel's weights are not in level 2 either."""
_LEAST_SECONDS = 20e-6
"""Faster kernels are called several times in one measurement."""


def send(stream: IO[bytes], message: object) -> None:
    """Write one message."""
    data = pickle.dumps(message, protocol=5)
    stream.write(HEADER.pack(len(data)))
    stream.write(data)
    stream.flush()


def build(
    kernel: str,
    workload: Any,
    isa: tuple[str, str],
    params: Any,
    facts: Any,
    shapes: Sequence[tuple[str, tuple[int, ...], str]],
    path: str,
) -> None:
    """Compile a kernel into the shared library `path`.

    Args:
        kernel: Generator, as in `Tunable.kernel`.
        workload: Its workload.
        isa: Name of the row, and of the processor that code is scheduled for.
        params: The candidate.
        facts: What packing proved.
        shapes: Name, shape and dtype of each packed constant.
        path: Where to write.
    """
    import tvm

    from qcompiler.linker import link_library
    from qcompiler.targets.choice import build_kernel
    from qcompiler.targets.isa import isa_named, tvm_target, with_processor
    from qcompiler.targets.kernels.packing import Packed

    name, mcpu = isa
    row = with_processor(isa_named(name), mcpu)
    arrays = tuple(np.broadcast_to(np.zeros((), dtype), shape) for _, shape, dtype in shapes)
    packed = Packed(arrays, tuple(name for name, _, _ in shapes), facts)
    function = build_kernel(kernel, workload, row, params, packed, SYMBOL)
    module = tvm.IRModule({SYMBOL: function.with_attr("global_symbol", SYMBOL)})
    library = tvm.compile(module, target=tvm_target(row))
    library.export_library(path, fcompile=link_library, triple=row.mtriple)


class Bench:
    """Runs kernels of one workload on this machine's CPU."""

    def __init__(self) -> None:
        allow_tiles()  # kernels of the AMX row need it
        self.expected: Array | None = None
        self.inputs: list[Any] = []
        self.kernels: dict[int, tuple[Any, list[Any]]] = {}
        self.machine = "this machine"

    def _device(self) -> Any:
        import tvm

        return tvm.cpu()

    def _tensor(self, array: Array) -> Any:
        import tvm

        shaped = np.ascontiguousarray(array).reshape(array.shape)
        return tvm.runtime.tensor(shaped, self._device())

    def _module(self, path: str) -> Any:
        import tvm

        return tvm.runtime.load_module(path)

    def open(self, inputs: Sequence[Array], expected: Array) -> None:
        """Start with a workload: its activations, and the result that every kernel must give."""
        self.kernels.clear()
        self.expected = expected
        self.inputs = [self._tensor(array) for array in inputs]

    def load(self, number: int, path: str, constants: Sequence[Array]) -> tuple[bool, float]:
        """Load a kernel and run it; return whether its result is right, and its rough seconds.

        Integers must be equal; floats may differ as sums in another order do, and sums of halves
        as far as those stray.
        """
        expected = self.expected
        if expected is None:
            raise RuntimeError("no workload is open")
        module = self._module(path)
        # Never written elements must show, so the output starts with a pattern.
        start = np.frombuffer(b"\xa5" * expected.nbytes, expected.dtype).reshape(expected.shape)
        arguments = [*self.inputs, *map(self._tensor, constants), self._tensor(start)]
        module[SYMBOL](*arguments)
        result = arguments[-1].numpy()
        if expected.dtype.kind == "f":
            scale = float(np.abs(expected).max(initial=0.0)) or 1.0
            halves = any(str(tensor.dtype) == "float16" for tensor in self.inputs)
            rtol, atol = (1e-2, 5e-3) if halves else (1e-4, 1e-5)
            right = bool(np.allclose(result, expected, rtol=rtol, atol=atol * scale))
        else:
            right = bool(np.array_equal(result, expected))
        self.kernels[number] = (module, arguments)
        return right, self._once(number, 1, 3)

    def _once(self, number: int, calls: int, repeat: int = 1) -> float:
        module, arguments = self.kernels[number]
        evaluator = module.time_evaluator(
            SYMBOL, self._device(), number=calls, repeat=repeat, cache_flush_bytes=_FLUSH_BYTES
        )
        return float(min(evaluator(*arguments).results))

    def blame(self) -> str:
        """Return the kind of an error: "failed" is the kernel's, "lost" the device's."""
        return "failed"

    def compare(self, numbers: Sequence[int], rounds: int) -> dict[int, list[float]]:
        """Time kernels in interleaved rounds; return the seconds of each by round."""
        calls = {n: max(1, int(_LEAST_SECONDS / max(self._once(n, 1), 1e-7))) for n in numbers}
        seconds: dict[int, list[float]] = {n: [] for n in numbers}
        for index in range(rounds):
            # Every other round runs backwards, so that no kernel always follows the same one.
            for n in numbers if index % 2 else reversed(numbers):
                seconds[n].append(self._once(n, calls[n]))
        return seconds


def main() -> None:
    """Answer requests until the parent closes the pipe."""
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what libraries print must not get among the replies
    requests = sys.stdin.buffer
    bench = Bench()
    while header := requests.read(HEADER.size):
        name, arguments = pickle.loads(requests.read(HEADER.unpack(header)[0]))
        try:
            if name == "connect":
                from qcompiler.targets.tune_remote import RemoteBench

                bench = RemoteBench(*arguments)
                reply: tuple[str, object] = ("ok", bench.machine)
            else:
                function = build if name == "build" else getattr(bench, name)
                reply = ("ok", function(*arguments))
        except Exception as error:  # whatever a candidate does wrong is an answer, not our end
            lines = str(error).strip().splitlines() or [""]
            said = f"{type(error).__name__}: {lines[-1]}"[:300]
            reply = (getattr(error, "kind", None) or bench.blame(), said)
        send(replies, reply)


if __name__ == "__main__":
    main()
