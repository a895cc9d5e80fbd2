"""Imported first by every program here: where its Python lacks what they need, one line says which Python has it.

That is the Python of the machine as a rule, in a shell in which .venv was not activated. A folder, because every file
beside it is a program.
"""

import importlib.util
import sys

NEEDED = ("megatron_hammer", "numpy", "orjson", "xxhash", "yaml", "torch")  # by any program, to begin with

missing = next((name for name in NEEDED if importlib.util.find_spec(name) is None), None)
if missing is not None:
    sys.stderr.write(
        f"error[E251]: the module {missing} is not there for {sys.executable}, which runs this program; "
        "use the Python that has all: source .venv/bin/activate (bash tools/make_venv.sh makes it)\n"
    )
    sys.exit(2)
