"""Files that training scripts leave: the weights inside, whatever lies beside them; placeholders and parts are refused with the remedy."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import thetau
from fixtures import assert_same, random_weights, shifted, write_model
from thetau.errors import AlignmentError, CheckpointError

State = dict[str, Tensor]


def optimizer(weights: State) -> dict[str, Any]:
    return {"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": [{"lr": 0.1}]}


FORMS: dict[str, Callable[[State], dict[str, Any]]] = {
    "pytorch": lambda w: {
        "epoch": 1,
        "model_state_dict": w,
        "optimizer_state_dict": optimizer(w),
        "loss": 0.1,
        "scheduler": {},
        "seed": 1,
    },
    "lightning": lambda w: {
        "epoch": 3,
        "global_step": 9,
        "pytorch-lightning_version": "2.0",
        "state_dict": {f"model.{name}": value for name, value in w.items()},
        "loops": {"fit_loop": {}},
        "callbacks": {},
        "optimizer_states": [optimizer(w)],
        "lr_schedulers": [],
    },
    "timm": lambda w: {
        "epoch": 3,
        "arch": "vit",
        "state_dict": w,
        "state_dict_ema": {name: value + 5 for name, value in w.items()},
        "optimizer": optimizer(w),
        "version": 2,
        "args": argparse.Namespace(lr=0.1, name="x"),
        "amp_scaler": {},
        "metric": 0.9,
    },
    "open_clip": lambda w: {
        "epoch": 3,
        "name": "run",
        "state_dict": {f"module.{k}": v for k, v in w.items()},
        "optimizer": optimizer(w),
        "scaler": {},
    },
    "nanogpt": lambda w: {
        "model": {f"_orig_mod.{name}": value for name, value in w.items()},
        "optimizer": optimizer(w),
        "model_args": {"n_layer": 2},
        "iter_num": 10,
        "best_val_loss": torch.tensor(1.0),
        "config": {"lr": 0.1},
    },
    "deepspeed": lambda w: {
        "module": w,
        "buffer_names": [],
        "optimizer": None,
        "ds_config": {},
        "dp_world_size": 1,
        "global_steps": 3,
    },
    "nested": lambda w: {"epoch": 1, "model": {"state_dict": w}, "a": 1, "b": 2, "c": 3},
}


@pytest.mark.parametrize("suffix", ["pt", "pth", "ckpt", "bin"])
@pytest.mark.parametrize("form", FORMS)
def test_the_weights_inside(tmp_path: Path, form: str, suffix: str) -> None:
    base, model = random_weights(0), shifted(random_weights(0), 1)
    file = tmp_path / f"last.{suffix}"
    torch.save(FORMS[form](model), file)
    start = thetau.open(base)
    assert_same((start + thetau.merge([thetau.open(file) - start], thetau.methods.Average())).state_dict(), model)
    (tmp_path / "folder").mkdir()
    file.rename(tmp_path / "folder" / file.name)
    assert (thetau.open(tmp_path / "folder") - thetau.open(model)).norm() == 0


def test_a_note_says_what_was_left_out(tmp_path: Path) -> None:
    torch.save(FORMS["timm"](random_weights(0)), tmp_path / "last.ckpt")
    (source,) = thetau.open(tmp_path / "last.ckpt").sources()
    assert "the weights are those under 'state_dict'" in source.notes[0] and "state_dict_ema" in source.notes[0]


def test_several_unknown_sets_are_named(tmp_path: Path) -> None:
    torch.save({"student": {"a": torch.ones(2)}, "teacher": {"a": torch.ones(2)}}, tmp_path / "two.pt")
    with pytest.raises(CheckpointError, match="holds several sets of tensors, 'student', 'teacher'"):
        thetau.open(tmp_path / "two.pt")


class Evil:
    def __reduce__(self) -> Any:
        return (print, ("ran",))


def test_code_is_never_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({**FORMS["pytorch"](random_weights(0)), "evil": Evil()}, tmp_path / "evil.ckpt")
    with pytest.raises(CheckpointError, match="loading it could run code, so it was not loaded"):
        thetau.open(tmp_path / "evil.ckpt")
    assert "ran" not in capsys.readouterr().out


def test_placeholders_of_zero_3_are_refused(tmp_path: Path) -> None:
    weights = random_weights(0)
    empty = {name: torch.empty(0) for name in weights}
    torch.save({"module": empty, "ds_config": {}}, tmp_path / "zero.pt")
    with pytest.raises(CheckpointError, match=r"are empty, such as .*run its `zero_to_fp32.py`"):
        thetau.open(tmp_path / "zero.pt")
    files = write_model(tmp_path / "trained", empty), write_model(tmp_path / "base", weights)
    with pytest.raises(AlignmentError, match=r"is empty where .*\[8, 16\].*zero_to_fp32"):
        thetau.merge([thetau.open(files[0]) - thetau.open(files[1])], thetau.methods.Average())


def test_parts_of_a_checkpoint_name_the_tool_that_joins_them(tmp_path: Path) -> None:
    (tmp_path / "zero" / "global_step3").mkdir(parents=True)
    torch.save({}, tmp_path / "zero" / "global_step3" / "zero_pp_rank_0_mp_rank_00_model_states.pt")
    with pytest.raises(CheckpointError, match=r"Run `zero_to_fp32\.py`"):
        thetau.open(tmp_path / "zero")
    (tmp_path / "fsdp").mkdir()
    (tmp_path / "fsdp" / "__0_0.distcp").write_bytes(b"x")
    with pytest.raises(CheckpointError, match="dcp_to_torch"):
        thetau.open(tmp_path / "fsdp")
