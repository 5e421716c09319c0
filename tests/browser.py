"""A real browser without a window, and the web demo in a process of its own, for tests and for the screenshots."""

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
FLAGS = ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
         "--disable-background-networking", "--disable-component-update", "--disable-sync", "--hide-scrollbars",
         "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1")


def missing() -> str | None:
    """What the browser tests lack here, or None."""
    if not any(map(shutil.which, BROWSERS)) or not shutil.which("chromedriver"):
        return "no Chromium with chromedriver here (Debian: apt-get install chromium chromium-driver)"
    return None


@contextmanager
def browser(width: int = 1280, height: int = 860, language: str = "en-US") -> Iterator:
    """A fresh headless Chromium that reaches this machine only."""
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = next(filter(None, map(shutil.which, BROWSERS)))
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        for flag in (*FLAGS, f"--user-data-dir={profile}", f"--window-size={width},{height}", f"--lang={language}"):
            options.add_argument(flag)
        options.add_experimental_option("prefs", {"intl.accept_languages": language})
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        driver = webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))
        try:
            yield driver
        finally:
            driver.quit()


@contextmanager
def demo(save_dir: Path, *flags: str) -> Iterator[str]:
    """The web demo with the weights of `save_dir` in a process of its own; → its URL."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, str(ROOT / "scripts/web_demo.py"), f"--save_dir={save_dir}", f"--port={port}",
               "--device=cpu", *flags]
    environment = os.environ | {"STREAMLIT_SERVER_HEADLESS": "true", "PYTHONUTF8": "1"}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    try:
        wait_for(f"http://127.0.0.1:{port}/_stcore/health", process)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def wait_for(url: str, process: subprocess.Popen, seconds: float = 120) -> None:
    ends = time.monotonic() + seconds
    while time.monotonic() < ends:
        if process.poll() is not None:
            raise RuntimeError(f"the demo ended with status {process.returncode}:\n{process.stdout.read().decode()}")
        try:
            urllib.request.urlopen(url, timeout=5).close()
            return
        except OSError:
            time.sleep(0.1)
    raise TimeoutError(f"{url} does not answer")


class Page:
    """What a person does on the demo's page. Widgets are named by their keys."""

    def __init__(self, driver):
        self.driver = driver

    def open(self, url: str, expected: str) -> None:
        """Open a fresh session at `url` and wait for the widget `expected`."""
        self.driver.get(url)
        self.wait_for(expected)

    @property
    def text(self) -> str:
        return self.driver.find_element("css selector", "body").text

    def wait_for(self, key: str):
        return self.wait_for_css(f".st-key-{key}")

    def wait_for_css(self, selector: str, seconds: float = 150):
        from selenium.webdriver.support.ui import WebDriverWait

        return WebDriverWait(self.driver, seconds, 0.1).until(
            lambda driver: next(iter(driver.find_elements("css selector", selector)), None), f"no {selector}")

    def wait_for_text(self, text: str, seconds: float = 150) -> None:
        from selenium.webdriver.support.ui import WebDriverWait

        WebDriverWait(self.driver, seconds, 0.1).until(lambda _: text in self.text, f"no {text!r}")

    def click(self, key: str) -> None:
        self.do(lambda: self.wait_for_css(f".st-key-{key} button").click())

    def type(self, key: str, text: str, kind: str = "input") -> None:
        """Replace the text of a field and press Enter."""
        from selenium.webdriver.common.keys import Keys

        def fill():
            field = self.wait_for_css(f".st-key-{key} {kind}:not([disabled])")
            field.send_keys(Keys.CONTROL, "a")
            field.send_keys(text, Keys.ENTER)

        self.do(fill)

    def ask(self, text: str) -> None:
        self.type("typed", text, "textarea")

    def choose_tool(self, name: str) -> None:
        self.type("tools", name)
        self.wait_for_css(f".st-key-tools [data-baseweb=tag], .st-key-tools [title='{name}']")

    def choose_url(self, url: str) -> None:
        self.do(lambda: self.wait_for_css(".st-key-source button ~ button").click())
        self.type("url", url)

    @staticmethod
    def do(action) -> None:
        """Act, again if the page redrew what was acted on at that very moment."""
        from selenium.common.exceptions import ElementNotInteractableException, StaleElementReferenceException

        for attempt in range(20):
            try:
                return action()
            except (StaleElementReferenceException, ElementNotInteractableException):
                if attempt == 19:
                    raise
                time.sleep(0.1)

    def watch_for_jumps(self) -> None:
        """Count Chrome's layout shifts from now on (https://web.dev/articles/cls)."""
        self.driver.execute_script(
            "window.jumps = 0; new PerformanceObserver(list => list.getEntries().forEach(entry => {"
            "window.jumps += entry.hadRecentInput ? 0 : entry.value})).observe({type: 'layout-shift'})")

    def jumps(self) -> float:
        return self.driver.execute_script("return window.jumps")

    def complaints(self) -> list[str]:
        """What the browser's console says went wrong, a request that left this machine among it."""
        return [entry["message"] for entry in self.driver.get_log("browser") if entry["level"] == "SEVERE"]

    def settle(self) -> None:
        """Wait until nothing is being written and the text of the page has been the same for three looks."""
        same, before = 0, None
        while same < 3:
            time.sleep(0.7)
            now = self.text
            busy = self.driver.find_elements("css selector", ".st-key-stop")
            same, before = (same + 1 if now == before and not busy else 0), now

    def save(self, path: Path) -> None:
        self.driver.save_screenshot(str(path))
