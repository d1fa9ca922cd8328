"""The learner: a GPU-resident store of samples, the training step, and the loop that trains while the crew simulates."""

from __future__ import annotations

import copy
import json
import math
import pathlib
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from servoflow_eval.metaworld import EVALUATION_SCENES, TASKS

from .config import Config
from .export import export_checkpoint, exported, load_checkpoint
from .model import Policy
from .text import BINS, STATE_DIMS, STATE_HIGH, STATE_LOW, Tokenizer, all_prompts, train_tokenizer
from .workers import HORIZON, PICTURE, SMALL, Crew, Initial, Note

# Hand, object and goal are learnt in units of 10 cm around the middle of the table.
CENTRE, UNIT = (0.0, 0.65, 0.1), 0.1
TEXT_TOKENS = 32  # with the image's 192 a multiple of 8, which the attention kernels want


class Store:
    """Samples on the device. Slots below `fixed` are kept; above, the oldest make room."""

    def __init__(self, capacity: int, fixed: int, device: torch.device) -> None:
        self.capacity, self.fixed = capacity, fixed
        self.count, self.added = 0, 0
        self.pictures = torch.zeros((capacity, *PICTURE), dtype=torch.uint8, device=device)
        self.small = torch.zeros((capacity, SMALL), device=device)
        self.task = torch.zeros(capacity, dtype=torch.long, device=device)

    def places(self, n: int) -> list[int]:
        """Where the next n samples go."""
        out = []
        for _ in range(n):
            if self.count < self.capacity:
                out.append(self.count)
                self.count += 1
            else:
                ring = self.capacity - self.fixed
                out.append(self.fixed + (self.added - self.capacity) % ring)
            self.added += 1
        return out


class Prompts:
    """Token ids put together on the device: sentence, state, tail."""

    def __init__(self, tokenizer: Tokenizer, device: torch.device) -> None:
        parts = tokenizer.parts()
        if parts.longest > TEXT_TOKENS:
            raise ValueError(f"the longest prompt has {parts.longest} tokens, more than {TEXT_TOKENS}")
        put: Callable[[npt.ArrayLike], Tensor] = lambda a: torch.as_tensor(np.asarray(a), device=device)
        self.heads, self.lengths = put(parts.heads), put(parts.lengths)
        self.numbers, self.tail, self.unknown = put(parts.numbers), put(parts.tail), parts.unknown
        self.low = torch.tensor(STATE_LOW, device=device, dtype=torch.float64)
        self.high = torch.tensor(STATE_HIGH, device=device, dtype=torch.float64)
        first: dict[str, int] = {}
        for k, (task, _) in enumerate(all_prompts()):
            first.setdefault(task, k)
        self.first = put([first[t] for t in TASKS])
        names = [task for task, _ in all_prompts()]
        self.per_task = put([names.count(t) for t in TASKS])

    def bins(self, state: Tensor) -> Tensor:
        normalized = (state.double() - self.low) / (self.high - self.low + 1e-6) * 2.0 - 1.0
        return torch.clamp(torch.floor((normalized + 1.0) * (BINS / 2)).long(), -1, BINS - 1)

    def tokens(self, prompt: Tensor, state: Tensor, dropped: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """prompt [b], state [b, 4], dropped [b] -> ids [b, 32], valid [b, 32]."""
        numbers = self.numbers[self.bins(state) + 1]
        if dropped is not None:
            numbers = torch.where(dropped[:, None], torch.full_like(numbers, self.unknown), numbers)
        length = self.lengths[prompt][:, None]
        at = torch.arange(TEXT_TOKENS, device=prompt.device)[None]
        tail = len(self.tail)
        head = F.pad(self.heads, (0, TEXT_TOKENS - self.heads.shape[1]))[prompt]
        number = numbers.gather(1, (at - length).clamp(0, STATE_DIMS - 1))
        rest = self.tail[(at - length - STATE_DIMS).clamp(0, tail - 1)]
        ids = torch.where(at < length, head, torch.where(at < length + STATE_DIMS, number, rest))
        valid = at < length + STATE_DIMS + tail
        return torch.where(valid, ids, torch.zeros_like(ids)), valid


def to_pixels(pictures: Tensor) -> Tensor:
    """uint8 -> what the tower sees, [-1, 1]."""
    return pictures.float() / 127.5 - 1.0


class Augmentation:
    """Colour per picture, noise per pixel, and a shift of the cameras that may be shifted."""

    def __init__(self, config: Config) -> None:
        self.o = config.optimiser

    def __call__(self, pictures: Tensor) -> Tensor:
        o = self.o
        x = pictures.to(torch.bfloat16 if pictures.is_cuda else torch.float32) / 127.5 - 1.0
        b = x.shape[0]
        parts = []
        for camera, reach in enumerate(o.shift_pixels):
            part = x[:, camera]
            if reach:
                size = part.shape[1]
                moved = F.pad(part.permute(0, 3, 1, 2), (reach,) * 4, mode="replicate").permute(0, 2, 3, 1)
                at = torch.arange(size, device=x.device)
                rows = at[None] + torch.randint(0, 2 * reach + 1, (b, 1), device=x.device)
                columns = at[None] + torch.randint(0, 2 * reach + 1, (b, 1), device=x.device)
                part = moved[
                    torch.arange(b, device=x.device)[:, None, None], rows[:, :, None], columns[:, None, :]
                ]
            parts.append(part)
        x = torch.stack(parts, 1)

        def draw(reach: float) -> Tensor:
            return ((torch.rand(b, x.shape[1], 1, 1, 3, device=x.device) * 2 - 1) * reach).to(x.dtype)

        x = x * (1 + draw(o.contrast)) + draw(o.brightness)
        return x + torch.randn_like(x) * (o.pixel_noise / 127.5)


class Learner:
    """Policy, its moving average, optimiser, store. `step` trains on one batch; `serve` answers the crew."""

    def __init__(self, config: Config, out: pathlib.Path, log: Callable[..., None]) -> None:
        self.config, self.out, self.log = config, out, log
        self.device = torch.device(config.device)
        torch.manual_seed(config.seed)
        self.tokenizer_bytes = train_tokenizer()
        self.tokenizer = Tokenizer(self.tokenizer_bytes)
        self.prompts = Prompts(self.tokenizer, self.device)
        self.policy = Policy(config.sizes)
        self._smooth_numbers()
        self.policy.to(self.device)
        self.average = copy.deepcopy(self.policy).eval().requires_grad_(False)
        o = config.optimiser
        matrices = [p for p in self.policy.parameters() if p.dim() > 1]
        others = [p for p in self.policy.parameters() if p.dim() <= 1]
        groups = [
            {"params": matrices, "weight_decay": o.weight_decay},
            {"params": others, "weight_decay": 0.0},
        ]
        self.optimiser = torch.optim.AdamW(
            groups, lr=o.learning_rate, betas=(0.9, 0.95), fused=self.device.type == "cuda"
        )
        self.store = Store(
            config.data.capacity, min(config.data.initial_samples, config.data.capacity // 2), self.device
        )
        self.augment = Augmentation(config)
        self.steps, self.seen = 0, 0
        self.since_start = 0  # of this process, for the warm-up after a resume
        self.loss_parts: Tensor | None = None
        no_goal = [t in ("faucet-open-v3", "faucet-close-v3") for t in TASKS]
        self.has_goal = torch.tensor([0.0 if n else 1.0 for n in no_goal], device=self.device)
        self.centre = torch.tensor(CENTRE, device=self.device)
        self.compiled: Callable[..., Any] = self._losses
        self.graph: Acting | None = None

    def _smooth_numbers(self) -> None:
        """Neighbouring bins begin with similar embeddings: waves over the bin, so that a value need not be learnt 256 times."""
        ids = torch.as_tensor(self.tokenizer.parts().numbers)
        width = self.policy.s.prefix_width
        k = torch.arange(-1, BINS).double()[:, None] / BINS
        period = 2.0 * (1.0 / 64) ** torch.linspace(0, 1, width // 2, dtype=torch.float64)
        wave = torch.cat([(2 * math.pi * k / period).sin(), (2 * math.pi * k / period).cos()], 1).float()
        with torch.no_grad():
            self.policy.embed_tokens[ids] = 0.5 * self.policy.embed_tokens[ids] + wave * 2**0.5 * width**-0.5

    # Training.

    def compile(self) -> None:
        """Has the training step compiled, on made-up data, so that the time is spent while the crew simulates.

        A batch that does not fit into the device's memory is halved until it does.
        """
        o = self.config.optimiser
        if o.compile:
            self.compiled = torch.compile(self._losses)
        while True:
            begin = time.time()
            try:
                self._rehearse(o.batch)
                break
            except torch.cuda.OutOfMemoryError:
                o.batch //= 2
                self.log("batch halved: out of memory", batch=o.batch)
                self.optimiser.zero_grad(set_to_none=True)
                torch.cuda.empty_cache()
                if o.batch < 32:
                    raise
        first = time.time() - begin
        begin = time.time()
        self._rehearse(o.batch)
        self.log(
            "rehearsed",
            compiled=o.compile,
            first_seconds=round(first, 1),
            step_seconds=round(time.time() - begin, 4),
        )

    def _rehearse(self, b: int) -> None:
        pictures = torch.randint(0, 256, (b, *PICTURE), dtype=torch.uint8, device=self.device)
        small = torch.rand(b, SMALL, device=self.device)
        task = torch.zeros(b, dtype=torch.long, device=self.device)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            total, _ = self.compiled(*self._inputs(pictures, small, task))
        total.backward()
        self.optimiser.zero_grad(set_to_none=True)
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def _inputs(self, pictures: Tensor, small: Tensor, task: Tensor) -> tuple[Tensor, ...]:
        o, b = self.config.optimiser, pictures.shape[0]
        state, chunk, truth = small[:, :4], small[:, 4 : 4 + HORIZON * 4], small[:, 4 + HORIZON * 4 :]
        state = state + torch.randn_like(state) * o.state_noise
        other = torch.rand(b, device=self.device) < o.other_sentences
        extra = (torch.rand(b, device=self.device) * self.prompts.per_task[task]).long()
        prompt = self.prompts.first[task] + torch.where(other, extra, torch.zeros_like(extra))
        tokens, valid = self.prompts.tokens(
            prompt, state, torch.rand(b, device=self.device) < o.state_dropped
        )
        actions = F.pad(chunk.reshape(b, HORIZON, 4), (0, self.policy.s.action_dim - 4))
        noise = torch.randn(b, o.draws, HORIZON, self.policy.s.action_dim, device=self.device)
        t = torch.rand(b, o.draws, device=self.device).pow(2 / 3) * 0.999 + 0.001  # Beta(1.5, 1)
        return (
            self.augment(pictures),
            tokens,
            valid,
            actions,
            noise,
            t,
            truth.reshape(b, 3, 3),
            self.has_goal[task],
        )

    def _losses(
        self,
        pixels: Tensor,
        tokens: Tensor,
        valid: Tensor,
        actions: Tensor,
        noise: Tensor,
        t: Tensor,
        truth: Tensor,
        has_goal: Tensor,
    ) -> tuple[Tensor, Tensor]:
        o = self.config.optimiser
        prefix, seen = self.policy.prefix(pixels, tokens, valid)
        at = t[..., None, None]
        mixed = at * noise + (1 - at) * actions[:, None]
        v = self.policy.velocity(prefix, mixed, t).float()
        error = (v - (noise - actions[:, None])).square()
        flow, padding = error[..., :4].mean(), error[..., 4:].mean()
        target = (truth - self.centre) / UNIT
        weight = torch.stack([torch.ones_like(has_goal), torch.ones_like(has_goal), has_goal], 1)[..., None]
        located, distances = [], []
        for locator, tokens_seen in zip(self.policy.locate, seen):
            guess = locator(tokens_seen)
            located.append((F.smooth_l1_loss(guess, target, beta=0.1, reduction="none") * weight).mean())
            distances.append((guess - target).detach().norm(dim=-1).mean(0) * (UNIT * 100))
        total = flow + o.padding_weight * padding + o.locate_weight * (located[0] + located[1])
        return total, torch.cat([torch.stack([flow.detach(), padding.detach()]), *distances])

    def rate(self, share: float) -> float:
        """The learning rate at a share of the training's time: warm-up by steps, then a cosine by the clock."""
        o = self.config.optimiser
        warm = min(1.0, (self.since_start + 1) / max(1, o.warmup_steps))
        return warm * (
            o.final_rate + (o.learning_rate - o.final_rate) * 0.5 * (1 + math.cos(math.pi * min(1.0, share)))
        )

    def step(self, share: float) -> None:
        """One batch."""
        o = self.config.optimiser
        pick = torch.randint(0, self.store.count, (o.batch,), device=self.device)
        inputs = self._inputs(self.store.pictures[pick], self.store.small[pick], self.store.task[pick])
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            total, parts = self.compiled(*inputs)
        total.backward()
        torch.nn.utils.clip_grad_norm_(self.policy.parameters(), o.clip)
        for group in self.optimiser.param_groups:
            group["lr"] = self.rate(share)
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        self.steps, self.since_start, self.seen = self.steps + 1, self.since_start + 1, self.seen + o.batch
        decay = min(o.ema, (1 + self.steps) / (10 + self.steps))
        with torch.no_grad():
            torch._foreach_lerp_(list(self.average.parameters()), list(self.policy.parameters()), 1 - decay)
        self.loss_parts = parts if self.loss_parts is None else self.loss_parts.lerp(parts, 0.02)

    def figures(self) -> dict[str, float]:
        """Losses, and how far off the localisation heads are on training batches, in cm."""
        if self.loss_parts is None:
            return {}
        values = [round(float(v), 5) for v in self.loss_parts.float().cpu()]
        names = ["flow", "padding"] + [
            f"{p}_{w}_cm" for p in ("vision", "middle") for w in ("hand", "object", "goal")
        ]
        return dict(zip(names, values))

    # Files.

    def save(self) -> None:
        """Weights in FP32 for going on, the moving average beside them, each file small; and the exported average."""
        state = {
            "steps": self.steps,
            "seen": self.seen,
            "config": self.config.as_dict(),
            "store": self.store.added,
        }
        folder = self.out / "resume"
        folder.mkdir(parents=True, exist_ok=True)
        for name, module in (("weights", self.policy), ("average", self.average)):
            for k, shard in enumerate(shards(module.state_dict())):
                write_tensors(folder / f"{name}-{k}.pt", shard)
        temporary = folder / "state.json.new"
        temporary.write_text(json.dumps(state, indent=1))
        temporary.replace(folder / "state.json")
        export_checkpoint(self.average, self.tokenizer_bytes, self.out / "checkpoint")

    def resume(self, folder: pathlib.Path) -> None:
        """Goes on from `save`'s files, or from an exported checkpoint, which has the average alone, in BF16.

        The optimiser's moments start anew, with a warm-up.
        """
        if (folder / "model.safetensors").exists():
            stored, _ = load_checkpoint(folder, self.policy.s)
            for module in (self.policy, self.average):
                module.load_state_dict(exported(stored), strict=False)
            self.log("resumed from the exported average", folder=str(folder))
            return
        state = json.loads((folder / "state.json").read_text())
        for name, module in (("weights", self.policy), ("average", self.average)):
            merged: dict[str, Tensor] = {}
            paths = sorted(folder.glob(f"{name}-*.pt"))
            if not paths and name == "average":
                self.average.load_state_dict(self.policy.state_dict())
                continue
            for path in paths:
                merged.update(torch.load(path, map_location=self.device, weights_only=True))
            module.load_state_dict(merged)
        self.steps, self.seen = state["steps"], state["seen"]
        self.log("resumed", steps=self.steps, seen=self.seen)

    # The crew.

    def take_initial(self, initial: Initial) -> None:
        """A process's samples from before the training."""
        n = min(len(initial.task), self.store.capacity - self.store.count)
        first = self.store.count
        self.store.places(n)
        self.store.pictures[first : first + n].copy_(torch.from_numpy(initial.pictures[:n]))
        self.store.small[first : first + n].copy_(torch.from_numpy(initial.small[:n]))
        self.store.task[first : first + n].copy_(torch.from_numpy(initial.task[:n]))

    def take(self, crew: Crew, notes: list[Note]) -> None:
        """New samples into the store."""
        picked = [(note.slot, k, note.task) for note in notes for k in note.samples]
        if not picked:
            return
        places = self.store.places(len(picked))
        for (slot, k, _), place in zip(picked, places):
            self.store.pictures[place].copy_(torch.from_numpy(crew.board.pictures[slot, k]))
        at = torch.tensor(places, device=self.device)
        small = np.stack([crew.board.small[slot, k] for slot, k, _ in picked])
        self.store.small[at] = torch.from_numpy(small).to(self.device)
        self.store.task[at] = torch.tensor([task for *_, task in picked], device=self.device)

    def act(self, crew: Crew, asking: list[Note], steps: int) -> None:
        """Answers questions with the moving average's actions."""
        if self.graph is None or self.graph.steps != steps:
            self.graph = Acting(self, crew.slots, steps)
        actions = self.graph(
            np.stack([crew.board.pictures[n.slot, 0] for n in asking]),
            np.stack([crew.board.small[n.slot, 0, :4] for n in asking]),
            np.asarray([n.task for n in asking]),
        )
        for note, chunk in zip(asking, actions):
            crew.answer(note.slot, chunk)


class Acting:
    """The average policy for the crew's questions; on a GPU one captured graph at the crew's full size."""

    def __init__(self, learner: Learner, size: int, steps: int) -> None:
        self.learner, self.steps = learner, steps
        device, s = learner.device, learner.policy.s
        self.size = size
        self.pictures = torch.zeros((size, *PICTURE), dtype=torch.uint8, device=device)
        self.state = torch.zeros((size, 4), device=device)
        self.prompt = torch.zeros(size, dtype=torch.long, device=device)
        self.noise = torch.zeros((size, s.horizon, s.action_dim), device=device)
        self.captured: Any = None
        if device.type == "cuda":
            side: Any = torch.cuda.Stream()  # type: ignore[no-untyped-call]
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(2):
                    self._run()
            torch.cuda.current_stream().wait_stream(side)
            self.captured = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.captured):
                self.result = self._run()

    @torch.no_grad()
    def _run(self) -> Tensor:
        learner = self.learner
        tokens, valid = learner.prompts.tokens(self.prompt, self.state)
        with torch.autocast(learner.device.type, torch.bfloat16, enabled=learner.device.type == "cuda"):
            actions = learner.average.act(to_pixels(self.pictures), tokens, valid, self.noise, self.steps)
        return actions[..., :4].float().clamp(-1, 1)

    def __call__(
        self, pictures: npt.NDArray[np.uint8], state: npt.NDArray[np.float32], task: npt.NDArray[np.int64]
    ) -> npt.NDArray[np.float32]:
        n = len(pictures)
        device = self.learner.device
        self.pictures[:n] = torch.from_numpy(pictures).to(device)
        self.state[:n] = torch.from_numpy(state).to(device)
        self.prompt[:n] = self.learner.prompts.first[torch.from_numpy(task).to(device)]
        self.noise.normal_()
        if self.captured is None:
            self.result = self._run()
        else:
            self.captured.replay()
        result: npt.NDArray[np.float32] = self.result[:n].cpu().numpy()
        return result


def shards(tensors: dict[str, Tensor], limit: int = 15 << 20) -> list[dict[str, Tensor]]:
    """Splits a state dict into parts below `limit` bytes."""
    out: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, tensor in tensors.items():
        bytes_ = tensor.numel() * tensor.element_size()
        if out[-1] and size + bytes_ > limit:
            out.append({})
            size = 0
        out[-1][name] = tensor.detach().cpu().clone()
        size += bytes_
    return out


def write_tensors(path: pathlib.Path, tensors: dict[str, Tensor]) -> None:
    temporary = path.with_name(path.name + ".new")
    torch.save(tensors, temporary)
    temporary.replace(path)


def evaluation_plan(slots: int, scenes: int) -> dict[int, list[int]]:
    """Which slot rolls which scenes: each task's slots share its scenes, which are spread evenly over the 200."""
    chosen = [k * EVALUATION_SCENES // scenes for k in range(scenes)]
    plan: dict[int, list[int]] = {slot: [] for slot in range(slots)}
    for task in range(len(TASKS)):
        mine = [slot for slot in range(slots) if slot % len(TASKS) == task]
        if not mine:
            raise ValueError(
                f"workers x slots = {slots} leaves no slot for {TASKS[task]}: at least {len(TASKS)} are needed"
            )
        for k, scene in enumerate(chosen):
            plan[mine[k % len(mine)]].append(scene)
    return plan
