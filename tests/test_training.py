"""The training loop of mm_diffusion.py: the log, going on to the bit, signals, processes."""
import contextlib
import csv
import os
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from test_mm_diffusion import TINY, apart, net_of, run, start, tiny, torchrun, weights

import data
import mm_diffusion as mm

SIX = ("--steps", "6")
TWELVE = [*TINY, "--steps", "12", "--workers", "2"]  # long enough to be interrupted
each_signal = pytest.mark.parametrize(
    "number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "Ctrl-C"]
)


@pytest.fixture(autouse=True)
def handlers():
    """A run that was stopped in this process leaves its signal handlers behind."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def fit(cfg, loss=None):
    """What main() does, without samples -> the network. loss: instead of the process's own."""
    torch.manual_seed(cfg.seed)
    model = mm.build(cfg)
    loss = loss or mm.build_process(cfg).loss
    mm.fit(model, loss, cfg, mm.open_clips(cfg, "train"), mm.open_clips(cfg, "val"))
    return model


def fit_until(steps, cfg):
    """fit(), which gets SIGTERM in the midst of the last of so many steps."""
    split = data.split

    def interrupted(batch, parts):
        if batch["step"] == steps - 1:
            signal.raise_signal(signal.SIGTERM)
        return split(batch, parts)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "split", interrupted)
        with pytest.raises(SystemExit) as stop:
            fit(cfg)
    assert stop.value.code == 0


def saved(folder):
    return torch.load(Path(folder) / "ckpt.pt", weights_only=True)


def equal(one, two):
    """To the bit: two of what state dicts hold."""
    if torch.is_tensor(one):
        return torch.equal(one, two)
    if isinstance(one, dict):
        return one.keys() == two.keys() and all(equal(one[k], two[k]) for k in one)
    if isinstance(one, list | tuple):
        return len(one) == len(two) and all(map(equal, one, two))
    return one == two


def rows(folder):
    return list(csv.DictReader(open(Path(folder) / "log.csv"), restval=""))


def losses(folder):
    """The rows of training: {step: loss, as it is written}."""
    return {int(row["step"]): row["loss"] for row in rows(folder) if row["loss"]}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Six steps of the tiny network, uninterrupted."""
    out = tmp_path_factory.mktemp("trained")
    mm.main([*TINY, *SIX, "--out", str(out)])
    return out


# ---- What a run leaves


def test_training_writes_a_log_samples_and_an_ema(trained):
    log = rows(trained)
    # Validation before the first step and after the last, and a row for each step between.
    assert [int(row["step"]) for row in log] == [0, 0, 1, 2, 3, 4, 5, 6]
    for i, row in enumerate(log):
        validation = i in (0, 7)
        assert (row["val_loss"] != "") == validation
        assert (row["loss"] == "") == validation
        prefix = "val_" if validation else ""
        figures = [float(row[f"{prefix}{name}"]) for name in ("loss", "video", "audio")]
        assert figures[0] > 0
        assert figures[1] + figures[2] == pytest.approx(figures[0], rel=1e-4)
        if validation:
            quarters = [float(row[f"val_q{k}"]) for k in (1, 2, 3, 4)]
            assert len(set(quarters)) == 4
            assert sum(quarters) / 4 == pytest.approx(figures[0], rel=1e-4)
        else:
            assert float(row["seconds"]) > 0
            assert float(row["grad_norm"]) > 0
            assert float(row["lr"]) == pytest.approx(mm.learning_rate(tiny(*SIX), i - 1))
    video, audio = data.load_clip(trained / "samples" / "step000006_0.mp4", 4, 16, 10, 4000)
    assert video.shape == (4, 16, 16, 3)
    assert audio.shape == (1600,)
    assert (trained / "samples" / "step000006_0.png").exists()
    state = saved(trained)
    assert state["step"] == 6
    assert state["cfg"]["amp"] == state["cfg"]["device"] == "auto"
    assert apart(state["model"], state["ema"]) > 0


def test_rows_are_means_since_the_row_before(trained, tmp_path):
    fit(tiny(*SIX, "--out", str(tmp_path), "--log_every", "3"))
    single = losses(trained)
    mean = sum(float(single[step]) for step in (1, 2, 3)) / 3
    assert list(losses(tmp_path)) == [0, 3]
    assert float(losses(tmp_path)[3]) == pytest.approx(mean, rel=1e-5)


def test_evaluation_changes_nothing(trained, tmp_path):
    out = str(tmp_path)
    fit(tiny(*SIX, "--out", out, "--eval_every", "2", "--val_clips", "3"))
    assert equal(saved(tmp_path)["model"], saved(trained)["model"])
    assert [int(r["step"]) for r in rows(tmp_path) if r["val_loss"]] == [0, 2, 4, 6]


def test_a_finished_run_makes_missing_samples_and_its_average_keeps_no_graph(trained, tmp_path):
    kept = []
    fit = mm.fit

    def spy(*args):
        kept.append(fit(*args))
        return kept[-1]

    shutil.copy(trained / "ckpt.pt", tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mm, "fit", spy)
        mm.main([*TINY, *SIX, "--out", str(tmp_path)])
        mm.main([*TINY, "--steps", "1", "--out", str(tmp_path / "new")])
    assert (tmp_path / "samples" / "step000006_0.mp4").exists()
    for p in kept[1].parameters():
        assert not p.requires_grad
        assert p.grad_fn is None


def test_the_loss_falls(tmp_path):
    fit(tiny("--steps", "20", "--out", str(tmp_path), "--val_clips", "8", "--lr", "1e-2"))
    val = [float(row["val_loss"]) for row in rows(tmp_path) if row["val_loss"]]
    assert val[-1] < 0.8 * val[0]


# ---- Optimizers


def test_muon_moves_matrices_orthogonally():
    torch.manual_seed(0)
    layer = torch.nn.Conv1d(8, 24, 3)
    before = layer.weight.clone()
    optimizer = mm.Muon([layer.weight], lr=0.01, weight_decay=0.0)
    layer(torch.randn(2, 8, 50)).square().mean().backward()
    gradient = layer.weight.grad.flatten(1)
    optimizer.step()
    moved = (before - layer.weight).detach().flatten(1)  # (24, 24)
    values = torch.linalg.svdvals(moved) / (0.01 * 0.2 * 24**0.5)
    assert 0.3 < values.min()
    assert values.max() < 1.4
    # The gradient's own values are far wider apart.
    values = torch.linalg.svdvals(gradient)
    assert values.max() / values.min() > 20
    assert (moved * gradient).sum() > 0  # downhill
    assert torch.allclose(optimizer.state[layer.weight]["momentum"], 0.05 * layer.weight.grad)
    # A matrix without a gradient stays, whatever the weight decay.
    optimizer.param_groups[0]["weight_decay"] = 1.0
    layer.weight.grad = None
    stays = layer.weight.clone()
    optimizer.step()
    assert torch.equal(stays, layer.weight)


@pytest.mark.parametrize("shape", [(8, 24), (24, 8), (16, 16)])
def test_newton_schulz_keeps_the_singular_vectors(shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    u, values, vh = torch.linalg.svd(x, full_matrices=False)
    got = u.T @ mm.orthogonal(x) @ vh.T
    assert (got - torch.diag(got.diag())).abs().max() < 1e-4
    assert 0.3 < got.diag().min()
    assert got.diag().max() < 1.4


@pytest.mark.parametrize("stage", ["base", "sr"])
def test_hidden_matrices(stage):
    """Muon's group: every matrix but those of the edges. All the rest is AdamW's."""
    cfg = tiny("--optimizer", "muon")
    if stage == "sr":
        cfg = mm.sr_config(cfg)
    net = mm.build(cfg)
    optimizers = mm.build_optimizers(net, cfg)
    names = {p: name for name, p in net.named_parameters()}
    groups = {}
    for kind, optimizer in optimizers.items():
        [group] = optimizer.param_groups
        groups[kind] = {names[p] for p in group["params"]}
    assert groups["muon"] | groups["adamw"] == set(names.values())
    assert not groups["muon"] & groups["adamw"]
    for p, name in names.items():
        edge = name.startswith(net.edges)
        assert (name in groups["muon"]) == (p.dim() > 1 and not edge), name
    for edge in net.edges:
        assert any(name.startswith(edge) for name in names.values()), edge
    # The layers at the pixels and samples are edges, by the shapes of what they take and give.
    for name in groups["muon"]:
        shape = dict(net.named_parameters())[name].shape
        assert min(shape[:2]) > 3, name
    assert list(mm.build_optimizers(net, tiny("--optimizer", "adamw"))) == ["adamw"]


def test_the_learning_rate_warms_up_and_falls():
    cfg = tiny("--lr", "1", "--lr_end", "0.2", "--warmup", "4", "--steps", "100")
    rates = [mm.learning_rate(cfg, step) for step in range(101)]
    assert rates[0] == pytest.approx(0.25)
    assert rates[3] == pytest.approx(1 - 0.8 * 0.03)
    assert rates[50] == pytest.approx(0.6)
    assert rates[100] == pytest.approx(0.2)


# ---- Going on


@pytest.mark.parametrize("options", [
    "",  # Muon, without dropout: the run of the fixture
    "--optimizer adamw --weight_decay 0.1 --clip 0.1",
    "--optimizer muon --dropout 0.1",
    "--optimizer adamw --dropout 0.1",
])
def test_three_steps_and_three_more_are_six_to_the_bit(options, trained, tmp_path):
    whole = trained
    if options:
        whole = tmp_path / "whole"
        fit(tiny(*options.split(), *SIX, "--out", str(whole)))
    parts = tmp_path / "parts"
    cfg = tiny(*options.split(), *SIX, "--out", str(parts))
    fit_until(3, cfg)
    assert saved(parts)["step"] == 3
    fit(cfg)
    one = saved(whole)
    two = saved(parts)
    assert set(one) - {"muon"} == {"model", "ema", "scaler", "adamw", "step", "cfg"}
    assert ("muon" in one) == (cfg.optimizer == "muon")
    for name in set(one) - {"cfg"}:
        assert equal(one[name], two[name]), name
    assert losses(whole) == losses(parts)
    assert len(rows(whole)) == len(rows(parts))


def test_going_on_without_a_log_writes_one_head(tmp_path):
    cfg = tiny(*SIX, "--out", str(tmp_path))
    fit_until(3, cfg)
    (tmp_path / "log.csv").unlink()
    fit(cfg)
    text = (tmp_path / "log.csv").read_text()
    assert text.count("step") == 1
    assert list(losses(tmp_path)) == [3, 4, 5]
    assert rows(tmp_path)[-1]["val_loss"] != ""


def test_steps_may_change_where_the_rate_is_constant(tmp_path):
    constant = ("--lr_end", "1", "--out")
    fit(tiny(*constant, str(tmp_path / "whole"), "--steps", "4"))
    fit(tiny(*constant, str(tmp_path / "parts"), "--steps", "2"))
    fit(tiny(*constant, str(tmp_path / "parts"), "--steps", "4"))
    assert equal(saved(tmp_path / "whole")["model"], saved(tmp_path / "parts")["model"])


def test_a_signal_at_the_very_end_ends_the_program_too(tmp_path):
    """While the last samples are made: all is saved, but nothing more is wanted."""
    cfg = tiny("--steps", "1", "--out", str(tmp_path))
    calls = []

    def sample_fn(model):
        calls.append(1)
        if len(calls) == 2:
            signal.raise_signal(signal.SIGTERM)
        return None, torch.zeros(1, 1600)

    clips = [mm.open_clips(cfg, split) for split in ("train", "val")]
    with pytest.raises(SystemExit) as stop:
        mm.fit(mm.build(cfg), mm.build_process(cfg).loss, cfg, *clips, sample_fn)
    assert stop.value.code == 0
    assert saved(tmp_path)["step"] == 1
    assert (tmp_path / "samples" / "step000001_0.wav").exists()


def test_processes_that_found_other_checkpoints_stop(tmp_path, monkeypatch):
    """Nodes without a shared disk would train apart."""

    def gather(all_done, done):
        all_done[:] = [done, 3]

    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
    with pytest.raises(data.UserError, match="on a disk that they share"):
        fit(tiny(*SIX, "--out", str(tmp_path / "out")))
    assert not (tmp_path / "out").exists()


# ---- Signals, sent to processes as users start them


def left_running(mark):
    """Process ids of this machine with NANOAV_TEST=mark in their environment."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):  # ended meanwhile, or not ours
            if f"NANOAV_TEST={mark}\0".encode() in path.read_bytes():
                found.append(int(path.parent.name))
    return found


def interrupt(args, cwd, number, to_group, launcher=None):
    """Start a run, signal it after three steps, wait for its end -> exit code, stdout, stderr.

    No process of it, detached workers included, is left when this returns.
    """
    mark = str(cwd)
    more = {"launcher": launcher} if launcher else {}
    process = start(*args, cwd=cwd, NANOAV_TEST=mark, **more)
    log = cwd / "run" / "log.csv"
    try:
        while not (log.exists() and len(log.read_text().splitlines()) > 3):
            assert process.poll() is None, process.communicate()
            time.sleep(0.01)
        if to_group:
            os.killpg(process.pid, number)
        else:
            process.send_signal(number)
        out, err = process.communicate(timeout=60)
        until = time.time() + 10
        while left_running(mark) and time.time() < until:
            time.sleep(0.1)
        assert not left_running(mark)
    finally:
        for pid in left_running(mark):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    return process.returncode, out, err


def check_stopped(folder, out):
    """Saved at one step, said once; the log ends with that step."""
    step = saved(folder)["step"]
    assert 2 <= step < 12
    assert out.count("Stopped after") == 1
    assert f"Stopped after {step} steps: the same command goes on from there." in out
    assert list(losses(folder)) == list(range(step))


@pytest.fixture(scope="module")
def twelve(tmp_path_factory):
    """Twelve steps by one process, uninterrupted."""
    out = tmp_path_factory.mktemp("twelve")
    fit(mm.parse([*TWELVE, "--out", str(out)]))
    return out


@pytest.mark.parametrize("to_group", [False, True], ids=["process", "group"])
@each_signal
def test_an_interrupted_run_goes_on_to_the_bit(number, to_group, twelve, tmp_path):
    code, out, err = interrupt([*TWELVE, "--out", "run"], tmp_path, number, to_group)
    assert code == 0, err
    assert "Traceback" not in err, err
    check_stopped(tmp_path / "run", out)
    fit(mm.parse([*TWELVE, "--out", str(tmp_path / "run")]))
    for name in ("model", "ema", "adamw", "muon", "step"):
        assert equal(saved(tmp_path / "run")[name], saved(twelve)[name]), name
    assert losses(tmp_path / "run") == losses(twelve)


IN_PARTS = [*TWELVE, "--grad_accum", "2", "--out", "run"]


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    """Twelve steps by two processes, in two parts each, uninterrupted."""
    folder = tmp_path_factory.mktemp("two")
    code, out, err = run(*IN_PARTS, cwd=folder, launcher=torchrun(2))
    assert code == 0, err[-3000:]
    assert out.count("parameters on cpu") == 1
    return folder / "run"


def check_the_same(one, two):
    """Results of different numbers of processes, or of parts of a batch."""
    assert apart(weights(one), weights(two)) < 1e-5
    assert apart(weights(one, "ema"), weights(two, "ema")) < 1e-5
    for row, other in zip(rows(one), rows(two), strict=True):
        for name in set(row) - {"seconds"}:
            figures = [float(x[name] or 0) for x in (row, other)]
            assert figures[0] == pytest.approx(figures[1], rel=1e-3), name


def test_two_processes_in_parts_give_the_weights_and_figures_of_one(two_processes, twelve):
    check_the_same(two_processes, twelve)


def test_torchrun_told_to_stop_goes_on_to_the_bit(two_processes, tmp_path):
    """Its group gets SIGTERM; it hands that on to the groups of its processes."""
    _, out, err = interrupt(IN_PARTS, tmp_path, signal.SIGTERM, True, torchrun(2))
    assert 'mm_diffusion.py", line' not in err, err
    check_stopped(tmp_path / "run", out)
    code, _, err = run(*IN_PARTS, cwd=tmp_path, launcher=torchrun(2))
    assert code == 0, err[-3000:]
    for name in ("model", "ema", "adamw", "muon", "step"):
        assert equal(saved(tmp_path / "run")[name], saved(two_processes)[name]), name
    assert losses(tmp_path / "run") == losses(two_processes)


def test_torchrun_interrupted_has_done_what_one_process_does(twelve, tmp_path):
    """Ctrl-C, without parts; the losses until then are those of one process."""
    args = [*TWELVE, "--out", "run"]
    _, out, err = interrupt(args, tmp_path, signal.SIGINT, True, torchrun(2))
    assert 'mm_diffusion.py", line' not in err, err
    check_stopped(tmp_path / "run", out)
    for step, loss in losses(tmp_path / "run").items():
        assert float(loss) == pytest.approx(float(losses(twelve)[step]), rel=1e-4)


# ---- Parts of a batch


def test_gradient_accumulation_gives_the_same_weights(trained, tmp_path):
    fit(tiny(*SIX, "--out", str(tmp_path), "--grad_accum", "4"))
    check_the_same(tmp_path, trained)


def test_a_batch_that_does_not_divide_is_refused(tmp_path, monkeypatch):
    cfg = tiny("--batch_size", "6", "--grad_accum", "4", "--out", str(tmp_path / "out"))
    with pytest.raises(data.UserError, match="batch size, 6, does not divide by 4"):
        fit(cfg)
    # As many processes as only torchrun knows: parse() does not look.
    monkeypatch.setattr(mm, "WORLD", 3)
    cfg = tiny("--batch_size", "12", "--grad_accum", "8", "--out", str(tmp_path / "out"))
    with pytest.raises(data.UserError, match="batch size, 12, does not divide by 24"):
        fit(cfg)
    assert not (tmp_path / "out").exists()


def test_validation_does_not_depend_on_how_clips_are_dealt():
    """To batches of any size, or to processes."""
    cfg = tiny()
    model = net_of(cfg)
    loss = mm.build_process(cfg).loss
    clips = mm.open_clips(cfg, "val")
    dealt = [data.val_batches(clips, 5, size) for size in (1, 2, 4)]
    dealt.append(data.val_batches(clips, 5, 4, 0, 2) + data.val_batches(clips, 5, 4, 1, 2))
    results = []
    for batches in dealt:
        no_autocast = contextlib.nullcontext()
        results.append(mm.validate(model, loss, batches, no_autocast, torch.device("cpu")))
    for result in results[1:]:
        assert result == pytest.approx(results[0], rel=1e-5, abs=1e-6)


# ---- Precision, and steps that go wrong


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_low_precision_trains_nearly_the_same(amp, trained, tmp_path):
    fit(tiny(*SIX, "--out", str(tmp_path), "--amp", amp))
    for step, loss in losses(tmp_path).items():
        assert float(loss) == pytest.approx(float(losses(trained)[step]), rel=0.03)
    state = saved(tmp_path)
    # GradScaler is for fp16 alone.
    assert state["scaler"].get("scale") == (65536.0 if amp == "fp16" else None)
    for p in state["model"].values():
        assert p.dtype == torch.float32


def spoiled(cfg, step, factor, snapshots):
    """The loss of cfg, times a factor in one step. snapshots: gets the weights before each step."""
    loss = mm.build_process(cfg).loss

    def loss_fn(model, batch, t=None):
        value, parts = loss(model, batch, t)
        if t is None:
            snapshots.append({k: p.clone() for k, p in model.state_dict().items()})
            if batch["step"] == step:
                value = value * factor
        return value, parts

    return loss_fn


def test_with_fp16_an_infinite_loss_skips_the_step_and_halves_the_scale(tmp_path):
    cfg = tiny(*SIX, "--out", str(tmp_path), "--amp", "fp16")
    before = []
    model = fit(cfg, spoiled(cfg, 2, float("inf"), before))
    assert apart(before[2], before[1]) > 0
    assert apart(before[3], before[2]) == 0
    assert apart(before[4], before[3]) > 0
    assert saved(tmp_path)["scaler"]["scale"] == 32768.0
    assert all(p.isfinite().all() for p in model.parameters())
    assert list(losses(tmp_path)) == list(range(6))


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_step_that_is_not_finite_is_skipped(optimizer, tmp_path):
    cfg = tiny("--steps", "4", "--out", str(tmp_path), "--optimizer", optimizer)
    before = []
    model = fit(cfg, spoiled(cfg, 2, float("nan"), before))
    assert apart(before[2], before[1]) > 0
    assert apart(before[3], before[2]) == 0
    assert all(p.isfinite().all() for p in model.parameters())
    for state in (saved(tmp_path)[name] for name in mm.build_optimizers(model, cfg)):
        for values in state["state"].values():
            assert all(x.isfinite().all() for x in values.values())
    # The row of that step repeats the means of the good ones.
    assert list(losses(tmp_path)) == [0, 1, 2, 3]
    assert losses(tmp_path)[2] == losses(tmp_path)[1]


def test_many_bad_steps_stop_the_run_in_one_sentence(tmp_path):
    cfg = tiny("--steps", "60", "--out", str(tmp_path), "--log_every", "100")
    torch.manual_seed(cfg.seed)
    first = mm.build(cfg).state_dict()
    seen = []

    def loss(model, batch, t=None):
        seen.append(batch["step"])
        parts = {"x": torch.zeros(())}
        return next(model.parameters()).sum() * float("nan"), parts

    with pytest.raises(data.UserError, match="50 steps without a finite gradient") as error:
        fit(cfg, loss)
    assert "\n" not in str(error.value)
    assert max(seen) == 49
    # The last checkpoint is from before.
    assert apart(weights(tmp_path), first) == 0
