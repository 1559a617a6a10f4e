"""From a model config to a model, and what each family needs."""
