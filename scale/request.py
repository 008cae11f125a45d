"""What `generate` is asked for, checked before any long work."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dbtheory.preference import BASE, PROBES, Preference
from scale import mini
from scale.adapters import adapter_file
from scale.methods import Edge, make_blender
from scale.pipeline import DTYPES, SCHEDULERS, Picture, batches, require_gpu_for
from scale.schedules import Amount, PiecewiseLinear

LAST_SEED = 2**63 - 1  # torch takes more, but not every record of them does


@dataclass(frozen=True)
class Request:
    """What to generate: `num` images a prompt, of seeds `seed, seed + 1, ...`.

    Raises:
        ValueError: whatever is wrong with it that shows without the model and the adapters' files.
    """

    prompts: Sequence[str]
    weights: Mapping[str, Amount]
    out: Path
    kl_scale: Amount = 1.0
    method: str = "mpa"
    model: str | None = None
    """A diffusers folder or hub id; None is the shipped small world."""
    adapters: Mapping[str, Path] | None = None
    """Adapters by name, besides the shipped ones of the small world."""
    seed: int = 0
    num: int = 1
    steps: int = 50
    guidance: float | None = None
    eta: float = 1.0
    batch_size: int = 16
    order: str = "low-discrepancy"
    """Of `mpa-ls`: "low-discrepancy" or "iid"."""
    variances: Mapping[str, float] | None = None
    """Of `msdda`: the experts' step variances; None takes those of the adapters' cards."""
    midpoints: Mapping[Edge, Path] | None = None
    """Of `interp`: the adapter of the middle of each edge."""
    exact: float = 0.2
    """Of `mpa-held`: the share of steps, the first ones, that evaluate every expert."""
    correct: str | None = None
    """None or "resample"."""
    max_batch: int | None = None
    allow_negative: bool = False
    dtype: str | None = None
    """None is float32 on the CPU and for the small world, bfloat16 on a GPU."""
    scheduler: str | None = None
    """A name of `SCHEDULERS`; None is the model's own."""
    height: int | None = None
    width: int | None = None
    offload: bool = False

    def __post_init__(self) -> None:
        self._check_numbers()
        self._check_names()
        if not any(prompt.strip() for prompt in self.prompts):
            raise ValueError("no prompt; give --prompt TEXT or --prompt-file FILE")
        if self.out.exists() and not self.out.is_dir():
            raise ValueError(f"the output folder {self.out} is a file; choose another folder")
        require_gpu_for(self.offload)
        if self.resamples:
            self._check_groups()
        self._check_blend()

    @property
    def resamples(self) -> bool:
        return self.correct is not None and self.method != BASE

    @property
    def preference(self) -> Preference | None:
        """None for the base model, which follows no preference."""
        if self.method == BASE:
            return None
        return Preference(self.weights, self.kl_scale, allow_negative=self.allow_negative)

    @property
    def midpoint_names(self) -> dict[Edge, str]:
        """Each midpoint's adapter is named by its edge."""
        return {edge: "+".join(edge) for edge in self.midpoints or {}}

    @property
    def blending(self) -> dict[str, Any]:
        """The method's own options as `attach` and `make_blender` take them."""
        middle = self.midpoint_names or None
        return {"order": self.order, "exact": self.exact, "variances": self.variances, "midpoints": middle}

    @property
    def pictures(self) -> list[Picture]:
        """Every image to make, prompt by prompt."""
        return [
            Picture(prompt, index, self.seed + i) for index, prompt in enumerate(self.prompts) for i in range(self.num)
        ]

    @property
    def torch_dtype(self) -> torch.dtype:
        """bfloat16 on a GPU, which has float32's range: SDXL's decoder and Flux's text encoder overflow in float16."""
        on_gpu = self.model is not None and torch.cuda.is_available()
        return DTYPES[self.dtype or ("bfloat16" if on_gpu else "float32")]

    def chosen_adapters(self) -> dict[str, Path]:
        """The adapters that the weights name, and the midpoints'; ValueError for a name without an adapter."""
        if self.method == BASE:
            return {}
        if not self.weights:
            raise ValueError(f"the method {self.method} needs weights; give --weights NAME=WEIGHT of each adapter")
        shipped = {path.name: path for path in mini.ADAPTERS.glob("*/")} if self.model is None else {}
        known = {**shipped, **(self.adapters or {})}
        unknown = [name for name in self.weights if name not in known]
        if unknown:
            raise ValueError(
                f"no adapter for the weight of {', '.join(unknown)}; "
                f"the adapters are {', '.join(sorted(known)) or 'none'}"
            )
        middle = {self.midpoint_names[edge]: path for edge, path in (self.midpoints or {}).items()}
        if both := sorted({*middle} & {*self.weights}):
            raise ValueError(f"{', '.join(both)} names an adapter and a midpoint; give the adapter another name")
        return {name: known[name] for name in self.weights} | middle

    def _check_numbers(self) -> None:
        for name in ("num", "steps", "batch_size", "max_batch"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, received {value}")
        for name in ("height", "width"):
            if (value := getattr(self, name)) is not None and (value < 8 or value % 8):
                raise ValueError(f"{name} must be a positive multiple of 8 pixels, received {value}")
        if not 0 <= self.seed <= LAST_SEED - self.num:
            raise ValueError(f"seeds must lie in [0, 2**63), received {self.seed} for the first of {self.num}")
        if not 0 <= self.eta <= 1:
            raise ValueError(f"eta must lie in [0, 1], received {self.eta}")
        if self.guidance is not None and not math.isfinite(self.guidance):
            raise ValueError(f"guidance must be finite, received {self.guidance}")

    def _check_names(self) -> None:
        known = {"dtype": DTYPES, "scheduler": SCHEDULERS, "correct": ["resample"]}
        for name, values in known.items():
            if (value := getattr(self, name)) is not None and value not in values:
                raise ValueError(f"unknown {name} {value!r}; it is one of {', '.join(values)}")

    def _check_groups(self) -> None:
        batches(self.pictures, self.batch_size, whole_prompts=True)
        if twice := [prompt for i, prompt in enumerate(self.prompts) if prompt in self.prompts[:i]]:
            raise ValueError(
                f"resampling is among the images of one prompt, but {twice[0]!r} is given twice; give it once, and num"
            )

    def _check_blend(self) -> None:
        """Everything wrong with the preference and the method, at every knot: between them all is linear."""
        amounts = (*self.weights.values(), self.kl_scale)
        knots = {*PROBES, *(knot for amount in amounts if isinstance(amount, PiecewiseLinear) for knot in amount.knots)}
        if self.method == BASE:
            for knot in sorted(knots):
                Preference({"ignored": 1.0}, self.kl_scale).at(knot)  # weights do not matter, a wrong lambda does
            return
        adapters, preference = self.chosen_adapters(), self.preference
        assert preference is not None
        for path in adapters.values():
            adapter_file(path)
        if self.method == "interp" and not self.midpoints:
            raise ValueError(
                "interp needs the adapter of the middle of an edge; give --midpoint A+B=PATH or base+A=PATH"
            )
        for knot in sorted(knots):
            make_blender(self.method, preference.at(knot), adapters, **self.blending, correct=self.correct)
        make_blender(self.method, preference, adapters, **self.blending, correct=self.correct)
