"""Whole runs on the toy benchmark: controls, pairs, resuming, refusing, processes."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from servoflow_eval import arms, cli, episode, noise, results, run, summary, tables, toy, workers
from servoflow_eval.errors import EvalError

HERE = pathlib.Path(__file__).parent
TOY = HERE / "data/toy_matrix.toml"


def play(matrix, out, **options):
    pool = workers.HerePool(matrix.as_json())
    return run.run_matrix(matrix, out, pool, quiet=True, **options)


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    out = tmp_path_factory.mktemp("toy")
    matrix = arms.load(TOY)
    play(matrix, out)
    return matrix, out, summary.summarise(out)


def row(found, name):
    return next(r for r in found["arms"] if r["name"] == name)


def test_every_arm_comes_out_as_it_must(done):
    _, _, found = done
    states = {r["name"]: r["expectation"]["state"] for r in found["arms"] if r["expectation"]["expect"]}
    assert states == {name: "as expected" for name in states}
    assert len(states) == 9
    assert tables.unexpected(found) == []


def test_rates_are_counts_of_the_file(done):
    _, out, found = done
    for r in found["arms"]:
        lines = [json.loads(line) for line in (out / f"{r['name']}.jsonl").read_text().splitlines()[1:]]
        assert r["pooled"]["n"] == len(lines) == 60
        assert r["pooled"]["successes"] == sum(line["success"] for line in lines)
        assert sum(t["successes"] for t in r["tasks"].values()) == r["pooled"]["successes"]
        assert r["groups"]["both"] == r["pooled"]
        for task, told in r["episodes"].items():
            assert told["numbers"] == "0-29"
            assert told["success"].count("1") == r["tasks"][task]["successes"]
            assert [int(s) for s in told["steps"].split()] == [
                line["steps"] for line in lines if line["task"] == task
            ]


def test_pairs_share_scene_and_noise(done):
    _, out, found = done
    assert row(found, "again")["comparison"]["identical"] == 60
    other = row(found, "other-noise")["comparison"]
    assert other["identical"] == 0
    assert other["verdict"] == "not worse"


def test_the_noise_curve_falls(done):
    found = done[2]
    rates = [row(found, f"noise-{s}")["pooled"]["rate"] for s in (0.05, 0.4, 3.0)]
    assert rates[0] >= rates[1] > rates[2] + 0.2


def test_a_weak_policy_is_told_from_a_good_one(done):
    comparison = row(done[2], "weak")["comparison"]
    assert comparison["losses"] > 15 and comparison["p_mcnemar"] < 1e-4


def test_a_control_that_succeeds_is_told(done, tmp_path):
    """The expert itself, declared a control: the report must say that it did not fail, and --strict must exit with 1."""
    text = TOY.read_text().replace('expect = "identical"', 'expect = "fail"')
    (tmp_path / "m.toml").write_text(text)
    out = tmp_path / "out"
    code = cli.main(["run", str(tmp_path / "m.toml"), "--out", str(out), "--arm", "expert", "--arm", "again",
                     "--workers", "1", "--quiet", "--strict"])  # fmt: skip
    assert code == 1
    found = json.loads((out / "report.json").read_text())
    assert tables.unexpected(found) == ["again"]
    assert "NOT AS EXPECTED" in tables.text(found)
    assert "Not as expected: again" in (out / "report.html").read_text()


def test_processes_give_the_same_episodes(done, tmp_path):
    matrix, out, _ = done
    pool = workers.LocalPool(matrix.as_json(), 2)
    try:
        assert run.run_matrix(matrix, tmp_path, pool, only=["expert", "noise-3.0"], quiet=True) == 120
    finally:
        pool.close()
    for name in ("expert", "noise-3.0"):
        ours, theirs = (summary.load(folder)[2][name] for folder in (tmp_path, out))
        assert {k: e["trace"] for k, e in ours.items()} == {k: e["trace"] for k, e in theirs.items()}


def test_goes_on_where_it_stopped(done, tmp_path):
    matrix, out, _ = done
    asked = iter([False] * 5 + [True] * 1000)
    first = play(matrix, tmp_path, only=["expert"], stop=lambda: next(asked))
    assert 0 < first < 60
    file = tmp_path / "expert.jsonl"
    with file.open("ab") as stream:
        stream.write(b'{"task": "to-left", "epis')  # cut off in the middle of a line
    assert play(matrix, tmp_path, only=["expert"]) == 60 - first
    assert play(matrix, tmp_path, only=["expert"]) == 0
    ours, theirs = (summary.load(folder)[2]["expert"] for folder in (tmp_path, out))
    assert {k: e["trace"] for k, e in ours.items()} == {k: e["trace"] for k, e in theirs.items()}


def test_two_runs_do_not_write_to_one_folder(tmp_path):
    matrix = arms.load(TOY, ["defaults.episodes=2"])

    def second():
        with pytest.raises(EvalError, match="another run"):
            play(matrix, tmp_path, only=["expert"])
        return False

    assert play(matrix, tmp_path, only=["expert"], stop=second) == 4
    assert play(matrix, tmp_path, only=["expert"]) == 0


def test_ctrl_c_keeps_what_is_finished(tmp_path):
    """An interrupt ends the command with 130 and leaves a file that the next run goes on with."""
    command = [sys.executable, "-m", "servoflow_eval", "run", str(TOY), "--out", str(tmp_path), "--workers", "2", "--quiet",
               "--set", "policies.expert.factory=test_eval_run:Slow", "--arm", "expert"]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(HERE)}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as process:
        file = tmp_path / "expert.jsonl"
        until = time.monotonic() + 60
        while not (file.exists() and file.read_bytes().count(b"\n") > 4):
            assert time.monotonic() < until and process.poll() is None
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        told = process.communicate(timeout=60)[1]
    assert process.returncode == 130 and "run the same command again" in told and "Traceback" not in told
    assert 4 <= len(results.read(file)[1]) < 60


class Slow(toy.Expert):
    """An expert that takes its time."""

    def infer(self, obs, *, noise):
        time.sleep(0.02)
        return super().infer(obs, noise=noise)


def test_more_episodes_are_added_to_a_file(tmp_path):
    few = arms.load(TOY, ["defaults.episodes=3"])
    more = arms.load(TOY, ["defaults.episodes=5"])
    assert play(few, tmp_path, only=["expert"]) == 6
    assert play(more, tmp_path, only=["expert"]) == 4


@pytest.mark.parametrize(
    "change, told",
    [
        ("defaults.replan=5", "replan: 4 then, 5 now"),
        ("policies.expert.options.wobble=0.3", "wobble: 0.2 then, 0.3 now"),
        ("benchmark.max_steps=41", "max_steps: 40 then, 41 now"),
        ("defaults.noise_seed=9", "noise_seed"),
    ],
)
def test_another_protocol_is_refused(change, told, tmp_path):
    play(arms.load(TOY, ["defaults.episodes=2"]), tmp_path, only=["expert"])
    before = (tmp_path / "expert.jsonl").read_bytes()
    with pytest.raises(EvalError, match="another protocol") as error:
        play(arms.load(TOY, ["defaults.episodes=2", change]), tmp_path, only=["expert"])
    assert told in str(error.value)
    assert (tmp_path / "expert.jsonl").read_bytes() == before


def test_what_does_not_fit_is_told(tmp_path):
    for change, told in [
        (["defaults.replan=9"], "a chunk has 8 actions"),
        (["defaults.episodes=51"], "50 scenes"),
        (
            ['policies.x.kind="random"', 'arm=[{name="expert",tasks=["to-top"]}]', "baseline=expert"],
            "no task 'to-top'",
        ),
        (["policies.expert.factory=servoflow_eval.toy:Nobody"], "Nobody"),
        (['groups.x=["to-top"]'], "groups.x: no task 'to-top'"),
        (["policies.expert.options.speed=1"], "unexpected keyword"),
        (["benchmark.name=servoflow_eval.nothing:X"], "nothing"),
        (["benchmark.scenes=x"], "benchmark"),
    ]:
        with pytest.raises(EvalError, match=told.replace("(", r"\(")):
            play(arms.load(TOY, change), tmp_path / "x", only=["expert"])


def test_damaged_files_are_told(done, tmp_path):
    matrix, out, _ = done
    good = (out / "expert.jsonl").read_bytes().splitlines(keepends=True)
    file = tmp_path / "expert.jsonl"
    for lines, told in [
        ([good[0], b"{]\n", good[1]], ":2: not JSON"),
        ([good[0], b"3\n"], ":2: expected an object"),
        ([good[0], good[1], good[1]], ":3: .* twice"),
        ([good[1]], ":1: not the first line"),
        ([good[0].replace(b'"replan":4', b'"replan":5')], ":1: .*changed by hand"),
        ([good[0], good[1].replace(b"true", b"1")], ":2: success"),
        ([good[0], good[1].replace(b'"episode":0', b'"episode":true')], ":2: episode"),
        ([good[0], b"[" * 100000 + b"\n"], ":2: "),
    ]:
        file.write_bytes(b"".join(lines))
        with pytest.raises(EvalError, match=told):
            results.read(file)
    with pytest.raises(EvalError, match="matrix.json"):
        summary.load(tmp_path)
    (tmp_path / "matrix.json").write_text("{}")
    with pytest.raises(EvalError, match="damaged"):
        summary.load(tmp_path)


def test_seeds_depend_on_what_they_are_for():
    assert noise.episode_seed(0, "a", 1) == noise.episode_seed(0, "a", 1)
    assert len({noise.episode_seed(s, t, e) for s in (0, 1) for t in "ab" for e in range(50)}) == 200
    # Frozen: another rule here would be another protocol (arms.PROTOCOL), which results files must tell.
    assert noise.episode_seed(0, "push-v3", 0) == 5128322215746188730


def test_philox_against_numpys():
    """NumPy's Philox is the 4x64 kind; the 4x32 known answers are those of the authors' test vectors (Random123, kat_vectors)."""
    ones = 0xFFFFFFFF
    known = [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((ones,) * 4, (ones,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        ((0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0),
         (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)),
    ]  # fmt: skip
    for counter, key, expected in known:
        out = noise.philox(np.array([counter], np.uint32), key)
        assert tuple(out[0].tolist()) == expected


def test_noise_is_standard_normal():
    drawn = noise.flow_noise(1, 2, (100001,)).astype(np.float64)
    assert drawn.shape == (100001,) and abs(drawn.mean()) < 0.02 and abs(drawn.std() - 1) < 0.02
    np.testing.assert_array_equal(noise.flow_noise(1, 2, (7,)), noise.flow_noise(1, 2, (100001,))[:7])
    u = noise.uniform(1, 2, (10001,))
    assert 0 < u.min() and u.max() < 1 and abs(u.mean() - 0.5) < 0.02


def test_what_a_control_shows():
    """Only what is looked at is rendered, and it is what the control says."""
    bench = toy.ToyBenchmark()
    rendered = []
    observe = bench.observe
    bench.observe = lambda images: (rendered.append(images), observe(images))[1]
    bench.reset("to-left", 3)
    plain = observe(True)

    def eyes(**fields):
        rendered.clear()
        return episode.Eyes(bench, arms.Arm("n", "p", **fields), "to-left", 3)

    black = eyes(images="black").observe()
    assert rendered == [False] and not any(black[k].any() for k in bench.image_keys)
    swapped = eyes(images="swapped").observe()
    np.testing.assert_array_equal(swapped["images/front"], plain["images/mirror"])
    np.testing.assert_array_equal(swapped["images/mirror"], plain["images/front"])
    frozen = eyes(images="frozen")
    first = frozen.observe()
    bench.step(np.array([0.0, 1.0]))
    np.testing.assert_array_equal(frozen.observe()["images/front"], first["images/front"])
    assert rendered == [True, False]
    assert not np.array_equal(observe(True)["images/front"], first["images/front"])
    assert eyes(prompt="shuffled").observe()["prompt"] == bench.prompt("to-right")
    other = eyes(prompt="other", prompt_of=(("to-left", "to-right"),))
    assert other.observe()["prompt"] == bench.prompt("to-right")


def test_the_command_line(tmp_path, capsys):
    assert cli.main(["arms", str(TOY)]) == 0
    assert "noise-3.0" in capsys.readouterr().out
    assert cli.main(["run", str(tmp_path / "no.toml"), "--out", str(tmp_path)]) == 2
    assert "no.toml" in capsys.readouterr().err
    assert cli.main(["report", str(tmp_path)]) == 2
    assert "servoflow-eval run" in capsys.readouterr().err
    films = tmp_path / "films"
    assert (
        cli.main(
            ["film", str(TOY), "--out", str(films), "--together", str(films / "all.gif"), "--task", "to-left"]
        )
        == 0
    )
    assert '"go to the left mark" 1 of 1 solved' in capsys.readouterr().out
    assert (films / "all.gif").read_bytes()[:6] == b"GIF89a"
    from PIL import Image

    assert Image.open(films / "to-left.webp").n_frames > 2
    assert Image.open(films / "to-left.png").size[0] > 144
    with pytest.raises(SystemExit):
        cli.main(["run", "--help"])
    assert capsys.readouterr().out.count("servoflow-eval run bench/closed_loop.toml") == 2
