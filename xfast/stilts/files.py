"""Files that appear whole or not at all, and files in a data folder."""

from __future__ import annotations

from pathlib import Path


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text; whoever reads meanwhile, or after a crash, sees the old file or the new one."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def find(folder: Path, relative: str) -> Path | None:
    """The file of that name in XTREME's download folder, or in a folder that holds it as ``xtreme/``; None: neither."""
    for path in (folder / "xtreme" / relative, folder / relative):
        if path.is_file():
            return path
    return None
