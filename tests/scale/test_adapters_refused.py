"""Adapter files that are no plain LoRA of this denoiser: refused with the reason, before anything changes or runs."""

import io
import json
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from scale.adapters import FILE_NAMES, load_adapter
from tests.scale import adapter_files as files
from tests.scale import tiny
from tests.scale.adapter_files import Table, assert_untouched

SAFE, PICKLE = FILE_NAMES


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A rank-4 adapter for tiny SD, on Linear and Conv2d layers."""
    return tiny.save_lora(tiny.sd, tmp_path_factory.mktemp("lora"), 1, ("to_q", "conv1")) / SAFE


@pytest.fixture(scope="module")
def table(file: Path) -> Table:
    return load_file(file)


@pytest.fixture(scope="module")
def pipe():
    """One pipeline for all refusals: a refused adapter must leave nothing behind."""
    return tiny.sd()


class Bomb:
    """Unpickling one of these makes a file."""

    def __init__(self, sentinel: Path) -> None:
        self.sentinel = sentinel

    def __reduce__(self):
        return Path.touch, (self.sentinel,)


@pytest.mark.parametrize("name", [PICKLE, SAFE, "lora.pt", "lora.ckpt", "lora"])
@pytest.mark.parametrize("writer", ["pickle", "torch"])
def test_a_malicious_pickle_runs_nothing(pipe, tmp_path: Path, name: str, writer: str) -> None:
    """A pickle that asks for code is refused under any name, and its code does not run."""
    sentinel, path = tmp_path / "sentinel", tmp_path / name
    payload = {"unet.lora_A.weight": Bomb(sentinel)}
    if writer == "torch":
        torch.save(payload, path)
    else:
        path.write_bytes(pickle.dumps(payload))
    with pytest.raises(ValueError, match=r"refused|no readable"):
        load_adapter(pipe, path, "a")
    assert not sentinel.exists()
    assert_untouched(pipe)
    data = path.read_bytes()
    torch.load(io.BytesIO(data), weights_only=False) if writer == "torch" else pickle.loads(data)
    assert sentinel.exists(), "the control: the payload does run where pickles are trusted"


def without(table: Table, part: str) -> Table:
    return {key: value for key, value in table.items() if part not in key}


def changed(table: Table, change: Callable[[Tensor], Tensor], part: str = "lora_A") -> Table:
    first = next(key for key in table if part in key)
    return table | {first: change(table[first]).contiguous()}


WRONG_TABLES: dict[str, tuple[Callable[[Table], Table], str]] = {
    "empty": (lambda t: {}, "changes no layer"),
    "other tensors": (lambda t: {"mean": torch.zeros(3)}, "changes no layer; its keys: mean"),
    "another denoiser": (lambda t: {k.replace("unet", "transformer"): v for k, v in t.items()}, "changes no layer"),
    "unknown layer": (lambda t: {k.replace("blocks", "stones"): v for k, v in t.items()}, "does not have; wrong base"),
    "NaN": (lambda t: changed(t, lambda v: v * torch.nan), "NaN or infinite"),
    "infinite": (lambda t: changed(t, lambda v: v / 0), "NaN or infinite"),
    "one NaN": (lambda t: changed(t, lambda v: v.flatten().index_fill(0, torch.tensor(0), torch.nan).view(v.shape)),
                "NaN or infinite"),
    "text encoder": (lambda t: t | {"text_encoder.q_proj.lora_A.weight": torch.zeros(4, 4)}, "text-encoder part"),
    "kohya's text encoder": (lambda t: t | {"lora_te1_x.lora_down.weight": torch.zeros(4, 4)}, "text-encoder part"),
    "DoRA": (lambda t: t | {"unet.x.lora_magnitude_vector": torch.zeros(4)}, "DoRA part"),
    "kohya's DoRA": (lambda t: t | {"lora_unet_x.dora_scale": torch.zeros(4)}, "DoRA part"),
    "wide": (lambda t: changed(t, lambda v: torch.cat([v, v], 1)), "has shape"),
    "other ranks": (lambda t: changed(t, lambda v: v[:2]), "has shape"),
    "rank zero": (lambda t: {k: v[:0] if "lora_A" in k else v[:, :0] for k, v in t.items()}, "has shape"),
    "a flat factor": (lambda t: changed(t, lambda v: v.flatten()[:4], "lora_B"), "has shape"),
    "a scalar": (lambda t: changed(t, lambda v: v.sum()), "has shape"),
    "half a pair": (lambda t: without(t, "to_q.lora_B"), "without its other factor"),
    "the other half": (lambda t: without(t, "to_q.lora_A"), "without its other factor"),
    "a bias": (lambda t: t | {linear_key(t, "lora_B.bias"): torch.zeros(4)}, "bias part"),
    "LoHa": (lambda t: {"lora_unet_x.hada_w1_a": torch.zeros(4, 4)}, "LoHa part"),
    "LoKr": (lambda t: t | {"unet.x.lokr_w1": torch.zeros(4, 4)}, "LoKr part"),
    "Tucker": (lambda t: t | {"lora_unet_x.lora_mid.weight": torch.zeros(4, 4)}, "Tucker part"),
    "whole weights": (lambda t: t | {"lora_unet_x.diff": torch.zeros(4, 4)}, "full-weight part"),
    "a bias, old names": (lambda t: t | {linear_key(t, "lora.up.bias"): torch.zeros(4)}, "bias part"),
    "something else": (lambda t: t | {"unet.conv_in.weight": torch.zeros(4)}, "no factors of a LoRA.*conv_in.weight"),
    "an alpha alone": (lambda t: t | {"unet.conv_in.alpha": torch.tensor(1.0)}, "has alpha of conv_in without"),
    "two alphas": (lambda t: t | {linear_key(t, "alpha"): torch.ones(2)}, "alpha of .*to_q that is no single number"),
    "an alpha of NaN": (lambda t: t | {linear_key(t, "alpha"): torch.tensor(torch.nan)}, "no single number"),
    "twice": (lambda t: t | {linear_key(t, "lora_down.weight"): torch.zeros(4, 16)}, "under two names"),
    "twice, by prefix": (lambda t: t | {linear_key(t, "lora_A.weight").removeprefix("unet."): torch.zeros(4, 16)},
                         "under two names"),
    "many": (lambda t: {f"unet.x{i}.alpha": torch.zeros(1) for i in range(2000)}, "more than the denoiser's layers"),
    "a long key": (lambda t: t | {"x" * 600: torch.zeros(1)}, "key of more than 500 letters"),
    "kohya's among others": (lambda t: t | {"lora_unet_x.alpha": torch.zeros(1)}, "not kohya's beside those that are"),
    "kohya's, of another model": (lambda t: {"lora_unet_x.lora_down.weight": torch.zeros(4, 4)}, "not kohya's"),
}  # fmt: skip


def linear_key(table: Table, end: str) -> str:
    layer = next(key for key in table if key.endswith("to_q.lora_A.weight")).removesuffix(".lora_A.weight")
    return f"{layer}.{end}"


@pytest.mark.parametrize("case", WRONG_TABLES)
def test_wrong_tensors_are_refused(pipe, table: Table, tmp_path: Path, case: str) -> None:
    """Tensors that are no LoRA of this denoiser are a ValueError that says why, and leave the denoiser as it was."""
    change, reason = WRONG_TABLES[case]
    save_file(change(table), tmp_path / SAFE)
    with pytest.raises(ValueError, match=reason):
        load_adapter(pipe, tmp_path, "a")
    assert_untouched(pipe)


def test_an_adapter_of_another_base_is_refused(tmp_path: Path) -> None:
    """An SDXL adapter on SD has other shapes: refused, not silently half loaded."""
    folder = tiny.save_lora(tiny.sdxl, tmp_path, 1, ("to_k",))
    with pytest.raises(ValueError, match="wrong base model"):
        load_adapter(tiny.sd(), folder, "a")


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ("{", "cannot be read"),
        ("[" * 100_000, "cannot be read"),
        ("[1, 2]", "cannot be read"),
        ('{"unet.lora_alpha": NaN}', "cannot be read"),
        ('{"unet.lora_alpha": "os"}', "cannot be read"),
        ('{"unet.lora_alpha": null}', "cannot be read"),
        ('{"unet.alpha_pattern": {"x": Infinity}}', "cannot be read"),
        ('{"unet.alpha_pattern": [1]}', "cannot be read"),
        ('{"unet.alpha_pattern": {"(": 1}}', "cannot be read"),
        ('{"unet.use_dora": true}', "DoRA"),
    ],
)
def test_a_hostile_header_is_refused(table: Table, tmp_path: Path, settings: str, reason: str) -> None:
    """Settings that are no numbers are refused, before an alpha of NaN can blacken every picture."""
    pipe = tiny.sd()
    with pytest.raises(ValueError, match=reason):
        load_adapter(pipe, files.write(table, tmp_path / SAFE, settings), "a")
    assert_untouched(pipe)


BYTES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda data: b"",
    "cut in the header": lambda data: data[:100],
    "cut in the tensors": lambda data: data[: len(data) // 2],
    "one byte short": lambda data: data[:-1],
    "a huge header": lambda data: struct.pack("<Q", 2**62) + data[8:],
    "text": lambda data: b"<html>404 not found</html>",
    "zeros": lambda data: bytes(1000),
}


@pytest.mark.parametrize("name", [SAFE, PICKLE])
@pytest.mark.parametrize("case", BYTES)
def test_broken_files_are_refused(pipe, file: Path, tmp_path: Path, case: str, name: str) -> None:
    """A download that was cut, or is no adapter at all, is a ValueError that names the file."""
    (tmp_path / name).write_bytes(BYTES[case](file.read_bytes()))
    with pytest.raises(ValueError, match=name):
        load_adapter(pipe, tmp_path / name, "a")
    assert_untouched(pipe)


def test_a_pickle_that_is_no_table_is_refused(pipe, tmp_path: Path) -> None:
    """A pickle of safe types that are no tensors is refused too."""
    for payload in ([torch.zeros(3)], {"state_dict": {"x": torch.zeros(3)}}, {3: torch.zeros(3)}, 5):
        torch.save(payload, tmp_path / PICKLE)
        with pytest.raises(ValueError, match="no table of tensors"):
            load_adapter(pipe, tmp_path, "a")


@pytest.mark.parametrize("dtype", [torch.int8, torch.bool, torch.complex64, torch.float8_e4m3fn])
def test_numbers_that_are_no_floats_are_refused(tmp_path: Path, dtype: torch.dtype) -> None:
    """Types that a LoRA cannot be stored in would be a traceback, or load as something else."""
    pipe = tiny.sd()
    file = tiny.save_lora(tiny.sd, tmp_path / "a", 1) / "pytorch_lora_weights.safetensors"
    save_file({key: value.to(dtype) for key, value in load_file(file).items()}, file)
    with pytest.raises(ValueError, match="save it as"):
        load_adapter(pipe, file, "a")


@pytest.mark.parametrize("header", [{"unet.alpha_pattern": {"([a-z_0-9.]+)+X": 4}}, {"unet.lora_alpha": 10**400}])
def test_a_hostile_header_neither_hangs_nor_crashes(tmp_path: Path, header: dict) -> None:
    """A regular expression that backtracks for ever, and an alpha that no float holds, are refused at once."""
    file = tiny.save_lora(tiny.sd, tmp_path / "a", 1) / "pytorch_lora_weights.safetensors"
    save_file(load_file(file), file, {"lora_adapter_metadata": json.dumps(header)})
    with pytest.raises(ValueError, match="header"):
        load_adapter(tiny.sd(), file, "a")


CONFIGS: dict[str, tuple[str, str]] = {
    "a DoRA": ('{"use_dora": true}', "is a DoRA"),
    "another method": ('{"peft_type": "LOHA"}', "is of the type 'LOHA'"),
    "an activated LoRA": ('{"alora_invocation_tokens": [1, 2]}', "is an activated LoRA"),
    "PiSSA": ('{"init_lora_weights": "pissa_niter_4"}', "base model with other weights .*pissa"),
    "no number": ('{"lora_alpha": true}', "alpha of True is no finite number"),
    "no flag": ('{"use_rslora": "false"}', "use_rslora is 'false'"),
    "no table": ("[]", "no table of names"),
    "no JSON": ("{", "cannot be read"),
    "deep": ("[" * 100_000, "cannot be read"),
    "a long number": ('{"lora_alpha": ' + "9" * 10_000 + "}", "cannot be read"),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_a_hostile_peft_config_is_refused(pipe, tmp_path: Path, case: str) -> None:
    """PEFT's `adapter_config.json` is a stranger's too: what it says of alpha counts, or is refused with the reason."""
    text, reason = CONFIGS[case]
    folder = files.peft(files.random_adapter(pipe, ("to_q",)), "unet", tmp_path)
    (folder / "adapter_config.json").write_text(text)
    with pytest.raises(ValueError, match=reason):
        load_adapter(pipe, folder, "a")
    assert_untouched(pipe)


@pytest.mark.parametrize(("data", "reason"), [(b"\xff{}", "not UTF-8"), (b" " * 10_000_001, "larger than")])
def test_a_peft_config_of_other_bytes_is_refused(pipe, tmp_path: Path, data: bytes, reason: str) -> None:
    """Bytes that are no text, or more of them than any config has."""
    folder = files.peft(files.random_adapter(pipe, ("to_q",)), "unet", tmp_path)
    (folder / "adapter_config.json").write_bytes(data)
    with pytest.raises(ValueError, match=reason):
        load_adapter(pipe, folder, "a")


ODD: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "sparse": (lambda value: value.to_sparse(), "no plain tensor"),
    "without memory": (lambda value: value.to("meta"), "no plain tensor"),
    "a terabyte": (lambda value: torch.zeros(1).expand(500_000, 500_000), "claims 1000000"),
}


@pytest.mark.parametrize("case", ODD)
def test_pickled_tensors_of_other_kinds_are_refused(pipe, table: Table, tmp_path: Path, case: str) -> None:
    """A pickle may hold tensors without values, or four bytes that claim to be a terabyte."""
    change, reason = ODD[case]
    first = next(iter(table))
    torch.save(table | {first: change(table[first])}, tmp_path / PICKLE)
    with pytest.raises(ValueError, match=reason):
        load_adapter(pipe, tmp_path, "a")
    assert_untouched(pipe)


def test_a_compressed_pickle_is_refused(pipe, table: Table, tmp_path: Path) -> None:
    """torch would inflate it, a thousandfold if it is zeros; the control is the same archive, stored."""
    torch.save(table, tmp_path / "plain.bin")
    with zipfile.ZipFile(tmp_path / "plain.bin") as plain, zipfile.ZipFile(tmp_path / "small.bin", "w") as small:
        for name in plain.namelist():
            small.writestr(name, plain.read(name), zipfile.ZIP_DEFLATED)
    with pytest.raises(ValueError, match="compressed"):
        load_adapter(pipe, tmp_path / "small.bin", "a")
    assert_untouched(pipe)
    load_adapter(pipe, tmp_path / "plain.bin", "a")
    pipe.unet.unload_lora()
