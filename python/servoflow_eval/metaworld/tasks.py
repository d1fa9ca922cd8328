"""The ten tasks: sentences, how their scenes may be drawn, and which marks a camera may see."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class TaskInfo:
    """One task. `prompts[0]` is the sentence used in evaluation: lerobot's (envs/metaworld_config.json, Apache-2.0).

    `separation`: smallest distance in metres, in the table's plane, that the environment demands between the object's
    place and the goal's; it draws again until that holds, and with a frozen vector that does not hold it would draw
    for ever. `object_at` and `goal_at` are the places in the scene's vector of the (x, y) that it compares.
    """

    name: str
    prompts: tuple[str, ...]
    separation: float = 0.0
    object_at: tuple[int, int] = (0, 1)
    goal_at: tuple[int, int] = (3, 4)
    scenes_of: str = ""
    hidden_sites: tuple[str, ...] = ()


_FAUCET_MARKS = ("goal_open", "goal_close")

_ALL = (
    TaskInfo(
        "push-v3",
        (
            "Push the puck to a goal",
            "Push the puck onto the goal mark",
            "Move the puck to the goal by pushing it",
            "Slide the puck over the table to the goal",
        ),
        separation=0.15,
    ),
    TaskInfo(
        "pick-place-v3",
        (
            "Pick and place a puck to a goal",
            "Pick up the puck and bring it to the goal",
            "Lift the puck and hold it at the goal",
            "Grasp the puck and carry it to the goal mark",
        ),
        separation=0.15,
    ),
    TaskInfo(
        "sweep-v3",
        (
            "Sweep a puck off the table",
            "Sweep the puck off the edge of the table",
            "Push the puck sideways until it leaves the table",
            "Clear the puck off the table",
        ),
    ),
    TaskInfo(
        "coffee-push-v3",
        (
            "Push a mug under a coffee machine",
            "Push the mug to the coffee machine",
            "Move the mug under the coffee machine",
            "Slide the mug up to the coffee machine",
        ),
        separation=0.15,
    ),
    TaskInfo(
        "coffee-pull-v3",
        (
            "Pull a mug from a coffee machine",
            "Pull the mug away from the coffee machine",
            "Take the mug out from under the coffee machine",
            "Drag the mug from the coffee machine to the mark",
        ),
        separation=0.15,
    ),
    TaskInfo(
        "shelf-place-v3",
        (
            "Pick and place a puck onto a shelf",
            "Pick up the puck and put it onto the shelf",
            "Put the puck on the shelf",
            "Lift the puck and set it onto the shelf",
        ),
        separation=0.1,
    ),
    TaskInfo(
        "bin-picking-v3",
        (
            "Grasp the puck from one bin and place it into another bin",
            "Take the puck out of its bin and drop it into the other bin",
            "Move the puck from one bin to the other",
            "Pick up the puck and put it into the other bin",
        ),
    ),
    TaskInfo(
        "push-back-v3",
        (
            "Push the puck to a goal",
            "Push the puck back to the goal",
            "Move the puck back towards the goal mark",
            "Pull the puck back over the table to the goal",
        ),
        separation=0.15,
    ),
    # Open's vectors serve both faucet tasks: the official ranges differ (x within 5 and 10 cm), so that the place of the
    # faucet alone would tell them apart. With the goals' marks hidden too, only the sentence does.
    TaskInfo(
        "faucet-open-v3",
        (
            "Rotate the faucet counter-clockwise",
            "Turn the faucet counter-clockwise",
            "Turn the faucet's handle counter-clockwise",
            "Spin the faucet handle counter-clockwise",
        ),
        hidden_sites=_FAUCET_MARKS,
    ),
    TaskInfo(
        "faucet-close-v3",
        (
            "Rotate the faucet clockwise",
            "Turn the faucet clockwise",
            "Turn the faucet's handle clockwise",
            "Spin the faucet handle clockwise",
        ),
        scenes_of="faucet-open-v3",
        hidden_sites=_FAUCET_MARKS,
    ),
)

INFO: dict[str, TaskInfo] = {info.name: info for info in _ALL}

TASKS: tuple[str, ...] = tuple(INFO)
"""The tasks' names, in the order of every table."""

FAUCET_PAIR: tuple[str, str] = ("faucet-open-v3", "faucet-close-v3")
"""Two tasks whose pictures are equal: only the sentence tells them apart."""


def task_info(task: str) -> TaskInfo:
    """The task's entry. Raises ValueError that lists the names."""
    try:
        return INFO[task]
    except KeyError:
        raise ValueError(f"task: {task!r} is none of the tasks here: {', '.join(TASKS)}") from None


def prompts(task: str) -> tuple[str, ...]:
    """The task's sentences; the first is the one that evaluation uses."""
    return task_info(task).prompts


def other_faucet(task: str) -> str:
    """The faucet task that looks the same and asks for the opposite."""
    first, second = FAUCET_PAIR
    if task not in FAUCET_PAIR:
        raise ValueError(f"task: {task!r} is not one of {FAUCET_PAIR}")
    return second if task == first else first
