"""What answers a denoiser's calls while a blend is attached."""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.hooks import ModelHook
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel, UNet2DConditionOutput
from diffusers.utils.torch_utils import randn_tensor, unwrap_module
from torch import Tensor

from dbtheory.blend import AffineBlender, Blender, NoisyBlender, Step
from dbtheory.experts import Points
from dbtheory.preference import Amount, Preference, Weight
from scale.adapters import denoiser_name, denoiser_of
from scale.caller import calling_pipeline, guided, is_compiled, rows_per_image
from scale.certificate import Certificate, conditions_of, groups_of
from scale.experts import LoraExperts, Memory
from scale.levels import draws_noise, step_with_noise
from scale.switch import AdapterSwitch
from scale.trajectory import Trajectory, Watch

BESIDE = "channels_beside_the_latents"  # travels with the conditioning


class BlendHook(ModelHook):
    """Answers each call of the denoiser by the blend of its experts' predictions.

    `make` builds the blender of a preference; `resamples` says whether images of one prompt are resampled.
    """

    def __init__(
        self,
        pipe: DiffusionPipeline,
        names: tuple[str, ...],
        preference: Preference,
        make: Callable[[Preference], Blender],
        resamples: bool,
        max_batch: int | None,
    ) -> None:
        super().__init__()
        self.pipe, self.names, self.make, self.resamples = pipe, names, make, resamples
        self.denoiser = denoiser_of(pipe)
        self.switch = AdapterSwitch(self.denoiser, names[1:])
        self.signature = inspect.signature(type(self.denoiser).forward)
        _, self.first, *_ = self.signature.parameters
        self.memory, self.watch = Memory(max_batch), Watch(self.scheduler_step)
        self.trajectory: Trajectory | None = None
        self.certificate: Certificate | None = None
        self.step: Step | None = None
        # a graph of this would be made anew at every step; the denoiser inside is compiled all the same
        self.answer: Callable[..., Any] = torch.compiler.disable(self._answer)
        self.inside = False  # a graph, which calls this hook again
        self.called: Any = self.denoiser
        self.compiled_call: Callable[..., Any] | None = None  # what `denoiser.compile()` had made before attaching
        self.kept: Tensor | None = None  # the images that go on to the scheduler's next step; None is all
        self.set_preference(preference)

    def set_preference(self, preference: Preference) -> None:
        """The preference from the next evaluation on; ValueError for what the method refuses."""
        self.blender = self.make(preference)
        # by rows an image: guidance evaluates each image twice, and then each preference
        self.preference, self.blenders = preference, {1: self.blender}
        if self.certificate is not None and self.trajectory is not None and not self.trajectory.is_over:
            self.certificate.part(self._columns(0.0, len(self.certificate.groups)))

    def close(self) -> None:
        """Let go of the pipeline, the scheduler and the layers; the certificate stays."""
        self.watch.release()
        self.switch.remove()
        # the cycles that this is part of would hold the model until a garbage collection
        for name in ("pipe", "denoiser", "called", "compiled_call", "trajectory", "answer", "fn_ref", "watch"):
            setattr(self, name, None)

    def new_forward(self, module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        """The denoiser's forward with one more meaning: same arguments, same type of result."""
        if self.inside:
            assert self.fn_ref.original_forward is not None
            return self.fn_ref.original_forward(*args, **kwargs)
        return self.answer(*args, **kwargs)

    def _answer(self, *args: Any, **kwargs: Any) -> Any:
        given = self._arguments(args, kwargs)
        x, t = given.pop(self.first), torch.as_tensor(given.pop("timestep"))
        channels = self.denoiser.config["out_channels"] if isinstance(self.denoiser, UNet2DConditionModel) else None
        if channels is not None and x.shape[1] > channels:
            # inpainting: the mask and the masked image condition the latents, which are what is predicted
            x, given[BESIDE] = x.tensor_split([channels], 1)
        returns_dict = given.pop("return_dict", True)
        caller = calling_pipeline(self.denoiser)
        pipe = caller or self.pipe
        step = self._begin(pipe, x, t, caller is not None)
        blended = self._blend(self.experts(pipe.scheduler).bind(timestep=t, **given), x, step, pipe)
        return _output_class(self.denoiser)(sample=blended) if returns_dict else (blended,)

    def experts(self, scheduler: Any) -> LoraExperts:
        """The denoiser and its adapters, without the blend."""
        forward = self.fn_ref.original_forward
        assert forward is not None

        def evaluate(x: Tensor, t: Tensor, **rest: Any) -> Any:
            beside = rest.pop(BESIDE, None)
            given = {self.first: x if beside is None else torch.cat((x, beside), 1), "timestep": t, **rest}
            return self._compiled(given) if self.switch.compiled else forward(**given)

        return LoraExperts(self.denoiser, scheduler, self.names, self.switch, evaluate, memory=self.memory)

    def _compiled(self, given: dict[str, Any]) -> Any:
        """The denoiser's own forward by the graph that the user asked for, which knows nothing of the blend."""
        self.inside = True
        try:
            return (self.compiled_call or self.called)(**given)
        finally:
            self.inside = False

    def scheduler_step(self, step: Callable[..., Any], scheduler: Any, *args: Any, **kwargs: Any) -> Any:
        """A watched scheduler's `step(model_output, timestep, sample, ...)`, with the method's noise and images."""
        if self.trajectory is None or self.trajectory.scheduler is not scheduler:
            return step(*args, **kwargs)
        if self._needs_noise:
            self._require_noise(scheduler, inspect.signature(step).bind(*args, **kwargs).arguments.get("eta", 0.0))
        if isinstance(self.blender, NoisyBlender):
            step = step_with_noise(step, self._shaped_noise)
        if self.kept is not None:
            args, kwargs = _keep_samples(args, kwargs, self.kept)
            self.kept = None
        result = step(*args, **kwargs)
        self.trajectory.advance()
        return result

    def _arguments(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """All arguments of the denoiser's call by name."""
        given = dict(self.signature.bind(self.denoiser, *args, **kwargs).arguments)
        given |= given.pop("kwargs", {})
        return {name: value for name, value in given.items() if name != "self"}

    def _begin(self, pipe: Any, x: Tensor, t: Tensor, in_pipeline: bool) -> Step:
        """Where this call of the denoiser stands; a new trajectory forgets the last one."""
        if self.trajectory is None or not self.trajectory.includes(pipe.scheduler, t, in_pipeline):
            if self._needs_noise:
                self._require_noise(pipe.scheduler, 1.0)
            self._require_adapters()
            self.watch.follow(pipe.scheduler)
            self.trajectory, self.certificate, self.kept = Trajectory(pipe.scheduler, self.denoiser, x, t), None, None
            if self.resamples and self.trajectory.index:
                raise ValueError("resampling starts from noise, and this call starts from a picture; use correct=None")
            self.trajectory.images //= rows_per_image(pipe if in_pipeline else None, self.trajectory.phase)
            called = getattr(pipe, denoiser_name(pipe))
            self.called = called if unwrap_module(called) is self.denoiser else self.denoiser
            self.switch.compiled = self.compiled_call is not None or is_compiled(self.denoiser, self.called)
            self.switch.begin()
        self.step = self.trajectory.evaluate(x, t)
        return self.step

    def _blend(self, experts: LoraExperts, x: Points, step: Step, pipe: Any) -> Points:
        assert self.trajectory is not None
        rows = len(x) // self.trajectory.images  # each image's; a callback may turn guidance off
        blender = self._blender(rows, len(x), step)
        blended = blender(experts, x, step.t, step)
        if not isinstance(blender, AffineBlender):
            return blended
        if self.trajectory.evaluations > 1:  # the certificate is that of the step's first evaluation
            if self.resamples:
                raise ValueError("resampling needs a pipeline with one evaluation a step; use correct=None")
            return blended
        if rows > 2:  # guided by more than the prompt, by weights that only the pipeline knows
            self._require_known_guidance()
            return blended
        self._certify(experts, blended, blender.coefficients(step), step, rows, pipe)
        images = self.trajectory.images
        kept = self.certificate.survivors(step, step.phase[:images]) if self.resamples and self.certificate else None
        if kept is None:
            return blended
        self.kept, everywhere = kept, torch.cat([kept + images * k for k in range(rows)])
        self.trajectory.phase = step.phase[everywhere.to(step.phase.device)]
        return blended[everywhere]

    def _certify(
        self, experts: LoraExperts, blended: Points, given: Mapping[str, Amount], step: Step, rows: int, pipe: Any
    ) -> None:
        """Count this step in the certificate, where the scheduler's noise levels are known."""
        assert self.trajectory is not None
        if self.trajectory.levels is None:
            return
        n = len(blended) // rows
        if self.certificate is None:
            conditions = conditions_of(experts.conditioning, len(blended))
            groups = groups_of(conditions, self._columns(step.progress, n), n)
            self.certificate = Certificate.start(groups, blended.device)
        coefficients = [c[:n] if isinstance(c, Tensor) else c for c in (given[name] for name in experts.latest.names)]
        predictions = guided(experts.latest.predictions, rows, pipe)
        steering = guided(blended.unsqueeze(0), rows, pipe)[0]
        self.certificate.add(predictions, steering, coefficients, step, *self.trajectory.levels)

    def _blender(self, rows: int, total: int, step: Step) -> Blender:
        """The blender of `total` rows, `rows` of which belong to each image."""
        images = self.preference.at(step.progress).rows
        if images is None or (rows == 1 and images == total):
            return self.blender
        if images * rows != total:
            raise ValueError(
                f"the call makes {total // rows} images, but the preference is one for each of {images}; give as many "
                "as prompts times num_images_per_prompt"
            )
        if rows not in self.blenders:
            self.blenders[rows] = self.make(repeated(self.preference, rows))
        return self.blenders[rows]

    def _shaped_noise(self, shape: tuple[int, ...], **kwargs: Any) -> Tensor:
        """The noise that the method wants where the scheduler draws a standard normal one."""
        assert isinstance(self.blender, NoisyBlender)
        assert self.step is not None
        z = randn_tensor(shape, **kwargs)
        return self.blender.noise(z, 1.0, z, replace(self.step, phase=self.step.phase[: len(z)]))

    def _columns(self, progress: float, n: int) -> list[Tensor]:
        """What the images' preferences may differ in."""
        amounts = self.preference.coefficients(progress).values()
        return [c for c in amounts if isinstance(c, Tensor) and len(c) == n]

    def _require_adapters(self) -> None:
        """ValueError where others than the blend's adapters are on the denoiser by now."""
        held = tuple(getattr(self.denoiser, "peft_config", {}))
        if held != self.names[1:]:
            raise ValueError(
                f"adapters were loaded or unloaded under the blend: it has {self.names[1:]}, the denoiser {held}; "
                "detach the blend first"
            )

    def _require_known_guidance(self) -> None:
        if self.resamples:
            raise ValueError("resampling knows guidance by a prompt alone; use correct=None")

    @property
    def _needs_noise(self) -> bool:
        """Whether each step must draw a noise of its own."""
        return self.resamples or isinstance(self.blender, NoisyBlender)

    def _require_noise(self, scheduler: Any, eta: float) -> None:
        """ValueError for a scheduler whose step draws none."""
        what = "resampling copies images" if self.resamples else "msdda shapes the noise of each step"
        if not draws_noise(scheduler, eta):
            raise ValueError(
                f"{what}, and {type(scheduler).__name__} with eta = {eta:g} has no noise of its own; use "
                "DDIMScheduler with eta > 0, DDPMScheduler or EulerAncestralDiscreteScheduler"
            )


def repeated(preference: Preference, rows: int) -> Preference:
    """The preference of each image, `rows` times over."""

    def repeat(value: Weight) -> Weight:
        if isinstance(value, Tensor):
            return value.repeat(rows)
        return (lambda progress: repeat(value(progress))) if callable(value) else value

    weights = {name: repeat(value) for name, value in preference.weights.items()}
    return Preference(weights, repeat(preference.kl_scale), allow_negative=preference.allow_negative)


def _keep_samples(
    args: tuple[Any, ...], kwargs: dict[str, Any], kept: Tensor
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a scheduler's step for the images `kept`: its third is the sample."""
    if "sample" in kwargs:
        return args, kwargs | {"sample": kwargs["sample"][kept]}
    return (*args[:2], args[2][kept], *args[3:]), kwargs


def _output_class(denoiser: torch.nn.Module) -> type:
    return UNet2DConditionOutput if isinstance(denoiser, UNet2DConditionModel) else Transformer2DModelOutput
