"""The training text: Jane Austen's six novels, from Debian's `r-cran-janeaustenr`.

`load()` returns the novels as passages (chapters), already split in two:

* held out: the last 4 % (by characters, cut at a paragraph) of every novel, one contiguous piece each;
* training: everything before it.

The split depends on the text alone, so every run on every machine holds out the same words.

The package keeps the novels in R's lazy-load database: `Rdata.rdx` is a gzipped R object naming, for every variable,
the (offset, length) of its record in `Rdata.rdb`; a record is the big-endian uncompressed length and a zlib stream of
an R object in XDR serialisation ("R Internals", section 1.8). `Unserialize` reads the few object types that occur.

Licence: the novels (1811-1818) are in the public domain, the package that carries them is MIT.
"""

import gzip
import os
import re
import struct
import subprocess
import zlib
from pathlib import Path

CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "lutra" / "austen"
PACKAGE = "r-cran-janeaustenr"
NOVELS = ("sensesensibility", "prideprejudice", "mansfieldpark", "emma", "northangerabbey", "persuasion")
HELD_OUT = 0.04  # of the characters of each novel


class CorpusError(RuntimeError):
    """The text cannot be had; the message says what to do."""


class Unserialize:
    """Reads one R object (XDR serialisation, version 2 or 3) into lists, dicts, numbers and strings."""

    def __init__(self, data):
        self.data, self.at, self.references = data, 0, []
        if self.take(2) != b"X\n":
            raise CorpusError("an R object in another format than XDR")
        version, _, _ = self.ints(3)
        if version == 3:
            self.take(self.ints(1)[0])  # name of the native encoding

    def take(self, count):
        self.at += count
        return self.data[self.at - count : self.at]

    def ints(self, count):
        return struct.unpack(f">{count}i", self.take(4 * count))

    def item(self):
        flags = self.ints(1)[0]
        kind, has_attributes, has_tag = flags & 0xFF, flags & 0x200, flags & 0x400
        if kind == 254:  # NULL
            return None
        if kind == 255:  # a symbol seen before
            return self.references[(flags >> 8) - 1]
        if kind == 1:  # symbol
            self.references.append(self.item())
            return self.references[-1]
        if kind == 2:  # pairlist: attributes, tag, value, rest
            if has_attributes:
                self.item()
            tag = self.item() if has_tag else None
            value = self.item()
            return {tag: value} | (self.item() or {})
        count = self.ints(1)[0]
        if kind == 9:  # one string
            return None if count < 0 else self.take(count).decode("utf-8" if flags & 0x8000 else "latin-1")
        if kind in (10, 13):  # logical, integer
            value = list(self.ints(count))
        elif kind == 14:  # double
            value = list(struct.unpack(f">{count}d", self.take(8 * count)))
        elif kind in (16, 19):  # strings, list
            value = [self.item() for _ in range(count)]
        else:
            raise CorpusError(f"R object type {kind} is not expected in {PACKAGE}")
        names = (self.item() or {}).get("names") if has_attributes else None
        return dict(zip(names, value, strict=True)) if names else value


def download():
    """Unpack the Debian package into the cache, once; returns the folder with `Rdata.rdx` and `Rdata.rdb`."""
    folder = CACHE / "package/usr/lib/R/site-library/janeaustenr/data"
    if not (folder / "Rdata.rdb").exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        try:
            subprocess.run(["apt-get", "download", PACKAGE], cwd=CACHE, check=True, capture_output=True)
            package = next(CACHE.glob(f"{PACKAGE}_*.deb"))
            subprocess.run(["dpkg", "-x", package, CACHE / "package"], check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError, StopIteration) as error:
            hint = f"run `apt-get update`, or unpack the Debian package {PACKAGE} into {CACHE / 'package'}"
            raise CorpusError(f"cannot download {PACKAGE} ({error.__class__.__name__}): {hint}") from error
    return folder


def read_lines(folder):
    """The lines of each novel as the package has them: {name: [line, ...]}."""
    index = Unserialize(gzip.decompress((folder / "Rdata.rdx").read_bytes())).item()["variables"]
    database = (folder / "Rdata.rdb").read_bytes()
    novels = {}
    for name in NOVELS:
        offset, length = (int(number) for number in index[name])
        record = database[offset : offset + length]
        novels[name] = Unserialize(zlib.decompress(record[4:])).item()
    return novels


PLAIN = str.maketrans({"‘": "'", "’": "'", "“": '"', "”": '"', "—": "--", "–": "-", "…": "...", "_": "", "`": "'",
                       "é": "e", "è": "e", "ê": "e", "ë": "e", "à": "a", "â": "a", "ç": "c", "ï": "i", "ô": "o",
                       "ö": "o", "ü": "u", "æ": "ae", "œ": "oe", "£": "L", "\t": " ", "[": "(", "]": ")"})  # fmt: skip
HEADING = re.compile(r"(volume|chapter)\s+[ivxlc\d]+\b.{0,12}|finis|the end|\W*", re.IGNORECASE)


def chapters(lines):
    """Join hard-wrapped lines into paragraphs of plain ASCII; returns chapters, each a list of paragraphs.

    Front matter (all before chapter 1), headings and the transcriber's closing note are left out.
    """
    first = next(i for i, line in enumerate(lines) if re.match(r"\s*chapter (1|i)\b", line, re.IGNORECASE))
    text = "\n".join(line.rstrip() for line in lines[first:])
    text = re.split(r"\n\s*\*?\s*A NOTE ON THE TEXT", text)[0]
    found = [[]]
    for block in re.split(r"\n\s*\n", text):
        line = " ".join(block.translate(PLAIN).split())
        line = re.sub(r"\s*--+\s*", "--", line).encode("ascii", "ignore").decode()
        if HEADING.fullmatch(line) or line.isupper():
            found.append([])
        else:
            found[-1].append(line)
    return [chapter for chapter in found if chapter]


def load():
    """(training passages, held-out passages); a passage is a chapter or part of one, paragraphs joined by newlines."""
    train, held_out = [], []
    for lines in read_lines(download()).values():
        whole = chapters(lines)
        left = (1 - HELD_OUT) * sum(len(paragraph) for chapter in whole for paragraph in chapter)
        for chapter in whole:
            cut = 0
            while left > 0 and cut < len(chapter):
                left -= len(chapter[cut])
                cut += 1
            train += ["\n".join(chapter[:cut])] if cut else []
            held_out += ["\n".join(chapter[cut:])] if cut < len(chapter) else []
    return train, held_out


if __name__ == "__main__":
    for kind, passages in zip(("training", "held-out"), load(), strict=True):
        print(f"{kind}: {len(passages)} passages, {sum(map(len, passages))} characters")
