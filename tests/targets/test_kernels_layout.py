# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qcompiler.errors import CodegenError
from qcompiler.targets.isa import ISA_TABLE, runnable
from qcompiler.targets.kernels.harness import build, run
from qcompiler.targets.kernels.layout import (
    QuantizeToNhwcWorkload,
    TransposeWorkload,
    depth_to_space,
    quantize_nchw_to_nhwc,
    space_to_depth,
    transpose,
)
from qcompiler.targets.kernels.movement import (
    ConcatWorkload,
    GatherWorkload,
    PadWorkload,
    RemapWorkload,
    ResizeLinearWorkload,
    StridedWorkload,
    concat,
    gather,
    pack_maps,
    pack_positions,
    pad,
    remap,
    resize_linear,
    strided,
)

# The AVX-VNNI row adds only a dot product, so here it makes the code of the AVX2 row.
ROWS = [row for row in ISA_TABLE.values() if runnable(row) and row.name != "x86-avxvnni"]
F = np.float32
rows = pytest.mark.parametrize("isa", ROWS, ids=lambda row: row.name)
seeds = st.integers(0, 2**31)
dtypes = st.sampled_from(["uint8", "int8", "int16", "int32", "float32", "int64", "bool"])


def filled(seed: int, shape: tuple[int, ...], dtype: str) -> np.ndarray:
    rng = np.random.default_rng(seed)
    if dtype == "float32":
        return rng.normal(size=shape).astype(F)
    return np.asarray(rng.integers(0, 2 if dtype == "bool" else 120, shape)).astype(dtype)


@st.composite
def permuted(draw: st.DrawFn) -> tuple[tuple[int, ...], tuple[int, ...]]:
    rank = draw(st.integers(1, 6))
    choices = [1, 2, 3, 8, 16, 33, 70] if rank <= 3 else [1, 2, 3, 4, 5, 17]
    shape = tuple(draw(st.sampled_from(choices)) for _ in range(rank))
    return shape, tuple(draw(st.permutations(range(rank))))


@rows
@settings(max_examples=10, deadline=None)
@given(case=permuted(), dtype=dtypes, seed=seeds)
def test_transpose(isa, case, dtype, seed):
    shape, permutation = case
    x = filled(seed, shape, dtype)
    want = x.transpose(permutation)
    w = TransposeWorkload(shape, permutation, dtype)
    got = run(build(transpose(w, isa), isa), x, shape=want.shape, dtype=dtype)
    np.testing.assert_array_equal(got, want)


@rows
@pytest.mark.parametrize("dtype", ["uint8", "float32"])
@pytest.mark.parametrize("shape", [(2, 3, 20, 21), (1, 40, 9, 7)])
def test_layout_changes(isa, dtype, shape):
    x = filled(1, shape, dtype)
    for permutation in ((0, 2, 3, 1), (0, 3, 1, 2)):
        want = x.transpose(permutation)
        library = build(transpose(TransposeWorkload(shape, permutation, dtype), isa), isa)
        np.testing.assert_array_equal(run(library, x, shape=want.shape, dtype=dtype), want)


@rows
@settings(max_examples=6, deadline=None)
@given(
    n=st.integers(1, 2),
    c=st.sampled_from([1, 3, 4, 8, 12, 16, 20, 40]),
    size=st.tuples(st.integers(1, 20), st.integers(1, 20)),
    added=st.sampled_from([None, 0, 1, 13, 30]),
    dtype=st.sampled_from(["uint8", "int8"]),
    seed=seeds,
)
def test_quantize_nchw_to_nhwc(isa, n, c, size, added, dtype, seed):
    rng = np.random.default_rng(seed)
    info = np.iinfo(dtype)
    zero = int(rng.integers(info.min, info.max))
    x = (rng.normal(size=(n, c, *size)) * 50).astype(F)
    channels = None if added is None else c + added
    w = QuantizeToNhwcWorkload(n, c, *size, 0.37, zero, dtype, info.min, info.max, channels)
    want = np.full((n, *size, channels or c), zero, dtype)
    codes = np.clip(np.rint(x / F(0.37)) + zero, info.min, info.max)
    want[..., :c] = codes.transpose(0, 2, 3, 1).astype(dtype)
    got = run(build(quantize_nchw_to_nhwc(w, isa), isa), x, shape=want.shape, dtype=dtype)
    np.testing.assert_array_equal(got, want)


@rows
@pytest.mark.parametrize("dtype", ["uint8", "float32"])
@pytest.mark.parametrize("mode", ["DCR", "CRD"])
def test_depth_to_space_and_back(isa, dtype, mode):
    n, c, h, w, b = 2, 12, 3, 5, 2
    x = filled(3, (n, c, h, w), dtype)
    if mode == "DCR":
        y = x.reshape(n, b, b, c // 4, h, w).transpose(0, 3, 4, 1, 5, 2)
    else:
        y = x.reshape(n, c // 4, b, b, h, w).transpose(0, 1, 4, 2, 5, 3)
    y = np.ascontiguousarray(y.reshape(n, c // 4, h * b, w * b))

    def moved(workload, source):
        library = build(transpose(workload, isa), isa)
        return run(library, source, shape=workload.out_shape, dtype=dtype)

    nhwc = (0, 2, 3, 1)
    got = moved(depth_to_space(x.shape, b, dtype, mode=mode, layout="NCHW"), x)
    np.testing.assert_array_equal(got, y)
    got = moved(depth_to_space((n, h, w, c), b, dtype, mode=mode), x.transpose(nhwc))
    np.testing.assert_array_equal(got, y.transpose(nhwc))
    if mode == "DCR":  # SpaceToDepth is its inverse
        got = moved(space_to_depth(y.shape, b, dtype, layout="NCHW"), y)
        np.testing.assert_array_equal(got, x)
        got = moved(space_to_depth((n, h * b, w * b, c // 4), b, dtype), y.transpose(nhwc))
        np.testing.assert_array_equal(got, x.transpose(nhwc))


shapes = st.lists(st.integers(1, 8), min_size=1, max_size=4)


@rows
@settings(max_examples=5, deadline=None)
@given(
    shape=shapes,
    extents=st.lists(st.integers(1, 90), min_size=1, max_size=3),
    axis=st.integers(0, 3),
    dtype=dtypes,
    seed=seeds,
)
def test_concat(isa, shape, extents, axis, dtype, seed):
    axis %= len(shape)
    parts = [
        filled(seed + k, (*shape[:axis], extent, *shape[axis + 1 :]), dtype)
        for k, extent in enumerate(extents)
    ]
    w = ConcatWorkload(tuple(part.shape for part in parts), axis - len(shape), dtype)
    want = np.concatenate(parts, axis)
    got = run(build(concat(w, isa), isa), *parts, shape=w.out_shape, dtype=dtype)
    np.testing.assert_array_equal(got, want)


@rows
def test_concat_of_large_arrays(isa):
    parts = [filled(k, (1, 300_001 + k), "uint8") for k in range(2)] + [filled(2, (1, 5), "uint8")]
    w = ConcatWorkload(tuple(part.shape for part in parts), 1, "uint8")
    got = run(build(concat(w, isa), isa), *parts, shape=w.out_shape, dtype="uint8")
    np.testing.assert_array_equal(got, np.concatenate(parts, 1))


@rows
@settings(max_examples=5, deadline=None)
@given(shape=shapes, dtype=dtypes, data=st.data())
def test_pad_and_strided(isa, shape, dtype, data):
    x = filled(len(shape), tuple(shape), dtype)
    widths = st.lists(st.sampled_from([0, 0, 1, 5]), min_size=len(shape), max_size=len(shape))
    before, after = data.draw(widths), data.draw(widths)
    value = 1 if dtype == "bool" else 7
    w = PadWorkload(x.shape, tuple(before), tuple(after), dtype, value)
    want = np.pad(x, list(zip(before, after, strict=True)), constant_values=value)
    got = run(build(pad(w, isa), isa), x, shape=w.out_shape, dtype=dtype)
    np.testing.assert_array_equal(got, want)

    starts, steps, cut = [], [], []
    for extent in shape:
        if data.draw(st.booleans()):
            start, step, stop = 0, 1, extent
        elif data.draw(st.booleans()):
            start, step = data.draw(st.integers(0, extent - 1)), data.draw(st.integers(1, 3))
            stop = data.draw(st.integers(start + 1, extent))
        else:
            start, step = data.draw(st.integers(0, extent - 1)), -data.draw(st.integers(1, 3))
            stop = None
        starts.append(start)
        steps.append(step)
        cut.append(slice(start, stop, step))
    want = x[tuple(cut)]
    sliced = StridedWorkload(x.shape, want.shape, tuple(starts), tuple(steps), dtype)
    got = run(build(strided(sliced, isa), isa), x, shape=want.shape, dtype=dtype)
    np.testing.assert_array_equal(got, want)


@rows
def test_expand_is_a_stride_of_zero(isa):
    x = filled(0, (3, 1, 5), "uint8")
    w = StridedWorkload((3, 1, 5), (3, 4, 5), (0, 0, 0), (1, 0, 1), "uint8")
    got = run(build(strided(w, isa), isa), x, shape=(3, 4, 5), dtype="uint8")
    np.testing.assert_array_equal(got, np.broadcast_to(x, (3, 4, 5)))


@rows
@settings(max_examples=5, deadline=None)
@given(shape=shapes, dtype=dtypes, data=st.data())
def test_remap_and_gather(isa, shape, dtype, data):
    x = filled(len(shape), tuple(shape), dtype)
    maps = []
    want = x
    for axis, extent in enumerate(shape):
        table = data.draw(st.none() | st.lists(st.integers(0, extent - 1), min_size=1, max_size=9))
        maps.append(table)
        want = want if table is None else np.take(want, table, axis)
    w = RemapWorkload(x.shape, want.shape, tuple(m is not None for m in maps), dtype)
    library = build(remap(w, isa), isa)
    got = run(library, x, pack_maps(maps, w), shape=want.shape, dtype=dtype)
    np.testing.assert_array_equal(got, want)

    axis = data.draw(st.integers(0, len(shape) - 1))
    kind = data.draw(st.sampled_from(["int32", "int64"]))
    extent = shape[axis]
    picks = data.draw(st.lists(st.integers(-extent, extent - 1), min_size=1, max_size=9))
    indices = np.array(picks, kind).reshape(data.draw(st.sampled_from([(-1,), (1, -1)])))
    g = GatherWorkload(x.shape, axis, indices.shape, kind, dtype)
    got = run(build(gather(g, isa), isa), x, indices, shape=g.out_shape, dtype=dtype)
    np.testing.assert_array_equal(got, np.take(x, indices, axis))


@rows
def test_gather_stays_inside(isa):
    x = np.arange(12, dtype=F).reshape(4, 3)
    indices = np.array([4, 2**40, -5, -(2**40), 0], np.int64)
    w = GatherWorkload((4, 3), 0, (5,), "int64", "float32")
    got = run(build(gather(w, isa), isa), x, indices, shape=(5, 3), dtype="float32")
    np.testing.assert_array_equal(got, x[[3, 3, 0, 0, 0]])


@rows
@pytest.mark.parametrize("c", [1, 3, 40])
def test_resize_linear(isa, c):
    rng = np.random.default_rng(c)
    x = rng.normal(size=(2, 5, 6, c)).astype(F)
    w = ResizeLinearWorkload(2, 5, 6, c, 7, 9)
    down, right = rng.uniform(-1, 5, 7), rng.uniform(-1, 6, 9)
    packed = pack_positions(down, right, w)
    library = build(resize_linear(w, isa), isa)
    got = run(library, x, *packed, shape=(2, 7, 9, c), dtype="float32")
    grid = np.clip(down, 0, 4), np.clip(right, 0, 5)
    want = np.zeros((2, 7, 9, c))
    for i, y in enumerate(grid[0]):
        for j, z in enumerate(grid[1]):
            for dy, wy in ((0, 1 - y % 1), (1, y % 1)):
                for dz, wz in ((0, 1 - z % 1), (1, z % 1)):
                    corner = x[:, min(int(y) + dy, 4), min(int(z) + dz, 5)]
                    want[:, i, j] += corner.astype(np.float64) * wy * wz
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


def test_rejections():
    isa = ISA_TABLE["x86-64"]
    with pytest.raises(CodegenError, match=r"transpose: \(0, 0\) does not permute"):
        transpose(TransposeWorkload((2, 3), (0, 0), "uint8"), isa)
    with pytest.raises(CodegenError, match="quantize_nchw_to_nhwc: 3 channels do not fit 2"):
        quantize_nchw_to_nhwc(QuantizeToNhwcWorkload(1, 3, 4, 4, 1.0, 0, "uint8", 0, 255, 2), isa)
    with pytest.raises(CodegenError, match="depth_to_space: cannot split 6 channels by 2"):
        depth_to_space((1, 2, 2, 6), 2, "uint8")
    with pytest.raises(CodegenError, match="space_to_depth: 2 does not divide 3 x 4"):
        space_to_depth((1, 3, 4, 6), 2, "uint8")
    with pytest.raises(CodegenError, match="expected rank 4 and layout NHWC or NCHW"):
        space_to_depth((1, 3, 4), 2, "uint8")
    with pytest.raises(CodegenError, match=r"strided: axis 0 of .* reads 1 to 4 of 4"):
        strided(StridedWorkload((4,), (4,), (1,), (1,), "uint8"), isa)
    w = RemapWorkload((4, 4), (2, 4), (True, False), "uint8")
    with pytest.raises(CodegenError, match="pack_maps: axis 0 leads outside 4"):
        pack_maps([[0, 4], None], w)
    with pytest.raises(CodegenError, match=r"pack_maps: axis 0 has \(3,\), expected 2"):
        pack_maps([[0, 1, 2], None], w)
    with pytest.raises(CodegenError, match="pack_maps: axis 1 does not fit"):
        pack_maps([[0, 1], [0, 1, 2, 3]], w)
    with pytest.raises(CodegenError, match="remap: axis 0 has no map and changes its extent"):
        remap(RemapWorkload((4,), (2,), (False,), "uint8"), isa)
