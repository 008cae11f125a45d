"""The blenders of `dbtheory` on diffusers pipelines. `import scale` is light: diffusers loads with `attach`."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from scale.attachment import Knob, attach

__all__ = ["Knob", "attach"]


def __getattr__(name: str) -> object:
    if name in __all__:
        from importlib import import_module

        return getattr(import_module("scale.attachment"), name)
    raise AttributeError(f"module 'scale' has no attribute {name!r}")
