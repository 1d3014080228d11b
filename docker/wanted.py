"""Print what a pyproject.toml needs to run and to be installed, one requirement a line.

python3 docker/wanted.py pyproject.toml > wanted.txt
"""

import sys
import tomllib
from pathlib import Path

about = tomllib.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
print("\n".join([*about["project"]["dependencies"], *about["build-system"]["requires"]]))
