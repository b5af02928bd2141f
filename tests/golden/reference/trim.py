"""Cut the numbers of the authors' model down to what the tests read; see README.md."""

import json
import sys
from pathlib import Path

from safetensors.torch import load_file, save_file

ARCHITECTURES = ("ufo", "all_moe")
TASKS = ("pretrain", "irtr", "vqa")


def main(source: Path, target: Path) -> None:
    full = json.loads((source / "forward.json").read_text())
    wanted = tuple(f"{architecture}/{task}/" for architecture in ARCHITECTURES for task in TASKS)
    kept = {
        "meta": full["meta"],
        "inputs": full["inputs"]["checks"],
        "parameters": {name: full["architectures"][name]["pretrain"]["parameters"] for name in ARCHITECTURES},
        # alike for both architectures
        "heads": {
            task: {key: full["architectures"]["ufo"][task][key] for key in ("added", "removed")} for task in TASKS[1:]
        },
        "outputs": {key: value for key, value in full["outputs"].items() if key.startswith(wanted)},
        "gradients": {name: full["grads"][name]["grad"] for name in ARCHITECTURES},
        "without_gradient": {name: full["grads"][name]["unused"] for name in ARCHITECTURES},
        "beit_table": full["loading"]["loading/ufo/from_beit_like"]["relative_position_bias_table"],
    }
    (target / "forward.json").write_text(json.dumps(kept, separators=(",", ":")))
    tensors = load_file(source / "forward.safetensors")
    save_file(
        {name: tensor for name, tensor in tensors.items() if name.startswith((*wanted, "loading/"))},
        target / "forward.safetensors",
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
