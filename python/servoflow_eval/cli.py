"""The command servoflow-eval."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
import pathlib
import sys
from typing import Any

from .errors import EvalError

_EPILOG = """examples:
  servoflow-eval run bench/closed_loop.toml --out build/closed-loop
      plays every episode of the matrix that is not yet in build/closed-loop, then prints and writes the report
  servoflow-eval run bench/closed_loop.toml --out build/closed-loop --arm fp32 --arm bf16
      only these arms; run it again, or all, to go on
  servoflow-eval film bench/closed_loop.toml --arm bf16 --task push --task faucet-open --out build/films
      an animated picture of an episode of each task
  servoflow-eval report build/closed-loop
      tables, report.json and report.html of what is there

docs/closed-loop.md tells what a matrix holds and what the numbers mean."""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="servoflow-eval",
        description="Robot policies in simulators: success rates with intervals, and paired comparisons.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def matrix_arguments(command: argparse.ArgumentParser) -> None:
        command.add_argument(
            "matrix", type=pathlib.Path, help="TOML file with [benchmark], [policies.*] and [[arm]]"
        )
        command.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="assignments",
                             help="replaces a value of the matrix: policies.engine.checkpoint=my/model")  # fmt: skip
        command.add_argument(
            "--checkpoint", metavar="FOLDER", help="this checkpoint for every policy of the engine"
        )

    run = commands.add_parser("run", help="play the missing episodes of a matrix", epilog=_EPILOG,
                              formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    matrix_arguments(run)
    run.add_argument(
        "--out", type=pathlib.Path, required=True, help="folder of the results; goes on where it stopped"
    )
    run.add_argument("--arm", action="append", default=[], metavar="NAME", help="only this arm (repeatable)")
    run.add_argument(
        "--episodes", type=int, metavar="N", help="at most N episodes per task and arm (a quick look)"
    )
    run.add_argument(
        "--workers", type=int, default=0, metavar="N", help="processes; 0: one per core (default)"
    )
    run.add_argument("--ray", nargs="?", const="", metavar="ADDRESS",
                     help="on a Ray cluster (its address, or none to start Ray here)")  # fmt: skip
    run.add_argument(
        "--strict", action="store_true", help="exit with 1 if an arm did not come out as it must"
    )
    run.add_argument("--quiet", action="store_true", help="no progress bar")

    film = commands.add_parser("film", help="play single episodes and write animated pictures", epilog=_EPILOG,
                               formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    matrix_arguments(film)
    film.add_argument("--arm", metavar="NAME", help="the arm to play; default: the baseline")
    film.add_argument(
        "--task", action="append", default=[], metavar="TASK", help="task (repeatable); default: all"
    )
    film.add_argument(
        "--episodes", type=int, default=1, metavar="N", help="episodes per task; the first is filmed (1)"
    )
    film.add_argument(
        "--out", type=pathlib.Path, required=True, metavar="FOLDER", help="for TASK.webp and TASK.png"
    )
    film.add_argument(
        "--together", type=pathlib.Path, metavar="FILE.gif", help="also all tasks beside each other"
    )

    report = commands.add_parser("report", help="tables, JSON and HTML of a results folder", epilog=_EPILOG,
                                 formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    report.add_argument("results", type=pathlib.Path, help="what --out was")
    report.add_argument(
        "--html", type=pathlib.Path, metavar="FILE", help="default: report.html in the folder"
    )
    report.add_argument(
        "--json", type=pathlib.Path, metavar="FILE", help="default: report.json in the folder"
    )
    report.add_argument(
        "--pictures", type=pathlib.Path, metavar="FOLDER", help="pictures to put into the HTML file"
    )
    report.add_argument(
        "--strict", action="store_true", help="exit with 1 if an arm did not come out as it must"
    )

    show = commands.add_parser("arms", help="print the arms of a matrix without playing any", epilog=_EPILOG,
                               formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    matrix_arguments(show)
    return parser


def _matrix(arguments: argparse.Namespace) -> Any:
    from . import arms

    assignments = list(arguments.assignments)
    matrix = arms.load(arguments.matrix, assignments)
    if arguments.checkpoint:
        folder = str(pathlib.Path(arguments.checkpoint).resolve())
        for spec in matrix.policies.values():
            if spec["kind"] == "servoflow":
                spec["checkpoint"] = folder
    return matrix


def _run(arguments: argparse.Namespace) -> int:
    import dataclasses

    from . import workers
    from .run import run_matrix

    matrix = _matrix(arguments)
    if arguments.episodes is not None:
        if arguments.episodes < 1:
            raise EvalError("--episodes: at least 1")
        fewer = tuple(
            dataclasses.replace(a, episodes=min(a.episodes, arguments.episodes)) for a in matrix.arms
        )
        matrix = dataclasses.replace(matrix, arms=fewer)
    if arguments.workers < 0:
        raise EvalError("--workers: 0 or more")
    pool: workers.Pool
    if arguments.ray is not None:
        from .ray_pool import RayPool

        pool = RayPool(matrix.as_json(), arguments.workers, arguments.ray)
    else:
        pool = workers.LocalPool(matrix.as_json(), arguments.workers or workers.available_cores())
    try:
        played = run_matrix(matrix, arguments.out, pool, arguments.arm, arguments.quiet)
    except KeyboardInterrupt:
        print(f"\ninterrupted; run the same command again to go on from {arguments.out}", file=sys.stderr)
        return 130
    finally:
        pool.close()
    print(f"{played} episodes played", file=sys.stderr)
    return _write_report(arguments.out, None, None, None, arguments.strict)


def _write_report(
    folder: pathlib.Path,
    html: pathlib.Path | None,
    json: pathlib.Path | None,
    pictures: pathlib.Path | None,
    strict: bool,
) -> int:
    from . import html_report, summary, tables
    from .run import write_json

    found = summary.summarise(folder)
    if not found["arms"]:
        raise EvalError(f"{folder}: no episodes yet")
    html, json = html or folder / "report.html", json or folder / "report.json"
    shown: list[pathlib.Path] = []
    if pictures is not None:
        shown = sorted(p for p in pictures.iterdir() if p.suffix in (".webp", ".gif", ".png"))
    write_json(json, found)
    html_report.write(found, html, shown)
    print(tables.text(found))
    print(f"\nWritten: {json}, {html}")
    return 1 if strict and tables.unexpected(found) else 0


def _film(arguments: argparse.Namespace) -> int:
    from . import benchmarks, episode, pictures, policies, workers
    from .statistics import wilson

    workers.set_environment()
    matrix = _matrix(arguments)
    arm = matrix.arm(arguments.arm or matrix.baseline)
    bench = benchmarks.make(matrix.benchmark, matrix.folder)
    tasks = benchmarks.check_tasks(bench, tuple(arguments.task), "--task")
    policy = policies.make(matrix.policy_spec(arm), matrix.folder)
    films = []
    for task in tasks:
        won, records = 0, []
        frames: list[pictures.Frame] = []
        for number in range(min(arguments.episodes, bench.scenes(task))):
            record = episode.run(bench, policy, arm, task, number, frames.append if number == 0 else None)
            records.append(record)
            won += record["success"]
        first = records[0]
        ended = (
            f"solved in {first['steps']} steps"
            if first["success"]
            else f"not solved in {first['steps']} steps"
        )
        shown = [pictures.captioned(f, f"{bench.prompt(task)}: {ended}") for f in frames]
        pictures.film(shown, arguments.out / f"{task}.webp")
        pictures.contact_sheet(shown, arguments.out / f"{task}.png")
        films.append(shown)
        replans, infer = sum(r["replans"] for r in records), sum(r["infer_s"] for r in records)
        low, high = wilson(won, len(records))
        rate = (
            f"{1e3 * infer / replans:.1f} ms per chunk ({replans / infer:.0f} Hz)"
            if infer > 0
            else "no inference"
        )
        print(
            f'{task}: "{bench.prompt(task)}" {won} of {len(records)} solved'
            f" (95 %: {100 * low:.0f} to {100 * high:.0f} %), {rate}",
            flush=True,
        )
    if arguments.together is not None:
        pictures.film(pictures.beside(films), arguments.together)
    policy.close()
    bench.close()
    print(f"Written: {arguments.out}/" + (f", {arguments.together}" if arguments.together else ""))
    return 0


def _arms(arguments: argparse.Namespace) -> int:
    matrix = _matrix(arguments)
    print(f"{matrix.title}: {len(matrix.arms)} arms, baseline {matrix.baseline}")
    for arm in matrix.arms:
        what = {
            k: v
            for k, v in arm.as_json().items()
            if k not in ("name", "policy") and v not in ("", [], {}, 0, 0.0)
        }
        print(f"  {arm.name}: {arm.policy} " + ", ".join(f"{k} {v}" for k, v in what.items() if v != "as-is"))
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; returns the exit code: 0 good, 1 not as expected (--strict), 2 an error told on stderr."""
    parsed = _parser().parse_args(arguments)
    try:
        if parsed.command == "run":
            return _run(parsed)
        if parsed.command == "film":
            return _film(parsed)
        if parsed.command == "arms":
            return _arms(parsed)
        return _write_report(parsed.results, parsed.html, parsed.json, parsed.pictures, parsed.strict)
    except EvalError as error:
        print(f"servoflow-eval: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
