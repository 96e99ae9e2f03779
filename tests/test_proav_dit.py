"""proav_dit.py: audio as video, MDSA and its losses, STDiT, reflected flow, stages, sampling."""

import dataclasses
import json
import math
import os
import shutil
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch

import data
import proav_dit as pa
import sample

torch.set_num_threads(1)
TINY = """
    --preset toy --data toy --frames 4 --size 8 --patch 2 --rate 4000 --n_mels 16 --hop 50
    --window 128 --n_fft 128 --width 16 --heads 2 --head_dim 8 --decoder_depth 1 --proj_mlp 16
    --blocks 2,2,2 --disc_width 4 --disc_start 2 --mdsa_steps 3 --mdsa_batch_size 4 --dit_width 16
    --dit_depth 1 --dit_heads 2 --text_width 16 --text_tokens 8 --cache_latents 8 --steps 4
    --batch_size 4 --val_clips 4 --workers 0 --samples 1 --log_every 1 --eval_every 1000
    --griffin_lim 4 --sample_steps 2 --need_good false --adv true --lr_end 1
""".split()


def tiny(*more):
    return pa.parse([*TINY, *more])


def net_of(kind, cfg, seed=0):
    """A network whose every parameter is random: zeroed ones would hide what is behind them."""
    torch.manual_seed(seed)
    net = kind(cfg)
    with torch.no_grad():
        for p in net.parameters():
            if p.abs().max() == 0:
                p.normal_(0, 0.1)
    return net.eval()


def raw(cfg, n, split="train"):
    dataset = data.open_dataset("toy", split, cfg.frames, cfg.size, cfg.fps, cfg.rate)
    return data.make_batch(pa.Captioned(dataset, cfg), 0, range(n))


def clips(cfg, n=2):
    return data.to_device(raw(cfg, n), "cpu")


def words_of(cfg, *captions):
    return torch.from_numpy(np.stack([pa.spell(caption, cfg) for caption in captions]))


def weights(folder, which="model"):
    return torch.load(Path(folder) / "ckpt.pt", weights_only=True)[which]


def same(one, two, tol=0.0):
    return one.keys() == two.keys() and all((one[k] - two[k]).abs().max() <= tol for k in one)


# ---- Audio as video


def onset(wave, rate):
    """The moment of the steepest rise of loudness, in s."""
    loud = wave.abs().unfold(0, rate // 200, rate // 1000).mean(1)  # windows of 5 ms every ms
    return (loud[10:] - loud[:-10]).argmax().item() / 1000 + 0.005


def test_mel_images_are_one_per_frame_and_without_seams():
    mel = pa.Mel(pa.parse(["--preset", "toy"]))
    t = torch.arange(12800) / 8000
    A = mel(torch.sin(2 * math.pi * 500 * t)[None, None])
    assert A.shape == (1, 16, 1, 64, 16)
    assert A.min() >= -1 and 0.8 < A.max() <= 1
    steady = A[0, 3:13, 0].transpose(1, 2).flatten(0, 1)  # (columns, M)
    assert steady.diff(dim=0).abs().max() < 0.15
    assert mel(torch.zeros(1, 1, 12800)).max() == -1
    # A click 1 s in: frame 10, column 0.
    late = mel(torch.nn.functional.pad(torch.ones(1, 1, 10), (8000, 4790)))
    first = (late[0, :, 0].mean(1) > -1).nonzero().amin(0).tolist()[0]
    assert first in (9, 10)
    assert late[0, 10, 0].mean(0).argmax() == 0


def test_sound_survives_the_round_trip():
    """Attainable quality of the vocoder alone. Floors are 1-2 dB below what was measured."""
    mel = pa.Mel(pa.parse(["--preset", "toy"]))
    t = torch.arange(12800) / 8000
    chirp = 0.5 * torch.sin(2 * math.pi * (300 * t + 400 * t**2))
    ring = 0.9 * torch.exp(-(t - 0.7) / 0.1) * torch.sin(2 * math.pi * 900 * (t - 0.7))
    ring = torch.where(t > 0.7, ring, 0)
    noise = 0.2 * torch.randn(12800, generator=torch.Generator().manual_seed(0))
    A = mel(torch.stack([chirp, ring, noise])[:, None])
    wave = mel.inverse(A)
    assert wave.shape == (3, 12800)
    for x, a, floor in zip(wave, A, (33, 33, 30), strict=True):
        assert pa.psnr(mel(x[None, None]), a[None]) > floor
    assert abs(onset(wave[1], 8000) - 0.7) < 0.006
    # A clip's phases do not depend on its neighbors.
    assert (wave[1:] - mel.inverse(A[1:])).abs().max() < 1e-3


def test_chirps_keep_their_pitch():
    mel = pa.Mel(pa.parse(["--preset", "toy"]))
    t = torch.arange(12800) / 8000
    for hz in (290, 750, 1500):
        wave = mel.inverse(mel(0.4 * torch.sin(2 * math.pi * hz * t)[None, None]))[0]
        peak = torch.fft.rfft(wave).abs().argmax().item() / 1.6
        assert abs(peak - hz) < 0.06 * hz, (hz, peak)


# ---- MDSA


@pytest.mark.parametrize("streams", ["av", "v", "a"])
def test_shapes_of_latents_and_of_single_streams(streams):
    cfg = tiny("--streams", streams)
    mdsa = net_of(pa.MDSA, cfg)
    x = mdsa.inputs(clips(cfg))
    out, z, kl = mdsa(x)
    assert set(out) == set(z) == set(kl) == set(streams)
    for m in streams:
        assert out[m].shape == x[m].shape
        assert kl[m] > 0
        for k in pa.PLANES:
            assert z[m][k].shape == (2, 4, 4, 4)
            assert z[m][k].abs().max() < 1


def test_patches_and_blocks_are_inverted():
    cfg = tiny("--blocks", "2,4,2")
    stream = pa.Stream(cfg, 3, (2, 4))
    x = torch.randn(2, 4, 3, 8, 16)
    assert stream.patches(x).shape == (2, 4, 4, 4, 24)
    assert torch.equal(stream.pixels(stream.patches(x)), x)
    mdsa = pa.MDSA(cfg)
    u = torch.randn(2, 4, 4, 4, 16)
    parts = mdsa.cut(u)
    assert parts.shape == (2 * 4, 16, 16)
    assert torch.equal(mdsa.join(parts), u)
    assert torch.equal(parts[1, 0], u[0, 0, 0, 2])  # the second block starts two columns on


def test_projections_pool_the_axis_they_are_named_without():
    """Permuting frames leaves hw as it is, where attention over frames is off; tw, th follow."""
    cfg = tiny()
    stream = pa.Stream(cfg, 3, (2, 2))
    with torch.no_grad():
        for name, p in stream.project.named_parameters():
            if "table" in name:
                p.zero_()
    video = clips(cfg)["video"]
    a = stream.planes(video)
    b = stream.planes(video.flip(1))
    assert (a["hw"] - b["hw"]).abs().max() < 1e-5
    assert (a["tw"].flip(1) - b["tw"]).abs().max() < 1e-5
    assert (a["th"].flip(1) - b["th"]).abs().max() < 1e-5
    flipped = stream.planes(video.unflatten(3, (4, 2)).flip(3).flatten(3, 4))  # rows of patches
    assert (a["tw"] - flipped["tw"]).abs().max() < 1e-5
    assert (a["th"].flip(2) - flipped["th"]).abs().max() < 1e-5


def test_multiscale_attention_sees_all_times_of_one_column_only():
    cfg = tiny("--frames", "8")
    layer = net_of(pa.MTSelfAttention, cfg)
    z = torch.randn(1, 8, 3, 16)
    changed = z.clone()
    changed[:, 0, 1] = torch.randn(16)
    moved = (layer(changed) - layer(z)).abs().amax((0, 3))  # (F, S)
    assert (moved[:, 1] > 0).all()
    assert (moved[:, [0, 2]] == 0).all()
    assert torch.equal(pa.MTSelfAttention(cfg)(z), z)  # fresh: nothing yet


@pytest.mark.parametrize("linked", [True, False])
def test_streams_see_each_other_through_gcm_and_biblock_alone(linked):
    cfg = tiny(*([] if linked else ["--gcm_attn", "false", "--biblock", "false"]))
    mdsa = net_of(pa.MDSA, cfg)
    x = mdsa.inputs(clips(cfg))
    one = mdsa(x)[0]["v"]
    two = mdsa({"v": x["v"], "a": -x["a"]})[0]["v"]
    assert ((one - two).abs().max() > 1e-4) == linked


def test_bi_block_attention_stays_inside_its_block():
    mdsa = net_of(pa.MDSA, tiny("--gcm_attn", "false"))
    v = torch.randn(1, 4, 4, 4, 16)
    a = torch.randn(1, 4, 4, 4, 16)
    changed = a.clone()
    changed[:, 0, 0, 0] = torch.randn(16)
    one = mdsa.join(mdsa.biblock(mdsa.cut(v), mdsa.cut(a))[0])
    two = mdsa.join(mdsa.biblock(mdsa.cut(v), mdsa.cut(changed))[0])
    moved = (one - two).abs().amax((0, 4))
    assert (moved[:2, :2, :2] > 0).all()
    assert moved.sum() == moved[:2, :2, :2].sum()


def test_attention_over_more_rows_than_cuda_takes():
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 32770, 1, 2, 4)
    mask = torch.rand(32770, 1, 1, 2) < 0.5
    mask[..., 0] = True
    whole = pa.attend_where(q, k, v, mask)
    for part in (slice(0, 3), slice(-3, None)):
        few = pa.attend_where(q[part], k[part], v[part], mask[part])
        assert (whole[part] - few).abs().max() < 1e-6


def test_pca_and_least_squares():
    torch.manual_seed(0)
    x = torch.randn(500, 3, dtype=torch.float64) @ torch.tensor(
        [[3.0, 0, 0], [0, 2, 1], [0, 0, 0.1]], dtype=torch.float64
    )
    mean, variances, axes = pa.pca([x[:200] + 1, x[200:] + 1])
    assert (mean - x.mean(0) - 1).abs().max() < 1e-12
    parts = (x + 1 - mean) @ axes
    assert (parts.T @ parts / 500 - torch.diag(variances)).abs().max() < 1e-10
    assert variances[0] > variances[1] > variances[2]

    y = x @ torch.tensor([[1.0], [2.0], [3.0]], dtype=torch.float64) - 4
    weights, bias = pa.least_squares([(x[:100], y[:100]), (x[100:], y[100:])])
    assert (x @ weights + bias - y).abs().max() < 0.02  # the ridge


def test_closed_form_start_beats_a_constant_color_and_is_a_linear_code():
    cfg = pa.parse(["--preset", "toy", "--need_good", "false", "--val_clips", "8"])
    torch.manual_seed(0)
    mdsa = pa.MDSA(cfg)
    x = mdsa.inputs(clips(cfg, 24))
    for m, stream in mdsa.streams.items():
        pa.start_closed_form(stream, list(x[m].split(1)))
    stream = mdsa.streams["v"]
    back = stream.pixels(stream.to_pixel(stream.to_patch(stream.patches(x["v"]))))
    assert pa.psnr(back, x["v"]) > 50  # 64 features hold the 48 numbers of a patch
    table = pa.examine(mdsa, data.open_dataset("toy", "val"), "cpu")
    color = x["v"].mean((1, 3, 4), keepdim=True).expand_as(x["v"])
    assert pa.psnr(mdsa(x)[0]["v"], x["v"]) > pa.psnr(color, x["v"]) + 1
    assert table["a"][0] > table["a"][1] + 1


# ---- The losses of MDSA


def test_losses_and_their_schedule():
    cfg = tiny()
    auto = net_of(pa.Autoencoding, cfg)
    batch = clips(cfg)
    x = auto.mdsa.inputs(batch)
    frame, eps = auto.draw(batch["key"], "cpu")
    first, parts = auto(x)
    second, later = auto(x, True, frame, eps)
    assert second > first
    assert set(parts) == set(later) == {"video", "audio"}
    assert first.item() == pytest.approx(sum(parts.values()).item())  # what is reported
    first.backward()
    assert all(p.grad.abs().max() == 0 for p in auto.critics.parameters())  # there, for DDP
    assert all(p.grad is not None for p in auto.mdsa.parameters())
    for kl in ("pixel", "off"):
        auto.cfg = tiny("--kl", kl)
        assert auto(x, True, frame, eps)[0].isfinite()
    assert pa.perceptual(batch["video"][0], batch["video"][0]) == 0


def test_chance_in_the_second_phase_follows_from_each_clip():
    auto = net_of(pa.Autoencoding, tiny("--frames", "8"))
    keys = torch.tensor([7, 8, 9])
    frame, eps = auto.draw(keys, "cpu")
    alone, noise = auto.draw(keys[1:2], "cpu")
    assert frame[1:2] == alone
    assert torch.equal(eps["v"]["tw"][1:2], noise["v"]["tw"])
    assert eps["a"]["hw"].shape == (3, 4, 4, 4)
    assert eps["a"]["th"].shape == (3, 8, 4, 4)
    assert not torch.equal(eps["a"]["tw"], eps["v"]["tw"])
    frames, _ = auto.draw(torch.arange(50), "cpu")
    assert set(frames.tolist()) == set(range(8))


def test_one_backward_serves_both_players():
    """The critics get gradients from the hinge loss alone, the autoencoder from its own."""
    torch.manual_seed(0)
    critic = pa.PatchDiscriminator(2, 3, 4)
    real = torch.randn(2, 3, 8, 8)
    fake = torch.randn(2, 3, 8, 8, requires_grad=True)
    pa.adversarial(critic, real, fake).backward()
    critic_grads = [p.grad.clone() for p in critic.parameters()]
    fake_grad = fake.grad.clone()

    critic.zero_grad()
    fake.grad = None
    r = critic(real)[-1]
    f = critic(fake.detach())[-1]
    (0.5 * ((1 - r).relu().mean() + (1 + f).relu().mean())).backward()
    for p, grad in zip(critic.parameters(), critic_grads, strict=True):
        assert (p.grad - grad).abs().max() < 1e-6
    *goals, _ = critic(real)
    *deep, logits = critic(fake)
    matching = sum((a - b.detach()).abs().mean() for a, b in zip(deep, goals, strict=True))
    (4 * matching - logits.mean()).backward()
    assert (fake.grad - fake_grad).abs().max() < 1e-6


def test_checkpointing_changes_nothing():
    losses = []
    grads = []
    for flag in ("false", "true"):
        cfg = tiny("--checkpoint", flag, "--frames", "8")
        auto = net_of(pa.Autoencoding, cfg)
        model = net_of(pa.ProAV, cfg)
        batch = clips(cfg)
        one, _ = auto(auto.mdsa.inputs(batch))
        two, _ = pa.ReflectedFlow(model).loss_of_clips(model, batch)
        (one + two).backward()
        losses.append([one.item(), two.item()])
        trained = [*auto.parameters(), *model.text.parameters(), *model.dit.parameters()]
        grads.append([p.grad for p in trained])
    assert losses[0] == losses[1]
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_what_muon_does_not_touch():
    auto = pa.Autoencoding(tiny())
    model = pa.ProAV(tiny())
    hidden = {"auto": [], "model": []}
    for name, net in (("auto", auto), ("model", model)):
        for k, p in net.named_parameters():
            if p.dim() > 1 and not k.startswith(net.edges):
                hidden[name].append(k)
    assert "mdsa.streams.v.encoder.layers.0.0.fn.to_qkv.weight" in hidden["auto"]
    assert "dit.spatial_blocks.0.attn.qkv.weight" in hidden["model"]
    for k in hidden["auto"] + hidden["model"]:
        for edge in ("table", "embed", "final", "letters", "critics"):
            assert edge not in k


# ---- STDiT and text


def test_padding_is_neither_seen_nor_changed():
    cfg = tiny("--frames", "8")  # tw and th have 8 rows, hw 4
    model = net_of(pa.ProAV, cfg)
    assert model.valid.shape == (1, 6, 8, 1, 1)
    assert model.valid.sum() == 2 * (4 + 8 + 8)
    x = torch.randn(2, 6, 8, 4, 4)
    t = torch.tensor([0.2, 0.7])
    text = pa.read(words_of(cfg, "a red ball", ""), cfg)
    v = model(x, t, *text)
    dirty = torch.where(model.valid, x, x + 5)
    assert v.shape == x.shape
    assert (v * ~model.valid).abs().max() == 0
    assert (model(dirty, t, *text) - v).abs().max() < 1e-5
    for plane in range(6):  # what every plane holds reaches every other
        y = x.clone()
        y[:, plane, 0] += 1
        assert ((model(y, t, *text) - v).abs().amax((0, 2, 3, 4)) > 0).all()


def test_rotary_places_make_a_spatial_block_tell_neighbors_apart():
    torch.manual_seed(0)
    block = pa.STDiT3Block(16, 2)
    x = torch.randn(1, 3, 8, 16)
    y = torch.randn(1, 2, 16)
    t6 = torch.randn(1, 1, 96)
    turn = pa.grid((4, 2), 8)
    order = torch.randperm(8)
    plain = block(x, y, t6)
    turned = block(x, y, t6, turn=turn)
    assert (plain - turned).abs().max() > 1e-3
    # Without positions tokens are a set.
    assert (block(x[:, :, order], y, t6) - plain[:, :, order]).abs().max() < 1e-5
    moved = block(x[:, :, order], y, t6, turn=turn)
    assert (moved - turned[:, :, order]).abs().max() > 1e-3
    moved = block(x[:, :, order], y, t6, turn=turn[:, order])
    assert (moved - turned[:, :, order]).abs().max() < 1e-5

    x = torch.randn(1, 6, 8, 8, 4)
    text = pa.read(words_of(tiny(), "a ball"), tiny())
    velocities = []
    for flag in ("true", "false"):
        model = net_of(pa.ProAV, tiny("--frames", "8", "--size", "16", "--dit_rope", flag))
        velocities.append(model(x, torch.tensor([0.3]), *text))
    assert (velocities[0] - velocities[1]).abs().max() > 1e-3


def test_text_and_time_matter_and_the_fresh_velocity_is_zero():
    cfg = tiny()
    model = net_of(pa.ProAV, cfg)
    x = torch.randn(2, 6, 4, 4, 4)
    t = torch.tensor([0.2, 0.7])
    text = pa.read(words_of(cfg, "a red ball", "a red ball"), cfg)
    v = model(x, t, *text)
    assert (model(x, t.flip(0), *text) - v).abs().max() > 1e-4
    other = model(x, t, *pa.read(words_of(cfg, "a red ball", "a blue ball"), cfg))
    assert torch.equal(other[0], v[0])
    assert not torch.equal(other[1], v[1])
    assert pa.ProAV(cfg)(x, t, *text).abs().max() == 0


def test_spelling():
    cfg = tiny()
    ids = words_of(cfg, "Red, ball!", "", "a " * 50, "red ball and other words")
    assert ids.shape == (4, 8, pa.LETTERS)
    assert torch.equal(ids[0], words_of(cfg, "red ball")[0])
    assert ids[1].count_nonzero() == 1
    assert (ids[2] > 0).any(1).all()
    assert torch.equal(ids[3, :3], ids[0, :3])
    _, mask = pa.read(ids, cfg)
    assert mask.sum(1).tolist() == [3, 1, 8, 6]


def test_the_loader_spells_captions():
    """In its workers; what a clip is called follows from its number, not from who asks."""
    cfg = tiny("--workers", "2")
    dataset = data.open_dataset("toy", "train", cfg.frames, cfg.size, cfg.fps, cfg.rate)
    varied = pa.Captioned(dataset, cfg, varied=True)
    feeds = [data.loader(varied, 8, 0, 3, workers=workers) for workers in (0, 2)]
    for one, two in zip(*feeds, strict=True):
        assert one["words"].shape == (8, 8, pa.LETTERS)
        assert torch.equal(one["words"], two["words"])
    said = {pa.Captioned(dataset, cfg)[0]["words"].tobytes()}
    for number in range(0, 200 * len(dataset.labels), len(dataset.labels)):
        label = dataset.labels[dataset[number]["label"]]
        name = data.vary(dataset[number]["caption"], label, data.clip_key(cfg.seed, number), 0.1)
        assert np.array_equal(varied[number]["words"], pa.spell(name, cfg))
        said.add(varied[number]["words"].tobytes())
    assert len(said) > 20


def fake_transformers(width):
    """A library with a T5 whose tokens are letters and whose features are made of them."""

    class Tokenizer:
        def __call__(self, text, padding, max_length, truncation):
            ids = [ord(letter) for letter in text[: max_length - 1]] + [1]
            return {"input_ids": ids + [0] * (max_length - len(ids))}

    class Encoder(torch.nn.Module):
        def forward(self, ids, mask):
            hidden = ids[..., None] * torch.linspace(0, 1, width) / 100
            return types.SimpleNamespace(last_hidden_state=hidden)

    library = types.SimpleNamespace()
    library.AutoTokenizer = types.SimpleNamespace(from_pretrained=lambda *a, **k: Tokenizer())
    library.T5EncoderModel = types.SimpleNamespace(from_pretrained=lambda *a, **k: Encoder())
    return library


def make_t5(folder, width=16):
    """The files that are looked for; fake_transformers() does not read them."""
    (folder / "config.json").write_text(json.dumps({"d_model": width}))
    (folder / "spiece.model").touch()


def test_a_t5_reads_captions(tmp_path, monkeypatch):
    make_t5(tmp_path)
    monkeypatch.setitem(sys.modules, "transformers", fake_transformers(16))
    pa.t5.cache_clear()
    out = tmp_path / "run"
    pa.main([*TINY, "--t5", str(tmp_path), "--out", str(out), "--mdsa_steps", "1", "--steps", "1"])
    model = pa.load(out / "ckpt.pt")
    assert pa.sample(model, 2, prompt=["red", "blue"])[0].shape == (2, 4, 8, 8, 3)
    words = words_of(model.cfg, "red", "")
    assert words.tolist() == [[114, 101, 100, 1, 0, 0, 0, 0], [1] + [0] * 7]
    text, mask = pa.read(words, model.cfg)
    assert text.shape == (2, 8, 16)
    assert mask.sum(1).tolist() == [4, 1]
    pa.t5.cache_clear()


def test_a_t5_that_cannot_be_read_is_one_sentence(tmp_path, monkeypatch):
    make_t5(tmp_path, 24)
    with pytest.raises(data.UserError, match="--text_width 16"):
        tiny("--t5", str(tmp_path))  # TINY has 16
    cfg = tiny("--t5", str(tmp_path), "--text_width", "24")
    pa.t5.cache_clear()

    def refused(says):
        with pytest.raises(data.UserError, match=says) as stop:
            pa.spell("a", cfg)
        assert "pip install transformers sentencepiece protobuf" in str(stop.value)
        assert "\n" not in str(stop.value)

    monkeypatch.setitem(sys.modules, "transformers", None)
    refused("ModuleNotFoundError")

    def damaged(*args, **kwargs):
        raise ValueError("two lines\nof advice")

    library = fake_transformers(24)
    library.AutoTokenizer.from_pretrained = damaged
    monkeypatch.setitem(sys.modules, "transformers", library)
    refused("ValueError")
    # Without files of a tokenizer, the library would invent one.
    monkeypatch.setitem(sys.modules, "transformers", fake_transformers(24))
    (tmp_path / "spiece.model").unlink()
    refused("OSError")
    (tmp_path / "tokenizer.json").touch()
    assert pa.spell("a", cfg).tolist() == [97, 1] + [0] * 6
    pa.t5.cache_clear()


# ---- Reflected flow


def test_prior_and_reflection():
    x = pa.truncated_normal((100000,), torch.Generator().manual_seed(0))
    assert x.abs().max() <= 1
    assert abs(x.std() - 0.5395) < 0.01
    assert abs(x.mean()) < 0.01
    y = pa.reflect(torch.tensor([0.5, 1.25, -1.5, 3.25, 1.0, -1.0, 5.5]))
    assert y.tolist() == [0.5, 0.75, -0.5, -0.75, 1.0, -1.0, 0.5]


def test_flow_recovers_a_known_velocity_and_counts_valid_entries_alone():
    cfg = tiny("--frames", "8")
    model = net_of(pa.ProAV, cfg)
    flow = pa.ReflectedFlow(model)
    batch = clips(cfg)
    latents = model.encode(batch)
    z = torch.cat([latents["z_a"], latents["z_v"]], 1)
    assert z.shape == (2, 6, 8, 4, 4)
    assert (z * ~model.valid).abs().max() == 0
    assert z.abs().max() < 1
    seen = []

    def still(x, t, words, mask):
        seen.append((x, t))
        return torch.zeros_like(x)

    loss, parts = flow.loss_of_clips(still, batch)
    again, _ = flow.loss(still, {**batch, **latents})
    assert torch.equal(seen[0][0], seen[1][0])
    assert loss == again
    assert loss.item() == pytest.approx(sum(parts.values()).item())
    assert seen[0][0].abs().max() <= 1

    # The latents count alike, whether there is padding or not.
    t = torch.full((2,), 0.25)
    loss, _ = flow.loss(still, {**batch, **latents}, t)
    x, _ = seen[-1]
    x0 = (x - 0.25 * z) / 0.75
    error = (z - x0).square() * model.valid
    count = model.valid.sum() / 2 * 16 * 2  # of a stream, in two clips
    assert loss.item() == pytest.approx((error.sum() / count).item(), rel=1e-5)
    perfect, _ = flow.loss(lambda *_: z - x0, {**batch, **latents}, t)
    assert perfect < 1e-10


def test_noise_of_a_clip_is_its_own():
    flow = pa.ReflectedFlow(net_of(pa.ProAV, tiny()))
    keys = torch.tensor([7, 8, 9])
    x0, t = flow.draw(keys, "cpu")
    alone, when = flow.draw(keys[1:2], "cpu")
    assert torch.equal(x0[1:2], alone)
    assert torch.equal(t[1:2], when)


def test_decode_inverts_the_stacking():
    cfg = tiny("--frames", "8")
    model = net_of(pa.ProAV, cfg)
    batch = clips(cfg)
    x = model.mdsa.inputs(batch)
    z = model.encode(batch)
    out = model.decode(torch.cat([z["z_a"], z["z_v"]], 1))
    want = model.mdsa(x)[0]
    for m in "va":
        assert (out[m] - want[m]).abs().max() < 1e-5


# ---- The two stages


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    out = tmp_path_factory.mktemp("run")
    pa.main([*TINY, "--out", str(out)])
    return out


def refused(*args):
    """What the command says when it ends with a mistake."""
    with pytest.raises(SystemExit) as stop:
        pa.main([*TINY, *args])
    assert "\n" not in stop.value.code
    return stop.value.code


def test_a_run_writes_both_stages_and_the_second_time_trains_nothing(trained):
    files = {p.relative_to(trained).as_posix() for p in trained.rglob("*") if p.is_file()}
    assert {"mdsa/ckpt.pt", "mdsa/log.csv", "ckpt.pt", "log.csv"} <= files
    for name in ("samples/", "mdsa/samples/", "latents/train", "latents/val"):
        assert any(f.startswith(name) for f in files), name
    # The generator's checkpoint holds the autoencoder it was trained with: averaged weights.
    first = weights(trained / "mdsa", "ema")
    last = weights(trained)
    assert all(torch.equal(last[k], p) for k, p in first.items() if k.startswith("mdsa."))

    latents = [trained / f for f in files if f.startswith("latents")]
    times = [path.stat().st_mtime_ns for path in latents]
    log = (trained / "log.csv").read_text()
    before = {stage: weights(trained / stage) for stage in ("mdsa", ".")}
    pa.main([*TINY, "--out", str(trained)])
    for stage, old in before.items():
        assert same(old, weights(trained / stage))
    assert (trained / "log.csv").read_text() == log
    assert times == [path.stat().st_mtime_ns for path in latents]


def test_stages_apart_and_interrupted_are_bit_exactly_those_of_one_go(trained, tmp_path):
    args = [*TINY, "--out", str(tmp_path), "--stage"]
    pa.main([*args, "mdsa", "--mdsa_steps", "1"])
    pa.main([*args, "mdsa"])
    pa.main([*args, "dit", "--steps", "3"])
    assert not same(weights(trained), weights(tmp_path))
    pa.main([*args, "dit"])
    for stage in ("mdsa", "."):
        for which in ("model", "ema"):
            assert same(weights(trained / stage, which), weights(tmp_path / stage, which))


def test_latents_encoded_on_the_way_give_the_same_steps(trained, tmp_path):
    shutil.copytree(trained / "mdsa", tmp_path / "mdsa")
    args = [*TINY, "--out", str(tmp_path), "--stage", "dit"]
    pa.main([*args, "--cache_latents", "0", "--steps", "2"])
    losses = []
    for folder in (trained, tmp_path):
        head, _, row, *_ = (folder / "log.csv").read_text().splitlines()
        losses.append(float(row.split(",")[head.split(",").index("loss")]))
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


VARIANTS = [
    "--streams v --cache_latents 0",
    "--streams a --kl off --adv false",
    "--amp bf16 --frames 8 --blocks 4,2,2 --checkpoint true",
    "--mt_attn false --gcm_attn false --biblock false --kl pixel --optimizer adamw --grad_accum 2",
]


@pytest.mark.parametrize("options", VARIANTS)
def test_variants_train_and_sample(options, tmp_path):
    pa.main([*TINY, *options.split(), "--out", str(tmp_path), "--steps", "2"])
    model = pa.load(tmp_path / "ckpt.pt")
    video, audio = pa.sample(model, 1, prompt="a ball")
    assert (video is None) == ("v" not in model.cfg.streams)
    assert (audio is None) == ("a" not in model.cfg.streams)


def test_two_processes_learn_what_one_learns(tmp_path):
    """Past disc_start, too: frames of the critics and noise of the latents are the clips' own."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    for folder, launcher in (("one", []), ("two", torchrun)):
        args = [*TINY, "--optimizer", "adamw", "--lr", "1e-3", "--mdsa_lr", "1e-3"]
        args += ["--disc_start", "1", "--cache_latents", "40", "--out", str(tmp_path / folder)]
        run = subprocess.run(
            [sys.executable, *launcher, pa.__file__, *args],
            cwd=tmp_path,
            text=True,
            capture_output=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            timeout=240,
        )
        assert run.returncode == 0, run.stderr
    for stage in ("mdsa", "."):
        for which in ("model", "ema"):
            one = weights(tmp_path / "one" / stage, which)
            two = weights(tmp_path / "two" / stage, which)
            for name, p in one.items():
                # A norm follows: the gradient of these is rounding, which Adam makes large.
                idle = name.startswith("critics") and name.endswith("layers.1.0.bias")
                assert (p - two[name]).abs().max() < (1e-3 if idle else 2e-6), name


def test_a_folder_keeps_to_its_run(trained, tmp_path):
    """Other options, or another autoencoder under a generator: a sentence, nothing is touched."""
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    out = ["--out", str(tmp_path)]
    assert "with --kl latent, not off: choose another --out" in refused(*out, "--kl", "off")
    assert "with --dit_depth 1, not 2" in refused(*out, "--stage", "dit", "--dit_depth", "2")
    before = (tmp_path / "ckpt.pt").read_bytes()
    says = refused(*out, "--mdsa_steps", "4", "--steps", "5")
    assert "trained with another autoencoder" in says
    assert (tmp_path / "ckpt.pt").read_bytes() == before
    torch.save({"weight": torch.zeros(1)}, tmp_path / "ckpt.pt")
    assert "no checkpoint of a run" in refused(*out, "--stage", "dit")

    # The generator may learn in its own way; other shapes of the autoencoder do not fit.
    (tmp_path / "ckpt.pt").unlink()
    pa.main([*TINY, *out, "--stage", "dit", "--steps", "1", "--optimizer", "adamw"])
    says = refused(*out, "--stage", "dit", "--width", "32")
    assert "not for this network" in says


def test_stage_dit_needs_a_finished_autoencoder(trained, tmp_path):
    out = ["--out", str(tmp_path), "--stage", "dit"]
    assert "no checkpoint" in refused(*out)
    (tmp_path / "mdsa").mkdir()
    state = torch.load(trained / "mdsa" / "ckpt.pt", weights_only=True)
    torch.save({**state, "step": 2}, tmp_path / "mdsa" / "ckpt.pt")
    assert "not trained to its end" in refused(*out)


def test_few_validation_clips_and_bare_weights_to_start_from(trained, tmp_path, monkeypatch):
    monkeypatch.setattr(data.ToyClips, "__len__", lambda self: 2 if self.numbers.start else 2**40)
    torch.save(weights(trained / "mdsa", "ema"), tmp_path / "bare.pt")
    args = [*TINY, "--out", str(tmp_path), "--samples", "3", "--mdsa_steps", "1"]
    start = ["--mdsa_lr", "1e-12", "--init_from", str(tmp_path / "bare.pt")]
    pa.main([*args, *start, "--stage", "mdsa"])
    assert same(weights(tmp_path / "mdsa"), weights(trained / "mdsa", "ema"), 1e-6)
    pa.main([*args, "--stage", "dit", "--steps", "1"])
    assert len(list((tmp_path / "samples").glob("step000001_*.mp4"))) == 2


def test_an_autoencoder_that_trivial_codes_beat_stops_the_run(tmp_path):
    args = ["--out", str(tmp_path), "--need_good", "true", "--plane_channels", "1"]
    assert "does not beat its baseline" in refused(*args)
    assert not (tmp_path / "ckpt.pt").exists()


# ---- Sampling


@pytest.fixture
def model(trained):
    """The trained model, whose text and time matter: 4 steps taught it nothing."""
    model = pa.load(trained / "ckpt.pt")
    with torch.no_grad():
        for p in model.dit.parameters():
            draw = torch.Generator().manual_seed(p.numel())
            p.add_(0.05 * torch.randn(p.shape, generator=draw))
    return model


def test_samples_depend_on_seed_place_and_text_alone(model):
    video, audio = pa.sample(model, 3, prompt="a red ball", seed=5)
    assert video.shape == (3, 4, 8, 8, 3)
    assert video.dtype == torch.uint8
    assert audio.shape == (3, 1600)
    assert audio.dtype == torch.float32
    assert audio.abs().max() <= 1
    again = pa.sample(model, 2, prompt="a red ball", seed=5, batch_size=1)
    assert (video[:2].int() - again[0].int()).abs().max() <= 1
    assert (audio[:2] - again[1]).abs().max() < 1e-3
    others = [
        {"seed": 6, "prompt": "a red ball"},
        {"prompt": "rain"},
        {"label": "rain"},
        {},
        {"guidance": 1.0, "prompt": "a red ball"},
        {"prompt": "a red ball", "negative_prompt": "blue"},
    ]
    for options in others:
        other = pa.sample(model, 1, **{"seed": 5, **options})
        assert (other[1] - audio[:1]).abs().max() > 1e-6, options


def test_prompts_and_labels_are_one_value_or_a_list_of_n(model):
    one = pa.sample(model, 3, prompt="a ball")
    three = pa.sample(model, 3, prompt=["a ball"] * 3)
    assert torch.equal(one[0], three[0])
    mixed = pa.sample(model, 2, label=["rain", "bounce"])
    for i, label in enumerate(("rain", "bounce")):
        alone = pa.sample(model, 2, label=label)
        assert (mixed[1][i] - alone[1][i]).abs().max() < 1e-3
    for options in ({"prompt": ["a"]}, {"label": ["rain"] * 3}):
        with pytest.raises(data.UserError, match="2 clips need one prompt or label or 2"):
            pa.sample(model, 2, **options)
    with pytest.raises(data.UserError, match="one text for all"):
        pa.sample(model, 2, prompt="x", negative_prompt=["a", "b"])
    with pytest.raises(data.UserError, match="not both"):
        pa.sample(model, 1, prompt="x", label="y")


def test_a_given_stream_comes_back_and_shapes_the_other(model):
    clip = raw(model.cfg, 2, "val")
    video, audio = pa.sample(model, 2, video=clip["video"][0], seed=3)
    assert torch.equal(video[0], clip["video"][0])
    assert torch.equal(video[1], clip["video"][0])
    other = pa.sample(model, 2, video=clip["video"][1], seed=3)[1]
    assert (audio - other).abs().max() > 1e-6
    # One video for each clip.
    each = pa.sample(model, 2, video=clip["video"], seed=3, batch_size=1)
    assert torch.equal(each[0], clip["video"])
    assert (each[1] - torch.stack([audio[0], other[1]])).abs().max() < 1e-3
    video, audio = pa.sample(model, 1, audio=clip["audio"][0].numpy(), seed=3)
    assert torch.equal(audio[0], clip["audio"][0])
    assert video.shape == (1, 4, 8, 8, 3)
    with pytest.raises(data.UserError, match="not both"):
        pa.sample(model, 1, video=clip["video"][0], audio=clip["audio"][0])
    for frames in (clip["video"], clip["video"][:1, :1], clip["video"][..., :1]):
        with pytest.raises(data.UserError, match="window of 4 x 8 x 8 x 3 numbers, or 3 of them"):
            pa.sample(model, 3, video=frames)  # two windows; one frame; gray
    with pytest.raises(data.UserError, match="one window of"):
        pa.sample(model, 1, audio=clip["audio"][0][:1])


def test_sampling_uses_the_precision_of_training(model):
    first = pa.sample(model, 1, prompt="a ball")[1]
    model.cfg = dataclasses.replace(model.cfg, amp="bf16")
    second = pa.sample(model, 1, prompt="a ball")[1]
    assert second.isfinite().all()
    assert not torch.equal(first, second)


def test_sample_py_takes_a_prompt_and_a_video(trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    args = ["--model", "proav_dit", "--ckpt", str(trained / "ckpt.pt"), "--n", "1"]
    args += ["--device", "cpu"]
    sample.main([*args, "--prompt", "a video of a red ball bouncing", "--guidance", "2"])
    out = tmp_path / "out" / "proav_dit" / "samples_001"
    assert {"000.mp4", "000.wav", "000.png", "index.html"} <= {p.name for p in out.iterdir()}
    sample.main([*args, "--video", str(out / "000.mp4")])
    sample.main([*args, "--audio", str(out / "000.wav")])
    with pytest.raises(SystemExit, match="stage dit"):
        sample.main(["--model", "proav_dit", "--ckpt", str(trained / "mdsa" / "ckpt.pt")])


def test_checkpoints_of_older_versions_still_load(trained, tmp_path, monkeypatch):
    """Their configs have options that are gone; nobody asks how many processes there are."""
    state = torch.load(trained / "ckpt.pt", weights_only=True)
    state["cfg"] |= {"sampler": "heun", "refine": 0, "val_every": 300, "save_every": 100}
    del state["cfg"]["eval_every"]
    torch.save(state, tmp_path / "old.pt")
    monkeypatch.setattr(pa, "WORLD", 3)
    old = pa.load(tmp_path / "old.pt", options=["--sample_steps", "1"])
    assert old.cfg.sample_steps == 1
    assert same(old.state_dict(), pa.load(trained / "ckpt.pt").state_dict())
    with pytest.raises(data.UserError, match="--guidance"):
        pa.load(tmp_path / "old.pt", options=["--guidance", "strong"])


# ---- Mistakes


MISTAKES = [
    ("--stage train", "--stage"),
    ("--kl gauss", "--kl"),
    ("--init_from x.pt", "starts one stage"),
    ("--batch_size 6 --grad_accum 4", "does not divide by 4"),
    ("--size 18 --patch 4", "even number of --patch"),
    ("--frames 6", "must divide by 4"),
    ("--size 12 --n_mels 18 --rate 6000", "must divide by 4"),
    ("--hop 33", "multiple of"),
    ("--n_mels 20 --size 24", "--n_mels (20)"),
    ("--betas 0.9", "two numbers"),
    ("--t5 nowhere", "not the folder of a T5"),
    ("--device gpu", "no --device gpu"),
    ("--init_from nowhere.pt --stage mdsa", "no checkpoint nowhere.pt"),
    ("--blocks 3,2,2", "--blocks"),
    ("--blocks 2,2", "--blocks"),
    ("--width 12", "--width"),
    ("--head_dim 6", "--head_dim"),
    ("--dit_heads 3", "--dit_heads"),
    ("--steps 0", "too small"),
    ("--data toy:tennis", "bounce, collide"),
    ("--widht 3", "unrecognized"),
    ("--sampler heun", "unrecognized"),
]


@pytest.mark.parametrize("args,says", MISTAKES)
def test_wrong_options_end_in_one_sentence(args, says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert says in refused("--out", "out", "--mdsa_batch_size", "8", *args.split())


@pytest.mark.parametrize("preset", pa.PRESETS)
def test_presets_take_a_training_step(preset):
    """On the meta device, which has shapes but no numbers."""
    cfg = pa.parse(["--preset", preset])
    with torch.device("meta"):
        auto = pa.Autoencoding(cfg)
        model = pa.ProAV(cfg)
        columns = auto.mdsa.mel.columns
        x = {
            "v": torch.empty(1, cfg.frames, 3, cfg.size, cfg.size),
            "a": torch.empty(1, cfg.frames, 1, cfg.n_mels, columns),
        }
        rows, side, channels = model.shape[1:]
        z = torch.empty(1, 6, rows, side, channels)
        t = torch.empty(1)
        words = torch.zeros(1, cfg.text_tokens, pa.LETTERS, dtype=torch.long)
        frame = torch.zeros(1, dtype=torch.long)
    auto(x)[0].backward()
    shapes = {"hw": (side, side), "tw": (cfg.frames, side), "th": (cfg.frames, side)}
    eps = {}
    for m in "va":
        eps[m] = {k: torch.empty(1, *s, channels, device="meta") for k, s in shapes.items()}
    auto(x, True, frame, eps)[0].backward()
    model(z, t, *pa.read(words, cfg)).sum().backward()
    for net in (auto, model):
        assert all(p.grad is not None for p in net.parameters() if p.requires_grad)
    if preset == "paper":
        assert pa.count(auto.mdsa) == 141_131_768
        assert pa.count(model.dit) == 697_495_696
