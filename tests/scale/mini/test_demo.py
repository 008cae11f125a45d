"""The image half of the demo, on a few prompts."""

from pathlib import Path

import pytest
from PIL import Image

from scale.mini import demo
from scale.rewards import SCORERS


def test_it_reports_every_preference_and_draws_its_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows for the base and every w with all rewards and standard errors; two pictures; a count of what was drawn."""
    monkeypatch.setattr(demo, "STEPS", 4)
    drawn = []
    results = demo.run(tmp_path, prompts=3, advance=drawn.append)
    assert sum(drawn) == 3 * (len(demo.WEIGHTS) + 1)
    assert [row["model"] for row in results["rows"]] == ["base", "w = 0", "w = 0.25", "w = 0.5", "w = 0.75", "w = 1"]
    for row in results["rows"]:
        assert set(row) == {"model", *SCORERS}
        assert all(error > 0 for _, error, _ in (row[name] for name in SCORERS))
    means = {row["model"]: row["colorfulness"][0] for row in results["rows"]}
    assert len(set(means.values())) == len(means)
    for figure in results["figures"]:
        with Image.open(figure) as image:
            assert min(image.size) > 300
