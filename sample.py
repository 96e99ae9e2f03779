"""Sample a trained model: clips as mp4 with sound, wav and film strips, and one page that shows them side by side.

    python sample.py --model mm_diffusion                       # the newest run of that model, 4 clips
    python sample.py --model mm_diffusion --ckpt F --n 16 --seed 1 --sampler ddim --steps 50

It knows nothing of any model: --model X imports X.py, which has load(path, device, options) and sample(model, n, ...).
Options that are not listed below (--sampler, say) go to the model's own config: python X.py --help lists those.
"""
import argparse
import html
import importlib
import inspect
import sys
import time
from pathlib import Path

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
    parser.add_argument("--start", type=float, default=0.0, help="second of --video or --audio to begin at [0]")
    return parser.parse_known_args(argv)


def find(args):
    """Import the model file and find its checkpoint -> (module, path). Raises data.UserError where there is none."""
    here = Path(__file__).parent
    if not args.model.isidentifier() or not (here / f"{args.model}.py").is_file():
        raise data.UserError(f"There is no model file {args.model}.py beside sample.py.")
    module = importlib.import_module(args.model)
    if not (hasattr(module, "load") and hasattr(module, "sample")):
        raise data.UserError(f"{args.model}.py is not a model file: it has no load() and sample().")
    runs = sorted(Path("out", args.model).glob("**/ckpt.pt"), key=lambda p: p.stat().st_mtime)
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
    return {k: x for k, x in given.items() if x is not None}


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


def main(argv=None):
    args, rest = options(argv)
    try:
        if args.n < 1:
            raise data.UserError("--n must be 1 or more.")
        module, path = find(args)
        model = module.load(path, args.device, rest)
        folders = (Path("out", args.model, f"samples_{i:03d}") for i in range(1, 1000))
        out = Path(args.out) if args.out else next(p for p in folders if not p.exists())
        if out.exists() and any(out.iterdir()):
            raise data.UserError(f"{out} is not empty: choose another --out.")
        given, clock = conditions(args, model.cfg), time.time()
        video, audio = module.sample(model, args.n, seed=args.seed, **given)
        seconds = time.time() - clock
        out.mkdir(parents=True, exist_ok=True)
        said = ", ".join(f"{k} {getattr(args, k)}" for k in given)
        about = f"{path}, seed {args.seed}{', ' + said if said else ''}: {args.n} clips in {seconds:.1f} s"
        write(out, video, audio, model.cfg, f"{inspect.getdoc(module).splitlines()[0]}", about)
    except data.UserError as error:
        sys.exit(f"sample.py: {error}")
    print(f"{args.n} clips in {seconds:.1f} s: open {out}/index.html")


if __name__ == "__main__":
    main()
