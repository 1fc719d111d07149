"""Write weights/SOURCES.md: where the training pictures come from, per source and licence.

    python scripts/list_sources.py INDEX.csv > weights/SOURCES.md

INDEX.csv has a row per picture with the columns shard, source_repo and licence.
"""

from __future__ import annotations

import csv
import re
import sys
from collections import Counter, defaultdict

HEAD = """# Sources of the training pictures

The shipped weights were trained on {pictures:,} pictures from the repositories below (on GitHub, under the
name given), downscaled at least 2× and lightly compressed. Further {held_out} pictures of the same sources
were used to watch for overfitting only. No picture is part of this repository or of the weights. The Kodak
images were never trained on.

Where a source credits its pictures one by one (figure credits in the OpenStax books, `debian/copyright` and
similar files elsewhere), these credits stand in the source and hold here.

| source | pictures | licence |
|---|---:|---|
"""


def licence_name(text: str) -> str:
    """The licence without what is particular to one picture: book revision and figure credit."""
    return re.sub(r" at [0-9a-f]{6,}", "", text.split("; figure")[0])


def main(path: str) -> None:
    sources: dict[str, Counter[str]] = defaultdict(Counter)
    held_out = 0
    with open(path, newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            if row["shard"].startswith("train"):
                sources[row["source_repo"]][licence_name(row["licence"])] += 1
            elif row["shard"].startswith("val"):
                held_out += 1
    print(HEAD.format(pictures=sum(c.total() for c in sources.values()), held_out=held_out), end="")
    for name, licences in sorted(sources.items(), key=lambda item: (-item[1].total(), item[0])):
        print(f"| {name} | {licences.total()} | {'; '.join(licences)} |")


if __name__ == "__main__":
    main(sys.argv[1])
