# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""What the benchmarks of single products share: one thread of ONNX Runtime, and taking turns."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping

import onnx
import onnxruntime as ort

SECONDS = 4.0
"""How long each product is measured, all runners together."""


def session_of(model: onnx.ModelProto, *, integers: bool = True) -> ort.InferenceSession:
    """Return a session of one thread.

    Args:
        model: The model.
        integers: Whether it may make integer products of quantized ones. Those take one scale per
            column alone, and a session that tries others ends with an error.
    """
    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    if not integers:
        options.add_session_config_entry("session.disable_quant_qdq", "1")
    data = model.SerializeToString()
    return ort.InferenceSession(data, options, providers=["CPUExecutionProvider"])


def in_turns(
    calls: Mapping[str, Callable[[], object]], seconds: float = SECONDS, *, shuffled: bool = False
) -> dict[str, list[float]]:
    """Return the milliseconds of the calls, which take turns for so many seconds.

    The first of several that share code and caches pays for what the others find: `shuffled`, each
    round has an order of its own.
    """
    took: dict[str, list[float]] = {name: [] for name in calls}
    order, generator = list(calls.items()), random.Random(0)
    started = time.perf_counter()
    while time.perf_counter() - started < seconds:
        if shuffled:
            generator.shuffle(order)
        for name, call in order:
            start = time.perf_counter()
            call()
            took[name].append(1e3 * (time.perf_counter() - start))
    return took
