"""The two pages in a real browser: typed into, clicked, and nothing asked of another machine."""

import json
import re
import shutil
import threading
import time
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from conftest import TINY, photo, write_photos

import search
import train
import visualize

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)
DRIVER = shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(
    not (CHROMIUM and DRIVER), reason="no chromium and chromedriver (Debian: chromium-driver)"
)
HOSTILE = "<img src=x onerror=alert(1)></script><script>alert(2)</script> dog"
COUNT = 24


class Browser:
    """A headless Chromium, its waiting, and what it asked for."""

    def __init__(self, width: int, height: int, dark: bool):
        webdriver = pytest.importorskip("selenium.webdriver")
        options = webdriver.ChromeOptions()
        options.binary_location = CHROMIUM
        flags = "headless=new no-sandbox disable-dev-shm-usage disable-gpu disable-extensions"
        for flag in [*flags.split(), "disable-background-networking", "disable-sync"]:
            options.add_argument(f"--{flag}")
        logs = {"performance": "ALL", "browser": "ALL"}
        options.set_capability("goog:loggingPrefs", logs)
        service = webdriver.ChromeService(executable_path=DRIVER)
        self.driver = webdriver.Chrome(options=options, service=service)
        self.requested: list[str] = []
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 700}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        look = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": look})

    def all(self, selector: str) -> list:
        return self.driver.find_elements("css selector", selector)

    def one(self, selector: str):
        return self.driver.find_element("css selector", selector)

    def js(self, code: str, *values: object) -> object:
        return self.driver.execute_script(f"return {code}", *values)

    def wait(self, condition, seconds: float = 60):
        """What `condition()` gives once it is true; elements may be replaced meanwhile."""
        from selenium.common.exceptions import WebDriverException

        end = time.monotonic() + seconds
        while time.monotonic() < end:
            try:
                if value := condition():
                    return value
            except WebDriverException:
                pass
            time.sleep(0.05)
        raise AssertionError(f"waited {seconds} s: {self.one('body').text[:500]}")

    def text(self, selector: str) -> str:
        return self.one(selector).text

    def keys(self, *names: str) -> None:
        from selenium.webdriver.common.keys import Keys

        for name in names:
            self.driver.switch_to.active_element.send_keys(getattr(Keys, name, name))

    def check(self, host: str | None) -> None:
        """Nothing went to any other host (to none at all where it is None), nothing failed."""
        for entry in self.driver.get_log("performance"):
            message = json.loads(entry["message"])["message"]
            if message["method"] in ("Network.requestWillBeSent", "Network.webSocketCreated"):
                params = message["params"]
                self.requested.append(params.get("request", params)["url"])
        foreign = [
            url
            for url in self.requested
            if urlsplit(url).scheme not in ("data", "blob", "file", "about", "chrome")
            and urlsplit(url).netloc != host
        ]
        assert self.requested and not foreign
        bad = [log["message"] for log in self.driver.get_log("browser") if log["level"] == "SEVERE"]
        assert not [message for message in bad if "400 (BAD REQUEST)" not in message]

    def fits(self) -> bool:
        """Nothing is wider than the window."""
        return self.js("document.documentElement.scrollWidth <= innerWidth")


@pytest.fixture
def browse():
    """browse(width, height, dark) opens a browser, which is closed in the end."""
    opened = []

    def start(width: int = 1200, height: int = 800, dark: bool = False) -> Browser:
        opened.append(Browser(width, height, dark))
        return opened[-1]

    yield start
    for browser in opened:
        browser.driver.quit()


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """The folder of a run on photographs, whose captions hold what a page must not run."""
    place = tmp_path_factory.mktemp("hostile")
    write_photos(place / "data" / "images", COUNT)
    colours = ("red", "green", "blue", "white", "black", "yellow")
    with (place / "data" / "captions.txt").open("w", encoding="utf-8") as file:
        file.write("image,caption\n")
        for i in range(COUNT):
            file.write(f"photo_{i:03d}.jpg,a dog on {colours[i % 6]} ground\n")
            file.write(f'photo_{i:03d}.jpg,"{HOSTILE if i % 2 else f"a {colours[i % 6]} ball"}"\n')
    words = ["--data", place / "data", "--out", place / "run", "--cache", place / "cache"]
    assert train.main([str(word) for word in [*words, "--epochs", 1, *TINY]]) == 0
    return place


@pytest.fixture
def served(run, monkeypatch):
    """The address of search.py's page on the data of the run; two checkpoints."""
    pytest.importorskip("flask")
    from werkzeug.serving import make_server

    from support import page

    servers = []

    def serve(shelf, finders, _port):
        server = make_server("127.0.0.1", 0, None, threaded=True)
        server.app = page.make_app(shelf, finders, server.server_port)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)

    monkeypatch.setattr(page, "serve", serve)
    words = [run / "run" / "best.pt", run / "run" / "last.pt", "--cache", run / "cache"]
    search.main([str(word) for word in [*words, "--workers", 0, "--device", "cpu"]])
    yield f"127.0.0.1:{servers[0].server_port}"
    servers[0].shutdown()
    servers[0].server_close()


def test_typing_and_choosing_by_keyboard(served, browse):
    browser = browse()
    browser.driver.get(f"http://{served}/")
    browser.wait(lambda: len(browser.all("#grid img")) == COUNT)
    browser.one("#text").send_keys("a dog")  # as half of the captions begin
    browser.wait(lambda: "best first" in browser.text("#status"))
    scores = [float(score.text) for score in browser.all("#grid b")]
    assert len(scores) == COUNT and scores == sorted(scores, reverse=True)
    assert all(image.get_attribute("alt") for image in browser.all("img[src]"))
    browser.keys("ARROW_DOWN", "ARROW_RIGHT")
    second = browser.all("#grid button")[1]
    assert browser.driver.switch_to.active_element == second
    name = second.get_attribute("title")
    browser.keys("ENTER")
    browser.wait(lambda: browser.text("#name") == name)
    assert len(browser.all("#captions .own")) == 2
    browser.wait(lambda: browser.js("document.getElementById('large').naturalWidth") == 48)
    browser.keys("ESCAPE")
    browser.wait(lambda: not browser.js("document.getElementById('one').open"))
    browser.keys("/")
    assert browser.js("document.activeElement.id") == "text"
    browser.check(served)


def test_what_matters_labels_and_nearest(served, browse):
    browser = browse()
    browser.driver.get(f"http://{served}/")
    browser.wait(lambda: browser.all("#grid button"))[1].click()
    captions = browser.wait(lambda: browser.all("#captions button"))
    hostile = next(button for button in captions if "<img src=x" in button.text)
    hostile.click()
    browser.wait(lambda: "Warm words" in browser.text("#said"))
    words = [word.text.split("\n")[0] for word in browser.all("#words > span")]
    assert words == HOSTILE.split() and hostile.get_attribute("aria-pressed") == "true"
    painted = "[...document.getElementById('heat').getContext('2d').getImageData(0, 0, 7, 7).data]"
    assert any(browser.js(painted))
    browser.one("#labels").send_keys("dog\nball")
    browser.one("#ask button").click()
    meters = browser.wait(lambda: browser.all("#meters meter"))
    assert sum(float(meter.get_attribute("value")) for meter in meters) == pytest.approx(1)
    before = browser.text("#name")
    browser.all("#near button")[0].click()
    browser.wait(lambda: browser.text("#name") not in ("", before))
    browser.one("#alike").click()
    browser.wait(lambda: browser.one("#like").is_displayed() and browser.all("#grid b"))
    browser.wait(lambda: browser.text("#grid b") == "1.000")
    browser.one("#like button").click()
    browser.wait(lambda: not browser.all("#grid b"))
    assert not browser.js("document.querySelectorAll('[onerror], body script:not([nonce])').length")
    browser.check(served)


def test_a_picture_dropped_in_and_checkpoints_switched(served, browse, tmp_path):
    browser = browse()
    photo(7).save(tmp_path / "mine.png")
    (tmp_path / "notes.txt").write_text("no picture")
    browser.driver.get(f"http://{served}/")
    browser.wait(lambda: browser.all("#grid button"))
    browser.one("#file").send_keys(str(tmp_path / "notes.txt"))
    browser.wait(lambda: "no picture" in browser.text("#status"))
    drop = """(async () => { const blob = await (await fetch(arguments[0])).blob(),
      file = new File([blob], 'x.jpg'), data = new DataTransfer(); data.items.add(file);
      document.dispatchEvent(new DragEvent('drop', {dataTransfer: data, bubbles: true})); })()"""
    browser.js(drop, f"http://{served}/picture/7/1024")
    browser.wait(lambda: browser.text("#name") == "your picture")
    browser.wait(lambda: browser.all("#near button"))
    browser.one("#close").click()
    first = browser.wait(lambda: browser.one("#grid button"))
    assert first.get_attribute("title").endswith("photo_007.jpg")
    models = [option.text for option in browser.all("#model option")]
    assert models == ["run/best.pt and run/last.pt", "run/best.pt", "run/last.pt"]
    browser.one("#text").send_keys("dog")
    browser.all("#model option")[2].click()
    browser.wait(lambda: "best first" in browser.text("#status"))
    browser.check(served)


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_narrow_and_in_both_lights(served, browse, dark):
    browser = browse(360, 700, dark)
    browser.driver.get(f"http://{served}/")
    browser.wait(lambda: browser.all("#grid button"))
    assert browser.fits()
    colour = browser.js("getComputedStyle(document.body).backgroundColor")
    assert (max(map(int, re.findall(r"\d+", colour)[:3])) < 80) == dark
    browser.one("#grid button").click()
    browser.wait(lambda: browser.all("#captions button"))
    assert browser.fits() and browser.js("one.scrollWidth <= one.clientWidth")
    browser.one("#close").click()
    browser.check(served)


# --------------------------------------------------------------------- predictions.html


@pytest.fixture(scope="module")
def written(run) -> Path:
    words = [run / "run" / "best.pt", "--html", "--split", "train", "--out", run / "out"]
    more = ["--cache", run / "cache", "--workers", 0, "--device", "cpu"]
    visualize.main([str(word) for word in [*words, *more]])
    return run / "out" / "predictions.html"


def test_every_query_with_its_results(written, browse):
    browser = browse()
    browser.driver.get(written.as_uri())
    content = browser.js("data")
    rows = browser.all(".row")
    assert rows and len(content["captions"]) == 2 * len(content["pictures"])
    assert f"of {len(content['captions'])} queries" in browser.text("#count")
    ranks = content["texts"]["rank"]
    for i, row in enumerate(rows[:4]):
        true = row.find_elements("css selector", "figure.true")
        assert f"rank {ranks[i]}" in row.text and len(true) == 1
        assert f"{ranks[i]}: " in true[0].text
    browser.one("#word").send_keys("dog green")
    browser.wait(lambda: f"of {len(ranks)}" in browser.text("#count"))
    found = [caption for caption in content["captions"] if "dog" in caption and "green" in caption]
    assert browser.text("#count").startswith(f"{len(found)} of")
    assert browser.text(".row .query div") == found[0]
    browser.one("#word").clear()
    browser.keys("x", "BACK_SPACE")
    browser.js("(order.value = 'worst', order.dispatchEvent(new Event('change')))")
    worst = browser.js("rows.map(i => data.texts.rank[i])")
    assert worst == sorted(ranks, reverse=True)
    browser.js("(rank.value = '2-5', rank.dispatchEvent(new Event('change')))")
    assert len(browser.js("rows")) == sum(2 <= rank <= 5 for rank in ranks)
    browser.js("rank.value = '1-Infinity'")
    chosen = content["topic"][5]
    browser.js("(topic.value = arguments[0], topic.dispatchEvent(new Event('change')))", chosen)
    expected = sum(content["topic"][i] == chosen for i in content["owner"])
    assert len(browser.js("rows")) == expected > 0
    browser.js("(topic.value = '', way.value = 'images', way.dispatchEvent(new Event('change')))")
    assert len(browser.js("rows")) == len(content["pictures"])
    assert browser.all(".row ol li") and browser.one(".row img").get_attribute("alt")
    assert not browser.js("document.querySelectorAll('[onerror]').length")
    browser.check(None)


def test_the_page_narrow_and_dark(written, browse):
    browser = browse(360, 700, dark=True)
    browser.driver.get(written.as_uri())
    assert browser.all(".row") and browser.fits()
    browser.check(None)


def test_five_thousand_queries_stay_fluid(written, browse, tmp_path):
    """Few rows exist at once, and neither a jump nor a letter takes long."""
    page = written.read_text("utf-8")
    before, data, after = re.split(r"(?<=nonce=\"\w{32}\">)(\{.*\})(?=</script>)", page)
    content = json.loads(data)
    times = 5000 // len(content["captions"]) + 1
    pictures = len(content["pictures"])
    content["owner"] = [i + n * pictures for n in range(times) for i in content["owner"]]
    for key in ("names", "captions", "topic", "pictures"):
        content[key] = content[key] * times
    for way in ("texts", "images"):
        content[way] = {key: value * times for key, value in content[way].items()}
    text = json.dumps(content).replace("<", "\\u003c")
    (tmp_path / "many.html").write_text(before + text + after, "utf-8")
    browser = browse()
    browser.driver.get((tmp_path / "many.html").as_uri())
    browser.wait(lambda: browser.all(".row"))
    assert browser.js("rows.length") >= 5000 and len(browser.all(".row")) < 20
    timed = """(() => { const begun = performance.now();
      for (let i = 0; i < 20; i++) { list.scrollTop = i * 40000; draw(); list.offsetHeight; }
      const scrolled = (performance.now() - begun) / 20, then = performance.now();
      word.value = 'dog'; choose(); return [scrolled, performance.now() - then]; })()"""
    scrolled, filtered = browser.js(timed)
    assert scrolled < 100 and filtered < 1000  # far more than it takes, for a busy machine
    assert len(browser.all(".row")) < 20
