"""Reading input: files to documents, and what can't be read set aside with its place and the reason.

One module a format; ``files`` finds inputs and names their format, ``read`` dispatches. Every row of an input comes
out exactly once, as a ``Document`` or as a ``SetAside``; a file that breaks off ends with a ``SetAside`` for the
rest. Memory is bounded by the longest line (``MAX_ROW_BYTES``) and, for Parquet, one batch of rows.
"""

from retrotool.sources.files import InputFile, find_inputs
from retrotool.sources.read import read
from retrotool.sources.records import MAX_ROW_BYTES, Document, Fields, SetAside

__all__ = ["MAX_ROW_BYTES", "Document", "Fields", "InputFile", "SetAside", "find_inputs", "read"]
