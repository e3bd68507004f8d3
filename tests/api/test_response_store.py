"""ResponseStore: owners, expiry, size, errors."""

import os
import sqlite3
import time
from pathlib import Path

import pytest

from serve.api.errors import APIError
from serve.api.responses_api.store import ResponseStore, StoredResponse

DAY = 86400.0


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "store.db"


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [1e9]
    monkeypatch.setattr(time, "time", lambda: now[0])
    return now


def make(path: Path, max_bytes: int = 1 << 20) -> ResponseStore:
    return ResponseStore(path, max_bytes=max_bytes, seconds=DAY)


def response(size: int = 2) -> StoredResponse:
    return StoredResponse(b"x" * size, b"[]")


def test_store_keeps_responses_of_owners_apart(path: Path) -> None:
    store = make(path)
    store.put("a", "r", StoredResponse(b"1", b"[1]"))
    store.put("b", "r", StoredResponse(b"2", b"[2]"))
    assert make(path).get("a", "r") == StoredResponse(b"1", b"[1]")
    assert store.delete("a", "r")
    assert not store.delete("a", "r")
    assert store.get("a", "r") is None
    assert store.get("b", "r") == StoredResponse(b"2", b"[2]")


def test_store_is_a_private_file(path: Path) -> None:
    make(path).put("a", "r", response())
    assert os.stat(path).st_mode & 0o777 == 0o600


def test_response_expires(path: Path, clock: list[float]) -> None:
    store = make(path)
    store.put("a", "r", response())
    clock[0] += DAY - 1
    assert store.get("a", "r") is not None
    clock[0] += 2
    assert store.get("a", "r") is None
    assert not store.delete("a", "r")
    store.put("a", "s", response())
    with sqlite3.connect(path) as connection:
        assert connection.execute("SELECT id FROM responses").fetchall() == [("s",)]
    connection.close()


def test_oldest_responses_make_room(path: Path, clock: list[float]) -> None:
    store = make(path, 10_000)
    for i in range(5):
        clock[0] += 1
        store.put("a", str(i), response(2500))
    assert [i for i in range(5) if store.get("a", str(i))] == [2, 3, 4]
    smaller = make(path, 6000)
    assert [i for i in range(5) if smaller.get("a", str(i))] == [3, 4]


def test_owner_of_more_than_half_makes_room_of_its_own(path: Path, clock: list[float]) -> None:
    store = make(path, 10_000)
    for owner, name in (("b", "0"), ("a", "0"), ("a", "1"), ("a", "2")):
        clock[0] += 1
        store.put(owner, name, response(2500))
    found = [(owner, name) for owner in "ab" for name in "012" if store.get(owner, name)]
    assert found == [("a", "1"), ("a", "2"), ("b", "0")]
    clock[0] += 1
    store.put("c", "0", response(2500))  # less than half: the oldest of all go
    assert store.get("b", "0") is None
    assert [name for name in "012" if store.get("a", name)] == ["1", "2"]


def test_error_response_larger_than_the_store(path: Path) -> None:
    store = make(path, 1000)
    store.put("a", "small", response())
    with pytest.raises(APIError) as error:
        store.put("a", "r", response(1000))
    assert (error.value.status, error.value.param, error.value.code) == (400, "store", "answer_too_large")
    assert store.get("a", "small") is not None


def test_error_file_that_is_no_store(path: Path) -> None:
    path.write_bytes(b"no database" * 100)
    with pytest.raises(ValueError, match=r"argument --response-store: .*not a database"):
        make(path)
    with pytest.raises(ValueError, match=r"argument --response-store: .*No such file"):
        make(path.parent / "missing" / "store.db")


def test_error_damaged_store_has_no_internals(path: Path) -> None:
    store = make(path)
    path.write_bytes(b"no database" * 1000)
    for suffix in ("-wal", "-shm"):
        Path(f"{path}{suffix}").unlink(missing_ok=True)
    with pytest.raises(APIError) as error:
        store.get("a", "r")
    assert (error.value.status, error.value.code) == (500, "response_store_failed")
    assert str(path) not in error.value.message
