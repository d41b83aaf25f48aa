"""torchdata's ``StatefulDataLoader`` asks the dataset in each worker process for its state, and goes on by that."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
from dataset_help import Options, dataset_of, flat, make_large, same, slots
from torchdata.stateful_dataloader import StatefulDataLoader

from retrotool import RetroDataset

pytestmark = [
    pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning"),  # on a machine of few cores
    pytest.mark.filterwarnings("ignore:'set_vital' is deprecated:UserWarning"),  # torchdata's own
]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory, tiny_encoder: Path) -> Path:
    """Four blocks in three parts. Not to be changed."""
    return make_large(tmp_path_factory.mktemp("large") / "store", tiny_encoder, [9000, 400, 333])


@pytest.mark.parametrize(
    ("workers", "batch_size", "persistent"),
    [
        (0, 3, False),
        (2, 3, False),
        (2, None, True),
        *(
            pytest.param(*case, marks=pytest.mark.nightly)
            for case in ((2, 3, True), (2, None, False), (3, 1, False), (3, 1, True))
        ),
    ],
)
def test_a_stateful_loader_goes_on_where_it_was(
    store: Path, workers: int, batch_size: int | None, persistent: bool
) -> None:
    how: Options = {"batch_size": 2 if batch_size is None else None, "num_workers": workers}
    how["persistent_workers"] = persistent

    def loader() -> tuple[RetroDataset, StatefulDataLoader]:
        dataset = dataset_of(store, rank=0, world_size=2, batch_size=batch_size)
        return dataset, StatefulDataLoader(dataset, **how)

    dataset, whole_loader = loader()
    dataset.set_epoch(2)
    whole = list(whole_loader)
    for stop in (1, 2, 4):
        dataset, one = loader()
        dataset.set_epoch(2)
        reading = iter(one)
        read = [next(reading) for _ in range(stop)]
        state = copy.deepcopy(one.state_dict())
        del reading
        dataset, other = loader()
        dataset.set_epoch(2)
        other.load_state_dict(state)
        assert same(read + list(other), whole)
        dataset.set_epoch(3)
        after = list(other)
        assert len(flat(after)) == len(flat(whole))
        assert slots(flat(after)) != slots(flat(whole))
