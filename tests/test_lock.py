# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""Locked compilations: the same bytes again, and every difference refused by name."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

import qcompiler
from qcompiler.artifact import read_artifact, write_artifact
from qcompiler.cli import main
from qcompiler.errors import ArtifactError, LockError, UsageError
from qcompiler.lock import Lock, options, versions
from qcompiler.plan import PrecisionPlan
from qcompiler.records import Record, Records, WorkloadKey

MODELS = Path(__file__).resolve().parent.parent / "models" / "digits_cnn"
MODEL, CALIBRATION, EVALUATION = (MODELS / n for n in ("model.onnx", "calib.npz", "eval.npz"))


@pytest.fixture(autouse=True, scope="module")
def _nothing_is_timed() -> Iterator[None]:
    """Latencies of the interpreter, which say nothing, would take most of this module's time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("qcompiler.measure._latency", lambda *_: {"compiled": None, "float": None})
        patch.setattr("qcompiler.measure_network._RUNS", 0)
        yield


def compile_reference(**changes: Any) -> qcompiler.CompiledModel:
    given: dict[str, Any] = {"target": "reference", "calibration": CALIBRATION, **changes}
    return qcompiler.compile(given.pop("model", MODEL), **given)


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("locked")
    compile_reference(freeze=None).save(folder / "net.qcm")
    Lock.load(folder / "net.qcm").save(folder / "lock.json")
    return folder


@pytest.mark.parametrize("name", ["net.qcm", "lock.json"])
def test_the_same_inputs_give_the_same_bytes(first: Path, tmp_path: Path, name: str) -> None:
    compile_reference(locked=first / name).save(tmp_path / "again.qcm")
    assert (tmp_path / "again.qcm").read_bytes() == (first / "net.qcm").read_bytes()


def test_the_manifest_says_what_decided(first: Path) -> None:
    artifact = read_artifact(first / "net.qcm")
    lock = artifact.lock
    assert lock is not None
    assert set(lock["digests"]) == {"model", "graph", "calibration", "plan"}
    assert lock["options"] == {
        "target": "reference",
        "methods": [],
        "input_shapes": {},
        "freeze": {},
        "seed": 0,
    }
    assert {"qcompiler", "apache-tvm", "numpy", "onnx", "onnxruntime"} <= set(lock["versions"])
    assert artifact.manifest()["lock"] == lock


def test_a_native_target_locks_its_tools(tmp_path: Path) -> None:
    model = qcompiler.compile(MODEL, target="x86-64", calibration=CALIBRATION)
    assert model.artifact.lock is not None
    assert model.report is not None
    assert model.report["lock"] == model.artifact.lock
    found = model.artifact.lock["versions"]
    assert int(found["llvm"]) >= 15
    assert "ld" in found["linker"].lower()


def _other_model() -> onnx.ModelProto:
    proto = onnx.load(MODEL)
    proto.doc_string = "another file"
    return proto


def _other_samples() -> dict[str, Any]:
    samples = dict(np.load(CALIBRATION))
    return {name: a[: len(a) // 2] for name, a in samples.items()}


@pytest.mark.parametrize(
    ("changes", "difference"),
    [
        ({"model": _other_model()}, r"the model: found SHA-256 \w{16}…, locked SHA-256 \w{16}…"),
        ({"calibration": _other_samples()}, "the calibration data: found SHA-256"),
        ({"calibration": None}, "the calibration data: found none, locked SHA-256"),
        ({"seed": 7}, "option seed: found 7, locked 0"),
        ({"target": "x86-64"}, "option target: found x86-64, locked reference"),
        ({"target": "x86-64"}, r"version of llvm: found \d+, locked none"),
        ({"methods": "equalize"}, r'option methods: found \["equalize.*"\], locked \[\]'),
        (
            {"input_shapes": {"input": (2, 1, 8, 8)}},
            r'option input_shapes: found {"input": \[2, 1, 8, 8\]}, locked {}',
        ),
        ({"precision": "fp32"}, "precision of fc: found fp32, locked w8a8"),
        ({"precision": "fp32"}, r"precision of \d+ more nodes"),
    ],
)
def test_each_difference_is_named(first: Path, changes: dict[str, Any], difference: str) -> None:
    with pytest.raises(LockError, match=difference) as caught:
        compile_reference(**changes, locked=first / "lock.json")
    assert str(first / "lock.json") in caught.value.message
    assert caught.value.exit_code == 2
    assert "without --locked" in str(caught.value.hint)


def test_all_differences_are_listed_at_once(first: Path) -> None:
    with pytest.raises(LockError) as caught:
        compile_reference(model=_other_model(), seed=7, locked=first / "lock.json")
    assert len(caught.value.differences) == 2


def altered(first: Path, folder: Path, **parts: dict[str, Any]) -> Path:
    doc = json.loads((first / "lock.json").read_text())
    for name, changes in parts.items():
        doc[name].update(changes)
    path = folder / "altered.json"
    path.write_text(json.dumps(doc))
    return path


def test_another_version_is_a_difference(first: Path, tmp_path: Path) -> None:
    path = altered(first, tmp_path, versions={"numpy": "0.1"})
    with pytest.raises(LockError, match=r"version of numpy: found [\d.]+, locked 0\.1"):
        compile_reference(locked=path)


def test_bytes_that_differ_for_no_reason_are_refused(first: Path, tmp_path: Path) -> None:
    path = altered(first, tmp_path, members={"params.bin": "0" * 64})
    with pytest.raises(
        LockError, match=r"member params\.bin: found SHA-256 \w+…, locked SHA-256 0"
    ):
        compile_reference(locked=path)


def test_another_evaluation_is_refused_where_one_steered(first: Path, tmp_path: Path) -> None:
    path = altered(first, tmp_path, digests={"evaluation": "0" * 64})
    compile_reference(locked=path)  # the plan of the lock needs no evaluation
    evaluation = qcompiler.Evaluation(EVALUATION, "top1")
    with pytest.raises(LockError, match="the evaluation data: found SHA-256"):
        compile_reference(locked=path, evaluate=evaluation)
    compile_reference(locked=first / "lock.json", evaluate=evaluation)  # here it only measures


def test_an_automatic_plan_is_taken_from_the_lock(first: Path, tmp_path: Path) -> None:
    plan = PrecisionPlan.from_json(dict(read_artifact(first / "net.qcm").plan))
    graph_free = PrecisionPlan(plan.nodes)
    chosen = dict.fromkeys(["fc"], dataclasses.replace(plan.nodes["fc"], precision=_fp32()))
    compile_reference(precision=graph_free.replaced(chosen)).save(tmp_path / "mixed.qcm")
    again = compile_reference(precision="auto", locked=tmp_path / "mixed.qcm")
    again.save(tmp_path / "again.qcm")
    assert (tmp_path / "again.qcm").read_bytes() == (tmp_path / "mixed.qcm").read_bytes()
    with pytest.raises(LockError, match="precision of fc: found w8a8, locked fp32"):
        compile_reference(locked=tmp_path / "mixed.qcm")


def _fp32() -> Any:
    from qcompiler.types import Precision

    return Precision.FP32


def test_tuning_is_refused(first: Path) -> None:
    with pytest.raises(UsageError, match="a locked compilation cannot tune"):
        compile_reference(locked=first / "net.qcm", tuning=qcompiler.Tuning(trials=1))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\xff\x00", "is neither an artifact nor a lock"),
        (b"[]", "is no lock: expected a JSON object with format 'qcompiler-lock'"),
        (
            b'{"format": "qcompiler-lock", "format_version": 9}',
            "is a lock of version 9, expected 1",
        ),
        (
            b'{"format": "qcompiler-lock", "format_version": 1, "digests": 3}',
            "digests is int, expected an object",
        ),
    ],
)
def test_files_that_are_no_lock(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "lock.json"
    path.write_bytes(content)
    with pytest.raises(LockError, match=message):
        Lock.load(path)


def test_a_truncated_artifact_is_said_to_be_one(first: Path, tmp_path: Path) -> None:
    (tmp_path / "cut.qcm").write_bytes((first / "net.qcm").read_bytes()[:2000])
    with pytest.raises(ArtifactError, match=r"cut\.qcm is not a valid artifact"):
        Lock.load(tmp_path / "cut.qcm")


def test_a_lock_that_does_not_exist(tmp_path: Path) -> None:
    with pytest.raises(LockError, match=r"cannot read the lock .*: No such file"):
        Lock.load(tmp_path / "none.json")


def test_a_plan_that_cannot_be_read(first: Path, tmp_path: Path) -> None:
    path = altered(first, tmp_path, plan={"format": 77})
    with pytest.raises(LockError, match=r"altered\.json: precision plan of format 77"):
        compile_reference(precision="auto", locked=path)


def test_an_artifact_without_a_lock(first: Path, tmp_path: Path) -> None:
    artifact = dataclasses.replace(read_artifact(first / "net.qcm"), lock=None)
    assert "lock" not in artifact.manifest()
    write_artifact(artifact, tmp_path / "old.qcm")
    with pytest.raises(LockError, match=r"old\.qcm has no lock"):
        compile_reference(locked=tmp_path / "old.qcm")


def test_the_same_plan_with_other_reasons_is_named() -> None:
    nodes = {"a": {"precision": "w8a8", "reason": "asked for"}}
    lock = Lock({"plan": "x"}, {}, {}, {"format": 1, "nodes": nodes}, {})
    found = PrecisionPlan.from_json({"format": 1, "nodes": {"a": {"precision": "w8a8"}}})
    with pytest.raises(LockError, match="reason of a: found '', locked 'asked for'"):
        lock.check_plan(found, "y")


def test_frozen_arrays_enter_by_their_digest() -> None:
    def frozen(value: Any) -> Any:
        found = options(target="t", methods=(), input_shapes=None, freeze={"x": value}, seed=0)
        return found["freeze"]["x"]

    assert frozen(2) == 2
    assert frozen(True) is True
    assert frozen(np.zeros((2, 3), np.int8)).startswith("int8[2, 3] SHA-256 ")
    assert frozen(np.zeros(2)) != frozen(np.ones(2))


def test_ranges_of_extents_are_written_as_their_ends() -> None:
    shapes: dict[str, Any] = {"x": (1, (1, 128))}
    found = options(target="t", methods=(), input_shapes=shapes, freeze=None, seed=0)
    assert found["input_shapes"] == {"x": [1, [1, 128]]}


def test_versions_name_what_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qcompiler.lock.PACKAGES", ("no-such-package",))
    assert versions({"llvm": "22"}) == {"no-such-package": "not installed", "llvm": "22"}


def test_only_the_records_in_use_count() -> None:
    def choice(workload: str, tile: int, time: int = 0) -> Record:
        return Record(WorkloadKey("t", workload, "1"), "choice", {"tile": tile}, time=time)

    def digest(*records: Record) -> str | None:
        found = Records(list(records))
        found.best(WorkloadKey("t", "a", "1"))
        return found.used_digest()

    alone = digest(choice("a", 4))
    assert alone is not None
    assert digest(choice("a", 4, time=9), choice("b", 8)) == alone
    assert digest(choice("a", 8)) != alone
    assert digest(choice("b", 8)) is None


def test_the_command_line(
    first: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)

    def run(*argv: object) -> tuple[int, str, str]:
        status = main([str(a) for a in argv])
        said = capsys.readouterr()
        return status, said.out, said.err

    status, out, err = run("inspect", first / "net.qcm", "--lock", "lock.json")
    assert (status, err) == (0, "wrote lock.json\n")
    assert "lock" in out
    assert Path("lock.json").read_bytes() == (first / "lock.json").read_bytes()
    given = ("compile", MODEL, "-o", "b.qcm", "--target", "reference", "--locked", "lock.json")
    assert run(*given, "--calibration", CALIBRATION)[0] == 0
    assert Path("b.qcm").read_bytes() == (first / "net.qcm").read_bytes()
    Path("b.qcm").unlink()
    status, _, err = run(*given, "--calibration", EVALUATION, "--seed", 3)
    assert status == 2
    assert "error: the compilation differs from lock.json:\n  option seed: found 3" in err
    assert "the calibration data: found SHA-256" in err
    assert not Path("b.qcm").exists()
    assert run(*given[:-1], "none.json")[0] == 2
    status, _, err = run("inspect", MODEL, "--lock", "lock.json")
    assert (status, "--lock: " in err) == (2, True)


def test_a_plan_that_measurements_chose_is_taken_from_the_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same for a search, and for regions that went back to float for their time."""
    from qcompiler import auto, fallback
    from qcompiler.plan import Decision

    plan = PrecisionPlan.from_json(dict(compile_reference().plan))
    chosen = PrecisionPlan(plan.nodes).replaced({"fc": Decision(_fp32(), "slower in integers")})

    def found(*_: Any, **__: Any) -> auto.Choice:
        return auto.Choice(chosen, None, sources={"evaluation": "e" * 64})

    monkeypatch.setattr(auto, "choose", found)
    monkeypatch.setattr(fallback, "without_slower_regions", found)
    for precision in ("auto", "w8a8"):
        name = f"{precision}.qcm"
        compile_reference(precision=precision).save(tmp_path / name)
        lock = read_artifact(tmp_path / name).lock
        assert lock is not None
        assert lock["options"]["precision"] == precision
        again = compile_reference(precision=precision, locked=tmp_path / name)
        again.save(tmp_path / "again.qcm")
        assert (tmp_path / "again.qcm").read_bytes() == (tmp_path / name).read_bytes()
        assert dict(again.plan)["nodes"]["fc"]["precision"] == "fp32"
    with pytest.raises(LockError, match="precision of fc: found w8a8, locked fp32"):
        compile_reference(precision="w8a8", locked=tmp_path / "auto.qcm")
