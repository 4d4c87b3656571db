# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""The graph, its verifier and its printer."""

from __future__ import annotations

import numpy as np
import pytest

from qcompiler.errors import QCompilerError, ShapeError, UsageError, VerificationError
from qcompiler.ir import Graph
from qcompiler.ops import Stage
from qcompiler.printer import array_digest, digest, print_graph
from qcompiler.types import DType, PerAxis, PerGroup, PerTensor, Precision, QuantParams, TensorType

X = TensorType((2, 3), DType.FLOAT32)
Q = QuantParams(np.float32(0.1), 10, DType.UINT8, 0, 255)


def diamond() -> Graph:
    """x -> a -> (b, c) -> d."""
    g = Graph("diamond")
    x = g.add_input("x", X, batch_axis=0)
    a = g.add("relu", [x], name="a").output
    b = g.add("exp", [a], name="b").output
    c = g.add("clip", [a], {"min": 0.0}, name="c").output
    d = g.add("add", [b, c], name="d").output
    g.set_outputs([("y", d)])
    return g


# ------------------------------------------------------------------------------------- types


def test_quant_params_are_compared_and_hashed_by_content():
    same = QuantParams(np.float32(0.1), 10, DType.UINT8, 0, 255)
    assert same == Q
    assert hash(Q) == hash(same)
    assert same.clamped(0, 127) != Q
    assert Q.same_grid(same.clamped(0, 127))
    assert QuantParams(np.float32(0.1), 11, DType.UINT8, 0, 255) != Q


def test_quant_params_copy_and_freeze_their_arrays():
    scale = np.array([0.1, 0.2], np.float32)
    q = QuantParams(scale, np.zeros(2, int), DType.INT8, -127, 127, PerAxis(0))
    scale[0] = 9
    assert q.scale[0] == np.float32(0.1)
    with pytest.raises(ValueError, match="read-only"):
        q.scale[0] = 1


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ((0.0, 0, DType.UINT8, 0, 255, PerTensor()), "greater than zero"),
        ((np.inf, 0, DType.UINT8, 0, 255, PerTensor()), "finite"),
        ((1.0, 0, DType.FLOAT32, 0, 255, PerTensor()), "must be an integer dtype"),
        ((1.0, 0, DType.UINT8, 0, 256, PerTensor()), r"\[0, 256\] does not fit uint8"),
        ((1.0, 0, DType.UINT8, 9, 8, PerTensor()), r"\[9, 8\]"),
        ((1.0, 0, DType.INT8, 0, 1, PerAxis(0)), "does not fit per_axis"),
        ((np.ones(2), 0, DType.INT8, 0, 1, PerTensor()), "does not fit per_tensor"),
    ],
)
def test_quant_params_refuse_nonsense(fields, message):
    scale, *rest = fields
    with pytest.raises(UsageError, match=message):
        QuantParams(np.asarray(scale, np.float32), *rest)


def test_tensor_type_prints_and_refuses_another_storage():
    assert str(TensorType((2, 3), DType.UINT8, Q)) == (
        "uint8[2,3]<scale=0.100000001 zero_point=10 range=[0,255]>"
    )
    with pytest.raises(UsageError, match="differs from the storage uint8"):
        TensorType((2,), DType.INT8, Q)


def test_dtypes_know_their_ranges():
    assert (DType.INT4.min, DType.INT4.max, DType.INT4.bits) == (-8, 7, 4)
    assert (DType.UINT16.min, DType.UINT16.max) == (0, 65535)
    assert DType.INT4.numpy == np.int8
    assert DType.of(np.float16) is DType.FLOAT16
    assert not DType.BOOL.is_integer
    assert DType.BFLOAT16.is_float
    with pytest.raises(UsageError, match="complex64"):
        DType.of(np.complex64)


def test_precisions_know_their_bits():
    p = Precision.parse("W8A7")
    assert (p.weight_bits, p.activation_bits, p.is_integer) == (8, 7, True)
    assert not Precision.FP16.is_integer
    with pytest.raises(UsageError, match="unknown precision 'w3a3': expected one of fp32, fp16"):
        Precision.parse("w3a3")


def test_granularities_print():
    assert [str(g) for g in (PerTensor(), PerAxis(1), PerGroup(0, 32))] == [
        "per_tensor",
        "per_axis(1)",
        "per_group(0,32)",
    ]


# ------------------------------------------------------------------------------------- graph


def test_names_are_made_unique():
    g = Graph()
    x = g.add_input("x", X)
    names = [g.add("relu", [x], name="r").name for _ in range(3)]
    assert names == ["r", "r_1", "r_2"]
    assert g.node("r_1").output.name == "r_1.out"
    assert g.fresh("x") == "x_1"


def test_uses_follow_every_change():
    g = diamond()
    a, b, d = g.node("a"), g.node("b"), g.node("d")
    assert [n.name for n in a.output.users] == ["b", "c"]
    assert b.output.uses == ((d, 0),)
    g.set_input(d, 0, a.output)
    assert b.output.uses == ()
    assert [(n.name, i) for n, i in a.output.uses] == [("b", 0), ("c", 0), ("d", 0)]
    g.verify()


def test_replace_uses_reaches_outputs():
    g = diamond()
    d, a = g.node("d").output, g.node("a").output
    g.replace_uses(d, a)
    assert g.output_values == (a,)
    assert g.eliminate_dead() == 3
    assert [n.name for n in g.nodes] == ["a"]
    g.verify()


def test_erase_refuses_a_node_that_is_read():
    g = diamond()
    with pytest.raises(QCompilerError, match=r"cannot erase 'a': 'a\.out' is still read"):
        g.erase(g.node("a"))
    with pytest.raises(QCompilerError, match="cannot erase 'd'"):
        g.erase(g.node("d"))
    assert len(g) == 4


def test_replace_node_swaps_and_erases():
    g = diamond()
    b = g.node("b")
    t = g.add("tanh", [g.node("a").output], name="t", before=b)
    g.replace_node(b, t.output)
    assert [n.name for n in g.nodes] == ["a", "t", "c", "d"]
    assert g.node("d").input(0) is t.output
    g.verify()


def test_add_fills_in_attributes_and_checks_them():
    g = Graph()
    x = g.add_input("x", X)
    assert g.add("leaky_relu", [x]).attr("alpha") == 0.01
    with pytest.raises(QCompilerError, match="relu has no attribute alpha"):
        g.add("relu", [x], {"alpha": 1.0})
    with pytest.raises(QCompilerError, match="concat needs the attribute 'axis'"):
        g.add("concat", [x])
    with pytest.raises(QCompilerError, match="got 2 operands"):
        g.add("relu", [x, x])
    with pytest.raises(QCompilerError, match="unknown operator 'nope'"):
        g.add("nope", [x])
    with pytest.raises(ShapeError, match="inner extents"):
        g.add("matmul", [x, x])
    assert len(g) == 1


def test_trailing_omitted_operands_are_dropped():
    g = Graph()
    x = g.add_input("x", X)
    n = g.add("layer_norm", [x, None, None])
    assert n.inputs == (x,)
    assert n.optional(2) is None
    g.set_input(n, 2, g.constant(np.zeros(3, np.float32)))
    assert n.inputs[1] is None
    with pytest.raises(QCompilerError, match="lacks operand 1"):
        n.input(1)
    g.verify()
    with pytest.raises(QCompilerError, match="has no operand 3"):
        g.set_input(n, 3, x)


def test_constants_are_frozen_copies():
    g = Graph()
    data = np.zeros(3, np.float32)
    c = g.constant(data)
    data[0] = 1
    assert c.array()[0] == 0
    with pytest.raises(ValueError, match="read-only"):
        c.array()[0] = 1
    with pytest.raises(QCompilerError, match="is not a constant"):
        g.add_input("x", X).array()
    with pytest.raises(QCompilerError, match="does not hold uint8"):
        g.constant(data, qparams=Q)
    with pytest.raises(QCompilerError, match="follows from its data"):
        g.set_type(c, X)


def test_outputs_have_distinct_names():
    g = diamond()
    v = g.output_values[0]
    with pytest.raises(QCompilerError, match="not distinct"):
        g.set_outputs([("y", v), ("y", v)])


def test_sort_restores_a_topological_order():
    g = diamond()
    late = g.add("neg", [g.inputs[0]], name="late")
    g.set_input(g.node("b"), 0, late.output)
    with pytest.raises(VerificationError, match=r"operand 'late\.out' is not defined before"):
        g.verify()
    g.sort()
    assert [n.name for n in g.nodes] == ["a", "late", "b", "c", "d"]
    g.verify()


def test_sort_finds_cycles():
    g = diamond()
    g.set_input(g.node("a"), 0, g.node("d").output)
    with pytest.raises(VerificationError, match="cycle through node"):
        g.sort()


def test_clone_shares_constants_and_nothing_else():
    g = diamond()
    weight = g.constant(np.ones(3, np.float32), "w")
    g.set_input(g.node("d"), 1, weight)
    h, values = g.clone_with_map()
    assert digest(h) == digest(g)
    assert values[weight].data is weight.data
    assert h.inputs[0].batch_axis == 0
    h.set_input(h.node("d"), 1, h.node("c").output)
    assert g.node("d").input(1) is weight
    assert h.fresh("d") == g.fresh("d") == "d_1"
    h.verify()
    g.verify()


# ---------------------------------------------------------------------------------- verifier


def qdq() -> Graph:
    g = Graph("qdq", Stage.QDQ)
    x = g.add_input("x", X)
    q = g.add("quantize", [x], types=[TensorType(X.shape, DType.UINT8, Q)], name="q").output
    t = g.add("transpose", [q], {"perm": (1, 0)}, name="t").output
    y = g.add("dequantize", [t], name="dq").output
    g.set_outputs([("y", y)])
    return g


def test_each_stage_has_its_rules():
    g = qdq()
    g.verify()
    g.verify(Stage.INTEGER)
    with pytest.raises(VerificationError, match="not legal at this stage") as caught:
        g.verify(Stage.FLOAT)
    assert "'q.out' is quantized" in str(caught.value)


def test_integer_operators_are_illegal_before_the_integer_stage():
    g = qdq()
    q = g.node("q").output
    g.set_outputs([("y", g.add("qadd", [q, q], types=[q.type], name="sum").output)])
    with pytest.raises(VerificationError, match=r"sum \(qadd\): not legal at this stage"):
        g.verify()
    g.verify(Stage.INTEGER)


def test_float_operators_must_not_read_quantized_values():
    g = qdq()
    g.set_input(g.node("dq"), 0, g.inputs[0])
    with pytest.raises(VerificationError, match="expected a quantized tensor"):
        g.verify()
    g = diamond()
    g.set_type(g.inputs[0], TensorType(X.shape, DType.UINT8, Q))
    with pytest.raises(VerificationError, match="operand 'x' is quantized"):
        g.verify(Stage.INTEGER)


def test_verify_reinfers_types():
    g = diamond()
    g.set_type(g.node("b").output, TensorType((3, 2), DType.FLOAT32))
    with pytest.raises(VerificationError, match=r"result 'b\.out' is float32\[3,2\], inferred"):
        g.verify()
    g = qdq()
    g.set_type(g.node("q").output, TensorType((3, 2), DType.UINT8, Q))
    with pytest.raises(VerificationError, match=r"result 'q\.out' is uint8\[3,2\]"):
        g.verify()


def test_verify_finds_undefined_outputs_and_repeated_names():
    g, other = diamond(), diamond()
    g.set_outputs([("y", other.output_values[0])])
    g.node("b").output.name = "a.out"
    with pytest.raises(VerificationError, match="which nothing defines") as caught:
        g.verify()
    assert "two values are named 'a.out'" in str(caught.value)


# ----------------------------------------------------------------------------------- printer


def everything() -> Graph:
    g = Graph("everything", Stage.INTEGER)
    x = g.add_input("image", TensorType((1, 3, 4, 4), DType.FLOAT32))
    q = g.add("quantize", [x], types=[TensorType(x.shape, DType.UINT8, Q)]).output
    wq = QuantParams(
        np.array([0.5, 0.25], np.float32), np.zeros(2, int), DType.INT8, -127, 127, PerAxis(0)
    )
    w = g.constant(np.arange(54, dtype=np.int8).reshape(2, 3, 3, 3), "weight", wq)
    attrs = {"strides": (1, 1), "pads": (1, 1, 1, 1), "dilations": (1, 1)}
    relu = QuantParams(np.float32(0.2), 10, DType.UINT8, 10, 255)
    t = TensorType((1, 2, 4, 4), DType.UINT8, relu)
    bias = g.constant(np.array([7, -7], np.int32), "bias")
    conv = g.add("qconv", [q, w, bias], attrs, types=[t], name="conv").output
    residual = g.add("qconv", [q, w, None, conv], attrs, types=[t], name="residual").output
    halves = g.add("split", [residual], {"axis": 1, "sizes": (1, 1)}, name="halves")
    y = g.add("dequantize", [halves.outputs[1]], name="real").output
    g.set_outputs([("scores", y), ("codes", halves.outputs[0])])
    g.verify()
    return g


def test_printed_graph(golden):
    assert golden == str(everything())


def test_digest_depends_on_everything_that_has_a_meaning():
    base = digest(everything())
    assert digest(everything()) == base
    g = everything()
    g.set_attrs(g.node("halves"), axis=0)
    assert digest(g) != base
    g = everything()
    weight = g.node("conv").input(1)
    other = g.constant(weight.array() + np.int8(1), "weight2", weight.qparams)
    other.name = weight.name
    g.replace_uses(weight, other)
    assert digest(g) != base


def test_array_digest_tells_dtype_shape_and_bytes_apart():
    a = np.zeros((2, 3), np.int8)
    others = [a.view(np.uint8), a.reshape(3, 2), a + np.int8(1)]
    assert len({array_digest(v) for v in [a, *others]}) == 4
    assert array_digest(a) == array_digest(a.copy())


def test_print_graph_is_str():
    g = diamond()
    assert print_graph(g) == str(g)
