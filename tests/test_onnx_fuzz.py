# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""Whatever a model file holds, importing it ends in a graph or in one clear error.

Every model is imported in a process of its own, forked from a warm one, with limits of time and
memory, and with a hook that sees every file that Python opens.
"""

from __future__ import annotations

import faulthandler
import os
import resource
import signal
import sys
import time
import traceback
from pathlib import Path

import pytest
from onnx_mutations import RULES, mutate, sound_models

from qcompiler.errors import QCompilerError
from qcompiler.onnx_import import load_onnx
from qcompiler.passes.canonicalize import canonicalize_passes
from qcompiler.passmanager import PassContext, PassManager

CORPUS = Path(__file__).parent / "fuzz_corpus"
SECONDS = 60
MEMORY = 2 << 30
"""Bytes beyond what the warm process has."""
SAMPLE = 4 * len(RULES)
ALL = 2000


def import_once(path: Path) -> str:
    """Import and canonicalize a model; return "" or what is wrong with how that ended."""
    opened: list[str] = []
    inside = str(path.parent.resolve())

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        if event == "open" and isinstance(arguments[0], (str, bytes)):
            opened.append(os.fsdecode(arguments[0]))

    sys.addaudithook(hook)
    try:
        graph = load_onnx(path)
        PassManager(canonicalize_passes()).run(graph, PassContext())
    except QCompilerError as error:
        text = str(error)
        if not text.strip() or len(text) > 4000:
            return f"a message of {len(text)} characters"
    except BaseException:
        return traceback.format_exc(limit=-6)
    modules = tuple(filter(None, sys.path))  # imported late
    allowed = (inside, sys.prefix, sys.base_prefix, str(Path(__file__).parents[1]), "/proc/cpuinfo")
    allowed += modules
    for name in opened:
        real = os.path.realpath(name)
        if not real.startswith(allowed) and not real.startswith(("/usr", "/lib", "/sys")):
            return f"opened {name!r}, outside the model's folder"
    return ""


def verdict(path: Path) -> str:
    """`import_once` in a child with limits; return "" or what is wrong."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.close(read)
            size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, size + MEMORY))
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            faulthandler.disable()
            signal.alarm(SECONDS)
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            os.write(write, import_once(path).encode()[-8000:])
            code = 0
        finally:
            os._exit(code)
    os.close(write)
    said = bytearray()
    while part := os.read(read, 65536):
        said += part
    os.close(read)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        name = signal.Signals(os.WTERMSIG(status)).name
        return f"the process died of {name}" + (f" ({SECONDS} s)" if name == "SIGALRM" else "")
    if os.WEXITSTATUS(status):
        return f"the process ended with status {os.WEXITSTATUS(status)}"
    return said.decode(errors="replace")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model's folder, with things beside and in it that it must not read."""
    top = tmp_path_factory.mktemp("fuzz")
    (top / "secret.bin").write_bytes(b"\1" * 4096)
    made = top / "model"
    made.mkdir()
    (made / "weights.bin").write_bytes(bytes(4096))
    (made / "link.bin").symlink_to(top / "secret.bin")
    os.mkfifo(made / "pipe.bin")
    return made


def run(seeds: range, folder: Path) -> list[str]:
    found = []
    for seed in seeds:
        data, rules = mutate(seed)
        path = folder / f"m{seed}.onnx"
        path.write_bytes(data)
        wrong = verdict(path)
        if wrong:
            found.append(f"seed {seed} ({rules}): {wrong}")
        path.unlink()
    return found


def test_sound_models_import(folder: Path) -> None:
    for index, model in enumerate(sound_models()):
        if any(n.op_type == "Loop" for n in model.graph.node):
            continue
        path = folder / f"sound{index}.onnx"
        path.write_bytes(model.SerializeToString())
        load_onnx(path)


def test_mutations_repeat() -> None:
    assert [mutate(s) for s in range(40)] == [mutate(s) for s in range(40)]
    assert len({mutate(s)[0] for s in range(SAMPLE)}) > SAMPLE * 0.9


def test_the_judge_sees_what_is_wrong(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def crash(path: Path) -> None:
        os.kill(os.getpid(), signal.SIGBUS)

    def leak(path: Path) -> None:
        (path.parent.parent / "secret.bin").read_bytes()
        raise QCompilerError("refused")

    def grow(path: Path) -> None:
        bytearray(2 * MEMORY)

    def hang(path: Path) -> None:
        time.sleep(SECONDS)

    module = sys.modules[__name__]
    monkeypatch.setattr(module, "SECONDS", 1)
    for wrong, said in (
        (crash, "died of SIGBUS"),
        (leak, "outside the model's folder"),
        (grow, "MemoryError"),
        (hang, "died of SIGALRM"),
    ):
        monkeypatch.setattr(module, "load_onnx", wrong)
        assert said in verdict(folder / "any.onnx")


def test_sample(folder: Path) -> None:
    found = run(range(SAMPLE), folder)
    assert not found, "\n".join(found)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_all(folder: Path) -> None:
    found = run(range(SAMPLE, ALL), folder)
    assert not found, f"{len(found)} of {ALL}:\n" + "\n".join(found)


@pytest.mark.parametrize("path", sorted(CORPUS.glob("*.onnx")), ids=lambda p: p.stem)
def test_what_once_failed(path: Path, folder: Path) -> None:
    copy = folder / path.name
    copy.write_bytes(path.read_bytes())
    assert verdict(copy) == ""
