# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import errno
import io
import json
import os
import re
import stat
import zipfile
from pathlib import Path

import numpy as np
import pytest

from qcompiler import artifact as artifact_module
from qcompiler import cpu
from qcompiler.artifact import (
    Artifact,
    ParamBlock,
    atomic_write,
    inspect_artifact,
    read_artifact,
    report_path,
    write_artifact,
)
from qcompiler.errors import ArtifactError, UnsupportedByTargetError, UsageError
from qcompiler.manifest import SCHEMA, TargetInfo, TensorSpec, dumps
from qcompiler.types import DType, PerAxis, PerGroup, QuantParams

SCALAR = QuantParams(np.float32(0.1), np.int32(3), DType.UINT8, 0, 255)
AXIS = QuantParams(
    np.array([0.1, 1 / 3], np.float32), np.array([0, 0]), DType.INT8, -127, 127, PerAxis(1)
)
GROUP = QuantParams(np.ones((2, 2), np.float32), np.int32(0), DType.INT8, -8, 7, PerGroup(1, 4))


def make(**changes):
    rng = np.random.default_rng(0)
    fields = {
        "target": TargetInfo("x86-avx2", "avx2", "any", ("sse2",), "x86_64-linux-gnu", "haswell"),
        "inputs": {
            "x": TensorSpec((2, 3), DType.UINT8, 0, SCALAR),
            "états": TensorSpec((5, 2), DType.INT8, None, AXIS),
        },
        "outputs": {"y": TensorSpec((2, 8), DType.INT8, 0, GROUP)},
        "params": ParamBlock.from_arrays(
            {
                "w": rng.integers(-128, 128, (7, 9), np.int8),
                "empty": np.zeros((0, 4), np.float32),
                "m": rng.standard_normal(5).astype(np.float32),
                "one": np.array(7, np.int64),
            }
        ),
        "library": b"\x7fELF" + bytes(range(256)) * 20,
        "plan": {"nodes": {"conv1": {"precision": "w8a8", "reason": "fastest"}}},
        "extras": {"graph.json": b"{}", "notes/a.txt": b"hello"},
        "sources": {"model": "0" * 64},
    }
    fields.update(changes)
    return Artifact(**fields)


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "a.qcm"
    write_artifact(make(), path)
    return path


def content(artifact):
    return artifact.digest(), {k: bytes(v) for k, v in artifact.members().items()}


def rewrite(path, change, *, compression=zipfile.ZIP_STORED):
    """Write the archive again with `change` applied to its dict of members."""
    with zipfile.ZipFile(path) as archive:
        members = {i.filename: archive.read(i) for i in archive.infolist()}
    members = change(members) or members
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in members.items():
            archive.writestr(name, data)


def rewrite_manifest(path, change):
    def apply(members):
        manifest = json.loads(members["manifest.json"])
        change(manifest)
        members["manifest.json"] = dumps(manifest)

    rewrite(path, apply)


# --- round trip ---


def test_everything_survives_a_round_trip(saved):
    before, after = make(), read_artifact(saved)
    assert after.inputs == before.inputs
    assert list(after.inputs) == ["x", "états"]
    assert after.outputs == before.outputs
    assert after.target == before.target
    assert (after.plan, after.sources, after.versions) == (
        before.plan,
        before.sources,
        before.versions,
    )
    assert (after.library, after.extras) == (before.library, before.extras)
    assert after.params.entries == before.params.entries
    for a, b in zip(after.params.arrays, before.params.arrays, strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


def test_bytes_are_reproducible_and_survive_load_and_save(saved, tmp_path):
    again, resaved = tmp_path / "b.qcm", tmp_path / "c.qcm"
    write_artifact(make(), again)
    write_artifact(read_artifact(saved), resaved)
    assert saved.read_bytes() == again.read_bytes() == resaved.read_bytes()
    with zipfile.ZipFile(saved) as archive:
        names = archive.namelist()
        assert names == sorted(names)
        assert {i.date_time for i in archive.infolist()} == {(1980, 1, 1, 0, 0, 0)}
        assert {i.compress_type for i in archive.infolist()} == {zipfile.ZIP_STORED}


def test_interpreted_artifact_has_no_library(tmp_path):
    path = tmp_path / "a.qcm"
    write_artifact(make(library=None, executor="interpreter"), path)
    assert read_artifact(path).library is None
    with zipfile.ZipFile(path) as archive:
        assert "lib.so" not in archive.namelist()


def test_param_block_aligns_and_refuses_duplicates():
    block = make().params
    for array in block.arrays:
        if array.size:
            assert array.__array_interface__["data"][0] % 64 == 0
    assert list(block.by_name) == ["w", "empty", "m", "one"]
    one = np.zeros(1, np.int8)
    with pytest.raises(UsageError, match="two parameters are named 'a'"):
        ParamBlock.from_arrays([("a", one), ("b", one), ("a", one)])
    assert ParamBlock.from_arrays({}).nbytes == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"executor": "jit"}, "unknown executor 'jit'"),
        ({"library": None}, "a library is needed"),
        ({"executor": "interpreter"}, "a library is needed"),
        ({"extras": {"plan.json": b""}}, "'plan.json' cannot be the name"),
        ({"extras": {"../x": b""}}, r"'\.\./x' cannot be the name"),
    ],
)
def test_artifact_refuses_contradictions(changes, message):
    with pytest.raises(UsageError, match=message):
        make(**changes)


def test_architecture_comes_from_the_triple():
    assert TargetInfo("a", triple="aarch64-linux-gnu").architecture == "aarch64"
    assert TargetInfo("reference").architecture == "any"
    assert TargetInfo("a", cpu_features=("b", "a", "b")).cpu_features == ("a", "b")


@pytest.mark.parametrize(("shape", "axis"), [((2, 3), 1), ((), 0)])
def test_tensor_spec_refuses_other_batch_axes(shape, axis):
    with pytest.raises(UsageError, match="batch axis"):
        TensorSpec(shape, DType.FLOAT32, axis)


# --- damage ---


def test_truncated_files_are_refused(saved, tmp_path):
    data = saved.read_bytes()
    cut = tmp_path / "cut.qcm"
    for length in sorted({0, 1, 21, 22, 100, len(data) - 1, *range(0, len(data), 97)}):
        cut.write_bytes(data[:length])
        with pytest.raises(ArtifactError, match=r"is not a valid artifact.*truncated or was"):
            read_artifact(cut)


def test_every_altered_byte_is_refused_or_changes_nothing(saved, tmp_path):
    data = saved.read_bytes()
    expected = content(read_artifact(saved))
    altered = tmp_path / "altered.qcm"
    with zipfile.ZipFile(saved) as archive:
        infos = archive.infolist()
        directory = archive.start_dir
    headers = set(range(directory, len(data)))
    bodies: set[int] = set()
    for info in infos:
        start = info.header_offset + 30 + len(info.filename)
        headers |= set(range(info.header_offset, start))
        bodies |= set(range(start, start + info.file_size, 211))
    manifest = next(i for i in infos if i.filename == "manifest.json")
    start = manifest.header_offset + 30 + len(manifest.filename)
    bodies |= set(range(start, start + manifest.file_size, 7))
    refused = 0
    for position in sorted(headers | bodies):
        for flip in (0x01, 0x80):
            damaged = bytearray(data)
            damaged[position] ^= flip
            altered.write_bytes(damaged)
            try:
                found = read_artifact(altered)
            except ArtifactError:
                refused += 1
                continue
            assert position in headers, f"byte {position} is content"
            assert content(found) == expected
    assert refused > len(bodies)


def test_other_files_are_refused(tmp_path):
    rng = np.random.default_rng(0)
    for name, data in {
        "random": rng.bytes(5000),
        "zip-like": b"PK\x03\x04" + rng.bytes(5000),
        "text": b"hello\n" * 10,
    }.items():
        path = tmp_path / name
        path.write_bytes(data)
        with pytest.raises(ArtifactError, match="is not a valid artifact"):
            read_artifact(path)
        with pytest.raises(ArtifactError, match="is not a valid artifact"):
            inspect_artifact(path)
    with pytest.raises(ArtifactError, match=r"cannot read .*missing"):
        read_artifact(tmp_path / "missing")
    with pytest.raises(ArtifactError, match="cannot read"):
        read_artifact(tmp_path)
    with pytest.raises(ArtifactError, match="not a regular file"):
        read_artifact("/dev/zero")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: {**m, "../evil": b"x"}, r"member name '\.\./evil' is not allowed"),
        (lambda m: {**m, "/etc/passwd": b"x"}, "member name '/etc/passwd' is not allowed"),
        (lambda m: {**m, "extra.bin": b"x"}, "archive and manifest differ about extra.bin"),
        (lambda m: {k: v for k, v in m.items() if k != "plan.json"}, "plan.json is missing"),
        (lambda m: {k: v for k, v in m.items() if k != "lib.so"}, "differ about lib.so"),
        (lambda m: {**m, "lib.so": m["lib.so"][:-1]}, "the manifest says"),
        (lambda m: {**m, "lib.so": m["lib.so"][:-1] + b"x"}, "member lib.so has SHA-256"),
        (lambda m: {**m, "params.bin": bytes(len(m["params.bin"]))}, "params.bin has SHA-256"),
        (lambda m: {**m, "manifest.json": b"[" * 100000}, "not valid JSON"),
        (lambda m: {**m, "manifest.json": b"\xff"}, "not valid JSON"),
        (lambda m: {**m, "manifest.json": b'{"a": NaN}'}, "NaN is not a JSON value"),
        (lambda m: {**m, "manifest.json": b"[]"}, "expected a JSON object, found array"),
        (lambda m: {**m, "manifest.json": b"{}"}, "format is None, not 'qcm'"),
        (lambda m: {**m, **{f"m{i}": b"" for i in range(1001)}}, "at most 1000 expected"),
    ],
)
def test_forged_archives_are_refused(saved, change, message):
    rewrite(saved, change)
    with pytest.raises(ArtifactError, match=message):
        read_artifact(saved)


def test_compressed_members_are_refused(saved):
    rewrite(saved, lambda m: None, compression=zipfile.ZIP_DEFLATED)
    with pytest.raises(ArtifactError, match="is compressed, expected it stored"):
        read_artifact(saved)


def test_duplicate_members_are_refused(saved):
    with (
        pytest.warns(UserWarning, match="Duplicate name"),
        zipfile.ZipFile(saved, "a") as archive,
    ):
        archive.writestr("lib.so", b"other")
    with pytest.raises(ArtifactError, match=r"lib\.so is there twice"):
        read_artifact(saved)


def test_absurd_sizes_are_refused_before_memory_is_taken(saved):
    # The directory claims 4 GB members; zip64 records could claim more.
    data = bytearray(saved.read_bytes())
    for match in re.finditer(b"PK\x01\x02", bytes(data)):
        at = match.start()
        data[at + 20 : at + 28] = b"\xfe\xff\xff\xff" * 2
    saved.write_bytes(data)
    with pytest.raises(ArtifactError, match="not a valid artifact"):
        read_artifact(saved)


def _set(path, value):
    def change(manifest):
        *parents, last = path
        for key in parents:
            manifest = manifest[key]
        if value is None:
            del manifest[last]
        else:
            manifest[last] = value

    return change


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("format_version",), 2, "format version is 2, this qcompiler reads 1"),
        (("format_version",), True, "format_version: found boolean, expected integer"),
        (("executor",), "jit", 'executor: found "jit", expected one of "vm", "interpreter"'),
        (("target",), None, "missing target"),
        (("target", "name"), 3, "target.name: found integer, expected string"),
        (("surprise",), 1, 'unknown key "surprise"'),
        (("inputs", 0, "shape"), [1, -1], r"inputs\[0\].shape\[1\]: found -1, expected at least 0"),
        (("inputs", 0, "shape"), [1, 1.5], r"inputs\[0\].shape\[1\]: found number"),
        (("inputs", 0, "dtype"), "string", r"inputs\[0\].dtype: found \"string\""),
        (("inputs", 0, "batch_axis"), 1, r"inputs\[0\].batch_axis: found 1"),
        (("inputs", 1, "name"), "x", "lists 'x' twice"),
        (("inputs", 0, "qparams", "scale"), [0.0], "tensor 'x': scales must be finite"),
        (("inputs", 0, "qparams", "scale"), [1e300], "tensor 'x': scales must be"),
        (("inputs", 0, "qparams", "zero_point"), [1 << 40], "tensor 'x'"),
        (("params", 0, "offset"), 32, "'w' starts at byte 32, not a multiple of 64"),
        (("params", 3, "offset"), 1 << 20, "'one' covers bytes"),
        (("params", 3, "offset"), 0, "'one' covers bytes"),
        (("params", 3, "name"), "w", "'w' is listed twice"),
        (("params", 0, "shape"), [1 << 40, 1 << 40], "its shape .* makes"),
        (("members", "lib.so", "sha256"), "0", "members.lib.so.sha256: found"),
        (("members", "../x"), {"size": 0, "sha256": "0" * 64}, r'found key "../x"'),
        (("members", "lib.so", "size"), 3, "the manifest says 3"),
    ],
)
def test_forged_manifests_are_refused(saved, path, value, message):
    rewrite_manifest(saved, _set(path, value))
    with pytest.raises(ArtifactError, match=message):
        read_artifact(saved)


def test_executor_and_library_must_agree(saved):
    rewrite_manifest(saved, _set(("executor",), "interpreter"))
    with pytest.raises(ArtifactError, match="a library is needed"):
        read_artifact(saved)


# --- machine ---


def test_missing_cpu_features_are_refused_before_the_code_is_read(tmp_path, monkeypatch):
    path = tmp_path / "a.qcm"
    target = TargetInfo("x86-future", "future", "any", ("avx4096", "sse2", "zfuture"))
    write_artifact(make(target=target), path)
    monkeypatch.setattr(
        artifact_module.ParamBlock, "__init__", lambda *a: pytest.fail("read too much")
    )
    with pytest.raises(
        UnsupportedByTargetError, match=r"x86-future.*avx4096, zfuture.*lacks.*target 'host'"
    ):
        read_artifact(path)
    assert inspect_artifact(path)["missing_cpu_features"] == ["avx4096", "zfuture"]


def test_other_architecture_is_refused(tmp_path):
    path = tmp_path / "a.qcm"
    other = "aarch64" if cpu.host_cpu().architecture == "x86_64" else "x86_64"
    write_artifact(make(target=TargetInfo("other", "", other)), path)
    with pytest.raises(UnsupportedByTargetError, match=f"compiled for other \\({other}\\)"):
        read_artifact(path)
    assert read_artifact(path, check_cpu=False).target.architecture == other


# --- writing ---


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left")])
@pytest.mark.parametrize("exists", [False, True])
def test_interrupted_save_leaves_nothing(tmp_path, monkeypatch, error, exists):
    path = tmp_path / "a.qcm"
    if exists:
        path.write_bytes(b"old")
    real = zipfile.ZipFile.open
    opened = []

    def failing(archive, member, *arguments, **options):
        opened.append(member)
        if len(opened) == 3:
            raise error
        return real(archive, member, *arguments, **options)

    monkeypatch.setattr(zipfile.ZipFile, "open", failing)
    with pytest.raises(ArtifactError if isinstance(error, OSError) else KeyboardInterrupt):
        write_artifact(make(), path)
    monkeypatch.undo()
    assert [p.name for p in tmp_path.iterdir()] == (["a.qcm"] if exists else [])
    if exists:
        assert path.read_bytes() == b"old"


def test_full_disk_at_the_last_moment(tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ArtifactError, match=r"cannot write .*a\.qcm: No space left"):
        write_artifact(make(), tmp_path / "a.qcm")
    assert list(tmp_path.iterdir()) == []


def test_unwritable_places(tmp_path):
    with pytest.raises(ArtifactError, match=r"folder .* does not exist"):
        write_artifact(make(), tmp_path / "no" / "a.qcm")
    with pytest.raises(ArtifactError, match="not a regular file"):
        write_artifact(make(), tmp_path)
    with pytest.raises(ArtifactError, match="not a regular file"):
        write_artifact(make(), "/dev/null")
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)


def test_write_keeps_links_and_modes(tmp_path):
    real, link = tmp_path / "real", tmp_path / "link"
    real.write_bytes(b"old")
    real.chmod(0o640)
    link.symlink_to(real)
    with atomic_write(link) as stream:
        stream.write(b"new")
    assert link.is_symlink()
    assert real.read_bytes() == b"new"
    assert stat.S_IMODE(real.stat().st_mode) == 0o640
    with atomic_write(tmp_path / "fresh") as stream:
        stream.write(b"x")
    mask = os.umask(0)
    os.umask(mask)
    assert stat.S_IMODE((tmp_path / "fresh").stat().st_mode) == 0o666 & ~mask


# --- inspection and documentation ---


def test_inspect(saved):
    found = inspect_artifact(saved)
    assert found["manifest"]["target"]["name"] == "x86-avx2"
    assert found["plan"]["nodes"]["conv1"]["precision"] == "w8a8"
    assert found["size_bytes"] == saved.stat().st_size
    assert found["digest"] == make().digest()
    assert found["parameters_bytes"] == make().params.nbytes
    assert found["missing_cpu_features"] == []
    json.dumps(found)
    rewrite(saved, lambda m: {**m, "lib.so": m["lib.so"][:-1] + b"x"})
    with pytest.raises(ArtifactError, match=r"lib\.so has SHA-256"):
        inspect_artifact(saved)


def test_documented_schema_is_the_one_in_force():
    text = (Path(__file__).parent.parent / "docs" / "artifact.md").read_text()
    block = re.search(r"```json\n(.*?)\n```", text, re.DOTALL)
    assert block is not None
    assert json.loads(block.group(1)) == SCHEMA


def test_report_lies_beside():
    assert report_path("out/resnet.qcm") == Path("out/resnet.report.json")


# --- cpu ---


def test_parse_cpuinfo_keeps_what_all_processors_have():
    x86 = (
        "model name\t: A CPU\nflags\t\t: fpu avx2 avx512f\n\nmodel name\t: B\nflags\t\t: fpu avx2\n"
    )
    assert cpu.parse_cpuinfo(x86) == ("A CPU", frozenset({"fpu", "avx2"}))
    arm = "processor\t: 0\nFeatures\t: fp asimd asimddp\n"
    assert cpu.parse_cpuinfo(arm) == ("unknown", frozenset({"fp", "asimd", "asimddp"}))
    assert cpu.parse_cpuinfo("") == ("unknown", frozenset())


def test_features_without_cpuinfo_come_from_numpy(monkeypatch, tmp_path):
    real = cpu.host_cpu()
    monkeypatch.setattr(cpu, "_CPUINFO", tmp_path / "none")
    cpu.host_cpu.cache_clear()
    try:
        found = cpu.host_cpu()
    finally:
        cpu.host_cpu.cache_clear()
    assert found.architecture == real.architecture
    assert found.features
    assert found.features <= real.features


def test_default_threads(monkeypatch):
    monkeypatch.delenv("TVM_NUM_THREADS", raising=False)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert 1 <= cpu.default_threads() <= len(cpu.allowed_cpus())
    monkeypatch.setenv("OMP_NUM_THREADS", "3,2")
    assert cpu.default_threads() == 3
    monkeypatch.setenv("TVM_NUM_THREADS", "5")
    assert cpu.default_threads() == 5
    monkeypatch.setenv("TVM_NUM_THREADS", "many")
    with pytest.raises(UsageError, match="TVM_NUM_THREADS is 'many'"):
        cpu.default_threads()


def test_cgroup_quota_limits_the_cores(monkeypatch, tmp_path):
    monkeypatch.setattr(cpu, "_CGROUP", tmp_path)
    assert cpu._cgroup_quota() == 0
    (tmp_path / "cpu.max").write_text("max 100000\n")
    assert cpu._cgroup_quota() == 0
    (tmp_path / "cpu.max").write_text("150000 100000\n")
    assert cpu._cgroup_quota() == 2
    (tmp_path / "cpu.max").write_text("50000 100000\n")
    assert cpu.physical_cores() == 1


def test_zip_reader_sees_a_plain_archive(saved):
    # Other tools can open the file: nothing in it is special to this package.
    with zipfile.ZipFile(io.BytesIO(saved.read_bytes())) as archive:
        assert archive.testzip() is None
        index = json.loads(archive.read("manifest.json"))["params"]
        data = archive.read("params.bin")
    entry = index[2]
    values = np.frombuffer(data, entry["dtype"], 5, entry["offset"])
    np.testing.assert_array_equal(values, make().params.by_name["m"])
