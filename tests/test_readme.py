"""The Python of the README, block after block in one session, as a new user would try it."""

import re
import shutil

import numpy as np
from conftest import ROOT

from lgcn_fast.images import read_image
from lgcn_fast.video import VideoWriter


def test_blocks_run(tmp_path, demo_picture, monkeypatch):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.S)
    blocks = [block for block in blocks if "cuda" not in block]
    assert len(blocks) == 4
    (tmp_path / "lgcn_fast").mkdir()
    shutil.copy(demo_picture, tmp_path / "lgcn_fast")
    with VideoWriter(tmp_path / "clip.mp4", 25) as writer:
        for _ in range(3):
            writer.write(read_image(demo_picture, color=True))
    monkeypatch.chdir(tmp_path)
    session = {}
    for block in blocks:
        exec(block, session)
    assert session["landmarks"].points.shape == (1, 68, 2)
    assert len(session["upright"]) == 1
    assert 0.1 < session["opening"][0] < 0.6
    assert (tmp_path / "faces.png").is_file()
    assert (tmp_path / "drawn.mp4").is_file()
    assert np.isfinite(session["faces"].points).all()
