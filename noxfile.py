# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""Sessions for people who use nox; each does what the Makefile's target of that name does.

`nox -s test-3.10 test-3.13` runs the tests on several Pythons.
"""

from __future__ import annotations

import nox

nox.options.sessions = ["lint", "type", "test"]
PYTHONS = ["3.10", "3.11", "3.12", "3.13"]


def _install(session: nox.Session, extras: str = "dev") -> None:
    """Install the package the way a user gets it: built, not editable."""
    session.run("rm", "-rf", "build/lib", external=True)
    session.install(f".[{extras}]")


@nox.session
def lint(session: nox.Session) -> None:
    """Check style and formatting."""
    dev = nox.project.load_toml("pyproject.toml")["project"]["optional-dependencies"]["dev"]
    session.install(*(d for d in dev if d.startswith("ruff")))
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")


@nox.session(name="type")
def type_check(session: nox.Session) -> None:
    """Check types under the installed names."""
    _install(session)
    session.run("tools/types.sh", "mypy", external=True)


@nox.session(python=PYTHONS)
def test(session: nox.Session) -> None:
    """Run the default test suite against the installed package."""
    _install(session)
    session.run("pytest", "-n", "auto", "-m", "not slow and not timed", *session.posargs)
    session.run("pytest", "-m", "timed and not slow", *session.posargs, success_codes=[0, 5])


@nox.session
def golden(session: nox.Session) -> None:
    """Rewrite the golden files; read the difference before committing it."""
    _install(session)
    session.run("pytest", "--update-golden", *session.posargs)


@nox.session
def e2e(session: nox.Session) -> None:
    """Compile and run whole models, the long ones included."""
    _install(session)
    session.run("pytest", "-m", "e2e or slow", *session.posargs)


@nox.session
def bench(session: nox.Session) -> None:
    """Measure against the peers; pass the arguments of `qcompile bench` after --."""
    _install(session, "dev,bench")
    session.run("qcompile", "bench", *session.posargs)
