# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""`python -m qcompiler.cli` is `qcompile`."""

import sys

from qcompiler.cli.app import main

sys.exit(main())
