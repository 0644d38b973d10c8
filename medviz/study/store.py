"""Readers and answers in one SQLite file. An answer is on the disk when `append` returns; nothing is ever changed."""

import hashlib
import secrets
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import astuple, dataclass, fields, replace
from datetime import UTC, datetime
from pathlib import Path

from medviz.errors import InputError, StudyError

STORE_NAME = "study.sqlite"
CODE_LETTERS = "ABCDEFGHJKMNPQRSTVWXYZ23456789"  # no letter that is read as another
CODE_LENGTH = 16  # 78 bits
_BUSY_TIMEOUT_S = 30.0

_TABLES = {
    "study": "only_row INTEGER PRIMARY KEY CHECK (only_row = 1), protocol_sha256 TEXT NOT NULL",
    "readers": """
        number INTEGER PRIMARY KEY,
        id TEXT NOT NULL UNIQUE,
        specialty TEXT NOT NULL,
        years REAL NOT NULL,
        display TEXT NOT NULL,
        simulated INTEGER NOT NULL CHECK (simulated IN (0, 1)),
        consented_at TEXT NOT NULL""",
    "answers": """
        reader TEXT NOT NULL REFERENCES readers (id),
        position INTEGER NOT NULL,
        item TEXT NOT NULL,
        phase TEXT NOT NULL,
        case_key TEXT NOT NULL,
        arms TEXT NOT NULL,
        practice INTEGER NOT NULL CHECK (practice IN (0, 1)),
        is_repeat INTEGER NOT NULL CHECK (is_repeat IN (0, 1)),
        value TEXT NOT NULL,
        response_ms INTEGER NOT NULL,
        zoom REAL NOT NULL,
        display TEXT NOT NULL,
        answered_at TEXT NOT NULL,
        PRIMARY KEY (reader, position),
        UNIQUE (reader, item)""",
}
_SCHEMA = (
    *(f"CREATE TABLE IF NOT EXISTS {table} ({columns}) STRICT" for table, columns in _TABLES.items()),
    *(
        f"CREATE TRIGGER IF NOT EXISTS {table}_no_{action} BEFORE {action} ON {table} "
        f"BEGIN SELECT RAISE(ABORT, 'the {table} table is append only'); END"
        for table in _TABLES
        for action in ("update", "delete")
    ),
)


@dataclass(frozen=True)
class Reader:
    """A reader as stored. number counts from 1 in the order of consent; id is a hash of the reader code."""

    number: int
    id: str
    specialty: str
    years: float
    display: str
    simulated: bool
    consented_at: str


@dataclass(frozen=True)
class Answer:
    """One answer as stored.

    arms: what was shown, from left to right, with a comma between. response_ms: from the image's display to the
    answer, as the page measured it. zoom: largest magnification used. display: the reader's display at that moment.
    answered_at: UTC, by the server's clock.
    """

    reader: str
    position: int
    item: str
    phase: str
    case_key: str
    arms: str
    practice: bool
    is_repeat: bool
    value: str
    response_ms: int
    zoom: float
    display: str
    answered_at: str = ""


def new_code() -> str:
    """A reader code that cannot be guessed, in groups of four letters."""
    letters = "".join(secrets.choice(CODE_LETTERS) for _ in range(CODE_LENGTH))
    return "-".join(letters[n : n + 4] for n in range(0, CODE_LENGTH, 4))


def reader_id(code: str) -> str:
    """What the store knows of a reader code: a hash, so that the file gives no code away."""
    letters = "".join(code.upper().replace("-", "").split())
    return hashlib.sha256(f"medviz reader code {letters}".encode()).hexdigest()[:32]


class Store:
    """The answers of one study. Safe for several threads and processes: every thread has a connection of its own.

    Raises StudyError when the file belongs to another protocol or is no such store.
    """

    def __init__(self, path: Path, protocol_sha256: str) -> None:
        self.path = Path(path)
        self._local = threading.local()
        with self._connection() as connection:
            connection.execute("PRAGMA journal_mode = WAL")  # stays with the file
        with self._transaction() as connection:
            for statement in _SCHEMA:
                connection.execute(statement)
            connection.execute("INSERT OR IGNORE INTO study VALUES (1, ?)", (protocol_sha256,))
            (found,) = connection.execute("SELECT protocol_sha256 FROM study").fetchone()
        if found != protocol_sha256:
            raise StudyError(
                f"{self.path} holds the answers to the protocol {found[:12]}, not to {protocol_sha256[:12]}; "
                "a protocol is never changed once a study has started"
            )

    def add_reader(self, specialty: str, years: float, display: str, simulated: bool = False) -> str:
        """Store a reader who has consented and return the reader code, which is kept nowhere else."""
        code = new_code()
        with self._transaction() as connection:
            connection.execute(
                "INSERT INTO readers VALUES (NULL, ?, ?, ?, ?, ?, ?)",
                (reader_id(code), specialty, years, display, int(simulated), _now()),
            )
        return code

    def knows(self, reader: str) -> bool:
        """Whether a reader with this id has consented."""
        with self._connection() as connection:
            return connection.execute("SELECT 1 FROM readers WHERE id = ?", (reader,)).fetchone() is not None

    def count(self, reader: str) -> int:
        """How many answers a reader has given; the position of the next item."""
        with self._connection() as connection:
            return _count(connection, reader)

    def append(self, answer: Answer) -> None:
        """Store one answer; it is durable when this returns.

        An answer that is sent again, because its acknowledgement was lost, changes nothing. Raises InputError for
        another value at an answered position, and for a position that is not the reader's next.
        """
        with self._transaction() as connection:
            stored = connection.execute(
                "SELECT value FROM answers WHERE reader = ? AND position = ?", (answer.reader, answer.position)
            ).fetchone()
            if stored is not None:
                if stored[0] == answer.value:
                    return
                raise InputError(f"item {answer.position + 1} is answered already, and an answer cannot be changed")
            following = _count(connection, answer.reader)
            if answer.position != following:
                raise InputError(f"the next item is {following + 1}, got an answer to {answer.position + 1}")
            connection.execute(
                f"INSERT INTO answers VALUES ({', '.join('?' * len(fields(Answer)))})",
                astuple(replace(answer, answered_at=answer.answered_at or _now())),
            )

    def readers(self) -> list[Reader]:
        """All readers, in the order of consent."""
        with self._connection() as connection:
            rows = connection.execute("SELECT * FROM readers ORDER BY number").fetchall()
        return [replace(Reader(*row), simulated=bool(row[5])) for row in rows]

    def answers(self) -> list[Answer]:
        """All answers, by reader and position."""
        with self._connection() as connection:
            rows = connection.execute("SELECT * FROM answers ORDER BY reader, position").fetchall()
        return [replace(Answer(*row), practice=bool(row[6]), is_repeat=bool(row[7])) for row in rows]

    @contextmanager
    def _connection(self) -> Iterator[sqlite3.Connection]:
        try:
            if not hasattr(self._local, "connection"):
                connection = sqlite3.connect(self.path, timeout=_BUSY_TIMEOUT_S, isolation_level=None)
                connection.execute("PRAGMA synchronous = FULL")  # each commit waits for the disk
                connection.execute("PRAGMA foreign_keys = ON")
                self._local.connection = connection
            yield self._local.connection
        except sqlite3.DatabaseError as error:
            raise StudyError(f"the answers in {self.path} cannot be read or written: {error}") from error

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with self._connection() as connection:
            connection.execute("BEGIN IMMEDIATE")
            with connection:  # commits, or rolls back after an exception
                yield connection


def _count(connection: sqlite3.Connection, reader: str) -> int:
    return connection.execute("SELECT count(*) FROM answers WHERE reader = ?", (reader,)).fetchone()[0]


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")
