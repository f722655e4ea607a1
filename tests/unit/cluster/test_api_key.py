"""API keys and their file: what is kept, who is recognised, and what a slip of the pen does."""

import os
import stat
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from cluster.api_key import ApiKey, Scope, find_key, new_key
from cluster.key_file import KeyFileError, changing, read_keys
from cluster.key_ring import KeyRing

NOW = datetime(2026, 1, 1, tzinfo=UTC)
TEXT, KEY = new_key(tenant="acme")
KEYS = {KEY.id: KEY}


def write(path: Path, *keys: ApiKey) -> None:
    with changing(path) as kept:
        kept[:] = keys


def test_a_key_is_found_by_its_whole_text_alone() -> None:
    """Every other text is nobody's: other secrets, other ids, parts of the key, its record's digest."""
    assert find_key(KEYS, TEXT.encode(), NOW) is KEY
    other, _ = new_key(tenant="acme")
    wrong = [
        other,
        TEXT[:-1],
        TEXT + "x",
        TEXT.upper(),
        KEY.id,
        KEY.sha256,
        f"ellm_{KEY.id}_",
        f"ellm_{KEY.id}_{KEY.sha256}",
        "",
    ]
    assert [find_key(KEYS, text.encode(), NOW) for text in wrong] == [None] * len(wrong)


@given(st.binary(max_size=300))
def test_no_bytes_open_the_door(presented: bytes) -> None:
    """Whatever is sent as a key is looked at without an error, and is none."""
    assert find_key(KEYS, presented, NOW) is None
    assert find_key(KEYS, f"ellm_{KEY.id}_".encode() + presented, NOW) is None


def test_an_expired_key_is_nobodys() -> None:
    """It counts until the moment it expires."""
    text, key = new_key(tenant="acme", expires=NOW)
    assert find_key({key.id: key}, text.encode(), NOW - timedelta(seconds=1)) is key
    assert find_key({key.id: key}, text.encode(), NOW) is None


@pytest.mark.parametrize(
    "fields",
    [
        {"tenant": ""}, {"tenant": "a b"}, {"tenant": "a\n"}, {"scopes": []}, {"scopes": ["root"]},
        {"requests_per_min": 0}, {"slo_class": "x", "slo_classes": ["y"]}, {"expires": datetime(2026, 1, 1)},
    ],
)  # fmt: skip
def test_a_record_that_makes_no_sense_is_refused(fields: dict[str, object]) -> None:
    """Nothing is guessed about who may do what."""
    with pytest.raises(ValidationError):
        new_key(**({"tenant": "acme"} | fields))


def test_the_file_holds_no_key(tmp_path: Path) -> None:
    """What is on disk is digests, readable by the owner alone, and comes back as it was."""
    path = tmp_path / "keys.yaml"
    text, key = new_key(tenant="acme", scopes=[Scope.ADMIN], slo_classes=["chat"], requests_per_min=5, expires=NOW)
    write(path, KEY, key)
    assert read_keys(path) == [KEY, key]
    kept = path.read_text()
    assert text not in kept
    assert text.rpartition("_")[2] not in kept
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [entry.name for entry in tmp_path.iterdir()] == ["keys.yaml"], "no draft is left"


@pytest.mark.parametrize("mode", [0o666, 0o620, 0o602, 0o660])
def test_a_file_that_others_may_change_is_refused(tmp_path: Path, mode: int) -> None:
    """Who can write it could let himself in; what helps is told, and does."""
    path = tmp_path / "keys.yaml"
    write(path, KEY)
    path.chmod(mode)
    with pytest.raises(KeyFileError, match=f"chmod go-w {path}"):
        read_keys(path)
    with pytest.raises(KeyFileError, match="chmod go-w"), changing(path):
        pass
    path.chmod(mode & ~0o022)
    assert read_keys(path) == [KEY]


@pytest.mark.parametrize(("mode", "group", "closed"), [
    (0o777, 0, False), (0o707, 0, False), (0o775, 1, False), (0o2770, 1, False),
    (0o775, 0, True), (0o1777, 1, True), (0o3777, 1, True), (0o755, 1, True),
])  # fmt: skip
def test_a_file_that_others_may_replace_is_refused(tmp_path: Path, mode: int, group: int, closed: bool) -> None:
    """Its folder counts, and a link's: neither may be written by others, but for sticky folders and the owner's own
    group."""
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    write(tmp_path / "a/keys.yaml", KEY)
    (tmp_path / "b/keys.yaml").symlink_to(tmp_path / "a/keys.yaml")
    own, numbers = os.getuid(), os.getgroups()
    wanted = own if group == 0 else next((number for number in numbers if number != own), own + 1)
    for folder in (tmp_path / "a", tmp_path / "b"):
        try:
            os.chown(folder, -1, wanted)
        except PermissionError:
            pytest.skip(f"this user may not give a folder to group {wanted}")
        folder.chmod(mode)
        if closed:
            assert read_keys(tmp_path / "b/keys.yaml") == [KEY]
        else:
            with pytest.raises(KeyFileError, match=f"chmod go-w {folder}$"):
                read_keys(tmp_path / "b/keys.yaml")
        folder.chmod(0o755)


@pytest.mark.parametrize("mode", [0o644, 0o440])
def test_a_mounted_secret_is_taken(tmp_path: Path, mode: int) -> None:
    """As Kubernetes mounts one: links to links in a folder that is sticky and open to all, files that a group may
    read."""
    mount, current = tmp_path / "mount", "..2026_01_01_00_00_00.1"
    (mount / current).mkdir(parents=True)
    write(mount / current / "keys.yaml", KEY)
    (mount / current / "keys.yaml").chmod(mode)
    (mount / current).chmod(0o2755)
    (mount / "..data").symlink_to(current)
    (mount / "keys.yaml").symlink_to("..data/keys.yaml")
    mount.chmod(0o3777)
    assert read_keys(mount / "keys.yaml") == [KEY]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("keys: [", "cannot read"),
        ("keys: 3", "does not fit"),
        ("kees: []", "does not fit"),
        ("keys: [{id: abcd, sha256: 12, tenant: t}]", "sha256"),
        (f"keys: [{KEY.model_dump_json()}, {KEY.model_dump_json()}]", "two keys with the id"),
        (
            f"keys: [{KEY.model_copy(update={'slo_classes': ('gold',)}).model_dump_json()}]",
            "class 'gold'; there is chat",
        ),
    ],
)
def test_a_wrong_file_is_told(tmp_path: Path, text: str, message: str) -> None:
    """The reason names what is wrong."""
    path = tmp_path / "keys.yaml"
    path.write_text(text)
    with pytest.raises(KeyFileError, match=message):
        read_keys(path, ["chat"])


def test_a_change_counts_without_a_restart(tmp_path: Path) -> None:
    """New keys are taken and revoked ones refused with the next look; a wrong or missing file changes nothing."""
    path = tmp_path / "keys.yaml"
    write(path, KEY)
    ring = KeyRing(path, ["chat"])
    text, key = new_key(tenant="beta", requests_per_min=1)
    assert ring.find(text.encode()) is None
    write(path, KEY, key)
    ring.refresh()
    assert ring.find(TEXT.encode())
    path.write_text("keys: nonsense")
    ring.refresh()
    caller = ring.find(text.encode())
    assert caller is not None
    assert caller.quota.enter(0.0) is None
    path.unlink()
    ring.refresh()
    assert ring.find(TEXT.encode())
    write(path, key)
    ring.refresh()
    assert ring.find(TEXT.encode()) is None, "revoked"
    again = ring.find(text.encode())
    assert again is not None
    assert again.quota.enter(0.0) is not None, "its quota was not filled up by the change"


def test_a_file_that_was_opened_to_others_counts_again_when_it_is_closed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Meanwhile the keys stay as they were, and the log says why, once."""
    path = tmp_path / "keys.yaml"
    write(path, KEY)
    ring = KeyRing(path, [])
    text, key = new_key(tenant="beta")
    for open_to_others, close in ((path, 0o600), (tmp_path, 0o755)):
        write(path, KEY, key)
        open_to_others.chmod(0o777)
        caplog.clear()
        for _ in range(3):
            ring.refresh()
        assert [record.message.count(f"chmod go-w {open_to_others}") for record in caplog.records] == [1]
        assert ring.find(TEXT.encode())
        assert ring.find(text.encode()) is None
        open_to_others.chmod(close)
        ring.refresh()
        assert ring.find(text.encode())
        write(path, KEY)
        ring.refresh()


def test_the_files_owner_survives_many_writers(tmp_path: Path) -> None:
    """Processes that add keys at once lose none."""
    path = tmp_path / "keys.yaml"
    write(path)
    children = []
    for at in range(8):
        if not (pid := os.fork()):
            with changing(path) as keys:
                keys.append(new_key(tenant=f"t{at}")[1])
            os._exit(0)
        children.append(pid)
    assert [os.waitpid(pid, 0)[1] for pid in children] == [0] * 8
    assert {key.tenant for key in read_keys(path)} == {f"t{at}" for at in range(8)}
