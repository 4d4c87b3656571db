# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""Running compiled models: inputs of any layout and number, threads, timing."""

from __future__ import annotations

import importlib.util
import os
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from dense_artifact import BATCH, COLS, ROWS, T5, WEIGHT, dense_artifact, samples

from qcompiler import vm
from qcompiler.artifact import Artifact, write_artifact
from qcompiler.benchmark import measure
from qcompiler.cpu import allowed_cpus
from qcompiler.errors import (
    DataError,
    UsageError,
)
from qcompiler.manifest import TensorSpec
from qcompiler.runtime import CompiledModel, load
from qcompiler.types import DType

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("tvm") is None, reason="apache-tvm is not installed"
)


@pytest.fixture(scope="module")
def artifact():
    return dense_artifact()


@pytest.fixture(scope="module")
def path(artifact, tmp_path_factory):
    path = tmp_path_factory.mktemp("artifact") / "m.qcm"
    write_artifact(artifact, path)
    return path


@pytest.fixture(scope="module")
def model(path):
    return load(path)


# --- running ---


def test_results(model):
    x = samples(BATCH)
    out = model({"x": x, "t": T5})
    assert list(out) == ["y", "u"]
    np.testing.assert_allclose(out["y"], x @ WEIGHT.T, rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(out["u"], T5 + 1)
    assert out["y"].flags.owndata
    assert out["y"].flags.writeable


@pytest.mark.parametrize("count", [1, 3, 4, 5, 9])
def test_any_number_of_samples(artifact, count):
    # Without the output that has no batch axis, partial batches are allowed.
    model = _only_y(artifact)
    x = samples(9)
    whole = model({"x": x, "t": T5})["y"]
    part = model({"x": x[:count], "t": T5})["y"]
    assert part.shape == (count, ROWS)
    np.testing.assert_array_equal(part, whole[:count])
    for i in range(count):
        np.testing.assert_array_equal(model({"x": x[i : i + 1], "t": T5})["y"][0], whole[i])


class _FirstOnly:
    def __init__(self, executor):
        self.executor = executor

    def run(self, inputs, *, threads=1):
        return self.executor.run(inputs, threads=threads)[:1]


def _only_y(artifact):
    changed = Artifact(
        **{
            **{f: getattr(artifact, f) for f in artifact.__dataclass_fields__},
            "outputs": {"y": artifact.outputs["y"]},
        }
    )
    inner = vm.VmExecutor(artifact.library, artifact.params.arrays)
    return CompiledModel(changed, executor=_FirstOnly(inner))


def test_outputs_without_batch_axis(model):
    x = samples(8)
    out = model({"x": x, "t": T5})  # t is given once and serves both runs
    assert out["y"].shape == (8, ROWS)
    assert out["u"].shape == (2, 5)
    np.testing.assert_array_equal(out["u"], np.stack([T5 + 1] * 2))
    with pytest.raises(DataError, match=r"6 samples are not a multiple of .* batch 4, and .* 'u'"):
        model({"x": x[:6], "t": T5})


def test_one_more_axis_holds_whole_inputs(model):
    x = samples(8)
    t = np.stack([T5, T5 * 10])
    out = model({"x": x, "t": t})
    np.testing.assert_array_equal(out["u"], t + 1)
    again = model({"x": x.reshape(2, BATCH, COLS), "t": t})
    np.testing.assert_array_equal(again["y"], out["y"])
    single = model({"x": x[:4], "t": t[:1]})
    assert single["u"].shape == (1, 5)


def test_layout_and_alignment_of_inputs_do_not_matter(model):
    x = samples(BATCH)
    expected = model({"x": x, "t": T5})["y"]
    shifted = np.empty(x.nbytes + 4, np.uint8)[4:].view(np.float32).reshape(x.shape)
    shifted[...] = x
    readonly = x.copy()
    readonly.flags.writeable = False
    wide = np.zeros((BATCH, COLS * 2), np.float32)
    wide[:, ::2] = x
    for variant in (
        shifted,
        readonly,
        np.asfortranarray(x),
        wide[:, ::2],
        x.astype(np.float64),
        x.astype(">f4"),
        x.tolist(),
    ):
        given = np.array(variant).copy() if isinstance(variant, list) else variant
        np.testing.assert_array_equal(model({"x": given, "t": T5.astype(np.int8)})["y"], expected)
    with np.errstate(over="raise"):
        huge = np.full((BATCH, COLS), 3e38, np.float32)  # the sum overflows, no value does
        model({"x": huge, "t": T5})


def test_the_short_way_gives_what_the_long_way_gives(model, monkeypatch):
    feeds = {"x": samples(BATCH), "t": T5}
    assert model._exact(feeds) is not None
    assert model._exact({"t": T5, "x": feeds["x"]}) is not None  # in the compiled order
    short = model(feeds)
    again = model(feeds)
    assert all(short[name] is not again[name] and short[name].flags.writeable for name in short)
    monkeypatch.setattr(type(model), "_exact", lambda self, inputs: None)
    long = model(feeds)
    assert list(short) == list(long)
    for name, array in long.items():
        assert short[name].dtype == array.dtype
        np.testing.assert_array_equal(short[name], array)


def test_the_short_way_is_for_what_needs_no_closer_look(model):
    x = samples(BATCH)
    for value in (np.nan, np.inf, -np.inf, 3e38):
        strange = x.copy()
        strange.flat[3] = value
        assert model._exact({"x": strange, "t": T5}) is None
    others = [
        {"x": x.astype(np.float64), "t": T5},
        {"x": samples(BATCH + 1), "t": T5},
        {"x": x[None], "t": T5},
        {"x": x.tolist(), "t": T5},
        {"x": x},
        {"x": x, "t": T5, "z": x},
    ]
    assert all(model._exact(other) is None for other in others)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"x": samples(4)}, r"missing t: expected x float32\[4,32\], t int64\[5\]"),
        ({"X": samples(4), "t": T5}, "missing x; unknown X: expected x"),
        ({"x": samples(4), "t": T5, "label": T5}, "unknown label"),
        (samples(4), "the model has 2 inputs, got one array"),
        ({"x": samples(4)[:, :5], "t": T5}, r"input 'x' has shape \[4, 5\]: expected \[N, 32\]"),
        ({"x": samples(4)[0], "t": T5}, r"input 'x' has shape \[32\]"),
        ({"x": samples(4), "t": T5[:3]}, r"'t' has shape \[3\]: expected \[5\], or one more axis"),
        ({"x": samples(4)[:0], "t": T5}, "input 'x' holds no samples"),
        ({"x": samples(4).astype(np.uint8), "t": T5}, "'x' has dtype uint8: expected float32.*pre"),
        ({"x": samples(4).astype(np.int64), "t": T5}, "'x' has dtype int64: expected float32"),
        ({"x": samples(4).astype(np.complex64), "t": T5}, "'x' has dtype complex64"),
        ({"x": np.full((4, COLS), "a"), "t": T5}, "'x' has dtype str"),
        ({"x": samples(4), "t": T5.astype(np.float32)}, "'t' has dtype float32: expected int64"),
        ({"x": np.full((4, COLS), 0.1), "t": T5}, "values that float32 cannot hold, such as .*0.1"),
        ({"x": np.full((4, COLS), 1e300), "t": T5}, "values that float32 cannot hold"),
        ({"x": samples(4), "t": np.full(5, 2**63, np.uint64)}, "values that int64 cannot hold"),
        ({"x": np.full((4, COLS), np.nan), "t": T5}, "'x' holds 128 values that are NaN or inf"),
        (
            {"x": np.where(np.arange(COLS) == 7, np.inf, samples(4)).astype("f4"), "t": T5},
            r"holds 4 values that are NaN or infinite, the first at index \[0, 7\]",
        ),
        (
            {"x": samples(4), "t": np.stack([T5, T5])},
            "different numbers of samples: x 4, t 8",
        ),
    ],
)
def test_bad_inputs(model, inputs, message):
    with pytest.raises(DataError, match=message):
        model(inputs)


@pytest.mark.parametrize("threads", [0, -1, 1.5, True, "2"])
def test_bad_threads(model, artifact, threads):
    with pytest.raises(UsageError, match="threads must be a positive integer"):
        model({"x": samples(4), "t": T5}, threads=threads)
    with pytest.raises(UsageError, match="threads must be a positive integer"):
        CompiledModel(artifact, threads=threads)


def test_batch_axes_must_agree(artifact):
    outputs = {"y": TensorSpec((3, ROWS), DType.FLOAT32, 0)}
    fields = {f: getattr(artifact, f) for f in artifact.__dataclass_fields__}
    with pytest.raises(UsageError, match=r"one size of at least 1, got \[3, 4\]"):
        CompiledModel(Artifact(**{**fields, "outputs": outputs}))


# --- threads ---


def _in_new_thread(function):
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function).result()


def test_number_of_threads_never_changes_results(model):
    x = samples(BATCH)
    expected = model({"x": x, "t": T5}, threads=1)["y"]
    before = allowed_cpus()
    for threads in (2, 3, 5, 8):
        # A pool's size is fixed by its thread's first call, so every count gets a new thread.
        out = _in_new_thread(lambda n=threads: model({"x": x, "t": T5}, threads=n)["y"])
        np.testing.assert_array_equal(out, expected)

    def changing():
        used = []
        for threads in (3, 1, 2, 1, 9, 3):
            np.testing.assert_array_equal(model({"x": x, "t": T5}, threads=threads)["y"], expected)
            used.append(vm._POOL.threads)
        return used, allowed_cpus()

    used, after = _in_new_thread(changing)
    assert used[:4] == [3, 1, 2, 1]
    assert used[4] >= 3
    assert after == before  # TVM alone would bind the thread to the first CPUs


def test_workers_are_really_used_and_keep_the_allowed_cpus(model):
    cpu = allowed_cpus()[-1]

    def run():
        os.sched_setaffinity(0, {cpu})
        before = set(os.listdir("/proc/self/task"))
        model({"x": samples(BATCH), "t": T5}, threads=3)
        workers = set(os.listdir("/proc/self/task")) - before
        return allowed_cpus(), [os.sched_getaffinity(int(worker)) for worker in workers]

    own, workers = _in_new_thread(run)
    assert own == (cpu,)
    assert len(workers) >= 2
    assert all(worker == {cpu} for worker in workers)


def test_calls_from_eight_threads_at_once(model):
    barrier = threading.Barrier(8)
    expected = [model({"x": samples(8, seed), "t": T5})["y"] for seed in range(8)]

    def work(seed):
        barrier.wait()
        x = samples(8, seed)
        return all(
            np.array_equal(model({"x": x, "t": T5 + n}, threads=1 + seed % 3)["y"], expected[seed])
            for n in range(10)
        )

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, range(8)))


def test_first_calls_at_once_make_one_executor(artifact):
    model = CompiledModel(artifact)
    barrier = threading.Barrier(4)

    def work(_):
        barrier.wait()
        return id(model._ready())

    with ThreadPoolExecutor(4) as pool:
        assert len(set(pool.map(work, range(4)))) == 1


def test_forked_child_can_run(model):
    x = samples(BATCH)
    model({"x": x, "t": T5}, threads=2)
    expected = model({"x": x, "t": T5})["y"]
    child = os.fork()
    if child == 0:
        status = 1
        try:
            same = np.array_equal(model({"x": x, "t": T5}, threads=2)["y"], expected)
            status = 0 if same else 2
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


# --- benchmark ---


def test_benchmark(model):
    figures = model.benchmark(runs=5, warmup=1, threads=1)
    assert set(figures) == {"median_ms", "min_ms", "spread", "runs", "threads"}
    assert 0 < figures["min_ms"] <= figures["median_ms"]
    assert (figures["runs"], figures["threads"]) == (5, 1)
    given = model.benchmark(runs=1, warmup=0, inputs={"x": samples(4), "t": T5})
    assert given["runs"] == 1
    with pytest.raises(UsageError, match="runs must be at least 1"):
        model.benchmark(runs=0)
    with pytest.raises(DataError, match="missing t"):
        model.benchmark(inputs={"x": samples(4)})


def test_measure_interleaves():
    order = []
    timings = measure(
        {"a": lambda: order.append("a"), "b": lambda: order.append("b")}, runs=3, warmup=1
    )
    assert order == ["a", "b"] * 4
    assert list(timings) == ["a", "b"]
    assert timings["a"].runs == 3


def test_random_inputs_fit_and_repeat(model):
    first, second = model.random_inputs(3), model.random_inputs(3)
    assert all(np.array_equal(first[name], second[name]) for name in first)
    assert first["t"].dtype == np.int64
    assert set(first["t"]) <= {0, 1}
    model(first)


def test_repr(model):
    text = repr(model)
    assert text.startswith("CompiledModel(x86, (x: float32[4,32], t: int64[5]) -> (y: float32")
