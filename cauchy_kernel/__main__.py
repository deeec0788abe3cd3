"""`python -m cauchy_kernel`: which backend serves which device, why, and whether it is right."""

import argparse
import logging
import sys

import torch

import cauchy_kernel

from . import build, functions, native
from .benchmark import example, gradients, largest_errors, naive

TOLERANCE = {torch.complex64: 1e-5, torch.complex128: 1e-9}


def main(argv: list[str] | None = None) -> int:
    """Exit status: 1 if a backend is wrong, 2 if SASHIMI_KERNEL demands what there is not."""
    about = "Which backend serves which device, why, and whether it is right; status 1 if not."
    more = "The variable SASHIMI_KERNEL chooses: torch, cpu or cuda."
    argparse.ArgumentParser("python -m cauchy_kernel", None, about, more).parse_args(argv)
    sys.stdout.reconfigure(errors="replace")  # letters that the console has not: of paths
    logging.getLogger("cauchy_kernel").setLevel(logging.ERROR)  # the reason is printed below
    functions.SMALL = 0  # small as they are, in the type they have
    failed = False
    for device in ["cpu"] + ["cuda"] * torch.cuda.is_available():
        try:
            run, why = native.backend(device)
        except build.DemandError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        print(f"{device} tensors: {'compiled' if run else 'plain PyTorch'} ({why})")
        for dtype, tolerance in TOLERANCE.items():
            # Against the sums as written, in double on the CPU: formula and gradient by autograd.
            worst = 0.0
            for length in (100, 101):
                parameters = example(64, 64, dtype, device)
                double = [
                    x.cpu().to(torch.promote_types(x.dtype, torch.double)) for x in parameters
                ]
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
