"""The stock openpi client, and worse ones, against the running server.

usage: with_client.sh VENV serve_test.py BINARY [TestClass …]     (from the repository root)
"""

import socket
import struct
import threading
import time

import numpy as np
import websockets.exceptions
from openpi_client import action_chunk_broker, image_tools, msgpack_numpy
from PIL import Image

import shared_requests
from serving import BINARY, GOLDEN, OPENPI, Serve, Server, aloha, droid, libero, main, read_frame, synthesize


def array(dtype, shape, data):
    """An array as the packer writes it, but with any content."""
    return {b"__ndarray__": True, b"data": data, b"dtype": dtype, b"shape": shape}


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

    def test_the_wire_changes_no_bit(self):
        # The requests that the C interface and the Python package answer with the bits of `servoflow run`, too.
        state = {"libero": [("observation/state", 8)], "": [("observation.state", 8)],
                 "droid": [("observation/joint_position", 7), ("observation/gripper_position", 1)]}
        for request in shared_requests.load():
            with self.subTest(request["name"]):
                client = self.server(request["checkpoint"], request["robot"], "--precision", "fp32", "--device", "cpu",
                                     "--threads", "1").client()
                observation = {key: np.asarray(Image.open(shared_requests.ROOT / file).convert("RGB"))
                               for key, file in request["images"].items()}
                at = 0
                for key, width in state[request["robot"]]:
                    observation[key], at = np.array(request["state"][at : at + width]), at + width
                observation["prompt" if request["robot"] else "task"] = request["prompt"]
                reply = client.infer({**observation, "seed": request["seed"]})
                expected = np.array(shared_requests.run_command(BINARY, request)["actions"])
                self.assertEqual(reply["actions"].tobytes(), expected.tobytes())

    def test_lerobots_own_contract_and_none(self):
        server = self.server(GOLDEN / "lerobot-tiny", None)
        observation = {"observation.images.top": libero()["observation/image"], "observation.state": np.zeros(8), "task": "push"}
        reply = server.client().infer(observation)
        self.assertEqual((reply["actions"].shape[1], reply["actions"].dtype), (7, np.float64))
        server = self.server(OPENPI, "none")
        reply = server.client().infer({"base_0_rgb": libero()["observation/image"], "prompt": "push"})
        self.assertEqual((reply["actions"].shape, reply["actions"].dtype), ((10, 32), np.float32))

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
        served = server.client()
        self.assertEqual(served.infer(good)["actions"].shape, (10, 7))
        with self.assertRaisesRegex(RuntimeError, "(?s)observation/state: shape.*trace [0-9a-f]{8}-"):  # the stock client's own error
            server.client().infer({**good, "observation/state": np.zeros(3)})
        text = server.get("/metrics")[1]
        self.assertIn('servoflow_errors_total{cause="bad_request"}', text)
        server.wait_for_metric("servoflow_connections", 1)
        self.assertEqual(served.infer(good)["actions"].shape, (10, 7))

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
        server = self.server(OPENPI, "libero", "--idle-s", 3)
        silent = server.raw()  # never answers a ping
        stock = server.client()  # its library does
        time.sleep(5)
        server.wait_for_metric("servoflow_connections", 1)
        self.assertIn('cause="timeout"} 1', server.get("/metrics")[1])
        stock.infer(libero())
        silent.close()


if __name__ == "__main__":
    main(Stock, Hostile, Limits)
