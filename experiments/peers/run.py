"""Matrix methods beside FusionBench's, and TIES beside sd-mecha's: the same tensors, one thread, the processor's seconds.

    make peers        # python -m experiments.peers.run --peers .venv-peers/bin/python [--only wudi …] [--size 280m]

FusionBench's functions are called on tensors in memory, float32, of one Llama block of the `280m` shapes (K = 4, differences with a falling
spectrum), and so is `thetau.merge`; loading is not counted on either side. Theirs of WUDI is run for a few of its 300 steps and scaled, as each
step is the same work; ours is run whole. DOGE-TA, whose steps cannot be lessened there, has two of the block's matrices. Where both do the same
thing, the results are compared; Iso-C parts by the few smallest directions of square matrices, which are below rounding and left out here.
sd-mecha merges whole files of `--size` by TIES, reading and writing included, and so does `thetau merge`, with its start-up.
Each row is kept in experiments/peers/results.json as it is made; a second run makes those that `--only` names again.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

import thetau
from experiments.common import ROOT, machine, timed, write_result
from experiments.engine.run import RANK, SHAPES, places
from experiments.peers.theirs import FEWER
from thetau import methods

HERE = Path(__file__).parent
OUT, THEIRS = HERE / "results.json", HERE / "theirs.py"
TASKS = 4
STEPS = 300


@dataclass(frozen=True, kw_only=True)
class Contest:
    """What FusionBench calls it; ours that does the same, and ours at its defaults; how much of theirs is run; tensors (None: all)."""

    theirs: str
    same: Any
    ours: Any
    share: float = 1.0
    tensors: tuple[str, ...] | None = None


CONTESTS: dict[str, Contest] = {
    "wudi": Contest(
        theirs="wudi",
        same=methods.Wudi(solver="adam", lr=1e-5, lr_absolute=True, steps=STEPS),
        ours=methods.Wudi(solver="gradient_flow"),
        share=FEWER / STEPS,
    ),
    "tsv_m": Contest(theirs="tsv_m", same=methods.build("tsv_m", {"rank": "full"}), ours=methods.build("tsv_m", {})),
    "iso_c": Contest(theirs="iso_c", same=methods.build("iso_c", {}), ours=methods.build("iso_c", {})),
    "doge_ta": Contest(
        theirs="doge_ta",
        same=methods.build("doge_ta", {}),
        ours=methods.build("doge_ta", {}),
        tensors=("self_attn.q_proj", "self_attn.o_proj"),
    ),
}


def block(folder: Path, tensors: Sequence[str] | None) -> Path:
    """The models of one block, or of some of its matrices, made once."""
    out = folder / ("block" if tensors is None else "-".join(name.rpartition(".")[2] for name in tensors))
    out.mkdir(parents=True, exist_ok=True)
    hidden, inner, _, _ = SHAPES["280m"]
    shapes = {f"self_attn.{part}_proj": (hidden, hidden) for part in "qkvo"}
    shapes |= {"mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden), "mlp.down_proj": (hidden, inner)}
    chosen = {name: shape for name, shape in shapes.items() if tensors is None or name in tensors}
    for number in range(TASKS + 1):
        path = out / ("base.safetensors" if number == 0 else f"m{number - 1}.safetensors")
        if path.is_file():
            continue
        made = {}
        for index, (name, (rows, columns)) in enumerate(chosen.items()):
            tensor = torch.randn(rows, columns, generator=torch.Generator().manual_seed(index)) * 0.02
            if number:
                noise = torch.Generator().manual_seed(1000 * number + index)
                decay = torch.arange(1, RANK + 1) ** -0.5
                left, right = torch.randn(rows, RANK, generator=noise), torch.randn(RANK, columns, generator=noise)
                whole = torch.randn(rows, columns, generator=noise)  # so that no direction is missing, where libraries part
                tensor += ((left * (decay / decay.norm())) @ right + 0.1 * whole) * 0.001
            made[f"model.encoder.layers.0.{name}.weight"] = tensor
        save_file(made, path)
    return out


def merged(folder: Path, method: Any) -> tuple[float, dict[str, torch.Tensor]]:
    """Our merge of tensors in memory: the processor's seconds, and the vector."""
    base, *models = (
        thetau.open(load_file(folder / name))
        for name in ("base.safetensors", *(f"m{index}.safetensors" for index in range(TASKS)))
    )
    begin = time.process_time()
    vector = thetau.merge([model - base for model in models], method, engine=thetau.Engine(workers=1)).state_dict()
    return time.process_time() - begin, vector


def contest(name: str, folder: Path, peers: str) -> dict[str, Any]:
    """One row against FusionBench."""
    one = CONTESTS[name]
    place = block(folder, one.tensors)
    out = folder / "theirs.safetensors"
    theirs = told([peers, str(THEIRS), one.theirs, str(place), str(out)]) | {"share": one.share}
    seconds, vector = merged(place, one.ours)
    same, equal = (seconds, vector) if one.same == one.ours else merged(place, one.same)
    row = {
        "peer": "FusionBench 0.2.33",
        "peer_seconds": theirs["processor"] / one.share,
        "same_seconds": same,
        "same_times": theirs["processor"] / one.share / same,
        "seconds": seconds,
        "times": theirs["processor"] / one.share / seconds,
    }
    if one.share == 1:
        other = load_file(out)
        apart = sum(float((equal[key].float() - tensor).square().sum()) for key, tensor in other.items())
        row["apart"] = (apart / sum(float(tensor.square().sum()) for tensor in other.values())) ** 0.5
    return row


def ties(folder: Path, peers: str, size: str) -> dict[str, Any]:
    """TIES of whole files against sd-mecha."""
    again = [sys.executable, "-c", f"from experiments.peers.run import *; build_models(Path({str(folder)!r}), {size!r})"]
    subprocess.run(again, check=True, cwd=ROOT)  # this process stays small
    paths = places(folder, size)[: TASKS + 1]
    flat = folder / f"flat-{size}"
    flat.mkdir(exist_ok=True)
    for number, path in enumerate(paths):
        link = flat / ("base.safetensors" if number == 0 else f"m{number - 1}.safetensors")
        if not link.exists():
            link.symlink_to((path / "model.safetensors").resolve())
    theirs = told([peers, str(THEIRS), "ties", str(flat), str(folder / "sd-mecha.safetensors")])
    models = [argument for path in paths[1:] for argument in ("--model", str(path))]
    command = [sys.executable, "-m", "thetau", "merge", "--quiet", "--base", str(paths[0]), *models, "--method", "ties"]
    seconds, _, _, processor = timed(
        [*command, "--set", "trim=tensor", "--workers", "1", "-o", str(folder / "out")], folder / "out"
    )
    return {
        "peer": "sd-mecha 1.1.5",
        "peer_seconds": theirs["processor"],
        "peer_clock": theirs["seconds"],
        "seconds": processor,
        "clock": seconds,
        "times": theirs["processor"] / processor,
    }


def told(command: Sequence[str]) -> dict[str, Any]:
    """What a peer printed last."""
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def main() -> None:
    """As the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", required=True, help="a Python that has fusion_bench and sd-mecha")
    parser.add_argument("--folder", type=Path, default=Path("runs/peers"))
    parser.add_argument("--size", choices=SHAPES, default="280m")
    parser.add_argument("--only", nargs="*", default=[*CONTESTS, "ties"])
    given = parser.parse_args()
    torch.set_num_threads(1)
    kept: dict[str, Any] = json.loads(OUT.read_text(encoding="utf-8"))["rows"] if OUT.is_file() else {}
    for name in given.only:
        kept[name] = ties(given.folder, given.peers, given.size) if name == "ties" else contest(name, given.folder, given.peers)
        print(name, {key: round(value, 4) for key, value in kept[name].items() if isinstance(value, float)}, flush=True)
        write_result(OUT, {"command": "make peers", "tasks": TASKS, "size": given.size, "machine": machine(), "rows": kept})


if __name__ == "__main__":
    main()
