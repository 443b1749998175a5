"""Classifiers: the schedule in closed form, determinism, resuming, and clear errors."""

import numpy as np
import pytest
import timm
import torch
from torch import nn
from torch.nn import functional

from helpers import augment, classify
from helpers.weights import write_weights


@pytest.fixture(scope="module")
def data():
    """Two classes that differ in colour, 32 x 32."""
    rng = np.random.default_rng(0)
    labels = np.arange(12) % 2
    images = rng.integers(0, 90, (12, 32, 32, 3), dtype=np.uint8)
    images[labels == 1, ..., 0] += 120
    return images, labels.astype(np.int64)


class Tiny(nn.Module):
    """A network small enough to train in a test, with timm's interface."""

    def __init__(self, n_classes=2):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 4, 5, stride=4), nn.BatchNorm2d(4), nn.ReLU())
        self.classifier = nn.Linear(4, n_classes)

    def get_classifier(self):
        return self.classifier

    def forward(self, x):
        return self.classifier(self.body(x).mean((2, 3)))


def tiny(seed=0, n_classes=2):
    torch.manual_seed(seed)
    return classify.Classifier("lite0", Tiny(n_classes), n_classes)


def fit(classifier, data, *, seed=0, **settings):
    settings = {"epochs": 4, "batch_size": 4, "rates": (0.05, 1e-4), **settings}
    return classify.fit(
        classifier, *data, generator=torch.Generator().manual_seed(seed), **settings
    )


def weights(classifier):
    return torch.cat([value.flatten().float() for value in classifier.state_dict().values()])


# --- schedule -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("restart", "epochs"), [(3, 7), (25, 4)])
def test_rates_are_those_of_the_paper(data, monkeypatch, restart, epochs):
    """Loshchilov and Hutter, "SGDR", 2017, Eq. 5, at each step; T_0 is at most the epochs."""
    made, high, low = [], 0.05, 1e-4

    class Adam(torch.optim.Adam):
        def step(self, *given):
            made.append(self.param_groups[0]["lr"])
            return super().step(*given)

    monkeypatch.setattr(torch.optim, "Adam", Adam)
    monkeypatch.setattr(classify, "RESTART", restart)
    done = fit(tiny(), data, epochs=epochs, rates=(high, low))
    steps = 3  # of 4 images, in an epoch of 12
    t = np.arange(epochs * steps) / steps % min(restart, epochs)
    expected = low + (high - low) * (1 + np.cos(np.pi * t / min(restart, epochs))) / 2
    np.testing.assert_allclose(made, expected, rtol=1e-9)
    np.testing.assert_allclose([e["rate"] for e in done.curve], expected[2::3], rtol=1e-9)


def test_training_is_adam_along_the_schedule_on_scaled_images(data):
    """Written out, on the batches that were seen."""
    seen = []

    def watch(x, y):
        seen.append((x.clone(), y.clone()))
        return x, y

    classifier, plain = tiny(), Tiny()
    plain.load_state_dict(classifier.network.state_dict())
    fit(classifier, data, batch_transform=watch, epochs=2, batch_size=5)
    assert len(seen) == 2 * 3  # 12 images, 5 a batch
    optimiser = torch.optim.Adam(plain.parameters(), betas=(0.9, 0.999), eps=1e-8)
    for step, (x, y) in enumerate(seen):
        for image, label in zip(x, y, strict=True):  # one of the images, in [0, 1], with its label
            same = (data[0] == np.rint(255 * image.permute(1, 2, 0).numpy())).all((1, 2, 3))
            assert data[1][same].tolist() == [int(label)]
        optimiser.param_groups[0]["lr"] = 1e-4 + (0.05 - 1e-4) * (1 + np.cos(np.pi * step / 6)) / 2
        optimiser.zero_grad()
        functional.cross_entropy(plain((x - 0.5) / 0.5), y).backward()
        optimiser.step()
    # The bias before the batch normalisation has no gradient but rounding.
    for key in ("body.0.weight", "classifier.weight", "classifier.bias"):
        found, expected = classifier.network.state_dict()[key], plain.state_dict()[key]
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


def test_every_pass_over_the_images_has_an_order_of_its_own(data):
    def order(seed):
        seen = []

        def watch(image):
            same = (data[0] == image.permute(1, 2, 0).numpy()).all((1, 2, 3))
            seen.append(int(np.flatnonzero(same)[0]))
            return image

        fit(tiny(), data, transform=watch, epochs=3, seed=seed)
        return np.reshape(seen, (3, 12))

    one, other = order(0), order(1)
    for passes in (one, other):
        np.testing.assert_array_equal(np.sort(passes), np.tile(np.arange(12), (3, 1)))
        assert len({tuple(each) for each in passes.tolist()}) == 3
    assert (one != other).any()


def test_workers_change_no_batch(data):
    found, mix = [], augment.mixup(2)
    for workers in (0, 2):
        classifier = tiny()
        fit(classifier, data, transform=augment.traditional(32), batch_transform=mix,
            epochs=2, workers=workers)  # fmt: skip
        found.append(weights(classifier))
    assert torch.equal(*found)
    batches = classify._Batches(*data, 4, 0, augment.traditional(32), mix)
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    later = batches[7][0]
    assert torch.equal(before, torch.random.get_rng_state())
    assert not torch.equal(batches[4][0], later) and torch.equal(batches[7][0], later)


def test_every_epoch_draws_its_own_augmentation(data):
    drawn = []

    def noisy(image):
        drawn.append(float(torch.rand(())))
        return image

    fit(tiny(), data, transform=noisy, epochs=3)
    assert len(set(drawn)) == len(drawn) == 36


def test_paper_rates():
    assert classify.learning_rates("resnet50") == (1e-3, 1e-5)
    assert classify.learning_rates("ctranspath") == (2e-5, 2e-8)
    assert classify.native_size("ctranspath", 512) == 224
    assert classify.native_size("resnet50", 512) == 512


# --- networks -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["lite0", "efficientnet_b0", "resnet50", "densenet121"])
def test_networks_have_the_shape_asked_for(name):
    classifier = classify.build_classifier(name, 3, weights="random")
    with torch.inference_mode():
        assert classifier(torch.rand(2, 3, 64, 64)).shape == (2, 3)


@pytest.mark.parametrize("name", ["lite0", "resnet50"])
def test_a_classifier_normalises_with_the_statistics_of_its_network(name):
    trained = timm.get_pretrained_cfg("tf_efficientnet_lite0" if name == "lite0" else name)
    mean, std = (torch.tensor(each)[:, None, None] for each in (trained.mean, trained.std))
    x = torch.rand(2, 3, 5, 4, generator=torch.Generator().manual_seed(0))
    found = classify.Classifier(name, nn.Identity(), 2)(x)
    torch.testing.assert_close(found, (x - mean) / std)


def test_lite0_starts_from_its_package_and_the_head_from_the_generator():
    build = [
        classify.build_classifier("lite0", 3, generator=torch.Generator().manual_seed(s))
        for s in (0, 0, 1)
    ]
    body = [c.network.conv_stem.weight for c in build]
    head = [c.network.classifier.weight for c in build]
    assert torch.equal(body[0], body[2]) and torch.equal(head[0], head[1])
    assert not torch.equal(head[0], head[2])


@pytest.mark.parametrize("name", ["c.safetensors", "c.pth"])
def test_a_checkpoint_gives_all_layers_but_the_last(tmp_path, name):
    """Also one of other classes, and one that a wrapper has put a prefix before its names."""
    one = classify.build_classifier("lite0", 2, weights="random")
    state = {f"module.{key}": value for key, value in one.network.state_dict().items()}
    if name == "c.pth":
        torch.save({"state_dict": state}, tmp_path / name)
    else:
        write_weights(tmp_path / name, state, {})
    two = classify.build_classifier(
        "lite0", 5, weights=tmp_path / name, generator=torch.Generator().manual_seed(1)
    )
    assert two.network.classifier.weight.shape == (5, 1280)
    for key, value in two.network.state_dict().items():
        same = torch.equal(value, one.network.state_dict()[key])
        assert same != key.startswith("classifier."), key
    with pytest.raises(ValueError, match="belongs to another network"):
        classify.build_classifier("resnet50", 2, weights=tmp_path / name)


# --- training -------------------------------------------------------------------------------------


def test_training_learns_and_does_not_depend_on_the_global_seed(data):
    one, two, other = tiny(), tiny(), tiny()
    transform = augment.traditional(32)
    fit(one, data, transform=transform, epochs=10)
    torch.manual_seed(99)
    fit(two, data, transform=transform, epochs=10)
    fit(other, data, transform=transform, epochs=10, seed=1)
    assert torch.equal(weights(one), weights(two))
    assert not torch.equal(weights(one), weights(other))
    assert (classify.predict(one, data[0]).argmax(1) == data[1]).mean() > 0.9


def test_number_of_steps_does_not_depend_on_the_number_of_images(data):
    images, labels = data
    more = np.concatenate([images, images]), np.concatenate([labels, labels])
    a, b = fit(tiny(), data, steps_per_epoch=3), fit(tiny(), more, steps_per_epoch=3)
    assert a.steps == b.steps == 12
    assert [r["step"] for r in a.curve] == [3, 6, 9, 12]


def test_best_epoch_is_the_one_that_is_kept(data):
    classifier = tiny()
    training = fit(classifier, data, val_images=data[0], val_labels=data[1], epochs=6)
    accuracy = [r["val_accuracy"] for r in training.curve]
    assert accuracy[training.best_epoch - 1] == max(accuracy)
    kept = (classify.predict(classifier, data[0]).argmax(1) == data[1]).mean()
    assert kept == pytest.approx(max(accuracy))


def test_best_is_the_highest_accuracy_then_the_lowest_loss_then_the_latest(data, monkeypatch):
    scores = [(0.5, 0.2), (0.75, 0.9), (0.75, 0.7), (0.75, 0.7), (0.75, 0.8), (0.6, 0.1)]
    left = iter({"val_accuracy": accuracy, "val_loss": loss} for accuracy, loss in scores)
    monkeypatch.setattr(classify, "_validate", lambda *_: next(left))
    monkeypatch.setattr(classify, "RESTART", 3)  # the same rates in four epochs as in six
    one, four = tiny(), tiny()
    training = fit(one, data, val_images=data[0], val_labels=data[1], epochs=6)
    assert training.best_epoch == 4 and next(left, None) is None
    fit(four, data, epochs=4)  # without validation: the state after the fourth
    assert torch.equal(weights(one), weights(four))


def test_validation_is_that_of_the_predictions(data):
    classifier, labels = tiny(), np.array([0, 1, 1, 0, 0, 1, 0])  # some of them wrong
    training = fit(classifier, data, val_images=data[0][:7], val_labels=labels, epochs=1)
    p = torch.from_numpy(classify.predict(classifier, data[0][:7]))
    loss = functional.nll_loss(p.log(), torch.from_numpy(labels))
    assert training.curve[0]["val_loss"] == pytest.approx(float(loss), rel=1e-5)
    assert training.curve[0]["val_accuracy"] == (p.argmax(1).numpy() == labels).mean()


def test_resumed_training_equals_the_uninterrupted_one(tmp_path, data):
    whole = tiny()
    fit(whole, data, transform=augment.traditional(32))

    class Stop(Exception):
        pass

    calls = 0

    def interrupts(image):
        nonlocal calls
        calls += 1
        if calls > 30:  # within the third epoch
            raise Stop
        return augment.traditional(32)(image)

    path = tmp_path / "training.pt"
    with pytest.raises(Stop):
        fit(tiny(), data, transform=interrupts, checkpoint=path)
    again = tiny(seed=5)
    fit(again, data, transform=augment.traditional(32), checkpoint=path)
    assert torch.equal(weights(whole), weights(again))


def test_a_checkpoint_of_other_images_or_labels_is_refused(tmp_path, data):
    path, (images, labels) = tmp_path / "training.pt", data
    fit(tiny(), data, val_images=images, val_labels=labels, checkpoint=path)
    for x, y, judged in ((images, labels[::-1], labels), (images[::-1], labels, labels),
                         (images, labels, labels[::-1])):  # fmt: skip
        with pytest.raises(ValueError, match=r"begun with images and labels [0-9a-f]{12}"):
            fit(tiny(), (x, y), val_images=images, val_labels=judged, checkpoint=path)


@pytest.mark.parametrize(
    ("changes", "said"),
    [({"seed": 1}, "seed"), ({"epochs": 2, "batch_size": 6}, "epochs 4, steps_per_epoch 3, batch"),
     ({"rates": (1.0, 0.5)}, r"rates \[0.05, 0.0001\]")],
)  # fmt: skip
def test_a_checkpoint_of_other_settings_is_refused(tmp_path, data, changes, said):
    path = tmp_path / "training.pt"
    fit(tiny(), data, checkpoint=path)
    with pytest.raises(ValueError, match=f"no checkpoint of this training .*begun with {said}"):
        fit(tiny(), data, checkpoint=path, **changes)


def test_a_network_can_be_trained_after_it_predicted(data):
    """Also where the prediction was made on another device."""
    classifier = tiny()
    classify.predict(classifier, data[0], device="cpu:0")
    assert not any(value.is_inference() for value in classifier.state_dict().values())
    fit(classifier, data, epochs=1)


def test_mixed_labels_are_trained_on(data):
    training = fit(tiny(), data, transform=augment.traditional(32),
                   batch_transform=augment.mixup(2))  # fmt: skip
    assert all(np.isfinite(r["loss"]) for r in training.curve)


def test_the_labels_of_the_batch_transform_are_those_learnt(data):
    classifier = tiny()
    fit(classifier, data, epochs=10,
        batch_transform=lambda x, y: (x, functional.one_hot(1 - y, 2).float()))  # fmt: skip
    assert (classify.predict(classifier, data[0]).argmax(1) == 1 - data[1]).mean() > 0.9


def test_prediction_does_not_depend_on_the_batch(data):
    classifier = tiny()
    np.testing.assert_allclose(
        classify.predict(classifier, data[0], batch=1),
        classify.predict(classifier, data[0], batch=5),
        atol=1e-6,
    )


def test_prediction_takes_images_batch_by_batch_and_brings_them_to_size(data):
    classifier, asked = tiny(), []

    def read(n):
        for i in range(n):
            asked.append(i)
            yield data[0][i % 12, :, : 32 - i % 2]  # of two shapes

    def watch(x):
        assert len(asked) - 4 * len(seen) <= 4
        seen.append(x.shape)
        return forward(x)

    seen, forward = [], classifier.forward
    classifier.forward = watch
    found = classify.predict(classifier, read(10), size=24, batch=4)
    assert seen == [(4, 3, 24, 24), (4, 3, 24, 24), (2, 3, 24, 24)]
    classifier.forward = forward
    expected = classify.predict(classifier, classify.resize(read(10), 24), batch=10)
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert classify.predict(classifier, iter(()), size=24).shape == (0, 2)


def test_resize_only_where_needed(data):
    images = data[0]
    np.testing.assert_array_equal(classify.resize(images, 32), images)
    assert classify.resize(images, 16).shape == (12, 16, 16, 3)
    assert classify.resize([], 16).shape == (0, 16, 16, 3)


def test_shrunk_images_are_averaged():
    image = np.random.default_rng(0).integers(0, 256, (60, 60, 3), dtype=np.uint8)
    mean = image.reshape(15, 4, 15, 4, 3).mean((1, 3))
    assert np.abs(classify.resize([image], 15)[0] - mean).max() <= 0.51


# --- bad input ------------------------------------------------------------------------------------


def test_bad_input(tmp_path, data):
    images, labels = data
    with pytest.raises(ValueError, match="no classifier is called 'vgg'"):
        classify.build_classifier("vgg", 2)
    with pytest.raises(ValueError, match="at least 2 classes"):
        classify.build_classifier("lite0", 1)
    with pytest.raises(FileNotFoundError, match=r"no checkpoint .*absent\.pt: .*'hub' or 'random'"):
        classify.build_classifier("lite0", 2, weights=tmp_path / "absent.pt")
    (tmp_path / "broken.pt").write_bytes(b"not a checkpoint")
    with pytest.raises(ValueError, match=r"broken\.pt could not be read .* damaged or holds"):
        classify.build_classifier("lite0", 2, weights=tmp_path / "broken.pt")
    with pytest.raises(ValueError, match="no training image has class 2 of 3"):
        fit(tiny(n_classes=3), data)
    with pytest.raises(ValueError, match="at least 2 images a batch"):
        fit(tiny(), data, batch_size=1)
    with pytest.raises(ValueError, match="labels run from 1 to 2: with 2 classes"):
        fit(tiny(), (images, labels + 1))


def test_diverging_training_stops_with_a_message(data):
    def broken(image):
        return torch.full(image.shape, torch.nan)

    classifier = tiny()
    before = {key: value.clone() for key, value in classifier.state_dict().items()}
    with pytest.raises(FloatingPointError, match="lower the rates"):
        fit(classifier, data, transform=broken)
    for key, value in classifier.state_dict().items():  # no epoch was finished
        torch.testing.assert_close(value, before[key])
