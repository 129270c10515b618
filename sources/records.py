"""Captions in JSON: Karpathy's and COCO's, lists and tables of entries, one entry a line, parquet.

sources/layouts.py reads .json, .jsonl and .parquet files through `read_records`.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sources.names import is_picture
from sources.reading import (
    FORM,
    UNREAD,
    Reading,
    Row,
    check_understood,
    reason_of,
    shortened,
    split_in,
    split_of,
)
from sources.roles import columns_of, role_of
from support.command import UserError

SAMPLE = 200  # entries that tell which of their keys is what
CONTAINERS = ("annotations", "data", "images", "captions")  # keys below which entries lie


def read_json(path: Path, reading: Reading) -> Any:
    """The content of a JSON file; of a key that stands twice both values count.

    Raises UserError when it is none.
    """
    try:
        return json.loads(reading.text(path), object_pairs_hook=merged)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON: {error}; {FORM}") from error


def merged(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        for key in content:
            values = [value for name, value in pairs if name == key]
            if len(values) > 1 and all(isinstance(value, str | list) for value in values):
                content[key] = [text for value in values for text in texts_of(value)]
    return content


def read_karpathy(paths: list[Path], reading: Reading) -> Iterator[Row]:
    """Karpathy's dataset_*.json: {"images": [{filename, split, sentences: [{raw}]}]}."""
    for path in paths[:1]:
        for image in read_json(path, reading)["images"]:
            split, place = split_of(image.get("split") or ""), image.get("filepath", "")
            for sentence in image["sentences"]:
                yield Row(image["filename"], text_of(sentence["raw"]), split, place=place)


def read_coco(paths: list[Path], reading: Reading) -> Iterator[Row]:
    """COCO's captions_*.json; the file names tell the splits where there are several files."""
    for path in paths:
        place = path.stem.removeprefix("captions_")
        split = split_in(path.stem) or "train"
        yield from coco_rows(read_json(path, reading), split if paths[1:] else "", place)


def coco_rows(content: dict, split: str, place: str) -> Iterator[Row]:
    names = {image["id"]: image["file_name"] for image in content["images"]}
    for note in content["annotations"]:
        name = names.get(note["image_id"], f"image_id {note['image_id']}")
        yield Row(name, text_of(note["caption"]), split, place=place)


def text_of(value: Any) -> str:
    """A caption that is text; an absent one, null, counts as empty."""
    if value is not None and not isinstance(value, str):
        raise TypeError(f"a caption is {shortened(repr(value))}")
    return value or ""


# ------------------------------------------------------------------------ any other content


def read_records(path: Path, reading: Reading, split: str = "", place: str = "") -> Iterator[Row]:
    """Captions in a JSON, JSONL or parquet file of any form that names them.

    Raises UserError where it is not understood.
    """
    if path.suffix.lower() == ".parquet":
        content = read_parquet(path)
    elif path.suffix.lower() in (".jsonl", ".ndjson"):
        content = read_jsonl(path, reading)
    else:
        content = read_json_or_lines(path, reading)
    try:
        yield from rows_in(content, path, reading, split, place)
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is not understood: {reason_of(error)}; {FORM}") from error


def read_json_or_lines(path: Path, reading: Reading) -> Any:
    """The content of a .json file, which may also hold one entry a line."""
    try:
        return read_json(path, reading)
    except UserError:
        try:
            several = [isinstance(json.loads(x), dict) for _, x in reading.lines(path)[:2]]
        except (ValueError, RecursionError):
            several = []
        if several != [True, True]:
            raise
        return read_jsonl(path, reading)


def read_parquet(path: Path) -> list[dict]:
    try:
        from pyarrow import ArrowInvalid, parquet
    except ImportError as error:
        raise UserError(f"{path}: parquet files need pyarrow; pip install pyarrow") from error
    try:
        return parquet.read_table(path).to_pylist()
    except (ArrowInvalid, OSError) as error:
        raise UserError(f"{path} is no parquet file: {shortened(str(error))}") from error


def read_jsonl(path: Path, reading: Reading) -> list[Any]:
    """One entry a line; lines that are no JSON are counted. Raises UserError when many are."""
    entries, unread, lines = [], [], reading.lines(path)
    for number, line in lines:
        try:
            entries.append(json.loads(line))
        except (ValueError, RecursionError):
            unread.append(f"line {number}: {shortened(line)}")
            reading.skip(UNREAD, unread[-1])
    check_understood(path, unread, len(lines), "each must be a JSON object")
    return entries


def rows_in(content: Any, path: Path, reading: Reading, split: str, place: str) -> Iterator[Row]:
    """The rows of a list of entries, or of a dictionary. Raises UserError when it is none."""
    some = content[:SAMPLE] if isinstance(content, list) else []
    if isinstance(content, dict) and content:
        yield from rows_of_dictionary(content, path, reading, split, place)
    elif some and any(all(isinstance(entry, kind) for entry in some) for kind in (dict, list)):
        yield from rows_of_entries(content, path, reading, split, place)
    else:
        raise not_understood(content, path)


def rows_of_dictionary(
    content: dict, path: Path, reading: Reading, split: str, place: str
) -> Iterator[Row]:
    """The rows of a dictionary of COCO's kind, or by split, column, image or id, or with a list."""
    roles = {role_of(key) for key in content}
    named = [key for key in content if is_picture(key) or reading.pictures.has(key)]
    inner = {key: x for key, x in content.items() if isinstance(x, list | dict) and x}
    entries = [x for x in inner.values() if isinstance(x, dict)]
    if isinstance(content.get("images"), list) and isinstance(content.get("annotations"), list):
        yield from coco_rows(content, split, place)
    elif all(map(split_of, content)):
        for key, part in content.items():
            yield from rows_in(part, path, reading, split_of(key), place)
    elif {"image", "caption"} <= roles:
        yield from rows_of_entries(entries_of_columns(content), path, reading, split, place)
    elif len(entries) == len(content) and "caption" in map(role_of, entries[0]):
        keyed = [{**entry, "image key": key} for key, entry in inner.items()]
        yield from rows_of_entries(keyed, path, reading, split, place)
    elif 2 * len(named) > len(content):
        for key, value in content.items():
            for text in texts_of(value) or [""]:
                yield Row(key, text, split, place=place)
    elif key := next((key for key in CONTAINERS if key in inner), None):
        yield from rows_in(inner[key], path, reading, split, place)
    elif len(inner) == 1:
        yield from rows_in(*inner.values(), path, reading, split, place)
    else:
        raise not_understood(content, path)


def entries_of_columns(content: dict) -> list[dict]:
    """The entries of a dictionary of columns, as pandas writes it; a dictionary of one entry."""
    columns = {
        key: [*values.values()] if isinstance(values, dict) else values
        for key, values in content.items()
        if isinstance(values, dict | list)
    }
    longest = max(map(len, columns.values()), default=0)
    columns = {key: values for key, values in columns.items() if len(values) == longest}
    if len(columns) < 2:
        return [content]
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def not_understood(content: Any, path: Path) -> UserError:
    keys = ", ".join(map(shortened, content)) if isinstance(content, dict) else ""
    seen = (
        f"its keys are {shortened(keys, 200)}" if keys else f"it holds {shortened(repr(content))}"
    )
    return UserError(f"{path} is not understood: {seen}; {FORM}")


def rows_of_entries(
    entries: list[dict | list], path: Path, reading: Reading, split: str, place: str
) -> Iterator[Row]:
    """A row for each caption of each entry, whose keys are told as a table's columns are.

    An entry may be a list, whose places are the columns of a table without a header.
    """
    header = isinstance(entries[0], dict)
    entries = [dict(enumerate(x)) if isinstance(x, list) else x for x in entries]
    keys = [*dict.fromkeys(key for entry in entries if isinstance(entry, dict) for key in entry)]
    table = [[cell_of(entry.get(key)) for key in keys] for entry in entries[:SAMPLE]]
    columns = columns_of(keys if header else None, table, reading.pictures, path)
    unread = []
    for number, entry in enumerate(entries, 1):
        image = entry.get(keys[columns.image]) if isinstance(entry, dict) else None
        if isinstance(image, dict):
            image = image.get("path") or image.get("file_name")
        if not isinstance(image, str | int) or image == "":
            unread.append(f"entry {number}: {shortened(repr(entry))}")
            reading.skip(UNREAD, unread[-1])
            continue
        own = str(entry.get(keys[columns.split]) or "") if columns.split is not None else ""
        values = (entry.get(keys[i]) for i in columns.captions)
        texts = [text for value in values if value is not None for text in texts_of(value)]
        for text in texts or [""]:
            yield Row(str(image), text, split_of(own) or split, place=place)
    check_understood(path, unread, len(entries), "each needs an image")


def cell_of(value: Any) -> str:
    """A value of an entry as a table's cell would hold it."""
    if isinstance(value, dict):
        value = value.get("path") or value.get("file_name") or [value]
    while isinstance(value, list):
        value = value[0] if value else ""
    if isinstance(value, dict):
        value = next(iter(texts_of(value)), "")
    return "" if value is None else str(value)


def texts_of(value: Any) -> list[str]:
    """The captions in a value: a text, a list, or what an entry holds under caption, raw, ..."""
    if isinstance(value, list):
        return [text for item in value for text in texts_of(item)]
    if isinstance(value, dict):
        own = [key for key in value if role_of(key) == "caption"]
        return [text for key in own for text in texts_of(value[key])]
    return [text_of(value)]
