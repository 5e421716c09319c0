"""Downloads against a stand-in of both hubs: ranges, broken connections, wrong bytes, absent files, no network."""

import hashlib
import http.server
import json
import socket
import subprocess
import sys
import threading
from pathlib import Path
from unittest import mock
from urllib.parse import unquote, urlsplit

import pytest

from model.cli import run_main
from scripts import download_data, download_model

CONTENT = {"pretrain_t2t_mini.jsonl": b'{"text": "x"}\n' * 20_000, "README.md": b"# Data\n", "dir/a b.jsonl": b"{}\n"}
WEIGHTS = {"full_sft_768.pth": b"weights" * 1000, ".gitattributes": b"*"}


class Hub(http.server.ThreadingHTTPServer):
    """Both hubs' lists and files. `breaks`: connections end after so many bytes; `spoil`: bytes are not the listed."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.breaks, self.spoil, self.knows_ranges, self.asked = 0, False, True, []
        self.url = f"http://127.0.0.1:{self.server_port}"


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        hub, path = self.server, unquote(urlsplit(self.path).path)
        hub.asked.append((self.path, self.headers.get("Range")))
        files = WEIGHTS if "-pytorch" in path else CONTENT
        if "minimind-0" in path:
            return self.send_error(404)
        if path.startswith("/api/v1/"):
            return self.answer(json.dumps({"Code": 200, "Data": {"Files": [
                {"Path": "dir", "Type": "tree", "Size": 0}, *({"Path": name, "Type": "blob", "Size": len(content),
                 "Sha256": hashlib.sha256(content).hexdigest()} for name, content in files.items())]}}).encode())
        if path.startswith("/api/"):
            return self.answer(json.dumps([{"type": "directory", "path": "dir", "oid": "0", "size": 0}, *(
                {"type": "file", "path": name, "size": len(content), "oid": git_blob(content)} | (
                    {"lfs": {"oid": hashlib.sha256(content).hexdigest()}} if name.endswith("mini.jsonl") else {})
                for name, content in files.items())]).encode())
        name = path.split("/master/" if "/master/" in path else "/main/")[1]
        content = files[name]
        if hub.spoil:
            content = content[:-1] + b"?"
        start = int((self.headers.get("Range") or "bytes=0-")[6:-1]) if hub.knows_ranges else 0
        self.answer(content[start:], 206 if start else 200, hub.breaks)

    def answer(self, body: bytes, status: int = 200, breaks: int = 0) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[:breaks] if breaks else body)

    def log_message(self, *_) -> None:
        pass


def git_blob(content: bytes) -> str:
    """As git names it."""
    done = subprocess.run(["git", "hash-object", "--stdin"], input=content, capture_output=True, check=True)
    return done.stdout.decode().strip()


@pytest.fixture
def hub(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
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
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert ended.value.code == status and len(said) == 1 and words in said[0], said


@pytest.fixture(params=["modelscope", "huggingface"])
def data(request, hub, tmp_path):
    flags = ("--hub", request.param, "--base_url", hub.url, "--target", tmp_path)
    return lambda *names: (download_data, *names, *flags)


def test_files_arrive_by_name_with_their_sizes_told(data, hub, tmp_path, capsys):
    run(*data())
    assert "0.3 MB  pretrain_t2t_mini.jsonl" in capsys.readouterr().out and not list(tmp_path.iterdir())
    run(*data("pretrain_t2t_mini.jsonl", "dir/a b.jsonl"))
    found = {str(path.relative_to(tmp_path)): path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert found == {str(Path(name)): content for name, content in CONTENT.items() if name != "README.md"}
    said = capsys.readouterr().err
    assert "pretrain_t2t_mini.jsonl: 100%" in said and "280k/280k" in said
    before = len(hub.asked)
    run(*data("pretrain_t2t_mini.jsonl"))
    assert "already there" in capsys.readouterr().out and len(hub.asked) == before + 1  # the list
    (tmp_path / "pretrain_t2t_mini.jsonl").write_bytes(CONTENT["pretrain_t2t_mini.jsonl"][:-1] + b"?")
    run(*data("pretrain_t2t_mini.jsonl"))
    assert (tmp_path / "pretrain_t2t_mini.jsonl").read_bytes() == CONTENT["pretrain_t2t_mini.jsonl"]


def test_a_broken_connection_is_taken_up_where_it_broke(data, hub, tmp_path):
    hub.breaks = 100_000
    run(*data("pretrain_t2t_mini.jsonl"))
    assert [span for _, span in hub.asked[-3:]] == [None, "bytes=100000-", "bytes=200000-"]
    assert (tmp_path / "pretrain_t2t_mini.jsonl").read_bytes() == CONTENT["pretrain_t2t_mini.jsonl"]


@pytest.mark.parametrize("knows_ranges", [True, False])
def test_a_later_call_goes_on_or_starts_again(data, hub, tmp_path, knows_ranges):
    hub.knows_ranges = knows_ranges
    (tmp_path / "pretrain_t2t_mini.jsonl.part").write_bytes(CONTENT["pretrain_t2t_mini.jsonl"][:70_000])
    run(*data("pretrain_t2t_mini.jsonl"))
    assert hub.asked[-1][1] == "bytes=70000-"
    assert [path.name for path in tmp_path.iterdir()] == ["pretrain_t2t_mini.jsonl"]
    assert (tmp_path / "pretrain_t2t_mini.jsonl").read_bytes() == CONTENT["pretrain_t2t_mini.jsonl"]


def test_wrong_bytes_get_no_name(data, hub, tmp_path, capsys):
    hub.spoil = True
    for name in ("pretrain_t2t_mini.jsonl", "README.md"):
        fails(capsys, 1, "not what the hub lists", *data(name))
    assert not list(tmp_path.iterdir())


def test_a_connection_that_brings_nothing_is_given_up_and_what_came_is_kept(data, hub, tmp_path, capsys, monkeypatch):
    (tmp_path / "pretrain_t2t_mini.jsonl.part").write_bytes(b"{")
    monkeypatch.setattr(Handler, "answer", lambda self, body, status=200, breaks=0: (
        ORIGINAL(self, body, status, breaks) if "/api/" in self.path else ORIGINAL(self, body, status, -len(body))))
    fails(capsys, 1, "broke 5 times at 1 of 280,000 bytes", *data("pretrain_t2t_mini.jsonl"))
    assert (tmp_path / "pretrain_t2t_mini.jsonl.part").read_bytes() == b"{"


ORIGINAL = Handler.answer


def test_absent_names_and_no_network_are_told_in_one_line(data, hub, tmp_path, capsys):
    fails(capsys, 2, "no file pretrain.jsonl; there are README.md", *data("pretrain.jsonl"))
    fails(capsys, 2, "404", download_model, "minimind-0", "--base_url", hub.url)
    with socket.socket() as unused:  # bound and not listening: nobody answers
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}"
        fails(capsys, 1, "no connection", download_data, "--base_url", url)
    fails(capsys, 1, "not the file list of a hub", download_data, "--hub", "huggingface", "--base_url",
          f"{hub.url}/models/x/main/README.md?")


def test_a_hub_cannot_write_elsewhere(hub, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(CONTENT, "../outside", b"x")
    fails(capsys, 1, "outside", download_data, "../outside", "--base_url", hub.url, "--target", tmp_path / "in")
    assert not (tmp_path / "outside").exists()


def test_weights_go_to_out_and_folders_to_the_project(hub, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(download_model, "OUT_DIR", tmp_path / "out")
    monkeypatch.setattr(download_model, "ROOT", tmp_path)
    there = ("--base_url", hub.url)
    run(download_model, "minimind-3-pytorch", *there)
    assert "full_sft_768.pth" in capsys.readouterr().out and not list(tmp_path.iterdir())
    run(download_model, "minimind-3-pytorch", "full_sft_768.pth", *there)
    assert (tmp_path / "out/full_sft_768.pth").read_bytes() == WEIGHTS["full_sft_768.pth"]
    run(download_model, "minimind-3", *there)
    assert (tmp_path / "minimind-3/dir/a b.jsonl").read_bytes() == CONTENT["dir/a b.jsonl"]
