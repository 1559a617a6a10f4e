"""What a run will need, predicted from its config before anything starts."""
