"""ProAV-DiT: sound as video, both as planes, one transformer over the planes (arXiv 2511.12072).

A clip's sound becomes a film of its own: one mel spectrogram per frame. An autoencoder (MDSA)
projects both films onto three planes each, (h, w), (t, w) and (t, h), and links the two streams by
attention at every step. A transformer (STDiT) takes the six planes for the frames of one short
video and generates them together, by reflected flow matching: it learns the velocity along straight
lines from noise to data in the cube [-1, 1], and a sampling step that would leave the cube bounces
off its wall. Paper: Sun et al. 2025.

    video (B, F, 3, H, W)                 audio (B, 1, L) -> mel images (B, F, 1, M, K)  section 3.1
        | patches, TimeSformer                | patches, TimeSformer
    u (B, F, L, L, D)                     u (B, F, L, L, D)                              eq. 1
        | project along t, h, w               | project along t, h, w
    planes hw (L, L), tw (F, L), th (F, L)    planes hw, tw, th                          eq. 2
        | hw: self-attention; tw, th: attention over t at three scales, in each stream   eq. 4, 5
        | <----- each plane attends to the other stream's plane of the same name ----->  eq. 6
    z (..., C) in (-1, 1)                 z (..., C)             the latents, tanh(mu)
        |    stacked as 6 frames (B, 6, rows, L, C): noise -> STDiT -> velocity          eq. 9
        | expand and add                      | expand and add                           eq. 7
        | <----- attention to the other stream inside blocks of (t, h, w) ----->         eq. 8
        | TimeSformer, un-embed               | TimeSformer, un-embed, Griffin-Lim
    video                                 audio

B clips of F frames, L x L patches in each (of the waveform, L samples); M mel bands, K columns; D
features; C channels.

    python proav_dit.py                              # toy, both stages: 6 to 9 minutes, 2 cores
    torchrun --nproc_per_node=4 proav_dit.py --data concerts      # after `python data.py prepare`
    python sample.py --model proav_dit --prompt "a video of a red ball bouncing"
    python sample.py --model proav_dit --video my.mp4             # its sound; --audio: the reverse

Differs from the paper on purpose. A mel image keeps its M x K cells, and audio has patches of its
own shape, so that the grids agree. LPIPS is replaced by perceptual(). Autoencoder and critics step
together. A T5 is used with --t5 FOLDER; else a small encoder is learned here, from captions that
vary. Ours alone: MDSA starts from the best linear code of some clips; sound for a video and the
reverse, by leading the given planes along their path; no generator for an autoencoder that trivial
codes beat; --dit_rope, turned on in toy and small, as the rows of a plane do not find each other in
minutes without it; toy has other sizes, no critics, and Muon.

Where the paper is silent or contradicts itself: only 16 pairs of STDiT blocks of width 1152 come
near 702 M (697.5 M; MDSA, 141.1 M, apart). Patches of 4 do not make 32 x 32 latents of 256 pixels;
8 do. Attention between planes works at width D, and eq. 5 gets a residual. The "linear noise
schedule" is the straight path. Planes of unequal size are padded, the padding masked. Mel window
and range, block sizes, guidance, EMA and the weights inside the losses are ours or PVDM's.
"""

import argparse
import copy
import dataclasses
import functools
import inspect
import math
import os
import re
import signal
import sys
import time
from collections import deque
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

import data

RANK = int(os.environ.get("RANK", 0))  # which process this is, as torchrun says,
WORLD = int(os.environ.get("WORLD_SIZE", 1))  # and of how many

# ---- Config


@dataclass
class Config:
    """Every option. Defaults: the paper's, or where it is silent PVDM's (MDSA), Open-Sora's."""

    preset: str = "paper"  # the row of PRESETS that the other values start from
    data: str = "toy"  # toy, toy:bounce,glide (some of its scenes), or a set of data.py prepare
    out: str = ""  # folder of the run; empty: out/proav_dit/PRESET[-DATA]
    stage: str = "all"  # all; mdsa, the autoencoder; dit, a generator on the one in out/mdsa
    # the clip
    frames: int = 16  # frames in a clip
    size: int = 256  # height and width, pixels
    fps: int = 10  # frames per second
    rate: int = 16000  # audio samples per second; a clip has frames * rate / fps of them
    # its sound as video (section 3.1)
    n_mels: int = 128  # mel bands: height of an audio frame
    hop: int = 25  # samples between columns; a frame's audio has rate / fps / hop of them
    window: int = 400  # samples in the Hann window of the STFT
    n_fft: int = 1024  # length of its transform
    floor: float = 1e-3  # magnitude where the logarithm flattens out; a full-scale sine has 1
    griffin_lim: int = 60  # iterations to find the phases
    # MDSA (section 3.1, appendix 5.2)
    streams: str = "av"  # av: both; v or a: autoencoder and generator of one (Tables 1, 6)
    patch: int = 8  # height and width of a patch, pixels; audio's patches give the same grid
    width: int = 384  # features of a token, D
    depth: int = 8  # layers of each encoder
    decoder_depth: int = 8  # layers of each decoder
    heads: int = 8  # heads of their attention
    head_dim: int = 64  # channels of such a head
    ff_mult: int = 4  # hidden width of their MLPs, in units of width
    plane_channels: int = 4  # channels of a latent plane, C
    proj_depth: int = 4  # layers of a projection; its heads have width / 8 channels
    proj_heads: int = 4  # heads of the projections and of all attention between planes
    proj_mlp: int = 512  # hidden width of a projection's MLP
    blocks: tuple = (4, 8, 8)  # t, h, w of the blocks in which the decoders meet (eq. 8)
    mt_attn: bool = True  # attention over time at three scales (eq. 4, 5)
    gcm_attn: bool = True  # cross-attention between planes of the two streams (eq. 6)
    biblock: bool = True  # cross-attention between the two volumes (eq. 8)
    kl: str = "latent"  # latent: to N(0, 1), before tanh; pixel: eq. 11 to the letter; off
    adv: bool = True  # discriminators of images and clips, and feature matching
    disc_width: int = 64  # their channels
    disc_start: int = 150000  # step from which the discriminators and the KL term act (eq. 12)
    need_good: bool = True  # no stage dit with an autoencoder that trivial codes beat
    mdsa_steps: int = 200000  # optimizer steps of stage mdsa
    mdsa_batch_size: int = 32  # clips per step
    mdsa_lr: float = 1e-4  # learning rate
    mdsa_betas: tuple = (0.5, 0.9)  # of AdamW
    # STDiT and its text (section 3.2)
    dit_width: int = 1152  # features of a token
    dit_depth: int = 16  # pairs of a spatial and a temporal block
    dit_heads: int = 16  # heads of their attention
    dit_rope: bool = False  # rotary positions in the spatial blocks too
    t5: str = ""  # folder of a T5; empty: a small text encoder is learned here
    text_width: int = 4096  # features of a word (T5 XXL: 4096)
    text_tokens: int = 300  # words read of a caption, its opening included
    text_drop: float = 0.1  # share of captions dropped in training, for guidance
    guidance: float = 4.0  # strength w of classifier-free guidance; 1: none
    sample_steps: int = 30  # network calls per clip (twice that with guidance)
    cache_latents: int = 0  # clips to encode once, before stage dit; 0: encode batch by batch
    # training of stage dit; the options from grad_accum on are of both stages
    steps: int = 400000  # optimizer steps
    batch_size: int = 64  # clips per optimizer step over ALL processes
    lr: float = 1e-4  # learning rate
    betas: tuple = (0.9, 0.999)  # of AdamW
    grad_accum: int = 1  # parts that each process splits its share of the batch into
    checkpoint: bool = False  # recompute layers in backward: less memory, more time
    lr_end: float = 1.0  # the rate falls linearly to this share of lr; 1: constant
    warmup: int = 1000  # steps of linear warm-up
    optimizer: str = "adamw"  # adamw; or muon for hidden weight matrices, adamw for the rest
    weight_decay: float = 0.0  # of both
    clip: float = 1.0  # largest gradient norm; 0: no clipping (the norm is logged all the same)
    ema: float = 0.9999  # decay of the averaged weights
    amp: str = "auto"  # auto, bf16, fp16 or off; auto: bf16 or else fp16 on CUDA, off elsewhere
    compile: bool = False  # torch.compile the network
    device: str = "auto"  # auto (cuda or else cpu) or a torch device
    workers: int = 2  # data loading processes
    seed: int = 0  # of weights, batches, noise and samples
    init_from: str = ""  # start one stage from the weights in this checkpoint
    log_every: int = 10  # steps between rows of log.csv
    eval_every: int = 5000  # steps between validations, checkpoints and samples
    val_clips: int = 64  # validation clips
    samples: int = 4  # clips to sample then


CHOICES = {
    "stage": ("all", "mdsa", "dit"),
    "streams": ("av", "v", "a"),
    "kl": ("latent", "pixel", "off"),
    "optimizer": ("adamw", "muon"),
    "amp": ("auto", "bf16", "fp16", "off"),
}

PRESETS = {
    # Minutes on a laptop.
    "toy": dict(
        data="toy:bounce,glide,pulse",
        size=32,
        rate=8000,
        n_mels=64,
        hop=50,
        window=256,
        n_fft=512,
        patch=4,
        width=64,
        depth=1,
        decoder_depth=2,
        heads=4,
        head_dim=16,
        ff_mult=2,
        proj_depth=1,
        proj_mlp=128,
        blocks=(4, 4, 4),
        adv=False,
        disc_width=16,
        disc_start=350,
        mdsa_steps=450,
        mdsa_batch_size=4,
        mdsa_lr=1e-2,
        mdsa_betas=(0.9, 0.999),
        dit_width=128,
        dit_depth=3,
        dit_heads=4,
        dit_rope=True,
        text_width=64,
        text_tokens=20,
        guidance=2.0,
        cache_latents=2048,
        steps=1200,
        batch_size=8,
        lr=1e-2,
        lr_end=0.05,
        warmup=20,
        optimizer="muon",
        ema=0.99,
        eval_every=450,
        val_clips=32,
    ),
    # One GPU, and a data set of one's own.
    "small": dict(
        size=64,
        n_mels=64,
        n_fft=512,
        patch=4,
        width=128,
        depth=4,
        decoder_depth=4,
        heads=4,
        head_dim=32,
        proj_depth=2,
        proj_mlp=256,
        blocks=(4, 4, 4),
        disc_width=32,
        disc_start=8000,
        mdsa_steps=10000,
        mdsa_batch_size=16,
        dit_width=384,
        dit_depth=6,
        dit_heads=6,
        dit_rope=True,
        text_width=256,
        text_tokens=24,
        cache_latents=20000,
        steps=20000,
        lr=3e-4,
        warmup=200,
        ema=0.999,
        eval_every=1000,
    ),
    # One 80 GB GPU holds 2 clips of stage mdsa, 8 of stage dit: more GPUs need fewer parts. With
    # --checkpoint true a clip keeps 3 GiB instead of 19, and 0.3 instead of 4 (by shapes, not run).
    "paper": dict(grad_accum=16),
}


# same as mm_diffusion.py
def parse(argv=None, base=None):
    """Command line -> Config: the values of `base`, or of a preset, then the options given.

    Raises data.UserError for an unknown option or a wrong value.
    """

    def refuse(message):
        raise data.UserError(f"{message} (--help lists the options).")

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.error = refuse
    remarks = dict(re.findall(r"^    (\w+): .*?# (.*)$", inspect.getsource(Config), re.M))
    for field in dataclasses.fields(Config):
        parser.add_argument(
            f"--{field.name}",
            type=functools.partial(data.parse_value, field.type),
            default=argparse.SUPPRESS,
            help=f"{remarks[field.name]} [{field.default}]".replace("%", "%%"),
        )
    given = vars(parser.parse_args(data.pair_words(argv)))

    # Without --preset: the one of the data's name, as toy has, else small.
    source = given.get("data", Config.data).split(":")[0]
    preset = given.get("preset", source if source in PRESETS else "small")
    if preset not in PRESETS:
        refuse(f"There is no --preset {preset}: choose one of {', '.join(PRESETS)}")
    if base is None:
        values = {"preset": preset, **PRESETS[preset], **given}
        if "preset" not in given and RANK == 0:
            why = "is so called" if preset == source else "has no preset of its own"
            print(f"--preset {preset}, as --data {source} {why}.")
    else:
        values = {**dataclasses.asdict(base), **given}
    cfg = Config(**values)
    check(cfg)
    if not cfg.out:
        usual = PRESETS[preset].get("data", preset)
        other = "" if given.get("data", usual) == usual else re.sub(r"\W", "-", f"-{cfg.data}")
        cfg.out = f"out/{Path(__file__).stem}/{preset}{other}"
    return cfg


def check(cfg):
    """Raise data.UserError for the first mistake in a config that people make."""
    may_be_zero = ("warmup", "workers", "seed", "griffin_lim", "disc_start", "cache_latents")
    for field in dataclasses.fields(cfg):
        value = getattr(cfg, field.name)
        if field.type is int and value < (0 if field.name in may_be_zero else 1):
            raise data.UserError(f"--{field.name} {value} is too small.")
        choices = CHOICES.get(field.name, (value,))
        if value not in choices:
            raise data.UserError(f"--{field.name} must be one of {', '.join(choices)}.")
    if cfg.init_from and cfg.stage == "all":
        raise data.UserError("--init_from starts one stage: add --stage mdsa or --stage dit.")
    if len(cfg.betas) != 2 or len(cfg.mdsa_betas) != 2 or len(cfg.blocks) != 3:
        raise data.UserError("--betas and --mdsa_betas need two numbers, --blocks three.")

    # Patches of both streams make one grid, side x side. Its halves are STDiT's patches.
    side = cfg.size // cfg.patch
    columns = cfg.rate // cfg.fps // cfg.hop
    if side < 2 or cfg.size % (2 * cfg.patch):
        raise data.UserError("--size must be an even number of --patch.")
    if cfg.rate % (cfg.fps * cfg.hop):
        raise data.UserError("--rate / --fps must be a multiple of --hop.")
    if cfg.n_mels % side or columns % side:
        raise data.UserError(
            f"--n_mels ({cfg.n_mels}) and --rate / --fps / --hop ({columns}) must divide by "
            f"--size / --patch ({side})."
        )
    # MTSelfAttention and perceptual() halve twice.
    if cfg.frames % 4 or cfg.size % 4 or cfg.n_mels % 4 or columns % 4:
        raise data.UserError("--frames, --size, --n_mels, --rate / --fps / --hop must divide by 4.")
    t, h, w = cfg.blocks
    if min(cfg.blocks) < 1 or cfg.frames % t or side % h or side % w:
        raise data.UserError(f"--blocks must divide {cfg.frames}, {side} and {side}.")

    # Rotary positions turn pairs of channels.
    if cfg.width % 8 or cfg.width % (2 * cfg.proj_heads) or cfg.head_dim % 4:
        raise data.UserError("--width must divide by 8 and 2 * --proj_heads, --head_dim by 4.")
    if cfg.dit_width % 4 or cfg.dit_width % (2 * cfg.dit_heads):
        raise data.UserError("--dit_width must divide by 4 and 2 * --dit_heads.")
    if cfg.t5 and t5_width(cfg.t5) != cfg.text_width:
        raise data.UserError(
            f"--t5 {cfg.t5} is not the folder of a T5 whose words have --text_width "
            f"{cfg.text_width} features."
        )


# ---- Audio as video (section 3.1): per frame one image, rows low to high pitch, columns time.


# same as uniform_dit.py
def unmel(m, bank):
    """Bands (B, M, columns) -> the bins (B, bins, columns), none negative, that explain them best.

    bank (M, bins): the weights of the bins in the bands.
    """
    size = (torch.linalg.pinv(bank) @ m).clamp(min=1e-6)
    # Least squares without negative bins, by the updates of Lee and Seung.
    for _ in range(100):
        size = size * (bank.T @ m) / (bank.T @ (bank @ size) + 1e-9)
    return size


# same as uniform_dit.py
def griffin_lim(size, stft, istft, rounds):
    """A waveform (B, L) whose spectrum has these magnitudes (B, bins, columns).

    stft: (B, L) -> complex (B, bins, columns), istft: its inverse. Fast Griffin-Lim, momentum 0.99.
    """
    # All clips start from the same phases: no clip's sound depends on its neighbors.
    draw = torch.Generator().manual_seed(0)
    angle = torch.rand(size.shape[1:], generator=draw).to(size.device) * 2 * math.pi
    phase = torch.polar(torch.ones_like(angle), angle)
    before = 0
    for _ in range(rounds):
        now = stft(istft(size * phase))
        phase = now - 0.99 / 1.99 * before
        phase = phase / (phase.abs() + 1e-12)
        before = now
    return istft(size * phase)


class Mel(nn.Module):
    """Waveform <-> mel images. One STFT over the whole clip, not one per frame: no seams."""

    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        self.columns = cfg.rate // cfg.fps // cfg.hop  # of an image, K
        f = torch.arange(cfg.n_fft // 2 + 1) * cfg.rate / cfg.n_fft  # Hz
        top = 2595 * math.log10(1 + cfg.rate / 1400)  # HTK mel of rate / 2
        edges = 700 * (10 ** (torch.linspace(0, top, cfg.n_mels + 2) / 2595) - 1)
        low = edges[:-2, None]
        middle = edges[1:-1, None]
        high = edges[2:, None]
        rising = (f - low) / (middle - low)
        falling = (high - f) / (high - middle)
        bank = torch.minimum(rising, falling).clamp(min=0)  # (M, bins): triangles
        bank = bank / bank.sum(1, keepdim=True).clamp(min=1e-8)
        self.register_buffer("bank", bank, persistent=False)
        self.register_buffer("window", torch.hann_window(cfg.window), persistent=False)

    def stft(self, x):
        """(B, L) -> (B, bins, L / hop + 1); column k is centered on sample k * hop."""
        cfg = self.cfg
        x = torch.stft(x, cfg.n_fft, cfg.hop, cfg.window, self.window, return_complex=True)
        return x / (cfg.window / 4)  # half the window's sum: a full-scale sine has size 1

    def istft(self, x):
        """The inverse: (B, bins, L / hop + 1) -> (B, L)."""
        cfg = self.cfg
        x = x * (cfg.window / 4)
        length = cfg.frames * cfg.rate // cfg.fps
        return torch.istft(x, cfg.n_fft, cfg.hop, cfg.window, self.window, length=length)

    def forward(self, audio):
        """(B, 1, L) -> (B, F, 1, M, K) in [-1, 1]: log of the magnitude above a soft floor."""
        with torch.autocast(audio.device.type, enabled=False):
            size = self.stft(audio[:, 0].float()).abs()  # (B, bins, F * K + 1)
            m = self.bank @ size[..., :-1]  # (B, M, F * K)
            a = torch.log1p(m / self.cfg.floor) / math.log1p(1 / self.cfg.floor)  # in [0, 1]
        images = (2 * a - 1).unflatten(2, (-1, self.columns))  # (B, M, F, K)
        return images.transpose(1, 2)[:, :, None]

    def inverse(self, images):
        """(B, F, 1, M, K) -> (B, L), by Griffin-Lim."""
        floor = self.cfg.floor
        a = images[:, :, 0].float().transpose(1, 2).flatten(2)  # (B, M, F * K)
        a = (a.clamp(-1, 1) + 1) / 2
        m = floor * torch.expm1(a * math.log1p(1 / floor))
        size = unmel(F.pad(m, (0, 1), mode="replicate"), self.bank)
        return griffin_lim(size, self.stft, self.istft, self.cfg.griffin_lim)


# same as uniform_dit.py
def psnr(x, y):
    """10 log10(2^2 / MSE) of clips in [-1, 1], averaged over the batch, in dB."""
    mse = (x.float() - y.float()).square().flatten(1).mean(1).clamp(min=1e-12)  # (B,)
    return (10 * torch.log10(4 / mse)).mean()


# ---- MDSA (section 3.1). Features are channels-last: volumes u (B, F, L, L, D), planes (B, rows,
# columns, D), tokens (B, N, D). m names a stream, "v" or "a", k a plane. Every residual branch ends
# in a layer of zeros: it starts as nothing.

# The planes, each with the axis of u (B, t, h, w, D) that it leaves out.
PLANES = {"hw": 1, "tw": 2, "th": 3}


# same as mm_diffusion.py
def zeroed(module):
    """Zero a layer: its residual branch starts as nothing, and the fresh network outputs 0."""
    for p in module.parameters():
        nn.init.zeros_(p)
    return module


# same as mm_diffusion.py
def attend(q, k, v, heads):
    """softmax(q k^T / sqrt(d)) v (eq. 8), a head being a run of d channels.

    q (B, N, C), k and v (B, M, C) -> (B, N, C).
    """
    rows = 32768  # CUDA's fused kernels fail above 65,535
    if len(q) > rows:
        parts = zip(q.split(rows), k.split(rows), v.split(rows), strict=True)
        return torch.cat([attend(*part, heads) for part in parts])
    q = q.unflatten(-1, (heads, -1)).transpose(1, 2)  # (B, heads, N, d)
    k = k.unflatten(-1, (heads, -1)).transpose(1, 2)  # (B, heads, M, d)
    v = v.unflatten(-1, (heads, -1)).transpose(1, 2)  # (B, heads, M, d)
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)  # (B, N, C)


# same as uniform_dit.py
def rotate(x, turn):
    """Rotary position: turn the channel pairs (2i, 2i + 1) of every head.

    x (B, N, heads, d); turn (2, N, 1, d): cosines, and sines with the signs of a rotation.
    """
    swapped = x.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
    return x * turn[0] + swapped * turn[1]


# same as uniform_dit.py
def turning(angles):
    """Angles of the channel pairs (N, d / 2) -> what rotate() needs, (2, N, 1, d)."""
    angles = angles.repeat_interleave(2, -1)  # (N, d)
    signs = torch.tensor([-1.0, 1.0]).repeat(angles.shape[1] // 2)
    return torch.stack([angles.cos(), angles.sin() * signs])[:, :, None]


# same as uniform_dit.py
def line(n, dim):
    """Turns of the positions 0 ... n - 1, at the frequencies 10000^(-2i / dim)."""
    freqs = 10000 ** (-torch.arange(0, dim, 2) / dim)
    return turning(torch.arange(n)[:, None] * freqs)


# same as uniform_dit.py
def grid(shape, dim):
    """Turns of the N places of a grid; each axis has its share of the channel pairs.

    It runs from -pi to pi, times scales from 1 to 5.
    """
    count = dim // 2 // len(shape)
    scales = math.pi * torch.logspace(0, math.log2(5), count, base=2)
    axes = torch.meshgrid(*[torch.linspace(-1, 1, n) for n in shape], indexing="ij")
    angles = torch.cat([x.flatten()[:, None] * scales for x in axes], 1)  # (N, axes * count)
    return turning(F.pad(angles, (0, dim // 2 - angles.shape[1])))


class Attention(nn.Module):
    """Attention from x (B, N, D) to itself, or to c (B, N, D); turn: positions, for rotate()."""

    def __init__(self, width, heads, head_dim):
        super().__init__()
        self.heads = heads
        self.to_qkv = nn.Linear(width, 3 * heads * head_dim, bias=False)
        self.to_out = zeroed(nn.Linear(heads * head_dim, width))

    def forward(self, x, turn=None, c=None):
        c = x if c is None else c
        w_q, w_k, w_v = self.to_qkv.weight.chunk(3)
        q = F.linear(x, w_q)  # (B, N, heads * head_dim)
        k = F.linear(c, w_k)
        v = F.linear(c, w_v)
        if turn is not None:
            q = rotate(q.unflatten(-1, (self.heads, -1)), turn).flatten(2)
            k = rotate(k.unflatten(-1, (self.heads, -1)), turn).flatten(2)
        return self.to_out(attend(q, k, v, self.heads))


class GEGLU(nn.Module):
    """Half of the channels, gated by the others."""

    def forward(self, x):
        x, gate = x.chunk(2, dim=-1)
        return x * F.gelu(gate)


class PreNorm(nn.Module):
    """fn(LayerNorm(x), ...), to be added to x."""

    def __init__(self, width, fn):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.fn = fn

    def forward(self, x, *more):
        return self.fn(self.norm(x), *more)


# same as uniform_dit.py
def recomputed(cfg, function, *inputs):
    """function(*inputs). With --checkpoint, backward computes again what is inside."""
    if cfg.checkpoint and torch.is_grad_enabled():
        return checkpoint(function, *inputs, use_reentrant=False)
    return function(*inputs)


class TimeSformer(nn.Module):
    """Layers of attention over time at each place, over space in each frame, and a gated MLP."""

    def __init__(self, cfg, depth):
        super().__init__()
        self.cfg = cfg
        width = cfg.width
        inner = cfg.ff_mult * width
        side = cfg.size // cfg.patch
        self.layers = nn.ModuleList()
        for _ in range(depth):
            over_time = Attention(width, cfg.heads, cfg.head_dim)
            over_space = Attention(width, cfg.heads, cfg.head_dim)
            last = zeroed(nn.Linear(inner, width))
            mlp = nn.Sequential(nn.Linear(width, 2 * inner), GEGLU(), last)
            parts = [PreNorm(width, part) for part in (over_time, over_space, mlp)]
            self.layers.append(nn.ModuleList(parts))
        self.register_buffer("time", line(cfg.frames, cfg.head_dim), persistent=False)
        self.register_buffer("space", grid((side, side), cfg.head_dim), persistent=False)

    def forward(self, x):
        """(B, F, L, L, D) -> the same."""
        side = x.shape[2]
        x = x.flatten(2, 3)  # (B, F, N, D), N = L * L
        for layer in self.layers:
            x = recomputed(self.cfg, self.run, layer, x)
        return x.unflatten(2, (side, side))

    def run(self, layer, x):
        over_time, over_space, mlp = layer
        y = over_time(x.transpose(1, 2).flatten(0, 1), self.time)  # (B * N, F, D)
        x = x + y.unflatten(0, (len(x), -1)).transpose(1, 2)
        y = over_space(x.flatten(0, 1), self.space)  # (B * F, N, D)
        x = x + y.view_as(x)
        return x + mlp(x)


class Projection(nn.Module):
    """Eq. 2: the n tokens along one axis -> one, a token of our own after a small transformer.

    It starts as their mean. PVDM's code adds one that starts anywhere, but reads its neighbor.
    """

    def __init__(self, n, cfg):
        super().__init__()
        d = cfg.width
        self.cfg = cfg
        self.token = nn.Parameter(torch.zeros(d))
        self.table = nn.Parameter(torch.cat([torch.randn(n, d) / 2, torch.zeros(1, d)]))
        self.layers = nn.ModuleList()
        for _ in range(cfg.proj_depth):
            attention = Attention(d, cfg.proj_heads, d // 8)
            last = zeroed(nn.Linear(cfg.proj_mlp, d))
            mlp = nn.Sequential(nn.Linear(d, cfg.proj_mlp), nn.GELU(), last)
            self.layers.append(nn.ModuleList([PreNorm(d, attention), PreNorm(d, mlp)]))

    def forward(self, x):
        """(B, n, D) -> (B, D)"""
        x = torch.cat([x, self.token + x.mean(1, keepdim=True)], 1) + self.table  # (B, n + 1, D)
        for layer in self.layers:
            x = recomputed(self.cfg, self.run, layer, x)
        return x[:, -1]

    def run(self, layer, x):
        attention, mlp = layer
        x = x + attention(x)
        return x + mlp(x)


class MTSelfAttention(nn.Module):
    """Eq. 4, 5: a plane attends over time at 1, 1/2 and 1/4 of its rate; their sum is added."""

    scales = (1, 2, 4)

    def __init__(self, cfg):
        super().__init__()
        d = cfg.width
        self.attention = nn.ModuleList()
        self.up = nn.ModuleList()
        for k in self.scales:
            attention = Attention(d, cfg.proj_heads, d // cfg.proj_heads)
            attention.to_out.reset_parameters()  # zeros here and in `up` would never learn
            self.attention.append(PreNorm(d, attention))
            self.up.append(zeroed(nn.ConvTranspose1d(d, d, k, stride=k)))
        turn = line(cfg.frames, d // cfg.proj_heads)
        self.register_buffer("turn", turn, persistent=False)

    def forward(self, z):
        """(B, F, S, D) -> the same; each of the S columns is on its own."""
        x = z.transpose(1, 2).flatten(0, 1).mT  # (B * S, D, F)
        total = 0
        for k, attention, up in zip(self.scales, self.attention, self.up, strict=True):
            y = F.avg_pool1d(x, k).mT  # (B * S, F / k, D)
            y = attention(y, self.turn[:, : y.shape[1]])
            total = total + up(y.mT)  # (B * S, D, F)
        return z + total.mT.unflatten(0, (len(z), -1)).transpose(1, 2)


class CrossPair(nn.Module):
    """Eq. 6 both ways: v + CA(v, a) and a + CA(a, v), each from the other as it was before.

    The tokens (B, N, D) are the N places of a grid of this shape.
    """

    def __init__(self, cfg, shape):
        super().__init__()
        d = cfg.width
        head_dim = d // cfg.proj_heads
        self.v_norm = nn.LayerNorm(d)
        self.a_norm = nn.LayerNorm(d)
        self.v_from_a = Attention(d, cfg.proj_heads, head_dim)
        self.a_from_v = Attention(d, cfg.proj_heads, head_dim)
        self.register_buffer("turn", grid(shape, head_dim), persistent=False)

    def forward(self, v, a):
        normed_v = self.v_norm(v)
        normed_a = self.a_norm(a)
        v = v + self.v_from_a(normed_v, self.turn, normed_a)
        a = a + self.a_from_v(normed_a, self.turn, normed_v)
        return v, a


class Stream(nn.Module):
    """One modality: its encoder to three planes, and its decoder.

    patch: height and width of a patch, so that there are L x L in an image.
    """

    def __init__(self, cfg, channels, patch):
        super().__init__()
        d = cfg.width
        head_dim = d // cfg.proj_heads
        numbers = channels * patch[0] * patch[1]  # in a patch
        side = cfg.size // cfg.patch
        self.patch = patch
        self.to_patch = nn.Linear(numbers, d)
        self.encoder = TimeSformer(cfg, cfg.depth)
        self.project = nn.ModuleDict(
            {
                "hw": Projection(cfg.frames, cfg),
                "tw": Projection(side, cfg),
                "th": Projection(side, cfg),
            }
        )
        self.within = nn.ModuleDict({"hw": PreNorm(d, Attention(d, cfg.proj_heads, head_dim))})
        if cfg.mt_attn:
            self.within["tw"] = MTSelfAttention(cfg)
            self.within["th"] = MTSelfAttention(cfg)
        self.pre = nn.ModuleDict()  # to mean and log-variance, before tanh
        self.post = nn.ModuleDict()
        for k in PLANES:
            self.pre[k] = nn.Linear(d, 2 * cfg.plane_channels)
            self.post[k] = nn.Linear(cfg.plane_channels, d)
        self.decoder = TimeSformer(cfg, cfg.decoder_depth)
        self.to_pixel = nn.Linear(d, numbers)
        self.register_buffer("space", grid((side, side), head_dim), persistent=False)

    def patches(self, x):
        """(B, F, C, H, W) -> (B, F, L, L, p * q * C), channels fastest."""
        p, q = self.patch
        x = x.unflatten(4, (-1, q)).unflatten(3, (-1, p))  # (B, F, C, L, p, L, q)
        return x.permute(0, 1, 3, 5, 4, 6, 2).flatten(4)

    def pixels(self, x):
        """The inverse of patches()."""
        p, q = self.patch
        x = x.unflatten(4, (p, q, -1))  # (B, F, L, L, p, q, C)
        return x.permute(0, 1, 6, 2, 4, 3, 5).flatten(5).flatten(3, 4)

    def planes(self, x):
        """Pixels -> {plane: (B, rows, columns, D)}."""
        u = self.encoder(self.to_patch(self.patches(x)))  # (B, F, L, L, D), eq. 1
        planes = {}
        for k, axis in PLANES.items():
            tokens = u.movedim(axis, 3)  # (B, rows, columns, n, D)
            plane = self.project[k](tokens.flatten(0, 2))  # (B * rows * columns, D), eq. 2
            planes[k] = plane.view(*tokens.shape[:3], -1)
        return planes

    def attend_within(self, planes):
        """Self-attention of hw over its places; of tw and th over time (eq. 4, 5)."""
        hw = planes["hw"]
        attended = dict(planes)
        attended["hw"] = hw + self.within["hw"](hw.flatten(1, 2), self.space).view_as(hw)
        for k in ("tw", "th"):
            if k in self.within:
                attended[k] = self.within[k](planes[k])
        return attended

    def expand(self, z):
        """Eq. 7: planes of C channels -> the sum of their copies in a volume (B, F, L, L, D)."""
        return sum(self.post[k](z[k]).unsqueeze(axis) for k, axis in PLANES.items())

    def render(self, volume):
        """(B, F, L, L, D) -> pixels."""
        return self.pixels(self.to_pixel(self.decoder(volume)))


class MDSA(nn.Module):
    """The autoencoder. Both streams are dicts: {"v": video, "a": mel images} (B, F, C, H, W).

    Their latents are {"v": {"hw": (B, L, L, C), "tw": (B, F, L, C), "th": (B, F, L, C)}, "a": ...},
    in (-1, 1). One stream alone will do, too.
    """

    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        side = cfg.size // cfg.patch
        self.mel = Mel(cfg)
        self.streams = nn.ModuleDict()
        if "v" in cfg.streams:
            self.streams["v"] = Stream(cfg, 3, (cfg.patch, cfg.patch))
        if "a" in cfg.streams:
            self.streams["a"] = Stream(cfg, 1, (cfg.n_mels // side, self.mel.columns // side))
        self.gcm = nn.ModuleDict()
        if cfg.gcm_attn and cfg.streams == "av":
            self.gcm["hw"] = CrossPair(cfg, (side, side))
            self.gcm["tw"] = CrossPair(cfg, (cfg.frames, side))
            self.gcm["th"] = CrossPair(cfg, (cfg.frames, side))
        self.biblock = None
        if cfg.biblock and cfg.streams == "av":
            self.biblock = CrossPair(cfg, cfg.blocks)

    def inputs(self, batch):
        """A batch, or one of its streams alone, on the device -> what encode() takes."""
        x = {}
        if "v" in self.streams and "video" in batch:
            x["v"] = batch["video"]  # (B, F, 3, H, W)
        if "a" in self.streams and "audio" in batch:
            x["a"] = self.mel(batch["audio"])  # (B, F, 1, M, K)
        return x

    def encode(self, x):
        """Streams of pixels -> {stream: {plane: (mean, log-variance)}}, before tanh.

        Each is (B, rows, columns, C).
        """
        planes = {}
        for m in x:
            projected = self.streams[m].planes(x[m])  # eq. 1, 2
            planes[m] = self.streams[m].attend_within(projected)  # eq. 4, 5
        if len(x) == 2:
            for k, pair in self.gcm.items():  # eq. 6
                shape = planes["v"][k].shape
                v, a = pair(planes["v"][k].flatten(1, 2), planes["a"][k].flatten(1, 2))
                planes["v"][k] = v.view(shape)
                planes["a"][k] = a.view(shape)
        codes = {}
        for m in x:
            pre = self.streams[m].pre
            codes[m] = {k: pre[k](plane).chunk(2, -1) for k, plane in planes[m].items()}
        return codes

    def decode(self, z):
        """Latents -> the streams of pixels."""
        volumes = {m: self.streams[m].expand(z[m]) for m in z}  # (B, F, L, L, D) each, eq. 7
        if self.biblock is not None and len(z) == 2:  # eq. 8
            v, a = self.biblock(self.cut(volumes["v"]), self.cut(volumes["a"]))
            volumes = {"v": self.join(v), "a": self.join(a)}
        return {m: self.streams[m].render(volume) for m, volume in volumes.items()}

    def cut(self, x):
        """A volume (B, F, L, L, D) -> its blocks (B * blocks, t * h * w, D)."""
        t, h, w = self.cfg.blocks
        x = x.unflatten(3, (-1, w)).unflatten(2, (-1, h)).unflatten(1, (-1, t))
        x = x.permute(0, 1, 3, 5, 2, 4, 6, 7)  # from (B, T, t, Y, h, X, w, D)
        return x.flatten(4, 6).flatten(0, 3)

    def join(self, x):
        """The inverse of cut()."""
        t, h, w = self.cfg.blocks
        side = self.cfg.size // self.cfg.patch
        x = x.view(-1, self.cfg.frames // t, side // h, side // w, t, h, w, x.shape[-1])
        x = x.permute(0, 1, 4, 2, 5, 3, 6, 7)  # (B, T, t, Y, h, X, w, D)
        return x.flatten(5, 6).flatten(3, 4).flatten(1, 2)

    def forward(self, x, eps=None):
        """x -> reconstructions, latents, and {stream: KL of its latents to N(0, 1), before tanh}.

        z = tanh(mean) or, with noise eps of the latents' shapes, tanh(mean + deviation * eps).
        """
        codes = self.encode(x)
        z = {}
        kl = {}
        for m, planes in codes.items():
            z[m] = {}
            kl[m] = 0
            for k, (mean, logvar) in planes.items():
                kl_of_each = (mean**2 + logvar.exp() - 1 - logvar) / 2  # (B, rows, columns, C)
                kl[m] = kl[m] + kl_of_each.flatten(1).sum(1).mean()
                if eps is not None:
                    mean = mean + (0.5 * logvar).exp() * eps[m][k]
                z[m][k] = torch.tanh(mean)
        return self.decode(z), z, kl


# ---- The start of MDSA: the best linear code of some clips. Trained from random weights for
# minutes instead, small autoencoders ended below a constant color. In float64, on the CPU.


# same as uniform_dit.py
def pca(parts):
    """The principal axes of rows, which come in parts (n, P).

    -> mean (P,); variances along the axes (P,), largest first; axes (P, P), in columns.
    """
    count = 0
    total = 0
    squares = 0
    for x in parts:
        count += len(x)
        total = total + x.sum(0)
        squares = squares + x.T @ x
    mean = total / count
    variances, axes = torch.linalg.eigh(squares / count - mean[:, None] * mean)
    return mean, variances.flip(0), axes.flip(1)


def least_squares(pairs):
    """The linear map from x to y with the least squared error, from parts (x (n, I), y (n, O)).

    -> weights (I, O) and bias (O,). A small ridge keeps them finite where x has no variance.
    """
    count = 0
    xx = 0
    xy = 0
    for x, y in pairs:
        x = F.pad(x, (0, 1), value=1.0)  # the last column's weight is the bias
        count += len(x)
        xx = xx + x.T @ x
        xy = xy + x.T @ y
    ridge = 1e-4 * count * torch.eye(len(xx), dtype=xx.dtype)
    solution = torch.linalg.solve(xx + ridge, xy)  # (I + 1, O)
    return solution[:-1], solution[-1]


@torch.no_grad()
def start_closed_form(stream, clips):
    """Make a fresh Stream the best linear autoencoder of the clips, a list of (B, F, C, H, W).

    That is what it is while its residual branches are zero: patches -> features -> planes, which
    are means along an axis -> features -> patches. One clip is held in float64 at a time.
    """
    stream.double()
    C = stream.post["hw"].in_features
    mean, variances, axes = pca(stream.patches(x.double()).flatten(0, 3) for x in clips)

    # The first features are the principal components of patches, scaled to a deviation of 1.
    n = min(len(mean), stream.to_patch.out_features)
    axes = axes[:, :n]  # (P, n)
    deviations = variances[:n].clamp(min=1e-3 * variances[0]).sqrt()
    nn.init.normal_(stream.to_patch.weight, std=1e-3)
    nn.init.normal_(stream.to_pixel.weight, std=1e-3)
    nn.init.zeros_(stream.to_patch.bias)
    stream.to_patch.weight[:n] = (axes / deviations).T
    stream.to_patch.bias[:n] = -(axes / deviations).T @ mean
    stream.to_pixel.weight[:, :n] = axes * deviations
    stream.to_pixel.bias.copy_(mean)

    def embedded():  # the clips as features, one after another
        for x in clips:
            yield stream.to_patch(stream.patches(x.double()))  # (B, F, L, L, D)

    # A plane's channels are those of its features, which weigh as much as they do in pixels.
    for k, axis in PLANES.items():
        pixels = (stream.to_pixel(u.mean(axis)).flatten(0, 2) for u in embedded())
        mean, variances, axes = pca(pixels)
        deviations = variances.clamp(min=1e-8).sqrt()
        rows = 0.6 * (axes / deviations).T[:C]  # (C, P); 0.6: most of them where tanh is steep
        nn.init.zeros_(stream.pre[k].weight)
        nn.init.zeros_(stream.pre[k].bias)
        stream.pre[k].weight[: len(rows)] = rows @ stream.to_pixel.weight
        stream.pre[k].bias[: len(rows)] = rows @ (stream.to_pixel.bias - mean)
        stream.pre[k].bias[C:] = -4  # log-variance: a deviation of 0.14

    # Back to features, from what the three planes' codes say of a place.
    def pairs():
        for u in embedded():
            z = []
            for k, axis in PLANES.items():
                code = torch.tanh(stream.pre[k](u.mean(axis))[..., :C])  # (B, rows, columns, C)
                z.append(code.unsqueeze(axis).expand(*u.shape[:4], C))
            yield torch.cat(z, -1).flatten(0, 3), u.flatten(0, 3)

    weights, bias = least_squares(pairs())  # (3 C, D), (D,)
    for k, w in zip(PLANES, weights.split(C), strict=True):
        stream.post[k].weight.copy_(w.T)
        stream.post[k].bias.copy_(bias / 3)
    stream.float()


# ---- The losses of MDSA (eq. 10-12)

NAMES = {"v": "video", "a": "audio"}


class PatchDiscriminator(nn.Module):
    """PatchGAN over images (dims = 2) or clips (3): x -> outputs of its layers, last the logits."""

    def __init__(self, dims, channels, width):
        super().__init__()
        conv = nn.Conv2d if dims == 2 else nn.Conv3d
        widths = [channels, width, 2 * width, 4 * width, 8 * width, 1]
        self.layers = nn.ModuleList()
        for i in range(5):
            stride = 2 if i < 3 else 1
            layer = nn.Sequential(conv(widths[i], widths[i + 1], 4, stride, 2))
            nn.init.normal_(layer[0].weight, std=0.02)
            if 0 < i < 4:
                layer.append(nn.GroupNorm(min(8, widths[i + 1]), widths[i + 1]))
            if i < 4:
                layer.append(nn.LeakyReLU(0.2))
            self.layers.append(layer)

    def forward(self, x):
        outputs = []
        for layer in self.layers:
            x = layer(x)
            outputs.append(x)
        return outputs


def perceptual(x, y):
    """How different images (N, C, H, W) look; put LPIPS here if you have its weights.

    This stands in for it: the L1 distance of three levels of their Laplacian pyramids.
    """
    d = x - y  # the pyramid is linear: that of the difference will do
    distance = 0
    for _ in range(2):
        low = F.avg_pool2d(d, 2)
        distance = distance + (d - F.interpolate(low, scale_factor=2.0)).abs().mean()
        d = low
    return distance + d.abs().mean()


def adversarial(critic, real, fake):
    """Hinge losses of both players and feature matching, with PVDM's weights 1 and 4.

    One backward serves both: what the critic learns moves its weights alone, what the autoencoder
    learns moves the fake alone.
    """
    # The critic learns to give real clips more than 1, fake ones less than -1.
    *goals, r = critic(real)
    *_, f = critic(fake.detach())
    loss = 0.5 * (F.relu(1 - r).mean() + F.relu(1 + f).mean())
    # The autoencoder learns to be given much, and the features of the real clip.
    frozen = {name: p.detach() for name, p in critic.named_parameters()}
    *features, f = torch.func.functional_call(critic, frozen, (fake,))
    loss = loss - f.mean()
    for goal, y in zip(goals, features, strict=True):
        loss = loss + 4 * (y - goal.detach()).abs().mean()
    return loss


# same as uniform_dit.py
def generators(keys, device):
    """A random generator for each clip, seeded by its own key (B,).

    So noise is the same however the clips are dealt to processes. Keys stay on the CPU: to read
    them, nothing waits for a GPU.
    """
    return [torch.Generator(device).manual_seed(key) for key in keys.tolist()]


# same as uniform_dit.py
def names_like(model, pattern):
    """The names of a model's parameters in which the pattern occurs."""
    return tuple(name for name, _ in model.named_parameters() if re.search(pattern, name))


class Autoencoding(nn.Module):
    """What stage mdsa trains: the MDSA and, with --adv, each stream's critics."""

    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        self.mdsa = MDSA(cfg)
        self.critics = nn.ModuleDict()  # of each stream: one of images, one of clips
        if cfg.adv:
            for m in cfg.streams:
                channels = 3 if m == "v" else 1
                critics = [PatchDiscriminator(dims, channels, cfg.disc_width) for dims in (2, 3)]
                self.critics[m] = nn.ModuleList(critics)
        # Muon also turns the layers between patches and features, which the closed form has set:
        # 5 % less error after toy's 450 steps than with AdamW for these.
        self.edges = names_like(self, "table|critics")

    def draw(self, keys, device):
        """What is random in the second phase.

        -> the frame of each clip (B,) that the critic of images sees, and noise for the latents.
        """
        cfg = self.cfg
        side = cfg.size // cfg.patch
        shape = (len(cfg.streams), side + 2 * cfg.frames, side, cfg.plane_channels)
        frame = []
        noise = []
        for own in generators(keys, device):
            frame.append(torch.randint(cfg.frames, (), generator=own, device=device))
            noise.append(torch.randn(shape, generator=own, device=device))
        noise = torch.stack(noise)  # (B, streams, rows of the three planes, L, C)
        eps = {}
        for i, m in enumerate(cfg.streams):
            hw, tw, th = noise[:, i].split((side, cfg.frames, cfg.frames), 1)
            eps[m] = {"hw": hw, "tw": tw, "th": th}
        return torch.stack(frame), eps

    def forward(self, x, second=False, frame=None, eps=None):
        """-> loss (eq. 10), {stream: its reconstruction error}.

        second: past the threshold of eq. 12, with frame and eps of draw().
        """
        kind = self.cfg.kl if second else "off"
        out, _, kl = self.mdsa(x, eps if kind == "latent" else None)
        total = 0
        parts = {}
        for m, real in x.items():
            fake = out[m].float()
            look = perceptual(real.flatten(0, 1), fake.flatten(0, 1))
            loss = 4 * (real - fake).abs().mean() + 4 * look
            parts[NAMES[m]] = 0.5 * loss.detach()
            if kind == "latent":
                loss = loss + 6e-6 * kl[m]
            if kind == "pixel":
                # Eq. 11 to the letter, over the clip's pixels: 1e-3 or so, times 6e-6. Table 5
                # misses that, so the KL of the latents is the default.
                p = real.flatten(1).log_softmax(1)
                q = fake.flatten(1).log_softmax(1)
                loss = loss + 6e-6 * F.kl_div(p, q, reduction="batchmean", log_target=True)
            if self.cfg.adv and second:
                of_images, of_clips = self.critics[m]
                clips = torch.arange(len(real), device=real.device)
                loss = loss + adversarial(of_images, real[clips, frame], fake[clips, frame])
                loss = loss + adversarial(of_clips, real.transpose(1, 2), fake.transpose(1, 2))
            elif self.cfg.adv:
                # DDP wants every parameter to have a gradient in every step.
                loss = loss + 0 * sum(p.sum() for p in self.critics[m].parameters())
            total = total + 0.5 * loss
        return total, parts


# ---- The generator: STDiT of Open-Sora 1.2 (section 3.2); a block has that code's names. Its film
# (B, T, S, D) has the planes for frames, each with S tokens of 2 x 2 numbers.


# same as uniform_dit.py
def attend_where(q, k, v, mask):
    """Attention of q (N, heads, n, d) to the keys that mask (N, 1, 1, m) tells -> (N, n, D)."""
    rows = 32768
    if len(q) > rows:  # CUDA's fused kernels fail above 65,535
        masks = [None] * len(q.split(rows)) if mask is None else mask.split(rows)
        parts = zip(q.split(rows), k.split(rows), v.split(rows), masks, strict=True)
        return torch.cat([attend_where(*part) for part in parts])
    x = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return x.transpose(1, 2).flatten(2)


# same as uniform_dit.py
class SelfAttention(nn.Module):
    """(N, n, D) -> (N, n, D); queries and keys are normed per head, then turned.

    mask (N, 1, 1, n): keys that count.
    """

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.q_norm = nn.RMSNorm(width // heads, eps=1e-6)
        self.k_norm = nn.RMSNorm(width // heads, eps=1e-6)

    def forward(self, x, turn=None, mask=None):
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).unbind(2)  # (N, n, heads, d)
        q = self.q_norm(q.float()).to(v)
        k = self.k_norm(k.float()).to(v)
        if turn is not None:
            q = rotate(q, turn)
            k = rotate(k, turn)
        x = attend_where(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), mask)
        return self.proj(x)


# same as uniform_dit.py
class CrossAttention(nn.Module):
    """(B, N, D) from the words y (B, M, D), of which mask (B, M) tells the real ones."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.q_linear = nn.Linear(width, width)
        self.kv_linear = nn.Linear(width, 2 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x, y, mask=None):
        q = self.q_linear(x).unflatten(-1, (self.heads, -1))  # (B, N, heads, d)
        k, v = self.kv_linear(y).unflatten(-1, (2, self.heads, -1)).unbind(2)  # (B, M, heads, d)
        if mask is not None:
            mask = mask[:, None, None]
        x = attend_where(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), mask)
        return self.proj(x)


# same as uniform_dit.py
class Mlp(nn.Module):
    """Two layers, tanh-GELU between them."""

    def __init__(self, i, hidden, o):
        super().__init__()
        self.fc1 = nn.Linear(i, hidden)
        self.fc2 = nn.Linear(hidden, o)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


# same as uniform_dit.py
def modulate(x, shift, scale):
    """LayerNorm whose scale and shift depend on the time."""
    return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift


# same as uniform_dit.py
class STDiT3Block(nn.Module):
    """Attention inside each frame (spatial) or along time at each place (temporal); to the text;
    MLP. The first and the last are modulated and gated by the time embedding (adaLN-single)."""

    def __init__(self, width, heads, temporal=False):
        super().__init__()
        self.temporal = temporal
        self.scale_shift_table = nn.Parameter(torch.randn(6, width) / width**0.5)
        self.attn = SelfAttention(width, heads)
        self.cross_attn = CrossAttention(width, heads)
        self.mlp = Mlp(width, 4 * width, width)

    def forward(self, x, y, t6, y_mask=None, mask=None, turn=None):
        """x (B, T, S, D); words y (B, M, D) with y_mask (B, M); t6 (B, 1 or T, 6 * D).

        mask (N, 1, 1, n), turn (2, n, 1, d): tokens that exist, and rotary positions, of the n = S
        places (spatial) or n = T frames (temporal).
        """
        table = self.scale_shift_table + t6.unflatten(-1, (6, -1))  # (B, 1 or T, 6, D)
        rows = table[:, :, :, None].unbind(2)  # (B, 1 or T, 1, D) each
        shift1, scale1, gate1, shift2, scale2, gate2 = rows
        h = modulate(x, shift1, scale1)
        if self.temporal:
            h = h.transpose(1, 2)  # (B, S, T, D)
        h = self.attn(h.flatten(0, 1), turn, mask).view(h.shape)
        if self.temporal:
            h = h.transpose(1, 2)
        x = x + gate1 * h
        x = x + self.cross_attn(x.flatten(1, 2), y, y_mask).view(x.shape)
        return x + gate2 * self.mlp(modulate(x, shift2, scale2))


# same as mm_diffusion.py
def time_embedding(t, dim):
    """Sinusoids of the diffusion step, cosines first: (B,) -> (B, dim)."""
    half = torch.arange(dim // 2, device=t.device)
    freqs = torch.exp(-math.log(10000) / (dim // 2) * half)
    angles = t.float()[:, None] * freqs  # (B, dim / 2)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def place_embedding(rows, columns, dim):
    """Fixed sinusoids (rows * columns, dim): half of the channels tell the column, half the row."""
    row = time_embedding(torch.arange(rows), dim // 2).roll(dim // 4, -1)  # here, sines come first
    column = time_embedding(torch.arange(columns), dim // 2).roll(dim // 4, -1)
    return torch.cat([column.repeat(rows, 1), row.repeat_interleave(columns, 0)], -1)


class STDiT(nn.Module):
    """Velocity of the stacked planes. valid (P, R): rows of the P planes that hold data.

    The others neither are attended to nor count.
    """

    def __init__(self, cfg, valid):
        super().__init__()
        self.cfg = cfg
        D = cfg.dit_width
        heads = cfg.dit_heads
        values = 4 * cfg.plane_channels  # of a token: 2 x 2 numbers in each channel
        planes = len(valid)
        rows = valid.shape[1] // 2
        columns = cfg.size // cfg.patch // 2
        self.x_embedder = nn.Linear(values, D)
        self.y_proj = Mlp(cfg.text_width, D, D)
        self.t_embedder = nn.Sequential(nn.Linear(256, D), nn.SiLU(), nn.Linear(D, D))
        self.fps_embedder = nn.Sequential(nn.Linear(256, D), nn.SiLU(), nn.Linear(D, D))
        self.t_block = nn.Sequential(nn.SiLU(), nn.Linear(D, 6 * D))
        self.spatial_blocks = nn.ModuleList()
        self.temporal_blocks = nn.ModuleList()
        for _ in range(cfg.dit_depth):
            self.spatial_blocks.append(STDiT3Block(D, heads))
            self.temporal_blocks.append(STDiT3Block(D, heads, temporal=True))
        self.final_table = nn.Parameter(torch.randn(2, D) / D**0.5)
        self.final_linear = nn.Linear(D, values)
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                nn.init.xavier_uniform_(layer.weight)
                nn.init.zeros_(layer.bias)
        # Temporal blocks start as nothing, as in Open-Sora; and so does the velocity.
        for block in self.temporal_blocks:
            for layer in (block.attn.proj, block.cross_attn.proj, block.mlp.fc2):
                nn.init.zeros_(layer.weight)
        nn.init.zeros_(self.final_linear.weight)
        # Ours: unlike frames, each plane is special.
        self.plane_embedding = nn.Parameter(torch.randn(planes, 1, D) * 0.02)

        # Tables: where tokens are, and which exist (None: all).
        mask = None
        if cfg.size // cfg.patch != cfg.frames:
            mask = valid[:, ::2].repeat_interleave(columns, 1)  # (P, S)
        self.register_buffer("mask", mask, persistent=False)
        places = place_embedding(rows, columns, D)  # (S, D)
        self.register_buffer("places", places, persistent=False)
        self.register_buffer("plane_turn", line(planes, D // heads), persistent=False)
        space = grid((rows, columns), D // heads) if cfg.dit_rope else None
        self.register_buffer("space_turn", space, persistent=False)

    def forward(self, x, t, text, text_mask):
        """Planes (B, P, R, L, C), time (B,) in [0, 1], words (B, M, W) -> (B, P, R, L, C)."""
        rows = x.shape[2] // 2
        columns = x.shape[3] // 2
        x = x.unflatten(3, (columns, 2)).unflatten(2, (rows, 2))  # (B, P, rows, 2, columns, 2, C)
        x = x.transpose(3, 4).flatten(4).flatten(2, 3)  # (B, P, S, 4 * C), S = rows * columns
        x = self.x_embedder(x) + self.places + self.plane_embedding  # (B, P, S, D)
        fps = torch.full((1,), self.cfg.fps, device=x.device)
        t = self.t_embedder(time_embedding(1000 * t, 256))
        t = t + self.fps_embedder(time_embedding(fps, 256))  # (B, D)
        t6 = self.t_block(t)[:, None]  # (B, 1, 6 * D)
        y = self.y_proj(text)  # (B, M, D)
        spatial_mask = None
        temporal_mask = None
        if self.mask is not None:
            spatial_mask = self.mask.repeat(len(x), 1)[:, None, None]  # (B * P, 1, 1, S)
            temporal_mask = self.mask.T.repeat(len(x), 1)[:, None, None]  # (B * S, 1, 1, P)
        for spatial, temporal in zip(self.spatial_blocks, self.temporal_blocks, strict=True):
            inputs = (y, t6, text_mask, spatial_mask, self.space_turn)
            x = recomputed(self.cfg, spatial, x, *inputs)
            inputs = (y, t6, text_mask, temporal_mask, self.plane_turn)
            x = recomputed(self.cfg, temporal, x, *inputs)
        shift, scale = (self.final_table + t[:, None])[:, :, None, None].unbind(1)  # (B, 1, 1, D)
        x = self.final_linear(modulate(x, shift, scale))
        x = x.unflatten(3, (2, 2, -1)).unflatten(2, (rows, columns))
        return x.transpose(3, 4).flatten(4, 5).flatten(2, 3)  # from (B, P, rows, columns, 2, 2, C)


# ---- Text. The loader's workers turn captions into numbers; the model, or a T5, reads those.

LETTERS = 12  # of a word; the rest is not read


# same as uniform_dit.py
def spell(caption, cfg):
    """A caption as numbers, 0 for none: (M, LETTERS) of (place, byte), or (M,) tokens of the T5.

    The empty caption stands for none: it has one word, which opens every caption (T5: ends it).
    """
    n = cfg.text_tokens
    if cfg.t5:
        tokenizer = t5(cfg.t5, "tokenizer")
        return np.array(
            tokenizer(caption, padding="max_length", max_length=n, truncation=True)["input_ids"]
        )
    ids = np.zeros((n, LETTERS), np.int64)
    ids[0, 0] = 1
    for i, word in enumerate(re.findall(r"\w+", caption.lower())[: n - 1], 1):
        for place, byte in enumerate(word.encode()[:LETTERS]):
            ids[i, place] = 2 + 256 * place + byte
    return ids


# same as uniform_dit.py
@torch.no_grad()
def read(words, cfg):
    """What spell() wrote, in a batch -> what the model takes, and the mask (B, M) of its words."""
    if not cfg.t5:
        return words, words.any(-1)  # (B, M, LETTERS)
    mask = words > 0
    # T5 is known to overflow in fp16.
    with torch.autocast(words.device.type, enabled=False):
        return t5(cfg.t5, "encoder", words.device)(words, mask).last_hidden_state, mask


# same as uniform_dit.py
class ByteText(nn.Module):
    """A small text encoder: a word is the sum of its letters in their places.

    (B, M, LETTERS) -> (B, M, W)
    """

    def __init__(self, cfg):
        super().__init__()
        self.letters = nn.Embedding(2 + 256 * LETTERS, cfg.text_width, padding_idx=0)
        self.places = nn.Parameter(torch.randn(cfg.text_tokens, cfg.text_width) * 0.3)

    def forward(self, ids):
        return F.layer_norm(self.letters(ids).sum(2), self.places.shape[-1:]) + self.places


# same as uniform_dit.py
def t5_width(folder):
    """Features of a word of the T5 in a folder; None if there is none."""
    return data.config_beside(f"{folder}/config.json").get("d_model")


# same as uniform_dit.py
@functools.lru_cache
def t5(folder, part, device="cpu"):
    """The tokenizer or the encoder of a T5. Raises data.UserError where it cannot be loaded."""
    try:
        import transformers

        if part == "tokenizer":
            # Without its files, transformers would make up one that knows no word.
            if not any(Path(folder, name).is_file() for name in ("tokenizer.json", "spiece.model")):
                raise OSError
            return transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
        encoder = transformers.T5EncoderModel.from_pretrained(folder, local_files_only=True)
        return encoder.to(device).eval()
    except (ImportError, OSError, ValueError) as error:
        raise data.UserError(
            f"--t5 {folder} needs `pip install transformers sentencepiece protobuf`, and a folder "
            f"with a T5 encoder and its tokenizer ({type(error).__name__})."
        ) from None


# same as uniform_dit.py
class Captioned(torch.utils.data.Dataset):
    """A data set whose clips also have `words`, their captions as spell() writes them.

    varied: each time by another of its names, or by none, as data.vary() draws from the number i,
    which counts on from epoch to epoch.
    """

    def __init__(self, dataset, cfg, varied=False):
        self.dataset = dataset
        self.cfg = cfg
        self.varied = varied

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, i):
        clip = dict(self.dataset[i])
        caption = clip["caption"] if self.cfg.text_drop < 1 else ""
        if self.varied:
            label = self.dataset.labels[clip["label"]]
            key = data.clip_key(self.cfg.seed, i)
            caption = data.vary(caption, label, key, self.cfg.text_drop, bool(self.cfg.t5))
        clip["words"] = spell(caption, self.cfg)
        return clip


# ---- The whole model, and reflected flow matching on its planes


class ProAV(nn.Module):
    """MDSA (frozen), text encoder and STDiT; called, it gives the velocity of stacked planes."""

    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        self.mdsa = MDSA(cfg).requires_grad_(False)
        self.text = nn.Identity() if cfg.t5 else ByteText(cfg)
        side = cfg.size // cfg.patch
        self.rows = {"hw": side, "tw": cfg.frames, "th": cfg.frames}
        counts = torch.tensor(list(self.rows.values()) * len(cfg.streams))  # (P,)
        valid = torch.arange(max(self.rows.values())) < counts[:, None]  # (P, R)
        self.register_buffer("valid", valid[None, :, :, None, None], persistent=False)
        self.shape = (*valid.shape, side, cfg.plane_channels)  # (P, R, L, C)
        self.dit = STDiT(cfg, valid)
        self.edges = names_like(self, "mdsa|text|embed|table|final")

    def forward(self, x, t, text, mask):
        """Planes (B, P, R, L, C), time (B,), text and mask of read() -> (B, P, R, L, C)."""
        return self.dit(x, t, self.text(text), mask) * self.valid

    @torch.no_grad()
    def encode(self, batch):
        """A batch on the device -> {"z_v": (B, 3, R, L, C), "z_a": ...}, padded with 0."""
        latents = {}
        for m, planes in self.mdsa.encode(self.mdsa.inputs(batch)).items():
            padded = []
            for mean, _ in planes.values():
                missing = self.shape[1] - mean.shape[1]
                padded.append(F.pad(torch.tanh(mean), (0, 0, 0, 0, 0, missing)))
            latents[f"z_{m}"] = torch.stack(padded, 1)
        return latents

    @torch.no_grad()
    def decode(self, z):
        """Stacked planes (B, P, R, L, C) -> streams of pixels."""
        planes = {}
        for i, m in enumerate(self.cfg.streams):
            planes[m] = {}
            for j, (k, n) in enumerate(self.rows.items()):
                planes[m][k] = z[:, 3 * i + j, :n]
        return self.mdsa.decode(planes)


def truncated_normal(shape, draw):
    """A standard normal kept to [-1, 1]: the prior of reflected flow matching."""
    low = 0.5 * (1 + math.erf(-(0.5**0.5)))  # the share of a normal below -1
    u = torch.rand(shape, generator=draw, device=draw.device)
    # Its inverse distribution function, of low ... 1 - low.
    return (2**0.5 * torch.erfinv((1 - 2 * low) * (2 * u - 1))).clamp(-1, 1)


def reflect(y):
    """Fold any point back into [-1, 1], as a ball that bounces between walls."""
    r = (y + 1) % 4
    return torch.where(r > 2, 4 - r, r) - 1


def euler(velocity, x, steps):
    """Reflected Euler: x <- reflect(x + v(t, x) / N), t = 0, 1/N ... (N - 1)/N."""
    for i in range(steps):
        x = reflect(x + velocity(i / steps, x) / steps)
    return x


class ReflectedFlow:
    """x_t = (1 - t) x_0 + t x_1, from the prior x_0 to data x_1; the network learns x_1 - x_0.

    A straight line in a cube meets no wall, so reflection enters only the prior and the sampler
    (Xie et al. 2024).
    """

    def __init__(self, model):
        self.model = model
        self.cfg = model.cfg

    def loss(self, net, batch, t=None):
        """-> the velocity's squared error, mean over what is valid, summed over streams; {stream}.

        batch: latents z_v, z_a (B, 3, R, L, C), words, key. t (B,): times to use, else drawn.
        """
        x1 = torch.cat([batch[f"z_{m}"] for m in self.cfg.streams], 1)  # (B, P, R, L, C), eq. 9
        x0, drawn = self.draw(batch["key"], x1.device)
        t = drawn if t is None else t
        at = t.view(-1, 1, 1, 1, 1)
        text, mask = read(batch["words"], self.cfg)
        x_t = (1 - at) * x0 + at * x1
        v = net(x_t, t, text, mask)
        error = (v.float() - (x1 - x0)).square()  # 0 where there is padding

        share = self.model.valid.float().mean()  # of the numbers that are no padding
        parts = {}
        for m, e in zip(self.cfg.streams, error.split(3, 1), strict=True):
            parts[NAMES[m]] = e.mean() / share
        return sum(parts.values()), {name: part.detach() for name, part in parts.items()}

    def loss_of_clips(self, net, batch, t=None):
        """The same of a batch of clips, which are encoded on the way."""
        return self.loss(net, {**batch, **self.model.encode(batch)}, t)

    def draw(self, keys, device):
        """x_0 (B, P, R, L, C) and times (B,), each clip's from its own key."""
        t = []
        x0 = []
        for own in generators(keys, device):
            t.append(torch.rand((), generator=own, device=device))
            x0.append(truncated_normal(self.model.shape, own))
        return torch.stack(x0) * self.model.valid, torch.stack(t)

    def sample(self, x0, words, negative, guidance, steps, known):
        """Stacked planes from x_0 (B, P, R, L, C), by classifier-free guidance v_n + w (v_c - v_n).

        words (B, M, ...) and those of the negative prompt, the same for all clips. known: z_v or
        z_a of a stream at hand; it is led along its straight line, not by the network (ours: the
        paper has no conditional task).
        """
        copies = 1 if guidance == 1 else 2
        if copies == 2:
            words = torch.cat([words, negative.expand_as(words)])
        text, mask = read(words, self.cfg)

        def velocity(t, x):
            times = torch.full((len(words),), t, device=x.device)
            v = self.model(x.repeat(copies, 1, 1, 1, 1), times, text, mask).float()
            if copies == 2:
                v_c, v_n = v.chunk(2)
                v = v_n + guidance * (v_c - v_n)
            for i, m in enumerate(self.cfg.streams):
                if f"z_{m}" in known:
                    planes = slice(3 * i, 3 * i + 3)
                    v[:, planes] = known[f"z_{m}"] - x0[:, planes]
            return v

        return euler(velocity, x0, steps)


# ---- Training

# Of --amp. bf16 has the range of float32; fp16 has not, and needs the GradScaler in fit().
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "off": torch.float32}


# same as mm_diffusion.py
def setup(cfg):
    """Choose the device and, under torchrun, meet the other processes -> device.

    Raises data.UserError where there is no such device.
    """
    name = cfg.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda":
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    try:
        device = torch.empty(0, device=name).device
    except (RuntimeError, AssertionError):  # no such name, no such card, no such build of torch
        raise data.UserError(f"There is no --device {cfg.device} here: try auto or cpu.") from None
    on_cuda = device.type == "cuda"
    if on_cuda:
        torch.cuda.set_device(device)

    if WORLD > 1:
        backend = "nccl" if on_cuda else "gloo"
        bound = device if on_cuda else None
        # Hours, as the other processes wait while the first one makes samples.
        dist.init_process_group(backend, timeout=timedelta(hours=6), device_id=bound)
    return device


# same as mm_diffusion.py
def precision(cfg, device):
    """The type in which to multiply, in training as in sampling, by --amp. Turns on TF32."""
    # TF32 multiplies float32 with 10 bits of mantissa, several times as fast.
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.allow_tf32 = True
    if cfg.amp != "auto":
        return DTYPES[cfg.amp]
    if device.type != "cuda":
        return torch.float32
    has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if has_bf16 else torch.float16


# same as mm_diffusion.py
def orthogonal(x):
    """The matrix with x's singular vectors and all values near 1, by five Newton-Schulz steps."""
    tall = x.shape[0] > x.shape[1]
    x = x.T if tall else x
    x = x / (x.norm() + 1e-12)
    # No singular value s is above 1 now; each pass maps it to 3.44 s - 4.78 s^3 + 2.03 s^5.
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (2.0315 * gram @ gram - 4.7750 * gram) @ x
    return x.T if tall else x


# same as mm_diffusion.py
class Muon(torch.optim.Optimizer):
    """Momentum made orthogonal: a matrix learns in all directions alike (Jordan et al. 2024)."""

    def __init__(self, params, lr, weight_decay):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["momentum"] = torch.zeros_like(p)
                # Nesterov momentum of 0.95: the running mean, and one more step of it ahead.
                state["momentum"].lerp_(p.grad, 0.05)
                nesterov = p.grad.lerp(state["momentum"], 0.95)
                update = orthogonal(nesterov.flatten(1))  # (out, in * kernel)
                size = 0.2 * max(update.shape) ** 0.5  # as large as AdamW's: one lr serves both
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(update.reshape(p.shape), alpha=-group["lr"] * size)


# same as mm_diffusion.py
def build_optimizers(model, cfg):
    """AdamW; or, with --optimizer muon, Muon for hidden weight matrices and AdamW for the rest.

    model.edges, a tuple of first parts of parameter names, tells what is not hidden: embeddings,
    position tables, input and output layers.
    """
    hidden = []
    others = []
    for name, p in model.named_parameters():
        if cfg.optimizer == "muon" and p.dim() > 1 and not name.startswith(model.edges):
            hidden.append(p)
        elif p.requires_grad:
            others.append(p)
    decay = cfg.weight_decay
    adamw = torch.optim.AdamW(others, cfg.lr, cfg.betas, weight_decay=decay, fused=True)
    optimizers = {"adamw": adamw}
    if hidden:
        optimizers["muon"] = Muon(hidden, cfg.lr, decay)
    return optimizers


# same as mm_diffusion.py
def learning_rate(cfg, step):
    """Linear warm-up, times a linear fall from lr to lr * lr_end."""
    warmup = min(1, (step + 1) / max(cfg.warmup, 1))
    return cfg.lr * warmup * (1 + (cfg.lr_end - 1) * step / cfg.steps)


# same as mm_diffusion.py
@torch.no_grad()
def validate(model, loss_fn, batches, autocast, device):
    """Means over fixed clips, each at one fixed noise level in every quarter of [0, 1)."""
    sums = 0
    for batch in batches:
        batch = data.to_device(batch, device)
        rows = []
        for quarter in range(4):
            t = (quarter + batch["spread"]) / 4  # (B,)
            with autocast:
                _, parts = loss_fn(model, batch, t)
            rows.append(torch.stack([*parts.values(), torch.ones_like(t[0])]))
        sums += len(t) * torch.stack(rows)  # (4, parts + 1): sums over clips, and their number
    # Each process has seen its share of the clips.
    if WORLD > 1:
        dist.all_reduce(sums)
    means = sums[:, :-1] / sums[:, -1:]  # (4, parts)
    row = {"val_loss": means.sum(1).mean().item()}
    for name, mean in zip(parts, means.mean(0).tolist(), strict=True):
        row[f"val_{name}"] = mean
    for quarter, total in enumerate(means.sum(1).tolist(), 1):
        row[f"val_q{quarter}"] = total
    return row


# same as mm_diffusion.py
def fit(model, loss_fn, cfg, train, val, sample_fn=None):
    """Train `model` to cfg.steps, going on from the checkpoint in cfg.out -> the averaged model.

    loss_fn(model, batch, t=None) -> (loss, {name: part}): the loss is what is minimized; the parts,
    and as "loss" their sum, are what is reported, of training and validation alike. t (B,): noise
    levels in [0, 1), given in validation, else drawn, perhaps from other than a uniform
    distribution. sample_fn(model) -> (video, audio), as data.write_samples takes them. Raises
    data.UserError for a checkpoint of another run.
    """
    if cfg.batch_size % (WORLD * cfg.grad_accum):
        raise data.UserError(
            f"The batch size, {cfg.batch_size}, does not divide by "
            f"{WORLD * cfg.grad_accum} (processes x --grad_accum)."
        )
    device = next(model.parameters()).device
    dtype = precision(cfg, device)
    autocast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    optimizers = build_optimizers(model, cfg)
    ema = copy.deepcopy(model).eval().requires_grad_(False)

    # Go on where an earlier run stopped. Of its log, drop what is about to be done again.
    saved = {"model": model, "ema": ema, "scaler": scaler, **optimizers}
    start = data.resume(f"{cfg.out}/ckpt.pt", cfg, saved)
    if RANK == 0:
        data.trim_log(f"{cfg.out}/log.csv", start)

    # `model` holds the weights; `net` is what is called: compiled, and averaging over processes.
    net = torch.compile(model) if cfg.compile else model
    if WORLD > 1:
        net = nn.parallel.DistributedDataParallel(net, broadcast_buffers=False)
    feed = data.loader(train, cfg.batch_size, start, cfg.steps, RANK, WORLD, cfg.workers, cfg.seed)
    val_set = data.val_batches(val, cfg.val_clips, cfg.batch_size // cfg.grad_accum, RANK, WORLD)

    # SIGTERM and Ctrl-C are only noted: the step at hand is finished and saved first. A second one
    # changes nothing, as torchrun passes on what each process of its group has got already.
    signals = []

    def note(number, frame):
        signals.append(number)

    handlers = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}

    bad_steps = 0  # in a row
    history = deque(maxlen=cfg.log_every)  # figures of the latest steps
    bar = tqdm(range(start, cfg.steps + 1), initial=start, total=cfg.steps, disable=RANK > 0)
    for step in bar:
        # Now and then, and at the end: measure the averaged weights, save, make samples.
        if step % cfg.eval_every == 0 or step == cfg.steps:
            row = validate(ema, loss_fn, val_set, autocast, device)
            if RANK == 0:
                bar.write(f"step {step}: " + ", ".join(f"{k} {x:.4f}" for k, x in row.items()))
                data.append_row(f"{cfg.out}/log.csv", {"step": step, **row})
                data.save_checkpoint(f"{cfg.out}/ckpt.pt", step, cfg, saved)
                if sample_fn:
                    data.write_samples(f"{cfg.out}/samples", step, *sample_fn(ema), cfg)
        if step == cfg.steps:
            break

        # The gradient of the mean loss over the batch, summed over parts that fit into memory.
        # Seeds follow from the step, so no random state needs saving.
        began = time.time()
        batch = next(feed)
        torch.manual_seed(data.clip_key(cfg.seed, f"step {step} rank {RANK}"))
        net.zero_grad()
        sums = 0
        for i, part in enumerate(data.split(batch, cfg.grad_accum)):
            # DDP averages over processes once, in the last part: this is what its no_sync() sets.
            net.require_backward_grad_sync = i == cfg.grad_accum - 1
            with autocast:
                loss, parts = loss_fn(net, data.to_device(part, device))
            scaler.scale(loss / cfg.grad_accum).backward()
            sums += torch.stack([*parts.values()]) / cfg.grad_accum
        for optimizer in optimizers.values():
            scaler.unscale_(optimizer)
        norm = nn.utils.clip_grad_norm_(model.parameters(), cfg.clip or math.inf)

        # The one wait for the device in a step. All processes get the same figures, means over
        # all of them, so they also skip a step together and leave the loop together.
        figures = torch.stack([*sums, norm, torch.full_like(norm, len(signals))])
        if WORLD > 1:
            dist.all_reduce(figures)
        *means, grad_norm, stop = (figures / WORLD).tolist()

        # Leave out a step whose gradient is not finite. With fp16 there is one now and then, and
        # the scaler, which has seen it in unscale_(), lowers its scale in update().
        bad_steps = 0 if math.isfinite(grad_norm) else bad_steps + 1
        if bad_steps == 50:
            raise data.UserError("50 steps without a finite gradient: lower --lr or use --amp off.")
        lr = learning_rate(cfg, step)
        if bad_steps == 0:
            for optimizer in optimizers.values():
                optimizer.param_groups[0]["lr"] = lr
                optimizer.step()
            decay = min(cfg.ema, (1 + step) / (10 + step))  # ramped up: the first weights fade soon
            for average, p in zip(ema.parameters(), model.parameters(), strict=True):
                average.lerp_(p.detach(), 1 - decay)
        scaler.update()

        # A row of the log: means over the latest steps.
        if bad_steps == 0:
            history.append([sum(means), *means, grad_norm, time.time() - began])
        if RANK == 0 and step % cfg.log_every == 0 and history:
            names = ["loss", *parts, "grad_norm", "seconds"]
            row = dict(zip(names, torch.tensor(list(history)).mean(0).tolist(), strict=True))
            bar.set_postfix(row)
            data.append_row(f"{cfg.out}/log.csv", {"step": step, "lr": lr, **row})

        # Told to stop: with this checkpoint the run goes on as if it had not been.
        if stop:
            if RANK == 0:
                data.save_checkpoint(f"{cfg.out}/ckpt.pt", step + 1, cfg, saved)
                bar.write(f"Stopped after {step + 1} steps: the same command goes on from there.")
            sys.exit(0)

    for number, handler in handlers.items():
        signal.signal(number, handler)
    if signals:  # while the last samples were made: what comes after training is not wanted
        sys.exit(0)
    return ema


# ---- The two stages


# same as uniform_dit.py
def say(text):
    if RANK == 0:
        print(text, flush=True)


# same as uniform_dit.py
def count(module):
    return sum(p.numel() for p in module.parameters())


def load_start(model, path):
    """--init_from: the averaged weights of a checkpoint, or bare weights."""
    state = data.load_checkpoint(path)
    data.load_weights(model, state.get("ema", state), path)


def train_mdsa(cfg, train, val, device):
    """Stage mdsa: train the autoencoder, to OUT/mdsa/ckpt.pt."""
    cfg = dataclasses.replace(
        cfg,
        out=f"{cfg.out}/mdsa",
        steps=cfg.mdsa_steps,
        batch_size=cfg.mdsa_batch_size,
        lr=cfg.mdsa_lr,
        betas=cfg.mdsa_betas,
    )
    torch.manual_seed(cfg.seed)
    model = Autoencoding(cfg)
    mdsa = model.mdsa
    if cfg.init_from:
        load_start(model, cfg.init_from)
    elif RANK == 0 and not Path(f"{cfg.out}/ckpt.pt").exists():
        clips = [data.to_device(data.make_batch(train, cfg.seed, [i]), "cpu") for i in range(64)]
        for m, stream in mdsa.streams.items():
            start_closed_form(stream, [mdsa.inputs(clip)[m] for clip in clips])
    model = model.to(device)
    if WORLD > 1:  # the other processes get that start from the first
        for p in model.parameters():
            dist.broadcast(p.data, 0)
    say(f"Stage mdsa: {count(mdsa):,} parameters on {device}, data {cfg.data}, to {cfg.out}")

    def loss(net, batch, t=None):
        # An autoencoder knows no noise levels: the four quarters of its validation are equal.
        x = mdsa.inputs(batch)
        if t is None and batch["step"] >= cfg.disc_start:
            frame, eps = model.draw(batch["key"], device)
            return net(x, True, frame, eps)
        return net(x)

    shown = data.make_batch(val, cfg.seed, range(min(cfg.samples, len(val))))
    shown = data.to_device(shown, device)

    @torch.no_grad()
    def rebuilt(ema):
        out, _, _ = ema.mdsa(ema.mdsa.inputs(shown))
        return as_clips(ema.mdsa, out)

    fit(model, loss, cfg, train, val, rebuilt)


def as_clips(mdsa, x):
    """Streams of pixels -> video uint8 (B, F, H, W, 3) and waveform (B, L) in [-1, 1], or None."""
    video = None
    audio = None
    if "v" in x:
        video = data.to_uint8(x["v"]).cpu()
    if "a" in x:
        audio = mdsa.mel.inverse(x["a"]).clamp(-1, 1).cpu()
    return video, audio


@torch.no_grad()
def examine(mdsa, val, device):
    """Print the PSNR of MDSA on validation clips, beside that of codes that anyone can write down.

    Those are, of a video, means over a patch and 4 frames, interpolated; of a sound, its mean
    spectrum. -> {stream: (MDSA, other)} in dB. Raises data.UserError where MDSA is not better.
    """
    rows = {m: [] for m in mdsa.streams}
    for batch in data.val_batches(val, mdsa.cfg.val_clips, 16):
        batch = data.to_device(batch, device)
        x = mdsa.inputs(batch)
        out, _, _ = mdsa(x)
        for m, real in x.items():
            real = real.cpu()  # (B, F, C, H, W)
            if m == "v":
                clips = real.transpose(1, 2)
                means = F.avg_pool3d(clips, (4, mdsa.cfg.patch, mdsa.cfg.patch))
                other = F.interpolate(means, clips.shape[2:], mode="trilinear").transpose(1, 2)
            else:
                other = real.mean((1, 4), keepdim=True).expand_as(real)
            row = (psnr(out[m].cpu(), real), psnr(other, real))
            rows[m] += [row] * len(real)
    table = {m: torch.tensor(rows[m]).mean(0).tolist() for m in rows}
    for m, (ours, other) in table.items():
        what = "block means" if m == "v" else "mean spectrum"
        say(f"PSNR-{m.upper()}: MDSA {ours:.1f} dB, {what} {other:.1f}")
        if mdsa.cfg.need_good and not ours > other:  # nor is nan
            raise data.UserError(
                "The autoencoder does not beat its baseline, nor would a generator: raise "
                "--mdsa_steps, or go on with --need_good false."
            )
    return table


def mdsa_of(state):
    """The averaged weights of the MDSA in a checkpoint of either stage."""
    weights = {}
    for name, p in state.get("ema", {}).items():
        if name.startswith("mdsa."):
            weights[name.removeprefix("mdsa.")] = p
    return weights


def train_dit(cfg, train, val, device):
    """Stage dit: train STDiT on the planes of the MDSA in OUT/mdsa/ckpt.pt."""
    path = f"{cfg.out}/mdsa/ckpt.pt"
    if WORLD > 1:
        dist.barrier()  # the first process has saved it
    state = data.load_checkpoint(path)
    if state.get("step", 0) < state.get("cfg", {}).get("steps", 1):
        raise data.UserError(f"{path} is not trained to its end: run --stage mdsa first.")
    torch.manual_seed(cfg.seed + 1)
    model = ProAV(cfg)
    if cfg.init_from:
        load_start(model, cfg.init_from)
    data.load_weights(model.mdsa, mdsa_of(state), path)
    run = Path(f"{cfg.out}/ckpt.pt")
    if run.exists():
        old = mdsa_of(data.load_checkpoint(run))
        for name, p in model.mdsa.state_dict().items():
            if not torch.equal(old.get(name, p), p):
                raise data.UserError(
                    f"{run} was trained with another autoencoder: choose another --out, or move it "
                    "away."
                )
    model = model.to(device)
    examine(model.mdsa, val, device)

    shown = [val[i]["caption"] for i in range(min(cfg.samples, len(val)))]
    flow = ReflectedFlow(model)
    loss = flow.loss_of_clips
    if cfg.cache_latents:
        loss = flow.loss
        train = data.Latents(model, train, cfg.cache_latents, "train", device, RANK, WORLD)
        val = data.Latents(model, val, min(cfg.val_clips, len(val)), "val", device, RANK, WORLD)
    say(f"Stage dit: {count(model.dit):,} parameters on {device}, to {cfg.out}")

    def samples(ema):
        return sample(ema, len(shown), prompt=shown, seed=cfg.seed)

    fit(model, loss, cfg, Captioned(train, cfg, varied=True), Captioned(val, cfg), samples)


# ---- Sampling and the command line


def condition(cfg, n, video, audio):
    """What sample() was given, for n clips: {}, or "video" (n, F, H, W, 3), or "audio" (n, L).

    Raises data.UserError for what is not one window, or n of them.
    """
    if video is None and audio is None:
        return {}
    if cfg.streams != "av" or (video is not None and audio is not None):
        raise data.UserError("Give a video or a sound, not both, to a model of both streams.")
    if video is not None:
        window = (cfg.frames, cfg.size, cfg.size, 3)
        return {"video": data.windows(video, n, window)}
    window = (cfg.frames * cfg.rate // cfg.fps,)
    return {"audio": data.windows(torch.as_tensor(audio).float(), n, window)}


@torch.no_grad()
def sample(
    model,
    n,
    *,
    prompt=None,
    negative_prompt=None,
    label=None,
    video=None,
    audio=None,
    steps=None,
    guidance=None,
    seed=0,
    batch_size=8,
):
    """Generate n clips -> video (n, F, H, W, 3) uint8, audio (n, L) float32 in [-1, 1].

    None for a stream that the model lacks. prompt, or label for "a video of <label>": one for all
    clips or a list of n. video ([n,] F, H, W, 3) uint8 or audio ([n,] L) comes back as it is, with
    the other stream made for it. Clip i depends on (seed, i), not on n or batch_size. Raises
    data.UserError for conditions that exclude each other or do not fit.
    """
    cfg = model.cfg
    device = next(model.parameters()).device
    captions = data.captions_for(n, prompt, label)
    given = condition(cfg, n, video, audio)
    guidance = cfg.guidance if guidance is None else guidance
    if not isinstance(negative_prompt or "", str):
        raise data.UserError("--negative_prompt is one text for all clips.")
    negative = torch.from_numpy(spell(negative_prompt or "", cfg)).to(device)
    if captions == [negative_prompt or ""] * n:
        guidance = 1  # away from what it goes to: nothing would change

    words = torch.from_numpy(np.stack([spell(caption, cfg) for caption in captions]))
    # Noise is drawn on the CPU, for each clip from its own seed: all devices start from the same.
    keys = torch.tensor([data.clip_key(seed, f"sample {i}") for i in range(n)])
    x0 = [truncated_normal(model.shape, own) for own in generators(keys, "cpu")]
    x0 = torch.stack(x0) * model.valid.cpu()
    dtype = precision(cfg, device)
    autocast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
    flow = ReflectedFlow(model)
    videos = []
    audios = []
    for first in tqdm(range(0, n, batch_size), "sampling", disable=n <= batch_size, leave=False):
        part = slice(first, first + batch_size)
        x = data.to_device({name: y[part] for name, y in given.items()}, device)
        text = [words[part].to(device), negative, guidance]
        with autocast:
            known = model.encode(x)
            z = flow.sample(x0[part].to(device), *text, steps or cfg.sample_steps, known)
            out = model.decode(z)
        v, a = as_clips(model.mdsa, out)
        videos.append(v)
        audios.append(a)
    v = torch.cat(videos) if "v" in cfg.streams else None
    a = torch.cat(audios) if "a" in cfg.streams else None
    # What was given comes back as it was.
    return given.get("video", v), given.get("audio", a)


def load(path, device="cpu", options=()):
    """A model ready to sample from a checkpoint of stage dit (its averaged weights).

    Options, as on the command line, override the config. Raises data.UserError when the file is
    not readable or does not fit.
    """
    state = data.load_checkpoint(path)
    if not any(name.startswith("dit.") for name in state.get("ema", {})):
        raise data.UserError(f"{path} holds no generator: give that of stage dit.")
    cfg = parse(options, data.read_config(Config, state, path))
    model = ProAV(cfg)
    data.load_weights(model, state["ema"], path)
    return model.to(device).eval()


def train(cfg):
    """Train what cfg.stage names."""
    device = setup(cfg)
    shape = (cfg.frames, cfg.size, cfg.fps, cfg.rate, cfg.seed)
    clips = data.open_dataset(cfg.data, "train", *shape)
    val = data.open_dataset(cfg.data, "val", *shape)
    if cfg.stage != "dit":
        train_mdsa(cfg, clips, val, device)
        say(f"Reconstructions are in {cfg.out}/mdsa/samples.")
    if cfg.stage != "mdsa":
        train_dit(cfg, clips, val, device)
        say(
            f"Samples are in {cfg.out}/samples; more: "
            f"python sample.py --model proav_dit --ckpt {cfg.out}/ckpt.pt"
        )


def main(argv=None):
    try:
        train(parse(argv))
    except data.UserError as error:
        data.end("proav_dit.py", error)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    main()
