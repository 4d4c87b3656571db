# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""CUDA C++ text: names of types, exact literals, and one self-contained source for a model."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib import resources

import numpy as np

from qcompiler.types import DType

_TYPES = {
    DType.FLOAT32: "float",
    DType.FLOAT16: "qc_half",
    DType.FLOAT64: "double",
    DType.BFLOAT16: "float",  # held in float32, like in numpy
    DType.INT4: "qc_i8",
    DType.UINT4: "qc_u8",
    DType.INT8: "qc_i8",
    DType.UINT8: "qc_u8",
    DType.INT16: "qc_i16",
    DType.UINT16: "qc_u16",
    DType.INT32: "qc_i32",
    DType.UINT32: "qc_u32",
    DType.INT64: "qc_i64",
    DType.UINT64: "qc_u64",
    DType.BOOL: "qc_u8",
}

NAME = "@NAME@"
"""Stands for the kernel's name in its text, so that equal kernels have equal texts."""


def c_type(dtype: DType) -> str:
    """Return the C++ type of the elements in memory."""
    return _TYPES[dtype]


def literal(x: float) -> str:
    """Return a float32 as an exact C++ literal (hexadecimal); infinity saturates."""
    value = float(np.float32(x))
    if math.isnan(value):
        return 'nanf("")'
    if math.isinf(value):
        return "__int_as_float(0x7f800000)" if value > 0 else "__int_as_float(0xff800000)"
    return f"{value.hex()}f"


def constant(value: object) -> str:
    """Return a compile-time constant of a parameter struct as C++ text: its type and its value."""
    if isinstance(value, bool):
        return f"bool @ = {'true' if value else 'false'}"
    if isinstance(value, int):
        return f"int @ = {value}"
    if isinstance(value, float):
        return f"float @ = {literal(value)}"
    raise TypeError(f"{type(value).__name__} is no constant of a kernel")


def struct(
    base: str,
    types: Mapping[str, str],
    constants: Mapping[str, object],
    functions: Iterable[str] = (),
) -> str:
    """Return the parameter struct of a kernel template.

    Args:
        base: Base class, with the struct's name as its argument, or "".
        types: Type members.
        constants: `static constexpr` members; an infinite float becomes a function's result and
            is no constant, so those do not occur.
        functions: Member functions as text.
    """
    name = f"{NAME}_p"
    lines = [f"struct {name}{f' : {base}<{name}>' if base else ''} {{"]
    lines += [f"  typedef {text} {member};" for member, text in types.items()]
    lines += [
        f"  static constexpr {constant(value).replace('@', member)};"
        for member, value in constants.items()
    ]
    lines += [f"  static __device__ __forceinline__ {text}" for text in functions]
    return "\n".join([*lines, "};"])


def entry(parameters: str, threads: int, body: str, blocks: int = 1) -> str:
    """Return the kernel itself; `blocks` of it shall fit a multiprocessor at once."""
    return (
        f'extern "C" __global__ void QC_LAUNCH_BOUNDS({threads}, {blocks})\n'
        f"{NAME}({parameters}) {{\n"
        f"{body}\n}}\nQC_ENTRY({NAME})"
    )


@dataclass(frozen=True, slots=True)
class KernelText:
    """The source of one kernel.

    Attributes:
        kind: What it is, the beginning of its name.
        text: CUDA C++ with `NAME` where its name goes.
        files: Template files that it needs besides base.cuh.
    """

    kind: str
    text: str
    files: tuple[str, ...] = ()


@functools.cache
def template(name: str) -> str:
    """Return the text of a template file."""
    folder = resources.files("qcompiler.targets.cuda.kernels")
    return (folder / name).read_text(encoding="utf-8")


def module_source(kernels: Mapping[str, KernelText]) -> str:
    """Return one self-contained source of named kernels."""
    files = dict.fromkeys(["base.cuh"])
    for kernel in kernels.values():
        files.update(dict.fromkeys(kernel.files))
    parts = [template(name) for name in files]
    parts += [kernel.text.replace(NAME, name) for name, kernel in kernels.items()]
    return "\n".join(parts) + "\n"
