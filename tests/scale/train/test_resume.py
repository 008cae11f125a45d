"""Killed runs end like uninterrupted ones, and runs that go astray stop with their last good weights kept."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from scale.train import checkpoint
from scale.train.divergence import Diverged
from scale.train.dpok import train
from tests.scale.train.fixtures import PROMPTS, Brightness, Changing, policy, settings, weights

LOST = {"seconds"}  # all that may differ


def _kill_in(index: int) -> Callable[[int, Tensor], Tensor]:
    """Interrupts the scoring of a round, once its first batch is scored."""

    def change(current: int, scores: Tensor) -> Tensor:
        if current == index:
            raise KeyboardInterrupt
        return scores

    return change


def _equal(ours: Any, theirs: Any) -> bool:
    """Bit for bit, also within containers."""
    if isinstance(ours, Tensor):
        return torch.equal(ours, theirs)
    if isinstance(ours, dict):
        return ours.keys() == theirs.keys() and all(_equal(ours[key], theirs[key]) for key in ours)
    if isinstance(ours, list | tuple):
        return len(ours) == len(theirs) and all(map(_equal, ours, theirs))
    return ours == theirs


def _stored(work: Path, name: str = checkpoint.LAST) -> dict[str, Any]:
    state = torch.load(work / name, weights_only=True)
    return {key: value for key, value in state.items() if key not in LOST}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"checkpoint_every": 2, "trace": 1.0, "look_ahead": False},
        {"replay": True, "buffer": 48, "later_kl": True},  # a round and a half
    ],
    ids=["every round", "every other round", "replay"],
)
def test_a_killed_run_ends_like_an_uninterrupted_one(options: dict[str, Any], tmp_path: Path) -> None:
    """Killed in its fourth round and started again: the same history, weights and checkpoint, bit for bit.

    The checkpoint holds the optimizers, the value function and the buffer too. Control: at the kill they all differed.
    """
    asked = settings(rounds=5, **options)
    whole, first, second = (policy(asked) for _ in range(3))
    expected = train(whole, Brightness(), PROMPTS, asked, tmp_path / "whole")
    a_round = asked.steps if asked.look_ahead else 0
    with pytest.raises(KeyboardInterrupt):
        train(first, Changing(a_round, _kill_in(3)), PROMPTS, asked, tmp_path / "killed")
    between = _stored(tmp_path / "killed")
    assert len(between["history"]) == 3 // asked.checkpoint_every * asked.checkpoint_every
    history = train(second, Brightness(), PROMPTS, asked, tmp_path / "killed")
    assert history == expected
    assert torch.equal(weights(second), weights(whole))
    for name in (checkpoint.LAST, checkpoint.BEST):
        assert _equal(_stored(tmp_path / "killed", name), _stored(tmp_path / "whole", name))
    end = _stored(tmp_path / "whole")
    for part in ("adapter", "optimizer", "value", "value_optimizer", "buffer"):
        assert not _equal(between[part], end[part])


def test_a_kill_between_the_two_files_loses_neither(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`best.pt` is written before the checkpoint that moves on: born of a bug, a resumed run never wrote it."""
    asked, write = settings(rounds=1), checkpoint.write_atomically

    def killed(path: Path, filled: Any) -> None:
        write(path, filled)
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "write_atomically", killed)
    with pytest.raises(KeyboardInterrupt):
        train(policy(asked), Brightness(), PROMPTS, asked, tmp_path)
    monkeypatch.undo()
    train(policy(asked), Brightness(), PROMPTS, asked, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [checkpoint.BEST, checkpoint.LAST]


def test_a_finished_run_is_not_run_again(tmp_path: Path) -> None:
    """Asked again, it gives its history and weights without a round."""
    asked = settings(rounds=1)
    first, again, rounds = policy(asked), policy(asked), []
    history = train(first, Brightness(), PROMPTS, asked, tmp_path)
    assert train(again, Brightness(), PROMPTS, asked, tmp_path, observe=lambda *it: rounds.append(it)) == history
    assert torch.equal(weights(first), weights(again))
    assert rounds == []


def test_a_checkpoint_of_other_settings_is_refused(tmp_path: Path) -> None:
    """ValueError that names the settings that differ, and the checkpoint is left as it was."""
    asked = settings(rounds=1)
    train(policy(asked), Brightness(), PROMPTS, asked, tmp_path)
    kept = (tmp_path / checkpoint.LAST).read_bytes()
    other = settings(rounds=1, alpha=0.5, seed=9)
    with pytest.raises(ValueError, match="of a run with another alpha, seed; choose another folder"):
        train(policy(other), Brightness(), PROMPTS, other, tmp_path)
    assert (tmp_path / checkpoint.LAST).read_bytes() == kept


def _check_kept(work: Path, rounds: int) -> None:
    """The checkpoint is of so many rounds, and all of its numbers are."""
    state = _stored(work)
    assert len(state["history"]) == rounds
    assert all(bool(value.isfinite().all()) for value in state["adapter"].values())


def test_a_scorer_that_turns_nan_is_refused_by_name(tmp_path: Path) -> None:
    """ValueError that names the reward and the prompt; the rounds before are kept."""
    asked = settings()
    reward = Changing(asked.steps, lambda index, scores: scores * torch.nan if index == 2 else scores)
    with pytest.raises(ValueError, match=r"the reward brightness gave NaN or infinity to 8 of 8 images, the first of"):
        train(policy(asked), reward, PROMPTS, asked, tmp_path)
    _check_kept(tmp_path, rounds=2)


def test_an_exploding_reward_ends_in_diverged(tmp_path: Path) -> None:
    """Scores of 1e30 in the third round: Diverged names the round and the checkpoint, which has finite weights."""
    asked = settings()
    reward = Changing(asked.steps, lambda index, scores: scores * 1e30 if index == 2 else scores)
    message = rf"the loss is not finite: .*; stopped in round 3, the last good weights are in {tmp_path}/best.pt"
    with pytest.raises(Diverged, match=message):
        train(policy(asked), reward, PROMPTS, asked, tmp_path)
    _check_kept(tmp_path, rounds=2)


@pytest.mark.parametrize("updates", [1, 2])
def test_a_mad_learning_rate_ends_in_diverged(updates: int, tmp_path: Path) -> None:
    """A learning rate of 1e3 stops within three rounds; the message names the best weights where there are any."""
    asked = settings(learning_rate=1e3, updates=updates)
    with pytest.raises(Diverged, match="stopped in round") as stopped:
        train(policy(asked), Brightness(), PROMPTS, asked, tmp_path)
    named = re.findall(r"\S+\.pt", str(stopped.value))
    assert set(named) == {str(path) for path in tmp_path.glob("best.pt")}


def test_a_collapsing_reward_ends_in_diverged(tmp_path: Path) -> None:
    """A reward that falls by many standard deviations stops after ten rounds; a steady one (control) does not."""
    asked = settings(rounds=11, steps=2, samples_per_prompt=2, updates=1, value_updates=0, learning_rate=1e-9)
    falling = Changing(asked.steps, lambda index, scores: scores - index)
    with pytest.raises(Diverged, match=r"the reward fell from .* over 2 standard deviations; stopped in round 10, the"):
        train(policy(asked), falling, PROMPTS, asked, tmp_path / "falling")
    _check_kept(tmp_path / "falling", rounds=9)
    steady = train(policy(asked), Brightness(), PROMPTS, asked, tmp_path / "steady")
    assert len(steady) == 11
