"""What a CUDA build needs and says; where nvcc is, that every kernel compiles and none spills."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import confprune
from benchmarks import records, resources
from confprune.ops import check_kernels

ROOT = Path(__file__).parents[1]
WITHOUT = pytest.mark.skipif(
    confprune.build_info()["cuda"] is not None, reason="this build has CUDA kernels"
)


def setup(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "setup.py", *arguments],
        cwd=ROOT,
        env=os.environ | variables,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch has CUDA")
def test_kernels_that_cannot_be_built_are_refused_in_one_line():
    run = setup("--version", CONFPRUNE_CUDA="1")
    assert run.returncode == 1
    wanted = "confprune: CONFPRUNE_CUDA=1 asks for CUDA kernels, but torch"
    assert run.stderr.splitlines()[-1].startswith(f"{wanted} {torch.__version__} was built without")


@pytest.mark.skipif(torch.version.cuda is None, reason="this torch has no CUDA")
def test_without_a_toolkit_the_build_says_where_to_get_it(tmp_path):
    run = setup("--version", CONFPRUNE_CUDA="1", CUDA_HOME=str(tmp_path))
    assert run.returncode == 1
    assert f"nvcc was not found in {tmp_path}: install the CUDA toolkit" in run.stderr


def test_the_variable_is_0_or_1():
    run = setup("--version", CONFPRUNE_CUDA="yes")
    assert run.returncode == 1
    assert "CONFPRUNE_CUDA must be 0 or 1, got 'yes'" in run.stderr


def test_what_was_built_is_told():
    built = confprune.build_info()
    assert built["confprune"] == confprune.__version__
    assert torch.__version__.startswith(built["torch"])
    assert built["instruction_set"] in ("baseline", "avx2", "avx512")
    assert (built["cuda"] is None) == (built["architectures"] is None)


@WITHOUT
def test_a_cuda_device_without_kernels_is_refused_with_the_way_out():
    with pytest.raises(RuntimeError, match=r"CONFPRUNE_CUDA=1 pip install .* device='cpu'"):
        check_kernels([torch.device("cpu"), torch.device("cuda:1")])


@WITHOUT
def test_work_on_a_cuda_model_is_refused_before_it_starts():
    levels = confprune.prune_levels(nn.Linear(4, 3), [0.5])
    with FakeTensorMode():
        model, data = nn.Linear(4, 3), torch.empty(200, 4, device="cuda")
        for name, shape in (("weight", (3, 4)), ("bias", (3,))):
            setattr(model, name, nn.Parameter(torch.empty(shape, device="cuda")))
        for work in (
            lambda: confprune.prune_levels(model, [0.5]),
            lambda: confprune.loss_matrix(model, data, levels, "disagreement"),
            lambda: confprune.calibrate(model, data, loss="disagreement", alpha=0.1, delta=0.1),
        ):
            with pytest.raises(RuntimeError, match="without CUDA kernels"):
                work()


def operators_of_tensors() -> list[torch._ops.OpOverload]:
    """All of confprune's, but those that only tell something."""
    names = torch._C._dispatch_get_all_op_names()
    own = [name.split("::")[1] for name in names if name.startswith("confprune::")]
    found = [getattr(torch.ops.confprune, name).default for name in sorted(own)]
    return [operator for operator in found if operator._schema.arguments]


def some(argument_type: str) -> object:
    """An argument of a type that a schema names."""
    if argument_type.startswith("List["):
        return [some(argument_type[len("List[") : -1])]
    plain = {"int": 1, "float": 1.0, "bool": True}
    values = plain | {"Tensor": torch.zeros(1), "Optional[Tensor]": None}
    return values[argument_type]


@pytest.mark.parametrize("operator", operators_of_tensors(), ids=str)
def test_every_operator_answers_for_cuda_tensors(operator):
    cuda = torch._C.DispatchKey.CUDA
    assert torch._C._dispatch_has_kernel_for_dispatch_key(operator.name(), cuda)
    if confprune.build_info()["cuda"] is None:
        arguments = [some(str(argument.type)) for argument in operator._schema.arguments]
        with pytest.raises(RuntimeError, match=r"got CUDA tensors, but this build.* Rebuild it"):
            operator.redispatch(torch._C.DispatchKeySet(cuda), *arguments)


@pytest.fixture(scope="module")
def compiled():
    try:
        return resources.measure()
    except records.Unavailable as error:
        pytest.skip(str(error))


def test_every_kernel_compiles_without_warnings_and_spills_nothing(compiled):
    assert {row["architecture"] for row in compiled} == set(resources.ARCHITECTURES)
    assert resources.spilling(compiled) == []


def test_no_kernel_takes_more_than_any_of_the_architectures_has(compiled):
    assert max(row["static_shared_bytes"] for row in compiled) <= 48 << 10
    assert max(row["registers"] for row in compiled) <= 255
