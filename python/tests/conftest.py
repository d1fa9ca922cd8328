"""Checkpoints, frames and requests that the tests share. Options: --servoflow BINARY (of the same sources)."""

import pathlib
import subprocess
import sys

import numpy as np
from PIL import Image
import pytest

import servoflow

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tests/e2e"), str(ROOT / "examples")]
import shared_requests as shared  # noqa: E402

OPENPI = ROOT / "tests/golden/openpi-tiny"
LEROBOT = ROOT / "tests/golden/lerobot-tiny"


def pytest_addoption(parser):
    parser.addoption("--servoflow", required=True, help="the servoflow binary of the same sources")


@pytest.fixture(scope="session")
def binary(request):
    return pathlib.Path(request.config.getoption("--servoflow")).resolve()


def frame(file):
    """RGB uint8 [height, width, 3]."""
    return np.asarray(Image.open(ROOT / file).convert("RGB"))


def observation(request, session, convert=frame):
    """A request of tests/e2e/shared_requests.json as openpi's dict. `convert`: what a file becomes."""
    obs = {key: convert(file) for key, file in request["images"].items()}
    contract = session._contract
    state, at = np.array(request["state"]), 0
    for key, width in contract.state:
        obs[key], at = state[at : at + width], at + width
    obs[contract.prompt] = request["prompt"]
    return obs


REQUESTS = shared.load()


@pytest.fixture(scope="session", params=REQUESTS, ids=lambda r: r["name"])
def case(request, binary):
    """(request, session that has not inferred yet: reset it, what `servoflow run` answers as float64 [horizon, dim])."""
    r = request.param
    policy = servoflow.Policy.open(ROOT / r["checkpoint"], device="cpu", precision="fp32", robot=r["robot"])
    session = policy.new_session(seed=r["seed"])
    return r, session, np.array(shared.run_command(binary, r)["actions"])


@pytest.fixture(scope="session")
def libero_policy():
    return servoflow.Policy.open(OPENPI, device="cpu", precision="fp32", robot="libero", seed=7, max_batch=3)


@pytest.fixture
def libero(libero_policy):
    return libero_policy.new_session(seed=7)


@pytest.fixture
def obs():
    """LIBERO's observation, new and writable each time."""
    r = REQUESTS[0]
    return {
        "observation/image": frame(r["images"]["observation/image"]).copy(),
        "observation/wrist_image": frame(r["images"]["observation/wrist_image"]).copy(),
        "observation/state": np.array(r["state"]),
        "prompt": r["prompt"],
    }


@pytest.fixture(scope="session")
def aloha_checkpoint(binary, tmp_path_factory):
    out = tmp_path_factory.mktemp("synth") / "aloha"
    subprocess.run(
        [binary, "synth", "--model", "tiny", "--dtype", "fp32", "--robot", "aloha", "--horizon", "8", "--tokenizer",
         ROOT / "tests/golden/tokenizer/tokenizer.model", "--log-level", "warn", out],
        check=True, capture_output=True,
    )  # fmt: skip
    return out
