"""UniForm: one transformer makes video and sound, or either for the other (arXiv 2502.03897).

Video and sound are encoded, and the sound's latents are laid beside the video's: a film each of
whose frames shows the sound of that moment in its left columns. A transformer, STDiT3 of Open-Sora,
denoises that film. One column more, the task token, tells it what is wanted: both (T2AV), a video
for a sound (A2V), or a sound for a video (V2A). What is given stays clean in its columns, and the
loss is taken where something is to be made. Paper: Zhao et al. 2025, whose code is not public.

    video (B, F, 3, H, W)            audio (B, 1, L) -> log-mel (B, 1, L / hop, M)   section 3.2.1
        | VAE                            | VAE
    z_v (B, C, T, h, w)              z_a (B, C_a, S, N) -> (B, C, T, h, k)           k = S / T
        |                                |
        | task | sound k | video w |     one film (B, C, T, h, 1 + k + w)            section 3.2.2
              noise in the columns that the task makes: both, video, or sound
              patches (1, 2, 2) -> tokens (B, T, h / 2 * (1 + k + w) / 2, D)
              depth x [ attention in each frame | attention along time ], both read the text
              un-patch -> noise and variance (B, 2 C, T, h, k + w)                   eq. 1-3
        | VAE decoder                    | VAE decoder, vocoder                      section 3.2.3
    video                            audio

B clips of F frames; L samples; M mel bands; T x h x w latents of C channels; S steps of sound.

    python uniform_dit.py                              # toy, both stages: 8 minutes, 2 cores
    torchrun --nproc_per_node=4 uniform_dit.py --data concerts    # after `python data.py prepare`
    python sample.py --model uniform_dit --prompt "a video of a red ball bouncing"
    python sample.py --model uniform_dit --video my.mp4           # V2A; --audio my.wav: A2V

The logged losses of video and audio are the mean squared errors of the noise, in latents of mean
square 1. In validation a network that says nothing starts at 1 each (--predict noise), or, as its
velocity 0 says part of the noise, at 0.28 each (toy, which ends at 0.055 and 0.051).

Where the paper is silent: the network is Open-Sora 1.2's XL/2, with its T5 if --t5 names one (else
words are learned here); steps and guidance are those of Open-Sora 1.0, which like the paper learns
noise and variance. "Reshaped" keeps time: each of the 20 frames of latents gets its 5 of the 100
steps of sound, which fit exactly. What is given is clean; by the letter of eq. 1 and 2 it is noised
with the same t (--cond_noise same_t). One task is drawn for a step, evenly, the same in all
processes. Latents are the means of posteriors. A dropped caption leaves no trace of its length: all
of its words are the null embedding. At t = 0 the variance is taught by a density, not by a
likelihood of pixels.

Not as in the paper: weights start at random, not from PixArt's (--init_from reads Open-Sora's).
Ours alone, for toy and small: codecs that are trained here (--codec small), as Open-Sora's would
leave 4 x 4 places of a toy frame; rotary positions in the spatial blocks (--rope); captions that
vary, for the text encoder learned here; in toy, the velocity (--predict), a variance that is not
learned, DDIM, and fewer dropped captions.
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
from collections import OrderedDict, deque
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
import metrics

RANK = int(os.environ.get("RANK", 0))  # which process this is, as torchrun says,
WORLD = int(os.environ.get("WORLD_SIZE", 1))  # and of how many

# ---- Config


@dataclass
class Config:
    """Every option. Defaults: the paper's, or where it is silent Open-Sora's and AudioLDM's."""

    preset: str = "paper"  # the row of PRESETS that the other values start from
    data: str = "toy"  # toy, toy:bounce,glide (some of its scenes), or a set of data.py prepare
    out: str = ""  # folder of the run; empty: out/uniform_dit/PRESET[-DATA]
    stage: str = "all"  # all; vae, the small codec; dit, a generator on the codec at hand
    # the clip (section 4.1)
    frames: int = 68  # frames in a clip: 4 s
    size: int = 256  # height and width, pixels
    fps: int = 17  # frames per second
    rate: int = 16000  # audio samples per second; a clip has frames * rate / fps of them
    # its mel spectrogram (AudioLDM's)
    n_mels: int = 64  # mel bands
    hop: int = 160  # samples between its columns
    window: int = 1024  # samples in the Hann window of the STFT
    n_fft: int = 1024  # length of its transform
    floor: float = 1e-5  # smallest magnitude before the logarithm
    griffin_lim: int = 60  # iterations to find the phases, where there is no vocoder
    # codecs (section 3.2.1)
    codec: str = "pretrained"  # pretrained: Open-Sora's and AudioLDM's; small: trained in stage vae
    video_vae: str = ""  # file with Open-Sora's VAE 1.2
    audio_vae: str = ""  # file with AudioLDM's checkpoint, or its VAE alone
    vocoder: str = ""  # file with its HiFi-GAN; empty: the one in that checkpoint
    video_patch: tuple = (4, 4, 4)  # small: frames, rows, columns in a latent
    video_channels: int = 8  # small: channels of a latent, C
    audio_patch: tuple = (4, 4)  # small: columns and bands of the spectrogram in a latent
    audio_channels: int = 8  # small: channels, C_a
    vae_width: int = 64  # small: channels of its convolutions
    vae_blocks: int = 2  # small: residual blocks of an encoder; a decoder has one more
    kl: float = 1e-3  # small: weight of the KL term
    need_good: bool = True  # no stage dit with a codec that trivial codes beat
    vae_steps: int = 10000  # optimizer steps of stage vae
    vae_batch_size: int = 16  # clips per step
    vae_lr: float = 2e-3  # learning rate
    vae_betas: tuple = (0.9, 0.99)  # of AdamW
    vae_optimizer: str = "adamw"  # adamw or muon, as --optimizer
    # the transformer, STDiT3-XL/2, and its text (section 3.2.2)
    width: int = 1152  # features of a token, D
    depth: int = 28  # pairs of a spatial and a temporal block
    heads: int = 16  # heads of their attention
    rope: bool = False  # rotary positions in the spatial blocks too
    t5: str = ""  # folder of a T5; empty: a small text encoder is learned here
    text_width: int = 4096  # features of a word (T5 XXL: 4096)
    text_tokens: int = 300  # words read of a caption, its opening included
    text_drop: float = 0.5  # share of captions dropped in training (section 3.2.4)
    # the process (section 3.1.1)
    diffusion_steps: int = 1000  # T
    predict: str = "noise"  # what the network's output stands for: noise, or velocity (ours)
    noise_levels: tuple = (0.7, 1.3)  # velocity: mean, deviation of log(sigma / alpha) in training
    learn_sigma: bool = True  # learn the variance, too (section 3.2.3), by the variational bound
    cond_noise: str = "clean"  # what is given: clean, or same_t, noised like the rest (eq. 1, 2)
    audio_weight: float = 1.0  # weight of the sound's loss beside the video's
    sampler: str = "ddpm"  # ddpm or ddim
    sample_steps: int = 100  # network calls per clip (twice that with guidance)
    guidance: float = 4.0  # strength w of classifier-free guidance; 1: none
    cache_latents: int = 0  # clips to encode once, before stage dit; 0: encode batch by batch
    # training of stage dit; the options from grad_accum on are of both stages
    steps: int = 9000000  # optimizer steps: 1000 epochs of 289,000 clips
    batch_size: int = 32  # clips per optimizer step over ALL processes
    lr: float = 1e-4  # learning rate
    betas: tuple = (0.9, 0.999)  # of AdamW
    grad_accum: int = 1  # parts that each process splits its share of the batch into
    checkpoint: bool = False  # recompute blocks in backward: less memory, more time
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
    init_from: str = ""  # start from these weights: a checkpoint's, or Open-Sora's STDiT3
    log_every: int = 10  # steps between rows of log.csv
    eval_every: int = 5000  # steps between validations, checkpoints and samples
    val_clips: int = 64  # validation clips
    samples: int = 4  # clips to sample then


CHOICES = {
    "stage": ("all", "vae", "dit"),
    "codec": ("pretrained", "small"),
    "predict": ("noise", "velocity"),
    "cond_noise": ("clean", "same_t"),
    "sampler": ("ddpm", "ddim"),
    "optimizer": ("adamw", "muon"),
    "vae_optimizer": ("adamw", "muon"),
    "amp": ("auto", "bf16", "fp16", "off"),
}

PRESETS = {
    # Minutes on a laptop.
    "toy": dict(
        data="toy:bounce,glide,pulse",
        frames=16,
        size=32,
        fps=10,
        rate=8000,
        hop=80,
        window=400,
        n_fft=512,
        floor=3e-3,
        codec="small",
        video_patch=(2, 4, 4),
        video_channels=4,
        audio_patch=(5, 8),
        audio_channels=4,
        vae_steps=700,
        vae_batch_size=4,
        vae_lr=5e-3,
        vae_optimizer="muon",
        width=128,
        depth=3,
        heads=4,
        rope=True,
        text_width=64,
        text_tokens=20,
        text_drop=0.2,
        predict="velocity",
        learn_sigma=False,
        sampler="ddim",
        sample_steps=20,
        guidance=1.5,
        cache_latents=4096,
        steps=4000,
        batch_size=4,
        lr=3e-3,
        lr_end=0.05,
        warmup=20,
        ema=0.995,
        eval_every=1000,
        val_clips=32,
    ),
    # One GPU, and a data set of one's own.
    "small": dict(
        frames=16,
        size=64,
        fps=10,
        codec="small",
        width=384,
        depth=6,
        heads=6,
        rope=True,
        text_width=256,
        text_tokens=24,
        cache_latents=20000,
        steps=20000,
        batch_size=64,
        lr=3e-4,
        warmup=200,
        ema=0.999,
        eval_every=1000,
    ),
    # One 80 GB GPU holds 8 clips, as blocks are computed again in backward: 24 GB of weights, 4 of
    # codecs, 19 of a T5 XXL, and 1.5 for each clip (by shapes, not run). More GPUs: fewer parts.
    "paper": dict(checkpoint=True, grad_accum=4),
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
    may_be_zero = ("warmup", "workers", "seed", "griffin_lim", "cache_latents")
    for field in dataclasses.fields(cfg):
        value = getattr(cfg, field.name)
        if field.type is int and value < (0 if field.name in may_be_zero else 1):
            raise data.UserError(f"--{field.name} {value} is too small.")
        choices = CHOICES.get(field.name, (value,))
        if value not in choices:
            raise data.UserError(f"--{field.name} must be one of {', '.join(choices)}.")
    if cfg.diffusion_steps <= 20:
        raise data.UserError("--diffusion_steps must be above 20: else the last beta is 1 or more.")
    if cfg.sample_steps > cfg.diffusion_steps:
        raise data.UserError("--sample_steps must not exceed --diffusion_steps.")
    if cfg.stage == "vae" and cfg.codec == "pretrained":
        raise data.UserError("--stage vae trains --codec small; a pretrained one needs none.")
    if cfg.init_from and cfg.stage == "all" and cfg.codec == "small":
        raise data.UserError("--init_from starts one stage: add --stage vae or --stage dit.")
    for name in ("betas", "vae_betas", "noise_levels", "audio_patch"):
        if len(getattr(cfg, name)) != 2:
            raise data.UserError(f"--{name} needs two numbers.")
    if len(cfg.video_patch) != 3:
        raise data.UserError("--video_patch needs three numbers.")

    # Codec: whole patches.
    samples = cfg.frames * cfg.rate // cfg.fps
    if samples % cfg.hop:
        raise data.UserError(f"--hop must divide the {samples} samples of a clip.")
    t, h, w = cfg.video_patch if cfg.codec == "small" else (1, 8, 8)
    s, n = cfg.audio_patch if cfg.codec == "small" else (4, 4)
    mel = (cfg.rate, cfg.n_mels, cfg.hop, cfg.window, cfg.n_fft, cfg.floor)
    if cfg.codec == "pretrained" and mel != (16000, 64, 160, 1024, 1024, 1e-5):
        raise data.UserError(
            "AudioLDM's codec has --rate 16000, --n_mels 64, --hop 160, --window 1024, "
            "--n_fft 1024 and --floor 1e-5."
        )
    if cfg.frames % t or cfg.size % h or cfg.size % w:
        raise data.UserError("--frames and --size must be multiples of --video_patch.")
    if samples // cfg.hop % s or cfg.n_mels % n:
        raise data.UserError(
            f"--audio_patch must divide {samples // cfg.hop} mel columns and {cfg.n_mels} bands."
        )
    # The layout: the sound of a frame fills whole columns.
    (C, T, rows, _), (C_a, S, N) = latent_shapes(cfg)
    if C_a * N != C * rows or S % T:
        raise data.UserError(
            f"A step of sound has {C_a} x {N} numbers, a column of video {C} x {rows}: they must "
            f"be as many, and the {S} steps a multiple of {T} frames (--audio_patch, --hop)."
        )
    # Rotary positions turn pairs of channels.
    if cfg.width % 4 or cfg.width % (2 * cfg.heads):
        raise data.UserError("--width must divide by 4 and 2 * --heads.")
    if cfg.t5 and t5_width(cfg.t5) != cfg.text_width:
        raise data.UserError(
            f"--t5 {cfg.t5} is not the folder of a T5 whose words have --text_width "
            f"{cfg.text_width} features."
        )


# ---- The sound as a picture: AudioLDM's mel spectrogram, and the way back without a vocoder


def unmel(m, bank):
    """Bands (B, M, columns) -> the bins (B, bins, columns), none negative, that explain them best.

    bank (M, bins): the weights of the bins in the bands.
    """
    size = (torch.linalg.pinv(bank) @ m).clamp(min=1e-6)
    # Least squares without negative bins, by the updates of Lee and Seung.
    for _ in range(100):
        size = size * (bank.T @ m) / (bank.T @ (bank @ size) + 1e-9)
    return size


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
    """Waveform -> the logarithm of its magnitudes in mel bands, as AudioLDM's; and back."""

    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        bank = metrics.mel_filters(cfg.rate, cfg.n_fft, cfg.n_mels).float()  # (M, bins)
        self.register_buffer("bank", bank, persistent=False)
        self.register_buffer("window", torch.hann_window(cfg.window), persistent=False)

    def stft(self, x):
        """(B, L) -> (B, bins, L / hop + 1); column k is centered on sample k * hop."""
        cfg = self.cfg
        # Centered columns: the ends are padded with n_fft / 2 samples of their mirror image.
        return torch.stft(x, cfg.n_fft, cfg.hop, cfg.window, self.window, return_complex=True)

    def istft(self, x):
        """The inverse: (B, bins, L / hop + 1) -> (B, L)."""
        cfg = self.cfg
        return torch.istft(x, cfg.n_fft, cfg.hop, cfg.window, self.window)

    def forward(self, audio):
        """(B, 1, L) in [-1, 1] -> (B, 1, T, M), T = L / hop: natural logarithms."""
        with torch.autocast(audio.device.type, enabled=False):
            size = self.stft(audio[:, 0].float()).abs()[..., :-1]  # (B, bins, T)
            m = (self.bank @ size).clamp(min=self.cfg.floor)  # (B, M, T)
        return m.log().mT[:, None]

    def inverse(self, mel):
        """(B, 1, T, M) -> (B, L), by Griffin-Lim."""
        with torch.autocast(mel.device.type, enabled=False):
            # Bands at the floor are silent, not as loud as it.
            m = (mel[:, 0].float().mT.exp() - self.cfg.floor).clamp(min=0)  # (B, M, T)
            size = unmel(F.pad(m, (0, 1), mode="replicate"), self.bank)
            return griffin_lim(size, self.stft, self.istft, self.cfg.griffin_lim)


# ---- Small codecs, trained here in minutes (ours). Each starts as the best linear code of patches
# and learns what that misses.


def psnr(x, y):
    """10 log10(2^2 / MSE) of clips in [-1, 1], averaged over the batch, in dB."""
    mse = (x.float() - y.float()).square().flatten(1).mean(1).clamp(min=1e-12)  # (B,)
    return (10 * torch.log10(4 / mse)).mean()


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


def names_like(model, pattern):
    """The names of a model's parameters in which the pattern occurs."""
    return tuple(name for name, _ in model.named_parameters() if re.search(pattern, name))


def generators(keys, device):
    """A random generator for each clip, seeded by its own key (B,).

    So noise is the same however the clips are dealt to processes. Keys stay on the CPU: to read
    them, nothing waits for a GPU.
    """
    return [torch.Generator(device).manual_seed(key) for key in keys.tolist()]


def normal(draws, shape):
    """Normal noise (B, *shape), each clip's from its own generator."""
    return torch.stack([torch.randn(shape, generator=own, device=own.device) for own in draws])


# same as mm_diffusion.py
def zeroed(module):
    """Zero a layer: its residual branch starts as nothing, and the fresh network outputs 0."""
    for p in module.parameters():
        nn.init.zeros_(p)
    return module


class ConvBlock(nn.Module):
    """x (B, D, T, H, W) + a convolution over its neighbors and a wide layer at each place."""

    def __init__(self, width):
        super().__init__()
        self.space = nn.Conv3d(width, width, (1, 3, 3), padding=(0, 1, 1))
        self.time = nn.Conv3d(width, width, (3, 1, 1))
        self.widen = nn.Conv3d(width, 4 * width, 1)
        self.narrow = nn.Conv3d(4 * width, width, 1)

    def forward(self, x):
        # Causal, as Open-Sora's VAE over time is: a place is normed on its own, and the frames of
        # the convolution are this one and the two before.
        h = x * torch.rsqrt(x.float().square().mean(1, keepdim=True) + 1e-6)
        h = self.space(h)
        h = h + self.time(F.pad(h, (0, 0, 0, 0, 2, 0)))
        return x + self.narrow(F.silu(self.widen(h)))


class SmallVAE(nn.Module):
    """Clips (B, C, F, H, W) <-> codes (B, codes, T, h, w) of their patches. A spectrogram is a clip
    of one frame.

    Encoder and decoder: a linear map of each patch, plus what a few convolutions make of it and its
    neighbors, whose last layer starts at zero. The posterior of a code is normal, with the mean of
    encode() and one deviation for all: learned ones shrank to 0.01 with a small KL weight, and with
    a large one some channels fell silent. With a fixed one, decoding forgives a generator's errors.
    """

    noise = 0.15  # the deviation

    def __init__(self, channels, patch, codes, width, blocks):
        super().__init__()
        self.patch = patch
        self.to_codes = nn.Conv3d(channels, codes, patch, patch)
        self.enter = nn.Conv3d(channels, width, patch, patch)
        self.encoder = nn.Sequential(*[ConvBlock(width) for _ in range(blocks)])
        self.leave = zeroed(nn.Conv3d(width, codes, 1))
        self.from_codes = nn.ConvTranspose3d(codes, channels, patch, patch, bias=False)
        self.mean_patch = nn.Parameter(torch.zeros(channels, *patch))
        self.reenter = nn.Conv3d(codes, width, 1)
        self.decoder = nn.Sequential(*[ConvBlock(width) for _ in range(blocks + 1)])
        self.render = zeroed(nn.ConvTranspose3d(width, channels, patch, patch))
        # Latents are codes less their mean, over a scale.
        self.register_buffer("mean", torch.zeros(codes, 1, 1, 1))
        self.register_buffer("scale", torch.ones(codes, 1, 1, 1))

    @torch.no_grad()
    def start(self, clips):
        """Become the best linear code of some clips, a list of (B, C, F, H, W)."""
        mean, variances, axes = pca(self.rows(x.double()) for x in clips)
        codes = len(self.mean)
        deviations = variances[:codes].clamp(min=1e-8).sqrt()
        into = (axes[:, :codes] / deviations).T  # (codes, P): each code has variance 1
        back = (axes[:, :codes] * deviations).T
        shape = self.from_codes.weight.shape  # (codes, C, p, q, r)
        self.to_codes.weight.copy_(into.view(shape))
        self.to_codes.bias.copy_(-into @ mean)
        self.from_codes.weight.copy_(back.view(shape))
        self.mean_patch.copy_(mean.view(shape[1:]))

    def rows(self, x):
        """Clips -> their patches as rows (N, P), in the order of a convolution's weights."""
        for axis, size in enumerate(self.patch, 2):
            x = x.unfold(axis, size, size)  # in the end (B, C, T, h, w, p, q, r)
        return x.movedim(1, 4).flatten(0, 3).flatten(1)  # from (B, T, h, w, C, p, q, r)

    @torch.no_grad()
    def measure(self, clips):
        """Set mean and scale, so that the latents of some clips have mean 0 and mean square 1.

        The more a channel is worth in pixels, the larger it gets: so noise hides what matters least
        first, as it does in pixels.
        """
        codes = torch.cat([self.encode(x) for x in clips])
        deviation, mean = torch.std_mean(codes, (0, 2, 3, 4))
        worth = deviation * self.from_codes.weight.flatten(1).norm(dim=1)  # in pixels
        size = worth**0.6
        size = size / size.square().mean().sqrt()
        self.mean.copy_(mean.view_as(self.mean))
        self.scale.copy_((deviation / size).view_as(self.scale))

    def encode(self, x):
        """Clips -> means of their codes (B, codes, T, h, w)."""
        return self.to_codes(x) + self.leave(self.encoder(self.enter(x)))

    def decode(self, codes):
        """Codes -> clips."""
        tiled = self.mean_patch.repeat(1, *codes.shape[2:])  # (C, F, H, W)
        h = self.render(self.decoder(self.reenter(codes)))
        return self.from_codes(codes) + tiled + h

    def latents(self, x):
        """Clips -> codes, normalized."""
        return (self.encode(x) - self.mean) / self.scale

    def clips(self, z):
        """The inverse: latents (B, codes, T, h, w) -> clips."""
        return self.decode(z * self.scale + self.mean)


class SmallCodec(nn.Module):
    """Both autoencoders. Streams are {"video": (B, 3, F, H, W), "audio": (B, 1, 1, T, M)}."""

    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        self.mel = Mel(cfg)
        # Silence and the band of a full-scale sine become -1 and 1.
        self.low = math.log(cfg.floor)
        self.high = math.log(cfg.window / 4 * self.mel.bank.max())
        size = (cfg.vae_width, cfg.vae_blocks)
        video = SmallVAE(3, cfg.video_patch, cfg.video_channels, *size)
        audio = SmallVAE(1, (1, *cfg.audio_patch), cfg.audio_channels, *size)
        self.vaes = nn.ModuleDict({"video": video, "audio": audio})
        self.edges = names_like(self, "codes|enter|leave|patch|render")  # not for Muon

    def inputs(self, batch):
        """What a batch on the device has -> streams, in [-1, 1]."""
        x = {}
        if "video" in batch:
            x["video"] = batch["video"].transpose(1, 2)  # (B, 3, F, H, W)
        if "audio" in batch:
            mel = self.mel(batch["audio"])[:, :, None]  # (B, 1, 1, T, M)
            x["audio"] = 2 * (mel - self.low) / (self.high - self.low) - 1
        return x

    def start(self, batches):
        """Make both the best linear codes of some clips."""
        streams = [self.inputs(batch) for batch in batches]
        for name, vae in self.vaes.items():
            vae.start([x[name] for x in streams])

    def measure(self, batches):
        """Give the latents of some clips mean 0 and, over all channels, mean square 1."""
        streams = [self.inputs(batch) for batch in batches]
        for name, vae in self.vaes.items():
            vae.measure([x[name] for x in streams])

    def forward(self, batch, keys=None):
        """Clips on the device -> loss of stage vae, {stream: its reconstruction error, L1 + 4 MSE}.

        keys (B,): of the clips, from which the noise of the codes is drawn. None: no noise.
        """
        total = 0
        parts = {}
        for name, real in self.inputs(batch).items():
            vae = self.vaes[name]
            codes = vae.encode(real).float()
            kl = codes.square().mean() / 2  # to N(0, 1), but for a constant
            if keys is not None:  # a draw from the posterior
                draws = generators(keys, real.device)
                codes = codes + vae.noise * normal(draws, codes.shape[1:])
            error = vae.decode(codes) - real
            reconstruction = error.abs().mean() + 4 * error.square().mean()
            parts[name] = reconstruction.detach()
            total = total + reconstruction + self.cfg.kl * kl
        return total, parts

    @torch.no_grad()
    def encode(self, batch):
        """-> the latents {"z_v": (B, C, T, h, w), "z_a": (B, C_a, S, N)} of what it has."""
        x = self.inputs(batch)
        z = {}
        if "video" in x:
            z["z_v"] = self.vaes["video"].latents(x["video"])
        if "audio" in x:
            z["z_a"] = self.vaes["audio"].latents(x["audio"])[:, :, 0]
        return z

    @torch.no_grad()
    def decode(self, z):
        """Latents -> what is there of {"video": (B, F, 3, H, W), "audio": (B, L)}."""
        out = {}
        if "z_v" in z:
            out["video"] = self.vaes["video"].clips(z["z_v"]).transpose(1, 2)
        if "z_a" in z:
            mel = self.vaes["audio"].clips(z["z_a"][:, :, None])[:, :, 0]  # (B, 1, T, M)
            mel = self.low + (self.high - self.low) * (mel.clamp(-1, 1) + 1) / 2
            out["audio"] = self.mel.inverse(mel)
        return out


def vae_loss(net, batch, t=None):
    """The loss of stage vae, as fit() wants it. t: this is validation, so the codes get no noise.

    An autoencoder knows no noise levels: the four quarters of its validation are equal.
    """
    return net(batch, batch["key"] if t is None else None)


@torch.no_grad()
def examine(codec, val, device):
    """Print the PSNR of the codecs on validation clips, beside codes that anyone can write down.

    Those are, of a video, means of patches, interpolated; of a sound, the clip's mean spectrum.
    -> {stream: (codec, other)} in dB. Raises data.UserError where the codec is not better.
    """
    rows = {name: [] for name in codec.vaes}
    for batch in data.val_batches(val, codec.cfg.val_clips, 16):
        for name, real in codec.inputs(data.to_device(batch, device)).items():
            vae = codec.vaes[name]
            ours = vae.clips(vae.latents(real))
            if name == "video":
                means = F.avg_pool3d(real, vae.patch)
                other = F.interpolate(means, real.shape[2:], mode="trilinear")
            else:
                other = real.mean(3, keepdim=True).expand_as(real)
            row = torch.stack([psnr(ours, real), psnr(other, real)]).cpu()
            rows[name] += [row] * len(real)
    table = {name: torch.stack(rows[name]).mean(0).tolist() for name in rows}
    for name, (ours, other) in table.items():
        what = "block means" if name == "video" else "mean spectrum"
        say(f"PSNR of {name}: codec {ours:.1f} dB, {what} {other:.1f}")
        if codec.cfg.need_good and not ours > other:  # nor is nan
            raise data.UserError(
                f"The codec of the {name} does not beat its baseline, nor would a generator: raise "
                "--vae_steps, or go on with --need_good false."
            )
    return table


def say(text):
    if RANK == 0:
        print(text, flush=True)


# ---- Codecs of the paper: Open-Sora's video VAE, AudioLDM's mel VAE and vocoder. Every part has
# the name that it has in the released weights: hence odd names, and levels that count backwards.

conv2d = functools.partial(nn.Conv2d, padding="same")  # keeps the height and width


def chain(**parts):
    """Modules that run one after the other, each under its name."""
    return nn.Sequential(OrderedDict(parts))


class ResnetBlock(nn.Module):
    """Two convolutions, added to their input: (B, before, ...) -> (B, width, ...)."""

    def __init__(self, before, width, groups, conv=conv2d, eps=1e-6, shortcut="nin_shortcut"):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, before, eps)
        self.conv1 = conv(before, width, 3)
        self.norm2 = nn.GroupNorm(groups, width, eps)
        self.conv2 = conv(width, width, 3)
        self.shortcut = shortcut  # its name, as the two libraries do not agree on one
        if before != width:  # the input has to change its width as well
            self.add_module(shortcut, conv(before, width, 1))

    def forward(self, x):
        h = self.conv1(F.silu(self.norm1(x)))  # (B, width, ...)
        h = self.conv2(F.silu(self.norm2(h)))
        skip = getattr(self, self.shortcut, nn.Identity())
        return skip(x) + h


def block_row(kind, before, width, count, groups):
    """count residual blocks of a kind, of which the first changes the width."""
    blocks = nn.Sequential(kind(before, width, groups))
    for _ in range(1, count):
        blocks.append(kind(width, width, groups))
    return blocks


class PixelAttention(nn.Module):
    """One head of attention among the pixels of an image (B, C, H, W)."""

    def __init__(self, width, groups):
        super().__init__()
        self.norm = nn.GroupNorm(groups, width, 1e-6)
        self.q = conv2d(width, width, 1)
        self.k = conv2d(width, width, 1)
        self.v = conv2d(width, width, 1)
        self.proj_out = conv2d(width, width, 1)

    def forward(self, x):
        h = self.norm(x)
        # Convolutions of single pixels are linear layers: q, k and v (B, H * W, C).
        q, k, v = (conv(h).flatten(2).mT for conv in (self.q, self.k, self.v))
        h = F.scaled_dot_product_attention(q, k, v).mT.reshape(x.shape)  # (B, C, H, W)
        return x + self.proj_out(h)


def middle(width, groups):
    """What encoder and decoder have at the lowest resolution."""
    return chain(
        block_1=ResnetBlock(width, width, groups),
        attn_1=PixelAttention(width, groups),
        block_2=ResnetBlock(width, width, groups),
    )


def image_levels(widths, blocks, groups, up):
    """Residual blocks of each width in turn; in between, images are halved, or (up) doubled."""
    levels = nn.Sequential()
    before = widths[0]
    for i, width in enumerate(widths):
        level = chain(block=block_row(ResnetBlock, before, width, blocks, groups))
        left = len(widths) - 1 - i  # levels to come
        if left > 0 and up:
            nearest = nn.Upsample(scale_factor=2)
            level.upsample = chain(nearest=nearest, conv=conv2d(width, width, 3))
        elif left > 0:
            pad = nn.ZeroPad2d((0, 1, 0, 1))  # on the right and below only
            level.downsample = chain(pad=pad, conv=nn.Conv2d(width, width, 3, stride=2))
        # Level 0 is the full resolution, where the decoder ends.
        levels.add_module(str(left if up else i), level)
        before = width
    return levels


def gaussian(moments):
    """(B, 2 z, ...) -> mean and log-variance of the latents, each (B, z, ...)."""
    mean, logvar = moments.chunk(2, dim=1)
    return mean, logvar.clamp(-30, 20)


class AutoencoderKL(nn.Module):
    """The image VAE of latent diffusion models: Stable Diffusion's, and AudioLDM's of log mels.

    channels: of an image. widths: features at each resolution, each half of the one before.
    blocks: residual blocks at each. z_channels: of a latent. groups: of the normalization.
    """

    def __init__(self, channels, widths, blocks, z_channels, groups=32):
        super().__init__()
        first = widths[0]
        last = widths[-1]
        self.encoder = chain(
            conv_in=conv2d(channels, first, 3),  # (B, first, H, W)
            down=image_levels(widths, blocks, groups, up=False),
            mid=middle(last, groups),  # (B, last, H / 8, W / 8)
            norm_out=nn.GroupNorm(groups, last, 1e-6),
            silu=nn.SiLU(),
            conv_out=conv2d(last, 2 * z_channels, 3),
        )
        self.quant_conv = conv2d(2 * z_channels, 2 * z_channels, 1)
        self.post_quant_conv = conv2d(z_channels, z_channels, 1)
        self.decoder = chain(
            conv_in=conv2d(z_channels, last, 3),
            mid=middle(last, groups),
            up=image_levels(widths[::-1], blocks + 1, groups, up=True),  # one block more
            norm_out=nn.GroupNorm(groups, first, 1e-6),
            silu=nn.SiLU(),
            conv_out=conv2d(first, channels, 3),
        )

    def encode(self, x):
        """Images (B, channels, H, W) -> mean, log-variance (B, z, H / 8, W / 8), for 4 widths."""
        return gaussian(self.quant_conv(self.encoder(x)))

    def decode(self, z):
        return self.decoder(self.post_quant_conv(z))


class CausalConv(nn.Module):
    """3-D convolution that sees no later frame: (B, n, T, H, W) -> (B, m, T / stride, H, W)."""

    def __init__(self, n, m, kernel, stride=1, bias=True):
        super().__init__()
        side = kernel // 2  # rows and columns have zeros on both sides,
        self.conv = nn.Conv3d(n, m, kernel, (stride, 1, 1), (0, side, side), bias=bias)
        self.past = kernel - stride  # frames have them before the first only

    def forward(self, x):
        return self.conv(F.pad(x, (0, 0, 0, 0, self.past, 0)))


class TimeUpsample(CausalConv):
    """Twice as many frames: (B, n, T, H, W) -> (B, m / 2, 2 T, H, W)."""

    def forward(self, x):
        x = super().forward(x).unflatten(1, (-1, 2))  # (B, m / 2, 2, T, H, W)
        return x.transpose(2, 3).flatten(2, 3)  # two channels make two frames


# The temporal VAE's residual blocks: the same but for convolution, constant and a name.
causal_conv = functools.partial(CausalConv, bias=False)
CausalBlock = functools.partial(ResnetBlock, conv=causal_conv, eps=1e-5, shortcut="conv3")


class TemporalEncoder(nn.Module):
    """(B, channels, F, H, W) -> moments (B, 2 z, F / 4, H, W)."""

    def __init__(self, channels, levels, blocks, z_channels, groups):
        super().__init__()
        before = levels[0][0]  # width of the first level
        self.conv_in = causal_conv(channels, before, 3)
        self.block_res_blocks = nn.ModuleList()
        self.conv_blocks = nn.ModuleList()
        for width, stride in levels:
            self.block_res_blocks.append(block_row(CausalBlock, before, width, blocks, groups))
            halve = CausalConv(width, width, 3, stride) if stride > 1 else nn.Identity()
            self.conv_blocks.append(halve)
            before = width
        self.res_blocks = block_row(CausalBlock, before, before, blocks, groups)
        self.norm1 = nn.GroupNorm(groups, before)
        self.conv2 = CausalConv(before, 2 * z_channels, 1)

    def forward(self, x):
        x = self.conv_in(x)
        for i, blocks in enumerate(self.block_res_blocks):
            x = self.conv_blocks[i](blocks(x))
        # x: (B, 512, F / 4, H, W)
        return self.conv2(F.silu(self.norm1(self.res_blocks(x))))


class TemporalDecoder(nn.Module):
    """(B, z, F / 4, H, W) -> (B, channels, F, H, W), through the encoder's levels in reverse."""

    def __init__(self, channels, levels, blocks, z_channels, groups):
        super().__init__()
        before = levels[-1][0]
        self.conv1 = CausalConv(z_channels, before, 3)
        self.res_blocks = block_row(CausalBlock, before, before, blocks, groups)
        self.block_res_blocks = nn.ModuleList()
        self.conv_blocks = nn.ModuleList()
        # Built from the lowest level up, but counted as in the encoder.
        for width, stride in reversed(levels):
            double = TimeUpsample(before, 2 * before, 3) if stride > 1 else nn.Identity()
            self.conv_blocks.insert(0, double)
            row = block_row(CausalBlock, before, width, blocks, groups)
            self.block_res_blocks.insert(0, row)
            before = width
        self.norm1 = nn.GroupNorm(groups, before)
        self.conv_out = CausalConv(before, channels, 3)

    def forward(self, z):
        x = self.res_blocks(self.conv1(z))  # (B, 512, F / 4, H, W)
        for i in reversed(range(len(self.conv_blocks))):
            x = self.block_res_blocks[i](self.conv_blocks[i](x))
        return self.conv_out(F.silu(self.norm1(x)))


class TemporalVAE(nn.Module):
    """Open-Sora 1.2's VAE over time: one frame for each four of an image VAE's latents.

    levels: features, and stride in time after them; the rest as in AutoencoderKL.
    """

    def __init__(
        self,
        channels=4,
        levels=((128, 1), (256, 2), (256, 2), (512, 1)),
        blocks=4,
        z_channels=4,
        groups=32,
    ):
        super().__init__()
        self.encoder = TemporalEncoder(channels, levels, blocks, z_channels, groups)
        self.quant_conv = CausalConv(2 * z_channels, 2 * z_channels, 1)
        self.post_quant_conv = CausalConv(z_channels, z_channels, 1)
        self.decoder = TemporalDecoder(channels, levels, blocks, z_channels, groups)
        self.stride = math.prod(stride for _, stride in levels)

    def encode(self, x):
        """(B, channels, F, H, W) -> mean, log-variance (B, z, T, H, W), T = F / 4 rounded up."""
        missing = -x.shape[2] % self.stride  # frames to a multiple of 4
        x = F.pad(x, (0, 0, 0, 0, missing, 0))  # zeros, before the first frame
        return gaussian(self.quant_conv(self.encoder(x)))

    def decode(self, z, frames):
        """The reverse; frames: how many there were."""
        return self.decoder(self.post_quant_conv(z))[:, :, -frames:]


class VocoderBlock(nn.Module):
    """Pairs of convolutions (B, C, L), the first of each dilated, added to their input."""

    def __init__(self, width, kernel, dilations):
        super().__init__()
        # All of them keep width and length.
        conv = functools.partial(nn.Conv1d, width, width, kernel, padding="same")
        self.convs1 = nn.ModuleList(conv(dilation=d) for d in dilations)
        self.convs2 = nn.ModuleList(conv() for _ in dilations)

    def forward(self, x):
        for i, dilated in enumerate(self.convs1):
            h = dilated(F.leaky_relu(x, 0.1))
            x = x + self.convs2[i](F.leaky_relu(h, 0.1))
        return x


class HiFiGAN(nn.Module):
    """Vocoder: log mels (B, M, T) -> waveform (B, 1, L) in [-1, 1], L = 160 T and some samples.

    width: features, halved by each of the steps (rate, kernel); kernels, dilations: of the blocks
    that follow each step.
    """

    def __init__(
        self,
        n_mels=64,
        width=1024,
        steps=((5, 16), (4, 16), (2, 8), (2, 4), (2, 4)),
        kernels=(3, 7, 11),
        dilations=(1, 3, 5),
    ):
        super().__init__()
        self.conv_pre = nn.Conv1d(n_mels, width, 7, padding=3)
        self.ups = nn.ModuleList()
        self.resblocks = nn.ModuleList()
        for rate, kernel in steps:
            pad = (kernel - rate) // 2  # rounded down: where kernel - rate is odd, 1 sample more
            self.ups.append(nn.ConvTranspose1d(width, width // 2, kernel, rate, pad))
            width = width // 2
            for size in kernels:
                self.resblocks.append(VocoderBlock(width, size, dilations))
        self.conv_post = nn.Conv1d(width, 1, 7, padding=3)

    def forward(self, mel):
        x = self.conv_pre(mel)  # (B, width, T)
        count = len(self.resblocks) // len(self.ups)
        for i, up in enumerate(self.ups):
            x = up(F.leaky_relu(x, 0.1))  # half the width, rate times the length
            # Blocks of several reaches see the same, and their mean goes on.
            blocks = self.resblocks[i * count : (i + 1) * count]
            x = sum(block(x) for block in blocks) / count
        return torch.tanh(self.conv_post(F.leaky_relu(x)))  # the last slope is 0.01


# ---- Reading released weights


def under(state, prefix):
    """The weights whose names start with prefix, without it."""
    return {name[len(prefix) :]: w for name, w in state.items() if name.startswith(prefix)}


# diffusers' names for parts, of today and (the last four) of 2022, and LDM's. Replaced in this
# order, and nothing of LDM's own names is among them.
LDM_NAMES = {
    "mid_block.resnets.0": "mid.block_1",
    "mid_block.resnets.1": "mid.block_2",
    "mid_block.attentions.0": "mid.attn_1",
    "down_blocks": "down",
    "resnets": "block",
    "downsamplers.0": "downsample",
    "upsamplers.0": "upsample",
    "conv_shortcut": "nin_shortcut",
    "conv_norm_out": "norm_out",
    "group_norm": "norm",
    "to_out.0": "proj_out",
    "to_": "",
    "query": "q",
    "key": "k",
    "value": "v",
    "proj_attn": "proj_out",
}


def ldm_names(state):
    """AutoencoderKL's weights under diffusers' names or LDM's -> under LDM's."""
    last = len(set(re.findall(r"up_blocks\.(\d)", " ".join(state)))) - 1
    renamed = {}
    for name, w in state.items():
        # diffusers counts the decoder's levels as they run, LDM against that.
        name = re.sub(r"up_blocks\.(\d)", lambda found: f"up.{last - int(found[1])}", name)
        for theirs, ours in LDM_NAMES.items():
            name = name.replace(theirs, ours)
        if "attn_1" in name and w.dim() == 2:
            w = w[:, :, None, None]  # a linear layer is a convolution of single pixels
        renamed[name] = w
    return renamed


def hifigan_names(state):
    """HiFiGAN's weights as trained, as folded, or under transformers' names -> as folded."""
    folded = {}
    for name, w in state.items():
        if name.endswith("weight_v"):
            # Weight norm keeps a direction v and a length g, for each channel of dimension 0.
            name = name[:-2]
            w = state[name + "_g"] * F.normalize(w, dim=(1, 2))
        # transformers adds mean and scale, of mels: AudioLDM does without.
        if "." in name and not name.endswith("_g"):
            folded[name.replace("upsampler", "ups")] = w
    return folded


PIECE = 17  # frames that Open-Sora codes at a time; they make 5 latents
IMAGES = 8  # frames that the image VAE codes at a time: memory grows with them
SD_SCALE = 0.18215  # of image latents; SDXL's own is another, but Open-Sora keeps this one


class PretrainedCodec(nn.Module):
    """Open-Sora 1.2's video VAE, AudioLDM's mel VAE and HiFi-GAN; load_pretrained() fills them."""

    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        self.spatial_vae = AutoencoderKL(3, (128, 256, 512, 512), blocks=2, z_channels=4)
        self.temporal_vae = TemporalVAE()
        # Mean and deviation of the channels of its latents, measured by Open-Sora.
        stats = torch.tensor([[-0.10, 0.34, 0.27, 0.98], [3.85, 2.32, 2.33, 3.06]])
        self.register_buffer("stats", stats.view(2, 4, 1, 1, 1))
        self.mel = Mel(cfg)
        self.mel_vae = AutoencoderKL(1, (128, 256, 512), blocks=2, z_channels=8)
        self.register_buffer("scale_factor", torch.ones(()))  # makes its latents' variance 1
        self.vocoder = HiFiGAN()

    def encode(self, batch):
        """Video (B, F, 3, H, W), audio (B, 1, L) in [-1, 1], or one of them -> their latents.

        z_v (B, 4, T, H / 8, W / 8), T = 5 for 17 frames; z_a (B, 8, L / hop / 4, n_mels / 4).
        """
        z = {}
        if "video" in batch:
            size = batch["video"].shape[:2]  # B, F
            images = batch["video"].flatten(0, 1).split(IMAGES)
            codes = torch.cat([self.spatial_vae.encode(part)[0] for part in images])
            codes = codes.unflatten(0, size).transpose(1, 2)  # (B, 4, F, H / 8, W / 8)
            # Pieces know nothing of each other: the first frames of each are padded anew.
            pieces = (SD_SCALE * codes).split(PIECE, dim=2)
            mean = torch.cat([self.temporal_vae.encode(piece)[0] for piece in pieces], dim=2)
            shift, scale = self.stats
            z["z_v"] = (mean - shift) / scale
        if "audio" in batch:
            # AudioLDM scales every clip to a peak of 0.5; here a clip keeps its loudness.
            mean, _ = self.mel_vae.encode(self.mel(batch["audio"]))
            z["z_a"] = mean * self.scale_factor
        return z

    def decode(self, z):
        """Latents, or one of them -> video (B, F, 3, H, W), audio (B, L)."""
        batch = {}
        if "z_v" in z:
            shift, scale = self.stats
            codes = []
            left = self.cfg.frames
            # As they were coded: 5 latents are 17 frames, the last ones perhaps fewer.
            for piece in (z["z_v"] * scale + shift).split(5, dim=2):
                codes.append(self.temporal_vae.decode(piece, min(left, PIECE)))
                left = left - PIECE
            codes = torch.cat(codes, dim=2).transpose(1, 2) / SD_SCALE  # (B, F, 4, H / 8, W / 8)
            parts = codes.flatten(0, 1).split(IMAGES)
            images = torch.cat([self.spatial_vae.decode(part) for part in parts])
            batch["video"] = images.unflatten(0, codes.shape[:2])
        if "z_a" in z:
            mel = self.mel_vae.decode(z["z_a"] / self.scale_factor)  # (B, 1, T, M)
            wave = self.vocoder(mel[:, 0].mT)  # (B, 1, hop T + 32)
            batch["audio"] = wave[:, 0, : self.cfg.hop * mel.shape[2]]
        return batch


def check_files(cfg):
    """Raise data.UserError where the options lack a file of the pretrained codecs."""
    if not cfg.video_vae or not cfg.audio_vae:
        raise data.UserError(
            "--codec pretrained needs --video_vae FILE (Hugging Face: hpcai-tech/OpenSora-VAE-v1.2,"
            " model.safetensors) and --audio_vae FILE (a checkpoint of AudioLDM, or from Hugging "
            "Face's cvssp/audioldm-s-full-v2 the file in vae); or take --codec small."
        )


def load_pretrained(codec, cfg):
    """Fill a PretrainedCodec from --video_vae, --audio_vae and --vocoder.

    Raises data.UserError for a file that is missing, damaged, or of another network.
    """
    load_video_vae(codec, cfg.video_vae)
    load_audio_vae(codec, cfg.audio_vae, cfg.vocoder)


def load_video_vae(codec, path):
    """Both video VAEs, which are in one file."""
    state = data.read_weights(path)
    temporal = under(state, "temporal_vae.")
    # Its shift and scale are the constants above. Version 1.3 has 16 channels, and other names.
    if "V1_3" in str(data.config_beside(path)) or not temporal:
        raise data.UserError(
            f"{path} is not Open-Sora's VAE 1.2; that of version 1.3, for one, is another network. "
            "Take model.safetensors from Hugging Face's hpcai-tech/OpenSora-VAE-v1.2."
        )
    spatial = ldm_names(under(state, "spatial_vae.module."))
    data.load_weights(codec.spatial_vae, spatial, path)
    data.load_weights(codec.temporal_vae, temporal, path)
    say(f"{path}: Open-Sora's video VAE. License: Apache 2.0; of SDXL's image VAE in it, MIT.")


def load_audio_vae(codec, path, vocoder):
    """The mel VAE and the vocoder; the latter from the same file where `vocoder` is empty."""
    state = data.read_weights(path)
    # AudioLDM's checkpoint has the factor among its weights, diffusers' folder in config.json.
    factor = state.get("scale_factor", data.config_beside(path).get("scaling_factor"))
    if factor is None:
        raise data.UserError(
            f"{path} does not say how its latents are scaled: take a whole checkpoint of AudioLDM, "
            "or keep diffusers' config.json beside the VAE."
        )
    codec.scale_factor.fill_(factor)
    state = under(state, "first_stage_model.") or state  # of a whole checkpoint, or the VAE alone
    parts = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.")
    vae = {name: w for name, w in state.items() if name.startswith(parts)}
    data.load_weights(codec.mel_vae, ldm_names(vae), path)
    say(f"{path}: AudioLDM's mel VAE. License: CC BY-NC-SA 4.0, not for commercial use.")

    state = data.read_weights(vocoder) if vocoder else under(state, "vocoder.")
    if not state:
        raise data.UserError(
            f"There is no vocoder in {path}: add --vocoder FILE (Hugging Face: "
            "cvssp/audioldm-s-full-v2, the file in vocoder)."
        )
    data.load_weights(codec.vocoder, hifigan_names(state), vocoder or path)
    say(f"{vocoder or path}: HiFi-GAN. License: AudioLDM's as well, if it comes from there.")


# ---- Layout: video and sound as one film (section 3.2.2). Its columns are, from left to right, the
# task token, the sound, the video.

TASKS = ("t2av", "a2v", "v2a")


def latent_shapes(cfg):
    """Shapes of a clip's latents: video (C, T, h, w), sound (C_a, S, N)."""
    columns = cfg.frames * cfg.rate // cfg.fps // cfg.hop  # of the mel spectrogram
    if cfg.codec == "pretrained":
        # 5 latents for each 17 frames, and for those left over as many as they begin fours.
        times = cfg.frames // PIECE * 5 + math.ceil(cfg.frames % PIECE / 4)
        return (4, times, cfg.size // 8, cfg.size // 8), (8, columns // 4, cfg.n_mels // 4)
    t, h, w = cfg.video_patch
    s, n = cfg.audio_patch
    video = (cfg.video_channels, cfg.frames // t, cfg.size // h, cfg.size // w)
    return video, (cfg.audio_channels, columns // s, cfg.n_mels // n)


def task_columns(cfg):
    """Columns of the task token: one, or two where one would leave an odd number in all."""
    (_, times, _, w), (_, steps, _) = latent_shapes(cfg)
    return 2 - (steps // times + w) % 2


def to_columns(z_a, T, C):
    """Sound latents (B, C_a, S, N) -> k columns beside each of T frames, (B, C, T, h, k).

    Column j of frame i holds step i * k + j, whose C_a * N = C * h numbers fill it: sound and
    picture of a moment are in one frame.
    """
    z_a = z_a.unflatten(2, (T, -1))  # (B, C_a, T, k, N)
    z_a = z_a.permute(0, 2, 1, 4, 3)  # (B, T, C_a, N, k)
    z_a = z_a.flatten(2, 3).unflatten(2, (C, -1))  # (B, T, C, h, k)
    return z_a.transpose(1, 2)


def from_columns(x, C_a):
    """The inverse of to_columns(): (B, C, T, h, k) -> (B, C_a, S, N)."""
    x = x.transpose(1, 2)  # (B, T, C, h, k)
    x = x.flatten(2, 3).unflatten(2, (C_a, -1))  # (B, T, C_a, N, k)
    x = x.permute(0, 2, 1, 4, 3)  # (B, C_a, T, k, N)
    return x.flatten(2, 3)


# ---- STDiT3 of Open-Sora 1.2, under that code's names. Tokens are (B, T, S, D): T frames of S.


def attend_where(q, k, v, mask):
    """Attention of q (N, heads, n, d) to the keys that mask (N, 1, 1, m) tells -> (N, n, D)."""
    rows = 32768
    if len(q) > rows:  # CUDA's fused kernels fail above 65,535
        masks = [None] * len(q.split(rows)) if mask is None else mask.split(rows)
        parts = zip(q.split(rows), k.split(rows), v.split(rows), masks, strict=True)
        return torch.cat([attend_where(*part) for part in parts])
    x = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return x.transpose(1, 2).flatten(2)


def rotate(x, turn):
    """Rotary position: turn the channel pairs (2i, 2i + 1) of every head.

    x (B, N, heads, d); turn (2, N, 1, d): cosines, and sines with the signs of a rotation.
    """
    swapped = x.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
    return x * turn[0] + swapped * turn[1]


def turning(angles):
    """Angles of the channel pairs (N, d / 2) -> what rotate() needs, (2, N, 1, d)."""
    angles = angles.repeat_interleave(2, -1)  # (N, d)
    signs = torch.tensor([-1.0, 1.0]).repeat(angles.shape[1] // 2)
    return torch.stack([angles.cos(), angles.sin() * signs])[:, :, None]


def line(n, dim):
    """Turns of the positions 0 ... n - 1, at the frequencies 10000^(-2i / dim)."""
    freqs = 10000 ** (-torch.arange(0, dim, 2) / dim)
    return turning(torch.arange(n)[:, None] * freqs)


def grid(shape, dim):
    """Turns of the N places of a grid; each axis has its share of the channel pairs.

    It runs from -pi to pi, times scales from 1 to 5.
    """
    count = dim // 2 // len(shape)
    scales = math.pi * torch.logspace(0, math.log2(5), count, base=2)
    axes = torch.meshgrid(*[torch.linspace(-1, 1, n) for n in shape], indexing="ij")
    angles = torch.cat([x.flatten()[:, None] * scales for x in axes], 1)  # (N, axes * count)
    return turning(F.pad(angles, (0, dim // 2 - angles.shape[1])))


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


class Mlp(nn.Module):
    """Two layers, tanh-GELU between them."""

    def __init__(self, i, hidden, o):
        super().__init__()
        self.fc1 = nn.Linear(i, hidden)
        self.fc2 = nn.Linear(hidden, o)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


def modulate(x, shift, scale):
    """LayerNorm whose scale and shift depend on the time."""
    return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift


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


def recomputed(cfg, function, *inputs):
    """function(*inputs). With --checkpoint, backward computes again what is inside."""
    if cfg.checkpoint and torch.is_grad_enabled():
        return checkpoint(function, *inputs, use_reentrant=False)
    return function(*inputs)


def place_embedding(rows, columns, size, dim):
    """Fixed sinusoids (rows * columns, dim): half of the channels tell the column, half the row.

    The coordinates of a frame of `size` pixels are stretched to what they are at 512.
    """
    stretch = 512 / size * round((rows * columns) ** 0.5)
    row = time_embedding(torch.arange(rows) * stretch / rows, dim // 2)
    column = time_embedding(torch.arange(columns) * stretch / columns, dim // 2)
    row = row.roll(dim // 4, -1)  # here, sines come first
    column = column.roll(dim // 4, -1)
    return torch.cat([column.repeat(rows, 1), row.repeat_interleave(columns, 0)], -1)


class TimeMlp(nn.Module):
    """A number (B,) -> (B, D): its sinusoids through a small MLP."""

    def __init__(self, width):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t):
        return self.mlp(time_embedding(t, 256))


class TextEmbedder(nn.Module):
    """Words (B, M, W) -> (B, M, D). y_embedding: what stands for no caption, not trained."""

    def __init__(self, cfg):
        super().__init__()
        null = torch.randn(cfg.text_tokens, cfg.text_width) / cfg.text_width**0.5
        self.register_buffer("y_embedding", null)
        self.y_proj = Mlp(cfg.text_width, cfg.width, cfg.width)

    def forward(self, text):
        return self.y_proj(text)


class FinalLayer(nn.Module):
    """Tokens (B, T, S, D) -> the numbers of their patches, (B, T, S, channels).

    Without the released code's mask of frames, which nothing here needs.
    """

    def __init__(self, width, channels):
        super().__init__()
        self.scale_shift_table = nn.Parameter(torch.randn(2, width) / width**0.5)
        self.linear = nn.Linear(width, channels)

    def forward(self, x, c):
        rows = self.scale_shift_table + c[:, None]  # (B, 2, D)
        shift, scale = rows[:, :, None, None].unbind(1)  # (B, 1, 1, D) each
        return self.linear(modulate(x, shift, scale))


class STDiT3(nn.Module):
    """A film (B, C, T, H, W) -> the network's output of each place, (B, C_out, T, H, W)."""

    def __init__(self, cfg, film, channels_out):
        super().__init__()
        self.cfg = cfg
        D = cfg.width
        C, T, H, W = film
        rows = math.ceil(H / 2)
        columns = math.ceil(W / 2)
        self.x_embedder = nn.ModuleDict({"proj": nn.Conv3d(C, D, (1, 2, 2), (1, 2, 2))})
        self.t_embedder = TimeMlp(D)
        self.fps_embedder = TimeMlp(D)
        self.t_block = nn.Sequential(nn.SiLU(), nn.Linear(D, 6 * D))
        self.y_embedder = TextEmbedder(cfg)
        self.spatial_blocks = nn.ModuleList()
        self.temporal_blocks = nn.ModuleList()
        for _ in range(cfg.depth):
            self.spatial_blocks.append(STDiT3Block(D, cfg.heads))
            self.temporal_blocks.append(STDiT3Block(D, cfg.heads, temporal=True))
        self.final_layer = FinalLayer(D, 4 * channels_out)
        self.start()
        self.register_buffer(
            "places", place_embedding(rows, columns, cfg.size, D), persistent=False
        )
        self.register_buffer("time_turn", line(T, D // cfg.heads), persistent=False)
        # Ours: the paper has no rotary positions here. For proav_dit.py's tokens they were the
        # largest gain at toy size; here they have not been left out to see.
        space_turn = grid((rows, columns), D // cfg.heads) if cfg.rope else None
        self.register_buffer("space_turn", space_turn, persistent=False)

    def start(self):
        """The first weights, much as in Open-Sora; and the output begins at zero, as in DiT."""
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                nn.init.xavier_uniform_(layer.weight)
                nn.init.zeros_(layer.bias)
        zeroed(self.fps_embedder.mlp[2])
        # Temporal blocks start as nothing.
        for block in self.temporal_blocks:
            for layer in (block.attn.proj, block.cross_attn.proj, block.mlp.fc2):
                nn.init.zeros_(layer.weight)
        zeroed(self.final_layer.linear)

    def forward(self, x, t, text, text_mask=None):
        """x (B, C, T, H, W); t (B,) in 0 ... 1000; words (B, M, W) and which count (B, M)."""
        H, W = x.shape[3:]
        x = F.pad(x, (0, W % 2, 0, H % 2))
        x = self.x_embedder["proj"](x)  # (B, D, T, rows, columns)
        rows, columns = x.shape[3:]
        x = x.flatten(3).permute(0, 2, 3, 1) + self.places  # (B, T, S, D)
        fps = t.new_full((1,), self.cfg.fps)
        c = self.t_embedder(t) + self.fps_embedder(fps)  # (B, D)
        c6 = self.t_block(c)[:, None]  # (B, 1, 6 * D)
        y = self.y_embedder(text)  # (B, M, D)
        for spatial, temporal in zip(self.spatial_blocks, self.temporal_blocks, strict=True):
            # None: all tokens count.
            x = recomputed(self.cfg, spatial, x, y, c6, text_mask, None, self.space_turn)
            x = recomputed(self.cfg, temporal, x, y, c6, text_mask, None, self.time_turn)
        x = self.final_layer(x, c)  # (B, T, S, 2 * 2 * C_out)
        x = x.unflatten(3, (2, 2, -1)).unflatten(2, (rows, columns))
        x = x.permute(0, 6, 1, 2, 4, 3, 5)  # (B, C_out, T, rows, 2, columns, 2)
        return x.flatten(5).flatten(3, 4)[..., :H, :W].float()


# ---- Text. The loader's workers turn captions into numbers; the model, or a T5, reads those.

LETTERS = 12  # of a word; the rest is not read


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


@torch.no_grad()
def read(words, cfg):
    """What spell() wrote, in a batch -> what the model takes, and the mask (B, M) of its words."""
    if not cfg.t5:
        return words, words.any(-1)  # (B, M, LETTERS)
    mask = words > 0
    # T5 is known to overflow in fp16.
    with torch.autocast(words.device.type, enabled=False):
        return t5(cfg.t5, "encoder", words.device)(words, mask).last_hidden_state, mask


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


def t5_width(folder):
    """Features of a word of the T5 in a folder; None if there is none."""
    return data.config_beside(f"{folder}/config.json").get("d_model")


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


# ---- The whole model


def as_clips(x):
    """What a codec decodes -> the same as {"video": uint8 (B, F, H, W, 3), "audio": (B, L)}."""
    clips = {}
    if "video" in x:
        clips["video"] = data.to_uint8(x["video"]).cpu()
    if "audio" in x:
        clips["audio"] = x["audio"].float().clamp(-1, 1).cpu()
    return clips


class UniForm(nn.Module):
    """Codec (frozen), text encoder, task token and STDiT3; called, it denoises a film."""

    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        codec = PretrainedCodec if cfg.codec == "pretrained" else SmallCodec
        self.codec = codec(cfg).requires_grad_(False)
        self.text = nn.Identity() if cfg.t5 else ByteText(cfg)
        (C, T, h, w), (_, S, _) = latent_shapes(cfg)
        k = S // T  # columns of the sound
        self.sound = k
        self.shape = (C, T, h, k + w)  # of the film, but for the task's columns
        self.register_buffer("is_sound", torch.arange(k + w) < k, persistent=False)
        n = task_columns(cfg)
        self.task_shape = (C, T, h, n)
        self.task = nn.Embedding(len(TASKS), C * T * h * n)
        self.dit = STDiT3(cfg, (C, T, h, n + k + w), 2 * C if cfg.learn_sigma else C)
        self.edges = names_like(self, "codec|text|embed|table|final|task")

    def forward(self, x, t, task, words, mask):
        """Film (B, C, T, h, k + w), steps t (B,), one of TASKS; words, mask of read().

        -> (B, 2 C or C, T, h, k + w)
        """
        token = self.task.weight[TASKS.index(task)].view(self.task_shape)
        x = torch.cat([token.expand(len(x), *self.task_shape), x], -1)  # (B, C, T, h, 1 + k + w)
        # spell() gives the empty caption one word. It is no caption: all of its words are the null
        # embedding.
        none = mask.sum(1, keepdim=True) == 1  # (B, 1)
        text = torch.where(none[..., None], self.dit.y_embedder.y_embedding, self.text(words))
        out = self.dit(x, t * (1000 / self.cfg.diffusion_steps), text, mask | none)
        return out[..., token.shape[-1] :]

    def film(self, z, n):
        """Latents z_v (n, C, T, h, w), z_a (n, C_a, S, N), or one -> (n, C, T, h, k + w)."""
        film = torch.zeros(n, *self.shape, device=self.is_sound.device)
        C, T, _, _ = self.shape
        if "z_a" in z:
            film[..., : self.sound] = to_columns(z["z_a"], T, C)
        if "z_v" in z:
            film[..., self.sound :] = z["z_v"]
        return film

    def audio(self, film):
        """The sound's columns of a film, (B, C, T, h, k)."""
        return film[..., : self.sound]

    def video(self, film):
        """The video's columns of a film, (B, C, T, h, w)."""
        return film[..., self.sound :]

    def made(self, task):
        """Which columns (k + w,) of a film a task makes."""
        if task == "t2av":
            return torch.ones_like(self.is_sound)
        return self.is_sound if task == "v2a" else ~self.is_sound

    @torch.no_grad()
    def encode(self, batch):
        """A batch on the device -> the latents z_v and z_a of what it has."""
        # SDXL's VAE is known to overflow in fp16, and what is encoded once may take its time.
        with torch.autocast(self.is_sound.device.type, enabled=False):
            return self.codec.encode(batch)

    @torch.no_grad()
    def decode(self, film, task):
        """Film -> what the task makes of {"video": uint8 (B, F, H, W, 3), "audio": (B, L)}."""
        _, (C_a, _, _) = latent_shapes(self.cfg)
        z = {}
        if task != "v2a":
            z["z_v"] = self.video(film)
        if task != "a2v":
            z["z_a"] = from_columns(self.audio(film), C_a)
        with torch.autocast(film.device.type, enabled=False):
            return as_clips(self.codec.decode(z))


# ---- Process: DDPM, and the losses of the three tasks


def posterior(abar):
    """Of a chain of noise levels abar (n,): the terms of q(x_(i-1) | x_i, x_0) = N(mean, variance).

    -> (n, 4): mean = column 0 * x_0 + column 1 * x_i; columns 2 and 3: the logarithms of its
    variance, and of beta_i, between which the learned variance lies (Nichol and Dhariwal 2021).
    """
    before = F.pad(abar[:-1], (1, 0), value=1.0)
    beta = 1 - abar / before
    x0_share = beta * before.sqrt() / (1 - abar)
    xi_share = (1 - before) * (1 - beta).sqrt() / (1 - abar)
    variance = beta * (1 - before) / (1 - abar)
    variance[0] = variance[:2].max()  # is 0, which has no logarithm
    return torch.stack([x0_share, xi_share, variance.log(), beta.log()], 1)


def across(values):
    """A number for each clip (B,) -> (B, 1, 1, 1, 1), to go with films."""
    return values.view(-1, 1, 1, 1, 1)


class Diffusion:
    """q(x_t | x_0) = N(sqrt(abar) x_0, (1 - abar) I), undone by a network that estimates the noise.

    The paper leaves out the roots (section 3.1.1). model: for codec and shapes; what is called in
    training is net, the same compiled, or as DDP wraps it.
    """

    def __init__(self, model):
        self.model = model
        self.cfg = model.cfg
        self.T = model.cfg.diffusion_steps
        betas = torch.linspace(1e-4, 0.02, self.T, dtype=torch.float64) * (1000 / self.T)
        self.abar = torch.cumprod(1 - betas, 0)  # (T,)
        # Kept where the network is, so that no step waits for them.
        device = next(model.parameters()).device
        self.alpha = self.abar.sqrt().float().to(device)
        self.sigma = (1 - self.abar).sqrt().float().to(device)
        self.table = posterior(self.abar).float().to(device)  # (T, 4)

    def draw(self, keys, device):
        """Steps t (B,) and noise (B, C, T, h, k + w), each clip's from its own key.

        In training no key comes twice: it is of a number that counts on over the epochs.
        """
        draws = generators(keys, device)
        u = torch.stack([torch.rand((), generator=own, device=device) for own in draws])
        return self.draw_steps(u), normal(draws, self.model.shape)

    def draw_steps(self, u):
        """u (B,) in [0, 1) -> the steps to train at, uniform in 0 ... T - 1."""
        return (u * self.T).long()

    def noise_estimate(self, out, x, t):
        """What the network's output (B, C, T, h, k + w) says of the noise in x."""
        return out

    def weight(self, t):
        """Of the squared errors at the steps t (B,); 1 in the paper."""
        return 1.0

    def estimate(self, net, x, t, *inputs):
        """-> the noise in x; and where the variance of x_(t-1) lies, from 0, the posterior's, to 1,
        beta, or None if it is not learned. Both (B, C, T, h, k + w)."""
        out = net(x, t, *inputs).float()
        share = None
        if self.cfg.learn_sigma:
            out, share = out.chunk(2, 1)
            share = (share + 1) / 2
        return self.noise_estimate(out, x, t), share

    def loss(self, net, batch, level=None):
        """Eq. 1-3 -> loss; {"video", "audio"}, the mean squared errors of their noise.

        batch: z_v, z_a, words, key, step. A training step has one task. With level (B,) in [0, 1),
        t / T to use instead of drawn steps, which is validation, each of the three has its turn.
        What is reported of a stream is its mean over the two tasks that make it: hence a training
        step reports 3/2 of a stream that it makes, and 0 of one that it is given.
        """
        x0 = self.model.film(batch, len(batch["key"]))
        t, eps = self.draw(batch["key"], x0.device)
        if level is None:
            number = data.clip_key(self.cfg.seed, f"task {batch['step']}")  # for all processes
            tasks = [TASKS[number % 3]]
        else:
            t = (level * self.T).long()
            tasks = TASKS
        words, mask = read(batch["words"], self.cfg)

        fair = 3 / 2 / len(tasks)  # two of three tasks make a stream
        total = 0
        parts = {"video": x0.new_zeros(()), "audio": x0.new_zeros(())}
        for task in tasks:
            error, square = self.errors(net, x0, eps, t, task, words, mask)
            # The masks of eq. 1-3: only what the task makes has a loss.
            if task in ("t2av", "a2v"):  # eq. 2, 3
                total = total + self.model.video(error).mean()
                parts["video"] += fair * self.model.video(square).mean()
            if task in ("t2av", "v2a"):  # eq. 1, 3
                total = total + self.cfg.audio_weight * self.model.audio(error).mean()
                parts["audio"] += fair * self.model.audio(square).mean()
        return total, parts

    def errors(self, net, x0, eps, t, task, words, mask):
        """What is minimized, and the squared error of the noise, (B, C, T, h, k + w) each."""
        x_t = across(self.alpha[t]) * x0 + across(self.sigma[t]) * eps
        known = x0 if self.cfg.cond_noise == "clean" else x_t
        x = torch.where(self.model.made(task), x_t, known)
        eps_theta, share = self.estimate(net, x, t, task, words, mask)
        square = (eps - eps_theta).square()
        error = self.weight(t) * square
        if share is not None:
            error = error + self.bound(x0, x_t, t, eps_theta.detach(), share)
        return error, square.detach()

    def loss_of_clips(self, net, batch, level=None):
        """loss() of a batch of clips, which are encoded on the way."""
        return self.loss(net, {**batch, **self.model.encode(batch)}, level)

    def bound(self, x0, x_t, t, eps, share):
        """The variational bound, in bits per number: teaches the variance alone, eps being fixed.

        KL(q(x_(t-1) | x_t, x_0) || p(x_(t-1) | x_t)); at t = 0, -log p(x_0 | x_1), as a density.
        """
        x0_share, _, log_low, log_high = [across(x) for x in self.table[t].unbind(1)]
        x0_theta = (x_t - across(self.sigma[t]) * eps) / across(self.alpha[t])
        log_variance = share * log_high + (1 - share) * log_low
        off = x0_share * (x0 - x0_theta)  # between the two means; at t = 0, from x_0
        squares = (log_low.exp() + off.square()) / log_variance.exp()
        kl = 0.5 * (log_variance - log_low - 1 + squares)
        density = 0.5 * (math.log(2 * math.pi) + log_variance + off.square() / log_variance.exp())
        return torch.where(across(t) == 0, density, kl) / math.log(2)

    def times(self, steps):
        """The steps t at which sampling calls the network, rising: evenly from 0 to T - 1."""
        return torch.linspace(self.T - 1, 0, steps).round().long().flip(0)

    def sample(self, noise, task, given, words, negative, guidance, steps):
        """Film (B, C, T, h, k + w) from noise(), which draws such normal noise.

        task: one of TASKS; given: a film (B, C, T, h, k + w), of which the columns that the task
        does not make are known. words (B, M, ...), and those of a negative prompt (M, ...), lead by
        eps_n + w (eps_c - eps_n), where w is guidance. steps: how often the network is called.
        """
        cfg = self.cfg
        copies = 1 if guidance == 1 else 2
        if copies == 2:
            words = torch.cat([words, negative.expand_as(words)])
        text = read(words, cfg)
        made = self.model.made(task)  # (k + w,)
        times = self.times(steps)
        abar = self.abar[times]
        alpha = abar.sqrt().tolist()
        sigma = (1 - abar).sqrt().tolist()
        table = posterior(abar).tolist()
        x = noise()
        clean = cfg.cond_noise == "clean"
        for i in reversed(range(steps)):
            known = given if clean else alpha[i] * given + sigma[i] * noise()
            x = torch.where(made, x, known)
            t = torch.full((len(words),), times[i].item(), device=x.device)
            eps, share = self.estimate(self.model, x.repeat(copies, 1, 1, 1, 1), t, task, *text)
            if copies == 2:
                eps_c, eps_n = eps.chunk(2)
                eps = eps_n + guidance * (eps_c - eps_n)
            x0 = (x - sigma[i] * eps) / alpha[i]
            if i == 0:
                x = x0
            elif cfg.sampler == "ddim":
                x = alpha[i - 1] * x0 + sigma[i - 1] * eps
            else:
                x0_share, xi_share, log_low, log_high = table[i]
                log_variance = torch.tensor(log_low)
                if share is not None:  # of the conditional half
                    log_variance = log_low + share[: len(x)] * (log_high - log_low)
                x = x0_share * x0 + xi_share * x + torch.exp(0.5 * log_variance) * noise()
        return torch.where(made, x, given)


class Velocity(Diffusion):
    """What makes minutes of training suffice. Ours, not in the paper: the network's output stands
    for the velocity v = alpha eps - sigma x_0, and it is v's error that is minimized."""

    def noise_estimate(self, out, x, t):
        return across(self.sigma[t]) * x + across(self.alpha[t]) * out

    def draw_steps(self, u):
        """Log-normal noise levels, as in EDM (Karras et al. 2022): fewer of those that hide all."""
        mean, deviation = self.cfg.noise_levels
        ratio = torch.exp(mean + deviation * 2**0.5 * torch.erfinv(2 * u - 1))
        return torch.searchsorted(self.sigma / self.alpha, ratio).clamp(max=self.T - 1)

    def weight(self, t):
        """Makes the squared error of eps that of v: an error e in v is alpha e in eps."""
        return 1 / across(self.alpha[t]).square()

    def times(self, steps):
        """Evenly from T / steps - 1, not 0, to T - 1: the last steps start from more noise."""
        return torch.tensor([(i + 1) * self.T // steps - 1 for i in range(steps)])


def build_process(model):
    return Velocity(model) if model.cfg.predict == "velocity" else Diffusion(model)


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


def count(module):
    return sum(p.numel() for p in module.parameters())


def load_start(model, path):
    """--init_from: a checkpoint's averaged weights or bare ones; of Open-Sora, its STDiT3's."""
    state = data.read_weights(path)
    state = state.get("ema", state)
    if "x_embedder.proj.weight" in state:
        state.pop("rope.freqs", None)  # a constant: line() has it
        model = model.dit
    data.load_weights(model, state, path)


def some_clips(dataset, cfg, n):
    """The first n clips, on the CPU, one by one."""
    return [data.to_device(data.make_batch(dataset, cfg.seed, [i]), "cpu") for i in range(n)]


def train_vae(cfg, train, val, device):
    """Stage vae: train the small codec, to OUT/vae/ckpt.pt."""
    cfg = dataclasses.replace(
        cfg,
        out=f"{cfg.out}/vae",
        steps=cfg.vae_steps,
        batch_size=cfg.vae_batch_size,
        lr=cfg.vae_lr,
        betas=cfg.vae_betas,
        optimizer=cfg.vae_optimizer,
    )
    torch.manual_seed(cfg.seed)
    codec = SmallCodec(cfg)
    if cfg.init_from:
        load_start(codec, cfg.init_from)
    elif RANK == 0 and not Path(f"{cfg.out}/ckpt.pt").exists():
        codec.start(some_clips(train, cfg, 64))
    codec = codec.to(device)
    if WORLD > 1:  # the other processes get that start from the first
        for p in codec.parameters():
            dist.broadcast(p.data, 0)
    say(f"Stage vae: {count(codec):,} parameters on {device}, data {cfg.data}, to {cfg.out}")

    shown = data.make_batch(val, cfg.seed, range(min(cfg.samples, len(val))))
    shown = data.to_device(shown, device)

    def rebuilt(ema):
        clips = as_clips(ema.decode(ema.encode(shown)))
        return clips["video"], clips["audio"]

    fit(codec, vae_loss, cfg, train, val, rebuilt)


def load_small(codec, cfg, train):
    """Fill the codec from OUT/vae/ckpt.pt, and measure how to scale its latents."""
    path = f"{cfg.out}/vae/ckpt.pt"
    if WORLD > 1:
        dist.barrier()  # the first process has saved it
    state = data.load_checkpoint(path)
    if state.get("step", 0) < state.get("cfg", {}).get("steps", 1):
        raise data.UserError(f"{path} is not trained to its end: run --stage vae first.")
    for name in ("fps", "rate", "n_mels", "hop", "window", "n_fft", "floor"):
        if state["cfg"][name] != getattr(cfg, name):
            raise data.UserError(
                f"{path} was trained with --{name} {state['cfg'][name]}: keep to that, or train "
                "another codec with another --out."
            )
    data.load_weights(codec, state["ema"], path)
    codec.measure(some_clips(train, cfg, 256))


def check_codec(codec, cfg):
    """Refuse to go on with a run of another codec."""
    run = Path(f"{cfg.out}/ckpt.pt")
    if run.exists():
        old = data.load_checkpoint(run).get("ema", {})
        for name, p in codec.named_parameters():
            if not torch.equal(old.get(f"codec.{name}", p), p):
                raise data.UserError(
                    f"{run} was trained with another codec: choose another --out, or move it away."
                )


def train_dit(cfg, train, val, device):
    """Stage dit: train the transformer on latents of the codec at hand."""
    if cfg.codec == "pretrained":
        check_files(cfg)
    torch.manual_seed(cfg.seed + 1)
    model = UniForm(cfg)
    if cfg.init_from:
        load_start(model, cfg.init_from)
    if cfg.codec == "pretrained":
        load_pretrained(model.codec, cfg)
    else:
        load_small(model.codec, cfg, train)
    check_codec(model.codec, cfg)
    model = model.to(device)
    if cfg.codec == "small":
        examine(model.codec, val, device)

    shown = [val[i]["caption"] for i in range(min(cfg.samples, len(val)))]
    process = build_process(model)
    loss = process.loss_of_clips
    if cfg.cache_latents:
        loss = process.loss
        train = data.Latents(model, train, cfg.cache_latents, "train", device, RANK, WORLD)
        val = data.Latents(model, val, min(cfg.val_clips, len(val)), "val", device, RANK, WORLD)
    say(f"Stage dit: {count(model.dit):,} parameters on {device}, to {cfg.out}")

    def samples(ema):
        prompt = shown if cfg.text_drop < 1 else None
        return sample(ema, len(shown), prompt=prompt, seed=cfg.seed)

    fit(model, loss, cfg, Captioned(train, cfg, varied=True), Captioned(val, cfg), samples)


# ---- Sampling and the command line


def condition(cfg, n, video, audio):
    """What sample() was given, for n clips -> the task, and {}, {"video"} or {"audio"}.

    video (n, F, H, W, 3), audio (n, L). Raises data.UserError for both, and for what is not one
    window, or n of them.
    """
    if video is not None and audio is not None:
        raise data.UserError("Give a video or a sound, not both: the other is what is made.")
    if video is not None:
        window = (cfg.frames, cfg.size, cfg.size, 3)
        return "v2a", {"video": data.windows(video, n, window)}
    if audio is not None:
        window = (cfg.frames * cfg.rate // cfg.fps,)
        return "a2v", {"audio": data.windows(torch.as_tensor(audio).float(), n, window)}
    return "t2av", {}


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

    The task follows from what is given: video ([n,] F, H, W, 3) uint8 or audio ([n,] L) comes back
    as it is, with the other stream made for it; else both are made. prompt, or label for "a video
    of <label>": one for all clips or a list of n. Clip i depends on (seed, i), not on n or
    batch_size. Raises data.UserError for conditions that exclude each other or do not fit.
    """
    cfg = model.cfg
    device = next(model.parameters()).device
    captions = data.captions_for(n, prompt, label)
    if cfg.text_drop == 1 and (any(captions) or negative_prompt):
        raise data.UserError("This model was trained without text: leave out prompt and label.")
    task, given = condition(cfg, n, video, audio)
    steps = steps or cfg.sample_steps
    if steps > cfg.diffusion_steps:
        raise data.UserError("--steps must not exceed --diffusion_steps.")
    guidance = cfg.guidance if guidance is None else guidance
    avoided = negative_prompt or ""
    if not isinstance(avoided, str):
        raise data.UserError("--negative_prompt is one text for all clips.")
    negative = torch.from_numpy(spell(avoided, cfg)).to(device)
    if captions == [avoided] * n:
        guidance = 1  # with the same words on both sides it would change nothing

    words = torch.from_numpy(np.stack([spell(caption, cfg) for caption in captions]))
    keys = torch.tensor([data.clip_key(seed, f"sample {i}") for i in range(n)])
    dtype = precision(cfg, device)
    autocast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
    process = build_process(model)
    made = []
    for first in tqdm(range(0, n, batch_size), "sampling", disable=n <= batch_size, leave=False):
        part = slice(first, first + batch_size)
        known = data.to_device({name: x[part] for name, x in given.items()}, device)
        noise = noise_of(keys[part], model.shape, device)
        said = words[part].to(device)
        with autocast:
            film = model.film(model.encode(known), len(said))
            film = process.sample(noise, task, film, said, negative, guidance, steps)
            made.append(model.decode(film, task))
    # What was given comes back as it was.
    clips = dict(given)
    for name in made[0]:
        clips[name] = torch.cat([x[name] for x in made])
    return clips["video"], clips["audio"]


def noise_of(keys, shape, device):
    """-> noise(), which draws normal noise (B, *shape) for the clips of these keys.

    On the CPU: all devices get the same.
    """
    draws = generators(keys, "cpu")

    def noise():
        return normal(draws, shape).to(device)

    return noise


def load(path, device="cpu", options=()):
    """A model ready to sample from a checkpoint of stage dit (its averaged weights).

    Options, as on the command line, override the config. Raises data.UserError when the file is
    not readable or does not fit.
    """
    state = data.load_checkpoint(path)
    if not any(name.startswith("dit.") for name in state.get("ema", {})):
        raise data.UserError(f"{path} holds no generator: give that of stage dit.")
    cfg = parse(options, data.read_config(Config, state, path))
    model = UniForm(cfg)
    data.load_weights(model, state["ema"], path)
    return model.to(device).eval()


def train(cfg):
    """Train what cfg.stage names."""
    device = setup(cfg)
    shape = (cfg.frames, cfg.size, cfg.fps, cfg.rate, cfg.seed)
    clips = data.open_dataset(cfg.data, "train", *shape)
    val = data.open_dataset(cfg.data, "val", *shape)
    if cfg.stage != "dit" and cfg.codec == "small":
        train_vae(cfg, clips, val, device)
        say(f"Reconstructions are in {cfg.out}/vae/samples.")
    if cfg.stage != "vae":
        train_dit(cfg, clips, val, device)
        say(
            f"Samples are in {cfg.out}/samples; more: "
            f"python sample.py --model uniform_dit --ckpt {cfg.out}/ckpt.pt"
        )


def main(argv=None):
    try:
        train(parse(argv))
    except data.UserError as error:
        data.end("uniform_dit.py", error)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    main()
