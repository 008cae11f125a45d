"""CoDe and RGG on real pipelines: unsteered they are the pipeline's ordinary call; they raise what they steer by."""

from collections.abc import Callable
from math import inf, nan
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler
from torch import Tensor

from scale import mini
from scale.baselines import Ledger, code, metered, rgg
from scale.baselines.chain import PipelineChain, steered
from scale.baselines.gradient import _gradient, strength
from scale.pipeline import Picture, draw, open_pipeline, set_scheduler
from scale.rewards import load_scorer
from tests.scale import tiny
from tests.scale.train.fixtures import Brightness

PICTURES = [Picture("a red circle", 0, 3), Picture("a blue star", 1, 4), Picture("a red circle", 0, 9)]
STEPS = 4


class Light(Brightness):
    """Brightness, which has gradients."""

    differentiable = True


class Red(Light):
    """The mean of the first channel; its scale is another one."""

    name = "red"

    def _score(self, images: Tensor, prompts: Any) -> Tensor:
        return 100 * images[:, 0].mean((1, 2))


def ordinary(pipe: Any, guidance: float, eta: float = 1.0, steps: int = STEPS) -> Tensor:
    return next(draw(pipe, PICTURES, steps=steps, guidance=guidance, eta=eta))[1]


def unsteered(pipe: Any, guidance: float, eta: float = 1.0, steps: int = STEPS) -> list[Tensor]:
    """One candidate; no strength."""
    options = {"steps": steps, "guidance": guidance, "eta": eta}
    return [
        code(pipe, PICTURES, Light(), candidates=1, block=2, **options),
        rgg(pipe, PICTURES, Light(), alpha=inf, **options),
    ]


@pytest.mark.parametrize(("guidance", "eta"), [(1.0, 1.0), (3.0, 1.0), (3.0, 0.4), (0.5, 1.0)])
@pytest.mark.parametrize("make", [tiny.sd, tiny.v_prediction, tiny.sdxl])
def test_unsteered_it_is_the_ordinary_call(make: Callable[[], Any], guidance: float, eta: float) -> None:
    """Every image equals the one that `draw` makes of the same picture, to 1e-5; another seed's is far from it."""
    pipe = make()
    expected = ordinary(pipe, guidance, eta)
    for images in unsteered(pipe, guidance, eta):
        assert images.dtype == torch.float32
        torch.testing.assert_close(images, expected, rtol=0.0, atol=1e-5)
    assert float((expected[0] - expected[2]).abs().max()) > 1e-2


GRIDS = (
    {"steps_offset": 0, "set_alpha_to_one": True},  # the last step has no noise
    {"timestep_spacing": "trailing", "set_alpha_to_one": True},
    {"timestep_spacing": "linspace"},
)


@pytest.mark.parametrize("grid", GRIDS)
def test_the_grid_is_the_pipelines_own(grid: dict[str, Any]) -> None:
    """Whatever timesteps the scheduler spaces, and with a last step of zero variance, which steering survives too."""
    pipe = tiny.sd()
    usual = ordinary(pipe, 1.0)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, **grid)
    expected = ordinary(pipe, 1.0)
    assert float((usual - expected).abs().max()) > 1e-3
    for images in unsteered(pipe, 1.0):
        torch.testing.assert_close(images, expected, rtol=0.0, atol=1e-5)
    steered = [
        code(pipe, PICTURES, Light(), steps=STEPS, guidance=1.0, candidates=3, block=2),
        rgg(pipe, PICTURES, Light(), steps=STEPS, guidance=1.0, alpha=0.1),
    ]
    assert all(bool(images.isfinite().all()) for images in steered)


@pytest.mark.slow
def test_on_the_small_world() -> None:
    """The shipped model: unsteered images are the ordinary ones; both raise the colorfulness that they steer by."""
    pipe, reward = open_pipeline(mini.MODEL), load_scorer("colorfulness")
    expected = ordinary(pipe, mini.GUIDANCE)
    for images in unsteered(pipe, mini.GUIDANCE):
        torch.testing.assert_close(images, expected, rtol=0.0, atol=1e-5)

    options = {"steps": STEPS, "guidance": mini.GUIDANCE}
    prompts = [picture.prompt for picture in PICTURES[:2]]
    before = reward.score(expected[:2], prompts)
    searched = code(pipe, PICTURES[:2], reward, candidates=3, block=STEPS, **options)
    assert bool((reward.score(searched, prompts) >= before - 1e-4).all())  # best of 3, the ordinary image among them
    # alpha 0.1 is too strong for four steps: it overshoots in both directions
    moved = rgg(pipe, PICTURES[:2], reward, alpha=1.0, **options)
    assert bool((reward.score(moved, prompts) > before).all())
    against = rgg(pipe, PICTURES[:2], -1 * reward, alpha=1.0, **options)
    assert bool((reward.score(against, prompts) < before).all())


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_a_picture_does_not_depend_on_its_batch(guidance: float) -> None:
    """Alone, in another order, and whatever `max_rows`: the same to float32's rounding, for both."""
    pipe, options = tiny.sd(), {"steps": STEPS, "guidance": guidance}
    mix = 0.5 * Light() + 0.5 * Red()
    runs: list[Callable[..., Tensor]] = [
        lambda pictures, **more: code(pipe, pictures, mix, candidates=3, block=2, **options, **more),
        lambda pictures, **more: rgg(pipe, pictures, mix, alpha=0.1, **options, **more),
    ]
    for run in runs:
        together = run(PICTURES)
        torch.testing.assert_close(run(PICTURES, max_rows=2), together, rtol=0.0, atol=1e-4)
        torch.testing.assert_close(run(PICTURES[::-1]).flip(0), together, rtol=0.0, atol=1e-4)
        torch.testing.assert_close(run(PICTURES[1:2]), together[1:2], rtol=0.0, atol=1e-4)


def test_pairs_and_mixes_say_the_same_and_scales_do_not_matter() -> None:
    """A mix is its terms with their weights; a pair's reward counts with its weight alone, however it is scaled."""
    pipe, options = tiny.sd(), {"steps": STEPS, "guidance": 1.0, "alpha": 0.1}
    plain = rgg(pipe, PICTURES, [(0.3, Light()), (0.7, Red())], **options)
    assert torch.equal(plain, rgg(pipe, PICTURES, 0.3 * Light() + 0.7 * Red() - 2, **options))
    scaled = rgg(pipe, PICTURES, [(0.3, 4 * Light() - 2), (0.7, Red())], **options)
    torch.testing.assert_close(scaled, plain, rtol=0.0, atol=1e-4)
    for other in ([(0.7, Light()), (0.3, Red())], 0.3 * (4 * Light() - 2) + 0.7 * Red()):
        assert float((rgg(pipe, PICTURES, other, **options) - plain).abs().max()) > 1e-3
    unnormalised = rgg(pipe, PICTURES, [(0.3, Light()), (0.7, Red())], normalise=False, **options)
    assert float((unnormalised - plain).abs().max()) > 1e-3
    without = rgg(pipe, PICTURES, [(0.3, Light()), (0.0, load_scorer("jpeg"))], **options)  # weight 0: not asked
    assert torch.equal(without, rgg(pipe, PICTURES, [(0.3, Light())], **options))


def test_the_schedules_differ() -> None:
    """`das` guides less at first; gamma = 0 is a constant lambda."""
    pipe, options = tiny.sd(), {"steps": STEPS, "guidance": 1.0, "alpha": 0.1}
    printed, das, constant = (
        rgg(pipe, PICTURES, Light(), **options, **more) for more in ({}, {"schedule": "das"}, {"gamma": 0.0})
    )
    assert float((printed - das).abs().max()) > 1e-3
    assert float((printed - constant).abs().max()) > 1e-5
    assert [strength(k, 0.0) for k in range(3)] == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_what_an_image_costs(guidance: float) -> None:
    """CoDe: candidates x steps evaluations, a score a candidate and block. RGG: steps of each, a gradient a reward."""
    pipe, n, twice = tiny.sd(), len(PICTURES), 1 if guidance == 1 else 2
    mix = 0.5 * Light() + 0.5 * Red()
    options = {"steps": 5, "guidance": guidance}
    with metered(pipe) as spent:
        code(pipe, PICTURES, mix, candidates=4, block=2, max_rows=5, ledger=spent, **options)
    assert (spent.evaluations, spent.reward_calls, spent.gradients) == (n * 4 * 5 * twice, n * 4 * 3, 0)
    for normalise, passes in ((True, 2), (False, 1)):
        with metered(pipe) as spent:
            rgg(pipe, PICTURES, mix, alpha=1.0, normalise=normalise, ledger=spent, **options)
        assert (spent.evaluations, spent.reward_calls, spent.gradients) == (n * 5 * twice, n * 5, n * 5 * passes)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype: torch.dtype) -> None:
    """The noise is the half-precision pipeline's own, and gradients are the exact ones to its precision.

    Also where the reward's slope by a pixel is 1e-7, next to nothing in float16. The autoencoder is given back.
    """
    pipe, prompts, gradients = tiny.sd().to(dtype), [picture.prompt for picture in PICTURES], []
    for images in unsteered(pipe, 1.0):
        torch.testing.assert_close(images, ordinary(pipe, 1.0), rtol=0.0, atol=0.05)
    x = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    for one in (tiny.sd(), pipe):
        with steered(one):
            chain = PipelineChain(one, STEPS, 3.0, 1.0)
            told = chain.encode(prompts)
            gradients.append(_gradient(chain, x, 2, told, prompts, [(1e-4, Light())], False, Ledger())[2].flatten(1))
    exact, rough = gradients
    assert bool((torch.cosine_similarity(exact, rough) > 0.98).all())
    torch.testing.assert_close(rough.norm(dim=1), exact.norm(dim=1), rtol=0.05, atol=0.0)
    assert pipe.vae.dtype == dtype


def test_nothing_is_left_behind() -> None:
    """Scheduler, parameters, memory formats and torch's global generator are as before, also after an error."""

    class Broken(Light):
        def _score(self, images: Tensor, prompts: Any) -> Tensor:
            raise RuntimeError("broken")

    pipe = tiny.sd()
    pipe.unet.conv_in.weight.requires_grad_(False)
    pipe.scheduler.set_timesteps(7)

    def state() -> tuple[Any, ...]:
        parameters = [*pipe.unet.parameters(), *pipe.vae.parameters()]
        flags = [(p.requires_grad, p.stride(), p.dtype, p.grad is None) for p in parameters]
        return (
            flags,
            pipe.scheduler.timesteps.tolist(),
            torch.get_rng_state().tolist(),
            dict(pipe.unet._forward_pre_hooks),
        )

    before = state()
    unsteered(pipe, 1.0)
    assert state() == before
    for run in (lambda: code(pipe, PICTURES, Broken(), steps=2, guidance=1.0, candidates=2),
                lambda: rgg(pipe, PICTURES, Broken(), steps=2, guidance=1.0, alpha=1.0)):  # fmt: skip
        with pytest.raises(RuntimeError, match="broken"):
            run()
        assert state() == before


WRONG = (
    ({"candidates": 0}, {}, "candidates must be an integer of at least 1, received 0"),
    ({"block": 0}, {}, "block must be"),
    ({"max_rows": 0}, {"max_rows": 0}, "max_rows must be"),
    ({"steps": 0}, {"steps": 0}, "steps must be"),
    ({"steps": 1001}, {"steps": 1001}, "1001"),
    ({"eta": 0.0, "block": 2}, {"eta": 0.0}, "use eta > 0"),
    ({"eta": 1.5}, {"eta": nan}, "eta in"),
    ({"guidance": nan}, {"guidance": nan}, "guidance must be finite"),
    ({"pictures": []}, {"pictures": []}, "no picture"),
    ({"reward": "alignment"}, {"reward": "alignment"}, "cannot score the prompt 'a red cat'"),
    ({}, {"alpha": 0.0}, "alpha must be positive"),
    ({}, {"alpha": nan}, "alpha must be positive"),
    ({}, {"gamma": -1.0}, "gamma"),
    ({}, {"schedule": "cosine"}, "schedule"),
    ({}, {"reward": [(0.0, Light())]}, "not all 0"),
    ({}, {"reward": [(nan, Light())]}, "finite weights"),
    ({}, {"reward": "jpeg"}, "jpeg has none; leave it out, or use CoDe"),
    ({}, {"reward": [(1.0, 2 * Light() + Brightness())]}, "brightness has none"),
)


@pytest.mark.parametrize(("for_code", "for_rgg", "message"), WRONG)
def test_what_cannot_work_is_refused(for_code: dict[str, Any], for_rgg: dict[str, Any], message: str) -> None:
    """ValueError with the remedy, before the denoiser has run once."""
    pipe = tiny.sd()
    for run, options in ((code, for_code), (rgg, for_rgg)):
        if not options:
            continue
        settings = {"pictures": PICTURES, "reward": Light(), "steps": STEPS, "guidance": 1.0} | options
        settings |= {"alpha": 1.0} if run is rgg and "alpha" not in options else {}
        if isinstance(settings["reward"], str):
            settings["reward"] = load_scorer(settings["reward"])
            settings["pictures"] = [Picture("a red cat", 0, 1)]
        with metered(pipe) as spent, pytest.raises(ValueError, match=message):
            run(pipe, **settings)
        assert spent.evaluations == 0


@pytest.mark.parametrize("run", [code, rgg])
def test_pipelines_without_ddims_steps_are_refused(run: Callable[..., Tensor]) -> None:
    """Another scheduler, one that clips, one that begins without signal; an offloaded model, and a transformer."""
    options: dict[str, Any] = {"reward": Light(), "steps": STEPS, "guidance": 1.0} | (
        {"alpha": 1.0} if run is rgg else {}
    )
    pipe = tiny.sd()
    own = pipe.scheduler.config
    set_scheduler(pipe, "euler-ancestral")
    with pytest.raises(ValueError, match=r'EulerAncestral.*set_scheduler\(pipe, "ddim"\)'):
        run(pipe, PICTURES, **options)
    for more, message in (
        ({"clip_sample": True}, "clip_sample True"),
        ({"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}, "no signal"),
    ):
        pipe.scheduler = DDIMScheduler.from_config(own, **more)
        with pytest.raises(ValueError, match=message):
            run(pipe, PICTURES, **options)
    pipe = tiny.sd()
    pipe.enable_model_cpu_offload(device="cpu")
    with pytest.raises(ValueError, match="without offload"):
        run(pipe, PICTURES, **options)
    with pytest.raises(ValueError, match="needs a pipeline with a UNet"):
        run(tiny.sd3(t5=False), PICTURES, **options)


def test_eta_zero_has_candidates_only_at_the_start() -> None:
    """Best-of-N over initial noises works without later noise."""
    pipe, options = tiny.sd(), {"steps": STEPS, "guidance": 1.0, "eta": 0.0}
    prompts = [picture.prompt for picture in PICTURES]
    best = Light().score(code(pipe, PICTURES, Light(), candidates=4, block=STEPS, **options), prompts)
    assert bool((best >= Light().score(ordinary(pipe, 1.0, eta=0.0), prompts) - 1e-5).all())
