"""Who holds parameters, gradients and optimizer state, and how they are spread over ranks."""
