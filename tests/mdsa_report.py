"""Reconstruction by a trained MDSA, and how much its planes tell of one another.

    python tests/mdsa_report.py out/proav_dit/toy/mdsa/ckpt.pt --n 64

As Tables 5 to 7 of the paper. Prints PSNR of the video (V), of the mel images (A) and of the mel
images after Griffin-Lim, beside the baselines; rFVD and rFAD on built-in features; and the mutual
information of the planes of each stream, in nats, beside that of planes of mismatched clips. The
estimator of Table 7 is not stated; ours is that of Kraskov, k = 3.
"""
import argparse
import dataclasses
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import data  # noqa: E402
import metrics  # noqa: E402
import proav_dit as pa  # noqa: E402

# Two planes, and what to average of each so that the axis they share is left: w, h, t.
PAIRS = (("hw", "tw", 1, 1), ("hw", "th", 2, 1), ("tw", "th", 2, 2))


def mutual_information(z, estimate):
    """One stream's planes (B, rows, columns, C) -> {pair: (nats, nats of mismatched clips)}.

    Averaged onto the axis that two planes share, channel by channel; then over channels.
    """
    table = {}
    for one, two, axis_one, axis_two in PAIRS:
        x = z[one].mean(axis_one)  # (B, n, C)
        y = z[two].mean(axis_two)
        row = []
        for other in (y, y.roll(1, 0)):
            nats = []
            for c in range(x.shape[2]):
                nats.append(float(estimate(x[..., c].flatten(), other[..., c].flatten())))
            row.append(sum(nats) / len(nats))
        table[f"{one}-{two}"] = tuple(row)
    return table


def load(path, n):
    """The MDSA in a checkpoint of either stage, to be examined on n clips."""
    state = data.load_checkpoint(path)
    weights = pa.mdsa_of(state)
    if not weights:
        raise data.UserError(f"{path} holds no MDSA: give a checkpoint of proav_dit.py.")
    cfg = data.read_config(pa.Config, state, path)
    mdsa = pa.MDSA(dataclasses.replace(cfg, need_good=False, val_clips=n))
    data.load_weights(mdsa, weights, path)
    return mdsa.eval()


@torch.no_grad()
def rebuild(mdsa, batches):
    """-> real and rebuilt clips, lists of dicts; the latents of each batch; PSNR after the phases.

    The PSNR (n,) is of mel images of what Griffin-Lim makes of the rebuilt ones.
    """
    real = []
    fake = []
    latents = []
    heard = []
    for batch in batches:
        x = mdsa.inputs(data.to_device(batch, "cpu"))
        out, z, _ = mdsa(x)
        latents.append(z)
        streams = {}
        streams["video"], streams["audio"] = pa.as_clips(mdsa, out)
        if streams["audio"] is not None:
            images = mdsa.mel(streams["audio"][:, None])
            heard += [pa.psnr(y[None], a[None]) for y, a in zip(images, x["a"], strict=True)]
        for i in range(len(batch["key"])):
            made = {name: y for name, y in streams.items() if y is not None}
            real.append({name: batch[name][i].numpy() for name in made})
            fake.append({name: y[i].numpy() for name, y in made.items()})
    return real, fake, latents, heard


def report(path, n):
    mdsa = load(path, n)
    cfg = mdsa.cfg
    val = data.open_dataset(cfg.data, "val", cfg.frames, cfg.size, cfg.fps, cfg.rate, cfg.seed)
    pa.examine(mdsa, val, "cpu")
    real, fake, latents, heard = rebuild(mdsa, data.val_batches(val, n, 16))
    if heard:
        print(f"PSNR-A after Griffin-Lim: {sum(heard) / len(heard):.1f} dB")

    extract = {kind: metrics.extractor("builtin", kind)[0] for kind in fake[0]}
    seen = [metrics.observe(clips, extract, cfg.fps, cfg.rate) for clips in (real, fake)]
    table = metrics.compare(*seen, dict.fromkeys(extract, "builtin"), cfg.fps)
    for name, row in table.items():
        if name.startswith(("fvd", "kvd", "fad", "fd_joint")):
            print(f"r{name}: {row[0]:.4g} (halves of the real clips: {row[1]:.4g})")

    for m in latents[0]:
        planes = {k: torch.cat([z[m][k] for z in latents]) for k in pa.PLANES}
        for pair, (nats, floor) in mutual_information(planes, metrics.mi_ksg).items():
            print(f"mutual information {m} {pair}: {nats:.3f} nats (mismatched clips: {floor:.3f})")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("ckpt")
    parser.add_argument("--n", type=int, default=64, help="validation clips [64]")
    args = parser.parse_args()
    try:
        report(args.ckpt, args.n)
    except data.UserError as error:
        sys.exit(f"mdsa_report.py: {error}")


if __name__ == "__main__":
    main()
