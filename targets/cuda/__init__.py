# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""NVIDIA GPUs: kernels in CUDA C++ (docs/cuda.md, docs/adr). No GPU is needed to compile."""
