"""Metrics for video with sound: the numbers of the five papers, offline, as functions and as a command.

    python metrics.py --real toy --fake out/mm_diffusion/samples_001 --n 2048 --json out.json
    python metrics.py --real concerts --fake DIR --video_features i3d:i3d.ts --audio_features vggish16k:vggish.ts
    torchrun --nproc_per_node=2 -- metrics.py ...   # the same numbers; tests/ladder.py: do they grow with corruption?

--real and --fake are data sets (real: train split, fake: val split) or folders: of .npz files (sample.py --npz), else
of videos, whose compression moves FVD and FAD. The floor of a distance is that between the halves of the real clips (of
half of n, so with more bias, about D / n), that of an alignment is of mismatched pairs, that of an accuracy is chance.
Features: `builtin` (fixed random convolutions and statistics: fvd_builtin is no published FVD), a TorchScript file, or
module:function, a callable of video (B, F, H, W, 3) float in [0, 1] or of audio (B, L) float and its rate -> (B, D), or
(B, T, D), to be stacked. A preset in front prepares the input: i3d:FILE, stylegan-v:FILE, vggish16k:FILE,
audioclip44k:FILE. Names carry the hash of the file. Nothing is ever downloaded.

          in the papers                                                   here
FVD       on R(2+1)D (Paredes), I3D logits (MM-Diffusion), StyleGAN-V's   fvd_X of extractor X; --protocol stylegan-v:
          file and protocol (ProAV-DiT)                                   pick a video, then its clip; plain: any clip
KVD       unbiased MMD, kernel (a.b / D + 1)^3                            kvd_X (audio: kad_X), not scaled, may be < 0
FAD, FD   ResNet18 (Paredes), VGGish (UniForm, SyncFlow), PANNs (FD),     fad_X, unscaled; with audioclip44k also
          AudioCLIP: "x 1e-4" in print, x 1e4 in code (MM-Diffusion)      fad_mmdiff = 1e4 * fad_X
IS, KL    C3D, PANNs, VGGish classes; splits, direction seldom stated     is_X: 10 splits; kl_X: KL(real || fake)
AV-Align  IoU (TempoTokens, UniForm), mean in +-3 frames (ProAV-DiT)      av_align_iou; _mean3, too wide, and _mean1
PSNR-A    peak and domain unstated                                        psnr_a_wav: peak 2; psnr_a_mel: real's range
CS, MI    cosine of segments, then clips; MI without an estimator         cosine_score; mi_gaussian, _histogram, _ksg
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
        raise UserError(f"This metric (or its floor, of half the clips) needs {least} rows or more, not {len(x)}.")
    if not x.isfinite().all():
        raise UserError("NaN or infinite values in the features or clips: look for broken files or a diverged model.")
    return x

def moments(x):
    """Sum of (x, 1) (x, 1)^T over rows x (n, D) -> (D + 1, D + 1); such sums add up over batches and processes."""
    x = F.pad(rows(x, 0), (0, 1), value=1.0)  # (n, D + 1): the last row of the sum is that of x, and n
    return x.T @ x

def frechet_of_moments(a, b):
    """|mx - my|^2 + tr Sx + tr Sy - 2 tr (Sx Sy)^(1/2), at least 0, from the moments() of x and y."""
    n, m, mx, my = a[-1, -1], b[-1, -1], a[-1, :-1] / a[-1, -1], b[-1, :-1] / b[-1, -1]
    if min(n, m) < 2:
        raise UserError(f"This metric needs 2 rows or more, not {int(min(n, m))}.")
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
    x, y, size = rows(x), rows(y), min(block, len(x), len(y))
    values = [mmd(x[i:i + size], y[i:i + size]) for i in range(0, min(len(x), len(y)) - size + 1, size)]
    return float(np.mean(values)), float(np.std(values)), values

def inception_score(logits, splits=1, eps=0.0):
    """exp(mean_i KL(p_i || mean p)) of logits (n, K) in `splits` parts -> (mean, deviation, list)."""
    parts, eps = rows(logits, splits).log_softmax(1).tensor_split(splits), torch.tensor(eps).double().log()
    gaps = [torch.logaddexp(p, eps) - torch.logaddexp(p.logsumexp(0) - math.log(len(p)), eps) for p in parts]
    values = [float((p.exp() * gap).sum(1).mean().exp()) for p, gap in zip(parts, gaps, strict=True)]
    return float(np.mean(values)), float(np.std(values)), values

def paired_kl(real, fake, variant="softmax"):
    """mean_i KL(p_i || q_i) of logits (n, K) of paired clips, p real; softmax_eps and sigmoid_eps add 1e-6 to q."""
    real, fake = rows(real, 1), rows(fake, 1)
    if real.shape != fake.shape:
        raise UserError(f"Paired clips are needed: real logits are {tuple(real.shape)}, fake {tuple(fake.shape)}.")
    log = F.logsigmoid if variant == "sigmoid_eps" else functools.partial(F.log_softmax, dim=1)
    gap = log(real) - torch.logaddexp(log(fake), torch.tensor(0.0 if variant == "softmax" else 1e-6).double().log())
    return float((log(real).exp() * gap).sum(1).mean())

def cosine_score(u, v):
    """CLAP or ImageBind score of (n, D), or (n, S, D) of segments, averaged first -> (mean, floor: v rolled by one)."""
    u, v = (rows(z).view(torch.as_tensor(z).shape) for z in (u, v))
    cosines = [F.cosine_similarity(u, w, -1, 1e-8).reshape(len(u), -1).mean(1) for w in (v, v.roll(1, 0))]
    return float(cosines[0].mean()), float(cosines[1].mean())

# ---- Reconstruction and mutual information -----------------------------------------------------------------
def psnr(x, y, peak=1.0):
    """10 log10(peak^2 / MSE) of each clip x[i] against y[i] -> (n,) dB. Peak 1 for [0, 1], 2 for [-1, 1], or (n,)."""
    error = (torch.as_tensor(x).double() - torch.as_tensor(y).double()).flatten(1).square().mean(1)
    return 10 * torch.log10(torch.as_tensor(peak).double() ** 2 / error)

def psnr_audio(fake, real, rate):
    """{"psnr_a_wav": of waveforms (n, L), peak 2; "psnr_a_mel": of log mels, peak the range of the real ones}."""
    f, r = (log_mel(torch.as_tensor(z), rate) for z in (fake, real))
    return {"psnr_a_wav": psnr(fake, real, 2), "psnr_a_mel": psnr(f, r, r.amax((1, 2)) - r.amin((1, 2)))}

def si_sdr(estimate, reference):
    """Scale-invariant signal-to-distortion ratio (n,) in dB of waveforms (n, L), means removed; NaN for silence."""
    s, r = (rows(z, 1) - rows(z, 1).mean(1, keepdim=True) for z in (estimate, reference))
    target = (s * r).sum(1, keepdim=True) / r.square().sum(1, keepdim=True) * r
    return 10 * torch.log10(target.square().sum(1) / (s - target).square().sum(1))

def mi_gaussian(x, y, dims=16, shrinkage=1e-3):
    """Nats between rows x (n, D), y (n, E), were they Gaussian: (logdet Cx + logdet Cy - logdet Cxy) / 2 after PCA."""
    x, y = (z - z.mean(0) for z in (rows(x), rows(y)))
    x, y = (z @ torch.linalg.svd(z, full_matrices=False)[2][:dims].T for z in (x, y))
    covs = [z.T @ z / (len(z) - 1) for z in (x, y, torch.cat([x, y], 1))]
    logdets = [torch.logdet(c + shrinkage * c.trace() / len(c) * torch.eye(len(c))) for c in covs]
    return float(logdets[0] + logdets[1] - logdets[2]) / 2

def mi_histogram(x, y, bins=16):
    """Nats between two scalars (n,) from a bins x bins histogram; biased by about (bins - 1)^2 / (2 n)."""
    p = np.histogram2d(rows(x)[:, 0].numpy(), rows(y)[:, 0].numpy(), bins)[0] / len(x)
    q = p.sum(1, keepdims=True) * p.sum(0, keepdims=True)
    return float((p[p > 0] * np.log(p[p > 0] / q[p > 0])).sum())

def mi_ksg(x, y, k=3):
    """Nats between rows x (n, D), y (n, E) from the distances to k-th neighbors (Kraskov et al. 2004, eq. 8)."""
    x, y, counts = rows(x, k + 1), rows(y, k + 1), 0
    for i in range(0, len(x), 256):  # a part of the rows at a time: memory grows with n, not n^2
        dx, dy = (torch.cdist(z[i:i + 256], z, p=math.inf) for z in (x, y))
        radius = torch.maximum(dx, dy).topk(k + 1, largest=False)[0][:, -1:]  # the nearest is the row itself
        counts = counts + sum(torch.digamma((d < radius).sum(1).clamp(min=1).double()).sum() for d in (dx, dy))
    return float(torch.digamma(torch.tensor([k, len(x)]).double()).sum() - counts / len(x))

# ---- The built-in features ---------------------------------------------------------------------------------
@functools.cache
def random_filters(seed, *shapes):
    """Fixed filters; of layer 1, 24 ignore constant input and 12 of those, in 3-D, whatever stands still."""
    rng = np.random.RandomState(seed)  # its stream is the same in every version of numpy
    layers = [rng.standard_normal(shape) / math.sqrt(math.prod(shape[1:])) for shape in shapes]
    layers[0][:24] -= layers[0][:24].mean(tuple(range(2, layers[0].ndim)), keepdims=True)
    layers[0][:12] -= layers[0][:12].mean(2, keepdims=True) if layers[0].ndim == 5 else 0
    return [torch.from_numpy(w.astype(np.float32)) for w in layers]

def random_features(x, filters, strides, slopes):
    """Convolve x (B, C, ...) layer by layer -> (list of mean and deviation (B, C') of each layer, last layer)."""
    stats = []
    for w, stride, slope in zip(filters, strides, slopes, strict=True):
        convolve = F.conv3d if w.dim() == 5 else F.conv2d
        x = 1.4 * F.leaky_relu(convolve(x, w.to(x), stride=stride, padding=[k // 2 for k in w.shape[2:]]), slope)
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
    mel = np.linspace(0, 15 + 27 * math.log(rate / 2000, 6.4), n_mels + 2)
    points = np.where(mel < 15, mel / 0.015, 1000 * 6.4 ** ((mel - 15) / 27))
    filters = triangles(np.arange(n_fft // 2 + 1) * rate / n_fft, points)
    return torch.from_numpy(filters * 2 / (points[2:] - points[:-2])[:, None])

def mel_power(audio, rate, n_fft, hop, n_mels):
    """Audio (B, L >= 50 ms) -> (B, n_mels, 1 + L // hop): Slaney mels of the power in Hann windows around i hop."""
    if audio.shape[-1] < rate / 20:
        raise UserError(f"Sound of {audio.shape[-1]} samples is too short: at least 50 ms are needed.")
    window = torch.hann_window(n_fft).to(audio)
    spectrum = torch.stft(audio, n_fft, hop, window=window, pad_mode="constant", return_complex=True)
    return mel_filters(rate, n_fft, n_mels).to(audio) @ spectrum.abs().square()

def log_mel(audio, rate):
    """Audio (B, L) -> (B, 64, 1 + L' // 256): log mels, floor 1e-5, of its L' samples at 16 kHz."""
    return (mel_power(resample(audio.double(), rate, 16000), 16000, 1024, 256, 64) + 1e-5).log().float()

def audio_features(audio, rate):
    """Audio (B, L) in [-1, 1] -> (B, 448): mean and deviation of 64 log mels and of fixed convolutions of them."""
    m, filters = log_mel(audio, rate), random_filters(1, (32, 1, 5, 5), (64, 32, 3, 3), (64, 64, 3, 3))
    stats, _ = random_features((m[:, None] + 6) / 4, filters, (1, 2, 2), (0, 0, 0))
    return torch.cat([m.mean(2) / 4, m.std(2) / 4, *stats], 1)

def joint_features(motion, rise):
    """Envelopes (n, F) of seen motion and heard rises -> (n, 9): their correlation at lags of -4 ... 4 frames."""
    x, y = ((e - e.mean(1, keepdim=True)) / (e.std(1, keepdim=True) + 1e-6) for e in (motion, rise))
    lags = [(x[:, max(l, 0):x.shape[1] + min(l, 0)], y[:, max(-l, 0):x.shape[1] - max(l, 0)]) for l in range(-4, 5)]
    return torch.stack([(a * b).mean(1) for a, b in lags], 1)

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
        mean, most = x[max(0, n - wide):n + wide + 1].mean(), x[max(0, n - before):n + 1].max()
        if x[n] == most and x[n] >= mean + 0.07:
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

def gaussian(sigma, radius):
    return torch.softmax(-torch.arange(-radius, radius + 1).double() ** 2 / (2 * sigma ** 2), 0).numpy()

def quadratic_fit(gray):
    """Fit c + b . p + p A p^T around each pixel p of (..., H, W) -> (5, ..., H, W): b_x, b_y, A_xx, A_yy, A_xy."""
    u, w, powers = np.arange(-5, 6), gaussian(1.2, 5), ((0, 0), (1, 0), (0, 1), (2, 0), (0, 2), (1, 1))
    basis = np.stack([np.outer(u ** j, u ** i).ravel() for i, j in powers])  # (6, 121)
    solve = np.linalg.inv(basis * np.outer(w, w).ravel() @ basis.T)[1:] * [[1], [1], [1], [1], [0.5]]
    across, down = ([filter_matrix(tuple(w * u ** i), n, "edge") for i in range(3)] for n in reversed(gray.shape[-2:]))
    sums = torch.stack([down[j].T @ (gray @ across[i]) for i, j in powers])
    return torch.tensordot(torch.from_numpy(solve).float(), sums, 1)

def refine_flow(first, second, flow):
    """One round: fits (5, P, h, w) of both frames of P pairs and the flow (P, 2, h, w) so far -> a better flow."""
    h, w = flow.shape[-2:]
    x, y = torch.arange(w) + flow[:, 0], torch.arange(h)[:, None] + flow[:, 1]  # (P, h, w): where each pixel goes
    grid = torch.stack([x * (2 / (w - 1)) - 1, y * (2 / (h - 1)) - 1], -1)
    there = F.grid_sample(second.transpose(0, 1), grid, align_corners=True).transpose(0, 1)
    inside = (x >= 0) & (x < w - 1) & (y >= 0) & (y < h - 1)
    # A d = (b1 - b2) / 2 + A flow with the mean A of both frames, less trusted in the outermost five pixels, solved by
    # least squares in windows of 15 x 15: d = mean(A^T A)^-1 mean(A^T b)
    trust = torch.tensor([0.14, 0.14, 0.4472, 0.4472, 0.4472, 1.0])
    trust_x, trust_y = (trust[torch.arange(n).minimum(torch.arange(n).flip(0)).clamp(max=5)] for n in (w, h))
    b, A = torch.where(inside, first[:2] - there[:2], 0), torch.where(inside, first[2:] + there[2:], 2 * first[2:])
    bx, by, xx, yy, xy = torch.cat([b, A]) / 2 * trust_x * trust_y[:, None]
    bx, by = bx + xx * flow[:, 0] + xy * flow[:, 1], by + xy * flow[:, 0] + yy * flow[:, 1]
    g = torch.stack([xx * xx + xy * xy, yy * yy + xy * xy, (xx + yy) * xy, xx * bx + xy * by, xy * bx + yy * by])
    down, across = (filter_matrix((1 / 15,) * 15, n, "edge") for n in (h, w))
    gxx, gyy, gxy, hx, hy = down.T @ (g @ across)
    return torch.stack([gyy * hx - gxy * hy, gxx * hy - gxy * hx], 1) / (gxx * gyy - gxy * gxy + 1e-3)[:, None]

def optical_flow(gray):
    """Farneback's flow of gray frames (B, F, H, W), 0 ... 255 -> (B, F - 1, 2, H, W), pixels right and down."""
    (B, T, H, W), flow = gray.shape, gray.new_zeros(len(gray) * (gray.shape[1] - 1), 2, 1, 1)
    for k in reversed([k for k in range(4) if k == 0 or min(H, W) >= 32 * 2 ** k]):  # halved k times
        taps = tuple(gaussian((2 ** k - 1) / 2 or 0.8, max(round(2.5 * (2 ** k - 1)) | 1, 3) // 2))
        down, across = (filter_matrix(taps, n, "reflect", 0.5 ** k) for n in (H, W))
        fit = quadratic_fit(down.T @ (gray @ across))  # (5, B, F, h, w)
        first, second = fit[:, :, :-1].flatten(1, 2), fit[:, :, 1:].flatten(1, 2)  # (5, P, h, w), P = B (F - 1)
        flow = 2 * F.interpolate(flow, size=first.shape[-2:], mode="bilinear")
        for _ in range(3):
            flow = refine_flow(first, second, flow)
    return flow.view(B, T - 1, 2, H, W)

def peak_times(x, fps, threshold=0.1):
    """The times (s) of the strict local maxima of a trajectory x (F,) that reach `threshold`; never its ends."""
    return [i / fps for i in range(1, len(x) - 1) if x[i - 1] < x[i] > x[i + 1] and x[i] >= threshold]

def av_align_iou(audio_peaks, video_peaks, fps):
    """AV-Align: each audio peak takes the first free video peak within a frame -> IoU; NaN (leave out) for no peaks."""
    free = list(video_peaks)
    for a in audio_peaks:
        for v in [v for v in free if v - 1 / fps < a < v + 1 / fps][:1]:
            free.remove(v)
    union = len(audio_peaks) + len(free)
    return (len(video_peaks) - len(free)) / union if union else math.nan

def av_align_mean(audio_peaks, video_peaks, fps, window=3):
    """AV-Align, mean of the shares of audio and of video peaks with one of the other in `window` frames; 0 if none."""
    near = np.abs(np.subtract.outer(audio_peaks, video_peaks)) <= window / fps + 1e-9
    return float(near.any(0).mean() + near.any(1).mean()) / 2 if near.size else 0.0

def flash_times(gray, fps):
    """Gray frames (F, H, W), 0 ... 255 -> the middles (s) of those where most of the picture flashes: toy impacts."""
    x = gray.flatten(1).median(1)[0]  # (F,): the background, more than half of the pixels
    return [t - 0.5 / fps for t in peak_times([0, *(x - x.median()).tolist(), 0], fps, 30)]

def sync_error(events, onsets, start=0.1):
    """Mean distance (ms) of each event to the nearest onset and back, of times (s); NaN (leave out) without a pair."""
    e, o = ([t for t in times if t >= start] for times in (events, onsets))  # a sound begins with an onset: no event
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
    x = F.pad(x, (56, 56 + max(0, 15600 - x.shape[1])))  # windows of 400, padded to 512; at least one patch
    x = torch.stft(x, 512, 160, 400, torch.hann_window(400).to(x), center=False, return_complex=True).abs()
    f, points = (1127 * np.log1p(z / 700) for z in (np.arange(257) * 31.25, np.array([125, 7500])))
    m = (torch.from_numpy(triangles(f, np.linspace(*points, 66))).to(x) @ x + 0.01).log().transpose(1, 2)  # (B, T, 64)
    m = m[:, :m.shape[1] // 96 * 96].unflatten(1, (-1, 1, 96))  # (B, P, 1, 96, 64)
    return model(m.flatten(0, 1)).unflatten(0, m.shape[:2])

def audioclip44k(model, audio, rate):  # 1.6 s, (B, 70560) -> embeddings of length 1
    x = resample(audio, rate, 44100)[:, :70560]
    return F.normalize(model(F.pad(x, (0, 70560 - x.shape[1]))), dim=-1)

def extractor(form, kind, device="cpu"):
    """None, "builtin", "FILE.ts", "module:function" (or these after "preset:"), or a callable -> (callable, name)."""
    if form in (None, "builtin"):
        return (video_features if kind == "video" else audio_features), "builtin"
    if callable(form):
        return form, getattr(form, "__name__", "callable")
    presets = ({"i3d": i3d, "stylegan-v": stylegan_v} if kind == "video" else
               {"vggish16k": vggish16k, "audioclip44k": audioclip44k})
    preset, rest = form.split(":", 1) if form.split(":")[0] in presets else ("", form)
    module, _, name = rest.partition(":")
    try:
        if os.path.isfile(rest):
            path, model = rest, torch.jit.load(rest, device).eval()
        else:
            path, model = importlib.import_module(module).__file__, getattr(sys.modules[module], name)
    except (ImportError, AttributeError, ValueError, RuntimeError):
        raise UserError(f"'{form}' is no TorchScript file and no module:function for {kind} features.") from None
    model = functools.partial(presets[preset], model) if preset else model
    tag = f"{preset or name or Path(path).stem}-{hashlib.sha256(Path(path).read_bytes()).hexdigest()[:8]}"
    return lambda x, *rate: model(x.to(device), *rate).float().cpu(), tag

def lda(x, labels, dims=48, shrinkage=0.2, temperature=10.0):
    """Gaussian classifier, one covariance: features x (n, ...), n labels -> (features -> logits (n, K), K names)."""
    x, names = rows(x.flatten(1)), sorted(set(labels))
    y, mean, std = torch.tensor([names.index(label) for label in labels]), x.mean(0), x.std(0) + 1e-4
    axes = torch.linalg.svd((x - mean) / std, full_matrices=False)[2][:dims].T  # PCA
    x = (x - mean) / std @ axes
    means = torch.stack([x[y == c].mean(0) for c in range(len(names))])
    cov = torch.cov((x - means[y]).T, correction=0)
    cov = (1 - shrinkage) * cov + shrinkage * cov.trace() / len(cov) * torch.eye(len(cov))
    weight = torch.linalg.solve(cov, means.T)  # (dims, K)
    bias = (means.T * weight).sum(0) / 2
    return lambda z: ((rows(z.flatten(1), 1) - mean) / std @ axes @ weight - bias) / temperature, names

# ---- The command -------------------------------------------------------------------------------------------
@torch.no_grad()
def look(clip, extract, fps, rate):
    """What the metrics need of a clip: a dict of video uint8 (F, H, W, 3), audio float32 (L,), label, color, events."""
    out = {k: clip[k] for k in ("label", "color", "events") if k in clip}
    if "video" in clip and "video" in extract:
        video = torch.from_numpy(clip["video"])[None].float()  # (1, F, H, W, 3)
        gray = video @ torch.tensor([0.299, 0.587, 0.114])
        change = gray.diff(dim=1).abs().mean((0, 2, 3)) / 255  # (F - 1,)
        speed = optical_flow(gray.round()).norm(dim=2).mean((0, 2, 3))
        out |= {"video": extract["video"](video / 255)[0], "motion": torch.cat([change[:1], change]),
                "peaks": peak_times([speed[0], *speed], fps), "flashes": flash_times(gray[0], fps)}
    if "audio" in clip and "audio" in extract:
        audio = torch.from_numpy(clip["audio"])[None].float()  # (1, L)
        rise = F.pad(log_mel(audio, rate).diff(dim=2).clamp(min=0).mean(1), (1, 0))
        out |= {"audio": extract["audio"](audio, rate)[0], "onsets": onset_times(audio[0], rate),
                "rise": F.adaptive_max_pool1d(rise, audio.shape[1] * fps // rate)[0]}
    return out

def observe(clips, extract, fps, rate):
    """look() at all clips, one by one -> {name: tensor (n, ...) or list}; processes share the work, and all get all."""
    from tqdm import tqdm
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    order = tqdm(range(rank, len(clips), world), disable=rank > 0, unit="clip")
    shares = [[look(clips[i], extract, fps, rate) for i in order]] * world
    if world > 1:
        dist.all_gather_object(shares, shares[rank])
    found = [shares[i % world][i // world] for i in range(len(clips))]
    columns = {k: [x[k] for x in found] for k in found[0]}
    return {k: torch.stack(x) if torch.is_tensor(x[0]) else x for k, x in columns.items()}

def alignment(seen, fps, roll=0):
    """Observed clips, their sound rolled by `roll` clips -> joint features (n, 9), {score: mean over clips}."""
    onsets, means = [seen["onsets"][i - roll] for i in range(len(seen["onsets"]))], {}
    for name, score, key, *options in (
            ("av_align_iou", av_align_iou, "peaks", fps), ("av_align_mean1", av_align_mean, "peaks", fps, 1),
            ("av_align_mean3", av_align_mean, "peaks", fps), ("sync_ms", sync_error, "flashes"),
            ("sync_truth_ms", sync_error, "events")):
        values = [score(o, v, *options) for o, v in zip(onsets, seen.get(key, ()), strict=False)]
        means[name] = float(np.nanmean(values)) if np.isfinite(values).any() else math.nan
    return joint_features(seen["motion"], seen["rise"].roll(roll, 0)), means

def compare(real, fake, tags, fps, logits=False):
    """Two observed sets -> {metric: [value, floor, that of real clips, floor]}; logits: features are; clips paired."""
    table, half = {}, {k: [x[:len(x) // 2], x[len(x) // 2:]] for k, x in real.items()}
    for kind in [k for k in ("video", "audio") if k in real and k in fake]:
        x, y, tag, letter = real[kind], fake[kind], tags[kind], kind[0]
        for name, distance in ((f"f{letter}d_{tag}", frechet), (f"k{letter}d_{tag}", mmd)):  # fvd, kvd, fad, kad
            table[name] = [distance(x, y), distance(*half[kind])]
        table |= {"fad_mmdiff": [1e4 * v for v in table[f"fad_{tag}"]]} if tag.startswith("audioclip44k") else {}
        if logits and tag != "builtin":
            table[f"is_{kind}_{tag}"] = [inception_score(y, 10)[0], math.nan, inception_score(x, 10)[0]]
            table[f"kl_{kind}_{tag}"] = [paired_kl(x, y), paired_kl(x, y.roll(1, 0))]
        for key in {"video": ("label", "color"), "audio": ("label",)}[kind]:
            if tag == "builtin" and len(set(real.get(key, ()))) > 1 and key in fake:
                classify, trial = lda(x, real[key]), lda(half[kind][0], half[key][0])
                right = [np.mean([names[i] == s for i, s in zip(f(z).argmax(1), labels, strict=True)])
                         for (f, names), z, labels in ((classify, y, fake[key]), (trial, half[kind][1], half[key][1]))]
                table[f"accuracy_{key}_{kind}_{tag}"] = [right[0], 1 / len(classify[1]), right[1]]
                table[f"is_{key}_{kind}_{tag}"] = [inception_score(classify[0](y))[0]]
    if all(k in s for k in ("motion", "rise") for s in (real, fake)):
        (j, a), (_, af), (k, b), (kf, bf) = (alignment(s, fps, roll) for s in (fake, real) for roll in (0, 1))
        table["fd_joint_builtin"] = [frechet(k, j), frechet(*k.tensor_split(2)), math.nan, frechet(k, kf)]
        table |= {name: [z[name] for z in (a, af, b, bf)] for name in a}
    return table

def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: sys.exit(f"metrics.py: {message} (--help lists the options)")
    for name, default in {
            "real": "toy", "fake": "", "n": 2048, "video_features": "builtin", "audio_features": "builtin", "json": "",
            "device": "cpu", "protocol": "plain", "frames": 16, "size": 32, "fps": 10, "rate": 8000}.items():
        parser.add_argument(f"--{name}", type=type(default), default=default, help=f"[{default}]")
    parser.add_argument("--logits", action="store_true", help="the features are logits, the clips paired: IS and KL")
    args = parser.parse_args(argv)
    import sample  # it reads the clips, with data.py: the command, unlike the functions, needs both
    if "RANK" in os.environ:
        dist.init_process_group("gloo")
    say = print if os.environ.get("RANK", "0") == "0" else lambda *_: None
    try:
        pairs, seen = {k: extractor(getattr(args, f"{k}_features"), k, args.device) for k in ("video", "audio")}, {}
        for side, split in (("fake", "val"), ("real", "train")):
            clips = sample.Clips(getattr(args, side), split, args)
            say(f"{side}: {clips.about}")
            seen[side] = observe(clips, {k: f for k, (f, _) in pairs.items()}, args.fps, args.rate)
        table = compare(seen["real"], seen["fake"], {k: tag for k, (_, tag) in pairs.items()}, args.fps, args.logits)
    except (UserError, sample.data.UserError) as error:
        sys.exit(f"metrics.py: {error}")
    say(f"{'':32}{'value':>12}{'its floor':>12}{'real':>12}{'its floor':>12}")
    for name, values in table.items():
        say(f"{name:32}" + "".join(f"{v:12.4g}" if math.isfinite(v) else f"{'':12}" for v in values))
    if args.json and say is print:
        table = {k: [float(v) if math.isfinite(v) else None for v in x] for k, x in table.items()}
        Path(args.json).write_text(json.dumps({"options": vars(args), "metrics": table}, indent=1))

if __name__ == "__main__":
    main()
