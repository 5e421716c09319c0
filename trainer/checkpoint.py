"""Resume state: what a run needs to continue as if it had never stopped."""

import random
from pathlib import Path

import torch

from model.cli import UserError, first_line
from model.files import open_atomically
from model.weights import file_stem


def random_state() -> dict:
    """The state of every random generator of this process."""
    version, numbers, gauss = random.getstate()
    return {"python": [version, list(numbers), gauss], "torch": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None}


def restore_random_state(state: dict) -> None:
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def save_resume(path: Path, state: dict) -> None:
    with open_atomically(path) as file:
        torch.save(state, file)


def resume_name(name: str, config) -> str:
    return f"{file_stem(name, config)}_resume.pth"


def read_resume(path: Path, mmap: bool = False) -> dict | None:
    """The state at `path`, or None where there is none. `mmap`: read tensors only where they are used."""
    if not path.exists():
        return None
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
        return state | {"settings": dict(state["settings"])}
    except Exception as error:
        raise UserError(f"{path}: not a resume state: {first_line(error)}") from None


def load_resume(path: Path, settings: dict) -> dict | None:
    """The state at `path`, or None where there is none. Raises UserError when it belongs to other settings."""
    state = read_resume(path)
    for name, value in settings.items() if state else ():
        if (saved := state["settings"].get(name)) != value:
            raise UserError(f"{path} was made with {name} {saved}, now it is {value}; "
                            "use the old settings, or start anew with --from_resume 0")
    return state
