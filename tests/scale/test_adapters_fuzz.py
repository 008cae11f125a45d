"""Adapter files of every format, mutated: each loads as an adapter or is a ValueError, and nothing in it is run."""

import io
import json
import pickle
import struct
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.strategies import DataObject
from torch import Tensor

from scale.adapters import denoiser_name, denoiser_of, load_adapter, lora_layers
from tests.scale import adapter_files as files

EXAMPLES = 200
FUZZ = settings(
    max_examples=EXAMPLES, derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck)
)
FAMILIES = ("sd", "sdxl", "flux")
TARGETS = ("to_q", "conv_in", "ff.net.0.proj", "x_embedder")
DTYPES = (torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.bool, torch.complex64, torch.uint8)
FRAGMENTS = (
    "unet.", "transformer.", "base_model.model.", "lora_unet_", "lora_te_", "diffusion_model.", ".processor.", ".alpha",
    ".lora_A.weight", ".lora_up.weight", ".lora_B.bias", ".hada_w1_a", "double_blocks_0_img_attn_qkv",
    "input_blocks_4_1", "final_layer", "_lora.down", ".default", "..", "", "\n", "é", "0",
)  # fmt: skip
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=5,
)
SETTINGS = (
    "r", "lora_alpha", "alpha_pattern", "rank_pattern", "use_rslora", "use_dora", "init_lora_weights", "peft_type",
    "target_modules", "unet.lora_alpha", "transformer.alpha_pattern", "unet.use_rslora", "modules_to_save",
)  # fmt: skip


@dataclass(frozen=True)
class File:
    """A file before it is written: which family it is for, its table, and the settings beside it."""

    family: str
    table: dict[Any, Any] = field(repr=False)
    pickled: bool
    config: Any = None
    header: Any = None


def seeds(pipes: dict[str, Any], folder: Path) -> list[File]:
    """An honest file of each format for each family."""
    found = []
    for family, pipe in pipes.items():
        component, adapter = denoiser_name(pipe), files.random_adapter(pipe, TARGETS)
        for name, writer in files.WRITERS.items():
            path = writer(adapter, component, folder / family / name)
            path = path if path.is_file() else next(file for file in path.iterdir() if file.suffix != ".json")
            settings = {"lora_alpha": 3, "r": 2, "use_rslora": True}
            config = settings if name == "peft" else None
            header = {f"{component}.{key}": value for key, value in settings.items()} if name == "pipeline" else None
            found.append(File(family, safetensors.torch.load_file(path), False, config, header))
    attention = files.pair(files.random_adapter(pipes["sd"], ("to_q",)), processor, ("down", "up"))
    alphas = safetensors.torch.load_file(files.kohya(adapter, "", folder / "alphas", 2.0))
    return [*found, File("sd", attention, True), File(family, alphas, False), replace(found[0], pickled=True)]


def processor(layer: str, word: str) -> str:
    attention, _, projection = layer.rpartition(".")
    return f"{attention}.processor.{projection}_lora.{word}.weight"


def key_of(data: DataObject, table: dict[Any, Any]) -> Any:
    return data.draw(st.sampled_from(sorted(map(str, table)))) if table else ""


def tensor_of(data: DataObject, table: dict[Any, Any], key: Any) -> Tensor:
    value = table.get(key)
    value = value if isinstance(value, Tensor) else torch.ones(2, 2)
    return value.real if value.is_complex() else value  # a cast would warn


def drop(data: DataObject, file: File) -> File:
    key = key_of(data, file.table)
    return replace(file, table={other: value for other, value in file.table.items() if other != key})


def rename(data: DataObject, file: File) -> File:
    """One key or all of them get a fragment of another format in the place of a part."""
    key = key_of(data, file.table)
    part = data.draw(st.sampled_from(FRAGMENTS + tuple(key.split("."))))
    new, everywhere = data.draw(st.sampled_from(FRAGMENTS) | st.text(max_size=5)), data.draw(st.booleans())
    names = {k: str(k).replace(part, new, 1) if everywhere or k == key else k for k in file.table}
    return replace(file, table={names[k]: value for k, value in file.table.items()})


def duplicate(data: DataObject, file: File) -> File:
    key = key_of(data, file.table)
    copy = data.draw(st.sampled_from(FRAGMENTS)) + key.replace(".lora_A", data.draw(st.sampled_from(FRAGMENTS)), 1)
    return replace(file, table=file.table | {copy: tensor_of(data, file.table, key).clone()})


def reshape(data: DataObject, file: File) -> File:
    changes: tuple[Callable[[Tensor], Tensor], ...] = (
        lambda v: v.flatten(), lambda v: v.mT if v.ndim > 1 else v, lambda v: v[:1] if v.ndim else v, lambda v: v[None],
        lambda v: v.sum(), lambda v: v[:0] if v.ndim else v, lambda v: torch.cat([v, v], -1) if v.ndim else v,
    )  # fmt: skip
    key = key_of(data, file.table)
    value = data.draw(st.sampled_from(changes))(tensor_of(data, file.table, key))
    return replace(file, table=file.table | {key: value.contiguous()})


def retype(data: DataObject, file: File) -> File:
    key, dtype = key_of(data, file.table), data.draw(st.sampled_from(DTYPES))
    return replace(file, table=file.table | {key: tensor_of(data, file.table, key).to(dtype)})


def poison(data: DataObject, file: File) -> File:
    key, bad = key_of(data, file.table), data.draw(st.sampled_from((torch.nan, torch.inf, -torch.inf, 3e38, 0.0)))
    value = tensor_of(data, file.table, key).float().clone()
    value.view(-1)[: data.draw(st.integers(1, 4))] = bad
    return replace(file, table=file.table | {key: value})


def configure(data: DataObject, file: File) -> File:
    """Settings, honest or not, in the header or in PEFT's config."""
    name, value = data.draw(st.sampled_from(SETTINGS)), data.draw(JSON)
    value = {data.draw(st.text(max_size=6) | st.just("to_q")): value} if "pattern" in name else value
    if data.draw(st.booleans()):
        return replace(file, header={**(file.header or {}), name: value})
    return replace(file, config={**(file.config or {}), name: value})


class Bomb:
    """Unpickling one of these makes a file."""

    def __init__(self, sentinel: Path) -> None:
        self.sentinel = sentinel

    def __reduce__(self):
        return Path.touch, (self.sentinel,)


def packed(data: DataObject, file: File, sentinel: Path) -> bytes:
    """A pickle, every other with a bomb in it: as a value, in a value, as a key's part or in the table's place."""
    table: Any = dict(file.table)
    place = data.draw(st.sampled_from(("none", "none", "none", "none", "value", "inside", "key", "all")))
    if place in ("value", "inside"):
        table[key_of(data, table)] = Bomb(sentinel) if place == "value" else [Bomb(sentinel)]
    if place == "key":
        table[(1, Bomb(sentinel))] = torch.zeros(2, 2)
    table = Bomb(sentinel) if place == "all" else table
    if data.draw(st.booleans()):
        return pickle.dumps(table, protocol=data.draw(st.integers(0, 5)))
    buffer = io.BytesIO()
    torch.save(table, buffer, _use_new_zipfile_serialization=data.draw(st.booleans()))
    return buffer.getvalue()


def saved(data: DataObject, file: File) -> bytes:
    """A safetensors file; one in six with a header that was edited by hand."""
    table = {str(key): value.clone().contiguous() for key, value in file.table.items()}
    header = None if file.header is None else {"lora_adapter_metadata": json.dumps(file.header)}
    content = safetensors.torch.save(table, header)
    if table and data.draw(st.integers(0, 5)) == 5:
        length = struct.unpack("<Q", content[:8])[0]
        entries = json.loads(content[8 : 8 + length])
        entry = entries[key_of(data, table)]
        entry[data.draw(st.sampled_from(("dtype", "shape", "data_offsets", "more")))] = data.draw(
            JSON | st.lists(st.integers(-1, 2**63), max_size=4) | st.sampled_from(("F64", "I8", "F8_E4M3", "BOOL"))
        )
        text = json.dumps(entries | {"__metadata__": data.draw(JSON)} if data.draw(st.booleans()) else entries).encode()
        content = struct.pack("<Q", len(text)) + text + content[8 + length :]
    return content


def damaged(data: DataObject, content: bytes) -> bytes:
    """Bytes flipped, cut or doubled; three files in four are spared."""
    if not content or data.draw(st.integers(0, 3)):
        return content
    array, places = bytearray(content), st.integers(0, len(content) - 1)
    match data.draw(st.sampled_from(("flip", "flip the head", "cut", "double"))):
        case "flip":
            for place in data.draw(st.lists(places, max_size=4)):
                array[place] ^= data.draw(st.integers(1, 255))
        case "flip the head":
            array[data.draw(places) % min(len(array), 300)] ^= data.draw(st.integers(1, 255))
        case "cut":
            del array[data.draw(places) :]
        case "double":
            place = data.draw(places)
            array[place:place] = array[place : place + 40]
    return bytes(array)


def state(pipe: Any) -> tuple:
    """Which modules and tensors a denoiser has, how often each was written to, and what peft has noted."""
    denoiser = denoiser_of(pipe)
    modules = [(path, id(module), module.training) for path, module in denoiser.named_modules()]
    values = [(name, id(p), p.data_ptr(), p._version, p.requires_grad) for name, p in denoiser.named_parameters()]
    return modules, values, dict(getattr(denoiser, "peft_config", {})), bool(denoiser._hf_peft_config_loaded)


@pytest.fixture(scope="module")
def pipes() -> dict[str, Any]:
    found = {family: files.MAKERS[family]() for family in FAMILIES}
    for pipe in found.values():
        denoiser_of(pipe).requires_grad_(False)  # as loading leaves it
    return found


@pytest.mark.slow
def test_mutated_files_load_or_are_refused(
    pipes: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of 200 files, a third of them pickles, is a good adapter or a ValueError that leaves the denoiser alone.

    A good one has changed layers, finite and in evaluation mode; of the bombs none has gone off. Both outcomes are
    frequent, or the mutations would prove nothing.
    """
    monkeypatch.chdir(tmp_path)  # so that the pickles have the same bytes wherever the tests run
    known, sentinel = seeds(pipes, tmp_path / "seeds"), Path("sentinel")
    mutations = (drop, rename, rename, duplicate, reshape, retype, poison, configure, configure)
    outcomes, numbers = Counter(), count()

    def write(data: DataObject, folder: Path) -> tuple[File, Path]:
        file = data.draw(st.sampled_from(known))
        for mutate in data.draw(st.lists(st.sampled_from(mutations), max_size=2)):
            file = mutate(data, file)
        pickled = file.pickled or data.draw(st.integers(0, 3)) == 3
        content = damaged(data, packed(data, file, sentinel) if pickled else saved(data, file))
        name = "adapter_model.bin" if file.config and pickled else "adapter_model.safetensors" if file.config else "x"
        path = folder / (name if name != "x" else data.draw(st.sampled_from(("x.safetensors", "x.pt", "x"))))
        path.write_bytes(content)
        if file.config is not None:
            text = json.dumps(file.config).encode()
            (folder / "adapter_config.json").write_bytes(damaged(data, text))
        return file, path

    @FUZZ
    @given(st.data())
    def run(data: DataObject) -> None:
        folder = tmp_path / f"file {next(numbers)}"
        folder.mkdir()
        file, path = write(data, folder)
        pipe = pipes[file.family]
        before = state(pipe)
        try:
            load_adapter(pipe, path, "a")
        except ValueError as error:
            outcomes["refused"] += 1
            outcomes["unnamed"] += str(folder) not in str(error)
        else:
            layers = lora_layers(denoiser_of(pipe))
            parts = [part["a"] for layer in layers for part in (layer.lora_A, layer.lora_B)]
            assert parts
            assert all(bool(torch.isfinite(part.weight).all()) and not part.training for part in parts)
            denoiser_of(pipe).unload_lora()
            outcomes["loaded"] += 1
        assert not sentinel.exists()
        assert state(pipe) == before

    run()
    assert not outcomes["unnamed"], "every error names its file"
    assert min(outcomes["loaded"], outcomes["refused"]) > EXAMPLES / 5, outcomes


def test_the_bombs_are_live(pipes: dict[str, Any], tmp_path: Path) -> None:
    """The control: where pickles are trusted the same payload does make the sentinel file."""
    pickle.loads(pickle.dumps({"x": [Bomb(tmp_path / "sentinel")]}))
    assert (tmp_path / "sentinel").exists()
