"""Mixtures of experts out of dense models, from `mergekit-moe` configs as they are: experts in place of each MLP, gates from prompts."""

from thetau.recipes.mergekit.moe.build import is_moe as is_moe
from thetau.recipes.mergekit.moe.build import moe as moe
from thetau.recipes.mergekit.moe.gates import bring_states as bring_states
