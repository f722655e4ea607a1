"""The file of API keys: read by every ingress process while it serves, changed by ``ellm keys``.

    keys:
    - {id: 3f2a9c1b04d7, sha256: 9c56..., tenant: acme, scopes: [inference], slo_classes: [interactive, batch]}

It holds digests, no keys, so others may read it, as a mounted Secret of Kubernetes; who may write it could let himself
in. A change counts within seconds; a file that has become unreadable or wrong changes nothing, so that a slip of the
pen locks nobody out, and is logged.
"""

import contextlib
import fcntl
import os
import stat
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from cluster.api_key import ApiKey
from memory_agent.errors import SettingsError

Stamp = tuple[int, int, int]
"""Changes when the file or its mode does: its inode, size and time of change."""


class KeyFileError(SettingsError):
    """The keys file cannot be used. The message says what would help."""


class _Content(BaseModel):
    model_config = ConfigDict(extra="forbid")

    keys: list[ApiKey] = []


def read_keys(path: Path, classes: Sequence[str] | None = None) -> list[ApiKey]:
    """The records in the file. ``classes``: names of SLO classes that there are; None leaves them unchecked. Raises
    KeyFileError."""
    try:
        with path.open(encoding="utf-8") as file:
            _check_closed(path, os.fstat(file.fileno()))
            content = _Content.model_validate(yaml.safe_load(file) or {})
    except FileNotFoundError as error:
        raise KeyFileError(
            f"there is no keys file {path}; `ellm keys create --file {path} --tenant NAME` makes one"
        ) from error
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise KeyFileError(f"cannot read the keys file {path}: {error}") from error
    except ValidationError as error:
        wrong = "; ".join(f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in error.errors(include_url=False))
        raise KeyFileError(f"the keys file {path} does not fit: {wrong}") from error
    ids = [key.id for key in content.keys]
    if twice := next((name for name in ids if ids.count(name) > 1), None):
        raise KeyFileError(f"{path} has two keys with the id {twice}: remove one")
    for key in content.keys:
        for name in (key.slo_class, *(key.slo_classes or ())):
            if classes is not None and name is not None and name not in classes:
                raise KeyFileError(f"key {key.id} in {path} names the class {name!r}; there is {', '.join(classes)}")
    return content.keys


def _check_closed(path: Path, state: os.stat_result) -> None:
    """Raises KeyFileError where others than the owner can change the file, or put another in its place.

    That takes its folder, and the folder of a link to it. A sticky folder keeps everybody's files theirs: a mounted
    Secret is links in one. A group that has its owner's number is the owner's own, as most Linux systems make one for
    each user and let it write what he makes (umask 002).
    """
    if state.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise KeyFileError(f"others may change {path}, and so let themselves in: chmod go-w {path}")
    for folder in {path.absolute().parent, path.resolve().parent}:
        around = folder.stat()
        own_group = around.st_gid == around.st_uid
        if not around.st_mode & stat.S_ISVTX and around.st_mode & (stat.S_IWOTH | (0 if own_group else stat.S_IWGRP)):
            raise KeyFileError(
                f"others may put another file in the place of {path}, and so let themselves in: chmod go-w {folder}"
            )


def stamp(path: Path) -> Stamp | None:
    """None where there is no such file now."""
    try:
        state = path.stat()
    except OSError:
        return None
    return state.st_ino, state.st_size, state.st_ctime_ns


@contextlib.contextmanager
def changing(path: Path) -> Iterator[list[ApiKey]]:
    """The records, to be changed in place: what they are at the end is written, at once and as a whole, readable by the
    owner alone. A file that is missing counts as empty. Raises KeyFileError."""
    folder = path.absolute().parent
    try:
        held = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise KeyFileError(f"no folder {folder} for the keys file: {error.strerror}; make it first") from error
    try:
        fcntl.flock(held, fcntl.LOCK_EX)
        keys = read_keys(path) if path.exists() else []
        yield keys
        _write(path, folder, keys)
    finally:
        os.close(held)


def _write(path: Path, folder: Path, keys: list[ApiKey]) -> None:
    shown = [key.model_dump(mode="json", exclude_none=True) for key in keys]
    text = yaml.safe_dump({"keys": shown}, sort_keys=False, default_flow_style=None, width=1000)
    draft = None
    try:
        with tempfile.NamedTemporaryFile("w", encoding="utf-8", dir=folder, prefix=".keys-", delete=False) as file:
            draft = Path(file.name)  # mode 0600
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
    except OSError as error:
        if draft is not None:
            draft.unlink(missing_ok=True)
        raise KeyFileError(f"cannot write the keys file {path}: {error.strerror}") from error
