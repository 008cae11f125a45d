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
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from dbtheory.blend import AffineBlender, Blender, NoisyBlender, Step
from dbtheory.experts import Points
from dbtheory.preference import Amount, Preference, Weight
from scale.adapters import denoiser_name, denoiser_of
from scale.caller import calling_pipeline, guided, is_compiled, rows_per_image
from scale.certificate import Certificate, groups_of
from scale.experts import LoraExperts, Memory
from scale.levels import draws_noise, step_with_noise
from scale.switch import AdapterSwitch
from scale.trajectory import Trajectory, Watch

BESIDE = "channels_beside_the_latents"  # travels with the conditioning
ATTENTION_ARGUMENTS = ("cross_attention_kwargs", "joint_attention_kwargs", "attention_kwargs")


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
        self.inside = False  # a graph, which calls this hook again
        self.compiled_call: Callable[..., Any] | None = None  # what `denoiser.compile()` had made before attaching
        self.kept: Tensor | None = None  # the images that go on to the scheduler's next step; None is all
        self.set_preference(preference)

    def set_preference(self, preference: Preference) -> None:
        """The preference from the next evaluation on."""
        self.blender = self.make(preference)
        # by rows an image: guidance evaluates each image twice, and then each preference
        self.preference, self.blenders = preference, {1: self.blender}

    def new_forward(self, module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        """The denoiser's forward with one more meaning: same arguments, same type of result."""
        if self.inside:
            assert self.fn_ref.original_forward is not None
            return self.fn_ref.original_forward(*args, **kwargs)
        return self._answer(*args, **kwargs)

    # a graph of this would be made anew at every step; the denoiser inside is compiled all the same
    @torch.compiler.disable
    def _answer(self, *args: Any, **kwargs: Any) -> Any:
        given = self._arguments(args, kwargs)
        x, t = given.pop(self.first), torch.as_tensor(given.pop("timestep"))
        if isinstance(self.denoiser, UNet2DConditionModel) and x.shape[1] > self.denoiser.config.out_channels:
            # inpainting: the mask and the masked image condition the latents, which are what is predicted
            x, given[BESIDE] = x.tensor_split([self.denoiser.config.out_channels], 1)
        returns_dict = given.pop("return_dict", True)
        pipe = calling_pipeline(self.denoiser) or self.pipe
        step = self._begin(pipe, x, t, given)
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
            return (self.compiled_call or getattr(self.pipe, denoiser_name(self.pipe)))(**given)
        finally:
            self.inside = False

    def scheduler_step(self, step: Callable[..., Any], scheduler: Any, *args: Any, **kwargs: Any) -> Any:
        """A watched scheduler's `step(model_output, timestep, sample, ...)`, with the method's noise and images."""
        if self.trajectory is None or self.trajectory.scheduler is not scheduler:
            return step(*args, **kwargs)
        self._require_noise(scheduler, kwargs.get("eta", 0.0))
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

    def _begin(self, pipe: Any, x: Tensor, t: Tensor, given: Mapping[str, Any]) -> Step:
        """Where this call of the denoiser stands; a new trajectory forgets the last one."""
        self.watch.add(pipe.scheduler)
        if self.trajectory is None or not self.trajectory.includes(pipe.scheduler, t):
            self._require_noise(pipe.scheduler, 1.0)
            self.trajectory, self.certificate, self.kept = Trajectory(pipe.scheduler, self.denoiser, x, t), None, None
            called = getattr(self.pipe, denoiser_name(self.pipe))
            self.switch.compiled = self.compiled_call is not None or is_compiled(self.denoiser, called)
        scales = (given[name].get("scale", 1.0) for name in ATTENTION_ARGUMENTS if given.get(name))
        self.switch.strength = next(scales, 1.0)
        self.step = self.trajectory.evaluate(x, t)
        return self.step

    def _blend(self, experts: LoraExperts, x: Points, step: Step, pipe: Any) -> Points:
        rows = rows_per_image(pipe, len(x))
        blender = self._blender(rows, len(x), step)
        blended = blender(experts, x, step.t, step)
        assert self.trajectory is not None
        if not isinstance(blender, AffineBlender):
            return blended
        if self.trajectory.evaluations > 1:  # the certificate is that of the step's first evaluation
            if self.resamples:
                raise ValueError("resampling needs a pipeline with one evaluation a step; use correct=None")
            return blended
        self._certify(experts, blended, blender.coefficients(step), step, rows, pipe)
        images = len(x) // rows
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
            text = (experts.conditioning or {}).get("encoder_hidden_states")
            columns = [c for c in self.preference.coefficients(step.progress).values() if isinstance(c, Tensor)]
            self.certificate = Certificate.start(groups_of(text, columns, n), blended.device)
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

    def _require_noise(self, scheduler: Any, eta: float) -> None:
        """ValueError where the method needs a noise in each step that this scheduler does not draw."""
        what = "resampling copies images" if self.resamples else "msdda shapes the noise of each step"
        if (self.resamples or isinstance(self.blender, NoisyBlender)) and not draws_noise(scheduler, eta):
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
