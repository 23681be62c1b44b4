"""The `pumice` command, and `python -m pumice`: takes Ctrl-C, then loads the command line."""

from __future__ import annotations

from collections.abc import Sequence

from pumice.core.interrupts import take_ctrl_c


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line and exit, as `pumice.cli.app.main` says."""
    take_ctrl_c()
    from pumice.cli.app import main as run

    run(args)


if __name__ == "__main__":
    main()
