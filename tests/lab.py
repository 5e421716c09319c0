"""Where tests run the stages as users run them: on tiny models and tiny data, with all that a run leaves at hand."""

import json
import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch.utils._pytree import tree_leaves

from model.chat import ChatTokenizer
from model.cli import run_main
from model.model_minimind import MiniMindConfig, MiniMindForCausalLM
from model.weights import save_weight
from trainer import train_pretrain

ROOT = Path(__file__).resolve().parents[1]
SMALL = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 8, "num_key_value_heads": 4}
FLAGS = {**SMALL, "max_seq_len": 64, "batch_size": 2, "accumulation_steps": 2, "dtype": "float32", "device": "cpu",
         "from_weight": "none", "log_interval": 1, "num_workers": 1}
ENVIRONMENT = dict(os.environ)  # of other processes
CLOCKS = ("tokens_per_s", "mfu", "memory_gb", "rollout_s", "scoring_s", "rollout_tokens_per_s")
DEADLINE = 300  # seconds for another process, on a busy machine
TOKENIZER = ChatTokenizer()


def small_model(**options) -> MiniMindForCausalLM:
    return MiniMindForCausalLM(MiniMindConfig(**{**SMALL, **options}))
KINDS = {"pretrain": "pretrain", "dpo": "dpo", "reward": "dpo", "grpo": "rlaif", "ppo": "rlaif",
         "agent": "rlaif"}  # of rows, by stage; the others take conversations


def write_rows(folder: Path) -> None:
    """40 texts, conversations and pairs of very different lengths, all shorter than a row, some held out."""
    dice = random.Random(0)
    words = ["the", "cat", "sees", "a", "red", "house", "and", "runs", "over", "small", "hills", "你", "好", "天", "空"]

    def text(most: int) -> str:
        return " ".join(dice.choices(words, k=dice.randint(3, most)))

    def conversation(turns: int) -> list[dict]:
        return [{"role": role, "content": text(8)} for _ in range(turns) for role in ("user", "assistant")]

    def pair() -> dict:
        *prompt, answer = conversation(dice.randint(1, 2))
        return {"chosen": [*prompt, answer], "rejected": [*prompt, answer | {"content": text(12) + " no"}]}

    rows = {"pretrain": [{"text": text(30)} for _ in range(40)], "pretrain_val": [{"text": text(30)} for _ in range(9)],
            "sft": [{"conversations": conversation(dice.randint(1, 2))} for _ in range(40)],
            "dpo": [pair() for _ in range(40)],
            "rlaif": [{"conversations": conversation(1), "gt": [str(dice.randrange(9))]} for _ in range(40)]}
    for name, content in rows.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))


class JsonHandler(BaseHTTPRequestHandler):
    """What a stand-in for a server is made of: `body()` reads what was sent, `reply` answers."""

    def body(self) -> dict:
        return json.loads(self.rfile.read(int(self.headers["Content-Length"])))

    def reply(self, status: int, value: dict, **headers: str) -> None:
        text = json.dumps(value).encode()
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", "Content-Length": str(len(text)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(text)

    def complete(self, message: str | dict, finish_reason: str = "stop", **headers: str) -> None:
        """Answer as a chat completion does."""
        message = message if isinstance(message, dict) else {"role": "assistant", "content": message}
        self.reply(200, {"id": "1", "object": "chat.completion", "created": 0, "model": "m", "choices": [
            {"index": 0, "message": message, "finish_reason": finish_reason}]}, **headers)

    def log_message(self, *_):
        pass


@contextmanager
def serving(handler: type[BaseHTTPRequestHandler], path: str = "/v1") -> Iterator[str]:
    """A server on a free port of this machine. → its address"""
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}{path}"
    finally:
        server.shutdown()
        server.server_close()


class Lab:
    """A folder where stages are run, as programs or in this process, on the tiny data of all labs."""

    def __init__(self, data: Path, folder: Path):
        self.data, self.out, self.checkpoints = data, folder / "out", folder / "checkpoints"

    def flags(self, stage, **flags) -> list[str]:
        kind = KINDS.get(stage.__name__.removeprefix("trainer.train_"), "sft")
        flags = {"data_path": self.data / f"{kind}.jsonl", "cache_dir": self.data / "cache", "save_dir": self.out,
                 "checkpoint_dir": self.checkpoints, **FLAGS, **flags}
        if kind == "rlaif":
            flags = {name: value for name, value in flags.items() if name not in ("cache_dir", "num_workers")}
        return [f"--{name}={value}" if value is not True else f"--{name}" for name, value in flags.items()
                if value is not None]

    def train(self, stage=train_pretrain, **flags) -> None:
        with mock.patch.object(sys, "argv", [stage.__file__, *self.flags(stage, **flags)]):
            run_main(stage.main)

    def start(self, stage=train_pretrain, launcher: tuple = (), cwd: Path = ROOT, **flags) -> subprocess.Popen:
        command = [sys.executable, *launcher, os.path.relpath(stage.__file__, cwd), *self.flags(stage, **flags)]
        return subprocess.Popen(command, cwd=cwd, env=ENVIRONMENT, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                                stderr=subprocess.PIPE, text=True)

    def fails(self, capsys, status: int, *words: str, **options) -> None:
        """The run ends with `status` and one line on stderr that says all `words`."""
        with pytest.raises(SystemExit) as ended:
            self.train(**options)
        said = capsys.readouterr().err.splitlines()
        assert ended.value.code == status and len(said) == 1 and said[0].startswith("error: "), said
        assert all(word in said[0] for word in words), said[0]

    def weight(self, stem: str = "pretrain_64") -> dict:
        return torch.load(self.out / f"{stem}.pth", weights_only=True)

    def card(self, stem: str = "pretrain_64") -> dict:
        return json.loads((self.out / f"{stem}.json").read_text())

    def state(self, stem: str = "pretrain_64") -> dict:
        return torch.load(self.checkpoints / f"{stem}_resume.pth", weights_only=True)

    def log(self, stem: str = "pretrain_64") -> list[dict]:
        """The metrics, without what depends on the clock."""
        rows = map(json.loads, (self.out / "logs" / f"{stem}.jsonl").read_text().splitlines())
        return [{key: value for key, value in row.items() if key not in CLOCKS}
                for row in rows]

    def losses(self, stem: str = "pretrain_64") -> list[float]:
        return [row["loss"] for row in self.log(stem)]

    def files(self) -> dict[Path, bytes]:
        """The bytes of every weight, its card and the state."""
        found = [path for folder in (self.out, self.checkpoints) for path in folder.iterdir() if path.is_file()]
        assert len(found) >= 3
        return {path: path.read_bytes() for path in found}

    def ended_like(self, other: "Lab", stem: str = "pretrain_64") -> bool:
        """Whether two runs left the same weights, the same state and the same metrics, bit for bit."""
        pairs = zip(tree_leaves(self.state(stem)), tree_leaves(other.state(stem)), strict=True)
        states = all(torch.equal(a, b) if torch.is_tensor(a) else a == b for a, b in pairs)
        pth = [(lab.out / f"{stem}.pth").read_bytes() for lab in (self, other)]
        return states and pth[0] == pth[1] and self.log(stem) == other.log(stem)

    def with_base(self, name: str = "full_sft", **options) -> "Lab":
        """Put a weight there, as if it had been trained. → this lab"""
        save_weight(small_model(**options), name, self.out, TOKENIZER)
        return self


def wait_for(condition: Callable[[], bool], process: subprocess.Popen, seconds: float = DEADLINE) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline and process.poll() is None, process.communicate()
        time.sleep(0.005)
