"""One file of dataclasses per config group: types, defaults, units, checks."""
