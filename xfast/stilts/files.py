"""Files in a data folder."""

from __future__ import annotations

from pathlib import Path


def find(folder: Path, relative: str) -> Path | None:
    """The file of that name in XTREME's download folder, or in a folder that holds it as ``xtreme/``; None: neither."""
    for path in (folder / "xtreme" / relative, folder / relative):
        if path.is_file():
            return path
    return None
