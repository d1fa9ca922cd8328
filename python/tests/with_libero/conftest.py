"""What the tests of the LIBERO adapter share. `make test-libero` runs them, where LIBERO is installed."""

import json
import pathlib
import platform
import re

import numpy as np
import pytest

from servoflow_eval.libero import LiberoSimulator, protocol
from servoflow_eval.libero.simulator import VERSIONS

HERE = pathlib.Path(__file__).parent
FROZEN = HERE / "frozen.json"
STEPS = 30


def script(step: int) -> np.ndarray:
    """The scripted action of a step: eighths, so that any machine has the same ones. The gripper closes half-way."""
    arm = [((7 * step + 3 * j * j + j) % 13 - 6) / 8 for j in range(6)]
    return np.array([*arm, -1.0 if step < STEPS // 2 else 1.0])


def play(simulator: LiberoSimulator, task: str, episode: int, steps: int = STEPS) -> None:
    """The settled scene, and so many scripted actions."""
    simulator.reset(task, episode)
    simulator.settle()
    for step in range(steps):
        simulator.step(script(step))


def seen(simulator: LiberoSimulator, frames: bool = True) -> dict[str, bytes]:
    """Everything that may differ between two runs, bit by bit."""
    observed = simulator.observed()
    parts = {"state": simulator.state().tobytes(), "robot": protocol.robot_state(observed).tobytes()}
    if frames:
        parts.update({key: simulator.frame(key).tobytes() for key in protocol.CAMERAS})
    return parts


def thumbnail(frame: np.ndarray) -> np.ndarray:
    """[8, 8, 3]: means of squares, in grey levels."""
    side = frame.shape[0] // 8
    return frame.reshape(8, side, 8, side, 3).mean((1, 3))


def machine() -> dict[str, str]:
    """What a trajectory's last bits depend on beside VERSIONS: NumPy's and MuJoCo's kernels are chosen by processor."""
    first = pathlib.Path("/proc/cpuinfo").read_text().split("\n\n")[0]
    told = dict(re.findall(r"^(.*?)\s*: (.*)$", first, re.MULTILINE))
    cpu = ", ".join(f"{key} {told.get(key)}" for key in ("model name", "cpu family", "model", "stepping"))
    return {"cpu": cpu, "numpy": np.__version__, "python": platform.python_version(), **VERSIONS}


@pytest.fixture
def simulators():
    """Makes simulators that are closed when the test ends."""
    made = []

    def make(suite: str, **options) -> LiberoSimulator:
        made.append(LiberoSimulator(suite, **options))
        return made[-1]

    yield make
    for simulator in made:
        simulator.close()


@pytest.fixture(scope="session")
def frozen():
    return json.loads(FROZEN.read_text())
