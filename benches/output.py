"""What every bench's command shares: `--json FILE`, and how that file is written."""

import json
from pathlib import Path
from typing import Annotated, Any

import tyro

from dbtheory.files import write_atomically

JsonFile = Annotated[Path | None, tyro.conf.arg(name="json", help="Also write the figures to this file.")]


def write_record(file: Path | None, record: Any) -> None:
    """The figures as JSON, whole or not at all; nothing without a file."""
    if file is not None:
        write_atomically(file, lambda path: path.write_text(json.dumps(record, indent=1) + "\n"))
