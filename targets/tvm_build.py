# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""IRModule -> shared library: the Relax pipeline, LLVM, and the link."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

from qcompiler.errors import CodegenError, QCompilerError
from qcompiler.linker import export_library
from qcompiler.passmanager import ProgressFn, no_progress

# The runtime checks the inputs by name before the VM sees them, and the parameters are ours:
# the VM's own checks would cost two calls per argument in every run.
_CHECKS = frozenset({"vm.builtin.check_tensor_info", "vm.builtin.match_shape"})


def relax_pipeline(note_memory: Callable[[int], None] | None = None) -> Any:
    """Return the passes from our `main` to VM code: views, memory planning, no op fusion.

    `note_memory` is told the greatest number of bytes that the planned tensors take at once.
    """
    import tvm
    from tvm import relax

    def drop_checks(module: Any, _ctx: Any) -> Any:
        main = module["main"]
        body = main.body
        blocks = []
        for block in body.blocks:
            kept = [b for b in block.bindings if not _is_check(b)]
            blocks.append(relax.BindingBlock(kept))
        new = relax.Function(
            main.params,
            relax.SeqExpr(blocks, body.body),
            main.ret_ty,
            main.is_pure,
            main.attrs,
        )
        module.update_func(module.get_global_var("main"), new)
        return module

    def note(module: Any, _ctx: Any) -> Any:
        if note_memory is not None:
            note_memory(peak_memory(module["main"]))
        return module

    return tvm.transform.Sequential(
        [
            # No LegalizeOps: main holds calls of kernels, and reshapes that must stay views.
            relax.transform.ToNonDataflow(),
            relax.transform.RemovePurityChecking(),
            relax.transform.CallTIRRewrite(),
            relax.transform.StaticPlanBlockMemory(),
            relax.transform.LowerAllocTensor(),
            relax.transform.KillAfterLastUse(),
            tvm.transform.module_pass(note, opt_level=0, name="NoteMemory"),
            relax.transform.LowerRuntimeBuiltin(),
            relax.transform.ComputePrimValue(),
            relax.transform.VMShapeLower(),
            tvm.transform.module_pass(drop_checks, opt_level=0, name="DropArgumentChecks"),
            relax.transform.AttachGlobalSymbol(),
        ]
    )


def peak_memory(main: Any) -> int:
    """Return the bytes that the tensors of a planned `main` take at once, at most.

    A storage is held as long as it or any tensor in it is; arguments (inputs, parameters) and work
    areas inside kernels are not counted.
    """
    size: dict[Any, int] = {}
    storage_of: dict[Any, Any] = {}  # variable -> the storage that it keeps
    alive: dict[Any, set[Any]] = {}
    now = most = 0
    for block in main.body.blocks:
        for binding in block.bindings:
            var, call = binding.var, binding.value
            name = getattr(getattr(call, "op", None), "name", "")
            arguments: Any = getattr(call, "args", ())
            if name == "relax.memory.alloc_storage":
                size[var] = int(arguments[0].values[0])
                storage_of[var], alive[var] = var, {var}
                now += size[var]
            elif name in ("relax.memory.alloc_tensor", "relax.reshape"):
                held = storage_of.get(arguments[0])
                if held is not None:
                    storage_of[var] = held
                    alive[held].add(var)
            elif name in ("relax.memory.kill_storage", "relax.memory.kill_tensor"):
                held = storage_of.get(arguments[0])
                if held is not None and arguments[0] in alive[held]:
                    alive[held].discard(arguments[0])
                    now -= 0 if alive[held] else size[held]
            elif call in storage_of:  # a second name of the same tensor
                storage_of[var] = storage_of[call]
                alive[storage_of[call]].add(var)
            most = max(most, now)
    return most


def _is_check(binding: Any) -> bool:
    from tvm import relax

    value = binding.value
    op = getattr(value, "op", None)
    return isinstance(op, relax.ExternFunc) and str(op.global_symbol) in _CHECKS


def workload_digests(module: Any, target: Any) -> dict[str, str]:
    """Return kernel symbol -> digest of its code for a target, the same in every process."""
    import tvm_ffi
    from tvm import tirx

    found = {}
    for symbol, function in module.functions.items():
        if not isinstance(function, tirx.PrimFunc):
            continue
        if function.attrs is not None and "global_symbol" in function.attrs:
            function = function.without_attr("global_symbol")
        code = tvm_ffi.structural_hash(function) & (2**64 - 1)
        found[str(symbol.name_hint)] = hashlib.sha256(f"{code} {target}".encode()).hexdigest()[:32]
    return found


def build_library(
    module: Any,
    target: Any,
    triple: str,
    progress: ProgressFn = no_progress,
    note_memory: Callable[[int], None] | None = None,
) -> bytes:
    """Compile and link a module; the same module gives the same bytes.

    `note_memory`: see `relax_pipeline`.

    Raises:
        CodegenError: TVM or the linker failed.
    """
    import tvm

    progress("build", 0, 2)
    try:
        with target:
            executable = tvm.compile(
                module, target=target, relax_pipeline=relax_pipeline(note_memory)
            )
        progress("build", 1, 2)
        library = export_library(executable, triple=triple)
    # TVM raises its own and Python's errors alike; all of them mean that code we made was refused.
    except Exception as error:
        if isinstance(error, QCompilerError):
            raise
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise CodegenError(
            f"TVM could not build the model for {triple}: {lines[0]}",
            hint="this is a defect of qcompiler; please report it with the model",
        ) from error
    progress("build", 2, 2)
    return library
