"""The 8-bit and Asian codes of old, and how well a text fits languages that are written in them.

sources/encodings.py tries every one of `CODES` on a file that is not UTF-8: bytes read in the wrong
code give letters that no language has.
"""

import re
from collections.abc import Callable
from typing import NamedTuple

HAN = re.compile(r"[一-鿿]")
KANA = re.compile(r"[ぁ-ゖァ-ヺー]")
HANGUL = re.compile(r"[가-힣]")

# What stands in half of all Chinese and Korean texts: other codes give other letters in its place.
SIMPLIFIED = (
    "的一是不了在人有我他这个们中来上大为和国地到以说时要就出会可也你对生能而子那得于着下自之年过"
    "发后作里用道行所然家种事成方多经么去法学如都同现当没动面起看定天分还进好小部其些主样理心她本"
    "前开但因只从想实日军者意无力它与长把机十民第公此已工使情明性知全三又关点正业外将两高间由问很"
    "最重并物手应向头文体相见被利什二等或新己制身果加西斯月话合回特代内信表化老给世位次度门任常先"
    "海通教儿原东声提立及比员解水名真论处走义各入几口认条平系气题活尔更别打女变四神总何电数安少报"
    "才结反受目太量再感建务做接必场件计管期市直德资命山金指克许统区保至队形社便空决治展马科司五基"
    "眼书非则听白却界达光放强即像难且权思王象完设式色路记南品住告类求据程北边死张该交规万取拉格望"
    "觉术领共确传师观清今切院让识候带导争运笑飞风步改收根干造言联持组每济车亲极林服快办议往元英士"
    "证近失转夫令准布始怎呢存未远叫台单影具罗字爱击流备兵连调深商算质团集百需价花党华城石级整府离"
    "狗男孩草穿红蓝黄绿黑衣坐站跑跳球骑着群街雪滩图片跑奔玩戴帽妇"
)
TRADITIONAL = (
    "的一是不了在人有我他這個們中來上大為和國地到以說時要就出會可也你對生能而子那得於著下自之年過"
    "發後作裡用道行所然家種事成方多經麼去法學如都同現當沒動面起看定天分還進好小部其些主樣理心她本"
    "前開但因只從想實日軍者意無力它與長把機十民第公此已工使情明性知全三又關點正業外將兩高間由問很"
    "最重並物手應向頭文體相見被利什二等或新己制身果加西月話合回特代內信表化老給世位次度門任常先海"
    "通教兒原東聲提立及比員解水名真論處走義各入幾口認條平系氣題活更別打女變四神總何電數安少報才結"
    "色路狗男孩草穿紅藍黃綠黑衣坐站跑跳球騎群街雪灘圖片奔玩戴帽婦馬車邊樹白隻張"
)
KOREAN = (
    "이다는에의을가고하은를한지로기사아서도니리자나어대들시인라있그일해수여스정게만안부장조으과보"
    "원전주면것거적구없상와우소문화세제동국치신성마모바연미무비간오용방성학음말실선개남녀빨노파란"
    "강위앞뒤앉공놀달려흰검옷입람"
)


class Code(NamedTuple):
    """An encoding, the language that it is tried for, and how well a text fits, from 0 to 1."""

    name: str
    language: str
    fit: Callable[[str], float]


def high(text: str) -> list[str]:
    """The letters that are not ASCII, without the signs that every language has."""
    return [x for x in text if x > "\x7f" and x not in SIGNS]


SIGNS = set("‘’“”–—…•·«»°€£§©®™´½¼¾‚„‹›\xa0、。，！？：；（）《》【】「」『』～")


def latin(alphabet: str) -> Callable[[str], float]:
    """Fits a language of Latin letters: few of a word's letters have accents, all from its own."""
    own = {*alphabet, *alphabet.upper()}

    def fit(text: str) -> float:
        if alphabet != ANY_WESTERN and is_english(text):
            return 0.0
        words = re.findall(r"[^\W\d_]+", text)
        marked = [word for word in words if not word.isascii()]
        accents = high(text)
        if not accents:  # signs alone; those of other codes stand for letters: caf‚, sch”n
            signs = sum(x in SIGNS for x in text)
            inside = len(re.findall(r"[^\W\d_](?:[‚„‹]|[“”][^\W\d_])", text))
            return 1 - inside / signs if signs else 0.0
        plain = sum(x.isascii() for word in marked for x in word)
        if plain < sum(map(len, marked)) / 2:
            return 0.0
        odd = sum(bool(re.search(r"[^\W\d_A-Z][A-Z]|[a-z][À-ÖØ-Þ]", w)) for w in marked)
        return sum(x in own for x in accents) / len(accents) - odd / max(1, len(marked))

    return fit


def english(text: str) -> float:
    """Fits English, whose letters with accents stand in foreign words and may be any."""
    return latin(ANY_WESTERN)(text) if is_english(text) else 0.0


def is_english(text: str) -> bool:
    words = re.findall(r"[a-z]+", re.sub(r"\S+\.\w{3,4}\b", "", text.lower()))
    return sum(word in ENGLISH for word in words) > 0.1 * len(words)


ANY_WESTERN = "àâäáãåæçéèêëíìîïñóòôöõøœúùûüýÿßš"
ENGLISH = {"the", "of", "and", "with", "is", "are", "his", "her", "from", "an"}


def vietnamese(text: str) -> float:
    """Fits Vietnamese, whose code has the marks of tones as letters of their own."""
    tones = "\u0300\u0301\u0303\u0309\u0323"
    marked = sum(x in tones for x in text) > 0.25 * len(high(text))
    return latin("ăâđêôơưáéíóúàèìòù" + tones)(text) if marked else 0.0


def script(own: str, common: str, share: float) -> Callable[[str], float]:
    """Fits a language of its own letters: words wholly of them, most in small letters, and a share
    of all that its commonest letters have in any text."""
    letters, commonest = re.compile(f"[{own}]"), set(common)

    def fit(text: str) -> float:
        found = high(text)
        inside = [x for x in found if letters.match(x)]
        mixed = re.findall(rf"(?<=[A-Za-z])[{own}]|[{own}](?=[A-Za-z])", text)
        words = re.findall(f"[{own}]+", text)
        lower = sum(word[1:] == word[1:].lower() for word in words)
        typical = sum(x in commonest for x in inside) >= share * len(inside)
        if not inside or not typical or len(mixed) > 0.1 * len(words) or lower < 0.7 * len(words):
            return 0.0
        return len(inside) / len(found)

    return fit


def chinese(common: str, encoding: str, first: str, last: str) -> Callable[[str], float]:
    """Fits Chinese: letters of the first, common part of its code, and the commonest among them."""
    low, top = bytes.fromhex(first), bytes.fromhex(last)

    def fit(text: str) -> float:
        found = high(text)
        han = [x for x in found if HAN.match(x)]
        if len([x for x in han if x in common]) < 0.2 * len(found):
            return 0.0
        return sum(low <= x.encode(encoding) <= top for x in han) / len(found)

    return fit


def japanese(text: str) -> float:
    """Fits Japanese: Han letters with kana between them."""
    found = high(text)
    kana = sum(bool(KANA.match(x)) for x in found)
    han = sum(bool(HAN.match(x)) for x in found)
    return (kana + han) / len(found) if kana > 0.2 * len(found) else 0.0


def korean(text: str) -> float:
    found = high(text)
    hangul = [x for x in found if HANGUL.match(x)]
    common = sum(x in KOREAN for x in hangul)
    return len(hangul) / len(found) if found and common > 0.25 * len(found) else 0.0


ENCODINGS = {
    "GBK": "gb18030", "Big5": "big5", "Shift-JIS": "cp932", "EUC-JP": "euc_jp", "EUC-KR": "cp949",
    "Windows-1250": "cp1250", "Windows-1251": "cp1251", "Windows-1252": "cp1252",
    "Windows-1253": "cp1253", "Windows-1254": "cp1254", "Windows-1255": "cp1255",
    "Windows-1256": "cp1256", "Windows-1257": "cp1257", "Windows-1258": "cp1258",
    "Windows-874": "cp874", "KOI8-R": "koi8_r", "CP866": "cp866", "ISO 8859-2": "iso8859_2",
}  # fmt: skip
CYRILLIC = script("Ѐ-ӿ", "оеаинтсрвлкд", 0.5)
CODES = (
    Code("GBK", "Chinese", chinese(SIMPLIFIED, "gb18030", "b0a1", "d7f9")),
    Code("Big5", "Chinese", chinese(TRADITIONAL, "big5", "a440", "c67e")),
    Code("Shift-JIS", "Japanese", japanese),
    Code("EUC-JP", "Japanese", japanese),
    Code("EUC-KR", "Korean", korean),
    Code("Windows-1252", "English", english),
    Code("Windows-1252", "French", latin("àâçéèêëîïôùûüœæ")),
    Code("Windows-1252", "German", latin("äöüßé")),
    Code("Windows-1252", "Spanish", latin("áéíóúñü¿¡")),
    Code("Windows-1252", "Portuguese", latin("áâãàçéêíóôõú")),
    Code("Windows-1252", "Italian", latin("àèéìòù")),
    Code("Windows-1252", "Scandinavian", latin("åäöæøé")),
    Code("Windows-1252", "Dutch", latin("éëïöüè")),
    Code("Windows-1250", "Polish", latin("ąćęłńóśźż")),
    Code("Windows-1250", "Czech", latin("áčďéěíňóřšťúůýž")),
    Code("Windows-1250", "Slovak", latin("áäčďéíĺľňóôŕšťúýž")),
    Code("Windows-1250", "Hungarian", latin("áéíóöőúüű")),
    Code("Windows-1250", "Croatian", latin("čćđšž")),
    Code("Windows-1250", "Romanian", latin("ăâîşţ")),
    Code("ISO 8859-2", "Polish", latin("ąćęłńóśźż")),
    Code("ISO 8859-2", "Czech", latin("áčďéěíňóřšťúůýž")),
    Code("Windows-1254", "Turkish", latin("çğıöşüâİ")),
    Code("Windows-1257", "Lithuanian", latin("ąčęėįšųūž")),
    Code("Windows-1257", "Latvian", latin("āčēģīķļņšūž")),
    Code("Windows-1258", "Vietnamese", vietnamese),
    Code("Windows-1251", "Russian", CYRILLIC),
    Code("KOI8-R", "Russian", CYRILLIC),
    Code("CP866", "Russian", CYRILLIC),
    Code("Windows-1253", "Greek", script("Ͱ-Ͽ", "αοιετσνηυρπκ", 0.5)),
    Code("Windows-1255", "Hebrew", script("֐-׿", "יוהלאמרתבש", 0.5)),
    Code("Windows-1256", "Arabic", script("؀-ۿ", "اليمنوترهب", 0.5)),
    Code("Windows-874", "Thai", script("฀-๿", "านรอกเงมยลวดท", 0.4)),
)
