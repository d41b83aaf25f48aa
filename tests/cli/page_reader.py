"""Read pages: their elements and texts, in order."""

from __future__ import annotations

from html.parser import HTMLParser


class Reader(HTMLParser):
    """The elements of a page with their texts, in the order of their ends, and all its tags; each must be closed."""

    VOID = ("meta", "br", "input", "img", "base", "link")

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.open: list[tuple[str, dict[str, str], list[str]]] = []
        self.parts: list[tuple[str, dict[str, str], str]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        about = {name: value or "" for name, value in attrs}
        self.tags.append((tag, about))
        if tag not in self.VOID:
            self.open.append((tag, about, []))

    def handle_endtag(self, tag: str) -> None:
        name, about, text = self.open.pop()
        assert name == tag, f"</{tag}> closes <{name}>"
        whole = "".join(text)
        if self.open:
            self.open[-1][2].append(whole)
        self.parts.append((tag, about, whole))

    def handle_data(self, data: str) -> None:
        self.open[-1][2].append(data) if self.open else None

    def of_class(self, name: str) -> list[str]:
        return [text for _, about, text in self.parts if name in about.get("class", "").split()]

    def of_tag(self, name: str) -> list[str]:
        return [text for tag, _, text in self.parts if tag == name]


def read(page: str) -> Reader:
    reader = Reader()
    reader.feed(page)
    reader.close()
    assert not reader.open
    return reader


def shown(text: str) -> str:
    """Text as a page shows it: what would move the cursor or turn the direction of text is an escape."""
    marks = (0x061C, 0x200E, 0x200F, *range(0x2028, 0x202F), *range(0x2066, 0x2070))
    hidden = [*range(0x20), *range(0x7F, 0xA0), *marks]
    escapes = {n: f"\\x{n:02x}" if n < 256 else f"\\u{n:04x}" for n in hidden if n not in (9, 10)}
    return text.replace("\r\n", "\n").translate(escapes)
