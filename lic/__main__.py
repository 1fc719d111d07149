"""``python -m lic``."""

from lic.cli import main

if __name__ == "__main__":
    main()
