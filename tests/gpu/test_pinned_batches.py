"""What only a CUDA device shows of the loaders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from nanokimi.config import TrainConfig
from nanokimi.data.loader import LoaderOptions
from nanokimi.data.sources import open_corpus


@pytest.mark.gpu
@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("settings", [{}, {"dataset": "localstreaming"}, {"mix": "{path}=1,localstreaming:{path}=2"}])
def test_batches_are_page_locked_and_reach_the_device(
    tmp_path: Path, settings: dict[str, Any], num_workers: int
) -> None:
    path = tmp_path / "text.txt"
    path.write_text("some words of a text\n" * 2000)
    values = {name: value.format(path=path) for name, value in settings.items()}
    corpus = open_corpus(TrainConfig(data_path=str(path), **values), "byte", log=lambda line: None)
    batch = next(iter(corpus.train.loader(LoaderOptions(64, 4, 0, num_workers=num_workers, pin_memory=True))))
    there = batch.to(torch.device("cuda"))
    for here, copy in ((batch.tokens, there.tokens), (batch.labels, there.labels)):
        assert here.is_pinned()
        assert copy.is_cuda
        assert copy.tolist() == here.tolist()
