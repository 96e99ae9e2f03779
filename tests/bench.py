"""Time a model file: python tests/bench.py mm_diffusion [--threads 1] [--repeat 3] [its options]

Prints seconds per forward, per forward and backward, per training step and per sampled clip (with
--stage sr: enlarged frame), clips per second, peak memory, GFLOP/s and their share of the matmul
rate measured on this machine in the same run, what part of the FLOPs is attention's, and the
loader's time per batch. Seconds are wall time, or with --cpu_time the process's own on the CPU.
Nothing is asserted.
"""

import argparse
import importlib
import resource
import sys
import time
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

sys.path.insert(0, str(Path(__file__).parent.parent))
import data  # noqa: E402

# torch counts CUDA's attention kernels, but not the CPU's.
CPU_ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
CPU_ATTENTION_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def attention_flops(q_shape, k_shape, v_shape, *args, out_shape=None, **kwargs):
    return sdpa_flop_count(q_shape, k_shape, v_shape)


def attention_backward_flops(grad_shape, q_shape, k_shape, v_shape, *args, **kwargs):
    return sdpa_backward_flop_count(grad_shape, q_shape, k_shape, v_shape)


def flops(f):
    """What f() computes -> (floating-point operations, share of them that is attention's)."""
    counts = {
        CPU_ATTENTION: attention_flops,
        CPU_ATTENTION_BACKWARD: attention_backward_flops,
    }
    with FlopCounterMode(display=False, custom_mapping=counts) as counter:
        f()
    by_operation = counter.get_flop_counts()["Global"]
    attention = sum(n for op, n in by_operation.items() if "scaled_dot_product" in str(op))
    total = counter.get_total_flops()
    return total, attention / total


def mm_diffusion(module, cfg, device):
    """-> network, loss function, data set, and a function that samples n clips or frames."""
    if cfg.stage == "sr":
        cfg = module.sr_config(cfg)
    net = module.build(cfg).to(device)
    process = module.build_process(cfg, device)

    def sample(n):
        if cfg.stage == "base":
            return module.sample(net.eval(), n)
        low = torch.zeros(n, 3, cfg.size, cfg.size, device=device)
        noise = torch.zeros(3, cfg.sr_size, cfg.sr_size, device=device)
        with torch.no_grad():
            return process.upsample(net.eval(), low, noise, cfg.sr_sample_steps)

    return net, process.loss, module.open_clips(cfg, "train"), sample


def proav_dit(module, cfg, device):
    """The same of the generator."""
    model = module.ProAV(cfg).to(device)
    return of_latents(module, model, module.ReflectedFlow(model))


def uniform_dit(module, cfg, device):
    """The same of the generator; codecs have their first weights."""
    model = module.UniForm(cfg).to(device)
    return of_latents(module, model, module.build_process(model))


def syncflow(module, cfg, device):
    """The same of both towers, as stage joint trains them, or those that --stage names."""
    stage = "joint" if cfg.stage in ("all", "vae") else cfg.stage
    model = module.SyncFlow(cfg).to(device)
    model.train_only(stage)
    return of_latents(module, model, module.Flow(model, stage))


def of_latents(module, model, process):
    """A generator of latents; with --cache_latents 0 every step encodes its clips anew."""
    cfg = model.cfg
    clips = data.open_dataset(cfg.data, "train", cfg.frames, cfg.size, cfg.fps, cfg.rate)
    latents = {}

    def loss(net, batch):
        if not cfg.cache_latents:
            return process.loss_of_clips(net, batch)
        if not latents:
            latents.update(model.encode(batch))
        return process.loss(net, {**batch, **latents})

    def sample(n):
        return module.sample(model.eval(), n, prompt="a video of a red ball bouncing")

    return model, loss, module.Captioned(clips, cfg), sample


BUILD = {
    "mm_diffusion": mm_diffusion,
    "uniform_dit": uniform_dit,
    "syncflow": syncflow,
    "proav_dit": proav_dit,
}


def seconds(f, repeat, device, clock=time.perf_counter):
    """The least time of `repeat` calls after one to warm up."""
    best = float("inf")
    for i in range(repeat + 1):
        start = clock()
        f()
        if device.type == "cuda":
            torch.cuda.synchronize()
        if i or not repeat:
            best = min(best, clock() - start)
    return best


def peak_memory(device):
    """The most memory held so far, GiB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", choices=BUILD)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeat", type=int, default=3, help="timed calls, after one [3]")
    parser.add_argument("--cpu_time", action="store_true", help="count the CPU's seconds")
    parser.add_argument("--no-sample", action="store_true", help="do not time sampling")
    args, rest = parser.parse_known_args()
    torch.set_num_threads(args.threads)
    clock = time.process_time if args.cpu_time else time.perf_counter
    module = importlib.import_module(args.model)
    cfg = module.parse(rest)
    device = module.setup(cfg)
    model, loss_fn, clips, sample = BUILD[args.model](module, cfg, device)
    net = torch.compile(model) if cfg.compile else model
    dtype = module.precision(cfg, device)
    optimizers = module.build_optimizers(model, cfg)
    B = cfg.batch_size
    batch = data.to_device(next(data.loader(clips, B, 0, 1)), device)

    def loss():
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            return loss_fn(net, batch)[0]

    def forward():
        with torch.no_grad():
            loss()

    def backward():
        model.zero_grad()
        loss().backward()

    def step():
        backward()
        for optimizer in optimizers.values():
            optimizer.step()

    forward()  # encodes what is encoded once
    a = torch.randn(2048, 2048, device=device, dtype=dtype)
    rate = 2 * 2048**3 / seconds(lambda: a @ a, 5, device, clock) / 1e9  # GFLOP/s
    size = sum(p.numel() for p in model.parameters())
    print(
        f"{args.model} {' '.join(rest)}: {size:,} parameters, batch {B}, {args.threads} threads, "
        f"{device}, {dtype}, torch {torch.__version__}"
    )
    for name, f in (("forward", forward), ("and backward", backward), ("training step", step)):
        total, attention = flops(f)
        t = seconds(f, args.repeat, device, clock)
        speed = total / t / 1e9
        print(
            f"{name:16}{t:9.3f} s {B / t:9.2f} clips/s {speed:9.1f} GFLOP/s, "
            f"{speed / rate:.0%} of a matmul's {rate:.0f}; attention is {attention:.0%} of them; "
            f"peak {peak_memory(device):.2f} GiB"
        )
    if not args.no_sample:
        t = seconds(lambda: sample(B), min(args.repeat, 1), device, clock) / B
        print(f"{'sampling':16}{t:9.3f} s a clip or frame, in batches of {B} (clips: at most 8)")
    batches = data.loader(clips, B, 0, 20)
    t = seconds(lambda: next(batches), min(args.repeat, 10), torch.device("cpu"), clock)
    print(f"{'loading':16}{t:9.4f} s a batch, in this process")


if __name__ == "__main__":
    main()
