"""Put the demo's table into README.md, between its markers, and the chart beside it.

python -m experiments.demo.page runs/demo
"""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path

from experiments.common import EXPERIMENTS, IMAGES, ROOT


def main(run: Path) -> None:
    """Replace what stands between `<!-- demo -->` and `<!-- /demo -->`."""
    readme = ROOT / "README.md"
    text = readme.read_text(encoding="utf-8")
    table = (run / "results.md").read_text(encoding="utf-8").strip()
    new, count = re.subn(
        r"(<!-- demo -->\n).*?(\n<!-- /demo -->)", lambda match: match[1] + table + match[2], text, flags=re.DOTALL
    )
    if count != 1:
        raise SystemExit("README.md must hold one pair of markers <!-- demo --> and <!-- /demo -->.")
    readme.write_text(new, encoding="utf-8")
    IMAGES.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(run / "results.png", IMAGES / "demo.png")
    shutil.copyfile(run / "results.json", EXPERIMENTS / "demo" / "results.json")
    sys.stdout.write("README.md, docs/images/demo.png, experiments/demo/results.json\n")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/demo"))
