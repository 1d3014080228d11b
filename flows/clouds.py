"""CLOUDS Pipeline: train, write prompts, paint, label, refine, self-train, evaluate, report.

python flows/clouds.py                      the whole recipe (default: miniature)
python flows/clouds.py --stage refine       one stage alone
python flows/clouds.py plan                 what would run, and why
prefect deployment run clouds/whole         the same under Prefect (flows/clouds.py:clouds)
"""

import sys
from pathlib import Path

_ROOT = str(Path(__file__).resolve().parents[1])
if sys.path and Path(sys.path[0] or ".").resolve() == Path(__file__).resolve().parent:
    sys.path[0] = _ROOT  # not flows/: its modules would hide others of the same name
elif _ROOT not in sys.path:
    sys.path.insert(0, _ROOT)

if __name__ == "__main__":
    from flows.cli import main

    sys.exit(main())

from flows.prefect_flow import clouds  # noqa: E402  (the deployment's entrypoint)

__all__ = ["clouds"]
