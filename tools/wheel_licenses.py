"""Put the licences of the libraries that auditwheel copied into a wheel, into that wheel.

Usage: wheel_licenses.py WHEEL BUILT...     BUILT: programs, to see where their libraries came from

Debian keeps each package's licence in ``/usr/share/doc/<package>/copyright``; a library whose
package has none, or that no package owns, is an error: what cannot be named is not passed on.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from pathlib import Path

# auditwheel puts eight digits of a hash before the first dot.
MANGLED = re.compile(r"(?P<stem>[^.]+)-[0-9a-f]{8}(?P<rest>\..*)")


def origins(programs: list[str]) -> dict[str, Path]:
    """File name → path of every library that the dynamic loader gives these programs."""
    found: dict[str, Path] = {}
    for program in programs:
        said = subprocess.run(["ldd", program], capture_output=True, text=True, check=True).stdout
        for path in re.findall(r"=> (/\S+)", said):
            real = Path(path).resolve()
            found[real.name] = found[Path(path).name] = real
    return found


def package_of(library: Path) -> str:
    """Name the Debian package that owns a file, under either of the merged /usr's names."""
    names = [str(library), str(library).removeprefix("/usr")]
    said = subprocess.run(["dpkg", "-S", *names], capture_output=True, text=True, check=False)
    owners = {line.split(":")[0] for line in said.stdout.splitlines() if ": /" in line}
    if len(owners) != 1:
        raise SystemExit(f"wheel_licenses: {library} belongs to {sorted(owners) or 'no package'}")
    return owners.pop()


def main() -> None:
    """Add them to the wheel that the first argument names."""
    wheel, programs = Path(sys.argv[1]), sys.argv[2:]
    where = origins(programs)
    with tempfile.TemporaryDirectory() as name:
        subprocess.run(["wheel", "unpack", "--dest", name, wheel], check=True, capture_output=True)
        (root,) = Path(name).iterdir()
        (info,) = root.glob("*.dist-info")
        folder = info / "licenses" / "libraries"
        folder.mkdir(parents=True)
        for library in sorted((root / "pantheraml.libs").iterdir()):
            match = MANGLED.fullmatch(library.name)
            original = match["stem"] + match["rest"] if match else library.name
            package = package_of(where[original])
            text = Path("/usr/share/doc", package, "copyright").read_text(encoding="utf-8")
            (folder / f"{package}.txt").write_text(text, encoding="utf-8")
            print(f"  {original} ({package})")
        subprocess.run(
            ["wheel", "pack", "--dest-dir", wheel.parent, root], check=True, capture_output=True
        )


if __name__ == "__main__":
    main()
