# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import signal
import threading
from collections.abc import Iterator

import pytest

from qcompiler.interrupts import interruptible


@pytest.fixture
def default_handler() -> Iterator[None]:
    """Python's own handler: a process started in the background of a shell ignores SIGINT."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("default_handler")
def test_an_error_after_ctrl_c_is_an_interruption() -> None:
    with pytest.raises(KeyboardInterrupt), interruptible():
        as_native_code_does()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def as_native_code_does() -> None:
    try:
        signal.raise_signal(signal.SIGINT)
    except KeyboardInterrupt:
        raise RuntimeError("callback failed") from None


def test_other_errors_stay() -> None:
    with pytest.raises(RuntimeError, match="callback"), interruptible():
        raise RuntimeError("callback failed")


def test_a_handler_of_the_program_stays() -> None:
    seen: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, _frame: seen.append(number))
    try:
        with interruptible():
            signal.raise_signal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)
    assert seen == [signal.SIGINT]


def test_other_threads_are_left_alone() -> None:
    done: list[bool] = []

    def work() -> None:
        with interruptible():
            done.append(True)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert done == [True]
