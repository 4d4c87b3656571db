# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""Write docs/operators.md from the registry of converters: python tools/operators.py [FILE]."""

from __future__ import annotations

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

HEAD = """\
<!-- SPDX-FileCopyrightText: The qcompiler authors -->
<!-- SPDX-License-Identifier: Apache-2.0 -->
<!-- Written by tools/operators.py from the registry; tests/test_operators_doc.py compares. -->
# Operators

Opsets {oldest} to {newest}, and {first} to {before} where ONNX's own converter takes the model.
An operator of a model gets into the compiler in one of these ways, tried in this order:

1. **It is folded** where its operands are constants: shape arithmetic, and whatever depends on
   weights alone.
2. **It has a converter**: the lists below. Most become one operator of the compiler, with kernels
   in floats and, where quantization meets them, in integers; some become several.
3. **ONNX defines it as a function** of simpler operators (`Swish`, `GroupNormalization`,
   `RotaryEmbedding`, `Attention`, ...): its body is imported.
4. **It stays whole** and TVM compiles it in floats: `TopK`, `GatherElements`, `ScatterND`,
   `GridSample`, ...
5. **It is refused** with `UnsupportedOpError` or `UnsupportedByTargetError`, which name the
   operator, the node and the reason; all operators that cannot be imported are named at once.

What is refused on purpose: results whose shape depends on data (`NonZero`, `Unique`, `Compress`,
`NonMaxSuppression`), random numbers, training, sequences, optionals, strings, and tensors of
8-bit floats, 4-bit floats and 2-bit integers. `tests/onnx_backend_table.txt` says what comes of
every one of ONNX's own backend tests, with the reason of each refusal: {summary}.

Tensors of `int4` and `uint4` are held one value to a byte, also where they are inputs or results: a
call takes and returns `int8` or `uint8` arrays with values from -8 to 7, or 0 to 15, and refuses
others by the input's name. `Cast` and `CastLike` to 4 bits drop the higher bits, as ONNX says of
integers and its tests expect of floats (9.7 is -7 as `int4`); NaN and infinities, of which it says
nothing, become 0. `QuantizeLinear` saturates.

`Resize` with `align_corners`, `linear` or `cubic`, and scales that give no whole size follows
ONNX's formula, where ONNX Runtime (and PyTorch) take the rounded size; models with `sizes` do not
differ.

## Converters
"""

TITLES = {
    "": "ONNX (`ai.onnx`)",
    "com.microsoft": "ONNX Runtime (`com.microsoft`)",
}

TAIL = """
`DynamicQuantizeLSTM` takes the values of its stored weights and runs in floats; the other
quantized operators become integer kernels
([accuracy.md](accuracy.md#models-that-are-quantized-already)).

## Control flow

`If`, `Loop`, `Scan`: [hybrid.md](hybrid.md#control-flow).
"""


def summary() -> str:
    """Return the counts of the backend tests' table."""
    text = (ROOT / "tests" / "onnx_backend_table.txt").read_text(encoding="utf-8")
    found = re.search(r"(\d+) counted:\n# (\d+) pass \(([\d.]+) %\)", text)
    if found is None:
        raise SystemExit("tests/onnx_backend_table.txt holds no counts")
    counted, passed, share = found.groups()
    return f"{passed} of {counted} pass ({share} %)"


def page() -> str:
    """Return the page."""
    from qcompiler.onnx_import import CONVERTER_MODULES
    from qcompiler.onnx_import_context import CONVERTERS
    from qcompiler.onnx_import_model import MAX_OPSET, MIN_OPSET, OLDEST_OPSET

    assert CONVERTER_MODULES
    parts = [
        HEAD.format(
            oldest=MIN_OPSET,
            newest=MAX_OPSET,
            first=OLDEST_OPSET,
            before=MIN_OPSET - 1,
            summary=summary(),
        )
    ]
    for domain in sorted({d for d, _ in CONVERTERS}):
        names = sorted(op for d, op in CONVERTERS if d == domain)
        parts.append(f"\n### {TITLES.get(domain, domain)}\n\n{_wrapped(names)}\n")
    return "".join(parts) + TAIL


def _wrapped(names: list[str]) -> str:
    """Return the names in lines of up to 98 characters."""
    lines, line = [], ""
    for i, name in enumerate(names):
        word = f"`{name}`" + ("," if i < len(names) - 1 else "")
        if line and len(line) + len(word) > 98:
            lines.append(line)
            line = word
        else:
            line = f"{line} {word}".strip()
    return "\n".join([*lines, line])


def main(argv: list[str]) -> int:
    """Write the page."""
    target = Path(argv[0]) if argv else ROOT / "docs" / "operators.md"
    target.write_text(page(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
