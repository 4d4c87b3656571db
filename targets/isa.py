# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""The table of instruction sets that the CPU kernel generators read.

A row (`Isa`) is plain data: which LLVM target to build for, which features the machine must have,
how wide the vectors are and which instruction multiplies 8-bit operands.  The generators in
`kernels/` ask the row, never the name of the row, so a new instruction set is a new row.

Importing this module imports nothing heavy; `tvm_target` imports TVM when it is called.

Sources: Intel 64 SDM volume 2 (PMADDUBSW, PMADDWD, VPDPBUSD), LLVM `IntrinsicsX86.td`; Arm A64
instruction set (SMULL, SMLAL, SADALP, SDOT, SMMLA), LLVM `IntrinsicsAArch64.td`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, Literal

from qcompiler.cpu import allow_tiles, missing_features
from qcompiler.errors import UnknownTargetError

__all__ = ["ISA_TABLE", "Isa", "isa_named", "runnable", "tvm_target", "with_processor"]

DotKind = Literal["none", "maddubs", "vpdpbusd", "smlal", "sdot", "smmla"]
TileKind = Literal["none", "tdpbusd"]
IntrinsicKey = tuple[str, int]


@dataclass(frozen=True, slots=True)
class Isa:
    """One instruction set that CPU kernels can be generated for."""

    name: str
    """The target name users write, such as "x86-avx2"."""
    mtriple: str
    """LLVM target triple."""
    mcpu: str
    """LLVM processor name; it fixes the base features and the scheduling model."""
    mattr: tuple[str, ...]
    """LLVM features beyond `mcpu`, each with its sign, such as "+avxvnni"."""
    cpu_features: tuple[str, ...]
    """Features the running machine must list, spelled as in /proc/cpuinfo "flags"."""
    vector_bits: int
    """Width of the widest vector register, in bits."""
    vector_registers: int
    """How many architectural vector registers there are."""
    dot: DotKind
    """How 8-bit operands are multiplied: "none" widens to int16 first; "maddubs" adds neighbouring
    products into int16 with saturation, so it needs a proof; "vpdpbusd" and "sdot" add four
    products into int32 and never saturate; "smlal" multiplies into int16, where a proof says how
    many products may be added before they are widened; "smmla" adds eight products into each of
    the 2 x 2 int32 of two rows and two columns."""
    k_group: int
    """How many neighbours along K one 32-bit lane of the dot instruction consumes."""
    a_dtype: str
    """Storage dtype of the activations the dot instruction takes."""
    b_dtype: str
    """Storage dtype of the weights the dot instruction takes."""
    fma: bool
    """Whether float32 fused multiply-add is one instruction."""
    intrinsics: Mapping[IntrinsicKey, str] = field(repr=False, compare=False)
    """LLVM intrinsic of (operation, vector bits).  Operations: "madd_i16" (int16 pairs to int32),
    "madd_u8s8" (u8 x s8 pairs to int16, saturating), "dot_u8s8" (four u8 x s8 products added to
    int32), "round_i32" (float32 to int32, ties to even), "pack_i16" (two int32 vectors to int16,
    saturating, within 128-bit lanes), "pack_u8" and "pack_i8" (two int16 vectors to 8 bits),
    "sum_u8" (absolute differences of u8 added by eights to int64), "dot_s8s8" (as "dot_u8s8"),
    "matmul_s8s8" (2 x 8 by 8 x 2 products added to 2 x 2 int32), "mul_s8" (s8 x s8 to int16),
    "mul_s16" (int16 x int16 to int32),
    "sign_i8" (the first operand with the sign of the second),
    "pairs_i16" (neighbouring int16 added to int32), "gather_f32" (float32 at int32 indices),
    "table_4" and "table_4_else" (16 indices into 64 bytes; others give 0, or keep a byte)."""
    tiles: TileKind = "none"
    """What multiplies tiles of 16 x 64 bytes, beside `dot` on vectors: "tdpbusd" is AMX-INT8."""
    mcpus: tuple[str, ...] = ()
    """Processors that may be named in place of `mcpu`, for their scheduling model."""
    halves: bool = False
    """Whether vectors of float16 are multiplied and added, twice as many lanes as of float32."""

    @property
    def architecture(self) -> str:
        """The processor family, "x86_64" or "aarch64"."""
        return self.mtriple.split("-")[0]

    @property
    def adds_to_int32(self) -> bool:
        """Whether the dot instruction adds products into int32: exact for all operands."""
        return self.dot in ("vpdpbusd", "sdot", "smmla")

    @property
    def saturates(self) -> bool:
        """Whether float32 too large for int32 converts to the nearest int32, as on ARM."""
        return self.architecture == "aarch64"

    @property
    def dot_operation(self) -> str:
        """The intrinsic that adds four neighbouring products of the row's operands to int32."""
        return "dot_s8s8" if self.a_dtype == "int8" else "dot_u8s8"

    def lanes(self, bits: int | None = None) -> int:
        """How many 32-bit lanes a vector of `bits` (default: the widest) has."""
        return (self.vector_bits if bits is None else bits) // 32

    def intrinsic(self, operation: str, bits: int) -> str | None:
        """The LLVM name of `operation` on vectors of `bits`, or None where the row has none."""
        return self.intrinsics.get((operation, bits))


_SSE2: dict[IntrinsicKey, str] = {
    ("madd_i16", 128): "llvm.x86.sse2.pmadd.wd",
    ("sum_u8", 128): "llvm.x86.sse2.psad.bw",
    ("round_i32", 128): "llvm.x86.sse2.cvtps2dq",
    ("pack_i16", 128): "llvm.x86.sse2.packssdw.128",
    ("pack_u8", 128): "llvm.x86.sse2.packuswb.128",
    ("pack_i8", 128): "llvm.x86.sse2.packsswb.128",
}
_AVX2: dict[IntrinsicKey, str] = {
    **_SSE2,
    ("madd_u8s8", 128): "llvm.x86.ssse3.pmadd.ub.sw.128",
    ("madd_u8s8", 256): "llvm.x86.avx2.pmadd.ub.sw",
    ("madd_i16", 256): "llvm.x86.avx2.pmadd.wd",
    ("sum_u8", 256): "llvm.x86.avx2.psad.bw",
    ("round_i32", 256): "llvm.x86.avx.cvt.ps2dq.256",
    ("gather_f32", 256): "llvm.x86.avx2.gather.d.ps.256",
    ("pack_i16", 256): "llvm.x86.avx2.packssdw",
    ("pack_u8", 256): "llvm.x86.avx2.packuswb",
    ("pack_i8", 256): "llvm.x86.avx2.packsswb",
    ("sign_i8", 256): "llvm.x86.avx2.psign.b",
}
# AVX-VNNI (VEX) and AVX512-VNNI (EVEX) share the LLVM intrinsic; the features choose the encoding.
_AVXVNNI: dict[IntrinsicKey, str] = {
    **_AVX2,
    ("dot_u8s8", 128): "llvm.x86.avx512.vpdpbusd.128",
    ("dot_u8s8", 256): "llvm.x86.avx512.vpdpbusd.256",
}
_AVX512VNNI: dict[IntrinsicKey, str] = {
    **_AVXVNNI,
    ("dot_u8s8", 512): "llvm.x86.avx512.vpdpbusd.512",
    ("madd_i16", 512): "llvm.x86.avx512.pmaddw.d.512",
    ("sum_u8", 512): "llvm.x86.avx512.psad.bw.512",
    ("madd_u8s8", 512): "llvm.x86.avx512.pmaddubs.w.512",
    ("round_i32", 512): "llvm.x86.avx512.mask.cvtps2dq.512",
    ("gather_f32", 512): "llvm.x86.avx512.mask.gather.dps.512",
    ("pack_i16", 512): "llvm.x86.avx512.packssdw.512",
    ("pack_u8", 512): "llvm.x86.avx512.packuswb.512",
    ("pack_i8", 512): "llvm.x86.avx512.packsswb.512",
}
_AVX2_FEATURES = ("avx2", "fma", "f16c", "bmi1", "bmi2", "movbe")
_AVX512VNNI_FEATURES = (
    *_AVX2_FEATURES,
    "avx512f",
    "avx512bw",
    "avx512cd",
    "avx512dq",
    "avx512vl",
    "avx512_vnni",
)

_NEON: dict[IntrinsicKey, str] = {
    ("mul_s8", 128): "llvm.aarch64.neon.smull",
    ("mul_s16", 128): "llvm.aarch64.neon.smull",
    ("pairs_i16", 128): "llvm.aarch64.neon.saddlp",
    ("round_i32", 128): "llvm.aarch64.neon.fcvtns",
    ("table_4", 128): "llvm.aarch64.neon.tbl4",
    ("table_4_else", 128): "llvm.aarch64.neon.tbx4",
}
_DOTPROD: dict[IntrinsicKey, str] = {
    **_NEON,
    ("dot_s8s8", 128): "llvm.aarch64.neon.sdot",
}
_I8MM: dict[IntrinsicKey, str] = {
    **_DOTPROD,
    ("matmul_s8s8", 128): "llvm.aarch64.neon.smmla",
}
# What LLVM could use by itself, without being asked to, on some processor that a user may name.
# Switched off, so that a row's code needs the row's features and no more, whatever the processor.
_ARM_WITHOUT = (
    "-bf16",
    "-complxnum",
    "-cssc",
    "-fp16fml",
    "-rdm",
    "-sha3",
    "-sve",
)

_ROWS = (
    Isa(
        name="x86-64",
        mtriple="x86_64-unknown-linux-gnu",
        mcpu="x86-64",
        mattr=(),
        cpu_features=("sse2",),
        vector_bits=128,
        vector_registers=16,
        dot="none",
        k_group=4,
        a_dtype="uint8",
        b_dtype="int8",
        fma=False,
        intrinsics=MappingProxyType(_SSE2),
    ),
    Isa(
        name="x86-avx2",
        mtriple="x86_64-unknown-linux-gnu",
        mcpu="x86-64-v3",
        mattr=(),
        cpu_features=_AVX2_FEATURES,
        vector_bits=256,
        vector_registers=16,
        dot="maddubs",
        k_group=4,
        a_dtype="uint8",
        b_dtype="int8",
        fma=True,
        intrinsics=MappingProxyType(_AVX2),
    ),
    Isa(
        name="x86-avxvnni",
        mtriple="x86_64-unknown-linux-gnu",
        mcpu="x86-64-v3",
        mattr=("+avxvnni",),
        cpu_features=(*_AVX2_FEATURES, "avx_vnni"),
        vector_bits=256,
        vector_registers=16,
        dot="vpdpbusd",
        k_group=4,
        a_dtype="uint8",
        b_dtype="int8",
        fma=True,
        intrinsics=MappingProxyType(_AVXVNNI),
    ),
    Isa(
        name="x86-avx512vnni",
        mtriple="x86_64-unknown-linux-gnu",
        mcpu="x86-64-v4",
        mattr=("+avx512vnni",),
        cpu_features=_AVX512VNNI_FEATURES,
        vector_bits=512,
        vector_registers=32,
        dot="vpdpbusd",
        k_group=4,
        a_dtype="uint8",
        b_dtype="int8",
        fma=True,
        intrinsics=MappingProxyType(_AVX512VNNI),
    ),
    Isa(
        name="x86-amx",
        mtriple="x86_64-unknown-linux-gnu",
        mcpu="x86-64-v4",
        mattr=("+avx512vnni", "+amx-tile", "+amx-int8"),
        cpu_features=(*_AVX512VNNI_FEATURES, "amx_tile", "amx_int8"),
        vector_bits=512,
        vector_registers=32,
        dot="vpdpbusd",
        k_group=4,
        a_dtype="uint8",
        b_dtype="int8",
        fma=True,
        intrinsics=MappingProxyType(_AVX512VNNI),
        tiles="tdpbusd",
    ),
    Isa(
        name="arm-neon",
        mtriple="aarch64-unknown-linux-gnu",
        mcpu="cortex-a72",
        mattr=("-dotprod", "-fullfp16", "-i8mm", *_ARM_WITHOUT),
        cpu_features=("asimd",),
        vector_bits=128,
        vector_registers=32,
        dot="smlal",
        k_group=4,
        a_dtype="int8",
        b_dtype="int8",
        fma=True,
        intrinsics=MappingProxyType(_NEON),
        mcpus=("cortex-a35", "cortex-a53", "cortex-a57", "cortex-a72", "cortex-a73"),
    ),
    Isa(
        name="arm-dotprod",
        mtriple="aarch64-unknown-linux-gnu",
        mcpu="cortex-a76",
        mattr=("+dotprod", "+fullfp16", "-i8mm", *_ARM_WITHOUT),
        cpu_features=("asimd", "asimddp", "asimdhp"),
        vector_bits=128,
        vector_registers=32,
        dot="sdot",
        k_group=4,
        a_dtype="int8",
        b_dtype="int8",
        fma=True,
        intrinsics=MappingProxyType(_DOTPROD),
        mcpus=(
            "cortex-a55",
            "cortex-a75",
            "cortex-a76",
            "cortex-a77",
            "cortex-a78",
            "cortex-x1",
            "neoverse-n1",
            "apple-m1",
        ),
        halves=True,
    ),
    Isa(
        name="arm-i8mm",
        mtriple="aarch64-unknown-linux-gnu",
        mcpu="neoverse-v1",
        mattr=("+dotprod", "+fullfp16", "+i8mm", *_ARM_WITHOUT),
        cpu_features=("asimd", "asimddp", "asimdhp", "i8mm"),
        vector_bits=128,
        vector_registers=32,
        dot="smmla",
        k_group=8,
        a_dtype="int8",
        b_dtype="int8",
        fma=True,
        intrinsics=MappingProxyType(_I8MM),
        mcpus=(
            "cortex-a510",
            "cortex-a710",
            "cortex-a715",
            "cortex-x2",
            "cortex-x3",
            "neoverse-n2",
            "neoverse-v1",
            "neoverse-v2",
            "apple-m2",
        ),
        halves=True,
    ),
)

ISA_TABLE: Mapping[str, Isa] = MappingProxyType({row.name: row for row in _ROWS})
"""All rows by name, those of one architecture from the least to the most capable."""


def isa_named(name: str) -> Isa:
    """Return the row called `name`.

    Raises:
        UnknownTargetError: no such row; the message lists the rows.
    """
    if name not in ISA_TABLE:
        raise UnknownTargetError(
            f"no instruction set named {name!r}: the rows are {', '.join(ISA_TABLE)}"
        )
    return ISA_TABLE[name]


def with_processor(isa: Isa, mcpu: str) -> Isa:
    """Return the row with another processor's scheduling model; the instructions stay the row's.

    Raises:
        UnknownTargetError: not one of the processors known to have the row's features.
    """
    if mcpu != isa.mcpu and mcpu not in isa.mcpus:
        known = ", ".join(isa.mcpus) or "none but its own"
        raise UnknownTargetError(
            f"target {isa.name} cannot be built for the processor {mcpu!r}: known are {known}",
            hint=f"leave it out: {isa.name} runs on every CPU with {', '.join(isa.cpu_features)}",
        )
    return replace(isa, mcpu=mcpu)


def runnable(isa: Isa) -> bool:
    """Whether this machine can run code built for `isa`."""
    if missing_features(isa.cpu_features):
        return False
    return isa.tiles == "none" or allow_tiles()


def tvm_target(isa: Isa) -> Any:
    """The TVM target of the row (imports TVM)."""
    import tvm  # heavy: one to two seconds, so only when a kernel is built

    description: dict[str, Any] = {"kind": "llvm", "mtriple": isa.mtriple, "mcpu": isa.mcpu}
    if isa.mattr:
        description["mattr"] = list(isa.mattr)
    return tvm.target.Target(description)
