"""metrics.py, its functions and its command: edge cases, features, and what users do wrong."""
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import ladder
import numpy as np
import pytest
import torch

import data
import metrics

ROOT = Path(__file__).parent.parent
TAGS = {"video": "builtin", "audio": "builtin"}
torch.set_num_threads(1)


def clips(name="toy", n=4, split="val"):
    return data.Clips(name, split, n)


def stacked(some, stream):
    """One stream of some clips, as an array (n, ...)."""
    return np.stack([clip[stream] for clip in some])


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def impacts():
    return metrics.observe(clips("toy:bounce,collide", 48), ladder.EXTRACT, 10, 8000)


def command(*args, capsys):
    """Run the command -> what it prints."""
    metrics.main([str(x) for x in args])
    return capsys.readouterr().out


def refusal(*args):
    """The one sentence with which the command refuses."""
    with pytest.raises(SystemExit) as stop:
        metrics.main([str(x) for x in args])
    sentence = stop.value.code
    assert sentence.startswith("metrics.py: ") and "\n" not in sentence
    return sentence


def test_alone_it_needs_torch_and_numpy_only(tmp_path):
    (tmp_path / "metrics.py").write_bytes((ROOT / "metrics.py").read_bytes())
    code = """
import sys
for name in ("tqdm", "imageio", "soundfile", "data", "sample"):
    sys.modules[name] = None  # an import of it fails
import metrics, torch
x = torch.eye(3)
print(metrics.frechet(x, x + 1))
"""
    run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert float(run.stdout) == pytest.approx(3), run.stderr


# ---- Edge cases


def test_distances_of_sets_that_are_small_equal_or_constant():
    x = noise(6, 40)
    assert metrics.frechet(x, x) == pytest.approx(0, abs=1e-9)
    assert metrics.frechet(x[:2], x[4:]) > 0  # n < D
    assert metrics.frechet(x[:, :1].expand(-1, 40), x) > 0  # rank 1
    assert metrics.frechet(torch.ones(5, 3), torch.ones(9, 3)) == 0
    # Enough rows for the form by moments
    assert metrics.frechet(torch.ones(90, 3), torch.ones(70, 3) * 2) == pytest.approx(3)
    # Lists and arrays
    assert metrics.frechet([[0.0, 1], [1, 0]], np.eye(2)) == pytest.approx(0, abs=1e-9)
    # (n, T, D) is stacked
    assert metrics.frechet(x.view(3, 2, 40), x) == metrics.frechet(x, x)
    assert metrics.mmd(x, x) < 0
    _, _, values = metrics.mmd_blocks(x, x, 3)
    assert values[0] < 0


@pytest.mark.parametrize("name", ["frechet", "mmd", "mmd_blocks", "mi_gaussian"])
def test_distances_refuse_broken_sets(name):
    metric = getattr(metrics, name)
    x = noise(6, 40)
    with pytest.raises(ValueError, match="2 rows or more"):
        metric([], x)
    with pytest.raises(ValueError, match="not 1"):
        metric(x[:1], x)
    with pytest.raises(ValueError, match="NaN"):
        metric(x * math.nan, x)
    with pytest.raises(ValueError, match="infinite"):
        metric(x / 0, x)


def test_distances_refuse_what_does_not_fit():
    x = noise(6, 40)
    with pytest.raises(ValueError, match="different widths, 40 and 39"):
        metrics.frechet(x, x[:, 1:])
    with pytest.raises(ValueError, match="not 1"):
        metrics.frechet_of_moments(metrics.moments(x[:1]), metrics.moments(x))


def test_scores_of_classes():
    sure = 1000 * torch.eye(4)  # a softmax would underflow
    assert metrics.inception_score(sure)[0] == pytest.approx(4)
    mean, std, values = metrics.inception_score(torch.zeros(6, 4), 3)
    assert [mean, std, *values] == pytest.approx([1, 0, 1, 1, 1])
    assert metrics.paired_kl(sure, sure) == 0
    assert metrics.paired_kl(sure, sure.roll(1, 0)) == pytest.approx(1000)
    with pytest.raises(ValueError, match="Paired"):
        metrics.paired_kl(sure, sure[:3])
    with pytest.raises(ValueError, match="10 rows or more"):
        metrics.inception_score(sure, 10)


def test_cosine_score():
    segments = noise(5, 3, 8)
    matched, floor = metrics.cosine_score(segments, 2 * segments)
    assert matched == pytest.approx(1)
    assert floor < 0.9
    assert metrics.cosine_score(torch.zeros(2, 3), torch.zeros(2, 3)) == (0, 0)


def test_reconstruction():
    wave = noise(2, 8000) / 4
    assert metrics.psnr(wave, wave).tolist() == [math.inf] * 2
    assert metrics.psnr(wave + 0.02, wave, 2).tolist() == pytest.approx([40, 40], abs=1e-3)
    audio = metrics.psnr_audio(wave + 0.02, wave, 8000)
    assert audio["psnr_a_wav"].tolist() == pytest.approx([40, 40], abs=1e-3)
    assert (audio["psnr_a_mel"] > 10).all()
    assert metrics.si_sdr(3 * wave + 1, wave).min() > 90
    assert metrics.si_sdr(0 * wave, 0 * wave).isnan().all()


def test_mutual_information():
    x, y = noise(2, 1000, 2, seed=1)
    both = torch.cat([x[:, :1], y[:, :1]], 1)
    for estimate in (metrics.mi_gaussian, metrics.mi_ksg):
        assert abs(estimate(x, y)) < 0.05
        assert estimate(x, both) > 0.8
    assert math.isfinite(metrics.mi_gaussian(x, x))
    assert metrics.mi_histogram(x[:, 0], x[:, 0]) > 1
    same = metrics.mi_ksg([1.0] * 9, [1.0] * 9)
    assert metrics.mi_ksg(torch.ones(9, 1), torch.ones(9, 1)) == pytest.approx(same)


def test_peaks_that_are_missing():
    assert metrics.av_align_mean([], [0.5], 10) == 0
    assert metrics.av_align_iou([], [0.5], 10) == 0
    assert metrics.av_align_mean([], [], 10) == 0
    assert math.isnan(metrics.av_align_iou([], [], 10))
    assert metrics.sync_error([0.3, 0.9], [0.05, 0.32, 0.88]) == pytest.approx(20)
    assert math.isnan(metrics.sync_error([0.3], []))
    assert math.isnan(metrics.sync_error([0.05], [0.5]))
    for length in (8000, 600):
        assert metrics.onset_times(torch.zeros(length), 8000) == []
    with pytest.raises(ValueError, match="too short"):
        metrics.onset_times(torch.zeros(100), 8000)


def test_flashes_are_the_events_of_toy_clips():
    toy = data.open_dataset("toy:bounce,collide", "val")
    for i in range(20):
        clip = toy[i]
        gray = torch.from_numpy(clip["video"]).float().mean(3)
        frames = (clip["events"] * 10).astype(int)
        assert metrics.flash_times(gray, 10) == pytest.approx(frames / 10 + 0.05)


def still_and_silent():
    return {"video": np.full((16, 32, 32, 3), 90, np.uint8), "audio": np.zeros(12800, np.float32)}


def test_still_and_silent_clips():
    seen = metrics.observe([still_and_silent()] * 4, ladder.EXTRACT, 10, 8000)
    assert not any(seen["peaks"] + seen["onsets"] + seen["flashes"])
    assert not seen["motion"].any()
    table = metrics.compare(seen, seen, TAGS, 10)
    for name in ("fvd_builtin", "fad_builtin", "fd_joint_builtin"):
        assert table[name][0] == 0
    for name in ("av_align_iou", "sync_ms"):
        assert math.isnan(table[name][0])


def test_broken_clips_are_refused():
    clip = still_and_silent()
    short = clip | {"video": clip["video"][:4]}
    with pytest.raises(ValueError, match="at least 5 frames"):
        metrics.observe([short], ladder.EXTRACT, 10, 8000)
    seen = metrics.observe([clip] * 4, ladder.EXTRACT, 10, 8000)
    nan = clip | {"audio": clip["audio"] * math.nan}
    broken = metrics.observe([nan] * 4, ladder.EXTRACT, 10, 8000)
    with pytest.raises(ValueError, match="NaN"):
        metrics.compare(seen, broken, TAGS, 10)
    with pytest.raises(ValueError, match="Some of the clips have no audio"):
        metrics.observe([clip, {"video": clip["video"]}], ladder.EXTRACT, 10, 8000)
    with pytest.raises(ValueError, match="Some of the clips have no video"):
        metrics.observe([{"audio": clip["audio"]}, clip], ladder.EXTRACT, 10, 8000)
    longer = clip | {"audio": np.zeros(16000, np.float32)}
    seen = metrics.observe([longer] * 4, ladder.EXTRACT, 10, 8000)
    with pytest.raises(ValueError, match="16 frames of video and sound for 20"):
        metrics.compare(seen, seen, TAGS, 10)


# ---- Features


def test_features_do_not_depend_on_the_batch():
    some = list(clips(n=16))
    video = torch.from_numpy(stacked(some, "video")).float() / 255
    audio = torch.from_numpy(stacked(some, "audio"))
    gray = video.mean(-1) * 255

    def of_audio(x):
        return metrics.audio_features(x, 8000)

    def strength(x):
        return metrics.onset_envelope(x, 8000)

    for f, x in (
        (metrics.video_features, video),
        (of_audio, audio),
        (metrics.optical_flow, gray[:4]),
        (strength, audio),
    ):
        batch = f(x)
        single = torch.cat([f(one[None]) for one in x])
        assert (batch - single).abs().max() <= 1e-5 * batch.abs().max()
    assert metrics.video_features(video[:1]).shape == (1, 844)
    assert of_audio(audio[:1]).shape == (1, 448)
    seen = metrics.observe(some, ladder.EXTRACT, 10, 8000)
    single = torch.cat([metrics.video_features(one[None]) for one in video])
    assert torch.equal(seen["video"], single)


def test_resampling_keeps_a_tone():
    def tone(rate):
        t = torch.arange(rate, dtype=torch.float64) / rate
        return (440 * math.tau * t).sin()

    up = metrics.resample(tone(8000)[None], 8000, 22050)
    assert up.shape == (1, 22050)
    assert (up[0] - tone(22050)).abs().max() < 1e-6


def test_classes_in_closed_form():
    extract = {"audio": metrics.audio_features}
    train = metrics.observe(clips(n=100, split="train"), extract, 10, 8000)
    test = metrics.observe(clips(n=100, split="val"), extract, 10, 8000)
    classify, names = metrics.lda(train["audio"], train["label"])
    assert names == sorted(data.SCENES)
    assert metrics.accuracy((classify, names), test["audio"], test["label"]) > 0.9
    hiss = metrics.audio_features(torch.randn(20, 12800), 8000)
    assert metrics.inception_score(classify(hiss))[0] < 1.2
    assert metrics.inception_score(classify(test["audio"]))[0] > 3


def test_no_accuracy_where_no_clip_shares_its_class():
    seen = {"audio": noise(6, 8), "label": list("abcdef")}
    table = metrics.compare(seen, seen, TAGS, 10)
    assert set(table) == {"fad_builtin", "kad_builtin"}
    table = metrics.compare(seen | {"label": list("aabaab")}, seen, TAGS, 10)
    assert "accuracy_label_audio_builtin" in table


def test_every_metric_grows_with_what_it_measures(capsys):
    strongest = []
    for name, kind, corrupt, levels, moved in ladder.LADDER:
        strongest.append((name, kind, corrupt, levels[-1:], moved))
    found = ladder.ladder("toy:bounce,collide", 24, steps=strongest)
    for (corruption, name), values in found.items():
        assert ladder.grows(name, values), (corruption, name, values)
    assert len(capsys.readouterr().out.splitlines()) == 2 + len(strongest)


def test_matched_pairs_stand_out_from_mismatched(impacts):
    joint, matched = metrics.alignment(impacts, 10)
    wrong, floor = metrics.alignment(impacts, 10, roll=1)
    apart = metrics.frechet(joint[:24], wrong[24:])
    assert apart > 5 * metrics.frechet(joint[:24], joint[24:])
    assert matched["av_align_iou"] > 1.5 * floor["av_align_iou"]
    assert matched["sync_ms"] < 50
    assert floor["sync_ms"] > 150
    assert matched["sync_truth_ms"] < 40


# ---- Extractors


class Pixels(torch.nn.Module):
    """In the place of a network: the mean of every channel, and whatever else a preset passes."""

    def forward(self, x, rescale: bool = False, resize: bool = False,
                return_features: bool = False):
        if x.dim() == 4:  # VGGish patches (B, 1, 96, 64)
            return x.mean(2).flatten(1)
        if x.dim() == 2:  # audio (B, L)
            return x[:, ::1000]
        return x.flatten(2).mean(2)


@pytest.fixture(scope="module")
def net(tmp_path_factory):
    """A TorchScript file."""
    path = tmp_path_factory.mktemp("net") / "net.ts"
    torch.jit.script(Pixels()).save(str(path))
    return path


VIDEO = torch.rand(2, 16, 20, 30, 3)
AUDIO = torch.rand(2, 32000) - 0.5


@pytest.mark.parametrize("preset, kind, x, shape", [
    ("", "video", (VIDEO,), (2, 16)),
    ("i3d:", "video", (VIDEO,), (2, 3)),
    ("stylegan-v:", "video", (VIDEO,), (2, 3)),
    ("", "audio", (AUDIO,), (2, 32)),
    ("vggish16k:", "audio", (AUDIO, 16000), (2, 2, 64)),
    ("vggish16k:", "audio", (AUDIO[:, :9000], 16000), (2, 1, 64)),
    ("audioclip44k:", "audio", (AUDIO, 16000), (2, 71)),
])
def test_presets(net, preset, kind, x, shape):
    f, name = metrics.extractor(f"{preset}{net}", kind)
    assert f(*x).shape == shape
    assert name[:-8] == (preset[:-1] or "net") + "-"  # then the hash


def test_presets_scale_as_their_networks_expect(net):
    f, _ = metrics.extractor(f"stylegan-v:{net}", "video")
    assert torch.allclose(f(VIDEO), 255 * VIDEO.mean((1, 2, 3)), rtol=1e-4)
    f, _ = metrics.extractor(f"audioclip44k:{net}", "audio")
    assert torch.allclose(f(AUDIO, 16000).norm(dim=1), torch.ones(2))


def test_extractors_of_the_user(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text("def f(audio, rate):\n    return audio[:, :4]\n")
    monkeypatch.syspath_prepend(tmp_path)
    f, name = metrics.extractor("mine:f", "audio")
    assert f(AUDIO, 16000).shape == (2, 4)
    assert name.startswith("f-")
    assert metrics.extractor(len, "video") == (len, "len")
    assert metrics.extractor(None, "audio")[1] == "builtin"
    broken = tmp_path / "text.ts"
    broken.write_text("no network")
    for form in ("nothing.ts", "nothing:f", "mine:g", str(broken), "", "vggish16k:mine:f"):
        with pytest.raises(ValueError, match="no TorchScript file and no module:function"):
            metrics.extractor(form, "video")


def test_log_mels_of_vggish():
    """A tone of 1 kHz is loudest in its band: 64 bands, equal steps of 1127 ln(1 + f / 700)."""
    tone = torch.sin(torch.arange(32000) * math.tau / 16)[None]
    patches = metrics.vggish16k(lambda x: x.flatten(1), tone, 16000)
    assert patches.shape == (1, 2, 96 * 64)
    low, high, middle = (1127 * math.log1p(f / 700) for f in (125, 7500, 1000))
    loudest = patches.view(2, 96, 64)[0, 50].argmax().item()
    assert loudest == round((middle - low) / (high - low) * 65) - 1


# ---- The command


def folder(path, some, streams=("video", "audio")):
    """A folder with one .npz of these clips."""
    path.mkdir()
    arrays = {stream: stacked(some, stream) for stream in streams}
    data.write_npz(path / "clips.npz", arrays.get("video"), arrays.get("audio"), 10, 8000)
    return path


def metrics_of(path):
    return json.loads(path.read_text())["metrics"]


def test_command_on_a_folder(tmp_path, capsys):
    path = folder(tmp_path / "fake", list(clips(n=12)))
    out = command("--fake", path, "--n", 12, "--json", tmp_path / "o.json", capsys=capsys)
    assert f"fake: 12 clips of 1 .npz in {path}, not compressed" in out
    assert "real: 12 clips of toy, train split" in out
    table = metrics_of(tmp_path / "o.json")
    for name in ("fvd_builtin", "kvd_builtin", "fad_builtin", "fd_joint_builtin", "av_align_iou",
                 "sync_ms"):
        assert name in table
    assert all(name in out for name in table)
    assert not (path / "clips.npz.new").exists()
    # The same clips from the data set itself, whose labels are known: the same numbers, and more.
    command("--fake", "toy", "--n", 12, "--json", tmp_path / "p.json", capsys=capsys)
    more = metrics_of(tmp_path / "p.json")
    del table["sync_truth_ms"]  # a folder does not know the true events
    for name, values in table.items():
        assert more[name] == values
    assert more["accuracy_label_audio_builtin"][1] == 0.2
    assert more["accuracy_color_video_builtin"][0] <= 1


def test_command_on_videos(tmp_path, capsys):
    some = list(clips(n=12))
    path = folder(tmp_path / "real", some)
    for i, clip in enumerate(some[:4]):
        data.save_clip(tmp_path / "mp4" / f"{i}.mp4", clip["video"], clip["audio"], 10, 8000)
    out = command("--real", path, "--fake", tmp_path / "mp4", "--n", 4, capsys=capsys)
    assert "4 videos" in out
    assert "compressed, which changes FVD and FAD" in out


def test_clips_of_different_shapes_are_not_compared(tmp_path, capsys):
    one = folder(tmp_path / "one", list(clips(n=4)))
    two = folder(tmp_path / "two", list(data.Clips("toy", "val", 4, frames=8)))
    for fake, real in ((one, two), (two, one), ("toy", two)):
        assert "frames" in refusal("--real", real, "--fake", fake, "--n", 4)
    # A data set is read in the shape of the fake clips, which the options need not repeat.
    command("--fake", two, "--n", 4, "--json", tmp_path / "o.json", capsys=capsys)
    said = json.loads((tmp_path / "o.json").read_text())["options"]
    assert said["frames"] == 8


ONE = (sys.executable, str(ROOT / "metrics.py"))
# Without the --, torchrun takes --n for its own.
TWO = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--",
       str(ROOT / "metrics.py"))


def launch(program, *args, cwd):
    """Run the command in a folder, whose modules it finds."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(cwd)}
    return subprocess.run([*program, *args], cwd=cwd, capture_output=True, text=True, env=env)


def test_two_processes_give_the_numbers_of_one(tmp_path):
    tables = []
    for name, program in (("1", ONE), ("2", TWO)):
        args = ["--real", "toy:bounce", "--fake", "toy:bounce", "--n", "7", "--json", name]
        run = launch(program, *args, cwd=tmp_path)
        assert run.returncode == 0, run.stderr[-2000:]
        assert run.stdout.count("fvd_builtin") == 1
        assert "destroy_process_group" not in run.stderr
        tables.append(metrics_of(tmp_path / name))
    assert tables[0] == tables[1]
    assert len(tables[0]) > 8


def test_two_processes_refuse_once(tmp_path):
    run = launch(TWO, "--fake", "nothing", cwd=tmp_path)
    assert run.returncode != 0
    assert run.stderr.count("metrics.py: ") == 1
    # What is wrong with the clips of the second process is said by the first.
    (tmp_path / "second.py").write_text("""
import torch.distributed as dist
def f(audio, rate):
    if dist.get_rank() == 1:
        raise ValueError("This clip is broken.")
    return audio[:, :4]
""")
    args = ["--fake", "toy", "--n", "4", "--audio_features", "second:f"]
    run = launch(TWO, *args, cwd=tmp_path)
    assert run.returncode != 0
    assert run.stderr.count("metrics.py: This clip is broken.") == 1


def test_logits_and_one_stream(tmp_path, capsys, monkeypatch):
    (tmp_path / "classes.py").write_text("def f(video):\n    return video.mean((1, 2, 3)) * 9\n")
    monkeypatch.syspath_prepend(tmp_path)
    some = list(clips(n=12))
    real = folder(tmp_path / "a", some, ["video"])
    fake = folder(tmp_path / "b", some, ["video"])
    out = command("--real", real, "--fake", fake, "--video_features", "classes:f", "--logits",
                  "--json", tmp_path / "o.json", capsys=capsys)
    assert "fad" not in out
    table = metrics_of(tmp_path / "o.json")
    name = next(k for k in table if k.startswith("kl_"))
    assert name.startswith("kl_video_f-")
    value, floor = table[name]
    assert value == 0 < floor


def prepared_set(path, lengths):
    """A prepared data set of one-colored videos of so many frames; the last is for validation."""
    shards = path / "shards"
    shards.mkdir(parents=True)
    (path / "meta.json").write_text('{"fps": 10, "size": 32, "rate": 8000}')
    lines = []
    for i, frames in enumerate(lengths):
        np.save(shards / f"{i}.video.npy", np.full((frames, 32, 32, 3), i, np.uint8))
        np.save(shards / f"{i}.audio.npy", np.zeros(frames * 800, np.int16))
        split = "val" if i == len(lengths) - 1 else "train"
        line = {"shard": str(i), "source": f"{i}.mp4", "frames": frames, "label": "x",
                "caption": "y", "split": split}
        lines.append(json.dumps(line))
    (path / "clips.jsonl").write_text("\n".join(lines))


def test_protocols_and_prepared_sets(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    prepared_set(tmp_path / "datasets" / "c", (160, 16, 16, 16))

    def sources(n, protocol="plain"):
        found = data.Clips("c", "train", n, protocol=protocol)
        return [int(clip["video"][0, 0, 0, 0]) for clip in found]

    assert sources(99) == [0] * 10 + [1, 2]  # plain: every window
    assert sources(6).count(0) >= 4  # some of them
    assert sorted(sources(6, "stylegan-v")) == [0, 0, 1, 1, 2, 2]  # a video, then its window
    assert len(data.Clips("c", "val", 16)) == 1


def test_what_users_do_wrong(tmp_path):
    for name in ("empty", "bad", "mp4"):
        (tmp_path / name).mkdir()
    (tmp_path / "bad" / "x.npz").write_text("no archive")
    (tmp_path / "mp4" / "x.mp4").write_text("no video")
    cut = folder(tmp_path / "cut", list(clips(n=2)))
    short = np.zeros((1, 8, 32, 32, 3), np.uint8)
    np.savez(cut / "more.npz", video=short, fps=10, rate=8000)
    for args, says in (
        ((), "--fake"),
        (("--fake", "nothing"), "no data set 'nothing'"),
        (("--fake", tmp_path / "empty"), "no .npz"),
        (("--fake", tmp_path / "bad"), "Cannot use"),
        (("--fake", cut), "compared"),
        (("--fake", tmp_path / "mp4"), "Cannot read"),
        (("--fake", "toy", "--n", 2), "2 rows or more"),
        (("--fake", "toy", "--n", 0), "no clips"),
        (("--fake", "toy", "--n", "x"), "--help"),
        (("--fake", "toy", "--protocol", "x"), "--protocol"),
        (("--fake", "toy", "--video_features", "no.ts"), "no TorchScript"),
    ):
        assert says in refusal(*args), args
