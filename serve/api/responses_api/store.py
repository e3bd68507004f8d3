"""ResponseStore: responses in a SQLite file, limited in size and time."""

import logging
import os
import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from serve.api.errors import APIError, invalid

logger = logging.getLogger(__name__)

_BUSY_SECONDS = 5  # other processes may write
_ROW_BYTES = 200  # of a row beside its texts
_TABLES = """
CREATE TABLE IF NOT EXISTS responses (
    owner TEXT NOT NULL,
    id TEXT NOT NULL,
    created REAL NOT NULL,
    bytes INTEGER NOT NULL,
    response BLOB NOT NULL,
    items BLOB NOT NULL,
    PRIMARY KEY (owner, id)
) STRICT;
CREATE INDEX IF NOT EXISTS by_age ON responses (created, bytes);
"""


@dataclass(frozen=True, slots=True)
class StoredResponse:
    response: bytes  # JSON
    items: bytes  # JSON list of all input items, of earlier responses, too


class ResponseStore:
    """Thread-safe; several processes can share a file. All methods block.

    Each response belongs to its owner, for whom alone it exists. The oldest are deleted when there is no room: first
    those of the owner of the new response if the owner would have more than half of the store.
    """

    def __init__(self, path: Path, *, max_bytes: int, seconds: float) -> None:
        """Create the file if it does not exist.

        Args:
            max_bytes: of all responses with their items.
            seconds: from the creation of a response until it is deleted.

        Raises:
            ValueError: the file cannot be used; the message names the flag.
        """
        self._path = path
        self._max_bytes = max_bytes
        self._seconds = seconds
        try:
            os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
            with self._connection() as connection, connection:
                connection.execute("PRAGMA journal_mode = WAL")
                connection.executescript(_TABLES)
                self._evict(connection, None, 0)
        except (OSError, sqlite3.Error) as error:
            raise ValueError(f"argument --response-store: {path}: {error}") from None

    def put(self, owner: str, response_id: str, stored: StoredResponse) -> None:
        """Store a response.

        Raises:
            APIError: 400, it is larger than the store; 500, the file cannot be written.
        """
        size = len(stored.response) + len(stored.items) + _ROW_BYTES
        if size > self._max_bytes:
            message = f"The response has {size} bytes, more than the maximum of {self._max_bytes}"
            raise invalid("store", f"{message} (--response-store-bytes).", "answer_too_large")
        with self._transaction() as connection:
            self._evict(connection, owner, size)
            row = (owner, response_id, time.time(), size, stored.response, stored.items)
            connection.execute("INSERT INTO responses VALUES (?, ?, ?, ?, ?, ?)", row)

    def get(self, owner: str, response_id: str) -> StoredResponse | None:
        """A response that has not expired. Raises APIError 500 if the file cannot be read."""
        query = "SELECT response, items FROM responses WHERE owner = ? AND id = ? AND created > ?"
        with self._transaction() as connection:
            row = connection.execute(query, (owner, response_id, time.time() - self._seconds)).fetchone()
        return None if row is None else StoredResponse(*row)

    def delete(self, owner: str, response_id: str) -> bool:
        """Delete a response; False if it does not exist. Raises APIError 500 if the file cannot be written."""
        query = "DELETE FROM responses WHERE owner = ? AND id = ? AND created > ?"
        with self._transaction() as connection:
            return connection.execute(query, (owner, response_id, time.time() - self._seconds)).rowcount > 0

    def _evict(self, connection: sqlite3.Connection, owner: str | None, size: int) -> None:
        """Delete what has expired, and old responses until there is room for `size` more bytes of the owner, if any."""
        connection.execute("DELETE FROM responses WHERE created <= ?", (time.time() - self._seconds,))
        (used,) = connection.execute("SELECT coalesce(sum(bytes), 0) FROM responses").fetchone()
        excess = used + size - self._max_bytes
        if excess <= 0:
            return
        (owned,) = connection.execute(
            "SELECT coalesce(sum(bytes), 0) FROM responses WHERE owner = ?", (owner,)
        ).fetchone()
        first = owner if owned + size > self._max_bytes / 2 else None
        query = "SELECT rowid, bytes FROM responses ORDER BY owner IS NOT ? AND ? IS NOT NULL, created"
        for row, freed in connection.execute(query, (first, first)).fetchall():
            if excess <= 0:
                break
            connection.execute("DELETE FROM responses WHERE rowid = ?", (row,))
            excess -= freed

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        try:
            with self._connection() as connection, connection:
                yield connection
        except sqlite3.Error:
            logger.exception("the store of responses failed")
            message = "The store of responses failed."
            raise APIError(500, message, None, "response_store_failed") from None

    @contextmanager
    def _connection(self) -> Iterator[sqlite3.Connection]:
        connection = sqlite3.connect(self._path, timeout=_BUSY_SECONDS)
        try:
            connection.execute("PRAGMA secure_delete = ON")
            connection.execute("PRAGMA synchronous = NORMAL")
            yield connection
        finally:
            connection.close()
