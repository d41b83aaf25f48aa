"""Finding chunks by what they hold: patterns, terms, personal data, copies, evaluation text, nearness, labels.

A selector is a small frozen dataclass, and says what is looked for; ``selector.open(store)`` gives a matcher, which
holds what has to be made ready once. A matcher is called with blocks of whole documents (``text.Block``), in any order
and from several threads at once, and gives the rows that it means (``base.Hits``). Who reads the blocks, runs matchers
side by side and keeps what was found is ``scan``.
"""
