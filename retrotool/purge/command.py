"""``retrotool purge``, ``undo``, ``erase`` and ``affected``."""

from __future__ import annotations

import math
import re
import shlex
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from retrotool.cli import options, output
from retrotool.cli.options import Json, PurgeId, StoreArgument, TableOption, arg, at_file, at_files, opt
from retrotool.errors import UsageError, listed

if TYPE_CHECKING:
    from retrotool.purge.affected import AffectedChunk, AffectedResult, AskedPurge
    from retrotool.purge.erase import EraseResult
    from retrotool.purge.run import Count, Example, PurgeList, PurgeResult, Touched
    from retrotool.purge.select import Selectors
    from retrotool.purge.undo import UndoResult

EPILOG = """\b
Examples:
  retrotool purge store
  retrotool purge store --document @takedown.txt --reason "request 17" --dry-run
  retrotool purge store --document doc-7 --reason "request 17" --erase --yes
  retrotool purge store --where "source = 'forum' and year < 2020" --reason "licence" --yes
  retrotool purge store --like "how to pick a lock" --within 0.9 --dry-run --out ids.txt
  retrotool purge store --pattern "(?i)confidential" --allow-lossy --reason "policy 3" --yes"""

UNDO_EPILOG = """\b
Examples:
  retrotool undo store last --reason "the wrong list"
  retrotool undo store p1a2b3c4d --reason "the wrong list\""""

ERASE_EPILOG = """\b
Examples:
  retrotool erase store last --yes
  retrotool erase store p1a2b3c4d p5e6f7a8b --yes
  retrotool erase store --older-than 7d --dry-run"""

AFFECTED_EPILOG = """\b
Examples:
  retrotool affected store
  retrotool affected training --table wiki --out affected.jsonl"""

_AROUND, _SHOWN = 60, 160
_FIGURES = {"like": "distance", "classifier": "score"}
_by = partial(opt, panel="Selectors (any of them selects a chunk; with --and, all of them)")
_ASK_ABOVE = 0.01
_LISTED = 3
_YesOption = Annotated[bool, opt("Don't ask before more than 1 % of the store is purged or erased.", "--yes")]


def command(
    store: StoreArgument,
    reason: Annotated[str | None, opt("Why. It stays in the log forever: name no person.", metavar="TEXT")] = None,
    chunk: Annotated[list[str] | None, _by("A chunk, as PART:ROW or id; repeatable.", metavar="ID|@FILE")] = None,
    document: Annotated[list[str] | None, _by("A document id; repeatable.", metavar="ID|@FILE")] = None,
    where: Annotated[str | None, _by("Expression over document columns: \"source = 'x'\".", metavar="EXPR")] = None,
    pattern: Annotated[
        list[str] | None, _by("RE2 pattern over text: the chunks that a match touches; repeatable.", metavar="RE|@FILE")
    ] = None,
    terms: Annotated[Path | None, _by("Words and names, one per line, matched as whole words.", metavar="FILE")] = None,
    pii: Annotated[
        str | None, _by("Personal data: all, or some of email,phone,ip-address,iban,payment-card,key.", metavar="KINDS")
    ] = None,
    near_duplicates_of: Annotated[
        list[str] | None, _by("Copies of this chunk, also shifted or slightly changed; repeatable.", metavar="ID|@FILE")
    ] = None,
    contaminates: Annotated[
        str | None, _by("Documents similar to one of an evaluation store: 13-gram Jaccard from 0.8.", metavar="STORE")
    ] = None,
    duplicates: Annotated[bool, _by("Chunks that repeat an earlier one.", "--duplicates")] = False,
    like: Annotated[
        str | None, _by("Chunks near a text, or a chunk of a file, by embeddings; with --within.", metavar="TEXT|@FILE")
    ] = None,
    within: Annotated[float | None, _by("With --like: the largest squared L2 distance.", metavar="DISTANCE")] = None,
    classifier: Annotated[
        str | None, _by("Chunks to which a model directory gives LABEL, at SCORE or more.", metavar="MODEL=LABEL:SCORE")
    ] = None,
    every: Annotated[bool, _by("Only chunks that all of these select.", "--and")] = False,
    whole_documents: Annotated[bool, _by("All chunks of the documents that are touched.", "--whole-documents")] = False,
    allow_lossy: Annotated[bool, _by("Search text that has lost case or spacing.", "--allow-lossy")] = False,
    dry_run: Annotated[bool, opt("Show what would be purged, and change nothing.", "--dry-run")] = False,
    out: Annotated[Path | None, opt("With --dry-run: write the ids of the chunks here.", metavar="FILE")] = None,
    erase: Annotated[bool, opt("Also rewrite the files with the chunks. This can't be undone.", "--erase")] = False,
    yes: _YesOption = False,
    devices: options.Device = "auto",
    as_json: Json = False,
) -> None:
    """Purge chunks: no command returns them any more. Without a selector, list purges.

    Purged chunks are excluded from search, neighbours (those computed before, too), continuations and
    training. With --erase their text, tokens and vectors are removed from the files as well; only chunk ids
    remain.

    @FILE is a file with a value per line, @- is standard input, @@x is a value that begins with @.
    """  # fmt: skip
    from retrotool.purge import select
    from retrotool.purge.run import list_purges, purge

    selectors = select.Selectors(
        chunk=at_files(chunk), document=at_files(document), where=where, pattern=at_files(pattern), terms=terms,
        pii=select.kinds_of(pii), near_duplicates_of=at_files(near_duplicates_of), contaminates=contaminates,
        duplicates=duplicates, every=every, whole_documents=whole_documents, allow_lossy=allow_lossy,
        like=None if like is None else at_file(like), within=within, device=options.first_device(devices),
        **_classifier(classifier),
    )  # fmt: skip
    if selectors == select.Selectors(device=selectors.device) and not (dry_run or erase or reason or out):
        output.show(list_purges(store), as_json, lambda found: _list_text(store, found))
    else:
        confirm = partial(_confirmed, store, yes=yes, erase=erase, stopped="Nothing was purged.", as_json=as_json)
        result = purge(store, selectors, reason=reason, dry_run=dry_run, out=out, erase=erase, confirm=confirm)
        if dry_run and erase:
            _note_settings(store)
        output.show(result, as_json, lambda result: _text(store, selectors, result, erase))


def _classifier(text: str | None) -> dict[str, Any]:
    """Split MODEL=LABEL:SCORE; a part that is missing is None."""
    if text is None:
        return {}
    match = re.fullmatch("(.*)=([^=]*):([^=:]*)", text, re.DOTALL)
    if match is None:
        return {"classifier": text}
    model, label, score = match.groups()
    try:
        return {"classifier": model, "label": label, "above": float(score)}
    except ValueError:
        raise UsageError(f"--classifier {text}: {score!r} is not a score", "Give MODEL=LABEL:SCORE.") from None


def _list_text(store: str, found: PurgeList) -> str:
    if not found.purges:
        return f"Nothing was purged from {store}."
    rows = [(p.purge, p.time[:19], p.chunks, p.state, output.one_line(p.reason)) for p in found.purges]
    return output.table(rows, ("purge", "time (UTC)", "chunks", "state", "reason"))


def _text(store: str, selectors: Selectors, result: PurgeResult, erase: bool) -> str:
    documents = output.count(result.documents, "whole document")
    what = f"{output.count(result.chunks, 'chunk')} ({result.share:.2%} of the store), {documents}"
    were = "was" if result.already_purged == 1 else "were"
    before = f"; {result.already_purged:,} more {were} not live before" if result.already_purged else ""
    near = _nothing_near(store, selectors, result)
    if result.dry_run:
        lines = [f"Would purge {what}{before}. Nothing was changed."]
        if erase:
            lines.append(f"Would erase {output.count(result.unerased, 'chunk')}{_copies_text(result)}.")
        return "\n".join([*lines, *_review(store, result), *near, *_same_text(store, result)])
    lines = []
    if not result.purge and not result.erased:
        were = f": {output.count(result.already_purged, 'chunk')} {were} not live before" if before else ""
        lines.append(f"Nothing to purge{were}.")
    if result.purge and (result.chunks or not result.erased):
        lines.append(f"Purged {what}{before} (purge {result.purge}, commit {result.commit}).")
    if result.blocked and not result.chunks:
        lines.append(f"Added to the block list: {result.blocked:,} (hashes of ids, texts and tokens).")
    return "\n".join(lines + near + _erased_lines(store, result) + _same_text(store, result))


def _nothing_near(store: str, selectors: Selectors, result: PurgeResult) -> list[str]:
    if not any(match.selector == "like" and not match.chunks for match in result.matches):
        return []
    query = "TEXT" if isinstance(selectors.like, Path) else shlex.quote(output.one_line(str(selectors.like)))
    search = f"{shlex.join(['retrotool', 'search', store])} {query}"
    return [f"No chunk is within {selectors.within:g} of the text. To see the distances of the nearest: {search}"]


def _same_text(store: str, result: PurgeResult) -> list[str]:
    same = result.same_text
    if not same.documents:
        return []
    which = listed(map(output.one_line, same.first), same.documents)
    given = [word for name in same.first for word in ("--document", f"@{name}" if name.startswith("@") else name)]
    command = output.one_line(shlex.join(["retrotool", "purge", store, *given]))
    return [f"The same text is still live in {which}. To purge it there: {command} --reason ..."]


def _review(store: str, result: PurgeResult) -> list[str]:
    lines = [
        f"  --{', '.join(filter(None, (match.selector, match.name)))}: {output.count(match.chunks, 'chunk')}"
        for match in (result.matches if len(result.matches) > 1 else ())
    ]
    if (review := result.review) is None or not result.chunks:
        return lines
    lines += _counts("by source", review.sources, result.chunks)
    lines += _counts("by document", review.documents, result.chunks)
    lines += ["  examples", *map(_marked, review.examples)]
    lines.append(f"  an erase would rewrite {_rewritten(review.touched)}")
    if result.out:
        command = shlex.join(["retrotool", "purge", str(store), "--chunk", f"@{result.out}"])
        lines.append(f"Purge just these chunks: {output.one_line(command)} --reason ...")
    return lines


def _counts(title: str, counts: Sequence[Count], total: int) -> list[str]:
    width = max(len(f"{one.chunks:,}") for one in counts)
    more = total - sum(one.chunks for one in counts)
    return [
        f"  {title}",
        *(f"    {one.chunks:>{width},}  {output.one_line(one.name or '(none)')}" for one in counts),
        *([f"    and {output.count(more, 'chunk')} in others"] if more > 0 else []),
    ]


def _marked(example: Example) -> str:
    """Describe a chunk, with [[ ]] around the match in its text."""
    from retrotool.store.parts import format_id

    text, begin, end = example.text, example.begin, example.end
    low, high = (max(begin - _AROUND, 0), end + _AROUND) if end > begin else (0, _SHOWN)
    shown = f"{text[low:begin]}[[{text[begin:end]}]]{text[end:high]}" if end > begin else text[:high]
    shown = ("…" if low else "") + shown + ("…" if high < len(text) else "")
    figure = "" if example.figure is None else f", {_FIGURES.get(example.selector, 'figure')} {example.figure:.4f}"
    return f"    {format_id(example.chunk)} of {output.one_line(example.document)}{figure}: {output.one_line(shown)}"


def _rewritten(touched: Touched) -> str:
    what = output.count(touched.parts, "part")
    if touched.shards:
        what += f", {output.count(touched.shards, 'index shard')}"
    if touched.tables:
        what += f", {output.count(touched.tables, 'table')} of neighbours ({output.count(touched.rows, 'row')})"
    time = f"about {touched.seconds:,.0f} s" if touched.seconds >= 1 else "less than a second"
    return f"at most {what}: {output.size(touched.bytes)}, {time}"


def undo_command(
    store: StoreArgument,
    purge: PurgeId,
    reason: Annotated[str, opt("Why. It stays in the log forever: name no person.", metavar="TEXT")],
    as_json: Json = False,
) -> None:
    """Undo a purge that has not been erased: its chunks are live again."""
    from retrotool.purge.undo import undo

    output.show(undo(store, purge, reason=reason), as_json, partial(_undo_text, store))


def _undo_text(store: str, result: UndoResult) -> str:
    again = "is live again" if result.chunks == 1 else "are live again"
    lines = [
        f"Undid purge {result.purge}: {output.count(result.chunks, 'chunk')}, "
        f"{output.count(result.documents, 'whole document')}, {again} (commit {result.commit})."
    ]
    if result.still_purged:
        by = f": {', '.join(result.named_by)} purged them, too" if result.named_by else ", because they repeat others"
        lines.append(f"Still purged: {output.count(result.still_purged, 'chunk')} of it{by}.")
    if result.outdated:
        put = shlex.join(["retrotool", "undo", store, result.outdated_purge, "--reason", "..."])
        newer = f"{output.count(result.outdated, 'document')} with a newer text (purge {result.outdated_purge})"
        lines.append(f"Purged instead: {newer}. To undo this: {put}")
    if result.repeats:
        has = "document has" if result.repeats == 1 else "documents have"
        lines.append(f"{result.repeats:,} {has} the id of another that was added since: both are live now.")
    if result.next:
        lines.append("Neighbours that were found while it was purged lack its chunks. Update them:")
        lines += [f"  {command}" for command in result.next]
    return "\n".join(lines)


def erase_command(
    store: StoreArgument,
    purges: Annotated[
        list[str] | None,
        arg("Ids of purges; last is the newest one.", metavar="[PURGE]...", complete=options.complete_purges),
    ] = None,
    older_than: Annotated[str | None, opt("All purges older than this, such as 7d or 12h.", metavar="AGE")] = None,
    dry_run: Annotated[bool, opt("Show what would be erased, and change nothing.", "--dry-run")] = False,
    yes: _YesOption = False,
    as_json: Json = False,
) -> None:
    """Erase purged chunks: rewrite the files that hold their text, tokens and vectors.

    This can't be undone. An erase that was interrupted is resumed by running it again. Copies of the chunks
    that chunk rejected as duplicates are erased with them. Check the result with retrotool receipt.
    """
    from retrotool.purge.erase import erase

    if not purges and older_than is None:
        command = shlex.join(["retrotool", "purge", store])
        raise UsageError("no purge to erase was given", f"Give PURGE or --older-than AGE. List purges: {command}")
    age = None if older_than is None else _seconds(older_than)
    confirm = partial(_confirmed, store, yes=yes, erase=True, stopped="Nothing was erased.", as_json=as_json)
    result = erase(store, purges or (), older_than=age, dry_run=dry_run, confirm=confirm)
    if dry_run:
        _note_settings(store)
    output.show(result, as_json, lambda result: _erase_text(store, result, dry_run))


def _seconds(age: str) -> float:
    units = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800}
    seconds = float(age[:-1]) * units[age[-1]] if re.fullmatch("[0-9]+[smhdw]", age) else math.inf
    if seconds > time.time():
        raise UsageError(f"--older-than {age[:40]!a} is not an age", "Give for example 7d, 12h or 2w.")
    return seconds


def _erase_text(store: str, result: EraseResult, dry_run: bool) -> str:
    if not result.purges:
        return "Nothing to erase: no purge that is not erased yet is that old."
    if dry_run:
        of = f"of {output.count(len(result.purges), 'purge')}: {', '.join(result.purges)}"
        return f"Would erase {output.count(result.unerased, 'chunk')}{_copies_text(result)}, {of}. Nothing was changed."
    return "\n".join(_erased_lines(store, result))


def _erased_lines(store: str, result: PurgeResult | EraseResult) -> list[str]:
    lines = []
    if result.erased:
        what = f"{output.count(result.erased, 'chunk')}{_copies_text(result)}"
        done = f"Erased {what}; {output.count(result.files_rewritten, 'file')} rewritten."
        lines.append(done if result.files_rewritten else f"Erased before: {what}.")
        receipts = [shlex.join(["retrotool", "receipt", store, purge]) for purge in result.purges[:_LISTED]]
        lines += [f"Check it: {command}" for command in receipts]
    reached = {"kept": "Not reached"}
    lines += [f"{reached.get(one.status, 'Not checked')}: {output.one_line(one.line)}" for one in result.bucket]
    return lines + [
        f"Not reached: neighbours {one.table!r} of {output.one_line(one.path)}, another store. They may contain ids "
        f"and text of erased chunks, which readers skip. Remove them: {one.command}"
        for one in result.dependents
    ]


def _copies_text(result: PurgeResult | EraseResult) -> str:
    if not result.copies:
        return ""
    return f", including those of {output.count(result.copies, 'rejected document')} with the same id or text"


def _note_settings(store: str) -> None:
    """Print what the bucket of a store would keep of erased files, and what to do about it first."""
    from retrotool.store.bucket_copies import bucket_settings
    from retrotool.store.storage import storage_at

    for one in bucket_settings(storage_at(store).uri):
        output.note(f"The bucket: {one.line}")


def _confirmed(
    store: str, planned: PurgeResult | EraseResult, *, yes: bool, erase: bool, stopped: str, as_json: bool
) -> bool:
    """Ask before more than ``_ASK_ABOVE`` of a store is purged or erased; the answer no ends the command.

    Before an erase, first print what its bucket would keep. ``UsageError`` without a terminal.
    """
    if erase:
        _note_settings(store)
    chunks, share = getattr(planned, "chunks", 0), getattr(planned, "share", 0.0)
    if yes or max(share, planned.unerased_share) <= _ASK_ABOVE:
        return True
    does = [f"purges {output.count(chunks, 'chunk')}, {share:.2%} of the store"] if chunks else []
    if erase:
        of = f"{planned.unerased_share:.2%} of all chunks it ever had"
        does.append(f"erases {output.count(planned.unerased, 'chunk')} permanently, {of}")
    warning = f"This {', and '.join(does)}"
    if not sys.stdin.isatty():
        raise UsageError(warning, "More than 1 % needs --yes. Look at it first with --dry-run.")
    sys.stderr.write(f"{warning}. Continue? [y/N]: ")
    sys.stderr.flush()
    # typer's prompt can't tell Ctrl-C, which ends a command with another exit code, from an answer.
    if sys.stdin.readline().strip().lower() not in ("y", "yes"):
        output.stop(stopped, as_json)
    return True


def affected_command(
    store: StoreArgument,
    purges: Annotated[
        list[str] | None, arg("Ids of purges of the database; last is the newest. Default: all.", metavar="[PURGE]...")
    ] = None,
    table: TableOption = None,
    out: Annotated[Path | None, opt("Write all affected chunks here, as JSON lines.", metavar="FILE")] = None,
    as_json: Json = False,
) -> None:
    """List the training chunks that have purged chunks among their neighbours.

    STORE is the query store, which has the tables. Text of a purged chunk may have reached a model through
    these training chunks. Nothing of the purged chunks is shown.
    """
    from retrotool.purge.affected import affected

    output.show(affected(store, table, purges or (), out=out), as_json, _affected_text)


def _affected_text(result: AffectedResult) -> str:
    if not result.purges:
        return "Nothing was purged, so no chunk is affected."
    first, saved = f"first {result.k}", f"{result.saved} saved"
    lines = [
        f"{output.count(result.in_k + result.following_in_k, 'chunk')} of {result.rows:,} have a purged chunk among "
        f"the {first} neighbours {result.table!r}, or following one; "
        f"{result.in_saved + result.following_in_saved:,} among the {saved}."
    ]
    row = result.rows, result.in_k, result.following_in_k, result.in_saved, result.following_in_saved
    lines.append(output.table([row], ("chunks", first, "following", saved, "following")))
    if result.purged:
        lines.append(f"Not counted: {output.count(result.purged, 'chunk')}, purged as well.")
    if result.out:
        lines.append(f"All of them: {result.out}")
    elif result.examples:
        lines += ["The first of them (--out FILE writes all):", *map(_affected_line, result.examples)]
    return "\n".join([*lines, *(line for one in result.purges for line in _not_known(one))])


def _affected_line(one: AffectedChunk) -> str:
    from retrotool.store.parts import format_id

    places = [(one.neighbour, "neighbour {}"), (one.continuation, "following neighbour {}")]
    named = ", ".join(text.format(place) for place, text in places if place is not None)
    return f"  {format_id(one.chunk)} of {output.one_line(one.document)}, {output.one_line(one.source)}: {named}"


def _not_known(one: AskedPurge) -> list[str]:
    if one.erased:
        return [f"Purge {one.purge} is erased, from these tables as well: which chunks it affected is not known."]
    if one.since:
        return [
            f"Purge {one.purge}: {one.since:,} of {output.count(one.parts, 'part')} were searched after it; what their "
            "rows contained before is not known."
        ]
    return []
