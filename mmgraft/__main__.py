"""``python -m mmgraft``, the same as the command ``mmgraft``."""

from mmgraft.cli.app import main

if __name__ == "__main__":
    main()
