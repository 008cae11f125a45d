"""How much resident memory one call of `GaussianMixture.score` needs, measured in a process of its own (on Linux)."""

import json
import subprocess
import sys
from pathlib import Path

from benches.problem import gaussian_mixture, points

ROOT = Path(__file__).resolve().parents[1]
STATUS = Path("/proc/self/status")


def score_memory(count: int, components: int, dim: int) -> dict[str, float]:
    """Of a score at `count` points: MiB that the peak grew by, and the whole process's peak, torch included."""
    command = [sys.executable, "-m", "benches.memory", str(count), str(components), str(dim)]
    done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    return json.loads(done.stdout)


def peak() -> float:
    """The most MiB that this process has ever had resident; from Linux, as getrusage starts at the parent's."""
    lines = STATUS.read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) / 1024


def main(count: int, components: int, dim: int) -> None:
    """Warms up on one point (libraries load late), so that the peak before is what was there before."""
    mixture, x = gaussian_mixture(components, dim), points(count, dim)
    mixture.score(x[:1])
    before = peak()
    mixture.score(x)
    print(json.dumps({"grown_mib": peak() - before, "peak_mib": peak()}))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
