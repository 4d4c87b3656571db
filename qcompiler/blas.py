# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""Let numpy's matrix products run in one thread, so that their sums do not hang on the machine.

OpenBLAS divides products, and what it factorizes, among its threads: another number of threads adds
in another order, and a last bit decides a near tie between two codes. Only OpenBLAS is known here,
which numpy's wheels bring along; other libraries are left as they are.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

_MAPS = Path("/proc/self/maps")
_NAMES = [
    (prefix, suffix) for prefix in ("scipy_openblas", "openblas") for suffix in ("64_", "_64_", "")
]

Control = tuple[Callable[[], int], Callable[[int], None]]
"""Tells, and sets, the number of threads of a library."""


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Compute with one thread meanwhile, in the whole process."""
    before = [(put, get()) for get, put in controls()]
    try:
        for put, _ in before:
            put(1)
        yield
    finally:
        for put, count in before:
            put(count)


@functools.cache
def controls() -> tuple[Control, ...]:
    """Return the controls of each OpenBLAS that is loaded."""
    np.ones((1, 1)) @ np.ones((1, 1))  # loaded by now
    found = []
    for path in _libraries():
        try:
            library = ctypes.CDLL(path)
        except OSError:
            continue
        for prefix, suffix in _NAMES:
            get = getattr(library, f"{prefix}_get_num_threads{suffix}", None)
            put = getattr(library, f"{prefix}_set_num_threads{suffix}", None)
            if get is not None and put is not None:
                get.restype, get.argtypes = ctypes.c_int, []
                put.restype, put.argtypes = None, [ctypes.c_int]
                found.append((get, put))
                break
    return tuple(found)


def _libraries() -> list[str]:
    """Return the paths of libraries that may be OpenBLAS."""
    if _MAPS.exists():
        lines = _MAPS.read_text().splitlines()
        paths = {part[5] for line in lines if len(part := line.split(maxsplit=5)) == 6}
    else:
        package = Path(np.__file__).parent
        folders = (package.parent / "numpy.libs", package / ".dylibs")
        paths = {str(p) for f in folders if f.is_dir() for p in f.iterdir()}
    return sorted(p for p in paths if "openblas" in Path(p).name)
