"""``retrotool info``, ``log``, ``verify`` and ``doctor``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from retrotool.cli import output
from retrotool.cli.options import Json, StoreArgument, arg, complete_stores, opt
from retrotool.errors import CorruptError, UsageError

if TYPE_CHECKING:
    from retrotool.info.doctor import Diagnosis
    from retrotool.info.log_entries import LogEntry, LogVerification
    from retrotool.info.run import Info
    from retrotool.info.verify import Verification

EPILOG = """\b
Examples:
  retrotool info store
  retrotool info store --json
  retrotool info store --files --csv
  retrotool info store --sources"""
LOG_EPILOG = """\b
Examples:
  retrotool log store
  retrotool log store --last 3
  retrotool log store --json

Each line has the commit's number, time, hash (12 digits; all with --json) and command, and the files that it added
(+), replaced (±) and removed (-), with their rows in parentheses. retrotool verify STORE --log checks the log."""
VERIFY_EPILOG = """\b
Examples:
  retrotool verify store
  retrotool verify store --json
  retrotool verify store --shard 3/16
  retrotool verify store --log

Exit codes: 0 OK; 12 a problem was found, or concurrent erases kept removing files."""
DOCTOR_EPILOG = """\b
Examples:
  retrotool doctor
  retrotool doctor store --json

Exit codes: 0 nothing is broken; 1 something is."""
_HEADER = "commit  time (UTC)           hash          command     changes"


def command(
    store: StoreArgument,
    files: Annotated[bool, opt("List the live files instead.", "--files")] = False,
    sources: Annotated[bool, opt("Count by source and top-level domain instead, exactly.", "--sources")] = False,
    as_csv: Annotated[bool, opt("With --files or --sources: print CSV, with a header.", "--csv")] = False,
    as_json: Json = False,
) -> None:
    """Describe a store. With --json, also list its live files."""
    if as_csv and not (files or sources):
        raise UsageError("--csv needs --files or --sources")
    if as_csv and as_json:
        raise UsageError("--csv and --json can't be combined", "Give one of them.")
    if files and sources:
        raise UsageError("--files and --sources can't be combined", "Give one of them.")
    if files:
        from retrotool.info.run import ListedFile, list_files

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
        chunks, erased = output.count(record["chunks"], "chunk"), " and erased" if record["erased"] else ""
        after = f" and undone ({record['undone_reason']})" if "undone" in record else erased
        lines.append(f"  {purge}   {chunks} purged{after}: {record['reason']}")
    if info.unfinished:
        lines.append("  unfinished  an interrupted chunk: run the same command again to resume it")
    return "\n".join(lines)


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
    if order := about.get("rerank"):
        words += f"; re-ranked by {order}"
    if edits := about.get("edits"):
        words += f"; edited: {output.count(edits['rows'], 'row')} set, {output.count(edits['bans'], 'ban')}"
    how = f"index {about['index']!r}" if about["index"] else "exact search"
    return f"{about['saved']} saved for {rows}{database}, {how}, encoder {about['encoder']}{made}{words}"


def log_command(
    store: StoreArgument,
    last: Annotated[int | None, opt("Show only the N newest commits.", "--last", metavar="N")] = None,
    as_json: Json = False,
) -> None:
    """Show the commits of a store, the newest last."""
    from retrotool.info import log_entries

    entries = log_entries.log_entries(store, last)
    if not as_json:
        typer.echo(_HEADER)
    output.show_each("commits", entries, as_json, _entry_text)


def _entry_text(entry: LogEntry) -> str:
    replaced = {kind for kind, counts in entry.added.items() if entry.removed.get(kind) == counts["files"]}
    done = [
        f"{'±' if kind in replaced else '+'}{counts['files']:,} {kind} ({counts['rows']:,})"
        for kind, counts in entry.added.items()
    ]
    done += [f"-{n:,} {kind}" for kind, n in entry.removed.items() if kind not in replaced]
    if not done:
        done = [f"set {key}" for key in entry.records]
    words = ", ".join(done)
    for purge in entry.purges:
        verb = {"erase": "erased ", "undo": "undid "}.get(entry.command, "")
        by = f" by {purge['who']}" if purge["who"] and entry.command != "erase" else ""
        words += f"; {verb}{purge['purge']}" + output.one_line(f"{by}: {purge['reason']}")
    return f"{entry.number:>6}  {entry.time[:19]}  {entry.sha256[:12]}  {entry.command:<11} {words}".rstrip()


def verify_command(
    store: StoreArgument,
    log: Annotated[bool, opt("Check only the log, its chain, fold and checkpoints.", "--log")] = False,
    head: Annotated[
        str | None, opt("With --log: a head from an earlier check, which the log must contain.", metavar="SHA256")
    ] = None,
    as_json: Json = False,
) -> None:
    """Check every checksum, row count and cross-reference of a store; name what repairs each problem.

    The printed hashes are equal for stores of equal content, however these were built: content (tokens of
    live chunks), ids (which chunk has which id), tombstones, embeddings, indexes, neighbours, and
    materialised neighbours.

    With --shard, each job checks its share of the files, and the first also the log: the store is whole if
    all say so. Hashes need all files, so none are printed.

    With --log, the hash of the last entry (head) is printed. Keep it elsewhere: anyone who can write to the
    store can rewrite the whole log, and only --head with a hash that you kept detects that.
    """
    if head is not None and not log:
        raise UsageError("--head needs --log")
    found: LogVerification | Verification
    if log:
        from retrotool.info.log_entries import verify_log

        found = verify_log(store, head)
        output.show(found, as_json, _log_text)
    else:
        from retrotool.info.verify import verify

        found = verify(store)
        output.show(found, as_json, _verified_text)
    output.exit_if(not found.ok, CorruptError.exit_code)


def _verdict(found: LogVerification | Verification) -> str:
    return "OK" if found.ok else f"FAILED: {output.count(len(found.problems), 'problem')}"


def _log_text(found: LogVerification) -> str:
    checked = f"{output.count(found.commits, 'commit')}, {output.count(found.checkpoints, 'checkpoint')}"
    lines = [f"{checked}: {_verdict(found)}", *(f"  problem: {problem}" for problem in found.problems)]
    if found.kept is not None:
        lines.append(f"  kept  is commit {found.kept}: the log up to there is unchanged")
    if found.head:
        lines.append(f"  head  {found.head}")
    return "\n".join(lines)


def _verified_text(found: Verification) -> str:
    from retrotool.info.problems import problem_lines

    checked = f"{output.count(found.files, 'file')}, {output.size(found.bytes)}, at commit {found.commit}"
    checked = f"Share {found.shard}: {checked}" if found.shard else checked
    opened = checked if found.commit >= 0 else "The store can't be opened"
    lines = [f"{opened}: {_verdict(found)}", *problem_lines(found.problems)]
    if found.foreign:
        lines.append(f"  not checked: {output.count(len(found.foreign), 'file')} that retrotool did not make")
        lines += [f"    {output.one_line(path)}" for path in found.foreign]
    if found.unnamed:
        what = "of running or interrupted commands; the next writing command removes leftovers"
        lines.append(f"  uncommitted: {output.count(found.unnamed, 'file')} {what}")
    hashes = ("content", "ids", "tombstones", "embeddings", "indexes", "neighbours", "materialised")
    shown = {name: getattr(found, name) for name in hashes if getattr(found, name)}
    width = max(map(len, shown), default=0) + 1
    lines += [f"  {name:<{width}} {value}" for name, value in shown.items()]
    return "\n".join(lines)


def doctor_command(
    store: Annotated[
        str | None, arg("Directory of a store, to check its place too.", metavar="[STORE]", complete=complete_stores)
    ] = None,
    as_json: Json = False,
) -> None:
    """Check this machine for what makes commands slow or stop: packages, devices, limits, disks.

    With STORE, also measures how long a durable write takes there, and compares the clocks.
    """
    from retrotool.info import doctor

    found = doctor.doctor(store)
    output.show(found, as_json, _checks_text)
    output.exit_if(not found.ok, output.EXIT_FAILED)


def _checks_text(found: Diagnosis) -> str:
    width = max(len(check.name) for check in found.checks)
    lines = []
    for check in found.checks:
        lines.append(f"{check.status:<4}  {check.name:<{width}}  {check.found}")
        lines += [f"{'':{width + 8}}{check.advice}"] if check.advice else []
    return "\n".join(lines)
