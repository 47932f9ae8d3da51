"""Every backbone: shapes, gradients, determinism in evaluation, and the errors of `build`."""

import pytest
import torch

from pipeline.backbones import BackboneConfig, build, names

SMALL_IMAGES = ["small", "small_nobn", "iresnet18"]


@pytest.mark.parametrize("name", SMALL_IMAGES)
@pytest.mark.parametrize("image_size", [32, 64])
def test_features_have_the_width_asked_for(name, image_size):
    features_bD = build(BackboneConfig(name, width=24), image_size)(torch.randn(2, 3, image_size, image_size))
    assert features_bD.shape == (2, 24) and features_bD.dtype == torch.float32


@pytest.mark.parametrize("name", ["small", "small_nobn"])
def test_the_size_of_faces_works_too(name):
    assert build(BackboneConfig(name), 112)(torch.randn(2, 3, 112, 112)).shape == (2, 512)


@pytest.mark.parametrize("name", SMALL_IMAGES)
def test_gradient_reaches_every_parameter(name):
    torch.manual_seed(0)
    model = build(BackboneConfig(name, width=8), 32)
    images = torch.randn(4, 3, 32, 32, requires_grad=True)
    (model(images) * torch.randn(4, 8)).sum().backward()
    assert images.grad is not None and images.grad.abs().amax(dim=(1, 2, 3)).gt(0).all()
    for parameter_name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None and parameter.grad.isfinite().all(), parameter_name
            assert parameter.grad.abs().sum() > 0, parameter_name


@pytest.mark.parametrize("name", SMALL_IMAGES)
def test_evaluation_is_deterministic_and_row_by_row(name):
    torch.manual_seed(0)
    model = build(BackboneConfig(name, width=8, dropout=0.5), 32).eval()
    images = torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        features = model(images)
        torch.testing.assert_close(model(images), features, rtol=0, atol=0)
        torch.testing.assert_close(model(images[1:2]), features[1:2], rtol=1e-4, atol=1e-5)


def test_small_nobn_rows_do_not_depend_on_each_other_in_training():
    torch.manual_seed(0)
    model = build(BackboneConfig("small_nobn", width=8), 32).double().train()
    images = torch.randn(4, 3, 32, 32, dtype=torch.double, requires_grad=True)
    features = model(images)
    torch.testing.assert_close(model(torch.cat([images[:1], torch.randn_like(images[1:])]))[0], features[0])
    torch.testing.assert_close(model(images[:1])[0], features[0])
    (gradient,) = torch.autograd.grad(features[0].square().sum(), images)
    assert gradient[0].abs().sum() > 0 and gradient[1:].abs().sum() == 0
    assert not list(model.buffers()), "no running statistics either"


def test_small_is_coupled_by_its_batch_norm():
    torch.manual_seed(0)
    model = build(BackboneConfig("small", width=8), 32).train()
    images = torch.randn(4, 3, 32, 32)
    assert not torch.allclose(model(images)[0], model(torch.cat([images[:1], 2 * images[1:]]))[0], atol=1e-3)


def test_dropout_acts_in_training_only():
    torch.manual_seed(0)
    model = build(BackboneConfig("small_nobn", width=8, dropout=0.5), 32)
    images = torch.randn(1, 3, 32, 32)
    assert not torch.equal(model(images), model(images))
    assert torch.equal(model.eval()(images), model(images))


def test_a_small_net_learns():
    torch.manual_seed(0)
    model = build(BackboneConfig("small", width=16), 32)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    images, labels = torch.randn(16, 3, 32, 32), torch.arange(16)
    losses = []
    for _ in range(10):
        loss = torch.nn.functional.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0]


@pytest.mark.parametrize(
    ("config", "image_size", "message"),
    [
        (BackboneConfig("iresnet51"), 112, "no backbone named 'iresnet51': did you mean 'iresnet50'"),
        (BackboneConfig("smal"), 112, "did you mean 'small'"),
        (BackboneConfig("zzz"), 112, "choose one of .*iresnet100, iresnet18"),
        (BackboneConfig("small"), 100, "divisible by 16, not 100"),
        (BackboneConfig("iresnet18"), 0, "divisible by 16, not 0"),
        (BackboneConfig("small", width=0), 64, "width of backbone 'small' is 0"),
        (BackboneConfig("small", dropout=1.0), 64, "dropout of backbone 'small' is 1.0"),
    ],
)
def test_build_refuses_in_one_sentence(config, image_size, message):
    with pytest.raises(ValueError, match=message) as raised:
        build(config, image_size)
    assert "\n" not in str(raised.value)


def test_all_names_build():
    with torch.device("meta"):
        for name in names():
            build(BackboneConfig(name), 112)
