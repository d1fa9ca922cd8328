"""LIBERO for the harness, as openpi evaluates it."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import metadata
import os
from typing import Any

import numpy as np
import numpy.typing as npt

from ..interfaces import Observation
from . import protocol
from .protocol import CAMERAS
from .simulator import VERSIONS, LiberoSimulator


class LiberoBenchmark:
    """`suite`: one of openpi's five. `max_steps`: fewer than the suite's make a quick look, under another protocol, and so
    does another `seed` of the simulator's than openpi's 7.

    Arms of this protocol execute 5 actions of each chunk (`replan = 5`) and play 50 episodes of each task.
    """

    image_keys = tuple(CAMERAS)
    image_shape = (protocol.IMAGE_SIZE, protocol.IMAGE_SIZE, 3)
    prompt_key = protocol.PROMPT_KEY
    action_dim = protocol.ACTION_DIM
    costly_switch = True  # a task's model is compiled when its turn comes

    def __init__(self, suite: str, max_steps: int | None = None, seed: int = protocol.SEED) -> None:
        self._simulator = LiberoSimulator(suite, seed=seed)
        most = protocol.MAX_STEPS[suite]
        self._max_steps = most if max_steps is None else int(max_steps)
        if not 1 <= self._max_steps <= most:
            raise ValueError(f"max_steps: {max_steps} is not between 1 and {suite}'s {most}")
        self._seed = seed
        self._task = ""

    def identity(self) -> Mapping[str, Any]:
        return {
            "name": "libero",
            "suite": self._simulator.suite,
            "max_steps": self._max_steps,
            "settling_steps": protocol.SETTLING_STEPS,
            "image_size": protocol.IMAGE_SIZE,
            "seed": self._seed,
            "renderer": os.environ.get("MUJOCO_GL", ""),
            **{name: metadata.version(name) for name in (*VERSIONS, "numpy", "pillow")},
        }

    def tasks(self) -> tuple[str, ...]:
        return self._simulator.tasks()

    def scenes(self, task: str) -> int:
        return len(self._simulator.initial_states(task))

    def prompt(self, task: str) -> str:
        return self._simulator.prompt(task)

    def max_steps(self, task: str) -> int:
        return self._max_steps

    def reset(self, task: str, scene: int) -> None:
        """Stored initial state `scene`, settled."""
        self._simulator.reset(task, scene)
        self._simulator.settle()
        self._task = task

    def observe(self, images: bool) -> Observation:
        """openpi's request, keys in its order."""
        frames = {key: self._simulator.frame(key) for key in CAMERAS} if images else {}
        return protocol.observation(self._simulator.observed(), frames, self.prompt(self._task))

    def step(self, action: npt.NDArray[np.float64]) -> bool:
        return self._simulator.step(action)

    def digest(self) -> bytes:
        return self._simulator.state().tobytes()

    def picture(self) -> npt.NDArray[np.uint8]:
        """The scene's camera, upright, [256, 256, 3]."""
        return np.ascontiguousarray(self._simulator.frame(protocol.IMAGE_KEY)[::-1, ::-1])

    def close(self) -> None:
        self._simulator.close()
