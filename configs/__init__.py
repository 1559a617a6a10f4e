"""What can be chosen, its types and its faults."""
