"""The Meta-World environment: frozen scenes, exact snapshots, experts that solve them, pictures that hide the answer."""

from __future__ import annotations

import collections.abc

import numpy as np
import pytest

metaworld = pytest.importorskip(
    "metaworld", reason="pip install metaworld==3.1.1 mujoco==3.3.0 gymnasium==1.1.1"
)

from servoflow_eval.metaworld import (  # noqa: E402
    CAMERAS,
    EVALUATION_SCENES,
    FAUCET_PAIR,
    FIRST_TRAINING_SEED,
    IMAGE_SIZE,
    MAX_STEPS,
    MetaWorldEnv,
    SimulatorError,
    TASKS,
    evaluation_vectors,
    other_faucet,
    prompts,
)
from servoflow_eval.metaworld.scenes import EVALUATION_SEEDS, official_vectors  # noqa: E402


@pytest.fixture(scope="module")
def env() -> collections.abc.Iterator[MetaWorldEnv]:
    made = MetaWorldEnv()
    yield made
    made.close()


def test_stored_scenes_are_the_simulators_own() -> None:
    for task in ("push-v3", "faucet-open-v3"):
        assert np.array_equal(evaluation_vectors(task)[50:100], official_vectors(task, EVALUATION_SEEDS[1]))


def test_training_scenes_are_not_evaluation_scenes(env: MetaWorldEnv) -> None:
    assert max(EVALUATION_SEEDS) < FIRST_TRAINING_SEED
    for task in TASKS:
        low, high = env.ranges(task)
        kept = evaluation_vectors(task)
        assert kept.shape == (EVALUATION_SCENES, low.size)
        assert len(np.unique(kept, axis=0)) == EVALUATION_SCENES
        assert (kept >= low).all() and (kept <= high).all()
        drawn = np.stack([env.training_scene(task, FIRST_TRAINING_SEED + k) for k in range(300)])
        assert (drawn >= low).all() and (drawn <= high).all()
        together = {row.tobytes() for row in kept} & {row.tobytes() for row in drawn}
        assert not together
        with pytest.raises(ValueError, match="kept for evaluation"):
            env.training_scene(task, max(EVALUATION_SEEDS))


@pytest.mark.parametrize("task", TASKS)
def test_expert_solves_a_scene_and_snapshots_are_exact(env: MetaWorldEnv, task: str) -> None:
    rng = np.random.default_rng(7)
    env.reset(task, 3)
    for _ in range(25):
        env.step(env.expert_action() + rng.normal(0, 0.3, 4))
    here = env.snapshot()
    chunk = env.expert_chunk(16)
    assert np.abs(chunk).max() <= 1.0
    rolled = []
    for _ in range(16):
        rolled.append(env.expert_action())
        env.step(rolled[-1])
    # The label of a state is what the expert does from it, step for step, and making it leaves no trace.
    assert np.array_equal(np.stack(rolled), chunk)
    after, picture, steps = env.snapshot().physics, env.draw(), env.steps
    env.restore(here)
    assert env.steps == steps - 16
    for action in rolled:
        env.step(action)
    assert np.array_equal(env.snapshot().physics, after)
    assert np.array_equal(env.draw(), picture)
    while not env.done:
        env.step(env.expert_action())
    assert env.success and env.steps < MAX_STEPS


def test_an_episode_does_not_depend_on_those_before() -> None:
    def final(env: MetaWorldEnv, task: str) -> np.ndarray:
        env.reset(task, 11)
        for _ in range(30):
            env.step(env.expert_action())
        return np.concatenate([env.snapshot().physics, env.truth()])

    for task in ("shelf-place-v3", "faucet-close-v3", "coffee-pull-v3"):
        fresh = MetaWorldEnv(render=False)
        used = MetaWorldEnv(render=False)
        for scene in (0, 1):
            used.reset(task, scene)
            used.step(np.ones(4))
        assert np.array_equal(final(fresh, task), final(used, task))


def test_observation(env: MetaWorldEnv) -> None:
    env.reset("push-v3", 0)
    observation = env.observe()
    assert sorted(observation) == ["images", "prompt", "state"]
    assert tuple(observation["images"]) == CAMERAS
    for image in observation["images"].values():
        assert image.shape == (IMAGE_SIZE, IMAGE_SIZE, 3) and image.dtype == np.uint8
        assert image.std() > 10
    assert observation["state"].dtype == np.float32 and observation["state"].shape == (4,)
    assert observation["prompt"] == prompts("push-v3")[0]
    env.reset("push-v3", 0, prompt="Do nothing")
    assert env.observe()["prompt"] == "Do nothing"


def test_first_picture_shows_this_scenes_goal(env: MetaWorldEnv) -> None:
    """A stale mark would show the place of the last episode's goal: equal scenes after different ones are equal pictures."""
    for task in ("push-v3", "pick-place-v3", "coffee-push-v3", "shelf-place-v3", "push-back-v3"):
        env.reset(task, 5)
        first = env.draw()
        env.reset(task, 6)
        assert not np.array_equal(env.draw(), first)
        env.reset(task, 5)
        assert np.array_equal(env.draw(), first)
        # And a step leaves the mark where it was: only the arm's few pixels move.
        env.step(np.zeros(4))
        changed = (np.abs(env.draw()[2].astype(int) - first[2].astype(int)).max(axis=2) > 40).mean()
        assert changed < 0.02


def test_pictures_do_not_depend_on_what_else_was_drawn(env: MetaWorldEnv) -> None:
    scenes = [("push-v3", 1), ("faucet-open-v3", 0), ("push-v3", 2), ("shelf-place-v3", 3), ("faucet-open-v3", 9)]
    together = []
    for task, scene in scenes:
        env.reset(task, scene)
        together.append(env.draw())
    for (task, scene), picture in zip(scenes, together):
        alone = MetaWorldEnv()
        alone.reset(task, scene)
        assert np.array_equal(alone.draw(), picture), (task, scene)
        alone.close()


def test_faucet_tasks_look_the_same(env: MetaWorldEnv) -> None:
    first, second = FAUCET_PAIR
    assert other_faucet(first) == second and other_faucet(second) == first
    assert np.array_equal(evaluation_vectors(first), evaluation_vectors(second))
    for scene in (0, 60, 120):
        env.reset(first, scene)
        one, state = env.draw(), env.state()
        env.reset(second, scene)
        assert np.array_equal(env.draw(), one) and np.array_equal(env.state(), state)
    assert prompts(first)[0] != prompts(second)[0]


def test_misuse_is_refused(env: MetaWorldEnv) -> None:
    with pytest.raises(ValueError, match="none of the tasks"):
        env.reset("reach-v3", 0)
    with pytest.raises(ValueError, match="between 0 and 199"):
        env.reset("push-v3", 200)
    with pytest.raises(ValueError, match="finite numbers"):
        env.reset("push-v3", np.full(6, np.nan))
    with pytest.raises(ValueError, match="closer than"):
        env.reset("push-v3", np.array([0.0, 0.69, 0.02, 0.0, 0.8, 0.01]))
    env.reset("push-v3", 0)
    taken = env.snapshot()
    with pytest.raises(ValueError, match="shape"):
        env.step(np.zeros(3))
    with pytest.raises(ValueError, match="not finite"):
        env.step([0.0, 0.0, np.inf, 0.0])
    env.reset("push-v3", 1)
    with pytest.raises(SimulatorError, match="another episode"):
        env.restore(taken)
    for _ in range(MAX_STEPS):
        env.step(np.zeros(4))
    assert env.done and not env.success
    with pytest.raises(SimulatorError, match="call reset"):
        env.step(np.zeros(4))
    with pytest.raises(SimulatorError, match="no episode"):
        MetaWorldEnv(render=False).observe()
