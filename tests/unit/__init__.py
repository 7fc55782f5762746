"""Unit tests of this project's own code: python -m unittest discover -t . -s tests/unit"""

import os

# Small matrices are multiplied no faster by two threads, and waiting threads keep others from work.
os.environ.setdefault("OMP_NUM_THREADS", "1")
