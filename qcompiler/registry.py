# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""Targets and passes by name, through entry points.

Built-in ones are registered in this distribution's metadata in the same groups as anybody else's
(`qcompiler.targets`, `qcompiler.passes`), so a plug-in is a distribution with an entry point and
nothing more. Loading is lazy: listing names imports no backend.
"""

from __future__ import annotations

import difflib
import functools
from importlib import metadata
from typing import TYPE_CHECKING, Any

from qcompiler.errors import TargetError, UnknownTargetError, UsageError

if TYPE_CHECKING:
    from qcompiler.passmanager import Pass
    from qcompiler.targets.base import Backend, TargetSpec

TARGETS = "qcompiler.targets"
PASSES = "qcompiler.passes"


@functools.cache
def _points(group: str) -> dict[str, metadata.EntryPoint]:
    found: dict[str, metadata.EntryPoint] = {}
    for point in metadata.entry_points(group=group):
        other = found.get(point.name)
        if other is not None and other.value != point.value:
            raise UsageError(
                f"{group}: {point.name!r} is registered twice, by {other.value} and {point.value}",
                hint="uninstall one of the two distributions",
            )
        found[point.name] = point
    return dict(sorted(found.items()))


def _load(group: str, point: metadata.EntryPoint) -> Any:
    try:
        return point.load()
    except (ImportError, AttributeError) as error:
        raise TargetError(
            f"{group}: {point.name!r} ({point.value}) cannot be loaded: {error}",
            hint="reinstall the distribution that registers it",
        ) from error


def target_names() -> tuple[str, ...]:
    """Names that `get_target` accepts besides "host", sorted."""
    return tuple(_points(TARGETS))


def get_target(target: str | TargetSpec) -> Backend:
    """Return the backend of a target.

    Args:
        target: A registered name, or "host" for the best row that this CPU runs; after a colon may
            follow the processor to schedule for, as in "arm-dotprod:neoverse-n1". Or a TargetSpec,
            of which name and `mcpu` count.

    Raises:
        UnknownTargetError: No such target or processor; the message lists the known names.
    """
    points = _points(TARGETS)
    if not isinstance(target, str):
        own = get_target(target.name)
        other = target.mcpu is not None and target.mcpu != own.spec.mcpu
        return own.with_processor(str(target.mcpu)) if other else own
    name, separator, processor = target.partition(":")
    if name == "host":
        from qcompiler.targets.cpu import host_target

        name = host_target()
    if name not in points:
        known = ", ".join(["host", *points])
        near = difflib.get_close_matches(name, points, n=1)
        raise UnknownTargetError(
            f"unknown target {name!r}: known are {known}",
            hint=f"did you mean {near[0]!r}?" if near else None,
        )
    backend: Backend = _load(TARGETS, points[name])(name)
    return backend.with_processor(processor) if separator else backend


def pass_table() -> dict[str, type[Pass]]:
    """Return every registered pass by its text name."""
    return {name: _load(PASSES, point) for name, point in _points(PASSES).items()}
