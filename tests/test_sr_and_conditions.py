"""mm_diffusion.py and sample.py: super-resolution, conditioning on a given stream, longer clips, nearest clips."""
import math
import re
from pathlib import Path

import imageio.v2 as imageio
import pytest
import torch
import torch.nn.functional as F
from test_mm_diffusion import TINY, batch_of, net_of, same, tiny, weights

import data
import mm_diffusion as mm
import sample

TINY_SR = ("--stage sr --preset toy --data toy --size 16 --sr_size 32 --width 8 --mult 1,2 --norm_groups 4 --heads 2 "
           "--batch_size 4 --lr 1e-3 --lr_end 1 --warmup 0 --val_clips 4 --workers 0 --samples 2 --log_every 1 "
           "--val_every 1000 --sample_every 1000 --save_every 1000 --sr_steps 2").split()


def tiny_sr(*more):
    return mm.parse([*TINY_SR, *more])


def sr_net_of(cfg, seed=0):
    """A super-resolution network whose every parameter is random."""
    torch.manual_seed(seed)
    net = mm.SRUNet(cfg)
    with torch.no_grad():
        for p in net.parameters():
            if p.abs().max() == 0:
                p.normal_(0, 0.1)
    return net.eval()


def sr_batch(cfg, B=4):
    return data.to_device(next(data.loader(mm.open_clips(cfg, "train"), B, 0, 1)), "cpu")


# ---- super-resolution: data

def test_low_frames_are_means_degraded_as_the_clip_number_tells():
    cfg, plain = tiny_sr("--augment", "1"), mm.open_clips(tiny_sr("--augment", "0"), "train")
    clips, val = mm.open_clips(cfg, "train"), mm.open_clips(cfg, "val")
    one, two, clean = clips[5], clips[5], plain[5]
    assert all((one[k] == two[k]).all() for k in ("video", "low")) and len(clips) == len(plain)
    assert (one["video"] == clean["video"][:, :, ::-1]).all()                  # mirrored
    mean = clean["video"][0].reshape(16, 2, 16, 2, 3).mean((1, 3))
    assert clean["low"].shape == (1, 3, 16, 16) and clean["low"].dtype.name == "float32"
    assert abs((clean["low"][0].transpose(1, 2, 0) + 1) * 127.5 - mean).max() < 1e-3
    assert 0.002 < abs(one["low"][0] - clean["low"][0, :, :, ::-1]).mean() < 0.4          # noise and JPEG
    assert abs(val[3]["low"].reshape(3, -1).mean(1) - val[3]["video"].reshape(-1, 3).mean(0) / 127.5 + 1).max() < 1e-4
    mirrored = [(mm.open_clips(tiny_sr(), "train")[i]["video"] != plain[i]["video"]).any() for i in range(40)]
    assert 8 < sum(mirrored) < 32                                              # p = 0.5


# ---- super-resolution: loss

def adm_variational(process, x0, eps, out, v, t):
    """The term as guided-diffusion writes it (its gaussian_diffusion.py and losses.py), in bits, per frame."""
    beta, abar = process.betas, process.abar
    before = torch.cat([torch.ones(1, dtype=torch.float64), abar[:-1]])
    variance = beta * (1 - before) / (1 - abar)
    clipped = torch.cat([variance[1:2], variance[1:]]).log()
    c1, c2 = beta * before.sqrt() / (1 - abar), (1 - before) * (1 - beta).sqrt() / (1 - abar)
    c1, c2, clipped, high, abar = (y[t].view(-1, 1, 1, 1) for y in (c1, c2, clipped, beta.log(), abar))
    x0, eps, out, v = (y.double() for y in (x0, eps, out, v))
    xt = abar.sqrt() * x0 + (1 - abar).sqrt() * eps
    mean, log_var = c1 * x0 + c2 * xt, (v + 1) / 2 * high + (1 - (v + 1) / 2) * clipped
    guess = c1 * (xt - (1 - abar).sqrt() * out) / abar.sqrt() + c2 * xt
    kl = 0.5 * (log_var - clipped - 1 + (clipped - log_var).exp() + (mean - guess) ** 2 * (-log_var).exp())

    def cdf(x):
        return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x ** 3)))

    above, below = (cdf((x0 - guess + d / 255) * (-log_var / 2).exp()) for d in (1, -1))
    chance = torch.where(x0 < -0.999, above, torch.where(x0 > 0.999, 1 - below, above - below))
    return torch.where(t.view(-1, 1, 1, 1) == 0, -chance.clamp(min=1e-12).log(), kl).mean((1, 2, 3)) / math.log(2)


def test_the_variational_term_is_that_of_adm_and_trains_the_variance_alone():
    process, g = mm.SRDiffusion(mm.Config()), torch.Generator().manual_seed(0)
    x0 = torch.rand(6, 3, 8, 8, generator=g) * 2 - 1
    x0[:, :, 0], x0[:, :, 1] = 1, -1             # the outermost gray levels
    eps, v = torch.randn(x0.shape, generator=g), 0.5 * torch.randn(x0.shape, generator=g)
    out, t = eps + 0.1 * torch.randn(x0.shape, generator=g), torch.tensor([0, 0, 1, 10, 500, 999])
    ours = process.variational(x0, eps, out, v, t).mean((1, 2, 3))
    assert torch.allclose(ours.double(), adm_variational(process, x0, eps, out, v, t), rtol=1e-3)    # its cdf: a tanh
    assert torch.allclose(ours[2:].double(), adm_variational(process, x0, eps, out, v, t)[2:], rtol=1e-4)
    cfg = tiny_sr("--sr_residual", "0", "--augment", "0")
    net, batch = sr_net_of(cfg), sr_batch(cfg)
    loss, parts = mm.SRDiffusion(cfg).loss(net, batch)
    u, noise = mm.SRDiffusion(cfg).noise(batch["key"], {"v": (3, 32, 32)}, torch.device("cpu"))
    t = (u * 1000).long()
    abar = process.abar.float()[t].view(-1, 1, 1, 1)
    x0 = batch["video"][:, 0]
    got = net(abar.sqrt() * x0 + (1 - abar).sqrt() * noise["v"], batch["low"][:, 0], t)
    mse = (got[:, :3] - noise["v"]).square().mean()
    vb = adm_variational(process, x0, noise["v"], got[:, :3].detach(), got[:, 3:], t).mean()
    assert parts["mse"].item() == pytest.approx(mse.item(), rel=1e-5)
    assert parts["vb"].item() == pytest.approx(vb.item(), rel=1e-3)
    assert loss.item() == pytest.approx((mse + vb).item(), rel=1e-3)
    grads = [torch.autograd.grad(x, net.out[2].weight, retain_graph=True)[0] for x in (loss, mse)]
    assert torch.allclose(grads[0][:3], grads[1][:3], atol=1e-6)               # the noise's half sees the mse alone
    assert grads[0][3:].abs().max() > 1e-6


def test_the_residual_is_diffused_around_the_bicubic_frame():
    cfg = tiny_sr("--sr_residual", "0.05", "--augment", "0")
    process, batch = mm.SRDiffusion(cfg), sr_batch(cfg)
    low, x0 = batch["low"][:, 0], batch["video"][:, 0]
    bicubic = F.interpolate(low, (32, 32), mode="bicubic")

    def oracle(x, low, t):                       # knows the frame: what c_skip leaves of it, over c_out
        noise = 1 / process.abar.float()[t].view(-1, 1, 1, 1) - 1
        var, y = 0.05 ** 2, x * (1 + noise).sqrt()
        out = (x0 - bicubic - var / (var + noise) * y) / (var * noise / (var + noise)).sqrt()
        return torch.cat([out, torch.zeros_like(x)], 1)

    u = torch.tensor([0.1, 0.4, 0.7, 0.99])
    assert process.loss(oracle, {**batch, "u": u})[1]["mse"].item() < 1e-3
    silent = process.loss(lambda x, low, t: torch.zeros(len(x), 6, *x.shape[2:]), {**batch, "u": u})[1]["mse"].item()
    assert 0.01 < silent < 10                    # of the order of 1 at all noise levels
    oracle.cfg = cfg
    frames = mm.upsample(oracle, low, torch.randn(3, 32, 32), 5)
    assert (frames - x0).abs().max() < 1e-3 + max(0, (x0 - bicubic).abs().max().item() - 1)     # but for the clamp


# ---- super-resolution: network, training, use

def test_a_fresh_sr_network_outputs_zero_and_checkpointing_changes_nothing():
    cfg, grads = tiny_sr("--video_attention", "1,2"), []
    x, low, t = torch.randn(2, 3, 32, 32), torch.randn(2, 3, 16, 16), torch.tensor([3, 700])
    assert mm.SRUNet(cfg)(x, low, t).abs().max() == 0
    for c in (cfg, tiny_sr("--video_attention", "1,2", "--checkpoint", "true")):
        net = sr_net_of(c)
        net(x, low, t).square().mean().backward()
        grads.append(torch.cat([p.grad.flatten() for p in net.parameters()]))
    assert (grads[0] - grads[1]).abs().max() < 1e-6


@pytest.fixture(scope="module")
def trained_sr(tmp_path_factory):
    out = tmp_path_factory.mktemp("trained_sr")
    mm.main([*TINY_SR, "--steps", "4", "--out", str(out)])
    return out


def test_sr_trains_resumes_to_the_bit_and_shows_frames(trained_sr, tmp_path, capsys):
    for steps in ("2", "4"):
        mm.main([*TINY_SR, "--steps", steps, "--out", str(tmp_path)])
    assert same(weights(tmp_path), weights(trained_sr)) and same(weights(tmp_path, "ema"), weights(trained_sr, "ema"))
    printed = capsys.readouterr().out
    assert len(re.findall(r"PSNR of 4 validation frames: [\d.]+ dB, bicubic [\d.]+ dB", printed)) == 2
    assert "--sr_ckpt" in printed and (tmp_path / "samples" / "step000004_0.mp4").exists()
    with pytest.raises(SystemExit, match="--stage sr, not base|--[a-z_]+ .*, not "):
        mm.main([*TINY, "--steps", "4", "--out", str(tmp_path)])
    assert mm.parse(["--stage", "sr", "--preset", "toy"]).out == "out/mm_diffusion/toy/sr"


def test_compare_measures_psnr(trained_sr):
    model = mm.load(trained_sr / "ckpt.pt")
    val = mm.open_clips(model.cfg, "val")
    clip, ours, cubic = mm.compare(model, val, 3)
    assert clip.shape == (1, 3, 32, 96, 3) and clip.dtype == torch.uint8 and ours > 0
    batch = data.val_batches(val, 3, 3)[0]
    mse = (clip[0, :, :, :32].float() - batch["video"][:, 0].float()).square().flatten(1).mean(1)
    assert cubic == pytest.approx((10 * (255 ** 2 / mse).log10()).mean().item(), abs=0.05)
    assert torch.equal(clip[0, :, :, 64:], batch["video"][:, 0])


def test_all_frames_of_a_clip_start_from_one_noise_image():
    net = sr_net_of(tiny_sr())
    low, noise = torch.rand(1, 3, 16, 16).expand(3, -1, -1, -1), torch.randn(2, 3, 32, 32)
    frames = mm.upsample(net, low, noise[0], 3)
    assert frames.shape == (3, 3, 32, 32) and (frames[0] - frames[2]).abs().max() < 1e-5
    assert (mm.upsample(net, low[:1], noise[0], 3) - frames[:1]).abs().max() < 1e-5
    assert (mm.upsample(net, low[:1], noise[1], 3) - frames[:1]).abs().max() > 1e-3


def test_released_files_from_end_to_end(tmp_path, monkeypatch):
    """A base file in half precision and an SR file in single, both bare state dicts -> sample.py -> mp4 at 64."""
    monkeypatch.chdir(tmp_path)
    base, sr = net_of(tiny("--size", "32")), sr_net_of(mm.parse(["--stage", "sr", "--preset", "toy"]))
    torch.save({k: p.half() for k, p in base.state_dict().items()}, "ema_0.9999_100000.pt")
    torch.save(sr.state_dict(), "ema_0.9999_270000.pt")
    args = ["--model", "mm_diffusion", "--ckpt", "ema_0.9999_100000.pt", "--n", "1", "--device", "cpu", "--steps", "2"]
    for sr_ckpt, size in (([], 32), (["--sr_ckpt", "ema_0.9999_270000.pt", "--sr_steps", "2"], 64)):
        out = f"clips{size}"
        sample.main([*args, *TINY, "--size", "32", *sr_ckpt, "--out", out])
        video, _ = data.load_clip(f"{out}/000.mp4", 4, size, 10, 4000)
        assert video.shape == (4, size, size, 3)
    assert imageio.get_reader("clips64/000.mp4").get_meta_data()["size"] == (64, 64)
    for wrong, says in (("nowhere.pt", "no checkpoint nowhere.pt"), ("ema_0.9999_100000.pt", "fits no preset")):
        with pytest.raises(SystemExit, match=says):
            sample.main([*args, *TINY, "--size", "32", "--sr_ckpt", wrong])
    with pytest.raises(SystemExit, match="does not enlarge frames of 16 pixels"):
        model = net_of(tiny())
        torch.save(model.state_dict(), "small.pt")
        sample.main([*args[:2], "--ckpt", "small.pt", *args[4:], *TINY, "--sr_ckpt", "ema_0.9999_270000.pt"])
    with pytest.raises(SystemExit, match="give it as --sr_ckpt"):
        sample.main(["--model", "mm_diffusion", "--ckpt", "ema_0.9999_270000.pt", "--device", "cpu"])


# ---- conditioning

def given_clip(cfg):
    clip = data.open_dataset("toy:bounce", "val", cfg.frames, cfg.size, cfg.fps, cfg.rate)[0]
    return torch.as_tensor(clip["video"]), torch.as_tensor(clip["audio"])


@pytest.mark.parametrize("method", ["replace", "gradient", "released"])
@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
def test_the_given_stream_comes_back_and_steers_the_other(method, sampler):
    cfg = tiny("--diffusion_steps", "25")
    model = net_of(cfg)
    video, audio = given_clip(cfg)
    options = dict(steps=4, seed=3, sampler=sampler, method=method, guidance=None if method == "replace" else 0.01)
    v, a = mm.sample(model, 2, video=video.numpy(), **options)
    assert torch.equal(v, video.expand(2, -1, -1, -1, -1)) and a.shape == (2, 1600) and a.isfinite().all()
    again = mm.sample(model, 2, video=video.expand(2, -1, -1, -1, -1), batch_size=1, **options)[1]
    assert (a - again).abs().max() < 1e-3        # clip 1 does not depend on clip 0
    assert (mm.sample(model, 1, video=255 - video, **options)[1] - a[:1]).abs().max() > 1e-4
    v, a = mm.sample(model, 1, audio=audio, **options)
    assert v.shape == (1, 4, 16, 16, 3) and (a[0] - audio).abs().max() < 1e-6


@pytest.mark.parametrize("method", ["gradient", "released"])
def test_guidance_is_eq_12(method):
    """One step by hand, for a network of which the gradient is known: its v part answers to a as 0.3 a."""
    process, guidance = mm.Diffusion(mm.Config(diffusion_steps=50)), 0.2
    g = torch.Generator().manual_seed(0)
    x = {"v": torch.randn(2, 1, 1, 2, 2, generator=g), "a": torch.randn(2, 1, 4, generator=g)}
    v0, draws = 0.1 * torch.randn(2, 1, 1, 2, 2, generator=g), []

    def noise_like(y):
        draws.append(torch.randn(y.shape, generator=g))
        return draws[-1]

    def eps_fn(x, t):                            # keeps the x_0 estimate inside [-1, 1]
        return {"v": x["v"] + 0.01 * 0.3 * x["a"].view(2, 1, 1, 2, 2), "a": x["a"] * 1.0}

    process.abar = process.abar[[20, 40]]        # two noise levels: a step, and the last one
    process.T = 2
    seen = []
    out = mm.walk(lambda *a: seen.append(mm.ddim_step(*a)) or seen[-1], eps_fn, x, process, noise_like, 2,
                  {"v": v0}, method, guidance)
    low, high = (float(y) for y in process.abar)
    start, goal = draws[:2] if method == "gradient" else (x["v"], x["v"])
    v1 = high ** 0.5 * v0 + (1 - high) ** 0.5 * start
    a = x["a"].view(2, 1, 1, 2, 2).clone().requires_grad_()
    guess = (v1 - (1 - high) ** 0.5 * (v1 + 0.003 * a)) / high ** 0.5
    assert guess.abs().max() < 1
    noise = (v1 - high ** 0.5 * guess) / (1 - high) ** 0.5
    y = low ** 0.5 * guess + (1 - low) ** 0.5 * noise
    error = (y - low ** 0.5 * v0 - (1 - low) ** 0.5 * goal).square()
    if method == "gradient":
        move = (1 - low) ** 0.5 * torch.autograd.grad(error.sum(), a)[0]
    else:
        move = high ** 0.5 * torch.autograd.grad(error.sum() / 4, a)[0]
    a1 = seen[0]["a"].view(2, 1, 1, 2, 2) - guidance * move
    assert move.abs().max() > 1e-6
    # the last step is not guided: what comes out is the x_0 estimate from a1
    want = ((a1 - (1 - low) ** 0.5 * a1) / low ** 0.5).clamp(-1, 1)
    assert (out["a"].view(2, 1, 1, 2, 2) - want).abs().max() < 1e-6


def test_replacement_draws_the_noise_anew_in_each_step():
    process = mm.Diffusion(mm.Config(diffusion_steps=50))
    x, known, seen = {"v": torch.randn(1, 2, 3, 4, 4), "a": torch.randn(1, 1, 8)}, torch.full((1, 2, 3, 4, 4), 0.5), []

    def eps_fn(x, t):
        abar = float(process.abar[t])
        seen.append(((x["v"] - abar ** 0.5 * known) / (1 - abar) ** 0.5).detach())
        return {k: y + x["a"].mean() for k, y in x.items()}      # each stream sees the other

    g = torch.Generator().manual_seed(0)
    mm.SAMPLERS["ddim"](eps_fn, x, process, lambda y: torch.randn(y.shape, generator=g), 5, {"v": known}, "replace", 0)
    noise = torch.stack(seen)
    assert 0.8 < noise.std() < 1.2 and abs(torch.corrcoef(noise.flatten(1))).fill_diagonal_(0).max() < 0.4
    mm.SAMPLERS["ddim"](eps_fn, x, process, None, 5, {"v": known}, "released", 0)
    assert all((y - x["v"]).abs().max() < 1e-3 for y in seen[5:])              # always that of x_T


# ---- longer clips

def test_a_longer_clip_goes_on_from_its_windows():
    model = net_of(tiny())
    window = mm.sample(model, 2, steps=3, seed=5)
    video, audio = mm.sample(model, 2, steps=3, seed=5, seconds=0.9)
    assert video.shape == (2, 9, 16, 16, 3) and audio.shape == (2, 3600)
    assert torch.equal(video[:, :4], window[0]) and torch.equal(audio[:, :1600], window[1])
    again = mm.sample(model, 1, steps=3, seed=5, seconds=0.9, batch_size=1)
    assert (again[0].int() - video[:1].int()).abs().max() <= 1 and (again[1] - audio[:1]).abs().max() < 1e-4
    assert mm.sample(model, 1, steps=3, seconds=0.2)[0].shape == (1, 2, 16, 16, 3)        # a part of a window
    other = mm.sample(model, 1, steps=3, seed=6, seconds=0.9)
    assert (other[1] - audio[:1]).abs().max() > 1e-2


def test_the_second_window_is_given_the_last_half_of_the_first(monkeypatch):
    model, given = net_of(tiny()), []
    walk = mm.SAMPLERS["ddim"]
    monkeypatch.setitem(mm.SAMPLERS, "ddim", lambda *args: given.extend(args[5:6]) or walk(*args))
    video, audio = mm.sample(model, 1, steps=3, seconds=0.8)
    assert [y["v"].shape[1] for y in given] == [2, 2] and [y["a"].shape[2] for y in given] == [800, 800]
    for i, y in enumerate(given):                # frames 2-3, then 4-5
        at = slice(2 + 2 * i, 4 + 2 * i)
        assert torch.equal(data.to_uint8(y["v"]), video[:, at])
        assert torch.equal(y["a"][0, 0].clamp(-1, 1), audio[0, at.start * 400:at.stop * 400])


# ---- the command line

@pytest.fixture(scope="module")
def base(tmp_path_factory):
    out = tmp_path_factory.mktemp("base")
    mm.main([*TINY, "--steps", "2", "--out", str(out)])
    return ["--model", "mm_diffusion", "--ckpt", str(out / "ckpt.pt"), "--device", "cpu", "--n", "2", "--steps", "2"]


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
    assert abs(got.astype(int) - want).mean() < 6 and sound is not None
    sample.main([*base, "--audio", "in.wav", "--out", "a", "--method", "gradient", "--guidance", "0.01"])
    assert "in.wav, from 0 s on" in capsys.readouterr().out
    assert "--method gradient" in Path("a/index.html").read_text() and Path("a/001.mp4").exists()
    sample.main([*base, "--seconds", "0.7", "--out", "long"])
    assert data.load_clip("long/000.mp4", 7, 16, 10, 4000)[0].shape == (7, 16, 16, 3)
    for args, says in ((["--video", "in.mp4", "--audio", "in.wav"], "not both"),
                       (["--video", "in.mp4", "--start", "1.8"], "in.mp4 is too short: 0.4 s are needed from 1.8 s on"),
                       (["--audio", "mute.mp4"], "mute.mp4 has no audio"), (["--video", "in.wav"], "has no video"),
                       (["--video", "in.mp4", "--seconds", "2"], "without --seconds"),
                       (["--guidance", "3"], "Guidance is for a given"), (["--method", "magic"], "--method"),
                       (["--video", "in.mp4", "--guidance", "3"], "--method gradient"),
                       (["--nearest", "nothing"], "no data set 'nothing'"),
                       (["--sr_ckpt", "no.pt"], "There is no checkpoint no.pt")):
        with pytest.raises(SystemExit) as stop:
            sample.main([*base, *args])
        assert says in stop.value.code and "\n" not in stop.value.code, args
    assert not Path("out").exists()


def test_single_streams_take_no_condition():
    for streams, other in (("v", "audio"), ("a", "video")):
        cfg = tiny("--streams", streams)
        clip = dict(zip(("video", "audio"), given_clip(cfg), strict=True))
        with pytest.raises(data.UserError, match="to a model of both streams"):
            mm.sample(net_of(cfg), 1, **{other: clip[other]})


def test_a_condition_has_the_length_of_a_window_and_guidance_a_use():
    cfg = tiny()
    net, (video, audio) = net_of(cfg), given_clip(cfg)
    for given in ({"video": video[:2]}, {"audio": audio[:-1]}, {"video": torch.stack([video] * 3)}):
        with pytest.raises(data.UserError, match="Give one window, or 2 of them"):
            mm.sample(net, 2, **given)
    with pytest.raises(data.UserError, match="Guidance is for"):
        mm.sample(net, 1, guidance=0.5, method="gradient")
    two = [mm.sample(net, 1, seconds=0.6, method="gradient", guidance=g, steps=2)[1] for g in (0.0, 5.0)]
    assert two[0].shape == two[1].shape and (two[0] - two[1]).abs().max() > 1e-6


@pytest.mark.parametrize("args,says", [
    ("--sr_size 40", "--sr_size 40 must be a multiple of --size 16"), ("--sr_size 8", "multiple of --size 16"),
    ("--mult 1,1,1,1,1,1,1 --sr_size 32", "--sr_size must divide by 64"), ("--stage four", "--stage"),
    ("--sr_steps 0", "too small"),
])
def test_wrong_sr_options_end_in_one_sentence(args, says):
    with pytest.raises(SystemExit) as stop:
        tiny_sr(*args.split())
    assert says in stop.value.code and "\n" not in stop.value.code


def test_nearest_finds_copies(base, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    cfg = tiny("--steps", "10")
    train, val = (data.open_dataset("toy", s, cfg.frames, cfg.size, cfg.fps, cfg.rate) for s in ("train", "val"))
    copies = [train[7], train[31]]
    video, audio = (torch.stack([torch.as_tensor(c[k]) for c in copies]) for k in ("video", "audio"))
    large = video.repeat_interleave(2, 2).repeat_interleave(2, 3)              # as after --sr_ckpt
    for v in (video, large):
        sample.nearest(v, audio, cfg, train, val, 2000)
        lines = capsys.readouterr().out.splitlines()
        assert len(lines) == 2 and all("000 to clip 7, 0.0; 001 to clip 31, 0.0" in x for x in lines)
        assert all("nearest of 40 training clips" in x for x in lines)         # those that ten steps of four saw
        assert all(float(re.search(r"median ([\d.]+)", x)[1]) > 1 for x in lines)
    sample.nearest(None, audio[:, :800], cfg, train, val, 20)
    assert "audio, dB (RMS) to the nearest of 20 training clips" in capsys.readouterr().out
    sample.main([*base, "--nearest", "toy", "--out", "near"])
    assert "nearest of 8 training clips" in capsys.readouterr().out and Path("near/index.html").exists()


# ---- precision

@pytest.mark.parametrize("dtype,tolerance", [(torch.bfloat16, 0.02), (torch.float16, 0.003)], ids=["bf16", "fp16"])
def test_both_losses_are_nearly_the_same_in_low_precision(dtype, tolerance):
    cfg, cfg_sr = tiny(), tiny_sr("--video_attention", "2")
    for process, net, batch in ((mm.Diffusion(cfg), net_of(cfg), batch_of(cfg)),
                                (mm.SRDiffusion(cfg_sr), sr_net_of(cfg_sr), sr_batch(cfg_sr))):
        with torch.no_grad():
            full, _ = process.loss(net, batch)
            with torch.autocast("cpu", dtype):
                half, _ = process.loss(net, batch)
        assert half.dtype == torch.float32 and abs(half - full) < tolerance * full
