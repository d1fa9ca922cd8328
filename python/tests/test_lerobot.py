"""The adapter with lerobot's signature. A small stand-in plays torch: the adapter must use nothing else of it."""

import sys
import types

from conftest import LEROBOT, OPENPI, frame
import numpy as np
import pytest

import servoflow
from servoflow.lerobot import LeRobotPolicy

TOP, AUX = "observation.images.top", "observation.images.aux"


@pytest.fixture(scope="module")
def policy():
    return servoflow.Policy.open(LEROBOT, device="cpu", precision="fp32", max_batch=2)


def batch(rows):
    """lerobot's dict as it is before the preprocessor: floats [rows, 3, height, width]."""
    image = frame("tests/golden/images/push_gripperPOV_256x256.png").transpose(2, 0, 1)
    images = np.stack([np.roll(image, 10 * i, 2) for i in range(rows)]).astype(np.float32) / 255
    state = np.linspace(-0.4, 0.4, 8 * rows, dtype=np.float32).reshape(rows, 8)
    return {
        TOP: images,
        AUX: images[:, :, ::2, ::2],
        "observation.state": state,
        "task": [f"push {i}" for i in range(rows)],
    }


def row(full, i):
    """The same request in the engine's own way."""
    image = np.rint(full[TOP][i] * 255).astype(np.uint8)
    aux = np.rint(full[AUX][i] * 255).astype(np.uint8)
    return {TOP: image, AUX: aux, "observation.state": full["observation.state"][i], "task": full["task"][i]}


def test_chunks_are_those_of_sessions(policy):
    adapter = LeRobotPolicy(policy, seed=5)
    full = batch(3)
    sessions = [policy.new_session(seed=5 + i) for i in range(3)]
    for _ in range(2):
        chunk = adapter.predict_action_chunk(full)
        assert chunk.shape == (3, 10, 7) and chunk.dtype == np.float32
        for i, session in enumerate(sessions):
            expected = session.infer(row(full, i))["actions"]
            np.testing.assert_array_equal(chunk[i], expected.astype(np.float32))


def test_noise_and_steps(policy):
    adapter = LeRobotPolicy(policy)
    full = batch(2)
    noise = np.random.default_rng(0).standard_normal((2, 10, 32), np.float32)
    chunk = adapter.predict_action_chunk(full, noise=noise, num_steps=3)
    expected = policy.new_session().infer(row(full, 1), noise=noise[1], steps=3)["actions"]
    np.testing.assert_array_equal(chunk[1], expected.astype(np.float32))


def test_select_action_hands_out_the_chunk(policy):
    adapter = LeRobotPolicy(policy, n_action_steps=4).eval()
    full = batch(2)
    chunks = [LeRobotPolicy.predict_action_chunk(adapter, full) for _ in range(2)]
    adapter.reset()
    for chunk in chunks:
        for i in range(4):
            action = adapter.select_action(full)
            assert action.shape == (2, 7)
            np.testing.assert_array_equal(action, chunk[:, i])
    adapter.select_action(full)
    with pytest.raises(servoflow.InvalidInput, match="1 rows; the current chunk has 2"):
        adapter.select_action(batch(1))
    adapter.reset()
    np.testing.assert_array_equal(adapter.select_action(batch(1))[0], adapter_first(policy, batch(1)))


def adapter_first(policy, full):
    return policy.new_session().infer(row(full, 0))["actions"][0].astype(np.float32)


def test_in_a_loop_with_processors(policy):
    adapter = LeRobotPolicy(policy)
    full = batch(1)
    action = adapter.postprocessor(adapter.select_action(adapter.preprocessor(full)))
    np.testing.assert_array_equal(action[0], adapter_first(policy, full))
    assert adapter.config.chunk_size == adapter.config.n_action_steps == 10


def test_one_row_without_a_batch_dimension(policy):
    full = batch(1)
    single = {key: value[0] for key, value in full.items()}
    chunk = LeRobotPolicy(policy).predict_action_chunk(single)
    np.testing.assert_array_equal(chunk, LeRobotPolicy(policy).predict_action_chunk(full))


def test_other_contracts_and_picture_files(obs):
    libero = servoflow.Policy.open(OPENPI, device="cpu", precision="fp32", robot="libero")
    chunk = LeRobotPolicy(libero, seed=7).predict_action_chunk(
        {**obs, "observation/state": np.stack([obs["observation/state"]] * 2),
         "observation/image": np.stack([obs["observation/image"]] * 2),
         "observation/wrist_image": np.stack([obs["observation/wrist_image"]] * 2)}
    )  # fmt: skip
    expected = libero.new_session(seed=7).infer(obs)["actions"]
    np.testing.assert_array_equal(chunk[0], expected.astype(np.float32))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"observation.state": np.zeros((3, 8), np.float32)}, "do not agree"),
        ({"observation.state": np.zeros(8, np.float32)}, "do not agree"),
        ({"observation.state": np.zeros((2, 7), np.float32)}, "observation.state: shape"),
        ({TOP: np.zeros((2, 3, 64, 64), np.float32) - 1}, f"{TOP}: a float picture"),
        ({TOP: np.zeros((2, 64, 64), np.float32)}, "do not agree"),
        ({"task": ["one"]}, "task: 1 items for 2 rows"),
        ({"task": 3}, "task: expected a str"),
        ({"observation.images.elbow": np.zeros((2, 3, 8, 8))}, "observation.images.elbow"),
        ({"observation.language.tokens": np.zeros((2, 200))}, "been through lerobot's preprocessor"),
    ],
)
def test_wrong_batches_are_named(policy, change, words):
    with pytest.raises(servoflow.InvalidInput) as raised:
        LeRobotPolicy(policy).predict_action_chunk({**batch(2), **change})
    assert words in str(raised.value)


def test_wrong_arguments(policy):
    adapter = LeRobotPolicy(policy)
    without = batch(1)
    del without["observation.state"]
    with pytest.raises(servoflow.InvalidInput, match="observation.state: missing"):
        adapter.predict_action_chunk(without)
    with pytest.raises(servoflow.InvalidInput, match="no rows"):
        adapter.predict_action_chunk({k: v[:0] for k, v in batch(1).items()})
    with pytest.raises(servoflow.InvalidInput, match="n_action_steps: 11"):
        LeRobotPolicy(policy, n_action_steps=11)
    with pytest.raises(TypeError):
        adapter.select_action(batch(1), prev_chunk_left_over=None)


class Tensor:
    """As much of torch.Tensor as the adapter may use."""

    def __init__(self, array):
        self.array = np.asarray(array)

    def detach(self):
        return self

    def cpu(self):
        return self

    def __array__(self, dtype=None, copy=None):
        return np.asarray(self.array, dtype)


def test_speaks_torch_if_spoken_to_in_it(policy, monkeypatch):
    torch = types.ModuleType("torch")
    torch.Tensor = Tensor
    torch.from_numpy = Tensor
    full = batch(2)
    expected = LeRobotPolicy(policy).predict_action_chunk(full)
    monkeypatch.setitem(sys.modules, "torch", torch)
    tensors = {key: Tensor(value) if isinstance(value, np.ndarray) else value for key, value in full.items()}
    chunk = LeRobotPolicy(policy).predict_action_chunk(tensors)
    assert isinstance(chunk, Tensor)
    np.testing.assert_array_equal(chunk.array, expected)
    assert isinstance(LeRobotPolicy(policy).select_action(tensors), Tensor)
    assert isinstance(LeRobotPolicy(policy).select_action(full), np.ndarray)
