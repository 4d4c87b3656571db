# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""Half precision on tensor cores, which multiply halves and add in float32.

Products read float16 weights as they are. Other weights in fewer bits become float32: no kernel
unpacks them for a float product.
"""

from __future__ import annotations

from qcompiler.ir import Graph, Node
from qcompiler.passes.widen_weights import WidenWeights
from qcompiler.passmanager import PassContext
from qcompiler.targets import halves


def _on_tensor_cores(node: Node) -> bool:
    """Whether a product is no depthwise convolution, whose kernel takes floats of both widths."""
    return not (
        node.op.name == "conv" and node.input(1).shape[1] == 1 and int(node.attr("group")) > 1
    )


_RULES = halves.HalfRules(
    either=frozenset({
        "relu", "clip", "leaky_relu", "gelu", "silu", "sigmoid", "tanh", "hard_sigmoid",
        "hard_swish", "elu", "softplus", "add", "sub", "mul", "max", "min", "average_pool",
        "reduce_mean", "softmax", "layer_norm", "transpose", "slice", "expand", "tile", "pad",
        "resize", "depth_to_space", "space_to_depth", "concat",
    }),
    tied=frozenset({"reshape", "max_pool"}),
    reads=frozenset({"quantize"}),
    reads_as_half=_on_tensor_cores,
)  # fmt: skip


def with_halves(graph: Graph) -> Graph:
    """Return the graph itself, or a copy with half-precision products and values between them."""
    if not any(_reads_widened(n) for n in graph.nodes):
        return graph
    found = halves.with_halves(graph, _RULES)
    found = graph.clone() if found is graph else found
    for node in found.nodes:
        held = halves.half_weights(node)
        if held is not None:
            found.set_input(node, 1, held)
    WidenWeights().run(found, PassContext())
    found.eliminate_dead()
    return found


def _reads_widened(node: Node) -> bool:
    return node.op.name in ("conv", "matmul") and node.input(1).producer is not None
