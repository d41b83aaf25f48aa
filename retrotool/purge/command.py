"""``retrotool purge``: which of the things that it can do its options mean."""

from __future__ import annotations

import re
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from retrotool.cli import output
from retrotool.cli.options import Device, Json, StoreArgument, arg, opt, parse_shard
from retrotool.errors import UsageError
from retrotool.purge import purge_text

if TYPE_CHECKING:
    from retrotool.purge.erase import EraseResult
    from retrotool.purge.run import PurgeResult

EPILOG = """\b
Examples:
  retrotool purge store --documents takedown.txt --reason "request 17" --dry-run
  retrotool purge store --documents takedown.txt --reason "request 17" --erase --yes
  retrotool purge store --where "source = 'forum' and year < 2020" --reason "licence" --yes
  retrotool purge store --like "how to pick a lock" --within 0.9 --reason "policy 3" --dry-run
  retrotool purge store --affected main --out affected.jsonl
  retrotool purge store --older-than 7d --erase --yes
  retrotool purge store p1a2b3c4d --verify"""

ASK_ABOVE = 0.01
_by = partial(opt, panel="What to purge (any of these; with --and what all of them mean)")
_HELP = "See: retrotool purge --help"
_ALONE = {
    "--verify": ("PURGE", "--out"),
    "--undo": ("PURGE", "--reason", "--who"),
    "--affected": ("PURGE", "--out"),
    "--shard": ("selectors", "--reason", "--who", "--dry-run"),
}
"""What each of the things that go with no other may be given besides."""
_EARLIER = "PURGE and --older-than name purges that were made before, which can be erased with --erase alone"


def command(
    context: typer.Context,
    store: StoreArgument,
    purges: Annotated[
        list[str] | None,
        arg("With --erase, --undo, --verify or --affected: purges that were made before.", metavar="[PURGE]..."),
    ] = None,
    reason: Annotated[
        str | None, opt("Why. Stays in the log for ever, so it must name no person.", metavar="TEXT")
    ] = None,
    ids: Annotated[Path | None, _by("Chunk ids, one a line.", metavar="FILE")] = None,
    chunk: Annotated[list[int] | None, _by("A chunk id; may be repeated.", metavar="ID")] = None,
    documents: Annotated[Path | None, _by("Document ids, one a line.", metavar="FILE")] = None,
    document: Annotated[list[str] | None, _by("A document id; may be repeated.", metavar="ID")] = None,
    where: Annotated[
        str | None, _by("Expression over document columns, such as \"source = 'x'\".", metavar="EXPR")
    ] = None,
    pattern: Annotated[
        str | None, _by("RE2 pattern over the text of documents: the chunks that a match touches.", metavar="RE")
    ] = None,
    patterns: Annotated[Path | None, _by("RE2 patterns, one a line.", metavar="FILE")] = None,
    terms: Annotated[Path | None, _by("Words and names, one a line, as whole words.", metavar="FILE")] = None,
    pii: Annotated[
        str | None, _by("Personal data: all, or some of email,phone,ip-address,iban,payment-card,key.", metavar="KINDS")
    ] = None,
    near_duplicates_of: Annotated[
        Path | None, _by("Copies of these chunks (ids, one a line), also shifted or changed a little.", metavar="FILE")
    ] = None,
    contaminates: Annotated[
        Path | None,
        _by("Documents like one of this evaluation store: 13-gram Jaccard of 0.8 or more.", metavar="STORE"),
    ] = None,
    duplicates: Annotated[bool, _by("Chunks that repeat one before them.", "--duplicates")] = False,
    like: Annotated[
        str | None,
        _by(
            "Chunks near a text, or near any chunk of a file's, by their embeddings; with --within.",
            metavar="TEXT|FILE",
        ),
    ] = None,
    within: Annotated[
        float | None, _by("With --like: squared L2, the distance that search prints.", metavar="DISTANCE")
    ] = None,
    encoder: Annotated[
        str | None, _by("With --like: by which embeddings, if the store has several.", metavar="NAME")
    ] = None,
    classifier: Annotated[
        str | None,
        _by(
            "Chunks that a sequence classifier, a model directory, gives a label; with --label and --above.",
            metavar="MODEL",
        ),
    ] = None,
    label: Annotated[str | None, _by("With --classifier: which of its labels.", metavar="NAME")] = None,
    above: Annotated[
        float | None, _by("With --classifier: the label's score is this or more, up to 1.", metavar="SCORE")
    ] = None,
    every: Annotated[bool, _by("Only what all of these mean.", "--and")] = False,
    whole_documents: Annotated[bool, _by("All chunks of the documents that are touched.", "--whole-documents")] = False,
    allow_lossy: Annotated[
        bool, _by("Look at text also where the tokenizer loses case or spacing.", "--allow-lossy")
    ] = False,
    device: Device = "auto",
    shard: Annotated[
        str | None,
        opt(
            "This is job I of N, from 0: scan that share of the parts for the selectors, and purge nothing.",
            metavar="I/N",
        ),
    ] = None,
    who: Annotated[str | None, opt("Who purges, for the log. Default: the user.", metavar="NAME")] = None,
    dry_run: Annotated[bool, opt("Show what would be purged, and purge nothing.", "--dry-run")] = False,
    yes: Annotated[bool, opt("Do not ask above 1 % of the store.", "--yes")] = False,
    erase: Annotated[
        bool, opt("Rewrite the files that hold what is purged, or PURGE... Can't be undone.", "--erase")
    ] = False,
    older_than: Annotated[
        str | None, opt("With --erase: all purges that are older, such as 7d or 12h.", metavar="AGE")
    ] = None,
    retrain_index: Annotated[
        bool, opt("With --erase: then train all indexes anew, without what was erased.", "--retrain-index")
    ] = False,
    undo: Annotated[bool, opt("Take PURGE back, as long as it is not erased.", "--undo")] = False,
    affected: Annotated[
        str | None,
        opt(
            "Tell which chunks with neighbours NAME had chunks of PURGE... among them. Default: of all purges.",
            metavar="NAME",
        ),
    ] = None,
    verify: Annotated[
        bool, opt("Check that nothing of PURGE is left, and write a receipt: JSON, and a page.", "--verify")
    ] = False,
    out: Annotated[
        Path | None,
        opt(
            (
                "With --dry-run: a file for the ids of the chunks. With --verify: the folder of the receipt. "
                "Default: this one. With --affected: a file for all of them, as JSON lines."
            ),
            metavar="PATH",
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Take chunks out: never returned again from the moment this ends.

    Purged chunks are left out of search, neighbours (also those computed before) and continuations. With --erase
    their text, tokens and vectors are rewritten away; bare chunk ids remain. With --verify this is checked.
    """
    with output.errors(as_json):
        from retrotool.purge import affected as find_affected
        from retrotool.purge import run as purge_run
        from retrotool.purge.erase import erase as erase_purges
        from retrotool.purge.erase import retrain_indexes
        from retrotool.purge.select import Selectors, kinds_of
        from retrotool.purge.undo import undo as undo_purge

        selectors = Selectors(
            ids=ids, chunk=tuple(chunk or ()), documents=documents, document=tuple(document or ()), where=where,
            pattern=pattern, patterns=patterns, terms=terms, pii=kinds_of(pii),
            near_duplicates_of=near_duplicates_of, contaminates=contaminates, duplicates=duplicates, every=every,
            whole_documents=whole_documents, allow_lossy=allow_lossy, like=like, within=within, encoder=encoder,
            classifier=classifier, label=label, above=above, device=device,
        )  # fmt: skip
        given = {
            "--verify": verify, "--undo": undo, "--affected": affected is not None,
            "--shard": shard is not None, "--reason": reason is not None, "--who": who is not None,
            "--dry-run": dry_run, "--erase": erase,
            "--older-than": older_than is not None, "--retrain-index": retrain_index, "--out": out is not None,
            "selectors": selectors != Selectors(), "PURGE": bool(purges),
        }  # fmt: skip
        _check(given)
        named = list(purges or [])
        if (verify or undo) and len(named) != 1:
            raise UsageError(f"{'--verify' if verify else '--undo'} takes one PURGE", _HELP)
        if verify:
            _write_receipt(context, store=store, purge=named[0], out=out or Path(), as_json=as_json)
        elif undo:
            undone = undo_purge(store, named[0], reason=_given(reason), who=who)
            output.show(undone, as_json, purge_text.undone)
        elif affected is not None:
            found = find_affected.affected(store, affected, named, out=out)
            output.show(found, as_json, purge_text.affected_text)
        elif shard is not None:
            output.show(purge_run.scan(store, selectors, parse_shard(shard) or (0, 1)), as_json, purge_text.scanned)
        else:
            confirm = partial(_confirmed, yes=yes, erase=erase, as_json=as_json)
            if named or older_than is not None:
                age = None if older_than is None else _seconds(older_than)
                agreed = partial(confirm, said="Nothing was erased.")
                erased = erase_purges(store, named, older_than=age, confirm=agreed)
                done = bool(erased.purges)
                output.show(erased, as_json, lambda result: purge_text.erased(store, result))
            else:
                result = purge_run.purge(
                    store, selectors, reason=_given(reason), who=who, dry_run=dry_run, out=out, erase=erase,
                    confirm=partial(confirm, said="Nothing was purged."),
                )  # fmt: skip
                done = not dry_run
                output.show(result, as_json, lambda result: purge_text.purged(store, result, erase))
            if retrain_index and done:
                for sentence in retrain_indexes(store):
                    output.note(sentence)


def _write_receipt(context: typer.Context, **arguments: object) -> None:
    """Run the command ``receipt``, which is above this one: it reads a store in every way that a command does."""
    assert context.parent is not None, "the group of all commands"
    group: Any = context.parent.command
    group.get_command(context, "receipt").callback(**arguments)


def _check(given: dict[str, bool]) -> None:
    """``UsageError`` for options that do not go together."""
    for option, others in _ALONE.items():
        if given[option]:
            wrong = [name for name, is_given in given.items() if is_given and name not in (option, *others)]
            if wrong:
                with_what = f"goes with {', '.join(others)} and --json"
                raise UsageError(f"{option} {with_what}, not with {', '.join(wrong)}", _HELP)
            return
    if given["--older-than"] or given["PURGE"]:
        wrong = [name for name in ("selectors", "--dry-run") if given[name]]
        if wrong or not given["--erase"]:
            raise UsageError(_EARLIER, _HELP)
    for option, others in (("--out", ("--dry-run", "--verify", "--affected")), ("--retrain-index", ("--erase",))):
        if given[option] and not any(given[other] for other in others):
            raise UsageError(f"{option} goes with {' or '.join(others)}", _HELP)


def _confirmed(planned: PurgeResult | EraseResult, *, yes: bool, erase: bool, said: str, as_json: bool) -> bool:
    """Ask before much is purged or erased; a no ends the command with what is ``said``."""
    much = max(getattr(planned, "share", 0.0), planned.unerased_share) > ASK_ABOVE
    if much and not yes and not purge_text.agrees(purge_text.warning(planned, erase)):
        output.stop(said, as_json)
    return True


def _given(reason: str | None) -> str:
    if reason is None:
        raise UsageError("--reason is missing", "Say why, in words that name no person: it stays in the log.")
    return reason


def _seconds(age: str) -> float:
    units = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800}
    if re.fullmatch(r"[0-9]+[smhdw]", age) is None:
        raise UsageError(f"--older-than {age!a} is no age", "Give for example 7d, 12h or 2w.")
    seconds = float(age[:-1]) * units[age[-1]]
    if seconds > time.time():
        raise UsageError(f"--older-than {age[:40]}: no purge is older than 1970", "Give for example 7d, 12h or 2w.")
    return seconds
