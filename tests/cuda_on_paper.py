"""CUDA on paper: train or sample "on cuda:0" on a machine without a GPU, and see what goes wrong.

    with cuda_on_paper() as seen:
        mm_diffusion.main("--device cuda --steps 1 --amp bf16 ...".split())
    assert seen.count > 1000                   # operations: it did run there
    assert not seen.waits_below("loss")        # no wait in loss(), nor in what it calls
    print(seen.report())                       # every wait, by file, line and function

A tensor on cuda is a meta tensor here: it has shape and type, and no values. In every operation,
those of backward and of the optimizers too:
 - arithmetic across devices raises RuntimeError, as on CUDA, and so does a random generator on
   another device than what it is to fill;
 - what makes the host wait for the device is counted: item(), tolist(), a copy to the CPU, a
   blocking copy from it;
 - autocast casts what CUDA's does, so that types that do not fit together show up.
Not checked: kernels, speed, memory, NCCL, whether a non-blocking copy is from pinned memory, and
what depends on values. The host reads floats as 0 (a copy) or 0.5 (an item), whole numbers as
`whole`, truth values as true; what has no shape without values, as x[mask], raises.
"""
import collections
import contextlib
import functools
import os
import sys
import warnings
from unittest import mock

import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

CPU = torch.device("cpu")
META = torch.device("meta")
DEVICE = torch.Tensor.device.__get__
IS_CUDA = torch.Tensor.is_cuda.__get__
aten = torch.ops.aten
# A tensor on cuda may be indexed by whole numbers on the CPU: they are copied on the way.
INDEXED = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_}
# Their floats must be of one type. CUDA's kernels check that; meta tensors do not.
ONE_TYPE = {
    aten.mm,
    aten.addmm,
    aten.bmm,
    aten.baddbmm,
    aten.mv,
    aten.addmv,
    aten.dot,
    aten.convolution,
    aten.native_group_norm,
    aten.native_layer_norm,
}
# In-place operations of the GradScaler, which meta tensors lack.
UNSCALE = aten._amp_foreach_non_finite_check_and_unscale_
UPDATE_SCALE = aten._amp_update_scale_


def functions(names):
    """All functions of these names in torch, Tensor, torch.nn.functional and torch.linalg."""
    found = set()
    for name in names.split():
        for place in (torch, torch.Tensor, F, torch.linalg):
            if hasattr(place, name):
                found.add(getattr(place, name))
    return found


# What CUDA's autocast casts (ATen/autocast_mode.h): to the lower type,
LOW = functions("""
    linear conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d prelu
    mm bmm mv matmul __matmul__ addmm addbmm baddbmm addmv addr einsum vecdot multi_dot
    scaled_dot_product_attention
""")
# to float32,
HIGH = functions("""
    __pow__ __rpow__ __rdiv__ __rtruediv__ pow reciprocal rsqrt exp expm1 log log10 log1p log2
    acos asin cosh sinh tan erfinv softplus softmax log_softmax logsumexp sum prod cumsum cumprod
    norm vector_norm matrix_norm normalize renorm dist pdist cdist cosine_similarity
    layer_norm rms_norm group_norm interpolate
    l1_loss smooth_l1_loss huber_loss mse_loss kl_div nll_loss cross_entropy
    binary_cross_entropy_with_logits margin_ranking_loss triplet_margin_loss cosine_embedding_loss
""")
# and to the widest type among the arguments.
WIDE = functions("""
    addcmul addcdiv atan2 bilinear cat stack cross dot vdot grid_sample index_put scatter_add
    tensordot
""")


def tensors_in(args, kwargs):
    """The tensors among the arguments of a call, also those in lists of tensors."""
    found = []
    for x in (*args, *kwargs.values()):
        if isinstance(x, torch.Tensor):
            found.append(x)
        elif isinstance(x, (list, tuple)):
            found += [y for y in x if isinstance(y, torch.Tensor)]
    return found


class Generator(torch._C.Generator):
    """A random generator that remembers its device: torch without CUDA has none for cuda."""

    def __new__(cls, device="cpu"):
        self = super().__new__(cls)
        self.place = torch.device(device)
        return self

    @property
    def device(self):
        return self.place


# A wait for the device: what was done, and where: the project's lines on the stack, innermost
# first, each a (file, line, function).
Wait = collections.namedtuple("Wait", "what stack")


def names_of(wait):
    """The functions of the project that were being called, innermost first."""
    return [function for _, _, function in wait.stack]


def project_lines(root):
    """The stack of calls as (file, line, function), innermost first, as far as it is in root."""
    lines = []
    frame = sys._getframe(1)
    while frame:
        path = frame.f_code.co_filename
        own = path.startswith(root) and "site-packages" not in path and path != __file__
        if own:
            file = path[len(root) :].lstrip("/")
            lines.append((file, frame.f_lineno, frame.f_code.co_name))
        frame = frame.f_back
    return tuple(lines)


def refuse_two_devices(func, args, tensors):
    """Raise RuntimeError where the tensors of an operation, on two devices, must be on one."""
    on_cpu = []
    for x in tensors:
        # A number, which is a tensor without dimensions, may be on the CPU in element-wise ones.
        number = x.dim() == 0 and torch.Tag.pointwise in func.tags
        if not x.is_meta and not number:
            on_cpu.append(x)
    indexed = func.overloadpacket in INDEXED and args[0].is_meta
    if on_cpu and not indexed:
        places = [f"{list(x.shape)} on {'cuda' if x.is_meta else 'cpu'}" for x in tensors]
        raise RuntimeError(
            f"Expected all tensors to be on the same device: {func} of {', '.join(places)}"
        )


def refuse_two_types(func, tensors):
    """Raise RuntimeError where the floats of an operation are of two types."""
    dtypes = {x.dtype for x in tensors if x.is_floating_point()}
    if len(dtypes) > 1:
        raise RuntimeError(f"Expected all tensors to have the same dtype: {func} of {dtypes}")


def picks_by_mask(args):
    """Whether x[mask] or x[mask] = y needs to know how many values of the mask are true."""
    mask = any(x is not None and x.dtype == torch.bool for x in args[1])
    one_value = len(args) > 2 and args[2].numel() == 1  # masked_fill serves for it
    return mask and not one_value


@functools.cache
def makes_new(func):
    """Whether all that an operation returns is new: it is no view, and nothing is changed."""
    returned = func._schema.returns
    return not func._schema.is_mutable and all(x.alias_info is None for x in returned)


def outline(x):
    """What the shapes and types of an operation's results follow from, of an argument."""
    if isinstance(x, torch.Tensor):
        return x.is_meta, x.dtype, x.shape, x.stride()
    if isinstance(x, (list, tuple)):
        return tuple(outline(y) for y in x)
    return type(x), x  # with its type, as 1 == 1.0 == True


def empty_like(x):
    """New tensors in place of those in the results of an operation."""
    if isinstance(x, torch.Tensor):
        return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=META)
    if isinstance(x, (list, tuple)):
        return type(x)(empty_like(y) for y in x)
    return x


# Results of operations by the outline of their arguments. Torch works them out anew each time, in
# Python, which would take half the time of a test.
RESULTS = {}


def run(func, args, kwargs):
    """func(*args, **kwargs) for an operation on meta tensors."""
    if not makes_new(func):
        return func(*args, **kwargs)
    key = (func, outline(args), outline(tuple(kwargs.items())))
    if key not in RESULTS:
        RESULTS[key] = empty_like(func(*args, **kwargs))
    return empty_like(RESULTS[key])


class Seen(TorchDispatchMode):
    """Sees every ATen operation, also those of backward and inside composite functions."""

    def __init__(self, root, whole):
        super().__init__()
        self.root = os.path.abspath(root)
        self.whole = whole
        self.waits = collections.Counter()  # of Wait
        self.count = 0  # operations on cuda

    def waits_below(self, *functions):
        """{Wait: how often} of the waits inside functions of these names and what they call."""
        return {w: n for w, n in self.waits.items() if set(functions) & set(names_of(w))}

    def report(self):
        """A line for every place that waits: how often, file:line function: what."""
        places = collections.Counter()
        for wait, n in self.waits.items():
            file, line, function = wait.stack[0] if wait.stack else ("?", 0, "?")
            places[f"{file}:{line} {function}: {wait.what}"] += n
        return "\n".join(f"{n:6}  {place}" for place, n in sorted(places.items()))

    def wait(self, what):
        self.waits[Wait(what, project_lines(self.root))] += 1

    def read(self, x):
        """What the host reads from a tensor of one element."""
        self.wait("item")
        if x.dtype == torch.bool:
            return True
        return 0.5 if x.dtype.is_floating_point else self.whole

    def to_cpu(self, x, dtype):
        """The copy on the CPU of a tensor on cuda."""
        self.wait("to the CPU")
        dtype = dtype or x.dtype
        return torch.full(x.shape, self.whole if dtype == torch.int64 else 0, dtype=dtype)

    def copy_between(self, to, source, non_blocking):
        """to.copy_(source), where they are on different devices."""
        if to.is_meta:
            if not non_blocking:
                self.wait("from the CPU")
            return to
        if not non_blocking:
            self.wait("to the CPU")
        return to.zero_()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        op = func.overloadpacket
        tensors = tensors_in(args, kwargs)
        on_cuda = any(x.is_meta for x in tensors)
        if not on_cuda:
            to_cuda = op is aten._to_copy and kwargs.get("device") == META
            if to_cuda and not kwargs.get("non_blocking"):
                self.wait("from the CPU")
            return func(*args, **kwargs)
        self.count += 1

        if op is aten._local_scalar_dense:  # item(), bool(), float(), int()
            return self.read(args[0])
        if op is aten.equal:  # istft asks by it whether its window has gaps
            self.wait("equal")
            return False
        if op is aten._to_copy and kwargs.get("device") == CPU:
            return self.to_cpu(args[0], kwargs.get("dtype"))
        if op is aten.copy_ and args[0].is_meta != args[1].is_meta:
            return self.copy_between(args[0], args[1], any(args[2:]))
        if not all(x.is_meta for x in tensors):
            refuse_two_devices(func, args, tensors)
        if op in ONE_TYPE:
            refuse_two_types(func, tensors)
        if op in INDEXED and picks_by_mask(args):
            self.wait("a mask as an index")
        if op is UNSCALE:
            return None
        if op is UPDATE_SCALE:
            return args[0]
        return run(func, args, kwargs)


def on_meta(place):
    """An argument as the operation is to get it: the device cuda becomes the device meta."""
    if isinstance(place, str) and place.split(":")[0] == "cuda":
        return META
    if isinstance(place, torch.device) and place.type == "cuda":
        return META
    return place


def refuse_other_generator(func, args, kwargs):
    """Raise RuntimeError where random numbers come from a generator on another device."""
    generator = kwargs.get("generator")
    if not isinstance(generator, Generator):
        return
    target = kwargs.get("device")
    if target is None:
        filled = any(isinstance(x, torch.Tensor) and x.is_meta for x in args)
        target = META if filled else CPU
    if (torch.device(target).type == "meta") != (generator.place.type == "cuda"):
        raise RuntimeError(f"{func.__name__} on {target} with a generator on {generator.place}")


def autocast(func, args, kwargs):
    """The arguments as CUDA's autocast casts them for this function."""
    if func not in LOW and func not in HIGH and func not in WIDE:
        return args, kwargs
    floats = []
    for x in tensors_in(args, kwargs):
        if x.is_meta and x.is_floating_point() and x.dtype != torch.float64:
            floats.append(x)
    if func in WIDE and len({x.dtype for x in floats}) < 2:
        return args, kwargs
    dtype = torch.get_autocast_dtype("cuda") if func in LOW else torch.float32

    def cast(x):
        return x.to(dtype) if any(x is y for y in floats) else x

    return tree_map(cast, (args, kwargs))


class Names(TorchFunctionMode):
    """Sees every call of torch from Python: cuda goes in as meta, and meta comes out as cuda:0."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func.__name__ in ("__get__", "__set__"):  # an attribute of a tensor
            if func == DEVICE and args[0].is_meta:
                return torch.device("cuda:0")
            if func == IS_CUDA:
                return args[0].is_meta
            return func(*args, **kwargs)
        if func is torch.device:
            return func(*args, **kwargs)
        args = tuple(on_meta(x) for x in args)
        kwargs = {name: on_meta(x) for name, x in kwargs.items()}
        refuse_other_generator(func, args, kwargs)
        if torch.is_autocast_enabled("cuda"):
            args, kwargs = autocast(func, args, kwargs)
        return func(*args, **kwargs)


@contextlib.contextmanager
def cuda_on_paper(root=".", whole=4):
    """Let tensors on cuda be meta tensors -> Seen. root: the folder whose lines are reported."""
    names = Names()
    run_engine = torch.autograd._engine_run_backward
    read_file = torch.load

    def backward(*args, **kwargs):
        # A mode does not reach into backward, where checkpoint() calls forward functions again.
        with names:
            return run_engine(*args, **kwargs)

    def load(path, map_location=None, **kwargs):
        state = read_file(path, map_location="cpu", **kwargs)
        if map_location is None:
            return state
        return tree_map(lambda x: x.to(map_location) if torch.is_tensor(x) else x, state)

    def same_shape(x):
        return {"shape": x.shape, "dtype": x.dtype}

    replaced = [
        (torch, "Generator", Generator),
        (torch, "load", load),
        (torch.autograd, "_engine_run_backward", backward),
        (torch.cuda, "set_device", lambda device: None),
        (torch.cuda, "is_bf16_supported", lambda *args, **kwargs: True),
        (torch.cuda.amp.common, "amp_definitely_not_available", lambda: False),
    ]
    # checkpoint() compares what it computes again by shape, type and device: the last as it is.
    checks = torch.utils.checkpoint._allowed_determinism_checks_to_fns
    with contextlib.ExitStack() as stack:
        # load_state_dict says so of meta tensors, which is what a tensor on cuda is here.
        stack.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("ignore", ".*copying from a non-meta parameter")
        for where, name, value in replaced:
            stack.enter_context(mock.patch.object(where, name, value))
        stack.enter_context(mock.patch.dict(checks, default=same_shape))
        seen = stack.enter_context(Seen(root, whole))
        stack.enter_context(names)
        yield seen
