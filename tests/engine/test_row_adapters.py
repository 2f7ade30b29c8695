"""What a row's own adapter adds, at any rank and in any layout of what it is added to."""

from __future__ import annotations

import pytest
import torch

from emmech.engine.adapters import write


@pytest.mark.parametrize("rank", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_write_is_added_and_lies_in_memory_as_products_want_it(rank, dtype):
    generator = torch.Generator().manual_seed(rank)
    shared = torch.randn(1, 5, 8, generator=generator).to(dtype)
    z = torch.randn(5, 4, rank, generator=generator).transpose(0, 1)  # as one product for all variants leaves it
    b = torch.randn(4, rank, 8, generator=generator)
    expected = (shared.float() + z @ b).to(dtype)
    added = write(shared.expand(4, 5, 8), z, b)
    torch.testing.assert_close(added, expected)
    assert added.is_contiguous()  # a linear map of anything else is a product for each row
    own = shared.repeat(4, 1, 1)
    with torch.no_grad():
        in_place = write(own, z, b, in_place=True)
    torch.testing.assert_close(in_place, expected)
    assert (in_place.data_ptr() == own.data_ptr()) == (dtype == torch.float32)


def test_gradients_pass_through_a_write():
    z = torch.randn(2, 3, 1, dtype=torch.float64, requires_grad=True)
    b = torch.randn(2, 1, 4, dtype=torch.float64, requires_grad=True)
    out = torch.randn(1, 3, 4, dtype=torch.float64).expand(2, 3, 4)
    assert torch.autograd.gradcheck(lambda z, b: write(out, z, b, in_place=True), (z, b))
