"""CLIPScore: how well a caption fits an image (Hessel et al. 2021, "CLIPScore", EMNLP, eq. 1)."""

from collections.abc import Sequence
from math import isfinite
from pathlib import Path

from scale.rewards.clip import load_clip, remedy
from scale.rewards.protocol import Images, Scorer, Scores

HUB_ID = "openai/clip-vit-base-patch32"
REMEDY = f"`hf download {HUB_ID} --local-dir FOLDER` brings all it needs; then pass model=FOLDER"


class ClipScore(Scorer):
    """`w max(cos(image, caption), 0)`, w = 2.5, of the caption behind "A photo depicts", as the paper's code has it.

    Where the cosine is negative the score is 0 and so is its gradient; of a trained CLIP that is rare.

    Raises:
        ValueError: a file that is missing, unreadable, refused, or does not fit the others; a weight that is not
            positive.
    """

    name = "clipscore"
    differentiable = True

    def __init__(self, model: str | Path = HUB_ID, *, weight: float = 2.5, prefix: str = "A photo depicts ") -> None:
        if not (isfinite(weight) and weight > 0):
            raise ValueError(f"the weight of clipscore must be positive, received {weight}; the paper's is 2.5")
        with remedy(self.name, model, REMEDY):
            self.clip = load_clip(model)
        self.files = self.clip.files
        self.weight, self.prefix = weight, prefix
        self.range = (0.0, weight)

    def _score(self, images: Images, prompts: Sequence[str]) -> Scores:
        return self.weight * self.clip.cosines(images, [self.prefix + prompt for prompt in prompts]).clamp(min=0)
