"""SD3 and SD3.5."""
