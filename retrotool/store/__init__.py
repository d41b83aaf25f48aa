"""The store: a directory of files written once, and a log that says which of them exist. All durability lives here.

The format is specified in ``docs/format.md``. The modules, from the bottom up: ``disk`` (file operations),
``paths`` (names), ``atomic`` (the door for files), ``identity``, ``runs``, ``log``, ``state``, ``store`` (open,
refresh, commit), ``staging`` (finished tasks, folded into commits), ``clean``; then what the files hold: ``parts``,
``vectors``, ``tables``, ``tombstones``, ``digest``, and ``verify`` over all of it.
"""
