"""The pi0.5 network in PyTorch, written from the contract and sharing no code with the engine.

Vision tower (SigLIP's form) -> projector -> prefix transformer (Gemma's form) over image and text tokens, and an action
expert of its own width that attends to the prefix's keys and values of the same layer. Flow matching: t = 1 is noise.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

EPS = 1e-6
ROPE_BASE = 10000.0


@dataclass(frozen=True)
class Sizes:
    """The architecture, as `architecture` in an exported config.json states it."""

    image: int = 128
    patch: int = 16
    cameras: int = 3
    vision_width: int = 192
    vision_depth: int = 6
    vision_heads: int = 3
    vision_mlp: int = 768
    prefix_width: int = 256
    prefix_mlp: int = 512
    expert_width: int = 128
    expert_mlp: int = 320
    depth: int = 6
    heads: int = 4
    head_dim: int = 64
    vocabulary: int = 512
    action_dim: int = 8
    horizon: int = 16
    min_period: float = 4e-3
    max_period: float = 4.0

    @property
    def image_tokens(self) -> int:
        """Tokens of one camera."""
        return (self.image // self.patch) ** 2

    def architecture(self) -> dict[str, Any]:
        """The block that the engine reads."""
        attention = {"heads": self.heads, "kv_heads": 1, "head_dim": self.head_dim}
        return {
            "vision": {
                "width": self.vision_width,
                "depth": self.vision_depth,
                "heads": self.vision_heads,
                "mlp": self.vision_mlp,
                "patch": self.patch,
                "image": self.image,
            },
            "prefix": {
                "width": self.prefix_width,
                "depth": self.depth,
                "mlp": self.prefix_mlp,
                **attention,
                "vocab": self.vocabulary,
            },
            "expert": {"width": self.expert_width, "depth": self.depth, "mlp": self.expert_mlp, **attention},
            "tokenizer": "tokenizer.model",
        }


class VisionBlock(nn.Module):
    def __init__(self, s: Sizes) -> None:
        super().__init__()
        w = s.vision_width
        self.heads = s.vision_heads
        self.layer_norm1, self.layer_norm2 = nn.LayerNorm(w, EPS), nn.LayerNorm(w, EPS)
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(w, w) for _ in range(4))
        self.fc1, self.fc2 = nn.Linear(w, s.vision_mlp), nn.Linear(s.vision_mlp, w)

    def forward(self, x: Tensor) -> Tensor:
        b, n, w = x.shape
        h = self.layer_norm1(x)
        q, k, v = (
            p(h).view(b, n, self.heads, -1).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj)
        )
        a = F.scaled_dot_product_attention(q, k, v)
        x = x + self.out_proj(a.transpose(1, 2).reshape(b, n, w))
        out: Tensor = x + self.fc2(F.gelu(self.fc1(self.layer_norm2(x)), approximate="tanh"))
        return out


class Vision(nn.Module):
    """Pixels in [-1, 1], [pictures, height, width, 3] -> tokens [pictures, tokens, prefix width]."""

    def __init__(self, s: Sizes) -> None:
        super().__init__()
        self.s = s
        self.patch_embedding = nn.Conv2d(3, s.vision_width, s.patch, s.patch)
        self.position_embedding = nn.Parameter(torch.randn(s.image_tokens, s.vision_width) * 0.02)
        self.layers = nn.ModuleList([VisionBlock(s) for _ in range(s.vision_depth)])
        self.post_layernorm = nn.LayerNorm(s.vision_width, EPS)
        self.projector = nn.Linear(s.vision_width, s.prefix_width)

    def forward(self, pixels: Tensor) -> Tensor:
        s, side = self.s, self.s.image // self.s.patch
        patches = pixels.view(-1, side, s.patch, side, s.patch, 3).permute(0, 1, 3, 5, 2, 4)
        flat = patches.reshape(-1, s.image_tokens, 3 * s.patch * s.patch)
        x = F.linear(flat, self.patch_embedding.weight.flatten(1), self.patch_embedding.bias)
        x = x + self.position_embedding
        for layer in self.layers:
            x = layer(x)
        projected: Tensor = self.projector(self.post_layernorm(x))
        return projected


def wide(x: Tensor) -> Tensor:
    """Float32 at least: what norms, angles and softmax are computed in."""
    return x if x.dtype == torch.float64 else x.float()


def rms(x: Tensor) -> Tensor:
    x = wide(x)
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS)


class RmsNorm(nn.Module):
    """Multiplies by 1 + weight, as Gemma does."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        return rms(x) * (1.0 + self.weight)


class AdaRmsNorm(nn.Module):
    """Scale, shift and gate from the time's condition."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.dense = nn.Linear(width, 3 * width)
        nn.init.normal_(self.dense.weight, std=0.02)
        with torch.no_grad():
            self.dense.bias.zero_()
            self.dense.bias[2 * width :] = 1.0  # gates start open: there is no time to learn to open them

    def forward(self, x: Tensor, condition: Tensor) -> tuple[Tensor, Tensor]:
        scale, shift, gate = self.dense(condition).unsqueeze(-2).chunk(3, dim=-1)
        return rms(x) * (1.0 + scale) + shift, gate


class Attention(nn.Module):
    """The projections of one layer; one key and value head serves all query heads."""

    def __init__(self, width: int, s: Sizes) -> None:
        super().__init__()
        self.q_proj = nn.Linear(width, s.heads * s.head_dim, bias=False)
        self.k_proj = nn.Linear(width, s.head_dim, bias=False)
        self.v_proj = nn.Linear(width, s.head_dim, bias=False)
        self.o_proj = nn.Linear(s.heads * s.head_dim, width, bias=False)


class Mlp(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(width, hidden, bias=False)
        self.up_proj = nn.Linear(width, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        down: Tensor = self.down_proj(F.gelu(self.gate_proj(x), approximate="tanh") * self.up_proj(x))
        return down


class PrefixLayer(nn.Module):
    def __init__(self, s: Sizes) -> None:
        super().__init__()
        self.input_layernorm, self.post_attention_layernorm = RmsNorm(s.prefix_width), RmsNorm(s.prefix_width)
        self.self_attn, self.mlp = Attention(s.prefix_width, s), Mlp(s.prefix_width, s.prefix_mlp)


class ExpertLayer(nn.Module):
    def __init__(self, s: Sizes) -> None:
        super().__init__()
        self.input_layernorm, self.post_attention_layernorm = AdaRmsNorm(s.expert_width), AdaRmsNorm(
            s.expert_width
        )
        self.self_attn, self.mlp = Attention(s.expert_width, s), Mlp(s.expert_width, s.expert_mlp)


class Rotation:
    """RoPE at the given positions [batch, tokens]: pairs (i, i + half). `precise`: angles in float64."""

    def __init__(self, positions: Tensor, head_dim: int, precise: bool) -> None:
        half = head_dim // 2
        kind = torch.float64 if precise else torch.float32
        exponent = torch.arange(half, device=positions.device, dtype=kind) / half
        angle = positions.to(kind).unsqueeze(-1) * (ROPE_BASE**-exponent)
        self.cos, self.sin = angle.cos(), angle.sin()

    def __call__(self, x: Tensor, heads: int) -> Tensor:
        """[batch, tokens, heads * head_dim] -> [batch, 1, tokens * heads, head_dim]: heads folded into the queries."""
        b, n, _ = x.shape
        x = x.view(b, n, heads, -1)
        first, second = wide(x).chunk(2, dim=-1)
        cos, sin = self.cos.unsqueeze(2), self.sin.unsqueeze(2)
        turned = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
        return turned.to(x.dtype).view(b, 1, n * heads, -1)


@dataclass
class Prefix:
    """What the expert needs of an observation. `keys`, `values`: per layer [batch, 1, tokens, head_dim]."""

    keys: list[Tensor]
    values: list[Tensor]
    blocked: Tensor  # float [batch, 1, 1, tokens]: 0 where a token is valid, a large negative number where it is not
    count: Tensor  # int [batch]: valid tokens


class Policy(nn.Module):
    """The whole network. `locate` holds training's localisation heads, which are not exported."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        s = self.s = sizes
        self.vision = Vision(s)
        self.embed_tokens = nn.Parameter(torch.randn(s.vocabulary, s.prefix_width) * s.prefix_width**-0.5)
        self.prefix_layers = nn.ModuleList([PrefixLayer(s) for _ in range(s.depth)])
        self.prefix_norm = RmsNorm(s.prefix_width)  # in the checkpoint's form, never computed
        self.expert_layers = nn.ModuleList([ExpertLayer(s) for _ in range(s.depth)])
        self.expert_norm = AdaRmsNorm(s.expert_width)
        self.action_in_proj = nn.Linear(s.action_dim, s.expert_width)
        self.action_out_proj = nn.Linear(s.expert_width, s.action_dim)
        self.time_mlp_in = nn.Linear(s.expert_width, s.expert_width)
        self.time_mlp_out = nn.Linear(s.expert_width, s.expert_width)
        for part in (*self.prefix_layers, *self.expert_layers, self.vision):
            for module in part.modules():
                if isinstance(module, nn.Linear) and module.out_features != 3 * module.in_features:
                    nn.init.normal_(module.weight, std=0.8 * module.in_features**-0.5)
                    if module.bias is not None:
                        nn.init.zeros_(module.bias)
        self.locate = nn.ModuleList([Locator(s), Locator(s)])

    def exported_parameters(self) -> int:
        """Parameters without the localisation heads."""
        return sum(p.numel() for name, p in self.named_parameters() if not name.startswith("locate."))

    def embed_prefix(self, pixels: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """pixels [batch, cameras, h, w, 3], tokens [batch, text] -> embeddings [batch, n, width], image tokens."""
        b = pixels.shape[0]
        images = self.vision(pixels.flatten(0, 1)).view(b, -1, self.s.prefix_width)
        text = F.embedding(tokens, self.embed_tokens) * math.sqrt(self.s.prefix_width)
        return torch.cat([wide(images), wide(text)], dim=1), images

    def prefix(self, pixels: Tensor, tokens: Tensor, valid: Tensor) -> tuple[Prefix, list[Tensor]]:
        """valid [batch, text] marks the prompt's tokens. Also the localisation heads' inputs: after vision, and half-way up."""
        s = self.s
        x, images = self.embed_prefix(pixels, tokens)
        everywhere = torch.cat([valid.new_ones(x.shape[0], images.shape[1]), valid], dim=1)
        blocked = torch.where(everywhere, 0.0, -1e30)[:, None, None, :]
        turn = Rotation(everywhere.cumsum(1) - 1, s.head_dim, x.dtype == torch.float64)
        result = Prefix([], [], blocked, everywhere.sum(1))
        middle = images
        layers: list[Any] = list(self.prefix_layers)
        for i, layer in enumerate(layers):
            h = layer.input_layernorm(x)
            k, v = turn(layer.self_attn.k_proj(h), 1), layer.self_attn.v_proj(h).unsqueeze(1)
            result.keys.append(k)
            result.values.append(v)
            if i + 1 == s.depth:
                break  # nothing reads the last layer's output
            q = turn(layer.self_attn.q_proj(h), s.heads)
            a = F.scaled_dot_product_attention(q, k, v, attn_mask=blocked.to(q.dtype))
            x = x + layer.self_attn.o_proj(a.reshape(x.shape[0], x.shape[1], -1))
            x = x + layer.mlp(layer.post_attention_layernorm(x))
            if i + 1 == s.depth // 2:
                middle = x[:, : images.shape[1]]
        return result, [images, middle]

    def time_condition(self, t: Tensor) -> Tensor:
        """t [...] -> [..., expert width]: sines, then cosines, then two layers, each with SiLU."""
        half = self.s.expert_width // 2
        fraction = torch.linspace(0.0, 1.0, half, dtype=torch.float64, device=t.device)
        period = self.s.min_period * (self.s.max_period / self.s.min_period) ** fraction
        angle = t.double().unsqueeze(-1) * (2.0 * math.pi / period)
        wave = torch.cat([angle.sin(), angle.cos()], dim=-1).to(self.time_mlp_in.weight.dtype)
        condition: Tensor = F.silu(self.time_mlp_out(F.silu(self.time_mlp_in(wave))))
        return condition

    def velocity(self, prefix: Prefix, x: Tensor, t: Tensor) -> Tensor:
        """x [batch, draws, horizon, action_dim], t [batch, draws] -> velocities like x. Draws do not see each other."""
        s = self.s
        b, r, n, _ = x.shape
        condition = self.time_condition(t)
        h: Tensor = self.action_in_proj(x)
        positions = prefix.count[:, None, None] + torch.arange(n, device=x.device)
        turn = Rotation(positions.expand(b, r, n).reshape(b, r * n), s.head_dim, x.dtype == torch.float64)
        draw = torch.arange(r, device=x.device).repeat_interleave(n)
        apart = torch.where(draw.repeat_interleave(s.heads)[:, None] == draw, 0.0, -1e30)
        mask = torch.cat(
            [prefix.blocked.expand(b, 1, r * n * s.heads, -1), apart.expand(b, 1, -1, -1)], dim=-1
        ).to(prefix.keys[0].dtype)
        layers: list[Any] = list(self.expert_layers)
        for layer, k, v in zip(layers, prefix.keys, prefix.values):
            y, gate = layer.input_layernorm(h, condition)
            a = layer.self_attn
            flat = y.flatten(1, 2)
            q = turn(a.q_proj(flat), s.heads)
            keys = torch.cat([k, turn(a.k_proj(flat), 1)], dim=2)
            values = torch.cat([v, a.v_proj(flat).unsqueeze(1)], dim=2)
            out = F.scaled_dot_product_attention(q, keys, values, attn_mask=mask)
            h = h + gate * a.o_proj(out.reshape(b, r * n, -1)).view(b, r, n, -1)
            y, gate = layer.post_attention_layernorm(h, condition)
            h = h + gate * layer.mlp(y)
        y, _ = self.expert_norm(h, condition)
        result: Tensor = self.action_out_proj(y)
        return result

    @torch.no_grad()
    def act(self, pixels: Tensor, tokens: Tensor, valid: Tensor, noise: Tensor, steps: int = 10) -> Tensor:
        """noise [batch, horizon, action_dim] -> normalised actions of that shape, by Euler steps from t = 1 to 0."""
        prefix, _ = self.prefix(pixels, tokens, valid)
        x = noise.unsqueeze(1)
        for t in time_grid(steps):
            at = torch.full((x.shape[0], 1), t, device=x.device)
            x = x - wide(self.velocity(prefix, x, at)) / steps
        return x.squeeze(1)


def time_grid(steps: int) -> list[float]:
    """The times of an N-step schedule as openpi makes them: added up in float32."""
    t, dt, out = torch.tensor(1.0), torch.tensor(-1.0 / steps), []
    for _ in range(steps):
        out.append(float(t))
        t = t + dt
    return out


class Locator(nn.Module):
    """Where hand, object and goal are, read from image tokens: attention over each camera's tokens, with its place.

    Attention, never a mean over tokens: a pooled read-out leaves nothing local for the loss to sharpen.
    """

    TARGETS = 3

    def __init__(self, s: Sizes) -> None:
        super().__init__()
        side, key, out = s.image // s.patch, 64, self.TARGETS
        self.cameras, self.tokens = s.cameras, s.image_tokens
        self.norm = nn.LayerNorm(s.prefix_width, EPS)
        self.key, self.value = nn.Linear(s.prefix_width, key), nn.Linear(s.prefix_width, key)
        self.query = nn.Parameter(torch.randn(out, s.cameras, key) * key**-0.5)
        grid = torch.stack(torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij"), -1).view(
            -1, 2
        )
        self.register_buffer("place", grid.float() / (side - 1) * 2 - 1, persistent=False)
        self.hidden = nn.Parameter(torch.randn(out, s.cameras * (key + 2), 256) * (s.cameras * key) ** -0.5)
        self.final = nn.Parameter(torch.randn(out, 256, 3) * 256**-0.5 * 0.3)
        self.bias = nn.Parameter(torch.zeros(out, 3))

    def forward(self, tokens: Tensor) -> Tensor:
        """[batch, cameras * tokens, width] -> [batch, targets, 3], in the units that the loss is taken in."""
        x = self.norm(tokens.float()).view(-1, self.cameras, self.tokens, tokens.shape[-1])
        weight = torch.einsum("bcnk,tck->btcn", self.key(x), self.query).float().softmax(-1)
        seen = torch.einsum("btcn,bcnk->btck", weight, self.value(x).float())
        place = torch.einsum("btcn,nd->btcd", weight, self.place)
        feature = torch.cat([seen, place], dim=-1).flatten(2)
        hidden = F.gelu(torch.einsum("btf,tfh->bth", feature, self.hidden))
        return (torch.einsum("bth,tho->bto", hidden, self.final) + self.bias).float()
