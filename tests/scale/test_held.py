"""DB-MPA with held offsets: which experts it evaluates when, its mean over draws, and pipelines that it must follow."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from dbtheory import ExactExperts, GaussianMixture, LinearReward, MeanBlend, Preference, VPLinear
from dbtheory.blend import Step
from scale import attach
from scale.held import HeldBlend
from tests.dbtheory.wrapped import Wrapped
from tests.scale import tiny

PREFERENCE = Preference({"a": 0.25, "b": 0.5, "c": 0.25}, kl_scale=0.8)


class Counted(Wrapped):
    """Exact experts whose evaluations are counted, in experts a sample."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        means = torch.randn(3, 2, generator=generator, dtype=torch.float64)
        prior = GaussianMixture(torch.ones(3).double() / 3, means, 0.3 * torch.eye(2).double().expand(3, 2, 2))
        rewards = {name: LinearReward(torch.randn(2, generator=generator).double()) for name in "abc"}
        super().__init__(ExactExperts(prior, rewards, 0.5, VPLinear(), "eps"))
        self.evaluations = 0

    def predict(self, x: Tensor, t, names) -> Tensor:
        self.evaluations += len(names)
        return self.inner.predict(x, t, names)

    def predict_each(self, x: Tensor, t, assignment: Tensor) -> Tensor:
        self.evaluations += 1
        return self.inner.predict_each(x, t, assignment)


def steps(count: int, phase: Tensor) -> list[Step]:
    return [Step(k, count, 1 - k / count, 1 - (k + 1) / count, phase) for k in range(count)]


def test_it_costs_one_evaluation_after_the_exact_share() -> None:
    """Of ten steps two evaluate all four experts, as DB-MPA does bit for bit, and eight one; again on the next run."""
    experts, blend, x = Counted(), HeldBlend(PREFERENCE, exact=0.2), torch.ones(3, 2, dtype=torch.float64)
    for seed in (0, 1, 1):
        phase, costs = torch.rand(3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64), []
        for step in steps(10, phase):
            experts.evaluations = 0
            made = blend(experts, x, step.t, step)  # pyright: ignore
            costs.append(experts.evaluations)
            if len(costs) <= 2:
                assert torch.equal(made, MeanBlend(PREFERENCE)(experts.inner, x, step.t, step))
        assert costs == [4, 4] + [1] * 8


def test_its_mean_over_draws_is_the_blend() -> None:
    """The mean over phases is DB-MPA's prediction (level 1e-5, two coordinates), and the spread far below LS's.

    The control: offsets of another preference move the mean by more than that.
    """
    n = 4000
    experts, phase = Counted(), torch.rand(n, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = torch.tensor([[0.3, -0.2]], dtype=torch.float64).expand(n, 2)
    first, second, *_ = steps(10, phase)
    every = experts.inner.predict(x[:1], 0.45, experts.names).squeeze(1)

    def errors(preference: Preference) -> Tensor:
        """In standard errors of the mean, against the blend of PREFERENCE."""
        blend = HeldBlend(preference, exact=0.1)
        blend(experts, x, 0.5, first)  # pyright: ignore
        made = blend(experts, x, 0.45, second)  # pyright: ignore
        expected = MeanBlend(PREFERENCE)(experts.inner, x[:1], 0.45, second)
        assert made.std(0).max() < 0.3 * every.std(0).max()
        return (made.mean(0) - expected).abs().squeeze(0) / (made.std(0) / n**0.5)

    quantile = 4.565  # two-sided 1e-5 / 2 of a standard normal
    assert errors(PREFERENCE).max() < quantile
    assert errors(Preference({"a": 0.3, "b": 0.45, "c": 0.25}, kl_scale=0.8)).max() > quantile


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("adapters")
    return {name: tiny.save_lora(tiny.sd, folder / name, seed) for seed, name in enumerate(("style", "shape"))}


def run(pipe, seeds: tuple[int, ...] = (1, 2), **options) -> Tensor:
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    settings = {"num_inference_steps": 10, "guidance_scale": 3.0, "eta": 1.0, "output_type": "latent"} | options
    return pipe(["a red circle"] * len(seeds), generator=generators, **settings).images


def test_it_follows_a_pipeline(files: dict) -> None:
    """Nearer to DB-MPA than DB-MPA-LS; exact = 1 is DB-MPA; the same image alone, again, and after an exception."""
    half = Preference({"style": 0.5, "shape": 0.5})
    pipes = {name: tiny.sd() for name in ("mpa", "mpa-ls", "mpa-held")}
    for method, pipe in pipes.items():
        attach(pipe, files, half, method)
    mean, sampled, held = (run(pipe) for pipe in pipes.values())
    assert 0 < (held - mean).norm() < 0.7 * (sampled - mean).norm()
    whole = tiny.sd()
    attach(whole, files, half, "mpa-held", exact=1.0)
    assert torch.equal(run(whole), mean)

    def fail(*_):
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        run(pipes["mpa-held"], callback_on_step_end=fail)
    assert torch.equal(run(pipes["mpa-held"]), held)
    assert (run(pipes["mpa-held"], (2,)) - held[1:]).abs().max() < 1e-4 * held.abs().max()


def test_each_call_of_true_guidance_has_offsets_of_its_own(tmp_path: Path) -> None:
    """Flux with a negative prompt evaluates twice a step: with one expert everywhere it is that expert's own image."""
    files = {name: tiny.save_lora(tiny.flux, tmp_path / name, 7) for name in ("style", "twin")}
    options = {"guidance_scale": 1.0, "true_cfg_scale": 3.0, "negative_prompt": "a star", "max_sequence_length": 32}
    del files["twin"]
    files["twin"] = files["style"]
    pipe, alone = tiny.flux(), tiny.flux()
    attach(pipe, files, Preference({"style": 0.5, "twin": 0.5}), "mpa-held")
    attach(alone, {"style": files["style"]}, Preference({"style": 1.0}))
    settings = {"num_inference_steps": 6, "output_type": "latent"} | options
    images = [p("a red circle", generator=torch.Generator().manual_seed(1), **settings).images for p in (pipe, alone)]
    assert (images[0] - images[1]).abs().max() < 1e-4 * images[1].abs().max()
