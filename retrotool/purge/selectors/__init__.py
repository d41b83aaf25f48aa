"""Selectors: patterns, terms, personal data, copies, evaluation text, nearness, labels, and lookups.

A selector that scans is a small frozen dataclass. ``selector.open(store)`` returns a matcher, which gets
blocks of whole documents (``TextBlock``), in any order and from several threads, and returns the matching
rows (``BlockHits``). ``scan`` reads the blocks, runs the matchers in parallel and stores what they find.
"""
