"""What a matrix may hold, and that everything else is told by name."""

import dataclasses
import pathlib
import re
import tomllib

import pytest

from servoflow_eval import arms
from servoflow_eval.errors import EvalError

HERE = pathlib.Path(__file__).parent
ROOT = HERE.parents[1]
GOOD = """
[benchmark]
name = "x:y"
[policies.a]
kind = "random"
[[arm]]
name = "one"
[[arm]]
name = "two"
expect = "fail"
"""


def parse(text, **changes):
    document = tomllib.loads(text)
    document.update(changes)
    return arms.parse(document, pathlib.Path("/"), "m.toml")


def test_defaults_and_order():
    matrix = parse(GOOD, defaults={"replan": 3})
    assert [a.name for a in matrix.arms] == ["one", "two"]
    assert matrix.baseline == "one"
    assert matrix.arm("two").replan == 3


def test_lists_make_arms():
    arm = {"name": "s{steps}-r{replan}", "steps": [1, 2, 10], "replan": [4, 8]}
    matrix = parse(GOOD, arm=[arm])
    assert [a.name for a in matrix.arms] == ["s1-r4", "s1-r8", "s2-r4", "s2-r8", "s10-r4", "s10-r8"]
    assert matrix.arm("s10-r4").steps == 10


def test_json_and_back():
    matrix = arms.load(HERE / "data/toy_matrix.toml")
    assert arms.Matrix.from_json(matrix.as_json()) == matrix


@pytest.mark.parametrize(
    "file",
    sorted(ROOT.glob("bench/*loop*.toml")) + sorted(ROOT.glob("bench/*libero*.toml")),
    ids=lambda f: f.name,
)
def test_the_projects_own_matrices_are_good(file):
    assert arms.load(file).arms


def test_the_document_shows_what_there_is():
    """docs/closed-loop.md: its matrix is good, and its table names every field of an arm."""
    text = (ROOT / "docs/closed-loop.md").read_text()
    (block,) = re.findall(r"^```toml\n(.*?)^```$", text, re.M | re.S)
    matrix = parse(block)
    assert len(matrix.arms) == 6
    table = text[text.index("| field of an arm") : text.index("Lists are allowed")]
    for field in dataclasses.fields(arms.Arm):
        assert field.name == "name" or f"`{field.name}`" in table, field.name
    for kind in arms.POLICY_KINDS:
        assert f"| `{kind}`" in text, kind


def test_the_protocol_is_what_results_depend_on():
    def of(**fields):
        return arms.arm_protocol(arms.Arm("n", "p", **fields))

    assert of() == of(episodes=7, tasks=("t",), margin=0.5, expect="fail", baseline="b")
    for other in ({"replan": 4}, {"steps": 1}, {"noise_seed": 1}, {"action_noise": 0.1}, {"images": "black"},
                  {"prompt": "shuffled"}, {"precision": "bf16"}):  # fmt: skip
        assert of() != of(**other)


@pytest.mark.parametrize(
    "changes, told",
    [
        ({"benchmark": {}}, "benchmark.name"),
        ({"policies": {}}, "at least one [policies.NAME]"),
        ({"policies": {"a": {"kind": "jax"}}}, "policies.a.kind"),
        ({"policies": {"a": 3}}, "policies.a"),
        ({"extra": 1}, "extra: unknown"),
        ({"defaults": {"speed": 1}}, "defaults.speed"),
        ({"arm": []}, "at least one [[arm]]"),
        ({"arm": [{}]}, "arm[0].name"),
        ({"arm": [3]}, "arm[0]"),
        ({"arm": [{"name": "a/b"}]}, "letters, digits"),
        ({"arm": [{"name": "../x"}]}, "letters, digits"),
        ({"arm": [{"name": "a"}, {"name": "a"}]}, "two arms are named a"),
        ({"arm": [{"name": "a", "policy": "b"}]}, "no [policies.b]"),
        ({"arm": [{"name": "a", "replan": 0}]}, "replan"),
        ({"arm": [{"name": "a", "replan": True}]}, "replan"),
        ({"arm": [{"name": "a", "steps": 51}]}, "steps"),
        ({"arm": [{"name": "a", "steps": [1, 2]}]}, "{steps}"),
        ({"arm": [{"name": "{steps}", "steps": []}]}, "1 to 100 values"),
        ({"arm": [{"name": "{wrong}", "steps": 1}]}, "braces may hold"),
        ({"arm": [{"name": "{steps.real.x}", "steps": 1}]}, "braces may hold"),
        ({"arm": [{"name": "a", "action_noise": -1}]}, "action_noise"),
        ({"arm": [{"name": "a", "action_noise": float("nan")}]}, "action_noise"),
        ({"arm": [{"name": "a", "images": "blue"}]}, "images"),
        ({"arm": [{"name": "a", "prompt": "other"}]}, "prompt_of"),
        ({"arm": [{"name": "a", "prompt_of": {"t": 1}}]}, "prompt_of"),
        ({"arm": [{"name": "a", "tasks": ["u"], "prompt_of": {"t": "v"}}]}, "no entry"),
        ({"arm": [{"name": "a", "tasks": "t"}]}, "tasks"),
        ({"arm": [{"name": "a", "expect": "win"}]}, "expect"),
        ({"arm": [{"name": "a", "expect": "fail"}]}, "against itself"),
        ({"arm": [{"name": "a", "baseline": "b"}]}, "no arm 'b'"),
        ({"baseline": "zero"}, "no arm 'zero'"),
        ({"groups": {"x": "t"}}, "groups"),
        ({"arm": [{"name": "a{steps}{replan}", "steps": [1] * 100, "replan": [2] * 100}]}, "1000 at most"),
    ],
)
def test_what_is_wrong_is_told(changes, told):
    with pytest.raises(EvalError) as error:
        parse(GOOD, **changes)
    assert told in str(error.value)
    assert "m.toml" in str(error.value)


def test_everything_wrong_is_told_at_once():
    with pytest.raises(EvalError) as error:
        parse(GOOD, arm=[{"name": "a", "replan": 0, "steps": -1}], extra=2)
    assert len(str(error.value).splitlines()) == 3


def test_files_that_cannot_be_read(tmp_path):
    for content in (None, b"\xff\xfe", b"a = ", b"[[arm]]\nname = 3"):
        file = tmp_path / "m.toml"
        if content is not None:
            file.write_bytes(content)
        with pytest.raises(EvalError, match="m.toml"):
            arms.load(file)


def test_overrides():
    document = {"policies": {"a": {"threads": 1}}}
    arms.override(
        document, ["policies.a.threads=2", "policies.a.checkpoint=my/model", "benchmark.flags=[1, 2]"]
    )
    assert document == {
        "policies": {"a": {"threads": 2, "checkpoint": "my/model"}},
        "benchmark": {"flags": [1, 2]},
    }
    for wrong in ("policies", "=1", "policies.a.threads.x=1", "a..b=1"):
        with pytest.raises(EvalError):
            arms.override({"policies": {"a": {"threads": 1}}}, [wrong])
