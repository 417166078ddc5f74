"""Run the benches one after another, alone on the machine, and write what they found into README and guides.

    python tools/bench_all.py                       # days
    python tools/bench_all.py assemble assembly     # only these
    python tools/bench_all.py --list

Every bench runs in a process of its own, so that none inherits another's threads and memory, once for every line of
`RUNS`, or with its defaults: what some results come from instead stands in their `command`. One that fails does not
stop the others; the exit code says whether any did. What is written are the documents' marked figures (see
`write_documents.py`).
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path
from typing import Final

TOOLS: Final = Path(__file__).resolve().parent
# Of what is run more than once: the arguments of every run.
RUNS: Final = {
    "assemble_full_size": ((), ("--kill-after", "600")),
    "inheritance": ((), ("--full-size",)),
}


def benches() -> dict[str, Path]:
    """Every bench by name, the main job's first, and the matrix of what works around a student."""
    found = {path.stem.removeprefix("bench_"): path for path in sorted(TOOLS.glob("bench_*.py"))}
    del found["all"]
    return {"assemble": found.pop("assemble"), **found, "matrix": TOOLS / "make_matrix.py"}


def main() -> None:
    """Run them."""
    known = benches()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="only these benches")
    parser.add_argument("--list", action="store_true", help="print what there is, and stop")
    arguments = parser.parse_args()
    if unknown := set(arguments.names) - known.keys():
        parser.error(f"no bench {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    if arguments.list:
        for name, path in known.items():
            print(f"{name}: {path.read_text(encoding='utf-8').splitlines()[0].strip(chr(34))}")
        return
    failed = []
    for name in arguments.names or known:
        for more in RUNS.get(name, ((),)):
            began, shown = time.monotonic(), " ".join((name, *more))
            print(f"== {shown}", flush=True)
            code = subprocess.run([sys.executable, str(known[name]), *more], check=False).returncode
            said = "done" if code == 0 else f"failed with {code}"
            print(f"== {shown}: {said}, {time.monotonic() - began:.0f} s", flush=True)
            if code:
                failed.append(shown)
    code = subprocess.run([sys.executable, str(TOOLS / "write_documents.py")], check=False).returncode
    if failed:
        print(f"failed: {', '.join(failed)}")
    sys.exit(1 if failed or code else 0)


if __name__ == "__main__":
    main()
