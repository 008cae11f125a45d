"""Advantages of the steps of a trajectory, from its reward and a value function."""

from jaxtyping import Float
from torch import Tensor, cat, stack, zeros_like


def generalized_advantages(
    values: Float[Tensor, "steps n"], returns: Float[Tensor, " n"], trace: float
) -> Float[Tensor, "steps n"]:
    """Generalised advantage estimation (Schulman et al. 2016, eq. 16) without discount: the reward comes at the end.

    `values[k]` is what is expected where step k begins; `trace` is lambda there: 1 is `returns - values` (DPOK's), 0 is
    `values[k + 1] - values[k]`, which blames a step for its own noise alone, as far as the value function can tell.
    """
    differences = cat((values[1:], returns[None])) - values
    advantages, carried = [], zeros_like(returns)
    for difference in reversed(differences):
        carried = difference + trace * carried
        advantages.append(carried)
    return stack(advantages[::-1])


def centred(advantages: Float[Tensor, "steps n"], group: int) -> Float[Tensor, "steps n"]:
    """Less the mean of the other samples of the same prompt at the same step; rows of a prompt lie together.

    The others alone: a sample in its own baseline would take a share `1 / group` of its own signal away.
    """
    if group == 1:
        return advantages
    groups = advantages.unflatten(1, (-1, group))
    return ((groups - groups.mean(2, keepdim=True)) * group / (group - 1)).flatten(1)
