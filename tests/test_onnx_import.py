# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""Import: names, shapes, constants, quantized tensors, and real models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from outside_models import each_model, model_graph, noise

from qcompiler.errors import ModelError, ShapeError, UsageError
from qcompiler.interpreter import run
from qcompiler.ir import Graph
from qcompiler.onnx_import import load_onnx
from qcompiler.onnx_import_context import CONVERTERS
from qcompiler.ops import Stage
from qcompiler.ort import Session
from qcompiler.types import Array, DType, PerAxis, PerGroup


def elem(a: Array) -> int:
    return int(helper.np_dtype_to_tensor_dtype(a.dtype))


def make_model(
    nodes: Sequence[onnx.NodeProto],
    inputs: Mapping[str, Array | tuple[int, Sequence[int | str | None]]],
    outputs: Sequence[str],
    constants: Mapping[str, Array] | None = None,
    *,
    opset: int = 17,
    domains: Mapping[str, int] | None = None,
    output_shapes: Mapping[str, Sequence[int | str]] | None = None,
) -> onnx.ModelProto:
    infos = []
    for name, a in inputs.items():
        kind, shape = (elem(a), a.shape) if isinstance(a, np.ndarray) else a
        infos.append(helper.make_tensor_value_info(name, kind, shape))
    outs = []
    for o in outputs:
        if output_shapes and o in output_shapes:
            outs.append(helper.make_tensor_value_info(o, TensorProto.FLOAT, output_shapes[o]))
        else:
            outs.append(helper.make_empty_tensor_value_info(o))
    tensors = [numpy_helper.from_array(a, n) for n, a in (constants or {}).items()]
    graph = helper.make_graph(nodes, "net", infos, outs, tensors)
    ids = [helper.make_opsetid("", opset)]
    ids += [helper.make_opsetid(d, v) for d, v in (domains or {}).items()]
    model = helper.make_model(graph, opset_imports=ids)
    model.ir_version = min(model.ir_version, 10)
    return model


def expect(model: onnx.ModelProto, feeds: Mapping[str, Array]) -> dict[str, Array]:
    return Session(model.SerializeToString(), optimization="disabled").run(feeds)


def same(
    graph: Graph, model: onnx.ModelProto, feeds: Mapping[str, Array], atol: float = 1e-5
) -> None:
    """Assert that graph and model compute the same."""
    graph.verify()
    want, got = expect(model, feeds), run(graph, feeds)
    assert list(got) == list(want)
    for name, array in want.items():
        assert got[name].dtype == array.dtype, name
        np.testing.assert_allclose(got[name], array, rtol=1e-4, atol=atol, err_msg=name)


def uniform(*shape: int) -> Array:
    return np.random.default_rng(sum(shape) + len(shape)).uniform(-2, 2, shape).astype(np.float32)


def ints(*values: int) -> Array:
    return np.asarray(values, np.int64)


X = uniform(2, 6, 7, 5)
W = uniform(4, 6, 3, 3)


# -------------------------------------------------------------------------- names and structure


def chain(**kwargs: Any) -> onnx.ModelProto:
    """x -> Conv -> Relu -> y with an unnamed Relu."""
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"], name="first"),
        helper.make_node("Relu", ["c"], ["y"]),
    ]
    return make_model(nodes, {"x": X}, ["y"], {"w": W}, **kwargs)


def test_names_are_the_models() -> None:
    graph = load_onnx(chain())
    assert [v.name for v in graph.inputs] == ["x"]
    assert [(n.name, n.output.name, n.sources) for n in graph.nodes] == [
        ("first", "c", ("first",)),
        ("Relu_0", "y", ("Relu_0",)),
    ]
    assert graph.nodes[0].input(1).name == "w"
    assert graph.outputs[0][0] == "y"


def test_a_node_named_like_a_tensor_gives_way() -> None:
    node = helper.make_node("Relu", ["x"], ["y"], name="y")
    graph = load_onnx(make_model([node], {"x": X}, ["y"]))
    assert graph.nodes[0].output.name == "y"
    assert graph.nodes[0].name != "y"
    assert graph.nodes[0].sources == (graph.nodes[0].name,)


def test_an_output_may_be_an_input_or_a_constant() -> None:
    nodes = [
        helper.make_node("Identity", ["x"], ["same"]),
        helper.make_node("Constant", [], ["c"], value_floats=[1.0, 2.0]),
    ]
    model = make_model(nodes, {"x": X}, ["same", "c"])
    same(load_onnx(model), model, {"x": X})


def test_unused_nodes_are_not_imported_even_if_unknown() -> None:
    nodes = [helper.make_node("Relu", ["x"], ["y"]), helper.make_node("Nonsense", ["x"], ["z"])]
    graph = load_onnx(make_model(nodes, {"x": X}, ["y"]))
    assert [n.op.name for n in graph.nodes] == ["relu"]


def test_nodes_out_of_order_are_sorted() -> None:
    nodes = [helper.make_node("Relu", ["c"], ["y"]), helper.make_node("Neg", ["x"], ["c"])]
    graph = load_onnx(make_model(nodes, {"x": X}, ["y"]))
    assert [n.op.name for n in graph.nodes] == ["neg", "relu"]


def test_initializers_listed_as_inputs_are_constants() -> None:
    model = make_model(
        [helper.make_node("Conv", ["x", "w"], ["y"])], {"x": X, "w": W}, ["y"], {"w": W}
    )
    graph = load_onnx(model)
    assert [v.name for v in graph.inputs] == ["x"]
    same(graph, model, {"x": X})


def test_every_dtype_of_initializer() -> None:
    for dtype in DType:
        if dtype is DType.BFLOAT16:
            tensor = helper.make_tensor("c", TensorProto.BFLOAT16, [2], [1.0, 2.5])
        elif dtype in (DType.INT4, DType.UINT4):
            kind = TensorProto.INT4 if dtype is DType.INT4 else TensorProto.UINT4
            tensor = helper.make_tensor("c", kind, [3], [1, 2, 5])
        else:
            tensor = numpy_helper.from_array(np.asarray([1, 0, 1], dtype.numpy), "c")
        model = make_model([helper.make_node("Relu", ["x"], ["y"])], {"x": X}, ["y", "c"])
        model.graph.initializer.append(tensor)
        value = load_onnx(model).outputs[1][1]
        assert value.dtype is dtype
        assert value.array().dtype == dtype.numpy
        np.testing.assert_array_equal(
            value.array(), numpy_helper.to_array(tensor).astype(dtype.numpy)
        )


def test_typed_fields_of_tensors_are_read() -> None:
    tensor = helper.make_tensor("c", TensorProto.FLOAT, [2, 2], [1.0, 2.0, 3.0, 4.0])
    assert not tensor.HasField("raw_data")
    model = make_model([helper.make_node("Add", ["x", "c"], ["y"])], {"x": uniform(2, 2)}, ["y"])
    model.graph.initializer.append(tensor)
    same(load_onnx(model), model, {"x": uniform(2, 2)})


def test_local_functions_are_inlined() -> None:
    body = [helper.make_node("Relu", ["a"], ["r"]), helper.make_node("Neg", ["r"], ["b"])]
    function = helper.make_function(
        "local", "NegRelu", ["a"], ["b"], body, [helper.make_opsetid("", 17)]
    )
    node = helper.make_node("NegRelu", ["x"], ["y"], domain="local")
    model = make_model([node], {"x": X}, ["y"], domains={"local": 1})
    model.functions.append(function)
    graph = load_onnx(model)
    assert [n.op.name for n in graph.nodes] == ["relu", "neg"]
    same(graph, model, {"x": X})


@pytest.mark.parametrize("taken", [True, False])
def test_an_if_with_a_known_condition_is_inlined(taken: bool) -> None:
    branches = {}
    for key, op in (("then_branch", "Relu"), ("else_branch", "Neg")):
        out = helper.make_empty_tensor_value_info(f"{key}_out")
        inner = helper.make_node(op, ["h"], [f"{key}_out"])
        branches[key] = helper.make_graph([inner], key, [], [out])
    nodes = [
        helper.make_node("Abs", ["x"], ["h"]),
        helper.make_node("Constant", [], ["c"], value=numpy_helper.from_array(np.array(taken))),
        helper.make_node("If", ["c"], ["y"], **branches),
    ]
    model = make_model(nodes, {"x": X}, ["y"])
    graph = load_onnx(model)
    assert [n.op.name for n in graph.nodes] == ["abs", "relu" if taken else "neg"]
    same(graph, model, {"x": X})


def test_microsoft_operators_of_optimised_exports() -> None:
    x, w = uniform(2, 3, 8), uniform(8)
    nodes = [
        helper.make_node("BiasGelu", ["x", "b"], ["a"], domain="com.microsoft"),
        helper.make_node("FastGelu", ["a"], ["f"], domain="com.microsoft"),
        helper.make_node("QuickGelu", ["f"], ["q"], domain="com.microsoft"),
        helper.make_node("SkipLayerNormalization", ["q", "x", "g", "b"], ["s"],
                         domain="com.microsoft", epsilon=1e-5),
        helper.make_node("FusedMatMul", ["s", "x"], ["y"], domain="com.microsoft",
                         transB=1, alpha=0.5),
    ]  # fmt: skip
    model = make_model(
        nodes, {"x": x}, ["y"], {"b": w, "g": w[::-1].copy()}, domains={"com.microsoft": 1}
    )
    same(load_onnx(model), model, {"x": x}, atol=1e-4)


# ------------------------------------------------------------------------------- shapes folding


def test_shape_arithmetic_folds_away() -> None:
    nodes = [
        helper.make_node("Shape", ["x"], ["s"]),
        helper.make_node("Gather", ["s", "zero"], ["n"], axis=0),
        helper.make_node("Unsqueeze", ["n", "zeros"], ["n1"]),
        helper.make_node("Concat", ["n1", "minus"], ["shape"], axis=0),
        helper.make_node("Reshape", ["x", "shape"], ["r"]),
        helper.make_node("Shape", ["r"], ["rs"]),
        helper.make_node("ConstantOfShape", ["rs"], ["ones"],
                         value=numpy_helper.from_array(np.float32([1]))),
        helper.make_node("Add", ["r", "ones"], ["y"]),
    ]  # fmt: skip
    constants = {"zero": np.asarray(0), "zeros": ints(0), "minus": ints(-1)}
    model = make_model(nodes, {"x": X}, ["y"], constants)
    graph = load_onnx(model)
    assert [n.op.name for n in graph.nodes] == ["reshape", "add"]
    same(graph, model, {"x": X})


def test_constants_of_unmodelled_operators_fold_by_the_reference() -> None:
    nodes = [
        helper.make_node("Range", ["a", "b", "d"], ["r"]),
        helper.make_node("NonZero", ["r"], ["nz"]),
        helper.make_node("Cast", ["nz"], ["f"], to=TensorProto.FLOAT),
        helper.make_node("Trilu", ["m"], ["t"]),
        helper.make_node("Add", ["x", "f"], ["s"]),
        helper.make_node("MatMul", ["s", "t"], ["y"]),
    ]
    constants = {"a": np.asarray(0), "b": np.asarray(5), "d": np.asarray(1), "m": uniform(4, 4)}
    model = make_model(nodes, {"x": uniform(3, 4)}, ["y"], constants)
    graph = load_onnx(model)
    assert [n.op.name for n in graph.nodes] == ["add", "matmul"]
    same(graph, model, {"x": uniform(3, 4)})


def test_folding_is_bounded_in_memory() -> None:
    nodes = [
        helper.make_node("ConstantOfShape", ["s"], ["c"]),
        helper.make_node("Add", ["x", "c"], ["y"]),
    ]
    model = make_model(nodes, {"x": X}, ["y"], {"s": ints(1 << 15, 1 << 13)})
    with pytest.raises(ShapeError, match="1024 MB; constants are folded up to 256 MB"):
        load_onnx(model)


def test_an_opaque_node_keeps_its_operands_and_omitted_results(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delitem(CONVERTERS, ("", "GRU"))
    x, w, r = uniform(5, 1, 4), uniform(1, 9, 4), uniform(1, 9, 3)
    node = helper.make_node("GRU", ["x", "w", "r"], ["", "h"], hidden_size=3, name="gru")
    model = make_model([node], {"x": x}, ["h"], {"w": w, "r": r})
    graph = load_onnx(model)
    (gru,) = graph.nodes
    assert (gru.name, gru.op.name, gru.attr("opset")) == ("gru", "opaque", 17)
    assert [v.shape for v in gru.outputs] == [(1, 1, 3)]
    proto = onnx.NodeProto.FromString(gru.attr("node"))
    assert (list(proto.input), list(proto.output)) == (["x0", "x1", "x2"], ["", "y1"])
    same(graph, model, {"x": x})


# ------------------------------------------------------------------------------------- inputs


def sized(
    shape: Sequence[int | str | None], out: Sequence[int | str] = ("N", 8)
) -> onnx.ModelProto:
    """Input [batch, length] and mask of the same shape, output [batch, 8]."""
    nodes = [
        helper.make_node("Mul", ["x", "mask"], ["m"]),
        helper.make_node("ReduceSum", ["m", "axes"], ["s"], keepdims=1),
        helper.make_node("MatMul", ["s", "w"], ["y"]),
    ]
    return make_model(
        nodes,
        {"x": (TensorProto.FLOAT, shape), "mask": (TensorProto.FLOAT, shape)},
        ["y"],
        {"w": uniform(1, 8), "axes": ints(1)},
        output_shapes={"y": out},
    )


def test_a_symbolic_batch_is_one() -> None:
    graph = load_onnx(sized(["N", 5]))
    assert [v.shape for v in graph.inputs] == [(1, 5), (1, 5)]
    assert [v.batch_axis for v in graph.inputs] == [0, 0]
    assert graph.outputs[0][1].batch_axis == 0


def test_a_given_shape_binds_the_symbols_of_other_inputs() -> None:
    graph = load_onnx(sized(["N", "L"]), input_shapes={"mask": (4, 7)})
    assert [v.shape for v in graph.inputs] == [(4, 7), (4, 7)]
    assert [v.batch_axis for v in graph.inputs] == [0, 0]


def test_a_fixed_first_extent_that_all_share_is_the_batch() -> None:
    graph = load_onnx(sized([1, 5], (1, 8)))
    assert [v.batch_axis for v in graph.inputs] == [0, 0]
    state = make_model(
        [helper.make_node("Add", ["x", "h"], ["y"])],
        {"x": (TensorProto.FLOAT, ["T", 4]), "h": (TensorProto.FLOAT, [1, 4])},
        ["y"],
        output_shapes={"y": ["T", 4]},
    )
    graph = load_onnx(state)
    assert [v.batch_axis for v in graph.inputs] == [0, None]


def test_open_extents_are_named_with_the_option_that_closes_them() -> None:
    with pytest.raises(ShapeError) as caught:
        load_onnx(sized(["N", "length"]))
    assert "axis 1 of 'x' ('length'), axis 1 of 'mask' ('length')" in str(caught.value)
    assert "--input-shape x:1xLENGTH" in str(caught.value)


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ({"z": (1, 5)}, "input_shapes names 'z': the model's inputs are 'x', 'mask'"),
        ({"x": (1, 5, 1)}, r"declared \[N, L\], given \[1, 5, 1\].*one extent per axis"),
        ({"x": (0, 5)}, r"cannot have the shape \[0, 5\]"),
        ({"x": (1, 5), "mask": (1, 6)}, "'L' is 5 in another input"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(shapes: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        load_onnx(sized(["N", "L"]), input_shapes=shapes)


def test_fixed_extents_cannot_be_changed() -> None:
    with pytest.raises(UsageError, match="fixed extents cannot be changed"):
        load_onnx(sized([1, 5], (1, 8)), input_shapes={"x": (2, 5)})


def test_frozen_inputs_become_constants() -> None:
    x = uniform(2, 6)
    model = make_model(
        [
            helper.make_node("Reshape", ["x", "shape"], ["r"]),
            helper.make_node("Add", ["r", "b"], ["y"]),
        ],
        {
            "x": x,
            "shape": (TensorProto.INT64, [2]),
            "b": (TensorProto.FLOAT, []),
        },
        ["y"],
    )  # fmt: skip
    graph = load_onnx(model, freeze={"shape": [3, 4], "b": 0.5})
    assert [v.name for v in graph.inputs] == ["x"]
    np.testing.assert_allclose(run(graph, {"x": x})["y"], x.reshape(3, 4) + 0.5)


def test_a_default_input_can_be_frozen_to_another_value() -> None:
    model = make_model(
        [helper.make_node("Mul", ["x", "k"], ["y"])], {"x": X, "k": np.float32([2])}, ["y"],
        {"k": np.float32([2])},
    )  # fmt: skip
    graph = load_onnx(model, freeze={"k": [3.0]})
    np.testing.assert_allclose(run(graph, {"x": X})["y"], X * 3)


@pytest.mark.parametrize(
    ("freeze", "message"),
    [
        ({"q": 1}, "freeze names 'q': the model's inputs are 'x', 'n'"),
        ({"n": 1.5}, "input 'n' is int64; 1.5 does not fit"),
        ({"n": [1, 2, 3]}, r"declared \[2\], given \[3\]"),
        ({"n": [[1, 2, 3]]}, r"declared \[2\]; a value of shape \[1, 3\]"),
        ({"n": "two"}, "not a number or array"),
    ],
)
def test_values_that_cannot_be_frozen_are_refused(freeze: dict[str, Any], message: str) -> None:
    model = make_model(
        [helper.make_node("Tile", ["x", "n"], ["y"])],
        {"x": uniform(2, 2), "n": (TensorProto.INT64, [2])},
        ["y"],
    )
    with pytest.raises(UsageError, match=message):
        load_onnx(model, freeze=freeze)


# ------------------------------------------------------------------------------ quantized models


def test_quantized_tensors_carry_their_parameters_in_the_type() -> None:
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["d"]),
        helper.make_node("DequantizeLinear", ["w", "ws", "wz"], ["wd"], axis=0),
        helper.make_node("Conv", ["d", "wd"], ["y"]),
    ]
    rng = np.random.default_rng(0)
    constants = {
        "s": np.float32(0.02),
        "z": np.uint8(100),
        "w": rng.integers(-127, 128, W.shape, np.int8),
        "ws": np.float32([0.01, 0.02, 0.03, 0.04]),
        "wz": np.zeros(4, np.int8),
    }
    model = make_model(nodes, {"x": X}, ["y"], constants)
    graph = load_onnx(model)
    assert graph.stage is Stage.QDQ
    assert [n.op.name for n in graph.nodes] == ["quantize", "dequantize", "dequantize", "conv"]
    q = graph.nodes[0].output.qparams
    assert q is not None
    assert (q.s, q.z, q.qmin, q.qmax) == (np.float32(0.02), 100, 0, 255)
    weight = graph.nodes[2].input(0)
    assert weight.qparams is not None
    assert weight.qparams.granularity == PerAxis(0)
    same(graph, model, {"x": X}, atol=1e-4)


def test_blocked_and_four_bit_weights() -> None:
    w = np.arange(-8, 8).reshape(4, 4)
    proto = helper.make_tensor("w", TensorProto.INT4, [4, 4], w.reshape(-1).tolist())
    nodes = [
        helper.make_node("DequantizeLinear", ["w", "s"], ["wd"], axis=0, block_size=2),
        helper.make_node("MatMul", ["x", "wd"], ["y"]),
    ]
    model = make_model(nodes, {"x": uniform(3, 4)}, ["y"], {"s": np.abs(uniform(2, 4))}, opset=21)
    model.graph.initializer.append(proto)
    graph = load_onnx(model)
    weight = graph.nodes[0].input(0)
    assert weight.dtype is DType.INT4
    assert weight.qparams is not None
    assert weight.qparams.granularity == PerGroup(0, 2)
    same(graph, model, {"x": uniform(3, 4)})


def test_integers_dequantized_on_another_grid_are_converted_by_number() -> None:
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "s2", "z"], ["y"]),
    ]
    constants = {"s": np.float32(0.02), "z": np.uint8(100), "s2": np.float32(0.05)}
    model = make_model(nodes, {"x": X}, ["y"], constants)
    same(load_onnx(model), model, {"x": X}, atol=1e-5)


def test_a_quantized_input_takes_the_parameters() -> None:
    node = helper.make_node("DequantizeLinear", ["x", "s", "z"], ["y"])
    x = np.arange(12, dtype=np.uint8).reshape(3, 4)
    model = make_model([node], {"x": x}, ["y"], {"s": np.float32(0.5), "z": np.uint8(3)})
    graph = load_onnx(model)
    assert graph.inputs[0].qparams is not None
    assert [n.op.name for n in graph.nodes] == ["dequantize"]
    same(graph, model, {"x": x})


@pytest.mark.parametrize("per_channel", [True, False])
def test_qlinear_operators_become_steps(per_channel: bool) -> None:
    rng = np.random.default_rng(5)
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "xs", "xz"], ["q"]),
        helper.make_node(
            "QLinearConv", ["q", "xs", "xz", "w", "ws", "wz", "cs", "cz", "b"], ["c"],
            pads=[1, 1, 1, 1],
        ),
        helper.make_node("Reshape", ["c", "shape"], ["r"]),
        helper.make_node("QLinearMatMul", ["r", "cs", "cz", "m", "ms", "mz", "ys", "yz"], ["p"]),
        helper.make_node("DequantizeLinear", ["p", "ys", "yz"], ["y"]),
    ]  # fmt: skip
    n = 4 if per_channel else 1
    constants = {
        "xs": np.float32(0.02), "xz": np.uint8(100), "w": rng.integers(-99, 99, W.shape, np.int8),
        "ws": np.float32([0.01] * n) * np.arange(1, n + 1, dtype=np.float32),
        "wz": np.zeros(n, np.int8), "b": rng.integers(-999, 999, 4, np.int32),
        "cs": np.float32(0.3), "cz": np.uint8(120), "shape": ints(2, -1),
        "m": rng.integers(-99, 99, (140, 3), np.int8), "ms": np.float32(0.01), "mz": np.int8(0),
        "ys": np.float32(0.9), "yz": np.uint8(128),
    }  # fmt: skip
    if not per_channel:
        constants["ws"], constants["wz"] = np.float32(0.01), np.int8(0)
    model = make_model(nodes, {"x": X}, ["y"], constants)
    graph = load_onnx(model)
    graph.verify()
    assert [n.op.name for n in graph.nodes].count("dequantize") == 6
    # A float sum may round a tie the other way than ONNX Runtime's integer sum: 1 LSB, rarely.
    want, got = expect(model, {"x": X})["y"], run(graph, {"x": X})["y"]
    assert np.abs(want - got).max() <= 0.91
    assert (want != got).mean() <= 0.2


def test_scales_that_make_no_sense_are_refused() -> None:
    node = helper.make_node("QuantizeLinear", ["x", "s"], ["y"])
    model = make_model([node], {"x": X}, ["y"], {"s": np.float32(-1)})
    with pytest.raises(ModelError, match="scales must be finite and greater than zero"):
        load_onnx(model)
    model = make_model([node], {"x": X}, ["y"], {"s": np.float32([1, 2, 3])})
    with pytest.raises(ShapeError, match=r"3 scales do not fit axis 1 of \[2, 6, 7, 5\]"):
        load_onnx(model)


# ---------------------------------------------------------------------------------- real models


@each_model
def test_real_models_compute_what_onnx_runtime_computes(path: Path) -> None:
    graph = model_graph(path)
    graph.verify()
    feeds = noise(graph, np.random.default_rng(0))
    want = Session(path, optimization="disabled").run(feeds)
    got = run(graph, feeds)
    for name, array in want.items():
        if "mobilenetv2_qdq" in path.name:
            # Deep and narrow: one rounding that falls the other way moves all later ones. That
            # sums and products of floats may differ in the last bit is in both runtimes' rights.
            assert np.corrcoef(got[name].reshape(-1), array.reshape(-1))[0, 1] > 0.99
        else:
            np.testing.assert_allclose(got[name], array, rtol=1e-4, atol=1e-4, err_msg=name)
