"""Metrics for video with sound: the numbers of the five papers, offline, as functions and as a command.

    python metrics.py --real toy --fake out/mm_diffusion/samples_001 --n 2048 --json out.json
    python metrics.py --real concerts --fake DIR --video_features i3d:i3d.ts --audio_features vggish16k:vggish.ts
    python metrics.py --real toy:bounce,collide --ladder --n 256       # does each number grow with what it measures?
    torchrun --nproc_per_node=2 metrics.py ...                         # the same numbers from two processes

--real and --fake are data sets (real: train split, fake: val split) or folders: of .npz files (sample.py --npz), else
of videos, whose compression alone moves FVD and FAD. The floor beside a distance is that of the two halves of the real
clips (half of n: its bias, about D / n, is larger); beside an alignment stands that of mismatched pairs.

Features: `builtin` (fixed random convolutions and statistics; not comparable with published numbers, hence fvd_builtin),
a TorchScript file, or module:function, a callable of video (B, F, H, W, 3) float in [0, 1] or of audio (B, L) float and
its rate, that returns (B, D) or (B, T, D), whose rows are stacked. A preset in front prepares the input: i3d:FILE,
stylegan-v:FILE, vggish16k:FILE, audioclip44k:FILE. Names carry the hash of the file. Nothing is ever downloaded.

           in the papers                                                  here
FVD        on R(2+1)D (Paredes), 400 logits of I3D (MM-Diffusion), the    fvd_X of extractor X; --protocol stylegan-v:
           StyleGAN-V file and its protocol (ProAV-DiT)                   pick a video, then its clip; plain: any clip
KVD        kernel (a.b / D + 1)^3, unbiased                               kvd_X, may be negative; no factor 1000
FAD, FD    ResNet18 (Paredes), VGGish (UniForm, SyncFlow), PANNs (FD),    fad_X, unscaled; with audioclip44k also
           AudioCLIP, "x 1e-4" in print, x 1e4 in code (MM-Diffusion)     fad_mmdiff = 1e4 * fad_X
IS, KL     C3D, PANNs, VGGish classes; splits, direction often unstated   is_X over 10 splits; kl_X = KL(real || fake)
AV-Align   IoU (TempoTokens, UniForm), two-way mean in +-3 frames         av_align_iou; av_align_mean3 and, as three
           (ProAV-DiT)                                                    frames tell little, av_align_mean1
PSNR-A     peak and domain unstated                                       psnr_a_wav (peak 2), psnr_a_mel (real's range)
CS, MI     cosine of segments, then clips; MI without an estimator        cosine_score; mi_gaussian, _histogram, _ksg
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
    """x (n, D), or (n, T, D) to be stacked -> float64 (rows, D). UserError for fewer than `least`, NaN or infinity."""
    x = torch.as_tensor(x).detach().double()
    x = x.flatten(0, -2) if x.dim() > 1 else x[:, None]
    if len(x) < least:
        raise UserError(f"This metric needs at least {least} clips or rows, and got {len(x)}.")
    if not x.isfinite().all():
        raise UserError("NaN or infinite values in the features or clips: look for broken files or a diverged model.")
    return x

def moments(x):
    """Sum of (x, 1) (x, 1)^T over rows x (n, D) -> (D + 1, D + 1): adds up over batches and, by all_reduce, processes."""
    x = F.pad(rows(x, 0), (0, 1), value=1.0)  # (n, D + 1): the last row of the sum is that of x, and n
    return x.T @ x

def frechet_of_moments(a, b):
    """|mx - my|^2 + tr Sx + tr Sy - 2 tr (Sx Sy)^(1/2), at least 0, from the moments() of x and y."""
    n, m, mx, my = a[-1, -1], b[-1, -1], a[-1, :-1] / a[-1, -1], b[-1, :-1] / b[-1, -1]
    if min(n, m) < 2:
        raise UserError(f"This metric needs at least 2 clips or rows, and got {int(min(n, m))}.")
    sx, sy = ((t[:-1, :-1] - torch.outer(t[-1, :-1], t[-1, :-1]) / k) / (k - 1) for t, k in ((a, n), (b, m)))
    w, u = torch.linalg.eigh(sx)
    root = (u * w.clamp(min=0).sqrt()) @ u.T  # root Sy root is symmetric, with the eigenvalues of Sx Sy
    trace = torch.linalg.eigvalsh(root @ sy @ root).clamp(min=0).sqrt().sum()
    return max(0.0, float((mx - my).square().sum() + sx.trace() + sy.trace() - 2 * trace))

def frechet(x, y):
    """The Frechet distance of rows x (n, D) and y (m, D): FVD, FAD, FD. Exact for any rank and n < D."""
    x, y = rows(x), rows(y)
    if x.shape[1] != y.shape[1]:
        raise UserError(f"The two sets have features of different widths, {x.shape[1]} and {y.shape[1]}.")
    if min(len(x), len(y)) > 2 * x.shape[1]:
        return frechet_of_moments(moments(x), moments(y))
    mx, my, n, m = x.mean(0), y.mean(0), len(x) - 1, len(y) - 1
    x, y = x - mx, y - my
    # tr (Sx Sy)^(1/2) is the nuclear norm of x y^T / sqrt(n m): no D x D root and no eps
    trace = torch.linalg.svdvals(x @ y.T).sum() / math.sqrt(n * m)
    return max(0.0, float((mx - my).square().sum() + x.square().sum() / n + y.square().sum() / m - 2 * trace))

def mmd(x, y):
    """KVD: unbiased MMD^2 of rows x (n, D) and y (m, D), kernel (a.b / D + 1)^3; negative e.g. for identical sets."""
    x, y = rows(x), rows(y)
    xx, yy, xy = ((a @ b.T / x.shape[1] + 1) ** 3 for a, b in ((x, x), (y, y), (x, y)))
    within = [(k.sum() - k.trace()) / (len(k) * (len(k) - 1)) for k in (xx, yy)]  # over pairs of different rows
    return float(sum(within) - 2 * xy.mean())

def mmd_blocks(x, y, block=50):
    """mmd() of disjoint blocks of consecutive rows, as KID does -> (mean, standard deviation, list)."""
    x, y = rows(x), rows(y)
    size = min(block, len(x), len(y))
    values = [mmd(x[i:i + size], y[i:i + size]) for i in range(0, min(len(x), len(y)) - size + 1, size)]
    return float(np.mean(values)), float(np.std(values)), values

def log_plus(logp, eps):
    """log(p + eps) of log-probabilities, so that no class underflows to NaN; MM-Diffusion adds 1e-7, PANNs 1e-6."""
    return torch.logaddexp(logp, torch.tensor(eps).to(logp).log())

def inception_score(logits, splits=1, eps=0.0):
    """exp(mean_i KL(p_i || mean p)) of logits (n, K) in `splits` parts -> (mean, deviation, list); eps: see log_plus."""
    values = []
    for p in rows(logits, splits).log_softmax(1).tensor_split(splits):
        mean = p.logsumexp(0) - math.log(len(p))
        values.append((p.exp() * (log_plus(p, eps) - log_plus(mean, eps))).sum(1).mean().exp().item())
    return float(np.mean(values)), float(np.std(values)), values

def paired_kl(real, fake, variant="softmax"):
    """mean_i KL(p_i || q_i) of the logits (n, K) of paired clips, p real, q fake. softmax_eps adds 1e-6 to q; so does
    sigmoid_eps, which takes classes as independent and sums over them."""
    real, fake = rows(real, 1), rows(fake, 1)
    if real.shape != fake.shape:
        raise UserError(f"Paired clips are needed: real logits are {tuple(real.shape)}, fake {tuple(fake.shape)}.")
    log = F.logsigmoid if variant == "sigmoid_eps" else functools.partial(F.log_softmax, dim=1)
    gap = log(real) - log_plus(log(fake), 0.0 if variant == "softmax" else 1e-6)
    return float((log(real).exp() * gap).sum(1).mean())

def cosine_score(u, v):
    """CLAP or ImageBind score of embeddings (n, D), or (n, S, D) of segments, averaged first -> (mean cosine, its floor:
    the same with v rolled by one clip)."""
    u, v = (rows(z).view(torch.as_tensor(z).shape) for z in (u, v))
    score = [F.cosine_similarity(u, w, -1, 1e-8).reshape(len(u), -1).mean(1).mean() for w in (v, v.roll(1, 0))]
    return float(score[0]), float(score[1])


# ---- Reconstruction and mutual information -----------------------------------------------------------------

def psnr(x, y, peak=1.0):
    """10 log10(peak^2 / MSE) of each clip x[i] against y[i] -> (n,) dB. Peak 1 for [0, 1], 2 for [-1, 1], or (n,)."""
    error = (torch.as_tensor(x).double() - torch.as_tensor(y).double()).flatten(1).square().mean(1)
    return 10 * torch.log10(torch.as_tensor(peak).double() ** 2 / error)

def si_sdr(estimate, reference):
    """Scale-invariant signal-to-distortion ratio (n,) in dB of waveforms (n, L), means removed; NaN for silence."""
    s, r = (rows(z, 1) - rows(z, 1).mean(1, keepdim=True) for z in (estimate, reference))
    target = (s * r).sum(1, keepdim=True) / r.square().sum(1, keepdim=True) * r
    return 10 * torch.log10(target.square().sum(1) / (s - target).square().sum(1))

def mi_gaussian(x, y, dims=16, shrinkage=1e-3):
    """Mutual information in nats of rows x (n, D), y (n, E), were they Gaussian: (logdet Cx + logdet Cy - logdet Cxy) / 2
    after PCA to at most `dims`; `shrinkage` of the mean variance is added to each variance."""
    x, y = (z - z.mean(0) for z in (rows(x), rows(y)))
    x, y = (z @ torch.linalg.svd(z, full_matrices=False)[2][:dims].T for z in (x, y))
    covs = [z.T @ z / (len(z) - 1) for z in (x, y, torch.cat([x, y], 1))]
    logdets = [torch.logdet(c + shrinkage * c.trace() / len(c) * torch.eye(len(c))) for c in covs]
    return float(logdets[0] + logdets[1] - logdets[2]) / 2

def mi_histogram(x, y, bins=16):
    """Mutual information in nats of two scalars (n,) from a bins x bins histogram; biased by (bins - 1)^2 / (2 n)."""
    p = np.histogram2d(rows(x)[:, 0].numpy(), rows(y)[:, 0].numpy(), bins)[0]
    p, q = p / p.sum(), p.sum(1, keepdims=True) * p.sum(0, keepdims=True) / p.sum() ** 2
    return float((p[p > 0] * np.log(p[p > 0] / q[p > 0])).sum())

def mi_ksg(x, y, k=3):
    """Mutual information in nats of rows x (n, D), y (n, E) from k-th neighbors (Kraskov et al. 2004, eq. 8)."""
    x, y, counts = rows(x, k + 1), rows(y, k + 1), 0
    for i in range(0, len(x), 256):  # a part of the rows at a time: memory grows with n, not n^2
        dx, dy = (torch.cdist(z[i:i + 256], z, p=math.inf) for z in (x, y))
        radius = torch.maximum(dx, dy).topk(k + 1, largest=False)[0][:, -1:]  # the nearest is the row itself
        counts = counts + sum(torch.digamma((d < radius).sum(1).clamp(min=1).double()).sum() for d in (dx, dy))
    # psi(k) + psi(n) - mean(psi(nx + 1) + psi(ny + 1))
    return float(torch.digamma(torch.tensor([k, len(x)]).double()).sum() - counts / len(x))


# ---- The built-in features ---------------------------------------------------------------------------------

@functools.cache
def random_filters(seed, *shapes):
    """Fixed convolutions. In layer 1, 24 filters ignore constant input and 12 of them, if 3-D, all that stands still."""
    rng = np.random.RandomState(seed)  # its stream is the same in every version of numpy
    layers = [rng.standard_normal(shape) / math.sqrt(math.prod(shape[1:])) for shape in shapes]
    layers[0][:24] -= layers[0][:24].mean(tuple(range(2, layers[0].ndim)), keepdims=True)
    layers[0][:12] -= layers[0][:12].mean(2, keepdims=True) if layers[0].ndim == 5 else 0
    return [torch.from_numpy(w.astype(np.float32)) for w in layers]

def random_features(x, filters, strides, slopes):
    """Convolve x (B, C, ...) layer by layer -> (list of mean and deviation (B, C') of each layer, last layer)."""
    stats = []
    for w, stride, slope in zip(filters, strides, slopes, strict=True):
        conv = F.conv3d if w.dim() == 5 else F.conv2d
        x = F.leaky_relu(conv(x, w.to(x), stride=stride, padding=[k // 2 for k in w.shape[2:]]), slope) * 1.4
        stats += [x.flatten(2).mean(2), x.flatten(2).std(2)]
    return stats, x

def video_features(video):
    """Video (B, F >= 5, H, W, 3) in [0, 1] -> (B, 844): 832 statistics of fixed convolutions, 12 of motion times 30."""
    B, T = video.shape[:2]
    if T < 5:
        raise UserError(f"The built-in video features need clips of at least 5 frames, and these have {T}.")
    x = video.permute(0, 1, 4, 2, 3).flatten(0, 1) * 2 - 1  # (B T, 3, H, W)
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

def triangles(f, points):
    """Filters (n, len(f)) that rise from points[i], reach 1 at points[i + 1], and are 0 again at points[i + 2]."""
    left, mid, right = points[:-2, None], points[1:-1, None], points[2:, None]
    return np.maximum(0, np.minimum((f - left) / (mid - left), (right - f) / (right - mid)))

@functools.cache
def mel_filters(rate, n_fft, n_mels):
    """Slaney's triangles (n_mels, n_fft / 2 + 1) of equal area, up to rate / 2 > 1 kHz: linear to 1 kHz, then log."""
    step = math.log(6.4) / 27
    mel = np.linspace(0, 15 + math.log(rate / 2000) / step, n_mels + 2)
    points = np.where(mel < 15, mel / 0.015, 1000 * np.exp((mel - 15) * step))
    filters = triangles(np.arange(n_fft // 2 + 1) * rate / n_fft, points)
    return torch.from_numpy(filters * 2 / (points[2:] - points[:-2])[:, None])

def mel_power(audio, rate, n_fft, hop, n_mels):
    """Audio (B, L) -> (B, n_mels, 1 + L // hop): Slaney mels of the power in Hann windows centered on multiples of hop,
    silence beyond both ends. Raises UserError for less than 50 ms."""
    if audio.shape[-1] < rate / 20:
        raise UserError(f"Sound of {audio.shape[-1]} samples is too short: at least 50 ms are needed.")
    window = torch.hann_window(n_fft).to(audio)
    spectrum = torch.stft(audio, n_fft, hop, window=window, pad_mode="constant", return_complex=True)
    return mel_filters(rate, n_fft, n_mels).to(audio) @ spectrum.abs().square()

def log_mel(audio, rate):
    """Audio (B, L) -> (B, 64, 1 + L' // 256): log mels of its L' samples at 16 kHz, floor 1e-5."""
    return (mel_power(resample(audio.double(), rate, 16000), 16000, 1024, 256, 64) + 1e-5).log().float()

def audio_features(audio, rate):
    """Audio (B, L) in [-1, 1] -> (B, 448): mean and deviation of 64 log mels and of fixed convolutions of them."""
    m, filters = log_mel(audio, rate), random_filters(1, (32, 1, 5, 5), (64, 32, 3, 3), (64, 64, 3, 3))
    stats, _ = random_features((m[:, None] + 6) / 4, filters, (1, 2, 2), (0, 0, 0))
    return torch.cat([m.mean(2) / 4, m.std(2) / 4, *stats], 1)

def joint_features(motion, rise):
    """Envelopes (n, F) of seen motion and heard rises -> (n, 9): their correlation at lags of -4 ... 4 frames."""
    x, y = ((e - e.mean(1, keepdim=True)) / (e.std(1, keepdim=True) + 1e-6) for e in (motion, rise))
    T = x.shape[1]
    return torch.stack([(x[:, max(l, 0):T + min(l, 0)] * y[:, max(-l, 0):T - max(l, 0)]).mean(1)
                        for l in range(-4, 5)], 1)


# ---- Alignment: onsets, optical flow, AV-Align, events -----------------------------------------------------

def onset_envelope(audio, rate, hop=512, n_fft=2048):
    """Audio (B, L) -> onset strength (B, 1 + L // hop): the mean rise in dB over 128 mels."""
    db = 10 * mel_power(audio.double(), rate, n_fft, hop, 128).clamp(min=1e-10).log10()
    rise = db.maximum(db.amax((1, 2), keepdim=True) - 80).diff(dim=2).clamp(min=0).mean(1)
    return F.pad(rise, (1 + n_fft // (2 * hop), 0))[:, :db.shape[2]]  # a sound enters a window before its center

def onset_frames(envelope, rate, hop=512):
    """Onset strength (T,), scaled to 0 ... 1 -> list of frames: greatest in 30 ms, 0.07 above the mean of 200 ms."""
    x, frames, n = np.asarray(envelope, np.float64), [], 0
    x = (x - x.min()) / (np.ptp(x) + np.finfo(np.float32).tiny)
    before, wide, wait = (math.ceil(s * rate // hop) for s in (0.03, 0.1, 0.03))
    while n < len(x) and x.any():
        greatest = x[n] == x[max(0, n - before):n + 1].max()
        if greatest and x[n] >= x[max(0, n - wide):n + wide + 1].mean() + 0.07:
            frames.append(n)
            n += wait
        n += 1
    return frames

def onset_times(audio, rate):
    """Audio (L,) -> list of its onsets, s, found at 22,050 Hz, as at 16 kHz most would be found twice."""
    strength = onset_envelope(resample(audio[None].double(), rate, 22050), 22050)[0]
    return [n * 512 / 22050 for n in onset_frames(strength, 22050)]

@functools.cache
def filter_matrix(taps, n, border, scale=1.0):
    """The (n, round(n scale)) matrix that filters an axis of n pixels from the right, x @ M, and resizes it."""
    padded = np.pad(np.eye(n), ((len(taps) // 2,) * 2, (0, 0)), border)
    m = torch.from_numpy(sum(w * padded[k:k + n] for k, w in enumerate(taps))).float().T
    return m if scale == 1 else F.interpolate(m[None], size=round(n * scale), mode="linear")[0]

def separable(x, across, down):
    """Filter the rows and the columns of x (..., H, W) by two matrices."""
    return down.T @ (x @ across)

def gaussian(sigma, radius):
    taps = np.exp(-np.arange(-radius, radius + 1) ** 2 / (2 * sigma ** 2))
    return taps / taps.sum()

def quadratic_fit(gray):
    """Fit c + b . (x, y) + (x, y) A (x, y)^T around each pixel of (..., H, W) -> (5, ..., H, W): bx, by, Axx, Ayy, Axy."""
    u, w, powers = np.arange(-5, 6), gaussian(1.2, 5), ((0, 0), (1, 0), (0, 1), (2, 0), (0, 2), (1, 1))
    basis = np.stack([np.outer(u ** j, u ** i).ravel() for i, j in powers])  # (6, 121)
    solve = np.linalg.inv(basis * np.outer(w, w).ravel() @ basis.T)[1:] * [[1], [1], [1], [1], [0.5]]
    across, down = ([filter_matrix(tuple(w * u ** i), n, "edge") for i in range(3)] for n in reversed(gray.shape[-2:]))
    moments = torch.stack([separable(gray, across[i], down[j]) for i, j in powers])
    return torch.tensordot(torch.from_numpy(solve).float(), moments, 1)

def refine_flow(first, second, flow):
    """One round: fits (5, P, h, w) of both frames of P pairs and the flow (P, 2, h, w) so far -> a better flow."""
    h, w = flow.shape[-2:]
    x, y = torch.arange(w) + flow[:, 0], torch.arange(h)[:, None] + flow[:, 1]  # (P, h, w): where each pixel goes
    grid = torch.stack([x * (2 / (w - 1)) - 1, y * (2 / (h - 1)) - 1], -1)
    there = F.grid_sample(second.transpose(0, 1), grid, align_corners=True).transpose(0, 1)
    inside = (x >= 0) & (x < w - 1) & (y >= 0) & (y < h - 1)
    # A d = (b1 - b2) / 2 + A flow with the mean A of both frames, trusted less at the borders,
    edges = [torch.tensor([0.14, 0.14, 0.4472, 0.4472, 0.4472, 1.0])[  # of the outermost five pixels
        torch.arange(n).minimum(torch.arange(n).flip(0)).clamp(max=5)] for n in (h, w)]
    xx, yy, xy = torch.where(inside, (first[2:] + there[2:]) / 2, first[2:]) * edges[0][:, None] * edges[1]
    bx, by = torch.where(inside, (first[:2] - there[:2]) / 2, 0) * edges[0][:, None] * edges[1]
    bx, by = bx + xx * flow[:, 0] + xy * flow[:, 1], by + xy * flow[:, 0] + yy * flow[:, 1]
    # by least squares in windows of 15 x 15: d = mean(A^T A)^-1 mean(A^T b)
    g = torch.stack([xx * xx + xy * xy, yy * yy + xy * xy, (xx + yy) * xy, xx * bx + xy * by, xy * bx + yy * by])
    gxx, gyy, gxy, hx, hy = separable(g, *(filter_matrix((1 / 15,) * 15, n, "edge") for n in (w, h)))
    return torch.stack([gyy * hx - gxy * hy, gxx * hy - gxy * hx], 1) / (gxx * gyy - gxy * gxy + 1e-3)[:, None]

def optical_flow(gray):
    """Farneback's flow of gray frames (B, F, H, W), 0 ... 255 -> (B, F - 1, 2, H, W), pixels right and down. Three halvings
    at most, none below 32 pixels; three rounds at each size, the smallest first."""
    (B, T, H, W), flow = gray.shape, None
    for k in reversed([k for k in range(4) if k == 0 or min(H, W) >= 32 * 2 ** k]):
        taps = tuple(gaussian((2 ** k - 1) / 2 or 0.8, max(round(2.5 * (2 ** k - 1)) | 1, 3) // 2))
        fit = quadratic_fit(separable(gray, *(filter_matrix(taps, n, "reflect", 0.5 ** k) for n in (W, H))))
        first, second = fit[:, :, :-1].flatten(1, 2), fit[:, :, 1:].flatten(1, 2)  # (5, P, h, w), P = B (F - 1)
        size = first.shape[-2:]
        flow = torch.zeros(B * (T - 1), 2, *size) if flow is None else 2 * F.interpolate(flow, size=size, mode="bilinear")
        for _ in range(3):
            flow = refine_flow(first, second, flow)
    return flow.view(B, T - 1, 2, H, W)

def peak_times(trajectory, fps, threshold=0.1):
    """The times (s) of the strict local maxima of a trajectory (F,) that reach `threshold`; never its ends."""
    x = [float(v) for v in trajectory]
    return [i / fps for i in range(1, len(x) - 1) if x[i - 1] < x[i] > x[i + 1] and x[i] >= threshold]

def av_align_iou(audio_peaks, video_peaks, fps):
    """AV-Align, intersection over union: each audio peak takes the first free video peak less than a frame away. 0 if
    one list is empty; NaN, to be left out of means, if both are."""
    free = list(video_peaks)
    for a in audio_peaks:
        match = [v for v in free if v - 1 / fps < a < v + 1 / fps]
        if match:
            free.remove(match[0])
    union = len(audio_peaks) + len(free)
    return (len(video_peaks) - len(free)) / union if union else math.nan

def av_align_mean(audio_peaks, video_peaks, fps, window=3):
    """AV-Align, mean of the shares of audio and of video peaks with one of the other within `window` frames; 0 if none."""
    near = np.abs(np.subtract.outer(audio_peaks, video_peaks)) <= window / fps + 1e-9
    return float(near.any(0).mean() + near.any(1).mean()) / 2 if near.size else 0.0

def flash_times(gray, fps):
    """Gray frames (F, H, W), 0 ... 255 -> the middles (s) of those where most of the picture flashes: toy impacts."""
    level = gray.flatten(1).median(1)[0]  # (F,): of the background, more than half of the pixels
    level = [0, *(level - level.median()).tolist(), 0]
    return [(i - 0.5) / fps for i in range(1, len(level) - 1) if level[i] > max(30, level[i - 1]) and level[i] >= level[i + 1]]

def sync_error(events, onsets, start=0.1):
    """Mean distance (ms) of each event to the nearest onset, and the reverse, of times (s) from `start` on, as the
    beginning of a sound is always an onset. NaN, to be left out of means, where either has none."""
    e, o = ([t for t in times if t >= start] for times in (events, onsets))
    apart = np.abs(np.subtract.outer(e, o))
    return 1000 * float(np.mean([*apart.min(0), *apart.min(1)])) if apart.size else math.nan


# ---- Extractors, and classes without a network -------------------------------------------------------------

def i3d(model, video):  # the shorter side 224, its center, [-1, 1]; logits are averaged over time
    x = video.permute(0, 1, 4, 2, 3).flatten(0, 1)  # (B F, 3, H, W)
    H, W = (round(n * 224 / min(x.shape[2:])) for n in x.shape[2:])
    x = F.interpolate(x, size=(H, W), mode="bilinear")[..., (H - 224) // 2:, (W - 224) // 2:][..., :224, :224]
    out = model(x.unflatten(0, video.shape[:2]).transpose(1, 2) * 2 - 1)  # of (B, 3, F, 224, 224)
    return out.flatten(2).mean(2) if out.dim() > 2 else out

def stylegan_v(model, video):  # (B, 3, F, H, W) in [0, 255], which the file resizes
    return model(video.permute(0, 4, 1, 2, 3) * 255, rescale=True, resize=True, return_features=True)

def vggish16k(model, audio, rate):  # log mels (HTK) of patches of 0.96 s, (B P, 1, 96, 64) -> (B, P, D)
    x = resample(audio, rate, 16000)
    x = F.pad(x, (0, max(0, 15600 - x.shape[1])))  # a patch at least: 95 hops of 160 and a window of 400
    x = torch.stft(x, 512, 160, 400, torch.hann_window(400).to(x), center=False, return_complex=True).abs()
    f, points = (1127 * np.log1p(z / 700) for z in (np.arange(257) * 31.25, np.array([125, 7500])))
    m = (torch.from_numpy(triangles(f, np.linspace(*points, 66))).to(x) @ x + 0.01).log().transpose(1, 2)  # (B, T, 64)
    m = m[:, :m.shape[1] // 96 * 96].unflatten(1, (-1, 1, 96))  # (B, P, 1, 96, 64)
    return model(m.flatten(0, 1)).unflatten(0, m.shape[:2])

def audioclip44k(model, audio, rate):  # 1.6 s, (B, 70560) -> embeddings of length 1
    x = resample(audio, rate, 44100)[:, :70560]
    return F.normalize(model(F.pad(x, (0, 70560 - x.shape[1]))), dim=-1)

PRESETS = {"i3d": i3d, "stylegan-v": stylegan_v}, {"vggish16k": vggish16k, "audioclip44k": audioclip44k}

def extractor(form, kind, device="cpu"):
    """None or "builtin", "FILE.ts", "module:function" (both also behind "preset:"), or a callable, for `kind` video or
    audio -> (callable, name). Raises UserError when there is no such thing."""
    if form in (None, "builtin"):
        return (video_features if kind == "video" else audio_features), "builtin"
    if callable(form):
        return form, getattr(form, "__name__", "callable")
    presets = PRESETS[kind == "audio"]
    preset, _, rest = form.partition(":") if form.partition(":")[0] in presets else ("", "", form)
    module, _, name = rest.partition(":")
    try:
        if os.path.isfile(rest):
            path, model = rest, torch.jit.load(rest, map_location=device).eval()
        else:
            sys.path.append(os.getcwd())
            path, model = importlib.import_module(module).__file__, getattr(sys.modules[module], name)
    except (ImportError, AttributeError, ValueError, RuntimeError) as error:
        raise UserError(f"No TorchScript file and no module:function for {kind} features is '{form}': {error}.") from None
    model = functools.partial(presets[preset], model) if preset else model
    tag = f"{preset or name or Path(path).stem}-{hashlib.sha256(Path(path).read_bytes()).hexdigest()[:8]}"
    return lambda x, *rate: model(x.to(device), *rate).float().cpu(), tag

def lda(x, labels, dims=48, shrinkage=0.2, temperature=10.0):
    """Gaussian classifier with one covariance, in closed form: features x (n, D), n labels -> (function from features to
    logits (n, K), K class names). For prompt accuracy and IS without a pretrained network."""
    x, names = rows(x), sorted(set(labels))
    y, mean, std = torch.tensor([names.index(label) for label in labels]), x.mean(0), x.std(0) + 1e-4
    axes = torch.linalg.svd((x - mean) / std, full_matrices=False)[2][:dims].T  # PCA
    x = (x - mean) / std @ axes
    means = torch.stack([x[y == c].mean(0) for c in range(len(names))])
    cov = (x - means[y]).T @ (x - means[y]) / len(x)
    cov = (1 - shrinkage) * cov + shrinkage * cov.trace() / len(cov) * torch.eye(len(cov))
    weight = torch.linalg.solve(cov, means.T)  # (dims, K)
    bias = (means.T * weight).sum(0) / 2
    return lambda z: (((rows(z, 1) - mean) / std) @ axes @ weight - bias) / temperature, names


# ---- The command -------------------------------------------------------------------------------------------

@torch.no_grad()
def look(clip, extract, fps, rate):
    """What the metrics need of a clip, a dict of video uint8 (F, H, W, 3), audio (L,), and more -> dict."""
    out = {k: clip[k] for k in ("label", "color", "events") if k in clip}
    if "video" in clip and "video" in extract:
        video = torch.from_numpy(clip["video"]).float()[None]  # (1, F, H, W, 3)
        gray = video @ torch.tensor([0.299, 0.587, 0.114])
        change = gray.diff(dim=1).abs().mean((0, 2, 3)) / 255  # (F - 1,)
        speed = optical_flow(gray.round()).norm(dim=2).mean((0, 2, 3))
        out |= {"video": extract["video"](video / 255)[0], "motion": torch.cat([change[:1], change]),
                "peaks": peak_times([speed[0], *speed], fps), "flashes": flash_times(gray[0], fps)}
    if "audio" in clip and "audio" in extract:
        audio = torch.from_numpy(clip["audio"]).float()[None]  # (1, L)
        rise = F.pad(log_mel(audio, rate).diff(dim=2).clamp(min=0).mean(1), (1, 0))
        out |= {"audio": extract["audio"](audio, rate)[0], "onsets": onset_times(audio[0], rate),
                "rise": F.adaptive_max_pool1d(rise, audio.shape[1] * fps // rate)[0]}
    return out

def observe(clips, extract, fps, rate):
    """look() at each of a sequence of clips, one at a time -> {name: tensor (n, ...) or list, in order}. Processes of
    torch.distributed share the work, and all get all."""
    from tqdm import tqdm
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    mine = [look(clips[i], extract, fps, rate) for i in tqdm(range(rank, len(clips), world), disable=rank > 0, unit="clip")]
    shares = [mine]
    if world > 1:
        shares = [None] * world
        dist.all_gather_object(shares, mine)
    found = [shares[i % world][i // world] for i in range(len(clips))]
    return {k: torch.stack(x) if torch.is_tensor(x[0]) else x for k in found[0] for x in [[f[k] for f in found]]}

def alignment(seen, fps, roll=0):
    """Observed clips, their sound rolled by `roll` clips -> joint features (n, 9), {name of a score: mean over clips}."""
    onsets, n = [seen["onsets"][i - roll] for i in range(len(seen["onsets"]))], len(seen["onsets"])
    scores = {"av_align_iou": [av_align_iou(o, v, fps) for o, v in zip(onsets, seen["peaks"], strict=True)]}
    for w in (1, 3):
        scores[f"av_align_mean{w}"] = [av_align_mean(o, v, fps, w) for o, v in zip(onsets, seen["peaks"], strict=True)]
    for name, key in (("sync_ms", "flashes"), ("sync_truth_ms", "events")):
        scores[name] = [sync_error(seen[key][i], onsets[i]) for i in range(n) if key in seen]
    means = {k: float(np.nanmean(x)) for k, x in scores.items() if np.isfinite(x).any()}
    return joint_features(seen["motion"], seen["rise"].roll(roll, 0)), means

def compare(real, fake, tags, fps, logits=False):
    """Two observed sets -> {name: (value, floor, real, real mismatched)}. tags: names of the "video" and "audio" extractors;
    logits: features are logits of classes, and clip i of both sets belongs together."""
    table, nan = {}, math.nan
    for kind, fd in (("video", "fvd"), ("audio", "fad")):
        if not (kind in real and kind in fake):
            continue
        (x, y), tag, half = (real[kind], fake[kind]), tags[kind], len(real[kind]) // 2
        table[f"{fd}_{tag}"] = frechet(x, y), frechet(x[:half], x[half:])
        if kind == "video":
            table[f"kvd_{tag}"] = mmd(x, y), mmd(x[:half], x[half:])
        elif tag.startswith("audioclip44k"):
            table["fad_mmdiff"] = [1e4 * v for v in table[f"fad_{tag}"]]
        if logits:
            table[f"is_{kind}_{tag}"] = inception_score(y, 10)[0], nan, inception_score(x, 10)[0]
            table[f"kl_{kind}_{tag}"] = paired_kl(x, y), paired_kl(x, y.roll(1, 0))
        for key in [k for k in ("label", "color") if len(set(real.get(k, [nan]))) > 1 and not logits]:
            (classify, names), (trial, some) = lda(x, real[key]), lda(x[:half], real[key][:half])
            table[f"is_{key}_{kind}_{tag}"] = inception_score(classify(y))[0], nan, inception_score(classify(x))[0]
            if key in fake:
                right = [np.mean([c[i] == label for i, label in zip(f(z).argmax(1), ls, strict=True)]) for f, c, z, ls in (
                    (classify, names, y, fake[key]), (trial, some, x[half:], real[key][half:]))]
                table[f"accuracy_{key}_{kind}_{tag}"] = right[0], 1 / len(names), right[1]
    if all(k in s for k in ("motion", "rise") for s in (real, fake)):
        (j, a), (jm, am), (k, b), (km, bm) = (alignment(s, fps, roll) for s in (fake, real) for roll in (0, 1))
        table["fd_joint_builtin"] = frechet(k, j), frechet(k[:len(k) // 2], k[len(k) // 2:]), nan, frechet(k, km)
        table |= {n: [z.get(n, nan) for z in (a, am, b, bm)] for n in b}
    return table

def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: sys.exit(f"metrics.py: {message} (--help lists the options)")
    for name, default, text in (
            ("real", None, "data set or folder"), ("fake", None, "data set or folder"), ("n", 2048, "clips of each, at most"),
            ("video_features", "builtin", "extractor"), ("audio_features", "builtin", "extractor"), ("device", "cpu", "of files"),
            ("protocol", "plain", "plain or stylegan-v"), ("json", "", "file to write"), ("frames", 16, "in a clip"),
            ("size", 32, "pixels"), ("fps", 10, "frames per second"), ("rate", 8000, "Hz")):
        parser.add_argument(f"--{name}", type=type(default or ""), default=default, required=default is None, help=text)
    parser.add_argument("--logits", action="store_true", help="features are logits, clips are paired: print IS and KL")
    args = parser.parse_args(argv)
    import data
    import sample
    if "RANK" in os.environ:
        dist.init_process_group("gloo")
    say = print if int(os.environ.get("RANK", 0)) == 0 else lambda *_: None
    try:
        extract, tags = zip(*(extractor(getattr(args, f"{k}_features"), k, args.device) for k in ("video", "audio")))
        seen = []
        for side, split in (("fake", "val"), ("real", "train")):
            clips = sample.Clips(getattr(args, side), split, args)
            say(f"{side}: {clips.about}")
            seen.append(observe(clips, dict(video=extract[0], audio=extract[1]), args.fps, args.rate))
        table = compare(*seen[::-1], dict(video=tags[0], audio=tags[1]), args.fps, args.logits)
    except (UserError, data.UserError) as error:
        sys.exit(f"metrics.py: {error}")
    say(f"{'':32}{'value':>12}{'floor':>12}{'real':>12}{'mismatched':>12}")
    for name, values in table.items():
        say(f"{name:32}" + "".join(f"{v:12.4g}" if math.isfinite(v) else " " * 12 for v in values))
    if args.json and say is print:
        values = {k: [v if math.isfinite(v) else None for v in x] for k, x in table.items()}
        Path(args.json).write_text(json.dumps({"options": vars(args), "metrics": values}, indent=1))

if __name__ == "__main__":
    main()
