"""Which scenes exist: a vector of numbers places the object and the goal of an episode.

Evaluation: 200 per task, `MT1(task, seed)` for the seeds 1000 to 1003, stored in evaluation_scenes.npz so that no version
of a random generator can change them. Training: one vector for each seed from 100000 on, drawn here.

    python -m servoflow_eval.metaworld check-scenes    # the stored scenes are the simulator's own
    python -m servoflow_eval.metaworld write-scenes    # make the file again
"""

from __future__ import annotations

import functools
import io
import pathlib
import pickle
import zipfile
from typing import Any

import numpy as np
import numpy.typing as npt

from .tasks import TASKS, task_info

EVALUATION_SEEDS = (1000, 1001, 1002, 1003)
EVALUATION_SCENES = 200
"""Evaluation scenes of each task."""
FIRST_TRAINING_SEED = 100000
"""Seeds from here on make training scenes; those of evaluation lie below."""

_FILE = pathlib.Path(__file__).with_name("evaluation_scenes.npz")


def official_vectors(task: str, seed: int) -> npt.NDArray[np.float64]:
    """[50, width]: the vectors of `MT1(task, seed).train_tasks`. Takes half a second."""
    import metaworld

    benchmark: Any = metaworld.MT1
    tasks = benchmark(task, seed=seed).train_tasks
    return np.stack([np.asarray(pickle.loads(t.data)["rand_vec"], np.float64) for t in tasks])


@functools.cache
def _stored() -> dict[str, npt.NDArray[np.float64]]:
    with np.load(_FILE, allow_pickle=False) as file:
        return {name: file[name] for name in file.files}


def evaluation_vectors(task: str) -> npt.NDArray[np.float64]:
    """[200, width] of float64: the task's evaluation scenes. The two faucet tasks share theirs."""
    info = task_info(task)
    vectors = _stored()[info.scenes_of or info.name]
    assert vectors.shape[0] == EVALUATION_SCENES and vectors.dtype == np.float64
    return vectors.copy()


def training_vector(
    task: str, seed: int, low: npt.NDArray[np.float64], high: npt.NDArray[np.float64]
) -> npt.NDArray[np.float64]:
    """One training scene, uniform in the environment's range (`MetaWorldEnv.ranges`), again until the environment takes it.

    Raises ValueError for a seed below FIRST_TRAINING_SEED, whose scenes belong to evaluation.
    """
    if seed < FIRST_TRAINING_SEED:
        raise ValueError(f"seed: {seed} is below {FIRST_TRAINING_SEED}; those seeds are kept for evaluation")
    info = task_info(task)
    order = list(TASKS).index(info.scenes_of or info.name)
    rng = np.random.default_rng((seed, order))
    while True:
        vector = rng.uniform(low, high)
        if acceptable(task, vector):
            return vector


def acceptable(task: str, vector: npt.NDArray[np.float64]) -> bool:
    """Whether the environment takes the vector as it is (with a frozen one it would otherwise draw for ever)."""
    info = task_info(task)
    if info.separation == 0.0:
        return True
    gap = vector[list(info.object_at)] - vector[list(info.goal_at)]
    return float(np.linalg.norm(gap)) >= info.separation


def write_scenes() -> pathlib.Path:
    """Makes the file of evaluation scenes again, from the simulator's own; the same bytes whenever it runs."""
    made = official_scenes()
    temporary = _FILE.with_suffix(".new")
    # Not numpy.savez: its archive holds the time of day.
    with zipfile.ZipFile(temporary, "w", zipfile.ZIP_DEFLATED) as archive:
        for task, vectors in made.items():
            buffer = io.BytesIO()
            np.lib.format.write_array(buffer, vectors, allow_pickle=False)
            archive.writestr(zipfile.ZipInfo(f"{task}.npy"), buffer.getvalue(), zipfile.ZIP_DEFLATED)
    temporary.replace(_FILE)
    return _FILE


def official_scenes() -> dict[str, npt.NDArray[np.float64]]:
    """The evaluation scenes as the simulator's package makes them: task -> [200, width]. Takes 20 s."""
    return {
        task: np.concatenate([official_vectors(task, seed) for seed in EVALUATION_SEEDS])
        for task in TASKS
        if not task_info(task).scenes_of
    }
