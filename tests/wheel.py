"""What a built wheel holds: `python tests/wheel.py dist/*.whl`.

The package, the configs inside it, Hydra's plugin, the licence, and what pip wants to know; not one
file more, nor fewer than are kept in the repository.
"""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
#: Folders of the repository, and where the wheel has them.
FOLDERS = {
    "tokenprune/": "tokenprune/",
    "hydra_plugins/": "hydra_plugins/",
    "configs/": "tokenprune/configs/",
}
ABOUT = ("METADATA", "WHEEL", "RECORD", "entry_points.txt", "licenses/LICENSE")


def expected(kept: list[str], about: str) -> set[str]:
    """Files of a wheel.

    Args:
        kept: Files of the repository.
        about: The wheel's folder of metadata.
    """
    files = {
        inside + path.removeprefix(folder)
        for path in kept
        for folder, inside in FOLDERS.items()
        if path.startswith(folder)
    }
    return files | {f"{about}/{name}" for name in ABOUT}


def main(wheel: Path) -> int:
    """Prints what the wheel has too much or too little; 1 if anything."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    kept = [path for path in run.stdout.splitlines() if (ROOT / path).is_file()]
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if not name.endswith("/")}
    (about,) = {name.split("/")[0] for name in names if ".dist-info/" in name}
    wanted = expected(kept, about)
    for name in sorted(names ^ wanted):
        print(f"{wheel.name}: {'too much' if name in names else 'missing'}: {name}")
    print(f"{wheel.name}: {len(names)} files")
    return int(names != wanted)


if __name__ == "__main__":
    sys.exit(max(main(Path(path)) for path in sys.argv[1:]))
