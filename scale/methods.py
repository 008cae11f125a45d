"""The blending methods by the names that users type."""

from collections.abc import Callable, Collection

from dbtheory.blend import Blender, MeanBlend, SampledBlend
from dbtheory.preference import Preference


def _base(preference: Preference) -> Blender:
    return MeanBlend(Preference(preference.weights, kl_scale=0.0, allow_negative=True))


def _kla(preference: Preference) -> Blender:
    if len(preference.names) != 1:
        raise ValueError(
            f"kla blends the base with one adapter, received {', '.join(preference.names)}; "
            "use mpa, which takes several adapters and a kl_scale"
        )
    return MeanBlend(preference)


def _mpa_ls(preference: Preference) -> Blender:
    if isinstance(preference.kl_scale, float) and preference.kl_scale > 1:
        raise ValueError(
            f"mpa-ls draws one expert a step, so kl_scale is a probability, received {preference.kl_scale}; "
            "use mpa, which goes above 1"
        )
    return SampledBlend(preference)


METHODS: dict[str, Callable[[Preference], Blender]] = {
    "base": _base,
    "mpa": MeanBlend,
    "kla": _kla,
    "mpa-ls": _mpa_ls,
}


def make_blender(method: str, preference: Preference, adapters: Collection[str]) -> Blender:
    """The blender of a method: `base` (no adapter acts), `mpa`, `kla` (one adapter), `mpa-ls`.

    Raises:
        ValueError: an unknown method; weights that are not those of `adapters`; `kla` with several adapters; `mpa-ls`
            with `kl_scale > 1`.
    """
    if method not in METHODS:
        raise ValueError(f"unknown method {method!r}; the methods are {', '.join(METHODS)}")
    preference.validate(adapters)
    return METHODS[method](preference)
