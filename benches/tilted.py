"""`python -m benches.tilted`: how many of the base model's samples count when `--algorithm tilted` weighs them.

The small world's base model draws several images of each training prompt. For every reward of the family, scaled as the
family scales it, and every alpha: the mean effective sample size of a prompt, the share of prompts with fewer than 2,
and the gain in reward that the weighted samples promise.
"""

import time
from dataclasses import asdict, dataclass
from typing import Annotated

import torch
import tyro
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benches.output import JsonFile, write_record
from scale import mini
from scale.mini import world
from scale.mini.family import SINGLE
from scale.pipeline import Picture, draw, open_pipeline
from scale.rewards.expression import parse_reward
from scale.train.tilted import effective_sizes, tilted_weights


@dataclass(frozen=True)
class Options:
    """What is drawn."""

    prompts: int = 64
    samples: int = 16
    """Images of each prompt."""
    steps: int = 20
    """DDIM steps, eta = 1, without guidance."""
    alphas: tuple[float, ...] = (0.01, 0.03, 0.1, 0.3, 1.0)
    threads: int = torch.get_num_threads()

    def __post_init__(self) -> None:
        if min(self.prompts, self.steps) < 1 or self.samples < 2 or not all(alpha > 0 for alpha in self.alphas):
            raise ValueError(f"prompts, steps and alphas must be positive, samples at least 2; received {self}")


@dataclass(frozen=True)
class Row:
    """Of a reward at an alpha; `spread` is the rewards' standard deviation within a prompt."""

    reward: str
    spread: float
    alpha: float
    effective: float
    starved: float
    gain: float


def row(reward: str, rewards: Tensor, group: int, alpha: float) -> Row:
    """Of rewards (n,), groups of `group` images of one prompt together."""
    weights = tilted_weights(rewards, group, alpha)
    sizes = effective_sizes(weights, group)
    spread = float(rewards.unflatten(0, (-1, group)).var(1).mean().sqrt())
    starved, gain = float((sizes < 2).float().mean()), float((weights * rewards).mean() - rewards.mean())
    return Row(reward, spread, alpha, float(sizes.mean()), starved, gain)


def measure(options: Options) -> list[Row]:
    """A row a reward and alpha."""
    texts = [text for text in world.train_prompts()[: options.prompts] for _ in range(options.samples)]
    pictures = [Picture(text, i, i) for i, text in enumerate(texts)]
    drawn = draw(open_pipeline(mini.MODEL), pictures, steps=options.steps, guidance=1.0, eta=1.0)
    images = torch.cat([batch for _, batch in drawn])
    scores = {name: parse_reward(expert.reward).score(images, texts).double() for name, expert in SINGLE.items()}
    return [row(name, values, options.samples, alpha) for name, values in scores.items() for alpha in options.alphas]


def main(
    options: Annotated[Options, tyro.conf.OmitArgPrefixes] = Options(),
    json_file: JsonFile = None,
) -> None:
    """Prints the table.

    Args:
        options: What is drawn.
    """
    torch.set_num_threads(options.threads)
    started, facts = time.perf_counter(), asdict(options)
    rows = measure(options)
    table = Table(title=", ".join(f"{name} {value}" for name, value in facts.items()))
    for column in ("reward", "spread", "alpha", f"effective of {options.samples}", "starved", "gain"):
        table.add_column(column)
    for each in rows:
        figures = (f"{each.spread:.3f}", f"{each.alpha:g}", f"{each.effective:.2f}", f"{each.starved:.0%}")
        table.add_row(each.reward, *figures, f"{each.gain:+.3f}")
    console = Console(width=max(Console().width, 100))
    console.print(table, f"{time.perf_counter() - started:.0f} s")
    write_record(json_file, {"environment": facts, "rows": [asdict(each) for each in rows]})


if __name__ == "__main__":
    tyro.cli(main, config=(tyro.conf.OmitArgPrefixes,))
