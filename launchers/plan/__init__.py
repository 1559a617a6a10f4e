"""`crosstune plan`: what a run would need, before it starts."""
