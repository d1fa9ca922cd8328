"""Processes that simulate: expert episodes, episodes of the policy under training with the expert's labels, evaluation.

Every process keeps several episodes ("slots"), one task each. At a decision point a slot shows its observation in shared
memory, says so through its pipe, and goes on when the learner has answered with a chunk of actions; meanwhile the process
works on its other slots. Every decision point, and in training a second point half-way through the chunk, is a sample.
"""

from __future__ import annotations

import multiprocessing
import pathlib
import time
import traceback
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import numpy.typing as npt

from servoflow_eval.metaworld import CAMERAS, IMAGE_SIZE, MAX_STEPS, TASKS, MetaWorldEnv

from .config import Config

HORIZON = 16
PICTURE = (len(CAMERAS), IMAGE_SIZE, IMAGE_SIZE, 3)
# Per slot: a sample is picture, state [4], actions [16, 4], truth [9].
SMALL = 4 + HORIZON * 4 + 9


class Board:
    """The shared memory: for each slot two samples, the present one and the one half-way through the last chunk."""

    def __init__(self, folder: pathlib.Path, slots: int, *, create: bool) -> None:
        mode: Any = "w+" if create else "r+"
        self.pictures = np.memmap(folder / "pictures", np.uint8, mode, shape=(slots, 2, *PICTURE))
        self.small = np.memmap(folder / "small", np.float32, mode, shape=(slots, 2, SMALL))


def pack(env: MetaWorldEnv, label: bool) -> npt.NDArray[np.float32]:
    chunk = env.expert_chunk(HORIZON) if label else np.zeros((HORIZON, 4), np.float32)
    return np.concatenate([env.state(), chunk.ravel(), env.truth()])


@dataclass
class Note:
    """What a slot tells the learner. `samples`: which of the board's two are new. `ask`: it waits for actions."""

    slot: int
    task: int
    samples: tuple[int, ...]
    ask: bool
    finished: tuple[int, bool, int] | None = None  # (scene, success, steps) of an episode that has just ended
    driver: str = ""  # who drove the finished episode
    era: int = 0  # counts the changes between training and evaluation: questions of another era are void


class Slot:
    """One episode after another of one task."""

    def __init__(self, index: int, config: Config, env: MetaWorldEnv, total: int) -> None:
        self.index, self.config, self.env = index, config, env
        self.task = index % len(TASKS)
        self.rng = np.random.default_rng((config.seed, index, config.data.first_seed))
        self.seed = config.data.first_seed + index  # every slot counts up by the number of slots
        self.total = total
        self.driver = "expert"
        self.kind = "clean"
        self.scene = -1
        self.policy_share = 0.0
        self.evaluating: list[int] | None = None
        self.running = False
        self.held: npt.NDArray[np.float64] = np.zeros(4)
        self.hold = 0

    def begin(self) -> bool:
        """A new episode; False where evaluation has no scene left."""
        task, rng, data = TASKS[self.task], self.rng, self.config.data
        if self.evaluating is not None:
            if not self.evaluating:
                self.running = False
                return False
            self.scene = self.evaluating.pop(0)
            self.env.reset(task, self.scene)
            self.driver, self.kind, self.limit = "policy", "clean", self.config.evaluation.longest
        else:
            self.env.reset(task, self.env.training_scene(task, self.seed))
            self.scene, self.seed = self.seed, self.seed + self.total
            self.driver = "policy" if rng.uniform() < self.policy_share else "expert"
            draw = rng.uniform()
            clean, restart = data.clean, data.clean + data.restarts
            self.kind = "clean" if draw < clean else "restart" if draw < restart else "noise"
            self.limit = data.dagger_steps if self.driver == "policy" else MAX_STEPS
            if self.kind == "restart":
                self._wander()
        self.running = True
        self.hold = 0
        return True

    def _wander(self) -> None:
        """Moves the hand to a random place; where that solved the task, which sets no example, the episode is still used."""
        rng = self.rng
        target = rng.uniform((-0.3, 0.4, 0.06), (0.3, 0.9, 0.35))
        grip = rng.uniform(-1, 1)
        for _ in range(int(rng.integers(5, 45))):
            pull = np.clip((target - self.env.state()[:3]) * 10, -1, 1)
            self.env.step([*pull, grip])

    def decide(self, board: Board) -> Note:
        """Shows the present observation."""
        label = self.evaluating is None
        self.env.draw(board.pictures[self.index, 0])
        board.small[self.index, 0] = pack(self.env, label)
        return Note(self.index, self.task, (0,) if label else (), True)

    def advance(self, actions: npt.NDArray[np.float32], board: Board) -> Note:
        """Carries a chunk out; returns what to tell: that the episode ended, or the second sample."""
        note = Note(self.index, self.task, (), False)
        n = self.config.data.execute
        for k in range(n):
            if self.driver == "expert":
                action = self.env.expert_action().astype(np.float64)
            else:
                action = actions[k].astype(np.float64)
            if self.kind == "noise" and self.evaluating is None:
                if self.hold == 0:
                    self.held = self.rng.normal(0, self.config.data.noise, 4)
                    self.hold = int(self.rng.integers(1, 6))
                self.hold -= 1
                action = action + self.held
            self.env.step(action)
            if self.env.success or self.env.steps >= self.limit:
                note.finished = (self.scene, self.env.success, self.env.steps)
                note.driver = self.driver
                return note
            if k + 1 == n // 2 and self.evaluating is None:
                self.env.draw(board.pictures[self.index, 1])
                board.small[self.index, 1] = pack(self.env, True)
                note.samples = (1,)
        return note


def work(
    worker: int, config: Config, folder: str, pipe: Connection, first: int, count: int, total: int
) -> None:
    """A process's body. It hears what `Crew.tell` sends, ("stop",), and answers (slot, era, actions)."""
    try:
        _work(worker, config, pathlib.Path(folder), pipe, first, count, total)
    except (EOFError, BrokenPipeError, KeyboardInterrupt):
        pass  # the learner is gone
    except Exception:
        pipe.send(traceback.format_exc())


def _work(
    worker: int, config: Config, folder: pathlib.Path, pipe: Connection, first: int, count: int, total: int
) -> None:
    board = Board(folder, total, create=False)
    slots = {index: Slot(index, config, MetaWorldEnv(), total) for index in range(first, first + count)}
    ready: list[Slot] = []
    era = 0

    _fill(worker, config, folder, board, list(slots.values()))
    pipe.send("filled")

    def say(note: Note) -> None:
        note.era = era
        pipe.send(note)

    while True:
        for slot in ready:
            if slot.running or slot.begin():
                say(slot.decide(board))
        ready = []
        while not ready or pipe.poll(0):
            message = pipe.recv()
            if message[0] == "stop":
                return
            if message[0] == "share":
                for slot in slots.values():
                    slot.policy_share = message[1]
            elif message[0] in ("evaluate", "train"):
                # Episodes under way are dropped.
                era += 1
                for index, slot in slots.items():
                    slot.evaluating = list(message[1].get(index, [])) if message[0] == "evaluate" else None
                    slot.running = False
                ready = list(slots.values())
            elif message[1] == era:
                slot = slots[message[0]]
                note = slot.advance(message[2], board)
                slot.running = note.finished is None
                say(note)
                ready.append(slot)


def initial_share(config: Config) -> int:
    """Samples that each process makes before training begins."""
    return -(-config.data.initial_samples // config.data.workers)


class Initial:
    """One process's samples from before the training, in shared memory."""

    def __init__(self, folder: pathlib.Path, worker: int, config: Config, *, create: bool) -> None:
        mode: Any = "w+" if create else "r+"
        n = initial_share(config)
        self.paths = [folder / f"initial-{worker}-{part}" for part in ("pictures", "small", "task")]
        self.pictures = np.memmap(self.paths[0], np.uint8, mode, shape=(n, *PICTURE))
        self.small = np.memmap(self.paths[1], np.float32, mode, shape=(n, SMALL))
        self.task = np.memmap(self.paths[2], np.int64, mode, shape=(n,))

    def remove(self) -> None:
        for path in self.paths:
            path.unlink(missing_ok=True)


def _fill(worker: int, config: Config, folder: pathlib.Path, board: Board, slots: list[Slot]) -> None:
    """Expert episodes until this process's share of the initial samples is there."""
    store = Initial(folder, worker, config, create=True)
    idle = np.zeros((HORIZON, 4), np.float32)
    at, n = 0, len(store.task)
    while at < n:
        for slot in slots:
            if slot.running or slot.begin():
                notes = [slot.decide(board), slot.advance(idle, board)]
                slot.running = notes[1].finished is None
                for note in notes:
                    for k in note.samples:
                        if at < n:
                            store.pictures[at] = board.pictures[slot.index, k]
                            store.small[at] = board.small[slot.index, k]
                            store.task[at] = slot.task
                            at += 1


class Crew:
    """The processes, from the learner's side."""

    def __init__(self, config: Config, folder: pathlib.Path) -> None:
        context = multiprocessing.get_context("spawn")
        data = config.data
        self.slots = data.workers * data.slots
        self.era = 0
        self.filled: list[int] = []  # processes whose initial samples are ready
        folder.mkdir(parents=True, exist_ok=True)
        self.board = Board(folder, self.slots, create=True)
        self.pipes: list[Connection] = []
        self.processes = []
        self.owner = {}
        for worker in range(data.workers):
            ours, theirs = context.Pipe()
            first = worker * data.slots
            process = context.Process(
                target=work,
                args=(worker, config, str(folder), theirs, first, data.slots, self.slots),
                daemon=True,
            )
            process.start()
            theirs.close()
            self.pipes.append(ours)
            self.processes.append(process)
            for slot in range(first, first + data.slots):
                self.owner[slot] = ours

    def notes(self, timeout: float) -> list[Note]:
        """What slots have said. Raises RuntimeError with the process's own words where one failed."""
        out: list[Note] = []
        for pipe in multiprocessing.connection.wait(self.pipes, timeout):
            assert isinstance(pipe, Connection)
            while pipe.poll(0):
                try:
                    message = pipe.recv()
                except EOFError:
                    raise RuntimeError("a simulation process ended by itself") from None
                if message == "filled":
                    self.filled.append(self.pipes.index(pipe))
                    continue
                if isinstance(message, str):
                    raise RuntimeError(f"a simulation process failed:\n{message}")
                if message.era == self.era:
                    out.append(message)
        return out

    def answer(self, slot: int, actions: npt.NDArray[np.float32]) -> None:
        self.owner[slot].send((slot, self.era, actions))

    def tell(self, *message: Any) -> None:
        """("share", x): the policy's share of the episodes. ("evaluate", {slot: scenes}), ("train",): a new era."""
        if message[0] in ("evaluate", "train"):
            self.era += 1
        for pipe in self.pipes:
            pipe.send(message)

    def stop(self) -> None:
        for pipe in self.pipes:
            try:
                pipe.send(("stop",))
            except OSError:
                pass
        deadline = time.time() + 5
        for process in self.processes:
            process.join(max(0.0, deadline - time.time()))
            if process.is_alive():
                process.terminate()
