"""openpi's LIBERO protocol as data and pure functions; nothing here needs a simulator.

Source of every number: `examples/libero/main.py` and `packages/openpi-client` of github.com/Physical-Intelligence/openpi,
commit 15a9616. An episode there: reset, stored initial state, ten settling steps with the gripper open, then at most
`MAX_STEPS` actions, five of each chunk; it ends as a success after the first action that satisfies the task's predicate.
"""

from __future__ import annotations

from collections.abc import Mapping
import math
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

MAX_STEPS: Mapping[str, int] = {
    "libero_spatial": 220,
    "libero_object": 280,
    "libero_goal": 300,
    "libero_10": 520,
    "libero_90": 400,
}
"""Actions after which an episode has failed; the settling steps come on top."""
SETTLING_STEPS = 10
SETTLING_ACTION: tuple[float, ...] = (0.0, 0.0, 0.0, 0.0, 0.0, 0.0, -1.0)
"""No motion, gripper open: -1 opens the gripper and +1 closes it, in settling and in the policy's actions alike."""
REPLAN = 5
EPISODES = 50
SEED = 7
RENDER_SIZE = 256
IMAGE_SIZE = 224
ACTION_DIM = 7
IMAGE_KEY, WRIST_KEY, STATE_KEY, PROMPT_KEY = (
    "observation/image",
    "observation/wrist_image",
    "observation/state",
    "prompt",
)
CAMERAS: Mapping[str, str] = {IMAGE_KEY: "agentview", WRIST_KEY: "robot0_eye_in_hand"}
"""The request's key of each of the simulator's cameras, in the request's order."""

Frame = npt.NDArray[np.uint8]


def resize_with_pad(frame: Frame, height: int, width: int) -> Frame:
    """uint8 [h, w, 3] to [height, width, 3], as openpi's client does: Pillow's bilinear filter, which averages when it
    shrinks, both sides by the larger of the two ratios and cut off to whole pixels, black bars shared out equally, the
    odd pixel below or to the right. A frame of that size already is returned as it is.

    Raises ValueError for anything but uint8 [h, w, 3].
    """
    if frame.dtype != np.uint8 or frame.ndim != 3 or frame.shape[2] != 3 or 0 in frame.shape:
        raise ValueError(f"frame: expected uint8 [height, width, 3], got {frame.dtype} {list(frame.shape)}")
    if frame.shape[:2] == (height, width):
        return frame
    ratio = max(frame.shape[1] / width, frame.shape[0] / height)
    size = (int(frame.shape[1] / ratio), int(frame.shape[0] / ratio))
    out = np.zeros((height, width, 3), np.uint8)
    left, top = (width - size[0]) // 2, (height - size[1]) // 2
    out[top : top + size[1], left : left + size[0]] = Image.fromarray(frame).resize(
        size, Image.Resampling.BILINEAR
    )
    return out


def policy_frame(frame: Frame) -> Frame:
    """What the policy sees of a frame as the simulator renders it: turned by 180 degrees, then 224 pixels wide and high."""
    return resize_with_pad(np.ascontiguousarray(frame[::-1, ::-1]), IMAGE_SIZE, IMAGE_SIZE)


def axis_angle(quaternion: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """[x, y, z, w] of unit length to axis times angle, in [0, 2 pi]: a rotation beyond half a turn is not written as the
    shorter one the other way round, because the training data were not. No rotation is zero exactly.

    Formula: 2 acos(w) (x, y, z) / sqrt(1 - w^2), w cut to [-1, 1]; robosuite's `quat2axisangle`.
    """
    w = min(max(float(quaternion[3]), -1.0), 1.0)
    sine = math.sqrt(1.0 - w * w)
    if math.isclose(sine, 0.0):
        return np.zeros(3)
    return np.asarray(quaternion[:3] * 2.0 * math.acos(w) / sine)


def robot_state(seen: Mapping[str, Any]) -> npt.NDArray[np.float64]:
    """float64 [8] from robosuite's observations: end effector position in metres (3), axis-angle (3), the two fingers'
    positions in metres (2)."""
    return np.concatenate(
        (seen["robot0_eef_pos"], axis_angle(seen["robot0_eef_quat"]), seen["robot0_gripper_qpos"])
    )


def observation(seen: Mapping[str, Any], frames: Mapping[str, Frame], prompt: str) -> dict[str, Any]:
    """openpi's request, keys in openpi's order. `frames`: as the simulator renders them, by request key; may be empty."""
    out: dict[str, Any] = {key: policy_frame(frames[key]) for key in CAMERAS if key in frames}
    out[STATE_KEY] = robot_state(seen)
    out[PROMPT_KEY] = prompt
    return out
