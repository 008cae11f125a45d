"""The shipped weights: in Stable Diffusion's own format, small, and as good as their card says."""

import json

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTokenizer

from scale import mini
from scale.mini import card, world
from scale.mini.judge import accuracy
from scale.rewards.alignment import Alignment

MEGABYTE = 1_000_000


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
    assert {path.suffix for path in files} <= {".safetensors", ".json", ".txt", ".md"}
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
    """What the card says of each adapter on 200 held-out prompts: its own reward up by at least 0.5 base deviations."""
    facts = json.loads((mini.WEIGHTS / "card.json").read_text())
    assert facts["prompts"] == 200
    assert facts["gains"] == card.gains(facts["table"])
    assert all(gain >= 0.5 for gain in facts["gains"].values())


@pytest.mark.slow
def test_the_card_can_be_measured_again() -> None:
    """Drawn and scored anew, 200 held-out prompts a model, the table is the card's to a tenth of a standard error."""
    facts, table = json.loads((mini.WEIGHTS / "card.json").read_text()), card.measure(mini.WEIGHTS)
    for model, rewards in facts["table"].items():
        for name, (mean, error, _) in rewards.items():
            assert abs(table[model][name][0] - mean) < 0.1 * error, (model, name)
