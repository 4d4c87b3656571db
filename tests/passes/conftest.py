# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""Fixtures for rewrites: ONNX text in, and a run that checks what every rewrite owes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import ModuleType

import numpy as np
import onnx
import onnx.parser
import outside_models
import pytest

from qcompiler.interpreter import run
from qcompiler.ir import Graph
from qcompiler.onnx_import import load_onnx
from qcompiler.passmanager import ModifiedInstrument, Pass, PassContext, PassManager, parse_pass
from qcompiler.types import Array

LoadText = Callable[..., Graph]
Rewrite = Callable[..., Graph]


@pytest.fixture
def load_text() -> LoadText:
    """Import `inputs => outputs { nodes }` of ONNX text; keyword arguments are constants."""

    def load(text: str, *, opset: int = 17, **constants: Array | float) -> Graph:
        head = f'<ir_version: 8, opset_import: ["" : {opset}]> net '
        model = onnx.parser.parse_model(head + text)
        for name, data in constants.items():
            tensor = onnx.numpy_helper.from_array(np.asarray(data, np.result_type(data)), name)
            model.graph.initializer.append(tensor)
        return load_onnx(model)

    return load


@pytest.fixture
def rewrite(rng: np.random.Generator) -> Rewrite:
    """Run a pass on a copy and return it, after checking what every rewrite owes.

    It says truthfully whether it modified the graph, leaves a valid graph of the same interface
    and the same meaning, round-trips through its text form, and has nothing left to do when run
    again.
    """

    def apply(
        p: Pass,
        graph: Graph,
        feeds: Mapping[str, Array] | None = None,
        *,
        modified: bool = True,
        again: bool = False,
        atol: float = 1e-5,
    ) -> Graph:
        assert parse_pass(p.spec(), {p.name: type(p)}) == p
        before = str(graph)
        after = PassManager([p], [ModifiedInstrument()]).run(graph, PassContext())
        assert str(graph) == before, "the manager works on a copy"
        assert (str(after) != before) == modified
        if not again:
            copy = after.clone()
            assert p.run(copy, PassContext()) is False, "a second run has nothing to do"
            assert str(copy) == str(after)
        given = {v.name: rng.standard_normal(v.shape).astype(v.dtype.numpy) for v in graph.inputs}
        given.update(feeds or {})
        want, got = run(graph, given), run(after, given)
        assert list(got) == list(want)
        for name, array in want.items():
            assert got[name].dtype == array.dtype
            np.testing.assert_allclose(got[name], array, rtol=1e-4, atol=atol, err_msg=name)
        return after

    return apply


@pytest.fixture(scope="session")
def prepare() -> ModuleType:
    """The script that makes samples of the models outside the repository."""
    return outside_models.prepare()


@pytest.fixture
def uniform(rng: np.random.Generator) -> Callable[..., Array]:
    """Random float32 arrays in [-2, 2)."""

    def make(*shape: int) -> Array:
        return rng.uniform(-2, 2, shape).astype(np.float32)

    return make
