"""The training's settings, from a TOML file. Every field is checked; a field nobody knows is an error."""

from __future__ import annotations

import dataclasses
import pathlib
import tomllib
from dataclasses import dataclass, field
from typing import Any

from .model import Sizes


@dataclass
class Data:
    """Simulation on the side of training. Samples are observations with the expert's next 16 actions."""

    workers: int = 15  # processes that simulate and render; leave a core for the learner
    slots: int = 5  # episodes that each of them runs at a time while it waits for actions
    initial_samples: int = 100000  # made with the experts before training begins
    capacity: int = 220000  # samples kept on the GPU, 150 kB each; the oldest policy-made ones make room
    first_seed: int = 100000
    clean: float = 0.35  # shares of expert episodes: nothing added, ...
    restarts: float = 0.2  # ... the hand moved to a random place first; the rest has action noise
    noise: float = 0.3  # its standard deviation, held for 1 to 5 steps
    execute: int = 8  # actions of a chunk that are carried out; a sample at its start and one half-way
    serve_every: int = 2  # training steps between two looks at the processes' questions
    dagger_steps: int = 250  # longest episode of the policy under training
    dagger_after: float = 0.12  # share of training after which the policy drives
    dagger_share: float = 0.7  # of the episodes then


@dataclass
class Optimiser:
    seconds: float = 720.0  # of training; the learning rate follows the clock
    batch: int = 512
    draws: int = 4  # (noise, time) pairs per observation
    learning_rate: float = 1e-3
    final_rate: float = 1e-5
    warmup_steps: int = 300
    weight_decay: float = 0.01
    clip: float = 1.0
    ema: float = 0.999
    locate_weight: float = 0.5
    padding_weight: float = 0.1  # of the action columns that no robot has
    state_dropped: float = 0.1
    state_noise: float = 0.002  # metres, and the same of the gripper's opening
    other_sentences: float = 0.5  # share of samples with a paraphrase
    brightness: float = 0.2
    contrast: float = 0.2
    pixel_noise: float = 2.0  # of 255
    shift_pixels: tuple[int, ...] = (
        0,
        2,
        0,
    )  # per camera; the far ones' geometry is what the policy measures with
    compile: bool = True


@dataclass
class Evaluation:
    scenes: int = 20  # of each task, spread over the 200
    steps: int = 10  # Euler steps
    dagger_steps: int = 5  # Euler steps of the policy that drives while training
    longest: int = 500  # steps of an episode; the benchmark's number


@dataclass
class Config:
    seed: int = 0
    device: str = "cuda"
    checkpoint_seconds: float = 60.0
    data: Data = field(default_factory=Data)
    optimiser: Optimiser = field(default_factory=Optimiser)
    evaluation: Evaluation = field(default_factory=Evaluation)
    sizes: Sizes = field(default_factory=Sizes)

    def as_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def _fill(kind: Any, table: dict[str, Any], where: str) -> Any:
    known = {f.name: f for f in dataclasses.fields(kind)}
    values: dict[str, Any] = {}
    for name, value in table.items():
        if name not in known:
            raise ValueError(f"{where}{name}: no such setting; known: {', '.join(known)}")
        default = getattr(kind(), name)
        if dataclasses.is_dataclass(default):
            if not isinstance(value, dict):
                raise ValueError(f"{where}{name}: expected a table, found {value!r}")
            values[name] = _fill(type(default), value, f"{where}{name}.")
        elif isinstance(default, tuple):
            if (
                not isinstance(value, list)
                or len(value) != len(default)
                or not all(isinstance(v, int) for v in value)
            ):
                raise ValueError(f"{where}{name}: expected {len(default)} whole numbers, found {value!r}")
            values[name] = tuple(value)
        elif isinstance(default, bool) or not isinstance(default, (int, float)):
            if type(value) is not type(default):
                raise ValueError(f"{where}{name}: expected a {type(default).__name__}, found {value!r}")
            values[name] = value
        else:
            if isinstance(value, bool) or not isinstance(value, (int, float)) or value < 0:
                raise ValueError(f"{where}{name}: expected a number of at least 0, found {value!r}")
            if isinstance(default, int) and not isinstance(value, int):
                raise ValueError(f"{where}{name}: expected a whole number, found {value!r}")
            values[name] = type(default)(value)
    return kind(**values)


def read_config(path: pathlib.Path) -> Config:
    """Raises ValueError that names the file and the field."""
    try:
        table = tomllib.loads(path.read_text())
    except (OSError, tomllib.TOMLDecodeError) as error:
        raise ValueError(f"{path}: {error}") from None
    try:
        config: Config = _fill(Config, table, "")
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return config
