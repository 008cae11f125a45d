"""PickScore: which image people would pick for a prompt (Kirstain et al. 2023, "Pick-a-Pic", NeurIPS, sec. 3)."""

from collections.abc import Sequence
from pathlib import Path

from scale.rewards.clip import CLIP_H, PREPROCESSOR, WORDS, load_clip, remedy
from scale.rewards.protocol import Images, Scorer, Scores

HUB_ID = "yuvalkirstain/PickScore_v1"
REMEDY = (
    f"`hf download {HUB_ID} --local-dir FOLDER`, and `hf download {CLIP_H} {WORDS} {PREPROCESSOR} --local-dir FOLDER` "
    "if it has no tokenizer, bring all it needs; then pass model=FOLDER"
)


class PickScore(Scorer):
    """`s cos(image, prompt) + shift`, with s the temperature that CLIP ViT-H learnt (about 100).

    `shift = -19` moves the scores, about 17 to 24, to where other rewards are; 0 gives the raw ones. The tokenizer and
    the preprocessing are those of CLIP ViT-H, which `model` may hold or the hub lend.

    Raises:
        ValueError: a file that is missing, unreadable, refused, or does not fit the others.
    """

    name = "pickscore"
    differentiable = True

    def __init__(self, model: str | Path = HUB_ID, *, shift: float = -19.0) -> None:
        with remedy(self.name, model, REMEDY):
            self.clip = load_clip(model, CLIP_H)
        self.files = self.clip.files
        self.shift = shift
        self.temperature = self.clip.model.logit_scale.exp().item()
        self.range = (shift - self.temperature, shift + self.temperature)

    def _score(self, images: Images, prompts: Sequence[str]) -> Scores:
        return self.temperature * self.clip.cosines(images, prompts) + self.shift
