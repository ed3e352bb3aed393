import hashlib
import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from lgcn_fast import LGCN, Engine, LGCNConfig, load_model, models, predict
from lgcn_fast.checkpoints import WEIGHTS, model_names, save_model, weights_path
from lgcn_fast.loading import engine_for, finder_for
from lgcn_fast.shipped import MEASURED, best_model, lightest_model


def test_models_lists_what_lies_in_the_folder(package):
    big, small = models()  # those that were measured come first
    network = load_model("lgcn-big")
    assert (big.name, small.name) == ("lgcn-big", "lgcn-small")
    assert big.path == package / "lgcn-big.safetensors"
    assert big.parameters == sum(parameter.numel() for parameter in network.parameters())
    assert big.size == big.path.stat().st_size
    assert big.config == network.config
    assert (big.error, big.error_without_fit, big.mean_error) == ((3.5, 2.5), (4.5, 3.25), 4.0)
    assert big.faces_per_second == {"cpu": 1234.5}
    assert "LFPW test: 3.50 / 2.50 %, without the fit 4.50 / 3.25 %, 1,234 faces/s on cpu" in repr(big)
    assert (small.error, small.error_without_fit, small.mean_error, small.faces_per_second) == (None, None, None, {})
    assert repr(small).endswith("0.0 MB)")


def test_unknown_names_are_answered_with_the_known_ones(package):
    assert model_names() == ["lgcn-big", "lgcn-small"]
    for name in ("lgcn-huge", "shape-68", "lgcn-big.safetensors", "lgcn-/../lgcn-big", str(package)):
        with pytest.raises(ValueError, match="model: expected one of lgcn-big, lgcn-small, or a safetensors file, got"):
            weights_path(name)
    with pytest.raises(ValueError, match="got 'lgcn-huge'"):
        predict(np.zeros((96, 96), np.uint8), model="lgcn-huge")


def figures(name, error, cpu, cuda=None):
    speeds = {"cpu": cpu} if cuda is None else {"cpu": cpu, "cuda": cuda}
    return replace(models()[0], name=name, mean_error=error, faces_per_second=speeds)


@pytest.mark.parametrize(
    ("family", "cpu", "cuda"),
    [
        ([("nano", 3.2, 1200), ("64", 2.8, 110), ("128", 2.7, 29)], "64", "128"),
        ([("nano", 3.2, 1200), ("64", 2.8, 110), ("128", 2.7, 30.5)], "128", "128"),
        ([("nano", 3.2, 20), ("64", 2.8, 5), ("128", 2.7, 1)], "nano", "128"),
        ([("nano", 3.2, 1200), ("new", None, 5000)], "nano", "nano"),
        ([("nano", 3.2, 1200)], "nano", "nano"),
        ([("nano", 2.84, 1200, 3000), ("64", 2.8, 110, 2000), ("128", 2.7, 29, 2500)], "nano", "128"),
        ([("nano", 2.86, 1200, 3000), ("64", 2.8, 110, 2000), ("128", 2.76, 29, 2500)], "64", "128"),
        ([("nano", 2.74, 1200, 3000), ("64", 2.8, 110, 2000), ("128", 2.7, 29, 2500)], "nano", "nano"),
    ],
)
def test_the_default_is_the_best_that_is_fast_enough(family, cpu, cuda):
    candidates = [figures(*model) for model in family]
    assert best_model(candidates, "cpu").name == cpu
    assert best_model(candidates, "cuda").name == cuda
    assert best_model(candidates[::-1], "cpu").name == cpu


def test_what_takes_the_least_work_looks_for_faces(package):
    config = LGCNConfig(filters=2, local_kernels=(3,), global_layers=1)  # fewer weights, but in each pixel
    save_model(package / "lgcn-tiny.safetensors", LGCN(config), {})
    save_model(package / "lgcn-other.safetensors", LGCN(LGCNConfig.nano(filters=2, num_landmarks=15)), {})
    assert [lightest_model(count) for count in (68, 15, 5)] == ["lgcn-small", "lgcn-other", None]
    small, big = (engine_for(name, "cpu", "fp32") for name in ("lgcn-small", "lgcn-big"))
    assert finder_for(None, big) is small
    assert finder_for(None, small) is small
    assert finder_for("lgcn-big", small) is big
    assert finder_for(big, small) is big
    own = engine_for(LGCN(LGCNConfig.nano(filters=2, num_landmarks=5)), "cpu", "fp32")
    assert finder_for(None, own) is own


def test_what_looks_for_faces_runs_as_the_model_does():
    finder = finder_for(None, Engine("lgcn-nano-128", "cpu", "fp32", num_threads=1))
    assert (finder.config.filters, finder.backend, finder.precision, finder.num_threads) == (32, "cpu", "fp32", 1)


def test_fp8_is_not_for_what_looks_for_faces():
    reader = SimpleNamespace(config=LGCNConfig(), options=("cpu", "fp8", 1))
    assert finder_for(None, reader).precision in ("bf16", "fp32")


def test_figures_are_those_of_the_weights():
    """`lgcn-fast report --ship` is due whenever weights change."""
    measured = json.loads((WEIGHTS / MEASURED).read_text())
    assert sorted(measured) == model_names()
    for name, entry in measured.items():
        assert entry["sha256"] == hashlib.sha256(weights_path(name).read_bytes()).hexdigest(), name
        card = (WEIGHTS / f"{name}.md").read_text()
        for test_set, methods in entry["percent"].items():
            for method, errors in methods.items():
                medians = " / ".join(f"{points['median']:.2f}" for points in errors.values())
                assert f" {medians} " in card, f"{name}.md: expected {medians} for {test_set}, {method}"
        assert "\n@" not in card, f"{name}.md: a line to be filled in"
    assert all(model.error and model.faces_per_second for model in models())
