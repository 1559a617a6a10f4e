"""What stops, mends or watches a run that goes wrong."""
