"""Metrics for video with sound: the numbers of the papers, offline, as functions and a command.

    python metrics.py --real toy --fake out/mm_diffusion/samples_001 --n 2048 --json out.json
    python metrics.py --real concerts --fake DIR --video_features i3d:i3d.ts
    torchrun --nproc_per_node=2 -- metrics.py ...   # the same numbers
    python tests/ladder.py                          # do they grow with corruption?

--real and --fake are data sets (real: train split, fake: val split) or folders: of .npz files
(sample.py --npz), else of videos, whose compression moves FVD and FAD. The floor of a distance is
that between the halves of the real clips (of half of n, so with more bias, about D / n), that of an
alignment is of mismatched pairs, that of an accuracy is chance.

Features: `builtin` (fixed random convolutions and statistics: fvd_builtin is no published FVD), a
TorchScript file, or module:function, a callable of video (B, F, H, W, 3) float in [0, 1] or of
audio (B, L) float and its rate -> (B, D), or (B, T, D), to be stacked. A preset in front prepares
the input: i3d:FILE, stylegan-v:FILE, vggish16k:FILE, audioclip44k:FILE. Names carry the hash of the
file. Nothing is ever downloaded.

          in the papers                                 here
FVD       on R(2+1)D (Paredes), I3D logits              fvd_X of extractor X; --protocol stylegan-v:
          (MM-Diffusion), StyleGAN-V's file and         pick a video, then its clip; plain: any clip
          protocol (ProAV-DiT)
KVD       unbiased MMD, kernel (a.b / D + 1)^3          kvd_X (audio: kad_X), not scaled; may be < 0
FAD, FD   ResNet18 (Paredes), VGGish (UniForm,          fad_X, unscaled; with audioclip44k also
          SyncFlow), PANNs (FD), AudioCLIP: "x 1e-4"    fad_mmdiff = 1e4 * fad_X
          in print, x 1e4 in code (MM-Diffusion)
IS, KL    C3D, PANNs, VGGish classes; splits and        is_X: 10 splits; kl_X: KL(real || fake)
          direction seldom stated
AV-Align  IoU (TempoTokens, UniForm), mean in           av_align_iou; av_align_mean3, too wide a
          +-3 frames (ProAV-DiT)                        window, and av_align_mean1
PSNR-A    peak and domain unstated                      psnr_a_wav: peak 2; psnr_a_mel: real's range
CS, MI    cosine of segments, then clips; MI            cosine_score; mi_gaussian, mi_histogram,
          without an estimator                          mi_ksg
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

# ---- Distances between sets of features, in float64
# FVD and FAD are the Frechet distance of features of videos and of sounds, KVD is their MMD.


def rows(x, least=2):
    """Features (n, D), or (n, T, D) to be stacked -> float64 (rows, D).

    ValueError for fewer than `least` rows, and for NaN or infinity."""
    x = torch.as_tensor(x).detach().double()
    if x.dim() == 1:
        x = x[:, None]  # (n, 1)
    x = x.flatten(0, -2)  # (rows, D)
    if len(x) < least:
        raise ValueError(f"This metric (or its floor, of half the clips) needs {least} rows or "
                         f"more, not {len(x)}.")
    if not x.isfinite().all():
        raise ValueError("NaN or infinite values in the features or clips: look for broken files "
                         "or a diverged model.")
    return x


def moments(x):
    """Rows (n, D) -> (D + 1, D + 1), the sum of (x, 1) (x, 1)^T: sum x x^T, sum x, and n.

    Such sums add up over batches and processes, so no features need to be kept."""
    x = F.pad(rows(x, 0), (0, 1), value=1.0)  # (n, D + 1)
    return x.T @ x


def mean_and_covariance(sums):
    """moments() of n rows -> their mean (D,) and covariance (D, D)."""
    n = sums[-1, -1]
    if n < 2:
        raise ValueError(f"This metric needs 2 rows or more, not {int(n)}.")
    total = sums[-1, :-1]  # sum x
    covariance = (sums[:-1, :-1] - torch.outer(total, total) / n) / (n - 1)
    return total / n, covariance


def frechet_of_moments(a, b):
    """The Frechet distance of two sets of rows from their moments().

    |mx - my|^2 + tr Sx + tr Sy - 2 tr (Sx Sy)^(1/2), at least 0."""
    mx, sx = mean_and_covariance(a)
    my, sy = mean_and_covariance(b)
    # With R = Sx^(1/2), the matrix R Sy R is symmetric and has the eigenvalues of Sx Sy.
    w, u = torch.linalg.eigh(sx)
    root = (u * w.clamp(min=0).sqrt()) @ u.T
    eigenvalues = torch.linalg.eigvalsh(root @ sy @ root)
    trace = eigenvalues.clamp(min=0).sqrt().sum()
    distance = (mx - my).square().sum() + sx.trace() + sy.trace() - 2 * trace
    return max(0.0, float(distance))  # rounding makes that of identical sets -1e-15


def frechet(x, y):
    """The Frechet distance of rows x (n, D) and y (m, D): FVD, FAD, FD.

    |mx - my|^2 + tr Sx + tr Sy - 2 tr (Sx Sy)^(1/2), with the means m and covariances S of x and y:
    how far apart two Gaussians are that have these. Exact for any rank and for n < D. ValueError
    for fewer than 2 rows, and for sets of different widths."""
    x = rows(x)
    y = rows(y)
    width = x.shape[1]
    if width != y.shape[1]:
        raise ValueError(f"The two sets have features of different widths, {width} and "
                         f"{y.shape[1]}.")
    if min(len(x), len(y)) > 2 * width:
        return frechet_of_moments(moments(x), moments(y))
    # With few rows there is a shorter way. Let X and Y be the rows less their means. Then
    # Sx = X^T X / (n - 1), and tr (Sx Sy)^(1/2) is the sum of the singular values of
    # X Y^T / sqrt((n - 1) (m - 1)): no D x D root is taken, and no eps is needed.
    mx = x.mean(0)
    my = y.mean(0)
    x = x - mx
    y = y - my
    n = len(x) - 1
    m = len(y) - 1
    trace = torch.linalg.svdvals(x @ y.T).sum() / math.sqrt(n * m)
    trace_x = x.square().sum() / n
    trace_y = y.square().sum() / m
    distance = (mx - my).square().sum() + trace_x + trace_y - 2 * trace
    return max(0.0, float(distance))


def kernel(x, y):
    """(x_i . y_j / D + 1)^3 of rows x (n, D) and y (m, D) -> (n, m)."""
    return (x @ y.T / x.shape[1] + 1) ** 3


def mean_within(x):
    """The mean of the kernel over all pairs of different rows of x (n, D)."""
    k = kernel(x, x)
    n = len(k)
    return (k.sum() - k.trace()) / (n * (n - 1))


def mmd(x, y):
    """KVD: unbiased MMD^2 of rows x (n, D) and y (m, D); negative e.g. for identical sets.

    E k(x, x') + E k(y, y') - 2 E k(x, y), with the kernel k(a, b) = (a.b / D + 1)^3."""
    x = rows(x)
    y = rows(y)
    within = mean_within(x) + mean_within(y)
    between = kernel(x, y).mean()
    return float(within - 2 * between)


def mmd_blocks(x, y, block=50):
    """mmd() of disjoint blocks of consecutive rows, as KID does -> (mean, deviation, list)."""
    x = rows(x)
    y = rows(y)
    n = min(len(x), len(y))
    block = min(block, n)  # what is left over after the last block is not used
    values = []
    for i in range(0, n - block + 1, block):
        values.append(mmd(x[i:i + block], y[i:i + block]))
    return float(np.mean(values)), float(np.std(values)), values


# ---- Scores of classes and of embeddings


def inception_score(logits, splits=1, eps=0.0):
    """exp(mean_i KL(p_i || mean p)) of logits (n, K) in `splits` parts -> (mean, deviation, list).

    High when each clip is surely of one class and all classes occur; eps is added in both logs."""
    log_eps = torch.tensor(eps).double().log()  # -inf for 0, and then logaddexp changes nothing
    values = []
    for log_p in rows(logits, splits).log_softmax(1).tensor_split(splits):  # (n / splits, K)
        log_mean = log_p.logsumexp(0) - math.log(len(log_p))  # (K,)
        gap = torch.logaddexp(log_p, log_eps) - torch.logaddexp(log_mean, log_eps)
        kl = (log_p.exp() * gap).sum(1).mean()
        values.append(float(kl.exp()))
    return float(np.mean(values)), float(np.std(values)), values


def paired_kl(real, fake, variant="softmax"):
    """mean_i KL(p_i || q_i) of logits (n, K) of paired clips, p of the real and q of the fake one.

    Variants softmax_eps and sigmoid_eps (many labels at once) add 1e-6 to q, as audio toolboxes do.
    ValueError when the two differ in shape."""
    p = rows(real, 1)
    q = rows(fake, 1)
    if p.shape != q.shape:
        raise ValueError(f"Paired clips are needed: real logits are {tuple(p.shape)}, fake "
                         f"{tuple(q.shape)}.")
    # Logarithms, never probabilities: those of unlikely classes would underflow.
    if variant == "sigmoid_eps":
        log_p = F.logsigmoid(p)
        log_q = F.logsigmoid(q)
    else:
        log_p = F.log_softmax(p, 1)
        log_q = F.log_softmax(q, 1)
    if variant != "softmax":  # log(q + 1e-6)
        log_q = torch.logaddexp(log_q, torch.tensor(1e-6).double().log())
    return float((log_p.exp() * (log_p - log_q)).sum(1).mean())


def cosine_score(u, v):
    """The mean of u_i . v_i / |u_i| |v_i|: CLAP or ImageBind score of embeddings (n, D), or
    (n, S, D) of segments, averaged by clip first -> (mean, floor: with v rolled by one clip)."""
    u = rows(u).view(torch.as_tensor(u).shape)
    v = rows(v).view(torch.as_tensor(v).shape)
    means = []
    for other in (v, v.roll(1, 0)):
        cosines = F.cosine_similarity(u, other, dim=-1, eps=1e-8).reshape(len(u), -1)  # (n, S)
        means.append(float(cosines.mean(1).mean()))
    return means[0], means[1]


# ---- Reconstruction and mutual information


def psnr(x, y, peak=1.0):
    """10 log10(peak^2 / MSE) of each clip x[i] against y[i] -> (n,) dB.

    peak is 1 for values in [0, 1], 2 for [-1, 1], or (n,)."""
    difference = torch.as_tensor(x).double() - torch.as_tensor(y).double()
    error = difference.flatten(1).square().mean(1)
    peak = torch.as_tensor(peak).double()
    return 10 * torch.log10(peak ** 2 / error)


def psnr_audio(fake, real, rate):
    """Waveforms (n, L) -> {"psnr_a_wav": of the waves, with peak 2; "psnr_a_mel": of their log
    mels, with the range of the real ones as peak}, (n,) dB each."""
    mel = log_mel(torch.as_tensor(fake), rate)
    real_mel = log_mel(torch.as_tensor(real), rate)
    peak = real_mel.amax((1, 2)) - real_mel.amin((1, 2))
    return {"psnr_a_wav": psnr(fake, real, 2), "psnr_a_mel": psnr(mel, real_mel, peak)}


def si_sdr(estimate, reference):
    """Scale-invariant signal-to-distortion ratio of waveforms (n, L) -> (n,) dB; NaN for silence.

    10 log10(|t|^2 / |s - t|^2): t is the part of the estimate s along the reference."""
    s = rows(estimate, 1)
    s = s - s.mean(1, keepdim=True)
    r = rows(reference, 1)
    r = r - r.mean(1, keepdim=True)
    # <s, r> / <r, r>
    scale = (s * r).sum(1, keepdim=True) / r.square().sum(1, keepdim=True)
    target = scale * r
    return 10 * torch.log10(target.square().sum(1) / (s - target).square().sum(1))


def principal(x, dims):
    """Rows (n, D) -> (n, dims): less their mean, on their first principal axes."""
    x = x - x.mean(0)
    axes = torch.linalg.svd(x, full_matrices=False)[2]  # (min(n, D), D)
    return x @ axes[:dims].T


def mi_gaussian(x, y, dims=16, shrinkage=1e-3):
    """Nats between rows x (n, D) and y (n, E), were they Gaussian, after PCA to `dims` columns.

    (logdet Cx + logdet Cy - logdet Cxy) / 2, Cxy the covariance of both side by side."""
    x = principal(rows(x), dims)
    y = principal(rows(y), dims)
    logdets = []
    for z in (x, y, torch.cat([x, y], 1)):
        c = z.T @ z / (len(z) - 1)
        ridge = shrinkage * c.trace() / len(c)  # no determinant is 0
        logdets.append(torch.logdet(c + ridge * torch.eye(len(c))))
    return float(logdets[0] + logdets[1] - logdets[2]) / 2


def mi_histogram(x, y, bins=16):
    """Nats between two scalars (n,) from a bins x bins histogram.

    sum p log(p / q), with q = p(x) p(y). Biased by about (bins - 1)^2 / (2 n)."""
    x = rows(x)[:, 0].numpy()
    y = rows(y)[:, 0].numpy()
    p = np.histogram2d(x, y, bins)[0] / len(x)
    q = p.sum(1, keepdims=True) * p.sum(0, keepdims=True)
    some = p > 0
    return float((p[some] * np.log(p[some] / q[some])).sum())


def mi_ksg(x, y, k=3):
    """Nats between rows x (n, D) and y (n, E) from neighbors (Kraskov et al. 2004, eq. 8).

    psi(k) + psi(n) - mean_i (psi(nx_i + 1) + psi(ny_i + 1)), where nx_i and ny_i count the other
    rows that are nearer to row i in x, or in y, than its k-th neighbor is in both."""
    x = rows(x, k + 1)
    y = rows(y, k + 1)
    n = len(x)
    total = 0
    for i in range(0, n, 256):  # a part of the rows at a time: memory grows with n, not n^2
        dx = torch.cdist(x[i:i + 256], x, p=math.inf)  # (256, n)
        dy = torch.cdist(y[i:i + 256], y, p=math.inf)
        nearest = torch.maximum(dx, dy).topk(k + 1, largest=False)[0]  # the first is the row itself
        radius = nearest[:, -1:]  # (256, 1)
        # The row itself is counted, too, which is the + 1; at least 1, where the radius is 0.
        nx = (dx < radius).sum(1).clamp(min=1).double()
        ny = (dy < radius).sum(1).clamp(min=1).double()
        total = total + (torch.digamma(nx).sum() + torch.digamma(ny).sum())
    psi = torch.digamma(torch.tensor([k, n]).double())
    return float(psi.sum() - total / n)


# ---- The built-in features
# Convolutions with fixed random filters see textures, edges and changes well enough to order sets
# of clips by how corrupted they are (tests/ladder.py), without a file to download.


@functools.cache
def random_filters(seed, *shapes):
    """Fixed filters, one array of each shape. Of layer 1, 24 ignore constant input and 12 of those,
    in 3-D, whatever stands still."""
    rng = np.random.RandomState(seed)  # its stream is the same in every version of numpy
    layers = []
    for shape in shapes:
        fan_in = math.prod(shape[1:])
        layers.append(rng.standard_normal(shape) / math.sqrt(fan_in))
    first = layers[0]
    space = tuple(range(2, first.ndim))  # (kh, kw), or (kt, kh, kw) in 3-D
    first[:24] -= first[:24].mean(space, keepdims=True)
    if first.ndim == 5:
        first[:12] -= first[:12].mean(2, keepdims=True)  # over time
    return [torch.from_numpy(w.astype(np.float32)) for w in layers]


def random_features(x, filters, strides, slopes):
    """Convolve x (B, C, ...) layer by layer -> (list of the mean and the deviation (B, C') of each
    layer, the last layer). slopes: what leaky ReLU does to negative values."""
    stats = []
    for w, stride, slope in zip(filters, strides, slopes, strict=True):
        convolve = F.conv3d if w.dim() == 5 else F.conv2d
        padding = [k // 2 for k in w.shape[2:]]
        # ReLU halves the power, and 1.4^2 restores it. (One line: a name for each step took half as
        # long again, as glibc then gave memory back and fetched it anew.)
        x = 1.4 * F.leaky_relu(convolve(x, w.to(x), stride=stride, padding=padding), slope)
        flat = x.flatten(2)  # (B, C', all positions)
        stats += [flat.mean(2), flat.std(2)]
    return stats, x


def motion_features(small):
    """Small frames (B, F, pixels) -> (B, 12): how much they change, and how unevenly."""
    motion = []
    for lag in (1, 2, 4):
        change = (small[:, lag:] - small[:, :-lag]).abs().mean(2)  # (B, F - lag)
        motion += [change.mean(1), change.std(1, correction=0), change.amax(1)]
    second = small.diff(n=2, dim=1).abs().mean(2)  # (B, F - 2): accelerations
    third = small.diff(n=3, dim=1).abs().mean(2)  # (B, F - 3)
    motion += [second.mean(1), second.std(1, correction=0), third.mean(1)]
    return torch.stack(motion, 1)


def video_features(video):
    """Video (B, F >= 5, H, W, 3) in [0, 1] -> (B, 844): 832 statistics of fixed convolutions, and
    12 of motion, times 30. ValueError for fewer than 5 frames."""
    batch, frames = video.shape[:2]
    if frames < 5:
        raise ValueError("The built-in video features need clips of at least 5 frames, and these "
                         f"have {frames}.")
    x = video.permute(0, 1, 4, 2, 3).flatten(0, 1) * 2 - 1  # (B F, 3, H, W)
    x = F.interpolate(x, size=(64, 64), mode="bilinear")
    small = F.avg_pool2d(x, 4).reshape(batch, frames, -1)  # (B, F, 3 * 16 * 16)
    x = x.reshape(batch, frames, 3, 64, 64).transpose(1, 2).contiguous()  # (B, 3, F, 64, 64)
    filters = random_filters(0, (32, 3, 3, 5, 5), (64, 32, 3, 3, 3), (64, 64, 3, 3, 3))
    stats, x = random_features(x, filters, ((1, 2, 2), 2, 2), (0, 0.2, 0.2))
    layout = F.adaptive_avg_pool3d(x, 2).flatten(1)  # (B, 64 * 2 * 2 * 2)
    return torch.cat([*stats, layout, 30 * motion_features(small)], 1)


def resample(audio, old, new):
    """Audio (B, L) at `old` Hz -> (B, round(L new / old)), through its spectrum."""
    if old == new:
        return audio
    n = audio.shape[-1]
    m = round(n * new / old)
    spectrum = torch.fft.rfft(audio)[..., :m // 2 + 1]  # irfft pads it with zeros where it is short
    return torch.fft.irfft(spectrum, m) * (m / n)


def triangles(f, points):
    """Filters (n, len(f)) that rise from points[i], reach 1 at points[i + 1], and are 0 again at
    points[i + 2]."""
    left = points[:-2, None]
    middle = points[1:-1, None]
    right = points[2:, None]
    rise = (f - left) / (middle - left)
    fall = (right - f) / (right - middle)
    return np.maximum(0, np.minimum(rise, fall))


@functools.cache
def mel_filters(rate, n_fft, n_mels):
    """Slaney's triangles (n_mels, n_fft / 2 + 1) of equal area, up to rate / 2 > 1 kHz."""
    # The mel scale is linear up to 1 kHz, which is mel 15, then logarithmic: mel 42 is 6.4 kHz.
    top = 15 + 27 * math.log(rate / 2000, 6.4)
    mel = np.linspace(0, top, n_mels + 2)
    points = np.where(mel < 15, mel / 0.015, 1000 * 6.4 ** ((mel - 15) / 27))  # Hz
    f = np.arange(n_fft // 2 + 1) * rate / n_fft
    area = (points[2:] - points[:-2])[:, None] / 2
    return torch.from_numpy(triangles(f, points) / area)


def mel_power(audio, rate, n_fft, hop, n_mels):
    """Audio (B, L >= 50 ms) -> (B, n_mels, 1 + L // hop): Slaney mels of the power in Hann windows
    around sample i hop. ValueError for shorter sounds."""
    if audio.shape[-1] < rate / 20:
        raise ValueError(f"Sound of {audio.shape[-1]} samples is too short: at least 50 ms are "
                         "needed.")
    window = torch.hann_window(n_fft).to(audio)
    spectrum = torch.stft(audio, n_fft, hop, window=window, pad_mode="constant",
                          return_complex=True)  # (B, n_fft / 2 + 1, 1 + L // hop)
    return mel_filters(rate, n_fft, n_mels).to(audio) @ spectrum.abs().square()


def log_mel(audio, rate):
    """Audio (B, L) -> (B, 64, 1 + L' // 256): log mels, floor 1e-5, of its L' samples at 16 kHz."""
    audio = resample(audio.double(), rate, 16000)
    power = mel_power(audio, 16000, n_fft=1024, hop=256, n_mels=64)
    return (power + 1e-5).log().float()


def audio_features(audio, rate):
    """Audio (B, L) in [-1, 1] -> (B, 448): mean and deviation of 64 log mels and of fixed
    convolutions of them."""
    mel = log_mel(audio, rate)  # (B, 64, T)
    filters = random_filters(1, (32, 1, 5, 5), (64, 32, 3, 3), (64, 64, 3, 3))
    image = (mel[:, None] + 6) / 4  # (B, 1, 64, T), of about deviation 1
    stats, _ = random_features(image, filters, (1, 2, 2), (0, 0, 0))
    return torch.cat([mel.mean(2) / 4, mel.std(2) / 4, *stats], 1)


def standardize(x):
    """(n, F) -> each row less its mean, divided by its deviation."""
    return (x - x.mean(1, keepdim=True)) / (x.std(1, keepdim=True) + 1e-6)


def joint_features(motion, rise):
    """Envelopes (n, F) of seen motion and heard rises -> (n, 9): their correlation at lags of
    -4 ... 4 frames, mean_t motion(t + lag) rise(t). It tells whether sound and picture match.
    ValueError when the two differ in length."""
    frames = motion.shape[1]
    if rise.shape[1] != frames:
        raise ValueError(f"There are {frames} frames of video and sound for {rise.shape[1]}.")
    x = standardize(motion)
    y = standardize(rise)
    correlations = []
    for lag in range(-4, 5):
        first = max(lag, 0)  # of x
        other = max(-lag, 0)  # of y
        product = x[:, first:frames - other] * y[:, other:frames - first]
        correlations.append(product.mean(1))
    return torch.stack(correlations, 1)


# ---- Onsets: when something is heard


def onset_envelope(audio, rate, hop=512, n_fft=2048):
    """Audio (B, L) -> onset strength (B, 1 + L // hop): the mean rise in dB over 128 mels."""
    power = mel_power(audio.double(), rate, n_fft, hop, n_mels=128)  # (B, 128, T)
    db = 10 * power.clamp(min=1e-10).log10()
    floor = db.amax((1, 2), keepdim=True) - 80
    rise = db.maximum(floor).diff(dim=2).clamp(min=0).mean(1)  # (B, T - 1)
    late = n_fft // (2 * hop)  # a sound enters a window before its center
    return F.pad(rise, (1 + late, 0))[:, :db.shape[2]]


def onset_frames(envelope, rate, hop=512):
    """Onset strength (T,), scaled to 0 ... 1 -> list of frames: those that are the greatest of the
    last 30 ms and 0.07 above the mean of 100 ms on both sides, 30 ms apart."""
    x = np.asarray(envelope, np.float64)
    x = (x - x.min()) / (np.ptp(x) + np.finfo(np.float32).tiny)
    if not x.any():
        return []
    wait = math.ceil(0.03 * rate // hop)
    wide = math.ceil(0.1 * rate // hop)
    frames = []
    n = 0
    while n < len(x):
        greatest = x[max(0, n - wait):n + 1].max()
        mean = x[max(0, n - wide):n + wide + 1].mean()
        if x[n] == greatest and x[n] >= mean + 0.07:
            frames.append(n)
            n += wait
        n += 1
    return frames


def onset_times(audio, rate):
    """Audio (L,) -> list of its onsets (s), found at 22,050 Hz, as at 16 kHz most would be found
    twice."""
    audio = resample(audio[None].double(), rate, 22050)
    strength = onset_envelope(audio, 22050)[0]
    return [n * 512 / 22050 for n in onset_frames(strength, 22050)]


# ---- Optical flow (Farneback 2003): how fast the picture moves


@functools.cache
def filter_matrix(taps, n, border, scale=1.0):
    """The (n, round(n scale)) matrix that filters an axis of n pixels from the right, x @ M, and
    resizes it. border: a mode of np.pad."""
    reach = len(taps) // 2
    padded = np.pad(np.eye(n), ((reach, reach), (0, 0)), border)  # row i: the pixel that is there
    matrix = sum(tap * padded[k:k + n] for k, tap in enumerate(taps))
    matrix = torch.from_numpy(matrix).float().T
    if scale == 1:
        return matrix
    return F.interpolate(matrix[None], size=round(n * scale), mode="linear")[0]


def gaussian(sigma, radius):
    """The 2 radius + 1 weights of a Gaussian, of sum 1, as an array."""
    x = torch.arange(-radius, radius + 1).double()
    return torch.softmax(-x ** 2 / (2 * sigma ** 2), 0).numpy()


POWERS = ((0, 0), (1, 0), (0, 1), (2, 0), (0, 2), (1, 1))  # of x and y: 1, x, y, x^2, y^2, x y


def quadratic_fit(gray):
    """Fit f(p) = c + b . p + p A p^T around each pixel of (..., H, W), by least squares with
    Gaussian weights in windows of 11 x 11 -> (5, ..., H, W): b_x, b_y, A_xx, A_yy, A_xy."""
    u = np.arange(-5, 6)
    weight = gaussian(1.2, 5)
    # The weighted sums of f x^i y^j over each window, one axis after the other,
    H, W = gray.shape[-2:]
    across = [filter_matrix(tuple(weight * u ** i), W, "edge") for i in range(3)]
    down = [filter_matrix(tuple(weight * u ** j), H, "edge") for j in range(3)]
    sums = torch.stack([down[j].T @ (gray @ across[i]) for i, j in POWERS])  # (6, ..., H, W)
    # equal G (c, b_x, b_y, A_xx, A_yy, 2 A_xy), where G has the weighted sums of x^i y^j x^k y^l.
    basis = np.stack([np.outer(u ** j, u ** i).ravel() for i, j in POWERS])  # (6, 121)
    gram = basis * np.outer(weight, weight).ravel() @ basis.T
    solve = np.linalg.inv(gram)[1:]  # c is not needed
    solve[-1] *= 0.5
    return torch.tensordot(torch.from_numpy(solve).float(), sums, 1)


def border_trust(n):
    """(n,) weights of pixels along an axis: less in the outermost five."""
    trust = torch.tensor([0.14, 0.14, 0.4472, 0.4472, 0.4472, 1.0])
    from_left = torch.arange(n)
    from_border = from_left.minimum(from_left.flip(0))
    return trust[from_border.clamp(max=5)]


def refine_flow(first, second, flow):
    """One round: fits (5, P, h, w) of the first and second frame of P pairs, and the flow
    (P, 2, h, w) so far -> a better flow.

    Where a picture moves by d, its fits have A2 = A1 and b2 = b1 - 2 A1 d: A d = (b1 - b2) / 2.
    With the second fit read at p + flow, A d = (b1 - b2) / 2 + A flow, with the mean A of both."""
    h, w = flow.shape[-2:]
    x = torch.arange(w) + flow[:, 0]  # (P, h, w): where each pixel goes
    y = torch.arange(h)[:, None] + flow[:, 1]
    grid = torch.stack([x * (2 / (w - 1)) - 1, y * (2 / (h - 1)) - 1], -1)  # in [-1, 1]
    there = F.grid_sample(second.transpose(0, 1), grid, align_corners=True).transpose(0, 1)
    # What moves out of the picture keeps its flow: b = 0, and A is the first frame's.
    inside = (x >= 0) & (x < w - 1) & (y >= 0) & (y < h - 1)
    b = torch.where(inside, first[:2] - there[:2], 0)
    A = torch.where(inside, first[2:] + there[2:], 2 * first[2:])
    trusted = torch.cat([b, A]) / 2 * border_trust(w) * border_trust(h)[:, None]
    bx, by, xx, yy, xy = trusted  # (P, h, w) each
    bx = bx + xx * flow[:, 0] + xy * flow[:, 1]
    by = by + xy * flow[:, 0] + yy * flow[:, 1]
    # Least squares over windows of 15 x 15: d = G^-1 h, of the means G = <A^T A> and h = <A^T b>.
    products = torch.stack([
        xx * xx + xy * xy,
        yy * yy + xy * xy,
        (xx + yy) * xy,
        xx * bx + xy * by,
        xy * bx + yy * by,
    ])  # (5, P, h, w)
    box = (1 / 15,) * 15
    down = filter_matrix(box, h, "edge")
    across = filter_matrix(box, w, "edge")
    gxx, gyy, gxy, hx, hy = down.T @ (products @ across)
    determinant = gxx * gyy - gxy * gxy + 1e-3
    dx = gyy * hx - gxy * hy
    dy = gxx * hy - gxy * hx
    return torch.stack([dx, dy], 1) / determinant[:, None]  # (P, 2, h, w)


PYRAMID = ((3, 3.5, 9), (2, 1.5, 4), (1, 0.5, 1), (0, 0.8, 1))  # halvings, sigma and radius of blur


def shrink(gray, k, sigma, radius):
    """Gray frames (..., H, W) -> blurred, and halved k times."""
    taps = tuple(gaussian(sigma, radius))
    H, W = gray.shape[-2:]
    down = filter_matrix(taps, H, "reflect", 0.5 ** k)
    across = filter_matrix(taps, W, "reflect", 0.5 ** k)
    return down.T @ (gray @ across)


def optical_flow(gray):
    """Farneback's flow of gray frames (B, F, H, W), 0 ... 255 -> (B, F - 1, 2, H, W), in pixels to
    the right and down: from coarse to fine, as a fit sees only motions within its window."""
    B, frames, H, W = gray.shape
    flow = gray.new_zeros(B * (frames - 1), 2, 1, 1)
    for k, sigma, radius in PYRAMID:
        if k > 0 and min(H, W) < 32 * 2 ** k:  # too small to be halved so often
            continue
        fit = quadratic_fit(shrink(gray, k, sigma, radius))  # (5, B, F, h, w)
        first = fit[:, :, :-1].flatten(1, 2)  # (5, P, h, w), P = B (F - 1) pairs of frames
        second = fit[:, :, 1:].flatten(1, 2)
        flow = 2 * F.interpolate(flow, size=first.shape[-2:], mode="bilinear")
        for _ in range(3):
            flow = refine_flow(first, second, flow)
    return flow.view(B, frames - 1, 2, H, W)


# ---- Alignment: AV-Align and events
# AV-Align asks whether peaks of sound and of motion come together. They are times (s): of audio its
# onset_times(), of video the peak_times() of the mean length of its optical_flow().


def peak_times(x, fps, threshold=0.1):
    """The times (s) of the strict local maxima of a trajectory x (F,) that reach `threshold`; never
    its ends."""
    times = []
    for i in range(1, len(x) - 1):
        if x[i - 1] < x[i] > x[i + 1] and x[i] >= threshold:
            times.append(i / fps)
    return times


def av_align_iou(audio_peaks, video_peaks, fps):
    """AV-Align (TempoTokens, UniForm): pairs / (audio peaks + video peaks - pairs), where each
    audio peak takes the first free video peak within a frame. NaN (leave out) without any peak."""
    free = list(video_peaks)
    for a in audio_peaks:
        for v in free:
            if v - 1 / fps < a < v + 1 / fps:
                free.remove(v)
                break
    pairs = len(video_peaks) - len(free)
    union = len(audio_peaks) + len(free)
    return pairs / union if union else math.nan


def av_align_mean(audio_peaks, video_peaks, fps, window=3):
    """AV-Align (ProAV-DiT): the mean of the share of audio peaks that have a video peak within
    `window` frames, and of that of video peaks that have an audio peak; 0 without peaks."""
    apart = np.abs(np.subtract.outer(audio_peaks, video_peaks))  # (audio peaks, video peaks)
    if not apart.size:
        return 0.0
    near = apart <= window / fps + 1e-9
    return float(near.any(0).mean() + near.any(1).mean()) / 2


def flash_times(gray, fps):
    """Gray frames (F, H, W), 0 ... 255 -> the middles (s) of those where most of the picture
    flashes: toy impacts."""
    x = gray.flatten(1).median(1)[0]  # (F,): the background, more than half of the pixels
    x = (x - x.median()).tolist()  # 0 in most frames
    times = peak_times([0, *x, 0], fps, threshold=30)  # late by a frame, for the 0 in front
    return [t - 0.5 / fps for t in times]


def sync_error(events, onsets, start=0.1):
    """Mean distance (ms) of each event to the nearest onset and back, of times (s); NaN (leave out)
    without a pair. Times before `start` do not count: a sound begins with an onset, no event."""
    events = [t for t in events if t >= start]
    onsets = [t for t in onsets if t >= start]
    apart = np.abs(np.subtract.outer(events, onsets))  # (events, onsets)
    if not apart.size:
        return math.nan
    return 1000 * float(np.mean([*apart.min(0), *apart.min(1)]))


# ---- Extractors, and classes without a network


def i3d(model, video):
    """Video (B, F, H, W, 3) in [0, 1], as MM-Diffusion shows it to I3D: the shorter side 224, then
    the center, in [-1, 1]; logits are averaged over time -> (B, D)."""
    x = video.permute(0, 1, 4, 2, 3).flatten(0, 1)  # (B F, 3, H, W)
    shorter = min(x.shape[2:])
    size = [round(n * 224 / shorter) for n in x.shape[2:]]
    x = F.interpolate(x, size=size, mode="bilinear")
    top, left = [(n - 224) // 2 for n in size]
    x = x[..., top:top + 224, left:left + 224]
    x = x.unflatten(0, video.shape[:2]).transpose(1, 2)  # (B, 3, F, 224, 224)
    out = model(x * 2 - 1)
    return out.flatten(2).mean(2) if out.dim() > 2 else out


def stylegan_v(model, video):
    """Video (B, F, H, W, 3) in [0, 1] -> features of StyleGAN-V's I3D file, which resizes."""
    x = video.permute(0, 4, 1, 2, 3) * 255  # (B, 3, F, H, W)
    return model(x, rescale=True, resize=True, return_features=True)


def vggish16k(model, audio, rate):
    """Audio (B, L) -> (B, P, D): VGGish sees log mels (HTK's) of P patches of 0.96 s."""
    x = resample(audio, rate, 16000)
    missing = max(0, 15600 - x.shape[1])  # at least one patch
    x = F.pad(x, (56, 56 + missing))  # windows of 400 samples, padded to 512
    window = torch.hann_window(400).to(x)
    spectrum = torch.stft(x, 512, 160, 400, window, center=False, return_complex=True).abs()
    f = 1127 * np.log1p(np.arange(257) * 31.25 / 700)  # the bins' frequencies, in mel
    low, high = 1127 * np.log1p(np.array([125, 7500]) / 700)
    filters = torch.from_numpy(triangles(f, np.linspace(low, high, 66))).to(x)  # (64, 257)
    mel = (filters @ spectrum + 0.01).log().transpose(1, 2)  # (B, T, 64)
    patches = mel.shape[1] // 96
    mel = mel[:, :patches * 96].reshape(-1, 1, 96, 64)  # (B P, 1, 96, 64)
    return model(mel).unflatten(0, (len(audio), patches))


def audioclip44k(model, audio, rate):
    """Audio (B, L) -> AudioCLIP's embeddings (B, D) of 1.6 s, scaled to length 1."""
    x = resample(audio, rate, 44100)[:, :70560]  # 1.6 s at 44.1 kHz
    x = F.pad(x, (0, 70560 - x.shape[1]))
    return F.normalize(model(x), dim=-1)


BUILTIN = {"video": video_features, "audio": audio_features}
PREPARE = {"video": {"i3d": i3d, "stylegan-v": stylegan_v},
           "audio": {"vggish16k": vggish16k, "audioclip44k": audioclip44k}}


def extractor(form, kind, device="cpu"):
    """None, "builtin", "FILE.ts", "module:function" (or these after "preset:"), or a callable
    -> (callable, name). kind is video or audio. ValueError for anything else."""
    if form in (None, "builtin"):
        return BUILTIN[kind], "builtin"
    if callable(form):
        return form, getattr(form, "__name__", "callable")
    preset, _, rest = form.partition(":")
    prepare = PREPARE[kind].get(preset)
    if prepare is None:
        rest = form
    module, _, name = rest.partition(":")
    try:
        if os.path.isfile(rest):
            path = rest
            name = Path(path).stem
            model = torch.jit.load(path, device).eval()
        else:
            path = importlib.import_module(module).__file__
            model = getattr(sys.modules[module], name)
    except (ImportError, AttributeError, ValueError, RuntimeError):
        raise ValueError(f"'{form}' is no TorchScript file and no module:function for {kind} "
                         "features.") from None
    if prepare is not None:
        model = functools.partial(prepare, model)
        name = preset
    # In the name, as numbers of different networks must not be compared.
    code = hashlib.sha256(Path(path).read_bytes()).hexdigest()

    def extract(x, *rate):
        return model(x.to(device), *rate).float().cpu()
    return extract, f"{name}-{code[:8]}"


def lda(x, labels, dims=48, shrinkage=0.2, temperature=10.0):
    """A Gaussian classifier with one covariance, in closed form: features x (n, ...), n labels
    -> (function: features (m, ...) -> logits (m, K); the K names)."""
    x = rows(x.flatten(1))
    names = sorted(set(labels))
    y = torch.tensor([names.index(label) for label in labels])
    mean = x.mean(0)
    std = x.std(0) + 1e-4
    x = (x - mean) / std
    axes = torch.linalg.svd(x, full_matrices=False)[2][:dims].T  # (D, dims): PCA
    x = x @ axes
    means = torch.stack([x[y == k].mean(0) for k in range(len(names))])  # (K, dims)
    cov = torch.cov((x - means[y]).T, correction=0)
    ridge = shrinkage * cov.trace() / len(cov)  # few clips know little of a covariance
    cov = (1 - shrinkage) * cov + ridge * torch.eye(len(cov))
    # log p(k | x) = x . S^-1 m_k - m_k . S^-1 m_k / 2 + what is the same for all classes k
    weight = torch.linalg.solve(cov, means.T)  # (dims, K)
    bias = (means.T * weight).sum(0) / 2

    def classify(z):
        z = (rows(z.flatten(1), 1) - mean) / std @ axes
        return (z @ weight - bias) / temperature
    return classify, names


# ---- The command


def look_at_video(video, extract, fps):
    """Video uint8 (F, H, W, 3) -> its features, motion (F,), and times (s) of peaks and flashes."""
    video = torch.from_numpy(video)[None].float()  # (1, F, H, W, 3)
    gray = video @ torch.tensor([0.299, 0.587, 0.114])  # (1, F, H, W), 0 ... 255
    change = gray.diff(dim=1).abs().mean((0, 2, 3)) / 255  # (F - 1,)
    speed = optical_flow(gray.round()).norm(dim=2).mean((0, 2, 3))  # (F - 1,)
    return {
        "video": extract(video / 255)[0],
        "motion": torch.cat([change[:1], change]),
        "peaks": peak_times([speed[0], *speed], fps),
        "flashes": flash_times(gray[0], fps),
    }


def look_at_audio(audio, extract, fps, rate):
    """Audio float32 (L,) -> its features, times (s) of onsets, and its rises in loudness (F,)."""
    audio = torch.from_numpy(audio)[None].float()  # (1, L)
    rise = log_mel(audio, rate).diff(dim=2).clamp(min=0).mean(1)  # (1, T - 1)
    frames = audio.shape[1] * fps // rate
    return {
        "audio": extract(audio, rate)[0],
        "onsets": onset_times(audio[0], rate),
        "rise": F.adaptive_max_pool1d(F.pad(rise, (1, 0)), frames)[0],
    }


@torch.no_grad()
def look(clip, extract, fps, rate):
    """What the metrics need of a clip, a dict of video uint8 (F, H, W, 3), audio float32 (L,),
    label, color and events, as far as it has them, and `extract` a function for the stream."""
    found = {}
    for key in ("label", "color", "events"):
        if key in clip:
            found[key] = clip[key]
    if "video" in clip and "video" in extract:
        found |= look_at_video(clip["video"], extract["video"], fps)
    if "audio" in clip and "audio" in extract:
        found |= look_at_audio(clip["audio"], extract["audio"], fps, rate)
    return found


def observe(clips, extract, fps, rate):
    """look() at all clips, one by one -> {name: tensor (n, ...) or list of n}. Processes share the
    work, and all get all. ValueError when some clips lack a stream that others have."""
    from tqdm import tqdm  # not needed by what is above
    rank = 0
    world = 1
    if dist.is_initialized():
        rank = dist.get_rank()
        world = dist.get_world_size()
    mine = []
    try:
        for i in tqdm(range(rank, len(clips), world), disable=rank > 0, unit="clip"):
            mine.append(look(clips[i], extract, fps, rate))
    except ValueError as error:
        mine = error  # for all processes, so that none waits for this one
    shares = [mine]
    if world > 1:  # process r has clips r, r + world, r + 2 world, ...
        shares = [None] * world
        dist.all_gather_object(shares, mine)
    for share in shares:
        if isinstance(share, ValueError):
            raise share
    found = [shares[i % world][i // world] for i in range(len(clips))]
    columns = {}
    for key in max(found, key=len):  # of the clip that has most
        if not all(key in x for x in found):
            raise ValueError(f"Some of the clips have no {key}, which others have.")
        column = [x[key] for x in found]
        columns[key] = torch.stack(column) if torch.is_tensor(column[0]) else column
    return columns


def mean_score(score, onsets, times, *options):
    """The mean of a score of two lists of times over the clips that have one; NaN without any."""
    values = []
    for heard, seen in zip(onsets, times, strict=False):
        values.append(score(heard, seen, *options))
    return float(np.nanmean(values)) if np.isfinite(values).any() else math.nan


def alignment(seen, fps, roll=0):
    """Observed clips, their sound rolled by `roll` -> (joint features (n, 9), {score: mean})."""
    n = len(seen["onsets"])
    onsets = [seen["onsets"][i - roll] for i in range(n)]
    peaks = seen["peaks"]
    means = {
        "av_align_iou": mean_score(av_align_iou, onsets, peaks, fps),
        "av_align_mean1": mean_score(av_align_mean, onsets, peaks, fps, 1),
        "av_align_mean3": mean_score(av_align_mean, onsets, peaks, fps, 3),
        "sync_ms": mean_score(sync_error, onsets, seen["flashes"]),
        "sync_truth_ms": mean_score(sync_error, onsets, seen.get("events", ())),  # toy clips have
    }
    return joint_features(seen["motion"], seen["rise"].roll(roll, 0)), means


def compare_features(kind, x, y, tag):
    """Features of the real clips, x, and of the fake ones, y, of a stream -> rows for compare()."""
    half = len(x) // 2
    letter = kind[0]  # fvd and kvd, or fad and kad
    table = {}
    table[f"f{letter}d_{tag}"] = [frechet(x, y), frechet(x[:half], x[half:])]
    table[f"k{letter}d_{tag}"] = [mmd(x, y), mmd(x[:half], x[half:])]
    if tag.startswith("audioclip44k"):
        table["fad_mmdiff"] = [1e4 * value for value in table[f"fad_{tag}"]]
    return table


def accuracy(classifier, x, labels):
    """The share of features x (n, ...) whose label an lda() finds."""
    classify, names = classifier
    guesses = classify(x).argmax(1).tolist()
    right = [names[k] == label for k, label in zip(guesses, labels, strict=True)]
    return float(np.mean(right))


def compare_classes(kind, real, fake, key):
    """How well a classifier of the real clips finds the labels (`key`) of the fake ones -> rows for
    compare(). Beside it: one of the first half of the real clips, tried on the second."""
    x = real[kind]
    labels = real[key]
    half = len(x) // 2
    # Nothing to tell apart, or so few clips that none shares its class with another.
    if len(set(labels)) < 2 or len(set(labels[:half])) == half:
        return {}
    classifier = lda(x, labels)
    trial = lda(x[:half], labels[:half])
    right = accuracy(classifier, fake[kind], fake[key])
    right_of_real = accuracy(trial, x[half:], labels[half:])
    classify, names = classifier
    return {
        f"accuracy_{key}_{kind}_builtin": [right, 1 / len(names), right_of_real],
        f"is_{key}_{kind}_builtin": [inception_score(classify(fake[kind]))[0]],
    }


def compare_alignment(real, fake, fps):
    """Two observed sets with video and audio -> rows for compare()."""
    joint, means = alignment(fake, fps)
    _, floor = alignment(fake, fps, roll=1)
    real_joint, real_means = alignment(real, fps)
    mismatched, real_floor = alignment(real, fps, roll=1)
    table = {}
    table["fd_joint_builtin"] = [frechet(real_joint, joint), frechet(*real_joint.tensor_split(2)),
                                 math.nan, frechet(real_joint, mismatched)]
    for name in means:
        table[name] = [means[name], floor[name], real_means[name], real_floor[name]]
    return table


def compare(real, fake, tags, fps, logits=False):
    """Two observed sets -> {metric: [value, its floor, that of the real clips, its floor]}, as far
    as it has them. tags: names of the features by stream; logits: features are, clips paired.
    ValueError for fewer than 4 clips, for features of different widths, and for NaN."""
    table = {}
    for kind in ("video", "audio"):
        if kind not in real or kind not in fake:
            continue
        x = real[kind]
        y = fake[kind]
        tag = tags[kind]
        table |= compare_features(kind, x, y, tag)
        if logits and tag != "builtin":
            score, _, _ = inception_score(y, 10)
            score_of_real, _, _ = inception_score(x, 10)
            table[f"is_{kind}_{tag}"] = [score, math.nan, score_of_real]
            table[f"kl_{kind}_{tag}"] = [paired_kl(x, y), paired_kl(x, y.roll(1, 0))]
        keys = ("label", "color") if kind == "video" else ("label",)  # colors have no sound
        for key in keys:
            if tag == "builtin" and key in real and key in fake:
                table |= compare_classes(kind, real, fake, key)
    if all(key in seen for key in ("motion", "rise") for seen in (real, fake)):
        table |= compare_alignment(real, fake, fps)
    return table


def command_line():
    """The parser of the command's options."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--real", default="toy", help="data set or folder of clips [toy]")
    add("--fake", required=True, help="data set or folder of clips to be judged")
    add("--n", type=int, default=2048, help="clips of each, at most [2048]")
    add("--video_features", default="builtin", help="builtin, FILE or module:function [builtin]")
    add("--audio_features", default="builtin", help="builtin, FILE or module:function [builtin]")
    add("--logits", action="store_true", help="features are logits, clips paired: IS and KL")
    add("--protocol", default="plain", help="plain or stylegan-v: how clips are picked [plain]")
    add("--device", default="cpu", help="where a FILE runs [cpu]")
    add("--json", help="write the table to this file, too")
    # The shape of the clips; .npz files say their own.
    add("--frames", type=int, default=16, help="[16]")
    add("--size", type=int, default=32, help="height and width, pixels [32]")
    add("--fps", type=int, default=10, help="frames per second [10]")
    add("--rate", type=int, default=8000, help="audio samples per second [8000]")
    return parser


def print_table(table):
    """Print the table of compare(), a line per metric, with a gap for what is not finite."""
    print(" " * 32 + "       value   its floor        real   its floor")
    for name, values in table.items():
        line = f"{name:32}"
        for value in values:
            line += f"{value:12.4g}" if math.isfinite(value) else " " * 12
        print(line)


def write_json(path, args, table):
    """{"options": of the command, "metrics": {name: [values]}}; null for what is not finite."""
    metrics = {}
    for name, values in table.items():
        metrics[name] = [v if math.isfinite(v) else None for v in values]
    Path(path).write_text(json.dumps({"options": vars(args), "metrics": metrics}, indent=1))


def main(argv=None):
    import data  # it reads the clips: the command, unlike the functions, needs it

    parser = command_line()
    parser.error = lambda message: data.end("metrics.py", f"{message} (--help lists the options)")
    args = parser.parse_args(argv)
    first = os.environ.get("RANK", "0") == "0"  # this process speaks and writes
    if "RANK" in os.environ:
        dist.init_process_group("gloo")
    try:
        extract = {}
        tags = {}
        for kind, form in (("video", args.video_features), ("audio", args.audio_features)):
            extract[kind], tags[kind] = extractor(form, kind, args.device)
        fake = data.Clips(args.fake, "val", args.n, args.frames, args.size, args.fps, args.rate,
                          args.protocol)
        real = data.Clips(args.real, "train", args.n, fake.frames, fake.size, fake.fps, fake.rate,
                          args.protocol)
        for name in ("frames", "size", "fps", "rate"):  # .npz files bring their own
            here = getattr(fake, name)
            there = getattr(real, name)
            if here != there:
                raise ValueError(f"The fake clips have {name} {here} and the real ones {there}: "
                                 "they cannot be compared.")
            setattr(args, name, here)
        seen = {}
        for side, clips in (("fake", fake), ("real", real)):
            if first:
                print(f"{side}: {clips.about}", flush=True)
            seen[side] = observe(clips, extract, args.fps, args.rate)
        table = compare(seen["real"], seen["fake"], tags, args.fps, args.logits)
    except ValueError as error:
        data.end("metrics.py", error)
    if dist.is_initialized():
        dist.destroy_process_group()
    if first:
        print_table(table)
        if args.json:
            write_json(args.json, args, table)


if __name__ == "__main__":
    main()
