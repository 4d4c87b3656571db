# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""Load the scripts of models/, which is a folder of files and not an installed package."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

MODELS = Path(__file__).resolve().parents[2] / "models"


def load(name: str) -> ModuleType:
    alias = f"qcompiler_models_test_{name}"
    if alias not in sys.modules:
        spec = importlib.util.spec_from_file_location(alias, MODELS / f"{name}.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[alias] = module
        spec.loader.exec_module(module)
    return sys.modules[alias]


@pytest.fixture(scope="session")
def builders() -> ModuleType:
    return load("builders")


@pytest.fixture(scope="session")
def catalogue() -> ModuleType:
    return load("catalogue")
