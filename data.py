"""Clips for nanoAV: a built-in data set, your own videos, the loader, and reading and writing a clip with its sound.

A clip is `frames` square pictures at `fps` and the `frames * rate // fps` mono samples of exactly the same time: frame k
is shown while samples [k * rate / fps, (k + 1) * rate / fps) are heard. Everywhere in nanoAV a clip is a dict with

    video    uint8   (F, H, W, 3)   0 ... 255, RGB             label    int, index into dataset.labels
    audio    float32 (L,)           -1 ... 1                   caption  str

    python data.py preview toy                        # some clips of the built-in data set, as mp4 and one picture
    python data.py prepare FOLDER --name concerts     # a folder of videos -> datasets/concerts
    python mm_diffusion.py --data concerts            # train on it

Every file is decoded once, by the ffmpeg binary that imageio-ffmpeg bundles; training only reads memory-mapped arrays.
All randomness is a function of (seed, clip number), so a run can stop anywhere, go on with another number of workers
or processes, and see the same clips.
"""
import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import imageio
import imageio_ffmpeg
import numpy as np
import soundfile
import torch
from tqdm import tqdm

ROOT = Path("datasets")                                # prepared sets live here, in the folder you run from
VIDEO_FILES = set(".3gp .avi .f4v .flv .m2ts .m4v .mkv .mov .mp4 .mpeg .mpg .mts .mxf .ogv .ts .vob .webm .wmv".split())


class DataError(Exception):
    """Something the user can mend. The message is one sentence: what is wrong and what to do."""


# ---------------------------------------------------------------------------------------------------------------------
# The built-in data set: five scenes in which the sound is caused by what is seen.
# Lengths are fractions of the frame and times are seconds, so any size, fps and rate show and sound the same clip.

SCENES = ("bounce", "collide", "glide", "pulse", "rain")
PERIODS = {"bounce": (0.45, 0.8), "collide": (0.5, 0.9), "glide": (1.2, 2.4), "pulse": (0.6, 1.2), "rain": (0.8, 1.5)}
CAPTIONS = {"bounce": "a {size} {color} ball bouncing {tempo} on {back}, {pitch} ringing impacts",
            "collide": "two {size} {color} blocks colliding {tempo} on {back}, {pitch} knocks",
            "glide": "a {size} {color} disc gliding {tempo} on {back}, the tone follows its height",
            "pulse": "a {size} {color} disc pulsing {tempo} on {back}, a {pitch} tone swells with it",
            "rain": "{size} {color} raindrops gusting {tempo} on {back}, {pitch} hiss"}
COLORS = {"red": (235, 45, 45), "green": (45, 205, 75), "blue": (60, 110, 255),
          "yellow": (250, 220, 40), "magenta": (230, 60, 220), "cyan": (40, 215, 235)}
BACKS = {"black": (8, 8, 8), "navy": (14, 16, 56), "gray": (52, 52, 52)}
SIZES = {"small": 0.10, "medium": 0.14, "large": 0.18}  # radius
FLASH = 80                                              # gray levels the background gains in the frame of an impact
HARMONICS = (1, 2, 3), (0.6, 0.3, 0.15)                 # frequency ratios and amplitudes of a sung tone
KNOCK = (1, 1.7, 2.9), (0.6, 0.4, 0.25)                 # inharmonic: wood rather than string
TWO_PI = 2 * np.pi


def toy_clip(seed, index, frames=16, size=32, fps=10, rate=8000, scenes=SCENES):
    """Clip number `index` of the endless data set `seed`.

    Returns a clip with two more entries: "label" indexes SCENES, and "events" (float32, seconds) are the moments when
    something happens in both streams: impacts (bounce, collide), turning points of the height (glide), moments of
    greatest radius (pulse) or density (rain). Clips of 1.6 s and longer have at least one. The frame during which an
    impact falls shows the instant of contact on a flashing background; other frames show the middle of their interval.
    """
    rng = np.random.default_rng([seed, index])
    scene = scenes[index % len(scenes)]                 # in turn, so that every batch is balanced
    color, back, which = rng.choice(list(COLORS)), rng.choice(list(BACKS)), rng.integers(3)
    low, high = PERIODS[scene]
    period = rng.uniform(low, high)
    radius = list(SIZES.values())[which] * rng.uniform(0.92, 1.08)
    t = (np.arange(frames) + 0.5) / fps                 # (F,) what each frame shows
    ta = np.arange(frames * rate // fps) / rate         # (L,)

    make = {"bounce": _bounce, "collide": _collide, "glide": _glide, "pulse": _pulse, "rain": _rain}[scene]
    # Small things sound high: 900, 545 and 370 Hz.
    mask, audio, events = make(rng, t, ta, fps, rate, size, radius, 900 * (0.1 / radius) ** 1.5, period)
    events = events[(events >= 0) & (events < frames / fps)]
    base = np.tile(np.float32(BACKS[back]), (frames, 1))                            # (F, 3)
    if scene in ("bounce", "collide"):
        base[(events * fps).astype(int)] += FLASH
    video = np.empty((frames, size, size, 3), np.uint8)
    for c, ink in enumerate(COLORS[color]):             # channel by channel is three times as fast as broadcasting
        b = base[:, c, None, None]
        video[..., c] = b + mask * (np.float32(ink) - b) + 0.5
    words = {"size": list(SIZES)[which], "color": color, "back": back, "pitch": ("high", "middle", "low")[which],
             "tempo": "quickly" if period < (low + high) / 2 else "slowly"}
    return {"video": video, "audio": audio.astype(np.float32), "label": SCENES.index(scene),
            "caption": CAPTIONS[scene].format(**words), "events": events.astype(np.float32)}


def _bounce(rng, t, ta, fps, rate, size, r, pitch, period):
    """A ball under gravity between the floor and two walls; every contact rings."""
    first, u0, speed, width = rng.uniform(0, period), rng.uniform(0, 2), rng.uniform(0.15, 0.4), 1 - 2 * r
    floor = first + period * np.arange(-1, ta[-1] / period + 1)
    # Horizontally the ball moves on the unfolded line u = u0 + speed t / width and hits a wall at every whole u.
    walls = (np.arange(np.floor(u0), u0 + ta[-1] * speed / width + 1) - u0) * width / speed
    events = np.sort(np.concatenate([floor, walls]))
    t = _show_contacts(t, events, fps)
    x = r + width * (1 - abs((u0 + speed * t / width) % 2 - 1))
    s = (t - first) / period % 1                        # 0 ... 1 within one hop
    height = 7.2 * period ** 2 / 2 * s * (1 - s)        # g = 7.2 frame heights per s^2
    return _disc(x, 1 - r - height, r, size), 0.95 * _strike(ta, events, pitch, *HARMONICS, decay=0.15), events


def _collide(rng, t, ta, fps, rate, size, r, pitch, period):
    """Two blocks meet, knock, and part again; the gap |sin| is sharp where they meet and smooth where they turn."""
    first, x, y = rng.uniform(0, period), rng.uniform(0.44, 0.56), rng.uniform(0.3, 0.7)
    events = first + period * np.arange(-1, ta[-1] / period + 1)
    t = _show_contacts(t, events, fps)
    half = 0.8 * r                                      # half a block's side
    reach = half + (0.43 - 2 * half) * abs(np.sin(np.pi * (t - first) / period))    # (F,) from the meeting point
    mask = np.maximum(_block(x - reach, y, half, size), _block(x + reach, y, half, size))
    return mask, 0.82 * _strike(ta, events, pitch, *KNOCK, decay=0.1), events


def _glide(rng, t, ta, fps, rate, size, r, pitch, period):
    """A disc wanders; the pitch of a steady tone follows its height, 2.5 octaves per frame height from 200 Hz."""
    phase, phase_x = rng.uniform(0, 1, 2)

    def height(t):
        return 0.5 + 0.28 * np.sin(TWO_PI * (t / period + phase))

    x = 0.5 + 0.28 * np.sin(TWO_PI * (t / (1.6 * period) + phase_x))
    events = period * (np.arange(-1, 2 * ta[-1] / period + 3) / 2 + 0.25 - phase)
    return _disc(x, 1 - height(t), r, size), 0.38 * _tone(200 * 2 ** (2.5 * height(ta)), rate), events


def _pulse(rng, t, ta, fps, rate, size, r, pitch, period):
    """A disc swells and shrinks; the loudness of a steady tone follows its radius."""
    phase, x, y = rng.uniform(0, 1), rng.uniform(0.38, 0.62), rng.uniform(0.38, 0.62)

    def swell(t):                                       # -1 ... 1
        return np.sin(TWO_PI * (t / period + phase))

    events = period * (np.arange(0, ta[-1] / period + 2) + 0.25 - phase)
    loudness = 0.04 + 0.8 * (0.5 + 0.5 * swell(ta)) ** 1.5
    return (_disc(np.full_like(t, x), np.full_like(t, y), 1.3 * r * (1 + 0.5 * swell(t)), size),
            loudness * _tone(np.full_like(ta, pitch), rate), events)


def _rain(rng, t, ta, fps, rate, size, r, pitch, period):
    """Streaks fall at one speed; how many are seen, and how loud the hiss is, follows the density."""
    n, phase = 14, rng.uniform(0, 1)
    x, y0, rank = (rng.permutation(n) + 0.5) / n, rng.uniform(0, 1, n), (np.arange(n) + 0.5) / n
    length, width = 0.9 * r, 0.18 * r                   # half lengths; width stays under the columns' distance

    def density(t):                                     # 0 ... 1
        return 0.5 + 0.5 * np.sin(TWO_PI * (t / period + phase))

    span = 1 + 2 * length
    y = (y0 + 1.2 * t[:, None]) % span - length                                     # (F, n)
    seen = np.clip((1.2 * density(t)[:, None] - rank) / 0.2, 0, 1)                  # (F, n) opacity
    down = np.clip((length - abs(_grid(size)[:, None] - y[:, None])) * size + 0.5, 0, 1) * seen[:, None]    # (F, H, n)
    across = np.clip((width - abs(x[:, None] - _grid(size))) * size + 0.5, 0, 1)    # (n, W)
    mask = np.minimum(down.astype(np.float32) @ across.astype(np.float32), 1)       # (F, H, W)

    # A two-second loop of noise made from its spectrum: the same wave at any rate. Half an octave around 1.6 pitch.
    f = np.arange(1, 7200) / 2                          # Hz; the top, 3.6 kHz, is below the Nyquist frequency of 8 kHz
    level, angle = np.exp(-2 * np.log2(f / (1.6 * pitch)) ** 2), rng.uniform(0, TWO_PI, len(f)).astype(np.float32)
    keep = min(len(f), rate - 1)
    spectrum = np.zeros(rate + 1, np.complex64)
    spectrum[1:keep + 1] = (level * (np.cos(angle) + 1j * np.sin(angle)))[:keep]
    noise = np.fft.irfft(spectrum, 2 * rate) * (rate * np.sqrt(2 / (level @ level)))                # RMS 1
    events = period * (np.arange(0, ta[-1] / period + 2) + 0.25 - phase)
    return mask, np.clip((0.03 + 0.27 * density(ta)) * np.resize(noise, len(ta)), -0.99, 0.99), events


def _grid(size):
    return (np.arange(size) + 0.5) / size               # pixel centers


def _disc(x, y, r, size):
    """Anti-aliased coverage 0 ... 1, float32 (F, H, W), of discs at x, y (F,) with radius r (scalar or (F,))."""
    dx, dy = (np.square(_grid(size) - c[:, None], dtype=np.float32) for c in (x, y))                # (F, W), (F, H)
    distance = np.sqrt(dy[:, :, None] + dx[:, None])
    return np.clip((np.reshape(np.float32(r), (-1, 1, 1)) - distance) * np.float32(size) + np.float32(0.5), 0, 1)


def _block(x, y, half, size):
    """Coverage (F, H, W) of squares with half side `half` at x (F,), y."""
    across = np.clip((half - abs(_grid(size) - x[:, None])) * size + 0.5, 0, 1).astype(np.float32)  # (F, W)
    down = np.clip((half - abs(_grid(size) - y)) * size + 0.5, 0, 1).astype(np.float32)             # (H,)
    return down[:, None] * across[:, None]


def _show_contacts(t, events, fps):
    """Frame times t (F,), where a frame during which an impact falls shows that instant instead of its middle."""
    t = t.copy()
    inside = events[(events >= 0) & (events < len(t) / fps)]
    t[(inside * fps).astype(int)] = inside
    return t


def _strike(ta, events, pitch, ratios, levels, decay):
    """Something struck at `events` (sorted, the first before 0): each blow starts the decaying sound anew."""
    audio = np.empty(len(ta), np.float32)
    starts = np.searchsorted(ta, events).tolist() + [len(ta)]
    for event, a, b in zip(events, starts, starts[1:]):
        since = (ta[a:b] - event).astype(np.float32)
        partials = sum(level * np.sin(np.float32(TWO_PI * pitch * ratio) * since) for ratio, level in zip(ratios, levels))
        audio[a:b] = partials * np.exp(since * np.float32(-1 / decay))
    return audio


def _tone(f, rate):
    """A sung tone of frequency f (L,) in Hz. The phase is a running (trapezoidal) sum: no clicks, the same at any rate."""
    cycles = (np.cumsum(f) - (f + f[0]) / 2) / rate
    phase = (TWO_PI * (cycles - np.floor(cycles))).astype(np.float32)
    return sum(np.float32(level) * np.sin(np.float32(ratio) * phase) for ratio, level in zip(*HARMONICS))


# ---------------------------------------------------------------------------------------------------------------------
# Data sets and the loader


VAL_START, VAL_CLIPS = 2 ** 40, 1024                    # toy clips from 2^40 on are for validation


class ToyClips(torch.utils.data.Dataset):
    """The built-in data set. An endless train split (its len is where the numbers end), 1024 validation clips."""
    labels = list(SCENES)

    def __init__(self, scenes, split, frames, size, fps, rate, seed):
        self.scenes, self.split, self.args, self.seed = scenes, split, (frames, size, fps, rate), seed

    def __len__(self):
        return VAL_CLIPS if self.split == "val" else VAL_START

    def __getitem__(self, i):
        if not 0 <= i < len(self):
            raise IndexError(i)
        return toy_clip(self.seed, i + VAL_START * (self.split == "val"), *self.args, self.scenes)


def open_dataset(name, split="train", frames=16, size=32, fps=10, rate=8000, seed=0):
    """The split "train" or "val" of data set `name`: "toy", "toy:bounce,glide" (some scenes), or one in datasets/.

    dataset[i] is a clip, a function of (seed, split, i) alone. Train: any i >= 0. Val: a fixed set, i < len(dataset).
    Raises DataError when there is no such set, or when it cannot give clips of this length, size, fps and rate.
    """
    if split not in ("train", "val"):
        raise DataError(f"There is no split '{split}': choose train or val.")
    if name == "toy" or name.startswith("toy:"):
        scenes = tuple(name[4:].split(",")) if name != "toy" else SCENES
        for scene in scenes:
            if scene not in SCENES:
                raise DataError(f"There is no toy scene '{scene}': choose from {', '.join(SCENES)}.")
        return ToyClips(scenes, split, frames, size, fps, rate, seed)
    return PreparedClips(name, split, frames, size, fps, rate, seed)


def clip_key(seed, number):
    """A non-negative 63-bit hash of (seed, clip number): seeds the noise of a clip, whoever draws it."""
    return int.from_bytes(hashlib.blake2b(f"{seed},{number}".encode(), digest_size=8).digest(), "little") >> 1


def make_batch(dataset, numbers, step, seed):
    """The batch of the clips `numbers`: tensors video (b, F, H, W, 3) uint8, audio (b, L) float32, label and key (b,)
    int64; caption, a list of b strings; and step, an int."""
    clips = [dataset[i] for i in numbers]
    return {"video": torch.from_numpy(np.stack([c["video"] for c in clips])),
            "audio": torch.from_numpy(np.stack([c["audio"] for c in clips])),
            "label": torch.tensor([c["label"] for c in clips]), "caption": [c["caption"] for c in clips],
            "key": torch.tensor([clip_key(seed, i) for i in numbers]), "step": step}


class _Steps(torch.utils.data.Dataset):
    """Item s is the whole batch of step s, so nothing depends on how many workers share the steps."""

    def __init__(self, dataset, batch_size, rank, world, seed):
        self.dataset, self.batch_size, self.rank, self.world, self.seed = dataset, batch_size, rank, world, seed

    def __getitem__(self, step):
        b = self.batch_size // self.world
        first = step * self.batch_size + self.rank * b
        return make_batch(self.dataset, range(first, first + b), step, self.seed)


def loader(dataset, batch_size, first_step, last_step, rank=0, world=1, workers=0, seed=0):
    """Iterate over the batches of steps first_step ... last_step - 1, prepared by `workers` processes (0: in this one).

    Step s uses clips s * batch_size ... (s + 1) * batch_size - 1, where batch_size counts ALL processes; rank r gets
    the r-th part of them. Content depends on (seed, step, rank, world) only. Dropping the iterator ends its workers.
    Raises DataError when batch_size is not a multiple of world.
    """
    if batch_size % world:
        raise DataError(f"A batch of {batch_size} clips cannot be shared by {world} processes: use a multiple of {world}.")
    options = {"prefetch_factor": 4, "persistent_workers": True} if workers else {}
    return iter(torch.utils.data.DataLoader(_Steps(dataset, batch_size, rank, world, seed), batch_size=None,
                                            sampler=range(first_step, last_step), num_workers=workers,
                                            pin_memory=torch.cuda.is_available(), **options))


def val_batches(dataset, n, batch_size, rank=0, world=1, seed=0):
    """The list of batches over clips 0 ... n - 1 (fewer when the set has fewer), dealt to the ranks in turn, so that
    the ranks together see each clip once. A batch holds batch_size // world clips as in training; the last may be smaller."""
    mine, b = range(rank, min(n, len(dataset)), world), max(1, batch_size // world)
    return [make_batch(dataset, mine[i:i + b], step, seed) for step, i in enumerate(range(0, len(mine), b))]


def to_device(batch, device):
    """The batch on `device`, with video float (B, F, 3, H, W) in [-1, 1] and audio float (B, 1, L)."""
    out = {k: x.to(device, non_blocking=True) if torch.is_tensor(x) else x for k, x in batch.items()}
    out["video"] = (out["video"].permute(0, 1, 4, 2, 3).float() / 127.5 - 1).contiguous()          # (B, F, 3, H, W)
    out["audio"] = out["audio"].float()[:, None]                                                    # (B, 1, L)
    return out


def to_uint8(video):
    """Float (B, F, 3, H, W) in [-1, 1] (clamped) -> uint8 (B, F, H, W, 3), on the same device."""
    return ((video.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 1, 3, 4, 2).contiguous()


# ---------------------------------------------------------------------------------------------------------------------
# Clips in and out


def _numpy(x):
    return x.detach().cpu().numpy() if torch.is_tensor(x) else np.asarray(x)


def save_clip(path, video, audio, fps, rate):
    """Write video uint8 (F, H, W, 3) and audio (L,) in [-1, 1] as .mp4 (H.264 + AAC, plays in a browser) or, without
    video, as .wav. Either may be None, arrays or tensors. Sound is cut or zero-padded to F * rate // fps samples; an
    odd height or width gains a copy of its last row or column. Raises DataError for another file ending.
    """
    path = Path(path)
    ending = ".wav" if video is None else ".mp4"
    if path.suffix.lower() != ending:
        raise DataError(f"Cannot write {path}: {'sound alone' if video is None else 'video'} is written as {ending}.")
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".saving-") as tmp:    # beside it, so that replace is atomic
        wav, new = os.path.join(tmp, "audio.wav"), os.path.join(tmp, "new" + ending)
        if audio is not None:
            audio = np.clip(np.nan_to_num(_numpy(audio).reshape(-1).astype(np.float32)), -1, 1)
            if video is not None:                       # ffmpeg would let a longer sound run on over the last frame
                n = len(video) * rate // fps
                audio = np.pad(audio[:n], (0, max(0, n - len(audio))))
            soundfile.write(wav if video is not None else new, audio, rate, subtype="PCM_16")
        if video is not None:
            video = _numpy(video)
            video = np.pad(video, ((0, 0), (0, video.shape[1] % 2), (0, video.shape[2] % 2), (0, 0)), "edge")
            # 48 kHz, because a player that ignores the edit list plays 1024 samples late: 21 ms then, 128 ms at 8 kHz.
            sound = {"audio_path": wav, "audio_codec": "aac"} if audio is not None else {}
            options = ["-crf", "10", "-movflags", "+faststart"] + ["-ar", "48000"] * (audio is not None)
            with imageio.get_writer(new, format="FFMPEG", fps=fps, codec="libx264", quality=None, macro_block_size=1,
                                    pixelformat="yuv420p", output_params=options, ffmpeg_log_level="error", **sound) as out:
                for frame in video:
                    out.append_data(frame)
        os.replace(new, path)


def _probe(path):
    """(frames per second or None without video, whether there is sound), from what ffmpeg lists."""
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-hide_banner", "-nostdin", "-i", f"file:{path}"]
    text = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True).stderr.decode(errors="replace")
    streams = [line for line in text.splitlines() if line.strip().startswith("Stream #")]
    videos = [line for line in streams if ": Video:" in line and "(attached pic)" not in line]
    if not videos and not any(": Audio:" in line for line in streams):
        raise DataError(f"Cannot read {path}: it is not a video or sound file that ffmpeg knows, or it is damaged.")
    found = re.search(r"([\d.]+) fps", videos[0]) if videos else None
    return (float(found[1]) if found else 30.0) if videos else None, any(": Audio:" in line for line in streams)


def decode(path, tmp, size, fps, rate, start=0.0, seconds=None):
    """The file from `start` on (all of it, or `seconds`), on one clock whose zero is `start`, by one run of ffmpeg.

    Writes two raw files into folder tmp. Returns video (n, size, size, 3) uint8 or None, memory-mapped; audio (m,)
    int16 or None; and ffmpeg's complaints, "" for a sound file. Lengths are what was really decoded, whatever the
    header says. Raises DataError when ffmpeg cannot read the file.
    """
    source_fps, has_audio = _probe(path)
    seek = max(0.0, start - 1)                          # a second early, cut off below: the exact frame, the exact sample
    v, a = os.path.join(tmp, "v"), os.path.join(tmp, "a")
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-nostdin", "-y", "-loglevel", "error", "-ss", f"{seek:.6f}", "-i", f"file:{path}"]
    limit = [] if seconds is None else ["-t", f"{start - seek + seconds + 1:.6f}"]
    if source_fps:
        # fps=round=up shows the LAST frame at each tick; half a source frame earlier makes that the NEAREST one.
        # start_time=0 repeats the first frame where the video starts late. Then square pixels, fill the square, crop.
        early = start - seek + 0.5 / source_fps
        command += ["-map", "0:V:0", *limit, "-vf", f"setpts=PTS-{early:.6f}/TB,fps={fps}:round=up:start_time=0,"
                    f"scale=iw*sar:ih,setsar=1,scale={size}:{size}:force_original_aspect_ratio=increase:flags=area,"
                    f"crop={size}:{size}", "-pix_fmt", "rgb24", "-f", "rawvideo", v]
    if has_audio:
        # first_pts=0 keeps a late start of the sound as silence. Alone, sound starts at once: Vorbis files claim otherwise.
        on_clock = ":async=1:first_pts=0" if source_fps else ""
        command += ["-map", "0:a:0", *limit, "-af", f"aresample={rate}{on_clock}", "-ac", "1", "-f", "s16le", a]
    # A session of its own: Ctrl-C must not reach ffmpeg, which would end early with a file that looks complete.
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, start_new_session=True)
    complaints = done.stderr.decode(errors="replace").strip()
    if done.returncode:
        raise DataError(f"Cannot decode {path}: {complaints.splitlines()[-1] if complaints else 'ffmpeg failed'}.")
    n = os.path.getsize(v) // (3 * size * size) if source_fps else 0
    video = np.memmap(v, np.uint8, "r", shape=(n, size, size, 3)) if n else None
    audio = np.fromfile(a, np.int16)[round((start - seek) * rate):] if has_audio else None
    return video, audio, complaints


def load_clip(path, frames, size, fps, rate, start=0.0):
    """`frames` frames from `start` seconds on and their sound, from any file ffmpeg reads.

    Returns video uint8 (F, H, W, 3), center-cropped to a square, or None for a sound file; and audio float32 (L,) in
    [-1, 1], mono, or None for a silent film. Raises DataError for a file that is missing, unreadable or too short.
    """
    if not Path(path).is_file():
        raise DataError(f"There is no file {path}.")
    length = frames * rate // fps
    with tempfile.TemporaryDirectory() as tmp:
        video, audio, _ = decode(path, tmp, size, fps, rate, start, frames / fps)
        video = None if video is None else np.array(video[:frames])
    audio = None if audio is None or not len(audio) else audio[:length].astype(np.float32) / 32768
    have = min([len(x) / n for x, n in ((video, frames), (audio, length)) if x is not None], default=0)
    if have < (frames - 1) / frames:                    # codecs may lose up to a frame at the end; that is filled below
        raise DataError(f"{path} is too short: it has {have * frames / fps:.2f} s from {start:g} s on, "
                        f"and {frames / fps:.2f} s are needed.")
    if video is not None:
        video = np.pad(video, ((0, frames - len(video)), (0, 0), (0, 0), (0, 0)), "edge")
    return video, audio if audio is None else np.pad(audio, (0, length - len(audio)))


def strip_image(video, audio, fps, rate, height=96):
    """uint8 (rows, columns, 3): the frames in a row above the spectrogram on the same time axis, 0 Hz at the bottom.
    Brightness is the level from -80 dB (dark) to that of a full-scale sine (yellow). Video or audio may be None."""
    rows, columns = [], 1024
    if video is not None:
        frames, h, w = _numpy(video).shape[:3]
        scale = -(-64 // h) if h < 64 else min(1, 96 / h)                           # whole pixels when enlarged
        y, x = (np.int64((np.arange(int(n * scale)) + 0.5) / scale) for n in (h, w))
        tiles = _numpy(video)[:, y][:, :, x]                                        # (F, h, w, 3)
        rows = [tiles.transpose(1, 0, 2, 3).reshape(len(y), -1, 3) & 0xF8, np.full((4, len(x) * frames, 3), 40, np.uint8)]
        columns = len(x) * frames
    if audio is not None:
        audio, n = _numpy(audio).reshape(-1).astype(np.float32), 2 ** round(np.log2(0.032 * rate))
        at = ((np.arange(0, columns, 2) + 1) / columns * len(audio)).astype(int)    # window centers, one per 2 pixels
        windows = np.pad(audio, n // 2 + 1)[at[:, None] + np.arange(n) + 1] * np.hanning(n)     # (columns / 2, n)
        level = 20 * np.log10(np.abs(np.fft.rfft(windows)) * 4 / n + 1e-9)          # 0 dB: a sine of amplitude 1
        level = level.T[::-1][np.linspace(0, n // 2, height).round().astype(int)]   # (height, columns / 2), top row = Nyquist
        level = (np.clip(level / 80 + 1, 0, 1) * 31).round() / 31                   # few levels: a small file
        ramp = np.array([[6, 6, 20], [70, 15, 110], [190, 50, 90], [250, 140, 30], [255, 250, 160]])
        color = np.stack([np.interp(level, np.linspace(0, 1, 5), c) for c in ramp.T], -1)
        rows.append(np.repeat(color, 2, 1)[:, :columns].astype(np.uint8))
    return np.concatenate(rows)


def film_strip(path, video, audio, fps, rate):
    """Write strip_image(...) as a PNG: what a clip looks and sounds like, at a glance."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    imageio.imwrite(path, strip_image(video, audio, fps, rate))
