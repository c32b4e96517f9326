import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from gist_ray.training.dropout import CpuDropout, cheapen_dropout


@given(p=st.floats(0.01, 0.99), rows=st.integers(1, 40), seed=st.integers(0, 2**40))
def test_what_is_dropped_is_drawn_anew_kept_is_scaled_and_the_seed_decides(p: float, rows: int, seed: int):
    dropout, x = CpuDropout(p), torch.arange(1.0, rows * 7 + 1).view(rows, 7).double().requires_grad_()
    torch.manual_seed(seed)
    first, second = dropout(x), dropout(x)
    torch.manual_seed(seed)
    assert torch.equal(dropout(x), first)
    scale = first.detach()[first != 0] / x.detach()[first != 0]
    assert torch.allclose(scale, torch.tensor(1 / (1 - round(p * 65536) / 65536)).double())
    (gradient,) = torch.autograd.grad(first.sum(), x)
    assert torch.equal(gradient * x.detach(), first.detach())
    if rows > 20 and 0.2 < p < 0.8:
        assert not torch.equal(first, second)


@pytest.mark.parametrize("p", [0.001, 0.1, 0.5, 0.9])
def test_shares_are_those_asked_for_and_neighbours_are_independent(p: float):
    torch.manual_seed(0)
    n = 400_000
    kept = (torch.stack([CpuDropout(p)(torch.ones(n)) for _ in range(4)]) > 0).double().numpy()
    sigma = np.sqrt(p * (1 - p) / kept.size)
    assert abs(kept.mean() - (1 - p)) < 5 * sigma
    centred = kept - kept.mean()
    for lag in (1, 2, 3, 4, 16):  # four elements share a random number of 64 bits
        correlation = (centred[:, :-lag] * centred[:, lag:]).mean() / (p * (1 - p))
        assert abs(correlation) < 5 / np.sqrt(kept.size)
    between = (centred[0] * centred[1]).mean() / (p * (1 - p))
    assert abs(between) < 5 / np.sqrt(n)


def test_nothing_is_dropped_in_eval_mode_or_at_0_and_everything_at_1():
    x = torch.randn(3, 5)
    assert CpuDropout(0.5).eval()(x) is x
    assert CpuDropout(0.0)(x) is x and CpuDropout(1e-9)(x) is x
    assert torch.equal(CpuDropout(1.0)(x), torch.zeros(3, 5))


def test_types_and_shapes_are_kept():
    for shape in ((), (1,), (3,), (2, 3, 5)):
        for dtype in (torch.float32, torch.float64, torch.bfloat16):
            dropped = CpuDropout(0.5)(torch.ones(shape, dtype=dtype))
            assert dropped.shape == shape and dropped.dtype == dtype


def test_modules_keep_their_p_and_place():
    inplace, feature = nn.Dropout(0.3, inplace=True), nn.Dropout1d(0.2)
    model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Dropout(0.3)), inplace, feature)
    names = list(model.state_dict())
    cheapen_dropout(model)
    assert type(model[1][0]) is CpuDropout and model[1][0].p == 0.3
    assert type(inplace) is nn.Dropout and type(feature) is nn.Dropout1d  # other rules: left alone
    assert list(model.state_dict()) == names
