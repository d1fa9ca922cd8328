"""The two things an evaluation brings together: a policy and a benchmark.

Both are protocols, not base classes: whatever has these members will do. Implementations: `policies.py`, `benchmarks.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
import dataclasses
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

# One flat dict with the keys of the robot's contract: uint8 [height, width, 3] frames, float state, the prompt.
Observation = dict[str, Any]
Actions = npt.NDArray[np.float64]


@dataclasses.dataclass(frozen=True)
class Reply:
    """A chunk of actions, float64 [horizon, action_dim] in robot units, and the seconds that the inference took."""

    actions: Actions
    seconds: float


class Policy(Protocol):
    """What decides. One process has one of it per arm; it is never shared between threads."""

    sees_images: bool  # false: nothing is rendered for it

    def identity(self) -> Mapping[str, Any]:
        """What the results depend on: checkpoint and its hash, precision, engine version. Goes into the protocol."""

    def begin(self, seed: int) -> None:
        """A new episode, whose flow noise has this seed."""

    def infer(self, observation: Observation, replan: int) -> Reply:
        """The chunk for this observation; `replan` counts the inferences of the episode from 0."""

    def close(self) -> None:
        """Lets go of what it holds."""


class Benchmark(Protocol):
    """What is decided about: tasks, their scenes, and a simulator that plays one of them at a time."""

    image_keys: tuple[
        str, ...
    ]  # observation keys of the camera frames, in the order in which "swapped" rotates them
    image_shape: tuple[int, int, int]
    prompt_key: str
    action_dim: int
    # Optional: costly_switch = True where another task means building the simulator anew; tasks are then played one by one.

    def identity(self) -> Mapping[str, Any]:
        """Name, versions, options, renderer: what the results depend on."""

    def tasks(self) -> tuple[str, ...]:
        """Names, in a fixed order."""

    def scenes(self, task: str) -> int:
        """How many different scenes the task has; episode i plays scene i."""

    def prompt(self, task: str) -> str:
        """The sentence that names the task."""

    def max_steps(self, task: str) -> int:
        """Actions after which an episode has failed."""

    def reset(self, task: str, scene: int) -> None:
        """Puts the scene up; the same bits each time, whatever was played before."""

    def observe(self, images: bool) -> Observation:
        """What the policy sees now; without the frames if `images` is false, which saves rendering. Changes nothing."""

    def step(self, action: npt.NDArray[np.float64]) -> bool:
        """One action, float64 [action_dim]; true when the task is solved."""

    def digest(self) -> bytes:
        """The simulator's state, for telling whether two runs are the same."""

    def picture(self) -> npt.NDArray[np.uint8]:
        """A frame for people, [height, width, 3]."""

    def close(self) -> None:
        """Lets go of the simulator."""
