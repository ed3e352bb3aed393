"""The log of a training: a CSV file and a picture, one row and one point an epoch."""

import csv
from io import BytesIO, StringIO
from pathlib import Path

from .files import write_whole

COLUMNS = ("epoch", "loss", "validation_error", "learning_rate", "samples_per_s", "minutes")


def write_log(path: Path, log: list[dict[str, float]]) -> None:
    """Write the log of all epochs so far as CSV."""
    text = StringIO()
    writer = csv.DictWriter(text, COLUMNS)
    writer.writeheader()
    writer.writerows({name: f"{value:.6g}" for name, value in row.items()} for row in log)
    write_whole(path, text.getvalue().encode())


def draw_log(log: list[dict[str, float]]) -> bytes:
    """Draw loss and validation error over the epochs: a PNG."""
    import matplotlib.figure  # here, as in `figures`: it takes half a second, and needs a folder to write to

    figure = matplotlib.figure.Figure(figsize=(6, 4), layout="constrained")
    left = figure.subplots()
    right = left.twinx()
    epochs = [row["epoch"] for row in log]
    left.semilogy(epochs, [row["loss"] for row in log], color="tab:gray", label="training loss")
    right.semilogy(epochs, [row["validation_error"] for row in log], color="tab:blue", label="validation error [%]")
    left.set(xlabel="epoch", ylabel="training loss")
    right.set(ylabel="validation error [%]")
    figure.legend(loc="outside upper center", ncols=2)
    picture = BytesIO()
    figure.savefig(picture, dpi=120, format="png")
    return picture.getvalue()
