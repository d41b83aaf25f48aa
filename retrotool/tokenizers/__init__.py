"""Text to tokens and back: finding a tokenizer of any common kind, loading it, and tokenising fast and exactly.

``find_tokenizer`` turns a name or a file into the bytes of a ``tokenizer.json``, ``Tokenizer`` loads them, and
``FastTokenizer`` gives a ``Tokenizer``'s ids many times faster where that can be done without a difference.
"""

from retrotool.tokenizers.equivalence import Findings
from retrotool.tokenizers.fast import FastTokenizer, TokensDiffer, library_versions
from retrotool.tokenizers.find import BUNDLED, bundled_model, find_tokenizer, resolve_model
from retrotool.tokenizers.tokenizer import Tokenizer, TokenizerFile, stored_tokenizer

__all__ = [
    "BUNDLED",
    "FastTokenizer",
    "Findings",
    "Tokenizer",
    "TokenizerFile",
    "TokensDiffer",
    "bundled_model",
    "find_tokenizer",
    "library_versions",
    "resolve_model",
    "stored_tokenizer",
]
