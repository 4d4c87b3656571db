# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""Work that an interrupted or repeated search finds again: files named by what they depend on.

A folder beside the tuning records where there are some, else `$XDG_CACHE_HOME/qcompiler`
(`~/.cache/qcompiler`); `QCOMPILER_CACHE` names another one. Everything in it can be deleted.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any

from qcompiler.errors import UsageError

__all__ = ["Cache", "cache_folder", "key_of", "write_whole"]


def key_of(*parts: object) -> str:
    """Return a digest of what a file depends on (values that JSON can hold)."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def cache_folder(records: str | os.PathLike[str] | None = None) -> Path:
    """Return where work is kept.

    Args:
        records: Tuning records, a file or a folder: the cache then lies beside them.
    """
    named = os.environ.get("QCOMPILER_CACHE")
    if named:
        return Path(named)
    if records is not None:
        path = Path(records)
        return (path if path.is_dir() else path.parent) / "qcompiler-cache"
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "qcompiler"


class Cache:
    """JSON documents in a folder. Where the folder cannot be written, nothing is kept.

    Attributes:
        folder: The folder in use.
        kept: Whether it outlives the process.
    """

    def __init__(self, folder: Path) -> None:
        self.kept = True
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if not os.access(folder, os.W_OK):
                raise PermissionError(folder)
        except OSError:
            self.kept = False
            self._temporary = tempfile.TemporaryDirectory(prefix="qcompiler-cache-")
            folder = Path(self._temporary.name)
        self.folder = folder

    def path(self, kind: str, key: str) -> Path:
        """Return the file of a kind of document."""
        return self.folder / f"{kind}-{key}.json"

    def load(self, kind: str, key: str) -> Any:
        """Return a document, or None where there is none that can be read."""
        try:
            return json.loads(self.path(kind, key).read_text())
        except (OSError, ValueError):
            return None

    def save(self, kind: str, key: str, document: object) -> None:
        """Keep a document; a kill leaves the old one or the new one.

        Raises:
            UsageError: There is no room for it.
        """
        write_whole(
            self.path(kind, key), json.dumps(document, indent=1, allow_nan=True) + "\n",
            "make room, or name another folder with QCOMPILER_CACHE; the same command goes on "
            "where it was",
        )  # fmt: skip


def write_whole(path: Path, text: str, hint: str) -> None:
    """Write a file that a kill leaves as it was, or has new.

    Raises:
        UsageError: The system refuses; `hint` says what to do.
    """
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        part.write_text(text)
        part.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            part.unlink()
        raise UsageError(f"cannot keep work in {path}: {error.strerror}", hint=hint) from error
