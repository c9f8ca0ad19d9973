"""`python -m rlhf_cli`, which torchrun starts."""

import sys

from rlhf_cli.cli import main

sys.exit(main())
