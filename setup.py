"""Builds the extension, confprune._C; everything else about the package is in pyproject.toml.

CUDA kernels are built in where torch has CUDA and a CUDA compiler of the same major version is
found, with or without a GPU. Variables of the environment:

CONFPRUNE_CUDA        1: CUDA kernels, or an error that says what is missing; 0: none
CUDA_HOME             the CUDA toolkit, where nvcc is not on the path
TORCH_CUDA_ARCH_LIST  what the kernels are compiled for; default "8.0;9.0+PTX"
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup

try:
    import torch
    from torch.utils.cpp_extension import CUDA_HOME, BuildExtension, CppExtension, CUDAExtension
except ImportError as error:
    raise SystemExit(
        "confprune: torch >= 2.10 is needed to build the extension and cannot be imported here "
        f"({error}). Install it first, then: pip install --no-build-isolation ."
    ) from None

if tuple(int(part) for part in torch.__version__.split(".")[:2]) < (2, 10):
    raise SystemExit(f"confprune: torch >= 2.10 is needed, {torch.__version__} is installed here.")

# setuptools wants paths relative to this file, and pip runs it from here.
CSRC = Path("csrc")
WITHOUT_CUDA = CSRC / "without_cuda.cpp"
HEADERS = sorted(str(path) for path in CSRC.rglob("*.h"))

ARCHITECTURES = "8.0;9.0+PTX"
"""Machine code for Ampere and Hopper, and what a driver compiles for anything later."""


def cuda_lacks() -> str:
    """What CUDA kernels need that is not here, and how to get it; empty if they can be built."""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} was built without CUDA: install one with CUDA"
    get = (
        f"install the CUDA toolkit {torch.version.cuda}, which torch {torch.__version__} was built "
        "with, or name its folder in the variable CUDA_HOME"
    )
    nvcc = None if CUDA_HOME is None else shutil.which(os.path.join(CUDA_HOME, "bin", "nvcc"))
    if nvcc is None:
        where = "" if CUDA_HOME is None else f" in {CUDA_HOME}"
        return f"the CUDA compiler nvcc was not found{where}: {get}"
    if not Path(CUDA_HOME, "include", "cuda_runtime.h").is_file():
        return f"{CUDA_HOME} holds nvcc, but not include/cuda_runtime.h: {get}"
    said = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=False).stdout
    release = re.search(r"release (\d+)\.\d+", said)
    if release is None or release[1] != torch.version.cuda.split(".")[0]:
        found = "of no known release" if release is None else release[0]
        return f"{nvcc} is {found}, and not of CUDA {torch.version.cuda}: {get}"
    return ""


def with_cuda() -> bool:
    """Whether to build the CUDA kernels: what CONFPRUNE_CUDA says, else whether it can be done."""
    asked = os.environ.get("CONFPRUNE_CUDA", "")
    if asked not in ("", "0", "1"):
        raise SystemExit(f"confprune: CONFPRUNE_CUDA must be 0 or 1, got {asked!r}.")
    lacks = "" if asked == "0" else cuda_lacks()
    if lacks and asked == "1":
        raise SystemExit(f"confprune: CONFPRUNE_CUDA=1 asks for CUDA kernels, but {lacks}.")
    return asked != "0" and not lacks


def extension() -> Extension:
    """The one extension module.

    No -march: the instruction set is chosen at run time. No -std: torch adds what its headers need.
    """
    cuda = with_cuda()
    left_out = {WITHOUT_CUDA} if cuda else set((CSRC / "cuda").glob("*"))
    sources = sorted({*CSRC.rglob("*.cpp"), *CSRC.rglob("*.cu")} - left_out)
    make = CUDAExtension if cuda else CppExtension
    module = make("confprune._C", list(map(str, sources)), depends=HEADERS, py_limited_api=True)
    others, module.include_dirs = module.include_dirs, [str(CSRC.resolve())]
    flags = [
        "-O3",
        "-g0",
        "-fvisibility=hidden",
        "-Wall",
        "-Wextra",
        # Headers of torch and CUDA are not ours to keep free of warnings.
        *(flag for path in others for flag in ("-isystem", path)),
    ]
    if sys.platform == "linux":
        # at::parallel_for is a header and runs on one thread without this. It is no link flag:
        # the symbols come from the OpenMP library that torch has loaded, so there is one pool.
        flags.append("-fopenmp")
    # The kernels know no torch; what nvcc makes of their host side is compiled as the rest is.
    host = ["-Xcompiler", "-fvisibility=hidden,-Wall,-Wextra"]
    module.extra_compile_args = {"cxx": flags, "nvcc": ["-O3", *host]}
    if cuda:
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", ARCHITECTURES)
    return module


class Build(BuildExtension):  # type: ignore[misc]
    """Torch's builder, with one-line reasons for what a machine may lack."""

    def finalize_options(self) -> None:
        """Name one library for all of Python; keep the objects of each torch apart."""
        self.no_python_abi_suffix = True  # an option of the constructor fails with setuptools 77
        super().finalize_options()
        self.build_temp = os.path.join(self.build_temp, f"torch-{torch.__version__}")

    def run(self) -> None:
        """Build, after a look whether a compiler is there."""
        compiler = shlex.split(os.environ.get("CXX", "c++"))[0]
        if shutil.which(compiler) is None:
            raise SystemExit(
                f"confprune: the C++17 compiler {compiler!r} was not found. Install one "
                "(Debian, Ubuntu: apt install g++), or name it in the variable CXX."
            )
        super().run()


setup(
    ext_modules=[extension()],
    cmdclass={"build_ext": Build},
    # The library does not use Python, so one wheel serves every version.
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
