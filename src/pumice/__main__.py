"""`python -m pumice` is the `pumice` command."""

from pumice.cli.app import main

if __name__ == "__main__":
    main()
