# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""Text of the CUDA C++ kernels; `source.py` puts it together for a model."""
