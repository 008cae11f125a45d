"""Loading an adapter: what it does to the denoiser, how strong it is, and where its file is found."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from scale.adapters import FILE_NAMES, adapter_file, denoiser_name, denoiser_of, load_adapter, lora_layers
from tests.scale import adapter_files as files
from tests.scale import tiny
from tests.scale.adapter_files import Table, assert_untouched

SAFE, PICKLE = FILE_NAMES


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


@pytest.mark.parametrize("name", ["", "a.b", "base", "__base__", "half", "pop"])
def test_names_that_peft_cannot_hold_are_refused(pipe, file: Path, name: str) -> None:
    """torch keys modules by adapter names, which forbids dots and methods' names; "base" is the bare model."""
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


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("make", [tiny.sd, tiny.flux], ids=["sd", "flux"])
def test_an_adapter_takes_the_denoisers_dtype(make, tmp_path: Path, dtype: torch.dtype) -> None:
    """In half precision the factors are in half precision too, and add what they should at that precision."""
    pipe = make().to(dtype)
    adapter = files.random_adapter(pipe)
    load_adapter(pipe, files.pipeline(adapter, denoiser_name(pipe), tmp_path), "a")
    factors = [
        part[name].weight for x in lora_layers(denoiser_of(pipe)) for part in (x.lora_A, x.lora_B) for name in part
    ]
    assert {factor.dtype for factor in factors} == {dtype}
    rounded = {path: (down.to(dtype).float(), up.to(dtype).float()) for path, (down, up) in adapter.items()}
    files.assert_adds(pipe, rounded, rtol=8 * torch.finfo(dtype).eps)


def test_values_that_half_precision_cannot_hold_are_refused(table: Table, tmp_path: Path) -> None:
    """1e6 is a float, but infinite in float16, where it would blacken every picture; alpha likewise."""
    pipe = tiny.sd().to(torch.float16)
    first = next(iter(table))
    with pytest.raises(ValueError, match=r"too large for torch.float16"):
        load_adapter(pipe, files.write(table | {first: torch.full_like(table[first], 1e6)}, tmp_path / SAFE), "a")
    with pytest.raises(ValueError, match=r"too large for torch.float16"):
        load_adapter(pipe, files.write(table, tmp_path / SAFE, {"unet.lora_alpha": 1e6}), "a")
    assert_untouched(pipe)


def test_a_compiled_denoiser_takes_adapters(file: Path, table: Table) -> None:
    """torch.compile wraps the denoiser in another module; the layers are the wrapped one's."""
    pipe = tiny.sd()
    unet = pipe.unet
    pipe.unet = torch.compile(unet)
    load_adapter(pipe, file, "a")
    assert denoiser_of(pipe) is unet
    assert len(lora_layers(unet)) == len(table) // 2


def test_loading_draws_no_random_numbers(pipe, file: Path) -> None:
    """torch's global generator is as it was: who loads an adapter more makes the same pictures otherwise."""
    before = torch.get_rng_state()
    load_adapter(pipe, file, "a")
    assert torch.equal(torch.get_rng_state(), before)
    pipe.unet.unload_lora()


def test_fused_adapters_are_refused(file: Path) -> None:
    """Adapters that are fused into the base weights cannot be switched off; unfused, they can."""
    pipe = tiny.sd()
    load_adapter(pipe, file, "a")
    pipe.fuse_lora()
    with pytest.raises(ValueError, match=r"fused into the denoiser \(a\); call pipe.unfuse_lora"):
        load_adapter(pipe, file, "b")
    pipe.unfuse_lora()
    load_adapter(pipe, file, "b")


@pytest.mark.parametrize("loaded", [(), ("a",)], ids=["none before", "one before"])
def test_a_failure_inside_peft_leaves_no_trace(
    tmp_path: Path, file: Path, loaded: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where peft fails after it has wrapped layers, they are unwrapped: same modules, same gradients as before."""
    pipe = tiny.sd()
    for name in loaded:
        load_adapter(pipe, file, name)
    modules = {path: id(module) for path, module in pipe.unet.named_modules()}
    gradients = [parameter.requires_grad for parameter in pipe.unet.parameters()]
    other = files.pipeline(files.random_adapter(pipe, ("to_k", "proj_in")), "unet", tmp_path)

    def fail(*args, **kwargs):
        raise RuntimeError("out of memory")

    monkeypatch.setattr("peft.set_peft_model_state_dict", fail)
    with pytest.raises(ValueError, match="cannot be loaded: out of memory"):
        load_adapter(pipe, other, "b")
    monkeypatch.undo()
    assert {path: id(module) for path, module in pipe.unet.named_modules()} == modules
    assert [parameter.requires_grad for parameter in pipe.unet.parameters()] == gradients
    assert list(getattr(pipe.unet, "peft_config", {})) == list(loaded)
    load_adapter(pipe, other, "b")


FOLDERS = {
    "diffusers' name": (["pytorch_lora_weights.safetensors", "optimizer.bin", "other.safetensors"], 0),
    "diffusers' pickle": (["pytorch_lora_weights.bin", "random_states.pkl"], 0),
    "PEFT's name": (["adapter_model.safetensors", "adapter_config.json", "README.md"], 0),
    "safetensors before pickles": (["pytorch_lora_weights.bin", "pytorch_lora_weights.safetensors"], 1),
    "a name of its own": (["README.md", "my style.safetensors", "old.ckpt"], 1),
    "a pickle of its own": (["style.ckpt", "notes.txt"], 0),
}


@pytest.mark.parametrize("case", FOLDERS)
def test_the_adapter_of_a_folder_is_found(tmp_path: Path, case: str) -> None:
    """Usual names win over others, and safetensors over pickles; the only file with an unusual name is found too."""
    names, chosen = FOLDERS[case]
    for name in names:
        (tmp_path / name).touch()
    assert adapter_file(tmp_path) == tmp_path / names[chosen]
    assert adapter_file(tmp_path / names[-1]) == tmp_path / names[-1]


@pytest.mark.parametrize("names", [["a.safetensors", "b.safetensors"], ["a.pt", "b.bin"], [SAFE, "adapter_model.bin"]])
def test_a_folder_of_several_adapters_is_refused(tmp_path: Path, names: list[str]) -> None:
    """Which of two adapters is meant only the user knows: the error names them."""
    for name in names:
        (tmp_path / name).touch()
    with pytest.raises(ValueError, match=rf"holds 2 adapters \({names[0]}, {names[1]}\); name the file itself"):
        adapter_file(tmp_path)


def test_missing_files_are_refused(pipe, tmp_path: Path) -> None:
    """No file, and a folder without one, are a ValueError that says what to give."""
    with pytest.raises(ValueError, match="no adapter at"):
        load_adapter(pipe, tmp_path / "none.safetensors", "a")
    with pytest.raises(ValueError, match="holds none of"):
        load_adapter(pipe, tmp_path, "a")


def test_layers_of_many_ranks(tmp_path: Path) -> None:
    """Where ranks differ everywhere each layer has its own: ours are named to peft in groups, and noted by layer."""
    pipe = tiny.sd()
    adapter = files.random_adapter(pipe, ("to_q", "to_k", "to_out.0", "conv1", "conv2"), (1, 2, 3, 1, 4, 5, 6))
    load_adapter(pipe, files.pipeline(adapter, "unet", tmp_path), "a")
    config, ranks = pipe.unet.peft_config["a"], {path: len(down) for path, (down, _) in adapter.items()}
    assert len(set(ranks.values())) == 6
    assert {path: layer.r["a"] for path, layer in pipe.unet.named_modules() if hasattr(layer, "lora_A")} == ranks
    assert {path: config.rank_pattern.get(f"^{path}", config.r) for path in ranks} == ranks
