"""From a checkpoint to files that others open."""
