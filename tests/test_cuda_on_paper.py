"""Every model file trains, resumes and samples on "cuda", on paper: see cuda_on_paper.py."""
import dataclasses
import inspect
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from cuda_on_paper import cuda_on_paper
from torch.overrides import TorchFunctionMode

import data
import mm_diffusion as mm
import proav_dit as pa
import syncflow as sf
import uniform_dit as ud

ROOT = Path(__file__).parent.parent

# What all runs have: a training step, and validation, a checkpoint and samples before and after.
SHORT = """
    --data toy --preset toy --workers 0 --fps 10 --lr_end 1 --log_every 1 --eval_every 1000
    --val_clips 1 --samples 1 --sample_steps 1
"""
TINY_MM = f"""
    {SHORT} --frames 2 --size 8 --rate 160 --batch_size 2 --width 8 --mult 1,2 --norm_groups 4
    --heads 2 --cross_head_dim 8 --video_attention= --cross_attention 2 --windows 1
    --random_shift true
"""
TINY_SR = f"""
    {SHORT} --stage sr --frames 2 --size 8 --windows 1,1 --sr_size 16 --rate 160
    --sr_batch_size 2 --norm_groups 4 --sr_width 8 --sr_mult 1,2 --sr_attention= --sr_sample_steps 1
"""
TINY_PA = f"""
    {SHORT} --frames 4 --size 8 --patch 2 --rate 4000 --n_mels 16 --hop 50 --window 128 --n_fft 128
    --width 16 --heads 2 --head_dim 8 --decoder_depth 1 --proj_mlp 16 --blocks 2,2,2 --adv true
    --disc_width 4 --disc_start 0 --mdsa_batch_size 2 --dit_width 16 --dit_depth 1 --dit_heads 2
    --text_width 16 --text_tokens 4 --cache_latents 4 --batch_size 2 --griffin_lim 2
    --need_good false
"""
TINY_UD = f"""
    {SHORT} --frames 4 --size 8 --video_patch 2,2,2 --video_channels 4 --rate 4000 --n_mels 16
    --hop 50 --window 128 --n_fft 128 --audio_patch 4,4 --audio_channels 4 --vae_width 8
    --vae_blocks 1 --vae_batch_size 2 --width 16 --depth 1 --heads 2 --text_width 16 --text_tokens 4
    --cache_latents 4 --batch_size 2 --griffin_lim 2 --need_good false --sample_steps 2
"""
TINY_SF = f"""
    {SHORT} --frames 4 --size 8 --video_patch 2,2,2 --video_channels 4 --rate 4000 --n_mels 16
    --hop 50 --window 128 --n_fft 128 --audio_patch 4,16 --audio_channels 6 --vae_width 8
    --vae_blocks 1 --vae_batch_size 2 --width 16 --depth 1 --heads 2 --text_width 16 --text_tokens 4
    --cache_latents 4 --video_batch_size 2 --batch_size 2 --joint_batch_size 2 --griffin_lim 2
    --need_good false --sample_steps 2
"""
# As in the paper; the toy preset has velocity, no learned variance, ddim.
UD_PAPER = "--predict noise --learn_sigma true --sampler ddpm --optimizer adamw"


@dataclass
class Case:
    """A training command of a model file."""

    module: object
    options: str
    steps: str = "--steps"  # the option that says how long it is
    checkpoint: str = "run/ckpt.pt"
    samples: bool = True  # sample() takes what it trains
    prepare: object = None  # a function that makes what the command starts from
    parts: str = ""  # a function that waits once for each part of a batch, as the file says
    silent: tuple = ("loss", "forward")  # functions in and below which nothing may wait

    def __post_init__(self):
        # The lines of a training step in fit: from its random seed to the row of the log.
        lines, first = inspect.getsourcelines(self.module.fit)
        start = [i for i, line in enumerate(lines) if "torch.manual_seed(" in line]
        end = [i for i, line in enumerate(lines) if "history.append(" in line]
        self.step_lines = range(first + start[0], first + end[0])


def save_mdsa():
    """The autoencoder that stage dit of proav_dit.py starts from."""
    cfg = pa.parse(TINY_PA.split())
    cfg = dataclasses.replace(cfg, out="run/mdsa", steps=1)
    model = pa.Autoencoding(cfg)
    for p in model.parameters():
        torch.nn.init.zeros_(p)  # as the host reads them from cuda, on paper
    data.save_checkpoint("run/mdsa/ckpt.pt", 1, cfg, {"ema": model})


def save_vae():
    """The codec that stage dit of uniform_dit.py starts from."""
    cfg = ud.parse(TINY_UD.split())
    save_zeros("vae", cfg, ud.SmallCodec(cfg))


def save_zeros(stage, cfg, model):
    """A finished stage; its weights as the host reads them from cuda, on paper."""
    cfg = dataclasses.replace(cfg, out=f"run/{stage}", steps=1)
    for p in model.parameters():
        torch.nn.init.zeros_(p)
    data.save_checkpoint(f"run/{stage}/ckpt.pt", 1, cfg, {"ema": model})


def save_sf_vae():
    """The codec that stage video of syncflow.py starts from."""
    cfg = sf.parse(TINY_SF.split())
    save_zeros("vae", cfg, sf.SmallCodec(cfg))


def save_sf_video():
    """What its stage audio starts from."""
    cfg = sf.parse(TINY_SF.split())
    save_zeros("video", cfg, sf.SyncFlow(cfg))


def save_sf_audio():
    """What its stage joint starts from."""
    cfg = sf.parse(TINY_SF.split())
    save_zeros("audio", cfg, sf.SyncFlow(cfg))


def sf_case(stage, steps, prepare=None):
    """A stage of syncflow.py. Its optimal transport is solved on the CPU."""
    folder = "run" if stage == "joint" else f"run/{stage}"
    return Case(
        sf,
        f"{TINY_SF} --stage {stage}",
        steps,
        f"{folder}/ckpt.pt",
        samples=stage != "vae",
        prepare=prepare,
        parts="" if stage == "vae" else "optimal_order",
    )


# A model file is a line or two here.
CASES = {
    "mm": Case(mm, f"{TINY_MM} --mu_law 255 --motion_weight 4 --dropout 0.1"),
    "mm-sr": Case(mm, TINY_SR, "--sr_steps", "run/sr/ckpt.pt", samples=False),
    "pa-mdsa": Case(
        pa, f"{TINY_PA} --stage mdsa", "--mdsa_steps", "run/mdsa/ckpt.pt", samples=False
    ),
    "pa-dit": Case(pa, f"{TINY_PA} --stage dit", prepare=save_mdsa),
    "ud-vae": Case(ud, f"{TINY_UD} --stage vae", "--vae_steps", "run/vae/ckpt.pt", samples=False),
    "ud-dit": Case(ud, f"{TINY_UD} --stage dit", prepare=save_vae),
    "ud-dit-paper": Case(ud, f"{TINY_UD} {UD_PAPER} --stage dit", prepare=save_vae),
    "sf-vae": sf_case("vae", "--vae_steps"),
    "sf-video": sf_case("video", "--video_steps", save_sf_vae),
    "sf-audio": sf_case("audio", "--steps", save_sf_video),
    "sf-joint": sf_case("joint", "--joint_steps", save_sf_audio),
}


def train(case, steps, *more):
    """The command of a case, to so many steps, in the folder that we are in -> Seen."""
    if case.prepare and not Path("run").exists():
        case.prepare()
    words = case.options.split()
    words += ["--device", "cuda", "--out", "run", case.steps, str(steps)]
    with cuda_on_paper(ROOT) as seen:
        case.module.main(words + list(more))
    return seen


def waits_in_steps(seen, case):
    """The waits during training steps, those of what a step calls included."""
    found = {}
    for wait, n in seen.waits.items():
        for _, line, function in wait.stack:
            if function == "fit" and line in case.step_lines:
                found[wait] = n
    return found


def check(seen, case, steps, parts=1):
    """It ran on cuda, and waited once in every step: for the figures that fit reads; and, where
    the case says so, once in each of the parts of a batch, in one function."""
    assert seen.count > 500
    waits = {"fit": 0, case.parts: 0}
    for wait, n in waits_in_steps(seen, case).items():
        function = wait.stack[0][2]
        assert wait.what == "to the CPU" and function in waits, seen.report()
        waits[function] += n
    assert waits["fit"] == steps, seen.report()
    assert waits[case.parts] == (steps * parts if case.parts else 0), seen.report()
    # In a loss, which validation calls as well, nothing else waits.
    for wait, n in seen.waits_below(*case.silent).items():
        assert wait.stack[0][2] == case.parts, seen.report()
        waits[case.parts] -= n
    assert waits[case.parts] == 0, seen.report()


# ---- The model files


# One run in four commands, of a step each: how it computes may change on the way.
COMMANDS = [
    "--amp bf16",
    "--amp fp16",
    "--amp fp16 --checkpoint true --grad_accum 2",  # it also takes up the GradScaler's state
    "--amp off",
]


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_training_and_resuming(case, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for steps, options in enumerate(COMMANDS, 1):
        parts = 2 if "grad_accum 2" in options else 1
        check(train(case, steps, *options.split()), case, 1, parts)  # one step: it goes on
        pictures = Path(case.checkpoint).parent.glob(f"samples/step{steps:06d}*")
        assert list(pictures)
    if not case.samples:
        return
    for amp in ("bf16", "fp16", "off"):
        with cuda_on_paper(ROOT) as seen:
            model = case.module.load(case.checkpoint, "cuda", ["--amp", amp])
            assert all(p.device.type == "cuda" for p in model.state_dict().values())
            video, audio = case.module.sample(model, 2, seed=1)
            assert video.device.type == audio.device.type == "cpu"
            assert len(video) == len(audio) == 2
        assert seen.count > 500
        assert not seen.waits_below("forward"), seen.report()


def test_mm_as_in_the_paper(tmp_path, monkeypatch):
    """Eq. 7, without what EDM adds."""
    monkeypatch.chdir(tmp_path)
    more = "--prediction eps --mu_law 0 --motion_weight 0 --amp bf16".split()
    check(train(CASES["mm"], 1, *more), CASES["mm"], 1)


def mm_model(*more):
    torch.manual_seed(0)
    return mm.build(mm.parse([*TINY_MM.split(), *more])).to("cuda").eval()


@pytest.mark.parametrize("method", ["replace", "gradient", "released"])
def test_mm_given_a_part(method):
    with cuda_on_paper(ROOT) as seen:
        model = mm_model("--method", method, "--amp", "bf16")
        clip = torch.zeros(2, 8, 8, 3, dtype=torch.uint8)
        video, _ = mm.sample(model, 2, video=clip)
        assert video.device.type == "cpu"
        _, audio = mm.sample(model, 1, audio=torch.zeros(32))
        assert audio.device.type == "cpu"
    assert seen.count > 1000
    assert not seen.waits_below("forward"), seen.report()


@pytest.mark.parametrize("options", ["dpm", "dpm3 --seconds 0.3", "ddpm --diffusion_steps 25"])
def test_mm_samplers(options):
    one_scale = "--mult 1 --video_attention 1 --cross_attention 1".split()
    with cuda_on_paper(ROOT) as seen:
        model = mm_model("--sampler", *options.split(), *one_scale)
        video, audio = mm.sample(model, 1, steps=2)
        frames = 3 if model.cfg.seconds else 2
        assert video.shape[1] == frames and audio.shape[1] == 16 * frames
    assert seen.count > 500
    assert not seen.waits_below("forward"), seen.report()


@pytest.mark.parametrize("residual", ["0.035", "0"])
def test_mm_enlarges(residual, tmp_path):
    path = f"{tmp_path}/sr.pt"
    cfg = mm.sr_config(mm.parse([*TINY_SR.split(), "--sr_residual", residual]))
    network = mm.build(cfg)
    data.save_checkpoint(path, 1, cfg, {"ema": network})
    with cuda_on_paper(ROOT) as seen:
        video, _ = mm.sample(mm_model("--sr_ckpt", path, "--amp", "fp16"), 1)
        assert video.shape == (1, 2, 16, 16, 3)
    assert not seen.waits_below("forward"), seen.report()


def test_pa_encodes_on_the_way(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    seen = train(CASES["pa-dit"], 1, "--cache_latents", "0", "--amp", "bf16")
    check(seen, CASES["pa-dit"], 1)
    assert not seen.waits_below("loss_of_clips")


def test_pa_given_a_part():
    with cuda_on_paper(ROOT) as seen:
        cfg = pa.parse([*TINY_PA.split(), "--amp", "bf16"])
        model = pa.ProAV(cfg).to("cuda").eval()
        clip = torch.zeros(4, 8, 8, 3, dtype=torch.uint8)
        _, audio = pa.sample(model, 2, prompt="a red ball", video=clip)
        video, _ = pa.sample(model, 1, negative_prompt="rain", audio=torch.zeros(1600))
        assert audio.device.type == video.device.type == "cpu"
    assert seen.count > 500
    assert not seen.waits_below("forward"), seen.report()


def test_ud_encodes_on_the_way(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    seen = train(CASES["ud-dit"], 1, "--cache_latents", "0", "--amp", "bf16")
    check(seen, CASES["ud-dit"], 1)
    assert not seen.waits_below("loss_of_clips")


def test_ud_trains_all_tasks(tmp_path, monkeypatch):
    """What is given noised like the rest, too."""
    right = ud.UniForm.forward
    tasks = []

    def forward(self, x, t, task, words, mask):
        if self.training:
            tasks.append(task)
        return right(self, x, t, task, words, mask)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ud.UniForm, "forward", forward)
    more = "--cond_noise same_t --checkpoint true --amp bf16".split()
    check(train(CASES["ud-dit-paper"], 5, *more), CASES["ud-dit-paper"], 5)
    assert len(tasks) == 5
    assert set(tasks) == set(ud.TASKS)


@pytest.mark.parametrize("options", ["", UD_PAPER], ids=["ddim", "ddpm"])
@pytest.mark.parametrize("mode", ["clean", "same_t"])
def test_ud_given_a_part(options, mode):
    with cuda_on_paper(ROOT) as seen:
        cfg = ud.parse([*TINY_UD.split(), *options.split(), "--amp", "bf16", "--cond_noise", mode])
        model = ud.UniForm(cfg).to("cuda").eval()
        clip = torch.zeros(4, 8, 8, 3, dtype=torch.uint8)
        _, audio = ud.sample(model, 2, prompt="a red ball", video=clip)
        video, _ = ud.sample(model, 1, negative_prompt="rain", audio=torch.zeros(1600))
        assert audio.device.type == video.device.type == "cpu"
    assert seen.count > 500
    assert not seen.waits_below("forward"), seen.report()


def without_transport(case):
    """Its command with --ot false, which must not wait for it."""
    return dataclasses.replace(case, options=f"{case.options} --ot false", parts="")


@pytest.mark.parametrize("stage", ["video", "audio", "joint"])
def test_sf_without_transport(stage, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    case = without_transport(CASES[f"sf-{stage}"])
    more = "--noise_levels separate --checkpoint true --amp bf16".split()
    check(train(case, 1, *more), case, 1)


# As in the paper; the toy preset has others. Cached latents, or none.
SF_OPTIONS = [
    "--noise_levels separate --checkpoint true --cache_latents 0",
    "--rope false --prenorm false --logit_normal () --optimizer adamw",
    "--kv pool --audio_from both --adaptor false",
    "--audio_from text",
]


@pytest.mark.parametrize("options", SF_OPTIONS)
def test_sf_variants(options, tmp_path, monkeypatch):
    """Stage joint after a stage audio with the same options; samples, and sound for a video."""
    monkeypatch.chdir(tmp_path)
    words = [*options.split(), "--amp", "bf16"]
    cfg = sf.parse([*TINY_SF.split(), *words])
    save_zeros("audio", cfg, sf.SyncFlow(cfg))
    case = CASES["sf-joint"]
    check(train(case, 1, *words), case, 1)
    clip = torch.zeros(4, 8, 8, 3, dtype=torch.uint8)
    with cuda_on_paper(ROOT) as seen:
        model = sf.load("run/ckpt.pt", "cuda")
        _, audio = sf.sample(model, 2, prompt="a red ball", video=clip)
        video, _ = sf.sample(model, 1, prompt="rain", negative_prompt="a red ball")
        assert audio.device.type == video.device.type == "cpu"
    assert seen.count > 500
    assert not seen.waits_below("forward", "velocity"), seen.report()


def test_sf_waves(tmp_path, monkeypatch):
    """The paper's sound VAE: EnCodec's layers, an LSTM among them, and spectra in the loss."""
    monkeypatch.chdir(tmp_path)
    waves = "--codec original --audio_strides 5,4,5 --audio_filters 4 --amp bf16".split()
    check(train(CASES["sf-vae"], 1, *waves), CASES["sf-vae"], 1)


def test_sf_transport_must_be_the_one_wait(tmp_path, monkeypatch):
    """The check sees a second one, wherever it is."""
    right = sf.squared_distances

    def looked_at(noise, z):
        cost = right(noise, z)
        assert cost.sum().item() < 100
        return cost

    monkeypatch.chdir(tmp_path)
    case = CASES["sf-audio"]
    seen = train(case, 1)
    check(seen, case, 1)
    with pytest.raises(AssertionError):
        check(seen, without_transport(case), 1)
    monkeypatch.setattr(sf, "squared_distances", looked_at)
    with pytest.raises(AssertionError):
        check(train(case, 2), case, 1)


# ---- Copies to the device


class Copies(TorchFunctionMode):
    """Notes how Tensor.to is called with a device, and copies nothing."""

    def __init__(self):
        super().__init__()
        self.non_blocking = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.Tensor.to:
            self.non_blocking.append(kwargs.get("non_blocking", False))
            return args[0]
        return func(*args, **kwargs)


@pytest.mark.parametrize("device", ["cuda", "cuda:1", "cpu", "mps", "xpu"])
def test_to_device_waits_but_on_cuda(device):
    clips = data.open_dataset("toy", "train", 2, 8, 10, 160)
    batch = data.make_batch(clips, 0, [0, 1])
    with Copies() as copies:
        data.to_device(batch, torch.device(device))
    assert copies.non_blocking == [device.startswith("cuda")] * 2


def test_to_device_on_paper():
    clips = data.open_dataset("toy", "train", 2, 8, 10, 160)
    batch = data.make_batch(clips, 0, [0, 1])
    with cuda_on_paper(ROOT) as seen:
        moved = data.to_device(batch, torch.device("cuda"))
        places = {name: x.device.type for name, x in moved.items() if torch.is_tensor(x)}
    assert places == {"video": "cuda", "audio": "cuda", "key": "cpu", "label": "cpu"}
    assert seen.count and not seen.waits


# ---- What the tool must catch


def test_a_table_left_on_the_cpu():
    with cuda_on_paper(ROOT):
        table = torch.linspace(0, 1, 4)
        x = torch.ones(4, device="cuda")
        with pytest.raises(RuntimeError, match="same device"):
            x * table
        with pytest.raises(RuntimeError, match="same device"):
            table[torch.zeros(4, device="cuda", dtype=torch.long)]
        # As on CUDA, these are allowed: numbers, and indices.
        assert (x * table[0]).device.type == "cuda"
        assert x[torch.tensor([0, 1])].shape == (2,)


def test_a_table_left_on_the_cpu_by_a_model(tmp_path, monkeypatch):
    """The alphas of the diffusion, which training reads by the steps that it draws."""

    def build_process(cfg, device):
        return mm.Diffusion(cfg, "cpu")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(mm, "build_process", build_process)
    with pytest.raises(RuntimeError, match="same device"):
        train(CASES["mm"], 1, "--prediction", "eps")


def test_a_table_in_backward():
    """A wrong gradient shows up, although C++ code calls what computes it."""

    class Double(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return 2 * x

        @staticmethod
        def backward(ctx, gradient):
            return gradient * torch.full((3,), 2.0)

    with cuda_on_paper(ROOT):
        x = torch.ones(3, device="cuda", requires_grad=True)
        with pytest.raises(RuntimeError, match="same device"):
            Double.apply(x).sum().backward()


@pytest.mark.parametrize("of, to", [("cpu", "cuda"), ("cuda", "cpu")])
def test_a_generator_on_another_device(of, to):
    with cuda_on_paper(ROOT):
        generator = torch.Generator(of).manual_seed(1)
        assert torch.rand(3, generator=generator, device=of).device.type == of
        with pytest.raises(RuntimeError, match="generator"):
            torch.rand(3, generator=generator, device=to)
        with pytest.raises(RuntimeError, match="generator"):
            torch.empty(3, device=to).normal_(generator=generator)


def test_a_blocking_copy_in_a_loss():
    def loss(x, blocking):
        weight = torch.arange(3.0).to("cuda", non_blocking=not blocking)
        return helper(x * weight)

    def helper(x):
        return x.mean()

    with cuda_on_paper(ROOT) as seen:
        x = torch.ones(3, device="cuda")
        loss(x, False)
        assert not seen.waits
        loss(x, True)
    (wait,) = seen.waits_below("loss")
    assert wait.what == "from the CPU" and wait.stack[0][2] == "loss"
    assert not seen.waits_below("helper")


@pytest.mark.parametrize("checkpoint", [False, True])
def test_an_item_in_forward(checkpoint):
    """Also where forward runs once more, in backward."""

    class Scaled(torch.nn.Linear):
        def forward(self, x):
            return super().forward(x / self.size(x))

        def size(self, x):
            return x.abs().max().item()

    with cuda_on_paper(ROOT) as seen:
        layer = Scaled(3, 3, device="cuda")
        x = torch.ones(2, 3, device="cuda", requires_grad=True)
        if checkpoint:
            y = torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False)
        else:
            y = layer(x)
        y.sum().backward()
    (wait,) = {w.what: w for w in seen.waits_below("forward")}.values()
    assert wait.what == "item" and wait.stack[0][2] == "size"
    assert sum(seen.waits.values()) == 1 + checkpoint


READERS = {
    "float": float,
    "bool": bool,
    "int": int,
    "if": lambda x: 1 if x > 0 else 0,
    "tolist": lambda x: x.tolist(),
    "cpu": lambda x: x.cpu(),
}


@pytest.mark.parametrize("read", READERS.values(), ids=READERS)
def test_reading_a_tensor(read):
    def loss(x):
        return read(x.sum())

    with cuda_on_paper(ROOT) as seen:
        loss(torch.ones(3, device="cuda"))
    assert sum(seen.waits_below("loss").values()) == 1


def test_a_mask_as_an_index():
    """How many values it picks is known on the device alone: no shape without a wait."""
    with cuda_on_paper(ROOT) as seen:
        x = torch.ones(3, device="cuda")
        x[x > 0] = 1.0  # this picks none: it looks at each
        assert not seen.waits
        x[x > 0] = torch.ones(3, device="cuda")
        assert sum(seen.waits.values()) == 1
        with pytest.raises(RuntimeError):
            x[x > 0]


def test_a_wait_in_a_real_step(tmp_path, monkeypatch):
    """A loss that looks at its own value, once in each of two parts."""
    right = mm.EDM.loss

    def loss(self, model, batch, t=None):
        value, parts = right(self, model, batch, t)
        assert float(value.detach()) < 100
        return value, parts

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(mm.EDM, "loss", loss)
    seen = train(CASES["mm"], 1, "--grad_accum", "2")
    assert sum(waits_in_steps(seen, CASES["mm"]).values()) == 3
    with pytest.raises(AssertionError, match="item"):
        check(seen, CASES["mm"], 1)


def test_types_of_numbers():
    """The tool remembers what follows from which arguments: 1 and 1.0 are not the same."""
    with cuda_on_paper(ROOT):
        x = torch.arange(3, device="cuda")
        assert (x * 1).dtype == (x * True).dtype == torch.int64
        assert (x * 1.0).dtype == torch.float32
        assert (x.double() * 1).dtype == torch.float64
        assert (torch.ones(3, 2, device="cuda").T + 1).shape == (2, 3)


def test_types_under_autocast():
    with cuda_on_paper(ROOT):
        x = torch.ones(2, 4, device="cuda")
        layer = torch.nn.Linear(4, 4, device="cuda")
        with torch.autocast("cuda", torch.float16):
            y = layer(x)
            assert y.dtype == torch.float16
            assert F.layer_norm(y, (4,)).dtype == torch.float32
            assert (y + x).dtype == torch.float32  # arithmetic promotes
            assert torch.cat([y, x]).dtype == torch.float32
            assert (x.double() @ x.double().T).dtype == torch.float64  # left as it is
        assert layer(x).dtype == torch.float32
        # Outside of autocast, or in an operation that it does not know, torch refuses the mix.
        with pytest.raises(RuntimeError, match="dtype"):
            layer(y)
        with torch.autocast("cuda", torch.float16), pytest.raises(RuntimeError):
            x.lerp(y, 0.5)
