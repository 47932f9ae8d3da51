"""Weight files as they are met: wrapped, prefixed, halved, without counters of batches, and wrong in all ways."""

import argparse

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from pipeline.interop.weights import fit, read_weights


class Net(nn.Module):
    def __init__(self, width=4):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 5, 3)
        self.layer1 = nn.Sequential(nn.Module())
        self.layer1[0].conv1 = nn.Conv2d(5, 5, 1)
        self.bn1 = nn.BatchNorm2d(5)
        self.fc = nn.Linear(5, width)


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Net()


def save(tmp_path, content, name="model.pt"):
    torch.save(content, tmp_path / name)
    return tmp_path / name


def prefixed(weights, prefix, **others):
    return {f"{prefix}{name}": tensor for name, tensor in weights.items()} | others


HEAD = {"head.kernel": torch.zeros(4, 9)}


@pytest.mark.parametrize(
    "wrap",
    [
        lambda w: w,
        lambda w: prefixed(w, "module."),
        lambda w: prefixed(w, "_orig_mod.module."),
        lambda w: prefixed(w, "module._orig_mod."),
        lambda w: prefixed(w, "backbone."),
        lambda w: prefixed(w, "net.") | HEAD,
        lambda w: {"epoch": 3, "state_dict": prefixed(w, "model.backbone.module._orig_mod.") | HEAD},
        lambda w: {"model": {"state_dict": w}, "optimizer": {"state": {}}},
        lambda w: {"state_dict_backbone": w, "state_dict_softmax_fc": {"weight": torch.zeros(2, 4)}, "epoch": 1},
        lambda w: {name: tensor for name, tensor in w.items() if "num_batches_tracked" not in name},
        lambda w: w | {"total_ops": torch.zeros(1), "layer1.0.total_params": torch.zeros(1)},
        lambda w: {name: tensor.mT.contiguous().mT if tensor.dim() > 1 else tensor for name, tensor in w.items()},
        lambda w: {name: nn.Parameter(tensor.double()) if tensor.is_floating_point() else tensor for name, tensor in w.items()},
        lambda w: {"state_dict": w, "hyper_parameters": argparse.Namespace(lr=0.1), "callbacks": {argparse.Action: {"best": 1.0}}},
    ],
)
def test_any_wrapping_gives_the_same_weights(tmp_path, net, wrap):
    path = save(tmp_path, wrap(net.state_dict()))
    fitted = fit(read_weights(path), Net(), path, "net")
    assert list(fitted) == list(net.state_dict())
    for name, tensor in net.state_dict().items():
        assert fitted[name].dtype == tensor.dtype and fitted[name].is_contiguous()
        torch.testing.assert_close(fitted[name], tensor, rtol=0, atol=0)
    Net().load_state_dict(fitted)


def test_half_precision_and_safetensors(tmp_path, net):
    halved = {name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in net.state_dict().items()}
    save_file(prefixed(halved, "model.net."), tmp_path / "model.safetensors")
    with torch.device("meta"):
        expected = Net()
    fitted = fit(read_weights(tmp_path / "model.safetensors"), expected, "model.safetensors", "net")
    assert fitted["fc.weight"].dtype == torch.float32
    torch.testing.assert_close(fitted["fc.weight"], halved["fc.weight"].float(), rtol=0, atol=0)


def test_what_does_not_fit_is_named_key_by_key(net):
    found = net.state_dict()
    del found["conv1.weight"], found["fc.bias"]
    found |= {f"extra.{i}": torch.zeros(1) for i in range(5)}
    with pytest.raises(ValueError) as error:
        fit(prefixed(found, "net."), Net(width=7), "a.pt", "net7")
    assert str(error.value) == (
        "a.pt does not fit net7: 2 are missing (conv1.weight, fc.bias); 5 are unknown to it (extra.0, extra.1, extra.2 and 2 more); "
        "1 is of another shape or kind (fc.weight is (4, 5) instead of (7, 5))."
    )
    with pytest.raises(ValueError, match=r"conv1\.bias is int8 instead of a floating-point type"):
        fit(net.state_dict() | {"conv1.bias": torch.zeros(5, dtype=torch.int8)}, net, "a.pt", "net")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e300])
def test_what_is_not_finite_is_refused_by_name(net, value):
    found = net.state_dict() | {"fc.bias": torch.full((4,), value, dtype=torch.float64)}
    with pytest.raises(ValueError, match=r"a\.pt cannot be used, since it holds NaN or infinity: 1 is not finite \(fc\.bias\)"):
        fit(found, net, "a.pt", "net")


class Evil:
    def __reduce__(self):
        return (open, (EVIL, "w"))


EVIL = "/tmp/protoshard-was-run"


def test_nothing_in_a_file_is_run(tmp_path, net, monkeypatch):
    monkeypatch.setattr(f"{__name__}.EVIL", str(tmp_path / "run"))
    path = save(tmp_path, {"state_dict": net.state_dict(), "callback": Evil()})
    assert read_weights(path).keys() == net.state_dict().keys()
    assert not (tmp_path / "run").exists()


def test_files_without_weights(tmp_path, net):
    (tmp_path / "text.pt").write_text("version https://git-lfs.github.com/spec/v1")
    (tmp_path / "text.safetensors").write_text("hello")
    for path, words in [
        (tmp_path / "missing.pt", r"cannot read .*missing\.pt: No such file"),
        (tmp_path / "missing.safetensors", "cannot read .*No such file"),
        (tmp_path, "cannot read .*directory"),
        (tmp_path / "text.pt", "not a file of weights"),
        (tmp_path / "text.safetensors", r"not a whole \.safetensors file"),
        (save(tmp_path, net), "holds a .*Net, not a state dict"),
        (save(tmp_path, {"epoch": 3, "optimizer": {}}, "b.pt"), "holds no state dict: there is epoch, optimizer, but none of"),
        (save(tmp_path, {}, "c.pt"), "holds no state dict: there is nothing"),
    ]:
        with pytest.raises(ValueError, match=words):
            read_weights(path)


def test_a_missing_package_names_its_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "safetensors", None)
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(ValueError, match=r"^safetensors is not installed; .* pip install 'protoshard\[train\]'$"):
        read_weights(tmp_path / "model.safetensors")


def test_a_network_that_is_there_twice_is_not_chosen_from(net):
    student, teacher = net.state_dict(), {name: tensor + 1 for name, tensor in net.state_dict().items()}
    both = {**{f"backbone.{name}": x for name, x in student.items()}, **{f"teacher.{name}": x for name, x in teacher.items()}}
    with pytest.raises(ValueError, match=r"a\.pt holds the network 2 times, under 'backbone\.', 'teacher\.': save the state dict of one"):
        fit(both, net, "a.pt", "net")
