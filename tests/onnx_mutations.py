# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""Damaged and hostile ONNX models, made from sound ones by rules that know the format.

`mutate(seed)` returns the bytes of one model file; the same seed always gives the same bytes.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

MODELS = Path(__file__).parents[1] / "models"
HUGE = (0, -1, 1, 2**31 - 1, 2**31, 2**62, 2**63 - 1, -(2**63), 10**6, 65536)
OUTSIDE = (
    *("../secret.bin", "/etc/passwd", "..", ".", "", "/dev/zero", "/proc/self/mem", "missing.bin"),
    *("a/../../secret.bin", "link.bin", "pipe.bin", "x" * 5000, "nul\0byte", "./weights.bin"),
)
OPS = (
    *("Conv", "MatMul", "Gemm", "Add", "Reshape", "Transpose", "Concat", "Slice", "Pad", "Tile"),
    *("Expand", "Resize", "Gather", "Split", "Softmax", "LayerNormalization", "Einsum", "Range"),
    *("ConstantOfShape", "QLinearConv", "QLinearMatMul", "DequantizeLinear", "QuantizeLinear"),
    *("LSTM", "GRU", "RNN", "Loop", "If", "Scan", "TopK", "NonZero", "ConvTranspose", "MaxPool"),
    *("BatchNormalization", "Cast", "OneHot", "CumSum", "DepthToSpace", "NoSuchOperator"),
    *(
        "Where",
        "ReduceMean",
        "Squeeze",
        "Unsqueeze",
        "Flatten",
        "GatherND",
        "ScatterND",
        "Compress",
    ),
)

Rule = Callable[[onnx.ModelProto, random.Random], "onnx.ModelProto | bytes | None"]


def _floats(rng: np.random.Generator, *shape: int) -> Any:
    return rng.standard_normal(shape).astype(np.float32)


def _model(nodes: Sequence[Any], inputs: Any, outputs: Any, constants: Any) -> onnx.ModelProto:
    initializers = [numpy_helper.from_array(v, k) for k, v in constants.items()]
    graph = helper.make_graph(
        list(nodes),
        "g",
        [helper.make_tensor_value_info(n, t, s) for n, t, s in inputs],
        [helper.make_tensor_value_info(n, t, s) for n, t, s in outputs],
        initializers,
    )
    return helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9, producer_name="fuzz"
    )


def _cnn() -> onnx.ModelProto:
    rng = np.random.default_rng(0)
    node = helper.make_node
    return _model(
        [
            node("Conv", ["x", "w", "b"], ["c"], "conv", pads=[1, 1, 1, 1]),
            node("Relu", ["c"], ["r"], "relu"),
            node("MaxPool", ["r"], ["p"], "pool", kernel_shape=[2, 2], strides=[2, 2]),
            node("Shape", ["p"], ["s"], "shape"),
            node("Gather", ["s", "zero"], ["n"], "batch", axis=0),
            node("Unsqueeze", ["n", "axes"], ["n1"], "one"),
            node("Concat", ["n1", "minus"], ["to"], "to", axis=0),
            node("Reshape", ["p", "to"], ["f"], "flat"),
            node("Gemm", ["f", "fw", "fb"], ["g"], "fc", transB=1),
            node("Softmax", ["g"], ["y"], "softmax", axis=-1),
        ],
        [("x", TensorProto.FLOAT, ["N", 3, 8, 8])],
        [("y", TensorProto.FLOAT, ["N", 5])],
        {
            "w": _floats(rng, 4, 3, 3, 3),
            "b": _floats(rng, 4),
            "zero": np.array(0),
            "axes": np.array([0]),
            "minus": np.array([-1]),
            "fw": _floats(rng, 5, 64),
            "fb": _floats(rng, 5),
        },
    )


def _shapes() -> onnx.ModelProto:
    rng = np.random.default_rng(1)
    node = helper.make_node
    return _model(
        [
            node("Expand", ["x", "to"], ["e"], "expand"),
            node("Tile", ["e", "times"], ["t"], "tile"),
            node("Pad", ["t", "pads"], ["p"], "pad"),
            node("Resize", ["p", "", "scales"], ["r"], "resize", mode="nearest"),
            node("Slice", ["r", "starts", "ends"], ["s"], "slice"),
            node("ConstantOfShape", ["to"], ["k"], "constant"),
            node("Range", ["from", "until", "step"], ["i"], "range"),
            node("Gather", ["s", "i"], ["g"], "gather", axis=3),
            node("ReduceMean", ["g"], ["m"], "mean", keepdims=1),
            node("Add", ["m", "k"], ["y"], "add"),
        ],
        [("x", TensorProto.FLOAT, [1, 3, 1, 4])],
        [("y", TensorProto.FLOAT, None)],
        {
            "to": np.array([1, 3, 2, 4]),
            "times": np.array([1, 1, 2, 1]),
            "pads": np.array([0, 0, 1, 1, 0, 0, 1, 1]),
            "scales": np.array([1, 1, 2, 2], np.float32),
            "starts": np.array([0, 0, 0, 0]),
            "ends": np.array([1, 3, 8, 8]),
            "from": np.array(0),
            "until": np.array(4),
            "step": np.array(1),
            "unused": _floats(rng, 2),
        },
    )


def _qdq() -> onnx.ModelProto:
    rng = np.random.default_rng(2)
    node = helper.make_node
    return _model(
        [
            node("QuantizeLinear", ["x", "xs", "xz"], ["xq"], "q"),
            node(
                "QLinearConv", ["xq", "xs", "xz", "w", "ws", "wz", "ys", "xz", "b"], ["c"], "conv"
            ),
            node("DequantizeLinear", ["c", "ys", "xz"], ["d"], "dq"),
            node("QuantizeLinear", ["d", "xs", "xz"], ["e"], "q2"),
            node("DequantizeLinear", ["e", "xs", "xz"], ["y"], "dq2"),
        ],
        [("x", TensorProto.FLOAT, [1, 2, 6, 6])],
        [("y", TensorProto.FLOAT, [1, 4, 4, 4])],
        {
            "xs": np.array(0.1, np.float32),
            "xz": np.array(128, np.uint8),
            "ys": np.array(0.2, np.float32),
            "w": rng.integers(-128, 128, (4, 2, 3, 3)).astype(np.int8),
            "ws": np.full(4, 0.02, np.float32),
            "wz": np.zeros(4, np.int8),
            "b": rng.integers(-100, 100, 4).astype(np.int32),
        },
    )


def _control() -> onnx.ModelProto:
    rng = np.random.default_rng(3)
    node, info = helper.make_node, helper.make_tensor_value_info

    def branch(op: str) -> onnx.GraphProto:
        out = [info("z", TensorProto.FLOAT, [2, 4])]
        return helper.make_graph([node(op, ["m"], ["z"], op)], op, [], out)

    body = helper.make_graph(
        [node("Add", ["h", "m"], ["h2"]), node("Identity", ["go"], ["go2"])],
        "body",
        [
            info("it", TensorProto.INT64, []),
            info("go", TensorProto.BOOL, []),
            info("h", TensorProto.FLOAT, [2, 4]),
        ],
        [info("go2", TensorProto.BOOL, []), info("h2", TensorProto.FLOAT, [2, 4])],
    )
    return _model(
        [
            node("MatMul", ["x", "w"], ["m"], "matmul"),
            node(
                "If", ["flag"], ["i"], "if", then_branch=branch("Relu"), else_branch=branch("Neg")
            ),
            node("Loop", ["trips", "flag", "i"], ["l"], "loop", body=body),
            node("LSTM", ["seq", "lw", "lr"], ["q", "", ""], "lstm", hidden_size=3),
            node("ReduceSum", ["q"], ["s"], "sum", keepdims=0),
            node("Add", ["l", "s"], ["y"], "add"),
        ],
        [("x", TensorProto.FLOAT, [2, 4]), ("seq", TensorProto.FLOAT, [5, 1, 2])],
        [("y", TensorProto.FLOAT, [2, 4])],
        {
            "w": _floats(rng, 4, 4),
            "flag": np.array(True),
            "trips": np.array(3),
            "lw": _floats(rng, 1, 12, 2),
            "lr": _floats(rng, 1, 12, 3),
        },
    )


def _functions() -> onnx.ModelProto:
    node = helper.make_node
    body = [node("Mul", ["a", "a"], ["t"]), node("Add", ["t", "b"], ["c"])]
    ops = [helper.make_opsetid("", 18)]
    square = helper.make_function("local", "Square", ["a", "b"], ["c"], body, ops)
    model = _model(
        [
            node("Square", ["x", "k"], ["h"], "f", domain="local"),
            node("Gelu", ["h"], ["y"], "gelu"),
        ],
        [("x", TensorProto.FLOAT, [2, 3])],
        [("y", TensorProto.FLOAT, [2, 3])],
        {"k": np.ones((2, 3), np.float32)},
    )
    del model.opset_import[:]
    model.opset_import.extend([helper.make_opsetid("", 20), helper.make_opsetid("local", 1)])
    model.functions.append(square)
    return model


@functools.cache
def sound_models() -> tuple[onnx.ModelProto, ...]:
    """The models that mutations start from; every one of them is valid."""
    bundled = [onnx.load(MODELS / name / "model.onnx") for name in ("digits_cnn", "digits_hybrid")]
    return (_cnn(), _shapes(), _qdq(), _control(), _functions(), *bundled)


# --- rules ---------------------------------------------------------------------------------------


def _node(model: onnx.ModelProto, rng: random.Random) -> Any:
    return rng.choice(model.graph.node) if model.graph.node else None


def _tensor(model: onnx.ModelProto, rng: random.Random) -> Any:
    return rng.choice(model.graph.initializer) if model.graph.initializer else None


def _name(model: onnx.ModelProto, rng: random.Random) -> str:
    names = [o for n in model.graph.node for o in n.output]
    names += [t.name for t in model.graph.initializer] + [v.name for v in model.graph.input]
    return rng.choice([*names, "", "nothing", "\n", "x" * 300])


def drop_initializer(model: onnx.ModelProto, rng: random.Random) -> None:
    if model.graph.initializer:
        del model.graph.initializer[rng.randrange(len(model.graph.initializer))]


def drop_node(model: onnx.ModelProto, rng: random.Random) -> None:
    if model.graph.node:
        del model.graph.node[rng.randrange(len(model.graph.node))]


def repeat_node(model: onnx.ModelProto, rng: random.Random) -> None:
    node = _node(model, rng)
    if node is not None:
        model.graph.node.append(node)


def rewire(model: onnx.ModelProto, rng: random.Random) -> None:
    node = _node(model, rng)
    if node is not None and node.input:
        node.input[rng.randrange(len(node.input))] = _name(model, rng)


def rename_output(model: onnx.ModelProto, rng: random.Random) -> None:
    node = _node(model, rng)
    if node is not None and node.output:
        node.output[rng.randrange(len(node.output))] = _name(model, rng)


def add_operand(model: onnx.ModelProto, rng: random.Random) -> None:
    node = _node(model, rng)
    if node is not None:
        node.input.extend([_name(model, rng)] * rng.choice((1, 2, 500)))


def drop_operand(model: onnx.ModelProto, rng: random.Random) -> None:
    node = _node(model, rng)
    if node is not None and node.input:
        del node.input[rng.randrange(len(node.input))]


def cycle(model: onnx.ModelProto, rng: random.Random) -> None:
    nodes = [n for n in model.graph.node if n.input and n.output]
    if len(nodes) > 1:
        first, last = sorted(rng.sample(range(len(nodes)), 2))
        nodes[first].input[0] = nodes[last].output[0]


def change_operator(model: onnx.ModelProto, rng: random.Random) -> None:
    node = _node(model, rng)
    if node is not None:
        node.op_type = rng.choice(OPS)
        if rng.random() < 0.1:
            node.domain = rng.choice(("com.microsoft", "local", "ai.onnx.ml", "nowhere"))


def change_attribute(model: onnx.ModelProto, rng: random.Random) -> None:
    nodes = [n for n in model.graph.node if n.attribute]
    if not nodes:
        return
    a = rng.choice(rng.choice(nodes).attribute)
    if a.type == onnx.AttributeProto.INTS and a.ints and rng.random() < 0.7:
        a.ints[rng.randrange(len(a.ints))] = rng.choice(HUGE)
    elif a.type == onnx.AttributeProto.INTS:
        a.ints.extend([rng.choice(HUGE)] * rng.choice((1, 3, 1000)))
    elif a.type == onnx.AttributeProto.INT:
        a.i = rng.choice(HUGE)
    elif a.type == onnx.AttributeProto.FLOAT:
        a.f = rng.choice((float("nan"), float("inf"), -1e38, 0.0))
    elif a.type == onnx.AttributeProto.STRING:
        a.s = rng.choice((b"", b"\xff\xfe", b"nonsense", b"x" * 1000))
    else:
        a.type = rng.choice((1, 2, 3, 4, 5, 6, 7))


def new_attribute(model: onnx.ModelProto, rng: random.Random) -> None:
    node = _node(model, rng)
    if node is not None:
        name = rng.choice(("axis", "axes", "kernel_shape", "pads", "group", "perm", "to", "mode"))
        value = rng.choice((rng.choice(HUGE), [rng.choice(HUGE)] * 4, "text", 0.5))
        node.attribute.append(helper.make_attribute(name, value))


def change_extent(model: onnx.ModelProto, rng: random.Random) -> None:
    values = [*model.graph.input, *model.graph.output]
    dims = rng.choice(values).type.tensor_type.shape.dim
    if dims:
        rng.choice(dims).dim_value = rng.choice(HUGE)


def change_dims(model: onnx.ModelProto, rng: random.Random) -> None:
    tensor = _tensor(model, rng)
    if tensor is None:
        return
    if tensor.dims and rng.random() < 0.7:
        tensor.dims[rng.randrange(len(tensor.dims))] = rng.choice(HUGE)
    else:
        tensor.dims.append(rng.choice(HUGE))


def change_dtype(model: onnx.ModelProto, rng: random.Random) -> None:
    tensor = _tensor(model, rng)
    if tensor is not None:
        tensor.data_type = rng.choice((0, 1, 2, 3, 6, 7, 8, 9, 10, 11, 14, 16, 17, 21, 22, 23, 99))


def cut_data(model: onnx.ModelProto, rng: random.Random) -> None:
    tensor = _tensor(model, rng)
    if tensor is not None and tensor.raw_data:
        tensor.raw_data = tensor.raw_data[: rng.randrange(len(tensor.raw_data))]


def change_values(model: onnx.ModelProto, rng: random.Random) -> None:
    tensor = _tensor(model, rng)
    if tensor is None:
        return
    data = numpy_helper.to_array(tensor).copy()
    extremes = {"f": (float("nan"), float("inf"), 0.0, -1e30), "i": HUGE, "u": (0, 255)}
    if data.size and data.dtype.kind in extremes:
        value = rng.choice(extremes[data.dtype.kind])
        with np.errstate(all="ignore"):
            data.reshape(-1)[rng.randrange(data.size)] = np.array(value).astype(data.dtype)
        tensor.CopyFrom(numpy_helper.from_array(data, tensor.name))


def external(model: onnx.ModelProto, rng: random.Random) -> None:
    tensor = _tensor(model, rng)
    if tensor is None:
        return
    size = len(tensor.raw_data)
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    entries = {"location": rng.choice(OUTSIDE)}
    if rng.random() < 0.6:
        entries["offset"] = str(rng.choice((*HUGE, "text")))
    if rng.random() < 0.6:
        entries["length"] = str(rng.choice((*HUGE, size, "text")))
    for key, value in entries.items():
        tensor.external_data.add(key=key, value=value)


def nest(model: onnx.ModelProto, rng: random.Random) -> bytes | None:
    """If within If: protobuf itself ends at a depth of 100 when it reads."""
    depth = rng.choice((5, 20, 30, 60, 200))
    out = [helper.make_tensor_value_info("deep", TensorProto.FLOAT, None)]
    name = model.graph.input[0].name
    inner = helper.make_graph([helper.make_node("Identity", [name], ["deep"])], "g", [], out)
    data = inner.SerializeToString()
    for _ in range(depth):
        # Written by hand: python's protobuf does not nest deeper than it reads.
        node = helper.make_node("If", ["deep_flag"], ["deep"]).SerializeToString()
        for branch in ("then_branch", "else_branch")[: rng.choice((1, 2)) if depth < 8 else 1]:
            attribute = _field(1, branch.encode()) + _field(6, data) + _varint(20 << 3) + b"\5"
            node += _field(5, attribute)
        graph = _field(1, node) + _field(2, b"g")
        data = graph + b"".join(_field(12, v.SerializeToString()) for v in out)
    model.graph.initializer.append(numpy_helper.from_array(np.array(True), "deep_flag"))
    top = onnx.ModelProto()
    top.CopyFrom(model)
    top.graph.ClearField("node")
    extra = _varint_tail(data)
    head = top.SerializeToString()
    # A second `graph` field is merged into the first one.
    return head + _field(7, extra)


def _varint_tail(graph: bytes) -> bytes:
    return graph


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    out.append(value)
    return bytes(out)


def _field(number: int, data: bytes) -> bytes:
    return _varint(number << 3 | 2) + _varint(len(data)) + data


def bomb(model: onnx.ModelProto, rng: random.Random) -> None:
    """A few bytes that ask for terabytes."""
    size = rng.choice((2**20, 2**34, 2**40, 2**62))
    kind = rng.choice(("ConstantOfShape", "Expand", "Tile", "Range", "Pad", "Resize", "OneHot"))
    at = model.graph
    add = {
        "ConstantOfShape": {"bs": np.array([size, 4])},
        "Expand": {"bx": np.ones(1, np.float32), "bs": np.array([size, 4])},
        "Tile": {"bx": np.ones((1, 2), np.float32), "bs": np.array([size, 4])},
        "Range": {"bx": np.array(0), "bs": np.array(size), "bt": np.array(1)},
        "Pad": {"bx": np.ones((1, 2), np.float32), "bs": np.array([0, 0, size, 4])},
        "Resize": {"bx": np.ones((1, 1, 2, 2), np.float32), "": np.array(0),
                   "bs": np.array([1, 1, size, size], np.float32)},
        "OneHot": {"bx": np.arange(4), "bs": np.array(size), "bt": np.array([0.0, 1.0])},
    }[kind]  # fmt: skip
    names = list(add)
    if kind == "Resize":
        names = ["bx", "", "bs"]
        del add[""]
    at.initializer.extend([numpy_helper.from_array(v, k) for k, v in add.items()])
    at.node.append(helper.make_node(kind, names, ["bomb"], "bomb"))
    at.node.append(helper.make_node("ReduceMax", ["bomb"], ["bang"], "bang", keepdims=0))
    at.output.append(helper.make_tensor_value_info("bang", TensorProto.FLOAT, None))


def wide(model: onnx.ModelProto, rng: random.Random) -> None:
    """Results that double in size, node after node."""
    first = model.graph.input[0].name
    for i in range(rng.choice((12, 40, 80))):
        made = f"double{i}"
        model.graph.node.append(helper.make_node("Concat", [first, first], [made], made, axis=0))
        first = made
    model.graph.output.append(helper.make_tensor_value_info(first, TensorProto.FLOAT, None))


def change_opset(model: onnx.ModelProto, rng: random.Random) -> None:
    if model.opset_import:
        model.opset_import[0].version = rng.choice(
            (0, -1, 1, 6, 7, 8, 9, 10, 11, 12, 13, 30, 2**40)
        )
    if rng.random() < 0.2:
        model.opset_import.add(domain="", version=rng.choice((1, 9, 13)))
    if rng.random() < 0.2:
        model.ir_version = rng.choice((0, 1, 2, 3, 99))


def recurse(model: onnx.ModelProto, rng: random.Random) -> None:
    """Functions that call themselves, or each other."""
    ops = [helper.make_opsetid("", 18), helper.make_opsetid("local", 1)]
    for name, other in (("A", "B"), ("B", rng.choice("AB"))):
        body = [helper.make_node(other, ["a"], ["c"], domain="local")]
        model.functions.append(helper.make_function("local", name, ["a"], ["c"], body, ops))
    if not any(o.domain == "local" for o in model.opset_import):
        model.opset_import.add(domain="local", version=1)
    read = model.graph.input[0].name
    model.graph.node.append(helper.make_node("A", [read], ["called"], domain="local"))
    model.graph.output.append(helper.make_tensor_value_info("called", TensorProto.FLOAT, None))


def doubling_functions(model: onnx.ModelProto, rng: random.Random) -> None:
    """Each function calls the one before twice: inlining them all doubles the nodes each time."""
    ops = [helper.make_opsetid("", 18), helper.make_opsetid("local", 1)]
    for i in range(rng.choice((5, 30))):
        op, domain = (f"F{i - 1}", "local") if i else ("Neg", "")
        body = [
            helper.make_node(op, ["a"], ["b"], domain=domain),
            helper.make_node(op, ["b"], ["c"], domain=domain),
        ]
        model.functions.append(helper.make_function("local", f"F{i}", ["a"], ["c"], body, ops))
    if not any(o.domain == "local" for o in model.opset_import):
        model.opset_import.add(domain="local", version=1)
    read = model.graph.input[0].name
    last = len(model.functions) - 1
    called = helper.make_node(model.functions[last].name, [read], ["called"], domain="local")
    model.graph.node.append(called)
    model.graph.output.append(helper.make_tensor_value_info("called", TensorProto.FLOAT, None))


def loop_forever(model: onnx.ModelProto, rng: random.Random) -> None:
    for node in model.graph.node:
        if node.op_type == "Loop":
            for tensor in model.graph.initializer:
                if tensor.name == node.input[0]:
                    trips = np.array(rng.choice((0, -1, 10**4, 10**9, 2**62)))
                    tensor.CopyFrom(numpy_helper.from_array(trips, tensor.name))


def huge_sequence(model: onnx.ModelProto, rng: random.Random) -> None:
    for value in model.graph.input:
        if value.name == "seq":
            value.type.tensor_type.shape.dim[0].dim_value = rng.choice((0, 1, 10**5, 10**9, 2**60))


def sparse(model: onnx.ModelProto, rng: random.Random) -> None:
    made = model.graph.sparse_initializer.add()
    made.values.CopyFrom(numpy_helper.from_array(np.ones(3, np.float32), "sparse"))
    made.indices.CopyFrom(numpy_helper.from_array(np.array([0, 5, rng.choice(HUGE)])))
    made.dims.extend([rng.choice(HUGE), rng.choice(HUGE)])
    node = _node(model, rng)
    if node is not None and node.input:
        node.input[0] = "sparse"


def no_type(model: onnx.ModelProto, rng: random.Random) -> None:
    value = rng.choice([*model.graph.input, *model.graph.output])
    if rng.random() < 0.5:
        value.ClearField("type")
    else:
        value.type.tensor_type.elem_type = rng.choice((0, 8, 14, 15, 16, 21, 99))


def bytes_changed(model: onnx.ModelProto, rng: random.Random) -> bytes:
    data = bytearray(model.SerializeToString())
    for _ in range(rng.choice((1, 3, 20))):
        data[rng.randrange(len(data))] = rng.randrange(256)
    return bytes(data)


def bytes_cut(model: onnx.ModelProto, rng: random.Random) -> bytes:
    data = model.SerializeToString()
    start = rng.randrange(len(data)) if rng.random() < 0.3 else 0
    return data[start : rng.randrange(start, len(data))]


def archive(model: onnx.ModelProto, rng: random.Random) -> bytes:
    """What is no model at all."""
    data = model.SerializeToString()
    head = rng.choice((b"PK\3\4", b"\x1f\x8b\x08", b"%PDF", b"\0" * 64, b"{", b"\xff" * 64))
    return head + data[: rng.randrange(len(data))]


RULES: tuple[Rule, ...] = (
    *(drop_initializer, drop_node, repeat_node, rewire, rename_output, add_operand, drop_operand),
    *(cycle, change_operator, change_attribute, new_attribute, change_extent, change_dims),
    *(change_dtype, cut_data, change_values, external, nest, bomb, wide, change_opset, recurse),
    *(doubling_functions, loop_forever, huge_sequence, sparse, no_type, bytes_changed, bytes_cut),
    archive,
)


def mutate(seed: int) -> tuple[bytes, str]:
    """Return a mutated model's bytes and the names of the rules that made it."""
    rng = random.Random(f"qcompiler {seed}")
    model = onnx.ModelProto()
    model.CopyFrom(rng.choice(sound_models()))
    names = []
    # Every rule comes first equally often; some models get several.
    rules = [RULES[seed % len(RULES)], *rng.choices(RULES, k=rng.choice((0, 0, 0, 1, 2)))]
    for rule in rules:
        names.append(rule.__name__)
        try:
            made = rule(model, rng)
        except (ValueError, TypeError, OverflowError):  # one rule broke what the next one reads
            continue
        if isinstance(made, bytes):
            return made, " ".join(names)
    return model.SerializeToString(), " ".join(names)
