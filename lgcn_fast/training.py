"""Training: one loop, resumable after a kill at any moment with the result of an unbroken run.

Every random draw comes from a generator seeded by (seed, epoch), and the state is written after each epoch, so that
an interrupted epoch is simply run again. (To the last bit on a CPU; CUDA's kernels do not promise that.)
"""

import ctypes
import gc
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from copy import deepcopy
from dataclasses import asdict
from hashlib import sha256
from math import isfinite
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from lgcn_fast_kernels import INSTRUCTIONS

from .augmentation import NONE
from .batches import AugmentedCrops, EpochBatches
from .checkpoints import load_start, load_teacher, load_tensors, save_model, save_tensors, weights_path
from .config import LGCNConfig
from .crops import CropCache, mean_shape
from .evaluation import landmark_errors
from .files import same_file, write_whole
from .heatmaps import to_heatmap
from .label_shifts import measured_shifts
from .losses import distillation_loss, lgcn_loss, readable
from .model import LGCN, ConvBlock, ScaledBatchNorm2d, activated, checked_device, cudnn_benchmark
from .operators import gaussian_sum_banded, gaussian_sum_native
from .optimiser import set_rate
from .peaks import PEAK_RADIUS, peak_centroids
from .recorded_step import RecordedStep
from .training_log import COLUMNS, draw_log, write_log
from .training_options import TrainingOptions, check_cache, check_faces

try:
    import fcntl
except ImportError:  # on Windows
    fcntl = None

PLAN_STEPS = 24
"""Steps that are timed to find how many epochs fit a time budget; the first third does not count: on a GPU a step is
recorded there."""
FILES = ("checkpoint.safetensors", "best.safetensors", "log.csv", "curve.png")
"""Of a run."""
PATIENCE = 10.0
"""Seconds that a run waits for another one in its folder to end: the workers of a killed one take five to notice."""
LARGEST_ERROR = 3.0
"""Times the median, in the validation error: how far a few lost faces are off must not decide which weights are
best for all others."""


class Trainer:
    """A training run in a folder: `checkpoint.safetensors` to go on, `best.safetensors` to use, `log.csv` to read."""

    def __init__(self, cache: CropCache, folder: Path, options: TrainingOptions) -> None:
        """Set a run up, or take an interrupted one in `folder` up again.

        Raises:
            ValueError: cache and configuration do not fit, nothing to compile with, or `folder` holds a run with other
                options, crops or another teacher.
        """
        check_cache(cache, options)
        self.cache, self.options, self.folder = cache, options, Path(folder)
        self._checkpoint, self._best_weights = (self.folder / f"{name}.safetensors" for name in ("checkpoint", "best"))
        for name in ("init", "teacher"):
            if (read := getattr(options, name)) and same_file(read, self._best_weights):
                raise ValueError(f"{name}: expected other weights than those that the run writes, got {read}")
        self.device = checked_device(options.device)
        fast_in_bf16 = self.device.type == "cuda" or "bf16" in INSTRUCTIONS
        self.amp = fast_in_bf16 if options.amp is None else options.amp
        torch.manual_seed(options.seed)
        self.model = LGCN(options.config)
        knows_landmarks, goes_on = False, self._checkpoint.exists()
        if options.init and not goes_on:
            start, knows_landmarks = load_start(options.init, options.config)
            self.model.load_state_dict(start.state_dict())
        self.model.kernel_convolution.operator = operator = fastest_operator(self.device)
        if options.compiled:
            compiled = compiled_activation(self.device)
            for block in self.model.modules():
                if isinstance(block, ConvBlock):
                    block.activation = compiled
        self.model.to(self.device, memory_format=fastest_memory_format(self.device, options.config))
        self.teacher, self.teacher_digest = None, None
        if options.teacher:
            self.teacher_digest = sha256(weights_path(options.teacher, "teacher").read_bytes()).hexdigest()
            self.teacher = load_teacher(options.teacher, options.config).to(self.device)
            self.teacher.kernel_convolution.operator = operator
        self.averaged = deepcopy(self.model)
        # What `_average` averages: of the averaged weights, and of the model.
        self._floats = tuple(
            [tensor for tensor in (*model.parameters(), *model.buffers()) if tensor.is_floating_point()]
            for model in (self.averaged, self.model)
        )
        self.optimiser = options.recipe.optimiser(self.model, torch.bfloat16 if self.amp else torch.float32)
        validation = cache.held_out()
        shares = np.array([options.shares.get(name, 1.0) for name in cache.sets])
        labelled = ~np.isnan(cache.points).all((1, 2))
        measurable = np.isfinite(landmark_errors(cache.points, cache.points))
        self.validation = np.flatnonzero(validation & (shares > 0) & measurable)
        self.validation_shares = shares[self.validation]
        self.chosen = np.flatnonzero(~validation & (shares > 0))
        groups = len(set(cache.groups[labelled & (shares > 0)].tolist()))
        check_faces(int(labelled[self.chosen].sum()), len(self.validation), groups)
        recipe = options.recipe
        self.batches = EpochBatches(self.chosen, shares[self.chosen], recipe.batch_size, options.seed, recipe.repeats)
        self.epochs, self.commit, self.cache_digest = options.epochs, commit(), cache.digest()
        self.epoch, self.best, self.log = 0, float("inf"), []
        # By set, as the model that the run starts from sees them, or the teacher; random weights see nothing.
        self.label_shifts: dict[str, float] = {}
        if goes_on:
            self._restore()
        elif trained := self.model if knows_landmarks else self.teacher:
            self.label_shifts = measured_shifts(cache, trained)
        self.folder.mkdir(parents=True, exist_ok=True)

    @cudnn_benchmark()
    def run(self, time_budget: float | None = None) -> bool:
        """Train to the end of the schedule, or until the time is up.

        Args:
            time_budget: minutes for this call, above 0; it stops before an epoch that would not fit, but does at least
                one.

        Returns:
            Whether the schedule is finished; otherwise run again to go on.

        Raises:
            FloatingPointError: the loss became NaN or infinite; the state after the last whole epoch is kept.
            ValueError: a budget that is not above 0 and finite, or another process that trains in the folder.
        """
        if time_budget is not None and not (time_budget > 0 and isfinite(time_budget)):
            raise ValueError(f"time_budget: expected minutes above 0, got {time_budget:g}")
        with _alone_in(self.folder):
            if self._checkpoint.exists():
                self._restore()  # another run may have ended while this one waited
            return self._run(time_budget)

    def _run(self, time_budget: float | None) -> bool:
        reuse_freed_memory()
        for name in FILES:
            for part in self.folder.glob(f"{name}.*.part"):  # left behind where a run was killed while it wrote
                if time.time() - part.stat().st_mtime > 60:
                    part.unlink()
        self._write_log()
        loader = self._loader()
        try:
            return self._run_epochs(loader, time_budget)
        finally:
            # When Python ends, it waits for workers that are still there, 5 seconds for each where batches are pinned.
            # Matplotlib keeps its callers, and with them the loader, until somebody collects garbage.
            del loader
            gc.collect()

    def _run_epochs(self, loader: DataLoader, time_budget: float | None) -> bool:
        start = time.monotonic()
        if self.epochs is None:
            self.epochs = self._plan(loader, time_budget) if time_budget else self.options.recipe.epochs
            self._save()
        update, slowest = RecordedStep(self._update, self.device), 0.0
        while self.epoch < self.epochs:
            if time_budget and slowest and (time.monotonic() - start + slowest) / 60 > time_budget:
                return False
            began = time.monotonic()
            self._run_epoch(loader, update)
            slowest = max(slowest, time.monotonic() - began)
        return True

    def _loader(self) -> DataLoader:
        options, workers = self.options, self.options.workers
        crops = AugmentedCrops(
            self.cache, options.recipe.augmentation, options.config.input_size, options.seed, self.label_shifts
        )
        # (With a generator of its own it draws nothing from that of the dropout, which would differ in a resumed run.)
        return DataLoader(
            crops, batch_sampler=self.batches, num_workers=workers, persistent_workers=workers > 0,
            pin_memory=self.device.type == "cuda", generator=torch.Generator(),
        )  # fmt: skip

    def _run_epoch(self, loader: DataLoader, update: Callable[[Tensor, Tensor], Tensor]) -> None:
        began = looked = time.monotonic()
        self.batches.epoch = self.epoch
        torch.manual_seed(self.options.seed * 1_000_003 + self.epoch)  # dropout
        self.model.train()
        losses, samples = [], 0
        title = f"epoch {self.epoch + 1}/{self.epochs}"
        total = (self.epochs - self.epoch) * len(self.batches) * self.options.recipe.batch_size
        with tqdm(loader, title, leave=False, unit="batch", mininterval=1, disable=None) as batches:
            for batch, (images, points) in enumerate(batches):
                rate = self._step(update, images, points, self.epoch * len(self.batches) + batch, losses)
                samples += len(images)
                if time.monotonic() - looked >= 1:  # (whoever looks at a loss waits for the GPU)
                    looked = time.monotonic()
                    speed = samples / (looked - began)
                    batches.set_postfix_str(
                        f"{speed:.0f} samples/s, loss {self._finite(losses[-1]):.3f}, best {self.best:.2f} %, "
                        f"{(total - samples) / speed / 60:.0f} min left"
                    )
        loss = self._finite(torch.stack(losses).mean())
        speed = samples / (time.monotonic() - began)
        error = 100 * self.validate()
        self.epoch += 1
        minutes = (self.log[-1]["minutes"] if self.log else 0.0) + (time.monotonic() - began) / 60
        values = (self.epoch, loss, error, rate, speed, minutes)
        self.log.append(dict(zip(COLUMNS, values, strict=True)))
        if error < self.best:
            self.best = error
            save_model(self._best_weights, self.averaged, self.card())
        self._save()
        tqdm.write(f"{title}: loss {loss:.3f}, validation {error:.3f} % (best {self.best:.3f}), {speed:.1f} samples/s")

    def _step(
        self,
        update: Callable[[Tensor, Tensor], Tensor],
        images: Tensor,
        points: Tensor,
        step: int,
        losses: list[Tensor],
    ) -> float:
        recipe = self.options.recipe
        rate = recipe.learning_rate(step, len(self.batches), self.epochs or recipe.epochs)
        set_rate(self.optimiser, rate)
        losses.append(update(images, points))
        self._average(step)
        return rate

    def _update(self, images: Tensor, points: Tensor) -> Tensor:
        """Loss of a batch, and a step of the optimiser."""
        recipe = self.options.recipe
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.amp):
            heatmaps = self.model(images)
        loss = lgcn_loss(heatmaps, points, self.options.config)
        if self.teacher:
            loss = (loss + distillation_loss(heatmaps, self._taught(images))) / 2
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        if recipe.clip_value:
            nn.utils.clip_grad_value_(self.model.parameters(), recipe.clip_value)
        if recipe.clip_norm:
            nn.utils.clip_grad_norm_(self.model.parameters(), recipe.clip_norm)
        self.optimiser.step()
        return loss.detach()

    def _finite(self, loss: Tensor) -> float:
        number = loss.item()
        if not np.isfinite(number):
            raise FloatingPointError(f"loss: expected a finite number, got {number} in epoch {self.epoch + 1}")
        return number

    @torch.no_grad()
    def _taught(self, images: Tensor) -> Tensor:
        """The teacher's heatmaps, in the resolution of the network's."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.amp):
            heatmaps = self.teacher(images).output
        return F.avg_pool2d(heatmaps.float(), self.options.config.stride // self.teacher.config.stride)

    @torch.no_grad()
    def _average(self, step: int) -> None:
        """Exponential moving average; the decay grows with the steps, so that the first weights are soon forgotten."""
        decay = min(self.options.recipe.ema_decay, (1 + step) / (10 + step)) if step else 0.0
        averaged, current = self._floats
        torch._foreach_lerp_(averaged, current, 1 - decay)

    def validate(self) -> float:
        """Mean inter-ocular error of the averaged weights on the validation faces, each set by its share.

        An error counts as at most `LARGEST_ERROR` times the median.
        """
        size = self.options.config.input_size
        crops = AugmentedCrops(self.cache, NONE, size, 0)
        self.averaged.eval()
        errors = []
        for indices in np.array_split(self.validation, -(-len(self.validation) // 32)):
            images, points = zip(*(crops[0, int(index)] for index in indices), strict=True)
            with torch.inference_mode(), torch.autocast(self.device.type, torch.bfloat16, enabled=self.amp):
                heatmaps = self.averaged(torch.stack(images).to(self.device)).output
                heatmaps = readable(heatmaps, self.options.config)
                found, _ = peak_centroids(heatmaps, PEAK_RADIUS / self.options.config.stride)
            labelled = to_heatmap(torch.cat(points), self.options.config.stride).numpy()
            errors.append(landmark_errors(found.cpu().numpy(), labelled))
        errors = np.concatenate(errors)
        errors = errors.clip(max=LARGEST_ERROR * np.median(errors))
        return float(np.average(errors, weights=self.validation_shares))

    def card(self) -> dict:
        """What a model card needs to know of this run."""
        counts = {str(name): int((self.cache.sets == name).sum()) for name in np.unique(self.cache.sets)}
        mean = mean_shape(self.cache.points[self.chosen], self.cache.boxes[self.chosen])
        return {
            "recipe": asdict(self.options.recipe),
            "epochs": self.epochs,
            "epoch": self.epoch,
            "init": str(self.options.init) if self.options.init else None,
            "teacher": str(self.options.teacher) if self.options.teacher else None,
            "seed": self.options.seed,
            "data": counts,
            "shares": self.options.shares,
            "label_shifts": self.label_shifts,
            "validation_faces": len(self.validation),
            "validation_error_percent": self.best,
            "commit": self.commit,
            "command": " ".join(["lgcn-fast", *sys.argv[1:]]),
            "torch": torch.__version__,
            "bf16": self.amp,
            "mean_shape": None if mean is None else mean.round(5).tolist(),
        }

    def _plan(self, loader: DataLoader, time_budget: float) -> int:
        """Number of epochs that fit the budget, from the time of a few steps on a throw-away copy of the state."""
        state = self._state()
        times, losses, update = [], [], RecordedStep(self._update, self.device)
        self.model.train()
        iterator = iter(loader)
        for step in range(min(PLAN_STEPS, len(self.batches))):
            began = time.monotonic()
            images, points = next(iterator)
            self._step(update, images, points, step, losses)
            self._finite(losses[-1])
            times.append(time.monotonic() - began)
        self._load_state(state)
        seconds = float(np.median(times[len(times) // 3 :])) * len(self.batches)
        began = time.monotonic()
        self.validate()
        draw_log([dict.fromkeys(COLUMNS, 1.0)])  # (which takes longest of what `_save` does)
        return max(int(time_budget * 60 * 0.95 / (seconds + time.monotonic() - began)), 1)

    def _state(self) -> dict[str, Tensor]:
        state = {f"model.{name}": t for name, t in self.model.state_dict().items()}
        state |= {f"averaged.{name}": t for name, t in self.averaged.state_dict().items()}
        for index, slots in self.optimiser.state_dict()["state"].items():
            state |= {f"optimiser.{index}.{slot}": t for slot, t in slots.items() if t is not None}
        return {name: tensor.detach().cpu().clone() for name, tensor in state.items()}

    def _load_state(self, state: dict[str, Tensor]) -> None:
        parts: dict[str, dict] = {"model": {}, "averaged": {}, "optimiser": {}}
        for name, tensor in state.items():
            part, rest = name.split(".", 1)
            parts[part][rest] = tensor
        self.model.load_state_dict(parts["model"], strict=True)
        self.averaged.load_state_dict(parts["averaged"], strict=True)
        slots: dict[int, dict[str, Tensor]] = {}
        for name, tensor in parts["optimiser"].items():
            index, slot = name.split(".")
            slots.setdefault(int(index), {})[slot] = tensor
        groups = self.optimiser.state_dict()["param_groups"]
        self.optimiser.load_state_dict({"state": slots, "param_groups": groups})
        for parameter, state in self.optimiser.state.items():
            # As the parameters lie in memory: in the file they are contiguous.
            state |= {
                slot: torch.empty_like(parameter).copy_(tensor)
                for slot, tensor in state.items()
                if tensor.shape == parameter.shape
            }

    def _save(self) -> None:
        progress = {
            "epoch": self.epoch,
            "epochs": self.epochs,
            "best": self.best,
            "log": self.log,
            "label_shifts": self.label_shifts,
            "cache": self.cache_digest,
            "teacher": self.teacher_digest,
        }
        metadata = {"options": json.dumps(self._identity()), "progress": json.dumps(progress)}
        save_tensors(self._checkpoint, self._state(), metadata)
        self._write_log()

    def _write_log(self) -> None:
        if self.log:
            write_log(self.folder / "log.csv", self.log)
            write_whole(self.folder / "curve.png", draw_log(self.log))

    def _restore(self) -> None:
        path = self._checkpoint
        state, metadata = load_tensors(path)
        asked, found = self._identity(), json.loads(metadata.get("options", "{}"))
        if found.keys() != asked.keys():
            raise ValueError(f"{path}: expected a run of this version, got one of another; use another folder")
        other = [name for name, value in asked.items() if found[name] != value]
        if other:
            expected, got = (", ".join(f"{name}={run[name]}" for name in other) for run in (asked, found))
            raise ValueError(f"{path}: expected a run with {expected}, got one with {got}; use another folder")
        progress = json.loads(metadata["progress"])
        for name, what, digest in (
            ("cache", "crop cache", self.cache_digest),
            ("teacher", "teacher", self.teacher_digest),
        ):
            if progress.get(name) != digest:
                raise ValueError(
                    f"{path}: expected the {what} that the run began with, got another; use another folder"
                )
        self._load_state(state)
        if self.options.epochs not in (None, progress["epochs"]):
            raise ValueError(f"{path}: expected a run of {self.options.epochs} epochs, got {progress['epochs']}")
        self.epoch, self.epochs, self.best, self.log = (progress[k] for k in ("epoch", "epochs", "best", "log"))
        self.label_shifts = progress["label_shifts"]

    def _identity(self) -> dict[str, Any]:
        """What must stay as it is while a run goes on, as JSON has it."""
        options = self.options
        identity = {
            **asdict(options.config),
            **{f"recipe.{name}": value for name, value in asdict(options.recipe).items()},
            "init": str(options.init),
            "teacher": str(options.teacher),
            "seed": options.seed,
            "shares": options.shares,
            "amp": options.amp,
            "faces": len(self.cache),
        }
        return json.loads(json.dumps(identity))


@contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Raises ValueError where another run trains in a folder: they would mix."""
    if fcntl is None:
        yield
        return
    descriptor, patience = os.open(folder, os.O_RDONLY), time.monotonic() + PATIENCE
    try:
        while not _locked(descriptor):
            if time.monotonic() > patience:
                got = "one that another trains in"
                raise ValueError(f"{folder}: expected a folder for this run alone, got {got}")
            time.sleep(0.1)
        try:
            yield
        finally:  # for the workers, too, which have the descriptor and may live on
            with suppress(OSError):
                fcntl.flock(descriptor, fcntl.LOCK_UN)
    finally:
        os.close(descriptor)


def _locked(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        pass
    return True


def fastest_operator(device: torch.device) -> Callable[..., Tensor]:
    """The kernel convolution to train with."""
    return gaussian_sum_native if device.type == "cpu" else gaussian_sum_banded


def compiled_activation(device: torch.device) -> Callable[..., Tensor]:
    """`activated`, compiled for the shapes that come.

    Raises:
        ValueError: there is nothing to compile it with.
    """
    compiled, norm = torch.compile(activated, dynamic=False), ScaledBatchNorm2d(1, 1.0).to(device)
    try:
        compiled(torch.zeros(2, 1, 2, 2, device=device), norm, 0.0)
    except RuntimeError as error:  # of PyTorch's own kinds
        reason = str(error).splitlines()[0]
        raise ValueError(f"compiled: expected what torch.compile needs, got {reason}") from None
    return compiled


def fastest_memory_format(device: torch.device, config: LGCNConfig) -> torch.memory_format:
    """The order of axes to train with.

    Not channels-last for dilated convolutions on a CPU: for the gradient of their filters in bf16 PyTorch 2.13 (oneDNN)
    reads beyond its buffers if the channels are no multiple of 16. Results are wrong or NaN, or the process crashes.
    """
    dilated = config.dilation > 1 and device.type == "cpu"
    return torch.contiguous_format if dilated else torch.channels_last


def commit() -> str | None:
    """The project's git commit, where this is a checkout."""
    root = Path(__file__).parents[1]
    if not (root / ".git").exists():  # a package that is installed somewhere below another project's repository
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12"]
    # (Where git runs a program, these say which repository is meant.)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def reuse_freed_memory() -> None:
    """Let glibc keep freed memory: giving it back and taking it again costs half of a CPU training step."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        m_trim_threshold, m_mmap_max = -1, -4
        libc.mallopt(m_mmap_max, 0)
        libc.mallopt(m_trim_threshold, 2**31 - 1)
