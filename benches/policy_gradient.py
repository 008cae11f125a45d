"""`python -m benches.policy_gradient`: how much signal a batch's policy gradient holds, by the advantage it is made of.

Independent batches of images are drawn from the base model; each estimator turns each batch into one gradient (of the
adapter's B factors: A's is zero there). Those of trace 1 have the true gradient as their mean; smaller ones are biased
as far as the value errs. The mean cosine between two batches says how much of a batch's gradient is signal: it is about
`|g|^2 / E|g_i|^2`.
"""

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import combinations
from typing import Annotated

import torch
import tyro
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benches.output import JsonFile, write_record
from scale import mini
from scale.mini import world
from scale.pipeline import open_pipeline
from scale.rewards.expression import parse_reward
from scale.train.advantage import centred, generalized_advantages
from scale.train.buffer import Trajectories
from scale.train.denoiser import DenoiserPolicy
from scale.train.dpok import Learner
from scale.train.policy import log_probability
from scale.train.settings import MINI, Dpok


@dataclass(frozen=True)
class Options:
    """What is drawn."""

    reward: str = "alignment"
    batches: int = 8
    prompts: int = 8
    """Prompts a batch."""
    samples: int = 8
    """Images of each prompt."""
    steps: int = 10
    threads: int = torch.get_num_threads()


@dataclass(frozen=True)
class Row:
    """Of an estimator: mean cosine between two batches' gradients, its standard error, and their mean norm."""

    estimator: str
    cosine: float
    error: float
    norm: float


Advantages = Callable[[Trajectories, int], Tensor]


def over_batch(batch: Trajectories, group: int) -> Tensor:
    """Returns less the batch's mean: prompts differ more than the images of one."""
    return (batch.returns - batch.returns.mean()).expand(batch.steps, -1)


def over_prompt(batch: Trajectories, group: int) -> Tensor:
    """Returns less the mean of the prompt's other images."""
    return centred(batch.returns.expand(batch.steps, -1), group)


def traced(trace: float) -> Advantages:
    """Generalised advantages; the value is the reward of the model's own guess of the image."""
    return lambda batch, group: centred(generalized_advantages(batch.hints, batch.returns, trace), group)


ESTIMATORS: dict[str, Advantages] = {
    "return - mean of the batch": over_batch,
    "return - mean of the prompt": over_prompt,
    "return - value (trace 1)": traced(1.0),
    "trace 0.8": traced(0.8),
    "change of the value (trace 0)": traced(0.0),
}


def gradients(learner: Learner, batch: Trajectories, group: int) -> dict[str, Tensor]:
    """Each estimator's gradient `sum_k mean_n A_k grad log p_k` on one batch, flat."""
    parameters = [p for name, p in learner.policy.trainable().items() if "lora_B" in name]
    advantages = {name: estimate(batch, group) for name, estimate in ESTIMATORS.items()}
    sums = {name: torch.zeros(sum(p.numel() for p in parameters)) for name in ESTIMATORS}
    for k in range(batch.steps):
        part = batch.transitions(torch.arange(k * len(batch), (k + 1) * len(batch)))
        mean, std = learner.policy.moments(part.x, part.k, part.condition)
        logs = log_probability(part.x_next, mean, std)
        for name, values in advantages.items():
            found = torch.autograd.grad((values[k] * logs).mean(), parameters, retain_graph=True)
            sums[name] += torch.cat([part.flatten() for part in found])
    return sums


def row(estimator: str, found: list[Tensor]) -> Row:
    """The cosines of all pairs of batches."""
    cosines = torch.stack([torch.cosine_similarity(a, b, dim=0) for a, b in combinations(found, 2)])
    # pairs share batches, so their error is taken over batches: the mean cosine of each with the others
    count = len(found)
    own = [torch.stack([torch.cosine_similarity(a, b, dim=0) for b in found if b is not a]).mean() for a in found]
    error = 2 * float(torch.stack(own).std()) / math.sqrt(count)
    return Row(estimator, float(cosines.mean()), error, float(torch.stack(found).norm(dim=1).mean()))


def measure(options: Options) -> list[Row]:
    """A row an estimator."""
    settings: Dpok = Dpok(
        steps=options.steps, prompts_per_round=options.prompts, samples_per_prompt=options.samples, rounds=1
    )
    policy = DenoiserPolicy(
        open_pipeline(mini.MODEL), options.steps, autocast=lambda: torch.autocast("cpu", torch.bfloat16)
    )
    policy.add_adapter(MINI.rank, MINI.targets)
    learner = Learner(policy, parse_reward(options.reward), world.train_prompts(), settings)
    found = [gradients(learner, learner._sample(index), options.samples) for index in range(options.batches)]
    return [row(name, [each[name] for each in found]) for name in ESTIMATORS]


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
    for column in ("advantage", "cosine between batches", "norm of a batch's"):
        table.add_column(column)
    for each in rows:
        table.add_row(each.estimator, f"{each.cosine:.4f} +- {each.error:.4f}", f"{each.norm:.2e}")
    console = Console(width=max(Console().width, 100))
    console.print(table, f"{time.perf_counter() - started:.0f} s")
    write_record(json_file, {"environment": facts, "rows": [asdict(each) for each in rows]})


if __name__ == "__main__":
    tyro.cli(main, config=(tyro.conf.OmitArgPrefixes,))
