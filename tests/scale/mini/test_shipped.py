"""The shipped weights: in Stable Diffusion's own format, small, and as good as their card says."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTokenizer

from scale import mini
from scale.mini import card, world
from scale.mini.family import FAMILY, SINGLE
from scale.mini.judge import accuracy
from scale.rewards.alignment import Alignment
from scale.rewards.expression import parse_reward
from scale.train import checkpoint

MEGABYTE = 1_000_000
TURNED = "colorfulness-turned"  # colorfulness in other factors: tests/scale/mini/test_turn.py


def test_diffusers_loads_the_model_unchanged() -> None:
    """StableDiffusionPipeline.from_pretrained alone makes a working pipeline of the promised classes."""
    pipe = StableDiffusionPipeline.from_pretrained(mini.MODEL)
    pipe.set_progress_bar_config(disable=True)
    kinds = (CLIPTokenizer, CLIPTextModel, AutoencoderKL, UNet2DConditionModel, DDIMScheduler)
    parts = (pipe.tokenizer, pipe.text_encoder, pipe.vae, pipe.unet, pipe.scheduler)
    assert all(isinstance(part, kind) for part, kind in zip(parts, kinds, strict=True))
    image = pipe("a red circle and a blue square", num_inference_steps=2).images[0]
    assert image.size == (world.SIZE, world.SIZE)


def test_weights_are_small_and_safe() -> None:
    """At most 16 MB together; tensors in safetensors alone, no pickle; a card beside them."""
    files = [path for path in mini.WEIGHTS.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 16 * MEGABYTE
    assert {path.suffix for path in files} <= {".safetensors", ".json", ".txt", ".md", ".png"}
    assert (mini.WEIGHTS / "README.md").is_file()


def test_every_word_is_one_token() -> None:
    """A caption of n words has n tokens, and no caption is cut off."""
    tokenizer = CLIPTokenizer.from_pretrained(mini.MODEL, subfolder="tokenizer")
    for prompt in world.held_out_prompts():
        assert len(tokenizer(prompt).input_ids) == len(prompt.split()) + 2 <= tokenizer.model_max_length


def test_the_judge_names_held_out_renders() -> None:
    """At least 97 % of 400 fresh renders of held-out prompts have every colour and shape named right."""
    rng = np.random.default_rng(123)
    prompts = list(world.held_out_prompts())
    images = np.stack([world.render(world.parse(prompt), rng) for prompt in prompts])
    judge = Alignment().judge
    assert accuracy(judge, torch.from_numpy(images).permute(0, 3, 1, 2), prompts) >= 0.97


def test_alignment_tells_right_from_wrong_captions() -> None:
    """Renders score near 2 for their own captions, and far lower for another's (control)."""
    rng = np.random.default_rng(7)
    prompts = list(world.held_out_prompts()[:64])
    images = np.stack([world.render(world.parse(prompt), rng) for prompt in prompts])
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
    own, other = (Alignment().score(pixels, texts) for texts in (prompts, prompts[1:] + prompts[:1]))
    assert float(own.mean()) > 1.8
    assert float(other.mean()) < 0.5


def test_the_card_promises_half_a_standard_deviation() -> None:
    """What the card says of 200 held-out prompts: each single-reward expert raises its own by 0.5 base deviations."""
    facts = json.loads((mini.WEIGHTS / "card.json").read_text())
    assert facts["prompts"] == 200
    assert facts["gains"] == card.gains(facts["table"])
    assert set(facts["gains"]) == set(SINGLE)
    assert all(gain >= 0.5 for gain in facts["gains"].values())


def test_every_adapter_has_its_record() -> None:
    """Each folder is a member of the family, trained on its reward at its alpha, with a curve of every round.

    Only the arithmetic may differ, bfloat16 or float32: it is a matter of the machine.
    """
    folders = sorted(path.name for path in mini.ADAPTERS.iterdir() if path.name != TURNED)
    table = json.loads((mini.WEIGHTS / "card.json").read_text())["table"]
    assert sorted(set(table) - {"base"}) == folders
    assert set(SINGLE) <= set(folders) <= set(FAMILY)
    for name in folders:
        facts, settings = json.loads((mini.ADAPTERS / name / "training.json").read_text()), FAMILY[name].settings()
        assert facts["reward"] == parse_reward(FAMILY[name].reward).name
        precision = facts["settings"]["precision"]
        assert precision in ("bf16", "no")
        assert facts["settings"] == checkpoint.plain(replace(settings, precision=precision))
        assert facts["alpha"] == settings.alpha
        assert facts["images"] == settings.rounds * settings.images
        assert len(facts["history"]) == settings.rounds
        assert facts["seconds"] > 0


@pytest.mark.slow
def test_the_card_can_be_measured_again() -> None:
    """Drawn and scored anew on 200 held-out prompts, a row is the card's to a tenth of a standard error."""
    stated = json.loads((mini.WEIGHTS / "card.json").read_text())["table"]["jpeg"]
    pipe = card._opened(mini.WEIGHTS, mini.ADAPTERS / "jpeg")
    row = card.as_trained(pipe, 200, mini.WEIGHTS, measure_kl=False)
    for reward, (mean, error, _) in stated["rewards"].items():
        assert abs(row["rewards"][reward][0] - mean) < 0.1 * error, reward
