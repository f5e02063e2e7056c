"""Three tiny tasks and a model of each, learnt in a few steps, with a session over them."""

from __future__ import annotations

import json
from pathlib import Path

from thetau.evaluate import Session
from thetau.evaluate.options import Reading
from thetau.finetune import FinetuneConfig, finetune
from thetau.models import load_encoder
from thetau.tasks import load_task
from tiny import make_model, make_task

NAMES = ("animals", "third", "weather")


class World:
    """Three tasks, learnt in a few steps."""

    def __init__(self, root: Path) -> None:
        self.base, self.data = make_model(root / "model"), root / "data"
        make_task(self.data, "weather")
        third = make_task(root / "d", "animals")
        facts = json.loads((third / "meta.json").read_text()) | {"task": "third"}
        (third / "meta.json").write_text(json.dumps(facts))
        third.rename(self.data / "third")
        make_task(self.data, "animals")
        encoder = load_encoder(self.base)
        self.models = []
        for number, name in enumerate(NAMES):
            config = FinetuneConfig(steps=12, lr=4e-3, batch_size=8, max_length=24, seed=number)
            finetune(encoder, load_task(name, self.data), root / name, config, base=str(self.base))
            self.models.append(root / name)
        self.session = Session.open(
            self.models, base=self.base, limits={"validation": 20, "test": 20}, reading=Reading(data=self.data, cache=root / "c")
        )
