# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""Write ONNX graphs node by node. Needs numpy and onnx only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

OPSET = 17
IR_VERSION = 8  # the IR version that came with opset 17


class GraphWriter:
    """Write an ONNX graph node by node; every tensor gets a readable, unique name."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._nodes: list[Any] = []
        self._constants: list[Any] = []
        self._inputs: list[Any] = []
        self._outputs: list[Any] = []
        self._taken: set[str] = set()

    def unique(self, hint: str) -> str:
        """Return ``hint``, with a number appended where that name is already in use."""
        name, count = hint, 1
        while name in self._taken:
            name, count = f"{hint}_{count}", count + 1
        self._taken.add(name)
        return name

    def input(self, name: str, shape: Sequence[int | str], dtype: int = TensorProto.FLOAT) -> str:
        """Declare a graph input; a string in ``shape`` is a symbolic dimension."""
        self._taken.add(name)
        self._inputs.append(helper.make_tensor_value_info(name, dtype, list(shape)))
        return name

    def output(self, value: str, name: str, shape: Sequence[int | str]) -> None:
        """Declare ``value`` as the float graph output ``name``."""
        self._nodes.append(helper.make_node("Identity", [value], [name], name=f"{name}/identity"))
        self._outputs.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, list(shape)))

    def constant(self, array: npt.ArrayLike, hint: str) -> str:
        """Add an initializer and return its name."""
        name = self.unique(hint)
        self._constants.append(numpy_helper.from_array(np.ascontiguousarray(array), name))
        return name

    def node(self, op: str, inputs: Sequence[str], hint: str, **attributes: Any) -> str:
        """Add a node with one output and return the output's name."""
        name = self.unique(hint)
        self._nodes.append(helper.make_node(op, list(inputs), [name], name=name, **attributes))
        return name

    def model(self) -> onnx.ModelProto:
        """Return the finished model after ``onnx.checker`` has accepted it."""
        self._drop_output_identities()
        graph = helper.make_graph(
            self._nodes, self.name, self._inputs, self._outputs, self._constants
        )
        model = helper.make_model(
            graph,
            opset_imports=[helper.make_opsetid("", OPSET)],
            ir_version=IR_VERSION,
            producer_name="qcompiler-models",
        )
        onnx.checker.check_model(model)
        return model

    def _drop_output_identities(self) -> None:
        """Rename the producers of the outputs, so that no Identity node is left before them."""
        outputs = {value.name for value in self._outputs}
        renames = {
            node.input[0]: node.output[0]
            for node in self._nodes
            if node.op_type == "Identity" and node.output[0] in outputs
        }
        self._nodes = [node for node in self._nodes if node.output[0] not in renames.values()]
        for node in self._nodes:
            node.input[:] = [renames.get(name, name) for name in node.input]
            node.output[:] = [renames.get(name, name) for name in node.output]
