"""python -m flash_attn_ext info | check | selftest | bench"""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
