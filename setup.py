"""Builds the CUDA kernels of `csrc/` into `batchinfer/_kernels.so`; everything else about the package is in pyproject.toml.

One plain shared library: no Python.h, so one file serves every Python, and only PyTorch's stable ABI, so one file serves every
PyTorch from 2.11 on. Needs `nvcc` (12 or later) and PyTorch's headers (of any build, CPU ones too), hence
`pip install --no-build-isolation`; no GPU. Without them the package is built without kernels, and says so: it then runs on CPUs.

    python setup.py build_ext --inplace        BATCHINFER_CUDA_ARCHS="90a" chooses what to build for (default: all)

Objects are kept in build/kernels and made again when a source, a header or a flag changes.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
SOURCES, OBJECTS = ROOT / "csrc", ROOT / "build" / "kernels"
ARCHS = "80 89 90a 90+PTX"  # +PTX: portable code for what comes later
COMMON = ["-O3", "-std=c++20", "-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020b000000000000"]


class KernelsMissing(RuntimeError):
    """A tool that the build needs is not here."""


class BuildKernels(build_ext):
    """Compiles every source of `csrc/` with nvcc and links them."""

    def get_ext_filename(self, fullname: str) -> str:
        return fullname.replace(".", "/") + ".so"  # no Python version in the name: the file depends on none

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name))
        try:
            nvcc, torch = find_nvcc(), find_torch()
        except KernelsMissing as error:
            print(f"batchinfer: built WITHOUT CUDA kernels: {error}", file=sys.stderr)
            self.extensions = []
            return
        OBJECTS.mkdir(parents=True, exist_ok=True)
        with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS", os.cpu_count() or 1))) as pool:
            objects = list(pool.map(lambda source: compile_source(nvcc, torch, source), sources()))
        target.parent.mkdir(parents=True, exist_ok=True)
        link = ["-shared", "-Xlinker", "--no-as-needed", f"-L{torch / 'lib'}", "-ltorch", "-lc10"]
        run([nvcc, *map(str, objects), "-o", str(target), *link, "-Xlinker", "--allow-shlib-undefined"])

    def copy_extensions_to_source(self) -> None:
        if self.extensions:
            super().copy_extensions_to_source()


def find_nvcc() -> str:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    found = str(Path(home) / "bin" / "nvcc") if home else shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
    if not Path(found).exists():
        raise KernelsMissing("nvcc was not found: put CUDA's bin folder on PATH or set CUDA_HOME")
    return found


def find_torch() -> Path:
    """PyTorch's folder. It is not imported: that takes seconds."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        raise KernelsMissing("PyTorch is not in the build's environment: use pip install --no-build-isolation")
    return Path(spec.origin).parent


def sources() -> list[Path]:
    return sorted(SOURCES.rglob("*.cu"), key=lambda path: -path.stat().st_size) + sorted(SOURCES.rglob("*.cpp"))


def arch_flags() -> list[str]:
    flags = []
    for arch in os.environ.get("BATCHINFER_CUDA_ARCHS", ARCHS).split():
        number = arch.removesuffix("+PTX")
        code = f"compute_{number}" if arch.endswith("+PTX") else f"sm_{number}"
        flags.append(f"-gencode=arch=compute_{number},code={code}")
    return flags


def compile_source(nvcc: str, torch: Path, source: Path) -> Path:
    flags = [*COMMON, "-Xcompiler", "-fPIC", "-I", str(SOURCES)]
    if source.suffix == ".cu":
        flags += [*arch_flags(), "--expt-relaxed-constexpr", "--expt-extended-lambda"]
    else:
        include = torch / "include"
        flags += ["-isystem", str(include), "-isystem", str(include / "torch" / "csrc" / "api" / "include")]
    headers = b"".join(path.read_bytes() for path in sorted(SOURCES.rglob("*.h")) + sorted(SOURCES.rglob("*.cuh")))
    version = (torch / "version.py").read_bytes() if source.suffix == ".cpp" else b""
    key = hashlib.sha256(repr((nvcc, flags)).encode() + headers + version + source.read_bytes()).hexdigest()[:16]
    target = OBJECTS / f"{source.stem}-{key}.o"
    if not target.exists():
        for old in OBJECTS.glob(f"{source.stem}-*.o"):
            old.unlink()
        made = target.with_suffix(f".{os.getpid()}.tmp.o")
        run([nvcc, "-c", str(source), "-o", str(made), *flags])
        made.rename(target)
    return target


def run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(command)}\n{done.stdout}{done.stderr}")


assert sysconfig.get_platform().startswith("linux"), "batchinfer runs on Linux"
setup(ext_modules=[Extension("batchinfer._kernels", sources=[])], cmdclass={"build_ext": BuildKernels})
