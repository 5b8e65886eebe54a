"""`fifa select` on 10M scored pairs against a bare join and top-K; the work is in selection.py.

This file has the name of a module of the standard library, and Python looks for modules beside
the script first. So it steps out of the way, for itself and for the other benchmarks.
"""

import sys
from pathlib import Path

here = Path(__file__).resolve().parent
if __name__ == "__main__":
    sys.path.append(sys.path.pop(0))
    from selection import main

    main()
else:
    elsewhere, sys.path = sys.path, [path for path in sys.path if Path(path).resolve() != here]
    del sys.modules["select"]
    import select  # noqa: F401  the real one, which the importing script gets

    sys.path = elsewhere
