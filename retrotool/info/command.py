"""``retrotool info``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from retrotool.cli import output
from retrotool.cli.options import Json, StoreArgument, opt
from retrotool.errors import UsageError

if TYPE_CHECKING:
    from retrotool.info.run import Info

EPILOG = """\b
Examples:
  retrotool info store
  retrotool info store --json
  retrotool info store --files --csv
  retrotool info store --sources"""

_BAR, _SOURCES = 40, 8


def command(
    store: StoreArgument,
    files: Annotated[bool, opt("List the live files instead.", "--files")] = False,
    sources: Annotated[bool, opt("Count by source and top-level domain instead, exactly.", "--sources")] = False,
    as_csv: Annotated[bool, opt("With --files or --sources: print CSV, with a header.", "--csv")] = False,
    as_json: Json = False,
) -> None:
    """Describe a store. With --json, also list its live files."""
    with output.errors(as_json):
        if as_csv and not (files or sources):
            raise UsageError("--csv needs --files or --sources")
        if as_csv and as_json:
            raise UsageError("--csv and --json can't be combined", "Give one of them.")
        if files and sources:
            raise UsageError("--files and --sources can't be combined", "Give one of them.")
        if files:
            from retrotool.info.file_list import ListedFile, list_files

            listed = list_files(store)
            _show_list(listed, listed.files, ListedFile, as_csv, as_json)
        elif sources:
            from retrotool.info.source_counts import SourceCount, count_sources

            counted = count_sources(store)
            _show_list(counted, counted.counts, SourceCount, as_csv, as_json)
        else:
            from retrotool.info import run as info_run

            output.show(info_run.info(store), as_json, _text)


def _show_list(found: Any, items: Sequence[Any], kind: type[Any], as_csv: bool, as_json: bool) -> None:
    columns = [field.name for field in fields(kind)]
    rows = [["" if (value := getattr(item, name)) is None else value for name in columns] for item in items]
    if as_csv:
        output.show_csv(columns, rows)
        return
    right = [columns.index(name) for name in ("part", "rows", "bytes") if name in columns]
    shown = ([output.one_line(value) if isinstance(value, str) else value for value in row] for row in rows)
    output.show(found, as_json, lambda _: output.table(list(shown), columns, right=right))


def _text(info: Info) -> str:
    path = info.path if Path(info.path).name not in ("", "..") else Path(info.path).resolve()
    lossy = "" if info.tokenizer["lossless"] else " (loses case or spacing)"
    keys = f" ({info.keys:,} of them keys)" if info.keys < info.chunks else ""
    lines = [
        f"{path}: {output.count(info.documents, 'document')}, "
        f"{output.count(info.chunks, 'chunk')} of {info.chunk_length} tokens{keys}, {info.tokens:,} tokens",
        f"  tokenizer   {info.tokenizer['name']}, {info.tokenizer['vocabulary']:,} tokens{lossy}",
        f"  parts       {len(info.parts):,}, at commit {info.commit}",
        f"  on disk     {output.size(sum(info.bytes.values()))}: "
        + ", ".join(
            f"{kind} {output.size(size)}" for kind, size in sorted(info.bytes.items(), key=lambda item: -item[1])[:5]
        ),
    ]
    if info.rejected:
        lines.append(f"  rejected    {output.count(info.rejected, 'row')} of input, listed in quarantine/")
    for name, e in info.encoders.items():
        covered = f"{e['rows']:,} of {output.count(info.keys, 'chunk')}, {e['parts']:,} of {len(info.parts):,} parts"
        checked = f"; recall@10 {e['check']['recall_at_10']:.4f} against float32" if "check" in e else ""
        checked = f"; made elsewhere by {output.one_line(e['origin'])}" if e.get("foreign") else checked
        lines.append(f"  embeddings  {name}: {e['dimension']} dimensions, {covered}{checked}")
    for name, index in info.indexes.items():
        recall = f"recall@10 {index['recall_at_10']:.3f}" if "recall_at_10" in index else "not measured yet"
        kind = index.get("kind", "unfinished")
        lines.append(f"  index       {name}: {output.count(index['vectors'], 'vector')}, {kind}, {recall}")
    lines += [f"  neighbours  {name}: {_neighbours(info, name)}" for name in info.neighbours]
    for one in info.dependents:
        lines.append(f"  used by     {one.path}, neighbours {one.table}, since {one.since[:10]}")
        lines.append(f"              to update it: {one.command}")
    if info.purged:
        of = "purged or of duplicate documents" if info.purges else "of duplicate documents"
        lines.append(f"  tombstones  {output.count(info.purged, 'chunk')}, {of}")
    for purge, record in info.purges.items():
        chunks = output.count(record["chunks"], "chunk")
        lines.append(f"  {purge}   {chunks} purged{_after(record)}: {record['reason']}")
    if info.unfinished:
        lines.append("  unfinished  an interrupted chunk: run the same command again to resume it")
    return "\n".join(lines)


def _after(purge: dict[str, Any]) -> str:
    if "undone" in purge:
        return f" and undone ({purge['undone_reason']})"
    return " and erased" if purge["erased"] else ""


def _neighbours(info: Info, name: str) -> str:
    about = info.neighbours[name]
    rows, made = output.count(about["rows"], "chunk"), ""
    if about.get("text"):
        missing = about["parts"] - about["text_parts"]
        stale = f" ({output.count(missing, 'part')} without)" if missing else ""
        made = f", {about['k']} materialised{stale}"
    if "mix" in about:
        of = ", ".join(f"{member['table']} (weight {member['weight']:g})" for member in about["mix"])
        return f"a mixture of {of} for {rows}{made}"
    words = ""
    if filters := about.get("filters"):
        from retrotool.neighbours.filters import in_words

        words = f"; excluded: {in_words(filters)}"
    database = "" if about["within"] else f", from database {about['uri']}"
    if edits := about.get("edits"):
        words += f"; edited: {output.count(edits['rows'], 'row')} set, {output.count(edits['bans'], 'ban')}"
    how = f"index {about['index']!r}" if about["index"] else "exact search"
    return f"{about['saved']} saved for {rows}{database}, {how}, encoder {about['encoder']}{made}{words}"
