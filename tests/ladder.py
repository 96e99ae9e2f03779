"""Corrupt clips step by step and print every metric: does each grow with what it is to measure?

    python tests/ladder.py --real toy --n 256                     # two minutes on one core
    python tests/ladder.py --real toy:bounce,collide --n 256

n train clips are the reference, n val clips are corrupted. The last lines say of each metric
whether it grows (AV-Align: falls) at every step of the corruptions that are to move it.
"""
import argparse
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import data  # noqa: E402
import metrics  # noqa: E402

EXTRACT = {"video": metrics.video_features, "audio": metrics.audio_features}
COLUMNS = (
    "fvd_builtin",
    "kvd_builtin",
    "fad_builtin",
    "fd_joint_builtin",
    "av_align_iou",
    "av_align_mean1",
    "sync_ms",
)

# ---- Corruptions of a video uint8 (F, H, W, 3) or of audio float32 (L,) at a level


def noise(video, level, rng):
    noisy = video + rng.normal(0, 255 * level, video.shape)
    return np.clip(noisy, 0, 255).round().astype(np.uint8)


def blur(video, sigma, rng):
    taps = tuple(metrics.gaussian(sigma, int(3 * sigma + 1)))
    x = torch.from_numpy(video).float().permute(0, 3, 1, 2)  # (F, 3, H, W)
    down = metrics.filter_matrix(taps, x.shape[2], "reflect")
    across = metrics.filter_matrix(taps, x.shape[3], "reflect")
    blurred = down.T @ (x @ across)
    return blurred.round().byte().permute(0, 2, 3, 1).numpy()


def shuffle(video, share, rng):
    """Permute that share of the frames among each other."""
    some = rng.permutation(len(video))[:round(share * len(video))]
    out = video.copy()
    out[np.sort(some)] = video[some]
    return out


def hiss(audio, level, rng):
    noisy = audio + rng.normal(0, level, audio.shape)
    return np.clip(noisy, -1, 1).astype(np.float32)


def low_pass(audio, share, rng):
    """Drop all above that share of half the rate."""
    spectrum = np.fft.rfft(audio)
    spectrum[round(share * len(spectrum)):] = 0
    return np.fft.irfft(spectrum, len(audio)).astype(np.float32)


def late(audio, frames, rng):
    """Delay by that many of 16 frames; silence comes first."""
    silence = round(frames * len(audio) / 16)
    return np.pad(audio, (silence, 0))[:len(audio)]


# name, stream, corruption, levels, the metrics that it is to move
LADDER = (
    ("video noise, sigma", "video", noise, (0.02, 0.05, 0.1, 0.2, 0.4),
     ("fvd_builtin", "kvd_builtin")),
    ("video blur, pixels", "video", blur, (0.5, 1, 2), ("fvd_builtin",)),
    ("frames shuffled, share", "video", shuffle, (0.25, 0.5, 0.75, 1),
     ("fvd_builtin", "fd_joint_builtin")),
    ("audio noise, sigma", "audio", hiss, (0.002, 0.01, 0.05, 0.2), ("fad_builtin",)),
    ("low-pass, share of band", "audio", low_pass, (0.75, 0.5, 0.25, 0.125), ("fad_builtin",)),
    ("sound late, frames", "audio", late, (0.5, 1, 2), ("fd_joint_builtin", "sync_ms")),
    ("pairs mismatched, share", "pairs", None, (0.25, 0.5, 0.75, 1),
     ("fd_joint_builtin", "av_align_iou", "sync_ms")),
)


class Corrupted:
    """The stream `kind` of clips, corrupted at a level, with noise that hangs on the clip alone."""

    def __init__(self, clips, kind, corrupt, level):
        self.clips = clips
        self.kind = kind
        self.corrupt = corrupt
        self.level = level

    def __len__(self):
        return len(self.clips)

    def __getitem__(self, i):
        stream = self.clips[i][self.kind]
        return {self.kind: self.corrupt(stream, self.level, np.random.default_rng(i))}


def mismatched(seen, share):
    """The first `share` of the observed clips get the sound of their neighbors."""
    total = len(seen["video"])
    n = round(share * total)
    order = [*range(1, n), 0, *range(n, total)]
    return seen | {"rise": seen["rise"][order], "onsets": [seen["onsets"][i] for i in order]}


# ---- The ladder


def score(real, seen, fps):
    """The columns of a row, by name."""
    real_joint, _ = metrics.alignment(real, fps)
    joint, found = metrics.alignment(seen, fps)
    found["fd_joint_builtin"] = metrics.frechet(real_joint, joint)
    found["fvd_builtin"] = metrics.frechet(real["video"], seen["video"])
    found["kvd_builtin"] = metrics.mmd(real["video"], seen["video"])
    found["fad_builtin"] = metrics.frechet(real["audio"], seen["audio"])
    return {name: found[name] for name in COLUMNS}


def show(name, values):
    """Print a row: numbers, or the names of the columns."""
    line = f"{name:32}"
    for value in values:
        line += f"{value:>16}" if isinstance(value, str) else f"{value:16.4g}"
    print(line, flush=True)


def ladder(name, n, frames=16, size=32, fps=10, rate=8000, steps=LADDER):
    """Climb it with n clips of a data set or folder, and print a row of all metrics for each level.

    -> {(corruption, metric that it is to move): [its value for the untouched clips, at each level]}
    """
    clips = data.Clips(name, "train", n, frames, size, fps, rate)
    fps = clips.fps
    rate = clips.rate
    real = metrics.observe(clips, EXTRACT, fps, rate)
    clips = data.Clips(name, "val", n, frames, size, fps, rate)
    clean = metrics.observe(clips, EXTRACT, fps, rate)
    base = score(real, clean, fps)
    show("corruption", [column.removesuffix("_builtin") for column in COLUMNS])
    show("none", base.values())
    found = {}
    for corruption, kind, corrupt, levels, moved in steps:
        curve = [base]
        for level in levels:
            if kind == "pairs":
                seen = mismatched(clean, level)
            else:
                corrupted = Corrupted(clips, kind, corrupt, level)
                part = {kind: EXTRACT[kind]}
                seen = clean | metrics.observe(corrupted, part, fps, rate)
            curve.append(score(real, seen, fps))
            show(f"{corruption} {level}", curve[-1].values())
        for metric in moved:
            found[corruption, metric] = [row[metric] for row in curve]
    return found


def grows(name, values):
    """Whether the values of a metric rise, for AV-Align fall, at every step."""
    steps = np.diff(values)
    if name.startswith("av_align"):
        steps = -steps
    return bool((steps > 0).all())


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--real", default="toy", help="data set or folder [toy]")
    parser.add_argument("--n", type=int, default=256, help="clips [256]")
    parser.add_argument("--frames", type=int, default=16, help="[16]")
    parser.add_argument("--size", type=int, default=32, help="pixels [32]")
    parser.add_argument("--fps", type=int, default=10, help="[10]")
    parser.add_argument("--rate", type=int, default=8000, help="Hz [8000]")
    args = parser.parse_args(argv)
    found = ladder(args.real, args.n, args.frames, args.size, args.fps, args.rate)
    for (corruption, name), values in found.items():
        verdict = "grows" if grows(name, values) else "DOES NOT GROW"
        numbers = "".join(f"{v:10.4g}" for v in values)
        print(f"{name:18} {verdict:14} with {corruption:26}{numbers}")


if __name__ == "__main__":
    main()
