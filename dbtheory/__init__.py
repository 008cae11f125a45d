"""The exact core of Diffusion Blend: what a blend of reward-aligned denoisers computes, in closed form."""

from dbtheory.blend import MeanBlend, SampledBlend
from dbtheory.control import control, jensen_control, jensen_gap
from dbtheory.experts import ExactExperts
from dbtheory.mixture import GaussianMixture
from dbtheory.precision import PrecisionBlend
from dbtheory.preference import Preference
from dbtheory.reward import LinearReward, QuadraticReward
from dbtheory.sampler import sample
from dbtheory.schedule import VE, RectifiedFlow, VPCosine, VPDiscrete, VPLinear
from dbtheory.tilt import tilt

__all__ = [
    "VE",
    "ExactExperts",
    "GaussianMixture",
    "LinearReward",
    "MeanBlend",
    "PrecisionBlend",
    "Preference",
    "QuadraticReward",
    "RectifiedFlow",
    "SampledBlend",
    "VPCosine",
    "VPDiscrete",
    "VPLinear",
    "control",
    "jensen_control",
    "jensen_gap",
    "sample",
    "tilt",
]
