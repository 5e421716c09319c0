"""Fetch published files from ModelScope or HuggingFace: sizes and checksums from the hub, progress, resume.

A file arrives as `NAME.part`, which a later call continues; it gets its name when its checksum is right.
"""

import argparse
import hashlib
import http.client
import json
import os
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from tqdm import tqdm

from model.cli import Failure, UserError

HUBS = {"modelscope": "https://www.modelscope.cn", "huggingface": "https://huggingface.co"}
OWNERS = {"modelscope": "gongjy", "huggingface": "jingyaogong"}
TIMEOUT, TRIES, CHUNK = 30, 5, 1 << 20  # seconds without a byte; connections in a row that bring nothing; bytes


@dataclass(frozen=True)
class RemoteFile:
    """A file of a repository. `checksum`: "sha256:…", git's "blob:…" (a SHA-1 with a header), "" where none is told."""

    path: str
    size: int
    checksum: str
    url: str


def hub_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--hub", choices=HUBS, default="modelscope", help="where to download from")
    parser.add_argument("--base_url", help="address of a mirror of the hub, such as https://hf-mirror.com")


def read_url(url: str, start: int = 0) -> http.client.HTTPResponse:
    """Open `url` at byte `start`. Raises Failure in one line when there is no such file, or no network."""
    request = urllib.request.Request(url, headers={"User-Agent": "minimind"} | (
        {"Range": f"bytes={start}-"} if start else {}))
    try:
        return urllib.request.urlopen(request, timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        if error.code in (401, 403, 404):
            raise UserError(f"{url}: {error.code} {error.reason}; check the name, --hub and --base_url") from None
        raise Failure(f"{url}: {error.code} {error.reason}") from None
    except (OSError, http.client.HTTPException) as error:
        raise Failure(f"{url}: no connection: {getattr(error, 'reason', error)}; if this machine is online, try again "
                      "(what has come is kept) or name a mirror with --base_url") from None


def list_files(kind: str, name: str, hub: str, base_url: str | None) -> dict[str, RemoteFile]:
    """The files of a repository of MiniMind's author by path. `kind`: "models" or "datasets"."""
    base, repository = (base_url or HUBS[hub]).rstrip("/"), f"{OWNERS[hub]}/{name}"
    found = {}
    if hub == "huggingface":
        prefix = "datasets/" if kind == "datasets" else ""
        for entry in fetch_json(f"{base}/api/{kind}/{repository}/tree/main?recursive=true"):
            if entry["type"] == "file":
                lfs = entry.get("lfs")
                checksum = f"sha256:{lfs['oid']}" if lfs else f"blob:{entry['oid']}"
                url = f"{base}/{prefix}{repository}/resolve/main/{quote(entry['path'])}"
                found[entry["path"]] = RemoteFile(entry["path"], entry["size"], checksum, url)
        return found
    listing = "files?Revision=master&Recursive=true" if kind == "models" else "tree?Revision=master&Root=&PageSize=500"
    for entry in fetch_json(f"{base}/api/v1/{kind}/{repository}/repo/{listing}")["Data"]["Files"]:
        if entry["Type"] != "tree":
            checksum = f"sha256:{entry['Sha256']}" if entry.get("Sha256") else ""
            url = f"{base}/{kind}/{repository}/resolve/master/{quote(entry['Path'])}"
            found[entry["Path"]] = RemoteFile(entry["Path"], entry["Size"], checksum, url)
    return found


def fetch_json(url: str) -> dict | list:
    with read_url(url) as response:
        try:
            return json.loads(response.read())
        except (ValueError, http.client.HTTPException):
            raise Failure(f"{url}: not the file list of a hub; check --hub and --base_url") from None


def choose(files: dict[str, RemoteFile], names: list[str]) -> list[RemoteFile]:
    """The named files. Raises UserError when there is none of a name."""
    if absent := [name for name in names if name not in files]:
        raise UserError(f"no file {absent[0]}; there are {', '.join(sorted(files))}")
    return [files[name] for name in names]


def is_whole(path: Path, file: RemoteFile) -> bool:
    """Whether `path` has the size and the checksum that the hub tells."""
    if not path.is_file() or path.stat().st_size != file.size:
        return False
    kind, _, wanted = file.checksum.partition(":")
    digest = hashlib.sha1(b"blob %d\0" % file.size) if kind == "blob" else hashlib.sha256()
    with open(path, "rb") as content:
        while piece := content.read(CHUNK):
            digest.update(piece)
    return digest.hexdigest() == wanted or not kind


def download(file: RemoteFile, folder: Path) -> Path:
    """Fetch a file into `folder`, going on where an earlier call stopped. → its path

    Raises Failure when no more comes, or when what came is not what the hub says it is.
    """
    target = folder / file.path
    if not target.resolve().is_relative_to(folder.resolve()):
        raise Failure(f"{file.url}: {file.path} would lie outside {folder}")
    if is_whole(target, file):
        print(f"{target}: already there")
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    part, idle = target.with_name(f"{target.name}.part"), 0
    part.touch()
    with tqdm(total=file.size, initial=part.stat().st_size, unit="B", unit_scale=True, desc=target.name) as bar:
        while (size := part.stat().st_size) < file.size:
            for bar.n in receive(file, part):
                bar.refresh()
            idle = 0 if part.stat().st_size > size else idle + 1
            if idle == TRIES:
                raise Failure(f"{file.url}: the connection broke {TRIES} times at {size:,} of {file.size:,} bytes; the "
                              "same command goes on there")
    if not is_whole(part, file):
        part.unlink()
        raise Failure(f"{file.url}: what came is not what the hub lists ({file.checksum}); it was removed, try again "
                      "or name another --hub")
    os.replace(part, target)
    return target


def receive(file: RemoteFile, part: Path) -> Iterator[int]:
    """Append what one connection gives to `part`, until it ends or breaks. → the size, again and again"""
    size = part.stat().st_size
    with read_url(file.url, size) as response, open(part, "ab") as output:
        if size and response.status != 206:  # a server that knows no ranges sends all of it
            output.truncate(size := 0)
        try:
            while piece := response.read1(CHUNK):
                output.write(piece)
                yield (size := size + len(piece))
        except (OSError, http.client.HTTPException):
            pass  # what came is kept, and the caller sees that it is not all
        output.flush()
        os.fsync(output.fileno())


def show(files: dict[str, RemoteFile]) -> None:
    """Print names and sizes."""
    for name, file in sorted(files.items()):
        print(f"{file.size / 1e6:12,.1f} MB  {name}")
