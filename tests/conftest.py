"""What all tests share: repeatable randomness, and no GPU tests without a GPU."""

import hypothesis
import pytest
import torch

from confprune.checkpoint import pruning

# Derandomized, so that a run on another machine fails or passes alike; kernels may be slow to
# load on the first example, hence no deadline.
hypothesis.settings.register_profile("confprune", deadline=None, derandomize=True)
hypothesis.settings.load_profile("confprune")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def one_thread():
    """For tiny networks: threads would cost more than they save."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def bars(monkeypatch):
    """The progress bars of pruned checkpoints, shown although nobody looks."""
    shown = []

    class Bar(pruning.tqdm):
        def __init__(self, **options):
            shown.append(self)
            super().__init__(**options | {"delay": 0, "disable": False})

    monkeypatch.setattr(pruning, "tqdm", Bar)
    return shown


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("cuda"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
