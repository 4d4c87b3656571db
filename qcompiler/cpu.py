# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""What this machine's CPU can do: instruction-set features, cores, caches.

Feature names are the kernel's own, as in `/proc/cpuinfo` ("avx2", "avx512_vnni", "asimddp"): they
are the names that ISA rows ask for and that artifacts carry.
"""

from __future__ import annotations

import ctypes
import functools
import os
import platform
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from qcompiler.errors import UsageError

_CPUINFO = Path("/proc/cpuinfo")
_SYSFS = Path("/sys/devices/system/cpu")
_CGROUP = Path("/sys/fs/cgroup")

_ARCH_PRCTL = 158  # the system call's number on x86-64
_ARCH_REQ_XCOMP_PERM = 0x1023
_XTILEDATA = 18

_ARCHITECTURES = {"amd64": "x86_64", "x64": "x86_64", "arm64": "aarch64"}

# numpy's own run-time detection, for systems without /proc/cpuinfo: numpy name -> kernel name.
_FROM_NUMPY = {
    "SSE": "sse",
    "SSE2": "sse2",
    "SSE3": "pni",
    "SSSE3": "ssse3",
    "SSE41": "sse4_1",
    "SSE42": "sse4_2",
    "POPCNT": "popcnt",
    "AVX": "avx",
    "F16C": "f16c",
    "FMA3": "fma",
    "AVX2": "avx2",
    "AVX512F": "avx512f",
    "AVX512CD": "avx512cd",
    "AVX512VL": "avx512vl",
    "AVX512BW": "avx512bw",
    "AVX512DQ": "avx512dq",
    "AVX512VNNI": "avx512_vnni",
    "AVX512IFMA": "avx512ifma",
    "AVX512VBMI": "avx512vbmi",
    "AVX512VBMI2": "avx512_vbmi2",
    "AVX512BITALG": "avx512_bitalg",
    "AVX512FP16": "avx512_fp16",
    "AVX512BF16": "avx512_bf16",
    "NEON": "asimd",
    "ASIMD": "asimd",
    "ASIMDHP": "asimdhp",
    "ASIMDDP": "asimddp",
    "SVE": "sve",
}


@dataclass(frozen=True, slots=True)
class Cpu:
    """The CPU of a machine.

    Attributes:
        architecture: "x86_64" or "aarch64" (other machines: Python's name for them).
        name: Marketing name, or "unknown".
        features: Feature names as in /proc/cpuinfo.
    """

    architecture: str
    name: str
    features: frozenset[str]


def parse_cpuinfo(text: str) -> tuple[str, frozenset[str]]:
    """Return the name and the features common to all processors of a /proc/cpuinfo text.

    Processors of a big.LITTLE system may differ; only what all of them have is safe to use.
    """
    name = "unknown"
    common: frozenset[str] | None = None
    for line in text.splitlines():
        key, separator, value = line.partition(":")
        key = key.strip()
        if not separator:
            continue
        if key in ("flags", "Features"):
            found = frozenset(value.split())
            common = found if common is None else common & found
        elif key in ("model name", "Hardware") and name == "unknown":
            name = value.strip()
    return name, common or frozenset()


@functools.cache
def host_cpu() -> Cpu:
    """Return the CPU of this machine (read once per process)."""
    machine = platform.machine().lower()
    architecture = _ARCHITECTURES.get(machine, machine)
    try:
        name, features = parse_cpuinfo(_CPUINFO.read_text(encoding="utf-8", errors="replace"))
    except OSError:
        name, features = platform.processor() or "unknown", frozenset()
    return Cpu(architecture, name, features or _numpy_features())


def cpu_features() -> frozenset[str]:
    """Return the features of this machine's CPU, named as in /proc/cpuinfo."""
    return host_cpu().features


def missing_features(required: frozenset[str] | tuple[str, ...]) -> tuple[str, ...]:
    """Return those of `required` that this machine's CPU lacks, sorted."""
    return tuple(sorted(set(required) - cpu_features()))


@functools.cache
def allow_tiles() -> bool:
    """Ask Linux for the AMX tile registers; return whether this process may use them.

    Their state is large, so a process gets it only when it asks, once, for all its threads and
    children (not for programs it executes). Without permission the first tile instruction ends the
    process. Source: Linux Documentation/arch/x86/xstate.rst.
    """
    if "amx_tile" not in cpu_features() or platform.system() != "Linux":
        return False
    try:
        return bool(ctypes.CDLL(None).syscall(_ARCH_PRCTL, _ARCH_REQ_XCOMP_PERM, _XTILEDATA) == 0)
    except (OSError, AttributeError):
        return False


def _numpy_features() -> frozenset[str]:
    """Return the features that numpy detected when it was imported."""
    for module in (getattr(np, "_core", None), getattr(np, "core", None)):
        found = getattr(getattr(module, "_multiarray_umath", None), "__cpu_features__", None)
        if isinstance(found, dict):
            return frozenset(kernel for name, kernel in _FROM_NUMPY.items() if found.get(name))
    return frozenset()


def allowed_cpus() -> tuple[int, ...]:
    """Return the ids of the logical CPUs that this thread may run on, ascending."""
    if hasattr(os, "sched_getaffinity"):
        return tuple(sorted(os.sched_getaffinity(0)))
    return tuple(range(os.cpu_count() or 1))


def physical_cores() -> int:
    """Return how many physical cores this process may use.

    Two hyper-threads of one core count once (integer kernels saturate a core's vector units from
    one thread), and a container's CPU quota (cgroup v2 and v1) is respected.
    """
    cpus = allowed_cpus()
    cores = set()
    for cpu in cpus:
        try:
            siblings = (_SYSFS / f"cpu{cpu}/topology/thread_siblings_list").read_text()
        except OSError:
            siblings = str(cpu)
        cores.add(siblings.strip())
    quota = _cgroup_quota()
    return max(1, min(len(cores), quota) if quota else len(cores))


def _cgroup_quota() -> int:
    """Return the CPU quota of this container in whole cores, rounded up; 0 without one."""
    try:
        quota, period = (_CGROUP / "cpu.max").read_text().split()[:2]
    except (OSError, ValueError):
        try:
            quota = (_CGROUP / "cpu/cpu.cfs_quota_us").read_text().strip()
            period = (_CGROUP / "cpu/cpu.cfs_period_us").read_text().strip()
        except OSError:
            return 0
    if not (quota.isdigit() and period.isdigit() and int(period)):
        return 0  # "max" and -1 mean no limit
    return -(-int(quota) // int(period))


def default_threads() -> int:
    """Return the number of threads to run with when nobody says otherwise.

    `TVM_NUM_THREADS`, then `OMP_NUM_THREADS`, as in TVM itself; else the physical cores.

    Raises:
        UsageError: One of the two variables is set to something else than a positive integer.
    """
    for variable in ("TVM_NUM_THREADS", "OMP_NUM_THREADS"):
        text = os.environ.get(variable, "").split(",")[0].strip()
        if not text:
            continue
        if not text.isdigit() or int(text) < 1:
            raise UsageError(
                f"environment variable {variable} is {text!r}: expected a positive integer"
            )
        return int(text)
    return physical_cores()
