"""Sample a trained model: clips as mp4 with sound, wav and film strips, and one page that shows them side by side.

    python sample.py --model mm_diffusion                       # the newest run of that model, 4 clips
    python sample.py --model mm_diffusion --ckpt F --n 16 --seed 1 --sampler ddim --steps 50
    python sample.py --model mm_diffusion --n 2048 --npz        # also clips.npz, for metrics.py: no compression
    python sample.py --model mm_diffusion --video in.mp4 --method gradient --guidance 0.1     # sound for a video
    python sample.py --model mm_diffusion --nearest toy         # how close are the samples to what was trained on?

It knows nothing of any model: --model X imports X.py, which has load(path, device, options) and sample(model, n, ...).
Options that are not listed below (--sampler, --seconds, --sr_ckpt) go to the model's own config: python X.py --help
lists those.
"""
import argparse
import html
import importlib
import inspect
import os
import sys
import time
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import soundfile
import torch

import data

PAGE = """<!doctype html><meta charset="utf-8"><title>{title}</title>
<style>body{{background:#111;color:#ddd;font:15px sans-serif;margin:2em}}figure{{display:inline-block;margin:1em;
vertical-align:top}}video,audio{{width:256px;image-rendering:pixelated}}img{{max-width:90vw;display:block}}
a{{color:#9cf}}</style>
<h1>{title}</h1><p>{about}</p>
{clips}
"""


def options(argv=None):
    """The command line -> (options of this file, the others, which are the model's)."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.error = lambda message: sys.exit(f"sample.py: {message} (--help lists the options)")
    parser.add_argument("--model", required=True, metavar="NAME", help="the model file, without .py")
    parser.add_argument("--ckpt", metavar="FILE", help="checkpoint [the newest in out/NAME/]")
    parser.add_argument("--n", type=int, default=4, help="clips to generate [4]")
    parser.add_argument("--steps", type=int, help="network calls per clip [the model's sample_steps]")
    parser.add_argument("--seed", type=int, default=0, help="clip i depends on seed and i alone [0]")
    parser.add_argument("--out", metavar="DIR", help="new folder [out/NAME/samples_NNN]")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="[cuda or cpu]")
    parser.add_argument("--prompt", help="text, for models that take one")
    parser.add_argument("--negative_prompt", help="what the clip should not be")
    parser.add_argument("--label", help="class name, for models with classes")
    parser.add_argument("--guidance", type=float, help="strength of the condition")
    parser.add_argument("--video", metavar="FILE", help="generate sound for this video")
    parser.add_argument("--audio", metavar="FILE", help="generate a video for this sound")
    parser.add_argument("--npz", action="store_true", help="also write clips.npz: all clips as they were generated")
    parser.add_argument("--start", type=float, default=0.0, help="second of --video or --audio to begin at [0]")
    parser.add_argument("--nearest", metavar="DATA", help="find each sample's nearest training clip in this data set")
    parser.add_argument("--search", type=int, default=2000, help="among so many training clips at most [2000]")
    return parser.parse_known_args(argv)


def find(args):
    """Import the model file and find its checkpoint -> (module, path). Raises data.UserError where there is none."""
    here = Path(__file__).parent
    if not args.model.isidentifier() or not (here / f"{args.model}.py").is_file():
        raise data.UserError(f"There is no model file {args.model}.py beside sample.py.")
    module = importlib.import_module(args.model)
    if not (hasattr(module, "load") and hasattr(module, "sample")):
        raise data.UserError(f"{args.model}.py is not a model file: it has no load() and sample().")
    runs = sorted(Path("out", args.model).glob("*/ckpt.pt"), key=lambda p: p.stat().st_mtime)    # not of other stages
    if not (args.ckpt or runs):
        raise data.UserError(f"There is no trained model in out/{args.model}/: train one first with "
                             f"`python {args.model}.py`, or give --ckpt.")
    return module, Path(args.ckpt) if args.ckpt else runs[-1]


def conditions(args, cfg):
    """What the user gave to condition on, as keyword arguments of sample()."""
    given = {k: getattr(args, k) for k in ("prompt", "negative_prompt", "label", "guidance", "steps")}
    for k, which in (("video", 0), ("audio", 1)):
        if path := getattr(args, k):
            clip = data.load_clip(path, cfg.frames, cfg.size, cfg.fps, cfg.rate, args.start)
            if clip[which] is None:
                raise data.UserError(f"{path} has no {k}.")
            given[k] = clip[which]
            print(f"{k}: {cfg.frames / cfg.fps:g} s of {path}, from {args.start:g} s on.")
    return {k: x for k, x in given.items() if x is not None}


def features(video, audio, cfg, frames):
    """What clips are compared by, {stream: (n, features)}: the gray levels of the first `frames` frames, and the
    levels in dB, above -60, of 64 bands in four short spectra per frame."""
    out, length = {}, frames * cfg.rate // cfg.fps // (4 * frames)
    if video is not None:
        v = torch.as_tensor(video)[:, :frames].float().permute(0, 1, 4, 2, 3)                    # (n, F, 3, H, W)
        v = torch.nn.functional.interpolate(v.flatten(0, 1), (cfg.size, cfg.size), mode="area")  # after --sr_ckpt
        out["video"] = v.reshape(len(video), -1)
    if audio is not None:
        a = torch.as_tensor(audio).float()[:, :4 * frames * length].unflatten(1, (4 * frames, length))
        power = (torch.fft.rfft(a * torch.hann_window(length)).abs() * 4 / length).square()      # (n, 4*F, bands)
        power = torch.nn.functional.adaptive_avg_pool1d(power, min(64, power.shape[-1]))
        out["audio"] = (10 * torch.log10(power + 1e-6)).flatten(1)
    return out


def nearest(video, audio, cfg, train, val, most):
    """Print the training clip nearest to each sample, by stream, and how near validation clips come to theirs: a
    sample that is much nearer is a copy. Searched are the first clips that the run saw, at most `most`."""
    count, n = min(most, cfg.steps * cfg.batch_size), len(audio if video is None else video)
    frames = min(cfg.frames, audio.shape[1] * cfg.fps // cfg.rate if video is None else video.shape[1])

    def of(dataset, first, last):
        clips = [dataset[i] for i in range(first, last)]
        both = (None if x is None else np.stack([c[k] for c in clips]) for k, x in (("video", video), ("audio", audio)))
        return features(*both, cfg, frames)

    held_out, distance = of(val, 0, min(64, len(val))), {}
    queries = {k: torch.cat([x, held_out[k]]) for k, x in features(video, audio, cfg, frames).items()}  # (n + 64, ...)
    for first in range(0, count, 100):
        for k, x in of(train, first, min(first + 100, count)).items():
            apart = torch.cdist(queries[k], x, compute_mode="donot_use_mm_for_euclid_dist")      # exact near 0
            distance.setdefault(k, []).append(apart / x.shape[1] ** 0.5)
    for k, parts in distance.items():
        least, where = torch.cat(parts, 1).min(1)
        near = "; ".join(f"{i:03d} to clip {where[i]}, {least[i]:.1f}" for i in range(n))
        print(f"{k}, {'gray levels' if k == 'video' else 'dB'} (RMS) to the nearest of {count} training clips: {near}; "
              f"{len(least) - n} validation clips: median {least[n:].median():.1f}, least {least[n:].min():.1f}")


def write(out, video, audio, cfg, title, about):
    """Write every clip's files and index.html into the new folder `out`."""
    figures = []
    for i in range(len(audio if video is None else video)):
        v, a, name, tags = None if video is None else video[i], None if audio is None else audio[i], f"{i:03d}", []
        if v is not None:
            data.save_clip(out / f"{name}.mp4", v, a, cfg.fps, cfg.rate)
            tags.append(f'<video src="{name}.mp4" controls loop></video>')
        if a is not None:
            soundfile.write(out / f"{name}.wav", a.numpy(), cfg.rate)
            tags.append(f'<audio src="{name}.wav" controls></audio>')
        data.film_strip(out / f"{name}.png", v, a, cfg.fps, cfg.rate)
        figures.append(f'<figure>{"<br>".join(tags)}<a href="{name}.png"><img src="{name}.png" alt="frames and '
                       f'spectrogram"></a><figcaption>{name}</figcaption></figure>')
    (out / "index.html").write_text(PAGE.format(title=html.escape(title), about=html.escape(about),
                                                clips="\n".join(figures)), encoding="utf-8")


def write_npz(path, video, audio, cfg, **said):
    """Write all clips to one file: video uint8 (n, F, H, W, 3), audio float32 (n, L), fps, rate, and for each clip what
    was said of it, label or caption."""
    arrays = {k: np.asarray(x) for k, x in (("video", video), ("audio", audio)) if x is not None}
    n = max(len(x) for x in arrays.values())
    arrays |= {k: np.array([x] * n) for k, x in said.items() if x is not None}
    with open(f"{path}.new", "wb") as f:
        np.savez(f, fps=cfg.fps, rate=cfg.rate, **arrays)
    os.replace(f"{path}.new", path)


class Clips:
    """At most args.n clips of `what`, a data set or a folder, as a sequence of dicts: video, audio, and what is known
    of label, color and events. `about` says what they are. A folder of .npz files, held in memory, sets args.frames,
    size, fps and rate; anything else is read in that shape. Raises data.UserError when there is nothing to read."""

    def __init__(self, what, split, args):
        if not what or args.protocol not in ("plain", "stylegan-v"):
            raise data.UserError("Give --real and --fake, data sets or folders; --protocol is plain or stylegan-v.")
        if not Path(what).is_dir():
            self.open_dataset(what, split, args)
        elif files := sorted(Path(what).rglob("*.npz")):
            clips = [clip for path in files for clip in read_npz(path, args)]
            self.get, self.numbers = clips.__getitem__, range(len(clips))
            self.about = f"{len(files)} .npz in {what}, not compressed"
        else:
            files = sorted(p for p in Path(what).rglob("*") if p.suffix.lower() in data.ENDINGS)
            if not files:
                raise data.UserError(f"There are no .npz files and no videos in {what}.")
            self.open_videos(what, files, args)
        self.numbers = self.numbers[:args.n]
        self.about = f"{len(self)} clips of {self.about}"
        if not len(self):
            raise data.UserError(f"There are no clips in {what}, or --n is 0.")

    def open_dataset(self, what, split, args):
        clips = data.open_dataset(what, split, args.frames, args.size, args.fps, args.rate)
        self.numbers, self.about = range(len(clips)), f"{what}, {split} split"
        if hasattr(clips, "windows"):
            clips.val = True  # clips[i] is window i, disjoint from the others
            self.choose([clips.clips[k]["source"] for k, _ in clips.windows], args)

        def get(i):
            clip = clips[i]
            clip |= {"label": clips.labels[clip["label"]]}
            if "events" in clip:  # of toy clips, whose captions name one color; impacts alone are moments one can hear
                clip["color"] = next(w for w in clip["caption"].split() if w in data.COLORS)
                clip["events"] = clip["events"] if clip["label"] in ("bounce", "collide") else []
            return clip
        self.get = get

    def open_videos(self, what, files, args):
        seconds, windows = args.frames / args.fps, []
        for path in files:
            try:
                n = int(next(imageio_ffmpeg.read_frames(str(path)))["duration"] / seconds + 0.1)
            except Exception as error:  # whatever ffmpeg makes of it
                raise data.UserError(f"Cannot read {path}, or it is no video ({type(error).__name__}).") from None
            windows += [(path, k * seconds) for k in range(max(1, n))]
        self.about = f"{len(files)} videos in {what}, compressed, which changes FVD and FAD"
        self.choose([path for path, _ in windows], args)

        def get(i):
            clip = data.load_clip(windows[i][0], args.frames, args.size, args.fps, args.rate, windows[i][1])
            return {k: x for k, x in zip(("video", "audio"), clip, strict=True) if x is not None}
        self.get = get

    def choose(self, sources, args):
        """Protocol plain: windows in random order, in their own if all are used. stylegan-v: one video after another,
        and a random window of each, so that long videos do not count for more."""
        rng, n = np.random.default_rng(0), len(sources)
        self.numbers = rng.permutation(n) if n > args.n else range(n)
        if args.protocol == "stylegan-v":
            self.about += ", a video, then its clip (stylegan-v)"
            videos = {}
            for i in rng.permutation(n):
                videos.setdefault(sources[i], []).append(int(i))
            videos = list(videos.values())
            self.numbers = [int(rng.choice(videos[i % len(videos)])) for i in range(min(n, args.n))]

    def __len__(self):
        return len(self.numbers)

    def __getitem__(self, i):
        return self.get(int(self.numbers[i]))


def read_npz(path, args):
    """The clips of a file of write_npz, or of a single clip without n, as a list of dicts. Sets args.frames, size, fps
    and rate, to which files read later must keep."""
    try:
        with np.load(path) as f:
            z = dict(f)
        kind = {"fps": int(z.pop("fps")), "rate": int(z.pop("rate"))}
        if "video" in z:
            kind |= dict(zip(("frames", "size"), z["video"].shape[-4:-2], strict=True))
        z = {k: x.reshape(-1, *x.shape[x.ndim - {"video": 4, "audio": 1}.get(k, 0):]) for k, x in z.items()}
        colors = [[w for w in caption.split() if w in data.COLORS] for caption in z.get("caption", ())]
        if colors and all(colors):
            z["color"] = [words[0] for words in colors]
        clips = [dict(zip(z, clip, strict=True)) for clip in zip(*z.values(), strict=True)]
    except Exception as error:  # whatever numpy makes of it
        raise data.UserError(f"Cannot use {path}: it must hold video uint8 (n, F, H, W, 3), audio float32 (n, L), fps "
                             f"and rate ({type(error).__name__}).") from None
    if any(getattr(args, "fixed", kind).get(k, x) != x for k, x in kind.items()):
        here, there = (", ".join(f"{k} {x}" for k, x in d.items()) for d in (kind, args.fixed))
        raise data.UserError(f"The clips of {path} have {here}, but others {there}: they cannot be compared.")
    args.__dict__.update(kind, fixed=kind)
    return clips


def main(argv=None):
    args, rest = options(argv)
    try:
        if min(args.n, 1 if args.steps is None else args.steps) < 1 or args.start < 0:
            raise data.UserError("--n and --steps must be 1 or more, --start 0 or more.")
        try:
            torch.empty(0, device=args.device)
        except (RuntimeError, AssertionError):
            raise data.UserError(f"There is no --device {args.device} here; try cpu, cuda, cuda:1 or mps.") from None
        module, path = find(args)
        model = module.load(path, args.device, rest)
        folders = (Path("out", args.model, f"samples_{i:03d}") for i in range(1, 1000))
        out = Path(args.out) if args.out else next(p for p in folders if not p.exists())
        if out.exists() and any(out.iterdir()):
            raise data.UserError(f"{out} is not empty: choose another --out.")
        cfg = model.cfg
        sets = [data.open_dataset(args.nearest, split, cfg.frames, cfg.size, cfg.fps, cfg.rate, cfg.seed)
                for split in ("train", "val") if args.nearest]
        given, clock = conditions(args, cfg), time.time()
        video, audio = module.sample(model, args.n, seed=args.seed, **given)
        seconds = time.time() - clock
        out.mkdir(parents=True, exist_ok=True)
        said = "".join(f", {k} {getattr(args, k)}" for k in given) + ("," + "".join(f" {x}" for x in rest)) * bool(rest)
        about = f"{path}, seed {args.seed}{said}: {args.n} clips in {seconds:.1f} s"
        if args.npz:
            write_npz(out / "clips.npz", video, audio, cfg, label=args.label, caption=args.prompt)
        write(out, video, audio, cfg, f"{inspect.getdoc(module).splitlines()[0]}", about)
        if sets:
            nearest(video, audio, cfg, *sets, args.search)
    except data.UserError as error:
        sys.exit(f"sample.py: {error}")
    print(f"{args.n} clips in {seconds:.1f} s: open {out}/index.html")


if __name__ == "__main__":
    main()
