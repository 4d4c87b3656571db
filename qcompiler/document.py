# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""What is kept as a JSON file: plans, tables, reports of an analysis."""

from __future__ import annotations

import json
import os
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from typing_extensions import Self

from qcompiler.errors import UsageError

Kept = TypeVar("Kept", bound="Document")


class Document(ABC):
    """Something with a JSON form that a file can hold."""

    title: ClassVar[str]
    """What messages call it."""
    indent: ClassVar[int | None] = 1
    """Of the file's lines; None for one line."""

    @abstractmethod
    def to_json(self) -> dict[str, Any]:
        """Return the JSON form."""

    @classmethod
    @abstractmethod
    def from_json(cls: type[Kept], doc: object) -> Kept:
        """Return what `to_json` wrote.

        Raises:
            UsageError: Not such a document, another format version, or damaged.
        """

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the JSON form to a file.

        Raises:
            OSError: The file cannot be written.
        """
        Path(path).write_text(json.dumps(self.to_json(), indent=self.indent) + "\n")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Read what `save` wrote.

        Raises:
            UsageError: The file cannot be read or holds no such document.
        """
        try:
            doc = json.loads(Path(path).read_text())
        except (OSError, ValueError) as error:
            raise UsageError(f"cannot read the {cls.title} {str(path)!r}: {error}") from None
        return cls.from_json(doc)
