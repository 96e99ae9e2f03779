"""MM-Diffusion: a coupled U-Net that denoises video and its sound together (Ruan et al. 2023, arXiv 2212.09478).

Video and audio are noised independently and denoised by one network: two U-Nets, over pixels and over the waveform,
which look at each other through cross-attention inside a window of a few frames. The window is shifted at random in
every call, so that over the many calls of sampling each frame meets all of the sound, at a small cost per call.

    noisy video (B, F, 3, H, W)        noisy audio (B, 1, L)               step t (B,)
        | conv 2-D, then 1-D in time       | conv 1-D                          | sinusoids, MLP
    v (B, F, H, W, C)                  a (B, L, C)                         emb (B, width)
        |                                  |                                   |
    [ MM-block: residual 2+1-D convs | residual dilated convs, both modulated by emb; self-attention ] x res_blocks
    [ cross-attention: frame i <-> the L / F audio samples of each frame i+R ... i+R+S-1     (eq. 8) ]
        | H, W / 2                         | L / 4    ... and again, down to the lowest scale, then back up with skips
    predicted noise (B, F, 3, H, W)    predicted noise (B, 1, L)

    python mm_diffusion.py                                          # toy: 9 minutes on 2 cores, loss 0.38 -> 0.06
    torchrun --nproc_per_node=4 mm_diffusion.py --data concerts     # your videos, after `python data.py prepare`
    python sample.py --model mm_diffusion                           # mp4, wav, film strips, and a page of them
    python sample.py --model mm_diffusion --video in.mp4            # sound for a video; --audio in.wav: the reverse
    python mm_diffusion.py --stage sr                               # a network that enlarges the frames, for --sr_ckpt

Where the paper and its code disagree, or the paper is silent (-), we do as the code, or as the last column says:

    parameters              115.13M                   133,675,524; nothing gives the former
    middle blocks           no audio self-attention   with it, and a cross-attention over all if windows are 1,4,8
    channels per head       64; SR 48                 cross-attention 64, else 4 heads; SR 4 heads
    dilations               1, 2, ... 2^10            2, 4, ... 512, 1, 2, ...
    2+1-D convolution       time, then space          space, then time; a block's second is 1x1
    step embedding          128; SR 192               128; SR 192, widened to 768
    cost of attention       S^2 H W L / F             F S H W L / F for each stream
    lambda(t); variance     -; eq. 1: I, eq. 3: -     1; beta_t in both
    shift R                 0 ... F - S               same; drawn anew in backward            one draw per call
    sampler                 multistep, adaptive: two  dpm3, or dpm_adaptive with a slip       dpm: multistep; no slip
    guidance, eq. 12        sum, new noise each step  mean, one noise, sqrt(abar), x 2^20     gradient; or released
    mirrored; SR dropout    none, SR half; 0.1        all, SR none; 0                         paper
    batch, steps            128, 10k (Table 4: 100k)  32, endless; --grad_accum parts summed  paper; averaged

Ours alone: samples are a function of the seed; "up" blocks work at the low resolution and copy at their end; the decay
of the averaged weights is ramped up; SR learns from averages over squares of pixels, as data.py makes small frames, not
bicubic ones, and in its toy preset diffuses only what bicubic enlargement lacks.
The presets toy and small estimate the clip, not the noise (--prediction edm), and learn with --optimizer muon: what
minutes of training need to get from noise to whole shapes. toy does not shift, so that sync is learned in minutes, too.
"""
import argparse
import copy
import dataclasses
import inspect
import math
import os
import re
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import imageio.v2 as imageio
import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.distributions import Normal, kl_divergence
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

import data

# ---- Config

@dataclass
class Config:
    """Every option; the defaults are the paper's (Table A.1) or, where it is silent, the released code's."""
    preset: str = "paper"            # the row of PRESETS that the other values start from
    data: str = "toy"                # toy, toy:bounce,glide (some of its scenes), or a set made by data.py prepare
    out: str = ""                    # folder of the run; empty: out/mm_diffusion/PRESET[-DATA], for --stage sr its sr/
    stage: str = "base"              # what to train: base, the coupled U-Net; sr, the one that upsamples its frames
    # the clip
    frames: int = 16                 # frames in a clip
    size: int = 64                   # height and width, pixels
    fps: int = 10                    # frames per second
    rate: int = 16000                # audio samples per second; a clip has frames * rate / fps of them
    # the coupled U-Net (section 3.3)
    width: int = 128                 # base channels
    mult: tuple = (1, 2, 3, 4)       # channels of each scale, in units of width
    res_blocks: int = 2              # MM-blocks per scale, beside the one that resamples
    norm_groups: int = 32            # groups of every group norm; must divide every width
    heads: int = 4                   # heads of self-attention
    cross_head_dim: int = 64         # channels per head of cross-attention
    film: bool = True                # the time embedding scales and shifts (FiLM); false: it is added
    video_attention: tuple = (2, 4, 8)   # downsampling factors with spatial and temporal self-attention
    cross_attention: tuple = (2, 4, 8)   # downsampling factors with cross-attention
    windows: tuple = (1, 4, 8)       # its window at each of those factors, in frames (S of section 3.3)
    random_shift: bool = True        # draw the shift R of the windows anew in every call; false: R = 0
    streams: str = "av"              # av: both; v or a: one sub-network alone (Ours-v, Ours-a of Tables 1-2)
    dropout: float = 0.1             # in the MM-blocks, while training
    checkpoint: bool = False         # recompute blocks in backward: less memory, more time
    # super-resolution; its U-Net is of width, mult, res_blocks, norm_groups, heads and video_attention, too
    sr_size: int = 256               # height and width of its frames, a multiple of size
    sr_residual: float = 0.0         # ours: diffuse the frame less its bicubic enlargement; its deviation; 0: off
    augment: float = 0.5             # probability of each of noise and JPEG in its input, and of mirrored frames
    # diffusion (sections 3.1 and 3.2)
    diffusion_steps: int = 1000      # T; linear betas, 1e-4 to 0.02 for T = 1000, scaled by 1000 / T
    prediction: str = "eps"          # eps: the network gives the noise (eq. 7); edm: see Diffusion.estimate
    data_mean: tuple = (0.0, 0.0)    # edm: mean of the data, video and audio, in [-1, 1]
    data_std: tuple = (0.5, 0.2)     # edm: their standard deviations; these weight the loss
    skip_std: tuple = (0.1, 0.2)     # edm: noise above this is not passed on to the estimate
    noise_levels: tuple = (0.7, 2.0)     # edm: mean and deviation of ln(sigma / alpha) in training
    # sampling
    sampler: str = "dpm"             # dpm, dpm3, dpm_adaptive, ddim or ddpm; where a part is given, ddpm or else ddim
    sample_steps: int = 20           # network calls per clip (ddpm takes T, dpm_adaptive what it needs)
    method: str = "replace"          # for a given part: replace, gradient (eq. 12) or released (eq. 12 as in the code)
    guidance: float = 0.1            # lambda of eq. 12, for gradient; released: its fp16 scripts have 3 * 2^20 = 3e6
    seconds: float = 0.0             # length of a clip, of windows that overlap by half; 0: one window
    sr_ckpt: str = ""                # upsample the frames with this network, of --stage sr or a released one
    sr_steps: int = 25               # DDIM steps of upsampling
    # training
    steps: int = 10000               # optimizer steps
    batch_size: int = 128            # clips per optimizer step over ALL processes
    grad_accum: int = 1              # parts that each process splits its share of the batch into
    lr: float = 1e-4                 # AdamW learning rate
    lr_end: float = 1.0              # the rate falls linearly to this share of lr; 1: constant
    warmup: int = 0                  # steps of linear warm-up
    optimizer: str = "adamw"         # adamw, or muon: the same, but for an orthogonal update of every matrix
    betas: tuple = (0.9, 0.999)      # of AdamW
    weight_decay: float = 0.0        # of AdamW
    clip: float = 0.0                # largest gradient norm; 0: no clipping (the norm is logged all the same)
    ema: float = 0.9999              # decay of the averaged weights, ramped up as (1 + step) / (10 + step)
    amp: str = "auto"                # auto, bf16, fp16 or off; auto: bf16 or else fp16 on CUDA, off elsewhere
    compile: bool = False            # torch.compile the network
    device: str = "auto"             # auto (cuda, mps, cpu) or a torch device
    workers: int = 2                 # data loading processes
    seed: int = 0                    # of weights, batches, noise, shifts and samples
    init_from: str = ""              # start from the weights in this file: a checkpoint of ours or a released one
    log_every: int = 10              # steps between rows of log.csv
    val_every: int = 500             # steps between validations
    val_clips: int = 64              # validation clips, each seen at one noise level of every quartile
    save_every: int = 500            # steps between checkpoints
    sample_every: int = 1000         # steps between samples
    samples: int = 4                 # clips to sample then and at the end


PRESETS = {
    "toy": dict(data="toy:bounce", size=32, rate=8000, width=16, res_blocks=1, norm_groups=8, cross_head_dim=16,
                video_attention=(4, 8), cross_attention=(4, 8), windows=(1, 16), random_shift=False, dropout=0.0,
                prediction="edm", data_mean=(-0.55, 0.0), data_std=(0.42, 0.165), skip_std=(0.1, 0.165),
                noise_levels=(1.2, 1.6), steps=620, batch_size=4, optimizer="muon", lr=1.2e-2, lr_end=0.05, warmup=20,
                clip=1.0, ema=0.99, val_every=310, val_clips=16, save_every=155, sample_every=620,
                sampler="ddim"),
    "small": dict(width=64, res_blocks=1, dropout=0.0, prediction="edm", data_mean=(-0.6, 0.0), data_std=(0.41, 0.18),
                  skip_std=(0.1, 0.18), noise_levels=(1.2, 1.6), steps=10000, batch_size=16, optimizer="muon", lr=4e-3,
                  lr_end=0.05, warmup=200, clip=1.0, ema=0.999, sampler="ddim"),
    "paper": {},
    "concerts": dict(diffusion_steps=2000, batch_size=16, amp="fp16", steps=20000),      # Paredes 2025, IV-B
    "audioset": dict(width=256),                                                         # supplement, part C
}
# The same for --stage sr; a preset that has no row here is as "paper".
SR_PRESETS = {
    "paper": dict(streams="v", frames=1, width=192, mult=(1, 1, 2, 2, 4, 4), video_attention=(8, 16, 32),
                  cross_attention=(), windows=(), steps=270000, batch_size=48),
    "toy": dict(data="toy:bounce", size=32, sr_size=64, rate=8000, sr_residual=0.035, width=16, mult=(1, 2, 4),
                res_blocks=1, norm_groups=8, video_attention=(), dropout=0.0, steps=500, batch_size=8,
                optimizer="muon", lr=6e-3, lr_end=0.05, warmup=20, clip=1.0, ema=0.99, val_every=250, save_every=100,
                sample_every=250),
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
    choices = {"preset": PRESETS, "streams": ("av", "v", "a"), "prediction": ("eps", "edm"), "sampler": SAMPLERS,
               "optimizer": ("adamw", "muon"), "amp": ("auto", "bf16", "fp16", "off"), "stage": STAGES,
               "method": ("replace", "gradient", "released")}
    remarks = dict(re.findall(r"^    (\w+): .*?# (.*)$", inspect.getsource(Config), re.M))
    for f in dataclasses.fields(Config):
        default = ",".join(map(str, f.default)) if f.type is tuple else f.default
        kind = {tuple: numbers, bool: truth}.get(f.type, f.type)
        parser.add_argument("--" + f.name, type=kind, choices=choices.get(f.name), metavar=f.type.__name__,
                            default=argparse.SUPPRESS, help=f"{remarks[f.name]} [{default}]")
    given = vars(parser.parse_args(argv))
    source = given.get("data", Config.data).split(":")[0]
    preset = given.get("preset", source if source in PRESETS else "paper")
    row = {**SR_PRESETS["paper"], **SR_PRESETS.get(preset, {})} if given.get("stage") == "sr" else PRESETS[preset]
    cfg = Config(**{**(dataclasses.asdict(base) if base else {**row, "preset": preset}), **given})
    if wrong := check(cfg):
        parser.error(wrong)
    own = row.get("data", preset)
    name = preset if given.get("data", own) == own else re.sub(r"\W", "-", f"{preset}-{cfg.data}")
    cfg.out = cfg.out or f"out/{Path(__file__).stem}/{name}{'/sr' if cfg.stage == 'sr' else ''}"
    return cfg


def check(cfg):
    """The first thing wrong with a config, as a sentence, or None."""
    for f in dataclasses.fields(cfg):
        if f.type is int and getattr(cfg, f.name) < (f.name not in ("warmup", "workers", "seed")):
            return f"--{f.name} {getattr(cfg, f.name)} is too small"
    if not cfg.mult or not all(isinstance(x, int) and x > 0 for x in (*cfg.mult, *cfg.windows)):
        return "--mult and --windows need whole numbers of 1 or more"
    for name in ("betas", "data_mean", "data_std", "skip_std", "noise_levels"):
        if len(getattr(cfg, name)) != 2:
            return f"--{name} needs two numbers"
    parts, scales = int(os.environ.get("WORLD_SIZE", 1)) * cfg.grad_accum, 2 ** (len(cfg.mult) - 1)
    widths, length = {2 ** i: cfg.width * m for i, m in enumerate(cfg.mult)}, cfg.frames * cfg.rate / cfg.fps
    crossed = [widths.get(f, 0) for f in cfg.cross_attention]
    attended = [widths.get(f, 0) for f in (*cfg.video_attention, scales)]
    name, pixels = ("sr_size", cfg.sr_size) if cfg.stage == "sr" else ("size", cfg.size)
    rules = {
        f"--batch_size {cfg.batch_size} does not divide by {parts} (processes x --grad_accum)": cfg.batch_size % parts,
        f"--{name} must divide by {scales}: --mult has {len(cfg.mult)} scales": pixels % scales,
        f"--sr_size {cfg.sr_size} must be a multiple of --size {cfg.size}": pixels % cfg.size,
        f"--frames * --rate / --fps, {length:g} samples, must be a multiple of {scales ** 2}":
            "a" in cfg.streams and length % scales ** 2,
        "--norm_groups must divide every width (--width * --mult)": any(w % cfg.norm_groups for w in widths.values()),
        f"attention is possible at the factors {', '.join(map(str, widths))}": not all([*crossed, *attended]),
        "--windows needs one window for each factor of --cross_attention": len(cfg.windows) != len(crossed),
        f"--windows must lie between 1 and --frames ({cfg.frames})": any(not 0 < w <= cfg.frames for w in cfg.windows),
        "--cross_head_dim must divide the widths of cross-attention": any(w % cfg.cross_head_dim for w in crossed),
        "--heads must divide the widths of self-attention": any(w % cfg.heads for w in attended),
        "--lr and --seconds must not be negative, --dropout from 0 to below 1":
            min(cfg.lr, cfg.seconds) < 0 or not 0 <= cfg.dropout < 1,
        "--diffusion_steps must be 25 or more: with fewer the last betas exceed 1": cfg.diffusion_steps < 25,
    }
    return next((sentence for sentence, wrong in rules.items() if wrong), None)


def die(message):
    """End with one sentence on stderr, printed once however many processes run."""
    if int(os.environ.get("RANK", 0)):
        time.sleep(5)                # torchrun stops all processes when the first one ends: let rank 0 speak
    sys.exit(message if int(os.environ.get("RANK", 0)) == 0 else 1)


# ---- Model. Inside, features are channels-last: video (B, F, H, W, C), audio (B, L, C). So 1x1 convolutions and
# attention need no copies and 2-D kernels run in their fast layout; parameters keep the released names and shapes.

class Norm(nn.Module):
    """Group norm of channels-last features (B, ..., C): over a group's channels and all between B and C."""
    def __init__(self, channels, groups):
        super().__init__()
        self.GroupNorm = nn.GroupNorm(groups, channels)

    def forward(self, x):
        flat = x.reshape(x.shape[0], -1, 1, x.shape[-1]).permute(0, 3, 1, 2)     # (B, C, N, 1), memory as it was
        return self.GroupNorm(flat).permute(0, 2, 3, 1).reshape(x.shape)


def pointwise(conv, x):
    """A convolution of kernel 1 on channels-last features: (B, ..., I) -> (B, ..., O)."""
    return F.linear(x, conv.weight.flatten(1), conv.bias)


class AudioConv(nn.Module):
    """Dilated 1-D convolution: (B, L, I) -> (B, L, O)."""
    def __init__(self, i, o, kernel, dilation=1):
        super().__init__()
        self.audio_conv = nn.Conv1d(i, o, kernel, padding=kernel // 2 * dilation, dilation=dilation)

    def forward(self, a):
        conv = self.audio_conv
        if conv.kernel_size == (1,):
            return pointwise(conv, a)
        a = a.unsqueeze(1).permute(0, 3, 1, 2)                                   # (B, I, 1, L)
        a = F.conv2d(a, conv.weight.unsqueeze(2), conv.bias, 1, (0, *conv.padding), (1, *conv.dilation))
        return a.permute(0, 2, 3, 1).squeeze(1)                                  # (B, L, O)


class VideoConv(nn.Module):
    """2-D convolution over space, then 1-D over time, nothing between: (B, F, H, W, I) -> (B, F, H, W, O)."""
    def __init__(self, i, o, kernel=3):
        super().__init__()
        self.video_conv_spatial = nn.Conv2d(i, o, kernel, padding=kernel // 2)
        self.video_conv_temporal = nn.Conv1d(o, o, kernel, padding=kernel // 2)

    def forward(self, v):
        B, frames, H, W, _ = v.shape
        v = self.video_conv_spatial(v.flatten(0, 1).permute(0, 3, 1, 2))                     # (B*F, O, H, W)
        v = v.permute(0, 2, 3, 1).reshape(B, frames, H * W, -1).permute(0, 3, 1, 2)          # (B, O, F, H*W)
        conv = self.video_conv_temporal
        v = F.conv2d(v, conv.weight.unsqueeze(3), conv.bias, padding=(*conv.padding, 0))     # (B, O, F, H*W)
        return v.permute(0, 2, 3, 1).reshape(B, frames, H, W, -1)


class VideoConv3d(nn.Module):
    """3-D convolution, (B, F, H, W, I) -> (B, F, H, W, O): the head (kernel 3) and all 1x1x1 projections."""
    def __init__(self, i, o, kernel):
        super().__init__()
        self.video_conv = nn.Conv3d(i, o, kernel, padding=kernel // 2)

    def forward(self, v):
        if self.video_conv.kernel_size == (1, 1, 1):
            return pointwise(self.video_conv, v)
        return self.video_conv(v.permute(0, 4, 1, 2, 3)).permute(0, 2, 3, 4, 1)


def zeroed(module):
    """Zero a layer's parameters: its residual branch starts as nothing, and the fresh network outputs 0."""
    for p in module.parameters():
        nn.init.zeros_(p)
    return module


def attend(q, k, v, heads):
    """softmax(q k^T / sqrt(d)) v, eq. 8: q (B, N, C), k and v (B, M, C), a head is a run of d channels -> (B, N, C)."""
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))  # (B, heads, N or M, d)
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)    # (B, N, C)


class SelfAttention(nn.Module):
    """x + proj(attention(norm(x))) over tokens (B, N, C). Positions are known from the convolutions' padding alone."""
    def __init__(self, channels, heads, groups):
        super().__init__()
        self.heads = heads
        self.norm = Norm(channels, groups)
        self.qkv = nn.Conv1d(channels, 3 * channels, 1)
        self.proj_out = zeroed(nn.Conv1d(channels, channels, 1))

    def forward(self, x):
        q, k, v = pointwise(self.qkv, self.norm(x)).chunk(3, dim=-1)             # (B, N, C) each
        return x + pointwise(self.proj_out, attend(q, k, v, self.heads))


def resample(v, a, how):
    """Halve (how = "down": averages) or double ("up": copies) the video's height and width; the audio's length by 4."""
    if v is not None:
        x = v.flatten(0, 1).permute(0, 3, 1, 2)                                  # (B*F, C, H, W)
        x = F.avg_pool2d(x, 2) if how == "down" else F.interpolate(x, scale_factor=2.0)
        v = x.permute(0, 2, 3, 1).unflatten(0, v.shape[:2])                      # (B, F, H', W', C)
    if a is not None:
        a = a.unflatten(1, (-1, 4)).mean(2) if how == "down" else a.repeat_interleave(4, dim=1)    # (B, L', C)
    return v, a


class ResBlock(nn.Module):
    """MM-block (figure 3b): a residual block for video and one for audio, driven by the same time embedding."""
    def __init__(self, i, o, cfg, dilation, how=None, video_attention=False, audio_attention=False):
        super().__init__()
        self.how, self.dropout, g = how, cfg.dropout, cfg.norm_groups
        video, audio = "v" in cfg.streams, "a" in cfg.streams

        def out(conv):
            return nn.Sequential(Norm(o, g), nn.SiLU(), nn.Dropout(cfg.dropout), zeroed(conv))

        self.video_in_layers = nn.Sequential(Norm(i, g), nn.SiLU(), VideoConv(i, o)) if video else None
        self.audio_in_layers = nn.Sequential(Norm(i, g), nn.SiLU(), AudioConv(i, o, 3, dilation)) if audio else None
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(cfg.width, 2 * o if cfg.film else o))
        self.video_out_layers = out(VideoConv3d(o, o, 1)) if video else None
        self.audio_out_layers = out(AudioConv(o, o, 1)) if audio else None
        self.video_skip_connection = VideoConv3d(i, o, 1) if video and i != o else nn.Identity()
        self.audio_skip_connection = AudioConv(i, o, 1) if audio and i != o else nn.Identity()
        self.spatial_attention_block = SelfAttention(o, cfg.heads, g) if video and video_attention else None
        self.temporal_attention_block = SelfAttention(o, cfg.heads, g) if video and video_attention else None
        self.audio_attention_block = SelfAttention(o, cfg.heads, g) if audio and audio_attention else None

    def forward(self, v, a, emb):
        hv = None if v is None else self.video_in_layers(v)
        ha = None if a is None else self.audio_in_layers(a)
        # Copied values give the same norm and the same pointwise results, so "up" can wait until the end, where it
        # costs a quarter; not so where dropout must fall on every pixel by itself.
        late = self.how == "up" and not (self.training and self.dropout)
        if self.how and not late:
            (v, a), (hv, ha) = resample(v, a, self.how), resample(hv, ha, self.how)
        p = self.emb_layers(emb)                                                 # (B, 2*O); (B, O) without FiLM
        if v is not None:
            v = self.video_skip_connection(v) + modulated(self.video_out_layers, hv, p)
        if a is not None:
            a = self.audio_skip_connection(a) + modulated(self.audio_out_layers, ha, p)
        if late:
            v, a = resample(v, a, self.how)
        if self.spatial_attention_block is not None:
            v = self.spatial_attention_block(v.flatten(0, 1).flatten(1, 2)).reshape(v.shape)     # within each frame
            x = v.flatten(2, 3).transpose(1, 2)                                                  # (B, H*W, F, C)
            x = self.temporal_attention_block(x.flatten(0, 1)).reshape(x.shape)                  # within each pixel
            v = x.transpose(1, 2).reshape(v.shape)
        if self.audio_attention_block is not None:
            a = self.audio_attention_block(a)
        return v, a


def modulated(layers, h, p):
    """`layers` on h. Their first, a norm, is followed by FiLM, norm(h) (1 + scale) + shift, or preceded by h + p."""
    norm, *rest = layers
    p = p.reshape(p.shape[0], *[1] * (h.dim() - 2), -1)                          # (B, 1, ..., 2*O or O)
    if p.shape[-1] == h.shape[-1]:
        h = norm(h + p)
    else:
        scale, shift = p.chunk(2, dim=-1)
        h = torch.addcmul(shift, norm(h), 1 + scale)
    for layer in rest:
        h = layer(h)
    return h


def windows(x, count, span, R):
    """Cut tokens x (B, N, C) into `count` segments of n = N // count and gather for segment i the `span` segments
    from i + R on, modulo N (section 3.3, step II) -> (B * count, span * n, C). R is a 0-d tensor."""
    B, N, C = x.shape
    n = N // count
    unit = n if N % count == 0 else 1        # move whole segments, unless a remainder makes wrapped windows slip
    start = (torch.arange(count, device=x.device) + R) * n                       # (count,)
    index = (start[:, None] + torch.arange(0, span * n, unit, device=x.device)) % N // unit
    return x.reshape(B, N // unit, unit * C).index_select(1, index.flatten()).reshape(B * count, span * n, C)


class CrossAttention(nn.Module):
    """Random-shift multi-modal attention (RS-MMA, eq. 8-9): frame i attends to the audio of frames i+R ... i+R+S-1,
    modulo F, and the audio of frame i to those frames. window None: to the whole clip, no shift."""
    def __init__(self, channels, cfg, window):
        super().__init__()
        self.window, self.heads = window, channels // cfg.cross_head_dim
        self.v_norm = Norm(channels, cfg.norm_groups)
        self.a_norm = Norm(channels, cfg.norm_groups)
        self.v_qkv = nn.Conv1d(channels, 3 * channels, 1)
        self.a_qkv = nn.Conv1d(channels, 3 * channels, 1)
        self.video_proj_out = zeroed(VideoConv3d(channels, channels, 1))
        self.audio_proj_out = zeroed(AudioConv(channels, channels, 1))

    def forward(self, v, a, R):
        (B, frames, H, W, C), L = v.shape, a.shape[1]
        S, n = self.window or frames, L // frames
        vq, vkv = pointwise(self.v_qkv, self.v_norm(v)).flatten(1, 3).split((C, 2 * C), dim=-1)    # (B, F*H*W, C | 2C)
        aq, akv = pointwise(self.a_qkv, self.a_norm(a)).split((C, 2 * C), dim=-1)                  # (B, L, C | 2C)
        if S == frames and L % frames == 0:      # every window is the whole clip: nothing to gather
            hv = attend(vq, *akv.chunk(2, dim=-1), self.heads)
            ha = attend(aq, *vkv.chunk(2, dim=-1), self.heads)
        else:
            akv, vkv = windows(akv, frames, S, R), windows(vkv, frames, S, R)           # (B*F, S*n or S*H*W, 2C)
            hv = attend(vq.reshape(B * frames, H * W, C), *akv.chunk(2, dim=-1), self.heads)
            head, tail = aq.split((frames * n, L - frames * n), dim=1)                  # the remainder of L / F
            ha = attend(head.reshape(B * frames, n, C), *vkv.chunk(2, dim=-1), self.heads)
            last = vkv.unflatten(0, (B, frames))[:, -1]                                 # (B, S*H*W, 2C)
            tail = attend(tail, *last.chunk(2, dim=-1), self.heads) if tail.shape[1] else tail
            ha = torch.cat([ha.reshape(B, frames * n, C), tail], dim=1)                 # (B, L, C)
        return v + self.video_proj_out(hv.reshape(v.shape)), a + self.audio_proj_out(ha)


class Stem(nn.Module):
    """Pixels (B, F, H, W, 3) and waveform (B, L, 1) -> base channels."""
    def __init__(self, o, cfg):
        super().__init__()
        self.video_conv = VideoConv(3, o) if "v" in cfg.streams else None
        self.audio_conv = AudioConv(1, o, 3) if "a" in cfg.streams else None

    def forward(self, v, a, emb):
        return None if v is None else self.video_conv(v), None if a is None else self.audio_conv(a)


def time_embedding(t, dim):
    """Sinusoids of the diffusion step, cosines first: (B,) -> (B, dim)."""
    freqs = torch.exp(-math.log(10000) / (dim // 2) * torch.arange(dim // 2, device=t.device))
    angles = t.float()[:, None] * freqs
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def ladder(cfg):
    """The entries of a U-Net's encoder and of its decoder: (channels in, channels out, downsampling factor, how). how
    is "down" for an entry that resamples, "up" for one that does so at its end, else None."""
    scales = [(2 ** i, cfg.width * m) for i, m in enumerate(cfg.mult)]
    encoder, decoder, c = [], [], scales[0][1]
    for factor, w in scales:
        encoder += [(c, w, factor, None)] + [(w, w, factor, None)] * (cfg.res_blocks - 1)
        encoder += [(w, w, factor, "down")] * (factor < scales[-1][0])
        c = w
    skips = [scales[0][1], *(o for _, o, _, _ in encoder)]
    for factor, w in reversed(scales):
        for i in range(cfg.res_blocks + 1):
            decoder.append((c + skips.pop(), w, factor, "up" if i == cfg.res_blocks and factor > 1 else None))
            c = w
    return encoder, decoder


class CoupledUNet(nn.Module):
    """The coupled U-Net (figure 3a). Per scale res_blocks MM-blocks, each followed by cross-attention where the scale
    has it, and one that downsamples; back up with one block more per scale, each given the encoder's features."""
    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        encoder, decoder = ladder(cfg)
        window = dict(zip(cfg.cross_attention, cfg.windows, strict=True)) if cfg.streams == "av" else {}
        self.time_embed = nn.Sequential(nn.Linear(cfg.width, cfg.width), nn.SiLU(), nn.Linear(cfg.width, cfg.width))
        k, c = 1, encoder[0][0]                      # k counts blocks: the audio's dilation is 2^(k mod 10)

        def blocks(i, o, factor):
            res = ResBlock(i, o, cfg, 2 ** (k % 10), video_attention=factor in cfg.video_attention)
            return [res, CrossAttention(o, cfg, window[factor])] if factor in window else [res]

        entries = [[Stem(c, cfg)]]
        for i, o, factor, how in encoder:
            entries.append([ResBlock(i, o, cfg, 2 ** (k % 10), how)] if how else blocks(i, o, factor))
            k += 1
        self.input_blocks = nn.ModuleList(map(nn.ModuleList, entries))
        middle = [ResBlock(o, o, cfg, 2 ** (k % 10), video_attention=True, audio_attention=True) for _ in range(2)]
        if cfg.windows == (1, 4, 8) and window:      # in the released code for these windows alone; not in the paper
            middle.insert(1, CrossAttention(o, cfg, None))
        self.middle_blocks = nn.ModuleList(middle)
        entries, k = [], k - 1
        for i, o, factor, how in decoder:
            entries.append(blocks(i, o, factor))
            k -= 1
            if how:
                entries[-1].append(ResBlock(o, o, cfg, 2 ** (k % 10), how))
        self.output_blocks = nn.ModuleList(map(nn.ModuleList, entries))
        g, audio, video = cfg.norm_groups, "a" in cfg.streams, "v" in cfg.streams
        self.audio_out = nn.Sequential(Norm(c, g), nn.SiLU(), zeroed(AudioConv(c, 1, 3))) if audio else None
        self.video_out = nn.Sequential(Norm(c, g), nn.SiLU(), zeroed(VideoConv3d(c, 3, 3))) if video else None

    def draw_shifts(self, frames, generator=None):
        """A shift R for each cross-attention in the order they run, uniform in 0 ... F - S -> (blocks,) int64."""
        spans = [m.window or frames for m in self.modules() if isinstance(m, CrossAttention)]
        highest = [frames - span if self.cfg.random_shift else 0 for span in spans]
        return torch.tensor([int(torch.randint(h + 1, (), generator=generator)) for h in highest], dtype=torch.long)

    def forward(self, v, a, t, shifts=None):
        """Noisy v (B, F, 3, H, W) and a (B, 1, L), steps t (B,), shifts from draw_shifts (None: drawn here) -> the
        prediction for each, float32, of the same shapes. A stream that the network lacks is None."""
        if shifts is None:
            shifts = self.draw_shifts(self.cfg.frames if v is None else v.shape[1]).to(t.device)
        R = iter(shifts)
        emb = self.time_embed(time_embedding(t, self.cfg.width))                 # (B, width)
        v = None if v is None else v.permute(0, 1, 3, 4, 2).contiguous()         # (B, F, H, W, 3)
        a = None if a is None else a.transpose(1, 2)                             # (B, L, 1)
        skips = []
        for entry in self.input_blocks:
            v, a = self.run(entry, v, a, emb, R)
            skips.append((v, a))
        v, a = self.run(self.middle_blocks, v, a, emb, R)
        for entry in self.output_blocks:
            v, a = (None if h is None else torch.cat([h, s], -1) for h, s in zip((v, a), skips.pop(), strict=True))
            v, a = self.run(entry, v, a, emb, R)
        return (None if v is None else self.video_out(v).permute(0, 1, 4, 2, 3).float(),     # (B, F, 3, H, W)
                None if a is None else self.audio_out(a).transpose(1, 2).float())            # (B, 1, L)

    def run(self, entry, v, a, emb, R):
        for block in entry:
            third = next(R) if isinstance(block, CrossAttention) else emb
            if self.cfg.checkpoint and torch.is_grad_enabled():
                v, a = checkpoint(block, v, a, third, use_reentrant=False)
            else:
                v, a = block(v, a, third)
        return v, a


# ---- Super-resolution: the U-Net of ADM (Dhariwal and Nichol 2021), frame by frame; features (B, C, H, W).

class SRBlock(nn.Module):
    """Residual block. Other than in MM-blocks, resampling comes before the first convolution and the second is 3x3."""
    def __init__(self, i, o, cfg, how=None):
        super().__init__()
        self.resize = {None: nn.Identity(), "down": nn.AvgPool2d(2), "up": nn.Upsample(scale_factor=2.0)}[how]
        self.in_layers = nn.Sequential(nn.GroupNorm(cfg.norm_groups, i), nn.SiLU(), nn.Conv2d(i, o, 3, padding=1))
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(4 * cfg.width, 2 * o))
        self.out_layers = nn.Sequential(nn.GroupNorm(cfg.norm_groups, o), nn.SiLU(), nn.Dropout(cfg.dropout),
                                        zeroed(nn.Conv2d(o, o, 3, padding=1)))
        self.skip_connection = nn.Conv2d(i, o, 1) if i != o else nn.Identity()

    def forward(self, x, emb):
        norm, act, conv = self.in_layers
        x, h = self.resize(x), conv(self.resize(act(norm(x))))
        norm, *rest = self.out_layers
        scale, shift = self.emb_layers(emb)[:, :, None, None].chunk(2, dim=1)    # (B, O, 1, 1) each
        h = torch.addcmul(shift, norm(h), 1 + scale)
        for layer in rest:
            h = layer(h)
        return self.skip_connection(x) + h


class SRAttention(SelfAttention):
    """Self-attention over the pixels of a frame; qkv holds q, k and v head by head."""
    def __init__(self, channels, cfg):
        super().__init__(channels, cfg.heads, cfg.norm_groups)
        self.norm = nn.GroupNorm(cfg.norm_groups, channels)

    def forward(self, x, emb):
        h = self.norm(x).flatten(2).transpose(1, 2)                              # (B, H*W, C)
        qkv = pointwise(self.qkv, h).unflatten(-1, (self.heads, 3, -1))          # (B, H*W, heads, 3, d)
        h = attend(*(y.flatten(2) for y in qkv.unbind(3)), self.heads)           # (B, H*W, C)
        return x + pointwise(self.proj_out, h).transpose(1, 2).reshape(x.shape)


class SRUNet(nn.Module):
    """A noisy frame and the low-resolution one -> the noise and where its variance lies between the bounds."""
    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        (encoder, decoder), g, width = ladder(cfg), cfg.norm_groups, cfg.width
        self.time_embed = nn.Sequential(nn.Linear(width, 4 * width), nn.SiLU(), nn.Linear(4 * width, 4 * width))

        def blocks(i, o, factor, how=None):
            return [SRBlock(i, o, cfg, how)] + [SRAttention(o, cfg)] * (not how and factor in cfg.video_attention)

        c, o = encoder[0][0], encoder[-1][1]         # at the top and at the bottom
        entries = [[nn.Conv2d(6, c, 3, padding=1)], *(blocks(*entry) for entry in encoder)]
        self.input_blocks = nn.ModuleList(map(nn.ModuleList, entries))
        self.middle_block = nn.ModuleList([SRBlock(o, o, cfg), SRAttention(o, cfg), SRBlock(o, o, cfg)])
        entries = [blocks(i, o, factor) + [SRBlock(o, o, cfg, how)] * bool(how) for i, o, factor, how in decoder]
        self.output_blocks = nn.ModuleList(map(nn.ModuleList, entries))
        self.out = nn.Sequential(nn.GroupNorm(g, c), nn.SiLU(), zeroed(nn.Conv2d(c, 6, 3, padding=1)))

    def forward(self, x, low, t):
        """Noisy frames x (B, 3, H, W), low (B, 3, h, w) of any size, steps t (B,) -> (B, 6, H, W) float32."""
        x = torch.cat([x, F.interpolate(low, x.shape[-2:], mode="bilinear")], 1)             # (B, 6, H, W)
        emb = self.time_embed(time_embedding(t, self.cfg.width))                 # (B, 4*width)
        stem, *entries = self.input_blocks
        skips = [stem[0](x)]                                                     # (B, C, H, W)
        for entry in entries:
            skips.append(self.run(entry, skips[-1], emb))
        h = self.run(self.middle_block, skips[-1], emb)
        for entry in self.output_blocks:
            h = self.run(entry, torch.cat([h, skips.pop()], 1), emb)
        return self.out(h).float()

    def run(self, entry, h, emb):
        for block in entry:
            saving = self.cfg.checkpoint and torch.is_grad_enabled()
            h = checkpoint(block, h, emb, use_reentrant=False) if saving else block(h, emb)
        return h


# ---- Process: schedule, loss, samplers. A state x is a dict of the streams, {"v": (B, F, 3, H, W), "a": (B, 1, L)}.

def mix(*terms):
    """mix((c1, x1), (c2, x2), ...) = c1 x1 + c2 x2 + ..., stream by stream."""
    return {k: sum(c * x[k] for c, x in terms) for k in terms[0][1]}


def unwrapped(model):  # the network inside the wrappers of DDP and torch.compile
    model = getattr(model, "module", model)
    return getattr(model, "_orig_mod", model)


class Diffusion:
    """Eq. 1-7: the schedule that video and audio share, the training loss, the network as a noise estimate."""
    names = {"v": "video", "a": "audio"}
    def __init__(self, cfg):
        self.cfg, self.T, self.streams, self.seed = cfg, cfg.diffusion_steps, cfg.streams, cfg.seed
        self.shapes = {"v": (cfg.frames, 3, cfg.size, cfg.size), "a": (1, cfg.frames * cfg.rate // cfg.fps)}
        self.edm, self.levels = cfg.prediction == "edm", cfg.noise_levels
        self.mean, self.std, self.skip = (dict(zip("va", x, strict=True)) for x in
                                          (cfg.data_mean, cfg.data_std, cfg.skip_std))
        self.betas = torch.linspace(1e-4, 0.02, self.T, dtype=torch.float64) * (1000 / self.T)
        self.abar = torch.cumprod(1 - self.betas, 0)     # abar_t = alpha_1 ... alpha_t (below eq. 10)

    def noise(self, keys, shapes, device):
        """A noise level u (B,) in [0, 1) and noise per clip, each from the clip's own key: the same however the clips
        are dealt to processes."""
        draw, u, eps = torch.Generator(device), [], {k: [] for k in shapes}
        for key in keys.tolist():
            draw.manual_seed(key)
            u.append(torch.rand((), generator=draw, device=device))
            for k, shape in shapes.items():
                eps[k].append(torch.randn(shape, generator=draw, device=device))
        return torch.stack(u), {k: torch.stack(e) for k, e in eps.items()}

    @staticmethod
    def scales(std, abar):
        """c_skip and c_out of EDM (Karras et al. 2022, table 1) for data of this deviation: numbers or tensors."""
        noise = 1 / abar - 1                         # (sigma / alpha)^2
        return std ** 2 / (std ** 2 + noise), std * (noise / (std ** 2 + noise)) ** 0.5

    def estimate(self, k, out, x, alpha):
        """The x_0 that the network's output stands for: mean + c_skip (x / alpha - mean) + c_out output. With mean 0
        and deviation 1 this is v-prediction. skip_std below the data's own moves it towards predicting x_0 itself:
        then flat areas come out clean although a small network cannot carry noise through to cancel it."""
        skip, gain = self.scales(self.skip[k], alpha ** 2)
        return self.mean[k] + skip * (x / alpha - self.mean[k]) + gain * out

    def loss(self, model, batch):
        """Eq. 7, both streams summed -> loss, {stream: eq. 7 with lambda = 1}. With "edm" the error of x_0, in units
        of what an estimate from mean and deviation of the data alone would leave, at noise levels of its own.

        batch: video (B, F, 3, H, W) and audio (B, 1, L) in [-1, 1], key (B,), step; u (B,) to set the noise levels.
        """
        x0 = {k: batch[name] for k, name in self.names.items() if k in self.streams}
        device, frames = batch["video"].device, batch["video"].shape[1]
        u, eps = self.noise(batch["key"], {k: x.shape[1:] for k, x in x0.items()}, device)
        levels = self.abar.float().to(device)                                    # (T,) abar, falling
        t = (batch.get("u", u) * self.T).long()                                  # (B,) uniform in 0 ... T-1
        if self.edm and "u" not in batch:
            noise = torch.exp(self.levels[0] + self.levels[1] * 2 ** 0.5 * torch.erfinv(2 * u - 1))      # sigma / alpha
            t = torch.searchsorted(-levels, -1 / (1 + noise ** 2)).clamp(max=self.T - 1)
        abar = levels[t]                                                         # (B,)
        signal = {k: abar.sqrt().view(-1, *[1] * (x.dim() - 1)) for k, x in x0.items()}
        sigma = {k: (1 - s * s).sqrt() for k, s in signal.items()}
        xt = {k: signal[k] * x0[k] + sigma[k] * eps[k] for k in x0}              # eq. 5, t times
        draw = torch.Generator().manual_seed(data.clip_key(self.seed, f"shift {batch['step']}"))
        shifts = unwrapped(model).draw_shifts(frames, draw).to(device)           # the same in all processes
        out = dict(zip("va", model(xt.get("v"), xt.get("a"), t, shifts), strict=True))
        error, weight = {k: out[k] - eps[k] for k in x0}, dict.fromkeys(x0, 1)
        if self.edm:
            unit = {k: self.scales(self.std[k], signal[k] ** 2)[1] for k in x0}
            error = {k: (self.estimate(k, out[k], xt[k], signal[k]) - x0[k]) / unit[k] for k in x0}
            weight = {k: unit[k].flatten() ** 2 * abar / (1 - abar) for k in x0}     # of x_0 -> of eps
        error = {k: e.square().flatten(1).mean(1) for k, e in error.items()}     # (B,)
        parts = {self.names[k]: (weight[k] * e).detach().mean() for k, e in error.items()}
        return sum(e.mean() for e in error.values()), parts

    def denoiser(self, model, draw):
        """eps(x, t): the network's noise estimate for a state at step t, a number. draw: generator of the shifts."""
        def eps(x, t):
            first = next(iter(x.values()))
            shifts = model.draw_shifts(first.shape[1] if "v" in x else model.cfg.frames, draw).to(first.device)
            out = model(x.get("v"), x.get("a"), torch.full((len(first),), t, device=first.device), shifts)
            out, alpha = {k: o for k, o in zip("va", out, strict=True) if k in x}, float(self.abar[int(t)]) ** 0.5
            if self.edm:
                x0 = {k: self.estimate(k, o, x[k], alpha) for k, o in out.items()}
                out = mix(((1 - alpha ** 2) ** -0.5, x), (-alpha * (1 - alpha ** 2) ** -0.5, x0))
            return out
        return eps


def ddpm_step(x, x0, abar, before, noise_like):
    """One step of ancestral sampling, eq. 3-6, with variance beta_t: from the noise level abar to `before` it."""
    beta = 1 - abar / before
    x = mix((beta * before ** 0.5 / (1 - abar), x0), ((1 - before) * (1 - beta) ** 0.5 / (1 - abar), x))
    return {k: y + beta ** 0.5 * noise_like(y) for k, y in x.items()} if before < 1 else x


def ddim_step(x, x0, abar, before, noise_like):
    """One step of DDIM with eta = 0, along the noise that the clamped x_0 implies."""
    eps = mix(((1 - abar) ** -0.5, x), (-(abar / (1 - abar)) ** 0.5, x0))
    return mix((before ** 0.5, x0), ((1 - before) ** 0.5, eps))


def walk(step, eps_fn, x, process, noise_like, steps, given=None, method="replace", guidance=0.0):
    """From noise to a clip by `step` on evenly spaced noise levels; noise_like(tensor) draws normal noise. given
    {stream: values}, how the clip begins or all of a stream, is its zero-shot condition (section 3.4): before each step
    a sample of q(x_t | x_0) replaces that part and after it guide() moves the rest, if the method is not "replace"."""
    given, guided = given or {}, bool(given) and method != "replace"

    def at(abar, start=x):
        noise = {k: part(start[k], y) if method == "released" else noise_like(y) for k, y in given.items()}
        return mix((abar ** 0.5, given), ((1 - abar) ** 0.5, noise))

    times = [i * process.T // steps for i in range(steps)]
    goal = at(float(process.abar[times[-1]]))
    for i in reversed(range(steps)):
        abar, before = float(process.abar[times[i]]), float(process.abar[times[i - 1]]) if i else 1.0
        x = {k: y.requires_grad_(guided) for k, y in put(goal, x).items()}
        with torch.set_grad_enabled(guided):
            x0 = mix((abar ** -0.5, x), (-(1 / abar - 1) ** 0.5, eps_fn(x, times[i])))
            x0 = {k: y.clamp(-1, 1) for k, y in x0.items()}
            y, goal = step(x, x0, abar, before, noise_like), at(before)          # eq. 11
            x = guide(x, y, goal, abar, before, method, guidance) if guided else y
    return x


def guide(x, y, goal, abar, before, method, guidance):
    """Eq. 12: after the step from x to y, move y so that its given part would have come closer to its `goal`. v_t does
    not depend on a_t, so the gradient is by a_(t+1), in x. The released code has means, and sqrt(abar) at the start."""
    errors, means = [(part(y[k], c) - c).square() for k, c in goal.items()], method == "released"
    error = sum(e.sum() / (e[0].numel() if means else 1) for e in errors)
    scale = abar ** 0.5 * (before < 1) if means else (1 - before) ** 0.5
    grads = torch.autograd.grad(error, list(x.values()), allow_unused=True, materialize_grads=True)
    return {k: y[k].detach() - guidance * scale * g for k, g in zip(x, grads, strict=True)}


def part(x, of):  # that part of x, from its beginning, which `of` has
    return x[tuple(map(slice, of.shape))]


def put(given, x):
    """x with its beginning replaced by what is given."""
    x = {k: y.detach().clone() for k, y in x.items()}
    for k, y in given.items():
        part(x[k], y).copy_(y)
    return x


class DPMSolver:
    """DPM-Solver and DPM-Solver++ (Lu et al. 2022): the probability-flow ODE in lambda = log(alpha / sigma), in which
    its linear part is solved exactly. Every coefficient is a Python float."""
    def __init__(self, eps_fn, abar, x0=True, threshold=None):
        """x0: integrate the x_0 estimate (++), else the noise estimate. threshold "clamp": x_0 to [-1, 1]; "dynamic":
        to the 99.5 % quantile of its absolute values where that is above 1, then divided by it (Imagen)."""
        self.eps_fn, self.x0, self.threshold, self.T = eps_fn, x0, threshold, len(abar)
        self.times = (np.arange(self.T) + 1) / self.T    # log alpha is piecewise linear between these
        self.log_alpha = 0.5 * abar.float().log().double().numpy()
        self.first, self.last = self.from_time(1.0), self.from_time(1 / self.T)

    def from_time(self, t):
        log_alpha = np.interp(t, self.times, self.log_alpha)
        return float(log_alpha - 0.5 * np.log(-np.expm1(2 * log_alpha)))

    def time(self, lam):
        return float(np.interp(0.5 * np.logaddexp(0, -2 * lam), -self.log_alpha, self.times))

    @staticmethod
    def alpha_sigma(lam):
        return (1 + math.exp(-2 * lam)) ** -0.5, (1 + math.exp(2 * lam)) ** -0.5

    def estimate(self, x, lam):
        """What the network says at lambda: the noise, or the thresholded x_0."""
        alpha, sigma = self.alpha_sigma(lam)
        # The released solver truncates the step number that the network is told; so do we.
        eps = self.eps_fn(x, max(int((self.time(lam) - 1 / self.T) * self.T), 0))
        if not self.x0:
            return eps
        x0 = mix((1 / alpha, x), (-sigma / alpha, eps))
        if self.threshold == "clamp":
            return {k: y.clamp(-1, 1) for k, y in x0.items()}
        return {k: dynamic_threshold(y) for k, y in x0.items()} if self.threshold == "dynamic" else x0

    def coefficients(self, s, t):
        """A and B of the step from lambda s to t, x_t = A x_s - B estimate + higher orders."""
        (alpha_s, sigma_s), (alpha_t, sigma_t) = self.alpha_sigma(s), self.alpha_sigma(t)
        if self.x0:
            return sigma_t / sigma_s, alpha_t * math.expm1(s - t)
        return alpha_t / alpha_s, sigma_t * math.expm1(t - s)

    def order1(self, x, m, s, t):
        A, B = self.coefficients(s, t)
        return mix((A, x), (-B, m))

    def order2(self, x, m, s, t, r=0.5, m1=None):
        """r: where between s and t the second estimate m1 lies; multistep gives an earlier one, with r < 0."""
        if m1 is None:
            middle = s + r * (t - s)
            m1 = self.estimate(self.order1(x, m, s, middle), middle)
        A, B = self.coefficients(s, t)
        return mix((A, x), (-B, m), (-B / (2 * r), mix((1, m1), (-1, m))))

    def order3(self, x, m, s, t, r1, r2):
        """Singlestep third order for the noise estimate, with estimates at the fractions r1 and r2 of the step."""
        h, s1, s2 = t - s, s + r1 * (t - s), s + r2 * (t - s)
        m1 = self.estimate(self.order1(x, m, s, s1), s1)
        A, B = self.coefficients(s, s2)
        c = r2 / r1 * self.alpha_sigma(s2)[1] * (math.expm1(r2 * h) / (r2 * h) - 1)
        m2 = self.estimate(mix((A, x), (c - B, m), (-c, m1)), s2)
        A, B = self.coefficients(s, t)
        c = self.alpha_sigma(t)[1] * (math.expm1(h) / h - 1) / r2
        return mix((A, x), (c - B, m), (-c, m2))

    def multistep(self, x, steps, spacing="lambda"):
        """2M: order 2 from the two latest estimates, one call a step, evenly spaced in "lambda" or in "time"."""
        nodes = np.linspace(self.first, self.last, steps + 1).tolist()
        if spacing == "time":
            nodes = [self.from_time(t) for t in np.linspace(1, 1 / self.T, steps + 1)]
        s, t, before = nodes[0], nodes[1], self.estimate(x, nodes[0])
        x = self.order1(x, before, s, t)
        for i in range(1, steps):
            earlier, s, t = nodes[i - 1:i + 2]
            m = self.estimate(x, s)
            x, before = self.order2(x, m, s, t, (earlier - s) / (t - s), before), m
        return x

    def singlestep3(self, x, steps):
        """Order 3 on nodes evenly spaced in lambda, three calls a step; a last one of order 1 or 2 uses up `steps`."""
        nodes = np.linspace(self.first, self.last, steps + 1).tolist()
        for i in range(0, steps, 3):
            s, t = nodes[i], nodes[min(i + 3, steps)]
            m, inner = self.estimate(x, s), [(node - s) / (t - s) for node in nodes[i + 1:min(i + 3, steps)]]
            x = (self.order1, self.order2, self.order3)[len(inner)](x, m, s, t, *inner)
        return x

    def adaptive2(self, x, h=0.05, absolute=0.0078, relative=0.05, safety=0.9):
        """Order 2, order 1 as its error estimate; the worst sample and stream set the step for all."""
        s, before, m = self.first, x, None
        while self.time(s) - 1 / self.T > 1e-5:
            m, t, error = m or self.estimate(x, s), s + h, 1e-12
            lower, higher = self.order1(x, m, s, t), self.order2(x, m, s, t)
            for k in x:
                allowed = torch.maximum(lower[k].abs(), before[k].abs()).mul(relative).clamp(min=absolute)
                error = max(error, float(((higher[k] - lower[k]) / allowed).square().flatten(1).mean(1).sqrt().max()))
            if error <= 1:
                x, s, before, m = higher, t, lower, None
            h = min(safety * h * error ** -0.5, self.last - s)
        return x


def dynamic_threshold(x):
    limit = torch.quantile(x.flatten(1).abs().float(), 0.995, dim=1).clamp(min=1).view(-1, *[1] * (x.dim() - 1))
    return x.clamp(-limit, limit) / limit


SAMPLERS = {
    "dpm": lambda eps, x, p, noise, steps: DPMSolver(eps, p.abar, threshold="clamp").multistep(x, steps),
    "dpm3": lambda eps, x, p, noise, steps: DPMSolver(eps, p.abar, x0=False).singlestep3(x, steps),
    "dpm_adaptive": lambda eps, x, p, noise, steps: DPMSolver(eps, p.abar, threshold="dynamic").adaptive2(x),
    "ddim": lambda eps, x, p, noise, steps, *given: walk(ddim_step, eps, x, p, noise, steps, *given),
    "ddpm": lambda eps, x, p, noise, steps, *given: walk(ddpm_step, eps, x, p, noise, p.T, *given),
}


# ---- Super-resolution: data, loss, sampling

class Frames(torch.utils.data.Dataset):
    """Clips at sr_size with "low", what is to be enlarged: float32 (F, 3, size, size), averages over squares. With
    probability `augment` each, low gets Gaussian noise and JPEG's traces and the clip is mirrored (Table A.1)."""
    def __init__(self, clips, cfg, augment):
        self.clips, self.seed, self.size, self.augment = clips, cfg.seed, cfg.size, augment

    def __len__(self):
        return len(self.clips)

    def __getitem__(self, i):
        clip, draw = self.clips[i], np.random.default_rng(data.clip_key(self.seed, f"augment {i}"))
        noise, jpeg, mirror = draw.random(3) < self.augment
        video = np.ascontiguousarray(clip["video"][:, :, ::-1]) if mirror else clip["video"]     # (F, H, W, 3)
        zoom = video.shape[1] // self.size
        low = video.reshape(len(video), self.size, zoom, self.size, zoom, 3).mean((2, 4))        # (F, h, w, 3)
        low = low + noise * draw.uniform(0, 20) * draw.standard_normal(low.shape)
        if jpeg:
            quality, low = int(draw.uniform(20, 80)), low.round().clip(0, 255).astype(np.uint8)
            low = np.stack([imageio.imread(imageio.imwrite("<bytes>", x, "jpg", quality=quality), "jpg") for x in low])
        return {**clip, "video": video, "low": np.float32(low).transpose(0, 3, 1, 2) / 127.5 - 1}


class SRDiffusion(Diffusion):
    """The diffusion of single frames, whose reverse variance is learned, too (Nichol and Dhariwal 2021). With
    sr_residual, what bicubic enlargement lacks is diffused, and estimated as with "edm": then minutes are enough."""
    def origin(self, low):
        """What is diffused is the frame less this."""
        size = (self.cfg.sr_size, self.cfg.sr_size)
        return F.interpolate(low, size, mode="bicubic") if self.cfg.sr_residual else 0

    def predict(self, model, x, low, t):
        """The network's noise estimate for x (B, 3, H, W), and where the variance lies between its bounds."""
        t = torch.as_tensor(t, device=x.device).expand(len(x))                   # (B,)
        abar, (out, v) = self.abar.float().to(x.device)[t].view(-1, 1, 1, 1), model(x, low, t).chunk(2, dim=1)
        if self.cfg.sr_residual:
            skip, gain = self.scales(self.cfg.sr_residual, abar)
            out = (x - skip * x - abar.sqrt() * gain * out) / (1 - abar).sqrt()
        return out, v

    def loss(self, model, batch):
        """Error in the noise plus the variational term -> loss, {"mse": , "vb": }. The latter, in bits, trains the
        variance alone. batch: video and low (B, F, 3, H, W), of which the first frame counts; key and u (B,)."""
        low = batch["low"][:, 0]                                                 # (B, 3, h, w)
        x0 = batch["video"][:, 0] - self.origin(low)                             # (B, 3, H, W)
        u, eps = self.noise(batch["key"], {"v": x0.shape[1:]}, x0.device)
        t, eps = (batch.get("u", u) * self.T).long(), eps["v"]
        abar = self.abar.float().to(x0.device)[t].view(-1, 1, 1, 1)
        out, v = self.predict(model, abar.sqrt() * x0 + (1 - abar).sqrt() * eps, low, t)
        weight = 1 + (1 / abar - 1) / self.cfg.sr_residual ** 2 if self.cfg.sr_residual else 1   # error of x_0 / gain
        mse = ((out - eps).square() * weight).mean()
        vb = self.variational(x0, eps, out.detach(), v, t).mean()
        return mse + vb, {"mse": mse.detach(), "vb": vb.detach()}

    def variational(self, x0, eps, out, v, t):
        """KL(q(x_(t-1) | x_t, x_0) || p(x_(t-1) | x_t)) of every pixel, at t = 0 its code length, in bits. p has the
        mean that the noise estimate `out` gives, and a variance between the two bounds, at v = -1 and v = 1."""
        beta, abar, before = self.betas, self.abar, torch.cat([self.abar.new_ones(1), self.abar[:-1]])
        least = beta * (1 - before) / (1 - abar)     # the variance of q
        least[0] = least[1]                          # else 0
        rows = torch.stack([least.log(), beta.log(), beta / ((1 - beta) * (1 - abar)).sqrt()])
        low, high, drift = rows.float().to(x0.device)[:, t].view(3, -1, 1, 1, 1)
        # Both are Gaussian; here, less the mean of q, which at t = 0 is x_0. p's is off by the error in the noise.
        q = Normal(torch.zeros_like(low), (low / 2).exp(), validate_args=False)
        p = Normal(drift * (eps - out), ((low + (v + 1) / 2 * (high - low)) / 2).exp(), validate_args=False)
        half = p.loc.new_tensor(1 / 255)             # of one of 256 gray levels
        chance = torch.where(x0 > 0.999, 1.0, p.cdf(half)) - torch.where(x0 < -0.999, 0.0, p.cdf(-half))
        code = -chance.clamp(min=1e-12).log()
        return torch.where(t.view(-1, 1, 1, 1) == 0, code, kl_divergence(q, p)) / math.log(2)


@torch.no_grad()
def upsample(model, low, noise, steps):
    """Frames (F, 3, h, w) in [-1, 1] -> (F, 3, H, W) by DDIM, all from one noise image (3, H, W), against flicker."""
    process, x = SRDiffusion(model.cfg), {"v": noise.expand(len(low), -1, -1, -1)}
    x = walk(ddim_step, lambda x, t: {"v": process.predict(model, x["v"], low, t)[0]}, x, process, None, steps)
    return process.origin(low) + x["v"]


def compare(model, clips, n):
    """Enlarge a frame of each of n clips of a Frames -> a clip (1, n, H, 3*W, 3) uint8 that shows it between bicubic
    enlargement and the truth, and the mean PSNR of both in dB."""
    batch = data.to_device(data.val_batches(clips, n, n)[0], next(model.parameters()).device)
    low, true = batch["low"][:, 0], batch["video"][:, 0]                         # (n, 3, h, w), (n, 3, H, W)
    noise = torch.randn(true.shape[1:], generator=torch.Generator().manual_seed(model.cfg.seed)).to(true.device)
    ours = torch.cat([upsample(model, x, noise, model.cfg.sr_steps) for x in low.split(8)]).clamp(-1, 1)
    cubic = F.interpolate(low, true.shape[-2:], mode="bicubic").clamp(-1, 1)
    psnr = [float(-10 * ((x - true) / 2).square().flatten(1).mean(1).log10().mean()) for x in (ours, cubic)]
    return data.to_uint8(torch.cat([cubic, ours, true], dim=-1)[None]).cpu(), *psnr


STAGES = {"base": (CoupledUNet, Diffusion), "sr": (SRUNet, SRDiffusion)}


def open_clips(cfg, split):
    """The clips that cfg.stage trains on (split train) or is measured on (val)."""
    size = {"base": cfg.size, "sr": cfg.sr_size}[cfg.stage]
    clips = data.open_dataset(cfg.data, split, cfg.frames, size, cfg.fps, cfg.rate, cfg.seed)
    return Frames(clips, cfg, cfg.augment * (split == "train")) if cfg.stage == "sr" else clips


# ---- Training

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


def fill(model, state, path):
    """Load a state dict strictly, of any float type. Raises data.UserError naming what does not fit."""
    own = {k: p.shape for k, p in model.state_dict().items()}
    wrong = [k for k in {**own, **state} if k not in own or own[k] != getattr(state.get(k), "shape", None)]
    if wrong:
        raise data.UserError(f"The weights in {path} are not for this network: {len(wrong)} names or shapes differ "
                             f"({wrong[0]}, for one). Give the options that they were trained with.")
    model.load_state_dict(state)


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


def orthogonal(x):
    """Matrices (N, rows, columns), rows <= columns -> singular values near 1, by five Newton-Schulz steps."""
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-12)
    for _ in range(5):
        A = x @ x.mT
        x = 3.4445 * x + (-4.7750 * A + 2.0315 * A @ A) @ x
    return x


# Options that may change when a run goes on; any other would make it another run.
FREE = {"preset", "out", "steps", "amp", "compile", "device", "workers", "grad_accum", "checkpoint", "init_from",
        "log_every", "val_every", "val_clips", "save_every", "sample_every", "samples", "sampler", "sample_steps",
        "method", "guidance", "seconds", "sr_ckpt", "sr_steps"}


def save(path, step, cfg, model, ema, optimizer, scaler):
    """Write beside the old checkpoint, then rename: an interrupted save loses nothing."""
    torch.save({"model": model.state_dict(), "ema": ema.state_dict(), "optimizer": optimizer.state_dict(),
                "scaler": scaler.state_dict(), "step": step, "cfg": dataclasses.asdict(cfg)}, f"{path}.tmp")
    os.replace(f"{path}.tmp", path)


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


def write_samples(out, step, video, audio, cfg):
    """Every sampled clip as mp4 with sound (wav without video) and as film strip, in the run's folder."""
    for i in range(len(audio if video is None else video)):
        v, a = (None if x is None else x[i] for x in (video, audio))
        path = out / "samples" / f"step{step:06d}_{i}"
        data.save_clip(f"{path}.wav" if v is None else f"{path}.mp4", v, a, cfg.fps, cfg.rate)
        data.film_strip(f"{path}.png", v, a, cfg.fps, cfg.rate)


def write_row(path, row):
    """Append to log.csv. Its first row is a validation's and tells the names of the loss's parts."""
    with open(path, "a+") as f:
        f.seek(0)
        if not (columns := f.readline().strip().split(","))[0]:
            parts = [k[4:] for k in row if k.startswith("val_")]
            columns = ["step", "loss", *parts, "grad", "lr", "clips_per_s", "skipped", *list(row)[1:]]
            f.write(",".join(columns) + "\n")
        f.write(",".join(f"{row[k]:.6g}" if k in row else "" for k in columns) + "\n")


def learning_rate(cfg, step):
    """Linear warm-up, times a linear fall from lr to lr * lr_end."""
    return cfg.lr * min(1, (step + 1) / max(cfg.warmup, 1)) * (1 + (cfg.lr_end - 1) * step / cfg.steps)


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


# ---- Sampling and the command line

def condition(cfg, n, video, audio):
    """What sample() was given -> {} or {stream: n clips of one window, float in [-1, 1]}."""
    if video is None and audio is None:
        return {}
    if cfg.streams != "av" or cfg.seconds or (video is not None and audio is not None):
        raise data.UserError("Give a video or a sound, not both, to a model of both streams, without --seconds.")
    x = {"v": torch.as_tensor(video).movedim(-1, -3) / 127.5 - 1} if audio is None else \
        {"a": torch.as_tensor(audio).unsqueeze(-2)}                              # ([n,] F, 3, H, W) or ([n,] 1, L)
    (k, y), = x.items()
    shape = Diffusion(cfg).shapes[k]
    if y.shape[-len(shape):] != shape or (y.dim() > len(shape) and len(y) not in (1, n)):
        raise data.UserError(f"Give one window, or {n} of them: {cfg.frames} frames of {cfg.size} pixels, or "
                             f"{cfg.frames * cfg.rate // cfg.fps} samples.")
    return {k: y.float().expand(n, *shape)}


def generate(model, normal, draw, given, cfg):
    """A batch of clips {stream: values}, from the noise that normal(shape) draws and shifts of the generator `draw`. A
    clip longer than a window is made window by window: the last half of what there is is given to the next one as its
    beginning, in both streams, and what that adds is appended. At such a seam the clip goes on as well as cfg.method
    makes it, knowing of half a window and of nothing older."""
    process, keep, total = Diffusion(cfg), cfg.frames // 2, round(cfg.seconds * cfg.fps) or cfg.frames
    eps_fn = process.denoiser(model, draw)

    def window(x0):                                  # x0, continued
        x = {k: normal(shape) for k, shape in process.shapes.items() if k in cfg.streams}
        sampler = SAMPLERS[cfg.sampler if not x0 or cfg.sampler == "ddpm" else "ddim"]
        more = (x0, cfg.method, cfg.guidance) if x0 else ()
        return put(x0, sampler(eps_fn, x, process, lambda y: normal(y.shape[1:]), cfg.sample_steps, *more))

    def span(x, first, last):                        # these frames and their sound
        a, b = first * cfg.rate // cfg.fps, last * cfg.rate // cfg.fps
        return {k: y[:, first:last] if k == "v" else y[:, :, a:b] for k, y in x.items()}

    clip = window(given)
    for done in range(cfg.frames, total, cfg.frames - keep):
        new = span(window(span(clip, done - keep, done)), keep, cfg.frames)
        clip = {k: torch.cat([y, new[k]], 1 if k == "v" else 2) for k, y in clip.items()}
    return span(clip, 0, total)


@torch.no_grad()
def sample(model, n, *, prompt=None, negative_prompt=None, label=None, video=None, audio=None, steps=None,
           guidance=None, seed=0, sampler=None, method=None, seconds=None, batch_size=8):
    """Generate n clips -> video (n, F, H, W, 3) uint8 and audio (n, L) float32 in [-1, 1]; None for a stream that
    the model lacks. Given one window of video ([n,] F, H, W, 3) uint8 or of audio ([n,] L), generate the other and give
    it back as it is. Other options are those of Config, by default model.cfg's. Clip i depends on (seed, i), not on n
    or batch_size, but for dpm_adaptive. Raises data.UserError for what the model cannot do."""
    if isinstance(model, SRUNet):
        raise data.UserError("This network enlarges frames: give it as --sr_ckpt, and a --ckpt that makes them.")
    for name in ("prompt", "negative_prompt", "label"):
        if locals()[name] is not None:
            raise data.UserError(f"MM-Diffusion knows no words or classes: it takes no {name}.")
    options = {"sample_steps": steps, "guidance": guidance, "sampler": sampler, "method": method, "seconds": seconds}
    cfg = dataclasses.replace(model.cfg, **{k: x for k, x in options.items() if x is not None})
    device, given = next(model.parameters()).device, condition(cfg, n, video, audio)
    if guidance is not None and (not (given or cfg.seconds) or cfg.method == "replace"):
        raise data.UserError("Guidance is for a given video or sound or --seconds, with --method gradient or released.")
    sr = load(cfg.sr_ckpt, device) if cfg.sr_ckpt else None
    if sr and (not isinstance(sr, SRUNet) or sr.cfg.size != cfg.size or "v" not in cfg.streams):
        raise data.UserError(f"{cfg.sr_ckpt} does not enlarge frames of {cfg.size} pixels.")
    out = {k: [] for k in cfg.streams}
    for first in tqdm(range(0, n, batch_size), "sampling", disable=n <= batch_size, leave=False):
        clips = range(first, min(first + batch_size, n))
        draws = [torch.Generator().manual_seed(data.clip_key(seed, f"sample {i}")) for i in clips]

        def normal(shape, draws=draws):              # drawn on the CPU: every device starts from the same noise
            return torch.stack([torch.randn(shape, generator=g) for g in draws]).to(device)

        x0 = {k: x[clips.start:clips.stop].to(device) for k, x in given.items()}
        x = generate(model, normal, torch.Generator().manual_seed(seed), x0, cfg)
        if sr and "v" not in given:                  # one noise image per clip
            pairs = zip(x["v"], normal((3, sr.cfg.sr_size, sr.cfg.sr_size)), strict=True)
            x["v"] = torch.stack([torch.cat([upsample(sr, y, noise, cfg.sr_steps) for y in v.split(8)])
                                  for v, noise in pairs])
        for k in out:
            out[k].append(x[k].cpu())
    return (data.to_uint8(torch.cat(out["v"])) if "v" in out else None,
            torch.cat(out["a"])[:, 0].clamp(-1, 1) if "a" in out else None)


def load(path, device="cpu", options=()):
    """A model ready to sample: a checkpoint of ours (its EMA weights), or a released state dict, taken for the preset
    that has its names and shapes. options, as on the command line, override the config. Raises data.UserError when the
    file is not readable or does not fit."""
    state = read_checkpoint(path)
    if "cfg" in state:
        cfg, state = parse(options, Config(**state["cfg"])), state["ema"]
    else:
        has = {k: getattr(p, "shape", None) for k, p in state.items()}
        stage = ["--stage", "sr" if "out.0.weight" in has else "base"]
        with torch.device("meta"):
            nets = {name: STAGES[stage[1]][0](parse([*stage, "--preset", name])) for name in PRESETS}
        fits = [["--preset", x] for x, net in nets.items() if has == {k: p.shape for k, p in net.state_dict().items()}]
        if not (fits or options):
            raise data.UserError(f"{path} fits no preset: give the options that it was trained with.")
        cfg = parse([*stage, *options, *(fits or [[]])[0]])
    model = STAGES[cfg.stage][0](cfg)
    fill(model, state, path)
    return model.to(device).eval()


def main(argv=None):
    cfg = parse(argv)
    lead, (net, process) = int(os.environ.get("RANK", 0)) == 0, STAGES[cfg.stage]
    try:
        device = setup(cfg)
        train, val = open_clips(cfg, "train"), open_clips(cfg, "val")
        if cfg.sr_ckpt:                              # wrong? Then now, not when the first samples are due
            load(cfg.sr_ckpt)
        torch.manual_seed(cfg.seed)
        model = net(cfg)
        if cfg.init_from:
            state = read_checkpoint(cfg.init_from)   # ADM's own upsampler, which the paper's starts from, has classes
            state = {k: x for k, x in state.get("ema", state).items() if k != "label_emb.weight"}
            fill(model, state, cfg.init_from)
        model = model.to(device)
        if lead:
            size = sum(p.numel() for p in model.parameters())
            print(f"{size:,} parameters on {device}, data {cfg.data}, to {cfg.out}")
        samples = {"base": lambda ema: sample(ema, cfg.samples, seed=cfg.seed),
                   "sr": lambda ema: (compare(ema, val, cfg.samples)[0], None)}
        ema = fit(model, process(cfg).loss, cfg, train, val, samples[cfg.stage])
        if lead and cfg.stage == "sr":
            _, ours, cubic = compare(ema, val, cfg.val_clips)
            print(f"PSNR of {min(cfg.val_clips, len(val))} validation frames: {ours:.2f} dB, bicubic {cubic:.2f} dB")
    except data.UserError as error:
        die(f"mm_diffusion.py: {error}")
    if lead:
        more = f"python sample.py --model mm_diffusion --{'sr_' * (cfg.stage == 'sr')}ckpt {cfg.out}/ckpt.pt"
        print(f"Samples are in {cfg.out}/samples; more: {more}")


if __name__ == "__main__":
    main()
