"""Rebuild every shipped weight of the small world: `python -m scale.mini.build`, into `build/mini/weights`.

Stages run in order and each resumes after a kill: pictures, autoencoder, decoder, denoiser, judge, one adapter a
reward, and the card that states what came out.
"""

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
import tyro
from diffusers import AutoencoderKL, StableDiffusionPipeline
from safetensors.torch import save_model

from dbtheory.files import write_atomically
from scale.mini import EXPERTS, base, card, world
from scale.mini.judge import train_judge
from scale.pipeline import open_pipeline
from scale.rewards import load_scorer
from scale.train.dpok import Dpok, save_adapter, train


@dataclass(frozen=True)
class Build:
    """Retrain the small world's model, its judge and its adapters."""

    work: Path = Path("build/mini")
    """Folder of checkpoints and training pictures; a killed build resumes from it, with the same options."""
    out: Path = Path("build/mini/weights")
    """Folder that receives the weights; what is there already is kept. The shipped ones are in scale/mini/weights."""
    experts: tuple[str, ...] = EXPERTS
    """Rewards to train an adapter for; several processes may build several at once."""
    autoencoder_steps: int = 2_000
    decoder_steps: int = 1_000
    denoiser_steps: int = 4_500
    judge_steps: int = 1_500
    pictures: int = base.PICTURES
    """Rendered pictures to train the model on, and as many others for the judge."""
    card_prompts: int = card.PROMPTS
    """Held-out prompts that the card is measured on."""
    dpok: Dpok = field(default_factory=Dpok)
    seed: int = 0


def build_model(options: Build) -> None:
    """Train the base model and save it as a Stable Diffusion folder in half precision."""
    folder = options.out / "model"
    if (folder / "model_index.json").exists():
        return
    images, captions = base.pictures(options.work / "pictures.npz", options.pictures, seed=options.seed)
    encoder, decoder = options.work / "autoencoder", options.work / "decoder"
    if not encoder.exists():
        vae = base.train_autoencoder(images, options.work, options.autoencoder_steps, options.seed)
        _save_folder(vae.save_pretrained, encoder)
    if not decoder.exists():
        vae = AutoencoderKL.from_pretrained(encoder)
        vae = base.polish_decoder(vae, images, options.work, options.decoder_steps, options.seed)
        _save_folder(vae.save_pretrained, decoder)
    vae = AutoencoderKL.from_pretrained(decoder)
    pipe = base.train_denoiser(vae, images, captions, options.work, options.denoiser_steps, options.seed)
    pipe.to(torch.float16)
    # transformers opens a model in its stored type, diffusers in float32: a half text encoder would not fit the UNet
    pipe.text_encoder.float()
    pipe.vae.register_to_config(_name_or_path="")  # it would tell where this machine keeps its checkpoints
    _save_folder(pipe.save_pretrained, folder)


def _save_folder(save: Callable[[Path], object], folder: Path) -> None:
    """Write into a neighbouring folder first: a kill leaves no half model that looks whole."""
    unfinished = folder.with_name("." + folder.name)
    shutil.rmtree(unfinished, ignore_errors=True)
    save(unfinished)
    unfinished.rename(folder)


def build_judge(options: Build) -> None:
    """Train the judge of alignment and record its accuracy on held-out renders."""
    folder = options.out / "judge"
    if (folder / "judge.json").exists():
        return
    judge, accuracy = train_judge(options.work, options.judge_steps, options.pictures, options.seed)
    write_atomically(folder / "judge.safetensors", lambda path: save_model(judge.half(), str(path)))
    text = json.dumps({"accuracy on held-out renders": accuracy, "steps": options.judge_steps, "seed": options.seed})
    write_atomically(folder / "judge.json", lambda path: path.write_text(text + "\n"))


def build_adapter(reward: str, options: Build) -> None:
    """Fine-tune one adapter by DPOK on the training prompts, and save it with its settings and training curve."""
    folder = options.out / "adapters" / reward
    if (folder / "training.json").exists():
        return
    pipe = open_pipeline(options.out / "model")
    assert isinstance(pipe, StableDiffusionPipeline)
    settings = replace(options.dpok, seed=options.seed)
    history = train(pipe, load_scorer(reward), world.train_prompts(), settings, options.work / f"dpok-{reward}")
    save_adapter(pipe, folder)
    text = json.dumps({"reward": reward, "settings": asdict(settings), "history": history}, indent=1)
    write_atomically(folder / "training.json", lambda path: path.write_text(text + "\n"))


def _claim(options: Build) -> None:
    """Checkpoints carry no options of their own: a work folder belongs to the options that it was begun with."""
    chosen = {name: value for name, value in asdict(options).items() if name not in ("work", "out", "experts")}
    text, path = json.dumps(chosen, indent=1) + "\n", options.work / "options.json"
    if path.exists() and path.read_text() != text:
        raise ValueError(f"{options.work} holds a build with other options ({path}); choose another --work folder")
    write_atomically(path, lambda temporary: temporary.write_text(text))


def main(options: Build) -> None:
    """Run every stage whose result is not there."""
    unknown = set(options.experts) - set(EXPERTS)
    if unknown:
        raise ValueError(f"no expert {', '.join(unknown)}; the experts are {', '.join(EXPERTS)}")
    options.work.mkdir(parents=True, exist_ok=True)
    _claim(options)
    build_model(options)
    build_judge(options)
    for reward in options.experts:
        build_adapter(reward, options)
    if all((options.out / "adapters" / reward / "training.json").exists() for reward in EXPERTS):
        card.write(options.out, options.card_prompts)


if __name__ == "__main__":
    main(tyro.cli(Build, description=__doc__))
