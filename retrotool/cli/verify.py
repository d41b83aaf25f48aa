"""``retrotool verify``."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

import typer

from retrotool.cli import output
from retrotool.cli.options import Json, StoreArgument
from retrotool.errors import CorruptError

if TYPE_CHECKING:
    from retrotool.store.verify import Verification

EPILOG = """\b
Examples:
  retrotool verify store
  retrotool verify store --json

Exit codes: 0 all is well, 12 something is not, or so much was erased meanwhile that it can't be told."""


@dataclass(frozen=True, slots=True)
class Verified:
    """What is shown of a verification."""

    ok: bool
    commit: int
    files: int
    bytes: int
    documents: int
    chunks: int
    tokens: int
    content: str
    ids: str
    tombstones: str
    embeddings: str
    indexes: str
    neighbours: str
    materialised: str
    problems: list[str]


def command(store: StoreArgument, as_json: Json = False) -> None:
    """Check every checksum, row count and cross-reference of a store.

    The hashes are equal for stores of equal content, however they were made: content (what living chunks say), ids
    (which chunk is which), tombstones, embeddings, indexes, neighbours, and these materialised.
    """
    with output.errors(as_json):
        from tqdm import tqdm

        from retrotool.commands import looking

        total = looking.bytes_to_verify(store)
        with tqdm(total=total, unit="B", unit_scale=True, desc="verify", disable=None, delay=2, file=sys.stderr) as bar:
            found = looking.verify(store, bar.update)
        output.show(_shown(found), as_json, _text)
        if not found.ok:
            raise typer.Exit(CorruptError.exit_code)


def _shown(found: Verification) -> Verified:
    fields = {name: getattr(found, name) for name in Verified.__slots__}
    return Verified(**fields)


def _text(found: Verified) -> str:
    lines = [
        f"{output.count(found.files, 'file')}, {output.size(found.bytes)}, at commit {found.commit}: "
        + ("all is well." if found.ok else "NOT well.")
        if found.commit >= 0 or found.ok
        else "The store can't be opened: NOT well."
    ]
    lines += [f"  problem: {problem}" for problem in found.problems]
    hashes = ("content", "ids", "tombstones", "embeddings", "indexes", "neighbours", "materialised")
    shown = {name: getattr(found, name) for name in hashes if getattr(found, name)}
    width = max(map(len, shown), default=0) + 1
    lines += [f"  {name:<{width}} {value}" for name, value in shown.items()]
    return "\n".join(lines)
