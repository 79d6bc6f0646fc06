"""The kernels compile for other processors than the one at hand."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

KERNELS = sorted((Path(__file__).parents[1] / "csrc" / "kernels").glob("*.cpp"))
ARM64 = shutil.which("aarch64-linux-gnu-g++")


@pytest.mark.skipif(ARM64 is None, reason="there is no aarch64-linux-gnu-g++ here")
@pytest.mark.parametrize("kernel", KERNELS, ids=[path.name for path in KERNELS])
def test_the_kernels_compile_for_arm64(kernel, tmp_path):
    command = [ARM64, "-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", "-c", str(kernel)]
    include = ["-I", str(kernel.parents[1]), "-o", str(tmp_path / "kernel.o")]
    run = subprocess.run([*command, *include], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
