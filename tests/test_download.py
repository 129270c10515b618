"""download.py against a server on the loopback: whole, cut, wrong and hostile archives."""

import hashlib
import io
import re
import socket
import stat
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from sources import download
from sources.download import download_flickr8k
from support.command import UserError

IMAGE = hashlib.sha256(b"x").digest() * 4000  # 128,000 bytes
FILES = {"Flicker8k_Dataset/1.jpg": IMAGE, "Flickr8k.token.txt": b"1.jpg#0\tA dog .\n"}


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *words):
        pass

    def do_GET(self):
        server, body, asked = self.server, self.server.body, self.headers.get("Range")
        server.asked.append(asked)
        if self.path.startswith("/gone"):
            return self.send_error(404)
        start = 0
        if asked and server.ranges:
            start = int(re.fullmatch(r"bytes=(\d+)-", asked)[1])
            if start >= len(body):
                self.send_response(416)
                self.send_header("Content-Range", f"bytes */{len(body)}")
                self.send_header("Content-Length", "0")
                return self.end_headers()
            start += server.shift
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
        else:
            self.send_response(200)
        if server.length != "none":
            self.send_header("Content-Length", str(server.length or len(body) - start))
        sent = body[start:][: server.cut]
        server.sent.append(len(sent))  # before the client can answer, and ask anew
        self.end_headers()
        self.wfile.write(sent)
        self.close_connection = True


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.body, server.ranges, server.cut, server.length = zipped(FILES), True, None, None
        server.shift, server.asked, server.sent = 0, [], []
        server.url = f"http://127.0.0.1:{server.server_address[1]}/Flickr8k_x.zip"
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture
def folder(tmp_path):
    """DIR, two levels down, and the promise that nothing appears beside it."""
    inside = tmp_path / "deep" / "DIR"
    inside.mkdir(parents=True)
    yield inside
    assert [p.name for p in tmp_path.iterdir()] == ["deep"]
    assert [p.name for p in inside.parent.iterdir()] == ["DIR"]


def zipped(files, mode=zipfile.ZIP_STORED):
    """A zip of {name or ZipInfo: bytes} or of (name, bytes) pairs."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", mode) as archive:
        for name, data in files.items() if isinstance(files, dict) else files:
            archive.writestr(name, data)
    return buffer.getvalue()


def left(folder):
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


def check_whole(folder, files):
    assert files == [folder / name for name in FILES]
    for name, data in FILES.items():
        assert (folder / name).read_bytes() == data
    assert left(folder) == [".Flickr8k_x.done", *FILES]


def test_whole_and_again(server, folder):
    digest = hashlib.sha256(server.body).hexdigest().upper()
    urls = [f"{server.url}#sha256={digest}"]
    check_whole(folder, download_flickr8k(folder, urls))
    check_whole(folder, download_flickr8k(folder, urls))
    assert server.asked == [None]  # not fetched twice
    (folder / "Flickr8k.token.txt").unlink()
    kept = (folder / "Flicker8k_Dataset/1.jpg").stat().st_mtime_ns
    check_whole(folder, download_flickr8k(folder, urls))
    assert server.asked == [None, None]
    assert (folder / "Flicker8k_Dataset/1.jpg").stat().st_mtime_ns == kept


def test_no_length(server, folder):
    server.length = "none"
    check_whole(folder, download_flickr8k(folder, [server.url]))


def cut_off(server, folder):
    server.cut = 50_000
    message = f"50,000 of {len(server.body):,} bytes came.*kept.*same command again to resume"
    with pytest.raises(UserError, match=message):
        download_flickr8k(folder, [server.url])
    part = folder / "Flickr8k_x.zip.part"
    assert part.read_bytes() == server.body[:50_000] and left(folder) == [part.name]
    server.cut = None


def test_resume(server, folder):
    cut_off(server, folder)
    digest = hashlib.sha256(server.body).hexdigest()
    check_whole(folder, download_flickr8k(folder, [f"{server.url}#sha256={digest}"]))
    assert server.asked == [None, "bytes=50000-"]
    assert server.sent == [50_000, len(server.body) - 50_000]


@pytest.mark.parametrize("change", ["no ranges", "other start"])
def test_resume_starts_afresh(server, folder, change):
    cut_off(server, folder)
    server.ranges, server.shift = change != "no ranges", 7
    check_whole(folder, download_flickr8k(folder, [server.url]))
    assert server.sent[-1] == len(server.body)


def test_part_is_whole_or_too_long(server, folder):
    part = folder / "Flickr8k_x.zip.part"
    part.write_bytes(server.body)
    check_whole(folder, download_flickr8k(folder, [server.url]))
    assert server.sent == []  # 416
    (folder / ".Flickr8k_x.done").unlink()
    part.write_bytes(server.body + b"more")
    check_whole(folder, download_flickr8k(folder, [server.url]))
    assert server.sent == [len(server.body)]


def test_other_file_under_the_part(server, folder):
    """The file changed between two attempts: the digest, or else the zip itself, tells."""
    (folder / "Flickr8k_x.zip.part").write_bytes(b"z" * 50_000)
    with pytest.raises(UserError, match="refused and deleted"):
        download_flickr8k(folder, [server.url])
    assert left(folder) == []
    check_whole(folder, download_flickr8k(folder, [server.url]))


def test_wrong_content_length(server, folder):
    server.length = len(server.body) + 10
    with pytest.raises(UserError, match=f"of {server.length:,} bytes came"):
        download_flickr8k(folder, [server.url])
    (folder / "Flickr8k_x.zip.part").unlink()
    server.length = len(server.body) - 10
    with pytest.raises(UserError, match="refused and deleted"):
        download_flickr8k(folder, [server.url])
    assert left(folder) == []


def test_wrong_digest(server, folder):
    for digest in ("sha256=" + "0" * 64, "md5=" + "0" * 32):
        with pytest.raises(UserError, match="digest is"):
            download_flickr8k(folder, [f"{server.url}#{digest}"])
        assert left(folder) == []


def test_unreachable(server, folder):
    with pytest.raises(UserError, match=r"/gone\.zip: .*404.*tsinghua.*--url"):
        download_flickr8k(folder, [server.url.replace("Flickr8k_x", "gone")])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/a.zip"
        with pytest.raises(UserError, match=rf"{url}: .*refused.*--url"):
            download_flickr8k(folder, [url])
    assert left(folder) == []


@pytest.mark.parametrize(
    "url",
    [
        "file:///etc/passwd",
        "ftp://127.0.0.1/a.zip",
        "a.zip",
        "http://",
        "",
        "http://[bad/a.zip",
        "http://127.0.0.1:port/a.zip",
        "http://127.0.0.1/a b.zip",
        "http://127.0.0.1/a.zip#sha256=12",
    ],
)
def test_refused_url(folder, url):
    with pytest.raises(UserError):
        download_flickr8k(folder, [url])
    assert left(folder) == []


def test_full_disk(server, folder, monkeypatch):
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(download.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(UserError, match=r"needs .* free bytes and has 1,000"):
        download_flickr8k(folder, [server.url])
    assert left(folder) == []


def link():
    info = zipfile.ZipInfo("link")
    info.external_attr = (stat.S_IFLNK | 0o777) << 16
    return info


def flagged(body):
    """`body` with the "encrypted" bit set in its central directory."""
    at = body.index(b"PK\x01\x02") + 8
    return body[:at] + b"\x01" + body[at + 1 :]


def declared(body, size):
    """`body` with the first entry's uncompressed size changed in both of its headers."""
    body = bytearray(body)
    for at in (22, body.index(b"PK\x01\x02") + 24):
        body[at : at + 4] = size.to_bytes(4, "little")
    return bytes(body)


HOSTILE = {
    "parent": zipped({"ok.txt": b"ok", "../evil": b"x"}),
    "parents": zipped({"ok.txt": b"ok", "a/../../evil": b"x"}),
    "absolute": zipped({"ok.txt": b"ok", "/abs": b"x"}),
    "drive": zipped({"ok.txt": b"ok", "C:\\evil": b"x"}),
    "drive /": zipped({"ok.txt": b"ok", "C:/evil": b"x"}),
    "backslash": zipped({"ok.txt": b"ok", "a\\..\\..\\evil": b"x"}),
    "folder": zipped({"ok.txt": b"ok", "../evil/": b""}),
    "hidden": zipped({"ok.txt": b"ok", "__MACOSX/../../evil": b"x"}),
    "newline": zipped({"ok.txt": b"ok", "a\nb": b"x"}),
    "no name": zipped({"ok.txt": b"ok", ".": b"x"}),
    "symlink": zipped([("ok.txt", b"ok"), (link(), b"/etc/passwd")]),
    "bomb": zipped({"ok.txt": b"ok", "big": bytes(3_000_000)}, zipfile.ZIP_DEFLATED),
    "encrypted": flagged(zipped({"ok.txt": b"ok"})),
    "not a zip": b"<html>Not the file</html>",
    "empty": b"",
    "cut": zipped(FILES)[:-30],
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile(server, folder, kind):
    server.body = HOSTILE[kind]
    with pytest.raises(UserError, match="is refused and deleted") as caught:
        download_flickr8k(folder, [server.url])
    assert "\n" not in str(caught.value)
    assert left(folder) == [] and list(folder.iterdir()) == []


def test_too_large(server, folder, monkeypatch):
    monkeypatch.setattr(download, "MAX_BYTES", 1000)
    with pytest.raises(UserError, match="too many"):
        download_flickr8k(folder, [server.url])
    assert left(folder) == []


def test_corrupt_entry_leaves_the_files_before_it(server, folder):
    server.body = zipped({"ok.txt": b"ok", "bad.txt": b"good words"}).replace(b"good w", b"evil w")
    with pytest.raises(UserError, match="CRC"):
        download_flickr8k(folder, [server.url])
    assert left(folder) == ["ok.txt"]


@pytest.mark.parametrize("mode", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
@pytest.mark.parametrize("size", [100, 200_000])
def test_lying_size(server, folder, mode, size):
    """Never more bytes than declared, nor fewer."""
    server.body = declared(zipped({"a": IMAGE}, mode), size)
    monkey = pytest.MonkeyPatch()
    with monkey.context() as patch, pytest.raises(UserError):
        patch.setattr(download, "MAX_RATIO", 10**9)
        download_flickr8k(folder, [server.url])
    assert [p for p in folder.iterdir() if p.suffix != ".part"] == []


def test_link_in_the_folder_is_not_followed(server, folder, tmp_path_factory):
    outside = tmp_path_factory.mktemp("outside")
    (folder / "Flicker8k_Dataset").symlink_to(outside)
    with pytest.raises(UserError, match="outside"):
        download_flickr8k(folder, [server.url])
    assert list(outside.iterdir()) == []


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_mac_leftovers_and_duplicates(server, folder):
    names = ["__MACOSX/._1.jpg", "Flicker8k_Dataset/.DS_Store", ".DS_Store", "empty/", "a"]
    server.body = zipped([(name, b"junk") for name in names] + list(FILES.items()) + [("a", b"z")])
    files = download_flickr8k(folder, [server.url])
    assert sorted(files) == sorted(folder / name for name in ["a", *FILES])
    assert left(folder) == [".Flickr8k_x.done", *sorted(FILES), "a"]
    assert (folder / "a").read_bytes() == b"z"


def test_cannot_write(server, tmp_path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(UserError, match="cannot write"):
        download_flickr8k(tmp_path / "file", [server.url])
    server.body = zipped({"a": b"x", "a/b": b"y"})
    with pytest.raises(UserError, match="cannot write"):
        download_flickr8k(tmp_path / "new" / "folder", [server.url])
    assert left(tmp_path / "new" / "folder") == ["Flickr8k_x.zip.part", "a"]


def test_table():
    assert [download.split_url(url)[2] for url in download.ARCHIVES] == [
        "Flickr8k_text",
        "Flickr8k_Dataset",
    ]
    assert all(download.split_url(url)[1] == digest for url, digest in download.ARCHIVES.items())
    assert download.split_url("https://a.b/f/6e5d/?dl=1")[2] == "6e5d"
    assert download.split_url("https://a.b")[2] == "archive"
