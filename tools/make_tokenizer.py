"""Train the tokenizer that is in the package, from documentation in Debian packages.

    python tools/make_tokenizer.py [FILE] [--debs FOLDER]    (or: make tokenizer)

1. Get the packages in ``SOURCES`` by ``apt-get download``, unless FOLDER has them, and check their SHA-256.
2. Take their text: web pages and manual pages without markup, dictionaries, sayings, source code. A paragraph
   that occurs again is left out, so that texts that were not translated do not count many times.
3. Train a byte-level BPE of 32,768 tokens, and write it as a ``tokenizer.json``.

The same packages and the same version of ``tokenizers`` give the same bytes, in about five minutes. Needs
Debian or Ubuntu for ``apt-get`` and ``dpkg-deb``. docs/tokenizer.md describes the result.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import html.parser
import io
import re
import subprocess
import sys
import tarfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePath

import orjson
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from retrotool.tokenizers.cut import LLAMA_3_PATTERN

TOKENS = 32_768
END_OF_TEXT = "<|endoftext|>"
OUTPUT = Path(__file__).parent.parent / "retrotool/tokenizers/bytes-32k.json"


@dataclass(frozen=True, slots=True)
class Source:
    """A Debian package, of which one paragraph in ``every`` is used."""

    package: str
    version: str
    sha256: str
    every: int = 1

    @property
    def file(self) -> str:
        """The name that ``apt-get download`` gives the package."""
        return f"{self.package}_{self.version.replace(':', '%3a')}_all.deb"


SOURCES = (
    Source("fortunes", "1:1.99.1-9", "04be8b7331d90a23ade12a6d377ae505b66399404d8a6b7403d596829c386f4f"),
    Source("anarchism", "15.3-4", "fc5f82ba6223bfdbcdee662980e5c1ec6fe6cd4f7aa60a0d08da2fcd61ecf178", every=2),
    Source("debian-history", "13.7", "136517f8c065931934d8fa1a1f09d23baafb2cd996c28a98445e073d7905ded4"),
    Source("dict-wn", "1:3.0-39", "bb4f2b19b6130443c432ccb3eb44d4888d440aae6f8b5ac5d196c13ae66207b2", every=2),
    Source("dict-foldoc", "20250211-1", "136ba51701058a645d9d96a268b4f5646335555649c04b68ac4a17324a54afd3"),
    Source("dict-jargon", "4.4.7-3.1", "405f8168d7994ed2cb71407bb95493daec2e9aa66fc0461dafa74a9d6728a8c1"),
    Source("developers-reference", "13.20", "fec366e4b20ea0a74e9990340047c5d5e71d51aa2884ce62e17e59e7ad728015"),
    Source("manpages", "6.9.1-1", "91b7df0b4bd4e1a3b8ba5b229abd844e03f4c82c45ccb8c964a035190c29a501"),
    Source("manpages-dev", "6.9.1-1", "9de42b48394935236a31385e4bae816911cd20dc3f20250531964aec44082f63"),
    Source("gnome-user-docs", "48.2-1", "94202c324aa65e87820ed0cec8872c1bbe81cfd6f238b8d62ce55a79d8cb6b82"),
    Source("fortunes-de", "0.37-1", "aac1b262aad410f81f0816133808768c19fbc544e4aa388a8ccb342cfde7300a"),
    Source("fortunes-es", "1.36+nmu1", "bd20b97d5c4b93a76642eb46fc7c49808d8688782be6cc85b3939b992bbadea8"),
    Source("fortunes-pl", "0.0.20130525-3", "39602aece2081a67c9e95ff7f6e8b0b8fc2cce971e920a31d04133d4ac007ad0"),
    Source("fortunes-ru", "1.52-4", "518433e28716ef006d5ef8c19b9ac366a0ee5fafbede6c322bff080bb824a1ef"),
    Source("fortunes-zh", "2.98.1", "5b95ec6ebe50df05c1bfea5f9a4cd073325a3279e67dd90567a84118fe8c5ba1"),
    Source("debian-reference-de", "2.127", "7fa66b6e77800d7eceefa9b7f8fd9b498f3b4dd42824216dfc6a7530df783a11"),
    Source("debian-reference-ja", "2.127", "1a9c446948642de006d86a5d0026bb67201c037b8fc9e356cf660247625eaca8"),
    Source("debian-reference-zh-cn", "2.127", "f47fb957b559c9b693a2ce70005b3d597baa03d703a2e98da511a4fe95b3e0fb"),
    Source("manpages-de", "4.27.0-1", "82b0674a475ff39c7a366121f5823ff842300ecdeb596ad467787459cc539845", every=3),
    Source("manpages-es", "4.27.0-1", "feecf5e9105f612faeddff1df07459ee94da7e1ad9e51380dedf508487a17de5"),
    Source("manpages-fr", "4.27.0-1", "20a563c41d9483796260870634bb2a07b271026b99b888db87ea0ae0a99a63e5", every=2),
    Source(
        "manpages-ja", "0.5.0.0.20221215+dfsg-1", "4d270e9a1e83be4de0c072a110892a17dc9caa4b501257324006ac28d82c5743"
    ),
    Source("manpages-ru", "4.27.0-1", "8e86695991e187a1e08332fd2fcfea5d25390439e8020171987db77f35b3f1b6"),
    Source("manpages-zh", "1.6.4.3-1", "12ea83950d4d25c6fe56d9f9cb736a360d84efc2d2ed451cc20e708340c5807d", every=2),
    Source("python3-sympy", "1.13.3-5", "62fef103cd6b536e1c49808f0a6ac2aeb2c951e355cec3d461425ae1551d5f8b", every=3),
    Source(
        "golang-golang-x-tools-dev", "1:0.25.0+ds-1", "49384bac398e7439af7bfacdf5c34efc8fbc9654eca2107dc2eee759ba512eee"
    ),
    Source("libeigen3-dev", "3.4.0-5", "123ff96e6929713b852f58a53727379149fc4a2b682bd04605e784f6620ac08e", every=2),
    Source("x11proto-dev", "2024.1-1", "6a6764500eb8171d3cd6d793c09902974f8ea87bd20c68d9eac5f1eeaf3fc407"),
    Source(
        "node-lodash",
        "4.17.21+dfsg+~cs8.31.198.20210220-9+deb13u1",
        "7ccc3bacec8feea01f4b311d7bb000bd3e065e69c7697deece64dba85b7178f2",
        every=2,
    ),
    Source("libjs-three", "111+dfsg1-3", "1d04680b4ed560b851c63e7691ffe3a37307ad0858ea4e50e92b6147e575df84", every=2),
)
_CODE = {".py", ".go", ".h", ".c", ".cpp", ".js", ".ts"}
_BLOCKS = {
    "p",
    "div",
    "li",
    "tr",
    "h1",
    "h2",
    "h3",
    "h4",
    "h5",
    "h6",
    "pre",
    "br",
    "dt",
    "dd",
    "table",
    "title",
    "item",
}
_DROPPED = {"script", "style", "head", "nav", "info"}
_ROFF = re.compile(r"^[.'](?:\\\"|so |TH|de|ds|if|ie|el).*\n|^\.[A-Z]{1,2}\s*|\\f[BIRP]|\\&|\\f\([A-Z]+", re.MULTILINE)


class PageText(html.parser.HTMLParser):
    """Collects the text of a page of HTML or Mallard."""

    def __init__(self) -> None:
        super().__init__()
        self.pieces: list[str] = []
        self._dropped = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:  # noqa: ARG002
        if not self._dropped and tag in _DROPPED:
            self._dropped = tag

    def handle_endtag(self, tag: str) -> None:
        if tag == self._dropped:
            self._dropped = ""
        if tag in _BLOCKS:
            self.pieces.append("\n\n")

    def handle_data(self, data: str) -> None:
        if not self._dropped:
            self.pieces.append(data)


def page_text(content: str) -> str:
    """Return the text of a page, with one space between words and an empty line between paragraphs."""
    parser = PageText()
    parser.feed(content)
    parser.close()
    blocks = "".join(parser.pieces).split("\n\n")
    return "\n\n".join(filter(None, (" ".join(block.split()) for block in blocks)))


def text_of(path: PurePath, content: bytes) -> str:
    """Return the text of a file in a package; "" if it has none that is used."""
    suffix = path.suffix
    if suffix in (".gz", ".dz"):
        content, suffix = gzip.decompress(content), PurePath(path.stem).suffix
    if path.name.startswith(("copyright", "changelog", "NEWS")) or path.name.endswith(".min.js"):
        return ""
    try:
        text = content.decode()
    except UnicodeDecodeError:
        return ""
    if suffix in (".html", ".page"):
        return page_text(text)
    if "man" in path.parts:
        return _ROFF.sub("", text).replace(r"\-", "-")
    if suffix == ".dict":
        return re.sub(r"\n(?=\S)", "\n\n", text)  # an entry a paragraph
    is_saying = "fortunes" in path.parts and suffix not in (".dat", ".u8")
    return text if is_saying or suffix in _CODE or suffix in (".txt", ".md") else ""


def texts_of(package: bytes) -> Iterator[str]:
    """Yield the texts in a package, in the order of their paths."""
    unpacked = subprocess.run(["dpkg-deb", "--fsys-tarfile", "-"], input=package, stdout=subprocess.PIPE, check=True)
    with tarfile.open(fileobj=io.BytesIO(unpacked.stdout)) as archive:
        for member in sorted((one for one in archive if one.isfile()), key=lambda one: one.name):
            file = archive.extractfile(member)
            if file is not None and (text := text_of(PurePath(member.name), file.read())):
                yield text


def content_of(source: Source, folder: Path) -> bytes:
    """Return the bytes of a package, downloaded if necessary."""
    path = folder / source.file
    if not path.exists():
        subprocess.run(["apt-get", "download", "-qq", f"{source.package}={source.version}"], cwd=folder, check=False)
    if not path.exists():
        sys.exit(f"{source.file} is not offered any more: put it into {folder} from https://snapshot.debian.org")
    content = path.read_bytes()
    if (found := hashlib.sha256(content).hexdigest()) != source.sha256:
        sys.exit(f"{path} has SHA-256 {found}, not {source.sha256}")
    return content


def corpus(folder: Path) -> Iterator[str]:
    """Yield paragraphs of all sources, each once, and print how much text a source has."""
    seen: set[bytes] = set()
    total = 0
    for source in SOURCES:
        used = found = 0
        for text in texts_of(content_of(source, folder)):
            chosen = []
            for paragraph in text.split("\n\n"):
                key = hashlib.blake2b(paragraph.encode(), digest_size=8).digest()
                if key not in seen:
                    seen.add(key)
                    chosen += [paragraph] if found % source.every == 0 else []
                    found += 1
            if chosen:
                joined = "\n\n".join(chosen)
                used += len(joined)
                yield joined
        total += used
        print(f"{used / 1e6:6.1f} M characters  {source.package} {source.version}", flush=True)
    print(f"{total / 1e6:6.1f} M characters in all", flush=True)


def main() -> None:
    """Train and write the tokenizer."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, nargs="?", default=OUTPUT)
    parser.add_argument("--debs", type=Path, default=Path("build/debs"))
    arguments = parser.parse_args()
    arguments.debs.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(LLAMA_3_PATTERN), behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=TOKENS,
        special_tokens=[AddedToken(END_OF_TEXT, special=True, normalized=False)],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        max_token_length=24,  # bytes: no long lines of tables, nor whole sentences of Chinese
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus(arguments.debs), trainer)
    fields = orjson.loads(tokenizer.to_str())
    fields["model"]["merges"] = [" ".join(pair) for pair in fields["model"]["merges"]]
    content = orjson.dumps(fields) + b"\n"
    arguments.file.write_bytes(content)
    lengths = Counter(len(token) for token in fields["model"]["vocab"])
    print(f"{arguments.file}: {len(fields['model']['vocab']):,} tokens, {len(content):,} bytes, longest {max(lengths)}")
    print(f"SHA-256 {hashlib.sha256(content).hexdigest()}")


if __name__ == "__main__":
    main()
