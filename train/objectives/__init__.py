"""From a micro-batch to a loss sum."""
