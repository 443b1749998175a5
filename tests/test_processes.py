import math
import os
import threading
import time

import pytest
import torch

from helpers.processes import at_once, in_order, in_threads


@pytest.fixture(params=[2, 3, 20])
def cores(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


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


def test_threads_share_the_cores_and_give_them_back(cores):
    def mine(_):
        time.sleep(0.02)  # so that no thread does all of it
        return threading.get_ident(), torch.get_num_threads()

    found = list(in_threads(mine, range(20)))
    assert 1 < len({name for name, _ in found}) <= at_once("cpu") == min(8, cores)
    assert {threads for _, threads in found} == {cores // min(8, cores)}
    assert torch.get_num_threads() == cores


def test_one_core_and_a_gpu_take_one_item_at_a_time():
    def mine(_):
        return threading.get_ident(), torch.get_num_threads()

    here = {(threading.get_ident(), torch.get_num_threads())}
    assert set(in_threads(mine, range(3), "cuda")) == here
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert {name for name, _ in in_threads(mine, range(3))} == {threading.get_ident()}
    finally:
        torch.set_num_threads(before)


def test_results_of_threads_are_those_of_one_after_the_other(cores):
    generator = torch.Generator().manual_seed(3)
    items = [torch.randint(-9, 9, (17, 23), generator=generator).float() for _ in range(7)]
    got = list(in_threads(lambda x: x @ x.T, items))
    assert all(torch.equal(a, x @ x.T) for a, x in zip(got, items, strict=True))


def test_after_an_error_no_further_item_is_begun(cores):
    begun = []

    def work(i):
        begun.append(i)
        if i == 1:
            raise ValueError("item 1")
        time.sleep(0.2)  # the first is still at work when the second has failed
        return i

    with pytest.raises(ValueError, match="item 1"):
        list(in_threads(work, range(1000)))
    assert len(begun) <= 2 * at_once("cpu")
    assert torch.get_num_threads() == cores
