"""The CUDA paths without a GPU: PyTorch's CUDA build on a null device, whose kernels do nothing or what a CPU would.

NULLCUDA is the command that runs a script on such a device, and passes NULLCUDA_SM on: its compute capability.
"""

import os
import shlex
import subprocess

import pytest
from lab import ROOT

COMMAND = shlex.split(os.environ.get("NULLCUDA", ""))


@pytest.mark.skipif(not COMMAND, reason="NULLCUDA names no null device")
@pytest.mark.parametrize("capability", ["75", "86", "90", "120"])
def test_losses_answers_graphs_waits_and_memory_are_as_they_should_be(capability):
    environment = os.environ | {"PROJECT": str(ROOT), "NULLCUDA_SM": capability, "NULLCUDA_GB": "8"}
    done = subprocess.run([*COMMAND, "tests/null_device.py"], cwd=ROOT, env=environment, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0, done.stdout
