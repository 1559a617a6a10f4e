"""Starts any step somewhere; the `crosstune` command."""
