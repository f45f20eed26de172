"""``xfast encode``: embeddings or predictions for whole files of text, on one machine or a Ray cluster."""

from __future__ import annotations
