"""Which form a checkpoint is quantised in, told from its config and from the names and dtypes of its tensors; both must agree."""

from __future__ import annotations

from thetau.checkpoint.dtypes import SCALED
from thetau.checkpoint.quantised.awq import Awq
from thetau.checkpoint.quantised.bitsandbytes import FourBit, Int8
from thetau.checkpoint.quantised.compressed_tensors import PackedInts, PlainInts
from thetau.checkpoint.quantised.form import Form, Said, Weight, damaged
from thetau.checkpoint.quantised.fp4 import Fp4, GptOss
from thetau.checkpoint.quantised.fp8 import Fp8
from thetau.checkpoint.quantised.gptq import Gptq
from thetau.checkpoint.quantised.refused import ACTIVATIONS, check_left, check_method
from thetau.checkpoint.quantised.said import model_dtype, read_said
from thetau.checkpoint.quantised.source import QuantisedSource
from thetau.checkpoint.source import Source
from thetau.errors import CheckpointError

FORMS: tuple[Form, ...] = (Int8(), FourBit(), Gptq(), Awq(), GptOss(), Fp4(), PackedInts(), PlainInts(), Fp8())
WHOLE = "The whole model is what to give; if its weights are of full precision, take this entry out of the config."


def dequantised(stored: Source) -> Source:
    """A quantised model as a plain one, every other source as it is. Only headers are read, and the few bytes that describe a form.

    Raises:
        CheckpointError: the form is not read, parts of it are missing or of another shape, or config and weights contradict each other.
    """
    if stored.degree != 1 or stored.partial or "thetau.form" in stored.metadata:
        check_left({name: spec for name, spec in stored.specs.items() if spec.dtype in SCALED}, Said())
        return stored
    beside = read_said(stored.folder)
    said = beside or Said()
    check_method(stored, said)
    found: dict[str, Weight] = {}
    forms: dict[str, Form] = {}
    taken: dict[str, str] = {}
    for form in FORMS:
        for weight in form.find(stored, said):
            _check_said(stored, weight, form, beside)
            for name in weight.parts.values():
                if name in taken:
                    damaged(
                        stored,
                        name,
                        f"is a part of {weight.name!r} in {form.title} and of {taken[name]!r} in {forms[taken[name]].title}: only one can be.",
                    )
                taken[name] = weight.name
            if weight.name in found or (weight.name in stored.specs and weight.name not in weight.parts.values()):
                damaged(
                    stored,
                    next(iter(weight.parts.values())),
                    f"gives {weight.name!r} in {form.title}, which the file holds besides: only one can be meant.",
                )
            found[weight.name], forms[weight.name] = weight, form
    left = {name: spec for name, spec in stored.specs.items() if name not in taken}
    idle = [name for name in left if ACTIVATIONS.search(name)] if found else []
    check_left({name: spec for name, spec in left.items() if name not in idle}, said)
    if not found:
        _check_plain(stored, said)
        return stored
    titles = list(dict.fromkeys(form.title for form in forms.values()))
    return QuantisedSource(stored, found, titles, beside, model_dtype(stored.folder), idle)


def _check_said(stored: Source, weight: Weight, form: Form, beside: Said | None) -> None:
    """Refuse a weight that the config does not explain."""
    if beside is not None and beside.method not in form.methods:
        name = next(iter(weight.parts.values()))
        says = f"says `{beside.method}`" if beside.method else "says nothing of quantisation"
        damaged(
            stored,
            name,
            f"is a part of {weight.name!r} in {form.title}, and {beside.file} {says}. Config and weights must be of one model: "
            "give the config that was saved with these weights.",
        )


def _check_plain(stored: Source, said: Said) -> None:
    """Refuse a config that promises quantised weights where there are none."""
    table = said.table
    cache_only = (
        said.method in ("compressed-tensors", "modelopt") and not table.get("config_groups") and not table.get("quant_algo")
    )
    if said.method and not cache_only:
        name, spec = next(
            ((name, spec) for name, spec in stored.specs.items() if len(spec.shape) > 1), next(iter(stored.specs.items()))
        )
        raise CheckpointError(
            f"{said.file}: says that the weights are quantised (`{said.method}`), and none of {stored.label} is: {name!r} is "
            f"{str(spec.dtype).removeprefix('torch.')} and has no scales. {WHOLE}"
        )
