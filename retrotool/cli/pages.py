"""Write HTML pages from the Jinja2 templates in ``templates/``.

A page is one file that loads nothing else. Templates extend ``base.html``, which has the head, the common
style and a policy that allows only the template's own script (block ``script``).

Texts of documents are hostile: every value that a template prints is escaped, also control characters and
those that change the text direction, as in a terminal. Templates quote attributes and never use ``safe``.
"""

from __future__ import annotations

import base64
import hashlib
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

from retrotool.cli import output
from retrotool.cli.result_files import written
from retrotool.store.parts import format_id


def write_page(file: str | Path, template: str, **context: object) -> None:
    """Write a template's HTML to ``file``, which is unchanged after an error.

    Values of ``context`` may be iterators: the page is written piece by piece and not held in memory.
    ``StorageError`` if it can't be written; ``jinja2.UndefinedError`` for a name missing in ``context``.
    """
    with written(file) as scratch:
        _TEMPLATES.get_template(template).stream(context).dump(str(scratch), "utf-8", "backslashreplace")


def _visible(value: object) -> object:
    return value if hasattr(value, "__html__") else output.visible(str(value).replace("\r\n", "\n"))


def _sha256(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


_TEMPLATES = Environment(
    loader=PackageLoader("retrotool.cli"), autoescape=True, finalize=_visible, undefined=StrictUndefined,
    trim_blocks=True, lstrip_blocks=True,
)  # fmt: skip
_TEMPLATES.filters.update(counted=output.count, sha256=_sha256, thousands="{:,}".format, chunk=format_id)
