"""Policies and sessions: the engine behind openpi's way of calling a policy."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
import operator
import os
import threading
from typing import Any, SupportsIndex

from . import _core, _observation
from ._errors import Error, InvalidInput


def _path(value: str | os.PathLike[str], field: str) -> str:
    try:
        text = os.fspath(value)
    except TypeError:
        text = None
    if not isinstance(text, str):
        raise InvalidInput(f"{field}: expected a path, got {type(value).__name__}")
    if "\0" in text:
        raise InvalidInput(f"{field}: a path cannot hold a zero character")
    return text


def _text(value: str, field: str) -> str:
    if not isinstance(value, str):
        raise InvalidInput(f"{field}: expected a str, got {type(value).__name__}")
    return value


def _integer(value: SupportsIndex, field: str, low: int, high: int) -> int:
    try:
        number = operator.index(value)
    except TypeError:
        raise InvalidInput(f"{field}: expected a whole number, got {type(value).__name__}") from None
    if not low <= number <= high:
        raise InvalidInput(f"{field}: {number} is not between {low} and {high}")
    return number


def _steps(value: SupportsIndex | None) -> int:
    return 0 if value is None else _integer(value, "steps", 1, 50)


class _Owner:
    """What may be used in the process that made it only: the engine's threads do not survive a fork."""

    def __init__(self) -> None:
        self._pid = os.getpid()

    def _check_process(self) -> None:
        if os.getpid() != self._pid:
            raise Error("this policy was opened in another process; open one after the fork")


class Session(_Owner):
    """One robot's stream of inferences: its contract, its random numbers, its caches.

    Made by `Policy.new_session`. Threads may share a session; their calls take turns.
    """

    def __init__(self, core: _core.Session, noise_shape: tuple[int, int]) -> None:
        super().__init__()
        self._core = core
        self._noise_shape = noise_shape
        self._contract = _observation.Contract.parse(core.contract_json())

    def infer(
        self,
        obs: Mapping[str, Any],
        *,
        noise: Any = None,
        steps: SupportsIndex | None = None,
    ) -> dict[str, Any]:
        """One observation to one chunk of actions.

        `obs` is openpi's dict: the keys of the robot's contract (`contract_json`), flat or nested. Frames are uint8
        [height, width, 3] or [3, height, width], floats in [0, 1], or the bytes of a PNG or JPEG file; anything that
        NumPy or DLPack can read from the host's memory will do, and contiguous uint8 frames are not copied. They must
        not be written to before the call returns. Keys that the contract does not know are ignored.

        `noise` [horizon, model_action_dim] replaces the session's seeded noise. `steps` (1 to 50) replaces the
        checkpoint's number of Euler steps.

        Returns `actions` float64 [horizon, action_dim] in robot units; `policy_timing` in milliseconds, `infer_ms` being
        the whole call; and `servoflow`: `normalized` float32 [horizon, model_action_dim], the actions as the flow left
        them, `request`, `prefix_tokens`, `prompt_truncated`, and what ran.

        Raises InvalidInput, which names the field, or RuntimeFailure. A call that fails does not count as an inference.
        """
        self._check_process()
        request = _observation.read(obs, self._contract)
        given = None if noise is None else _observation.to_noise(noise, self._noise_shape)
        return self._core.infer(
            request.images, request.state, request.prompt, request.tokens, _steps(steps), given
        )

    def reset(self) -> None:
        """Starts an episode anew: the noise of the first inference again, caches dropped."""
        self._check_process()
        self._core.reset()

    @property
    def contract_json(self) -> str:
        """The robot's contract as canonical JSON: cameras, state, prompt, actions, statistics."""
        return self._core.contract_json()

    @property
    def contract_hash(self) -> str:
        """SHA-256 of `contract_json` without the labels `actions.names` and `actions.units`, hexadecimal."""
        return self._core.contract_hash()

    @property
    def device(self) -> str:
        """Where this session's inferences run: "cpu", "cuda:0"."""
        return self._core.device()


class Policy(_Owner):
    """A checkpoint, checked, packed and ready. Stands where openpi's `Policy` stands: `infer`, `reset`, `metadata`."""

    def __init__(self, core: _core.Policy, max_batch: int, seed: int, metadata: Mapping[str, Any]) -> None:
        super().__init__()
        self._core: _core.Policy | None = core
        self._max_batch = max_batch
        self._seed = seed
        self._metadata = dict(metadata)
        self._session: Session | None = None
        self._lock = threading.Lock()

    @staticmethod
    def open(
        checkpoint: str | os.PathLike[str],
        *,
        robot: str | os.PathLike[str] = "",
        device: str = "auto",
        precision: str = "auto",
        threads: SupportsIndex = 0,
        tokenizer: str | os.PathLike[str] = "",
        assets: str = "",
        max_batch: SupportsIndex = 1,
        seed: SupportsIndex = 0,
        metadata: Mapping[str, Any] | None = None,
        progress: Callable[[int, int], object] | None = None,
    ) -> Policy:
        """Reads, checks and packs an openpi or lerobot checkpoint directory; other Python threads run meanwhile.

        `robot`: built-in name ("libero", "droid", "aloha") or contract file, for sessions that name none; lerobot
        directories bring their own. `device`: "auto", "cpu", "cuda", "cuda:1", "cuda:all". `precision`: "auto" (a
        quantized checkpoint's own, else bf16 where the device has it), "fp32", "bf16" (both dequantize), a recipe
        ("int8-w8a8", "nvfp4-w4a16", ...) or a plan's file, which round the weights while they are loaded. `threads`: 0 is one per core this process may use. `tokenizer`:
        SentencePiece file; openpi directories come without. `assets`: statistics folder. `max_batch`: most sessions of
        one device in one `infer_batch`. `seed` is that of the session behind `Policy.infer`. `metadata` is added to
        what the `metadata` property tells. `progress(done, total)` hears of the weights; what it raises, open raises.

        Raises InvalidInput with everything that is wrong with the checkpoint in one message, or RuntimeFailure.
        """
        if progress is not None and not callable(progress):
            raise InvalidInput("progress: is not callable")
        if metadata is not None and not isinstance(metadata, Mapping):
            raise InvalidInput(f"metadata: expected a dict, got {type(metadata).__name__}")
        first_seed = _integer(seed, "seed", 0, 2**64 - 1)
        most = _integer(max_batch, "max_batch", 1, 4096)
        core = _core.Policy.open(
            _path(checkpoint, "checkpoint"),
            _text(device, "device"),
            _text(precision, "precision"),
            _integer(threads, "threads", 0, 1024),
            _path(tokenizer, "tokenizer"),
            _path(robot, "robot"),
            _text(assets, "assets"),
            most,
            progress,
        )
        return Policy(core, most, first_seed, {} if metadata is None else metadata)

    def _opened(self) -> _core.Policy:
        self._check_process()
        if self._core is None:
            raise Error("this policy is closed")
        return self._core

    def new_session(self, *, robot: str | os.PathLike[str] = "", seed: SupportsIndex = 0) -> Session:
        """A session of its own for one robot. `robot`: as in `open`; empty: the policy's, else the checkpoint's own;
        "none": frames by model slot, token ids or a plain prompt, no state, actions as the flow left them."""
        core = self._opened()
        info = core.info()
        made = core.new_session(_path(robot, "robot"), _integer(seed, "seed", 0, 2**64 - 1))
        return Session(made, (info["horizon"], info["model_action_dim"]))

    def _own_session(self) -> Session:
        with self._lock:
            self._opened()
            if self._session is None:
                self._session = self.new_session(seed=self._seed)
            return self._session

    def infer(
        self, obs: Mapping[str, Any], *, noise: Any = None, steps: SupportsIndex | None = None
    ) -> dict[str, Any]:
        """`Session.infer` on the policy's own session, which the first call makes."""
        return self._own_session().infer(obs, noise=noise, steps=steps)

    def reset(self) -> None:
        """`Session.reset` of the policy's own session."""
        self._own_session().reset()

    @property
    def metadata(self) -> dict[str, Any]:
        """What a server would tell its clients first: sizes, robot, contract hash, precision, version, and what `open`
        was given as `metadata`, which wins."""
        session = self._own_session()
        info = self.info
        return {
            "robot": session._contract.name,
            "contract_hash": session.contract_hash,
            "action_horizon": info["horizon"],
            "precision": info["precision"],
            "backend": info["backend"],
            "version": _core.version,
            **self._metadata,
        }

    @property
    def info(self) -> dict[str, Any]:
        """`PolicyInfo` of the C++ API: checkpoint, layout, what runs, sizes, bytes, seconds from opening to ready."""
        return self._opened().info()

    def close(self) -> None:
        """Lets go of the weights, which sessions that are still there keep alive. Closing twice is allowed."""
        with self._lock:
            self._core = None
            self._session = None

    def __enter__(self) -> Policy:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def infer_batch(
    sessions: Sequence[Session],
    observations: Sequence[Mapping[str, Any]],
    *,
    noise: Any = None,
    steps: SupportsIndex | None = None,
) -> list[dict[str, Any]]:
    """Several sessions of one policy in one pass. sessions[i] gets observations[i]; each answer has the bits it has
    alone. `noise`: [sessions, horizon, model_action_dim]. Opened with `max_batch` of at least so many."""
    if len(sessions) != len(observations) or not sessions:
        raise InvalidInput(
            f"infer_batch: {len(sessions)} sessions and {len(observations)} observations; need as many, at least one"
        )
    requests = []
    for i, (session, obs) in enumerate(zip(sessions, observations)):
        if not isinstance(session, Session):
            raise InvalidInput(f"request {i}: expected a Session, got {type(session).__name__}")
        session._check_process()
        try:
            r = _observation.read(obs, session._contract)
        except InvalidInput as error:
            raise InvalidInput(f"request {i}: {error}") from error
        requests.append((session._core, r.images, r.state, r.prompt, r.tokens))
    shape = (len(sessions), *sessions[0]._noise_shape)
    given = None if noise is None else _observation.to_noise(noise, shape)
    return _core.infer_batch(requests, _steps(steps), given)


def describe(
    checkpoint: str | os.PathLike[str], *, robot: str | os.PathLike[str] = "", assets: str = ""
) -> dict[str, Any]:
    """What a checkpoint says about itself and one robot, without reading its weights: `layout`, `horizon`,
    `model_action_dim`, `image_size`, `max_tokens`, `default_steps`, `components` (what its linear layers are
    stored in, as in `Policy.info`, without a kernel), `contract_json`, `contract_hash`."""
    return _core.describe(_path(checkpoint, "checkpoint"), _path(robot, "robot"), _text(assets, "assets"))
