"""The paper's numbers are as its text has them: sums recompute, nulls are the known ones, none is guessed."""

from pathlib import Path

import pytest

from scale.experiment.report import write_report
from scale.experiment.report.frame import load_results
from scale.experiment.report.paper import (
    chosen,
    comparison,
    missing_numbers,
    published,
    ratio_table,
    time_table,
    weighted_gain,
)
from tests.scale.experiment.report.runs import two_rewards, write_run

TABLES = {table["table"]: table for table in published()["tables"]}


def test_every_table_is_there_with_its_source() -> None:
    """Tables 1 to 7, each cell as long as its rewards."""
    assert sorted(TABLES) == [1, 2, 3, 4, 5, 6, 7]
    for number, table in TABLES.items():
        assert f"Table {number}" in table["source"]
        for w, line in (table["rows"] or {}).items():
            length = w if number == 6 else len(table["rewards"])
            assert {len(cell) for cell in line.values()} == {length}


def test_what_is_missing_is_null() -> None:
    """All of Table 4 and the last RGG cells of Tables 2 and 3, which our text lacks; nothing else."""
    assert missing_numbers(published()["tables"]) == [
        "Table 2, w = 0.5: RGG, reward 2",
        "Table 2, w = 0.8: RGG, reward 2",
        "Table 3, w = 0.8: RGG, reward 2",
        "Table 4: every number",
    ]
    assert weighted_gain(TABLES[2], 0.5, "rgg") is None


def test_the_claim_does_not_follow_from_table_1() -> None:
    """The weighted gains at w = 0.5 are 0.42, 0.10, 0.31 and 0.21: ratios 4.2, 1.35 and 2.0, not 3.92, 1.95, 1.33."""
    gains = {method: weighted_gain(TABLES[1], 0.5, method) for method in ("mpa", "rs-factors", "code", "rgg")}
    assert gains == pytest.approx({"mpa": 0.42, "rs-factors": 0.10, "code": 0.31, "rgg": 0.21})
    assert published()["claim"]["printed"] == {"rs-factors": 3.92, "code": 1.95, "rgg": 1.33}


def test_methods_agree_at_the_ends_of_the_range() -> None:
    """At w = 0 and 1 MORL, DB and RS are one expert, in Tables 1 and 7: a misread row would break this."""
    for number, methods in ((1, ("morl", "mpa", "mpa-ls", "rs-factors")), (7, ("mpa", "mpa-ls", "rs-factors"))):
        for w in (0.0, 1.0):
            assert len({tuple(TABLES[number]["rows"][w][method]) for method in methods}) == 1


def test_printed_averages_recompute() -> None:
    """Table 6's averages to rounding, but one that was cut (0.397 to 0.39); Table 5's but the three in its note."""
    for count, line in TABLES[6]["average_printed"].items():
        for method, printed in line.items():
            tolerance = 0.0101 if (count, method) == (3, "mpa-ls") else 0.0051
            assert weighted_gain(TABLES[6], float(count), method) == pytest.approx(printed, abs=tolerance)
    off = []
    for w, line in TABLES[5]["weighted_printed"].items():
        for method, printed in line.items():
            first, second = TABLES[5]["rows"][w][method]
            if abs(w * first + (1 - w) * second - printed) > 0.0061:
                off.append((w, method))
    assert off == [(0.2, "mpa"), (0.2, "rs-factors"), (0.8, "mpa")]


def test_ours_stand_beside_the_papers(tmp_path: Path) -> None:
    """DB-MPA at w = 0.5 has both gains; the ratio over CoDe is the one put in, 0.95 / 0.5; RGG was not run."""
    run = write_run(tmp_path / "run", two_rewards(("mpa", "rs-factors", "code")), prompts=40)
    results = load_results([run])
    table = comparison(results)
    row = table[(table["paper"] == "Table 1, Stable Diffusion 1.5") & (table["at"] == "w = 0.5")].set_index("method")
    assert row.loc["DB-MPA", "paper's gain"] == pytest.approx(0.42)
    assert row.loc["DB-MPA", "our gain"].value == pytest.approx(0.475, abs=0.05)
    assert row["our gain"].isna()["RGG"]
    ratios = ratio_table(results).set_index("over")
    assert ratios["recomputed from Table 1"].to_dict() == pytest.approx({"RS": 4.2, "CoDe": 0.42 / 0.31, "RGG": 2.0})
    assert ratios.loc["CoDe", "ours"].value == pytest.approx(1.9, abs=0.15)
    assert ratios.loc["RGG", "ours"] is None or ratios["ours"].isna()["RGG"]
    assert time_table(results).set_index("method").loc["DB-MPA", "paper / SD"] == pytest.approx(2.035, abs=1e-3)


@pytest.mark.parametrize(("named", "tables"), [((), 7), (("table5",), 1), (("table1", "table2"), 2)])
def test_a_run_stands_beside_the_tables_that_it_is_a_twin_of(tmp_path: Path, named: tuple, tables: int) -> None:
    """A run of two rewards has no business beside another table's rewards; one that names none sees all."""
    run = write_run(tmp_path / "run", two_rewards(("mpa",)), prompts=3, paper=named)
    made = chosen(load_results([run]))
    assert len(made) == tables
    assert {f"table{table['table']}" for table in made} >= set(named)
    found = write_report([run], tmp_path / "out", beside_paper=True)
    assert ("paper-ratios" in found["tables"]) == (not named or "table1" in named)
    text = " ".join((tmp_path / "out" / "report.md").read_text().split())
    assert all(table["note"] in text for table in made)


def test_seconds_are_those_of_blends(tmp_path: Path) -> None:
    """DB-MPA takes twice the base model's seconds at w = 0.5; its cells of one expert, w = 0 and 1, do not count."""
    run = write_run(tmp_path / "run", two_rewards(("mpa",)), prompts=3)
    results = load_results([run])
    rows = results.frame
    rows.loc[(rows["label"] == "mpa") & (rows["preference"] == "w = 0.5"), "seconds"] *= 2
    table = time_table(results).set_index("method")
    assert table.loc["DB-MPA", "ours / base"] == pytest.approx(2.0)
    assert table["ours"].isna()["CoDe"]
