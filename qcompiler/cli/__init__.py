# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""The command line, `qcompile`: a thin layer over the Python interface.

Importing it imports neither TVM nor ONNX; each command imports what it needs when it runs.
"""

from qcompiler.cli.app import main

__all__ = ["main"]
