"""What an inner merge must know of its tasks' data, collected when a cluster asks for it: Fisher, RegMean, K-FAC, AdaMerging as inner methods of bases.

Fishers and second moments are a task's own, whichever cluster it is in. AdaMerging's coefficients are learned for the tasks of a cluster together, so
every cluster has its own.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, final

from thetau.bases.build import Evidence
from thetau.errors import RecipeError
from thetau.evaluate.evaluator import Evaluator
from thetau.evidence import (
    CoefficientConfig,
    FisherConfig,
    MomentConfig,
    collect_fisher,
    collect_second_moments,
    learn_coefficients,
)
from thetau.facade import Expression
from thetau.methods import AdaMerging, name_of
from thetau.models import read_weights
from thetau.parts import Method

_MOMENTS = ("gram", "gradients")


@final
@dataclass(frozen=True, kw_only=True)
class Collector:
    """Cluster → the evidence that `method` needs of its tasks, in files of `folder`, which a later run takes again.

    - `evaluator`: the base with the tasks and their heads. `models`: task → its fine-tuned model. `vectors`: the same over the base.
    - `fisher`, `moments`, `coefficients`: how each is collected; inputs are cut as these say.
    """

    method: Method
    evaluator: Evaluator
    models: Mapping[str, Path]
    vectors: Mapping[str, Expression]
    folder: Path
    fisher: FisherConfig = field(default_factory=FisherConfig)
    moments: MomentConfig = field(default_factory=MomentConfig)
    coefficients: CoefficientConfig = field(default_factory=CoefficientConfig)

    def __call__(self, cluster: tuple[str, ...]) -> Evidence:
        """The files, by kind and task.

        Raises:
            RecipeError: the method needs evidence of another kind.
            DataError: a task has no example, or nothing that its evidence could be taken from.
        """
        return {kind: self._of(kind, tuple(sorted(cluster))) for kind in self.method.chain().needs}

    def _of(self, kind: str, cluster: tuple[str, ...]) -> Mapping[str, Path]:
        if kind == "coefficients":
            return self._learned(cluster)
        if kind != "fisher" and kind not in _MOMENTS:
            raise RecipeError([f"`{name_of(self.method)}` needs the evidence `{kind}`, which is not collected here."], "inner")
        files = {task: self.folder / kind / f"{task}.safetensors" for task in cluster}
        for task, file in files.items():
            file.parent.mkdir(parents=True, exist_ok=True)
            self.evaluator.load_base()
            weights = read_weights(self.models[task], base=self.evaluator.encoder.folder)
            about: dict[str, Any] = {"origin": str(self.models[task]), "head": self.evaluator.heads[task]}
            given = (self.evaluator.encoder, self.evaluator.tasks[task], weights, file)
            if kind == "fisher":
                collect_fisher(*given, self.fisher, **about)
            else:
                which: Any = kind
                collect_second_moments(*given, which, self.moments, **about)
        return files

    def _learned(self, cluster: tuple[str, ...]) -> Mapping[str, Path]:
        if not isinstance(self.method, AdaMerging):
            raise RecipeError(
                [f"`{name_of(self.method)}` needs coefficients, which are learned for `adamerging` alone."], "inner"
            )
        self.evaluator.load_base()
        name = hashlib.blake2b(",".join(cluster).encode(), digest_size=6).hexdigest()
        return learn_coefficients(
            self.evaluator.encoder,
            {task: self.evaluator.tasks[task] for task in cluster},
            {task: self.vectors[task] for task in cluster},
            self.folder / "coefficients" / name,
            self.coefficients,
            method=self.method,
            heads={task: self.evaluator.heads[task] for task in cluster},
            origins={task: str(self.models[task]) for task in cluster},
        ).files
