"""The receipt of a purge as a page to print: one look tells what was done and found, tables tell the rest."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from retrotool.cli import html

if TYPE_CHECKING:
    from retrotool.purge.proving import Receipt

_SHOWN_FILES, _SHOWN_HASHES = 200, 20
_STYLE = """
.verdict { border: 2px solid #3aa655; padding: 0.75rem 1rem; border-radius: 0.3rem; font-size: 1.1rem;
  color: var(--ink); }
.verdict.bad { border-color: #d64545; } .verdict.masked { border-color: #f28e2b; }
code { font-size: 0.85em; overflow-wrap: anywhere; }
@media print {
  body { margin: 0; max-width: none; font-size: 10pt; } h2 { break-after: avoid; } tr { break-inside: avoid; }
}
"""
STATES = {
    "erased": "Purged and erased",
    "partly erased": "Purged, and erased in part: an erase is not at its end, or another purge took some",
    "purged": "Purged, not erased: never returned, but its bytes are still in the files",
}
_KINDS = {
    "tokens": "runs of tokens", "text": "pieces of text", "vector16": "pieces of vectors (float16)",
    "vector32": "pieces of vectors (float32)", "key": "document keys", "id": "document ids",
    "chunk": "ids in index lists",
}  # fmt: skip


def page(receipt: Receipt, sha256: str, commit: int | None) -> str:
    """The page of a receipt; ``sha256`` is that of its JSON, which ``commit`` of the store's log names."""
    title = f"Receipt of purge {receipt.purge}"
    return html.head(title, style=_STYLE) + "\n".join(_sections(receipt, sha256, commit)) + html.foot()


def _sections(receipt: Receipt, sha256: str, commit: int | None) -> Iterator[str]:
    yield _verdict(receipt)
    yield html.table((), _facts(receipt))
    if receipt.unread:
        yield f"<p>Not looked at, as what they are of is not there: {html.text(', '.join(receipt.unread))}.</p>"
    yield "<h2>What was looked at</h2>"
    yield html.table(
        ("by", "rows", "purged chunks found", ""),
        [(view.name, f"{view.rows:,}", f"{view.found:,}", view.note) for view in receipt.views], numbers=(1, 2),
    )  # fmt: skip
    yield from _search(receipt)
    if receipt.files:
        yield "<h2>Files that were replaced</h2>"
        yield html.table(
            ("commit", "before", "SHA-256", "after", "SHA-256"),
            [
                (str(file.commit), file.before, file.before_sha256, file.after or "none", file.after_sha256)
                for file in receipt.files[:_SHOWN_FILES]
            ],
            numbers=(0,),
        )
        yield _more(len(receipt.files), _SHOWN_FILES, "files")
    if receipt.salted_chunks:
        yield "<h2>Hashes of what was erased</h2>"
        yield (
            "<p>BLAKE2b-128 of the tokens of each chunk, keyed with a salt that is in a file of its own. Whoever has "
            "that, and a text, can see whether it was among it.</p>"
        )
        yield html.table((), [(one,) for one in receipt.salted_chunks[:_SHOWN_HASHES]])
        yield _more(len(receipt.salted_chunks), _SHOWN_HASHES, "hashes")
    yield "<h2>What this does not say</h2><ul>"
    yield from (f"<li>{html.text(limit)}</li>" for limit in receipt.limits)
    if receipt.elsewhere:
        where = ", ".join(receipt.elsewhere)
        yield f"<li>Other stores have neighbours in this one, and were not looked through: {html.text(where)}</li>"
    yield "</ul><h2>Whether this is genuine</h2>"
    named = (
        f"commit {commit} of the store's log names it" if commit is not None else "the store could not be written to"
    )
    yield (
        f"<p>SHA-256 of the receipt's JSON: <code>{sha256}</code>; {named}. The log: "
        f"<code>retrotool verify STORE --log --head {receipt.log_head}</code></p>"
    )


def _verdict(receipt: Receipt) -> str:
    said = STATES[receipt.state]
    kind = "" if receipt.state == "erased" else " masked"
    if receipt.ok:
        return f'<p class="verdict{kind}"><b>{said}.</b> {html.text(verdict(receipt))}</p>'
    listed = "".join(f"<li>{html.text(problem)}</li>" for problem in receipt.problems)
    return f'<div class="verdict bad"><b>{said}. NOT well:</b><ul>{listed}</ul></div>'


def _count(n: int, what: str) -> str:
    return f"{n:,} {what}" if n == 1 else f"{n:,} {what}s"


def verdict(receipt: Receipt) -> str:
    """What was found if all is well, and what could not be looked at or for."""
    said = ["Nothing of it was found." if receipt.state == "erased" else "No command returns any of it."]
    if receipt.unread:
        said.append(f"{_count(len(receipt.unread), 'way')} to read it could not be gone.")
    searched = receipt.searched
    if searched is not None:
        few = ((searched.without.get("tokens", 0), "tokens"), (searched.without.get("text", 0), "text"))
        told = [f"the {what} of {n:,}" for n, what in few if n]
        if told:
            said.append(
                f"Of its {_count(receipt.chunks, 'chunk')} nothing could be looked for by {' and by '.join(told)}: too "
                "short, or said by others, too."
            )
        if searched.passed_over:
            said.append(f"{searched.passed_over:,} chunks were passed over, evenly, as there are so many.")
    return " ".join(said)


def _facts(receipt: Receipt) -> list[tuple[str, str]]:
    erased = f"{receipt.erased}, commit {receipt.erased_by}" if receipt.erased else "not yet"
    whole = "whole" if receipt.log_whole else "NOT whole"
    return [
        ("store", receipt.store),
        ("why", receipt.reason),
        ("who", receipt.who),
        ("selected by", f"{receipt.selector}; keyed hash {receipt.selector_hash}"),
        ("what", _count(receipt.chunks, "chunk")),
        (
            "of them not purged before",
            ", ".join(
                _count(n, what)
                for n, what in (
                    (receipt.living, "chunk"),
                    (receipt.documents, "whole document"),
                    (receipt.tokens, "token"),
                )
            ),
        ),
        ("copies among them", f"{receipt.copies:,}"),
        ("purged", f"{receipt.purged}, commit {receipt.purged_by}"),
        ("erased", erased),
        ("looked for", f"{receipt.verified}, at commit {receipt.log_commit}, {receipt.tool}"),
        ("log", f"{whole}; head {receipt.log_head}"),
    ]


def _search(receipt: Receipt) -> Iterator[str]:
    searched = receipt.searched
    if searched is None:
        return
    yield "<h2>What was looked for in every byte</h2>"
    yield f"<p>{searched.files:,} files, {searched.bytes:,} bytes, as they are and as what they stand for.</p>"
    kinds = [kind for kind in _KINDS if kind in searched.needles or kind == "chunk"]
    left = {kind: sum(trace.pieces for trace in searched.left if trace.kind == kind) for kind in kinds}
    yield html.table(
        ("", "looked for", "chunks or documents without any", "found"),
        [
            (_KINDS[kind], f"{searched.needles.get(kind, receipt.chunks):,}", f"{searched.without.get(kind, 0):,}",
             f"{left[kind]:,}")
            for kind in kinds
        ],
        numbers=(1, 2, 3),
    )  # fmt: skip
    if searched.said_by_others:
        yield f"<p>{searched.said_by_others:,} pieces are also said by documents that stay: they are theirs.</p>"


def _more(n: int, shown: int, what: str) -> str:
    return f"<p>{n - shown:,} more {what} are in the JSON.</p>" if n > shown else ""
