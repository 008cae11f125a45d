"""Which adapters act on which rows of the next forward of one denoiser."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from dbtheory.preference import BASE
from scale.adapters import lora_layers
from scale.lowrank import Factors, add_deltas, chosen, factor_soup, is_stacked, soup, stack

REMEMBERED = 256  # selections of rows that are kept on the device


class AdapterSwitch:
    """Sets, before each forward, what the LoRA layers of a denoiser do.

    One adapter for all rows takes peft's ordinary path, so it is diffusers' own result bit for bit. Rows of several
    adapters, and soups, leave peft's path to the base model and add their deltas by the stacked products of
    `scale.lowrank`, which need no loop over adapters, no name lookup a layer and no device synchronisation.

    `compiled` sends everything through the stacks, row by row: which adapters act is then a tensor, on which no graph
    depends.
    `strength` multiplies what the stacks add, as `cross_attention_kwargs={"scale": ...}` does on peft's path.
    """

    def __init__(self, denoiser: nn.Module, names: Sequence[str]) -> None:
        self.layers, self.names = lora_layers(denoiser), tuple(names)
        self.compiled, self.strength = False, 1.0
        self.mode: str | None = None
        self._state: tuple[list[str], bool] | None = None
        # tensors that a compiled graph reads as inputs
        self.adapters: Tensor | None = None
        self.amounts: Tensor | float = 1.0
        self.coefficients, self.totals = torch.empty(0), torch.empty(0)
        self._selections: dict[Any, tuple[Tensor | None, Tensor | float]] = {}
        self._handles = [layer.register_forward_hook(self._add) for layer in self.layers]

    def begin(self) -> None:
        """Before a trajectory: the layers may have moved, and users may have called peft's own switches."""
        self._state = None

    def remove(self) -> None:
        """Take the hooks off the layers, give them back to peft, and forget them."""
        self.begin()
        self._peft([self.names[0]] if self.names else [], disabled=False)
        for handle in self._handles:
            handle.remove()
        self.layers, self._handles = [], []
        self._selections.clear()

    def select(self, rows: Sequence[str], length: int = 1) -> None:
        """One adapter name (or "base") for each run of `length` of the next forward's rows."""
        if self.compiled:
            rows = [name for name in rows for _ in range(length)]  # one graph, whatever the runs
        elif len(set(rows)) == 1:
            self._peft([name for name in rows[:1] if name != BASE], disabled=False)
            return
        self._stacked("chosen")
        # most steps repeat a selection, and a copy to the device would wait for it
        key = (tuple(rows), self.strength, self.compiled, self.device)
        if key not in self._selections:
            if len(self._selections) >= REMEMBERED:
                self._selections.clear()
            self._selections[key] = self._selection(rows)
        self.adapters, self.amounts = self._selections[key]

    def _selection(self, rows: Sequence[str]) -> tuple[Tensor | None, Tensor | float]:
        """The index into the stacks and the amount of each run."""
        slots = [self.names.index(name) if name != BASE else 0 for name in rows]
        # the stacks in their own order need no copy; a compiled graph must not depend on which rows these are
        whole = slots == list(range(len(self.names))) and BASE not in rows and not self.compiled
        if whole:
            return None, self.strength
        amounts = torch.tensor([self.strength * (name != BASE) for name in rows], device=self.device)
        return torch.tensor(slots, device=self.device), amounts

    def select_soup(self, coefficients: Float[Tensor, "g m"], average: str) -> None:
        """One soup for each run of the next forward's rows, with coefficients in the order of `names`.

        `average` is "deltas", `W + sum_i c_i s_i B_i A_i`, or "factors", where `c = strength * weights` and the
        factors are averaged by the weights.
        """
        coefficients = self.strength * coefficients.to(self.device, torch.float32)
        self._stacked(average)
        total = coefficients.sum(1)
        if average == "factors":
            coefficients = coefficients / torch.where(total == 0, 1, total).unsqueeze(1)
        self.coefficients, self.totals = coefficients, total

    @property
    def device(self) -> torch.device:
        """Where the layers are now: pipelines move."""
        layer = self.layers[0]
        return next(iter(layer.lora_A.values())).weight.device

    def _stacked(self, mode: str) -> None:
        for layer in self.layers if not is_stacked(self.layers[0], self.names) else ():
            stack(layer, self.names)
        self._peft([], disabled=True)
        self.mode = mode

    def _peft(self, active: list[str], disabled: bool) -> None:
        """What peft's own path does: these adapters for all rows, or none.

        peft's set_adapter walks every module and toggles gradients: 5 to 25 ms on SD and SDXL.
        """
        self.mode = None
        if (active, disabled) == self._state:
            return
        self._state = (active, disabled)
        for layer in self.layers:
            state = layer.__dict__  # past nn.Module's setter, which looks for parameters first
            state["_active_adapter"], state["_disable_adapters"] = active, disabled

    def _add(self, layer: Any, args: tuple[Any, ...], result: Tensor) -> Tensor | None:
        if self.mode is None:
            return None
        return add_deltas(layer.base_layer, args[0], result, self._factors(layer))

    def _factors(self, layer: Any) -> Factors:
        if self.mode == "chosen":
            return chosen(layer, self.adapters, self.amounts)
        if self.mode == "deltas":
            return soup(layer, self.coefficients)
        return factor_soup(layer, self.coefficients, self.totals)
