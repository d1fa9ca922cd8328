"""Runs the real `servoflow` binary the way users and scripts do. Python standard library only.

usage: cli_test.py BINARY [TestClass …]     (from the repository root)
"""

import json
import os
import pathlib
import re
import shlex
import shutil
import struct
import subprocess
import sys
import tempfile
import unittest

BINARY = os.path.abspath(sys.argv[1])
GOLDEN = pathlib.Path("tests/golden")
OPENPI, LEROBOT, MEANSTD = GOLDEN / "openpi-tiny", GOLDEN / "lerobot-tiny", GOLDEN / "lerobot-tiny-meanstd"
BASE = f"base_0_rgb={GOLDEN}/images/drawer_open_corner4_224x224.png"
WRIST = f"left_wrist_0_rgb={GOLDEN}/images/push_gripperPOV_256x256.png"
STATE = "0.1,-1.1406,0.2,-0.3,0.4,-0.5,-0.3,-0.2"
RUN = ["run", OPENPI, "--robot", "libero", "--image", BASE, "--image", WRIST, "--state", STATE, "--prompt", "open the drawer",
       "--threads", "1"]


def npy(path, shape, values, descr="<f4"):
    header = repr({"descr": descr, "fortran_order": False, "shape": shape}).encode()
    header += b" " * (63 - (10 + len(header)) % 64) + b"\n"
    code = {"<f4": "f", "<f8": "d"}[descr]
    path.write_bytes(b"\x93NUMPY\1\0" + struct.pack("<H", len(header)) + header + struct.pack(f"<{len(values)}{code}", *values))
    return path


def read_npy(path):
    data = path.read_bytes()
    length = struct.unpack("<H", data[8:10])[0]
    header = eval(data[10:10 + length], {"__builtins__": {}})  # noqa: S307: written by the binary under test
    body = data[10 + length:]
    return header, struct.unpack(f"<{len(body) // 8}d", body)


class Cli(unittest.TestCase):
    def setUp(self):
        self.tmp = pathlib.Path(tempfile.mkdtemp(prefix="servoflow-e2e-"))
        self.addCleanup(shutil.rmtree, self.tmp)

    def run_cli(self, *args, code=0, stdout=subprocess.PIPE, env=None):
        done = subprocess.run([BINARY, *(a if isinstance(a, bytes) else str(a) for a in args)], stdout=stdout,
                              stderr=subprocess.PIPE, timeout=300, env={**os.environ, "XDG_CACHE_HOME": str(self.tmp / "cache"), **(env or {})})
        self.out = (done.stdout or b"").decode(errors="replace")
        self.err = done.stderr.decode(errors="replace")
        self.assertEqual(done.returncode, code, f"{args}\n--- stdout\n{self.out}\n--- stderr\n{self.err}")
        return self.out

    def json(self, *args, code=0):
        return json.loads(self.run_cli(*args, "--json", "-", code=code))

    def refused(self, *args, saying, code=2):
        """Bad input: exit code 2, nothing on stdout, and a message that names what is wrong."""
        self.run_cli(*args, code=code)
        self.assertIn(saying, self.err)
        self.assertEqual(self.out, "")

    def checkpoint(self, source=OPENPI):
        copy = self.tmp / "checkpoint"
        shutil.copytree(source, copy)
        return copy


class Help(Cli):
    COMMANDS = ("inspect", "run", "verify", "bench", "plan", "probe", "calibrate", "ranges", "quantize", "compare", "e2m1", "synth")

    def test_every_help_ends_with_two_examples_that_work(self):
        os.makedirs(self.tmp / "build")
        for folder in ("tests", "bench"):
            (self.tmp / folder).symlink_to(pathlib.Path(folder).resolve())
        for command in ((), *((c,) for c in self.COMMANDS)):
            lines = self.run_cli(*command, "--help").rstrip().splitlines()
            self.assertEqual(lines[-3], "Examples:", command)
            for line in lines[-2:]:
                words = shlex.split(line)
                self.assertEqual(words[0], "servoflow")
                environment = {**os.environ, "XDG_CACHE_HOME": str(self.tmp / "cache")}  # for a profile
                done = subprocess.run(
                    [BINARY, *words[1:]], cwd=self.tmp, env=environment, capture_output=True, timeout=300
                )
                self.assertEqual(done.returncode, 0, f"{line}\n{done.stderr.decode()}")

    def test_common_options_are_everywhere_they_mean_something(self):
        for command in ("run", "verify", "bench"):
            text = self.run_cli(command, "--help")
            for option in ("--device", "--precision", "--tokenizer", "--assets", "--threads", "--json", "--log-level"):
                self.assertIn(option, text, command)

    def test_version(self):
        self.assertRegex(self.run_cli("--version"), r"^servoflow \d+\.\d+\.\d+\n$")


class Errors(Cli):
    def test_usage(self):
        for args in ([], ["fly"], ["run"], ["run", OPENPI, "--wings"], ["verify", OPENPI, OPENPI], [*RUN, "--steps", "0"],
                     [*RUN, "--steps", "51"], [*RUN, "--steps", "1e2"], [*RUN, "--steps", "99999999999999999999"], [*RUN, "--steps", ""],
                     [*RUN, "--seed", "-1"], [*RUN, "--seed", "0x10"], [*RUN, "--seed", "99999999999999999999999"], [*RUN, "--threads", "-3"],
                     [*RUN, "--log-level", "loud"], ["bench", "--synthetic", "tiny", "--repeat", "0"],
                     ["bench", "--synthetic", "tiny", "--batch", "NaN"], ["synth", self.tmp / "x", "--model", "tiny", "--layout", "jax"]):
            self.run_cli(*args, code=2)
            self.assertEqual(self.out, "", args)
            self.assertNotEqual(self.err, "", args)

    def test_checkpoints(self):
        self.refused("run", self.tmp / "nowhere", "--robot", "libero", "--prompt", "x", saying="nowhere")
        self.refused("verify", self.tmp / "nowhere", saying="nowhere")
        self.run_cli("inspect", self.tmp / "nowhere", code=2)  # lists the problems as its result
        broken = self.checkpoint()
        weights = broken / "model.safetensors"
        whole = weights.read_bytes()
        for size in (0, 7, 100, len(whole) // 2, len(whole) - 1):
            weights.write_bytes(whole[:size])
            self.refused(*RUN[:1], broken, *RUN[2:], saying="model.safetensors")
            self.refused("verify", broken, saying="model.safetensors")
            self.run_cli("inspect", broken, "--scan", code=2)
            self.assertIn("model.safetensors", self.out)
        weights.unlink()
        self.refused("verify", broken, saying="model.safetensors")

    def test_config(self):
        broken = self.checkpoint()
        for text, saying in (("{", "config.json"), ("[]", "config.json"), ('{"action_dim": "x"}', "action_dim"),
                             ('{"action_dim": 32, "action_dim": 32}', "duplicate")):
            (broken / "config.json").write_text(text)
            self.refused("verify", broken, saying=saying)

    def test_not_a_number_in_the_weights(self):
        broken = self.checkpoint()
        data = bytearray((broken / "model.safetensors").read_bytes())
        length = struct.unpack("<Q", data[:8])[0]
        header = json.loads(data[8:8 + length])
        begin = header["action_in_proj.weight"]["data_offsets"][0] + 8 + length
        data[begin + 4:begin + 8] = struct.pack("<f", float("nan"))
        (broken / "model.safetensors").write_bytes(data)
        self.refused("run", broken, *RUN[2:], saying="action_in_proj.weight")
        report = self.json("inspect", broken, "--scan", code=2)
        self.assertEqual(report["scan"], [{"name": "action_in_proj.weight", "nans": 1, "infinities": 0, "first_index": 1}])
        self.assertIn("action_in_proj.weight", report["problems"][0])

    def test_robots(self):
        self.refused("run", OPENPI, "--prompt", "x", saying="libero")  # which there are
        self.refused("run", OPENPI, "--robot", "toaster", "--prompt", "x", saying="libero")
        self.assertIn("toaster", self.err)
        (self.tmp / "bad.toml").write_text('name = "x"\ncolor = "red"\n')
        self.refused("run", OPENPI, "--robot", self.tmp / "bad.toml", "--prompt", "x", saying="color")

    def test_states(self):
        def state(value):
            return [*RUN[:RUN.index("--state") + 1], value, *RUN[RUN.index("--state") + 2:]]
        self.refused(*state("0,nan,0,0,0,0,0,0"), saying='--state: value 2 ("nan") is not a finite number')
        self.refused(*state("0,inf,0,0,0,0,0,0"), saying="--state: value 2")
        self.refused(*state("0,1e999,0,0,0,0,0,0"), saying="--state: value 2")
        self.refused(*state("0,,0,0,0,0,0,0"), saying="--state: value 2")
        self.refused(*state("0,0,0"), saying="state")
        self.refused(*state(b"\xff\xfe"), saying="--state: value 1")
        self.run_cli(*state("-0.1, -1.1406,0,0,0,0,0,1e-3"))  # a leading minus is a number, not an option

    def test_images(self):
        head, tail = RUN[:4], RUN[8:]
        self.refused(*head, *tail, saying="observation/image")
        self.refused(*head, "--image", BASE, *tail, saying="observation/wrist_image")
        self.refused(*RUN, "--image", BASE, saying="given twice")
        self.refused(*RUN, "--image", "base_0_rgb", saying="expected SLOT=FILE")
        self.refused(*RUN, "--image", "front=" + BASE.split("=")[1], saying="front")
        self.refused(*head, "--image", BASE, "--image", "left_wrist_0_rgb=/nowhere.png", *tail, saying="/nowhere.png")
        self.refused(*head, "--image", BASE, "--image", f"left_wrist_0_rgb={self.tmp}", *tail, saying="directory")
        picture = pathlib.Path(WRIST.split("=")[1]).read_bytes()
        for name, data in (("empty.png", b""), ("text.png", b"hello"), ("half.png", picture[:len(picture) // 2])):
            (self.tmp / name).write_bytes(data)
            self.refused(*head, "--image", BASE, "--image", f"left_wrist_0_rgb={self.tmp / name}", *tail, saying="image")

    def test_noise(self):
        for path, saying in ((npy(self.tmp / "shape.npy", (10, 31), [0.0] * 310), "shape [10, 31], this policy needs [10, 32]"),
                             (npy(self.tmp / "nan.npy", (10, 32), [float("nan")] * 320), "value 0 is not a finite"),
                             (npy(self.tmp / "big.npy", (10, 32), [1e300] * 320, "<f8"), "value 0 is not a finite"),
                             (npy(self.tmp / "short.npy", (10, 32), [0.0] * 3), "data: 12 bytes"),
                             (self.tmp / "missing.npy", "missing.npy")):
            self.refused(*RUN, "--noise", path, saying=saying)
        (self.tmp / "text.npy").write_text("hello")
        self.refused(*RUN, "--noise", self.tmp / "text.npy", saying="not a .npy file")

    def test_prompts(self):
        self.refused(*RUN[:-4], "--threads", "1", saying="prompt")
        at = RUN.index("--prompt") + 1
        self.refused(*RUN[:at], b"caf\xe9", *RUN[at + 1:], saying="UTF-8")
        self.run_cli(*RUN[:at], "", *RUN[at + 1:])  # empty, but given
        self.run_cli(*RUN[:at], "word " * 500, *RUN[at + 1:])
        self.assertIn("cut off", self.err)

    def test_devices_and_precisions(self):
        self.refused(*RUN, "--device", "abacus", saying="abacus")
        self.refused(*RUN, "--precision", "fp3", saying="fp3")
        self.refused(*RUN, "--tokenizer", "/nowhere.model", saying="/nowhere.model")
        self.refused(*RUN, "--assets", "mars", saying="mars")

    def test_outputs(self):
        self.refused(*RUN, "--out", self.tmp / "x.txt", saying="use .npy, .json or .csv")
        self.refused(*RUN, "--out", "/nowhere/x.npy", saying="/nowhere/x.npy")
        self.run_cli(*RUN, "--json", "/nowhere/x.json", code=2)
        if pathlib.Path("/dev/full").exists():
            with open("/dev/full", "w") as full:
                self.run_cli(*RUN, stdout=full, code=3)
            self.assertIn("stdout", self.err)

    def test_cases(self):
        self.refused("verify", OPENPI, "--cases", self.tmp, saying="no recorded case")
        self.refused("verify", OPENPI, "--cases", self.tmp / "none", saying="--cases DIR")
        self.refused("verify", OPENPI, "--cases", LEROBOT / "cases", saying="recorded with lerobot")
        (self.tmp / "x.safetensors").write_bytes(b"\xff" * 64)
        self.refused("verify", OPENPI, "--cases", self.tmp, saying="x.safetensors")


class Verify(Cli):
    KEYS = {"case", "stage", "max_abs", "rms", "relative", "rms_error", "cosine", "tolerance", "headroom", "pass"}

    def verify(self, checkpoint, precision, judged):
        target = self.tmp / f"{precision}.json"
        text = self.run_cli("verify", checkpoint, "--precision", precision, "--json", target)
        self.assertEqual(text.splitlines()[-1], f"{judged} passed, 0 failed")
        report = json.loads(target.read_text())
        self.assertEqual((report["passed"], report["failed"]), (judged, 0))
        for record in report["records"]:
            self.assertLessEqual(self.KEYS, record.keys())
            self.assertEqual(record["pass"], None if record["tolerance"] is None else True)
            if record["tolerance"] is not None:
                self.assertGreaterEqual(record["headroom"], 1)
        self.assertEqual(sum(r["tolerance"] is not None for r in report["records"]), judged)
        return report

    def test_openpi(self):
        report = self.verify(OPENPI, "fp32", 230)
        self.assertEqual(len({r["case"] for r in report["records"]}), 10)
        self.verify(OPENPI, "bf16", 30)

    def test_lerobot(self):
        self.verify(LEROBOT, "fp32", 109)
        self.verify(LEROBOT, "bf16", 12)

    def test_lerobot_mean_std(self):
        self.verify(MEANSTD, "fp32", 54)
        self.verify(MEANSTD, "bf16", 6)

    def test_json_on_stdout_leaves_the_text_to_stderr(self):
        report = self.json("verify", MEANSTD, "--threads", "1")
        self.assertEqual(report["failed"], 0)
        self.assertIn("passed, 0 failed", self.err)

    def test_a_wrong_weight_is_found(self):
        wrong = self.checkpoint()
        data = bytearray((wrong / "model.safetensors").read_bytes())
        length = struct.unpack("<Q", data[:8])[0]
        name = "paligemma_with_expert.gemma_expert.model.layers.3.mlp.down_proj.weight"
        begin, end = json.loads(data[8:8 + length])[name]["data_offsets"]
        for at in range(begin + 8 + length, end + 8 + length, 4):
            data[at:at + 4] = struct.pack("<f", 1.01 * struct.unpack("<f", data[at:at + 4])[0])
        (wrong / "model.safetensors").write_bytes(data)
        self.run_cli("verify", wrong, code=1)
        self.assertRegex(self.out.splitlines()[-1], r"^\d+ passed, [1-9]\d* failed$")
        self.assertIn("\nfailed\n", self.out)

    def test_cases_elsewhere(self):
        cases = self.tmp / "cases"
        cases.mkdir()
        shutil.copy(OPENPI / "cases" / "gap.safetensors", cases)
        report = self.json("verify", OPENPI, "--cases", cases, "--all")
        self.assertEqual({r["case"] for r in report["records"]}, {"gap"})


class Run(Cli):
    def test_actions_come_out_in_every_format(self):
        for end in ("npy", "json", "csv"):
            self.run_cli(*RUN, "--out", self.tmp / f"a.{end}")
        header, values = read_npy(self.tmp / "a.npy")
        self.assertEqual(header, {"descr": "<f8", "fortran_order": False, "shape": (10, 7)})
        rows = json.loads((self.tmp / "a.json").read_text())["actions"]
        self.assertEqual([x for row in rows for x in row], list(values))
        lines = (self.tmp / "a.csv").read_text().splitlines()
        self.assertEqual(lines[0], "step,a0,a1,a2,a3,a4,a5,a6")
        self.assertEqual([float(x) for line in lines[1:] for x in line.split(",")[1:]], list(values))

    def test_the_same_request_gives_the_same_bits(self):
        first = self.json(*RUN, "--seed", "7")
        second = self.json(*RUN[:-1], "2", "--seed", "7")
        self.assertEqual(first["actions"], second["actions"])
        self.assertNotEqual(first["actions"], self.json(*RUN, "--seed", "8")["actions"])

    def test_noise_overrides_the_seed(self):
        values = [((i * 37) % 101) / 50 - 1 for i in range(320)]
        single, double = npy(self.tmp / "f4.npy", (10, 32), values), npy(self.tmp / "f8.npy", (10, 32), values, "<f8")
        a = self.json(*RUN, "--noise", single, "--seed", "1")["actions"]
        self.assertEqual(a, self.json(*RUN, "--noise", double, "--seed", "2")["actions"])

    def test_json_has_everything(self):
        report = self.json(*RUN, "--steps", "3", "--precision", "fp32")
        for key in ("actions", "normalized", "times_ms", "prefix_tokens", "device", "backend", "precision", "contract_hash",
                    "checkpoint", "layout", "threads", "ready_s", "seed", "request"):
            self.assertIn(key, report)
        self.assertEqual(len(report["times_ms"]["steps"]), 3)
        self.assertEqual((report["precision"], len(report["normalized"]), len(report["normalized"][0])), ("fp32", 10, 32))

    def test_stdout_is_the_result_and_stderr_is_not(self):
        self.run_cli(*RUN)
        self.assertIn("actions [10, 7]", self.out)
        self.assertIn("loading weights", self.err)
        self.assertNotIn("loading", self.out)
        self.run_cli(*RUN, "--log-level", "off")
        self.assertEqual(self.err, "")

    def test_request_keys_work_as_well_as_slots(self):
        keys = [a.replace("base_0_rgb=", "observation/image=").replace("left_wrist_0_rgb=", "observation/wrist_image=") if isinstance(a, str)
                else a for a in RUN]
        self.assertEqual(self.json(*RUN)["actions"], self.json(*keys)["actions"])

    def test_trace_and_plot(self):
        self.run_cli(*RUN, "--trace", self.tmp / "t.json", "--plot", self.tmp / "p.svg")
        events = json.loads((self.tmp / "t.json").read_text())["traceEvents"]
        self.assertTrue({"vision", "prefix", "denoise"} <= {e["cat"] for e in events})
        self.assertTrue(all(e["ph"] == "X" and e["dur"] >= 0 for e in events))
        svg = (self.tmp / "p.svg").read_text()
        self.assertEqual(svg.count("<polyline"), 7)
        self.assertIn("prefix/mlp", self.out)

    def test_lerobot(self):
        image = f"observation.images.top={GOLDEN}/images/push_corner4_640x480.png"
        report = self.json("run", LEROBOT, "--image", image, "--state", STATE, "--prompt", "push")
        self.assertEqual((report["layout"], report["action_dim"]), ("lerobot", 7))


class Synth(Cli):
    def test_from_weights_to_actions(self):
        tokenizer = GOLDEN / "tokenizer" / "tokenizer.model"
        for layout in ("openpi", "lerobot"):
            out = self.tmp / layout
            self.run_cli("synth", "--model", "tiny", "--layout", layout, "--robot", "libero", "--tokenizer", tokenizer, "--horizon", "6", out)
            robot = ["--robot", "libero"] if layout == "openpi" else []
            report = self.json("inspect", out, "--scan", *robot)
            self.assertEqual((report["layout"], report["problems"], report["scan"]), (layout, [], []))
            slot = "base_0_rgb" if layout == "openpi" else report["contract"]["cameras"][0]["slot"]
            images = ["--image", f"{slot}=" + BASE.split("=")[1]]
            images += ["--image", WRIST] if layout == "openpi" else []
            chunk = self.json("run", out, *robot, *images, "--state", STATE, "--prompt", "go")
            self.assertEqual((chunk["horizon"], chunk["action_dim"]), (6, 7))

    def test_anyone_can_regenerate_it(self):
        for name in ("a", "b"):
            self.run_cli("synth", "--model", "tiny", "--dtype", "fp32", "--seed", "5", self.tmp / name)
        self.run_cli("synth", "--model", "tiny", "--dtype", "fp32", "--seed", "6", self.tmp / "c")
        a, b, c = ((self.tmp / n / "model.safetensors").read_bytes() for n in "abc")
        self.assertEqual(a, b)
        self.assertNotEqual(a, c)

    def test_nothing_is_overwritten_and_nothing_half_written_stays(self):
        (self.tmp / "full").mkdir()
        (self.tmp / "full" / "precious").write_text("x")
        self.refused("synth", "--model", "tiny", self.tmp / "full", saying="full")
        self.refused("synth", "--model", "huge", self.tmp / "x", saying="pi05, tiny")
        self.refused("synth", "--model", "tiny", "--robot", "toaster", self.tmp / "x", saying="libero")
        self.refused("synth", "--model", "tiny", "--tokenizer", "/nowhere", self.tmp / "x", saying="/nowhere")
        self.assertEqual(sorted(p.name for p in self.tmp.iterdir()), ["full"])


class Probe(Cli):
    def test_figures_and_rules(self):
        figures = {line.split()[0] for line in self.run_cli("probe", "--figures").splitlines()}
        self.assertIn("step_bytes_ms", figures)
        self.assertIn("denoise-bandwidth-bound", self.run_cli("probe", "--rules"))

    def test_errors(self):
        self.refused("probe", "--device", "cuda:97", saying="cuda", code=3)
        self.refused("probe", "--device", "reference", saying="cannot be probed")
        self.run_cli("probe", "--seconds", "0", code=2)
        self.refused("probe", "--show", self.tmp / "absent.json", saying="absent.json")
        (self.tmp / "other.json").write_text('{"kind": "something"}')
        self.refused("probe", "--show", self.tmp / "other.json", saying="kind")

    def test_a_profile_decides_what_auto_is(self):
        report = self.json("probe", "--device", "cpu", "--seconds", "3", "--log-level", "warn")
        self.assertEqual((report["version"], report["choice"]["device"]), (1, "cpu"))
        device = report["devices"][0]
        self.assertGreater(len(device["latencies"]), 0)
        # On a machine that others use heavily nothing may be left of three seconds; that is said.
        for key, name in (("bandwidth", "bandwidth of"), ("products", " x "), ("threads", "products with")):
            self.assertTrue(device[key] or any(name in s for s in device["skipped"]), key)
        self.assertTrue(all(p["us"]["samples"] >= 3 for p in device["products"]))
        self.assertTrue(any("no time left" in s for s in device["skipped"]), device["skipped"])
        topics = [d["topic"] for d in report["decisions"]]
        self.assertEqual(len(topics), len(set(topics)))
        self.assertTrue({"device", "trust", "memory", "precision"} <= set(topics), topics)
        default = self.tmp / "cache/servoflow/machine.json"
        self.assertEqual(json.loads(default.read_text()), report)
        self.assertIn("working set", self.run_cli("probe", "--show", default))
        # The examples; the first one is what ran above, with more time.
        lines = self.run_cli("probe", "--help").rstrip().splitlines()
        self.assertEqual(lines[-3:-1], ["Examples:", "  servoflow probe --json machine.json"])
        shutil.copy(default, self.tmp / "machine.json")
        done = subprocess.run([BINARY, *shlex.split(lines[-1])[1:]], cwd=self.tmp, capture_output=True, timeout=300)
        self.assertEqual(done.returncode, 0, done.stderr)

        report["choice"]["precision"] = "fp32"
        default.write_text(json.dumps(report))
        reply = self.json(*RUN)
        self.assertEqual(reply["precision"], "fp32")
        self.assertEqual(reply["chosen"]["profile"], str(default))
        self.assertIn(str(default), self.err)
        self.assertIsNone(self.json(*RUN, "--profile", "none")["chosen"])
        self.assertEqual(self.json(*RUN, "--precision", "bf16")["precision"], "bf16")

        report["key"]["build"]["version"] = "0.0.0"
        default.write_text(json.dumps(report))
        self.assertEqual(self.json(*RUN)["precision"], "bf16")
        self.assertIn("key.build.version", self.err)
        self.refused(*RUN, "--profile", default, saying="key.build.version")
class Plan(Cli):
    def test_a_plan_is_text_and_json(self):
        text = self.run_cli("plan", "--device", "h200", "--views", "3")
        self.assertIn("3 views, 200 prompt tokens", text)
        plan = self.json("plan", "--device", "thor", "--target-hz", "20")
        self.assertTrue(plan["target"]["reached"])
        self.assertGreater(plan["target"]["smallest"]["prediction"]["hz"], 20)
        self.assertEqual({len(row) for table in plan["tables"][:1] for row in table["rows"]}, {6})
        html = self.tmp / "plan.html"
        self.run_cli("plan", "tiny", "--device", "cpu", "--html", html)
        self.assertIn(b"Plotly.newPlot", html.read_bytes())

    def test_what_is_wrong_or_out_of_reach(self):
        self.refused("plan", "--device", "h201", saying="there are a100")
        self.refused("plan", "--precision", "fp7", saying="the planner knows")
        self.refused("plan", "--html", self.tmp / "plan.txt", saying=".html")
        self.refused("plan", self.tmp / "nowhere.json", saying="nowhere.json")
        profile = self.tmp / "mine.toml"
        profile.write_text('name = "mine"\n')
        self.refused("plan", "--device", profile, saying="memory_gb: missing")
        self.run_cli("plan", "--device", "cpu", "--target-hz", "1000", code=1)

    def test_committed_results_are_predicted(self):
        accuracy = self.json("plan", "--accuracy", "bench/results")["accuracy"]
        self.assertLess(accuracy["mape_percent"], 15)
        fitted = subprocess.run([BINARY, "plan", "--fit", "h200"], capture_output=True, text=True, check=True).stdout
        self.assertTrue(pathlib.Path("profiles/h200.toml").read_text().endswith(fitted), "run `make plan-fit`")


class Matrix(Cli):
    MATRIX = 'model = "tiny"\ndevice = "cpu"\nprecision = ["fp32"]\nthreads = [1]\nviews = [1]\ntokens = [8]\nhorizon = [4]\n' \
             'steps = [1, 2]\nrounds = 2\nsamples = 3\nopen = 2\n'

    def test_files_resumption_and_verdicts(self):
        matrix, out = self.tmp / "m.toml", self.tmp / "out"
        matrix.write_text(self.MATRIX)
        self.run_cli("bench", "--matrix", matrix, "--out", out)
        result = json.loads((out / "matrix.json").read_text())
        self.assertTrue(result["complete"])
        self.assertEqual([len(r["end_to_end_ms"]) for arm in result["arms"] for r in arm["rounds"]], [3, 3, 3, 3])
        for name in ("samples.csv", "summary.csv", "report.html"):
            self.assertIn("std::chrono::steady_clock", (out / name).read_text(), name)
        # What is there is not measured again.
        again = self.json("bench", "--matrix", matrix, "--out", out)
        self.assertEqual(again["arms"], result["arms"])
        # Against a result ten times as fast everything is slower.
        for arm in result["arms"]:
            for turn in arm["rounds"]:
                turn["end_to_end_ms"] = [ms / 10 for ms in turn["end_to_end_ms"]]
        old = self.tmp / "old.json"
        old.write_text(json.dumps(result))
        self.run_cli("bench", "--matrix", matrix, "--out", out, "--compare", old, code=1)
        self.assertIn("slower", self.out)
        self.run_cli("bench", "--matrix", matrix, "--out", out, "--compare", out / "matrix.json")
        self.assertIn("within noise", self.out)

    def test_what_is_wrong(self):
        matrix = self.tmp / "m.toml"
        matrix.write_text(self.MATRIX + "speed = 3\n")
        self.refused("bench", "--matrix", matrix, saying="speed: unknown key")
        self.refused("bench", "--matrix", self.tmp / "nowhere.toml", saying="nowhere.toml")
        matrix.write_text(self.MATRIX)
        self.refused("bench", "--matrix", matrix, "--compare", self.tmp / "nowhere.json", saying="nowhere.json")
        self.refused("bench", "--matrix", matrix, "--steps", "3", saying="--steps")
        self.refused("bench", "--out", self.tmp, saying="--matrix")


class Bench(Cli):
    DISTRIBUTION = {"min", "p50", "mean", "std", "p95", "p99", "samples"}

    def test_schema(self):
        target = self.tmp / "bench.json"
        text = self.run_cli("bench", "--synthetic", "tiny", "--views", "1", "--tokens", "9", "--horizon", "5", "--steps", "4", "--repeat", "3",
                            "--warmup", "1", "--json", target)
        self.assertIn("end to end", text)
        report = json.loads(target.read_text())
        self.assertEqual(report["work"], {"views": 1, "tokens": 9, "horizon": 5, "steps": 4, "batch": 1})
        for key in ("precision", "device", "ready_s", "peak_rss_bytes", "device_bytes", "machine", "build"):
            self.assertIn(key, report)
        self.assertEqual(set(report["stages_ms"]), {"preprocess", "vision", "prefix", "denoise", "step", "postprocess"})
        for one in (report["end_to_end_ms"], *report["stages_ms"].values()):
            self.assertEqual(set(one), self.DISTRIBUTION)
            self.assertLessEqual(one["min"], one["p50"])
        self.assertEqual(len(report["end_to_end_ms"]["samples"]), 3)
        for key in ("cpu", "cores", "kernel", "memory_bytes", "load_average", "governor"):
            self.assertIn(key, report["machine"])
        for key in ("version", "revision", "compiler", "flags", "type"):
            self.assertIn(key, report["build"])
        self.assertGreater(report["peaks"]["fp32_gflops"]["all_threads"], 0)

    def test_checkpoints_and_batches(self):
        report = self.json("bench", OPENPI, "--robot", "libero", "--prompt", "open the drawer", "--batch", "3", "--repeat", "2", "--no-peaks",
                           "--components")
        self.assertEqual((report["work"]["batch"], report["work"]["horizon"]), (3, 10))
        self.assertGreater(len(report["components"]), 5)
        self.refused("bench", saying="CHECKPOINT or --synthetic")
        self.refused("bench", OPENPI, "--synthetic", "tiny", saying="CHECKPOINT or --synthetic")
        self.refused("bench", OPENPI, "--robot", "libero", "--horizon", "9", saying="--horizon")
        self.refused("bench", "--synthetic", "tiny", "--views", "4", saying="--views 4")

    def test_soak_and_ragged_batches(self):
        report = self.json("bench", "--synthetic", "tiny", "--batch", "3", "--ragged", "--batches", "--soak", "--repeat", "55", "--steps", "1",
                           "--tokens", "20", "--horizon", "4", "--no-peaks")
        self.assertEqual([b["batch"] for b in report["batches"]], [1, 2, 3])
        self.assertTrue(all(b["equals_alone"] for b in report["batches"]))
        self.assertEqual(report["actions"]["compared_repeats"], 5)
        self.assertEqual(report["actions"]["different_repeats"], 0)
        self.assertEqual(set(report["memory"]), {"opened", "settled", "ended"})
        self.assertGreater(report["memory"]["ended"]["resident_bytes"], 0)
        for key in ("gpu", "device_ms", "device_peaks"):
            self.assertIsNone(report[key])
        self.refused("bench", "--synthetic", "tiny", "--ceilings", "bench/ceilings/h200.json", saying="--ceilings")
        self.refused("bench", "--synthetic", "tiny", "--device", "cpu,", saying="entry is empty")


if __name__ == "__main__":
    unittest.main(argv=[sys.argv[0], *sys.argv[2:]])
