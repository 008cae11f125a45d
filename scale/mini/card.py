"""The card of the shipped weights: what they are, and what each adapter does to each reward on held-out prompts."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dbtheory.files import write_atomically
from dbtheory.preference import Preference
from scale import mini
from scale.attachment import attach
from scale.mini import base, world
from scale.pipeline import Picture, draw, open_pipeline
from scale.progress import progress_bar
from scale.rewards import SCORERS, load_scorer
from scale.rewards.alignment import Alignment

PROMPTS, STEPS, SEED = 200, 20, 10_000
CARD = """# The weights of the small world

Made by `python -m scale.mini.build` (seeded, on a CPU) from pictures that `scale/mini/world.py` renders; no outside
data. Training saw {pictures} pictures of the training prompts, {wrong:.0%} of the captions' colours wrong, so that the
base model errs as real ones do. No training picture shows a held-out prompt, and the adapters never saw one; a wrong
colour has by chance put the words of some held-out prompts under pictures of something else.

- `model/`: a StableDiffusionPipeline (text encoder 0.1 M, autoencoder 0.2 M, UNet 3.9 M parameters), half precision.
- `judge/`: names colours and shapes; every one of them right on {judged:.2%} of held-out renders.
- `adapters/`: rank-4 LoRA by DPOK (`scale/train/dpok.py`), settings and curve in each `training.json`.

Rewards on {prompts} held-out prompts, one seed each ({steps} DDIM steps, eta 1, guidance {guidance:g}), as mean +-
standard error:

{header}
{rows}

Standard deviations of the base model: {spread}.

Gain of each adapter on its own reward, in those: {gains}.
"""


def measure(weights: Path, prompts: int = PROMPTS) -> dict[str, dict[str, list[float]]]:
    """Every model (base and each adapter alone) by every reward: [mean, standard error, standard deviation]."""
    pipe = open_pipeline(weights / "model")
    pictures = [Picture(p, i, SEED + i) for i, p in enumerate(world.held_out_prompts()[:prompts])]
    with progress_bar() as bar:
        task = bar.add_task("card", total=(1 + len(mini.EXPERTS)) * prompts, note="")

        def rewards() -> dict[str, list[float]]:
            drawn = draw(
                pipe,
                pictures,
                steps=STEPS,
                guidance=mini.GUIDANCE,
                advance=lambda k: bar.update(task, advance=k),
            )
            return statistics(
                torch.cat([images for _, images in drawn]), [picture.prompt for picture in pictures], weights
            )

        table = {"base": rewards()}
        for name in mini.EXPERTS:
            knob = attach(pipe, {name: weights / "adapters" / name}, Preference({name: 1.0}))
            table[name] = rewards()
            knob.detach()
    return table


def statistics(images: Tensor, prompts: Sequence[str], weights: Path = mini.WEIGHTS) -> dict[str, list[float]]:
    """Every reward of images (n, 3, 64, 64): its mean, standard error and standard deviation."""
    scorers = [Alignment(weights / "judge") if name == "alignment" else load_scorer(name) for name in SCORERS]
    scores = {scorer.name: scorer.score(images, prompts) for scorer in scorers}
    return {name: [float(s.mean()), float(s.std() / len(s) ** 0.5), float(s.std())] for name, s in scores.items()}


def gains(table: dict[str, dict[str, list[float]]]) -> dict[str, float]:
    """What each adapter adds to its own reward, in standard deviations of the base model's rewards."""
    return {name: (table[name][name][0] - table["base"][name][0]) / table["base"][name][2] for name in mini.EXPERTS}


def write(weights: Path, prompts: int = PROMPTS) -> None:
    """Measure, and write `card.json` and `README.md` into the folder of the weights."""
    table = measure(weights, prompts)
    facts = {
        "prompts": prompts,
        "steps": STEPS,
        "eta": 1.0,
        "guidance": mini.GUIDANCE,
        "table": table,
        "gains": gains(table),
    }
    write_atomically(weights / "card.json", lambda path: path.write_text(json.dumps(facts, indent=1) + "\n"))
    text = _text(facts, weights)
    write_atomically(weights / "README.md", lambda path: path.write_text(text))


def _text(facts: dict[str, Any], weights: Path) -> str:
    judge = json.loads((weights / "judge" / "judge.json").read_text())
    names, table = list(facts["table"]["base"]), facts["table"]
    rows = [
        f"| {model} | " + " | ".join(f"{rewards[n][0]:.3f} +- {rewards[n][1]:.3f}" for n in names) + " |"
        for model, rewards in table.items()
    ]
    return CARD.format(
        pictures=base.PICTURES,
        wrong=base.WRONG_COLOURS,
        judged=judge["accuracy on held-out renders"],
        header=f"| model | {' | '.join(names)} |\n|---|{'---|' * len(names)}",
        rows="\n".join(rows),
        spread=", ".join(f"{n} {table['base'][n][2]:.3f}" for n in names),
        gains=", ".join(f"{name} {value:+.2f}" for name, value in facts["gains"].items()),
        **{name: facts[name] for name in ("prompts", "steps", "guidance")},
    )
