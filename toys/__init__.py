"""Named toy problems on which every quantity of the exact core has a closed form."""

from toys.registry import Toy, get, names

__all__ = ["Toy", "get", "names"]
