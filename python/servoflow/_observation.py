"""From a dict of arrays, as openpi and lerobot clients send it, to what the engine takes.

Which keys there are is the robot contract's matter; nothing here knows a robot. Keys of nested dicts are joined with
"/", so {"images": {"cam_high": x}} and {"images/cam_high": x} are the same observation.
"""

from __future__ import annotations

from collections.abc import Mapping
import dataclasses
import json
from typing import Any

import numpy as np
import numpy.typing as npt

from ._errors import InvalidInput

# ImageLayout of the C++ API.
HWC, CHW, ENCODED = 0, 1, 2
MAX_DEPTH = 16

Pixels = npt.NDArray[np.uint8]
Image = tuple[str, int, Pixels]


@dataclasses.dataclass(frozen=True)
class Contract:
    """What an observation of one robot consists of, read from the contract's canonical JSON."""

    name: str
    cameras: tuple[tuple[str, str], ...]  # (request key, model slot) of every camera that can be sent
    ignored: frozenset[str]  # image keys that are accepted and unused
    state: tuple[tuple[str, int], ...]  # (request key, width), in the model's order
    prompt: str
    exact_floats: bool  # float images are uint8 / 255 (lerobot); else openpi's 255 * x, cut off

    @staticmethod
    def parse(canonical: str) -> Contract:
        """Reads `Session.contract_json`."""
        json_ = json.loads(canonical)
        return Contract(
            name=json_["name"],
            cameras=tuple((c["key"], c["slot"]) for c in json_["cameras"] if c["key"]),
            ignored=frozenset(json_["ignored_images"]),
            state=tuple((p["key"], p["width"]) for p in json_["state"]["parts"]),
            prompt=json_["prompt"]["key"],
            exact_floats=json_["resize"] == "lerobot_float",
        )

    def camera_groups(self) -> set[str]:
        """Prefixes that only cameras have ("images/", "observation.images."): an unknown key there is a mistake."""
        keys = [key for key, _ in self.cameras] + sorted(self.ignored)
        others = [key for key, _ in self.state] + [self.prompt]
        groups = {key[: max(key.rfind("/"), key.rfind(".")) + 1] for key in keys}
        return {g for g in groups if g and not any(o.startswith(g) for o in others)}


@dataclasses.dataclass
class Request:
    """The arguments of one inference, all of them contiguous arrays on the host that stay alive with this object."""

    images: list[Image]
    state: npt.NDArray[np.float64]
    prompt: str | None
    tokens: npt.NDArray[np.int32] | None


def flatten(observation: Mapping[str, Any], prefix: str = "", depth: int = 0) -> dict[str, Any]:
    """Nested dicts to one level; keys joined with "/"."""
    if depth > MAX_DEPTH:
        raise InvalidInput(f"{prefix[:80]}: dicts are nested deeper than {MAX_DEPTH}")
    if not isinstance(observation, Mapping):
        raise InvalidInput(f"observation: expected a dict, got {type(observation).__name__}")
    flat: dict[str, Any] = {}
    for key, value in observation.items():
        if not isinstance(key, str):
            raise InvalidInput(f"observation: key {key!r:.80} is not a str")
        items = (
            flatten(value, prefix + key + "/", depth + 1)
            if isinstance(value, Mapping)
            else {prefix + key: value}
        )
        for name, item in items.items():
            if name in flat:
                raise InvalidInput(f"{name}: given twice")
            flat[name] = item
    return flat


def to_array(value: Any, field: str) -> npt.NDArray[Any]:
    """A NumPy array on the same memory where that can be: from NumPy, DLPack, the buffer or the array protocol."""
    if isinstance(value, np.ndarray):
        return value
    try:
        if hasattr(value, "__dlpack__") and hasattr(value, "__dlpack_device__"):
            kind = int(value.__dlpack_device__()[0])
            if kind not in (1, 3):  # the host's memory, pageable or pinned
                raise InvalidInput(
                    f"{field}: lies on a device (DLPack type {kind}); copy it to the host first (.cpu())"
                )
            if getattr(value, "requires_grad", False):
                value = value.detach()
            try:
                return np.from_dlpack(value)
            except (BufferError, RuntimeError, TypeError):
                return np.asarray(value)
        return np.asarray(value)
    except InvalidInput:
        raise
    except Exception as error:
        raise InvalidInput(f"{field}: not an array ({type(value).__name__}: {error})") from error


def to_pixels(value: Any, field: str, exact_floats: bool) -> tuple[int, Pixels]:
    """One camera frame: (layout, uint8 array). Contiguous uint8 frames are not copied.

    - bytes of a PNG or JPEG file
    - uint8 [height, width, 3], or [3, height, width] where the first side is 3, as openpi reads frames
    - floats in [0, 1] of the same shapes. openpi multiplies them by 255 and cuts off. lerobot's networks take the
      floats themselves; the engine takes bytes, so there every value must be a byte / 255, as lerobot makes them.
    """
    if isinstance(value, (bytes, bytearray, memoryview)):
        encoded = np.frombuffer(value, np.uint8)
        if encoded.size == 0:
            raise InvalidInput(f"{field}: an empty picture file")
        return ENCODED, encoded
    array = to_array(value, field)
    if array.ndim != 3 or (array.shape[0] != 3 and array.shape[2] != 3):
        raise InvalidInput(
            f"{field}: shape {list(array.shape)}, expected [height, width, 3] or [3, height, width]"
        )
    if array.dtype.kind == "f":
        array = exact_bytes(array, field) if exact_floats else truncated_bytes(array, field)
    elif array.dtype != np.uint8:
        raise InvalidInput(f"{field}: dtype {array.dtype}, expected uint8 or floats in [0, 1]")
    return (CHW if array.shape[0] == 3 else HWC), np.ascontiguousarray(array)


def check_unit_range(array: npt.NDArray[Any], field: str) -> None:
    """Raises unless all values are in [0, 1]; NaN is not."""
    if array.size and not (array.min() >= 0 and array.max() <= 1):
        raise InvalidInput(f"{field}: a float picture whose values are not all between 0 and 1")


def truncated_bytes(array: npt.NDArray[Any], field: str) -> Pixels:
    """openpi's conversion, in the array's own precision: (255 * image).astype(uint8)."""
    check_unit_range(array, field)
    out: Pixels = (255 * array).astype(np.uint8)
    return out


def exact_bytes(array: npt.NDArray[Any], field: str) -> Pixels:
    """The bytes whose 255ths the values are."""
    check_unit_range(array, field)
    scaled = array.astype(np.float64) * 255
    nearest = np.rint(scaled)
    if array.size and np.abs(scaled - nearest).max() > 1e-3:
        raise InvalidInput(
            f"{field}: holds values that are no byte / 255; send the camera's uint8 frame (the engine takes 8-bit frames)"
        )
    out: Pixels = nearest.astype(np.uint8)
    return out


def to_state(value: Any, field: str, width: int) -> npt.NDArray[np.float64]:
    """One part of the state: `width` real numbers (a scalar will do for one)."""
    array = to_array(value, field)
    if array.dtype.kind not in "fiu":
        raise InvalidInput(f"{field}: dtype {array.dtype}, expected real numbers")
    if array.ndim == 0 and width == 1:
        array = array.reshape(1)
    if array.shape != (width,):
        raise InvalidInput(f"{field}: shape {list(array.shape)}, expected [{width}]")
    return array.astype(np.float64)


def to_prompt(value: Any, field: str) -> str:
    """A str, a NumPy string of no dimension, or UTF-8 bytes."""
    if isinstance(value, np.ndarray) and value.ndim == 0 and value.dtype.kind in "US":
        value = value.item()
    try:
        if isinstance(value, bytes):
            value = value.decode("utf-8")
        if isinstance(value, str):
            value.encode("utf-8")
            return str(value)
    except UnicodeError as error:
        raise InvalidInput(f"{field}: not valid UTF-8 ({error})") from None
    raise InvalidInput(f"{field}: expected a str, got {type(value).__name__}")


def to_tokens(value: Any) -> npt.NDArray[np.int32]:
    """Token ids [count], integers that fit 32 bits."""
    array = to_array(value, "tokens")
    if array.dtype.kind not in "iu" or array.ndim != 1:
        raise InvalidInput(f"tokens: {array.dtype} {list(array.shape)}, expected integers [count]")
    if array.size and (array.min() < 0 or array.max() > 2**31 - 1):
        raise InvalidInput("tokens: an id is negative or beyond 2^31 - 1")
    return np.ascontiguousarray(array, np.int32)


def to_noise(value: Any, shape: tuple[int, ...]) -> npt.NDArray[np.float32]:
    """Real numbers of exactly this shape; a leading 1 that is too much is dropped, as openpi allows."""
    array = to_array(value, "noise")
    if array.ndim == len(shape) + 1 and array.shape[0] == 1:
        array = array[0]
    if array.dtype.kind != "f" or array.shape != shape:
        raise InvalidInput(f"noise: {array.dtype} {list(array.shape)}, expected floats {list(shape)}")
    with np.errstate(over="ignore"):  # what does not fit becomes infinite, and is refused
        out = np.ascontiguousarray(array, np.float32)
    if not np.isfinite(out).all():
        raise InvalidInput("noise: holds a value that is not a finite float32")
    return out


def read(observation: Mapping[str, Any], contract: Contract) -> Request:
    """The engine's arguments for one observation. Keys the contract does not know are ignored, as openpi does, except
    beside its cameras: a misspelt camera must not become a masked one. What is missing is the engine's to tell.
    """
    flat = flatten(observation)
    known = {name: name for camera in contract.cameras for name in camera}
    images = [
        (name, *to_pixels(flat.pop(name), name, contract.exact_floats)) for name in known if name in flat
    ]
    for name in contract.ignored:
        flat.pop(name, None)
    groups = contract.camera_groups()
    if unknown := sorted(key for key in flat if any(key.startswith(g) for g in groups)):
        cameras = ", ".join(key for key, _ in contract.cameras)
        raise InvalidInput(f"{unknown[0]}: robot {contract.name} has no such camera; it has: {cameras}")

    parts = []
    for key, width in contract.state:
        if key not in flat:
            raise InvalidInput(f"{key}: missing; robot {contract.name} needs {width} numbers")
        parts.append(to_state(flat[key], key, width))
    state = np.concatenate(parts) if parts else np.zeros(0)
    prompt = to_prompt(flat[contract.prompt], contract.prompt) if contract.prompt in flat else None
    tokens = to_tokens(flat["tokens"]) if "tokens" in flat else None
    return Request(images, state, prompt, tokens)
