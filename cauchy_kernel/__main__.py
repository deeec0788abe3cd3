"""`python -m cauchy_kernel`: which backend serves which device, why, and whether it is right."""

from __future__ import annotations

import argparse
import logging
import sys


def parse(argv: list[str] | None = None) -> None:
    """There is nothing to choose: --help, and an error for all else."""
    about = "Which backend serves which device, why, and whether it is right; status 1 if not."
    more = "The variable SASHIMI_KERNEL chooses: torch, cpu or cuda."
    argparse.ArgumentParser("python -m cauchy_kernel", None, about, more).parse_args(argv)


if __name__ == "__main__":  # answered before the imports below, which take seconds
    sys.stdout.reconfigure(errors="replace")  # letters that the console has not: of paths
    parse()

import torch

import cauchy_kernel

from . import build, native, ops
from .benchmark import example, gradients, largest_errors, naive

TOLERANCE = {torch.complex64: 1e-5, torch.complex128: 1e-9}


def main(argv: list[str] | None = None) -> int:
    parse(argv)
    logging.getLogger("cauchy_kernel").setLevel(logging.ERROR)  # the reason is printed below
    ops.SMALL = 0  # small as they are, in the type they have
    failed = False
    for device in ["cpu"] + ["cuda"] * torch.cuda.is_available():
        try:
            lib, why = native.library(device)
        except build.DemandError as error:  # of SASHIMI_KERNEL
            print(f"error: {error}", file=sys.stderr)
            return 2
        name = "plain PyTorch" if lib is None else "compiled"
        print(f"{device} tensors: {name} ({why})")
        for dtype, tolerance in TOLERANCE.items():
            # Against the sums as written, in double on the CPU: formula and gradient by autograd.
            worst = 0.0
            for length in (100, 101):
                parameters = example(64, 64, dtype, device)
                cpu = [x.cpu() for x in parameters]
                double = [x.to(torch.promote_types(x.dtype, torch.double)) for x in cpu]
                truth = gradients(naive, double, length)
                values = gradients(cauchy_kernel.nplr_kernel, parameters, length)
                worst = max(worst, *largest_errors([x.cpu() for x in values], truth))
            failed |= not worst <= tolerance
            verdict = "ok" if worst <= tolerance else f"FAILED, more than {tolerance}"
            print(f"  {str(dtype).split('.')[1]}: largest relative error {worst:.1e}, {verdict}")
    if not torch.cuda.is_available():
        print("cuda tensors: none, PyTorch finds no GPU")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
