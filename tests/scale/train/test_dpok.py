"""DPOK on tiny pipelines: its updates follow the gradient, it climbs its reward, and the KL holds it back."""

from pathlib import Path
from typing import Any

import pytest
import torch
from scipy import stats
from torch import Tensor

from scale.train.buffer import Transitions
from scale.train.dpok import Learner, train
from scale.train.policy import log_probability, step_kls
from scale.train.settings import PRESETS, Dpok
from tests.chance import alarms
from tests.scale import tiny
from tests.scale.train.fixtures import PROMPTS, Brightness, Changing, flat, generators, policy, settings, stir, weights

N = 24  # samples of a batch


def p_value(values: Tensor, mean: float) -> float:
    """Student's, two-sided, of a small sample's mean."""
    t = (float(values.mean()) - mean) / (float(values.std()) / len(values) ** 0.5)
    return float(2 * stats.t.sf(abs(t), len(values) - 1))


def test_the_update_follows_the_gradient_of_the_expected_reward() -> None:
    """From one state, with the reward <c, x_next>, the expected reward's gradient is that of <c, mean>, exactly.

    The policy gradient's mean over 30 independent batches, projected on that direction, equals it at a false-alarm
    level of 1e-5; shuffled rewards (control) give a projection that does not.
    """
    options = settings()
    trained = policy(options)
    learner = Learner(trained, Brightness(), PROMPTS, options)
    generator, k = torch.Generator().manual_seed(0), torch.ones(N, dtype=torch.int64)
    x = torch.randn(1, 4, 8, 8, generator=generator).expand(N, -1, -1, -1)
    condition = trained.encode(["a red circle"] * N)
    mean, std = trained.moments(x, k, condition)
    c = torch.randn(4, 8, 8, generator=generator)
    exact = flat(torch.autograd.grad((c * mean[0]).sum(), learner.parameters))
    mean = mean.detach()

    def projection(shuffled: bool) -> Tensor:
        x_next = mean + std * torch.randn(mean.shape, generator=generator)
        rewards = (c * x_next).flatten(1).sum(1)
        rewards = rewards[torch.randperm(N, generator=generator)] if shuffled else rewards
        advantage = (rewards - rewards.mean()) * N / (N - 1)  # the baseline holds a share of each sample itself
        batch = Transitions(x, x_next, k, advantage, log_probability(x_next, mean, std), condition)
        loss, kl, ratio = learner._loss(batch)
        assert float(kl.detach()) == float(ratio.detach()) == 0.0
        ascent = -flat(torch.autograd.grad(loss, learner.parameters))
        return mean[0].numel() * ascent @ exact / exact.dot(exact)  # log-probabilities are per dimension

    right, wrong = (torch.stack([projection(shuffled) for _ in range(30)]) for shuffled in (False, True))
    assert not alarms([p_value(right, 1.0), p_value(wrong, 0.0)])
    assert alarms([p_value(wrong, 1.0)])
    assert alarms([p_value(right, 0.0)])


def test_the_penalty_is_the_kl_of_the_trajectories() -> None:
    """Without advantages the loss is reward_weight * alpha * KL per dimension and step, the KL `step_kls`'."""
    options = settings(alpha=0.3, reward_weight=7.0)
    trained = stir(policy(options))
    learner = Learner(trained, Brightness(), PROMPTS, options)
    rollout = trained.rollout(PROMPTS, generators(3))
    pool = learner._scored(rollout)
    loss, kl, _ = learner._loss(pool.transitions(torch.arange(pool.steps * len(pool))))
    expected = step_kls(trained, rollout).sum(0).mean()
    torch.testing.assert_close(kl.detach(), expected, rtol=1e-5, atol=0.0)
    torch.testing.assert_close(loss.detach(), 7 * 0.3 * expected / (pool.steps * rollout.states[0, 0].numel()))
    assert float(expected) > 1e-2


def test_microbatches_change_no_gradient(tmp_path: Path) -> None:
    """An update in parts, the last of them smaller, ends at the weights of an update in one piece."""
    ends = []
    for part in (16, 6):
        trained = policy(settings(microbatch=part))
        train(trained, Brightness(), PROMPTS, settings(microbatch=part, rounds=1), tmp_path / str(part))
        ends.append(weights(trained))
    before = weights(policy(settings()))
    assert (ends[0] - ends[1]).norm() < 1e-2 * (ends[0] - before).norm()


@pytest.mark.slow
def test_it_raises_its_reward(tmp_path: Path) -> None:
    """Mean rewards of the last 10 of 24 rounds beat those of the first 10, at the 1e-5 level; control: no learning."""

    def differences(learning_rate: float) -> Tensor:
        options = settings(rounds=24, prompts_per_round=3, learning_rate=learning_rate, alpha=1e-6, decay=False)
        work = tmp_path / str(learning_rate)
        history = train(policy(options), Brightness(), PROMPTS, options, work)
        rewards = torch.tensor([record["reward"] for record in history])
        return rewards[-10:] - rewards[:10]

    learned, idle = differences(1e-2), differences(1e-9)
    assert alarms([p_value(learned, 0.0)])
    assert float(learned.mean()) > 0
    assert not alarms([p_value(idle, 0.0)])


def test_a_heavy_kl_penalty_holds_it_at_the_base(tmp_path: Path) -> None:
    """With alpha a million times as large, the KL stays a small share of what it grows to (control) without."""
    free, held = (
        train(policy(options), Brightness(), PROMPTS, options, tmp_path / str(options.alpha))
        for options in (settings(rounds=5), settings(rounds=5, alpha=100.0))
    )
    assert held[-1]["kl"] < 0.2 * free[-1]["kl"]


@pytest.mark.parametrize("make", [tiny.sdxl, tiny.v_prediction])
def test_other_models_train_by_the_same_code(make: Any, tmp_path: Path) -> None:
    """SDXL under guidance and v-prediction: a round moves the weights and records finite figures."""
    options = settings(rounds=2, guidance=3.0)
    trained = policy(options, make)
    before, seen = weights(trained), []
    history = train(trained, Brightness(), PROMPTS, options, tmp_path, observe=lambda *it: seen.append(it))
    assert seen == list(enumerate(history))
    assert bool(torch.tensor([list(record.values()) for record in history]).isfinite().all())
    assert history[0]["learning_rate"] == 2 * history[1]["learning_rate"] == options.learning_rate
    assert (weights(trained) - before).abs().max() > 1e-3


def test_a_round_scores_the_guesses_only_where_it_looks_ahead(tmp_path: Path) -> None:
    """steps + 1 calls of the reward a round with `look_ahead`, one without."""
    for look_ahead, calls in ((True, 5), (False, 1)):
        reward, options = Changing(4, lambda _, scores: scores), settings(look_ahead=look_ahead, rounds=1)
        train(policy(options), reward, PROMPTS, options, tmp_path / str(look_ahead))
        assert reward.calls == calls


POSITIVE = ("batch", "microbatch", "rank", "steps", "rounds", "prompts_per_round", "checkpoint_every")


@pytest.mark.parametrize(
    ("option", "reason"),
    [
        *(({name: 0}, f"{name} must be positive, received 0") for name in POSITIVE),
        *(({name: -1.0}, f"{name} must be positive, received -1.0") for name in ("alpha", "clip", "learning_rate")),
        ({"alpha": float("nan")}, "alpha must be positive, received nan"),
        ({"guidance": -1.0}, "guidance must not be negative, received -1.0"),
        ({"trace": 1.5}, r"trace must lie in \[0, 1\], received 1.5"),
        ({"trace": -0.5}, r"trace must lie in \[0, 1\], received -0.5"),
        ({"precision": "fp8"}, "precision must be no, bf16 or fp16, received 'fp8'"),
    ],
)
def test_settings_that_make_no_sense_are_refused(option: dict[str, Any], reason: str) -> None:
    """ValueError that names the setting and what was received."""
    with pytest.raises(ValueError, match=reason):
        Dpok(**option)


def test_the_papers_settings_are_the_papers() -> None:
    """The KL weight 0.1 at reward weight 1000, rank 4, 50 steps, 5 updates of 2 x 12, about 96,000 samples."""
    paper = PRESETS["paper"]
    assert paper.alpha * paper.reward_weight == pytest.approx(0.1)
    assert paper.rounds * paper.images == 96_000
    assert (paper.rank, paper.steps, paper.updates, paper.batch, paper.microbatch) == (4, 50, 5, 2 * 12, 2)
    assert (paper.clip, paper.learning_rate, paper.precision) == (1e-4, 1e-5, "fp16")


def test_what_cannot_be_trained_is_refused(tmp_path: Path) -> None:
    """No prompts; a reward that tells no images apart: ValueError that says so and names the reward."""
    options = settings()
    with pytest.raises(ValueError, match="training needs prompts, received none"):
        train(policy(options), Brightness(), [], options, tmp_path)
    with pytest.raises(ValueError, match="brightness gave the images of the first round one score"):
        train(policy(options), Changing(4, lambda _, s: torch.ones_like(s)), PROMPTS, options, tmp_path)
    assert list(tmp_path.iterdir()) == []
