"""calibrate, ranges, quantize, compare and e2m1 as users chain them. Python standard library only.

usage: quantization_test.py BINARY     (from the repository root)
"""

import json
import os
import pathlib
import shlex
import shutil
import subprocess
import sys
import tempfile
import unittest

BINARY = os.path.abspath(sys.argv[1])
TINY = pathlib.Path("tests/golden/openpi-tiny")


class Quantization(unittest.TestCase):
    def setUp(self) -> None:
        self.tmp = pathlib.Path(tempfile.mkdtemp(prefix="servoflow-e2e-"))
        self.addCleanup(shutil.rmtree, self.tmp)

    def cli(self, *arguments: object, code: int = 0) -> str:
        done = subprocess.run(
            [BINARY, *map(str, arguments)], capture_output=True, text=True, timeout=300, check=False
        )
        self.assertEqual(done.returncode, code, f"{arguments}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}")
        return done.stdout if code == 0 else done.stdout + done.stderr

    def json(self, *arguments: object, code: int = 0) -> dict:
        path = self.tmp / "report.json"
        path.unlink(missing_ok=True)
        self.cli(*arguments, "--json", path, code=code)
        return json.loads(path.read_text(encoding="utf-8"))

    def test_the_whole_way(self) -> None:
        statistics, out = self.tmp / "stats", self.tmp / "int8"
        made = self.json("calibrate", TINY, statistics, "--limit", 3)
        self.assertEqual((made["run"], made["skipped"]), (3, 0))
        again = self.json("calibrate", TINY, statistics, "--limit", 3)
        self.assertEqual((again["run"], again["skipped"], again["digest"]), (0, 3, made["digest"]))

        ranges = self.json("ranges", statistics, "--code", "int8", "--calibrator", "mse")
        self.assertEqual(len(ranges["sites"]), made["sites"])
        self.assertGreater(max(len(site["step_amax"]) for site in ranges["sites"]), 1)

        report = self.json("quantize", TINY, out, "--recipe", "int8-w8a8", "--statistics", statistics)
        self.assertEqual(report["calibration"]["digest"], made["digest"])
        self.assertTrue(any("smoothquant" in layer["method"] for layer in report["layers"]))
        self.assertLess(report["bytes_after"], report["bytes_before"])
        for name in (
            "config.json",
            "precision_plan.json",
            "quantization_report.json",
            "model.safetensors",
            "tokenizer.model",
        ):
            self.assertTrue((out / name).is_file(), name)
        self.assertIn("quantization_config", json.loads((out / "config.json").read_text(encoding="utf-8")))
        self.assertIn("not empty", self.cli("quantize", TINY, out, "--recipe", "int8-w8a8", code=2))

        # The engine runs what it wrote, and says which cases it was calibrated on.
        html = self.tmp / "c.html"
        compared = self.json("compare", TINY, out, "--html", html, "--gates", "noise")
        self.assertTrue(compared["passed"], compared["gates"])
        self.assertEqual(compared["metrics"]["cases.calibrated_on"], 3)
        distance = 1 - compared["metrics"]["velocity.cosine.all"]
        self.assertGreater(distance, 1e-7)
        self.assertLess(distance, 1e-2)
        self.assertIn("Gates", html.read_text(encoding="utf-8"))

    def test_ranges_says_how_to_clip_and_quantize_does_it(self) -> None:
        statistics = self.tmp / "stats"
        self.cli("calibrate", TINY, statistics, "--limit", 3)
        # No input of the tiny checkpoint is beyond 2688: a lower limit finds some.
        common = ("ranges", statistics, "--code", "int8", "--limit", 8)
        report = self.json(*common)
        self.assertGreater(report["clip"]["sites"], 0)
        self.assertLess(report["clip"]["sites"], len(report["sites"]))
        command = report["clip"]["command"]
        self.assertIn(f"\n  {command}\n", self.cli(*common))
        words = shlex.split(command)
        self.assertEqual(words[:3], ["servoflow", "quantize", str(TINY)])
        words[3] = str(self.tmp / words[3])  # OUT: not into the repository
        made = self.json(*words[1:])
        self.assertEqual(made["clip"], report["clip"]["globs"])
        clipped = {layer["name"] for layer in made["layers"] if "input_clip" in layer}
        wanted = {site["name"] for site in report["sites"] if site["beyond"] > 0}
        self.assertLessEqual(wanted, clipped)
        self.assertFalse(clipped & {site["name"] for site in report["sites"]} - wanted)
        words[words.index("--clip") + 1] = "*nobody*"
        words[3] += "-2"
        self.assertIn("--clip *nobody*: matches no linear layer", self.cli(*words[1:], code=2))
        self.assertFalse(pathlib.Path(words[3]).exists())

    def test_recipes_at_load_lie_in_their_noise_bands(self) -> None:
        for recipe in ("int8-w8a8", "int4-g128-w4a16", "nvfp4-w4a16", "mlp-nvfp4"):
            report = self.json("compare", TINY, "--precision-b", recipe, "--gates", "noise", "--limit", 4)
            self.assertTrue(report["passed"], (recipe, report["gates"]))

    def test_gates_fail_closed(self) -> None:
        gates = self.tmp / "gates.json"
        gates.write_text('{"gates": {"velocity.cosine": {"min": 0.9999999}}}', encoding="utf-8")
        out = self.cli("compare", TINY, "--precision-b", "bf16", "--gates", gates, "--limit", 1, code=1)
        self.assertIn("velocity.cosine", out)
        # Too good is suspicious too: nothing was rounded, and the gate knows it should have been.
        gates.write_text('{"gates": {"velocity.cosine": {"max": 0.9999999}}}', encoding="utf-8")
        self.cli("compare", TINY, "--precision-b", "fp32", "--gates", gates, "--limit", 1, code=1)
        gates.write_text('{"gates": {"actions.mae.nobody": {"max": 1}}}', encoding="utf-8")
        self.cli("compare", TINY, "--precision-b", "fp32", "--gates", gates, "--limit", 1, code=1)
        gates.write_text('{"gates": {"velocity": {"max": 1}}}', encoding="utf-8")
        self.cli("compare", TINY, "--precision-b", "fp32", "--gates", gates, "--limit", 1, code=2)
        self.cli("compare", TINY, "--precision-b", "fp32", "--gates", "noise", "--limit", 1, code=2)

    def test_e2m1(self) -> None:
        report = self.json("e2m1", TINY, "--limit", 6)
        self.assertEqual(len(report["layers"]), 6)
        self.assertGreater(len(report["rows"]), 15)


if __name__ == "__main__":
    unittest.main(argv=sys.argv[:1], verbosity=2)
