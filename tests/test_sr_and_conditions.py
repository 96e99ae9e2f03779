"""mm_diffusion.py and sample.py: super-resolution, a given stream, longer clips, nearest clips."""
import math
import re
from pathlib import Path

import imageio.v2 as imageio
import pytest
import torch
import torch.nn.functional as F
from test_mm_diffusion import TINY, apart, batch_of, fill, net_of, tiny, weights

import data
import mm_diffusion as mm
import sample

TINY_SR = """
    --preset toy --data toy --stage sr --size 16 --sr_size 32 --sr_width 8 --sr_mult 1,2
    --norm_groups 4 --heads 2 --sr_residual 0.035 --augment 0.5 --sr_batch_size 4 --sr_lr 1e-3
    --lr_end 1 --warmup 0 --sr_steps 2 --sr_sample_steps 5 --val_clips 4 --workers 0 --samples 2
    --log_every 1 --eval_every 1000
""".split()


def tiny_sr(*more):
    return mm.sr_config(mm.parse([*TINY_SR, *more]))


def sr_net_of(cfg, seed=0):
    """A super-resolution network whose every parameter is random."""
    torch.manual_seed(seed)
    return fill(mm.SRUNet(cfg))


# ---- Super-resolution: data


def test_low_frames_are_means_degraded_as_the_clip_number_tells():
    clips = mm.open_clips(tiny_sr("--augment", "1"), "train")
    plain = mm.open_clips(tiny_sr("--augment", "0"), "train")
    one = clips[5]
    two = clips[5]
    clean = plain[5]
    assert len(clips) == len(plain)
    for name in ("video", "low"):
        assert (one[name] == two[name]).all()
    assert (one["video"] == clean["video"][:, :, ::-1]).all()  # mirrored
    assert clean["low"].shape == (1, 3, 16, 16)
    assert clean["low"].dtype.name == "float32"
    mean = clean["video"][0].reshape(16, 2, 16, 2, 3).mean((1, 3))
    low = (clean["low"][0].transpose(1, 2, 0) + 1) * 127.5  # (h, w, 3)
    assert abs(low - mean).max() < 1e-3
    changed = abs(one["low"][0] - clean["low"][0, :, :, ::-1]).mean()  # by noise and JPEG
    assert 0.002 < changed < 0.4
    some = mm.open_clips(tiny_sr("--augment", "0.5"), "train")
    mirrored = [(some[i]["video"] != plain[i]["video"]).any() for i in range(40)]
    assert 8 < sum(mirrored) < 32


def test_validation_frames_are_not_degraded():
    clip = mm.open_clips(tiny_sr("--augment", "1"), "val")[3]
    low = clip["low"].reshape(3, -1).mean(1)
    video = clip["video"].reshape(-1, 3).mean(0) / 127.5 - 1
    assert abs(low - video).max() < 1e-4


# ---- Super-resolution: loss


def adm_variational(process, x0, eps, estimate, v, t):
    """The term as guided-diffusion writes it (gaussian_diffusion.py, losses.py), bits a frame."""
    beta = process.betas
    abar = process.abar
    before = torch.cat([torch.ones(1, dtype=torch.float64), abar[:-1]])
    variance = beta * (1 - before) / (1 - abar)
    clipped = torch.cat([variance[1:2], variance[1:]]).log()
    c1 = beta * before.sqrt() / (1 - abar)
    c2 = (1 - before) * (1 - beta).sqrt() / (1 - abar)
    tables = torch.stack([c1, c2, clipped, beta.log(), abar])
    c1, c2, clipped, high, abar = tables[:, t].view(5, -1, 1, 1, 1)
    x0 = x0.double()
    v = v.double()
    sigma = (1 - abar).sqrt()
    xt = abar.sqrt() * x0 + sigma * eps.double()
    mean = c1 * x0 + c2 * xt
    log_var = (v + 1) / 2 * high + (1 - (v + 1) / 2) * clipped
    guess = c1 * (xt - sigma * estimate.double()) / abar.sqrt() + c2 * xt
    spread = (clipped - log_var).exp() + (mean - guess) ** 2 * (-log_var).exp()
    kl = 0.5 * (log_var - clipped - 1 + spread)

    def cdf(x):
        return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))

    above = cdf((x0 - guess + 1 / 255) * (-log_var / 2).exp())
    below = cdf((x0 - guess - 1 / 255) * (-log_var / 2).exp())
    chance = torch.where(x0 > 0.999, 1 - below, above - below)
    chance = torch.where(x0 < -0.999, above, chance)
    code = -chance.clamp(min=1e-12).log()
    first = t.view(-1, 1, 1, 1) == 0
    return torch.where(first, code, kl).mean((1, 2, 3)) / math.log(2)


def test_the_variational_term_is_that_of_adm():
    process = mm.SRDiffusion(mm.Config())
    g = torch.Generator().manual_seed(0)
    x0 = torch.rand(6, 3, 8, 8, generator=g) * 2 - 1
    x0[:, :, 0] = 1  # the outermost gray levels
    x0[:, :, 1] = -1
    eps = torch.randn(x0.shape, generator=g)
    v = 0.5 * torch.randn(x0.shape, generator=g)
    estimate = eps + 0.1 * torch.randn(x0.shape, generator=g)
    t = torch.tensor([0, 0, 1, 10, 500, 999])
    ours = process.variational(x0, eps, estimate, v, t).mean((1, 2, 3)).double()
    theirs = adm_variational(process, x0, eps, estimate, v, t)
    assert torch.allclose(ours, theirs, rtol=1e-3)  # its cdf is a tanh, which counts at t = 0
    assert torch.allclose(ours[2:], theirs[2:], rtol=1e-4)


def test_the_variational_term_trains_the_variance_alone():
    cfg = tiny_sr("--sr_residual", "0", "--augment", "0")
    process = mm.build_process(cfg)
    net = sr_net_of(cfg)
    batch = batch_of(cfg)
    loss, parts = process.loss(net, batch)

    # The same by hand.
    x0 = batch["video"][:, 0]
    u, noise = mm.clip_noise(batch["key"], {"v": x0})
    eps = noise["v"]
    t = (u * 1000).long()
    abar = process.abar.float()[t].view(-1, 1, 1, 1)
    got = net(abar.sqrt() * x0 + (1 - abar).sqrt() * eps, batch["low"][:, 0], t)
    estimate, v = got.chunk(2, dim=1)
    mse = (estimate - eps).square().mean()
    vb = adm_variational(process, x0, eps, estimate.detach(), v, t).mean()
    assert parts["mse"].item() == pytest.approx(mse.item(), rel=1e-5)
    assert parts["vb"].item() == pytest.approx(vb.item(), rel=1e-3)
    assert loss.item() == pytest.approx((mse + vb).item(), rel=1e-3)

    # The half of the output that is the noise sees the mse alone.
    [of_loss] = torch.autograd.grad(loss, net.out[2].weight, retain_graph=True)
    [of_mse] = torch.autograd.grad(mse, net.out[2].weight)
    assert torch.allclose(of_loss[:3], of_mse[:3], atol=1e-6)
    assert of_loss[3:].abs().max() > 1e-6


class SROracle:
    """A network that knows the frames x0, less the process's origin, and so is right.

    It keeps the noisy frames that it was asked last.
    """

    def __init__(self, process, batch):
        self.process = process
        self.low = batch["low"][:, 0]
        self.x0 = batch["video"][:, 0] - process.origin(self.low)

    def __call__(self, x, low, t):
        self.seen = x
        abar = self.process.abar.float()[t].view(-1, 1, 1, 1)
        std = self.process.cfg.sr_residual
        if std:  # what c_skip leaves of the clean frame, over c_out
            noise = 1 / abar - 1  # its variance beside the clip's
            skipped = std**2 / (std**2 + noise) * x / abar.sqrt()
            out = (self.x0 - skipped) / (std**2 * noise / (std**2 + noise)).sqrt()
        else:
            out = (x - abar.sqrt() * self.x0) / (1 - abar).sqrt()
        return torch.cat([out, torch.zeros_like(x)], dim=1)


@pytest.mark.parametrize("residual", ["0", "0.05"])
def test_the_frames_training_noises_are_those_that_sampling_cleans(residual):
    """Told the truth: no loss, and one step of the sampler lands on the frame."""
    cfg = tiny_sr("--sr_residual", residual, "--augment", "0")
    process = mm.build_process(cfg)
    batch = batch_of(cfg)
    oracle = SROracle(process, batch)
    for t, abar, _ in process.path(4):
        level = torch.full((4,), (t + 0.5) / process.T)
        loss, parts = process.loss(oracle, batch, level)
        assert parts["mse"].item() < 1e-4
        assert (loss - parts["vb"]).item() < 1e-3
        estimate, _ = process.predict(oracle, oracle.seen, oracle.low, torch.full((4,), t))
        x0 = mm.clean({"v": oracle.seen}, {"v": estimate}, abar)
        frames = process.origin(oracle.low) + x0["v"]
        assert (frames - batch["video"][:, 0]).abs().max() < 1e-3
    # All the way, from one noise image.
    frames = process.upsample(oracle, oracle.low, torch.randn(3, 32, 32), 5)
    assert (frames - batch["video"][:, 0]).abs().max() < 1e-3


def test_the_residual_has_a_loss_of_the_order_of_one_at_all_levels():
    """Of a network that says nothing; the residual itself is what bicubic enlargement lacks."""
    cfg = tiny_sr("--sr_residual", "0.05", "--augment", "0")
    process = mm.build_process(cfg)
    batch = batch_of(cfg)
    low = batch["low"][:, 0]
    assert torch.equal(process.origin(low), F.interpolate(low, (32, 32), mode="bicubic"))

    def silent(x, low, t):
        return torch.zeros(len(x), 6, *x.shape[2:])

    for level in (0.1, 0.4, 0.7, 0.99):
        loss, parts = process.loss(silent, batch, torch.full((4,), level))
        assert 0.01 < (loss - parts["vb"]).item() < 10


# ---- Super-resolution: network, training, use


def test_a_fresh_sr_network_outputs_zero_and_checkpointing_changes_nothing():
    attention = ("--sr_attention", "1,2")
    x = torch.randn(2, 3, 32, 32)
    low = torch.randn(2, 3, 16, 16)
    t = torch.tensor([3, 700])
    assert mm.SRUNet(tiny_sr(*attention))(x, low, t).abs().max() == 0
    grads = []
    for checkpoint in ("false", "true"):
        net = sr_net_of(tiny_sr(*attention, "--checkpoint", checkpoint))
        net(x, low, t).square().mean().backward()
        grads.append(torch.cat([p.grad.flatten() for p in net.parameters()]))
    assert (grads[0] - grads[1]).abs().max() < 1e-6


def test_the_stage_has_a_config_and_a_folder_of_its_own():
    cfg = mm.parse([*TINY_SR, "--sr_steps", "9", "--sr_batch_size", "6", "--sr_lr", "0.5"])
    assert cfg.stage == "sr"
    sr = mm.sr_config(cfg)
    assert (sr.steps, sr.batch_size, sr.lr) == (9, 6, 0.5)
    assert (sr.width, sr.mult, sr.video_attention) == (8, (1, 2), ())
    assert (sr.frames, sr.streams) == (1, "v")
    assert sr.out == f"{cfg.out}/sr"
    usual = mm.parse(["--stage", "sr", "--preset", "toy"])
    assert mm.sr_config(usual).out == "out/mm_diffusion/toy/sr"


@pytest.fixture(scope="module")
def trained_sr(tmp_path_factory):
    """The folder of four steps, uninterrupted."""
    out = tmp_path_factory.mktemp("trained_sr")
    mm.main([*TINY_SR, "--sr_steps", "4", "--out", str(out)])
    return out / "sr"


def test_sr_trains_resumes_to_the_bit_and_shows_frames(trained_sr, tmp_path, capsys):
    for steps in ("2", "4"):
        mm.main([*TINY_SR, "--sr_steps", steps, "--out", str(tmp_path)])
    out = tmp_path / "sr"
    for which in ("model", "ema"):
        assert apart(weights(out, which), weights(trained_sr, which)) == 0
    printed = capsys.readouterr().out
    line = r"PSNR of 4 validation frames: [\d.]+ dB, bicubic [\d.]+ dB"
    assert len(re.findall(line, printed)) == 2
    assert f"--sr_ckpt {out}/ckpt.pt" in printed
    assert (out / "samples" / "step000004_0.mp4").exists()
    head = (out / "log.csv").read_text().splitlines()[0]
    for name in ("val_mse", "val_vb", "mse", "vb"):
        assert name in head.split(",")
    with pytest.raises(SystemExit, match="--[a-z_]+ .*, not "):
        mm.main([*TINY, "--steps", "4", "--out", str(out)])


def test_compare_measures_psnr(trained_sr):
    model = mm.load(trained_sr / "ckpt.pt")
    val = mm.open_clips(model.cfg, "val")
    clip, ours, cubic = mm.compare(model, val, 3)
    assert clip.shape == (1, 3, 32, 96, 3)
    assert clip.dtype == torch.uint8
    assert ours > 0
    true = data.val_batches(val, 3, 3)[0]["video"][:, 0]
    assert torch.equal(clip[0, :, :, 64:], true)
    mse = (clip[0, :, :, :32].float() - true.float()).square().flatten(1).mean(1)
    psnr = (10 * (255**2 / mse).log10()).mean().item()
    assert cubic == pytest.approx(psnr, abs=0.05)


def test_all_frames_of_a_clip_start_from_one_noise_image():
    cfg = tiny_sr()
    process = mm.build_process(cfg)
    net = sr_net_of(cfg)
    low = torch.rand(1, 3, 16, 16).expand(3, -1, -1, -1)
    noise = torch.randn(2, 3, 32, 32)
    frames = process.upsample(net, low, noise[0], 3)
    assert frames.shape == (3, 3, 32, 32)
    assert (frames[0] - frames[2]).abs().max() < 1e-5
    assert (process.upsample(net, low[:1], noise[0], 3) - frames[:1]).abs().max() < 1e-5
    assert (process.upsample(net, low[:1], noise[1], 3) - frames[:1]).abs().max() > 1e-3


def test_released_files_from_end_to_end(tmp_path, monkeypatch):
    """Bare state dicts: the base in half precision, SR in single -> sample.py -> mp4 at 64."""
    monkeypatch.chdir(tmp_path)
    base = "ema_0.9999_100000.pt"
    sr = "ema_0.9999_270000.pt"
    net = net_of(tiny("--size", "32"))
    torch.save({k: p.half() for k, p in net.state_dict().items()}, base)
    toy_sr = mm.sr_config(mm.parse(["--stage", "sr", "--preset", "toy"]))
    torch.save(sr_net_of(toy_sr).state_dict(), sr)
    args = ["--model", "mm_diffusion", "--n", "1", "--device", "cpu", "--steps", "2"]
    large = [*args, "--ckpt", base, *TINY, "--size", "32"]
    sample.main([*large, "--out", "clips32"])
    sample.main([*large, "--sr_ckpt", sr, "--sr_sample_steps", "2", "--out", "clips64"])
    for size in (32, 64):
        video, _ = data.load_clip(f"clips{size}/000.mp4", 4, size, 10, 4000)
        assert video.shape == (4, size, size, 3)
    assert imageio.get_reader("clips64/000.mp4").get_meta_data()["size"] == (64, 64)

    torch.save(net_of(tiny()).state_dict(), "small.pt")
    small = [*args, "--ckpt", "small.pt", *TINY]
    wrong = (
        ([*large, "--sr_ckpt", "nowhere.pt"], "no checkpoint nowhere.pt"),
        ([*large, "--sr_ckpt", base], "not for this network"),
        ([*small, "--sr_ckpt", sr], "does not enlarge frames of 16 pixels"),
        ([*args, "--ckpt", sr, *TINY_SR], "not for this network"),  # its preset is another
        ([*args, "--ckpt", sr, "--preset", "toy", "--stage", "sr"], "give it as --sr_ckpt"),
        ([*args, "--ckpt", sr], "add --preset"),
    )
    for words, says in wrong:
        with pytest.raises(SystemExit, match=says) as stop:
            sample.main([*words, "--out", "wrong"])
        assert "\n" not in stop.value.code
    assert not Path("wrong").exists()


def test_frames_are_enlarged_in_as_many_steps_as_sampling_says(trained_sr, monkeypatch):
    """sr_sample_steps of the model that samples, not of the file that enlarges."""
    steps = []
    upsample = mm.SRDiffusion.upsample

    def spy(self, model, low, noise, count):
        steps.append(count)
        return upsample(self, model, low, noise, count)

    monkeypatch.setattr(mm.SRDiffusion, "upsample", spy)
    ckpt = str(trained_sr / "ckpt.pt")
    model = net_of(tiny("--sr_ckpt", ckpt, "--sr_sample_steps", "3"))
    video, audio = mm.sample(model, 2)
    assert video.shape == (2, 4, 32, 32, 3)
    assert audio.shape == (2, 1600)
    assert set(steps) == {3}
    # Clip 1 does not depend on clip 0.
    again, _ = mm.sample(model, 2, batch_size=1)
    assert (again.int() - video.int()).abs().max() <= 1
    # A given video comes back as it was.
    given, _ = given_clip(model.cfg)
    assert torch.equal(mm.sample(model, 1, video=given)[0][0], given)


# ---- Conditioning


def given_clip(cfg):
    """Video (F, H, W, 3) uint8 and audio (L,) of a clip."""
    shape = (cfg.frames, cfg.size, cfg.fps, cfg.rate)
    clip = data.open_dataset("toy:bounce", "val", *shape)[0]
    return torch.as_tensor(clip["video"]), torch.as_tensor(clip["audio"])


@pytest.mark.parametrize("method", ["replace", "gradient", "released"])
@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
def test_the_given_stream_comes_back_and_steers_the_other(method, sampler):
    cfg = tiny("--diffusion_steps", "21")
    model = net_of(cfg)
    video, audio = given_clip(cfg)
    options = {"steps": 4, "seed": 3, "sampler": sampler, "method": method}
    if method != "replace":
        options["guidance"] = 0.01
    v, a = mm.sample(model, 2, video=video.numpy(), **options)
    both = video.expand(2, -1, -1, -1, -1)
    assert torch.equal(v, both)
    assert a.shape == (2, 1600)
    assert a.isfinite().all()
    # Clip 1 does not depend on clip 0.
    _, again = mm.sample(model, 2, video=both, batch_size=1, **options)
    assert (a - again).abs().max() < 1e-3
    _, other = mm.sample(model, 1, video=255 - video, **options)
    assert (other - a[:1]).abs().max() > 1e-4
    v, a = mm.sample(model, 1, audio=audio, **options)
    assert v.shape == (1, 4, 16, 16, 3)
    assert (a[0] - audio).abs().max() < 1e-6


@pytest.mark.parametrize("method", ["gradient", "released"])
def test_guidance_is_eq_12(method):
    """Two steps by hand, for a network of which the gradient is known: its v answers to a."""
    guidance = 0.2
    g = torch.Generator().manual_seed(0)
    x = {"v": torch.randn(2, 1, 1, 2, 2, generator=g), "a": torch.randn(2, 1, 4, generator=g)}
    v0 = 0.1 * torch.randn(2, 1, 1, 2, 2, generator=g)
    draws = []

    def normal(state):
        draws.append({k: torch.randn(y.shape, generator=g) for k, y in state.items()})
        return draws[-1]

    def eps_theta(x, t):  # keeps the x_0 estimate inside [-1, 1]
        return {"v": x["v"] + 0.003 * x["a"].view(2, 1, 1, 2, 2), "a": x["a"] * 1.0}

    abar = mm.Diffusion(mm.Config(diffusion_steps=50)).abar
    low = float(abar[20])
    high = float(abar[40])  # noisier: the lower number
    path = [(1, high, low), (0, low, 1.0)]
    seen = []

    def step(*args):
        seen.append(mm.ddim_step(*args))
        return seen[-1]

    given = {"v": v0, "a": torch.zeros_like(x["a"])}
    known = {"v": torch.ones_like(v0, dtype=torch.bool), "a": torch.zeros_like(x["a"]).bool()}
    guided = mm.guide if method == "gradient" else mm.guide_as_released
    out = guided(step, eps_theta, x, path, normal, given, known, guidance)

    # The noise of v_(t+1) and that of v_t: drawn anew in each step, or always that of x_T.
    start = goal = x["v"]
    if method == "gradient":
        start = draws[0]["v"]
        goal = draws[1]["v"]
    v1 = high**0.5 * v0 + (1 - high) ** 0.5 * start
    a = x["a"].view(2, 1, 1, 2, 2).clone().requires_grad_()
    guess = (v1 - (1 - high) ** 0.5 * (v1 + 0.003 * a)) / high**0.5
    assert guess.abs().max() < 1
    noise = (v1 - high**0.5 * guess) / (1 - high) ** 0.5
    y = low**0.5 * guess + (1 - low) ** 0.5 * noise
    error = (y - low**0.5 * v0 - (1 - low) ** 0.5 * goal).square()
    if method == "gradient":
        move = (1 - low) ** 0.5 * torch.autograd.grad(error.sum(), a)[0]
    else:
        move = high**0.5 * torch.autograd.grad(error.sum() / 4, a)[0]
    assert move.abs().max() > 1e-6
    a1 = seen[0]["a"].detach().view(2, 1, 1, 2, 2) - guidance * move
    # The last step is not guided: what comes out is the x_0 estimate from a1.
    want = ((a1 - (1 - low) ** 0.5 * a1) / low**0.5).clamp(-1, 1)
    assert (out["a"].view(2, 1, 1, 2, 2) - want).abs().max() < 1e-6
    assert not out["a"].requires_grad


def test_replacement_draws_the_noise_anew_in_each_step():
    process = mm.Diffusion(mm.Config(diffusion_steps=50))
    x = {"v": torch.randn(1, 2, 3, 4, 4), "a": torch.randn(1, 1, 8)}
    clip = torch.full((1, 2, 3, 4, 4), 0.5)
    seen = []

    def eps_theta(x, t):
        abar = float(process.abar[t])
        seen.append(((x["v"] - abar**0.5 * clip) / (1 - abar) ** 0.5).detach())
        return {k: y + x["a"].mean() for k, y in x.items()}  # each stream sees the other

    g = torch.Generator().manual_seed(0)

    def normal(state):
        return {k: torch.randn(y.shape, generator=g) for k, y in state.items()}

    given = {"v": clip, "a": torch.zeros_like(x["a"])}
    known = {"v": torch.ones_like(clip).bool(), "a": torch.zeros_like(x["a"]).bool()}
    walk = (mm.ddim_step, eps_theta, x, process.path(5), normal)
    mm.replace(*walk, given, known)
    noise = torch.stack(seen)
    assert len(noise) == 5
    assert 0.8 < noise.std() < 1.2
    assert abs(torch.corrcoef(noise.flatten(1))).fill_diagonal_(0).max() < 0.4
    seen.clear()
    mm.guide_as_released(*walk, given, known, 0.0)
    for noise in seen:  # always that of x_T
        assert (noise - x["v"]).abs().max() < 1e-3


def test_put_keeps_what_is_known():
    x = {"v": torch.zeros(1, 4), "a": torch.zeros(1, 4)}
    given = {"v": torch.ones(1, 4), "a": torch.ones(1, 4)}
    known = {"v": torch.tensor([[True, True, False, False]]), "a": torch.zeros(1, 4).bool()}
    got = mm.put(known, given, x)
    assert got["v"].tolist() == [[1, 1, 0, 0]]
    assert got["a"].tolist() == [[0, 0, 0, 0]]


def test_a_given_sound_is_diffused_as_the_code_that_the_model_knows(monkeypatch):
    cfg = tiny("--mu_law", "255")
    given = []
    replace = mm.replace

    def spy(*args):
        given.append(args[5])
        return replace(*args)

    monkeypatch.setattr(mm, "replace", spy)
    _, audio = given_clip(cfg)
    _, back = mm.sample(net_of(cfg), 1, audio=audio)
    assert torch.equal(given[0]["a"][0, 0], mm.mu_law(audio, 255))
    assert torch.equal(back[0], audio)


# ---- Longer clips


def test_a_longer_clip_goes_on_from_its_windows():
    model = net_of(tiny())
    window_v, window_a = mm.sample(model, 2, steps=3, seed=5)
    video, audio = mm.sample(model, 2, steps=3, seed=5, seconds=0.9)
    assert video.shape == (2, 9, 16, 16, 3)
    assert audio.shape == (2, 3600)
    assert torch.equal(video[:, :4], window_v)
    assert torch.equal(audio[:, :1600], window_a)
    again_v, again_a = mm.sample(model, 1, steps=3, seed=5, seconds=0.9, batch_size=1)
    assert (again_v.int() - video[:1].int()).abs().max() <= 1
    assert (again_a - audio[:1]).abs().max() < 1e-4
    # A part of a window.
    assert mm.sample(model, 1, steps=3, seconds=0.2)[0].shape == (1, 2, 16, 16, 3)
    _, other = mm.sample(model, 1, steps=3, seed=6, seconds=0.9)
    assert (other - audio[:1]).abs().max() > 1e-2


def test_the_second_window_is_given_the_last_half_of_the_first(monkeypatch):
    calls = []
    replace = mm.replace

    def spy(*args):
        calls.append(args[5:])
        return replace(*args)

    monkeypatch.setattr(mm, "replace", spy)
    video, audio = mm.sample(net_of(tiny()), 1, steps=3, seconds=0.8)
    assert len(calls) == 2
    for i, (given, known) in enumerate(calls):  # frames 2-3, then 4-5
        assert known["v"].flatten(2).all(2).tolist() == [[True, True, False, False]]
        assert known["a"][0, 0, :800].all()
        assert not known["a"][0, 0, 800:].any()
        first = 2 + 2 * i
        assert torch.equal(data.to_uint8(given["v"][:, :2]), video[:, first : first + 2])
        sound = given["a"][0, 0, :800].clamp(-1, 1)
        assert torch.equal(sound, audio[0, first * 400 : (first + 2) * 400])


# ---- The command line


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """The command that samples two clips of a model of two steps."""
    out = tmp_path_factory.mktemp("base")
    mm.main([*TINY, "--steps", "2", "--out", str(out)])
    command = "--model mm_diffusion --device cpu --n 2 --steps 2 --ckpt"
    return [*command.split(), str(out / "ckpt.pt")]


def test_sample_py_takes_files_that_are_longer_than_a_window(base, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    clip = data.open_dataset("toy:bounce", "val", 20, 32, 10, 8000)[0]
    data.save_clip("in.mp4", clip["video"], clip["audio"], 10, 8000)
    data.save_clip("in.wav", None, clip["audio"], 10, 8000)
    data.save_clip("mute.mp4", clip["video"], None, 10, 8000)

    sample.main([*base, "--video", "in.mp4", "--out", "v", "--start", "0.5"])
    assert "video: 0.4 s of in.mp4, from 0.5 s on" in capsys.readouterr().out
    want, _ = data.load_clip("in.mp4", 4, 16, 10, 4000, 0.5)
    got, sound = data.load_clip("v/001.mp4", 4, 16, 10, 4000)
    assert abs(got.astype(int) - want).mean() < 6
    assert sound is not None

    guided = ["--method", "gradient", "--guidance", "0.01"]
    sample.main([*base, "--audio", "in.wav", "--out", "a", *guided])
    assert "in.wav, from 0 s on" in capsys.readouterr().out
    assert "--method gradient" in Path("a/index.html").read_text()
    assert Path("a/001.mp4").exists()

    sample.main([*base, "--seconds", "0.7", "--out", "long"])
    video, _ = data.load_clip("long/000.mp4", 7, 16, 10, 4000)
    assert video.shape == (7, 16, 16, 3)

    wrong = (
        ("--video in.mp4 --audio in.wav", "not both"),
        ("--video in.mp4 --start 1.8", "in.mp4 is too short: 0.4 s are needed from 1.8 s on"),
        ("--audio mute.mp4", "mute.mp4 has no audio"),
        ("--video in.wav", "has no video"),
        ("--video in.mp4 --seconds 2", "without --seconds"),
        ("--guidance 3", "Guidance is for a given"),
        ("--method magic", "--method"),
        ("--video in.mp4 --guidance 3", "--method gradient"),
        ("--nearest nothing", "no data set 'nothing'"),
        ("--sr_ckpt no.pt", "There is no checkpoint no.pt"),
    )
    for args, says in wrong:
        with pytest.raises(SystemExit) as stop:
            sample.main([*base, *args.split(), "--out", "wrong"])
        assert says in stop.value.code, args
        assert "\n" not in stop.value.code
    assert not Path("wrong").exists()
    assert not Path("out").exists()


@pytest.mark.parametrize("streams,other", [("v", "audio"), ("a", "video")])
def test_single_streams_take_no_condition(streams, other):
    cfg = tiny("--streams", streams)
    video, audio = given_clip(cfg)
    given = {"video": video} if other == "video" else {"audio": audio}
    with pytest.raises(data.UserError, match="to a model of both streams"):
        mm.sample(net_of(cfg), 1, **given)


def test_a_condition_has_the_length_of_a_window_and_guidance_a_use():
    cfg = tiny()
    net = net_of(cfg)
    video, audio = given_clip(cfg)
    wrong = (
        {"video": video[:2]},
        {"audio": audio[:-1]},
        {"video": torch.stack([video] * 3)},
        {"video": audio},
    )
    for given in wrong:
        with pytest.raises(data.UserError, match="Give one window, or 2 of them"):
            mm.sample(net, 2, **given)
    with pytest.raises(data.UserError, match="Guidance is for"):
        mm.sample(net, 1, guidance=0.5, method="gradient")
    # For a longer clip it is of use.
    longer = {"seconds": 0.6, "method": "gradient", "steps": 2}
    _, one = mm.sample(net, 1, guidance=0.0, **longer)
    _, two = mm.sample(net, 1, guidance=5.0, **longer)
    assert one.shape == two.shape
    assert (one - two).abs().max() > 1e-6


@pytest.mark.parametrize("args,says", [
    ("--sr_size 40", "--sr_size must be a multiple of --size (16)"),
    ("--sr_size 8", "--sr_size must be a multiple of --size (16)"),
    ("--sr_mult 1,1,1,1,1,1,1 --sr_size 32", "and 64"),
    ("--stage four", "--stage"),
    ("--sr_steps 0", "too small"),
    ("--sr_mult 0", "must divide --width"),
    ("--sr_attention 16", "factors [1, 2]"),
    ("--sr_batch_size 6 --sr_grad_accum 4", "does not divide by 4"),
])
def test_wrong_sr_options_end_in_one_sentence(args, says, tmp_path):
    with pytest.raises(SystemExit) as stop:
        mm.main([*TINY_SR, "--out", str(tmp_path / "out"), *args.split()])
    assert says in stop.value.code
    assert "\n" not in stop.value.code
    assert not (tmp_path / "out").exists()


def test_nearest_finds_copies(base, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    cfg = tiny("--steps", "10")
    shape = (cfg.frames, cfg.size, cfg.fps, cfg.rate)
    train = data.open_dataset("toy", "train", *shape)
    val = data.open_dataset("toy", "val", *shape)
    copies = [train[7], train[31]]
    video = torch.stack([torch.as_tensor(clip["video"]) for clip in copies])
    audio = torch.stack([torch.as_tensor(clip["audio"]) for clip in copies])
    large = video.repeat_interleave(2, 2).repeat_interleave(2, 3)  # as after --sr_ckpt
    for v in (video, large):
        sample.nearest(v, audio, cfg, train, val, 2000)
        lines = capsys.readouterr().out.splitlines()
        assert len(lines) == 2
        for line in lines:
            assert "000 to clip 7, 0.0; 001 to clip 31, 0.0" in line
            assert "nearest of 40 training clips" in line  # which ten steps of four saw
            assert float(re.search(r"median ([\d.]+)", line)[1]) > 1
    sample.nearest(None, audio[:, :800], cfg, train, val, 20)
    printed = capsys.readouterr().out
    assert "audio, dB (RMS) to the nearest of 20 training clips" in printed
    sample.main([*base, "--nearest", "toy", "--out", "near"])
    assert "nearest of 8 training clips" in capsys.readouterr().out
    assert Path("near/index.html").exists()


# ---- Precision


@pytest.mark.parametrize("method", ["replace", "gradient", "released"])
def test_gradients_are_taken_in_float32(method):
    """They would be lost below fp16's least number; the rest is as --amp says."""
    model = net_of(tiny("--amp", "bf16"))
    inside = set()
    model.register_forward_pre_hook(lambda *_: inside.add(torch.is_autocast_enabled("cpu")))
    _, audio = given_clip(model.cfg)
    mm.sample(model, 1, audio=audio, method=method)
    assert inside == {method == "replace"}


@pytest.mark.parametrize("stage", ["base", "sr"])
@pytest.mark.parametrize("dtype,tolerance", [(torch.bfloat16, 0.02), (torch.float16, 0.003)])
def test_losses_are_nearly_the_same_in_low_precision(dtype, tolerance, stage):
    if stage == "base":
        cfg = tiny()
        net = net_of(cfg)
    else:
        cfg = tiny_sr("--sr_attention", "2")
        net = sr_net_of(cfg)
    process = mm.build_process(cfg)
    batch = batch_of(cfg)
    with torch.no_grad():
        full, _ = process.loss(net, batch)
        with torch.autocast("cpu", dtype):
            half, _ = process.loss(net, batch)
    assert half.dtype == torch.float32
    assert abs(half - full) < tolerance * full
