"""What attention to a text costs on a CPU, by its number of words: forward, and with its gradients.

    python benchmarks/text_keys.py                    the icon world's 7 words and what they are padded to, one thread

Shapes are those of the local ladder: 64 images of 16 slots, heads of dimension 8 (12 at 930K). Forms take turns, and
the best time of each counts.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

ROUNDS, CALLS = 7, 40


def attention(heads: int, words: int) -> tuple[Callable[[], None], Callable[[], None]]:
    """Forward, and forward and backward, of 64 images of 16 slots that attend to `words` places, 7 of them words."""
    q, k, v = (torch.randn(64, heads, length, 8, requires_grad=True) for length in (16, words, words))
    mask = (torch.arange(words) < 7).expand(64, 1, 1, words)

    @torch.no_grad()
    def forward() -> None:
        F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    def both() -> None:
        mixed: Tensor = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        mixed.backward(torch.ones_like(mixed))

    return forward, both


def seconds(call: Callable[[], None]) -> float:
    start = time.perf_counter()
    for _ in range(CALLS):
        call()
    return (time.perf_counter() - start) / CALLS


def main() -> None:
    p = argparse.ArgumentParser(description="Milliseconds of attention to a text of 7 words, as it is and padded to 8.")
    p.add_argument("--heads", type=int, nargs="+", default=[2, 5, 8], help="of 50K, 190K and 930K (2 5 8)")
    args = p.parse_args()
    torch.set_num_threads(1)
    print("heads  forward, ms: 7 and 8  ratio   with gradients: 7 and 8  ratio")
    for heads in args.heads:
        forms = [*attention(heads, 7), *attention(heads, 8)]
        best = [min(times) for times in zip(*([seconds(form) for form in forms] for _ in range(ROUNDS)), strict=True)]
        seven, seven_both, eight, eight_both = (1e3 * value for value in best)
        print(f"{heads:5d} {seven:14.2f} {eight:6.2f} {seven / eight:6.2f} {seven_both:16.2f} {eight_both:6.2f} "
              f"{seven_both / eight_both:6.2f}")  # fmt: skip


if __name__ == "__main__":
    main()
