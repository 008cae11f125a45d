"""Folders like those of `dblend sweep`, with effects that are known."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from scale.hashes import sha256
from scale.mini import world

REWARDS = ("alignment", "colorfulness")
Effect = Callable[[str, Mapping[str, float], float], Sequence[float]]


def gains(method: str, weights: Mapping[str, float], kl_scale: float) -> list[float]:
    """What a method adds to each reward: MORL the most, DB-MPA 95 % of it, the soup of factors 20 %."""
    share = {"base": 0.0, "morl": 1.0, "mpa": 0.95, "mpa-ls": 0.93, "rs": 0.6, "rs-factors": 0.2, "code": 0.5}
    return [share.get(method, 0.9) * kl_scale * weight for weight in weights.values()]


def write_run(
    folder: Path,
    cells: Sequence[tuple[str, Mapping[str, float], float]],
    *,
    prompts: int = 12,
    seeds: Sequence[int] = (0, 1),
    rewards: Sequence[str] = REWARDS,
    effect: Effect = gains,
    pictures: int = 0,
    figures: Sequence[str] = (),
    paper: Sequence[str] = (),
    unmade: int = 0,
    **identity: Any,
) -> Path:
    """A run of `cells` (method, weights, KL scale): one record a cell, the last `unmade` cells without theirs.

    An image's reward is its prompt's level, plus its method's effect, plus noise of 0.05; the first `pictures` images
    of each cell are renders of their captions, the other files are missing.
    """
    captions = world.held_out_prompts()[:prompts]
    level = np.random.default_rng(0).normal(0, 1, (prompts, len(rewards)))
    rng = np.random.default_rng(1)
    (folder / "records").mkdir(parents=True)
    (folder / "images").mkdir()
    size = prompts * len(seeds)
    run = {
        "title": "A test",
        "rewards": list(rewards),
        "also": ["jpeg"],
        "figures": list(figures),
        "paper": list(paper),
        "jobs": size * len(cells),
    }
    run |= {"identity": {"model": None, "rewards": list(rewards), "steps": 20, **identity}, "skipped": []}
    (folder / "run.json").write_text(json.dumps(run))
    for number, (method, weights, kl_scale) in enumerate(cells[: len(cells) - unmade]):
        images = []
        for place in range(size):
            index, seed = divmod(place, len(seeds))
            values = level[index] + effect(method, weights, kl_scale) + rng.normal(0, 0.05, len(rewards))
            job = f"{method}-{number}-{place}"
            path = folder / "images" / f"{job}.png"
            if place < pictures:
                Image.fromarray(world.render(world.parse(captions[index]), rng)).save(path)
            certified = {"certificate": rng.uniform(0.1, 1), "disagreement": 0.2, "ess": 1.0, "log_weight": 0.0}
            images.append({
                "job": job, "prompt": captions[index], "prompt_index": index, "tag": None, "seed": seeds[seed],
                "file": f"images/{job}.png", "sha256": sha256(path) if path.exists() else job,
                "rewards": {**dict(zip(rewards, values, strict=True)), "jpeg": -1.0},
                "certificate": certified if method.startswith("mpa") and max(weights.values()) < 1 else None,
            })  # fmt: skip
        base = method == "base"
        cost = {"evaluations": 20 * size, "reward_calls": 0, "gradients": 0, "seconds": 2.0 * size, "peak_memory": 5}
        made_by = {"method": method, "weights": {} if base else dict(weights), "kl_scale": None if base else kl_scale}
        record = {"batch": f"b{number}", "index": number, "label": method, "made_by": made_by, "cost": cost}
        (folder / "records" / f"b{number}.json").write_text(json.dumps(record | {"images": images}))
    return folder


def two_rewards(methods: Sequence[str], ws: Sequence[float] = (0.0, 0.5, 1.0)) -> list[tuple[str, dict, float]]:
    """Base, and each method at each weight of the first of two rewards."""
    first, second = REWARDS
    cells = [(method, {first: w, second: 1 - w}, 1.0) for method in methods for w in ws]
    return [("base", {first: 0.0, second: 0.0}, 1.0), *cells]
