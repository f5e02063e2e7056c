"""mergekit's recipes, as they are: their keys, their semantics, and what they become here."""
