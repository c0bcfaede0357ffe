"""The pool of memory for large results (moe_runtime/core/memory.py): what is used again, and what is given back."""

from __future__ import annotations

import gc
import os
import threading

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_runtime.core.memory import SMALL_BYTES, Pool

LARGE = 3 << 20


def test_a_large_result_takes_the_place_of_one_that_is_gone():
    pool = Pool()
    first = pool.empty((3, 1 << 20), torch.uint8)
    address = first.data_ptr()
    second = pool.empty((3, 1 << 20), torch.uint8)
    assert second.data_ptr() != address  # the first is still there
    del first
    assert pool.empty((LARGE // 4,), torch.float32).data_ptr() == address


def test_a_view_keeps_the_block():
    pool = Pool()
    whole = pool.empty((LARGE,), torch.uint8)
    address, part = whole.data_ptr(), whole[100:200].view(10, 10)
    del whole
    gc.collect()
    other = pool.bytes(LARGE)
    assert other.ctypes.data != address
    del part
    assert pool.bytes(LARGE).ctypes.data == address


def test_autograd_keeps_what_it_saved():
    pool = Pool()
    x = torch.ones(LARGE // 4, requires_grad=True)
    made = pool.empty((LARGE // 4,), torch.float32).fill_(3)
    y = (x * made).sum()
    del made
    pool.empty((LARGE // 4,), torch.float32).fill_(5)
    y.backward()
    assert (x.grad == 3).all()


def test_small_results_are_not_the_pools():
    pool = Pool()
    kept = [pool.empty((SMALL_BYTES,), torch.uint8), pool.bytes(10)]
    assert pool.describe() == "large results: 0 MiB in use, 0 MiB kept for the next" and len(kept) == 2


def test_what_nobody_asks_for_any_more_is_given_back():
    pool = Pool()
    pool.bytes(100 << 20)
    assert "100 MiB kept" in pool.describe()
    for _ in range(70):
        pool.bytes(LARGE)  # too small for the large block
    assert "4 MiB kept" in pool.describe() and "0 MiB in use" in pool.describe()


def test_a_block_is_at_most_twice_what_was_asked_for():
    pool = Pool()
    pool.bytes(64 << 20)
    small = pool.bytes(LARGE)
    assert "4 MiB in use, 64 MiB kept" in pool.describe()
    del small


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 24), st.integers(0, 5)), max_size=40))
def test_results_never_share_memory(steps):
    pool, held = Pool(), {}
    for number, (size, place) in enumerate(steps):
        array = pool.bytes(size << 19)
        array[:: 1 << 12] = number % 251
        array[-1] = number % 251
        held[place] = (number, array)
        assert all((other[:: 1 << 12] == n % 251).all() and other[-1] == n % 251 for n, other in held.values())


def test_threads_ask_and_let_go_at_once():
    pool, problems = Pool(), []

    def work(number: int) -> None:
        for _ in range(50):
            array = pool.bytes(LARGE)
            array[::4096] = number
            if (array[::4096] != number).any():
                problems.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not problems and "0 MiB in use" in pool.describe()


@pytest.mark.parametrize("shape", [(0,), (0, 5), (7, 3), (3, 1 << 19)])
def test_it_is_torch_empty(shape):
    made = Pool().empty(shape, torch.bfloat16)
    assert made.shape == torch.Size(shape) and made.dtype == torch.bfloat16 and made.is_contiguous()
    assert np.prod(shape) == made.numel()


def test_a_forked_child_has_memory_of_its_own():
    array = Pool().bytes(LARGE)
    array[:] = 1
    child = os.fork()
    if child == 0:
        array[:] = 2
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0 and (array == 1).all()
