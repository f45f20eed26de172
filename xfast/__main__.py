"""``python -m xfast`` is the same as ``xfast``."""

from __future__ import annotations

from xfast.cli import app

if __name__ == "__main__":
    app(prog_name="xfast")
