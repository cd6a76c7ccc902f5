"""Work in a process of its own, so that its memory does not count under this one's: asking for it, and answering.

    result = call("edge_moe.bench.sweep", {"ram": 1}, killed="...")  # here
    if __name__ == "__main__": answer(function)                      # there: prints function(ram=1) as JSON

The answer is the child's one line on stdout; an expected error is raised here as it was there.
"""

import json
import os
import subprocess
import sys

ERRORS = {kind.__name__: kind for kind in (ValueError, MemoryError, FileExistsError, FileNotFoundError)}


def call(module: str, arguments: dict, killed: str, **environment: str):
    """What `module`, run as a program, answers to `arguments`. killed: what to say when the system ended it.

    Raises what the child raised: an error of ERRORS by its name, OSError for another.
    """
    command = [sys.executable, "-m", module, json.dumps(arguments)]
    child = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment})
    if child.returncode == 0:
        return json.loads(child.stdout)
    kind, _, message = child.stdout.strip().partition(": ")
    unexpected = child.stderr.strip().splitlines()[-1:] if child.returncode > 0 else []
    raise ERRORS.get(kind, OSError)(message or "".join(unexpected) or killed)


def answer(function) -> None:
    """Call function(**arguments) with the arguments of this program and print what it returns, or its error."""
    try:
        print(json.dumps(function(**json.loads(sys.argv[1]))))
    except (ValueError, OSError, MemoryError) as error:
        kind = next((name for name, kind in ERRORS.items() if isinstance(error, kind)), "OSError")
        print(f"{kind}: {error}")
        sys.exit(1)
