"""`python -m asdm_compress`."""

from asdm_compress.cli.main import main

if __name__ == "__main__":
    main()
