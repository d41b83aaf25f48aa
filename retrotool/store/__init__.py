"""The store: files that are written once, and a log that says which of them exist. All durability is here.

``docs/format.md`` specifies the format. Modules, from the bottom up: ``paths``, ``storage`` (the only access
to files), ``local_storage`` and ``disk`` (folders), ``schema`` and ``specs`` (valid JSON), ``sums``,
``identity``, ``log``, ``leases`` (who is writing), ``state``, ``store`` (open, refresh, read, commit),
``staging`` (finished tasks), ``gc``; then the contents of files: ``parts``, ``vectors``,
``neighbour_tables``, ``tombstones``, ``blocked``; ``folding`` (commits finished tasks) and ``verify_log``.
"""
