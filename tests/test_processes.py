import math
import os

import pytest

from helpers.processes import in_order


@pytest.mark.parametrize("workers", [0, 2])
def test_results_come_in_the_order_of_the_items(workers):
    assert list(in_order(math.sqrt, [9, 1, 4, 0], workers)) == [3, 1, 2, 0]


def test_workers_are_other_processes_and_none_is_this_one():
    def mine(_):
        return os.getpid()

    assert set(in_order(mine, range(3))) == {os.getpid()}
    assert os.getpid() not in set(in_order(pid_of_worker, range(3), 2))


def pid_of_worker(_):
    return os.getpid()


def test_an_error_of_the_work_reaches_the_caller():
    with pytest.raises(ValueError, match=r"math domain error|nonnegative"):
        list(in_order(math.sqrt, [4, -1], 2))
