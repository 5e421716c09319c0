"""Resume state: what a run needs to continue as if it had never stopped."""

import random
from pathlib import Path

import torch

from model.cli import UserError, first_line
from model.files import open_atomically


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


def load_resume(path: Path, settings: dict) -> dict | None:
    """The state at `path`, or None where there is none. Raises UserError when it belongs to other settings."""
    if not path.exists():
        return None
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        saved = state["settings"]
    except Exception as error:
        raise UserError(f"{path}: not a resume state: {first_line(error)}") from None
    for name, value in settings.items():
        if saved.get(name) != value:
            raise UserError(f"{path} was made with {name} {saved.get(name)}, now it is {value}; "
                            "use the old settings, or start anew with --from_resume 0")
    return state
