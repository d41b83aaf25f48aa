"""Whether the tokens of two stores can be read together, or compared."""

from __future__ import annotations

from retrotool.errors import UsageError
from retrotool.store.store import Store


def check_compatible(one: Store, other: Store, consequence: str, advice: str, *, lengths: bool = True) -> None:
    """``UsageError`` unless two stores have one tokenizer and, with ``lengths``, chunks of one length.

    ``consequence`` says what can't be done then, and ``advice`` what to do.
    """
    ours, theirs = one.identity, other.identity
    if ours.tokenizer.sha256 != theirs.tokenizer.sha256:
        raise UsageError(
            f"{one.root} and {other.root} have different tokenizers, {ours.tokenizer.name} and "
            f"{theirs.tokenizer.name}: {consequence}",
            advice,
        )
    if lengths and ours.chunk_length != theirs.chunk_length:
        raise UsageError(
            f"{one.root} has chunks of {ours.chunk_length} tokens, {other.root} of {theirs.chunk_length}: "
            f"{consequence}",
            advice,
        )
