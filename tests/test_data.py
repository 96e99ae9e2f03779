"""data.py: the toy set, the loader, clips in and out, and `prepare` on videos made here with known events."""
import json
import pickle
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
    """Where the matched filter, with a parabola through its peak, puts the chirps nearest to `times` (s)."""
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


def make_video(path, fps="25", seconds=4.0, events=(0.7, 1.5, 2.3, 3.1), late=0.0, sound=True, size=64):
    """Gray noise that moves, a white flash and a chirp at each event; the audio track starts `late` s late.
    -> the times at which the flashes really begin: those of the first frame at or after each event."""
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
    return [json.loads(x) for p in sorted(out.glob(f"{kind}*.jsonl")) for x in p.read_text().splitlines()]


def shard(out, clip):
    return (np.load(out / "shards" / f"{clip['shard']}.{kind}.npy") for kind in ("video", "audio"))


def same(a, b):
    assert a.keys() == b.keys()
    for k in a:
        assert torch.equal(a[k], b[k]) if torch.is_tensor(a[k]) else a[k] == b[k], k


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


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
    words = {"bounce": "ball", "collide": "blocks", "glide": "gliding", "pulse": "pulsing", "rain": "rain"}
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
        assert small["caption"] == large["caption"] and np.array_equal(small["events"], large["events"])


def test_toy_impacts_are_heard_and_seen():
    for scene in ("bounce", "collide"):
        for i in range(30):
            c = data.toy_clip(5, i, scenes=(scene,))
            background = np.median(c["video"].astype(float).mean(-1), axis=(1, 2))     # (F,)
            flash = background > background.min() + 40
            assert set(np.flatnonzero(flash)) == set((c["events"] * 10).astype(int))
            for at in c["events"]:
                k = round(float(at) * 8000)
                if 400 < k < 12000:                     # the energy rises at least threefold in half a frame
                    assert np.mean(c["audio"][k:k + 400]**2) > 3 * np.mean(c["audio"][k - 400:k]**2)


def test_toy_sound_follows_the_picture():
    for i in range(10):
        c = data.toy_clip(6, i, scenes=("pulse",))
        loud = np.sqrt((c["audio"].reshape(16, 800)**2).mean(1))
        area = abs(c["video"].astype(float) - c["video"][0, 0, 0]).sum((1, 2, 3))
        assert np.corrcoef(loud, area)[0, 1] > 0.9
        c = data.toy_clip(6, i, scenes=("glide",))
        peak = [np.argmax(abs(np.fft.rfft(x * np.hanning(800), 8000))) for x in c["audio"].reshape(16, 800)]
        ink = abs(c["video"].astype(float) - c["video"][0, 0, 0]).sum(-1)
        row = (ink.sum(2) * np.arange(32)).sum(1) / ink.sum((1, 2))
        assert np.corrcoef(np.log(peak), -row)[0, 1] > 0.98


def test_toy_train_and_val_are_disjoint():
    train, val = (data.open_dataset("toy", split) for split in ("train", "val"))
    assert len(val) == 1024 and len(train) > 10**9
    assert val.numbers[0] > train.numbers[-1]           # the numbers of a split's clips: no clip is in both
    assert not np.array_equal(train[0]["video"], val[0]["video"])
    with pytest.raises(IndexError):
        val[1024]
    for name, split in (("toy:nothing", "train"), ("toy", "test")):
        with pytest.raises(data.UserError):
            data.open_dataset(name, split)


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
    with pytest.raises(data.UserError, match="multiple of 3"):
        data.loader(train, 4, 0, 1, world=3)


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
    dealt = [torch.cat([b["key"] for b in data.val_batches(val, 7, 4, r, 2)]).tolist() for r in (0, 1)]
    assert dealt == [keys[0::2], keys[1::2]]
    tiny = data.open_dataset("toy:glide", "val", 2, 8)
    assert [len(b["key"]) for b in data.val_batches(tiny, 10**6, 512)] == [512] * 2


def test_to_device_and_back():
    batch = next(data.loader(data.open_dataset("toy"), 2, 0, 1))
    moved = data.to_device(batch, "cpu")
    assert moved["video"].shape == (2, 16, 3, 32, 32) and moved["audio"].shape == (2, 1, 12800)
    assert moved["video"].min() >= -1 and moved["video"].max() <= 1 and moved["caption"] == batch["caption"]
    assert torch.equal(data.to_uint8(moved["video"]), batch["video"])
    wild = torch.tensor([-9.0, 0.0, 9.0]).expand(1, 1, 3, 1, 3)
    assert data.to_uint8(wild)[0, 0, 0, :, 0].tolist() == [0, 128, 255]


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
    text = subprocess.run([FFMPEG, "-hide_banner", "-i", "out/x.mp4"], capture_output=True, text=True).stderr
    assert "Duration: 00:00:01.60" in text and "h264" in text and "yuv420p" in text and "aac" in text
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
    late = tone * (np.arange(12800) >= 6400)            # one time axis: the tone begins at the middle column
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
    half = 0.5 / rate_of(fps)                           # of a source frame: a tick shows the nearest one
    for at in shown:
        first = min(white[abs(white / 10 - at) < 0.3])
        assert -half - 1e-3 <= first / 10 - at <= 0.1 - half + 1e-3
    _, a = data.load_clip("in/x.mp4", 16, 32, 10, 8000, start=0.6)
    assert abs(found(a, 8000, [shown[0] - 0.6]) - (shown[0] - 0.6)).max() < 1e-3


def test_prepare_flash_on_a_tick_is_exact():
    """Source at 50 fps, events on ticks of 10 fps: the flash begins in that very frame, not one off."""
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
    assert reasons == {"good.mp4": "", "mute.mp4": "no audio", "one.mp4": "too short", "cut.mp4": "",
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
        assert x["video"].shape == (16, 64, 64, 3) and x["audio"].shape == (25600,) and "events" not in x
        assert all(np.array_equal(x[k], y[k]) for k in x)
    first, clip = val[0], val.clips[0]
    video, audio = shard(out, clip)
    assert np.array_equal(first["video"], video[:16]) and np.allclose(first["audio"], audio[:25600] / 32768)
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
    # A run that dies: a torn line, a forgotten temporary folder, and a line without its file's entry.
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
    command = [sys.executable, str(root / "data.py"), "prepare", "in", "--name", "set", "--workers", "1"]
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
        assert [len(x) for x in shard(Path("datasets/set"), clip)] == [clip["frames"], clip["frames"] * 1600]


def test_a_prepared_set_adapts_to_a_smaller_model():
    Path("in").mkdir()
    shown = make_video("in/a.mp4", seconds=5, events=(0.5, 1.1, 2.3, 3.1))
    make_video("in/b.mp4", seconds=5, events=(0.5, 1.1, 2.3, 3.1))
    prepare("in")
    large = data.open_dataset("set", "val", 32, 64, 10, 16000)[0]
    small = data.open_dataset("set", "val", 32, 32, 10, 8000)[0]
    assert small["video"].shape == (32, 32, 32, 3) and small["audio"].shape == (25600,)
    assert abs(large["video"].reshape(32, 32, 2, 32, 2, 3).mean((2, 4)) - small["video"]).max() <= 0.51
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
