"""What a page or a test may change for a whole process, put back."""

import os
import random
import sys
import warnings
from contextlib import contextmanager

import numpy as np
import torch


@contextmanager
def restored():
    """Put back what belongs to the process, so that nothing depends on what ran before it."""
    environment, path, filters = dict(os.environ), list(sys.path), warnings.filters[:]
    dtype, threads = torch.get_default_dtype(), torch.get_num_threads()
    deterministic = torch.are_deterministic_algorithms_enabled()
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(environment)
        sys.path[:], warnings.filters[:] = path, filters
        torch.set_default_dtype(dtype)
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(deterministic)
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
        if "matplotlib.pyplot" in sys.modules:
            sys.modules["matplotlib.pyplot"].close("all")
