"""The training's parts on a CPU: what it feeds the network is what the engine will, and what it exports is what it trained."""

from __future__ import annotations

import json
import pathlib

import numpy as np
import pytest
import safetensors.torch
import torch

from servoflow_eval.metaworld import TASKS
from servoflow_train import config, export, learner, model, text

ROOT = pathlib.Path(__file__).resolve().parents[2]
NANO = ROOT / "models" / "metaworld-nano"


def test_tokens_put_together_on_the_device_are_the_tokenizers() -> None:
    tokenizer = text.Tokenizer.read(NANO / "tokenizer.model")
    assert tokenizer.model == text.train_tokenizer(), "the shipped vocabulary is the one that training makes"
    prompts = learner.Prompts(tokenizer, torch.device("cpu"))
    rng = np.random.default_rng(0)
    sentences = text.all_prompts()
    for _ in range(300):
        k = int(rng.integers(len(sentences)))
        state = rng.uniform((-0.6, 0.3, -0.05, 0.0), (0.6, 1.05, 0.5, 1.0)).astype(np.float32)
        ids, valid = prompts.tokens(torch.tensor([k]), torch.from_numpy(state)[None])
        assert ids[0][valid[0]].tolist() == tokenizer.encode(sentences[k][1], state)
    assert [sentences[int(k)][0] for k in prompts.first] == list(TASKS)


def test_draws_and_padding_do_not_matter() -> None:
    torch.manual_seed(0)
    policy = model.Policy(model.Sizes(depth=2, vision_depth=1)).eval()
    pixels, tokens = torch.rand(2, 3, 128, 128, 3) * 2 - 1, torch.randint(4, 500, (2, 32))
    valid = torch.arange(32)[None] < torch.tensor([20, 31])[:, None]
    x, t = torch.randn(2, 4, 16, 8), torch.rand(2, 4)
    prefix, _ = policy.prefix(pixels, tokens, valid)
    whole = policy.velocity(prefix, x, t)
    torch.testing.assert_close(
        policy.velocity(prefix, x[:, 1:2], t[:, 1:2]), whole[:, 1:2], rtol=0, atol=1e-5
    )
    other, _ = policy.prefix(pixels, torch.where(valid, tokens, 7), valid)
    assert torch.equal(policy.velocity(other, x, t), whole)
    assert not torch.allclose(policy.velocity(prefix, x, t.flip(1)), whole, atol=1e-2)


def test_exported_weights_come_back(tmp_path: pathlib.Path) -> None:
    policy, tokenizer = export.load_checkpoint(NANO)
    assert policy.exported_parameters() == 8263624
    export.export_checkpoint(policy, tokenizer.model, tmp_path)
    # BF16 values survive BF16: the same tensors, bit for bit.
    one, two = (safetensors.torch.load_file(p / "model.safetensors") for p in (NANO, tmp_path))
    assert one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)
    assert json.loads((tmp_path / "config.json").read_text()) == json.loads(
        (NANO / "config.json").read_text()
    )
    stored = dict(one)
    stored.pop("action_in_proj.bias")
    safetensors.torch.save_file(stored, str(tmp_path / "model.safetensors"))
    with pytest.raises(ValueError, match="action_in_proj.bias"):
        export.load_checkpoint(tmp_path)


def test_the_shipped_policy_acts_as_its_cases_say() -> None:
    """The network as training runs it, float32, against the cases that the engine is held to, float64."""
    policy, tokenizer = export.load_checkpoint(NANO)
    for path in sorted((NANO / "cases").glob("*.safetensors")):
        case = safetensors.torch.load_file(str(path))
        pictures = torch.stack([case[f"input/image/{slot}"] for slot in export.SLOTS])
        tokens = case["expect/tokens"][case["expect/token_mask"]].long()
        with safetensors.safe_open(str(path), "pt") as file:
            assert tokens.tolist() == tokenizer.encode(file.metadata()["prompt"], case["input/state"].numpy())
        valid = torch.ones(1, len(tokens), dtype=torch.bool)
        actions = policy.act(
            learner.to_pixels(pictures)[None], tokens[None], valid, case["input/noise"][None]
        )
        torch.testing.assert_close(actions[0], case["expect/actions_normalized"], rtol=0, atol=2e-5)


def test_store_makes_room_for_new_samples() -> None:
    store = learner.Store(10, 4, torch.device("cpu"))
    assert store.places(12) == [*range(10), 4, 5]
    assert store.places(6) == [6, 7, 8, 9, 4, 5]


def test_evaluation_scenes_are_shared_out() -> None:
    plan = learner.evaluation_plan(25, 20)
    for task in range(len(TASKS)):
        scenes = sorted(s for slot, mine in plan.items() if slot % len(TASKS) == task for s in mine)
        assert scenes == [10 * k for k in range(20)]
    with pytest.raises(ValueError, match="no slot"):
        learner.evaluation_plan(9, 1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("sed = 1", "sed: no such setting"),
        ("[data]\nworkers = -1", "data.workers: expected a number of at least 0"),
        ("[data]\nworkers = 1.5", "data.workers: expected a whole number"),
        ("[optimiser]\nshift_pixels = [1]", "optimiser.shift_pixels: expected 3"),
        ("[optimiser]\ncompile = 1", "optimiser.compile: expected a bool"),
        ("data = 3", "data: expected a table"),
        ("[data", "bad.toml"),
    ],
)
def test_bad_settings_are_named(tmp_path: pathlib.Path, settings: str, message: str) -> None:
    path = tmp_path / "bad.toml"
    path.write_text(settings)
    with pytest.raises(ValueError, match=message.replace("[", "\\[")):
        config.read_config(path)


@pytest.mark.parametrize("name", ["nano", "smoke", "anneal", "repair"])
def test_shipped_settings_are_read(name: str) -> None:
    config.read_config(ROOT / "training" / "configs" / f"{name}.toml")
