"""The trained policy in the simulator through the engine: a smoke test of the whole chain, of two minutes at most.

`closed_loop_counts.json` holds what was counted when the policy was committed, and how far below it a run may fall: on another
processor BF16 rounds otherwise, and an episode in contact takes another course. `freeze_closed_loop.py` writes it.
"""

import json
import pathlib

from conftest import ROOT

from servoflow_eval import arms, run, summary, workers

COUNTS = pathlib.Path(__file__).with_name("closed_loop_counts.json")


def play(matrix_file, chosen, episodes, out):
    """The arms of the project's matrix, so many episodes per task; the summary's rows by name."""
    matrix = arms.load(matrix_file)
    document = matrix.as_json()
    document["arms"] = [{**a, "episodes": episodes} for a in document["arms"] if a["name"] in chosen]
    document["baseline"] = chosen[0]
    matrix = arms.Matrix.from_json(document)
    pool = workers.LocalPool(matrix.as_json(), workers.available_cores())
    try:
        run.run_matrix(matrix, out, pool, quiet=True)
    finally:
        pool.close()
    return {r["name"]: r for r in summary.summarise(out)["arms"]}


def test_the_policy_still_solves_its_tasks(tmp_path):
    assert COUNTS.exists(), "python/tests/freeze_closed_loop.py has not been run"
    frozen = json.loads(COUNTS.read_text())
    rows = play(
        ROOT / "bench/closed_loop.toml", ["bf16", "control-other-faucet"], frozen["episodes"], tmp_path
    )
    solved = rows["bf16"]["pooled"]
    print(
        f"{solved['successes']} of {solved['n']} solved, {frozen['successes']} when frozen; at most {frozen['margin']} fewer"
    )
    assert solved["n"] == frozen["n"]
    assert solved["successes"] >= frozen["successes"] - frozen["margin"]
    # The margin must leave a test that can fail.
    assert frozen["successes"] - frozen["margin"] > frozen["n"] // 3
    other = rows["control-other-faucet"]["pooled"]
    asked = sum(rows["bf16"]["tasks"][t]["successes"] for t in ("faucet-open-v3", "faucet-close-v3"))
    assert other["successes"] < asked / 2, "the other faucet's sentence turns the same faucet"
