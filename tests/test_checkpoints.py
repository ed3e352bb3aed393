import errno
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from lgcn_fast import LGCN, LGCNConfig
from lgcn_fast.checkpoints import load_card, load_model, save_model
from lgcn_fast.files import write_whole

CONFIG = LGCNConfig(filters=4, num_landmarks=3, side_channels=2, local_kernels=(3,), global_layers=1)


@pytest.fixture
def weights(tmp_path):
    model = LGCN(CONFIG)
    for tensor in model.state_dict().values():
        if tensor.is_floating_point():
            tensor.copy_(torch.rand_like(tensor))
    path = tmp_path / "model.safetensors"
    save_model(path, model, {"seed": 7})
    return path, model


def test_whoever_may_read_files_may_read_weights(weights, tmp_path):
    (tmp_path / "other").write_text("")
    assert weights[0].stat().st_mode == (tmp_path / "other").stat().st_mode


def test_a_full_disk_leaves_what_was_there(weights, monkeypatch):
    path, model = weights
    before = path.read_bytes()

    def full(partial, content):
        partial.touch()
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match=rf"No space left on device: '{path}'"):
        save_model(path, model, {})
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


def test_files_that_several_threads_write_are_whole(tmp_path):
    path, contents = tmp_path / "numbers.json", [bytes([i]) * 100_000 for i in range(8)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda content: write_whole(path, content), contents * 10))
    assert path.read_bytes() in contents
    assert list(tmp_path.iterdir()) == [path]


def test_round_trip(weights):
    path, model = weights
    loaded = load_model(path)
    assert loaded.config == CONFIG
    assert not loaded.training
    assert load_card(path) == {"seed": 7}
    for name, tensor in model.state_dict().items():
        # Filters travel as fp16, which keeps 11 bits.
        torch.testing.assert_close(loaded.state_dict()[name], tensor, rtol=2**-11, atol=1e-6)
    images = torch.rand(1, 1, 20, 20) * 255
    model.eval()
    torch.testing.assert_close(loaded(images).output, model(images).output, rtol=2e-3, atol=2e-3)


def test_file_is_small_and_whole(weights):
    path, _ = weights
    with safe_open(path, framework="pt") as file:
        assert file.get_tensor("main.weight").dtype == torch.float16
        assert file.get_tensor("local_subnet.0.1.running_var").dtype == torch.float32
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def rewritten(path, change):
    with safe_open(path, framework="pt") as file:
        tensors, metadata = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118
    change(tensors, metadata)
    save_file(tensors, path, metadata)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t, m: t.pop("main.bias"), "it has or lacks main.bias"),
        (lambda t, m: t.update(extra=torch.ones(1)), "it has or lacks extra"),
        (
            lambda t, m: t.update({"main.weight": torch.ones(3, 5, 1, 1)}),
            r"main.weight: expected \(3, 4, 1, 1\), got \(3, 5, 1, 1\)",
        ),
        (lambda t, m: t["refine.bias"].fill_(torch.nan), "refine.bias: expected finite numbers"),
        (lambda t, m: m.pop("format"), "expected the weights of a model .* got None"),
        (lambda t, m: m.update(config=LGCNConfig(filters=8).to_json()), "expected"),
        (lambda t, m: m.update(config="{}]"), "expected a configuration in its metadata"),
    ],
)
def test_what_does_not_fit_is_named(weights, change, message):
    path, _ = weights
    rewritten(path, change)
    with pytest.raises(ValueError, match=message):
        load_model(path)


def test_a_damaged_card_is_named(weights):
    path, _ = weights
    rewritten(path, lambda t, m: m.update(training="{]"))
    with pytest.raises(ValueError, match=r"model\.safetensors: expected JSON of its training in its metadata"):
        load_card(path)


@pytest.mark.parametrize("content", [b"", b"no weights at all"])
def test_other_files_are_named(tmp_path, content):
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"model\.safetensors: expected a safetensors file"):
        load_model(path)


def test_loading_keeps_random_numbers_and_does_not_depend_on_defaults():
    expected = load_model("lgcn-finder").state_dict()
    before = torch.get_rng_state()
    try:
        torch.set_default_dtype(torch.bfloat16)
        with torch.device("meta"):
            found = load_model("lgcn-finder").state_dict()
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(torch.get_rng_state(), before)
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=0)


def test_loading_leaves_random_numbers_alone():
    before = torch.get_rng_state()
    load_model("lgcn-finder")
    assert torch.equal(torch.get_rng_state(), before)
