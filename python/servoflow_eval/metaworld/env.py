"""One environment for all tasks: frozen scenes, pictures, state, success, snapshots, and the scripted expert."""

from __future__ import annotations

import importlib.metadata
import pickle
import warnings
from dataclasses import dataclass
from typing import Any, SupportsIndex

import mujoco
import numpy as np
import numpy.typing as npt

from . import scenes
from .render import CAMERAS, Renderer
from .tasks import prompts, task_info

MAX_STEPS = 500
"""Steps after which an episode is over, as in the benchmark; one step is 1/80 s."""
ACTION_WIDTH = 4
STATE_WIDTH = 4

_PINS = {"metaworld": "3.1.1", "mujoco": "3.3.0", "gymnasium": "1.1.1"}


class SimulatorError(RuntimeError):
    """The simulator is missing, of another version, or was used out of order."""


def check_versions() -> None:
    """Raises SimulatorError where the simulator's packages are not the ones that every figure was taken with."""
    found = {}
    for name in _PINS:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "missing"
    if found != _PINS:
        wanted = " ".join(f"{name}=={version}" for name, version in _PINS.items())
        have = ", ".join(f"{name} {version}" for name, version in found.items())
        raise SimulatorError(f"wrong simulator ({have}): pip install {wanted}")


@dataclass
class Snapshot:
    """Everything an episode needs to go on from here, bit for bit. Good for the episode it was taken in."""

    task: str
    scene: npt.NDArray[np.float64]
    physics: npt.NDArray[np.float64]
    warmstart: npt.NDArray[np.float64]
    previous: npt.NDArray[np.float64]
    fields: dict[str, Any]
    steps: int
    success: bool


# What the environments keep in Python and change while an episode runs, reward bookkeeping that success may hang on.
_FIELDS = (
    "_target_to_obj_init",
    "reachCompleted",
    "pickCompleted",
    "placeCompleted",
    "_did_see_sim_exception",
)


class _Simulation:
    """One task's model. Made once, reset many times."""

    def __init__(self, task: str) -> None:
        import metaworld.env_dict
        import metaworld.policies

        warnings.filterwarnings("ignore", message="Constant\\(s\\) may be too high")
        self.task = task
        self.info = task_info(task)
        self.cls: Any = metaworld.env_dict.ALL_V3_ENVIRONMENTS[task]
        self.env: Any = self.cls()
        policy: Any = metaworld.policies.ENV_POLICY_MAP[task]
        self.expert = policy()
        model = self.env.model
        for name in self.info.hidden_sites:
            model.site(name).rgba[3] = 0.0
        self.pristine = tuple(np.copy(a) for a in (model.site_pos, model.site_sameframe, model.body_pos))
        self.renderer: Renderer | None = None

    def reset(self, vector: npt.NDArray[np.float64]) -> None:
        from metaworld.types import Task

        model, data = self.env.model, self.env.data
        # Resets write into the model: start each from the same one, so that an episode does not depend on those before.
        model.site_pos[:], model.site_sameframe[:], model.body_pos[:] = self.pristine
        settings = {"rand_vec": vector.copy(), "env_cls": self.cls, "partially_observable": False}
        self.env.set_task(Task(env_name=self.task, data=pickle.dumps(settings)))
        self.env.reset()
        self._place_marks()
        # Not mj_forward: it would reset the solver's warm start, and with it the episode.
        mujoco.mj_kinematics(model, data)
        mujoco.mj_comPos(model, data)
        mujoco.mj_camlight(model, data)

    def _place_marks(self) -> None:
        """Puts the goals' marks where the environment has them: it moves them in `data` alone, which a frame forgets."""
        model, data = self.env.model, self.env.data
        for name, position in self.env._target_site_config:
            site = model.site(name).id
            body = model.site_bodyid[site]
            model.site_sameframe[site] = 0
            model.site_pos[site] = data.xmat[body].reshape(3, 3).T @ (np.asarray(position) - data.xpos[body])


class MetaWorldEnv:
    """The ten tasks behind one door. Keeps a simulation and a renderer of each task that was asked for; not for threads.

    `render=False` leaves the pictures out of `observe`, for expert roll-outs.
    """

    def __init__(self, *, render: bool = True) -> None:
        check_versions()
        self._render = render
        self._simulations: dict[str, _Simulation] = {}
        self._now: _Simulation | None = None
        self._scene = np.empty(0)
        self._prompt = ""
        self._steps = 0
        self._success = False

    # The episode.

    def reset(
        self,
        task: str,
        scene: SupportsIndex | npt.NDArray[np.float64] = 0,
        *,
        prompt: str | None = None,
    ) -> None:
        """Starts an episode: `scene` is the index of an evaluation scene (0 to 199) or a scene's vector.

        `prompt` replaces the task's sentence. Raises ValueError for an unknown task, a scene that does not exist, and a
        vector that the environment would draw again.
        """
        simulation = self._simulation(task)
        vector = self._vector(simulation, scene)
        simulation.reset(vector)
        self._now, self._scene, self._steps, self._success = simulation, vector, 0, False
        self._prompt = prompts(task)[0] if prompt is None else prompt

    def observe(self) -> dict[str, Any]:
        """What a policy may see: `images` {camera: uint8 [128, 128, 3]}, `state` float32 [4], `prompt`.

        State: the hand's x, y, z in metres and how far the gripper is open, 0 to 1.
        """
        observation: dict[str, Any] = {"state": self.state(), "prompt": self._prompt}
        if self._render:
            observation["images"] = dict(zip(CAMERAS, self.draw()))
        return observation

    def step(self, action: npt.ArrayLike) -> bool:
        """One step of 1/80 s; `action` [4] is clipped to [-1, 1]. Returns whether the task is solved as of this step.

        Raises SimulatorError after the episode's 500th step, ValueError for another shape or a value not finite.
        """
        simulation = self._running()
        values = np.asarray(action, np.float64)
        if values.shape != (ACTION_WIDTH,):
            raise ValueError(f"action: expected shape ({ACTION_WIDTH},), got {values.shape}")
        if not np.isfinite(values).all():
            raise ValueError(f"action: a value is not finite: {values}")
        if self._steps >= MAX_STEPS:
            raise SimulatorError(f"the episode ended after {MAX_STEPS} steps: call reset")
        simulation.env.curr_path_length = 0
        *_, info = simulation.env.step(np.clip(values, -1.0, 1.0).astype(np.float32))
        self._steps += 1
        solved = bool(info["success"])
        self._success = self._success or solved
        return solved

    @property
    def success(self) -> bool:
        """Whether any step of this episode solved the task: what the benchmark counts."""
        return self._success

    @property
    def done(self) -> bool:
        """Whether the episode is decided: solved, or 500 steps long."""
        return self._success or self._steps >= MAX_STEPS

    @property
    def steps(self) -> int:
        """Steps made in this episode."""
        return self._steps

    @property
    def task(self) -> str:
        """The running episode's task."""
        return self._running().task

    @property
    def scene(self) -> npt.NDArray[np.float64]:
        """The running episode's vector."""
        return self._scene.copy()

    # What the policy sees, in parts.

    def state(self) -> npt.NDArray[np.float32]:
        """float32 [4]: the hand's x, y, z in metres, gripper opening 0 to 1."""
        full = self._running().env._get_curr_obs_combined_no_goal()
        return np.asarray(full[:STATE_WIDTH], np.float32)

    def draw(self, out: npt.NDArray[np.uint8] | None = None) -> npt.NDArray[np.uint8]:
        """uint8 [3, 128, 128, 3]: the cameras in the order of CAMERAS."""
        simulation = self._running()
        if simulation.renderer is None:
            simulation.renderer = Renderer(simulation.env.model)
        return simulation.renderer.draw(simulation.env.data, out)

    def truth(self) -> npt.NDArray[np.float32]:
        """float32 [9]: hand, object, goal in metres. For training's localisation heads and for checks, never for a policy."""
        env = self._running().env
        full = env._get_curr_obs_combined_no_goal()
        return np.concatenate([full[:3], full[4:7], np.asarray(env._get_pos_goal())]).astype(np.float32)

    # Going back, and the expert.

    def snapshot(self) -> Snapshot:
        """The episode as it stands, for `restore`."""
        simulation = self._running()
        model, data = simulation.env.model, simulation.env.data
        kind = mujoco.mjtState.mjSTATE_INTEGRATION
        physics = np.empty(mujoco.mj_stateSize(model, kind))
        mujoco.mj_getState(model, data, physics, kind)
        fields = {name: getattr(simulation.env, name) for name in _FIELDS if hasattr(simulation.env, name)}
        return Snapshot(
            simulation.task,
            self._scene,
            physics,
            data.qacc_warmstart.copy(),
            np.copy(simulation.env._prev_obs),
            fields,
            self._steps,
            self._success,
        )

    def restore(self, snapshot: Snapshot) -> None:
        """Goes back to a snapshot of this episode. Raises SimulatorError for one of another."""
        simulation = self._running()
        if snapshot.task != simulation.task or snapshot.scene is not self._scene:
            raise SimulatorError("restore: the snapshot is of another episode")
        model, data = simulation.env.model, simulation.env.data
        mujoco.mj_setState(model, data, snapshot.physics, mujoco.mjtState.mjSTATE_INTEGRATION)
        mujoco.mj_forward(model, data)
        data.qacc_warmstart[:] = snapshot.warmstart
        simulation.env._prev_obs = np.copy(snapshot.previous)
        for name, value in snapshot.fields.items():
            setattr(simulation.env, name, value)
        self._steps, self._success = snapshot.steps, snapshot.success

    def expert_action(self) -> npt.NDArray[np.float32]:
        """float32 [4] in [-1, 1]: what the task's scripted policy does here. It looks at the present alone."""
        simulation = self._running()
        env = simulation.env
        previous = env._prev_obs
        observation = env._get_obs()
        env._prev_obs = previous
        space = env.sawyer_observation_space
        action = simulation.expert.get_action(np.clip(observation, space.low, space.high))
        return np.asarray(np.clip(action[:ACTION_WIDTH], -1.0, 1.0), np.float32)

    def expert_chunk(self, length: int = 16) -> npt.NDArray[np.float32]:
        """float32 [length, 4]: the expert's next actions from here, by rolling it out and going back."""
        here = self.snapshot()
        env = self._running().env
        chunk = np.empty((length, ACTION_WIDTH), np.float32)
        for k in range(length):
            chunk[k] = self.expert_action()
            if k + 1 < length:
                env.set_xyz_action(chunk[k, :3])
                env.do_simulation([chunk[k, 3], -chunk[k, 3]], n_frames=env.frame_skip)
                mujoco.mj_forward(env.model, env.data)
        self.restore(here)
        return chunk

    def ranges(self, task: str) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        """Lowest and highest values of the task's scene vectors, as the environment draws them."""
        space = self._simulation(task_info(task).scenes_of or task).env._random_reset_space
        return np.asarray(space.low, np.float64), np.asarray(space.high, np.float64)

    def training_scene(self, task: str, seed: int) -> npt.NDArray[np.float64]:
        """The training scene of a seed from 100000 on."""
        return scenes.training_vector(task, seed, *self.ranges(task))

    def close(self) -> None:
        """Gives the renderers back."""
        for simulation in self._simulations.values():
            if simulation.renderer is not None:
                simulation.renderer.close()
            simulation.env.close()
        self._simulations.clear()
        self._now = None

    def _running(self) -> _Simulation:
        if self._now is None:
            raise SimulatorError("no episode is running: call reset first")
        return self._now

    def _simulation(self, task: str) -> _Simulation:
        task_info(task)
        if task not in self._simulations:
            self._simulations[task] = _Simulation(task)
        return self._simulations[task]

    def _vector(
        self, simulation: _Simulation, scene: SupportsIndex | npt.NDArray[np.float64]
    ) -> npt.NDArray[np.float64]:
        if not isinstance(scene, np.ndarray):
            index = int(scene)
            if not 0 <= index < scenes.EVALUATION_SCENES:
                raise ValueError(f"scene: {index} is not between 0 and {scenes.EVALUATION_SCENES - 1}")
            chosen: npt.NDArray[np.float64] = scenes.evaluation_vectors(simulation.task)[index]
            return chosen
        vector = np.array(scene, np.float64)
        space = simulation.env._random_reset_space
        if vector.shape != space.low.shape or not np.isfinite(vector).all():
            raise ValueError(f"scene: expected {space.low.shape[0]} finite numbers, got {vector}")
        if not scenes.acceptable(simulation.task, vector):
            raise ValueError(
                f"scene: object and goal are closer than {simulation.info.separation} m: {vector}"
            )
        return vector
