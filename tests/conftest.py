"""What every test shares: no network, reproducible examples, and a base with two models made from it."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports huggingface_hub
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
if "PYTEST_XDIST_WORKER" in os.environ:  # the workers share the cores, and so do the processes that they start
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // int(os.environ["PYTEST_XDIST_WORKER_COUNT"]))))

from pathlib import Path

import hypothesis
import pytest

import checker

checker.install("thetau")  # before anything imports it

from fixtures import random_weights, shifted, write_model  # noqa: E402

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
