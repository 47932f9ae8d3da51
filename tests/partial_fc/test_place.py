"""A classifier in other people's hands: made too early, wrapped, copied, cast, compiled, saved on one rank and loaded on another. It works,
or a sentence says what to do."""

from __future__ import annotations

import copy
import io
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from partial_fc import PartialFC, RowAdamW, RowSGD, keep_out_of_ddp, losses
from tests.partial_fc.test_classifier import batch

CLASSES, WIDTH = 40, 8


def classifier_of(rate=1.0, loss="cosface", **options):
    return PartialFC(CLASSES, WIDTH, losses.build(loss), rate, seed=3, **options)


def part(rows=6, step=0):
    """This rank's rows."""
    rank, size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    features, labels = batch(CLASSES, WIDTH, rows * size, seed=step)
    mine = slice(rank * rows, (rank + 1) * rows)
    return features[mine].clone().requires_grad_(), labels[mine]


def sentence_of(call, *arguments):
    with pytest.raises(ValueError) as caught:
        call(*arguments)
    return str(caught.value)


def made_too_early():
    """Runs on every rank: the sentences of the first use and of later ones."""
    with mock.patch.object(dist, "is_initialized", return_value=False):
        classifier = classifier_of()
    features, labels = part()
    uses = [(classifier, features, labels), (classifier.cosines, features, labels), (classifier.begin_step, labels)]
    return [sentence_of(*use) for use in uses + uses[:1]]


def test_a_classifier_made_before_its_process_group_is_refused_at_every_use(ranks):
    for rank, sentences in enumerate(ranks(2).run(made_too_early)):
        for sentence in sentences:
            assert f"made as rank 0 of 1, but is used as rank {rank} of 2" in sentence and "after init_process_group" in sentence


class Whole(nn.Module):
    """The module that frameworks wrap: a network with its classifier."""

    def __init__(self, rate, is_kept_out):
        super().__init__()
        torch.manual_seed(0)
        self.backbone, self.classifier = nn.Linear(WIDTH, WIDTH), classifier_of(rate)
        if is_kept_out:
            keep_out_of_ddp(self)

    def forward(self, images, labels):
        return self.classifier(self.backbone(images), labels)


def wrapped(rate, way):
    """Runs on every rank: the losses of three steps and the prototypes, or a sentence."""
    module = Whole(rate, way == "kept out")
    if way == "DDP without a broadcast":
        loss_of = DistributedDataParallel(module, init_sync=False)
    else:
        loss_of = module if way == "plain" else DistributedDataParallel(module)
    if way == "DDP, called inside":
        loss_of = module
    optimizers = RowSGD(module.classifier, lr=0.1), torch.optim.SGD(module.backbone.parameters(), lr=0.1)
    if "DDP" in way:
        return sentence_of(loss_of, *part())
    found = []
    for step in range(3):
        loss = loss_of(*part(step=step))
        loss.backward()
        if way == "plain" and dist.is_initialized():
            for parameter in module.backbone.parameters():
                dist.all_reduce(parameter.grad)
                parameter.grad /= dist.get_world_size()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        found.append(loss.item())
    return found, module.classifier.prototypes.detach().clone()


@pytest.mark.parametrize("rate", [1.0, 0.3])
def test_ddp_leaves_the_shards_of_a_module_alone_that_keeps_them_out(ranks, rate):
    """Else DDP would broadcast and average them: the first loss would be right and all later ones wrong."""
    for found, right in zip(ranks(2).run(wrapped, rate, "kept out"), ranks(2).run(wrapped, rate, "plain"), strict=True):
        assert found[0] == pytest.approx(right[0], rel=1e-6)
        torch.testing.assert_close(found[1], right[1])


@pytest.mark.parametrize("rate", [1.0, 0.3])
@pytest.mark.parametrize(
    ("way", "words"),
    [
        ("DDP", "taken this classifier in"),
        ("DDP without a broadcast", "taken this classifier in"),
        ("DDP, called inside", "hold the same prototypes"),
    ],
)
def test_ddp_around_the_classifier_is_refused_at_the_first_step(ranks, rate, way, words):
    for sentence in ranks(2).run(wrapped, rate, way):
        assert words in sentence and "keep_out_of_ddp" in sentence


def sharded_by_torch():
    module = Whole(1.0, is_kept_out=False)
    fully_shard(module, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    return sentence_of(module, *part())


def test_fsdp_around_the_classifier_is_refused_at_the_first_step(ranks):
    assert all("give the backbone alone" in sentence for sentence in ranks(2).run(sharded_by_torch))


def loaded_everywhere():
    """Runs on every rank: the sentences about rank 0's state, and about rank 0's prototypes alone."""
    classifier = classifier_of()
    classifier(*part())
    states = [classifier.state_dict()]
    dist.broadcast_object_list(states, 0)
    first = sentence_of(classifier.load_state_dict, states[0]) if dist.get_rank() else ""
    del states[0]["_extra_state"]
    classifier.load_state_dict(states[0], strict=False)
    return first, sentence_of(classifier, *part())


def test_the_state_of_one_rank_is_not_taken_for_that_of_all(ranks):
    found = ranks(2).run(loaded_everywhere)
    assert "this state is of the classes [0, 20) of 40, but this rank has [20, 40) of 40" in found[1][0]
    assert all("ranks 0 and 1 hold the same prototypes" in sentence for _, sentence in found)


@pytest.mark.parametrize("unsampled", ["frozen", "lazy"])
def test_a_state_dict_holds_all_that_a_resume_needs(unsampled):
    """The number of the step is among it, without which other classes would be sampled; and lazy rows are up to date."""

    def made():
        classifier = classifier_of(0.2)
        return classifier, RowSGD(classifier, lr=0.5, unsampled=unsampled)

    def step(classifier, optimizer, number):
        loss = classifier(*part(step=number))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    whole = made()
    for number in range(4):
        step(*whole, number)
    file = io.BytesIO()
    torch.save([part.state_dict() for part in whole], file)  # the classifier first
    right = [step(*whole, number) for number in range(4, 8)]
    resumed = made()
    for part_, state in zip(resumed, torch.load(io.BytesIO(file.getvalue()), weights_only=True), strict=True):
        part_.load_state_dict(state)
    assert [step(*resumed, number) for number in range(4, 8)] == pytest.approx(right, rel=1e-6)
    torch.testing.assert_close(resumed[0].state_dict(), whole[0].state_dict())


def test_earlier_weights_are_not_moved_by_steps_that_later_ones_missed():
    classifier = classifier_of(0.2)
    optimizer = RowSGD(classifier, lr=0.5, unsampled="lazy")

    def steps(numbers):
        for number in numbers:
            classifier(*part(step=number)).backward()
            optimizer.step()
            optimizer.zero_grad()

    steps(range(3))
    states = copy.deepcopy((classifier.state_dict(), optimizer.state_dict()))
    steps(range(3, 8))
    classifier.load_state_dict(states[0])
    optimizer.load_state_dict(states[1])
    assert torch.equal(classifier.state_dict()["prototypes"], states[0]["prototypes"])


@pytest.mark.parametrize(("unsampled", "in_backward"), [("lazy", False), ("frozen", True)])
def test_a_copy_of_a_classifier_with_its_optimizer_goes_on_alike(unsampled, in_backward):
    classifier = classifier_of(0.2)
    both = [(classifier, RowSGD(classifier, lr=0.5, unsampled=unsampled, in_backward=in_backward))]
    for number in range(6):
        if number == 3:
            both.append(copy.deepcopy(both[0]))
        for each, optimizer in both:
            each(*part(step=number)).backward()
            optimizer.step()
            optimizer.zero_grad()
    torch.testing.assert_close(*(each.state_dict()["prototypes"] for each, _ in both), rtol=0, atol=0)


def another_optimizers_state():
    optimizer = RowSGD(classifier_of(), lr=0.1)
    states = [optimizer.state_dict()]
    dist.broadcast_object_list(states, 0)
    return sentence_of(optimizer.load_state_dict, states[0]) if dist.get_rank() else ""


def test_the_optimizer_of_one_rank_is_not_taken_for_that_of_all(ranks):
    assert "this state is of the classes [0, 20) of 40" in ranks(2).run(another_optimizers_state)[1]


def test_a_step_may_be_opened_without_gradient():
    found = []
    for is_enabled in (True, False):
        classifier = classifier_of(0.2)
        features, labels = part()
        with torch.set_grad_enabled(is_enabled):
            classifier.begin_step(labels)
        found.append(classifier(features, labels).item())
    assert found[0] == found[1]


def constant():
    classifier = classifier_of()
    nn.init.constant_(classifier.prototypes, 0.5)
    return classifier(*part()).item()


def test_prototypes_that_were_set_to_a_constant_are_nobodys_copy(ranks):
    assert len(set(ranks(2).run(constant))) == 1


def test_a_term_of_ones_own_on_all_prototypes():
    """Its gradient is dense, also where classes are sampled."""
    found = []
    for unsampled in ("frozen", "lazy"):
        classifier = classifier_of(0.2)
        optimizer = RowSGD(classifier, lr=0.5, unsampled=unsampled)
        for number in range(3):
            (classifier(*part(step=number)) + classifier.prototypes.square().sum()).backward()
            optimizer.step()
            optimizer.zero_grad()
        found.append(classifier.state_dict()["prototypes"])
    torch.testing.assert_close(*found)


def test_what_is_not_a_classifier_or_a_loss_ends_in_a_sentence():
    classifier = classifier_of()
    assert "takes the PartialFC itself" in sentence_of(RowSGD, classifier.parameters(), 0.1)
    assert "must be one of losses.build" in sentence_of(PartialFC, CLASSES, WIDTH, type(losses.build("cosface")))
    optimizer = RowSGD(classifier, lr=0.1)
    classifier.prototypes = nn.Parameter(classifier.prototypes.detach().clone())
    classifier(*part()).backward()
    assert "became another tensor" in sentence_of(optimizer.step)


def copied():
    """Runs on every rank: a copy and a pickle of a classifier with a group of its own, and their losses."""
    group = dist.new_group([0, 1])
    classifier = classifier_of(group=group)
    averaged = torch.optim.swa_utils.AveragedModel(classifier, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9))
    averaged.update_parameters(classifier)
    file = io.BytesIO()
    torch.save(classifier, file)
    others = [copy.deepcopy(classifier), averaged, torch.load(io.BytesIO(file.getvalue()), weights_only=False)]
    return classifier(*part()).item(), [other(*part()).item() for other in others], others[0].group is group


def test_a_classifier_with_a_group_can_be_copied(ranks):
    for loss, others, is_shared in ranks(2).run(copied):
        assert others == [loss] * 3 and is_shared


def outside_of_its_group():
    alone = dist.new_group([0])
    return sentence_of(lambda: classifier_of(group=alone)) if dist.get_rank() else ""


def test_a_rank_outside_of_the_group_is_refused(ranks):
    assert "not in the group" in ranks(2).run(outside_of_its_group)[1]


def uneven(rate):
    """Runs on every rank, with one row less on the last: the sentence."""
    classifier, rank = classifier_of(rate), dist.get_rank()
    optimizer = RowSGD(classifier, lr=0.1)
    classifier(*part()).backward()
    optimizer.step()
    features, labels = part(rows=5 if rank == dist.get_world_size() - 1 else 6)
    return sentence_of(classifier, features, labels)


def wrong_counts():
    """Runs on every rank: the sentences for counts of other rows than ranks bring, and of other ranks."""
    features, labels = part(rows=6)
    return sentence_of(classifier_of(), features, labels, [6, 6, 5]), sentence_of(classifier_of(), features, labels, [6, 6])


def test_counts_must_be_what_ranks_bring(ranks):
    for of_rows, of_ranks in ranks(3).run(wrong_counts):
        assert "at step 0 rank 2 brings 6 rows, but counts says 5: give every rank the same counts" in of_rows
        assert "counts has 2 numbers, but must have one for each of 3 ranks" in of_ranks


@pytest.mark.parametrize("rate", [1.0, 0.3])
def test_unequal_batches_end_in_a_sentence(ranks, rate):
    for sentence in ranks(3).run(uneven, rate):
        assert "at step 1 rank 0 brings 6 rows, but rank 2 brings 5" in sentence and "uneven_batches=True" in sentence


def test_half_precision_is_refused_before_anything_changes():
    for cast in (nn.Module.half, nn.Module.bfloat16, lambda module: module.to(torch.float16)):
        whole = nn.Sequential(nn.Linear(WIDTH, WIDTH), classifier_of())
        assert "cannot become torch." in sentence_of(cast, whole)
        assert whole[1].prototypes.dtype is torch.float32
    stored = classifier_of(loss="uss", storage_dtype="bfloat16")
    assert "cannot become torch." in sentence_of(stored.bfloat16) and stored.to("cpu").learned["threshold"].dtype is torch.float32


@pytest.mark.parametrize("making", [RowSGD, RowAdamW])
@pytest.mark.parametrize(("rate", "unsampled", "in_backward"), [(1.0, "frozen", False), (0.3, "lazy", False), (0.3, "lazy", True)])
def test_an_optimizer_follows_its_classifier_to_another_dtype(making, rate, unsampled, in_backward):
    """Cast after the first step or before the optimizer was made: the same training."""
    found = []
    for late in (True, False):
        classifier = classifier_of(rate) if late else classifier_of(rate).double()
        optimizer = making(classifier, lr=0.1, unsampled=unsampled, in_backward=in_backward)
        if late:
            classifier.double()
        for step in range(3):
            features, labels = part(step=step)
            classifier(features.double(), labels).backward()
            optimizer.step()
            optimizer.zero_grad()
        found.append(classifier.state_dict()["prototypes"])
    assert found[0].dtype is torch.float64
    torch.testing.assert_close(*found, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_torchs_default_dtype_changes_nothing(dtype):
    """Frameworks set it while they make a model, for a low precision."""

    parts = [part(step=step) for step in range(2)]

    def trained():
        classifier = classifier_of(0.3, "unitsface")
        optimizer = RowAdamW(classifier, lr=0.1)
        for features, labels in parts:
            classifier(features, labels).backward()
            optimizer.step()
            optimizer.zero_grad()
        return [*classifier.parameters(), *classifier.buffers()]

    right = trained()
    torch.set_default_dtype(dtype)
    try:
        found = [parameter.detach() for parameter in trained()]
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(torch.equal(one, other) and one.dtype is torch.float32 for one, other in zip(found, right, strict=True))


def test_it_is_made_on_torchs_default_device():
    with torch.device("meta"):
        assert all(tensor.is_meta for tensor in classifier_of(loss="unitsface").state_dict(keep_vars=True).values() if tensor.ndim == 2)


def test_an_optimizer_of_rows_takes_no_other_parameters():
    optimizer = RowSGD(classifier_of(), lr=0.1)
    assert "an optimizer of their own" in sentence_of(optimizer.add_param_group, {"params": [nn.Parameter(torch.zeros(3))]})


def test_class_counts_move_with_the_classifier():
    classifier = classifier_of(class_counts=torch.arange(CLASSES)).to("meta")
    assert classifier.class_counts_S.is_meta and "class_counts_S" not in classifier.state_dict()


@pytest.mark.parametrize("name", losses.REGISTRY)
def test_it_may_be_part_of_a_compiled_module(name):
    """Only the backbone is compiled."""

    class Head(nn.Module):
        def __init__(self):
            super().__init__()
            self.backbone, self.classifier = nn.Linear(WIDTH, WIDTH), classifier_of(0.4, name, class_counts=torch.arange(1, CLASSES + 1))

        def forward(self, images, labels):
            return 2 * self.classifier(self.backbone(images).relu(), labels)

    torch.manual_seed(0)
    plain = Head()
    compiled = copy.deepcopy(plain)
    compiled.compile(backend="eager")  # what Dynamo itself does; a backend has nothing to do with the classifier
    for step in range(2):
        features, labels = part(step=step)
        losses_of_both = [head(features, labels) for head in (plain, compiled)]
        assert losses_of_both[0].item() == losses_of_both[1].item()
        losses_of_both[1].backward()
        compiled.classifier.end_step(), plain.classifier.end_step()
    torch.compiler.reset()


def test_a_loss_may_be_given_by_name_and_replaced_by_one_of_its_kind():
    classifier = PartialFC(CLASSES, WIDTH, "cosface")
    assert classifier.loss == losses.build("cosface")
    classifier.loss = losses.build("arcface")  # neither learns anything
    for other in ("uce", "sample_bce", "curricularface", "broadface", "vpl"):
        assert "cannot take the place of ArcFace" in sentence_of(setattr, classifier, "loss", losses.build(other))
    assert "must be one of losses.build" in sentence_of(setattr, classifier, "loss", nn.CrossEntropyLoss())
    assert "must be one of losses.build" in sentence_of(PartialFC, CLASSES, WIDTH, nn.CrossEntropyLoss())
    assert "did you mean 'cosface'" in sentence_of(PartialFC, CLASSES, WIDTH, "cosfase")
    assert classifier.loss == losses.build("arcface")


def test_a_name_of_a_loss_cannot_be_taken_twice():
    class CosFace(losses.Loss):
        def __call__(self, batch):
            return batch.norms().sum()

    before = losses.REGISTRY["cosface"]
    assert "a loss named 'cosface' already" in sentence_of(losses.register("cosface"), CosFace)
    assert losses.REGISTRY["cosface"] is before
