"""The stock openpi client, and worse ones, against the running server.

usage: with_client.sh VENV serve_test.py BINARY [TestClass …]     (from the repository root)
"""

import io
import os
import pathlib
import shutil
import signal
import socket
import ssl
import struct
import subprocess
import sys
import tempfile
import threading
import time
import unittest
import urllib.request

import numpy as np
import websockets.exceptions
import websockets.sync.client
from openpi_client import action_chunk_broker, image_tools, msgpack_numpy
from openpi_client.websocket_client_policy import WebsocketClientPolicy
from PIL import Image

from serving import GOLDEN, OPENPI, Server, aloha, droid, libero, read_frame, synthesize

BINARY = os.path.abspath(sys.argv[1])


def array(dtype, shape, data):
    """An array as the packer writes it, but with any content."""
    return {b"__ndarray__": True, b"data": data, b"dtype": dtype, b"shape": shape}


class Serve(unittest.TestCase):
    def setUp(self):
        self.tmp = pathlib.Path(tempfile.mkdtemp(prefix="servoflow-serve-"))
        self.addCleanup(shutil.rmtree, self.tmp)

    def server(self, *args, **options):
        server = Server(BINARY, *args, **options)
        self.addCleanup(server.__exit__, None, None, None)
        return server

    def refused(self, server, observation, saying):
        """A text frame with the reason, then close 1011; the next robot is served."""
        connection = server.connect()
        connection.send(msgpack_numpy.packb(observation) if isinstance(observation, dict) else observation)
        reason = connection.recv()
        self.assertIsInstance(reason, str)
        self.assertIn(saying, reason)
        with self.assertRaises(websockets.exceptions.ConnectionClosedError) as closed:
            connection.recv()
        self.assertEqual(closed.exception.rcvd.code, 1011)

    def run_cli(self, *args, code=0):
        done = subprocess.run([str(part) for part in (BINARY, *args)], capture_output=True, text=True)
        self.assertEqual(done.returncode, code, done.stderr)
        return done.stdout


class Stock(Serve):
    """openpi-client 0.1.2 as published."""

    def test_libero(self):
        server = self.server()
        client = server.client()
        metadata = client.get_server_metadata()
        self.assertEqual((metadata["robot"], metadata["precision"]), ("libero", "bf16"))
        self.assertEqual(len(metadata["contract_hash"]), 64)
        first, second = client.infer(libero()), client.infer(libero())
        self.assertEqual((first["actions"].shape, first["actions"].dtype), ((10, 7), np.float64))
        self.assertGreater(first["policy_timing"]["infer_ms"], 0)
        self.assertGreater(first["server_timing"]["infer_ms"], 0)
        self.assertNotIn("prev_total_ms", first["server_timing"])
        self.assertGreater(second["server_timing"]["prev_total_ms"], 0)
        self.assertFalse(np.array_equal(first["actions"], second["actions"]))  # the noise goes on
        self.assertTrue(np.isfinite(first["actions"]).all())

    def test_droid(self):
        client = self.server(OPENPI, "droid").client()
        whole = client.infer(droid())
        self.assertEqual(whole["actions"].shape, (10, 8))
        for gripper in (np.float32(0.5), 0.5, np.array(0.5)):  # every form a gripper position comes in
            client.infer({**droid(), "observation/gripper_position": gripper})
        client.infer({**droid(), "prompt": b"put the cup on the plate"})

    def test_aloha(self):
        checkpoint = synthesize(BINARY, self.tmp / "aloha", "aloha")
        metadata = self.tmp / "metadata.json"
        metadata.write_text('{"reset_pose": [0, -1.5, 1.5, 0, 0, 0]}')
        client = self.server(checkpoint, "aloha", "--metadata", metadata).client()
        self.assertEqual(client.get_server_metadata()["reset_pose"], [0, -1.5, 1.5, 0, 0, 0])
        self.assertEqual(client.infer(aloha())["actions"].shape, (50, 14))
        observation = aloha()
        del observation["images"]["cam_left_wrist"], observation["images"]["cam_low"]
        self.assertEqual(client.infer(observation)["actions"].shape, (50, 14))

    def test_its_action_chunk_broker(self):
        broker = action_chunk_broker.ActionChunkBroker(self.server().client(), action_horizon=5)
        for _ in range(11):
            self.assertEqual(broker.infer(libero())["actions"].shape, (7,))

    def test_the_same_bits_as_in_process(self):
        frames = [GOLDEN / "images/drawer_open_corner4_224x224.png", GOLDEN / "images/push_gripperPOV_256x256.png"]
        state = [0.1, -1.1406, 0.2, -0.3, 0.4, -0.5, -0.3, -0.2]
        out = self.tmp / "actions.npy"
        self.run_cli("run", OPENPI, "--robot", "libero", "--image", f"base_0_rgb={frames[0]}", "--image",
                     f"left_wrist_0_rgb={frames[1]}", "--state", ",".join(map(str, state)), "--prompt", "open the drawer",
                     "--seed", 7, "--out", out)
        expected = np.load(out)
        pixels = [np.asarray(Image.open(frame).convert("RGB")) for frame in frames]
        client = self.server().client()

        def actions(first, second, **more):
            return client.infer({"observation/image": first, "observation/wrist_image": second, "observation/state": np.array(state),
                                 "prompt": "open the drawer", "seed": 7, **more})["actions"]

        np.testing.assert_array_equal(actions(*pixels), expected)
        np.testing.assert_array_equal(actions(*(p.transpose(2, 0, 1) for p in pixels)), expected)
        np.testing.assert_array_equal(actions(*(frame.read_bytes() for frame in frames)), expected)  # as PNG files
        np.testing.assert_array_equal(actions(pixels[0], image_tools.resize_with_pad(pixels[1], 224, 224)), expected)
        floats = (np.float64(pixels[0]) / 255 + 1e-6).clip(0, 1)  # cut to the same bytes
        np.testing.assert_array_equal(actions(floats, pixels[1]), expected)
        np.testing.assert_array_equal(actions(*pixels, num_steps=10, unknown={"ignored": [1, 2]}), expected)

    def test_optional_keys(self):
        server = self.server()
        client = server.client()
        first = client.infer(libero())["actions"]
        second = client.infer(libero())["actions"]
        self.assertFalse(np.array_equal(first, second))
        np.testing.assert_array_equal(client.infer({**libero(), "reset": True})["actions"], first)
        np.testing.assert_array_equal(client.infer(libero())["actions"], second)
        client.infer({**libero(), "episode_id": "a"})
        np.testing.assert_array_equal(client.infer({**libero(), "episode_id": "b"})["actions"], first)
        np.testing.assert_array_equal(client.infer({**libero(), "episode_id": "b"})["actions"], second)
        np.testing.assert_array_equal(server.client().infer(libero())["actions"], first)  # sessions are isolated
        noise = np.random.default_rng(3).standard_normal((10, 32)).astype(np.float32)
        given = client.infer({**libero(), "noise": noise})["actions"]
        np.testing.assert_array_equal(client.infer({**libero(), "noise": noise.astype(np.float64)[None]})["actions"], given)
        self.assertFalse(np.array_equal(client.infer({**libero(), "noise": noise, "num_steps": 3})["actions"], given))
        self.assertTrue(client.infer({**libero(), "deadline_ms": 0.001})["servoflow"]["deadline_missed"])
        self.assertFalse(client.infer({**libero(), "deadline_ms": 10000})["servoflow"]["deadline_missed"])
        self.assertEqual(server.metric("servoflow_deadlines_missed_total"), 1)

    def test_a_batch_has_the_bits_of_each_alone(self):
        server = self.server(OPENPI, "libero", "--max-batch", 8, "--max-wait-ms", 500)
        observations = [libero(np.random.default_rng(i), prompt="pick up " + "the red block " * i) for i in range(6)]
        alone = server.client()
        expected = [alone.infer({**o, "seed": i})["actions"] for i, o in enumerate(observations)]
        alone._ws.close()
        clients = [server.client() for _ in observations]
        replies = [None] * len(clients)

        def ask(i):
            replies[i] = clients[i].infer({**observations[i], "seed": i})

        threads = [threading.Thread(target=ask, args=(i,)) for i in range(len(clients))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        self.assertEqual({reply["server_timing"]["batch"] for reply in replies}, {6})
        for reply, actions in zip(replies, expected):
            np.testing.assert_array_equal(reply["actions"], actions)


class Hostile(Serve):
    """What is wrong is told with the field's name; the server goes on."""

    def test_bad_observations(self):
        server = self.server()
        good = libero()
        bad = [
            ({**good, "observation/state": np.zeros(7)}, "observation/state: shape [7]"),
            ({**good, "observation/state": np.zeros(0)}, "observation/state: shape [0]"),
            ({**good, "observation/state": np.full(8, np.nan)}, "observation/state: element 0 is not a finite number"),
            ({**good, "observation/image": array("|O", [1], b"\0" * 8)}, "observation/image: dtype: \"|O\""),
            ({**good, "prompt": array("<U1000000000", [], b"")}, "prompt: dtype: \"<U1000000000\""),
            ({**good, "observation/image": array("|u1", [2, 2, 3], None)}, "observation/image: data: is nil"),
            ({**good, "observation/image": array("|u1", [2**62, 2**62, 3], b"")}, "observation/image: shape: more than"),
            ({**good, "observation/image": array("|u1", [2, 2, 3], b"123")}, "observation/image: data: 3 bytes"),
            ({**good, "observation/image": b"\xff\xd8\xff\xe0 no picture"}, "observation/image"),
            ({k: v for k, v in good.items() if k != "observation/image"}, "observation/image: missing"),
            ({k: v for k, v in good.items() if k != "prompt"}, "prompt: missing"),
            ({**good, "noise": np.zeros((3, 3))}, "noise: shape [3, 3]"),
            ({**good, "num_steps": 1000}, "num_steps"),
            (b"\xdf\xff\xff\xff\xff", "more than 65536 values"),
            (b"\x81\x01\x02", "keys are strings"),
            (b"garbage", "message"),
            (b"", "message: is empty"),
            (msgpack_numpy.packb(good) + b"x", "1 bytes behind the end"),
            ("a text frame", "observations are binary msgpack"),
        ]
        for observation, saying in bad:
            with self.subTest(saying):
                self.refused(server, observation, saying)
        self.assertEqual(server.client().infer(good)["actions"].shape, (10, 7))
        with self.assertRaisesRegex(RuntimeError, "(?s)observation/state: shape.*trace [0-9a-f]{8}-"):  # the stock client's own error
            server.client().infer({**good, "observation/state": np.zeros(3)})
        text = server.get("/metrics")[1]
        self.assertIn('servoflow_errors_total{cause="bad_request"}', text)
        self.assertEqual(server.metric("servoflow_connections"), 1)

    def test_frames_that_announce_too_much(self):
        server = self.server(OPENPI, "libero", "--max-message-mb", 1)
        for length in (2**63, 2**64 - 1, 2**62, 2**20 + 1):
            for rest in (b"", b"x" * 1000):
                connection = server.raw()
                begin = time.monotonic()
                connection.sendall(b"\x82\xff" + struct.pack(">Q", length) + b"mask" + rest)
                opcode, reason = read_frame(connection)
                self.assertEqual(opcode, 1)
                self.assertIn(f"message: announces {length} bytes; at most 1048576", reason.decode())
                opcode, close = read_frame(connection)
                self.assertEqual((opcode, struct.unpack(">H", close[:2])[0]), (8, 1009))
                self.assertLess(time.monotonic() - begin, 2)
                connection.close()
        connection = server.connect()  # the stock library, with a message just too large
        with self.assertRaises(websockets.exceptions.ConnectionClosedError) as closed:
            connection.send(b"x" * (2**20 + 1))
            self.assertIn("at most 1048576", connection.recv())
            connection.recv()
        self.assertEqual(closed.exception.rcvd.code, 1009)
        self.assertEqual(server.client().infer(libero())["actions"].shape, (10, 7))

    def test_fragments_and_broken_frames(self):
        server = self.server(OPENPI, "libero", "--max-message-mb", 1)
        message = msgpack_numpy.packb(libero(size=64))
        connection = server.connect()
        connection.send([message[i:i + 997] for i in range(0, len(message), 997)])  # many fragments are one message
        self.assertIn(b"actions", connection.recv())
        connection = server.raw()  # fragments that together are too large
        connection.sendall(b"\x02\xfe\xff\xff" + b"mask" + b"x" * 65535)
        for _ in range(16):
            connection.sendall(b"\x00\xfe\xff\xff" + b"mask" + b"x" * 65535)
        opcode, reason = read_frame(connection)
        self.assertEqual((opcode, reason.decode()[:26]), (1, "message: announces 1114095"))
        for broken in (b"\x83\x80mask", b"\x82\x05hello", b"\xff" * 64, b"\x89\xfe\x00\x80mask" + b"x" * 128, b"\x00\x80mask"):
            connection = server.raw()
            connection.sendall(broken)
            connection.settimeout(5)
            try:
                while connection.recv(4096):
                    pass
            except ConnectionError:
                pass
        self.assertEqual(server.client().infer(libero())["actions"].shape, (10, 7))

    def test_no_http(self):
        server = self.server()
        for data in (b"\0\1\2\3\r\n\r\n", b"GET / HTTP/1.1\r\n" + b"X: " + b"y" * 100000, b"GET"):
            connection = socket.create_connection(("127.0.0.1", server.port), timeout=5)
            try:
                connection.sendall(data)
            except ConnectionError:
                pass
            connection.close()
        self.assertEqual(server.get("/healthz"), (200, "OK\n"))
        self.assertEqual(server.get("/")[0], 426)
        self.assertEqual(server.get("/anything")[0], 426)


class Limits(Serve):
    def test_connection_cap(self):
        server = self.server(OPENPI, "libero", "--max-connections", 2)
        first, second = server.client(), server.client()
        with self.assertRaises(websockets.exceptions.InvalidStatus) as refused:
            server.client()
        self.assertEqual(refused.exception.response.status_code, 503)
        self.assertIn(b"--max-connections", refused.exception.response.body)
        first._ws.close()
        deadline = time.monotonic() + 5
        while True:  # its place is free once the server has seen it go
            try:
                third = server.client()
                break
            except websockets.exceptions.InvalidStatus:
                self.assertLess(time.monotonic(), deadline)
                time.sleep(0.02)
        for client in (second, third):
            client.infer(libero())

    def test_api_keys(self):
        keys = self.tmp / "keys"
        keys.write_text("# robots of the lab\nfirst-secret-key\n\nsecond-secret-key\n")
        server = self.server(OPENPI, "libero", "--api-keys", keys, env={"SERVOFLOW_API_KEY": "third-secret-key"})
        for key in ("first-secret-key", "second-secret-key", "third-secret-key"):
            server.client(api_key=key).infer(libero())
        for key in (None, "wrong-secret-key", "first-secret-ke", "first-secret-keyy"):
            with self.assertRaises(websockets.exceptions.InvalidStatus) as refused:
                server.client(api_key=key)
            self.assertEqual(refused.exception.response.status_code, 401)
        self.assertEqual(server.get("/healthz")[0], 200)
        self.assertEqual(server.get("/metrics")[0], 401)
        self.assertEqual(server.get("/metrics", {"Authorization": "Bearer second-secret-key"})[0], 200)
        self.assertNotIn("secret", server.stderr())
        keys.write_text("short\n")
        with self.assertRaisesRegex(RuntimeError, "line 1: a key has 8 to 512 characters"):
            Server(BINARY, OPENPI, "libero", "--api-keys", keys)

    def flood(self, server, saying, count=300):
        """Sends without waiting for replies: all accepted ones are answered, then the reason, then close 1013."""
        connection = server.connect()
        message = msgpack_numpy.packb({**libero(size=32), "num_steps": 50})
        replies = 0
        with self.assertRaises(websockets.exceptions.ConnectionClosedError) as closed:
            try:
                for _ in range(count):
                    connection.send(message)
            except websockets.exceptions.ConnectionClosed:
                pass
            while True:
                reply = connection.recv()
                if isinstance(reply, str):
                    self.assertIn(saying, reply)
                else:
                    replies += 1
        self.assertEqual(closed.exception.rcvd.code, 1013)
        return replies

    def test_one_connection_may_not_have_too_much_in_flight(self):
        server = self.server(OPENPI, "libero", "--max-outstanding", 4)
        self.assertGreaterEqual(self.flood(server, "--max-outstanding"), 4)

    def test_the_queue_is_bounded(self):
        server = self.server(OPENPI, "libero", "--queue", 3, "--max-outstanding", 100)
        self.assertGreaterEqual(self.flood(server, "the queue is full"), 3)
        self.assertEqual(server.client().infer(libero())["actions"].shape, (10, 7))

    def test_the_rate_is_bounded(self):
        server = self.server(OPENPI, "libero", "--max-rate", 5, "--max-outstanding", 100)
        self.assertEqual(self.flood(server, "--max-rate"), 5)

    def test_silent_and_half_open_clients_are_let_go(self):
        server = self.server(OPENPI, "libero", "--idle-s", 1)
        silent = server.raw()  # never answers a ping
        stock = server.client()  # its library does
        time.sleep(3)
        self.assertEqual(server.metric("servoflow_connections"), 1)
        self.assertIn('cause="timeout"} 1', server.get("/metrics")[1])
        stock.infer(libero())
        silent.close()


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


if __name__ == "__main__":
    suites = [globals()[name] for name in sys.argv[2:]] or [Stock, Hostile, Limits, Liveness, Operations]
    suite = unittest.TestSuite(unittest.defaultTestLoader.loadTestsFromTestCase(case) for case in suites)
    sys.exit(not unittest.TextTestRunner(verbosity=2).run(suite).wasSuccessful())
