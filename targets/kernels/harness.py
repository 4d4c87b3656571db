# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""Build one kernel and run or time it, in this process; for tests and benchmarks."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import tvm

from qcompiler.targets.isa import Isa, tvm_target

__all__ = ["assembly", "build", "run", "seconds"]

Array = npt.NDArray[Any]


def build(function: Any, isa: Isa) -> Any:
    """Compile a PrimFunc; the module holds it as "main"."""
    named = function.with_attr("global_symbol", "main")
    return tvm.compile(tvm.IRModule({"main": named}), target=tvm_target(isa))


def run(library: Any, *inputs: Array, shape: tuple[int, ...], dtype: str) -> Array:
    """Call a built kernel with `inputs` and an output of `shape`; return the output.

    The output starts filled with a pattern, so an element that is never written shows.
    """
    start = np.frombuffer(b"\xa5" * int(np.prod(shape) * np.dtype(dtype).itemsize), dtype)
    arguments = [tvm.runtime.tensor(np.asarray(array, order="C")) for array in inputs]
    output = tvm.runtime.tensor(start.reshape(shape))
    library["main"](*arguments, output)
    result: Array = output.numpy()
    return result


def seconds(
    library: Any,
    *inputs: Array,
    shape: tuple[int, ...],
    dtype: str,
    number: int = 20,
    repeat: int = 15,
) -> float:
    """The least time of one call, over `repeat` means of `number` calls."""
    arrays = [*inputs, np.zeros(shape, dtype)]
    arguments = [tvm.runtime.tensor(np.asarray(array, order="C")) for array in arrays]
    timer = library.mod.time_evaluator("main", tvm.cpu(), number=number, repeat=repeat)
    return float(min(timer(*arguments).results))


def assembly(library: Any) -> str:
    """The machine code of a built kernel as text."""
    return str(library.mod.inspect_source("asm"))
