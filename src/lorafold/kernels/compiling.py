"""Compiles a C++ file for this processor and loads it; the library is cached. Compilation takes
seconds, once for each processor, compiler and version of the file.
"""

from __future__ import annotations

import ctypes
import logging
import os
import platform
import re
import shlex
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lorafold.errors import LorafoldError
from lorafold.files.cache import cache_entry

log = logging.getLogger(__name__)

HEADERS = Path(__file__).parent
FLAGS = ("-std=gnu++17", "-O3", "-march=native", "-fopenmp", "-fPIC", "-fno-math-errno",
         "-fno-trapping-math")  # fmt: skip
TIMEOUT = 120  # seconds, to compile
TYPES: dict[str, Any] = {
    "P": ctypes.c_void_p, "l": ctypes.c_long, "i": ctypes.c_int, "f": ctypes.c_float,
    "I": ctypes.c_uint32, "L": ctypes.c_uint64,
}  # fmt: skip
DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}


class Unavailable(LorafoldError):
    """Raised if operations can't be compiled or loaded on this machine."""


def parameter_types(signature: str) -> list[Any]:
    """The types of parameters in the notation of `struct`: 2Pl is two pointers and a long."""
    counts = re.findall(r"(\d*)(\D)", signature)
    return [kind for count, code in counts for kind in [TYPES[code]] * int(count or 1)]


class Functions:
    """The functions of a C++ file, with a suffix for the dtype. `signatures` maps their names to
    their parameters (`parameter_types`); functions in `half` exist only for bfloat16. Raises
    Unavailable if compilation fails.
    """

    def __init__(
        self, source: Path, signatures: Mapping[str, str], half: Sequence[str] = ()
    ) -> None:
        self.library = load_library(source)
        self._found: dict[tuple[str, torch.dtype], tuple[Any, list[int]]] = {}
        for name, signature in signatures.items():
            parameters = parameter_types(signature)
            pointers = [i for i, kind in enumerate(parameters) if kind is ctypes.c_void_p]
            for dtype in [torch.bfloat16] if name in half else DTYPES:
                function = getattr(self.library, f"{name}_{DTYPES[dtype]}")
                function.restype, function.argtypes = None, parameters
                self._found[name, dtype] = function, pointers

    def __call__(self, name: str, dtype: torch.dtype, *parts: Any) -> None:
        """Calls a function; tensors are passed by address."""
        function, pointers = self._found[name, dtype]
        arguments = [*parts]
        for i in pointers:
            arguments[i] = parts[i] if parts[i] is None else parts[i].data_ptr()
        function(*arguments)


def supported(*tensors: Tensor, dense: bool = False) -> bool:
    """Returns whether tensors of any shape are on the CPU, have the same dtype, which is in DTYPES,
    and, if `dense`, are contiguous.
    """
    dtype = tensors[0].dtype
    if dtype not in DTYPES:
        return False
    for t in tensors:
        if t.dtype is not dtype or not t.is_cpu or (dense and not t.is_contiguous()):
            return False
    return True


def load_library(source: Path, kind: type[ctypes.CDLL] = ctypes.PyDLL) -> ctypes.CDLL:
    """Loads a C++ file's library, compiled if it is not cached. Calls keep the GIL, because most
    take microseconds; those of a CDLL release it. Raises Unavailable without a C++ compiler, OpenMP
    or a writable cache.
    """
    library = _compile_cached(source)
    try:
        return kind(str(library))
    except OSError as error:
        raise Unavailable(f"{library}: can't be loaded ({error})") from None


def _compile_cached(source: Path) -> Path:
    chosen = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
    if chosen is None:
        raise Unavailable("found no C++ compiler, expected c++ or g++ (or CXX)")
    compiler = shlex.split(chosen)
    version = _run([*compiler, "--version"])
    texts = [path.read_text() for path in (source, *sorted(HEADERS.glob("*.h")))]
    key = "\n".join((*texts, *FLAGS, version, processor()))

    def write(folder: Path) -> None:
        target, part = folder / f"{source.stem}.so", folder / f"{source.stem}.o"
        _run([*compiler, *FLAGS, f"-I{HEADERS}", "-c", str(source), "-o", str(part)])
        # without -fopenmp, so that it uses the OpenMP library that torch has loaded
        _run([*compiler, "-shared", str(part), "-o", str(target)])
        part.unlink()

    return cache_entry("native", key, write, log.info) / f"{source.stem}.so"


def processor() -> str:
    """Identifies the kind of processor by architecture, model and instruction sets."""
    try:
        lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
    except OSError:
        lines = [platform.processor()]
    kept_lines = [line for line in lines if line.startswith(("model name", "flags", "Features"))]
    return "\n".join((platform.machine(), *kept_lines))


def _run(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Unavailable(f"{command[0]}: can't be run ({error})") from None
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise Unavailable(f"{command[0]}: {lines[-1]}")
    return done.stdout
