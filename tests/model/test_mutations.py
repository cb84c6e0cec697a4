"""The oracle sees every listed mistake: each one breaks its bound, and no mistake does not."""

import pytest

pytest.importorskip("torch")

from tests.model.mutations import INVISIBLE, MUTATIONS
from tests.model.oracle import BOUND
from tests.model.table import CONTROLS, error_with


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda m: m.id)
def test_a_mutation_breaks_the_bound(mutation):
    # Twice the bound, so that no mistake is seen by the luck of a rounding error.
    assert error_with(mutation) > 2 * BOUND


@pytest.mark.parametrize("mutation", [*CONTROLS, *INVISIBLE], ids=lambda m: f"{m.id} {m.scale}")
def test_the_same_comparison_holds_without_a_mutation(mutation):
    assert error_with(mutation) <= BOUND
