"""ImageReward: how much people would like an image for its prompt (Xu et al. 2023, "ImageReward", NeurIPS)."""

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from huggingface_hub import hf_hub_download
from torch import Tensor, nn
from transformers import BertTokenizer

from scale.adapters.read import first_line, read, short_text
from scale.rewards.blip import fill, load_encoder, preprocess
from scale.rewards.protocol import Images, Scorer, device

HUB_ID = "THUDM/ImageReward"
WEIGHTS = ("ImageReward.safetensors", "ImageReward.pt")
SETTINGS, WORDS = "med_config.json", "vocab.txt"
WORDS_ID = "google-bert/bert-base-uncased"
LARGEST_TEXT = 10_000_000  # bytes
LENGTH = 35  # tokens of a prompt
MEAN, DEVIATION = 0.16717362830052426, 1.0333394966054072  # of the raw reward, on the paper's data
REMEDY = (
    f"`hf download {HUB_ID} {WEIGHTS[1]} {SETTINGS} --local-dir FOLDER` and "
    f"`hf download {WORDS_ID} {WORDS} --local-dir FOLDER` bring all it needs; then pass model=FOLDER"
)


class ImageReward(Scorer):
    """A linear network (768-1024-128-64-16-1) of BLIP's image-grounded [CLS] token, less its mean, by its deviation.

    `model` is a folder with `ImageReward.pt` (or `.safetensors`, the same keys), BLIP's `med_config.json` and
    `vocab.txt` of bert-base-uncased, or the hub id of the first two. The score has mean 0 and deviation 1 over the
    paper's data; good images reach 2. Prompts are cut at 35 tokens.

    Raises:
        ValueError: a file that is missing, unreadable, refused, or does not fit the others.
    """

    name = "imagereward"
    differentiable = True
    batch_size = 16

    def __init__(self, model: str | Path = HUB_ID) -> None:
        self.files = weights, settings, words = find(model)
        try:
            table = read(weights).tensors
            blip = {key.removeprefix("blip."): value for key, value in table.items() if key.startswith("blip.")}
            encoder = load_encoder(blip, _settings(settings))
            head = load_head({k.removeprefix("mlp.layers."): v for k, v in table.items() if k.startswith("mlp.")})
            self.tokenizer = load_tokenizer(words, encoder.text.config.vocab_size)
        except ValueError as error:
            raise ValueError(f"no ImageReward in {model}: {first_line(error)}; {REMEDY}") from error
        self.encoder = encoder.eval().requires_grad_(False).to(device())
        self.head = head.eval().requires_grad_(False).to(device())

    def _score(self, images: Images, prompts: Sequence[str]) -> Tensor:
        pixels = preprocess(images, self.encoder.size)
        tokens = self.tokenizer(
            list(prompts), padding="max_length", truncation=True, max_length=LENGTH, return_tensors="pt"
        ).to(images.device)
        seen = self.encoder(pixels, tokens["input_ids"], tokens["attention_mask"])
        return (self.head(seen).squeeze(-1) - MEAN) / DEVIATION


def find(model: str | Path) -> tuple[Path, Path, Path]:
    """The weights, the settings and the words, in a folder or from the hub; ValueError where one is missing."""
    folder = Path(model).expanduser()
    if not folder.is_dir():
        return _fetch(str(model), WEIGHTS[1]), _fetch(str(model), SETTINGS), _fetch(WORDS_ID, WORDS)
    weights = next((folder / name for name in WEIGHTS if (folder / name).is_file()), folder / WEIGHTS[1])
    files = weights, folder / SETTINGS, folder / WORDS
    missing = [path.name for path in files if not path.is_file()]
    if missing:
        raise ValueError(f"{folder} lacks {', '.join(missing)}; {REMEDY}")
    return files


def _fetch(repository: str, name: str) -> Path:
    try:
        return Path(hf_hub_download(repository, name))
    except Exception as error:  # offline, no such repository, a proxy's page: the remedy is the same
        raise ValueError(f"no folder {repository}, and the hub gives no {repository}/{name}; {REMEDY}") from error


def _settings(path: Path) -> dict:
    try:
        settings = json.loads(short_text(path, LARGEST_TEXT))
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{path} is no JSON: {first_line(error)}") from error
    if not isinstance(settings, dict):
        raise ValueError(f"{path} is no JSON object")
    return settings


def load_head(weights: dict[str, Tensor]) -> nn.Sequential:
    """The network on the [CLS] token; its dropouts keep the original's numbering, and it has no activations."""
    width = weights["0.weight"].shape[-1] if weights.get("0.weight", torch.zeros(())).ndim == 2 else 768
    with torch.device("meta"):
        head = nn.Sequential(
            nn.Linear(width, 1024),
            nn.Dropout(0.2),
            nn.Linear(1024, 128),
            nn.Dropout(0.2),
            nn.Linear(128, 64),
            nn.Dropout(0.1),
            nn.Linear(64, 16),
            nn.Linear(16, 1),
        )
    fill(head, weights)
    return head


def load_tokenizer(path: Path, size: int) -> BertTokenizer:
    """bert-base-uncased's words with BLIP's two additions, [DEC] and [ENC]; ValueError unless they are `size`."""
    words = short_text(path, LARGEST_TEXT).removesuffix("\n").split("\n")
    tokenizer = BertTokenizer(vocab={word: i for i, word in enumerate(words)})
    tokenizer.add_special_tokens({"bos_token": "[DEC]"})
    tokenizer.add_special_tokens({"additional_special_tokens": ["[ENC]"]})
    if len(tokenizer) != size:  # words twice, [CLS] missing, another BERT's: all show here
        raise ValueError(f"{path} makes {len(tokenizer)} words, the weights are for {size}")
    return tokenizer
