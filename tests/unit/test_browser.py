"""The page made of the notebook, and the notebook in JupyterLab, in Chromium (CHROMIUM names it).

SCREENSHOTS names a folder where pictures are written.
"""

import base64
import io
import json
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
from unittest import mock

import numpy as np
from bs4 import BeautifulSoup
from nbconvert import HTMLExporter
from nbformat.v4 import new_markdown_cell, new_notebook
from PIL import Image, ImageChops
from traitlets.config import PyFileConfigLoader

from tests.unit.executed import (
    NOTEBOOK,
    ROOT,
    executed_notebook,
    start_notebook,
    use_cheap_features,
)

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
CHROMIUM = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)
SCREENSHOTS = os.environ.get("SCREENSHOTS")
# Two frames later what was asked for is on the screen.
PAINTED = """() => new Promise((done) => {
    requestAnimationFrame(() => requestAnimationFrame(done));
})"""
CELL = ".jp-RenderedMarkdown, .text_cell_render"  # of lab's and of classic's templates
# What is wider than its place: cut off, or to be scrolled though it isn't code, a table, a formula
TOO_WIDE = """() => [...document.querySelectorAll("*")].filter((e) => {
  const flow = getComputedStyle(e).overflowX;
  const scrolls = e.closest(".cm-editor, table, .highlight, mjx-container");
  if (e.closest("mjx-assistive-mml")) return false; // it is there to be heard
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


class FormulaTest(unittest.TestCase):
    """How page.py makes HTML of Markdown; this needs no browser."""

    def to_page(self, *cells, template="lab"):
        """The page's cells, and what warnings they took."""
        config = PyFileConfigLoader("page.py", str(ROOT)).load_config()
        config.ExecutePreprocessor.enabled = False
        config.HTMLExporter.template_name = template
        notebook = new_notebook(cells=[new_markdown_cell(cell) for cell in cells])
        with mock.patch("logging.Logger.warning") as warning:
            page, _ = HTMLExporter(config=config).from_notebook_node(notebook)
        soup = BeautifulSoup(page, features="html.parser").select(CELL)
        return soup, [call.args[0] % call.args[1:] for call in warning.call_args_list]

    def test_formulas_are_drawn_and_can_be_heard(self):
        text = r"where $q_i < p$, *so*" + "\n\n" + r"$$\frac{a}{b}$$"
        (cell,), warnings = self.to_page(text)
        inline, block = cell.find_all("mjx-container")
        self.assertEqual(block["display"], "true")
        page = list(cell.parents)[-1]
        letters = {f"#{path['id']}" for path in page.select("defs path")}
        for formula in (inline, block):
            self.assertRegex(formula.svg["width"], r"^\d+\.\d+ex$")
            used = {letter["xlink:href"] for letter in formula.svg.find_all("use")}
            self.assertGreaterEqual(len(used), 2)
            self.assertLessEqual(used, letters)
        self.assertTrue([style for style in page.find_all("style") if "mjx-assist" in style.text])
        heard = "<msub><mi>q</mi><mi>i</mi></msub><mo>&lt;</mo><mi>p</mi></math>"
        self.assertIn(heard, str(inline.find("mjx-assistive-mml")))
        self.assertEqual(cell.em.text, "so")
        self.assertNotIn("$", cell.text)
        self.assertEqual(warnings, [])

    def test_ways_to_write_formulas(self):
        """What texts on VAEs hold, and what it looks like."""
        both = (
            (r"\begin{align} a &= b \label{e} \\[1ex] &= c \nonumber \\ \end{align}", "(1)a=b=c"),
            (r"\begin{equation} a \tag{7} \end{equation}", "(7)a"),
            (r"$$\begin{aligned} a &= b \end{aligned} \tag{8}$$", "(8)a=b"),
            (r"$$\left\{ \begin{aligned}[t] a &= b \end{aligned} \right.$$", "{a=b"),
            (r"$$\begin{array}{lr} a & \text{b_1 if $c < d$} \end{array}$$", "ab_1ifc<d"),
            (r"\begin{eqnarray} a &=& b \end{eqnarray}", "(2)a=b"),
            (r"see \eqref{e}, $\eqref{f}$", "see(1),(3)"),
            (r"\begin{split} a &= b \\ &= c \end{split}", "a=b=c"),
            (r"\begin{equation} a \label{f} \end{equation}", "(3)a"),
            (r"$\boldsymbol{\mu} \bm{x} \mathbf x \mathbb E \mathscr{L} \mathds{1}$", "μxxEL1"),
            (
                r"$\arg\min_\theta \operatorname*{arg\,max}_z \argmin \Bigl\{$",
                "argminθargmaxzargmin{",
            ),
            (r"$\operatorname*{\mathbb{E}}_z \mathop{\mathrm{max}}_z$", "Ezmaxz"),
            (r"$a \not= \mbox{b} \require{physics} \cancel{c}$", "a≠bc"),
            (r"$\newcommand{\E}[1][q]{\mathbb{E}_{#1}}$ and $\E[p] \E$", "andEpEq"),
            (r"\$5 and \$6, `$x$` and <code>$7 $8</code>", "$5and$6,$x$and$7$8"),
            (
                r"<div title='$5 and $6'>$\sigma &lt; 1$ <!-- $a$ --> $7<i>or</i>$8</div>",
                "σ<1$7or$8",
            ),
        )
        cells, warnings = self.to_page(*(latex for latex, _ in both))
        self.assertEqual(warnings, [])
        for cell, (latex, looks) in zip(cells, both, strict=True):
            for picture in cell.find_all("svg"):
                picture.decompose()
            text = re.sub(r"[\s\u2061\u2063\u200b]+", "", cell.text)
            self.assertEqual(text, looks, latex)

    def test_lines_of_any_place_fit_the_page(self):
        (cell,), _ = self.to_page(r"\begin{multline} a \\ b \end{multline}")
        least = re.search(r"min-width: ([\d.]+)ex", cell.find("mjx-container")["style"])
        self.assertLess(float(least[1]), 120)

    def test_each_template_of_nbconvert_makes_a_page(self):
        for template in ("basic", "classic"):
            self.assertEqual(len(self.to_page("$x$", template=template)[0]), 1)

    def test_colour_ends_where_its_braces_do(self):
        (cell,), _ = self.to_page(r"$\color{red}{a} + b$")
        self.assertEqual(cell.find("mstyle").text, "a")

    def test_formula_that_is_not_known_stays_readable(self):
        for latex in (r"\unknown x < y", r"\frac{a}{b", "a & b", r"\newcommand{\y}{\y} \y"):
            cells, warnings = self.to_page(f"This is ${latex}$.", r"$$y$$")
            self.assertIn(latex, cells[0].text)
            self.assertEqual([len(cell.find_all("mjx-container")) for cell in cells], [0, 1])
            self.assertEqual(len(warnings), 1)
            self.assertIn(latex, warnings[0])

    def test_formulas_stay_readable_where_the_engine_fails(self):
        with mock.patch("py_mini_racer.MiniRacer", side_effect=OSError("no such library")):
            (cell,), warnings = self.to_page("This is $x$.")
        self.assertEqual(cell.text.strip(), "This is $x$.")
        self.assertEqual(warnings, ["all formulas left as LaTeX: no such library"])
        (cell,), warnings = self.to_page(r"$\unicode[\"></div><div>]{x41}$ and $y$")
        self.assertIn("$y$", cell.text)
        self.assertRegex(warnings[0], "^all formulas left as LaTeX: zip")

    def test_only_pictures_that_are_missing_here_are_named(self):
        text = "<img src='a &amp; b.png'> ![](https://example.org/c.png)"
        _, warnings = self.to_page(text)
        warnings = [warning for warning in warnings if "picture" in warning]
        self.assertEqual(len(warnings), 1)
        self.assertRegex(warnings[0], ": a & b.png$")

    def test_details_stay_folded(self):
        (cell,), _ = self.to_page("<details>\n<summary>Hint</summary>\n\nHidden\n\n</details>")
        self.assertEqual(cell.details.p.text, "Hidden")


class FrontEndTest(unittest.TestCase):
    """A notebook as other front ends and environments leave it."""

    def test_what_other_front_ends_leave(self):
        """Colab's widgets without "state", a kernel that is not here, outputs without what they
        must have, pictures pasted and with names that are quoted; and another python3."""
        dot, seen = "iVBORw0KGgo=", "data:image/png;base64,iVBORw0KGgo="
        view = {"application/vnd.jupyter.widget-view+json": {"model_id": "gone"}}
        left = [
            {"output_type": "stream", "text": ["stale"]},
            {"output_type": "display_data", "data": view},
            {"output_type": "execute_result", "data": {"application/x-strange": {}}},
        ]
        code = {"cell_type": "code", "outputs": left, "execution_count": 7}
        code["metadata"] = {"id": "x", "outputId": "y", "scrolled": True, "vscode": {}}
        run = "import sys; from IPython.display import HTML, Image, Math; print(sys.prefix)\n"
        run += "display(Image('Ü b.png', width=5, alt='dot'), Math('a^2'), HTML('<b>$a_1$</b>'))"
        text = "![](attachment:my%20dot.png) ![](Ü%20b.png) <img src='Ü b.png'> ![](gone.png) "
        text += "![](attachment:lost.png) ![](.)"
        pasted = {"my dot.png": {"image/png": dot}}
        markdown = {"cell_type": "markdown", "metadata": {}, "attachments": pasted, "source": text}
        kernel = {"name": "conda-env-vae-py", "display_name": "Python [conda env:vae]"}
        widgets = {"application/vnd.jupyter.widget-state+json": {"gone": {}}}
        metadata = {"kernelspec": kernel, "widgets": widgets, "language_info": {"name": "R"}}
        notebook = {
            "cells": [markdown, code | {"source": run}, code | {"source": ""}],
            "metadata": metadata | {"colab": {}, "vscode": {}},
            "nbformat": 4,
            "nbformat_minor": 0,
        }
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            (folder / "Ü b.png").write_bytes(base64.b64decode(dot))
            (folder / "colab.ipynb").write_text(json.dumps(notebook))
            other = folder / "jupyter" / "kernels" / "python3"
            other.mkdir(parents=True)
            spec = {"argv": ["/no/python"], "display_name": "Python 3", "language": "python"}
            (other / "kernel.json").write_text(json.dumps(spec))
            options = ["--config", str(ROOT / "page.py"), "colab.ipynb"]
            command = [sys.executable, "-m", "nbconvert", *options]
            variables = os.environ | {"JUPYTER_PATH": str(folder / "jupyter")}
            pipes = {"stderr": subprocess.PIPE, "text": True}
            done = subprocess.run(command, cwd=folder, env=variables, check=False, **pipes)
            self.assertEqual(done.returncode, 0, done.stderr)
            page = (folder / "colab.html").read_text()
        self.assertIn(sys.prefix, page)
        self.assertIn("<msup><mi>a</mi><mn>2</mn></msup>", page)
        self.assertIn("<msub><mi>a</mi><mn>1</mn></msub>", page)
        self.assertEqual(page.count(seen), 4)
        self.assertRegex(page, '<img alt="dot"[^>]*width="5"')
        for name in ("gone.png", "attachment:lost.png", "."):
            self.assertIn(f"its folder: {name}\n", done.stderr)
        for word in ("stale", "x-strange", "unpkg", "cdnjs", "hl-R"):
            self.assertNotIn(word, page)


def load_tests(_loader, tests, _pattern):
    """Let the notebook run beside the tests that need no browser."""
    start_notebook()
    return tests


class BrowserTest(unittest.TestCase):
    """A copy of the project with an executed notebook, and an empty page in Chromium that records
    errors."""

    @classmethod
    def setUpClass(cls):
        if not CHROMIUM or not find_spec("playwright"):
            want = "playwright (requirements-dev.txt)" if CHROMIUM else "Chromium: install it"
            print(f"\n*** NOT TESTED in a browser: it needs {want} ***", file=sys.stderr)
            raise unittest.SkipTest(f"needs {want}")
        from playwright.sync_api import sync_playwright

        folder, _ = executed_notebook()
        cls.work = Path(cls.enterClassContext(tempfile.TemporaryDirectory(prefix="vae läb ")))
        shutil.copytree(folder, cls.work, dirs_exist_ok=True)
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

    def check_slider(self, name):
        """Keys and mouse choose frames, and what is seen is the frame that they chose."""
        picture = self.page.locator(f"#{name}")
        slider = self.page.locator(f"#{name} + label input")
        picture.scroll_into_view_if_needed()
        self.assertGreater(len(picture.get_attribute("aria-label")), 20)
        self.assertGreater(len(slider.evaluate("e => e.labels[0].textContent.trim()")), 5)
        url = picture.evaluate("e => getComputedStyle(e).backgroundImage")
        sheet = Image.open(io.BytesIO(base64.b64decode(re.search("base64,([^\"')]+)", url)[1])))
        last = int(slider.get_attribute("max"))
        frames = np.split(np.asarray(sheet.convert("RGB").convert("L")), last + 1)
        seen = set()
        slider.click()  # in its middle
        self.check_frame(picture, frames, int(slider.input_value()), seen)
        self.assertAlmostEqual(int(slider.input_value()), last / 2, delta=1 + 0.1 * last)
        for key, value in (("Home", 0), ("ArrowRight", 1), ("End", last), ("ArrowLeft", last - 1)):
            self.page.keyboard.press(key)
            until(lambda value=value: int(slider.input_value()) == value, 60, f"{value} by {key}")
            self.check_frame(picture, frames, value, seen)
        self.assertGreaterEqual(len(seen), 3, "pictures that differ")  # neighbours may be alike

    def check_frame(self, picture, frames, value, seen):
        """The picture shows this frame; what is seen is added to `seen`."""
        self.page.evaluate(PAINTED)
        shown = Image.open(io.BytesIO(picture.screenshot())).convert("L")
        small = (60, 60 * shown.height // shown.width)  # a pixel's shift makes no difference
        frame = Image.fromarray(frames[value]).resize(small, Image.Resampling.BOX)
        difference = ImageChops.difference(shown.resize(small, Image.Resampling.BOX), frame)
        self.assertLess(np.mean(difference), 8, f"frame {value}")
        seen.add(shown.tobytes())


class PageTest(BrowserTest):
    """The page, opened from the disk without a network."""

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        options = ["--config", "page.py", "--ExecutePreprocessor.enabled=False"]
        command = [sys.executable, "-m", "nbconvert", *options, NOTEBOOK, "--log-level=ERROR"]
        subprocess.run(command, cwd=cls.work, check=True)
        cls.page.context.set_offline(True)
        cls.page.goto((cls.work / NOTEBOOK).with_suffix(".html").as_uri())

    def test_sliders_and_no_error(self):
        for name in ("film", "line"):
            self.check_slider(name)
        self.assertEqual(self.errors, [])

    def test_text_alternatives(self):
        images = self.page.locator("img").evaluate_all("a => a.map((e) => [e.naturalWidth, e.alt])")
        self.assertGreaterEqual(len(images), 6)
        for width, alt in images:
            self.assertGreater(width, 100, alt)
            self.assertRegex(alt, "^(?!No description).{20,}")

    def test_formulas_are_drawn(self):
        sizes = self.page.locator("math").evaluate_all("a => a.map((e) => e.clientHeight)")
        self.assertGreater(len(sizes), 5)
        self.assertGreater(min(sizes), 5)
        for text in self.page.locator(".jp-RenderedMarkdown").all_text_contents():
            self.assertNotIn("$$", text)

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
        shutil.copy(cls.work / NOTEBOOK, cls.work / "untrusted.ipynb")
        use_cheap_features(cls.work)
        plots = cls.work / "plots.py"  # losses are drawn more often
        plots.write_text(plots.read_text(encoding="utf-8").replace("drawn > 5", "drawn > 1"))
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
        self.open("untrusted.ipynb")
        for name in ("film", "line"):
            picture = self.page.locator(f'[data-jupyter-id="{name}"] img')
            picture.scroll_into_view_if_needed()
            self.screenshot(f"untrusted-{name}")
            box = picture.bounding_box()
            self.assertGreater(min(box["height"], box["width"]), 200)
            self.assertGreater(len(picture.get_attribute("alt")), 20)
            slider = self.page.locator(f'[data-jupyter-id="{name}"] + label')
            self.assertFalse(slider.is_visible(), "a slider that cannot work")
        self.assertEqual(self.errors, [])

    def test_run_all_stop_and_explore(self):
        """Losses are drawn; the stop button ends training alone; the sliders work."""
        page = self.page
        self.open(NOTEBOOK)
        page.locator(".lm-MenuBar-itemLabel").get_by_text("Run", exact=True).click()
        page.locator(".lm-Menu-itemLabel").get_by_text("Run All Cells", exact=True).click()
        drawn, figure = set(), page.locator(".jp-OutputArea img").last  # the newest picture
        src = "all => all.map((e) => e.src)"
        until(lambda: drawn.update(figure.evaluate_all(src)) or len(drawn) > 3, 1800, "drawings")
        page.get_by_role("button", name="Interrupt the kernel").click()
        prompts = page.locator(".jp-CodeCell .jp-InputPrompt")
        until(lambda: "[*]:" not in prompts.all_text_contents(), 3600, "the end of all cells")
        done = prompts.all_text_contents()
        self.assertEqual(done, [f"[{i + 1}]:" for i in range(len(done))])
        self.assertTrue(page.locator(".jp-OutputArea", has_text="stopped by hand").count())
        self.assertEqual(page.locator('[data-mime-type*="err"]').all_text_contents(), [])
        epochs = (self.work / "result.csv").read_text().count("loss,")
        self.assertIn(epochs, range(1, 20_000))
        film = page.locator("#film").get_attribute("aria-label")
        self.assertIn(f"Epochs 1 to {epochs}:", film)
        for name in ("film", "line"):
            self.check_slider(name)
        handle, image = page.locator(".noUi-handle"), page.locator("img.widget-image")
        for key in ("ArrowLeft", "End", "Home"):
            before = image.screenshot()
            handle.press(key)
            until(lambda before=before: image.screenshot() != before, 300, f"a picture by {key}")
        self.screenshot("explorer")
        self.assertEqual(self.errors, [])
