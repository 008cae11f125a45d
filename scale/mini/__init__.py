"""The small world: a Stable Diffusion model of coloured shapes that trains on a CPU and ships with the package."""

from pathlib import Path
from typing import Any

WEIGHTS = Path(__file__).parent / "weights"
MODEL = WEIGHTS / "model"
ADAPTERS = WEIGHTS / "adapters"
JUDGE = WEIGHTS / "judge"
GUIDANCE = 3.0  # of every picture that the package draws; the adapters were trained without, where images vary more

# The shipped experts, and where their DPOK settings differ from the defaults. Colorfulness is learnt fast; beyond 30
# rounds it goes on rising at the cost of the captions' colours.
EXPERTS: dict[str, dict[str, Any]] = {"colorfulness": {"rounds": 30}, "jpeg": {}}
