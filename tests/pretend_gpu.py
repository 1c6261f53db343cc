"""A pretend GPU: finds wrong device placement in PyTorch code on a machine that has no GPU.

    from pretend_gpu import DEVICE, pretend_gpu  # at the top of the file: before the process's first backward pass
    def test_nothing_is_left_on_the_cpu():
        with pretend_gpu() as report:
            train(device=DEVICE)  # "pretend", for any code that takes the name of a device
        assert report.reads["_local_scalar_dense", "train.py:17"] == 3

How: DEVICE is PyTorch's spare device (PrivateUse1) with a backend in Python. A tensor on it is a G, which holds a CPU
tensor. Every operator comes to run(), is checked, and is computed by the CPU's own kernel, so that results are bit by
bit those of a CPU run (OMP_NUM_THREADS=1). After the block, PyTorch is as before, but the name stays known.
Shows: what a GPU refuses raises DeviceMistake (a RuntimeError): an operator on tensors of two devices (allowed: indices
and, in pointwise operators, CPU tensors without dimensions) or with a generator of another device; numpy() raises, too.
report.reads counts where the CPU waits for the GPU (item, bool, tolist, cpu, nonzero, a mask as index, synchronize),
report.uploads copies from the CPU (to, torch.tensor, an index that is a list or on the CPU), by the operator and by
"file.py:line", the innermost line outside of libraries.
Cannot show: speed, memory, rounding, races, what a GPU lacks, several GPUs, code for CUDA by name (is_cuda, "cuda").
Random numbers and autocast's choice of operators are the CPU's. Files hold CPU tensors: give torch.load a map_location.
Sparse tensors, torch.compile, process groups, backward in a forked child do not work; LSTM and GRU are not exact."""
# ruff: noqa: E401, E501, E701, I001, SIM905
import collections, contextlib, functools, sys, traceback, types
from unittest import mock
import torch
from torch.utils._pytree import tree_leaves, tree_map

DEVICE, aten, Tensor, backend = "pretend", torch.ops.aten, torch.Tensor, torch.utils.backend_registration
LOAD, CLEAR, DATA = torch.load, torch.clear_autocast_cache, torch._C.TensorBase.data
REPORTS, GENERATORS, CASTS = [], {}, {}  # of active blocks; on the GPU, by C++ address; converted weights, by id
READS = set("""_local_scalar_dense nonzero masked_select equal bincount _unique _unique2 unique_dim unique_consecutive
    repeat_interleave""".split())  # the CPU waits for a value or for a size
INDEXED = set("index _unsafe_index index_put index_put_ _index_put_impl_ _unsafe_index_put".split())
SCALARS = INDEXED | set("where masked_fill masked_fill_ fill fill_ index_fill index_fill_".split())  # like pointwise
LOWER = set("""bmm mm baddbmm addmm addbmm linear matmul linalg_vecdot _addmm_activation mkldnn_rnn_layer
    scaled_dot_product_attention _native_multi_head_attention""".split())  # autocast makes their arguments bfloat16
has_kernel, IMPLICIT = torch._C._dispatch_has_kernel_for_dispatch_key, "CompositeImplicitAutograd"
class DeviceMistake(RuntimeError): """What a GPU would have refused."""

class G(Tensor):
    """A tensor that says it is on the pretend GPU. Its values are in the CPU tensor `inner`."""
    def __new__(cls, x):
        with torch.inference_mode(x.is_inference()):
            return Tensor._make_wrapper_subclass(cls, x.size(), strides=x.stride(), storage_offset=x.storage_offset(),
                                                 dtype=x.dtype, layout=x.layout, device=torch.device(DEVICE, 0))
    def __init__(self, x): self.inner = x
    __torch_function__ = torch._C._disabled_torch_function_impl
    @classmethod
    def __torch_dispatch__(cls, op, types, args=(), kwargs=None): return run(op, args, kwargs or {})
    def __repr__(self, **_): return f"G({self.inner})"
    def tolist(self): return self.cpu().tolist()
    def numpy(self, *, force=False): return self.detach().cpu().numpy() if force else super().numpy()
    def data_ptr(self): return self.inner.data_ptr()  # for code that looks for shared memory
    def untyped_storage(self): return self.inner.untyped_storage()
    def __reduce_ex__(self, protocol): return like(self, self.inner).__reduce_ex__(protocol)
    def __deepcopy__(self, memo):
        memo[id(self)] = new = like(self, G(self.inner.clone()))
        new.grad = None if self.grad is None else self.grad.__deepcopy__(memo)
        return new

def like(tensor, new):  # new as a parameter, if tensor is one
    new = torch.nn.Parameter(new) if isinstance(tensor, torch.nn.Parameter) else new.detach()
    return new.requires_grad_(tensor.requires_grad)

def set_data(tensor, value):  # tensor.data = value, which nn.Module.to uses: a tied weight stays tied
    if isinstance(tensor, G) and isinstance(value, G):
        tensor.inner = value.inner
    if isinstance(tensor, G) == isinstance(value, G):
        return DATA.__set__(tensor, value)
    grad, tensor.grad = tensor.grad, None
    torch.utils.swap_tensors(tensor, like(tensor, value))
    tensor.grad = None if grad is None else grad.to(value.device)

def count(kind, what):
    for report in REPORTS:
        getattr(report, kind)[what, where()] += 1

def where():  # file:line of the innermost frame that is of no library
    for frame, line in traceback.walk_stack(sys._getframe(1)):
        name = frame.f_code.co_filename
        if name != __file__ and not any(x in name for x in ("site-packages", "/lib/python3", "<")):
            return f"{name.rpartition('/')[2]}:{line}"
    return "backward pass"

def check(op, values, tensors, written, to_gpu):  # raise where a GPU would; count where it and the CPU wait
    name = op._schema.name.partition("::")[2]
    if name in ("copy_", "_to_copy"):
        from_gpu = isinstance(values.get("src", values["self"]), G)
        to_gpu = isinstance(values["self"], G) if name == "copy_" else to_gpu
        return count("reads" if from_gpu else "uploads", name) if from_gpu != to_gpu else None
    indices = [x for x in values["indices"] if x is not None] if name in INDEXED else []
    if any(x.dtype in (torch.bool, torch.uint8) for x in indices) and not (
            "values" in values and values["values"].numel() == 1):  # x[mask] = 0 is masked_fill
        count("reads", f"{name} by a mask")
    if not all(isinstance(x, G) for x in indices):
        count("uploads", f"{name} by a tensor on the CPU")
    scalars = torch.Tag.pointwise in op.tags or name in SCALARS or name.startswith("_foreach")
    fine = {id(x) for x in tensors if x.dim() == 0 and scalars} - {id(x) for x in written} | {id(x) for x in indices}
    if any(isinstance(x, G) for x in tensors) and not all(isinstance(x, G) or id(x) in fine for x in tensors):
        shapes = ", ".join(f"{x.device.type} {tuple(x.shape)}" for x in tensors)
        raise DeviceMistake(f"{where()}: {op} of tensors on two devices: {shapes}")
    if name in READS and values.get("output_size") is None:
        count("reads", name)

def run(op, args, kwargs, mode=None):
    """Every operator comes here: check it, run it on the CPU tensors, wrap the results."""
    if has_kernel(op.name(), IMPLICIT) and not has_kernel(op.name(), "CPU") and "dot_product" not in op.name():
        with mode or contextlib.nullcontext():  # in inference mode, operators come before they are taken apart
            return op.decompose(*args, **kwargs)
    flat, device = tree_leaves((args, kwargs)), kwargs.get("device")
    tensors = [x for x in flat if isinstance(x, Tensor)]
    on_gpu = [x for x in tensors if isinstance(x, G)]
    to_gpu = bool(on_gpu) if device is None else device.type == DEVICE
    values = dict(zip((x.name for x in op._schema.arguments), args, strict=False), **kwargs)
    written = [values.get(x.name) for x in op._schema.arguments if x.alias_info is not None and x.alias_info.is_write]
    if on_gpu or (to_gpu and tensors):
        check(op, values, tensors, tree_leaves(written), to_gpu)
    if any(isinstance(x, torch._C.Generator) and (x._cdata in GENERATORS) != to_gpu for x in flat):
        raise DeviceMistake(f"{where()}: {op} with a generator of another device")
    args, kwargs = tree_map(lambda x: x.inner if isinstance(x, G) else x, (args, kwargs))
    kwargs |= {"device": torch.device("cpu")} if to_gpu and device is not None else {}
    found, wrappers = op(*args, **kwargs), {id(x.inner): x for x in on_gpu}
    for x in on_gpu:
        if (x.shape, x.stride()) != (x.inner.shape, x.inner.stride()):  # unsqueeze_, out=
            DATA.__set__(x, G(x.inner))
    def wrap(x):
        return x if not (to_gpu and isinstance(x, Tensor)) else wrappers[id(x)] if id(x) in wrappers else G(x)
    returns = [x.alias_info is not None and x.alias_info.is_write for x in op._schema.returns]
    found = zip(returns, found if len(returns) > 1 else [found], strict=False)
    found = [written.pop(0) if same else tree_map(wrap, x) for same, x in found]
    return tuple(found) if len(found) > 1 else found[0] if found else None

class Mode(torch.utils._python_dispatch.TorchDispatchMode):
    def __torch_dispatch__(self, op, types, args=(), kwargs=None): return run(op, args, kwargs or {}, self)

class Generator(torch._C.Generator):  # torch.Generator
    def __new__(cls, device="cpu"):
        new = super().__new__(cls)
        GENERATORS.update({new._cdata: new} if torch.device(device).type == DEVICE else {})
        return new
    device = property(lambda self: torch.device(DEVICE if self._cdata in GENERATORS else "cpu"))

def attention(q, k, v, mask=None, dropout=0.0, causal=False, *, scale=None, **gqa):  # by a CPU's kernel
    choice = torch._fused_sdp_choice(q, k, v, mask, dropout, causal, scale=scale, **gqa)
    if mask is not None and mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=q.dtype).masked_fill_(~mask, -torch.inf)
    flash, math = aten._scaled_dot_product_flash_attention_for_cpu, aten._scaled_dot_product_attention_math
    return (flash(q, k, v, dropout, causal, attn_mask=mask, scale=scale) if choice == 1 else
            math(q, k, v, mask, dropout, causal, scale=scale, **gqa))[0]

def autocast(op, name, *args, **kwargs):  # what torch.autocast("cpu") does before an operator
    lower, high = torch.get_autocast_dtype(DEVICE), torch.float32
    want, both = lower if name in LOWER or name.startswith("conv") else high, (lower, high)
    def cast(x):
        if not isinstance(x, G) or x.dtype not in both:
            return x
        is_weight = x.is_leaf and x.requires_grad and want != high and torch.is_autocast_cache_enabled()
        return CASTS.setdefault(id(x), (x, x.to(want)))[1] if is_weight else x.to(want)
    with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastPrivateUse1)):
        dtypes = {x.dtype for x in tree_leaves(args) if isinstance(x, G)}
        if name not in ("cat", "stack", "index_copy") or high in dtypes:  # these take the widest
            args, kwargs = tree_map(cast, (args, kwargs))
        return op(*args, **kwargs)

def load(file, map_location=None, *args, **kwargs):  # torch.load
    on_gpu = isinstance(map_location, str | torch.device) and torch.device(map_location).type == DEVICE
    found = LOAD(file, "cpu" if on_gpu else map_location, *args, **kwargs)
    return tree_map(lambda x: x.to(DEVICE) if on_gpu and isinstance(x, Tensor) else x, found)

torch_pretend = types.SimpleNamespace(  # like torch.cuda
    is_available=lambda: bool(REPORTS), device_count=lambda: 1, current_device=lambda: 0, manual_seed_all=lambda x: x,
    synchronize=lambda device=None: count("reads", "synchronize"), _is_in_bad_fork=lambda: False,
    get_rng_state=lambda device=None: torch.get_rng_state(), set_device=lambda device: None, empty_cache=lambda: None,
    set_rng_state=lambda state, device=None: torch.set_rng_state(state), max_memory_allocated=lambda device=None: 0,
    get_amp_supported_dtype=lambda: [torch.bfloat16, torch.float16])
backend._DummyPrivateUse1Hook.is_available = lambda self: bool(REPORTS)
backend._setup_privateuseone_for_python_backend(DEVICE, torch_pretend)
lib, every = torch.library.Library("aten", "IMPL"), torch.library.Library("_", "IMPL")
lib.impl("scaled_dot_product_attention", attention, "AutogradPrivateUse1")
every.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
for full in [x[6:] for x in torch._C._dispatch_get_all_op_names() if x.startswith("aten::")]:
    op = getattr(getattr(aten, full.partition(".")[0]), full.partition(".")[2] or "default")
    # torch.tensor calls these three. The others are made of operators, but a CPU has a kernel.
    made = has_kernel(op.name(), IMPLICIT) and has_kernel(op.name(), "CPU")
    if made or full in ("empty.memory_format", "empty_strided", "copy_"):
        lib.impl(full, lambda *args, op=op, **kwargs: run(op, args, kwargs), "PrivateUse1")
    if has_kernel(op.name(), "AutocastCPU"):
        lib.impl(full, functools.partial(autocast, op, full.partition(".")[0]), "AutocastPrivateUse1")

@contextlib.contextmanager
def pretend_gpu():
    """Inside the block, DEVICE is a device. Yields a report with two counters, reads and uploads."""
    report = types.SimpleNamespace(reads=collections.Counter(), uploads=collections.Counter())
    with (mock.patch.multiple(torch, Generator=Generator, load=load, _has_compatible_shallow_copy_type=lambda *_: True,
                              clear_autocast_cache=lambda: CASTS.clear() or CLEAR()),
          mock.patch.multiple(Tensor, data=property(DATA.__get__, set_data), pin_memory=lambda self, *_: self), Mode()):
        REPORTS.append(report)
        try: yield report
        finally: REPORTS.pop()

with pretend_gpu():  # fails here if there was a backward pass before the import: then it has no thread for the device
    torch.ones(1, device=DEVICE, requires_grad=True).sum().backward()
