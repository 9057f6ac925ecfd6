"""One thread for each process, and its children: more only wait for each other over models as small as the tests'."""

import os


os.environ.setdefault("OMP_NUM_THREADS", "1")
