"""Peak memory of training, in a process of its own."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from thetau.errors import DataError
from thetau.finetune.config import FinetuneConfig
from thetau.studies.memory import peak, peak_of_training
from tiny import make_model, make_task
from tiny import one_thread as one_thread


def test_what_the_caller_held_does_not_count(tmp_path: Path) -> None:
    """A process that was started by a large one still says its own peak; the old figure was that of all the rows before."""
    model, data = make_model(tmp_path / "model"), make_task(tmp_path / "data", "animals")
    held = np.ones(150_000_000)  # 1.2 GB, written to
    assert peak() > held.nbytes / 1e9
    found = peak_of_training(str(model), [str(data)], FinetuneConfig(batch_size=8, max_length=24))
    assert 0.1 < found < peak() - 1.0, "a tiny model, and the libraries"


def test_a_process_that_fails_says_why(tmp_path: Path) -> None:
    model = make_model(tmp_path / "model")
    with pytest.raises(DataError, match=r"measures memory failed\. It said: .*no task 'nothing'"):
        peak_of_training(str(model), ["nothing"], FinetuneConfig(batch_size=8, max_length=24))
