"""What made the images: everything of the record but the images themselves."""

import inspect
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from dbtheory.preference import BASE, PROBES, Preference
from dbtheory.resampling import effective_size
from scale import mini
from scale.adapters import stated_variances
from scale.hashes import adapter_hashes, denoiser_hashes
from scale.request import Request

PACKAGES = ("diffusion-blend", "torch", "diffusers", "peft", "transformers")


def settings(request: Request, adapters: Mapping[str, Path], pipe: Any, guidance: float | None) -> dict[str, Any]:
    """Model, preference, method and its options, sampler, machine and versions, and hashes of the files; no images."""
    preference = request.preference
    return {
        "model": request.model or "the shipped small world",
        "method": request.method,
        "weights": {name: _shown(value) for name, value in preference.weights.items()} if preference else {},
        "kl_scale": _shown(preference.kl_scale) if preference else 0.0,
        "coefficients": _coefficients(preference),
        "options": _options(request),
        "adapters": {name: _named(path) for name, path in adapters.items()},
        "hashes": {
            "denoiser": denoiser_hashes(pipe),
            "adapters": {name: adapter_hashes(path) for name, path in adapters.items()},
        },
        "scheduler": type(pipe.scheduler).__name__,
        "steps": request.steps,
        "guidance": guidance,
        # the schedulers that do not know it take their own noise
        "eta": request.eta if "eta" in inspect.signature(pipe.scheduler.step).parameters else None,
        "height": request.height,
        "width": request.width,
        "batch_size": request.batch_size,
        "max_batch": request.max_batch,
        "device": str(pipe._execution_device),
        "offload": request.offload,
        "dtype": str(pipe.dtype).removeprefix("torch."),
        "versions": {name: _version(name) for name in PACKAGES},
        "images": [],
    }


def update_ess(images: Sequence[dict[str, Any]]) -> None:
    """Set every certificate's ESS to that among all images of its prompt: a batch may hold a part of them."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for image in images:
        if image["certificate"] is not None:
            groups.setdefault(image["prompt"], []).append(image["certificate"])
    for certificates in groups.values():
        weights = torch.tensor([certificate["log_weight"] for certificate in certificates], dtype=torch.float64)
        for certificate in certificates:
            certificate["ess"] = effective_size(weights)


def _options(request: Request) -> dict[str, Any]:
    """The method's own; base has none, whatever it was given."""
    blends = request.method != BASE
    return {
        "order": request.order if request.method == "mpa-ls" else None,
        "exact": request.exact if request.method == "mpa-held" else None,
        "variances": _variances(request),
        "midpoints": {"+".join(edge): str(path) for edge, path in (request.midpoints or {}).items() if blends},
        "correct": request.correct if blends else None,
        "allow_negative": request.allow_negative and blends,
    }


def _variances(request: Request) -> dict[str, float] | None:
    """Of `msdda`, as given or as the adapters' cards state; None where nothing does."""
    if request.method != "msdda":
        return None
    return dict(request.variances) if request.variances else stated_variances(request.chosen_adapters())


def _coefficients(preference: Preference | None) -> dict[str, Any]:
    """Of the base and every adapter; at progress 0 (noise), 1/2 and 1 (data) where they change with it."""
    if preference is None:
        return {"base": 1.0}
    if preference.is_constant:
        return preference.coefficients()
    return {f"{progress:g}": preference.coefficients(progress) for progress in PROBES}


def _shown(amount: Any) -> float | str:
    return str(amount) if callable(amount) else amount


def _named(path: Path) -> str:
    return path.name if path.parent == mini.ADAPTERS else str(path)


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"  # this one, when it runs from a checkout
