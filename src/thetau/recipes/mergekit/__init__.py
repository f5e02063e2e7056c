<<<<<<< HEAD
"""mergekit's recipes, as they are: their keys, their semantics, and what they become here."""
=======
"""Recipes in mergekit's format: read, checked, and carried out by the engine."""
>>>>>>> cat-tokens
