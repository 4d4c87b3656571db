# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""The result of the sensitivity analysis: frozen figures that round-trip through JSON."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from qcompiler.document import Document
from qcompiler.errors import UsageError
from qcompiler.passes.calibrate import CalibrationTable, TensorRange
from qcompiler.types import Precision

FORMAT = 1
"""Version of the JSON form."""

JUMP = 6.0
"""dB; a result this much noisier than every one before it is where the error jumps."""


@dataclass(frozen=True)
class Effect:
    """What one change alone does.

    Attributes:
        sqnr: At the kernel's own result, dB.
        cosine: At the kernel's own result.
        mse: At the kernel's own result.
        loss: At the model's outputs: KL divergence in nat or mean squared difference, summed over
            the outputs.
        drop: Of the metric, in points; None without labels.
    """

    sqnr: float
    cosine: float
    mse: float
    loss: float
    drop: float | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the JSON form."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, doc: Mapping[str, Any]) -> Effect:
        """Return what `to_json` wrote."""
        drop = doc["drop"]
        return cls(
            sqnr=float(doc["sqnr"]),
            cosine=float(doc["cosine"]),
            mse=float(doc["mse"]),
            loss=float(doc["loss"]),
            drop=None if drop is None else float(drop),
        )


@dataclass(frozen=True)
class NodeSensitivity:
    """Sensitivity of one product and what fuses with it.

    Attributes:
        node: Name of the product.
        op: Its operator.
        members: Nodes of the kernel.
        operand: Value that it reads.
        result: Value that the kernel gives.
        parameters: Number of weights; 0 where both operands are activations.
        weight: Bits, or a precision (`effects_of`) -> effect of rounding the weights alone.
        activation: The same -> effect of rounding what it reads alone.
        weight_error: Bits -> squared distance of the rounded weights from the float ones.
        fisher: Trace of the Fisher information of the weights (per sample); None if not measured.
        along_sqnr: SQNR of the result in the network with everything in 8 bits, dB.
    """

    node: str
    op: str
    members: tuple[str, ...]
    operand: str
    result: str
    parameters: int
    weight: Mapping[str, Effect]
    activation: Mapping[str, Effect]
    weight_error: Mapping[str, float]
    fisher: float | None = None
    along_sqnr: float | None = None

    def along(self, sqnr: float | None) -> NodeSensitivity:
        """Return the same with the SQNR inside the quantized network."""
        return dataclasses.replace(self, along_sqnr=sqnr)

    def predicted(self, bits: str) -> float | None:
        """Return half the mean trace times the squared weight error: the loss to expect.

        None where the trace was not measured.
        """
        if self.fisher is None or not self.parameters or bits not in self.weight_error:
            return None
        return 0.5 * self.fisher / self.parameters * self.weight_error[bits]

    def to_json(self) -> dict[str, Any]:
        """Return the JSON form."""
        doc = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        doc["members"] = list(self.members)
        doc["weight"] = {b: e.to_json() for b, e in self.weight.items()}
        doc["activation"] = {b: e.to_json() for b, e in self.activation.items()}
        doc["weight_error"] = dict(self.weight_error)
        return doc

    @classmethod
    def from_json(cls, doc: Mapping[str, Any]) -> NodeSensitivity:
        """Return what `to_json` wrote.

        Raises:
            UsageError: Something is missing.
        """
        try:
            return cls(
                node=str(doc["node"]),
                op=str(doc["op"]),
                members=tuple(str(m) for m in doc["members"]),
                operand=str(doc["operand"]),
                result=str(doc["result"]),
                parameters=int(doc["parameters"]),
                weight={str(b): Effect.from_json(e) for b, e in doc["weight"].items()},
                activation={str(b): Effect.from_json(e) for b, e in doc["activation"].items()},
                weight_error={str(b): float(e) for b, e in doc["weight_error"].items()},
                fisher=None if doc["fisher"] is None else float(doc["fisher"]),
                along_sqnr=None if doc["along_sqnr"] is None else float(doc["along_sqnr"]),
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UsageError(f"the sensitivity figures are damaged: {error!r}") from None


def effects_of(precision: Precision) -> tuple[str | None, str | None]:
    """Return the keys under which a precision's effects are noted: of weights, of activations."""
    if precision is Precision.FP32:
        return None, None
    if precision.is_weight_only:
        return precision.value, None
    if precision.is_dynamic:
        return str(precision.weight_bits), precision.value
    grouped = precision is Precision.W4A8_GROUP
    weight = precision.value if grouped else str(precision.weight_bits)
    return weight, str(precision.activation_bits)


def first_jump(nodes: Sequence[NodeSensitivity]) -> str | None:
    """Return the first product whose result is `JUMP` dB noisier than every one before it."""
    least: float | None = None
    for n in nodes:
        if n.along_sqnr is None:
            continue
        if least is not None and n.along_sqnr < least - JUMP:
            return n.node
        least = n.along_sqnr if least is None else min(least, n.along_sqnr)
    return None


@dataclass(frozen=True)
class SensitivityReport(Document):
    """Sensitivity of every product of a graph.

    Attributes:
        graph: Digest of the graph.
        data: Digest of the samples.
        table: Text form of the calibration.
        samples: Number of samples.
        seed: Seed of the random directions.
        losses: Output name -> how it was compared.
        metric: Name of the metric, if labelled.
        score: Of the float model.
        joint_score: Of the model with everything in 8 bits.
        joint_loss: Of the model with everything in 8 bits.
        nodes: In the order of the network.
        tensors: Ranges and histograms of the values that products read.
        first_jump: First product whose result is much noisier than all before; None without one.
    """

    title: ClassVar[str] = "sensitivity report"

    graph: str
    data: str
    table: str
    samples: int
    seed: int
    losses: Mapping[str, str]
    metric: str | None
    score: float | None
    joint_score: float | None
    joint_loss: float
    nodes: tuple[NodeSensitivity, ...]
    tensors: Mapping[str, TensorRange] = field(default_factory=dict)
    first_jump: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the JSON form."""
        doc: dict[str, Any] = {"format": FORMAT}
        doc.update({f.name: getattr(self, f.name) for f in dataclasses.fields(self)})
        doc["losses"] = dict(self.losses)
        doc["nodes"] = [n.to_json() for n in self.nodes]
        doc["tensors"] = CalibrationTable(self.tensors).to_json()["tensors"]
        return doc

    @classmethod
    def from_json(cls, doc: object) -> SensitivityReport:
        """Return the report that `to_json` wrote.

        Raises:
            UsageError: Not such a document, another format version, or damaged.
        """
        if not isinstance(doc, Mapping) or doc.get("format") != FORMAT:
            raise UsageError(f"not a sensitivity report of format {FORMAT}")
        empty = CalibrationTable().to_json()
        try:
            tensors = CalibrationTable.from_json({**empty, "tensors": doc["tensors"]}).tensors
            scores = [None if doc[k] is None else float(doc[k]) for k in ("score", "joint_score")]
            jump, metric = doc["first_jump"], doc["metric"]
            return cls(
                graph=str(doc["graph"]),
                data=str(doc["data"]),
                table=str(doc["table"]),
                samples=int(doc["samples"]),
                seed=int(doc["seed"]),
                losses={str(k): str(v) for k, v in doc["losses"].items()},
                metric=None if metric is None else str(metric),
                score=scores[0],
                joint_score=scores[1],
                joint_loss=float(doc["joint_loss"]),
                nodes=tuple(NodeSensitivity.from_json(n) for n in doc["nodes"]),
                tensors=tensors,
                first_jump=None if jump is None else str(jump),
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UsageError(f"the sensitivity report is damaged: {error!r}") from None
