"""servoflow: pi0.5 robot policies, from camera frames, state and a sentence to a chunk of robot actions.

    policy = servoflow.Policy.open("checkpoint/", robot="libero")
    result = policy.infer({"observation/image": frame, "observation/wrist_image": wrist,
                           "observation/state": state, "prompt": "open the drawer"})
    result["actions"]  # float64 [horizon, 7], robot units

`Policy` stands where openpi's `Policy` object stands. `servoflow.lerobot.LeRobotPolicy` has lerobot's `select_action` and
`predict_action_chunk`. `servoflow.record` writes cases that `servoflow verify` judges. docs/python.md is the guide.
"""

from ._core import version as __version__
from ._errors import CheckFailed, Error, InvalidInput, RuntimeFailure
from ._policy import Policy, Session, describe, infer_batch

__all__ = [
    "CheckFailed",
    "Error",
    "InvalidInput",
    "Policy",
    "RuntimeFailure",
    "Session",
    "__version__",
    "describe",
    "infer_batch",
]
