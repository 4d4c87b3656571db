# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""What a user asks of one region of a hybrid model: precision, calibration, and limits.

A region is named by the selectors of `qcompiler.modality`: `input:image`, `input:image+rows`,
`fusion`. Its precision is an override of its nodes; its observer replaces the one of the
calibration for the values that it makes; its limits hold for what it costs alone.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, get_args

from qcompiler.data import Budget
from qcompiler.errors import UsageError
from qcompiler.modality import is_regional, modalities, select
from qcompiler.passes.calibrate import ObserverRule, ObserverSetting
from qcompiler.types import Precision

if TYPE_CHECKING:
    from qcompiler.ir import Graph

__all__ = ["RegionOptions", "as_rules", "check_regions", "overrides_with", "parse_region"]

_LIMITS = ("max_drop", "max_latency_ms", "max_size_mb")
_PERCENTILE = 99.99


@dataclass(frozen=True)
class RegionOptions:
    """What is asked of one region; None leaves it as for the whole model.

    Attributes:
        precision: Of its nodes, as far as they can have it; with "auto" they are no longer chosen.
        observer: How the ranges of the values that it makes are calibrated: "mse", "minmax",
            "moving_average", "percentile", "entropy", or "auto" (per value, by measured error).
        percentile: Percent of the elements that the observers "percentile" and "auto" cover.
        max_drop: Greatest loss, in points of the metric, when this region alone is quantized.
        max_latency_ms: Greatest time of its kernels together, ms.
        max_size_mb: Greatest size of its packed parameters, in millions of bytes.
    """

    precision: str | Precision | None = None
    observer: ObserverSetting | None = None
    percentile: float | None = None
    max_drop: float | None = None
    max_latency_ms: float | None = None
    max_size_mb: float | None = None

    def __post_init__(self) -> None:
        if isinstance(self.precision, str):
            Precision.parse(self.precision)
        if self.observer is not None and self.observer not in get_args(ObserverSetting):
            known = ", ".join(get_args(ObserverSetting))
            raise UsageError(f"unknown observer {self.observer!r}: expected one of {known}")
        if self.percentile is not None:
            if self.observer not in ("percentile", "auto"):
                raise UsageError(
                    f"a percentile serves the observers percentile and auto, not {self.observer}",
                    hint="give observer='percentile' with it",
                )
            if not 50 < self.percentile <= 100:
                raise UsageError(f"percentile {self.percentile}: expected above 50, at most 100")
        _ = self.budget  # checked when it is made

    @property
    def budget(self) -> Budget:
        """The limits."""
        return Budget(**{name: getattr(self, name) for name in _LIMITS})

    @property
    def limited(self) -> bool:
        """Whether there is any limit."""
        return any(getattr(self, name) is not None for name in _LIMITS)

    @property
    def rule(self) -> ObserverRule | None:
        """How its values are calibrated, where that differs from the rest."""
        if self.observer is None:
            return None
        share = _PERCENTILE if self.percentile is None else self.percentile
        return ObserverRule(self.observer, share)


Regions = Mapping[str, "RegionOptions | str"]
"""Selector -> what is asked; a text is a precision."""


def options_of(regions: Regions | None) -> dict[str, RegionOptions]:
    """Return what is asked of each region.

    Raises:
        UsageError: A selector that names no region, or an option that is not one.
    """
    found: dict[str, RegionOptions] = {}
    for selector, wanted in (regions or {}).items():
        if not is_regional(selector):
            raise UsageError(
                f"{selector!r} names no region",
                hint="a region is 'fusion', or 'input:' and names of inputs joined by '+'",
            )
        if isinstance(wanted, str):
            wanted = RegionOptions(precision=wanted)
        if not isinstance(wanted, RegionOptions):
            raise UsageError(
                f"region {selector!r}: expected RegionOptions or a precision, got "
                f"{type(wanted).__name__}"
            )
        found[selector] = wanted
    return found


def check_regions(graph: Graph, regions: Mapping[str, RegionOptions]) -> None:
    """Check that every selector names a region of a graph.

    Raises:
        UsageError: Selectors that select nothing, all of them; the hint lists the regions.
    """
    empty = [s for s in regions if not select(graph, s)]
    if empty:
        known = ", ".join(m.name for m in modalities(graph))
        raise UsageError(
            f"no region of the model is {', '.join(map(repr, empty))}",
            hint=f"its regions are {known}" if known else "it has no products",
        )


def as_rules(regions: Mapping[str, RegionOptions]) -> dict[str, ObserverRule]:
    """Return selector -> how its values are calibrated."""
    rules = {s: o.rule for s, o in regions.items()}
    return {s: r for s, r in rules.items() if r is not None}


def overrides_with(
    regions: Mapping[str, RegionOptions], overrides: Mapping[str, str | Precision] | None
) -> dict[str, str | Precision] | None:
    """Return the overrides with those that regions amount to; overrides of single nodes win."""
    found: dict[str, str | Precision] = {
        s: o.precision for s, o in regions.items() if o.precision is not None
    }
    found.update(overrides or {})
    return found or None


def limits_of(regions: Mapping[str, RegionOptions]) -> dict[str, Budget]:
    """Return selector -> limits, of the regions that have any."""
    return {s: o.budget for s, o in regions.items() if o.limited}


def to_json(regions: Mapping[str, RegionOptions]) -> dict[str, Any]:
    """Return what decides the artifact's bytes besides its plan: how regions are calibrated."""
    return {s: dataclasses.asdict(r) for s, r in as_rules(regions).items()}


_KEYS = {
    "observer": "observer", "percentile": "percentile", "max-drop": "max_drop",
    "max-latency": "max_latency_ms", "max-size": "max_size_mb",
}  # fmt: skip


def parse_region(text: str) -> tuple[str, RegionOptions]:
    """Return the selector and what is asked of it.

    `input:image=w8a8,observer=percentile,percentile=99.9,max-drop=0.5,max-latency=2,max-size=0.1`;
    each part may be left out.

    Raises:
        UsageError: Malformed text.
    """
    shape = "SELECTOR=PRECISION,KEY=VALUE,..."
    selector, separator, rest = text.partition("=")
    if not separator or not selector or not rest:
        raise UsageError(
            f"--region {text!r}: expected {shape}",
            hint="for example --region input:image=w8a8,observer=percentile,max-size=0.1",
        )
    given: dict[str, Any] = {}
    for part in rest.split(","):
        key, separator, value = part.partition("=")
        if not separator:
            key, value = "precision", part
        elif key not in _KEYS:
            raise UsageError(
                f"--region {text!r}: unknown key {key!r}: expected one of {', '.join(_KEYS)}"
            )
        name = _KEYS.get(key, key)
        if name in given:
            raise UsageError(f"--region {text!r}: {key} is given twice")
        given[name] = value if name in ("precision", "observer") else _number(value, key, text)
    return selector, RegionOptions(**given)


def parse_regions(texts: Sequence[str]) -> dict[str, RegionOptions] | None:
    """Return what --region options ask for, or None without any.

    Raises:
        UsageError: Malformed text, or a region given twice.
    """
    found: dict[str, RegionOptions] = {}
    for text in texts:
        selector, wanted = parse_region(text)
        if selector in found:
            raise UsageError(f"--region: {selector!r} is given twice")
        found[selector] = wanted
    return found or None


def _number(value: str, key: str, text: str) -> float:
    try:
        number = float(value)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise UsageError(f"--region {text!r}: {key} is {value!r}, expected a number")
    return number
