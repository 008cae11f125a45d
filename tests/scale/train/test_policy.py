"""DDIM's steps as a policy, against diffusers' scheduler and torch's distributions."""

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from scale.train import policy as policies
from scale.train.policy import Policy
from tests.scale import tiny


@pytest.fixture(scope="module")
def policy() -> Policy:
    return Policy(tiny.sd(), steps=5, guidance=3.0)


def _x(seed: int) -> torch.Tensor:
    return torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("index", range(5))
def test_moments_are_those_of_diffusers_ddim(policy: Policy, index: int) -> None:
    """mean + std * noise is DDIMScheduler.step at eta = 1 with that noise, at every step, the last one included."""
    x, eps, noise = _x(0), _x(1), _x(2)
    t = policy.timesteps[index]
    mean, std = policy.moments(x, t.expand(3), eps)
    expected = policy.scheduler.step(eps, t, x, eta=1.0, variance_noise=noise, return_dict=False)[0]
    assert torch.allclose(mean + std * noise, expected, rtol=1e-5, atol=1e-6)


def test_log_probability_and_kl_are_torchs(policy: Policy) -> None:
    """Per dimension, up to the constant that cancels in ratios, they are those of torch.distributions.Normal."""
    t = policy.timesteps[torch.tensor([0, 2, 4])]
    mean, std = policy.moments(_x(0), t, _x(1))
    base, _ = policy.moments(_x(0), t, _x(3))
    x_next = mean + std * _x(4)
    step, base_step = Normal(mean, std.expand_as(mean)), Normal(base, std.expand_as(base))
    constant = 0.5 * torch.log(torch.tensor(2 * torch.pi))
    expected = step.log_prob(x_next).flatten(1).mean(1) + constant
    assert torch.allclose(policies.log_probability(x_next, mean, std), expected, rtol=1e-5, atol=1e-5)
    expected = kl_divergence(step, base_step).flatten(1).mean(1)
    assert torch.allclose(policies.kl_divergence(mean, base, std), expected, rtol=1e-5)


def test_guidance_is_diffusers(policy: Policy) -> None:
    """A rollout's step uses uncond + g (cond - uncond), which at g = 1 is the conditional prediction alone."""
    x, t = _x(0), policy.timesteps[:1].expand(3)
    text = policy.encode(["a red circle", "a blue star", "a green heart"])
    uncond, cond = (policy.pipe.unet(x, t, states, return_dict=False)[0] for states in text)
    with torch.no_grad():
        assert torch.allclose(policy.noise(x, t, text), uncond + 3 * (cond - uncond), atol=1e-5)
    assert not torch.allclose(uncond, cond, atol=1e-4)


def test_rollout_is_what_the_pipeline_draws(policy: Policy) -> None:
    """Fed its own first latents and the same generator, diffusers' pipeline ends at the rollout's images."""
    prompts = ["a red circle"]
    rollout = policy.rollout(prompts, torch.Generator().manual_seed(5))
    pipe = policy.pipe
    images = pipe(
        prompts, generator=torch.Generator().manual_seed(5), num_inference_steps=5, guidance_scale=3.0, eta=1.0,
        output_type="pt",
    ).images  # fmt: skip
    assert rollout.latents.shape == (6, 1, 4, 8, 8)
    assert torch.allclose(rollout.images, images, atol=1e-4)


def test_rollout_records_its_own_log_probabilities(policy: Policy) -> None:
    """Recomputed from the stored latents, the log-probabilities are the recorded ones."""
    rollout = policy.rollout(["a red circle", "a blue star"], torch.Generator().manual_seed(6))
    for k, t in enumerate(rollout.timesteps):
        at = t.expand(2)
        with torch.no_grad():
            mean, std = policy.moments(rollout.latents[k], at, policy.noise(rollout.latents[k], at, rollout.text))
        recomputed = policies.log_probability(rollout.latents[k + 1], mean, std)
        assert torch.allclose(recomputed, rollout.log_probabilities[k], atol=1e-4)
