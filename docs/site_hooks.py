r"""Hooks of mkdocs: what GitHub renders otherwise.

* Links to files outside docs/ become text.
* ``\|`` in the code of a table row becomes ``|``.
"""

from __future__ import annotations

import posixpath
import re
from typing import Any

_LINK = re.compile(r"\[([^\]]+)\]\((\.\./[^)]+)\)")
_ROW = re.compile(r"^\|.*$", re.MULTILINE)
_CODE = re.compile(r"`[^`\n]+`")


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Return the Markdown of a page as mkdocs is to render it."""
    folder = posixpath.dirname(page.file.src_uri)

    def without_outside(link: re.Match[str]) -> str:
        outside = posixpath.normpath(posixpath.join(folder, link[2])).startswith("..")
        return link[1] if outside else link[0]

    def with_plain_bars(row: re.Match[str]) -> str:
        return _CODE.sub(lambda code: code[0].replace(r"\|", "|"), row[0])

    return _ROW.sub(with_plain_bars, _LINK.sub(without_outside, markdown))
