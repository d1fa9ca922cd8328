"""Runs examples/c/infer.c: the bits of `servoflow run`, and a message for what is wrong.

usage: example_test.py SERVOFLOW C_EXAMPLE     (from the repository root)
"""

import pathlib
import subprocess
import sys
import unittest

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "e2e"))
import shared_requests  # noqa: E402

SERVOFLOW, EXAMPLE = sys.argv[1], sys.argv[2]


def arguments(request):
    return [
        request["checkpoint"],
        request["robot"],
        str(request["seed"]),
        ",".join(map(repr, request["state"])),
        request["prompt"],
        *(f"{key}={file}" for key, file in request["images"].items()),
    ]


def run(*args):
    return subprocess.run(
        [EXAMPLE, *args], cwd=shared_requests.ROOT, capture_output=True, text=True, timeout=300
    )


class Example(unittest.TestCase):
    def test_gives_the_bits_of_the_command_line(self):
        for request in shared_requests.load():
            with self.subTest(request["name"]):
                done = run(*arguments(request))
                self.assertEqual(done.returncode, 0, done.stderr)
                rows = [list(map(float, line.split())) for line in done.stdout.splitlines()]
                self.assertEqual(rows, shared_requests.run_command(SERVOFLOW, request)["actions"])

    def test_says_what_is_wrong(self):
        good = arguments(shared_requests.load()[0])
        for index, value, words in (
            (0, "nowhere", "nowhere"),
            (1, "dishwasher", "dishwasher"),
            (3, "0.1,0.2", "observation/state"),
            (3, "0.1,x", "STATE"),
            (3, "nan,0,0,0,0,0,0,0", "not a finite number"),
            (5, "observation/image=nowhere.png", "nowhere.png"),
            (5, "observation/image=README.md", "observation/image"),
            (5, "elbow=examples/frames/base.png", "elbow"),
        ):
            with self.subTest(value):
                done = run(*good[:index], value, *good[index + 1 :])
                self.assertIn(done.returncode, (2, 3))
                self.assertIn(words, done.stderr)
                self.assertEqual(done.stdout, "")


if __name__ == "__main__":
    unittest.main(argv=sys.argv[:1], verbosity=2)
