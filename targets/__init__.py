# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""Targets and their backends, importable as qcompiler.targets."""
