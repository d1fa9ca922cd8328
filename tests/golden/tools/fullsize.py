"""pi0.5 at full size on synthetic weights (docs/synthetic-checkpoints.md): expected outputs in golden format, FP32 or BF16, torch on CPU or GPU.

usage: fullsize.py check <golden openpi checkpoint> [--device cuda]   proves this code on the golden cases
       fullsize.py make OUT.safetensors --seed S --views 2 --tokens 200 --steps 10 [--bf16] [--device cuda]
Weights are generated layer by layer (BF16-rounded), so memory stays small. Input recipe: see `inputs`. FP32 on a GPU
means FP32: TF32 and reductions in lower precision are off.
"""
import argparse, json, math, pathlib, sys, time
import numpy as np, torch, torch.nn.functional as F
from safetensors import safe_open
from safetensors.numpy import save_file
import synth

PALI, EXPERT = 'paligemma_with_expert.paligemma.', 'paligemma_with_expert.gemma_expert.model.'
V, L = PALI + 'model.vision_tower.vision_model.', PALI + 'model.language_model.'
SLOTS = ('base_0_rgb', 'left_wrist_0_rgb', 'right_wrist_0_rgb')

DEVICE = 'cpu'

def values_on_gpu(name, shape, seed=0):
    """synth.values in torch: int64 wraps as uint64 does, and a masked shift is the logical one."""
    signed = lambda v: (v & synth.M64) - (1 << 64 if v & 1 << 63 else 0)
    shift = lambda z, k: (z >> k) & ((1 << (64 - k)) - 1)
    n, (amp, off) = math.prod(shape), synth.rule(name, shape); out = torch.empty(n, dtype=torch.float32, device=DEVICE)
    for a in range(0, n, 1 << 26):
        b = min(n, a + (1 << 26)); z = torch.arange(a + 1, b + 1, dtype=torch.int64, device=DEVICE) * signed(0x9E3779B97F4A7C15) + signed(synth.fnv1a(name) ^ seed)
        z = (z ^ shift(z, 30)) * signed(0xBF58476D1CE4E5B9); z = (z ^ shift(z, 27)) * signed(0x94D049BB133111EB); z = z ^ shift(z, 31)
        out[a:b] = (shift(z, 40).float() * 2.0 ** -24 * 2 - 1) * float(np.float32(amp)) + float(np.float32(off))
    return out

class Synthetic:
    def __init__(s, seed, horizon=50):
        s.shapes, s.seed = synth.pi05_tensors(), seed
        s.vision, s.gemma, s.expert, s.horizon = dict(depth=27, heads=16, patch=14), dict(depth=18, heads=8, head_dim=256), 1024, horizon
    def __call__(s, name):
        make = values_on_gpu if DEVICE != 'cpu' else lambda *a: torch.from_numpy(synth.values(*a))
        return make(name, s.shapes[name], s.seed).reshape(s.shapes[name]).bfloat16()
    def has(s, name): return name in s.shapes
    def rows(s, ids):
        n = PALI + 'lm_head.weight'; w = s.shapes[n][1]
        return torch.stack([torch.from_numpy(synth.values(n, s.shapes[n], s.seed, int(i) * w, w)) for i in ids]).bfloat16().to(DEVICE)

class Stored:
    def __init__(s, folder):
        s.f = safe_open(str(folder / 'model.safetensors'), 'pt'); c = json.loads((folder / 'config.json').read_text()); a = c['architecture']; s.keys = set(s.f.keys())
        s.vision, s.gemma, s.expert, s.horizon = a['vision'], a['prefix'], a['expert']['width'], c['action_horizon']
    def __call__(s, name): return s.f.get_tensor(name).to(DEVICE)
    def has(s, name): return name in s.keys
    def rows(s, ids): return s(PALI + 'lm_head.weight')[torch.tensor(ids)]

class Net:
    def __init__(s, w, dt): s.w, s.dt = w, dt
    def p(s, n): return s.w(n).to(s.dt)
    def f(s, n): return s.w(n).float()
    def lin(s, x, n, fp32=False):
        b = n + '.bias'; W = s.f(n + '.weight') if fp32 else s.p(n + '.weight')
        return F.linear(x.to(W.dtype), W.reshape(W.shape[0], -1), (s.f(b) if fp32 else s.p(b)) if s.w.has(b) else None)
    def vision(s, img):  # [224,224,3] in [-1,1]
        a = s.w.vision; p = a['patch']; g = img.shape[0] // p
        x = img.reshape(g, p, g, p, 3).permute(0, 2, 4, 1, 3).reshape(g * g, -1)
        x = (s.lin(x, V + 'embeddings.patch_embedding', True) + s.f(V + 'embeddings.position_embedding.weight')).to(s.dt)
        ln = lambda x, n: F.layer_norm(x.float(), (x.shape[-1],), s.f(n + '.weight'), s.f(n + '.bias'), 1e-6).to(s.dt)
        for i in range(a['depth']):
            b = f'{V}encoder.layers.{i}.'; y = ln(x, b + 'layer_norm1'); n = len(y)
            q, k, v = (s.lin(y, f'{b}self_attn.{c}_proj').view(n, a['heads'], -1).transpose(0, 1) for c in 'qkv')
            o = s.attend(q, k, v); x = x + s.lin(o, b + 'self_attn.out_proj')
            x = x + s.lin(F.gelu(s.lin(ln(x, b + 'layer_norm2'), b + 'mlp.fc1'), approximate='tanh'), b + 'mlp.fc2')
        return s.lin(ln(x, V + 'post_layernorm'), PALI + 'model.multi_modal_projector.linear')
    def attend(s, q, k, v):  # [h,n,d]; fp32 softmax
        pr = torch.softmax((q.float() @ k.float().transpose(1, 2)) * q.shape[-1] ** -0.5, -1).to(s.dt)
        return (pr @ v).transpose(0, 1).reshape(q.shape[1], -1)
    def rope(s, x, pos):
        h = x.shape[-1] // 2; a = pos.double()[:, None] * 10000.0 ** (-torch.arange(h, dtype=torch.float64) / h); c, si = a.cos().float(), a.sin().float()
        a, b = x.float()[..., :h], x.float()[..., h:]
        return torch.cat([a * c - b * si, b * c + a * si], -1).to(s.dt)
    def norm(s, x, n, cond):
        y = x.float(); y = y * torch.rsqrt((y * y).mean(-1, keepdim=True) + 1e-6)
        if cond is None: return (y * (1 + s.f(n + '.weight'))).to(s.dt), 1.0
        sc, sh, g = s.mod(n, cond); return (y * (1 + sc) + sh).to(s.dt), g.to(s.dt)
    def mod(s, n, cond): return s.lin(cond, n + '.dense', True).chunk(3, -1)
    def layer(s, x, b, pos, cond, cache):
        G = s.w.gemma; y, g = s.norm(x, b + 'input_layernorm', cond); n = len(y)
        q, k, v = (s.lin(y, f'{b}self_attn.{c}_proj').view(n, -1, G['head_dim']).transpose(0, 1) for c in 'qkv')
        q, k = s.rope(q, pos), s.rope(k, pos); kv = (k[0], v[0])
        if cache is not None: k, v = torch.cat([cache[0][None], k], 1), torch.cat([cache[1][None], v], 1)
        o = s.attend(q, k.expand(q.shape[0], -1, -1), v.expand(q.shape[0], -1, -1)); x = x + g * s.lin(o, b + 'self_attn.o_proj')
        y, g = s.norm(x, b + 'post_attention_layernorm', cond)
        return x + g * s.lin(F.gelu(s.lin(y, b + 'mlp.gate_proj'), approximate='tanh') * s.lin(y, b + 'mlp.up_proj'), b + 'mlp.down_proj'), kv
    def cond(s, t):
        h = s.w.expert // 2; per = 4e-3 * 1e3 ** np.linspace(0, 1, h); a = t / per * 2 * math.pi
        x = torch.from_numpy(np.concatenate([np.sin(a), np.cos(a)]).astype(np.float32)).to(DEVICE)
        return F.silu(s.lin(F.silu(s.lin(x, 'time_mlp_in', True)), 'time_mlp_out', True))
    def run(s, images, ids, noise, steps, keep=()):
        out = {}
        for slot, im in images.items(): out[f'vision/{slot}'] = s.vision(im)
        W = out[f'vision/{next(iter(images))}'].shape[-1]; text = (s.w.rows(ids).to(s.dt) * W ** 0.5)
        x = out['prefix/embeddings'] = torch.cat([*(out[f'vision/{k}'] for k in images), text]); n = len(x); cache = []
        for i in range(s.w.gemma['depth']):
            x, kv = s.layer(x, f'{L}layers.{i}.', torch.arange(n), None, None); cache.append(kv); out[f'prefix/layer{i}/k'], out[f'prefix/layer{i}/v'] = kv
            print('prefix', i, flush=True) if i % 6 == 5 else 0
        t, dt, y = np.float32(1), np.float32(-1 / steps), noise.clone(); ts = []
        for j in range(steps): ts.append(t); t = np.float32(t + dt)
        # layer-major over weights is impossible (steps depend on each other): expert weights are kept
        ex = {}; load = s.w
        class Keep:
            vision, gemma, expert = load.vision, load.gemma, load.expert
            def __call__(_, n):
                if n not in ex: ex[n] = load(n)
                return ex[n]
            def has(_, n): return load.has(n)
        s.w = Keep(); out['t'] = torch.tensor(np.array(ts))
        for j, t in enumerate(ts):
            c = out[f'time/{j}'] = s.cond(float(t)); x = s.lin(y, 'action_in_proj', True).to(s.dt)
            for i in range(s.w.gemma['depth']): x, _ = s.layer(x, f'{EXPERT}layers.{i}.', n + torch.arange(len(y)), c, cache[i])
            v = out[f'step{j}/v'] = s.lin(s.norm(x, EXPERT + 'norm', c)[0].float(), 'action_out_proj', True); y = out[f'step{j}/x'] = y + float(dt) * v
        s.w = load; out['actions_normalized'] = y
        return out

def unit(name, n, seed):  # uniform [0,1) from the checkpoint generator
    amp = synth.rule; synth.rule = lambda a, b: (0.5, 0.5)
    try: return synth.values(name, (n,), seed)
    finally: synth.rule = amp

def inputs(seed, views, tokens, horizon=50):
    """u8 images = floor(256 u) smoothed over 16x16 blocks, token ids = 3 + floor(u * 257000) with BOS first, noise = sqrt(12) (u - 0.5)."""
    im = {s: np.repeat(np.repeat((unit('image.' + s, 14 * 14 * 3, seed) * 256).astype(np.uint8).reshape(14, 14, 3), 16, 0), 16, 1) for s in SLOTS[:views]}
    ids = np.concatenate([[2], 3 + (unit('tokens', tokens - 1, seed) * 257000).astype(np.int32)]).astype(np.int32)
    return im, ids, ((unit('noise', horizon * 32, seed) - 0.5) * np.float32(math.sqrt(12))).astype(np.float32).reshape(horizon, 32)

def main():
    torch.manual_seed(0); torch.set_grad_enabled(False); a = argparse.ArgumentParser(); a.add_argument('cmd'); a.add_argument('path', type=pathlib.Path)
    for k, d in (('seed', 0), ('views', 2), ('tokens', 200), ('steps', 10)): a.add_argument('--' + k, type=int, default=d)
    a.add_argument('--bf16', action='store_true'); a.add_argument('--device', default='cpu'); a = a.parse_args()
    global DEVICE; DEVICE = a.device; torch.set_default_device(DEVICE); torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    if a.cmd == 'check':
        net = Net(Stored(a.path), torch.float32)
        for c in sorted((a.path / 'cases').glob('*.safetensors')):
            with safe_open(str(c), 'pt') as f:
                m = f.metadata(); g = {k: f.get_tensor(k).to(DEVICE) for k in f.keys()}
            if 'expect/image/base_0_rgb' not in g and any(v.shape[:2] != (224, 224) for k, v in g.items() if k.startswith('input/image')): continue
            im = {k: g.get(f'expect/image/{k}', g[f'input/image/{k}'].float() / 255 * 2 - 1) for k in SLOTS if f'input/image/{k}' in g}
            o = net.run(im, g['expect/tokens'][g['expect/token_mask']].tolist(), g['input/noise'], int(m['steps']))
            worst = max(((o[k[7:]].double() - v.double()).abs().max() / v.double().pow(2).mean().sqrt()).item() for k, v in g.items() if k.startswith('expect/') and k[7:] in o and v.dtype.is_floating_point and v.shape == o[k[7:]].shape)
            print(c.name, 'worst error / rms', worst)
        return
    t0 = time.time(); net = Net(Synthetic(a.seed), torch.bfloat16 if a.bf16 else torch.float32); im, ids, noise = inputs(a.seed, a.views, a.tokens)
    o = net.run({k: torch.from_numpy(v).to(DEVICE).float() / 255 * 2 - 1 for k, v in im.items()}, ids.tolist(), torch.from_numpy(noise).to(DEVICE), a.steps)
    d = {f'input/image/{k}': v for k, v in im.items()} | {'input/noise': noise, 'input/state': np.zeros(8, np.float32), 'expect/tokens': np.pad(ids, (0, 200 - len(ids))), 'expect/token_mask': np.arange(200) < len(ids)}
    layers = {0, 8, 17}
    for k, v in o.items():
        if k.startswith('prefix/layer') and int(k.split('/')[1][5:]) not in layers or k == 'prefix/embeddings' or k.startswith('vision') and 'base' not in k: continue
        d['expect/' + k] = np.ascontiguousarray(v.float().cpu().numpy())
    save_file(d, str(a.path), {'format_version': '2', 'entry': 'tokens', 'prompt_mode': 'none', 'action_width': 'none', 'max_tokens': '200', 'image_mask': ' '.join('1' if k in im else '0' for k in SLOTS), 'tolerances': json.dumps({'fp32': {k: {'max': 2e-5} for k in ('vision', 'v', 'time', 'velocity', 'x', 'actions_normalized')} | {'k': {'max': 3e-4}, 't': {'max': 0}}, 'bf16': {'velocity': {'cosine': 0.9999}, 'actions_normalized': {'rms': 0.006, 'cosine': 0.99998}}}), 'steps': str(a.steps), 'format': 'openpi', 'robot': 'none', 'slots': ' '.join(im), 'seed': str(a.seed), 'inputs': 'token ids given', 'precision': 'fp32', 'about': 'synthetic pi0.5, weights rounded to bf16'})
    v = o['actions_normalized']; print('done', round(time.time() - t0), 's; x std', v.std().item(), 'v0 std', o['step0/v'].std().item(), 'vision std', o['vision/base_0_rgb'].float().std().item(), 'k std', [round(o[f'prefix/layer{i}/k'].float().std().item(), 3) for i in (0, 8, 17)])

if __name__ == '__main__': main()
