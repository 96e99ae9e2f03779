"""How well does a model do each task: both from text, sound for a video, video for a sound?

    python tests/tasks_report.py --model uniform_dit --ckpt F --data toy:bounce,glide,pulse
    python tests/tasks_report.py --model uniform_dit --ckpt F --rows t2av --guidance 1,2,3,4
    python tests/tasks_report.py --model syncflow --ckpt out/on/ckpt.pt,out/off/ckpt.pt --size 48

Takes n validation clips, makes samples for their captions (T2AV), videos (V2A) or sounds (A2V), and
prints a line of a Markdown table for each task. Below them: the same scores of real clips, which a
perfect model would reach with n clips, and of these with every video beside the sound of the clip
before, which a deaf model would (that sound is of another scene, if there are several).

Distances are to n clips of the training split. "Own / other's": beside the error of sync and the
correlations (mean and standard error, of what tests/zero_shot.py compares) of a pair stands that of
a video with another clip's sound: in the errors that of the clip before, as in metrics.py, in the
correlations that of a clip of the same scene. Scene: share of clips in which a classifier, trained
on the same training clips, finds the scene that was wanted. Color: share of clips whose ball has
the color that the caption of the clip names; without text, whether or not the model could know.
Whole: share whose ball has one color and is never missing. In the row of mismatched clips the sound
is mostly of another scene.

Several checkpoints, with commas between them, get a line each for a task, which ends in the folder
of the checkpoint; they see the same clips, and with noise of one shape the same noise. A task that
the model refuses is left out. Options that are not listed below go to the model: with --size the
clips of all rows have that size.
"""

import argparse
import functools
import importlib
import math
import os
import sys
import time
from collections import defaultdict
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))
import toy_report  # noqa: E402
from zero_shot import correlation, tracks  # noqa: E402

import data  # noqa: E402
import metrics  # noqa: E402

# name: words in the table, the stream that is given, whether captions are
ROWS = {
    "untrained": ("T2AV, untrained", "", True),
    "t2av": ("T2AV, captions", "", True),
    "v2a": ("V2A, captions", "video", True),
    "v2a_alone": ("V2A, no text", "video", False),
    "a2v": ("A2V, captions", "audio", True),
    "a2v_alone": ("A2V, no text", "audio", False),
    "mismatched": ("real clips, mismatched", "", False),
    "real": ("other real clips", "", False),
}
USUAL = [row for row in ROWS if row != "untrained"]  # which needs a checkpoint of its own
FLOORS = ("mismatched", "real")  # which need none

# heading: how its cell is written, from the scores of judge()
COLUMNS = {
    "fvd_builtin": "{fvd_builtin:.1f}",
    "fad_builtin": "{fad_builtin:.1f}",
    "fd_joint_builtin": "{fd_joint_builtin:.3f}",
    "error of sync, own / other's": "{sync:.0f} / {sync_other:.0f} ms",
    "bounce: motion and loudness, own / other's": (
        "{bounce:.3f} +- {bounce_error:.3f} / {bounce_other:.3f} +- {bounce_other_error:.3f}"
    ),
    "glide: height and pitch, own / other's": (
        "{glide:.3f} +- {glide_error:.3f} / {glide_other:.3f} +- {glide_other_error:.3f}"
    ),
    "scene, video": "{scene_video:.2f}",
    "scene, sound": "{scene_audio:.2f}",
    "color": "{color:.2f}",
    "whole": "{whole:.2f}",
}

# Scores of one stream alone say nothing of a model that was given it.
ALONE = {
    "": (),
    "video": ("fvd_builtin", "scene, video", "color", "whole"),
    "audio": ("fad_builtin", "scene, sound"),
}

# What metrics.observe() says of a stream.
FEATURES = {
    "video": ("video", "motion", "peaks", "flashes"),
    "audio": ("audio", "onsets", "rise"),
}

# What is seen and heard together, and the scene that ties it together.
PAIRS = {"bounce": "motion, rise", "glide": "height, pitch"}


# ---- Scores


def togetherness(video, audio, labels, rate):
    """Correlations of what is seen and heard -> {name: number}, for the scenes of PAIRS.

    NAME is the mean of pairs, NAME_other that of videos with the sound before, of the same scene;
    with _error behind it, their standard errors.
    """
    found = tracks(video, audio, rate)
    out = {}
    for scene, pair in PAIRS.items():
        seen, heard = found[pair]  # (n, F) each
        chosen = [label == scene for label in labels]
        seen = seen[chosen]  # (clips of the scene, F)
        heard = heard[chosen]
        if len(seen) < 2:  # no other clip
            continue
        # Whichever of the two was generated: the pair is that of a clip, or of two.
        own = correlation(seen, heard)
        other = correlation(seen, heard.roll(1, 0))
        for name, r in ((scene, own), (f"{scene}_other", other)):
            out[name] = float(r.mean())
            out[f"{name}_error"] = float(r.std()) / len(r) ** 0.5
    return out


def count_balls(video, clips):
    """Shares of clips {"color", "whole"}: whose ball has the color named, in most of the frames
    where it is seen; whose ball has one color and is never missing.

    video (n, F, H, W, 3) uint8; clips: the n real ones, with caption and label. Counts those of one
    ball, for the color with one in the caption; NaN if there are none.
    """
    names = list(data.COLORS)
    right = []
    whole = []
    for i, clip in enumerate(clips):
        if clip["label"] not in toy_report.LEAST:
            continue
        least = toy_report.LEAST[clip["label"]] / 32**2
        one = video[i : i + 1]  # (1, F, H, W, 3)
        whole.append(toy_report.count_balls(one, least)["whole"])
        color = data.first_color(clip["caption"])
        if color is not None:
            seen, hue, _ = toy_report.balls(one, least)  # (1, F) each
            hits = seen & (hue == names.index(color))
            # A ball that is never seen is wrong.
            right.append(bool(hits.sum() > seen.sum() / 2))
    shares = {"color": right, "whole": whole}
    return {name: float(np.mean(x)) if x else math.nan for name, x in shares.items()}


def observe(video, audio, clips, cfg, truth=None):
    """The features of metrics.py of n clips, with the labels of as many real ones.

    truth: what this has returned for the real ones. A stream that is theirs, as one that a model
    was given, is not looked at again.
    """
    extract = {"video": metrics.video_features, "audio": metrics.audio_features}
    real = dict(zip(extract, streams(clips), strict=True))
    seen = {"label": [clip["label"] for clip in clips]}
    for kind, stream in (("video", video), ("audio", audio)):
        stream = np.asarray(stream)
        if truth and np.array_equal(stream, real[kind]):
            seen |= {name: truth[name] for name in FEATURES[kind]}
            continue
        alone = [{kind: x} for x in stream]
        seen |= metrics.observe(alone, {kind: extract[kind]}, cfg.fps, cfg.rate)
    return seen


def judge(video, audio, clips, reference, cfg, truth=None):
    """All scores of n pairs, {name: number}, the names as in COLUMNS. clips: the n real ones they
    were made for. reference: observed clips of the training split; truth: see observe()."""
    seen = observe(video, audio, clips, cfg, truth)
    # Of a row of compare() the second value is that of the pairs mismatched.
    tags = {"video": "builtin", "audio": "builtin"}
    table = metrics.compare(reference, seen, tags, cfg.fps)
    scores = {name: table[name][0] for name in ("fvd_builtin", "fad_builtin", "fd_joint_builtin")}
    scores["sync"] = table["sync_ms"][0]
    scores["sync_other"] = table["sync_ms"][1]
    for kind in ("video", "audio"):
        accuracy = table.get(f"accuracy_label_{kind}_builtin")
        # A data set of one scene has nothing to tell apart.
        if accuracy is not None:
            scores[f"scene_{kind}"] = accuracy[0]
    scores |= count_balls(video, clips)
    return scores | togetherness(video, audio, seen["label"], cfg.rate)


def line(words, given, scores):
    """A line of the table, with gaps for what is undefined."""
    known = defaultdict(lambda: math.nan, scores)
    cells = [words]
    for heading, form in COLUMNS.items():
        text = form.format_map(known)
        if "nan" in text:
            text = ""
        if heading in ALONE[given]:
            text = "given"
        cells.append(text)
    return f"| {' | '.join(cells)} |"


# ---- The command


def streams(clips):
    """n clips -> video (n, F, H, W, 3) uint8, audio (n, L) float32."""
    video = np.stack([clip["video"] for clip in clips])
    audio = np.stack([clip["audio"] for clip in clips])
    return video, audio


def make(module, model, row, clips, guidance, seed):
    """The n pairs of a row -> video (n, F, H, W, 3), audio (n, L). clips: n real ones.

    Raises data.UserError for what the model cannot do.
    """
    video, audio = streams(clips)
    # The floors need no model.
    if row == "real":
        return video, audio
    if row == "mismatched":
        return video, np.roll(audio, 1, 0)  # as metrics.py mismatches them
    _, given, text = ROWS[row]
    wanted = {}
    if text:
        wanted["prompt"] = [clip["caption"] for clip in clips]
    if given:
        wanted[given] = video if given == "video" else audio
    # What is given comes back as it was, as one of the two.
    made = module.sample(model, len(clips), seed=seed, guidance=guidance, **wanted)
    if made[0] is None or made[1] is None:
        raise data.UserError("This model makes video or sound alone: there is no pair to judge.")
    return made


def options(argv=None):
    """The command line -> (options of this file, the others, which are the model's)."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--model", default="uniform_dit", help="model file [%(default)s]")
    add("--ckpt", help="its checkpoint, or some: F,G [the newest in out/MODEL]")
    add("--untrained", help="checkpoint of an untrained network: adds its row")
    add("--data", default="toy:bounce,glide,pulse", help="the real clips [%(default)s]")
    add("--n", type=int, default=256, help="clips in a row, at least 4 [%(default)s]")
    add("--seed", type=int, default=0, help="of the samples [%(default)s]")
    add("--rows", default=",".join(USUAL), help="some of [%(default)s]")
    weights = functools.partial(data.parse_value, tuple)
    add("--guidance", type=weights, default=(None,), help="weights to try in row t2av: 1,2,3")
    return parser.parse_known_args(argv)


def plan(args, names):
    """The rows to print -> list of (name in ROWS, checkpoint, weight of guidance or None, the
    model's own). names: of the checkpoints."""
    jobs = [("untrained", args.untrained, None)] if args.untrained else []
    for row in args.rows.split(","):
        if row not in USUAL:
            raise data.UserError(f"--rows takes some of {','.join(USUAL)}, not {row}.")
        weights = args.guidance if row == "t2av" else (None,)
        some = names[:1] if row in FLOORS else names
        jobs += [(row, name, weight) for name in some for weight in weights]
    return jobs


def load(module, names, rest):
    """Checkpoints -> {name: model}. Raises data.UserError if their clips differ in shape."""
    models = {name: module.load(name, options=rest) for name in names}
    shapes = {(m.cfg.frames, m.cfg.size, m.cfg.fps, m.cfg.rate) for m in models.values()}
    if len(shapes) > 1:
        raise data.UserError(
            "The checkpoints differ in frames, size, fps or rate: judge them one by one."
        )
    return models


def labels_of(names):
    """Checkpoints -> {name: its folder, less what all have in common, or "" for a lone one}."""
    if len(names) == 1:
        return {names[0]: ""}
    paths = [Path(name).absolute() for name in names]
    common = os.path.commonpath([path.parent.parent for path in paths])
    labels = [f", {path.relative_to(common)}".removesuffix("/ckpt.pt") for path in paths]
    return dict(zip(names, labels, strict=True))


def main(argv=None):
    args, rest = options(argv)
    names = args.ckpt.split(",") if args.ckpt else [toy_report.newest(args.model)]
    names = list(dict.fromkeys(names))
    jobs = plan(args, names)
    module = importlib.import_module(args.model)
    # All of them first: what cannot be loaded is known before anything is made.
    models = load(module, dict.fromkeys(name for _, name, _ in jobs), rest)
    labels = labels_of(names) | {args.untrained: ""}
    cfg = models[jobs[0][1]].cfg
    shape = (cfg.frames, cfg.size, cfg.fps, cfg.rate)
    # The scenes of a data set come in turn: n clips are equal parts of them.
    clips = list(data.Clips(args.data, "val", args.n, *shape))
    others = list(data.Clips(args.data, "train", args.n, *shape))
    reference = observe(*streams(others), others, cfg)
    truth = observe(*streams(clips), clips, cfg)

    print(f"| {len(clips)} clips of {args.data} | {' | '.join(COLUMNS)} |")
    print("|---" * (1 + len(COLUMNS)) + "|")
    table = {}
    for row, name, weight in jobs:
        words, given, _ = ROWS[row]
        if row not in FLOORS:
            words += labels[name]
        if weight is not None:
            words += f", guidance {weight:g}"
        start = time.time()
        # A model without words has the other rows all the same.
        try:
            video, audio = make(module, models[name], row, clips, weight, args.seed)
        except data.UserError as error:
            print(f"{words}: left out. {error}", file=sys.stderr)
            continue
        print(f"{words}: made in {time.time() - start:.0f} s", file=sys.stderr)
        table[words] = judge(video, audio, clips, reference, cfg, truth)
        # Each line as soon as it is known: the next one may take long.
        print(line(words, given, table[words]), flush=True)
    return table


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:  # data.UserError, and what metrics.py says of the clips
        data.end("tasks_report.py", error)
