"""Writes what every shipped judge gives for the fixed pictures to golden.json: after one was trained anew.

python -m fluidscale.evaluate.keep_golden
"""

from __future__ import annotations

import sys

from fluidscale.evaluate.detect import load_detector
from fluidscale.evaluate.features import load_features
from fluidscale.evaluate.golden import SHIPPED, network_golden
from fluidscale.record import write_json
from fluidscale.tokens.shipped import shipped_cards


def main() -> int:
    """Writes the golden values of every shipped judge, on the CPU."""
    write_json(SHIPPED, {})
    loaders = {"detector": load_detector, "features": load_features}
    found = {
        card["sha256"]: network_golden(loaders[card["kind"]](name).network, card["resolution"])
        for name, card in shipped_cards().items()
        if card["kind"] in loaders
    }
    write_json(SHIPPED, found)
    print(f"{SHIPPED}: {len(found)} judges")
    return 0


if __name__ == "__main__":
    sys.exit(main())
