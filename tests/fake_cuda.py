"""An NVIDIA GPU that is not there: shapes, dtypes and devices of every operator, and no numbers.

PyTorch's FakeTensorMode runs operators without data, on any device: LLaMA-3-8B takes no memory. It
refuses an operator whose tensors lie on different devices. Two things are added here:

* A device guard for CUDA, which a PyTorch built without CUDA lacks: two lines of C++.
* ``Watch`` counts what a GPU would be waited for, and keeps what was asked for while a graph was
  recorded apart from the rest. The host reads made-up values: 0 and True.
"""
import shutil
import subprocess
from collections import Counter
from contextlib import contextmanager, nullcontext
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.cpp_extension import include_paths, library_paths

GUARD = """
#include <c10/core/impl/DeviceGuardImplInterface.h>
namespace c10::impl { C10_REGISTER_GUARD_IMPL(CUDA, NoOpDeviceGuardImpl<DeviceType::CUDA>) }
"""


def load_guard(folder: Path):
    """Compile and load the device guard; skips the test where there is no compiler."""
    if torch.backends.cuda.is_built():                   # has its own
        return
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("needs a C++ compiler")
    source = folder / "guard.cpp"
    library = folder / "guard.so"
    source.write_text(GUARD)
    options = ["-std=c++20", "-shared", "-fPIC"]
    headers = [f"-I{path}" for path in include_paths()]
    libraries = [f"-L{path}" for path in library_paths()] + ["-lc10"]
    subprocess.run([compiler, *options, *headers, source, "-o", library, *libraries],
                   check=True, capture_output=True)
    torch.ops.load_library(library)


class Watch(TorchDispatchMode):
    """Counts, within a ``with`` block, what goes between the host and the device.

    reads: values that the host waits for. uploads: tensors sent to the device. outside: operators
    on the device that no graph replays. replays: of graphs.
    """

    def __init__(self):
        super().__init__()
        self.recording = False
        self.reset()

    def reset(self):
        self.reads = 0
        self.uploads = 0
        self.replays = 0
        self.outside = Counter()                         # by operator
        self.inside = Counter()                          # of the graphs recorded

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if operator.namespace != "aten":                 # asks for a tensor's device, and such
            return operator(*args, **kwargs)
        with self:
            parts = operator.decompose(*args, **kwargs)  # if it is made of others
        if parts is not NotImplemented:
            return parts
        name = operator.overloadpacket.__name__
        given = tensors_in((args, kwargs))
        for x in given:
            x.constant = None                            # one number's value, which cannot be sent
        if name == "_local_scalar_dense" and given[0].is_cuda:
            return self.read(given[0].dtype)
        out = operator(*args, **kwargs)
        made = tensors_in(out)
        from_device = any(x.is_cuda for x in given)
        to_device = any(x.is_cuda for x in made)
        if made and from_device and not to_device:
            self.read(torch.bool)                        # a copy to the host waits too
        if to_device and any(not x.is_cuda and x.dim() for x in given):
            assert not self.recording, "the host sends to the device while a graph is recorded"
            self.uploads += 1
        if (from_device or to_device) and not operator.is_view:
            (self.inside if self.recording else self.outside)[name] += 1
        return out

    def read(self, dtype: torch.dtype):
        assert not self.recording, "the host reads from the device while a graph is recorded"
        self.reads += 1
        if dtype == torch.bool:
            return True
        return 0.0 if dtype.is_floating_point else 0


def tensors_in(tree) -> list[torch.Tensor]:
    return [x for x in tree_leaves(tree) if isinstance(x, torch.Tensor)]


class Stream:
    def wait_stream(self, other):
        pass


@contextmanager
def fake_cuda(monkeypatch):
    """Within a ``with`` block there is a GPU, of fake tensors; gives its ``Watch``."""
    fake = FakeTensorMode()
    watch = Watch()
    generator = torch.Generator

    class Graph:
        def replay(self):
            watch.replays += 1

    @contextmanager
    def recorded(graph, pool=None, stream=None):
        watch.recording = True
        yield
        watch.recording = False

    def tolist(self):
        """One read, of made-up values. Truth tables have a column 0 of False: see the DP's."""
        value = watch.read(self.dtype)
        if self.dim() == 2:
            false_first = self.dtype == torch.bool
            return [[value and (not false_first or j > 0) for j in range(self.shape[1])]
                    for _ in range(self.shape[0])]
        return [value] * self.shape[0] if self.dim() else value

    for name, stand_in in {
        "synchronize": lambda device=None: None,
        "Stream": lambda device=None: Stream(),
        "current_stream": lambda device=None: Stream(),
        "stream": lambda stream: nullcontext(),
        "device": lambda device: nullcontext(),
        "graph_pool_handle": object,
        "CUDAGraph": Graph,
        "graph": recorded,
    }.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    monkeypatch.setattr(torch, "Generator", lambda device="cpu": generator())
    monkeypatch.setattr(FakeTensor, "tolist", tolist)
    cudnn = torch.backends.cuda.cudnn_sdp_enabled()
    with fake, watch:
        yield watch
    torch.backends.cuda.enable_cudnn_sdp(cudnn)
