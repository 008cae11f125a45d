"""kohya's files, whose layers have the names of three houses, on the real architectures of SDXL and Flux."""

from pathlib import Path

import pytest
import torch
from diffusers import FluxTransformer2DModel, UNet2DConditionModel
from torch import nn

from scale.adapters import load_adapter
from scale.adapters.kohya import from_kohya
from scale.adapters.read import AdapterFile
from tests.scale import adapter_files as files
from tests.scale import tiny

STABILITY = {
    "norm1": "in_layers_0", "conv1": "in_layers_2", "norm2": "out_layers_0", "conv2": "out_layers_3",
    "time_emb_proj": "emb_layers_1", "conv_shortcut": "skip_connection",
}  # fmt: skip
STABILITY_ENDS = {
    "conv_in": "input_blocks_0_0", "conv_out": "out_2", "time_embedding_linear_1": "time_embed_0",
    "time_embedding_linear_2": "time_embed_2", "add_embedding_linear_1": "label_emb_0_0",
    "add_embedding_linear_2": "label_emb_0_2",
}  # fmt: skip


def stability(layer: str) -> str:
    """Stability's name of an SDXL layer in underscores, after the tables of kohya's scripts."""
    name = layer.replace(".", "_")
    if name in STABILITY_ENDS:
        return STABILITY_ENDS[name]
    place, block, kind, index, *rest = (
        layer.split(".") if not layer.startswith("mid") else ("mid", "0", *layer.split(".")[1:])
    )
    inner = "_".join(rest)
    inner = STABILITY.get(inner, inner) if kind == "resnets" else inner
    i, j = int(block), int(index)
    if place == "mid":
        return f"middle_block_{1 if kind == 'attentions' else 2 * j}_{inner}"
    if kind == "downsamplers":
        return f"input_blocks_{3 * (i + 1)}_0_op"
    if kind == "upsamplers":
        return f"output_blocks_{3 * i + 2}_2_conv"
    number = 3 * i + j + (1 if place == "down_blocks" else 0)
    return f"{'input' if place == 'down_blocks' else 'output'}_blocks_{number}_{int(kind == 'attentions')}_{inner}"


@pytest.fixture(scope="module")
def real_sdxl():
    """SDXL's real UNet, without memory for its weights."""
    pipe = tiny.sdxl()
    with torch.device("meta"):
        pipe.unet = UNet2DConditionModel(
            sample_size=128,
            block_out_channels=(320, 640, 1280),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            attention_head_dim=(5, 10, 20),
            cross_attention_dim=2048,
            transformer_layers_per_block=(1, 2, 10),
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=2816,
        )
    return pipe


@pytest.mark.parametrize("name", [stability, lambda layer: layer.replace(".", "_")], ids=["Stability", "diffusers"])
def test_kohyas_names_of_all_of_sdxl(real_sdxl, name) -> None:
    """All 794 Linear and Conv2d layers of SDXL's UNet are found under the names of both houses, with their alphas."""
    layers = [path for path, layer in real_sdxl.unet.named_modules() if isinstance(layer, nn.Linear | nn.Conv2d)]
    values = {path: torch.tensor(float(k)) for k, path in enumerate(layers)}
    parts = ("lora_down.weight", "lora_up.weight", "alpha")
    table = {f"lora_unet_{name(path)}.{part}": value for path, value in values.items() for part in parts}
    found = from_kohya(real_sdxl, AdapterFile(Path("x"), table, {}))
    modules = {key: key.split(".lora_")[0].removesuffix(".alpha") for key in found}
    assert len(layers) == 794
    assert len(found) == 3 * 794
    assert all(value is values[modules[key]] for key, value in found.items())


# Black Forest Labs' layers of Flux, and diffusers' that each is split into
DOUBLE = {
    "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "img_attn.proj": ("attn.to_out.0",), "txt_attn.proj": ("attn.to_add_out",),
    "img_mlp.0": ("ff.net.0.proj",), "img_mlp.2": ("ff.net.2",),
    "txt_mlp.0": ("ff_context.net.0.proj",), "txt_mlp.2": ("ff_context.net.2",),
    "img_mod.lin": ("norm1.linear",), "txt_mod.lin": ("norm1_context.linear",),
}  # fmt: skip
SINGLE = {
    "linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
    "linear2": ("proj_out",), "modulation.lin": ("norm.linear",),
}  # fmt: skip
BLACK_FOREST = {
    **{f"double_blocks.0.{name}": [f"transformer_blocks.0.{part}" for part in DOUBLE[name]] for name in DOUBLE},
    **{f"single_blocks.0.{name}": [f"single_transformer_blocks.0.{part}" for part in SINGLE[name]] for name in SINGLE},
    "img_in": ["x_embedder"], "txt_in": ["context_embedder"], "final_layer.linear": ["proj_out"],
}  # fmt: skip
ALPHA, RANK = 3.0, 2


@pytest.mark.parametrize("comfy", [False, True], ids=["kohya", "ComfyUI"])
def test_black_forest_labs_names(comfy: bool) -> None:
    """Flux's fused layers are split: the parts' B A, one under another, are the whole's, times alpha / rank."""
    pipe, generator = tiny.flux(), torch.Generator().manual_seed(0)
    with torch.device("meta"):
        pipe.transformer = FluxTransformer2DModel(num_layers=1, num_single_layers=1)
    table, expected, probes = {}, {}, {}
    for name, parts in BLACK_FOREST.items():
        layers = [pipe.transformer.get_submodule(part) for part in parts]
        (_, width), outs = files.shapes(layers[0], RANK)[0], sum(files.shapes(layer, RANK)[1][0] for layer in layers)
        down = torch.randn(RANK, width, generator=generator)
        up = torch.randn(outs, RANK, generator=generator)
        probes[name] = torch.randn(width, 3, generator=generator)
        expected[name] = ALPHA / RANK * up @ (down @ probes[name])
        stem = f"diffusion_model.{name}" if comfy else "lora_unet_" + name.replace(".", "_")
        words = ("lora_A", "lora_B") if comfy else ("lora_down", "lora_up")
        table |= {f"{stem}.{word}.weight": factor for word, factor in zip(words, (down, up), strict=True)}
        table[f"{stem}.alpha"] = torch.tensor(ALPHA)
    found = from_kohya(pipe, AdapterFile(Path("x"), table, {}))
    assert len(found) == 2 * sum(map(len, BLACK_FOREST.values()))
    for name, parts in BLACK_FOREST.items():
        factors = [(found[f"{part}.lora_B.weight"], found[f"{part}.lora_A.weight"]) for part in parts]
        product = torch.cat([up @ (down @ probes[name]) for up, down in factors])
        torch.testing.assert_close(product, expected[name], rtol=1e-4, atol=1e-3)


LOST: dict[str, tuple[str, tuple[str, ...], str]] = {
    "a name of both houses": ("sdxl", ("mid_block_resnets_0_conv1", "middle_block_0_in_layers_2"), "of two houses"),
    "a layer that diffusers drops": ("flux", ("img_in", "x_position_embedding"), "16 of 32 outputs"),
    "a block too many": ("flux", ("double_blocks_19_img_mod_lin",), "Incompatible keys"),
    "no such module": ("sdxl", ("input_blocks_4_7_conv",), "list index out of range"),
}


@pytest.mark.parametrize("case", LOST)
def test_what_diffusers_would_lose_is_refused(case: str) -> None:
    """Layers that its converters overwrite or drop in silence, or stumble over, are an error."""
    family, stems, reason = LOST[case]
    table = {f"lora_unet_{stem}.lora_{side}.weight": torch.zeros(16, 16) for stem in stems for side in ("down", "up")}
    with pytest.raises(ValueError, match=reason):
        from_kohya(files.MAKERS[family](), AdapterFile(Path("x"), table, {}))


def test_stabilitys_names_of_sd3_are_refused(tmp_path: Path) -> None:
    """diffusers knows no translation of SD3's joint blocks: an error that shows the key, not a silent half."""
    table = {"lora_unet_joint_blocks_0_x_block_attn_qkv.lora_down.weight": torch.zeros(2, 16)}
    pipe = tiny.sd3()
    with pytest.raises(ValueError, match=r"not kohya's for this model.*joint_blocks"):
        load_adapter(pipe, files.write(table, tmp_path / "x.safetensors"), "a")
    files.assert_untouched(pipe)
