"""Write the tables and figures of README and guides from `tools/results/`.

    python tools/write_documents.py             # writes them
    python tools/write_documents.py --check     # only says which are not what the results hold

A document marks what is written by a name: `<!-- results: NAME -->` … `<!-- /results -->`, on lines of their own around
a table or inside a sentence. The names are the functions of the package `documents`. What was measured with other
weights than the bundled model has now is shown with a word on that.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Final

sys.path.insert(0, str(Path(__file__).resolve().parent))

from documents import assembly, distill, examples, frontier, full_size, inheritance, rivals
from documents.figures import with_older_weights

TOP: Final = Path(__file__).resolve().parents[1]
DOCUMENTS: Final = (TOP / "README.md", *sorted((TOP / "tools" / "guides").glob("*.md")))
OLDER: Final = "measured before `mini-sd` was last trained"
MARKED: Final = re.compile(r"<!-- results: (?P<name>\w+) -->(?P<text>.*?)<!-- /results -->", re.DOTALL)


def figures() -> dict[str, Callable[[], str]]:
    """Everything that a document can show, by name."""
    modules = (assembly, distill, examples, frontier, full_size, inheritance, rivals)
    return {
        name: value
        for module in modules
        for name, value in vars(module).items()
        if callable(value) and getattr(value, "__module__", "") == module.__name__ and not name.startswith("_")
    }


def written(path: Path) -> str:
    """A document with everything in it as the results have it. Raises KeyError for a name that there is not."""
    known = figures()
    where = "tools/results" if path.parent == TOP else "../results"

    def fill(match: re.Match[str]) -> str:
        text, older = with_older_weights(known[match["name"]])
        edge = "\n" if match["text"].startswith("\n") else ""
        if older:
            text += f"\n\n*{OLDER.capitalize()}.*" if edge else f" ({OLDER})"
        text = text.replace("{results}", where)
        return f"<!-- results: {match['name']} -->{edge}{text}{edge}<!-- /results -->"

    return MARKED.sub(fill, path.read_text(encoding="utf-8"))


def main() -> None:
    """Write, or check."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 where something differs")
    check = parser.parse_args().check
    stale = [path for path in DOCUMENTS if written(path) != path.read_text(encoding="utf-8")]
    for path in stale:
        print(f"{path.relative_to(TOP)} {'is not what the results hold' if check else 'is written'}")
        if not check:
            path.write_text(written(path), encoding="utf-8")
    sys.exit(int(check and bool(stale)))


if __name__ == "__main__":
    main()
