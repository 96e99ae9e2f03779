"""tests/toy_report.py: real clips are whole; a ball that is gone or painted over is noticed."""
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import toy_report

import data

torch.set_num_threads(1)
CFG = SimpleNamespace(frames=16, size=32, fps=10, rate=8000)
N = 8
SCENES = "toy:bounce,glide,pulse"
LEAST = toy_report.least_area(SCENES)


@pytest.fixture(scope="module")
def real():
    """Video (N, 16, 32, 32, 3), audio (N, 12800) and event times of clips of one ball."""
    return toy_report.real_clips(SCENES, "val", N, CFG)


def without_ball(frames):
    """Frames (F, H, W, 3) with every pixel of the color of the first: ground alone."""
    return np.broadcast_to(frames[:, :1, :1], frames.shape)


def test_real_clips_are_whole(real):
    counts = toy_report.count_balls(real[0], LEAST)
    assert counts["one_color"] == N
    assert counts["whole"] == N
    assert counts["missing"] == 0
    assert 1 < counts["jump"] < 12


def test_hue_and_center_are_those_of_the_clip():
    clips = data.open_dataset("toy:pulse", "val")
    for i in range(4):
        clip = clips[i]
        seen, hue, center = toy_report.balls(clip["video"][None], LEAST)
        color = list(data.COLORS)[hue[0, 0]]
        assert color in clip["caption"]
        assert bool(seen.all())
        # The disc stands still, somewhere in the middle fifth of the frame.
        assert float(center.std(1).max()) < 0.3
        assert bool((center / 32 - 0.5).abs().max() < 0.12)


def test_a_ball_that_is_missing(real):
    video = real[0].copy()
    video[0, 3:7] = without_ball(video[0, 3:7])      # for 4 of 16 frames
    video[1] = without_ball(video[1])                # for the whole clip
    counts = toy_report.count_balls(video, LEAST)
    assert counts["whole"] == N - 2
    assert counts["one_color"] == N - 1              # a ball never seen has no color
    assert counts["missing"] == pytest.approx(100 * (4 + 16) / (16 * N))


def test_a_ball_that_changes_color(real):
    video = real[0].copy()
    video[2, 8:] = np.roll(video[2, 8:], 1, axis=-1)         # red, green, blue -> blue, red, green
    counts = toy_report.count_balls(video, LEAST)
    assert counts["one_color"] == counts["whole"] == N - 1
    assert counts["missing"] == 0


def test_a_ball_that_jumps(real):
    still = np.repeat(real[0][:1, :1], 16, axis=1)           # (1, 16, H, W, 3) of one frame
    assert toy_report.count_balls(still, LEAST)["jump"] == 0
    still[:, 8:] = np.roll(still[:, 8:], 5, axis=2)          # down, once
    moved = toy_report.balls(still, LEAST)[2].diff(dim=1).abs().amax()
    assert toy_report.count_balls(still, LEAST)["jump"] == pytest.approx(float(moved), rel=0.1)


@pytest.mark.parametrize("size", [24, 48])
def test_counts_of_real_clips_are_the_same_at_any_size(real, size):
    cfg = SimpleNamespace(**{**vars(CFG), "size": size})
    video, _, _ = toy_report.real_clips(SCENES, "val", N, cfg)
    usual = toy_report.count_balls(real[0], LEAST)
    counts = toy_report.count_balls(video, LEAST)
    jump = counts.pop("jump")  # of pixels, which are larger or smaller
    assert jump == pytest.approx(usual.pop("jump"), rel=0.05)
    assert counts == usual


def test_levels():
    time = torch.arange(12800) / 8000
    sine = 0.5 * torch.sin(2 * torch.pi * 440 * time)[None]
    sine[:, :6400] *= 0.01
    found = toy_report.levels(sine, 8000)
    # -6 dB for the amplitude, -3 dB for the RMS of a sine, -40 dB for the quiet half
    assert found["quiet"] == pytest.approx(-49, abs=0.3)
    hiss = toy_report.levels(sine + 0.01 * torch.randn(1, 12800), 8000)
    assert hiss["between"] > found["between"] + 10


def test_report_tells_real_clips_from_late_ones(real):
    video, audio, events = real
    reference = toy_report.observe(*toy_report.real_clips(SCENES, "train", 16, CFG), CFG)
    good = toy_report.report(video, audio, events, reference, CFG, LEAST)
    names = {name for name, _, _ in toy_report.ROWS}
    assert set(good) == names - {"jump_ratio"}
    noise = np.random.default_rng(0).normal(0, 40, video.shape)
    grainy = np.clip(video + noise, 0, 255).astype(np.uint8)
    late = np.roll(audio, 4800, axis=1)
    bad = toy_report.report(grainy, late, None, reference, CFG, LEAST)
    assert bad["fvd_builtin"] > good["fvd_builtin"]
    assert bad["fd_joint_builtin"] > good["fd_joint_builtin"]


def test_no_checkpoint(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(data.UserError, match="--ckpt"):
        toy_report.newest("mm_diffusion")


def test_balls_of_one_color_alone_are_noticed(real):
    counts = toy_report.count_balls(real[0], LEAST)
    assert counts["most_frequent"] < 90
    same = np.repeat(real[0][:1], N, axis=0)
    assert toy_report.count_balls(same, LEAST)["most_frequent"] == 100
