"""A study as a folder to read: a page, the document itself, every table in three formats, every figure as an image."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

from xfast import files
from xfast.study import contents, report_html, tables, view
from xfast.study.answer import answer
from xfast.study.document import Study
from xfast.study.plots import KEYS, PROBE, Plot, plots

_WRITERS = {"csv": tables.to_csv, "md": tables.to_markdown, "tex": tables.to_latex}


def write(study: Study, folder: Path) -> dict[str, Path]:
    """Write index.html, study.json, tables/*.{csv,md,tex} and figures/*.png, each whole or not at all.

    The page is written last, so that whoever finds a new one finds the files it links to. Tables and figures of an
    earlier report that this study does not have are removed.

    Args:
        study: the document.
        folder: where; created if need be.

    Returns:
        What was written, by its path inside the folder, with "/".

    Raises:
        InvalidInputError: a figure of the study is not finite, or a name in it is not defined.
        InvalidOptionError: the folder cannot be written.
        BackendUnavailableError: matplotlib is not installed.
    """
    view.check(study)
    made, drawn = contents.tables(study), plots(study)
    content = {"study.json": json.dumps(study, indent=1, allow_nan=False).encode() + b"\n"}
    for table in made:
        content |= {f"tables/{table.key}.{end}": write_as(table).encode() for end, write_as in _WRITERS.items()}
    content |= {f"figures/{plot.key}.png": plot.png for plot in drawn if isinstance(plot, Plot)}
    content["index.html"] = report_html.page(study, answer(study), made, drawn).encode()
    written = {name: folder / name for name in content}
    for name, path in written.items():
        files.save("folder", path, content[name])
    for path in _own(folder) - set(written.values()):
        with contextlib.suppress(OSError):
            path.unlink()
    return written


def _own(folder: Path) -> set[Path]:
    """Everything in the folder that a report can have written there but the page and the document."""
    tables_there = {folder / f"tables/{key}.{end}" for key in contents.KEYS for end in _WRITERS}
    figures_there = {folder / f"figures/{key}.png" for key in KEYS} | set(folder.glob(f"figures/{PROBE}*.png"))
    return {path for path in tables_there | figures_there if path.exists()}
