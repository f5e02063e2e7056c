"""What every test shares: no network, reproducible examples, and a base with two models made from it."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports huggingface_hub
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"

from pathlib import Path

import hypothesis
import pytest

from fixtures import random_weights, shifted, write_model

hypothesis.settings.register_profile(
    "thetau", deadline=None, derandomize=True, suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture]
)
hypothesis.settings.load_profile("thetau")


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A model folder with every kind of tensor."""
    return write_model(tmp_path / "base", random_weights(0))


@pytest.fixture
def models(tmp_path: Path, base: Path) -> list[Path]:
    """Two models fine-tuned from `base`."""
    return [write_model(tmp_path / f"model{seed}", shifted(random_weights(0), seed)) for seed in (1, 2)]
