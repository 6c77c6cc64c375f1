"""Processes that do not all do the same are told so by name, or followed; and runs go on with another number of them."""

import pytest
import unlike
from test_ranks_equal_one import assert_close


@pytest.mark.parametrize("first, then", [(2, 1), (1, 2)])
def test_a_run_with_synced_norms_goes_on_with_another_number_of_processes(together, tmp_path, first, then):
    def run(processes, **options):
        return together(unlike.with_norms, **options) if processes == 2 else unlike.with_norms(together=False, **options)

    run(first, run_dir=tmp_path / "run", stop=11)
    assert_close(unlike.with_norms(together=False), run(then, run_dir=tmp_path / "run", resume=True), f"{first} then {then}")
