"""By what ``retrotool purge`` selects: its options, each a name for what Typer is told of it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from retrotool.cli.options import opt

_BY = "What to purge (any of these; with --and what all of them mean)"

Ids = Annotated[Path | None, opt("Chunk ids, one a line.", metavar="FILE", panel=_BY)]
Chunk = Annotated[list[int] | None, opt("A chunk id; may be repeated.", metavar="ID", panel=_BY)]
Documents = Annotated[Path | None, opt("Document ids, one a line.", metavar="FILE", panel=_BY)]
Document = Annotated[list[str] | None, opt("A document id; may be repeated.", metavar="ID", panel=_BY)]
Where = Annotated[
    str | None, opt("Expression over document columns, such as \"source = 'x'\".", metavar="EXPR", panel=_BY)
]
Pattern = Annotated[
    str | None, opt("RE2 pattern over the text of documents: the chunks that a match touches.", metavar="RE", panel=_BY)
]
Patterns = Annotated[Path | None, opt("RE2 patterns, one a line.", metavar="FILE", panel=_BY)]
Terms = Annotated[Path | None, opt("Words and names, one a line, as whole words.", metavar="FILE", panel=_BY)]
Pii = Annotated[
    str | None,
    opt("Personal data: all, or some of email,phone,ip-address,iban,payment-card,key.", metavar="KINDS", panel=_BY),
]
NearDuplicatesOf = Annotated[
    Path | None,
    opt("Copies of these chunks (ids, one a line), also shifted or changed a little.", metavar="FILE", panel=_BY),
]
Contaminates = Annotated[
    Path | None,
    opt("Documents like one of this evaluation store: 13-gram Jaccard of 0.8 or more.", metavar="STORE", panel=_BY),
]
Duplicates = Annotated[bool, opt("Chunks that repeat one before them.", "--duplicates", panel=_BY)]
Like = Annotated[
    str | None,
    opt(
        "Chunks near a text, or near any chunk of a file's, by their embeddings; with --within.",
        metavar="TEXT|FILE",
        panel=_BY,
    ),
]
Within = Annotated[
    float | None, opt("With --like: squared L2, the distance that search prints.", metavar="DISTANCE", panel=_BY)
]
Encoder = Annotated[
    str | None, opt("With --like: by which embeddings, if the store has several.", metavar="NAME", panel=_BY)
]
Classifier = Annotated[
    str | None,
    opt(
        "Chunks that a sequence classifier, a model directory, gives a label; with --label and --above.",
        metavar="MODEL",
        panel=_BY,
    ),
]
Label = Annotated[str | None, opt("With --classifier: which of its labels.", metavar="NAME", panel=_BY)]
Above = Annotated[
    float | None, opt("With --classifier: the label's score is this or more, up to 1.", metavar="SCORE", panel=_BY)
]
Every = Annotated[bool, opt("Only what all of these mean.", "--and", panel=_BY)]
WholeDocuments = Annotated[bool, opt("All chunks of the documents that are touched.", "--whole-documents", panel=_BY)]
AllowLossy = Annotated[
    bool, opt("Look at text also where the tokenizer loses case or spacing.", "--allow-lossy", panel=_BY)
]
