"""The adapter against LIBERO, robosuite and openpi's client themselves. No checkpoint is needed."""

import hashlib
import json
import os
import subprocess
import sys

from conftest import HERE, STEPS, machine, play, script, seen, thumbnail
from libero.libero import benchmark
import numpy as np
from openpi_client import image_tools, msgpack_numpy
import pytest
from robosuite.utils.transform_utils import quat2axisangle
from upstream_init_states import digest

from servoflow_eval.errors import EvalError
from servoflow_eval.libero import LiberoBenchmark, protocol
from servoflow_eval.libero.simulator import VERSIONS

DRAWER = "open_the_middle_drawer_of_the_cabinet"
STOVE = "turn_on_the_stove"


@pytest.mark.parametrize("suite", protocol.MAX_STEPS)
def test_the_stored_initial_states_are_liberos(suite, simulators):
    upstream = json.loads((HERE / "upstream_init_states.json").read_text())["suites"][suite]
    simulator = simulators(suite)
    found = {task: digest(simulator.initial_states(task)) for task in simulator.tasks()}
    assert found == upstream
    assert {len(simulator.initial_states(task)) for task in simulator.tasks()} == {protocol.EPISODES}


def test_tasks_and_sentences_come_in_liberos_order(simulators):
    for suite, count in (("libero_goal", 10), ("libero_90", 90)):
        simulator = simulators(suite)
        theirs = benchmark.get_benchmark_dict()[suite]()
        assert simulator.tasks() == tuple(theirs.get_task(i).name for i in range(count))
        assert [simulator.prompt(t) for t in simulator.tasks()] == [
            theirs.get_task(i).language for i in range(count)
        ]
    assert simulators("libero_goal").prompt(DRAWER) == "open the middle drawer of the cabinet"


@pytest.mark.parametrize("episode", [0, 17, 49])
def test_a_scene_is_the_stored_state_bit_by_bit(episode, simulators):
    simulator = simulators("libero_goal")
    simulator.reset(DRAWER, episode)
    np.testing.assert_array_equal(simulator.state(), simulator.initial_states(DRAWER)[episode])
    other = simulator.initial_states(DRAWER)[episode - 1]
    assert not np.array_equal(simulator.state(), other)
    simulator.settle()
    assert simulator.state()[0] == pytest.approx(simulator.initial_states(DRAWER)[episode][0] + 0.5)


@pytest.mark.parametrize(
    "suite, task",
    [
        ("libero_goal", STOVE),
        ("libero_10", "KITCHEN_SCENE4_put_the_black_bowl_in_the_bottom_drawer_of_the_cabinet_and_close_it"),
        (
            "libero_spatial",
            "pick_up_the_black_bowl_in_the_top_drawer_of_the_wooden_cabinet_and_place_it_on_the_plate",
        ),
    ],
)
def test_the_fast_way_is_robosuites_own_way_bit_by_bit(suite, task, simulators):
    """Compiled once against compiled at every reset, rendered late against rendered at once, episode 1 by itself against
    episode 1 after 0: the same joints, the same observations, the same pixels."""
    fast, literal = simulators(suite), simulators(suite, literal=True)
    ours = {}
    for episode in (1, 0):  # backwards, and 1 after a scene that was played
        play(fast, task, episode, 5)
        ours[episode] = seen(fast)
    fast.close()
    for episode in (0, 1):
        play(literal, task, episode, 5)
        theirs = seen(literal)
        assert ours[episode] == theirs, [key for key in theirs if theirs[key] != ours[episode][key]]
    assert ours[0]["observation/image"] != ours[1]["observation/image"]


def test_an_episode_does_not_depend_on_what_was_played_before(simulators):
    simulator = simulators("libero_goal")
    np.random.seed(1)
    generator = np.random.get_state()[1].copy()
    play(simulator, STOVE, 2, 3)
    np.testing.assert_array_equal(np.random.get_state()[1], generator)
    fresh = seen(simulator)
    # The stove is turned on by hand: the task is solved, the burner shows, the gripper is closed.
    stove = simulator._now._inner.object_states_dict["flat_stove_1"]
    before = simulator.frame(protocol.IMAGE_KEY)
    stove.set_joint(0.7)
    assert simulator.step(script(STEPS))
    simulator.step(script(STEPS))
    assert (simulator.frame(protocol.IMAGE_KEY) != before).any(-1).sum() > 50
    simulator.reset(DRAWER, 4)
    np.random.seed(2)
    play(simulator, STOVE, 2, 3)
    assert seen(simulator) == fresh
    assert not simulator.step(script(3))


def test_the_scripted_actions_lead_where_they_led(frozen, simulators):
    """Numbers that moved by more than rounding fail on any machine; a bit that moved fails on the machine of the file."""
    same = frozen["machine"] == machine()
    told = []
    for case in frozen["cases"]:
        simulator = simulators(case["suite"])
        play(simulator, case["task"], case["episode"], case["steps"])
        parts = seen(simulator)
        # Joints in metres and radians, and their velocities: another processor's rounding grows to about 1e-6 within 2 s
        # of motion without new contacts; the settled scene that did not move is metres away.
        error = np.abs(simulator.state() - np.array(case["state"])).max()
        assert error < 1e-3
        frames = {key: thumbnail(simulator.frame(key)) for key in protocol.CAMERAS}
        for key, stored in case["thumbnails"].items():
            assert np.abs(frames[key] - stored).mean() < 2
            assert np.abs(frames[key][::-1] - stored).mean() > 10  # it would notice
        if same:
            found = {key: hashlib.sha256(value).hexdigest() for key, value in parts.items()}
            keys = ["state", "robot"] + (
                list(protocol.CAMERAS) if simulator.renderer() == frozen["renderer"] else []
            )
            assert [found[key] for key in keys] == [case["sha256"][key] for key in keys]
        told.append(f"{case['task']}: {error:.1e}")
        simulator.close()
    print("same machine, bits compared" if same else f"another machine: {machine()}", "; ".join(told))


def test_two_processes_play_the_same_bits(tmp_path):
    program = (
        "import freeze, pathlib, sys; freeze.CASES = freeze.CASES[:1]; "
        "freeze.FROZEN = pathlib.Path(sys.argv[1]); freeze.main()"
    )
    files = [tmp_path / "one.json", tmp_path / "two.json"]
    for file in files:
        ran = subprocess.run([sys.executable, "-c", program, file], cwd=HERE, capture_output=True, text=True)
        assert ran.returncode == 0, ran.stderr
    one, two = (json.loads(file.read_text()) for file in files)
    assert one == two and len(one["cases"][0]["sha256"]) == 4


def test_the_request_is_what_openpis_client_sends_byte_by_byte(simulators):
    """From robosuite's own observation: openpi's client resizes and packs, robosuite converts the rotation."""
    task, episode = "put_the_wine_bottle_on_top_of_the_cabinet", 0
    literal = simulators("libero_goal", literal=True)
    play(literal, task, episode, 7)
    raw = literal.observed()

    def resized(name):
        frame = np.ascontiguousarray(raw[name][::-1, ::-1])
        return image_tools.convert_to_uint8(image_tools.resize_with_pad(frame, 224, 224))

    theirs = {
        "observation/image": resized("agentview_image"),
        "observation/wrist_image": resized("robot0_eye_in_hand_image"),
        "observation/state": np.concatenate(
            (raw["robot0_eef_pos"], quat2axisangle(raw["robot0_eef_quat"].copy()), raw["robot0_gripper_qpos"])
        ),
        "prompt": "put the wine bottle on top of the cabinet",
    }
    bench = LiberoBenchmark("libero_goal")
    bench.reset(task, episode)
    for step in range(7):
        bench.step(script(step))
    ours = bench.observe(True)
    assert msgpack_numpy.packb(ours) == msgpack_numpy.packb(theirs)
    assert ours["observation/state"].shape == (8,) and ours["observation/state"].dtype == np.float64
    bench.step(script(7))
    assert msgpack_numpy.packb(bench.observe(True)) != msgpack_numpy.packb(theirs)
    assert list(bench.observe(False)) == ["observation/state", "prompt"]
    bench.close()


def test_minus_one_opens_the_gripper(simulators):
    simulator = simulators("libero_object")
    simulator.reset(simulator.tasks()[0], 0)
    simulator.settle()

    def width():
        fingers = simulator.observed()["robot0_gripper_qpos"]
        return fingers[0] - fingers[1]

    opened = width()
    for _ in range(10):
        simulator.step([0, 0, 0, 0, 0, 0, 1])
    closed = width()
    for _ in range(10):
        simulator.step([0, 0, 0, 0, 0, 0, -1])
    assert opened > 0.07 and closed < 0.01 and width() > 0.07  # the hand opens to 8 cm


def test_what_cannot_be_is_told():
    with pytest.raises(ValueError, match="libero_10"):
        LiberoBenchmark("libero_11")
    with pytest.raises(ValueError, match="max_steps"):
        LiberoBenchmark("libero_goal", max_steps=301)
    bench = LiberoBenchmark("libero_goal")
    assert bench.max_steps(STOVE) == 300 and bench.scenes(STOVE) == 50 and len(bench.tasks()) == 10
    with pytest.raises(EvalError, match="call reset"):
        bench.step(np.zeros(7))
    with pytest.raises(ValueError, match="no task"):
        bench.reset("no_such_task", 0)
    with pytest.raises(ValueError, match="between 0 and 49"):
        bench.reset(STOVE, 50)
    bench.reset(STOVE, 0)
    for bad in (np.zeros(6), np.full(7, np.nan)):
        with pytest.raises(ValueError, match="7 finite numbers"):
            bench.step(bad)
    bench.close()
    assert {key: bench.identity()[key] for key in VERSIONS} == dict(VERSIONS)


def test_a_machine_that_cannot_render_is_told_what_to_install():
    program = "from servoflow_eval.libero import LiberoBenchmark as B; b = B('libero_goal'); b.reset(b.tasks()[0], 0)"
    ran = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "MUJOCO_GL": "egl", "MUJOCO_EGL_DEVICE_ID": "99"},
        capture_output=True,
        text=True,
    )
    assert ran.returncode != 0
    told = next(line for line in ran.stderr.splitlines() if ".SimulatorError: " in line)
    assert DRAWER in told and "MUJOCO_EGL_DEVICE_ID" in told and "apt-get install libegl1" in told
