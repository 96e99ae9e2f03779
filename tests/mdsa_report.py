"""Reconstruction by a trained MDSA, and how much its planes tell of one another (Tables 5 to 7 of the paper).

    python tests/mdsa_report.py out/proav_dit/toy/mdsa/ckpt.pt --n 64

Prints PSNR of the video (V), of the mel images (A) and of the mel images after Griffin-Lim, beside the baselines; with
metrics.py at hand also rFVD and rFAD (built-in features), and the mutual information of the planes of each stream, in
nats, beside that of planes of mismatched clips. The estimator of Table 7 is not stated; ours is that of Kraskov, k = 3.
"""
import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import data  # noqa: E402
import proav_dit as pa  # noqa: E402

SHARED = {("hw", "tw"): (1, 1), ("hw", "th"): (2, 1), ("tw", "th"): (2, 2)}      # axes to average: w, h, t are left


def mutual_information(z, estimate):
    """{pair: (nats, nats of mismatched clips)} of one stream's planes (B, rows, columns, C), averaged onto the axis
    that they share, channel by channel."""
    out = {}
    for (one, two), axes in SHARED.items():
        x, y = z[one].mean(axes[0]), z[two].mean(axes[1])                        # (B, n, C) each
        pairs = [(x, y), (x, y.roll(1, 0))]
        out[f"{one}-{two}"] = [sum(estimate(a[..., c].flatten(), b[..., c].flatten()) for c in range(a.shape[2]))
                               / a.shape[2] for a, b in pairs]
    return out


@torch.no_grad()
def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ckpt")
    parser.add_argument("--n", type=int, default=64, help="validation clips [64]")
    args = parser.parse_args()
    state = pa.read_checkpoint(args.ckpt)
    if not any(k.startswith("mdsa.") for k in state.get("ema", {})):
        sys.exit(f"{args.ckpt} holds no MDSA: give the checkpoint of a run of proav_dit.py.")
    cfg = pa.Config(**{**state["cfg"], "need_good": False, "val_clips": args.n})
    model = pa.Autoencoding(cfg)
    model.load_state_dict({k: p for k, p in state["ema"].items() if k in model.state_dict()}, strict=False)
    val = data.open_dataset(cfg.data, "val", cfg.frames, cfg.size, cfg.fps, cfg.rate, cfg.seed)
    pa.examine(model, val, "cpu")
    real, fake, z, heard = [], [], [], []
    for batch in data.val_batches(val, args.n, 16):
        x = data.to_device(batch, "cpu")
        x = model.streams(x["video"], x["audio"])
        out, code, _ = model.mdsa(x)
        wave = model.mel.inverse(out["a"]).clamp(-1, 1) if "a" in out else None
        if wave is not None:
            heard.append(float(pa.psnr(model.mel(wave[:, None]), x["a"])))
        z.append(code)
        video = data.to_uint8(out["v"]) if "v" in out else None
        for i in range(len(batch["key"])):
            real.append({k: batch[n][i].numpy() for k, n in (("video", "video"), ("audio", "audio"))})
            fake.append({k: y[i].numpy() for k, y in (("video", video), ("audio", wave)) if y is not None})
    if heard:
        print(f"PSNR-A after Griffin-Lim: {sum(heard) / len(heard):.1f} dB")
    try:
        import metrics
    except ImportError:
        sys.exit("There is no metrics.py here: no rFVD, rFAD and mutual information.")
    extract = {k: metrics.extractor("builtin", k)[0] for k in fake[0]}
    seen = [metrics.observe(clips, extract, cfg.fps, cfg.rate) for clips in (real, fake)]
    for name, row in metrics.compare(*seen, dict.fromkeys(extract, "builtin"), cfg.fps).items():
        if name[:3] in ("fvd", "kvd", "fad") or name == "fd_joint_builtin":
            print(f"r{name}: {row[0]:.4g} (halves of the real clips: {row[1]:.4g})")
    for m in z[0]:
        planes = {k: torch.cat([code[m][k] for code in z]) for k in pa.PLANES}
        for pair, (nats, floor) in mutual_information(planes, metrics.mi_ksg).items():
            print(f"mutual information {m} {pair}: {nats:.3f} nats (mismatched clips: {floor:.3f})")


if __name__ == "__main__":
    main()
