"""What a study is going to do, said before it begins."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from rich.console import Console

from xfast.study.factors import Settings


def say(settings: Settings, made: Any, console: Console) -> None:
    """Say what will be measured, how long that takes, and what is left out; ``made`` is a ``run.Plan``."""
    total = made.visits * settings.rounds
    time_ = "unknown on this device" if made.seconds is None else f"about {_duration(made.seconds)}, to a factor of 2"
    disk = ""
    if made.disk_bytes:
        disk = f"; disk about {made.disk_bytes / 1e9:.1f} GB at a time for packed artifacts"
        disk += f", {_duration(made.converting_s)} of the time to make them"
    console.print(
        f"{len(made.pairs)} task-language pairs, {len(made.languages)} languages, {len(made.groups)} model-engine "
        f"groups, {total} visits; time {time_}; memory about {made.memory_bytes / 1e9:.1f} GB{disk}",
        highlight=False,
    )
    for line in _left_out(made):
        console.print(line, style="yellow", markup=False, highlight=False)


def _left_out(made: Any) -> Iterable[str]:
    yield from (f"skipped: {one['what']}: {one['why']}" for one in made.skipped)
    yield from made.notes


def _duration(seconds: float) -> str:
    return f"{seconds / 3600:.1f} h" if seconds >= 5400 else f"{max(1, round(seconds / 60))} min"
