"""Finding chunks by what they hold: patterns, terms, personal data, copies, evaluation text, nearness, labels.

A selector is a small frozen dataclass that says what is looked for; ``selector.open(store)`` returns a matcher, which
is called with blocks of whole documents (``TextBlock``), in any order and from several threads at once, and returns the
rows that it means (``BlockHits``). ``scan`` reads the blocks, runs matchers side by side and keeps what was found.
"""
