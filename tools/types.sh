#!/usr/bin/env bash
# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
#
# types.sh [MYPY] [ARGS...]: mypy --strict over the packages under their installed names.
#
# The folders passes/ and targets/ are installed as qcompiler.passes and qcompiler.targets. In the
# checkout those names do not exist, and the import hook of an editable install is invisible to mypy.
# So mypy gets a tree of links in which the names are right; it needs no install and follows edits.
set -euo pipefail
cd "$(dirname "$0")/.."
mypy=${1:-mypy}
shift || true
root=$PWD
tree=$root/build/types

rm -rf "$tree"
mkdir -p "$tree/qcompiler"
for entry in "$root"/qcompiler/*; do
  [[ $(basename "$entry") == __pycache__ ]] || ln -s "$entry" "$tree/qcompiler/"
done
ln -s "$root/passes" "$tree/qcompiler/passes"
ln -s "$root/targets" "$tree/qcompiler/targets"

cd "$tree"
status=0
"$mypy" --config-file "$root/pyproject.toml" --cache-dir "$root/.mypy_cache" "$@" -p qcompiler ||
  status=$?
exit "$status"
