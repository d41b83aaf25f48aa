"""``store.json``: what a store is and never stops being, and the tokenizer it is bound to.

Written once, by put-if-absent, so that of two creators one wins and the other reads what won.
"""

from __future__ import annotations

import hashlib
import secrets
import shlex
import uuid
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import orjson

from retrotool.errors import CorruptError, StoreNotFoundError, UsageError
from retrotool.store import atomic, paths

FORMAT = 1
FILE = "store.json"


@dataclass(frozen=True, slots=True)
class TokenizerIdentity:
    """What a store knows of its tokenizer; ``sha256`` is that of the ``tokenizer.json`` kept in ``file``."""

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
        """Hash by which the log may speak of ``text``: BLAKE2b-128 keyed with the store's secret."""
        key = bytes.fromhex(self.secret)
        return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16, key=key).hexdigest()


def read_identity(root: Path) -> tuple[Identity, str]:
    """Read ``store.json``; return it and the SHA-256 of its bytes (the parent of commit 0)."""
    try:
        data = (root / FILE).read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise StoreNotFoundError(f"{root} is no store: it has no {FILE}", _how_to_make(root)) from None
    try:
        fields: dict[str, Any] = orjson.loads(data)
        if _encode({name: value for name, value in fields.items() if name != "sha256"}) != data:
            raise ValueError("its checksum is wrong")
        if int(fields["format"]) > FORMAT:
            raise UsageError(
                f"{root} has format {fields['format']}; this retrotool knows {FORMAT}", "Install a newer retrotool."
            )
        tokenizer = TokenizerIdentity(**{k: fields["tokenizer"][k] for k in TokenizerIdentity.__slots__})
        identity = Identity(**{k: fields[k] for k in Identity.__slots__ if k != "tokenizer"}, tokenizer=tokenizer)
    except (orjson.JSONDecodeError, KeyError, TypeError, ValueError) as error:
        raise CorruptError(f"{root / FILE} can't be read: {error}") from error
    paths.inside(root, identity.tokenizer.file)
    return identity, hashlib.sha256(data).hexdigest()


def is_store(root: Path) -> bool:
    """Whether there is a store at a path, whatever its state."""
    try:
        return (root / FILE).exists()
    except OSError:  # a name that is too long, say
        return False


def _how_to_make(root: Path) -> str:
    """What to do where there is no store."""
    name = shlex.quote(str(root))
    if root.is_file() or _is_strange(root):
        return f"A store is a directory of its own. To make one of what is there: retrotool chunk STORE {name}"
    return f"Make one with: retrotool chunk {name} INPUT..."


def _is_strange(root: Path) -> bool:
    """Whether a directory has something in it that does not belong into a store that is being made."""
    return root.is_dir() and any(not e.name.startswith((".", "tokenizer-", "staging")) for e in root.iterdir())


def create_identity(root: Path, tokenizer: TokenizerIdentity, tokenizer_json: bytes, chunk_length: int) -> None:
    """Make ``root`` a store, unless another process just did; the caller reads what came of it."""
    if root.exists() and not root.is_dir():
        raise UsageError(f"{root} is a file; a store is a directory")
    # The store is looked for last: another process may be making it just now.
    if _is_strange(root) and not (root / FILE).exists():
        raise UsageError(f"{root} is not empty and no store", "Name a new directory, or an empty one, for the store.")
    token = paths.new_token(secrets.token_hex(4))
    target = root / tokenizer.file
    atomic.put_if_absent(target, token, tokenizer_json)
    if target.read_bytes() != tokenizer_json:
        raise CorruptError(f"{target} is not the tokenizer its name says", "Remove it and run the same command again.")
    created = datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
    identity = Identity(FORMAT, str(uuid.uuid4()), created, chunk_length, secrets.token_hex(32), tokenizer)
    atomic.put_if_absent(root / FILE, token, _encode(asdict(identity)))


def _encode(fields: dict[str, Any]) -> bytes:
    """The bytes of ``store.json``, with a checksum over its other fields."""
    options = orjson.OPT_INDENT_2 | orjson.OPT_SORT_KEYS
    sha256 = hashlib.sha256(orjson.dumps(fields, option=options)).hexdigest()
    return orjson.dumps({**fields, "sha256": sha256}, option=options)
