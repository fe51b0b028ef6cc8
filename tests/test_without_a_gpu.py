"""--cuda where there is no GPU: every script that has the flag trains and resumes on a make-believe device, and
evaluates what it has learned. Where there is a GPU, tests/test_with_a_gpu.py does the same there.

The make-believe device's tensors compute on the CPU but say that they are elsewhere, and what CUDA refuses is refused:
operations on tensors of both devices, a CPU generator's numbers made on the GPU, NumPy's view of a tensor on the GPU.
Speed, bf16 and channels_last are not tested by this.
"""

import importlib

import pytest
import torch
import torch.nn.functional as F
from gpu_runs import RUNS, killed_moved_and_resumed
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

if torch.cuda.is_available():
    pytest.skip("with a make-believe GPU beside it, PyTorch's true one fails", allow_module_level=True)


class Backend(_DummyBackendModule):
    @staticmethod
    def get_amp_supported_dtype():
        return [torch.bfloat16]


_setup_privateuseone_for_python_backend("pretended", Backend())
GPU = torch.device("pretended", 0)
# Without this autocast refuses a device that it has no rules for.
AUTOCAST = torch.library.Library("_", "IMPL", "AutocastPrivateUse1")
AUTOCAST.fallback(torch.library.fallthrough_kernel)


class OnGPU(torch.Tensor):
    """A tensor that says it is on the GPU; `inner` has its numbers."""

    @staticmethod
    def __new__(cls, inner, requires_grad=False):
        layout = {"strides": inner.stride(), "storage_offset": inner.storage_offset(), "dtype": inner.dtype}
        return cls._make_wrapper_subclass(cls, inner.shape, device=GPU, requires_grad=requires_grad, **layout)

    def __init__(self, inner, requires_grad=False):
        self.inner = inner

    def tolist(self):  # this and torch.save work on CUDA
        return self.inner.tolist()

    def __reduce_ex__(self, protocol):
        return self.inner.__reduce_ex__(protocol)

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return on_either_device(function, args, kwargs or {})


class PretendedGPU(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return on_either_device(function, args, kwargs or {})


def on_either_device(function, args: tuple, kwargs: dict):
    """The operation, computed on the CPU, its result on the device where CUDA's would be; or CUDA's refusal."""
    name, tensors = function.overloadpacket.__name__, [x for x in tree_leaves((args, kwargs)) if torch.is_tensor(x)]
    on_gpu = any(isinstance(x, OnGPU) for x in tensors)
    from_cpu = any(x.dim() > 0 and not isinstance(x, OnGPU) for x in tensors)
    indexing = name in ("index", "index_put_") and isinstance(args[0], OnGPU)  # indices may be on the CPU
    if on_gpu and from_cpu and not indexing and name not in ("copy_", "_to_copy"):
        raise RuntimeError(f"{name}: tensors on the GPU and on the CPU")
    device = kwargs.get("device")
    to_gpu = on_gpu if device is None else torch.device(device).type == GPU.type
    if to_gpu and kwargs.get("generator") is not None:
        raise RuntimeError(f"{name}: a CPU generator for a tensor on the GPU")

    def inner(x):
        return x.inner if isinstance(x, OnGPU) else torch.device("cpu") if isinstance(x, torch.device) else x

    result = function(*tree_map(inner, args), **tree_map(inner, kwargs))
    if function._schema.is_mutable:  # in place: what was given is what comes back
        return None if result is None else kwargs.get("out", args[0])
    return tree_map(lambda x: OnGPU(x) if torch.is_tensor(x) and to_gpu else x, result)


class Torch:
    """torch with this GPU as cuda:0, for a script's own calls."""

    class cuda:
        is_available, device_count = lambda: True, lambda: 1

    def device(self, kind, index=0):
        return GPU if kind == "cuda" else torch.device(kind)

    def tensor(self, numbers):  # CUDA's own are read one by one, and past __torch_dispatch__
        if isinstance(numbers, list):
            numbers = [x.tolist() if torch.is_tensor(x) else x for x in numbers]
        return torch.tensor(numbers)

    def __getattr__(self, name):
        return getattr(torch, name)


def test_the_make_believe_gpu_refuses_what_cuda_refuses():
    generator, layer = torch.Generator(), torch.nn.Linear(3, 2)
    with PretendedGPU():
        x, there = torch.ones(4, 3), layer.to(GPU)
        assert there(x.to(GPU)).device == GPU and x.to(GPU).cpu().numpy().sum() == 12
        with pytest.raises(RuntimeError, match="on the GPU and on the CPU"):
            there(x)
        with pytest.raises(RuntimeError, match="on the GPU and on the CPU"):
            x[torch.tensor([0, 1]).to(GPU)]
        with pytest.raises(RuntimeError, match="generator"):
            torch.rand(3, device=GPU, generator=generator)
        with pytest.raises(RuntimeError, match="numpy"):
            x.to(GPU).numpy()


def plain_gru(cell, x, h):
    """nn.GRUCell without the kernel that it calls on a GPU, which the CPU lacks."""
    xs, hs = F.linear(x, cell.weight_ih, cell.bias_ih), F.linear(h, cell.weight_hh, cell.bias_hh)
    (xr, xz, xn), (hr, hz, hn) = xs.chunk(3, -1), hs.chunk(3, -1)
    z = torch.sigmoid(xz + hz)
    return (1 - z) * torch.tanh(xn + torch.sigmoid(xr + hr) * hn) + z * h


@pytest.mark.parametrize("name, flags", RUNS)
def test_no_tensor_is_on_the_wrong_device(tmp_path, monkeypatch, name, flags):
    monkeypatch.setattr(importlib.import_module(name), "torch", Torch())
    monkeypatch.setattr(torch.nn.GRUCell, "forward", plain_gru)
    assert killed_moved_and_resumed(tmp_path, name, flags, PretendedGPU()) == {GPU}
