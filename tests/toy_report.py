"""How good are the samples of a toy model? Counts of samples beside those of real clips.

    python tests/toy_report.py --model mm_diffusion --n 32
    python tests/toy_report.py --model proav_dit --data toy:bounce --label bounce

Generates n clips and takes as many validation clips, and prints of both: how many balls keep their
color and are there in every frame, how far a ball jumps, how quiet the quiet parts are, whether
motion and sound go together, and the distances of metrics.py to other clips, of the training
split. The column of real clips shows what a perfect model would reach with n clips: their
distances are above 0, too. The ball is counted in scenes of one ball: bounce, glide, pulse.
Options that are not listed below go to the model, --sample_steps 50 for one.
"""

import argparse
import importlib
import sys
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
from zero_shot import correlation, tracks  # noqa: E402

import data  # noqa: E402
import metrics  # noqa: E402

CHROMA = 90  # a pixel whose largest and smallest channel differ by more is colored
# A ball is seen where this many pixels of a 32x32 frame are colored: half of the smallest real one.
LEAST = {"bounce": 25, "glide": 25, "pulse": 4}


# ---- What is counted


def least_area(name):
    """The share of a frame that is a ball in clips of a data set like "toy:glide,pulse"."""
    scenes = name.partition(":")[2].split(",")
    return min(LEAST.get(scene, 25) for scene in scenes) / 32**2


def balls(video, least):
    """Find the ball in every frame of video (n, F, H, W, 3) uint8: a share `least` is colored.

    Returns seen (n, F) bool; hue (n, F), the index in data.COLORS of the color nearest to the mean
    of the colored pixels; center (n, F, 2), their mean x and y in pixels, where seen.
    """
    x = torch.as_tensor(video).float()
    colored = x.amax(-1) - x.amin(-1) > CHROMA  # (n, F, H, W) bool
    height, width = colored.shape[2:]
    area = colored.sum((2, 3))  # (n, F) pixels
    seen = area >= least * height * width
    area = area.clamp(min=1)  # no division by 0 where unseen
    color = (x * colored[..., None]).sum((2, 3)) / area[..., None]  # (n, F, 3)
    known = torch.tensor(list(data.COLORS.values())).float()  # (colors, 3)
    hue = torch.cdist(color, known).argmin(2)  # (n, F)
    center_x = colored.sum(2) @ torch.arange(width) / area  # (n, F)
    center_y = colored.sum(3) @ torch.arange(height) / area
    return seen, hue, torch.stack([center_x, center_y], 2)


def count_balls(video, least):
    """Video (n, F, H, W, 3) uint8 -> {name: number}, names as in ROWS. least: see balls()."""
    seen, hue, center = balls(video, least)
    # Without a ball the hue is taken to be anything: a range of hues that is empty or one wide.
    highest = hue.masked_fill(~seen, -1).amax(1)  # (n,)
    lowest = hue.masked_fill(~seen, len(data.COLORS)).amin(1)
    one_color = highest == lowest  # false if never seen
    scale = 32 / video.shape[3]  # to pixels of a frame of 32x32, at any size
    step = center.diff(dim=1).norm(dim=2) * scale  # (n, F - 1)
    both = seen[:, 1:] & seen[:, :-1]  # a ball before and after
    jump = step.masked_fill(~both, 0).amax(1)  # (n,)
    most = hue[seen].bincount().max() / seen.sum() if seen.any() else torch.tensor(float("nan"))
    return {
        "most_frequent": 100 * float(most),
        "one_color": int(one_color.sum()),
        "whole": int((one_color & seen.all(1)).sum()),
        "missing": 100 * float((~seen).float().mean()),
        "jump": float(jump[both.any(1)].mean()),
    }


def levels(audio, rate):
    """How quiet is it where it is quiet? Audio (n, L) -> {name: dB}, names as in ROWS."""
    audio = torch.as_tensor(audio).float()
    pieces = audio.unfold(1, rate // 50, rate // 50)  # (n, N, 20 ms)
    loudness = pieces.square().mean(2).sqrt()  # (n, N) RMS
    window = torch.hann_window(256)
    spectrum = torch.stft(audio, 256, window=window, normalized=True, return_complex=True).abs()
    # np.quantile, as torch's takes no more than 16 million values
    quiet = np.quantile(loudness.numpy(), 0.1)
    between = np.quantile(spectrum.numpy(), 0.25)
    return {"quiet": 20 * np.log10(quiet + 1e-9), "between": 20 * np.log10(between + 1e-9)}


def togetherness(video, audio, rate):
    """Mean correlation of motion and rise in loudness -> {name: number}, names as in ROWS."""
    motion, rise = tracks(video, audio, rate)["motion, rise"]  # (n, F) each
    return {
        "own": float(correlation(motion, rise).mean()),
        "other": float(correlation(motion, rise.roll(1, 0)).mean()),
    }


def observe(video, audio, events, cfg):
    """The features of metrics.py of n clips. events: a list of their times in s, or None."""
    extract = {"video": metrics.video_features, "audio": metrics.audio_features}
    clips = []
    for i in range(len(video)):
        clip = {"video": np.asarray(video[i]), "audio": np.asarray(audio[i])}
        if events is not None:
            clip["events"] = events[i]
        clips.append(clip)
    return metrics.observe(clips, extract, cfg.fps, cfg.rate)


def distances(seen, reference, cfg):
    """Observed clips against others -> {name: number}, names as in ROWS."""
    tags = {"video": "builtin", "audio": "builtin"}
    table = metrics.compare(reference, seen, tags, cfg.fps)
    out = {name: table[name][0] for name in ("fvd_builtin", "fad_builtin", "fd_joint_builtin")}
    out["sync_ms"] = table["sync_ms"][0]
    out["sync_ms_other"] = table["sync_ms"][1]
    return out


# name, what is printed, digits after the point
ROWS = (
    ("one_color", "clips whose ball keeps one color", 0),
    ("whole", "whole clips: and it is never missing", 0),
    ("missing", "frames without a ball, %", 1),
    ("most_frequent", "balls of the most frequent color, %", 0),
    ("jump", "largest jump, in pixels of a 32x32 frame", 1),
    ("jump_ratio", "the same, relative to real clips", 2),
    ("quiet", "quietest tenth of the sound, dB", 0),
    ("between", "lower quartile of the spectrogram, dB", 0),
    ("own", "correlation of motion and loudness", 3),
    ("other", "the same with another clip's sound", 3),
    ("sync_ms", "from flash to onset, sync_ms", 0),
    ("sync_ms_other", "the same with another clip's sound", 0),
    ("fvd_builtin", "fvd_builtin", 1),
    ("fad_builtin", "fad_builtin", 0),
    ("fd_joint_builtin", "fd_joint_builtin", 3),
)


# ---- The command


def real_clips(name, split, n, cfg):
    """The first n clips of a split -> video (n, F, H, W, 3), audio (n, L), list of event times."""
    clips = data.open_dataset(name, split, cfg.frames, cfg.size, cfg.fps, cfg.rate)
    clips = [clips[i] for i in range(n)]
    video = np.stack([clip["video"] for clip in clips])
    audio = np.stack([clip["audio"] for clip in clips])
    return video, audio, [clip["events"] for clip in clips]


def report(video, audio, events, reference, cfg, least):
    """All counts of n clips, {name: number}. reference: observed clips of the training split."""
    seen = observe(video, audio, events, cfg)
    return {
        **count_balls(video, least),
        **levels(audio, cfg.rate),
        **togetherness(video, audio, cfg.rate),
        **distances(seen, reference, cfg),
    }


def newest(model):
    """The checkpoint of a model's latest run. Raises data.UserError if there is none."""
    found = sorted(Path("out", model).glob("*/ckpt.pt"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise data.UserError(f"There is no out/{model}/*/ckpt.pt: train first, or give --ckpt.")
    return found[-1]


def options(argv=None):
    """The command line -> (options of this file, the others, which are the model's)."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", default="mm_diffusion", help="model file [%(default)s]")
    parser.add_argument("--ckpt", help="its checkpoint [the newest in out/MODEL]")
    parser.add_argument("--data", default="toy:bounce", help="the real clips [%(default)s]")
    parser.add_argument("--n", type=int, default=32, help="samples, and real clips [%(default)s]")
    parser.add_argument(
        "--reference",
        type=int,
        default=256,
        help="training clips that both are compared with [%(default)s]",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the samples [%(default)s]")
    parser.add_argument("--prompt", help="for models that take one")
    parser.add_argument("--label", help="for models that have classes")
    return parser.parse_known_args(argv)


def generate(args, rest):
    """Load the model and sample -> its config, video (n, F, H, W, 3), audio (n, L)."""
    module = importlib.import_module(args.model)
    model = module.load(args.ckpt or newest(args.model), options=rest)
    given = {}
    if args.prompt is not None:
        given["prompt"] = args.prompt
    if args.label is not None:
        given["label"] = args.label
    video, audio = module.sample(model, args.n, seed=args.seed, **given)
    if video is None or audio is None:
        raise data.UserError("This model makes video or sound alone: there is no pair to judge.")
    return model.cfg, video, audio


def main(argv=None):
    args, rest = options(argv)
    start = time.time()
    cfg, video, audio = generate(args, rest)
    seconds = time.time() - start
    video_ref, audio_ref, _ = real_clips(args.data, "train", args.reference, cfg)
    reference = observe(video_ref, audio_ref, None, cfg)
    least = least_area(args.data)
    samples = report(video, audio, None, reference, cfg, least)
    real = report(*real_clips(args.data, "val", args.n, cfg), reference, cfg, least)
    for row in (samples, real):
        row["jump_ratio"] = row["jump"] / real["jump"]
    print(
        f"{args.n} samples of {args.model}, seed {args.seed} ({seconds:.0f} s), and as many "
        f"validation clips of {args.data};\ndistances are to {args.reference} training clips"
    )
    print(f"{'':40}{'samples':>10}{'real':>10}")
    for name, words, digits in ROWS:
        print(f"{words:40}{samples[name]:10.{digits}f}{real[name]:10.{digits}f}")
    return samples, real


if __name__ == "__main__":
    try:
        main()
    except data.UserError as error:
        sys.exit(f"toy_report.py: {error}")
