# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""One artifact for a range of sizes: the numbers of each exact size, or a clear refusal."""

from __future__ import annotations

import dataclasses
import json
import sys
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

import qcompiler
from qcompiler import driver
from qcompiler.artifact import read_artifact
from qcompiler.cli import main
from qcompiler.cli.options import parse_shapes
from qcompiler.dynamic_compile import Ranges, _float_graph, _with_constants_of, ranges_of
from qcompiler.errors import (
    ArtifactError,
    DataError,
    ShapeError,
    UnsupportedByTargetError,
    UnsupportedOpError,
    UsageError,
)
from qcompiler.onnx_import import load_onnx
from qcompiler.passes.calibrate import Calibrate, CalibrationTable
from qcompiler.passes.insert_qdq import quantize_passes
from qcompiler.passmanager import PassContext, PassManager
from qcompiler.plan import PrecisionPlan
from qcompiler.printer import digest
from qcompiler.registry import get_target

Arrays = dict[str, Any]
WIDTH, HEADS, GREATEST = 16, 2, 40


class Net:
    """A model under construction."""

    def __init__(self) -> None:
        self.nodes: list[Any] = []
        self.constants: Arrays = {}
        self.rng = np.random.default_rng(0)

    def c(self, value: Any) -> str:
        name = f"c{len(self.constants)}"
        self.constants[name] = np.asarray(value)
        return name

    def weights(self, *shape: int) -> str:
        scale = np.sqrt(np.prod(shape[:-1]))
        return self.c((self.rng.standard_normal(shape) / scale).astype(np.float32))

    def __call__(self, op: str, *inputs: str, **attributes: Any) -> str:
        out = f"v{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, inputs, [out], f"n{len(self.nodes)}", **attributes))
        return out

    def model(self, inputs: Mapping[str, Any], outputs: Mapping[str, Any]) -> onnx.ModelProto:
        """Inputs: name -> (element type, shape); outputs: name -> (value, shape)."""
        for name, (value, _) in outputs.items():
            self.nodes.append(helper.make_node("Identity", [value], [name]))
        graph = helper.make_graph(
            self.nodes,
            "net",
            [helper.make_tensor_value_info(n, t, s) for n, (t, s) in inputs.items()],
            [helper.make_tensor_value_info(n, 1, s) for n, (_, s) in outputs.items()],
            [numpy_helper.from_array(v, k) for k, v in self.constants.items()],
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
        onnx.checker.check_model(model)
        return model


def encoder(mask: bool) -> onnx.ModelProto:
    """Attention over a symbolic length, with the positions cut from a table."""
    n = Net()
    size = n("Gather", n("Shape", "ids"), n.c(np.array([1])), axis=0)
    zero = n.c(np.array([0]))
    x = n("Add", n("Gather", n.weights(30, WIDTH), "ids"),
          n("Slice", n.weights(64, WIDTH), zero, size, zero))  # fmt: skip
    split, merge = n.c(np.array([0, -1, HEADS, WIDTH // HEADS])), n.c(np.array([0, -1, WIDTH]))
    q, k, v = (
        n("Transpose", n("Reshape", n("MatMul", x, n.weights(WIDTH, WIDTH)), split),
          perm=[0, 2, 1, 3])
        for _ in range(3)
    )  # fmt: skip
    scores = n("MatMul", q, n("Transpose", k, perm=[0, 1, 3, 2]))
    if mask:
        hidden = n("Sub", n.c(np.float32(1)), n("Cast", "mask", to=TensorProto.FLOAT))
        hidden = n("Mul", hidden, n.c(np.float32(-10000)))
        scores = n("Add", scores, n("Unsqueeze", hidden, n.c(np.array([1, 2]))))
    seen = n("MatMul", n("Softmax", scores, axis=-1), v)
    seen = n("Reshape", n("Transpose", seen, perm=[0, 2, 1, 3]), merge)
    x = n("Add", n("MatMul", seen, n.weights(WIDTH, WIDTH)), x)
    scale, shift = n.c(np.ones(WIDTH, np.float32)), n.c(np.zeros(WIDTH, np.float32))
    x = n("LayerNormalization", x, scale, shift, axis=-1)
    x = n("MatMul", n("Relu", n("MatMul", x, n.weights(WIDTH, 2 * WIDTH))),
          n.weights(2 * WIDTH, WIDTH))  # fmt: skip
    first = n("Gather", x, n.c(np.array(0)), axis=1)
    inputs: Arrays = {"ids": (TensorProto.INT64, ["N", "S"])}
    if mask:
        inputs["mask"] = (TensorProto.INT64, ["N", "S"])
    outputs = {
        "tokens": (x, ["N", "S", WIDTH]),
        "logits": (n("MatMul", first, n.weights(WIDTH, 3)), ["N", 3]),
    }
    return n.model(inputs, outputs)


def listener() -> onnx.ModelProto:
    """Convolutions along a symbolic time, and statistics over it."""
    n = Net()
    x = n("Relu", n("Conv", "sound", n.weights(8, 4, 3), kernel_shape=[3], pads=[1, 1]))
    x = n("Relu", n("Conv", x, n.weights(8, 8, 5), kernel_shape=[5], pads=[4, 0]))  # causal
    mean = n("ReduceMean", x, axes=[2], keepdims=0)
    most = n("ReduceMax", x, axes=[2], keepdims=0)
    y = n("MatMul", n("Concat", mean, most, axis=1), n.weights(16, 3))
    outputs = {"y": (y, ["N", 3]), "frames": (x, ["N", 8, "T"])}
    return n.model({"sound": (TensorProto.FLOAT, ["N", 4, "T"])}, outputs)


def feed(model: onnx.ModelProto, size: int, seed: int = 0, batch: int = 1) -> Arrays:
    rng = np.random.default_rng(seed)
    made: Arrays = {}
    for v in model.graph.input:
        if v.name == "sound":
            made[v.name] = rng.standard_normal((batch, 4, size)).astype(np.float32)
        elif v.name == "mask":
            made[v.name] = np.ones((batch, size), np.int64)
        else:
            made[v.name] = rng.integers(0, 30, (batch, size))
    return made


def shapes(model: onnx.ModelProto, extent: Any) -> Arrays:
    return {v.name: (1, 4, extent) if v.name == "sound" else (1, extent) for v in model.graph.input}


def samples(model: onnx.ModelProto, size: int = 24) -> list[Arrays]:
    return [feed(model, size, seed) for seed in range(8)]


MODELS = {"encoder": encoder(False), "masked encoder": encoder(True), "listener": listener()}


@pytest.fixture(scope="module", params=MODELS)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    model = MODELS[request.param]
    path = tmp_path_factory.mktemp("dynamic") / "m.qcm"
    made = qcompiler.compile(
        model, calibration=samples(model), input_shapes=shapes(model, (1, GREATEST))
    )
    made.save(path)
    return model, qcompiler.load(path), path


def exact(
    model: onnx.ModelProto, size: int, methods: str = "", precision: str = "w8a8"
) -> qcompiler.CompiledModel:
    """The model compiled for one size, with the scales that the samples' size gives."""
    result = driver.quantize_model(
        model,
        calibration=samples(model),
        input_shapes=shapes(model, 24),
        methods=methods,
        precision=precision,
    )
    graph = _float_graph(model, shapes(model, size), None)
    plan = PrecisionPlan(dict(result.plan.nodes))
    ctx = PassContext()
    ctx.put(plan)
    if result.prepared is not None:
        prepared, grids = result.prepared
        ctx.put(grids)
        assert result.float_graph is not None
        for node, like, was in zip(
            graph.nodes, prepared.nodes, result.float_graph.nodes, strict=True
        ):
            assert node.name == like.name == was.name
            for i, v in enumerate(like.inputs):
                if v is not None and v.is_constant:
                    if i < len(was.inputs) and (old := was.inputs[i]) and old.data is v.data:
                        continue
                    graph.set_input(node, i, graph.constant(v.array(), graph.fresh(v.name)))
    assert result.table is not None
    ctx.put(dataclasses.replace(result.table, graph=digest(graph)))
    passes = [p for p in quantize_passes(plan) if not isinstance(p, Calibrate)]
    integer = PassManager(passes, given=(PrecisionPlan, CalibrationTable)).run(graph, ctx)
    backend = get_target("host")
    return driver.assemble(driver.build_graph(integer, backend), backend.spec, result)


@pytest.mark.e2e
@pytest.mark.parametrize("size", [1, 5, 24, 33, GREATEST])
def test_equals_the_exact_size(case: Any, size: int) -> None:
    model, made, _ = case
    inputs = feed(model, size, seed=99, batch=2)
    ours, theirs = made(inputs), exact(model, size)(inputs)
    for name, array in theirs.items():
        if model is MODELS["listener"] and name == "y":
            # The mean over the extent is a float sum by a count there, one integer step here.
            np.testing.assert_allclose(ours[name], array, rtol=0.02, atol=0.02)
        else:
            np.testing.assert_array_equal(ours[name], array)


@pytest.mark.e2e
@pytest.mark.parametrize("methods", ["equalize,gptq", "adaround{iterations=50},correct_bias"])
def test_methods_change_every_size_alike(methods: str) -> None:
    model = MODELS["masked encoder"]
    made = qcompiler.compile(
        model,
        calibration=samples(model),
        input_shapes=shapes(model, (1, GREATEST)),
        methods=methods,
        precision="w4a8",
    )
    plain = exact(model, GREATEST, precision="w4a8")
    inputs = feed(model, GREATEST, seed=98)
    name = next(iter(plain.outputs))
    assert not np.array_equal(made(inputs)[name], plain(inputs)[name])  # they did change weights
    for size in (3, 24, GREATEST):
        inputs = feed(model, size, seed=97)
        theirs = exact(model, size, methods, "w4a8")(inputs)
        np.testing.assert_array_equal(made(inputs)[name], theirs[name])


@pytest.mark.e2e
def test_a_batch_of_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Operators that mix rows and columns leave samples apart."""
    n = Net()
    x = n("Relu", n("Conv", "x", n.weights(8, 3, 3, 3), pads=[1, 1, 1, 1]))
    x = n("MaxPool", x, kernel_shape=[2, 2], strides=[2, 2])
    x = n("ConvTranspose", x, n.weights(8, 4, 2, 2), strides=[2, 2])
    x = n("Resize", x, "", n.c(np.array([1, 1, 2, 2], np.float32)), mode="linear")
    x = n("DepthToSpace", n("SpaceToDepth", x, blocksize=2), blocksize=2)
    y = n("Conv", x, n.weights(2, 4, 1, 1))
    model = n.model({"x": (TensorProto.FLOAT, ["N", 3, 8, 8])}, {"y": (y, ["N", 2, 16, 16])})
    data = {"x": n.rng.standard_normal((12, 3, 8, 8)).astype(np.float32)}
    whole = qcompiler.compile(
        model, calibration=data, precision="w8a8", input_shapes={"x": ((1, 6), 3, 8, 8)}
    )
    dynamic = whole.artifact.dynamic
    assert dynamic is not None
    assert [v.sizes for v in dynamic.variants] == [{"N": 2}, {"N": 3}, {"N": 6}]
    single = driver.quantize_model(model, calibration=data)
    backend = get_target("host")
    one = driver.assemble(driver.build_graph(single.graph, backend), backend.spec, single)
    for count in range(1, 7):
        x = {"x": data["x"][:count]}
        np.testing.assert_array_equal(whole(x)["y"], one(x)["y"])
    whole.save(tmp_path / "m.qcm")
    assert main(["inspect", str(tmp_path / "m.qcm")]) == 0
    assert "x: float32[1..6, 3, 8, 8]" in capsys.readouterr().out


def vision(style: str) -> onnx.ModelProto:
    """Patches, a class token expanded to the batch, one layer of attention, the token's logits.

    With heads and samples in one axis as torch.nn.MultiheadAttention has them ("torch"), as rows
    of one matrix ("rows"), or each in an axis of its own ("plain").
    """
    n = Net()
    patches = n("Conv", "x", n.weights(WIDTH, 3, 4, 4), strides=[4, 4])
    tokens = n("Transpose", n("Reshape", patches, n.c([0, WIDTH, -1])), perm=[0, 2, 1])
    batch = n("Gather", n("Shape", "x"), n.c([0]))
    to = n("Concat", batch, n.c([1]), n.c([WIDTH]), axis=0)
    x = n("Concat", n("Expand", n.weights(1, 1, WIDTH), to), tokens, axis=1)
    x = n("Add", x, n.weights(1, 5, WIDTH))
    size = WIDTH // HEADS
    y = n("LayerNormalization", x, n.weights(WIDTH), n.weights(WIDTH), axis=-1)
    heads = []
    for _ in range(3):
        w = n.weights(WIDTH, WIDTH)
        if style == "torch":  # [5, N, D] -> [5, N * heads, size] -> [N * heads, 5, size]
            z = n("MatMul", n("Transpose", y, perm=[1, 0, 2]), w)
            z = n("Transpose", n("Reshape", z, n.c([5, -1, size])), perm=[1, 0, 2])
        elif style == "rows":  # [N * 5, D]
            z = n("Gemm", n("Reshape", y, n.c([-1, WIDTH])), w, n.weights(WIDTH))
            z = n("Transpose", n("Reshape", z, n.c([-1, 5, HEADS, size])), perm=[0, 2, 1, 3])
        else:
            z = n("Reshape", n("MatMul", y, w), n.c([0, -1, HEADS, size]))
            z = n("Transpose", z, perm=[0, 2, 1, 3])
        heads.append(z)
    rank = 3 if style == "torch" else 4
    q, k, v = heads
    turned = n("Transpose", k, perm=[*range(rank - 2), rank - 1, rank - 2])
    scores = n("Softmax", n("Mul", n("MatMul", q, turned), n.c(np.float32(size**-0.5))), axis=-1)
    z = n("MatMul", scores, v)
    if style == "torch":  # [5, N * heads, size] -> [5 * N, D]
        z = n("Reshape", n("Transpose", z, perm=[1, 0, 2]), n.c([-1, WIDTH]))
        z = n("Gemm", z, n.weights(WIDTH, WIDTH), n.weights(WIDTH))
        z = n("Transpose", n("Reshape", z, n.c([5, -1, WIDTH])), perm=[1, 0, 2])
    else:
        z = n("Reshape", n("Transpose", z, perm=[0, 2, 1, 3]), n.c([-1, 5, WIDTH]))
        z = n("MatMul", z, n.weights(WIDTH, WIDTH))
    x = n("Add", x, z)
    y = n("Gemm", n("Gather", x, n.c(0), axis=1), n.weights(WIDTH, 7), n.weights(7))
    return n.model({"x": (TensorProto.FLOAT, ["N", 3, 8, 8])}, {"y": (y, ["N", 7])})


@pytest.mark.e2e
@pytest.mark.parametrize("precision", ["fp32", "w8a8"])
@pytest.mark.parametrize("style", ["plain", "rows", "torch"])
def test_a_batch_that_is_merged_with_heads_or_rows(style: str, precision: str) -> None:
    model = vision(style)
    rng = np.random.default_rng(1)
    data = {"x": rng.standard_normal((12, 3, 8, 8)).astype(np.float32)}
    given: dict[str, Any] = {"precision": precision}
    if precision != "fp32":
        given["calibration"] = data
    made = qcompiler.compile(model, input_shapes={"x": ((1, 6), 3, 8, 8)}, **given)
    assert made.artifact.dynamic is not None
    assert [v.sizes for v in made.artifact.dynamic.variants] == [{"N": 2}, {"N": 3}, {"N": 6}]
    result = driver.quantize_model(model, **given)
    backend = get_target("host")
    one = driver.assemble(driver.build_graph(result.graph, backend), backend.spec, result)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    for count in range(1, 7):
        x = {"x": data["x"][:count]}
        found = made(x)["y"]
        assert found.shape == (count, 7)
        if precision == "fp32":
            np.testing.assert_allclose(found, session.run(None, x)[0], rtol=1e-4, atol=1e-5)
        else:
            np.testing.assert_array_equal(found, one(x)["y"])


def test_what_methods_may_not_change() -> None:
    model = MODELS["encoder"]
    plain = _float_graph(model, shapes(model, 24), None)
    other = plain.clone()
    node = next(n for n in other.nodes if n.op.name == "matmul")
    moved = other.add("neg", [node.input(0)]).output
    other.set_input(node, 0, moved)
    other.sort()
    with pytest.raises(UsageError, match=r"methods odd changed more than weights at .*several"):
        _with_constants_of(plain.clone(), other, plain, ("odd",))
    changed = plain.clone()
    node = next(n for n in changed.nodes if n.op.name == "matmul" and n.input(1).is_constant)
    changed.set_input(node, 1, changed.constant(node.input(1).array() * 2, "twice"))
    size = plain.clone()
    next(n for n in size.nodes if n.name == node.name).name = "else"
    with pytest.raises(UsageError, match=r"which methods odd changed, is not the same"):
        _with_constants_of(size, changed, plain, ("odd",))


@pytest.mark.e2e
@pytest.mark.parametrize("name", MODELS)
def test_float_is_right_at_every_size(name: str) -> None:
    model = MODELS[name]
    made = qcompiler.compile(model, precision="fp32", input_shapes=shapes(model, (1, GREATEST)))
    session = ort.InferenceSession(model.SerializeToString())
    outputs = [o.name for o in model.graph.output]
    for size in range(1, GREATEST + 1):
        inputs = feed(model, size, seed=size)
        ours = made(inputs)
        for output, wanted in zip(outputs, session.run(None, inputs), strict=True):
            np.testing.assert_allclose(ours[output], wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.e2e
def test_calls(case: Any) -> None:
    model, made, _ = case
    one, two = feed(model, 7, seed=1), feed(model, 7, seed=2)
    both = {k: np.concatenate([one[k], two[k]]) for k in one}
    apart = [made(one), made(two)]
    for name, array in made(both).items():
        np.testing.assert_array_equal(array, np.concatenate([a[name] for a in apart]))
    symbol = "T" if "sound" in one else "S"
    with pytest.raises(DataError, match=rf"\({symbol}\): the model was compiled for 1 to 40"):
        made(feed(model, GREATEST + 1))
    if len(one) > 1:
        with pytest.raises(DataError, match="expected one extent"):
            made({**one, "mask": np.ones((1, 6), np.int64)})
    assert made.benchmark(runs=2, warmup=1)["runs"] == 2
    assert made.profile(runs=1)


@pytest.mark.e2e
def test_the_artifact(case: Any, tmp_path: Path) -> None:
    model, made, path = case
    dynamic = read_artifact(path).dynamic
    assert dynamic is not None
    assert [list(v.sizes.values()) for v in dynamic.variants] == [[8], [16], [24], [40]]
    again = qcompiler.compile(
        model, calibration=samples(model), input_shapes=shapes(model, (1, GREATEST))
    )
    again.save(tmp_path / "again.qcm")
    assert (tmp_path / "again.qcm").read_bytes() == path.read_bytes()
    # Weights are there once: four sizes take hardly more than one.
    single = exact(model, GREATEST).artifact.params.nbytes
    assert made.artifact.params.nbytes < 2.5 * single + 4096
    for change, said in (
        (lambda d: d["symbols"].clear(), "contradicts itself"),
        (lambda d: d["variants"][0].update(library="none.so"), "code of a compiled size"),
        (lambda d: next(iter(d["inputs"].values())).update({"7": next(iter(d["symbols"]))}),
         "dynamic extents of inputs that there are not"),
    ):  # fmt: skip
        damaged = tmp_path / "damaged.qcm"
        with zipfile.ZipFile(path) as old, zipfile.ZipFile(damaged, "w") as new:
            for name in old.namelist():
                data = old.read(name)
                if name == "manifest.json":
                    doc = json.loads(data)
                    change(doc["dynamic"])  # type: ignore[no-untyped-call]
                    data = json.dumps(doc).encode()
                new.writestr(name, data)
        with pytest.raises(ArtifactError, match=said):
            read_artifact(damaged)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_encoder_with_1_to_128_tokens() -> None:
    """Six layers as a sentence encoder has; all lengths, with the integers of each exact one."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "models"))
    from builders import encoder as build

    model = build(vocab=1000, mask=True, symbolic=True)
    rng = np.random.default_rng(0)

    def one(size: int) -> Arrays:
        ids = rng.integers(0, 1000, (1, size))
        return {"input_ids": ids, "attention_mask": np.ones((1, size), np.int64)}

    made = qcompiler.compile(
        model, calibration=[one(64) for _ in range(8)], input_shapes={"input_ids": (1, (1, 128))}
    )
    session = ort.InferenceSession(model.SerializeToString())
    for size in range(1, 129):
        inputs = one(size)
        ours, theirs = made(inputs)["last_hidden_state"], session.run(None, inputs)[0]
        assert ours.shape == theirs.shape
        cosine = (ours * theirs).sum() / np.linalg.norm(ours) / np.linalg.norm(theirs)
        assert cosine > 0.99, size
        # Within a longer size, the same call gives the same numbers: nothing leaks in.
        assert np.array_equal(made(inputs)["last_hidden_state"], ours)


def refused(model: onnx.ModelProto, match: str, extent: Any = (1, 40)) -> None:
    with pytest.raises(UnsupportedOpError, match=match):
        qcompiler.compile(model, precision="fp32", input_shapes=shapes(model, extent))


def test_what_depends_on_the_filling_is_refused() -> None:
    def sound(build: Any, shape: Any = ("N", 3)) -> onnx.ModelProto:
        n = Net()
        return n.model({"sound": (1, ["N", 4, "T"])}, {"y": (build(n), shape)})

    last = sound(lambda n: n("Gather", "sound", n.c(np.array(-1)), axis=2), ("N", 4))
    refused(last, "Gather|gather|slice")
    flat = sound(lambda n: n("Reshape", "sound", n.c(np.array([0, -1]))), ("N", "M"))
    refused(flat, "the size is merged with another extent in output 'y'")
    mixed = sound(
        lambda n: n("ReduceSum", n("Reshape", "sound", n.c(np.array([0, -1]))), n.c([1])), ("N", 1)
    )
    refused(mixed, "mixes an extent that is merged")
    swapped = sound(
        lambda n: n("Reshape", n("Add", n("Reshape", "sound", n.c([-1])),
                                 n("Reshape", n("Transpose", "sound", perm=[2, 1, 0]), n.c([-1]))),
                    n.c(np.array([1, 4, -1]))),
        ("N", 4, "T"),
    )  # fmt: skip
    refused(swapped, "is not the size itself")
    tiled = sound(lambda n: n("Tile", "sound", n.c([1, 1, 2])), ("N", 4, "M"))
    refused(tiled, "is not the size itself")
    strided = sound(lambda n: n("Conv", "sound", n.weights(8, 4, 3), strides=[2], pads=[1, 1]),
                    ("N", 8, "M"))  # fmt: skip
    refused(strided, "conv.*is not the size itself")
    pooled = sound(lambda n: n("MaxPool", "sound", kernel_shape=[3], pads=[1, 1], strides=[1]),
                   ("N", 4, "M"))  # fmt: skip
    refused(pooled, "windows reach over the end")
    third = sound(lambda n: n("Slice", "sound", n.c([2]), n.c([3]), n.c([2])), ("N", 4, 1))
    refused(third, "places that small sizes do not have")
    count = sound(lambda n: n("Mul", "sound", n("Cast", n("Size", "sound"), to=1)), ("N", 4, "T"))
    refused(count, "a constant in it depends on the size")
    product = sound(lambda n: n("ReduceProd", "sound", axes=[2], keepdims=0), ("N", 4))
    refused(product, "no masked form")


def test_a_model_that_has_one_size_after_all() -> None:
    n = Net()
    y = n("Add", "sound", n.weights(4, 8))
    model = n.model({"sound": (1, ["N", 4, "T"])}, {"y": (y, ["N", 4, "T"])})
    with pytest.raises(ShapeError, match=r"every size of the range; at sound \[1, 4, "):
        qcompiler.compile(model, precision="fp32", input_shapes=shapes(model, (1, 8)))


def test_slice_of_what_all_sizes_have() -> None:
    n = Net()
    y = n("Slice", "sound", n.c([2]), n.c([3]), n.c([2]))
    model = n.model({"sound": (1, ["N", 4, "T"])}, {"y": (y, ["N", 4, 1])})
    made = qcompiler.compile(model, precision="fp32", input_shapes={"sound": (1, 4, (3, 20))})
    inputs = feed(model, 3)
    np.testing.assert_array_equal(made(inputs)["y"], inputs["sound"][:, :, 2:3])


def test_ranges() -> None:
    model = MODELS["masked encoder"]
    assert ranges_of(model, {"ids": (1, 8)}) is None
    assert ranges_of(model, None) is None
    found = ranges_of(model, {"ids": (1, (1, 128))})
    assert found is not None
    assert found.axes == {"ids": {1: "S"}, "mask": {1: "S"}}  # the mask follows
    assert found.ladder() == [{"S": n} for n in (16, 32, 64, 128)]
    assert found.probe() == {"S": 127}
    two = Ranges({}, {"A": (1, 9), "B": (4, 9)}, {})
    assert two.ladder()[-1] == {"A": 9, "B": 9}
    assert len(set(two.probe().values())) == 2
    for given, said in (
        ({"ids": (1, (5, 2))}, "no extent is 5 to 2"),
        ({"ids": (1, (0, 2))}, "no extent is 0 to 2"),
        ({"ids": (1, "x")}, "is no extent"),
        ({"ids": (1, (1, 9)), "mask": (1, (1, 8))}, "given as 1 to 9 and as 1 to 8"),
    ):
        with pytest.raises(UsageError, match=said):
            ranges_of(model, given)
    with pytest.raises(UsageError, match="is always 4: it cannot be 1 to 8"):
        ranges_of(MODELS["listener"], {"sound": (1, (1, 8), 5)})


def test_a_range_of_one_size_is_that_size() -> None:
    graph = load_onnx(MODELS["encoder"], input_shapes={"ids": (1, (8, 8))})
    assert graph.inputs[0].shape == (1, 8)
    with pytest.raises(UsageError, match="'ids' is given the range 1 to 8: one size is needed"):
        load_onnx(MODELS["encoder"], input_shapes={"ids": (1, (1, 8))})  # type: ignore[dict-item]


def test_on_the_command_line() -> None:
    assert parse_shapes(["ids:1x1..128"]) == {"ids": (1, (1, 128))}
    with pytest.raises(UsageError, match=r"or NAME:1x1\.\.128 for a range"):
        parse_shapes(["ids:1x..128"])


def test_what_does_not_go_with_ranges() -> None:
    model = MODELS["encoder"]
    at = shapes(model, (1, 40))
    with pytest.raises(UnsupportedByTargetError, match="one size per artifact"):
        qcompiler.compile(model, target="reference", precision="fp32", input_shapes=at)
