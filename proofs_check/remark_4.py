"""As t -> 0, L1 and L2 vanish like sigma_t and the gap like sigma_t^2; as alpha falls, L2 grows at every point and the
gap on average, if not at every point. But L3 grows like 1/sigma_t, and L1 can be large where x_t predicts R well.

That L2 grows is general: `log(1 + L2^2) = K(2/alpha) - 2 K(1/alpha)` with K convex, the log moment generating function
of the reward. All in 1-D, the prior of two Gaussian components, the reward x + tanh(2x)/2.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from dbtheory import GaussianMixture, VPLinear
from dbtheory.bounds import all_bounds, lemma_2_as_printed, pathwise_lemma
from dbtheory.dispersion import Given
from dbtheory.reward import SmoothReward
from proofs_check.claim import Row

SOURCE = "paper Remark 4; MATH.md 5"
SCHEDULE = VPLinear()
PRIOR = GaussianMixture(
    torch.tensor([0.4, 0.6]).double(), torch.tensor([[-1.0], [1.5]]).double(), torch.tensor([[[0.5]], [[0.9]]]).double()
)
REWARD = SmoothReward(lambda x: (x + 0.5 * (2 * x).tanh()).squeeze(-1))
ALPHAS = tuple((2.0 ** (1 - 0.25 * torch.arange(20))).tolist())  # from 2 down to 0.074


def check() -> Iterator[Row]:
    yield from _next_to_the_data()
    yield from _small_alpha()
    yield _predictable()


def _next_to_the_data() -> Iterator[Row]:
    """Rates in sigma_t between two times, at x_t = 0.4 and alpha = 1."""
    times = torch.tensor([1e-4, 4e-4], dtype=torch.float64)
    profile = _profile(torch.full((2, 1), 0.4).double(), times)
    step = SCHEDULE.sigma(times).log().diff()

    def rate(name: str) -> float:
        return float(profile[name].log().diff() / step)

    for name, order in (("L1", 1), ("L2", 1), ("gap", 2), ("pathwise", 2), ("density, best c", 2), ("covariance", 1)):
        label = name if name in ("L1", "L2", "gap") else f"bound ({name})"
        yield Row(f"{label} ~ sigma^{order} as t -> 0: |fitted exponent - {order}|", abs(rate(name) - order), 0.02)
    for name in ("pathwise", "density, best c"):
        excess = float(profile[name][0] / profile["gap"][0]) - 1
        yield Row(f"as t -> 0 the bound ({name}) becomes tight: bound/|gap| - 1 at t = 0.0001", excess, 1e-3)
    what = "L3 -> 0 as t -> 0: yet, at three standard deviations, it grows like sigma to the power of minus"
    yield Row(what, -rate("L3"), 0.9, ">=", refutes=True)


def _profile(x: Tensor, times: Tensor) -> dict[str, Tensor]:
    """|gap|, L1, L2, L3 (three standard deviations) and every bound, (k,), at x (k, 1) and times (k,), alpha = 1."""
    given = (PRIOR, REWARD, 1.0, SCHEDULE, x, times)
    printed, gap = lemma_2_as_printed(*given), pathwise_lemma(*given).identity.abs().squeeze(-1)
    return {"gap": gap, "L1": printed.L1, "L2": printed.L2, "L3": printed.L3} | all_bounds(*given)


def _small_alpha() -> Iterator[Row]:
    x = PRIOR.noised(SCHEDULE, 0.4).sample(200, torch.Generator().manual_seed(10))
    lemmas = [pathwise_lemma(PRIOR, REWARD, alpha, SCHEDULE, x, 0.4) for alpha in ALPHAS]
    L2, gap = (
        torch.stack(parts) for parts in zip(*((lemma.L2, lemma.gap.squeeze(-1).abs()) for lemma in lemmas), strict=True)
    )
    yield Row("L2 grows as alpha falls from 2 to 0.074: decreases among 19 steps at 200 points", _decreases(L2), 0)
    mean_square = gap.square().mean(1, keepdim=True)
    yield Row(
        "the gap's root mean square over x_t grows as alpha falls: decreases among 19 steps", _decreases(mean_square), 0
    )
    yield Row(
        "the gap need not grow at every point: largest factor by which |gap| shrinks at a point while alpha falls",
        float((gap.cummax(0).values / gap).max()),
        5.0,
        ">=",
    )
    scaled = [lemma_2_as_printed(PRIOR, REWARD, alpha, SCHEDULE, x[:20], 0.4).L3 for alpha in (0.04, 0.02)]
    yield Row(
        "L3 grows like 1/alpha: from alpha = 0.04 to 0.02, the least factor at 20 points",
        float((scaled[1] / scaled[0]).min()),
        1.8,
        ">=",
    )


def _decreases(values: Tensor) -> int:
    return int((values.diff(dim=0) < 0).sum())


def _predictable() -> Row:
    """`R = sin(100 x_0)/10`: however noisy, it is known to 0.1, but its slope is 10."""
    reward, x = SmoothReward(lambda x: 0.1 * (100 * x).sin().squeeze(-1)), torch.tensor([[0.4]]).double()
    line = Given(PRIOR, reward, 1.0, SCHEDULE, x, 0.3).line
    deviation = float(line.mean(line.excess.square()).sqrt())
    L1 = float(pathwise_lemma(PRIOR, reward, 1.0, SCHEDULE, x, 0.3).L1)
    what = f"L1 is small where x_t predicts R: yet where sd(R|x_t) = {deviation:.2f} (R = sin(100 x_0)/10) it is"
    return Row(what, L1, 2.0, ">=", refutes=True)
