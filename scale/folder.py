"""The folder of `generate`: PNG files named by numbers, and one record that lists them with their hashes."""

import json
import re
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from dbtheory.files import write_atomically
from scale.hashes import sha256
from scale.pipeline import Picture

RECORD = "generation.json"
PICTURE = re.compile(r"\d{5,}-\d+\.png")


def earlier_pictures(folder: Path) -> list[Path]:
    """The pictures of an earlier run, which a new one may replace: all that its record lists, unchanged since.

    Files of other names are none of our business, and stay.

    Raises:
        ValueError: a picture that no record lists or that changed since, or a `generation.json` of somebody else:
            they would be lost, or pass for what the new record describes.
    """
    listed = _listed(folder / RECORD)
    found = sorted(path for path in folder.glob("*.png") if PICTURE.fullmatch(path.name))
    foreign = [path.name for path in found if not path.is_file() or listed.get(path.name) != sha256(path)]
    if foreign:
        raise ValueError(
            f"the folder {folder} holds {len(foreign)} pictures that its record does not list, or that changed since "
            f"({foreign[0]}, ...): move them away, or choose another folder"
        )
    return found


def remove_earlier(folder: Path, pictures: list[Path]) -> None:
    """Remove an earlier run's pictures, and their record first: an old record must not describe new pictures."""
    (folder / RECORD).unlink(missing_ok=True)
    for path in pictures:
        path.unlink(missing_ok=True)


def save_picture(folder: Path, picture: Picture, pixels: Tensor) -> dict[str, Any]:
    """Write `pixels (H, W, 3)` of uint8 as a PNG file; what the record says of the file."""
    # numbers alone name the file: a prompt may hold path separators
    name = f"{picture.index:05d}-{picture.seed}.png"
    write_atomically(folder / name, lambda path: Image.fromarray(pixels.numpy()).save(path))
    return {"file": name, "sha256": sha256(folder / name), "prompt": picture.prompt, "seed": picture.seed}


def write_record(folder: Path, record: dict[str, Any]) -> None:
    """Write the record whole; a failure leaves the one that was there."""
    text = json.dumps(record, indent=1, allow_nan=False) + "\n"
    write_atomically(folder / RECORD, lambda path: path.write_text(text, encoding="utf-8"))


def _listed(record: Path) -> dict[str, str]:
    """The hashes by file that a record lists, which anybody may have written; none where there is no record."""
    if not record.exists():
        return {}
    try:
        images = json.loads(record.read_text(encoding="utf-8"))["images"]
        return {image["file"]: image["sha256"] for image in images}
    except (OSError, ValueError, RecursionError, LookupError, TypeError) as error:
        raise ValueError(f"{record} is no record of dblend generate: move it away, or choose another folder") from error
