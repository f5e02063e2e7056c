"""Recipes: the YAML that says base, models, method and output; complete, so that a run can be repeated from it. mergekit's are read too."""

from thetau.recipes.loading import from_mapping as from_mapping
from thetau.recipes.loading import load as load
from thetau.recipes.mergekit.recipe import MergekitRecipe as MergekitRecipe
from thetau.recipes.schema import Recipe as Recipe
