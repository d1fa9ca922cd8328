"""The pi0.5 network of pi05_network.py on a CUDA device: eager, in one CUDA graph, or compiled and in one CUDA graph.

What depends on the schedule and the lengths alone (modulations, rotation angles) is made once, as servoflow does. Inputs
lie in pinned host memory and go to fixed places on the device; a call ends when the actions are in host memory.
Attention takes whichever form and kernel of PyTorch is fastest for its shape, measured on this device.
"""

import contextlib
import math
import statistics
import time

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import pi05_network
from pi05_network import ACTION_DIM, rope_table

FORMS = {"grouped": pi05_network.attend_grouped, "expanded": pi05_network.attend_expanded,
         "folded": pi05_network.attend_folded}
KERNELS = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION,
           "efficient": SDPBackend.EFFICIENT_ATTENTION}


def captured(body, warmup=3):
    """A CUDA graph of body() after calls outside of it, as capture needs them."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(warmup):
            body()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        body()
    return graph


def microseconds(body, calls=20, repeats=7):
    """Median device time of one body() among `calls` in a graph."""
    graph = captured(lambda: [body() for _ in range(calls)], warmup=1)
    times = []
    for _ in range(repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1e3 / calls)
    return statistics.median(times)


def fastest_attention(forms, heads, kv_heads, rows, keys, head_dim, batch=None):
    """(microseconds, form, kernel) of every combination that runs, fastest first; q is [heads, rows, head_dim]."""
    def random(*shape):
        return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)

    found = []
    for form in forms:
        if batch is None:
            # As a block makes them: projections, transposed.
            q, k, v = random(rows, heads, head_dim), random(keys, kv_heads, head_dim), random(keys, kv_heads, head_dim)
            arguments = [t.transpose(0, 1) for t in (q, k, v)]
            call = FORMS[form]
        else:
            arguments = [random(batch, n, heads, head_dim).transpose(1, 2) for n in (rows, keys, keys)]
            call = F.scaled_dot_product_attention
        for name, kernel in KERNELS.items():
            try:
                with sdpa_kernel(kernel):
                    found.append((microseconds(lambda: call(*arguments)), form, name))
            except RuntimeError:  # this kernel does not take these shapes
                torch.cuda.synchronize()
    return sorted(found)


class CudaPi05:
    """One network, one set of lengths, and ways to run it."""

    def __init__(self, sizes, seed, views, tokens, horizon, steps):
        self.model, self.sizes, self.steps = pi05_network.Pi05(sizes, seed, "cuda"), sizes, steps
        image, head_dim = sizes["vision"]["image"], sizes["prefix"]["head_dim"]
        generator = torch.Generator().manual_seed(seed)
        host = (torch.randint(0, 256, (views, image, image, 3), dtype=torch.uint8, generator=generator),
                torch.randint(3, sizes["prefix"]["vocab"], (tokens,), generator=generator),
                torch.randn(horizon, ACTION_DIM, generator=generator))
        self.host = [t.pin_memory() for t in host]
        self.device = [t.cuda() for t in host]
        self.out_host, self.out = torch.empty(horizon, ACTION_DIM).pin_memory(), torch.empty(horizon, ACTION_DIM).cuda()
        self.rows = views * (image // sizes["vision"]["patch"]) ** 2 + tokens
        self.rope = [t.cuda() for t in rope_table(0, self.rows, head_dim)]
        self.rope_suffix = [t.cuda() for t in rope_table(self.rows, horizon, head_dim)]
        self.model.modulation.period = self.model.modulation.period.cuda()
        times = 1 - torch.arange(steps, dtype=torch.float64, device="cuda") / steps
        self.modulation = self.model.modulation(times)
        self.marks = [torch.cuda.Event(enable_timing=True, external=True) for _ in range(4)]
        self.kernels = dict.fromkeys(("vision", "prefix", "step"), None)
        self.attention = self.choose_attention(views, horizon)

    def choose_attention(self, views, horizon):
        v, g = self.sizes["vision"], self.sizes["prefix"]
        patches = (v["image"] // v["patch"]) ** 2
        shapes = {"vision": (("plain",), v["heads"], v["heads"], patches, patches, v["width"] // v["heads"], views),
                  "prefix": (FORMS, g["heads"], g["kv_heads"], self.rows, self.rows, g["head_dim"]),
                  "step": (FORMS, g["heads"], g["kv_heads"], horizon, self.rows + horizon, g["head_dim"])}
        report = {}
        for stage, shape in shapes.items():
            found = fastest_attention(*shape)
            report[stage] = [{"us": round(us, 2), "form": form, "kernel": kernel} for us, form, kernel in found]
            self.kernels[stage] = KERNELS[found[0][2]]
            for block in getattr(self.model, stage).blocks if stage != "vision" else ():
                block.attend = FORMS[found[0][1]]
        return report

    def stage(self, name, *arguments):
        with sdpa_kernel(self.kernels[name]):
            return getattr(self.model, name)(*arguments)

    def body(self):
        frames, ids, noise = self.device
        self.marks[0].record()
        images = self.stage("vision", frames).flatten(0, 1)
        self.marks[1].record()
        x = torch.cat([images, self.model.table[ids] * math.sqrt(self.sizes["prefix"]["width"])])
        keys, values = self.stage("prefix", x, *self.rope)
        self.marks[2].record()
        actions = noise
        for j in range(self.steps):
            velocity = self.stage("step", actions, self.modulation[j], keys, values, *self.rope_suffix)
            actions = actions - velocity / self.steps
        self.out.copy_(actions)
        self.marks[3].record()

    def call(self, run):
        """One inference, frames in host memory to actions in host memory: (wall, vision, prefix, denoise) in ms."""
        begin = time.perf_counter()
        for host, device in zip(self.host, self.device):
            device.copy_(host, non_blocking=True)
        run()
        self.out_host.copy_(self.out, non_blocking=True)
        torch.cuda.synchronize()
        wall = (time.perf_counter() - begin) * 1e3
        return wall, *(self.marks[i].elapsed_time(self.marks[i + 1]) for i in range(3))

    def compile_blocks(self):
        """Each kind of block once, not the unrolled network: what has to be compiled is small and so is the wait.

        The blocks of a stage share what was compiled for the first of them. TF32, lengths and forms of attention are
        part of it: a change afterwards compiles all again, within the call that is measured.
        """
        for stage in (self.model.vision, self.model.prefix, self.model.step):
            for block in stage.blocks:
                block.compile(fullgraph=True, dynamic=False)

    def measure(self, variant, repeat, warmup):
        """A report of one variant: eager, graph, graph-fp32 (a graph without TF32) or compiled."""
        # The FP32 parts of the network may use TF32 unless they are told not to.
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = variant != "graph-fp32"
        begin = time.perf_counter()
        if variant == "compiled":
            self.compile_blocks()
        run = self.body
        if variant != "eager":
            graph = captured(self.body)
            run = graph.replay
        prepare_s = time.perf_counter() - begin
        for _ in range(warmup):
            self.call(run)
        before = device_state()
        samples = [self.call(run) for _ in range(repeat)]
        wall, vision, prefix, denoise = (list(column) for column in zip(*samples))
        return {"prepare_s": prepare_s, "end_to_end_ms": wall,
                "stages_ms": {"vision": vision, "prefix": prefix, "denoise": denoise,
                              "step": [ms / self.steps for ms in denoise]},
                "state_before": before, "state_after": device_state()}


def device_state():
    """Clocks, power and temperature as the driver reports them; None where it does not."""
    state = {}
    for name, read in (("sm_mhz", torch.cuda.clock_rate), ("power_mw", torch.cuda.power_draw),
                       ("temperature_c", torch.cuda.temperature)):
        state[name] = None
        with contextlib.suppress(Exception):
            state[name] = read()
    return state
