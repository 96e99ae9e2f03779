"""Figures computed with the authors' own code.

The tests are written over files, not over one configuration: they take every tests/golden/*.pt, or
every file of the folder that the environment variable GOLDEN_DIR names.
"""

import dataclasses
import json
import math
import os
import re
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from test_data import write_safetensors

import data
import metrics
import mm_diffusion as mm
import proav_dit as pa
import syncflow as sf
import uniform_dit as ud

GOLDEN = Path(os.environ.get("GOLDEN_DIR", Path(__file__).parent / "golden"))


def files(prefix, without=()):
    """The golden files whose name starts with prefix, as pytest parameters."""
    found = [
        p for p in sorted(GOLDEN.glob(prefix + "*.pt")) if not any(w in p.name for w in without)
    ]
    return pytest.mark.parametrize("path", found, ids=lambda p: p.stem)


def load(path):
    return torch.load(path, weights_only=True)


def from_recipe(module, seed):
    """Fill a module's parameters by the written recipe of the golden files."""
    state = {}
    for key, p in module.state_dict().items():
        z = np.random.RandomState((zlib.crc32(key.encode()) + seed) % 2**32).standard_normal(
            tuple(p.shape)
        )
        z = torch.from_numpy(z.astype(np.float32))
        if p.dim() >= 2:
            z = z / math.sqrt(math.prod(p.shape[1:]))
        else:
            z = 1 + 0.1 * z if key.endswith(".weight") else 0.1 * z
        state[key] = z
    module.load_state_dict(state)
    return module


def numbers(text):
    return tuple(int(x) for x in str(text).split(",") if int(x) > 0)


def unet_of(d):
    """The coupled U-Net that a golden file's config describes, with its weights."""
    c = d["config"]
    cfg = mm.Config(
        frames=c["video_size"][0],
        size=c["video_size"][2],
        width=c["num_channels"],
        mult=numbers(c["channel_mult"]),
        res_blocks=c["num_res_blocks"],
        heads=c["num_heads"],
        cross_head_dim=c["num_head_channels"],
        video_attention=numbers(c["video_attention_resolutions"]),
        cross_attention=numbers(c["cross_attention_resolutions"]),
        windows=numbers(c["cross_attention_windows"]),
        random_shift=c["cross_attention_shift"],
        film=c["use_scale_shift_norm"],
        dropout=c["dropout"],
    )
    net = from_recipe(mm.CoupledUNet(cfg), d["seed"])
    if "shapes" in d:
        assert {k: list(p.shape) for k, p in net.state_dict().items()} == {
            k: list(s) for k, s in d["shapes"].items()
        }
    if "state_dict" in d:
        assert list(d["state_dict"]) == list(net.state_dict())
        net.load_state_dict(d["state_dict"])
    assert sum(p.numel() for p in net.parameters()) == d["n_params"]
    return net


def close(ours, theirs, tol=1e-4):
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() <= tol * max(1, theirs.abs().max().item())


@files("mm_unet", without=("grad", "shift"))
def test_unet(path):
    d = load(path)
    net = unet_of(d)
    stats = {}
    for group in ("input_blocks", "middle_blocks", "output_blocks"):
        for name, block in net.named_modules():
            if name.startswith(group) and name.count(".") == (1 if group == "middle_blocks" else 2):
                block.register_forward_hook(lambda m, i, o, name=name: stats.update({name: o}))
    with torch.no_grad():
        v, a = net(d["video"], d["audio"], d["timesteps"])
        for name, (mv, sv, ma, sa) in d["block_stats_mean_std_video_audio"].items():
            bv, ba = stats[name]
            ours = torch.stack([bv.mean(), bv.std(), ba.mean(), ba.std()])
            close(ours, torch.tensor([mv, sv, ma, sa]))
        close(v, d["video_out"]), close(a, d["audio_out"])
        v, a = net(d["video"], d["audio"], d["timesteps_float"])
        close(v, d["video_out_float"]), close(a, d["audio_out_float"])


@files("mm_unet", without=("grad", "recipe.", "noss", "tiny."))
def test_unet_shift(path):
    d = load(path)
    shifts = torch.tensor([R for _, _, R in d["shifts_block_window_shift"]])
    net = unet_of(d)
    assert len(net.draw_shifts()) == len(shifts)
    with torch.no_grad():
        v, a = net(d["video"], d["audio"], d["timesteps"], shifts)
        unshifted = net(d["video"], d["audio"], d["timesteps"], torch.zeros_like(shifts))
    close(v, d["video_out"]), close(a, d["audio_out"])
    assert (unshifted[0] - v).abs().max() > 1e-3


@files("mm_unet", without=("shift", "recipe.", "noss", "tiny."))
def test_unet_grad(path):
    d = load(path)
    net = unet_of(d)
    v, a = net(d["video"], d["audio"], d["timesteps"])
    loss = (v**2).mean() + (a**2).mean()
    assert loss.item() == pytest.approx(d["loss"], rel=1e-4)
    loss.backward()
    for name, p in net.named_parameters():
        assert p.grad.norm().item() == pytest.approx(d["grad_norm"][name], rel=1e-4, abs=1e-6), name
        # The terms of the sum cancel: its error is measured against the sum of their sizes.
        error = abs(p.grad.double().sum().item() - d["grad_sum"][name])
        assert error <= 1e-4 * p.grad.abs().sum().item() + 1e-6, name


@files("sr_unet")
def test_sr_unet(path):
    d = load(path)
    c = d["config"]
    net = from_recipe(
        mm.SRUNet(
            mm.Config(
                width=c["model_channels"],
                mult=tuple(c["channel_mult"]),
                dropout=0.0,
                res_blocks=c["num_res_blocks"],
                heads=c["num_heads"],
                video_attention=tuple(c["attention_resolutions"]),
            )
        ),
        d["seed"],
    )
    if "shapes" in d:
        assert {k: list(p.shape) for k, p in net.state_dict().items()} == {
            k: list(s) for k, s in d["shapes"].items()
        }
    if "state_dict" in d:
        assert list(d["state_dict"]) == list(net.state_dict())
        net.load_state_dict(d["state_dict"])
    assert sum(p.numel() for p in net.parameters()) == d["n_params"]
    out = net(d["x"], d["low_res"], d["timesteps"])
    close(out, d["out"])
    loss = (out**2).mean()
    assert loss.item() == pytest.approx(d["loss"], rel=1e-4)
    loss.backward()
    for name, p in net.named_parameters():
        assert p.grad.norm().item() == pytest.approx(d["grad_norm"][name], rel=1e-4, abs=1e-6), name


def test_paper_names_and_shapes():
    keys = json.loads(
        (Path(__file__).parent / "golden" / "mm_diffusion_paper_keys.json").read_text()
    )
    with torch.device("meta"):
        net = mm.CoupledUNet(mm.parse(["--preset", "paper"]))
        wide = mm.CoupledUNet(mm.parse(["--preset", "audioset"]))
        sr = mm.SRUNet(mm.sr_config(mm.parse(["--preset", "paper"])))
    assert list(keys["mm_diffusion"].items()) == [
        (k, list(p.shape)) for k, p in net.state_dict().items()
    ]
    assert list(keys["sr"].items()) == [(k, list(p.shape)) for k, p in sr.state_dict().items()]
    assert sum(p.numel() for p in net.parameters()) == 133_675_524
    assert sum(p.numel() for p in wide.parameters()) == 534_017_028
    assert sum(p.numel() for p in sr.parameters()) == 311_027_910


def analytic_eps(d):
    """The exact noise predictor for Gaussian data N(mu, s^2) under the linear schedule."""
    abar = mm.Diffusion(mm.Config()).abar

    def eps(x, t):
        level = float(abar[int(t)])
        out = {}
        for k, name in mm.NAMES.items():
            mu = d["params"][name]["mu"]
            s = d["params"][name]["s"]
            noise = x[k] - level**0.5 * mu
            out[k] = (1 - level) ** 0.5 * noise / (level * s * s + 1 - level)
        return out

    return eps, abar, {k: d["x_T"][name] for k, name in mm.NAMES.items()}


class OldSolver(mm.DPMSolver):
    """What the released solver has beside ours: other nodes, thresholds, and steps of its choice.

    threshold: None, or "dynamic" (Imagen): x_0 to the 99.5 % quantile of its absolute values where
    that is above 1, then divided by it.
    """

    threshold = None

    def limit(self, x0):
        if self.threshold is None:
            return x0
        out = {}
        for k, y in x0.items():
            limit = torch.quantile(y.flatten(1).abs().float(), 0.995, dim=1).clamp(min=1)
            limit = mm.broadcast(limit, y)
            out[k] = y.clamp(-limit, limit) / limit
        return out

    def time_nodes(self, steps):
        """Evenly spaced in time."""
        return [self.from_time(t) for t in np.linspace(1, 1 / self.T, steps + 1)]

    def adaptive2(self, x, h=0.05, absolute=0.0078, relative=0.05, safety=0.9):
        """Order 2, order 1 as its error estimate; the worst sample and stream set the step."""
        s = self.first
        before = x
        m = None
        while self.to_time(s) - 1 / self.T > 1e-5:
            m = m or self.estimate(x, s)
            t = s + h
            lower = self.order1(x, m, s, t)
            higher = self.order2(x, m, s, t)
            error = 1e-12
            for k in x:
                allowed = torch.maximum(lower[k].abs(), before[k].abs()) * relative
                excess = (higher[k] - lower[k]) / allowed.clamp(min=absolute)
                error = max(error, float(excess.square().flatten(1).mean(1).sqrt().max()))
            if error <= 1:
                x = higher
                s = t
                before = lower
                m = None
            h = min(safety * h * error**-0.5, self.last - s)
        return x


class ReleasedSolver(OldSolver):
    """The released solver's slip: its first-order step for audio mixes the two forms' coefficients.

    Its adaptive solver uses that step as the error estimate (and takes 482 network calls where the
    one above takes 30).
    """

    def order1(self, x, m, s, t):
        out = super().order1(x, m, s, t)
        if not self.predict_x0:
            A = self.sigma(t) / self.sigma(s)
            B = self.alpha(t) * math.expm1(t - s)
            out["a"] = A * x["a"] - B * m["a"]
        return out

    def order2(self, x, m, s, t, r=0.5, m1=None):
        middle = s + r * (t - s)
        m1 = self.estimate(super().order1(x, m, s, middle), middle)
        return super().order2(x, m, s, t, r, m1)


@files("dpm_solver")
def test_dpm_solver(path):
    d = load(path)
    eps, abar, x = analytic_eps(d)
    for name, case in d["cases"].items():
        if "BUGGY" in name:
            continue
        s = case["settings"]
        kind = ReleasedSolver if s["method"] == "adaptive" else OldSolver
        solver = kind(eps, abar, s.get("predict_x0", False))
        solver.threshold = "dynamic" if s.get("thresholding") else None
        by_time = s["skip_type"] == "time_uniform"
        nodes = solver.time_nodes(s["steps"]) if by_time else solver.nodes(s["steps"])
        if s["method"] == "multistep":
            out = solver.multistep(x, nodes)
        elif s["method"] == "singlestep":
            out = solver.singlestep3(x, nodes)
        else:
            out = solver.adaptive2(x)
        # The first error estimate of the ++ run is 3e-5, the size of float32's rounding: its step
        # sizes, and so its result (0.46 away from the exact solution), carry that noise on.
        tol = 5e-3 if s.get("thresholding") else 1e-4
        for k, stream in mm.NAMES.items():
            close(out[k], case[stream], tol)

    # Without the slip the adaptive solver keeps its promise (tolerance 0.05) in far fewer calls.
    calls = []

    def counted(x, t):
        calls.append(t)
        return eps(x, t)

    out = OldSolver(counted, abar, predict_x0=False).adaptive2(x)
    assert (out["v"] - d["exact_ode"]["video"]).abs().max() < 0.05 and len(calls) < 100
    # One clip is as good as two.
    solver = mm.DPMSolver(eps, abar)
    one = solver.multistep({k: v[:1] for k, v in x.items()}, solver.nodes(20))
    both = solver.multistep(x, solver.nodes(20))
    close(one["v"], both["v"][:1], 1e-6)


def recipe_noise(name, shape):
    z = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(tuple(shape))
    return torch.from_numpy(z.astype(np.float32))


def step_noise():
    """The normal draws of a golden run, in order, for states."""
    calls = iter(range(10**6))

    def normal(x):
        return {k: recipe_noise(f"step.{next(calls)}.{y.dim()}", y.shape) for k, y in x.items()}

    return normal


def coupled_eps(x, t):
    """The analytic network of the samplers' golden file: both modalities enter both outputs."""
    v = x["v"]
    a = x["a"]
    frames = v.shape[1]
    n = a.shape[-1] // frames
    mean_a = a.flatten(1).mean(1)
    mean_v = v.flatten(1).mean(1)
    eps_v = 0.9 * v + 0.2 * mean_a.view(-1, 1, 1, 1, 1) + 0.001 * t
    eps_v = eps_v + 0.05 * a[:, 0, :frames].view(-1, frames, 1, 1, 1)
    eps_a = 0.8 * a + 0.3 * mean_v.sin().view(-1, 1, 1) - 0.001 * t
    eps_a = eps_a + 0.1 * v.flatten(2).mean(2).repeat_interleave(n, 1)[:, None]
    return {"v": eps_v, "a": eps_a}


def sampler_file(path):
    d = load(path)
    process = mm.Diffusion(mm.Config(diffusion_steps=int(d["T"])))
    return d, process, {k: d["x_T"][name] for k, name in mm.NAMES.items()}


@files("samplers_zero_shot")
def test_ddpm_and_ddim(path):
    """Cases named ddpm, ddimN (steps, of T) and ddimN_of_M (of M)."""
    d, process, x = sampler_file(path)
    for name, ours in (("betas", process.betas), ("alphas_cumprod", process.abar)):
        theirs = d[f"{name}_T{d['T']}"]
        close(ours, torch.tensor(theirs, dtype=torch.float64), 1e-12)
    seen = 0
    for name, case in d["cases"].items():
        found = re.fullmatch(r"(ddpm|ddim)(\d*)(?:_of_(\d+))?", name)
        if not found:
            continue
        kind, steps, T = found.groups()
        one = mm.Diffusion(mm.Config(diffusion_steps=int(T))) if T else process
        step = mm.ddpm_step if kind == "ddpm" else mm.ddim_step
        out = mm.denoise(step, coupled_eps, x, one.path(int(steps or one.T)), step_noise())
        close(out["v"], case["video"]), close(out["a"], case["audio"])
        seen += 1
    assert seen >= 2


@files("samplers_zero_shot")
def test_zero_shot_as_released(path):
    """The released code's conditional sampling; it guides by the batch's mean, we by a clip's."""
    d, process, x = sampler_file(path)
    seen = set()
    for case in d["cases"].values():
        if "condition" not in case:
            continue
        name = case["condition"]
        k = name[0]
        guidance = case["class_scale"] * (2**20 if case["use_fp16"] else 1) / len(x[k])
        given = {**x, k: d["cond"][name]}
        known = {
            stream: torch.full_like(y, stream == k, dtype=torch.bool) for stream, y in x.items()
        }
        walk = (mm.ddpm_step, coupled_eps, x, process.path(process.T), step_noise())
        out = mm.guide_as_released(*walk, given, known, guidance)
        if guidance:  # it hands back the condition as that went into the last step
            out[k] = mm.diffuse(given, float(process.abar[0]), x)[k]
        close(out["v"], case["video"]), close(out["a"], case["audio"])
        seen.add((name, guidance > 0))
    assert len(seen) == 4  # both directions, replacement and guidance


@files("mm_unet", without=("shift", "recipe.", "noss", "tiny."))
def test_training_loss(path, monkeypatch):
    d = load(path)
    net = unet_of(d)
    noise = {"v": d["train_noise_video"], "a": d["train_noise_audio"]}
    monkeypatch.setattr(mm, "clip_noise", lambda keys, x: (torch.zeros(2), noise))
    batch = {"video": d["train_x0_video"], "audio": d["train_x0_audio"], "step": 0}
    batch["key"] = torch.zeros(2)
    t = (d["timesteps"] + 0.5) / 1000
    loss, parts = mm.Diffusion(mm.Config(random_shift=False)).loss(net, batch, t)
    assert loss.item() == pytest.approx(d["train_terms"]["loss"].mean().item(), rel=1e-4)
    assert parts["video"].item() == pytest.approx(
        d["train_terms"]["mse_video"].mean().item(), rel=1e-4
    )
    assert parts["audio"].item() == pytest.approx(
        d["train_terms"]["mse_audio"].mean().item(), rel=1e-4
    )


def named(case, pattern):
    """Entries of a case whose name matches -> [(what the pattern's group found, value)]."""
    found = []
    for name, value in case.items():
        match = re.fullmatch(pattern, name)
        if match:
            found.append((match[1], value))
    return found


@files("metrics_fixtures")
def test_metrics(path):
    d = load(path)
    checks = {
        "frechet_mmd": check_frechet_and_mmd,
        "inception": check_inception,
        "kl": check_kl,
        "mi": check_information,
        "psnr": check_psnr,
    }
    for name, check in checks.items():
        if name in d:
            check(d[name])
    if c := d.get("mmd_blocks"):
        case = d["frechet_mmd"][c["case"]]
        mean, std, values = metrics.mmd_blocks(case["x"], case["y"], c["block"])
        assert [mean, std, *values] == pytest.approx([c["mean"], c["std"], *c["values"]], rel=1e-6)
    if c := d.get("sisdr"):
        close(metrics.si_sdr(c["est"], c["ref"]), torch.tensor(c["per_item"]).double(), 1e-6)
    if c := d.get("cosine"):
        assert metrics.cosine_score(c["a"], c["b"])[0] == pytest.approx(c["mean"], abs=1e-6)


def check_frechet_and_mmd(cases):
    for case in cases.values():
        x = case["x"]
        y = case["y"]
        want = max(0, case["fd"])
        assert metrics.frechet(x, y) == pytest.approx(want, rel=1e-6, abs=1e-9)
        # Sums over batches; where n < D the root of a rank-deficient covariance loses digits.
        a = sum(metrics.moments(part) for part in x.split(7))
        b = sum(metrics.moments(part) for part in y.split(7))
        assert metrics.frechet_of_moments(a, b) == pytest.approx(want, rel=1e-6, abs=1e-5)
        assert metrics.mmd(x, y) == pytest.approx(case["mmd2"], rel=1e-6)


def check_inception(c):
    assert metrics.inception_score(c["logits"])[0] == pytest.approx(c["is_exact"], rel=1e-6)
    for digits, want in named(c, r"is_.*_eps1e(\d+)"):
        eps = 10.0 ** -int(digits)
        assert metrics.inception_score(c["logits"], eps=eps)[0] == pytest.approx(want, rel=1e-6)
    for splits, want in named(c, r"is_(\d+)_splits"):
        mean, std, values = metrics.inception_score(c["logits"], int(splits))
        assert values == pytest.approx(want, rel=1e-6)
        both = [c[f"is_{splits}_splits_mean"], c[f"is_{splits}_splits_std"]]
        assert [mean, std] == pytest.approx(both, rel=1e-6)


def check_kl(c):
    real = c["logits_ref"]
    fake = c["logits_gen"]
    assert metrics.paired_kl(real, fake) == pytest.approx(c["kl_ref_gen"], rel=1e-6)
    assert metrics.paired_kl(fake, real) == pytest.approx(c["kl_gen_ref"], rel=1e-6)
    for variant, want in named(c, r"kl_(softmax_eps|sigmoid_eps)1e6"):
        assert metrics.paired_kl(real, fake, variant) == pytest.approx(want, rel=1e-6)


def check_information(c):
    """The figures have no shrinkage."""
    estimate = metrics.mi_gaussian(c["x"], c["y"], shrinkage=0)
    assert estimate == pytest.approx(c["gaussian_estimate"], rel=1e-6)
    for bins, want in named(c, r"hist(\d+)_estimate"):
        assert metrics.mi_histogram(c["x"], c["y"], int(bins)) == pytest.approx(want, rel=1e-6)
    assert metrics.mi_ksg(c["x"], c["y"]) == pytest.approx(c["analytic"], abs=0.03)
    multi = metrics.mi_gaussian(c["x_multi"], c["y_multi"], shrinkage=0)
    assert multi == pytest.approx(c["gaussian_multi"], rel=1e-6)


def check_psnr(c):
    each = torch.tensor(c["per_item"]).double()
    close(metrics.psnr(c["x"], c["y"], c["data_range"]), each, 1e-6)
    whole = metrics.psnr(c["x"][None], c["y"][None], c["data_range"])[0].item()
    assert whole == pytest.approx(c["of_mean_mse"], rel=1e-6)


@files("av_align_fixtures")
def test_av_align(path):
    d = load(path)
    for c in d.get("peak_lists", ()):
        args = (c["audio_peaks"], c["video_peaks"], c["fps"])
        iou = metrics.av_align_iou(*args)
        assert iou == pytest.approx(c["tempotokens_iou"], nan_ok=True), c["name"]
        for window, want in named(c, r"proav_avg_win(\d+)"):
            assert metrics.av_align_mean(*args, int(window)) == pytest.approx(want), c["name"]
    for c in d.get("local_max", ()):
        assert metrics.peak_times(c["traj"], c["fps"]) == c["peaks"]
    for c in d.get("onsets", ()):
        strength = metrics.onset_envelope(c["wav"][None], c["sr"], c["hop"], c["n_fft"])[0]
        close(strength, c["envelope"].double(), 2e-5)
        assert metrics.onset_frames(strength, c["sr"], c["hop"]) == c["onset_frames"], c["name"]
        times = metrics.onset_times(c["wav"], c["sr"])
        assert times == pytest.approx(c["resampled22050_onset_times"]), c["name"]
    for c in d.get("flow", ()):
        flow = metrics.optical_flow(c["frames_gray"][None].float())[0]  # (F - 1, 2, H, W)
        speed = flow.norm(dim=1).mean((1, 2))
        theirs = torch.tensor(c["mean_flow_magnitude"])
        assert ((speed - theirs).abs() <= 0.01 + 0.02 * theirs).all(), c["name"]
        assert (flow[0].permute(1, 2, 0) - c["first_flow"]).norm(dim=-1).mean() <= 0.005
        peaks = metrics.peak_times([speed[0], *speed], 1)
        assert peaks == c["video_peak_frames"], c["name"]


# ---- proav_dit.py

PVDM_PLANES = {"xy": "hw", "yt": "tw", "xt": "th"}


class PVDMProjection(pa.Projection):
    """As PVDM's code: its own token starts anywhere, and the first of the others is read."""

    def forward(self, x):
        x = torch.cat([x, self.token.expand(len(x), 1, -1)], 1) + self.table
        for layer in self.layers:
            x = self.run(layer, x)
        return x[:, 0]


def pvdm_line(n, dim):
    """As PVDM's code: the two channels of a pair have different frequencies: no rotation."""
    angles = torch.arange(n)[:, None] * 10000 ** (-torch.arange(0, dim, 2) / dim)
    angles = torch.cat([angles, angles], -1)  # (n, dim)
    signs = torch.tensor([-1.0, 1.0]).repeat(dim // 2)
    return torch.stack([angles.cos(), angles.sin() * signs])[:, :, None]


class PVDMStream(pa.Stream):
    def __init__(self, cfg, channels, patch):
        super().__init__(cfg, channels, patch)
        for former in (self.encoder, self.decoder):
            former.time = pvdm_line(cfg.frames, cfg.head_dim)
        lengths = {k: len(module.table) - 1 for k, module in self.project.items()}
        for k, n in lengths.items():
            self.project[k] = PVDMProjection(n, cfg)


def pvdm_state(d, stream):
    """PVDM's weights under our names.

    Ours has linear layers for its 1x1 convolutions, and mean and log-variance for its latent.
    """
    state = stream.state_dict()
    c = d["config"]
    for key, w in d["state_dict"].items():
        if key == "coords" or "rot_emb" in key:
            continue
        for theirs, ours in PVDM_PLANES.items():
            for a, b in (
                ("{}_quant_attn", "project.{}"),
                ("{}_token", "project.{}.token"),
                ("pre_{}", "pre.{}"),
                ("{}_pos_embedding", "project.{}.table"),
                ("post_{}", "post.{}"),
            ):
                key = key.replace(a.format(theirs), b.format(ours))
        key = key.replace("encoder.to_patch_embedding", "to_patch").replace("to_out.0", "to_out")
        key = key.replace("net.0", "0").replace("net.3", "2").replace("to_pixel.1", "to_pixel")
        if key == "to_pixel.weight":
            w = w.permute(2, 3, 1, 0).flatten(0, 2)  # (p * p * 3, D), channels fastest
        elif key == "to_pixel.bias":
            w = w.repeat(c["patch"] ** 2)
        elif key.startswith("pre."):
            w = w.flatten(1) if w.dim() > 1 else w
            w = torch.cat([w, torch.zeros_like(w)])
        else:
            w = w.reshape(state[key].shape)
        assert state[key].shape == w.shape
        state[key] = w
    return state


@files("pvdm_projection")
def test_pvdm(path):
    d = load(path)
    c = d["config"]
    cfg = pa.Config(
        frames=c["T"],
        size=c["res"],
        patch=c["patch"],
        width=c["channels"],
        depth=c["depth"],
        decoder_depth=c["depth"],
        heads=c["heads"],
        head_dim=c["dim_head"],
        ff_mult=c["ff_mult"],
        plane_channels=c["embed_dim"],
        proj_depth=c["proj_depth"],
        proj_heads=c["proj_heads"],
        proj_mlp=c["proj_mlp"],
    )
    stream = PVDMStream(cfg, 3, (cfg.patch, cfg.patch))
    stream.load_state_dict(pvdm_state(d, stream))
    x = d["x"].transpose(1, 2)  # (B, F, 3, H, W)
    # The file in tests/golden is cut down to one of the three projections, which are alike.
    whole = {}
    for theirs, ours in PVDM_PLANES.items():
        if f"{theirs}_token" in d["state_dict"]:
            whole[theirs] = ours
    with torch.no_grad():
        u = stream.encoder(stream.to_patch(stream.patches(x)))
        close(u.flatten(1, 3), d["enc_tokens"])
        planes = stream.planes(x)
        for theirs, ours in whole.items():
            close(planes[ours].flatten(0, 2), d[f"proj_first_token_{theirs}"])
            mean = stream.pre[ours](planes[ours]).chunk(2, -1)[0]
            close(torch.tanh(mean).permute(0, 3, 1, 2), d[f"z_{theirs}"])
        z = {ours: d[f"z_{theirs}"].permute(0, 2, 3, 1) for theirs, ours in PVDM_PLANES.items()}
        Z = stream.expand(z)
        close(Z.permute(0, 4, 1, 2, 3), d["dec_in"])
        close(stream.decoder(Z).flatten(1, 3), d["dec_tokens"])
        close(2 * torch.sigmoid(stream.render(Z)).flatten(0, 1) - 1, d["recon"])


@files("rfm_reflect")
def test_reflection(path):
    d = load(path)
    folded = pa.reflect(d["points"])
    walls = ((d["points"] + 1) / 2).floor().abs()  # that were hit
    near = d["points"].abs() < 1000
    close(folded[near], d["reflected"][near])
    close(folded, d["reflected"], 1e-3)
    assert torch.equal(walls[near], d["n_reflections"][near].to(walls))

    def velocity(t, x):
        v = d["amp"] * torch.cos(d["freq"] * t + d["phase"]) + d["sin_gain"] * torch.sin(
            d["sin_freq"] * x
        )
        return v + d["flip_gain"] * x.flip(1)

    steps = len(d["ts"]) - 1
    close(pa.euler(velocity, d["x0"], steps), d["traj"][-1])
    folds = []
    x = d["x0"]
    for i in range(steps):
        y = x + velocity(i / steps, x) / steps
        x = pa.reflect(y)
        close(x, d["traj"][i + 1])
        folds.append((y.abs() > 1).sum())
    assert sum(folds) == d["n_clipped_events"]


def test_proav_paper_sizes():
    with torch.device("meta"):
        model = pa.ProAV(pa.parse(["--preset", "paper"]))
    # As in Open-Sora, with 4 output channels and an embedding for each plane. Paper: 702 M.
    assert pa.count(model.dit) == 697_495_696
    # Two PVDM autoencoders (124.1 M) and the attention that links them.
    assert pa.count(model.mdsa) == 141_131_768


# ---- uniform_dit.py; syncflow.py has its blocks and, as its video tower, the whole network


@files("stdit3_block")
def test_stdit3_block(path):
    d = load(path)
    c = d["config"]
    i = d["inputs"]
    x = i["x"].unflatten(1, (c["T"], c["S"]))
    rope = ud.line(c["T"], d["rope_in"].shape[-1])
    close(ud.rotate(d["rope_in"].transpose(1, 2), rope), d["rope_out"].transpose(1, 2))
    for kind in ("spatial", "temporal"):
        want = d[kind]
        block = ud.STDiT3Block(c["hidden_size"], c["num_heads"], kind == "temporal")
        block.load_state_dict(want["state_dict"])
        turn = ud.line(c["T"], c["hidden_size"] // c["num_heads"]) if kind == "temporal" else None
        mask = i["y_mask"].bool()
        t6 = i["t_mlp"][:, None]
        framed = torch.where(i["x_mask"][..., None], t6, i["t0_mlp"][:, None])  # each frame's own t
        cases = {
            "output_textmask": (t6, mask),
            "output_fulltext": (t6, None),
            "output_xmask": (framed, mask),
        }
        with torch.no_grad():
            close(block.attn(want["attn_in"], turn), want["attn_out"])
            close(block.cross_attn(i["x"], i["y_padded"], mask), want["cross_attn_out"])
            for name, (t, words) in cases.items():
                close(block(x, i["y_padded"], t, words, turn=turn).flatten(1, 2), want[name])


class VideoTower(sf.VideoTower):
    """Without the features for the sound."""

    def forward(self, *args):
        return super().forward(*args)[0]


def stdit3_of(d, case, kind):
    """The STDiT3 of a golden file, for the films of one of its cases."""
    c = d["config"]
    cfg = ud.Config(
        size=math.sqrt(case["height"].item() * case["width"].item()),
        fps=int(case["fps"]),
        width=c["hidden_size"],
        depth=c["depth"],
        heads=c["num_heads"],
        text_width=c["caption_channels"],
        text_tokens=c["model_max_length"],
    )
    film = case["x"].shape[1:]
    net = kind(cfg, film, (2 if c["pred_sigma"] else 1) * c["in_channels"])
    state = dict(d["state_dict"])
    # Fixed figures, which have no name here.
    dim = cfg.width // cfg.heads
    close(state.pop("rope.freqs"), 10000 ** (-torch.arange(0, dim, 2) / dim), 1e-6)
    net.load_state_dict(state)
    assert sum(p.numel() for p in net.parameters()) == d["n_params"] - dim // 2
    return net


def with_clean_frames(net, case):
    """The network where x_mask (B, T) leaves frames clean: at t = 0.

    Its final layer is as released: it norms and modulates clean frames twice.
    """

    def embed(t):
        return net.t_embedder(t) + net.fps_embedder(case["fps"])

    mask = case["x_mask"][:, :, None]  # (B, T, 1)
    t = embed(case["timestep"])
    t0 = embed(torch.zeros_like(case["timestep"]))
    t6 = torch.where(mask, net.t_block(t)[:, None], net.t_block(t0)[:, None])  # (B, T, 6 * D)
    seen = {}

    def framed(block, args):
        x, y, _, text_mask, *rest = args
        return x, y, t6, text_mask, *rest

    def keep(layer, args):
        seen["x"] = args[0]

    hooks = [net.final_layer.register_forward_pre_hook(keep)]
    for block in (*net.spatial_blocks, *net.temporal_blocks):
        hooks.append(block.register_forward_pre_hook(framed))

    def twice(layer, args, out):
        x, _ = args
        table = layer.scale_shift_table
        for row, which in ((t, mask >= 0), (t0, ~mask)):
            shift, scale = (table + row[:, None])[:, :, None, None].unbind(1)
            x = torch.where(which[..., None], ud.modulate(x, shift, scale), x)
        return layer.linear(x)

    hooks.append(net.final_layer.register_forward_hook(twice))
    out = net(case["x"], case["timestep"], case["y"][:, 0], case["mask"].bool())
    for hook in hooks:
        hook.remove()
    return out


@pytest.mark.parametrize("kind", [ud.STDiT3, VideoTower], ids=["uniform_dit", "syncflow"])
@files("stdit3_", without=("block",))
@torch.no_grad()
def test_stdit3(path, kind):
    d = load(path)
    for case in d["cases"]:
        net = stdit3_of(d, case, kind)
        x = case["x"]
        t = case["timestep"]
        y = case["y"][:, 0]
        mask = case["mask"].bool()
        close(net.places, case["pos_emb"][0])
        embedded = net.t_embedder(t) + net.fps_embedder(case["fps"])
        close(embedded, case["t_emb_plus_fps"])
        close(net.t_block(embedded), case["t_mlp"])
        close(net.y_embedder(y), case["y_embed"][:, 0])
        even = torch.nn.functional.pad(x, (0, x.shape[4] % 2, 0, x.shape[3] % 2))
        tokens = net.x_embedder["proj"](even).flatten(2).transpose(1, 2)  # (B, T * S, D)
        close(tokens, case["x_embed"])
        close(net(x, t, y), case["out"])
        close(net(x, t, y, mask), case["out_textmask"])
        null = net.y_embedder.y_embedding.expand_as(y)
        close(net(x, t, null), case["out_null"])
        close(with_clean_frames(net, case), case["out_xmask"])


def test_stdit3_paper_sizes():
    """Names and shapes of the weights as released, and their number."""
    cfg = ud.parse(["--preset", "paper"])
    (C, T, h, w), (_, steps, _) = ud.latent_shapes(cfg)
    with torch.device("meta"):
        net = ud.STDiT3(cfg, (C, T, h, 1 + steps // T + w), 2 * C)
    # Open-Sora's, but for its 36 fixed frequencies.
    assert sum(p.numel() for p in net.parameters()) == 1_207_643_936
    D = 1152
    linear = {
        "t_embedder.mlp.0": (D, 256),
        "t_embedder.mlp.2": (D, D),
        "fps_embedder.mlp.0": (D, 256),
        "fps_embedder.mlp.2": (D, D),
        "t_block.1": (6 * D, D),
        "y_embedder.y_proj.fc1": (D, 4096),
        "y_embedder.y_proj.fc2": (D, D),
        "x_embedder.proj": (D, 4, 1, 2, 2),
        "final_layer.linear": (32, D),
    }
    want = {"y_embedder.y_embedding": (300, 4096), "final_layer.scale_shift_table": (2, D)}
    for i in range(28):
        for block in (f"spatial_blocks.{i}", f"temporal_blocks.{i}"):
            want[f"{block}.scale_shift_table"] = (6, D)
            want[f"{block}.attn.q_norm.weight"] = (72,)
            want[f"{block}.attn.k_norm.weight"] = (72,)
            linear[f"{block}.attn.qkv"] = (3 * D, D)
            linear[f"{block}.attn.proj"] = (D, D)
            linear[f"{block}.cross_attn.q_linear"] = (D, D)
            linear[f"{block}.cross_attn.kv_linear"] = (2 * D, D)
            linear[f"{block}.cross_attn.proj"] = (D, D)
            linear[f"{block}.mlp.fc1"] = (4 * D, D)
            linear[f"{block}.mlp.fc2"] = (D, 4 * D)
    for name, shape in linear.items():
        want[f"{name}.weight"] = shape
        want[f"{name}.bias"] = shape[:1]
    assert {name: tuple(p.shape) for name, p in net.state_dict().items()} == want


# ---- The pretrained codecs of uniform_dit.py

# diffusers' names of 2022 for the parts of an attention.
LEGACY = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}


@files("sd_vae")
def test_sd_vae(path):
    """diffusers' names, of today and of 2022, and LDM's."""
    d = load(path)
    c = d["config"]
    vae = ud.AutoencoderKL(
        3,
        tuple(c["block_out_channels"]),
        c["layers_per_block"],
        c["latent_channels"],
        c["norm_num_groups"],
    )
    legacy = {}
    for name, w in d["state_dict"].items():
        for new, old in LEGACY.items():
            name = name.replace(new, old)
        legacy[name] = w
    ldm = ud.ldm_names(d["state_dict"])
    for state in (legacy, ldm, d["state_dict"]):
        vae.load_state_dict(ud.ldm_names(state))
        with torch.no_grad():
            mean, logvar = vae.encode(d["x"])
            close(mean, d["mean"])
            close(logvar, d["logvar"])
            close(vae.decode(d["mean"]), d["decode_of_mean"])
            close(vae.decode(d["z_sample"]), d["decode_of_sample"])
    assert ud.count(vae) == d["n_params"]


@files("audioldm_vae")
def test_audioldm_vae(path):
    d = load(path)
    c = d["config"]
    widths = tuple(c["ch"] * m for m in c["ch_mult"])
    vae = ud.AutoencoderKL(c["in_channels"], widths, c["num_res_blocks"], c["z_channels"])
    vae.load_state_dict(d["state_dict"])
    with torch.no_grad():
        mean, logvar = vae.encode(d["x"])
        close(mean, d["mean"])
        close(logvar, d["logvar"])
        close(vae.decode(d["mean"]), d["decode_of_mean"])
    assert ud.count(vae) == d["n_params"]


@files("vae_temporal")
def test_vae_temporal(path):
    d = load(path)
    c = d["config"]
    widths = [c["filters"] * m for m in c["channel_multipliers"]]
    strides = [2 if halve else 1 for halve in c["temporal_downsample"]] + [1]
    vae = ud.TemporalVAE(
        c["in_out_channels"],
        tuple(zip(widths, strides, strict=True)),
        c["num_res_blocks"],
        c["embed_dim"],
        c["num_groups"],
    )
    vae.load_state_dict(d["state_dict"])
    with torch.no_grad():
        for case in d["cases"]:
            mean, logvar = vae.encode(case["x"])
            close(mean, case["mean"])
            close(logvar, case["logvar"])
            close(vae.decode(case["mean"], case["x"].shape[2]), case["recon_from_mean"])


@files("hifigan")
def test_hifigan(path):
    """As trained, with weight norm; folded; and under transformers' names."""
    d = load(path)
    c = d["config"]
    vocoder = ud.HiFiGAN(
        c["num_mels"],
        c["upsample_initial_channel"],
        tuple(zip(c["upsample_rates"], c["upsample_kernel_sizes"], strict=True)),
        tuple(c["resblock_kernel_sizes"]),
        tuple(c["resblock_dilation_sizes"][0]),  # all alike
    )
    other = {k.replace("ups.", "upsampler."): w for k, w in d["state_dict"].items()}
    other.update(mean=torch.zeros(c["num_mels"]), scale=torch.ones(c["num_mels"]))
    for state in (d["state_dict_weight_norm"], other, d["state_dict"]):
        vocoder.load_state_dict(ud.hifigan_names(state))
        with torch.no_grad():
            close(vocoder(d["mel"]), d["wav"])
    assert ud.count(vocoder) == d["n_params_folded"]


def shapes(module):
    return {name: list(w.shape) for name, w in module.state_dict().items()}


def released(name):
    """Names and shapes of a released network."""
    return json.loads((Path(__file__).parent / "golden" / f"{name}_keys.json").read_text())


def test_pretrained_sizes():
    with torch.device("meta"):
        codec = ud.PretrainedCodec(ud.Config())
        sd = released("sd_vae")
        audio = released("audioldm_vae")
        hifigan = released("hifigan_16k_64")
        new = {name: torch.empty(shape) for name, shape in sd["keys"].items()}
    old = dict(new)
    for legacy, today in sd["legacy_aliases"].items():
        old[legacy] = old.pop(today)
    for state in (new, old):
        renamed = ud.ldm_names(state)
        assert shapes(codec.spatial_vae) == {name: list(w.shape) for name, w in renamed.items()}
    assert shapes(codec.mel_vae) == audio["keys"]
    assert shapes(codec.vocoder) == hifigan["keys"]
    assert ud.count(codec.spatial_vae) == sd["n_params"] == 83_653_863
    assert ud.count(codec.temporal_vae) == 309_687_144
    assert ud.count(codec.temporal_vae.encoder) == 144_421_128
    assert ud.count(codec.mel_vae) == audio["n_params"] == 55_376_873
    assert ud.count(codec.vocoder) == hifigan["n_params"] == 55_264_897

    # 4 s: four pieces of 17 frames make 20 latents, 400 mel frames make 100.
    codec.mel = torch.nn.Identity()
    with torch.device("meta"), torch.no_grad():
        z = codec.encode(
            {"video": torch.empty(1, 68, 3, 256, 256), "audio": torch.empty(1, 1, 400, 64)}
        )
        clip = codec.decode(z)
    assert z["z_v"].shape == (1, 4, 20, 32, 32) and z["z_a"].shape == (1, 8, 100, 16)
    assert clip["video"].shape == (1, 68, 3, 256, 256) and clip["audio"].shape == (1, 64_000)


def tiny_codec(cfg):
    with torch.device("meta"):
        codec = ud.PretrainedCodec(cfg)
    codec.spatial_vae = ud.AutoencoderKL(3, (8, 16), 1, 4, groups=4)
    codec.temporal_vae = ud.TemporalVAE(4, ((8, 1), (16, 2), (16, 2), (8, 1)), 1, 4, groups=4)
    codec.stats = torch.tensor([0.5, 2.0]).view(2, 1, 1, 1, 1)
    codec.mel = ud.Mel(cfg)
    codec.mel_vae = ud.AutoencoderKL(1, (8, 16), 1, 8, groups=4)
    codec.scale_factor = torch.ones(())
    codec.vocoder = ud.HiFiGAN(cfg.n_mels, 8, ((5, 10), (4, 8)), (3,), (1, 3))
    return codec.eval()


def prefixed(state, prefix):
    return {prefix + name: w for name, w in state.items()}


def test_pretrained_files(tmp_path, capsys):
    """Released files are read; what lacks something, or is another network, is refused."""
    torch.manual_seed(0)
    cfg = ud.Config(frames=20, size=16, n_mels=16, hop=20, window=64, n_fft=64)
    video = tmp_path / "video" / "model.safetensors"
    audio = tmp_path / "audio.ckpt"
    for k, path in (("video_vae", video), ("audio_vae", audio)):
        path.parent.mkdir(exist_ok=True)
        cfg = dataclasses.replace(cfg, **{k: str(path)})
    theirs = tiny_codec(cfg)
    vae = theirs.mel_vae.state_dict()
    vocoder = theirs.vocoder.state_dict()
    state = {
        **prefixed(theirs.spatial_vae.state_dict(), "spatial_vae.module."),
        **prefixed(theirs.temporal_vae.state_dict(), "temporal_vae."),
        "shift": torch.zeros(1, 4, 1, 1, 1),
        "scale": torch.ones(1, 4, 1, 1, 1),
    }
    write_safetensors(video, state)
    whole = {
        **prefixed(vae, "first_stage_model."),
        **prefixed(vocoder, "first_stage_model.vocoder."),
        "model.diffusion_model.out.weight": torch.zeros(1),
        "scale_factor": torch.tensor(0.5),
    }
    torch.save({"state_dict": whole, "epoch": 3}, audio)

    codec = tiny_codec(cfg)
    ud.load_pretrained(codec, cfg)
    said = capsys.readouterr().out
    assert "Apache" in said and "not for commercial use" in said and said.count("\n") == 3
    theirs.scale_factor.fill_(0.5)
    for name, w in theirs.state_dict().items():
        assert torch.equal(w, codec.state_dict()[name]), name

    # 20 frames are coded as 17 and 3, which makes 5 latents and 1.
    clip = {"video": torch.rand(2, 20, 3, 16, 16) * 2 - 1, "audio": torch.rand(2, 1, 640) * 2 - 1}
    with torch.no_grad():
        z = codec.encode(clip)
        back = codec.decode(z)
        start = codec.encode({"video": clip["video"][:, :17]})
        mean = codec.mel_vae.encode(codec.mel(clip["audio"]))[0]
    assert z["z_v"].shape == (2, 4, 6, 8, 8) and z["z_a"].shape == (2, 8, 16, 8)
    assert back["video"].shape == clip["video"].shape and back["audio"].shape == (2, 640)
    assert list(start) == ["z_v"]
    close(start["z_v"], z["z_v"][:, :, :5], 1e-5)
    close(z["z_a"], mean * 0.5, 1e-6)

    # diffusers' folders: the VAE with its config.json, the vocoder in a file of its own.
    folder = tmp_path / "vae"
    folder.mkdir()
    torch.save(vae, folder / "x.bin")
    apart = dataclasses.replace(cfg, audio_vae=str(folder / "x.bin"))
    with pytest.raises(data.UserError, match="how its latents are scaled"):
        ud.load_pretrained(codec, apart)
    (folder / "config.json").write_text('{"_class_name": "AutoencoderKL", "scaling_factor": 0.25}')
    with pytest.raises(data.UserError, match="--vocoder"):
        ud.load_pretrained(codec, apart)
    torch.save({**vocoder, "mean": torch.zeros(16)}, tmp_path / "vocoder.bin")
    apart = dataclasses.replace(apart, vocoder=str(tmp_path / "vocoder.bin"))
    ud.load_pretrained(codec, apart)
    assert codec.scale_factor == 0.25

    # Version 1.3 is known by its config, or by its names.
    config = video.parent / "config.json"
    config.write_text('{"architectures": ["OpenSoraVAE_V1_3_Pipline"]}')
    with pytest.raises(data.UserError, match="version 1.3"):
        ud.load_pretrained(codec, cfg)
    config.write_text('{"architectures": ["VideoAutoencoderPipeline"]}')
    ud.load_pretrained(codec, cfg)
    config.unlink()
    write_safetensors(video, theirs.temporal_vae.state_dict())
    with pytest.raises(data.UserError, match="version 1.3"):
        ud.load_pretrained(codec, cfg)
    with pytest.raises(data.UserError, match="--codec small"):
        ud.check_files(dataclasses.replace(cfg, video_vae=""))


# ---- syncflow.py


@files("encodec_seanet")
@torch.no_grad()
def test_encodec_seanet(path):
    d = load(path)
    c = d["config"]
    size = (c["channels"], c["n_filters"], c["ratios"], c["dimension"], c["n_residual_layers"])
    how = {"lstm": c["lstm"], "causal": c["causal"], "norm": c["norm"]}
    net = torch.nn.ModuleDict(
        {"encoder": sf.WaveEncoder(*size, **how), "decoder": sf.WaveDecoder(*size, **how)}
    )
    net.load_state_dict(d["state_dict"])
    assert sf.count(net) == d["n_params"]
    for case in d["cases"]:
        close(net["encoder"](case["x"]), case["z"])
        close(net["decoder"](case["z"]), case["y"])


def test_encodec_names_and_shapes():
    """Of the network released for 24 kHz, without its quantizer."""
    want = released("encodec_seanet_24k")
    size = (1, 32, (8, 5, 4, 2), 128)
    with torch.device("meta"):
        net = torch.nn.ModuleDict(
            {"encoder": sf.WaveEncoder(*size), "decoder": sf.WaveDecoder(*size)}
        )
    assert shapes(net) == want["keys"]
    assert sf.count(net) == want["n_params"] == 14_851_810


@files("ot_assign")
def test_ot_assign(path):
    for case in load(path):
        cost = sf.squared_distances(case["noise_v"], case["data_v"])
        cost = cost + sf.squared_distances(case["noise_a"], case["data_a"])
        close(cost, case["cost"], 1e-5)
        order = sf.optimal_order(cost)
        # Of each noise its clip, there; of each clip its noise, here.
        assert order[case["noise_to_data"]].tolist() == list(range(len(cost)))
        total = cost[order, torch.arange(len(cost))].sum().item()
        assert total == pytest.approx(case["optimal_cost"], rel=1e-5)


class Toy:
    """A network of a golden file: out = A x + D t / 100 + 0.1 y, and its half is a velocity."""

    cfg = sf.Config()

    def __init__(self, d):
        self.A = d["toy_model"]["A"]
        self.D = d["toy_model"]["D"]
        self.y = None  # (B,), the conditions

    def __call__(self, x_v, x_a, t_v, t_a, words, mask):
        out = torch.einsum("oc,bcthw->bothw", self.A, x_v)
        out = out + self.D * sf.across(1000 * (1 - t_v), x_v) / 100
        if self.y is not None:
            out = out + 0.1 * sf.across(self.y[: len(x_v)], x_v)
        return out[:, : x_v.shape[1]], x_a


@files("rf_schedule")
def test_rf_schedule(path, monkeypatch):
    """The noising, the loss, guided Euler steps. Open-Sora's own transform of t is not used."""
    d = load(path)
    toy = Toy(d)
    flow = sf.Flow(toy, "video")
    noised = d["add_noise"]
    level = noised["t"] / 1000  # that clock runs from data to noise
    close(flow.mix(noised["noise"], noised["x"], 1 - level), noised["x_t"], 1e-5)

    words = torch.zeros(2, 3, sf.LETTERS, dtype=torch.long)
    for i, want in enumerate(d["training_loss_per_sample"]):
        one = slice(i, i + 1)
        drawn = (torch.zeros(2, 1), noised["noise"][one], None)
        monkeypatch.setattr(flow, "draw", lambda keys, device, drawn=drawn: drawn)
        batch = {"z_v": noised["x"][one], "z_a": None, "key": None, "words": words[:1]}
        loss, parts = flow.loss(toy, batch, level[one])
        assert loss.item() == parts["video"].item() == pytest.approx(want.item(), rel=1e-4)

    for run in d["euler_cfg"]:
        if run["transform"]:
            continue
        z = run["z_init"]
        n = len(z)
        # The prompt's half comes first.
        toy.y = torch.tensor([run["y_cond"]] * n + [run["y_uncond"]] * n)
        said = words[:1].expand(n, -1, -1)
        got, _ = flow.sample(z, torch.zeros(n, 1, 1), said, words[1], run["cfg"], run["steps"])
        close(got, run["z_final"])
