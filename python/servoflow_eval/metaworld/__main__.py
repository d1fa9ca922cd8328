"""Looks after the evaluation scenes and shows what a policy sees; `python -m servoflow_eval.metaworld --help`."""

from __future__ import annotations

import argparse
import sys

import numpy as np

from . import CAMERAS, EVALUATION_SCENES, TASKS, MetaWorldEnv, evaluation_vectors, scenes


def _check() -> int:
    made = scenes.official_scenes()
    wrong = [task for task, vectors in made.items() if not np.array_equal(evaluation_vectors(task), vectors)]
    print(
        "differ: " + ", ".join(wrong)
        if wrong
        else f"{len(made)} lists of {EVALUATION_SCENES} scenes are equal"
    )
    return 1 if wrong else 0


def _expert(count: int) -> int:
    env = MetaWorldEnv(render=False)
    pooled = 0
    for task in TASKS:
        steps = []
        for scene in range(count):
            env.reset(task, scene)
            while not env.done:
                env.step(env.expert_action())
            if env.success:
                steps.append(env.steps)
        pooled += len(steps)
        print(
            f"{task:16s} {len(steps):3d} of {count}, median {np.median(steps) if steps else float('nan'):.0f} steps",
            flush=True,
        )
    print(f"{'all':16s} {pooled:3d} of {count * len(TASKS)}")
    return 0


def _sheet(path: str) -> int:
    from PIL import Image

    env = MetaWorldEnv()
    rows = []
    for task in TASKS:
        env.reset(task, 0)
        rows.append(np.concatenate(list(env.draw()), axis=1))
    Image.fromarray(np.concatenate(rows)).save(path)
    print(f"{path}: one task a row, cameras {', '.join(CAMERAS)}")
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m servoflow_eval.metaworld",
        description=__doc__,
        epilog="examples:\n  python -m servoflow_eval.metaworld expert --scenes 20\n"
        "  python -m servoflow_eval.metaworld sheet scenes.png",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("check-scenes", help="compare the stored evaluation scenes with the simulator's")
    commands.add_parser("write-scenes", help="make the file of evaluation scenes again")
    expert = commands.add_parser("expert", help="how often the scripted experts solve the evaluation scenes")
    expert.add_argument("--scenes", type=int, default=EVALUATION_SCENES, help="scenes of each task, 1 to 200")
    sheet = commands.add_parser("sheet", help="a picture of every task's first scene, as the cameras show it")
    sheet.add_argument("path", help="the picture to write, e.g. scenes.png")
    options = parser.parse_args()
    if options.command == "check-scenes":
        return _check()
    if options.command == "write-scenes":
        print(scenes.write_scenes())
        return 0
    if options.command == "expert":
        if not 1 <= options.scenes <= EVALUATION_SCENES:
            parser.error(f"--scenes: {options.scenes} is not between 1 and {EVALUATION_SCENES}")
        return _expert(options.scenes)
    return _sheet(options.path)


if __name__ == "__main__":
    sys.exit(main())
