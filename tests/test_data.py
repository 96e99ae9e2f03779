"""data.py: values of the command line, the toy set, the loader, checkpoints and logs, clips in and
out, collections of clips, and `prepare` on videos made here with known events."""
import argparse
import contextlib
import dataclasses
import errno
import json
import os
import pickle
import resource
import subprocess
import sys
from pathlib import Path

import imageio.v2 as imageio
import imageio_ffmpeg
import numpy as np
import pytest
import soundfile
import torch

import data

FFMPEG = imageio_ffmpeg.get_ffmpeg_exe()
CHIRP_S = 0.01


def chirp(rate):
    t = np.arange(int(CHIRP_S * rate)) / rate
    return 0.8 * np.hanning(len(t)) * np.sin(2 * np.pi * (500 * t + 0.5 * 100_000 * t**2))


def chirps(times, seconds, rate):
    """A wave with a chirp that starts at each of `times`."""
    wave, c = np.zeros(int(seconds * rate)), chirp(rate)
    for at in times:
        wave[round(at * rate):][:len(c)] += c
    return wave


def found(wave, rate, times, within=0.12):
    """Where the matched filter puts the chirps nearest to `times` (s), a parabola at its peak."""
    score, out = np.correlate(np.asarray(wave, float), chirp(rate), "valid"), []
    for at in times:
        a = max(1, round((at - within) * rate))
        k = a + int(np.argmax(score[a:round((at + within) * rate)]))
        left, mid, right = score[k - 1:k + 2]
        out.append((k + 0.5 * (left - right) / (left - 2 * mid + right)) / rate)
    return np.array(out)


def rate_of(fps):
    """"30000/1001" -> 29.97"""
    num, _, den = fps.partition("/")
    return float(num) / float(den or 1)


def make_video(path, fps="25", seconds=4.0, events=(0.7, 1.5, 2.3, 3.1), late=0.0, sound=True):
    """Gray noise that moves, a white flash and a chirp at each event; the audio is `late` s late.

    -> when the flashes really begin: the times of the first frame at or after each event.
    """
    size = 64
    rate_v, rng = rate_of(fps), np.random.default_rng(0)
    n = round(seconds * rate_v)
    start = [int(np.ceil(e * rate_v - 1e-6)) for e in events]
    frames = rng.integers(20, 60, (n, 1, size, 1), np.uint8).repeat(size, 1).repeat(3, 3)
    for k in start:
        frames[k:k + max(1, round(0.1 * rate_v))] = 255
    shown = [k / rate_v for k in start]
    command = [FFMPEG, "-y", "-loglevel", "error", "-f", "rawvideo", "-pix_fmt", "rgb24"]
    command += ["-s", f"{size}x{size}", "-r", fps, "-i", "-"]
    if sound:
        wav = Path(path).with_suffix(".source.wav")
        wave = chirps([e - late for e in shown], seconds - late, 48000)
        soundfile.write(wav, wave + 1e-2 * rng.standard_normal(len(wave)), 48000)
        command += ["-itsoffset", str(late), "-i", str(wav), "-c:a", "aac", "-b:a", "192k"]
    codec = ["-c:v", "libx264", "-g", "10", "-pix_fmt", "yuv420p", "-movflags", "+faststart"]
    subprocess.run([*command, *codec, str(path)], input=frames.tobytes(), check=True)
    return shown


def prepare(folder, *options, name="set"):
    data.main(["prepare", str(folder), "--name", name, *map(str, options)])
    return data.ROOT / name


def lines(out, kind="clips"):
    entries = []
    for path in sorted(out.glob(f"{kind}*.jsonl")):
        entries += [json.loads(line) for line in path.read_text().splitlines()]
    return entries


def shard(out, clip):
    return (np.load(out / "shards" / f"{clip['shard']}.{kind}.npy") for kind in ("video", "audio"))


def same(a, b):
    assert a.keys() == b.keys()
    for k in a:
        assert torch.equal(a[k], b[k]) if torch.is_tensor(a[k]) else a[k] == b[k], k


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def refusal(call, *args, **more):
    """The sentence of the UserError that a call ends in."""
    with pytest.raises(data.UserError) as error:
        call(*args, **more)
    assert "\n" not in str(error.value)
    return str(error.value)


# ---- The command line


@pytest.mark.parametrize("kind,text,value", [
    (tuple, "-0.55,0.0", (-0.55, 0.0)), (tuple, "1,2,4", (1, 2, 4)), (tuple, "2", (2,)),
    (tuple, "", ()), (tuple, "9e-1,", (0.9,)), (tuple, "(1, 2)", (1, 2)), (tuple, "-3", (-3,)),
    (float, "9e-1", 0.9), (float, "3", 3.0), (float, "-.5", -0.5), (int, "-5", -5),
    (bool, "true", True), (bool, "False", False), (str, "-1,2", "-1,2"), (str, "90 %", "90 %"),
])
def test_values_are_read_as_python_reads_them(kind, text, value):
    read = data.parse_value(kind, text)
    assert read == value and type(read) is type(value)
    if kind is tuple:
        assert [type(x) for x in read] == [type(x) for x in value]


@pytest.mark.parametrize("kind,text,says", [
    (int, "10.0", "not a whole number"), (int, "True", ""), (int, "1e3", ""), (int, "many", ""),
    (float, "True", "a number"), (float, "1,2", "a number"), (float, "50%", ""),
    (int, "", ""), (bool, "1", "true or false"), (bool, "perhaps", "true or false"),
    (tuple, "a,b", "commas"), (tuple, "1;2", "commas"), (tuple, "1,,2", "commas"),
    (tuple, "'12'", "commas"),
])
def test_wrong_values_are_refused(kind, text, says):
    with pytest.raises(argparse.ArgumentTypeError) as error:
        data.parse_value(kind, text)
    assert f"'{text}'" in str(error.value) and "\n" not in str(error.value)
    assert says in str(error.value)


def test_negative_values_are_no_options():
    words = ["--data_mean", "-0.55,0.0", "--npz", "--lr=-1", "--mult", "1,2", "--help"]
    assert data.pair_words(words) == [
        "--data_mean=-0.55,0.0", "--npz", "--lr=-1", "--mult=1,2", "--help"]


def test_a_program_ends_with_one_sentence_from_the_first_process(monkeypatch):
    waits = []
    monkeypatch.setattr(data.time, "sleep", waits.append)
    monkeypatch.delenv("RANK", raising=False)
    for rank, code in ((None, "x.py: no"), ("0", "x.py: no"), ("3", 1)):
        if rank:
            monkeypatch.setenv("RANK", rank)
        with pytest.raises(SystemExit) as stop:
            data.end("x.py", data.UserError("no"))
        assert stop.value.code == code
    assert waits == [5]  # torchrun would stop the first process before it has spoken


# ---- Toy


@pytest.mark.parametrize(
    "frames,size,fps,rate", [(16, 32, 10, 8000), (16, 64, 10, 16000), (9, 48, 17, 11025)])
def test_toy_shapes_and_determinism(frames, size, fps, rate):
    for i in range(10):
        a, b = (data.toy_clip(3, i, frames, size, fps, rate) for _ in range(2))
        assert a["video"].shape == (frames, size, size, 3) and a["video"].dtype == np.uint8
        assert a["audio"].shape == (frames * rate // fps,) and a["audio"].dtype == np.float32
        assert all(np.array_equal(a[k], b[k]) for k in a)
        assert 0.2 < abs(a["audio"]).max() < 1
    assert not np.array_equal(data.toy_clip(3, 0)["video"], data.toy_clip(4, 0)["video"])
    assert not np.array_equal(data.toy_clip(3, 0)["video"], data.toy_clip(3, 5)["video"])


def test_toy_labels_captions_and_levels():
    words = {"bounce": "ball", "collide": "blocks", "glide": "gliding", "pulse": "pulsing",
             "rain": "rain"}
    for i in range(100):
        c = data.toy_clip(0, i)
        scene = data.SCENES[c["label"]]
        assert words[scene] in c["caption"] and any(color in c["caption"] for color in data.COLORS)
        assert any(size in c["caption"] for size in ("small", "medium", "large"))
        assert any(tempo in c["caption"] for tempo in ("quickly", "slowly"))
        assert 0.07 < np.sqrt(np.mean(c["audio"]**2)) < 0.27
        assert len(c["events"]) and (c["events"] >= 0).all() and (c["events"] < 1.6).all()
        assert (np.diff(c["events"]) > 0).all()
    only = data.open_dataset("toy:glide,bounce")
    assert {only[i]["label"] for i in range(6)} == {0, 2} and only.labels == list(data.SCENES)


def test_toy_is_the_same_clip_at_two_resolutions():
    for i in range(10):
        small, large = data.toy_clip(1, i), data.toy_clip(1, i, size=64, rate=16000)
        mean = large["video"].reshape(16, 32, 2, 32, 2, 3).mean((2, 4))
        assert abs(mean - small["video"]).mean() < 0.5
        assert abs(large["audio"][::2] - small["audio"]).max() < 1e-3
        assert small["caption"] == large["caption"]
        assert np.array_equal(small["events"], large["events"])


def test_toy_impacts_are_heard_and_seen():
    for scene in ("bounce", "collide"):
        for i in range(30):
            c = data.toy_clip(5, i, scenes=(scene,))
            background = np.median(c["video"].astype(float).mean(-1), axis=(1, 2))     # (F,)
            flash = background > background.min() + 40
            assert set(np.flatnonzero(flash)) == set((c["events"] * 10).astype(int))
            for at in c["events"]:
                k = round(float(at) * 8000)
                if 400 < k < 12000:  # the energy rises at least threefold in half a frame
                    assert np.mean(c["audio"][k:k + 400]**2) > 3 * np.mean(c["audio"][k - 400:k]**2)


def test_toy_sound_follows_the_picture():
    for i in range(10):
        c = data.toy_clip(6, i, scenes=("pulse",))
        loud = np.sqrt((c["audio"].reshape(16, 800)**2).mean(1))
        area = abs(c["video"].astype(float) - c["video"][0, 0, 0]).sum((1, 2, 3))
        assert np.corrcoef(loud, area)[0, 1] > 0.9
        c = data.toy_clip(6, i, scenes=("glide",))
        windows = c["audio"].reshape(16, 800) * np.hanning(800)
        peak = abs(np.fft.rfft(windows, 8000)).argmax(1)
        ink = abs(c["video"].astype(float) - c["video"][0, 0, 0]).sum(-1)
        row = (ink.sum(2) * np.arange(32)).sum(1) / ink.sum((1, 2))
        assert np.corrcoef(np.log(peak), -row)[0, 1] > 0.98


def test_toy_train_and_val_are_disjoint():
    train, val = (data.open_dataset("toy", split) for split in ("train", "val"))
    assert len(val) == 1024 and len(train) > 10**9
    assert val.numbers[0] > train.numbers[-1]  # no clip's number is in both
    assert not np.array_equal(train[0]["video"], val[0]["video"])
    with pytest.raises(IndexError):
        val[1024]
    for name, split in (("toy:nothing", "train"), ("toy", "test")):
        with pytest.raises(data.UserError):
            data.open_dataset(name, split)


# ---- What clips are called


def test_variation_of_captions():
    names = [data.vary("a small red ball", "bounce", key, 0.1) for key in range(2000)]
    assert 0.07 < names.count("") / 2000 < 0.14
    assert 0.25 < names.count("a video of bounce") / 2000 < 0.35
    assert names.count("a small red ball") / 2000 > 0.14
    wanted = {"red ball", "a small ball", "a video of a small red ball", "a video of red ball"}
    assert wanted <= set(names)
    for caption in ("a video of rain", "a video"):  # of a clip that came without a caption
        names = {data.vary(caption, "rain", key, 0.1) for key in range(300)}
        assert names <= {"", "a video of rain", "rain", "a video"}
        assert len(names) > 1
    assert "a video" in {data.vary("a video", "unlabeled", key, 0.1) for key in range(20)}
    # For a T5: dropped, or as it is.
    names = [data.vary("a small red ball", "bounce", key, 0.3, whole=True) for key in range(2000)]
    assert set(names) == {"", "a small red ball"}
    assert 0.26 < names.count("") / 2000 < 0.34


def test_captions_of_samples():
    assert data.captions_for(2, None, None) == ["", ""]
    assert data.captions_for(2, "rain", None) == ["rain", "rain"]
    assert data.captions_for(2, ["rain", ""], None) == ["rain", ""]
    assert data.captions_for(2, "", ["rain", "bounce"]) == ["a video of rain", "a video of bounce"]
    assert data.captions_for(1, None, "rain") == ["a video of rain"]
    assert refusal(data.captions_for, 1, "a", "b") == "Give a prompt or a label, not both."
    for said in ({"prompt": ["a"], "label": ""}, {"prompt": "", "label": ["a"] * 3}):
        says = refusal(data.captions_for, 2, **said)
        assert says.startswith("2 clips need one prompt or label or 2 of them")


# ---- Loader


def test_loader_does_not_depend_on_workers_ranks_or_resumption():
    train = data.open_dataset("toy")
    one = list(data.loader(train, 4, 0, 4))
    assert [b["step"] for b in one] == [0, 1, 2, 3]
    assert one[0]["video"].shape == (4, 16, 32, 32, 3) and one[0]["label"].dtype == torch.int64
    assert one[0]["key"].dtype == torch.int64 and min(b["key"].min() for b in one) >= 0
    assert len({int(k) for b in one for k in b["key"]}) == 16
    for a, b in zip(one, data.loader(train, 4, 0, 4, workers=2), strict=True):
        same(a, b)
    for a, b in zip(one[2:], data.loader(train, 4, 2, 4), strict=True):
        same(a, b)
    ranks = [list(data.loader(train, 4, 0, 4, rank=r, world=2)) for r in range(2)]
    for a, x, y in zip(one, *ranks, strict=True):
        for k in ("video", "audio", "label", "key"):
            assert torch.equal(a[k], torch.cat([x[k], y[k]]))
        assert a["caption"] == x["caption"] + y["caption"] and a["step"] == x["step"]
    assert not torch.equal(next(data.loader(train, 4, 0, 1, seed=1))["key"], one[0]["key"])
    assert "multiple of 3" in refusal(data.loader, train, 4, 0, 1, world=3)


class OtherArrays(torch.utils.data.Dataset):
    """Clips of other arrays than video and audio."""

    def __getitem__(self, i):
        return {
            "z_v": np.full((2, 3), i, np.float16),
            "z_a": torch.full((4,), float(i), dtype=torch.bfloat16),
            "events": np.zeros(i),
            "label": i,
            "caption": f"clip {i}",
        }


def test_every_array_of_a_clip_is_in_the_batch():
    batch = data.make_batch(OtherArrays(), 5, range(2, 6), step=7)
    assert set(batch) == {"z_v", "z_a", "label", "caption", "key", "step"} and batch["step"] == 7
    assert batch["z_v"].shape == (4, 2, 3) and batch["z_v"].dtype == torch.float16
    assert batch["z_a"].shape == (4, 4) and batch["z_a"].dtype == torch.bfloat16
    assert batch["z_v"][:, 0, 0].tolist() == batch["label"].tolist() == [2, 3, 4, 5]
    assert batch["key"].tolist() == [data.clip_key(5, i) for i in range(2, 6)]
    moved = data.to_device(batch, "cpu")  # what is no video and no audio stays what it is
    assert moved["z_v"].dtype == torch.float16 and moved["z_a"].shape == (4, 4)
    floats = torch.rand(1, 2, 3, 4, 4)
    assert torch.equal(data.to_device({"video": floats}, "cpu")["video"], floats)
    workers = list(data.loader(OtherArrays(), 2, 1, 3, workers=1))
    same(workers[1], data.make_batch(OtherArrays(), 0, [4, 5], 2))


def test_parts_of_a_batch():
    batch = next(data.loader(data.open_dataset("toy"), 4, 3, 4))
    first, second = data.split(batch, 2)
    for k in ("video", "audio", "label", "key"):
        assert torch.equal(torch.cat([first[k], second[k]]), batch[k])
    assert first["caption"] + second["caption"] == batch["caption"]
    assert first["step"] == second["step"] == 3
    [whole] = data.split(batch, 1)
    same(whole, batch)
    assert "--grad_accum 3" in refusal(list, data.split(batch, 3))


def test_only_cuda_copies_without_waiting():
    class Spy(torch.Tensor):
        def to(self, device, non_blocking=False):
            asked.append((str(device), non_blocking))
            return self

    for device, expected in (("cpu", False), ("mps", False), ("cuda", True), ("cuda:1", True)):
        asked = []
        batch = {"z_v": torch.zeros(2).as_subclass(Spy), "key": torch.zeros(2).as_subclass(Spy)}
        data.to_device(batch, device)
        data.to_device(batch, torch.device(device))
        assert asked == [(device, expected)] * 2  # and the key stays


def test_workers_survive_a_signal_to_the_group_of_the_trainer():
    """As torchrun, `timeout` and Ctrl-C send it: the trainer notes it and gets all its batches."""
    program = """
import os, signal, data
signals = []
signal.signal(signal.SIGTERM, lambda number, frame: signals.append(number))
signal.signal(signal.SIGINT, lambda number, frame: signals.append(number))
batches = data.loader(data.open_dataset("toy"), 2, 0, 7, workers=2)
next(batches)
next(batches)  # of the second worker, so both have started
workers = list(batches._workers)
os.killpg(0, signal.SIGTERM)
os.killpg(0, signal.SIGINT)
assert len(list(batches)) == 5 and len(signals) == 2
del batches
for worker in workers:
    worker.join(10)
    assert worker.exitcode == 0, worker.exitcode
"""
    run = subprocess.run([sys.executable, "-c", program], start_new_session=True,
                         env={**os.environ, "PYTHONPATH": str(Path(data.__file__).parent)},
                         capture_output=True, text=True, timeout=50)
    assert run.returncode == 0, run.stderr


def test_loader_ends_its_workers_when_dropped():
    batches = data.loader(data.open_dataset("toy"), 2, 0, 10**6, workers=1)
    next(batches)
    workers = list(batches._workers)
    assert all(w.is_alive() for w in workers)
    del batches
    for w in workers:
        w.join(10)
        assert not w.is_alive()


def test_data_sets_can_be_sent_to_spawned_workers():
    train = pickle.loads(pickle.dumps(data.open_dataset("toy:rain", seed=2)))
    assert np.array_equal(train[7]["audio"], data.open_dataset("toy:rain", seed=2)[7]["audio"])


def test_val_batches_cover_each_clip_once():
    val = data.open_dataset("toy", "val")
    whole = data.val_batches(val, 7, 4)
    assert [len(b["key"]) for b in whole] == [4, 3]
    keys = torch.cat([b["key"] for b in whole]).tolist()
    for rank in (0, 1):
        batches = data.val_batches(val, 7, 4, rank, 2)
        assert torch.cat([b["key"] for b in batches]).tolist() == keys[rank::2]
    spread = torch.cat([b["spread"] for b in whole])
    assert torch.allclose(spread, (torch.arange(7) + 0.5) / 7)
    assert {b["step"] for b in whole} == {0}
    says = refusal(data.val_batches, val, 3, 8, 0, 4)
    assert "3 validation clips" in says and "4 processes" in says
    assert len(data.val_batches(val, 4, 8, 3, 4)) == 1
    tiny = data.open_dataset("toy:glide", "val", 2, 8)
    assert [len(b["key"]) for b in data.val_batches(tiny, 10**6, 512)] == [512] * 2


def test_to_device_and_back():
    batch = next(data.loader(data.open_dataset("toy"), 2, 0, 1))
    moved = data.to_device(batch, "cpu")
    assert moved["video"].shape == (2, 16, 3, 32, 32) and moved["audio"].shape == (2, 1, 12800)
    assert moved["video"].min() >= -1 and moved["video"].max() <= 1
    assert moved["caption"] == batch["caption"] and moved["step"] == 0
    assert torch.equal(data.to_uint8(moved["video"]), batch["video"])
    wild = torch.tensor([-9.0, 0.0, 9.0]).expand(1, 1, 3, 1, 3)
    assert data.to_uint8(wild)[0, 0, 0, :, 0].tolist() == [0, 128, 255]


# ---- Checkpoints, the log, samples


@dataclasses.dataclass
class Config:
    width: int = 4
    betas: tuple = (0.9, 0.99)
    steps: int = 10
    lr_end: float = 1.0
    workers: int = 2
    fps: int = 10
    rate: int = 8000


def make_run(seed, width=4):
    """The parts of a run after two steps of training."""
    torch.manual_seed(seed)
    model = torch.nn.Linear(width, width)
    optimizer = torch.optim.AdamW(model.parameters())
    for _ in range(2):
        model(torch.randn(3, width)).square().sum().backward()
        optimizer.step()
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    return {"model": model, "adamw": optimizer, "scaler": scaler}


def state_of(run):
    """All numbers of a run's weights and optimizer."""
    moments = [x for s in run["adamw"].state_dict()["state"].values() for x in s.values()]
    return torch.cat([x.detach().flatten() for x in [*run["model"].parameters(), *moments]])


def test_a_run_goes_on_as_it_was():
    run, other = make_run(0), make_run(1)
    assert data.resume("out/ckpt.pt", Config(), run) == 0
    data.save_checkpoint("out/ckpt.pt", 3, Config(), run)
    assert os.listdir("out") == ["ckpt.pt"]
    assert not torch.equal(state_of(run), state_of(other))
    # What may change: a run is made longer, on another machine.
    assert data.resume("out/ckpt.pt", Config(steps=99, workers=0), other) == 3
    assert torch.equal(state_of(run), state_of(other))
    # What was read has let go of the file.
    with open("out/ckpt.pt", "r+b") as f:
        f.write(bytes(os.path.getsize("out/ckpt.pt")))
    assert torch.equal(state_of(run), state_of(other))


def test_a_loss_scale_is_kept():
    run = make_run(0) | {"scaler": torch.amp.GradScaler("cpu", init_scale=8.0)}
    data.save_checkpoint("ckpt.pt", 3, Config(), run)
    other = make_run(1) | {"scaler": torch.amp.GradScaler("cpu")}
    data.resume("ckpt.pt", Config(), other)
    assert other["scaler"].state_dict()["scale"] == 8.0
    assert data.resume("ckpt.pt", Config(), make_run(1)) == 3  # one that is off takes none


def test_another_run_is_not_gone_on_with():
    run = make_run(0)
    data.save_checkpoint("ckpt.pt", 3, Config(), run)
    content = Path("ckpt.pt").read_bytes()
    other = make_run(1)
    before = state_of(other)
    for cfg, says in ((Config(width=8), "--width 4, not 8"), (Config(betas=(0.9, 0.9)), "--betas"),
                      (Config(lr_end=0.1), "--lr_end 1.0, not 0.1"),
                      (Config(steps=20, lr_end=0.1), "--steps 10, not 20")):
        sentence = refusal(data.resume, "ckpt.pt", cfg, other)
        assert says in sentence and "choose another --out" in sentence
    # Where the learning rate falls to the last step, another last step is another course.
    falling = Config(lr_end=0.1)
    data.save_checkpoint("falling.pt", 3, falling, run)
    longer = dataclasses.replace(falling, steps=20)
    assert "--steps 10, not 20" in refusal(data.resume, "falling.pt", longer, other)
    assert data.resume("falling.pt", falling, make_run(2)) == 3

    # Older versions had fewer options, and other parts.
    state = data.load_checkpoint("ckpt.pt")
    del state["adamw"]
    torch.save({**state, "optimizer": {}}, "old.pt")
    sentence = refusal(data.resume, "old.pt", Config(), other)
    assert "older version" in sentence and "adamw" in sentence
    state = data.load_checkpoint("ckpt.pt")
    del state["cfg"]["width"]
    torch.save(state, "old.pt")
    sentence = refusal(data.resume, "old.pt", Config(), other)
    assert "older version" in sentence and "--width" in sentence
    torch.save({"weight": torch.zeros(3)}, "weights.pt")
    assert "no checkpoint of a run" in refusal(data.resume, "weights.pt", Config(), other)
    data.save_checkpoint("wide.pt", 3, Config(), make_run(0, width=5))
    assert "wide.pt" in refusal(data.resume, "wide.pt", Config(), other)
    assert torch.equal(state_of(other), before) and Path("ckpt.pt").read_bytes() == content


def test_checkpoints_that_cannot_be_read():
    data.save_checkpoint("ckpt.pt", 3, Config(), make_run(0))
    Path("text.pt").write_text("not a checkpoint")
    Path("cut.pt").write_bytes(Path("ckpt.pt").read_bytes()[:1500])
    Path("empty.pt").touch()
    torch.save([1, 2], "list.pt")
    torch.save({"model": make_run(0)["model"]}, "code.pt")  # objects, which might run anything
    for name in ("text", "cut", "empty", "code"):
        says = refusal(data.load_checkpoint, f"{name}.pt")
        assert f"{name}.pt is not a readable checkpoint" in says
    assert "it holds a list" in refusal(data.load_checkpoint, "list.pt")
    assert "There is no checkpoint no.pt" in refusal(data.load_checkpoint, "no.pt")
    # Files of before 2020.
    old = {"weight": torch.arange(3.0)}
    torch.save(old, "old.pt", _use_new_zipfile_serialization=False)
    assert torch.equal(data.load_checkpoint("old.pt")["weight"], old["weight"])


@contextlib.contextmanager
def little_room(size):
    """No file may grow beyond `size` bytes, as on a disk that is almost full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_costs_nothing_that_is_there(monkeypatch):
    data.save_checkpoint("out/ckpt.pt", 3, Config(), make_run(0))
    content = Path("out/ckpt.pt").read_bytes()
    with little_room(100_000):
        says = refusal(data.save_checkpoint, "out/ckpt.pt", 4, Config(), make_run(0, width=400))
    assert "Cannot write out/ckpt.pt" in says
    assert os.listdir("out") == ["ckpt.pt"] and Path("out/ckpt.pt").read_bytes() == content

    def save(state, path):
        Path(path).write_bytes(b"half a file")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(torch, "save", save)
    says = refusal(data.save_checkpoint, "out/ckpt.pt", 4, Config(), make_run(0))
    assert "No space left on device" in says
    assert os.listdir("out") == ["ckpt.pt"] and Path("out/ckpt.pt").read_bytes() == content
    Path("file").touch()
    assert "Cannot write" in refusal(data.save_checkpoint, "file/ckpt.pt", 4, Config(), {})
    assert "Cannot write" in refusal(data.trim_log, "file/log.csv", 4)


def test_weights_that_do_not_fit_are_named():
    net = torch.nn.Linear(3, 2)
    wanted = {"weight": torch.randn(2, 3), "bias": torch.randn(2)}
    data.load_weights(net, {k: x.half() for k, x in wanted.items()}, "x.pt")
    assert torch.equal(net.weight, wanted["weight"].half().float())
    for state, name in (({"weight": wanted["weight"]}, "bias"), ({**wanted, "more": 1}, "more"),
                        ({**wanted, "weight": torch.zeros(3, 2)}, "weight"),
                        ({**wanted, "bias": "text"}, "bias")):
        says = refusal(data.load_weights, net, state, "x.pt")
        assert says.startswith("The weights in x.pt are not for this network: 1 names")
        assert f"({name}, for one)" in says
    assert torch.equal(net.weight, wanted["weight"].half().float())


def write_safetensors(path, state):
    """By the format's description: header length, header, tensors."""
    kinds = {dtype: name for name, dtype in data.SAFE_TYPES.items()}
    header = {"__metadata__": {"format": "pt"}}
    payload = b""
    for name, w in state.items():
        raw = w.contiguous().flatten().view(torch.uint8).numpy().tobytes()
        offsets = [len(payload), len(payload) + len(raw)]
        payload += raw
        header[name] = dict(dtype=kinds[w.dtype], shape=list(w.shape), data_offsets=offsets)
    text = json.dumps(header).encode() + b" "
    path.write_bytes(len(text).to_bytes(8, "little") + text + payload)


def test_safetensors():
    state = {}
    for kind, dtype in data.SAFE_TYPES.items():
        state[f"{kind}.some"] = torch.tensor([[0, 1, 1], [1, 0, 1]]).to(dtype)
        state[f"{kind}.one"] = torch.tensor(1).to(dtype)  # of no dimensions
        state[f"{kind}.none"] = torch.zeros(0, 3, dtype=dtype)
    path = Path("x.safetensors")
    write_safetensors(path, state)
    read = data.read_weights(str(path))
    assert list(read) == list(state)
    for name, w in state.items():
        assert read[name].dtype == w.dtype and torch.equal(read[name], w), name

    whole = path.read_bytes()
    damaged = (
        b"",
        whole[:100],
        whole[:-1],
        (2**60).to_bytes(8, "little") + whole[8:],
        whole.replace(b'"F64"', b'"F65"'),
        whole.replace(b"[0, 48]", b"[-8,40]"),
        whole.replace(b"[2, 3]", b"[2, 4]"),
    )
    for content in damaged:
        path.write_bytes(content)
        assert "x.safetensors is not a readable" in refusal(data.read_weights, str(path))
    path.unlink()
    assert "x.safetensors" in refusal(data.read_weights, str(path))


def test_weights_of_other_files():
    state = {"a": torch.ones(2)}
    torch.save(state, "x.pt")
    assert torch.equal(data.read_weights("x.pt")["a"], state["a"])
    torch.save({"state_dict": state, "epoch": 3}, "x.ckpt")  # Lightning's
    assert list(data.read_weights("x.ckpt")) == ["a"]
    assert "There is no" in refusal(data.read_weights, "nowhere.pt")
    assert data.config_beside("x.pt") == {}
    Path("config.json").write_text('{"scaling_factor": 0.5}')
    assert data.config_beside("x.pt") == {"scaling_factor": 0.5}


def test_configs_of_older_files():
    cfg = data.read_config(Config, {"cfg": {"width": 7, "save_every": 100}}, "x.pt")
    assert cfg == Config(width=7)
    for state in ({}, {"cfg": 3}):
        assert "x.pt holds no config" in refusal(data.read_config, Config, state, "x.pt")


def test_log_rows():
    data.trim_log("out/log.csv", 0)
    data.append_row("out/log.csv", {"step": 0, "val_loss": 0.5})
    data.append_row("out/log.csv", {"step": 0, "loss": 1 / 3, "lr": 1e-4})
    data.append_row("out/log.csv", {"step": 1, "loss": float("nan")})
    assert Path("out/log.csv").read_text().splitlines() == [
        "step,val_loss,loss,lr", "0,0.5", "0,,0.3333333,0.0001", "1,,nan,"]


def test_a_damaged_log_goes_on():
    good = ["step,loss,lr", "0,0.5,1e-05", "1,,inf", "2,nan", "3,0.25,0.1"]
    bad = ["", "1,0.\0\0", "\0\0\0", "2,0.5,step", "-1,0.5", "\u00b2,0.5", "5,0.5,0.1", "4,0.5,0.1"]
    mixed = [good[0], *bad[:4], *good[1:], *bad[4:]]
    for cut in ("", "3", "3,0.2"):  # the last line, cut short
        Path("log.csv").write_text("\n".join([*mixed, cut]))
        data.trim_log("log.csv", 4)
        assert Path("log.csv").read_text() == "\n".join(good) + "\n"
    Path("log.csv").write_bytes(b"step,loss\n0,0.5\n\xff\xfe\n1,0.5\n")
    data.trim_log("log.csv", 4)
    assert Path("log.csv").read_text() == "step,loss\n0,0.5\n1,0.5\n"
    for text in ("", "\0\0\n1,2\n", "step,lo", None):  # no head: its columns are not known
        if text is None:
            Path("log.csv").unlink()
        else:
            Path("log.csv").write_text(text)
        data.trim_log("log.csv", 4)
        data.append_row("log.csv", {"step": 4, "loss": 0.5})
        assert Path("log.csv").read_text() == "step,loss\n4,0.5\n"


def test_samples_of_a_run():
    clips = [data.toy_clip(0, i) for i in range(2)]
    video = torch.stack([torch.from_numpy(c["video"]) for c in clips])
    audio = torch.stack([torch.from_numpy(c["audio"]) for c in clips])
    for folder, v, a, ending in (("av", video, audio, "mp4"), ("v", video, None, "mp4"),
                                 ("a", None, audio, "wav")):
        data.write_samples(folder, 20, v, a, Config())
        names = [f"step000020_{i}.{kind}" for i in (0, 1) for kind in sorted((ending, "png"))]
        assert sorted(os.listdir(folder)) == names
        shown, heard = data.load_clip(f"{folder}/step000020_1.{ending}", 16, 32, 10, 8000)
        assert (shown is None) == (v is None) and (heard is None) == (a is None)
    assert abs(heard - clips[1]["audio"]).max() < 1e-3


# ---- Latents


class Encoder(torch.nn.Module):
    """A model of latents: its frozen part encodes, the other one is being trained."""

    def __init__(self, frozen=2.0, **other):
        super().__init__()
        self.frozen = torch.nn.Parameter(torch.tensor(frozen), requires_grad=False)
        self.trained = torch.nn.Parameter(torch.tensor(1.0))
        shape = dict(frames=4, size=8, fps=10, rate=4000)
        self.cfg = argparse.Namespace(**{"seed": 0, "data": "toy", "out": "out", **shape, **other})
        self.clips = 0  # it has encoded

    @torch.no_grad()
    def encode(self, batch):
        self.clips += len(batch["video"])
        z_a = self.frozen * batch["audio"].unflatten(-1, (-1, 100)).mean(-1)  # (B, 1, L / 100)
        return {"z_v": self.frozen * batch["video"].mean((3, 4)), "z_a": z_a}


def test_latents_come_in_files_and_go_round():
    dataset = data.open_dataset("toy", "train", 4, 8, 10, 4000)
    model = Encoder()
    latents = data.Latents(model, dataset, 40, "train", "cpu")
    assert len(latents) == 40 and latents.labels == dataset.labels
    assert model.clips == 40 and len(list(Path("out/latents").rglob("*.pt"))) == 2
    for i in (0, 31, 32, 39, 40, 40 + 35, 3 * 40 + 1):
        batch = data.make_batch(dataset, 0, [i % 40])
        z = model.encode(data.to_device(batch, "cpu"))
        for name in ("z_v", "z_a"):
            assert (latents[i][name] - z[name][0]).abs().max() < 1e-6
        assert latents[i]["caption"] == batch["caption"][0]
        assert latents[i]["label"] == batch["label"][0]
    batch = data.make_batch(latents, 0, [39, 40])
    assert batch["z_v"].shape == (2, 4, 3) and batch["z_a"].shape == (2, 1, 16)


def test_latents_are_encoded_once():
    """But anew for another autoencoder, other clips, another shape of them."""
    dataset = data.open_dataset("toy", "train", 4, 8, 10, 4000)

    def encoded(model, n=4):
        model.clips = 0
        data.Latents(model, dataset, n, "train", "cpu")
        return model.clips

    model = Encoder()
    assert encoded(model) == 4 and encoded(model) == 0
    [path] = Path("out/latents").rglob("*.pt")
    path.unlink()
    assert encoded(model) == 4
    with torch.no_grad():
        model.trained += 1
    assert encoded(model) == 0
    assert encoded(model, 5) == 5
    others = ({"frozen": 3.0}, {"seed": 1}, {"data": "toy:bounce"}, {"fps": 5}, {"rate": 2000})
    for other in others:
        assert encoded(Encoder(**other)) == 4, other
    assert encoded(model) == 0  # the first ones are there


def test_processes_share_the_encoding(monkeypatch):
    """Each makes every other file, and waits until all are there."""
    dataset = data.open_dataset("toy", "train", 4, 8, 10, 4000)
    other = Encoder()

    def waits():
        monkeypatch.setattr(torch.distributed, "barrier", lambda: None)
        data.Latents(other, dataset, 70, "train", "cpu", 1, 2)

    monkeypatch.setattr(torch.distributed, "barrier", waits)
    first = Encoder()
    latents = data.Latents(first, dataset, 70, "train", "cpu", 0, 2)
    assert (first.clips, other.clips) == (32 + 6, 32)
    assert len(latents.files) == 3


# ---- Collections of clips


def stack(clips, name):
    return np.stack([clip[name] for clip in clips])


def test_clips_of_a_data_set():
    clips = data.Clips("toy", "val", 7)
    assert len(clips) == 7 and clips.about == "7 clips of toy, val split"
    val = data.open_dataset("toy", "val")
    for i in range(7):
        clip = clips[i]
        assert np.array_equal(clip["video"], val[i]["video"])
        assert clip["label"] == data.SCENES[val[i]["label"]] and clip["color"] in clip["caption"]
        impacts = clip["label"] in ("bounce", "collide")
        assert len(clip["events"]) == (len(val[i]["events"]) if impacts else 0)
    with pytest.raises(IndexError):
        clips[7]
    small = data.Clips("toy:rain", "train", 2, 8, 16, 5, 4000)
    assert small[1]["video"].shape == (8, 16, 16, 3) and small[1]["audio"].shape == (6400,)


def test_clips_of_npz_files():
    clips = [data.toy_clip(0, i, 8, 16, 5, 4000) for i in range(4)]
    video, audio = stack(clips, "video"), stack(clips, "audio")
    captions = [clip["caption"] for clip in clips]
    Path("many/deeper").mkdir(parents=True)
    data.write_npz("many/a.npz", video[:3], audio[:3], 5, 4000, label="x", caption=captions[:3])
    np.savez("many/deeper/b.npz", video=video[3], audio=audio[3], fps=5, rate=4000, label="y",
             caption=captions[3])  # one clip, without n
    assert os.listdir("many/deeper") == ["b.npz"] and sorted(os.listdir("many"))[0] == "a.npz"
    read = data.Clips("many", "val", 99)
    assert (read.frames, read.size, read.fps, read.rate) == (8, 16, 5, 4000)  # their own
    assert len(read) == 4 and read.about == "4 clips of 2 .npz in many, not compressed"
    for i, clip in enumerate(read):
        assert np.array_equal(clip["video"], video[i]) and np.array_equal(clip["audio"], audio[i])
        assert clip["label"] == "xxxy"[i] and clip["caption"] == captions[i]
        assert clip["color"] in captions[i]
    assert len(data.Clips("many", "val", 2)) == 2

    Path("sound").mkdir()
    data.write_npz("sound/a.npz", None, torch.from_numpy(audio), 5, 4000, caption="a dog")
    read = data.Clips("sound", "val", 99, frames=11)
    assert read.frames == 11 and read.rate == 4000 and set(read[3]) == {"audio", "caption"}
    clips, shape = data.read_npz("sound/a.npz")
    assert len(clips) == 4 and shape == {"fps": 5, "rate": 4000}


def test_clips_of_npz_files_that_do_not_fit():
    video = np.zeros((2, 8, 16, 16, 3), np.uint8)
    Path("bad").mkdir()
    np.savez("bad/short.npz", video=video, audio=np.zeros((1, 6400), np.float32), fps=5, rate=4000)
    np.savez("bad/clock.npz", video=video)
    np.savez("bad/flat.npz", video=video[0, 0, 0], fps=5, rate=4000)
    np.savez("bad/object.npz", video=np.array([{}]), fps=5, rate=4000)
    Path("bad/text.npz").write_text("no archive")
    for name in ("short", "clock", "flat", "object", "text"):
        assert f"Cannot use bad/{name}.npz" in refusal(data.read_npz, f"bad/{name}.npz")
    Path("mixed").mkdir()
    data.write_npz("mixed/a.npz", video, None, 5, 4000)
    for other in ((video[:, :4], 5), (video, 10), (video[:, :, :8, :8], 5)):
        data.write_npz("mixed/b.npz", other[0], None, other[1], 4000)
        assert "cannot be compared" in refusal(data.Clips, "mixed", "val", 9)


def test_clips_of_videos():
    long = data.toy_clip(0, 0, frames=32)
    short = data.toy_clip(0, 1, frames=16)
    data.save_clip("in/sub/long.mp4", long["video"], long["audio"], 10, 8000)
    data.save_clip("in/short.mp4", short["video"], None, 10, 8000)
    clips = data.Clips("in", "val", 99)
    assert len(clips) == 3 and "2 videos in in, compressed" in clips.about
    assert abs(clips[0]["video"].astype(int) - short["video"]).mean() < 4
    assert set(clips[0]) == {"video"} and set(clips[1]) == {"video", "audio"}
    assert abs(clips[2]["video"].astype(int) - long["video"][16:]).mean() < 4
    turns = data.Clips("in", "val", 99, protocol="stylegan-v")
    assert turns.about.endswith("(stylegan-v)") and len(turns) == 3
    silent = ["audio" not in clip for clip in turns]
    assert silent[0] != silent[1] and silent[0] == silent[2]  # one video after another
    Path("in/text.mp4").write_text("no video")
    assert "Cannot read in/text.mp4" in refusal(data.Clips, "in", "val", 9)


def test_clips_of_a_prepared_set_are_windows_in_order():
    folder = Path("datasets/c/shards")
    folder.mkdir(parents=True)
    Path("datasets/c/meta.json").write_text('{"fps": 10, "size": 16, "rate": 8000}')
    entries = []
    for i, frames in enumerate((48, 16, 8, 16)):
        shade = np.arange(frames)[:, None, None, None] + 50 * i
        video = np.broadcast_to(shade, (frames, 16, 16, 3)).astype(np.uint8)
        np.save(folder / f"{i}.video.npy", video)
        np.save(folder / f"{i}.audio.npy", np.zeros(frames * 800, np.int16))
        entries.append({"shard": f"{i}", "source": f"{i}.mp4", "frames": frames, "label": "x",
                        "caption": "y", "split": "val" if i == 3 else "train"})
    text = "\n".join(json.dumps(x) for x in entries)
    Path("datasets/c/clips.jsonl").write_text(text)

    def firsts(**options):
        clips = data.Clips("c", "train", size=16, **options)
        return [int(clip["video"][0, 0, 0, 0]) for clip in clips]

    assert firsts(n=99) == [0, 16, 32, 50]  # all disjoint windows, in order
    some = firsts(n=3)
    assert len(set(some)) == 3 and set(some) < {0, 16, 32, 50} and some == firsts(n=3)
    turns = firsts(n=4, protocol="stylegan-v")
    assert [x == 50 for x in turns] in ([True, False] * 2, [False, True] * 2)
    assert data.Clips("c", "val", 9, size=16)[0]["label"] == "x"


def test_collections_that_are_not_there():
    Path("empty").mkdir()
    assert "no .npz files and no videos in empty" in refusal(data.Clips, "empty", "val", 4)
    assert "no data set 'nothing'" in refusal(data.Clips, "nothing", "val", 4)
    assert "--n is 0" in refusal(data.Clips, "toy", "val", 0)
    assert "--fake" in refusal(data.Clips, "", "val", 4)
    assert "--protocol" in refusal(data.Clips, "toy", "val", 4, protocol="x")


# ---- Clips in and out


@pytest.mark.parametrize("size,rate", [(32, 8000), (64, 16000)])
def test_mp4_round_trip(size, rate):
    video = data.toy_clip(0, 0, 16, size, 10, rate)["video"]
    times = (0.3, 0.8, 1.3)
    wave = chirps(times, 3.0, rate)                     # too long: must be cut
    data.save_clip("out/x.mp4", torch.from_numpy(video), wave.astype(np.float32), 10, rate)
    assert [p.name for p in Path("out").iterdir()] == ["x.mp4"]
    v, a = data.load_clip("out/x.mp4", 16, size, 10, rate)
    assert v.shape == video.shape and v.dtype == np.uint8
    assert a.shape == (16 * rate // 10,) and a.dtype == np.float32
    assert abs(v.astype(int) - video).mean() < 4
    assert abs(found(a, rate, times) - times).max() < 1e-3
    error = a - wave[:len(a)]
    assert 10 * np.log10((wave**2).sum() / (error**2).sum()) > 20
    command = [FFMPEG, "-hide_banner", "-i", "out/x.mp4"]
    text = subprocess.run(command, capture_output=True, text=True).stderr
    for word in ("Duration: 00:00:01.60", "h264", "yuv420p", "aac"):
        assert word in text
    v, a = data.load_clip("out/x.mp4", 6, size, 10, rate, start=0.7)
    assert abs(v.astype(int) - video[7:13]).mean() < 4
    assert abs(found(a, rate, [0.1]) - 0.1).max() < 1e-3


@pytest.mark.parametrize("ending", ["wav", "flac", "ogg", "mp3"])
def test_sound_files_are_read_without_delay(ending):
    times = (0.4, 1.7, 2.9)
    soundfile.write(f"x.{ending}", chirps(times, 4, 16000), 16000)
    v, a = data.load_clip(f"x.{ending}", 40, 32, 10, 16000)
    assert v is None and len(a) == 64000 and abs(found(a, 16000, times) - times).max() < 1e-3
    _, a = data.load_clip(f"x.{ending}", 16, 32, 10, 16000, start=1.5)
    assert len(a) == 25600 and abs(found(a, 16000, [0.2, 1.4]) - [0.2, 1.4]).max() < 1e-3


def test_one_stream_odd_sizes_and_mistakes():
    video, wave = np.zeros((16, 33, 35, 3), np.uint8), np.ones(100, np.float32)
    video[:, -1, -1] = 255
    data.save_clip("silent.mp4", video, None, 10, 8000)
    v, a = data.load_clip("silent.mp4", 16, 34, 10, 8000)
    assert a is None and v.shape == (16, 34, 34, 3)
    assert imageio.get_reader("silent.mp4", format="FFMPEG").get_meta_data()["size"] == (36, 34)
    data.save_clip("x.wav", None, torch.from_numpy(wave)[None], 10, 8000)
    assert soundfile.info("x.wav").frames == 100
    data.save_clip("short.mp4", video, wave, 10, 8000)  # short sound is filled with silence
    _, a = data.load_clip("short.mp4", 16, 34, 10, 8000)
    assert len(a) == 12800 and abs(a[2000:]).max() < 0.05
    Path("text.mp4").write_text("no video")
    for path, frames in (("text.mp4", 16), ("nowhere.mp4", 16), ("short.mp4", 32), ("x.wav", 16)):
        with pytest.raises(data.UserError, match=path):
            data.load_clip(path, frames, 32, 10, 8000)
    for v, path in ((video, "x.wav"), (None, "x.mp4")):
        with pytest.raises(data.UserError, match="must end in"):
            data.save_clip(path, v, wave, 10, 8000)


def test_film_strip_layout():
    clip = data.toy_clip(0, 0)
    tone = np.sin(2 * np.pi * 2000 * np.arange(12800) / 8000).astype(np.float32)
    data.film_strip("out/a.png", clip["video"], tone, 10, 8000)
    image = imageio.imread("out/a.png").astype(int)
    assert image.shape == (64 + 4 + 96, 16 * 64, 3) and Path("out/a.png").stat().st_size < 100_000
    assert abs(image[:64, 64:128] - clip["video"][1].repeat(2, 0).repeat(2, 1)).max() < 8
    rows = image[68:].sum(-1)[:, 50:-50].mean(1)
    assert abs(int(rows.argmax()) - 47.5) <= 1          # 2 kHz of 4: the middle
    assert rows.max() > 590 and np.median(rows) < 100
    late = tone * (np.arange(12800) >= 6400)  # one time axis: it begins at the middle column
    data.film_strip("out/b.png", None, late, 10, 8000)
    columns = imageio.imread("out/b.png").astype(int).sum(-1)[47:49].mean(0)
    assert columns[:480].max() < 150 and columns[540:-20].min() > 500
    data.film_strip("out/c.png", np.zeros((16, 256, 256, 3), np.uint8), None, 10, 8000)
    assert imageio.imread("out/c.png").shape == (100, 1536, 3)


# ---- prepare


@pytest.mark.parametrize("fps", ["25", "30000/1001", "60"])
def test_prepare_keeps_streams_in_sync(fps):
    Path("in").mkdir()
    shown = make_video("in/x.mp4", fps, late=0.25)
    out = prepare("in")
    [clip] = lines(out)
    video, audio = shard(out, clip)
    assert video.shape == (clip["frames"], 64, 64, 3) and len(audio) == clip["frames"] * 1600
    assert abs(found(audio, 16000, shown) - shown).max() < 1e-3
    white = np.flatnonzero(video.mean((1, 2, 3)) > 150)
    half = 0.5 / rate_of(fps)  # of a source frame: a tick shows the nearest one
    for at in shown:
        first = min(white[abs(white / 10 - at) < 0.3])
        assert -half - 1e-3 <= first / 10 - at <= 0.1 - half + 1e-3
    _, a = data.load_clip("in/x.mp4", 16, 32, 10, 8000, start=0.6)
    assert abs(found(a, 8000, [shown[0] - 0.6]) - (shown[0] - 0.6)).max() < 1e-3


def test_prepare_flash_on_a_tick_is_exact():
    """Source at 50 fps, events on ticks of 10 fps: the flash begins in that very frame."""
    Path("in").mkdir()
    make_video("in/x.mp4", "50", events=(0.7, 1.5, 2.3))
    video, audio = shard(out := prepare("in"), lines(out)[0])
    assert np.flatnonzero(video.mean((1, 2, 3)) > 150).tolist() == [7, 15, 23]


def test_bad_files_are_skipped_each_with_its_reason(capsys):
    folder = Path("in")
    folder.mkdir()
    make_video("in/good.mp4")
    make_video("in/mute.mp4", sound=False)
    make_video("in/one.mp4", fps="10", seconds=0.1, events=())
    make_video("in/long.mp4", seconds=8, events=(1, 2, 3, 5))
    whole = Path("in/long.mp4").read_bytes()
    Path("in/long.mp4").rename("long.mp4")
    Path("in/cut.mp4").write_bytes(whole[:len(whole) // 2])
    Path("in/headless.mp4").write_bytes(whole[len(whole) // 2:])
    Path("in/empty.mkv").touch()
    Path("in/text.mp4").write_text("This is no video.")
    Path("in/notes.txt").write_text("neither is this, and nobody said so")
    silent = np.random.default_rng(0).integers(0, 255, (20, 32, 32, 3), np.uint8)
    data.save_clip("in/silent.mp4", silent, np.zeros(32000), 10, 16000)
    data.save_clip("in/still.mp4", silent[:1].repeat(20, 0), chirps((0.3, 1), 2, 16000), 10, 16000)
    soundfile.write("in/sound.wav", np.zeros(100), 8000)
    out = prepare("in", "--workers", 2)
    reasons = {x["source"]: x["reason"] for x in lines(out, "files")}
    assert reasons == {
        "good.mp4": "", "mute.mp4": "no audio", "one.mp4": "too short", "cut.mp4": "",
        "headless.mp4": "broken", "empty.mkv": "broken", "text.mp4": "broken",
        "silent.mp4": "silent", "still.mp4": "still"}
    frames = {c["source"]: c["frames"] for c in lines(out)}
    assert frames["good.mp4"] in (39, 40) and len(frames) == 2
    assert 10 < frames["cut.mp4"] < 60                  # of 80: kept in part
    printed = capsys.readouterr().out
    assert "files ok" in printed and "MB" in printed and "hours" in printed
    for reason in ("no audio", "too short", "broken", "silent", "still"):
        assert f"files skipped: {reason}" in printed


def test_labels_captions_segments_and_split():
    for folder in ("in/cats", "in/more/dogs"):
        Path(folder).mkdir(parents=True)
    make_video("in/cats/a.mp4")
    make_video("in/more/dogs/b.mp4")
    make_video("in/c.mp4")
    Path("in/cats/a.txt").write_text("a cat\nmeows ")
    out = prepare("in", "--segment", 1.6, "--skip_intro", 0.5, "--min_seconds", 1)
    clips = lines(out)
    assert {(c["source"], c["label"], c["caption"]) for c in clips} == {
        ("cats/a.mp4", "cats", "a cat meows"), ("more/dogs/b.mp4", "dogs", "a video of dogs"),
        ("c.mp4", "unlabeled", "a video")}
    a = sorted((c["start"], c["frames"]) for c in clips if c["source"] == "c.mp4")
    assert a == [(0.5, 16), (2.1, 16)]                  # what is left, 0.3 s, is too short
    assert len({(c["source"], c["split"]) for c in clips}) == 3     # a file is in one split
    assert {c["split"] for c in clips} == {"train", "val"}
    train, val = (data.open_dataset("set", x, 16, 64, 10, 16000) for x in ("train", "val"))
    assert train.labels == val.labels == ["cats", "dogs", "unlabeled"]
    assert not {c["source"] for c in train.clips} & {c["source"] for c in val.clips}
    for i in range(5):
        x, y = train[i], train[i]
        assert x["video"].shape == (16, 64, 64, 3) and x["audio"].shape == (25600,)
        assert "events" not in x
        assert all(np.array_equal(x[k], y[k]) for k in x)
    first, clip = val[0], val.clips[0]
    video, audio = shard(out, clip)
    assert np.array_equal(first["video"], video[:16])
    assert np.allclose(first["audio"], audio[:25600] / 32768)
    assert len(list(data.loader(train, 2, 0, 3, workers=1))) == 3


def test_resume_and_shards(monkeypatch):
    Path("in").mkdir()
    for k in range(4):
        make_video(f"in/{k}.mp4", seconds=2.5, events=(0.5 + 0.1 * k, 1.5))
    whole = prepare("in")
    calls, real = [], data.decode

    def spy(path, *rest, **more):
        calls.append(Path(path).name)
        if len(calls) == 3 and stop:
            raise KeyboardInterrupt
        return real(path, *rest, **more)

    monkeypatch.setattr(data, "decode", spy)
    stop = False
    prepare("in")
    assert not calls                                    # nothing is decoded again
    parts = prepare("in", "--shard", "0/2", name="parts")
    assert len(calls) == 2
    prepare("in", "--shard", "1/2", name="parts")
    key = "shard"
    assert sorted(lines(whole), key=lambda c: c[key]) == sorted(lines(parts), key=lambda c: c[key])
    for clip in lines(whole):
        for x, y in zip(shard(whole, clip), shard(parts, clip), strict=True):
            assert np.array_equal(x, y)
    # A run that dies: a torn line, a forgotten temporary folder, a line without its file's entry.
    with open(parts / "files-1-of-2.jsonl", "r+") as f:
        text = f.read()
        f.seek(0)
        f.truncate()
        f.write(text[:-9])
    (parts / "shards" / "tmp-1-of-2").mkdir()
    calls.clear()
    prepare("in", "--shard", "1/2", name="parts")
    assert len(calls) == 1 and not list(parts.rglob("tmp*"))
    assert len(data.read_lines(parts, "clips*.jsonl", "shard")) == len(lines(whole))
    a, b = (data.open_dataset(x, "train", 16, 64, 10, 16000) for x in ("set", "parts"))
    assert len(a) == len(b) and np.array_equal(a[3]["video"], b[3]["video"])
    with pytest.raises(SystemExit, match="size 64"):
        prepare("in", "--size", 32)


def test_a_killed_run_leaves_whole_arrays_and_goes_on():
    Path("in").mkdir()
    for k in range(6):
        make_video(f"in/{k}.mp4", seconds=2.5, events=(0.5, 1.5))
    root = Path(data.__file__).parent
    command = [sys.executable, str(root / "data.py"), "prepare", "in", "--name", "set"]
    command += ["--workers", "1"]
    run = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    path = Path("datasets/set/files.jsonl")
    for _ in range(600):
        if path.is_file() and path.stat().st_size:
            break
        try:
            run.wait(0.05)
            break
        except subprocess.TimeoutExpired:
            pass
    run.kill()
    run.wait()
    before = {x["source"] for x in lines(Path("datasets/set"), "files")}
    assert before
    for file in Path("datasets/set/shards").glob("*.npy"):
        np.load(file)
    prepare("in")
    assert len(lines(Path("datasets/set"), "files")) == 6
    clips = data.read_lines(Path("datasets/set"), "clips*.jsonl", "shard")
    assert len(clips) == 6 and not list(Path("datasets/set").rglob("tmp*"))
    for clip in clips.values():
        video, audio = shard(Path("datasets/set"), clip)
        assert len(video) == clip["frames"] and len(audio) == clip["frames"] * 1600


def test_a_prepared_set_adapts_to_a_smaller_model():
    Path("in").mkdir()
    shown = make_video("in/a.mp4", seconds=5, events=(0.5, 1.1, 2.3, 3.1))
    make_video("in/b.mp4", seconds=5, events=(0.5, 1.1, 2.3, 3.1))
    prepare("in")
    large = data.open_dataset("set", "val", 32, 64, 10, 16000)[0]
    small = data.open_dataset("set", "val", 32, 32, 10, 8000)[0]
    assert small["video"].shape == (32, 32, 32, 3) and small["audio"].shape == (25600,)
    mean = large["video"].reshape(32, 32, 2, 32, 2, 3).mean((2, 4))
    assert abs(mean - small["video"]).max() <= 0.51
    assert abs(found(small["audio"], 8000, shown[:3]) - shown[:3]).max() < 1e-3
    level = [np.sqrt(np.mean(x["audio"]**2)) for x in (large, small)]
    assert abs(20 * np.log10(level[1] / level[0])) < 1
    for size, fps, rate in ((48, 10, 16000), (64, 5, 16000), (64, 10, 11025)):
        with pytest.raises(data.UserError, match=f"--size {size} --fps {fps} --rate {rate}"):
            data.open_dataset("set", "train", 16, size, fps, rate)
    with pytest.raises(data.UserError, match="no clips of 200 frames"):
        data.open_dataset("set", "train", 200, 64, 10, 16000)
    with pytest.raises(data.UserError, match="There are: set"):
        data.open_dataset("concerts")


def test_mistakes_are_one_line():
    with pytest.raises(data.UserError) as error:
        data.open_dataset("concerts")
    assert str(error.value) == ("There is no data set 'concerts' in datasets/: make it with "
                                "`python data.py prepare FOLDER --name concerts`.")
    Path("empty").mkdir()
    for words in (["prepare", "empty", "--name", "x"], ["prepare", "nowhere", "--name", "x"],
                  ["preview", "concerts"], ["prepare", "empty"],
                  ["prepare", "empty", "--name", "x", "--shard", "2/2"],
                  ["preview", "toy", "--n", "0"]):
        with pytest.raises(SystemExit) as error:
            data.main(words)
        assert str(error.value).startswith("data.py: ") and "\n" not in str(error.value)
    assert not Path("datasets").exists()


def test_preview(capsys):
    data.main(["preview", "toy", "--n", "5", "--out", "out"])
    assert len(list(Path("out").glob("*.mp4"))) == 5
    assert imageio.imread("out/sheet.png").shape == (5 * (64 + 4 + 96 + 12), 1024, 3)
    data.load_clip("out/00-bounce.mp4", 16, 64, 10, 16000)
