"""Writes a policy as an openpi checkpoint directory that the engine opens, and reads such a directory back.

config.json carries `architecture`, since these sizes have no name; assets/metaworld/norm_stats.json the bounds of state and
actions; tokenizer.model the vocabulary; cases/ what this PyTorch network computes, for `servoflow verify DIRECTORY`.
"""

from __future__ import annotations

import json
import os
import pathlib
from typing import Any

import numpy as np
import numpy.typing as npt
import safetensors
import safetensors.torch
import torch
from torch import Tensor

from servoflow_eval.metaworld import CAMERAS, MetaWorldEnv

from .model import Policy, Sizes, time_grid
from .text import STATE_HIGH, STATE_LOW, Tokenizer

ASSET = "metaworld"
SLOTS = ("base_0_rgb", "left_wrist_0_rgb", "right_wrist_0_rgb")
ROBOT_ACTIONS = 4
MAX_TOKENS = 64

_PALI = "paligemma_with_expert.paligemma."
_VISION = _PALI + "model.vision_tower.vision_model."
_LANGUAGE = _PALI + "model.language_model."
_EXPERT = "paligemma_with_expert.gemma_expert.model."
_TABLE = _PALI + "lm_head.weight"


def openpi_name(name: str) -> str:
    """A parameter's name in openpi's checkpoints."""
    if name == "embed_tokens":
        return _TABLE
    first, _, rest = name.partition(".")
    if first == "vision":
        if rest.startswith("projector."):
            return _PALI + "model.multi_modal_projector.linear." + rest.removeprefix("projector.")
        if rest.startswith("layers."):
            _, index, part = rest.split(".", 2)
            group = {
                "q_proj": "self_attn.",
                "k_proj": "self_attn.",
                "v_proj": "self_attn.",
                "out_proj": "self_attn.",
            }
            inner = group.get(part.split(".")[0], "mlp." if part.startswith("fc") else "")
            return f"{_VISION}encoder.layers.{index}.{inner}{part}"
        if rest == "position_embedding":
            return _VISION + "embeddings.position_embedding.weight"
        if rest.startswith("patch_embedding."):
            return _VISION + "embeddings." + rest
        return _VISION + rest
    for prefix, base in (("prefix_", _LANGUAGE), ("expert_", _EXPERT)):
        if name.startswith(prefix):
            return base + name.removeprefix(prefix)
    return name


def exported(policy: Policy) -> dict[str, Tensor]:
    """Parameters of the network by our names, without the localisation heads."""
    return {name: p.detach() for name, p in policy.named_parameters() if not name.startswith("locate.")}


def norm_stats() -> dict[str, Any]:
    """openpi's statistics: the fixed bounds stand where quantiles stand, so that both sides normalise alike."""

    def entry(low: npt.ArrayLike, high: npt.ArrayLike) -> dict[str, list[float]]:
        low, high = np.asarray(low, np.float64), np.asarray(high, np.float64)
        columns = {"mean": (low + high) / 2, "std": (high - low) / 12**0.5, "q01": low, "q99": high}
        return {key: [float(v) for v in values] for key, values in columns.items()}

    ones = np.ones(ROBOT_ACTIONS)
    return {"norm_stats": {"state": entry(STATE_LOW, STATE_HIGH), "actions": entry(-ones, ones)}}


def _write(path: pathlib.Path, text: str) -> None:
    temporary = path.with_name(path.name + ".new")
    temporary.write_text(text)
    temporary.replace(path)


def export_checkpoint(
    policy: Policy, tokenizer: bytes, folder: pathlib.Path, *, dtype: torch.dtype = torch.bfloat16
) -> None:
    """Writes the directory; files that are already there and not of this list stay."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "assets" / ASSET).mkdir(parents=True, exist_ok=True)
    tensors = {openpi_name(k): v.to("cpu", dtype).contiguous() for k, v in exported(policy).items()}
    assert len(tensors) == len(exported(policy)), "two parameters have one name"
    temporary = folder / "model.safetensors.new"
    safetensors.torch.save_file(tensors, str(temporary), metadata={"format": "pt"})
    os.replace(temporary, folder / "model.safetensors")
    config = {
        "action_dim": policy.s.action_dim,
        "action_horizon": policy.s.horizon,
        "paligemma_variant": "gemma_2b",
        "action_expert_variant": "gemma_300m",
        "precision": "bfloat16" if dtype == torch.bfloat16 else "float32",
        "architecture": policy.s.architecture(),
    }
    _write(folder / "config.json", json.dumps(config, indent=2) + "\n")
    _write(folder / "assets" / ASSET / "norm_stats.json", json.dumps(norm_stats(), indent=2) + "\n")
    (folder / "tokenizer.model").write_bytes(tokenizer)


def load_checkpoint(folder: pathlib.Path, sizes: Sizes | None = None) -> tuple[Policy, Tokenizer]:
    """The exported network in float32, and its tokenizer. Raises ValueError where a tensor is missing or too many."""
    config = json.loads((folder / "config.json").read_text())
    policy = Policy(sizes or Sizes(action_dim=config["action_dim"], horizon=config["action_horizon"]))
    if policy.s.architecture() != config["architecture"]:
        raise ValueError(f"{folder}/config.json: `architecture` is not the one that this training makes")
    stored = safetensors.torch.load_file(str(folder / "model.safetensors"))
    with torch.no_grad():
        for name, parameter in exported(policy).items():
            try:
                parameter.copy_(stored.pop(openpi_name(name)).float())
            except KeyError:
                raise ValueError(f"{folder}/model.safetensors: no tensor {openpi_name(name)}") from None
    if stored:
        raise ValueError(f"{folder}/model.safetensors: unknown tensors: {', '.join(sorted(stored))}")
    return policy.eval(), Tokenizer.read(folder / "tokenizer.model")


# Recorded cases.

# Shares of the expectation's rms. The cases are computed in float64, so that the engine's distance is its own float32
# rounding: the shares are 5 to 13 times what it showed on them, which leaves no room for another formula.
TOLERANCES = {
    "fp32": {
        "state_normalized": {"max": 1e-6},
        "vision": {"max": 4e-5},
        "prefix/embeddings": {"max": 4e-5},
        "k": {"max": 2e-5},
        "v": {"max": 2e-5},
        "t": {"max": 0},
        "time": {"max": 1e-5},
        "velocity": {"max": 2e-5},
        "x": {"max": 1e-5},
        "actions_normalized": {"max": 5e-6},
        "actions": {"max": 5e-6},
    },
    "bf16": {"actions_normalized": {"rms": 0.05, "cosine": 0.998}},
}


@torch.no_grad()
def record_case(
    policy: Policy,
    tokenizer: Tokenizer,
    path: pathlib.Path,
    *,
    images: dict[str, npt.NDArray[np.uint8]],
    state: npt.NDArray[np.float32],
    prompt: str,
    noise: npt.NDArray[np.float32],
    steps: int = 10,
    layers: bool = False,
    about: str = "",
    contract: str = "",
) -> npt.NDArray[np.float64]:
    """Computes every stage of one inference in float64 and writes it as a case file. Returns the actions [horizon, 4]."""
    network = policy.double().eval()
    s = policy.s
    out: dict[str, npt.NDArray[Any]] = {}
    pixels = torch.from_numpy(np.stack([images[c] for c in CAMERAS])[None]).double() / 255.0 * 2.0 - 1.0
    ids = tokenizer.encode(prompt, state)
    if len(ids) > MAX_TOKENS:
        raise ValueError(f"prompt: {len(ids)} tokens, more than {MAX_TOKENS}: {prompt!r}")
    tokens = torch.tensor([ids])
    valid = torch.ones_like(tokens, dtype=torch.bool)
    embeddings, vision = network.embed_prefix(pixels, tokens)
    prefix, _ = network.prefix(pixels, tokens, valid)
    for k, slot in enumerate(SLOTS):
        out[f"expect/vision/{slot}"] = vision.view(len(SLOTS), s.image_tokens, -1)[k].float().numpy()
        out[f"input/image/{slot}"] = images[CAMERAS[k]]
    out["expect/prefix/embeddings"] = embeddings[0].float().numpy()
    if layers:
        for i in range(s.depth):
            out[f"expect/prefix/layer{i}/k"] = prefix.keys[i][0, 0].float().numpy()
            out[f"expect/prefix/layer{i}/v"] = prefix.values[i][0, 0].float().numpy()
    padded = np.zeros(MAX_TOKENS, np.int32)
    padded[: len(ids)] = ids
    out["expect/tokens"], out["expect/token_mask"] = padded, np.arange(MAX_TOKENS) < len(ids)
    low, high = np.asarray(STATE_LOW), np.asarray(STATE_HIGH)
    out["expect/state_normalized"] = (state.astype(np.float64) - low) / (high - low + 1e-6) * 2.0 - 1.0
    grid = time_grid(steps)
    out["expect/t"] = np.asarray(grid, np.float32)
    x = torch.from_numpy(noise)[None, None].double()
    for j, t in enumerate(grid):
        at = torch.full((1, 1), t, dtype=torch.float64)
        v = network.velocity(prefix, x, at)
        x = x - v / steps
        out[f"expect/time/{j}"] = network.time_condition(at)[0, 0].float().numpy()
        out[f"expect/step{j}/v"], out[f"expect/step{j}/x"] = v[0, 0].float().numpy(), x[0, 0].float().numpy()
    normalized = x[0, 0].numpy()
    out["expect/actions_normalized"] = normalized.astype(np.float32)
    actions = (normalized[:, :ROBOT_ACTIONS] + 1.0) / 2.0 * (2.0 + 1e-6) - 1.0
    out["expect/actions"] = actions
    out["input/noise"], out["input/state"] = noise, state
    metadata = {
        "format_version": "2",
        "format": "openpi",
        "robot": "none" if not contract else ASSET,
        "slots": " ".join(SLOTS),
        "image_mask": "1 1 1",
        "entry": "frames",
        "prompt": prompt,
        "prompt_mode": "state",
        "discrete_state_input": "true",
        "max_tokens": str(MAX_TOKENS),
        "steps": str(steps),
        "action_width": str(ROBOT_ACTIONS),
        "precision": "fp32",
        "bf16": "false",
        "tolerances": json.dumps(TOLERANCES),
        "about": about,
    }
    if contract:
        metadata["contract"] = contract
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".new")
    tensors = {k: torch.from_numpy(np.ascontiguousarray(v)) for k, v in sorted(out.items())}
    safetensors.torch.save_file(tensors, str(temporary), metadata=metadata)
    os.replace(temporary, path)
    policy.float()
    return actions


def record_cases(folder: pathlib.Path, tasks: list[str]) -> list[pathlib.Path]:
    """One case per task, of a scene and a noise that are always the same; the first with every layer's keys and values."""
    policy, tokenizer = load_checkpoint(folder)
    env = MetaWorldEnv()
    paths = []
    for k, task in enumerate(tasks):
        rng = np.random.default_rng(k)
        env.reset(task, k)
        for _ in range(20):
            env.step(env.expert_action())
        observation = env.observe()
        paths.append(folder / "cases" / f"{task}.safetensors")
        record_case(
            policy,
            tokenizer,
            paths[-1],
            images=observation["images"],
            state=observation["state"],
            prompt=observation["prompt"],
            noise=rng.standard_normal((policy.s.horizon, policy.s.action_dim)).astype(np.float32),
            layers=k == 0,
            about=f"{task}, evaluation scene {k} after 20 steps of the expert; PyTorch in float64",
        )
    env.close()
    return paths
