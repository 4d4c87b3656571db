# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""Passes: text form, chaining, verification, reproducers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

import pytest

from qcompiler.errors import DataError, PassError, QCompilerError, UsageError, VerificationError
from qcompiler.ir import Graph
from qcompiler.ops import Stage
from qcompiler.passmanager import (
    DumpInstrument,
    ModifiedInstrument,
    Pass,
    PassContext,
    PassManager,
    TimeInstrument,
    parse_pass,
    parse_pipeline,
)
from qcompiler.types import DType, TensorType


@dataclass(frozen=True)
class Options(Pass):
    """Has options of every kind."""

    name: ClassVar[str] = "options"
    number: int = 3
    real: float = 0.5
    flag: bool = False
    word: Literal["low", "high"] = "low"
    text: str = ""
    sizes: tuple[int, ...] = ()
    limit: float | None = None

    def run(self, graph: Graph, ctx: PassContext) -> bool:
        return False


@dataclass(frozen=True)
class AddRelu(Pass):
    """Puts a relu before the result."""

    name: ClassVar[str] = "add_relu"
    lie: bool = False

    def run(self, graph: Graph, ctx: PassContext) -> bool:
        (name, value), *_ = graph.outputs
        graph.set_outputs([(name, graph.add("relu", [value]).output)])
        return not self.lie


@dataclass(frozen=True)
class Break(Pass):
    """Leaves an invalid graph, or raises."""

    name: ClassVar[str] = "break"
    how: Literal["graph", "defect", "user"] = "graph"

    def run(self, graph: Graph, ctx: PassContext) -> bool:
        if self.how == "defect":
            raise KeyError("oops")
        if self.how == "user":
            raise DataError("the samples are empty")
        graph.set_type(graph.nodes[0].output, TensorType((9,), DType.FLOAT32))
        return True


@dataclass(frozen=True)
class ToQdq(Pass):
    """Changes the stage."""

    name: ClassVar[str] = "to_qdq"
    stage: ClassVar[tuple[Stage, Stage]] = (Stage.FLOAT, Stage.QDQ)
    requires: ClassVar[tuple[type, ...]] = (str,)
    provides: ClassVar[tuple[type, ...]] = (int,)

    def run(self, graph: Graph, ctx: PassContext) -> bool:
        ctx.put(len(ctx.get(str)))
        return False


TABLE = {p.name: p for p in (Options, AddRelu, Break, ToQdq)}


@pytest.fixture
def graph() -> Graph:
    g = Graph("net")
    x = g.add_input("x", TensorType((2, 3), DType.FLOAT32))
    g.set_outputs([("y", g.add("exp", [x]).output)])
    return g


@pytest.mark.parametrize(
    "p",
    [
        Options(),
        Options(number=-7, real=99.99, flag=True, word="high", sizes=(1, 2, 3), limit=1e-5),
        Options(text='with spaces, "quotes" {braces} and a \\'),
        Options(sizes=(4,)),
    ],
)
def test_text_form_round_trips(p: Options) -> None:
    assert parse_pass(p.spec(), TABLE) == p


def test_defaults_are_left_out() -> None:
    assert Options().spec() == "options"
    assert Options(number=4, flag=True).spec() == "options{number=4 flag=true}"


def test_pipeline_text() -> None:
    found = parse_pipeline('options{text="a;b"}; add_relu;', TABLE)
    assert found == (Options(text="a;b"), AddRelu())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nothing", r"unknown pass 'nothing': known are add_relu, break"),
        ("options{size=3}", r"has no option 'size'"),
        ("options{number=x}", r"options\.number: 'x' is not a int"),
        ("options{flag=yes}", r"'yes' is not true or false"),
        ("options{word=mid}", r"'mid' is not one of low, high"),
        ("options{number}", r"malformed options"),
        ("a b", r"malformed pass"),
    ],
)
def test_bad_text_is_refused(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse_pass(text, TABLE)


def test_works_on_a_copy_and_reports_to_instruments(graph: Graph, tmp_path: Path) -> None:
    before = str(graph)
    clock = TimeInstrument()
    manager = PassManager([AddRelu(), Options()], [clock, DumpInstrument(tmp_path)])
    after = manager.run(graph, PassContext())
    assert str(graph) == before
    assert [n.op.name for n in after.nodes] == ["exp", "relu"]
    assert [name for name, _ in clock.seconds] == ["add_relu", "options"]
    assert [f.name for f in tmp_path.iterdir()] == ["01-add_relu.txt"]


def test_a_pass_that_lies_about_modifying_is_found(graph: Graph) -> None:
    with pytest.raises(VerificationError, match="says modified=False"):
        PassManager([AddRelu(lie=True)], [ModifiedInstrument()]).run(graph, PassContext())


def test_invalid_graph_leaves_a_reproducer(graph: Graph, tmp_path: Path) -> None:
    manager = PassManager([AddRelu(), Break(), Options()], reproducer_dir=tmp_path)
    with pytest.raises(PassError, match="pass break failed") as caught:
        manager.run(graph, PassContext(seed=5))
    error = caught.value
    assert error.previous == ("add_relu",)
    assert error.pass_spec == "break"
    assert error.reproducer == str(tmp_path)
    assert "relu" in (tmp_path / "graph.txt").read_text()
    assert parse_pipeline((tmp_path / "passes.txt").read_text(), TABLE) == (Break(), Options())
    assert '"seed": 5' in (tmp_path / "about.json").read_text()


def test_defects_and_users_mistakes_differ(graph: Graph, tmp_path: Path) -> None:
    with pytest.raises(PassError) as caught:
        PassManager([Break("defect")], reproducer_dir=tmp_path).run(graph, PassContext())
    assert isinstance(caught.value.__cause__, KeyError)
    with pytest.raises(DataError, match="the samples are empty"):
        PassManager([Break("user")]).run(graph, PassContext())


def test_the_chain_is_checked_before_anything_runs(graph: Graph) -> None:
    with pytest.raises(QCompilerError, match="pass to_qdq requires str"):
        PassManager([ToQdq()])
    with pytest.raises(QCompilerError, match="expects stage float, gets qdq"):
        PassManager([ToQdq(), ToQdq()], given=[str])
    ctx = PassContext()
    ctx.put("abc")
    after = PassManager([ToQdq()], given=[str]).run(graph, ctx)
    assert after.stage is Stage.QDQ
    assert ctx.get(int) == 3
    with pytest.raises(QCompilerError, match="expects stage float, got qdq"):
        PassManager([ToQdq()], given=[str]).run(after, ctx)
    with pytest.raises(QCompilerError, match="no float has been provided"):
        ctx.get(float)
