"""Published MiniMind files, fetched by the hubs' own clients, which bring tokens, proxies and retries.

A file arrives as `NAME.incomplete`, which a later call continues, and gets its name once its checksum is right.
"""

import argparse
import importlib.util
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from huggingface_hub import HfApi, hf_hub_url
from huggingface_hub.errors import HFValidationError
from huggingface_hub.file_download import http_get
from huggingface_hub.utils import build_hf_headers
from huggingface_hub.utils.sha import git_hash, sha_fileobj
from tqdm import tqdm

from model.cli import Failure, UserError, first_line

OWNERS = {"huggingface": "jingyaogong", "modelscope": "gongjy"}
HAS_MODELSCOPE = importlib.util.find_spec("modelscope_hub") is not None


@dataclass(frozen=True)
class RemoteFile:
    """A file of a repository. Its checksum is a SHA-256, or git's SHA-1 of small files; one of them may be None."""

    path: str
    size: int  # bytes
    sha256: str | None
    blob_id: str | None
    fetch: Callable[["RemoteFile", Path], None]  # writes the file into a folder


def add_hub_args(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--hub", choices=OWNERS, default="modelscope" if HAS_MODELSCOPE else "huggingface",
                        help="where to download from (default: modelscope where its client is installed)")
    parser.add_argument("--base_url", help="address of a mirror of the hub, such as https://hf-mirror.com")


@contextmanager
def one_line_errors(subject: str) -> Iterator[None]:
    """Turn what a hub's client raises into one line: UserError for a wrong name, Failure for the rest."""
    try:
        yield
    except Failure:
        raise
    except Exception as error:
        if getattr(error, "errno", None):  # of this machine: a full disk, a folder that cannot be written
            raise
        reason = f"{subject}: {first_line(error)}"
        status = getattr(getattr(error, "response", None) or error, "status_code", None)
        if isinstance(error, HFValidationError) or status in (401, 403, 404):
            raise UserError(f"{reason}; check the name, --hub and --base_url") from None
        if status:
            raise Failure(reason) from None
        if isinstance(error, (ValueError, TypeError, LookupError, AttributeError)):
            raise Failure(f"{subject}: not the file list of a hub; check --hub and --base_url") from None
        raise Failure(f"{subject}: no connection to the hub ({first_line(error)}); if this machine is online, run the "
                      "same command again (what has arrived is kept) or name a mirror with --base_url") from None


def list_files(repo_type: str, name: str, hub: str, base_url: str | None) -> dict[str, RemoteFile]:
    """The files of a repository of MiniMind's author, by path. `repo_type`: "model" or "dataset"."""
    repo_id = f"{OWNERS[hub]}/{name}"
    with one_line_errors(f"{hub}: {repo_id}"):
        list_repo = list_huggingface if hub == "huggingface" else list_modelscope
        return {file.path: file for file in list_repo(repo_type, repo_id, base_url)}


def list_huggingface(repo_type: str, repo_id: str, base_url: str | None) -> Iterator[RemoteFile]:
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # it reports each attempt
    info = HfApi(endpoint=base_url).repo_info(repo_id, repo_type=repo_type, files_metadata=True)
    for file in info.siblings:
        url = hf_hub_url(repo_id, file.rfilename, repo_type=repo_type, revision=info.sha, endpoint=base_url)
        yield RemoteFile(file.rfilename, file.size, file.lfs.sha256 if file.lfs else None, file.blob_id,
                         partial(fetch_huggingface, url))


def fetch_huggingface(url: str, file: RemoteFile, folder: Path) -> None:
    """Append to `NAME.incomplete` what it lacks. hf_hub_download would start a broken file again from nothing."""
    target = folder / file.path
    incomplete = target.with_name(f"{target.name}.incomplete")
    if incomplete.is_file() and incomplete.stat().st_size > file.size:
        incomplete.unlink()
    try:
        with open(incomplete, "ab") as output:
            http_get(url, output, resume_size=output.tell(), headers=build_hf_headers(), expected_size=file.size,
                     displayed_filename=target.name, tqdm_class=tqdm)
            output.flush()
            os.fsync(output.fileno())
    except BaseException:
        if incomplete.is_file() and not incomplete.stat().st_size:
            incomplete.unlink()
        raise
    if not is_complete(incomplete, file):
        incomplete.unlink()
        raise Failure(f"{url}: what arrived is not what the hub lists; it was removed, try again or name another --hub")
    incomplete.replace(target)


def list_modelscope(repo_type: str, repo_id: str, base_url: str | None) -> Iterator[RemoteFile]:
    if not HAS_MODELSCOPE:
        raise UserError("--hub modelscope needs ModelScope's client: pip install modelscope")
    from modelscope_hub import HubApi

    logging.getLogger("modelscope_hub").setLevel(logging.ERROR)  # it reports each page and each attempt
    hub = HubApi(endpoint=base_url)
    for file in hub.list_repo_files(repo_id, repo_type):
        if not file.is_dir:
            fetch = partial(fetch_modelscope, hub, repo_id, repo_type)
            yield RemoteFile(file.path, file.size, file.sha256, None, fetch)


def fetch_modelscope(hub: object, repo_id: str, repo_type: str, file: RemoteFile, folder: Path) -> None:
    from modelscope_hub import FileIntegrityError

    try:
        hub.download_file(repo_id, repo_type, file.path, local_dir=folder, expected_sha256=file.sha256,
                          file_size=file.size)
    except FileIntegrityError as error:
        raise Failure(f"{repo_id}: {first_line(error)}; it was removed, try again or name another --hub") from None


def choose_files(files: dict[str, RemoteFile], names: list[str]) -> list[RemoteFile]:
    """The named files. Raises UserError when one of them does not exist."""
    if absent := [name for name in names if name not in files]:
        raise UserError(f"no file {absent[0]}; there are {', '.join(sorted(files))}")
    return [files[name] for name in names]


def is_complete(path: Path, file: RemoteFile) -> bool:
    """Whether `path` has the size and the checksum that the hub lists."""
    if not path.is_file() or path.stat().st_size != file.size:
        return False
    with open(path, "rb") as content:
        if file.sha256:
            return sha_fileobj(content).hex() == file.sha256
        return file.blob_id in (None, git_hash(content.read()))


def download(file: RemoteFile, folder: Path) -> Path:
    """Fetch a file into `folder`, continuing where an earlier call stopped. → its path

    Raises Failure when the connection breaks for good, or when what arrived is not what the hub lists.
    """
    target = folder / file.path
    if not target.resolve().is_relative_to(folder.resolve()):
        raise Failure(f"{file.path} would be written outside {folder}")
    if is_complete(target, file):
        print(f"{target}: already there")
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with one_line_errors(file.path):
        file.fetch(file, folder)
    print(f"{target}: downloaded")
    return target


def print_files(files: dict[str, RemoteFile]) -> None:
    """Print names and sizes."""
    for name, file in sorted(files.items()):
        print(f"{file.size / 1e6:12,.1f} MB  {name}")
