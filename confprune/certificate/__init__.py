"""Certificates: what was tested, on what, and what may be claimed; their report, plot and file."""

from confprune.certificate.certificate import Certificate
from confprune.certificate.evidence import Looks, Part, Pruning, ScoreData
from confprune.certificate.verification import VerificationError

__all__ = ["Certificate", "Looks", "Part", "Pruning", "ScoreData", "VerificationError"]
