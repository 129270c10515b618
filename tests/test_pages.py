"""The pages: their tables are the data's, their links and flags exist, their promises hold.

Those in Chinese are held to what those in English are, and the two say the same.
"""

import csv
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from report import analysis, findings, tables
from report.groups import WORDS
from support.command import HERE, UserError
from support.options import PER_DATA

OTHERS = (".", "checkpoints/", "shared/", "tests/")  # neither pages nor scripts of the project


def files(ending: str) -> list[str]:
    """The project's own files, as paths from its root."""
    names = (path.relative_to(HERE).as_posix() for path in HERE.rglob(f"*{ending}"))
    return sorted(name for name in names if not name.startswith(OTHERS))


PAGES = [HERE / name for name in files(".md")]
README = (HERE / "README.md").read_text("utf-8")
SCRIPTS = ("dataset", "train", "evaluate", "visualize", "search", "report/benchmark")
SCRIPTS += ("report/tables", "report/handin")
BOTH = [("README.md", "README.zh.md"), ("report/report.md", "report/report.zh.md")]
REPORTS = [HERE / name for name in BOTH[1]]
CHINESE = json.loads((HERE / "report" / "chinese.json").read_text("utf-8"))
CSV = "".join(path.read_text("utf-8") for path in (HERE / "report").glob("*.csv"))
ids = files(".md")


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_links_resolve(page):
    text = re.sub(r"```.*?```|`[^`]*`", "", page.read_text("utf-8"), flags=re.DOTALL)
    links = re.findall(r"\]\(([^)#]*)(?:#([^)]*))?\)", text)
    for target, heading in links:
        if not target.startswith("http"):
            found = page.parent / target if target else page
            assert found.exists(), f"{page.name} links {target}"
            if heading:
                heads = re.findall(r"^#+ (.*)$", found.read_text("utf-8"), re.MULTILINE)
                assert heading in [
                    re.sub(r"[^\w -]", "", h).lower().replace(" ", "-") for h in heads
                ]


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_no_provenance_in_pages(page):
    text = re.sub(r"https?://\S+", "", page.read_text("utf-8"))
    words = (
        r"\bZen ?\d|\bMilan\b|\bcommit [0-9a-f]{7}|outside the project|beside it\b|/work\b|/tmp\b"
    )
    assert not re.findall(words, text)
    assert not re.findall(r"\b(?=[0-9a-f]*\d)(?=[0-9a-f]*[a-f])[0-9a-f]{7,40}\b", text)


@pytest.mark.parametrize("name", BOTH[0])
def test_readme_is_short(name):
    assert len((HERE / name).read_text("utf-8").splitlines()) <= 200


def test_the_readmes_lead_to_each_other():
    for name, other in (BOTH[0], BOTH[0][::-1]):
        assert f"]({other})" in "".join((HERE / name).read_text("utf-8").splitlines()[:3])


def test_pages_agree_with_the_data():
    tables.main(["--check"])


@pytest.fixture
def copy(tmp_path, monkeypatch) -> Path:
    """The pages and what they are made of, apart from the project, which stays as it is."""
    folder = tmp_path / "report"
    folder.mkdir()
    for form in ("*.csv", "*.md", "*.json", "*.txt"):
        for path in (HERE / "report").glob(form):
            (folder / path.name).write_bytes(path.read_bytes())
    if (HERE / "report" / "analysis").is_dir():
        shutil.copytree(HERE / "report" / "analysis", folder / "analysis")
    for name in BOTH[0]:
        (tmp_path / name).write_bytes((HERE / name).read_bytes())
    monkeypatch.setattr(tables, "HERE", folder)
    return folder


def test_a_changed_number_is_noticed(copy):
    """In a page, and in the data."""
    tables.main(["--check"])
    best = tables.mean(tables.pick("best", "test"), "i2t_r1")
    pages = ("../README.md", "../README.zh.md", "report.md", "report.zh.md", "ablations.md")
    for page in (copy / name for name in pages):
        before = page.read_text("utf-8")
        assert best in before
        page.write_text(before.replace(best, "99.9"), "utf-8")
        with pytest.raises(UserError, match=page.name):
            tables.main(["--check"])
        page.write_text(before, "utf-8")
    runs = copy / "runs.csv"
    lines = runs.read_text("utf-8").splitlines()
    last = [line for line in lines if line.startswith("best,recipe")][-1]
    newer = re.sub(r",\d+,(20\d\d-)", r",99,\1", last)  # the version stands before the date
    assert newer != last
    runs.write_text(f"{runs.read_text('utf-8')}{newer}\n", "utf-8")
    with pytest.raises(UserError, match=r"README\.md"):
        tables.main(["--check"])


def test_check_ends_in_one_line():
    script = [sys.executable, str(HERE / "report" / "tables.py"), "--check", "--nonsense"]
    done = subprocess.run(script, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1


def test_a_mark_of_nothing_is_refused():
    for mark in ("<!-- table: nothing --><!-- end -->", "<!-- table: seeds --><!-- end -->"):
        with pytest.raises(UserError, match="table"):
            tables.MARKED.sub(tables.fill, mark)


def test_means_and_versions(monkeypatch):
    """The newest version alone counts, the last of two alike, and a mean is that of its seeds."""
    rows = [("0", "3", "50"), ("0", "4", "10"), ("0", "4", "20"), ("1", "4", "31")]
    keys = {"run": "r", "split": "s"}
    data = [{**keys, "seed": s, "version": v, "i2t_r1": x} for s, v, x in rows]
    monkeypatch.setattr(tables, "read", lambda name: data)
    assert tables.mean(tables.pick("r", "s"), "i2t_r1") == "25.5"
    assert tables.seeds([{"seed": "0-2"}, {"seed": "7"}]) == "4"


@pytest.mark.parametrize("name", ["report.md", "report.zh.md", "ablations.md"])
def test_decimals_of_the_prose_are_in_the_data(name):
    text = re.split("## (?:References|参考文献)", (HERE / "report" / name).read_text("utf-8"))[0]
    text = re.sub(r"```.*?```", "", tables.MARKED.sub("", text), flags=re.DOTALL)
    text = re.sub(
        r"`[^`]*`|^    .*$|\([^)]*\.(?:md|png|csv)[^)]*\)|^#.*$", "", text, flags=re.MULTILINE
    )
    for number in re.findall(r"(?<![A-Za-z\d.×])\d+\.\d+(?![A-Za-z\d.]|\s*million)", text):
        assert number in CSV, f"{name}: {number} stands in no row of report/*.csv"


@pytest.fixture(scope="module")
def flags() -> set[str]:
    """Every flag of the scripts."""
    runs = [
        subprocess.Popen([sys.executable, f"{name}.py", "--help"], cwd=HERE, stdout=-1, text=True)
        for name in SCRIPTS
    ]
    return set(re.findall(r"--[a-z][\w-]*", "".join(run.communicate()[0] for run in runs)))


@pytest.mark.parametrize("name", [name for both in BOTH for name in both])
def test_pages_name_flags_that_exist(name, flags):
    named = re.findall(r"(?<![\w-])--[a-z][a-z-]*", (HERE / name).read_text("utf-8"))
    assert named and not {*named} - flags - {"--index-url"}  # pip's


@pytest.mark.parametrize("name", BOTH[0])
def test_readme_names_files_that_exist(name):
    """Requirements, recipes, scripts that are run or named by their path."""
    text = (HERE / name).read_text("utf-8")
    named = re.findall(r"requirements[\w-]*\.txt|`\w+\.py`|`[\w/]+/[\w.]+\.(?:py|md|csv)`", text)
    named += [f"recipes/{recipe}.txt" for recipe in re.findall(r"--recipe ([a-z-]+)", text)]
    named += re.findall(r"python ([\w/]+\.py)", text)
    assert not [file for file in named if not (HERE / file.strip("`")).exists()]


def test_readme_lists_every_script():
    """Every script is in its tree, and no other; several may share a line."""
    tree = README.split("How the code is laid out")[1].split("```")[1]
    listed, folder = set(), ""
    for line in filter(None, tree.splitlines()):
        words = line.split()
        folder = words[0] if words[0].endswith("/") else folder if line[0] == " " else ""
        scripts = [word for word in words if word.endswith(".py")]
        assert words[: len(scripts)] == scripts
        listed |= {folder + name for name in scripts}
    assert listed == {*files(".py")}


# ----------------------------------------------------------------------- the report, twice


def parts_of(page: Path, form: str) -> list[str]:
    return re.findall(form, page.read_text("utf-8"), re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("both", BOTH, ids=lambda both: both[0])
def test_both_languages_have_the_same_tables(both):
    """The same tables in the same order, each with as many lines, cells and the same numbers."""
    english, chinese = (parts_of(HERE / name, tables.MARKED.pattern) for name in both)
    assert english and [found[1] for found in english] == [found[1] for found in chinese]
    for one, other in zip(english, chinese, strict=True):
        cells = [[row.count(" | ") for row in table[2].splitlines()] for table in (one, other)]
        assert cells[0] == cells[1], one[1]
        numbers = (re.findall(r"\d+\.\d+", t[2]) for t in (one, other))
        assert sorted(next(numbers)) == sorted(next(numbers)), one[1]


def test_both_reports_have_the_same_parts():
    """Figures, quoted code, formula, cited references, depth of headings."""
    quoted = r"^```python$(.*?)^```$"
    for form in (r"!\[[^\]]*\]\(([^)]*)\)", quoted, r"^    \S.*?$", r"^(#+) "):
        assert parts_of(REPORTS[0], form) == parts_of(REPORTS[1], form)
    cited = [sorted(parts_of(page, r"\[(\d+(?:, \d+)*)\]")) for page in REPORTS]
    assert cited[0] == cited[1]
    lists = [parts_of(page, r"^\d+\. .*?$") for page in REPORTS]
    assert len(lists[0]) > 20 and lists[0] == lists[1]


@pytest.mark.parametrize("page", REPORTS, ids=BOTH[1])
def test_five_sections_and_references(page):
    heads = parts_of(page, r"^## (.*?)$")
    assert [head[:2] for head in heads[:5]] == ["1.", "2.", "3.", "4.", "5."]
    assert len(heads) == 6


def stands_in(quoted: list[str], source: list[str], first: int) -> int | None:
    """The line after the quoted ones, which stand in the source as they are, or all indented."""
    for i in range(first, len(source) - len(quoted) + 1):
        lines = source[i : i + len(quoted)]
        depth = len(lines[0]) - len(lines[0].lstrip()) - len(quoted[0]) + len(quoted[0].lstrip())
        if lines == [" " * depth + line if line else "" for line in quoted]:
            return i + len(quoted)
    return None


@pytest.mark.parametrize("page", REPORTS, ids=BOTH[1])
def test_quoted_code_stands_in_the_source(page):
    """Line by line and in its order; `...` stands for lines left out."""
    blocks = parts_of(page, r"^<!-- code: (\w+\.py) -->\n```python\n(.*?)^```$")
    assert len(blocks) == page.read_text("utf-8").count("```python") > 5
    for name, code in blocks:
        source, place = (HERE / name).read_text("utf-8").splitlines(), 0
        for piece in re.split(r"^ *\.\.\.\n", code, flags=re.MULTILINE):
            place = stands_in(piece.splitlines(), source, place)
            assert place is not None, f"{name} has no such lines:\n{piece}"


def test_quoted_code_that_is_not_there_is_noticed():
    source = ["def f(x):", "    y = x", "    return y"]
    assert stands_in(["y = x", "return y"], source, 0) == 3
    for lines in (["y = x "], ["y = x", "    return y"], ["return y", "y = x"], ["y = z"]):
        assert stands_in(lines, source, 0) is None
    assert stands_in(["y = x"], source, 2) is None


def test_the_reports_name_the_defaults():
    size, epochs, batch, rate = (
        PER_DATA[flag][1] for flag in ("image_size", "epochs", "batch_size", "lr")
    )
    english, chinese = (page.read_text("utf-8") for page in REPORTS)
    power = f"{rate:.0e}".replace("e-0", "e-")
    for text in (f"{size} x {size} pixels", f"{epochs} epochs of batches of {batch}", power):
        assert text in english
    for text in (f"{size} x {size} 像素", f"共 {epochs} 轮，每批 {batch} 张", f"学习率 {power}"):
        assert text in chinese


# --------------------------------------------------------------- Task 4's tables, in Chinese

ROW = {"direction": "t2i", "kind": "what it speaks of", "span": "", "images": 90, "r1": 5, "r5": 9}
ROW |= {"queries": 400, "r1_low": 4, "r1_high": 6, "medr": 80, "finding": "", "against_all": 0}
ROW |= {"r10": 20.04, "r10_low": 18, "r10_high": 22.46}
GROUPS = [
    ROW | {"kind": "all", "group": "all"},
    ROW | {"group": "dogs", "finding": "better", "against_all": 8.26},
    ROW | {"kind": "colour", "group": "red", "finding": "worse", "against_all": -3.14},
    ROW | {"kind": "typical", "group": "1 of 4 (lowest)", "finding": "worse", "against_all": -2},
    ROW | {"kind": "colour", "group": "none of these", "finding": "worse", "against_all": -1},
    ROW | {"group": "snow", "finding": "no difference seen", "against_all": 9.9},
    ROW | {"group": "sport", "finding": "better", "against_all": 1.5, "direction": "i2t"},
    ROW | {"kind": findings.LEAD, "group": "10 of 10 (highest)", "finding": "better", "r1": 61.7},
    ROW | {"kind": findings.LEAD, "group": "1 of 10 (lowest)", "finding": "worse", "r1": 1.2},
]
WORD = {"direction": "t2i", "images": 50, "times_low": 0.5, "times_high": 0.9}
WORD_ROWS = [
    WORD | {"word": "snow", "times": 0.7, "finding": "found sooner", "holds_for_all": "no"},
    WORD | {"word": "surfer", "times": 0.412, "finding": "found sooner", "holds_for_all": "yes"},
    WORD | {"word": "two", "times": 1.2, "finding": "found later", "holds_for_all": "no"},
    WORD | {"word": "smiling", "times": 1.9, "finding": "found later", "holds_for_all": "no"},
    WORD | {"word": "a", "times": 3, "finding": "no difference seen", "holds_for_all": "no"},
]
SUMMARY = [
    {"direction": "t2i", "measure": "hub share", "value": 7.13, "low": "", "high": ""},
    {"direction": "t2i", "measure": "misses", "value": 4321, "low": "", "high": ""},
    {"direction": "t2i", "measure": "misses accepted", "value": 12.34, "low": 11, "high": 13.06},
    {"direction": "i2t", "measure": "rank against lead", "value": -0.004, "low": "", "high": ""},
    {"direction": "i2t", "measure": "others accepted", "value": 0.4, "low": 0.3, "high": 0.5},
    {"direction": "both", "measure": "modality gap", "value": 0.625, "low": "", "high": ""},
]
EPOCHS = [{"epoch": i, "train_loss": 4 - i / 8, "mean_recall": i} for i in range(1, 16)]


def write_analysis(folder: Path, name: str, **changes: list[dict]) -> None:
    """What evaluate.py --analysis writes, as far as the tables read it."""
    rows = {"groups": GROUPS, "words": WORD_ROWS, "summary": SUMMARY, "epochs": EPOCHS} | changes
    for file, lines in rows.items():
        path = folder / "analysis" / name / f"{file}.csv"
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w", encoding="utf-8-sig", newline="") as out:
            table = csv.DictWriter(out, list(lines[0]))
            table.writeheader()
            table.writerows(lines)


def filled(mark: str, language: str = "") -> list[list[str]]:
    """A table's lines of cells, without its heads."""
    fill = tables.fill_chinese if language else tables.fill
    text = tables.MARKED.sub(fill, f"<!-- table: {mark} --><!-- end -->")
    lines = text.partition("-->")[2].rpartition("<!--")[0].strip("\n").split("\n")
    return [line.strip("| ").split(" | ") for line in lines if "---" not in line][1:]


WORSE = "colour: red -3.1; typical: lowest quarter -2.0; colour: none named -1.0"
WORSE_CHINESE = "颜色: 红 -3.1; 典型程度: 最低的四分之一 -2.0; 颜色: 都没有提到 -1.0"


def test_preferences(copy):
    """Findings alone, the farthest from all first; in Chinese the same."""
    write_analysis(copy, "mine")
    assert filled("analysis preferences / mine") == [
        ["mine", "text to image", "dogs +8.3", WORSE],
        ["mine", "image to text", "sport +1.5", "nothing seen"],
    ]
    assert filled("analysis preferences / mine", "zh") == [
        ["mine", "文搜图", "狗 +8.3", WORSE_CHINESE],
        ["mine", "图搜文", "运动 +1.5", "未见差别"],
    ]


def test_groups_side_by_side(copy):
    """A group that one model tells is shown of both; what is too few to tell says so."""
    few = GROUPS[2] | {"finding": "too few", "against_all": "", "r10_low": "", "r10_high": ""}
    write_analysis(copy, "one")
    write_analysis(copy, "two", groups=[GROUPS[0], GROUPS[5], few])
    share = "20.0 [18.0, 22.5]"
    assert filled("analysis groups t2i / one / two") == [
        ["all", "400", share, share],
        ["dogs", "400", f"{share}, +8.3 **+**", "-"],
        ["colour: none named", "400", f"{share}, -1.0 **−**", "-"],
        ["typical: lowest quarter", "400", f"{share}, -2.0 **−**", "-"],
        ["colour: red", "400", f"{share}, -3.1 **−**", "20.0, - ?"],
    ]


def test_words_causes_and_epochs(copy):
    write_analysis(copy, "mine")
    first, other = filled("analysis words / mine")
    assert first[2:] == ["surfer ×0.41\\*; snow ×0.70", "smiling ×1.90; two ×1.20"]
    assert other[2:] == ["nothing seen"] * 2
    chinese = filled("analysis words / mine", "zh")[0]
    assert chinese[1:] == ["文搜图", *first[2:]]  # the words of captions stay
    assert filled("analysis summary / mine") == [
        ["text to image: hub share", "7.1"],
        ["text to image: misses", "4,321"],
        ["text to image: misses accepted", "12.3 [11.0, 13.1]"],
        ["image to text: rank against lead", "0.00"],
        ["modality gap", "0.62"],
        ["text to image: R@1 of the surest tenth", "61.7 [4.0, 6.0]"],
        ["text to image: R@1 of the least sure tenth", "1.2 [4.0, 6.0]"],
        ["image to text: R@1 of the surest tenth", "-"],
        ["image to text: R@1 of the least sure tenth", "-"],
    ]
    rows = filled("analysis epochs / mine")
    assert [row[1] for row in rows] == ["1", "4", "7", "9", "12", "15"]
    assert rows[-1] == ["mine", "15", "2.12", "15.0"]


def test_what_is_not_measured_is_said(copy):
    shutil.rmtree(copy / "analysis", ignore_errors=True)
    mark = "<!-- table: analysis summary / first / other --><!-- end -->"
    assert "not measured yet: first; other" in tables.MARKED.sub(tables.fill, mark)
    assert "尚未测量: first; other" in tables.MARKED.sub(tables.fill_chinese, mark)
    write_analysis(copy, "first")
    text = tables.MARKED.sub(tables.fill, mark)
    assert "not measured yet: other" in text and "| what | first |" in text
    (copy / "analysis" / "first" / "words.csv").unlink()
    with pytest.raises(UserError, match=r"words\.csv"):
        tables.MARKED.sub(tables.fill, mark)


def test_a_changed_analysis_is_noticed(copy):
    write_analysis(copy, "best")
    with pytest.raises(UserError, match=r"report\.md"):
        tables.main(["--check"])


def test_the_leak_is_shown_once_it_is_measured(copy):
    """One model on both splits, the public report's figures beside it."""
    assert filled("leak")[-1] == ["not measured yet: by caption line"] or len(filled("leak")) == 3
    row = tables.pick("plain", "test")[0]
    row = {k: v for k, v in row.items() if k != "bought"} | {"i2t_r1": "31.9", "version": "99"}
    row |= {"run": "plain, split by caption line", "command": "python train.py --data leak"}
    with (copy / "runs.csv").open("a", encoding="utf-8", newline="") as file:
        csv.DictWriter(file, list(row)).writerow(row)
    ours, leaky, public = filled("leak")
    assert (ours[1], leaky[1], public[1]) == ("by image", "by caption line", "by caption line")
    assert leaky[0] == "**`python train.py --data leak`**" and leaky[2].startswith("31.9 / ")
    assert public[2:4] == ["33.2", "31.6"]
    assert "public report" not in tables.results()  # its figures stand beside no split by image


def test_the_tables_words_have_chinese():
    """Heads, groups, measures and findings; the words of captions stay."""
    words = {kind for kind in WORDS["themes"]} - {"what it speaks of"}
    words |= {name for lists in WORDS["themes"].values() for name in lists}
    words |= {*analysis.MEANING, *analysis.WAYS.values(), "people", *findings.NAMES.values()}
    heads = [parts_of(page, r"^\| ([^\n]*) \|\n\| ---") for page in REPORTS]
    words |= {cell for head in heads[0] for cell in head.split(" | ")}
    assert not words - {*CHINESE}
    cells = {cell for head in heads[1] for cell in head.split(" | ")}
    assert all(re.search(r"[\u4e00-\u9fff]", cell) for cell in cells), cells


def test_no_caption_of_the_data_is_committed():
    """git passes over the files of an analysis that hold captions."""
    names = [f"{name}.csv" for name in ("near_misses", "hubs", *findings.FILES)]
    paths = [f"report/analysis/best/{name}" for name in names]
    done = subprocess.run(
        ["git", "check-ignore", "--no-index", *paths], cwd=HERE, capture_output=True, text=True
    )
    if done.returncode > 1:
        pytest.skip("not a git checkout")
    assert done.stdout.split() == paths[:2]


def test_requirements():
    """The assignment's seven and nothing else; every package of the others has a lower bound."""
    names = {}
    for path in HERE.glob("requirements*.txt"):
        lines = [line.split("#")[0].strip() for line in path.read_text("utf-8").splitlines()]
        names[path.stem] = {re.split(r"[>=;<]", line)[0] for line in lines if line}
        assert all(line.startswith("-r ") or ">=" in line for line in lines if line)
    seven = {"torch", "torchvision", "numpy", "pillow", "matplotlib", "scikit-learn", "tqdm"}
    assert names["requirements"] == seven
    files = {name for name in names["requirements-dev"] if name.startswith("-r ")}
    assert files == {f"-r {name}.txt" for name in names if name != "requirements-dev"}


def test_a_run_stands_in_one_group():
    """A second run of the same name would take the first one's place in every table."""
    groups = {}
    for row in tables.read("runs.csv"):
        groups.setdefault((row["run"], row["split"]), set()).add(row["group"])
    assert not {run: found for run, found in groups.items() if len(found) > 1}
