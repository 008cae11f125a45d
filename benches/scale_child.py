"""One contestant of `benches.scale` in a process of its own: what it holds in memory, at most and at rest, and does.

python -m benches.scale_child '{"task": {...}, "method": "mpa", "adapters": 2, "folder": "adapters", "threads": 2}'
"""

import gc
import json
import subprocess
import sys
import tempfile
import warnings
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from diffusers.utils import logging

from benches.memory import ROOT, STATUS, peak
from benches.scale_contestants import PLAIN, REFERENCE, Contestant, Probe, Task
from benches.scale_models import random_unet, save_adapters

MIB = 2**20


def observe(task: Task, method: str, adapters: int, threads: int) -> dict[str, float]:
    """In a new process: forwards and rows an image, the blend's overhead, MiB of parameters, held and at the peak.

    Never compiled: a graph has no place for what watches the forwards. Raises RuntimeError where the process fails.
    """
    what = {"task": asdict(replace(task, compiled=None)), "method": method, "adapters": adapters, "threads": threads}
    command = [sys.executable, "-m", "benches.scale_child", json.dumps(what)]
    done = subprocess.run(command, cwd=ROOT, check=False, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{method} with {adapters} adapters failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def measure(task: Task, method: str, adapters: int) -> dict[str, float]:
    """The same in this process; a first image, which is not counted, is made for what happens once."""
    probe = Probe(task.device)
    copies = adapters if method == REFERENCE else 1
    with tempfile.TemporaryDirectory() as folder:
        paths = save_adapters(task.model, Path(folder), adapters, task.rank)
        unets = [random_unet(task.model, task.torch_dtype, task.device) for _ in range(copies)]
        contestant = Contestant(task, method, unets, paths, probe)
    del unets
    contestant()
    probe.reset()
    contestant()
    facts = {
        "forwards": probe.forwards,
        "rows": probe.rows,
        "parameters_mib": sum(_storages([p for unet in contestant.unets for p in unet.parameters()]).values()) / MIB,
        "held_mib": held(task.device),
        "peak_mib": highest(task.device),
    }
    if method not in (PLAIN, REFERENCE):
        facts["overhead"] = probe.overhead
    if task.device != "cpu":
        facts["synchronisations"] = synchronisations(contestant) / task.steps
    return facts


def held(device: str) -> float:
    """MiB of all tensors that are alive: weights, adapters, and whatever a method keeps between images."""
    gc.collect()
    if device != "cpu":
        return torch.cuda.memory_allocated() / MIB
    return sum(_storages([thing for thing in gc.get_objects() if type(thing) in TENSORS]).values()) / MIB


TENSORS = (torch.Tensor, torch.nn.Parameter)


def highest(device: str) -> float:
    """MiB at the peak: of the GPU's memory, or of this process; NaN where neither can be known."""
    if device != "cpu":
        return torch.cuda.max_memory_allocated() / MIB
    return peak() if STATUS.exists() else float("nan")


def _storages(tensors: list[Any]) -> dict[int, int]:
    """Bytes of each piece of memory; views and shared weights count once."""
    real = [tensor.untyped_storage() for tensor in tensors if tensor.device.type != "meta"]
    return {storage.data_ptr(): storage.nbytes() for storage in real}


def synchronisations(contestant: Contestant) -> int:
    """How often an image makes the CPU wait for the GPU."""
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            contestant()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(warning.message) for warning in caught)


def main(what: dict[str, Any]) -> None:
    logging.set_verbosity_error()
    torch.set_num_threads(what["threads"])
    print(json.dumps(measure(Task(**what["task"]), what["method"], what["adapters"])))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
