"""Does a generated stream fit the one it was generated for?

    python tests/zero_shot.py --ckpt F --data toy:bounce

Takes n validation clips, generates the sound for each video (--to video: the video for each sound),
and prints the correlation of what is seen and heard, frame by frame, for matched pairs, for
mismatched ones (each sound with the next clip's video), and for the real clips: of motion and rise
in loudness, which impacts (bounce, collide) mark, and of the height of the shape and the pitch,
which glide ties together. Other options (--method, --guidance, --sampler) are the model's. Beside a
mean stands its standard error.
"""

import argparse
import importlib
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parent.parent))
import data  # noqa: E402
import metrics  # noqa: E402


def tracks(video, audio, rate):
    """Video uint8 (n, F, H, W, 3), audio (n, L) -> {pair: (seen (n, F), heard (n, F))}."""
    x = torch.as_tensor(video).float()
    frames = x.shape[1]
    change = x.diff(dim=1).abs().mean((2, 3, 4))  # (n, F - 1)
    motion = torch.cat([change[:, :1], change], 1)  # (n, F)

    # The shape is what has color: the grounds are gray, and a flash is of the whole frame.
    color = x.amax(-1) - x.amin(-1)  # (n, F, H, W)
    ground = color.flatten(2).median(2)[0][..., None, None]
    rows = (color - ground - 40).clamp(min=0).sum(3) + 1e-3  # (n, F, H)
    height = -(rows * torch.arange(rows.shape[2])).sum(2) / rows.sum(2)  # (n, F)

    mels = metrics.log_mel(torch.as_tensor(audio), rate)  # (n, 64, T)
    rise = F.pad(mels.diff(dim=2).clamp(min=0).mean(1), (1, 0))  # (n, T)
    pitch = mels.softmax(1).transpose(1, 2) @ torch.arange(64.0)  # (n, T)
    return {
        "motion, rise": (motion, F.adaptive_max_pool1d(rise, frames)),
        "height, pitch": (height, F.adaptive_avg_pool1d(pitch, frames)),
    }


def correlation(x, y):
    """Of the rows of x and y (n, F) -> (n,)."""
    x = x - x.mean(1, keepdim=True)
    y = y - y.mean(1, keepdim=True)
    size = ((x * x).sum(1) * (y * y).sum(1)).sqrt()
    return (x * y).sum(1) / size.clamp(min=1e-9)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ckpt", required=True)
    parser.add_argument("--model", default="mm_diffusion", help="the model file [mm_diffusion]")
    parser.add_argument("--data", default="toy:bounce")
    parser.add_argument("--to", choices=("audio", "video"), default="audio", help="[audio]")
    parser.add_argument("--n", type=int, default=64, help="pairs [64]")
    args, rest = parser.parse_known_args()
    module = importlib.import_module(args.model)
    model = module.load(args.ckpt, options=rest)
    cfg = model.cfg

    clips = data.open_dataset(args.data, "val", cfg.frames, cfg.size, cfg.fps, cfg.rate)
    real = [clips[i] for i in range(args.n)]
    video = np.stack([clip["video"] for clip in real])
    audio = np.stack([clip["audio"] for clip in real])
    began = time.time()
    if args.to == "audio":
        made = module.sample(model, args.n, video=video)
    else:
        made = module.sample(model, args.n, audio=audio)
    what = f"{args.n} clips of {args.data}, {args.to} generated, {' '.join(rest)}"
    print(f"{what}: {time.time() - began:.0f} s")

    truth = tracks(video, audio, cfg.rate)
    for name, (seen, heard) in tracks(*made, cfg.rate).items():
        rows = {
            "matched": correlation(seen, heard),
            "mismatched": correlation(seen, heard.roll(1, 0)),
            "real": correlation(*truth[name]),
        }
        for row, r in rows.items():
            print(f"{name:14} {row:11} {r.mean():6.3f} +- {r.std() / args.n**0.5:.3f}")


if __name__ == "__main__":
    try:
        main()
    except data.UserError as error:
        data.end("zero_shot.py", error)
