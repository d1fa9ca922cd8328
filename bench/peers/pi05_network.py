"""The pi0.5 network in PyTorch, with random weights. See pytorch_pi05.py, which times it."""

import math
import time

import torch
import torch.nn.functional as F
from torch import nn

PI05 = {
    "vision": {"width": 1152, "depth": 27, "heads": 16, "mlp": 4304, "patch": 14, "image": 224},
    "prefix": {"width": 2048, "depth": 18, "mlp": 16384, "heads": 8, "kv_heads": 1, "head_dim": 256, "vocab": 257152},
    "expert": {"width": 1024, "depth": 18, "mlp": 4096, "heads": 8, "kv_heads": 1, "head_dim": 256},
}
ACTION_DIM = 32
BLOCK = 1 << 20  # random numbers drawn once and tiled: 3.4 G parameters in seconds


class Random:
    """Seeded weights, uniform with variance 1/fan_in."""

    def __init__(self, seed, device="cpu"):
        generator = torch.Generator().manual_seed(seed)
        self.block = (torch.rand(BLOCK, generator=generator) * 2 - 1).to(device)
        self.offset = 0

    def __call__(self, *shape, dtype=torch.bfloat16, amplitude=None, centre=0.0):
        count = math.prod(shape)
        amplitude = amplitude if amplitude is not None else math.sqrt(3 / math.prod(shape[1:]))
        block = (self.block.roll(self.offset) * amplitude + centre).to(dtype)
        self.offset = (self.offset + 7919) % BLOCK
        out = torch.empty(count, dtype=dtype, device=self.block.device)
        for start in range(0, count, BLOCK):
            out[start:start + BLOCK] = block[:min(BLOCK, count - start)]
        return nn.Parameter(out.view(shape), requires_grad=False)


class Linear(nn.Module):
    def __init__(self, random, inputs, outputs, bias=False, dtype=torch.bfloat16):
        super().__init__()
        self.weight = random(outputs, inputs, dtype=dtype)
        self.bias = random(outputs, dtype=dtype, amplitude=0.1) if bias else None

    def forward(self, x):
        return F.linear(x, self.weight, self.bias)


class LayerNorm(nn.Module):
    def __init__(self, random, width):
        super().__init__()
        self.weight = random(width, amplitude=0.2, centre=1.0)
        self.bias = random(width, amplitude=0.1)

    def forward(self, x):
        return F.layer_norm(x, x.shape[-1:], self.weight, self.bias, 1e-6)


def rms(x):
    x = x.float()
    return x * torch.rsqrt((x * x).mean(-1, keepdim=True) + 1e-6)


def rotate(x, cos, sin):
    """RoPE, half-split; x [heads, rows, head_dim], cos and sin [rows, head_dim / 2] in FP32."""
    a, b = x.float().chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(x.dtype)


def rope_table(first, rows, head_dim):
    half = head_dim // 2
    period = 10000.0 ** (-torch.arange(half, dtype=torch.float64) / half)
    angle = torch.arange(first, first + rows, dtype=torch.float64)[:, None] * period
    return angle.cos().float(), angle.sin().float()


def attend_expanded(q, k, v):
    """Attention of q [heads, rows, head_dim] to k and v [kv_heads, keys, head_dim], which are copied to every head."""
    group = q.shape[0] // k.shape[0]
    k, v = (t[:, None].expand(-1, group, -1, -1).flatten(0, 1) for t in (k, v))
    return F.scaled_dot_product_attention(q[None], k[None], v[None])[0]


def attend_grouped(q, k, v):
    """The same; PyTorch's kernels share the keys."""
    return F.scaled_dot_product_attention(q[None], k[None], v[None], enable_gqa=True)[0]


def attend_folded(q, k, v):
    """The same; the heads of a group are rows of one head (nothing is masked)."""
    folded = q.unflatten(0, (k.shape[0], -1)).flatten(1, 2)
    return F.scaled_dot_product_attention(folded[None], k[None], v[None])[0].view(q.shape)


class VisionBlock(nn.Module):
    def __init__(self, random, width, heads, mlp):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = LayerNorm(random, width), LayerNorm(random, width)
        self.q, self.k, self.v, self.out = (Linear(random, width, width, bias=True) for _ in range(4))
        self.fc1, self.fc2 = Linear(random, width, mlp, bias=True), Linear(random, mlp, width, bias=True)

    def forward(self, x):  # [views, patches, width]
        y = self.norm1(x)
        q, k, v = (layer(y).unflatten(-1, (self.heads, -1)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x)), approximate="tanh"))


class Vision(nn.Module):
    def __init__(self, random, sizes, out_width):
        super().__init__()
        width, self.patch, self.grid = sizes["width"], sizes["patch"], sizes["image"] // sizes["patch"]
        self.embed = Linear(random, 3 * self.patch**2, width, bias=True, dtype=torch.float32)
        self.position = random(self.grid**2, width, dtype=torch.float32, amplitude=0.5)
        heads, mlp, depth = sizes["heads"], sizes["mlp"], sizes["depth"]
        self.blocks = nn.ModuleList(VisionBlock(random, width, heads, mlp) for _ in range(depth))
        self.norm, self.project = LayerNorm(random, width), Linear(random, width, out_width, bias=True)

    def forward(self, frames):  # uint8 [views, image, image, 3] -> [views, patches, out_width]
        g, p = self.grid, self.patch
        pixels = frames.float() / 255 * 2 - 1
        patches = pixels.view(-1, g, p, g, p, 3).permute(0, 1, 3, 5, 2, 4).reshape(-1, g * g, 3 * p * p)
        x = (self.embed(patches) + self.position).bfloat16()
        for block in self.blocks:
            x = block(x)
        return self.project(self.norm(x))


class GemmaBlock(nn.Module):
    """A layer of the prefix (norm weights of its own) or of the expert (modulated norms)."""

    attend = staticmethod(attend_expanded)

    def __init__(self, random, sizes, adaptive=False, kv_only=False):
        super().__init__()
        width, mlp, head_dim = sizes["width"], sizes["mlp"], sizes["head_dim"]
        self.heads, self.kv_heads, self.adaptive, self.kv_only = sizes["heads"], sizes["kv_heads"], adaptive, kv_only
        self.k, self.v = (Linear(random, width, self.kv_heads * head_dim) for _ in range(2))
        if not adaptive:
            self.norm1 = random(width, dtype=torch.float32, amplitude=0.2)
        if kv_only:
            return
        if not adaptive:
            self.norm2 = random(width, dtype=torch.float32, amplitude=0.2)
        self.q, self.o = Linear(random, width, self.heads * head_dim), Linear(random, self.heads * head_dim, width)
        self.gate, self.up = Linear(random, width, mlp), Linear(random, width, mlp)
        self.down = Linear(random, mlp, width)

    def normed(self, x, index, modulation):
        """(normalised rows, residual gate)"""
        if self.adaptive:
            scale, shift, gate = modulation[index]
            return (rms(x) * (1 + scale) + shift).to(x.dtype), gate.to(x.dtype)
        return (rms(x) * (1 + (self.norm1 if index == 0 else self.norm2))).to(x.dtype), None

    def forward(self, x, cos, sin, cache=None, modulation=None):  # x [rows, width]
        y, gate = self.normed(x, 0, modulation)
        k = rotate(self.k(y).unflatten(-1, (self.kv_heads, -1)).transpose(0, 1), cos, sin)
        v = self.v(y).unflatten(-1, (self.kv_heads, -1)).transpose(0, 1)
        if self.kv_only:
            return x, k, v
        q = rotate(self.q(y).unflatten(-1, (self.heads, -1)).transpose(0, 1), cos, sin)
        keys, values = (k, v) if cache is None else (torch.cat([cache[0], k], 1), torch.cat([cache[1], v], 1))
        o = self.o(self.attend(q, keys, values).transpose(0, 1).flatten(1))
        x = x + (o if gate is None else gate * o)
        y, gate = self.normed(x, 1, modulation)
        o = self.down(F.gelu(self.gate(y), approximate="tanh") * self.up(y))
        return x + (o if gate is None else gate * o), k, v


class Prefix(nn.Module):
    def __init__(self, random, sizes):
        super().__init__()
        depth = sizes["depth"]
        self.blocks = nn.ModuleList(GemmaBlock(random, sizes, kv_only=i == depth - 1) for i in range(depth))

    def forward(self, x, cos, sin):  # [rows, width] -> keys, values, each [depth, kv_heads, rows, head_dim]
        keys, values = [], []
        for block in self.blocks:
            x, k, v = block(x, cos, sin)
            keys.append(k)
            values.append(v)
        return torch.stack(keys), torch.stack(values)


class Modulation(nn.Module):
    """Times -> scale, shift and gate of every expert norm at every step: [steps, norms, 3, width]."""

    def __init__(self, random, sizes):
        super().__init__()
        width, self.norms = sizes["width"], 2 * sizes["depth"] + 1
        self.time_in, self.time_out = (Linear(random, width, width, bias=True, dtype=torch.float32) for _ in range(2))
        dense = (Linear(random, width, 3 * width, bias=True, dtype=torch.float32) for _ in range(self.norms))
        self.dense = nn.ModuleList(dense)
        half = width // 2
        self.period = 4e-3 * 1e3 ** (torch.arange(half, dtype=torch.float64) / (half - 1))

    def forward(self, times):  # float64 [steps]
        angle = 2 * math.pi * times[:, None] / self.period
        embedding = torch.cat([angle.sin(), angle.cos()], -1).float()
        cond = F.silu(self.time_out(F.silu(self.time_in(embedding))))
        return torch.stack([dense(cond).unflatten(-1, (3, -1)) for dense in self.dense], 1)


class Step(nn.Module):
    def __init__(self, random, sizes):
        super().__init__()
        width = sizes["width"]
        self.action_in = Linear(random, ACTION_DIM, width, bias=True, dtype=torch.float32)
        self.action_out = Linear(random, width, ACTION_DIM, bias=True, dtype=torch.float32)
        self.blocks = nn.ModuleList(GemmaBlock(random, sizes, adaptive=True) for _ in range(sizes["depth"]))

    def forward(self, noisy, modulation, keys, values, cos, sin):  # [horizon, 32] -> velocity [horizon, 32]
        x = self.action_in(noisy).bfloat16()
        for i, block in enumerate(self.blocks):
            x, _, _ = block(x, cos, sin, (keys[i], values[i]), modulation[2 * i:2 * i + 2])
        scale, shift, _ = modulation[-1]
        return self.action_out(rms(x) * (1 + scale) + shift)


class Pi05:
    def __init__(self, sizes, seed, device="cpu"):
        random = Random(seed, device)
        self.sizes, width = sizes, sizes["prefix"]["width"]
        self.table = random(sizes["prefix"]["vocab"], width, amplitude=math.sqrt(3 / width))
        self.vision, self.prefix = Vision(random, sizes["vision"], width), Prefix(random, sizes["prefix"])
        self.modulation, self.step = Modulation(random, sizes["expert"]), Step(random, sizes["expert"])

    def compile(self):
        from torch._inductor import config
        config.freezing = True
        for name in ("vision", "prefix", "step"):
            setattr(self, name, torch.compile(getattr(self, name), dynamic=False, fullgraph=True))

    def infer(self, frames, ids, noise, steps):
        """Normalised actions and milliseconds per stage."""
        clock = [time.perf_counter()]

        def lap():
            clock.append(time.perf_counter())
            return (clock[-1] - clock[-2]) * 1e3

        head_dim, width = self.sizes["prefix"]["head_dim"], self.sizes["prefix"]["width"]
        images = self.vision(frames).flatten(0, 1)
        times = {"vision": lap()}
        x = torch.cat([images, self.table[ids] * math.sqrt(width)])
        keys, values = self.prefix(x, *rope_table(0, len(x), head_dim))
        times["prefix"] = lap()
        rope = rope_table(len(x), len(noise), head_dim)
        modulation = self.modulation(1 - torch.arange(steps, dtype=torch.float64) / steps)
        times["modulation"] = lap()
        actions, step_times = noise, []
        for j in range(steps):
            actions = actions - self.step(actions, modulation[j], keys, values, *rope) / steps
            step_times.append(lap())
        times["denoise"] = times["modulation"] + sum(step_times)
        times["step"] = step_times
        times["end_to_end"] = (clock[-1] - clock[0]) * 1e3
        return actions, times
