"""``python -m gam_lm`` is the command ``gam``."""

from gam_lm.cli.main import main

if __name__ == "__main__":
    main()
