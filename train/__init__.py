"""Prepared data -> checkpoints -> exports and figures."""
