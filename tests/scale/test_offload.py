"""A blend beside accelerate's offloading: the real code path, whose device is the CPU where there is no other."""

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.hooks import CpuOffload

from dbtheory.blend import MeanBlend, SampledBlend
from scale import attach
from scale.adapters import denoiser_of
from scale.soup import SoupBlend
from tests.scale.families import FAMILIES, Family, weights
from tests.scale.families import latents as five_steps

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BLENDERS = {"mpa": MeanBlend, "mpa-ls": SampledBlend, "rs": SoupBlend}
ORDERS = ("offload, attach", "attach, offload", "attach, call, offload")
CASES = [
    *((FAMILIES["sd"], "mpa-ls", order) for order in ORDERS),
    *((FAMILIES["sd3"], "mpa", order) for order in ORDERS),
    *((FAMILIES["flux"], "rs", order) for order in ORDERS[:2]),
]


latents = functools.partial(five_steps, num_inference_steps=2)


class Events:
    """When accelerate moved the denoiser to its device, and when a blender was asked."""

    def __init__(self, pipe: Any, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
        self.seen: list[str] = []
        denoiser, moves, asks = denoiser_of(pipe), CpuOffload.pre_forward, BLENDERS[method].__call__

        def pre_forward(hook: CpuOffload, module: Any, *args: Any, **kwargs: Any) -> Any:
            self.seen += ["moved"] * (module is denoiser)
            return moves(hook, module, *args, **kwargs)

        def blend(blender: Any, *args: Any) -> Any:
            self.seen.append("blended")
            return asks(blender, *args)

        monkeypatch.setattr(CpuOffload, "pre_forward", pre_forward)
        monkeypatch.setattr(BLENDERS[method], "__call__", blend)

    def take(self) -> list[str]:
        """What has been seen since the last time."""
        seen, self.seen = self.seen, []
        return seen


def offload(pipe: Any) -> None:
    pipe.enable_model_cpu_offload(device=DEVICE)


@pytest.mark.parametrize(("family", "method", "order"), CASES)
def test_offloading_in_either_order(
    family: Family, method: str, order: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Call after call the model is moved before each blend, which is the same as without offloading.

    accelerate renews its hook after every call, and what was put on top of it is then lost. After detach the pipeline
    is diffusers' own, and still offloaded.
    """
    files = family.adapters(tmp_path / "adapters")
    plain, pipe = family.make().to(DEVICE), family.make()
    base = latents(plain, family)
    attach(plain, files, weights(0.3), method)
    expected = latents(plain, family)
    knob: Any = None
    for stage in order.split(", "):
        if stage == "offload":
            offload(pipe)
        elif stage == "attach":
            knob = attach(pipe, files, weights(0.3), method)
        else:
            latents(pipe, family)
    events = Events(pipe, method, monkeypatch)
    for _ in range(2):
        assert torch.equal(latents(pipe, family), expected)
        assert events.take() == ["moved", "blended"] * 2
    knob.preference = weights(0.9)
    assert not torch.equal(latents(pipe, family), expected)
    knob.detach()
    events.take()
    for _ in range(2):
        assert torch.equal(latents(pipe, family), base)
        assert events.take() == ["moved"] * 2
    attach(pipe, files, weights(0.3), method)
    for _ in range(2):
        assert torch.equal(latents(pipe, family), expected)


def test_offloading_is_turned_off_again(tmp_path: Path) -> None:
    """`remove_all_hooks` takes accelerate's hook off and leaves the blend, in either order of set-up."""
    family = FAMILIES["sd"]
    files = family.adapters(tmp_path / "adapters")
    base, plain = latents(family.make(), family), family.make()
    attach(plain, files, weights(0.3))
    expected = latents(plain, family)
    for offloaded_first in (True, False):
        pipe = family.make()
        if offloaded_first:
            offload(pipe)
        knob = attach(pipe, files, weights(0.3))
        if not offloaded_first:
            offload(pipe)
        latents(pipe, family)
        pipe.remove_all_hooks()
        assert not hasattr(pipe.unet, "_hf_hook")
        pipe.to("cpu")
        assert torch.equal(latents(pipe, family), expected)
        knob.detach()
        assert torch.equal(latents(pipe, family), base)
        assert pipe.unet.forward.__func__ is type(pipe.unet).forward  # nothing stands before the class's own


def test_a_fault_under_offloading(tmp_path: Path) -> None:
    """A call that breaks off does not renew accelerate's hooks; the next call and detaching work all the same."""
    family = FAMILIES["sd"]
    files, pipe = family.adapters(tmp_path / "adapters"), family.make()
    base = latents(pipe, family)
    offload(pipe)
    knob = attach(pipe, files, weights(0.3))
    expected = latents(pipe, family)

    def fail(*_: Any) -> dict:
        raise RuntimeError("a fault on the way")

    for _ in range(2):
        with pytest.raises(RuntimeError, match="a fault"):
            latents(pipe, family, callback_on_step_end=fail)
        assert torch.equal(latents(pipe, family), expected)
    with pytest.raises(RuntimeError, match="a fault"):
        latents(pipe, family, callback_on_step_end=fail)
    knob.detach()
    assert torch.equal(latents(pipe, family), base)
