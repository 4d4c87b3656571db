# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""One thread for numpy's matrix products, where sums must not hang on the machine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pytest

from qcompiler.blas import controls, one_thread
from qcompiler.ir import Graph
from qcompiler.ops import Stage
from qcompiler.passes.method import Method
from qcompiler.passmanager import PassContext


@pytest.fixture
def threads() -> Callable[[], list[int]]:
    """Return what tells the threads of each library."""
    if not controls():
        pytest.skip("numpy computes without OpenBLAS here")
    return lambda: [get() for get, _ in controls()]


def test_one_thread_meanwhile(threads: Callable[[], list[int]]) -> None:
    before = threads()
    for _, put in controls():
        put(2)
    most = threads()  # a build without threads stays at one
    try:
        with one_thread():
            assert set(threads()) == {1}
            with one_thread():
                pass
            assert set(threads()) == {1}
        assert threads() == most
        with pytest.raises(ZeroDivisionError), one_thread():
            _ = 1 // 0
        assert threads() == most
    finally:
        for (_, put), count in zip(controls(), before, strict=True):
            put(count)


def test_wheels_of_numpy_are_known() -> None:
    config = np.show_config(mode="dicts")  # type: ignore[no-untyped-call]
    if "openblas" not in str(config["Build Dependencies"]["blas"]["name"]):
        pytest.skip("numpy was built without OpenBLAS")
    assert controls()


@dataclass(frozen=True)
class _Asks(Method):
    """Keeps the number of threads that it was run with."""

    name: ClassVar[str] = "asks"
    stage: ClassVar[tuple[Stage, Stage]] = (Stage.FLOAT, Stage.FLOAT)
    seen: ClassVar[list[int]] = []

    def improve(self, graph: Graph, ctx: PassContext) -> bool:
        self.seen.extend(get() for get, _ in controls())
        return False


def test_methods_compute_with_one_thread(threads: Callable[[], list[int]]) -> None:
    before = threads()
    for _, put in controls():
        put(2)
    try:
        assert not _Asks().run(Graph(), PassContext())
        assert set(_Asks.seen) == {1}
    finally:
        for (_, put), count in zip(controls(), before, strict=True):
            put(count)
