"""Helpers for modules and tuples."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from open_clip import utils


def test_tuples() -> None:
    assert utils.to_2tuple(3) == (3, 3)
    assert utils.to_2tuple([1, 2]) == (1, 2)
    assert utils.to_2tuple((1,)) == (1,)
    assert utils.to_2tuple("ab") == ("ab", "ab")
    assert utils.to_ntuple(3, None) == (None, None, None)
    assert (utils.to_1tuple(0), len(utils.to_3tuple(0)), len(utils.to_4tuple(0))) == ((0,), 3, 4)


def test_batch_norms_are_frozen_with_their_statistics() -> None:
    pytest.importorskip("torchvision")
    inner = nn.BatchNorm2d(4, eps=1e-3)
    nn.init.normal_(inner.running_mean)
    nn.init.normal_(inner.weight)
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Sequential(inner, nn.BatchNorm2d(4, affine=False)))
    images = torch.randn(2, 3, 5, 5)
    expected = net.eval()(images)
    assert utils.freeze_batch_norm_2d(net) is net
    net.train()
    torch.testing.assert_close(net(images), expected)
    assert not list(net[1].parameters())


def test_only_matching_batch_norms_are_frozen() -> None:
    pytest.importorskip("torchvision")
    net = nn.Sequential(nn.BatchNorm2d(3), nn.Sequential(nn.BatchNorm2d(3)))
    utils.freeze_batch_norm_2d(net, {"1.0"})
    assert isinstance(net[0], nn.BatchNorm2d)
    assert type(net[1][0]).__name__ == "FrozenBatchNorm2d"
    assert type(utils.freeze_batch_norm_2d(nn.SyncBatchNorm(3))).__name__ == "FrozenBatchNorm2d"


def test_linear_layers_are_replaced_by_name() -> None:
    class Other(nn.Linear):
        pass

    net = nn.ModuleDict({"c_fc": nn.Linear(2, 3), "rest": nn.ModuleDict({"c_proj": nn.Linear(3, 2, bias=False)})})
    net["kept"] = nn.Linear(2, 2)
    weight = net["c_fc"].weight.detach().clone()
    utils.replace_linear(net, Other)
    assert isinstance(net["c_fc"], Other)
    assert torch.equal(net["c_fc"].weight, weight)
    assert isinstance(net["rest"]["c_proj"], Other)
    assert net["rest"]["c_proj"].bias is None
    assert type(net["kept"]) is nn.Linear


def test_int8_raises_and_names_an_alternative() -> None:
    with pytest.raises(NotImplementedError, match="precision='bf16'"):
        utils.convert_int8_model_to_inference_mode(nn.Linear(1, 1))


def test_unknown_values_of_options_raise() -> None:
    utils.expect("color", "red", ("red", "blue"))
    with pytest.raises(ValueError, match="color is one of 'red', 'blue', got 'green'"):
        utils.expect("color", "green", ("red", "blue"))


def test_nested_groups_are_made_trainable() -> None:
    linear, parameter = nn.Linear(2, 2), nn.Parameter(torch.zeros(1))
    utils.set_trainable([linear, [parameter, None]], False)
    assert not any(p.requires_grad for p in (*linear.parameters(), parameter))
    utils.set_trainable([parameter], True)
    assert parameter.requires_grad
    assert not linear.weight.requires_grad


def test_a_command_ends_with_the_message_of_the_error():
    def main() -> None:
        raise ValueError("This is wrong: do that.")

    with pytest.raises(SystemExit) as ended:
        utils.run_command(main)
    assert ended.value.code == "This is wrong: do that."
    with pytest.raises(AttributeError):  # a bug keeps its traceback
        utils.run_command(lambda: None.missing)
