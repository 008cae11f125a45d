"""Put a blend on any diffusers pipeline, and take it off again."""

import contextlib
import functools
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.hooks import add_hook_to_module, remove_hook_from_module
from diffusers import DiffusionPipeline
from diffusers.hooks import HookRegistry

from dbtheory.preference import BASE, Preference
from scale.adapters import denoiser_name, denoiser_of, load_adapter, stated_variances
from scale.certificate import Certificate
from scale.experts import LoraExperts
from scale.hook import BlendHook
from scale.methods import Edge, make_blender

HOOK = "diffusion_blend"
log = logging.getLogger(__name__)


def attach(
    pipe: DiffusionPipeline,
    adapters: Mapping[str, str | Path],
    preference: Preference,
    method: str = "mpa",
    *,
    order: str = "low-discrepancy",
    variances: Mapping[str, float] | None = None,
    midpoints: Mapping[Edge, str] | None = None,
    exact: float = 0.2,
    correct: str | None = None,
    max_batch: int | None = None,
) -> "Knob":
    """Load `adapters` (name -> LoRA file or folder) and blend them at every step of the pipeline's ordinary calls.

    `method` is one of `scale.methods.METHODS`, with these options:
    - mpa-ls: `order` in which experts are drawn, "low-discrepancy" or "iid";
    - mpa-held: `exact`, the share of first steps that evaluate every expert; after them it costs what one model does;
    - msdda: `variances` of the experts' steps by name, and of "base", in units of the sampler's own (default: what the
      adapters' cards say, 1 where a card is silent; without any card it is mpa, and says so in the log);
    - interp: `midpoints`, from an edge such as ("a", "b") or ("base", "a") to the adapter trained at its middle;
    - mpa, kla, interp: `correct="resample"` resamples the images of one prompt by their weights (`scale.certificate`).

    Each weight, and `kl_scale`, may be one number, one for each image of the call, or a function of progress.
    `max_batch` bounds the rows of one forward; None takes all at once, and halves that where memory does not suffice.
    Schedulers, guidance, batches, callbacks, offloading and torch.compile keep working; so do other pipelines that
    share the denoiser. The returned knob changes the preference, tells the certificate and detaches.

    Raises:
        ValueError: what `make_blender`, `load_adapter` and `stated_variances` refuse; resampling for another method; a
            `max_batch` below 1; a pipeline that already has a blend, or adapters of its own (fuse or unload them
            first). The pipeline is then as it was.
    """
    if variances is None and method == "msdda":
        variances = stated_variances(adapters)
        if variances is None:
            log.warning(
                "no adapter's card states a step_variance, so msdda is DB-MPA here; pass variances to tell them"
            )
    make = functools.partial(
        make_blender, method, adapters=tuple(adapters), order=order, variances=variances, midpoints=midpoints,
        exact=exact, correct=correct,
    )  # fmt: skip
    make(preference)  # refuses what needs no model
    if max_batch is not None and (isinstance(max_batch, bool) or not isinstance(max_batch, int) or max_batch < 1):
        raise ValueError(f"max_batch must be at least 1, or None for all rows at once, received {max_batch!r}")
    denoiser = denoiser_of(pipe)
    _require_bare(denoiser)
    trainable = [parameter for parameter in denoiser.parameters() if parameter.requires_grad]
    try:
        for name, path in adapters.items():
            load_adapter(pipe, path, name)
        hook = BlendHook(pipe, (BASE, *adapters), preference, make, correct is not None, max_batch)
        return Knob(pipe, method, hook, trainable)
    except BaseException:
        _unload(denoiser, trainable)
        raise


class Knob:
    """The handle of an attached blend."""

    def __init__(
        self, pipe: DiffusionPipeline, method: str, hook: BlendHook, trainable: Sequence[torch.nn.Parameter]
    ) -> None:
        self.method, self._hook, self._trainable = method, hook, trainable
        # what the pipeline calls: a compiled denoiser is hooked outside of its graph
        self._called = getattr(pipe, denoiser_name(pipe))
        self._denoiser = denoiser_of(pipe)
        with _beneath_offload(self._called):
            HookRegistry.check_if_exists_or_initialize(self._called).register_hook(hook, HOOK)
        if self._called is self._denoiser:
            # a graph around the blend would break at it: the blend goes around the graph
            hook.compiled_call, self._denoiser._compiled_call_impl = self._denoiser._compiled_call_impl, None
        self._attached = True

    @property
    def preference(self) -> Preference:
        """The preference that the next step follows; set it at any time (ValueError as in `attach`)."""
        return self._hook.preference

    @preference.setter
    def preference(self, preference: Preference) -> None:
        if not self._attached:
            raise ValueError("this blend is detached, so a preference has no effect; attach again")
        self._hook.set_preference(preference)

    @property
    def certificate(self) -> Certificate | None:
        """What the latest call's evaluations say of its images, in the order of its latents.

        None before the first call, where the method evaluates one model a step (mpa-ls, mpa-held, rs, rs-factors) or
        is no affine blend (msdda with variances), and where the scheduler's noise levels are unknown.
        """
        return self._hook.certificate

    @property
    def experts(self) -> LoraExperts:
        """The base and its adapters for loops of your own, e.g. `dbtheory.sample`.

        `bind` them to the denoiser's other arguments first: `knob.experts.bind(encoder_hidden_states=...)`.
        """
        if not self._attached:
            raise ValueError("this blend is detached, and its adapters are gone; attach again")
        return self._hook.experts(self._hook.pipe.scheduler)

    def detach(self) -> None:
        """Remove the blend and its adapters: the pipeline is as it was before `attach`, bit for bit. Once is enough."""
        if not self._attached:
            return
        with _beneath_offload(self._called):
            registry = HookRegistry.check_if_exists_or_initialize(self._called)
            registry.remove_hook(HOOK, recurse=False)
            _forget(self._denoiser, registry)
        if self._hook.compiled_call is not None:
            self._denoiser._compiled_call_impl = self._hook.compiled_call
        elif self._denoiser._compiled_call_impl is None:
            vars(self._denoiser).pop("_compiled_call_impl", None)
        self._hook.close()
        _unload(self._denoiser, self._trainable)
        self._attached = False


def _require_bare(denoiser: Any) -> None:
    if held := ", ".join(getattr(denoiser, "peft_config", {})):
        if any(isinstance(layer_hook, BlendHook) for layer_hook in _hooks(denoiser)):
            raise ValueError("the denoiser already has a blend attached; detach it first, or set knob.preference")
        raise ValueError(f"the denoiser already has adapters ({held}); call pipe.unload_lora_weights() first")


def _hooks(denoiser: Any) -> Iterator[object]:
    yield from getattr(getattr(denoiser, "_diffusers_hook", None), "hooks", {}).values()


@contextlib.contextmanager
def _beneath_offload(module: Any) -> Iterator[None]:
    """Set accelerate's hook aside: it must stay outermost.

    Pipelines renew it after every call, and what was put on top of it is then lost.
    """
    outer = getattr(module, "_hf_hook", None)
    if outer is None:
        yield
        return
    remove_hook_from_module(module)
    try:
        yield
    finally:
        add_hook_to_module(module, outer)


def _forget(denoiser: Any, registry: HookRegistry) -> None:
    """What the registry leaves on the denoiser would hold the model in a cycle until a garbage collection."""
    own = vars(denoiser)
    if not registry.hooks:
        own.pop("_diffusers_hook", None)
        if getattr(own.get("forward"), "__func__", None) is type(denoiser).forward:
            del own["forward"]


def _unload(denoiser: Any, trainable: Sequence[torch.nn.Parameter]) -> None:
    """Take all adapters off, and give back the gradients that peft switches off in the base model."""
    if getattr(denoiser, "peft_config", None):
        denoiser.unload_lora()
    for parameter in trainable:
        parameter.requires_grad_(True)
