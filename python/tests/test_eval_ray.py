"""The matrix on a Ray cluster: `make test-ray`. Ray runs on this machine here; a cluster differs in its address alone."""

import pathlib

import pytest

pytest.importorskip("ray", reason="Ray is not installed; see `make test-ray`")

from servoflow_eval import arms, cli, ray_pool, run, summary, workers  # noqa: E402
from servoflow_eval.errors import EvalError  # noqa: E402

TOY = pathlib.Path(__file__).parent / "data/toy_matrix.toml"


def test_gives_the_same_episodes_as_this_process(tmp_path):
    matrix = arms.load(TOY, ["defaults.episodes=10"])
    here, there = tmp_path / "here", tmp_path / "ray"
    run.run_matrix(
        matrix, here, workers.HerePool(matrix.as_json()), only=["expert", "black", "random"], quiet=True
    )
    pool = ray_pool.RayPool(matrix.as_json(), 2)
    try:
        assert run.run_matrix(matrix, there, pool, only=["expert", "black", "random"], quiet=True) == 60
    finally:
        pool.close()
    for name in ("expert", "black", "random"):
        ours, theirs = (summary.load(folder)[2][name] for folder in (here, there))
        assert {k: e["trace"] for k, e in ours.items()} == {k: e["trace"] for k, e in theirs.items()}
        assert len(ours) == 20


def test_the_command_goes_on_where_it_stopped(tmp_path, capsys):
    command = [
        "run",
        str(TOY),
        "--out",
        str(tmp_path),
        "--arm",
        "expert",
        "--ray",
        "--workers",
        "1",
        "--quiet",
    ]
    assert cli.main([*command, "--episodes", "2"]) == 0
    assert "4 episodes played" in capsys.readouterr().err
    assert cli.main([*command, "--episodes", "3"]) == 0
    assert "2 episodes played" in capsys.readouterr().err


def test_what_is_wrong_on_a_node_is_told_here(tmp_path):
    matrix = arms.load(TOY, ["policies.expert.factory=servoflow_eval.toy:Nobody"])
    pool = ray_pool.RayPool(matrix.as_json(), 1)
    try:
        with pytest.raises(EvalError, match="Nobody"):
            run.run_matrix(matrix, tmp_path, pool, only=["expert"], quiet=True)
    finally:
        pool.close()


def test_an_address_without_a_cluster_is_told():
    with pytest.raises(EvalError, match="no Ray cluster"):
        ray_pool.RayPool({}, 1, "127.0.0.1:1")
    for wrong in ("somewhere", "host:port", "127.0.0.1:99999999"):
        with pytest.raises(EvalError):
            ray_pool.RayPool({}, 1, wrong)
