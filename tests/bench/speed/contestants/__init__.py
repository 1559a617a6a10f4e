"""What crosstune is measured against: scripts, each run by an interpreter of its own; JSON is the last line."""
