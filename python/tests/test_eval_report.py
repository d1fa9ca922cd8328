"""The HTML report: one file, no network, nothing of the user's text taken as markup."""

import html.parser
import pathlib
import re

import pytest

from servoflow_eval import arms, html_report, run, summary, tables, workers

TOY = pathlib.Path(__file__).parent / "data/toy_matrix.toml"


class Reader(html.parser.HTMLParser):
    """Collects tags with what they refer to."""

    def __init__(self):
        super().__init__()
        self.tags, self.links, self.text = [], [], ""

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.links += [v for k, v in attributes if k in ("src", "href", "data", "action") and v]

    def handle_data(self, data):
        self.text += data


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    out = tmp_path_factory.mktemp("toy")
    matrix = arms.load(TOY, ["defaults.episodes=6", 'title="<script>alert(1)</script> & more"'])
    run.run_matrix(matrix, out, workers.HerePool(matrix.as_json()), quiet=True)
    return summary.summarise(out), out


def test_is_whole_and_offline(found, tmp_path):
    pixel = tmp_path / "a<b.png"
    from PIL import Image

    Image.new("RGB", (2, 2)).save(pixel)
    file = tmp_path / "r.html"
    html_report.write(found[0], file, [pixel])
    text = file.read_text()
    reader = Reader()
    reader.feed(text)
    assert [link for link in reader.links if not link.startswith("data:")] == []
    assert "Plotly.newPlot" in text and "plotly.js v" in text
    assert "<script>alert(1)" not in text and "&lt;script&gt;alert(1)" in text
    assert reader.tags.count("table") == 3 and reader.tags.count("img") == 1
    assert len(re.findall(r'id="figure\d+"', text)) >= 5
    for row in found[0]["arms"]:
        assert row["name"] in reader.text


def test_text_has_every_number(found):
    text = tables.text(found[0])
    for row in found[0]["arms"]:
        assert re.search(rf"^\| {re.escape(row['name'])} +\| +12 ", text, re.M)
    lengths = {len(line) for line in tables.arms_table(found[0]).splitlines()}
    assert len(lengths) == 1


def test_curves_hold_what_differs_in_one_field(found):
    curve = html_report._curve(found[0]["arms"], "action_noise", "expert")
    assert [r["name"] for r in curve] == ["expert", "noise-0.05", "noise-0.4", "noise-3.0"]
    assert [r["name"] for r in html_report._curve(found[0]["arms"], "replan", "expert")] == [
        "replan-1",
        "expert",
        "replan-8",
    ]


def test_an_arm_that_spells_out_the_default_stands_on_the_curve():
    """The baseline says precision = "fp32", the others leave it to the policy: the same policy, one curve."""

    def row(name, precision="", steps=0):
        identity = {"kind": "servoflow", "precision": precision or "fp32", "steps": steps or None}
        arm = arms.Arm(name, "engine", precision=precision, steps=steps).as_json()
        return {"name": name, "arm": arm, "policy": identity}

    rows = [
        row("steps-2", steps=2),
        row("fp32", "fp32"),
        row("bf16", "bf16"),
        row("bf16-1", "bf16", 1),
        row("steps-1", steps=1),
    ]
    assert [r["name"] for r in html_report._curve(rows, "steps", "fp32")] == ["steps-1", "steps-2", "fp32"]
