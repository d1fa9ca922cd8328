"""The same bits as the command line, however the inputs come; sessions, batches, threads."""

import os
import threading
import time

from conftest import LEROBOT, OPENPI, REQUESTS, ROOT, frame, observation, shared
import numpy as np
import pytest

import servoflow


def answer(case, convert=frame, **options):
    request, session, _ = case
    session.reset()
    return session.infer(observation(request, session, convert), **options)


def test_gives_the_bits_of_the_command_line(case):
    result = answer(case)
    assert result["actions"].dtype == np.float64
    np.testing.assert_array_equal(result["actions"], case[2], strict=True)


def test_gives_the_bits_of_the_command_line_in_bf16(binary):
    request = REQUESTS[0]
    policy = servoflow.Policy.open(
        ROOT / request["checkpoint"], device="cpu", precision="bf16", robot="libero", seed=request["seed"]
    )
    result = policy.infer(observation(request, policy.new_session()))
    assert result["servoflow"]["precision"] == "bf16"
    expected = np.array(shared.run_command(binary, request, "bf16")["actions"])
    np.testing.assert_array_equal(result["actions"], expected)


def test_without_a_robot(libero_policy):
    session = libero_policy.new_session(robot="none")
    image = frame("examples/frames/base.png")
    result = session.infer({"base_0_rgb": image, "tokens": [2, 5, 9]})
    assert result["actions"].shape == (10, 32)
    session.reset()
    again = session.infer({"base_0_rgb": image, "tokens": np.array([2, 5, 9], np.uint8)})
    np.testing.assert_array_equal(again["actions"], result["actions"])
    for tokens in ([2.0], [[2]], [-1], [2**31], [1023, 1024], "2"):
        with pytest.raises(servoflow.InvalidInput, match="tokens"):
            session.infer({"base_0_rgb": image, "tokens": tokens})


def test_picture_files_give_the_same_bits(case):
    for kind in (bytes, bytearray, memoryview):
        result = answer(case, lambda file, kind=kind: kind((ROOT / file).read_bytes()))
        np.testing.assert_array_equal(result["actions"], case[2])


class Dlpack:
    """Another library's array: DLPack and nothing else."""

    def __init__(self, array):
        self.array = array

    def __dlpack__(self, **options):
        return self.array.__dlpack__(**options)

    def __dlpack_device__(self):
        return self.array.__dlpack_device__()


class Protocol:
    """Another library's array: NumPy's array protocol and nothing else."""

    def __init__(self, array):
        self.array = array

    def __array__(self, dtype=None, copy=None):
        return np.asarray(self.array, dtype)


def read_only(array):
    array = array.copy()
    array.setflags(write=False)
    return array


@pytest.mark.parametrize(
    "convert",
    [
        lambda a: a.transpose(2, 0, 1).copy(),
        lambda a: a.transpose(2, 0, 1),
        lambda a: np.asfortranarray(a),
        lambda a: a[::-1, ::-1].copy()[::-1, ::-1],
        lambda a: np.dstack([a, a])[:, :, :3],
        read_only,
        lambda a: Dlpack(a.copy()),
        Protocol,
        lambda a: memoryview(a.copy()).obj,
    ],
    ids=[
        "chw",
        "transposed",
        "fortran",
        "flipped",
        "sliced",
        "read-only",
        "dlpack",
        "array-protocol",
        "buffer",
    ],
)
def test_layouts_and_owners_give_the_same_bits(case, convert):
    np.testing.assert_array_equal(answer(case, lambda f: convert(frame(f)))["actions"], case[2])


def test_contiguous_frames_are_not_copied(libero):
    from servoflow import _observation

    array = frame("examples/frames/base.png").copy()
    for value in (array, array.transpose(2, 0, 1).copy(), Dlpack(array)):
        base = value.array if isinstance(value, Dlpack) else value
        _, pixels = _observation.to_pixels(value, "image", False)
        assert np.shares_memory(pixels, base)
    data = (ROOT / "examples/frames/base.png").read_bytes()
    assert np.shares_memory(_observation.to_pixels(data, "image", False)[1], np.frombuffer(data, np.uint8))


def test_floats_are_converted_as_openpi_does(libero, obs):
    rng = np.random.default_rng(0)
    for dtype in (np.float32, np.float64, np.float16):
        floats = rng.random((50, 60, 3)).astype(dtype)
        libero.reset()
        expected = libero.infer({**obs, "observation/image": (255 * floats).astype(np.uint8)})["actions"]
        libero.reset()
        got = libero.infer({**obs, "observation/image": floats.transpose(2, 0, 1)})["actions"]
        np.testing.assert_array_equal(got, expected)


def test_lerobots_floats_are_the_cameras_bytes():
    session = servoflow.Policy.open(LEROBOT, device="cpu", precision="fp32").new_session()
    every = np.arange(256, dtype=np.uint8).repeat(3 * 4).reshape(32, 32, 3)
    obs = {"observation.state": np.zeros(8), "task": "push", "observation.images.top": every}
    expected = session.infer(obs)["actions"]
    session.reset()
    floats = every.transpose(2, 0, 1).astype(np.float32) / 255
    np.testing.assert_array_equal(
        session.infer({**obs, "observation.images.top": floats})["actions"], expected
    )
    with pytest.raises(servoflow.InvalidInput, match="no byte / 255"):
        session.infer({**obs, "observation.images.top": floats * np.float32(0.999)})


def test_nested_and_flat_keys_are_the_same(libero, obs):
    flat = libero.infer(obs)["actions"]
    libero.reset()
    nested = {
        "observation": {key.split("/")[1]: obs[key] for key in obs if "/" in key},
        "prompt": obs["prompt"],
    }
    np.testing.assert_array_equal(libero.infer(nested)["actions"], flat)


def test_prompts_of_other_types(libero, obs):
    expected = libero.infer(obs)["actions"]
    for prompt in (np.array("open the drawer"), np.str_("open the drawer"), b"open the drawer"):
        libero.reset()
        np.testing.assert_array_equal(libero.infer({**obs, "prompt": prompt})["actions"], expected)


def test_droids_scalar_gripper():
    session = servoflow.Policy.open(OPENPI, device="cpu", precision="fp32", robot="droid").new_session()
    image = frame("examples/frames/base.png")
    obs = {"observation/exterior_image_1_left": image, "observation/wrist_image_left": image, "prompt": "go"}
    obs["observation/joint_position"] = np.zeros(7, np.float32)
    first = session.infer({**obs, "observation/gripper_position": np.array([0.5])})["actions"]
    assert first.shape == (10, 8)
    for gripper in (0.5, np.float32(0.5), np.array(0.5), [0.5]):
        session.reset()
        result = session.infer({**obs, "observation/gripper_position": gripper})
        np.testing.assert_array_equal(result["actions"], first)


def test_aloha_takes_its_nested_cameras(aloha_checkpoint):
    session = servoflow.Policy.open(
        aloha_checkpoint, device="cpu", precision="fp32", robot="aloha"
    ).new_session()
    image = frame("examples/frames/base.png").transpose(2, 0, 1)
    obs = {"images": {"cam_high": image, "cam_low": image}, "state": np.zeros(14), "prompt": "go"}
    assert session.infer(obs)["actions"].shape == (8, 14)
    with pytest.raises(servoflow.InvalidInput, match="images/cam_hihg: robot aloha has no such camera"):
        session.infer({**obs, "images": {"cam_high": image, "cam_hihg": image}})


def test_noise_seeds_requests_and_reset(libero_policy, obs):
    session, other = libero_policy.new_session(seed=7), libero_policy.new_session(seed=8)
    first, second = session.infer(obs), session.infer(obs)
    assert first["servoflow"]["request"] == 0 and second["servoflow"]["request"] == 1
    assert not np.array_equal(first["actions"], second["actions"])
    assert not np.array_equal(first["actions"], other.infer(obs)["actions"])
    session.reset()
    np.testing.assert_array_equal(session.infer(obs)["actions"], first["actions"])

    noise = np.random.default_rng(0).standard_normal((10, 32))
    given = session.infer(obs, noise=noise)
    for same in (noise.astype(np.float32), noise[None], np.asfortranarray(noise), noise.tolist()):
        np.testing.assert_array_equal(session.infer(obs, noise=same)["actions"], given["actions"])
    assert not np.array_equal(session.infer(obs, noise=noise, steps=3)["actions"], given["actions"])


def test_what_comes_back(libero, obs):
    result = libero.infer(obs)
    assert set(result) == {"actions", "policy_timing", "servoflow"}
    assert result["actions"].shape == (10, 7)
    assert result["policy_timing"]["infer_ms"] > 0
    ran = result["servoflow"]
    assert ran["normalized"].shape == (10, 32) and ran["normalized"].dtype == np.float32
    assert ran["contract_hash"] == libero.contract_hash
    assert ran["device"] == libero.device == "cpu"
    kept = result["actions"].copy()
    libero.infer(obs)
    np.testing.assert_array_equal(result["actions"], kept)  # it owns its memory
    result["actions"][0] = 0


def test_a_batch_gives_the_bits_of_single_calls(libero_policy, obs):
    others = [{**obs, "prompt": prompt} for prompt in ("push", "put the book away")] + [obs]
    sessions = [libero_policy.new_session(seed=i) for i in range(3)]
    alone = [s.infer(o)["actions"] for s, o in zip(sessions, others)]
    for s in sessions:
        s.reset()
    for one, result in zip(alone, servoflow.infer_batch(sessions, others)):
        np.testing.assert_array_equal(result["actions"], one)
    noise = np.zeros((3, 10, 32), np.float32)
    for result, s, o in zip(servoflow.infer_batch(sessions, others, noise=noise, steps=2), sessions, others):
        np.testing.assert_array_equal(result["actions"], s.infer(o, noise=noise[0], steps=2)["actions"])


def test_other_threads_run_while_it_infers(libero, obs):
    stamps, stop = [], threading.Event()

    def tick():
        while not stop.is_set():
            stamps.append(time.perf_counter())
            time.sleep(0.0005)

    thread = threading.Thread(target=tick)
    thread.start()
    try:
        libero.infer(obs)
        stamps.clear()
        begin = time.perf_counter()
        milliseconds = libero.infer(obs, steps=50)["policy_timing"]["infer_ms"]
        end = time.perf_counter()
    finally:
        stop.set()
        thread.join()
    inside = [begin, *(s for s in stamps if begin < s < end), end]
    longest = max(b - a for a, b in zip(inside, inside[1:])) * 1e3
    assert longest < 0.6 * milliseconds, f"{longest} ms without a Python instruction of {milliseconds}"


def test_threads_may_share_a_session(libero, obs):
    expected = {libero.infer(obs, steps=1)["actions"].tobytes() for _ in range(8)}
    libero.reset()
    got = []
    threads = [
        threading.Thread(
            target=lambda: got.extend(libero.infer(obs, steps=1)["actions"].tobytes() for _ in range(2))
        )
        for _ in range(4)
    ]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert set(got) == expected and len(got) == 8


def test_opening_tells_its_progress_and_raises_what_that_raises():
    seen = []
    servoflow.Policy.open(OPENPI, device="cpu", progress=lambda done, total: seen.append((done, total)))
    assert seen and seen[-1][0] == seen[-1][1]

    def stop(done, total):
        raise KeyError("enough")

    with pytest.raises(KeyError, match="enough"):
        servoflow.Policy.open(OPENPI, device="cpu", progress=stop)


def test_a_policy_can_be_closed(obs):
    with servoflow.Policy.open(OPENPI, device="cpu", robot="libero") as policy:
        session = policy.new_session()
        policy.infer(obs, steps=1)
    for call in (lambda: policy.infer(obs), policy.reset, policy.new_session, lambda: policy.info):
        with pytest.raises(servoflow.Error, match="closed"):
            call()
    policy.close()
    session.infer(obs, steps=1)  # a session keeps what it needs


def test_a_forked_process_is_told_to_open_its_own(libero, libero_policy, obs):
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        said = []
        for call in (lambda: libero.infer(obs), libero_policy.new_session):
            try:
                call()
            except servoflow.Error as error:
                said.append(str(error))
        os.write(write, "|".join(said).encode())
        os._exit(0)
    os.waitpid(pid, 0)
    os.close(write)
    said = os.read(read, 1000).decode().split("|")
    os.close(read)
    assert len(said) == 2 and all("another process" in s for s in said)


def test_describes_a_checkpoint_without_its_weights(libero):
    facts = servoflow.describe(OPENPI, robot="libero")
    assert facts["layout"] == "openpi" and facts["horizon"] == 10 and facts["default_steps"] == 10
    assert {part["component"] for part in facts["components"]} >= {"vision", "expert"}
    assert all(part["precision"] == "fp32" and part["layers"] > 0 for part in facts["components"])
    assert facts["contract_json"] == libero.contract_json and facts["contract_hash"] == libero.contract_hash
    assert servoflow.describe(LEROBOT)["layout"] == "lerobot"
