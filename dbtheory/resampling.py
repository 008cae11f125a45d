"""Weighted samples made equally weighted."""

import torch
from jaxtyping import Float, Int64
from torch import Tensor


def effective_size(log_weights: Float[Tensor, " n"]) -> float:
    """Kish's effective sample size `(sum w)^2 / sum w^2` as a share of n, in (0, 1]."""
    return 1.0 / (len(log_weights) * float(log_weights.softmax(0).square().sum()))


def systematic(log_weights: Float[Tensor, " n"], uniform: Float[Tensor, "1"]) -> Int64[Tensor, " n"]:
    """Ancestors `(n,)`, in order: sample i is taken `n w_i` times on average, rounded up or down.

    Comb of n teeth `(k + uniform)/n` over the normalised weights' cumulative sum (Kitagawa 1996).
    """
    n = len(log_weights)
    cumulative = log_weights.softmax(0).cumsum(0)
    teeth = (torch.arange(n, dtype=torch.float64, device=log_weights.device) + uniform.to(log_weights)) / n
    # the last tooth may round up to 1, beyond every sample with a weight
    below_one = teeth.clamp_max(1 - torch.finfo(torch.float64).eps)
    return torch.searchsorted(cumulative / cumulative[-1], below_one, right=True)
