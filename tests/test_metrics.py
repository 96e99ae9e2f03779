"""metrics.py and what sample.py writes and reads for it: edge cases, the built-in features, and the command."""
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import ladder
import numpy as np
import pytest
import torch

import data
import metrics
import sample

ROOT = Path(__file__).parent.parent
torch.set_num_threads(1)
TAGS = {"video": "builtin", "audio": "builtin"}


def options(**changes):
    return SimpleNamespace(**dict(n=16, frames=16, size=32, fps=10, rate=8000, protocol="plain") | changes)


def clips(name="toy", n=4, split="val"):
    return sample.Clips(name, split, options(n=n))


@pytest.fixture(scope="module")
def impacts():
    return metrics.observe(clips("toy:bounce,collide", 48), ladder.EXTRACT, 10, 8000)


def command(*args, capsys):
    metrics.main([*args])
    return capsys.readouterr().out


def refusal(*args):
    with pytest.raises(SystemExit) as stop:
        metrics.main([*args])
    assert stop.value.code.startswith("metrics.py: ") and "\n" not in stop.value.code
    return stop.value.code


def test_alone_it_needs_torch_and_numpy_only(tmp_path):
    (tmp_path / "metrics.py").write_bytes((ROOT / "metrics.py").read_bytes())
    code = ("import sys; sys.modules.update(dict.fromkeys(('tqdm', 'imageio', 'soundfile', 'data', 'sample')))\n"
            "import metrics, torch; x = torch.eye(3); print(metrics.frechet(x, x + 1))")
    run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert float(run.stdout) == pytest.approx(3), run.stderr


# ---- Edge cases --------------------------------------------------------------------------------------------

def test_distances_of_sets_that_are_small_equal_or_broken():
    x = torch.randn(6, 40, generator=torch.Generator().manual_seed(0))
    assert metrics.frechet(x, x) == pytest.approx(0, abs=1e-9)
    assert metrics.frechet(x[:2], x[4:]) > 0                                       # n < D
    assert metrics.frechet(x[:, :1].expand(-1, 40), x) > 0                         # rank 1
    assert metrics.frechet(torch.ones(5, 3), torch.ones(9, 3)) == 0                # constant
    assert metrics.frechet(torch.ones(90, 3), torch.ones(70, 3) * 2) == pytest.approx(3)   # the other form
    assert metrics.frechet([[0.0, 1], [1, 0]], np.eye(2)) == pytest.approx(0, abs=1e-9)    # lists and arrays
    assert metrics.frechet(x.view(3, 2, 40), x) == metrics.frechet(x, x)           # (n, T, D) is stacked
    assert metrics.mmd(x, x) < 0 and metrics.mmd_blocks(x, x, 3)[2][0] < 0
    for metric in (metrics.frechet, metrics.mmd, metrics.mmd_blocks, metrics.mi_gaussian):
        for bad, says in (([], "2 rows or more"), (x[:1], "not 1"), (x * math.nan, "NaN"), (x / 0, "infinite")):
            with pytest.raises(metrics.UserError, match=says):
                metric(bad, x)
    with pytest.raises(metrics.UserError, match="different widths, 40 and 39"):
        metrics.frechet(x, x[:, 1:])
    with pytest.raises(metrics.UserError, match="not 1"):
        metrics.frechet_of_moments(metrics.moments(x[:1]), metrics.moments(x))


def test_scores_of_classes():
    sure = 1000 * torch.eye(4)  # a softmax would underflow
    assert metrics.inception_score(sure)[0] == pytest.approx(4)
    mean, std, values = metrics.inception_score(torch.zeros(6, 4), 3)
    assert [mean, std, *values] == pytest.approx([1, 0, 1, 1, 1])
    assert metrics.paired_kl(sure, sure) == 0 and metrics.paired_kl(sure, sure.roll(1, 0)) == pytest.approx(1000)
    with pytest.raises(metrics.UserError, match="Paired"):
        metrics.paired_kl(sure, sure[:3])
    with pytest.raises(metrics.UserError, match="10 rows or more"):
        metrics.inception_score(sure, 10)
    segments = torch.randn(5, 3, 8)
    matched, floor = metrics.cosine_score(segments, 2 * segments)
    assert matched == pytest.approx(1) and floor < 0.9
    assert metrics.cosine_score(torch.zeros(2, 3), torch.zeros(2, 3)) == (0, 0)


def test_reconstruction_and_information():
    wave = torch.randn(2, 8000, generator=torch.Generator().manual_seed(0)) / 4
    assert metrics.psnr(wave, wave).tolist() == [math.inf] * 2
    assert metrics.psnr(wave + 0.02, wave, 2).tolist() == pytest.approx([40, 40], abs=1e-3)
    audio = metrics.psnr_audio(wave + 0.02, wave, 8000)
    assert audio["psnr_a_wav"].tolist() == pytest.approx([40, 40], abs=1e-3) and (audio["psnr_a_mel"] > 10).all()
    assert metrics.si_sdr(3 * wave + 1, wave).min() > 90 and metrics.si_sdr(0 * wave, 0 * wave).isnan().all()
    x, y = torch.randn(2, 1000, 2, generator=torch.Generator().manual_seed(1))
    both = torch.cat([x[:, :1], y[:, :1]], 1)
    for mi in (metrics.mi_gaussian, metrics.mi_ksg):
        assert abs(mi(x, y)) < 0.05 and mi(x, both) > 0.8
    assert metrics.mi_ksg(torch.ones(9, 1), torch.ones(9, 1)) == pytest.approx(metrics.mi_ksg([1.0] * 9, [1.0] * 9))
    assert math.isfinite(metrics.mi_gaussian(x, x)) and metrics.mi_histogram(x[:, 0], x[:, 0]) > 1


def test_peaks_and_events():
    assert metrics.av_align_mean([], [0.5], 10) == metrics.av_align_iou([], [0.5], 10) == 0
    assert math.isnan(metrics.av_align_iou([], [], 10)) and metrics.av_align_mean([], [], 10) == 0
    assert metrics.sync_error([0.3, 0.9], [0.05, 0.32, 0.88]) == pytest.approx(20)
    assert math.isnan(metrics.sync_error([0.3], [])) and math.isnan(metrics.sync_error([0.05], [0.5]))
    for silence in (torch.zeros(8000), torch.full((8000,), 0.5)[:0].new_zeros(600)):
        assert metrics.onset_times(silence, 8000) == []
    with pytest.raises(metrics.UserError, match="too short"):
        metrics.onset_times(torch.zeros(100), 8000)
    toy = data.open_dataset("toy:bounce,collide", "val")
    for i in range(20):
        clip = toy[i]
        gray = torch.from_numpy(clip["video"]).float().mean(3)
        assert metrics.flash_times(gray, 10) == pytest.approx((clip["events"] * 10).astype(int) / 10 + 0.05)


def test_still_and_silent_clips():
    clip = {"video": np.full((16, 32, 32, 3), 90, np.uint8), "audio": np.zeros(12800, np.float32)}
    seen = metrics.observe([clip] * 4, ladder.EXTRACT, 10, 8000)
    assert not any(seen["peaks"] + seen["onsets"] + seen["flashes"]) and not seen["motion"].any()
    table = metrics.compare(seen, seen, TAGS, 10)
    assert table["fvd_builtin"][0] == table["fad_builtin"][0] == table["fd_joint_builtin"][0] == 0
    assert math.isnan(table["av_align_iou"][0]) and math.isnan(table["sync_ms"][0])
    with pytest.raises(metrics.UserError, match="at least 5 frames"):
        metrics.observe([clip | {"video": clip["video"][:4]}], ladder.EXTRACT, 10, 8000)
    broken = metrics.observe([clip | {"audio": clip["audio"] * math.nan}] * 4, ladder.EXTRACT, 10, 8000)
    with pytest.raises(metrics.UserError, match="NaN"):
        metrics.compare(seen, broken, TAGS, 10)


# ---- Features ----------------------------------------------------------------------------------------------

def test_features_do_not_depend_on_the_batch():
    some = clips(n=16)
    video = torch.from_numpy(np.stack([c["video"] for c in some])).float() / 255
    audio = torch.from_numpy(np.stack([c["audio"] for c in some]))
    gray = video.mean(-1) * 255
    for f, x in ((metrics.video_features, video), (lambda a: metrics.audio_features(a, 8000), audio),
                 (metrics.optical_flow, gray[:4]), (lambda a: metrics.onset_envelope(a, 8000), audio)):
        batch, single = f(x), torch.cat([f(one[None]) for one in x])
        assert (batch - single).abs().max() <= 1e-5 * batch.abs().max()
    assert metrics.video_features(video[:1]).shape == (1, 844)
    assert metrics.audio_features(audio[:1], 8000).shape == (1, 448)
    first = metrics.observe(some, ladder.EXTRACT, 10, 8000)
    assert torch.equal(first["video"], torch.cat([metrics.video_features(v[None]) for v in video]))


def test_resampling_keeps_a_tone():
    t = torch.arange(8000, dtype=torch.float64) / 8000
    up = metrics.resample((440 * math.tau * t).sin()[None], 8000, 22050)
    exact = (440 * math.tau * torch.arange(22050, dtype=torch.float64) / 22050).sin()
    assert up.shape == (1, 22050) and (up[0] - exact).abs().max() < 1e-6


def test_classes_in_closed_form():
    train, test = (metrics.observe(clips(n=100, split=s), {"audio": metrics.audio_features}, 10, 8000)
                   for s in ("train", "val"))
    logits, names = metrics.lda(train["audio"], train["label"])
    right = [names[i] == label for i, label in zip(logits(test["audio"]).argmax(1), test["label"], strict=True)]
    assert names == sorted(data.SCENES) and np.mean(right) > 0.9
    noise = metrics.audio_features(torch.randn(20, 12800), 8000)
    assert metrics.inception_score(logits(noise))[0] < 1.2 < 3 < metrics.inception_score(logits(test["audio"]))[0]


def test_every_metric_grows_with_what_it_measures(capsys):
    steps = [(name, kind, corrupt, levels[-1:], moved) for name, kind, corrupt, levels, moved in ladder.LADDER]
    for (corruption, name), values in ladder.ladder(options(real="toy:bounce,collide", n=24), steps).items():
        assert ladder.grows(name, values), (corruption, name, values)
    assert len(capsys.readouterr().out.splitlines()) == 2 + len(steps)


def test_matched_pairs_stand_out_from_mismatched(impacts):
    (joint, matched), (wrong, floor) = (metrics.alignment(impacts, 10, roll) for roll in (0, 1))
    assert metrics.frechet(joint[:24], wrong[24:]) > 5 * metrics.frechet(joint[:24], joint[24:])
    assert matched["av_align_iou"] > 1.5 * floor["av_align_iou"]
    assert matched["sync_ms"] < 50 < 150 < floor["sync_ms"] and matched["sync_truth_ms"] < 40


# ---- Extractors --------------------------------------------------------------------------------------------

class Pixels(torch.nn.Module):
    """In the place of a network: the mean of every channel, and whatever else a preset passes."""

    def forward(self, x, rescale: bool = False, resize: bool = False, return_features: bool = False):
        if x.dim() == 4:                                    # VGGish patches (B, 1, 96, 64)
            return x.mean(2).flatten(1)
        return x.flatten(2).mean(2) if x.dim() > 2 else x[:, ::1000]


def test_extractors(tmp_path, monkeypatch):
    path = tmp_path / "net.ts"
    torch.jit.script(Pixels()).save(str(path))
    video, audio = torch.rand(2, 16, 20, 30, 3), torch.rand(2, 32000) - 0.5
    for preset, kind, args, shape in (("", "video", (video,), (2, 16)), ("i3d:", "video", (video,), (2, 3)),
                                      ("stylegan-v:", "video", (video,), (2, 3)), ("", "audio", (audio,), (2, 32)),
                                      ("vggish16k:", "audio", (audio, 16000), (2, 2, 64)),
                                      ("vggish16k:", "audio", (audio[:, :9000], 16000), (2, 1, 64)),
                                      ("audioclip44k:", "audio", (audio, 16000), (2, 71))):
        f, name = metrics.extractor(f"{preset}{path}", kind)
        assert f(*args).shape == shape and name[:-8] == (preset[:-1] or "net") + "-"
    whole = metrics.extractor(f"stylegan-v:{path}", "video")[0](video)
    assert torch.allclose(whole, 255 * video.mean((1, 2, 3)), rtol=1e-4)
    unit = metrics.extractor(f"audioclip44k:{path}", "audio")[0](audio, 16000)
    assert torch.allclose(unit.norm(dim=1), torch.ones(2))
    (tmp_path / "mine.py").write_text("def f(audio, rate):\n    return audio[:, :4]\n")
    monkeypatch.syspath_prepend(tmp_path)
    f, name = metrics.extractor("mine:f", "audio")
    assert f(audio, 16000).shape == (2, 4) and name.startswith("f-")
    assert metrics.extractor(len, "video") == (len, "len") and metrics.extractor(None, "audio")[1] == "builtin"
    (tmp_path / "text.ts").write_text("no network")
    for form in ("nothing.ts", "nothing:f", "mine:g", str(tmp_path / "text.ts"), "", "vggish16k:mine:f"):
        with pytest.raises(metrics.UserError, match="no TorchScript file and no module:function"):
            metrics.extractor(form, "video")


def test_log_mels_of_vggish():
    """A tone of 1 kHz is loudest in the band that has it: 64 bands, equal steps of 1127 ln(1 + f / 700)."""
    patches = metrics.vggish16k(lambda x: x.flatten(1), torch.sin(torch.arange(32000) * math.tau / 16)[None], 16000)
    assert patches.shape == (1, 2, 96 * 64)
    low, high, tone = (1127 * math.log1p(f / 700) for f in (125, 7500, 1000))
    band = patches.view(2, 96, 64)[0, 50].argmax().item()
    assert band == round((tone - low) / (high - low) * 65) - 1


# ---- The command -------------------------------------------------------------------------------------------

def folder(path, some):
    path.mkdir()
    video, audio = (np.stack([c[k] for c in some]) for k in ("video", "audio"))
    sample.write_npz(path / "clips.npz", video, audio, options())
    return path


def test_command_on_a_folder(tmp_path, capsys):
    path = folder(tmp_path / "fake", clips(n=12))
    out = command("--real", "toy", "--fake", str(path), "--n", "12", "--json", str(tmp_path / "o.json"), capsys=capsys)
    assert f"fake: 12 clips of 1 .npz in {path}, not compressed" in out and "real: 12 clips of toy, train split" in out
    table = json.loads((tmp_path / "o.json").read_text())["metrics"]
    assert {"fvd_builtin", "kvd_builtin", "fad_builtin", "fd_joint_builtin", "av_align_iou", "sync_ms"} <= set(table)
    assert all(name in out for name in table) and not (path / "clips.npz.new").exists()
    # The same clips from the data set itself, whose labels are known: the same numbers, and more of them.
    command("--real", "toy", "--fake", "toy", "--n", "12", "--json", str(tmp_path / "p.json"), capsys=capsys)
    more = json.loads((tmp_path / "p.json").read_text())["metrics"]
    assert {k: more[k] for k in table if k != "sync_truth_ms"} == {k: table[k] for k in table if k != "sync_truth_ms"}
    assert more["accuracy_label_audio_builtin"][1] == 0.2 and more["accuracy_color_video_builtin"][0] <= 1
    # As videos: the header warns. The real clips, too, may be a folder.
    for i, c in enumerate(clips(n=4)):
        data.save_clip(tmp_path / "mp4" / f"{i}.mp4", c["video"], c["audio"], 10, 8000)
    out = command("--real", str(path), "--fake", str(tmp_path / "mp4"), "--n", "4", capsys=capsys)
    assert "4 videos" in out and "compressed, which changes FVD and FAD" in out


def test_two_processes_give_the_numbers_of_one(tmp_path):  # without the --, torchrun takes --n for its own
    args = ["--real", "toy:bounce", "--fake", "toy:bounce", "--n", "7", "--json"]
    launchers = {"1": (sys.executable,), "2": (sys.executable, *"-m torch.distributed.run --standalone".split(),
                                               "--nproc_per_node=2", "--")}
    for n, launcher in launchers.items():
        run = subprocess.run([*launcher, str(ROOT / "metrics.py"), *args, n], cwd=tmp_path, capture_output=True,
                             text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        assert run.returncode == 0 and run.stdout.count("fvd_builtin") == 1, run.stderr[-2000:]
    one, two = (json.loads((tmp_path / n).read_text())["metrics"] for n in launchers)
    assert one == two and len(one) > 8


def test_logits_and_one_stream(tmp_path, capsys, monkeypatch):
    (tmp_path / "classes.py").write_text("def f(video):\n    return video.mean((1, 2, 3)) * 9\n")
    monkeypatch.syspath_prepend(tmp_path)
    some = clips(n=12)
    for name in "ab":
        (tmp_path / name).mkdir()
        sample.write_npz(tmp_path / name / "x.npz", np.stack([c["video"] for c in some]), None, options())
    out = command("--real", str(tmp_path / "a"), "--fake", str(tmp_path / "b"), "--video_features", "classes:f",
                  "--logits", "--json", str(tmp_path / "o.json"), capsys=capsys)
    table = json.loads((tmp_path / "o.json").read_text())["metrics"]
    tag = next(k for k in table if k.startswith("kl_"))[3:]
    assert tag.startswith("video_f-") and table[f"kl_{tag}"][0] == 0 < table[f"kl_{tag}"][1] and "fad" not in out


def test_protocols_and_prepared_sets(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shards = tmp_path / "datasets" / "c" / "shards"
    shards.mkdir(parents=True)
    (shards.parent / "meta.json").write_text('{"fps": 10, "size": 32, "rate": 8000}')
    lines = []
    for i, frames in enumerate((160, 16, 16, 16)):
        np.save(shards / f"{i}.video.npy", np.full((frames, 32, 32, 3), i, np.uint8))
        np.save(shards / f"{i}.audio.npy", np.zeros(frames * 800, np.int16))
        lines.append({"shard": str(i), "source": f"{i}.mp4", "frames": frames, "label": "x", "caption": "y",
                      "split": "val" if i == 3 else "train"})
    (shards.parent / "clips.jsonl").write_text("\n".join(json.dumps(x) for x in lines))

    def sources(**changes):
        return [int(c["video"][0, 0, 0, 0]) for c in sample.Clips("c", "train", options(**changes))]
    assert sources(n=99) == [0] * 10 + [1, 2]                                   # plain: every window
    assert sources(n=6).count(0) >= 4                                           # some of them
    assert sorted(sources(n=6, protocol="stylegan-v")) == [0, 0, 1, 1, 2, 2]    # a video, then its window
    assert len(sample.Clips("c", "val", options())) == 1


def test_what_users_do_wrong(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "x.npz").write_text("no archive")
    np.savez(folder(tmp_path / "cut", clips(n=2)) / "more.npz", video=np.zeros((1, 8, 32, 32, 3), np.uint8),
             fps=10, rate=8000)
    (tmp_path / "mp4").mkdir()
    (tmp_path / "mp4" / "x.mp4").write_text("no video")
    for args, says in ((("--fake", "nothing"), "no data set 'nothing'"), ((), "--fake"),
                       (("--fake", str(tmp_path / "empty")), "no .npz"),
                       (("--fake", str(tmp_path / "bad")), "Cannot use"),
                       (("--fake", str(tmp_path / "cut")), "compared"),
                       (("--fake", str(tmp_path / "mp4")), "Cannot read"),
                       (("--fake", "toy", "--n", "2"), "2 rows or more"), (("--fake", "toy", "--n", "0"), "no clips"),
                       (("--fake", "toy", "--n", "x"), "--help"), (("--fake", "toy", "--protocol", "x"), "--protocol"),
                       (("--fake", "toy", "--video_features", "no.ts"), "no TorchScript")):
        assert says in refusal(*args), args
