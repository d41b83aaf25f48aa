"""Convert text to tokens and back: find and load tokenizers of all common kinds, tokenise fast and exactly.

``find_tokenizer`` gets a ``tokenizer.json`` for a name or a file, ``Tokenizer`` loads it, and
``FastTokenizer`` gives the same ids many times faster where that is possible.
"""

from retrotool.tokenizers.equivalence import Findings
from retrotool.tokenizers.fast import FastTokenizer, TokensDiffer, library_versions
from retrotool.tokenizers.find import BUNDLED, DEFAULT_TOKENIZER, bundled_model, find_tokenizer, resolve_model
from retrotool.tokenizers.tokenizer import Tokenizer, TokenizerFile, stored_tokenizer

__all__ = [
    "BUNDLED", "DEFAULT_TOKENIZER", "FastTokenizer", "Findings", "Tokenizer", "TokenizerFile", "TokensDiffer",
    "bundled_model", "find_tokenizer", "library_versions", "resolve_model", "stored_tokenizer",
]  # fmt: skip
