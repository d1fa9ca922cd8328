"""Synthetic checkpoints, version 1 (docs/synthetic-checkpoints.md): deterministic random weights from a name, an index and a seed."""
import math, sys, zlib
import numpy as np

M64 = (1 << 64) - 1
def fnv1a(name):
    h = 0xcbf29ce484222325
    for b in name.encode():
        h = ((h ^ b) * 0x100000001b3) & M64
    return h

def rule(name, shape):
    if name.endswith('.bias'): return 0.1, 0.0
    if name.endswith(('layer_norm1.weight', 'layer_norm2.weight', 'post_layernorm.weight')): return 0.2, 1.0
    if name.endswith(('input_layernorm.weight', 'post_attention_layernorm.weight', 'language_model.norm.weight')): return 0.2, 0.0
    if name.endswith('position_embedding.weight'): return 0.5, 0.0
    if name.endswith(('embed_tokens.weight', 'lm_head.weight')): return math.sqrt(3 / shape[1]), 0.0
    fan_in = math.prod(shape[1:])
    if name.endswith(('layernorm.dense.weight', 'norm.dense.weight')): return 0.3 * math.sqrt(3 / fan_in), 0.0
    return math.sqrt(3 / fan_in), 0.0

def values(name, shape, seed=0, start=0, count=None):
    """FP32 values of elements [start, start+count) in row-major order."""
    n = math.prod(shape) if count is None else count
    amp, off = rule(name, shape)
    out = np.empty(n, np.float32)
    key = np.uint64(fnv1a(name) ^ seed)
    step = 1 << 22
    with np.errstate(over='ignore'):
        for a in range(0, n, step):
            b = min(n, a + step)
            i = np.arange(start + a + 1, start + b + 1, dtype=np.uint64)
            z = key + i * np.uint64(0x9E3779B97F4A7C15)
            z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            z ^= z >> np.uint64(31)
            u = (z >> np.uint64(40)).astype(np.float32) * np.float32(2.0 ** -24)
            out[a:b] = np.float32(off) + np.float32(amp) * (u * np.float32(2) - np.float32(1))
    return out

def pi05_tensors(vision=(1152, 27, 4304, 14, 256), prefix=(2048, 18, 16384, 8, 1, 256, 257152), expert=(1024, 4096), action_dim=32):
    """name -> shape in openpi's torch layout (tied lm_head only, no expert lm_head)."""
    w, d, m, p, tok = vision; W, D, ML, h, kv, hd, vocab = prefix; E, EM = expert
    V = 'paligemma_with_expert.paligemma.model.vision_tower.vision_model.'
    L = 'paligemma_with_expert.paligemma.model.language_model.'
    X = 'paligemma_with_expert.gemma_expert.model.'
    t = {V + 'embeddings.patch_embedding.weight': (w, 3, p, p), V + 'embeddings.patch_embedding.bias': (w,), V + 'embeddings.position_embedding.weight': (tok, w)}
    for i in range(d):
        b = f'{V}encoder.layers.{i}.'
        for q in 'qkv': t[b + f'self_attn.{q}_proj.weight'] = (w, w); t[b + f'self_attn.{q}_proj.bias'] = (w,)
        t[b + 'self_attn.out_proj.weight'] = (w, w); t[b + 'self_attn.out_proj.bias'] = (w,)
        for n in ('layer_norm1', 'layer_norm2'): t[b + n + '.weight'] = (w,); t[b + n + '.bias'] = (w,)
        t[b + 'mlp.fc1.weight'] = (m, w); t[b + 'mlp.fc1.bias'] = (m,); t[b + 'mlp.fc2.weight'] = (w, m); t[b + 'mlp.fc2.bias'] = (w,)
    t[V + 'post_layernorm.weight'] = (w,); t[V + 'post_layernorm.bias'] = (w,)
    t['paligemma_with_expert.paligemma.model.multi_modal_projector.linear.weight'] = (W, w); t['paligemma_with_expert.paligemma.model.multi_modal_projector.linear.bias'] = (W,)
    t['paligemma_with_expert.paligemma.lm_head.weight'] = (vocab, W)
    for base, width, mlp, ada in ((L, W, ML, False), (X, E, EM, True)):
        for i in range(D):
            b = f'{base}layers.{i}.'
            t[b + 'self_attn.q_proj.weight'] = (h * hd, width); t[b + 'self_attn.k_proj.weight'] = (kv * hd, width); t[b + 'self_attn.v_proj.weight'] = (kv * hd, width); t[b + 'self_attn.o_proj.weight'] = (width, h * hd)
            t[b + 'mlp.gate_proj.weight'] = (mlp, width); t[b + 'mlp.up_proj.weight'] = (mlp, width); t[b + 'mlp.down_proj.weight'] = (width, mlp)
            for n in ('input_layernorm', 'post_attention_layernorm'):
                if ada: t[b + n + '.dense.weight'] = (3 * width, width); t[b + n + '.dense.bias'] = (3 * width,)
                else: t[b + n + '.weight'] = (width,)
        if ada: t[base + 'norm.dense.weight'] = (3 * width, width); t[base + 'norm.dense.bias'] = (3 * width,)
        else: t[base + 'norm.weight'] = (width,)
    t['action_in_proj.weight'] = (E, action_dim); t['action_in_proj.bias'] = (E,); t['action_out_proj.weight'] = (action_dim, E); t['action_out_proj.bias'] = (action_dim,)
    for n in ('time_mlp_in', 'time_mlp_out'): t[n + '.weight'] = (E, E); t[n + '.bias'] = (E,)
    return t

if __name__ == '__main__':
    t = pi05_tensors(); print(len(t), 'tensors', sum(math.prod(s) for s in t.values()), 'parameters')
    for n in ('action_in_proj.weight', 'time_mlp_in.bias', 'paligemma_with_expert.gemma_expert.model.layers.17.mlp.down_proj.weight'):
        v = values(n, t[n]); print(n, v[:3].tolist(), 'crc32', hex(zlib.crc32(v.tobytes())), 'std', float(v.std()))
