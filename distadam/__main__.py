"""Run the command line as ``python -m distadam``."""

from distadam.cli import main

if __name__ == "__main__":
    main()
