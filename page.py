"""How nbconvert makes the page: jupyter nbconvert --config page.py assignment_09.ipynb

It runs the notebook and writes assignment_09.html, which needs no network: the notebook's formulas,
which are LaTeX, become MathML, which browsers draw themselves.
"""

import re
from pathlib import Path

from jinja2 import pass_context
from latex2mathml.converter import convert
from nbconvert.filters.markdown_mistune import IPythonRenderer, MarkdownWithMath


class MathRenderer(IPythonRenderer):
    """nbconvert's Markdown, with formulas as MathML."""

    def inline_math(self, body):
        return mathml(body, "inline")

    def block_math(self, body):
        return f'<span class="formula">{mathml(body, "block")}</span>'

    def latex_environment(self, name, body):
        raise ValueError(rf"write $$…$$, one equation each, in place of \begin{{{name}}}{body}")


def mathml(latex, display):
    """A LaTeX formula as MathML; ValueError names one that browsers would not draw alike."""
    try:
        formula = convert(latex.strip(), display=display)
    except Exception as error:  # of many kinds
        raise ValueError(f"cannot convert the formula {latex} ({error!r}): change it") from error
    # What latex2mathml doesn't know, it passes on; and browsers ignore alphabets of single letters.
    left = re.search(r'\\\w*.?|<mi>[&}]</mi>|<mo />|mathvariant="(?!normal)[^"]*"', formula)
    if left:
        hint = r"change it, or put braces, as in \mathbb{E}"
        raise ValueError(f"cannot convert the formula {latex} (it leaves {left[0]}): {hint}")
    formula = formula.replace("<mi>&#x0007E;</mi>", "<mo>&#x0223C;</mo>")  # \sim, with its spaces
    # Where a font lacks parts of a long brace, half of it is missing: page.html.j2 draws it.
    formula = formula.replace("<munder><munder>", '<munder><mrow class="braced">')
    formula = formula.replace("<mo>&#x23DF;</mo></munder>", "</mrow>")
    # log, tr and their like, with a space to the letters around them, but not to parentheses
    name = r"(</m\w+>)?<m[io]>([A-Za-z]{2,})</m[io]>((?:<mrow>)?<mo[^>]*>(?:&#x00028;|\()</mo>)?"
    return re.sub(name, operator, formula)


def operator(match):
    """The name of a function, such as log, as a MathML operator."""
    before, name, parenthesis = match.groups("")
    left = "0" if before in ("", "</mo>") else "0.17em"
    right = "0" if parenthesis else "0.17em"
    return f'{before}<mo lspace="{left}" rspace="{right}">{name}</mo>{parenthesis}'


@pass_context
def markdown_to_html(context, source):
    """What templates call for Markdown, of cells and of their output."""
    path = context["resources"]["metadata"]["path"]  # of the pictures to embed
    renderer = MathRenderer(escape=False, embed_images=True, path=path)
    return MarkdownWithMath(renderer=renderer).render(source)


c = get_config()  # noqa: F821, nbconvert brings it
c.NbConvertApp.export_format = "html"
c.HTMLExporter.template_file = str(Path(__file__).with_name("page.html.j2"))
c.HTMLExporter.filters = {"markdown2html": markdown_to_html}
c.HTMLExporter.embed_images = True
c.ExecutePreprocessor.enabled = True
c.ExecutePreprocessor.record_timing = False  # no timings in the file with --to notebook
c.ExecutePreprocessor.store_widget_state = False
c.KernelManager.transport_encryption = "auto"  # where left out, the kernel prints a warning
