"""Resume state: what a run needs to continue as if it had never stopped."""

import random
from pathlib import Path

import torch

from model.cli import UserError, first_line
from model.files import open_atomically
from model.loading import MODEL_SIZES
from model.weights import file_stem


def random_state() -> dict:
    """The state of every random generator of this process."""
    version, numbers, gauss = random.getstate()
    return {"python": [version, list(numbers), gauss], "torch": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
            "mps": torch.mps.get_rng_state() if torch.backends.mps.is_available() else None}


def restore_random_state(state: dict) -> None:
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
    if state.get("mps") is not None and torch.backends.mps.is_available():
        torch.mps.set_rng_state(state["mps"])


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
        raise UserError(f"{path}: not a resume state of this program ({first_line(error)}); move it away, or start "
                        "anew with --from_resume 0") from None


def load_resume(path: Path, settings: dict, inputs: dict, weight: str | None) -> dict | None:
    """The state at `path`, or None where there is none. Raises UserError naming the first setting that has changed.

    `settings`: by the name of a flag, its value, or for those in `inputs` a hash of what it names there. What a state
    of an older version does not hold is not compared. `weight`: name of its weights, if a run can start from them.
    """
    state = read_resume(path)
    for name, value in settings.items() if state else ():
        saved = state["settings"].get(name, value)
        if saved == value:
            continue
        if name in inputs:
            value, saved = inputs[name], state.get("inputs", {}).get(name)
        change = f"{path} was made with {saved}; name that again" if value != saved else (
            f"what it holds, or how it is read, has changed since {path} was made; restore it")
        from_weight = f" --from_weight {weight} (to start from its weights)" * bool(weight and name not in MODEL_SIZES)
        raise UserError(f"--{name} {value}: {change}, or begin another run: --from_resume 0 --save_weight OTHER_NAME"
                        f"{from_weight}")
    return state
