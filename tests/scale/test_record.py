"""Certificates of the record."""

import pytest

from scale.record import update_ess


def test_ess_is_among_all_images_of_a_prompt() -> None:
    """By hand: equal weights count fully, weights 1 and 3 to (1 + 3)^2 / (2 (1 + 9)) = 0.8; null stays null."""

    def image(prompt: str, log_weight: float) -> dict:
        return {"prompt": prompt, "certificate": {"log_weight": log_weight, "ess": 1.0}}

    images = [image("a", 0.0), image("b", -2.0), image("a", 1.0986122886681098), image("b", -2.0)]
    images.append({"prompt": "a", "certificate": None})
    update_ess(images)
    assert [each["certificate"] and each["certificate"]["ess"] for each in images] == [
        pytest.approx(0.8), pytest.approx(1.0), pytest.approx(0.8), pytest.approx(1.0), None,
    ]  # fmt: skip
