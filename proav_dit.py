"""ProAV-DiT: sound as video, both as planes, and one transformer over the planes (Sun et al. 2025, arXiv 2511.12072).

A clip's sound becomes a film of its own: one mel spectrogram per frame. An autoencoder (MDSA) projects both films onto
three planes each, (h, w), (t, w) and (t, h), with attention that links the two streams at every step. A transformer
(STDiT) takes the six planes for the frames of one short video and generates them together, by reflected flow matching:
it learns the velocity along straight lines from noise to data in the cube [-1, 1], and a sampling step that would leave
the cube bounces off its wall.

    video (B, F, 3, H, W)                        audio (B, 1, L) -> mel images (B, F, 1, M, K)        section 3.1
        | patches, TimeSformer                       | patches, TimeSformer
    u (B, F, L, L, D)                            u (B, F, L, L, D)                                    eq. 1
        | project along t, h, w                      | project along t, h, w
    planes hw (L, L), tw (F, L), th (F, L)       planes hw, tw, th                                    eq. 2
        | hw: self-attention;  tw, th: attention over t at three scales, in each stream               eq. 4, 5
        | <----- each plane attends to the other stream's plane of the same name ----->               eq. 6
    z (..., C) in (-1, 1)                        z (..., C)                 the latents, tanh(mu)
        |    stacked as 6 frames (B, 6, F or L, L, C), audio first: noise -> STDiT -> velocity        eq. 9
        | expand and add                             | expand and add                                 eq. 7
        | <----- attention to the other stream inside blocks of (t, h, w) ----->                      eq. 8
        | TimeSformer, un-embed                      | TimeSformer, un-embed, Griffin-Lim
    video                                        audio

B clips of F frames; L x L patches in each (of the waveform, L samples); M mel bands, K columns; D features; C channels.

    python proav_dit.py                                             # toy, both stages: 9 minutes on 2 cores
    torchrun --nproc_per_node=4 proav_dit.py --preset small --data concerts         # after `python data.py prepare`
    python sample.py --model proav_dit --prompt "a video of a red ball bouncing"
    python sample.py --model proav_dit --video my.mp4               # sound for a video; --audio: video for a sound

Differs from the paper, on purpose: 1. A mel image keeps its M x K cells; stretched to H x W, a linear patch would see
each number several times. Audio has patches of its own shape instead, so that the grids agree. 2. MDSA starts from the
best linear code of some clips, every residual branch at zero, and its output is not squashed. 3. LPIPS, which has to
be downloaded, is replaced by perceptual(). 4. Autoencoder and discriminators step together (PVDM: in turn). 5. Text is
read by a small encoder learned here (--text FOLDER: a T5), and captions vary in training, so that short prompts work.
6. Sound for a video and the reverse, by leading the given planes along their straight path, is ours. 7. Stage dit does
not start from an autoencoder that trivial codes beat. 8. toy has other sizes, no discriminators, --optimizer muon. 9.
toy and small turn queries and keys in the spatial blocks too (--dit_rope): with sinusoids at the input alone, rows of a
plane did not find each other in minutes, and balls jumped.

The paper is silent or contradicts itself on the following. 1. STDiT of 702 M: only 16 pairs of blocks, width 1152,
come near, with 697.5 M (16 blocks in all: 357 M; MDSA, 141.1 M, apart). 2. Patches of 4 do not make 32 x 32 latents of
256 x 256 pixels; 8 do. 3. "8192" numbers are of one modality. 4. Eq. 11's KL between pixels is about 1e-3, times 6e-6:
nothing, and yet Table 5 misses it. Ours is of the latents, to N(0, 1), summed (--kl pixel: to the letter). 5.
Attention between planes works at width d, before the projection to C channels; eq. 5 gets a residual. 6. Mel hop,
window and range, block sizes, guidance, EMA, step counts and the weights inside L_perc and L_fm are ours or PVDM's. 7.
"Linear noise schedule" is read as the straight path. 8. Planes of unequal size are padded, and the padding masked. 9.
The projection's own token is read; PVDM's code adds one but reads its neighbor.
"""
import argparse
import copy
import dataclasses
import functools
import inspect
import json
import math
import os
import re
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

import data

# ---- Config

@dataclass
class Config:
    """Every option; the defaults are the paper's or, where it is silent, those of PVDM (MDSA) and Open-Sora (STDiT)."""
    preset: str = "paper"            # the row of PRESETS that the other values start from
    data: str = "toy"                # toy, toy:bounce,glide (some of its scenes), or a set made by data.py prepare
    out: str = ""                    # folder of the run; empty: out/proav_dit/PRESET[-DATA]
    stage: str = "all"               # all, mdsa (the autoencoder) or dit (the generator); finished stages are skipped
    # the clip
    frames: int = 16                 # frames in a clip
    size: int = 256                  # height and width, pixels
    fps: int = 10                    # frames per second
    rate: int = 16000                # audio samples per second; a clip has frames * rate / fps of them
    # its sound as video (section 3.1)
    n_mels: int = 128                # mel bands: height of an audio frame
    hop: int = 25                    # samples between columns; a frame's audio has rate / fps / hop of them
    window: int = 400                # samples in the Hann window of the STFT
    n_fft: int = 1024                # length of its transform
    floor: float = 1e-3              # magnitude below which the logarithm flattens out; a full-scale sine has 1
    griffin_lim: int = 60            # iterations to find the phases
    refine: int = 0                  # L-BFGS steps on the waveform after that
    # MDSA (section 3.1, appendix 5.2)
    streams: str = "av"              # av: both; v or a: a single-stream autoencoder and generator (Tables 1, 6)
    patch: int = 8                   # height and width of a patch, pixels; audio has patches that give the same grid
    width: int = 384                 # features of a token, d
    depth: int = 8                   # layers of each encoder
    decoder_depth: int = 8           # layers of each decoder
    heads: int = 8                   # heads of their attention
    head_dim: int = 64               # channels of such a head
    ff_mult: int = 4                 # hidden width of their MLPs, in units of width
    plane_channels: int = 4          # channels of a latent plane, C
    proj_depth: int = 4              # layers of a projection; its heads have width / 8 channels
    proj_heads: int = 4              # heads of the projections and of all attention between planes
    proj_mlp: int = 512              # hidden width of a projection's MLP
    blocks: tuple = (4, 8, 8)        # t, h, w of the blocks in which the decoders meet
    mt_attn: bool = True             # attention over time at three scales (eq. 4, 5)
    gcm_attn: bool = True            # cross-attention between planes of the two streams (eq. 6)
    biblock: bool = True             # cross-attention between the two volumes (eq. 8)
    kl: str = "latent"               # latent: to N(0, 1), before tanh; pixel: eq. 11 to the letter; off
    adv: bool = True                 # discriminators of images and clips, and feature matching
    disc_width: int = 64             # their channels
    disc_start: int = 150000         # step from which the discriminators and the KL term act (eq. 12)
    need_good: bool = True           # do not go on to stage dit with an autoencoder that trivial codes beat
    mdsa_steps: int = 200000         # optimizer steps of stage mdsa
    mdsa_batch_size: int = 32        # clips per step
    mdsa_lr: float = 1e-4            # learning rate
    mdsa_betas: tuple = (0.5, 0.9)   # of AdamW
    # STDiT and its text (section 3.2)
    dit_width: int = 1152            # features of a token
    dit_depth: int = 16              # pairs of a spatial and a temporal block
    dit_heads: int = 16              # heads of their attention
    dit_rope: bool = False           # rotary positions in the spatial blocks too: what a short training needs most
    text: str = "bytes"              # bytes: an encoder learned here; else the folder of a T5 encoder
    text_width: int = 4096           # features of a word (T5 XXL: 4096)
    text_tokens: int = 300           # words read of a caption, its opening included
    guidance: float = 4.0            # strength w of classifier-free guidance; 1: none
    sampler: str = "euler"           # euler or heun, reflected
    sample_steps: int = 30           # network calls per clip (twice that with guidance)
    cache_latents: int = 0           # clips to encode once, before stage dit; 0: encode every batch as it comes
    # training of stage dit; the options from grad_accum on are of both stages
    steps: int = 400000              # optimizer steps
    batch_size: int = 64             # clips per optimizer step over ALL processes
    lr: float = 1e-4                 # AdamW learning rate
    betas: tuple = (0.9, 0.999)      # of AdamW
    grad_accum: int = 1              # parts that each process splits its share of the batch into
    lr_end: float = 1.0              # the rate falls linearly to this share of lr; 1: constant
    warmup: int = 1000               # steps of linear warm-up
    optimizer: str = "adamw"         # adamw, or muon: the same, but for an orthogonal update of every matrix
    weight_decay: float = 0.0        # of AdamW; with 0 it is Adam
    clip: float = 1.0                # largest gradient norm; 0: no clipping (the norm is logged all the same)
    ema: float = 0.9999              # decay of the averaged weights, ramped up as (1 + step) / (10 + step)
    amp: str = "auto"                # auto, bf16, fp16 or off; auto: bf16 or else fp16 on CUDA, off elsewhere
    compile: bool = False            # torch.compile the network
    device: str = "auto"             # auto (cuda, mps, cpu) or a torch device
    workers: int = 2                 # data loading processes
    seed: int = 0                    # of weights, batches, noise and samples
    init_from: str = ""              # start one stage from the weights in this checkpoint
    log_every: int = 10              # steps between rows of log.csv
    val_every: int = 5000            # steps between validations
    val_clips: int = 64              # validation clips
    save_every: int = 1000           # steps between checkpoints
    sample_every: int = 10000        # steps between samples
    samples: int = 4                 # clips to sample then and at the end


PRESETS = {
    "toy": dict(data="toy:bounce,glide,pulse", size=32, rate=8000, n_mels=64, hop=50, window=256, n_fft=512, patch=4,
                width=64, depth=1, decoder_depth=2, heads=4, head_dim=16, ff_mult=2, proj_depth=1, proj_mlp=128,
                blocks=(4, 4, 4), adv=False, disc_width=16, disc_start=350, mdsa_steps=450, mdsa_batch_size=4,
                mdsa_lr=1e-2, mdsa_betas=(0.9, 0.999), dit_width=128, dit_depth=3, dit_heads=4, dit_rope=True,
                text_width=64, text_tokens=20, guidance=2.0, cache_latents=2048, steps=1200, batch_size=8, lr=1e-2,
                optimizer="muon", lr_end=0.05, warmup=20, ema=0.99, val_every=300, val_clips=32, save_every=100,
                sample_every=1200),
    "small": dict(size=64, n_mels=64, hop=25, n_fft=512, patch=4, width=128, depth=4, decoder_depth=4, heads=4,
                  head_dim=32, proj_depth=2, proj_mlp=256, blocks=(4, 4, 4), disc_width=32, disc_start=8000,
                  mdsa_steps=10000, mdsa_batch_size=16, dit_width=384, dit_depth=6, dit_heads=6, dit_rope=True,
                  text_width=256, text_tokens=24, cache_latents=20000, steps=20000, lr=3e-4, warmup=200, ema=0.999,
                  val_every=1000),
    "paper": {},
}


def parse(argv=None, base=None):
    """Command line -> Config: the preset's values, or those of `base`, then the options given. Exits with one line
    when an option or a value is wrong."""
    def numbers(text):
        return tuple(float(x) if "." in x else int(x) for x in text.split(",") if x)

    def truth(text):
        return bool(("false", "true").index(text.lower()))

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.error = lambda message: die(f"{Path(__file__).name}: {message} (--help lists the options)")
    choices = {"preset": PRESETS, "stage": ("all", "mdsa", "dit"), "streams": ("av", "v", "a"), "sampler": SAMPLERS,
               "kl": ("latent", "pixel", "off"), "optimizer": ("adamw", "muon"), "amp": ("auto", "bf16", "fp16", "off")}
    remarks = dict(re.findall(r"^    (\w+): .*?# (.*)$", inspect.getsource(Config), re.M))
    for f in dataclasses.fields(Config):
        default = ",".join(map(str, f.default)) if f.type is tuple else f.default
        kind = {tuple: numbers, bool: truth}.get(f.type, f.type)
        parser.add_argument("--" + f.name, type=kind, choices=choices.get(f.name), metavar=f.type.__name__,
                            default=argparse.SUPPRESS, help=f"{remarks[f.name]} [{default}]")
    given = vars(parser.parse_args(argv))
    source = given.get("data", Config.data).split(":")[0]
    preset = given.get("preset", source if source in PRESETS else "paper")
    cfg = Config(**{**(dataclasses.asdict(base) if base else {**PRESETS[preset], "preset": preset}), **given})
    if wrong := check(cfg):
        parser.error(wrong)
    own = PRESETS[preset].get("data", preset)
    name = preset if given.get("data", own) == own else re.sub(r"\W", "-", f"{preset}-{cfg.data}")
    cfg.out = cfg.out or f"out/{Path(__file__).stem}/{name}"
    return cfg


def check(cfg):
    """The first thing wrong with a config, as a sentence, or None."""
    for f in dataclasses.fields(cfg):
        least = f.name not in ("warmup", "workers", "seed", "refine", "griffin_lim", "disc_start", "cache_latents")
        if f.type is int and getattr(cfg, f.name) < least:
            return f"--{f.name} {getattr(cfg, f.name)} is too small"
    parts, samples = int(os.environ.get("WORLD_SIZE", 1)) * cfg.grad_accum, cfg.rate / cfg.fps
    side, columns = max(1, cfg.size // cfg.patch), int(samples) // cfg.hop
    rules = {
        "--init_from starts one stage: add --stage mdsa or --stage dit": cfg.init_from and cfg.stage == "all",
        f"--batch_size and --mdsa_batch_size must divide by {parts} (processes x --grad_accum)":
            cfg.batch_size % parts or cfg.mdsa_batch_size % parts,
        "--size must be an even number of --patch": cfg.size % (2 * cfg.patch),
        "--frames, --size, --n_mels and --rate / --fps / --hop must divide by 4":
            cfg.frames % 4 or cfg.size % 4 or cfg.n_mels % 4 or columns % 4,
        "--betas and --mdsa_betas need two numbers below 1":
            any(len(b) != 2 or max(b) >= 1 for b in (cfg.betas, cfg.mdsa_betas)),
        "--floor must be above 0": cfg.floor <= 0,
        "--rate / --fps must be a multiple of --hop": samples % cfg.hop,
        f"--n_mels ({cfg.n_mels}) and --rate / --fps / --hop ({columns}) must divide by --size / --patch ({side})":
            cfg.n_mels % side or columns % side or not columns,
        "--window must not exceed --n_fft": cfg.window > cfg.n_fft,
        f"--blocks needs three numbers that divide {cfg.frames}, {side} and {side}": len(cfg.blocks) != 3 or any(
            b < 1 or n % b for n, b in zip((cfg.frames, side, side), cfg.blocks, strict=False)),
        "--width must divide by 8 and, with an even quotient, by --proj_heads":
            cfg.width % 8 or cfg.width % (2 * cfg.proj_heads),
        "--head_dim must divide by 4": cfg.head_dim % 4,
        "--dit_width must divide by 4 and, with an even quotient, by --dit_heads":
            cfg.dit_width % 4 or cfg.dit_width % (2 * cfg.dit_heads),
        "--disc_width must divide by 4": cfg.disc_width % 4,
        "--text_tokens must be 2 or more": cfg.text_tokens < 2,
        f"--text {cfg.text} is not the folder of a T5, or its words do not have --text_width {cfg.text_width} features":
            cfg.text != "bytes" and t5_width(cfg.text) != cfg.text_width,
    }
    return next((sentence for sentence, wrong in rules.items() if wrong), None)


# same as mm_diffusion.py
def die(message):
    """End with one sentence on stderr, printed once however many processes run."""
    if int(os.environ.get("RANK", 0)):
        time.sleep(5)                # torchrun stops all processes when the first one ends: let rank 0 speak
    sys.exit(message if int(os.environ.get("RANK", 0)) == 0 else 1)


# ---- Audio as video (section 3.1): per frame one image, rows low to high pitch, columns time.

class Mel(nn.Module):
    """Waveform <-> mel images. One STFT over the whole clip, not one per frame: no seams where frames meet."""
    def __init__(self, cfg):
        super().__init__()
        self.cfg, self.columns = cfg, cfg.rate // cfg.fps // cfg.hop             # columns per frame
        f = torch.arange(cfg.n_fft // 2 + 1) * cfg.rate / cfg.n_fft              # Hz
        top = 2595 * math.log10(1 + cfg.rate / 1400)                             # HTK mel of rate / 2
        edges = 700 * (10 ** (torch.linspace(0, top, cfg.n_mels + 2) / 2595) - 1)
        low, mid, high = edges[:-2, None], edges[1:-1, None], edges[2:, None]
        bank = torch.minimum((f - low) / (mid - low), (high - f) / (high - mid)).clamp(min=0)
        bank = bank / bank.sum(1, keepdim=True).clamp(min=1e-8)                  # (M, bins), triangles of sum 1
        self.register_buffer("bank", bank, persistent=False)
        self.register_buffer("window", torch.hann_window(cfg.window), persistent=False)

    def stft(self, x):
        """(B, L) -> (B, bins, L / hop + 1); column k is centered on sample k * hop; a full-scale sine has size 1."""
        cfg = self.cfg
        spectrum = torch.stft(x.float(), cfg.n_fft, cfg.hop, cfg.window, self.window, return_complex=True)
        return spectrum / (self.window.sum() / 2)

    def forward(self, audio):
        """(B, 1, L) -> (B, F, 1, M, K) in [-1, 1]: log of the magnitude above a soft floor."""
        with torch.autocast(audio.device.type, enabled=False):
            m = self.bank @ self.stft(audio[:, 0]).abs()[..., :-1]               # (B, M, F * K)
        a = torch.log1p(m / self.cfg.floor) / math.log1p(1 / self.cfg.floor)
        return (2 * a - 1).unflatten(2, (-1, self.columns)).transpose(1, 2)[:, :, None]

    def inverse(self, A):
        """(B, F, 1, M, K) -> (B, L): bins that explain the bands, then phases by Griffin-Lim (fast, momentum 0.99)."""
        cfg = self.cfg
        m = cfg.floor * torch.expm1((A[:, :, 0].transpose(1, 2).flatten(2).clamp(-1, 1) + 1) / 2
                                    * math.log1p(1 / cfg.floor))                 # (B, M, F * K)
        m = F.pad(m, (0, 1), mode="replicate")
        size = (torch.linalg.pinv(self.bank) @ m).clamp(min=1e-6)                # (B, bins, L / hop + 1)
        for _ in range(100):                         # least squares without negative bins, by Lee and Seung's update
            size = size * (self.bank.T @ m) / (self.bank.T @ (self.bank @ size) + 1e-9)
        draw, length = torch.Generator().manual_seed(0), cfg.frames * cfg.rate // cfg.fps
        angle = torch.rand(size.shape[1:], generator=draw).to(size.device) * 2 * math.pi
        phase, before = torch.polar(torch.ones_like(angle), angle), 0
        scale = self.window.sum() / 2

        def wave(phase):
            return torch.istft(size * phase * scale, cfg.n_fft, cfg.hop, cfg.window, self.window, length=length)

        for _ in range(cfg.griffin_lim):
            new = self.stft(wave(phase))
            phase, before = new - 0.99 / 1.99 * before, new
            phase = phase / (phase.abs() + 1e-12)
        x = wave(phase)
        return torch.cat(list(map(self.refined, x.split(1), A.split(1)))) if cfg.refine else x

    @torch.enable_grad()
    def refined(self, x, A):
        """Fit a waveform (1, L) itself to its mel images by L-BFGS."""
        x = x.clone().requires_grad_()
        lbfgs = torch.optim.LBFGS([x], max_iter=self.cfg.refine, line_search_fn="strong_wolfe")

        def error():
            lbfgs.zero_grad()
            loss = 1e3 * (self(x[:, None]) - A).square().mean()
            loss.backward()
            return loss
        lbfgs.step(error)
        return x.detach()


def psnr(x, y):
    """10 log10(2^2 / MSE) of clips in [-1, 1], averaged over the batch, in dB."""
    return (10 * torch.log10(4 / (x.float() - y.float()).square().flatten(1).mean(1).clamp(min=1e-12))).mean()


# ---- MDSA (section 3.1). Features are channels-last: u (B, F, L, L, D); a plane (B, rows, columns, D).

PLANES = {"hw": 1, "tw": 2, "th": 3}                 # each with the axis of u (B, t, h, w, D) that it leaves out


# same as mm_diffusion.py
def zeroed(module):
    """Zero a layer's parameters: its residual branch starts as nothing, and the fresh network outputs 0."""
    for p in module.parameters():
        nn.init.zeros_(p)
    return module


# same as mm_diffusion.py
def attend(q, k, v, heads):
    """softmax(q k^T / sqrt(d)) v, eq. 8: q (B, N, C), k and v (B, M, C), a head is a run of d channels -> (B, N, C)."""
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))  # (B, heads, N or M, d)
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)    # (B, N, C)


def rotate(x, turn):
    """Rotary position: turn the channel pairs (2i, 2i + 1) of each head of x (B, N, heads, d); turn (2, N, 1, d)."""
    return x * turn[0] + x.unflatten(-1, (-1, 2)).flip(-1).flatten(-2) * turn[1]


def turning(angles):
    """Angles (N, d) -> what rotate() needs: (2, N, 1, d), cosines and sines with the signs of a rotation."""
    signs = torch.tensor([-1.0, 1.0], device=angles.device).repeat(angles.shape[-1] // 2)
    return torch.stack([angles.cos(), angles.sin() * signs])[:, :, None]


@functools.lru_cache
def line(n, dim, device=None, pvdm=False):
    """Turns of positions 0 ... n - 1 at the frequencies 10000^(-2i / dim). PVDM's code gives the two channels of a pair
    different ones, which is no rotation: kept for the comparison with it alone."""
    angles = torch.arange(n, device=device)[:, None] * 10000 ** (-torch.arange(0, dim, 2, device=device) / dim)
    return turning(torch.cat([angles, angles], -1) if pvdm else angles.repeat_interleave(2, -1))


@functools.lru_cache
def grid(shape, dim, device=None):
    """Turns of the N places of a grid: each axis has its share of the channel pairs and runs from -pi to pi, times
    scales from 1 to 5."""
    count = dim // 2 // len(shape)
    scales = math.pi * torch.logspace(0, math.log2(5), count, base=2, device=device)
    axes = torch.meshgrid(*[torch.linspace(-1, 1, n, device=device) for n in shape], indexing="ij")
    angles = torch.stack([x.flatten()[:, None] * scales for x in axes], 1)       # (N, axes, count)
    return turning(F.pad(angles.flatten(1).repeat_interleave(2, -1), (0, dim - 2 * count * len(shape))))


class Attention(nn.Module):
    """Attention from x (B, N, D) to itself, or to c (B, M, D)."""
    def __init__(self, width, heads, head_dim):
        super().__init__()
        self.heads = heads
        self.to_qkv = nn.Linear(width, 3 * heads * head_dim, bias=False)
        self.to_out = zeroed(nn.Linear(heads * head_dim, width))

    def forward(self, x, turn=None, c=None):
        if c is None:
            q, k, v = self.to_qkv(x).chunk(3, dim=-1)                            # (B, N, heads * head_dim) each
        else:
            wq, wk, wv = self.to_qkv.weight.chunk(3)
            q, k, v = F.linear(x, wq), F.linear(c, wk), F.linear(c, wv)
        if turn is not None:
            q, k = (rotate(y.unflatten(-1, (self.heads, -1)), turn).flatten(2) for y in (q, k))
        return self.to_out(attend(q, k, v, self.heads))


class GEGLU(nn.Module):
    def forward(self, x):
        x, gate = x.chunk(2, dim=-1)
        return x * F.gelu(gate)


class PreNorm(nn.Module):
    """fn(LayerNorm(x), ...), to be added to x: fn ends in a layer of zeros, so that the branch starts as nothing."""
    def __init__(self, width, fn):
        super().__init__()
        self.norm, self.fn = nn.LayerNorm(width), fn

    def forward(self, x, *more):
        return self.fn(self.norm(x), *more)


class TimeSformer(nn.Module):
    """depth x (attention over time at each place, over space in each frame, gated MLP): (B, F, L, L, D) -> the same."""
    def __init__(self, width, depth, heads, head_dim, ff_mult, pvdm=False):
        super().__init__()
        self.head_dim, self.pvdm, inner = head_dim, pvdm, ff_mult * width

        def layer():
            attention = (PreNorm(width, Attention(width, heads, head_dim)) for _ in range(2))
            mlp = nn.Sequential(nn.Linear(width, 2 * inner), GEGLU(), zeroed(nn.Linear(inner, width)))
            return nn.ModuleList([*attention, PreNorm(width, mlp)])

        self.layers = nn.ModuleList(layer() for _ in range(depth))

    def forward(self, x):
        B, T, L = x.shape[:3]
        time = line(T, self.head_dim, x.device, self.pvdm)
        space = grid((L, L), self.head_dim, x.device)
        x = x.flatten(2, 3)                                                      # (B, F, N, D), N = L * L
        for over_time, over_space, mlp in self.layers:
            y = over_time(x.transpose(1, 2).flatten(0, 1), time)                 # (B*N, F, D)
            x = x + y.unflatten(0, (B, -1)).transpose(1, 2)
            x = x + over_space(x.flatten(0, 1), space).view_as(x)                # (B*F, N, D)
            x = x + mlp(x)
        return x.unflatten(2, (L, L))


class Projection(nn.Module):
    """Eq. 2: n tokens along one axis and a token of our own (B, n, D) -> that token after a small transformer (B, D).
    The token starts as the mean of the others. (PVDM starts it anywhere and reads the first of the others.)"""
    def __init__(self, n, cfg, pvdm=False):
        super().__init__()
        d, self.pvdm = cfg.width, pvdm
        self.token = nn.Parameter(torch.zeros(d))
        self.table = nn.Parameter(torch.cat([torch.randn(n, d) / 2, torch.zeros(1, d)]))
        self.layers = nn.ModuleList(nn.ModuleList([
            PreNorm(d, Attention(d, cfg.proj_heads, d // 8)),
            PreNorm(d, nn.Sequential(nn.Linear(d, cfg.proj_mlp), nn.GELU(), zeroed(nn.Linear(cfg.proj_mlp, d)))),
        ]) for _ in range(cfg.proj_depth))

    def forward(self, x):
        token = self.token + (0 if self.pvdm else x.mean(1, keepdim=True))
        x = torch.cat([x, token.expand(len(x), 1, -1)], 1) + self.table          # (B, n + 1, D)
        for attention, mlp in self.layers:
            x = x + attention(x)
            x = x + mlp(x)
        return x[:, 0 if self.pvdm else -1]


class MTSelfAttention(nn.Module):
    """Eq. 4, 5: a plane (B, F, S, D) attends over time at 1, 1/2 and 1/4 of its rate; the sum is added to it."""
    scales = (1, 2, 4)
    def __init__(self, width, heads):
        super().__init__()
        self.head_dim = width // heads
        self.attention = nn.ModuleList(PreNorm(width, Attention(width, heads, self.head_dim)) for _ in self.scales)
        for branch in self.attention:                # here the next layer is the last: two zeros would never learn
            branch.fn.to_out.reset_parameters()
        self.up = nn.ModuleList(zeroed(nn.ConvTranspose1d(width, width, k, stride=k)) for k in self.scales)

    def forward(self, z):
        x, out = z.transpose(1, 2).flatten(0, 1).mT, 0                           # (B*S, D, F)
        for k, attention, up in zip(self.scales, self.attention, self.up, strict=True):
            y = F.avg_pool1d(x, k).mT                                            # (B*S, F/k, D)
            out = out + up(attention(y, line(y.shape[1], self.head_dim, y.device)).mT)
        return z + out.mT.unflatten(0, (len(z), -1)).transpose(1, 2)


class CrossPair(nn.Module):
    """Eq. 6 both ways: v + CA(v, a), a + CA(a, v) for tokens (B, N, D), each from the other as it was before."""
    def __init__(self, width, heads):
        super().__init__()
        self.v_norm, self.a_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.v_from_a, self.a_from_v = (Attention(width, heads, width // heads) for _ in range(2))

    def forward(self, v, a, turn):
        hv, ha = self.v_norm(v), self.a_norm(a)
        return v + self.v_from_a(hv, turn, ha), a + self.a_from_v(ha, turn, hv)


class Stream(nn.Module):
    """One modality: its encoder to three planes, and its decoder. patch: height and width of a patch."""
    def __init__(self, cfg, channels, patch, pvdm=False):
        super().__init__()
        d, C, self.patch = cfg.width, cfg.plane_channels, patch
        pixels, side = channels * patch[0] * patch[1], cfg.size // cfg.patch
        kind = (cfg.heads, cfg.head_dim, cfg.ff_mult, pvdm)
        lengths = {"hw": cfg.frames, "tw": side, "th": side}
        self.to_patch = nn.Linear(pixels, d)
        self.encoder = TimeSformer(d, cfg.depth, *kind)
        self.project = nn.ModuleDict({k: Projection(n, cfg, pvdm) for k, n in lengths.items()})
        self.within = nn.ModuleDict({"hw": PreNorm(d, Attention(d, cfg.proj_heads, d // cfg.proj_heads))})
        if cfg.mt_attn:
            self.within.update({k: MTSelfAttention(d, cfg.proj_heads) for k in ("tw", "th")})
        self.pre = nn.ModuleDict({k: nn.Linear(d, 2 * C) for k in PLANES})       # mean and log-variance, before tanh
        self.post = nn.ModuleDict({k: nn.Linear(C, d) for k in PLANES})
        self.decoder = TimeSformer(d, cfg.decoder_depth, *kind)
        self.to_pixel = nn.Linear(d, pixels)

    def patches(self, x):
        """(B, F, C, H, W) -> (B, F, L, L, p * q * C), channels fastest."""
        p, q = self.patch
        x = x.unflatten(4, (-1, q)).unflatten(3, (-1, p))                        # (B, F, C, L, p, L, q)
        return x.permute(0, 1, 3, 5, 4, 6, 2).flatten(4)

    def pixels(self, x):
        """The inverse of patches()."""
        p, q = self.patch
        x = x.unflatten(4, (p, q, -1))                                           # (B, F, L, L, p, q, C)
        return x.permute(0, 1, 6, 2, 4, 3, 5).flatten(5).flatten(3, 4)

    def planes(self, x):
        """Pixels -> {plane: (B, rows, columns, D)} (eq. 1, 2)."""
        u, out = self.encoder(self.to_patch(self.patches(x))), {}
        for k, axis in PLANES.items():
            tokens = u.movedim(axis, 3)                                          # (B, rows, columns, n, D)
            out[k] = self.project[k](tokens.flatten(0, 2)).view(*tokens.shape[:3], -1)
        return out

    def attend_within(self, planes):
        """Spatial self-attention of hw; attention over time of tw and th (eq. 4, 5)."""
        hw, out = planes["hw"], dict(planes)
        turn = grid(hw.shape[1:3], hw.shape[3] // self.within["hw"].fn.heads, hw.device)
        out["hw"] = hw + self.within["hw"](hw.flatten(1, 2), turn).view_as(hw)
        return out | {k: self.within[k](planes[k]) for k in ("tw", "th") if k in self.within}

    def expand(self, z):
        """Eq. 7: planes of C channels -> their sum over the volume (B, F, L, L, D)."""
        return sum(self.post[k](z[k]).unsqueeze(axis) for k, axis in PLANES.items())

    def render(self, Z):
        return self.pixels(self.to_pixel(self.decoder(Z)))


class MDSA(nn.Module):
    """The autoencoder. x and z are dicts of the streams at hand: {"v": video, "a": mel images} of (B, F, C, H, W), and
    {"v": {"hw": (B, L, L, C), "tw": (B, F, L, C), "th": (B, F, L, C)}, "a": ...} in (-1, 1)."""
    def __init__(self, cfg):
        super().__init__()
        self.cfg, d, side = cfg, cfg.width, cfg.size // cfg.patch
        columns = cfg.rate // cfg.fps // cfg.hop
        kinds = {"v": (3, (cfg.patch, cfg.patch)), "a": (1, (cfg.n_mels // side, columns // side))}
        self.streams = nn.ModuleDict({k: Stream(cfg, *kind) for k, kind in kinds.items() if k in cfg.streams})
        both = cfg.streams == "av"
        self.gcm = nn.ModuleDict({k: CrossPair(d, cfg.proj_heads) for k in PLANES if cfg.gcm_attn and both})
        self.biblock = CrossPair(d, cfg.proj_heads) if cfg.biblock and both else None

    def encode(self, x):
        """-> {stream: {plane: (mean, log-variance), each (B, rows, columns, C), before tanh}}"""
        planes = {k: self.streams[k].attend_within(self.streams[k].planes(x[k])) for k in x}
        for k, pair in self.gcm.items() if len(x) == 2 else ():
            v, a = planes["v"][k], planes["a"][k]
            turn = grid(v.shape[1:3], v.shape[3] // self.cfg.proj_heads, v.device)
            out = pair(v.flatten(1, 2), a.flatten(1, 2), turn)
            planes["v"][k], planes["a"][k] = (y.view_as(v) for y in out)
        return {m: {k: self.streams[m].pre[k](y).chunk(2, -1) for k, y in p.items()} for m, p in planes.items()}

    def decode(self, z):
        Z = {m: self.streams[m].expand(planes) for m, planes in z.items()}       # (B, F, L, L, D)
        if self.biblock is not None and len(Z) == 2:
            turn = grid(self.cfg.blocks, self.cfg.width // self.cfg.proj_heads, Z["v"].device)
            out = self.biblock(*(self.cut(Z[m]) for m in "va"), turn)
            Z = {m: self.cut(y, Z[m].shape) for m, y in zip("va", out, strict=True)}
        return {m: self.streams[m].render(Y) for m, Y in Z.items()}

    def cut(self, x, whole=None):
        """(B, F, L, L, D) -> its blocks (B * count, bt * bh * bw, D); with the whole's shape: back."""
        bt, bh, bw = self.cfg.blocks
        if whole is None:
            x = x.unflatten(3, (-1, bw)).unflatten(2, (-1, bh)).unflatten(1, (-1, bt))   # (B, T, bt, Y, bh, X, bw, D)
            return x.permute(0, 1, 3, 5, 2, 4, 6, 7).flatten(4, 6).flatten(0, 3)
        B, T, L, _, D = whole
        x = x.view(B, T // bt, L // bh, L // bw, bt, bh, bw, D)
        return x.permute(0, 1, 4, 2, 5, 3, 6, 7).reshape(whole)

    def forward(self, x, noise=False):
        """x -> reconstruction, latents z = tanh(mean) or, with noise, tanh(mean + deviation * eps); KL to N(0, 1)."""
        codes, z, kl = self.encode(x), {}, {}
        for m, planes in codes.items():
            z[m] = {k: torch.tanh(mu + (0.5 * logvar).exp() * torch.randn_like(mu) if noise else mu)
                    for k, (mu, logvar) in planes.items()}
            kl[m] = sum((mu ** 2 + logvar.exp() - 1 - logvar).flatten(1).sum(1).mean() / 2
                        for mu, logvar in planes.values())
        return self.decode(z), z, kl


@torch.no_grad()
def start_closed_form(mdsa, x):
    """Set the linear layers of a fresh MDSA, whose residual branches are all zero, to the best linear code of the clips
    x: principal directions of patches, then of patches averaged along each axis, and least squares back. Trained from
    random weights for minutes instead, small autoencoders ended below a constant color."""
    mdsa.double()                                    # so that two runs start from the same bits
    x = {m: y.double() for m, y in x.items()}
    for m, stream in mdsa.streams.items():
        p = stream.patches(x[m]).flatten(0, 3)                                   # (n, P)
        mean = p.mean(0)
        values, axes = torch.linalg.eigh((p - mean).T @ (p - mean) / len(p))
        n = min(len(values), mdsa.cfg.width)
        values, axes = values.flip(0)[:n].clamp(min=1e-3 * values[-1]), axes.flip(1)[:, :n]      # (n,), (P, n)
        for p in (stream.to_patch.weight, stream.to_pixel.weight):
            nn.init.normal_(p, std=1e-3)
        stream.to_patch.weight[:n] = (axes / values.sqrt()).T
        stream.to_patch.bias.zero_()[:n] = -(axes / values.sqrt()).T @ mean
        stream.to_pixel.weight[:, :n] = axes * values.sqrt()
        stream.to_pixel.bias.copy_(mean)
        u, z, C = stream.to_patch(stream.patches(x[m])), {}, mdsa.cfg.plane_channels
        for k, axis in PLANES.items():
            plane = u.mean(axis)                                                 # (B, rows, columns, D)
            y = stream.to_pixel(plane).flatten(0, 2)                             # (n, P): distances as in pixels
            values, axes = torch.linalg.eigh((y - y.mean(0)).T @ (y - y.mean(0)) / len(y))
            rows = axes.flip(1)[:, :C].T / values.flip(0)[:C, None].clamp(min=1e-8).sqrt() * 0.6     # (C, P)
            nn.init.zeros_(stream.pre[k].weight)
            stream.pre[k].weight[:len(rows)] = rows @ stream.to_pixel.weight
            stream.pre[k].bias.zero_()[C:] = -4                                  # log-variance: a deviation of 0.14
            stream.pre[k].bias[:len(rows)] = rows @ (stream.to_pixel.bias - y.mean(0))
            z[k] = torch.tanh(stream.pre[k](plane)[..., :C]).unsqueeze(axis).expand(*u.shape[:4], -1)
        Z = torch.cat([*z.values(), torch.ones_like(u[..., :1])], -1).flatten(0, 3)              # (n, 3 C + 1)
        fit = torch.linalg.lstsq(Z.T @ Z + 1e-4 * len(Z) * torch.eye(Z.shape[1], dtype=Z.dtype),
                                 Z.T @ u.flatten(0, 3)).solution                 # (3 C + 1, D)
        for i, k in enumerate(PLANES):
            stream.post[k].weight.copy_(fit[i * C:(i + 1) * C].T)
            stream.post[k].bias.copy_(fit[-1] / 3)
    mdsa.float()


# ---- The losses of MDSA (eq. 10-12)

class PatchDiscriminator(nn.Module):
    """PatchGAN over images (dims = 2) or clips (3): x -> the outputs of its layers, the last being the logits."""
    def __init__(self, dims, channels, width):
        super().__init__()
        conv, widths = (nn.Conv2d, nn.Conv3d)[dims - 2], [channels, width, 2 * width, 4 * width, 8 * width, 1]
        self.layers = nn.ModuleList(
            nn.Sequential(conv(i, o, 4, 2 if n < 3 else 1, 2),
                          nn.GroupNorm(min(8, o), o) if 0 < n < 4 else nn.Identity(),
                          nn.LeakyReLU(0.2) if n < 4 else nn.Identity())
            for n, (i, o) in enumerate(zip(widths, widths[1:])))  # noqa: B905
        for module in self.modules():
            if isinstance(module, conv):
                nn.init.normal_(module.weight, std=0.02)

    def forward(self, x):
        out = []
        for layer in self.layers:
            x = layer(x)
            out.append(x)
        return out


def perceptual(x, y):
    """How different images (N, C, H, W) look; put LPIPS here if you have its weights. This stands in for it: the L1
    distance of three levels of their Laplacian pyramids."""
    total, d = 0, x - y                              # the pyramid is linear: that of the difference will do
    for _ in range(2):
        low = F.avg_pool2d(d, 2)
        total, d = total + (d - F.interpolate(low, scale_factor=2.0)).abs().mean(), low
    return total + d.abs().mean()


class Autoencoding(nn.Module):
    """What stage one trains: the MDSA and, with cfg.adv, the discriminators of images and of clips of each stream."""
    def __init__(self, cfg):
        super().__init__()
        self.cfg, self.mdsa, self.mel = cfg, MDSA(cfg), Mel(cfg)
        channels = {"v": 3, "a": 1}
        self.critics = nn.ModuleDict({m: nn.ModuleList(PatchDiscriminator(d, channels[m], cfg.disc_width)
                                                       for d in (2, 3)) for m in cfg.streams if cfg.adv})

    def streams(self, video, audio):
        """What the MDSA takes: video (B, F, 3, H, W) and waveform (B, 1, L), either None -> {"v": ..., "a": ...}"""
        x = {"v": video, "a": None if audio is None else self.mel(audio)}
        return {m: y for m, y in x.items() if m in self.cfg.streams and y is not None}

    def forward(self, video, audio, second):
        """-> loss (eq. 10), {name: part}; second: past the threshold of eq. 12."""
        cfg, x, total, parts = self.cfg, self.streams(video, audio), 0, {}
        out, _, kl = self.mdsa(x, noise=second and cfg.kl == "latent")
        for m, name in (("v", "video"), ("a", "audio")):
            if m not in x:
                continue
            real, fake = x[m], out[m].float()
            l1 = (real - fake).abs().mean()
            loss = 4 * l1 + 4 * perceptual(real.flatten(0, 1), fake.flatten(0, 1))
            if second and cfg.kl == "latent":
                loss = loss + 6e-6 * kl[m]
            if second and cfg.kl == "pixel":         # eq. 11 to the letter: as distributions over the clip's pixels
                p, q = (y.flatten(1).log_softmax(1) for y in (real, fake))
                loss = loss + 6e-6 * F.kl_div(p, q, reduction="batchmean", log_target=True)
            if m in self.critics:
                gan, critic = self.adversarial(m, real, fake) if second else (0, 0)
                zero = sum(p.sum() for p in self.critics[m].parameters()) * 0    # DDP wants to see every parameter
                loss = loss + gan + critic + zero
            total, parts[name] = total + 0.5 * loss, l1.detach()
        return total, parts

    def adversarial(self, m, real, fake):
        """-> (loss of the autoencoder, loss of the critics): hinge and feature matching (PVDM's weights, 1 and 4). One
        backward serves both: the critics' weights get no gradient from the former, the clips none from the latter."""
        gan = critic = 0
        frame = int(torch.randint(real.shape[1], ()))
        views = (lambda x: x[:, frame]), (lambda x: x.transpose(1, 2))           # (B, C, H, W), (B, C, F, H, W)
        for net, view in zip(self.critics[m], views, strict=True):
            *_, r = net(view(real))
            *_, f = net(view(fake.detach()))
            critic = critic + 0.5 * (F.relu(1 - r).mean() + F.relu(1 + f).mean())
            frozen = {k: p.detach() for k, p in net.named_parameters()}
            *deep, logits = torch.func.functional_call(net, frozen, (view(fake),))
            with torch.no_grad():
                *goal, _ = net(view(real))
            gan = gan - logits.mean() + 4 * sum((a - b).abs().mean() for a, b in zip(deep, goal, strict=True))
        return gan, critic


# ---- The generator: STDiT of Open-Sora 1.2 (section 3.2) over the planes as frames; a block has that code's names.

class SelfAttention(nn.Module):
    """(N, n, D) -> (N, n, D); queries and keys are normed per head, then turned. mask (N, 1, 1, n): keys that count."""
    def __init__(self, width, heads):
        super().__init__()
        self.heads, d = heads, width // heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.q_norm, self.k_norm = nn.RMSNorm(d, eps=1e-6), nn.RMSNorm(d, eps=1e-6)

    def forward(self, x, turn=None, mask=None):
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).unbind(2)       # (N, n, heads, d) each
        q, k = self.q_norm(q.float()).to(v), self.k_norm(k.float()).to(v)
        if turn is not None:
            q, k = rotate(q, turn), rotate(k, turn)
        q, k, v = (y.transpose(1, 2) for y in (q, k, v))                         # (N, heads, n, d)
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.proj(x.transpose(1, 2).flatten(2))


class CrossAttention(nn.Module):
    """(B, N, D) from the words y (B, M, D), of which mask (B, M) tells the real ones -> (B, N, D)."""
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.q_linear, self.kv_linear = nn.Linear(width, width), nn.Linear(width, 2 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x, y, mask=None):
        q = self.q_linear(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)     # (B, heads, N, d)
        k, v = self.kv_linear(y).unflatten(-1, (2, self.heads, -1)).transpose(1, 3).unbind(2)    # (B, heads, M, d)
        mask = None if mask is None else mask[:, None, None]
        return self.proj(F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    def __init__(self, i, hidden, o):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(i, hidden), nn.Linear(hidden, o)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class STDiT3Block(nn.Module):
    """Attention inside each frame (spatial) or along time at each place (temporal), to the text, MLP; two of the three
    modulated and gated by the time embedding (adaLN-single)."""
    def __init__(self, width, heads, temporal=False):
        super().__init__()
        self.temporal, self.head_dim = temporal, width // heads
        self.scale_shift_table = nn.Parameter(torch.randn(6, width) / width ** 0.5)
        self.attn, self.cross_attn = SelfAttention(width, heads), CrossAttention(width, heads)
        self.mlp = Mlp(width, 4 * width, width)

    def forward(self, x, y, t6, y_mask=None, valid=None, turn=None):
        """x (B, T, S, D); y (B, M, D) with y_mask (B, M); t6 (B, 1 or T, 6 * D); valid (T, S): tokens that exist; turn:
        rotary positions of the S places, for a spatial block."""
        table = self.scale_shift_table + t6.unflatten(-1, (6, -1))               # (B, 1 or T, 6, D)
        shift1, scale1, gate1, shift2, scale2, gate2 = table[:, :, :, None].unbind(2)    # (B, 1 or T, 1, D) each
        h = F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale1) + shift1
        if self.temporal:
            h, turn = h.transpose(1, 2), line(x.shape[1], self.head_dim, x.device)               # (B, S, T, D)
            valid = None if valid is None else valid.T
        mask = None if valid is None else valid.repeat(len(x), 1)[:, None, None]
        h = self.attn(h.flatten(0, 1), turn, mask).view(h.shape)
        x = x + gate1 * (h.transpose(1, 2) if self.temporal else h)
        x = x + self.cross_attn(x.flatten(1, 2), y, y_mask).view(x.shape)
        return x + gate2 * self.mlp(F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale2) + shift2)


# same as mm_diffusion.py
def time_embedding(t, dim):
    """Sinusoids of the diffusion step, cosines first: (B,) -> (B, dim)."""
    freqs = torch.exp(-math.log(10000) / (dim // 2) * torch.arange(dim // 2, device=t.device))
    angles = t.float()[:, None] * freqs
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def place_embedding(rows, columns, dim, device=None):
    """Fixed sinusoids (rows * columns, dim): half of the channels tell the column, half the row."""
    freqs = 10000 ** (-torch.arange(dim // 4, device=device) * 4 / dim)
    half = [torch.cat([a.sin(), a.cos()], -1) for a in (torch.arange(n, device=device)[:, None] * freqs
                                                         for n in (rows, columns))]
    return torch.cat([half[1].repeat(rows, 1), half[0].repeat_interleave(columns, 0)], -1)


class STDiT(nn.Module):
    """Velocity of the stacked planes: (B, P, R, L, C), time (B,) in [0, 1], text (B, M, W) -> (B, P, R, L, C).
    valid (P, R): rows that hold data; the others neither are attended to nor count."""
    def __init__(self, cfg, valid):
        super().__init__()
        D, heads, values = cfg.dit_width, cfg.dit_heads, 4 * cfg.plane_channels
        self.cfg, self.padded = cfg, cfg.size // cfg.patch != cfg.frames

        def mlp(i):
            return nn.Sequential(nn.Linear(i, D), nn.SiLU(), nn.Linear(D, D))

        self.register_buffer("valid", valid[:, ::2], persistent=False)           # (P, R / 2)
        self.x_embedder, self.y_proj = nn.Linear(values, D), Mlp(cfg.text_width, D, D)
        self.t_embedder, self.fps_embedder = mlp(256), mlp(256)
        self.t_block = nn.Sequential(nn.SiLU(), nn.Linear(D, 6 * D))
        self.spatial_blocks = nn.ModuleList(STDiT3Block(D, heads) for _ in range(cfg.dit_depth))
        self.temporal_blocks = nn.ModuleList(STDiT3Block(D, heads, temporal=True) for _ in range(cfg.dit_depth))
        self.final_table, self.final_linear = nn.Parameter(torch.randn(2, D) / D ** 0.5), nn.Linear(D, values)
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                nn.init.xavier_uniform_(layer.weight)
                nn.init.zeros_(layer.bias)
        for block in self.temporal_blocks:           # they start as nothing, as in Open-Sora; so does the velocity
            for layer in (block.attn.proj, block.cross_attn.proj, block.mlp.fc2):
                nn.init.zeros_(layer.weight)
        nn.init.zeros_(self.final_linear.weight)
        self.plane_embedding = nn.Parameter(torch.randn(len(valid), 1, D) * 0.02)    # unlike frames, each is special

    def forward(self, x, t, text, mask):
        rows, columns = x.shape[2] // 2, x.shape[3] // 2
        x = x.unflatten(3, (-1, 2)).unflatten(2, (-1, 2)).transpose(3, 4)        # (B, P, R/2, L/2, 2, 2, C)
        x = self.x_embedder(x.flatten(4).flatten(2, 3))                          # (B, P, S, D)
        x = x + place_embedding(rows, columns, x.shape[-1], x.device) + self.plane_embedding
        t = self.t_embedder(time_embedding(1000 * t, 256))
        t = t + self.fps_embedder(time_embedding(torch.full((1,), self.cfg.fps, device=x.device), 256))      # (B, D)
        t6, y = self.t_block(t)[:, None], self.y_proj(text)
        valid = self.valid.repeat_interleave(columns, 1) if self.padded else None                # (P, S)
        turn = grid((rows, columns), x.shape[-1] // self.cfg.dit_heads, x.device) if self.cfg.dit_rope else None
        for spatial, temporal in zip(self.spatial_blocks, self.temporal_blocks, strict=True):
            x = temporal(spatial(x, y, t6, mask, valid, turn), y, t6, mask, valid)
        shift, scale = (self.final_table + t[:, None])[:, :, None, None].unbind(1)               # (B, 1, 1, D)
        x = self.final_linear(F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift)
        x = x.unflatten(3, (2, 2, -1)).unflatten(2, (rows, columns))             # (B, P, R/2, L/2, 2, 2, C)
        return x.transpose(3, 4).flatten(4, 5).flatten(2, 3)


# ---- Text

LETTERS = 12                                         # of a word; the rest is not read


def spell(captions, n):
    """Captions -> (B, n, LETTERS) numbers of (place, byte), 0 for none; the first "word", 1, opens every caption."""
    ids = torch.zeros(len(captions), n, LETTERS, dtype=torch.long)
    ids[:, 0, 0] = 1
    for i, caption in enumerate(captions):
        for j, word in enumerate(re.findall(r"\w+", caption.lower())[:n - 1], 1):
            letters = [2 + 256 * k + byte for k, byte in enumerate(word.encode()[:LETTERS])]
            ids[i, j, :len(letters)] = torch.tensor(letters)
    return ids


class ByteText(nn.Module):
    """A small text encoder: a word is the sum of its letters in their places. (B, M, LETTERS) -> (B, M, W)."""
    def __init__(self, cfg):
        super().__init__()
        self.letters = nn.Embedding(2 + 256 * LETTERS, cfg.text_width, padding_idx=0)
        self.places = nn.Parameter(torch.randn(cfg.text_tokens, cfg.text_width) * 0.3)

    def forward(self, ids):
        return F.layer_norm(self.letters(ids).sum(2), self.places.shape[-1:]) + self.places


def t5_width(folder):
    path = Path(folder) / "config.json"
    return json.loads(path.read_text()).get("d_model") if path.is_file() else None


@functools.lru_cache
def t5(folder, device):
    try:
        from transformers import AutoTokenizer, T5EncoderModel
        return (AutoTokenizer.from_pretrained(folder, local_files_only=True),
                T5EncoderModel.from_pretrained(folder, local_files_only=True).to(device).eval())
    except (ImportError, OSError) as error:
        raise data.UserError(f"--text {folder} needs `pip install transformers` and a folder with a T5 encoder "
                             f"({type(error).__name__}).") from None


@torch.no_grad()
def read(captions, cfg, device):
    """Captions -> what STDiT's text encoder takes: numbers (B, M, LETTERS), or features (B, M, W) of a T5; and the mask
    (B, M) of the words there are. The empty caption stands for none: it has one word, its opening (T5: its end)."""
    if cfg.text == "bytes":
        ids = spell(captions, cfg.text_tokens).to(device)
        return ids, ids.any(-1)
    tokenizer, encoder = t5(cfg.text, device)
    tokens = tokenizer(captions, padding="max_length", max_length=cfg.text_tokens, truncation=True, return_tensors="pt")
    mask = tokens["attention_mask"].to(device)
    return encoder(tokens["input_ids"].to(device), mask).last_hidden_state.float(), mask.bool()


def vary(caption, label, key):
    """What the clip is called this time: nothing, for guidance (1 of 10); "a video of <label>", as in the paper (3 of
    10); or its caption, half the time short of some words, so that short prompts are nothing new."""
    rng = np.random.default_rng(key)
    kind, words, keep = rng.random(), re.sub("^a video( of)?", "", caption).split(), rng.uniform(0.3, 1)
    if kind < 0.1:
        return ""
    if kind < 0.4:
        return f"a video of {label}".removesuffix(" of unlabeled")
    words = [w for w, x in zip(words, rng.random(len(words)), strict=True) if kind < 0.7 or x < keep]
    return " ".join(["a video of", *words] if words and rng.random() < 0.5 else words or ["a video"])


# ---- The whole model, and reflected flow matching on its planes

class ProAV(nn.Module):
    """MDSA (frozen), text encoder and STDiT; called, it gives the velocity of stacked planes."""
    def __init__(self, cfg):
        super().__init__()
        self.cfg, self.mdsa, self.mel = cfg, MDSA(cfg).requires_grad_(False), Mel(cfg)
        side = cfg.size // cfg.patch
        rows = [side if k == "hw" else cfg.frames for _ in cfg.streams for k in PLANES]
        valid = torch.arange(max(rows)) < torch.tensor(rows)[:, None]            # (P, R)
        self.register_buffer("valid", valid[None, :, :, None, None], persistent=False)
        self.text = ByteText(cfg) if cfg.text == "bytes" else nn.Identity()
        self.dit = STDiT(cfg, valid)

    def forward(self, x, t, words, mask):
        return self.dit(x, t, self.text(words), mask) * self.valid

    @torch.no_grad()
    def encode(self, x):
        """{stream: pixels} -> stacked planes (B, P, R, L, C), eq. 9: padded with 0 to one size; a stream that is not
        given is left 0."""
        codes, rows = self.mdsa.encode(x), self.valid.shape[2]
        some = next(iter(codes.values()))["tw"][0]
        blank = {k: (some.new_zeros(len(some), 1, *some.shape[2:]),) for k in PLANES}
        planes = [torch.tanh(codes.get(m, blank)[k][0]) for m in self.cfg.streams for k in PLANES]
        return torch.stack([F.pad(z, (0, 0, 0, 0, 0, rows - z.shape[1])) for z in planes], 1)

    @torch.no_grad()
    def decode(self, x):
        """Stacked planes -> video (B, F, 3, H, W) and waveform (B, L), None for a stream that is not modeled."""
        rows = self.valid[0, :, :, 0, 0].sum(1).tolist()
        planes = iter([x[:, i, :n] for i, n in enumerate(rows)])
        out = self.mdsa.decode({m: {k: next(planes) for k in PLANES} for m in self.cfg.streams})
        return out.get("v"), self.mel.inverse(out["a"].float()) if "a" in out else None

    streams = Autoencoding.streams


def truncated_normal(shape, draw):
    """A standard normal kept to [-1, 1], by its inverse distribution function: the prior of reflected flow matching."""
    low = 0.5 * (1 + math.erf(-(0.5 ** 0.5)))
    u = torch.rand(shape, generator=draw, device=draw.device)
    return (2 ** 0.5 * torch.erfinv((1 - 2 * low) * (2 * u - 1))).clamp(-1, 1)


def reflect(y):
    """Fold any point back into [-1, 1], as a ball between walls (a triangle wave) -> point, number of walls hit."""
    r = (y + 1) % 4
    return torch.where(r > 2, 4 - r, r) - 1, ((y + 1) / 2).floor().abs()


def euler(velocity, x, steps):
    """Reflected Euler: x <- reflect(x + v(t, x) / N), t = 0, 1/N ... (N - 1)/N."""
    for i in range(steps):
        x, _ = reflect(x + velocity(i / steps, x) / steps)
    return x


def heun(velocity, x, steps):
    """Reflected Heun, two calls a step. Where the trial point bounced an odd number of times, the velocity there points
    the other way in the unfolded world in which the step is taken. (The code of Xie et al. does not turn it.)"""
    for i in range(0, steps, 2):
        h, t = min(2, steps - i) / steps, i / steps
        v = velocity(t, x)
        if i + 1 < steps:
            trial, walls = reflect(x + h * v)
            v = (v + velocity(t + h, trial) * (1 - 2 * (walls % 2))) / 2
        x, _ = reflect(x + h * v)
    return x


SAMPLERS = {"euler": euler, "heun": heun}


class ReflectedFlow:
    """x_t = (1 - t) x_0 + t x_1 from the prior x_0 to data x_1; the network learns x_1 - x_0. A straight line in a cube
    meets no wall, so reflection enters only the prior and the sampler (Xie et al. 2024)."""
    def __init__(self, model):
        self.model, self.cfg = model, model.cfg

    def loss(self, net, batch):
        """-> the velocity's squared error, mean over what is valid, summed over the streams; {stream: its part}.
        batch: latents (B, P, R, L, C) in place of the audio, or video and audio; caption, label, key; u (B,): times."""
        cfg, device, x1 = self.cfg, batch["video"].device, batch["audio"][:, 0]
        if x1.dim() < 5:
            x1 = self.model.encode(self.model.streams(batch["video"], batch["audio"]))
        draw, t, x0 = torch.Generator(device), [], []
        for key in batch["key"].tolist():            # each clip's own: the same however clips are dealt to processes
            draw.manual_seed(key)
            t.append(torch.rand((), generator=draw, device=device))
            x0.append(truncated_normal(x1.shape[1:], draw))
        valid, t, x0 = self.model.valid, batch.get("u", torch.stack(t)), torch.stack(x0)
        x0, at = x0 * valid, t.view(-1, 1, 1, 1, 1)
        v = net((1 - at) * x0 + at * x1, t, *read(batch["caption"], cfg, device))
        error = (v.float() - (x1 - x0)).square() * valid                         # (B, P, R, L, C)
        weight = 1 / (valid.expand_as(x1[:1]).flatten(2).sum(2)[0].view(len(cfg.streams), -1).sum(1))
        error = error.flatten(2).sum(2).mean(0).view(len(cfg.streams), -1).sum(1) * weight       # (streams,)
        names = {"v": "video", "a": "audio"}
        return error.sum(), {names[m]: e.detach() for m, e in zip(cfg.streams, error, strict=True)}

    @torch.no_grad()
    def sample(self, captions, negative, guidance, steps, sampler, draws, given=None, device="cpu"):
        """Stacked planes (B, P, R, L, C) from the captions, by classifier-free guidance v_n + w (v_c - v_n). given:
        such planes of a stream at hand, the other's being 0; they are led along their straight line, not by the network
        (ours: the paper has no conditional task)."""
        model, B, cfg = self.model, len(captions), self.cfg
        shape = (model.valid.shape[1], model.valid.shape[2], cfg.size // cfg.patch, cfg.plane_channels)
        x0 = torch.stack([truncated_normal(shape, g) for g in draws]).to(device) * model.valid
        led = None if given is None else given.abs().amax((0, 2, 3, 4)).view(1, -1, 1, 1, 1) > 0
        words, mask = read(captions + [negative] * B, cfg, device)
        twice = guidance != 1 and captions != [negative] * B

        def velocity(t, x):
            n = 2 * B if twice else B
            v = model(x.repeat(n // B, 1, 1, 1, 1), torch.full((n,), t, device=device), words[:n], mask[:n])
            v = v[B:] + guidance * (v[:B] - v[B:]) if twice else v
            return v if led is None else torch.where(led, given - x0, v)

        return SAMPLERS[sampler](velocity, x0, steps)


# ---- Training

# same as mm_diffusion.py
def setup(cfg):
    """Pick the device and, where it is left open, the precision; under torchrun, join the process group -> device.
    Raises data.UserError when there is no such device."""
    name = cfg.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if name == "cuda":
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    try:
        torch.empty(0, device=name)
        if name.startswith("cuda"):
            torch.cuda.set_device(name)
    except (RuntimeError, AssertionError):
        raise data.UserError(f"There is no --device {cfg.device} here; try auto, cpu, cuda, cuda:1 or mps.") from None
    if "RANK" in os.environ and not dist.is_initialized():
        dist.init_process_group("nccl" if name.startswith("cuda") else "gloo")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    if cfg.amp == "auto":
        cfg.amp = "off" if not name.startswith("cuda") else "fp16"
        if name.startswith("cuda") and torch.cuda.is_bf16_supported(including_emulation=False):
            cfg.amp = "bf16"
    return torch.device(name)


# same as mm_diffusion.py
def read_checkpoint(path, device="cpu"):
    """A checkpoint's dict, or a bare state dict. Raises data.UserError when it is missing or not readable."""
    if not Path(path).is_file():
        raise data.UserError(f"There is no checkpoint {path}.")
    try:
        state = torch.load(path, map_location=device, weights_only=True)
    except Exception as error:                       # torch raises half a dozen kinds for damaged or foreign files
        raise data.UserError(f"{path} is not a readable checkpoint ({type(error).__name__}).") from error
    if not isinstance(state, dict):
        raise data.UserError(f"{path} is not a checkpoint: it holds a {type(state).__name__}.")
    if not state.get("cfg", {}).keys() <= vars(Config()).keys():
        raise data.UserError(f"{path} is of another model, with other options than {Path(__file__).name} has.")
    return state


# same as mm_diffusion.py
def fill(model, state, path):
    """Load a state dict strictly, of any float type. Raises data.UserError naming what does not fit."""
    own = {k: p.shape for k, p in model.state_dict().items()}
    wrong = [k for k in {**own, **state} if k not in own or own[k] != getattr(state.get(k), "shape", None)]
    if wrong:
        raise data.UserError(f"The weights in {path} are not for this network: {len(wrong)} names or shapes differ "
                             f"({wrong[0]}, for one). Give the options that they were trained with.")
    model.load_state_dict(state)


# same as mm_diffusion.py
class Muon(torch.optim.AdamW):
    """AdamW, except that a convolution or linear layer, as a matrix (out, in * kernel), moves along its gradient's
    running mean made orthogonal: all its directions are learned at one pace (Jordan et al. 2024)."""
    @torch.no_grad()
    def step(self, closure=None):
        keep = 1 - getattr(self, "found_inf", 0)     # set by GradScaler: 0 drops the step
        group, shapes = self.param_groups[0], {}
        for p in group["params"]:
            if p.grad is not None and p.dim() > 1 and min(p.flatten(1).shape) > 3:
                shapes.setdefault(p.flatten(1).shape, []).append(p)
        for shape, ps in shapes.items():
            for p in ps:
                if not self.state[p]:
                    self.state[p] = {"step": torch.zeros(()), "exp_avg": torch.zeros_like(p)}
                self.state[p]["exp_avg"].lerp_(p.grad.nan_to_num(0, 0, 0), 0.05 * keep)
            x = torch.stack([p.grad.lerp(self.state[p]["exp_avg"], 0.95).flatten(1) for p in ps])    # (N, out, in)
            x = orthogonal(x.mT).mT if shape[0] > shape[1] else orthogonal(x)
            for p, update in zip(ps, x, strict=True):
                p.mul_(1 - group["lr"] * group["weight_decay"] * keep)
                # 0.2 sqrt(max) gives it the size of AdamW's steps, so that one learning rate serves both.
                p.sub_(0.2 * max(shape) ** 0.5 * group["lr"] * keep * update.view_as(p).nan_to_num())
                p.grad = None
        return super().step(closure)


# same as mm_diffusion.py
def orthogonal(x):
    """Matrices (N, rows, columns), rows <= columns -> singular values near 1, by five Newton-Schulz steps."""
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-12)
    for _ in range(5):
        A = x @ x.mT
        x = 3.4445 * x + (-4.7750 * A + 2.0315 * A @ A) @ x
    return x


# Options that may change when a run goes on; any other would make it another run.
FREE = {"preset", "out", "stage", "steps", "mdsa_steps", "amp", "compile", "device", "workers", "grad_accum",
        "need_good", "griffin_lim", "refine", "init_from", "log_every", "val_every", "val_clips", "save_every",
        "sample_every", "samples", "guidance", "sampler", "sample_steps"}
# Of both stages: stage dit may have others than the finished stage mdsa it builds on.
SHARED = {"lr_end", "warmup", "optimizer", "weight_decay", "clip", "ema", "seed"}


# same as mm_diffusion.py
def save(path, step, cfg, model, ema, optimizer, scaler):
    """Write beside the old checkpoint, then rename: an interrupted save loses nothing."""
    torch.save({"model": model.state_dict(), "ema": ema.state_dict(), "optimizer": optimizer.state_dict(),
                "scaler": scaler.state_dict(), "step": step, "cfg": dataclasses.asdict(cfg)}, f"{path}.tmp")
    os.replace(f"{path}.tmp", path)


# same as mm_diffusion.py
def resume(path, cfg, model, ema, optimizer, scaler):
    """Restore a run from its checkpoint -> the step to go on from, 0 where there is none. Raises data.UserError for
    a file that is no run's checkpoint, or that of a run with other settings."""
    if not path.exists():
        return 0
    state = read_checkpoint(path, next(model.parameters()).device)
    if "optimizer" not in state:
        raise data.UserError(f"{path} is no checkpoint of a run: move it away, or choose another --out.")
    for k, new in dataclasses.asdict(cfg).items():
        if k not in FREE and state["cfg"].get(k) != new:
            raise data.UserError(f"{path} is of a run with --{k} {state['cfg'].get(k)}, not {new}: "
                                 "choose another --out, or move it away.")
    fill(model, state["model"], path)
    fill(ema, state["ema"], path)
    optimizer.load_state_dict(state["optimizer"])
    if state["scaler"] and state["cfg"]["amp"] == cfg.amp:
        scaler.load_state_dict(state["scaler"])
    return state["step"]


# same as mm_diffusion.py
def validate(model, loss_fn, batches, autocast, device):
    """Mean loss, by part and by quartile of noise level, on fixed clips and noise: each clip once per quartile."""
    row, seen, total = {}, 0, sum(len(b["key"]) for b in batches)
    with torch.no_grad():
        for batch in batches:
            batch, B = data.to_device(batch, device), len(batch["key"])
            spread = (seen + torch.arange(B, device=device) + 0.5) / total               # (B,) in (0, 1)
            seen += B
            for quartile in range(4):
                with autocast():
                    _, parts = loss_fn(model, {**batch, "u": (quartile + spread) / 4})
                loss = float(sum(parts.values()))
                for k, x in {"val": loss / 4, **{f"val_{k}": float(x) / 4 for k, x in parts.items()},
                             f"q{quartile + 1}": loss}.items():
                    row[k] = row.get(k, 0) + x * B / total
    return row


# same as mm_diffusion.py
def write_samples(out, step, video, audio, cfg):
    """Every sampled clip as mp4 with sound (wav without video) and as film strip, in the run's folder."""
    for i in range(len(audio if video is None else video)):
        v, a = (None if x is None else x[i] for x in (video, audio))
        path = out / "samples" / f"step{step:06d}_{i}"
        data.save_clip(f"{path}.wav" if v is None else f"{path}.mp4", v, a, cfg.fps, cfg.rate)
        data.film_strip(f"{path}.png", v, a, cfg.fps, cfg.rate)


# same as mm_diffusion.py
def write_row(path, row):
    """Append to log.csv. Its first row is a validation's and tells the names of the loss's parts."""
    with open(path, "a+") as f:
        f.seek(0)
        if not (columns := f.readline().strip().split(","))[0]:
            parts = [k[4:] for k in row if k.startswith("val_")]
            columns = ["step", "loss", *parts, "grad", "lr", "clips_per_s", "skipped", *list(row)[1:]]
            f.write(",".join(columns) + "\n")
        f.write(",".join(f"{row[k]:.6g}" if k in row else "" for k in columns) + "\n")


# same as mm_diffusion.py
def learning_rate(cfg, step):
    """Linear warm-up, times a linear fall from lr to lr * lr_end."""
    return cfg.lr * min(1, (step + 1) / max(cfg.warmup, 1)) * (1 + (cfg.lr_end - 1) * step / cfg.steps)


# same as mm_diffusion.py
def fit(model, loss_fn, cfg, train, val, sample_fn=None):
    """Train `model` to cfg.steps, going on from the checkpoint in cfg.out where there is one -> the EMA model.

    loss_fn(model, batch) -> (loss, {name: part}) gets batches of `train` as data.to_device makes them, and those of
    `val` with u (B,), the noise levels to use, in [0, 1). sample_fn(model) -> (video, audio) gets the EMA model.
    The same command gives the same weights on 1 or more processes up to rounding (dropout apart) and, on the CPU,
    the same to the bit after any interruption. Raises data.UserError for a checkpoint of another run.
    """
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    out, micro, device = Path(cfg.out), cfg.batch_size // world // cfg.grad_accum, next(model.parameters()).device
    ema, parameters = copy.deepcopy(model).eval().requires_grad_(False), list(model.parameters())
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(cfg.amp)         # else float32
    kind = {"adamw": torch.optim.AdamW, "muon": Muon}[cfg.optimizer]
    optimizer = kind(parameters, cfg.lr, cfg.betas, 1e-8, cfg.weight_decay, fused=device.type != "mps")
    # GradScaler scales fp16 losses and drops steps whose gradients are not finite, without the host asking the device
    # in every step. The other types need only the latter, at scale 1.
    scale = 2.0 ** 16 if dtype == torch.float16 else 1.0
    scaler = torch.amp.GradScaler(device.type, init_scale=scale, enabled=device.type != "mps")
    run = (cfg, model, ema, optimizer, scaler)
    start = resume(out / "ckpt.pt", *run)
    net = torch.compile(model) if cfg.compile else model
    if dist.is_initialized():
        net = nn.parallel.DistributedDataParallel(net, [device] if device.type == "cuda" else None)
    val_set = data.val_batches(val, cfg.val_clips, micro) if rank == 0 and start < cfg.steps else []
    bar = tqdm(total=cfg.steps, initial=start, disable=rank > 0, unit="step", dynamic_ncols=True)

    def autocast():
        return torch.autocast(device.type, dtype, enabled=dtype is not None)

    def report(step, row):                           # rank 0: validate, log, save and sample when it is time
        last = step == cfg.steps
        if step % cfg.val_every == 0 or last:
            row |= validate(ema, loss_fn, val_set, autocast, device)
            parts = ", ".join(f"{k[4:]} {x:.4f}" for k, x in row.items() if k.startswith("val_"))
            levels = " ".join(f"{row[q]:.3f}" for q in ("q1", "q2", "q3", "q4"))
            bar.write(f"step {step}: validation loss {row['val']:.4f} ({parts}; by quartile of noise: {levels})")
        if row:
            write_row(out / "log.csv", {"step": step, **row})
        if step and (step % cfg.save_every == 0 or last):
            save(out / "ckpt.pt", step, *run)
        if sample_fn and step and (step % cfg.sample_every == 0 or last):
            write_samples(out, step, *sample_fn(ema), cfg)

    if rank == 0:
        out.mkdir(parents=True, exist_ok=True)
        rows = (out / "log.csv").read_text().splitlines() if start and (out / "log.csv").exists() else []
        rows = [x for x in rows if x.startswith("step") or int(x.split(",")[0]) <= start]    # up to the checkpoint
        (out / "log.csv").write_text("".join(f"{x}\n" for x in rows))
        if start == 0:
            report(0, {})
        elif start >= cfg.steps and sample_fn and not (out / "samples").exists():    # stopped before they were made
            write_samples(out, start, *sample_fn(ema), cfg)
    stopped, old = [], {s: signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)}
    for s in old:                                    # a first signal waits for the step's end, a second one kills
        signal.signal(s, lambda number, _: (stopped.append(number), signal.signal(number, old[number])))
    batches = data.loader(train, cfg.batch_size, start, cfg.steps, rank, world, cfg.workers, cfg.seed)
    sums, skipped, streak, since, clock = 0, 0, 0, start, time.time()
    for step, batch in enumerate(batches, start):
        batch = data.to_device(batch, device)
        torch.manual_seed(data.clip_key(cfg.seed, f"dropout {step} {rank}"))     # no generator's state to save
        optimizer.param_groups[0]["lr"] = learning_rate(cfg, step)
        optimizer.zero_grad()
        for i in range(cfg.grad_accum):
            net.require_backward_grad_sync = i == cfg.grad_accum - 1             # DDP averages once a step
            part = {k: x if k == "step" else x[i * micro:(i + 1) * micro] for k, x in batch.items()}
            with autocast():
                loss, parts = loss_fn(net, part)
            scaler.scale(loss / cfg.grad_accum).backward()
            sums += torch.stack([loss.detach().float(), *parts.values()]) / cfg.grad_accum
        scaler.unscale_(optimizer)
        norm = nn.utils.clip_grad_norm_(parameters, cfg.clip or math.inf)
        bad = (~norm.isfinite()).float()
        skipped, streak = skipped + bad, (streak + 1) * bad
        if device.type != "mps" or not bad:
            scaler.step(optimizer)
        scaler.update(None if dtype == torch.float16 else 1.0)
        with torch.no_grad():
            torch._foreach_lerp_(list(ema.parameters()), parameters, 1 - min(cfg.ema, (1 + step) / (10 + step)))
        done, row, stop = step + 1, {}, world == 1 and bool(stopped)
        if done % cfg.log_every == 0 or done == cfg.steps:
            values = torch.stack([*(sums / (done - since)), norm, skipped, streak, norm.new_tensor(len(stopped))])
            if world > 1:
                dist.all_reduce(values)
            mean, *means, norm, total, in_a_row, signals = (values / world).tolist()
            speed = (done - since) * cfg.batch_size / (time.time() - clock)
            row = {"loss": mean, **dict(zip(parts, means, strict=True)), "grad": norm,
                   "lr": learning_rate(cfg, step), "clips_per_s": speed, "skipped": total}
            bar.set_postfix({k: f"{row[k]:.3g}" for k in ("loss", *parts, "grad", "clips_per_s")}, refresh=False)
            sums, since, clock, stop = 0, done, time.time(), stop or signals > 0
            if in_a_row >= 50:
                raise data.UserError(f"The gradients of the last {in_a_row:.0f} steps were not finite: start again "
                                     "with a smaller --lr, with --clip 1 or with --amp off.")
        bar.update()
        if rank == 0:
            report(done, row)
        if stop:
            if rank == 0:
                save(out / "ckpt.pt", done, *run)
                bar.write(f"Stopped at step {done}: the same command goes on from there.")
            sys.exit(0)
    for s in old:
        signal.signal(s, old[s])
    bar.close()
    return ema


# ---- The two stages

def mdsa_config(cfg):
    """The config of stage mdsa: a sub-folder, its step count, batch size and rate under fit()'s names, and the options
    of the generator at their defaults, for those do not make it another one."""
    other = {f.name: f.default for f in dataclasses.fields(cfg) if f.name.startswith(("dit_", "text", "cache"))}
    return dataclasses.replace(cfg, **other, out=f"{cfg.out}/mdsa", steps=cfg.mdsa_steps, lr=cfg.mdsa_lr,
                               betas=cfg.mdsa_betas, batch_size=cfg.mdsa_batch_size)


def finished(cfg, free=FREE):
    """Whether the stage whose config this is has reached its last step. Raises data.UserError when it has, with other
    options than now (those in `free` aside), or when the file is of no run."""
    path = Path(cfg.out) / "ckpt.pt"
    state = read_checkpoint(path) if path.exists() else {"step": -1, "cfg": {}}
    other = [f"--{k} {x}" for k, x in state.get("cfg", {}).items() if k not in free and getattr(cfg, k, x) != x]
    if "step" not in state or (state["step"] >= cfg.steps and other):
        raise data.UserError(f"{path} is of {'a run with ' + ' '.join(other) if other else 'no run'}: choose another "
                             "--out, or move it away.")
    return state["step"] >= cfg.steps


def say(*words):
    if int(os.environ.get("RANK", 0)) == 0:
        print(*words, flush=True)


def autoencoder(cfg, train, val, device):
    """Stage one -> the trained MDSA (EMA weights)."""
    cfg = mdsa_config(cfg)
    torch.manual_seed(cfg.seed)
    model = Autoencoding(cfg)
    if finished(cfg, FREE | SHARED):
        say(f"Stage mdsa is finished: {cfg.out}/ckpt.pt")
        fill(model, read_checkpoint(Path(cfg.out) / "ckpt.pt")["ema"], cfg.out)
        return model.mdsa
    if cfg.init_from and cfg.stage == "mdsa":
        state = read_checkpoint(cfg.init_from)
        fill(model, state.get("ema", state), cfg.init_from)
    else:
        first = data.to_device(data.make_batch(train, cfg.seed, 1, range(64)), "cpu")
        start_closed_form(model.mdsa, model.streams(first["video"], first["audio"]))
    model = model.to(device)
    say(f"Stage mdsa: {count(model.mdsa):,} parameters on {device}, data {cfg.data}, to {cfg.out}")
    shown = data.to_device(next(iter(data.val_batches(val, cfg.samples, cfg.samples))), device)

    def loss(net, batch):
        return net(batch["video"], batch["audio"], "u" not in batch and batch["step"] >= cfg.disc_start)

    def rebuilt(ema):
        with torch.no_grad():
            out = ema.mdsa(ema.streams(shown["video"], shown["audio"]))[0]
        return (data.to_uint8(out["v"]) if "v" in out else None,
                ema.mel.inverse(out["a"]).clamp(-1, 1).cpu() if "a" in out else None)

    return fit(model, loss, cfg, train, val, rebuilt).mdsa


def count(module):
    return sum(p.numel() for p in module.parameters())


@torch.no_grad()
def examine(model, val, device):
    """Print the PSNR of MDSA on validation clips beside that of codes that anyone can write down: mean color or
    spectrum, and block means (no more of them than MDSA has numbers), interpolated -> {stream: [MDSA, mean, blocks]}.
    Raises data.UserError where MDSA does not beat them."""
    cfg, side, table = model.cfg, model.cfg.size // model.cfg.patch, {m: [] for m in model.cfg.streams}
    budget = (side * side + 2 * cfg.frames * side) * cfg.plane_channels
    for batch in data.val_batches(val, cfg.val_clips, 16):
        batch = data.to_device(batch, device)
        x = model.streams(batch["video"], batch["audio"])
        out = model.mdsa(x)[0]
        for m, y in x.items():
            y, over = y.transpose(1, 2), 1                                       # (B, C, F, H, W)
            while cfg.frames // over * side ** 2 * y.shape[1] > budget and over < cfg.frames:
                over *= 2                            # frames to a block
            pooled = F.avg_pool3d(y, (over, *model.mdsa.streams[m].patch))
            mean = y.mean((2, 3, 4) if m == "v" else (2, 4), keepdim=True).expand_as(y)
            codes = out[m].transpose(1, 2), mean, F.interpolate(pooled, y.shape[2:], mode="trilinear")
            table[m] += [[psnr(z, y).item() for z in codes]] * len(y)
    table = {m: np.mean(rows, 0) for m, rows in table.items()}
    for m, row in table.items():
        say("PSNR-{}: MDSA {:.1f} dB, mean {} {:.1f}, block means {:.1f}".format(
            m.upper(), row[0], {"v": "color", "a": "spectrum"}[m], *row[1:]))
    if cfg.need_good and any(row[0] <= max(row[1:]) for row in table.values()):
        raise data.UserError("The autoencoder does not beat its baselines, so a generator could not either: raise "
                             "--mdsa_steps, or go on all the same with --need_good false.")
    return table


class Latents(torch.utils.data.Dataset):
    """The first n clips of a data set as planes, encoded once, into a file; later ones are the same again."""
    def __init__(self, model, dataset, n, name, device):
        mark = sum(p.double().abs().sum().item() for p in model.mdsa.parameters())   # another MDSA, another file
        path = f"{model.cfg.out}/latents_{name}_{data.clip_key(n, mark):015x}.pt"
        if int(os.environ.get("RANK", 0)) == 0 and not Path(path).exists():
            clips = {"z": [], "caption": [], "label": []}
            for i in tqdm(range(0, n, 16), f"encoding {n} clips", unit="batch"):
                batch = data.to_device(data.make_batch(dataset, 0, 1, range(i, min(n, i + 16))), device)
                clips["z"] += model.encode(model.streams(batch["video"], batch["audio"])).cpu()
                clips["caption"] += batch["caption"]
                clips["label"] += batch["label"].tolist()
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            torch.save({**clips, "z": torch.stack(clips["z"])}, f"{path}.tmp")
            os.replace(f"{path}.tmp", path)
        if dist.is_initialized():
            dist.barrier()
        self.clips, self.n = torch.load(path, mmap=True, weights_only=True), n

    def __len__(self):
        return self.n

    def __getitem__(self, i):
        clip = {k: x[i % self.n] for k, x in self.clips.items()}
        # The loader knows video and audio alone: the planes travel as audio.
        return {**clip, "audio": clip["z"].numpy(), "video": np.zeros((1, 1, 1, 3), np.uint8)}


def generator(cfg, mdsa, train, val, device):
    """Stage two: train STDiT on the planes of the trained MDSA."""
    if finished(cfg):
        return say(f"Stage dit is finished: {cfg.out}/ckpt.pt")
    torch.manual_seed(cfg.seed + 1)
    model = ProAV(cfg)
    model.mdsa.load_state_dict(mdsa.state_dict())
    model = model.to(device)
    if cfg.init_from:
        state = read_checkpoint(cfg.init_from)
        fill(model, state.get("ema", state), cfg.init_from)
    if (path := Path(cfg.out) / "ckpt.pt").exists():
        old = read_checkpoint(path)["ema"]
        if any(not torch.equal(old[f"mdsa.{k}"], p.cpu()) for k, p in model.mdsa.state_dict().items()):
            raise data.UserError(f"{path} was trained with another autoencoder: choose another --out, or move it away.")
    examine(model, val, device)
    labels, shown = train.labels, [val[i]["caption"] for i in range(min(cfg.samples, len(val)))]
    if cfg.cache_latents:
        train = Latents(model, train, cfg.cache_latents, "train", device)
        val = Latents(model, val, min(cfg.val_clips, len(val)), "val", device)
    flow = ReflectedFlow(model)
    say(f"Stage dit: {count(model.dit):,} parameters on {device}, to {cfg.out}")

    def loss(net, batch):
        names = [labels[i] for i in batch["label"].tolist()]
        if "u" not in batch:
            captions = map(vary, batch["caption"], names, batch["key"].tolist())
            batch = {**batch, "caption": list(captions)}
        return flow.loss(net, batch)

    return fit(model, loss, cfg, train, val, lambda ema: sample(ema, len(shown), prompt=shown, seed=cfg.seed))


# ---- Sampling and the command line

@torch.no_grad()
def sample(model, n, *, prompt=None, negative_prompt=None, label=None, video=None, audio=None, steps=None,
           guidance=None, seed=0, sampler=None, batch_size=8):
    """Generate n clips -> video (n, F, H, W, 3) uint8 and audio (n, L) float32 in [-1, 1]; None for a stream that
    the model lacks. prompt: text, or n of them; label: a class, for "a video of <label>"; neither: any clip. video
    ([n,] F, H, W, 3) uint8 or audio ([n,] L) comes back as it is, with the other stream made for it. Clip i depends on
    (seed, i), not on n or batch_size. Raises data.UserError for conditions that exclude each other."""
    if (prompt and label) or (video is not None and audio is not None):
        raise data.UserError("Give a prompt or a label, and a video or an audio, not both.")
    if (video is not None or audio is not None) and model.cfg.streams != "av":
        raise data.UserError("This model was trained for one stream: there is nothing to generate from the other.")
    cfg, device, out = model.cfg, next(model.parameters()).device, {"v": [], "a": []}
    captions = prompt if isinstance(prompt, list) else [prompt or (f"a video of {label}" if label else "")] * n
    if video is not None:
        video = torch.as_tensor(np.asarray(video)).expand(n, -1, -1, -1, -1)
    if audio is not None:
        audio = torch.as_tensor(np.asarray(audio)).float().expand(n, -1)
    for first in tqdm(range(0, n, batch_size), "sampling", disable=n <= batch_size, leave=False):
        part, x = captions[first:first + batch_size], None
        if video is not None or audio is not None:
            v = None if video is None else video[first:first + batch_size].to(device).movedim(-1, 2) / 127.5 - 1
            a = None if audio is None else audio[first:first + batch_size, None].to(device)
            x = model.encode(model.streams(v, a))
        draws = [torch.Generator().manual_seed(data.clip_key(seed, f"sample {first + i}")) for i in range(len(part))]
        z = ReflectedFlow(model).sample(part, negative_prompt or "", cfg.guidance if guidance is None else guidance,
                                        steps or cfg.sample_steps, sampler or cfg.sampler, draws, x, device)
        for k, y in zip("va", model.decode(z), strict=True):
            out[k] += [] if y is None else [y.cpu()]
    v = data.to_uint8(torch.cat(out["v"])) if out["v"] else None
    a = torch.cat(out["a"]).clamp(-1, 1) if out["a"] else None
    return v if video is None else video.cpu(), a if audio is None else audio.cpu()


def load(path, device="cpu", options=()):
    """A model ready to sample from a checkpoint of stage dit (its EMA weights). options, as on the command line,
    override the config. Raises data.UserError when the file is not readable or does not fit."""
    state = read_checkpoint(path)
    if "cfg" not in state or not any(k.startswith("dit.") for k in state["ema"]):
        raise data.UserError(f"{path} holds no generator: give that of stage dit.")
    model = ProAV(parse(options, Config(**state["cfg"])))
    fill(model, state["ema"], path)
    return model.to(device).eval()


def main(argv=None):
    cfg = parse(argv)
    try:
        device = setup(cfg)
        train, val = (data.open_dataset(cfg.data, split, cfg.frames, cfg.size, cfg.fps, cfg.rate, cfg.seed)
                      for split in ("train", "val"))
        if cfg.stage == "dit" and not finished(mdsa_config(cfg), FREE | SHARED):
            raise data.UserError(f"Stage dit needs the finished stage mdsa in {cfg.out}/mdsa: run --stage mdsa first.")
        mdsa = autoencoder(cfg, train, val, device)
        if cfg.stage != "mdsa":
            generator(cfg, mdsa, train, val, device)
    except data.UserError as error:
        die(f"proav_dit.py: {error}")
    if cfg.stage == "mdsa":
        say(f"Reconstructions are in {cfg.out}/mdsa/samples.")
    else:
        say(f"Samples are in {cfg.out}/samples; more: python sample.py --model proav_dit "
            f"--ckpt {cfg.out}/ckpt.pt")


if __name__ == "__main__":
    main()
