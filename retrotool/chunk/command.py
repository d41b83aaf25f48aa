"""``retrotool chunk``."""

from __future__ import annotations

import os
import shlex
from functools import partial
from typing import TYPE_CHECKING, Annotated, Literal

from retrotool.chunk import PART_SIZE
from retrotool.cli import options, output
from retrotool.cli.command_lines import next_command
from retrotool.cli.options import Json, StoreArgument, arg, opt
from retrotool.errors import EXIT_REJECTED, UsageError, listed
from retrotool.scratch import use_scratch
from retrotool.sizes import parse_size

if TYPE_CHECKING:
    from retrotool.chunk.estimate import Estimate
    from retrotool.chunk.run import ChunkResult, RejectedReason

EPILOG = """\b
Examples:
  retrotool chunk store corpus/*.jsonl.zst
  retrotool chunk store papers.parquet --text-field body --id-field doi --keep year
  retrotool chunk store corpus/ --exclude '*.html' --dry-run
  retrotool chunk answers pairs.jsonl --key-field question --value-field answer
  retrotool chunk wiki-store wiki.idx --tokenizer minilm --end-of-document 102
  retrotool chunk notes-store notes/ --format text --encoding latin-1
  retrotool chunk store corpus/*.jsonl.zst --existing replace
  retrotool chunk store corpus/*.jsonl.zst --engine ray
  retrotool chunk store corpus/*.jsonl.zst --shard 3/16

Exit codes: 0 done, also if documents were repeats; 3 done or stopped with rejected rows or broken inputs;
2 usage; 11 lost a race; 12 corrupt; 14 others are working on the rest."""

_input = partial(opt, panel="What is added")
_reading = partial(opt, panel="How rows are read")
_work = partial(opt, panel="How the work is done")
_field = partial(_reading, metavar="F")


def command(
    store: StoreArgument,
    inputs: Annotated[
        list[str] | None,
        arg("Files, folders, patterns or URIs, such as s3:// and hf://; - is standard input.", metavar="[INPUT]..."),
    ] = None,
    tokenizer: Annotated[
        str | None,
        opt(
            "bytes-32k, minilm, tokenizer.json, model directory, .model, or hub name.  "
            "[default: the store's; for a new store, bytes-32k, which is lossless]",
            metavar="T",
        ),
    ] = None,
    chunk_length: Annotated[
        int | None, opt("Tokens per chunk.  [default: the store's; for a new store, 64]", metavar="N")
    ] = None,
    dry_run: Annotated[bool, opt("Estimate the result from a sample; change nothing.", "--dry-run")] = False,
    text_field: Annotated[str, _field("Field with the text; a.b is field b of object a.")] = "text",
    id_field: Annotated[
        str | None, _field("Field with the document's id.  [default: id; without it, a hash of the text]")
    ] = None,
    keep: Annotated[list[str] | None, _field("Field to store as a column of documents; repeatable.")] = None,
    key_field: Annotated[str | None, _field("Field with the key of a key-value record, which is embedded.")] = None,
    value_field: Annotated[str | None, _field("Field with the value of a key-value record, the continuation.")] = None,
    tokens_field: Annotated[str | None, _field("Field with token ids, which are stored unchanged.")] = None,
    format: Annotated[  # noqa: A002
        str | None,
        _reading("Read every input as text, jsonl, csv, html, u16, ... [default: by its name]", metavar="NAME"),
    ] = None,
    encoding: Annotated[
        str | None, _reading("Encoding of text, such as latin-1 or utf-16.  [default: UTF-8]", metavar="NAME")
    ] = None,
    end_of_document: Annotated[
        str | None, _reading("Token id that ends a document in token files, or none.", metavar="ID")
    ] = None,
    separator: Annotated[
        str | None, _reading("Text between documents in .txt files, such as '\\n\\n'.", metavar="S")
    ] = None,
    max_document: Annotated[str, _reading("Reject longer texts.", metavar="SIZE")] = "64MiB",
    exclude: Annotated[
        list[str] | None,
        _input(
            "Leave out files and folders by name or end of path, such as '*.html' or 'drafts/*'; repeatable.",
            metavar="PATTERN",
        ),
    ] = None,
    duplicates: Annotated[
        Literal["skip", "keep", "fail"],
        _input("Documents that repeat an id of the run, or any text: skip, keep, or fail.", metavar="skip|keep|fail"),
    ] = "skip",
    existing: Annotated[
        Literal["skip", "replace", "fail", "mirror"] | None,
        _input(
            "Documents of which the store has another text: skip or replace them, or fail. mirror also purges what an "
            "input that changed does not have any more.  [default: skip]",
            metavar="skip|replace|fail|mirror",
        ),
    ] = None,
    allow_purged: Annotated[bool, _input("Add documents even if they were purged before.", "--allow-purged")] = False,
    max_bad: Annotated[
        int | None,
        _input(
            "Stop after more rejected rows; the rest of a damaged file is one row.  [default: never]",
            metavar="N",
            least=0,
        ),
    ] = None,
    part_size: Annotated[
        int, _work("Chunks with which a part ends; units of work may end it before.", metavar="N")
    ] = PART_SIZE,
    scratch: options.ScratchOption = None,
    workers: options.WorkersOption = None,
    no_wait: options.NoWaitOption = False,
    exact_tokenizer: options.ExactTokenizer = False,
    as_json: Json = False,
) -> None:
    """Cut a corpus into chunks of 64 tokens, in Parquet.

    Creates the store if needed. Inputs that it has are skipped. Unreadable rows are rejected with file, line
    and reason. The result does not depend on the number of workers or on interruptions.
    """
    from retrotool.chunk import estimate as chunk_estimate
    from retrotool.chunk import run as chunk_run
    from retrotool.chunk.chunk_plan import ChunkOptions
    from retrotool.sources import Fields

    use_scratch(scratch)
    fields = Fields(
        text=text_field,
        id="id" if id_field is None else id_field,
        keep=tuple(keep or ()),
        key=key_field,
        value=value_field,
        tokens=tokens_field,
        separator=None if separator is None else options.unescape(separator),
        end_of_document=_token_id(end_of_document),
        max_document=parse_size("--max-document", max_document),
    )
    chosen = ChunkOptions(
        fields=fields, require_id=id_field is not None, format=format, encoding=encoding, part_size=part_size,
        keep_end=end_of_document == "none", workers=workers or os.cpu_count() or 1, exclude=tuple(exclude or ()),
        duplicates=duplicates, existing=existing, allow_purged=allow_purged,
        max_bad=max_bad, exact_tokenizer=exact_tokenizer, wait=not no_wait, note=output.note,
    )  # fmt: skip
    given = list(inputs or ())
    if dry_run:
        estimate = chunk_estimate.estimate(store, given, tokenizer=tokenizer, chunk_length=chunk_length, options=chosen)
        output.show(estimate, as_json, estimate_text)
        return
    result = chunk_run.chunk(store, given, tokenizer=tokenizer, chunk_length=chunk_length, options=chosen)
    output.show(result, as_json, partial(chunk_text, store))
    if result.chunks and not result.stopped and not as_json:
        output.note(f"Next: {next_command(store, 'chunk')}")
    output.exit_if(result.rejected or result.stopped, EXIT_REJECTED)


def _token_id(text: str | None) -> int | None:
    try:
        return None if text in (None, "none") else int(text)
    except ValueError:
        raise UsageError(f"--end-of-document {text}: give a token id, or none") from None


def chunk_text(store: str, result: ChunkResult) -> str:
    """Render a result of ``chunk`` as text."""
    from retrotool.chunk.deduplicate import BY_ID

    lines = []
    if result.known_inputs:
        but = f", but for {output.count(result.known_rejected, 'rejected row')}" if result.known_rejected else ""
        lines.append(f"{output.count(result.known_inputs, 'input')} skipped: already in the store{but}.")
    if not result.documents:
        lines += [] if result.known_inputs and not result.parts else [f"No new documents (commit {result.commit})."]
    else:
        lines.append(
            f"{output.count(result.documents, 'document')}, {output.count(result.chunks, 'chunk')}, "
            f"{output.count(result.tokens, 'token')} in {output.count(result.parts, 'part')} (commit {result.commit})."
        )
    if result.compared:
        exact = f"; {output.count(result.exact, 'document')} by tokenizers alone" if result.exact else ""
        compared = output.count(result.compared, "document")
        lines.append(f"Tokenised by tokie; {compared} compared with tokenizers{exact}.")
    if result.hashed_ids:
        verb = "has" if result.hashed_ids == 1 else "have"
        lines.append(f"{output.count(result.hashed_ids, 'document')} {verb} no id: a hash of the text is used.")
    if result.duplicates:
        largest = sorted(result.duplicates_by_source.items(), key=lambda item: (-item[1], item[0]))[:3]
        where = ", ".join(f"{n:,} from {source}" for source, n in largest)
        pairs = [map(output.one_line, pair) for pair in result.duplicate_examples[:1]]
        example = "".join(f", such as {copy}, a copy of {original}" for copy, original in pairs)
        skipped = output.count(result.duplicates, "document")
        lines.append(f"{skipped} skipped: duplicate text{f' ({where})' if where else ''}{example}.")
    if result.unchanged:
        lines.append(f"{output.count(result.unchanged, 'document')} unchanged.")
    lines += _update_lines(store, result)
    if result.blocked:
        lines.append(f"{output.count(result.blocked, 'document')} skipped: purged before (--allow-purged adds them).")
    if result.keys_cut:
        lines.append(f"{output.count(result.keys_cut, 'key')} cut to one chunk.")
    repeats = [one for one in result.reasons if one.reason == BY_ID]
    lines += [f"{output.count(one.rows, 'document')} skipped: {one.reason} ({_place(one)})." for one in repeats]
    if result.rejected:
        reasons = [one for one in result.reasons if one.reason != BY_ID]
        lines.append(f"{output.count(result.rejected, 'row')} rejected:")
        lines.append(output.table([_row(reason) for reason in reasons[:10]]))
        if (more := len(reasons) - 10) > 0:
            lines.append(f"  and {output.count(more, 'other reason')}")
        if any("invalid UTF-8" in reason.reason for reason in result.reasons):
            lines.append("If a file has another encoding, chunk it alone and name that, such as --encoding latin-1.")
    if result.rejected or result.known_rejected:
        files = listed(result.quarantine[:3], len(result.quarantine))
        lines.append(f"Rejected rows are listed in {files} (Parquet).")
        lines.append("They are read again when their input has changed.")
    if result.stopped:
        lines.append(
            f"Stopped: {result.stopped}. What was read is kept. Repair the input and run the command again, or raise "
            "the limit, such as --max-bad 1000."
        )
    if result.damaged and not result.stopped:
        lines.append(
            f"The rest of {output.count(result.damaged, 'damaged input')} was not read; everything else was. "
            "After repairing it, run the same command again."
        )
    return "\n".join(lines)


def _update_lines(store: str, result: ChunkResult) -> list[str]:
    lines = []
    if result.differing:
        names = ", ".join(output.one_line(name) for name in result.differing_examples)
        lines.append(
            f"{output.count(result.differing, 'document')} skipped: the store has another text under the same id"
            f"{f' ({names})' if names else ''}. To replace the stored text, run the command again with "
            "--existing replace."
        )
    for name, what in (("replaced", "replaced by a new text"), ("removed", "removed: no longer in the input")):
        if n := getattr(result, name):
            lines.append(f"{output.count(n, 'document')} {what}.")
    for purge in result.purges:
        lines.append(f"The old documents are purged as {purge}. To erase them, or to have them back:")
        lines += [f"  {shlex.join(['retrotool', 'erase', store, purge])}"]
        lines += [f"  {shlex.join(['retrotool', 'undo', store, purge, '--reason', '...'])}"]
    if result.not_mirrored:
        lines.append(f"Nothing was removed of {', '.join(result.not_mirrored[:3])}.")
    return lines


def _row(one: RejectedReason) -> tuple[int, str, str]:
    is_missing = one.reason.startswith(("no column", "no field"))
    reason = f"{one.reason}: {one.excerpt}" if is_missing and one.excerpt else one.reason
    return one.rows, reason, _place(one)


def _place(one: RejectedReason) -> str:
    return f"first: {one.input}" + (f", line {one.line:,}" if one.line else "")


def estimate_text(estimate: Estimate) -> str:
    """Render an estimate as text."""
    from retrotool.engine.progress import duration

    known = f"; {estimate.known_inputs:,} more read before" if estimate.known_inputs else ""
    time = f"about {duration(estimate.seconds)} with {output.count(estimate.workers, 'worker')}"
    rows = [
        ("inputs", f"{estimate.inputs:,}, {output.size(estimate.input_bytes)}{known}"),
        ("documents", f"about {estimate.documents:,}"),
        ("tokens", f"about {estimate.tokens:,}"),
        ("chunks", f"about {estimate.chunks:,}, in {output.count(estimate.parts, 'part')}"),
        ("rejected", f"about {output.count(estimate.rejected, 'row')}"),
        ("on disk", f"about {output.size(estimate.bytes)}"),
        ("time", f"{time}: {estimate.megabytes_per_second:.0f} MB/s of text"),
    ]
    reasons = output.table([_row(reason) for reason in estimate.reasons[:10]])
    rejected = f"\nRejected in the sample:\n{reasons}" if reasons else ""
    sampled = f"{output.count(estimate.sampled_documents, 'document')}, {output.size(estimate.sampled_bytes)} of text"
    return f"{output.table(rows)}{rejected}\nFrom a sample of {sampled}. Nothing was changed."
