"""Colorfulness of Hasler and Suesstrunk (2003), "Measuring colourfulness in natural images", eq. M3."""

from collections.abc import Sequence
from math import inf

from scale.rewards.protocol import Images, Scorer, Scores


class Colorfulness(Scorer):
    """`M / 100`, where M (8-bit units; 15 is slightly, 59 quite, 109 extremely colourful) is
    `sqrt(sd_rg^2 + sd_yb^2) + 0.3 sqrt(mean_rg^2 + mean_yb^2)` of `rg = R - G` and `yb = (R + G)/2 - B`.
    """

    name = "colorfulness"
    range = (0.0, inf)
    differentiable = True
    runs_on = "anywhere"

    def _score(self, images: Images, prompts: Sequence[str]) -> Scores:
        red, green, blue = (255 * images).flatten(2).unbind(1)
        rg, yb = red - green, (red + green) / 2 - blue
        # 1e-8: the root of a grey image has no gradient otherwise
        spread = (rg.var(1, correction=0) + yb.var(1, correction=0) + 1e-8).sqrt()
        shift = (rg.mean(1).square() + yb.mean(1).square() + 1e-8).sqrt()
        return (spread + 0.3 * shift) / 100
