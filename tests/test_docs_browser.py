"""The built documentation in a headless browser: no page is wider than the screen, every link of
the navigation answers, formulas are rendered, and nothing is loaded from elsewhere.

The browser is Chromium or Chrome on the path, or the one that ``DOCS_BROWSER`` names; the tests
skip without one, and without Sphinx. ``DOCS_HTML`` names a site that is built already.
"""

from __future__ import annotations

import fcntl
import functools
import http.server
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.browser]

DOCS = Path(__file__).resolve().parents[1] / "docs"
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
WIDTHS = (1400, 420)
PARTS = ("Start", "Guides", "Results", "Reference")


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The directory of the built pages."""
    if built := os.environ.get("DOCS_HTML"):
        return Path(built)
    for module in ("sphinx", "myst_parser", "furo"):
        pytest.importorskip(module)
    output = tmp_path_factory.mktemp("html")
    command = [sys.executable, "-m", "sphinx", "-W", "-q", "-b", "html", DOCS, output]
    built = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    return output


class Browser:
    """A headless Chromium, driven over the pipe of its DevTools protocol."""

    def __init__(self, program: str, profile: Path):
        read, self._to = os.pipe()
        self._from, write = os.pipe()
        options = ["--headless=new", "--remote-debugging-pipe", f"--user-data-dir={profile}"]
        options += ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"]
        # Higher than the descriptors 3 and 4, which are the protocol's.
        ends = read, write
        read, write = (fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10) for end in ends)
        for end in ends:
            os.close(end)

        def attach():
            os.dup2(read, 3)
            os.dup2(write, 4)

        self._process = subprocess.Popen(
            [program, *options, "about:blank"],
            preexec_fn=attach,
            close_fds=False,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(read)
        os.close(write)
        self._number, self._buffer, self.events = 0, b"", []
        self._session = None
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")

    def close(self):
        self._session = None
        self.call("Browser.close")
        self._process.wait(30)
        os.close(self._to)
        os.close(self._from)

    def _message(self):
        while b"\0" not in self._buffer:
            part = os.read(self._from, 1 << 20)
            assert part, "the browser has ended"
            self._buffer += part
        text, _, self._buffer = self._buffer.partition(b"\0")
        return json.loads(text)

    def call(self, method, **parameters):
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        while True:
            found = self._message()
            if found.get("id") == self._number:
                assert "error" not in found, (method, found)
                return found["result"]
            self.events.append(found)

    def wait_for_load(self):
        while not any(event["method"] == "Page.loadEventFired" for event in self.events):
            self.events.append(self._message())

    def open(self, url):
        """Load a page; what the browser reports of it is in ``events``."""
        self.events.clear()
        self.call("Page.navigate", url=url)
        self.wait_for_load()

    def run(self, script):
        """The value of a script, or of what it promises."""
        found = self.call(
            "Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True
        )
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def width(self, pixels):
        size = {"width": pixels, "height": 900, "deviceScaleFactor": 1, "mobile": False}
        self.call("Emulation.setDeviceMetricsOverride", **size)

    def complaints(self, own):
        """Errors on the console, answers that are none, and requests that leave ``own``."""
        found = []
        for event in self.events:
            parameters = event.get("params", {})
            if event["method"] == "Runtime.exceptionThrown":
                found.append(parameters["exceptionDetails"]["text"])
            if event["method"] == "Log.entryAdded" and parameters["entry"]["level"] == "error":
                found.append(parameters["entry"]["text"] + parameters["entry"].get("url", ""))
            if event["method"] == "Network.requestWillBeSent":
                url = parameters["request"]["url"]
                if not url.startswith((own, "data:", "blob:", "about:")):
                    found.append(f"asks for {url}")
            if event["method"] == "Network.responseReceived":
                answer = parameters["response"]
                if answer["status"] >= 400:
                    found.append(f"{answer['url']}: {answer['status']}")
        return [each for each in found if "favicon.ico" not in each]


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def address(site):
    handler = functools.partial(Quiet, directory=str(site))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    named = os.environ.get("DOCS_BROWSER")
    program = next(filter(None, map(shutil.which, [named] if named else BROWSERS)), None)
    if program is None:
        pytest.skip("no Chromium on the path; DOCS_BROWSER names one")
    started = Browser(program, tmp_path_factory.mktemp("profile"))
    yield started
    started.close()


def pages(site):
    """Every page, the sources of modules and what is downloaded aside."""
    found = sorted(path.relative_to(site).as_posix() for path in site.rglob("*.html"))
    return [page for page in found if not page.startswith(("_modules/", "_static/", "_downloads/"))]


# What stands out to the right, for the message.
TOO_WIDE = """(() => {
  document.querySelectorAll('details').forEach(each => each.open = true);
  const wide = document.scrollingElement.scrollWidth - window.innerWidth;
  if (wide <= 0) return '';
  const out = [...document.querySelectorAll('body *')].filter(
    each => each.getBoundingClientRect().right > window.innerWidth + 1);
  return wide + ' pixels, ' + out.slice(0, 8).map(
    each => each.tagName + '.' + each.className + ' ' + each.textContent.trim().slice(0, 40)
  ).join(' | ');
})()"""

FORMULAS = """(async () => {
  const formulas = document.querySelectorAll('.math').length;
  if (!formulas) return [0, 0, 0];
  await MathJax.startup.promise;
  return [formulas, document.querySelectorAll('.math mjx-container').length,
          document.querySelectorAll('mjx-merror').length];
})()"""


def test_pages_fit_the_screen_and_load_nothing_from_elsewhere(site, address, browser):
    found, formulas = [], 0
    for page in pages(site):
        for width in WIDTHS:
            browser.width(width)
            browser.open(address + page)
            here, shown, wrong = browser.run(FORMULAS)
            if shown < here or wrong:
                found.append(f"{page}: {shown} of {here} formulas, {wrong} with errors")
            formulas += here
            if too_wide := browser.run(TOO_WIDE):
                found.append(f"{page} at {width}: {too_wide}")
            found += [f"{page}: {complaint}" for complaint in browser.complaints(address)]
    assert not found, "\n".join(found)
    assert formulas > 20


def test_every_link_of_the_navigation_answers(address, browser):
    browser.width(WIDTHS[0])
    browser.open(address + "index.html")
    captions = "[...document.querySelectorAll('.sidebar-tree .caption')].map(e => e.textContent)"
    assert browser.run(captions) == list(PARTS)
    links = "document.querySelectorAll('.sidebar-tree .toctree-l1 > a.reference')"
    number = browser.run(f"{links}.length")
    assert number > 15
    for place in range(number):
        browser.open(address + "index.html")
        text = browser.run(f"{links}[{place}].textContent")
        browser.events.clear()
        browser.run(f"{links}[{place}].click()")
        browser.wait_for_load()
        assert not browser.complaints(address), text
        # The page of the link is open, and marked in the navigation.
        heading = browser.run("document.querySelector('h1').firstChild.textContent")
        assert heading.split() == text.split()
        current = "document.querySelector('.sidebar-tree .current-page > a').textContent"
        assert browser.run(current).split() == text.split()


def test_pages_name_nothing_from_elsewhere(site):
    loads = re.compile(r"<(?:script|link|img|iframe)\b[^>]*\b(?:src|href)=\"(https?:)?//[^\"]*\"")
    found = [
        f"{page}: {match[0]}"
        for page in pages(site)
        for match in loads.finditer((site / page).read_text())
    ]
    assert not found, "\n".join(found)


def test_the_smallest_screen_can_scroll_a_wide_table(address, browser):
    """The container scrolls, and the first column stays where it is."""
    browser.width(WIDTHS[1])
    browser.open(address + "results_mnist.html")
    kept = browser.run("""(() => {
      document.querySelectorAll('details').forEach(each => each.open = true);
      const box = [...document.querySelectorAll('details .table-wrapper')].find(
        each => each.scrollWidth > each.clientWidth + 200);
      const cell = box.querySelector('td');
      const before = cell.getBoundingClientRect().left;
      box.scrollLeft = 200;
      return [box.scrollLeft, cell.getBoundingClientRect().left - before];
    })()""")
    assert kept == [200, 0]
