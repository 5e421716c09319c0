"""Which device a program runs on, in which precision it is fast, and how much memory was used."""

import ctypes
import os
import shutil
import sys
from pathlib import Path

import torch

from model.cli import UserError, first_line, notice
from model.moe import has_grouped_mm

CUDA_ADVICE = ("PyTorch's build must fit the card and its driver: pip install torch --index-url "
               "https://download.pytorch.org/whl/cu130; for a driver before 580, or a card before Turing such as V100, "
               "'torch<2.15' and whl/cu126")
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4  # of glibc's malloc.h


def choose_device(name: str, local_rank: int = 0) -> torch.device:
    """The device called `name`, made the current one; `auto`: CUDA, else MPS, else CPU.

    Raises UserError when the machine lacks it or this PyTorch cannot compute on it, which only a kernel shows.
    """
    if name == "auto" and torch.backends.mps.is_available():
        return torch.device("mps")
    try:
        device = torch.device("cuda" if name == "auto" else name)
        if device.type == "cuda":
            device = torch.device("cuda", device.index if device.index is not None else local_rank)
        torch.ones(1, device=device).add(1).item()
        if device.type == "cuda":
            torch.cuda.set_device(device)  # random numbers and pinned memory then belong to it
            torch.backends.cuda.enable_cudnn_sdp(False)  # it spends 0.1 to 0.4 s on planning for each new shape
    except (RuntimeError, AssertionError) as error:
        if name != "auto":
            is_build = name.startswith("cuda") and "ordinal" not in str(error)
            raise UserError(f"--device {name}: {first_line(error)}{f'. {CUDA_ADVICE}' if is_build else ''}") from None
        if shutil.which("nvidia-smi") and os.environ.get("CUDA_VISIBLE_DEVICES") != "":
            notice(f"--device auto takes the CPU, not the NVIDIA card: {first_line(error)}. {CUDA_ADVICE}")
        device = torch.device("cpu")
    return device


def cpu_has_bfloat16() -> bool:
    """Whether the CPU multiplies bf16 matrices in hardware; else bf16 is emulated, several times slower than fp32."""
    return cpu_has_amx() or getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)()


def cpu_has_amx() -> bool:
    """Whether the CPU has matrix units (AMX), several times as fast as its vector units."""
    return getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)()


def training_dtype(device: torch.device) -> torch.dtype:
    """bf16 where the device multiplies it in hardware; else fp16 on a GPU (with loss scaling) and fp32 on a CPU."""
    if device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.float16
    return torch.float32 if device.type == "cpu" and not cpu_has_bfloat16() else torch.bfloat16


def inference_dtype(device: str | torch.device, use_moe: bool = False) -> torch.dtype:
    """Half precision where the device multiplies it in hardware: decoding waits for the weights to be read."""
    kind = torch.device(device).type
    if kind == "cpu":
        return torch.bfloat16 if cpu_has_bfloat16() else torch.float32
    if use_moe and kind == "cuda" and has_grouped_mm():
        return torch.bfloat16  # in which one kernel takes all experts
    return torch.float16 if kind == "cuda" else torch.float32


def compile_error(device: torch.device, options: dict | None = None) -> str | None:
    """Why torch.compile does not work here with `options`, None if it does: only compiling something shows."""
    try:
        torch.compile(lambda x: x.sin() + 1, options=options)(torch.ones(8, device=device))
    except Exception as error:
        return f"{type(error).__name__}: is a C++ compiler installed?"
    return None


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def peak_memory(device: torch.device) -> float:
    """Largest memory so far in GB: of the device, or of the process on a CPU (0 where the system does not tell)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    try:
        import resource
    except ImportError:  # Windows
        return 0.0
    if sys.platform == "linux":  # whose ru_maxrss counts what the parent had when it started this process, too
        lines = Path("/proc/self/status").read_text().splitlines()
        peaks = [int(line.split()[1]) * 1024 / 1e9 for line in lines if line.startswith("VmHWM:")]
        if peaks:
            return peaks[0]
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9


def machine_memory() -> int | None:
    """Bytes of memory that this machine has, None where the system does not tell."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # Windows
        return None


def keep_freed_memory() -> None:
    """Let glibc keep the memory that a step frees for the next step: the kernel clears every page it hands out anew.

    Measured: docs/experiments.md, "page faults". Other C libraries are left as they are.
    """
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        for option, value in ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, 2**31 - 1), (M_TOP_PAD, 2**26)):
            libc.mallopt(option, value)
