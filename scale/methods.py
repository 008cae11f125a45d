"""The blending methods by the names that users type."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

from dbtheory.blend import AffineBlender, Blender, MeanBlend, SampledBlend
from dbtheory.interpolate import InterpolatedBlend
from dbtheory.precision import PrecisionBlend
from dbtheory.preference import BASE, Preference
from scale.held import HeldBlend
from scale.soup import SoupBlend

Edge = tuple[str, str]


@dataclass(frozen=True)
class Options:
    """What some methods need besides a preference; the others refuse it."""

    order: str = "low-discrepancy"
    variances: Mapping[str, float] | None = None
    midpoints: Mapping[Edge, str] | None = None
    exact: float = 0.2


def _base(preference: Preference, _: Options) -> Blender:
    return MeanBlend(Preference({name: 1 / len(preference.names) for name in preference.names}, kl_scale=0.0))


def _mpa(preference: Preference, _: Options) -> Blender:
    return MeanBlend(preference)


def _kla(preference: Preference, _: Options) -> Blender:
    if len(preference.names) != 1:
        raise ValueError(
            f"kla blends the base with one adapter, received {', '.join(preference.names)}; "
            "use mpa, which takes several adapters and a kl_scale"
        )
    return MeanBlend(preference)


def _mpa_ls(preference: Preference, options: Options) -> Blender:
    _require_probability(preference, "mpa-ls")
    return SampledBlend(preference, options.order)


def _mpa_held(preference: Preference, options: Options) -> Blender:
    _require_probability(preference, "mpa-held")
    return HeldBlend(preference, options.exact)


def _require_probability(preference: Preference, method: str) -> None:
    if isinstance(preference.kl_scale, float) and preference.kl_scale > 1:
        raise ValueError(
            f"{method} draws one expert a step, so kl_scale is a probability, received {preference.kl_scale}; "
            "use mpa, which goes above 1"
        )


def _msdda(preference: Preference, options: Options) -> Blender:
    # steps of one variance fuse to their mean: MSDDA is then DB-MPA, noise and all
    if options.variances is None:
        return MeanBlend(preference)
    return PrecisionBlend(preference, dict(options.variances))


def _interp(preference: Preference, options: Options) -> Blender:
    if not options.midpoints:
        raise ValueError(
            'interp needs adapters at the middle of edges: midpoints={("a", "b"): "ab"} for one that was trained on '
            'the mean reward of a and b, ("base", "a") for one trained on half of a'
        )
    return InterpolatedBlend(preference, dict(options.midpoints))


def _rs(preference: Preference, _: Options) -> Blender:
    return SoupBlend(preference, "deltas")


def _rs_factors(preference: Preference, _: Options) -> Blender:
    return SoupBlend(preference, "factors")


METHODS: dict[str, Callable[[Preference, Options], Blender]] = {
    "base": _base,
    "mpa": _mpa,
    "kla": _kla,
    "mpa-ls": _mpa_ls,
    "mpa-held": _mpa_held,
    "msdda": _msdda,
    "interp": _interp,
    "rs": _rs,
    "rs-factors": _rs_factors,
}
# which method an option belongs to
OWNERS = {"order": "mpa-ls", "variances": "msdda", "midpoints": "interp", "exact": "mpa-held"}


def make_blender(
    method: str,
    preference: Preference,
    adapters: Collection[str],
    *,
    order: str = "low-discrepancy",
    variances: Mapping[str, float] | None = None,
    midpoints: Mapping[Edge, str] | None = None,
    exact: float = 0.2,
    correct: str | None = None,
) -> Blender:
    """The blender of a method: one of `METHODS`.

    `order` is mpa-ls's; `variances` are msdda's, by expert and for "base", in units of the sampler's own step variance
    (None: all are equal, so that msdda is mpa); `midpoints` are interp's, which maps an edge to the adapter trained
    at its middle (`InterpolatedBlend`); `exact` is mpa-held's. The preference names every other adapter.
    `correct` says that images shall be resampled: None or "resample".

    Raises:
        ValueError: an unknown method; an option of another method; weights that are not those of `adapters`; what the
            method's blender refuses; `kla` with several adapters; `mpa-ls` and `mpa-held` with `kl_scale > 1`;
            resampling by a method, or for a preference, that has no target.
    """
    if method not in METHODS:
        raise ValueError(f"unknown method {method!r}; the methods are {', '.join(METHODS)}")
    options = Options(order, variances, midpoints, exact)
    for name, owner in OWNERS.items():
        if method != owner and getattr(options, name) != getattr(Options(), name):
            raise ValueError(f"{name} belongs to the method {owner}, received method {method!r}")
    middle = set((midpoints or {}).values())
    if missing := sorted(middle.difference(adapters)):
        raise ValueError(f"no adapter for the midpoint {', '.join(missing)}; the adapters are {', '.join(adapters)}")
    preference.validate([name for name in adapters if name not in middle])
    if BASE in adapters:
        raise ValueError(f'no adapter can be named "{BASE}"')
    blender = METHODS[method](preference, options)
    _check_correction(correct, blender, preference, method)
    return blender


def _check_correction(correct: str | None, blender: Blender, preference: Preference, method: str) -> None:
    """ValueError for a correction that is unknown, or that the blend cannot have."""
    if correct not in (None, "resample"):
        raise ValueError(f'correct must be None or "resample", received {correct!r}')
    if correct is not None and not isinstance(blender, AffineBlender):
        raise ValueError(f"resampling needs every expert at every step, received method {method}; use mpa")
    if correct is not None and not preference.is_constant:
        raise ValueError("a preference that changes with progress has no target to resample towards; use a constant")
