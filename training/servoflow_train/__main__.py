"""The command: `python -m servoflow_train --help`."""

from __future__ import annotations

import argparse
import json
import pathlib
import sys

from .config import read_config


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m servoflow_train",
        description="Trains a pi0.5-type policy on ten Meta-World tasks, from pixels, and exports it for servoflow.",
        epilog="examples:\n  python -m servoflow_train train configs/nano.toml --out runs/nano\n"
        "  python -m servoflow_train train configs/nano.toml --out runs/nano-2 --resume runs/nano/resume\n"
        "  python -m servoflow_train record runs/nano/checkpoint",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    train = commands.add_parser("train", help="simulate, train, correct, evaluate, export: the whole run")
    train.add_argument("config", type=pathlib.Path, help="settings (TOML)")
    train.add_argument(
        "--out", type=pathlib.Path, required=True, help="folder for log, checkpoint and evaluation"
    )
    train.add_argument(
        "--scratch",
        type=pathlib.Path,
        help="folder in memory for samples on their way (default /dev/shm/...)",
    )
    train.add_argument("--resume", type=pathlib.Path, help="folder `resume` of an earlier run to go on from")
    record = commands.add_parser(
        "record", help="write a checkpoint's cases for `servoflow verify`, computed here in float64"
    )
    record.add_argument("checkpoint", type=pathlib.Path, help="an exported checkpoint directory")
    record.add_argument("--tasks", nargs="+", default=["push-v3", "faucet-close-v3"], help="one case of each")
    options = parser.parse_args()
    if options.command == "record":
        from .export import record_cases

        for path in record_cases(options.checkpoint, options.tasks):
            print(path)
        return 0
    try:
        config = read_config(options.config)
    except ValueError as error:
        parser.error(str(error))
    from .run import train as run

    scratch = options.scratch or pathlib.Path("/dev/shm") / f"servoflow-train-{options.out.resolve().name}"
    result = run(config, options.out, scratch, options.resume)
    print(json.dumps(result["pooled"]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
