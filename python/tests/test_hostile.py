"""Whatever is wrong is an exception that names the field: never a crash, never an answer."""

import copy
import pickle

from conftest import OPENPI
import numpy as np
import pytest

import servoflow

IMAGE = "observation/image"
STATE = "observation/state"


class Device:
    """A tensor on a GPU."""

    def __dlpack_device__(self):
        return (2, 0)

    def __dlpack__(self, **_):
        raise AssertionError("must not be asked")


class Broken:
    def __array__(self, dtype=None, copy=None):
        raise KeyError("no")


def bad_image(value):
    return {IMAGE: value}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (bad_image(np.zeros((64, 64, 3), np.int32)), f"{IMAGE}: dtype int32"),
        (bad_image(np.zeros((64, 64, 3), object)), f"{IMAGE}: dtype object"),
        (bad_image(np.zeros((64, 64, 3), bool)), f"{IMAGE}: dtype bool"),
        (bad_image(np.zeros((64, 64, 3), complex)), f"{IMAGE}: dtype complex128"),
        (bad_image(np.zeros((64, 64), np.uint8)), f"{IMAGE}: shape [64, 64]"),
        (bad_image(np.zeros((64, 64, 4), np.uint8)), f"{IMAGE}: shape [64, 64, 4]"),
        (bad_image(np.zeros((1, 64, 64, 3), np.uint8)), f"{IMAGE}: shape [1, 64, 64, 3]"),
        (bad_image(np.zeros((0, 64, 3), np.uint8)), IMAGE),
        (bad_image(np.zeros((64, 0, 3), np.uint8)), IMAGE),
        (bad_image(np.zeros((3, 700, 3), np.uint8)), IMAGE),
        (bad_image(np.broadcast_to(np.uint8(1), (1 << 21, 3, 3))), IMAGE),
        (bad_image(np.full((64, 64, 3), np.nan, np.float32)), f"{IMAGE}: a float picture"),
        (bad_image(np.full((64, 64, 3), 1.5)), f"{IMAGE}: a float picture"),
        (bad_image(np.full((64, 64, 3), -0.1)), f"{IMAGE}: a float picture"),
        (bad_image(b""), f"{IMAGE}: an empty picture file"),
        (bad_image(b"not a picture"), IMAGE),
        (bad_image(b"\x89PNG\r\n\x1a\n" + bytes(100)), IMAGE),
        (bad_image(None), IMAGE),
        (bad_image("frame.png"), IMAGE),
        (bad_image([[1, 2], [3]]), IMAGE),
        (bad_image(Device()), f"{IMAGE}: lies on a device"),
        (bad_image(Broken()), f"{IMAGE}: not an array"),
        ({"base_0_rgb": np.zeros((64, 64, 3), np.uint8)}, "twice"),
        ({STATE: np.zeros(7)}, f"{STATE}: shape [7], expected [8]"),
        ({STATE: np.zeros((1, 8))}, f"{STATE}: shape [1, 8]"),
        ({STATE: np.zeros(0)}, f"{STATE}: shape [0]"),
        ({STATE: np.float64(1)}, f"{STATE}: shape []"),
        ({STATE: np.array([np.nan] + [0] * 7)}, f"{STATE}[0]: not a finite number"),
        ({STATE: np.array([0] * 7 + [np.inf])}, f"{STATE}[7]: not a finite number"),
        ({STATE: np.zeros(8, bool)}, f"{STATE}: dtype bool"),
        ({STATE: np.zeros(8, complex)}, f"{STATE}: dtype complex128"),
        ({STATE: ["a"] * 8}, f"{STATE}: dtype"),
        ({STATE: None}, f"{STATE}: dtype object"),
        ({"prompt": 3}, "prompt: expected a str, got int"),
        ({"prompt": None}, "prompt: expected a str, got NoneType"),
        ({"prompt": np.array(["a"])}, "prompt: expected a str, got ndarray"),
        ({"prompt": b"\xff"}, "prompt: not valid UTF-8"),
        ({"prompt": "\ud800"}, "prompt: not valid UTF-8"),
        ({"prompt": "x" * (2 << 20)}, "prompt: 2097152 bytes"),
        ({"tokens": np.array([1, 2])}, "tokens: given together with a prompt"),
        ({3: 4}, "key 3 is not a str"),
        ({"observation": {"image": np.zeros((64, 64, 3), np.uint8)}}, f"{IMAGE}: given twice"),
    ],
)
def test_wrong_fields_are_named(libero, obs, change, words):
    with pytest.raises(servoflow.InvalidInput) as raised:
        libero.infer({**obs, **change})
    assert words in str(raised.value)
    assert isinstance(raised.value, ValueError)
    assert libero.infer(obs, steps=1)["servoflow"]["request"] == 0  # what failed did not count


@pytest.mark.parametrize("key", [IMAGE, "observation/wrist_image", STATE, "prompt"])
def test_missing_fields_are_named(libero, obs, key):
    del obs[key]
    with pytest.raises(servoflow.InvalidInput, match=f"{key}.*missing"):
        libero.infer(obs)


def test_what_is_no_observation(libero):
    for value in (None, [], "x", 3, np.zeros(3)):
        with pytest.raises(servoflow.InvalidInput, match="observation: expected a dict"):
            libero.infer(value)
    nested = current = {}
    for _ in range(5000):
        current["a"] = current = {}
    with pytest.raises(servoflow.InvalidInput, match="nested deeper"):
        libero.infer(nested)


def test_unknown_keys_are_ignored(libero, obs):
    expected = libero.infer(obs)["actions"]
    libero.reset()
    more = {**obs, "timestamp": 3, "observation/exterior_image_2_left": None, "extra": {"nested": object()}}
    np.testing.assert_array_equal(libero.infer(more)["actions"], expected)


@pytest.mark.parametrize(
    ("noise", "words"),
    [
        (np.zeros((9, 32)), "noise: float64 [9, 32]"),
        (np.zeros(320), "noise: float64 [320]"),
        (np.zeros((2, 10, 32)), "noise: float64 [2, 10, 32]"),
        (np.zeros((10, 32), int), "noise: int64"),
        (np.full((10, 32), np.nan), "noise: holds a value"),
        (np.full((10, 32), 1e300), "noise: holds a value"),
        ("noise", "noise: <U5"),
        (object(), "noise: object"),
    ],
)
def test_wrong_noise(libero, obs, noise, words):
    with pytest.raises(servoflow.InvalidInput) as raised:
        libero.infer(obs, noise=noise)
    assert words in str(raised.value)


@pytest.mark.parametrize("steps", [0, -1, 51, 2**70, 1.5, "3"])
def test_wrong_steps(libero, obs, steps):
    with pytest.raises(servoflow.InvalidInput, match="steps"):
        libero.infer(obs, steps=steps)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"checkpoint": "nowhere/at/all"}, "nowhere/at/all"),
        ({"checkpoint": 3}, "checkpoint: expected a path"),
        ({"checkpoint": "a\0b"}, "checkpoint: a path cannot hold"),
        ({"checkpoint": b"bytes"}, "checkpoint: expected a path"),
        ({"robot": "dishwasher"}, "dishwasher"),
        ({"device": "tpu"}, "tpu"),
        ({"device": None}, "device: expected a str"),
        ({"precision": "fp7"}, "fp7"),
        ({"threads": -1}, "threads: -1"),
        ({"threads": 2**40}, "threads"),
        ({"threads": "2"}, "threads: expected a whole number"),
        ({"max_batch": 0}, "max_batch: 0"),
        ({"seed": -1}, "seed: -1"),
        ({"seed": 2**64}, "seed"),
        ({"tokenizer": "nowhere.model"}, "nowhere.model"),
        ({"assets": "nothing"}, "nothing"),
        ({"progress": 3}, "progress: is not callable"),
        ({"metadata": 3}, "metadata: expected a dict"),
    ],
)
def test_wrong_ways_to_open(options, words):
    with pytest.raises(servoflow.InvalidInput) as raised:
        servoflow.Policy.open(
            **{"checkpoint": OPENPI, "device": "cpu", "robot": "libero", **options},
        )
    assert words in str(raised.value)


def test_a_missing_device_is_a_runtime_failure():
    with pytest.raises((servoflow.RuntimeFailure, servoflow.InvalidInput), match="cuda"):
        servoflow.Policy.open(OPENPI, device="cuda:99")


def test_wrong_batches(libero_policy, libero, obs):
    other = libero_policy.new_session()
    for sessions, observations, words in (
        ([], [], "0 sessions"),
        ([libero], [], "1 sessions and 0"),
        ([libero, libero], [obs, obs], "once"),
        ([libero, None], [obs, obs], "request 1: expected a Session"),
        ([libero, other], [obs, {}], "request 1"),
        ([libero_policy.new_session() for _ in range(4)], [obs] * 4, "batch"),
    ):
        with pytest.raises(servoflow.InvalidInput, match=words):
            servoflow.infer_batch(sessions, observations)
    foreign = servoflow.Policy.open(
        OPENPI, device="cpu", precision="fp32", robot="libero", max_batch=2
    ).new_session()
    with pytest.raises(servoflow.InvalidInput, match="one policy"):
        servoflow.infer_batch([libero, foreign], [obs, obs])
    assert libero.infer(obs, steps=1)["servoflow"]["request"] == 0


def test_the_extension_checks_its_arguments_too(libero, obs):
    from servoflow import _core

    with pytest.raises(TypeError):
        _core.Session()
    with pytest.raises(TypeError):
        _core.Policy.open(1)
    state = np.zeros(8)
    flat = np.zeros(12, np.uint8)
    for images in (
        [(IMAGE, 0, flat)],
        [(IMAGE, 7, flat.reshape(2, 2, 3))],
        [(IMAGE, -1, flat.reshape(2, 2, 3))],
    ):
        with pytest.raises(servoflow.InvalidInput, match=IMAGE):
            libero._core.infer(images, state, "go", None, 0, None)
    with pytest.raises(TypeError):
        libero._core.infer([(IMAGE, 0, "x")], state, "go", None, 0, None)
    with pytest.raises((TypeError, RuntimeError)):
        libero._core.infer([], state, 3, None, 0, None)


def test_handles_cannot_be_copied_or_pickled(libero, libero_policy):
    for handle in (libero._core, libero_policy._core):
        with pytest.raises(TypeError):
            copy.deepcopy(handle)
        with pytest.raises(TypeError):
            pickle.dumps(handle)


def random_value(rng):
    """Something that a careless or hostile client might send."""
    dtypes = [np.uint8, np.int8, np.uint16, np.int64, np.float16, np.float32, np.float64, bool, complex, object, "<U3", "V4",
              "S2", "M8[s]", ">f4", ">f8"]  # fmt: skip
    shape = tuple(int(rng.choice([0, 1, 3, 8, 17])) for _ in range(rng.integers(0, 5)))
    array = np.zeros(shape, dtypes[rng.integers(len(dtypes))])
    if array.dtype.kind == "f" and array.size:
        array.flat[rng.integers(array.size)] = rng.choice([0.5, -1.0, np.nan, np.inf, 1e30])
    if array.ndim and rng.random() < 0.3:
        array = array[..., ::-1].T
    others = [None, "text", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", [], {}, {"a": array}, [array], 2**100, float("nan"), set(), memoryview(b"xy"),
              lambda: 0, np.float32(1)]  # fmt: skip
    return array if rng.random() < 0.6 else others[rng.integers(len(others))]


def test_random_values_give_an_answer_or_a_reason(libero_policy, obs):
    rng = np.random.default_rng(0)
    session = libero_policy.new_session()
    answers = 0
    for _ in range(600):
        change = {key: random_value(rng) for key in (*obs, "tokens", "extra") if rng.random() < 0.3}
        noise = random_value(rng) if rng.random() < 0.1 else None
        try:
            result = session.infer({**obs, **change}, noise=noise, steps=1)
        except servoflow.InvalidInput as error:
            assert str(error)
        else:
            assert np.isfinite(result["actions"]).all()
            answers += 1
    assert 20 < answers < 300
