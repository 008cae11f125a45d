"""Experts around other experts, for tests that count or record what is asked."""

from typing import Any

from typing_extensions import get_protocol_members

from dbtheory.experts import Experts


class Wrapped:
    """Hands everything on that a subclass does not define: a test double follows `Experts` by what it has itself."""

    def __init__(self, inner: Experts) -> None:
        self.inner = inner
        for name in get_protocol_members(Experts) - set(dir(self)):
            setattr(self, name, getattr(inner, name))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)
