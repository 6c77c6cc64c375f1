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


def test_one_sample_for_a_batch_norm_is_told_with_what_helps(together):
    with pytest.raises(ValueError, match="more than 1 value per channel") as caught:
        together(unlike.with_norms, sync_batch_norm=False)
    assert "divided over 2 processes, and this one got 1 sample of it" in "\n".join(caught.value.__notes__)


def test_what_one_process_logs_alone_is_told_by_its_name_and_ranks(together):
    with pytest.raises(ValueError, match="'mine' was logged on rank 1 and not on rank 0. Log"):
        together(unlike.logs_alone, 1)
