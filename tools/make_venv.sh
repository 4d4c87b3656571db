#!/usr/bin/env bash
# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
#
# make_venv.sh VENV [PYTHON]: make a virtual environment, or say plainly what is missing.
set -euo pipefail

venv=${1:?usage: make_venv.sh VENV [PYTHON]}
wanted=${2:-}

fail() {
  printf '%s\n' '' "$@" '' >&2
  exit 1
}

# A candidate counts only if it runs, has the right version and can make an environment.
usable() {
  "$1" -c '
import sys
if not (3, 10) <= sys.version_info[:2] <= (3, 13):
    raise SystemExit(1)
import ensurepip, venv
' >/dev/null 2>&1
}

if [[ -n $wanted ]]; then
  usable "$wanted" || fail \
    "PYTHON=$wanted cannot be used: it must run, be Python 3.10 to 3.13 and have the venv module." \
    "On Debian and Ubuntu the module is the package python3-venv."
  python=$wanted
else
  python=
  for candidate in python3.12 python3.11 python3.13 python3.10 python3 python; do
    if usable "$candidate"; then
      python=$candidate
      break
    fi
  done
  [[ -n $python ]] || fail \
    "No usable Python found: qcompiler needs Python 3.10, 3.11, 3.12 or 3.13 with the venv module." \
    "python3 here: $(python3 --version 2>/dev/null || echo none)" \
    "Install one (Debian, Ubuntu: apt install python3 python3-venv) or say make PYTHON=/path/to/python3.12 ..."
fi

# qcompiler links the kernels it generates with the system's compiler (qcompiler/linker.py).
compiler=${CC:-}
if [[ -z $compiler ]]; then
  for candidate in cc gcc clang c++ g++; do
    if command -v "$candidate" >/dev/null; then
      compiler=$candidate
      break
    fi
  done
fi
[[ -n $compiler ]] || fail \
  "No C compiler found: qcompiler links the kernels it generates with one (cc, gcc, clang, c++ or g++)." \
  "Install one (Debian, Ubuntu: apt install gcc; Fedora: dnf install gcc), or set CC to its path."

probe=$(mktemp -d)
trap 'rm -rf "$probe"' EXIT
echo 'int qcompiler_probe(void) { return 0; }' >"$probe/probe.c"
# The variable may hold a command with options, as in CC="ccache gcc".
# shellcheck disable=SC2086
$compiler -shared -fPIC -o "$probe/probe.so" "$probe/probe.c" 2>"$probe/log" || fail \
  "The C compiler '$compiler' cannot link a shared library. $(cat "$probe/log")" \
  "Install its C library headers (Debian, Ubuntu: apt install gcc libc6-dev), or set CC to another one."

echo "Making $venv with $("$python" --version 2>&1) ($(command -v "$python")), C compiler $compiler"
"$python" -m venv "$venv"
