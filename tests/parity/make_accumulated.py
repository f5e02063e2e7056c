"""Runs the authors' own functions once, and keeps what went in and what came out: `data/accumulated.safetensors`.

By hand, in an environment of its own with torch 2.13.0, tqdm and safetensors:

    python tests/parity/make_accumulated.py SOURCES

SOURCES is a folder with checkouts of the repositories below, each at the commit named. Only their text is run, with empty stand-ins for the
packages that their functions do not use; nothing of it is kept here.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

SOURCES = {
    "mllmerging": "https://github.com/WalkerWorldPeace/MLLMerging 5f8a458",
    "actmat": "https://github.com/marawangamal/actmat 42292c7",
    "ace": "https://github.com/unravel-xu/ACE-Merging 22d9dfe",
    "fusion_bench": "https://github.com/tanganke/fusion_bench 54c9e8c",
}
SHAPES = {"square": (3, 24, 24), "tall": (4, 40, 16), "wide": (3, 12, 40)}  # tasks, d_out, d_in; `wide` has more inputs than rows
RMS = 2.4e-4
RIDGE = 0.05
DOGE = {"encoder.layers.0.mlp.fc1.weight": (24, 20), "encoder.layers.0.self_attn.q_proj.weight": (18, 31)}
OUT = Path(__file__).parent / "data" / "accumulated.safetensors"


class Anything(types.ModuleType):
    """A module that has every name, for imports that the functions do not use."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(
            name,
            (),
            {"__init__": lambda self, *args, **kwargs: None, "__init_subclass__": classmethod(lambda cls, **kwargs: None)},
        )


def load(path: Path, *, package: str = "", until: str = "", absent: Sequence[str] = ()) -> dict[str, Any]:
    """The names that a file defines, up to a line that begins so."""
    for name in absent:
        sys.modules.setdefault(name, Anything(name))
    text = path.read_text(encoding="utf-8")
    if until:
        text = text.split(f"\n{until}")[0]
    module = types.ModuleType(f"{package}.{path.stem}" if package else path.stem)
    module.__package__ = package
    sys.modules[module.__name__] = module
    exec(compile(text, str(path), "exec"), module.__dict__)
    return module.__dict__


def vectors(tasks: int, d_out: int, d_in: int, seed: int) -> Tensor:
    """Task vectors with a decaying spectrum, a part in common and norms of their own."""
    generator = torch.Generator().manual_seed(seed)
    side = min(d_out, d_in)
    decay = torch.arange(1, side + 1).float() ** -0.5
    shared = torch.randn(d_out, d_in, generator=generator)
    found = []
    for task in range(tasks):
        left, right = torch.randn(d_out, side, generator=generator), torch.randn(side, d_in, generator=generator)
        matrix = (left * decay) @ right / decay.norm() + 0.3 * shared
        found.append((1 + 0.3 * task) * RMS * matrix / matrix.square().mean().sqrt())
    return torch.stack(found)


class Model(nn.Module):
    """One weight."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.clone())


def merged(function: Any, stack: Tensor, **options: Any) -> Tensor:
    """What a function of models makes of task vectors: their base is zero."""
    out: Tensor = function(Model(torch.zeros_like(stack[0])), [Model(one) for one in stack], [], **options)["weight"]
    return out.detach()


class Vector:
    """A task vector as ACE's code has it."""

    def __init__(self, weight: Tensor) -> None:
        self.task_vector_param_dict = {"layer": weight}


def ace(strategy: Any, stack: Tensor) -> Tensor:
    out: Tensor = strategy(["layer"], [Vector(one) for one in stack], "cpu").ace_merging()["layer"]
    return out


class Encoder(nn.Module):
    """Weights under DOGE's names, dots and all."""

    def __init__(self, weights: dict[str, Tensor]) -> None:
        super().__init__()
        self.weights = dict(weights)

    def state_dict(self, **_: Any) -> Any:  # type: ignore[override]
        return dict(self.weights)

    def load_state_dict(self, state: Any, **_: Any) -> Any:
        self.weights = {name: value.detach() for name, value in state.items()}


class Pool:
    """A pool of models."""

    def __init__(self, base: Encoder, tuned: dict[str, Encoder]) -> None:
        self.models = {"_pretrained_": base, **tuned}
        self.model_names = list(tuned)

    def load_model(self, name: str) -> Encoder:
        return self.models[name]


def doge(module: dict[str, Any], stacks: dict[str, Tensor]) -> dict[str, Tensor]:
    """FusionBench's algorithm with its own configuration."""

    class Quiet(module["DOGE_TA_Algorithm"]):  # type: ignore[misc]
        device = torch.device("cpu")

        def profile(self, *_: Any) -> Any:
            from contextlib import nullcontext

            return nullcontext()

        def print_profile_summary(self) -> None:
            """Nothing."""

    algorithm = Quiet.__new__(Quiet)
    algorithm.delta = None
    algorithm.config = types.SimpleNamespace(subspace=6, K=30, lamda=0.07)
    algorithm.fabric = types.SimpleNamespace(backward=lambda loss: loss.backward())
    base = Encoder({name: torch.zeros_like(stack[0]) for name, stack in stacks.items()})
    tasks = len(next(iter(stacks.values())))
    tuned = {f"t{task}": Encoder({name: stack[task] for name, stack in stacks.items()}) for task in range(tasks)}
    return algorithm.run(Pool(base, tuned)).weights


def main(sources: Path) -> None:
    torch.Tensor.cuda = lambda self, *_: self  # type: ignore[assignment,method-assign]
    torch.set_num_threads(1)
    mll, port = sources / "mllmerging", "yongxianwei_merging"
    sys.modules[port] = Anything(port)
    folder = mll / "fusion_bench/fusion_bench/method/yongxianwei_merging"
    load(folder / "task_vector.py", package=port)
    functional = load(folder / "functional.py", package=port)
    swudi = load(mll / "LLaMA-Factory/swudi_aswudi.py")
    absent = ["transformers", "qwen_vl_utils", "PIL", "PIL.Image"]
    qwen = load(mll / "LLaMA-Factory/model_merging.py", until="path_a = ", absent=absent)
    sys.modules["src"], sys.modules["src.task_vectors"] = Anything("src"), Anything("src.task_vectors")
    actmat = load(sources / "actmat/src/merging.py")
    strategy = load(sources / "ace/src/merge/strategy.py")["MergeStrategy"]
    absent = [
        "lightning",
        "fusion_bench",
        "fusion_bench.method",
        "fusion_bench.mixins",
        "fusion_bench.modelpool",
        "fusion_bench.utils",
    ]
    absent += [
        "fusion_bench.method.base_algorithm",
        "fusion_bench.mixins.lightning_fabric",
        "fusion_bench.mixins.simple_profiler",
    ]
    absent += ["fusion_bench.utils.state_dict_arithmetic", "fusion_bench.utils.type"]
    for name in absent:
        sys.modules[name] = Anything(name)
    sys.modules["fusion_bench.method.base_algorithm"].BaseAlgorithm = type("Base", (), {"_config_mapping": {}})  # type: ignore[attr-defined]
    sys.modules["fusion_bench.modelpool"].BaseModelPool = Pool  # type: ignore[attr-defined]
    doge_ta = load(sources / "fusion_bench/doge_ta.py")

    kept: dict[str, Tensor] = {}
    for seed, (name, shape) in enumerate(SHAPES.items()):
        stack = vectors(*shape, seed)
        out: dict[str, Tensor] = {"input": stack}
        for key, fields in {
            "default": {},
            "yaml": {"exp_time": 1300.0},
            "mean": {"init_mode": "mean"},
            "zero": {"init_mode": "zero", "exp_time": 30.0},
            "whole": {"truncate_rank_ratio": None},
        }.items():
            out[f"swudi.{key}"] = merged(swudi["swudi_merge"], stack, merge_device="cpu", progress=False, **fields)
        for rule in ("participation_sqrt", "participation", "entropy", "stable_rank", "gavish_donoho", "cumvar_0.9"):
            options = {"merge_device": "cpu", "progress": False, "auto_rank_method": rule}
            out[f"aswudi.{rule}"] = merged(swudi["aswudi_merge"], stack, **options)
        for filter_type in ("tikhonov", "landweber", "exponential"):
            out[f"iwudi.{filter_type}"] = merged(functional["iwudi_merge"], stack, filter_type=filter_type)
        out["wudi2.full"] = merged(functional["wudi_merge_v2"], stack, progress=False)
        out["wudi2.lora"] = merged(qwen["wudi_merging2"], stack, scaling_coefficient=1.0)
        out["actmat"] = actmat["merge_actmat"](stack)
        out["tact"] = actmat["merge_tact"](stack)
        large = stack * (1e-1 / RMS)
        for key, fields in {
            "norm": {"alpha_weighted": True},
            "ridge": {"lam": RIDGE},
            "covariance": {"cov_weighted": True, "lam": RIDGE},
        }.items():
            out[f"actmat.{key}"] = actmat["merge_actmat_general"](large.double(), solver="solve", **fields)
        uneven = large * torch.tensor([1.0, 40.0, 0.02, 3.0])[: len(stack), None, None]
        out |= {"ace.large": ace(strategy, large), "ace.uneven": ace(strategy, uneven), "ace.small": ace(strategy, stack)}
        kept |= {f"{name}/{key}": value.detach().clone().contiguous() for key, value in out.items()}
    stacks = {name: vectors(3, *shape, 10 + index) for index, (name, shape) in enumerate(DOGE.items())}
    for name, value in doge(doge_ta, stacks).items():
        kept |= {f"doge/input/{name}": stacks[name], f"doge/output/{name}": value.detach().clone().contiguous()}
    OUT.parent.mkdir(exist_ok=True)
    save_file(kept, OUT, metadata={**SOURCES, "torch": torch.__version__})
    print(f"{len(kept)} tensors, {OUT.stat().st_size} bytes: {OUT}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
