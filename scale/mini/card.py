"""The card of the shipped weights: what they are, and what each adapter does to each reward on held-out prompts."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dbtheory.files import write_atomically
from scale import mini
from scale.adapters import load_adapter
from scale.mini import base, world
from scale.mini.curves import draw_curves
from scale.mini.family import FAMILY, SINGLE
from scale.pipeline import Picture, draw, open_pipeline
from scale.progress import progress_bar
from scale.rewards import SCORERS, load_scorer
from scale.rewards.alignment import Alignment
from scale.train.denoiser import ADAPTER, DenoiserPolicy
from scale.train.policy import step_kls
from scale.train.settings import MINI

PROMPTS, KL_PROMPTS, STEPS, SEED, BATCH = 200, 64, 20, 10_000, 64
Row = dict[str, Any]
"""Of a model: `rewards` and `guided` (of each its mean, standard error and deviation), `kl` (mean, standard error)."""

TEXT = """# The weights of the small world

Made by `python -m scale.mini.build` (seeded, on a CPU) from pictures that `scale/mini/world.py` renders; no outside
data. Training saw {pictures} pictures of the training prompts, {wrong:.0%} of the captions' colours wrong, so that the
base model errs as real ones do. No training picture shows a held-out prompt, and the adapters never saw one; a wrong
colour has by chance put the words of some held-out prompts under pictures of something else.

- `model/`: a StableDiffusionPipeline (text encoder 0.1 M, autoencoder 0.2 M, UNet 3.9 M parameters), half precision.
- `judge/`: names colours and shapes; every one of them right on {judged:.2%} of held-out renders.
- `adapters/`: rank-4 LoRA by DPOK (`scale/train/dpok.py`), settings and curve in each `training.json`. All share
  seeds, prompts and budget; alpha is {alpha:g} over lambda. `colorfulness-turned` is `colorfulness` in other factors
  (`scale/mini/turn.py`), for soups.
- `curves.png`: the training curves.

## As trained, without guidance

Rewards on {prompts} held-out prompts, one seed each ({steps} DDIM steps, eta 1), as mean +- standard error; KL of the
trajectories to the base model's, in nats, on {kl_prompts} of them; minutes of training.

{rows}

Trained in bfloat16 arithmetic{others}.

Standard deviations of the base model: {spread}.

Gain of each single-reward expert on its own reward, in those: {gains}.

## As the package draws, with guidance {guidance:g}

{guided}

Standard deviations of the base model: {guided_spread}.

Guidance multiplies what an adapter changed along with the text's effect, and no theorem speaks of it; alignment is then
near its maximum, 2, before any training.
"""


def measure(weights: Path, prompts: int = PROMPTS, known: Mapping[str, Row] | None = None) -> dict[str, Row]:
    """Every model there is (the base, and each adapter of the family alone); rows in `known` of the same file stay."""
    folders = {name: weights / "adapters" / name for name in FAMILY}
    folders = {name: folder for name, folder in folders.items() if (folder / "training.json").is_file()}
    known, table = known or {}, {}
    with progress_bar() as bar:
        task = bar.add_task("card", total=1 + len(folders), note="")
        for name, folder in [("base", None), *folders.items()]:
            digest = _digest(weights / "model" / "unet" if folder is None else folder)
            row = known.get(name, {})
            fresh = row.get("sha256") == digest and row.get("prompts") == prompts
            table[name] = row if fresh else _row(weights, name, folder, prompts) | {"sha256": digest}
            bar.update(task, advance=1, note=name)
    return table


def _digest(folder: Path) -> str:
    (file,) = folder.glob("*.safetensors")
    return hashlib.sha256(file.read_bytes()).hexdigest()


def _row(weights: Path, name: str, folder: Path | None, prompts: int) -> Row:
    pipe = _opened(weights, folder)
    row: Row = {"prompts": prompts, **as_trained(pipe, prompts, weights, measure_kl=folder is not None)}
    if folder is None or name in SINGLE:
        row["guided"] = as_drawn(pipe, prompts, weights)
    return row


def _opened(weights: Path, folder: Path | None) -> Any:
    """The model, with one adapter on it or none."""
    pipe: Any = open_pipeline(weights / "model")
    if folder is not None:
        load_adapter(pipe, folder, ADAPTER)
        pipe.unet.set_adapter(ADAPTER)
    return pipe


def as_trained(pipe: Any, prompts: int, weights: Path, *, measure_kl: bool = True) -> Row:
    """Rewards without guidance, and the KL of the trajectories to the base model's."""
    texts, policy = list(world.held_out_prompts()[:prompts]), DenoiserPolicy(pipe, STEPS)
    images, kls = [], []
    for start in range(0, len(texts), BATCH):
        rows = range(start, min(start + BATCH, len(texts)))
        rollout = policy.rollout([texts[i] for i in rows], [torch.Generator().manual_seed(SEED + i) for i in rows])
        images.append(rollout.images)
        if measure_kl and start < KL_PROMPTS:
            kls.append(step_kls(policy, rollout).sum(0))
    row: Row = {"rewards": statistics(torch.cat(images), texts, weights)}
    if kls:
        kl = torch.cat(kls)
        row["kl"] = [float(kl.mean()), float(kl.std() / len(kl) ** 0.5)]
    return row


def as_drawn(pipe: Any, prompts: int, weights: Path) -> dict[str, list[float]]:
    """Rewards with the guidance that the package draws with."""
    pictures = [Picture(text, i, SEED + i) for i, text in enumerate(world.held_out_prompts()[:prompts])]
    drawn = draw(pipe, pictures, steps=STEPS, guidance=mini.GUIDANCE, batch_size=BATCH)
    return statistics(torch.cat([batch for _, batch in drawn]), [picture.prompt for picture in pictures], weights)


def statistics(images: Tensor, prompts: Sequence[str], weights: Path = mini.WEIGHTS) -> dict[str, list[float]]:
    """Every reward of images (n, 3, 64, 64): its mean, standard error and standard deviation."""
    scorers = [Alignment(weights / "judge") if name == "alignment" else load_scorer(name) for name in SCORERS]
    scores = {scorer.name: scorer.score(images, prompts) for scorer in scorers}
    return {name: [float(s.mean()), float(s.std() / len(s) ** 0.5), float(s.std())] for name, s in scores.items()}


def gains(table: Mapping[str, Row], column: str = "rewards") -> dict[str, float]:
    """What each single-reward expert adds to its own reward, in standard deviations of the base model's rewards."""
    start = table["base"][column]
    return {
        name: (table[name][column][name][0] - start[name][0]) / start[name][2] for name in SINGLE if name in table
    }  # fmt: skip


def write(weights: Path, prompts: int = PROMPTS) -> None:
    """Measure what has changed, and write `card.json`, `README.md` and `curves.png` into the folder of the weights."""
    path = weights / "card.json"
    known = json.loads(path.read_text())["table"] if path.is_file() else {}
    table = measure(weights, prompts, known)
    facts = {
        "prompts": prompts, "kl_prompts": min(KL_PROMPTS, prompts), "steps": STEPS, "eta": 1.0,
        "guidance": mini.GUIDANCE, "table": table, "gains": gains(table), "guided gains": gains(table, "guided"),
    }  # fmt: skip
    training = {
        name: json.loads((weights / "adapters" / name / "training.json").read_text())
        for name in table if name != "base"
    }  # fmt: skip
    write_atomically(path, lambda temporary: temporary.write_text(json.dumps(facts, indent=1) + "\n"))
    text = _text(facts, training, weights)
    write_atomically(weights / "README.md", lambda temporary: temporary.write_text(text))
    if training:
        write_atomically(weights / "curves.png", lambda temporary: draw_curves(training).savefig(temporary, dpi=100))


def _text(facts: dict[str, Any], training: Mapping[str, Any], weights: Path) -> str:
    judge = json.loads((weights / "judge" / "judge.json").read_text())
    table, names = facts["table"], list(SCORERS)
    rows = {
        name: [*_cells(row["rewards"]), _kl(row), f"{training[name]['seconds'] / 60:.0f}" if name in training else ""]
        for name, row in table.items()
    }  # fmt: skip
    guided = {name: _cells(row["guided"]) for name, row in table.items() if "guided" in row}
    others = [name for name, record in training.items() if record["settings"]["precision"] == "no"]
    return TEXT.format(
        others=f", but {' and '.join(others)} in float32" if others else "",
        pictures=base.PICTURES,
        wrong=base.WRONG_COLOURS,
        judged=judge["accuracy on held-out renders"],
        alpha=next((training[name]["alpha"] for name in SINGLE if name in training), MINI.alpha),
        kl_prompts=facts["kl_prompts"],
        rows=_markdown(("model", *names, "KL", "minutes"), rows),
        guided=_markdown(("model", *names), guided),
        spread=_spread(table["base"]["rewards"]),
        guided_spread=_spread(table["base"]["guided"]),
        gains=", ".join(f"{name} {value:+.2f}" for name, value in facts["gains"].items()),
        **{name: facts[name] for name in ("prompts", "steps", "guidance")},
    )


def _cells(rewards: Mapping[str, Sequence[float]]) -> list[str]:
    return [f"{mean:.3f} +- {error:.3f}" for mean, error, _ in rewards.values()]


def _kl(row: Row) -> str:
    return f"{row['kl'][0]:.1f} +- {row['kl'][1]:.1f}" if "kl" in row else "0"


def _spread(rewards: Mapping[str, Sequence[float]]) -> str:
    return ", ".join(f"{name} {deviation:.3f}" for name, (_, _, deviation) in rewards.items())


def _markdown(header: Sequence[str], rows: Mapping[str, Sequence[str]]) -> str:
    lines = ["| " + " | ".join(header) + " |", "|---" * len(header) + "|"]
    return "\n".join(lines + ["| " + " | ".join((name, *cells)) + " |" for name, cells in rows.items()])
