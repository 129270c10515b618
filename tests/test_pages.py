"""The pages: their tables are the data's, their links and flags exist, their promises hold."""

import re
import subprocess
import sys

import pytest

from report import tables
from support.command import HERE, UserError

OTHERS = (".", "checkpoints/", "shared/", "tests/")  # neither pages nor scripts of the project


def files(ending: str) -> list[str]:
    """The project's own files, as paths from its root."""
    names = (path.relative_to(HERE).as_posix() for path in HERE.rglob(f"*{ending}"))
    return sorted(name for name in names if not name.startswith(OTHERS))


PAGES = [HERE / name for name in files(".md")]
README = (HERE / "README.md").read_text("utf-8")
SCRIPTS = ("dataset", "train", "evaluate", "visualize", "search", "report/benchmark")
SCRIPTS += ("report/tables",)
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


def test_readme_is_short():
    assert len(README.splitlines()) <= 200


def test_pages_agree_with_the_data():
    tables.main(["--check"])


def test_a_changed_number_is_noticed(tmp_path, monkeypatch):
    """In a page, and in the data; the project itself stays as it is."""
    copy = tmp_path / "report"
    copy.mkdir()
    for path in [*(HERE / "report").glob("*.csv"), *(HERE / "report").glob("*.md")]:
        (copy / path.name).write_bytes(path.read_bytes())
    (tmp_path / "README.md").write_text(README, "utf-8")
    monkeypatch.setattr(tables, "HERE", copy)
    tables.main(["--check"])
    best = tables.mean(tables.pick("best", "test"), "i2t_r1")
    for page in (tmp_path / "README.md", copy / "ablations.md"):
        before = page.read_text("utf-8")
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


@pytest.mark.parametrize("name", ["report.md", "ablations.md"])
def test_decimals_of_the_prose_are_in_the_data(name):
    text = (HERE / "report" / name).read_text("utf-8").split("## References")[0]
    text = tables.MARKED.sub("", text)
    text = re.sub(
        r"`[^`]*`|^    .*$|\([^)]*\.(?:md|png|csv)[^)]*\)|^#.*$", "", text, flags=re.MULTILINE
    )
    for number in re.findall(r"(?<![\w.])\d+\.\d+(?![\w.]|\s*million)", text):
        assert number in CSV, f"{name}: {number} stands in no row of report/*.csv"


def test_readme_names_what_exists():
    """Every flag of the README is one of a script; every script is in its tree, and no other."""
    runs = [
        subprocess.Popen([sys.executable, f"{name}.py", "--help"], cwd=HERE, stdout=-1, text=True)
        for name in SCRIPTS
    ]
    known = set(re.findall(r"--[a-z][\w-]*", "".join(run.communicate()[0] for run in runs)))
    foreign = {"--index-url", "--format", "--prefix"}  # of pip and git
    assert not {*re.findall(r"(?<![\w-])--[a-z][\w-]*", README)} - known - foreign
    tree = README.split("How the code is laid out")[1].split("```")[1]
    listed, folder = set(), ""
    for indent, name in re.findall(r"^( *)(\S+)", tree, re.MULTILINE):
        folder = name if name.endswith("/") else folder if indent else ""
        listed |= {folder + name} if name.endswith(".py") else set()
    assert listed == {*files(".py")}


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
