"""What a pod of `crosstune doctor nodes` runs: ``python -P -m launchers.kubernetes.look REQUEST``.

The look of every launcher (`launchers.doctor.nodes.look`), in the place that the controller of the job gives the pod.
The request is the last argument, since nothing can be written to a pod before it runs. It holds no secret.
"""

from __future__ import annotations

import os
import sys

from configs.errors import CrosstuneError
from launchers.doctor.nodes.ending import ends_on_signals
from launchers.doctor.nodes.look import answer
from launchers.kubernetes.entry import take_number

MACHINE = "CROSSTUNE_MACHINE"
"""What the cluster calls the machine: the host name is the pod's."""


def main() -> None:
    """Answers the request."""
    ends_on_signals()
    try:
        take_number(os.environ)
    except CrosstuneError as error:
        print(error.render(), file=sys.stderr)
        sys.exit(error.exit_code)
    answer(sys.argv[1], os.environ.pop(MACHINE, ""))


if __name__ == "__main__":
    main()
