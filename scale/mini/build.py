"""Rebuild every shipped weight of the small world: `python -m scale.mini.build`, into `build/mini/weights`.

Stages run in order and each resumes after a kill: pictures, autoencoder, decoder, denoiser, judge, the family's
adapters, and the card that states what came out. What is in the folder already is kept, so that
`--out scale/mini/weights --experts NAME...` adds adapters to the shipped model.
"""

import json
import os
import shutil
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from multiprocessing import get_context, parent_process
from pathlib import Path
from threading import Thread

import torch
import tyro
from diffusers import AutoencoderKL
from safetensors.torch import save_model

from dbtheory.files import write_atomically
from scale.mini import base, card, world
from scale.mini.family import FAMILY
from scale.mini.judge import train_judge
from scale.pipeline import open_pipeline
from scale.rewards.expression import parse_reward
from scale.train.run import PRECISIONS, fine_tune
from scale.train.settings import MINI, Dpok


@dataclass(frozen=True)
class Build:
    """Retrain the small world's model, its judge and its adapters."""

    work: Path = Path("build/mini")
    """Folder of checkpoints and training pictures; a killed build resumes from it, with the same options."""
    out: Path = Path("build/mini/weights")
    """Folder that receives the weights; what is there already is kept. The shipped ones are in scale/mini/weights."""
    experts: tuple[str, ...] = tuple(FAMILY)
    """Members of the family (scale/mini/family.py) to train."""
    processes: int = 1
    """Adapters that are trained at once, each by one process with its share of the cores."""
    autoencoder_steps: int = 2_000
    decoder_steps: int = 1_000
    denoiser_steps: int = 4_500
    judge_steps: int = 1_500
    pictures: int = base.PICTURES
    """Rendered pictures to train the model on, and as many others for the judge."""
    card_prompts: int = card.PROMPTS
    """Held-out prompts that the card is measured on."""
    dpok: Dpok = field(default_factory=lambda: MINI)
    """Of the adapters. Its precision is the base model's too: `no` where the CPU has to emulate bf16."""
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
    precision = PRECISIONS[options.dpok.precision]
    pipe = base.train_denoiser(vae, images, captions, options.work, options.denoiser_steps, options.seed, precision)
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


def build_adapter(name: str, options: Build, threads: int | None = None) -> None:
    """Fine-tune one member of the family on the training prompts, and save it with its settings and curve."""
    folder = options.out / "adapters" / name
    if (folder / "training.json").exists():
        return
    if threads is not None:
        torch.set_num_threads(threads)
    expert, pipe = FAMILY[name], open_pipeline(options.out / "model")
    settings = expert.settings(replace(options.dpok, seed=options.seed))
    reward = parse_reward(expert.reward, {"alignment": options.out / "judge"} if "alignment" in expert.weights else {})
    fine_tune(pipe, reward, world.train_prompts(), settings, options.work / f"dpok-{name}", folder)


def build_adapters(options: Build) -> None:
    """All that are asked for, `processes` at a time."""
    if options.processes == 1:
        for name in options.experts:
            build_adapter(name, options)
        return
    threads = max(1, torch.get_num_threads() // options.processes)
    with workers(options.processes) as pool:
        for done in [pool.submit(build_adapter, name, options, threads) for name in options.experts]:
            done.result()


def workers(processes: int) -> ProcessPoolExecutor:
    """Processes that end with this one, even where it is killed: they would train on, unseen."""
    return ProcessPoolExecutor(processes, get_context("spawn"), initializer=_end_with_parent)


def _end_with_parent() -> None:
    def watch() -> None:
        parent = parent_process()
        assert parent is not None
        parent.join()
        os._exit(1)

    Thread(target=watch, daemon=True).start()


def _claim(options: Build) -> None:
    """Checkpoints carry no options of their own: a work folder belongs to the options that it was begun with."""
    chosen = {
        name: value for name, value in asdict(options).items() if name not in ("work", "out", "experts", "processes")
    }
    text, path = json.dumps(chosen, indent=1) + "\n", options.work / "options.json"
    if path.exists() and path.read_text() != text:
        raise ValueError(f"{options.work} holds a build with other options ({path}); choose another --work folder")
    write_atomically(path, lambda temporary: temporary.write_text(text))


def main(options: Build) -> None:
    """Run every stage whose result is not there."""
    unknown = set(options.experts) - set(FAMILY)
    if unknown:
        raise ValueError(f"no expert {', '.join(sorted(unknown))}; the experts are {', '.join(FAMILY)}")
    if options.processes < 1:
        raise ValueError(f"processes must be at least 1, received {options.processes}")
    options.work.mkdir(parents=True, exist_ok=True)
    _claim(options)
    build_model(options)
    build_judge(options)
    build_adapters(options)
    card.write(options.out, options.card_prompts)


if __name__ == "__main__":
    main(tyro.cli(Build, description=__doc__))
