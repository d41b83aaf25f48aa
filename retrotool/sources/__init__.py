"""Reading input: files to documents, and what can't be read rejected with its place and the reason.

One module a format; ``inputs`` finds them and names their format, ``streams`` decompresses, ``read`` dispatches.
Every row of an input comes out exactly once, as a ``Document`` or as a ``Rejected``; a file that breaks off ends with
a ``Rejected`` for the rest. Memory is bounded by the longest document (``Fields.max_document``) and a few blocks.
"""

from retrotool.sources.inputs import WHOLE as WHOLE
from retrotool.sources.inputs import InputFile as InputFile
from retrotool.sources.inputs import Slice as Slice
from retrotool.sources.inputs import find_inputs as find_inputs
from retrotool.sources.inputs import survey as survey
from retrotool.sources.read import check_fields as check_fields
from retrotool.sources.read import check_input as check_input
from retrotool.sources.read import cut_input as cut_input
from retrotool.sources.read import read_input as read_input
from retrotool.sources.records import Document as Document
from retrotool.sources.records import Fields as Fields
from retrotool.sources.records import Rejected as Rejected
from retrotool.sources.records import excerpt as excerpt
from retrotool.sources.records import reason_of as reason_of
