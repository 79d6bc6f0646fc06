"""The kernels compile for other processors than the one at hand, and with another compiler."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

KERNELS = sorted((Path(__file__).parents[1] / "csrc" / "kernels").glob("*.cpp"))


@pytest.mark.parametrize("compiler", ["aarch64-linux-gnu-g++", "clang++"])
@pytest.mark.parametrize("kernel", KERNELS, ids=[path.name for path in KERNELS])
def test_the_kernels_compile(compiler, kernel, tmp_path):
    found = shutil.which(compiler)
    if found is None:
        pytest.skip(f"there is no {compiler} here")
    command = [found, "-std=c++17", "-O0", "-Wall", "-Wextra", "-Werror", "-c", str(kernel)]
    include = ["-I", str(kernel.parents[1]), "-o", str(tmp_path / "kernel.o")]
    run = subprocess.run([*command, *include], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
