"""Hashes of what models and adapters came from."""

import hashlib
from pathlib import Path

from scale.hashes import adapter_hashes, denoiser_hashes, file_hashes, model_hashes
from scale.pipeline import open_pipeline
from tests.scale import tiny


def digests(folder: Path, *patterns: str) -> dict[str, str]:
    paths = sorted(path for pattern in patterns for path in folder.glob(pattern))
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


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


def test_hashes_of_every_part_of_a_model(tmp_path: Path) -> None:
    """Networks and tokenizer, each by its own files and no other; the scheduler has settings alone."""
    tiny.sd().save_pretrained(tmp_path)
    expected = {part: digests(tmp_path / part, "*") for part in ("unet", "vae", "text_encoder", "tokenizer")}
    (tmp_path / "tokenizer" / "notes.txt").write_text("not read")
    assert model_hashes(open_pipeline(tmp_path)) == expected
    assert all(len(hashes) > 1 for hashes in expected.values())


def test_a_model_that_came_from_no_folder_has_no_hashes() -> None:
    """Nothing is made up."""
    assert denoiser_hashes(tiny.sd()) == {}


def test_an_adapter_is_its_weights_and_pefts_settings(tmp_path: Path) -> None:
    """The settings beside it say its alpha, so they count; a card does not."""
    folder = tiny.save_lora(tiny.sd, tmp_path / "a", 0)
    weights = digests(folder, "*.safetensors")["pytorch_lora_weights.safetensors"]
    (folder / "README.md").write_text("a card")
    assert adapter_hashes(folder) == {"weights": weights}
    (folder / "adapter_config.json").write_text('{"lora_alpha": 3}')
    settings = digests(folder, "*.json")["adapter_config.json"]
    both = {"weights": weights, "settings": settings}
    assert adapter_hashes(folder) == adapter_hashes(folder / "pytorch_lora_weights.safetensors") == both


def test_an_address_has_no_hash(tmp_path: Path) -> None:
    """It is listed as it is, beside files behind their names, of which two may be the same."""
    paths = [tmp_path / name / "model.bin" for name in "ab"]
    for path in paths:
        path.parent.mkdir()
        path.write_text(path.parent.name)
    first, second = (digests(path.parent, "*")["model.bin"] for path in paths)
    assert first != second
    expected = [("https://hub/1", None), ("model.bin", first), ("model.bin", second)]
    assert file_hashes(["https://hub/1", *paths]) == expected
