"""Collectors of what data-dependent methods need of a live model and data."""
