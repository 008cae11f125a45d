"""The command `dblend sweep`: a config into a folder of images, records and one table."""

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tyro.conf import Positional

if TYPE_CHECKING:
    from scale.experiment.config import Config


@dataclass(frozen=True)
class Sweep:
    """Run an experiment: every method, preference, prompt and seed of a config; a run that was stopped goes on."""

    config: Positional[str]
    """A YAML file, or an experiment of the paper by its name; a wrong name lists them all."""
    mini: bool = False
    """Its twin on the small world."""
    out: Path | None = None
    """Folder of the run; out/sweep/CONFIG if not given."""
    dry_run: bool = False
    """Only print what it would make, and about how long that takes."""
    limit: int | None = None
    """Stop after so many images of each method and preference, rounded up to whole batches."""
    json: bool = False
    """Print the figures as JSON."""

    def run(self) -> int:
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"limit must be at least 1, received {self.limit}")
        from scale.experiment.config import read_config

        config = read_config(self.config, small=self.mini)
        out = self.out or Path("out/sweep") / (Path(self.config).stem + ("-mini" if self.mini else ""))
        return self._estimate(config, out) if self.dry_run else self._sweep(config, out)

    def _estimate(self, config: "Config", out: Path) -> int:
        from scale.experiment.estimate import as_text, estimate

        figures = estimate(config, out, limit=self.limit)
        print(json.dumps(figures, indent=1) if self.json else as_text(figures))
        return 0

    def _sweep(self, config: "Config", out: Path) -> int:
        from scale.experiment.run import Stopped, processes, sweep

        state = processes()
        try:
            outcome = sweep(config, out, limit=self.limit)
        except Stopped as stopped:
            print(f"dblend: {stopped}", file=sys.stderr)
            return 130
        if state.is_main_process:
            print(self._shown(asdict(outcome), out))
        if state.num_processes > 1:
            state.destroy_process_group()
        return 0

    def _shown(self, figures: dict[str, Any], out: Path) -> str:
        figures = {**figures, "results": str(figures["results"]), "out": str(out)}
        if self.json:
            return json.dumps(figures, indent=1)
        missing = figures["total"] - figures["before"] - figures["made"]
        return (
            f"{figures['made']} images made, {figures['before']} were there; "
            f"{missing} of {figures['total']} are missing\n"
            f"the table of all is {figures['results']}; dblend report {out} shows it"
        )
