# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""Whether limits can be measured, said before the long part; and whether a model keeps them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from qcompiler.data import BUDGET_LIMITS, Budget, Evaluation
from qcompiler.errors import InfeasibleBudgetError, UsageError
from qcompiler.regional import RegionOptions
from qcompiler.runtime import CompiledModel
from qcompiler.slices import MINIMUM

__all__ = ["check_budget", "check_measurable", "found_of"]

_HINTS = {
    "max_drop": "give evaluate=... (--evaluate and --metric)",
    "max_slice_drop": "give evaluation samples with an array 'slice' or 'label', at least "
    f"{MINIMUM} of one group",
}


def check_measurable(
    budget: Budget | None,
    evaluate: Evaluation | Callable[[CompiledModel], float] | None,
    regions: Mapping[str, RegionOptions],
    *,
    searched: bool = False,
) -> None:
    """Refuse limits on the drop that nothing can measure, before any work is done.

    Args:
        budget: Of the whole model.
        evaluate: What scores models.
        regions: With limits of their own.
        searched: Whether automatic precision measures a drop without `evaluate`, too.

    Raises:
        UsageError: A limit on a drop and nothing to evaluate, or an `evaluate` of another kind.
    """
    if evaluate is not None and not isinstance(evaluate, Evaluation) and not callable(evaluate):
        raise UsageError(
            f"evaluate is {type(evaluate).__name__}, expected an Evaluation or a callable",
            hint="qcompiler.Evaluation(samples, 'top1')",
        )
    given = budget or Budget()
    if given.max_slice_drop is not None and not isinstance(evaluate, Evaluation):
        raise UsageError(
            "budget max_slice_drop cannot be checked: nothing measures it",
            hint=_HINTS["max_slice_drop"],
        )
    limited = [s for s, r in regions.items() if r.max_drop is not None]
    if evaluate is None and limited and not searched:
        raise UsageError(
            f"max_drop of region {limited[0]!r} cannot be checked: nothing measures it",
            hint=_HINTS["max_drop"],
        )
    if evaluate is None and given.max_drop is not None:
        raise UsageError(
            "a limit on the drop needs something that measures it: budget max_drop cannot be "
            "checked",
            hint=_HINTS["max_drop"],
        )


def found_of(report: Mapping[str, Any]) -> dict[str, float | None]:
    """Return what a report says about each limit of a budget."""
    metric = report.get("metric") or {}
    memory = (report.get("memory_bytes") or {}).get("activations")
    return {
        "max_drop": metric.get("drop"),
        "max_latency_ms": (report.get("latency_ms") or {}).get("compiled"),
        "max_size_mb": (report.get("size_bytes") or {}).get("artifact", 0) / 1e6,
        "max_slice_drop": (metric.get("worst_slice") or {}).get("drop"),
        "max_memory_mb": None if memory is None else memory / 1e6,
    }


def check_budget(
    compiled: CompiledModel, budget: Budget | None, regions: Mapping[str, RegionOptions]
) -> None:
    """Hold a compiled model against limits.

    Raises:
        UsageError: A limit that nothing measured.
        InfeasibleBudgetError: Some limits are not kept; its `best` is the model.
    """
    if compiled.report is None:
        return
    parts: list[tuple[str, Budget, Mapping[str, float | None]]] = []
    if budget is not None:
        parts.append(("", budget, found_of(compiled.report)))
    asked = compiled.report.get("regions") or {}
    parts += [
        (f"{s} ", r.budget, (asked.get(s) or {}).get("found") or {})
        for s, r in regions.items()
        if r.limited
    ]
    broken: list[str] = []
    least: dict[str, float] = {}
    for whose, limits, found in parts:
        for name in BUDGET_LIMITS:
            limit, value = getattr(limits, name), found.get(name)
            if limit is None:
                continue
            if value is None:
                raise UsageError(
                    f"budget {whose}{name} cannot be checked: nothing measures it",
                    hint=_HINTS.get(name),
                )
            if not value <= limit:
                broken.append(f"{whose}{name} is {value:.4g}, allowed are {limit:g}")
                least[f"{whose}{name}"] = float(value)
    if broken:
        raise InfeasibleBudgetError(
            f"the budget is not kept at this precision: {'; '.join(broken)}",
            least=least,
            best=compiled,
            hint="relax the limit to the figure named, or choose another precision",
        )
