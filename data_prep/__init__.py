"""Raw records -> prepared data."""
