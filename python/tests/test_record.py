"""Recorded cases are what `servoflow verify` reads: right references pass, wrong ones fail, golden ones come back."""

import json
import subprocess
import types

from check_recordings import read
from conftest import LEROBOT, OPENPI, frame
import numpy as np
import pytest

import servoflow
from servoflow import record


def verify(binary, checkpoint, cases, precision="fp32"):
    """(exit code, JSON report)."""
    done = subprocess.run(
        [binary, "verify", checkpoint, "--cases", cases, "--precision", precision, "--device", "cpu", "--json", "-"],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode in (0, 1), done.stderr
    return done.returncode, json.loads(done.stdout)


def fresh(obs):
    """The fake reference below works in place."""
    return {key: value.copy() if isinstance(value, np.ndarray) else value for key, value in obs.items()}


class OpenPI:
    """Built like openpi's Policy; its answers come from the engine, `error` added to the normalised actions."""

    metadata = {"of": "the reference"}

    def __init__(self, checkpoint=OPENPI, robot="libero", steps=None, error=0.0):
        self.session = servoflow.Policy.open(
            checkpoint, device="cpu", precision="fp32", robot=robot
        ).new_session()
        self._sample_kwargs = {} if steps is None else {"num_steps": steps}
        self._sample_actions = self.sample
        self.error = error
        self.resets = 0

    def sample(self, device, observation, *, noise, num_steps=10):
        self.result = self.session.infer(observation.raw, noise=noise, steps=num_steps)
        return self.result["servoflow"]["normalized"][None] + np.float32(self.error)

    def infer(self, obs, *, noise=None):
        observation = types.SimpleNamespace(raw=dict(obs))
        normalized = self._sample_actions("cpu", observation, noise=noise[None], **self._sample_kwargs)
        assert normalized.shape[0] == 1
        for value in obs.values():  # a reference may work in place
            if isinstance(value, np.ndarray) and value.flags.writeable:
                value[...] = 0
        return {"actions": self.result["actions"], "state": 3, "policy_timing": {"infer_ms": 1.0}}

    def reset(self):
        self.resets += 1


def test_a_right_reference_passes(binary, tmp_path, obs):
    reference = OpenPI(steps=7)
    recorder = record.OpenPIRecorder(reference, OPENPI, tmp_path, robot="libero", about="by hand")
    assert recorder.metadata == {"of": "the reference"}
    kept = fresh(obs)
    result = recorder.infer(obs)
    assert result["state"] == 3 and result["policy_timing"] == {"infer_ms": 1.0}
    noise = np.full((10, 32), 0.25, np.float32)
    recorder.infer(
        {**fresh(kept), "observation/image": kept["observation/image"].transpose(2, 0, 1).copy()}, noise=noise
    )
    recorder.reset()
    assert reference.resets == 1 and reference._sample_actions == reference.sample
    first, second = sorted(tmp_path.glob("*"))
    assert [first.name, second.name] == ["case-0000.safetensors", "case-0001.safetensors"]

    metadata, tensors = read(first)
    assert metadata["steps"] == "7" and metadata["about"] == "by hand" and metadata["image_mask"] == "1 1 0"
    np.testing.assert_array_equal(tensors["input/image/base_0_rgb"], kept["observation/image"])
    np.testing.assert_array_equal(tensors["input/state"], kept["observation/state"])
    np.testing.assert_array_equal(read(second)[1]["input/noise"], noise)
    np.testing.assert_array_equal(
        read(second)[1]["input/image/base_0_rgb"], tensors["input/image/base_0_rgb"], strict=True
    )
    for precision in ("fp32", "bf16"):
        code, report = verify(binary, OPENPI, tmp_path, precision)
        assert code == 0 and report["failed"] == 0 and report["passed"] > 0
    assert {r["stage"] for r in report["records"]} == {"actions", "actions_normalized"}


def test_a_wrong_reference_fails(binary, tmp_path, obs):
    record.OpenPIRecorder(OpenPI(error=1e-2), OPENPI, tmp_path / "off", robot="libero").infer(fresh(obs))
    code, report = verify(binary, OPENPI, tmp_path / "off")
    assert code == 1 and [r["stage"] for r in report["records"] if not r["pass"]] == ["actions_normalized"]

    class Mirrored(OpenPI):
        def sample(self, device, observation, **kwargs):
            observation.raw["observation/image"] = observation.raw["observation/image"][:, ::-1]
            return super().sample(device, observation, **kwargs)

    record.OpenPIRecorder(Mirrored(), OPENPI, tmp_path / "mirrored", robot="libero").infer(fresh(obs))
    code, report = verify(binary, OPENPI, tmp_path / "mirrored")
    assert code == 1 and report["passed"] == 0
    assert verify(binary, OPENPI, tmp_path / "mirrored", "bf16")[0] == 1


def test_a_bf16_reference_is_judged_by_the_gates_of_bf16(binary, tmp_path, obs):
    record.OpenPIRecorder(OpenPI(error=1e-2), OPENPI, tmp_path, robot="libero", precision="bf16").infer(
        dict(obs)
    )
    assert verify(binary, OPENPI, tmp_path)[0] == 0
    record.OpenPIRecorder(OpenPI(error=1.0), OPENPI, tmp_path, robot="libero", precision="bf16").infer(
        dict(obs)
    )
    assert verify(binary, OPENPI, tmp_path)[0] == 1


class Golden:
    """Answers with what openpi itself answered, as recorded in tests/golden."""

    def __init__(self, tensors):
        self.tensors = tensors

    def _sample_actions(self, rng, observation, noise=None):
        np.testing.assert_array_equal(noise[0], self.tensors["input/noise"])
        return self.tensors["expect/actions_normalized"][None]

    def infer(self, obs, *, noise=None):
        seen = types.SimpleNamespace(
            tokenized_prompt=self.tensors["expect/tokens"][None],
            tokenized_prompt_mask=self.tensors["expect/token_mask"][None],
            state=np.pad(self.tensors["expect/state_normalized"], (0, 24))[None],
        )
        self._sample_actions(None, seen, noise=noise[None])
        return {"actions": self.tensors["expect/actions"]}


def test_a_golden_recording_comes_back(binary, tmp_path):
    metadata, tensors = read(OPENPI / "cases/libero.safetensors")
    recorder = record.OpenPIRecorder(Golden(tensors), OPENPI, tmp_path, robot="libero")
    recorder.infer(
        {"observation/image": tensors["input/image/base_0_rgb"],
         "observation/wrist_image": tensors["input/image/left_wrist_0_rgb"],
         "observation/state": tensors["input/state"], "prompt": metadata["prompt"]},
        noise=tensors["input/noise"],
    )  # fmt: skip
    again, back = read(tmp_path / "case-0000.safetensors")
    for name, tensor in back.items():
        np.testing.assert_array_equal(tensor, tensors[name])
    assert len(back) == 9
    for key in again.keys() & metadata.keys() - {"about", "tolerances"}:
        assert again[key] == metadata[key], key
    gates = json.loads(metadata["tolerances"])
    for precision, stages in json.loads(again["tolerances"]).items():
        for stage, gate in stages.items():
            assert gate == gates[precision][stage]
    code, report = verify(binary, OPENPI, tmp_path)
    assert code == 0 and report["passed"] == 5


def test_a_robots_transforms_travel_with_the_case(binary, tmp_path, aloha_checkpoint):
    image = frame("examples/frames/base.png").transpose(2, 0, 1)
    obs = {
        "images": {"cam_high": image, "cam_right_wrist": image[:, ::2]},
        "state": np.full(14, 0.01),
        "prompt": "go",
    }
    recorder = record.OpenPIRecorder(
        OpenPI(aloha_checkpoint, "aloha"), aloha_checkpoint, tmp_path, robot="aloha"
    )
    recorder.infer(obs)
    metadata, _ = read(tmp_path / "case-0000.safetensors")
    assert metadata["image_mask"] == "1 0 1" and metadata["action_width"] == "14"
    code, report = verify(binary, aloha_checkpoint, tmp_path)
    assert code == 0 and report["passed"] == 2, report["records"]


class LeRobot:
    """Built like lerobot's policy between its processors; answers come from the engine."""

    def __init__(self, error=0.0):
        self.session = servoflow.Policy.open(LEROBOT, device="cpu", precision="fp32").new_session()
        self.error = np.float32(error)
        self.resets = 0

    def preprocess(self, observation):
        images = {
            key: value[None] for key, value in observation.items() if key.startswith("observation.images.")
        }
        return {
            **images,
            "observation.state": observation["observation.state"][None],
            "task": [observation["task"]],
        }

    def predict_action_chunk(self, batch, *, noise, num_steps):
        raw = {key: value[0] for key, value in batch.items()}
        self.result = self.session.infer(raw, noise=noise[0], steps=num_steps)
        return self.result["servoflow"]["normalized"][None, :, :7]

    def postprocess(self, actions):
        return self.result["actions"][None].astype(np.float32) + self.error

    def reset(self):
        self.resets += 1


@pytest.mark.parametrize("error", [0.0, 0.1])
def test_lerobots_policy_and_processors(binary, tmp_path, error):
    reference = LeRobot(error)
    recorder = record.LeRobotRecorder(
        reference, reference.preprocess, reference.postprocess, LEROBOT, tmp_path, steps=5, limit=2
    )
    image = frame("tests/golden/images/push_corner4_640x480.png")
    chw = image.transpose(2, 0, 1).astype(np.float32) / 255
    obs = {"observation.images.top": chw, "observation.state": np.zeros(8, np.float32), "task": "push"}
    for _ in range(3):
        assert recorder.predict_action_chunk(obs).shape == (1, 10, 7)
    recorder.reset()
    assert reference.resets == 1
    assert len(list(tmp_path.iterdir())) == 2  # limit
    _, tensors = read(tmp_path / "case-0000.safetensors")
    np.testing.assert_array_equal(tensors["input/image/observation.images.top"], image)
    code, report = verify(binary, LEROBOT, tmp_path)
    assert (code == 0) == (error == 0)
    failed = {r["stage"] for r in report["records"] if not r["pass"]}
    assert failed == (set() if error == 0 else {"actions"})


def test_what_cannot_be_recorded_is_told_and_not_written(tmp_path, obs):
    def recorder(reference=None, **options):
        return record.OpenPIRecorder(
            reference or OpenPI(), OPENPI, tmp_path, **{"robot": "libero", **options}
        )

    def refused(words, reference=None, change=(), **options):
        with pytest.raises(servoflow.Error) as raised:
            recorder(reference, **options).infer({**fresh(obs), **dict(change)})
        assert words in str(raised.value)

    refused("precision", precision="fp8")
    refused("dishwasher", robot="dishwasher")
    refused("observation/state: shape", change={"observation/state": np.zeros(3)})
    refused("takes frames", change={"observation/image": b"\x89PNG"})
    without = types.SimpleNamespace(infer=lambda obs, noise: {"actions": np.zeros((10, 7))})
    refused("no `_sample_actions`", without)
    refused("actions: the reference's answer has none", types.SimpleNamespace(infer=lambda obs, noise: {}))
    told = {"actions": np.zeros((10, 7)), "actions_normalized": np.zeros((10, 31))}
    refused("actions_normalized", types.SimpleNamespace(infer=lambda obs, noise: told))
    told = {"actions": np.zeros((10, 8)), "actions_normalized": np.zeros((10, 32))}
    refused("actions: the reference answers [10, 8]", types.SimpleNamespace(infer=lambda obs, noise: told))
    told = {"actions": np.full((10, 7), np.nan), "actions_normalized": np.zeros((10, 32))}
    refused("not finite", types.SimpleNamespace(infer=lambda obs, noise: told))
    with pytest.raises(ZeroDivisionError):
        recorder(types.SimpleNamespace(infer=lambda obs, noise: 1 / 0)).infer(obs)
    with pytest.raises(servoflow.InvalidInput, match="LeRobotRecorder"):
        record.OpenPIRecorder(OpenPI(), LEROBOT, tmp_path)
    with pytest.raises(servoflow.InvalidInput, match="OpenPIRecorder"):
        record.LeRobotRecorder(None, None, None, OPENPI, tmp_path)
    assert list(tmp_path.iterdir()) == []
