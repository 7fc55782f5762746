"""The page made of the notebook, and the notebook in JupyterLab, in Chromium (CHROMIUM names it).

python -m tests.test_browser [TEST…] [--screenshots FOLDER]    pictures are written there
"""

import base64
import io
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import unittest
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from PIL import Image, ImageChops

ROOT = Path(__file__).resolve().parent.parent
NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
CHROMIUM = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)
SCREENSHOTS = None
# Are there over 500 texts; those whose contrast to the background is less than 4.5 (WCAG 2)
CONTRAST = """() => {
  const light = (colour) => colour.match(/[\\d.]+/g).slice(0, 3)
    .map((v) => v <= 10.31 ? v / 3294.6 : ((v / 255 + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0.05);
  const back = (e, colour = e ? getComputedStyle(e).backgroundColor : "rgb(255, 255, 255)") =>
    colour === "rgba(0, 0, 0, 0)" ? back(e.parentElement) : colour;
  const ratio = (e) => light(getComputedStyle(e).color) / light(back(e));
  const texts = [...document.querySelectorAll("body *")].filter((e) => e.checkVisibility()
    && [...e.childNodes].some((node) => node.nodeType === 3 && node.data.trim()));
  const low = texts.filter((e) => Math.max(ratio(e), 1 / ratio(e)) < 4.5);
  return [texts.length > 500, low.map((e) => e.innerText)];
}"""
# Two frames later what was asked for is on the screen.
PAINTED = """() => new Promise((done) => {
    requestAnimationFrame(() => requestAnimationFrame(done));
})"""
# What is wider than its place: cut off, or to be scrolled though it is neither code nor a table
TOO_WIDE = """() => [...document.querySelectorAll("*")].filter((e) => {
  const flow = getComputedStyle(e).overflowX, scrolls = e.closest(".cm-editor, table, .highlight");
  return e.scrollWidth > e.clientWidth + 1 && e.checkVisibility() && (flow === "hidden"
    || e === document.scrollingElement || (flow !== "visible" && !scrolls));
}).map((e) => e.outerHTML.slice(0, 100))"""


def until(condition, seconds, what):
    """Wait for a condition; its value. The limits are generous: a machine may be busy."""
    end = time.monotonic() + seconds
    while not (value := condition()):
        if time.monotonic() > end:
            raise TimeoutError(f"{what}: not within {seconds} s")
        time.sleep(0.1)
    return value


class BrowserTest(unittest.TestCase):
    """A copy of the project, and an empty page in Chromium that records errors."""

    @classmethod
    def setUpClass(cls):
        if not CHROMIUM or not find_spec("playwright"):
            want = "playwright (requirements-dev.txt)" if CHROMIUM else "Chromium: install it"
            print(f"\n*** NOT TESTED in a browser: it needs {want} ***", file=sys.stderr)
            raise unittest.SkipTest(f"needs {want}")
        from playwright.sync_api import sync_playwright

        cls.work = Path(cls.enterClassContext(tempfile.TemporaryDirectory(prefix="vae läb ")))
        hidden = shutil.ignore_patterns(".*", "__pycache__", "benchmark")
        shutil.copytree(ROOT, cls.work, ignore=hidden, dirs_exist_ok=True)
        chromium = cls.enterClassContext(sync_playwright()).chromium
        browser = chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        cls.addClassCleanup(browser.close)
        cls.page, cls.errors = browser.new_page(viewport={"width": 1280, "height": 1000}), []
        cls.page.set_default_timeout(300_000)
        cls.page.on("console", lambda m: m.type == "error" and cls.errors.append(m.text))
        cls.page.on("pageerror", lambda what: cls.errors.append(str(what)))
        cls.page.on("requestfailed", cls.note_failure)

    @classmethod
    def note_failure(cls, request):
        if request.failure != "net::ERR_ABORTED":  # as when JupyterLab corrects a picture's address
            cls.errors.append(str(request))

    def screenshot(self, name, **options):
        if SCREENSHOTS:
            self.page.screenshot(path=Path(SCREENSHOTS) / f"{name}.png", **options)

    def check_slider(self, name, different=5):
        """Keys and mouse choose frames of the sheet, and just these are seen; so many differ."""
        picture = self.page.locator(f"#{name}")
        slider = self.page.locator(f"#{name} + label input")
        picture.scroll_into_view_if_needed()
        self.assertGreater(len(picture.get_attribute("aria-label")), 20)
        self.assertEqual(picture.locator("img").count(), 0)  # the still picture has gone
        self.assertGreater(len(slider.evaluate("e => e.labels[0].textContent.trim()")), 5)
        url = picture.evaluate("e => getComputedStyle(e).backgroundImage")
        sheet = Image.open(io.BytesIO(base64.b64decode(re.search("base64,([^\"')]+)", url)[1])))
        last = int(slider.get_attribute("max"))
        seen = set()
        frames = np.split(np.asarray(sheet.convert("RGB").convert("L")), last + 1)

        def check(low, high):
            value = int(slider.input_value())
            self.assertTrue(low <= value <= high, f"{value}: expected {low} to {high}")
            self.page.evaluate(PAINTED)
            shown = Image.open(io.BytesIO(picture.screenshot())).convert("L")
            small = (60, 60 * shown.height // shown.width)  # a pixel's shift makes no difference
            frame = Image.fromarray(frames[value]).resize(small, Image.Resampling.BOX)
            difference = ImageChops.difference(shown.resize(small, Image.Resampling.BOX), frame)
            self.assertLess(np.mean(difference), 8, f"frame {value}")
            seen.add(shown.tobytes())

        right = min(4, last)  # a training stopped soon has few frames
        keys = (
            ("Home", 1, 0),
            ("ArrowRight", 4, right),
            ("ArrowLeft", 1, right - 1),
            ("End", 1, last),
        )
        slider.click()
        for key, times, value in keys:
            for _ in range(times):
                self.page.keyboard.press(key)
            check(value, value)
        slider.click()  # in its middle
        check(math.floor(0.4 * last), math.ceil(0.6 * last))
        self.assertGreaterEqual(len(seen), different, "pictures that differ")


class PageTest(BrowserTest):
    """The page as the README's main job makes it, opened from the disk without a network."""

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        readme = (ROOT / "README.md").read_text(encoding="utf-8")
        block = re.search(r"<!-- command:run -->\s*```sh\n(.*?)```", readme, re.DOTALL)[1]
        (line,) = [line for line in block.splitlines() if "nbconvert" in line]
        options = line.split("nbconvert")[1].split()
        command = [sys.executable, "-m", "nbconvert", *options, "--log-level=ERROR"]
        environment = os.environ | {"VAE_EPOCHS": "30", "VAE_OUTPUT": ".", "MPLBACKEND": "Agg"}
        subprocess.run(command, cwd=cls.work, env=environment, check=True)
        cls.page.context.set_offline(True)
        cls.page.goto((cls.work / "assignment_09.html").as_uri())

    def test_sliders_and_no_error(self):
        for name in ("film", "line"):
            self.check_slider(name)
        self.assertEqual(self.errors, [])

    def test_text_alternatives_and_contrast(self):
        images = self.page.locator("img").evaluate_all("a => a.map((e) => [e.naturalWidth, e.alt])")
        self.assertGreaterEqual(len(images), 6)
        for width, alt in images:
            self.assertGreater(width, 100, alt)
            self.assertRegex(alt, "^(?!No description).{20,}")
        self.assertEqual(self.page.evaluate(CONTRAST), [True, []])

    def test_widths(self):
        for width in (400, 1280):
            self.page.set_viewport_size({"width": width, "height": 1000})
            self.screenshot(f"page-{width}", full_page=True)
            self.assertEqual(self.page.evaluate(TOO_WIDE), [], width)


class LabTest(BrowserTest):
    """The notebook in a JupyterLab that never ran it, and so does not trust it."""

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        shutil.copy(cls.work / "assignment_09.ipynb", cls.work / "as committed.ipynb")
        log = cls.work / "log"
        homes = ("JUPYTER_CONFIG_DIR", "JUPYTER_RUNTIME_DIR", "JUPYTER_DATA_DIR", "IPYTHONDIR")
        variables = os.environ | {name: str(cls.work / name) for name in homes}
        variables |= {"VAE_EPOCHS": "20000", "VAE_OUTPUT": "."}  # to be stopped early
        options = "--no-browser --allow-root --ip=127.0.0.1 --port=0 --IdentityProvider.token=test"
        command = [sys.executable, "-m", "jupyterlab", *options.split()]
        with open(log, "w") as out:
            server = subprocess.Popen(command, cwd=cls.work, env=variables, stdout=out, stderr=out)
        cls.addClassCleanup(server.wait, 300)
        cls.addClassCleanup(server.terminate)
        started = until(lambda: re.search("http:.+/lab", log.read_text()), 600, "JupyterLab")
        cls.url = started[0]

    def open(self, name):
        self.errors.clear()
        self.page.goto(f"{self.url}/tree/{name}?token=test&reset")
        self.page.get_by_text("(ipykernel) | Idle").wait_for()

    def test_untrusted_notebook_shows_still_pictures(self):
        self.open("as committed.ipynb")
        for name, least in (("film", 300), ("line", 200)):
            picture = self.page.locator(f'[data-jupyter-id="{name}"] img')
            picture.scroll_into_view_if_needed()
            self.screenshot(f"untrusted-{name}")
            box = picture.bounding_box()
            self.assertGreater(box["height"], least)
            self.assertGreater(box["width"], least)
            self.assertGreater(len(picture.get_attribute("alt")), 20)
            slider = self.page.locator(f'[data-jupyter-id="{name}"] + label')
            self.assertFalse(slider.is_visible(), "a slider that cannot work")
        self.assertEqual(self.errors, [])

    def test_run_all_stop_and_explore(self):
        """Losses are drawn; the stop button ends training alone; the sliders work."""
        page = self.page
        self.open("assignment_09.ipynb")
        page.locator(".lm-MenuBar-itemLabel").get_by_text("Run", exact=True).click()
        page.locator(".lm-Menu-itemLabel").get_by_text("Run All Cells", exact=True).click()
        drawn, figure = set(), page.locator(".jp-OutputArea img").last  # first the training images
        src = "all => all.map((e) => e.src)"
        until(lambda: drawn.update(figure.evaluate_all(src)) or len(drawn) > 3, 1800, "drawings")
        page.get_by_role("button", name="Interrupt the kernel").click()
        prompts = page.locator(".jp-CodeCell .jp-InputPrompt")
        until(lambda: "[*]:" not in prompts.all_text_contents(), 3600, "the end of all cells")
        done = prompts.all_text_contents()
        self.assertEqual(done, [f"[{i + 1}]:" for i in range(len(done))])
        self.assertTrue(page.locator(".jp-OutputArea", has_text="stopped by hand").count())
        self.assertEqual(page.locator('[data-mime-type*="err"]').all_text_contents(), [])
        self.assertIn((self.work / "result.csv").read_text().count("loss,"), range(1, 20_000))
        for name in ("film", "line"):
            # frames of a training stopped soon after its start may be alike
            self.check_slider(name, different=3)
        handle, image = page.locator(".noUi-handle"), page.locator("img.widget-image")
        for key in ("ArrowLeft", "End", "Home"):
            before = image.screenshot()
            handle.press(key)
            until(lambda before=before: image.screenshot() != before, 300, f"a picture by {key}")
        self.screenshot("explorer")
        self.assertEqual(self.errors, [])


if __name__ == "__main__":
    if "--screenshots" in sys.argv:
        *sys.argv, _, SCREENSHOTS = sys.argv
    unittest.main()
