"""The small world: a Stable Diffusion model of coloured shapes that trains on a CPU and ships with the package."""

from pathlib import Path

WEIGHTS = Path(__file__).parent / "weights"
MODEL = WEIGHTS / "model"
ADAPTERS = WEIGHTS / "adapters"
JUDGE = WEIGHTS / "judge"
GUIDANCE = 3.0  # of every picture that the package draws; the adapters were trained without, where images vary more

EXPERTS = ("colorfulness", "jpeg")  # the pair that the demo and the benches blend: rewards in conflict
