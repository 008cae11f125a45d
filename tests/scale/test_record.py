"""Hashes and certificates of the record."""

import hashlib
from pathlib import Path

import pytest

from scale.pipeline import open_pipeline
from scale.record import denoiser_hashes, update_ess
from tests.scale import tiny


def digests(folder: Path, pattern: str) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.glob(pattern))}


def test_hashes_of_a_model_in_shards_beside_variants(tmp_path: Path) -> None:
    """Every shard is hashed; weights that are not loaded (another variant, pickles) are not, and change nothing."""
    pipe = tiny.sd()
    pipe.save_pretrained(tmp_path, max_shard_size="100KB")
    pipe.unet.save_pretrained(tmp_path / "unet", variant="fp16")
    (tmp_path / "unet" / "diffusion_pytorch_model.bin").write_bytes(b"not loaded")
    hashes = denoiser_hashes(open_pipeline(tmp_path))
    shards = digests(tmp_path / "unet", "diffusion_pytorch_model-*-of-*.safetensors")
    assert len(shards) > 1
    assert hashes == digests(tmp_path / "unet", "config.json") | shards


def test_a_model_that_came_from_no_folder_has_no_hashes() -> None:
    """Nothing is made up."""
    assert denoiser_hashes(tiny.sd()) == {}


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
