"""What is here, what is missing, and what a model would miss on a device."""
