"""A merge by another library, in that library's Python: `python theirs.py WHAT FOLDER OUT` prints the processor's seconds as JSON.

Knows nothing of thetau. FOLDER has `base.safetensors` and `m0.safetensors` …; what was made goes to OUT. Only the merge itself is timed: tensors are
in memory in float32 before it begins, except for sd-mecha, which streams files and is timed with its reading and writing.
"""

# mypy: ignore-errors

import json
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

FEWER = 10  # of FusionBench's 300 steps of WUDI; each step is the same work


def vectors(base, models):
    return [{name: model[name] - base[name] for name in base} for model in models]


def wudi(base, models):
    from fusion_bench.method.wudi.wudi import wudi_merging

    return wudi_merging(vectors(base, models), accelerator="cpu", iter_num=FEWER)


def tsv_m(base, models):
    from fusion_bench.method.task_singular_vector.utils.TSVM_utils import compute_and_sum_svd_mem_reduction

    return compute_and_sum_svd_mem_reduction(vectors(base, models), accelerator="cpu")


def iso_c(base, models):
    from fusion_bench.method.isotropic_merging.iso_utils import iso_c as merge

    return merge(vectors(base, models), accelerator="cpu")


def doge_ta(base, models):
    import lightning
    from fusion_bench.method.doge_ta.doge_ta import DOGE_TA_Algorithm

    class Holder(torch.nn.Module):
        """Tensors by dotted names."""

        def __init__(self, tensors):
            super().__init__()
            for name, tensor in tensors.items():
                place = self
                *folders, last = name.split(".")
                for folder in folders:
                    if not hasattr(place, folder):
                        place.add_module(folder, torch.nn.Module())
                    place = getattr(place, folder)
                place.register_parameter(last, torch.nn.Parameter(tensor))

    algorithm = DOGE_TA_Algorithm(subspace=6, K=30, lamda=0.07)
    algorithm._fabric_instance = lightning.Fabric(accelerator="cpu", devices=1)
    pool = {"_pretrained_": Holder(base), **{f"m{number}": Holder(model) for number, model in enumerate(models)}}
    made = algorithm.run(pool).state_dict()
    return {name: made[name] - base[name] for name in base}


def ties(folder, out, count):
    import sd_mecha
    from sd_mecha.extensions import model_configs

    whole = load_file(folder / "base.safetensors")
    keys = {name: model_configs.KeyMetadata(shape=list(tensor.shape), dtype="bfloat16") for name, tensor in whole.items()}
    del whole
    config = model_configs.ModelConfigImpl("llama-benchmark", {"model": model_configs.ModelComponent(keys)})
    model_configs.register(config)
    base, *models = (
        sd_mecha.model(folder / name, config)
        for name in ("base.safetensors", *(f"m{index}.safetensors" for index in range(count)))
    )
    recipe = sd_mecha.add_difference_ties(base, *models, alpha=1.0, k=0.2)
    sd_mecha.merge(recipe, output=out, threads=1, output_dtype=torch.bfloat16)


def main():
    what, folder, out = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    torch.set_num_threads(1)
    count = len(list(folder.glob("m*.safetensors")))
    if what == "ties":
        begin = time.process_time(), time.perf_counter()
        ties(folder, out, count)
        print(json.dumps({"processor": time.process_time() - begin[0], "seconds": time.perf_counter() - begin[1]}))
        return
    base, *models = (
        {name: tensor.float() for name, tensor in load_file(folder / name).items()}
        for name in ("base.safetensors", *(f"m{index}.safetensors" for index in range(count)))
    )
    begin = time.process_time(), time.perf_counter()
    with torch.no_grad() if what in ("tsv_m", "iso_c") else torch.enable_grad():
        made = globals()[what](base, models)
    told = {"processor": time.process_time() - begin[0], "seconds": time.perf_counter() - begin[1]}
    save_file({name: tensor.detach().contiguous() for name, tensor in made.items()}, out)
    print(json.dumps(told))


if __name__ == "__main__":
    main()
