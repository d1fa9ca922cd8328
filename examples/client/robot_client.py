"""A client for real robots: it asks for the next chunk while the last one is executed, and says what happens when none comes.

    client = RobotClient("127.0.0.1", 8000, observe=my_robot.observation, period_s=1 / 50, replan_every=25, stale="hold")
    client.start()
    while running:
        step = client.action()          # at the control rate; never waits for the network
        if step.action is not None:
            my_robot.command(step.action)
        elif step.state == "stop":
            my_robot.stop()

Needs numpy and openpi-client. As a program it replays recorded requests (`servoflow serve --record`) against a running server,
without a robot, and compares the actions:

    python examples/client/robot_client.py --dry-run FOLDER [--host H] [--port P]
"""

import argparse
import collections
import dataclasses
import json
import pathlib
import random
import struct
import sys
import threading
import time

import numpy as np
import websockets.exceptions
import websockets.sync.client
from openpi_client import msgpack_numpy

STALE = ("hold", "stop", "extrapolate")
TRY_AGAIN = (1001, 1006, 1012, 1013)  # close codes after which a reconnect helps
Step = collections.namedtuple("Step", "action state age_s")


class Refused(RuntimeError):
    """The server refused a request for a reason that repeating it will not mend, or answered with what no robot may execute."""


@dataclasses.dataclass
class Chunk:
    actions: np.ndarray  # [horizon, dim]
    begin: float  # monotonic time of the observation: actions[i] is meant for begin + i * period
    reply: dict


class RobotClient:
    """Action chunks on a timeline.

    observe       called in the client's thread, returns the observation dict of the robot
    period_s      time between two actions of a chunk, as the policy was trained
    replan_every  actions after which the next observation is taken (1 to the horizon)
    stale         what action() does behind the end of the last chunk: "hold" repeats its last action, "stop" gives none and the state
                  "stop", "extrapolate" goes on with the last difference for `extrapolate_steps` actions and then stops
    backoff_s     first and longest pause between attempts to connect; it doubles, with jitter
    """

    def __init__(self, host, port, *, observe, period_s, replan_every, stale, extrapolate_steps=3, api_key=None, backoff_s=(0.1, 5.0),
                 timeout_s=10.0, clock=time.monotonic):
        if stale not in STALE:
            raise ValueError(f"stale: {stale!r} is none of {', '.join(STALE)}")
        if not (period_s > 0 and replan_every >= 1):
            raise ValueError("period_s and replan_every must be positive")
        self._uri = host if host.startswith("ws") else f"ws://{host}"
        self._uri += f":{port}" if port is not None else ""
        self._headers = {"Authorization": f"Api-Key {api_key}"} if api_key else None
        self._observe, self._period, self._replan = observe, period_s, replan_every
        self._stale, self._extrapolate = stale, extrapolate_steps
        self._backoff, self._timeout, self._clock = backoff_s, timeout_s, clock
        self._lock = threading.Lock()
        self._chunk, self._error, self.metadata = None, None, None
        self.connects = self.chunks = 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def start(self):
        self._thread.start()

    def stop(self):
        self._ended.set()
        self._thread.join(self._timeout + 1)

    def wait_for_chunk(self, timeout_s=30.0):
        until = time.monotonic() + timeout_s
        while self._chunk is None:
            self._raise()
            if time.monotonic() > until:
                raise TimeoutError(f"no actions from {self._uri} within {timeout_s} s")
            time.sleep(0.005)

    def action(self, now=None):
        """The action meant for now. States: "fresh", "waiting" (no chunk yet), and behind a chunk's end "hold", "extrapolate", "stop".

        Raises Refused when the server said that the requests are wrong.
        """
        self._raise()
        now = self._clock() if now is None else now
        with self._lock:
            chunk = self._chunk
        if chunk is None:
            return Step(None, "waiting", 0.0)
        age = now - chunk.begin
        index, horizon = max(0, int(age / self._period)), len(chunk.actions)
        if index < horizon:
            return Step(chunk.actions[index], "fresh", age)
        if self._stale == "hold":
            return Step(chunk.actions[-1], "hold", age)
        behind = index - horizon + 1
        if self._stale == "extrapolate" and horizon > 1 and behind <= self._extrapolate:
            return Step(chunk.actions[-1] + behind * (chunk.actions[-1] - chunk.actions[-2]), "extrapolate", age)
        return Step(None, "stop", age)

    def _raise(self):
        if self._error is not None:
            raise self._error

    def _run(self):
        pause = self._backoff[0]
        while not self._ended.is_set():
            chunks = self.chunks
            try:
                with websockets.sync.client.connect(self._uri, compression=None, max_size=None, additional_headers=self._headers,
                                                    open_timeout=self._timeout) as connection:
                    self.metadata = msgpack_numpy.unpackb(connection.recv(timeout=self._timeout))
                    self.connects += 1
                    self._serve(connection)
            except Refused as error:
                self._error = error
                return
            except websockets.exceptions.InvalidStatus as error:
                if error.response.status_code != 503:  # 401 and the like: waiting mends nothing
                    self._error = Refused(f"{self._uri}: HTTP {error.response.status_code}: {error.response.body.decode(errors='replace')}")
                    return
            except (OSError, TimeoutError, websockets.exceptions.WebSocketException):
                pass
            except Exception as error:  # noqa: BLE001: a camera that fails must stop the robot, not hide in a thread
                self._error = error
                return
            if self.chunks > chunks:  # a reply, not a connection, says that all is well again
                pause = self._backoff[0]
            self._ended.wait(pause * random.uniform(0.5, 1.0))
            pause = min(2 * pause, self._backoff[1])

    def _serve(self, connection):
        while not self._ended.is_set():
            begin = self._clock()
            connection.send(msgpack_numpy.packb(self._observe()))
            reply = connection.recv(timeout=self._timeout)
            if isinstance(reply, str):
                code = None
                try:
                    connection.recv(timeout=self._timeout)
                except websockets.exceptions.ConnectionClosed as closed:
                    code = closed.rcvd.code if closed.rcvd else 1006
                if code in TRY_AGAIN:
                    return
                raise Refused(reply)
            reply = msgpack_numpy.unpackb(reply)
            actions = np.asarray(reply["actions"])
            if not np.isfinite(actions).all():
                raise Refused("actions: a value is not finite")
            with self._lock:
                self._chunk = Chunk(actions, begin, reply)
            self.chunks += 1
            steps = min(self._replan, len(actions))
            self._ended.wait(max(0.0, begin + steps * self._period - self._clock()))


def read_case(path):
    """Metadata and arrays of a case file (safetensors)."""
    data = pathlib.Path(path).read_bytes()
    size = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8:8 + size])
    types = {"F64": "<f8", "F32": "<f4", "U8": "|u1"}
    metadata = header.pop("__metadata__")
    arrays = {}
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        arrays[name] = np.frombuffer(data[8 + size + begin:8 + size + end], types[entry["dtype"]]).reshape(entry["shape"])
    return metadata, arrays


def recorded_observation(metadata, arrays):
    """The request a case file was recorded from: frames under the contract's keys, state, prompt, noise and steps."""
    contract = json.loads(metadata["contract"])
    observation = {"noise": arrays["input/noise"], "num_steps": int(metadata["steps"]), contract["prompt"]["key"]: metadata["prompt"]}

    def put(key, value):
        if key.startswith("images/"):
            observation.setdefault("images", {})[key.split("/", 1)[1]] = value
        else:
            observation[key] = value

    for camera in contract["cameras"]:
        if f"input/image/{camera['slot']}" in arrays:
            frame = arrays[f"input/image/{camera['slot']}"]
            put(camera["key"], frame.transpose(2, 0, 1) if camera["key"].startswith("images/") else frame)
    begin = 0
    for part in contract["state"]["parts"]:
        put(part["key"], arrays["input/state"][begin:begin + part["width"]])
        begin += part["width"]
    return observation


def dry_run(folder, host, port, api_key=None):
    """Sends every recorded request once; returns (equal, different)."""
    from openpi_client.websocket_client_policy import WebsocketClientPolicy
    paths = sorted(pathlib.Path(folder).glob("*.safetensors"))
    if not paths:
        raise FileNotFoundError(f"{folder}: no recorded request (*.safetensors) in it")
    client = WebsocketClientPolicy(host, port, api_key=api_key)
    equal = different = 0
    for path in paths:
        metadata, arrays = read_case(path)
        actions, expected = client.infer(recorded_observation(metadata, arrays))["actions"], arrays["expect/actions"]
        same = np.array_equal(actions, expected)
        worst = np.abs(actions - expected).max() if actions.shape == expected.shape else float("inf")
        print(f"{path.name}: {'equal' if same else f'different by up to {worst:.3g}'}")
        equal, different = equal + same, different + (not same)
    print(f"{equal} equal, {different} different")
    return equal, different


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Replay recorded requests against a running server.")
    parser.add_argument("--dry-run", required=True, metavar="FOLDER")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    arguments = parser.parse_args()
    sys.exit(dry_run(arguments.dry_run, arguments.host, arguments.port)[1] > 0)
