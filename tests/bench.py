"""Time a model file: python tests/bench.py mm_diffusion [--threads 1] [--repeat 3] [options of the model file]

Prints seconds per forward, training step and sampled clip (with --stage sr: enlarged frame), clips per second, peak
memory, GFLOP/s and their share of the matmul rate measured on this machine in the same run, and the loader's time per
batch. Nothing is asserted.
"""
import argparse
import importlib
import resource
import sys
import time
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parent.parent))
import data  # noqa: E402


def mm_diffusion(module, cfg):
    """-> network, loss function, data set, and a function that samples n clips (--stage sr: enlarges n frames)."""
    net, process = module.STAGES[cfg.stage]
    net, noise = net(cfg), torch.zeros(3, cfg.sr_size, cfg.sr_size)

    def sample(n):
        if cfg.stage == "base":
            return module.sample(net.eval(), n)
        device = next(net.parameters()).device
        return module.upsample(net.eval(), torch.zeros(n, 3, cfg.size, cfg.size, device=device), noise.to(device),
                               cfg.sr_steps)

    return net, process(cfg).loss, module.open_clips(cfg, "train"), sample


def proav_dit(module, cfg):
    """The same of the generator; the latents are at hand or, with --cache_latents 0, encoded anew in every step."""
    model, cache = module.ProAV(cfg), {}
    flow = module.ReflectedFlow(model)

    def loss(net, batch):
        if cfg.cache_latents and not cache:
            cache["audio"] = model.encode(model.streams(batch["video"], batch["audio"]))[:, None]
        return flow.loss(net, {**batch, **cache})

    clips = data.open_dataset(cfg.data, "train", cfg.frames, cfg.size, cfg.fps, cfg.rate)
    return model, loss, clips, lambda n: module.sample(model.eval(), n, prompt="a video of a red ball bouncing")


BUILD = {"mm_diffusion": mm_diffusion, "proav_dit": proav_dit}


def seconds(f, repeat, device):
    """The least wall time of `repeat` calls after one to warm up."""
    best = float("inf")
    for i in range(repeat + 1):
        clock = time.perf_counter()
        f()
        if device.type == "cuda":
            torch.cuda.synchronize()
        if i or not repeat:
            best = min(best, time.perf_counter() - clock)
    return best


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=BUILD)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeat", type=int, default=3, help="timed calls, beside one to warm up [3]")
    parser.add_argument("--no-sample", action="store_true", help="do not time sampling")
    args, rest = parser.parse_known_args()
    torch.set_num_threads(args.threads)
    module = importlib.import_module(args.model)
    cfg = module.parse(rest)
    device = module.setup(cfg)
    model, loss_fn, clips, sample = BUILD[args.model](module, cfg)
    model = model.to(device)
    net = torch.compile(model) if cfg.compile else model
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(cfg.amp)
    optimizer = torch.optim.AdamW(model.parameters(), cfg.lr, fused=device.type != "mps")
    batch = data.to_device(next(data.loader(clips, cfg.batch_size, 0, 1)), device)

    def loss():
        with torch.autocast(device.type, dtype, enabled=dtype is not None):
            return loss_fn(net, batch)[0]

    def forward():
        with torch.no_grad():
            loss()

    def step():
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()

    a, b = (torch.randn(2048, 2048, device=device, dtype=dtype or torch.float32) for _ in range(2))
    rate = 2 * 2048 ** 3 / seconds(lambda: a @ b, 5, device) / 1e9
    with FlopCounterMode(display=False) as forward_flops:
        forward()
    one = seconds(forward, args.repeat, device)
    forward_peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** 20
    with FlopCounterMode(display=False) as step_flops:
        step()
    both, B = seconds(step, args.repeat, device), cfg.batch_size
    peak = torch.cuda.max_memory_allocated() / 2 ** 30 if device.type == "cuda" else \
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** 20
    batches = data.loader(clips, B, 0, 20)
    load = seconds(lambda: next(batches), min(args.repeat, 10), torch.device("cpu"))
    print(f"{args.model} {' '.join(rest)}: {sum(p.numel() for p in model.parameters()):,} parameters, batch {B}, "
          f"{args.threads} threads, {device}, {cfg.amp}, torch {torch.__version__}")
    for name, t, flops in (("forward", one, forward_flops), ("training step", both, step_flops)):
        speed = flops.get_total_flops() / t / 1e9
        share = f"{speed:9.1f} GFLOP/s, {speed / rate:.0%} of a matmul's {rate:.0f}"
        print(f"{name:16}{t:9.3f} s {B / t:9.2f} clips/s {share}")
    if not args.no_sample:
        t, sr = seconds(lambda: sample(B), 1 if args.repeat else 0, device) / B, cfg.stage == "sr"
        what = f"frame, {cfg.sr_steps} DDIM" if sr else f"clip, {cfg.sample_steps} {cfg.sampler}"
        print(f"{'sampling':16}{t:9.3f} s a {what} steps, in batches of up to {B if sr else min(B, 8)}")
    print(f"{'loading':16}{load:9.4f} s a batch, in this process")
    print(f"{'peak memory':16}{peak:9.2f} GiB ({forward_peak:.2f} after forward alone)")


if __name__ == "__main__":
    main()
