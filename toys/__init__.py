"""Named toy problems on which every quantity of the exact core has a closed form."""

from toys.registry import get, names
from toys.toy import Toy

__all__ = ["Toy", "get", "names"]
