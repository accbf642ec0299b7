"""Compiles the CUDA C++ of this folder at run time (NVRTC) and loads it; no compiler to install.

torch's CUDA 13 wheels bring NVRTC and `cuda.bindings`, the only packages used here. Machine code
is kept in the cache folder under a hash of sources, options and compiler.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minference import env
from minference.errors import UnsupportedError
from minference.log import get_logger

SOURCES = Path(__file__).parent / "kernel"
ARCH = "sm_90a"


@dataclass(frozen=True)
class Build:
    """One compiled variant: what the C++ sees as macros."""

    head_dim: int
    element: str
    """bf16, f16 or e4m3."""
    softcap: bool = False
    output: str = "bf16"
    """What e4m3 writes; others write what they read."""
    k_stages: int = 2
    v_stages: int = 2
    q_tiles: int = 2
    producer_registers: int = 40
    consumer_registers: int = 232
    extra: tuple[str, ...] = ()

    def options(self) -> list[str]:
        """Options of NVRTC."""
        macros = {
            "HEAD_DIM": self.head_dim,
            "ELEMENT": f'"{self.element}"',
            "OUTPUT": f'"{self.output if self.element == "e4m3" else self.element}"',
            "FP8": int(self.element == "e4m3"),
            "SOFTCAP": int(self.softcap),
            "KEY_STAGES": self.k_stages,
            "VALUE_STAGES": self.v_stages,
            "Q_BUFFERS": self.q_tiles,
            "PRODUCER_REGISTERS": self.producer_registers,
            "CONSUMER_REGISTERS": self.consumer_registers,
        }
        defines = [f"-D{name}={value}" for name, value in macros.items()]
        return [f"-arch={ARCH}", "-std=c++17", *defines, *(f"-D{x}" for x in self.extra)]

    @property
    def shared_bytes(self) -> int:
        """Dynamic shared memory of a block: Q, K and V tiles, key positions, barriers."""
        tile = 128 * self.head_dim * (1 if self.element == "e4m3" else 2)
        return (self.q_tiles + self.k_stages + self.v_stages) * tile + self.k_stages * 1024 + 2048


def checked(result: tuple[Any, ...], what: str) -> Any:  # noqa: ANN401 - any type of the bindings
    """The value of a `cuda.bindings` call, or an UnsupportedError that names what failed."""
    status, *values = result
    if int(status):
        raise UnsupportedError(f"the Hopper kernel failed at {what}: {status!r}; use impl='triton'")
    return values[0] if values else None


def compile_source(name: str, options: list[str]) -> bytes:
    """Machine code of one file of `kernel/`, from the cache folder where it is there."""
    from cuda.bindings import nvrtc

    headers = {path.name: path.read_bytes() for path in sorted(SOURCES.glob("*.cuh"))}
    source = (SOURCES / name).read_bytes()
    version = str(nvrtc.nvrtcVersion()[1:])
    parts = [version.encode(), source, *headers.values(), *(x.encode() for x in options)]
    digest = hashlib.sha256(b"\0".join(parts)).hexdigest()[:32]
    kept = env.cache_dir() / "hopper" / f"{digest}.cubin"
    if kept.is_file():
        return kept.read_bytes()
    code = _nvrtc(name, source, headers, options)
    _keep(kept, code)
    return code


def _nvrtc(name: str, source: bytes, headers: dict[str, bytes], options: list[str]) -> bytes:
    from cuda.bindings import nvrtc

    program = checked(
        nvrtc.nvrtcCreateProgram(
            source,
            name.encode(),
            len(headers),
            list(headers.values()),
            [key.encode() for key in headers],
        ),
        "nvrtcCreateProgram",
    )
    (status,) = nvrtc.nvrtcCompileProgram(program, len(options), [x.encode() for x in options])
    log = b" " * checked(nvrtc.nvrtcGetProgramLogSize(program), "nvrtcGetProgramLogSize")
    nvrtc.nvrtcGetProgramLog(program, log)
    if int(status):
        raise UnsupportedError(
            f"NVRTC could not compile {name} with {' '.join(options)}: "
            f"{log.decode(errors='replace').strip()}; use impl='triton'"
        )
    code = b" " * checked(nvrtc.nvrtcGetCUBINSize(program), "nvrtcGetCUBINSize")
    checked(nvrtc.nvrtcGetCUBIN(program, code), "nvrtcGetCUBIN")
    nvrtc.nvrtcDestroyProgram(program)
    return code


def _keep(path: Path, code: bytes) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent)
        with os.fdopen(handle, "wb") as file:
            file.write(code)
        os.replace(temporary, path)
    except OSError as error:
        # a read-only cache costs a second a process, nothing else
        get_logger(__name__).debug("compiled kernel not kept at %s: %s", path, error)


@functools.cache
def attention_kernel(build: Build, device: int) -> int:
    """Handle of the attention kernel on a CUDA device, its shared memory limit raised."""
    from cuda.bindings import driver

    kernel = _function("attention.cu", tuple(build.options()), "sparse_attention", device)
    limit = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
    checked(driver.cuFuncSetAttribute(kernel, limit, build.shared_bytes), "cuFuncSetAttribute")
    return kernel


@functools.cache
def pack_kernel(device: int) -> int:
    """Handle of the kernel that packs columns."""
    return _function("columns.cu", (f"-arch={ARCH}", "-std=c++17"), "pack_columns", device)


def _function(name: str, options: tuple[str, ...], entry: str, device: int) -> int:
    import torch
    from cuda.bindings import driver

    code = compile_source(name, list(options))
    with torch.cuda.device(device):
        module = checked(driver.cuModuleLoadData(code), "cuModuleLoadData")
        kernel = checked(driver.cuModuleGetFunction(module, entry.encode()), "cuModuleGetFunction")
        return int(kernel)


def why_not_compile() -> str | None:
    """Why kernels cannot be compiled at run time here; None if they can."""
    try:
        from cuda.bindings import driver, nvrtc

        del driver
        with contextlib.suppress(RuntimeError):
            if not int(nvrtc.nvrtcVersion()[0]):
                return None
        return "libnvrtc could not be loaded (pip install nvidia-cuda-nvrtc)"
    except ImportError:
        return "cuda.bindings is not installed (pip install cuda-bindings)"
