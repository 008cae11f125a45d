"""Small experiments on a tiny pipeline, and what two runs of one must have in common."""

import json
from pathlib import Path
from typing import Any

import yaml
from safetensors.torch import load_file, save_file

from scale.experiment.store import load
from tests.scale import tiny

PROMPTS = ["a red circle", "a blue square", "a green star"]
VARYING = ("seconds", "peak_memory")  # by the machine


def save_model(folder: Path) -> Path:
    """A tiny model, and an adapter for each of two rewards."""
    tiny.sd().save_pretrained(folder / "model")
    for seed, name in enumerate(("colorfulness", "jpeg", "both")):
        tiny.save_lora(tiny.sd, folder / name, seed)
    return folder


def as_peft(folder: Path, alpha: float) -> Path:
    """The adapter of a folder as PEFT writes it: its alpha stands beside the weights."""
    (old,) = folder.glob("*.safetensors")
    tensors = {key.replace("unet.", "base_model.model.", 1): value for key, value in load_file(old).items()}
    save_file(tensors, folder / "adapter_model.safetensors")
    old.unlink()
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "lora_alpha": alpha}))
    return folder


def table(files: Path, **changes: Any) -> dict[str, Any]:
    """A config: 5 cells of 6 images in 15 batches."""
    given: dict[str, Any] = {
        "model": str(files / "model"),
        "rewards": {"colorfulness": "colorfulness", "jpeg": "jpeg"},
        "adapters": {name: str(files / name) for name in ("colorfulness", "jpeg")},
        "prompts": PROMPTS,
        "seeds": 2,
        "steps": 2,
        "guidance": 1.0,
        "batch_size": 2,
        "preferences": {"w": [0.25, 0.75]},
        "methods": ["base", "mpa", "mpa-ls"],
    }
    return given | changes


def write_config(files: Path, name: str = "config", **changes: Any) -> Path:
    """The config as a file."""
    path = files / f"{name}.yaml"
    path.write_text(yaml.safe_dump(table(files, **changes), sort_keys=False))
    return path


def contents(run: Path) -> dict[str, Any]:
    """All that two runs of one experiment must agree on: every image byte for byte, records, run.json, table."""
    _, frame = load(run)
    found: dict[str, Any] = {"table": frame.drop(columns=list(VARYING)).to_json(orient="records")}
    for path in sorted(path for path in run.rglob("*") if path.is_file()):
        name = path.relative_to(run).as_posix()
        if path.suffix == ".json":
            found[name] = json.loads(path.read_text())
            for varying in VARYING if path.parent.name == "records" else ():
                del found[name]["cost"][varying]
        elif path.suffix != ".parquet":
            found[name] = path.read_bytes()
        else:
            found[name] = None
    return found
