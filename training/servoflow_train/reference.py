"""The PyTorch network behind servoflow-eval's plug-in interface: the arm that the engine's arms are compared with.

    [policies.pytorch]
    kind = "plugin"
    path = "../training"
    factory = "servoflow_train.reference:make"
    options = { checkpoint = "../models/metaworld-nano" }

It computes in float32 on one thread, from the same frames, state, sentence and noise as the engine.
"""

from __future__ import annotations

from collections.abc import Mapping
import pathlib
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from servoflow_eval.metaworld import CAMERAS

from .export import ROBOT_ACTIONS, load_checkpoint


class Reference:
    """`infer` takes the harness's observation and the flow's starting noise, float32 [horizon, action_dim]."""

    def __init__(self, checkpoint: str, steps: int = 10, threads: int = 1) -> None:
        torch.set_num_threads(threads)
        self._policy, self._tokenizer = load_checkpoint(pathlib.Path(checkpoint))
        self._steps = steps
        sizes = self._policy.s
        self.noise_shape = (int(sizes.horizon), int(sizes.action_dim))
        self.identity = {"torch": str(torch.__version__), "steps": steps, "dtype": "float32"}

    @torch.no_grad()
    def infer(
        self, obs: Mapping[str, Any], *, noise: npt.NDArray[np.float32]
    ) -> dict[str, npt.NDArray[np.float64]]:
        """{"actions": float64 [horizon, 4]} in the robot's units."""
        frames = np.stack([obs[f"images/{camera}"] for camera in CAMERAS])[None]
        pixels = torch.from_numpy(frames).float() / 255.0 * 2.0 - 1.0
        tokens = torch.tensor([self._tokenizer.encode(obs["prompt"], np.asarray(obs["state"], np.float32))])
        valid = torch.ones_like(tokens, dtype=torch.bool)
        flow = self._policy.act(pixels, tokens, valid, torch.from_numpy(noise)[None], self._steps)
        normalized = flow[0].double().numpy()
        return {"actions": (normalized[:, :ROBOT_ACTIONS] + 1.0) / 2.0 * (2.0 + 1e-6) - 1.0}


def make(checkpoint: str, steps: int = 10, threads: int = 1) -> Reference:
    """What the matrix names. `checkpoint`: the exported folder."""
    return Reference(checkpoint, steps, threads)
