import csv
import gc
import multiprocessing
import os
import subprocess
import weakref
from copy import deepcopy
from dataclasses import replace

import numpy as np
import pytest
import torch
from networks import randomised

from lgcn_fast import LGCN, LGCNConfig, load_model, losses, recorded_step, training
from lgcn_fast.augmentation import Augmentation
from lgcn_fast.batches import EpochBatches
from lgcn_fast.checkpoints import load_tensors, save_model, save_tensors
from lgcn_fast.crops import CropCache
from lgcn_fast.images import read_image
from lgcn_fast.landmarks import SCHEMES
from lgcn_fast.losses import distillation_loss, lgcn_loss
from lgcn_fast.model import ScaledBatchNorm2d, activated
from lgcn_fast.recipes import RECIPES
from lgcn_fast.recorded_step import RecordedStep
from lgcn_fast.training import Trainer
from lgcn_fast.training_options import TrainingOptions

CONFIG = LGCNConfig.nano(filters=8, num_landmarks=15, local_kernels=(3, 3), global_layers=1, input_size=48, dropout=0.1)
PAPER = LGCNConfig(num_landmarks=15, filters=64, side_channels=15, local_kernels=(5, 3), global_layers=2, dropout=0)
FAST = replace(RECIPES["fast"], batch_size=8, augmentation=Augmentation(), muon_rate=5e-3)
OPTIONS = TrainingOptions(CONFIG, FAST, epochs=3, amp=False)
each_recipe = pytest.mark.parametrize(
    "recipe", [FAST, replace(RECIPES["paper"], batch_size=8, repeats=1)], ids=["fast", "paper"]
)


@pytest.fixture(scope="module")
def cache() -> CropCache:
    """ "Faces": 15 blobs of different heights that keep their arrangement while the whole moves and grows."""
    random = np.random.default_rng(0)
    shape = random.uniform(-0.4, 0.4, (15, 2))
    y, x = np.mgrid[:90, :90]
    images, points = [], []
    for _ in range(60):
        points.append(shape * random.uniform(50, 60) + 45 + random.uniform(-4, 4, 2))
        image = np.full((90, 90), 60.0)
        for height, (px, py) in zip(np.linspace(-60, 190, 15), points[-1], strict=True):
            image += height * np.exp(-((x - px) ** 2 + (y - py) ** 2) / 8)
        images.append(image.clip(0, 255).astype(np.uint8))
    boxes = np.tile(np.array([15, 15, 60, 60], np.float32), (60, 1))
    groups = np.array([f"photo{i}" for i in range(60)])
    sets = np.array(["clean"] * 40 + ["noisy"] * 20)
    return CropCache(images, np.stack(points).astype(np.float32), boxes, groups, sets)


def log_of(folder):
    with (folder / "log.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def weights_of(folder):
    return load_tensors(folder / "checkpoint.safetensors")[0]


def assert_same_run(one, two):
    for name, tensor in weights_of(one).items():
        assert torch.equal(tensor, weights_of(two)[name]), name
    for a, b in zip(log_of(one), log_of(two), strict=True):
        assert [a[key] for key in ("epoch", "loss", "validation_error")] == [
            b[key] for key in ("epoch", "loss", "validation_error")
        ]


@each_recipe
def test_killed_in_the_middle_goes_on_as_if_never_stopped(cache, tmp_path, monkeypatch, recipe):
    options = replace(OPTIONS, recipe=recipe)
    assert Trainer(cache, tmp_path / "whole", options).run()

    class PowerCut(Exception):
        pass

    step = Trainer._step
    steps_left = iter(range(9))  # 7 steps make an epoch: the cut comes within the second

    def cut(self, *arguments):
        if next(steps_left, None) is None:
            raise PowerCut
        return step(self, *arguments)

    monkeypatch.setattr(Trainer, "_step", cut)
    with pytest.raises(PowerCut):
        Trainer(cache, tmp_path / "cut", options).run()
    monkeypatch.setattr(Trainer, "_step", step)
    assert Trainer(cache, tmp_path / "cut", options).run()
    assert_same_run(tmp_path / "whole", tmp_path / "cut")


def test_time_budget_stops_and_goes_on(cache, tmp_path):
    Trainer(cache, tmp_path / "whole", OPTIONS).run()
    calls = 0
    while not Trainer(cache, tmp_path / "parts", OPTIONS).run(time_budget=1e-6):
        calls += 1
        assert calls <= 3
    assert calls == 2
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def test_time_budget_plans_the_schedule(cache, tmp_path):
    options = replace(OPTIONS, epochs=None)
    trainer = Trainer(cache, tmp_path, options)
    trainer.run(time_budget=0.05)
    planned = trainer.epochs
    assert 1 <= planned < 200
    assert 1 <= trainer.epoch <= planned  # (how many of them depends on what else the machine does)
    again = Trainer(cache, tmp_path, options)
    assert again.epochs == planned
    assert again.run()
    assert len(log_of(tmp_path)) == planned


@pytest.mark.slow
def test_learns_and_keeps_the_best(cache, tmp_path):
    trainer = Trainer(cache, tmp_path, replace(OPTIONS, epochs=40))
    untrained = 100 * trainer.validate()
    trainer.run()
    errors = [float(row["validation_error"]) for row in log_of(tmp_path)]
    assert len(errors) == 40
    assert trainer.best == pytest.approx(min(errors), rel=1e-4)
    assert trainer.best < 0.2 * untrained
    best = load_model(tmp_path / "best.safetensors")
    trainer.averaged.load_state_dict(best.state_dict())
    # The file holds fp16 filters, which may move the peak of a flat heatmap by a pixel.
    assert 100 * trainer.validate() == pytest.approx(trainer.best, rel=0.05)
    assert (tmp_path / "curve.png").stat().st_size > 1000


def test_starts_from_given_weights(cache, tmp_path):
    first = Trainer(cache, tmp_path / "first", replace(OPTIONS, epochs=20))
    assert first.label_shifts == {}
    first.run()
    weights = tmp_path / "first" / "best.safetensors"
    second = Trainer(cache, tmp_path / "second", replace(OPTIONS, init=weights))
    assert 100 * second.validate() == pytest.approx(first.best, abs=0.1)
    assert second.card()["init"] == str(weights)
    assert second.label_shifts.keys() == {"clean", "noisy"}
    assert max(map(abs, second.label_shifts.values())) < 0.06
    wide = Trainer(cache, tmp_path / "wide", replace(OPTIONS, init=weights, config=replace(CONFIG, filters=12)))
    assert 100 * wide.validate() == pytest.approx(first.best, abs=0.1)
    for changes, message in (
        ({"filters": 4}, r"with filters=4 \(or of fewer filters\), got filters=8"),
        ({"filters": 12, "global_layers": 2}, "with global_layers=2, got global_layers=1"),
    ):
        with pytest.raises(ValueError, match=r"best\.safetensors: expected weights " + message):
            Trainer(cache, tmp_path / "other", replace(OPTIONS, init=weights, config=replace(CONFIG, **changes)))


@pytest.mark.parametrize("config", [CONFIG, replace(PAPER, filters=8, loss="cross_entropy")], ids=["light", "paper"])
def test_starts_from_weights_for_other_landmarks(cache, tmp_path, config):
    """Hidden layers are those of the start, all but the one that sees the heatmaps."""
    other = replace(config, num_landmarks=68, side_channels=68 if config.side_channels else 0, loss="squared_error")
    start = randomised(other)
    save_model(tmp_path / "start.safetensors", start, {})
    options = replace(OPTIONS, init=tmp_path / "start.safetensors", config=config, epochs=1)
    trainer = Trainer(cache, tmp_path / "run", options)
    assert trainer.label_shifts == {}
    old, new = start.state_dict(), trainer.model.state_dict()
    fresh = [name for name in new if name.endswith("weight") and new[name].shape != old[name].shape]
    assert fresh[0] == "main.weight"
    assert fresh[-1] == "refine.weight"
    assert len(fresh) == (5 if config.side_channels else 3)  # main, side and its norm, the first of the global subnet
    for name in new.keys() - set(fresh):
        if new[name].shape == old[name].shape and new[name].ndim > 1:
            torch.testing.assert_close(new[name], old[name], atol=0, rtol=1e-3)  # (filters are stored in fp16)
    assert trainer.run()


def test_label_shifts_are_those_of_the_start_when_a_run_goes_on(cache, tmp_path):
    save_model(tmp_path / "start.safetensors", randomised(CONFIG), {})
    options = replace(OPTIONS, init=tmp_path / "start.safetensors")
    first = Trainer(cache, tmp_path / "whole", options)
    first.run()
    assert all(first.label_shifts.values())
    while not (part := Trainer(cache, tmp_path / "parts", options)).run(time_budget=1e-6):
        (tmp_path / "start.safetensors").unlink(missing_ok=True)  # what the run needs is in the checkpoint
    assert part.epoch == 3
    assert part.label_shifts == first.label_shifts
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def test_faces_without_an_eye_corner_are_learned_from_but_not_validated_with(cache, tmp_path):
    points = cache.points.copy()
    points[::2, SCHEMES[15].eye_corners[0]] = np.nan
    whole, trainer = (
        Trainer(c, tmp_path / str(i), OPTIONS) for i, c in enumerate((cache, replace(cache, points=points)))
    )
    assert trainer.validation.tolist() == [index for index in whole.validation if index % 2]
    assert trainer.chosen.tolist() == whole.chosen.tolist()
    trainer.run()
    assert np.isfinite(trainer.best)
    assert (tmp_path / "1" / "best.safetensors").is_file()
    points[:, SCHEMES[15].eye_corners[0]] = np.nan
    with pytest.raises(ValueError, match=r"expected labelled faces .* whose outer eye corners are labelled"):
        Trainer(replace(cache, points=points), tmp_path / "none", OPTIONS)


def test_an_interrupted_run_with_workers_goes_on(cache, tmp_path):
    options = replace(OPTIONS, workers=1)  # (and with dropout, whose random numbers are this process's)
    assert Trainer(cache, tmp_path / "whole", options).run()
    while not Trainer(cache, tmp_path / "parts", options).run(time_budget=1e-6):
        pass
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def test_nothing_of_a_run_stays_behind(cache, tmp_path):
    """Neither processes, which Python waits for at its end, 5 seconds each where batches are pinned, nor memory."""
    trainer = Trainer(cache, tmp_path, replace(OPTIONS, workers=1))
    gc.disable()
    try:
        trainer.run()
        assert multiprocessing.active_children() == []
        kept = weakref.ref(trainer)
        del trainer
        assert kept() is None
    finally:
        gc.enable()


def test_two_runs_do_not_mix_in_one_folder(cache, tmp_path, monkeypatch):
    first, second = Trainer(cache, tmp_path, OPTIONS), Trainer(cache, tmp_path, replace(OPTIONS, seed=1))
    step, refused = Trainer._step, []

    def beside(self, *arguments):
        if not refused:
            with pytest.raises(ValueError, match="expected a folder for this run alone") as error:
                second.run()
            refused.append(error)
        return step(self, *arguments)

    monkeypatch.setattr(Trainer, "_step", beside)
    monkeypatch.setattr(training, "PATIENCE", 0)
    assert first.run()
    assert refused
    assert second.epoch == 0
    with pytest.raises(ValueError, match="expected a run with seed=1, got one with seed=0; use another folder"):
        second.run()


def test_runs_of_other_versions_are_named(cache, tmp_path):
    Trainer(cache, tmp_path, OPTIONS).run()
    path = tmp_path / "checkpoint.safetensors"
    tensors, metadata = load_tensors(path)
    del metadata["options"]
    save_tensors(path, tensors, metadata)
    with pytest.raises(ValueError, match="expected a run of this version, got one of another; use another folder"):
        Trainer(cache, tmp_path, OPTIONS)


def test_a_run_goes_on_from_where_another_has_ended_in_the_meantime(cache, tmp_path):
    first, second = (Trainer(cache, tmp_path, OPTIONS) for _ in range(2))
    assert first.run()
    before = log_of(tmp_path)
    assert second.run()
    assert second.epoch == first.epoch
    assert log_of(tmp_path) == before


@pytest.mark.parametrize("minutes", [0, -1, float("nan"), float("inf")])
def test_no_time_is_an_error(cache, tmp_path, minutes):
    with pytest.raises(ValueError, match="time_budget: expected minutes above 0"):
        Trainer(cache, tmp_path, OPTIONS).run(time_budget=minutes)


def test_networks_for_cross_entropy_are_validated_by_their_probabilities(cache, tmp_path):
    options = replace(OPTIONS, config=replace(CONFIG, loss="cross_entropy"), epochs=1)
    trainer = Trainer(cache, tmp_path, options)
    for tensor in (trainer.averaged.main.weight, trainer.averaged.refine.weight):
        torch.nn.init.normal_(tensor)
    images = torch.stack([torch.from_numpy(cache.images[i][21:69, 21:69]) for i in range(4)])[:, None]
    logits = trainer.averaged.eval()(images).output
    read = losses.readable(logits, options.config)
    torch.testing.assert_close(read, losses.probabilities(logits))
    torch.testing.assert_close(losses.readable(logits, CONFIG), logits)
    called, readable = [], training.readable
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "readable", lambda *arguments: called.append(arguments[1].loss) or readable(*arguments))
        trainer.validate()
    assert set(called) == {"cross_entropy"}


def test_another_cache_is_another_run(cache, tmp_path):
    Trainer(cache, tmp_path, OPTIONS).run(time_budget=1e-6)
    other = replace(cache, images=[*cache.images[:-1], cache.images[-1] // 2])
    with pytest.raises(ValueError, match="expected the crop cache that the run began with, got another"):
        Trainer(other, tmp_path, OPTIONS)
    assert Trainer(cache, tmp_path, OPTIONS).epoch == 1


@pytest.mark.parametrize("stride", [1, 2])
def test_half_of_the_loss_is_against_the_teachers_heatmaps(cache, tmp_path, stride):
    teacher = randomised(replace(CONFIG, filters=12, stride=stride))
    save_model(tmp_path / "teacher.safetensors", teacher, {})
    config = replace(CONFIG, dropout=0.0)
    trainer = Trainer(cache, tmp_path, replace(OPTIONS, config=config, teacher=tmp_path / "teacher.safetensors"))
    images, points = next(iter(trainer._loader()))
    with torch.no_grad():
        taught = load_model(tmp_path / "teacher.safetensors")(images).output
        heatmaps = deepcopy(trainer.model)(images)
    if stride == 1:
        taught = (taught[..., ::2, ::2] + taught[..., 1::2, ::2] + taught[..., ::2, 1::2] + taught[..., 1::2, 1::2]) / 4
    losses = []
    trainer._step(trainer._update, images, points, 0, losses)
    expected = (lgcn_loss(heatmaps, points, config) + distillation_loss(heatmaps, taught)) / 2
    assert losses[0] == pytest.approx(expected.item(), rel=1e-4)
    assert trainer.card()["teacher"] == str(tmp_path / "teacher.safetensors")
    assert trainer.label_shifts.keys() == {"clean", "noisy"}


def test_teachers_that_do_not_fit_are_named(cache, tmp_path):
    path = tmp_path / "teacher.safetensors"
    for changes, message in (
        ({"loss": "cross_entropy"}, r"loss: expected 'squared_error' for teacher and student, got \['cross_entropy'"),
        ({"stride": 4}, "stride: expected a divisor of the student's 2, got 4"),
        ({"input_size": 96}, "input_size: expected the student's 48, got 96"),
        ({"num_landmarks": 68}, "num_landmarks: expected the student's 15, got 68"),
    ):
        save_model(path, LGCN(replace(CONFIG, **changes)), {})
        with pytest.raises(ValueError, match=r"teacher\.safetensors: " + message):
            Trainer(cache, tmp_path, replace(OPTIONS, teacher=path))


def test_cross_entropy_trains(cache, tmp_path):
    config = replace(CONFIG, loss="cross_entropy")
    trainer = Trainer(cache, tmp_path, replace(OPTIONS, config=config))
    trainer.run()
    assert trainer.log[-1]["loss"] < trainer.log[0]["loss"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"config": replace(CONFIG, num_landmarks=68)}, "num_landmarks: expected the cache's 15, got 68"),
        ({"config": replace(CONFIG, in_channels=3)}, "in_channels: expected the cache's 1, got 3"),
        ({"shares": {"nothing": 0.5}}, "shares: expected numbers in 0..1 for sets among clean, noisy"),
        ({"shares": {"noisy": 1.5}}, "shares: expected"),
        ({"epochs": 0}, "epochs: expected at least 1, got 0"),
        ({"seed": -1}, r"seed: expected 0 to 2\*\*32 - 1, got -1"),
        ({"workers": -1}, "workers: expected 0 or more, got -1"),
    ],
)
def test_options_that_do_not_fit_are_named(cache, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        Trainer(cache, tmp_path, replace(OPTIONS, **changes))


def test_recipes_that_make_no_sense_are_named():
    for name in ("batch_size", "repeats"):
        with pytest.raises(ValueError, match=f"{name}: expected at least 1, got 0"):
            replace(FAST, **{name: 0})


def test_a_batch_may_be_larger_than_all_faces(cache, tmp_path):
    trainer = Trainer(cache, tmp_path, replace(OPTIONS, recipe=replace(FAST, batch_size=1000, repeats=2), epochs=1))
    assert len(trainer.batches) == 1
    assert trainer.run()


def test_a_loss_that_is_no_number_is_named_and_kept_out(cache, tmp_path, monkeypatch):
    trainer = Trainer(cache, tmp_path, OPTIONS)
    trainer.epochs = OPTIONS.epochs
    trainer._run_epoch(trainer._loader(), trainer._update)
    before = (tmp_path / "checkpoint.safetensors").read_bytes()
    monkeypatch.setattr(training, "lgcn_loss", lambda *_: next(trainer.model.parameters()).sum() * torch.nan)
    with pytest.raises(FloatingPointError, match="loss: expected a finite number, got nan in epoch 2"):
        trainer.run()
    assert (tmp_path / "checkpoint.safetensors").read_bytes() == before


def test_averages_forget_the_first_weights_soon(cache, tmp_path):
    trainer = Trainer(cache, tmp_path, OPTIONS)
    first = next(iter(trainer.averaged.parameters()))
    (weights := next(iter(trainer.model.parameters()))).data.fill_(1.0)
    trainer._average(0)
    assert torch.equal(first, weights)
    weights.data.fill_(2.0)
    trainer._average(1)
    torch.testing.assert_close(first, torch.full_like(first, 2 - 2 / 11))
    trainer.options = replace(OPTIONS, recipe=RECIPES["paper"])  # has none
    weights.data.fill_(3.0)
    trainer._average(7)
    assert torch.equal(first, weights)


def test_weights_that_the_run_would_write_over_are_refused(cache, tmp_path):
    save_model(tmp_path / "best.safetensors", randomised(CONFIG), {})
    before = (tmp_path / "best.safetensors").read_bytes()
    for name in ("init", "teacher"):
        with pytest.raises(ValueError, match=f"{name}: expected other weights than those that the run writes"):
            Trainer(cache, tmp_path, replace(OPTIONS, **{name: tmp_path / "best.safetensors"}))
        with pytest.raises(ValueError, match=f"{name}: expected one of lgcn-"):
            Trainer(cache, tmp_path / "run", replace(OPTIONS, **{name: tmp_path / "nothing"}))
    assert (tmp_path / "best.safetensors").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["best.safetensors"]


def test_a_planned_run_is_one_of_so_many_epochs(cache, tmp_path, monkeypatch):
    """The steps that the plan is made of leave nothing behind."""
    plan = Trainer._plan

    def planned(self, *arguments):
        plan(self, *arguments)
        return 2

    assert Trainer(cache, tmp_path / "asked for", replace(OPTIONS, epochs=2)).run()
    monkeypatch.setattr(Trainer, "_plan", planned)
    assert Trainer(cache, tmp_path / "planned", replace(OPTIONS, epochs=None)).run(time_budget=10)
    assert_same_run(tmp_path / "asked for", tmp_path / "planned")


def test_runs_draw_with_the_label_shifts_of_their_checkpoint(cache, tmp_path):
    options = replace(OPTIONS, init=tmp_path / "start.safetensors")
    save_model(options.init, randomised(CONFIG), {})
    first = Trainer(cache, tmp_path / "run", options)
    first.label_shifts = {"clean": 0.25}
    first.run()
    second = Trainer(cache, tmp_path / "run", options)
    assert second._loader().dataset.label_shifts == second.label_shifts == {"clean": 0.25}


@pytest.mark.parametrize(("clip", "largest"), [("clip_value", 0.1), ("clip_norm", 20.0)])
def test_gradients_are_clipped(cache, tmp_path, monkeypatch, clip, largest):
    recipe = RECIPES["paper" if clip == "clip_value" else "fast"]
    assert getattr(recipe, clip) == largest
    trainer, seen = Trainer(cache, tmp_path, replace(OPTIONS, recipe=recipe)), []
    parameters = list(trainer.model.parameters())
    monkeypatch.setattr(training, "lgcn_loss", lambda *_: 1e6 * sum(p.sum() for p in parameters))
    step = trainer.optimiser.step
    monkeypatch.setattr(trainer.optimiser, "step", lambda: [seen.extend(p.grad.clone() for p in parameters), step()])
    trainer._update(*next(iter(trainer._loader())))
    gradients = torch.cat([gradient.flatten() for gradient in seen])
    size = gradients.abs().max() if clip == "clip_value" else gradients.norm()
    assert float(size) == pytest.approx(largest, rel=1e-4)


def test_caches_without_enough_faces_are_named(cache, tmp_path):
    validation = Trainer(cache, tmp_path / "run", OPTIONS).validation
    unlabelled = replace(cache, points=cache.points.copy())
    unlabelled.points[validation] = np.nan
    with pytest.raises(ValueError, match=r"cache: expected labelled faces to train on and others, .*, got 5\d and 0"):
        Trainer(unlabelled, tmp_path, OPTIONS)
    with pytest.raises(ValueError, match=r"got 0 and 0 \(by their names of 0 .*; sets of share 0 do not count"):
        Trainer(cache, tmp_path, replace(OPTIONS, shares={"clean": 0.0, "noisy": 0.0}))
    few = replace(cache, points=cache.points[:, :5])
    with pytest.raises(ValueError, match=r"num_landmarks: expected 15 or 68, or an entry in .*, got 5"):
        Trainer(few, tmp_path, replace(OPTIONS, config=replace(CONFIG, num_landmarks=5)))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_cuda_without_gpu_is_named(cache, tmp_path):
    with pytest.raises(ValueError, match=r"device: expected .* got 'cuda'"):
        Trainer(cache, tmp_path, replace(OPTIONS, device="cuda"))


def test_bf16_is_used_where_it_is_fast(cache, tmp_path, monkeypatch):
    for known, options, expected in (
        ({"fp32": "avx2"}, {}, False),
        ({"fp32": "avx512", "bf16": "amx_bf16"}, {}, True),
        ({"fp32": "avx2"}, {"amp": True}, True),
    ):
        monkeypatch.setattr("lgcn_fast.training.INSTRUCTIONS", known)
        assert Trainer(cache, tmp_path, replace(OPTIONS, **{"amp": None} | options)).amp is expected


@pytest.mark.parametrize("config", [CONFIG, PAPER], ids=["nano", "paper"])
def test_gradients_in_bf16_are_nearly_those_in_fp32(cache, tmp_path, config):
    images = torch.from_numpy(np.stack([image[:48, :48] for image in cache.images[:4]]))[:, None]
    points = torch.from_numpy(cache.points[:4, None])
    start, gradients = randomised(config).state_dict(), []
    for amp in (False, True):
        model = Trainer(cache, tmp_path / str(amp), replace(OPTIONS, config=config, amp=amp)).model
        model.load_state_dict(start)
        with torch.autocast("cpu", torch.bfloat16, enabled=amp):
            heatmaps = model(images)
        lgcn_loss(heatmaps, points, config).backward()
        # Biases in front of a norm have none.
        gradients.append([parameter.grad for parameter in model.parameters() if parameter.ndim > 1])
    for exact, rounded in zip(*gradients, strict=True):
        assert torch.dist(exact, rounded) < 0.3 * exact.norm()


def test_a_folder_with_another_run_is_refused(cache, tmp_path):
    Trainer(cache, tmp_path, replace(OPTIONS, epochs=1)).run()
    before = (tmp_path / "checkpoint.safetensors").read_bytes()
    with pytest.raises(ValueError, match="use another folder"):
        Trainer(cache, tmp_path, replace(OPTIONS, seed=1))
    with pytest.raises(ValueError, match="expected a run of 3 epochs, got 1"):
        Trainer(cache, tmp_path, OPTIONS)
    assert (tmp_path / "checkpoint.safetensors").read_bytes() == before


def test_partly_used_sets_change_between_epochs():
    tiny = EpochBatches(np.arange(60), np.full(60, 1e-3), batch_size=4, seed=0)
    assert [len(batch) for batch in tiny] == [1]  # not none
    shares = np.array([1.0] * 10 + [0.2] * 50)
    batches = EpochBatches(np.arange(60), shares, batch_size=4, seed=0)
    drawn = []
    for batches.epoch in range(20):
        keys = [key for batch in batches for key in batch]
        assert len({index for _, index in keys}) == len(keys) == 20
        drawn.append({index for _, index in keys})
    assert drawn[0] != drawn[1]
    assert all(set(range(10)) <= epoch for epoch in drawn)
    assert len(set.union(*drawn)) > 50


def test_the_papers_epoch_has_every_fixed_variant_once():
    batches = EpochBatches(np.arange(10), np.ones(10), batch_size=5, seed=0, repeats=RECIPES["paper"].repeats)
    for batches.epoch in (0, 3):
        keys = [key for batch in batches for key in batch]
        assert sorted((draw % 18, index) for draw, index in keys) == [(d, i) for d in range(18) for i in range(10)]


def test_no_draw_comes_twice():
    """What an epoch draws of a face no other epoch draws: the augmentation goes by it."""
    batches, seen = EpochBatches(np.arange(10), np.ones(10), batch_size=5, seed=0, repeats=3), []
    for batches.epoch in range(4):
        seen += [key for batch in batches for key in batch]
    assert len(set(seen)) == len(seen) == 120


def test_validation_groups_are_not_trained_on(cache, tmp_path):
    cache = replace(cache, groups=np.array([f"person{i // 3}" for i in range(len(cache))]))
    trainer = Trainer(cache, tmp_path, OPTIONS)
    groups = [set(cache.groups[chosen]) for chosen in (trainer.validation, trainer.chosen)]
    assert groups[0].isdisjoint(groups[1])
    assert groups[0]
    assert len(trainer.validation) + len(trainer.chosen) == len(cache)


def test_faces_with_both_eyes_at_one_place_are_not_measured(cache, tmp_path):
    mistyped = Trainer(cache, tmp_path / "all", OPTIONS).validation[0]
    points = cache.points.copy()
    left, right = SCHEMES[15].eye_corners
    points[mistyped, right] = points[mistyped, left]
    trainer = Trainer(replace(cache, points=points), tmp_path, OPTIONS)
    assert mistyped not in trainer.validation
    assert trainer.run()
    assert (tmp_path / "best.safetensors").is_file()


def test_killed_behind_the_last_checkpoint_writes_the_log(cache, tmp_path, monkeypatch):
    trainer, write_log = Trainer(cache, tmp_path, OPTIONS), training.write_log

    def cut(path, log):
        if len(log) == 3:
            raise KeyboardInterrupt
        write_log(path, log)

    monkeypatch.setattr(training, "write_log", cut)
    with pytest.raises(KeyboardInterrupt):
        trainer.run()
    assert len(log_of(tmp_path)) == 2
    (tmp_path / "curve.png").write_bytes(b"half of a picture")
    left_behind, other = tmp_path / "best.safetensors.123.part", tmp_path / "holidays.part"
    for path in (left_behind, other):
        path.touch()
        os.utime(path, (0, 0))
    monkeypatch.setattr(training, "write_log", write_log)
    assert Trainer(cache, tmp_path, OPTIONS).run()
    assert len(log_of(tmp_path)) == 3
    assert read_image(tmp_path / "curve.png").std() > 5
    assert (left_behind.exists(), other.exists()) == (False, True)


def test_a_teacher_that_has_changed_is_named(cache, tmp_path):
    path = tmp_path / "teacher.safetensors"
    options = replace(OPTIONS, teacher=path)
    save_model(path, randomised(CONFIG), {})
    Trainer(cache, tmp_path / "run", options).run(time_budget=1e-6)
    assert not Trainer(cache, tmp_path / "run", options).run(time_budget=1e-6)
    save_model(path, randomised(CONFIG), {"epoch": 7})
    with pytest.raises(ValueError, match="expected the teacher that the run began with, got another"):
        Trainer(cache, tmp_path / "run", options)


def test_the_commit_is_that_of_the_project(tmp_path, monkeypatch):
    """Not that of another repository, in whose virtual environment the package is installed."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    environment |= {"GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_SYSTEM": os.devnull}
    author = ["-c", "user.name=a", "-c", "user.email=a@b"]
    for words in (["init", "-q"], [*author, "commit", "-q", "--allow-empty", "-m", "a"]):
        subprocess.run(["git", "-C", str(tmp_path), *words], check=True, env=environment)
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "nowhere"))
    monkeypatch.setattr(training, "__file__", str(tmp_path / "lgcn_fast" / "training.py"))
    (tmp_path / "lgcn_fast").mkdir()
    assert len(training.commit()) == 12
    inside = tmp_path / ".venv" / "site-packages" / "lgcn_fast" / "training.py"
    inside.parent.mkdir(parents=True)
    monkeypatch.setattr(training, "__file__", str(inside))
    assert training.commit() is None


@pytest.mark.gpu
@pytest.mark.parametrize("amp", [False, True])
def test_trains_on_cuda(cache, tmp_path, amp):
    trainer = Trainer(cache, tmp_path, replace(OPTIONS, epochs=10, device="cuda", amp=amp, workers=2))
    assert trainer.run()
    assert trainer.log[-1]["loss"] < trainer.log[0]["loss"]
    assert Trainer(cache, tmp_path, replace(OPTIONS, epochs=10, device="cuda", amp=amp)).epoch == 10


@pytest.mark.filterwarnings("default")  # of the compiler, about the rest of PyTorch
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_compiled_steps_are_the_same(cache, tmp_path, device):
    options = replace(OPTIONS, config=replace(CONFIG, dropout=0.0), device=device, amp=False)
    plain, compiled = (Trainer(cache, tmp_path / str(on), replace(options, compiled=on)) for on in (False, True))
    assert plain.run()
    assert compiled.run()
    for one, other in zip(plain.log, compiled.log, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-2)
        assert one["validation_error"] == pytest.approx(other["validation_error"], rel=5e-2)


def test_nothing_to_compile_with_is_named(cache, tmp_path, monkeypatch):
    def refused(*_):
        raise RuntimeError("No working C++ compiler found\nSet TORCHDYNAMO_VERBOSE=1")

    monkeypatch.setattr(torch, "compile", lambda *_, **__: refused)
    with pytest.raises(ValueError, match=r"expected what torch.compile needs, got No working C\+\+ compiler found$"):
        Trainer(cache, tmp_path, replace(OPTIONS, compiled=True))


@pytest.mark.gpu
@pytest.mark.filterwarnings("default")
def test_recorded_dropout_is_drawn_anew():
    """By each replay, compiled or not."""
    device, norm = torch.device("cuda"), ScaledBatchNorm2d(64, 0.1).cuda()
    images, points = torch.randint(256, (4, 64, 24, 24), dtype=torch.uint8), torch.zeros(4, 1, 68, 2)
    for activation in (activated, torch.compile(activated)):
        step = RecordedStep(lambda x, _, activation=activation: activation(x.float(), norm, 0.5).sum().detach(), device)
        losses = [step(images, points).item() for _ in range(3 * recorded_step.WARM_UP)]
        assert step._replay is not None
        assert len(set(losses)) == len(losses)


@pytest.mark.gpu
@each_recipe
def test_recorded_steps_are_those_launched_one_by_one(cache, tmp_path, monkeypatch, recipe):
    options = replace(OPTIONS, config=replace(CONFIG, dropout=0.0), recipe=recipe, device="cuda")
    record, records = RecordedStep._record, []
    monkeypatch.setattr(RecordedStep, "_record", lambda self: records.append(self) or record(self))
    recorded = Trainer(cache, tmp_path / "recorded", options)
    assert recorded.run()
    assert len(records) == 1
    monkeypatch.setattr(recorded_step, "WARM_UP", 1000)
    launched = Trainer(cache, tmp_path / "launched", options)
    assert launched.run()
    assert len(records) == 1
    for one, other in zip(recorded.log, launched.log, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-2)
        assert one["validation_error"] == pytest.approx(other["validation_error"], rel=5e-2)


@pytest.mark.gpu
@each_recipe
def test_recorded_runs_go_on(cache, tmp_path, recipe):
    options = replace(OPTIONS, config=replace(CONFIG, dropout=0.0), recipe=recipe, device="cuda")
    assert Trainer(cache, tmp_path / "whole", options).run()
    while not Trainer(cache, tmp_path / "parts", options).run(time_budget=1e-6):
        pass
    for one, other in zip(log_of(tmp_path / "whole"), log_of(tmp_path / "parts"), strict=True):
        assert float(one["loss"]) == pytest.approx(float(other["loss"]), rel=1e-2)


@each_recipe
def test_the_optimisers_state_lies_in_memory_as_the_parameters_when_a_run_goes_on(cache, tmp_path, recipe):
    """PyTorch's fused optimisers, for GPUs, demand it."""
    options = replace(OPTIONS, recipe=recipe, epochs=1)
    Trainer(cache, tmp_path, options).run()
    state = Trainer(cache, tmp_path, options).optimiser.state
    assert any(parameter.is_contiguous(memory_format=torch.channels_last) for parameter in state if parameter.ndim == 4)
    for parameter, slots in state.items():
        for slot, tensor in slots.items():
            assert slot == "step" or tensor.stride() == parameter.stride(), slot


def test_sets_weigh_in_the_validation_by_their_shares(cache, tmp_path, monkeypatch):
    """And lost faces as three times the median."""
    cache = replace(cache, sets=np.array(["clean", "noisy"] * 30))
    trainer = Trainer(cache, tmp_path, replace(OPTIONS, shares={"noisy": 0.25}))
    noisy = cache.sets[trainer.validation] == "noisy"
    errors = np.where(noisy, 0.2, 0.1)
    errors[0] = 50
    assert 0 < noisy.sum() < len(noisy) <= 32
    monkeypatch.setattr(training, "landmark_errors", lambda found, labelled: errors.copy())
    expected = np.average(np.minimum(errors, 3 * np.median(errors)), weights=np.where(noisy, 0.25, 1))
    assert trainer.validate() == pytest.approx(expected)
