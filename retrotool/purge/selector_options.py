"""By what ``retrotool purge`` selects: its options, each a name for what Typer is told of it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

_BY = "What to purge (any of these; with --and what all of them mean)"

Ids = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="Chunk ids, one a line.", show_default=False, rich_help_panel=_BY),
]
Chunk = Annotated[
    list[int] | None,
    typer.Option(metavar="ID", help="A chunk id; may be repeated.", show_default=False, rich_help_panel=_BY),
]
Documents = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="Document ids, one a line.", show_default=False, rich_help_panel=_BY),
]
Document = Annotated[
    list[str] | None,
    typer.Option(metavar="ID", help="A document id; may be repeated.", show_default=False, rich_help_panel=_BY),
]
Where = Annotated[
    str | None,
    typer.Option(
        metavar="EXPR",
        help="Expression over document columns, such as \"source = 'x'\".",
        show_default=False,
        rich_help_panel=_BY,
    ),
]
Pattern = Annotated[
    str | None,
    typer.Option(
        metavar="RE",
        help="RE2 pattern over the text of documents: the chunks that a match touches.",
        show_default=False,
        rich_help_panel=_BY,
    ),
]
Patterns = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="RE2 patterns, one a line.", show_default=False, rich_help_panel=_BY),
]
Terms = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="Words and names, one a line, as whole words.",
        show_default=False,
        rich_help_panel=_BY,
    ),
]
Pii = Annotated[
    str | None,
    typer.Option(
        metavar="KINDS",
        help="Personal data: all, or some of email,phone,ip-address,iban,payment-card,key.",
        show_default=False,
        rich_help_panel=_BY,
    ),
]
NearDuplicatesOf = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="Copies of these chunks (ids, one a line), also shifted or changed a little.",
        show_default=False,
        rich_help_panel=_BY,
    ),
]
Contaminates = Annotated[
    Path | None,
    typer.Option(
        metavar="STORE",
        help="Documents like one of this evaluation store: 13-gram Jaccard of 0.8 or more.",
        show_default=False,
        rich_help_panel=_BY,
    ),
]
Duplicates = Annotated[
    bool, typer.Option("--duplicates", help="Chunks that repeat one before them.", rich_help_panel=_BY)
]
Like = Annotated[
    str | None,
    typer.Option(
        metavar="TEXT|FILE",
        help="Chunks near a text, or near any chunk of a file's, by their embeddings; with --within.",
        show_default=False,
        rich_help_panel=_BY,
    ),
]
Within = Annotated[
    float | None,
    typer.Option(
        metavar="DISTANCE",
        help="With --like: squared L2, the distance that search prints.",
        show_default=False,
        rich_help_panel=_BY,
    ),
]
Encoder = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="With --like: by which embeddings, if the store has several.",
        show_default=False,
        rich_help_panel=_BY,
    ),
]
Classifier = Annotated[
    str | None,
    typer.Option(
        metavar="MODEL",
        help="Chunks that a sequence classifier, a model directory, gives a label; with --label and --above.",
        show_default=False,
        rich_help_panel=_BY,
    ),
]
Label = Annotated[
    str | None,
    typer.Option(
        metavar="NAME", help="With --classifier: which of its labels.", show_default=False, rich_help_panel=_BY
    ),
]
Above = Annotated[
    float | None,
    typer.Option(
        metavar="SCORE",
        help="With --classifier: the label's score is this or more, up to 1.",
        show_default=False,
        rich_help_panel=_BY,
    ),
]
Every = Annotated[bool, typer.Option("--and", help="Only what all of these mean.", rich_help_panel=_BY)]
WholeDocuments = Annotated[
    bool,
    typer.Option("--whole-documents", help="All chunks of the documents that are touched.", rich_help_panel=_BY),
]
AllowLossy = Annotated[
    bool,
    typer.Option(
        "--allow-lossy", help="Look at text also where the tokenizer loses case or spacing.", rich_help_panel=_BY
    ),
]
