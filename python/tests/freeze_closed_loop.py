"""Counts the episodes of test_eval_closed_loop.py and writes closed_loop_counts.json. Run it when the policy changes:

    build/release-python/eval-venv/bin/python python/tests/freeze_closed_loop.py [--episodes 4] [--margin 6]

The margin: of 40 episodes some 6 % may go the other way when rounding changes (2.4, standard deviation 1.5); 6 fewer is a
little over twice that, and far from what a broken engine scores.
"""

import argparse
import json
import pathlib
import sys
import tempfile

HERE = pathlib.Path(__file__).parent
sys.path.insert(0, str(HERE))


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--episodes", type=int, default=4, help="of each task (4)")
    parser.add_argument("--margin", type=int, default=6, help="how many fewer may be solved (6)")
    options = parser.parse_args()
    from test_eval_closed_loop import COUNTS, play

    with tempfile.TemporaryDirectory() as folder:
        rows = play(
            HERE.parents[1] / "bench/closed_loop.toml", ["bf16"], options.episodes, pathlib.Path(folder)
        )
    row = rows["bf16"]
    counts = {
        "episodes": options.episodes,
        "n": row["pooled"]["n"],
        "successes": row["pooled"]["successes"],
        "margin": options.margin,
        "tasks": {t: found["successes"] for t, found in row["tasks"].items()},
        "checkpoint": row["policy"]["checkpoint"],
        "machine": row["machine"],
    }
    COUNTS.write_text(json.dumps(counts, indent=1) + "\n")
    print(json.dumps(counts, indent=1))


if __name__ == "__main__":
    main()
