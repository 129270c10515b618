"""The first import of every script: a Python that is too old ends here, in one line.

From here on a script also ends in one line when it is stopped, be it amid the next imports (see
stopping.py). Written for Python 2.7 and later, so that an old one reads it at all.
"""

import sys

if sys.version_info < (3, 10):
    sys.stderr.write(
        "error: this needs Python 3.10 or later and runs on %d.%d; with conda: "
        "conda create -n mini-clip python=3.11 && conda activate mini-clip\n" % sys.version_info[:2]
    )
    sys.exit(2)

from support import stopping

if stopping.in_a_script():
    stopping.listen()
