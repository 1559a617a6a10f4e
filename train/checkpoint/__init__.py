"""Checkpoints that any engine reads."""
