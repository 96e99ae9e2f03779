"""The small codecs of uniform_dit.py and its mel front end."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import data
import uniform_dit as ud

CFG = dict(
    frames=16,
    size=32,
    fps=10,
    rate=8000,
    n_mels=64,
    hop=80,
    window=400,
    n_fft=512,
    floor=3e-3,
    griffin_lim=30,
    video_patch=(4, 4, 4),
    video_channels=8,
    audio_patch=(8, 8),
    audio_channels=8,
    vae_width=8,
    vae_blocks=1,
    kl=1e-3,
    val_clips=16,
    seed=0,
    need_good=True,
)


def config(**other):
    return SimpleNamespace(**{**CFG, **other})


def clips(split, n):
    dataset = data.open_dataset("toy:bounce,glide,pulse", split)
    return data.to_device(data.make_batch(dataset, 0, range(n)), "cpu")


@pytest.fixture(scope="module")
def batch():
    return clips("train", 16)


@pytest.fixture
def started(batch):
    torch.manual_seed(0)
    codec = ud.SmallCodec(config())
    codec.start([batch])
    return codec


def stir(codec):
    """Give the residual branches something to say, as training does."""
    for vae in codec.vaes.values():
        torch.nn.init.normal_(vae.leave.weight, std=0.1)
        torch.nn.init.normal_(vae.render.weight, std=0.01)


def by_hand(x, patch, n):
    """The best code of n numbers per patch, by a singular value decomposition in numpy."""
    B, C, F, H, W = x.shape
    p, q, r = patch
    rows = x.double().numpy().reshape(B, C, F // p, p, H // q, q, W // r, r)
    rows = rows.transpose(0, 2, 4, 6, 1, 3, 5, 7).reshape(-1, C * p * q * r)
    mean = rows.mean(0)
    axes = np.linalg.svd(rows - mean, full_matrices=False)[2][:n]
    return ((rows - mean - (rows - mean) @ axes.T @ axes) ** 2).mean()


def test_a_fresh_codec_is_the_linear_code_of_its_clips(started, batch):
    for name, x in started.inputs(batch).items():
        vae = started.vaes[name]
        codes = vae.encode(x)
        error = (vae.decode(codes) - x).square().mean().item()
        assert error == pytest.approx(by_hand(x, vae.patch, 8), rel=1e-3)
        assert torch.allclose(codes.std((0, 2, 3, 4)), torch.ones(8), atol=1e-2)
        assert torch.allclose(codes.mean((0, 2, 3, 4)), torch.zeros(8), atol=1e-3)


def test_latents_know_nothing_of_later_frames(started, batch):
    stir(started)
    video = batch["video"][:2]
    changed = video.clone()
    changed[:, 8:] = 0.3
    z = started.encode({"video": video})["z_v"]
    other = started.encode({"video": changed})["z_v"]
    assert torch.equal(z[:, :, :2], other[:, :, :2])
    assert not torch.allclose(z[:, :, 2:], other[:, :, 2:])
    # Nor does what is made of them: the first frames of a longer clip are the clip.
    whole = started.decode({"z_v": z})["video"]
    part = started.decode({"z_v": z[:, :, :2]})["video"]
    assert torch.allclose(whole[:, :8], part, atol=1e-5)


def test_latents_have_unit_variance_and_decode_to_what_they_were(started, batch):
    stir(started)
    started.measure(data.split(batch, 2))
    for name, x in started.inputs(batch).items():
        vae = started.vaes[name]
        assert torch.allclose(vae.clips(vae.latents(x)), vae.decode(vae.encode(x)), atol=1e-4)
    z = started.encode(batch)
    assert z["z_v"].shape == (16, 8, 4, 8, 8)
    assert z["z_a"].shape == (16, 8, 20, 8)
    for x in z.values():
        rows = x.transpose(0, 1).flatten(1)
        assert torch.allclose(rows.mean(1), torch.zeros(8), atol=1e-4)
        assert x.square().mean().item() == pytest.approx(1, abs=1e-3)
    out = started.decode(z)
    assert out["video"].shape == (16, 16, 3, 32, 32)
    assert out["audio"].shape == (16, 12800)
    assert list(started.encode({"audio": batch["audio"]})) == ["z_a"]


def test_channels_that_are_worth_more_in_pixels_are_larger(started, batch):
    with torch.no_grad():
        started.vaes["audio"].from_codes.weight[3] = 0  # no pixel changes with it
    started.measure([batch])
    for name, x in started.inputs(batch).items():
        vae = started.vaes[name]
        codes = vae.encode(x)
        nothing = vae.from_codes(torch.zeros(1, 8, 1, 1, 1))
        worth = []
        for i in range(8):
            one = torch.zeros(1, 8, 1, 1, 1)
            one[:, i] = codes[:, i].std()
            worth.append((vae.from_codes(one) - nothing).norm())
        worth = torch.stack(worth)
        sizes = vae.latents(x).std((0, 2, 3, 4))
        assert torch.equal(sizes.argsort(), worth.argsort())
        # Not in proportion, which would leave to noise all but one or two.
        share = worth**0.6
        want = share / share.square().mean().sqrt()
        assert torch.allclose(sizes, want, atol=2e-3)


def test_loss_draws_noise_by_clip_in_training_alone(started, batch):
    def mean_loss(x, t=None):
        return ud.vae_loss(started, x, t)[0].item()

    part = {"video": batch["video"][:4], "audio": batch["audio"][:4], "key": batch["key"][:4]}
    turned = {name: x.flip(0) for name, x in part.items()}
    t = torch.zeros(4)
    assert mean_loss(part) == pytest.approx(mean_loss(turned), rel=1e-5)
    assert mean_loss(part) > mean_loss(part, t)
    assert mean_loss(part) == started(part, part["key"])[0].item()
    assert mean_loss(part, t) == started(part)[0].item()
    _, parts = ud.vae_loss(started, part, t)
    x = started.inputs(part)["video"]
    error = started.vaes["video"].decode(started.vaes["video"].encode(x)) - x
    expected = error.abs().mean() + 4 * error.square().mean()
    assert parts["video"].item() == pytest.approx(expected.item(), rel=1e-5)


def test_every_weight_learns_after_one_step(started, batch):
    stir(started)
    part = {name: batch[name][:2] for name in ("video", "audio", "key")}
    ud.vae_loss(started, part)[0].backward()
    for name, p in started.named_parameters():
        assert p.grad is not None and p.grad.abs().sum() > 0, name


def test_what_muon_does_not_touch(started):
    cfg = SimpleNamespace(optimizer="muon", weight_decay=0.0, lr=1e-3, betas=(0.9, 0.99))
    [group] = ud.build_optimizers(started, cfg)["muon"].param_groups
    names = {p: name for name, p in started.named_parameters()}
    hidden = {names[p] for p in group["params"]}
    inside = ("encoder", "decoder")  # the convolutions between first and last layers
    want = {n for p, n in names.items() if p.dim() > 1 and n.split(".")[2] in inside}
    assert hidden == want


def test_gate(started):
    val = data.open_dataset("toy:bounce,glide,pulse", "val")
    table = ud.examine(started, val, "cpu")
    assert all(ours > other for ours, other in table.values())
    with pytest.raises(data.UserError, match="baseline"):
        ud.examine(ud.SmallCodec(config()), val, "cpu")
    with torch.no_grad():
        started.vaes["audio"].mean_patch.fill_(math.nan)
    with pytest.raises(data.UserError, match="audio"):
        ud.examine(started, val, "cpu")


def slaney_by_hand(rate, n_fft, bands):
    """One weight at a time, from the definition."""

    def to_mel(f):
        return f * 3 / 200 if f < 1000 else 15 + 27 * math.log(f / 1000, 6.4)

    def to_hz(mel):
        return mel * 200 / 3 if mel < 15 else 1000 * 6.4 ** ((mel - 15) / 27)

    edges = [to_hz(to_mel(rate / 2) * i / (bands + 1)) for i in range(bands + 2)]
    bank = np.zeros((bands, n_fft // 2 + 1))
    for m in range(bands):
        low, middle, high = edges[m : m + 3]
        for k in range(n_fft // 2 + 1):
            f = k * rate / n_fft
            if low < f <= middle:
                bank[m, k] = (f - low) / (middle - low)
            if middle < f < high:
                bank[m, k] = (high - f) / (high - middle)
        bank[m] *= 2 / (high - low)
    return bank


@pytest.mark.parametrize("rate, n_fft", [(8000, 512), (16000, 1024)])
def test_bank_is_slaneys(rate, n_fft):
    bank = ud.Mel(config(rate=rate, n_fft=n_fft)).bank
    assert np.abs(bank.numpy() - slaney_by_hand(rate, n_fft, 64)).max() < 1e-7


def test_mel_of_a_sine_peaks_in_its_band():
    mel = ud.Mel(config())
    middle = slaney_by_hand(8000, 512, 64).argmax(1) * 8000 / 512
    for band in (10, 30, 50):
        sine = torch.sin(2 * math.pi * middle[band] * torch.arange(12800) / 8000)
        m = mel(sine[None, None])
        assert m.shape == (1, 1, 160, 64)
        assert (m[0, 0, 5:-5].argmax(1) == band).all()
    assert torch.allclose(mel(torch.zeros(1, 1, 12800)), torch.tensor(3e-3).log())


def test_mel_comes_back_from_its_inverse(batch):
    mel = ud.Mel(config())
    m = mel(batch["audio"][:4])
    audio = mel.inverse(m)
    assert audio.shape == (4, 12800)
    assert (mel(audio[:, None]) - m).abs().mean() < 0.15  # nepers
    # Whatever else is in the batch, a clip sounds the same.
    assert torch.allclose(mel.inverse(m[1:2]), audio[1:2], atol=1e-4)


def test_griffin_lim_finds_a_waveform_of_the_spectrum(batch):
    mel = ud.Mel(config())
    size = mel.stft(batch["audio"][:2, 0]).abs()
    audio = ud.griffin_lim(size, mel.stft, mel.istft, 60)
    error = (mel.stft(audio).abs() - size).norm() / size.norm()
    assert error < 0.2
    bank = mel.bank
    assert torch.allclose(bank @ ud.unmel(bank @ size, bank), bank @ size, atol=0.05)
