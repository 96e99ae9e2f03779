"""Sample a trained model: mp4 with sound, wav, film strips, and a page that shows them.

    python sample.py --model mm_diffusion                  # the newest run of that model, 4 clips
    python sample.py --model mm_diffusion --ckpt F --n 16 --seed 1 --sampler ddim --steps 50
    python sample.py --model mm_diffusion --n 2048 --npz   # also clips.npz, for metrics.py
    python sample.py --model mm_diffusion --video in.mp4   # sound for a video; --audio: the reverse
    python sample.py --model mm_diffusion --nearest toy    # how close to what was trained on?

It knows nothing of any model: --model X imports X.py, which has load(path, device, options) and
sample(model, n, ...). Options that are not listed below (--sampler, --seconds, --sr_ckpt) go to the
model's own config: python X.py --help lists those.
"""
import argparse
import html
import importlib
import inspect
import sys
import time
from pathlib import Path

import numpy as np
import soundfile
import torch
import torch.nn.functional as F

import data

# Everything on the page is beside it: it can be opened from disk, and moved with its folder.
PAGE = """<!doctype html><meta charset="utf-8"><title>{title}</title>
<style>body{{background:#111;color:#ddd;font:15px sans-serif;margin:2em}}
figure{{display:inline-block;margin:1em;vertical-align:top}}
video,audio{{width:256px;image-rendering:pixelated}}img{{max-width:90vw;display:block}}
a{{color:#9cf}}</style>
<h1>{title}</h1><p>{about}</p>
{clips}
"""


# ---- The command line


def refuse(message):
    """What argparse calls for a mistake: one sentence instead of its usage text."""
    sys.exit(f"sample.py: {message} (--help lists the options)")


def options(argv=None):
    """The command line -> (options of this file, the others, which are the model's)."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    # No abbreviations: --sampl would be ours or the model's.
    parser.error = refuse
    add = parser.add_argument
    add("--model", required=True, metavar="NAME", help="the model file, without .py")
    add("--ckpt", metavar="FILE", help="checkpoint [the newest in out/NAME/]")
    add("--n", type=int, help="clips to generate [4, or one for each --prompt or --label]")
    add("--steps", type=int, help="network calls per clip [the model's sample_steps]")
    add("--seed", type=int, default=0, help="clip i depends on seed and i alone [0]")
    add("--out", metavar="DIR", help="new folder [out/NAME/samples_NNN]")
    add("--device", default="auto", help="cuda, cuda:1, cpu or mps [cuda if it is there, or cpu]")
    add("--prompt", action="append", help="text: once for all clips, or again for each of them")
    add("--negative_prompt", help="what the clips should not be")
    add("--label", action="append", help="class name: once for all clips, or again for each")
    add("--guidance", type=float, help="strength of the condition")
    add("--video", metavar="FILE", help="generate sound for this video")
    add("--audio", metavar="FILE", help="generate a video for this sound")
    add("--start", type=float, default=0.0, help="second of --video or --audio to begin at [0]")
    add("--npz", action="store_true", help="also write clips.npz: all clips as they were generated")
    add("--nearest", metavar="DATA", help="find each sample's nearest training clip in this set")
    add("--search", type=int, default=2000, help="among so many training clips at most [2000]")
    # What is not ours is the model's; its config says whether that is right.
    args, rest = parser.parse_known_args(argv)

    # Given once, a prompt or label is a value for all clips; more often, a list of one for each.
    for name in ("prompt", "label"):
        values = getattr(args, name)
        if values and len(values) == 1:
            setattr(args, name, values[0])
        elif values and args.n is None:
            args.n = len(values)
    if args.n is None:
        args.n = 4
    return args, rest


def find_device(name):
    """--device -> the name for torch. mps is there on request only, as in the model files."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError):  # no such name, no such card, no such build of torch
        raise data.UserError(
            f"There is no --device {name} here; try cpu, cuda, cuda:1 or mps."
        ) from None
    return name


def find_model(args):
    """Import the model file and find its checkpoint -> (module, path).

    Raises data.UserError where there is none.
    """
    # A name, not a path: nothing else than a file of this folder is imported.
    beside = Path(__file__).parent / f"{args.model}.py"
    if not args.model.isidentifier() or not beside.is_file():
        raise data.UserError(f"There is no model file {args.model}.py beside sample.py.")
    module = importlib.import_module(args.model)
    if not hasattr(module, "load") or not hasattr(module, "sample"):
        raise data.UserError(f"{args.model}.py is not a model file: it has no load() and sample().")
    if args.ckpt:
        return module, Path(args.ckpt)
    runs = list(Path("out", args.model).glob("*/ckpt.pt"))  # other stages lie deeper
    if not runs:
        raise data.UserError(
            f"There is no trained model in out/{args.model}/: train one first with "
            f"`python {args.model}.py`, or give --ckpt."
        )
    return module, max(runs, key=lambda path: path.stat().st_mtime)


def find_out(args):
    """The folder for the samples, which is new or empty: --out, or the next number."""
    if args.out:
        out = Path(args.out)
        if out.exists() and any(out.iterdir()):
            raise data.UserError(f"{out} is not empty: choose another --out.")
        return out
    # Older samples stay.
    number = 1
    while Path("out", args.model, f"samples_{number:03d}").exists():
        number += 1
    return Path("out", args.model, f"samples_{number:03d}")


def conditions(args, cfg):
    """What the user gave to condition on, as keyword arguments of sample()."""
    given = {}
    for name in ("prompt", "negative_prompt", "label", "guidance", "steps"):
        if getattr(args, name) is not None:
            given[name] = getattr(args, name)
    for name in ("video", "audio"):
        path = getattr(args, name)
        if not path:
            continue
        shape = (cfg.frames, cfg.size, cfg.fps, cfg.rate)  # of one window of the model
        video, audio = data.load_clip(path, *shape, args.start)
        given[name] = video if name == "video" else audio
        if given[name] is None:
            raise data.UserError(f"{path} has no {name}.")
        seconds = cfg.frames / cfg.fps
        print(f"{name}: {seconds:g} s of {path}, from {args.start:g} s on.")
    return given


# ---- Nearest training clips


def features(video, audio, cfg, frames):
    """What clips are compared by, {stream: (n, features)}, over the first `frames` frames.

    Video: the gray levels of cfg.size pixels squared. Audio: the levels in dB, above -60, of 64
    bands in four short spectra per frame. Either may be None.
    """
    out = {}
    if video is not None:
        v = torch.as_tensor(video)[:, :frames].float()  # (n, F, H, W, 3)
        v = v.permute(0, 1, 4, 2, 3).flatten(0, 1)  # (n*F, 3, H, W)
        v = F.interpolate(v, (cfg.size, cfg.size), mode="area")  # the model's, after --sr_ckpt
        out["video"] = v.reshape(len(video), -1)
    if audio is not None:
        windows = 4 * frames
        length = frames * cfg.rate // cfg.fps // windows  # samples in a window
        a = torch.as_tensor(audio).float()[:, : windows * length]
        a = a.unflatten(1, (windows, length))  # (n, windows, length)
        spectrum = torch.fft.rfft(a * torch.hann_window(length)).abs() * 4 / length
        power = spectrum.square()  # (n, windows, frequencies)
        power = F.adaptive_avg_pool1d(power, min(64, power.shape[-1]))  # (n, windows, bands)
        out["audio"] = (10 * torch.log10(power + 1e-6)).flatten(1)
    return out


def nearest(video, audio, cfg, train, val, most):
    """Print the training clip nearest to each sample, by stream, and how near validation clips come
    to theirs: a sample that is much nearer is a copy.

    Searched are the first clips that the run saw, at most `most`.
    """
    count = min(most, cfg.steps * cfg.batch_size)
    # Not longer than training clips, as samples may be (--seconds).
    if video is None:
        n = len(audio)
        frames = audio.shape[1] * cfg.fps // cfg.rate
    else:
        n = len(video)
        frames = video.shape[1]
    frames = min(cfg.frames, frames)

    def features_of(dataset, first, last):
        clips = [dataset[i] for i in range(first, last)]
        v = None if video is None else np.stack([clip["video"] for clip in clips])
        a = None if audio is None else np.stack([clip["audio"] for clip in clips])
        return features(v, a, cfg, frames)

    # Asked for: the samples, and then validation clips, to compare with.
    held_out = features_of(val, 0, min(64, len(val)))
    queries = {}
    for stream, x in features(video, audio, cfg, frames).items():
        queries[stream] = torch.cat([x, held_out[stream]])  # (n + 64, features)

    distances = {stream: [] for stream in queries}
    for first in range(0, count, 100):  # so many at a time in memory
        found = features_of(train, first, min(first + 100, count))
        for stream, x in found.items():
            # Without the shortcut by matrix products, which is not exact near 0.
            apart = torch.cdist(queries[stream], x, compute_mode="donot_use_mm_for_euclid_dist")
            distances[stream].append(apart / x.shape[1] ** 0.5)  # RMS
    for stream, parts in distances.items():
        least, where = torch.cat(parts, 1).min(1)  # (n + 64,)
        near = [f"{i:03d} to clip {where[i]}, {least[i]:.1f}" for i in range(n)]
        unit = "gray levels" if stream == "video" else "dB"
        real = least[n:]  # (64,)
        print(
            f"{stream}, {unit} (RMS) to the nearest of {count} training clips: {'; '.join(near)}; "
            f"{len(real)} validation clips: median {real.median():.1f}, least {real.min():.1f}"
        )


# ---- What is written


def write(out, video, audio, cfg, title, about):
    """Write every clip's files and index.html into the new folder `out`."""
    figures = []
    for i in range(len(audio if video is None else video)):
        v = None if video is None else video[i]  # (F, H, W, 3)
        a = None if audio is None else audio[i]  # (L,)
        name = f"{i:03d}"
        tags = []
        if v is not None:
            data.save_clip(out / f"{name}.mp4", v, a, cfg.fps, cfg.rate)
            tags.append(f'<video src="{name}.mp4" controls loop></video>')
        if a is not None:
            # Beside the video, whose sound is compressed.
            soundfile.write(out / f"{name}.wav", a.numpy(), cfg.rate)
            tags.append(f'<audio src="{name}.wav" controls></audio>')
        data.film_strip(out / f"{name}.png", v, a, cfg.fps, cfg.rate)
        picture = f'<img src="{name}.png" alt="frames and spectrogram">'
        tags.append(f'<a href="{name}.png">{picture}</a>')
        figures.append(f"<figure>{'<br>'.join(tags)}<figcaption>{name}</figcaption></figure>")
    page = PAGE.format(
        title=html.escape(title), about=html.escape(about), clips="\n".join(figures)
    )
    (out / "index.html").write_text(page, encoding="utf-8")


def describe(args, given, rest):
    """What was asked for, in words: seed, conditions, and the model's options."""
    words = [f"seed {args.seed}"]
    for name in given:
        value = getattr(args, name)  # a file's name rather than its clip
        if isinstance(value, list):
            value = " | ".join(value)
        words.append(f"{name} {value}")
    if rest:
        words.append(" ".join(rest))
    return ", ".join(words)


def run(args, rest):
    """Sample, and write all that was asked for."""
    if args.n < 1 or (args.steps is not None and args.steps < 1) or args.start < 0:
        raise data.UserError("--n and --steps must be 1 or more, --start 0 or more.")
    device = find_device(args.device)
    module, path = find_model(args)
    model = module.load(path, device, rest)
    cfg = model.cfg
    # What can be wrong is read before the long part.
    out = find_out(args)
    if args.nearest:
        shape = (cfg.frames, cfg.size, cfg.fps, cfg.rate, cfg.seed)
        train = data.open_dataset(args.nearest, "train", *shape)
        val = data.open_dataset(args.nearest, "val", *shape)
    given = conditions(args, cfg)

    # Videos come as uint8 (n, F, H, W, 3), sound as float32 (n, L); one may be None.
    began = time.time()
    video, audio = module.sample(model, args.n, seed=args.seed, **given)
    took = f"{args.n} clips in {time.time() - began:.1f} s"

    out.mkdir(parents=True, exist_ok=True)
    if args.npz:
        said = {"label": args.label, "caption": args.prompt}
        data.write_npz(out / "clips.npz", video, audio, cfg.fps, cfg.rate, **said)
    title = inspect.getdoc(module).splitlines()[0]
    about = f"{path}, {describe(args, given, rest)}: {took}"
    write(out, video, audio, cfg, title, about)
    # Last, as it may take minutes: what was made is there to look at.
    if args.nearest:
        nearest(video, audio, cfg, train, val, args.search)
    print(f"{took}: open {out}/index.html")


def main(argv=None):
    args, rest = options(argv)
    try:
        run(args, rest)
    except data.UserError as error:
        data.end("sample.py", error)


if __name__ == "__main__":
    main()
