"""Corrupt clips step by step and print every metric: does each grow with the corruption that it is to measure?

    python tests/ladder.py --real toy --n 256                     # two minutes on one core
    python tests/ladder.py --real toy:bounce,collide --n 256

n train clips are the reference, n val clips are corrupted. The last lines
say of each metric whether it grows (AV-Align: falls) at every step of the corruptions that are to move it.
"""
import argparse
import functools
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import metrics  # noqa: E402
import sample  # noqa: E402

EXTRACT = {"video": metrics.video_features, "audio": metrics.audio_features}
COLUMNS = ("fvd_builtin", "kvd_builtin", "fad_builtin", "fd_joint_builtin", "av_align_iou", "av_align_mean1", "sync_ms")


def noise(video, level, rng):
    return np.clip(video + rng.normal(0, 255 * level, video.shape), 0, 255).round().astype(np.uint8)


def blur(video, sigma, rng):
    taps = tuple(metrics.gaussian(sigma, int(3 * sigma + 1)))
    x = torch.from_numpy(video).float().permute(0, 3, 1, 2)  # (F, 3, H, W)
    down, across = (metrics.filter_matrix(taps, n, "reflect") for n in x.shape[2:])
    return (down.T @ (x @ across)).round().byte().permute(0, 2, 3, 1).numpy()


def shuffle(video, share, rng):
    """Permute that share of the frames among each other."""
    some = rng.permutation(len(video))[:round(share * len(video))]
    out = video.copy()
    out[np.sort(some)] = video[some]
    return out


def hiss(audio, level, rng):
    return np.clip(audio + rng.normal(0, level, audio.shape), -1, 1).astype(np.float32)


def low_pass(audio, share, rng):
    """Drop all above that share of half the rate."""
    spectrum = np.fft.rfft(audio)
    spectrum[round(share * len(spectrum)):] = 0
    return np.fft.irfft(spectrum, len(audio)).astype(np.float32)


def late(audio, frames, rng):
    """Delay by that many of 16 frames; silence comes first."""
    return np.pad(audio, (round(frames * len(audio) / 16), 0))[:len(audio)]


LADDER = (("video noise, sigma", "video", noise, (0.02, 0.05, 0.1, 0.2, 0.4), ("fvd_builtin", "kvd_builtin")),
          ("video blur, pixels", "video", blur, (0.5, 1, 2), ("fvd_builtin",)),
          ("frames shuffled, share", "video", shuffle, (0.25, 0.5, 0.75, 1), ("fvd_builtin", "fd_joint_builtin")),
          ("audio noise, sigma", "audio", hiss, (0.002, 0.01, 0.05, 0.2), ("fad_builtin",)),
          ("low-pass, share of band", "audio", low_pass, (0.75, 0.5, 0.25, 0.125), ("fad_builtin",)),
          ("sound late, frames", "audio", late, (0.5, 1, 2), ("fd_joint_builtin", "sync_ms")),
          ("pairs mismatched, share", "pairs", None, (0.25, 0.5, 0.75, 1),
           ("fd_joint_builtin", "av_align_iou", "sync_ms")))


SAY = functools.partial(print, flush=True)


class Corrupted:
    """Clips whose stream `kind` went through `corrupt`, at a level, with noise that depends on the clip alone."""

    def __init__(self, clips, kind, corrupt, level):
        self.clips, self.kind, self.corrupt, self.level = clips, kind, corrupt, level

    def __len__(self):
        return len(self.clips)

    def __getitem__(self, i):
        clip = self.clips[i]
        return {self.kind: self.corrupt(clip[self.kind], self.level, np.random.default_rng(i))}


def score(real, seen, fps, columns=COLUMNS):
    """The columns of a row, by name."""
    joint, found = metrics.alignment(seen, fps)
    found["fd_joint_builtin"] = metrics.frechet(metrics.alignment(real, fps)[0], joint)
    for name, kind, distance in (("fvd_builtin", "video", metrics.frechet), ("kvd_builtin", "video", metrics.mmd),
                                 ("fad_builtin", "audio", metrics.frechet)):
        found[name] = distance(real[kind], seen[kind])
    return {k: found[k] for k in columns}


def mismatched(seen, share):
    """The first `share` of the clips get the sound of their neighbors."""
    n = round(share * len(seen["video"]))
    order = [*range(1, n), 0, *range(n, len(seen["video"]))]
    return seen | {"rise": seen["rise"][order], "onsets": [seen["onsets"][i] for i in order]}


def ladder(args, steps=LADDER, show=SAY):
    """Run it -> {(corruption, metric): [value of the untouched clips, and of each level]} for the metrics it is to
    move, each printed in a row of all."""
    real = metrics.observe(sample.Clips(args.real, "train", args), EXTRACT, args.fps, args.rate)
    clips = sample.Clips(args.real, "val", args)
    clean = metrics.observe(clips, EXTRACT, args.fps, args.rate)
    base, found = score(real, clean, args.fps), {}
    show(f"{'corruption':32}" + "".join(f"{name.removesuffix('_builtin'):>16}" for name in COLUMNS))

    def row(name, values):
        show(f"{name:32}" + "".join(f"{values[k]:16.4g}" for k in COLUMNS))
    row("none", base)
    for name, kind, corrupt, levels, moved in steps:
        curve = [base]
        for level in levels:
            if kind == "pairs":
                seen = mismatched(clean, level)
            else:
                part = {kind: EXTRACT[kind]}
                seen = clean | metrics.observe(Corrupted(clips, kind, corrupt, level), part, args.fps, args.rate)
            curve.append(score(real, seen, args.fps))
            row(f"{name} {level}", curve[-1])
        found |= {(name, k): [c[k] for c in curve] for k in moved}
    return found


def grows(name, values):
    """Whether the values of a metric rise, for AV-Align fall, at every step."""
    return bool((np.diff(values) * (-1 if name.startswith("av_align") else 1) > 0).all())


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in {"real": "toy", "n": 256, "frames": 16, "size": 32, "fps": 10, "rate": 8000,
                          "protocol": "plain"}.items():
        parser.add_argument(f"--{name}", type=type(default), default=default, help=f"[{default}]")
    args = parser.parse_args(argv)
    for (corruption, name), values in ladder(args).items():
        verdict = "grows" if grows(name, values) else "DOES NOT GROW"
        print(f"{name:18} {verdict:14} with {corruption:26}" + "".join(f"{v:10.4g}" for v in values))


if __name__ == "__main__":
    main()
