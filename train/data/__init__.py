"""Prepared data, the batch plan and its tensors."""
