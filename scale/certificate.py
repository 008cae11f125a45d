"""What a blend's own evaluations say of its error, image by image (MATH.md 8).

A blend follows `s_bar = sum_i c_i s_i`; the law it aims at would weigh each path by `exp(-certificate)`, with

    certificate = integral of 1/2 g^2 Var_c(s) dt over generation,   Var_c(s) = sum_i c_i |s_i - s_bar|^2.

It is 0 where the experts agree, and negative where lambda > 1 goes beyond them. Only the differences between the
images of one prompt matter to the weights. Under guidance the scores are the guided ones. All of this supposes exact
experts: trained or guided ones are weighed towards no density that is known.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from dbtheory.blend import Step
from dbtheory.correct import euler_rate, score_variance
from dbtheory.experts import Points
from dbtheory.preference import Amount
from dbtheory.random import uniform
from dbtheory.resampling import effective_size, systematic
from dbtheory.schedule import NoiseSchedule

THRESHOLD = 0.5  # resampling waits until the effective share of a group falls below


@dataclass
class Certificate:
    """The certificates of one call's `n` images, so far; rows of `running` are steps, from noise to data.

    `groups (n,)` number the images that share a prompt and a preference. `log_weights` are those since the group's
    last resampling; `resamplings` are the steps that ended with one, by group. All other tensors are float64.
    """

    groups: Int64[Tensor, " n"]
    path: Float[Tensor, " n"]
    log_weights: Float[Tensor, " n"]
    history: list[Tensor] = field(default_factory=list)
    distances: list[Tensor] = field(default_factory=list)
    resamplings: dict[int, list[int]] = field(default_factory=dict)

    @classmethod
    def start(cls, groups: Int64[Tensor, " n"], device: torch.device) -> "Certificate":
        """Nothing is known yet of these images."""
        zeros = torch.zeros(len(groups), dtype=torch.float64, device=device)
        return cls(groups, zeros, zeros.clone())

    @property
    def running(self) -> Float[Tensor, "steps n"]:
        """The certificate after each step, along the paths of the final images."""
        return torch.stack(self.history) if self.history else self.path.new_empty(0, len(self.path))

    @property
    def disagreement(self) -> Float[Tensor, " n"]:
        """Root mean square, over steps, of the experts' distance from their blend, relative to its length."""
        return torch.stack(self.distances).mean(0).sqrt() if self.distances else torch.zeros_like(self.path)

    @property
    def ess(self) -> Float[Tensor, " n"]:
        """Effective sample size of each image's group, as a share of the group, by the weights since resampling."""
        shares = torch.ones_like(self.path)
        for members in self._members():
            shares[members] = effective_size(self.log_weights[members])
        return shares

    def as_dicts(self) -> list[dict[str, Any]]:
        """One record an image, of plain numbers."""
        resampled = [list(self.resamplings.get(group, ())) for group in self.groups.tolist()]
        columns = (self.path, self.disagreement, self.ess, self.log_weights)
        names = ("certificate", "disagreement", "ess", "log_weight", "resampled")
        rows = zip(*(column.tolist() for column in columns), resampled, strict=True)
        return [dict(zip(names, row, strict=True)) for row in rows]

    def add(
        self,
        predictions: Float[Tensor, "m n *event"],
        blended: Points,
        coefficients: Sequence[Amount],
        step: Step,
        schedule: NoiseSchedule,
        parametrization: str,
    ) -> None:
        """Count one step's evaluations: the experts' predictions and their blend, as they steer the images."""
        variance = score_variance(predictions, blended, coefficients, step.t, schedule, parametrization)
        gained = 0.5 * float(euler_rate(schedule, step.t, step.t_next)) * variance
        self.path, self.log_weights = self.path + gained, self.log_weights - gained
        self.history.append(self.path)
        self.distances.append(relative_distance(predictions, blended, coefficients))

    def part(self, preferences: Sequence[Float[Tensor, " n"]]) -> None:
        """Images whose preferences have become different share no group any more."""
        self.groups = groups_of((), (self.groups, *preferences), len(self.groups))

    def survivors(self, step: Step, phase: Float[Tensor, " n"]) -> Int64[Tensor, " n"] | None:
        """The images that go on, within their groups, or None where all do. Never after the last step.

        Its copies would be the same image; the weights that are left say what it would have chosen.
        """
        kept = torch.arange(len(self.path), device=self.path.device)
        due = [members for members in self._members() if effective_size(self.log_weights[members]) < THRESHOLD]
        if not due or step.index == step.count - 1:
            return None
        for members in due:
            draw = uniform(phase[members[:1].to(phase.device)], -1000 - step.index)
            kept[members] = members[systematic(self.log_weights[members], draw)]
            self.log_weights = self.log_weights.index_fill(0, members, 0.0)
            self.resamplings.setdefault(int(self.groups[members[0].cpu()]), []).append(step.index)
        self.path = self.path[kept]
        self.history = [row[kept] for row in self.history]
        self.distances = [row[kept] for row in self.distances]
        return kept

    def _members(self) -> list[Int64[Tensor, " k"]]:
        return [(self.groups == group).nonzero().flatten().to(self.path.device) for group in self.groups.unique()]


def relative_distance(
    predictions: Float[Tensor, "m n *event"], blended: Points, coefficients: Sequence[Amount]
) -> Float[Tensor, " n"]:
    """`sum_i |c_i| |p_i - p|^2 / (sum_i |c_i| |p|^2)` of the predictions and their blend p."""
    apart = (predictions - blended).flatten(2).to(torch.float64).square().sum(-1)
    length = blended.flatten(1).to(torch.float64).square().sum(-1)
    sizes = [c.abs().to(apart) if isinstance(c, Tensor) else abs(c) for c in coefficients]
    moved = sum(size * squares for size, squares in zip(sizes, apart, strict=True))
    return moved / (sum(sizes) * length).clamp_min(torch.finfo(torch.float64).tiny)


def groups_of(conditions: Iterable[Tensor], preferences: Iterable[Tensor], n: int) -> Int64[Tensor, " n"]:
    """Images that share their conditions and their preference: each is numbered by the first one like it.

    `conditions` hold n rows each, once or more (guidance), `preferences (n,)` one number an image. Rows of one prompt
    may differ by what kernels round.
    """
    same = torch.ones(n, n, dtype=torch.bool)
    for condition in conditions:
        rows = condition.detach().unflatten(0, (-1, n)).movedim(1, 0).flatten(1).to(torch.float32)
        eps = torch.finfo(condition.dtype).eps if condition.is_floating_point() else 0.0
        # not by a product of matrices, whose rounding parts equal rows
        apart = torch.cdist(rows, rows, compute_mode="donot_use_mm_for_euclid_dist")
        same &= (apart <= max(1e-5, 2 * eps) * rows.norm(dim=1)).cpu()
    for column in preferences:
        same &= (column[:, None] == column).cpu()
    return same.fill_diagonal_(True).to(torch.int64).argmax(1)


def conditions_of(value: Any, rows: int) -> Iterator[Tensor]:
    """Every tensor of `rows` rows inside a denoiser's arguments."""
    if isinstance(value, Tensor) and value.ndim > 0 and value.shape[0] == rows:
        yield value
    elif isinstance(value, Mapping | list | tuple):
        for part in value.values() if isinstance(value, Mapping) else value:
            yield from conditions_of(part, rows)
