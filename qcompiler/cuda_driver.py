# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""The CUDA driver and NVRTC through ctypes: all that a machine with a GPU needs to run a model.

Both are looked up when they are needed. QCOMPILER_LIBCUDA and QCOMPILER_LIBNVRTC name other files
than the loader would find.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
from collections.abc import Sequence
from ctypes import POINTER, byref, c_char_p, c_int, c_size_t, c_uint, c_ulonglong, c_void_p
from typing import Any

from qcompiler.errors import ArtifactError, CodegenError, QCompilerError, UnsupportedByTargetError

LIBCUDA, LIBNVRTC = "QCOMPILER_LIBCUDA", "QCOMPILER_LIBNVRTC"

# Every float operation is rounded by itself: no fused multiply-add, no approximations, no flushing.
FLAGS = ("-std=c++17", "--fmad=false", "--ftz=false", "--prec-div=true", "--prec-sqrt=true")

_OUT_OF_MEMORY = 2
_NO_BINARY = (200, 209, 218, 222)  # an image that this driver or GPU does not take
_MAJOR, _MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_*
_MAX_SHARED = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
_NO_GPU = "run it on a machine with an NVIDIA GPU and its driver, or compile for target 'host'"

_FUNCTIONS: dict[str, tuple[Any, ...]] = {
    "cuInit": (c_uint,),
    "cuDriverGetVersion": (POINTER(c_int),),
    "cuDeviceGetCount": (POINTER(c_int),),
    "cuDeviceGet": (POINTER(c_int), c_int),
    "cuDeviceGetName": (c_char_p, c_int, c_int),
    "cuDeviceGetAttribute": (POINTER(c_int), c_int, c_int),
    "cuDevicePrimaryCtxRetain": (POINTER(c_void_p), c_int),
    "cuCtxPushCurrent_v2": (c_void_p,),
    "cuCtxPopCurrent_v2": (POINTER(c_void_p),),
    "cuMemGetInfo_v2": (POINTER(c_size_t), POINTER(c_size_t)),
    "cuMemAlloc_v2": (POINTER(c_void_p), c_size_t),
    "cuMemFree_v2": (c_void_p,),
    "cuMemHostAlloc": (POINTER(c_void_p), c_size_t, c_uint),
    "cuMemFreeHost": (c_void_p,),
    "cuMemcpyHtoD_v2": (c_void_p, c_void_p, c_size_t),
    "cuMemcpyHtoDAsync_v2": (c_void_p, c_void_p, c_size_t, c_void_p),
    "cuMemcpyDtoHAsync_v2": (c_void_p, c_void_p, c_size_t, c_void_p),
    "cuMemsetD8Async": (c_void_p, ctypes.c_ubyte, c_size_t, c_void_p),
    "cuModuleLoadData": (POINTER(c_void_p), c_void_p),
    "cuModuleUnload": (c_void_p,),
    "cuModuleGetFunction": (POINTER(c_void_p), c_void_p, c_char_p),
    "cuFuncSetAttribute": (c_void_p, c_int, c_int),
    "cuLaunchKernel": (c_void_p, *(c_uint,) * 7, c_void_p, c_void_p, c_void_p),
    "cuStreamCreate": (POINTER(c_void_p), c_uint),
    "cuStreamDestroy_v2": (c_void_p,),
    "cuStreamSynchronize": (c_void_p,),
    "cuStreamBeginCapture_v2": (c_void_p, c_int),
    "cuStreamEndCapture": (c_void_p, POINTER(c_void_p)),
    "cuGraphInstantiateWithFlags": (POINTER(c_void_p), c_void_p, c_ulonglong),
    "cuGraphDestroy": (c_void_p,),
    "cuGraphExecDestroy": (c_void_p,),
    "cuGraphLaunch": (c_void_p, c_void_p),
    "cuEventCreate": (POINTER(c_void_p), c_uint),
    "cuEventDestroy_v2": (c_void_p,),
    "cuEventRecord": (c_void_p, c_void_p),
    "cuEventSynchronize": (c_void_p,),
    "cuEventElapsedTime": (POINTER(ctypes.c_float), c_void_p, c_void_p),
}


class CudaError(QCompilerError):
    """A call of the driver failed; `code` is the CUresult."""

    def __init__(self, message: str, code: int, **fields: Any) -> None:
        super().__init__(message, **fields)
        self.code = code


class Driver:
    """The driver library and the device that models run on (the first visible one).

    Attributes:
        name: Name of the GPU.
        capability: Its compute capability times 10.
        context: The device's primary context, shared with other CUDA users of the process.
    """

    def __init__(self, library: ctypes.CDLL) -> None:
        """Start the driver.

        Raises:
            UnsupportedByTargetError: No device, or a driver that lacks a function.
        """
        self._library = library
        try:
            for function_name, arguments in _FUNCTIONS.items():
                function = getattr(library, function_name)
                function.argtypes = arguments
                function.restype = c_int
        except AttributeError as error:
            raise UnsupportedByTargetError(
                f"the NVIDIA driver is too old: {error}", hint="install driver 470 or later"
            ) from error
        code = library.cuInit(0)
        count = c_int()
        if code == 0:
            code = library.cuDeviceGetCount(byref(count))
        if code or not count.value:
            reason = self._error(code) if code else "it lists none"
            raise UnsupportedByTargetError(
                f"the NVIDIA driver finds no GPU here: {reason}", hint=_NO_GPU
            )
        self.device = self.get("cuDeviceGet", c_int, 0).value
        called = ctypes.create_string_buffer(256)
        self.call("cuDeviceGetName", called, 256, self.device)
        self.name = called.value.decode(errors="replace")
        major, minor = (self.attribute(a) for a in (_MAJOR, _MINOR))
        self.capability = major * 10 + minor
        self.context = self.get("cuDevicePrimaryCtxRetain", c_void_p, self.device).value

    def _error(self, code: int) -> str:
        words = []
        for name in ("cuGetErrorName", "cuGetErrorString"):
            text = c_char_p()
            function = getattr(self._library, name)
            function.argtypes = (c_int, POINTER(c_char_p))
            if function(code, byref(text)) == 0 and text.value:
                words.append(text.value.decode(errors="replace"))
        return ": ".join(dict.fromkeys(words)) or f"error {code}"

    def call(self, function: str, *arguments: Any) -> None:
        """Call a function of the driver.

        Raises:
            CudaError: It did not succeed.
        """
        code = getattr(self._library, function)(*arguments)
        if code:
            raise CudaError(f"{function} failed: {self._error(code)}", code)

    def get(self, function: str, kind: Any, *arguments: Any) -> Any:
        """Call a function whose first argument receives its result; return that ctypes value."""
        result = kind()
        self.call(function, byref(result), *arguments)
        return result

    def attribute(self, which: int) -> int:
        """Return an attribute of the device."""
        return int(self.get("cuDeviceGetAttribute", c_int, which, self.device).value)

    @contextlib.contextmanager
    def current(self) -> Any:
        """Make the context current in the calling thread for a block."""
        self.call("cuCtxPushCurrent_v2", self.context)
        try:
            yield
        finally:
            self.get("cuCtxPopCurrent_v2", c_void_p)

    def allocate(self, nbytes: int, what: str) -> int:
        """Return the address of new device memory.

        Raises:
            UnsupportedByTargetError: The GPU has no room; the message says how much is free.
        """
        try:
            return int(self.get("cuMemAlloc_v2", c_void_p, max(nbytes, 1)).value or 0)
        except CudaError as error:
            if error.code != _OUT_OF_MEMORY:
                raise
            free, total = c_size_t(), c_size_t()
            self.call("cuMemGetInfo_v2", byref(free), byref(total))
            raise UnsupportedByTargetError(
                f"the GPU ({self.name}) has no room for {what}: {nbytes / 1e6:.1f} MB needed, "
                f"{free.value / 1e6:.1f} of {total.value / 1e6:.1f} MB free",
                hint="end other processes on the GPU, or compile for a smaller batch",
            ) from error

    def load_module(self, image: bytes, shared: dict[str, int]) -> tuple[int, dict[str, int]]:
        """Return the module of a fatbin or cubin, and its functions by name.

        Args:
            image: What nvcc or NVRTC made.
            shared: Names of the kernels and the dynamic shared memory that each may use, bytes.

        Raises:
            UnsupportedByTargetError: The image is not for this GPU or driver.
            ArtifactError: A kernel is missing.
        """
        try:
            module = self.get("cuModuleLoadData", c_void_p, image).value
        except CudaError as error:
            if error.code in _NO_BINARY:
                raise UnsupportedByTargetError(
                    f"the driver takes no kernel of this model for {self.name} (compute "
                    f"capability {self.capability / 10:.1f}): {error.message}",
                    hint="update the driver, or compile for this GPU",
                ) from error
            raise
        functions: dict[str, int] = {}
        for name, nbytes in shared.items():
            try:
                function = self.get("cuModuleGetFunction", c_void_p, module, name.encode()).value
            except CudaError as error:
                raise ArtifactError(f"the model's code lacks the kernel {name}") from error
            if nbytes > 48 << 10:  # more has to be asked for
                self.call("cuFuncSetAttribute", function, _MAX_SHARED, nbytes)
            functions[name] = function
        return int(module), functions


@functools.cache
def driver() -> Driver:
    """Load the driver, once per process.

    Raises:
        UnsupportedByTargetError: No driver, or no GPU.
    """
    name = os.environ.get(LIBCUDA) or "libcuda.so.1"
    try:
        library = ctypes.CDLL(name)
    except OSError as error:
        raise UnsupportedByTargetError(
            f"there is no NVIDIA driver on this machine: {error}", hint=_NO_GPU
        ) from error
    return Driver(library)


def check_device(isa: str, what: str) -> None:
    """Check that a GPU here runs code for an instruction set such as "sm_80".

    Raises:
        UnsupportedByTargetError: No driver, no GPU, or an older one.
    """
    needed = int(isa.removeprefix("sm_"))
    found = driver()
    if found.capability < needed:
        raise UnsupportedByTargetError(
            f"{what} was compiled for compute capability {needed / 10:.1f}, this GPU "
            f"({found.name}) has {found.capability / 10:.1f}",
            hint=f"compile for target 'cuda-sm{found.capability}' or an earlier one",
        )


# --- NVRTC ---


NVRTC_NAMES = ("libnvrtc.so.13", "libnvrtc.so.12", "libnvrtc.so.11.2", "libnvrtc.so")
"""Where NVRTC is looked for after what QCOMPILER_LIBNVRTC names."""


@functools.cache
def _nvrtc() -> ctypes.CDLL:
    names = [os.environ.get(LIBNVRTC) or "", *NVRTC_NAMES]
    problems = []
    for name in filter(None, names):
        try:
            return ctypes.CDLL(name)
        except OSError as error:
            problems.append(str(error))
    raise UnsupportedByTargetError(
        f"the model holds CUDA source, and there is no NVRTC to compile it: {problems[0]}",
        hint="install NVRTC (pip install nvidia-cuda-nvrtc), or compile where nvcc is",
    )


def compile_source(source: bytes, capability: int, options: Sequence[str] = FLAGS) -> bytes:
    """Compile CUDA C++ for a GPU with NVRTC and return the cubin.

    Raises:
        UnsupportedByTargetError: No NVRTC.
        CodegenError: It refused the source.
    """
    library = _nvrtc()
    program = c_void_p()
    create = library.nvrtcCreateProgram
    create.argtypes = (POINTER(c_void_p), c_char_p, c_char_p, c_int, c_void_p, c_void_p)
    if create(byref(program), source, b"kernels.cu", 0, None, None):
        raise CodegenError("NVRTC does not take the kernels")
    try:
        texts = [*options, f"--gpu-architecture=sm_{capability}"]
        array = (c_char_p * len(texts))(*(t.encode() for t in texts))
        library.nvrtcCompileProgram.argtypes = (c_void_p, c_int, c_void_p)
        code = library.nvrtcCompileProgram(program, len(texts), array)
        if code:
            log = _nvrtc_bytes(library, program, "ProgramLog")
            raise CodegenError(
                f"NVRTC refused the kernels: {log.decode(errors='replace').strip()[-2000:]}",
                hint="this is a defect of qcompiler; please report it with the model",
            )
        return _nvrtc_bytes(library, program, "CUBIN")
    finally:
        library.nvrtcDestroyProgram.argtypes = (POINTER(c_void_p),)
        library.nvrtcDestroyProgram(byref(program))


def _nvrtc_bytes(library: ctypes.CDLL, program: c_void_p, what: str) -> bytes:
    size = c_size_t()
    ask, take = getattr(library, f"nvrtcGet{what}Size"), getattr(library, f"nvrtcGet{what}")
    ask.argtypes = (c_void_p, POINTER(c_size_t))
    take.argtypes = (c_void_p, c_char_p)
    if ask(program, byref(size)):
        raise CodegenError(f"NVRTC gives no {what}")
    buffer = ctypes.create_string_buffer(size.value)
    if take(program, buffer):
        raise CodegenError(f"NVRTC gives no {what}")
    return buffer.raw
