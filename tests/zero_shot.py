"""Does a generated stream fit the one it was generated for? python tests/zero_shot.py --ckpt F --data toy:bounce

Takes n validation clips, generates the sound for each video (--to video: the video for each sound), and prints the
correlation of what is seen and heard, frame by frame, for matched pairs, for mismatched ones (each sound with the next
clip's video), and for the real clips: of motion and rise in loudness, which impacts (bounce, collide) mark, and of the
height of the shape and the pitch, which glide ties together. Other options (--method, --guidance, --sampler) are the
model's. Beside a mean stands its standard error.
"""
import argparse
import importlib
import sys
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import data  # noqa: E402
import metrics  # noqa: E402


def tracks(video, audio, rate):
    """Video uint8 (n, F, H, W, 3), audio (n, L) -> {pair: (seen (n, F), heard (n, F))}."""
    x, frames = torch.as_tensor(video).float(), video.shape[1]
    change = x.diff(dim=1).abs().mean((2, 3, 4))                                 # (n, F - 1)
    color = x.amax(-1) - x.amin(-1)                                              # of the shape, not of gray grounds
    color = (color - color.flatten(2).median(2)[0][..., None, None] - 40).clamp(min=0).sum(3) + 1e-3   # (n, F, H)
    height = -(color * torch.arange(color.shape[2])).sum(2) / color.sum(2)
    mels = metrics.log_mel(torch.as_tensor(audio), rate)                         # (n, 64, T)
    rise = torch.nn.functional.pad(mels.diff(dim=2).clamp(min=0).mean(1), (1, 0))
    pitch = torch.nn.functional.adaptive_avg_pool1d(mels.softmax(1).transpose(1, 2) @ torch.arange(64.0), frames)
    return {"motion, rise": (torch.cat([change[:, :1], change], 1),
                             torch.nn.functional.adaptive_max_pool1d(rise, frames)),
            "height, pitch": (height, pitch)}


def correlation(x, y):  # of the rows of (n, F) each -> (n,)
    x, y = (z - z.mean(1, keepdim=True) for z in (x, y))
    return (x * y).sum(1) / ((x * x).sum(1) * (y * y).sum(1)).sqrt().clamp(min=1e-9)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ckpt", required=True)
    parser.add_argument("--model", default="mm_diffusion", help="the model file, without .py [mm_diffusion]")
    parser.add_argument("--data", default="toy:bounce")
    parser.add_argument("--to", choices=("audio", "video"), default="audio", help="what is generated [audio]")
    parser.add_argument("--n", type=int, default=64, help="pairs [64]")
    args, rest = parser.parse_known_args()
    module = importlib.import_module(args.model)
    model = module.load(args.ckpt, options=rest)
    cfg = model.cfg
    clips = data.open_dataset(args.data, "val", cfg.frames, cfg.size, cfg.fps, cfg.rate)
    real = {k: np.stack([clips[i][k] for i in range(args.n)]) for k in ("video", "audio")}
    given, clock = {"audio": "video", "video": "audio"}[args.to], time.time()
    made = dict(zip(("video", "audio"), module.sample(model, args.n, **{given: real[given]}), strict=True))
    print(f"{args.n} clips of {args.data}, {args.to} for {given}, {' '.join(rest)}: {time.time() - clock:.0f} s")
    for name, pair in tracks(**made, rate=cfg.rate).items():
        seen, heard = tracks(**real, rate=cfg.rate)[name]
        for what, r in (("matched", correlation(*pair)), ("mismatched", correlation(pair[0], pair[1].roll(1, 0))),
                        ("real", correlation(seen, heard))):
            print(f"{name:14} {what:11} {r.mean():6.3f} +- {r.std() / args.n ** 0.5:.3f}")


if __name__ == "__main__":
    try:
        main()
    except data.UserError as error:
        sys.exit(f"zero_shot.py: {error}")
