"""uniform_dit.py: film, tasks and their masks, diffusion, text, stages, sampling."""

import csv
import dataclasses
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
from test_proav_dit import fake_transformers, make_t5

import data
import sample
import uniform_dit as ud

torch.set_num_threads(1)
TINY = """
    --preset toy --data toy --frames 4 --size 8 --video_patch 2,2,2 --video_channels 4 --rate 4000
    --n_mels 16 --hop 50 --window 128 --n_fft 128 --audio_patch 4,4 --audio_channels 4
    --vae_width 8 --vae_blocks 1 --vae_steps 3 --vae_batch_size 4 --width 16 --depth 1 --heads 2
    --text_width 16 --text_tokens 8 --cache_latents 8 --steps 4 --batch_size 4 --val_clips 4
    --workers 0 --samples 1 --log_every 1 --eval_every 1000 --griffin_lim 4 --sample_steps 2
    --need_good false --lr_end 1
""".split()
NOISE = ("--predict", "noise", "--learn_sigma", "true", "--sampler", "ddpm")  # as in the paper
T2AV, A2V, V2A = ud.TASKS


def tiny(*more):
    return ud.parse([*TINY, *more])


def net_of(*more, seed=0):
    """A model whose every parameter is random: zeroed ones would hide what is behind them."""
    torch.manual_seed(seed)
    net = ud.UniForm(tiny(*more))
    with torch.no_grad():
        for p in net.parameters():
            if p.abs().max() == 0:
                p.normal_(0, 0.1)
    return net.eval()


def raw(cfg, n, split="train"):
    dataset = data.open_dataset("toy", split, cfg.frames, cfg.size, cfg.fps, cfg.rate)
    return data.make_batch(ud.Captioned(dataset, cfg), 0, range(n))


def words_of(cfg, *captions):
    return torch.from_numpy(np.stack([ud.spell(caption, cfg) for caption in captions]))


def latents(model, n=2, step=0):
    """A batch of random latents, as Latents and the loader make them."""
    video, audio = ud.latent_shapes(model.cfg)
    draw = torch.Generator().manual_seed(1)
    return {
        "z_v": torch.randn(n, *video, generator=draw),
        "z_a": torch.randn(n, *audio, generator=draw),
        "words": words_of(model.cfg, *["a red ball"] * n),
        "key": torch.arange(n) + 7,
        "step": step,
    }


def weights(folder, which="model"):
    return torch.load(Path(folder) / "ckpt.pt", weights_only=True)[which]


def rows(folder):
    return list(csv.DictReader(open(Path(folder) / "log.csv"), restval=""))


def same(one, two, tol=0.0):
    return one.keys() == two.keys() and all((one[k] - two[k]).abs().max() <= tol for k in one)


class Spy:
    """In place of a network: returns what `answer` says, or 0; keeps what it was asked.

    answer(x, t, task, words) -> (B, 2 C or C, T, h, k + w)
    """

    def __init__(self, model, answer=None):
        self.answer = answer
        self.channels = model.shape[0] * (2 if model.cfg.learn_sigma else 1)
        self.seen = []

    def __call__(self, x, t, task, words, mask):
        self.seen.append((x, t, task, words))
        if self.answer is None:
            return x.new_zeros(len(x), self.channels, *x.shape[2:])
        return self.answer(x, t, task, words)


def step_of(model, task):
    """A step whose iteration has this task."""
    process = ud.build_process(model)
    spy = Spy(model)
    for step in range(100):
        process.loss(spy, latents(model, 1, step))
        if spy.seen[-1][2] == task:
            return step


def asked(model, answer=None):
    """The model, with a Spy inside -> that."""
    spy = Spy(model, answer)
    model.forward = spy
    return spy


# ---- Sizes and layout


class NoCodec(torch.nn.Module):
    def __init__(self, cfg):
        super().__init__()


def test_sizes_of_the_paper(monkeypatch):
    monkeypatch.setattr(ud, "PretrainedCodec", NoCodec)
    with torch.device("meta"):
        model = ud.UniForm(ud.parse(["--preset", "paper"]))
    assert ud.latent_shapes(model.cfg) == ((4, 20, 32, 32), (8, 100, 16))
    assert model.shape == (4, 20, 32, 5 + 32)
    assert model.task_shape == (4, 20, 32, 1)
    assert model.sound == 5
    assert ud.count(model.dit) == 1_207_643_936
    assert model.task.weight.numel() == 7680
    tokens = model.shape[1] * len(model.dit.places)
    assert tokens == 6080


@pytest.mark.parametrize("preset", ["toy", "small"])
def test_sizes_of_the_others(preset, monkeypatch):
    monkeypatch.setattr(ud, "SmallCodec", NoCodec)
    cfg = ud.parse(["--preset", preset])
    with torch.device("meta"):
        model = ud.UniForm(cfg)
        x = torch.empty(2, *model.shape)
        words = torch.zeros(2, cfg.text_tokens, ud.LETTERS, dtype=torch.long)
        for task in ud.TASKS:
            out = model(x, torch.empty(2), task, *ud.read(words, cfg))
            assert out.shape == (2, (1 + cfg.learn_sigma) * x.shape[1], *x.shape[2:])
        out.sum().backward()
    columns = model.shape[3] + model.task_shape[3]
    assert columns % 2 == 0
    for name, p in model.named_parameters():
        assert p.grad is not None, name


# T, C, h, C_a, N, k: the paper's, toy, and others.
SHAPES = [(20, 4, 32, 8, 16, 5), (4, 8, 8, 8, 8, 5), (3, 2, 6, 4, 3, 1), (2, 6, 2, 3, 4, 4)]


@pytest.mark.parametrize("T,C,h,C_a,N,k", SHAPES)
def test_sound_goes_into_columns_and_back(T, C, h, C_a, N, k):
    z_a = torch.randn(2, C_a, T * k, N)
    x = ud.to_columns(z_a, T, C)
    assert x.shape == (2, C, T, h, k)
    assert torch.equal(ud.from_columns(x, C_a), z_a)
    for s in (0, k - 1, T * k // 2, T * k - 1):
        one = torch.zeros_like(z_a)
        one[:, :, s] = 1
        where = ud.to_columns(one, T, C).amax((0, 1, 3)).nonzero().tolist()
        assert where == [[s // k, s % k]]


def test_a_film_holds_what_is_given():
    model = net_of()
    assert model.shape == (4, 2, 4, 4 + 4)
    batch = latents(model)
    film = model.film(batch, 2)
    assert torch.equal(model.video(film), batch["z_v"])
    assert torch.equal(ud.from_columns(model.audio(film), 4), batch["z_a"])
    assert torch.equal(model.film({"z_v": batch["z_v"]}, 2)[..., 4:], batch["z_v"])
    assert model.film({"z_v": batch["z_v"]}, 2)[..., :4].abs().max() == 0
    assert torch.equal(model.film({"z_a": batch["z_a"]}, 2)[..., :4], film[..., :4])
    assert model.film({}, 3).shape == (3, 4, 2, 4, 8)
    assert model.made(T2AV).tolist() == [True] * 8
    assert model.made(A2V).tolist() == [False] * 4 + [True] * 4
    assert model.made(V2A).tolist() == [True] * 4 + [False] * 4


def test_decode_inverts_encode():
    model = net_of()
    batch = data.to_device(raw(model.cfg, 2), "cpu")
    z = model.encode(batch)
    assert set(z) == {"z_v", "z_a"}
    out = model.codec.decode(z)
    clips = model.decode(model.film(z, 2), "t2av")
    video, audio = clips["video"], clips["audio"]
    for task, name in (("v2a", "audio"), ("a2v", "video")):
        made = model.decode(model.film(z, 2), task)
        assert list(made) == [name]
        assert torch.equal(made[name], clips[name])
    assert video.shape == (2, 4, 8, 8, 3)
    assert video.dtype == torch.uint8
    assert audio.abs().max() <= 1
    assert (video.int() - data.to_uint8(out["video"]).int()).abs().max() <= 1
    assert (audio - out["audio"].clamp(-1, 1)).abs().max() < 1e-4


# ---- The network


def test_text_time_and_task_matter_and_the_fresh_output_is_zero():
    model = net_of()
    x = torch.randn(2, *model.shape)
    t = torch.tensor([100, 700])
    text = ud.read(words_of(model.cfg, "a red ball", "a red ball"), model.cfg)
    out = model(x, t, T2AV, *text)
    assert (model(x, t.flip(0), T2AV, *text) - out).abs().max() > 1e-4
    assert (model(x, t, V2A, *text) - out).abs().max() > 1e-4
    other = ud.read(words_of(model.cfg, "a red ball", "a blue ball"), model.cfg)
    changed = model(x, t, T2AV, *other)
    assert torch.equal(changed[0], out[0])
    assert not torch.equal(changed[1], out[1])
    assert ud.UniForm(model.cfg)(x, t, T2AV, *text).abs().max() == 0


def test_every_place_reaches_every_other():
    model = net_of()
    text = ud.read(words_of(model.cfg, ""), model.cfg)
    x = torch.randn(1, *model.shape)
    t = torch.tensor([300])
    out = model(x, t, T2AV, *text)
    for frame, column in ((0, 0), (1, 7)):
        y = x.clone()
        y[:, :, frame, 0, column] += 1
        moved = (model(y, t, T2AV, *text) - out).abs().amax((0, 1))  # (T, h, k + w)
        assert (moved > 0).all()


def test_the_time_scale_is_that_of_1000_steps():
    """What the network is told of a level does not depend on how many steps there are."""
    few = net_of("--diffusion_steps", "100")
    many = net_of("--diffusion_steps", "1000")
    text = ud.read(words_of(few.cfg, "a"), few.cfg)
    x = torch.randn(1, *few.shape)
    one = few(x, torch.tensor([40]), T2AV, *text)
    assert torch.equal(one, many(x, torch.tensor([400]), T2AV, *text))


def test_rotary_places_are_an_option():
    x = torch.randn(1, 4, 2, 4, 8)
    models = [net_of("--rope", flag) for flag in ("true", "false")]
    assert same(models[0].state_dict(), models[1].state_dict())
    text = ud.read(words_of(models[0].cfg, "a"), models[0].cfg)
    one, two = (model(x, torch.tensor([300]), T2AV, *text) for model in models)
    assert (one - two).abs().max() > 1e-4


def test_checkpointing_changes_nothing(monkeypatch):
    calls = []
    right = ud.checkpoint

    def noted(*args, **kwargs):
        calls.append(args)
        return right(*args, **kwargs)

    monkeypatch.setattr(ud, "checkpoint", noted)
    results = []
    for flag in ("false", "true"):
        model = net_of("--checkpoint", flag)
        loss, _ = ud.build_process(model).loss(model, latents(model))
        loss.backward()
        results.append([loss, *(p.grad for p in model.parameters() if p.requires_grad)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert len(calls) == 2 * model.cfg.depth


def test_what_muon_does_not_touch():
    model = net_of("--optimizer", "muon")
    [group] = ud.build_optimizers(model, model.cfg)["muon"].param_groups
    names = {p: name for name, p in model.named_parameters()}
    hidden = [names[p] for p in group["params"]]
    assert "dit.spatial_blocks.0.attn.qkv.weight" in hidden
    assert "dit.temporal_blocks.0.mlp.fc2.weight" in hidden
    for name in hidden:
        assert name.startswith(("dit.spatial_blocks", "dit.temporal_blocks", "dit.t_block")), name


# ---- Masks of the losses


PROCESSES = {"paper": NOISE, "velocity": ()}


@pytest.mark.parametrize("options", PROCESSES.values(), ids=PROCESSES)
@pytest.mark.parametrize("task", ud.TASKS)
def test_the_loss_looks_at_the_columns_that_are_made(options, task):
    """Of the network's output, the task's columns among it; and of the noise to be found."""
    model = net_of(*options)
    process = ud.build_process(model)
    batch = latents(model, step=step_of(model, task))
    tokens = model.task_shape[3]
    made = [False] * tokens + model.made(task).tolist()
    loss, _ = process.loss(model, batch)
    for column, counts in enumerate(made):

        def change(dit, args, out, column=column):
            out = out.clone()
            out[..., column] += 0.3
            return out

        hook = model.dit.register_forward_hook(change)
        changed, _ = process.loss(model, batch)
        hook.remove()
        assert (changed != loss) == counts, column

    # The target, for a network that does not see it.
    spy = Spy(model)
    t, eps = process.draw(batch["key"], "cpu")
    loss, _ = process.loss(spy, batch)
    for column, counts in enumerate(made[tokens:]):
        other = eps.clone()
        other[..., column] += 0.3
        process.draw = lambda *_, other=other: (t, other)
        assert (process.loss(spy, batch)[0] != loss) == counts, column
    # The latents of what is given: only a network sees them.
    process.draw = lambda *_: (t, eps)
    for name, own in (("z_v", task != V2A), ("z_a", task != A2V)):
        changed, _ = process.loss(spy, {**batch, name: batch[name] + 0.3})
        # The paper's target is the noise; that of a velocity is of x_0, too.
        assert (changed != loss) == (own and type(process) is ud.Velocity), name


@pytest.mark.parametrize("mode", ["clean", "same_t"])
@pytest.mark.parametrize("task", ud.TASKS)
def test_what_is_given_enters_clean_or_noised_alike(mode, task):
    model = net_of("--cond_noise", mode)
    process = ud.build_process(model)
    spy = Spy(model)
    batch = latents(model, step=step_of(model, task))
    process.loss(spy, batch)
    [(x, t, name, _)] = spy.seen
    assert name == task
    x0 = model.film(batch, 2)
    _, eps = process.draw(batch["key"], "cpu")
    abar = process.abar[t].view(2, 1, 1, 1, 1)
    noised = (abar.sqrt() * x0 + (1 - abar).sqrt() * eps).float()
    made = model.made(task)
    assert (x - noised)[..., made].abs().max() < 1e-6
    kept = x0 if mode == "clean" else noised
    assert (x - kept)[..., ~made].abs().sum() < 1e-4


def test_loss_of_both_is_the_sum_of_the_two():
    """L_av = L_a + L_v, eq. 3, each a mean over its own columns."""
    model = net_of("--predict", "noise", "--audio_weight", "3")
    process = ud.build_process(model)
    out = torch.randn(2, *model.shape)
    spy = Spy(model, lambda *_: out)
    found = {}
    for task in ud.TASKS:
        batch = latents(model, step=step_of(model, task))
        found[task], parts = process.loss(spy, batch)
        _, eps = process.draw(batch["key"], "cpu")
        square = (eps - out).square()
        video = model.video(square).mean().item()
        audio = model.audio(square).mean().item()
        want = {T2AV: (1, 1), A2V: (1, 0), V2A: (0, 1)}[task]
        wanted = want[0] * video + 3 * want[1] * audio
        assert found[task].item() == pytest.approx(wanted, rel=1e-5)
        # Reported without that weight, for 3/2 where it is made in two of three steps.
        assert parts["video"].item() == pytest.approx(1.5 * want[0] * video, rel=1e-5)
        assert parts["audio"].item() == pytest.approx(1.5 * want[1] * audio, rel=1e-5)
    assert found[T2AV].item() == pytest.approx((found[A2V] + found[V2A]).item(), rel=1e-5)


@pytest.mark.parametrize("options", PROCESSES.values(), ids=PROCESSES)
def test_training_and_validation_report_the_same_quantity(options):
    model = net_of(*options)
    process = ud.build_process(model)
    level = torch.tensor([0.2, 0.7])
    _, want = process.loss(model, latents(model), level)
    _, eps = process.draw(latents(model)["key"], "cpu")
    process.draw = lambda *_: ((level * 1000).long(), eps)  # the same steps, in training
    got = [process.loss(model, latents(model, step=step_of(model, task)))[1] for task in ud.TASKS]
    for name in ("video", "audio"):
        mean = sum(parts[name] for parts in got) / 3
        assert mean.item() == pytest.approx(want[name].item(), rel=1e-5)
        assert not mean.requires_grad


def test_the_tasks_of_the_steps(monkeypatch):
    """One for an iteration, whoever asks: it follows from seed and step."""

    def tasks(seed, clips=2):
        model = net_of("--seed", str(seed))
        spy = Spy(model)
        for step in range(300):
            ud.build_process(model).loss(spy, latents(model, clips, step=step))
        return [task for _, _, task, _ in spy.seen]

    first = tasks(0)
    assert len(first) == 300
    for task in ud.TASKS:
        assert 70 < first.count(task) < 130
    monkeypatch.setattr(ud, "RANK", 1)
    torch.manual_seed(5)
    assert tasks(0, clips=1) == first
    assert tasks(1) != first
    model = net_of()
    spy = Spy(model)
    ud.build_process(model).loss(spy, latents(model), torch.tensor([0.5, 0.5]))
    assert [task for _, _, task, _ in spy.seen] == list(ud.TASKS)


def test_noise_of_a_clip_is_its_own_and_steps_are_uniform():
    process = ud.Diffusion(net_of("--diffusion_steps", "50"))
    t, eps = process.draw(torch.tensor([7, 8, 9]), "cpu")
    when, alone = process.draw(torch.tensor([8]), "cpu")
    assert torch.equal(eps[1:2], alone)
    assert torch.equal(t[1:2], when)
    steps = process.draw_steps((torch.arange(500) + 0.5) / 500)
    assert steps.bincount().tolist() == [10] * 50


# ---- Diffusion


def test_posterior_is_that_of_bayes():
    """q(x_(t-1) | x_t, x_0) from q(x_t | x_(t-1)) q(x_(t-1) | x_0), any chain of levels."""
    betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    for chain in (slice(None), slice(0, None, 37)):
        abar = (1 - betas).cumprod(0)[chain]
        table = ud.posterior(abar)
        assert table.dtype == torch.float64
        before = abar[:-1]
        beta = 1 - abar[1:] / before
        variance = 1 / ((1 - beta) / beta + 1 / (1 - before))
        x0_share = variance * before.sqrt() / (1 - before)
        xi_share = variance * (1 - beta).sqrt() / beta
        want = torch.stack([x0_share, xi_share, variance.log(), beta.log()], 1)
        assert (table[1:] - want).abs().max() < 1e-9
        # The first step ends at x_0; its variance is the next one's, which has a logarithm.
        first = [1, 0, variance[0].log(), (1 - abar[0]).log()]
        assert (table[0] - torch.tensor(first, dtype=torch.float64)).abs().max() < 1e-9
        assert (table[:, 2] < table[:, 3]).all()


def test_the_schedule_is_that_of_ddpm():
    process = ud.Diffusion(net_of())
    betas = np.linspace(1e-4, 0.02, 1000)
    abar = torch.from_numpy(np.cumprod(1 - betas))
    assert (process.abar - abar).abs().max() < 1e-12
    assert (process.alpha**2 + process.sigma**2 - 1).abs().max() < 1e-6
    assert process.times(1000).tolist() == list(range(1000))
    times = process.times(30).tolist()
    assert times[0] == 0
    assert times[-1] == 999
    assert len(set(times)) == 30
    assert process.times(1).tolist() == [999]  # the level that sampling starts from


def test_a_velocity_is_sampled_at_levels_a_stride_noisier():
    process = ud.Velocity(net_of())
    assert process.times(4).tolist() == [249, 499, 749, 999]
    assert process.times(1).tolist() == [999]
    assert process.times(1000).tolist() == list(range(1000))
    times = process.times(30).tolist()
    assert len(set(times)) == 30
    assert (times[0], times[-1]) == (32, 999)  # T / 30 - 1, T - 1


@pytest.mark.parametrize("mean,deviation", [(1.2, 1.5), (-0.5, 0.7)])
def test_a_velocity_is_trained_at_lognormal_levels(mean, deviation):
    """log(sigma / alpha) of the steps drawn is normal, but for the ends of the schedule."""
    process = ud.Velocity(net_of("--noise_levels", f"{mean},{deviation}"))
    t = process.draw_steps((torch.arange(20000) + 0.5) / 20000)
    ratio = (process.sigma / process.alpha)[t]
    assert ratio.median().item() == pytest.approx(math.exp(mean), rel=0.02)
    normal = torch.distributions.Normal(mean, deviation)
    for share in (0.16, 0.3, 0.7, 0.84):
        log_level = normal.icdf(torch.tensor(share)).item()
        assert ratio.log().quantile(share).item() == pytest.approx(log_level, abs=0.02)
    # Whatever is drawn is a step of the schedule.
    ends = process.draw_steps(torch.tensor([0, 1 - 2**-24]))
    assert ends[0] == 0
    assert ends[1] <= 999
    few, _ = process.draw(torch.arange(300), "cpu")
    spread = (process.sigma / process.alpha)[few].median().log().item()
    assert abs(spread - mean) < 4 * 1.25 * deviation / 300**0.5


def noised_by_training(process, batch, steps):
    """{t: x_t} of the batch as the training code makes it, and its noise."""
    spy = Spy(process.model)
    found = {}
    for t in steps:
        level = torch.full((len(batch["key"]),), (t + 0.5) / process.T)
        process.loss(spy, batch, level)
        found[t] = spy.seen[-3][0]  # T2AV: nothing is given
    _, eps = process.draw(batch["key"], "cpu")
    return found, eps


def exact(process, x0):
    """A network that knows x_0 -> what it says of the noise, in the terms of the process."""
    abar = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)
    velocity = process.cfg.predict == "velocity"

    def answer(x, t, task, words):
        a = abar[t].view(-1, 1, 1, 1, 1)
        eps = (x - a.sqrt() * x0) / (1 - a).sqrt()
        out = a.sqrt() * eps - (1 - a).sqrt() * x0 if velocity else eps
        out = out.float()
        return torch.cat([out, torch.full_like(out, -1)], 1) if process.cfg.learn_sigma else out

    return answer


SAMPLERS = {
    "ddim": (*NOISE, "--sampler", "ddim"),
    "ddpm": NOISE,
    "ddim-velocity": ("--sampler", "ddim"),
    "ddpm-velocity": ("--sampler", "ddpm"),
}


@pytest.mark.parametrize("options", SAMPLERS.values(), ids=SAMPLERS)
@torch.no_grad()
def test_training_and_sampling_share_the_schedule(options):
    """With the true target in place of the network, each step of sampling goes where training
    would be; DDPM's to the mean of the posterior plus noise of its variance, the last to x_0."""
    model = net_of(*options)
    process = ud.build_process(model)
    batch = latents(model)
    x0 = model.film(batch, 2)
    times = process.times(6).tolist()
    trained, eps = noised_by_training(process, batch, times)
    spy = asked(model, exact(process, x0))
    drawn = []

    def noise():
        drawn.append(torch.randn_like(x0) if drawn else trained[999])
        return drawn[-1]

    torch.manual_seed(0)
    out = process.sample(noise, T2AV, x0, batch["words"], batch["words"][0], 1, 6)
    assert (out - x0).abs().max() < 1e-4
    visited = {int(t[0]): x for x, t, _, _ in spy.seen}
    assert sorted(visited) == times
    assert (visited[999] - trained[999]).abs().max() < 1e-6
    abar = process.abar
    for i in range(5, 0, -1):
        now = abar[times[i]]
        before = abar[times[i - 1]]
        if model.cfg.sampler == "ddim":
            want = trained[times[i - 1]]
        else:
            beta = 1 - now / before
            x0_share = beta * before.sqrt() / (1 - now)
            xi_share = (1 - before) * (1 - beta).sqrt() / (1 - now)
            deviation = (beta * (1 - before) / (1 - now)).sqrt()
            want = x0_share * x0 + xi_share * visited[times[i]] + deviation * drawn[6 - i]
        assert (visited[times[i - 1]] - want).abs().max() < 1e-4, i
    # In distribution, too: the posterior of the exact x_0 has the level of training.
    assert len(drawn) == (1 if model.cfg.sampler == "ddim" else 6)


def wave(x, t, task, words):
    """Any network: it is fixed, and not linear."""
    return torch.sin(2 * x + 0.01 * t.view(-1, 1, 1, 1, 1)) + 0.3 * x.mean((3, 4), keepdim=True)


@torch.no_grad()
def test_respaced_ddpm_of_all_steps_is_ddpm():
    """Algorithm 2 of Ho et al., with the posterior's variance."""
    options = ("--predict", "noise", "--sampler", "ddpm", "--diffusion_steps", "50")
    model = net_of(*options)
    process = ud.build_process(model)
    asked(model, wave)
    draws = torch.randn(50, 2, *model.shape, generator=torch.Generator().manual_seed(0))
    feed = iter(draws)
    words = words_of(model.cfg, "a", "a")
    given = torch.zeros(2, *model.shape)
    out = process.sample(lambda: next(feed), T2AV, given, words, words[0], 1, 50)

    beta = np.linspace(1e-4, 0.02, 50) * 20
    abar = np.cumprod(1 - beta)
    x = draws[0].double()
    for t in reversed(range(50)):
        eps = wave(x.float(), torch.tensor([t, t]), T2AV, None).double()
        x = (x - beta[t] / (1 - abar[t]) ** 0.5 * eps) / (1 - beta[t]) ** 0.5
        if t:
            variance = beta[t] * (1 - abar[t - 1]) / (1 - abar[t])
            x = x + variance**0.5 * draws[50 - t]
    assert (out - x).abs().max() < 1e-3 * x.abs().max()


@pytest.mark.parametrize("end", [-1, 1])
@torch.no_grad()
def test_the_learned_variance_lies_between_the_two(end):
    """-1 of the network is the posterior's, 1 is beta: of the respaced chain."""
    model = net_of(*NOISE)
    process = ud.build_process(model)

    def answer(x, t, task, words):
        return torch.cat([torch.zeros_like(x), torch.full_like(x, end)], 1)

    spy = asked(model, answer)
    ones = torch.ones(1, *model.shape)
    process.sample(
        lambda: ones, T2AV, ones, words_of(model.cfg, "a"), words_of(model.cfg, "")[0], 1, 3
    )
    abar = process.abar[process.times(3)]
    beta = 1 - abar[1:] / abar[:-1]
    variance = beta if end == 1 else beta * (1 - abar[:-1]) / (1 - abar[1:])
    for i in (2, 1):
        x, after = (spy.seen[2 - i + k][0] for k in (0, 1))
        mean = abar[i - 1].sqrt() * beta[i - 1] / (1 - abar[i]) * x / abar[i].sqrt()
        mean += (1 - abar[i - 1]) * (1 - beta[i - 1]).sqrt() / (1 - abar[i]) * x
        assert (after - mean).flatten()[0].item() == pytest.approx(
            variance[i - 1].sqrt().item(), rel=1e-2
        )


def test_the_bound_is_a_divergence_of_gaussians():
    """In bits; at t = 0 the likelihood of x_0."""
    model = net_of(*NOISE)
    process = ud.build_process(model)
    torch.manual_seed(0)
    t = torch.tensor([0, 1, 2, 400, 999])
    x0 = torch.randn(5, *model.shape)
    eps = torch.randn(5, *model.shape)
    share = torch.rand(5, *model.shape)
    level = process.abar[t].view(5, 1, 1, 1, 1)
    x_t = (level.sqrt() * x0 + (1 - level).sqrt() * eps).float()
    guess = eps + 0.1 * torch.randn(5, *model.shape)
    got = process.bound(x0, x_t, t, guess, share)
    assert got.shape == x0.shape

    x_t = x_t.double()
    x0_theta = (x_t - (1 - level).sqrt() * guess) / level.sqrt()
    a, b, low, high = (c.view(5, 1, 1, 1, 1) for c in ud.posterior(process.abar)[t].unbind(1))
    deviation = (0.5 * (share * high + (1 - share) * low)).exp()
    ours = torch.distributions.Normal(a * x0_theta + b * x_t, deviation)
    true = torch.distributions.Normal(a * x0 + b * x_t, (0.5 * low).exp().expand_as(x0))
    want = torch.distributions.kl_divergence(true, ours) / math.log(2)
    want[0] = -ours.log_prob(x0)[0] / math.log(2)
    error = (got - want).abs() / (1 + want.abs())
    assert error.max() < 2e-3  # x_0 from x_999 loses digits in float32
    # The network and its variance are exact: nothing is left to learn.
    zero = process.bound(x0, x_t.float(), t, eps, torch.zeros_like(share))
    assert zero[1:].abs().max() < 1e-3


def test_the_bound_teaches_the_variance_alone():
    model = net_of(*NOISE)
    process = ud.build_process(model)
    for task in ud.TASKS:
        batch = latents(model, step=step_of(model, task))
        torch.manual_seed(0)
        out = torch.randn(2, 8, *model.shape[1:], requires_grad=True)
        process.loss(Spy(model, lambda *_, out=out: out), batch)[0].backward()
        _, eps = process.draw(batch["key"], "cpu")
        mean, share = out.grad.chunk(2, 1)
        error = (2 * (out[:, :4] - eps)).detach()
        for stream, own in ((model.video, task != V2A), (model.audio, task != A2V)):
            want = own * stream(error) / stream(error).numel()
            assert (stream(mean) - want).abs().max() < 1e-7
            assert (stream(share) != 0).all() if own else (stream(share) == 0).all()


def test_velocity_and_noise_say_the_same():
    model = net_of("--predict", "velocity")
    process = ud.build_process(model)
    assert type(process) is ud.Velocity
    assert type(ud.build_process(net_of("--predict", "noise"))) is ud.Diffusion
    torch.manual_seed(0)
    t = torch.tensor([0, 300, 990])
    x0, eps, off = torch.randn(3, 3, *model.shape)
    alpha, sigma = (x.view(3, 1, 1, 1, 1) for x in (process.alpha[t], process.sigma[t]))
    v = alpha * eps - sigma * x0
    x = alpha * x0 + sigma * eps
    assert (process.noise_estimate(v, x, t) - eps).abs().max() < 1e-5
    error = process.noise_estimate(v + off, x, t) - eps
    weighted = process.weight(t) * error.square()
    assert ((weighted - off.square()).abs() / off.square().clamp(min=0.01)).max() < 1e-2


# ---- Conditions and guidance


@pytest.mark.parametrize("mode", ["clean", "same_t"])
@pytest.mark.parametrize("task", ud.TASKS)
@torch.no_grad()
def test_sampling_inserts_what_is_given_at_every_step(mode, task):
    model = net_of("--cond_noise", mode, "--sampler", "ddim", "--predict", "noise")
    process = ud.build_process(model)
    spy = asked(model)
    given = torch.randn(2, *model.shape, generator=torch.Generator().manual_seed(0))
    ones = torch.ones(2, *model.shape)
    words = words_of(model.cfg, "a", "b")
    out = process.sample(lambda: ones, task, given, words, words[0], 1, 4)
    made = model.made(task)
    assert torch.equal(out[..., ~made], given[..., ~made])
    assert len(spy.seen) == 4
    for x, t, name, _ in spy.seen:
        assert name == task
        level = process.abar[t].view(2, 1, 1, 1, 1)
        noised = (level.sqrt() * given + (1 - level).sqrt()).float()
        want = given if mode == "clean" else noised
        assert (x - want)[..., ~made].abs().sum() < 1e-4
    # What columns of the given film are to be made is not looked at.
    other = torch.where(made, given + 5, given)
    again = process.sample(lambda: ones, task, other, words, words[0], 1, 4)
    assert torch.equal(again, out)


@torch.no_grad()
def test_guidance_leads_from_the_negative_prompt():
    """eps = eps_n + w (eps_c - eps_n); the variance is the prompt's."""
    model = net_of(*NOISE)
    process = ud.build_process(model)
    prompt, negative = words_of(model.cfg, "a", "b")
    asks = []

    def answer(x, t, task, words):
        led = (words == prompt).flatten(1).all(1)
        asks.append(led.tolist())
        eps = torch.where(led, 0.3, 0.1)
        share = torch.where(led, -1.0, 1.0)
        both = torch.stack([eps, share], 1).repeat_interleave(4, 1)  # (B, 2 C)
        return both[..., None, None, None].expand(-1, -1, *x.shape[2:])

    asked(model, answer)
    ones = torch.ones(2, *model.shape)
    got = {}
    for w in (1, 3.0):
        words = prompt.expand(2, *prompt.shape)
        got[w] = process.sample(lambda: ones, T2AV, ones, words, negative, w, 2)
    assert asks == [[True, True]] * 2 + [[True, True, False, False]] * 2
    for w, out in got.items():
        eps = 0.3 if w == 1 else 0.1 + 3 * (0.3 - 0.1)
        late, early = process.abar[999], process.abar[0]
        beta = 1 - late / early
        x0 = (1 - (1 - late).sqrt() * eps) / late.sqrt()
        x = early.sqrt() * beta / (1 - late) * x0 + (1 - early) * (1 - beta).sqrt() / (1 - late)
        x = x + (beta * (1 - early) / (1 - late)).sqrt()
        want = (x - (1 - early).sqrt() * eps) / early.sqrt()
        assert (out - want).abs().max() < 1e-3 * want.abs()


# ---- Text


class FakeClips(torch.utils.data.Dataset):
    """Clips that have captions alone."""

    labels = ["rain", "bounce"]

    def __getitem__(self, i):
        return {"caption": "a small red ball", "label": i % 2}


@pytest.mark.parametrize("drop", [0.0, 0.5, 1.0])
def test_the_share_of_captions_that_are_dropped(drop):
    cfg = tiny("--text_drop", str(drop))
    clips = ud.Captioned(FakeClips(), cfg, varied=True)
    none = ud.spell("", cfg)
    dropped = [np.array_equal(clips[i]["words"], none) for i in range(2000)]
    assert abs(sum(dropped) / 2000 - drop) < (0.04 if drop == 0.5 else 1e-9)
    # In validation all are there, but for a model without text.
    words = ud.Captioned(FakeClips(), cfg)[0]["words"]
    assert np.array_equal(words, ud.spell("a small red ball" if drop < 1 else "", cfg))


def test_the_presets_drop_half_of_the_captions_but_toy():
    drops = {preset: ud.parse(["--preset", preset]).text_drop for preset in ud.PRESETS}
    assert drops == {"toy": 0.2, "small": 0.5, "paper": 0.5}


def test_the_empty_caption_is_the_null_embedding():
    model = net_of()
    cfg = model.cfg
    x = torch.randn(3, *model.shape)
    t = torch.tensor([100, 500, 900])
    text = ud.read(words_of(cfg, "", "a ball", "..."), cfg)
    out = model(x, t, T2AV, *text)
    # What the text encoder says of it does not count,
    with torch.no_grad():
        for p in model.text.parameters():
            p.add_(1)
            p.mul_(torch.rand_like(p))
    moved = (model(x, t, T2AV, *text) - out).abs().amax((1, 2, 3, 4))
    assert moved[0] == moved[2] == 0
    assert moved[1] > 0
    # but Open-Sora's null embedding, of which all words are read.
    seen = {}
    hook = model.dit.register_forward_pre_hook(lambda dit, args: seen.update(args=args))
    model(x, t, T2AV, *text)
    hook.remove()
    _, _, words, mask = seen["args"]
    assert torch.equal(words[0], model.dit.y_embedder.y_embedding)
    assert mask.tolist() == [[True] * 8, [True] * 3 + [False] * 5, [True] * 8]
    model.dit.y_embedder.y_embedding += 1
    moved = (model(x, t, T2AV, *text) - out).abs().amax((1, 2, 3, 4))
    assert moved[0] > 0


def test_a_t5_reads_captions(trained, tmp_path, monkeypatch):
    """In the place of the encoder that is learned here."""
    make_t5(tmp_path)
    monkeypatch.setitem(sys.modules, "transformers", fake_transformers(16))
    ud.t5.cache_clear()
    out = tmp_path / "run"
    shutil.copytree(trained / "vae", out / "vae")
    args = ["--t5", str(tmp_path), "--out", str(out), "--stage", "dit", "--steps", "1"]
    ud.main([*TINY, *args])
    model = ud.load(out / "ckpt.pt")
    assert not list(model.text.parameters())
    assert ud.sample(model, 2, prompt=["red", "blue"])[0].shape == (2, 4, 8, 8, 3)
    # No caption is the null embedding here, too; others are what the T5 says.
    words = words_of(model.cfg, "red", "")
    seen = {}
    model.dit.register_forward_pre_hook(lambda dit, args: seen.update(args=args))
    text = ud.read(words, model.cfg)
    model(torch.zeros(2, *model.shape), torch.zeros(2), T2AV, *text)
    assert torch.equal(seen["args"][2][0], text[0][0])
    assert torch.equal(seen["args"][2][1], model.dit.y_embedder.y_embedding)
    assert seen["args"][3].sum(1).tolist() == [4, 8]
    ud.t5.cache_clear()


def test_a_t5_reads_whole_captions_or_none(tmp_path, monkeypatch):
    """It knows the language; the encoder that is learned here is taught by variants."""
    make_t5(tmp_path)
    monkeypatch.setitem(sys.modules, "transformers", fake_transformers(16))
    ud.t5.cache_clear()
    said = {}
    for options in ([], ["--t5", str(tmp_path)]):
        cfg = tiny(*options, "--text_drop", "0.3", "--text_tokens", "24")
        clips = ud.Captioned(FakeClips(), cfg, varied=True)
        said[cfg.t5] = [clips[i]["words"].tobytes() for i in range(500)]
        none, whole = (ud.spell(text, cfg).tobytes() for text in ("", "a small red ball"))
        assert 0.2 < said[cfg.t5].count(none) / 500 < 0.4
        assert whole in said[cfg.t5]
    assert len(set(said[""])) > 4
    assert set(said[str(tmp_path)]) == {none, whole}
    ud.t5.cache_clear()


# ---- The two stages


@pytest.fixture(autouse=True)
def handlers():
    """A run that was stopped in this process leaves its signal handlers behind."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    out = tmp_path_factory.mktemp("run")
    ud.main([*TINY, "--out", str(out)])
    return out


def refused(*args):
    """What the command says when it ends with a mistake."""
    with pytest.raises(SystemExit) as stop:
        ud.main([*TINY, *args])
    assert "\n" not in stop.value.code
    return stop.value.code


def test_a_run_writes_both_stages_and_the_second_time_trains_nothing(trained):
    files = {p.relative_to(trained).as_posix() for p in trained.rglob("*") if p.is_file()}
    assert {"vae/ckpt.pt", "vae/log.csv", "ckpt.pt", "log.csv"} <= files
    for name in ("samples/", "vae/samples/", "latents/train", "latents/val"):
        assert any(f.startswith(name) for f in files), name
    # The generator's checkpoint holds the codec it was trained with: averaged weights.
    first = weights(trained / "vae", "ema")
    last = weights(trained)
    for name, p in first.items():
        measured = name.endswith((".mean", ".scale"))
        assert torch.equal(last[f"codec.{name}"], p) or measured, name
    # Sound and picture are logged apart. Validation is before the first step and after the last.
    log = rows(trained)
    assert [int(row["step"]) for row in log] == [0, 0, 1, 2, 3, 4]
    for i, row in enumerate(log):
        prefix = "val_" if i in (0, 5) else ""
        figures = [float(row[f"{prefix}{name}"]) for name in ("loss", "video", "audio")]
        assert figures[1] + figures[2] == pytest.approx(figures[0], rel=1e-4)

    before = {stage: weights(trained / stage) for stage in ("vae", ".")}
    log = (trained / "log.csv").read_text()
    kept = [trained / f for f in files if f.startswith("latents")]
    times = [path.stat().st_mtime_ns for path in kept]
    ud.main([*TINY, "--out", str(trained)])
    for stage, old in before.items():
        assert same(old, weights(trained / stage))
    assert (trained / "log.csv").read_text() == log
    assert times == [path.stat().st_mtime_ns for path in kept]


def test_latents_have_unit_variance(trained):
    model = ud.load(trained / "ckpt.pt")
    cfg = model.cfg
    clips = data.open_dataset("toy", "train", cfg.frames, cfg.size, cfg.fps, cfg.rate, cfg.seed)
    z = model.encode(data.to_device(data.make_batch(clips, 0, range(256)), "cpu"))
    for x in z.values():
        assert x.transpose(0, 1).flatten(1).mean(1).abs().max() < 1e-3
        assert x.square().mean().item() == pytest.approx(1, abs=1e-3)


def test_stages_told_to_stop_go_on_to_the_bit(trained, tmp_path, monkeypatch):
    """SIGTERM in the second step of each stage, and once between the stages."""
    split = data.split
    stopped = []

    def interrupted(batch, parts):
        kind = "dit" if "words" in batch else "vae"
        if batch["step"] == 1 and kind not in stopped:
            stopped.append(kind)
            signal.raise_signal(signal.SIGTERM)
        return split(batch, parts)

    monkeypatch.setattr(data, "split", interrupted)
    args = [*TINY, "--out", str(tmp_path)]
    for stage in ("vae", "all"):
        with pytest.raises(SystemExit) as stop:
            ud.main([*args, "--stage", stage])
        assert stop.value.code == 0
        if stage == "vae":
            ud.main([*args, "--stage", stage])
    assert stopped == ["vae", "dit"]
    state = torch.load(tmp_path / "ckpt.pt", weights_only=True)
    assert state["step"] == 2
    assert not same(weights(trained), weights(tmp_path))
    ud.main([*args, "--stage", "dit"])
    for stage in ("vae", "."):
        for which in ("model", "ema"):
            assert same(weights(trained / stage, which), weights(tmp_path / stage, which)), stage


def test_latents_encoded_on_the_way_give_the_same_steps(trained, tmp_path):
    shutil.copytree(trained / "vae", tmp_path / "vae")
    args = [*TINY, "--out", str(tmp_path), "--stage", "dit"]
    ud.main([*args, "--cache_latents", "0", "--steps", "2"])
    first, second = (float(rows(folder)[1]["loss"]) for folder in (trained, tmp_path))
    assert first == pytest.approx(second, rel=1e-3)


VARIANTS = [
    " ".join(NOISE) + " --grad_accum 2 --cond_noise same_t",
    "--amp bf16 --checkpoint true --optimizer adamw --cache_latents 0 --rope false",
]


@pytest.mark.parametrize("options", VARIANTS)
def test_variants_train_and_sample(options, trained, tmp_path):
    shutil.copytree(trained / "vae", tmp_path / "vae")
    ud.main([*TINY, *options.split(), "--stage", "dit", "--out", str(tmp_path), "--steps", "2"])
    model = ud.load(tmp_path / "ckpt.pt")
    clip = raw(model.cfg, 1)
    for given in ({}, {"video": clip["video"]}, {"audio": clip["audio"]}):
        video, audio = ud.sample(model, 1, prompt="a ball", **given)
        assert video.shape == (1, 4, 8, 8, 3)
        assert audio.isfinite().all()


def test_parts_of_a_batch_give_the_weights_of_the_whole(trained, tmp_path):
    shutil.copytree(trained / "vae", tmp_path / "vae")
    ud.main([*TINY, "--stage", "dit", "--out", str(tmp_path), "--grad_accum", "2"])
    assert same(weights(trained), weights(tmp_path), 1e-4)


def test_two_processes_learn_what_one_learns(tmp_path):
    """Both stages: the start of the codec, the latents' files, tasks, noise are the same."""
    args = [*TINY, "--optimizer", "adamw", "--lr", "1e-3", "--vae_lr", "1e-3"]
    args += ["--cache_latents", "40"]
    ud.main([*args, "--out", str(tmp_path / "one")])
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    run = subprocess.run(
        [sys.executable, *torchrun, ud.__file__, *args, "--out", str(tmp_path / "two")],
        cwd=tmp_path,
        text=True,
        capture_output=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=240,
    )
    assert run.returncode == 0, run.stderr
    for stage in ("vae", "."):
        for which in ("model", "ema"):
            one = weights(tmp_path / "one" / stage, which)
            two = weights(tmp_path / "two" / stage, which)
            for name, p in one.items():
                assert (p - two[name]).abs().max() < 1e-5, name
        # Both take their share of validation.
        logs = [rows(tmp_path / folder / stage) for folder in ("one", "two")]
        for row, other in zip(*logs, strict=True):
            for name in set(row) - {"seconds"}:
                figures = [float(x[name] or 0) for x in (row, other)]
                assert figures[0] == pytest.approx(figures[1], rel=1e-3), name


def test_a_folder_keeps_to_its_run(trained, tmp_path):
    """Other options, or another codec under a generator: a sentence, nothing is touched."""
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    out = ["--out", str(tmp_path)]
    assert "with --depth 1, not 2" in refused(*out, "--stage", "dit", "--depth", "2")
    before = (tmp_path / "ckpt.pt").read_bytes()
    says = refused(*out, "--vae_steps", "4", "--steps", "5")
    assert "trained with another codec" in says
    assert (tmp_path / "ckpt.pt").read_bytes() == before


def test_a_codec_of_another_sound_is_refused(trained):
    """Its weights would fit; what they are fed would be something else."""
    cfg = tiny("--out", str(trained))
    others = {"fps": 5, "rate": 8000, "n_mels": 32, "hop": 100}
    others |= {"window": 100, "n_fft": 256, "floor": 0.01}
    for name, value in others.items():
        other = dataclasses.replace(cfg, **{name: value})
        with pytest.raises(data.UserError, match=f"with --{name} {getattr(cfg, name)}"):
            ud.load_small(ud.SmallCodec(other), other, None)


def test_a_checkpoint_of_something_else_is_in_the_way(trained, tmp_path):
    shutil.copytree(trained / "vae", tmp_path / "vae")
    torch.save({"weights": torch.zeros(2)}, tmp_path / "ckpt.pt")
    before = (tmp_path / "ckpt.pt").read_bytes()
    assert "ckpt.pt" in refused("--out", str(tmp_path), "--stage", "dit")
    assert (tmp_path / "ckpt.pt").read_bytes() == before


def test_stage_dit_needs_a_finished_codec(trained, tmp_path):
    out = ["--out", str(tmp_path), "--stage", "dit"]
    assert "no checkpoint" in refused(*out)
    (tmp_path / "vae").mkdir()
    state = torch.load(trained / "vae" / "ckpt.pt", weights_only=True)
    torch.save({**state, "step": 2}, tmp_path / "vae" / "ckpt.pt")
    assert "not trained to its end" in refused(*out)


def test_a_stage_may_start_from_other_weights(trained, tmp_path):
    """A checkpoint's average, bare weights, or those of STDiT3 as Open-Sora released them."""
    shutil.copytree(trained / "vae", tmp_path / "vae")
    args = [*TINY, "--out", str(tmp_path), "--stage", "dit", "--steps", "1"]
    args += ["--lr", "1e-12", "--init_from"]
    ud.main([*args, str(trained / "ckpt.pt")])
    want = weights(trained, "ema")
    assert same(weights(tmp_path), want, 1e-6)


def test_weights_of_open_sora_are_a_start(trained, tmp_path):
    """Under their names, with its frequencies, and without what is ours: task and letters."""
    shutil.copytree(trained / "vae", tmp_path / "vae")
    torch.manual_seed(3)
    released = {}
    for name, p in weights(trained).items():
        if name.startswith("dit."):
            released[name.removeprefix("dit.")] = torch.randn_like(p) * 0.1
    released["rope.freqs"] = 10000 ** (-torch.arange(0, 8, 2) / 8)
    torch.save(released, tmp_path / "stdit3.pt")
    args = [*TINY, "--out", str(tmp_path), "--stage", "dit", "--steps", "1", "--lr", "1e-12"]
    ud.main([*args, "--init_from", str(tmp_path / "stdit3.pt")])
    got = weights(tmp_path)
    for name, p in released.items():
        if name != "rope.freqs":
            assert (got[f"dit.{name}"] - p).abs().max() < 1e-6, name


# ---- Sampling


@pytest.fixture
def model(trained):
    """The trained model, whose text and time matter: 4 steps taught it nothing."""
    model = ud.load(trained / "ckpt.pt")
    with torch.no_grad():
        for p in model.dit.parameters():
            draw = torch.Generator().manual_seed(p.numel())
            p.add_(0.05 * torch.randn(p.shape, generator=draw))
    return model


@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
def test_samples_depend_on_seed_place_and_text_alone(model, sampler):
    model.cfg = dataclasses.replace(model.cfg, sampler=sampler)
    video, audio = ud.sample(model, 3, prompt="a red ball", seed=5)
    assert video.shape == (3, 4, 8, 8, 3)
    assert video.dtype == torch.uint8
    assert audio.shape == (3, 1600)
    assert audio.dtype == torch.float32
    assert audio.abs().max() <= 1
    again = ud.sample(model, 2, prompt="a red ball", seed=5, batch_size=1)
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
        other = ud.sample(model, 1, **{"seed": 5, **options})
        assert (other[1] - audio[:1]).abs().max() > 1e-6, options


def test_prompts_and_labels_are_one_value_or_a_list_of_n(model):
    one = ud.sample(model, 3, prompt="a ball")
    three = ud.sample(model, 3, prompt=["a ball"] * 3)
    assert torch.equal(one[0], three[0])
    labels = ud.sample(model, 1, label="rain")
    assert torch.equal(labels[1], ud.sample(model, 1, prompt="a video of rain")[1])
    mixed = ud.sample(model, 2, label=["rain", "bounce"])
    for i, label in enumerate(("rain", "bounce")):
        alone = ud.sample(model, 2, label=label)
        assert (mixed[1][i] - alone[1][i]).abs().max() < 1e-3
    for options in ({"prompt": ["a"]}, {"label": ["rain"] * 3}):
        with pytest.raises(data.UserError, match="2 clips need one prompt or label or 2"):
            ud.sample(model, 2, **options)
    with pytest.raises(data.UserError, match="one text for all"):
        ud.sample(model, 2, prompt="x", negative_prompt=["a", "b"])
    with pytest.raises(data.UserError, match="not both"):
        ud.sample(model, 1, prompt="x", label="y")


def test_there_are_no_more_steps_than_levels(model):
    model.cfg = dataclasses.replace(model.cfg, diffusion_steps=25)
    assert ud.sample(model, 1, steps=25)[1].isfinite().all()
    with pytest.raises(data.UserError, match="--steps must not exceed --diffusion_steps"):
        ud.sample(model, 1, steps=26)


def test_guidance_that_changes_nothing_costs_nothing(model):
    calls = []
    model.register_forward_pre_hook(lambda net, args: calls.append(len(args[0])))
    ud.sample(model, 2)
    ud.sample(model, 2, prompt="rain", negative_prompt="rain")
    ud.sample(model, 2, prompt="rain", guidance=1)
    assert calls == [2] * 6
    ud.sample(model, 2, prompt="rain")
    ud.sample(model, 2, prompt=["rain", ""])
    assert calls[6:] == [4] * 4


def test_a_given_stream_comes_back_and_shapes_the_other(model):
    clip = raw(model.cfg, 2, "val")
    tasks = []
    model.register_forward_pre_hook(lambda net, args: tasks.append(args[2]))
    video, audio = ud.sample(model, 2, video=clip["video"][0], seed=3)
    assert torch.equal(video[0], clip["video"][0])
    assert torch.equal(video[1], clip["video"][0])
    assert video.dtype == torch.uint8
    other = ud.sample(model, 2, video=clip["video"][1], seed=3)[1]
    assert (audio - other).abs().max() > 1e-6
    # One video for each clip.
    each = ud.sample(model, 2, video=clip["video"].numpy(), seed=3, batch_size=1)
    assert torch.equal(each[0], clip["video"])
    assert (each[1] - torch.stack([audio[0], other[1]])).abs().max() < 1e-3
    assert set(tasks) == {V2A}
    tasks.clear()
    video, audio = ud.sample(model, 1, audio=clip["audio"][0].numpy(), seed=3)
    assert torch.equal(audio[0], clip["audio"][0])
    assert video.shape == (1, 4, 8, 8, 3)
    assert set(tasks) == {A2V}
    tasks.clear()
    other, _ = ud.sample(model, 1, audio=0.5 * torch.randn(1600), seed=3)
    assert not torch.equal(other, video)
    ud.sample(model, 1)
    assert tasks[-1] == T2AV


def test_conditions_that_do_not_fit_are_refused(model):
    clip = raw(model.cfg, 2, "val")
    with pytest.raises(data.UserError, match="not both"):
        ud.sample(model, 1, video=clip["video"][0], audio=clip["audio"][0])
    wrong = [
        {"video": clip["video"]},  # two for three
        {"video": clip["video"][0, :3]},
        {"video": clip["video"][0, :, :4]},
        {"audio": clip["audio"][0, :1599]},
        {"audio": clip["audio"]},
        {"video": clip["video"][0, :1]},  # a still, a single sample: also too short
        {"audio": clip["audio"][0, :1]},
    ]
    for options in wrong:
        window = "4 x 8 x 8 x 3" if "video" in options else "1600"
        with pytest.raises(data.UserError, match=f"one window of {window} numbers, or 3 of them"):
            ud.sample(model, 3, **options)


def test_a_model_without_text_takes_none(model):
    model.cfg = dataclasses.replace(model.cfg, text_drop=1.0)
    for options in ({"prompt": "a ball"}, {"label": "rain"}, {"negative_prompt": "rain"}):
        with pytest.raises(data.UserError, match="without text"):
            ud.sample(model, 1, **options)
    clip = raw(model.cfg, 1)
    assert ud.sample(model, 1, video=clip["video"])[1].shape == (1, 1600)


def test_a_model_may_be_trained_without_text(trained, tmp_path):
    shutil.copytree(trained / "vae", tmp_path / "vae")
    args = [*TINY, "--out", str(tmp_path), "--stage", "dit", "--steps", "2", "--text_drop", "1"]
    ud.main(args)
    model = ud.load(tmp_path / "ckpt.pt")
    assert ud.sample(model, 1)[0].shape == (1, 4, 8, 8, 3)
    with pytest.raises(data.UserError, match="without text"):
        ud.sample(model, 1, prompt="a ball")


def test_sampling_uses_the_precision_of_training(model):
    first = ud.sample(model, 1, prompt="a ball")[1]
    model.cfg = dataclasses.replace(model.cfg, amp="bf16")
    second = ud.sample(model, 1, prompt="a ball")[1]
    assert second.isfinite().all()
    assert not torch.equal(first, second)


def test_sample_py_takes_a_prompt_and_a_video(trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    args = ["--model", "uniform_dit", "--ckpt", str(trained / "ckpt.pt"), "--n", "1"]
    args += ["--device", "cpu"]
    sample.main([*args, "--prompt", "a video of a red ball bouncing", "--guidance", "2"])
    out = tmp_path / "out" / "uniform_dit" / "samples_001"
    assert {"000.mp4", "000.wav", "000.png", "index.html"} <= {p.name for p in out.iterdir()}
    sample.main([*args, "--video", str(out / "000.mp4")])
    sample.main([*args, "--audio", str(out / "000.wav")])
    with pytest.raises(SystemExit, match="stage dit"):
        sample.main(["--model", "uniform_dit", "--ckpt", str(trained / "vae" / "ckpt.pt")])


# ---- Mistakes


MISTAKES = [
    ("--stage train", "--stage must be one of all, vae, dit"),
    ("--codec vqgan", "--codec must be one of"),
    ("--vae_optimizer sgd", "--vae_optimizer must be one of adamw, muon"),
    ("--predict x0", "--predict must be one of"),
    ("--cond_noise dirty", "--cond_noise must be one of"),
    ("--sampler heun", "--sampler must be one of"),
    ("--init_from x.pt", "starts one stage"),
    ("--init_from nowhere.pt --stage vae", "no checkpoint nowhere.pt"),
    ("--batch_size 6 --grad_accum 4 --vae_batch_size 6", "does not divide by 4"),
    ("--betas 0.9", "two numbers"),
    ("--video_patch 2,2", "--video_patch needs three"),
    ("--audio_patch 2", "--audio_patch needs two numbers"),
    ("--frames 5", "multiples of --video_patch"),
    ("--size 9", "multiples of --video_patch"),
    ("--hop 33", "--hop must divide the 1600 samples"),
    ("--audio_patch 3,4", "--audio_patch must divide 32 mel columns and 16 bands"),
    ("--n_mels 18", "--audio_patch must divide 32 mel columns and 18 bands"),
    ("--audio_channels 3", "A step of sound has 3 x 4 numbers, a column of video 4 x 4"),
    ("--audio_patch 32,4", "the 1 steps a multiple of 2 frames"),
    ("--width 18", "--width must divide by 4"),
    ("--heads 3", "--width must divide by 4 and 2 * --heads"),
    ("--codec pretrained", "AudioLDM's codec has --rate 16000, --n_mels 64, --hop 160"),
    ("--t5 nowhere", "not the folder of a T5"),
    ("--device gpu", "no --device gpu"),
    ("--steps 0", "--steps 0 is too small"),
    ("--diffusion_steps 20", "--diffusion_steps"),
    ("--sample_steps 2000", "--sample_steps"),
    ("--data toy:tennis", "bounce, collide"),
    ("--widht 3", "unrecognized"),
    ("--preset huge", "no --preset huge"),
]


@pytest.mark.parametrize("args,says", MISTAKES, ids=[args for args, _ in MISTAKES])
def test_wrong_options_end_in_one_sentence(args, says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert says in refused("--out", "out", *args.split())


def test_the_pretrained_codec_needs_files(tmp_path, monkeypatch):
    monkeypatch.setattr(ud, "PretrainedCodec", NoCodec)
    args = ["--out", str(tmp_path), "--codec", "pretrained"]
    args += "--frames 17 --fps 17 --size 256 --rate 16000 --hop 160 --n_mels 64".split()
    args += "--window 1024 --n_fft 1024 --floor 1e-5".split()
    for files in ([], ["--video_vae", "x"], ["--audio_vae", "x"]):
        says = refused(*args, *files)
        assert "needs --video_vae FILE" in says
        assert "--audio_vae FILE" in says
        assert "--codec small" in says
    says = refused(*args, "--video_vae", "nowhere.pt", "--audio_vae", "nowhere.pt")
    assert "nowhere.pt" in says
    assert not (tmp_path / "ckpt.pt").exists()
    # It is trained already.
    assert "--stage" in refused(*args, "--stage", "vae")
