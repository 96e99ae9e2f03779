"""Clips with sound: the built-in data set, your own videos, the loader, and all that is on disk.

A clip is a dict: video uint8 (F, H, W, 3); audio float32 (L,), mono in [-1, 1], the
L = F * rate // fps samples of exactly the same time; label, an index into dataset.labels; caption.

    python data.py preview toy                     # some clips of a data set, and a picture of all
    python data.py prepare FOLDER --name concerts  # a folder of videos -> datasets/concerts
"""
import argparse
import ast
import contextlib
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
import typing
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


# What parse_value asks for, by kind.
WANTED = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    tuple: "numbers with commas between them",
}


def parse_value(kind, text):
    """A word of the command line -> a value of `kind`, read as Python would read it.

    kind: int, float, bool, str, tuple, or a typing.Literal of strings. A tuple needs no brackets:
    "-0.55,0.0", "2", and "" for the empty one. Raises argparse.ArgumentTypeError.
    """
    if kind is str:
        return text
    if typing.get_origin(kind) is typing.Literal:
        choices = typing.get_args(kind)
        if text not in choices:
            raise argparse.ArgumentTypeError(f"'{text}' is none of {', '.join(choices)}")
        return text

    if kind is bool:
        text = text.capitalize()  # true is True
    if kind is tuple and not text.strip():
        return ()
    try:
        value = ast.literal_eval(text)
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


# ---- Toy ---------------------------------------------------------------------------------------------------
# Five scenes whose sound is caused by what is seen; in frame heights and seconds, so alike at any size.

SCENES = ("bounce", "collide", "glide", "pulse", "rain")
CAPTIONS = ("a {size} {color} ball bouncing {tempo} on {back}, {pitch} ringing impacts",
            "two {size} {color} blocks colliding {tempo} on {back}, {pitch} knocks",
            "a {size} {color} disc gliding {tempo} on {back}, the tone follows its height",
            "a {size} {color} disc pulsing {tempo} on {back}, a {pitch} tone swells with it",
            "{size} {color} raindrops gusting {tempo} on {back}, {pitch} hiss")
PERIODS = (0.45, 0.8), (0.5, 0.9), (1.2, 2.4), (0.6, 1.2), (0.8, 1.5)  # s; at least one event in 1.6 s
COLORS = {"red": (235, 45, 45), "green": (45, 205, 75), "blue": (60, 110, 255)}  # few and far apart: soon learned
BACKS = {"black": (8, 8, 8), "navy": (14, 16, 56), "gray": (52, 52, 52)}
SUNG, KNOCK = ((1, 0.6), (2, 0.3), (3, 0.15)), ((1, 0.52), (1.7, 0.34), (2.9, 0.21))  # (ratio, amplitude)


def toy_clip(seed, index, frames=16, size=32, fps=10, rate=8000, scenes=SCENES):
    """Clip `index` of the endless data set `seed`. "label" is an index into SCENES; "events" (float32, s) are moments
    that both streams mark: impacts (bounce, collide), turning points (glide), greatest radius (pulse) or density
    (rain). The frame of an impact shows it on a brighter background, other frames their middle."""
    rng = np.random.default_rng([seed, index])
    label = SCENES.index(scenes[index % len(scenes)])  # in turn, which balances the batches
    color, back, which = rng.choice(list(COLORS)), rng.choice(list(BACKS)), rng.integers(3)
    radius, (low, high) = (0.14, 0.19, 0.25)[which] * rng.uniform(0.92, 1.08), PERIODS[label]
    period, pitch = rng.uniform(low, high), 900 * (0.14 / radius) ** 1.5  # Hz: small things sound high
    mask, audio, events = _scene(SCENES[label], rng, radius, pitch, period, frames, size, fps, rate)
    events = events[(events >= 0) & (events < frames / fps)]
    ground = np.tile(np.float32(BACKS[back]), (frames, 1))  # (F, 3)
    ground[(events * fps).astype(int)] += 80 * (label < 2)  # a flash at each impact (bounce, collide)
    video = np.empty((frames, size, size, 3), np.uint8)
    for c in range(3):  # one channel at a time is three times as fast as broadcasting over a last axis of 3
        b = ground[:, c, None, None]
        video[..., c] = b + mask * (np.float32(COLORS[color][c]) - b) + np.float32(0.5)
    words = {"size": ("small", "medium", "large")[which], "pitch": ("high", "middle", "low")[which],
             "color": color, "back": back, "tempo": "quickly" if period < (low + high) / 2 else "slowly"}
    return {"video": video, "audio": audio.astype(np.float32), "label": label,
            "caption": CAPTIONS[label].format(**words), "events": events.astype(np.float32)}


def _scene(name, rng, r, pitch, period, frames, size, fps, rate):  # -> coverage (F, H, W), audio (L,), event times
    t, ta, end = (np.arange(frames) + 0.5) / fps, np.arange(frames * rate // fps) / rate, frames / fps
    grid, (phase, drift) = (np.arange(size) + 0.5) / size, rng.uniform(0, 1, 2)
    beats = period * (np.arange(end / period + 2) - phase)  # the first is before 0
    contacts = beats[(beats >= 0) & (beats < end) & (name in ("bounce", "collide"))]
    t[(contacts * fps).astype(int)] = contacts
    cycle, cycle_a = t / period + phase, np.float32(ta / period + phase)  # whole at the beats
    swing, swing_a = 0.5 + 0.5 * np.cos(tau * cycle), 0.5 + 0.5 * np.cos(tau * cycle_a)  # 1 at the beats
    wander, (x, y) = 0.5 + 0.28 * np.sin(tau * (t / 2.5 + drift)), rng.uniform(0.4, 0.6, 2)

    def cover(inside):  # how far a pixel's center is inside a shape -> its anti-aliased coverage 0 ... 1
        return np.clip(np.asarray(inside, np.float32) * np.float32(size) + np.float32(0.5), 0, 1)

    def disc(x, y, r):  # at x, y (F,) with radius r, a number or (F,)
        dx, dy = (np.square(grid - c[:, None], dtype=np.float32) for c in (x, y))  # (F, W), (F, H)
        return cover(np.reshape(np.float32(r), (-1, 1, 1)) - np.sqrt(dy[:, :, None] + dx[:, None]))

    if name == "bounce":  # under gravity, 7.2 frame heights/s^2; every impact on the floor rings
        y = 1 - r - 3.6 * period**2 * (cycle % 1) * (1 - cycle % 1)
        return disc(wander, y, r), 0.95 * _strike(ta, beats, pitch, SUNG, 0.15), beats
    if name == "collide":  # the gap |sin| is sharp where two blocks meet and knock, smooth where they turn
        half, gap = 0.6 * r, (0.4 - 1.2 * r) * abs(np.sin(np.pi * cycle[:, None]))
        mask = cover(half - abs(abs(grid - x) - half - gap))[:, None] * cover(half - abs(grid - y))[:, None]
        return mask, 0.95 * _strike(ta, beats, pitch, KNOCK, 0.1), beats
    if name == "glide":  # a disc wanders; the pitch follows its height, 1.4 octaves from 290 Hz
        tone, turns = 0.38 * _tone(290 * 2 ** (1.4 * swing_a), rate), [beats, beats + period / 2]
        return disc(wander, 0.78 - 0.56 * swing, r), tone, np.sort(np.concatenate(turns))
    if name == "pulse":  # a disc swells and shrinks; the loudness follows its radius
        tone = (0.04 + 0.7 * swing_a**1.5) * _tone(np.full_like(ta, pitch), rate)
        return disc(x + 0 * t, y + 0 * t, r * (0.45 + 1.1 * swing)), tone, beats
    n, length, width = 14, 0.65 * r, 0.13 * r  # rain: the streaks seen and the hiss follow a density
    x, y, rank = (rng.permutation(n) + 0.5) / n, rng.uniform(0, 1, n), (np.arange(n) + 0.5) / n
    y = (y + 1.2 * t[:, None]) % (1 + 2 * length) - length  # (F, n)
    seen = np.clip((1.2 * swing[:, None] - rank) / 0.2, 0, 1).astype(np.float32)  # (F, n) opacity
    down = cover(length - abs(grid[:, None] - y[:, None])) * seen[:, None]  # (F, H, n)
    mask = np.minimum(down @ cover(width - abs(x[:, None] - grid)), 1)  # (F, H, W)
    # Two seconds of noise half an octave around 1.6 pitch, from its spectrum: the same wave at any rate.
    f, angle = np.arange(1, 7200) / 2, rng.uniform(0, tau, 7199).astype(np.float32)  # Hz, fits 8 kHz
    level = np.exp(-2 * np.log2(f / (1.6 * pitch)) ** 2)
    spectrum = np.concatenate([[0], level * (np.cos(angle) + 1j * np.sin(angle))])[:rate]
    noise = np.fft.irfft(spectrum, 2 * rate) * rate * np.sqrt(2 / (level @ level))  # RMS 1
    return mask, np.clip((0.03 + 0.27 * swing_a) * np.resize(noise, len(ta)), -0.99, 0.99), beats


def _strike(ta, events, pitch, partials, decay):  # at `events`, sorted, the first before 0; each blow starts anew
    audio, starts = np.empty(len(ta), np.float32), [*np.searchsorted(ta, events), len(ta)]
    for event, a, b in zip(events, starts, starts[1:]):  # noqa: B905  one more start than events
        since = (ta[a:b] - event).astype(np.float32)
        audio[a:b] = sum(level * np.sin(np.float32(pitch * ratio) * tau * since) for ratio, level in partials)
        audio[a:b] *= np.exp(since * np.float32(-1 / decay))
    return audio


def _tone(f, rate):  # of frequency f (L,), Hz; its phase is a running (trapezoidal) sum: smooth, alike at any rate
    cycles = (np.cumsum(f, dtype=np.float64) - (f + f[0]) / 2) / rate
    phase = tau * (cycles - np.floor(cycles)).astype(np.float32)
    return sum(np.float32(level) * np.sin(np.float32(ratio) * phase) for ratio, level in SUNG)


# ---- Data sets and batches ---------------------------------------------------------------------------------
class ToyClips(torch.utils.data.Dataset):
    """toy_clip as a data set: val is 1024 clips from number 2^40 on, train is all numbers before."""
    labels = list(SCENES)

    def __init__(self, scenes, val, frames, size, fps, rate, seed):
        self.numbers = range(2**40, 2**40 + 1024) if val else range(2**40)
        self.seed, self.args = seed, (frames, size, fps, rate, scenes)

    def __len__(self):
        return len(self.numbers)

    def __getitem__(self, i):
        return toy_clip(self.seed, self.numbers[i], *self.args)


class PreparedClips(torch.utils.data.Dataset):
    """Windows of the segments in datasets/NAME: disjoint ones in order (val), random ones (train); len() counts the
    former. Files are mapped when a clip is read, so none stays open."""

    def __init__(self, name, val, frames, size, fps, rate, seed):
        self.folder, self.val, self.seed, self.kind = ROOT / name, val, seed, (frames, size, rate)
        if not (self.folder / "meta.json").is_file():
            there = ", ".join(sorted(p.parent.name for p in ROOT.glob("*/meta.json")))
            raise UserError(f"There is no data set '{name}' in {ROOT}/: make it with `python data.py prepare "
                            f"FOLDER --name {name}`." + (f" There are: {there}." if there else ""))
        self.meta = m = json.loads((self.folder / "meta.json").read_text())
        if m["fps"] != fps or m["size"] % size or m["rate"] % rate:
            raise UserError(f"{self.folder} has size {m['size']}, {m['fps']} fps, {m['rate']} Hz: run "
                            f"`data.py prepare FOLDER --name NAME --size {size} --fps {fps} --rate {rate}`.")
        clips = read_lines(self.folder, "clips*.jsonl", "shard").values()
        self.labels, sources = sorted({c["label"] for c in clips}), {c["source"] for c in clips}
        held_out = {c["source"] for c in clips if c["split"] == "val"} or {max(sources, default="")}  # if none was good
        self.clips = [c for c in clips if (c["source"] in held_out) == val and c["frames"] >= frames]
        if not self.clips:
            raise UserError(f"{self.folder} has no clips of {frames} frames for {'val' if val else 'train'}: "
                            "prepare longer videos, and at least two files.")
        counts = [c["frames"] - frames + 1 for c in self.clips]
        self.windows = [(k, first) for k, n in enumerate(counts) for first in range(0, n, frames)]
        self.ends = np.cumsum(counts)

    def __len__(self):
        return len(self.windows)

    def __getitem__(self, i):
        if self.val:
            k, first = self.windows[i]
        else:  # every window of every segment is equally likely
            draw = np.random.default_rng([self.seed, i]).integers(self.ends[-1])
            k = int(np.searchsorted(self.ends, draw, "right"))
            first = int(self.ends[k] - 1 - draw)
        return self.read(k, first)

    def read(self, k, first):
        c, (frames, size, rate), fps, stored = self.clips[k], self.kind, self.meta["fps"], self.meta["rate"]
        zoom, skip = self.meta["size"] // size, stored // rate
        path = f"{self.folder}/shards/{c['shard']}"
        video = np.load(f"{path}.video.npy", mmap_mode="r")[first:first + frames]
        if zoom > 1:  # area mean
            video = video.reshape(frames, size, zoom, size, zoom, 3).mean((2, 4)).round()
        audio = np.load(f"{path}.audio.npy", mmap_mode="r")[first * stored // fps:][:frames * stored // fps]
        audio = audio / np.float32(32768)
        if skip > 1:  # low-pass at 0.92 of the new Nyquist frequency; symmetric, so without delay
            taps = np.sinc(np.arange(-24 * skip, 24 * skip + 1) * 0.92 / skip) * np.hanning(48 * skip + 1)
            audio = np.convolve(np.pad(audio, 24 * skip, "reflect"), taps / taps.sum(), "valid")[::skip]
        return {"video": np.array(video, np.uint8), "audio": np.float32(audio[:frames * rate // fps]),
                "label": self.labels.index(c["label"]), "caption": c["caption"]}


def open_dataset(name, split="train", frames=16, size=32, fps=10, rate=8000, seed=0):
    """Split "train" or "val" of "toy", "toy:bounce,glide" (some scenes), or a set prepared in datasets/.
    dataset[i] depends on (seed, split, i) only; train: any i >= 0, val: i < len(dataset). A prepared set also gives
    any size and rate that divide its own. Raises UserError for an unknown name or unfit clips."""
    toy, _, scenes = name.partition(":")
    scenes = tuple(scenes.split(",")) if scenes else SCENES
    if split not in ("train", "val") or not set(scenes) <= set(SCENES):
        raise UserError(f"There is no '{split}' of '{name}': use train or val, and {', '.join(SCENES)}.")
    kind, source = (ToyClips, scenes) if toy == "toy" else (PreparedClips, name)
    return kind(source, split == "val", frames, size, fps, rate, seed)


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
    be smaller. Raises UserError when there are fewer clips than processes.
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
        batches.append(make_batch(dataset, seed, mine[first : first + share]))
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


# ---- Checkpoints, the log and samples of a run


# Options that may change when a run goes on. Any other would make it another run.
MAY_CHANGE = set("""
    preset out stage steps device amp compile checkpoint workers grad_accum init_from
    log_every eval_every val_clips samples sampler sample_steps guidance method seconds
    sr_ckpt sr_sample_steps griffin_lim need_good mdsa_steps
""".split())


@contextlib.contextmanager
def writing(path):
    """Turn what the system says of a full disk, or of a folder that is not ours, into UserError."""
    try:
        yield
    except (OSError, RuntimeError) as error:  # torch turns some of the former into the latter
        reason = getattr(error, "strerror", None) or "is the disk full?"
        raise UserError(f"Cannot write {path}; what was there is kept ({reason}).") from error


def save_checkpoint(path, step, cfg, parts):
    """Save parts, {name: anything with a state_dict}, with the step and the config.

    The file gets its name when it is complete: whatever happens meanwhile, the old one stays.
    Raises UserError when there is no room.
    """
    state = {name: part.state_dict() for name, part in parts.items()}
    state["step"] = step
    state["cfg"] = dataclasses.asdict(cfg)
    new = Path(f"{path}.tmp")
    try:
        with writing(path):
            new.parent.mkdir(parents=True, exist_ok=True)
            torch.save(state, new)
            os.replace(new, path)
    except UserError:
        # Half a file is of no use, and the disk may be full because of it.
        with contextlib.suppress(OSError):
            new.unlink()
        raise


def load_checkpoint(path):
    """A checkpoint's dict, on the CPU. Raises UserError for a missing, damaged or foreign file."""
    if not Path(path).is_file():
        raise UserError(f"There is no checkpoint {path}.")
    try:
        # weights_only: whatever is in the file, none of it is run as code.
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises half a dozen kinds, depending on the damage
        raise UserError(f"{path} is not a readable checkpoint ({type(error).__name__}).") from error
    if not isinstance(state, dict):
        raise UserError(f"{path} is not a checkpoint: it holds a {type(state).__name__}.")
    return state


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

    Raises UserError for a file of another run, of an older version, or of no run.
    """
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
    if old.get("lr_end", 1) != 1 or new.get("lr_end", 1) != 1:
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
            part.load_state_dict(state[name])
    return state["step"]


def write_lines(path, lines):
    """Write a text file whole or not at all."""
    with writing(path):
        Path(f"{path}.tmp").write_text("".join(f"{line}\n" for line in lines))
        os.replace(f"{path}.tmp", path)


def trim_log(path, step):
    """Start a csv file. Of one that is there, keep the rows before `step` that are not damaged."""
    path = Path(path)
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
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
    with writing(path), open(path, "a") as f:
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


# ---- Clips in and out --------------------------------------------------------------------------------------
def save_clip(path, video, audio, fps, rate):
    """Write video uint8 (F, H, W, 3) and audio (L,) in [-1, 1] as .mp4 (H.264, AAC, for any browser), or .wav when
    video is None; audio may be None too. Sound is cut or zero-padded to F * rate // fps samples; an odd height or width
    gains a copy of its last line. Raises UserError for another file ending."""
    path, ending = Path(path), ".wav" if video is None else ".mp4"
    if path.suffix != ending:
        raise UserError(f"Cannot write {path}: {'sound' if video is None else 'video'} must end in {ending}.")
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".saving-") as tmp:  # one disk, atomic
        # Players that ignore the edit list are 1024 samples late: 21 ms at 48 kHz, but 128 ms at 8 kHz.
        options = ["-crf", "10", "-movflags", "+faststart", "-ar", "48000"]
        new, wav, sound = f"{tmp}/new{ending}", f"{tmp}/new.wav", {}
        if audio is not None:
            sound = {"audio_path": wav, "audio_codec": "aac"}
            audio = torch.as_tensor(audio).cpu().float().numpy()
            n = audio.size if video is None else len(video) * rate // fps  # longer sound outlasts the frames
            audio = np.pad(np.clip(audio.reshape(-1)[:n], -1, 1), (0, max(0, n - audio.size)))
            soundfile.write(wav, audio, rate, subtype="PCM_16")
        if video is not None:
            odd = [(0, n % 2 if axis in (1, 2) else 0) for axis, n in enumerate(video.shape)]
            video = np.pad(torch.as_tensor(video).cpu().numpy(), odd, "edge")
            imageio.mimwrite(new, video, format="FFMPEG", fps=fps, quality=None, macro_block_size=1,
                             ffmpeg_log_level="error", output_params=options, **sound)
        os.replace(new, path)


def decode(path, tmp, size, fps, rate, start=0.0, seconds=None):
    """What `path` holds from `start` seconds on (all, or about `seconds`), both streams on one clock: video
    (n, size, size, 3) uint8, mapped to a file in folder tmp, or None; audio (m,) int16 or None; and ffmpeg's
    complaints. Lengths are what was decoded, whatever the header says. Raises UserError if ffmpeg fails."""
    ffmpeg = [imageio_ffmpeg.get_ffmpeg_exe(), "-hide_banner", "-nostdin", "-y"]
    options = {"stdin": subprocess.DEVNULL, "capture_output": True, "encoding": "utf-8", "errors": "replace"}
    text = subprocess.run([*ffmpeg, "-i", f"file:{path}"], **options).stderr
    has_audio = re.search(r"^ *Stream #.* Audio: ", text, re.M)
    has_video = re.search(r"^ *Stream #.* Video: (?!.*attached pic).*?(?:([\d.]+) fps.*)?$", text, re.M)
    seek = max(0.0, start - 1) if has_video else 0.0  # in Vorbis files it is not exact
    v, a, lead = os.path.join(tmp, "v"), os.path.join(tmp, "a"), start - seek  # lead is decoded, then cut off
    until = [] if seconds is None else ["-t", f"{lead + seconds + 1:.6f}"]
    command = [*ffmpeg, "-loglevel", "error", "-ss", f"{seek:.6f}", "-i", f"file:{path}"]
    if has_video:
        # fps=round=up shows the LAST frame at each tick: half a source frame earlier, this is the NEAREST.
        # start_time=0 repeats the first frame of a late video. Then: square pixels, fill the square, crop.
        early = lead + 0.5 / float(has_video[1] or 30)
        graph = (f"setpts=PTS-{early:.6f}/TB,fps={fps}:round=up:start_time=0,scale=iw*sar:ih,setsar=1,"
                 f"scale={size}:{size}:force_original_aspect_ratio=increase:flags=area,crop={size}:{size}")
        command += ["-map", "0:V:0", *until, "-vf", graph, "-pix_fmt", "rgb24", "-f", "rawvideo", v]
    if has_audio:  # first_pts=0 turns a late start into silence, but would move Vorbis files, which claim one
        late = ":async=1:first_pts=0" if has_video else ""
        command += ["-map", "0:a:0", *until, "-af", f"aresample={rate}{late}", "-ac", "1", "-f", "s16le", a]
    run = subprocess.run(command, start_new_session=True, **options)  # Ctrl-C would leave files that look complete
    if run.returncode:
        raise UserError(f"Cannot read {path}: {(run.stderr.splitlines() or ['ffmpeg failed'])[-1]}.")
    n = os.path.getsize(v) // (3 * size * size) if has_video else 0
    return (np.memmap(v, np.uint8, "r", shape=(n, size, size, 3)) if n else None,
            np.fromfile(a, np.int16)[round(lead * rate):] if has_audio else None, run.stderr.strip())


def load_clip(path, frames, size, fps, rate, start=0.0):
    """`frames` frames from `start` seconds on and their sound: video uint8 (F, H, W, 3), center-cropped to a square,
    audio float32 (L,), mono; None for a stream it lacks. Raises UserError for a missing, broken or too short file."""
    length = frames * rate // fps
    with tempfile.TemporaryDirectory() as tmp:
        video, audio, _ = decode(path, tmp, size, fps, rate, start, frames / fps)
        video = None if video is None else np.array(video[:frames])
    audio = None if audio is None or not len(audio) else audio[:length].astype(np.float32) / 32768
    have = min([len(x) / n for x, n in ((video, frames), (audio, length)) if x is not None], default=0)
    if have < 1 - 1 / frames:  # codecs lose up to a frame at the end: that much is filled in
        raise UserError(f"{path} is too short: {frames / fps:g} s are needed from {start:g} s on.")
    if video is not None:
        video = np.pad(video, ((0, frames - len(video)), (0, 0), (0, 0), (0, 0)), "edge")
    return video, audio if audio is None else np.pad(audio, (0, length - len(audio)))


def film_strip(path, video, audio, fps, rate):
    """Write a PNG: the frames in a row above a spectrogram on the same time axis (96 rows, 0 Hz at the bottom to
    rate / 2; dark is -80 dB, light yellow a full-scale sine). Video or audio may be None."""
    rows, columns = [], 1024
    if video is not None:
        video = torch.as_tensor(video).cpu().numpy()
        scale = max(1, 64 // video.shape[1]) if video.shape[1] < 96 else 96 / video.shape[1]
        y, x = (((np.arange(int(n * scale)) + 0.5) / scale).astype(int) for n in video.shape[1:3])
        tiles, columns = video[:, y][:, :, x] & 0xF8, len(video) * len(x)  # fewer levels: a small file
        rows = [tiles.transpose(1, 0, 2, 3).reshape(len(y), -1, 3), np.full((4, columns, 3), 40, np.uint8)]
    if audio is not None:
        audio, n = torch.as_tensor(audio).cpu().float().numpy().reshape(-1), 2 ** round(np.log2(0.032 * rate))
        centers = ((np.arange(0, columns, 2) + 1) / columns * len(audio)).astype(int)
        windows = np.pad(audio, n // 2)[centers[:, None] + np.arange(n)] * np.hanning(n)  # (columns / 2, n)
        level = 20 * np.log10(abs(np.fft.rfft(windows)).T * 4 / n + 1e-9)  # 0 dB: a sine of amplitude 1
        level = np.clip(level[np.linspace(n // 2, 0, 96).round().astype(int)] / 80 + 1, 0, 1)
        ramp = np.array([[6, 6, 20], [70, 15, 110], [190, 50, 90], [250, 140, 30], [255, 250, 160]])
        color = np.stack([np.interp((level * 31).round() / 31, np.linspace(0, 1, 5), c) for c in ramp.T], -1)
        rows.append(np.repeat(color.astype(np.uint8), 2, 1)[:, :columns])
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    imageio.imwrite(path, np.concatenate(rows))


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
    with writing(path):
        with open(f"{path}.new", "wb") as f:
            np.savez(f, fps=fps, rate=rate, **arrays)
        os.replace(f"{path}.new", path)


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
        if isinstance(dataset, PreparedClips):
            self.sources = [dataset.clips[k]["source"] for k, _ in dataset.windows]

        def get(i):
            if isinstance(dataset, PreparedClips):
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
            # Sound alone has no frames and no size: what both know must agree.
            for name, value in shape.items():
                if shapes[0].get(name, value) != value:
                    raise UserError(
                        f"The clips of {path} have {name} {value}, those of {paths[0]} "
                        f"{shapes[0][name]}: they cannot be compared."
                    )
        for shape in shapes:
            self.__dict__.update(shape)
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


# ---- Your videos -> datasets/NAME --------------------------------------------------------------------------
# meta.json, clips.jsonl (a line per segment), files.jsonl (one per source), shards/ (two .npy per segment: uint8
# frames, int16 sound). Arrays appear whole, by os.replace, and the lines of a source after them: an interrupted
# run leaves nothing broken, and the same command goes on.

SETTINGS = {"size": (64, "pixels"), "fps": (10, "frames per second"), "rate": (16000, "Hz"),
            "segment": (34.0, "s, the unit of storage"), "skip_intro": (0.0, "s left out at the start"),
            "min_seconds": (1.6, "s a segment must last"), "silence": (-60.0, "dBFS its RMS must reach"),
            "stillness": (0.1, "gray levels, least mean change"), "val": (0.05, "share of files held out")}


def read_lines(folder, pattern, key):
    """{entry[key]: entry}, sorted, of the .jsonl files (each machine has its own), whatever a crash left."""
    text = "\n".join(path.read_text(encoding="utf-8") for path in sorted(folder.glob(pattern)))
    entries = (json.loads(x) for x in text.splitlines() if x.endswith("}"))  # not a line cut short
    return dict(sorted({e[key]: e for e in entries}.items()))


def fault(video, audio, s):
    """Why a segment is of no use under the SETTINGS s, or ""."""
    if len(video) < max(2, s["min_seconds"] * s["fps"]):
        return "too short"
    if 20 * np.log10(np.sqrt(np.mean(np.square(audio / 32768))) + 1e-9) < s["silence"]:
        return "silent"
    some = video[:, ::-(-s["size"] // 32), ::-(-s["size"] // 32)].astype(np.int16)  # to save memory
    return "still" if abs(np.diff(some, axis=0)).mean() < s["stillness"] else ""


def prepare_file(folder, out, tmp, held_out, s, source):
    """Decode a file once, cut it, write its good segments -> (lines for clips.jsonl, line for files.jsonl
    with the "reason" why nothing was good, or "", and as "note" what ffmpeg complained of)."""
    clips, faults, fps, rate, step = [], Counter(), s["fps"], s["rate"], round(s["segment"] * s["fps"])
    with tempfile.TemporaryDirectory(dir=tmp, ignore_cleanup_errors=True) as work:
        try:
            video, audio, note = decode(folder / source, work, s["size"], fps, rate)
            if video is None or audio is None:
                return [], {"source": source, "reason": "no video" if video is None else "no audio"}
            label, sidecar = Path(source).parent.name or "unlabeled", (folder / source).with_suffix(".txt")
            words = sidecar.read_text(encoding="utf-8", errors="replace").split() if sidecar.is_file() else []
            caption = " ".join(words) or f"a video of {label}".removesuffix(" of unlabeled")
            # Trust what was decoded, not the header; the last second of a damaged file is often half decoded.
            n = min(len(video), len(audio) * fps // rate) - (fps if note else 0)
            for a in range(round(s["skip_intro"] * fps), n, step):
                b, shard = min(n, a + step), f"{hashlib.sha1(source.encode()).hexdigest()[:16]}-{a:07d}"
                parts = {"video": video[a:b], "audio": audio[a * rate // fps:][:(b - a) * rate // fps]}
                if why := fault(parts["video"], parts["audio"], s):
                    faults[why] += 1
                    continue
                for kind, array in parts.items():
                    np.save(f"{work}/new.npy", array)
                    os.replace(f"{work}/new.npy", out / "shards" / f"{shard}.{kind}.npy")
                clips.append({"shard": shard, "source": source, "start": a / fps, "duration": (b - a) / fps,
                              "frames": b - a, "label": label, "caption": caption,
                              "split": "val" if source in held_out else "train"})
        except Exception as error:  # whatever is wrong with one file, the run goes on
            return [], {"source": source, "reason": "broken", "note": str(error).split("\n")[0]}
    why = "" if clips else max(faults, key=faults.get, default="too short")
    return clips, {"source": source, "reason": why, "note": note.split("\n")[0]}


def prepare(folder, out, workers, part, parts, s):
    """The command `prepare` for every parts-th file of `folder`, with SETTINGS s, into folder `out`."""
    sources = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*")
                     if p.suffix.lower() in VIDEO_ENDINGS and p.is_file() and not p.name.startswith("."))
    if not sources:
        raise UserError(f"There {'are no videos in' if folder.is_dir() else 'is no folder'} {folder}.")
    meta, end = out / "meta.json", "" if parts == 1 else f"-{part}-of-{parts}"  # end: of files only we write
    old = json.loads(meta.read_text()) if meta.is_file() else s
    if changed := [f"--{k} {old.get(k)}" for k in s if old.get(k) != s[k]]:
        raise UserError(f"{out} was made with {' '.join(changed)}: use that, another --name, or delete it.")
    done, mine = read_lines(out, "files*.jsonl", "source"), sources[part::parts]
    todo, hour = [x for x in mine if x not in done], 3600 * (s["fps"] * 3 * s["size"] ** 2 + s["rate"] * 2)
    print(f"{len(mine)} files, {len(todo)} of them to do; an hour of video takes {hour / 1e6:.0f} MB.")
    tmp = out / "shards" / f"tmp{end}"  # an interrupted run may have left its own
    shutil.rmtree(tmp, ignore_errors=True)
    tmp.mkdir(parents=True)
    (tmp / "meta").write_text(json.dumps({**s, "ffmpeg": imageio_ffmpeg.get_ffmpeg_version()}))
    os.replace(tmp / "meta", meta)
    order = sorted(sources, key=lambda x: hashlib.sha1(x.encode()).digest())  # the same on all machines
    held_out = set(order[:max(1, round(s["val"] * len(order)))])
    job = functools.partial(prepare_file, folder, out, tmp, held_out, s)
    with ThreadPool(workers) as pool:  # threads suffice: ffmpeg is a process of its own
        for clips, line in tqdm(pool.imap_unordered(job, todo), total=len(todo), unit="file"):
            for kind, lines in (("clips", clips), ("files", [line])):
                with open(out / f"{kind}{end}.jsonl", "a", encoding="utf-8") as f:
                    for x in lines:  # newline first: a line that a crash cut short stays one of its own
                        f.write("\n" * (f.tell() > 0) + json.dumps(x))
            done[line["source"]] = line
            if line.get("note"):
                tqdm.write(f"{line['source']}: {line['reason'] or 'damaged, kept in part'}: {line['note']}")
    shutil.rmtree(tmp, ignore_errors=True)
    lines, clips = [done[x] for x in mine], read_lines(out, "clips*.jsonl", "shard").values()
    table = Counter("files skipped: " + x["reason"] if x["reason"] else "files ok" for x in lines)
    table |= {"clips": len(clips), "hours": round(sum(c["duration"] for c in clips) / 3600, 3)}
    print("\n".join(f"{k:30}{n:>10}" for k, n in table.items()))


def preview(name, n, out, size, fps, rate):
    """Write n clips of a data set as mp4 and PNG, and all the PNGs in one, sheet.png."""
    dataset, strips = open_dataset(name, "train", 16, size, fps, rate), []
    for i, clip in enumerate(dataset[i] for i in range(n)):
        path = out / f"{i:02d}-{dataset.labels[clip['label']]}"
        save_clip(f"{path}.mp4", clip["video"], clip["audio"], fps, rate)
        film_strip(f"{path}.png", clip["video"], clip["audio"], fps, rate)
        strips.append(np.pad(imageio.imread(f"{path}.png"), ((0, 12), (0, 0), (0, 0))))
        print(f"{path}.mp4  {clip['caption']}")
    imageio.imwrite(out / "sheet.png", np.concatenate(strips))


def main(argv=None):
    options = {"name": ("", "of the data set to prepare"), "workers": (2, "files decoded at a time"),
               "shard": ("0/1", "i/n: this is machine i of n that share the folder"),
               "n": (10, "clips to preview"), "out": ("out/preview", "folder for them"), **SETTINGS}
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="python data.py preview NAME | prepare FOLDER --name NAME  (--help lists the options)")
    parser.add_argument("command", choices=["preview", "prepare"])
    parser.add_argument("what", help="set, or folder of videos: sub-folder = label, x.txt = caption of x.mp4")
    for name, (default, text) in options.items():
        parser.add_argument(f"--{name}", type=type(default), default=default, help=f"{text} ({default})")
    args = parser.parse_args(argv)
    shard = re.fullmatch(r"(\d+)/(\d+)", args.shard)
    try:
        if min(args.size, args.fps, args.rate, args.n, args.workers, args.segment * args.fps - 1) < 1:
            raise UserError("--size, --fps, --rate, --n and --workers are at least 1, --segment two frames.")
        if args.command == "preview":
            return preview(args.what, args.n, Path(args.out), args.size, args.fps, args.rate)
        if not args.name or not shard or int(shard[1]) >= int(shard[2]):
            raise UserError("prepare needs --name NAME, and --shard must be i/n with i from 0 to n - 1.")
        settings = {k: getattr(args, k) for k in SETTINGS}
        prepare(Path(args.what), ROOT / args.name, args.workers, int(shard[1]), int(shard[2]), settings)
    except (UserError, KeyboardInterrupt) as error:
        raise SystemExit(f"data.py: {error}" if str(error) else "data.py: interrupted") from None


if __name__ == "__main__":
    main()
