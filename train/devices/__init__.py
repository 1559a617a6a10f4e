"""The device layer; the only place in this room that names a vendor."""
