"""The summary as text: what the terminal shows, and what goes into documents."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Markdown that reads well as text: the first column to the left, the others to the right."""
    rows = [[cell.replace("|", "/") for cell in row] for row in rows]  # a bar would end the cell
    width = [max(len(r[i]) for r in [head, *rows]) for i in range(len(head))]

    def line(cells: Sequence[str]) -> str:
        parts = [cells[0].ljust(width[0]), *(c.rjust(w) for c, w in zip(cells[1:], width[1:]))]
        return "| " + " | ".join(parts) + " |"

    rule = "|" + "|".join("-" * (w + 1) + (":" if i else "-") for i, w in enumerate(width)) + "|"
    return "\n".join([line(head), rule, *(line(r) for r in rows)])


def percent(value: float) -> str:
    return f"{100 * value:.1f}"


def _interval(bounds: Sequence[float], sign: bool = False) -> str:
    form = "{:+.1f}" if sign else "{:.1f}"
    return "[" + ", ".join(form.format(100 * b) for b in bounds) + "]"


def arms_table(summary: Mapping[str, Any]) -> str:
    """One row per arm: success with its interval, against the baseline, times."""
    rows = []
    for row in summary["arms"]:
        p, t, c = row["pooled"], row["times"], row["comparison"]
        rows.append(
            [
                row["name"] + ("" if p["n"] >= row["planned"] else f" ({p['n']} of {row['planned']})"),
                str(p["n"]),
                percent(p["rate"]),
                _interval(p["wilson"]),
                f"{p['median_steps']:g}" if "median_steps" in p else "-",
                f"{100 * c['difference']:+.1f}" if c else "-",
                _interval(c["tango"], True) if c else "-",
                f"+{c['wins']} -{c['losses']}" if c else "-",
                f"{c['p_mcnemar']:.2g}" if c else "-",
                c["verdict"] if c else "baseline" if row["name"] == summary["baseline"] else "-",
                f"{t['infer_median_ms']:.1f}" if "infer_median_ms" in t else "-",
                f"{t['replans_per_s']:.0f}" if "replans_per_s" in t else "-",
            ]
        )
    head = ["arm", "episodes", "success %", "95 %", "median steps", "diff pp", "95 %", "won, lost", "McNemar p",
            "verdict", "infer ms", "replans/s"]  # fmt: skip
    return _table(head, rows)


def tasks_table(summary: Mapping[str, Any], arms: Sequence[str] = ()) -> str:
    """Success per task and arm in per cent with Wilson's interval."""
    chosen = [row for row in summary["arms"] if not arms or row["name"] in arms]
    rows = []
    for task in summary["tasks"]:
        cells = []
        for row in chosen:
            found = row["tasks"].get(task)
            cells.append(f"{percent(found['rate'])} {_interval(found['wilson'])}" if found else "-")
        if any(c != "-" for c in cells):
            rows.append([task, *cells])
    for name in summary["groups"]:
        found_rows = [row["groups"].get(name) for row in chosen]
        cells = [f"{percent(f['rate'])} {_interval(f['wilson'])}" if f else "-" for f in found_rows]
        rows.append([f"{name} ({len(summary['groups'][name])} tasks)", *cells])
    return _table(["task", *(row["name"] for row in chosen)], rows)


def expectations_table(summary: Mapping[str, Any]) -> str:
    """The arms that say what must come out, and whether it did."""
    rows = [
        [row["name"], row["expectation"]["expect"], row["expectation"]["state"], row["expectation"]["why"]]
        for row in summary["arms"]
        if row["expectation"]["state"]
    ]
    return _table(["arm", "must", "came out", "why"], rows) if rows else ""


def unexpected(summary: Mapping[str, Any]) -> list[str]:
    """Names of the arms that did not come out as they must."""
    return [r["name"] for r in summary["arms"] if r["expectation"]["state"] == "NOT AS EXPECTED"]


def text(summary: Mapping[str, Any], many: int = 6) -> str:
    """Everything, for a terminal. The table per task shows the first `many` arms that have no expectation to fail."""
    plain = [r["name"] for r in summary["arms"] if r["expectation"]["expect"] != "fail"][:many]
    parts = [f"{summary['title']}", arms_table(summary), tasks_table(summary, plain)]
    controls = expectations_table(summary)
    if controls:
        parts.append(controls)
    wrong = unexpected(summary)
    if wrong:
        parts.append("NOT AS EXPECTED: " + ", ".join(wrong))
    return "\n\n".join(parts)
