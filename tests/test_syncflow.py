"""syncflow.py: sound codec, towers, flow and transport, text, stages, sampling."""

import csv
import dataclasses
import itertools
import math
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from test_data import write_safetensors
from test_proav_dit import fake_transformers, make_t5

import data
import sample
import syncflow as sf

torch.set_num_threads(1)
TINY = """
    --preset toy --data toy --frames 4 --size 8 --video_patch 2,2,2 --video_channels 4 --rate 4000
    --n_mels 16 --hop 50 --window 128 --n_fft 128 --audio_patch 4,16 --audio_channels 6
    --vae_width 8 --vae_blocks 1 --vae_steps 3 --vae_batch_size 4 --width 16 --depth 2 --heads 2
    --text_width 16 --text_tokens 8 --cache_latents 8 --video_steps 3 --video_batch_size 4
    --steps 3 --batch_size 4 --joint_steps 3 --joint_batch_size 4 --val_clips 4
    --workers 0 --samples 1 --log_every 1 --eval_every 1000 --griffin_lim 4 --sample_steps 2
    --need_good false --lr_end 1
""".split()
STAGES = {"vae": "vae", "video": "video", "audio": "audio", "joint": "."}  # and their folders
FILM = (4, 2, 4, 4)  # the latents of TINY
SOUND = (6, 8)


def tiny(*more):
    return sf.parse([*TINY, *more])


def net_of(*more, seed=0):
    """A model whose every parameter is random: zeroed ones would hide what is behind them."""
    torch.manual_seed(seed)
    net = sf.SyncFlow(tiny(*more))
    with torch.no_grad():
        for p in net.parameters():
            if p.abs().max() == 0:
                p.normal_(0, 0.1)
    return net.eval()


def raw(cfg, n, split="train"):
    dataset = data.open_dataset("toy", split, cfg.frames, cfg.size, cfg.fps, cfg.rate)
    return data.make_batch(sf.Captioned(dataset, cfg), 0, range(n))


def words_of(cfg, *captions):
    return torch.from_numpy(np.stack([sf.spell(caption, cfg) for caption in captions]))


def latents(model, n=2):
    """A batch of random latents, as Latents and the loader make them."""
    draw = torch.Generator().manual_seed(1)
    film, sound = model.shapes
    return {
        "z_v": torch.randn(n, *film, generator=draw),
        "z_a": torch.randn(n, *sound, generator=draw),
        "words": words_of(model.cfg, *["a red ball"] * n),
        "key": torch.arange(n) + 7,
        "step": 0,
    }


def weights(folder, which="ema"):
    return torch.load(Path(folder) / "ckpt.pt", weights_only=True)[which]


def rows(folder):
    return list(csv.DictReader(open(Path(folder) / "log.csv"), restval=""))


def close(x, y, tol=1e-5):
    assert x.shape == y.shape
    assert (x - y).abs().max() < tol


def same(one, two, tol=0.0):
    return one.keys() == two.keys() and all((one[k] - two[k]).abs().max() <= tol for k in one)


def part_of(state, prefix):
    return {name: p for name, p in state.items() if name.startswith(prefix)}


class Told:
    """In place of the network of a model: says film(x_v, t_v, words), sound(x_a, t_a, words), or
    0; keeps what it was asked."""

    def __init__(self, model, film=None, sound=None):
        self.film = film or (lambda x, t, words: torch.zeros_like(x))
        self.sound = sound or (lambda x, t, words: torch.zeros_like(x))
        self.seen = []
        model.forward = self

    def __call__(self, x_v, x_a, t_v, t_a, words, mask):
        self.seen.append((x_v, x_a, t_v, t_a, words))
        v_a = None if x_a is None else self.sound(x_a, t_a, words)
        return self.film(x_v, t_v, words), v_a


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def handlers():
    """A run that was stopped in this process leaves its signal handlers behind."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


# ---- Sizes


class NoCodec(torch.nn.Module):
    def __init__(self, cfg):
        super().__init__()


def test_sizes_of_the_paper(monkeypatch):
    monkeypatch.setattr(sf, "OriginalCodec", NoCodec)
    with torch.device("meta"):
        model = sf.SyncFlow(sf.parse(["--preset", "paper"]))
    assert model.shapes == ((4, 8, 32, 32), (1152, 100))
    # Open-Sora's 1,207,643,936, but for the second half of its outputs.
    assert sf.count(model.video) == 1_207_643_936 - 16 * 1153
    assert sf.count(model.audio.layers) == 595_155_456
    assert sf.count(model.audio.adaptors) == 186_020_352
    assert sf.count(model.audio.enter) + sf.count(model.audio.leave) == 2_656_512
    assert sf.count(model.video) + sf.count(model.audio) == pytest.approx(1.99e9, rel=0.01)
    assert len(model.video.places) == 256


PRESETS = ["toy", "toy --kv pool", "toy --audio_from both", "toy --prenorm false", "small", "paper"]


@pytest.mark.parametrize("options", PRESETS)
def test_every_weight_gets_a_gradient(options, monkeypatch):
    monkeypatch.setattr(sf, "SmallCodec", NoCodec)
    monkeypatch.setattr(sf, "OriginalCodec", NoCodec)
    # torch 2.6 cannot import what checkpoint() needs while "meta" is the usual device.
    cfg = sf.parse(["--preset", *options.split(), "--checkpoint", "false"])
    with torch.device("meta"):
        model = sf.SyncFlow(cfg)
        film, sound = model.shapes
        words = torch.zeros(2, cfg.text_tokens, sf.LETTERS, dtype=torch.long)
        x = (torch.empty(2, *film), torch.empty(2, *sound), torch.empty(2), torch.empty(2))
        v_v, v_a = model(*x, *sf.read(words, cfg))
        (v_v.sum() + v_a.sum()).backward()
    assert v_v.shape == (2, *film)
    assert v_a.shape == (2, *sound)
    for name, p in model.named_parameters():
        assert p.grad is not None, name


# ---- The sound VAE of waveforms


@pytest.mark.parametrize("norm", ["weight_norm", "time_group_norm"])
@pytest.mark.parametrize("causal", [True, False])
@torch.no_grad()
def test_a_wave_of_whole_steps_keeps_its_length(norm, causal):
    size = (1, 4, (3, 2), 8)
    encoder = sf.WaveEncoder(*size, norm=norm, causal=causal)
    decoder = sf.WaveDecoder(*size, norm=norm, causal=causal)
    x = torch.randn(2, 1, 60)
    z = encoder(x)
    assert z.shape == (2, 8, 10)
    assert decoder(z).shape == x.shape
    # A change of a step reaches those before only where they may look ahead. (At the start, mirror
    # images stand for what was before.)
    changed = x.clone()
    changed[..., 48:54] += 1
    if norm == "weight_norm":  # the other norm looks at the whole sound
        assert torch.equal(encoder(changed)[..., :8], z[..., :8]) == causal
    assert not torch.equal(encoder(changed), z)


WAVE = """
    --codec original --audio_strides 5,4,5 --audio_filters 4 --kl 0.01 --vae_optimizer adamw
    --vae_lr 1e-3
""".split()


def test_the_wave_vae_draws_noise_by_clip_in_training_alone():
    cfg = tiny(*WAVE)
    torch.manual_seed(0)
    wave = sf.WaveVAE(cfg)
    batch = data.to_device(raw(cfg, 4), "cpu")

    def loss(x, t=None):
        return sf.vae_loss(wave, x, t)[0].item()

    turned = {"audio": batch["audio"].flip(0), "key": batch["key"].flip(0)}
    assert loss(batch) == pytest.approx(loss(turned), rel=1e-5)
    assert loss(batch) != loss(batch, torch.zeros(4))
    total, parts = sf.vae_loss(wave, batch, torch.zeros(4))
    mean, logvar = wave.encode(batch["audio"])
    assert mean.shape == (4, 6, 16)
    made = wave.decoder(mean)
    error = (made - batch["audio"]).abs().mean()
    error = error + sf.spectral_error(made[:, 0], batch["audio"][:, 0])
    assert parts["audio"].item() == pytest.approx(error.item(), rel=1e-5)
    kl = torch.distributions.kl_divergence(
        torch.distributions.Normal(mean, (logvar / 2).exp()), torch.distributions.Normal(0, 1)
    )
    assert total.item() == pytest.approx((error + 0.01 * kl.mean()).item(), rel=1e-4)
    sf.vae_loss(wave, batch)[0].backward()
    for name, p in wave.named_parameters():
        assert p.grad is not None and p.grad.abs().sum() > 0, name


def test_the_spectral_error_is_none_of_the_same_sound_and_grows_with_noise():
    x = 0.1 * torch.randn(2, 2000, generator=torch.Generator().manual_seed(0))
    assert sf.spectral_error(x, x) == 0
    # Where phases differ and magnitudes do not, there is hardly an error.
    errors = [sf.spectral_error(x, y).item() for y in (-x, 0.9 * x, 0.5 * x, torch.zeros(2, 2000))]
    assert errors[0] == pytest.approx(0, abs=1e-6)
    assert errors == sorted(errors)


def test_the_gate_of_waves():
    cfg = tiny(*WAVE, "--need_good", "true")
    val = data.open_dataset("toy", "val", cfg.frames, cfg.size, cfg.fps, cfg.rate)

    class Perfect:
        def __init__(self):
            self.cfg = cfg
            self.encode = lambda audio: (audio, None)
            self.decoder = lambda codes: codes

    sf.examine_wave(Perfect(), val, "cpu")
    bad = Perfect()
    bad.decoder = torch.zeros_like
    with pytest.raises(data.UserError, match="does not beat its baseline"):
        sf.examine_wave(bad, val, "cpu")
    bad.cfg = dataclasses.replace(cfg, need_good=False)
    sf.examine_wave(bad, val, "cpu")


# ---- The towers


def said_by(model, batch, t_v=0.4, t_a=0.4):
    n = len(batch["key"])
    text = sf.read(batch["words"], model.cfg)
    t = (torch.full((n,), t_v), torch.full((n,), t_a))
    with torch.no_grad():
        return model(batch["z_v"], batch["z_a"], *t, *text)


def test_a_fresh_network_says_nothing():
    model = sf.SyncFlow(tiny())
    v_v, v_a = said_by(model, latents(model))
    assert v_v.abs().max() == v_a.abs().max() == 0
    assert v_v.shape == (2, *FILM)
    assert v_a.shape == (2, *SOUND)


def test_nothing_flows_from_sound_to_video():
    model = net_of()
    batch = latents(model)
    v_v, v_a = said_by(model, batch)
    other_sound = said_by(model, {**batch, "z_a": batch["z_a"] + 1})
    assert torch.equal(other_sound[0], v_v)
    assert (other_sound[1] - v_a).abs().max() > 1e-4
    other_video = said_by(model, {**batch, "z_v": batch["z_v"] + 1})
    assert (other_video[1] - v_a).abs().max() > 1e-4
    # The sound hears its own time by a token, the video's by the features.
    later = said_by(model, batch, t_a=0.8)
    assert torch.equal(later[0], v_v)
    assert (later[1] - v_a).abs().max() > 1e-4
    later = said_by(model, batch, t_v=0.8)
    assert (later[0] - v_v).abs().max() > 1e-4
    assert (later[1] - v_a).abs().max() > 1e-5
    # Without sound the video is the same.
    text = sf.read(batch["words"], model.cfg)
    with torch.no_grad():
        alone = model(batch["z_v"], None, torch.full((2,), 0.4), None, *text)
    assert alone[1] is None
    assert torch.equal(alone[0], v_v)


@pytest.mark.parametrize("layer", [0, 1])
def test_each_layer_hears_its_own_block(layer):
    """F_l is the output of temporal block l, and every one of its tokens counts."""
    model = net_of("--kv", "flatten")
    batch = latents(model, 1)
    v_v, v_a = said_by(model, batch)
    heard = model.audio.condition

    def changed(i, features, *rest):
        if i == layer:
            features = features.clone()
            features[:, 1, 3] *= -1  # one frame, one place
        return heard(i, features, *rest)

    seen = []
    hook = model.video.temporal_blocks[layer].register_forward_hook(
        lambda block, args, out: seen.append(out)
    )
    model.audio.condition = changed
    again_v, again_a = said_by(model, batch)
    hook.remove()
    assert torch.equal(again_v, v_v)
    assert (again_a - v_a).abs().max() > 1e-6

    # What condition() gets is that block's output.
    given = []

    def noted(i, features, *rest):
        given.append(features)
        return heard(i, features, *rest)

    model.audio.condition = noted
    said_by(model, batch)
    assert torch.equal(given[layer], seen[0])


def test_what_the_sound_attends_to():
    """[t | adaptor(F_l)], and words if asked: their number, and which count."""
    features = torch.randn(2, 2, 4, 16)  # (B, T, S, D)
    c = torch.randn(2, 16)
    y = torch.randn(2, 8, 16)
    y_mask = torch.arange(8).expand(2, -1) < torch.tensor([[3], [8]])
    sizes = {"video": 1 + 8, "text": 1 + 8, "both": 1 + 8 + 8}
    for source, size in sizes.items():
        tower = net_of("--audio_from", source).audio
        got, mask = tower.condition(0, features, c, y, y_mask)
        assert got.shape == (2, size, 16)
        assert torch.equal(got[:, 0], c)
        if source == "video":
            assert mask is None
        else:
            assert torch.equal(got[:, -8:], y)
            assert mask[:, :-8].all()
            assert torch.equal(mask[:, -8:], y_mask)
    pooled, _ = net_of("--kv", "pool").audio.condition(0, features, c, y, y_mask)
    assert pooled.shape == (2, 1 + 2, 16)
    # Without adaptors: as it is, but for the time at which it is.
    tower = net_of("--adaptor", "false").audio
    got, _ = tower.condition(0, features, c, y, y_mask)
    assert torch.equal(got[:, 1:], (features + tower.frame_places).flatten(1, 2))


SWITCHES = [
    ("--adaptor", "false"),
    ("--kv", "pool"),
    ("--audio_from", "both"),
    ("--audio_from", "text"),
    ("--prenorm", "false"),
    ("--rope", "false"),
]


@pytest.mark.parametrize("options", SWITCHES, ids=" ".join)
def test_switches_change_what_is_said_of_the_sound(options):
    batch = latents(net_of())
    one = said_by(net_of(), batch)
    two = said_by(net_of(*options), batch)
    assert one[1].shape == two[1].shape
    assert (one[1] - two[1]).abs().max() > 1e-4


def test_options_that_are_ours_bring_weights_only_if_asked():
    """The plain model has those of the paper's layers; each option adds just its own."""

    def names(*options):
        return set(net_of(*options).state_dict())

    plain = names("--prenorm", "false", "--rope", "false")
    assert not any("enter_norm" in name or ".q_norm" in name for name in part_of_names(plain))
    more = names("--prenorm", "true", "--rope", "false") - plain
    assert more == {
        f"audio.adaptors.{i}.enter_norm.{name}" for i in range(2) for name in ("weight", "bias")
    }
    more = names("--prenorm", "false", "--rope", "true") - plain
    kinds = ("layers.0.attn", "layers.0.cross_attn", "layers.1.attn", "layers.1.cross_attn")
    kinds += ("adaptors.0.attn", "adaptors.1.attn")
    assert more == {f"audio.{kind}.{x}_norm.weight" for kind in kinds for x in "qk"}
    assert plain - names("--adaptor", "false") >= {"audio.adaptors.0.linear.weight"}
    assert not any("adaptors" in name for name in names("--adaptor", "false"))
    assert not any("adaptors" in name for name in names("--audio_from", "text"))


def part_of_names(names):
    return {name for name in names if name.startswith("audio.")}


def test_norms_come_after_as_in_the_paper_or_before():
    """A layer's output is normed; with --prenorm it is its input plus something."""
    x = torch.randn(1, 8, 16) * 3 + 1
    y = torch.randn(1, 5, 16)
    turn = net_of().audio.turn_x
    after = sf.AudioLayer(16, 2, True, prenorm=False)(x, y, None, turn, turn[:, :5])
    close(after.mean(-1), torch.zeros(1, 8))
    close(after.std(-1, unbiased=False), torch.ones(1, 8), 1e-3)
    layer = sf.AudioLayer(16, 2, True, prenorm=True)
    for last in (layer.attn.proj, layer.cross_attn.proj, layer.mlp.fc2):
        sf.zeroed(last)
    assert torch.equal(layer(x, y, None, turn, turn[:, :5]), x)
    adaptor = sf.Adaptor(16, 2, True, prenorm=False)
    sf.zeroed(adaptor.attn.proj)
    out = adaptor(x)  # no residual: nothing of x is left
    assert torch.equal(out, adaptor.linear(adaptor.norm.bias).expand_as(out))
    adaptor = sf.Adaptor(16, 2, True, prenorm=True)
    sf.zeroed(adaptor.attn.proj)
    assert torch.equal(adaptor(x), adaptor.linear(adaptor.norm(x)))


def test_sound_from_text_alone():
    model = net_of("--audio_from", "text")
    batch = latents(model)
    v_a = said_by(model, batch)[1]
    assert torch.equal(said_by(model, {**batch, "z_v": batch["z_v"] + 1})[1], v_a)
    other = {**batch, "words": words_of(model.cfg, *["a blue ball"] * 2)}
    assert not torch.equal(said_by(model, other)[1], v_a)


@pytest.mark.parametrize("options", [(), ("--rope", "false"), ("--kv", "pool")], ids=str)
def test_the_sound_knows_first_frames_from_last_ones(options):
    model = net_of(*options)
    batch = latents(model, 1)
    heard = model.audio.forward

    def turned(x, features, *rest):
        return heard(x, [said.flip(1) for said in features], *rest)

    one = said_by(model, batch)[1]
    model.audio.forward = turned
    assert (said_by(model, batch)[1] - one).abs().max() > 1e-5


def test_both_towers_are_on_one_clock():
    """Middles of frames and of steps, in steps: 8 steps of sound in 2 latent frames."""
    tower = net_of().audio
    places = sf.time_embedding(torch.arange(8) + 0.5, 16)
    assert torch.equal(tower.step_places, places)
    assert torch.equal(tower.frame_places[:, 0], sf.time_embedding(torch.tensor([2.0, 6.0]), 16))
    # The condition: the time token, four places of each frame.
    times = torch.tensor([0.0] + [2.0] * 4 + [6.0] * 4)
    assert torch.equal(tower.turn_y, sf.turn_at(times, 8))
    assert torch.equal(tower.turn_x, sf.turn_at(torch.arange(8) + 0.5, 8))
    # A product of what is turned tells how far apart the times are, and no more.
    q, k = torch.randn(2, 1, 1, 1, 8)
    products = []
    for first in (0.5, 6.0):
        times = torch.tensor([first, first + 2, first + 3])
        turned = [sf.rotate(x, sf.turn_at(times, 8)) for x in (q, k)]  # (1, 3, 1, 8)
        products.append(turned[0][0, :, 0] @ turned[1][0, :, 0].T)
    close(*products)
    assert (products[0][0, 1] - products[0][0, 2]).abs() > 1e-4
    # No other at another size, but for the number of places.
    other = sf.SyncFlow(tiny("--size", "16")).audio
    assert torch.equal(other.step_places, places)
    assert torch.equal(other.frame_places, tower.frame_places)
    assert other.turn_y.shape[1] == 1 + 2 * 16


def test_checkpointing_changes_nothing(monkeypatch):
    calls = []
    right = sf.checkpoint

    def noted(*args, **kwargs):
        calls.append(args)
        return right(*args, **kwargs)

    monkeypatch.setattr(sf, "checkpoint", noted)
    results = []
    for flag in ("false", "true"):
        model = net_of("--checkpoint", flag)
        loss, _ = sf.Flow(model).loss(model, latents(model))
        loss.backward()
        results.append([loss, *(p.grad for p in model.parameters() if p.requires_grad)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert len(calls) == 3 * model.cfg.depth


def test_what_muon_does_not_touch():
    model = net_of("--optimizer", "muon")
    [group] = sf.build_optimizers(model, model.cfg)["muon"].param_groups
    names = {p: name for name, p in model.named_parameters()}
    hidden = [names[p] for p in group["params"]]
    assert {"audio.adaptors.0.linear.weight", "audio.layers.1.cross_attn.kv_linear.weight"} <= {
        *hidden
    }
    inside = ("video.spatial_blocks", "video.temporal_blocks", "video.t_block")
    inside += ("audio.layers", "audio.adaptors")
    for name in hidden:
        assert name.startswith(inside) and "table" not in name, name


# ---- The flow


@pytest.mark.parametrize("levels", ["shared", "separate"])
def test_training_and_sampling_share_the_flow(levels):
    """Noise a clip by the training code, follow the true velocity by the sampler: on it."""
    model = net_of("--noise_levels", levels)
    flow = sf.Flow(model)
    batch = latents(model)
    _, noise_v, noise_a = flow.draw(batch["key"], "cpu")

    def true_of(z, noise):
        return lambda x, t, words: z - noise

    told = Told(model, true_of(batch["z_v"], noise_v), true_of(batch["z_a"], noise_a))
    for steps in (1, 2, 5):
        z_v, z_a = flow.sample(noise_v, noise_a, batch["words"], None, 1, steps)
        close(z_v, batch["z_v"])
        close(z_a, batch["z_a"])
        # On the way, at the sampler's times, are what training mixes at those times.
        for i, (x_v, x_a, t_v, t_a, _) in enumerate(told.seen[-steps:]):
            assert t_v.tolist() == t_a.tolist() == [pytest.approx(i / steps)] * 2
            close(x_v, flow.mix(noise_v, batch["z_v"], t_v))
            close(x_a, flow.mix(noise_a, batch["z_a"], t_a))
    # And the loss asks for just that velocity. Validation's level is that of noise.
    told.seen.clear()
    level = torch.tensor([0.25, 0.75])
    loss, parts = flow.loss(model, batch, level)
    assert loss == 0
    x_v, x_a, t_v, t_a, _ = told.seen[0]
    assert torch.equal(t_v, 1 - level)
    assert torch.equal(t_a, 1 - level)
    close(x_v, sf.across(1 - level, x_v) * batch["z_v"] + sf.across(level, x_v) * noise_v)
    close(x_a, sf.across(1 - level, x_a) * batch["z_a"] + sf.across(level, x_a) * noise_a)


def test_levels_are_shared_or_separate():
    """Of a clip's key the same noise and the same level of video come either way."""
    keys = torch.arange(1000)
    drawn = {}
    for kind in ("shared", "separate"):
        drawn[kind] = sf.Flow(net_of("--noise_levels", kind)).draw(keys, "cpu")
    (t_v, t_a), *noise = drawn["shared"]
    assert torch.equal(t_v, t_a)
    (own_v, own_a), *same_noise = drawn["separate"]
    assert torch.equal(own_v, t_v)
    assert all(torch.equal(x, y) for x, y in zip(noise, same_noise, strict=True))
    assert abs(torch.corrcoef(torch.stack([own_v, own_a]))[0, 1]) < 0.1
    # Of the toy preset: log(t / (1 - t)) is normal.
    for t in (own_v, own_a):
        logit = torch.logit(t)
        assert logit.mean().item() == pytest.approx(-0.7, abs=0.15)
        assert logit.std().item() == pytest.approx(1.3, abs=0.1)
    # As in the paper: uniform.
    (t_v, _), *_ = sf.Flow(net_of("--logit_normal", "()")).draw(keys, "cpu")
    counts = torch.histc(t_v, 4, 0, 1)
    assert (counts - 250).abs().max() < 60
    # Each clip's from its own key.
    flow = sf.Flow(net_of())
    one = flow.draw(torch.tensor([3, 4]), "cpu")
    two = flow.draw(torch.tensor([4, 9, 3]), "cpu")
    for x, y in ((one[0][:, 0], two[0][:, 2]), (one[1][0], two[1][2]), (one[2][1], two[2][0])):
        assert torch.equal(x, y)


@pytest.mark.parametrize("levels", ["shared", "separate"])
@pytest.mark.parametrize("ot", ["true", "false"])
def test_what_training_shows_the_network(levels, ot):
    """Each stream at its own t, and noises that are those of the keys: as drawn, or in an order
    that is one for both streams and costs least."""
    model = net_of("--noise_levels", levels, "--ot", ot)
    flow = sf.Flow(model)
    batch = latents(model, 6)
    (t_v, t_a), noise_v, noise_a = flow.draw(batch["key"], "cpu")
    told = Told(model)
    loss, parts = flow.loss(model, batch)
    x_v, x_a, seen_v, seen_a, words = told.seen[0]
    assert torch.equal(seen_v, t_v)
    assert torch.equal(seen_a, t_a)
    assert torch.equal(words, batch["words"])
    # Back from x_t to the noise in it.
    got_v = (x_v - sf.across(t_v, x_v) * batch["z_v"]) / sf.across(1 - t_v, x_v)
    got_a = (x_a - sf.across(t_a, x_a) * batch["z_a"]) / sf.across(1 - t_a, x_a)
    cost = torch.cdist(noise_v.flatten(1), batch["z_v"].flatten(1)) ** 2
    cost = cost + torch.cdist(noise_a.flatten(1), batch["z_a"].flatten(1)) ** 2
    orders = [list(range(6))]
    if ot == "true":
        orders = itertools.permutations(range(6))
    best = min(orders, key=lambda order: sum(cost[i, j] for j, i in enumerate(order)))
    best = list(best)
    close(got_v, noise_v[best], 1e-3)
    close(got_a, noise_a[best], 1e-3)
    if ot == "true":
        assert best != list(range(6))
    # Who says 0 has the velocity itself as an error.
    want = (batch["z_v"] - noise_v[best]).square().mean()
    assert parts["video"].item() == pytest.approx(want.item(), rel=1e-4)
    want = (batch["z_a"] - noise_a[best]).square().mean()
    assert parts["audio"].item() == pytest.approx(want.item(), rel=1e-4)
    assert loss.item() == pytest.approx(sum(parts.values()).item())


def test_transport_is_for_training_alone(monkeypatch):
    calls = []
    right = sf.assign

    def noted(cost):
        calls.append(len(cost))
        return right(cost)

    monkeypatch.setattr(sf, "assign", noted)
    model = net_of()
    batch = latents(model, 3)
    flow = sf.Flow(model)
    flow.loss(model, batch)
    assert calls == [3]
    flow.loss(model, batch, torch.full((3,), 0.5))
    flow.sample(batch["z_v"], batch["z_a"], batch["words"], None, 1, 2)
    without = net_of("--ot", "false")
    sf.Flow(without).loss(without, batch)
    assert calls == [3]


def test_in_stage_video_the_sound_has_no_say_in_the_pairing():
    model = net_of()
    batch = latents(model, 6)
    flow = sf.Flow(model, "video")
    loss, parts = flow.loss(model, batch)
    assert list(parts) == ["video"]
    other = {**batch, "z_a": 100 * batch["z_a"].flip(0)}
    assert torch.equal(flow.loss(model, other)[0], loss)
    told = Told(model)
    flow.loss(model, batch)
    assert told.seen[0][1] is None


def test_assign_against_all_permutations():
    rng = np.random.RandomState(0)
    for n in range(1, 7):
        for _ in range(5):
            cost = rng.randn(n, n).round(1)  # ties, too
            orders = itertools.permutations(range(n))
            best = min(sum(cost[row, j] for j, row in enumerate(order)) for order in orders)
            found = sf.assign(cost)
            assert sorted(found) == list(range(n))
            assert cost[found, np.arange(n)].sum() == pytest.approx(best)
    # Whatever the costs are, it ends.
    assert sorted(sf.assign(np.zeros((5, 5)))) == list(range(5))
    cost = 1e6 + rng.rand(40, 40)
    found = sf.assign(cost)
    assert sorted(found) == list(range(40))
    for i, j in itertools.combinations(range(40), 2):  # no exchange of two makes it cheaper
        swapped = cost[found[j], i] + cost[found[i], j]
        assert cost[found[i], i] + cost[found[j], j] <= swapped + 1e-6


def test_the_loss_of_a_stage_is_of_what_it_trains():
    model = net_of("--ot", "false")
    batch = latents(model)
    found = {}
    for stage in ("video", "audio", "joint"):
        found[stage], parts = sf.Flow(model, stage).loss(model, batch)
        want = {"video": ["video"], "audio": ["audio"], "joint": ["video", "audio"]}[stage]
        assert list(parts) == want
        assert sum(parts.values()).item() == pytest.approx(found[stage].item())
    both = (found["video"] + found["audio"]).item()
    assert found["joint"].item() == pytest.approx(both)


TRAINED = {
    "video": ("text.", "video."),
    "audio": ("audio.",),
    "joint": ("text.", "video.", "audio."),
}


@pytest.mark.parametrize("stage", TRAINED)
def test_what_a_stage_freezes_gets_no_gradients(stage):
    model = net_of()
    model.train_only(stage)
    seen = []
    hook = model.video.register_forward_hook(lambda tower, args, out: seen.append(out[1]))
    loss, _ = sf.Flow(model, stage).loss(model, latents(model))
    hook.remove()
    loss.backward()
    for name, p in model.named_parameters():
        assert (p.grad is not None) == name.startswith(TRAINED[stage]), name
    assert all(said.requires_grad == (stage != "audio") for said in seen[0])


@pytest.mark.parametrize("levels", ["shared", "separate"])
def test_a_given_video_stands_for_what_would_be_made(levels):
    """Its own x_t, of one noise, at every step; clean, where the model knows separate levels."""
    model = net_of("--noise_levels", levels)
    batch = latents(model)
    told = Told(model, film=lambda x, t, words: torch.full_like(x, 9))
    draw = torch.Generator().manual_seed(3)
    noise_v = torch.randn(2, *FILM, generator=draw)
    noise_a = torch.randn(2, *SOUND, generator=draw)
    flow = sf.Flow(model)
    flow.sample(noise_v, noise_a, batch["words"], None, 1, 4, batch["z_v"])
    assert len(told.seen) == 4
    for i, (x_v, _, t_v, t_a, _) in enumerate(told.seen):
        assert t_a.tolist() == [i / 4] * 2
        if levels == "separate":
            assert t_v.tolist() == [1, 1]
            close(x_v, batch["z_v"], 1e-6)
        else:
            assert t_v.tolist() == [i / 4] * 2
            close(x_v, (1 - i / 4) * noise_v + i / 4 * batch["z_v"])


@torch.no_grad()
def test_guidance_leads_both_streams_from_the_negative_prompt():
    """v_n + w (v_c - v_n), eq. 3."""
    model = net_of()
    prompt, negative = words_of(model.cfg, "a", "b")
    asks = []

    def answer(x, t, words):
        led = (words == prompt).flatten(1).all(1)
        asks.append(led.tolist())
        return sf.across(torch.where(led, 0.3, 0.1), x).expand_as(x)

    Told(model, answer, lambda x, t, words: 10 * answer(x, t, words))
    noise = (torch.zeros(2, *FILM), torch.zeros(2, *SOUND))
    words = prompt.expand(2, *prompt.shape)
    for w in (1, 3.0, 0.5):
        asks.clear()
        z_v, z_a = sf.Flow(model).sample(*noise, words, negative, w, 2)
        want = 0.3 if w == 1 else 0.1 + w * (0.3 - 0.1)
        close(z_v, torch.full_like(z_v, want))
        close(z_a, torch.full_like(z_a, 10 * want))
        assert asks == [[True, True] if w == 1 else [True, True, False, False]] * 4


# ---- Text


def test_the_empty_caption_is_the_null_embedding():
    """For both towers, whatever the text encoder says of it."""
    model = net_of("--audio_from", "both")
    batch = {**latents(model, 3), "words": words_of(model.cfg, "", "a ball", "...")}
    out = said_by(model, batch)
    with torch.no_grad():
        for p in model.text.parameters():
            p.add_(1)
            p.mul_(torch.rand_like(p))
    for before, after in zip(out, said_by(model, batch), strict=True):
        moved = (after - before).flatten(1).abs().amax(1)
        assert moved[0] == moved[2] == 0
        assert moved[1] > 0
    # It is Open-Sora's null embedding, of which all words are read.
    seen = {}
    hook = model.video.register_forward_pre_hook(lambda tower, args: seen.update(args=args))
    said_by(model, batch)
    hook.remove()
    _, _, words, mask = seen["args"]
    assert torch.equal(words[0], model.video.y_embedder.y_embedding)
    assert mask.tolist() == [[True] * 8, [True] * 3 + [False] * 5, [True] * 8]


def test_a_t5_reads_captions(trained, tmp_path, monkeypatch):
    """In the place of the encoder that is learned here."""
    make_t5(tmp_path)
    monkeypatch.setitem(sys.modules, "transformers", fake_transformers(16))
    sf.t5.cache_clear()
    run = tmp_path / "run"
    train_generator(*copied(trained, run, "vae"), "--t5", str(tmp_path))
    model = sf.load(run / "ckpt.pt")
    assert not list(model.text.parameters())
    assert sf.sample(model, 2, prompt=["red", "blue"])[0].shape == (2, 4, 8, 8, 3)
    seen = {}
    model.video.register_forward_pre_hook(lambda tower, args: seen.update(args=args))
    said_by(model, {**latents(model), "words": words_of(model.cfg, "red", "")})
    assert seen["args"][3].sum(1).tolist() == [4, 8]
    sf.t5.cache_clear()


# ---- The stages


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    out = tmp_path_factory.mktemp("run")
    sf.main([*TINY, "--out", str(out)])
    return out


def copied(trained, to, *stages):
    """A run in which only these stages are done."""
    for name in (*stages, "latents"):
        shutil.copytree(trained / name, to / name)
    return ["--out", str(to)]


def refused(*args):
    """What the command says when it ends with a mistake."""
    with pytest.raises(SystemExit) as stop:
        sf.main([*TINY, *args])
    assert "\n" not in stop.value.code
    return stop.value.code


def train_generator(*args):
    """The stages after the codec's, a step each, on which that has no opinion."""
    steps = ["--video_steps", "1", "--steps", "1", "--joint_steps", "1"]
    for stage in ("video", "audio", "joint"):
        sf.main([*TINY, *steps, *args, "--stage", stage])


def test_a_run_writes_all_stages_and_the_second_time_trains_nothing(trained):
    files = {p.relative_to(trained).as_posix() for p in trained.rglob("*") if p.is_file()}
    for stage, folder in STAGES.items():
        found = trained / folder
        assert (found / "ckpt.pt").is_file()
        assert {path.suffix for path in found.glob("samples/*")} >= {".png"}, stage
        # Sound and picture are logged apart. Validation is before the first step and after the
        # last.
        log = rows(found)
        assert [int(row["step"]) for row in log] == [0, 0, 1, 2, 3]
        for i, row in enumerate(log):
            prefix = "val_" if i in (0, 4) else ""
            wanted = [stage] if stage in ("video", "audio") else ["video", "audio"]
            for name in ("video", "audio"):
                assert bool(row.get(f"{prefix}{name}")) == (name in wanted), (stage, name)
            figures = sum(float(row[f"{prefix}{name}"]) for name in wanted)
            assert figures == pytest.approx(float(row[f"{prefix}loss"]), rel=1e-4)
    # All stages learn from the same latents.
    assert len(list((trained / "latents").glob("train_*"))) == 1
    assert len(list((trained / "latents").glob("val_*"))) == 1
    # Each checkpoint of a generator holds the codec it was trained with: averaged weights.
    first = weights(trained / "vae")
    for stage in ("video", "audio", "joint"):
        last = weights(trained / STAGES[stage], "model")
        for name, p in first.items():
            measured = name.endswith((".mean", ".scale"))
            assert torch.equal(last[f"codec.{name}"], p) or measured, name

    before = {folder: weights(trained / folder, "model") for folder in STAGES.values()}
    log = (trained / "log.csv").read_text()
    kept = [trained / f for f in files if f.startswith("latents")]
    times = [path.stat().st_mtime_ns for path in kept]
    sf.main([*TINY, "--out", str(trained)])
    for folder, old in before.items():
        assert same(old, weights(trained / folder, "model"))
    assert (trained / "log.csv").read_text() == log
    assert times == [path.stat().st_mtime_ns for path in kept]


def test_latents_have_unit_variance(trained):
    model = sf.load(trained / "ckpt.pt")
    cfg = model.cfg
    clips = data.open_dataset("toy", "train", cfg.frames, cfg.size, cfg.fps, cfg.rate, cfg.seed)
    batch = data.to_device(data.make_batch(clips, 0, range(256)), "cpu")
    z = model.encode(batch)
    assert z["z_v"].shape == (256, *FILM)
    assert z["z_a"].shape == (256, *SOUND)
    for x in z.values():
        assert x.transpose(0, 1).flatten(1).mean(1).abs().max() < 1e-3
        assert x.square().mean().item() == pytest.approx(1, abs=1e-3)
    assert list(model.encode({"audio": batch["audio"][:1]})) == ["z_a"]
    assert list(model.decode({"z_v": z["z_v"][:1]})) == ["video"]


def test_stage_audio_leaves_the_video_tower_alone(trained):
    """Bit for bit: video tower, text encoder, codec; of the running weights and the averaged."""
    before = weights(trained / "video")
    for which in ("ema", "model"):
        after = weights(trained / "audio", which)
        assert before.keys() == after.keys()
        for name in before:
            if not name.startswith("audio."):
                assert torch.equal(before[name], after[name]), name
        moved = [name for name in before if not torch.equal(before[name], after[name])]
        for part in ("adaptors.0", "adaptors.1", "layers.0", "layers.1", "enter", "leave"):
            assert any(name.startswith(f"audio.{part}.") for name in moved), part
    # Stage video leaves the sound as it was; stage joint moves both.
    torch.manual_seed(tiny().seed + 1)
    fresh = sf.SyncFlow(tiny()).state_dict()
    assert same(part_of(before, "audio."), part_of(fresh, "audio."))
    joint = weights(trained, "model")
    after = weights(trained / "audio")
    for part in ("video.", "audio.", "text."):
        assert not same(part_of(joint, part), part_of(after, part))
    assert same(part_of(joint, "codec."), part_of(after, "codec."))


def test_stages_told_to_stop_go_on_to_the_bit(trained, tmp_path, monkeypatch):
    """SIGTERM in the second step of each stage; some are called by name, some follow."""
    split = data.split
    stopped = []
    now = []  # the stage at hand

    def interrupted(batch, parts):
        if batch["step"] == 1 and now[-1] not in stopped:
            stopped.append(now[-1])
            signal.raise_signal(signal.SIGTERM)
        return split(batch, parts)

    monkeypatch.setattr(data, "split", interrupted)
    args = [*TINY, "--out", str(tmp_path)]
    for stage, command in (("vae", "vae"), ("video", "all"), ("audio", "audio"), ("joint", "all")):
        now.append(stage)
        with pytest.raises(SystemExit) as stop:
            sf.main([*args, "--stage", command])
        assert stop.value.code == 0
        state = torch.load(tmp_path / STAGES[stage] / "ckpt.pt", weights_only=True)
        assert state["step"] == 2
        if stage != "vae":
            follower = {"video": "audio", "audio": "joint"}.get(stage)
            if follower:
                assert "not trained to its end" in refused(*args, "--stage", follower)
        sf.main([*args, "--stage", stage])
    assert stopped == list(STAGES)
    for folder in STAGES.values():
        for which in ("model", "ema"):
            assert same(weights(trained / folder, which), weights(tmp_path / folder, which)), folder


def test_a_longer_run_of_a_stage_goes_on(trained, tmp_path):
    """Where the learning rate is constant."""
    out = copied(trained, tmp_path, "vae", "audio")
    for stage, option in (("video", "--video_steps"), ("joint", "--joint_steps")):
        sf.main([*TINY, *out, "--stage", stage, option, "2"])
        assert torch.load(tmp_path / STAGES[stage] / "ckpt.pt", weights_only=True)["step"] == 2
        sf.main([*TINY, *out, "--stage", stage])
        for which in ("model", "ema"):
            one = weights(trained / STAGES[stage], which)
            assert same(one, weights(tmp_path / STAGES[stage], which)), stage
    # The length of one stage says nothing of the others.
    sf.main([*TINY, *out, "--joint_steps", "4"])
    assert torch.load(tmp_path / "ckpt.pt", weights_only=True)["step"] == 4
    assert same(weights(trained / "audio"), weights(tmp_path / "audio"))


def test_a_falling_rate_keeps_to_its_length(trained, tmp_path):
    out = copied(trained, tmp_path, "vae")
    falls = ["--lr_end", "0.5", "--stage", "video", "--video_steps"]
    sf.main([*TINY, *out, *falls, "2"])
    assert "with --steps 2, not 3" in refused(*out, *falls, "3")


def test_the_sound_with_other_options_over_the_same_video_stage(trained, tmp_path):
    out = copied(trained, tmp_path, "vae", "video")
    other = ["--adaptor", "false", "--prenorm", "false", "--kv", "pool"]
    sf.main([*TINY, *out, *other, "--stage", "audio"])
    got = weights(tmp_path / "audio")
    assert not any("adaptors" in name for name in got)
    video = weights(trained / "video")
    for part in ("video.", "text.", "codec."):
        assert same(part_of(got, part), part_of(video, part))
    # The next stage has to have the same, and so has this one when it goes on.
    assert "names or shapes differ" in refused(*out, "--stage", "joint")
    assert "with --adaptor False, not True" in refused(*out, "--stage", "audio")
    sf.main([*TINY, *out, *other, "--stage", "joint"])
    model = sf.load(tmp_path / "ckpt.pt")
    assert sf.sample(model, 1, prompt="a ball")[1].isfinite().all()


VARIANTS = [
    "--noise_levels separate --ot false --grad_accum 2 --rope false --prenorm false --lr 1e-4",
    "--amp bf16 --checkpoint true --optimizer muon --cache_latents 0 --audio_from both",
    "--logit_normal () --kv pool",
]


@pytest.mark.parametrize("options", VARIANTS)
def test_variants_train_and_sample(options, trained, tmp_path):
    train_generator(*copied(trained, tmp_path, "vae"), *options.split())
    model = sf.load(tmp_path / "ckpt.pt")
    clip = raw(model.cfg, 1)
    for given in ({}, {"video": clip["video"]}):
        video, audio = sf.sample(model, 1, prompt="a ball", **given)
        assert video.shape == (1, 4, 8, 8, 3)
        assert audio.isfinite().all()


def test_latents_encoded_on_the_way_give_the_same_steps(trained, tmp_path):
    out = copied(trained, tmp_path, "vae")
    sf.main([*TINY, *out, "--stage", "video", "--cache_latents", "0", "--video_steps", "2"])
    first, second = (float(rows(folder / "video")[1]["loss"]) for folder in (trained, tmp_path))
    assert first == pytest.approx(second, rel=1e-3)


def test_parts_of_a_batch_give_the_weights_of_the_whole_but_for_transport(trained, tmp_path):
    """Noises are paired within a part: that is the mini-batch."""
    ran = {}
    for ot in ("false", "true"):
        for parts in ("1", "2"):
            folder = tmp_path / ot / parts
            out = copied(trained, folder, "vae", "video")
            options = ["--stage", "audio", "--ot", ot, "--grad_accum", parts]
            sf.main([*TINY, *out, *options, "--optimizer", "adamw", "--lr", "1e-3"])
            ran[ot, parts] = weights(folder / "audio", "model")
    assert same(ran["false", "1"], ran["false", "2"], 1e-5)
    assert not same(ran["true", "1"], ran["true", "2"], 1e-5)


def test_two_processes_learn_what_one_learns(tmp_path):
    """All stages: the start of the codec, the latents' files, frozen parts, noise are the same,
    and so is the pairing in the halves of a batch."""
    args = [*TINY, "--optimizer", "adamw", "--lr", "1e-3", "--vae_lr", "1e-3"]
    args += ["--cache_latents", "40"]
    sf.main([*args, "--out", str(tmp_path / "one"), "--grad_accum", "2"])
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    run = subprocess.run(
        [sys.executable, *torchrun, sf.__file__, *args, "--out", str(tmp_path / "two")],
        cwd=tmp_path,
        text=True,
        capture_output=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=240,
    )
    assert run.returncode == 0, run.stderr
    for folder in STAGES.values():
        for which in ("model", "ema"):
            one = weights(tmp_path / "one" / folder, which)
            two = weights(tmp_path / "two" / folder, which)
            for name, p in one.items():
                assert (p - two[name]).abs().max() < 1e-5, (folder, name)
        # Both take their share of validation.
        logs = [rows(tmp_path / run / folder) for run in ("one", "two")]
        for row, other in zip(*logs, strict=True):
            for name in set(row) - {"seconds"}:
                figures = [float(x[name] or 0) for x in (row, other)]
                assert figures[0] == pytest.approx(figures[1], rel=1e-3), name


def test_a_folder_keeps_to_its_run(trained, tmp_path):
    """Other options, or another codec under a generator: a sentence, nothing is touched."""
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    out = ["--out", str(tmp_path)]
    before = {folder: (tmp_path / folder / "ckpt.pt").read_bytes() for folder in STAGES.values()}
    assert "with --depth 2, not 1" in refused(*out, "--depth", "1")
    separate = ["--noise_levels", "separate"]
    assert "with --noise_levels shared" in refused(*out, "--stage", "joint", *separate)
    for folder, old in before.items():
        assert (tmp_path / folder / "ckpt.pt").read_bytes() == old
    says = refused(*out, "--vae_steps", "4")
    assert "trained with another codec" in says
    assert "video/ckpt.pt" in says
    for folder in ("video", "audio", "."):
        assert (tmp_path / folder / "ckpt.pt").read_bytes() == before[folder]


def test_a_codec_of_another_sound_is_refused(trained):
    """Its weights would fit; what they are fed would be something else."""
    cfg = tiny("--out", str(trained))
    others = {"fps": 5, "rate": 8000, "n_mels": 32, "hop": 100}
    others |= {"window": 100, "n_fft": 256, "floor": 0.01}
    for name, value in others.items():
        other = dataclasses.replace(cfg, **{name: value})
        with pytest.raises(data.UserError, match=f"with --{name} {getattr(cfg, name)}"):
            sf.load_codec(sf.SmallCodec(other), other, None)
    # So are the towers over it, whose positions are no weights.
    for stage, before in (("audio", "video"), ("joint", "audio")):
        says = refused("--out", str(trained), "--stage", stage, "--hop", "100")
        assert f"{before}/ckpt.pt was trained with --hop 50" in says
        for stage in ("audio", "joint"):
            with pytest.raises(data.UserError, match=f"with --{name} {getattr(cfg, name)}"):
                sf.start_of(None, stage, other, None)


def test_a_video_tower_that_learned_on_is_not_mixed_up(trained, tmp_path):
    """Stage audio of a folder does not go on over other weights, nor with other positions."""
    out = copied(trained, tmp_path, "vae", "video", "audio")
    sf.main([*TINY, *out, "--stage", "video", "--video_steps", "4"])
    before = (tmp_path / "audio" / "ckpt.pt").read_bytes()
    says = refused(*out, "--video_steps", "4", "--stage", "audio")
    assert "audio/ckpt.pt was trained with another video tower" in says
    assert (tmp_path / "audio" / "ckpt.pt").read_bytes() == before
    rope = "false" if tiny().rope else "true"
    says = refused(*out, "--stage", "audio", "--rope", rope)
    assert f"video/ckpt.pt was trained with --rope {tiny().rope}" in says


def test_stages_have_an_order(trained, tmp_path):
    out = ["--out", str(tmp_path), "--stage"]
    assert "There is no checkpoint" in refused(*out, "video")
    assert "run --stage video first, or give --init_video" in refused(*out, "audio")
    assert "There is no checkpoint" in refused(*out, "joint")
    (tmp_path / "vae").mkdir()
    state = torch.load(trained / "vae" / "ckpt.pt", weights_only=True)
    torch.save({**state, "step": 2}, tmp_path / "vae" / "ckpt.pt")
    assert "not trained to its end: run --stage vae first" in refused(*out, "video")
    shutil.copytree(trained / "video", tmp_path / "video")
    assert "There is no checkpoint" in refused(*out, "joint")
    assert not (tmp_path / "ckpt.pt").exists()


def test_a_checkpoint_of_something_else_is_in_the_way(trained, tmp_path):
    out = copied(trained, tmp_path, "vae")
    (tmp_path / "video").mkdir()
    torch.save({"weights": torch.zeros(2)}, tmp_path / "video" / "ckpt.pt")
    before = (tmp_path / "video" / "ckpt.pt").read_bytes()
    for stage in ("video", "audio"):
        assert "video/ckpt.pt" in refused(*out, "--stage", stage)
    assert (tmp_path / "video" / "ckpt.pt").read_bytes() == before


def released(film=FILM, both=True):
    """Weights as of Open-Sora's STDiT3, with outputs for a variance and fixed frequencies."""
    cfg = tiny()
    torch.manual_seed(3)
    tower = sf.VideoTower(cfg, film, 2 * film[0] if both else film[0])
    with torch.no_grad():
        for p in tower.parameters():
            p.normal_(0, 0.1)
    return tower, {**tower.state_dict(), "rope.freqs": 10000 ** (-torch.arange(0, 8, 2) / 8)}


def test_weights_of_open_sora_are_a_start(tmp_path):
    """Of its outputs those of the velocity are taken: the first half of the channels."""
    x = torch.randn(1, *FILM)
    text = torch.randn(1, 8, 16)
    t = torch.tensor([300.0])
    for both in (True, False):
        theirs, state = released(both=both)
        torch.save(state, tmp_path / "stdit3.pt")
        tower = sf.VideoTower(tiny(), FILM, 4)
        sf.load_stdit3(tower, str(tmp_path / "stdit3.pt"))
        with torch.no_grad():
            close(tower(x, t, text)[0], theirs(x, t, text)[0][:, :4])
    state.pop("t_block.1.weight")
    torch.save(state, tmp_path / "stdit3.pt")
    with pytest.raises(data.UserError, match="t_block.1.weight"):
        sf.load_stdit3(tower, str(tmp_path / "stdit3.pt"))


def test_stage_audio_may_follow_released_weights(trained, tmp_path, monkeypatch):
    """Without a stage video of one's own, where a T5 has the words that they know; or that stage
    starts from them."""
    out = copied(trained, tmp_path, "vae")
    theirs, state = released()
    torch.save(state, tmp_path / "stdit3.pt")
    init = ["--init_video", str(tmp_path / "stdit3.pt")]
    assert "--t5" in refused(*out, *init, "--stage", "audio")  # an encoder nobody has trained
    make_t5(tmp_path)
    monkeypatch.setitem(sys.modules, "transformers", fake_transformers(16))
    sf.t5.cache_clear()
    words = ["--t5", str(tmp_path)]
    sf.main([*TINY, *out, *init, *words, "--stage", "audio"])
    assert not (tmp_path / "video").exists()
    got = weights(tmp_path / "audio", "model")
    for name, p in theirs.state_dict().items():
        if "final_layer.linear" not in name:
            assert torch.equal(got[f"video.{name}"], p), name
    sf.main([*TINY, *out, *words, "--stage", "joint"])  # which knows nothing of them
    sf.t5.cache_clear()
    slow = ["--lr", "1e-12", "--stage", "video"]
    sf.main([*TINY, *out, *init, *slow])
    got = weights(tmp_path / "video", "model")
    for name, p in theirs.state_dict().items():
        if "final_layer.linear" not in name:
            close(got[f"video.{name}"], p, 1e-6)
    assert "nowhere.pt" in refused("--out", str(tmp_path / "x"), "--init_video", "nowhere.pt")


class TinyOriginal(sf.OriginalCodec):
    """With few channels."""

    def __init__(self, cfg):
        torch.nn.Module.__init__(self)
        self.cfg = cfg
        self.spatial_vae = sf.AutoencoderKL(3, (4, 4, 8, 8), 1, 4, groups=2)
        levels = ((4, 1), (8, 2), (8, 2), (4, 1))
        self.temporal_vae = sf.TemporalVAE(4, levels, 1, 4, groups=2)
        self.register_buffer("stats", torch.tensor([0.5, 2.0]).view(2, 1, 1, 1, 1))
        self.wave = sf.WaveVAE(cfg)


def test_the_codec_of_the_paper_takes_a_clip_in_one_piece():
    """32 frames are 8 latents; Open-Sora's pieces of 17 frames would make 9."""
    cfg = tiny(*WAVE, "--frames", "32", "--size", "16")
    codec = TinyOriginal(cfg)
    clip = {"video": torch.rand(2, 32, 3, 16, 16), "audio": torch.rand(2, 1, 12800)}
    with torch.no_grad():
        z = codec.encode(clip)
        back = codec.decode(z)
        assert list(codec.decode({"z_v": z["z_v"]})) == ["video"]
        assert list(codec.encode({"video": clip["video"]})) == ["z_v"]
    assert z["z_v"].shape == (2, 4, 8, 2, 2)
    assert z["z_a"].shape == (2, 6, 128, 1)
    assert back["video"].shape == clip["video"].shape
    assert back["audio"].shape == (2, 12800)
    film, sound = sf.latent_shapes(cfg)
    assert (film, sound) == (z["z_v"].shape[1:], z["z_a"].shape[1:3])


def test_the_codec_of_the_paper_through_all_stages(tmp_path, monkeypatch, capsys):
    """Its sound is trained here, its video VAE comes from a file."""
    monkeypatch.setattr(sf, "OriginalCodec", TinyOriginal)
    args = [*WAVE, "--out", str(tmp_path)]
    says = refused(*args)
    assert "needs --video_vae FILE" in says and "--codec small" in says
    assert "nowhere.pt" in refused(*args, "--video_vae", "nowhere.pt", "--vae_steps", "1")
    shutil.rmtree(tmp_path / "vae")
    torch.manual_seed(0)
    theirs = TinyOriginal(tiny(*WAVE))
    state = {f"temporal_vae.{k}": w for k, w in theirs.temporal_vae.state_dict().items()}
    spatial = theirs.spatial_vae.state_dict()
    state |= {f"spatial_vae.module.{name}": w for name, w in spatial.items()}
    video_vae = str(tmp_path / "model.safetensors")
    write_safetensors(Path(video_vae), state)

    sf.main([*TINY, *args, "--stage", "vae"])  # needs no file
    assert [name for name in rows(tmp_path / "vae")[1] if name in ("video", "audio")] == ["audio"]
    assert "Log-mel distance" not in capsys.readouterr().out
    args += ["--video_vae", video_vae]
    sf.main([*TINY, *args])
    assert "Log-mel distance" in capsys.readouterr().out
    got = weights(tmp_path)
    for name, w in spatial.items():
        assert torch.equal(got[f"codec.spatial_vae.{name}"], w), name
    first = weights(tmp_path / "vae")
    for name, w in first.items():
        measured = name in ("mean", "scale")
        assert torch.equal(got[f"codec.wave.{name}"], w) != measured, name

    model = sf.load(tmp_path / "ckpt.pt")
    assert model.shapes == ((4, 1, 1, 1), (6, 16))
    clips = raw(model.cfg, 2)
    batch = data.to_device(clips, "cpu")
    z = model.encode(batch)
    assert z["z_v"].shape == (2, 4, 1, 1, 1)
    assert z["z_a"].shape == (2, 6, 16)
    video, audio = sf.sample(model, 2, video=clips["video"])
    assert torch.equal(video, clips["video"])
    assert audio.shape == (2, 1600)

    # The sound VAE of another run is taken by --audio_vae, and none is trained.
    args = [*WAVE, "--video_vae", video_vae, "--audio_vae", str(tmp_path / "vae" / "ckpt.pt")]
    steps = ["--video_steps", "1", "--steps", "1", "--joint_steps", "1"]
    sf.main([*TINY, *args, *steps, "--out", str(tmp_path / "other")])
    assert not (tmp_path / "other" / "vae").exists()
    assert torch.equal(
        weights(tmp_path / "other")["codec.wave.moments.weight"], first["moments.weight"]
    )
    assert "trained with --rate 4000" in refused(
        *args, "--out", str(tmp_path / "fast"), "--rate", "8000"
    )


# ---- Sampling


@pytest.fixture
def model(trained):
    """The trained model, whose text and time matter: few steps taught it nothing."""
    model = sf.load(trained / "ckpt.pt")
    with torch.no_grad():
        for tower in (model.video, model.audio):
            for p in tower.parameters():
                draw = torch.Generator().manual_seed(p.numel())
                p.add_(0.05 * torch.randn(p.shape, generator=draw))
    return model


def test_samples_depend_on_seed_place_and_text_alone(model):
    video, audio = sf.sample(model, 3, prompt="a red ball", seed=5)
    assert video.shape == (3, 4, 8, 8, 3)
    assert video.dtype == torch.uint8
    assert audio.shape == (3, 1600)
    assert audio.dtype == torch.float32
    assert audio.abs().max() <= 1
    again = sf.sample(model, 2, prompt="a red ball", seed=5, batch_size=1)
    assert (video[:2].int() - again[0].int()).abs().max() <= 1
    assert (audio[:2] - again[1]).abs().max() < 1e-3
    others = [
        {"seed": 6, "prompt": "a red ball"},
        {"prompt": "rain"},
        {"label": "rain"},
        {},
        {"guidance": 1.0, "prompt": "a red ball"},
        {"prompt": "a red ball", "negative_prompt": "blue"},
        {"prompt": "a red ball", "steps": 3},
    ]
    for options in others:
        other = sf.sample(model, 1, **{"seed": 5, **options})
        assert (other[1] - audio[:1]).abs().max() > 1e-6, options


def test_prompts_and_labels_are_one_value_or_a_list_of_n(model):
    one = sf.sample(model, 3, prompt="a ball")
    three = sf.sample(model, 3, prompt=["a ball"] * 3)
    assert torch.equal(one[0], three[0])
    labels = sf.sample(model, 1, label="rain")
    assert torch.equal(labels[1], sf.sample(model, 1, prompt="a video of rain")[1])
    mixed = sf.sample(model, 2, label=["rain", "bounce"])
    for i, label in enumerate(("rain", "bounce")):
        alone = sf.sample(model, 2, label=label)
        assert (mixed[1][i] - alone[1][i]).abs().max() < 1e-3
    with pytest.raises(data.UserError, match="2 clips need one prompt or label or 2"):
        sf.sample(model, 2, prompt=["a"])
    with pytest.raises(data.UserError, match="one text for all"):
        sf.sample(model, 2, prompt="x", negative_prompt=["a", "b"])


def test_guidance_that_changes_nothing_costs_nothing(model):
    calls = []
    model.register_forward_pre_hook(lambda net, args: calls.append(len(args[0])))
    sf.sample(model, 2)
    sf.sample(model, 2, prompt="rain", negative_prompt="rain")
    sf.sample(model, 2, prompt="rain", guidance=1)
    assert calls == [2] * 6
    sf.sample(model, 2, prompt="rain")
    sf.sample(model, 2, prompt=["rain", ""])
    assert calls[6:] == [4] * 4


@pytest.mark.parametrize("levels", ["shared", "separate"])
def test_a_given_video_comes_back_and_shapes_the_sound(model, levels):
    """Zero-shot: no task of training."""
    model.cfg = dataclasses.replace(model.cfg, noise_levels=levels)
    clip = raw(model.cfg, 2, "val")
    video, audio = sf.sample(model, 2, video=clip["video"][0], seed=3)
    assert torch.equal(video, clip["video"][:1].expand_as(video))
    assert video.dtype == torch.uint8
    assert audio.shape == (2, 1600)
    other = sf.sample(model, 2, video=clip["video"][1], seed=3)[1]
    assert (audio - other).abs().max() > 1e-6
    # One video for each clip, dealt in any batches.
    each = sf.sample(model, 2, video=clip["video"].numpy(), seed=3, batch_size=1)
    assert torch.equal(each[0], clip["video"])
    assert (each[1] - torch.stack([audio[0], other[1]])).abs().max() < 1e-3


def test_conditions_that_do_not_fit_are_refused(model):
    clip = raw(model.cfg, 2, "val")
    wrong = [
        clip["video"],  # two for three
        clip["video"][0, :3],
        clip["video"][0, :, :4],
        clip["video"][0, :1],  # a still
    ]
    for video in wrong:
        with pytest.raises(data.UserError, match="one window of 4 x 8 x 8 x 3 numbers, or 3 of"):
            sf.sample(model, 3, video=video)
    for more in ({}, {"video": clip["video"][0]}):
        with pytest.raises(data.UserError, match="makes no video for a sound"):
            sf.sample(model, 1, audio=clip["audio"][0], **more)


def test_a_model_without_text_takes_none(trained, tmp_path):
    out = copied(trained, tmp_path, "vae")
    train_generator(*out, "--text_drop", "1")
    model = sf.load(tmp_path / "ckpt.pt")
    assert sf.sample(model, 1)[0].shape == (1, 4, 8, 8, 3)
    clip = raw(model.cfg, 1)
    assert sf.sample(model, 1, video=clip["video"])[1].shape == (1, 1600)
    for options in ({"prompt": "a ball"}, {"label": "rain"}, {"negative_prompt": "rain"}):
        with pytest.raises(data.UserError, match="without text"):
            sf.sample(model, 1, **options)


@pytest.mark.parametrize("size", [4, 16])
def test_other_sizes_without_training(trained, size):
    model = sf.load(trained / "ckpt.pt", options=["--size", str(size)])
    assert model.shapes == ((4, 2, size // 2, size // 2), SOUND)
    video, audio = sf.sample(model, 1, prompt="a ball")
    assert video.shape == (1, 4, size, size, 3)
    assert audio.shape == (1, 1600)
    given = torch.zeros(1, 4, size, size, 3, dtype=torch.uint8)
    assert sf.sample(model, 1, video=given)[1].shape == (1, 1600)
    with pytest.raises(data.UserError, match="--size of 2 and 2"):
        sf.load(trained / "ckpt.pt", options=["--size", "9"])


def test_sampling_uses_the_precision_of_training(model):
    first = sf.sample(model, 1, prompt="a ball")[1]
    model.cfg = dataclasses.replace(model.cfg, amp="bf16")
    second = sf.sample(model, 1, prompt="a ball")[1]
    assert second.isfinite().all()
    assert not torch.equal(first, second)


def test_sample_py_takes_a_prompt_a_video_and_a_size(trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    args = ["--model", "syncflow", "--ckpt", str(trained / "ckpt.pt"), "--n", "1"]
    args += ["--device", "cpu"]
    sample.main([*args, "--prompt", "a video of a red ball bouncing", "--guidance", "2"])
    out = tmp_path / "out" / "syncflow" / "samples_001"
    assert {"000.mp4", "000.wav", "000.png", "index.html"} <= {p.name for p in out.iterdir()}
    sample.main([*args, "--video", str(out / "000.mp4")])
    sample.main([*args, "--size", "16"])
    # The stages before can be listened to, too.
    before = ["--model", "syncflow", "--n", "1", "--device", "cpu", "--ckpt"]
    sample.main([*before, str(trained / "audio" / "ckpt.pt")])
    assert len(list((tmp_path / "out" / "syncflow").glob("samples_*"))) == 4
    with pytest.raises(SystemExit, match="makes no video for a sound"):
        sample.main([*args, "--audio", str(out / "000.wav")])
    with pytest.raises(SystemExit, match="holds no generator"):
        sample.main([*before, str(trained / "vae" / "ckpt.pt")])


# ---- Mistakes


MISTAKES = [
    ("--stage train", "--stage must be one of all, vae, video, audio, joint"),
    ("--codec vqgan", "--codec must be one of original, small"),
    ("--kv mean", "--kv must be one of flatten, pool"),
    ("--audio_from nothing", "--audio_from must be one of video, text, both"),
    ("--noise_levels own", "--noise_levels must be one of shared, separate"),
    ("--vae_optimizer sgd", "--vae_optimizer must be one of adamw, muon"),
    ("--ot maybe", "--ot"),
    ("--logit_normal 1", "--logit_normal needs two numbers, or none"),
    ("--batch_size 6 --grad_accum 4 --vae_batch_size 6", "does not divide by 4"),
    ("--betas 0.9", "--betas needs 2 numbers"),
    ("--video_patch 2,2", "--video_patch needs 3"),
    ("--audio_patch 2", "--audio_patch needs 2 numbers"),
    ("--frames 5", "--frames must be a multiple of 2"),
    ("--size 9", "--size of 2 and 2"),
    ("--codec original --size 12", "--frames must be a multiple of 4, --size of 8 and 8"),
    ("--codec original", "--audio_strides must divide the 1600 samples"),
    ("--codec original --audio_strides 5,4,4,5", "needs --video_vae FILE"),
    ("--hop 33", "--hop must divide the 1600 samples"),
    ("--audio_patch 3,16", "--audio_patch must divide 32 mel columns"),
    ("--audio_patch 4,4", "have all 16 bands"),
    ("--width 18", "--width must divide by 4"),
    ("--heads 3", "--width must divide by 4 and 2 * --heads"),
    ("--t5 nowhere", "not the folder of a T5"),
    ("--device gpu", "no --device gpu"),
    ("--video_steps 0", "--video_steps 0 is too small"),
    ("--joint_steps 0", "--joint_steps 0 is too small"),
    ("--sample_steps 0", "--sample_steps 0 is too small"),
    ("--data toy:tennis", "bounce, collide"),
    ("--widht 3", "unrecognized"),
    ("--preset huge", "no --preset huge"),
]


@pytest.mark.parametrize("args,says", MISTAKES, ids=[args for args, _ in MISTAKES])
def test_wrong_options_end_in_one_sentence(args, says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert says in refused("--out", "out", *args.split())


def test_defaults_are_the_papers():
    cfg = sf.parse(["--preset", "paper"])
    assert (cfg.sample_steps, cfg.guidance, cfg.text_drop) == (50, 6.0, 0.1)
    assert cfg.ot and cfg.adaptor and cfg.noise_levels == "shared" and cfg.logit_normal == ()
    assert (cfg.kv, cfg.audio_from, cfg.prenorm, cfg.rope) == ("flatten", "video", False, False)
    assert math.prod(cfg.audio_strides) == 960
    assert cfg.frames * cfg.rate // cfg.fps == 96000
