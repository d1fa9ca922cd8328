"""The engine in the loop: in process, behind its server, and fed with noise from outside, all the same episodes."""

import pathlib
import subprocess

from conftest import OPENPI
import numpy as np
import pytest

import servoflow
from servoflow_eval import arms, episode, noise, policies, run, summary, toy, workers
from servoflow_eval.errors import EvalError

FOLDER = pathlib.Path("/")
# Six decimals of the noise's sine and cosine depend on the C library and NumPy; the engine takes both to float32.
ONE_ULP = 2.0**-23


@pytest.fixture(scope="module")
def server(binary):
    command = [str(binary), "serve", str(OPENPI), "--robot", "libero", "--precision", "fp32", "--port", "0", "--device", "cpu",
               "--threads", "1", "--log-level", "warn"]  # fmt: skip
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        url = process.stdout.readline().strip()
        yield int(url.rsplit(":", 1)[1])
        process.terminate()


def engine(**options):
    return {"kind": "servoflow", "checkpoint": str(OPENPI), "robot": "libero", "precision": "fp32", **options}


class Reference:
    """What a user's plug-in looks like; here the engine itself, given its noise."""

    noise_shape = (10, 32)

    def __init__(self, steps=None):
        self._policy = servoflow.Policy.open(
            OPENPI, robot="libero", device="cpu", precision="fp32", threads=1
        )
        self._steps = steps

    def infer(self, obs, *, noise):
        return self._policy.new_session().infer(obs, noise=noise, steps=self._steps)


def test_the_noise_is_the_engines(libero, obs):
    """The chunk from the engine's own noise against the chunk from ours, for seeds and requests of all sizes."""
    for seed in (0, 7, 2**32 + 5, 2**64 - 1):
        session = libero_session(seed)
        for request in range(3):
            own = session.infer(obs)["servoflow"]["normalized"]
            given = libero_session(0).infer(obs, noise=noise.flow_noise(seed, request, (10, 32)))
            np.testing.assert_allclose(given["servoflow"]["normalized"], own, rtol=0, atol=64 * ONE_ULP)
            other = libero_session(0).infer(obs, noise=noise.flow_noise(seed, request + 1, (10, 32)))
            assert np.abs(other["servoflow"]["normalized"] - own).max() > 1e-2


_opened = {}


def libero_session(seed):
    if "policy" not in _opened:
        _opened["policy"] = servoflow.Policy.open(
            OPENPI, robot="libero", device="cpu", precision="fp32", threads=1
        )
    return _opened["policy"].new_session(seed=seed)


def traces(spec, count=2, **fields):
    bench = toy.ToyBenchmark(max_steps=14, style="libero")
    policy = policies.make(spec, FOLDER)
    arm = arms.Arm("n", "p", replan=5, **fields)
    out = [episode.run(bench, policy, arm, "to-left", i) for i in range(count)]
    policy.close()
    return [r["trace"] for r in out]


def test_every_way_in_plays_the_same_episodes(server):
    ours = traces(engine())
    assert len(set(ours)) == 2
    assert traces(engine()) == ours
    assert traces(engine(threads=2)) == ours
    assert traces({"kind": "openpi-server", "port": server, "noise": "seed"}) == ours
    plugin = traces({"kind": "plugin", "factory": "test_eval_engine:Reference"})
    explicit = traces({"kind": "openpi-server", "port": server, "noise": "explicit", "noise_shape": [10, 32]})
    assert plugin == explicit  # NumPy's noise, both
    assert traces({"kind": "openpi-server", "port": server, "noise": "none"}) != ours


def test_steps_and_seed_make_other_episodes(server):
    ours = traces(engine())
    fewer = traces(engine(steps=2))
    assert fewer != ours
    assert traces({"kind": "openpi-server", "port": server, "steps": 2}) == fewer
    assert traces(engine(), noise_seed=1) != ours
    assert traces(engine(), images="black") != ours
    assert traces(engine(precision="bf16")) != ours


def test_what_is_wrong_is_told(server, tmp_path):
    for spec, told in [
        ({"kind": "servoflow"}, "checkpoint is missing"),
        (engine(checkpoint=str(tmp_path / "none")), "no such folder"),
        (engine(checkpoint=str(tmp_path)), "checkpoint"),
        (engine(precision="fp7"), "precision"),
        (engine(speed=3), "unknown field 'speed'"),
        ({"kind": "openpi-server", "port": server, "noise": "loud"}, "noise"),
        ({"kind": "openpi-server", "port": server, "noise": "explicit"}, "noise_shape"),
        ({"kind": "openpi-server", "port": server, "precision": "bf16"}, "runs fp32, not bf16"),
        ({"kind": "plugin", "factory": "nothing_like_that:make"}, "nothing_like_that"),
        ({"kind": "plugin", "factory": "json:loads", "options": {"s": "1"}}, "noise_shape"),
        ({"kind": "plugin", "factory": "json"}, "module:attribute"),
        ({"kind": "jax"}, "there are"),
    ]:
        with pytest.raises(EvalError, match=told):
            policies.make(spec, FOLDER)


def test_the_engines_refusal_is_told():
    policy = policies.make(engine(), FOLDER)
    policy.begin(1)
    with pytest.raises(EvalError, match="observation/state"):
        policy.infer({"prompt": "x"}, 0)
    with pytest.raises(EvalError, match="replan 3"):
        policy.infer({}, 3)


def test_a_matrix_on_the_engine(tmp_path):
    """Arms of the engine through worker processes: the same arm twice is identical, other steps are another protocol."""
    document = {
        "benchmark": {"name": "servoflow_eval.toy:ToyBenchmark", "max_steps": 10, "style": "libero"},
        "policies": {"engine": engine()},
        "defaults": {"episodes": 2, "replan": 5},
        "arm": [{"name": "a"}, {"name": "b", "expect": "identical"}, {"name": "c", "steps": 1}],
    }
    matrix = arms.parse(document, FOLDER, "m")
    pool = workers.LocalPool(matrix.as_json(), 2)
    try:
        run.run_matrix(matrix, tmp_path, pool, quiet=True)
    finally:
        pool.close()
    found = {r["name"]: r for r in summary.summarise(tmp_path)["arms"]}
    assert found["b"]["expectation"]["state"] == "as expected"
    assert found["c"]["comparison"]["identical"] == 0
    assert found["a"]["protocol_hash"] == found["b"]["protocol_hash"] != found["c"]["protocol_hash"]
    assert found["a"]["policy"]["precision"] == "fp32" and len(found["a"]["policy"]["checkpoint"]) == 64
