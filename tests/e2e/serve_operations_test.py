"""Running a server for real: liveness, shutdown, reload, TLS, metrics, recording, the documents, and the example client.

usage: with_client.sh VENV serve_operations_test.py BINARY [TestClass …]     (from the repository root)
Documents and CppClient take the C++ client from $ROBOT_CLIENT (build/release/bin/robot_client).
"""

import io
import logging
import os
import pathlib
import re
import shlex
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
import unittest
import urllib.request

import numpy as np
import websockets.exceptions
import websockets.sync.client
import websockets.sync.server
from openpi_client import msgpack_numpy
from openpi_client.websocket_client_policy import WebsocketClientPolicy
from PIL import Image

from serving import BINARY, GOLDEN, OPENPI, Serve, Server, aloha, droid, libero, main, synthesize

sys.path.insert(0, "examples/client")
import robot_client  # noqa: E402: it lies beside the other examples


class Liveness(Serve):
    def test_pongs_and_health_do_not_wait_for_inference(self):
        architecture = self.tmp / "slow.json"
        architecture.write_text("""{"architecture": {"vision": {"width": 48, "depth": 3, "heads": 3, "mlp": 100, "patch": 14, "image": 224},
            "prefix": {"width": 512, "depth": 40, "mlp": 2048, "heads": 8, "kv_heads": 1, "head_dim": 64, "vocab": 1024},
            "expert": {"width": 64, "depth": 40, "mlp": 128, "heads": 8, "kv_heads": 1, "head_dim": 64}}}""")
        subprocess.run([BINARY, "synth", "--model", architecture, "--robot", "libero", "--tokenizer", GOLDEN / "tokenizer/tokenizer.model",
                        self.tmp / "slow"], check=True, stdout=subprocess.DEVNULL)
        server = self.server(self.tmp / "slow", "libero", "--precision", "fp32", "--threads", "1")
        connection = server.connect()
        message = msgpack_numpy.packb(libero())
        begin = time.monotonic()
        for _ in range(3):
            connection.send(message)
        worst = 0
        for _ in range(20):
            sent = time.monotonic()
            self.assertTrue(connection.ping().wait(5))
            self.assertEqual(server.get("/healthz")[0], 200)
            worst = max(worst, time.monotonic() - sent)
            time.sleep(0.02)
        pinged = time.monotonic() - begin
        connection.recv()
        first = time.monotonic() - begin
        print(f"pong and /healthz within {worst * 1e3:.1f} ms over {pinged:.2f} s; the first reply came after {first:.2f} s")
        self.assertLess(worst, 1)
        self.assertGreater(first, 0.3, "this network is too quick to prove anything")
        # SIGTERM: what is in flight is answered, then all ends in time.
        took = server.stop()
        self.assertLess(took, 5)

    def test_sigterm_finishes_what_is_in_flight(self):
        server = self.server(OPENPI, "libero")
        connection, idle = server.connect(), server.connect()
        message = msgpack_numpy.packb({**libero(), "num_steps": 50})
        for _ in range(6):
            connection.send(message)
        time.sleep(0.05)
        server.signal(signal.SIGTERM)
        replies = [connection.recv() for _ in range(6)]
        self.assertTrue(all(isinstance(reply, bytes) for reply in replies))
        for one in (connection, idle):
            with self.assertRaises(websockets.exceptions.ConnectionClosed) as closed:
                one.recv()
            self.assertEqual(closed.exception.rcvd.code, 1001)
        self.assertLess(server.stop(), 5)

    def test_sigterm_refuses_new_robots(self):
        server = self.server(OPENPI, "libero", "--max-batch", 1)
        connection = server.connect()
        for _ in range(8):
            connection.send(msgpack_numpy.packb({**libero(), "num_steps": 50}))
        server.signal(signal.SIGTERM)
        server.wait_for("draining")
        with self.assertRaises((OSError, websockets.exceptions.InvalidStatus)):
            server.client()
        server.stop()

    def test_sigterm_again_and_again_is_still_a_clean_end(self):
        server = self.server(OPENPI, "libero")
        while server.process.poll() is None:
            server.signal(signal.SIGTERM)
        server.stop()
        self.assertEqual(server.events("stopped")[-1]["replies"], 0)

    def test_a_port_in_use_is_told(self):
        server = self.server()
        done = subprocess.run([BINARY, "serve", OPENPI, "--robot", "libero", "--port", str(server.port)], capture_output=True, text=True,
                              timeout=60)
        self.assertEqual(done.returncode, 2)
        self.assertIn(f"--port {server.port} on 127.0.0.1: Address already in use", done.stderr)

    def test_the_examples_of_help_work(self):
        lines = self.run_cli("serve", "--help").rstrip().splitlines()
        self.assertEqual(lines[-3], "Examples:")
        for line in lines[-2:]:
            command, subcommand, checkpoint, robot_option, robot, *rest = line.split()
            self.assertEqual((command, subcommand, robot_option), ("servoflow", "serve", "--robot"))
            if "--port" in rest:  # another may have it
                del rest[rest.index("--port"):rest.index("--port") + 2]
            rest = [str(self.tmp / part) if part.startswith("build/") else part for part in rest]
            server = self.server(checkpoint, robot, *rest)
            self.assertEqual(server.get("/healthz"), (200, "OK\n"))

    def test_wrong_usage_is_told(self):
        for args, saying in ((("--robot", "nobody"), "nobody"), (("--cert", "x"), "--cert and --key"),
                             (("--host", "no.such.host.invalid"), "--host"), (("--metadata", "README.md"), "--metadata"),
                             (("--api-keys", "no/such/file"), "--api-keys no/such/file")):
            done = subprocess.run([BINARY, "serve", OPENPI, *(("--robot", "libero") if "--robot" not in args else ()), *args],
                                  capture_output=True, text=True, timeout=60)
            self.assertEqual(done.returncode, 2, done.stderr)
            self.assertIn(saying, done.stderr)


class Operations(Serve):
    def test_metrics_and_logs(self):
        server = self.server(OPENPI, "libero", "--log-level", "debug")
        client = server.client()
        reply = client.infer(libero())
        text = server.get("/metrics")[1]
        for line in ("servoflow_requests_total 1", "servoflow_replies_total 1", "servoflow_connections 1", "servoflow_batch_size_count 1",
                     'servoflow_stage_seconds_count{stage="queue"} 1', 'servoflow_stage_seconds_count{stage="prefix"} 1'):
            self.assertIn(line + "\n", text)
        self.assertIn('servoflow_info{version="', text)
        self.assertGreater(server.metric("process_resident_memory_bytes"), 1e6)
        answered = server.wait_for("answered")
        self.assertEqual(answered["trace"], reply["servoflow"]["trace"])
        client._ws.close()
        self.assertEqual(server.wait_for("disconnected")["replies"], 1)

    def test_recorded_requests_verify(self):
        record = self.tmp / "record"
        slots = {"libero": (OPENPI, libero), "droid": (OPENPI, droid),
                 "aloha": (synthesize(BINARY, self.tmp / "aloha", "aloha"), aloha)}
        for robot, (checkpoint, observe) in slots.items():
            for precision in ("fp32", "bf16"):
                folder = record / f"{robot}-{precision}"
                server = self.server(checkpoint, robot, "--record", folder, "--precision", precision)
                client = server.client()
                client.infer(observe())
                if robot == "libero":
                    picture = io.BytesIO()
                    Image.fromarray(observe()["observation/image"]).save(picture, "JPEG")
                    client.infer({**observe(), "observation/image": picture.getvalue(), "num_steps": 4})
                    client.infer({**observe(), "seed": 11})
                client._ws.close()
                server.stop()
                count = len(list(folder.glob("*.safetensors")))
                self.assertEqual(count, 3 if robot == "libero" else 1)
                out = self.run_cli("verify", checkpoint, "--cases", folder, "--precision", precision, "--all")
                passed = 2 if precision == "fp32" else 1
                self.assertIn(f"{passed * count} passed, 0 failed", out)

    def test_reload(self):
        checkpoint = self.tmp / "checkpoint"
        shutil.copytree(OPENPI, checkpoint, ignore=shutil.ignore_patterns("cases"))
        server = self.server(checkpoint, "libero")
        client = server.client()
        before = client.infer({**libero(), "seed": 1})
        self.assertEqual(before["servoflow"]["generation"], 1)
        config = checkpoint / "config.json"
        good = config.read_text()
        config.write_text("{}")
        server.signal(signal.SIGHUP)
        server.wait_for("reload_failed")
        again = client.infer({**libero(), "seed": 1})
        np.testing.assert_array_equal(again["actions"], before["actions"])
        config.write_text(good)
        other = synthesize(BINARY, self.tmp / "other", "libero", "--seed", 5, "--horizon", 12)
        for path in other.iterdir():
            if path.is_file():
                shutil.copy(path, checkpoint / path.name)
        stop = threading.Event()
        replies = []

        def drive():
            busy = server.client()
            while not stop.is_set():
                replies.append(busy.infer(libero())["actions"].shape)

        thread = threading.Thread(target=drive)
        thread.start()
        server.signal(signal.SIGHUP)
        server.wait_for("reloaded")
        after = client.infer({**libero(), "seed": 1})
        self.assertEqual(after["servoflow"]["generation"], 2)
        self.assertEqual(after["actions"].shape, (12, 7))
        stop.set()
        thread.join()
        self.assertTrue(set(replies) <= {(10, 7), (12, 7)})
        self.assertEqual(server.metric("servoflow_reloads_total"), 1)
        self.assertEqual(server.metric("servoflow_failed_reloads_total"), 1)

    def test_tls(self):
        cert, key = self.tmp / "cert.pem", self.tmp / "key.pem"
        subprocess.run(["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", key, "-out", cert, "-days", "2", "-subj",
                        "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1"], check=True, capture_output=True)
        server = self.server(OPENPI, "libero", "--cert", cert, "--key", key)
        self.assertTrue(server.url.startswith("wss://"))
        trust = ssl.create_default_context(cafile=str(cert))
        os.environ["SSL_CERT_FILE"] = str(cert)  # what the stock client's library trusts
        self.addCleanup(os.environ.pop, "SSL_CERT_FILE")
        client = WebsocketClientPolicy("wss://127.0.0.1", server.port)
        self.assertEqual(client.infer(libero())["actions"].shape, (10, 7))
        plain = socket.create_connection(("127.0.0.1", server.port), timeout=5)
        plain.sendall(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
        self.assertNotIn(b"OK", plain.recv(100))  # at most a TLS alert
        plain.close()
        with urllib.request.urlopen(f"https://127.0.0.1:{server.port}/healthz", context=trust, timeout=5) as reply:
            self.assertEqual(reply.read(), b"OK\n")
        connection = websockets.sync.client.connect(server.url, ssl=trust, compression=None, max_size=None)
        connection.recv()
        connection.send(b"garbage")
        self.assertIn("message", connection.recv())


class Documents(Serve):
    """Documents, block by block: only ports and the folder build/ are replaced. Blocks in other languages are shown, not run."""

    def run_blocks(self, document, at_least, verified):
        text = pathlib.Path(document).read_text()
        blocks = [found for found in re.findall(r"^```(\w*)\n(.*?)^```$", text, re.M | re.S) if found[0] in ("sh", "python")]
        self.assertGreaterEqual(len(blocks), at_least)
        (self.tmp / "build").mkdir()
        environment = {**os.environ, "PATH": f"{self.tmp}:{pathlib.Path(sys.executable).parent}:{os.environ['PATH']}"}
        (self.tmp / "servoflow").symlink_to(BINARY)
        (self.tmp / "robot_client").symlink_to(os.environ["ROBOT_CLIENT"])
        server, verifications = None, 0
        for language, block in blocks:
            block = block.replace("build/", f"{self.tmp}/build/")
            with self.subTest(block):
                if language == "python":
                    code = block.replace("8000", str(server.port))
                    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
                    self.assertEqual(done.returncode, 0, done.stderr)
                    continue
                for line in block.splitlines():
                    words = shlex.split(line)
                    if words[:2] == ["servoflow", "serve"]:
                        if server:
                            server.stop()
                        self.assertEqual(words[3], "--robot")
                        server = self.server(words[2], words[4], *words[5:])
                        continue
                    if server and words[0] == "servoflow":  # a case file is whole once its server has ended
                        server.stop()
                    port = str(server.port) if server else "8000"
                    done = subprocess.run(["bash", "-c", line.replace("8000", port)], capture_output=True, text=True, env=environment, timeout=60)
                    self.assertEqual(done.returncode, 0, line + done.stderr)
                    if words[:2] == ["servoflow", "verify"]:
                        self.assertIn(verified, done.stdout)
                        verifications += 1
        self.assertEqual(verifications, 1)

    def test_every_block_of_serving_works(self):
        self.run_blocks("docs/serving.md", 9, "6 passed, 0 failed")

    def test_the_way_in_of_the_readme_works(self):
        blocks = re.findall(r"^```bash\n(.*?)^```$", pathlib.Path("README.md").read_text(), re.M | re.S)
        [words] = [shlex.split(block, comments=True) for block in blocks if block.startswith("servoflow serve ")]
        self.assertEqual((words[:2], words[3]), (["servoflow", "serve"], "--robot"))
        server = self.server(words[2], words[4], *words[5:])
        self.assertEqual(server.client().infer(libero())["actions"].shape, (10, 7))

    def test_every_block_of_robots_works(self):
        self.run_blocks("docs/robots.md", 9, "2 passed, 0 failed")

    def test_robots_quotes_the_refusals(self):
        """Each mistake of the table in docs/robots.md is made, and its answer stands there in these words."""
        section = pathlib.Path("docs/robots.md").read_text().split("## What the server answers to mistakes\n")[1].split("\n## ")[0]
        quoted = re.findall(r"^\| .* \| `(.+)` \|$", section, re.M)

        def without(observation, key):
            return {name: value for name, value in observation.items() if name != key}

        def camera(name):
            frames = aloha()["images"]
            return {**aloha(), "images": {**frames, name: frames["cam_high"]}}

        frame = libero()["observation/image"]
        wrong = {
            "libero": (OPENPI, (droid(), without(libero(), "observation/wrist_image"), {**libero(), "observation/state": np.zeros(7)},
                                {**libero(), "observation/image": frame[None]},
                                {**libero(), "observation/image": np.full((224, 224, 3), 200, np.float32)},
                                {**libero(), "observation/image": frame.astype(np.int32)},
                                {**libero(), "observation/state": np.full(8, np.nan)})),
            "droid": (OPENPI, (libero(), {**droid(), "observation/wrist_image_left": np.zeros((224, 224, 4), np.uint8)},
                               without(droid(), "prompt"), {**droid(), "prompt": None})),
            "aloha": (synthesize(BINARY, self.tmp / "aloha", "aloha"),
                      (without(aloha(), "prompt"), camera("cam_high_depth"), camera("cam_hihg"),
                       {**aloha(), "images": without(aloha()["images"], "cam_high")}, {**aloha(), "state": np.zeros(16)})),
        }
        answers = []
        for robot, (checkpoint, observations) in wrong.items():
            server = self.server(checkpoint, robot)
            for observation in observations:
                with self.assertRaisesRegex(RuntimeError, "^Error in inference server:\n") as error:
                    server.client().infer(observation)
                answers.append(str(error.exception).splitlines()[1])
        self.assertEqual(sorted(answers), sorted(quoted))


class Client(Serve):
    """examples/client/robot_client.py"""

    def client(self, server, **options):
        settings = dict(observe=libero, period_s=0.02, replan_every=5, stale="hold", backoff_s=(0.05, 0.2))
        client = robot_client.RobotClient("127.0.0.1", server.port, **{**settings, **options})
        client.start()
        self.addCleanup(client.stop)
        return client

    def test_chunks_lie_on_a_timeline(self):
        period = 0.5  # a chunk lasts longer than an inference on any machine
        client = self.client(self.server(), period_s=period, replan_every=1)
        self.assertEqual(client.action().state, "waiting")
        client.wait_for_chunk()
        states, until = set(), time.monotonic() + 60
        while client.chunks < 3 and time.monotonic() < until:
            step = client.action()
            self.assertEqual(step.action.shape, (7,))
            states.add(step.state)
            time.sleep(0.01)
        self.assertIn("fresh", states)
        self.assertGreaterEqual(client.chunks, 3)
        client.stop()  # no other chunk comes while this one is looked at
        chunk = client._chunk
        for index in (0, 3, 9):
            np.testing.assert_array_equal(client.action(chunk.begin + (index + 0.5) * period).action, chunk.actions[index])

    def test_what_happens_behind_the_last_chunk_is_chosen(self):
        server = self.server()
        clients = {stale: self.client(server, stale=stale, replan_every=10) for stale in robot_client.STALE}
        for client in clients.values():
            client.wait_for_chunk()
            client.stop()
        at = {stale: client._chunk.begin for stale, client in clients.items()}
        actions = {stale: client._chunk.actions for stale, client in clients.items()}
        held = clients["hold"].action(at["hold"] + 100)
        self.assertEqual(held.state, "hold")
        np.testing.assert_array_equal(held.action, actions["hold"][-1])
        self.assertEqual(clients["stop"].action(at["stop"] + 100)[:2], (None, "stop"))
        last = actions["extrapolate"]
        step = clients["extrapolate"].action(at["extrapolate"] + 11.5 * 0.02)
        self.assertEqual(step.state, "extrapolate")
        np.testing.assert_allclose(step.action, last[-1] + 2 * (last[-1] - last[-2]))
        self.assertEqual(clients["extrapolate"].action(at["extrapolate"] + 100).state, "stop")
        with self.assertRaises(ValueError):
            robot_client.RobotClient("x", 1, observe=libero, period_s=0.02, replan_every=5, stale="hope")

    def test_it_comes_back_after_a_restart(self):
        first = self.server()
        client = self.client(first)
        client.wait_for_chunk()
        first.stop()
        before = client.chunks
        time.sleep(0.5)
        self.assertIn(client.action().state, ("hold", "fresh"))
        self.server(OPENPI, "libero", "--port", str(first.port))
        until = time.monotonic() + 20
        while client.chunks == before and time.monotonic() < until:
            time.sleep(0.02)
        self.assertGreater(client.chunks, before)
        self.assertEqual(client.connects, 2)

    def test_a_reply_makes_the_next_pause_short_again(self):
        class Event(threading.Event):  # waits a moment whatever it is told, and remembers
            def wait(self, timeout=None):
                asked.append(timeout)
                return super().wait(min(timeout, 0.02))

        asked = []
        server = self.server()
        client = robot_client.RobotClient("127.0.0.1", server.port, observe=libero, period_s=0.02, replan_every=5, stale="hold",
                                          backoff_s=(8, 1000))
        client._ended = Event()
        client.start()
        self.addCleanup(client.stop)
        client.wait_for_chunk()
        for _ in range(3):
            server.stop()
            before = client.chunks
            server = self.server(OPENPI, "libero", "--port", str(server.port))
            until = time.monotonic() + 20
            while client.chunks <= before and time.monotonic() < until:
                time.sleep(0.02)
            self.assertGreater(client.chunks, before)
        pauses = [pause for pause in asked if pause >= 4]
        self.assertGreaterEqual(sum(pause <= 8 for pause in pauses), 3, pauses)

    def test_a_refusal_reaches_the_robot(self):
        client = self.client(self.server(), observe=lambda: {**libero(), "observation/state": np.zeros(5)})
        with self.assertRaisesRegex(robot_client.Refused, "observation/state: shape"):
            client.wait_for_chunk(10)
        keys = self.tmp / "keys"
        keys.write_text("a-secret-key\n")
        client = self.client(self.server(OPENPI, "libero", "--api-keys", keys))
        with self.assertRaisesRegex(robot_client.Refused, "HTTP 401"):
            client.wait_for_chunk(10)

    def test_a_dry_run_against_recorded_frames(self):
        for checkpoint, robot, observe in ((OPENPI, "droid", droid), (synthesize(BINARY, self.tmp / "aloha", "aloha"), "aloha", aloha)):
            record = self.tmp / f"record-{robot}"
            server = self.server(checkpoint, robot, "--record", record)
            client = server.client()
            for seed in range(3):
                client.infer({**observe(np.random.default_rng(seed)), "num_steps": 3 + seed})
            server.stop()
            server = self.server(checkpoint, robot)
            self.assertEqual(robot_client.dry_run(record, "127.0.0.1", server.port), (3, 0))


class CppClient(Serve):
    """examples/client/robot_client_main.cc; what its class does in a robot's program is in robot_client_test.cc."""

    def dry_run(self, *args, code=0, key=None):
        environment = {**os.environ, **({"SERVOFLOW_API_KEY": key} if key else {})}
        done = subprocess.run([os.environ["ROBOT_CLIENT"], *map(str, args)], capture_output=True, text=True, timeout=60, env=environment)
        self.assertEqual(done.returncode, code, done.stdout + done.stderr)
        return done.stdout if code < 2 else done.stderr

    def record(self, checkpoint, robot, observe, count=3):
        folder = self.tmp / f"record-{robot}"
        server = self.server(checkpoint, robot, "--record", folder)
        client = server.client()
        for seed in range(count):
            client.infer({**observe(np.random.default_rng(seed)), "num_steps": 3 + seed})
        client._ws.close()
        server.stop()
        return folder

    def test_recorded_requests_give_the_recorded_actions(self):
        for checkpoint, robot, observe in ((OPENPI, "libero", libero), (OPENPI, "droid", droid),
                                           (synthesize(BINARY, self.tmp / "aloha", "aloha"), "aloha", aloha)):
            folder = self.record(checkpoint, robot, observe)
            keys = self.tmp / "keys"
            keys.write_text("a-secret-key\n")
            server = self.server(checkpoint, robot, "--api-keys", keys)
            out = self.dry_run("--dry-run", folder, "--port", server.port, key="a-secret-key")
            self.assertEqual(out.splitlines()[-1], "3 equal, 0 different")
            self.assertIn("HTTP 401", self.dry_run("--dry-run", folder, "--port", server.port, code=2))

    def test_what_differs_or_is_refused_is_told(self):
        folder = self.record(OPENPI, "libero", libero)
        other = self.server(synthesize(BINARY, self.tmp / "other", "libero", "--seed", 5, "--horizon", 10), "libero")
        out = self.dry_run("--dry-run", folder, "--port", other.port, code=1)
        self.assertIn("different by up to", out)
        self.assertEqual(out.splitlines()[-1], "0 equal, 3 different")
        droids = self.server(OPENPI, "droid")
        self.assertIn("observation/exterior_image_1_left", self.dry_run("--dry-run", folder, "--port", droids.port, code=2))
        self.assertIn("no recorded request", self.dry_run("--dry-run", "docs", code=2))
        self.assertIn("Connection refused", self.dry_run("--dry-run", folder, "--port", 1, code=2))
        broken = self.tmp / "broken"
        broken.mkdir()
        (broken / "a.safetensors").write_bytes(b"\xff" * 100)
        self.assertIn("a.safetensors: ends within its header", self.dry_run("--dry-run", broken, "--port", droids.port, code=2))
        self.assertIn("--port x: is no port", self.dry_run("--dry-run", folder, "--port", "x", code=2))
        self.assertIn("--speed: unknown option", self.dry_run("--speed", 1, code=2))
        self.assertIn("usage: robot_client", self.dry_run("--help"))

    def test_hostile_servers_do_not_break_it(self):
        folder = self.record(OPENPI, "libero", libero, count=1)
        quiet = logging.Logger("quiet", logging.CRITICAL)
        metadata = msgpack_numpy.packb({"robot": "libero"})
        actions = msgpack_numpy.packb({"actions": np.zeros((10, 7))})

        def array(shape, data=b"", dtype="<f8"):
            return msgpack_numpy.packb({"actions": {b"__ndarray__": True, b"data": data, b"dtype": dtype, b"shape": shape}})

        for first, replies, saying in (
                (b"garbage", (), "behind its end"), (b"\xdf\xff\xff\xff\xff", (), "not msgpack"), ("go away", (), "go away"),
                (metadata, (b"",), "not msgpack"), (metadata, (actions[:-9],), "not msgpack"),
                (metadata, (msgpack_numpy.packb({}),), "no actions"), (metadata, (array([2**62, 4]),), "a side of the shape"),
                (metadata, (array([1 << 20, 1 << 20]),), "the shape needs"), (metadata, (array([1, 1], b"12345678", "|O"),), "dtype"),
                (metadata, ("no\x1b[2J!",), "no [2J!"), (metadata, (b"x" * (5 << 20),), "exceed"),
                (metadata, (), "closed the connection with 1000")):
            def serve(connection):
                connection.send(first)
                connection.recv()
                for reply in replies:
                    connection.send(reply)

            with self.subTest(saying), websockets.sync.server.serve(serve, "127.0.0.1", 0, max_size=None, logger=quiet) as server:
                thread = threading.Thread(target=server.serve_forever)
                thread.start()
                port = server.socket.getsockname()[1]
                told = self.dry_run("--dry-run", folder, "--port", port, code=2)
                server.shutdown()
                thread.join()
                self.assertIn(saying, told)


if __name__ == "__main__":
    main(Liveness, Operations, Documents, Client, CppClient)
