"""`python -m moe_export.verify.parallel`, started by torchrun."""

import sys

from moe_export.verify.parallel.run import main

sys.exit(main())
