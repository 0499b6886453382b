"""`make fuzz-cpp`: the fuzzers of the C++ library, for as long as one likes, from a new seed each
time.

python -m tests.cpp_fuzz FOLDER ROUNDS
"""

from __future__ import annotations

import json
import secrets
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.cpp_build import fuzz_corpus


def main() -> None:
    """Run all; a crash ends it, with the seed that makes it again."""
    folder, rounds = Path(sys.argv[1]), sys.argv[2]
    for target, documents in fuzz_corpus().items():
        seed = str(secrets.randbits(32))
        with tempfile.TemporaryDirectory() as place:
            paths = [Path(place) / str(number) for number in range(len(documents))]
            for path, document in zip(paths, documents, strict=True):
                path.write_text(json.dumps(document))
            sys.stdout.write(f"fuzz_{target} {rounds} {seed}: ")
            sys.stdout.flush()
            subprocess.run([folder / f"fuzz_{target}", rounds, seed, *paths], check=True)


if __name__ == "__main__":
    main()
