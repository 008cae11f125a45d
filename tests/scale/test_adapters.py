"""Adapter files of strangers: what is loaded does what the file says, and what is wrong is refused before it acts."""

import io
import json
import pickle
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from scale.adapters import FILE_NAMES, denoiser_name, load_adapter, lora_layers
from tests.scale import tiny

SAFE, PICKLE = FILE_NAMES
Table = dict[str, Tensor]


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A rank-4 adapter for tiny SD, on Linear and Conv2d layers, whose file says nothing of alpha."""
    return tiny.save_lora(tiny.sd, tmp_path_factory.mktemp("lora"), 1, ("to_q", "conv1")) / SAFE


@pytest.fixture(scope="module")
def table(file: Path) -> Table:
    return load_file(file)


@pytest.fixture(scope="module")
def pipe():
    """One pipeline for all refusals: a refused adapter must leave nothing behind."""
    return tiny.sd()


def delta(weights: Table, path: str) -> Tensor:
    """B A of a Linear layer, by hand."""
    return weights[f"unet.{path}.lora_B.weight"] @ weights[f"unet.{path}.lora_A.weight"]


def linear_paths(weights: Table) -> list[str]:
    ends = ".to_q.lora_A.weight"
    return [key.removeprefix("unet.").removesuffix(".lora_A.weight") for key in weights if key.endswith(ends)]


def assert_scaled(path: Path, weights: Table, scale: Callable[[str], float], make=tiny.sd) -> None:
    """Every Linear layer changes its output by `scale * B A x`, with B A made by hand."""
    pipe = make()
    load_adapter(pipe, path, "a")
    names = linear_paths(weights)
    assert names
    for name in names:
        layer = pipe.unet.get_submodule(name)
        x = torch.randn(3, layer.in_features, generator=torch.Generator().manual_seed(0))
        expected = scale(name) * x @ delta(weights, name).T
        torch.testing.assert_close(layer(x) - layer.base_layer(x), expected, rtol=1e-4, atol=1e-5)


def save_with_header(weights: Table, path: Path, settings: object) -> Path:
    header = settings if isinstance(settings, str) else json.dumps(settings)
    save_file(weights, path, metadata={"format": "pt", "lora_adapter_metadata": header})
    return path


def test_alpha_is_the_rank_where_the_file_says_nothing(file: Path, table: Table) -> None:
    """A file without alpha acts as B A with scale one, which is what its trainer meant."""
    assert_scaled(file, table, lambda _: 1.0)


@pytest.mark.parametrize(
    ("settings", "scale"),
    [
        ({"unet.r": 4, "unet.lora_alpha": 2}, 0.5),
        ({"unet.r": 4, "unet.lora_alpha": 6.0}, 1.5),
        ({"unet.r": 4, "unet.lora_alpha": 2, "unet.use_rslora": True}, 1.0),
        ({"unet.r": 10**9, "unet.lora_alpha": 2}, 0.5),
        ({"text_encoder.r": 8, "text_encoder.lora_alpha": 3}, 1.0),
        ({"unet.target_modules": None, "unet.megatron_core": "os", "unet.no_such_setting": 1}, 1.0),
    ],
    ids=["half", "more", "rank-stabilised", "false rank", "of the text encoder", "unknown"],
)
def test_alpha_of_the_header_is_honoured(table: Table, tmp_path: Path, settings: dict, scale: float) -> None:
    """The header's alpha scales B A; the rank is the tensors' own, and no other setting of a stranger acts."""
    assert_scaled(save_with_header(table, tmp_path / SAFE, settings), table, lambda _: scale)


def test_alpha_of_single_layers_is_honoured(table: Table, tmp_path: Path) -> None:
    """An alpha pattern in the header holds for its layers alone, because trainers may differ by layer."""
    first, *_ = names = linear_paths(table)
    settings = {"unet.r": 4, "unet.lora_alpha": 4, "unet.alpha_pattern": {first: 8}}
    assert len(names) > 1
    assert_scaled(save_with_header(table, tmp_path / SAFE, settings), table, lambda n: 2.0 if n == first else 1.0)


def test_an_adapter_saved_by_diffusers_with_alpha(tmp_path: Path) -> None:
    """diffusers' own writer and its own reader agree with ours on the scaling that alpha gives."""
    pipe = tiny.sd()
    folder = tiny.save_lora(tiny.sd, tmp_path, 3, alpha=2)
    weights = load_file(folder / SAFE)
    settings = {"unet.r": 4, "unet.lora_alpha": 2, "unet.target_modules": ["to_q", "to_v"]}
    save_with_header(weights, folder / SAFE, settings)
    pipe.load_lora_weights(folder, adapter_name="a")
    ours = tiny.sd()
    load_adapter(ours, folder, "a")
    theirs = [layer.scaling["a"] for layer in lora_layers(pipe.unet)]
    assert theirs
    assert [layer.scaling["a"] for layer in lora_layers(ours.unet)] == theirs == [0.5] * len(theirs)


@pytest.mark.parametrize("make", [tiny.sd, tiny.sdxl], ids=["sd", "sdxl"])
def test_kohya_files(make, tmp_path: Path) -> None:
    """kohya's keys and its alpha tensors, one of which differs, do what diffusers' keys with that scale do."""
    weights = load_file(tiny.save_lora(make, tmp_path / "diffusers", 1, ("to_q",)) / SAFE)
    alphas = {name: 2.0 + 4 * (i == 0) for i, name in enumerate(linear_paths(weights))}
    kohya = {}
    for name, alpha in alphas.items():
        stem = "lora_unet_" + name.replace(".", "_")
        kohya[f"{stem}.lora_down.weight"] = weights[f"unet.{name}.lora_A.weight"]
        kohya[f"{stem}.lora_up.weight"] = weights[f"unet.{name}.lora_B.weight"]
        kohya[f"{stem}.alpha"] = torch.tensor(alpha)
    save_file(kohya, tmp_path / "kohya.safetensors")
    assert_scaled(tmp_path / "kohya.safetensors", weights, lambda name: alphas[name] / 4, make)


def test_a_pickle_of_tensors_in_any_order(table: Table, tmp_path: Path) -> None:
    """A `.bin` of plain tensors loads, also where a lora_B stands first and an alpha stands beside its factors."""
    first = linear_paths(table)[0]
    reverse = dict(sorted(table.items(), reverse=True)) | {f"unet.{first}.alpha": torch.tensor(2.0)}
    torch.save(reverse, tmp_path / PICKLE)
    assert_scaled(tmp_path, table, lambda name: 0.5 if name == first else 1.0)


def test_a_loaded_adapter_is_frozen(file: Path) -> None:
    """Loading sets eval mode and no gradient: a saved dropout would make two equal calls differ."""
    pipe = tiny.sd()
    load_adapter(pipe, file, "a")
    factors = [part for layer in lora_layers(pipe.unet) for part in (layer.lora_A["a"], layer.lora_B["a"])]
    assert factors
    assert not any(part.training or part.weight.requires_grad for part in factors)


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


def assert_untouched(pipe) -> None:
    assert not getattr(pipe.unet, "peft_config", {})
    assert not lora_layers(pipe.unet)


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
    "a bias": (lambda t: t | {linear_key(t, "lora_B.bias"): torch.zeros(4)}, "does not have"),
    "kohya's, of another model": (lambda t: {"lora_unet_x.lora_down.weight": torch.zeros(4, 4)}, "not kohya's"),
}  # fmt: skip


def linear_key(table: Table, end: str) -> str:
    return f"unet.{linear_paths(table)[0]}.{end}"


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
        load_adapter(pipe, save_with_header(table, tmp_path / SAFE, settings), "a")
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


def test_missing_files_are_refused(pipe, tmp_path: Path) -> None:
    """No file, and a folder without one, are a ValueError that says what to give."""
    with pytest.raises(ValueError, match="no adapter at"):
        load_adapter(pipe, tmp_path / "none.safetensors", "a")
    with pytest.raises(ValueError, match="holds none of"):
        load_adapter(pipe, tmp_path, "a")


def test_a_pickle_that_is_no_table_is_refused(pipe, tmp_path: Path) -> None:
    """A pickle of safe types that are no tensors is refused too."""
    for payload in ([torch.zeros(3)], {"state_dict": {"x": torch.zeros(3)}}, {3: torch.zeros(3)}, 5):
        torch.save(payload, tmp_path / PICKLE)
        with pytest.raises(ValueError, match="no table of tensors"):
            load_adapter(pipe, tmp_path, "a")


@pytest.mark.parametrize("name", ["", "a.b", "base", "__base__"])
def test_names_that_peft_cannot_hold_are_refused(pipe, file: Path, name: str) -> None:
    """torch keys modules by adapter names, which forbids dots; "base" is the bare model."""
    with pytest.raises(ValueError, match="no adapter can be named"):
        load_adapter(pipe, file, name)
    assert_untouched(pipe)


def test_a_name_in_use_is_refused(file: Path) -> None:
    """A second adapter of the same name would overwrite the first."""
    pipe = tiny.sd()
    load_adapter(pipe, file, "a")
    with pytest.raises(ValueError, match="already has an adapter named 'a'"):
        load_adapter(pipe, file, "a")
    load_adapter(pipe, file, "b")
    assert set(pipe.unet.peft_config) == {"a", "b"}


def test_a_pipeline_without_a_denoiser() -> None:
    """A pipeline that has neither a UNet nor a transformer is refused by name."""
    from diffusers import DiffusionPipeline

    with pytest.raises(ValueError, match="neither a unet nor a transformer"):
        denoiser_name(DiffusionPipeline())


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


def test_an_alpha_pattern_acts_on_the_modules_it_names(tmp_path: Path) -> None:
    """Alpha 8 at rank 4 doubles the layers that the header names, the others keep 1."""
    pipe = tiny.sd()
    file = tiny.save_lora(tiny.sd, tmp_path / "a", 1) / "pytorch_lora_weights.safetensors"
    header = {"unet.lora_alpha": 4, "unet.alpha_pattern": {"attn1.to_q": 8}}
    save_file(load_file(file), file, {"lora_adapter_metadata": json.dumps(header)})
    load_adapter(pipe, file, "a")
    scales = {name: layer.scaling["a"] for name, layer in pipe.unet.named_modules() if hasattr(layer, "scaling")}
    assert scales == {name: 2.0 if name.endswith("attn1.to_q") else 1.0 for name in scales}
    assert set(scales.values()) == {1.0, 2.0}
