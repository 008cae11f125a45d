"""Left-right symmetry: how well an image correlates with its mirror image."""

from collections.abc import Sequence

from scale.rewards.protocol import Images, Scorer, Scores

FLAT = 1e-8  # below what one pixel off by one step of 8 bits adds to the spread of any image


class Symmetry(Scorer):
    """Pearson's correlation of an image with its left-right mirror, in [-1, 1].

    Over all pixels and channels together, the mean of each channel subtracted: with `d` what is left and `M` the mirror
    it is `<d, M d> / <d, d>`, for the mirror changes neither mean nor spread. So brightness and contrast do not matter;
    a picture that is its own mirror image has 1, and one that is its own negative in the mirror -1. A flat picture
    is its own mirror image too: 1, without gradient. Trained alone, this reward is therefore earned by blank pictures.
    """

    name = "symmetry"
    range = (-1.0, 1.0)
    differentiable = True
    runs_on = "anywhere"

    def _score(self, images: Images, prompts: Sequence[str]) -> Scores:
        spread = (images - images.mean((2, 3), keepdim=True)).square().sum((1, 2, 3))
        # <d, d> - <d, M d> = |x - M x|^2 / 2: exactly 0 where a picture is symmetric
        unlike = (images - images.flip(3)).square().sum((1, 2, 3)) / 2
        return 1 - unlike / (spread + FLAT)
