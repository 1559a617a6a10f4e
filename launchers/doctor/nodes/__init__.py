"""`crosstune doctor nodes`: what would break a run over several machines, found before it starts."""
