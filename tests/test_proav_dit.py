"""proav_dit.py: audio as video, MDSA and its losses, STDiT, reflected flow, the two stages, sampling, user mistakes."""
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import data
import proav_dit as pa
import sample

torch.set_num_threads(1)
TINY = ("--preset toy --data toy --frames 4 --size 8 --patch 2 --rate 4000 --n_mels 16 --hop 50 --window 128 "
        "--n_fft 128 --width 16 --heads 2 --head_dim 8 --decoder_depth 1 --proj_mlp 16 --blocks 2,2,2 --disc_width 4 "
        "--disc_start 2 --mdsa_steps 3 --mdsa_batch_size 4 --dit_width 16 --dit_depth 1 "
        "--dit_heads 2 --text_width 16 --text_tokens 8 --cache_latents 8 --steps 4 --batch_size 4 --val_clips 4 "
        "--workers 0 --samples 1 --log_every 1 --val_every 1000 --sample_every 1000 --save_every 1000 "
        "--griffin_lim 4 --sample_steps 2 --need_good false --adv true --lr_end 1").split()

GENERATOR = "."      # the folder of stage dit in that of the run


def tiny(*more):
    return pa.parse([*TINY, *more])


def net_of(kind, cfg, seed=0):
    """A network whose every parameter is random: the zeroed ones would hide what is behind them."""
    torch.manual_seed(seed)
    net = kind(cfg)
    with torch.no_grad():
        for p in net.parameters():
            if p.abs().max() == 0:
                p.normal_(0, 0.1)
    return net.eval()


def clips(cfg, n=2, split="train"):
    ds = data.open_dataset("toy", split, cfg.frames, cfg.size, cfg.fps, cfg.rate)
    return data.to_device(data.make_batch(ds, 0, n, range(n)), "cpu")


def weights(folder, which="model"):
    return torch.load(Path(folder) / "ckpt.pt", weights_only=True)[which]


def same(one, two, tol=0.0):
    return one.keys() == two.keys() and all((one[k] - two[k]).abs().max() <= tol for k in one)


# ---- audio as video

def onset(wave, rate):
    """The moment of the steepest rise of loudness, in s."""
    loud = wave.abs().unfold(0, rate // 200, rate // 1000).mean(1)               # windows of 5 ms every ms
    return (loud[10:] - loud[:-10]).argmax().item() / 1000 + 0.005


def test_mel_images_are_one_per_frame_and_without_seams():
    cfg = pa.parse(["--preset", "toy"])
    mel, t = pa.Mel(cfg), torch.arange(12800) / 8000
    A = mel(torch.sin(2 * math.pi * 500 * t)[None, None])
    assert A.shape == (1, 16, 1, 64, 16) and A.min() >= -1 and A.max() <= 1 and A.max() > 0.8
    assert (A[0, 3:13, 0].transpose(1, 2).flatten(0, 1).diff(dim=0)).abs().max() < 0.15      # a steady tone stays so
    assert mel(torch.zeros(1, 1, 12800)).max() == -1
    late = mel(torch.nn.functional.pad(torch.ones(1, 1, 10), (8000, 4790)))      # a click 1 s in: frame 10, column 0
    assert (late[0, :, 0].mean(1) > -1).nonzero().amin(0).tolist()[0] in (9, 10)
    assert late[0, 10, 0].mean(0).argmax() == 0


def test_sound_survives_the_round_trip():
    """Attainable quality of the vocoder alone; a click is found again to a few ms. Floors are 1-2 dB below measured."""
    cfg = pa.parse(["--preset", "toy"])
    mel, t, draw = pa.Mel(cfg), torch.arange(12800) / 8000, torch.Generator().manual_seed(0)
    chirp = 0.5 * torch.sin(2 * math.pi * (300 * t + 400 * t ** 2))
    ring = torch.where(t > 0.7, 0.9 * torch.exp(-(t - 0.7) / 0.1) * torch.sin(2 * math.pi * 900 * (t - 0.7)), 0 * t)
    noise = 0.2 * torch.randn(12800, generator=draw)
    x = torch.stack([chirp, ring, noise])[:, None]
    A = mel(x)
    wave = mel.inverse(A)
    assert wave.shape == (3, 12800)
    got = [pa.psnr(mel(w[None, None]), a[None]).item() for w, a in zip(wave, A, strict=True)]
    assert got[0] > 33 and got[1] > 33 and got[2] > 30, got
    assert abs(onset(wave[1], 8000) - 0.7) < 0.006
    mel.cfg = pa.parse(["--preset", "toy", "--refine", "10"])
    assert pa.psnr(mel(mel.inverse(A[:1])[:, None]), A[:1]) > got[0] + 0.5
    again = mel.inverse(A[1:])                       # a clip's phases do not depend on its neighbours
    assert (pa.Mel(cfg).inverse(A)[1:] - pa.Mel(cfg).inverse(A[1:])).abs().max() < 1e-3 and again.shape == (2, 12800)


def test_chirps_keep_their_pitch():
    cfg = pa.parse(["--preset", "toy"])
    mel, t = pa.Mel(cfg), torch.arange(12800) / 8000
    for hz in (290, 750, 1500):
        wave = mel.inverse(mel(0.4 * torch.sin(2 * math.pi * hz * t)[None, None]))[0]
        peak = torch.fft.rfft(wave).abs().argmax().item() / 1.6
        assert abs(peak - hz) < 0.06 * hz, (hz, peak)


# ---- MDSA

def test_shapes_of_latents_and_of_single_streams():
    for streams in ("av", "v", "a"):
        cfg = tiny("--streams", streams)
        auto, batch = net_of(pa.Autoencoding, cfg), clips(cfg)
        x = auto.streams(batch["video"], batch["audio"])
        out, z, kl = auto.mdsa(x)
        assert set(out) == set(z) == set(kl) == set(streams)
        for m in streams:
            assert out[m].shape == x[m].shape and kl[m] > 0
            assert {k: tuple(p.shape) for k, p in z[m].items()} == {
                "hw": (2, 4, 4, 4), "tw": (2, 4, 4, 4), "th": (2, 4, 4, 4)}
            assert all(p.abs().max() < 1 for p in z[m].values())


def test_patches_and_blocks_are_inverted():
    cfg = tiny("--blocks", "2,4,2")
    stream, mdsa = pa.Stream(cfg, 3, (2, 4)), pa.MDSA(cfg)
    x = torch.randn(2, 4, 3, 8, 16)
    assert stream.patches(x).shape == (2, 4, 4, 4, 24) and torch.equal(stream.pixels(stream.patches(x)), x)
    u = torch.randn(2, 4, 4, 4, 16)
    parts = mdsa.cut(u)
    assert parts.shape == (2 * 4, 16, 16) and torch.equal(mdsa.cut(parts, u.shape), u)
    assert torch.equal(parts[1, 0], u[0, 0, 0, 2])   # the second block starts two columns on


def test_projections_pool_the_axis_they_are_named_without():
    """Permuting frames leaves hw as it is, where attention over frames is off; tw and th are permuted."""
    cfg = tiny()
    stream, batch = pa.Stream(cfg, 3, (2, 2)), clips(cfg)
    with torch.no_grad():
        for name, p in stream.project.named_parameters():
            if "table" in name:
                p.zero_()
    a, b = stream.planes(batch["video"]), stream.planes(batch["video"].flip(1))
    assert (a["hw"] - b["hw"]).abs().max() < 1e-5
    assert (a["tw"].flip(1) - b["tw"]).abs().max() < 1e-5 and (a["th"].flip(1) - b["th"]).abs().max() < 1e-5
    flipped = stream.planes(batch["video"].unflatten(3, (4, 2)).flip(3).flatten(3, 4))       # rows of patches
    assert (a["tw"] - flipped["tw"]).abs().max() < 1e-5 and (a["th"].flip(2) - flipped["th"]).abs().max() < 1e-5


def test_multiscale_attention_sees_all_times_of_one_column_only():
    layer = net_of(lambda _: pa.MTSelfAttention(16, 2), None)
    z = torch.randn(1, 8, 3, 16)
    changed = z.clone()
    changed[:, 0, 1] = torch.randn(16)
    moved = (layer(changed) - layer(z)).abs().amax((0, 3))                       # (F, S)
    assert (moved[:, 1] > 0).all() and (moved[:, [0, 2]] == 0).all()
    assert torch.equal(pa.MTSelfAttention(16, 2)(z), z)                          # fresh: nothing yet


@pytest.mark.parametrize("switch,linked", [((), True), (("--gcm_attn", "false", "--biblock", "false"), False)])
def test_streams_see_each_other_through_gcm_and_biblock_alone(switch, linked):
    cfg = tiny(*switch)
    auto, batch = net_of(pa.Autoencoding, cfg), clips(cfg)
    x = auto.streams(batch["video"], batch["audio"])
    one, two = auto.mdsa(x)[0]["v"], auto.mdsa({**x, "a": -x["a"]})[0]["v"]
    assert ((one - two).abs().max() > 1e-4) == linked


def test_bi_block_attention_stays_inside_its_block():
    cfg = tiny("--gcm_attn", "false", "--decoder_depth", "1")
    mdsa = net_of(pa.MDSA, cfg)
    v, a = torch.randn(1, 4, 4, 4, 16), torch.randn(1, 4, 4, 4, 16)
    changed = a.clone()
    changed[:, 0, 0, 0] = torch.randn(16)
    out = [mdsa.cut(mdsa.biblock(mdsa.cut(v), mdsa.cut(x), None)[0], v.shape) for x in (a, changed)]
    moved = (out[0] - out[1]).abs().amax((0, 4))
    assert (moved[:2, :2, :2] > 0).all() and moved.sum() == moved[:2, :2, :2].sum()


def test_closed_form_start_beats_a_constant_color_and_is_a_linear_code():
    cfg = pa.parse(["--preset", "toy"])
    torch.manual_seed(0)
    auto, batch = pa.Autoencoding(cfg), clips(cfg, 24)
    x = auto.streams(batch["video"], batch["audio"])
    pa.start_closed_form(auto.mdsa, x)
    u = auto.mdsa.streams["v"].to_patch(auto.mdsa.streams["v"].patches(x["v"]))
    back = auto.mdsa.streams["v"].pixels(auto.mdsa.streams["v"].to_pixel(u))
    assert pa.psnr(back, x["v"]) > 50                # 64 features hold the 48 numbers of a patch
    cfg.need_good, cfg.val_clips = False, 8
    table = pa.examine(auto, data.open_dataset("toy", "val"), "cpu")
    assert table["v"][0] > table["v"][1] + 1 and table["a"][0] > table["a"][1] + 1


def raw(cfg, n):
    return data.make_batch(data.open_dataset("toy", "val", cfg.frames, cfg.size, cfg.fps, cfg.rate), 0, n, range(n))


def test_losses_and_their_schedule():
    cfg = tiny()
    auto, batch = net_of(pa.Autoencoding, cfg), clips(cfg)
    first, parts = auto(batch["video"], batch["audio"], False)
    second, _ = auto(batch["video"], batch["audio"], True)
    assert set(parts) == {"video", "audio"} and second > first
    first.backward()
    assert all(p.grad.abs().max() == 0 for p in auto.critics.parameters())       # there for DDP, and zero
    assert all(p.grad is not None for p in auto.mdsa.parameters())
    for kl in ("pixel", "off"):
        auto.cfg = tiny("--kl", kl)
        assert auto(batch["video"], batch["audio"], True)[0].isfinite()
    assert pa.perceptual(batch["video"][0], batch["video"][0]) == 0


def test_one_backward_serves_both_players():
    """The critics get gradients from the hinge loss alone, the autoencoder from its own terms alone."""
    cfg = tiny()
    auto, x = net_of(pa.Autoencoding, cfg), torch.randn(2, 4, 3, 8, 8)
    fake = torch.randn(2, 4, 3, 8, 8, requires_grad=True)
    torch.manual_seed(0)
    gan, critic = auto.adversarial("v", x, fake)
    gan.backward(retain_graph=True)
    assert fake.grad.abs().max() > 0 and all(p.grad is None for p in auto.critics.parameters())
    fake.grad = None
    critic.backward()
    assert fake.grad is None and all(
        p.grad.abs().max() > 0 for p in auto.critics["v"].parameters() if p.dim() > 1)


# ---- STDiT and reflected flow

def test_padding_is_neither_seen_nor_changed():
    cfg = tiny("--frames", "8")                      # tw and th have 8 rows, hw 4
    model = net_of(pa.ProAV, cfg)
    assert model.valid.shape == (1, 6, 8, 1, 1) and model.valid.sum() == 2 * (4 + 8 + 8)
    x, t = torch.randn(2, 6, 8, 4, 4), torch.tensor([0.2, 0.7])
    words, mask = pa.read(["a red ball", ""], cfg, "cpu")
    v = model(x, t, words, mask)
    dirty = torch.where(model.valid, x, x + 5)
    assert v.shape == x.shape and (v * ~model.valid).abs().max() == 0
    assert (model(dirty, t, words, mask) - v).abs().max() < 1e-5
    for plane in range(6):                           # what every plane holds reaches every other
        y = x.clone()
        y[:, plane, 0] += 1
        assert ((model(y, t, words, mask) - v).abs().amax((0, 2, 3, 4)) > 0).all()


def test_rotary_places_make_a_spatial_block_tell_neighbors_apart():
    torch.manual_seed(0)
    block, x, y, t6 = pa.STDiT3Block(16, 2), torch.randn(1, 3, 8, 16), torch.randn(1, 2, 16), torch.randn(1, 1, 96)
    turn, order = pa.grid((4, 2), 8), torch.randperm(8)
    plain, turned = block(x, y, t6), block(x, y, t6, turn=turn)
    assert (plain - turned).abs().max() > 1e-3
    assert (block(x[:, :, order], y, t6) - plain[:, :, order]).abs().max() < 1e-5            # a set of tokens
    assert (block(x[:, :, order], y, t6, turn=turn) - turned[:, :, order]).abs().max() > 1e-3
    assert (block(x[:, :, order], y, t6, turn=turn[:, order]) - turned[:, :, order]).abs().max() < 1e-5
    x, t = torch.randn(1, 6, 8, 8, 4), torch.tensor([0.3])
    words, mask = pa.read(["a ball"], tiny(), "cpu")
    cfgs = (tiny("--frames", "8", "--size", "16", "--dit_rope", flag) for flag in ("true", "false"))
    one, two = (net_of(pa.ProAV, cfg)(x, t, words, mask) for cfg in cfgs)
    assert (one - two).abs().max() > 1e-3


def test_text_and_time_matter_and_the_fresh_velocity_is_zero():
    cfg = tiny()
    model, t = net_of(pa.ProAV, cfg), torch.tensor([0.2, 0.7])
    x, (words, mask) = torch.randn(2, 6, 4, 4, 4), pa.read(["a red ball", "a red ball"], cfg, "cpu")
    v = model(x, t, words, mask)
    assert (model(x, t.flip(0), words, mask) - v).abs().max() > 1e-4
    other = model(x, t, *pa.read(["a red ball", "a blue ball"], cfg, "cpu"))
    assert torch.equal(other[0], v[0]) and not torch.equal(other[1], v[1])
    more = pa.read(["a red ball", "a red ball and other words"], cfg, "cpu")
    assert torch.equal(more[0][0], words[0]) and more[1].sum(1).tolist() == [4, 7]
    assert pa.ProAV(cfg)(x, t, words, mask).abs().max() == 0


def test_spelling_and_variation_of_captions():
    ids = pa.spell(["Red, ball!", "", "a " * 50], 8)
    assert torch.equal(ids[0], pa.spell(["red ball"], 8)[0]) and ids[1].count_nonzero() == 1
    assert (ids[2] > 0).any(1).all()
    names = [pa.vary("a small red ball", "bounce", key) for key in range(2000)]
    share = {n: names.count(n) / 2000 for n in ("", "a video of bounce", "a small red ball")}
    assert 0.07 < share[""] < 0.14 and 0.25 < share["a video of bounce"] < 0.35 and share["a small red ball"] > 0.14
    assert {"red ball", "a small ball", "a video of a small red ball", "a video of red ball"} <= set(names)
    for caption in ("a video of rain", "a video"):   # of a clip that came without a caption
        names = {pa.vary(caption, "rain", key) for key in range(300)}
        assert names <= {"", "a video of rain", "rain", "a video"} and len(names) > 1


def test_prior_and_reflection():
    x = pa.truncated_normal((100000,), torch.Generator().manual_seed(0))
    assert x.abs().max() <= 1 and abs(x.std() - 0.5395) < 0.01 and abs(x.mean()) < 0.01
    y, walls = pa.reflect(torch.tensor([0.5, 1.25, -1.5, 3.25, 1.0, -1.0, 5.5]))
    assert y.tolist() == [0.5, 0.75, -0.5, -0.75, 1.0, -1.0, 0.5] and walls.tolist() == [0, 1, 1, 2, 1, 0, 3]


def test_heun_reflects_velocities_and_is_of_second_order():
    """A ball between walls: position x_0 + t s folded; its velocity field turns at the walls."""
    exact = pa.reflect(torch.tensor([0.9]) + 0.7)[0]
    # dx/dt = g(t) in the unfolded world. At a folded point the field points the other way.
    def field(t, x):
        return torch.full_like(x, 0.7) if t == 0 else torch.full_like(x, -0.7)
    assert (pa.heun(field, torch.tensor([0.9]), 2) - exact).abs() < 1e-6
    errors = [(pa.heun(lambda t, x: torch.cos(3 * x + t), torch.tensor([0.1]), n)
               - pa.euler(lambda t, x: torch.cos(3 * x + t), torch.tensor([0.1]), 4000)).abs().item() for n in (10, 20)]
    assert errors[1] < errors[0] / 2.5


def test_flow_recovers_a_known_velocity_and_counts_valid_entries_alone():
    cfg = tiny("--frames", "8")
    model = net_of(pa.ProAV, cfg)
    flow, batch = pa.ReflectedFlow(model), clips(cfg)
    z = model.encode(model.streams(batch["video"], batch["audio"]))
    assert z.shape == (2, 6, 8, 4, 4) and (z * ~model.valid).abs().max() == 0 and z.abs().max() < 1
    seen = []

    def net(x, t, words, mask):
        seen.append((x, t))
        return torch.zeros_like(x)
    loss, parts = flow.loss(net, batch)
    again, _ = flow.loss(net, {**batch, "audio": z[:, None]})
    assert torch.equal(seen[0][0], seen[1][0]) and loss == again
    assert loss.item() == pytest.approx(sum(parts.values()).item())
    (x, _), t = seen[0], torch.full((2,), 0.25)
    assert x.abs().max() <= 1
    flow.loss(net, {**batch, "audio": z[:, None], "u": t})
    x0 = (seen[-1][0] - 0.25 * z) / 0.75
    perfect, _ = flow.loss(lambda *_: (z - x0), {**batch, "audio": z[:, None], "u": t})
    assert perfect < 1e-10


def test_decode_inverts_the_stacking():
    cfg = tiny("--frames", "8")
    model, batch = net_of(pa.ProAV, cfg), clips(cfg)
    x = model.streams(batch["video"], batch["audio"])
    video, audio = model.decode(model.encode(x))
    assert (video - model.mdsa(x)[0]["v"]).abs().max() < 1e-5 and audio.shape == (2, 3200)


# ---- the two stages and sampling

@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    out = tmp_path_factory.mktemp("run")
    pa.main([*TINY, "--out", str(out)])
    return out


def test_a_run_writes_both_stages_and_the_second_time_does_nothing(trained, capsys):
    files = {p.relative_to(trained).as_posix() for p in trained.rglob("*") if p.is_file()}
    want = {"mdsa/ckpt.pt", "mdsa/log.csv", "ckpt.pt", "log.csv"}
    assert want <= files and any(f.startswith("samples/") for f in files)
    for name in ("mdsa/samples/", "latents_train", "latents_val"):
        assert any(f.startswith(name) for f in files)
    times = {f: (trained / f).stat().st_mtime_ns for f in files}
    pa.main([*TINY, "--out", str(trained)])
    text = capsys.readouterr().out
    assert "Stage mdsa is finished" in text and "Stage dit is finished" in text
    assert times == {f: (trained / f).stat().st_mtime_ns for f in files}
    # The generator's checkpoint holds the autoencoder it was trained with: the averaged weights of stage one.
    first, last = weights(trained / "mdsa", "ema"), weights(trained / GENERATOR)
    assert all(torch.equal(last[k], p) for k, p in first.items() if k.startswith("mdsa."))


def test_stages_apart_and_interrupted_are_bit_exactly_those_of_one_go(trained, tmp_path):
    args = [*TINY, "--out", str(tmp_path), "--stage"]
    pa.main([*args, "mdsa", "--mdsa_steps", "1"])
    pa.main([*args, "mdsa"])
    pa.main([*args, "dit", "--steps", "3"])
    assert not same(weights(trained / GENERATOR), weights(tmp_path / GENERATOR))
    pa.main([*args, "dit"])
    for stage in ("mdsa", GENERATOR):
        assert same(weights(trained / stage), weights(tmp_path / stage))
        assert same(weights(trained / stage, "ema"), weights(tmp_path / stage, "ema"))


def test_latents_encoded_on_the_way_give_the_same_steps(trained, tmp_path):
    pa.main([*TINY, "--out", str(tmp_path), "--stage", "mdsa"])
    pa.main([*TINY, "--out", str(tmp_path), "--stage", "dit", "--cache_latents", "0", "--steps", "2"])
    rows = [(f / "log.csv").read_text().splitlines()[2].split(",")[1] for f in (trained, tmp_path)]
    assert float(rows[0]) == pytest.approx(float(rows[1]), rel=1e-3)


@pytest.mark.parametrize("options", [
    "--streams v --cache_latents 0", "--streams a --kl off --adv false", "--amp bf16 --frames 8 --blocks 4,2,2",
    "--mt_attn false --gcm_attn false --biblock false --kl pixel --optimizer adamw --grad_accum 2",
])
def test_variants_train_and_sample(options, tmp_path):
    pa.main([*TINY, *options.split(), "--out", str(tmp_path), "--steps", "2"])
    model = pa.load(tmp_path / "ckpt.pt")
    video, audio = pa.sample(model, 1, prompt="a ball")
    assert (video is None) == ("v" not in model.cfg.streams) and (audio is None) == ("a" not in model.cfg.streams)


def test_two_processes_learn_what_one_learns(tmp_path):
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    for folder, launcher in (("one", []), ("two", torchrun)):
        args = [*TINY, "--disc_start", "99", "--optimizer", "adamw", "--lr", "1e-3", "--out", str(tmp_path / folder)]
        run = subprocess.run([sys.executable, *launcher, str(Path(pa.__file__)), *args], cwd=tmp_path, text=True,
                             capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=240)
        assert run.returncode == 0, run.stderr
    for stage in ("mdsa", GENERATOR):
        assert same(weights(tmp_path / "one" / stage), weights(tmp_path / "two" / stage), 1e-3)


def test_samples_depend_on_seed_place_and_text_alone(trained):
    model = pa.load(trained / "ckpt.pt")
    with torch.no_grad():
        for p in model.dit.parameters():             # 4 steps taught it nothing
            p.add_(0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    video, audio = pa.sample(model, 3, prompt="a red ball", seed=5)
    assert video.shape == (3, 4, 8, 8, 3) and video.dtype == torch.uint8
    assert audio.shape == (3, 1600) and audio.dtype == torch.float32 and audio.abs().max() <= 1
    again = pa.sample(model, 2, prompt="a red ball", seed=5, batch_size=1)
    assert (video[:2].int() - again[0].int()).abs().max() <= 1 and (audio[:2] - again[1]).abs().max() < 1e-3
    for options in ({"seed": 6, "prompt": "a red ball"}, {"prompt": "rain"}, {"label": "rain"}, {}, {"guidance": 1.0,
                    "prompt": "a red ball"}, {"prompt": "a red ball", "negative_prompt": "blue"}):
        other = pa.sample(model, 1, **{"seed": 5, **options})
        assert (other[1] - audio[:1]).abs().max() > 1e-6, options
    assert pa.sample(model, 1, sampler="heun", steps=3)[0].shape == (1, 4, 8, 8, 3)


def test_a_given_stream_comes_back_and_shapes_the_other(trained):
    model, cfg = pa.load(trained / "ckpt.pt"), tiny()
    with torch.no_grad():
        for p in model.dit.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    clip = raw(cfg, 2)
    video, audio = pa.sample(model, 2, video=clip["video"][0], seed=3)
    assert torch.equal(video[0], clip["video"][0]) and torch.equal(video[1], clip["video"][0])
    other = pa.sample(model, 2, video=clip["video"][1], seed=3)[1]
    assert (audio - other).abs().max() > 1e-6
    each = pa.sample(model, 2, video=clip["video"], seed=3, batch_size=1)            # one video for each clip
    assert torch.equal(each[0], clip["video"]) and (each[1] - torch.stack([audio[0], other[1]])).abs().max() < 1e-3
    video, audio = pa.sample(model, 1, audio=clip["audio"][0].numpy(), seed=3)
    assert torch.equal(audio[0], clip["audio"][0]) and video.shape == (1, 4, 8, 8, 3)
    for wrong in ({"video": clip["video"][0], "audio": clip["audio"][0]}, {"prompt": "x", "label": "y"}):
        with pytest.raises(data.UserError, match="not both"):
            pa.sample(model, 1, **wrong)


def test_sample_py_takes_a_prompt_and_a_video(trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    args = ["--model", "proav_dit", "--ckpt", str(trained / "ckpt.pt"), "--n", "1", "--device", "cpu"]
    sample.main([*args, "--prompt", "a video of a red ball bouncing", "--guidance", "2", "--sampler", "heun"])
    out = tmp_path / "out" / "proav_dit" / "samples_001"
    assert {"000.mp4", "000.wav", "000.png", "index.html"} <= {p.name for p in out.iterdir()}
    sample.main([*args, "--video", str(out / "000.mp4")])
    sample.main([*args, "--audio", str(out / "000.wav")])
    with pytest.raises(SystemExit, match="stage dit"):
        sample.main(["--model", "proav_dit", "--ckpt", str(trained / "mdsa" / "ckpt.pt")])


def test_a_folder_keeps_to_its_run(trained, tmp_path, capsys):
    """Other options over finished stages, another autoencoder under a generator: a sentence, and nothing is touched."""
    def says(*args):
        with pytest.raises(SystemExit) as stop:
            pa.main([*TINY, "--out", str(tmp_path), *args])
        return stop.value.code
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    assert "--kl latent: choose another --out" in says("--kl", "off")
    assert "--dit_depth 1: choose another --out" in says("--dit_depth", "2")
    before = (tmp_path / "ckpt.pt").read_bytes()
    assert "trained with another autoencoder" in says("--mdsa_steps", "4", "--steps", "5")
    assert (tmp_path / "ckpt.pt").read_bytes() == before
    torch.save({"weight": torch.zeros(1)}, tmp_path / "ckpt.pt")
    assert "is of no run" in says()
    (tmp_path / "ckpt.pt").unlink()
    pa.main([*TINY, "--out", str(tmp_path), "--mdsa_steps", "4", "--steps", "1", "--optimizer", "adamw"])
    assert "Stage mdsa is finished" in capsys.readouterr().out       # the generator may learn in its own way


def test_more_samples_than_validation_clips_and_bare_weights_to_start_from(trained, tmp_path, monkeypatch):
    monkeypatch.setattr(data.ToyClips, "__len__", lambda self: 2 if self.numbers.start else 2**40)
    torch.save(weights(trained / "mdsa", "ema"), tmp_path / "bare.pt")
    args = [*TINY, "--out", str(tmp_path), "--samples", "3", "--mdsa_steps", "1", "--mdsa_lr", "1e-12", "--stage"]
    pa.main([*args, "mdsa", "--init_from", str(tmp_path / "bare.pt")])
    assert same(weights(tmp_path / "mdsa"), weights(trained / "mdsa", "ema"), 1e-6)
    pa.main([*args, "dit", "--steps", "1"])
    assert len(list((tmp_path / "samples").glob("*.mp4"))) == 2


def test_an_autoencoder_that_trivial_codes_beat_stops_the_run(tmp_path):
    with pytest.raises(SystemExit) as stop:
        pa.main([*TINY, "--out", str(tmp_path), "--need_good", "true", "--plane_channels", "1"])
    assert "does not beat its baselines" in stop.value.code and not (tmp_path / "ckpt.pt").exists()


@pytest.mark.parametrize("args,says", [
    ("--stage train", "--stage"), ("--kl gauss", "--kl"), ("--init_from x.pt", "starts one stage"),
    ("--batch_size 6 --grad_accum 4", "must divide by 4"), ("--size 18 --patch 4", "even number of --patch"),
    ("--frames 6", "must divide by 4"), ("--size 12 --n_mels 18", "must divide by 4"), ("--hop 33", "multiple of"),
    ("--n_mels 20 --size 24", "--n_mels (20)"), ("--betas 0.9", "two numbers"), ("--floor 0", "--floor"),
    ("--text nowhere", "not the folder of a T5"), ("--device gpu", "no --device gpu"),
    ("--init_from nowhere.pt --stage mdsa", "no checkpoint nowhere.pt"),
    ("--window 512", "--window"), ("--blocks 3,2,2", "--blocks"), ("--blocks 2,2", "--blocks"),
    ("--width 12", "--width"),
    ("--head_dim 6", "--head_dim"), ("--dit_heads 3", "--dit_heads"), ("--disc_width 6", "--disc_width"),
    ("--text_tokens 1", "--text_tokens"), ("--steps 0", "too small"), ("--stage dit", "needs the finished stage mdsa"),
    ("--data toy:tennis", "bounce, collide"), ("--widht 3", "unrecognized"), ("--sampler rk4", "--sampler"),
])
def test_wrong_options_end_in_one_sentence(args, says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        pa.main([*TINY, *args.split(), "--out", "out"])
    assert says in stop.value.code and "\n" not in stop.value.code


def test_a_t5_of_another_width_or_without_its_library_is_one_sentence(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text('{"d_model": 24}')
    with pytest.raises(SystemExit) as stop:
        tiny("--text", str(tmp_path))                # TINY has 16
    assert "--text_width 16" in stop.value.code
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(data.UserError, match="transformers"):
        pa.read(["a"], tiny("--text", str(tmp_path), "--text_width", "24"), "cpu")


@pytest.mark.parametrize("preset", pa.PRESETS)
def test_presets_take_a_training_step(preset):
    """On the meta device, which has shapes but no numbers."""
    cfg = pa.parse(["--preset", preset])
    with torch.device("meta"):
        one, two = pa.Autoencoding(pa.mdsa_config(cfg)), pa.ProAV(cfg)
        video = torch.empty(1, cfg.frames, 3, cfg.size, cfg.size)
        sound = torch.empty(1, cfg.frames, 1, cfg.n_mels, cfg.rate // cfg.fps // cfg.hop)
        z = torch.empty(1, *two.valid.shape[1:3], cfg.size // cfg.patch, cfg.plane_channels)
        t, words = torch.empty(1), torch.zeros(1, cfg.text_tokens, pa.LETTERS, dtype=torch.long)
    one.streams = lambda *_: {"v": video, "a": sound}            # the meta device has no STFT
    for second in (False, True):
        one(video, None, second)[0].backward()
    two(z, t, words, words.any(-1)).sum().backward()
    assert all(p.grad is not None for m in (one, two) for p in m.parameters() if p.requires_grad)
    if preset == "paper":
        assert (pa.count(one.mdsa), pa.count(two.dit)) == (141131768, 697495696)
