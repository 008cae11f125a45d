"""Tables from hand-made frames and from runs whose effects are known."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from scale.experiment.report.bootstrap import Estimate
from scale.experiment.report.claims import NOT, REPRODUCED, UNDECIDED, evaluate, uniform_preferences, verdict
from scale.experiment.report.frame import Results, load_results, pair
from scale.experiment.report.front import front_table, hypervolume
from scale.experiment.report.lambdas import lambda_table
from scale.experiment.report.means import difference, gain_table, mean_table, share_table
from scale.experiment.report.wins import win_rate, win_table
from tests.scale.experiment.report.runs import REWARDS, gains, two_rewards, write_run

METHODS = ("mpa", "mpa-ls", "rs", "rs-factors", "morl", "code")


def cell(*rows: tuple[str, int, float]) -> pd.DataFrame:
    return pd.DataFrame(rows, columns=["prompt", "seed", "weighted"])


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    return load_results([write_run(tmp_path_factory.mktemp("run") / "a", two_rewards(METHODS))])


def test_win_rate_by_hand() -> None:
    """Prompt a: a win and a tie, 3/4; prompt b: a loss, 0; the mean over prompts is 3/8, not 1/2 over images."""
    one = cell(("a", 0, 2.0), ("a", 1, 1.0), ("b", 0, 0.0))
    two = cell(("a", 0, 1.0), ("a", 1, 1.0), ("b", 0, 1.0))
    rate = win_rate(pair(one, two))
    assert rate.value == pytest.approx(3 / 8)
    assert (rate.images, rate.units) == (3, 2)


def test_pairs_are_of_one_prompt_and_seed() -> None:
    """Images that one side lacks are left out: the gain is (3 - 1 + 5 - 2) / 2, whatever c and the rest have."""
    one = cell(("a", 0, 3.0), ("a", 1, 5.0), ("c", 0, 100.0))
    two = cell(("a", 1, 2.0), ("a", 0, 1.0), ("b", 0, -100.0))
    assert difference(pair(one, two)).value == pytest.approx(2.5)


def test_hypervolume_is_the_area_under_the_staircase() -> None:
    """(1, 3), (2, 2), (3, 1) cover 3 + 2 + 1 = 6 and, one further, 2 * 4 + 3 + 2 = 13; (1, 1) adds nothing."""
    points = np.array([[1.0, 3.0], [2.0, 2.0], [3.0, 1.0], [1.0, 1.0]])
    areas = hypervolume(np.stack([points, points + 1]), np.zeros(2))
    assert areas == pytest.approx([6.0, 13.0])
    assert hypervolume(np.array([[1.0, 2.0, 3.0]]), np.zeros(3)) == pytest.approx(6.0)
    assert hypervolume(np.array([[-1.0, 5.0]]), np.zeros(2)) == pytest.approx(0.0)


def test_base_is_weighed_by_each_preference(results: Results) -> None:
    """Base has one cell a preference, whose weighted reward is w r_1 + (1 - w) r_2 of its own images."""
    table = mean_table(results).set_index(["label", "preference"])
    for w in (0.0, 0.5, 1.0):
        row = table.loc[("base", f"w = {w:g}")]
        first, second = (row[name].value for name in REWARDS)
        assert row["weighted"].value == pytest.approx(w * first + (1 - w) * second, abs=1e-12)
        assert row["images"] == 24
    assert table.loc[("mpa", "w = 0.5"), "jpeg"].value == -1.0
    assert table.loc[("mpa", "w = 0.5"), "evaluations"] == 20


def test_gains_and_shares_are_those_put_in(results: Results) -> None:
    """Effects come back within 0.05, about five standard errors of 24 pairs with noise 0.07."""
    table = gain_table(results).set_index(["label", "preference"])
    for method in METHODS:
        wanted = gains(method, dict(zip(REWARDS, (0.5, 0.5), strict=True)), 1.0)
        row = table.loc[(method, "w = 0.5")]
        assert [row[name].value for name in REWARDS] == pytest.approx(wanted, abs=0.05)
    shares = share_table(results).set_index(["label", "preference"])["share"]
    assert shares[("code", "w = 0.5")].value == pytest.approx(0.5, abs=0.1)
    assert "morl" not in shares.index.get_level_values("label")


def test_wins_and_fronts_order_the_methods(results: Results) -> None:
    """DB-MPA wins nearly always over the soup of factors; volumes fall in the order of the effects."""
    wins = win_table(results).set_index(["against", "preference"])["wins"]
    assert wins[("rs-factors", "w = 0.5")].value > 0.9
    volumes = front_table(results).set_index("label")["shared"]
    order = [volumes[name].value for name in ("morl", "mpa", "rs", "code", "rs-factors", "base")]
    assert order == sorted(order, reverse=True)


def test_kla_is_compared_at_each_lambda(tmp_path: Path) -> None:
    """The difference is that of the effects, 10 % of lambda, at each lambda that both have."""
    cells = [(m, {"alignment": 1.0, "colorfulness": 0.0}, k) for m in ("kla", "morl") for k in (0.5, 1.5)]
    table = lambda_table(load_results([write_run(tmp_path / "run", cells)]))
    assert [row.value for row in table["difference"]] == pytest.approx([-0.05, -0.15], abs=0.05)


def test_verdicts() -> None:
    """The whole interval decides."""

    def between(low: float, high: float) -> Estimate:
        return Estimate((low + high) / 2, low, high, 10, 10, "prompts")

    assert verdict(between(0.1, 0.2), 0.0) == REPRODUCED
    assert verdict(between(-0.2, -0.1), 0.0) == NOT
    assert verdict(between(-0.1, 0.1), 0.0) == UNDECIDED
    assert verdict(between(0.9, 1.3), 0.8, 1.2) == UNDECIDED
    assert verdict(between(1.3, 1.4), 0.8, 1.2) == NOT


def test_claims_reproduce_where_they_hold(results: Results) -> None:
    """DB-MPA above the others at w = 0.5 alone: at 0 and 1 all methods are one expert."""
    found = {(finding.claim, finding.where): finding.verdict for finding in evaluate(results)}
    for method in ("rs", "rs-factors", "code"):
        assert found[(f"DB-MPA above {method}", "w = 0.5")] == REPRODUCED
    assert {where for claim, where in found if claim.startswith("DB-MPA above")} == {"w = 0.5"}
    assert found[("DB-MPA has MORL's gain", "w = 0.5")] in (REPRODUCED, UNDECIDED)


def test_a_loss_stands_first(tmp_path: Path) -> None:
    """The control: where DB-MPA is put below CoDe, the first line says `not reproduced`."""

    def turned(method: str, weights: Mapping[str, float], kl_scale: float) -> list[float]:
        return gains({"mpa": "code", "code": "mpa"}.get(method, method), weights, kl_scale)

    found = evaluate(load_results([write_run(tmp_path / "run", two_rewards(METHODS), effect=turned)]))
    assert found[0].verdict == NOT
    assert ("DB-MPA above code", NOT) in [(finding.claim, finding.verdict) for finding in found]


def test_our_own_methods_are_held_against_db_mpa(tmp_path: Path) -> None:
    """Interpolation that gains a third more than DB-MPA is above it; the control: one that gains less is not."""

    def better(method: str, weights: Mapping[str, float], kl_scale: float) -> list[float]:
        return [(4 / 3 if method == "interp" else 1.0) * gain for gain in gains(method, weights, kl_scale)]

    for name, effect in (("better", better), ("worse", gains)):
        run = write_run(tmp_path / name, two_rewards(("mpa", "interp")), effect=effect)
        found = {finding.claim: finding.verdict for finding in evaluate(load_results([run]))}
        assert (found["interp above DB-MPA (ours)"] == REPRODUCED) == (name == "better")


def test_gains_are_followed_as_rewards_are_added(tmp_path: Path) -> None:
    """DB-MPA's average gain stays, the soup's falls to a third: both claims reproduce."""
    names = ("a", "b", "c", "d")

    def effect(method: str, weights: Mapping[str, float], kl_scale: float) -> list[float]:
        count = sum(weight > 0 for weight in weights.values())
        size = {"mpa": 0.5, "rs-factors": 0.6 / max(count, 1) ** 1.5}.get(method, 0.0)
        return [size * (weight > 0) for weight in weights.values()]

    uniform = [{name: (k < n) / n for k, name in enumerate(names)} for n in (2, 3, 4)]
    cells = [("base", dict.fromkeys(names, 0.0), 1.0), *((m, w, 1.0) for m in ("mpa", "rs-factors") for w in uniform)]
    results = load_results([write_run(tmp_path / "run", cells, rewards=names, effect=effect)])
    assert sorted(uniform_preferences(results)) == [2, 3, 4]
    found = {finding.claim: finding.verdict for finding in evaluate(results) if "rewards are added" in finding.claim}
    assert set(found) == {f"the gain of {what} as rewards are added" for what in ("mpa is stable", "rs-factors falls")}
    assert set(found.values()) == {REPRODUCED}


def test_a_blend_follows_the_expert_of_each_lambda(tmp_path: Path) -> None:
    """DB-KLA at .9 of the experts' gain follows them, and at a half does not; at lambda = 1 the two are one model."""
    one, claim = {"alignment": 1.0}, "DB-KLA follows the expert of each lambda"
    cells = [
        ("base", {"alignment": 0.0}, 1.0),
        *((m, one, scale) for m in ("kla", "morl") for scale in (0.5, 1.0, 2.0)),
    ]
    for name, share, expected in (("near", 0.9, REPRODUCED), ("half", 0.5, NOT)):

        def effect(method: str, weights: Mapping[str, float], kl_scale: float, share: float = share) -> list[float]:
            return [(share if method == "kla" else 1.0) * kl_scale * weights["alignment"]]

        results = load_results([write_run(tmp_path / name, cells, rewards=("alignment",), effect=effect)])
        found = {finding.where: finding.verdict for finding in evaluate(results) if finding.claim == claim}
        assert found == {"w = 1, lambda 0.5": expected, "w = 1, lambda 2": expected}
