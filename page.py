r"""How nbconvert makes the page: jupyter nbconvert --config page.py assignment_09.ipynb

It runs the notebook and writes assignment_09.html, which needs no network: the notebook's formulas,
which are LaTeX, become MathML, which browsers draw themselves. A formula or a picture that can't be
shown costs a warning, not the page.
"""

import re
import unicodedata
from html import escape, unescape
from pathlib import Path
from urllib.parse import unquote
from xml.etree import ElementTree

import nbconvert.exporters.html
from ipykernel.kernelspec import get_kernel_dict
from jupyter_client import AsyncKernelManager
from jupyter_client.kernelspec import KernelSpec
from latex2mathml.converter import Converter
from nbconvert.filters import Highlight2HTML
from nbconvert.filters.markdown_mistune import IPythonRenderer
from nbconvert.preprocessors import ExecutePreprocessor
from traitlets.log import get_logger

converter = Converter()  # one for all formulas: \newcommand holds in those that follow
# What latex2mathml lacks, or takes for something else, in LaTeX that it has
REWRITTEN = (
    (r"\\label\{[^}]*\}|\\(nonumber|notag)\b", ""),
    (r"\\(begin|end)\{(fl)?align(ed|at|edat)?\*?\}(\[\w\]|\{\d\})?", r"\\\1{align*}"),
    (r"\\(begin|end)\{(gather(ed)?|multline)\*?\}", r"\\\1{matrix}"),
    (r"\\begin\{eqnarray\*?\}", r"\\begin{array}{rcl}"),
    (r"\\end\{eqnarray\*?\}", r"\\end{array}"),
    (r"\\\\(\*|\[-?[\d.]+ *\w+\])", r"\\\\ "),  # a line's distance to the next
    (r"\\mathrm *\{(\w)\}", r"{\\rm \1}"),  # of a single letter, which would be italic
    (r"\\operatorname\*?\{(\\\w+\{\w+\})\}", r"\\mathop{\1}"),
    (r"\\mathop\{\\(mathrm|text|rm)\{(\w+)\}\}", r"\\operatorname*{\2}"),
    (r"(\\operatorname\*?\{\w+)\\[,:; ](\w+\})", r"\1\2"),
    (r"\\(arg|argmin|argmax)(?![a-zA-Z])", r"\\operatorname*{\1}"),
    (r"\\sim(?![a-zA-Z])", r"\\thicksim"),
    (r"\\not *=", r"\\ne "),
    (r"\\tag\*?\{", r"\\qquad\g<0>"),
    (r"\\text\{(?=[^}]*\$)", r"\\hbox{"),  # has formulas in it
)
LINES = {"mover": "border-top", "munder": "border-bottom"}  # above and below a formula
SCRIPTS = ("msub", "msup", "msubsup", "munder", "mover", "munderover")


class PageRenderer(IPythonRenderer):
    """nbconvert's Markdown, with formulas as MathML and pictures in the page itself."""

    def inline_math(self, body):
        return mathml(body, "inline")

    def block_math(self, body):
        return f'<span class="formula">{mathml(body, "block")}</span>'

    def latex_environment(self, name, body):
        return self.block_math(rf"\begin{{{name}}}{body}\end{{{name}}}")

    def block_html(self, html):
        if not re.search("<(script|style|pre|code)", html):
            formula = r"(?<!\\)(\$\$?)([^$<>]+)\1(?![^<>]*>)"  # in text, not in a tag
            display = {"$": "inline", "$$": "block"}
            html = re.sub(formula, lambda m: mathml(unescape(m[2]), display[m[1]]), html)
        return super().block_html(html)

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


def mathml(latex, display):
    """A LaTeX formula as MathML; or as it is, and a warning, if browsers would draw another."""
    source = latex.strip()
    for pattern, replacement in REWRITTEN:
        source = re.sub(pattern, replacement, source)
    try:
        converter.display = display
        formula = converter.convert_to_element(source)
        del formula.attrib["xmlns"]  # of which nbconvert makes <ns0:math> in headings
        for element in list(formula.iter()):
            finish(element)
        for row in formula.iter():
            space_names(row)
    except Exception as error:  # of many kinds
        reason = str(error) or repr(error)
        get_logger().warning("formula left as LaTeX (%s): %s", reason, latex.strip())
        return f"<code>{escape(latex.strip())}</code>"
    return ElementTree.tostring(formula, encoding="unicode")


def finish(element):
    """Change one element of latex2mathml's to what browsers draw as LaTeX does."""
    text, variant = unescape(element.text or ""), element.get("mathvariant", "normal")
    text = text.replace(r"\{", "{").replace(r"\}", "}").replace(r"\|", "‖")  # \Bigl\{
    if "\\" in text or text == "⧸" or (element.tag == "mi" and text in ("&", "}")):
        raise ValueError(f"latex2mathml does not know {text}")
    if variant != "normal" and element.tag != "mtext":  # browsers ignore the other alphabets
        text = "".join(letter(character, variant) for character in text)
    element.text = text
    if element.tag == "mi" and unicodedata.category(text[:1] or "a") == "Sm":
        element.tag = "mo"  # \implies, with its spaces
    if element.tag == "munder" and unescape(element[-1].text or "") == "\u23df":
        # Where a font lacks parts of a long brace, half of it is missing: page.html.j2 draws it.
        element.tag = "mrow"
        element.set("class", "braced")
        element.remove(element[-1])
    if element.tag in LINES and unescape(element[-1].text or "") == "―":  # which does not stretch
        element.set("style", f"{LINES[element.tag]}: 1px solid; padding: 0.15em 0")
        element.tag = "mrow"
        element.remove(element[-1])
    if element.get("linebreak"):  # which browsers do not break
        raise ValueError(r"a line break, \\, outside an environment")
    base = len(element) - (2 if element.tag in ("msubsup", "munderover") else 1)
    if element.tag in SCRIPTS and base > 1:  # of a matrix with its parentheses
        whole = ElementTree.Element("mrow")
        whole.extend(element[:base])
        element[:base] = [whole]
    if element.tag == "menclose":  # which browsers do not draw
        if element.attrib.pop("notation") != "box":
            raise ValueError("browsers strike nothing out")
        element.tag = "mrow"
        element.set("style", "border: 1px solid; padding: 0.2em")
    limits = ("argmax", "argmin", "inf", "lim", "max", "min", "sup")
    if element.tag == "msub" and element[0].text in limits:
        element.tag = "munder"
        element[0].set("movablelimits", "true")


def letter(character, variant):
    """A letter in an alphabet such as double-struck: 𝔼 for E."""
    name = re.sub("LATIN |GREEK |LETTER |LUNATE ", "", unicodedata.name(character, ""))
    variant = variant.replace("-italic", " italic")
    for prefix in ("mathematical ", "", "mathematical bold "):  # ℝ; digits are not in all of them
        try:
            return unicodedata.lookup(f"{prefix}{variant} {name}".upper())
        except KeyError:
            pass
    return character


def space_names(row):
    """Put a space between log, tr and their like and letters around them, but not parentheses."""
    for i, name in enumerate(row if row.tag not in SCRIPTS else ()):
        before = row[i - 1].tag if i else "mo"
        after = "".join(row[i + 1].itertext()) if i + 1 < len(row) else ""
        base = name
        while base.tag in SCRIPTS:  # log of log_2
            base = base[0]
        if base.tag in ("mi", "mo") and re.fullmatch("[A-Za-z]{2,}", base.text):
            base.tag = "mo"
            base.set("lspace", "0" if before == "mo" else "0.17em")
            base.set("rspace", "0" if after.startswith("(") else "0.17em")


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
c.HTMLExporter.filters = {"highlight_code": Highlight2HTML(pygments_lexer="ipython3")}
c.HTMLExporter.embed_images = True
c.ExecutePreprocessor.enabled = True
c.ExecutePreprocessor.kernel_manager_class = ThisPython
c.ExecutePreprocessor.record_timing = False  # no timings in the file with --to notebook
c.ExecutePreprocessor.store_widget_state = False
c.KernelManager.transport_encryption = "auto"  # where left out, the kernel prints a warning
