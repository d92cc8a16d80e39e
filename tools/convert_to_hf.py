"""Convert a checkpoint to a Hugging Face folder: `python tools/convert_to_hf.py --checkpoint DIR --output DIR`."""

import argparse
import math

from megagpt.errors import ConfigError, run_command
from megagpt.parallel.console import quiet_libraries
from megagpt.storage import local_folder, location


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Write a checkpoint of any layout as a Hugging Face folder and compare its logits with the model's."
    )
    parser.add_argument(
        "--checkpoint",
        required=True,
        type=location,
        help="a checkpoint, or a run's checkpoint.directory",
    )
    parser.add_argument("--output", required=True, type=local_folder, help="folder to write; must not exist")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="type of the weights"
    )
    parser.add_argument("--tokenizer", help="tokenizer file (default: the one that the run was trained with)")
    parser.add_argument("--family", help="transformers' model_type (default: the first that expresses the model)")
    parser.add_argument("--max-shard-gb", type=float, default=5.0, help="largest weight file (default: 5)")
    parser.add_argument("--workers", type=int, default=1, help="processes that write weight files side by side")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier export")
    parser.add_argument("--verbose", action="store_true", help="show the libraries' warnings")
    args = parser.parse_args()
    if not 1e-9 <= args.max_shard_gb < math.inf:
        raise ConfigError(f"--max-shard-gb={args.max_shard_gb} must be a number of at least 1e-9; the usual value is 5")
    quiet_libraries(args.verbose)

    from megagpt.export import export_checkpoint

    export = export_checkpoint(
        args.checkpoint,
        args.output,
        args.dtype,
        args.tokenizer,
        args.overwrite,
        args.family,
        int(args.max_shard_gb * 1e9),
        args.workers,
    )
    size = f"{export.weight_bytes / 1e6:,.1f} MB of {args.dtype} weights"
    print(f"{export.folder}: {export.family}, {export.parameters:,} parameters, {size}")
    assert export.certificate is not None
    for what, report in export.certificate.comparisons.items():
        print(f"{f'logits against {what}:':<40} {report}")


if __name__ == "__main__":
    run_command(main)
