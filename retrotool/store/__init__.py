"""The store: files that are written once, and a log that says which of them exist. All durability lives here.

The format is specified in ``docs/format.md``. The modules, from the bottom up: ``paths`` (names), ``storage`` (where
the files are; the one way to read and write them), ``local_storage`` on ``disk`` (in a folder), ``schema`` and
``specs`` (what the log may say), ``sums``, ``identity``, ``log``, ``leases`` (who is writing), ``state``, ``store``
(open, refresh, read, commit), ``staging`` (finished tasks), ``gc``; then what the files hold: ``parts``, ``vectors``,
``neighbour_tables``, ``tombstones``, ``blocked``; ``folding`` (finished tasks into commits), and ``verify_log``.
"""
