"""Load and faults: many robots with mixed prompts, some of them misbehaving, against one server.

usage: with_client.sh VENV serve_soak.py BINARY [--checkpoint DIR] [--seconds S] [--robots N] [--ladder] [--json FILE]
                                           [-- OPTIONS OF SERVE]

Every reply is compared, bit for bit, with what the same request gives alone on an idle server: a reply that is lost, late
in its order, or another robot's shows. Misbehaving clients stop in the middle of frames, vanish with requests in flight,
send garbage, flood, never read, or reconnect all the time. At the end memory has not grown and nothing is left behind.

--ladder first measures latency at 1, 8, 32 and 64 robots without faults, and one request at a time for the gain of
batching; with --seconds 0 it is all there is. What follows -- goes to `serve`: `-- --device cuda`.
"""

import argparse
import json
import os
import random
import socket
import struct
import sys
import threading
import time

import numpy as np
import websockets.exceptions
from openpi_client import msgpack_numpy

from serving import OPENPI, Server, libero, read_frame

PROMPTS = ["open the drawer", "pick up the red block and put it into the box", "a", "push the button", "close the lid " * 8]
VARIANTS = 12  # of observation and prompt; with SEEDS each, the requests whose answers are known
SEEDS = 3


class Requests:
    """Packed requests and the actions each must give."""

    def __init__(self, server):
        self.packed, self.expected = [], []
        client = server.client()
        for variant in range(VARIANTS):
            observation = libero(np.random.default_rng(variant), prompt=PROMPTS[variant % len(PROMPTS)])
            if variant % 3 == 1:
                observation["num_steps"] = 4
            for seed in range(SEEDS):
                request = {**observation, "seed": seed}
                if variant % 4 == 3:  # some bring their own noise
                    request["noise"] = np.random.default_rng(seed).standard_normal((10, 32)).astype(np.float32)
                self.packed.append(msgpack_numpy.packb(request))
                self.expected.append(client.infer(request)["actions"].tobytes())
        client._ws.close()
        if len(set(self.expected)) != len(self.expected):
            raise AssertionError("two requests have the same answer: a mixed-up reply would not show")


class Robot(threading.Thread):
    """A stock client in lock-step, or one that keeps `depth` requests in flight."""

    def __init__(self, server, requests, stop, seed, depth=1):
        super().__init__(daemon=True)
        self.server, self.requests, self.stop, self.depth = server, requests, stop, depth
        self.random = random.Random(seed)
        self.latencies, self.batches, self.wrong, self.errors = [], [], 0, []

    def run(self):
        try:
            connection = self.server.connect()
            waiting = []
            while waiting or not self.stop.is_set():
                while len(waiting) < self.depth and not self.stop.is_set():
                    index = self.random.randrange(len(self.requests.packed))
                    waiting.append((index, time.perf_counter()))
                    connection.send(self.requests.packed[index])
                if not waiting:
                    break
                index, sent = waiting.pop(0)
                reply = connection.recv(timeout=300)
                self.latencies.append(time.perf_counter() - sent)
                if isinstance(reply, str):
                    raise RuntimeError(reply)
                reply = msgpack_numpy.unpackb(reply)
                self.batches.append(reply["server_timing"]["batch"])
                if reply["actions"].tobytes() != self.requests.expected[index]:
                    self.wrong += 1
            connection.close()
        except Exception as error:  # noqa: BLE001: whatever happened, it is a failure of this robot
            self.errors.append(repr(error))


class Nuisance(threading.Thread):
    """A client that does one kind of wrong over and over."""

    def __init__(self, server, requests, stop, seed):
        super().__init__(daemon=True)
        self.server, self.requests, self.stop = server, requests, stop
        self.random = random.Random(1000 + seed)
        kinds = [self.half_frame, self.vanish, self.garbage, self.flood, self.never_read, self.reconnect, self.too_big, self.no_http]
        self.kind = kinds[seed % len(kinds)]
        self.times = 0

    def run(self):
        while not self.stop.is_set():
            try:
                self.kind()
            except (OSError, EOFError, AssertionError, websockets.exceptions.WebSocketException):
                pass  # being thrown out is what it came for
            self.times += 1
            self.stop.wait(self.random.uniform(0.01, 0.1))

    def request(self):
        return self.random.choice(self.requests.packed)

    def half_frame(self):
        connection = self.server.raw()
        connection.sendall(b"\x82\xff" + struct.pack(">Q", 300000) + b"mask" + os.urandom(1000))
        self.stop.wait(0.2)
        connection.close()

    def vanish(self):
        connection = self.server.raw()
        body = self.request()
        for _ in range(3):
            connection.sendall(b"\x82\xff" + struct.pack(">Q", len(body)) + b"\0\0\0\0" + body)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # a reset instead of a goodbye
        connection.close()

    def garbage(self):
        broken = bytearray(self.request())
        for _ in range(20):
            broken[self.random.randrange(200)] = self.random.randrange(256)
        with self.server.connect() as connection:
            connection.send(bytes(broken))
            connection.recv(timeout=20)

    def flood(self):
        with self.server.connect() as connection:
            for _ in range(40):
                connection.send(self.request())
            self.stop.wait(0.2)

    def never_read(self):
        connection = self.server.raw()
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        body = self.request()
        for _ in range(4):
            connection.sendall(b"\x82\xff" + struct.pack(">Q", len(body)) + b"\0\0\0\0" + body)
        self.stop.wait(1)
        connection.close()

    def reconnect(self):
        for _ in range(5):
            self.server.connect().close()

    def too_big(self):
        connection = self.server.raw()
        connection.sendall(b"\x82\xff" + struct.pack(">Q", 2**63) + b"mask")
        read_frame(connection)
        connection.close()

    def no_http(self):
        connection = socket.create_connection(("127.0.0.1", self.server.port), timeout=5)
        connection.sendall(os.urandom(64))
        connection.close()


def drive(server, requests, robots, seconds, depth_of=lambda i: 1, nuisances=0, watch=None):
    stop = threading.Event()
    good = [Robot(server, requests, stop, i, depth_of(i)) for i in range(robots)]
    bad = [Nuisance(server, requests, stop, i) for i in range(nuisances)]
    begin = time.perf_counter()
    for thread in good + bad:
        thread.start()
    until = begin + seconds
    while time.perf_counter() < until:
        time.sleep(min(1, max(0, until - time.perf_counter())))
        if watch:
            watch()
    stop.set()
    for thread in good + bad:
        thread.join(400)
    took = time.perf_counter() - begin
    latencies = np.array(sorted(x for robot in good for x in robot.latencies)) * 1e3
    batches = [x for robot in good for x in robot.batches]
    return {"robots": robots, "replies": len(latencies), "per_second": round(len(latencies) / took, 1),
            "p50_ms": round(float(np.percentile(latencies, 50)), 2), "p99_ms": round(float(np.percentile(latencies, 99)), 2),
            "worst_ms": round(float(latencies[-1]), 2), "mean_batch": round(float(np.mean(batches)), 2),
            "mixed": sum(robot.wrong for robot in good), "lost": sum(len(robot.errors) + robot.is_alive() for robot in good),
            "errors": sorted({error for robot in good for error in robot.errors})[:5], "faults": sum(n.times for n in bad)}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("binary")
    parser.add_argument("--checkpoint", default=OPENPI, help="of a policy for LIBERO: horizon 10, 32 columns")
    parser.add_argument("--batch", type=int, default=16, help="most robots computed together")
    parser.add_argument("--rung-seconds", type=float, default=10, help="of each number of robots on the ladder")
    parser.add_argument("--seconds", type=float, default=30)
    parser.add_argument("--robots", type=int, default=64)
    parser.add_argument("--ladder", action="store_true")
    parser.add_argument("--json")
    parser.add_argument("--any-memory", action="store_true", help="do not judge memory: a sanitizer keeps what is freed")
    arguments = sys.argv[1:]
    end = arguments.index("--") if "--" in arguments else len(arguments)
    options, rest = parser.parse_args(arguments[:end]), arguments[end + 1:]
    if options.seconds <= 0 and not options.ladder:
        parser.error("nothing to do: --seconds 0 needs --ladder")
    binary = os.path.abspath(options.binary)
    nuisances = 8
    arguments = [options.checkpoint, "libero", "--max-connections", options.robots + 4 * nuisances, "--queue", 1024,
                 "--log-level", "warn", *rest]
    results, failures = {"serve": rest}, []

    if options.ladder:
        results["ladder"] = []
        for batch in (options.batch, 1):
            with Server(binary, *arguments, "--max-batch", batch) as server:
                requests = Requests(server)
                for robots in (1, 8, 32, 64):
                    result = {"max_batch": batch, **drive(server, requests, robots, options.rung_seconds)}
                    results["ladder"].append(result)
                    print(json.dumps(result), flush=True)
                    failures += [f"{result}"] if result["mixed"] or result["lost"] else []

    if options.seconds > 0:
        soak(binary, arguments, options, nuisances, results, failures)
    if options.json:
        with open(options.json, "w") as file:
            json.dump(results, file, indent=1)
    for failure in failures:
        print("FAILED:", failure)
    return bool(failures)


def soak(binary: str, arguments: list, options: argparse.Namespace, nuisances: int, results: dict,
         failures: list[str]) -> None:
    with Server(binary, *arguments, "--max-batch", options.batch, "--idle-s", 10) as server:
        requests = Requests(server)
        memory = []
        result = drive(server, requests, options.robots, options.seconds, lambda i: 1 if i % 8 else 4, nuisances,
                       lambda: memory.append(server.metric("process_resident_memory_bytes") / 2**20))
        # A warm-up's worth is granted; from then on memory must be flat.
        warm = max(memory[: max(1, len(memory) // 3)])
        result["memory_mib"] = {"first_third": round(warm, 1), "last": round(memory[-1], 1), "most": round(max(memory), 1)}
        if not options.any_memory and max(memory[len(memory) // 3:] or memory) > warm * 1.15 + 16:
            failures.append(f"memory grew: {result['memory_mib']}")
        until = time.monotonic() + 20
        while server.metric("servoflow_connections") > 0 and time.monotonic() < until:
            time.sleep(0.1)
        result["left_behind"] = server.metric("servoflow_connections")
        result["queue_left"] = server.metric("servoflow_queue_length")
        results["soak"] = result
        print(json.dumps(result), flush=True)
        if result["mixed"] or result["lost"] or result["left_behind"] or result["queue_left"]:
            failures.append("replies were lost or mixed, or connections or requests were left behind")
        result["exit_s"] = round(server.stop(), 2)


if __name__ == "__main__":
    sys.exit(main())
