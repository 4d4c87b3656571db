# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""The command line, `qcompile`: a thin layer over the Python interface.

Importing it imports neither TVM nor ONNX; each command imports what it needs when it runs.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status.

    Args:
        argv: Arguments without the program's name; default: those of the process.
    """
    try:
        from qcompiler.cli.app import main as run
    except KeyboardInterrupt:  # Ctrl-C before there is anything that could say so
        sys.stderr.write("interrupted\n")
        return 130
    return run(argv)
