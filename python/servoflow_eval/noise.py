"""Counter-based random numbers: the engine's own flow noise in NumPy, and what the harness draws beside it.

Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011) with key = seed and counter = (block,
request). `flow_noise` gives the bits of the engine's `fill_noise` up to the last place of log, sine and cosine, so that a
policy that is not the engine starts its flow from the same point. Numbers depend on what they are for, never on what was
drawn before: an episode has the same noise in every arm, alone or resumed, on any worker.
"""

from __future__ import annotations

import hashlib

import numpy as np
import numpy.typing as npt

_M0, _M1 = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_W0, _W1 = 0x9E3779B9, 0xBB67AE85
_LOW = np.uint64(0xFFFFFFFF)
_32 = np.uint64(32)


def philox(counter: npt.NDArray[np.uint32], key: tuple[int, int]) -> npt.NDArray[np.uint32]:
    """Ten rounds. `counter` uint32 [blocks, 4], `key` two 32-bit numbers; returns uint32 [blocks, 4]."""
    c = [counter[:, i].astype(np.uint64) for i in range(4)]
    k0, k1 = key
    for _ in range(10):
        a, b = _M0 * c[0], _M1 * c[2]
        c = [
            (b >> _32) ^ c[1] ^ np.uint64(k0),
            b & _LOW,
            (a >> _32) ^ c[3] ^ np.uint64(k1),
            a & _LOW,
        ]
        k0, k1 = (k0 + _W0) & 0xFFFFFFFF, (k1 + _W1) & 0xFFFFFFFF
    return np.stack(c, axis=1).astype(np.uint32)


def words(seed: int, request: int, count: int) -> npt.NDArray[np.uint32]:
    """Random words, uint32 [count rounded up to fours]."""
    if not (0 <= seed < 2**64 and 0 <= request < 2**64):
        raise ValueError(f"seed {seed} or request {request} is not between 0 and 2^64 - 1")
    blocks = np.arange((count + 3) // 4, dtype=np.uint64)
    counter = np.empty((blocks.size, 4), np.uint32)
    counter[:, 0], counter[:, 1] = blocks & _LOW, blocks >> _32
    counter[:, 2], counter[:, 3] = request & 0xFFFFFFFF, request >> 32
    return philox(counter, (seed & 0xFFFFFFFF, seed >> 32)).ravel()


def flow_noise(seed: int, request: int, shape: tuple[int, ...]) -> npt.NDArray[np.float32]:
    """What the engine's session with this seed starts its flow of inference number `request` from. float32 `shape`."""
    count = int(np.prod(shape))
    u = (words(seed, request, count).astype(np.float64) + 0.5) * 2.0**-32
    radius, angle = np.sqrt(-2 * np.log(u[0::2])), 2 * np.pi * u[1::2]
    out = np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1).ravel()
    noise: npt.NDArray[np.float32] = out[:count].astype(np.float32).reshape(shape)
    return noise


def uniform(seed: int, request: int, shape: tuple[int, ...]) -> npt.NDArray[np.float64]:
    """Numbers in (0, 1), float64 `shape`."""
    count = int(np.prod(shape))
    drawn = words(seed, request, count)[:count]
    return ((drawn.astype(np.float64) + 0.5) * 2.0**-32).reshape(shape)


def seed_of(*parts: object) -> int:
    """A 64-bit seed for what these words and numbers name: the first bytes of a SHA-256."""
    text = "\x1f".join(["servoflow-eval", *(str(part) for part in parts)])
    return int.from_bytes(hashlib.sha256(text.encode("utf-8")).digest()[:8], "little")


def episode_seed(noise_seed: int, task: str, episode: int) -> int:
    """The seed of the flow noise of one episode: the same in every arm with this `noise_seed`."""
    return seed_of("flow", noise_seed, task, episode)
