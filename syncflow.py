"""SyncFlow: two transformers side by side make video and its sound from text (arXiv 2412.15220).

The video tower is STDiT3 of Open-Sora. The audio tower has as many layers; its layer l attends to
F_l, the output of the video tower's temporal block l, by way of a small adaptor. So the sound is
made together with the picture, in every sampling step, and nothing flows back. Both follow one
rectified flow from noise to latents. Training, on latents of frozen codecs, has three stages: the
video tower and its text; the audio tower and its adaptors, while all else is frozen; then both
towers. Paper: Liu et al. 2024, whose code is not public.

    video (B, F, 3, H, W)                  audio (B, 1, L)                        section 3.1
        | VAE                                  | VAE
    z_v (B, C, T, h, w)                    z_a (B, D_A, T_a)
        x_t = (1 - t) noise + t z, the same t in both; t = 0 is noise
        | patches (1, 2, 2)                    | linear
    tokens (B, T, S, D)                    steps (B, T_a, D)                      section 3.2
        | spatial block                        | self-attention
        | temporal block -- F_l -- adaptor --> | cross-attention to [ t | adaptor(F_l) ]
        |                                      | MLP                              depth times
    velocity (B, C, T, h, w)               velocity (B, D_A, T_a)                 eq. 2
        | VAE decoder                          | VAE decoder
    video                                  audio

B clips of F frames; L samples; T x h x w latents of C channels, T x S tokens; T_a steps of sound.

    python syncflow.py      # toy, all stages: 8.5 minutes on 2 cores, losses of 0.3 and 0.3
    torchrun --nproc_per_node=8 syncflow.py --data concerts      # after `python data.py prepare`
    python sample.py --model syncflow --prompt "a video of a red ball bouncing"
    python sample.py --model syncflow --video my.mp4    # sound for a video, never trained for
    python sample.py --model syncflow --size 48         # another size than it was trained at

As in the paper, whose video tower is Open-Sora's:

    S="python syncflow.py --preset paper --data concerts --t5 DIR --video_vae FILE"
    $S --stage vae; $S --stage audio --init_video FILE; $S --stage joint

The logged losses of video and audio are the mean squared errors of the velocity, in latents of mean
square 1: in validation a fresh network, which says nothing, has about 2 for each.

Where the paper is silent: learning rates and warm-up are Open-Sora's. Each stream's loss is a mean,
and the two are added: in one mean over both, the longer stream would rule. The adaptor has no
residual, and as many heads as the towers. It reads all T x S tokens of F_l, plus the time at which
they are: attention along time is relative, so the sound could not tell a first frame from a last
one. The time token is the video tower's embedding of t, so that in stage audio it is frozen, as is
the text. Mini-batch optimal transport pairs noises with clips by one assignment for both streams,
among the clips that a process has at a time, in training only. Codes are means of posteriors.
"1142" features, printed twice, are Open-Sora's 1152 (1142 does not divide by its 16 heads). A
dropped caption leaves no trace of its length.

Not as in the paper: its sound VAE, which is EnCodec's network with a KL term (the causal one of 24
kHz, with other strides), learns here without discriminators. The paper takes Open-Sora's weights
for its first stage, whose length here is ours. Ours alone, for toy and small: codecs trained here
(--codec small), whose sound is a mel spectrogram, as a waveform's phases are not learned in
minutes; rotary positions in the spatial blocks, and in the layers of sound, whose queries and keys
then are normed and start alike (--rope); layers of sound that norm first, and adaptors that add to
what they read (--prenorm); t that is logit-normal; captions that vary, for the text encoder learned
here. --noise_levels separate is an experiment: in training each stream has its own t.
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
    """Every option. Defaults: the paper's; where it is silent, Open-Sora's, EnCodec's, or ours."""

    preset: str = "paper"  # the row of PRESETS that the other values start from
    data: str = "toy"  # toy, toy:bounce,glide (some of its scenes), or a set of data.py prepare
    out: str = ""  # folder of the run; empty: out/syncflow/PRESET[-DATA]
    stage: str = "all"  # all, or one: vae, the codec; video; audio; joint (section 3.2)
    # the clip (section 4)
    frames: int = 32  # frames in a clip: 2 s
    size: int = 256  # height and width, pixels
    fps: int = 16  # frames per second
    rate: int = 48000  # audio samples per second; a clip has frames * rate / fps of them
    # a mel spectrogram: the small codec's sound, and what any sound codec is judged by
    n_mels: int = 64  # mel bands
    hop: int = 480  # samples between its columns
    window: int = 2048  # samples in the Hann window of the STFT
    n_fft: int = 2048  # length of its transform
    floor: float = 1e-3  # smallest magnitude before the logarithm
    griffin_lim: int = 60  # iterations to find the phases
    # codecs (section 3.1)
    codec: str = "original"  # original: Open-Sora's VAE and EnCodec's network; small: ours
    video_vae: str = ""  # original: file with Open-Sora's VAE 1.2
    audio_vae: str = ""  # original: checkpoint of a sound VAE; empty: trained in stage vae
    audio_channels: int = 1152  # numbers in a step of sound, D_A
    audio_strides: tuple = (8, 6, 5, 4)  # original: samples of a step are their product, 960
    audio_filters: int = 32  # original: channels next to the waveform
    video_patch: tuple = (4, 4, 4)  # small: frames, rows, columns in a latent
    video_channels: int = 8  # small: channels of a latent, C
    audio_patch: tuple = (5, 64)  # small: mel columns in a step, and all bands
    vae_width: int = 64  # small: channels of its convolutions
    vae_blocks: int = 2  # small: residual blocks of an encoder; a decoder has one more
    kl: float = 1e-3  # weight of the KL term
    need_good: bool = True  # no generator with a codec that trivial codes beat
    vae_steps: int = 100000  # optimizer steps of stage vae
    vae_batch_size: int = 16  # clips per step
    vae_lr: float = 3e-4  # learning rate
    vae_betas: tuple = (0.5, 0.9)  # of AdamW
    vae_optimizer: str = "adamw"  # adamw or muon, as --optimizer
    # the two towers, and their text (section 3.2)
    width: int = 1152  # features of a token, D
    depth: int = 28  # layers of each tower
    heads: int = 16  # heads of their attention
    rope: bool = False  # ours: rotary positions in spatial blocks and layers of sound
    adaptor: bool = True  # modality adaptors; without, the sound attends to F_l as it is
    kv: str = "flatten"  # of F_l: all tokens; or pool, their mean in each frame
    audio_from: str = "video"  # what the sound attends to: video, text (ablation), or both
    prenorm: bool = False  # sound: norms before attention and MLP; adaptors add to what they read
    t5: str = ""  # folder of a T5; empty: a small text encoder is learned here
    text_width: int = 4096  # features of a word (T5 XXL: 4096)
    text_tokens: int = 300  # words read of a caption, its opening included
    text_drop: float = 0.1  # share of captions dropped in training (section 3.2)
    # the process (section 3.1)
    ot: bool = True  # pair noises with clips by mini-batch optimal transport
    noise_levels: str = "shared"  # t of video and sound: shared; separate: each its own (ours)
    logit_normal: tuple = ()  # ours: mean, deviation of log(t / (1 - t)); empty: t uniform
    sample_steps: int = 50  # Euler steps
    guidance: float = 6.0  # strength w of classifier-free guidance; 1: none
    cache_latents: int = 0  # clips to encode once, before training; 0: encode batch by batch
    # training
    video_steps: int = 150000  # optimizer steps of stage video (ours)
    video_batch_size: int = 512  # clips per step over ALL processes
    steps: int = 150000  # of stage audio (section 4)
    batch_size: int = 512  # its clips per step: 16 on each of 32 GPUs
    joint_steps: int = 20000  # of stage joint
    joint_batch_size: int = 64  # its clips per step: 2 on each of 32 GPUs
    lr: float = 1e-4  # learning rate of stages video and audio
    joint_lr: float = 1e-4  # of stage joint
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
    init_video: str = ""  # start the video tower from these weights: Open-Sora's STDiT3
    log_every: int = 10  # steps between rows of log.csv
    eval_every: int = 5000  # steps between validations, checkpoints and samples
    val_clips: int = 64  # validation clips
    samples: int = 4  # clips to sample then


CHOICES = {
    "stage": ("all", "vae", "video", "audio", "joint"),
    "codec": ("original", "small"),
    "kv": ("flatten", "pool"),
    "audio_from": ("video", "text", "both"),
    "noise_levels": ("shared", "separate"),
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
        audio_channels=32,
        vae_steps=700,
        vae_batch_size=4,
        vae_lr=5e-3,
        vae_betas=(0.9, 0.99),
        vae_optimizer="muon",
        width=128,
        depth=3,
        heads=4,
        rope=True,
        prenorm=True,
        text_width=64,
        text_tokens=20,
        logit_normal=(-0.7, 1.3),
        sample_steps=20,
        guidance=1.5,
        cache_latents=4096,
        video_steps=2500,
        video_batch_size=4,
        steps=4000,
        batch_size=4,
        joint_steps=1000,
        joint_batch_size=4,
        lr=3e-3,
        joint_lr=1e-3,
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
        rate=16000,
        hop=160,
        window=1024,
        n_fft=1024,
        codec="small",
        audio_channels=32,
        vae_steps=10000,
        vae_lr=2e-3,
        vae_betas=(0.9, 0.99),
        width=384,
        depth=6,
        heads=6,
        rope=True,
        prenorm=True,
        text_width=256,
        text_tokens=24,
        logit_normal=(-0.7, 1.3),
        guidance=2.0,
        cache_latents=20000,
        video_steps=20000,
        video_batch_size=64,
        steps=15000,
        batch_size=64,
        joint_steps=5000,
        lr=3e-4,
        warmup=200,
        ema=0.999,
        eval_every=1000,
    ),
    # 32 GPUs of 80 GB, as in the paper; fewer: raise --grad_accum.
    "paper": dict(checkpoint=True),
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
    for name, n in {"betas": 2, "vae_betas": 2, "audio_patch": 2, "video_patch": 3}.items():
        if len(getattr(cfg, name)) != n:
            raise data.UserError(f"--{name} needs {n} numbers.")
    if len(cfg.logit_normal) not in (0, 2):
        raise data.UserError("--logit_normal needs two numbers, or none: () is uniform.")

    # Codec: whole patches, whole steps of sound.
    samples = cfg.frames * cfg.rate // cfg.fps
    t, h, w = cfg.video_patch if cfg.codec == "small" else (4, 8, 8)
    if cfg.frames % t or cfg.size % h or cfg.size % w:
        raise data.UserError(f"--frames must be a multiple of {t}, --size of {h} and {w}.")
    if samples % cfg.hop:
        raise data.UserError(f"--hop must divide the {samples} samples of a clip.")
    steps, bands = cfg.audio_patch
    if cfg.codec == "small" and (samples // cfg.hop % steps or bands != cfg.n_mels):
        raise data.UserError(
            f"--audio_patch must divide {samples // cfg.hop} mel columns, and have all "
            f"{cfg.n_mels} bands: a step of sound is one vector."
        )
    if cfg.codec == "original" and samples % math.prod(cfg.audio_strides):
        raise data.UserError(f"--audio_strides must divide the {samples} samples of a clip.")
    # Rotary positions turn pairs of channels.
    if cfg.width % 4 or cfg.width % (2 * cfg.heads):
        raise data.UserError("--width must divide by 4 and 2 * --heads.")
    if cfg.t5 and t5_width(cfg.t5) != cfg.text_width:
        raise data.UserError(
            f"--t5 {cfg.t5} is not the folder of a T5 whose words have --text_width "
            f"{cfg.text_width} features."
        )


# ---- The sound as a picture: a mel spectrogram, and the way back without a vocoder


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


# same as uniform_dit.py
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
# and learns what that misses. A step of sound is a patch of all mel bands: one vector.


# same as uniform_dit.py
def psnr(x, y):
    """10 log10(2^2 / MSE) of clips in [-1, 1], averaged over the batch, in dB."""
    mse = (x.float() - y.float()).square().flatten(1).mean(1).clamp(min=1e-12)  # (B,)
    return (10 * torch.log10(4 / mse)).mean()


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


# same as uniform_dit.py
def names_like(model, pattern):
    """The names of a model's parameters in which the pattern occurs."""
    return tuple(name for name, _ in model.named_parameters() if re.search(pattern, name))


# same as uniform_dit.py
def generators(keys, device):
    """A random generator for each clip, seeded by its own key (B,).

    So noise is the same however the clips are dealt to processes. Keys stay on the CPU: to read
    them, nothing waits for a GPU.
    """
    return [torch.Generator(device).manual_seed(key) for key in keys.tolist()]


# same as uniform_dit.py
def normal(draws, shape):
    """Normal noise (B, *shape), each clip's from its own generator."""
    return torch.stack([torch.randn(shape, generator=own, device=own.device) for own in draws])


# same as mm_diffusion.py
def zeroed(module):
    """Zero a layer: its residual branch starts as nothing, and the fresh network outputs 0."""
    for p in module.parameters():
        nn.init.zeros_(p)
    return module


# same as uniform_dit.py
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


# same as uniform_dit.py
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


# same as uniform_dit.py
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


# same as uniform_dit.py
def vae_loss(net, batch, t=None):
    """The loss of stage vae, as fit() wants it. t: this is validation, so the codes get no noise.

    An autoencoder knows no noise levels: the four quarters of its validation are equal.
    """
    return net(batch, batch["key"] if t is None else None)


# same as uniform_dit.py
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


# same as uniform_dit.py
def say(text):
    if RANK == 0:
        print(text, flush=True)


# ---- Codecs of the paper. First Open-Sora's video VAE: an image VAE, and one over time. Every part
# has its name in the released weights: hence odd names, and levels that count backwards.

conv2d = functools.partial(nn.Conv2d, padding="same")  # keeps the height and width


# same as uniform_dit.py
def chain(**parts):
    """Modules that run one after the other, each under its name."""
    return nn.Sequential(OrderedDict(parts))


# same as uniform_dit.py
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


# same as uniform_dit.py
def block_row(kind, before, width, count, groups):
    """count residual blocks of a kind, of which the first changes the width."""
    blocks = nn.Sequential(kind(before, width, groups))
    for _ in range(1, count):
        blocks.append(kind(width, width, groups))
    return blocks


# same as uniform_dit.py
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


# same as uniform_dit.py
def middle(width, groups):
    """What encoder and decoder have at the lowest resolution."""
    return chain(
        block_1=ResnetBlock(width, width, groups),
        attn_1=PixelAttention(width, groups),
        block_2=ResnetBlock(width, width, groups),
    )


# same as uniform_dit.py
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


# same as uniform_dit.py
def gaussian(moments):
    """(B, 2 z, ...) -> mean and log-variance of the latents, each (B, z, ...)."""
    mean, logvar = moments.chunk(2, dim=1)
    return mean, logvar.clamp(-30, 20)


# same as uniform_dit.py
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


# same as uniform_dit.py
class CausalConv(nn.Module):
    """3-D convolution that sees no later frame: (B, n, T, H, W) -> (B, m, T / stride, H, W)."""

    def __init__(self, n, m, kernel, stride=1, bias=True):
        super().__init__()
        side = kernel // 2  # rows and columns have zeros on both sides,
        self.conv = nn.Conv3d(n, m, kernel, (stride, 1, 1), (0, side, side), bias=bias)
        self.past = kernel - stride  # frames have them before the first only

    def forward(self, x):
        return self.conv(F.pad(x, (0, 0, 0, 0, self.past, 0)))


# same as uniform_dit.py
class TimeUpsample(CausalConv):
    """Twice as many frames: (B, n, T, H, W) -> (B, m / 2, 2 T, H, W)."""

    def forward(self, x):
        x = super().forward(x).unflatten(1, (-1, 2))  # (B, m / 2, 2, T, H, W)
        return x.transpose(2, 3).flatten(2, 3)  # two channels make two frames


# The temporal VAE's residual blocks: the same but for convolution, constant and a name.
causal_conv = functools.partial(CausalConv, bias=False)
CausalBlock = functools.partial(ResnetBlock, conv=causal_conv, eps=1e-5, shortcut="conv3")


# same as uniform_dit.py
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


# same as uniform_dit.py
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


# same as uniform_dit.py
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


# ---- The sound VAE: EnCodec's encoder and decoder of waveforms, SEANet, under that code's names;
# between them, in place of its quantizer, a normal posterior.


class WeightNormed(nn.Module):
    """A convolution whose kernels have a length weight_g and a direction weight_v."""

    def __init__(self, conv):
        super().__init__()
        weight = conv.weight.detach()
        self.weight_g = nn.Parameter(weight.flatten(1).norm(dim=1).view(-1, 1, 1))
        self.weight_v = nn.Parameter(weight)
        self.bias = conv.bias
        self.options = {"stride": conv.stride, "dilation": conv.dilation}
        transposed = isinstance(conv, nn.ConvTranspose1d)
        self.function = F.conv_transpose1d if transposed else F.conv1d

    def forward(self, x):
        weight = self.weight_g * F.normalize(self.weight_v, dim=(1, 2))
        return self.function(x, weight, self.bias, **self.options)


class WaveConv(nn.Module):
    """(B, n, L) -> (B, m, L / stride, rounded up). causal: no sample sees a later one."""

    def __init__(self, n, m, kernel, stride=1, dilation=1, causal=True, norm="weight_norm"):
        super().__init__()
        self.stride = stride
        self.causal = causal
        self.padding = (kernel - 1) * dilation + 1 - stride  # of both ends together
        conv = nn.Conv1d(n, m, kernel, stride, dilation=dilation)
        self.conv = normed("conv", conv, norm)

    def forward(self, x):
        extra = -x.shape[2] % self.stride  # so that the last window is full
        right = 0 if self.causal else self.padding // 2
        x = F.pad(x, (self.padding - right, right + extra), mode="reflect")
        return self.conv(x)


class WaveUpsample(nn.Module):
    """(B, n, L) -> (B, m, stride * L)."""

    def __init__(self, n, m, kernel, stride, causal=True, norm="weight_norm"):
        super().__init__()
        self.right = kernel - stride if causal else (kernel - stride) // 2
        self.left = kernel - stride - self.right
        self.convtr = normed("convtr", nn.ConvTranspose1d(n, m, kernel, stride), norm)

    def forward(self, x):
        x = self.convtr(x)
        return x[..., self.left : x.shape[2] - self.right]


def normed(name, conv, norm):
    """A convolution under a name, with weight norm, or with a group norm after it."""
    if norm == "weight_norm":
        return chain(**{name: WeightNormed(conv)})
    return chain(**{name: conv, "norm": nn.GroupNorm(1, conv.out_channels)})


class WaveLSTM(nn.Module):
    """Layers of an LSTM along time, added to their input (B, C, L)."""

    def __init__(self, width, layers):
        super().__init__()
        self.lstm = nn.LSTM(width, width, layers)

    def forward(self, x):
        steps = x.permute(2, 0, 1)  # (L, B, C)
        # Autocast would take fp16 here, whatever the rest takes.
        with torch.autocast(x.device.type, enabled=False):
            h, _ = self.lstm(steps.float())
        return x + h.permute(1, 2, 0)


class WaveBlock(nn.Module):
    """Convolutions of 3 and 1 samples at half the width, plus one of 1 of the input (B, C, L)."""

    def __init__(self, width, dilation, **how):
        super().__init__()
        half = width // 2
        self.block = nn.Sequential(
            nn.ELU(),
            WaveConv(width, half, 3, dilation=dilation, **how),
            nn.ELU(),
            WaveConv(half, width, 1, **how),
        )
        self.shortcut = WaveConv(width, width, 1, **how)

    def forward(self, x):
        return self.shortcut(x) + self.block(x)


class WaveEncoder(nn.Module):
    """(B, channels, L) -> (B, codes, L / product of the strides)."""

    def __init__(self, channels, filters, strides, codes, blocks=1, lstm=2, **how):
        super().__init__()
        layers = [WaveConv(channels, filters, 7, **how)]
        width = filters
        for stride in reversed(strides):
            layers += [WaveBlock(width, 2**j, **how) for j in range(blocks)]
            layers += [nn.ELU(), WaveConv(width, 2 * width, 2 * stride, stride, **how)]
            width = 2 * width
        layers += [WaveLSTM(width, lstm), nn.ELU(), WaveConv(width, codes, 7, **how)]
        self.model = nn.Sequential(*layers)

    def forward(self, x):
        return self.model(x)


class WaveDecoder(nn.Module):
    """The encoder in reverse."""

    def __init__(self, channels, filters, strides, codes, blocks=1, lstm=2, **how):
        super().__init__()
        width = filters * 2 ** len(strides)
        layers = [WaveConv(codes, width, 7, **how), WaveLSTM(width, lstm)]
        for stride in strides:
            layers += [nn.ELU(), WaveUpsample(width, width // 2, 2 * stride, stride, **how)]
            width = width // 2
            layers += [WaveBlock(width, 2**j, **how) for j in range(blocks)]
        layers += [nn.ELU(), WaveConv(width, channels, 7, **how)]
        self.model = nn.Sequential(*layers)

    def forward(self, x):
        return self.model(x)


def spectral_error(x, y):
    """Of waveforms (B, L): the mean error of magnitudes and their logarithms, in three windows."""
    total = 0
    windows = (64, 256, 1024)
    for n in windows:
        window = torch.hann_window(n, device=x.device)
        size_x, size_y = (
            torch.stft(w, n, n // 4, window=window, return_complex=True).abs() for w in (x, y)
        )
        total = total + F.l1_loss(size_x, size_y) / n**0.5
        total = total + F.l1_loss((size_x + 1e-3).log(), (size_y + 1e-3).log())
    return total / len(windows)


class WaveVAE(nn.Module):
    """Sound (B, 1, L) <-> codes (B, D_A, T_a)."""

    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        codes = cfg.audio_channels
        size = (1, cfg.audio_filters, cfg.audio_strides, codes)
        self.encoder = WaveEncoder(*size)
        self.moments = nn.Conv1d(codes, 2 * codes, 1)  # mean and log-variance
        self.decoder = WaveDecoder(*size)
        # Latents are codes less their mean, over a scale.
        self.register_buffer("mean", torch.zeros(codes, 1))
        self.register_buffer("scale", torch.ones(codes, 1))
        self.edges = ("encoder.model.0.", "moments")  # not for Muon

    def encode(self, audio):
        """-> mean and log-variance of the codes, each (B, D_A, T_a)."""
        return gaussian(self.moments(self.encoder(audio)))

    def forward(self, batch, keys=None):
        """Clips on the device -> loss of stage vae, {"audio": its reconstruction error}.

        keys (B,): of the clips, from which the noise of the codes is drawn. None: no noise.
        """
        real = batch["audio"]
        mean, logvar = (x.float() for x in self.encode(real))
        codes = mean
        if keys is not None:  # a draw from the posterior
            draws = generators(keys, real.device)
            codes = mean + torch.exp(0.5 * logvar) * normal(draws, mean.shape[1:])
        kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()  # to N(0, 1)
        made = self.decoder(codes).float()
        with torch.autocast(real.device.type, enabled=False):
            error = F.l1_loss(made, real) + spectral_error(made[:, 0], real[:, 0])
        return error + self.cfg.kl * kl, {"audio": error.detach()}

    @torch.no_grad()
    def measure(self, batches):
        """Set mean and scale, so that the latents of some clips have mean 0 and variance 1."""
        codes = torch.cat([self.encode(batch["audio"])[0] for batch in batches])
        deviation, mean = torch.std_mean(codes, (0, 2))
        self.mean.copy_(mean[:, None])
        self.scale.copy_(deviation[:, None].clamp(min=1e-5))


class OriginalCodec(nn.Module):
    """Open-Sora 1.2's video VAE, filled by load_video_vae(), and a WaveVAE."""

    images = 8  # frames that the image VAE codes at a time: memory grows with them
    sd_scale = 0.18215  # of image latents; SDXL's own is another, but Open-Sora keeps this one

    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        self.spatial_vae = AutoencoderKL(3, (128, 256, 512, 512), blocks=2, z_channels=4)
        self.temporal_vae = TemporalVAE()
        # Mean and deviation of the channels of its latents, measured by Open-Sora.
        stats = torch.tensor([[-0.10, 0.34, 0.27, 0.98], [3.85, 2.32, 2.33, 3.06]])
        self.register_buffer("stats", stats.view(2, 4, 1, 1, 1))
        self.wave = WaveVAE(cfg)

    def encode(self, batch):
        """Video (B, F, 3, H, W), audio (B, 1, L) in [-1, 1], or one of them -> their latents.

        z_v (B, 4, F / 4, H / 8, W / 8); z_a (B, D_A, T_a, 1).
        """
        z = {}
        if "video" in batch:
            size = batch["video"].shape[:2]  # B, F
            images = batch["video"].flatten(0, 1).split(self.images)
            codes = torch.cat([self.spatial_vae.encode(part)[0] for part in images])
            codes = codes.unflatten(0, size).transpose(1, 2)  # (B, 4, F, H / 8, W / 8)
            # In one piece, as the paper's factor of 4 says: Open-Sora's pieces of 17 frames would
            # make 9 latents of 32 frames.
            mean, _ = self.temporal_vae.encode(self.sd_scale * codes)
            shift, scale = self.stats
            z["z_v"] = (mean - shift) / scale
        if "audio" in batch:
            codes, _ = self.wave.encode(batch["audio"])
            z["z_a"] = ((codes - self.wave.mean) / self.wave.scale)[..., None]
        return z

    def decode(self, z):
        """Latents, or one of them -> video (B, F, 3, H, W), audio (B, L)."""
        batch = {}
        if "z_v" in z:
            shift, scale = self.stats
            codes = self.temporal_vae.decode(z["z_v"] * scale + shift, self.cfg.frames)
            codes = codes.transpose(1, 2) / self.sd_scale  # (B, F, 4, H / 8, W / 8)
            parts = codes.flatten(0, 1).split(self.images)
            images = torch.cat([self.spatial_vae.decode(part) for part in parts])
            batch["video"] = images.unflatten(0, codes.shape[:2])
        if "z_a" in z:
            codes = z["z_a"][..., 0] * self.wave.scale + self.wave.mean
            batch["audio"] = self.wave.decoder(codes)[:, 0]
        return batch


@torch.no_grad()
def examine_wave(wave, val, device):
    """Print how far the log-mels of the rebuilt sound are from the true ones, on validation clips.

    Beside it, the clip's mean spectrum; and the SI-SDR, which phases decide. Raises data.UserError
    where the codec is not better than that spectrum.
    """
    cfg = wave.cfg
    mel = Mel(cfg).to(device)
    rows = []
    for batch in data.val_batches(val, cfg.val_clips, 16):
        real = data.to_device(batch, device)["audio"]
        made = wave.decoder(wave.encode(real)[0])
        true = mel(real)  # (B, 1, T, M)
        ours = (mel(made) - true).abs().mean((1, 2, 3))
        other = (true.mean(2, keepdim=True) - true).abs().mean((1, 2, 3))
        ratio = metrics.si_sdr(made[:, 0].cpu(), real[:, 0].cpu())
        rows.append(torch.stack([ours.cpu(), other.cpu(), ratio.float()]))
    ours, other, ratio = torch.cat(rows, 1).mean(1).tolist()
    say(f"Log-mel distance: codec {ours:.2f}, mean spectrum {other:.2f}; SI-SDR {ratio:.1f} dB")
    if cfg.need_good and not ours < other:  # nor is nan
        raise data.UserError(
            "The codec of the sound does not beat its baseline, nor would a generator: raise "
            "--vae_steps, or go on with --need_good false."
        )


# ---- Reading released weights


# same as uniform_dit.py
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


# same as uniform_dit.py
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


# same as uniform_dit.py
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


# ---- The video tower: STDiT3 of Open-Sora 1.2, under that code's names. Tokens are (B, T, S, D): T
# frames of S.


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


# same as uniform_dit.py
def recomputed(cfg, function, *inputs):
    """function(*inputs). With --checkpoint, backward computes again what is inside."""
    if cfg.checkpoint and torch.is_grad_enabled():
        return checkpoint(function, *inputs, use_reentrant=False)
    return function(*inputs)


# same as uniform_dit.py
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


# same as uniform_dit.py
class TimeMlp(nn.Module):
    """A number (B,) -> (B, D): its sinusoids through a small MLP."""

    def __init__(self, width):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t):
        return self.mlp(time_embedding(t, 256))


# same as uniform_dit.py
class TextEmbedder(nn.Module):
    """Words (B, M, W) -> (B, M, D). y_embedding: what stands for no caption, not trained."""

    def __init__(self, cfg):
        super().__init__()
        null = torch.randn(cfg.text_tokens, cfg.text_width) / cfg.text_width**0.5
        self.register_buffer("y_embedding", null)
        self.y_proj = Mlp(cfg.text_width, cfg.width, cfg.width)

    def forward(self, text):
        return self.y_proj(text)


# same as uniform_dit.py
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


def latent_shapes(cfg):
    """Shapes of a clip's latents: video (C, T, h, w), sound (D_A, T_a)."""
    samples = cfg.frames * cfg.rate // cfg.fps
    if cfg.codec == "original":
        video = (4, cfg.frames // 4, cfg.size // 8, cfg.size // 8)
        return video, (cfg.audio_channels, samples // math.prod(cfg.audio_strides))
    t, h, w = cfg.video_patch
    video = (cfg.video_channels, cfg.frames // t, cfg.size // h, cfg.size // w)
    return video, (cfg.audio_channels, samples // cfg.hop // cfg.audio_patch[0])


class VideoTower(nn.Module):
    """STDiT3: (B, C, T, H, W) -> the velocity (B, C_out, T, H, W), and the outputs F_l of its
    temporal blocks, depth times (B, T, S, D)."""

    def __init__(self, cfg, shape, channels_out):
        """shape (C, T, H, W). channels_out: C; released weights have 2 C."""
        super().__init__()
        self.cfg = cfg
        D = cfg.width
        C, T, H, W = shape
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
        # Positions are no weights: at another --size they are those of that size.
        places = place_embedding(rows, columns, cfg.size, D)
        self.register_buffer("places", places, persistent=False)
        self.register_buffer("time_turn", line(T, D // cfg.heads), persistent=False)
        # Ours: the paper has no rotary positions here.
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

    def forward(self, x, tau, text, text_mask=None):
        """tau (B,): 0 ... 1000, the latter noise; words (B, M, W), and which count (B, M)."""
        H, W = x.shape[3:]
        x = F.pad(x, (0, W % 2, 0, H % 2))
        x = self.x_embedder["proj"](x)  # (B, D, T, rows, columns)
        rows, columns = x.shape[3:]
        x = x.flatten(3).permute(0, 2, 3, 1) + self.places  # (B, T, S, D)
        fps = tau.new_full((1,), self.cfg.fps)
        c = self.t_embedder(tau) + self.fps_embedder(fps)  # (B, D)
        c6 = self.t_block(c)[:, None]  # (B, 1, 6 * D)
        y = self.y_embedder(text)  # (B, M, D)
        features = []
        for spatial, temporal in zip(self.spatial_blocks, self.temporal_blocks, strict=True):
            # None: all tokens count.
            x = recomputed(self.cfg, spatial, x, y, c6, text_mask, None, self.space_turn)
            x = recomputed(self.cfg, temporal, x, y, c6, text_mask, None, self.time_turn)
            features.append(x)
        x = self.final_layer(x, c)  # (B, T, S, 2 * 2 * C_out)
        x = x.unflatten(3, (2, 2, -1)).unflatten(2, (rows, columns))
        x = x.permute(0, 6, 1, 2, 4, 3, 5)  # (B, C_out, T, rows, 2, columns, 2)
        return x.flatten(5).flatten(3, 4)[..., :H, :W].float(), features


# ---- The audio tower, and the adaptors between the two (figure 2)


def turn_at(times, dim):
    """Turns of the times (N,).

    Frequencies are 100^(-2i / dim), not 10000^...: a clip has tens of steps of sound, in which
    slower turns would tell nothing.
    """
    freqs = 100 ** (-torch.arange(0, dim, 2) / dim)
    return turning(times[:, None] * freqs)


class AudioAttention(nn.Module):
    """x (B, N, D) attends to y (B, M, D), of which mask (B, M) tells what counts.

    rope (ours): queries and keys are normed per head, as in the video tower, and, where turns are
    given, turned by the times of x and y.
    """

    def __init__(self, width, heads, rope):
        super().__init__()
        self.heads = heads
        self.q_linear = nn.Linear(width, width)
        self.kv_linear = nn.Linear(width, 2 * width)
        self.proj = nn.Linear(width, width)
        size = width // heads
        self.q_norm = nn.RMSNorm(size, eps=1e-6) if rope else nn.Identity()
        self.k_norm = nn.RMSNorm(size, eps=1e-6) if rope else nn.Identity()

    def forward(self, x, y, mask=None, turn_x=None, turn_y=None):
        q = self.q_linear(x).unflatten(-1, (self.heads, -1))  # (B, N, heads, d)
        k, v = self.kv_linear(y).unflatten(-1, (2, self.heads, -1)).unbind(2)  # (B, M, heads, d)
        q = self.q_norm(q.float()).to(v)
        k = self.k_norm(k.float()).to(v)
        if turn_x is not None:
            q = rotate(q, turn_x)
            k = rotate(k, turn_y)
        if mask is not None:
            mask = mask[:, None, None]
        x = attend_where(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), mask)
        return self.proj(x)


class Adaptor(nn.Module):
    """Adapts features of the video (B, M, D) to the sound: self-attention, norm, linear layer.

    prenorm (ours): the attention also has a norm before it, and is added to what it reads.
    """

    def __init__(self, width, heads, rope, prenorm):
        super().__init__()
        self.enter_norm = nn.LayerNorm(width) if prenorm else None
        self.attn = AudioAttention(width, heads, rope)  # of the features to themselves
        self.norm = nn.LayerNorm(width)
        self.linear = nn.Linear(width, width)

    def forward(self, x):
        if self.enter_norm is None:
            x = self.attn(x, x)
        else:
            h = self.enter_norm(x)
            x = x + self.attn(h, h)
        return self.linear(self.norm(x))


class AudioLayer(nn.Module):
    """Self-attention, cross-attention, MLP on x (B, T_a, D), each with a norm: after it, as in the
    paper, or before it (prenorm, ours)."""

    def __init__(self, width, heads, rope, prenorm):
        super().__init__()
        self.prenorm = prenorm
        self.attn = AudioAttention(width, heads, rope)  # of the sound to itself
        self.cross_attn = AudioAttention(width, heads, rope)
        self.mlp = Mlp(width, 4 * width, width)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(3))

    def forward(self, x, y, mask, turn_x, turn_y):
        """y (B, M, D): the condition, of which mask (B, M) tells what counts."""
        norm1, norm2, norm3 = self.norms
        if self.prenorm:
            h = norm1(x)
            x = x + self.attn(h, h, None, turn_x, turn_x)
            x = x + self.cross_attn(norm2(x), y, mask, turn_x, turn_y)
            return x + self.mlp(norm3(x))
        x = norm1(x + self.attn(x, x, None, turn_x, turn_x))
        x = norm2(x + self.cross_attn(x, y, mask, turn_x, turn_y))
        return norm3(x + self.mlp(x))


class AudioTower(nn.Module):
    """(B, D_A, T_a) -> the velocity (B, D_A, T_a), as the features of the video tower suggest."""

    def __init__(self, cfg, shape_v, shape_a):
        """Shapes of the latents: (C, T, h, w) and (D_A, T_a)."""
        super().__init__()
        self.cfg = cfg
        D = cfg.width
        codes, steps = shape_a
        self.enter = nn.Linear(codes, D)
        self.layers = nn.ModuleList()
        self.adaptors = nn.ModuleList()
        for _ in range(cfg.depth):
            self.layers.append(AudioLayer(D, cfg.heads, cfg.rope, cfg.prenorm))
            if cfg.adaptor and cfg.audio_from != "text":
                self.adaptors.append(Adaptor(D, cfg.heads, cfg.rope, cfg.prenorm))
        self.leave = nn.Linear(D, codes)
        self.start()
        self.set_clock(shape_v, steps)

    def start(self):
        """The first weights, as in the video tower."""
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                nn.init.xavier_uniform_(layer.weight)
                nn.init.zeros_(layer.bias)
        zeroed(self.leave)
        if self.cfg.rope:
            # Queries and keys start with a large part in common. Turned by their times, their
            # product is largest where these are equal: the sound starts with what is seen when it
            # is heard, and has not to find that first.
            for layer in self.layers:
                keys, _ = layer.cross_attn.kv_linear.bias.data.chunk(2)
                nn.init.ones_(keys)
                nn.init.ones_(layer.cross_attn.q_linear.bias)

    def set_clock(self, shape_v, steps):
        """Positions of both towers in time, in one unit: steps of sound.

        A step is at its middle, a frame of latents at the middle of its steps. Positions are no
        weights: at another --size there are other tokens at the same times.
        """
        cfg = self.cfg
        _, T, h, w = shape_v
        step_times = torch.arange(steps) + 0.5
        frame_times = (torch.arange(T) + 0.5) * steps / T
        # Added to the tokens: F_l alone does not tell which frame it is of.
        places = time_embedding(step_times, cfg.width)
        self.register_buffer("step_places", places, persistent=False)  # (T_a, D)
        places = time_embedding(frame_times, cfg.width)[:, None]
        self.register_buffer("frame_places", places, persistent=False)  # (T, 1, D)

        # Times of the keys, in the order of condition(). The token of t and words have no time:
        # they are not turned, as if at 0.
        tokens = 1 if cfg.kv == "pool" else math.ceil(h / 2) * math.ceil(w / 2)
        times = [torch.zeros(1)]
        if cfg.audio_from != "text":
            times.append(frame_times.repeat_interleave(tokens))
        if cfg.audio_from != "video":
            times.append(torch.zeros(cfg.text_tokens))
        size = cfg.width // cfg.heads
        turn_x = turn_at(step_times, size) if cfg.rope else None
        turn_y = turn_at(torch.cat(times), size) if cfg.rope else None
        self.register_buffer("turn_x", turn_x, persistent=False)  # (2, T_a, 1, d)
        self.register_buffer("turn_y", turn_y, persistent=False)  # (2, M, 1, d)

    def condition(self, i, features, c, y, y_mask):
        """What layer i attends to: (B, M, D), and a mask (B, M) of what counts, or None: all.

        features: F_l (B, T, S, D). c (B, D): the embedding of t. Words y (B, M, D) with y_mask.
        """
        tokens = [c[:, None]]
        if self.cfg.audio_from != "text":
            x = features
            if self.cfg.kv == "pool":
                x = x.mean(2, keepdim=True)
            x = (x + self.frame_places).flatten(1, 2)  # (B, T * S or T, D)
            if self.cfg.adaptor:
                x = self.adaptors[i](x)
            tokens.append(x)
        if self.cfg.audio_from == "video":
            return torch.cat(tokens, 1), None
        counts = sum(x.shape[1] for x in tokens)
        mask = F.pad(y_mask, (counts, 0), value=True)
        return torch.cat([*tokens, y], 1), mask

    def one_layer(self, x, i, features, c, y, y_mask):
        """Layer i and what it attends to, in one piece to recompute."""
        condition, mask = self.condition(i, features, c, y, y_mask)
        return self.layers[i](x, condition, mask, self.turn_x, self.turn_y)

    def forward(self, x, all_features, c, y, y_mask):
        """all_features: F_1, F_2, ... of the video tower; the rest as in condition()."""
        x = self.enter(x.mT) + self.step_places  # (B, T_a, D)
        for i, features in enumerate(all_features):
            x = recomputed(self.cfg, self.one_layer, x, i, features, c, y, y_mask)
        return self.leave(x).mT.float()


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


# ---- The whole model


# same as uniform_dit.py
def as_clips(x):
    """What a codec decodes -> the same as {"video": uint8 (B, F, H, W, 3), "audio": (B, L)}."""
    clips = {}
    if "video" in x:
        clips["video"] = data.to_uint8(x["video"]).cpu()
    if "audio" in x:
        clips["audio"] = x["audio"].float().clamp(-1, 1).cpu()
    return clips


class SyncFlow(nn.Module):
    """Codec (frozen), text encoder, and the two towers; called, it says the velocities."""

    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        codec = OriginalCodec if cfg.codec == "original" else SmallCodec
        self.codec = codec(cfg).requires_grad_(False)
        self.text = nn.Identity() if cfg.t5 else ByteText(cfg)
        self.shapes = latent_shapes(cfg)
        shape_v, shape_a = self.shapes
        self.video = VideoTower(cfg, shape_v, shape_v[0])
        self.audio = AudioTower(cfg, shape_v, shape_a)
        self.edges = names_like(self, "codec|text|embed|table|final|enter|leave")

    def train_only(self, stage):
        """Freeze what a stage does not train. What is frozen gives features without gradients."""
        self.text.requires_grad_(stage != "audio")
        self.video.requires_grad_(stage != "audio")
        self.audio.requires_grad_(stage != "video")

    def forward(self, x_v, x_a, t_v, t_a, words, mask):
        """x_v (B, C, T, h, w) at t_v (B,), x_a (B, D_A, T_a) at t_a (B,); words, mask of read().

        -> their velocities. x_a None: the video's alone, and None.
        """
        # spell() gives the empty caption one word. It is no caption: all of its words are the null
        # embedding.
        none = mask.sum(1, keepdim=True) == 1  # (B, 1)
        text = torch.where(none[..., None], self.video.y_embedder.y_embedding, self.text(words))
        mask = mask | none
        # Open-Sora's clock runs the other way: 1000 is noise.
        v_v, features = self.video(x_v, 1000 * (1 - t_v), text, mask)
        if x_a is None:
            return v_v, None
        c = self.video.t_embedder(1000 * (1 - t_a))  # (B, D)
        y = self.video.y_embedder(text)
        return v_v, self.audio(x_a, features, c, y, mask)

    @torch.no_grad()
    def encode(self, batch):
        """A batch on the device -> the latents z_v (B, C, T, h, w), z_a (B, D_A, T_a) it has."""
        # SDXL's VAE overflows in fp16, and what is encoded once may take its time.
        with torch.autocast(self.video.places.device.type, enabled=False):
            z = self.codec.encode(batch)
        if "z_a" in z:
            z["z_a"] = z["z_a"].flatten(2)  # its last axis is 1
        return z

    @torch.no_grad()
    def decode(self, z):
        """Latents, or one of them -> {"video": uint8 (B, F, H, W, 3), "audio": (B, L)}."""
        z = dict(z)
        if "z_a" in z:
            z["z_a"] = z["z_a"][..., None]
        with torch.autocast(self.video.places.device.type, enabled=False):
            return as_clips(self.codec.decode(z))


# ---- Process: rectified flow, with mini-batch optimal transport


def across(values, x):
    """A number for each clip (B,) -> (B, 1, ...), to go with x."""
    return values.view(-1, *[1] * (x.dim() - 1))


def squared_distances(noise, z):
    """|noise_i - z_j|^2 of (n, ...) and (n, ...) -> (n, n)."""
    return torch.cdist(noise.flatten(1).float(), z.flatten(1).float()).square()


def assign(cost):
    """The assignment of least total cost, exactly: (n, n) -> for each column its row (n,).

    Shortest augmenting paths (Jonker and Volgenant 1987). Rows join one by one. Each row and column
    has a price; reduced costs, cost - row_price - column_price, stay at 0 or more, and are 0 where
    a row owns a column.
    """
    cost = np.asarray(cost, np.float64)
    n = len(cost)
    row_price = np.zeros(n)
    column_price = np.zeros(n)
    owner = np.full(n, -1)  # the row that has a column
    for new in range(n):
        # Dijkstra from the new row to the nearest free column, over columns that others have.
        far = np.full(n, np.inf)  # length of the shortest path to each column
        via = np.full(n, -1)  # the column before it
        done = np.zeros(n, bool)
        length = 0.0
        last = -1
        row = new
        while row >= 0:
            step = length + cost[row] - row_price[row] - column_price
            nearer = ~done & (step < far)
            far[nearer] = step[nearer]
            via[nearer] = last
            last = int(np.where(done, np.inf, far).argmin())
            length = far[last]
            done[last] = True
            row = owner[last]
        # New prices, so that reduced costs along the path are 0, and none is negative.
        gain = length - far[done]
        others = owner[done]
        row_price[others[others >= 0]] += gain[others >= 0]
        row_price[new] += length
        column_price[done] -= gain
        # Along the path, each column goes to the row of the one before.
        while last >= 0:
            before = via[last]
            owner[last] = new if before < 0 else owner[before]
            last = before
    return owner


def optimal_order(cost):
    """The order of the noises in mini-batch optimal transport (Tong et al. 2024), (n,).

    cost (n, n): of noise i for clip j, which gets noise order[j]. The mini-batch is what a process
    has at a time. The device has to be waited for: an exact assignment is made step by step, on the
    CPU.
    """
    rows = assign(cost.cpu().numpy())
    return torch.from_numpy(rows).to(cost.device, non_blocking=True)


class Flow:
    """The path x_t = (1 - t) noise + t z, and its velocity z - noise, which a network says (section
    3.1).

    stage: whose loss it is. In training net is called: the model, compiled, or as DDP wraps it.
    """

    def __init__(self, model, stage="joint"):
        self.model = model
        self.cfg = model.cfg
        self.stage = stage

    def draw(self, keys, device):
        """t of video and of sound (2, B), and noise of both, each clip's from its own key.

        In training no key comes twice: it is of a number that counts on over the epochs.
        """
        draws = generators(keys, device)
        t = []
        for own in draws:
            # Two of them, one for each stream.
            if self.cfg.logit_normal:
                mean, deviation = self.cfg.logit_normal
                drawn = torch.randn(2, generator=own, device=device)
                t.append(torch.sigmoid(mean + deviation * drawn))
            else:
                t.append(torch.rand(2, generator=own, device=device))
        t = torch.stack(t, 1)  # (2, B)
        if self.cfg.noise_levels == "shared":
            t = t[:1].expand(2, -1)
        shape_v, shape_a = self.model.shapes
        return t, normal(draws, shape_v), normal(draws, shape_a)

    def mix(self, noise, z, t):
        """x_t at t (B,)."""
        return (1 - across(t, z)) * noise + across(t, z) * z

    def loss(self, net, batch, level=None):
        """The loss of section 3.2; its parts "video" and "audio", of which a stage may have one.

        batch: z_v, z_a, words, key. level (B,) in [0, 1): in validation, 1 - t of both streams,
        instead of drawn ones; and no optimal transport, so that no clip depends on its neighbors.
        """
        z_v = batch["z_v"]
        z_a = batch["z_a"]
        (t_v, t_a), noise_v, noise_a = self.draw(batch["key"], z_v.device)
        if level is not None:
            t_v = t_a = 1 - level
        elif self.cfg.ot:
            cost = squared_distances(noise_v, z_v)
            if self.stage != "video":
                cost = cost + squared_distances(noise_a, z_a)  # of the joint vector
            # Only noise changes places. A clip keeps its sound, its caption and its t.
            order = optimal_order(cost)
            noise_v = noise_v[order]
            noise_a = noise_a[order]
        text = read(batch["words"], self.cfg)
        x_v = self.mix(noise_v, z_v, t_v)
        x_a = None if self.stage == "video" else self.mix(noise_a, z_a, t_a)
        v_v, v_a = net(x_v, x_a, t_v, t_a, *text)
        errors = {}
        if self.stage != "audio":
            errors["video"] = (v_v - (z_v - noise_v)).square().mean()
        if self.stage != "video":
            errors["audio"] = (v_a - (z_a - noise_a)).square().mean()
        parts = {name: error.detach() for name, error in errors.items()}
        return sum(errors.values()), parts

    def loss_of_clips(self, net, batch, level=None):
        """loss() of a batch of clips, which are encoded on the way."""
        return self.loss(net, {**batch, **self.model.encode(batch)}, level)

    def sample(self, noise_v, noise_a, words, negative, guidance, steps, z_v=None):
        """Euler steps from noise (t = 0) to latents (t = 1) -> those of video and sound.

        words (B, M, ...), and those of a negative prompt (M, ...). z_v: latents of a given video
        (zero-shot, section 5). At every step they, mixed with the noise to that t, take the place
        of what was made. A model trained with separate levels gets them clean, t = 1.
        """
        if guidance != 1:
            words = torch.cat([words, negative.expand_as(words)])
        text = read(words, self.cfg)
        x_v = noise_v
        x_a = noise_a
        for i in range(steps):
            t = torch.full((len(x_a),), i / steps, device=x_a.device)
            t_v = t
            if z_v is not None:
                if self.cfg.noise_levels == "separate":
                    t_v = torch.ones_like(t)
                x_v = self.mix(noise_v, z_v, t_v)
            v_v, v_a = self.velocity(x_v, x_a, t_v, t, text, guidance)
            x_v = x_v + v_v / steps
            x_a = x_a + v_a / steps
        return x_v, x_a

    def velocity(self, x_v, x_a, t_v, t_a, text, guidance):
        """What the model says of both streams, led by the text: eq. 3, where w is guidance."""
        if guidance == 1:
            return self.model(x_v, x_a, t_v, t_a, *text)
        twice = [torch.cat([x, x]) for x in (x_v, x_a, t_v, t_a)]
        guided = []
        for v in self.model(*twice, *text):
            v_c, v_n = v.chunk(2)  # of the caption, and of the negative prompt
            guided.append(v_n + guidance * (v_c - v_n))
        return guided


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


# ---- The stages (section 3.2)


# same as uniform_dit.py
def count(module):
    return sum(p.numel() for p in module.parameters())


# same as uniform_dit.py
def some_clips(dataset, cfg, n):
    """The first n clips, on the CPU, one by one."""
    return [data.to_device(data.make_batch(dataset, cfg.seed, [i]), "cpu") for i in range(n)]


def stage_config(cfg, stage):
    """The config of a stage, as fit() wants it.

    What a stage has for itself, as video_steps, replaces the plain option; stage audio has these.
    """
    names = ("steps", "batch_size", "lr", "betas", "optimizer")
    values = {name: getattr(cfg, f"{stage}_{name}", getattr(cfg, name)) for name in names}
    if stage != "joint":
        values["out"] = f"{cfg.out}/{stage}"
    return dataclasses.replace(cfg, **values)


def train_vae(cfg, train, val, device):
    """Stage vae: train the small codec, or the original one's sound VAE, to OUT/vae/ckpt.pt."""
    small = cfg.codec == "small"
    torch.manual_seed(cfg.seed)
    codec = SmallCodec(cfg) if small else WaveVAE(cfg)
    cfg = stage_config(cfg, "vae")
    if small and RANK == 0 and not Path(f"{cfg.out}/ckpt.pt").exists():
        codec.start(some_clips(train, cfg, 64))
    codec = codec.to(device)
    if WORLD > 1:  # now, as fit() makes a copy of them before DDP would share them
        for p in codec.parameters():
            dist.broadcast(p.data, 0)
    say(f"Stage vae: {count(codec):,} parameters on {device}, data {cfg.data}, to {cfg.out}")

    shown = data.make_batch(val, cfg.seed, range(min(cfg.samples, len(val))))
    shown = data.to_device(shown, device)

    @torch.no_grad()
    def rebuilt(ema):
        if not small:
            audio = ema.decoder(ema.encode(shown["audio"])[0])[:, 0]
            return None, audio.float().clamp(-1, 1).cpu()
        clips = as_clips(ema.decode(ema.encode(shown)))
        return clips["video"], clips["audio"]

    fit(codec, vae_loss, cfg, train, val, rebuilt)


def finished(path, stage, cfg):
    """The averaged weights of a stage that is trained to its end, for clips and mels as in cfg."""
    if WORLD > 1:
        dist.barrier()  # the first process has saved them
    state = data.load_checkpoint(path)
    old = state.get("cfg", {})
    if state.get("step", 0) < old.get("steps", 1):
        raise data.UserError(f"{path} is not trained to its end: run --stage {stage} first.")
    names = ["fps", "rate", "n_mels", "hop", "window", "n_fft", "floor"]
    if stage != "vae":
        names.append("rope")
    for name in names:
        if old.get(name) != getattr(cfg, name):
            raise data.UserError(
                f"{path} was trained with --{name} {old.get(name)}: keep to that, or start anew "
                "with another --out."
            )
    return state["ema"]


def load_codec(codec, cfg, train):
    """Fill the codec, from OUT/vae/ckpt.pt and from files; measure how to scale its latents."""
    path = f"{cfg.out}/vae/ckpt.pt"
    if cfg.codec == "original" and cfg.audio_vae:
        path = cfg.audio_vae
    state = finished(path, "vae", cfg)
    if cfg.codec == "small":
        data.load_weights(codec, state, path)
        codec.measure(some_clips(train, cfg, 256))
        return
    load_video_vae(codec, cfg.video_vae)
    data.load_weights(codec.wave, state, path)
    sounds = []
    for i in range(256):
        # One by one: so many videos would fill the memory.
        audio = data.make_batch(train, cfg.seed, [i])["audio"]
        sounds.append(data.to_device({"audio": audio}, "cpu"))
    codec.wave.measure(sounds)


def check_start(model, stage, path):
    """Refuse to go on with a run over another codec or, in stage audio, another video tower."""
    if not Path(path).exists():
        return
    old = data.load_checkpoint(path).get("ema", {})
    for name, p in model.named_parameters():
        part = "codec" if name.startswith("codec.") else "video tower"
        fixed = part == "codec" or (stage == "audio" and not name.startswith("audio."))
        if fixed and not torch.equal(old.get(name, p), p):
            raise data.UserError(
                f"{path} was trained with another {part}: choose another --out, or move it away."
            )


def load_stdit3(tower, path):
    """--init_video: fill the video tower from Open-Sora's STDiT3."""
    state = data.read_weights(path)
    state.pop("rope.freqs", None)  # a constant: line() has it
    # That network also has outputs for a variance, which its rectified flow does not use: the
    # second half of the channels of each of the four pixels of a patch.
    for name in ("final_layer.linear.weight", "final_layer.linear.bias"):
        own = tower.state_dict()[name]
        if name in state and len(state[name]) == 2 * len(own):
            state[name] = state[name].unflatten(0, (4, 2, -1))[:, 0].flatten(0, 1)
    data.load_weights(tower, state, path)


def start_of(model, stage, cfg, train):
    """Fill a model with what the stages before have made."""
    if stage == "joint":
        path = f"{cfg.out}/audio/ckpt.pt"
        data.load_weights(model, finished(path, "audio", cfg), path)
        return
    path = f"{cfg.out}/video/ckpt.pt"
    if stage == "audio" and Path(path).exists():
        state = finished(path, "video", cfg)
        # The audio tower has learned nothing there, and its options may differ by now.
        state = {name: p for name, p in state.items() if not name.startswith("audio.")}
        own = {f"audio.{name}": p for name, p in model.audio.state_dict().items()}
        data.load_weights(model, {**state, **own}, path)
        return
    if stage == "audio" and not (cfg.init_video and cfg.t5):
        raise data.UserError(
            f"There is no {path}: run --stage video first, or give --init_video and the --t5 whose "
            "words it knows."
        )
    load_codec(model.codec, cfg, train)
    if cfg.init_video:
        load_stdit3(model.video, cfg.init_video)


def train_towers(stage, cfg, train, val, device):
    """Stage video, audio or joint: train on latents of the codec at hand."""
    torch.manual_seed(cfg.seed + 1)
    model = SyncFlow(cfg)
    start_of(model, stage, cfg, train)
    own = stage_config(cfg, stage)
    check_start(model, stage, f"{own.out}/ckpt.pt")
    model = model.to(device)
    if stage != "joint" and cfg.codec == "small":
        examine(model.codec, val, device)
    elif stage != "joint":
        examine_wave(model.codec.wave, val, device)

    shown = [val[i]["caption"] for i in range(min(cfg.samples, len(val)))]
    flow = Flow(model, stage)
    loss = flow.loss_of_clips
    if cfg.cache_latents:
        loss = flow.loss
        # Before the towers are frozen: what is frozen names the files, and all stages share them.
        train = data.Latents(model, train, cfg.cache_latents, "train", device, RANK, WORLD)
        val = data.Latents(model, val, min(cfg.val_clips, len(val)), "val", device, RANK, WORLD)
    model.train_only(stage)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    say(f"Stage {stage}: {trained:,} parameters on {device}, to {own.out}")

    def samples(ema):
        prompt = shown if cfg.text_drop < 1 else None
        video, audio = sample(ema, len(shown), prompt=prompt, seed=cfg.seed)
        return video, None if stage == "video" else audio

    fit(model, loss, own, Captioned(train, cfg, varied=True), Captioned(val, cfg), samples)


# ---- Sampling and the command line


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

    A video ([n,] F, H, W, 3) uint8 that is given comes back as it is, with a sound made for it;
    prompt, or label for "a video of <label>": one for all clips or a list of n. Clip i depends on
    (seed, i), not on n or batch_size. Raises data.UserError for conditions that do not fit, and for
    a sound: nothing flows from it to the picture.
    """
    cfg = model.cfg
    device = next(model.parameters()).device
    captions = data.captions_for(n, prompt, label)
    if cfg.text_drop == 1 and (any(captions) or negative_prompt):
        raise data.UserError("This model was trained without text: leave out prompt and label.")
    if audio is not None:
        raise data.UserError("SyncFlow makes no video for a sound: leave out --audio.")
    given = {}
    if video is not None:
        given["video"] = data.windows(video, n, (cfg.frames, cfg.size, cfg.size, 3))
    steps = steps or cfg.sample_steps
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
    flow = Flow(model)
    made = []
    for first in tqdm(range(0, n, batch_size), "sampling", disable=n <= batch_size, leave=False):
        part = slice(first, first + batch_size)
        known = data.to_device({name: x[part] for name, x in given.items()}, device)
        draws = generators(keys[part], "cpu")  # on the CPU: all devices get the same
        noise = [normal(draws, shape).to(device) for shape in model.shapes]
        with autocast:
            z = model.encode(known)
            ids = words[part].to(device)
            z_v, z_a = flow.sample(*noise, ids, negative, guidance, steps, z.get("z_v"))
        z = {"z_a": z_a} if given else {"z_v": z_v, "z_a": z_a}
        made.append(model.decode(z))
    # What was given comes back as it was.
    clips = dict(given)
    for name in made[0]:
        clips[name] = torch.cat([x[name] for x in made])
    return clips["video"], clips["audio"]


def load(path, device="cpu", options=()):
    """A model ready to sample from a checkpoint (its averaged weights); after stage video its
    sound is noise.

    Options, as on the command line, override the config. --size makes clips of a size that it was
    never trained for (section 5): a larger frame has more places, and so the sound more keys; the
    clock stays. Raises data.UserError when the file is not readable or does not fit.
    """
    state = data.load_checkpoint(path)
    if not any(name.startswith("video.") for name in state.get("ema", {})):
        raise data.UserError(f"{path} holds no generator: give that of stage joint.")
    cfg = parse(options, data.read_config(Config, state, path))
    model = SyncFlow(cfg)
    data.load_weights(model, state["ema"], path)
    return model.to(device).eval()


def train(cfg):
    """Train what cfg.stage names."""
    device = setup(cfg)
    shape = (cfg.frames, cfg.size, cfg.fps, cfg.rate, cfg.seed)
    clips = data.open_dataset(cfg.data, "train", *shape)
    val = data.open_dataset(cfg.data, "val", *shape)
    if cfg.codec == "original" and not cfg.video_vae and cfg.stage != "vae":
        raise data.UserError(
            "--codec original needs --video_vae FILE (Hugging Face: hpcai-tech/OpenSora-VAE-v1.2, "
            "model.safetensors); or take --codec small."
        )
    ready = cfg.codec == "original" and cfg.audio_vae
    if cfg.stage == "vae" or (cfg.stage == "all" and not ready):
        train_vae(cfg, clips, val, device)
        say(f"Reconstructions are in {cfg.out}/vae/samples.")
    for stage in ("video", "audio", "joint"):
        if cfg.stage in ("all", stage):
            train_towers(stage, cfg, clips, val, device)
    if cfg.stage in ("all", "joint"):
        say(
            f"Samples are in {cfg.out}/samples; more: "
            f"python sample.py --model syncflow --ckpt {cfg.out}/ckpt.pt"
        )


def main(argv=None):
    try:
        train(parse(argv))
    except data.UserError as error:
        data.end("syncflow.py", error)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    main()
