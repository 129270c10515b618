"""From the bytes of a text file to its text: UTF-8, UTF-16, and the 8-bit and Asian codes of old.

sources/layouts.py reads every captions file through `decode`, and the summary says the encoding. A
code is taken only when the letters that it gives are those of a language; else the file is refused.
"""

import codecs
import re
import unicodedata

from sources.languages import CODES, ENCODINGS, Code
from support.command import UserError

SURE = 0.85  # of the letters must be those of the language, and a tenth more than of any other


def decode(data: bytes, name: str) -> tuple[str, str]:
    """(the text of a file, the encoding as the summary says it, "" for UTF-8).

    Raises UserError, with the file's `name`, when the encoding cannot be told with confidence.
    """
    if not data:
        return "", ""
    for mark, encoding in BYTE_ORDER_MARKS:
        if data.startswith(mark):
            return decode_marked(data, encoding, name)
    if (wide := wide_code(data)) is not None:
        return decode_marked(data, wide, name)
    if sum(map(data.count, CONTROLS)) > 0.01 * len(data):
        raise UserError(f"{name} is no text file; captions are text, as {FORM}")
    try:
        return data.decode("utf-8"), ""
    except UnicodeDecodeError:
        return decode_old(data, name)


FORM = "`image.jpg,a caption` on each line, below the header `image,caption`"
CONTROLS = [bytes([x]) for x in range(32) if x not in b"\t\n\r\f\x1a\x1b"]
BYTE_ORDER_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


def decode_marked(data: bytes, encoding: str, name: str) -> tuple[str, str]:
    """Bytes whose encoding is said by a mark, or by the zeros of its Latin letters."""
    try:
        said = "" if encoding == "utf-8-sig" else encoding.upper()[:6]
        return data.decode(encoding).removeprefix("\ufeff"), said
    except UnicodeDecodeError as error:
        problem = f"{name} begins as {encoding[:6].upper()} and is none at byte {error.start:,}"
        raise UserError(f"{problem}; save it as UTF-8") from error


def wide_code(data: bytes) -> str | None:
    """UTF-16 without its mark: every second byte of what is Latin in it is zero."""
    if len(data) % 2 or b"\0" not in data[:4096]:
        return None
    even, odd = data[::2], data[1::2]
    for encoding, zeros, others in (("utf-16-le", odd, even), ("utf-16-be", even, odd)):
        if zeros.count(0) > max(0.2 * len(zeros), 4 * others.count(0)):
            return encoding
    return None


STRAYS = re.compile("[\udc80-\udcff]+")  # bytes that are not UTF-8, as Python marks them


def decode_old(data: bytes, name: str) -> tuple[str, str]:
    """Bytes that are not UTF-8: a few stray ones in it, or another encoding altogether."""
    text = data.decode("utf-8", "surrogateescape")
    strays = [*STRAYS.finditer(text)]
    count, letters = sum(len(found[0]) for found in strays), re.sub(r"[\0-\x7f]", "", text)
    whole = STRAYS.sub("", letters)
    if len(whole) >= count:  # only UTF-8 has so many whole letters by chance
        check_western(text, whole, strays, f"{name} is UTF-8 but for {count:,} bytes")
        repaired = STRAYS.sub(lambda found: western(found[0]), text)
        return repaired, f"UTF-8 but for {count:,} bytes of Windows-1252"
    fits = sorted(((*tried(code, data), code) for code in CODES), key=lambda x: -x[0])
    fit, text, best = fits[0]
    rivals = [other for other, different, _ in fits[1:] if different != text]
    if fit >= SURE and (not rivals or max(rivals) <= fit - 0.1):
        return text, best.name
    problem = f"{name} is not UTF-8, and its encoding cannot be told with confidence"
    raise UserError(f"{problem}; save it as UTF-8 (in Excel: CSV UTF-8)")


def check_western(text: str, whole: str, strays: list[re.Match[str]], problem: str) -> None:
    """Raises UserError where stray bytes are no letters of Windows-1252: among `whole` letters of
    another script, or where more than three stand together."""
    foreign = sum(x.isalpha() and "LATIN" not in unicodedata.name(x, "") for x in whole)
    if foreign > len(whole) / 2 or max(len(found[0]) for found in strays) > 3:
        line = text.count("\n", 0, strays[0].start()) + 1
        where = f"the first in line {line:,}, which are no letters that can be told"
        raise UserError(f"{problem}, {where}; mend them")


def western(strays: str) -> str:
    """Bytes that are not UTF-8, as Windows-1252, or Latin-1 where that has no letter."""
    data = strays.encode("ascii", "surrogateescape")
    return "".join(bytes([x]).decode("cp1252" if x not in UNUSED else "latin-1") for x in data)


UNUSED = {0x81, 0x8D, 0x8F, 0x90, 0x9D}  # of Windows-1252


def tried(code: Code, data: bytes) -> tuple[float, str]:
    """(how well a code fits, the text that it gives); 0 where it cannot be read so."""
    try:
        text = data.decode(ENCODINGS[code.name])
    except UnicodeDecodeError:
        return 0.0, ""
    if any(unicodedata.category(x) in ("Cc", "Co", "Cn") and x not in "\t\n\r" for x in set(text)):
        return 0.0, text
    return code.fit(text), text
