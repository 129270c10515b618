"""Search: what is found is what scores best, embeddings are kept, and the page lets no one in."""

import io
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import ROOT, photo, write_photos
from PIL import Image

import search
from support import desk, finder, index
from support.checkpoint import load_checkpoint, save_checkpoint
from support.command import UserError
from support.embedding import load_trained

COUNT = 24
HOST = "http://127.0.0.1:8017"


@pytest.fixture
def folder(tmp_path) -> Path:
    write_photos(tmp_path / "pictures", COUNT)
    return tmp_path / "pictures"


@pytest.fixture
def find(tiny_run, tmp_path, capsys):
    """Runs search.main in the terminal; (lines of stdout, stderr)."""

    def call(*words: object) -> tuple[list[str], str]:
        capsys.readouterr()
        fixed = ["--cache", tmp_path / "cache", "--workers", 0, "--device", "cpu"]
        search.main([str(word) for word in [tiny_run / "best.pt", *words, *fixed]])
        out, err = capsys.readouterr()
        return out.splitlines(), err

    return call


@pytest.fixture
def embedded(monkeypatch) -> list[int]:
    """How many pictures each call of `embed_files` was given."""
    counts, real = [], index.embed_files

    def counted(model, workers, paths):
        counts.append(len(paths))
        return real(model, workers, paths)

    monkeypatch.setattr(index, "embed_files", counted)
    return counts


# ---------------------------------------------------------------------------- in a terminal


def test_what_is_found_is_what_scores_best(find, folder, tiny_run):
    lines, _ = find("--images", folder, "--query", "a red dog", "--top-k", COUNT)
    trained = load_trained([tiny_run / "best.pt"], "cpu")
    paths = sorted(folder.iterdir())
    images = index.embed_files(trained.members[0], 0, paths)
    scores = images @ trained.embed_texts(["a red dog"])[0]
    expected = sorted(zip(scores, paths, strict=True), key=lambda pair: -pair[0])
    assert [line.split(" ", 1)[1] for line in lines] == [str(path) for _, path in expected]
    assert [float(line.split()[0]) for line in lines] == pytest.approx(
        [score for score, _ in expected], abs=6e-4
    )
    few, _ = find("--images", folder, "--query", "a red dog", "--top-k", 5)
    assert few == lines[:5]


def test_paths_alone_for_pipes(find, folder):
    lines, err = find("--images", folder, "--query", "a dog", "--paths", "--top-k", 99)
    assert sorted(lines) == sorted(map(str, folder.iterdir()))
    assert "--top-k 99: there are 24, all are shown" in err


def test_a_picture_is_a_query_too_and_parts_join(find, folder):
    chosen = folder / "photo_007.jpg"
    lines, _ = find("--images", folder, "--query", chosen, "--top-k", 2)
    assert lines[0] == f"1.000 {chosen}"
    joined, _ = find("--images", folder, "--query", f"{chosen} + a dog", "--top-k", 2)
    assert joined[0] != lines[0]
    away, _ = find("--images", folder, "--query", f"- {chosen}", "--top-k", COUNT)
    assert away[-1] == f"-1.000 {chosen}"


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ("a dog + ", "has an empty part"),
        ("", "has an empty part"),
        ("missing.jpg", "missing.jpg is not there"),
        ("?!", "holds no word"),
        ("a dog - a dog", "cancel out"),
        ("zebra quagga", "never stood in the training captions"),
        (f"{'x' * 5000}", "never stood"),
    ],
)
def test_queries_that_cannot_be(find, folder, query, message):
    with pytest.raises(UserError, match=message):
        find("--images", folder, "--query", query)


def test_terms():
    terms = finder.terms_of("a black-and-white dog + snow - two men", files=False)
    assert [(term.sign, term.text) for term in terms] == [
        (1, "a black-and-white dog"),
        (1, "snow"),
        (-1, "two men"),
    ]
    assert finder.terms_of("search.py", files=False)[0].file is None  # not for the page
    assert finder.terms_of("- dog", files=True) == [finder.Term(-1, "dog")]


def test_several_queries_are_told_apart(find, folder):
    lines, err = find("--images", folder, "--query", "a dog", "--query", "a zebra", "--top-k", 3)
    assert len(lines) == 6
    assert "--query a dog\n" in err and "zebra never stood" in err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--paths"], "--paths needs a --query"),
        (["--images", "x", "--data", "y", "--query", "z"], "takes the place"),
        (["--images", "x", "--splits", "random", "--query", "z"], "takes the place"),
        (["--images", "nowhere", "--query", "a dog"], "is not a folder"),
        (["--query", "a dog", "--top-k", "0"], "--top-k"),
    ],
)
def test_flags_that_do_not_go_together(find, words, message):
    with pytest.raises(UserError, match=message):
        find(*words)


def test_flags_without_effect_are_said(find, folder):
    _, err = find("--images", folder, "--query", "a dog", "--port", 80)
    assert "no effect on this run: --port" in err


def test_the_data_it_was_trained_on(find, photo_data):
    lines, err = find("--query", "a red dog", "--top-k", 99)
    assert len(lines) == 40 and all(Path(line.split()[1]).is_file() for line in lines)
    assert "were trained on" in err
    tests, err = find("--query", "a red dog", "--top-k", 99, "--split", "test")
    assert 0 < len(tests) < 40 and "were trained on" not in err
    assert [line for line in lines if line in tests] == tests


def test_without_its_data_too(find, folder, monkeypatch):
    def gone(_folder):
        raise UserError("gone")

    monkeypatch.setattr(search, "read_folder", gone)
    lines, _ = find("--images", folder, "--query", "a dog")
    assert len(lines) == 10


# --------------------------------------------------------------------- embeddings are kept


def test_only_new_or_changed_files_are_embedded(find, folder, embedded):
    first, _ = find("--images", folder, "--query", "a dog", "--top-k", COUNT)
    assert embedded == [COUNT]
    again, _ = find("--images", folder, "--query", "a dog", "--top-k", COUNT)
    assert embedded == [COUNT] and again == first
    photo(100).save(folder / "new.png")
    photo(101).save(folder / "photo_003.jpg")
    (folder / "photo_004.jpg").unlink()
    (folder / "photo_005.jpg").rename(folder / "moved.jpg")
    (folder / "photo_006.jpg").touch()
    lines, _ = find("--images", folder, "--query", "a dog", "--top-k", 99, "--paths")
    assert embedded == [COUNT, 2]
    assert sorted(lines) == sorted(map(str, folder.iterdir()))
    kept = [path for path in (folder.parent / "cache").glob("search-*.npz")]
    sizes = {len(index.read_kept(path)[0]) for path in kept}
    assert COUNT in sizes  # the two that are gone have dropped out


def test_another_file_of_the_same_length_and_time_is_noticed(find, folder, embedded):
    find("--images", folder, "--query", "a dog")
    for name, other in (("a.bmp", 50), ("b.bmp", 51)):
        photo(other).save(folder / name)
    find("--images", folder, "--query", "a dog")
    stat = (folder / "a.bmp").stat()
    shutil.copyfile(folder / "b.bmp", folder / "a.bmp")
    photo(52).save(folder / "a.bmp")
    os.utime(folder / "a.bmp", ns=(stat.st_atime_ns, stat.st_mtime_ns))
    find("--images", folder, "--query", "a dog")
    assert embedded == [COUNT, 2, 1]


def test_other_weights_are_another_index(find, folder, embedded, tiny_run, tmp_path):
    find("--images", folder, "--query", "a dog")
    content = load_checkpoint(tiny_run / "best.pt")
    weights = {**content["model"], "logit_scale": content["model"]["logit_scale"] + 1}
    save_checkpoint(tmp_path / "other.pt", {**content, "model": weights})
    find(tmp_path / "other.pt", "--images", folder, "--query", "a dog")
    assert embedded == [COUNT, COUNT]
    shutil.copyfile(tiny_run / "best.pt", tmp_path / "copy.pt")
    find(tmp_path / "copy.pt", "--images", folder, "--query", "a dog")
    assert embedded == [COUNT, COUNT]


def test_what_was_embedded_before_a_stop_is_kept(tmp_path):
    names, made = [f"{i:02d}" for i in range(3 * index.BLOCK)], []

    def embed(block: list[int]) -> np.ndarray:
        if len(made) == 2:
            raise KeyboardInterrupt
        made.append(block)
        return np.array(block, np.float32)[:, None]

    kept = tmp_path / "kept.npz"
    with pytest.raises(KeyboardInterrupt):
        index.embeddings_of(names, kept, embed, "")
    made.clear()
    found = index.embeddings_of(names, kept, embed, "")
    assert [len(block) for block in made] == [index.BLOCK]
    assert found[:, 0].tolist() == list(range(len(names)))
    kept.write_bytes(b"damaged")
    made.clear()
    with pytest.raises(KeyboardInterrupt):
        index.embeddings_of(names, kept, embed, "")


def test_equal_files_are_embedded_once_and_broken_ones_left_out(find, folder, embedded):
    shutil.copyfile(folder / "photo_000.jpg", folder / "twin.jpg")
    (folder / "broken.jpg").write_bytes(b"no picture")
    lines, err = find("--images", folder, "--query", "a dog", "--top-k", 99, "--paths")
    assert embedded == [COUNT + 1] and len(lines) == COUNT + 1
    assert "1 of 26 pictures cannot be read (broken.jpg)" in err
    for path in folder.iterdir():
        path.write_bytes(b"no picture")
    with pytest.raises(UserError, match="not one of the pictures"):
        find("--images", folder, "--query", "a dog")


@pytest.mark.skipif(sys.platform != "linux", reason="names of other bytes")
def test_letters_that_a_console_lacks_are_escaped_beside_other_bytes(folder, tiny_run, tmp_path):
    odd, letters = os.fsencode(folder) + b"/\xff.jpg", folder / "\u732b.jpg"
    for name in (odd, letters):
        shutil.copyfile(folder / "photo_000.jpg", name)
    words = [sys.executable, "search.py", tiny_run / "best.pt", "--images", folder, "--paths"]
    words += ["--query", "a dog", "--top-k", "26", "--cache", tmp_path / "cache", "--workers", "0"]
    env = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(words, capture_output=True, cwd=ROOT, timeout=120, env=env)
    assert done.returncode == 0, done.stderr
    assert {odd, os.fsencode(folder) + b"/\\u732b.jpg"} <= {*done.stdout.splitlines()}


@pytest.mark.skipif(sys.platform != "linux", reason="names of other bytes")
def test_a_name_of_any_bytes(folder, tiny_run, tmp_path):
    odd = os.fsencode(folder) + b"/\xff.jpg"
    shutil.copyfile(folder / "photo_000.jpg", odd)
    words = [sys.executable, "search.py", tiny_run / "best.pt", "--images", folder, "--paths"]
    words += ["--query", "a dog", "--top-k", "25", "--cache", tmp_path / "cache", "--workers", "0"]
    done = subprocess.run(words, capture_output=True, cwd=ROOT, timeout=120)
    assert done.returncode == 0 and len(done.stdout.splitlines()) == COUNT + 1
    assert odd in done.stdout.splitlines()
    assert search.plain("a\x1b[31m\udcff\n.jpg") == "a\ufffd[31m\udcff\ufffd.jpg"


# ------------------------------------------------------------------------ when nothing fits


def test_nothing_fits_by_what_unrelated_captions_get():
    generator = np.random.default_rng(0)
    vectors = generator.normal(size=(120, 16)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    images, texts = vectors[:20], vectors[20:]
    shelf = SimpleNamespace(images={"m": images}, texts={})
    found = finder.Finder("m", None, ["m"], shelf)
    owner = np.full(100, -1)
    owner[0] = int((texts[0] @ images.T).argmax())
    found.measure_usual([texts], owner)
    best = (texts @ images.T).max(1)
    best[0] = np.sort(texts[0] @ images.T)[-2]
    assert np.allclose(found.usual, np.sort(best))
    term = [finder.Term(1, "a dog")]
    assert "nothing here seems to fit 'a dog'" in found.doubt(term, np.quantile(best, 0.1))
    assert found.doubt(term, np.quantile(best, 0.3)) == ""
    assert found.doubt([*term, *term], -1.0) == ""
    assert found.doubt([finder.Term(1, "x.jpg", Path("x.jpg"))], -1.0) == ""


def test_eight_thousand_pictures_are_searched_at_once():
    """Process time, for machines that do other things too; the text tower comes to it."""
    images = np.random.default_rng(0).normal(size=(8091, 512)).astype(np.float32)
    shelf = SimpleNamespace(images={"m": images}, texts={})
    found, begun = finder.Finder("m", None, ["m"], shelf), time.process_time()
    for row in range(10):
        assert len(found.find(images[row], 60)) == 60
    assert (time.process_time() - begun) / 10 < 0.03


# ---------------------------------------------------------------------------------- the page


@pytest.fixture
def shelf_of(tiny_run, tmp_path):
    """(shelf, finders) of the tiny run on a folder, as the page gets them."""

    def build(*words: object):
        taken = {}
        pytest.importorskip("flask")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("support.page.serve", lambda *parts: taken.update(parts=parts))
            fixed = ["--cache", tmp_path / "cache", "--workers", 0, "--device", "cpu"]
            search.main([str(word) for word in [tiny_run / "best.pt", *words, *fixed]])
        return taken["parts"][:2]

    return build


@pytest.fixture
def client(shelf_of, folder):
    from support.page import make_app

    app = make_app(*shelf_of("--images", folder), 8017)
    app.config["TESTING"] = True
    client = app.test_client()
    real = client.open

    def opened(path: str, **more):
        return real(path, **{"base_url": HOST, **more})

    client.open = opened
    return client


def jpeg(number: int = 3) -> bytes:
    file = io.BytesIO()
    photo(number).save(file, "JPEG", quality=92)
    return file.getvalue()


def test_the_page_answers(client, find, folder):
    assert client.get("/").status_code == 200
    start = client.get("/api/start").json
    assert start["count"] == COUNT and len(start["models"]) == 1
    every = client.get("/api/search").json
    assert [hit["picture"] for hit in every["results"]] == [str(i) for i in range(COUNT)]
    found = client.get("/api/search?text=a+red+dog&k=5").json
    lines, _ = find("--images", folder, "--query", "a red dog", "--top-k", 5)
    assert [f"{hit['score']:.3f} {hit['name']}" for hit in found["results"]] == lines
    about = client.get("/api/about?picture=7").json
    assert about["name"].endswith("photo_007.jpg") and len(about["near"]) == 12
    assert about["captions"] and not any(caption["own"] for caption in about["captions"])
    scores = [caption["score"] for caption in about["captions"]]
    assert scores == sorted(scores, reverse=True)
    labels = client.get("/api/labels?picture=7&labels=red%0Agreen%0Ared").json["labels"]
    assert {name for name, _ in labels} == {"red", "green"}
    assert sum(share for _, share in labels) == pytest.approx(1)
    why = client.get("/api/why?picture=7&text=a+red+dog").json
    assert [word for word, _ in why["words"]] == ["a", "red", "dog"]
    assert np.shape(why["places"]) == (7, 7) and np.ptp(why["places"]) > 0
    picture = client.get("/picture/7/320")
    assert picture.mimetype == "image/jpeg"
    assert Image.open(io.BytesIO(picture.data)).size == (48, 40)


def test_own_captions_on_the_page(shelf_of):
    shelf, finders = shelf_of()
    about = desk.Desk(shelf, finders).about(0, "0")
    assert sum(caption["own"] for caption in about["captions"]) == 5
    assert not any(hit["picture"] == "0" for hit in about["near"])


@pytest.mark.parametrize(
    "path",
    [
        "/picture/../../etc/passwd/320",
        "/picture/..%2f..%2fetc%2fpasswd/320",
        "/picture/%2fetc%2fpasswd/320",
        "/picture/-1/320",
        "/picture/24/320",
        "/picture/1e1/320",
        "/picture/٣/320",
        "/picture/u1/320",
        "/picture/0/999999",
        "/static/page.html",
        "/support/page.html",
        "/../search.py",
        "/api/about?picture=../../etc/passwd",
        "/api/search?picture=99999999999999999999",
    ],
)
def test_nothing_but_pictures_of_the_folder(client, path):
    answer = client.get(path)
    assert answer.status_code == 404 and "error" in answer.json
    assert b"root:" not in answer.data


def test_a_text_never_opens_a_file(client, folder):
    answer = client.get("/api/search", query_string={"text": str(folder / "photo_000.jpg")})
    assert answer.status_code in (200, 400)
    assert not any(hit["score"] > 0.999 for hit in answer.json.get("results", []))


def test_a_file_that_went_away(client, folder):
    (folder / "photo_009.jpg").unlink()
    assert client.get("/picture/9/320").status_code == 404
    (folder / "photo_010.jpg").write_text("<script>alert(1)</script>")
    assert client.get("/picture/10/320").status_code == 404


@pytest.mark.parametrize(
    "host", ["evil.example", "127.0.0.1.evil.example:8017", "127.0.0.1:80", "evil@127.0.0.1:8017"]
)
def test_another_host_gets_nothing(client, host):
    for path in ("/", "/api/start", "/picture/0/320"):
        assert client.get(path, headers={"Host": host}).status_code in (400, 403)
    assert client.get("/", headers={"Host": "localhost:8017"}).status_code == 200


@pytest.mark.parametrize(
    "headers",
    [{"Origin": "http://evil.example"}, {"Origin": "null"}, {"Sec-Fetch-Site": "cross-site"}],
)
def test_another_site_gets_nothing(client, headers):
    assert client.get("/picture/0/320", headers=headers).status_code == 403
    assert client.post("/api/upload", data=jpeg(), headers=headers).status_code == 403


def test_uploads_are_pictures_within_a_size(client, monkeypatch):
    first = client.post("/api/upload", data=jpeg(7)).json["picture"]
    found = client.get(f"/api/search?picture={first}&k=1").json["results"]
    assert found[0]["name"].endswith("photo_007.jpg") and found[0]["score"] > 0.999
    assert client.get(f"/api/why?picture={first}&text=a+dog").status_code == 200
    for data in (b"", b"no picture", b"<svg xmlns='http://www.w3.org/2000/svg'/>", jpeg()[:90]):
        answer = client.post("/api/upload", data=data)
        assert answer.status_code == 400 and "no picture" in answer.json["error"]
    answer = client.post("/api/upload", data=bytes(20 * 2**20 + 1))
    assert answer.status_code == 413 and "20 MB" in answer.json["error"]
    for _ in range(desk.UPLOADS):
        last = client.post("/api/upload", data=jpeg()).json["picture"]
    assert client.get(f"/picture/{last}/320").status_code == 200
    assert client.get(f"/picture/{first}/320").status_code == 404


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("/api/search?text=%3F", "holds no word"),
        ("/api/search?text=" + "a+" * 600, "1,000 characters"),
        ("/api/search?text=dog&model=7", "model 7"),
        ("/api/search?text=dog&model=x", "model x"),
        ("/api/labels?picture=0&labels=dog", "2 to 100"),
        ("/api/labels?picture=0&labels=" + "%0A".join(map(str, range(101))), "2 to 100"),
    ],
)
def test_mistakes_are_told_in_a_line(client, path, message):
    answer = client.get(path)
    assert answer.status_code == 400 and message in answer.json["error"]


def test_the_page_holds_nothing_of_the_data_and_may_load_nothing(client):
    page = client.get("/")
    policy = page.headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy
    text = page.get_data(as_text=True)
    assert "innerHTML" not in text and "http:" not in text.replace("http://www.w3.org", "")
    assert "{{nonce}}" not in text and client.get("/").data != page.data
    answer = client.get("/api/search", query_string={"text": "<b>dog</b> + dog"})
    assert answer.mimetype == "application/json"
    assert answer.headers["X-Content-Type-Options"] == "nosniff"


def test_checkpoints_are_switched_between(shelf_of, tiny_run, folder):
    _, finders = shelf_of(tiny_run / "last.pt", "--images", folder)
    names = [found.name for found in finders]
    assert names == ["tiny/best.pt and tiny/last.pt", "tiny/best.pt", "tiny/last.pt"]
    assert finders[0].images.shape[1] == sum(found.images.shape[1] for found in finders[1:])


def test_a_missing_flask_is_one_line(find, folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "flask", None)
    with pytest.raises(UserError, match=r"requirements-search\.txt"):
        find("--images", folder)


def test_a_taken_port_is_one_line(shelf_of, folder):
    import socket

    from support.page import serve

    shelf, finders = shelf_of("--images", folder)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"--port {port}"):
            serve(shelf, finders, port)
