"""The notebook in a real JupyterLab, and the page made of it, in Chromium.

python -m tests.browser_test [--screenshots FOLDER]    a picture of each section is written there

Chromium is the one that CHROMIUM names, or one of the usual names on the path.
"""

import base64
import io
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import unittest
import urllib.error
import urllib.request
from pathlib import Path

import nbformat
import numpy as np
from PIL import Image

import vae_lib
from tests.notebook_test import ROOT, copy_project, outputs

try:
    from playwright.sync_api import sync_playwright
except ImportError:
    sync_playwright = None

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
CHROMIUM = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)
EPOCHS = 1500  # a quick mode that leaves time for the loss figure to be redrawn
SCREENSHOTS = None
CONTROLS = (
    ("slider", "z 1"),
    ("textbox", "z 1"),
    ("slider", "z 2"),
    ("textbox", "z 2"),
    ("button", "random"),
    ("spinbutton", "from image"),
    ("spinbutton", "to image"),
    ("slider", "walk"),
    ("textbox", "walk"),
)
# Text nodes that can be seen, whose colour differs from the background's by less than 4.5 (WCAG 2)
LOW_CONTRAST = """() => {
  const rgba = (colour) => colour.match(/[\\d.]+/g).map(Number);
  const luminance = (colour) => colour.slice(0, 3)
    .map((v) => v / 255).map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4))
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const background = (element) => {
    for (let e = element; e; e = e.parentElement) {
      const colour = rgba(getComputedStyle(e).backgroundColor);
      if (colour.length === 3 || colour[3] > 0) return colour;
    }
    return [255, 255, 255];
  };
  const low = [], texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  let count = 0;
  while (texts.nextNode()) {
    const e = texts.currentNode.parentElement;
    if (!texts.currentNode.data.trim() || !e.checkVisibility()) continue;
    const pair = [luminance(rgba(getComputedStyle(e).color)), luminance(background(e))];
    const ratio = (Math.max(...pair) + 0.05) / (Math.min(...pair) + 0.05);
    count += 1;
    if (ratio < 4.5) low.push(`${ratio.toFixed(2)} ${texts.currentNode.data.slice(0, 30)}`);
  }
  return [count, low];
}"""


def screenshot(page, name, **options):
    if SCREENSHOTS:
        page.screenshot(path=Path(SCREENSHOTS) / f"{name}.png", **options)


def until(condition, seconds, what):
    """Wait for a condition; its value."""
    end = time.monotonic() + seconds
    while not (value := condition()):
        if time.monotonic() > end:
            raise TimeoutError(f"{what}: not within {seconds} s")
        time.sleep(0.05)
    return value


class BrowserTest(unittest.TestCase):
    """A Chromium, and a folder with a copy of the project."""

    @classmethod
    def setUpClass(cls):
        missing = "playwright: pip install -r requirements-dev.txt" if not sync_playwright else None
        missing = missing or (None if CHROMIUM else "Chromium: install it, or name it in CHROMIUM")
        if missing:
            print(f"\n*** NOT TESTED in a browser, for want of {missing} ***", file=sys.stderr)
            raise unittest.SkipTest(f"needs {missing}")
        cls.folder = Path(cls.enterClassContext(tempfile.TemporaryDirectory(prefix="vae läb ")))
        playwright = cls.enterClassContext(sync_playwright())
        quiet = ("gpu", "quic", "background-networking", "component-update", "sync")
        arguments = ["--no-first-run", "--no-sandbox", *(f"--disable-{name}" for name in quiet)]
        cls.browser = playwright.chromium.launch(executable_path=CHROMIUM, args=arguments)
        cls.addClassCleanup(cls.browser.close)

    @classmethod
    def open(cls, **options):
        """A new page, and a list that takes its errors."""
        page, errors = cls.browser.new_context(**options).new_page(), []
        page.set_default_timeout(60_000)
        page.on("console", lambda m: errors.append(m.text) if m.type == "error" else None)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("requestfailed", lambda request: errors.append(request.url[:200]))
        return page, errors


class LabTest(BrowserTest):
    """Run by clicks and keys. The tests use one JupyterLab, and run in the order of their names."""

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.work = cls.folder / "work"
        cls.work.mkdir()
        copy_project(cls.work)
        shutil.copy(ROOT / "samples.png", cls.work)
        homes = {f"JUPYTER_{n}_DIR": str(cls.folder / n) for n in ("CONFIG", "RUNTIME", "DATA")}
        log = cls.enterClassContext(open(cls.folder / "log", "w"))
        cls.server = subprocess.Popen(
            [sys.executable, "-m", "jupyterlab", "--no-browser", "--ip=127.0.0.1", "--port=0"]
            + ["--allow-root", "--IdentityProvider.token=for-the-test", "--LabApp.news_url="]
            + ["--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate"],
            cwd=cls.work,
            env={**os.environ, **homes, "VAE_EPOCHS": str(EPOCHS), "IPYTHONDIR": str(cls.folder)},
            stdout=log,
            stderr=log,
        )
        cls.addClassCleanup(cls.server.wait, 30)
        cls.addClassCleanup(cls.server.send_signal, signal.SIGTERM)

        def started():
            files = list(cls.folder.glob("RUNTIME/jpserver-*.json"))
            return files and files[0].read_text().endswith("}") and json.loads(files[0].read_text())

        cls.url = until(started, 120, "JupyterLab's start")["url"]
        cls.cells = nbformat.read(cls.work / "assignment_09.ipynb", as_version=4).cells
        cls.page, cls.errors = cls.open_lab()

    @classmethod
    def open_lab(cls):
        page, errors = cls.open(viewport={"width": 1280, "height": 1000})
        page.goto(f"{cls.url}lab/tree/assignment_09.ipynb?token=for-the-test&reset")
        page.locator(".jp-Notebook .jp-Cell").first.wait_for(timeout=60_000)
        kernels = f"{cls.url}api/kernels?token=for-the-test"

        def connected():  # before, JupyterLab would ask which kernel to take
            try:
                with urllib.request.urlopen(kernels) as answer:
                    states = json.load(answer)
            except urllib.error.HTTPError:  # it lists kernels as they come and go
                return False
            return any(k["connections"] and k["execution_state"] == "idle" for k in states)

        until(connected, 120, "a kernel")
        page.wait_for_timeout(1000)
        offer = page.get_by_role("button", name="No", exact=True)  # of news from the network
        if offer.count():
            offer.click()
        return page, errors

    def index(self, text):
        """The number of the only code cell that holds this text."""
        kinds = [cell.cell_type == "code" and text in cell.source for cell in self.cells]
        self.assertEqual(sum(kinds), 1, text)
        return kinds.index(True)

    def cell(self, text):
        return self.page.locator(".jp-Notebook .jp-Cell").nth(self.index(text))

    def menu(self, menu, item):
        self.page.locator(".lm-MenuBar-itemLabel").get_by_text(menu, exact=True).click()
        self.page.locator(".lm-Menu-itemLabel").get_by_text(item, exact=True).click()

    def start(self):
        """Run all cells, and wait until they do."""
        prompts = self.page.locator(".jp-CodeCell .jp-InputPrompt")
        select = self.page.locator(".jp-Dialog .jp-mod-accept")

        def started():
            if select.count():  # asked which kernel, since the page has not met it yet
                select.click()
            else:
                self.menu("Run", "Run All Cells")
            self.page.wait_for_timeout(3000)
            return "[*]:" in prompts.all_text_contents()

        until(started, 60, "the run's start")

    def run_all(self, seconds=400):
        """Run all cells, wait for the end; the loss figures that were seen while training."""
        image = self.cell("in vae_lib.train(").locator(".jp-OutputArea img")
        training = self.cell("in vae_lib.train(").locator(".jp-InputPrompt")
        self.start()
        seen = set()

        def ended():
            prompts = self.page.locator(".jp-CodeCell .jp-InputPrompt").all_text_contents()
            if training.text_content() == "[*]:" and image.count():
                seen.add(image.first.get_attribute("src"))
            return "[*]:" not in prompts and f"[{len(prompts)}]:" in prompts

        until(ended, seconds, "the run's end")
        return seen

    def save(self):
        path = self.work / "assignment_09.ipynb"
        before = path.stat().st_mtime_ns
        self.menu("File", "Save Notebook")
        until(lambda: path.stat().st_mtime_ns > before, 60, "saving")
        time.sleep(1)
        return nbformat.read(path, as_version=4)

    def check_clean(self, notebook):
        for out in outputs(notebook):
            self.assertNotEqual(out.output_type, "error")
            self.assertNotEqual(out.get("name"), "stderr")

    def picture(self):
        """The explorer's picture as an array."""
        script = """async (e) => {
            const content = await (await fetch(e.src)).arrayBuffer();
            return btoa(String.fromCharCode(...new Uint8Array(content)));
        }"""
        png = self.page.locator(".explorer img").evaluate(script)
        return np.array(Image.open(io.BytesIO(base64.b64decode(png))))

    def test_1_run_all(self):
        figures = self.run_all()
        self.assertGreaterEqual(len(figures), 3, "drawn once and updated twice")
        notebook = self.save()
        self.check_clean(notebook)
        self.assertEqual(self.page.locator('[data-mime-type$="stderr"]').count(), 0)
        training = notebook.cells[self.index("in vae_lib.train(")].outputs
        self.assertEqual(len(training), 1, "one figure at the end")
        self.assertEqual(notebook.cells[self.index("vae.to(")].outputs[0].output_type, "stream")
        (grid,) = notebook.cells[self.index("samples = vae.sample(100")].outputs
        with Image.open(io.BytesIO(base64.b64decode(grid.data["image/png"]))) as image:
            self.assertEqual(image.size, (600, 600))
            tiles = np.array(image.convert("L").crop((6, 6, 594, 594)).resize((170, 170), 4))
        tiles = tiles.reshape(10, 17, 10, 17).swapaxes(1, 2)[:, :, 4:13, 4:13].reshape(100, -1)
        self.assertGreater((tiles.max(1) > 100).sum(), 90, "strokes")
        self.assertGreater(tiles.std(0).mean(), 20, "not all the same")
        shown = self.cell("samples = vae.sample(100").locator(".jp-OutputArea img")
        size = shown.evaluate("async (e) => { await e.decode(); return e.naturalWidth; }")
        self.assertEqual(size, 600)
        self.assertEqual(self.errors, [])
        self.photograph()

    def photograph(self):
        """A screenshot of each section."""
        for i, cell in enumerate(self.cells):
            for number, title in re.findall(r"^##? (?:(\d+)\. )?(.+)$", cell.source, re.M):
                if not SCREENSHOTS or cell.cell_type != "markdown":
                    continue
                element = self.page.locator(".jp-Notebook .jp-Cell").nth(i)
                heading = element.locator("h1, h2").filter(has_text=title).first
                heading.evaluate("e => e.scrollIntoView({block: 'start'})")
                time.sleep(0.5)
                screenshot(self.page, f"lab-{int(number or 0):02}")
        self.page.locator(".explorer").scroll_into_view_if_needed()
        time.sleep(0.5)
        screenshot(self.page, "lab-explorer")

    def test_2_controls(self):
        """By the keyboard alone, from the cell before on."""
        page = self.page
        page.locator(".explorer").scroll_into_view_if_needed()
        snapshot = page.locator(".explorer").aria_snapshot()
        self.assertIn('img "decoded image"', snapshot)
        controls = [
            page.locator(".explorer").get_by_role(r, name=n, exact=True) for r, n in CONTROLS
        ]
        for control in controls:
            control.wait_for()
        focusable = page.locator(".explorer").locator(
            "button, input, [tabindex], [contenteditable]"
        )
        self.assertEqual(focusable.count(), len(controls), "one without a name")
        self.cell("extras = ").locator(".jp-InputPrompt").click()
        page.keyboard.press("Escape")
        reached = []
        for _ in range(60):
            page.keyboard.press("Tab")
            reached += [
                i for i, c in enumerate(controls) if c.evaluate("e => e === document.activeElement")
            ]
            if len(reached) == len(controls):
                break
        self.assertEqual(reached, list(range(len(controls))))

    def test_3_sliders(self):
        page = self.page
        watch = """() => {
            const image = document.querySelector(".explorer img");
            window.delays = [];
            let pressed;
            addEventListener("keydown", () => { pressed = performance.now(); }, true);
            new MutationObserver(() => delays.push(performance.now() - pressed))
                .observe(image, {attributes: true, attributeFilter: ["src"]});
        }"""
        page.evaluate(watch)
        for name in ("z 1", "z 2"):
            before = self.picture()
            page.get_by_role("slider", name=name, exact=True).focus()
            for k in range(10):
                page.keyboard.press("ArrowRight")
                until(lambda k=k: page.evaluate("delays.length") > k, 60, "a picture")
            self.assertTrue((self.picture() != before).any())
            delays = page.evaluate("delays.splice(0)")
            self.assertLess(np.median(delays), 300, f"milliseconds: {delays}")
            print(f"{name}: {np.median(delays):.0f} ms to another picture", file=sys.stderr)

    def test_4_random_and_walk(self):
        """The random button changes the picture; the walk ends at the two reconstructions."""
        page, before = self.page, self.picture()
        page.get_by_role("button", name="random", exact=True).focus()
        page.keyboard.press("Enter")
        until(lambda: np.any(self.picture() != before), 60, "another picture")
        images = vae_lib.load_images(self.work / "data" / "train")
        ends = (255 * vae_lib.load(self.work).reconstruct(images[[0, 50]])).round()[:, 0].numpy()
        page.get_by_role("slider", name="walk", exact=True).focus()
        for key, end in (("End", ends[1]), ("Home", ends[0]), ("End", ends[1])):
            page.keyboard.press(key)
            until(lambda end=end: abs(self.picture() - end).max() <= 1, 60, f"the walk's {key}")

    def test_5_save_and_open_again(self):
        notebook = self.save()
        self.menu("Kernel", "Shut Down Kernel")
        until(lambda: not list(self.folder.glob("RUNTIME/kernel-*.json")), 60, "the kernel's end")
        type(self).page.context.close()
        type(self).page, errors = self.open_lab()
        seen, cells = 0, self.page.locator(".jp-Notebook .jp-Cell")
        for i in range(cells.count()):
            cells.nth(i).scroll_into_view_if_needed()
            if i == self.index("extras = "):
                self.page.wait_for_timeout(5000)  # to find that the controls are no more
            text = cells.nth(i).inner_text()
            self.assertNotRegex(text.replace(self.cells[i].source, ""), "not found|Loading widget")
            data = str([out.get("data") for out in notebook.cells[i].get("outputs", [])])
            if "<img" in data or "![" in self.cells[i].source:
                cells.nth(i).locator("img").first.wait_for()
            for image in cells.nth(i).locator("img").all():
                size = image.evaluate("async (e) => { await e.decode(); return e.naturalWidth; }")
                self.assertGreater(size, 100)
                self.assertGreater(len(image.get_attribute("alt")), 20)
                seen += 1
        self.assertGreaterEqual(seen, 8)
        self.cell("extras = ").scroll_into_view_if_needed()
        screenshot(self.page, "lab-reopened")
        # JupyterLab reports the widget, and asks for a picture before it knows the folder
        known = re.compile("widget model not found|lab/tree/samples.png$")
        self.assertFalse([error for error in errors if not known.search(error)])

    def test_6_stop(self):
        """The stop button during training; all cells run."""
        picture = self.cell("in vae_lib.train(").locator(".jp-OutputArea img")

        old = picture.get_attribute("src")
        self.start()
        until(lambda: picture.count() and picture.get_attribute("src") != old, 300, "training")
        self.page.get_by_role("button", name="Interrupt the kernel").click()
        last = f"[{len([c for c in self.cells if c.cell_type == 'code'])}]:"
        prompts = self.page.locator(".jp-CodeCell .jp-InputPrompt")
        until(lambda: last in prompts.all_text_contents(), 300, "the cells after training")
        notebook = self.save()
        self.check_clean(notebook)
        self.assertIn(
            "stopped by hand", str(notebook.cells[self.index("in vae_lib.train(")].outputs)
        )
        losses = (self.work / "result.csv").read_text().count("loss,")
        self.assertTrue(0 < losses < EPOCHS, losses)


class PageTest(BrowserTest):
    """nbconvert's page as the README makes it, opened from the disk without a network."""

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        readme = (ROOT / "README.md").read_text(encoding="utf-8")
        job = readme[readme.index("<!-- command:run -->") :]
        flags = re.search(r"jupyter nbconvert (.*) assignment_09.ipynb", job)[1]
        flags = [flag for flag in shlex.split(flags) if flag != "--execute"]
        command = [sys.executable, "-m", "nbconvert", *flags, "--output-dir", str(cls.folder)]
        subprocess.run([*command, "assignment_09.ipynb"], cwd=ROOT, check=True, capture_output=True)
        cls.page, cls.errors = cls.open(offline=True, viewport={"width": 1280, "height": 1000})
        cls.page.goto((cls.folder / "assignment_09.html").as_uri())
        cls.page.wait_for_timeout(1000)

    def test_no_error(self):
        self.assertEqual(self.errors, [])

    def test_pictures(self):
        images = self.page.locator("img").all()
        self.assertGreaterEqual(len(images), 8)
        for image in images:
            self.assertGreater(len(image.get_attribute("alt")), 20)
            self.assertGreater(image.evaluate("e => e.naturalWidth"), 100)

    def test_headings(self):
        levels = [
            int(e.evaluate("e => e.tagName[1]")) for e in self.page.locator("h1, h2, h3, h4").all()
        ]
        self.assertEqual(levels[0], 1)
        self.assertEqual(levels.count(1), 1)
        self.assertTrue(all(b <= a + 1 for a, b in zip(levels, levels[1:], strict=False)))
        self.assertIn("variational autoencoder", self.page.title())

    def test_contrast(self):
        count, low = self.page.evaluate(LOW_CONTRAST)
        self.assertGreater(count, 1000)
        self.assertEqual(low, [])

    def test_equations(self):
        """In Unicode: nothing waits to be typeset."""
        text = self.page.locator("main").inner_text()
        self.assertRegex(text, r"−ELBO\(x\) = ½ 𝔼 ‖x − D\(z\)‖² \+ KL")
        self.assertNotRegex(text, r"\\(frac|mathbb|mathcal|operatorname)|\$\$")

    def test_small_screen(self):
        self.addCleanup(self.page.set_viewport_size, {"width": 1280, "height": 1000})
        for width in (1280, 400):
            self.page.set_viewport_size({"width": width, "height": 1000})
            self.page.wait_for_timeout(300)
            screenshot(self.page, f"page-{width}", full_page=True)
            inner, outer = self.page.evaluate(
                "[document.documentElement.scrollWidth, document.documentElement.clientWidth]"
            )
            self.assertLessEqual(inner, outer)
            cut = """() => [...document.querySelectorAll("main *")].filter((e) => {
                const style = getComputedStyle(e);
                return style.overflowX === "hidden" && e.scrollWidth > e.clientWidth + 1;
            }).map((e) => e.className)"""
            self.assertEqual(self.page.evaluate(cut), [], "cut off")


if __name__ == "__main__":
    if "--screenshots" in sys.argv:
        place = sys.argv.index("--screenshots")
        SCREENSHOTS = sys.argv[place + 1]
        del sys.argv[place : place + 2]
        Path(SCREENSHOTS).mkdir(parents=True, exist_ok=True)
    unittest.main()
