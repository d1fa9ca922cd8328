"""The matrix: which policies, which arms, on which benchmark. Read from TOML, checked, expanded, hashed.

An arm is one setting of everything that may differ between two measurements. A field that may hold a list
(`steps = [1, 2, 3]`) makes one arm per value, and the name says where the value goes: "steps-{steps}".
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
import copy
import dataclasses
import hashlib
import itertools
import json
import math
import pathlib
import re
import tomllib
from typing import Any

from .errors import EvalError

PROTOCOL = 1  # counts up when an episode's meaning changes: seeds, order of draws, what is recorded
IMAGES = ("as-is", "black", "swapped", "frozen")
EXPECT = ("", "fail", "not worse", "identical")
POLICY_KINDS = ("servoflow", "openpi-server", "plugin", "random")
GRID = ("precision", "steps", "replan", "noise_seed", "action_noise")
MAX_ARMS = 1000


@dataclasses.dataclass(frozen=True)
class Arm:
    """One row of the tables. What the fields do to an episode: `episode.py`."""

    name: str
    policy: str
    precision: str = ""  # "": as the policy says
    steps: int = 0  # Euler steps of the flow; 0: as the checkpoint says
    replan: int = 8  # actions executed of each chunk
    episodes: int = 20  # per task
    tasks: tuple[str, ...] = ()  # empty: all
    noise_seed: int = 0
    action_noise: float = 0.0  # standard deviation of what is added to every action, robot units
    images: str = "as-is"
    prompt: str = "as-is"  # or "shuffled", "other" (see prompt_of)
    prompt_of: tuple[tuple[str, str], ...] = ()  # (task, the task whose prompt it gets)
    baseline: str = ""  # the arm it is compared with; "": the matrix's
    margin: float = 0.02
    expect: str = ""
    max_success: float = 1.0  # expect = "fail": the success rate must not be above it either
    policy_options: tuple[tuple[str, Any], ...] = ()  # added to the policy's own

    def as_json(self) -> dict[str, Any]:
        out = dataclasses.asdict(self)
        out["tasks"] = list(self.tasks)
        out["prompt_of"] = dict(self.prompt_of)
        out["policy_options"] = dict(self.policy_options)
        return out


@dataclasses.dataclass(frozen=True)
class Matrix:
    """A checked matrix. `folder`: what its relative paths are relative to."""

    title: str
    folder: pathlib.Path
    benchmark: dict[str, Any]
    policies: dict[str, dict[str, Any]]
    arms: tuple[Arm, ...]
    baseline: str
    groups: dict[str, list[str]] = dataclasses.field(
        default_factory=dict
    )  # tasks that tables also show together

    def arm(self, name: str) -> Arm:
        for arm in self.arms:
            if arm.name == name:
                return arm
        raise EvalError(f"no arm {name!r}; there are: {', '.join(a.name for a in self.arms)}")

    def policy_spec(self, arm: Arm) -> dict[str, Any]:
        """The options of the arm's policy, the arm's own on top."""
        spec = {**self.policies[arm.policy], **dict(arm.policy_options)}
        if arm.precision:
            spec["precision"] = arm.precision
        if arm.steps:
            spec["steps"] = arm.steps
        return spec

    def as_json(self) -> dict[str, Any]:
        return {
            "title": self.title,
            "folder": str(self.folder),
            "benchmark": self.benchmark,
            "policies": self.policies,
            "arms": [arm.as_json() for arm in self.arms],
            "baseline": self.baseline,
            "groups": self.groups,
        }

    @staticmethod
    def from_json(value: Mapping[str, Any]) -> Matrix:
        arms = tuple(
            Arm(
                **{
                    **a,
                    "tasks": tuple(a["tasks"]),
                    "prompt_of": tuple(a["prompt_of"].items()),
                    "policy_options": tuple(a["policy_options"].items()),
                }
            )
            for a in value["arms"]
        )
        return Matrix(
            value["title"],
            pathlib.Path(value["folder"]),
            dict(value["benchmark"]),
            {k: dict(v) for k, v in value["policies"].items()},
            arms,
            value["baseline"],
            {k: list(v) for k, v in value["groups"].items()},
        )


def protocol_hash(identity: Mapping[str, Any]) -> str:
    """SHA-256 of the canonical JSON."""
    text = json.dumps(identity, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def arm_protocol(arm: Arm) -> dict[str, Any]:
    """What of an arm its episodes depend on. How many there are, and how they are judged, may change later."""
    kept = arm.as_json()
    for field in ("name", "episodes", "tasks", "baseline", "margin", "expect", "max_success"):
        del kept[field]
    return {"protocol": PROTOCOL, **kept}


class _Reader:
    """Collects everything that is wrong with one file."""

    def __init__(self, file: str) -> None:
        self.file = file
        self.wrong: list[str] = []

    def bad(self, where: str, what: str) -> None:
        self.wrong.append(f"{self.file}: {where}: {what}")

    def known(self, table: Mapping[str, Any], where: str, allowed: Sequence[str]) -> None:
        for key in table:
            if key not in allowed:
                self.bad(f"{where}.{key}" if where else key, f"unknown; there are: {', '.join(allowed)}")

    def text(
        self, table: Mapping[str, Any], where: str, key: str, default: str, choice: Sequence[str] = ()
    ) -> str:
        value = table.get(key, default)
        if not isinstance(value, str):
            self.bad(f"{where}.{key}", f"expected a string, got {value!r:.80}")
            return default
        if choice and value not in choice:
            self.bad(f"{where}.{key}", f"{value!r:.80} is none of {', '.join(repr(c) for c in choice)}")
            return default
        return value

    def integer(
        self, table: Mapping[str, Any], where: str, key: str, default: int, low: int, high: int
    ) -> int:
        value = table.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            self.bad(f"{where}.{key}", f"{value!r:.80} is not a whole number between {low} and {high}")
            return default
        return value

    def number(
        self, table: Mapping[str, Any], where: str, key: str, default: float, low: float, high: float
    ) -> float:
        value = table.get(key, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            self.bad(f"{where}.{key}", f"{value!r:.80} is not a number")
            return default
        if not low <= value <= high:
            self.bad(f"{where}.{key}", f"{value} is not between {low} and {high}")
            return default
        return float(value)


def _expand(table: Mapping[str, Any], where: str, reader: _Reader) -> list[dict[str, Any]]:
    """One table per combination of the listed values."""
    lists = {key: table[key] for key in GRID if isinstance(table.get(key), list)}
    name = table.get("name")
    if not isinstance(name, str) or not name:
        reader.bad(f"{where}.name", "missing: a string that names the arm in tables and files")
        return []
    for key, values in lists.items():
        if not values or len(values) > 100 or any(isinstance(v, (list, dict)) for v in values):
            reader.bad(f"{where}.{key}", "a list needs 1 to 100 values")
            return []
        if "{" + key + "}" not in name:
            reader.bad(
                f"{where}.name", f"{name!r} does not say where the value of {key} goes; write {{{key}}} in it"
            )
            return []
    out = []
    for values in itertools.product(*lists.values()):
        one = {**table, **dict(zip(lists, values))}
        try:
            one["name"] = name.format(**{key: one.get(key, "") for key in GRID})
        except (KeyError, IndexError, ValueError, AttributeError):
            reader.bad(f"{where}.name", f"{name!r}: braces may hold one of {', '.join(GRID)}")
            return []
        out.append(one)
    return out


def _arm(table: Mapping[str, Any], where: str, policies: Mapping[str, Any], reader: _Reader) -> Arm:
    fields = [f.name for f in dataclasses.fields(Arm)]
    reader.known(table, where, fields)
    name = table["name"]
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,79}", name):
        reader.bad(
            f"{where}.name", f"{name!r:.100}: letters, digits and . _ + - only (it names a file), 80 at most"
        )
    policy = reader.text(table, where, "policy", next(iter(policies), ""))
    if policy not in policies:
        reader.bad(f"{where}.policy", f"no [policies.{policy}]; there are: {', '.join(policies) or 'none'}")
    tasks = table.get("tasks", [])
    if not isinstance(tasks, list) or not all(isinstance(t, str) for t in tasks):
        reader.bad(f"{where}.tasks", "expected a list of task names")
        tasks = []
    prompt_of = table.get("prompt_of", {})
    if not isinstance(prompt_of, dict) or not all(isinstance(v, str) for v in prompt_of.values()):
        reader.bad(f"{where}.prompt_of", "expected a table from task to the task whose prompt it gets")
        prompt_of = {}
    prompt = reader.text(
        table, where, "prompt", "other" if prompt_of else "as-is", ("as-is", "shuffled", "other")
    )
    if (prompt == "other") != bool(prompt_of):
        reader.bad(f"{where}.prompt_of", 'goes together with prompt = "other"')
    if prompt == "other" and any(task not in prompt_of for task in tasks or prompt_of):
        reader.bad(f"{where}.prompt_of", "has no entry for one of the arm's tasks")
    if prompt == "other" and not tasks:
        tasks = list(prompt_of)
    options = table.get("policy_options", {})
    if not isinstance(options, dict):
        reader.bad(f"{where}.policy_options", "expected a table")
        options = {}
    return Arm(
        name=name,
        policy=policy,
        precision=reader.text(table, where, "precision", ""),
        steps=reader.integer(table, where, "steps", 0, 0, 50),
        replan=reader.integer(table, where, "replan", 8, 1, 10000),
        episodes=reader.integer(table, where, "episodes", 20, 1, 1000000),
        tasks=tuple(tasks),
        noise_seed=reader.integer(table, where, "noise_seed", 0, 0, 2**63 - 1),
        action_noise=reader.number(table, where, "action_noise", 0.0, 0.0, 1e6),
        images=reader.text(table, where, "images", "as-is", IMAGES),
        prompt=prompt,
        prompt_of=tuple(sorted(prompt_of.items())),
        baseline=reader.text(table, where, "baseline", ""),
        margin=reader.number(table, where, "margin", 0.02, 1e-6, 0.999),
        expect=reader.text(table, where, "expect", "", EXPECT),
        max_success=reader.number(table, where, "max_success", 1.0, 0.0, 1.0),
        policy_options=tuple(sorted(options.items())),
    )


def override(document: dict[str, Any], assignments: Sequence[str]) -> None:
    """Applies `a.b.c=VALUE` to the document, VALUE in TOML (a bare word is a string)."""
    for text in assignments:
        path, equals, value = text.partition("=")
        keys = path.strip().split(".")
        if not equals or not all(keys):
            raise EvalError(f"--set {text}: expected KEY.KEY=VALUE, for example policies.engine.threads=2")
        try:
            parsed = tomllib.loads(f"v = {value}")["v"]
        except tomllib.TOMLDecodeError:
            parsed = value
        at = document
        for key in keys[:-1]:
            at = at.setdefault(key, {})
            if not isinstance(at, dict):
                raise EvalError(f"--set {text}: {key} is not a table")
        at[keys[-1]] = parsed


def load(file: pathlib.Path, assignments: Sequence[str] = ()) -> Matrix:
    """Reads and checks a matrix; one EvalError lists everything that is wrong with it."""
    try:
        document = tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise EvalError(f"{file}: {error.strerror or error}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise EvalError(f"{file}: not TOML: {error}") from None
    document = copy.deepcopy(document)
    override(document, assignments)
    return parse(document, file.resolve().parent, str(file))


def parse(document: Mapping[str, Any], folder: pathlib.Path, file: str) -> Matrix:
    """The checked matrix of a TOML document; `file` stands in the errors."""
    reader = _Reader(file)
    reader.known(document, "", ("title", "baseline", "benchmark", "policies", "defaults", "groups", "arm"))
    benchmark = document.get("benchmark")
    if not isinstance(benchmark, dict) or not isinstance(benchmark.get("name"), str):
        reader.bad("benchmark.name", 'missing: "metaworld", "libero" or "module:factory"')
        benchmark = {"name": ""}
    policies: dict[str, dict[str, Any]] = {}
    tables = document.get("policies", {})
    for name, table in tables.items() if isinstance(tables, dict) else ():
        if not isinstance(table, dict):
            reader.bad(f"policies.{name}", "expected a table")
            continue
        reader.text(table, f"policies.{name}", "kind", "", POLICY_KINDS)
        policies[name] = dict(table)
    if not policies:
        reader.bad("policies", "missing: at least one [policies.NAME] with a kind")
    defaults = document.get("defaults", {})
    if not isinstance(defaults, dict):
        reader.bad("defaults", "expected a table")
        defaults = {}
    reader.known(defaults, "defaults", [f.name for f in dataclasses.fields(Arm) if f.name != "name"])
    arms: list[Arm] = []
    listed = document.get("arm", [])
    if not isinstance(listed, list) or not listed:
        reader.bad("arm", "missing: at least one [[arm]]")
        listed = []
    for i, table in enumerate(listed):
        if not isinstance(table, dict):
            reader.bad(f"arm[{i}]", "expected a table")
            continue
        for one in _expand({**defaults, **table}, f"arm[{i}]", reader):
            arms.append(_arm(one, f"arm {one['name']!r:.100}", policies, reader))
    if len(arms) > MAX_ARMS:
        reader.bad("arm", f"{len(arms)} arms; {MAX_ARMS} at most")
    names = [arm.name for arm in arms]
    for name in sorted({n for n in names if names.count(n) > 1}):
        reader.bad("arm", f"two arms are named {name}")
    baseline = reader.text(document, "", "baseline", names[0] if names else "")
    for who, wanted in [("baseline", baseline), *((f"arm {a.name!r}.baseline", a.baseline) for a in arms)]:
        if wanted and wanted not in names:
            reader.bad(who, f"there is no arm {wanted!r}")
    for arm in arms:
        if arm.expect and (arm.baseline or baseline) == arm.name:
            reader.bad(f"arm {arm.name!r}.expect", "the baseline cannot be judged against itself")
    groups = document.get("groups", {})
    if not isinstance(groups, dict) or not all(
        isinstance(g, list) and all(isinstance(t, str) for t in g) for g in groups.values()
    ):
        reader.bad("groups", "expected a table from a name to a list of tasks")
        groups = {}
    if reader.wrong:
        raise EvalError("\n".join(reader.wrong))
    title = reader.text(document, "", "title", "Closed loop")
    return Matrix(title, folder, dict(benchmark), policies, tuple(arms), baseline, dict(groups))
