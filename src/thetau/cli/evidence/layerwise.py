"""`thetau evidence gram-merged`: Gram matrices of the merged model's own activations, for RegMean++."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, final

from thetau.cli.common import Json, Out, TunedModels, check_folder
from thetau.cli.evidence.common import tell
from thetau.cli.options import with_options
from thetau.evaluate.options import Backbone, Reading
from thetau.options import Option


@final
@dataclass(frozen=True, kw_only=True)
class Layering:
    """How the Gram matrices are collected; what is not given is as `MomentConfig` and `regmean` have it."""

    off_diagonal: Annotated[float | None, Option("RegMean's factor for entries off the diagonal. Default 0.9.")] = None
    examples: Annotated[int | None, Option("Training examples of each task. Default 256.")] = None
    batch: Annotated[int | None, Option("Examples that run at once. Default 32.")] = None
    others: Annotated[Mapping[str, Any], Option("Any other field of the config, as split=validation.", flags=("--set",))] = field(
        default_factory=dict
    )

    def given(self) -> dict[str, Any]:
        """The fields of the config that were given."""
        own = {"examples": self.examples, "batch": self.batch}
        return {name: value for name, value in own.items() if value is not None} | dict(self.others)


@with_options
def gram_merged(models: TunedModels, out: Out, backbone: Backbone, options: Layering, reading: Reading, json: Json) -> None:
    """Collect Gram matrices for RegMean++: each block sees what the merged blocks below it give, not the model's own.

    The folder gets a file a task, of the kind `gram`: merge with `method: {name: regmean}` and the same factor.

    thetau evidence gram-merged runs/demo/finetuned/*/* -o grams
    """
    from thetau.errors import DataError
    from thetau.evaluate.session import Session
    from thetau.evidence import MomentConfig, collect_merged_grams
    from thetau.methods import RegMean

    json.check()
    check_folder(out)
    sizes = {"max_length": reading.max_length, "image_size": reading.image_size}
    config = MomentConfig.of({**sizes, **options.given()}, "thetau evidence gram-merged")
    method = RegMean() if options.off_diagonal is None else RegMean(off_diagonal=options.off_diagonal)
    session = Session.open(models, base=backbone.base, reading=reading)
    if session.tangent:
        raise DataError(
            "these models belong to the tangent space; Gram matrices are collected for models of the model's own space."
        )
    origins = {model.task: str(model.path) for model in session.models}
    result = collect_merged_grams(
        session.encoder, session.evaluator.tasks, session.expressions(), out, config, method=method, origins=origins
    )
    json.write(result.to_json())
    tell(
        f"{out}: {result.tensors} layers in {result.blocks} blocks, a file for each of {len(result.tasks)} tasks",
        result.notes,
        cached=result.cached,
    )
