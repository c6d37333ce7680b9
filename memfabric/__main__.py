"""``python -m memfabric`` is the ``memfabric`` command."""

from memfabric.cli import main

if __name__ == "__main__":
    main()
