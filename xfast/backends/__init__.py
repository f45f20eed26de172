"""Backends: one protocol (base.py), one file each. A backend sees spec, weights and packed tokens, never a model."""
