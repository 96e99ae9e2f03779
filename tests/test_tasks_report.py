"""tests/tasks_report.py: real clips score best; wrong colors and mismatched pairs are noticed."""

import itertools
import math
import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import tasks_report
import torch

import data
import metrics
import syncflow

torch.set_num_threads(1)
CFG = SimpleNamespace(frames=16, size=32, fps=10, rate=8000)
N = 24
FEW = 12  # where rows are made
SCENES = "toy:bounce,glide,pulse"


TINY = """
    --preset toy --frames 16 --size 16 --rate 4000 --n_mels 16 --hop 50 --window 128 --n_fft 128
    --audio_patch 4,16 --audio_channels 6 --vae_width 8 --vae_blocks 1 --width 16 --depth 1
    --heads 2 --text_width 16 --griffin_lim 2 --sample_steps 1
""".split()


@pytest.fixture(scope="module")
def clips():
    """N real clips, with captions and labels."""
    return list(data.Clips(SCENES, "val", N, 16, 32, 10, 8000))


@pytest.fixture(scope="module")
def reference():
    others = list(data.Clips(SCENES, "train", N, 16, 32, 10, 8000))
    return tasks_report.observe(*tasks_report.streams(others), others, CFG)


def fake_model(monkeypatch, answer):
    """The module "fake"; its sample() is answer(real video, real audio, what was given).

    Returns a list that its calls are added to.
    """
    calls = []

    def sample(model, n, **given):
        calls.append({"n": n, **given})
        real = data.Clips(SCENES, "val", n, 16, 32, 10, 8000)
        return answer(*tasks_report.streams(list(real)), given)

    module = ModuleType("fake")
    module.sample = sample
    module.load = lambda path, options: SimpleNamespace(cfg=CFG)
    monkeypatch.setitem(sys.modules, "fake", module)
    return calls


def run(*options):
    return tasks_report.main(["--model", "fake", "--ckpt", "none", "--n", str(FEW), *options])


def test_colors_of_real_clips_are_right(clips):
    video, _ = tasks_report.streams(clips)
    assert tasks_report.count_balls(video, clips)["color"] == 1
    painted = np.roll(video, 1, axis=-1)  # red, green, blue -> green, blue, red
    assert tasks_report.count_balls(painted, clips)["color"] == 0


def test_color_goes_by_the_majority_of_frames_that_show_the_ball(clips):
    video, _ = tasks_report.streams(clips)
    gone = np.broadcast_to(video[0, :, :1, :1], video[0].shape)  # the ground alone
    painted = np.roll(video[0], 1, axis=-1)
    some = video.copy()
    some[0, :7] = painted[:7]  # 9 of 16 frames are as they were
    assert tasks_report.count_balls(some, clips)["color"] == 1
    some[0, :8] = painted[:8]  # half is no majority
    assert tasks_report.count_balls(some, clips)["color"] == pytest.approx(1 - 1 / N)
    some[0, :8] = gone[:8]  # frames without a ball have no say
    assert tasks_report.count_balls(some, clips)["color"] == 1
    some[0] = gone  # never seen
    assert tasks_report.count_balls(some, clips)["color"] == pytest.approx(1 - 1 / N)


def test_only_captions_that_name_the_color_of_one_ball_count(clips):
    video, _ = tasks_report.streams(clips)
    silent = [{**clip, "caption": "a ball"} for clip in clips]
    assert math.isnan(tasks_report.count_balls(video, silent)["color"])
    blocks = [{**clip, "label": "collide"} for clip in clips]
    assert math.isnan(tasks_report.count_balls(video, blocks)["color"])
    # One that counts, and its color is wrong.
    silent[3] = clips[3]
    assert tasks_report.count_balls(np.roll(video, 1, axis=-1), silent)["color"] == 0


def test_mismatching_lowers_correlations(clips):
    video, audio = tasks_report.streams(clips)
    labels = [clip["label"] for clip in clips]
    real = tasks_report.togetherness(video, audio, labels, 8000)
    assert real["bounce"] > 0.4
    assert real["glide"] > 0.99
    shifted = tasks_report.togetherness(video, np.roll(audio, 3, 0), labels, 8000)
    for scene in ("bounce", "glide"):
        far = real[f"{scene}_error"] + real[f"{scene}_other_error"]
        assert real[f"{scene}_other"] < real[scene] - 2 * far
        # The other sound is that of the clip before, of the same scene: three before, here.
        assert labels[0] == labels[3]
        assert real[f"{scene}_other"] == pytest.approx(shifted[scene], abs=1e-5)


def test_a_scene_that_is_missing_has_no_correlation(clips):
    some = [clip for clip in clips if clip["label"] != "bounce"]
    labels = [clip["label"] for clip in some]
    found = tasks_report.togetherness(*tasks_report.streams(some), labels, 8000)
    assert "glide" in found
    assert "bounce" not in found


def test_whole_balls_are_counted(clips):
    video, _ = tasks_report.streams(clips)
    assert tasks_report.count_balls(video, clips)["whole"] == 1
    torn = video.copy()
    torn[:, 5] = 0  # a frame without a ball
    assert tasks_report.count_balls(torn, clips)["whole"] == 0


def test_judge_tells_what_is_wrong(clips, reference):
    video, audio = tasks_report.streams(clips)
    real = tasks_report.judge(video, audio, clips, reference, CFG)
    assert real["scene_audio"] == 1
    assert real["scene_video"] > 0.6
    assert real["sync"] < real["sync_other"]
    # The clip before is of another scene: its sound is wrong, the video is not.
    pairs = tasks_report.make(None, None, "mismatched", clips, None, 0)
    wrong = tasks_report.judge(*pairs, clips, reference, CFG)
    assert wrong["scene_audio"] == 0
    assert wrong["scene_video"] == real["scene_video"]
    assert wrong["fvd_builtin"] == pytest.approx(real["fvd_builtin"])
    assert wrong["fad_builtin"] == pytest.approx(real["fad_builtin"])
    assert wrong["fd_joint_builtin"] > 2 * real["fd_joint_builtin"]
    assert wrong["sync"] > 1.5 * real["sync"]


def test_a_model_that_makes_real_clips_scores_like_them(monkeypatch, capsys):
    calls = fake_model(monkeypatch, lambda video, audio, given: (video, torch.from_numpy(audio)))
    table = run("--rows", "t2av,v2a,a2v_alone,real")
    real = table["other real clips"]
    assert set(table) == {"T2AV, captions", "V2A, captions", "A2V, no text", "other real clips"}
    for scores in table.values():
        assert scores == pytest.approx(real)
    # What the model was asked for.
    both, sound, silent = calls
    assert len(both["prompt"]) == both["n"] == FEW
    assert "video" not in both and "audio" not in both
    assert sound["prompt"] == both["prompt"]
    assert sound["video"].shape == (FEW, 16, 32, 32, 3)
    assert silent["audio"].shape == (FEW, 12800)
    assert "prompt" not in silent and "video" not in silent
    # The table: as many cells in each line, and no score of what was given.
    lines = capsys.readouterr().out.splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert len({len(row) for row in cells}) == 1
    given = [row.count("given") for row in cells]
    assert given == [0, 0, 0, 4, 2, 0]


def test_a_row_for_each_weight_and_for_the_untrained(monkeypatch):
    calls = fake_model(monkeypatch, lambda video, audio, given: (video, audio))
    monkeypatch.setattr(tasks_report, "judge", lambda *what: {})
    table = run("--rows", "t2av,v2a", "--guidance", "1,2.5", "--untrained", "too")
    names = ["T2AV, untrained", "T2AV, captions, guidance 1", "T2AV, captions, guidance 2.5"]
    assert list(table) == [*names, "V2A, captions"]
    assert [call["guidance"] for call in calls] == [None, 1, 2.5, None]


def test_a_line_for_each_checkpoint(monkeypatch):
    calls = fake_model(monkeypatch, lambda video, audio, given: (video, audio))
    loaded = []

    def load(path, options):
        loaded.append(path)
        return SimpleNamespace(cfg=CFG)

    sys.modules["fake"].load = load
    monkeypatch.setattr(tasks_report, "judge", lambda *what: {})
    paths = "out/on/ckpt.pt,out/off/audio/ckpt.pt"
    table = run("--rows", "t2av,v2a,real", "--ckpt", paths, "--guidance", "1,2")
    both = [f"T2AV, captions, {name}, guidance {w}" for name in ("on", "off/audio") for w in (1, 2)]
    assert list(table) == [
        *both,
        "V2A, captions, on",
        "V2A, captions, off/audio",
        "other real clips",  # needs no model: once
    ]
    assert loaded == paths.split(",")
    # The same clips and the same noise for both.
    one, other = calls[-2:]
    assert np.array_equal(one["video"], other["video"])
    assert one["prompt"] == other["prompt"]
    assert one["seed"] == other["seed"]


def test_labels_tell_checkpoints_apart(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def labels(*names):
        return list(tasks_report.labels_of(names).values())

    assert labels("out/a/ckpt.pt") == [""]
    assert labels("out/a/ckpt.pt", "out/a/audio/ckpt.pt") == [", a", ", a/audio"]
    assert labels("out/a/audio/ckpt.pt", "out/b/audio/ckpt.pt") == [", a/audio", ", b/audio"]
    assert labels("a/ckpt.pt", f"{tmp_path}/a/old.pt") == [", a", ", a/old.pt"]


def test_checkpoints_of_different_shapes_are_refused(monkeypatch):
    fake_model(monkeypatch, None)
    wide = SimpleNamespace(**{**vars(CFG), "size": 48})
    configs = {"a/ckpt.pt": CFG, "b/ckpt.pt": wide}
    sys.modules["fake"].load = lambda path, options: SimpleNamespace(cfg=configs[path])
    with pytest.raises(data.UserError, match="differ in frames, size"):
        run("--ckpt", ",".join(configs))


def test_what_was_given_is_not_looked_at_again(clips, monkeypatch):
    some = clips[:4]
    video, audio = tasks_report.streams(some)
    truth = tasks_report.observe(video, audio, some, CFG)
    assert set(truth) == {"label", *tasks_report.FEATURES["video"], *tasks_report.FEATURES["audio"]}
    kinds = []
    observe = metrics.observe

    def noted(clips, extract, *rest):
        kinds.extend(extract)
        return observe(clips, extract, *rest)

    monkeypatch.setattr(metrics, "observe", noted)
    mute = 0 * audio
    known = tasks_report.observe(torch.from_numpy(video), mute, some, CFG, truth)
    assert kinds == ["audio"]
    fresh = tasks_report.observe(video, mute, some, CFG)
    assert list(known) == list(fresh)
    for name, x in fresh.items():
        assert torch.equal(known[name], x) if torch.is_tensor(x) else known[name] == x


@pytest.mark.parametrize("size", [24, 48])
def test_scores_of_real_clips_are_alike_at_other_sizes(size, clips, reference):
    cfg = SimpleNamespace(**{**vars(CFG), "size": size})
    some, others = [list(data.Clips(SCENES, k, N, 16, size, 10, 8000)) for k in ("val", "train")]
    seen = tasks_report.observe(*tasks_report.streams(others), others, cfg)
    scores = tasks_report.judge(*tasks_report.streams(some), some, seen, cfg)
    real = tasks_report.judge(*tasks_report.streams(clips), clips, reference, CFG)
    assert scores["whole"] == scores["color"] == 1
    same = ("sync", "bounce", "glide", "fad_builtin", "fd_joint_builtin")
    assert {k: scores[k] for k in same} == pytest.approx({k: real[k] for k in same}, rel=0.02)
    assert scores["fvd_builtin"] == pytest.approx(real["fvd_builtin"], rel=0.1)


def test_syncflow_at_a_size_it_was_not_trained_at(tmp_path, capsys):
    paths = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        cfg = syncflow.parse(TINY)
        folder = tmp_path / f"run{seed}"
        folder.mkdir()
        paths.append(f"{folder}/ckpt.pt")
        data.save_checkpoint(paths[-1], 0, cfg, {"ema": syncflow.SyncFlow(cfg)})
    table = tasks_report.main([
        *("--model", "syncflow", "--ckpt", ",".join(paths), "--n", "6", "--size", "24"),
        *("--rows", "t2av,v2a,a2v,real"),
    ])
    assert list(table) == [
        "T2AV, captions, run0",
        "T2AV, captions, run1",
        "V2A, captions, run0",
        "V2A, captions, run1",
        "other real clips",
    ]
    assert table["V2A, captions, run0"]["color"] == table["other real clips"]["whole"] == 1
    assert capsys.readouterr().err.count("left out. SyncFlow makes no video for a sound") == 2


def test_what_a_model_refuses_is_left_out(monkeypatch, capsys):
    def wordless(video, audio, given):
        if "prompt" in given:
            raise data.UserError("It takes no words.")
        return video, None if "audio" in given else audio

    fake_model(monkeypatch, wordless)
    table = run("--rows", "t2av,v2a,v2a_alone,a2v_alone")
    assert list(table) == ["V2A, no text"]
    said = capsys.readouterr()
    assert said.err.count("left out. It takes no words.") == 2
    assert said.err.count("alone: there is no pair to judge") == 1
    assert "left out" not in said.out


@pytest.mark.parametrize("row", ["foo", "untrained", ""])
def test_rows_that_are_not_there(row):
    with pytest.raises(data.UserError, match="--rows takes some of t2av,"):
        run("--rows", f"real,{row}")


def test_undefined_scores_are_gaps():
    scores = dict.fromkeys(("fvd_builtin", "fad_builtin", "fd_joint_builtin"), 1.0)
    line = tasks_report.line("words", "", scores | {"sync": math.nan, "sync_other": 190.0})
    assert line == "| words | 1.0 | 1.0 | 1.000 |  |  |  |  |  |  |  |"


def test_names_of_rows_say_what_is_given():
    for name, (words, given, text) in tasks_report.ROWS.items():
        assert given in tasks_report.ALONE
        assert (given == "video") == words.startswith("V2A"), name
        assert (given == "audio") == words.startswith("A2V"), name
        assert text == ("captions" in words or name == "untrained")
    headings = set(tasks_report.COLUMNS)
    assert set(itertools.chain(*tasks_report.ALONE.values())) <= headings
