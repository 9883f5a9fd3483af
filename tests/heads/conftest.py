"""What must be set before the first import of transformers."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
