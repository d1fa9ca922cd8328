"""From results files to what they say: one JSON document, which tables and pictures are drawn from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
import dataclasses
import json
import pathlib
from typing import Any

import numpy as np
import numpy.typing as npt

from . import results, statistics
from .arms import Arm, Matrix
from .errors import EvalError

Episodes = dict[tuple[str, int], dict[str, Any]]


def _round(value: Any) -> Any:
    if isinstance(value, float):
        return round(value, 6)
    if isinstance(value, (tuple, list)):
        return [_round(v) for v in value]
    return value


def rate(episodes: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Successes of some episodes with Wilson's interval, and the steps that the successful ones took."""
    n, won = len(episodes), sum(e["success"] for e in episodes)
    low, high = statistics.wilson(won, n)
    steps = [e["steps"] for e in episodes if e["success"]]
    out: dict[str, Any] = {"n": n, "successes": won, "rate": won / n if n else 0.0, "wilson": [low, high]}
    if steps:
        out["median_steps"] = float(np.median(steps))
        out["median_steps_interval"] = list(statistics.median_interval(steps))
    return {key: _round(value) for key, value in out.items()}


def times(episodes: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Milliseconds per inference, and how often a second the policy answers: alone, and with simulator and cameras."""
    replans = sum(e["replans"] for e in episodes)
    infer, wall = sum(e["infer_s"] for e in episodes), sum(e["wall_s"] for e in episodes)
    medians = [e.get("infer_median_s", 0.0) for e in episodes]
    out: dict[str, Any] = {"replans": replans}
    if infer > 0 and replans:
        out["infer_mean_ms"] = _round(1e3 * infer / replans)
        out["infer_median_ms"] = _round(1e3 * float(np.median(medians)))
        out["replans_per_s"] = _round(replans / infer)
    if wall > 0:
        out["loop_replans_per_s"] = _round(replans / wall)
        out["steps_per_s"] = _round(sum(e["steps"] for e in episodes) / wall)
    return out


def pair(candidate: Episodes, baseline: Episodes) -> dict[str, npt.NDArray[np.int8]]:
    """Per task, candidate minus baseline on the episodes that both have, in the order of their numbers."""
    out: dict[str, list[int]] = {}
    for task, number in sorted(candidate.keys() & baseline.keys()):
        a, b = candidate[task, number]["success"], baseline[task, number]["success"]
        out.setdefault(task, []).append(int(a) - int(b))
    return {task: np.array(values, np.int8) for task, values in out.items()}


def compare(arm: Arm, candidate: Episodes, baseline: Episodes, baseline_name: str) -> dict[str, Any]:
    """The comparison, whether the two ran bit for bit the same, and steps where both succeed."""
    pairs = pair(candidate, baseline)
    found = dataclasses.asdict(statistics.compare(pairs, arm.margin))
    p = found.pop("p_mcnemar")  # not rounded: it may be tiny
    out = {"baseline": baseline_name, "p_mcnemar": p, **{key: _round(value) for key, value in found.items()}}
    both = sorted(candidate.keys() & baseline.keys())
    out["identical"] = sum(candidate[k]["trace"] == baseline[k]["trace"] for k in both)
    change = [
        candidate[k]["steps"] - baseline[k]["steps"]
        for k in both
        if candidate[k]["success"] and baseline[k]["success"]
    ]
    if change:
        out["median_steps_change"] = float(np.median(change))
        out["mean_steps_change"] = _round(float(np.mean(change)))
    per_task = {}
    for task, values in pairs.items():
        wins, losses = int((values == 1).sum()), int((values == -1).sum())
        per_task[task] = {
            "n": int(values.size),
            "wins": wins,
            "losses": losses,
            "p_mcnemar": statistics.mcnemar_exact(wins, losses),
            "tango": _round(statistics.tango(wins, losses, int(values.size))),
        }
    out["tasks"] = per_task
    return out


def judge(arm: Arm, pooled: Mapping[str, Any], comparison: Mapping[str, Any] | None) -> tuple[str, str]:
    """("as expected" | "NOT AS EXPECTED" | "open" | "", why).

    A control that must fail is held to a real loss: the interval of its difference lies below -margin, and its rate is not
    above max_success. A control that does not fail means that the success rate could not have seen the fault it stands for.
    """
    if not arm.expect or comparison is None or comparison["n"] == 0:
        return "", ""
    n, (low, high) = comparison["n"], comparison["tango"]
    said = f"difference {100 * comparison['difference']:+.1f} pp [{100 * low:+.1f}, {100 * high:+.1f}]"
    if arm.expect == "identical":
        same = comparison["identical"] == n
        return (
            "as expected" if same else "NOT AS EXPECTED"
        ), f"{comparison['identical']} of {n} episodes identical"
    if arm.expect == "not worse":
        verdict = comparison["verdict"]
        state = {"not worse": "as expected", "worse": "NOT AS EXPECTED"}.get(verdict, "open")
        return state, f"{said}, margin {100 * arm.margin:g} pp"
    if comparison["verdict"] == "worse":
        if pooled["rate"] > arm.max_success:
            return (
                "NOT AS EXPECTED",
                f"succeeds in {100 * pooled['rate']:.1f} %, at most {100 * arm.max_success:g} % allowed",
            )
        return "as expected", f"fails: {said}"
    if comparison["verdict"] == "open":
        return "open", f"too few episodes to tell a loss of more than {100 * arm.margin:g} pp: {said}"
    return "NOT AS EXPECTED", f"a control that must fail did not: {said}"


def load(
    folder: pathlib.Path,
) -> tuple[Matrix, dict[str, Any], dict[str, Episodes], dict[str, dict[str, Any]]]:
    """(matrix, what the benchmark said of itself, episodes per arm, headers per arm) of a results folder."""
    file = folder / "matrix.json"
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
        matrix = Matrix.from_json(value)
        about = value["about"]
    except OSError as error:
        raise EvalError(
            f"{file}: {error.strerror}; is {folder} what `servoflow-eval run --out` wrote?"
        ) from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise EvalError(f"{file}: damaged ({error}); `servoflow-eval run` writes it again") from None
    arms: dict[str, Episodes] = {}
    headers: dict[str, dict[str, Any]] = {}
    for arm in matrix.arms:
        path = folder / f"{arm.name}.jsonl"
        if path.exists():
            header, episodes, _ = results.read(path)
            if header:
                arms[arm.name] = {(e["task"], e["episode"]): e for e in episodes}
                headers[arm.name] = header
    return matrix, about, arms, headers


def summarise(folder: pathlib.Path) -> dict[str, Any]:
    """Everything that the tables show, and outcomes and steps of every episode, so that it can be computed again."""
    matrix, about, arms, headers = load(folder)
    rows = []
    for arm in matrix.arms:
        if arm.name not in arms or not arms[arm.name]:
            continue
        episodes = arms[arm.name]
        wanted = arm.tasks or tuple(about["tasks"])
        by_task = {t: [e for (task, _), e in sorted(episodes.items()) if task == t] for t in about["tasks"]}
        by_task = {t: found for t, found in by_task.items() if found}
        baseline = arm.baseline or matrix.baseline
        comparison = None
        if baseline != arm.name and baseline in arms:
            comparison = compare(arm, episodes, arms[baseline], baseline)
        pooled = rate(list(episodes.values()))
        state, why = judge(arm, pooled, comparison)
        rows.append(
            {
                "name": arm.name,
                "arm": arm.as_json(),
                "policy": headers[arm.name]["protocol"]["policy"],
                "protocol_hash": headers[arm.name]["hash"],
                "machine": headers[arm.name].get("machine"),
                "date": headers[arm.name].get("date"),
                "workers": headers[arm.name].get("workers"),
                "planned": arm.episodes * len(wanted),
                "pooled": pooled,
                "times": times(list(episodes.values())),
                "tasks": {t: rate(found) for t, found in by_task.items()},
                "groups": {
                    name: rate([e for t in group for e in by_task.get(t, [])])
                    for name, group in matrix.groups.items()
                    if all(t in by_task for t in group)
                },
                "comparison": comparison,
                "expectation": {"expect": arm.expect, "state": state, "why": why},
                "episodes": {
                    t: {
                        "numbers": _ranges([e["episode"] for e in found]),
                        "success": "".join("1" if e["success"] else "0" for e in found),
                        "steps": " ".join(str(e["steps"]) for e in found),  # one line of the file
                    }
                    for t, found in by_task.items()
                },
            }
        )
    return {
        "title": matrix.title,
        "benchmark": about["identity"],
        "tasks": about["tasks"],
        "groups": matrix.groups,
        "baseline": matrix.baseline,
        "arms": rows,
    }


def _ranges(numbers: Sequence[int]) -> str:
    """0,1,2,5 as "0-2,5"."""
    out: list[list[int]] = []
    for n in numbers:
        if out and out[-1][1] == n - 1:
            out[-1][1] = n
        else:
            out.append([n, n])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in out)
