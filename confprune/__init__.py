"""Magnitude pruning with a finite-sample, distribution-free guarantee.

>>> import torch, confprune
>>> _ = torch.manual_seed(0)
>>> model, data = torch.nn.Linear(16, 4), torch.randn(500, 16)
>>> certificate = confprune.calibrate(
...     model, data, loss="disagreement", alpha=0.1, delta=0.1, progress=False
... )
>>> sparse = certificate.prune(model)
"""

__version__ = "0.1.0"

from confprune import checkpoint, criteria, losses, risk, sparse
from confprune.calibration import calibrate, calibrate_losses, loss_matrix
from confprune.certificate import Certificate, VerificationError
from confprune.input_norms import input_norms
from confprune.levels import PruneLevels, prune_levels
from confprune.losses import Loss, Reference
from confprune.ops import build_info
from confprune.risk.looks import LookPlan
from confprune.risk.planning import simulate
from confprune.risks import Risk, confident

__all__ = [
    "Certificate",
    "LookPlan",
    "Loss",
    "PruneLevels",
    "Reference",
    "Risk",
    "VerificationError",
    "__version__",
    "build_info",
    "calibrate",
    "calibrate_losses",
    "checkpoint",
    "confident",
    "criteria",
    "input_norms",
    "loss_matrix",
    "losses",
    "prune_levels",
    "risk",
    "simulate",
    "sparse",
]
