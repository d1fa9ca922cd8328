"""What the tests of `servoflow serve` share: a server process, robots' observations, raw sockets."""

import base64
import json
import os
import pathlib
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
import unittest
import urllib.error
import urllib.request

import numpy as np
import websockets.exceptions
import websockets.sync.client
from openpi_client import msgpack_numpy
from openpi_client.websocket_client_policy import WebsocketClientPolicy

BINARY = os.path.abspath(sys.argv[1])
GOLDEN = pathlib.Path("tests/golden")
OPENPI = GOLDEN / "openpi-tiny"


class Server:
    """`servoflow serve` on a free port; a context manager that ends it with SIGTERM and checks its exit code."""

    def __init__(self, binary, checkpoint=OPENPI, robot="libero", *args, env=None, exit_code=0):
        """`args` follow the command line's own."""
        self.log = tempfile.NamedTemporaryFile(mode="w+", prefix="servoflow-serve-", suffix=".log")
        port = () if "--port" in args else ("--port", "0")
        command = [binary, "serve", checkpoint, *port, *(["--robot", robot] if robot else []), *args]
        self.process = subprocess.Popen([str(part) for part in command], stdout=subprocess.PIPE, stderr=self.log, text=True,
                                        env={**os.environ, **(env or {})})
        self.url = self.process.stdout.readline().strip()
        self.exit_code = exit_code
        if not self.url:
            self.process.wait(30)
            raise RuntimeError(f"the server did not start: {self.stderr()}")
        self.port = int(self.url.rsplit(":", 1)[1])

    def stderr(self):
        return pathlib.Path(self.log.name).read_text()

    def events(self, name=None):
        lines = [json.loads(line) for line in self.stderr().splitlines() if line.startswith("{")]
        return [line for line in lines if name in (None, line["event"])]

    def wait_for(self, event, count=1, seconds=30):
        until = time.monotonic() + seconds
        while len(self.events(event)) < count:
            if time.monotonic() > until or self.process.poll() is not None:
                raise AssertionError(f"no event {event}: {self.stderr()}")
            time.sleep(0.02)
        return self.events(event)[-1]

    def signal(self, number):
        self.process.send_signal(number)

    def stop(self):
        """Ends it; returns the seconds that took."""
        begin = time.monotonic()
        if self.process.poll() is None:
            self.signal(signal.SIGTERM)
        code = self.process.wait(20)
        if code != self.exit_code:
            raise AssertionError(f"the server ended with {code}: {self.stderr()}")
        return time.monotonic() - begin

    def __enter__(self):
        return self

    def __exit__(self, kind, value, trace):
        try:
            self.stop()
        except AssertionError:
            if kind is None:
                raise
        finally:
            self.process.kill()
            self.process.stdout.close()
            self.log.close()

    def client(self, **options):
        return WebsocketClientPolicy("127.0.0.1", self.port, **options)

    def connect(self, **options):
        """A bare websocket, after the metadata."""
        connection = websockets.sync.client.connect(f"ws://127.0.0.1:{self.port}", compression=None, max_size=None, **options)
        msgpack_numpy.unpackb(connection.recv())
        return connection

    def get(self, path, headers=None):
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}{path}", headers=headers or {})
        try:
            with urllib.request.urlopen(request, timeout=10) as reply:
                return reply.status, reply.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    def metric(self, name):
        for line in self.get("/metrics")[1].splitlines():
            if line.startswith(name + " "):
                return float(line.rsplit(" ", 1)[1])
        raise AssertionError(f"no metric {name}")

    def wait_for_metric(self, name, value, seconds=20):
        until = time.monotonic() + seconds
        while (found := self.metric(name)) != value:
            if time.monotonic() > until:
                raise AssertionError(f"{name} is {found}, not {value}")
            time.sleep(0.05)

    def raw(self):
        """A socket after the websocket handshake and the metadata frame."""
        connection = socket.create_connection(("127.0.0.1", self.port), timeout=10)
        key = base64.b64encode(os.urandom(16)).decode()
        connection.sendall((f"GET / HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
                            f"Sec-WebSocket-Key: {key}\r\nSec-WebSocket-Version: 13\r\n\r\n").encode())
        head = b""
        while not head.endswith(b"\r\n\r\n"):
            head += connection.recv(1)
        if not head.startswith(b"HTTP/1.1 101"):
            raise AssertionError(head)
        read_frame(connection)
        return connection


def read_exactly(connection, count):
    data = b""
    while len(data) < count:
        more = connection.recv(count - len(data))
        if not more:
            raise EOFError
        data += more
    return data


def read_frame(connection):
    """(opcode, payload) of one unmasked frame."""
    first, length = read_exactly(connection, 2)
    if length == 126:
        length = struct.unpack(">H", read_exactly(connection, 2))[0]
    elif length == 127:
        length = struct.unpack(">Q", read_exactly(connection, 8))[0]
    return first & 15, read_exactly(connection, length)


def libero(rng=None, prompt="open the drawer", size=224):
    rng = rng or np.random.default_rng(0)
    return {"observation/image": rng.integers(0, 256, (size, size, 3), dtype=np.uint8),
            "observation/wrist_image": rng.integers(0, 256, (size, size, 3), dtype=np.uint8),
            "observation/state": rng.uniform(-0.5, 0.5, 8), "prompt": prompt}


def droid(rng=None, prompt="put the cup on the plate"):
    rng = rng or np.random.default_rng(1)
    return {"observation/exterior_image_1_left": rng.integers(0, 256, (224, 224, 3), dtype=np.uint8),
            "observation/wrist_image_left": rng.integers(0, 256, (224, 224, 3), dtype=np.uint8),
            "observation/joint_position": rng.uniform(-0.5, 0.5, 7), "observation/gripper_position": rng.uniform(0, 1, 1),
            "prompt": prompt}


def aloha(rng=None, prompt="fold the towel"):
    rng = rng or np.random.default_rng(2)
    cameras = ("cam_high", "cam_low", "cam_left_wrist", "cam_right_wrist")
    return {"state": rng.uniform(-0.2, 0.2, 14), "prompt": prompt,
            "images": {name: rng.integers(0, 256, (3, 224, 224), dtype=np.uint8) for name in cameras}}


def synthesize(binary, folder, robot, *args):
    subprocess.run([str(part) for part in (binary, "synth", "--model", "tiny", "--robot", robot, "--tokenizer",
                                           GOLDEN / "tokenizer/tokenizer.model", "--log-level", "warn", *args, folder)],
                   check=True, stdout=subprocess.DEVNULL)
    return folder


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


def main(*suites):
    """Runs the classes named on the command line, or all."""
    named = [case for case in suites if case.__name__ in sys.argv[2:]] or suites
    suite = unittest.TestSuite(unittest.defaultTestLoader.loadTestsFromTestCase(case) for case in named)
    sys.exit(not unittest.TextTestRunner(verbosity=2).run(suite).wasSuccessful())
