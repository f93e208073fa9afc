"""minicd: Learning by Distilling Context (Snell, Klein & Zhong, 2022), from scratch and small."""

from . import losses, metrics
from .hf.checkpoint import load, save
from .distill import Context, NoAnswers, PracticeSettings, distill, everything, identity, practice
from .labels import Examples, SoftLabels
from .rounds import OnPolicy, RoundSettings, rounds
from .sampling import generate, score
from .training import FitSettings, fit

__all__ = ["Context", "Examples", "FitSettings", "NoAnswers", "OnPolicy", "PracticeSettings", "RoundSettings",
           "SoftLabels", "distill", "everything", "fit", "generate", "identity", "load", "losses", "metrics",
           "practice", "rounds", "save", "score"]
