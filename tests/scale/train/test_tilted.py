"""Reward-weighted denoising on a tiny pipeline: its weights, its folders, and that it learns what it is paid for."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from scale.train.denoiser import DenoiserPolicy
from scale.train.policy import Rollout
from scale.train.tilted import Record, effective_sizes, summary, tilted_weights, train
from scale.train.tilted_settings import Tilted
from tests.scale import tiny

PROMPTS = ["a red circle", "a blue star", "a green heart and a red ring"]


class Brightness:
    """The mean of an image's pixels, in thousandths; a kill after `left` calls."""

    name = "brightness"

    def __init__(self, sign: float = 1.0, left: float = float("inf")) -> None:
        self.sign, self.left = sign, left

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt
        return 1000 * self.sign * images.mean((1, 2, 3))


class Counting(DenoiserPolicy):
    """Counts its rollouts, and fails after `left` of them, as a kill would."""

    left = 1000

    def rollout(self, prompts: Sequence[str], generators: Sequence[torch.Generator]) -> Rollout:
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt
        return super().rollout(prompts, generators)


def settings(**options) -> Tilted:
    small = {
        "alpha": 10.0,
        "prompts": 3,
        "samples_per_prompt": 8,
        "rollout_batch": 7,
        "steps": 3,
        "rounds": 3,
        "updates": 2,
    }
    return Tilted(**{**small, "batch": 12, "microbatch": 5, "precision": "no", **options})


def policy_of(seed: int = 0, left: int = 1000) -> Counting:
    policy = Counting(tiny.sd(seed), 3)
    policy.add_adapter(4, ("to_q", "to_v", "conv1"), seed=0)
    policy.left = left
    return policy


def adapter(policy: DenoiserPolicy) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in policy.trainable().items()}


def test_weights_are_the_tilt_within_each_group() -> None:
    """e^{r / alpha} over its mean in the group, by hand; they sum to the group's size, whatever a group's level."""
    rewards = torch.tensor([0.0, 1.0, 3.0, 500.0, 501.0, 503.0])
    weights = tilted_weights(rewards, 3, 2.0)
    by_hand = torch.tensor([1.0, 2.718281828**0.5, 2.718281828**1.5])
    assert torch.allclose(weights, (3 * by_hand / by_hand.sum()).repeat(2), rtol=1e-4)


def test_effective_sizes_of_known_weights() -> None:
    """All of equal ones, one of a single one, (1 + 3)^2 / (1 + 9) of 1 and 3."""
    weights = torch.tensor([1.0, 1.0, 0.0, 2.0, 0.5, 1.5])
    assert torch.allclose(effective_sizes(weights, 2), torch.tensor([2.0, 1.0, 1.6]))


def brightness_of(policy: DenoiserPolicy) -> Tensor:
    generators = [torch.Generator().manual_seed(1000 + i) for i in range(96)]
    return 1000 * policy.rollout(PROMPTS * 32, generators).images.mean((1, 2, 3))


@pytest.mark.slow
@pytest.mark.parametrize(("look_ahead", "updates"), [(True, 15), (False, 60)])
def test_it_learns_what_it_is_paid_for(tmp_path: Path, look_ahead: bool, updates: int) -> None:
    """On the same noise, paid for brightness it draws brighter images than paid against it: z above 4.3 (1e-5).

    Control: with an alpha that makes all weights equal, what it is paid for makes no such difference.
    """

    def after(sign: float, alpha: float) -> Tensor:
        policy = policy_of()
        options = settings(
            rounds=1, updates=updates, batch=48, microbatch=48, samples_per_prompt=64, rollout_batch=192,
            learning_rate=1e-2, alpha=alpha, look_ahead=look_ahead,
        )  # fmt: skip
        train(policy, Brightness(sign), PROMPTS, options, tmp_path / f"{sign}{alpha}", samples=tmp_path / "samples")
        return brightness_of(policy)

    paid, control = (after(1.0, alpha) - after(-1.0, alpha) for alpha in (4.0, 1e9))
    assert float(paid.mean() / paid.std() * len(paid) ** 0.5) > 4.3
    assert abs(float(control.mean())) < 0.05 * float(paid.mean())


@pytest.mark.parametrize("killed", [{"rollouts": 2}, {"scores": 2}, {"scores": 15}])
def test_a_killed_run_ends_like_an_uninterrupted_one(tmp_path: Path, killed: dict[str, int]) -> None:
    """Killed while sampling, scoring or training, and started again: the same weights and records, bit for bit."""
    whole, first, second = policy_of(), policy_of(left=killed.get("rollouts", 1000)), policy_of()
    expected = train(whole, Brightness(), PROMPTS, settings(), tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        train(first, Brightness(left=killed.get("scores", 1000)), PROMPTS, settings(), tmp_path / "killed")
    seen: list[int] = []

    def observe(index: int, record: Record) -> None:
        seen.append(index)

    assert train(second, Brightness(), PROMPTS, settings(), tmp_path / "killed", observe=observe) == expected
    assert seen == ([1, 2] if killed == {"scores": 15} else [0, 1, 2])
    ours, theirs = adapter(second), adapter(whole)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert any(bool(value.any()) for name, value in ours.items() if "lora_B" in name)


def test_experts_share_their_samples(tmp_path: Path) -> None:
    """A second reward on the same folder draws one sample, which tells the model; the first draws all, too."""
    first, second = policy_of(), policy_of()
    for policy, sign in ((first, 1.0), (second, -1.0)):
        train(policy, Brightness(sign), PROMPTS, settings(), tmp_path / str(sign), samples=tmp_path / "samples")
    assert (1000 - first.left, 1000 - second.left) == (1 + 4, 1)  # 24 samples in parts of 7
    assert any(not torch.equal(adapter(first)[name], value) for name, value in adapter(second).items())


def test_folders_of_something_else_are_refused(tmp_path: Path) -> None:
    """ValueError for samples of another model or seed, another reward's scores, other settings, and broken files."""
    train(policy_of(), Brightness(), PROMPTS, settings(), tmp_path)

    class Other(Brightness):
        name = "other"

    with pytest.raises(ValueError, match="another model"):
        train(policy_of(seed=1), Brightness(), PROMPTS, settings(), tmp_path)
    with pytest.raises(ValueError, match="another texts, seed"):
        train(policy_of(), Brightness(), PROMPTS, settings(seed=3), tmp_path)
    with pytest.raises(ValueError, match="another reward"):
        train(policy_of(), Other(), PROMPTS, settings(), tmp_path)
    with pytest.raises(ValueError, match="another alpha"):
        train(policy_of(), Brightness(), PROMPTS, settings(alpha=11.0), tmp_path)
    (tmp_path / "samples" / "part-00000007.safetensors").write_bytes(b"broken")
    with pytest.raises(ValueError, match="part-00000007"):
        train(policy_of(), Brightness(), PROMPTS, settings(), tmp_path)
    (tmp_path / "samples" / "about.json").write_text("{")
    with pytest.raises(ValueError, match=r"about\.json"):
        train(policy_of(), Brightness(), PROMPTS, settings(), tmp_path)


def test_rewards_that_cannot_teach_are_refused(tmp_path: Path) -> None:
    """ValueError for one score a prompt, for weight on single samples (with an alpha that will do), for no number."""
    with pytest.raises(ValueError, match="nothing to learn"):
        summary(torch.tensor([1.0, 1.0, 2.0, 2.0]), settings(samples_per_prompt=2), "flat")
    rewards = torch.randn(80, generator=torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match="raise alpha to ") as caught:
        summary(rewards, settings(alpha=0.01), "sharp")
    enough = float(str(caught.value).split("raise alpha to ")[1].split()[0])
    found = summary(rewards, settings(alpha=1.1 * enough), "sharp")
    assert 1.5 <= found["effective"] < 2
    assert found["goal"] > found["reward"]

    class Nan(Brightness):
        def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
            return super().score(images, prompts) * float("nan")

    with pytest.raises(ValueError, match="brightness gave 24 of 24 images no finite score"):
        train(policy_of(), Nan(), PROMPTS, settings(), tmp_path)
    with pytest.raises(ValueError, match="received none"):
        train(policy_of(), Brightness(), [], settings(), tmp_path)


@pytest.mark.parametrize("name", ["alpha", "prompts", "steps", "rounds", "updates", "batch", "learning_rate", "rank"])
def test_settings_that_make_no_sense_are_refused(name: str) -> None:
    """ValueError that names the setting."""
    with pytest.raises(ValueError, match=name):
        replace(Tilted(), **{name: type(getattr(Tilted(), name))(0)})
    with pytest.raises(ValueError, match="at least 2"):
        Tilted(samples_per_prompt=1)
    with pytest.raises(ValueError, match="guidance"):
        Tilted(guidance=-1.0)
    with pytest.raises(ValueError, match="precision"):
        Tilted(precision="half")
