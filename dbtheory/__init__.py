"""The exact core of Diffusion Blend: what a blend of reward-aligned denoisers computes, in closed form."""

from dbtheory.blend import MeanBlend, SampledBlend
from dbtheory.control import control, jensen_control, jensen_gap
from dbtheory.correct import FeynmanKac, Trace
from dbtheory.estimate import Estimate, estimate
from dbtheory.experts import ExactExperts
from dbtheory.grid import GridLaw
from dbtheory.interpolate import InterpolatedBlend
from dbtheory.law import Law
from dbtheory.mixture import GaussianMixture
from dbtheory.precision import PrecisionBlend
from dbtheory.preference import Preference
from dbtheory.reward import FunctionReward, LinearReward, QuadraticReward, RBFReward, SmoothReward, TanhReward
from dbtheory.sampler import sample
from dbtheory.schedule import VE, RectifiedFlow, VPCosine, VPDiscrete, VPLinear
from dbtheory.tilt import tilt

__all__ = [
    "VE",
    "Estimate",
    "ExactExperts",
    "FeynmanKac",
    "FunctionReward",
    "GaussianMixture",
    "GridLaw",
    "InterpolatedBlend",
    "Law",
    "LinearReward",
    "MeanBlend",
    "PrecisionBlend",
    "Preference",
    "QuadraticReward",
    "RBFReward",
    "RectifiedFlow",
    "SampledBlend",
    "SmoothReward",
    "TanhReward",
    "Trace",
    "VPCosine",
    "VPDiscrete",
    "VPLinear",
    "control",
    "estimate",
    "jensen_control",
    "jensen_gap",
    "sample",
    "tilt",
]
