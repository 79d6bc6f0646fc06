"""Builds the extension, confprune._C; everything else about the package is in pyproject.toml."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from pathlib import Path

from setuptools import Extension, setup

try:
    import torch
    from torch.utils.cpp_extension import BuildExtension, CppExtension
except ImportError as error:
    raise SystemExit(
        "confprune: torch >= 2.10 is needed to build the extension and cannot be imported here "
        f"({error}). Install it first, then: pip install --no-build-isolation ."
    ) from None

if tuple(int(part) for part in torch.__version__.split(".")[:2]) < (2, 10):
    raise SystemExit(f"confprune: torch >= 2.10 is needed, {torch.__version__} is installed here.")

# setuptools wants paths relative to this file, and pip runs it from here.
SOURCES = sorted(str(path) for path in Path("csrc").rglob("*.cpp"))
HEADERS = sorted(str(path) for path in Path("csrc").rglob("*.h"))


def extension() -> Extension:
    """The one extension module. No -march: the instruction set is chosen at run time."""
    module = CppExtension("confprune._C", SOURCES, depends=HEADERS, py_limited_api=True)
    torch_headers, module.include_dirs = module.include_dirs, [str(Path("csrc").resolve())]
    module.extra_compile_args = [
        "-std=c++17",
        "-O3",
        "-g0",
        "-fvisibility=hidden",
        "-Wall",
        "-Wextra",
        # Torch's headers are not ours to keep free of warnings.
        *(flag for path in torch_headers for flag in ("-isystem", path)),
    ]
    if sys.platform == "linux":
        # at::parallel_for is a header and runs on one thread without this. It is no link flag:
        # the symbols come from the OpenMP library that torch has loaded, so there is one pool.
        module.extra_compile_args.append("-fopenmp")
    return module


class Build(BuildExtension):  # type: ignore[misc]
    """Torch's builder, with one-line reasons for what a machine may lack."""

    def finalize_options(self) -> None:
        """Keep objects of different torch versions apart: they do not mix."""
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
    cmdclass={"build_ext": Build.with_options(no_python_abi_suffix=True)},
    # The library does not use Python, so one wheel serves every version.
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
