"""Every script that has --cuda trains on a GPU, resumes there and on the CPU, and evaluates what it has learned."""

from contextlib import nullcontext

import pytest
import torch
from gpu_runs import RUNS, killed_moved_and_resumed


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("name, flags", RUNS)
def test_cuda(tmp_path, name, flags):
    devices = killed_moved_and_resumed(tmp_path, name, flags, nullcontext())
    assert {device.type for device in devices} == {"cuda"}
