"""``store.json``: what never changes about a store, including its tokenizer.

It is written once, by put-if-absent: of two creators one wins, and the other reads what the first wrote.
"""

from __future__ import annotations

import hashlib
import itertools
import secrets
import shlex
import uuid
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import orjson

from retrotool.errors import CorruptError, StoreNotFoundError, UsageError
from retrotool.store import schema, specs
from retrotool.store.paths import PROBE
from retrotool.store.storage import Storage, where

FORMAT = 2
FILE = "store.json"


@dataclass(frozen=True, slots=True)
class TokenizerIdentity:
    """A store's tokenizer; ``sha256`` is that of its ``tokenizer.json``, which is stored in ``file``."""

    name: str
    file: str
    sha256: str
    vocabulary: int
    token_bytes: int
    lossless: bool

    @classmethod
    def of(cls, name: str, content: bytes, vocabulary: int, lossless: bool) -> TokenizerIdentity:
        """Describe the tokenizer whose ``tokenizer.json`` is ``content``."""
        sha256 = hashlib.sha256(content).hexdigest()
        token_bytes = 2 if vocabulary <= 1 << 16 else 4
        return cls(name, f"tokenizer-{sha256[:12]}.json", sha256, vocabulary, token_bytes, lossless)


@dataclass(frozen=True, slots=True)
class Identity:
    """The content of ``store.json``."""

    format: int
    uuid: str
    created: str
    chunk_length: int
    secret: str
    tokenizer: TokenizerIdentity

    def keyed_hash(self, text: str) -> str:
        """Return the hash that represents ``text`` in the log: BLAKE2b-128 keyed with the store's secret."""
        key = bytes.fromhex(self.secret)
        return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16, key=key).hexdigest()


def read_identity(storage: Storage) -> tuple[Identity, str]:
    """Read ``store.json``; return it and the SHA-256 of its bytes (the parent of commit 0)."""
    try:
        data = storage.get(FILE)
    except (FileNotFoundError, NotADirectoryError):
        is_missing = "://" not in storage.uri and not Path(storage.place).exists()
        problem = "does not exist" if is_missing else f"is not a store: it has no {FILE}"
        raise StoreNotFoundError(f"{storage.place} {problem}", _how_to_make(storage)) from None
    path = where(storage, FILE)
    fields: dict[str, Any] = schema.load(data, {}, path)
    if _encode({name: value for name, value in fields.items() if name != "sha256"}) != data:
        raise CorruptError(f"{path}: wrong checksum")
    schema.check_value(fields, specs.FORMAT, path)
    if (found := fields["format"]) != FORMAT:
        advice = "Install a newer retrotool." if found > FORMAT else "It was never released: rebuild the store."
        raise UsageError(f"{storage.place} has format {found}; this retrotool reads format {FORMAT}", advice)
    schema.check_value(fields, specs.IDENTITY, path)
    tokenizer = TokenizerIdentity(**{k: fields["tokenizer"][k] for k in TokenizerIdentity.__slots__})
    identity = Identity(**{k: fields[k] for k in Identity.__slots__ if k != "tokenizer"}, tokenizer=tokenizer)
    return identity, hashlib.sha256(data).hexdigest()


def is_store(storage: Storage) -> bool:
    """Return whether there is a store, in any state."""
    try:
        return storage.stat(FILE) is not None
    except OSError:  # for example, the name is too long
        return False


def _how_to_make(storage: Storage) -> str:
    name = shlex.quote(storage.place)
    if Path(storage.place).is_file() or _is_strange(storage):
        return f"A store is a separate directory. To chunk what is there into one: retrotool chunk STORE {name}"
    return f"Create a store: retrotool chunk {name} INPUT..."


def _is_strange(storage: Storage) -> bool:
    """Return whether the folder has anything that does not belong to a store that is being created."""
    found = itertools.chain((info.path for info in storage.list("")), storage.irregular())
    return any(not path.startswith((".", "tokenizer-", "staging/", f"plans/{PROBE}-")) for path in found)


def create_identity(storage: Storage, tokenizer: TokenizerIdentity, tokenizer_json: bytes, chunk_length: int) -> None:
    """Create a store, unless another process just did; the caller reads the result."""
    if Path(storage.place).is_file():
        raise UsageError(f"{storage.place} is a file; a store is a directory")
    # In this order: another process may be creating the store.
    if _is_strange(storage) and storage.stat(FILE) is None:
        raise UsageError(f"{storage.place} is not empty and not a store", "Name a new or empty directory.")
    run = secrets.token_hex(4)
    if not storage.put_if_absent(tokenizer.file, run, tokenizer_json):
        path = where(storage, tokenizer.file)
        raise CorruptError(f"{path} does not match the hash in its name", "Remove it and run the same command again.")
    created = datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
    identity = Identity(FORMAT, str(uuid.uuid4()), created, chunk_length, secrets.token_hex(32), tokenizer)
    storage.put_if_absent(FILE, run, _encode(asdict(identity)))


def _encode(fields: dict[str, Any]) -> bytes:
    """Return the bytes of ``store.json``: ``fields`` and a checksum over them."""
    options = orjson.OPT_INDENT_2 | orjson.OPT_SORT_KEYS
    sha256 = hashlib.sha256(orjson.dumps(fields, option=options)).hexdigest()
    return orjson.dumps({**fields, "sha256": sha256}, option=options)
