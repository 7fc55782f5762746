r"""How nbconvert makes the page: jupyter nbconvert --config page.py assignment_09.ipynb

It runs the notebook and writes assignment_09.html, which needs no network: MathJax draws the
formulas now, not in the reader's browser. A formula or a picture that can't be shown costs a
warning, not the page.
"""

import importlib.resources
import json
import re
from html import escape, unescape
from pathlib import Path
from urllib.parse import unquote

import nbconvert.exporters.html
from bs4 import BeautifulSoup, NavigableString
from ipykernel.kernelspec import get_kernel_dict
from jupyter_client import AsyncKernelManager
from jupyter_client.kernelspec import KernelSpec
from jupyter_core.paths import jupyter_path
from nbconvert.filters import Highlight2HTML
from nbconvert.filters.markdown_mistune import IPythonRenderer
from nbconvert.preprocessors import ExecutePreprocessor
from py_mini_racer import MiniRacer
from traitlets.log import get_logger

MATHJAX = importlib.resources.files("mathjax") / "static" / "mathjax" / "es5"
PARTS = ("startup", "core", "adaptors/liteDOM", "input/tex-full", "output/svg")
PARTS += ("output/svg/fonts/tex", "a11y/assistive-mml")
SETTINGS = r"""
var setTimeout = () => 0
var console = { warn() {} }
var MathJax = {
  startup: { ready() {} },
  tex: {
    // as on the page of nbconvert: its delimiters and the numbers of its equations
    inlineMath: [["$", "$"], ["\\(", "\\)"]],
    processEscapes: true,
    tags: "ams",
    packages: { "[-]": ["noundefined", "textmacros"], "[+]": ["colorv2"] },
    macros: {
      argmax: "\\operatorname*{arg\\,max}",
      argmin: "\\operatorname*{arg\\,min}",
      bm: ["\\boldsymbol{#1}", 1],
      mathds: ["\\mathbb{#1}", 1],
    },
  },
  svg: { fontCache: "global" }, // each letter once in the page
}
"""
TYPESET = r"""
MathJax.startup.getComponents()
function typeset(html) {
  const { adaptor, input, output } = MathJax.startup
  const options = { InputJax: input, OutputJax: output }
  const page = MathJax._.mathjax.mathjax.document(html, options)
  page.findMath().compile().getMetrics()
  for (const formula of page.math) {
    formula.metrics.containerWidth = 750 // pixels; it cannot be known here
  }
  page.typeset().assistiveMml()
  const failures = []
  for (const formula of page.math) {
    const error = adaptor.outerHTML(formula.typesetRoot).match(/data-mjx-error="(.*?)"/)
    if (error) {
      failures.push([formula.math, error[1]])
      formula.typesetRoot = adaptor.node("code", {}, [adaptor.text(formula.math)])
    }
  }
  page.updateDocument()
  const style = adaptor.textContent(output.styleSheet(page))
  return JSON.stringify([adaptor.innerHTML(adaptor.body(page.document)), style, failures])
}
"""
NO_FORMULAS = "pre, code, textarea, noscript, .tex2jax_ignore, .mathjax_ignore"  # are in these


class PageRenderer(IPythonRenderer):
    """nbconvert's Markdown, with pictures in the page itself."""

    def text(self, text):
        if set(text) == {"$"}:  # it was \$, and begins no formula
            text = text.replace("$", r"\$")
        return super().text(text)

    def _html_embed_images(self, html):  # nbconvert's closes each tag, <details> before its text
        image = r'(<img\b[^>]*?\ssrc=(["\']?))(.*?)(?=\2(\s|/?>))'
        embed = self._embed_image_or_attachment
        return re.sub(image, lambda match: match[1] + embed(unescape(match[3])), html)

    def _embed_image_or_attachment(self, src):
        name = unquote(src)  # with its spaces and umlauts
        try:
            found = super()._embed_image_or_attachment(name)
        except Exception:  # no such attachment, no such file, a folder
            found = name
        if found != name:
            return found
        if not re.match("data:|https?:", name):
            get_logger().warning("picture not found in the notebook or its folder: %s", name)
        return src


def typeset(html):
    """HTML with its formulas drawn by MathJax, as a browser draws them on nbconvert's own page. One
    that MathJax does not know stays as it is, and costs a warning."""
    soup = BeautifulSoup(html, "html.parser")
    texts = soup.find_all(string=re.compile(r"[$\\]"))
    texts = [text for text in texts if type(text) is NavigableString]  # no comment, no script
    texts = [text for text in texts if not text.parent.css.closest(NO_FORMULAS)]
    try:
        engine = MiniRacer()
        engine.eval(SETTINGS)
        for part in PARTS:
            engine.eval((MATHJAX / f"{part}.js").read_text(encoding="utf-8"))
        engine.eval(TYPESET)
        page = "".join(f"<div>{escape(text)}</div>" for text in texts)
        drawn, style, failures = json.loads(engine.call("typeset", page))
        *pieces, letters = BeautifulSoup(drawn, "html.parser").find_all(recursive=False)
        pairs = list(zip(texts, pieces, strict=True))  # not so with HTML smuggled into a formula
    except Exception as error:  # of the engine's; LaTeX can be read, too
        get_logger().warning("all formulas left as LaTeX: %s", str(error)[:500])
        return html
    for latex, error in failures:
        get_logger().warning("formula left as LaTeX (%s): %s", unescape(error), latex.strip())
    for text, piece in pairs:
        rest = "".join(piece.find_all(string=True, recursive=False)).strip()
        if re.search(r"\\[a-zA-Z]", rest) and ("$" in rest or r"\begin" in rest):
            get_logger().warning("formula left as LaTeX (it does not end): %s", rest)
        text.replace_with(*piece.contents)
    return f"<style>{style}</style>{soup}{letters}"


class ForgetPreprocessor(ExecutePreprocessor):
    """Where the notebook is run: drops what earlier runs, perhaps elsewhere, left in it."""

    def preprocess(self, nb, resources=None, km=None):
        kernel = {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"}
        nb.metadata.kernelspec = kernel
        nb.metadata.pop("widgets", None)
        for cell in nb.cells:
            if cell.cell_type == "code":
                cell.outputs, cell.execution_count = [], None
        return nb, resources


class ThisPython(AsyncKernelManager):
    """Runs this Python, whatever goes by the name of python3 in the user's home."""

    # glibc keeps freed memory, in large pages, for the next step: 6 % less time of the training
    memory = (
        "glibc.malloc.hugetlb=1"
        f":glibc.malloc.mmap_threshold={2**28}"
        f":glibc.malloc.trim_threshold={2**28}"
    )
    kernel_spec = KernelSpec(**get_kernel_dict(), env={"GLIBC_TUNABLES": memory})


nbconvert.exporters.html.IPythonRenderer = PageRenderer  # with all that nbconvert passes to it
c = get_config()  # noqa: F821, nbconvert brings it
c.NbConvertApp.export_format = "html"
c.Exporter.default_preprocessors.prepend([ForgetPreprocessor])
c.HTMLExporter.template_file = str(Path(__file__).with_name("page.html.j2"))
c.HTMLExporter.extra_template_paths = jupyter_path("nbconvert", "templates", "lab")
c.HTMLExporter.filters = {
    "highlight_code": Highlight2HTML(pygments_lexer="ipython3"),
    "typeset": typeset,
}
c.HTMLExporter.embed_images = True
c.ExecutePreprocessor.enabled = True
c.ExecutePreprocessor.kernel_manager_class = ThisPython
c.ExecutePreprocessor.record_timing = False  # no timings in the file with --to notebook
c.ExecutePreprocessor.store_widget_state = False
c.ExecutePreprocessor.shutdown_kernel = "immediate"  # its cells are done: a second less
c.KernelManager.transport_encryption = "auto"  # where left out, the kernel prints a warning
