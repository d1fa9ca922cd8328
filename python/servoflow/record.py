"""Records what a reference policy answers, as cases that `servoflow verify` recomputes and judges.

    recorder = servoflow.record.OpenPIRecorder(reference, "checkpoint/", "cases/", robot="libero")
    result = recorder.infer(obs)          # what the reference answers; one file more in cases/
    # then: servoflow verify checkpoint/ --cases cases/

A recorder stands where its reference stands, in the reference's own environment. It gives the reference the noise, so
that the engine can start from the same, and never lets the engine infer: needed of servoflow is only what a
checkpoint says about itself. A case holds frames, state, prompt and noise, and of the reference's answer the
normalised and the robot's actions; tokens, normalised state and pictures too, where the reference shows them.

`precision` says how the reference computes. "fp32": the engine's FP32 answers must agree to rounding error (the
gates of tests/golden/README.md, per layout). "bf16": the reference's own rounding is the larger part of the
difference, and only the direction and size of the normalised actions are judged (rms error 0.04, cosine 0.9995).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
import dataclasses
import json
import os
import pathlib
import re
import sys
import threading
from typing import Any, SupportsIndex

import numpy as np
import numpy.typing as npt

from . import _observation, _safetensors
from ._errors import Error, InvalidInput
from ._policy import _integer, describe

__all__ = ["LeRobotRecorder", "OpenPIRecorder"]

Array = npt.NDArray[Any]

# The slots of openpi's models, in the order of image_mask.
OPENPI_SLOTS = ("base_0_rgb", "left_wrist_0_rgb", "right_wrist_0_rgb")

# Gates by layout (max |difference| as a share of the expectation's rms); their derivation is in tests/golden/README.md.
FP32_GATES = {
    "openpi": {"state_normalized": 1e-6, "image": 1e-6, "actions_normalized": 2.5e-4, "actions": 2.5e-4},
    "lerobot": {"state_normalized": 1e-6, "image": 1e-4, "actions_normalized": 5e-4, "actions": 5e-4},
}
BF16_GATES = {"actions_normalized": {"rms": 0.04, "cosine": 0.9995}}


def tolerances(layout: str, precision: str) -> dict[str, dict[str, dict[str, float]]]:
    """The gates of a case, by the engine's precision: what metadata `tolerances` holds."""
    exact = {stage: {"max": share} for stage, share in FP32_GATES[layout].items()}
    if precision == "fp32":
        return {"fp32": exact, "bf16": BF16_GATES}
    inputs = {stage: exact[stage] for stage in ("state_normalized", "image")}
    return {"fp32": {**inputs, **BF16_GATES}, "bf16": BF16_GATES}


def to_host(value: Any, field: str) -> Array:
    """A NumPy array from NumPy, torch or JAX, from wherever it lies; bfloat16 becomes float32."""
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(value, torch.Tensor):
        value = value.detach().cpu()
        value = value.float() if value.dtype in (torch.bfloat16, torch.float16) else value
        return np.asarray(value.numpy())
    array = np.asarray(value)
    if array.dtype.kind not in "fiub":
        try:
            array = array.astype(np.float32)
        except (TypeError, ValueError):
            raise InvalidInput(f"{field}: dtype {array.dtype}, expected numbers") from None
    return array


def like(batch: Any, array: Array) -> Any:
    """The array as a tensor on the device of the batch's tensors, if it has any."""
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(batch, Mapping):
        for value in batch.values():
            if isinstance(value, torch.Tensor):
                return torch.from_numpy(array).to(value.device)
    return array


def without_batch(array: Array, rank: int, field: str) -> Array:
    """Drops a first dimension of 1 if there is one more than `rank`."""
    if array.ndim == rank + 1 and array.shape[0] == 1:
        array = array[0]
    if array.ndim != rank:
        raise InvalidInput(f"{field}: shape {list(array.shape)} of the reference is not one request's")
    return array


@dataclasses.dataclass(frozen=True)
class Inputs:
    """The inputs of one case: tensors by name, slots of the cameras that are there in the model's order, the prompt."""

    tensors: dict[str, Array]
    slots: list[str]
    prompt: str


class _Writer:
    """What both recorders share: the checkpoint's facts, the noise, and the files."""

    def __init__(
        self,
        checkpoint: str | os.PathLike[str],
        folder: str | os.PathLike[str],
        robot: str | os.PathLike[str],
        assets: str,
        precision: str,
        seed: SupportsIndex,
        limit: SupportsIndex | None,
        about: str,
    ) -> None:
        if precision not in ("fp32", "bf16"):
            raise InvalidInput(f'precision: {precision!r}, expected "fp32" or "bf16"')
        self.facts = describe(checkpoint, robot=robot, assets=assets)
        self.contract = _observation.Contract.parse(self.facts["contract_json"])
        self.details = json.loads(self.facts["contract_json"])
        self.precision = precision
        self.about = about
        self.noise_shape = (self.facts["horizon"], self.facts["model_action_dim"])
        self.limit = None if limit is None else _integer(limit, "limit", 0, 2**31)
        self.count = 0
        self.lock = threading.Lock()
        self._random = np.random.default_rng(_integer(seed, "seed", 0, 2**64 - 1))
        self._folder = pathlib.Path(folder)
        self._folder.mkdir(parents=True, exist_ok=True)
        numbers = [re.fullmatch(r"case-(\d+)\.safetensors", f.name) for f in self._folder.iterdir()]
        self._next = 1 + max((int(m[1]) for m in numbers if m), default=-1)

    def full(self) -> bool:
        return self.limit is not None and self.count >= self.limit

    def noise(self, given: Any) -> npt.NDArray[np.float32]:
        if given is not None:
            return _observation.to_noise(to_host(given, "noise"), self.noise_shape)
        return self._random.standard_normal(self.noise_shape, np.float32)

    def inputs(self, observation: Mapping[str, Any], noise: Array) -> Inputs:
        """What a case holds of one request, copied: a reference may write to what it gets."""
        request = _observation.read(observation, self.contract)
        if request.prompt is None:
            raise InvalidInput(f"{self.contract.prompt}: missing; a case needs the prompt")
        slot_of = {name: slot for key, slot in self.contract.cameras for name in (key, slot)}
        frames: dict[str, Array] = {}
        for name, layout, pixels in request.images:
            if layout == _observation.ENCODED:
                raise InvalidInput(f"{name}: a reference takes frames, not picture files")
            hwc = pixels.transpose(1, 2, 0) if layout == _observation.CHW else pixels
            frames[slot_of[name]] = np.array(hwc, np.uint8, order="C")
        slots = [slot for _, slot in self.contract.cameras if slot in frames]
        tensors = {f"input/image/{slot}": frames[slot] for slot in slots}
        tensors["input/state"] = request.state.copy()
        tensors["input/noise"] = noise.copy()
        return Inputs(tensors, slots, request.prompt)

    def write(
        self,
        inputs: Inputs,
        steps: int,
        layout: str,
        answer: Mapping[str, Array],
    ) -> pathlib.Path:
        """One case. `answer`: stages by name; those that verify judges are listed in tests/golden/README.md."""
        tensors = dict(inputs.tensors)
        for stage, array in answer.items():
            if array.dtype.kind == "f" and not np.isfinite(array).all():
                raise InvalidInput(f"{stage}: the reference's answer holds a value that is not finite")
            tensors[f"expect/{stage}"] = array
        order = OPENPI_SLOTS if layout == "openpi" else tuple(c["slot"] for c in self.details["cameras"])
        metadata = {
            "format_version": "2",
            "format": layout,
            "entry": "frames",
            "robot": self.contract.name,
            "prompt": inputs.prompt,
            "prompt_mode": self.details["prompt"]["mode"],
            "max_tokens": str(self.details["prompt"]["max_tokens"]),
            "steps": str(steps),
            "slots": " ".join(inputs.slots),
            "image_mask": " ".join(str(int(slot in inputs.slots)) for slot in order),
            "action_width": str(answer["actions"].shape[1]),
            "contract": self.facts["contract_json"],
            "precision": self.precision,
            "tolerances": json.dumps(tolerances(layout, self.precision)),
            "about": self.about,
        }
        path = self._folder / f"case-{self._next:04d}.safetensors"
        _safetensors.write(path, tensors, metadata)
        self._next += 1
        self.count += 1
        return path

    def actions(self, value: Any, width: int) -> Array:
        array = without_batch(to_host(value, "actions"), 2, "actions")
        horizon = self.noise_shape[0]
        if array.shape[0] != horizon or (width and array.shape[1] != width):
            raise InvalidInput(
                f"actions: the reference answers {list(array.shape)}, the checkpoint and robot have "
                f"[{horizon}, {width or '?'}]"
            )
        return array if array.dtype in (np.float32, np.float64) else array.astype(np.float32)


class OpenPIRecorder:
    """Stands where an openpi `Policy` stands: `infer`, `reset`, `metadata`.

    `reference.infer(obs, noise=…)` must take noise [horizon, model_action_dim], as openpi's does. The normalised
    actions are what passes through `reference._sample_actions`, as in openpi's Policy; a reference without it must put
    them into its answer as `actions_normalized` [horizon, model_action_dim]. `steps`: how many the reference takes, if
    it does not tell by the `num_steps` of its sample_actions; openpi's default is 10. `limit`: how many inferences are
    recorded; later ones are the reference's alone. `seed` is that of the noise.
    """

    def __init__(
        self,
        reference: Any,
        checkpoint: str | os.PathLike[str],
        folder: str | os.PathLike[str],
        *,
        robot: str | os.PathLike[str] = "",
        assets: str = "",
        precision: str = "fp32",
        steps: SupportsIndex | None = None,
        seed: SupportsIndex = 0,
        limit: SupportsIndex | None = None,
        about: str = "",
    ) -> None:
        self.reference = reference
        if describe(checkpoint, robot="none")["layout"] == "lerobot":
            raise InvalidInput("checkpoint: has lerobot's layout; use LeRobotRecorder")
        self._writer = _Writer(checkpoint, folder, robot, assets, precision, seed, limit, about)
        self._steps = None if steps is None else _integer(steps, "steps", 1, 1000)

    @property
    def metadata(self) -> Any:
        """The reference's."""
        return self.reference.metadata

    def reset(self) -> None:
        """The reference's, if it has one."""
        if hasattr(self.reference, "reset"):
            self.reference.reset()

    def infer(self, obs: Mapping[str, Any], *, noise: Any = None) -> Any:
        """The reference's answer, unchanged. Raises what the reference raises, and InvalidInput for what a case cannot
        hold; then no file is written."""
        w = self._writer
        with w.lock:
            if w.full():
                return self.reference.infer(obs) if noise is None else self.reference.infer(obs, noise=noise)
            start = w.noise(noise)
            inputs = w.inputs(obs, start)
            result, seen = self._watched(obs, start.copy())
            if not isinstance(result, Mapping) or "actions" not in result:
                raise InvalidInput("actions: the reference's answer has none")
            answer = self._answer(result, seen, sum(width for _, width in w.contract.state))
            steps = self._steps or int(seen.get("num_steps", 10))
            w.write(inputs, steps, "openpi", answer)
            return result

    def _watched(self, obs: Mapping[str, Any], noise: Array) -> tuple[Any, dict[str, Any]]:
        """The reference's answer, and what passed through its `_sample_actions` meanwhile."""
        seen: dict[str, Any] = {}
        inner: Callable[..., Any] | None = getattr(self.reference, "_sample_actions", None)
        if inner is None:
            return self.reference.infer(obs, noise=noise), seen
        own = "_sample_actions" in vars(self.reference)

        def watch(rng: Any, observation: Any, *args: Any, **kwargs: Any) -> Any:
            out = inner(rng, observation, *args, **kwargs)
            seen.update(observation=observation, normalized=out, **kwargs)
            return out

        self.reference._sample_actions = watch
        try:
            return self.reference.infer(obs, noise=noise), seen
        finally:
            if own:
                self.reference._sample_actions = inner
            else:
                del self.reference._sample_actions

    def _answer(
        self, result: Mapping[str, Any], seen: Mapping[str, Any], state_width: int
    ) -> dict[str, Array]:
        w = self._writer
        normalized = seen.get("normalized", result.get("actions_normalized"))
        if normalized is None:
            raise Error(
                "actions_normalized: the reference has no `_sample_actions` to watch; let its answer carry them as "
                '"actions_normalized"'
            )
        array = without_batch(to_host(normalized, "actions_normalized"), 2, "actions_normalized")
        if array.shape != w.noise_shape:
            raise InvalidInput(
                f"actions_normalized: the reference answers {list(array.shape)}, the checkpoint has {list(w.noise_shape)}"
            )
        answer = {
            "actions_normalized": array.astype(np.float32),
            "actions": w.actions(result["actions"], w.details["actions"]["width"]),
        }
        observation = seen.get("observation")
        tokens = getattr(observation, "tokenized_prompt", None)
        mask = getattr(observation, "tokenized_prompt_mask", None)
        if tokens is not None and mask is not None:
            answer["tokens"] = without_batch(to_host(tokens, "tokens"), 1, "tokens").astype(np.int32)
            answer["token_mask"] = without_batch(to_host(mask, "token_mask"), 1, "token_mask").astype(
                np.bool_
            )
        state = getattr(observation, "state", None)
        if state is not None and state_width:
            row = without_batch(to_host(state, "state"), 1, "state")
            answer["state_normalized"] = row[:state_width].astype(np.float64)
        return answer


class LeRobotRecorder:
    """Records a lerobot policy together with its processors.

    `preprocessor(observation)` makes the policy's batch, `policy.predict_action_chunk(batch, noise=…, num_steps=…)`
    answers normalised actions [1, horizon, action_dim], `postprocessor(actions)` robot units: the objects that
    lerobot's make_pre_post_processors and PI05Policy.from_pretrained give. Noise [1, horizon, model_action_dim] is
    handed over as the batch's values are: a torch tensor on their device, or a NumPy array.
    """

    def __init__(
        self,
        policy: Any,
        preprocessor: Callable[[Any], Any],
        postprocessor: Callable[[Any], Any],
        checkpoint: str | os.PathLike[str],
        folder: str | os.PathLike[str],
        *,
        precision: str = "fp32",
        steps: SupportsIndex = 10,
        seed: SupportsIndex = 0,
        limit: SupportsIndex | None = None,
        about: str = "",
    ) -> None:
        self.policy = policy
        self.preprocessor = preprocessor
        self.postprocessor = postprocessor
        self._steps = _integer(steps, "steps", 1, 1000)
        if describe(checkpoint, robot="none")["layout"] != "lerobot":
            raise InvalidInput("checkpoint: does not have lerobot's layout; use OpenPIRecorder")
        self._writer = _Writer(checkpoint, folder, "", "", precision, seed, limit, about)

    def reset(self) -> None:
        """The policy's."""
        self.policy.reset()

    def predict_action_chunk(self, observation: Mapping[str, Any], *, noise: Any = None) -> Any:
        """The postprocessed answer to one observation as it is before the preprocessor: frames [3, height, width],
        uint8 or as bytes / 255, the state [width], and `task`. A batch dimension of 1 is allowed."""
        w = self._writer
        with w.lock:
            start = w.noise(noise)
            recorded = not w.full()
            if recorded:
                single = {key: self._single(value, key) for key, value in observation.items()}
                inputs = w.inputs(single, start)
            batch = self.preprocessor(dict(observation))
            handed = like(batch, start.copy()[None])
            normalized = self.policy.predict_action_chunk(batch, noise=handed, num_steps=self._steps)
            actions = self.postprocessor(normalized)
            if recorded:
                w.write(inputs, self._steps, "lerobot", self._answer(batch, normalized, actions))
            return actions

    def _single(self, value: Any, key: str) -> Any:
        """One row of what may come as a batch of one."""
        if isinstance(value, (list, tuple)) and len(value) == 1 and isinstance(value[0], str):
            return value[0]
        if isinstance(value, (str, bytes)):
            return value
        ranks = {name: 3 for camera in self._writer.contract.cameras for name in camera}
        ranks.update({name: 1 for name, _ in self._writer.contract.state})
        if key not in ranks:
            return value
        return without_batch(to_host(value, key), ranks[key], key)

    def _answer(self, batch: Any, normalized: Any, actions: Any) -> dict[str, Array]:
        w = self._writer
        width = w.details["actions"]["width"]
        answer = {
            "actions_normalized": w.actions(normalized, width).astype(np.float32),
            "actions": w.actions(actions, width),
        }
        if isinstance(batch, Mapping):
            tokens = batch.get("observation.language.tokens")
            mask = batch.get("observation.language.attention_mask")
            if tokens is not None and mask is not None:
                answer["tokens"] = without_batch(to_host(tokens, "tokens"), 1, "tokens").astype(np.int32)
                answer["token_mask"] = without_batch(to_host(mask, "mask"), 1, "mask").astype(np.bool_)
            state = batch.get("observation.state")
            if state is not None and tokens is not None:  # else the batch is not lerobot's own
                answer["state_normalized"] = without_batch(to_host(state, "state"), 1, "state").astype(
                    np.float32
                )
        return answer
