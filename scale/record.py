"""What made the images: everything of the record but the images themselves."""

import inspect
import re
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from dbtheory.preference import BASE, PROBES, Preference
from dbtheory.resampling import effective_size
from scale import mini
from scale.adapters import adapter_file, denoiser_of, step_variance
from scale.folder import sha256
from scale.request import Request

PACKAGES = ("diffusion-blend", "torch", "diffusers", "peft", "transformers")
# the files that diffusers and transformers load where no variant is asked for
WEIGHTS = re.compile(r"(diffusion_pytorch_model|model|pytorch_model)(-\d{5}-of-\d{5})?\.(safetensors|bin)")


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
            "adapters": {name: sha256(adapter_file(path)) for name, path in adapters.items()},
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


def denoiser_hashes(pipe: Any) -> dict[str, str]:
    """`weight_hashes` of the denoiser."""
    return weight_hashes(denoiser_of(pipe))


def model_hashes(pipe: Any) -> dict[str, dict[str, str]]:
    """`weight_hashes` of every network of a pipeline by its name: denoiser, autoencoder, text encoders."""
    return {name: weight_hashes(part) for name, part in pipe.components.items() if isinstance(part, torch.nn.Module)}


def weight_hashes(network: Any) -> dict[str, str]:
    """SHA-256 of a network's `config.json` and weight files by name, where it came from a folder or the hub.

    They are what `sha256sum` prints and the hub shows. It takes a second for every GB or two.
    """
    came_from = getattr(network.config, "_name_or_path", None)
    if not came_from:
        return {}
    folder = Path(came_from)
    found = [path for path in sorted(folder.glob("*")) if WEIGHTS.fullmatch(path.name)]
    safe = [path for path in found if path.suffix == ".safetensors"]
    files = [folder / "config.json", *(safe or found)]
    return {path.name: sha256(path) for path in files if path.is_file()}


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
    stated = request.variances or {name: step_variance(path) for name, path in request.chosen_adapters().items()}
    return {name: variance for name, variance in stated.items() if variance is not None} or None


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
