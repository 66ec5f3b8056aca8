"""Write the golden checkpoints of the current format version: ``python -m tests.golden.make``. Once per version.

They stay for ever: what was written by a released version must load in every later one.
"""

import json
from pathlib import Path

from distadam import checkpoint
from distadam.checkpoint.manifest import FORMAT
from tests.checkpoint_runs import build, digest, write
from tests.ranks import run_ranks

HERE = Path(__file__).parent
CASES = {
    "fp32": ("adam amsgrad", "fp32"),
    "split-8bit": ("adamw", "split 8bit"),
    "sgd": ("sgd momentum", "bf16 fp32 master"),
}


def main() -> None:
    table = json.loads((HERE / "cases.json").read_text()) if (HERE / "cases.json").exists() else {}
    for name, (rule, storage) in CASES.items():
        folder = f"v{FORMAT}-{name}"
        run_ranks(2, write, str(HERE / folder), rule, storage, 0, 3, False)
        model, optimizer = build(rule, storage)
        checkpoint.load(HERE / folder, model, optimizer)
        table[folder] = {"case": [rule, storage], "digest": digest(model, optimizer)}
    (HERE / "cases.json").write_text(json.dumps(table, indent=1) + "\n")


if __name__ == "__main__":
    main()
