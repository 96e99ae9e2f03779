"""Clips with sound: the built-in data set, your own videos, the loader, and all that is on disk.

A clip is a dict: video uint8 (F, H, W, 3); audio float32 (L,), mono in [-1, 1], the
L = F * rate // fps samples of exactly the same time; label, an index into dataset.labels; caption.

    python data.py preview toy                     # some clips of a data set, and a picture of all
    python data.py prepare FOLDER --name concerts  # a folder of videos -> datasets/concerts
"""

import argparse
import ast
import contextlib
import copy
import dataclasses
import functools
import hashlib
import json
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections import Counter
from math import tau
from multiprocessing.pool import ThreadPool
from pathlib import Path

import imageio.v2 as imageio
import imageio_ffmpeg
import numpy as np
import soundfile
import torch
from tqdm import tqdm

ROOT = Path("datasets")  # prepared data sets, in the folder you run from


# ---- What a user did wrong, in one sentence


class UserError(ValueError):
    """Something the user can mend; the message is one sentence: what is wrong and what to do."""


def end(program, error):
    """End the program with one line on stderr, once however many processes of torchrun run."""
    if int(os.environ.get("RANK", 0)) > 0:
        # torchrun stops all processes when the first one ends: let rank 0 speak.
        time.sleep(5)
        sys.exit(1)
    sys.exit(f"{program}: {error}")


def pair_words(words=None):
    """The command line's words (None: sys.argv), an option and its value being one: --name=value.

    Else argparse would take a value like -0.55,0.0 for an option.
    """
    pairs = []
    for word in sys.argv[1:] if words is None else words:
        waiting = pairs and pairs[-1].startswith("--") and "=" not in pairs[-1]
        if waiting and pairs[-1] != "--help" and not word.startswith("--"):
            pairs[-1] += f"={word}"
        else:
            pairs.append(word)
    return pairs


# What parse_value asks for, by kind.
WANTED = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    tuple: "numbers with commas between them",
}


def parse_value(kind, text):
    """A word of the command line -> a value of `kind`, read as Python would read it.

    kind: int, float, bool, str or tuple. A tuple needs no brackets: "-0.55,0.0", "2", and "" for
    the empty one. Raises argparse.ArgumentTypeError.
    """
    if kind is str:
        return text
    if kind is tuple and not text.strip():
        return ()
    word = text.capitalize() if kind is bool else text  # true is True
    try:
        value = ast.literal_eval(word)
    except (ValueError, SyntaxError, TypeError):
        value = None
    if kind is tuple and type(value) in (int, float):
        value = (value,)
    if kind is float and type(value) is int:
        value = float(value)
    # Not isinstance: True is no number here.
    if type(value) is not kind:
        raise argparse.ArgumentTypeError(f"'{text}' is not {WANTED[kind]}")
    return value


# ---- The built-in data set "toy": five scenes whose sound is caused by what is seen
# Lengths are in frame heights and times in seconds, so a clip is the same at any size and rate.

SCENES = ("bounce", "collide", "glide", "pulse", "rain")
CAPTIONS = {
    "bounce": "a {size} {color} ball bouncing {tempo} on {back}, {pitch} ringing impacts",
    "collide": "two {size} {color} blocks colliding {tempo} on {back}, {pitch} knocks",
    "glide": "a {size} {color} disc gliding {tempo} on {back}, the tone follows its height",
    "pulse": "a {size} {color} disc pulsing {tempo} on {back}, a {pitch} tone swells with it",
    "rain": "{size} {color} raindrops gusting {tempo} on {back}, {pitch} hiss",
}
PERIODS = {  # s, between these; at least one event in 1.6 s
    "bounce": (0.45, 0.8),
    "collide": (0.5, 0.9),
    "glide": (1.2, 2.4),
    "pulse": (0.6, 1.2),
    "rain": (0.8, 1.5),
}
# Few and far apart: soon learned.
COLORS = {"red": (235, 45, 45), "green": (45, 205, 75), "blue": (60, 110, 255)}
BACKS = {"black": (8, 8, 8), "navy": (14, 16, 56), "gray": (52, 52, 52)}
RADII = (0.14, 0.19, 0.25)
SIZES = ("small", "medium", "large")
PITCHES = ("high", "middle", "low")  # of the three sizes
# Partials of a sound: (frequency as a multiple of the pitch, amplitude).
SUNG = ((1, 0.6), (2, 0.3), (3, 0.15))
KNOCK = ((1, 0.52), (1.7, 0.34), (2.9, 0.21))


def toy_clip(seed, index, frames=16, size=32, fps=10, rate=8000, scenes=SCENES):
    """Clip `index` of the endless data set `seed`.

    "label" is an index into SCENES. "events" (float32, s) are moments that both streams mark:
    impacts (bounce, collide), turning points (glide), greatest radius (pulse) or density (rain).
    The frame of an impact shows it on a brighter background, other frames show their middle.
    """
    rng = np.random.default_rng([seed, index])
    name = scenes[index % len(scenes)]  # in turn, which balances the batches
    color = rng.choice(list(COLORS))
    back = rng.choice(list(BACKS))
    which = rng.integers(3)  # of the sizes
    radius = RADII[which] * rng.uniform(0.92, 1.08)
    low, high = PERIODS[name]
    period = rng.uniform(low, high)
    pitch = 900 * (0.14 / radius) ** 1.5  # Hz: small things sound high

    scene = Scene(name, rng, radius, pitch, period, frames, size, fps, rate)
    draw = getattr(scene, name)
    mask, audio, events = draw()  # coverage (F, H, W), (L,), times in s
    events = events[(events >= 0) & (events < frames / fps)]

    ground = np.tile(np.float32(BACKS[back]), (frames, 1))  # (F, 3)
    if name in ("bounce", "collide"):
        ground[(events * fps).astype(int)] += 80  # a flash at each impact
    video = np.empty((frames, size, size, 3), np.uint8)
    # One channel at a time is three times as fast as broadcasting over a last axis of 3.
    for c in range(3):
        b = ground[:, c, None, None]  # (F, 1, 1)
        video[..., c] = b + mask * (np.float32(COLORS[color][c]) - b) + np.float32(0.5)

    # What can be seen and heard, in words.
    tempo = "quickly" if period < (low + high) / 2 else "slowly"
    caption = CAPTIONS[name].format(
        size=SIZES[which], pitch=PITCHES[which], color=color, back=back, tempo=tempo
    )
    return {
        "video": video,
        "audio": audio.astype(np.float32),
        "label": SCENES.index(name),
        "caption": caption,
        "events": events.astype(np.float32),
    }


class Scene:
    """What the scenes share: a cycle, its beats, and a disc. A method draws the scene of its name.

    Each returns how far the shape covers each pixel (F, H, W), the sound (L,) and event times.
    """

    def __init__(self, name, rng, radius, pitch, period, frames, size, fps, rate):
        self.rng = rng
        self.radius = radius  # in frame heights
        self.pitch = pitch  # Hz
        self.period = period  # s
        self.rate = rate  # Hz
        self.grid = (np.arange(size) + 0.5) / size  # (H,) and (W,): the middles of pixels
        self.ta = np.arange(frames * rate // fps) / rate  # (L,) s: the times of samples

        # The cycle is a whole number at the beats, the first of which is before 0.
        phase, drift = rng.uniform(0, 1, 2)
        beats = period * (np.arange(frames / fps / period + 2) - phase)
        self.beats = beats

        # What a frame shows: its middle, or the moment of an impact.
        t = (np.arange(frames) + 0.5) / fps  # (F,) s
        if name in ("bounce", "collide"):
            contacts = beats[(beats >= 0) & (beats < frames / fps)]
            t[(contacts * fps).astype(int)] = contacts
        self.t = t

        self.cycle = t / period + phase  # (F,)
        cycle_a = np.float32(self.ta / period + phase)  # (L,)
        self.swing = 0.5 + 0.5 * np.cos(tau * self.cycle)  # (F,), 1 at the beats, 0 between them
        self.swing_a = 0.5 + 0.5 * np.cos(tau * cycle_a)  # (L,)
        self.wander = 0.5 + 0.28 * np.sin(tau * (t / 2.5 + drift))  # (F,), to and fro
        self.x, self.y = rng.uniform(0.4, 0.6, 2)  # about the middle of the frame

    def cover(self, inside):
        """How far a pixel's center is inside a shape -> its anti-aliased coverage, 0 ... 1."""
        pixels = np.asarray(inside, np.float32) * np.float32(len(self.grid))
        return np.clip(pixels + np.float32(0.5), 0, 1)

    def disc(self, x, y, radius):
        """A disc at x, y (F,) with radius (F,), or one number -> coverage (F, H, W)."""
        dx = np.square(self.grid - x[:, None], dtype=np.float32)  # (F, W)
        dy = np.square(self.grid - y[:, None], dtype=np.float32)  # (F, H)
        distance = np.sqrt(dy[:, :, None] + dx[:, None])  # (F, H, W)
        return self.cover(np.reshape(np.float32(radius), (-1, 1, 1)) - distance)

    def bounce(self):
        """A ball under gravity, 7.2 frame heights / s^2; every impact on the floor rings."""
        part = self.cycle % 1  # (F,): of the way from impact to impact
        height = 3.6 * self.period**2 * part * (1 - part)
        mask = self.disc(self.wander, 1 - self.radius - height, self.radius)
        audio = 0.95 * strike(self.ta, self.beats, self.pitch, SUNG, 0.15)
        return mask, audio, self.beats

    def collide(self):
        """Two blocks; their gap |sin| is sharp where they meet and knock, round where they turn."""
        half = 0.6 * self.radius
        gap = (0.4 - 1.2 * self.radius) * abs(np.sin(np.pi * self.cycle[:, None]))  # (F, 1)
        across = self.cover(half - abs(abs(self.grid - self.x) - half - gap))  # (F, W)
        down = self.cover(half - abs(self.grid - self.y))  # (H,)
        mask = across[:, None] * down[:, None]  # (F, H, W)
        audio = 0.95 * strike(self.ta, self.beats, self.pitch, KNOCK, 0.1)
        return mask, audio, self.beats

    def glide(self):
        """A disc wanders; the pitch follows its height, 1.4 octaves from 290 Hz."""
        mask = self.disc(self.wander, 0.78 - 0.56 * self.swing, self.radius)
        audio = 0.38 * tone(290 * 2 ** (1.4 * self.swing_a), self.rate)
        # It turns at its highest, the beats, and at its lowest.
        turns = np.concatenate([self.beats, self.beats + self.period / 2])
        return mask, audio, np.sort(turns)

    def pulse(self):
        """A disc swells and shrinks; the loudness follows its radius."""
        still = 0 * self.t  # (F,)
        mask = self.disc(self.x + still, self.y + still, self.radius * (0.45 + 1.1 * self.swing))
        loudness = 0.04 + 0.7 * self.swing_a**1.5  # (L,)
        audio = loudness * tone(np.full_like(self.ta, self.pitch), self.rate)
        return mask, audio, self.beats

    def rain(self):
        """Falling streaks, and a hiss; both follow a density."""
        n = 14
        length = 0.65 * self.radius
        width = 0.13 * self.radius
        x = (self.rng.permutation(n) + 0.5) / n  # (n,), evenly spread
        y = self.rng.uniform(0, 1, n)  # (n,), at time 0
        y = (y + 1.2 * self.t[:, None]) % (1 + 2 * length) - length  # (F, n), from above to below
        # The streaks fade in and out one after another.
        rank = (np.arange(n) + 0.5) / n
        seen = np.clip((1.2 * self.swing[:, None] - rank) / 0.2, 0, 1).astype(np.float32)  # (F, n)
        down = self.cover(length - abs(self.grid[:, None] - y[:, None]))  # (F, H, n)
        across = self.cover(width - abs(x[:, None] - self.grid))  # (n, W)
        mask = np.minimum((down * seen[:, None]) @ across, 1)  # (F, H, W)

        # Two seconds of noise half an octave around 1.6 pitch, made from its spectrum, below 3.6
        # kHz: the same wave at any rate.
        f = np.arange(1, 7200) / 2  # Hz
        angle = self.rng.uniform(0, tau, 7199).astype(np.float32)
        level = np.exp(-2 * np.log2(f / (1.6 * self.pitch)) ** 2)
        waves = level * (np.cos(angle) + 1j * np.sin(angle))
        spectrum = np.concatenate([[0], waves])[: self.rate]  # from 0 Hz on
        noise = np.fft.irfft(spectrum, 2 * self.rate)  # (2 * rate,)
        noise = noise * self.rate * np.sqrt(2 / (level @ level))  # RMS 1
        hiss = (0.03 + 0.27 * self.swing_a) * np.resize(noise, len(self.ta))
        return mask, np.clip(hiss, -0.99, 0.99), self.beats


def strike(ta, events, pitch, partials, decay):
    """Blows at `events`, sorted, the first before 0, that die away in `decay` s -> (L,)."""
    audio = np.empty(len(ta), np.float32)
    starts = [*np.searchsorted(ta, events), len(ta)]
    for i, event in enumerate(events):  # each blow starts anew
        cut = slice(starts[i], starts[i + 1])
        since = (ta[cut] - event).astype(np.float32)  # s
        wave = 0
        for ratio, level in partials:
            wave += level * np.sin(np.float32(pitch * ratio) * tau * since)
        audio[cut] = wave
        audio[cut] *= np.exp(since * np.float32(-1 / decay))
    return audio


def tone(f, rate):
    """A voice of frequency f (L,), Hz -> (L,). Its phase is a running sum by the trapezoidal rule,
    which is smooth, and alike at any rate."""
    cycles = (np.cumsum(f, dtype=np.float64) - (f + f[0]) / 2) / rate
    phase = tau * (cycles - np.floor(cycles)).astype(np.float32)
    wave = 0
    for ratio, level in SUNG:
        wave += np.float32(level) * np.sin(np.float32(ratio) * phase)
    return wave


class ToyClips(torch.utils.data.Dataset):
    """toy_clip as a data set: val is 1024 clips from number 2^40 on, train is all before."""

    labels = list(SCENES)

    def __init__(self, scenes, val, frames, size, fps, rate, seed):
        self.numbers = range(2**40, 2**40 + 1024) if val else range(2**40)
        self.seed = seed
        self.shape = (frames, size, fps, rate)
        self.scenes = scenes

    def __len__(self):
        return len(self.numbers)

    def __getitem__(self, i):
        return toy_clip(self.seed, self.numbers[i], *self.shape, self.scenes)


# ---- Data sets


def read_lines(folder, pattern, key):
    """{entry[key]: entry}, sorted, of the .jsonl files (each machine has its own), whatever a
    crash left."""
    entries = {}
    for path in sorted(folder.glob(pattern)):
        for line in path.read_text(encoding="utf-8").splitlines():
            if line.endswith("}"):  # not cut short
                entry = json.loads(line)
                entries[entry[key]] = entry
    return dict(sorted(entries.items()))


class PreparedClips(torch.utils.data.Dataset):
    """Windows of the segments in datasets/NAME, which `prepare` made.

    val: disjoint ones, in order; train: random ones. len() counts the disjoint ones. Files are
    mapped when a clip is read, so none stays open.
    """

    def __init__(self, name, val, frames, size, fps, rate, seed):
        self.folder = ROOT / name
        self.val = val
        self.frames = frames
        self.size = size
        self.rate = rate
        self.seed = seed
        self.meta = self.read_meta(name, size, fps, rate)

        # A source is in one split with all its segments.
        clips = read_lines(self.folder, "clips*.jsonl", "shard").values()
        self.labels = sorted({clip["label"] for clip in clips})
        held_out = {clip["source"] for clip in clips if clip["split"] == "val"}
        if not held_out:  # nothing in those files was of use
            held_out = {max((clip["source"] for clip in clips), default="")}
        self.clips = []
        for clip in clips:
            if (clip["source"] in held_out) == val and clip["frames"] >= frames:
                self.clips.append(clip)
        if not self.clips:
            raise UserError(
                f"{self.folder} has no clips of {frames} frames for {'val' if val else 'train'}: "
                "prepare longer videos, and at least two files."
            )

        self.windows = []  # (index into clips, first frame)
        counts = []  # how many windows, overlapping ones too, a clip has
        for k, clip in enumerate(self.clips):
            count = clip["frames"] - frames + 1
            counts.append(count)
            for first in range(0, count, frames):
                self.windows.append((k, first))
        self.ends = np.cumsum(counts)

    def read_meta(self, name, size, fps, rate):
        """What `prepare` was told. Raises UserError if that is of no use here."""
        path = self.folder / "meta.json"
        if not path.is_file():
            message = (
                f"There is no data set '{name}' in {ROOT}/: make it with "
                f"`python data.py prepare FOLDER --name {name}`."
            )
            there = sorted(p.parent.name for p in ROOT.glob("*/meta.json"))
            if there:
                message += f" There are: {', '.join(there)}."
            raise UserError(message)
        meta = json.loads(path.read_text())
        if meta["fps"] != fps or meta["size"] % size or meta["rate"] % rate:
            raise UserError(
                f"{self.folder} has size {meta['size']}, {meta['fps']} fps, {meta['rate']} Hz: run "
                "`data.py prepare FOLDER --name NAME "
                f"--size {size} --fps {fps} --rate {rate}`."
            )
        return meta

    def __len__(self):
        return len(self.windows)

    def __getitem__(self, i):
        if self.val:
            return self.read(*self.windows[i])
        # Every window of every segment is equally likely.
        draw = np.random.default_rng([self.seed, i]).integers(self.ends[-1])
        k = int(np.searchsorted(self.ends, draw, "right"))
        first = int(self.ends[k] - 1 - draw)
        return self.read(k, first)

    def read(self, k, first):
        """The clip from frame `first` of segment k on, in the size and rate asked for."""
        clip = self.clips[k]
        path = f"{self.folder}/shards/{clip['shard']}"

        video = np.load(f"{path}.video.npy", mmap_mode="r")[first : first + self.frames]
        zoom = self.meta["size"] // self.size
        if zoom > 1:  # area mean
            size = self.size
            squares = video.reshape(self.frames, size, zoom, size, zoom, 3)
            video = squares.mean((2, 4)).round()

        fps = self.meta["fps"]
        stored = self.meta["rate"]
        start = first * stored // fps
        audio = np.load(f"{path}.audio.npy", mmap_mode="r")[start:]
        audio = audio[: self.frames * stored // fps] / np.float32(32768)
        skip = stored // self.rate
        if skip > 1:
            audio = low_pass(audio, skip)[::skip]
        return {
            "video": np.array(video, np.uint8),
            "audio": np.float32(audio[: self.frames * self.rate // fps]),
            "label": self.labels.index(clip["label"]),
            "caption": clip["caption"],
        }


def low_pass(audio, skip):
    """What is left below 0.92 / skip of the Nyquist frequency; symmetric, so without delay."""
    n = 24 * skip
    taps = np.sinc(np.arange(-n, n + 1) * 0.92 / skip) * np.hanning(2 * n + 1)
    return np.convolve(np.pad(audio, n, "reflect"), taps / taps.sum(), "valid")


def open_dataset(name, split="train", frames=16, size=32, fps=10, rate=8000, seed=0):
    """Split "train" or "val" of "toy", "toy:bounce,glide" (some scenes), or a prepared set.

    dataset[i] depends on (seed, split, i) only; train: any i >= 0, val: i < len(dataset). A
    prepared set also gives any size and rate that divide its own. Raises UserError for an unknown
    name or unfit clips.
    """
    kind, _, scenes = name.partition(":")
    scenes = tuple(scenes.split(",")) if scenes else SCENES
    if split not in ("train", "val") or not set(scenes) <= set(SCENES):
        raise UserError(
            f"There is no '{split}' of '{name}': use train or val, and {', '.join(SCENES)}."
        )
    if kind == "toy":
        return ToyClips(scenes, split == "val", frames, size, fps, rate, seed)
    return PreparedClips(name, split == "val", frames, size, fps, rate, seed)


# ---- Batches


def clip_key(seed, number):
    """A hash of both, 0 ... 2^60: seeds the noise of a clip, whichever process draws it."""
    digest = hashlib.sha1(f"{seed} {number}".encode()).hexdigest()
    return int(digest[:15], 16)


def make_batch(dataset, seed, numbers, step=0):
    """The clips `numbers` of a data set in one dict.

    Every array of a clip is stacked, whatever its key: video (b, F, H, W, 3) uint8, audio (b, L)
    float32, latents. Beside them label (b,) int64; caption, a list of str; key (b,) int64, which is
    clip_key(seed, number); and `step`, an int. Events, of which clips have more or fewer, stay out.
    """
    clips = [dataset[number] for number in numbers]
    batch = {}
    for name, first in clips[0].items():
        values = [clip[name] for clip in clips]
        if name == "events":
            continue
        if isinstance(first, np.ndarray):
            batch[name] = torch.from_numpy(np.stack(values))
        elif torch.is_tensor(first):
            batch[name] = torch.stack(values)
    batch["label"] = torch.tensor([clip["label"] for clip in clips])
    batch["caption"] = [clip["caption"] for clip in clips]
    batch["key"] = torch.tensor([clip_key(seed, number) for number in numbers])
    batch["step"] = step
    return batch


class Batches(torch.utils.data.Dataset):
    """Item `step` is the batch of that step, or this process's part of it.

    Its clips follow from the step, so the number of workers changes nothing, nor does a pause.
    """

    def __init__(self, dataset, seed, batch_size, rank, world):
        self.dataset = dataset
        self.seed = seed
        self.batch_size = batch_size
        self.rank = rank
        self.share = batch_size // world

    def __getitem__(self, step):
        first = step * self.batch_size + self.rank * self.share
        return make_batch(self.dataset, self.seed, range(first, first + self.share), step)


def detach_worker(worker):
    """The worker_init_fn of the loader: the worker leaves the trainer's group of processes.

    Ctrl-C, torchrun, `timeout` and job schedulers signal whole groups. Only the trainer is to get
    that: it finishes its step, saves, and ends its workers itself.
    """
    if hasattr(os, "setpgrp"):  # not on Windows
        os.setpgrp()


def loader(dataset, batch_size, first_step, last_step, rank=0, world=1, workers=0, seed=0):
    """Iterate over the batches of steps first_step ... last_step - 1.

    They are made by `workers` processes (0: by this one). Step s is clips s * batch_size ...
    (s + 1) * batch_size - 1; rank r of `world` gets the r-th part. Dropping the iterator ends the
    workers. Raises UserError when batch_size is not a multiple of world.
    """
    if batch_size % world:
        raise UserError(
            f"{world} processes cannot share {batch_size} clips: use a multiple of {world}."
        )
    batches = torch.utils.data.DataLoader(
        Batches(dataset, seed, batch_size, rank, world),
        batch_size=None,  # an item is a batch already
        sampler=range(first_step, last_step),
        num_workers=workers,
        worker_init_fn=detach_worker,
        pin_memory=torch.cuda.is_available(),
    )
    return iter(batches)


def val_batches(dataset, n, batch_size, rank=0, world=1, seed=0):
    """The batches over clips 0 ... n - 1 (or as many as there are), dealt to the ranks in turn.

    Together the ranks see each clip once. A rank's batch is batch_size // world clips; its last may
    be smaller. "spread" (b,) float32 is a clip's place among all, evenly spread in (0, 1), for its
    noise level. Raises UserError when there are fewer clips than processes.
    """
    count = min(n, len(dataset))
    if count < world:
        raise UserError(
            f"{count} validation clips are too few for {world} processes: raise --val_clips, "
            "prepare more videos, or start fewer processes."
        )
    mine = range(rank, count, world)
    share = max(1, batch_size // world)
    batches = []
    for first in range(0, len(mine), share):
        numbers = mine[first : first + share]
        batch = make_batch(dataset, seed, numbers)
        batch["spread"] = (torch.tensor(numbers) + 0.5) / count
        batches.append(batch)
    return batches


def to_device(batch, device):
    """The batch on `device`, but for key and label, which stay where they are.

    video: uint8 (B, F, H, W, 3) -> float (B, F, 3, H, W) in [-1, 1]; audio: (B, L) -> float
    (B, 1, L). Other tensors keep their shape and type.
    """
    # On other devices than CUDA, a copy that nobody waits for may be read before it has arrived.
    on_cuda = torch.device(device).type == "cuda"
    moved = dict(batch)
    for name, x in batch.items():
        if torch.is_tensor(x) and name not in ("key", "label"):
            moved[name] = x.to(device, non_blocking=on_cuda)
    if "video" in moved and moved["video"].dtype == torch.uint8:
        video = moved["video"].permute(0, 1, 4, 2, 3)  # (B, F, 3, H, W)
        moved["video"] = video.contiguous().float() / 127.5 - 1
    if "audio" in moved:
        moved["audio"] = moved["audio"].float()[:, None]  # (B, 1, L)
    return moved


def split(batch, parts):
    """Cut a batch into equal parts, in order. An int, one value for all clips, is in each part."""
    count = len(batch["key"])
    if count % parts:
        raise UserError(f"{count} clips per process cannot be cut in --grad_accum {parts} parts.")
    size = count // parts
    for first in range(0, count, size):
        cut = slice(first, first + size)
        part = {}
        for name, x in batch.items():
            part[name] = x if isinstance(x, int) else x[cut]
        yield part


def to_uint8(video):
    """Float (B, F, 3, H, W) in [-1, 1], clamped -> uint8 (B, F, H, W, 3) on the same device."""
    levels = video.float().clamp(-1, 1).add(1).mul(127.5).round().byte()
    return levels.permute(0, 1, 3, 4, 2).contiguous()


def vary(caption, label, key, drop, whole=False):
    """What a clip is called this time, so that short prompts are nothing new.

    Nothing, for guidance (a share `drop`); else one of three: "a video of <label>"; its caption;
    its caption short of some words. whole: always its caption, for a text encoder that knows the
    language.
    """
    rng = np.random.default_rng(key)
    kind = rng.random()
    share = rng.uniform(0.3, 1)  # of the words to keep
    if kind < drop:
        return ""
    if whole:
        return caption
    kind = (kind - drop) / (1 - drop)
    if kind < 1 / 3:
        return "a video" if label == "unlabeled" else f"a video of {label}"
    words = re.sub("^a video( of)?", "", caption).split()
    if kind >= 2 / 3:
        words = [word for word in words if rng.random() < share]
    if not words:
        return "a video"
    opening = ["a video of"] if rng.random() < 0.5 else []
    return " ".join(opening + words)


def captions_for(n, prompt, label):
    """What the n clips are to show: prompt or label, one value or a list of n; "": anything."""
    if prompt and label:
        raise UserError("Give a prompt or a label, not both.")
    said = prompt or label or ""
    if isinstance(said, str):
        said = [said] * n
    if len(said) != n:
        raise UserError(f"{n} clips need one prompt or label or {n} of them, not {len(said)}.")
    if label:
        return [f"a video of {name}" for name in said]
    return list(said)


def windows(clips, n, window):
    """One window for all n clips, or n of them -> (n, *window). Else raises UserError."""
    clips = torch.as_tensor(clips)
    if clips.shape not in (window, (1, *window), (n, *window)):
        raise UserError(
            f"Give one window of {' x '.join(map(str, window))} numbers, or {n} of them, "
            f"not {' x '.join(map(str, clips.shape))}."
        )
    return clips.expand(n, *window)


# ---- Clips in and out of media files


def save_clip(path, video, audio, fps, rate):
    """Write video uint8 (F, H, W, 3) and audio (L,) in [-1, 1] as .mp4 (H.264, AAC, for any
    browser), or as .wav when video is None; audio may be None too.

    Sound is cut or zero-padded to F * rate // fps samples; an odd height or width gains a copy of
    its last line. Raises UserError for another file ending.
    """
    path = Path(path)
    kind = "sound" if video is None else "video"
    ending = ".wav" if video is None else ".mp4"
    if path.suffix != ending:
        raise UserError(f"Cannot write {path}: {kind} must end in {ending}.")
    path.parent.mkdir(parents=True, exist_ok=True)

    # A folder on the same disk, so that the file appears whole, by a rename.
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".saving-") as tmp:
        new = f"{tmp}/new{ending}"
        wav = f"{tmp}/new.wav"
        sound = {}
        if audio is not None:
            audio = torch.as_tensor(audio).cpu().float().numpy().reshape(-1)
            # Sound longer than the frames would outlast them.
            n = len(audio) if video is None else len(video) * rate // fps
            audio = np.clip(audio[:n], -1, 1)
            audio = np.pad(audio, (0, n - len(audio)))
            soundfile.write(wav, audio, rate, subtype="PCM_16")
            sound = {"audio_path": wav, "audio_codec": "aac"}
        if video is not None:
            video = torch.as_tensor(video).cpu().numpy()
            height, width = video.shape[1:3]
            odd = ((0, 0), (0, height % 2), (0, width % 2), (0, 0))  # H.264 wants even sizes
            # Players that ignore the edit list are 1024 samples late: 21 ms at 48 kHz, but 128 ms
            # at 8 kHz.
            options = ["-crf", "10", "-movflags", "+faststart", "-ar", "48000"]
            imageio.mimwrite(
                new,
                np.pad(video, odd, "edge"),
                format="FFMPEG",
                fps=fps,
                quality=None,  # crf says it
                macro_block_size=1,  # keep the size, if it does not divide by 16
                ffmpeg_log_level="error",
                output_params=options,
                **sound,
            )
        os.replace(new, path)


def run_ffmpeg(*arguments, **more):
    """Run ffmpeg and wait for it -> its exit status and what it said."""
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-hide_banner", "-nostdin", "-y", *arguments]
    return subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        encoding="utf-8",
        errors="replace",
        **more,
    )


def video_filter(size, fps, lead, source_fps):
    """ffmpeg's filters that cut off `lead` seconds and make square frames at fps."""
    # fps=round=up shows the LAST frame at each tick: half a source frame earlier, this is the
    # NEAREST. start_time=0 repeats the first frame of a late video.
    early = lead + 0.5 / source_fps
    # Square pixels, fill the square, crop.
    return (
        f"setpts=PTS-{early:.6f}/TB,fps={fps}:round=up:start_time=0,"
        "scale=iw*sar:ih,setsar=1,"
        f"scale={size}:{size}:force_original_aspect_ratio=increase:flags=area,"
        f"crop={size}:{size}"
    )


def decode(path, tmp, size, fps, rate, start=0.0, seconds=None):
    """What `path` holds from `start` seconds on (all, or about `seconds`), on one clock.

    -> video (n, size, size, 3) uint8, mapped to a file in folder tmp, or None; audio (m,) int16 or
    None; and ffmpeg's complaints. Lengths are what was decoded, whatever the header says. Raises
    UserError if ffmpeg fails.
    """
    text = run_ffmpeg("-i", f"file:{path}").stderr
    has_audio = re.search(r"^ *Stream #.* Audio: ", text, re.M)
    # A cover picture, which is attached, is no video.
    picture = r"^ *Stream #.* Video: (?!.*attached pic).*?(?:([\d.]+) fps.*)?$"
    has_video = re.search(picture, text, re.M)

    # Seek to a second before, decode that too, and cut it off. In Vorbis files, which have no
    # video, seeking is not exact: those are decoded from the start.
    seek = max(0.0, start - 1) if has_video else 0.0
    lead = start - seek
    until = [] if seconds is None else ["-t", f"{lead + seconds + 1:.6f}"]
    command = ["-loglevel", "error", "-ss", f"{seek:.6f}", "-i", f"file:{path}"]
    v = f"{tmp}/v"  # raw frames
    a = f"{tmp}/a"  # raw samples
    if has_video:
        filters = video_filter(size, fps, lead, float(has_video[1] or 30))
        command += ["-map", "0:V:0", *until, "-vf", filters]
        command += ["-pix_fmt", "rgb24", "-f", "rawvideo", v]
    if has_audio:
        # first_pts=0 turns a late start into silence, but would move Vorbis files, which claim one.
        late = ":async=1:first_pts=0" if has_video else ""
        command += ["-map", "0:a:0", *until, "-af", f"aresample={rate}{late}"]
        command += ["-ac", "1", "-f", "s16le", a]
    # In a session of its own: Ctrl-C would leave files that look complete.
    run = run_ffmpeg(*command, start_new_session=True)
    if run.returncode:
        said = run.stderr.splitlines() or ["ffmpeg failed"]
        raise UserError(f"Cannot read {path}: {said[-1]}.")

    # What was decoded may be nothing.
    video = None
    audio = None
    if has_video:
        n = os.path.getsize(v) // (3 * size * size)
        if n > 0:
            video = np.memmap(v, np.uint8, "r", shape=(n, size, size, 3))
    if has_audio:
        audio = np.fromfile(a, np.int16)[round(lead * rate) :]
    return video, audio, run.stderr.strip()


def load_clip(path, frames, size, fps, rate, start=0.0):
    """`frames` frames from `start` seconds on and their sound; None for a stream it lacks.

    -> video uint8 (F, H, W, 3), center-cropped to a square, audio float32 (L,), mono. Raises
    UserError for a missing, broken or too short file.
    """
    length = frames * rate // fps
    with tempfile.TemporaryDirectory() as tmp:
        video, audio, _ = decode(path, tmp, size, fps, rate, start, frames / fps)
        if video is not None:
            video = np.array(video[:frames])
    if audio is not None and len(audio) == 0:
        audio = None

    have = []  # the share of what is asked for, of each stream
    if video is not None:
        have.append(len(video) / frames)
    if audio is not None:
        audio = audio[:length].astype(np.float32) / 32768
        have.append(len(audio) / length)
    # Codecs lose up to a frame at the end: that much is filled in.
    if min(have, default=0) < 1 - 1 / frames:
        raise UserError(f"{path} is too short: {frames / fps:g} s are needed from {start:g} s on.")
    if video is not None:
        video = np.pad(video, ((0, frames - len(video)), (0, 0), (0, 0), (0, 0)), "edge")
    if audio is not None:
        audio = np.pad(audio, (0, length - len(audio)))
    return video, audio


def through_jpeg(frames, quality):
    """What is left of frames (F, H, W, 3), 0 ... 255, after JPEG compression -> float64."""
    frames = frames.round().clip(0, 255).astype(np.uint8)
    files = [imageio.imwrite("<bytes>", x, "jpg", quality=quality) for x in frames]
    return np.stack([imageio.imread(x, "jpg") for x in files]).astype(np.float64)


def enlarge(video):
    """Frames (F, H, W, 3) uint8 -> larger or smaller ones, about 64 to 96 rows high."""
    height, width = video.shape[1:3]
    scale = max(1, 64 // height) if height < 96 else 96 / height
    # The nearest pixel, so that single ones can be seen.
    y = ((np.arange(int(height * scale)) + 0.5) / scale).astype(int)
    x = ((np.arange(int(width * scale)) + 0.5) / scale).astype(int)
    return video[:, y][:, :, x]


def spectrogram(audio, rate, columns):
    """Sound (L,) -> a picture (96, columns, 3) uint8 of its levels."""
    n = 2 ** round(np.log2(0.032 * rate))  # samples in a window
    # One window for every two columns.
    centers = ((np.arange(0, columns, 2) + 1) / columns * len(audio)).astype(int)
    windows = np.pad(audio, n // 2)[centers[:, None] + np.arange(n)]  # (columns / 2, n)
    windows = windows * np.hanning(n)
    level = 20 * np.log10(abs(np.fft.rfft(windows)).T * 4 / n + 1e-9)  # 0 dB: a sine of amplitude 1
    rows = np.linspace(n // 2, 0, 96).round().astype(int)
    level = np.clip(level[rows] / 80 + 1, 0, 1)  # (96, columns / 2)
    level = (level * 31).round() / 31  # fewer levels: a small file
    # From black over violet and red to light yellow.
    ramp = np.array([[6, 6, 20], [70, 15, 110], [190, 50, 90], [250, 140, 30], [255, 250, 160]])
    channels = [np.interp(level, np.linspace(0, 1, 5), c) for c in ramp.T]
    color = np.stack(channels, -1).astype(np.uint8)  # (96, columns / 2, 3)
    return np.repeat(color, 2, 1)[:, :columns]


def film_strip(path, video, audio, fps, rate):
    """Write a PNG: the frames in a row above a spectrogram on the same time axis.

    The spectrogram has 96 rows, 0 Hz at the bottom to rate / 2 at the top; dark is -80 dB, light
    yellow a full-scale sine. Video uint8 (F, H, W, 3) or audio (L,) may be None.
    """
    rows = []
    columns = 1024
    if video is not None:
        tiles = enlarge(torch.as_tensor(video).cpu().numpy())  # (F, h, w, 3)
        tiles = tiles & 0xF8  # fewer levels: a small file
        columns = tiles.shape[0] * tiles.shape[2]
        strip = tiles.transpose(1, 0, 2, 3)  # (h, F, w, 3)
        rows.append(strip.reshape(-1, columns, 3))  # (h, F*w, 3)
        rows.append(np.full((4, columns, 3), 40, np.uint8))
    if audio is not None:
        audio = torch.as_tensor(audio).cpu().float().numpy().reshape(-1)
        rows.append(spectrogram(audio, rate, columns))
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    imageio.imwrite(path, np.concatenate(rows))


# ---- Checkpoints, the log and samples of a run


# Options that may change when a run goes on. Any other would make it another run.
MAY_CHANGE = set(
    """
    preset out stage steps device amp compile checkpoint workers grad_accum init_from init_video
    log_every eval_every val_clips samples sampler sample_steps guidance method seconds
    sr_ckpt sr_sample_steps sr_steps sr_grad_accum griffin_lim need_good mdsa_steps
    vae_steps video_steps joint_steps video_vae audio_vae vocoder t5
""".split()
)


@contextlib.contextmanager
def whole_file(path):
    """Where to write a file that gets the name `path` when it is complete.

    Whatever happens meanwhile, the old one stays. Raises UserError for a full disk, or a folder
    that is not ours.
    """
    new = f"{path}.tmp"
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        yield new
        os.replace(new, path)
    except (OSError, RuntimeError) as error:  # torch turns some of the former into the latter
        # Half a file is of no use, and the disk may be full because of it.
        with contextlib.suppress(OSError):
            os.unlink(new)
        reason = getattr(error, "strerror", None) or "is the disk full?"
        raise UserError(f"Cannot write {path}; what was there is kept ({reason}).") from error


def save_checkpoint(path, step, cfg, parts):
    """Save parts, {name: anything with a state_dict}, with the step and the config.

    Raises UserError when it cannot be written; the old file stays.
    """
    state = {name: part.state_dict() for name, part in parts.items()}
    state["step"] = step
    state["cfg"] = dataclasses.asdict(cfg)
    with whole_file(path) as new:
        torch.save(state, new)


def load_checkpoint(path):
    """A checkpoint's dict, on the CPU. Raises UserError for a missing, damaged or foreign file."""
    if not Path(path).is_file():
        raise UserError(f"There is no checkpoint {path}.")
    try:
        # weights_only: whatever is in the file, none of it is run as code. mmap: processes on one
        # machine share the memory; files of before 2020 are no zip files and cannot be mapped.
        mapped = zipfile.is_zipfile(path)
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:  # torch raises half a dozen kinds, depending on the damage
        raise UserError(f"{path} is not a readable checkpoint ({type(error).__name__}).") from error
    if not isinstance(state, dict):
        raise UserError(f"{path} is not a checkpoint: it holds a {type(state).__name__}.")
    return state


# The names of types in .safetensors files.
SAFE_TYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


def read_safetensors(path):
    """A .safetensors file -> {name: tensor}. Raises UserError for a damaged one.

    The file has the length of the header in 8 bytes; the header, JSON, with type, shape, first and
    last byte of every tensor; the tensors.
    """
    state = {}
    try:
        # Mapped: what is copied out of it is all the memory that reading takes.
        raw = torch.from_numpy(np.memmap(path, np.uint8, mode="c"))
        start = 8 + int(raw[:8].view(torch.int64))
        header = json.loads(raw[8:start].numpy().tobytes())
        header.pop("__metadata__", None)
        for name, entry in header.items():
            first, last = entry["data_offsets"]
            # A slice would take other bytes, or fewer, without a word.
            if not 0 <= first <= last <= len(raw) - start:
                raise ValueError("bytes outside the file")
            w = raw[start + first : start + last].clone()
            state[name] = w.view(SAFE_TYPES[entry["dtype"]]).view(entry["shape"])
    except Exception as error:  # half a dozen kinds, depending on the damage
        raise UserError(f"{path} is not a readable .safetensors file ({error}).") from error
    return state


def read_weights(path):
    """A file of weights, .safetensors or torch's -> {name: tensor}.

    Raises UserError for a missing or damaged one.
    """
    if path.endswith(".safetensors"):
        return read_safetensors(path)
    state = load_checkpoint(path)
    return state.get("state_dict", state)  # Lightning's checkpoints hold other things beside it


def config_beside(path):
    """What config.json says in the folder of a file of weights; empty where there is none."""
    config = Path(path).with_name("config.json")
    try:
        return json.loads(config.read_text()) if config.exists() else {}
    except ValueError:
        raise UserError(f"{config} is damaged: it is no JSON.") from None


def load_weights(model, state, path):
    """Load a state dict, of any float type, into a model that has just these names and shapes.

    Raises UserError, which names what does not fit; path says where the weights are from.
    """
    own = model.state_dict()
    wrong = []
    for name in {**own, **state}:  # all names, in order
        if name not in own or name not in state:
            wrong.append(name)
        elif own[name].shape != getattr(state[name], "shape", None):
            wrong.append(name)
    if wrong:
        raise UserError(
            f"The weights in {path} are not for this network: {len(wrong)} names or shapes differ "
            f"({wrong[0]}, for one). Give the options that they were trained with."
        )
    model.load_state_dict(state)


def read_config(kind, state, path):
    """The config in a checkpoint's dict -> kind(...). What kind no longer knows is left out.

    Raises UserError for a file without one.
    """
    if not isinstance(state.get("cfg"), dict):
        raise UserError(f"{path} holds no config: give the options that it was trained with.")
    known = [field.name for field in dataclasses.fields(kind)]
    kept = {name: value for name, value in state["cfg"].items() if name in known}
    return kind(**kept)


def resume(path, cfg, parts):
    """Bring the parts to the state that is saved in `path` -> steps done; 0 if there is no file.

    Raises UserError for a file of another run, of an older version, or of no run; and where the
    processes of torchrun do not find the same file.
    """
    done = restore(path, cfg, parts)
    if torch.distributed.is_initialized():
        all_done = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(all_done, done)
        if min(all_done) < max(all_done):
            raise UserError(f"{path} must be one file for all nodes, on a disk that they share.")
    return done


def restore(path, cfg, parts):
    """resume() in one process."""
    if not Path(path).exists():
        return 0
    instead = "choose another --out, or move it away."
    state = load_checkpoint(path)
    if "step" not in state or "cfg" not in state:
        raise UserError(f"{path} is no checkpoint of a run: {instead}")

    # The same run? Where the learning rate falls towards the last step, that step counts, too.
    old = state["cfg"]
    new = dataclasses.asdict(cfg)
    fixed = set(new) - MAY_CHANGE
    if new.get("lr_end", 1) != 1:
        fixed.add("steps")
    for name, value in new.items():
        if name not in fixed:
            continue
        if name not in old:
            raise UserError(f"{path} is of an older version, without --{name}: {instead}")
        if old[name] != value:
            raise UserError(f"{path} is of a run with --{name} {old[name]}, not {value}: {instead}")
    for name in parts:
        if name not in state:
            raise UserError(f"{path} is of an older version, without '{name}': {instead}")

    for name, part in parts.items():
        if isinstance(part, torch.nn.Module):
            load_weights(part, state[name], path)
        elif state[name]:  # a GradScaler that was off has none
            part.load_state_dict(copy.deepcopy(state[name]))  # not what is mapped to the file
    return state["step"]


def write_lines(path, lines):
    """Write a text file whole or not at all."""
    with whole_file(path) as new:
        Path(new).write_text("".join(f"{line}\n" for line in lines))


def trim_log(path, step):
    """Start a csv file. Of one that is there, keep the rows before `step` that are not damaged."""
    path = Path(path)
    text = path.read_text(errors="replace") if path.exists() else ""
    lines = text[: text.rfind("\n") + 1].splitlines()  # a last line without its end was cut short
    if not lines or lines[0].split(",")[0] != "step":
        return write_lines(path, ["step"])
    kept = lines[:1]
    for line in lines[1:]:
        # A row is a step and then figures, nan among them, or blanks.
        if re.fullmatch("[0-9]+(,[-+.0-9einaf]*)*", line) and int(line.split(",")[0]) < step:
            kept.append(line)
    write_lines(path, kept)


def append_row(path, row):
    """Add a row of numbers to a csv file; columns that are new to it go to its right end."""
    lines = Path(path).read_text().splitlines()
    columns = lines[0].split(",")
    new = [name for name in row if name not in columns]
    if new:
        columns += new
        write_lines(path, [",".join(columns), *lines[1:]])
    # Blank where the row has no figure: validation and training fill different columns.
    cells = [f"{row[name]:.7g}" if name in row else "" for name in columns]
    with open(path, "a") as f:
        f.write(",".join(cells) + "\n")


def write_samples(folder, step, video, audio, cfg):
    """Write sampled clips as mp4 (as wav if video is None) and as film strips.

    video: uint8 (n, F, H, W, 3) or None; audio: (n, L) or None; cfg has fps and rate.
    """
    clips = audio if video is None else video
    for i in range(len(clips)):
        v = None if video is None else video[i]  # (F, H, W, 3)
        a = None if audio is None else audio[i]  # (L,)
        name = f"{folder}/step{step:06d}_{i}"
        ending = "wav" if v is None else "mp4"
        save_clip(f"{name}.{ending}", v, a, cfg.fps, cfg.rate)
        film_strip(f"{name}.png", v, a, cfg.fps, cfg.rate)


class Latents(torch.utils.data.Dataset):
    """The first n clips of a data set as latents z_v, z_a; later ones are the same again.

    They are encoded once, by model.encode(), into files of 32 clips in the folder of its run; every
    process makes its share of them.
    """

    def __init__(self, model, dataset, n, name, device, rank=0, world=1):
        self.labels = dataset.labels
        self.n = n
        # Other clips or other weights of the autoencoder, which are the frozen ones, other files.
        cfg = model.cfg
        frozen = [p for p in model.parameters() if not p.requires_grad]
        weights = sum(p.cpu().double().abs().sum().item() for p in frozen)
        clip = (cfg.frames, cfg.size, cfg.fps, cfg.rate)
        mark = clip_key(cfg.seed, f"{n} of {cfg.data}, {clip}, by {weights}")
        folder = f"{cfg.out}/latents/{name}_{mark:015x}"
        paths = [f"{folder}/{first:08d}.pt" for first in range(0, n, 32)]
        for i in tqdm(range(rank, len(paths), world), f"latents {name}", disable=rank > 0):
            if not Path(paths[i]).exists():
                batch = make_batch(dataset, 0, range(32 * i, min(n, 32 * i + 32)))
                z = model.encode(to_device(batch, device))
                clips = {"caption": batch["caption"], "label": batch["label"].tolist()}
                clips |= {name: latents.cpu() for name, latents in z.items()}
                with whole_file(paths[i]) as new:
                    torch.save(clips, new)
        if world > 1:
            torch.distributed.barrier()  # all files are there
        self.files = [torch.load(path, mmap=True, weights_only=True) for path in paths]

    def __len__(self):
        return self.n

    def __getitem__(self, i):
        file = self.files[i % self.n // 32]
        return {name: values[i % self.n % 32] for name, values in file.items()}


# ---- Any collection of clips: a data set, a folder of .npz files, a folder of videos

VIDEO_ENDINGS = (
    ".3gp .avi .flv .m2ts .m4v .mkv .mov .mp4 .mpeg .mpg .mts .mxf .ogv .ts .vob .webm .wmv".split()
)


def first_color(caption):
    """The first word of a toy clip's caption that names a color of its shapes, or None."""
    for word in caption.split():
        if word in COLORS:
            return word
    return None


def write_npz(path, video, audio, fps, rate, **said):
    """Write clips to one file, without compression: what metrics.py likes best.

    video: uint8 (n, F, H, W, 3) or None; audio: float32 (n, L) or None; said: what was said of the
    clips, label or caption, each one value for all of them, a list of n, or None.
    """
    arrays = {}
    if video is not None:
        arrays["video"] = np.asarray(video)
    if audio is not None:
        arrays["audio"] = np.asarray(audio)
    n = max(len(x) for x in arrays.values())
    for name, value in said.items():
        if value is not None:
            values = value if isinstance(value, list) else [value] * n
            arrays[name] = np.array(values)
    # As an open file: numpy would add .npz to the name.
    with whole_file(path) as new, open(new, "wb") as f:
        np.savez(f, fps=fps, rate=rate, **arrays)


def read_npz(path):
    """The clips of a file of write_npz, or of one with a single clip, without n.

    -> a list of dicts, and their shape, {"fps": , "rate": , and of video "frames": , "size": }.
    Raises UserError for any other file.
    """
    try:
        with np.load(path) as file:
            arrays = dict(file)
        shape = {"fps": int(arrays.pop("fps")), "rate": int(arrays.pop("rate"))}
        if "video" in arrays:
            shape["frames"], shape["size"] = arrays["video"].shape[-4:-2]
        for name, x in arrays.items():
            axes = {"video": 4, "audio": 1}.get(name, 0)  # of one clip
            arrays[name] = x.reshape(-1, *x.shape[x.ndim - axes :])
        # strict: as many sounds as videos.
        rows = zip(*arrays.values(), strict=True)
        clips = [dict(zip(arrays, row, strict=True)) for row in rows]
        # The captions of toy clips, and hardly any others, all name a color.
        colors = [first_color(caption) for caption in arrays.get("caption", ())]
        if colors and all(colors):
            for clip, color in zip(clips, colors, strict=True):
                clip["color"] = color
    except Exception as error:  # whatever numpy makes of it
        raise UserError(
            f"Cannot use {path}: it must hold video uint8 (n, F, H, W, 3), audio float32 (n, L), "
            f"fps and rate ({type(error).__name__})."
        ) from None
    return clips, shape


def choose(sources, n, protocol):
    """Which clips to take, given the video that each is from -> at most n numbers.

    Protocol plain: in random order, but in their own if all are taken. stylegan-v: one video after
    another, and a random clip of each, so that long videos do not count for more.
    """
    rng = np.random.default_rng(0)
    numbers = range(len(sources))
    if len(sources) > n:
        numbers = rng.permutation(len(sources))[:n]
    if protocol == "plain":
        return numbers
    of_video = {}  # video -> its clips
    for i in rng.permutation(len(sources)):
        of_video.setdefault(sources[i], []).append(int(i))
    videos = list(of_video.values())
    chosen = []
    for turn in range(len(numbers)):
        chosen.append(int(rng.choice(videos[turn % len(videos)])))
    return chosen


class Clips:
    """At most n clips of `what`, a data set or a folder, as a sequence of dicts.

    They hold video, audio, and what is known of label, caption, color and events; `about` says what
    they are. They are read in the shape of the attributes frames, size, fps and rate; .npz files,
    which are held in memory, come in their own. Raises UserError when there is nothing to read.
    """

    def __init__(self, what, split, n, frames=16, size=32, fps=10, rate=8000, protocol="plain"):
        if not what or protocol not in ("plain", "stylegan-v"):
            raise UserError(
                "Give --real and --fake, data sets or folders; --protocol is plain or stylegan-v."
            )
        self.frames = frames
        self.size = size
        self.fps = fps
        self.rate = rate

        # Each of these sets self.about, self.count, and self.get, from a number to a clip.
        self.sources = None  # if clips share videos: the one that each is from
        if not Path(what).is_dir():
            self.open_dataset(what, split)
        elif any(Path(what).rglob("*.npz")):
            self.open_npz(what)
        else:
            self.open_videos(what)

        self.numbers = range(self.count)[:n]
        if self.sources:
            self.numbers = choose(self.sources, n, protocol)
            if protocol == "stylegan-v":
                self.about += ", a video, then its clip (stylegan-v)"
        if len(self) == 0:
            raise UserError(f"There are no clips in {what}, or --n is 0.")
        self.about = f"{len(self)} clips of {self.about}"

    def __len__(self):
        return len(self.numbers)

    def __getitem__(self, i):
        return self.get(int(self.numbers[i]))

    def open_dataset(self, what, split):
        dataset = open_dataset(what, split, self.frames, self.size, self.fps, self.rate)
        self.about = f"{what}, {split} split"
        self.count = len(dataset)
        prepared = isinstance(dataset, PreparedClips)
        if prepared:
            self.sources = [dataset.clips[k]["source"] for k, _ in dataset.windows]

        def get(i):
            if prepared:
                clip = dataset.read(*dataset.windows[i])  # these windows do not overlap
            else:
                clip = dataset[i]
                clip["color"] = first_color(clip["caption"])
            clip["label"] = dataset.labels[clip["label"]]
            # Of the events of toy clips, impacts alone are moments that one can hear.
            if "events" in clip and clip["label"] not in ("bounce", "collide"):
                clip["events"] = []
            return clip

        self.get = get

    def open_npz(self, what):
        paths = sorted(Path(what).rglob("*.npz"))
        clips = []
        shapes = []
        for path in paths:
            some, shape = read_npz(path)
            clips += some
            shapes.append(shape)
            if shape != shapes[0]:
                raise UserError(
                    f"The clips of {path} have {shape}, those of {paths[0]} {shapes[0]}: "
                    "they cannot be compared."
                )
        # Sound alone has no frames and no size: those stay as they were given.
        self.fps = shape["fps"]
        self.rate = shape["rate"]
        self.frames = shape.get("frames", self.frames)
        self.size = shape.get("size", self.size)
        self.about = f"{len(paths)} .npz in {what}, not compressed"
        self.count = len(clips)
        self.get = clips.__getitem__

    def open_videos(self, what):
        paths = sorted(p for p in Path(what).rglob("*") if p.suffix.lower() in VIDEO_ENDINGS)
        if not paths:
            raise UserError(f"There are no .npz files and no videos in {what}.")
        seconds = self.frames / self.fps
        windows = []  # (path, second that it starts at)
        for path in paths:
            try:
                header = next(imageio_ffmpeg.read_frames(str(path)))
                fitting = int(header["duration"] / seconds + 0.1)
            except Exception as error:  # whatever ffmpeg makes of it
                raise UserError(
                    f"Cannot read {path}, or it is no video ({type(error).__name__})."
                ) from None
            for k in range(max(1, fitting)):
                windows.append((path, k * seconds))
        self.about = f"{len(paths)} videos in {what}, compressed, which changes FVD and FAD"
        self.count = len(windows)
        self.sources = [path for path, _ in windows]

        def get(i):
            path, start = windows[i]
            video, audio = load_clip(path, self.frames, self.size, self.fps, self.rate, start)
            clip = {}
            if video is not None:
                clip["video"] = video
            if audio is not None:
                clip["audio"] = audio
            return clip

        self.get = get


# ---- Your videos -> datasets/NAME
# meta.json, clips.jsonl (a line per segment), files.jsonl (one per source), shards/ (two .npy per
# segment: uint8 frames, int16 sound). Arrays appear whole, by os.replace, and the lines of a source
# after them: an interrupted run leaves nothing broken, and the same command goes on.

SETTINGS = {
    "size": (64, "pixels"),
    "fps": (10, "frames per second"),
    "rate": (16000, "Hz"),
    "segment": (34.0, "s, the unit of storage"),
    "skip_intro": (0.0, "s left out at the start"),
    "min_seconds": (1.6, "s a segment must last"),
    "silence": (-60.0, "dBFS its RMS must reach"),
    "stillness": (0.1, "gray levels, least mean change"),
    "val": (0.05, "share of files held out"),
}


def fault(video, audio, s):
    """Why a segment is of no use under the SETTINGS s, or ""."""
    if len(video) < max(2, s["min_seconds"] * s["fps"]):
        return "too short"
    rms = np.sqrt(np.mean(np.square(audio / 32768)))
    if 20 * np.log10(rms + 1e-9) < s["silence"]:
        return "silent"
    skip = math.ceil(s["size"] / 32)
    some = video[:, ::skip, ::skip].astype(np.int16)  # to save memory
    if abs(np.diff(some, axis=0)).mean() < s["stillness"]:
        return "still"
    return ""


def describe(folder, source):
    """A file's label, which is its sub-folder, and its caption, from the .txt beside it if any."""
    label = Path(source).parent.name or "unlabeled"
    caption = "a video" if label == "unlabeled" else f"a video of {label}"
    sidecar = (folder / source).with_suffix(".txt")
    if sidecar.is_file():
        words = sidecar.read_text(encoding="utf-8", errors="replace").split()
        caption = " ".join(words) or caption
    return label, caption


def cut(folder, out, work, split, s, source):
    """Decode a file once, cut it, write its good segments -> (lines for clips.jsonl, line for
    files.jsonl with the "reason" why nothing was good, or "", and as "note" what ffmpeg said)."""
    fps = s["fps"]
    rate = s["rate"]
    video, audio, note = decode(folder / source, work, s["size"], fps, rate)
    if video is None or audio is None:
        missing = "video" if video is None else "audio"
        return [], {"source": source, "reason": f"no {missing}"}
    label, caption = describe(folder, source)

    # Trust what was decoded, not the header; the last second of a damaged file is often half
    # decoded.
    n = min(len(video), len(audio) * fps // rate)
    if note:
        n -= fps
    name = hashlib.sha1(source.encode()).hexdigest()[:16]
    clips = []
    faults = Counter()
    for first in range(round(s["skip_intro"] * fps), n, round(s["segment"] * fps)):
        last = min(n, first + round(s["segment"] * fps))
        frames = last - first
        start = first * rate // fps
        parts = {
            "video": video[first:last],
            "audio": audio[start : start + frames * rate // fps],
        }
        why = fault(parts["video"], parts["audio"], s)
        if why:
            faults[why] += 1
            continue
        shard = f"{name}-{first:07d}"
        for kind, array in parts.items():
            np.save(f"{work}/new.npy", array)
            os.replace(f"{work}/new.npy", out / "shards" / f"{shard}.{kind}.npy")
        line = {
            "shard": shard,
            "source": source,
            "start": first / fps,
            "duration": frames / fps,
            "frames": frames,
            "label": label,
            "caption": caption,
            "split": split,
        }
        clips.append(line)
    reason = "" if clips else max(faults, key=faults.get, default="too short")
    return clips, {"source": source, "reason": reason, "note": note.split("\n")[0]}


def prepare_file(folder, out, tmp, held_out, s, source):
    """cut() with a folder for what is decoded; whatever is wrong with one file, the run goes on."""
    split = "val" if source in held_out else "train"
    with tempfile.TemporaryDirectory(dir=tmp, ignore_cleanup_errors=True) as work:
        try:
            return cut(folder, out, work, split, s, source)
        except Exception as error:
            note = str(error).split("\n")[0]
            return [], {"source": source, "reason": "broken", "note": note}


def list_videos(folder):
    """The videos in a folder and its sub-folders, as sorted paths from there."""
    sources = []
    for path in folder.rglob("*"):
        hidden = path.name.startswith(".")
        if path.suffix.lower() in VIDEO_ENDINGS and path.is_file() and not hidden:
            sources.append(path.relative_to(folder).as_posix())
    if not sources:
        what = "are no videos in" if folder.is_dir() else "is no folder"
        raise UserError(f"There {what} {folder}.")
    return sorted(sources)


def start_meta(out, tmp, s):
    """Write meta.json. Raises UserError when `out` was made with other settings."""
    meta = out / "meta.json"
    if meta.is_file():
        old = json.loads(meta.read_text())
        changed = [f"--{name} {old.get(name)}" for name in s if old.get(name) != s[name]]
        if changed:
            raise UserError(
                f"{out} was made with {' '.join(changed)}: use that, another --name, or delete it."
            )
    shutil.rmtree(tmp, ignore_errors=True)  # an interrupted run may have left its own
    tmp.mkdir(parents=True)
    said = {**s, "ffmpeg": imageio_ffmpeg.get_ffmpeg_version()}
    (tmp / "meta").write_text(json.dumps(said))
    os.replace(tmp / "meta", meta)


def add_lines(path, lines):
    """Append to a .jsonl file."""
    with open(path, "a", encoding="utf-8") as f:
        for line in lines:
            # Newline first: a line that a crash cut short stays one of its own.
            if f.tell() > 0:
                f.write("\n")
            f.write(json.dumps(line))


def prepare(folder, out, workers, part, parts, s):
    """The command `prepare` for every parts-th file of `folder`, with SETTINGS s, into `out`."""
    sources = list_videos(folder)
    ending = "" if parts == 1 else f"-{part}-of-{parts}"  # of files that only this machine writes
    tmp = out / "shards" / f"tmp{ending}"
    start_meta(out, tmp, s)
    done = read_lines(out, "files*.jsonl", "source")
    mine = sources[part::parts]
    todo = [source for source in mine if source not in done]
    size = 3600 * (s["fps"] * 3 * s["size"] ** 2 + s["rate"] * 2) / 1e6  # MB
    print(f"{len(mine)} files, {len(todo)} of them to do; an hour of video takes {size:.0f} MB.")

    # Held out by the hash of the name: the same on all machines.
    order = sorted(sources, key=lambda source: hashlib.sha1(source.encode()).digest())
    held_out = set(order[: max(1, round(s["val"] * len(order)))])
    job = functools.partial(prepare_file, folder, out, tmp, held_out, s)
    with ThreadPool(workers) as pool:  # threads suffice: ffmpeg is a process of its own
        results = pool.imap_unordered(job, todo)
        for clips, line in tqdm(results, total=len(todo), unit="file"):
            add_lines(out / f"clips{ending}.jsonl", clips)
            add_lines(out / f"files{ending}.jsonl", [line])
            done[line["source"]] = line
            if line.get("note"):
                verdict = line["reason"] or "damaged, kept in part"
                tqdm.write(f"{line['source']}: {verdict}: {line['note']}")
    shutil.rmtree(tmp, ignore_errors=True)
    report([done[source] for source in mine], out)


def report(lines, out):
    """Print how many files were of use, or why not, and what the data set holds."""
    table = Counter()
    for line in lines:
        reason = line["reason"]
        table[f"files skipped: {reason}" if reason else "files ok"] += 1
    clips = read_lines(out, "clips*.jsonl", "shard").values()
    table["clips"] = len(clips)
    table["hours"] = round(sum(clip["duration"] for clip in clips) / 3600, 3)
    for name, count in table.items():
        print(f"{name:30}{count:>10}")


def preview(name, n, out, size, fps, rate):
    """Write n clips of a data set as mp4 and PNG, and all the PNGs in one, sheet.png."""
    dataset = open_dataset(name, "train", 16, size, fps, rate)
    strips = []
    for i in range(n):
        clip = dataset[i]
        path = out / f"{i:02d}-{dataset.labels[clip['label']]}"
        save_clip(f"{path}.mp4", clip["video"], clip["audio"], fps, rate)
        film_strip(f"{path}.png", clip["video"], clip["audio"], fps, rate)
        strip = imageio.imread(f"{path}.png")
        strips.append(np.pad(strip, ((0, 12), (0, 0), (0, 0))))
        print(f"{path}.mp4  {clip['caption']}")
    imageio.imwrite(out / "sheet.png", np.concatenate(strips))


def run(args):
    """Do what the command line asks for. Raises UserError where that makes no sense."""
    counts = (args.size, args.fps, args.rate, args.n, args.workers)
    if min(counts) < 1 or args.segment * args.fps < 2:
        raise UserError(
            "--size, --fps, --rate, --n and --workers are at least 1, --segment two frames."
        )
    if args.command == "preview":
        preview(args.what, args.n, Path(args.out), args.size, args.fps, args.rate)
        return
    shard = re.fullmatch(r"(\d+)/(\d+)", args.shard)
    if not args.name or not shard or int(shard[1]) >= int(shard[2]):
        raise UserError("prepare needs --name NAME; --shard must be i/n with i from 0 to n - 1.")
    settings = {name: getattr(args, name) for name in SETTINGS}
    out = ROOT / args.name
    prepare(Path(args.what), out, args.workers, int(shard[1]), int(shard[2]), settings)


def main(argv=None):
    options = {
        "name": ("", "of the data set to prepare"),
        "workers": (2, "files decoded at a time"),
        "shard": ("0/1", "i/n: this is machine i of n that share the folder"),
        "n": (10, "clips to preview"),
        "out": ("out/preview", "folder for them"),
        **SETTINGS,
    }
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="python data.py preview NAME | prepare FOLDER --name NAME  (options: --help)",
    )
    parser.add_argument("command", choices=["preview", "prepare"])
    parser.add_argument(
        "what", help="set, or folder of videos: sub-folder = label, x.txt = caption of x.mp4"
    )
    for name, (default, text) in options.items():
        text = f"{text} ({default})"
        parser.add_argument(f"--{name}", type=type(default), default=default, help=text)
    args = parser.parse_args(argv)
    try:
        run(args)
    except UserError as error:
        end("data.py", error)
    except KeyboardInterrupt:
        end("data.py", "interrupted")


if __name__ == "__main__":
    main()
