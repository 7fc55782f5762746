"""Unit tests of this project's own code: python -m unittest discover -t . -s tests/unit"""

import os

# The tests start processes of their own, and threads that wait keep others from work.
os.environ.setdefault("OMP_NUM_THREADS", "1")
