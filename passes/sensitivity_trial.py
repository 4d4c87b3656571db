# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""One task of the sensitivity analysis: plain data in, plain data out, so that it can travel."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from qcompiler.metrics import SQNR_CEILING
from qcompiler.numerics import fake_quantize
from qcompiler.numerics_dynamic import Per, dynamic_quantize
from qcompiler.ort import Session
from qcompiler.passes.single_node import OPERANDS, Feed, Suffix
from qcompiler.types import Array, Precision, QuantParams

TARGET_KL = 1e-3
"""Nat; the size of the step along a random direction is chosen so that the divergence is about
this: well above the noise of float32, small enough for the second-order expansion."""

HeadKind = Literal["logits", "probabilities", "log_probabilities", "mse"]


@dataclass(frozen=True)
class Head:
    """How two versions of a model output are compared.

    Attributes:
        kind: KL divergence of the class distributions that the output stands for, in nat, averaged
            over the rows; or the mean squared difference.
        axis: Axis of the classes.
    """

    kind: HeadKind
    axis: int

    def loss(self, reference: Array, other: Array) -> float:
        """Return the divergence of `other` from `reference`."""
        p, q = np.asarray(reference, np.float64), np.asarray(other, np.float64)
        if self.kind == "mse":
            return float(np.mean((p - q) ** 2)) if p.size else 0.0
        log_p, log_q = self._logs(p), self._logs(q)
        kl = (np.exp(log_p) * (log_p - log_q)).sum(self.axis)
        return max(float(kl.mean()), 0.0) if kl.size else 0.0

    def _logs(self, y: Array) -> Array:
        if self.kind == "log_probabilities":
            return y
        if self.kind == "probabilities":
            logs: Array = np.log(np.maximum(y, 1e-12))
            return logs
        shifted = y - y.max(self.axis, keepdims=True)
        result: Array = shifted - np.log(np.exp(shifted).sum(self.axis, keepdims=True))
        return result


@dataclass(frozen=True)
class Trial:
    """Everything needed to try one product.

    Attributes:
        suffix: The network from the product on.
        feeds: The runs.
        weight: Float weights; None where the second operand is computed.
        weights: Bits -> rounded weights.
        qparams: Bits -> parameters of the operands (the second only where it is computed).
        dynamic: Precisions that quantize the first operand at run time.
        heads: Output name -> how it is compared.
        fisher_samples: Samples of the Fisher trace.
        seed: Seed of its directions.
        keep_outputs: Whether to return the model's outputs.
    """

    suffix: Suffix
    feeds: tuple[Feed, ...]
    weight: Array | None
    weights: Mapping[str, Array]
    qparams: Mapping[str, tuple[QuantParams, QuantParams | None]]
    heads: Mapping[str, Head]
    fisher_samples: int
    seed: tuple[int, ...]
    keep_outputs: bool
    dynamic: tuple[str, ...] = ()


@dataclass
class Sums:
    """Running sums over the runs of one change.

    Attributes:
        signal: Sum of squares of the float result.
        noise: Sum of squares of the difference.
        cross: Sum of products of the float result and the difference.
        count: Elements.
        total: Loss at the outputs times samples.
        samples: Samples.
    """

    signal: float = 0.0
    noise: float = 0.0
    cross: float = 0.0
    count: int = 0
    total: float = 0.0
    samples: int = 0

    def add(self, y: Array, z: Array, signal: float) -> bool:
        """Take in the float and the changed result of one run; return whether they differ.

        Args:
            y: Float result.
            z: Changed result.
            signal: Sum of squares of y.
        """
        d = np.subtract(z, y)
        noise = product(d, d)
        self.signal += signal
        self.noise += noise
        self.cross += product(y, d)
        self.count += y.size
        return noise != 0.0 or bool(d.any())

    @property
    def cosine(self) -> float:
        """Cosine between both results over all runs.

        With d = z - y: y.z = y.y + y.d and z.z = y.y + 2 y.d + d.d, so that what rounding leaves is
        small against the angle.
        """
        if self.noise == 0.0:
            return 1.0
        norm = math.sqrt(self.signal) * math.sqrt(max(self.signal + 2 * self.cross + self.noise, 0))
        if norm == 0.0:
            return 0.0
        return max(min((self.signal + self.cross) / norm, 1.0), -1.0)

    @property
    def loss(self) -> float:
        """Mean loss at the outputs."""
        return self.total / max(self.samples, 1)


_ROW = 1024


def product(a: Array, b: Array) -> float:
    """Return the sum of the products of two arrays: in float32 by rows of 1024, then in float64."""
    x, y = (np.ravel(v) for v in (a, b))
    if x.dtype == np.float32 and y.dtype == np.float32:
        whole = len(x) - len(x) % _ROW
        rows = np.einsum("ij,ij->i", x[:whole].reshape(-1, _ROW), y[:whole].reshape(-1, _ROW))
        total = float(rows.sum(dtype=np.float64)) + _wide(x[whole:], y[whole:])
        if math.isfinite(total) and total != 0.0:
            return total  # else squares may have left the range of float32
    return _wide(x, y)


def _wide(x: Array, y: Array) -> float:
    return float((x.astype(np.float64) * y.astype(np.float64)).sum())


@dataclass
class Tried:
    """What a task found.

    Attributes:
        sums: "w8", "w4", "a8"... -> sums.
        weight_error: Bits -> squared distance of the rounded weights from the float ones.
        fisher: Trace of the Fisher matrix of the weights, if asked for.
        outputs: Change ("float" for none) -> output name -> parts by run; empty unless asked for.
    """

    sums: dict[str, Sums]
    weight_error: dict[str, float]
    fisher: float | None
    outputs: dict[str, dict[str, list[Array]]] = field(default_factory=dict)


def level(signal: float, noise: float) -> float:
    """Return the ratio of the sums of squares in dB, at most `SQNR_CEILING`."""
    if noise == 0.0:
        return SQNR_CEILING
    if signal == 0.0:
        return 0.0
    return min(10 * math.log10(signal / noise), SQNR_CEILING)


def try_unit(trial: Trial) -> Tried:
    """Run one product's changes over all runs."""
    run = _Runner(trial)
    found = Tried({}, {}, None)
    if trial.weight is not None:
        w = trial.weight.astype(np.float64)
        found.weight_error = {b: float(((q - w) ** 2).sum()) for b, q in trial.weights.items()}
    for feed, arrays in run.all():
        x, w = run.operands(arrays)
        y = run.kernel(arrays, x, w)
        reference = run.reference(feed, arrays, y)
        run.keep(found, "float", reference, feed)
        signal = product(y, y)
        changes = {f"w{b}": (x, q) for b, q in trial.weights.items()}
        for b, (xq, wq) in trial.qparams.items():
            changes[f"a{b}"] = (fake_quantize(x, xq), w if wq is None else fake_quantize(w, wq))
        for p in trial.dynamic:
            changes[f"a{p}"] = (_at_run_time(x, Precision(p)), w)
        for name, (x_, w_) in changes.items():
            z = run.kernel(arrays, x_, w_)
            sums = found.sums.setdefault(name, Sums())
            result = reference  # what does not differ here does not differ at the outputs
            if sums.add(y, z, signal):
                result = run.outputs(arrays, z)
                sums.total += run.loss(reference, result, feed) * feed.samples
            sums.samples += feed.samples
            run.keep(found, name, result, feed)
    if trial.fisher_samples and trial.weight is not None and trial.suffix.outputs:
        found.fisher = _fisher(trial, run, trial.weight)
    return found


def _at_run_time(x: Array, precision: Precision) -> Array:
    """Return the activations as a precision that quantizes them at run time holds them."""
    per: Per = "tensor" if precision is Precision.W8A8_DYNAMIC_TENSOR else "row"
    q, scale = dynamic_quantize(x, per, 0, np.int8)
    return np.asarray(q.astype(np.float32) * scale)


class _Runner:
    """The sessions of a trial; values go by the names that the models give them."""

    def __init__(self, trial: Trial) -> None:
        suffix = trial.suffix
        self.trial = trial
        self._kernel = suffix.kernel.session()
        # constant weights: the highest level lays them out for its fastest kernels
        self._tail = None if suffix.tail is None else suffix.tail.session("all")
        self._side = None if suffix.side is None else suffix.side.session()
        prefix = next((f.prefix for f in trial.feeds if f.prefix is not None), None)
        self._prefix = None if prefix is None else prefix.session()

    def all(self) -> Iterator[tuple[Feed, Mapping[str, Array]]]:
        """Yield each run with its live values and what follows them without the product."""
        for feed in self.trial.feeds:
            arrays = dict(feed.arrays)
            if feed.prefix is not None and self._prefix is not None:
                arrays.update(_run(self._prefix, arrays))
            if self._side is not None:
                arrays.update(_run(self._side, arrays))
            yield feed, arrays

    def operands(self, arrays: Mapping[str, Array]) -> tuple[Array, Array]:
        suffix = self.trial.suffix
        w = self.trial.weight
        return arrays[suffix.x], w if w is not None else arrays[suffix.w or suffix.x]

    def kernel(self, arrays: Mapping[str, Array], x: Array, w: Array) -> Array:
        """Return the kernel's result with these operands."""
        given = {**arrays, OPERANDS[0]: x, OPERANDS[1]: w}
        return _run(self._kernel, given)[self.trial.suffix.result]

    def outputs(self, arrays: Mapping[str, Array], result: Array) -> dict[str, Array]:
        """Return the model's outputs that depend on the product, by their names in the graph."""
        suffix = self.trial.suffix
        found = {suffix.result: result}
        if self._tail is not None:
            found.update(_run(self._tail, {**arrays, suffix.result: result}))
        return {name: found[inner] for name, inner in suffix.outputs}

    def reference(self, feed: Feed, arrays: Mapping[str, Array], y: Array) -> dict[str, Array]:
        """Return the float model's outputs that depend on the product."""
        if feed.outputs is None:
            return self.outputs(arrays, y)
        return {name: feed.outputs[name] for name, _ in self.trial.suffix.outputs}

    def loss(self, a: Mapping[str, Array], b: Mapping[str, Array], feed: Feed) -> float:
        """Return the summed loss of the outputs that depend on the product."""
        total = 0.0
        for name, _ in self.trial.suffix.outputs:
            total += self.trial.heads[name].loss(_real(a[name], feed), _real(b[name], feed))
        return total

    def keep(self, found: Tried, change: str, result: Mapping[str, Array], feed: Feed) -> None:
        if self.trial.keep_outputs:
            parts = found.outputs.setdefault(change, {})
            for name, _ in self.trial.suffix.outputs:
                parts.setdefault(name, []).append(_real(result[name], feed))


def _run(session: Session, arrays: Mapping[str, Array]) -> dict[str, Array]:
    return session.run({n: arrays[n] for n in session.input_names})


def _real(array: Array, feed: Feed) -> Array:
    """Leave out the rows that only fill up the last batch."""
    if feed.samples < feed.size and array.ndim and len(array) == feed.size:
        return array[: feed.samples]
    return array


def _fisher(trial: Trial, run: _Runner, weight: Array) -> float:
    """Return the mean of 2 L / e^2 over runs, each with a direction of its own.

    For heads that are compared by squares L is half the squared difference summed over a sample.
    """
    rng = np.random.default_rng(trial.seed)
    spread = float(np.sqrt(np.mean(weight.astype(np.float64) ** 2))) or 1.0
    step, total, samples = 1e-2 * spread, 0.0, 0
    sized = False
    for feed, arrays in run.all():
        if samples >= trial.fisher_samples:
            break
        x, _ = run.operands(arrays)
        reference = run.reference(feed, arrays, run.kernel(arrays, x, weight))
        v = rng.choice(np.array([-1.0, 1.0], np.float32), weight.shape)

        def moved(e: float, x: Array = x, v: Array = v, a: Any = arrays) -> dict[str, Array]:
            return run.outputs(a, run.kernel(a, x, weight + np.float32(e) * v))

        if not sized:
            step = _step(trial, feed, reference, moved, step)
            sized = True
        e = float(np.float32(step))
        mean = sum(_curvature(trial, reference, moved(s), feed) for s in (e, -e)) / 2
        total += mean / e**2 * feed.samples
        samples += feed.samples
    return total / max(samples, 1)


def _curvature(trial: Trial, a: Mapping[str, Array], b: Mapping[str, Array], feed: Feed) -> float:
    """Return twice the second-order term of one sample's loss."""
    total = 0.0
    for name, _ in trial.suffix.outputs:
        head = trial.heads[name]
        y, z = _real(a[name], feed), _real(b[name], feed)
        one = max(y.size // max(feed.samples, 1), 1)
        if head.kind == "mse":
            total += head.loss(y, z) * one
        else:
            total += 2 * head.loss(y, z) * one / max(y.shape[head.axis], 1)
    return total


def _step(
    trial: Trial,
    feed: Feed,
    reference: Mapping[str, Array],
    moved: Callable[[float], Mapping[str, Array]],
    step: float,
) -> float:
    """Return a step along a direction that moves the outputs by about `TARGET_KL`."""
    for _ in range(6):
        there = moved(step)
        parts = []
        for name, _ in trial.suffix.outputs:
            head = trial.heads[name]
            scale = 1.0
            if head.kind == "mse":  # in units of the output's own power
                scale = 1.0 / max(float(np.mean(np.square(reference[name], dtype=np.float64))),
                                  1e-30)  # fmt: skip
            parts.append(head.loss(_real(reference[name], feed), _real(there[name], feed)) * scale)
        found = max(parts, default=0.0)
        if TARGET_KL / 5 <= found <= TARGET_KL * 5:
            break
        ratio = math.sqrt(TARGET_KL / found) if found > 0 and math.isfinite(found) else 10.0
        step *= min(max(ratio, 0.02), 50.0)
    return step
