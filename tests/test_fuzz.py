"""A short run of ``fuzz.py``: some mutants of every format; the whole run is a script."""

import pytest
from fuzz import FORMATS, fuzz

MUTANTS = {"hdf5": 3, "keras": 3, "onnx": 8, "store": 6, "bundle": 12}


@pytest.mark.parametrize("kind", FORMATS)
def test_mutants_are_read_or_refused_in_one_line(kind):
    assert fuzz([kind], seed=1, indices=range(MUTANTS.get(kind, 10))) == []
