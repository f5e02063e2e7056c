"""What is wrong with a recipe's parameters and odd about its models, told before anything is planned."""

from __future__ import annotations

from collections.abc import Sequence

from thetau.checkpoint.config import differences, part_like
from thetau.recipes.mergekit.findings import Findings, some
from thetau.recipes.mergekit.members import Model
from thetau.recipes.mergekit.methods import PARAMETERS, Spec
from thetau.recipes.mergekit.modules import Cut
from thetau.recipes.mergekit.schema import Choice, Script, Settings
from thetau.recipes.mergekit.settings import unknown

SHARES = ("density", "select_topk")


def check_parameters(script: Script, spec: Spec, found: Findings) -> None:
    """Problems of parameters that nobody knows, warnings of those that do nothing where they stand."""
    known = [*spec.shared, *spec.per_input]
    levels: list[tuple[Settings, bool]] = [(script.parameters, False)]
    for module in script.modules.values():
        levels += [(module.parameters, False), *((one.parameters, True) for one in module.models)]
        for piece in module.slices:
            levels += [(piece.parameters, False), *((one.parameters, True) for one in piece.sources)]
    for settings, inner in levels:
        for place, problem in unknown(settings, known, PARAMETERS, script.method):
            found.wrong(f"{script.document.at(place)}: {problem}")
        for key, setting in settings.items():
            if key in PARAMETERS and key not in known:
                found.notes.append(
                    f"{script.document.at(setting.where)}: `{key}` means nothing to {script.method}, there as here."
                )
            elif inner and key in spec.shared:
                found.warnings.append(
                    f"{script.document.at(setting.where)}: `{key}` is a setting of the whole merge; under a model it has no effect. Put it under `parameters`."
                )
            for choice in setting.choices:
                _check_share(script, found, key, choice)
    if spec.base is not None:
        _check_base_settings(script, spec, found)


def check_gradients(script: Script, cuts: Sequence[Cut], found: Findings) -> None:
    """A word on a gradient with more values than the layers that it is spread over: some of them hold nowhere."""
    for cut in cuts:
        for piece in cut.slices:
            layers = next((one.layers[1] - one.layers[0] for one in piece.sources if one.layers is not None), 0)
            levels = [script.parameters, cut.module.parameters, piece.parameters, *(one.parameters for one in piece.sources)]
            for choice in (choice for level in levels for setting in level.values() for choice in setting.choices):
                if isinstance(choice.value, tuple) and 1 < layers < len(choice.value):
                    found.note(
                        f"{script.document.at(choice.where)}: a gradient of {len(choice.value)} values is spread over {layers} layers: "
                        "some of its values hold nowhere."
                    )


def _check_share(script: Script, found: Findings, key: str, choice: Choice) -> None:
    """Warn of a density outside [0, 1]: nothing more than everything can be kept."""
    values = choice.value if isinstance(choice.value, tuple) else (choice.value,)
    outside = [value for value in values if isinstance(value, int | float) and not 0 <= value <= 1]
    if key in SHARES and outside:
        kept = "everything" if outside[0] > 1 else "nothing"
        found.warn(f"{script.document.at(choice.where)}: `{key}` is a share, from 0 to 1. Got {outside[0]!r}: {kept} is kept.")


def _check_base_settings(script: Script, spec: Spec, found: Findings) -> None:
    """Warn of what is set under the base, which has no vector of its own."""
    for module in script.modules.values():
        inputs = [(one, script.base) for one in module.models]
        inputs += [(one, piece.base or script.base) for piece in module.slices for one in piece.sources]
        for one, base in inputs:
            for key in spec.per_input if one.model == base else ():
                if key in one.parameters:
                    found.warn(
                        f"{script.document.at(one.parameters[key].where)}: `{key}` has no effect under the base, whose vector is zero."
                    )


def compare_configs(donor: Model, models: Sequence[Model], found: Findings) -> None:
    """A warning for each model whose config says another network than that of the result."""
    for model in models:
        lines = (
            differences(part_like(donor.config, model.config), part_like(model.config, donor.config))
            if model is not donor and donor.config and model.config
            else []
        )
        lines = [
            line
            for line in lines
            if not any(line.startswith(f"{key}:") or f".{key}:" in line for key in ("num_hidden_layers", "n_layer"))
        ]
        if lines:
            found.warnings.append(
                f"{model.label}: its config differs from that of {donor.label}, which the result keeps: {some(lines, '; ')}."
            )
