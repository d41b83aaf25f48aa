"""``retrotool info``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from retrotool.cli import output
from retrotool.cli.options import Json, StoreArgument

if TYPE_CHECKING:
    from retrotool.commands.looking import Info

EPILOG = """\b
Examples:
  retrotool info store
  retrotool info store --json"""


def command(store: StoreArgument, as_json: Json = False) -> None:
    """Tell what is in a store; with --json also list its current files."""
    with output.errors(as_json):
        from retrotool import commands

        output.show(commands.info(store), as_json, _text)


def _text(info: Info) -> str:
    lossy = "" if info.tokenizer["lossless"] else " (loses case or spacing)"
    lines = [
        f"{info.path}: {output.count(info.documents, 'document')}, "
        f"{output.count(info.chunks, 'chunk')} of {info.chunk_length} tokens, {info.tokens:,} tokens",
        f"  tokenizer   {info.tokenizer['name']}, {info.tokenizer['vocabulary']:,} tokens{lossy}",
        f"  parts       {len(info.parts):,}, at commit {info.commit}",
        f"  on disk     {output.size(sum(info.bytes.values()))}: "
        + ", ".join(
            f"{kind} {output.size(size)}" for kind, size in sorted(info.bytes.items(), key=lambda item: -item[1])[:5]
        ),
    ]
    if info.set_aside:
        lines.append(f"  set aside   {output.count(info.set_aside, 'row')} of input, listed in quarantine/")
    lines += [
        f"  embeddings  {name}: {e['dimension']} dimensions, {e['parts']:,} of {len(info.parts):,} parts"
        for name, e in info.encoders.items()
    ]
    for name, index in info.indexes.items():
        recall = f"recall@10 {index['recall_at_10']:.3f}" if "recall_at_10" in index else "not measured yet"
        kind = index.get("kind", "unfinished")
        lines.append(f"  index       {name}: {output.count(index['vectors'], 'vector')}, {kind}, {recall}")
    lines += [
        f"  neighbours  {name}: {n['saved']} saved for {output.count(n['rows'], 'chunk')}"
        for name, n in info.neighbours.items()
    ]
    if info.purged:
        lines.append(f"  tombstones  {output.count(info.purged, 'chunk')}, of purges and duplicate documents")
    lines += [
        f"  {p}   {output.count(r['chunks'], 'chunk')} purged{' and erased' if r['erased'] else ''}: {r['reason']}"
        for p, r in info.purges.items()
    ]
    if info.unfinished:
        lines.append("  unfinished  an interrupted chunk: run it again to go on")
    return "\n".join(lines)
