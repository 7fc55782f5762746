"""How nbconvert makes the page: jupyter nbconvert --config page.py assignment_09.ipynb

It runs the notebook and writes assignment_09.html, which needs no network.
"""

from pathlib import Path

c = get_config()  # noqa: F821, nbconvert brings it
c.NbConvertApp.export_format = "html"
c.HTMLExporter.template_file = str(Path(__file__).with_name("page.html.j2"))
c.HTMLExporter.embed_images = True
c.ExecutePreprocessor.enabled = True
c.ExecutePreprocessor.record_timing = False  # no timings in the file with --to notebook
c.ExecutePreprocessor.store_widget_state = False
c.KernelManager.transport_encryption = "auto"  # where left out, the kernel prints a warning
