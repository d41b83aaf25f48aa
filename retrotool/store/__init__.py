"""The store: a directory of files written once, and a log that says which of them exist. All durability lives here.

The format is specified in ``docs/format.md``. The modules, from the bottom up: ``disk`` (file operations),
``paths`` (names), ``atomic`` (the door for files), ``identity``, ``runs`` (with their claims), ``log``, ``state``,
``store`` (open, refresh, read, commit), ``staging`` (finished tasks), ``clean``; then what the files hold: ``parts``,
``neighbour_tables``, ``tombstones``, ``blocked``; ``folding`` (finished tasks into commits), and ``verify`` over all.
"""
