"""A benchmark without a simulator: a dot on a picture that has to be brought to the mark the prompt names.

For testing and for trying the harness: two cameras see the same square, one of them mirrored; the tasks "to-left" and
"to-right" show the same two marks and differ in the prompt alone. `expert` solves it from the pictures, with options that
make it err.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from .interfaces import Observation
from .noise import seed_of, uniform

SIZE = 24
_PROMPTS = {"to-left": "go to the left mark", "to-right": "go to the right mark"}


class ToyBenchmark:
    """Positions lie in [0, 1]; an action moves the dot by a tenth of it. Solved within 0.06 of the mark.

    `style`: "plain", or "libero" for the keys and widths of that robot's contract (the first two actions move the dot).
    """

    image_shape = (SIZE, SIZE, 3)
    prompt_key = "prompt"

    def __init__(self, max_steps: int = 40, scenes: int = 50, style: str = "plain") -> None:
        if style not in ("plain", "libero"):
            raise ValueError(f"style: {style!r} is neither plain nor libero")
        self._libero = style == "libero"
        self.image_keys: tuple[str, ...] = ("images/front", "images/mirror")
        self.action_dim = 2
        if self._libero:
            self.image_keys, self.action_dim = ("observation/image", "observation/wrist_image"), 7
        self._max_steps, self._scenes = int(max_steps), int(scenes)
        self._dot = self._goal = np.zeros(2)
        self._marks = np.zeros((2, 2))
        self._task = "to-left"

    def identity(self) -> Mapping[str, Any]:
        return {"name": "toy", "max_steps": self._max_steps, "libero": self._libero}

    def tasks(self) -> tuple[str, ...]:
        return tuple(_PROMPTS)

    def scenes(self, task: str) -> int:
        return self._scenes

    def prompt(self, task: str) -> str:
        return _PROMPTS[task]

    def max_steps(self, task: str) -> int:
        return self._max_steps

    def reset(self, task: str, scene: int) -> None:
        u = uniform(seed_of("toy", scene), 0, (6,))
        self._dot = np.array([0.3 + 0.4 * u[0], 0.1 + 0.2 * u[1]])
        self._marks = np.array(
            [[0.05 + 0.15 * u[2], 0.6 + 0.3 * u[3]], [0.95 - 0.15 * u[4], 0.6 + 0.3 * u[5]]]
        )
        self._goal = self._marks[0 if task == "to-left" else 1]
        self._task = task

    def _draw(self) -> npt.NDArray[np.uint8]:
        frame = np.full((SIZE, SIZE, 3), 30, np.uint8)
        grid = (np.arange(SIZE) + 0.5) / SIZE
        for point, channel in ((self._dot, 0), (self._marks[0], 1), (self._marks[1], 2)):
            near = np.exp(-((grid[None] - point[0]) ** 2 + (grid[:, None] - point[1]) ** 2) / 0.002)
            frame[..., channel] = np.maximum(frame[..., channel], (255 * near).astype(np.uint8))
        return frame

    def observe(self, images: bool) -> Observation:
        state = {"observation/state": np.zeros(8)} if self._libero else {"state": np.zeros(2)}
        seen: Observation = {**state, "prompt": self.prompt(self._task)}
        if images:
            frame = self._draw()
            seen.update(zip(self.image_keys, (frame, np.ascontiguousarray(frame[:, ::-1]))))
        return seen

    def step(self, action: npt.NDArray[np.float64]) -> bool:
        self._dot = np.clip(self._dot + 0.1 * np.clip(action[:2], -1, 1), 0, 1)
        return bool(np.linalg.norm(self._dot - self._goal) < 0.06)

    def digest(self) -> bytes:
        return self._dot.tobytes() + self._goal.tobytes()

    def picture(self) -> npt.NDArray[np.uint8]:
        return np.kron(self._draw(), np.ones((6, 6, 1), np.uint8))

    def close(self) -> None:
        pass


class Expert:
    """Finds dot and mark in the first camera's picture and walks there. `wobble` adds the flow noise to its actions;
    `weak` makes it give up in that share of the scenes, by what it sees of them."""

    noise_shape = (8, 2)

    def __init__(
        self, wobble: float = 0.0, weak: float = 0.0, steps: int = 10, precision: str = "fp32"
    ) -> None:
        self._wobble, self._weak = wobble, weak
        self.identity = {"steps": steps, "precision": precision}

    def infer(self, obs: Mapping[str, Any], *, noise: npt.NDArray[np.float32]) -> dict[str, Any]:
        frame = obs["images/front"].astype(np.float64) - 30
        grid = (np.arange(SIZE) + 0.5) / SIZE

        def find(channel: int) -> npt.NDArray[np.float64]:
            weight = np.clip(frame[..., channel], 0, None) ** 2 + 1e-9
            x, y = (weight.sum(0) * grid).sum(), (weight.sum(1) * grid).sum()
            return np.array([float(x), float(y)]) / float(weight.sum())

        dot, goal = find(0), find(1 if "left" in obs["prompt"] else 2)
        if self._weak and (goal.sum() * 1e3) % 1 < self._weak:
            return {"actions": np.zeros(self.noise_shape)}
        out = []
        for i in range(self.noise_shape[0]):
            action = np.clip((goal - dot) * 10, -0.5, 0.5) + self._wobble * noise[i]
            dot = dot + 0.1 * action
            out.append(action)
        return {"actions": np.array(out)}
