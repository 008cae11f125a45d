"""DDIM's steps as a policy, against diffusers' schedulers and pipelines and torch's distributions."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from scale.train import policy as policies
from scale.train.denoiser import DenoiserPolicy
from tests.scale import tiny
from tests.scale.train.fixtures import PROMPTS, TARGETS, flat, generators, stir

STEPS = 5


def _policy(make: Callable[[], Any] = tiny.sd, guidance: float = 3.0, **options: Any) -> DenoiserPolicy:
    """A policy whose adapter matters."""
    made = DenoiserPolicy(make(), STEPS, guidance, **options)
    made.add_adapter(4, TARGETS)
    return stir(made)


def _x(seed: int, n: int = STEPS) -> Tensor:
    return torch.randn(n, 4, 8, 8, generator=torch.Generator().manual_seed(seed))


def _each_step(policy: DenoiserPolicy) -> dict[str, Any]:
    """Every step once, from random states, each with a prompt."""
    return {"x": _x(0), "k": torch.arange(STEPS), "condition": policy.encode((PROMPTS * 2)[:STEPS])}


def _predicted(policy: DenoiserPolicy, x: Tensor, t: Tensor, condition: Any) -> Tensor:
    """What the UNet itself says under guidance, one row at a time."""
    rows = []
    for row in range(len(x)):
        sides = [
            policy.pipe.unet(x[row : row + 1], t[row], states[row : row + 1], return_dict=False)[0]
            for states in (condition["empty_states"], condition["states"])
        ]
        rows.append(sides[0] + policy.guidance * (sides[1] - sides[0]))
    return torch.cat(rows)


@pytest.mark.parametrize("make", [tiny.sd, tiny.v_prediction])
@torch.no_grad()
def test_a_step_is_diffusers_ddim(make: Callable[[], Any]) -> None:
    """mean + std * noise is DDIMScheduler.step at eta = 1 with that noise, at every step with the last one included.

    So are the guesses of the data; noise prediction and v-prediction; the steps of a batch differ from row to row.
    """
    policy = _policy(make)
    scheduler, at, noise = policy.pipe.scheduler, _each_step(policy), _x(2)
    scheduler.set_timesteps(STEPS)
    mean, std = policy.moments(**at)
    assert bool((std > 0).all())
    out = _predicted(policy, at["x"], scheduler.timesteps, at["condition"])
    guesses = policy.step(**at)[2]
    for row, t in enumerate(scheduler.timesteps):
        one = slice(row, row + 1)
        expected = scheduler.step(out[one], t, at["x"][one], eta=1.0, variance_noise=noise[one])
        torch.testing.assert_close((mean + std * noise)[one], expected.prev_sample, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(guesses[one], expected.pred_original_sample, rtol=1e-5, atol=1e-4)


@torch.no_grad()
def test_log_probability_and_kl_are_torchs() -> None:
    """Per dimension, up to the constant that cancels in ratios, they are those of torch.distributions.Normal."""
    policy = _policy()
    at = _each_step(policy)
    mean, std = policy.moments(**at)
    with policy.base():
        base, _ = policy.moments(**at)
    x_next = mean + std * _x(4)
    step, base_step = Normal(mean, std.expand_as(mean)), Normal(base, std.expand_as(base))
    constant = 0.5 * torch.log(torch.tensor(2 * torch.pi))
    expected = step.log_prob(x_next).flatten(1).mean(1) + constant
    torch.testing.assert_close(policies.log_probability(x_next, mean, std), expected, rtol=1e-5, atol=1e-5)
    expected = kl_divergence(step, base_step).flatten(1).mean(1)
    torch.testing.assert_close(policies.kl_divergence(mean, base, std), expected, rtol=1e-5, atol=0.0)
    assert float(expected.min()) > 1e-4


def test_the_kl_of_each_step_sums_torchs_over_dimensions() -> None:
    """In nats, at the states that the rollout went through; without an adapter's effect it is zero."""
    policy = _policy()
    rollout = policy.rollout(PROMPTS, generators(3))
    expected = []
    for step, x in enumerate(rollout.states[:-1]):
        at = {"x": x, "k": torch.full((3,), step), "condition": rollout.condition}
        with torch.no_grad():
            mean, std = policy.moments(**at)
            with policy.base():
                base, _ = policy.moments(**at)
        std = std.expand_as(mean)
        expected.append(kl_divergence(Normal(mean, std), Normal(base, std)).flatten(1).sum(1))
    torch.testing.assert_close(policies.step_kls(policy, rollout), torch.stack(expected), rtol=1e-5, atol=0.0)
    assert float(policies.step_kls(stir(policy, scale=0.0), rollout).max()) == 0.0


@torch.no_grad()
def test_guidance_is_diffusers() -> None:
    """uncond + g (cond - uncond), which at g = 1 is the conditional prediction alone."""
    at = _each_step(_policy())
    guided = _policy(guidance=3.0)
    expected = _predicted(guided, at["x"], guided.timesteps, at["condition"])
    torch.testing.assert_close(guided.noise(**at), expected, rtol=1e-5, atol=1e-5)
    alone = _policy(guidance=1.0)
    expected = alone.pipe.unet(at["x"], alone.timesteps, at["condition"]["states"], return_dict=False)[0]
    torch.testing.assert_close(alone.noise(**at), expected, rtol=1e-5, atol=1e-5)
    assert (alone.noise(**at) - guided.noise(**at)).abs().max() > 1e-2
    assert set(alone.encode(PROMPTS)) == {"states"}  # half the cost


@pytest.mark.parametrize("size", [None, 32])
@pytest.mark.parametrize("guidance", [1.0, 5.0])
@pytest.mark.parametrize("make", [tiny.sd, tiny.v_prediction, tiny.sdxl])
def test_a_rollout_is_what_the_pipeline_draws(make: Callable[[], Any], guidance: float, size: int | None) -> None:
    """Given the same generators, one a row, diffusers' pipeline with the adapter on ends at the rollout's images.

    Born of a bug: SDXL is guided away from zeros, not from the empty prompt's states.
    """
    policy, prompts = _policy(make, guidance, size=size), [*PROMPTS[:2], PROMPTS[0]]
    rollout = policy.rollout(prompts, generators(3))
    images = policy.pipe(
        prompts, generator=generators(3), num_inference_steps=STEPS, guidance_scale=guidance, eta=1.0,
        output_type="pt", height=size, width=size,
    ).images  # fmt: skip
    assert rollout.prompts == prompts
    assert rollout.states.shape[:3] == (STEPS + 1, 3, 4)
    torch.testing.assert_close(rollout.images, images, rtol=0.0, atol=1e-5)
    with policy.base():
        assert (policy.rollout(prompts, generators(3)).images - images).abs().max() > 1e-2
    assert (policy.rollout(prompts, generators(3, first=1)).images - images).abs().max() > 1e-2


def test_sdxl_is_told_its_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """Control of the test above: with another size in its time ids the pictures differ."""
    policy = _policy(tiny.sdxl, size=32)
    told = policy.rollout(PROMPTS, generators(3)).images
    monkeypatch.setattr(policy, "_time_ids", lambda n, dtype: torch.tensor([[16.0, 16, 0, 0, 16, 16]]).expand(n, -1))
    assert (policy.rollout(PROMPTS, generators(3)).images - told).abs().max() > 1e-3


@pytest.mark.parametrize("make", [tiny.sd, tiny.sdxl])
def test_a_rollout_records_its_own_log_probabilities(make: Callable[[], Any]) -> None:
    """Recomputed from the stored states, the log-probabilities and guesses are the recorded ones."""
    policy = _policy(make)
    rollout = policy.rollout(PROMPTS, generators(3))
    for step in range(STEPS):
        at = {"x": rollout.states[step], "k": torch.full((3,), step), "condition": rollout.condition}
        with torch.no_grad():
            mean, std = policy.moments(**at)
            guess = policy.step(**at)[2]
        again = policies.log_probability(rollout.states[step + 1], mean, std)
        torch.testing.assert_close(again, rollout.log_probabilities[step], rtol=0.0, atol=1e-4)
        torch.testing.assert_close(guess, rollout.guesses[step], rtol=0.0, atol=1e-4)
    torch.testing.assert_close(policy.decode(rollout.states[-1]), rollout.images)


@pytest.mark.parametrize("make", [tiny.sd, tiny.sdxl])
def test_a_row_does_not_depend_on_its_batch(make: Callable[[], Any]) -> None:
    """Alone, a prompt with its generator gives the row that it gives among others."""
    policy = _policy(make)
    together = policy.rollout(PROMPTS, generators(3)).states
    for row, (prompt, generator) in enumerate(zip(PROMPTS, generators(3), strict=True)):
        alone = policy.rollout([prompt], [generator]).states[:, 0]
        torch.testing.assert_close(alone, together[:, row], rtol=0.0, atol=1e-4)
    assert (together[:, 0] - together[:, 1]).abs().max() > 0.1


@pytest.mark.parametrize("make", [tiny.sd, tiny.sdxl])
@torch.no_grad()
def test_base_is_the_model_without_adapter(make: Callable[[], Any]) -> None:
    """Bit for bit that of the pipeline before `add_adapter`; the adapter is on again afterwards, after an error too."""
    policy = DenoiserPolicy(make(), STEPS, 3.0)
    at = _each_step(policy)
    before, _ = policy.moments(**at)
    policy.add_adapter(4, TARGETS)
    fresh, _ = policy.moments(**at)
    torch.testing.assert_close(fresh, before)  # one factor is zero
    adapted, _ = stir(policy).moments(**at)
    names = list(policy.trainable())

    def check() -> None:
        assert torch.equal(policy.moments(**at)[0], adapted)
        assert list(policy.trainable()) == names

    with policy.base():
        assert torch.equal(policy.moments(**at)[0], before)
    check()
    with pytest.raises(KeyboardInterrupt), policy.base():
        raise KeyboardInterrupt
    check()
    assert (adapted - before).abs().max() > 1e-2


def _gradient(policy: DenoiserPolicy) -> tuple[Tensor, int]:
    """Gradient of the sum of a step's means, and how often a block of the UNet ran."""
    runs: list[int] = []
    handle = policy.pipe.unet.mid_block.resnets[1].register_forward_pre_hook(lambda *_: runs.append(1))
    mean, _ = policy.moments(**_each_step(policy))
    gradient = flat(torch.autograd.grad(mean.sum(), list(policy.trainable().values())))
    handle.remove()
    return gradient, len(runs)


def test_gradient_checkpointing_gives_the_same_gradients() -> None:
    """To float32's rounding; the block ran once more, on the way back."""
    policy = _policy()
    expected, once = _gradient(policy)
    policy.pipe.unet.enable_gradient_checkpointing()
    gradient, twice = _gradient(policy)
    torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-6)
    assert (once, twice) == (1, 2)
    assert float(expected.abs().max()) > 1e-2


@torch.no_grad()
def test_autocast_to_bfloat16_is_close_to_float32() -> None:
    """Within 8 bits' rounding of the means, in float32, and not the same."""
    exact, rounded = _policy(), _policy(autocast=lambda: torch.autocast("cpu", torch.bfloat16))
    (mean, std), (rough, rough_std) = exact.moments(**_each_step(exact)), rounded.moments(**_each_step(rounded))
    assert rough.dtype == torch.float32
    assert torch.equal(std, rough_std)
    assert 1e-5 < (mean - rough).abs().max() < 0.05 * mean.abs().max()


@pytest.mark.parametrize("make", [tiny.sd, tiny.sdxl])
def test_only_the_adapter_is_trained(make: Callable[[], Any]) -> None:
    """Two float32 factors a layer, also in a bfloat16 model, and nothing else of the pipeline has a gradient."""
    pipe = make()
    for part in (pipe.unet, pipe.vae, pipe.text_encoder):
        part.to(torch.bfloat16)
    layers = [name for name, _ in pipe.unet.named_modules() if name.endswith(TARGETS)]
    policy = DenoiserPolicy(pipe, STEPS)
    policy.add_adapter(4, TARGETS)
    trainable = policy.trainable()
    expected = {f"{name}.lora_{factor}.expert.weight" for name in layers for factor in "AB"}
    assert set(trainable) == expected
    assert {p.dtype for p in trainable.values()} == {torch.float32}
    modules = (value for value in pipe.components.values() if isinstance(value, torch.nn.Module))
    assert sum(p.requires_grad for module in modules for p in module.parameters()) == len(expected)


def test_the_seed_decides_the_adapter() -> None:
    """Equal seeds, equal adapters, whatever was drawn before; and no global draw is spent."""
    drawn = []
    for seed in (3, 3, 4):
        policy = DenoiserPolicy(tiny.sd(), STEPS)
        torch.rand(len(drawn))
        state = torch.get_rng_state()
        policy.add_adapter(4, TARGETS, seed=seed)
        assert torch.equal(torch.get_rng_state(), state)
        drawn.append(flat(policy.trainable().values()))
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[1], drawn[2])


@torch.no_grad()
def test_a_schedule_that_ends_at_time_zero_has_noise_in_every_step() -> None:
    """Born of a bug: schedulers with steps_offset 0, diffusers' default, left the last step without density."""
    pipe = tiny.sd()
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, steps_offset=0, set_alpha_to_one=True)
    rollout = DenoiserPolicy(pipe, STEPS).rollout(PROMPTS, generators(3))
    assert bool(rollout.log_probabilities.isfinite().all())


@pytest.mark.parametrize("steps", [-1, 0, 1000])
def test_impossible_numbers_of_steps_are_refused(steps: int) -> None:
    """ValueError that gives the range; its ends work."""
    with pytest.raises(ValueError, match=f"steps must lie between 1 and 999, received {steps}"):
        DenoiserPolicy(tiny.sd(), steps)
    for end in (1, 999):
        policy = DenoiserPolicy(tiny.sd(), end)
        last = policy.encode(PROMPTS[:1])
        mean, std = policy.moments(_x(0, 1), torch.tensor([end - 1]), last)
        assert bool(mean.isfinite().all() and (std > 0).all())


@pytest.mark.parametrize("option", [{"clip_sample": True}, {"thresholding": True}, {"prediction_type": "sample"}])
def test_schedulers_without_gaussian_steps_are_refused(option: dict[str, Any]) -> None:
    """ValueError that says what was received."""
    pipe = tiny.sd()
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, **option)
    with pytest.raises(ValueError, match="received clip_sample .*" + "|".join(map(str, option.values()))):
        DenoiserPolicy(pipe, STEPS)


def test_a_pipeline_without_a_unet_is_refused() -> None:
    """ValueError that names the pipeline's class."""
    with pytest.raises(ValueError, match=r"needs a pipeline with a UNet .* not StableDiffusion3Pipeline"):
        DenoiserPolicy(tiny.sd3(t5=False), STEPS)
