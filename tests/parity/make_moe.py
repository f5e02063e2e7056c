"""What mergekit-moe makes of a tiny Llama: `python tests/parity/make_moe.py MERGEKIT_PYTHON` writes data/moe.safetensors.

MERGEKIT_PYTHON is the interpreter of an environment with mergekit 0.1.5 (`make .venv-mergekit/.ready`). mergekit runs the base in bfloat16;
here it is made to run in float32, so that what is compared are definitions and not roundings. Written by hand, once; the test reads the file.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import yaml
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(Path(__file__).parents[1]))

from tiny_decoders import dense

SAME = [["cat dog meow", "sun rain bright"], ["bone leash purr", "warm dry wet"]]  # prompts of one length: nothing is padded
PADDED = [["cat dog meow", "sun"], ["bone leash purr bark the about", "warm"]]
CASES = {
    "cheap_embed": ("cheap_embed", PADDED),
    "hidden": ("hidden", PADDED),
    "hidden_avg": ("hidden_avg", SAME),
    "hidden_avg_padded": ("hidden_avg", PADDED),
}
AGAINST = ["puddle cloud is"]
RUN = """
from types import SimpleNamespace
import torch
from mergekit.moe import router
from mergekit.scripts.moe import main

load = router.AutoModelForCausalLM.from_pretrained
wide = lambda *given, **more: load(*given, **{**more, "torch_dtype": torch.float32})
router.AutoModelForCausalLM = SimpleNamespace(from_pretrained=wide)
main()
"""


def document(base: str, experts: list[str], case: str) -> dict[str, object]:
    """A config of mergekit-moe."""
    mode, prompts = CASES[case]
    given = [{"source_model": path, "positive_prompts": texts} for path, texts in zip(experts, prompts, strict=True)]
    given[0]["negative_prompts"] = AGAINST
    return {"base_model": base, "gate_mode": mode, "dtype": "float32", "experts": given}


def main() -> None:
    """Run it once for each way of making gates."""
    with tempfile.TemporaryDirectory() as root:
        paths = [str(dense(Path(root) / f"m{seed}", "llama", seed)) for seed in range(3)]
        found = {f"base:{name}": tensor for name, tensor in load_file(f"{paths[0]}/model.safetensors").items()}
        for case in CASES:
            config, out = Path(root) / f"{case}.yaml", Path(root) / case
            config.write_text(yaml.safe_dump(document(paths[0], paths[1:], case)))
            subprocess.run([sys.argv[1], "-c", RUN, str(config), str(out), "--device", "cpu"], check=True)
            made = load_file(next(out.glob("*.safetensors")))
            found[case] = torch.stack([made[f"model.layers.{layer}.mlp.gate.weight"] for layer in range(3)])
        save_file(found, Path(__file__).parent / "data" / "moe.safetensors", metadata={"mergekit": "0.1.5", "by": "make_moe.py"})


if __name__ == "__main__":
    main()
