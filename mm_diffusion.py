"""MM-Diffusion: a coupled U-Net that denoises video and its sound together (arXiv 2212.09478).

Video and audio are noised independently and denoised by one network: two U-Nets, over pixels and
over the waveform, which look at each other through cross-attention inside a window of a few frames.
The window is shifted at random in every call, so that over the many calls of sampling each frame
meets all of the sound, at a small cost per call. Paper: Ruan et al. 2023.

    noisy video (B, F, 3, H, W)     noisy audio (B, 1, L)        step t (B,)
        | conv 2-D, then in time        | conv 1-D                   | sinusoids, MLP
    v (B, F, H, W, C)               a (B, L, C)                  emb (B, width)
        |                               |                            |
    [ MM-block: residual 2+1-D convs | residual dilated convs, modulated by emb ]  x res_blocks
    [ cross-attention: frame i <-> the sound of frames i+R ... i+R+S-1  (eq. 8) ]
        | H, W / 2                      | L / 4    ... down to the lowest scale, back with skips
    predicted noise (B, F, 3, H, W) predicted noise (B, 1, L)

    python mm_diffusion.py                                       # toy: 5 to 9 minutes, 2 cores
    torchrun --nproc_per_node=4 mm_diffusion.py --data concerts  # after `python data.py prepare`
    python sample.py --model mm_diffusion                        # mp4, wav, film strips, a page
    python sample.py --model mm_diffusion --video in.mp4         # its sound; --audio: the reverse
    python mm_diffusion.py --stage sr                            # enlarges frames, for --sr_ckpt

Where the paper and its code disagree, or the paper is silent (-), we do as the code, or as the last
column says:

                           paper                    released code                      here
    parameters             115.13M                  133,675,524; nothing gives the former
    middle blocks          no audio self-attention  with it; cross-attention over all for 1,4,8
    channels per head      64; SR 48                cross-attention 64, else 4 heads; SR 4 heads
    dilations              1, 2, ... 2^10           2, 4, ... 512, 1, 2, ...
    2+1-D convolution      time, then space         space, then time; a block's second is 1x1
    step embedding         128; SR 192              128; SR 192, widened to 768
    cost of attention      S^2 H W L / F            F S H W L / F for each stream
    lambda(t); variance    -; eq. 1: I, eq. 3: -    1; beta_t in both
    shift R                0 ... F - S              same; drawn anew in backward   once a call
    sampler                multistep, adaptive: 2   dpm3; an adaptive one          dpm: multistep
    guidance, eq. 12       sum, new noise a step    mean, one noise, sqrt(abar)    both
    mirrored; SR dropout   none, SR half; 0.1       all, SR none; 0                paper
    batch, steps           128, 10k (Table 4: 100k) 32, endless; parts summed      paper; averaged

Ours alone: a sample is a function of its seed; "up" blocks work at the low resolution and copy at
their end; the averaged weights' decay is ramped up; SR learns from averages over squares of pixels,
as data.py makes small frames, not bicubic ones. toy and small train with EDM (below) and Muon: what
a training of minutes needs to get from noise to whole shapes. toy does not shift its windows.
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
from torch.distributions import Normal, kl_divergence
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

import data

RANK = int(os.environ.get("RANK", 0))  # which process this is, as torchrun says,
WORLD = int(os.environ.get("WORLD_SIZE", 1))  # and of how many

# ---- Config


@dataclass
class Config:
    """Every option. Defaults are the paper's (Table A.1) or, where it is silent, its code's."""

    preset: str = "paper"  # row of PRESETS; not given: toy, or the one named like --data, or small
    data: str = "toy"  # toy, toy:bounce,glide (some of its scenes), or a set of data.py prepare
    out: str = ""  # folder of the run; empty: out/mm_diffusion/PRESET[-DATA]
    stage: str = "base"  # what to train: base, the coupled U-Net; sr, the one that enlarges frames
    # the clip
    frames: int = 16  # frames in a clip
    size: int = 64  # height and width, pixels
    fps: int = 10  # frames per second
    rate: int = 16000  # audio samples per second; a clip has frames * rate / fps of them
    # the coupled U-Net (section 3.3)
    width: int = 128  # base channels
    mult: tuple = (1, 2, 3, 4)  # channels of each scale, in units of width
    res_blocks: int = 2  # MM-blocks per scale, beside the one that resamples
    norm_groups: int = 32  # groups of every group norm; must divide every width
    heads: int = 4  # heads of self-attention
    cross_head_dim: int = 64  # channels per head of cross-attention
    film: bool = True  # the time embedding scales and shifts (FiLM); false: it is added
    video_attention: tuple = (2, 4, 8)  # downsampling factors with self-attention of the video
    cross_attention: tuple = (2, 4, 8)  # downsampling factors with cross-attention
    windows: tuple = (1, 4, 8)  # its window at each of those factors, frames (S of section 3.3)
    random_shift: bool = True  # draw the shift R of the windows anew in every call; false: R = 0
    streams: str = "av"  # av: both; v or a: one sub-network alone (Ours-v, Ours-a of Tables 1-2)
    dropout: float = 0.1  # in the MM-blocks, while training
    checkpoint: bool = False  # recompute blocks in backward: less memory, more time
    # super-resolution (stage sr; Table A.1, right column)
    sr_size: int = 256  # height and width of its frames, a multiple of size
    sr_width: int = 192  # its base channels
    sr_mult: tuple = (1, 1, 2, 2, 4, 4)  # channels of each scale, in units of sr_width
    sr_attention: tuple = (8, 16, 32)  # downsampling factors with self-attention
    sr_residual: float = 0.0  # deviation of what bicubic enlargement lacks; 0: off, see SRResidual
    sr_steps: int = 270000  # optimizer steps of stage sr
    sr_batch_size: int = 48  # frames per optimizer step over ALL processes
    sr_grad_accum: int = 1  # grad_accum of stage sr
    sr_lr: float = 1e-4  # learning rate of stage sr
    augment: float = 0.5  # probability of each of noise, JPEG and mirroring in its training frames
    # diffusion (sections 3.1 and 3.2)
    diffusion_steps: int = 1000  # T; linear betas, 1e-4 to 0.02 for T = 1000, scaled by 1000 / T
    prediction: str = "eps"  # eps: the network gives the noise (eq. 7); edm: ours, see EDM
    data_mean: tuple = (0.0, 0.0)  # edm: mean of the data, video and audio (as it is diffused)
    data_std: tuple = (0.5, 0.2)  # edm: their standard deviations; these weight the loss
    skip_std: tuple = (0.1, 0.2)  # edm: noise above this is not passed on to the estimate
    noise_levels: tuple = (0.7, 2.0)  # edm: mean and deviation of ln(sigma / alpha) in training
    motion_weight: float = 0.0  # edm: how much more moving pixels count in training, at most
    mu_law: float = 0.0  # edm: diffuse the sound as its mu-law code with this mu; 0: as it is
    # sampling
    sampler: str = "dpm"  # dpm, dpm3, ddim or ddpm; where a part is given, ddpm or else ddim
    sample_steps: int = 20  # network calls per clip (ddpm takes T)
    method: str = "replace"  # for a given part: replace, gradient (eq. 12) or released (its code's)
    guidance: float = 0.1  # lambda of eq. 12; for released: its fp16 scripts have 3 * 2^20 = 3e6
    seconds: float = 0.0  # length of a clip, of windows that overlap by half; 0: one window
    sr_ckpt: str = ""  # enlarge the frames with this network, of --stage sr or a released one
    sr_sample_steps: int = 25  # DDIM steps of that
    # training
    steps: int = 10000  # optimizer steps
    batch_size: int = 128  # clips per optimizer step over ALL processes
    grad_accum: int = 1  # parts that each process splits its share of the batch into
    lr: float = 1e-4  # learning rate
    lr_end: float = 1.0  # the rate falls linearly to this share of lr; 1: constant
    warmup: int = 0  # steps of linear warm-up
    optimizer: str = "adamw"  # adamw; or muon for hidden weight matrices, adamw for the rest
    betas: tuple = (0.9, 0.999)  # of AdamW
    weight_decay: float = 0.0  # of both
    clip: float = 0.0  # largest gradient norm; 0: no clipping (the norm is logged all the same)
    ema: float = 0.9999  # decay of the averaged weights
    amp: str = "auto"  # auto, bf16, fp16 or off; auto: bf16 or else fp16 on CUDA, off elsewhere
    compile: bool = False  # torch.compile the network
    device: str = "auto"  # auto (cuda or else cpu) or a torch device
    workers: int = 2  # data loading processes
    seed: int = 0  # of weights, batches, noise, shifts and samples
    init_from: str = ""  # start from the weights in this file: a checkpoint, or a released one
    log_every: int = 10  # steps between rows of log.csv
    eval_every: int = 500  # steps between validations, checkpoints and samples
    val_clips: int = 64  # validation clips, each seen at one noise level of every quartile
    samples: int = 4  # clips to sample then

    @property
    def length(self):
        """Audio samples in a clip."""
        return self.frames * self.rate // self.fps


CHOICES = {
    "stage": ("base", "sr"),
    "streams": ("av", "v", "a"),
    "prediction": ("eps", "edm"),
    "sampler": ("dpm", "dpm3", "ddim", "ddpm"),
    "method": ("replace", "gradient", "released"),
    "optimizer": ("adamw", "muon"),
    "amp": ("auto", "bf16", "fp16", "off"),
}

PRESETS = {
    # Minutes on a laptop; everything that EDM adds is on.
    "toy": dict(
        data="toy:bounce",
        size=32,
        rate=8000,
        width=16,
        res_blocks=1,
        norm_groups=8,
        cross_head_dim=16,
        video_attention=(4, 8),
        cross_attention=(4, 8),
        windows=(1, 16),
        random_shift=False,
        dropout=0.0,
        sr_size=64,
        sr_width=16,
        sr_mult=(1, 2, 4),
        sr_attention=(),
        sr_residual=0.035,
        sr_steps=500,
        sr_batch_size=8,
        sr_lr=6e-3,
        prediction="edm",
        data_mean=(-0.55, 0.0),
        data_std=(0.42, 0.37),
        skip_std=(0.1, 0.37),
        noise_levels=(1.2, 1.6),
        motion_weight=6.0,
        mu_law=31.0,
        sampler="ddim",
        steps=620,
        batch_size=4,
        lr=1.2e-2,
        lr_end=0.05,
        warmup=20,
        optimizer="muon",
        clip=1.0,
        ema=0.99,
        eval_every=310,
        val_clips=16,
    ),
    # One GPU, and a data set of one's own.
    "small": dict(
        width=64,
        res_blocks=1,
        dropout=0.0,
        sr_width=64,
        sr_steps=20000,
        sr_batch_size=16,
        sr_lr=2e-3,
        prediction="edm",
        data_mean=(-0.6, 0.0),
        data_std=(0.41, 0.18),
        skip_std=(0.1, 0.18),
        noise_levels=(1.2, 1.6),
        sampler="ddim",
        batch_size=16,
        lr=4e-3,
        lr_end=0.05,
        warmup=200,
        optimizer="muon",
        clip=1.0,
        ema=0.999,
    ),
    # Table A.1. One 80 GB GPU holds parts of 8 clips or 12 frames; more GPUs need fewer parts.
    "paper": dict(grad_accum=16, sr_grad_accum=4),
    # Paredes 2025, section IV-B.
    "concerts": dict(
        diffusion_steps=2000,
        steps=20000,
        batch_size=16,
        grad_accum=2,
        sr_grad_accum=4,
        amp="fp16",
    ),
    # The supplement's part C: twice the width.
    "audioset": dict(width=256, checkpoint=True, grad_accum=16, sr_grad_accum=4),
}


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
    for name, choices in CHOICES.items():
        if getattr(cfg, name) not in choices:
            raise data.UserError(f"--{name} must be one of {', '.join(choices)}.")
    for field in dataclasses.fields(cfg):
        least = 0 if field.name in ("warmup", "workers", "seed") else 1
        if field.type is int and getattr(cfg, field.name) < least:
            raise data.UserError(f"--{field.name} {getattr(cfg, field.name)} is too small.")
    for name in ("betas", "data_mean", "data_std", "skip_std", "noise_levels"):
        if len(getattr(cfg, name)) != 2:
            raise data.UserError(f"--{name} needs two numbers.")
    if not 0 <= cfg.dropout < 1:
        raise data.UserError("--dropout must be 0 or more and below 1.")
    if cfg.seconds < 0:
        raise data.UserError("--seconds must not be negative.")
    if cfg.diffusion_steps <= 20:
        raise data.UserError("--diffusion_steps must be above 20: else the last beta is 1 or more.")
    if cfg.sample_steps > cfg.diffusion_steps:
        raise data.UserError("--sample_steps must not exceed --diffusion_steps.")

    # Every scale halves the frames and quarters the sound.
    halvings = 2 ** (len(cfg.mult) - 1)
    exact_length = cfg.frames * cfg.rate / cfg.fps
    sr_halvings = 2 ** (len(cfg.sr_mult) - 1)
    if cfg.stage == "sr" and (cfg.sr_size % cfg.size or cfg.sr_size % sr_halvings):
        raise data.UserError(
            f"--sr_size must be a multiple of --size ({cfg.size}) and {sr_halvings}."
        )
    if cfg.stage == "base" and cfg.size % halvings:
        raise data.UserError(f"--size must divide by {halvings}, as --mult has its scales.")
    if cfg.stage == "base" and "a" in cfg.streams and exact_length % halvings**2:
        raise data.UserError(f"--frames * --rate / --fps must be a multiple of {halvings**2}.")

    # Groups and heads share the channels of a scale out evenly.
    widths = {2**i: cfg.width * m for i, m in enumerate(cfg.mult)}  # by downsampling factor
    for width in widths.values():
        if width < 1 or width % cfg.norm_groups or width % cfg.heads:
            raise data.UserError(
                "--norm_groups and --heads must divide --width times every --mult."
            )
    for factor in cfg.video_attention + cfg.cross_attention:
        if factor not in widths:
            raise data.UserError(f"Attention is possible at the factors {list(widths)} alone.")
    for factor in cfg.cross_attention:
        if widths[factor] % cfg.cross_head_dim:
            raise data.UserError("--cross_head_dim must divide the widths of cross-attention.")
    if len(cfg.windows) != len(cfg.cross_attention):
        raise data.UserError("--windows needs one window for each factor of --cross_attention.")
    for window in cfg.windows:
        if not 1 <= window <= cfg.frames:
            raise data.UserError(f"--windows must lie between 1 and --frames ({cfg.frames}).")


# ---- Model. Inside, features are channels-last: video (B, F, H, W, C), audio (B, L, C). So 1x1
# convolutions and attention need no copies and 2-D kernels run in their fast layout; parameters
# keep the released names and shapes.


class Norm(nn.Module):
    """Group norm of channels-last features (B, ..., C): over a group and all between B and C."""

    def __init__(self, channels, groups):
        super().__init__()
        self.GroupNorm = nn.GroupNorm(groups, channels)

    def forward(self, x):
        flat = x.reshape(x.shape[0], -1, 1, x.shape[-1])  # (B, N, 1, C)
        flat = flat.permute(0, 3, 1, 2)  # (B, C, N, 1), in memory as it was
        return self.GroupNorm(flat).permute(0, 2, 3, 1).reshape(x.shape)


def pointwise(conv, x):
    """A convolution of kernel 1 on channels-last features: (B, ..., I) -> (B, ..., O)."""
    return F.linear(x, conv.weight.flatten(1), conv.bias)


class AudioConv(nn.Module):
    """Dilated 1-D convolution: (B, L, I) -> (B, L, O)."""

    def __init__(self, i, o, kernel, dilation=1):
        super().__init__()
        padding = kernel // 2 * dilation
        self.audio_conv = nn.Conv1d(i, o, kernel, padding=padding, dilation=dilation)

    def forward(self, a):
        conv = self.audio_conv
        if conv.kernel_size == (1,):
            return pointwise(conv, a)
        a = a.unsqueeze(1).permute(0, 3, 1, 2)  # (B, I, 1, L)
        weight = conv.weight.unsqueeze(2)  # (O, I, 1, kernel)
        a = F.conv2d(a, weight, conv.bias, 1, (0, *conv.padding), (1, *conv.dilation))
        return a.permute(0, 2, 3, 1).squeeze(1)  # (B, L, O)


class VideoConv(nn.Module):
    """2-D convolution over space, then 1-D over time: (B, F, H, W, I) -> (B, F, H, W, O)."""

    def __init__(self, i, o, kernel=3):
        super().__init__()
        self.video_conv_spatial = nn.Conv2d(i, o, kernel, padding=kernel // 2)
        self.video_conv_temporal = nn.Conv1d(o, o, kernel, padding=kernel // 2)

    def forward(self, v):
        B, frames, H, W, _ = v.shape
        v = self.video_conv_spatial(v.flatten(0, 1).permute(0, 3, 1, 2))  # (B*F, O, H, W)
        v = v.permute(0, 2, 3, 1).reshape(B, frames, H * W, -1)  # (B, F, H*W, O)
        conv = self.video_conv_temporal
        weight = conv.weight.unsqueeze(3)  # (O, O, kernel, 1)
        v = F.conv2d(v.permute(0, 3, 1, 2), weight, conv.bias, padding=(*conv.padding, 0))
        return v.permute(0, 2, 3, 1).reshape(B, frames, H, W, -1)


class VideoConv3d(nn.Module):
    """3-D convolution of video: the head (kernel 3) and all 1x1x1 projections."""

    def __init__(self, i, o, kernel):
        super().__init__()
        self.video_conv = nn.Conv3d(i, o, kernel, padding=kernel // 2)

    def forward(self, v):
        if self.video_conv.kernel_size == (1, 1, 1):
            return pointwise(self.video_conv, v)
        v = self.video_conv(v.permute(0, 4, 1, 2, 3))  # (B, O, F, H, W)
        return v.permute(0, 2, 3, 4, 1)


def zeroed(module):
    """Zero a layer: its residual branch starts as nothing, and the fresh network outputs 0."""
    for p in module.parameters():
        nn.init.zeros_(p)
    return module


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


class SelfAttention(nn.Module):
    """x + proj(attention(norm(x))) over tokens (B, N, C).

    Positions are known from the padding of the convolutions alone.
    """

    def __init__(self, channels, heads, groups):
        super().__init__()
        self.heads = heads
        self.norm = Norm(channels, groups)
        self.qkv = nn.Conv1d(channels, 3 * channels, 1)
        self.proj_out = zeroed(nn.Conv1d(channels, channels, 1))

    def forward(self, x):
        q, k, v = pointwise(self.qkv, self.norm(x)).chunk(3, dim=-1)  # (B, N, C) each
        return x + pointwise(self.proj_out, attend(q, k, v, self.heads))


def halve(v, a):
    """Average the video over 2 x 2 pixels and the audio over 4 samples. None stays None."""
    if v is not None:
        x = F.avg_pool2d(v.flatten(0, 1).permute(0, 3, 1, 2), 2)  # (B*F, C, H/2, W/2)
        v = x.permute(0, 2, 3, 1).unflatten(0, v.shape[:2])  # (B, F, H/2, W/2, C)
    if a is not None:
        a = a.unflatten(1, (-1, 4)).mean(2)  # (B, L/4, C)
    return v, a


def double(v, a):
    """The reverse of halve(), by copies."""
    if v is not None:
        x = F.interpolate(v.flatten(0, 1).permute(0, 3, 1, 2), scale_factor=2.0)  # (B*F, C, 2H, 2W)
        v = x.permute(0, 2, 3, 1).unflatten(0, v.shape[:2])  # (B, F, 2H, 2W, C)
    if a is not None:
        a = a.repeat_interleave(4, dim=1)  # (B, 4L, C)
    return v, a


def modulated(layers, h, p):
    """`layers` on h, the first a norm, driven by the time embedding's share p (B, 2*O or O).

    With FiLM (2*O) the norm is followed by norm(h) (1 + scale) + shift, else preceded by h + p.
    """
    norm = layers[0]
    p = p.reshape(p.shape[0], *[1] * (h.dim() - 2), -1)  # (B, 1, ..., 2*O or O)
    if p.shape[-1] == h.shape[-1]:
        h = norm(h + p)
    else:
        scale, shift = p.chunk(2, dim=-1)
        h = torch.addcmul(shift, norm(h), 1 + scale)
    for layer in layers[1:]:
        h = layer(h)
    return h


class ResBlock(nn.Module):
    """MM-block (figure 3b): residual blocks of both streams, driven by one time embedding."""

    def __init__(self, i, o, cfg, dilation, resize=None, attention=False, audio_attention=False):
        """resize: halve, double or None; attention: of the video, over space and over time."""
        super().__init__()
        self.resize = resize
        self.dropout = cfg.dropout
        groups = cfg.norm_groups
        video = "v" in cfg.streams
        audio = "a" in cfg.streams

        def first(conv):
            return nn.Sequential(Norm(i, groups), nn.SiLU(), conv)

        def second(conv):
            return nn.Sequential(Norm(o, groups), nn.SiLU(), nn.Dropout(cfg.dropout), zeroed(conv))

        # Their order is that of the released parameters.
        self.video_in_layers = first(VideoConv(i, o)) if video else None
        self.audio_in_layers = first(AudioConv(i, o, 3, dilation)) if audio else None
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(cfg.width, 2 * o if cfg.film else o))
        self.video_out_layers = second(VideoConv3d(o, o, 1)) if video else None
        self.audio_out_layers = second(AudioConv(o, o, 1)) if audio else None
        self.video_skip_connection = nn.Identity()
        if video and i != o:
            self.video_skip_connection = VideoConv3d(i, o, 1)
        self.audio_skip_connection = nn.Identity()
        if audio and i != o:
            self.audio_skip_connection = AudioConv(i, o, 1)
        self.spatial_attention_block = None
        self.temporal_attention_block = None
        if video and attention:
            self.spatial_attention_block = SelfAttention(o, cfg.heads, groups)
            self.temporal_attention_block = SelfAttention(o, cfg.heads, groups)
        self.audio_attention_block = None
        if audio and audio_attention:
            self.audio_attention_block = SelfAttention(o, cfg.heads, groups)

    def forward(self, v, a, emb):
        """v (B, F, H, W, I), a (B, L, I), emb (B, width) -> v and a with O channels, resized."""
        hv = None if v is None else self.video_in_layers(v)
        ha = None if a is None else self.audio_in_layers(a)
        # Copied values give the same norm and the same pointwise results, so doubling can wait
        # until the end, where it costs a quarter; not where dropout must fall on every pixel.
        at_end = self.resize is double and not (self.training and self.dropout)
        if self.resize and not at_end:
            v, a = self.resize(v, a)
            hv, ha = self.resize(hv, ha)
        p = self.emb_layers(emb)  # (B, 2*O); (B, O) without FiLM
        if v is not None:
            v = self.video_skip_connection(v) + modulated(self.video_out_layers, hv, p)
        if a is not None:
            a = self.audio_skip_connection(a) + modulated(self.audio_out_layers, ha, p)
        if at_end:
            v, a = self.resize(v, a)

        if self.spatial_attention_block is not None:
            B, frames, H, W, C = v.shape
            x = v.reshape(B * frames, H * W, C)  # within each frame
            x = self.spatial_attention_block(x)
            x = x.reshape(B, frames, H * W, C).transpose(1, 2)  # (B, H*W, F, C)
            x = self.temporal_attention_block(x.flatten(0, 1))  # within each pixel
            v = x.reshape(B, H * W, frames, C).transpose(1, 2).reshape(v.shape)
        if self.audio_attention_block is not None:
            a = self.audio_attention_block(a)
        return v, a


def gather_windows(x, count, S, R):
    """The window of every segment of a token sequence (section 3.3, step II).

    x (B, N, C) is cut into `count` segments of n = N // count tokens; segment i gets the S
    segments from i + R on, modulo N -> (B * count, S * n, C). R is a 0-d tensor; None: 0.
    """
    B, N, C = x.shape
    n = N // count
    if S == 1 and R is None:  # every segment its own
        return x[:, : count * n].reshape(B * count, n, C)
    # Move whole segments, unless a remainder makes the windows that wrap around slip.
    unit = n if N % count == 0 else 1
    first = torch.arange(count, device=x.device)
    if R is not None:
        first = first + R
    start = first * n  # (count,)
    offset = torch.arange(0, S * n, unit, device=x.device)
    index = (start[:, None] + offset) % N // unit  # (count, S * n / unit)
    x = x.reshape(B, N // unit, unit * C).index_select(1, index.flatten())
    return x.reshape(B * count, S * n, C)


class CrossAttention(nn.Module):
    """Random-shift multi-modal attention (RS-MMA, eq. 8-9).

    Frame i attends to the audio of the frames i+R ... i+R+S-1, modulo F, and the audio of frame i
    to those frames. window S = None: to the whole clip, without a shift.
    """

    def __init__(self, channels, cfg, window):
        super().__init__()
        self.window = window
        self.heads = channels // cfg.cross_head_dim
        self.v_norm = Norm(channels, cfg.norm_groups)
        self.a_norm = Norm(channels, cfg.norm_groups)
        self.v_qkv = nn.Conv1d(channels, 3 * channels, 1)
        self.a_qkv = nn.Conv1d(channels, 3 * channels, 1)
        self.video_proj_out = zeroed(VideoConv3d(channels, channels, 1))
        self.audio_proj_out = zeroed(AudioConv(channels, channels, 1))

    def forward(self, v, a, R):
        B, frames, H, W, C = v.shape
        L = a.shape[1]
        S = self.window or frames
        v_qkv = pointwise(self.v_qkv, self.v_norm(v)).flatten(1, 3)  # (B, F*H*W, 3C)
        a_qkv = pointwise(self.a_qkv, self.a_norm(a))  # (B, L, 3C)
        vq, vkv = v_qkv.split((C, 2 * C), dim=-1)
        aq, akv = a_qkv.split((C, 2 * C), dim=-1)

        if S == frames and L % frames == 0:  # every window is the whole clip: nothing to gather
            hv = attend(vq, *akv.chunk(2, dim=-1), self.heads)  # (B, F*H*W, C)
            ha = attend(aq, *vkv.chunk(2, dim=-1), self.heads)  # (B, L, C)
        else:
            n = L // frames  # audio tokens of a frame
            akv = gather_windows(akv, frames, S, R)  # (B*F, S*n, 2C)
            vkv = gather_windows(vkv, frames, S, R)  # (B*F, S*H*W, 2C)
            vq = vq.reshape(B * frames, H * W, C)
            hv = attend(vq, *akv.chunk(2, dim=-1), self.heads)  # (B*F, H*W, C)
            head = aq[:, : frames * n].reshape(B * frames, n, C)
            ha = attend(head, *vkv.chunk(2, dim=-1), self.heads)  # (B*F, n, C)
            ha = ha.reshape(B, frames * n, C)
            if L > frames * n:  # what remains of L / F attends as the last frame's audio does
                last = vkv.unflatten(0, (B, frames))[:, -1]  # (B, S*H*W, 2C)
                tail = attend(aq[:, frames * n :], *last.chunk(2, dim=-1), self.heads)
                ha = torch.cat([ha, tail], dim=1)  # (B, L, C)
        return v + self.video_proj_out(hv.reshape(v.shape)), a + self.audio_proj_out(ha)


class Stem(nn.Module):
    """Pixels (B, F, H, W, 3) and waveform (B, L, 1) -> base channels."""

    def __init__(self, o, cfg):
        super().__init__()
        self.video_conv = VideoConv(3, o) if "v" in cfg.streams else None
        self.audio_conv = AudioConv(1, o, 3) if "a" in cfg.streams else None

    def forward(self, v, a, emb):
        v = None if v is None else self.video_conv(v)
        a = None if a is None else self.audio_conv(a)
        return v, a


def time_embedding(t, dim):
    """Sinusoids of the diffusion step, cosines first: (B,) -> (B, dim)."""
    half = torch.arange(dim // 2, device=t.device)
    freqs = torch.exp(-math.log(10000) / (dim // 2) * half)
    angles = t.float()[:, None] * freqs  # (B, dim / 2)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class CoupledUNet(nn.Module):
    """The coupled U-Net (figure 3a).

    Per scale res_blocks MM-blocks, each followed by cross-attention where the scale has it, and
    one that downsamples; back up with one block more per scale, given the encoder's features.
    """

    edges = ("input_blocks.0.", "audio_out.", "video_out.")  # layers that are not hidden

    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        width = cfg.width
        lowest = len(cfg.mult) - 1
        window = {}
        if cfg.streams == "av":
            window = dict(zip(cfg.cross_attention, cfg.windows, strict=True))

        def dilation(k):  # of the audio, in the k-th block
            return 2 ** (k % 10)

        def blocks(i, o, factor, k):
            attention = factor in cfg.video_attention
            entry = nn.ModuleList([ResBlock(i, o, cfg, dilation(k), attention=attention)])
            if factor in window:
                entry.append(CrossAttention(o, cfg, window[factor]))
            return entry

        self.time_embed = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))

        # Down. `skips` are the channels of the features that the way up will be given.
        c = width * cfg.mult[0]
        self.input_blocks = nn.ModuleList([nn.ModuleList([Stem(c, cfg)])])
        skips = [c]
        k = 1
        for level, m in enumerate(cfg.mult):
            for _ in range(cfg.res_blocks):
                self.input_blocks.append(blocks(c, width * m, 2**level, k))
                c = width * m
                skips.append(c)
                k += 1
            if level < lowest:
                down = ResBlock(c, c, cfg, dilation(k), resize=halve)
                self.input_blocks.append(nn.ModuleList([down]))
                skips.append(c)
                k += 1

        middle = []
        for _ in range(2):
            block = ResBlock(c, c, cfg, dilation(k), attention=True, audio_attention=True)
            middle.append(block)
        if cfg.windows == (1, 4, 8) and window:  # the released code's; the paper does not have it
            middle.insert(1, CrossAttention(c, cfg, None))
        self.middle_blocks = nn.ModuleList(middle)

        # Up; the dilations go back, too.
        self.output_blocks = nn.ModuleList()
        k -= 1
        for level, m in reversed(list(enumerate(cfg.mult))):
            for i in range(cfg.res_blocks + 1):
                entry = blocks(c + skips.pop(), width * m, 2**level, k)
                c = width * m
                k -= 1
                if level and i == cfg.res_blocks:
                    entry.append(ResBlock(c, c, cfg, dilation(k), resize=double))
                self.output_blocks.append(entry)

        def head(conv):
            return nn.Sequential(Norm(c, cfg.norm_groups), nn.SiLU(), zeroed(conv))

        self.audio_out = head(AudioConv(c, 1, 3)) if "a" in cfg.streams else None
        self.video_out = head(VideoConv3d(c, 3, 3)) if "v" in cfg.streams else None
        self.register_buffer("shift_counts", torch.tensor(self.count_shifts()), persistent=False)

    def count_shifts(self):
        """How many shifts each cross-attention can choose from, in the order in which they run."""
        counts = []
        for module in self.modules():
            if isinstance(module, CrossAttention):
                span = module.window or self.cfg.frames
                counts.append(self.cfg.frames - span + 1)
        return counts

    def draw_shifts(self, generator=None):
        """A shift R for each cross-attention, uniform in 0 ... F - S -> (blocks,) int64.

        Where nothing is shifted, a list of None.
        """
        counts = self.shift_counts
        if not self.cfg.random_shift:
            return [None] * len(counts)
        device = generator.device if generator else counts.device
        u = torch.rand(len(counts), generator=generator, device=device)
        return (u.to(counts.device) * counts).long()

    def forward(self, v, a, t, shifts=None):
        """Noisy v (B, F, 3, H, W), a (B, 1, L), steps t (B,) -> what the network says of each.

        The two results are float32, of the same shapes. shifts: of draw_shifts (None: drawn here).
        A stream that the network lacks is None.
        """
        if shifts is None:
            shifts = self.draw_shifts()
        R = iter(shifts)
        emb = self.time_embed(time_embedding(t, self.cfg.width))  # (B, width)
        v = None if v is None else v.permute(0, 1, 3, 4, 2).contiguous()  # (B, F, H, W, 3)
        a = None if a is None else a.transpose(1, 2)  # (B, L, 1)

        skips = []
        for entry in self.input_blocks:
            v, a = self.run(entry, v, a, emb, R)
            skips.append((v, a))
        v, a = self.run(self.middle_blocks, v, a, emb, R)
        for entry in self.output_blocks:
            skip_v, skip_a = skips.pop()
            v = None if v is None else torch.cat([v, skip_v], dim=-1)
            a = None if a is None else torch.cat([a, skip_a], dim=-1)
            v, a = self.run(entry, v, a, emb, R)

        if v is not None:
            v = self.video_out(v).permute(0, 1, 4, 2, 3).float()  # (B, F, 3, H, W)
        if a is not None:
            a = self.audio_out(a).transpose(1, 2).float()  # (B, 1, L)
        return v, a

    def run(self, entry, v, a, emb, R):
        for block in entry:
            # A cross-attention is told its shift, any other block the step.
            told = next(R) if isinstance(block, CrossAttention) else emb
            if self.cfg.checkpoint and torch.is_grad_enabled():
                v, a = checkpoint(block, v, a, told, use_reentrant=False)
            else:
                v, a = block(v, a, told)
        return v, a


# ---- Super-resolution: the U-Net of ADM (Dhariwal and Nichol 2021), frame by frame; features are
# (B, C, H, W).


class SRBlock(nn.Module):
    """Residual block. Resampling comes before the first convolution, and the second is 3x3."""

    def __init__(self, i, o, cfg, resize=None):
        super().__init__()
        groups = cfg.norm_groups
        first = nn.Conv2d(i, o, 3, padding=1)
        second = zeroed(nn.Conv2d(o, o, 3, padding=1))
        dropout = nn.Dropout(cfg.dropout)
        self.resize = resize or nn.Identity()
        self.in_layers = nn.Sequential(nn.GroupNorm(groups, i), nn.SiLU(), first)
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(4 * cfg.width, 2 * o))
        self.out_layers = nn.Sequential(nn.GroupNorm(groups, o), nn.SiLU(), dropout, second)
        self.skip_connection = nn.Conv2d(i, o, 1) if i != o else nn.Identity()

    def forward(self, x, emb):
        norm, act, conv = self.in_layers
        h = conv(self.resize(act(norm(x))))
        norm, act, dropout, conv = self.out_layers
        scale, shift = self.emb_layers(emb)[:, :, None, None].chunk(2, dim=1)  # (B, O, 1, 1)
        h = torch.addcmul(shift, norm(h), 1 + scale)
        return self.skip_connection(self.resize(x)) + conv(dropout(act(h)))


class SRAttention(SelfAttention):
    """Self-attention over the pixels of a frame; qkv holds q, k and v head by head."""

    def __init__(self, channels, cfg):
        super().__init__(channels, cfg.heads, cfg.norm_groups)
        self.norm = nn.GroupNorm(cfg.norm_groups, channels)

    def forward(self, x, emb):
        h = self.norm(x).flatten(2).transpose(1, 2)  # (B, H*W, C)
        qkv = pointwise(self.qkv, h).unflatten(-1, (self.heads, 3, -1))  # (B, H*W, heads, 3, d)
        q, k, v = qkv.transpose(2, 3).flatten(3).unbind(2)  # (B, H*W, C) each
        h = pointwise(self.proj_out, attend(q, k, v, self.heads))  # (B, H*W, C)
        return x + h.transpose(1, 2).reshape(x.shape)


class SRUNet(nn.Module):
    """A noisy frame and the small one -> the noise, and where its variance lies between bounds."""

    edges = ("input_blocks.0.", "out.")

    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        width = cfg.width
        lowest = len(cfg.mult) - 1

        def blocks(i, o, factor):
            entry = nn.ModuleList([SRBlock(i, o, cfg)])
            if factor in cfg.video_attention:
                entry.append(SRAttention(o, cfg))
            return entry

        self.time_embed = nn.Sequential(
            nn.Linear(width, 4 * width), nn.SiLU(), nn.Linear(4 * width, 4 * width)
        )

        c = width * cfg.mult[0]
        self.input_blocks = nn.ModuleList([nn.ModuleList([nn.Conv2d(6, c, 3, padding=1)])])
        skips = [c]
        for level, m in enumerate(cfg.mult):
            for _ in range(cfg.res_blocks):
                self.input_blocks.append(blocks(c, width * m, 2**level))
                c = width * m
                skips.append(c)
            if level < lowest:
                self.input_blocks.append(nn.ModuleList([SRBlock(c, c, cfg, nn.AvgPool2d(2))]))
                skips.append(c)

        middle = [SRBlock(c, c, cfg), SRAttention(c, cfg), SRBlock(c, c, cfg)]
        self.middle_block = nn.ModuleList(middle)

        self.output_blocks = nn.ModuleList()
        for level, m in reversed(list(enumerate(cfg.mult))):
            for i in range(cfg.res_blocks + 1):
                entry = blocks(c + skips.pop(), width * m, 2**level)
                c = width * m
                if level and i == cfg.res_blocks:
                    entry.append(SRBlock(c, c, cfg, nn.Upsample(scale_factor=2.0)))
                self.output_blocks.append(entry)
        last = zeroed(nn.Conv2d(c, 6, 3, padding=1))
        self.out = nn.Sequential(nn.GroupNorm(cfg.norm_groups, c), nn.SiLU(), last)

    def forward(self, x, low, t):
        """Noisy frames x (B, 3, H, W), low (B, 3, h, w), steps t (B,) -> (B, 6, H, W) float32."""
        low = F.interpolate(low, x.shape[-2:], mode="bilinear")
        emb = self.time_embed(time_embedding(t, self.cfg.width))  # (B, 4*width)
        h = self.input_blocks[0][0](torch.cat([x, low], dim=1))  # (B, C, H, W)
        skips = [h]
        for entry in self.input_blocks[1:]:
            h = self.run(entry, h, emb)
            skips.append(h)
        h = self.run(self.middle_block, h, emb)
        for entry in self.output_blocks:
            h = self.run(entry, torch.cat([h, skips.pop()], dim=1), emb)
        return self.out(h).float()

    def run(self, entry, h, emb):
        for block in entry:
            if self.cfg.checkpoint and torch.is_grad_enabled():
                h = checkpoint(block, h, emb, use_reentrant=False)
            else:
                h = block(h, emb)
        return h


# ---- Process: schedule, loss, samplers. A state x is a dict of the streams at hand,
# {"v": (B, F, 3, H, W), "a": (B, 1, L)}.

NAMES = {"v": "video", "a": "audio"}


def mix(*terms):
    """mix((c1, x1), (c2, x2), ...) = c1 x1 + c2 x2 + ..., stream by stream."""
    return {k: sum(c * x[k] for c, x in terms) for k in terms[0][1]}


def broadcast(x, like):
    """(B,) -> (B, 1, ..., 1), with as many dimensions as `like`."""
    return x.view(-1, *[1] * (like.dim() - 1))


def unwrapped(model):
    """The network inside the wrappers of DistributedDataParallel and torch.compile."""
    model = getattr(model, "module", model)
    return getattr(model, "_orig_mod", model)


def clip_noise(keys, x):
    """What is drawn for every clip of a state x -> u (B,) in [0, 1), normal noise like x.

    It follows from the clip's own key: the same however the clips are dealt to processes. The keys
    are on the host, so nothing waits for them.
    """
    device = next(iter(x.values())).device
    generator = torch.Generator(device)
    u = []
    eps = {k: [] for k in x}
    for key in keys.tolist():
        generator.manual_seed(key)
        u.append(torch.rand((), generator=generator, device=device))
        for k, y in x.items():
            eps[k].append(torch.randn(y.shape[1:], generator=generator, device=device))
    return torch.stack(u), {k: torch.stack(e) for k, e in eps.items()}


class Diffusion:
    """Eq. 1-7: video and audio are noised apart by one schedule, and denoised together."""

    def __init__(self, cfg, device="cpu"):
        self.cfg = cfg
        self.T = cfg.diffusion_steps
        self.betas = torch.linspace(1e-4, 0.02, self.T, dtype=torch.float64) * (1000 / self.T)
        self.abar = torch.cumprod(1 - self.betas, 0)  # (T,) product of 1 - beta, below eq. 10
        # x_t = alpha x_0 + sigma eps: alpha is sqrt(abar), while the paper's alpha_t is 1 - beta.
        # Kept where the network is, so that no step waits for them.
        self.alpha = self.abar.sqrt().float().to(device)
        self.sigma = (1 - self.abar).sqrt().float().to(device)

    def encode(self, batch):
        """A batch's video and audio -> x_0, what is diffused."""
        return {k: batch[NAMES[k]] for k in NAMES if k in self.cfg.streams}

    def decode(self, x0):
        """The reverse of encode()."""
        return x0

    def draw_steps(self, u):
        """u (B,) in [0, 1) -> the steps to train at, uniform in 0 ... T-1."""
        return (u * self.T).long()

    def noise_estimate(self, model, x, t, shifts=None):
        """eps_theta(x, t), stream by stream; t (B,)."""
        out = dict(zip("va", model(x.get("v"), x.get("a"), t, shifts), strict=True))
        return {k: out[k] for k in x}

    def weight(self, k, x0, t):
        """lambda(t) of eq. 7, for stream k."""
        return 1.0

    def loss(self, model, batch, level=None):
        """Eq. 7, summed over the streams -> loss, {"video": , "audio": }, each its mean error.

        batch: video (B, F, 3, H, W) and audio (B, 1, L) in [-1, 1]; key (B,) and step, which seed
        noise and shifts. level (B,) in [0, 1): t / T to use instead of drawn steps.
        """
        x0 = self.encode(batch)
        u, eps = clip_noise(batch["key"], x0)
        t = self.draw_steps(u) if level is None else (level * self.T).long()  # (B,)
        generator = torch.Generator(t.device)
        generator.manual_seed(data.clip_key(self.cfg.seed, f"shift {batch['step']}"))
        shifts = unwrapped(model).draw_shifts(generator)  # the same in all processes

        xt = {}
        for k in x0:
            alpha = broadcast(self.alpha[t], x0[k])
            sigma = broadcast(self.sigma[t], x0[k])
            xt[k] = alpha * x0[k] + sigma * eps[k]  # eq. 5, t times
        estimate = self.noise_estimate(model, xt, t, shifts)

        loss = 0
        parts = {}
        for k in x0:
            error = (eps[k] - estimate[k]).square()
            loss = loss + (self.weight(k, x0[k], t) * error).mean()  # eq. 7
            parts[NAMES[k]] = error.detach().mean()
        return loss, parts

    def times(self, steps):
        """The steps t at which sampling calls the network, from clip to noise."""
        return [i * self.T // steps for i in range(steps)]

    def path(self, steps):
        """The way from noise to clip, as samplers go it -> [(t, abar_t, abar of the next t)]."""
        times = self.times(steps)
        levels = [1.0] + [float(self.abar[t]) for t in times]  # the last step ends at the clip
        return [(times[i], levels[i + 1], levels[i]) for i in reversed(range(steps))]


class EDM(Diffusion):
    """What makes minutes of training suffice. Ours, after Karras et al. 2022; not in the paper.

    The network's output stands for the clip rather than the noise, and the noise levels of training
    are log-normal. --motion_weight makes moving pixels count more, and with --mu_law the sound is
    diffused as its mu-law code.
    """

    def __init__(self, cfg, device="cpu"):
        super().__init__(cfg, device)
        self.mean = dict(zip("va", cfg.data_mean, strict=True))
        self.std = dict(zip("va", cfg.data_std, strict=True))
        self.skip = dict(zip("va", cfg.skip_std, strict=True))
        self.ratio = self.sigma / self.alpha  # (T,) rising: the noise beside a clip of size 1

    def encode(self, batch):
        x0 = super().encode(batch)
        if self.cfg.mu_law and "a" in x0:
            x0["a"] = mu_law(x0["a"], self.cfg.mu_law)
        return x0

    def decode(self, x0):
        x0 = dict(x0)
        if self.cfg.mu_law and "a" in x0:
            x0["a"] = inverse_mu_law(x0["a"], self.cfg.mu_law)
        return x0

    def draw_steps(self, u):
        mean, deviation = self.cfg.noise_levels
        normal = 2**0.5 * torch.erfinv(2 * u - 1)
        ratio = torch.exp(mean + deviation * normal)
        return torch.searchsorted(self.ratio, ratio).clamp(max=self.T - 1)

    def noise_estimate(self, model, x, t, shifts=None):
        """The noise that follows from x_0 = mean + c_skip (x / alpha - mean) + c_out output.

        With mean 0 and skip_std 1 that is v-prediction. Where the noise is above skip_std, x hardly
        enters the estimate, and its noise cannot leak into flat areas; a small network could not
        cancel it there.
        """
        out = super().noise_estimate(model, x, t, shifts)  # what the network says, in fact
        for k in x:
            alpha = broadcast(self.alpha[t], x[k])
            sigma = broadcast(self.sigma[t], x[k])
            c_skip, c_out = edm_scales(self.skip[k], sigma / alpha)
            x0 = self.mean[k] + c_skip * (x[k] / alpha - self.mean[k]) + c_out * out[k]
            out[k] = (x[k] - alpha * x0) / sigma
        return out

    def weight(self, k, x0, t):
        """Of the error in x_0, by what is open when mean and deviation of the data are known.

        That is 1 / ratio^2 + 1 / std^2 for an error in x_0, which is `ratio` times one in eps.
        Moving pixels count more.
        """
        weight = broadcast(1 + (self.ratio[t] / self.std[k]) ** 2, x0)
        if k == "v" and self.cfg.motion_weight:
            # Most where noise is high: there it is decided what moves where, and its color.
            weight = weight * motion_weight(x0, self.cfg.motion_weight * self.sigma[t] ** 2)
        return weight

    def times(self, steps):
        """Those of the paper, but a stride noisier: from T / steps - 1, not 0, to T - 1."""
        return [(i + 1) * self.T // steps - 1 for i in range(steps)]


def edm_scales(std, ratio):
    """c_skip and c_out for data of this deviation, ratio = sigma / alpha (Karras, table 1)."""
    total = std**2 + ratio**2
    return std**2 / total, std * ratio / total.sqrt()


def mu_law(a, mu):
    """Sound in [-1, 1] -> its mu-law code in [-1, 1]: quiet sound takes more of the range."""
    return a.sign() * torch.log1p(mu * a.abs()) / math.log1p(mu)


def inverse_mu_law(code, mu):
    return code.sign() * torch.expm1(code.abs() * math.log1p(mu)) / mu


def motion_weight(video, k):
    """1 + k m for every pixel, less for all of a clip so that its mean is 1 -> (B, F, 1, H, W).

    m in [0, 1] tells what moves: how far a pixel of video (B, F, 3, H, W) is from its median over
    time, beyond what the frame as a whole is (a flash is no motion). k: a number for each clip.
    """
    change = video - video.median(dim=1, keepdim=True)[0]
    frame = change.flatten(3).median(dim=3)[0]  # (B, F, 3)
    m = 2 * (change - frame[..., None, None]).abs().mean(2)  # (B, F, H, W)
    m = F.avg_pool2d(m.clamp(max=1), 3, stride=1, padding=1)
    weight = 1 + broadcast(k, video) * m[:, :, None]  # (B, F, 1, H, W)
    return weight / weight.mean(dim=(1, 2, 3, 4), keepdim=True)


def clean(x, eps, abar):
    """x_0 as the noise estimate implies it (eq. 5 solved for it), clamped to [-1, 1]."""
    x0 = mix((abar**-0.5, x), (-((1 / abar - 1) ** 0.5), eps))
    return {k: y.clamp(-1, 1) for k, y in x0.items()}


def diffuse(x0, abar, noise):
    """A sample of q(x_t | x_0), eq. 5 t times; noise: a state of normal noise."""
    return mix((abar**0.5, x0), ((1 - abar) ** 0.5, noise))


def ddpm_step(x, x0, abar, abar_next, normal):
    """One step of ancestral sampling with variance beta_t (eq. 3-6)."""
    beta = 1 - abar / abar_next
    x0_share = beta * abar_next**0.5 / (1 - abar)
    xt_share = (1 - abar_next) * (1 - beta) ** 0.5 / (1 - abar)
    mean = mix((x0_share, x0), (xt_share, x))
    if abar_next == 1:  # the last step is without noise
        return mean
    return mix((1, mean), (beta**0.5, normal(x)))


def ddim_step(x, x0, abar, abar_next, normal):
    """One step of DDIM with eta = 0, along the noise that the clamped x_0 implies."""
    eps = mix(((1 - abar) ** -0.5, x), (-((abar / (1 - abar)) ** 0.5), x0))
    return diffuse(x0, abar_next, eps)


# In the samplers below: step, one of the two above; eps_theta(x, t), the noise estimate; x, normal
# noise to begin with; path, of Diffusion.path; normal(x) draws normal noise like a state x.
# Zero-shot conditions (section 3.4): `given` is a state of clips, `known` one of masks that say
# which of its values are to be kept: all of a stream, or how the clip begins. In the result these
# are the network's estimate again: whoever calls puts the given ones back.


def denoise(step, eps_theta, x, path, normal):
    """From noise to a clip, without a condition."""
    for t, abar, abar_next in path:
        x = step(x, clean(x, eps_theta(x, t), abar), abar, abar_next, normal)
    return x


def put(known, given, x):
    """x with the known values of `given` in their places."""
    return {k: torch.where(known[k], given[k], x[k]) for k in x}


def replace(step, eps_theta, x, path, normal, given, known):
    """Zero-shot by replacement: before each step the given part is a new sample of q(x_t | x_0)."""
    for t, abar, abar_next in path:
        x = put(known, diffuse(given, abar, normal(x)), x)
        x = step(x, clean(x, eps_theta(x, t), abar), abar, abar_next, normal)
    return x


def step_with_gradient(step, eps_theta, x, t, abar, abar_next, normal, goal, weight):
    """A step from x to y, and the gradient by x of y's weighted squared distance from `goal`."""
    with torch.enable_grad():
        x = {k: value.detach().requires_grad_() for k, value in x.items()}
        y = step(x, clean(x, eps_theta(x, t), abar), abar, abar_next, normal)  # eq. 11
        distance = sum((weight[k] * (y[k] - goal[k]).square()).sum() for k in x)
        gradient = torch.autograd.grad(distance, list(x.values()), materialize_grads=True)
    y = {k: value.detach() for k, value in y.items()}
    return y, dict(zip(x, gradient, strict=True))


def guide(step, eps_theta, x, path, normal, given, known, guidance):
    """Zero-shot by gradients (eq. 11-12), for audio a from a given video v; or the reverse."""
    goal = diffuse(given, path[0][1], normal(x))
    for t, abar, abar_next in path:
        x = put(known, goal, x)  # v_(t+1), a_(t+1)
        goal = diffuse(given, abar_next, normal(x))  # v_t
        # Would the step have led to v_t as well? The answer depends on a_(t+1), which can be moved.
        y, gradient = step_with_gradient(
            step, eps_theta, x, t, abar, abar_next, normal, goal, weight=known
        )
        x = mix((1, y), (-guidance * (1 - abar_next) ** 0.5, gradient))  # eq. 12; 0 at the end
    return x


def guide_as_released(step, eps_theta, x, path, normal, given, known, guidance):
    """Eq. 12 as the released code has it: one noise for all steps, a mean error, another scale."""
    noise = x
    weight = {k: mask / mask[0].sum().clamp(min=1) for k, mask in known.items()}  # means of a clip
    for t, abar, abar_next in path:
        x = put(known, diffuse(given, abar, noise), x)
        goal = diffuse(given, abar_next, noise)
        y, gradient = step_with_gradient(
            step, eps_theta, x, t, abar, abar_next, normal, goal, weight
        )
        scale = abar**0.5 if abar_next < 1 else 0.0  # the last step is not guided
        x = mix((1, y), (-guidance * scale, gradient))
    return x


class DPMSolver:
    """DPM-Solver and DPM-Solver++ (Lu et al. 2022): the probability-flow ODE of eq. 1.

    Solved in lambda = log(alpha / sigma), in which its linear part is exact. Every coefficient is
    a Python float. predict_x0: integrate the x_0 estimate (++), else the noise estimate.
    """

    def __init__(self, eps_theta, abar, predict_x0=True):
        self.eps_theta = eps_theta
        self.predict_x0 = predict_x0
        self.T = len(abar)
        # log alpha is piecewise linear between the times 1/T, 2/T ... 1.
        self.times = (np.arange(self.T) + 1) / self.T
        self.log_alpha = 0.5 * abar.float().log().double().numpy()
        self.first = self.from_time(1.0)
        self.last = self.from_time(1 / self.T)

    def from_time(self, time):
        """time -> lambda"""
        log_alpha = np.interp(time, self.times, self.log_alpha)
        return float(log_alpha - 0.5 * np.log(-np.expm1(2 * log_alpha)))

    def to_time(self, lam):
        """lambda -> time"""
        return float(np.interp(0.5 * np.logaddexp(0, -2 * lam), -self.log_alpha, self.times))

    @staticmethod
    def alpha(lam):
        return (1 + math.exp(-2 * lam)) ** -0.5

    @staticmethod
    def sigma(lam):
        return (1 + math.exp(2 * lam)) ** -0.5

    def estimate(self, x, lam):
        """What the network says at lambda: the noise, or x_0."""
        # The released solver truncates the step that the network is told; so do we.
        step = int((self.to_time(lam) - 1 / self.T) * self.T)
        eps = self.eps_theta(x, max(step, 0))
        if not self.predict_x0:
            return eps
        return self.limit(mix((1 / self.alpha(lam), x), (-self.sigma(lam) / self.alpha(lam), eps)))

    def limit(self, x0):
        return {k: y.clamp(-1, 1) for k, y in x0.items()}

    def coefficients(self, s, t):
        """A and B of the step from lambda s to t: x_t = A x_s - B estimate + higher orders."""
        if self.predict_x0:
            return self.sigma(t) / self.sigma(s), self.alpha(t) * math.expm1(s - t)
        return self.alpha(t) / self.alpha(s), self.sigma(t) * math.expm1(t - s)

    def order1(self, x, m, s, t):
        A, B = self.coefficients(s, t)
        return mix((A, x), (-B, m))

    def order2(self, x, m, s, t, r=0.5, m1=None):
        """m1: a second estimate, at the fraction r of the step; r < 0 for an earlier one."""
        if m1 is None:
            middle = s + r * (t - s)
            m1 = self.estimate(self.order1(x, m, s, middle), middle)
        A, B = self.coefficients(s, t)
        slope = mix((1 / (2 * r), m1), (-1 / (2 * r), m))
        return mix((A, x), (-B, m), (-B, slope))

    def order3(self, x, m, s, t, r1, r2):
        """Of the noise estimate, with estimates at the fractions r1 and r2 of the step."""
        h = t - s
        s1 = s + r1 * h
        s2 = s + r2 * h
        m1 = self.estimate(self.order1(x, m, s, s1), s1)
        A, B = self.coefficients(s, s2)
        c = r2 / r1 * self.sigma(s2) * (math.expm1(r2 * h) / (r2 * h) - 1)
        m2 = self.estimate(mix((A, x), (c - B, m), (-c, m1)), s2)
        A, B = self.coefficients(s, t)
        c = self.sigma(t) * (math.expm1(h) / h - 1) / r2
        return mix((A, x), (c - B, m), (-c, m2))

    def multistep(self, x, nodes):
        """2M: order 2 from the two latest estimates, one call a step, along lambdas `nodes`."""
        previous = self.estimate(x, nodes[0])
        x = self.order1(x, previous, nodes[0], nodes[1])
        for earlier, s, t in zip(nodes, nodes[1:], nodes[2:]):  # noqa: B905
            m = self.estimate(x, s)
            x = self.order2(x, m, s, t, (earlier - s) / (t - s), previous)
            previous = m
        return x

    def singlestep3(self, x, nodes):
        """Order 3, three calls a step; a last step of order 1 or 2 uses up what remains."""
        last = len(nodes) - 1
        for i in range(0, last, 3):
            s = nodes[i]
            t = nodes[min(i + 3, last)]
            m = self.estimate(x, s)
            inner = [(node - s) / (t - s) for node in nodes[i + 1 : min(i + 3, last)]]
            solve = (self.order1, self.order2, self.order3)[len(inner)]
            x = solve(x, m, s, t, *inner)
        return x

    def nodes(self, steps):
        """steps + 1 lambdas, evenly spaced, from noise to clip."""
        return np.linspace(self.first, self.last, steps + 1).tolist()


# ---- Super-resolution: data, loss, sampling


class Frames(torch.utils.data.Dataset):
    """Clips at sr_size with "low", what is to be enlarged: float32 (F, 3, size, size).

    low is the average over squares of pixels. With probability `augment` each (Table A.1), it gets
    Gaussian noise, it gets the traces of JPEG, and the clip is mirrored.
    """

    def __init__(self, clips, cfg, augment):
        self.clips = clips
        self.seed = cfg.seed
        self.size = cfg.size
        self.augment = augment

    def __len__(self):
        return len(self.clips)

    def __getitem__(self, i):
        clip = self.clips[i]
        video = clip["video"]  # (F, H, W, 3) uint8
        draw = np.random.default_rng(data.clip_key(self.seed, f"augment {i}"))
        noisy, jpeg, mirrored = draw.random(3) < self.augment
        if mirrored:
            video = np.ascontiguousarray(video[:, :, ::-1])
        zoom = video.shape[1] // self.size
        squares = video.reshape(len(video), self.size, zoom, self.size, zoom, 3)
        low = squares.mean((2, 4))  # (F, h, w, 3), 0 ... 255
        if noisy:
            low = low + draw.uniform(0, 20) * draw.standard_normal(low.shape)
        if jpeg:
            low = data.through_jpeg(low, int(draw.uniform(20, 80)))
        low = low.transpose(0, 3, 1, 2) / 127.5 - 1  # (F, 3, h, w)
        return {**clip, "video": video, "low": low.astype(np.float32)}


class SRDiffusion(Diffusion):
    """The diffusion of single frames, whose reverse variance is learned, too (section 3.5).

    By Nichol and Dhariwal 2021, as in ADM.
    """

    def __init__(self, cfg, device="cpu"):
        super().__init__(cfg, device)
        # Logarithms of the two bounds of the variance, and the factor from an error in the noise
        # to one in the mean of x_(t-1).
        before = torch.cat([torch.ones(1, dtype=torch.float64), self.abar[:-1]])
        least = self.betas * (1 - before) / (1 - self.abar)  # the variance of q
        least[0] = least[1]  # else 0
        drift = self.betas / ((1 - self.betas) * (1 - self.abar)).sqrt()
        self.bounds = torch.stack([least.log(), self.betas.log(), drift]).float().to(device)

    def origin(self, low):
        """What is diffused is the frame less this."""
        return 0.0

    def predict(self, model, x, low, t):
        """The noise estimate for x (B, 3, H, W), and where in [-1, 1] the variance lies."""
        return model(x, low, t).chunk(2, dim=1)

    def loss(self, model, batch, level=None):
        """Error in the noise plus the variational term -> loss, {"mse": , "vb": }.

        The latter, in bits, trains the variance alone. batch: video and low (B, F, 3, H, W), of
        which the first frame counts; key (B,). level (B,) in [0, 1): t / T, else drawn.
        """
        low = batch["low"][:, 0]  # (B, 3, h, w)
        x0 = batch["video"][:, 0] - self.origin(low)  # (B, 3, H, W)
        u, eps = clip_noise(batch["key"], {"v": x0})
        eps = eps["v"]
        t = self.draw_steps(u) if level is None else (level * self.T).long()
        xt = broadcast(self.alpha[t], x0) * x0 + broadcast(self.sigma[t], x0) * eps
        estimate, v = self.predict(model, xt, low, t)
        error = (estimate - eps).square()
        vb = self.variational(x0, eps, estimate.detach(), v, t).mean()
        loss = (self.weight("v", x0, t) * error).mean() + vb
        return loss, {"mse": error.detach().mean(), "vb": vb.detach()}

    def variational(self, x0, eps, estimate, v, t):
        """KL(q(x_(t-1) | x_t, x_0) || p(x_(t-1) | x_t)) of every pixel; at t = 0 its code length.

        In bits. p has the mean that the noise estimate gives, and a variance between the two
        bounds, which are reached at v = -1 and v = 1.
        """
        low, high, drift = self.bounds[:, t].view(3, -1, 1, 1, 1)
        # Both are Gaussian; here, less the mean of q, which at t = 0 is x_0.
        deviation = ((low + (v + 1) / 2 * (high - low)) / 2).exp()
        q = Normal(torch.zeros_like(low), (low / 2).exp(), validate_args=False)
        p = Normal(drift * (eps - estimate), deviation, validate_args=False)
        half = torch.full_like(low, 1 / 255)  # of one of 256 gray levels
        above = torch.where(x0 > 0.999, 1.0, p.cdf(half))  # the outermost of a frame are open
        below = torch.where(x0 < -0.999, 0.0, p.cdf(-half))
        code = -(above - below).clamp(min=1e-12).log()
        first = t.view(-1, 1, 1, 1) == 0
        return torch.where(first, code, kl_divergence(q, p)) / math.log(2)

    def upsample(self, model, low, noise, steps):
        """Frames low (F, 3, h, w) in [-1, 1] -> (F, 3, H, W), by DDIM.

        All start from one noise image (3, H, W), which keeps them from flickering.
        """

        def eps_theta(x, t):
            t = torch.full((len(low),), t, device=low.device)
            return {"v": self.predict(model, x["v"], low, t)[0]}

        x = {"v": noise.expand(len(low), -1, -1, -1)}
        return self.origin(low) + denoise(ddim_step, eps_theta, x, self.path(steps), None)["v"]


class SRResidual(SRDiffusion):
    """Ours, for minutes of training: diffuse what bicubic enlargement lacks, as EDM does it.

    sr_residual is the deviation of that.
    """

    def origin(self, low):
        size = (self.cfg.sr_size, self.cfg.sr_size)
        return F.interpolate(low, size, mode="bicubic")

    def predict(self, model, x, low, t):
        out, v = super().predict(model, x, low, t)
        alpha = broadcast(self.alpha[t], x)
        sigma = broadcast(self.sigma[t], x)
        c_skip, c_out = edm_scales(self.cfg.sr_residual, sigma / alpha)
        x0 = c_skip * x / alpha + c_out * out
        return (x - alpha * x0) / sigma, v

    def weight(self, k, x0, t):
        ratio = self.sigma[t] / self.alpha[t]
        return broadcast(1 + (ratio / self.cfg.sr_residual) ** 2, x0)


@torch.no_grad()
def compare(model, clips, n):
    """Enlarge the first frame of each of n clips of a Frames -> a picture and two figures.

    The picture is a clip (1, n, H, 3*W, 3) uint8 with bicubic enlargement, ours and the truth side
    by side; the figures are the mean PSNR of ours and of bicubic enlargement, dB.
    """
    cfg = model.cfg
    device = next(model.parameters()).device
    process = build_process(cfg, device)
    batch = data.to_device(data.val_batches(clips, n, n)[0], device)
    low = batch["low"][:, 0]  # (n, 3, h, w)
    true = batch["video"][:, 0]  # (n, 3, H, W)
    generator = torch.Generator().manual_seed(cfg.seed)
    noise = torch.randn(true.shape[1:], generator=generator).to(device)
    ours = [process.upsample(model, x, noise, cfg.sr_sample_steps) for x in low.split(8)]
    ours = torch.cat(ours).clamp(-1, 1)
    cubic = F.interpolate(low, true.shape[-2:], mode="bicubic").clamp(-1, 1)

    def psnr(x):
        error = ((x - true) / 2).square().flatten(1).mean(1)  # (n,)
        return float(-10 * error.log10().mean())

    picture = torch.cat([cubic, ours, true], dim=-1)[None]  # (1, n, 3, H, 3*W)
    return data.to_uint8(picture).cpu(), psnr(ours), psnr(cubic)


def sr_config(cfg):
    """The config of stage sr: its own values under the names that network and training read."""
    cfg = dataclasses.replace(
        cfg,
        stage="sr",
        out=f"{cfg.out}/sr",
        streams="v",
        frames=1,
        width=cfg.sr_width,
        mult=cfg.sr_mult,
        video_attention=cfg.sr_attention,
        cross_attention=(),
        windows=(),
        steps=cfg.sr_steps,
        batch_size=cfg.sr_batch_size,
        grad_accum=cfg.sr_grad_accum,
        lr=cfg.sr_lr,
    )
    check(cfg)
    return cfg


def build(cfg):
    """The network of cfg.stage."""
    return SRUNet(cfg) if cfg.stage == "sr" else CoupledUNet(cfg)


def build_process(cfg, device="cpu"):
    """The diffusion that cfg asks for."""
    if cfg.stage == "sr":
        return SRResidual(cfg, device) if cfg.sr_residual else SRDiffusion(cfg, device)
    return EDM(cfg, device) if cfg.prediction == "edm" else Diffusion(cfg, device)


def open_clips(cfg, split):
    """The clips that cfg.stage trains on (split train) or is measured on (val)."""
    size = cfg.sr_size if cfg.stage == "sr" else cfg.size
    clips = data.open_dataset(cfg.data, split, cfg.frames, size, cfg.fps, cfg.rate, cfg.seed)
    if cfg.stage == "sr":
        clips = Frames(clips, cfg, cfg.augment if split == "train" else 0.0)
    return clips


# ---- Training

# Of --amp. bf16 has the range of float32; fp16 has not, and needs the GradScaler in fit().
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "off": torch.float32}


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


def learning_rate(cfg, step):
    """Linear warm-up, times a linear fall from lr to lr * lr_end."""
    warmup = min(1, (step + 1) / max(cfg.warmup, 1))
    return cfg.lr * warmup * (1 + (cfg.lr_end - 1) * step / cfg.steps)


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


# ---- Sampling and the command line


def read_condition(process, n, video, audio):
    """What sample() was given -> (given, known) as replace() takes them, for n clips; or None.

    Raises data.UserError for what is not a window, or n of them.
    """
    cfg = process.cfg
    if video is None and audio is None:
        return None
    if cfg.streams != "av" or cfg.seconds or (video is not None and audio is not None):
        raise data.UserError(
            "Give a video or a sound, not both, to a model of both streams, without --seconds."
        )
    shape_v = (n, cfg.frames, 3, cfg.size, cfg.size)
    shape_a = (n, 1, cfg.length)
    v = torch.zeros(shape_v)
    a = torch.zeros(shape_a)
    try:
        if video is not None:
            v = torch.as_tensor(video).movedim(-1, -3).float() / 127.5 - 1  # ([n,] F, 3, H, W)
            v = v.expand(shape_v)
        if audio is not None:
            a = torch.as_tensor(audio).float().unsqueeze(-2).expand(shape_a)
    except (RuntimeError, IndexError):  # of expand() and movedim()
        raise data.UserError(
            f"Give one window, or {n} of them: {cfg.frames} frames of {cfg.size} "
            f"pixels, or {cfg.length} samples."
        ) from None
    given = process.encode({"video": v, "audio": a})
    known = {
        "v": torch.full_like(v, video is not None, dtype=torch.bool),
        "a": torch.full_like(a, audio is not None, dtype=torch.bool),
    }
    return given, known


def make_window(process, eps_theta, draw, condition):
    """A batch of windows {stream: values}; condition: (given, known), or None."""
    cfg = process.cfg
    shapes = {"v": (cfg.frames, 3, cfg.size, cfg.size), "a": (1, cfg.length)}
    x = {k: draw(shapes[k]) for k in shapes if k in cfg.streams}

    def normal(x):
        return {k: draw(y.shape[1:]) for k, y in x.items()}

    if cfg.sampler == "ddpm":
        walk = (ddpm_step, eps_theta, x, process.path(process.T), normal)
    else:
        walk = (ddim_step, eps_theta, x, process.path(cfg.sample_steps), normal)
    if condition and cfg.method == "replace":
        return replace(*walk, *condition)
    if condition and cfg.method == "gradient":
        return guide(*walk, *condition, cfg.guidance)
    if condition:
        return guide_as_released(*walk, *condition, cfg.guidance)

    if cfg.sampler == "dpm":
        solver = DPMSolver(eps_theta, process.abar)
        return solver.multistep(x, solver.nodes(cfg.sample_steps))
    if cfg.sampler == "dpm3":
        solver = DPMSolver(eps_theta, process.abar, predict_x0=False)
        return solver.singlestep3(x, solver.nodes(cfg.sample_steps))
    return denoise(*walk)


def prolong(process, eps_theta, draw, clip):
    """A clip of windows, made longer, up to --seconds.

    Each new window is given the last half of what there is as its beginning, in both streams, and
    what it adds is appended. At such a seam the clip goes on as well as cfg.method makes it,
    knowing of half a window and of nothing older.
    """
    cfg = process.cfg
    axis = {"v": 1, "a": 2}  # time
    keep = {"v": cfg.frames // 2, "a": cfg.frames // 2 * cfg.rate // cfg.fps}
    window = {"v": cfg.frames, "a": cfg.length}
    total = round(cfg.seconds * cfg.fps)  # frames
    for _ in range(cfg.frames, total, cfg.frames - keep["v"]):
        given = {}
        known = {}
        for k, y in clip.items():
            last = y.narrow(axis[k], y.shape[axis[k]] - window[k], window[k])
            given[k] = last.roll(-(window[k] - keep[k]), axis[k])  # its end comes first
            known[k] = torch.zeros_like(given[k], dtype=torch.bool)
            known[k].narrow(axis[k], 0, keep[k]).fill_(True)
        new = make_window(process, eps_theta, draw, (given, known))
        for k, y in new.items():
            more = y.narrow(axis[k], keep[k], window[k] - keep[k])
            clip[k] = torch.cat([clip[k], more], dim=axis[k])
    end = {"v": total, "a": total * cfg.rate // cfg.fps}
    return {k: y.narrow(axis[k], 0, end[k]) for k, y in clip.items()}


def load_sr(cfg, device):
    """The network of cfg.sr_ckpt, for frames of cfg.size, or None."""
    if not cfg.sr_ckpt:
        return None
    sr = load(cfg.sr_ckpt, device, ["--stage", "sr", "--preset", cfg.preset])
    if not isinstance(sr, SRUNet) or sr.cfg.size != cfg.size or "v" not in cfg.streams:
        raise data.UserError(f"{cfg.sr_ckpt} does not enlarge frames of {cfg.size} pixels.")
    return sr


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
    sampler=None,
    method=None,
    seconds=None,
    batch_size=8,
):
    """Generate n clips -> video (n, F, H, W, 3) uint8, audio (n, L) float32 in [-1, 1].

    None for a stream that the model lacks. Given one window of video ([n,] F, H, W, 3) uint8 or of
    audio ([n,] L), or n of them, generate the other and give it back as it is. Other options are
    those of Config, by default model.cfg's. Clip i depends on (seed, i), not on n or batch_size.
    Raises data.UserError for what the model cannot do.
    """
    if isinstance(model, SRUNet):
        raise data.UserError("This network enlarges frames: give it as --sr_ckpt, with a --ckpt.")
    if prompt or negative_prompt or label:
        raise data.UserError("MM-Diffusion knows no words or classes: it takes no prompt or label.")
    options = {"sample_steps": steps, "guidance": guidance, "sampler": sampler, "method": method}
    options["seconds"] = seconds
    cfg = dataclasses.replace(model.cfg, **{k: x for k, x in options.items() if x is not None})
    check(cfg)
    device = next(model.parameters()).device
    process = build_process(cfg, device)
    wanted = read_condition(process, n, video, audio)
    if guidance is not None and (not (wanted or cfg.seconds) or cfg.method == "replace"):
        raise data.UserError(
            "Guidance is for a given video or sound or --seconds, "
            "with --method gradient or released."
        )
    sr = load_sr(cfg, device) if video is None else None

    made = []
    for first in tqdm(range(0, n, batch_size), "sampling", disable=n <= batch_size, leave=False):
        clips = range(first, min(first + batch_size, n))
        part = None
        if wanted:
            part = [{k: y[first : clips.stop].to(device) for k, y in x.items()} for x in wanted]
        made.append(sample_batch(model, process, sr, clips, seed, part))
    v = data.to_uint8(torch.cat([x["v"] for x in made])) if "v" in cfg.streams else None
    a = torch.cat([x["a"] for x in made])[:, 0].clamp(-1, 1) if "a" in cfg.streams else None

    # What was given comes back as it was.
    if video is not None:
        v = torch.as_tensor(video).expand(v.shape)
    if audio is not None:
        a = torch.as_tensor(audio).float().expand(a.shape)
    return v, a


def sample_batch(model, process, sr, clips, seed, condition):
    """The clips of these numbers, {stream: values} on the CPU; sr: a network to enlarge them."""
    cfg = process.cfg
    device = process.alpha.device
    # Noise is drawn on the CPU, for each clip from its own seed: all devices start from the same.
    generators = []
    for i in clips:
        generators.append(torch.Generator().manual_seed(data.clip_key(seed, f"sample {i}")))
    shifts = torch.Generator().manual_seed(seed)

    def draw(shape):
        return torch.stack([torch.randn(shape, generator=g) for g in generators]).to(device)

    def eps_theta(x, t):
        t = torch.full((len(clips),), t, device=device)
        return process.noise_estimate(model, x, t, model.draw_shifts(shifts))

    dtype = precision(cfg, device)
    if cfg.method != "replace":
        dtype = torch.float32  # gradients would be lost below fp16's least number
    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        x = make_window(process, eps_theta, draw, condition)
        if cfg.seconds:
            x = prolong(process, eps_theta, draw, x)
        x = process.decode(x)
        if sr:
            noise = draw((3, sr.cfg.sr_size, sr.cfg.sr_size))
            x["v"] = enlarge(sr, x["v"], noise, cfg.sr_sample_steps)
    return {k: y.cpu() for k, y in x.items()}


def enlarge(sr, video, noise, steps):
    """Every clip of video (B, F, 3, h, w), each from one noise image of noise (B, 3, H, W)."""
    process = build_process(sr.cfg, video.device)
    out = []
    for clip, image in zip(video, noise, strict=True):
        frames = [process.upsample(sr, x, image, steps) for x in clip.split(8)]
        out.append(torch.cat(frames))
    return torch.stack(out)


def load(path, device="cpu", options=()):
    """A model ready to sample: a checkpoint of ours (its averaged weights), or a released file.

    A released file holds weights alone: --preset among the options says of what kind they are.
    Options, as on the command line, override the config. Raises data.UserError where the file is
    not readable or does not fit.
    """
    state = data.load_checkpoint(path)
    if "cfg" in state:
        saved = data.read_config(Config, state, path)
        cfg = dataclasses.replace(parse(options, saved), stage=saved.stage)
        state = state["ema"]
    elif "--preset" in " ".join(options):
        cfg = parse(options)
        if cfg.stage == "sr":
            cfg = sr_config(cfg)
    else:
        raise data.UserError(
            f"{path} holds weights without their options: add --preset paper, or "
            "the preset whose they are."
        )
    model = build(cfg)
    data.load_weights(model, state, path)
    return model.to(device).eval().requires_grad_(False)


def train(cfg):
    """Train the network of cfg.stage and leave samples of it."""
    if cfg.stage == "sr":
        cfg = sr_config(cfg)
    device = setup(cfg)
    clips = open_clips(cfg, "train")
    val = open_clips(cfg, "val")
    load_sr(cfg, "cpu")  # wrong? Then now, not when the first samples are due
    torch.manual_seed(cfg.seed)
    model = build(cfg)
    if cfg.init_from:
        state = data.load_checkpoint(cfg.init_from)
        state = dict(state.get("ema", state))
        state.pop("label_emb.weight", None)  # ADM's own upsampler, the paper's start, has classes
        data.load_weights(model, state, cfg.init_from)
    model = model.to(device)
    if RANK == 0:
        size = sum(p.numel() for p in model.parameters())
        print(f"{size:,} parameters on {device}, data {cfg.data}, to {cfg.out}")

    def samples(ema):
        if cfg.stage == "sr":
            return compare(ema, val, cfg.samples)[0], None
        return sample(ema, cfg.samples, seed=cfg.seed)

    ema = fit(model, build_process(cfg, device).loss, cfg, clips, val, samples)
    if RANK == 0 and cfg.stage == "sr":
        _, ours, cubic = compare(ema, val, cfg.val_clips)
        n = min(cfg.val_clips, len(val))
        print(f"PSNR of {n} validation frames: {ours:.2f} dB, bicubic {cubic:.2f} dB")
    if RANK == 0:
        option = "--sr_ckpt" if cfg.stage == "sr" else "--ckpt"
        print(
            f"Samples are in {cfg.out}/samples; more: "
            f"python sample.py --model mm_diffusion {option} {cfg.out}/ckpt.pt"
        )


def main(argv=None):
    try:
        train(parse(argv))
    except data.UserError as error:
        data.end("mm_diffusion.py", error)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    main()
