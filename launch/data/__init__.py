"""Training data: sources become one memory-mapped array of tokens, and batches are a function of the step.

The path: `sources` finds the files, `documents` and `arrays` read them, `encoding` makes tokens, `corpus` keeps them in
a cache file, `order` shuffles, `batches` cuts windows for each rank. Nothing here talks to other ranks.
"""

from .batches import Batches, ValidationBatches, held_out
from .corpus import Corpus, open_corpus
from .sources import PYTHON_STANDARD_LIBRARY, SourceFile, find_files

__all__ = [
    "PYTHON_STANDARD_LIBRARY",
    "Batches",
    "Corpus",
    "SourceFile",
    "ValidationBatches",
    "find_files",
    "held_out",
    "open_corpus",
]
