"""Writing small files so that nothing is half-written."""

import os
from pathlib import Path


def write_text(path: Path, text: str) -> None:
    """Write a file aside, sync it, and rename it: readers see the old or the new content, never half of it."""
    aside = path.with_name(f".{path.name}.tmp")
    with aside.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    aside.replace(path)
