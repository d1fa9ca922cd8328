"""How a typed program uses the package; mypy reads it, nobody runs it."""

from __future__ import annotations

from typing import Any

import numpy as np

import servoflow
from servoflow.lerobot import LeRobotPolicy
from servoflow.record import OpenPIRecorder


def use(reference: Any) -> None:
    policy = servoflow.Policy.open("checkpoint", robot="libero", seed=np.uint8(3), max_batch=2)
    session: servoflow.Session = policy.new_session(seed=7)
    result: dict[str, Any] = session.infer({"prompt": "go"}, noise=np.zeros((10, 32)), steps=3)
    policy.infer(result, noise=None)
    many: list[dict[str, Any]] = servoflow.infer_batch([session], [result])
    LeRobotPolicy(policy, n_action_steps=4).select_action(many[0])
    OpenPIRecorder(reference, "checkpoint", "cases", robot="libero").infer(result)
    with policy as opened:
        text: str = opened.new_session().contract_json
        print(text, servoflow.describe("checkpoint")["layout"])
