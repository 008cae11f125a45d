"""The exact core of Diffusion Blend: what a blend of reward-aligned denoisers computes, in closed form."""

from dbtheory.blend import Blender, MeanBlend, SampledBlend, Step
from dbtheory.control import control, jensen_control, jensen_gap
from dbtheory.correct import FeynmanKac, Trace
from dbtheory.estimate import Estimate, estimate
from dbtheory.experts import ExactExperts, Experts
from dbtheory.grid import GridLaw
from dbtheory.interpolate import InterpolatedBlend
from dbtheory.law import Law
from dbtheory.mixture import GaussianMixture
from dbtheory.precision import PrecisionBlend
from dbtheory.preference import Preference
from dbtheory.reward import (
    FunctionReward,
    LinearReward,
    QuadraticReward,
    RBFReward,
    Reward,
    SmoothReward,
    TanhReward,
)
from dbtheory.sampler import sample, time_grid
from dbtheory.schedule import VE, NoiseSchedule, RectifiedFlow, VPCosine, VPDiscrete, VPLinear, VPTabulated
from dbtheory.tilt import tilt

__all__ = [
    "VE",
    "Blender",
    "Estimate",
    "ExactExperts",
    "Experts",
    "FeynmanKac",
    "FunctionReward",
    "GaussianMixture",
    "GridLaw",
    "InterpolatedBlend",
    "Law",
    "LinearReward",
    "MeanBlend",
    "NoiseSchedule",
    "PrecisionBlend",
    "Preference",
    "QuadraticReward",
    "RBFReward",
    "RectifiedFlow",
    "Reward",
    "SampledBlend",
    "SmoothReward",
    "Step",
    "TanhReward",
    "Trace",
    "VPCosine",
    "VPDiscrete",
    "VPLinear",
    "VPTabulated",
    "control",
    "estimate",
    "jensen_control",
    "jensen_gap",
    "sample",
    "tilt",
    "time_grid",
]
