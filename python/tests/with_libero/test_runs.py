"""servoflow-eval in LIBERO with a policy of random weights: whole episodes, in process and through the server."""

import json
import pathlib
import subprocess
import sys

from conftest import HERE
import pytest

ROOT = HERE.parents[2]
TASKS = ("turn_on_the_stove", "put_the_bowl_on_the_plate")
MATRIX = """
title = "A policy of random weights in LIBERO-Goal"
baseline = "engine"

[benchmark]
name = "libero"
suite = "{suite}"
{options}

[policies.engine]
kind = "servoflow"
checkpoint = "{checkpoint}"
robot = "libero"
precision = "fp32"

[policies.server]
kind = "openpi-server"
port = {port}

[defaults]
policy = "engine"
replan = 5
episodes = {episodes}
tasks = {tasks}
margin = 0.5

[[arm]]
name = "engine"

[[arm]]
name = "server"
policy = "server"
expect = "identical"

[[arm]]
name = "black"
images = "black"
"""


@pytest.fixture(scope="module")
def server(binary):
    """The port of a server on the same checkpoint."""
    process = subprocess.Popen(
        [binary, "serve", ROOT / "tests/golden/openpi-tiny", "--port", "0", "--robot", "libero", "--precision", "fp32",
         "--threads", "1"],
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    url = process.stdout.readline().strip()
    assert url, "the server did not start"
    yield int(url.rsplit(":", 1)[1])
    process.terminate()
    assert process.wait(20) == 0


def run(folder: pathlib.Path, port: int, suite: str, options: str, tasks: tuple[str, ...], episodes: int):
    """Plays the matrix and returns the records of each arm."""
    matrix = folder / "matrix.toml"
    matrix.write_text(
        MATRIX.format(suite=suite, options=options, checkpoint=ROOT / "tests/golden/openpi-tiny", port=port,
                      episodes=episodes, tasks=json.dumps(list(tasks)))
    )  # fmt: skip
    command = [
        sys.executable,
        "-m",
        "servoflow_eval",
        "run",
        matrix,
        "--out",
        folder / "out",
        "--workers",
        "1",
    ]
    ran = subprocess.run([*command, "--strict", "--quiet"], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr + ran.stdout
    again = subprocess.run([*command, "--strict", "--quiet"], capture_output=True, text=True)
    assert "0 episodes played" in again.stderr, again.stderr
    found = {}
    for arm in ("engine", "server", "black"):
        lines = [json.loads(line) for line in (folder / "out" / f"{arm}.jsonl").read_text().splitlines()]
        found[arm] = [line for line in lines if "trace" in line]
    return found


def test_short_episodes_are_the_same_in_process_and_over_the_wire(tmp_path, server):
    found = run(tmp_path, server, "libero_goal", "max_steps = 12", TASKS, 2)
    engine = {(r["task"], r["episode"]): r["trace"] for r in found["engine"]}
    assert {task for task, _ in engine} == set(TASKS) and len(set(engine.values())) == len(engine) == 4
    assert {(r["task"], r["episode"]): r["trace"] for r in found["server"]} == engine
    assert all(
        r["trace"] != engine[r["task"], r["episode"]] for r in found["black"]
    )  # it looks at the pictures
    for r in found["engine"]:
        assert (r["steps"], r["replans"], r["success"]) == (12, 3, False)


def test_an_episode_of_full_length(tmp_path, server):
    task = "pick_up_the_black_bowl_between_the_plate_and_the_ramekin_and_place_it_on_the_plate"
    found = run(tmp_path, server, "libero_spatial", "", (task,), 1)
    for arm in ("engine", "server"):
        (record,) = found[arm]
        assert (record["steps"], record["replans"], record["success"]) == (220, 44, False)
    assert found["engine"][0]["trace"] == found["server"][0]["trace"]
