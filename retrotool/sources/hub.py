"""Files of a dataset on the Hugging Face Hub, for reading: the methods of a ``Storage`` that inputs need.

The Hub lists size and hash of each file. Private and gated datasets need the token of ``hf auth login`` or
``HF_TOKEN``; ``HF_ENDPOINT`` names another server. Cost: one request for 1,000 files of a listing, two for
each range. What the server refuses, or does not answer after some attempts, is a ``StorageError``.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from typing import Any
from urllib.parse import unquote

from huggingface_hub import HfApi, constants, hf_hub_url
from huggingface_hub.errors import EntryNotFoundError
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, http_backoff  # type: ignore[attr-defined]

from retrotool.errors import StorageError
from retrotool.store.storage import StoredStatus


class HubDataset:
    """The files of a revision of a dataset, at ``hf://datasets/ORG/NAME[@REVISION]``."""

    def __init__(self, place: str) -> None:
        self.place = place
        name, _, revision = place.removeprefix("hf://datasets/").partition("@")
        self._of: dict[str, Any] = {"repo_id": name, "repo_type": "dataset", "revision": unquote(revision) or None}

    def get_range(self, path: str, start: int, length: int) -> bytes:
        """Read ``length`` bytes of a file, fewer at its end."""
        headers = {"Range": f"bytes={start}-{start + length - 1}", **build_hf_headers()}
        with self._errors(path):
            url = hf_hub_url(filename=path, **self._of)
            answer = http_backoff("GET", url, headers=headers, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT)
            hf_raise_for_status(answer)
            if answer.status_code != 206 and (start or len(answer.content) > length):
                raise ValueError("the server sends whole files only")
            return bytes(answer.content)

    def stat(self, path: str) -> StoredStatus | None:
        """Return what is known about a file; None if it does not exist."""
        with self._errors(path):
            found = HfApi().get_paths_info(paths=[path], **self._of)
        return next((_status(one) for one in found if isinstance(one, RepoFile)), None)

    def list(self, prefix: str) -> Iterator[StoredStatus]:
        """Yield the files whose paths begin with ``prefix``."""
        folder = prefix.rpartition("/")[0]
        with self._errors(prefix), contextlib.suppress(EntryNotFoundError):
            for one in HfApi().list_repo_tree(path_in_repo=folder or None, recursive=True, **self._of):
                if isinstance(one, RepoFile) and one.path.startswith(prefix):
                    yield _status(one)

    @contextlib.contextmanager
    def _errors(self, path: str) -> Iterator[None]:
        place = f"{self.place}/{path}"
        try:
            yield
        except EntryNotFoundError:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), place) from None
        except Exception as error:  # of the Hub's library, or of the HTTP library below it
            lines = [line for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
            advice = "Check the name of the dataset, and your access to it: hf auth whoami."
            raise StorageError(f"{place}: {' '.join(lines[:2])[:500]}", advice) from error


def _status(one: RepoFile) -> StoredStatus:
    """Return what the Hub lists: the tag is a hash of the content, but not when the file was written."""
    return StoredStatus(one.path, one.size, 0.0, one.lfs.sha256 if one.lfs else one.blob_id)
