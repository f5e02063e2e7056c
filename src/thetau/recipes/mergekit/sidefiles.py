"""What lies beside the weights of the output: the config as its layers, heads and vocabulary have become, and the tokenizer's files."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from thetau.checkpoint.config import has_config, out_of_step, read_config, with_depth
from thetau.recipes.mergekit.findings import Findings
from thetau.recipes.mergekit.layout import is_head
from thetau.recipes.mergekit.members import Model, Slot
from thetau.recipes.mergekit.modules import Cut
from thetau.recipes.mergekit.tokens import Vocabulary

GENERATION = "generation_config.json"


def side_files(
    donor: Model,
    beside: Model,
    cuts: Sequence[Cut],
    slots: Sequence[Slot],
    vocabulary: Vocabulary | None,
    architecture: str | None,
    found: Findings,
) -> dict[str, Any]:
    """The files that are not as in the folder of `beside`, the donor or another model that is as deep; `architecture` is what the recipe says
    instead of the config.

    Raises:
        CheckpointError: the config does not say how many layers there are, or cannot say what became of them.
    """
    config = dict(beside.config)
    changed = _deepened(donor, cuts, config, found)
    if changed.get("tie_word_embeddings") and any(is_head(slot.name) and slot.name not in donor.names for slot in slots):
        changed = {**changed, "tie_word_embeddings": False}
    files: dict[str, Any] = {}
    folder = beside.source.folder
    if vocabulary is not None:
        changed = vocabulary.config(changed, beside.label)
        files |= vocabulary.files
        if folder is not None and has_config(folder, GENERATION):
            files[GENERATION] = vocabulary.config(read_config(folder, GENERATION), beside.label)
    if architecture:
        changed = {**changed, "architectures": [architecture]}
    return {**files, "config.json": changed} if changed != config or folder is None else files


def _deepened(donor: Model, cuts: Sequence[Cut], config: dict[str, Any], found: Findings) -> dict[str, Any]:
    """The config with the depth of each tower that is cut."""
    changed = config
    for cut in cuts:
        container = cut.tower.container
        if container is None or not cut.module.slices or not config:
            continue
        origin = [layer.indices[0] for layer in cut.layers()]
        if origin != list(range(donor.depth(container))):
            changed = with_depth(changed, container, origin)
            found.warnings += [
                f"the config of {donor.label} gives layers their kind by their number (`{said}`): some of {container!r} get another "
                "kind than they had. Take ranges that keep the rhythm, or say each layer's kind in the config (`layer_types`)."
                for said in out_of_step(config, container, origin)
            ]
    return changed
