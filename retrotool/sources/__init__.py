"""Reading input: files to documents, and what can't be read set aside with its place and the reason.

One module a format; ``finding`` finds inputs, ``files`` names their format, ``streams`` decompresses, ``read``
dispatches.
Every row of an input comes out exactly once, as a ``Document`` or as a ``SetAside``; a file that breaks off ends with
a ``SetAside`` for the rest. Memory is bounded by the longest document (``Fields.max_document``) and a few blocks.
"""

from retrotool.sources.files import WHOLE, InputFile, Slice
from retrotool.sources.finding import Survey, find_inputs, survey
from retrotool.sources.json_array import names_without
from retrotool.sources.read import check, check_fields, cut, read
from retrotool.sources.records import MAX_DOCUMENT_BYTES, Document, Fields, SetAside, excerpt, told

__all__ = [
    "MAX_DOCUMENT_BYTES",
    "WHOLE",
    "Document",
    "Fields",
    "InputFile",
    "SetAside",
    "Slice",
    "Survey",
    "check",
    "check_fields",
    "cut",
    "excerpt",
    "find_inputs",
    "names_without",
    "read",
    "survey",
    "told",
]
