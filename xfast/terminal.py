"""What commands have in common: the flag that asks for JSON, and lists parted by commas."""

from __future__ import annotations

from typing import Annotated

import typer

JsonFlag = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout and nothing else.")]


def listed(text: str) -> tuple[str, ...]:
    """The parts of ``a, b,c`` without the spaces around them; empty ones are left out."""
    return tuple(part.strip() for part in text.split(",") if part.strip())
