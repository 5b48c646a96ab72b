"""`python -m hf_robust.cli`, for `accelerate launch` and `torchrun`."""

import sys

from hf_robust.cli import main

if __name__ == "__main__":
    sys.exit(main())
