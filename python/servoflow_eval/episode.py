"""One episode: a policy in a scene under one arm, and what is recorded of it."""

from __future__ import annotations

from collections.abc import Callable
import hashlib
import time
from typing import Any

import numpy as np
import numpy.typing as npt

from .arms import Arm
from .errors import EvalError
from .interfaces import Benchmark, Observation, Policy
from .noise import words, episode_seed, flow_noise, seed_of


class Eyes:
    """What the policy is shown of the benchmark: as it is, or spoilt in one of the ways that controls use."""

    def __init__(self, bench: Benchmark, arm: Arm, task: str, episode: int, images: bool = True) -> None:
        self._bench, self._arm, self._images = bench, arm, images
        self._frozen: Observation | None = None
        self._prompt = bench.prompt(prompt_task(bench.tasks(), arm, task, episode))
        if arm.images == "swapped" and len(bench.image_keys) < 2:
            raise EvalError(f"arm {arm.name}: this benchmark has one camera; there is nothing to swap")

    def observe(self) -> Observation:
        """Renders only what will be looked at."""
        bench, how = self._bench, self._arm.images
        if not self._images:
            return bench.observe(False)
        seen = bench.observe(how in ("as-is", "swapped") or (how == "frozen" and self._frozen is None))
        keys = bench.image_keys
        if how == "black":
            seen.update({key: np.zeros(bench.image_shape, np.uint8) for key in keys})
        elif how == "swapped":
            frames = [seen[key] for key in keys]
            seen.update(zip(keys, frames[1:] + frames[:1]))
        elif how == "frozen":
            if self._frozen is None:
                self._frozen = {key: np.array(seen[key]) for key in keys}
            seen.update(self._frozen)
        seen[bench.prompt_key] = self._prompt
        return seen


def prompt_task(tasks: tuple[str, ...], arm: Arm, task: str, episode: int) -> str:
    """The task whose sentence the policy is given. "shuffled": one of the other tasks, drawn for each episode."""
    if arm.prompt == "other":
        return dict(arm.prompt_of)[task]
    if arm.prompt == "shuffled":
        others = [t for t in tasks if t != task]
        if not others:
            raise EvalError(f"arm {arm.name}: this benchmark has one task; there is no other prompt")
        return others[int(words(seed_of("prompt", task, episode), 0, 1)[0]) % len(others)]
    return task


def run(
    bench: Benchmark,
    policy: Policy,
    arm: Arm,
    task: str,
    episode: int,
    film: Callable[[npt.NDArray[np.uint8]], None] | None = None,
    film_every: int = 4,
) -> dict[str, Any]:
    """Plays one episode to its first success or its last step.

    Returns the record that the results' file holds: success, steps (actions executed), replans, seconds in inference, in
    observation and in all, and `trace`, a hash of every action and of the last state: equal traces are equal episodes.
    `film` is given a frame for people every few steps.
    """
    begin = time.perf_counter()
    seed = episode_seed(arm.noise_seed, task, episode)
    bench.reset(task, episode)
    policy.begin(seed)
    eyes = Eyes(bench, arm, task, episode, policy.sees_images)
    trace = hashlib.sha256()
    last = bench.max_steps(task)
    noise_seed = seed_of("action", arm.noise_seed, task, episode)
    steps = replans = 0
    success = False
    infer: list[float] = []
    observe_s = 0.0
    if film is not None:
        film(bench.picture())
    while steps < last and not success:
        at = time.perf_counter()
        observation = eyes.observe()
        observe_s += time.perf_counter() - at
        reply = policy.infer(observation, replans)
        infer.append(reply.seconds)
        chunk = np.asarray(reply.actions, np.float64)
        if chunk.ndim != 2 or chunk.shape[1] != bench.action_dim:
            raise EvalError(
                f"arm {arm.name}: the policy answers with {list(chunk.shape)}; the benchmark takes actions of {bench.action_dim}"
            )
        if len(chunk) < arm.replan:
            raise EvalError(f"arm {arm.name}: replan = {arm.replan} but a chunk has {len(chunk)} actions")
        if not np.isfinite(chunk).all():
            raise EvalError(
                f"arm {arm.name}, {task} {episode}: the policy answered with a value that is not finite"
            )
        if arm.action_noise:
            # One standard normal draw per action and replan, whatever sigma is: arms of the curve differ in scale only.
            chunk = chunk + arm.action_noise * flow_noise(noise_seed, replans, chunk.shape)
        for action in chunk[: arm.replan]:
            success = bool(bench.step(action))
            steps += 1
            trace.update(np.ascontiguousarray(action).tobytes())
            if film is not None and (success or steps % film_every == 0):
                film(bench.picture())
            if success or steps == last:
                break
        replans += 1
    trace.update(bench.digest())
    return {
        "task": task,
        "episode": episode,
        "seed": seed,
        "success": success,
        "steps": steps,
        "replans": replans,
        "infer_s": round(sum(infer), 6),
        "infer_median_s": round(float(np.median(infer)), 6),
        "observe_s": round(observe_s, 6),
        "wall_s": round(time.perf_counter() - begin, 6),
        "trace": trace.hexdigest()[:16],
    }
