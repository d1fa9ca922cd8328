"""Policies: the engine in this process, a server on the network, a user's own code, and chance.

Each is made from a table of the matrix:

    [policies.engine]
    kind = "servoflow"            # in process, through the Python package
    checkpoint = "../models/x"    # relative to the matrix's file
    precision = "bf16"            # and robot, tokenizer, assets, device, threads (1), steps

    [policies.server]
    kind = "openpi-server"        # openpi's websocket protocol: `servoflow serve`, openpi's serve_policy.py
    host = "127.0.0.1"
    port = 8000
    noise = "seed"                # "explicit": the noise itself goes along; "none": the server draws its own

    [policies.reference]
    kind = "plugin"               # anything in Python, for example a PyTorch model
    path = "../my_folder"         # searched for the module, beside the matrix's folder and its parent
    factory = "my_module:make"    # make(**options) gives an object with infer(obs, noise=…) and noise_shape
    options = { weights = "x.pt" }

    [policies.chance]
    kind = "random"               # uniform in [low, high]: what must fail
    horizon = 16
"""

from __future__ import annotations

from collections.abc import Mapping
import functools
import hashlib
import importlib
import pathlib
import sys
import time
from typing import Any

import numpy as np

from .errors import EvalError
from .interfaces import Observation, Policy, Reply
from .noise import flow_noise, seed_of, uniform

_ENGINE = ("checkpoint", "robot", "device", "precision", "threads", "tokenizer", "assets", "steps")


def make(spec: Mapping[str, Any], folder: pathlib.Path) -> Policy:
    """The policy that a table describes. Raises EvalError that names the field."""
    kind = spec.get("kind")
    rest = {key: value for key, value in spec.items() if key != "kind"}
    if kind == "servoflow":
        return Engine(rest, folder)
    if kind == "openpi-server":
        return Server(rest)
    if kind == "plugin":
        return Plugin(rest, folder)
    if kind == "random":
        return Chance(rest)
    raise EvalError(f"policy kind {kind!r}: there are servoflow, openpi-server, plugin and random")


def _only(spec: Mapping[str, Any], kind: str, allowed: tuple[str, ...]) -> None:
    for key in spec:
        if key not in allowed:
            raise EvalError(
                f"policy of kind {kind!r}: unknown field {key!r}; there are: {', '.join(allowed)}"
            )


@functools.lru_cache(maxsize=16)
def folder_hash(folder: str) -> str:
    """SHA-256 over names and contents of the files of a checkpoint, recorded cases left out."""
    whole = hashlib.sha256()
    root = pathlib.Path(folder)
    for file in sorted(p for p in root.rglob("*") if p.is_file()):
        name = file.relative_to(root).as_posix()
        if name.startswith(("cases/", ".")) or name.endswith((".md", ".png", ".gif", ".webp")):
            continue
        whole.update(name.encode() + b"\0")
        with file.open("rb") as stream:
            whole.update(hashlib.file_digest(stream, "sha256").digest())
    return whole.hexdigest()


class Engine:
    """A session of the engine in this process. Its own counter-based noise: seed of the episode, index of the replan."""

    sees_images = True

    def __init__(self, spec: Mapping[str, Any], folder: pathlib.Path) -> None:
        _only(spec, "servoflow", _ENGINE)
        try:
            import servoflow
        except ImportError as error:
            raise EvalError(
                f"the Python package servoflow is not installed here ({error}); `pip install .`"
            ) from None
        if "checkpoint" not in spec:
            raise EvalError("policy of kind 'servoflow': checkpoint is missing")
        checkpoint = folder / str(spec["checkpoint"])
        if not checkpoint.is_dir():
            raise EvalError(f"checkpoint {checkpoint}: there is no such folder")
        options = {k: v for k, v in spec.items() if k not in ("checkpoint", "steps")}
        for key in ("robot", "tokenizer"):
            value = options.get(key)
            if isinstance(value, str) and "/" in value:
                options[key] = folder / value
        options.setdefault("threads", 1)
        options.setdefault("device", "cpu")
        try:
            self._policy = servoflow.Policy.open(checkpoint, **options)
        except (servoflow.Error, TypeError) as error:
            raise EvalError(f"checkpoint {checkpoint}: {error}") from None
        self._error = servoflow.Error
        self._steps = spec.get("steps") or None
        self._session: Any = None
        self._next = 0
        info = self._policy.info
        self._identity = {
            "kind": "servoflow",
            "checkpoint": folder_hash(str(checkpoint.resolve())),
            "contract": self._policy.metadata["contract_hash"],
            "precision": info["precision"],
            "backend": info["backend"],
            "steps": self._steps,
            "version": servoflow.__version__,
        }

    def identity(self) -> Mapping[str, Any]:
        return self._identity

    def begin(self, seed: int) -> None:
        self._session = self._policy.new_session(seed=seed)
        self._next = 0

    def infer(self, observation: Observation, replan: int) -> Reply:
        if replan != self._next:
            raise EvalError(f"replan {replan} asked for, {self._next} expected: the noise would be another")
        begin = time.perf_counter()
        try:
            result = self._session.infer(observation, steps=self._steps)
        except self._error as error:
            raise EvalError(f"the engine refuses the benchmark's observation: {error}") from None
        self._next += 1
        return Reply(result["actions"], time.perf_counter() - begin)

    def close(self) -> None:
        self._session = None
        self._policy.close()


class Server:
    """A policy behind openpi's websocket protocol, asked through openpi's own client."""

    sees_images = True

    def __init__(self, spec: Mapping[str, Any]) -> None:
        _only(
            spec, "openpi-server", ("host", "port", "api_key", "noise", "noise_shape", "steps", "precision")
        )
        try:
            from openpi_client.websocket_client_policy import WebsocketClientPolicy
        except ImportError as error:
            raise EvalError(
                f"openpi's client is not installed here ({error}); pip install openpi-client"
            ) from None
        self._noise = spec.get("noise", "seed")
        if self._noise not in ("seed", "explicit", "none"):
            raise EvalError(f"openpi-server: noise = {self._noise!r}; there are seed, explicit and none")
        self._shape = tuple(spec.get("noise_shape", ()))
        if self._noise == "explicit" and len(self._shape) != 2:
            raise EvalError(
                "openpi-server: noise = 'explicit' needs noise_shape = [horizon, model's action width]"
            )
        host, port = str(spec.get("host", "127.0.0.1")), int(spec.get("port", 8000))
        try:
            self._client = WebsocketClientPolicy(host, port, api_key=spec.get("api_key"))
        except OSError as error:
            raise EvalError(f"no policy server at {host}:{port}: {error}") from None
        metadata = self._client.get_server_metadata()
        told = str(metadata.get("precision", ""))
        if spec.get("precision") and spec["precision"] != told:
            raise EvalError(
                f"the server at {host}:{port} runs {told or 'an untold precision'}, not {spec['precision']}"
            )
        self._steps = spec.get("steps")
        self._seed = 0
        keys = ("server", "version", "robot", "contract_hash", "precision", "backend")
        self._identity = {
            "kind": "openpi-server",
            "noise": self._noise,
            "steps": self._steps,
            **{key: metadata.get(key) for key in keys},
        }

    def identity(self) -> Mapping[str, Any]:
        return self._identity

    def begin(self, seed: int) -> None:
        self._seed = seed

    def infer(self, observation: Observation, replan: int) -> Reply:
        request = dict(observation)
        if self._noise == "seed" and replan == 0:
            request["seed"] = self._seed
        elif self._noise == "explicit":
            request["noise"] = flow_noise(self._seed, replan, self._shape)
        if self._steps:
            request["num_steps"] = self._steps
        begin = time.perf_counter()
        try:
            reply = self._client.infer(request)
        except RuntimeError as error:
            raise EvalError(f"the server refuses the benchmark's observation: {error}") from None
        return Reply(np.asarray(reply["actions"], np.float64), time.perf_counter() - begin)

    def close(self) -> None:
        socket = getattr(self._client, "_ws", None)
        if socket is not None:
            socket.close()


def load_factory(name: str, *folders: pathlib.Path) -> Any:
    """The object that "module:attribute" names; the folders are searched as well."""
    module, colon, attribute = name.partition(":")
    if not colon:
        raise EvalError(f"{name!r}: expected module:attribute")
    for place in map(str, folders):
        if place not in sys.path:
            sys.path.append(place)
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise EvalError(f"{name!r}: {error}") from None


class Plugin:
    """What a user's factory makes: `infer(obs, noise=float32 [horizon, width])` gives {"actions": [horizon, dim]}, and
    `noise_shape` says the shape. An attribute `identity`, if there is one, goes into the protocol."""

    sees_images = True

    def __init__(self, spec: Mapping[str, Any], folder: pathlib.Path) -> None:
        _only(spec, "plugin", ("path", "factory", "options", "steps", "precision"))
        name = str(spec.get("factory", ""))
        places = [folder, folder.parent, *([folder / str(spec["path"])] if "path" in spec else [])]
        options = dict(spec.get("options", {}))
        for key in ("steps", "precision"):
            if spec.get(key):
                options[key] = spec[key]
        for key, value in options.items():
            if isinstance(value, str) and value.startswith(("./", "../")):
                options[key] = str(folder / value)
        try:
            self._policy = load_factory(name, *places)(**options)
        except (TypeError, ValueError, OSError) as error:
            raise EvalError(f"{name}: {type(error).__name__}: {error}") from error
        shape = getattr(self._policy, "noise_shape", None)
        if not isinstance(shape, tuple) or len(shape) != 2:
            raise EvalError(f"{name}: its object needs noise_shape = (horizon, width)")
        self._shape: tuple[int, int] = shape
        self._seed = 0
        relevant = {k: v for k, v in spec.items() if k != "kind"}
        self._identity = {"kind": "plugin", **relevant, "identity": getattr(self._policy, "identity", None)}

    def identity(self) -> Mapping[str, Any]:
        return self._identity

    def begin(self, seed: int) -> None:
        self._seed = seed

    def infer(self, observation: Observation, replan: int) -> Reply:
        noise = flow_noise(self._seed, replan, self._shape)
        begin = time.perf_counter()
        result = self._policy.infer(observation, noise=noise)
        return Reply(np.asarray(result["actions"], np.float64), time.perf_counter() - begin)

    def close(self) -> None:
        close = getattr(self._policy, "close", None)
        if close is not None:
            close()


class Chance:
    """Uniform actions: the control that shows what success costs nothing."""

    sees_images = False

    def __init__(self, spec: Mapping[str, Any]) -> None:
        _only(spec, "random", ("horizon", "action_dim", "low", "high"))
        self._shape = (int(spec.get("horizon", 16)), int(spec.get("action_dim", 4)))
        self._low, self._high = float(spec.get("low", -1)), float(spec.get("high", 1))
        self._seed = 0

    def identity(self) -> Mapping[str, Any]:
        return {"kind": "random", "shape": list(self._shape), "low": self._low, "high": self._high}

    def begin(self, seed: int) -> None:
        self._seed = seed_of("chance", seed)

    def infer(self, observation: Observation, replan: int) -> Reply:
        drawn = uniform(self._seed, replan, self._shape)
        return Reply(self._low + (self._high - self._low) * drawn, 0.0)

    def close(self) -> None:
        pass
