"""Time of a locally masked convolution: one convolution for each distinct mask and a selection, against unfolding.

    python bench/masked.py [--json PATH]

A pass there and back of a batch of 64, 16 channels of 28 x 28. What is compared, and how to read it, is in
bench/README.md.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import unfold
from turns import Entry, Ratio, Work, about, measure, parser, save, table

from annealed_core.decoders import LocallyMaskedConv, local_masks
from annealed_core.running.system import keep_memory

BATCH, CHANNELS, SIZE = 64, 16, 28


def unfolded(conv: LocallyMaskedConv, x: Tensor) -> Tensor:
    """The plain way, and that of the published code: W (unfold(x) * mask)."""
    masks, chosen = local_masks(0, SIZE, conv.dilation[0], conv.centre)
    patches = unfold(x, 3, conv.dilation, conv.padding).unflatten(1, (conv.in_channels, 9))
    patches = patches * masks.flatten(1)[chosen.flatten()].T
    return (conv.weight.flatten(1) @ patches.flatten(1, 2)).unflatten(-1, (SIZE, SIZE)) + conv.bias.view(-1, 1, 1)


def selected(conv: LocallyMaskedConv, x: Tensor) -> Tensor:
    """As the decoder does it."""
    return conv(x, 0)


WAYS: dict[str, Callable[[LocallyMaskedConv, Tensor], Tensor]] = {"unfolded": unfolded, "selected": selected}


def passes(way: str) -> Work:
    keep_memory()
    conv = LocallyMaskedConv(CHANNELS, CHANNELS)
    x = torch.randn(BATCH, CHANNELS, SIZE, SIZE)
    x = x.contiguous(memory_format=torch.channels_last if way == "selected" else torch.contiguous_format)
    inputs = [x.requires_grad_(), *conv.parameters()]

    def work(times: int) -> None:
        for _ in range(times):
            torch.autograd.grad(WAYS[way](conv, x).sum(), inputs)

    return work


def check() -> float:
    """The largest relative difference of values and gradients."""
    conv, x = LocallyMaskedConv(CHANNELS, CHANNELS), torch.randn(4, CHANNELS, SIZE, SIZE)
    sides = []
    for way in WAYS.values():
        value = way(conv, x)
        sides.append([value, *torch.autograd.grad(value.square().sum(), list(conv.parameters()))])
    return max(float((a - b).detach().abs().max() / b.detach().abs().max()) for a, b in zip(*sides, strict=True))


def main() -> None:
    arguments = parser("Time of a locally masked convolution.").parse_args()
    machine = about()
    print("; ".join(f"{name} {value}" for name, value in machine.items()))
    error = check()
    if not error < 1e-4:
        raise SystemExit(f"both ways do not agree: relative error {error:.0e}")
    entries = {way: Entry(way, passes, (way,), alone=way) for way in WAYS}
    measure(list(entries.values()), arguments.seconds, arguments.rounds)
    print(table(list(entries.values()), "seconds") + "\n")
    found = [Ratio("unfolded / selected", entries["unfolded"], entries["selected"], "at least", 2.0)]
    print("\n".join(map(str, found)))
    save(arguments.json, machine, list(entries.values()), found)


if __name__ == "__main__":
    main()
