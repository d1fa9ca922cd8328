"""One training run: the crew makes samples, the learner trains, the policy drives and is corrected, evaluation."""

from __future__ import annotations

import json
import math
import pathlib
import platform
import shutil
import sys
import time
from collections import defaultdict
from typing import Any

import numpy as np
import torch

from servoflow_eval.metaworld import TASKS

from .config import Config
from .learner import Learner, evaluation_plan
from .workers import HORIZON, Crew, Initial


class Log:
    """A line of JSON for each event, to a file and in short to the terminal."""

    def __init__(self, path: pathlib.Path) -> None:
        self.begin = time.time()
        path.parent.mkdir(parents=True, exist_ok=True)
        self.file = path.open("a")

    def __call__(self, event: str, **fields: Any) -> None:
        line = {"event": event, "at": round(time.time() - self.begin, 1), **fields}
        self.file.write(json.dumps(line) + "\n")
        self.file.flush()
        print(f"[{line['at']:7.1f} s] {event} " + " ".join(f"{k}={v}" for k, v in fields.items()), flush=True)


def wilson(successes: int, n: int) -> tuple[float, float]:
    """95 % interval of a share."""
    if n == 0:
        return 0.0, 1.0
    z, p = 1.959964, successes / n
    middle, reach = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return (middle - reach) / (1 + z * z / n), (middle + reach) / (1 + z * z / n)


class Rolls:
    """Success of the policy's episodes while it trains, task by task."""

    def __init__(self) -> None:
        self.counts: dict[str, dict[str, list[int]]] = defaultdict(lambda: defaultdict(lambda: [0, 0]))

    def add(self, driver: str, task: int, success: bool) -> None:
        entry = self.counts[driver][TASKS[task]]
        entry[0] += success
        entry[1] += 1

    def take(self) -> dict[str, Any]:
        out = {}
        for driver, tasks in self.counts.items():
            good, n = (sum(e[k] for e in tasks.values()) for k in (0, 1))
            out[driver] = f"{good}/{n}"
            if driver == "policy":
                out["tasks"] = " ".join(
                    f"{t.removesuffix('-v3')}:{tasks[t][0]}/{tasks[t][1]}" for t in TASKS if t in tasks
                )
        self.counts.clear()
        return out


def train(
    config: Config, out: pathlib.Path, scratch: pathlib.Path, resume: pathlib.Path | None
) -> dict[str, Any]:
    """Runs the whole of it; returns the evaluation. `scratch` holds shared memory, best on a memory file system.

    A file `stop` in `out` ends training at once, a file `seconds` holds another length for it; evaluation follows as usual.
    """
    out.mkdir(parents=True, exist_ok=True)
    log = Log(out / "log.jsonl")
    shutil.rmtree(scratch, ignore_errors=True)
    log("begin", config=config.as_dict(), torch=torch.__version__, python=platform.python_version())
    plan = evaluation_plan(config.data.workers * config.data.slots, config.evaluation.scenes)
    crew = Crew(config, scratch)
    try:
        learner = Learner(config, out, log)
        log("network", parameters=learner.policy.exported_parameters(), device=_device_name(config))
        if resume is not None:
            learner.resume(resume)
        try:
            learner.compile()
        except Exception as error:  # a compiler that fails costs speed, not the run
            log("not compiled", error=f"{type(error).__name__}: {str(error)[:300]}")
            config.optimiser.compile = False
            learner.compiled = learner._losses
            learner.compile()
        _fill(crew, learner, scratch, log)
        crew.tell("share", 0.0)
        crew.tell("train")
        _loop(crew, learner, log)
        learner.save()
        result = evaluate(crew, learner, plan, log)
        (out / "evaluation.json").write_text(json.dumps(result, indent=1) + "\n")
        return result
    finally:
        crew.stop()
        shutil.rmtree(scratch, ignore_errors=True)


def _device_name(config: Config) -> str:
    return torch.cuda.get_device_name() if config.device.startswith("cuda") else config.device


def _fill(crew: Crew, learner: Learner, scratch: pathlib.Path, log: Log) -> None:
    done = 0
    while done < len(crew.pipes):
        crew.notes(1.0)
        while done < len(crew.filled):
            initial = Initial(scratch, crew.filled[done], learner.config, create=False)
            learner.take_initial(initial)
            initial.remove()
            done += 1
            log("initial samples", processes=f"{done}/{len(crew.pipes)}", samples=learner.store.count)


def _loop(crew: Crew, learner: Learner, log: Log) -> None:
    config, o = learner.config, learner.config.optimiser
    begin = last_log = last_save = time.time()
    steps_then, driving, rolls = learner.steps, False, Rolls()
    idle = np.zeros((HORIZON, 4), np.float32)
    while (now := time.time()) - begin < o.seconds and not (learner.out / "stop").exists():
        share = (now - begin) / o.seconds
        if not driving and share >= config.data.dagger_after:
            driving = True
            crew.tell("share", config.data.dagger_share)
            log("the policy drives", share=config.data.dagger_share)
        if learner.steps % config.data.serve_every == 0:
            notes = crew.notes(0)
            learner.take(crew, notes)
            for note in notes:
                if note.finished is not None:
                    rolls.add(note.driver, note.task, note.finished[1])
            asking = [note for note in notes if note.ask]
            if driving and asking:
                learner.act(crew, asking, config.evaluation.dagger_steps)
            else:
                for note in asking:
                    crew.answer(note.slot, idle)
        learner.step(share)
        if now - last_log >= 10:
            speed = (learner.steps - steps_then) / (now - last_log)
            log(
                "training",
                share=round(share, 3),
                steps=learner.steps,
                per_second=round(speed * o.batch),
                store=learner.store.count,
                added=learner.store.added,
                **learner.figures(),
                **rolls.take(),
            )
            last_log, steps_then = now, learner.steps
            if (learner.out / "seconds").exists():
                o.seconds = float((learner.out / "seconds").read_text())
        if now - last_save >= config.checkpoint_seconds:
            learner.save()
            last_save = now
    log("trained", steps=learner.steps, seen=learner.seen, **learner.figures(), **rolls.take())


def evaluate(crew: Crew, learner: Learner, plan: dict[int, list[int]], log: Log) -> dict[str, Any]:
    """The average policy on evaluation scenes, all of them the same for every run."""
    wanted = sum(len(scenes) for scenes in plan.values())
    crew.tell("evaluate", plan)
    results: dict[str, list[tuple[int, bool, int]]] = {task: [] for task in TASKS}
    begin, done = time.time(), 0
    while done < wanted:
        notes = crew.notes(5.0)
        for note in notes:
            if note.finished is not None:
                results[TASKS[note.task]].append(note.finished)
                done += 1
                if done % 50 == 0:
                    log("evaluation", done=f"{done}/{wanted}")
        asking = [note for note in notes if note.ask]
        if asking:
            learner.act(crew, asking, learner.config.evaluation.steps)
    tasks: dict[str, dict[str, Any]] = {}
    for task, episodes in results.items():
        good = sum(success for _, success, _ in episodes)
        low, high = wilson(good, len(episodes))
        tasks[task] = {
            "successes": good,
            "episodes": len(episodes),
            "low": round(low, 4),
            "high": round(high, 4),
            "median_steps": float(np.median([s for _, ok, s in episodes if ok])) if good else None,
            "failed_scenes": sorted(scene for scene, ok, _ in episodes if not ok),
        }
    good = sum(t["successes"] for t in tasks.values())
    low, high = wilson(good, wanted)
    log("evaluated", pooled=f"{good}/{wanted}", low=round(low, 4), high=round(high, 4))
    for task, entry in tasks.items():
        log("task", task=task, successes=entry["successes"], episodes=entry["episodes"])
    return {
        "pooled": {"successes": good, "episodes": wanted, "low": round(low, 4), "high": round(high, 4)},
        "tasks": tasks,
        "seconds": round(time.time() - begin, 1),
        "steps": learner.steps,
        "seen": learner.seen,
        "samples": learner.store.added,
        "euler_steps": learner.config.evaluation.steps,
        "device": _device_name(learner.config),
        "torch": torch.__version__,
        "argv": sys.argv[1:],
        "config": learner.config.as_dict(),
    }
