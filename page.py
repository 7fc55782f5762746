r"""How nbconvert makes the page: jupyter nbconvert --config page.py assignment_09.ipynb

It runs the notebook and writes assignment_09.html, which needs no network: the notebook's formulas,
which are LaTeX, become MathML, which browsers draw themselves. A formula or a picture that can't be
shown costs a warning, not the page.
"""

import re
from html import escape, unescape
from pathlib import Path
from urllib.parse import unquote

import nbconvert.exporters.html
from ipykernel.kernelspec import get_kernel_dict
from jupyter_client import AsyncKernelManager
from jupyter_client.kernelspec import KernelSpec
from math_core import LatexError, LatexToMathML
from nbconvert.filters import Highlight2HTML
from nbconvert.filters.markdown_mistune import IPythonRenderer
from nbconvert.preprocessors import ExecutePreprocessor
from traitlets.log import get_logger

# As on nbconvert's own page, what one formula defines holds in the next, and equations are numbered
formulas = LatexToMathML(
    macros={
        "hbox": r"\text{#1}",
        "mbox": r"\text{#1}",
        "mathds": r"\mathbb{#1}",
        "pmb": r"\boldsymbol{#1}",
        "smallsetminus": r"\setminus",
    },
    global_group=True,
    fancy_error=False,
    allow_unreliable_rendering=True,
)
# What math-core lacks, in LaTeX that it has
REWRITTEN = (
    (r"\\\\(\*|\[-?[\d.]+ *\w+\])", r"\\\\ "),  # a line's distance to the next
    (r"\\(begin|end)\{split\}", r"\\\1{aligned}"),
    (r"\\(begin|end)\{(?:fl)?align(ed)?(?:at)?(ed)?(\*?)\}(\[\w\]|\{\d\})?", r"\\\1{align\2\3\4}"),
    (r"\\begin\{eqnarray\*?\}", r"\\begin{array}{rcl}"),
    (r"\\end\{eqnarray\*?\}", r"\\end{array}"),
    (r"\\(left|right|middle) *<", r"\\\1\\langle "),
    (r"\\(left|right|middle) *>", r"\\\1\\rangle "),
    (r"\\(mathop|operatorname\*) *\{\\(mathrm|text|rm) *\{?(\w+)\}+", r"\\operatorname*{\3}"),
    (r"\\(mathop|operatorname\*) *\{\\mathbb *\{?E\}+", r"\\operatorname*{𝔼}"),
    (
        r"\\DeclareMathOperator(\*?) *\{(\\\w+)\} *(\{.*?\})",
        r"\\newcommand{\2}{\\operatorname\1\3}",
    ),
    (r"\\newcommand\*? *\{?(\\[a-zA-Z]+)\}?", r"\\providecommand{\1}{}\\renewcommand{\1}"),
)


class PageRenderer(IPythonRenderer):
    """nbconvert's Markdown, with formulas as MathML and pictures in the page itself."""

    def inline_math(self, body):
        return mathml(body, block=False)

    def block_math(self, body):
        return f'<span class="formula">{mathml(body, block=True)}</span>'

    def latex_environment(self, name, body):
        return self.block_math(rf"\begin{{{name}}}{body}\end{{{name}}}")

    def block_html(self, html):
        return super().block_html(with_formulas(html))

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


def with_formulas(html):
    """HTML with MathML for the formulas between dollars in its text, not in its tags and code."""
    code = r"<(?P<name>script|style|pre|code)\b.*?(?:</(?P=name)>|$)"
    tag = "<[a-z/!].*?>"
    formula = rf"(?<!\\)(?P<dollars>\$\$?)(?P<latex>((?!{tag})[^$])+)(?P=dollars)"

    def replace(match):
        if not match["latex"]:
            return match[0]
        return mathml(unescape(match["latex"]), block=match["dollars"] == "$$")

    return re.sub(f"{code}|{tag}|{formula}", replace, html, flags=re.DOTALL | re.IGNORECASE)


def mathml(latex, block):
    """A LaTeX formula as MathML; or as it is, and a warning, if math-core does not know it."""
    latex = latex.strip()
    source = re.sub(r"\\text *\{((?:[^{}]|\{[^{}]*\})*)\}", text_around_formulas, latex)
    for pattern, replacement in REWRITTEN:
        source = re.sub(pattern, replacement, source)
    if block and re.search(r"\\(tag|label)\b", source) and not source.startswith(r"\begin"):
        source = rf"\begin{{equation*}}{source}\end{{equation*}}"
    try:
        formula = formulas.convert_with_global_state(source, displaystyle=block)
    except LatexError as error:
        get_logger().warning("formula left as LaTeX (%s): %s", error, latex)
        return f"<code>{escape(latex)}</code>"
    # page.html.j2 draws what not all browsers do: <menclose>, and braces of any length
    formula = re.sub('<menclose notation="(.*?)">', r'<mrow class="\1">', formula)
    formula = formula.replace("</menclose>", "</mrow>")
    formula = re.sub("<mo>([⏞⏟])</mo>", r'<mo class="brace">\1</mo>', formula)
    return formula.replace("&ApplyFunction;", "\u2061")  # headings have to be XML


def text_around_formulas(match):
    r"""Of \text{if $x$ is}, \text{if }x\text{ is}."""
    pieces = re.split(r"(?<!\\)\$", match[1])
    pieces[::2] = [r"\text{" + re.sub(r"(?<!\\)_", r"\_", text) + "}" for text in pieces[::2]]
    return "".join(pieces)


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

    kernel_spec = KernelSpec(**get_kernel_dict())


nbconvert.exporters.html.IPythonRenderer = PageRenderer  # with all that nbconvert passes to it
c = get_config()  # noqa: F821, nbconvert brings it
c.NbConvertApp.export_format = "html"
c.Exporter.default_preprocessors.prepend([ForgetPreprocessor])
c.HTMLExporter.template_file = str(Path(__file__).with_name("page.html.j2"))
c.HTMLExporter.filters = {
    "highlight_code": Highlight2HTML(pygments_lexer="ipython3"),
    "with_formulas": with_formulas,
}
c.HTMLExporter.embed_images = True
c.ExecutePreprocessor.enabled = True
c.ExecutePreprocessor.kernel_manager_class = ThisPython
c.ExecutePreprocessor.record_timing = False  # no timings in the file with --to notebook
c.ExecutePreprocessor.store_widget_state = False
c.KernelManager.transport_encryption = "auto"  # where left out, the kernel prints a warning
