"""Meta-World for the harness: ten tasks, 200 frozen scenes each, three cameras of 128 pixels."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

import mujoco
import numpy as np
import numpy.typing as npt
from PIL import Image

from .errors import EvalError
from .interfaces import Observation
from .metaworld import (
    CAMERAS,
    EVALUATION_SCENES,
    IMAGE_SIZE,
    MAX_STEPS,
    TASKS,
    MetaWorldEnv,
    SimulatorError,
    prompts,
)

_WIDTH, _HEIGHT = 288, 216  # of the spectator's view


class MetaWorldBenchmark:
    """`max_steps`: fewer than the benchmark's 500 make a quick look, under another protocol."""

    image_keys = tuple(f"images/{camera}" for camera in CAMERAS)
    image_shape = (IMAGE_SIZE, IMAGE_SIZE, 3)
    prompt_key = "prompt"
    action_dim = 4

    def __init__(self, max_steps: int = MAX_STEPS) -> None:
        if not 1 <= max_steps <= MAX_STEPS:
            raise ValueError(f"max_steps: {max_steps} is not between 1 and {MAX_STEPS}")
        try:
            self._env = MetaWorldEnv()
        except SimulatorError as error:
            raise EvalError(f"benchmark metaworld: {error}") from None
        self._max_steps = max_steps
        self._spectators: dict[str, Any] = {}

    def identity(self) -> Mapping[str, Any]:
        return {
            "name": "metaworld",
            "metaworld": version("metaworld"),
            "mujoco": version("mujoco"),
            "cameras": list(CAMERAS),
            "image_size": IMAGE_SIZE,
            "max_steps": self._max_steps,
            "scenes": "MT1 seeds 1000 to 1003",
        }

    def tasks(self) -> tuple[str, ...]:
        return tuple(TASKS)

    def scenes(self, task: str) -> int:
        return EVALUATION_SCENES

    def prompt(self, task: str) -> str:
        return prompts(task)[0]

    def max_steps(self, task: str) -> int:
        return self._max_steps

    def reset(self, task: str, scene: int) -> None:
        self._env.reset(task, scene)

    def observe(self, images: bool) -> Observation:
        seen: Observation = {"state": self._env.state(), "prompt": self.prompt(self._env.task)}
        if images:
            try:
                seen.update(zip(self.image_keys, self._env.draw()))
            except RuntimeError as error:  # no OpenGL: the message says what to install
                raise EvalError(f"benchmark metaworld: {error}") from None
        return seen

    def step(self, action: npt.NDArray[np.float64]) -> bool:
        return self._env.step(action)

    def digest(self) -> bytes:
        return self._env.snapshot().physics.tobytes()

    def picture(self) -> npt.NDArray[np.uint8]:
        """A spectator's view over what the policy's cameras see."""
        task = self._env.task
        simulation = self._env._running().env
        views = np.concatenate(list(self._env.draw()), axis=1)
        if task not in self._spectators:
            simulation.model.vis.quality.offsamples = 4
            self._spectators[task] = mujoco.Renderer(simulation.model, _HEIGHT, _WIDTH)
        camera = mujoco.MjvCamera()
        camera.type = mujoco.mjtCamera.mjCAMERA_FREE
        camera.lookat[:] = (0.0, 0.68, 0.12)
        camera.distance, camera.azimuth, camera.elevation = 1.35, 130.0, -28.0
        renderer = self._spectators[task]
        renderer.update_scene(simulation.data, camera)
        strip = Image.fromarray(views).resize((_WIDTH, _WIDTH * views.shape[0] // views.shape[1]))
        out: npt.NDArray[np.uint8] = np.concatenate([renderer.render(), np.asarray(strip)], axis=0)
        return out

    def close(self) -> None:
        for renderer in self._spectators.values():
            renderer.close()
        self._spectators.clear()
        self._env.close()
