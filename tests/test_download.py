"""Downloads by the hubs' clients, from a stand-in of both hubs: ranges, broken connections, wrong bytes, no network."""

import hashlib
import http.server
import io
import json
import re
import socket
import subprocess
import sys
import threading
from pathlib import Path
from unittest import mock
from urllib.parse import parse_qs, unquote, urlsplit

import huggingface_hub
import pytest
import torch
from lab import small_model

import eval_llm
from model.chat import TOKENIZER_DIR, ChatTokenizer
from model.cli import run_main
from model.loading import load_for_inference
from model.weights import save_weight
from scripts import download_data, download_model
from scripts.lib.download import HAS_MODELSCOPE

COMMIT = "0123456789abcdef0123456789abcdef01234567"
DATA = "pretrain_t2t_mini.jsonl"
REPOSITORIES = {
    "minimind_dataset": {DATA: b'{"text": "x"}\n' * 20_000, "README.md": b"# Data\n", "dir/a b.jsonl": b"{}\n"},
    "minimind-3": {"config.json": b"{}", "dir/weights.safetensors": b"weights", ".gitattributes": b"*"},
}


class Hub(http.server.ThreadingHTTPServer):
    """Both hubs' lists and files. `break_after`: bytes that a connection brings; `spoil`: the last byte differs."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.break_after, self.spoil, self.knows_ranges = None, False, True
        self.requests: list[tuple[str, str | None]] = []  # path and range
        self.url = f"http://127.0.0.1:{self.server_port}"


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        url = urlsplit(self.path)
        path, query = unquote(url.path), {key: value[0] for key, value in parse_qs(url.query).items()}
        self.server.requests.append((path, self.headers.get("Range")))
        match = re.match(r"(/api(/v1)?)?(/models|/datasets)?/(jingyaogong|gongjy)/([^/]+)(/.*)?", path)
        files = REPOSITORIES.get(match[5]) if match else None
        if files is None:
            self.send_error(404)
        elif "FilePath" in query:
            self.send_content(files[query["FilePath"]])
        elif match[2]:
            listing = [{"Path": "dir", "Type": "tree", "Size": 0}] + [
                {"Path": name, "Type": "blob", "Size": len(content), "Sha256": hashlib.sha256(content).hexdigest()}
                for name, content in files.items()]
            self.send_bytes(json.dumps({"Code": 200, "Success": True, "Data": {"Files": listing}}).encode())
        elif match[1]:
            siblings = [{"rfilename": name, "size": len(content), "blobId": git_blob(content)}
                        | ({"lfs": lfs(content)} if len(content) > 100 else {}) for name, content in files.items()]
            self.send_bytes(json.dumps({"id": match[5], "sha": COMMIT, "siblings": siblings}).encode())
        else:
            self.send_content(files[match[6].removeprefix(f"/resolve/{COMMIT}/")])

    def send_content(self, content: bytes) -> None:
        hub = self.server
        if hub.spoil:
            content = content[:-1] + b"?"
        start = int((self.headers.get("Range") or "bytes=0-")[6:-1]) if hub.knows_ranges else 0
        headers = {"Content-Range": f"bytes {start}-{len(content) - 1}/{len(content)}"} if start else {}
        self.send_bytes(content[start:], 206 if start else 200, headers, hub.break_after)

    def send_bytes(self, body: bytes, status: int = 200, headers: dict | None = None, end: int | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": len(body), **(headers or {})}.items():
            self.send_header(name, str(value))
        self.end_headers()
        self.wfile.write(body[:end])

    def log_message(self, *_) -> None:
        pass


def git_blob(content: bytes) -> str:
    """The object name that git itself gives."""
    done = subprocess.run(["git", "hash-object", "--stdin"], input=content, capture_output=True, check=True)
    return done.stdout.decode().strip()


def lfs(content: bytes) -> dict:
    return {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 130}


@pytest.fixture
def hub(monkeypatch, tmp_path):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "DOWNLOAD_CHUNK_SIZE", 10_000)  # what a broken connection loses
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # between the clients' attempts
    if HAS_MODELSCOPE:
        monkeypatch.setattr("modelscope_hub._download.DOWNLOAD_RETRY_MAX_DELAY_SECONDS", 0)
        monkeypatch.setattr("modelscope_hub._download.DOWNLOAD_INTEGRITY_RETRY_BACKOFF", 0)
    with Hub() as hub:
        thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield hub
        hub.shutdown()
        thread.join()


def run(program, *flags: object) -> None:
    with mock.patch.object(sys, "argv", [program.__file__, *map(str, flags)]):
        run_main(program.main)


def fails(capsys, status: int, words: str, program, *flags: object) -> None:
    with pytest.raises(SystemExit) as ended:
        run(program, *flags)
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert ended.value.code == status and len(errors) == 1 and words in errors[0], errors


needs_modelscope = pytest.mark.skipif(not HAS_MODELSCOPE, reason="ModelScope's client is not installed")
HUBS = ["huggingface", pytest.param("modelscope", marks=needs_modelscope)]


@pytest.fixture(params=HUBS)
def data(request, hub, tmp_path):
    """names → the program that downloads them from one of the hubs, and its flags."""
    flags = ("--hub", request.param, "--base_url", hub.url, "--target", tmp_path)
    return lambda *names: (download_data, *names, *flags)


def files_in(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_files_arrive_by_name_with_their_sizes(data, hub, tmp_path, capsys):
    run(*data())
    assert f"0.3 MB  {DATA}" in capsys.readouterr().out and not list(tmp_path.iterdir())
    run(*data(DATA, "dir/a b.jsonl"))
    content = REPOSITORIES["minimind_dataset"]
    assert files_in(tmp_path) == {DATA: content[DATA], "dir/a b.jsonl": content["dir/a b.jsonl"]}
    progress = capsys.readouterr().err
    assert f"{DATA}:" in progress and "/280k" in progress
    before = len(hub.requests)
    run(*data(DATA, "dir/a b.jsonl"))
    assert capsys.readouterr().out.count("already there") == 2 and len(hub.requests) == before + 1  # the list
    (tmp_path / DATA).write_bytes(content[DATA][:-1] + b"?")
    run(*data(DATA))
    assert (tmp_path / DATA).read_bytes() == content[DATA]


def test_a_broken_connection_is_continued_where_it_broke(data, hub, tmp_path):
    hub.break_after = 100_000
    run(*data(DATA))
    assert [span for _, span in hub.requests[-3:]] == [None, "bytes=100000-", "bytes=200000-"]
    assert files_in(tmp_path) == {DATA: REPOSITORIES["minimind_dataset"][DATA]}


@pytest.mark.parametrize("knows_ranges", [True, False])
def test_a_later_call_continues_or_starts_again(data, hub, tmp_path, knows_ranges):
    hub.knows_ranges, content = knows_ranges, REPOSITORIES["minimind_dataset"][DATA]
    (tmp_path / f"{DATA}.incomplete").write_bytes(content[:70_000])
    run(*data(DATA))
    assert hub.requests[-1][1] == "bytes=70000-" and files_in(tmp_path) == {DATA: content}
    (tmp_path / DATA).unlink()
    (tmp_path / f"{DATA}.incomplete").write_bytes(content + b"of another file")
    run(*data(DATA))
    assert files_in(tmp_path) == {DATA: content}


def test_wrong_bytes_get_no_name(data, hub, tmp_path, capsys):
    hub.spoil = True
    for name in (DATA, "README.md"):
        fails(capsys, 1, "was removed, try again or name another --hub", *data(name))
    assert not list(tmp_path.iterdir())


def test_a_connection_that_brings_nothing_is_given_up_and_what_arrived_is_kept(data, hub, tmp_path, capsys):
    hub.break_after = 0
    fails(capsys, 1, "run the same command again", *data(DATA))
    assert not (tmp_path / DATA).exists()
    (tmp_path / f"{DATA}.incomplete").write_bytes(b"{")
    fails(capsys, 1, "run the same command again", *data(DATA))
    assert files_in(tmp_path) == {f"{DATA}.incomplete": b"{"}


def test_absent_names_and_no_network_end_in_one_line(data, hub, tmp_path, capsys, monkeypatch):
    fails(capsys, 2, f"no file pretrain.jsonl; there are README.md, dir/a b.jsonl, {DATA}", *data("pretrain.jsonl"))
    program, *flags = data()
    fails(capsys, 2, "check the name, --hub and --base_url", download_model, "minimind-0", *flags)
    with socket.socket() as unused:  # bound and not listening: nobody answers
        unused.bind(("127.0.0.1", 0))
        fails(capsys, 1, "no connection", program, *flags, "--base_url", f"http://127.0.0.1:{unused.getsockname()[1]}")
    monkeypatch.setattr(Handler, "send_bytes", lambda self, *_: SEND_BYTES(self, b"<html>a portal's page</html>"))
    fails(capsys, 1, "not the file list of a hub", program, *flags)


SEND_BYTES = Handler.send_bytes


def test_offline_mode_and_an_absent_client_are_named(hub, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("scripts.lib.download.HAS_MODELSCOPE", False)
    fails(capsys, 2, "pip install modelscope", download_data, "--hub", "modelscope")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    fails(capsys, 1, "HF_HUB_OFFLINE", download_data, "--hub", "huggingface", "--base_url", hub.url)


def test_huggingface_takes_its_address_and_token_from_the_environment(hub, tmp_path):
    """In a process of its own: the client reads HF_ENDPOINT when it is imported."""
    environment = {"HF_ENDPOINT": hub.url, "HF_TOKEN": "hf_secret", "HF_HUB_OFFLINE": "0", "no_proxy": "127.0.0.1"}
    tokens = []

    def do_get(handler: Handler) -> None:
        if "/minimind_dataset" in handler.path:
            tokens.append(handler.headers["Authorization"])
        DO_GET(handler)

    with mock.patch.object(Handler, "do_GET", do_get), mock.patch.dict("os.environ", environment):
        done = subprocess.run([sys.executable, download_data.__file__, "README.md", "--hub", "huggingface",
                               "--target", tmp_path], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert files_in(tmp_path) == {"README.md": b"# Data\n"} and tokens == ["Bearer hf_secret"] * 2


DO_GET = Handler.do_GET


@pytest.mark.parametrize("name", HUBS)
def test_a_hub_cannot_write_elsewhere(hub, tmp_path, capsys, monkeypatch, name):
    monkeypatch.setitem(REPOSITORIES["minimind_dataset"], "../outside", b"x")
    fails(capsys, 1, "outside", download_data, "../outside", "--hub", name, "--base_url", hub.url,
          "--target", tmp_path / "in")
    assert not (tmp_path / "outside").exists()


def published_weight(state: dict) -> bytes:
    buffer = io.BytesIO()
    torch.save({key: value.half() for key, value in state.items()}, buffer)
    return buffer.getvalue()


@pytest.fixture
def published(monkeypatch) -> dict[str, bytes]:
    """The author's repository of .pth files, whose tokenizer is another than ours and lies in another repository."""
    layout = json.loads((TOKENIZER_DIR / "tokenizer.json").read_text("utf-8"))
    names = {number: token for token, number in layout["model"]["vocab"].items()}
    layout["model"]["vocab"] |= {names[1000]: 1001, names[1001]: 1000}
    monkeypatch.setitem(REPOSITORIES["minimind-3"], "tokenizer.json", json.dumps(layout).encode())
    monkeypatch.setitem(REPOSITORIES["minimind-3"], "tokenizer_config.json", b"{}")
    repository = {"full_sft_64.pth": published_weight(small_model().state_dict()), ".gitattributes": b"*",
                  "lora_medical_64.pth": published_weight({"model.layers.0.q_proj.lora.A.weight": torch.ones(2, 2)})}
    monkeypatch.setitem(REPOSITORIES, "minimind-3-pytorch", repository)
    return repository


@pytest.mark.parametrize("name", HUBS)
def test_weights_go_to_out_with_their_tokenizer_and_folders_to_the_project(hub, published, tmp_path, capsys,
                                                                           monkeypatch, name):
    monkeypatch.setattr(download_model, "OUT_DIR", tmp_path / "out")
    monkeypatch.setattr(download_model, "ROOT", tmp_path)
    flags = ("--hub", name, "--base_url", hub.url)
    run(download_model, "minimind-3-pytorch", *flags)
    assert "full_sft_64.pth" in capsys.readouterr().out and not list(tmp_path.iterdir())
    run(download_model, "minimind-3-pytorch", "full_sft_64.pth", "lora_medical_64.pth", *flags)
    arrived = files_in(tmp_path / "out")
    assert {path: arrived[path] for path in published if path in arrived} == {
        path: content for path, content in published.items() if path.endswith(".pth")}
    assert sorted(arrived.keys() - published.keys()) == [
        "full_sft_64.json", "lora_medical_64.json", "minimind-3/tokenizer.json", "minimind-3/tokenizer_config.json"]
    run(download_model, "minimind-3", *flags)
    assert files_in(tmp_path / "minimind-3") == {
        path: content for path, content in REPOSITORIES["minimind-3"].items() if not path.startswith(".")}


def test_a_published_weight_is_used_with_its_own_tokenizer(hub, published, tmp_path, capsys):
    flags = ("--hub", "huggingface", "--base_url", hub.url, "--target", tmp_path)
    run(download_model, "minimind-3-pytorch", "full_sft_64.pth", *flags)
    model, tokenizer = load_for_inference("model", "full_sft", tmp_path, None, "cpu")
    assert tokenizer.folder == tmp_path / "minimind-3" and model.config.hidden_size == 64
    assert ChatTokenizer().token_bytes[1000] == tokenizer.token_bytes[1001]
    run(eval_llm, "--save_dir", tmp_path, "--prompt", "hello", "--max_new_tokens", 2, "--device", "cpu")
    fails(capsys, 2, f"--tokenizer {tmp_path / 'minimind-3'}", eval_llm, "--save_dir", tmp_path, "--prompt", "hello",
          "--tokenizer", TOKENIZER_DIR)


def test_a_weight_trained_here_is_not_replaced_and_one_without_tokenizer_is_refused(hub, published, tmp_path, capsys,
                                                                                    monkeypatch):
    flags = ("full_sft_64.pth", "--hub", "huggingface", "--base_url", hub.url, "--target", tmp_path)
    path = save_weight(small_model(), "full_sft", tmp_path, ChatTokenizer())
    before = path.read_bytes(), path.with_suffix(".json").read_bytes()
    fails(capsys, 2, "not the published file", download_model, "minimind-3-pytorch", *flags)
    assert (path.read_bytes(), path.with_suffix(".json").read_bytes()) == before
    monkeypatch.setitem(REPOSITORIES, "minimind-3", {"README.md": b""})
    path.unlink()
    fails(capsys, 2, "no file tokenizer.json", download_model, "minimind-3-pytorch", *flags)
    assert not path.exists()
