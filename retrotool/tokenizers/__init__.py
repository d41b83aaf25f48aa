"""Text to tokens and back: finding a tokenizer of any common kind, loading it, and tokenising fast and exactly.

``find_tokenizer`` turns a name or a file into the bytes of a ``tokenizer.json``, ``Tokenizer`` loads them, and
``FastTokenizer`` gives a ``Tokenizer``'s ids many times faster where that can be done without a difference.
"""

from retrotool.tokenizers.equivalence import Findings as Findings
from retrotool.tokenizers.fast import FastTokenizer as FastTokenizer
from retrotool.tokenizers.fast import TokensDiffer as TokensDiffer
from retrotool.tokenizers.fast import library_versions as library_versions
from retrotool.tokenizers.find import BUNDLED as BUNDLED
from retrotool.tokenizers.find import bundled_model as bundled_model
from retrotool.tokenizers.find import find_tokenizer as find_tokenizer
from retrotool.tokenizers.find import resolve_model as resolve_model
from retrotool.tokenizers.tokenizer import Tokenizer as Tokenizer
from retrotool.tokenizers.tokenizer import TokenizerFile as TokenizerFile
from retrotool.tokenizers.tokenizer import stored_tokenizer as stored_tokenizer
