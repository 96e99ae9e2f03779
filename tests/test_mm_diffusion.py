"""mm_diffusion.py: the network, the loss, sampling, the command line, and what users do wrong.

test_training.py has the training loop, test_sr_and_conditions.py the rest of the model file.
"""
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import data
import mm_diffusion as mm
import sample

ROOT = Path(__file__).parent.parent
torch.set_num_threads(1)  # as the processes started below: sums are to agree to the last bit
# Whatever a preset's value is, if the tests depend on it.
TINY = """
    --preset toy --data toy --frames 4 --size 16 --rate 4000 --width 8 --mult 1,2 --norm_groups 4
    --heads 2 --cross_head_dim 8 --video_attention 2 --cross_attention 2 --windows 2
    --random_shift true --prediction edm --data_mean -0.55,0 --data_std 0.42,0.165
    --skip_std 0.1,0.165 --noise_levels 1.2,1.6 --motion_weight 0 --mu_law 0 --sampler ddim
    --sample_steps 2 --batch_size 4 --optimizer muon --lr 1e-3 --lr_end 0.05 --warmup 0 --clip 1
    --ema 0.99 --val_clips 2 --workers 0 --samples 1 --log_every 1 --eval_every 1000
""".split()


def tiny(*more):
    return mm.parse([*TINY, *more])


def fill(net):
    """Make every parameter random: the zeroed ones would hide what is behind them."""
    with torch.no_grad():
        for p in net.parameters():
            if p.abs().max() == 0:
                p.normal_(0, 0.1)
    return net.eval()


def net_of(cfg, seed=0):
    torch.manual_seed(seed)
    return fill(mm.CoupledUNet(cfg))


def noisy(cfg, B=2):
    """Inputs of the network: video, audio, steps."""
    g = torch.Generator().manual_seed(1)
    video = torch.randn(B, cfg.frames, 3, cfg.size, cfg.size, generator=g)
    audio = torch.randn(B, 1, cfg.frames * cfg.rate // cfg.fps, generator=g)
    return video, audio, torch.tensor([10, 900])[:B]


def batch_of(cfg, B=4):
    """The first training batch, on the device."""
    return data.to_device(next(data.loader(mm.open_clips(cfg, "train"), B, 0, 1)), "cpu")


def start(*args, cwd, launcher=(sys.executable,), **env):
    """Start mm_diffusion.py as a process in a session, and so a process group, of its own."""
    return subprocess.Popen(
        [*launcher, str(ROOT / "mm_diffusion.py"), *args],
        cwd=cwd,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **env},
    )


def run(*args, **where):
    """Run mm_diffusion.py to its end -> exit code, stdout, stderr."""
    process = start(*args, **where)
    out, err = process.communicate(timeout=240)
    return process.returncode, out, err


def torchrun(n):
    return (sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={n}")


def weights(folder, which="model"):
    return torch.load(Path(folder) / "ckpt.pt", weights_only=True)[which]


def apart(one, two):
    """The largest difference of two state dicts with the same names."""
    assert one.keys() == two.keys()
    return max(float((one[k] - two[k]).abs().max()) for k in one)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """The file that two steps of the tiny network leave."""
    out = tmp_path_factory.mktemp("trained")
    mm.main([*TINY, "--steps", "2", "--out", str(out)])
    return out / "ckpt.pt"


# ---- The network


def test_a_fresh_network_outputs_zero_so_the_first_loss_is_two():
    cfg = tiny("--prediction", "eps")
    net = mm.CoupledUNet(cfg)
    v, a = net(*noisy(cfg))
    assert v.shape == (2, 4, 3, 16, 16)
    assert a.shape == (2, 1, 1600)
    assert v.abs().max() == a.abs().max() == 0
    loss, parts = mm.Diffusion(cfg).loss(net, batch_of(cfg))
    assert loss.item() == pytest.approx(2, abs=0.05)
    assert parts["audio"].item() == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("L", [24, 26])  # 6 tokens a frame; and 2 more for the last segment
@pytest.mark.parametrize("S,R", [(1, 0), (2, 0), (2, 1), (4, 0)])
def test_cross_attention_is_eq_8_token_by_token(L, S, R):
    block = mm.CrossAttention(8, tiny(), S)
    with torch.no_grad():
        for p in block.parameters():
            p.normal_(0, 0.5)
    torch.manual_seed(0)
    frames = 4
    P = 9  # pixels of a frame
    v = torch.randn(1, frames, 3, 3, 8)
    a = torch.randn(1, L, 8)
    got_v, got_a = block(v, a, torch.tensor(R))

    def project(x, layer):
        return F.linear(x, layer.weight.flatten(1), layer.bias)

    vq, vk, vv = project(block.v_norm(v), block.v_qkv).view(frames * P, 24).chunk(3, -1)
    aq, ak, av = project(block.a_norm(a), block.a_qkv)[0].chunk(3, -1)
    n = L // frames
    hv = torch.zeros(frames * P, 8)
    ha = torch.zeros(L, 8)
    for i in range(frames):
        tokens = [((i + R) * n + k) % L for k in range(S * n)]
        own = slice(i * P, (i + 1) * P)
        hv[own] = torch.softmax(vq[own] @ ak[tokens].T / 8**0.5, -1) @ av[tokens]
        pixels = [((i + R) * P + k) % (frames * P) for k in range(S * P)]
        own = slice(i * n, (i + 1) * n if i < frames - 1 else L)
        ha[own] = torch.softmax(aq[own] @ vk[pixels].T / 8**0.5, -1) @ vv[pixels]
    want_v = v + project(hv, block.video_proj_out.video_conv).view(v.shape)
    want_a = a + project(ha, block.audio_proj_out.audio_conv)
    assert (got_v - want_v).abs().max() < 1e-5
    assert (got_a - want_a).abs().max() < 1e-5


def test_shifts_lie_in_range_follow_the_generator_and_matter():
    cfg = tiny("--windows", "1")
    net = net_of(cfg)

    def draw(seed):
        return net.draw_shifts(torch.Generator().manual_seed(seed))

    draws = torch.stack([draw(i) for i in range(200)])
    assert set(draws.flatten().tolist()) == {0, 1, 2, 3}
    assert torch.equal(draw(3), draws[3])
    x = noisy(cfg)
    with torch.no_grad():
        one, _ = net(*x, torch.zeros(3, dtype=torch.long))
        two, _ = net(*x, torch.ones(3, dtype=torch.long))
    assert (one - two).abs().max() > 1e-4
    assert net_of(tiny("--random_shift", "false")).draw_shifts() == [None, None, None]


def test_attention_over_many_rows_is_done_in_parts(monkeypatch):
    """CUDA's fused kernels fail above 65,535 rows, and time attention has B * H * W of them."""
    g = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 32770, 2, 2, generator=g)  # (rows, N, C) each
    want = F.scaled_dot_product_attention(q, k, v)
    rows = []
    whole = F.scaled_dot_product_attention

    def spy(q, k, v):
        rows.append(len(q))
        return whole(q, k, v)

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    got = mm.attend(q, k, v, 1)
    assert len(rows) == 2
    assert max(rows) <= 32768
    assert (got - want).abs().max() < 1e-6


def test_late_upsampling_is_the_same_arithmetic():
    block = mm.ResBlock(16, 16, tiny(), 4, mm.double)
    with torch.no_grad():
        for p in block.parameters():
            p.normal_(0, 0.3)
    v = torch.randn(2, 4, 8, 8, 16)
    a = torch.randn(2, 400, 16)
    emb = torch.randn(2, 8)
    late_v, late_a = block(v, a, emb)
    # This takes the road of training with dropout; the layers' own rate stays 0.
    block.dropout = 1.0
    early_v, early_a = block.train()(v, a, emb)
    assert late_v.shape == (2, 4, 16, 16, 16)
    assert late_a.shape == (2, 1600, 16)
    assert (late_v - early_v).abs().max() < 1e-5
    assert (late_a - early_a).abs().max() < 1e-5


def test_checkpointing_and_any_batch_size_change_nothing():
    cfg = tiny()
    x = noisy(cfg)
    shifts = torch.tensor([1, 0, 2])
    grads = []
    for c in (cfg, tiny("--checkpoint", "true")):
        net = net_of(c)
        v, a = net(*x, shifts)
        (v.square().mean() + a.square().mean()).backward()
        grads.append(torch.cat([p.grad.flatten() for p in net.parameters()]))
    assert (grads[0] - grads[1]).abs().max() < 1e-6
    one_v, one_a = net_of(cfg)(*(y[:1] for y in x), shifts)
    assert (one_v - v[:1]).abs().max() < 1e-5
    assert (one_a - a[:1]).abs().max() < 1e-5


@pytest.mark.parametrize("streams,other", [("v", "audio"), ("a", "video")])
def test_single_streams_have_only_their_parameters_and_train(streams, other, tmp_path):
    net = mm.CoupledUNet(tiny("--streams", streams))
    names = [name for name, _ in net.named_parameters()]
    assert names
    for name in names:
        assert other not in name
        assert "v_qkv" not in name and "a_qkv" not in name
    both = sum(p.numel() for p in mm.CoupledUNet(tiny()).parameters())
    assert sum(p.numel() for p in net.parameters()) < both
    mm.main([*TINY, "--streams", streams, "--steps", "1", "--out", str(tmp_path)])
    video, audio = mm.sample(mm.load(tmp_path / "ckpt.pt"), 1)
    assert (audio is None) == (streams == "v")
    assert (video is None) == (streams == "a")
    ending = "mp4" if streams == "v" else "wav"
    assert (tmp_path / "samples" / f"step000001_0.{ending}").exists()


# ---- The loss

V_PREDICTION = "--prediction edm --data_mean 0,0 --data_std 1,1 --skip_std 1,1"
PREDICTIONS = {
    "eps": "--prediction eps",
    "v": V_PREDICTION,
    "edm": "--prediction edm",  # as in TINY
    "mu_law": "--prediction edm --mu_law 100",
    "motion": "--prediction edm --motion_weight 8",
}
each_prediction = pytest.mark.parametrize("options", PREDICTIONS.values(), ids=PREDICTIONS)


class Oracle(torch.nn.Module):
    """A network that knows the clean state x0, and so is right at any noise level.

    It keeps what it was asked last: `seen`, the noisy state, and `t`.
    """

    def __init__(self, process, x0):
        super().__init__()
        self.process = process
        self.x0 = x0

    def draw_shifts(self, generator=None):
        return torch.zeros(0, dtype=torch.long)

    def forward(self, v, a, t, shifts):
        self.seen = {"v": v, "a": a}
        self.t = t
        cfg = self.process.cfg
        out = []
        for i, k in enumerate("va"):
            x = self.seen[k]
            abar = mm.broadcast(self.process.abar[t].float(), x)
            if cfg.prediction == "eps":
                out.append((x - abar.sqrt() * self.x0[k]) / (1 - abar).sqrt())
                continue
            noise = (1 - abar) / abar  # its variance beside the clip's
            variance = cfg.skip_std[i] ** 2
            c_skip = variance / (variance + noise)
            c_out = (variance * noise / (variance + noise)).sqrt()
            mean = cfg.data_mean[i]
            skipped = mean + c_skip * (x / abar.sqrt() - mean)
            out.append((self.x0[k] - skipped) / c_out)
        return out

    def eps(self, x, t):
        """The noise estimate, as the samplers ask for it."""
        t = torch.full((len(x["v"]),), t)
        return self.process.noise_estimate(self, x, t)


def oracle_for(options):
    """-> the process that the options ask for, a batch of two clips, the Oracle for it."""
    process = mm.build_process(tiny(*options.split()))
    batch = batch_of(process.cfg, 2)
    return process, batch, Oracle(process, process.encode(batch))


def normal_like(x):
    """Normal noise like a state."""
    return {k: torch.randn_like(y) for k, y in x.items()}


def test_noise_belongs_to_the_clip_not_to_the_batch():
    x = {"v": torch.zeros(3, 2, 3), "a": torch.zeros(3, 5)}
    u, eps = mm.clip_noise(torch.tensor([7, 8, 9]), x)
    u2, eps2 = mm.clip_noise(torch.tensor([9, 7]), x)
    assert torch.equal(u[[2, 0]], u2)
    assert torch.equal(eps["v"][[2, 0]], eps2["v"])
    assert (eps["v"][0] != eps["v"][1]).all()


@each_prediction
def test_a_perfect_prediction_has_no_loss_and_gives_the_noise_back(options):
    process, batch, oracle = oracle_for(options)
    loss, parts = process.loss(oracle, batch, torch.tensor([0.3, 0.8]))
    assert loss.item() < 1e-9
    assert parts["video"].item() < 1e-9
    x0 = oracle.x0
    noise = normal_like(x0)
    x = mm.diffuse(x0, float(process.abar[700]), noise)
    estimate = oracle.eps(x, 700)
    assert (estimate["v"] - noise["v"]).abs().max() < 1e-4
    assert (estimate["a"] - noise["a"]).abs().max() < 1e-4
    # Every solver walks from any noise to the one clean clip.
    plus = mm.DPMSolver(oracle.eps, process.abar)
    released = mm.DPMSolver(oracle.eps, process.abar, predict_x0=False)
    results = (
        mm.denoise(mm.ddim_step, oracle.eps, noise, process.path(10), None),
        mm.denoise(mm.ddpm_step, oracle.eps, noise, process.path(10), normal_like),
        plus.multistep(noise, plus.nodes(10)),
        released.singlestep3(noise, released.nodes(10)),
    )
    for result in results:
        assert (result["v"] - x0["v"]).abs().max() < 0.05
        assert (result["a"] - x0["a"]).abs().max() < 0.05


@each_prediction
def test_training_and_sampling_share_schedule_and_scale(options):
    """Clips noised by the loss; one step of the sampler, told the truth, lands on the next level.

    After the last level that is the clip; the noise of a clip is the same at all levels.
    """
    process, batch, oracle = oracle_for(options)
    for path in (process.path(4), process.path(process.T)[:: process.T // 3]):
        for t, abar, before in path:
            process.loss(oracle, batch, torch.full((2,), (t + 0.5) / process.T))
            assert oracle.t.tolist() == [t, t]
            x = oracle.seen
            # At once to the clip.
            clip = mm.denoise(mm.ddim_step, oracle.eps, x, [(t, abar, 1.0)], None)
            clip = process.decode(clip)
            assert (clip["v"] - batch["video"]).abs().max() < 1e-3
            assert (clip["a"] - batch["audio"]).abs().max() < 1e-3
            # And to the level that the sampler would go on from.
            got = mm.denoise(mm.ddim_step, oracle.eps, x, [(t, abar, before)], None)
            if before == 1:
                want = oracle.x0
            else:
                place = int((process.abar - before).abs().argmin())
                process.loss(oracle, batch, torch.full((2,), (place + 0.5) / process.T))
                want = oracle.seen
            assert (got["v"] - want["v"]).abs().max() < 1e-3
            assert (got["a"] - want["a"]).abs().max() < 1e-3


@pytest.mark.parametrize("kind", [mm.Diffusion, mm.EDM])
def test_paths_go_from_noise_to_the_clip(kind):
    process = kind(tiny())
    for steps in (1, 7, 20, process.T):
        path = process.path(steps)
        assert len(path) == steps
        assert path[-1][2] == 1
        for t, abar, before in path:
            assert abar == float(process.abar[t])
            assert before > abar
        for one, two in zip(path, path[1:], strict=False):
            assert one[2] == two[1]
    assert mm.EDM(tiny()).path(5)[0][0] == process.T - 1


def test_steps_are_uniform_or_log_normal():
    """Eq. 7's are uniform. Half of EDM's noise is below exp(mean), a sixth a deviation above it."""
    u = torch.rand(4000, generator=torch.Generator().manual_seed(0))
    assert torch.equal(mm.Diffusion(tiny()).draw_steps(u), (u * 1000).long())
    process = mm.EDM(tiny("--noise_levels", "0.5,1.5"))
    steps = process.draw_steps(u)
    levels = (1 / process.abar[steps] - 1).sqrt().log()
    assert abs((levels < 0.5).float().mean() - 0.5) < 0.04
    assert abs((levels > 2.0).float().mean() - 0.159) < 0.03


@each_prediction
def test_the_loss_draws_its_steps_so(options):
    process, batch, oracle = oracle_for(options)
    process.loss(oracle, batch)
    u, _ = mm.clip_noise(batch["key"], oracle.x0)
    assert torch.equal(oracle.t, process.draw_steps(u))


def test_edm_with_mean_0_and_deviation_1_is_v_prediction():
    """The network's output is -v = sigma x_0 - alpha eps; parts are eq. 7 for what that implies."""
    process = mm.build_process(tiny(*V_PREDICTION.split()))
    batch = batch_of(process.cfg, 2)
    net = net_of(process.cfg)
    t = torch.tensor([0.25, 0.6])
    loss, parts = process.loss(net, batch, t)
    x0 = process.encode(batch)
    _, eps = mm.clip_noise(batch["key"], x0)
    abar = process.abar[(t * 1000).long()].float()
    alpha = {k: mm.broadcast(abar.sqrt(), x0[k]) for k in x0}
    sigma = {k: mm.broadcast((1 - abar).sqrt(), x0[k]) for k in x0}
    xt = {k: alpha[k] * x0[k] + sigma[k] * eps[k] for k in x0}
    generator = torch.Generator().manual_seed(data.clip_key(process.cfg.seed, "shift 0"))
    out = net(xt["v"], xt["a"], (t * 1000).long(), net.draw_shifts(generator))
    want = 0
    for k, output in zip("va", out, strict=True):
        v = alpha[k] * eps[k] - sigma[k] * x0[k]
        want += (output + v).square().mean()
        guess = sigma[k] * xt[k] - alpha[k] * output  # of eps
        error = (guess - eps[k]).square().mean().item()
        assert parts[mm.NAMES[k]].item() == pytest.approx(error, rel=1e-3)
    assert loss.item() == pytest.approx(want.item(), rel=1e-3)


def test_eq_7_is_the_plain_sum_of_its_parts():
    cfg = tiny("--prediction", "eps")
    loss, parts = mm.Diffusion(cfg).loss(net_of(cfg), batch_of(cfg))
    assert loss.item() == pytest.approx(sum(parts.values()).item(), rel=1e-6)
    assert not any(part.requires_grad for part in parts.values())


def test_the_mu_law_code_is_undone():
    process = mm.build_process(tiny("--prediction", "edm", "--mu_law", "255"))
    batch = batch_of(process.cfg)
    code = process.encode(batch)
    assert (process.decode(code)["a"] - batch["audio"]).abs().max() < 1e-5
    assert torch.equal(code["v"], batch["video"])
    # Quiet sound takes more of the range; the ends stay.
    levels = mm.mu_law(torch.tensor([-1.0, -0.01, 0.0, 0.01, 1.0]), 255)
    assert levels[[0, 2, 4]].tolist() == pytest.approx([-1, 0, 1], abs=1e-6)
    assert levels[3] > 0.2 and levels[1] == -levels[3]


def moving_square():
    """Two clips (2, 8, 3, 16, 16): a light square crosses a dark ground; where it is, as a mask."""
    video = torch.full((2, 8, 3, 16, 16), -0.8)
    for f in range(8):
        video[:, f, :, 6:10, 2 * f : 2 * f + 2] = 0.8
    return video, video[:, :, :1] > 0


def test_the_motion_weight_is_on_what_moves():
    video, square = moving_square()
    video[1] *= 0.5
    weight = mm.motion_weight(video, torch.tensor([8.0, 4.0]))
    assert weight.shape == (2, 8, 1, 16, 16)
    assert weight.mean((1, 2, 3, 4)).tolist() == pytest.approx([1, 1], abs=1e-5)
    ground = weight[:, :, :, :3]  # its upper rows, which the square never comes near
    assert (ground == ground[:, :1, :, :1, :1]).all()
    for i in range(2):
        assert weight[i][square[i]].min() > 2 * ground[i].max()
    assert (mm.motion_weight(video, torch.zeros(2)) == 1).all()


def test_a_flash_of_the_whole_frame_is_no_motion():
    k = torch.full((2,), 8.0)
    video, square = moving_square()
    flash = video.clone()
    flash[:, 3] = torch.where(square[:, 3], flash[:, 3], flash[:, 3] + 0.6)
    assert torch.allclose(mm.motion_weight(flash, k), mm.motion_weight(video, k), atol=1e-5)
    still = torch.full((1, 8, 3, 16, 16), -0.8)
    still[:, :, :, 6:10, 6:10] = 0.8
    still[:, 3] += 0.1
    assert torch.allclose(mm.motion_weight(still, k[:1]), torch.ones(()), atol=1e-5)


def test_the_motion_weight_is_not_in_what_is_reported():
    """So validation goes on to measure eq. 7."""
    rows = []
    for k in ("0", "8"):
        process = mm.build_process(tiny("--prediction", "edm", "--motion_weight", k))
        net = net_of(process.cfg)
        batch = batch_of(process.cfg)
        for t in (None, torch.tensor([0.1, 0.3, 0.6, 0.9])):
            loss, parts = process.loss(net, batch, t)
            rows.append((loss.item(), parts["video"].item(), parts["audio"].item()))
    for plain, weighted in (rows[0::2], rows[1::2]):
        assert plain[1:] == weighted[1:]
        assert plain[0] != pytest.approx(weighted[0], rel=1e-3)


# ---- Sampling


def test_samples_depend_on_seed_and_place_alone(checkpoint):
    model = mm.load(checkpoint)
    video, audio = mm.sample(model, 3, steps=3, seed=5)
    assert video.shape == (3, 4, 16, 16, 3)
    assert video.dtype == torch.uint8
    assert audio.shape == (3, 1600)
    assert audio.dtype == torch.float32
    assert audio.abs().max() <= 1
    torch.manual_seed(99)
    again_v, again_a = mm.sample(model, 2, steps=3, seed=5, batch_size=1)
    assert (video[:2].int() - again_v.int()).abs().max() <= 1
    assert (audio[:2] - again_a).abs().max() < 1e-4
    assert (mm.sample(model, 1, steps=3, seed=6)[1] - audio[:1]).abs().max() > 1e-2
    with pytest.raises(data.UserError, match="takes no prompt"):
        mm.sample(model, 1, prompt="a red ball")


@pytest.mark.parametrize("sampler", mm.CHOICES["sampler"])
def test_every_sampler_samples(sampler):
    model = net_of(tiny("--diffusion_steps", "25"))
    video, audio = mm.sample(model, 1, steps=4, sampler=sampler)
    assert video.shape == (1, 4, 16, 16, 3)
    assert audio.isfinite().all()


def test_sound_that_was_diffused_as_a_code_is_decoded():
    """What sample() gives is what decode() makes of the same run without it."""
    codes = []
    cfg = tiny("--mu_law", "255")
    model = net_of(cfg)
    decode = mm.EDM.decode

    def spy(self, x0):
        codes.append(x0["a"])
        return decode(self, x0)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mm.EDM, "decode", spy)
        _, audio = mm.sample(model, 1)
    want = mm.inverse_mu_law(codes[0], 255)[:, 0].clamp(-1, 1)
    assert torch.equal(audio, want)
    assert (audio - codes[0][:, 0]).abs().max() > 1e-3


@pytest.mark.parametrize("amp,dtype", [("bf16", torch.bfloat16), ("off", None), ("auto", None)])
def test_sampling_multiplies_in_the_precision_of_training(amp, dtype):
    model = net_of(tiny("--amp", amp))
    seen = set()

    def note(*_):
        inside = torch.is_autocast_enabled("cpu")
        seen.add(torch.get_autocast_dtype("cpu") if inside else None)

    model.register_forward_pre_hook(note)
    video, audio = mm.sample(model, 1)
    assert seen == {dtype}
    assert audio.dtype == torch.float32 and video.dtype == torch.uint8


def test_sample_py_writes_a_page(checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    args = ["--model", "mm_diffusion", "--ckpt", str(checkpoint), "--n", "2", "--steps", "2"]
    args += ["--device", "cpu"]
    sample.main([*args, "--sampler", "dpm"])
    out = tmp_path / "out" / "mm_diffusion" / "samples_001"
    names = [f"{i}.{kind}" for i in ("000", "001") for kind in ("mp4", "png", "wav")]
    assert sorted(p.name for p in out.iterdir()) == [*names, "index.html"]
    page = (out / "index.html").read_text()
    assert "http" not in page
    for name in names:
        assert f'src="{name}"' in page
    sample.main([*args, "--npz"])
    assert (out.parent / "samples_002" / "index.html").exists()
    with np.load(out.parent / "samples_002" / "clips.npz") as f:
        assert f["video"].shape[0] == f["audio"].shape[0] == 2
        assert f["video"].dtype == np.uint8
        assert f["fps"] == 10
    with pytest.raises(SystemExit, match="not empty"):
        sample.main([*args, "--out", str(out)])
    with pytest.raises(SystemExit, match="takes no prompt"):
        sample.main([*args, "--prompt", "a ball"])


# ---- Loading


def test_released_weights_load_everywhere(tmp_path, monkeypatch):
    """A bare state dict under the released names, in half precision: --init_from, --ckpt."""
    monkeypatch.chdir(tmp_path)
    net = net_of(tiny())
    name = "ema_0.9999_100000.pt"
    torch.save({k: p.half() for k, p in net.state_dict().items()}, name)
    want = {k: p.half().float() for k, p in net.state_dict().items()}
    mm.main([*TINY, "--steps", "1", "--lr", "1e-12", "--out", "run", "--init_from", name])
    assert apart(weights("run"), want) < 1e-6
    assert apart(mm.load(name, options=TINY).state_dict(), want) == 0
    args = ["--model", "mm_diffusion", "--ckpt", name, "--n", "1", "--device", "cpu"]
    sample.main([*args, *TINY])
    assert Path("out/mm_diffusion/samples_001/000.mp4").exists()
    with pytest.raises(SystemExit, match="add --preset") as stop:
        sample.main(args)
    assert name in stop.value.code and "\n" not in stop.value.code
    with pytest.raises(data.UserError, match="not for this network"):
        mm.load(name, options=["--preset", "toy"])


def test_load_takes_options_and_raises_user_errors_alone(checkpoint, tmp_path):
    assert mm.load(checkpoint, options=["--sampler", "dpm"]).cfg.sampler == "dpm"
    (tmp_path / "text.pt").write_text("no checkpoint")
    cases = (
        (tmp_path / "no.pt", [], "no checkpoint"),
        (tmp_path / "text.pt", [], "not a readable checkpoint"),
        (checkpoint, ["--widht", "3"], "unrecognized arguments: --widht"),
        (checkpoint, ["--sampler", "magic"], "--sampler"),
        (checkpoint, ["--sample_steps", "many"], "not a whole number"),
        (checkpoint, ["--sample_steps", "0"], "too small"),
        (checkpoint, ["--width", "16"], "not for this network"),
        (checkpoint, ["--sampler"], "expected one argument"),
    )
    for path, options, says in cases:
        with pytest.raises(data.UserError, match=says):
            mm.load(path, options=options)


def test_a_checkpoint_is_not_checked_against_this_machine(checkpoint, monkeypatch):
    """It may have been trained on other numbers of processes than torchrun starts here."""
    monkeypatch.setattr(mm, "WORLD", 3)
    assert mm.load(checkpoint).cfg.batch_size == 4
    assert mm.load(checkpoint, options=["--sampler", "dpm"]).cfg.batch_size == 4
    assert mm.parse(TINY).batch_size == 4


def old_checkpoint(path, new):
    """What commit 3172195 would have saved instead of the checkpoint `path`."""
    state = torch.load(path, weights_only=True)
    cfg = state["cfg"]
    for name in ("eval_every", "motion_weight", "mu_law", "sr_sample_steps", "sr_width"):
        del cfg[name]
    for name in ("val_every", "save_every", "sample_every"):
        cfg[name] = 250
    old = {"model": state["model"], "ema": state["ema"], "step": 2, "cfg": cfg}
    old["optimizer"] = {"state": {}, "param_groups": []}
    old["scaler"] = {"scale": 1.0, "_growth_tracker": 0}
    torch.save(old, new)
    return state["ema"]


def test_old_checkpoints_load_for_sampling_but_do_not_go_on(checkpoint, tmp_path):
    ema = old_checkpoint(checkpoint, tmp_path / "ckpt.pt")
    before = (tmp_path / "ckpt.pt").read_bytes()
    model = mm.load(tmp_path / "ckpt.pt")
    assert apart(model.state_dict(), ema) == 0
    assert mm.sample(model, 1)[1].shape == (1, 1600)
    # Of weights alone, a new run can start.
    new = ["--steps", "1", "--out", str(tmp_path / "new")]
    mm.main([*TINY, *new, "--init_from", str(tmp_path / "ckpt.pt")])
    with pytest.raises(SystemExit, match="is of an older version") as stop:
        mm.main([*TINY, "--steps", "2", "--out", str(tmp_path)])
    assert "\n" not in stop.value.code
    assert (tmp_path / "ckpt.pt").read_bytes() == before


def test_an_old_checkpoint_whose_sampler_is_gone_says_so(checkpoint, tmp_path):
    state = torch.load(checkpoint, weights_only=True)
    state["cfg"]["sampler"] = "dpm_adaptive"
    torch.save(state, tmp_path / "ckpt.pt")
    with pytest.raises(data.UserError, match="--sampler must be one of dpm, "):
        mm.load(tmp_path / "ckpt.pt")
    assert mm.load(tmp_path / "ckpt.pt", options=["--sampler", "ddim"]).cfg.sampler == "ddim"


def test_damaged_and_foreign_checkpoints_are_refused_and_kept(checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save([1, 2], "list.pt")
    torch.save({"weight": torch.zeros(3)}, "foreign.pt")
    files = {
        "text": b"not a checkpoint",
        "cut": checkpoint.read_bytes()[:20000],
        "list": Path("list.pt").read_bytes(),
        "foreign": Path("foreign.pt").read_bytes(),
    }
    train = [*TINY, "--steps", "6"]
    for name, content in files.items():
        path = f"{name}/ckpt.pt"
        Path(name).mkdir()
        Path(path).write_bytes(content)
        calls = (
            (mm.main, [*train, "--out", name]),
            (mm.main, [*train, "--out", "new", "--init_from", path]),
            (sample.main, ["--model", "mm_diffusion", "--ckpt", path]),
        )
        for main, args in calls:
            with pytest.raises(SystemExit) as stop:
                main(args)
            assert path in stop.value.code
            assert "\n" not in stop.value.code
        assert Path(path).read_bytes() == content


def test_a_checkpoint_of_another_run_is_refused(checkpoint, tmp_path):
    shutil.copy(checkpoint, tmp_path)
    out = str(tmp_path)
    with pytest.raises(SystemExit, match="--width 8, not 16"):
        mm.main([*TINY, "--width", "16", "--steps", "2", "--out", out])
    # The learning rate falls towards the last step: another number of steps is another run.
    with pytest.raises(SystemExit, match="--steps 2, not 3"):
        mm.main([*TINY, "--steps", "3", "--out", out])
    with pytest.raises(SystemExit, match="--lr_end 0.05, not 1.0|--steps 2, not 3"):
        mm.main([*TINY, "--lr_end", "1", "--steps", "3", "--out", out])
    assert (tmp_path / "ckpt.pt").read_bytes() == checkpoint.read_bytes()


# ---- The command line


def test_values_are_read_as_python_reads_them():
    cfg = tiny("--data_mean", "-0.55,0.0", "--lr", "9e-1", "--noise_levels", "9e-1,2")
    assert cfg.data_mean == (-0.55, 0.0)
    assert cfg.lr == 0.9
    assert cfg.noise_levels == (0.9, 2)
    cfg = tiny("--data_mean=-0.55,0.0", "--lr=3", "--film", "False", "--sr_attention", "")
    assert cfg.data_mean == (-0.55, 0.0)
    assert cfg.lr == 3.0
    assert cfg.film is False
    assert cfg.sr_attention == ()
    assert tiny("--film", "true").film is True


def test_the_default_preset_follows_the_data_and_is_said(capsys, monkeypatch):
    cases = {"": "toy", "toy": "toy", "toy:rain": "toy", "concerts": "concerts", "mine": "small"}
    for name, preset in cases.items():
        args = ["--data", name] if name else []
        cfg = mm.parse(args)
        assert cfg.preset == preset
        assert cfg.width == mm.PRESETS[preset].get("width", mm.Config.width)
        printed = capsys.readouterr().out
        assert f"--preset {preset}" in printed
        why = "has no preset of its own" if preset == "small" else "is so called"
        assert f"--data {name.split(':')[0] or 'toy'} {why}" in printed
    # Asked for, or already said by the first process: nothing to say.
    mm.parse(["--preset", "small"])
    monkeypatch.setattr(mm, "RANK", 1)
    mm.parse([])
    assert capsys.readouterr().out == ""


def test_folders_are_named_after_preset_and_data():
    cases = {
        "": "toy",
        "--data toy:bounce": "toy",
        "--data toy": "toy-toy",
        "--preset small": "small",
        "--data mine": "small-mine",
        "--data concerts": "concerts",
    }
    for args, name in cases.items():
        assert mm.parse(args.split()).out == f"out/mm_diffusion/{name}"


def test_help_lists_every_option(capsys, monkeypatch):
    source = mm.inspect.getsource(mm.Config)
    percent = source.replace("# learning rate\n", "# learning rate, 100 % of it\n")
    assert percent != source
    monkeypatch.setattr(mm.inspect, "getsource", lambda kind: percent)
    with pytest.raises(SystemExit):
        mm.parse(["--help"])
    text = capsys.readouterr().out
    assert "100 % of it" in text
    for name in vars(mm.Config()):
        assert f"--{name} " in text


@pytest.mark.parametrize("preset", mm.PRESETS)
def test_presets_build_and_divide(preset):
    cfg = mm.parse(["--preset", preset])
    with torch.device("meta"):
        net = mm.build(cfg)
        mm.build(mm.sr_config(cfg))
    assert len(net.draw_shifts()) > 0
    assert cfg.batch_size % cfg.grad_accum == 0


@pytest.mark.parametrize("args,says", [
    ("--widht 3", "unrecognized arguments: --widht"),
    ("--steps many", "--steps"),
    ("--steps 10.0", "not a whole number"),
    ("--amp int8", "--amp"),
    ("--streams x", "--streams"),
    ("--steps 0", "--steps 0 is too small"),
    ("--mult 0", "--width times every --mult"),
    ("--batch_size 6 --grad_accum 4", "does not divide by 4"),
    ("--size 30 --mult 1,2,4", "--size"),
    ("--rate 4005", "multiple of 4"),
    ("--norm_groups 3", "--norm_groups"),
    ("--windows 1,2", "--windows"),
    ("--windows 9", "--windows"),
    ("--video_attention 16", "factors [1, 2]"),
    ("--diffusion_steps 20", "above 20"),
    ("--diffusion_steps 50 --sample_steps 51", "--sample_steps must not exceed"),
    ("--random_shift perhaps", "--random_shift"),
    ("--preset huge", "--preset"),
    ("--fps 0", "too small"),
    ("--data toy:tennis", "bounce, collide"),
    ("--data concerts", "python data.py prepare FOLDER --name concerts"),
    ("--init_from nowhere.pt", "no checkpoint nowhere.pt"),
    ("--heads 3", "--heads"),
    ("--cross_head_dim 5", "--cross_head_dim"),
    ("--device gpu", "no --device gpu here"),
    ("--betas 0.9", "--betas needs two"),
    ("--betas many", "numbers with commas"),
    ("--dropout 1", "--dropout"),
    ("--seconds -5", "--seconds"),
    ("--sr_ckpt nowhere.pt", "no checkpoint nowhere.pt"),
    ("--val_clips", "--val_clips"),
])
def test_wrong_options_end_in_one_sentence(args, says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        mm.main([*TINY, "--out", "out", *args.split()])
    assert stop.value.code.startswith("mm_diffusion.py: ")
    assert says in stop.value.code
    assert "\n" not in stop.value.code
    assert not Path("out/ckpt.pt").exists()


def test_processes_say_it_once(tmp_path):
    code, _, err = run("--data", "concerts", cwd=tmp_path, launcher=torchrun(2))
    assert code != 0
    assert err.count("python data.py prepare FOLDER --name concerts") == 1
    assert 'mm_diffusion.py", line' not in err  # no traceback of ours


@pytest.mark.parametrize("args,says", [
    ("--model mm_diffusion", "`python mm_diffusion.py`"),
    ("", "--model"),
    ("--model data", "not a model file"),
    ("--model ../x", "no model file"),
    ("--model mm_diffusion --ckpt no.pt", "no checkpoint no.pt"),
    ("--model mm_diffusion --device gpu", "no --device gpu"),
    ("--model mm_diffusion --steps 0", "--n and --steps"),
    ("--model mm_diffusion --start -1", "--start"),
])
def test_sample_py_says_what_is_missing(args, says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        sample.main(args.split())
    assert says in stop.value.code
    assert "\n" not in stop.value.code
    assert not Path("out").exists()


def test_mps_is_there_on_request_only(monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert mm.setup(tiny()).type in ("cpu", "cuda")
    assert sample.find_device("auto") in ("cpu", "cuda")
