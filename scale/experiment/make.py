"""Making a batch: one pipeline, with the blend of the cell at hand attached to it."""

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from scale import mini
from scale.attachment import Knob, attach
from scale.experiment.cells import Cell
from scale.experiment.config import Config
from scale.experiment.entries import STEERED
from scale.experiment.jobs import Batch
from scale.hashes import file_hashes, model_hashes
from scale.pipeline import DTYPES, draw, guidance_in_force, open_pipeline, set_scheduler
from scale.rewards.expression import parse_reward, terms_of
from scale.rewards.protocol import Mix, Scorer
from scale.rewards.shared import Shared


@dataclass(frozen=True)
class Made:
    """A batch's images on the CPU, what they cost (`scale.baselines.Ledger`), and their certificates, if any."""

    images: Float[Tensor, "n 3 height width"]
    cost: dict[str, Any]
    certificates: Sequence[Mapping[str, Any] | None]


class Maker:
    """Makes the batches of an experiment; cells of one blend after the other share its attachment.

    Raises:
        ValueError: a model or a scheduler that cannot be had, or that no steered method takes; a reward without its
            weights, or that does not know a prompt.
    """

    def __init__(self, config: Config, cells: Sequence[Cell]) -> None:
        self.config = config
        self.rewards = {name: _scorer(text, config) for name, text in config.rewards.items()}
        self.also = {text: _scorer(text, config) for text in config.also}
        for scorer in self.rewards.values():
            if unknown := [prompt.text for prompt in config.prompts if not scorer.knows(prompt.text)]:
                raise ValueError(f"the reward {scorer.name} cannot score images of the prompt {unknown[0]!r}")
        on_gpu = config.model is not None and torch.cuda.is_available()
        dtype = DTYPES[config.dtype or ("bfloat16" if on_gpu else "float32")]
        self.pipe: Any = open_pipeline(config.model or mini.MODEL, dtype)
        set_scheduler(self.pipe, config.scheduler)
        # both would change the images of some methods and not of others
        for part in ("safety_checker", "watermark"):
            if getattr(self.pipe, part, None) is not None:
                setattr(self.pipe, part, None)
        self.guidance = guidance_in_force(self.pipe, config.guidance, config.model)
        self._check_steered([cell for cell in cells if cell.method in STEERED])
        self._attached: tuple[Any, Knob] | None = None

    @cached_property
    def model(self) -> dict[str, Any]:
        """What the images depend on and the config does not say, as plain data."""
        return {
            "pipeline": type(self.pipe).__name__,
            "files": model_hashes(self.pipe),
            "settings": {"pipeline": _settings(self.pipe), "scheduler": _settings(self.pipe.scheduler)},
            "guidance": self.guidance,
            "dtype": str(self.pipe.dtype).removeprefix("torch."),
        }

    @cached_property
    def scored_by(self) -> dict[str, Any]:
        """What the scorers are, by their names in the record, as plain data."""
        return {name: {"reward": it.name, "files": file_hashes(it.files)} for name, it in self.scorers.items()}

    @property
    def scorers(self) -> dict[str, Scorer]:
        """Of the preference's rewards, then of those for the record alone."""
        return {**self.rewards, **self.also}

    def make(self, batch: Batch) -> Made:
        """The images of a batch.

        Raises:
            ValueError: what the blend or the pipeline refuses; images that are not finite; too little memory.
        """
        from scale.baselines import metered

        knob = self._prepare(batch.cell)
        with _enough_memory(), metered(self.pipe) as ledger:
            images = self._images(batch, ledger)
        certificate = knob.certificate if knob is not None else None
        certificates = certificate.as_dicts() if certificate is not None else [None] * len(images)
        return Made(images, dict(vars(ledger)), certificates)

    def warm_up(self, batch: Batch) -> None:
        """One step, whose images are thrown away: what happens once must not count as the first batch's cost."""
        pictures = batch.pictures
        with _enough_memory():
            next(draw(self.pipe, pictures, steps=1, guidance=self.guidance, batch_size=len(pictures)))

    def close(self) -> None:
        """Detach what is attached."""
        if self._attached is not None:
            self._attached[1].detach()
            self._attached = None

    def _check_steered(self, cells: Sequence[Cell]) -> None:
        """What code and rgg would refuse once all else is made."""
        from scale.baselines.candidates import require_choice
        from scale.baselines.chain import PipelineChain
        from scale.baselines.gradient import require_variance

        steps, eta = self.config.steps, self.config.eta
        if cells:
            PipelineChain(self.pipe, steps, self.guidance or 1.0, eta)
        for cell in cells:
            if cell.method == "rgg":
                require_variance(eta)
            else:
                require_choice(steps, eta, candidates=cell.options["candidates"], block=cell.options["block"])

    def _images(self, batch: Batch, ledger: Any) -> Tensor:
        cell, config = batch.cell, self.config
        common: dict[str, Any] = {"steps": config.steps, "guidance": self.guidance, "eta": config.eta}
        if cell.method in STEERED:
            from scale import baselines

            common |= {**cell.options, **({} if cell.max_rows is None else {"max_rows": cell.max_rows})}
            terms = self._steering(cell)
            if cell.method == "rgg":  # which normalises each axis' own gradient, so a factor in its reward is no weight
                return baselines.rgg(self.pipe, batch.pictures, terms, **common, ledger=ledger)
            return baselines.code(self.pipe, batch.pictures, Mix(terms), **common, ledger=ledger)
        drawn = draw(self.pipe, batch.pictures, **common, batch_size=len(batch.pictures), whole_prompts=cell.resamples)
        return next(drawn)[1]

    def _prepare(self, cell: Cell) -> Knob | None:
        """The blend of a cell on the pipeline, and no other; None where it wants none."""
        blend = cell.blend
        key = blend and (blend[0], sorted(cell.adapters.items()), cell.options)
        if self._attached is not None and self._attached[0] != key:
            self.close()
        if blend is None:
            return None
        method, preference = blend
        if self._attached is None:
            self._attached = (key, attach(self.pipe, cell.adapters, preference, method, **cell.options))
        knob = self._attached[1]
        knob.preference = preference
        return knob

    def _steering(self, cell: Cell) -> list[tuple[float, Scorer]]:
        """The weights and rewards of a cell's preference, without those that have no weight."""
        return [(weight, self.rewards[name]) for name, weight in cell.weights.items() if weight]


@contextlib.contextmanager
def _enough_memory() -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise ValueError(
            "the GPU has too little memory; the run goes on from here with a smaller batch_size (code, rgg: max_rows)"
        ) from error


def _settings(part: Any) -> dict[str, Any]:
    """The configuration of a pipeline or a scheduler, without its parts and what diffusers notes of itself."""
    # some are infinite, which JSON has no number for
    every, parts = json.loads(part.to_json_string(), parse_constant=str), getattr(part, "components", {})
    return {name: value for name, value in every.items() if not name.startswith("_") and name not in parts}


def _scorer(text: str, config: Config) -> Shared:
    """The scorer of an expression, with the models of its own parts; it is asked while finished images are scored."""
    names = {name for _, name in terms_of(text)}
    models = {name: at for name, at in (config.reward_models or {}).items() if name in names}
    return Shared(parse_reward(text, models))
