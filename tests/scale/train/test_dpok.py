"""DPOK on a tiny pipeline: it climbs its reward, the KL holds it back, and a killed run ends like any other."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dbtheory import Preference
from scale import attach
from scale.train import dpok
from scale.train.dpok import Dpok, save_adapter, train
from tests.scale import tiny

PROMPTS = ["a red circle", "a blue star", "a green heart and a red ring"]


class Brightness:
    """The mean of an image's pixels."""

    name = "brightness"
    range = (0.0, 1.0)
    differentiable = True

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return images.mean((1, 2, 3))


class Loud(Brightness):
    """Fails in a chosen round, as a kill would."""

    def __init__(self, rounds: float) -> None:
        self.left = rounds

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt
        return super().score(images, prompts)


def settings(**options) -> Dpok:
    small = {"rounds": 4, "prompts_per_round": 3, "samples_per_prompt": 8, "steps": 4, "microbatch": 24, "updates": 3}
    return Dpok(**{**small, "transitions": 1.0, "bf16": False, "alpha": 1e-4, "learning_rate": 5e-3, **options})


def adapter(pipe) -> dict[str, Tensor]:
    return {k: v.clone() for k, v in dpok.get_peft_model_state_dict(pipe.unet, adapter_name=dpok.ADAPTER).items()}


def test_it_raises_its_reward(tmp_path: Path) -> None:
    """The last rounds' mean reward is above the first's by more than a standard deviation of the base model's."""
    history = train(tiny.sd(), Brightness(), PROMPTS, settings(rounds=30), tmp_path)
    gain = sum(record["reward"] for record in history[-3:]) / 3 - history[0]["reward"]
    assert gain > history[0]["spread"]
    assert history[-1]["kl"] > 0


def test_a_heavy_kl_penalty_holds_it_at_the_base(tmp_path: Path) -> None:
    """Control: with alpha a million times as large, the KL stays a small share of what it grows to without."""
    free = train(tiny.sd(), Brightness(), PROMPTS, settings(rounds=8), tmp_path / "free")
    held = train(tiny.sd(), Brightness(), PROMPTS, settings(rounds=8, alpha=100.0), tmp_path / "held")
    assert held[-1]["kl"] < 0.2 * free[-1]["kl"]


def test_a_killed_run_ends_like_an_uninterrupted_one(tmp_path: Path) -> None:
    """Interrupted in its third round and started again, it reaches the same weights and history, bit for bit."""
    whole, first, second = tiny.sd(), tiny.sd(), tiny.sd()
    expected = train(whole, Brightness(), PROMPTS, settings(), tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        train(first, Loud(2), PROMPTS, settings(), tmp_path / "killed")
    history = train(second, Brightness(), PROMPTS, settings(), tmp_path / "killed")
    assert history == expected
    ours, theirs = adapter(second), adapter(whole)
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert any(bool(value.any()) for key, value in ours.items() if "lora_B" in key)


def test_the_saved_adapter_is_the_trained_one(tmp_path: Path) -> None:
    """Loaded by `attach` with all weight on it, the file gives the trained pipeline's images, to half precision."""
    trained, fresh = tiny.sd(), tiny.sd()
    train(trained, Brightness(), PROMPTS, settings(rounds=2), tmp_path / "work")
    save_adapter(trained, tmp_path / "adapter")
    attach(fresh, {"bright": tmp_path / "adapter"}, Preference({"bright": 1.0}))

    def draw(pipe) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        return pipe(PROMPTS[0], generator=generator, num_inference_steps=4, output_type="latent").images

    assert (draw(fresh) - draw(trained)).abs().max() < 2e-2
    assert (draw(fresh) - draw(tiny.sd())).abs().max() > 5e-2


@pytest.mark.parametrize("name", ["alpha", "rounds", "clip", "learning_rate"])
def test_settings_that_make_no_sense_are_refused(name: str) -> None:
    """ValueError that names the setting."""
    with pytest.raises(ValueError, match=name):
        Dpok(**{name: 0})
    with pytest.raises(ValueError, match="baseline"):
        Dpok(samples_per_prompt=1)
