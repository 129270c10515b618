"""Captions in the lines of a text file: a table with any delimiter, or one of the old notations.

sources/layouts.py reads .txt, .csv and .tsv files through `read_lines`.
"""

import ast
import csv
import io
import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from sources.names import Pictures, is_picture
from sources.reading import FORM, UNREAD, Reading, Row, check_understood, shortened, split_of
from sources.roles import IMAGE, Columns, columns_of, mostly, role_of
from support.command import UserError

DELIMITERS = ("\t", ";", ",", "|")
SAMPLE = 200  # lines that tell which column is what
LONGEST_CELL = 20  # lines that a caption in quotes may have
TOKEN = re.compile(r"([^\t]+?)#(?:[a-z]+#)?\d+(?:\t|(?<=\d) +)(.*)", re.IGNORECASE)
csv.field_size_limit(2**31 - 1)

Line = tuple[int, str]  # its number from 1, and what stands in it


def read_lines(path: Path, reading: Reading, split: str = "", place: str = "") -> Iterator[Row]:
    """Reads a text file of captions; its first lines tell which of four notations it is in.

    `name.jpg#0<TAB>caption` (Flickr8k.token.txt; Flickr8k-CN has a blank), `name.jpg| 0| caption`
    (Flickr30k results.csv), a table with or without a header (Kaggle captions.txt), or names and
    captions parted by blanks. Raises UserError when it is none.
    """
    lines = reading.lines(path)
    head = [line for _, line in lines[:5]]
    if any(token_of(line) for line in head):
        yield from read_notation(path, lines, reading, token_of, split, place)
    elif any(bars_of(line) and is_picture(line.partition("|")[0].strip()) for line in head):
        if not is_picture(head[0].partition("|")[0].strip()):
            del lines[0]  # the header
        yield from read_notation(path, lines, reading, bars_of, split, place)
    elif all(re.match(r"\S+\.\w+ +[^\s,;|]", x) and is_picture(x.split()[0]) for x in head):
        yield from read_notation(path, lines, reading, blanks_of, split, place)
    else:
        yield from read_table(path, lines, reading, split, place)


def token_of(line: str) -> tuple[str, str] | None:
    """`name.jpg#0<TAB>caption` or `name.jpg#zhc#0 caption`"""
    found = TOKEN.fullmatch(line)
    if found:
        mark = line[found.end(1) : found.start(2)]
        if "\t" in mark or mark.count("#") == 2 or is_picture(found[1]):
            return found[1], found[2]
    name, tab, caption = line.partition("\t")
    return (name, caption) if tab and "#" in name and is_picture(name.rpartition("#")[0]) else None


def bars_of(line: str) -> tuple[str, str] | None:
    """`name.jpg| 0| caption`; one line of Flickr30k lacks the second bar."""
    name, bar, rest = line.partition("|")
    return (name.strip(), re.sub(r"^\s*\d+\s*\|?", "", rest)) if bar else None


def blanks_of(line: str) -> tuple[str, str] | None:
    name, *caption = line.split(maxsplit=1)
    return (name, caption[0]) if caption and is_picture(name) else None


def read_notation(path, lines: list[Line], reading: Reading, parts_of, split, place):
    """The rows of lines that `parts_of` parts into image and caption; None where it cannot."""
    unread = []
    for number, line in lines:
        if parts := parts_of(line) or (line.count("\t") == 1 and line.split("\t")):
            yield Row(*parts, split, place=place)
        else:
            unread.append(f"line {number}: {shortened(line)}")
            reading.skip(UNREAD, unread[-1])
    check_understood(path, unread, len(lines), "each needs a picture's name and a caption")


# --------------------------------------------------------------------------------- tables


def read_table(
    path: Path, lines: list[Line], reading: Reading, split: str, place: str
) -> Iterator[Row]:
    """A table of captions, with any delimiter, with or without a header. Raises UserError."""
    lines = [(number, line) for number, line in lines if re.search(r"\w", line)]
    marked = re.fullmatch(r'"?sep=(.)"?\W*', lines[0][1], re.IGNORECASE) if lines else None
    lines = lines[1:] if marked else lines
    if not lines:
        raise UserError(f"{path} holds no captions; {FORM}")
    delimiter, header = head_of(lines, reading.pictures, marked and marked[1])
    body = lines[1:] if header is not None else lines
    if not body:
        raise UserError(f"{path} holds no captions, only the header {header}; {FORM}")
    sample = [split_line(line, delimiter) for _, line in body[:SAMPLE]]
    columns = columns_in(header, sample, delimiter, reading.pictures, path)
    count, unread, has = 0, [], reading.pictures.has
    for number, cells in records(body, delimiter, columns, reading.pictures):
        count += 1
        row = columns.aligned(cells, delimiter)
        if row is None or (header is None and not (is_picture(row[columns.image]) or
                                                   has(row[columns.image]))):  # fmt: skip
            unread.append(f"line {number}: {shortened(delimiter.join(cells))}")
            reading.skip(UNREAD, unread[-1])
            continue
        own = split_of(row[columns.split]) if columns.split is not None else split
        texts = [text for i in columns.captions for text in texts_in(row[i])]
        for text in [text for text in texts if text.strip()] or [""]:
            yield Row(row[columns.image], text, own, place=place)
    names = ", ".join(header) if header is not None else "an image and its caption"
    check_understood(path, unread, count, f"each needs the cells {names}")


def head_of(
    lines: list[Line], pictures: Pictures, delimiter: str | None
) -> tuple[str, list[str] | None]:
    """(the delimiter of a table, its header or None)."""
    choices = [delimiter] if delimiter else DELIMITERS
    for choice in choices:
        header = split_line(lines[0][1], choice)
        known = {"image", "caption"} & set(map(role_of, header))
        if len(header) > 1 and known and not any(names_picture(x, pictures) for x in header):
            return choice, [name.strip() for name in header]
    rows = {x: [split_line(line, x) for _, line in lines[:SAMPLE]] for x in choices}

    def named(choice: str) -> int:
        return sum(len(row) > 1 and any(map(is_picture, row)) for row in rows[choice])

    def stems(choice: str) -> int:
        return sum(len(row) > 1 and any(map(pictures.has, row)) for row in rows[choice])

    best = max(choices, key=lambda choice: (named(choice), stems(choice), len(rows[choice][0])))
    first = rows[best][0]
    headless = any(names_picture(cell, pictures) for cell in first)
    return best, None if headless else [name.strip() for name in first]


def names_picture(cell: str, pictures: Pictures) -> bool:
    """Whether a cell of a first line is a picture's name, not what a header calls such names."""
    return is_picture(cell) or (cell.strip().lower() not in IMAGE and pictures.has(cell))


def columns_in(
    header: list[str] | None,
    sample: list[list[str]],
    delimiter: str,
    pictures: Pictures,
    path: Path,
) -> Columns:
    """The columns of a table; without a header a caption's own commas are told from columns."""
    if header is not None:
        return columns_of(header, sample, pictures, path)
    usual, _ = Counter(map(len, sample)).most_common(1)[0]
    prose = [row for row in sample if any(cell[:1] == " " for cell in row[1:])]
    if len(set(map(len, sample))) == 1 and 2 * len(prose) < len(sample):
        return columns_of(None, sample, pictures, path)
    # Commas of the captions: what follows the first column of pictures is one caption, but for a
    # last column that is a number in every line, without a blank before it.
    numbered = usual > 2 and all(
        len(row) > 2 and re.fullmatch(r"-?[\d.,]*\s*", row[-1]) for row in sample
    )
    for image in range(max(map(len, sample)) - 1):
        cells = [row[image] if image < len(row) else "" for row in sample]
        if mostly(lambda cell: is_picture(cell) or pictures.has(cell), cells):
            return Columns(image, [image + 1], None, image + 2 + numbered)
    return columns_of(None, sample, pictures, path)


def records(
    lines: list[Line], delimiter: str, columns: Columns, pictures: Pictures
) -> Iterator[tuple[int, list[str]]]:
    """The rows of a table as cells; a cell in quotes may go on in the next lines.

    It does not go on in a line that begins a row of its own: then the quote is a stray one.
    """
    position = 0
    while position < len(lines):
        number, line = lines[position]
        position += 1
        if '"' in line and is_open(line, delimiter):
            longer = line
            for ahead in range(position, min(position + LONGEST_CELL, len(lines))):
                if begins_row(lines[ahead][1], delimiter, columns.image, pictures):
                    break
                longer += "\n" + lines[ahead][1]
                if not is_open(longer, delimiter):
                    line, position = longer, ahead + 1
                    break
        yield number, split_line(line, delimiter)


def begins_row(line: str, delimiter: str, image: int, pictures: Pictures) -> bool:
    cells = line.split(delimiter)
    name = cells[image].strip('" ') if image < len(cells) - 1 else ""
    return bool(name) and (is_picture(name) or pictures.has(name))


def is_open(line: str, delimiter: str) -> bool:
    """Whether a cell begins with a quote that is not closed."""
    return bool(re.search(rf'(?:^|{re.escape(delimiter)})\s*"(?:[^"]|"")*$', line))


def split_line(line: str, delimiter: str) -> list[str]:
    """The cells of a line; quotes that do not enclose a whole cell are letters like others."""
    if '"' not in line:
        return line.split(delimiter)
    end = re.escape(delimiter)
    rest = re.sub(rf'(^|{end})\s*"(?:[^"]|"")*"\s*(?={end}|$)', r"\1", line)
    if re.search(rf'(?:^|{end})\s*"', rest):
        if '\\"' in line:  # quotes inside a cell as databases write them
            return split_line(line.replace('\\"', '""'), delimiter)
        cells = line.split(delimiter)
        return [re.sub(r'^\s*"(?=[^"]*$)', "", cell) for cell in cells]
    blanks = bool(re.search(rf'{end}\s+"', line))
    file = io.StringIO(line, newline="")
    return next(csv.reader(file, delimiter=delimiter, skipinitialspace=blanks))


def texts_in(cell: str) -> list[str]:
    """The captions of a cell, which may hold a list of them: `["a dog", "a cat"]`."""
    inner = cell.strip()
    if not (inner[:1] == "[" and inner[-1:] == "]" and re.match(r"\[\s*['\"]", inner)):
        return [cell]
    parted = re.sub(r"""(?<=['"])\s+(?=['"])""", ", ", inner)  # as NumPy prints it
    for read in (json.loads, ast.literal_eval):
        try:
            found = read(parted)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
        if all(isinstance(text, str) for text in found):
            return list(found)
    return [cell]
