"""Metrics for video with sound: every number of the five papers, computed offline, as functions and as a command.

    python metrics.py --real toy --fake out/mm_diffusion/samples_001 --n 2048 --json out.json
    python metrics.py --real concerts --fake DIR --video_features i3d:i3d.ts --audio_features vggish16k:vggish.ts
    python metrics.py --real toy:bounce,collide --ladder --n 256     # does each metric grow with what it measures?
    torchrun --nproc_per_node=2 metrics.py ...                       # the same numbers, in half the time

--real and --fake are a data set of data.py (real: its train split, fake: its val split) or a folder of .npz files
(sample.py --npz) or else of videos, whose compression alone moves FVD and FAD: the header says which was read.
Beside every value stands its floor: a distance between two halves of the real clips (n / 2 each; the finite-sample
bias is about D / n), an alignment of sounds given to the wrong clips (rolled by one).

Features come from `builtin` (fixed random convolutions and hand-made statistics: no download, no comparison with
published numbers, hence fvd_builtin), from a TorchScript file, or from a Python callable module:function. A callable
gets video (B, F, H, W, 3) float in [0, 1], or audio (B, L) float and its rate, and returns (B, D), or (B, T, D) whose
rows are stacked. A preset in front prepares its input: i3d:FILE, stylegan-v:FILE, vggish16k:FILE, audioclip44k:FILE.
The name of a number carries the extractor and the hash of its file. Nothing is ever downloaded.

The papers disagree, or are silent. What they do, and what is printed here:
  FVD       features: R(2+1)D (Paredes), I3D's 400 logits (MM-Diffusion), I3D (SyncFlow), the StyleGAN-V file (ProAV-DiT)
            -> fvd_X for the extractor X; --protocol stylegan-v picks a video, then a clip of it; plain any clip
  KVD       unbiased MMD^2, kernel (a.b / D + 1)^3: may be negative; KID's factor 1000 is not applied
            -> kvd_X over all clips, and the mean and deviation over blocks of 50 in the JSON
  FAD       ResNet18 on spectrogram images (Paredes), AudioCLIP, said "x 1e-4" but multiplied by 1e4 (MM-Diffusion),
            VGGish (UniForm, SyncFlow) -> fad_X, never scaled; fad_mmdiff = 1e4 * fad_X with audioclip44k
  FD        a Frechet distance on a classifier's features (PANNs) -> fad_X of that extractor
  IS, KL    C3D, PANNs or VGGish classes; 1, 10 or more splits; softmax or sigmoid; direction seldom stated
            -> is_X: mean over 10 splits; kl_X: KL(real || fake) of paired clips, softmax; both with --logits
  AV-Align  intersection over union (TempoTokens; UniForm by its numbers), two-way mean in +-3 frames (ProAV-DiT)
            -> av_align_iou; av_align_mean3 and av_align_mean1: three frames are too wide to tell pairs apart
  CS        cosine of CLAP or ImageBind embeddings, over segments, then clips -> cosine_score, with its floor
  PSNR-A    peak and domain unstated -> psnr_a_wav (peak 2), psnr_a_mel (peak: range of the real log-mel)
  MI        of latents, in nats, no estimator named -> mi_gaussian, mi_histogram, mi_ksg, beside shuffled rows
"""
import argparse
import functools
import hashlib
import importlib
import json
import math
import os
import sys
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F


class UserError(ValueError):
    """Something the user can mend; the message is one sentence."""


# ---- Distances between sets of features, in float64 --------------------------------------------------------

def rows(x, least=2):
    """x (n, D), or (n, T, D) whose rows are stacked -> float64 (n, D) or (n T, D). Raises UserError when there are
    fewer than `least` rows, or values that are not finite."""
    x = torch.as_tensor(x).detach().double()
    x = x.flatten(0, -2) if x.dim() > 1 else x[:, None]
    if len(x) < least:
        raise UserError(f"This metric needs at least {least} clips or rows, and got {len(x)}.")
    if not x.isfinite().all():
        raise UserError("The features hold NaN or infinite values: look for broken clips or a diverged model.")
    return x


class Moments:
    """Mean and covariance of feature rows in memory that does not grow with their number: add() the batches on each
    process, all_reduce() once at the end, then frechet(a, b)."""

    def __init__(self, dim, device="cpu"):
        # One tensor, so that one all_reduce does: row 0 holds the sum and, last, the count; below it is the sum of x x^T.
        self.total = torch.zeros(dim + 1, dim + 1, dtype=torch.float64, device=device)

    def add(self, x):
        x = rows(x, 0)
        x = torch.cat([x, torch.ones_like(x[:, :1])], 1)  # (n, D + 1)
        self.total += x.T @ x
        return self

    def all_reduce(self):
        if dist.is_initialized():
            dist.all_reduce(self.total)
        return self

    def mean_cov(self):
        n, s = self.total[-1, -1], self.total[-1, :-1]
        if n < 2:
            raise UserError(f"This metric needs at least 2 clips or rows, and got {int(n)}.")
        return s / n, (self.total[:-1, :-1] - torch.outer(s, s) / n) / (n - 1)


def frechet(x, y):
    """|mx - my|^2 + tr Sx + tr Sy - 2 tr (Sx Sy)^(1/2), at least 0, of rows x (n, D) and y (m, D), or of two Moments.
    Exact for n < D and any other rank. Raises UserError as rows() does, or when the widths differ."""
    if not isinstance(x, Moments):
        x, y = rows(x), rows(y)
        if x.shape[1] != y.shape[1]:
            raise UserError(f"The two sets have features of different widths, {x.shape[1]} and {y.shape[1]}.")
        if min(len(x), len(y)) <= 2 * x.shape[1]:
            mx, my, n, m = x.mean(0), y.mean(0), len(x) - 1, len(y) - 1
            x, y = x - mx, y - my
            # tr (Sx Sy)^(1/2) is the nuclear norm of Xc Yc^T / sqrt(n m): no D x D root, no eps, no lost digits
            root = torch.linalg.svdvals(x @ y.T).sum() / math.sqrt(n * m)
            return max(0.0, float((mx - my).square().sum() + x.square().sum() / n + y.square().sum() / m - 2 * root))
        x, y = (Moments(z.shape[1], z.device).add(z) for z in (x, y))
    (mx, sx), (my, sy) = x.mean_cov(), y.mean_cov()
    w, u = torch.linalg.eigh(sx)
    a = (u * w.clamp(min=0).sqrt()) @ u.T  # the symmetric root of Sx: A Sy A has the eigenvalues of Sx Sy
    root = torch.linalg.eigvalsh(a @ sy @ a).clamp(min=0).sqrt().sum()
    return max(0.0, float((mx - my).square().sum() + sx.trace() + sy.trace() - 2 * root))


def mmd(x, y):
    """KVD: unbiased MMD^2 of rows x (n, D), y (m, D) with the kernel (a.b / D + 1)^3. Negative values are normal; for
    identical sets it is below 0, as the cross term alone keeps its diagonal."""
    x, y = rows(x), rows(y)

    def kernel(a, b):
        return (a @ b.T / a.shape[1] + 1) ** 3

    def within(z):  # mean over pairs of different rows
        k = kernel(z, z)
        return (k.sum() - k.trace()) / (len(z) * (len(z) - 1))
    return float(within(x) + within(y) - 2 * kernel(x, y).mean())


def mmd_blocks(x, y, block=50):
    """mmd() of consecutive disjoint blocks of rows, as KID does -> (mean, standard deviation, list)."""
    x, y = rows(x), rows(y)
    size = min(block, len(x), len(y))
    values = [mmd(x[i:i + size], y[i:i + size]) for i in range(0, min(len(x), len(y)) - size + 1, size)]
    return float(np.mean(values)), float(np.std(values)), values


def inception_score(logits, splits=1, eps=0.0):
    """exp(mean_i KL(p_i || mean p)) of logits (n, K) for each of `splits` parts -> (mean, standard deviation, list).
    eps = 1e-7 inside both logarithms is MM-Diffusion's variant."""
    values = []
    for part in rows(logits, splits).tensor_split(splits):
        logp = F.log_softmax(part, 1)  # a softmax and then a logarithm give NaN where a class underflows
        logm = logp.logsumexp(0) - math.log(len(part))
        if eps:
            values.append((logp.exp() * ((logp.exp() + eps).log() - (logm.exp() + eps).log())).sum(1).mean().exp().item())
        else:
            values.append((logp.exp() * (logp - logm)).sum(1).mean().exp().item())
    return float(np.mean(values)), float(np.std(values)), values


def paired_kl(real, fake, variant="softmax"):
    """mean_i KL(p_i || q_i), p from logits real (n, K), q from logits fake (n, K), row i of both belonging together.
    softmax: one class holds; softmax_eps: 1e-6 added to q (PANNs); sigmoid_eps: a sum over independent classes."""
    real, fake = rows(real, 1), rows(fake, 1)
    if real.shape != fake.shape:
        raise UserError(f"Paired clips are needed: real logits are {tuple(real.shape)}, fake {tuple(fake.shape)}.")
    log = F.logsigmoid if variant == "sigmoid_eps" else functools.partial(F.log_softmax, dim=1)
    logp, logq = log(real), log(fake)
    if variant != "softmax":
        logq = (logq.exp() + 1e-6).log()
    return float((logp.exp() * (logp - logq)).sum(1).mean())


def cosine_score(u, v):
    """CLAP or ImageBind score of embeddings u, v (n, D), or (n, S, D) of segments, averaged first -> (mean cosine of
    the pairs, that of the pairs mismatched by rolling v by one clip, which is its floor)."""
    u, v = (torch.as_tensor(z).double() for z in (u, v))
    rows(u), rows(v)

    def score(v):
        return float(F.cosine_similarity(u, v, -1, 1e-8).reshape(len(u), -1).mean(1).mean())
    return score(v), score(v.roll(1, 0))


# ---- Reconstruction and mutual information -----------------------------------------------------------------

def psnr(x, y, peak=1.0):
    """10 log10(peak^2 / MSE) of each clip x[i] against y[i] -> (n,) dB; infinite for equal clips. Video in [0, 1] has
    peak 1, a waveform in [-1, 1] peak 2; `peak` may be (n,)."""
    error = (torch.as_tensor(x).double() - torch.as_tensor(y).double()).flatten(1).square().mean(1)
    return 10 * torch.log10(torch.as_tensor(peak).double() ** 2 / error)


def si_sdr(estimate, reference):
    """Scale-invariant signal-to-distortion ratio (n,) in dB of waveforms (n, L), means removed; NaN for silence."""
    s, r = (torch.as_tensor(z).double() for z in (estimate, reference))
    s, r = s - s.mean(1, keepdim=True), r - r.mean(1, keepdim=True)
    target = (s * r).sum(1, keepdim=True) / r.square().sum(1, keepdim=True) * r
    return 10 * torch.log10(target.square().sum(1) / (s - target).square().sum(1))


def mi_gaussian(x, y, dims=16, shrink=1e-3):
    """1/2 (logdet Cx + logdet Cy - logdet Cxy) in nats: mutual information of rows x (n, D), y (n, E) were they
    Gaussian, after PCA to at most `dims`; `shrink` of the mean variance is added to each variance."""
    def principal(z):
        z = rows(z) - rows(z).mean(0)
        return z @ torch.linalg.svd(z, full_matrices=False)[2][:dims].T

    def logdet(z):
        c = z.T @ z / (len(z) - 1)
        return torch.logdet(c + shrink * c.trace() / len(c) * torch.eye(len(c)))
    x, y = principal(x), principal(y)
    return float(logdet(x) + logdet(y) - logdet(torch.cat([x, y], 1))) / 2


def mi_histogram(x, y, bins=16):
    """Mutual information in nats of two scalars (n,) from a bins x bins histogram; biased by (bins - 1)^2 / (2 n)."""
    p = np.histogram2d(rows(x)[:, 0].numpy(), rows(y)[:, 0].numpy(), bins)[0]
    p = p / p.sum()
    q = p.sum(1, keepdims=True) * p.sum(0, keepdims=True)
    return float((p[p > 0] * np.log(p[p > 0] / q[p > 0])).sum())


def mi_ksg(x, y, k=3):
    """Mutual information in nats of rows x (n, D), y (n, E) from the distances to the k-th neighbours (Kraskov,
    Stoegbauer and Grassberger 2004, eq. 8): psi(k) + psi(n) - mean(psi(nx + 1) + psi(ny + 1))."""
    x, y, counts = rows(x, k + 1), rows(y, k + 1), 0
    for i in range(0, len(x), 256):  # a few rows at a time: memory n, not n^2
        dx, dy = (torch.cdist(z[i:i + 256], z, p=math.inf) for z in (x, y))
        radius = torch.maximum(dx, dy).topk(k + 1, largest=False)[0][:, -1:]  # the nearest is the row itself
        counts = counts + sum(torch.digamma((d < radius).sum(1).clamp(min=1).double()).sum() for d in (dx, dy))
    return float(torch.digamma(torch.tensor([k, len(x)]).double()).sum() - counts / len(x))


# ---- The built-in features ---------------------------------------------------------------------------------

@functools.cache
def random_filters(seed, *shapes):
    """Fixed convolution weights. The first 24 filters of layer 1 ignore constant input and, in 3-D, the first 12 of
    them anything that does not move."""
    rng = np.random.RandomState(seed)  # its stream is the same in every version of numpy
    layers = [rng.standard_normal(shape) / math.sqrt(math.prod(shape[1:])) for shape in shapes]
    first = layers[0]
    first[:24] -= first[:24].mean(tuple(range(2, first.ndim)), keepdims=True)
    if first.ndim == 5:
        first[:12] -= first[:12].mean(2, keepdims=True)
    return [torch.from_numpy(w.astype(np.float32)) for w in layers]


def random_features(x, filters, strides, slopes):
    """Convolve x (B, C, ...) layer by layer -> (list of the mean and deviation (B, C') of each layer, last layer)."""
    stats = []
    for w, stride, slope in zip(filters, strides, slopes, strict=True):
        conv = F.conv3d if w.dim() == 5 else F.conv2d
        x = F.leaky_relu(conv(x, w.to(x), stride=stride, padding=[k // 2 for k in w.shape[2:]]), slope) * 1.4
        stats += [x.flatten(2).mean(2), x.flatten(2).std(2)]
    return stats, x


def video_features(video):
    """Video (B, F, H, W, 3) float in [0, 1], F >= 5 -> (B, 844): 832 statistics of fixed random 3-D convolutions and,
    times 30, 12 of motion, which shuffled frames change most."""
    B, T = video.shape[:2]
    if T < 5:
        raise UserError(f"The built-in video features need clips of at least 5 frames, and these have {T}.")
    x = video.permute(0, 1, 4, 2, 3).flatten(0, 1) * 2 - 1  # (B T, 3, H, W)
    if x.shape[2:] != (64, 64):
        x = F.interpolate(x, size=(64, 64), mode="bilinear")  # trilinear, as T stays
    small = F.avg_pool2d(x, 4).reshape(B, T, -1)  # (B, T, 768)
    x = x.reshape(B, T, 3, 64, 64).transpose(1, 2).contiguous()  # (B, 3, T, 64, 64)
    filters = random_filters(0, (32, 3, 3, 5, 5), (64, 32, 3, 3, 3), (64, 64, 3, 3, 3))
    stats, x = random_features(x, filters, ((1, 2, 2), 2, 2), (0, 0.2, 0.2))
    motion = []
    for lag in (1, 2, 4):
        change = (small[:, lag:] - small[:, :-lag]).abs().mean(2)  # (B, T - lag)
        motion += [change.mean(1), change.std(1, correction=0), change.amax(1)]
    second, third = (small.diff(n, dim=1).abs().mean(2) for n in (2, 3))
    motion += [second.mean(1), second.std(1, correction=0), third.mean(1)]
    return torch.cat([*stats, F.adaptive_avg_pool3d(x, 2).flatten(1), 30 * torch.stack(motion, 1)], 1)


def resample(audio, old, new):
    """Audio (B, L) at `old` Hz -> (B, round(L new / old)), through its spectrum."""
    n, m = audio.shape[-1], round(audio.shape[-1] * new / old)
    return audio if old == new else torch.fft.irfft(torch.fft.rfft(audio)[..., :m // 2 + 1], m) * (m / n)


@functools.cache
def mel_filters(rate, n_fft, n_mels, low=0.0, high=None, scale="slaney"):
    """Triangular filters (n_mels, n_fft / 2 + 1), float64. slaney: linear to 1 kHz, then logarithmic, of equal area;
    htk: 1127 ln(1 + f / 700), of equal height, triangles on the mel axis."""
    step = math.log(6.4) / 27

    def mel(f):
        if scale == "htk":
            return 1127 * np.log1p(f / 700)
        return np.where(f < 1000, f * 0.015, 15 + np.log(np.maximum(f, 1000) / 1000) / step)

    bins = np.arange(n_fft // 2 + 1) * rate / n_fft
    points = np.linspace(mel(np.float64(low)), mel(np.float64(high or rate / 2)), n_mels + 2)
    if scale == "htk":
        bins = mel(bins)
    else:
        points = np.where(points < 15, points / 0.015, 1000 * np.exp((points - 15) * step))
    left, mid, right = points[:-2, None], points[1:-1, None], points[2:, None]
    filters = np.maximum(0, np.minimum((bins - left) / (mid - left), (right - bins) / (right - mid)))
    return torch.from_numpy(filters if scale == "htk" else filters * 2 / (right - left))


def mel_power(audio, rate, n_fft, hop, n_mels):
    """Audio (B, L) -> (B, n_mels, 1 + L // hop): Slaney mels of the power spectrum, Hann windows centered on multiples
    of hop, silence beyond both ends."""
    window = torch.hann_window(n_fft, dtype=audio.dtype, device=audio.device)
    spectrum = torch.stft(audio, n_fft, hop, window=window, pad_mode="constant", return_complex=True)
    return mel_filters(rate, n_fft, n_mels).to(audio) @ spectrum.abs().square()


def log_mel(audio, rate):
    """Audio (B, L) -> (B, 64, 1 + L' // 256): log mels of its L' samples at 16 kHz, floor 1e-5."""
    if audio.shape[-1] < rate / 20:
        raise UserError(f"Sound of {audio.shape[-1]} samples is too short: at least 50 ms are needed.")
    return (mel_power(resample(audio.double(), rate, 16000), 16000, 1024, 256, 64) + 1e-5).log().float()


def audio_features(audio, rate):
    """Audio (B, L) in [-1, 1] at `rate` Hz -> (B, 448): mean and deviation of 64 log mels, and of the layers of fixed
    random 2-D convolutions of them."""
    m = log_mel(audio, rate)
    filters = random_filters(1, (32, 1, 5, 5), (64, 32, 3, 3), (64, 64, 3, 3))
    stats, _ = random_features((m[:, None] + 6) / 4, filters, (1, 2, 2), (0, 0, 0))
    return torch.cat([m.mean(2) / 4, m.std(2) / 4, *stats], 1)


def envelopes(gray, audio, rate):
    """Gray frames (B, F, H, W) in [0, 1] and audio (B, L) -> motion and loudness-rise envelopes, both (B, F)."""
    motion = None if gray is None else gray.diff(dim=1).abs().mean((2, 3))  # (B, F - 1)


def joint_features(motion, rise):
    """Motion and rise envelopes (n, F) -> (n, 9): their correlation at lags of -4 ... 4 frames."""
    x, y = ((e - e.mean(1, keepdim=True)) / (e.std(1, keepdim=True) + 1e-6) for e in (motion, rise))
    T = x.shape[1]
    lags = [(x[:, max(l, 0):T + min(l, 0)] * y[:, max(-l, 0):T - max(l, 0)]).mean(1) for l in range(-4, 5)]
    return torch.stack(lags, 1)


# ---- Alignment: onsets, optical flow, AV-Align ------------------------------------------------------------

def onset_envelope(audio, rate, hop=512, n_fft=2048):
    """Audio (B, L) -> onset strength (B, 1 + L // hop): the mean rise in dB over 128 mels."""
    db = 10 * mel_power(audio.double(), rate, n_fft, hop, 128).clamp(min=1e-10).log10()
    db = db.maximum(db.amax((1, 2), keepdim=True) - 80)
    rise = db.diff(dim=2).clamp(min=0).mean(1)
    return F.pad(rise, (1 + n_fft // (2 * hop), 0))[:, :db.shape[2]]  # a frame is heard when its window is centered


def onset_frames(envelope, rate, hop=512):
    """Onset strength (T,) -> the frames of onsets, a list: maxima of 60 ms that stand 0.07 above the mean of 200 ms,
    where the whole ranges over 0 ... 1."""
    x = np.asarray(envelope, np.float64) - np.min(envelope)
    x, frames, n = x / (x.max() + np.finfo(np.float32).tiny), [], 0
    before, wide, wait = (math.ceil(s * rate // hop) for s in (0.03, 0.1, 0.03))
    while n < len(x) and x.any():
        peak = x[n] == x[max(0, n - before):n + 1].max()
        if peak and x[n] >= x[max(0, n - wide):n + wide + 1].mean() + 0.07:
            frames.append(n)
            n += wait
        n += 1
    return frames


def onset_times(audio, rate):
    """Audio (B, L) -> for each clip the list of its onsets, s. At 22,050 Hz, the rate that the constants are made for:
    at 16 kHz every onset would be found twice."""
    strength = onset_envelope(resample(audio.double(), rate, 22050), 22050)
    return [[n * 512 / 22050 for n in onset_frames(e.cpu().numpy(), 22050)] for e in strength]


def filter_matrix(taps, n, border):
    """The (n, n) matrix that applies a filter of odd length along an axis of n pixels; border as in numpy.pad."""
    padded = np.pad(np.eye(n), ((len(taps) // 2,) * 2, (0, 0)), border)
    return torch.from_numpy(sum(w * padded[k:k + n] for k, w in enumerate(taps))).float()


def shrink(gray, scale):
    """Blur (..., H, W) and resize it by `scale`: a level of the pyramid."""
    sigma = (1 / scale - 1) / 2
    r = max(round(5 * sigma) | 1, 3) // 2
    taps = np.exp(-np.arange(-r, r + 1) ** 2 / (2 * (sigma or 0.8) ** 2))
    for _ in range(2):  # rows, then columns
        n = gray.shape[-1]
        m = filter_matrix(taps / taps.sum(), n, "reflect")
        m = F.interpolate(m.T[None], size=round(n * scale), mode="linear")[0] if scale < 1 else m.T  # (n, n')
        gray = (gray @ m).transpose(-1, -2)
    return gray


def quadratic_fit(gray):
    """Fit f(x, y) = c + b . (x, y) + (x, y) A (x, y)^T around every pixel of (..., H, W), with Gaussian weights ->
    (5, ..., H, W): b_x, b_y, A_xx, A_yy, A_xy."""
    u, powers = np.arange(-5, 6), ((0, 0), (1, 0), (0, 1), (2, 0), (0, 2), (1, 1))
    w = np.exp(-u ** 2 / (2 * 1.2 ** 2))
    w = w / w.sum()
    basis = np.stack([np.outer(u ** j, u ** i).ravel() for i, j in powers])  # (6, 121)
    solve = np.linalg.inv(basis * np.outer(w, w).ravel() @ basis.T)[1:] * [[1], [1], [1], [1], [0.5]]
    across, down = ([filter_matrix(w * u ** i, n, "edge") for i in range(3)] for n in (gray.shape[-1], gray.shape[-2]))
    rows_ = [gray @ m.T for m in across]
    moments = torch.stack([down[j] @ rows_[i] for i, j in powers])
    return torch.tensordot(torch.from_numpy(solve).float(), moments, 1)


def optical_flow(gray):
    """Farneback's flow of gray frames (B, F, H, W), 0 ... 255 -> (B, F - 1, 2, H, W), pixels to the right and down;
    three levels at most, of at least 32 pixels, three rounds each, windows of 15 pixels."""
    (H, W), flow = gray.shape[-2:], None
    levels = max(k for k in range(4) if k == 0 or min(H, W) * 0.5 ** k >= 32)
    for k in range(levels, -1, -1):
        fit = quadratic_fit(shrink(gray, 0.5 ** k))  # (5, B, F, h, w)
        h, w = fit.shape[-2:]
        first, second = fit[:, :, :-1].flatten(1, 2), fit[:, :, 1:].flatten(1, 2)  # (5, P, h, w), P = B (F - 1) pairs
        if flow is None:
            flow = torch.zeros(first.shape[1], 2, h, w)
        else:
            flow = F.interpolate(flow, size=(h, w), mode="bilinear") * 2
        for _ in range(3):
            flow = refine_flow(first, second, flow)
    return flow.view(*gray.diff(dim=1).shape[:2], 2, H, W)


def refine_flow(first, second, flow):
    """One round: from the fits (5, P, h, w) of both frames of each pair and the flow (P, 2, h, w), a better flow."""
    h, w = flow.shape[-2:]
    x = torch.arange(w) + flow[:, 0]
    y = torch.arange(h)[:, None] + flow[:, 1]  # (P, h, w): where each pixel goes
    grid = torch.stack([x * (2 / (w - 1)) - 1, y * (2 / (h - 1)) - 1], -1)
    there = F.grid_sample(second.transpose(0, 1), grid, align_corners=True).transpose(0, 1)
    inside = (x >= 0) & (x < w - 1) & (y >= 0) & (y < h - 1)
    axx, ayy, axy = torch.where(inside, (first[2:] + there[2:]) / 2, first[2:])
    bx, by = torch.where(inside, (first[:2] - there[:2]) / 2, 0)
    fx, fy = flow.unbind(1)
    # A d = (b1 - b2) / 2, less trusted at the border; least squares over the window: mean(A^T A) d = mean(A^T db)
    edge = [torch.tensor([0.14, 0.14, *[0.4472] * 3, *[1.0] * n])[torch.arange(n).minimum(torch.arange(n).flip(0))]
            for n in (h, w)]
    weight = edge[0][:, None] * edge[1]
    bx, by = (bx + axx * fx + axy * fy) * weight, (by + axy * fx + ayy * fy) * weight
    axx, ayy, axy = axx * weight, ayy * weight, axy * weight
    g = torch.stack([axx * axx + axy * axy, ayy * ayy + axy * axy, (axx + ayy) * axy, axx * bx + axy * by, axy * bx + ayy * by])
    box = np.full(15, 1 / 15)
    gxx, gyy, gxy, hx, hy = filter_matrix(box, h, "edge") @ g @ filter_matrix(box, w, "edge").T
    det = gxx * gyy - gxy * gxy + 1e-3
    return torch.stack([gyy * hx - gxy * hy, gxx * hy - gxy * hx], 1) / det[:, None]


def flow_trajectory(gray):
    """Gray frames (B, F, H, W), 0 ... 255 -> (B, F): mean length of the flow into each frame, pixels, the first twice."""
    speed = optical_flow(gray).norm(dim=2).mean((2, 3))  # (B, F - 1)
    return torch.cat([speed[:, :1], speed], 1)


def peak_times(trajectory, fps, threshold=0.1):
    """Times (s) of the strict local maxima of a trajectory (F,) that reach `threshold`; never its ends."""
    x = [float(v) for v in trajectory]
    return [i / fps for i in range(1, len(x) - 1) if x[i - 1] < x[i] > x[i + 1] and x[i] >= threshold]


def av_align_iou(audio_peaks, video_peaks, fps):
    """AV-Align as intersection over union (TempoTokens): each audio peak takes the first free video peak nearer than a
    frame. 0 if one list is empty; NaN, to be left out of means, if both are."""
    free, hits = list(video_peaks), 0
    for a in audio_peaks:
        match = next((v for v in free if v - 1 / fps < a < v + 1 / fps), None)
        if match is not None:
            free.remove(match)
            hits += 1
    union = len(audio_peaks) + len(video_peaks) - hits
    return hits / union if union else math.nan


def av_align_mean(audio_peaks, video_peaks, fps, window=3):
    """AV-Align as ProAV-DiT states it: the mean of the shares of audio and of video peaks that have a peak of the other
    kind within `window` frames; a share of no peaks is 0."""
    def share(some, others):
        return np.mean([any(abs(s - o) <= window / fps for o in others) for s in some]) if some else 0.0
    return float(share(audio_peaks, video_peaks) + share(video_peaks, audio_peaks)) / 2
