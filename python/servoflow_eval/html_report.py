"""The summary as one HTML file that needs no network: Plotly's own script is inside."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
import html
import pathlib
from typing import Any

from . import tables

_STYLE = """body{font:15px/1.5 system-ui,sans-serif;max-width:1200px;margin:2em auto;padding:0 1em;color:#222}
table{border-collapse:collapse;margin:1em 0;font-size:13px}td,th{border-bottom:1px solid #ddd;padding:3px 8px;text-align:right}
td:first-child,th:first-child{text-align:left}.bad{color:#b00020;font-weight:600}figure{display:inline-block;margin:6px}
figcaption{font-size:12px;color:#555}.wide{overflow-x:auto}"""


def _rows(markdown: str) -> str:
    """A table of `tables` as HTML; its cells are escaped."""
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in markdown.splitlines()]
    head = "".join(f"<th>{html.escape(c)}</th>" for c in lines[0])
    body = "".join(
        "<tr>"
        + "".join(
            f"<td{' class=bad' if 'NOT AS' in c or c == 'worse' else ''}>{html.escape(c)}</td>" for c in cells
        )
        + "</tr>"
        for cells in lines[2:]
    )
    return f"<div class=wide><table><tr>{head}</tr>{body}</table></div>"


def _error_bar(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    rates = [r["rate"] for r in rows]
    return {
        "type": "data",
        "symmetric": False,
        "array": [100 * (r["wilson"][1] - v) for r, v in zip(rows, rates)],
        "arrayminus": [100 * (v - r["wilson"][0]) for r, v in zip(rows, rates)],
    }


def _curve(rows: Sequence[Mapping[str, Any]], field: str, baseline: str) -> list[Mapping[str, Any]]:
    """The baseline and the arms that differ from it in this field alone, ordered by it."""
    base = next((r for r in rows if r["name"] == baseline), None)
    if base is None:
        return []
    # What an arm says of precision and options shows in what its policy says of itself, and there it is complete.
    left_out = (
        "name",
        "episodes",
        "tasks",
        "baseline",
        "margin",
        "expect",
        "max_success",
        "precision",
        "policy_options",
    )

    def others(row: Mapping[str, Any]) -> dict[str, Any]:
        arm = {k: v for k, v in row["arm"].items() if k not in (*left_out, field)}
        return {**arm, "identity": {k: v for k, v in row["policy"].items() if k != field}}

    found = [
        r for r in rows if r is base or (others(r) == others(base) and r["arm"][field] != base["arm"][field])
    ]
    return sorted(found, key=lambda r: _at(r, field))


def _at(row: Mapping[str, Any], field: str) -> float:
    """Where an arm stands on the axis of a curve; a checkpoint that is not told otherwise takes openpi's 10 steps."""
    return float(row["arm"][field]) or (10.0 if field == "steps" else 0.0)


def figures(summary: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """(heading, Plotly figure) of what there is data for."""
    import plotly.graph_objects as go

    rows = summary["arms"]
    out: list[tuple[str, Any]] = []
    timed = [r for r in rows if "infer_median_ms" in r["times"] and r["expectation"]["expect"] != "fail"]
    if timed:
        figure = go.Figure(
            go.Scatter(
                x=[r["times"]["infer_median_ms"] for r in timed],
                y=[100 * r["pooled"]["rate"] for r in timed],
                error_y=_error_bar([r["pooled"] for r in timed]),
                text=[r["name"] for r in timed],
                mode="markers+text",
                textposition="top center",
            )
        )
        figure.update_layout(xaxis_title="median time of an inference, ms", yaxis_title="success, %")
        out.append(("Success against latency", figure))
    names = [r["name"] for r in rows]
    figure = go.Figure(
        go.Bar(
            x=[100 * r["pooled"]["rate"] for r in rows],
            y=names,
            orientation="h",
            error_x=_error_bar([r["pooled"] for r in rows]),
        )
    )
    figure.update_layout(
        xaxis_title="success, % (95 % Wilson)", yaxis={"autorange": "reversed"}, height=140 + 24 * len(rows)
    )
    out.append(("Success of every arm", figure))
    compared = [
        r for r in rows if r["comparison"] and r["comparison"]["n"] and r["expectation"]["expect"] != "fail"
    ]
    if compared:
        values = [100 * r["comparison"]["difference"] for r in compared]
        bars = {
            "type": "data",
            "symmetric": False,
            "array": [100 * r["comparison"]["tango"][1] - v for r, v in zip(compared, values)],
            "arrayminus": [v - 100 * r["comparison"]["tango"][0] for r, v in zip(compared, values)],
        }
        figure = go.Figure(
            go.Scatter(
                x=values, y=[r["name"] for r in compared], mode="markers", error_x=bars, marker={"size": 9}
            )
        )
        figure.add_vline(x=0, line_width=1)
        for margin in sorted({r["comparison"]["margin"] for r in compared}):
            figure.add_vline(x=-100 * margin, line_dash="dot", annotation_text=f"margin {100 * margin:g} pp")
        figure.update_layout(
            xaxis_title="paired difference to the baseline, percentage points (95 % Tango)",
            yaxis={"autorange": "reversed"},
            height=140 + 28 * len(compared),
        )
        out.append(("Against the baseline, episode by episode", figure))
    for field, label, log in (
        ("steps", "Euler steps of the flow", False),
        ("replan", "actions executed of each chunk", False),
        ("action_noise", "standard deviation of the noise on every action", False),
    ):
        curve = _curve(rows, field, summary["baseline"])
        if len(curve) > 2:
            x = [_at(r, field) for r in curve]
            figure = go.Figure(
                go.Scatter(x=x, y=[100 * r["pooled"]["rate"] for r in curve], mode="lines+markers",
                           error_y=_error_bar([r["pooled"] for r in curve]))
            )  # fmt: skip
            figure.update_layout(xaxis_title=label, yaxis_title="success, %", yaxis_range=[0, 102])
            out.append((f"Success over {label}", figure))
    plain = [r for r in rows if r["expectation"]["expect"] != "fail"]
    if plain:
        tasks = [t for t in summary["tasks"] if any(t in r["tasks"] for r in plain)]
        grid = [[100 * r["tasks"][t]["rate"] if t in r["tasks"] else None for t in tasks] for r in plain]
        figure = go.Figure(
            go.Heatmap(z=grid, x=tasks, y=[r["name"] for r in plain], zmin=0, zmax=100, colorscale="Viridis",
                       texttemplate="%{z:.0f}")
        )  # fmt: skip
        figure.update_layout(yaxis={"autorange": "reversed"}, height=180 + 26 * len(plain))
        out.append(("Success per task, %", figure))
    return out


def _picture(file: pathlib.Path) -> str:
    kind = {".gif": "gif", ".webp": "webp", ".png": "png"}[file.suffix]
    data = base64.b64encode(file.read_bytes()).decode("ascii")
    caption = html.escape(file.stem)
    return f'<figure><img alt="{caption}" src="data:image/{kind};base64,{data}"><figcaption>{caption}</figcaption></figure>'


def write(summary: Mapping[str, Any], file: pathlib.Path, pictures: Sequence[pathlib.Path] = ()) -> None:
    """Writes the report; pictures (PNG, GIF, WebP) go into it."""
    import plotly.offline

    title = html.escape(summary["title"])
    parts = [
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{title}</title><style>{_STYLE}</style>",
        f"<script>{plotly.offline.get_plotlyjs()}</script><h1>{title}</h1>",
    ]
    wrong = tables.unexpected(summary)
    if wrong:
        parts.append(f"<p class=bad>Not as expected: {html.escape(', '.join(wrong))}</p>")
    about = ", ".join(f"{k} {v}" for k, v in summary["benchmark"].items())
    parts.append(f"<p>Benchmark: {html.escape(about)}. Baseline: {html.escape(summary['baseline'])}.</p>")
    machines = sorted({str((r["machine"] or {}).get("cpu", "unknown")) for r in summary["arms"]})
    parts.append(f"<p>Times were taken on: {html.escape('; '.join(machines))}.</p>")
    parts.append("<h2>Arms</h2>" + _rows(tables.arms_table(summary)))
    controls = tables.expectations_table(summary)
    if controls:
        parts.append("<h2>What must come out</h2>" + _rows(controls))
    for number, (heading, figure) in enumerate(figures(summary)):
        figure.update_layout(template="plotly_white", margin={"l": 60, "r": 20, "t": 20, "b": 50})
        drawn = figure.to_html(full_html=False, include_plotlyjs=False, div_id=f"figure{number}")
        parts.append(f"<h2>{html.escape(heading)}</h2>{drawn}")
    plain = [r["name"] for r in summary["arms"] if r["expectation"]["expect"] != "fail"]
    parts.append("<h2>Tasks</h2>" + _rows(tables.tasks_table(summary, plain)))
    if pictures:
        parts.append("<h2>Episodes</h2>" + "".join(_picture(p) for p in pictures))
    parts.append("</html>")
    temporary = file.with_name(f".{file.name}.tmp")
    temporary.write_text("\n".join(parts), encoding="utf-8")
    temporary.replace(file)
