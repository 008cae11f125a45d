"""The toy problems by name."""

from collections.abc import Callable

from toys import dense, mixtures
from toys.toy import Toy

_BUILDERS: dict[str, Callable[[str], Toy]] = {
    "two-modes": mixtures.two_modes,
    "ring-of-six": mixtures.ring_of_six,
    "grid-of-nine": mixtures.grid_of_nine,
    "anisotropic": mixtures.anisotropic,
    "mixture-8d": mixtures.mixture_8d,
    "two-moons": dense.two_moons,
    "pinwheel": dense.pinwheel,
    "swiss-roll": dense.swiss_roll,
    "checkerboard": dense.checkerboard,
}


def names() -> tuple[str, ...]:
    """The names that `get` knows."""
    return tuple(_BUILDERS)


def get(name: str) -> Toy:
    """The toy problem of that name, in float64 on the CPU. Raises ValueError for an unknown name."""
    if name not in _BUILDERS:
        raise ValueError(f"no toy named {name!r}; choose one of {', '.join(names())}")
    return _BUILDERS[name](name)
