"""Metrics, progress, reports."""
