"""sslctl's losses against lightly's, where lightly is installed (the development extra `bench`)."""

from dataclasses import replace

import pytest

pytest.importorskip("lightly")
from parity_losses import compare, pairs

PAIRS = {pair.name: pair for pair in pairs()}


@pytest.mark.parametrize("name", PAIRS)
def test_values_and_gradients_are_lightlys_unless_documented(name):
    outcome = compare(PAIRS[name])
    assert outcome.verdict in ("agrees", "differs, as documented")
    assert outcome.pair.differs == (not outcome.agrees)
    assert outcome.pair.reason or not outcome.pair.differs


def test_another_temperature_is_found_out():
    pair = PAIRS["nt_xent"]
    assert compare(replace(pair, ours=lambda a, b: pair.ours(a, b) * 1.001)).verdict == "DIFFERS"
