"""Rewards as users write them: what is read is the sum that stands there, and slips are named."""

from pathlib import Path

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

import scale.rewards.expression
from scale.rewards import Scorer, load_scorer
from scale.rewards.colorfulness import Colorfulness
from scale.rewards.expression import parse_reward
from scale.rewards.protocol import Mix
from scale.rewards.symmetry import Symmetry
from tests.scale.rewards.pictures import PROMPTS, blocks, random_judge

IMAGES = blocks()
SCORES = {name: load_scorer(name).score(IMAGES, PROMPTS).double() for name in ("colorfulness", "jpeg", "symmetry")}


def scores(text: str) -> torch.Tensor:
    return parse_reward(text).score(IMAGES, PROMPTS).double()


@pytest.mark.parametrize(
    ("text", "weights", "constant"),
    [
        ("symmetry", {"symmetry": 1}, 0),
        (" symmetry\n", {"symmetry": 1}, 0),
        ("4*colorfulness", {"colorfulness": 4}, 0),
        ("-symmetry", {"symmetry": -1}, 0),
        ("+ .5 * symmetry", {"symmetry": 0.5}, 0),
        ("0.2*symmetry+0.8*colorfulness", {"symmetry": 0.2, "colorfulness": 0.8}, 0),
        ("0.2 * symmetry  +  0.8 * colorfulness - 2.", {"symmetry": 0.2, "colorfulness": 0.8}, -2),
        ("jpeg - 19", {"jpeg": 1}, -19),
        ("jpeg -19", {"jpeg": 1}, -19),
        ("19 - jpeg", {"jpeg": -1}, 19),
        ("1+2*jpeg+3", {"jpeg": 2}, 4),
        ("1e-2*jpeg - 2.5E+1*symmetry + 1e1", {"jpeg": 0.01, "symmetry": -25}, 10),
        ("symmetry + jpeg + 2*symmetry", {"symmetry": 3, "jpeg": 1}, 0),
        ("jpeg - jpeg + symmetry", {"symmetry": 1}, 0),
    ],
)
def test_an_expression_is_its_sum(text: str, weights: dict[str, float], constant: float) -> None:
    """The scores are the sum by hand of the parts' own scores."""
    expected = torch.stack([weight * SCORES[name] for name, weight in weights.items()]).sum(0) + constant
    torch.testing.assert_close(scores(text), expected, rtol=1e-5, atol=1e-5)


def test_a_name_alone_is_that_scorer() -> None:
    """Nothing is wrapped around a reward that stands alone, as such or as a sum of itself."""
    assert type(parse_reward("symmetry")) is Symmetry
    assert type(parse_reward("0.5*colorfulness + 0.5*colorfulness")) is Colorfulness
    assert isinstance(parse_reward("2*symmetry"), Mix)


def test_a_name_that_stands_twice_is_loaded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two copies of a large model would not fit."""
    loaded = []

    def load(name: str, model: object) -> Scorer:
        loaded.append(name)
        return load_scorer(name)

    monkeypatch.setattr(scale.rewards.expression, "load_scorer", load)
    parse_reward("jpeg + symmetry - 0.5*jpeg")
    assert loaded == ["jpeg", "symmetry"]


NUMBERS = st.floats(-1e3, 1e3, allow_subnormal=False)
SPACE = st.sampled_from(["", " ", "  "])


@settings(deadline=None, derandomize=True)
@given(st.lists(st.tuples(NUMBERS, st.sampled_from(sorted(SCORES)), SPACE), min_size=1, max_size=5), NUMBERS)
@example([(-0.0, "jpeg", "")], 0.0)
def test_random_mixes(terms: list[tuple[float, str, str]], constant: float) -> None:
    """Written with every digit, any mix has the scores of the direct sum, to a part in 1e5 of its largest term; and
    its name, which has twelve digits, is an expression of the same scores."""
    pieces = [f"{' - ' if w < 0 else '+'}{s}{abs(w)!r}{s}*{s}{name}{s}" for w, name, s in terms]
    text = "".join(pieces).removeprefix("+") + f" {'-' if constant < 0 else '+'} {abs(constant)!r}"
    parts = torch.stack([w * SCORES[name] for w, name, _ in terms] + [torch.full((3,), constant).double()])
    tolerance = 1e-5 * (float(parts.abs().max()) + 1e-30)
    torch.testing.assert_close(scores(text), parts.sum(0), rtol=0, atol=tolerance)
    torch.testing.assert_close(scores(parse_reward(text).name), scores(text), rtol=0, atol=tolerance)


REFUSED = {
    "": "names no reward",
    "  ": "names no reward",
    "3": "names no reward",
    "1 + 2": "names no reward",
    "+": r"cannot read '\+'",
    "symmetry +": r"cannot read '\+'",
    "symmetry + + jpeg": r"cannot read '\+ \+ jpeg'",
    "symmetry jpeg": "cannot read 'jpeg'",
    "2 symmetry": "cannot read 'symmetry'",
    "2symmetry": "cannot read 'symmetry'",
    "symmetry*2": r"cannot read '\*2'",
    "2*3*symmetry": r"cannot read '\*3\*symmetry'",
    "symmetry*jpeg": r"cannot read '\*jpeg'",
    "symmetry/2": "cannot read '/2'",
    "2*(symmetry + jpeg)": r"cannot read '\*\(symmetry \+ jpeg\)'",
    "symmetry + jpeg!": "cannot read '!'",
    "symmetry, jpeg": "cannot read ', jpeg'",
    "symmetry - -3": "cannot read '- -3'",
    "0,5*symmetry": r"cannot read ',5\*symmetry'",
    "1_0*symmetry": r"cannot read '_0\*symmetry'",
    "0x1*symmetry": r"cannot read 'x1\*symmetry'",
    "٣*symmetry": r"cannot read '٣\*symmetry'",
    "__import__('os')": "cannot read .__import__",
    "symmetry\x00": "cannot read",
    "symmetry-jpeg": "no reward 'symmetry-jpeg'",
    "symmetry-1": "no reward 'symmetry-1'",
    "symmetry + beauty": "no reward 'beauty'",
    "Symmetry": "no reward 'Symmetry'",
    "nan": "no reward 'nan'",
    "inf + symmetry": "no reward 'inf'",
    "nan*symmetry": r"cannot read '\*symmetry'",
    "1e999*symmetry": "1e999 .* must be finite",
    "symmetry - 1e999": "1e999 .* must be finite",
    "1e308*symmetry + 1e308*symmetry": "finite weights",
}


@pytest.mark.parametrize("text", REFUSED)
def test_slips_are_named(text: str) -> None:
    """What is no sum of rewards is a ValueError that quotes the piece, not another sum."""
    with pytest.raises(ValueError, match=REFUSED[text]):
        parse_reward(text)


def test_models_reach_their_rewards(tmp_path: Path) -> None:
    """The judge of the folder is the one that scores."""
    judge = random_judge(tmp_path)
    mix = parse_reward("2*alignment - 1", {"alignment": tmp_path})
    torch.testing.assert_close(mix.score(IMAGES, PROMPTS), 2 * judge.score(IMAGES, PROMPTS) - 1)


def test_models_that_nothing_uses_are_refused(tmp_path: Path) -> None:
    """A folder for a reward that is not in the sum, or for one that takes none, is a slip."""
    with pytest.raises(ValueError, match="a model is given for alignment, which the reward 'symmetry' does not use"):
        parse_reward("symmetry", {"alignment": tmp_path})
    with pytest.raises(ValueError, match="jpeg takes no model"):
        parse_reward("symmetry + jpeg", {"jpeg": tmp_path})


def test_nothing_is_loaded_before_every_name_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    """A slip in the last name does not cost the loading of the first."""

    def load(name: str, model: object) -> Scorer:
        raise AssertionError(f"{name} was loaded")

    monkeypatch.setattr(scale.rewards.expression, "load_scorer", load)
    with pytest.raises(ValueError, match="no reward 'beauty'"):
        parse_reward("symmetry + beauty")
