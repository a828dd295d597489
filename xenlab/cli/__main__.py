"""``python -m xenlab.cli``: the same as the ``xenlab`` command."""

from __future__ import annotations

from xenlab.cli import main

if __name__ == "__main__":  # workers of `xenlab grade` import this module again
    main()
