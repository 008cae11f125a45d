"""DPOK on a tiny pipeline: it climbs its reward, the KL holds it back, and a killed run ends like any other."""

from collections.abc import Iterable, Sequence
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from torch import Tensor

from dbtheory import Preference
from scale import attach
from scale.train import dpok
from scale.train.dpok import Dpok, Transitions, save_adapter, train
from scale.train.policy import Policy, log_probability
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


def _flat(tensors: Iterable[Tensor]) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors])


def adapter(pipe) -> dict[str, Tensor]:
    return {k: v.clone() for k, v in dpok.get_peft_model_state_dict(pipe.unet, adapter_name=dpok.ADAPTER).items()}


def test_the_update_follows_the_gradient_of_the_expected_reward() -> None:
    """From one state, with the reward <c, x_next>, the expected reward's gradient is that of <c, mean>, exactly.

    The policy-gradient update's mean over 40 independent batches, projected on that direction, equals it at a false-
    alarm level of 1e-5 (z = 4.4); shuffled rewards (control) give a projection that does not.
    """
    pipe, prompts = tiny.sd(), ["a red circle"] * 64
    pipe.unet.requires_grad_(False)
    pipe.unet.add_adapter(
        LoraConfig(r=4, target_modules=list(dpok.ATTENTION + dpok.CONVOLUTIONS)), adapter_name="expert"
    )
    parameters = [p for p in pipe.unet.parameters() if p.requires_grad]
    policy, generator = Policy(pipe, steps=4, guidance=2.0), torch.Generator().manual_seed(0)
    x = torch.randn(1, 4, 8, 8, generator=generator).expand(64, -1, -1, -1)
    t, text = policy.timesteps[1].expand(64), policy.encode(prompts)
    mean, std = policy.moments(x, t, policy.noise(x, t, text))
    c = torch.randn(4, 8, 8, generator=generator) / 256  # small: the update clips gradients of norm above 1
    exact = _flat(torch.autograd.grad((c * mean[0]).sum(), parameters))
    mean = mean.detach()

    def projection(shuffled: bool) -> Tensor:
        x_next = mean + std * torch.randn(mean.shape, generator=generator)
        rewards = (c * x_next).flatten(1).sum(1)
        rewards = rewards[torch.randperm(64, generator=generator)] if shuffled else rewards
        advantage = (rewards - rewards.mean()) * 64 / 63  # the baseline holds a share of each sample itself
        batch = Transitions(x, x_next, t, text, advantage, log_probability(x_next, mean, std), mean)
        before = _flat(parameters).clone()
        dpok._update(policy, [batch], settings(updates=1), torch.optim.SGD(parameters, lr=1.0), kl_weight=0.0)
        ascent = _flat(parameters) - before
        torch.nn.utils.vector_to_parameters(before, parameters)
        return mean[0].numel() * ascent.detach() @ exact / exact.dot(exact)  # log-probabilities are per dimension

    for shuffled, expected in ((False, 1.0), (True, 0.0)):
        values = torch.stack([projection(shuffled) for _ in range(40)])
        assert abs(values.mean() - expected) < 4.4 * values.std() / 40**0.5
        assert values.std() / 40**0.5 < 0.15  # so that 0 and 1 are told apart


def test_it_raises_its_reward(tmp_path: Path) -> None:
    """The last 20 of 60 rounds reward better than the first 10, at the 1e-5 level (z = 4.3); control: no learning."""

    def z(learning_rate: float) -> float:
        options = settings(rounds=60, alpha=1e-6, learning_rate=learning_rate)
        history = train(tiny.sd(), Brightness(), PROMPTS, options, tmp_path / str(learning_rate))
        rewards = [record["reward"] for record in history]
        samples = options.prompts_per_round * options.samples_per_prompt
        error = history[0]["spread"] * (1 / (20 * samples) + 1 / (10 * samples)) ** 0.5
        return (sum(rewards[-20:]) / 20 - sum(rewards[:10]) / 10) / error

    assert z(2e-2) > 4.3
    assert abs(z(1e-9)) < 4.3


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


@pytest.mark.parametrize("name", ["alpha", "clip", "learning_rate"])
def test_settings_that_make_no_sense_are_refused(name: str) -> None:
    """ValueError that names the setting."""
    with pytest.raises(ValueError, match=name):
        Dpok(**{name: 0.0})
    with pytest.raises(ValueError, match="rounds"):
        Dpok(rounds=0)
    with pytest.raises(ValueError, match="baseline"):
        Dpok(samples_per_prompt=1)
    for options in ({"transitions": 0.0}, {"transitions": 1.5}, {"microbatch": 0}):
        with pytest.raises(ValueError, match="transitions"):
            Dpok(**options)


def test_a_reward_that_tells_no_images_apart_is_refused(tmp_path: Path) -> None:
    """Equal scores in the first round leave no scale for the objective: ValueError that names the reward."""

    class Flat(Brightness):
        def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
            return torch.ones(len(images))

    with pytest.raises(ValueError, match="brightness gave the images"):
        train(tiny.sd(), Flat(), PROMPTS, settings(), tmp_path)
