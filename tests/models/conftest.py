# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""Load the scripts of models/, which is a folder of files and not an installed package."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest
from by_path import imported

MODELS = Path(__file__).resolve().parents[2] / "models"


def load(name: str) -> ModuleType:
    return imported(f"qcompiler_models_test_{name}", MODELS / f"{name}.py")


@pytest.fixture(scope="session")
def builders() -> ModuleType:
    return load("builders")


@pytest.fixture(scope="session")
def catalogue() -> ModuleType:
    return load("catalogue")
