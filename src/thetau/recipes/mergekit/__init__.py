"""Recipes in mergekit's format: read, checked, and carried out by the engine."""
