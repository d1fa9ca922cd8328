"""Meta-World in the harness, and the engine in Meta-World: what needs no trained policy."""

import json
import subprocess

from conftest import ROOT
import numpy as np
import pytest

from servoflow_eval import arms, cli, episode, noise, policies, workers
from servoflow_eval.errors import EvalError
from servoflow_eval.interfaces import Reply

workers.set_environment()
from servoflow_eval.metaworld_benchmark import MetaWorldBenchmark  # noqa: E402

TASK = "faucet-open-v3"


@pytest.fixture(scope="module")
def bench():
    made = MetaWorldBenchmark(max_steps=160)
    yield made
    made.close()


@pytest.fixture(scope="module")
def checkpoint(binary, tmp_path_factory):
    """A random network with the sizes of the trained one, made by the engine."""
    folder = tmp_path_factory.mktemp("nano")
    layers = {"depth": 6, "heads": 4, "kv_heads": 1, "head_dim": 64}
    architecture = {
        "vision": {"width": 192, "depth": 6, "heads": 3, "mlp": 768, "patch": 16, "image": 128},
        "prefix": {"width": 256, "mlp": 512, "vocab": 1024, **layers},
        "expert": {"width": 128, "mlp": 320, **layers},
    }
    (folder / "nano.json").write_text(json.dumps({"architecture": architecture}))
    tokenizer = ROOT / "tests/golden/tokenizer/tokenizer.model"
    command = [binary, "synth", "--model", folder / "nano.json", "--robot", "metaworld", "--horizon", "16", "--tokenizer",
               tokenizer, "--log-level", "warn", folder / "checkpoint"]  # fmt: skip
    subprocess.run([str(part) for part in command], check=True, capture_output=True)
    return folder / "checkpoint"


class Expert:
    """The benchmark's scripted policy, which looks at the simulator and not at the observation."""

    sees_images = False

    def __init__(self, bench):
        self._env = bench._env

    def identity(self):
        return {}

    def begin(self, seed):
        pass

    def infer(self, observation, replan):
        return Reply(self._env.expert_chunk(8).astype(np.float64), 0.0)

    def close(self):
        pass


def arm(**fields):
    return arms.Arm("n", "p", **fields)


def test_experts_solve_what_the_harness_plays(bench):
    """The whole loop but the policy: chunks of the scripted experts, executed open loop, end in success."""
    solved = [episode.run(bench, Expert(bench), arm(replan=4), task, 0)["success"] for task in bench.tasks()]
    assert sum(solved) >= 8, dict(zip(bench.tasks(), solved))


def test_looking_changes_nothing(bench):
    """An episode is the same bits whether frames are rendered or not, after other episodes, and filmed."""
    plain = episode.run(bench, Expert(bench), arm(replan=4), TASK, 3)["trace"]

    class Looking(Expert):
        sees_images = True

    frames = []
    assert episode.run(bench, Looking(bench), arm(replan=4), TASK, 3)["trace"] == plain
    episode.run(bench, Expert(bench), arm(replan=4), "push-v3", 0)
    assert episode.run(bench, Looking(bench), arm(replan=4), TASK, 3, frames.append)["trace"] == plain
    assert episode.run(bench, Expert(bench), arm(replan=4), TASK, 4)["trace"] != plain
    assert frames[0].shape == (312, 288, 3) and frames[0].dtype == np.uint8 and np.std(frames[-1]) > 20


def test_the_first_frame_after_another_task_is_its_own(bench):
    """Each task has a context of OpenGL: the first drawing after a change must not show what was there before."""
    first = {}
    for _ in range(2):
        for task in ("push-v3", "bin-picking-v3", "shelf-place-v3"):
            for scene in (0, 1):
                bench.reset(task, scene)
                frames = [bench.observe(True) for _ in range(2)]
                for key in bench.image_keys:
                    np.testing.assert_array_equal(frames[0][key], frames[1][key], err_msg=f"{task} {scene} {key}")
                    expected = first.setdefault((task, scene, key), frames[0][key].copy())
                    np.testing.assert_array_equal(frames[0][key], expected, err_msg=f"{task} {scene} {key}")


def test_the_observation_is_what_the_contract_asks_for(bench, checkpoint):
    import servoflow

    told = servoflow.describe(checkpoint, robot=ROOT / "robots/metaworld.toml")
    contract = json.loads(told["contract_json"])
    bench.reset(TASK, 0)
    seen = bench.observe(True)
    assert {c["key"] for c in contract["cameras"]} == set(bench.image_keys)
    assert set(seen) == {
        *bench.image_keys,
        contract["prompt"]["key"],
        *(p["key"] for p in contract["state"]["parts"]),
    }
    assert all(seen[key].shape == bench.image_shape for key in bench.image_keys)
    bare = bench.observe(False)
    assert set(bare) == set(seen) - set(bench.image_keys)


def test_only_the_sentence_tells_the_faucets_apart(bench):
    seen = {}
    for task in ("faucet-open-v3", "faucet-close-v3"):
        bench.reset(task, 5)
        seen[task] = bench.observe(True)
    a, b = seen.values()
    assert a["prompt"] != b["prompt"]
    np.testing.assert_array_equal(a["state"], b["state"])
    for key in bench.image_keys:
        np.testing.assert_array_equal(a[key], b[key])


def test_the_engine_plays_the_same_episode_twice(bench, checkpoint):
    spec = {"kind": "servoflow", "checkpoint": str(checkpoint), "robot": str(ROOT / "robots/metaworld.toml")}
    short = MetaWorldBenchmark(max_steps=32)
    traces = {}
    for name, options, fields in [
        ("fp32", {"precision": "fp32"}, {}),
        ("again", {"precision": "fp32", "threads": 2}, {}),
        ("bf16", {"precision": "bf16"}, {}),
        ("black", {"precision": "fp32"}, {"images": "black"}),
        ("swapped", {"precision": "fp32"}, {"images": "swapped"}),
        ("frozen", {"precision": "fp32"}, {"images": "frozen"}),
        ("noisy", {"precision": "fp32"}, {"action_noise": 0.01}),
        ("seed", {"precision": "fp32"}, {"noise_seed": 1}),
    ]:
        policy = policies.make({**spec, **options}, ROOT)
        record = episode.run(short, policy, arm(**fields), TASK, 0)
        traces[name] = record["trace"]
        assert record["steps"] == 32 and record["replans"] == 4
        policy.close()
    short.close()
    assert traces["fp32"] == traces["again"]
    assert len(set(traces.values())) == len(traces) - 1


def test_seeds_are_those_of_the_protocol(bench):
    record = episode.run(bench, Expert(bench), arm(replan=4), TASK, 7)
    assert record["seed"] == noise.episode_seed(0, TASK, 7)


def test_the_projects_matrix_runs_on_any_checkpoint(checkpoint, tmp_path, capsys):
    """bench/closed_loop.toml as users start it, cut short: two arms, one episode of each task."""
    out = tmp_path / "out"
    code = cli.main(["run", str(ROOT / "bench/closed_loop.toml"), "--checkpoint", str(checkpoint), "--out", str(out), "--set",
                     "benchmark.max_steps=16", "--arm", "fp32", "--arm", "control-random-chunk", "--episodes", "1", "--quiet",
                     "--workers", "2"])  # fmt: skip
    assert code == 0, capsys.readouterr().err
    found = json.loads((out / "report.json").read_text())
    assert [r["name"] for r in found["arms"]] == ["control-random-chunk", "fp32"]
    assert all(r["pooled"]["n"] == 10 for r in found["arms"])
    assert found["benchmark"]["mujoco"] == "3.3.0"


def test_what_is_wrong_is_told(checkpoint, monkeypatch):
    with pytest.raises(ValueError, match="max_steps"):
        MetaWorldBenchmark(max_steps=501)
    from servoflow_eval.metaworld import env

    monkeypatch.setitem(env._PINS, "mujoco", "3.0.0")
    with pytest.raises(EvalError, match="pip install"):
        MetaWorldBenchmark()


def test_without_opengl_it_is_told_what_to_install():
    """In a process of its own: the library that gives the context is chosen once."""
    code = (
        "from servoflow_eval.metaworld_benchmark import MetaWorldBenchmark as B\n"
        "b = B(); b.reset('push-v3', 0)\n"
        "import servoflow_eval.errors as e\n"
        "try: b.observe(True)\n"
        "except e.EvalError as error: print(error)\n"
    )
    import os
    import sys

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                          env={**os.environ, "MUJOCO_GL": "egl", "__EGL_VENDOR_LIBRARY_DIRS": "/nonexistent"})  # fmt: skip
    assert "apt-get install" in done.stdout and "libegl" in done.stdout, done.stdout + done.stderr
