"""`Policy` where openpi's Policy stands, with openpi's own client package around it."""

from conftest import OPENPI
import numpy as np
from openpi_client import action_chunk_broker

import servoflow


def test_has_what_openpis_server_asks_of_a_policy(libero_policy, obs):
    libero_policy.reset()
    first = libero_policy.infer(obs)
    again = libero_policy.infer(obs, noise=np.zeros((10, 32), np.float32))
    assert first["actions"].shape == again["actions"].shape == (10, 7)
    assert first["policy_timing"]["infer_ms"] > 0
    libero_policy.reset()
    np.testing.assert_array_equal(libero_policy.infer(obs)["actions"], first["actions"])


def test_the_metadata_tell_what_runs(libero):
    policy = servoflow.Policy.open(
        OPENPI,
        device="cpu",
        robot="libero",
        metadata={"reset_pose": [0, -1.5, 1.5, 0, 0, 0], "robot": "mine"},
    )
    metadata = policy.metadata
    assert metadata["reset_pose"] == [0, -1.5, 1.5, 0, 0, 0]
    assert metadata["robot"] == "mine"  # what the user says wins
    assert metadata["contract_hash"] == libero.contract_hash
    assert metadata["version"] == servoflow.__version__
    metadata.clear()
    assert policy.metadata


def test_openpis_chunk_broker_hands_out_one_action_at_a_time(libero_policy, obs):
    libero_policy.reset()
    chunks = [libero_policy.infer(obs)["actions"] for _ in range(2)]
    broker = action_chunk_broker.ActionChunkBroker(libero_policy, action_horizon=4)
    broker.reset()
    for chunk in chunks:
        for step in range(4):
            np.testing.assert_array_equal(broker.infer(obs)["actions"], chunk[step])
    broker.reset()
    np.testing.assert_array_equal(broker.infer(obs)["actions"], chunks[0][0])
