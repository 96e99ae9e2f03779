"""mm_diffusion.py and sample.py: the network, the loss, training, resuming, sampling, and what users do wrong."""
import csv
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import data
import mm_diffusion as mm
import sample

ROOT = Path(__file__).parent.parent
torch.set_num_threads(1)         # as the processes started below: sums are to agree to the last bit
TINY = ("--preset toy --data toy --frames 4 --size 16 --rate 4000 --width 8 --mult 1,2 --norm_groups 4 --heads 2 "
        "--cross_head_dim 8 --video_attention 2 --cross_attention 2 --windows 2 --random_shift true --batch_size 4 "
        "--lr 1e-3 --warmup 0 --val_clips 2 --workers 0 --samples 1 --log_every 1 --val_every 1000 --sample_every 1000 "
        "--save_every 1000").split()


def tiny(*more):
    return mm.parse([*TINY, *more])


def net_of(cfg, seed=0):
    """A network whose every parameter is random: the zeroed ones would hide what is behind them."""
    torch.manual_seed(seed)
    net = mm.CoupledUNet(cfg)
    with torch.no_grad():
        for p in net.parameters():
            if p.abs().max() == 0:
                p.normal_(0, 0.1)
    return net.eval()


def noisy(cfg, B=2):
    g = torch.Generator().manual_seed(1)
    return (torch.randn(B, cfg.frames, 3, cfg.size, cfg.size, generator=g),
            torch.randn(B, 1, cfg.frames * cfg.rate // cfg.fps, generator=g), torch.tensor([10, 900])[:B])


def batch_of(cfg, B=4):
    ds = data.open_dataset("toy", "train", cfg.frames, cfg.size, cfg.fps, cfg.rate)
    return data.to_device(next(data.loader(ds, B, 0, 1)), "cpu")


def start(*args, cwd, launcher=(sys.executable,)):
    return subprocess.Popen([*launcher, str(ROOT / "mm_diffusion.py"), *args], cwd=cwd, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1"})


def run(*args, **where):
    """Run mm_diffusion.py to its end -> exit code, stdout, stderr."""
    process = start(*args, **where)
    out, err = process.communicate(timeout=240)
    return process.returncode, out, err


def torchrun(n):
    return (sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={n}")


def weights(folder, which="model"):
    return torch.load(Path(folder) / "ckpt.pt", weights_only=True)[which]


def same(one, two, tol=0.0):
    return one.keys() == two.keys() and all((one[k] - two[k]).abs().max() <= tol for k in one)


# ---- the network

def test_a_fresh_network_outputs_zero_so_the_first_loss_is_two():
    cfg = tiny("--prediction", "eps")
    net = mm.CoupledUNet(cfg)
    v, a = net(*noisy(cfg))
    assert v.shape == (2, 4, 3, 16, 16) and a.shape == (2, 1, 1600) and v.abs().max() == a.abs().max() == 0
    loss, parts = mm.Diffusion(cfg).loss(net, batch_of(cfg))
    assert loss.item() == pytest.approx(2, abs=0.05) and parts["audio"].item() == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("L", [24, 26])        # 6 tokens a frame; 6 and a remainder of 2 for the last segment
@pytest.mark.parametrize("S,R", [(1, 0), (2, 0), (2, 1), (4, 0)])
def test_cross_attention_is_eq_8_token_by_token(L, S, R):
    cfg = tiny()
    block = mm.CrossAttention(8, cfg, S)
    with torch.no_grad():
        for p in block.parameters():
            p.normal_(0, 0.5)
    torch.manual_seed(0)
    frames, P = 4, 9
    v, a = torch.randn(1, frames, 3, 3, 8), torch.randn(1, L, 8)
    got_v, got_a = block(v, a, torch.tensor(R))
    def project(x, layer):
        return F.linear(x, layer.weight.flatten(1), layer.bias)

    vq, vk, vv = project(block.v_norm(v), block.v_qkv).view(frames * P, 24).chunk(3, -1)
    aq, ak, av = project(block.a_norm(a), block.a_qkv)[0].chunk(3, -1)
    n = L // frames
    hv, ha = torch.zeros(frames * P, 8), torch.zeros(L, 8)
    for i in range(frames):
        tokens = [((i + R) * n + k) % L for k in range(S * n)]
        hv[i * P:(i + 1) * P] = torch.softmax(vq[i * P:(i + 1) * P] @ ak[tokens].T / 8 ** 0.5, -1) @ av[tokens]
        pixels = [((i + R) * P + k) % (frames * P) for k in range(S * P)]
        own = slice(i * n, (i + 1) * n if i < frames - 1 else L)
        ha[own] = torch.softmax(aq[own] @ vk[pixels].T / 8 ** 0.5, -1) @ vv[pixels]
    want_v = v + project(hv, block.video_proj_out.video_conv).view(v.shape)
    want_a = a + project(ha, block.audio_proj_out.audio_conv)
    assert (got_v - want_v).abs().max() < 1e-5 and (got_a - want_a).abs().max() < 1e-5


def test_shifts_lie_in_range_follow_the_generator_and_matter():
    cfg = tiny("--windows", "1")
    net = net_of(cfg)
    draws = torch.stack([net.draw_shifts(4, torch.Generator().manual_seed(i)) for i in range(200)])
    assert set(draws.flatten().tolist()) == {0, 1, 2, 3}
    assert torch.equal(net.draw_shifts(4, torch.Generator().manual_seed(3)), draws[3])
    x = noisy(cfg)
    with torch.no_grad():
        one, two = net(*x, torch.zeros(3, dtype=torch.long)), net(*x, torch.ones(3, dtype=torch.long))
    assert (one[0] - two[0]).abs().max() > 1e-4
    assert net_of(tiny("--random_shift", "false")).draw_shifts(4).tolist() == [0, 0, 0]


def test_late_upsampling_is_the_same_arithmetic():
    cfg = tiny()
    block = mm.ResBlock(16, 16, cfg, 4, "up")
    with torch.no_grad():
        for p in block.parameters():
            p.normal_(0, 0.3)
    v, a, emb = torch.randn(2, 4, 8, 8, 16), torch.randn(2, 400, 16), torch.randn(2, 8)
    late = block(v, a, emb)
    block.dropout = 1.0                          # takes the road of training with dropout; the layers' own rate stays 0
    early = block.train()(v, a, emb)
    assert late[0].shape == (2, 4, 16, 16, 16) and late[1].shape == (2, 1600, 16)
    assert all((x - y).abs().max() < 1e-5 for x, y in zip(late, early, strict=True))


def test_checkpointing_and_any_batch_size_change_nothing():
    cfg, saving = tiny(), tiny("--checkpoint", "true")
    x, shifts, grads = noisy(cfg), torch.tensor([1, 0, 2]), []
    for c in (cfg, saving):
        net = net_of(c)
        v, a = net(*x, shifts)
        (v.square().mean() + a.square().mean()).backward()
        grads.append(torch.cat([p.grad.flatten() for p in net.parameters()]))
    assert (grads[0] - grads[1]).abs().max() < 1e-6
    one = net_of(cfg)(*(y[:1] for y in x), shifts)
    assert (one[0] - v[:1]).abs().max() < 1e-5 and (one[1] - a[:1]).abs().max() < 1e-5


@pytest.mark.parametrize("streams,other", [("v", "audio"), ("a", "video")])
def test_single_streams_have_only_their_parameters_and_train(streams, other, tmp_path):
    cfg = tiny("--streams", streams)
    names = [k for k, _ in mm.CoupledUNet(cfg).named_parameters()]
    assert not [k for k in names if other in k or k.split(".")[2:3] in (["v_qkv"], ["a_qkv"])]
    both = sum(p.numel() for p in mm.CoupledUNet(tiny()).parameters())
    assert names and sum(p.numel() for p in mm.CoupledUNet(cfg).parameters()) < both
    mm.main([*TINY, "--streams", streams, "--steps", "2", "--out", str(tmp_path)])
    video, audio = mm.sample(mm.load(tmp_path / "ckpt.pt"), 1, steps=2)
    assert (audio is None) == (streams == "v") and (video is None) == (streams == "a")
    assert (tmp_path / "samples" / f"step000002_0.{'mp4' if streams == 'v' else 'wav'}").exists()


# ---- the loss

def test_noise_belongs_to_the_clip_not_to_the_batch():
    process, shapes = mm.Diffusion(tiny()), {"v": (2, 3), "a": (5,)}
    u, eps = process.noise(torch.tensor([7, 8, 9]), shapes, torch.device("cpu"))
    u2, eps2 = process.noise(torch.tensor([9, 7]), shapes, torch.device("cpu"))
    assert torch.equal(u[[2, 0]], u2) and torch.equal(eps["v"][[2, 0]], eps2["v"])
    assert (eps["v"][0] != eps["v"][1]).all()


# eps; v, which is edm with mean 0 and deviation 1; and the toy preset's own
@pytest.mark.parametrize("prediction", ["eps", "edm --data_mean 0,0 --data_std 1,1 --skip_std 1,1", "edm"])
def test_a_perfect_prediction_has_no_loss_and_gives_the_noise_back(prediction):
    cfg = tiny("--prediction", *prediction.split())
    process, batch = mm.Diffusion(cfg), batch_of(cfg, 2)

    class Oracle(torch.nn.Module):               # knows the clean clip
        draw_shifts = staticmethod(lambda frames, generator=None: torch.zeros(0, dtype=torch.long))

        def forward(self, v, a, t, shifts):
            out = []
            for i, (x, x0) in enumerate(((v, batch["video"]), (a, batch["audio"]))):
                abar = process.abar.float()[t].view(-1, *[1] * (x.dim() - 1))
                eps, var, mean = (x - abar.sqrt() * x0) / (1 - abar).sqrt(), cfg.skip_std[i] ** 2, cfg.data_mean[i]
                noise = (1 - abar) / abar            # its variance beside the clip's
                skip, gain = var / (var + noise), (var * noise / (var + noise)).sqrt()
                edm = (x0 - mean - skip * (x / abar.sqrt() - mean)) / gain
                v_prediction = (1 - abar).sqrt() * x0 - abar.sqrt() * eps
                assert prediction.count(",") != 6 or torch.allclose(edm, v_prediction, atol=1e-3)
                out.append(eps if prediction == "eps" else edm)
            return out

    loss, parts = process.loss(Oracle(), {**batch, "u": torch.tensor([0.3, 0.8])})
    assert loss.item() < 1e-9 and parts["video"].item() < 1e-9
    eps = process.denoiser(Oracle(), None)
    noise = {"v": torch.randn_like(batch["video"]), "a": torch.randn_like(batch["audio"])}
    abar = float(process.abar[700])
    x = mm.mix((abar ** 0.5, {"v": batch["video"], "a": batch["audio"]}), ((1 - abar) ** 0.5, noise))
    out = eps(x, 700)
    assert (out["v"] - noise["v"]).abs().max() < 1e-4 and (out["a"] - noise["a"]).abs().max() < 1e-4
    for sampler in ("dpm", "dpm3", "ddim"):      # every solver walks from any noise to the one clean clip
        clean = mm.SAMPLERS[sampler](eps, dict(noise), process, None, 10)
        assert (clean["v"] - batch["video"]).abs().max() < 0.05, sampler


def test_edm_noise_levels_are_log_normal():
    """Half of them lie below exp(mean), a sixth above exp(mean + deviation)."""
    cfg, seen = tiny("--prediction", "edm", "--noise_levels", "0.5,1.5"), []
    process = mm.Diffusion(cfg)

    class Silent(torch.nn.Module):
        draw_shifts = staticmethod(lambda frames, generator=None: torch.zeros(0, dtype=torch.long))

        def forward(self, v, a, t, shifts):
            seen.extend((1 / process.abar[t] - 1).sqrt().log().tolist())
            return v, a

    batch = batch_of(cfg, 2)
    for key in range(0, 1000, 2):
        process.loss(Silent(), {**batch, "key": torch.tensor([key, key + 1])})
    levels = torch.tensor(seen)
    assert abs((levels < 0.5).float().mean() - 0.5) < 0.06 and abs((levels > 2.0).float().mean() - 0.159) < 0.05


# ---- training

def test_muon_moves_matrices_orthogonally_and_drops_bad_steps():
    torch.manual_seed(0)
    layer = torch.nn.Conv1d(8, 24, 3)
    before, bias = layer.weight.clone(), layer.bias.clone()
    optimizer = mm.Muon(layer.parameters(), lr=0.01, fused=True)
    layer(torch.randn(2, 8, 50)).square().mean().backward()
    gradients = [p.grad.clone() for p in layer.parameters()]
    optimizer.step()
    moved = (before - layer.weight).detach().flatten(1)                          # (24, 24)
    spread = torch.linalg.svdvals(moved) / (0.01 * 0.2 * 24 ** 0.5)
    assert 0.3 < spread.min() and spread.max() < 1.4     # the gradient's own spread is far wider:
    values = torch.linalg.svdvals(gradients[0].flatten(1))
    assert values.max() / values.min() > 20
    assert (moved * gradients[0].flatten(1)).sum() > 0                           # downhill
    assert torch.allclose((bias - layer.bias).abs(), torch.full((24,), 0.01), atol=1e-4)     # AdamW's first step
    before, state = layer.weight.clone(), optimizer.state[layer.weight]["exp_avg"].clone()
    layer.weight.grad = torch.full_like(layer.weight, float("nan"))
    optimizer.found_inf = torch.ones(())
    optimizer.step()
    assert torch.equal(before, layer.weight) and torch.equal(state, optimizer.state[layer.weight]["exp_avg"])


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Six steps of the tiny network, uninterrupted."""
    out = tmp_path_factory.mktemp("trained")
    mm.main([*TINY, "--steps", "6", "--out", str(out)])
    return out


def test_training_writes_a_log_samples_and_an_ema(trained):
    rows = list(csv.DictReader(open(trained / "log.csv")))
    assert [int(r["step"]) for r in rows] == list(range(7))
    assert float(rows[0]["val"]) > 0 and float(rows[6]["val"]) > 0 and rows[3]["val"] == "" and rows[0]["loss"] == ""
    quartiles = [float(rows[6][f"q{i}"]) for i in (1, 2, 3, 4)]
    assert sum(quartiles) / 4 == pytest.approx(float(rows[6]["val"]), rel=1e-4)
    assert float(rows[6]["val_video"]) + float(rows[6]["val_audio"]) == pytest.approx(float(rows[6]["val"]), rel=1e-4)
    video, audio = data.load_clip(trained / "samples" / "step000006_0.mp4", 4, 16, 10, 4000)
    assert video.shape == (4, 16, 16, 3) and audio.shape == (1600,)
    assert not same(weights(trained), weights(trained, "ema")) and (trained / "samples" / "step000006_0.png").exists()


def test_a_finished_run_makes_missing_samples_and_its_average_keeps_no_graph(trained, tmp_path, monkeypatch):
    kept = []
    monkeypatch.setattr(mm, "fit", lambda *args, fit=mm.fit: kept.append(fit(*args)) or kept[-1])
    shutil.copy(trained / "ckpt.pt", tmp_path)
    mm.main([*TINY, "--steps", "6", "--out", str(tmp_path)])
    assert (tmp_path / "samples" / "step000006_0.mp4").exists()
    mm.main([*TINY, "--steps", "2", "--out", str(tmp_path / "new")])
    assert not any(p.requires_grad or p.grad_fn for p in kept[1].parameters())


def test_the_loss_falls(tmp_path):
    mm.main([*TINY, "--steps", "40", "--out", str(tmp_path), "--val_clips", "8", "--lr", "3e-3"])
    val = [float(r["val"]) for r in csv.DictReader(open(tmp_path / "log.csv")) if r["val"]]
    assert val[-1] < 0.9 * val[0]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "Ctrl-C"])
def test_an_interrupted_run_goes_on_to_the_bit(number, trained, tmp_path):
    args = [*TINY, "--steps", "6", "--out", "run", "--workers", "2"]
    process = start(*args, cwd=tmp_path)
    log = tmp_path / "run" / "log.csv"
    while not (log.exists() and len(log.read_text().splitlines()) > 3):
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0 and "same command goes on" in out and "Traceback" not in err, err
    stopped = torch.load(tmp_path / "run" / "ckpt.pt", weights_only=True)["step"]
    assert 2 <= stopped < 6
    code, _, err = run(*args, cwd=tmp_path)
    assert code == 0, err
    for which in ("model", "ema"):
        assert same(weights(tmp_path / "run", which), weights(trained, which))
    losses = [[r["loss"] for r in csv.DictReader(open(p))] for p in (log, trained / "log.csv")]
    assert losses[0] == losses[1]


def test_two_processes_give_the_weights_of_one(trained, tmp_path):
    code, out, err = run(*TINY, "--steps", "6", "--out", str(tmp_path), cwd=tmp_path, launcher=torchrun(2))
    assert code == 0, err[-3000:]
    assert out.count("parameters on cpu") == 1
    assert same(weights(tmp_path), weights(trained), 1e-5)
    assert same(weights(tmp_path, "ema"), weights(trained, "ema"), 1e-5)


def test_gradient_accumulation_gives_the_same_weights(trained, tmp_path):
    mm.main([*TINY, "--steps", "6", "--out", str(tmp_path), "--grad_accum", "4"])
    assert same(weights(tmp_path), weights(trained), 1e-5)


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_low_precision_trains_nearly_the_same(amp, trained, tmp_path):
    mm.main([*TINY, "--steps", "6", "--out", str(tmp_path), "--amp", amp])
    rows = [csv.DictReader(open(p / "log.csv")) for p in (trained, tmp_path)]
    one, two = ([float(r["loss"]) for r in x if r["loss"]] for x in rows)
    assert all(abs(x - y) < 0.03 * x for x, y in zip(one, two, strict=True))
    state = torch.load(tmp_path / "ckpt.pt", weights_only=True)
    assert state["scaler"]["scale"] == (65536.0 if amp == "fp16" else 1.0)
    assert all(p.dtype == torch.float32 for p in state["model"].values())


def test_a_step_that_is_not_finite_is_skipped_and_many_stop_the_run(tmp_path):
    cfg = tiny("--steps", "4", "--out", str(tmp_path / "a"))
    clips = [data.open_dataset("toy", s, cfg.frames, cfg.size, cfg.fps, cfg.rate) for s in ("train", "val")]
    process, net = mm.Diffusion(cfg), mm.CoupledUNet(cfg)

    def loss(model, batch):
        value, parts = process.loss(model, batch)
        return value * (float("nan") if batch["step"] == 2 and "u" not in batch else 1), parts

    mm.fit(net, loss, cfg, *clips)
    rows = list(csv.DictReader(open(tmp_path / "a" / "log.csv")))
    assert [r["skipped"] for r in rows[1:]] == ["0", "0", "1", "1"]
    assert all(p.isfinite().all() for p in net.parameters())
    cfg = tiny("--steps", "60", "--out", str(tmp_path / "b"), "--log_every", "10")
    before = {k: p.clone() for k, p in net.state_dict().items()}
    with pytest.raises(data.UserError, match="not finite"):
        mm.fit(net, lambda m, batch: (next(m.parameters()).sum() * float("nan"), {"x": torch.zeros(())}), cfg, *clips)
    assert same(before, net.state_dict())


# ---- sampling

def test_samples_depend_on_seed_and_place_alone(trained):
    model = mm.load(trained / "ckpt.pt")
    video, audio = mm.sample(model, 3, steps=3, seed=5)
    assert video.shape == (3, 4, 16, 16, 3) and video.dtype == torch.uint8
    assert audio.shape == (3, 1600) and audio.dtype == torch.float32 and audio.abs().max() <= 1
    torch.manual_seed(99)
    again = mm.sample(model, 2, steps=3, seed=5, batch_size=1)
    assert (video[:2].int() - again[0].int()).abs().max() <= 1 and (audio[:2] - again[1]).abs().max() < 1e-4
    assert (mm.sample(model, 1, steps=3, seed=6)[1] - audio[:1]).abs().max() > 1e-2
    for sampler in mm.SAMPLERS:
        if sampler != "ddpm":
            assert mm.sample(model, 1, steps=4, sampler=sampler)[0].shape == (1, 4, 16, 16, 3)
    with pytest.raises(data.UserError, match="takes no prompt"):
        mm.sample(model, 1, prompt="a red ball")


def test_sample_py_writes_a_page(trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    args = ["--model", "mm_diffusion", "--ckpt", str(trained / "ckpt.pt"), "--n", "2", "--steps", "2"]
    args += ["--device", "cpu"]
    sample.main([*args, "--sampler", "ddim"])
    out = tmp_path / "out" / "mm_diffusion" / "samples_001"
    names = [f"{i}.{kind}" for i in ("000", "001") for kind in ("mp4", "png", "wav")]
    assert sorted(p.name for p in out.iterdir()) == [*names, "index.html"]
    page = (out / "index.html").read_text()
    assert all(f'src="00{i}.{kind}"' in page for i in (0, 1) for kind in ("mp4", "wav", "png")) and "http" not in page
    sample.main([*args, "--npz"])
    assert (out.parent / "samples_002" / "index.html").exists()
    with np.load(out.parent / "samples_002" / "clips.npz") as f:
        assert f["video"].shape[0] == f["audio"].shape[0] == 2 and (f["video"].dtype, f["fps"]) == (np.uint8, 10)
    with pytest.raises(SystemExit, match="not empty"):
        sample.main([*args, "--out", str(out)])
    with pytest.raises(SystemExit, match="takes no prompt"):
        sample.main([*args, "--prompt", "a ball"])


def test_released_weights_load_everywhere(tmp_path, monkeypatch):
    """A bare state dict under the released names, in half precision: --init_from, sample.py --ckpt."""
    monkeypatch.chdir(tmp_path)
    net = net_of(tiny())
    torch.save({k: p.half() for k, p in net.state_dict().items()}, "ema_0.9999_100000.pt")
    mm.main([*TINY, "--steps", "1", "--lr", "1e-12", "--out", "run", "--init_from", "ema_0.9999_100000.pt"])
    assert same(weights("run"), {k: p.half().float() for k, p in net.state_dict().items()}, 1e-6)
    args = ["--model", "mm_diffusion", "--ckpt", "ema_0.9999_100000.pt", "--n", "1", "--device", "cpu"]
    sample.main([*args, "--sample_steps", "2", *TINY])
    assert Path("out/mm_diffusion/samples_001/000.mp4").exists()
    with pytest.raises(SystemExit, match="fits no preset"):
        sample.main(args)


# ---- what users do wrong: one sentence, nothing lost

@pytest.mark.parametrize("args,says", [
    ("--widht 3", "unrecognized arguments: --widht"), ("--steps many", "--steps"), ("--amp int8", "--amp"),
    ("--streams x", "--streams"), ("--steps 0", "--steps 0 is too small"), ("--mult 0", "--mult and --windows need"),
    ("--batch_size 6 --grad_accum 4", "does not divide by 4"), ("--size 30 --mult 1,2,4", "--size"),
    ("--rate 4005", "multiple of 4"), ("--norm_groups 3", "--norm_groups"), ("--windows 1,2", "--windows"),
    ("--windows 9", "--windows"), ("--video_attention 16", "factors 1, 2"), ("--diffusion_steps 20", "25 or more"),
    ("--random_shift perhaps", "--random_shift"), ("--preset huge", "--preset"), ("--fps 0", "too small"),
    ("--data toy:tennis", "bounce, collide"), ("--data concerts", "python data.py prepare FOLDER --name concerts"),
    ("--init_from nowhere.pt", "no checkpoint nowhere.pt"), ("--heads 3", "--heads"),
    ("--cross_head_dim 5", "--cross_head_dim"), ("--device gpu", "no --device gpu here"),
    ("--mult 1.5,2", "whole numbers"), ("--betas 0.9", "--betas needs two"), ("--dropout 1", "--dropout"),
    ("--seconds -5", "--seconds"), ("--sr_ckpt nowhere.pt", "no checkpoint nowhere.pt"),
])
def test_wrong_options_end_in_one_sentence(args, says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        mm.main([*TINY, *args.split(), "--out", "out"])
    assert says in stop.value.code and "\n" not in stop.value.code and not Path("out/ckpt.pt").exists()


def test_four_processes_say_it_once(tmp_path):
    code, _, err = run("--data", "concerts", cwd=tmp_path, launcher=torchrun(4))
    assert code != 0 and err.count("python data.py prepare FOLDER --name concerts") == 1
    assert "mm_diffusion.py\", line" not in err                # no traceback of ours


def test_damaged_and_foreign_checkpoints_are_refused_and_kept(trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    files = {"text": b"not a checkpoint", "cut": (trained / "ckpt.pt").read_bytes()[:20000]}
    torch.save([1, 2], "list.pt")
    torch.save({"weight": torch.zeros(3)}, "foreign.pt")
    files |= {"list": Path("list.pt").read_bytes(), "foreign": Path("foreign.pt").read_bytes()}
    for name, content in files.items():
        Path(name).mkdir()
        (Path(name) / "ckpt.pt").write_bytes(content)
        for call in (lambda p: mm.main([*TINY, "--steps", "6", "--out", p]),
                     lambda p: mm.main([*TINY, "--steps", "6", "--out", "new", "--init_from", f"{p}/ckpt.pt"]),
                     lambda p: sample.main(["--model", "mm_diffusion", "--ckpt", f"{p}/ckpt.pt"])):
            with pytest.raises(SystemExit) as stop:
                call(name)
            assert "ckpt.pt" in stop.value.code and "\n" not in stop.value.code
        assert (Path(name) / "ckpt.pt").read_bytes() == content
    state = torch.load(trained / "ckpt.pt", weights_only=True)
    torch.save({**state, "cfg": {**state["cfg"], "dit_width": 8}}, "other.pt")
    with pytest.raises(SystemExit, match="is of another model"):
        sample.main(["--model", "mm_diffusion", "--ckpt", "other.pt"])
    with pytest.raises(SystemExit, match="--width 8, not 16"):
        mm.main([*TINY, "--width", "16", "--steps", "6", "--out", str(trained)])


def test_sample_py_says_what_is_missing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for args, says in ((["--model", "mm_diffusion"], "`python mm_diffusion.py`"), ([], "--model"),
                       (["--model", "data"], "not a model file"), (["--model", "../x"], "no model file"),
                       (["--model", "mm_diffusion", "--ckpt", "no.pt"], "no checkpoint no.pt"),
                       (["--model", "mm_diffusion", "--device", "gpu"], "no --device gpu"),
                       (["--model", "mm_diffusion", "--steps", "0"], "--n and --steps"),
                       (["--model", "mm_diffusion", "--start", "-1"], "--start")):
        with pytest.raises(SystemExit) as stop:
            sample.main(args)
        assert says in stop.value.code and "\n" not in stop.value.code
    assert not Path("out").exists()


def test_folders_are_named_after_preset_and_data():
    outs = [mm.parse(args.split()).out for args in ("", "--data toy:bounce", "--data toy", "--preset small")]
    assert outs == [f"out/mm_diffusion/{name}" for name in ("toy", "toy", "toy-toy", "small")]


def test_help_lists_every_option(capsys):
    with pytest.raises(SystemExit):
        mm.parse(["--help"])
    text = capsys.readouterr().out
    assert all(f"--{k}" in text for k in vars(mm.Config()))


@pytest.mark.parametrize("preset", mm.PRESETS)
def test_presets_build(preset):
    with torch.device("meta"):
        net = mm.CoupledUNet(mm.parse(["--preset", preset]))
    assert len(net.draw_shifts(16)) > 0
