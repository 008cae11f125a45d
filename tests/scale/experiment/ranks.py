"""Runs an experiment in two processes again and again, and kills them; forked from here, where all is imported.

    python -m tests.scale.experiment.ranks CONFIG RUN PROCESSES KILLS SEED

Starts PROCESSES processes KILLS times and kills them with SIGKILL at random moments, then lets them finish. Prints how
they ended, as JSON.
"""

import json
import os
import random
import signal
import socket
import sys
import time
import traceback
from pathlib import Path

os.environ |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "TRANSFORMERS_VERBOSITY": "error"}

import pandas  # noqa: F401
import torch
from diffusers import StableDiffusionPipeline  # noqa: F401
from transformers import CLIPTextModel  # noqa: F401

from scale.experiment.config import read_config
from scale.experiment.run import sweep

LONGEST = 120.0  # seconds that a run may take before it is taken for hanging


def start(config: str, run: Path, processes: int) -> list[int]:
    """Fork the processes of one run; their ids."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    children = []
    for rank in range(processes):
        if child := os.fork():
            children.append(child)
            continue
        place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        size = {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
        os.environ |= place | size if processes > 1 else {}
        os._exit(work(config, run))
    return children


def work(config: str, run: Path) -> int:
    """What each process does; its exit code."""
    torch.set_num_threads(1)
    try:
        sweep(read_config(config), run)
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def entries(run: Path) -> int:
    """Files that there are, whole or begun."""
    return sum(len(os.listdir(run / name)) for name in ("images", "records") if (run / name).exists())


def kill_later(children: list[int], run: Path, chance: random.Random) -> bool:
    """Kill the processes after a few more files and a few milliseconds; whether they were still alive."""
    more, before, start = chance.choice((0, 1, 2, 3, 5, 8)), entries(run), time.monotonic()
    while entries(run) < before + more and is_alive(children[0]) and time.monotonic() < start + LONGEST:
        time.sleep(0.002)
    # without a file to wait for it falls into locking or loading
    time.sleep(chance.uniform(0.0, 0.03 if more else 1.0))
    for child in chance.sample(children, len(children)):
        os.kill(child, signal.SIGKILL)
    return all([os.WIFSIGNALED(os.waitpid(child, 0)[1]) for child in children])  # noqa: C419 (all must be waited for)


def is_alive(child: int) -> bool:
    """Whether a child has not ended; it can still be waited for."""
    return os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None


def main(config: str, run: Path, processes: int, kills: int, seed: int) -> None:
    chance, killed, grown = random.Random(seed), 0, []
    for _ in range(kills):
        killed += kill_later(start(config, run, processes), run, chance)
        grown.append(entries(run))
    ended = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in start(config, run, processes)]
    print(json.dumps({"killed": killed, "entries": grown, "ended": ended}))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), *map(int, sys.argv[3:]))
