"""Read input files as documents; reject what can't be read, with its place and the reason.

There is one module per format; ``finding`` finds files, ``inputs`` opens them, ``streams`` decompresses,
``read`` dispatches. Every
row comes out exactly once, as a ``Document`` or as a ``Rejected``; a damaged file ends with a ``Rejected``
for the rest. Memory is bounded by the longest document (``Fields.max_document``) and a few blocks.
"""

from retrotool.sources.finding import find_inputs, is_excluded, survey
from retrotool.sources.heads import check_heads
from retrotool.sources.inputs import WHOLE, InputFile, Slice, base_of, encoding_of
from retrotool.sources.read import check_input, cut_input, read_input
from retrotool.sources.records import Document, Fields, Rejected, excerpt, reason_of

__all__ = [
    "WHOLE", "Document", "Fields", "InputFile", "Rejected", "Slice", "base_of", "check_heads", "check_input",
    "cut_input", "encoding_of", "excerpt", "find_inputs", "is_excluded", "read_input", "reason_of", "survey",
]  # fmt: skip
