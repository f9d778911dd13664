"""Shared test set-up."""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
# Before torch is imported: flex_attention runs uncompiled, for compiling it takes minutes.
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
