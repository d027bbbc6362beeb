"""Prints constraints.txt from the environment that it runs in: every package of the train and dev sets, direct or not.

.venv/bin/python tests/pins.py > constraints.txt        after the tests have passed with newer packages
"""

from __future__ import annotations

from importlib.metadata import Distribution, PackageNotFoundError, distribution

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

OLDEST = "3.10"  # requires-python in pyproject.toml
HEAD = """\
# The versions that the tests pass with: every package of the train and dev sets, direct or not. `make` installs these.
# A pin with a marker has no release for Python 3.10, which then takes the newest that it can. Made by tests/pins.py.
"""


def needed(name: str, extras: tuple[str, ...], found: dict[str, Distribution], seen: set[tuple[str, str]]) -> None:
    """Adds `name` with its extras, and whatever these need here, to `found`."""
    try:
        package = distribution(name)
    except PackageNotFoundError:
        return  # needed on another platform only
    key = canonicalize_name(name)
    found[key] = package
    for extra in {"", *extras}:
        if (key, extra) in seen:
            continue
        seen.add((key, extra))
        for line in package.requires or ():
            requirement = Requirement(line)
            if requirement.marker is None or requirement.marker.evaluate({"extra": extra}):
                needed(requirement.name, tuple(requirement.extras), found, seen)


def main() -> None:
    found: dict[str, Distribution] = {}
    needed("fluidscale", ("train", "dev"), found, set())
    print(HEAD, end="")
    for name in sorted(found.keys() - {"fluidscale"}):
        package = found[name]
        # A local version (2.13.0+cpu) names a build, not a release.
        release = package.version.split("+")[0]
        allowed = package.metadata.get("Requires-Python")
        old = allowed is None or SpecifierSet(allowed).contains(f"{OLDEST}.0")
        print(f"{name}=={release}" + ("" if old else f' ; python_version > "{OLDEST}"'))


if __name__ == "__main__":
    main()
