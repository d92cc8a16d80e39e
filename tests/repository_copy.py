"""The repository's folder as a batch file or a command sees it, with stand-ins for the programs of a cluster."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[1]


def lay_out(folder: Path, run: Mapping[str, Any], deepspeed: Mapping[str, Any], stand_ins: Mapping[str, str]) -> Path:
    """Fill a folder with `run.yaml`, `ds.json`, the tools, the batch files, and a checkpoint's manifest.

    Args:
        folder: to fill.
        run: run config.
        deepspeed: DeepSpeed config.
        stand_ins: name of a program -> the bash that it is; they lie in `bin`.

    Returns:
        The folder.
    """
    (folder / "bin").mkdir()
    for name, text in stand_ins.items():
        stand_in = folder / "bin" / name
        stand_in.write_text(f"#!/bin/bash\n{text}\n")
        stand_in.chmod(0o755)
    for name in ("tools", "slurm"):
        (folder / name).symlink_to(ROOT / name)
    (folder / "run.yaml").write_text(yaml.safe_dump(dict(run)))
    (folder / "ds.json").write_text(json.dumps(deepspeed))
    saved = folder / "checkpoints" / "step-00000003"
    saved.mkdir(parents=True)
    (saved / "manifest.json").write_text(json.dumps({"step": 3, "run": run, "deepspeed": deepspeed}))
    return folder
