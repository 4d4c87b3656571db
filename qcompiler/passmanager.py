# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""Passes: one shape for analyses and rewrites, their text form, and the manager that runs them.

A pass is a frozen dataclass; its fields are its options. `calibrate{observer=percentile}` is its
text form, which round-trips through `parse_pass` and `spec`. Command line, tests, reports and
reproducers share that form.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import platform
import re
import tempfile
import time
import types
import typing
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeVar

from qcompiler.errors import PassError, QCompilerError, UsageError, VerificationError
from qcompiler.ir import Graph
from qcompiler.ops import Stage

T = TypeVar("T")

ProgressFn = Callable[[str, int, int], None]
"""Called with (what is going on, units done, units in total)."""


def no_progress(stage: str, done: int, total: int) -> None:
    """Ignore progress."""


@dataclass
class PassContext:
    """What passes share besides the graph: artifacts by type, the seed, and the progress callback.

    Attributes:
        artifacts: Calibration sets, tables, plans...: one object per type.
        seed: Seed of everything random.
        progress: Progress callback.
        log: Sentences for the decision log, in order.
    """

    artifacts: dict[type, Any] = field(default_factory=dict)
    seed: int = 0
    progress: ProgressFn = no_progress
    log: list[str] = field(default_factory=list)

    def get(self, kind: type[T]) -> T:
        """Return the artifact of that type.

        Raises:
            QCompilerError: Nothing provided it.
        """
        try:
            found: T = self.artifacts[kind]
        except KeyError:
            raise QCompilerError(f"no {kind.__name__} has been provided") from None
        return found

    def find(self, kind: type[T]) -> T | None:
        """Return the artifact of that type or None."""
        return self.artifacts.get(kind)

    def put(self, artifact: object) -> None:
        """Provide an artifact, replacing an earlier one of its type."""
        self.artifacts[type(artifact)] = artifact


@dataclass(frozen=True)
class Pass(ABC):
    """A transformation or an analysis: valid graph in, valid graph out.

    Class attributes:
        name: Text name, `lower_snake_case`.
        stage: (stage expected, stage produced); None = any, unchanged.
        requires: Artifact types that must be provided before it runs.
        provides: Artifact types that it provides.
    """

    name: ClassVar[str]
    stage: ClassVar[tuple[Stage, Stage] | None] = None
    requires: ClassVar[tuple[type, ...]] = ()
    provides: ClassVar[tuple[type, ...]] = ()

    @abstractmethod
    def run(self, graph: Graph, ctx: PassContext) -> bool:
        """Run on the graph in place; return True iff the graph was modified."""

    def spec(self) -> str:
        """Return the text form; options at their default are left out."""
        options = []
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            if f.default is not dataclasses.MISSING and value == f.default:
                continue
            options.append(f"{f.name}={_format(value)}")
        return f"{self.name}{{{' '.join(options)}}}" if options else self.name


def _format(value: object) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, tuple):
        return ",".join(_format(v) for v in value)
    text = str(value)
    if not text or re.search(r'[\s{}"=,]', text):
        return json.dumps(text)
    return text


_SPEC = re.compile(r"^\s*([A-Za-z0-9_]+)\s*(?:\{(.*)\})?\s*$", re.DOTALL)
_OPTION = re.compile(r'\s*([A-Za-z0-9_]+)=("(?:[^"\\]|\\.)*"|[^\s{}]+)')


def parse_pass(text: str, table: typing.Mapping[str, type[Pass]]) -> Pass:
    """Return the pass that a text form describes.

    Raises:
        UsageError: Malformed text, unknown pass, unknown option or a value of the wrong type.
    """
    m = _SPEC.match(text)
    if m is None:
        raise UsageError(f"malformed pass {text!r}: expected name{{option=value ...}}")
    name, body = m.group(1), m.group(2) or ""
    if name not in table:
        raise UsageError(f"unknown pass {name!r}: known are {', '.join(sorted(table))}")
    cls = table[name]
    hints = typing.get_type_hints(cls)
    known = {f.name for f in dataclasses.fields(cls)}
    options: dict[str, Any] = {}
    at = 0
    while body[at:].strip():
        o = _OPTION.match(body, at)
        if o is None:
            raise UsageError(f"malformed options {body!r} of pass {name!r}")
        key, raw = o.group(1), o.group(2)
        if key not in known:
            raise UsageError(f"pass {name!r} has no option {key!r}: it has {sorted(known)}")
        options[key] = _parse(
            json.loads(raw) if raw[0] == '"' else raw, hints[key], f"{name}.{key}"
        )
        at = o.end()
    return cls(**options)


def _parse(text: str, hint: Any, where: str) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Union or isinstance(hint, types.UnionType):
        if text == "None" and type(None) in args:
            return None
        return _parse(text, next(a for a in args if a is not type(None)), where)
    if origin is typing.Literal:
        if text not in args:
            raise UsageError(f"{where}: {text!r} is not one of {', '.join(map(str, args))}")
        return text
    if origin is tuple:
        return tuple(_parse(t, args[0], where) for t in text.split(",") if t)
    if hint is bool:
        if text not in ("true", "false"):
            raise UsageError(f"{where}: {text!r} is not true or false")
        return text == "true"
    try:
        return hint(text)
    except ValueError:
        raise UsageError(f"{where}: {text!r} is not a {hint.__name__}") from None


def parse_pipeline(text: str, table: typing.Mapping[str, type[Pass]]) -> tuple[Pass, ...]:
    """Return the passes of a `;`-separated text form."""
    parts = [p for p in re.split(r";(?![^{]*\})", text) if p.strip()]
    return tuple(parse_pass(p, table) for p in parts)


class Instrument:
    """Observer of a pipeline; subclasses override what they need."""

    def before(self, p: Pass, graph: Graph) -> None:
        """Called before a pass."""

    def after(self, p: Pass, graph: Graph, modified: bool) -> None:
        """Called after a pass and its verification."""


class TimeInstrument(Instrument):
    """Collects the wall seconds of each pass, in order."""

    def __init__(self) -> None:
        self.seconds: list[tuple[str, float]] = []
        self._start = 0.0

    def before(self, p: Pass, graph: Graph) -> None:
        """Start the clock."""
        self._start = time.perf_counter()

    def after(self, p: Pass, graph: Graph, modified: bool) -> None:
        """Stop the clock."""
        self.seconds.append((p.name, time.perf_counter() - self._start))


class DumpInstrument(Instrument):
    """Writes the printed graph after every pass that modified it into a folder."""

    def __init__(self, folder: pathlib.Path) -> None:
        self.folder = folder
        self._count = 0

    def after(self, p: Pass, graph: Graph, modified: bool) -> None:
        """Write `NN-name.txt`."""
        self._count += 1
        if modified:
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / f"{self._count:02d}-{p.name}.txt").write_text(str(graph))


class ModifiedInstrument(Instrument):
    """Checks that a pass says truthfully whether it modified the graph (tests; costs a print)."""

    def __init__(self) -> None:
        self._before = ""

    def before(self, p: Pass, graph: Graph) -> None:
        """Remember the graph."""
        self._before = str(graph)

    def after(self, p: Pass, graph: Graph, modified: bool) -> None:
        """Compare."""
        if (str(graph) != self._before) != modified:
            raise VerificationError(f"pass {p.name} says modified={modified}, the graph disagrees")


class PassManager:
    """Runs passes in order on a copy of a graph, verifying after each.

    Args:
        passes: The pipeline.
        instruments: Observers.
        given: Artifact types present before the first pass, for the check of the chain.
        reproducer_dir: Where to write reproducers; default: a new folder beside temporary files.

    Raises:
        QCompilerError: The chain does not fit (stages or artifacts), named before anything runs.
    """

    def __init__(
        self,
        passes: Sequence[Pass],
        instruments: Sequence[Instrument] = (),
        *,
        given: Iterable[type] = (),
        reproducer_dir: pathlib.Path | None = None,
    ) -> None:
        self.passes = tuple(passes)
        self.instruments = tuple(instruments)
        self.reproducer_dir = reproducer_dir
        have = set(given)
        stage: Stage | None = None
        for p in self.passes:
            missing = [t.__name__ for t in p.requires if t not in have]
            if missing:
                raise QCompilerError(f"pass {p.name} requires {', '.join(missing)}")
            have.update(p.provides)
            if p.stage is not None:
                if stage is not None and p.stage[0] is not stage:
                    raise QCompilerError(
                        f"pass {p.name} expects stage {p.stage[0].value}, gets {stage.value}"
                    )
                stage = p.stage[1]

    def run(self, graph: Graph, ctx: PassContext) -> Graph:
        """Return the transformed copy.

        Raises:
            QCompilerError: A pass refused the input (user's mistake), unchanged.
            PassError: A pass failed or left an invalid graph; names a reproducer folder.
        """
        graph = graph.clone()
        done: list[str] = []
        for p in self.passes:
            if p.stage is not None and graph.stage is not p.stage[0]:
                raise QCompilerError(
                    f"pass {p.name} expects stage {p.stage[0].value}, got {graph.stage.value}"
                )
            printed = None
            for i in self.instruments:
                i.before(p, graph)
            before = graph.clone()
            try:
                modified = p.run(graph, ctx)
                if p.stage is not None:
                    graph.stage = p.stage[1]
                graph.verify()
            except Exception as error:  # a pass may be anybody's: its failure gets a reproducer
                if isinstance(error, QCompilerError) and error.exit_code != 3:
                    raise
                printed = str(before)
                folder = self._reproducer(p, printed, ctx, error)
                raise PassError(
                    f"pass {p.name} failed on graph {graph.name!r}: {error}",
                    pass_spec=p.spec(),
                    previous=tuple(done),
                    reproducer=str(folder),
                    hint=f"this is a defect of qcompiler; a reproducer is in {folder}",
                ) from error
            for i in self.instruments:
                i.after(p, graph, modified)
            done.append(p.spec())
        return graph

    def _reproducer(
        self, failed: Pass, printed: str, ctx: PassContext, error: BaseException
    ) -> pathlib.Path:
        folder = self.reproducer_dir or pathlib.Path(tempfile.mkdtemp(prefix="qcompiler-repro-"))
        folder.mkdir(parents=True, exist_ok=True)
        rest = self.passes[self.passes.index(failed) :]
        (folder / "graph.txt").write_text(printed)
        (folder / "passes.txt").write_text(";\n".join(p.spec() for p in rest) + "\n")
        about = {
            "error": repr(error),
            "seed": ctx.seed,
            "python": platform.python_version(),
            "machine": platform.machine(),
        }
        (folder / "about.json").write_text(json.dumps(about, indent=2) + "\n")
        return folder
