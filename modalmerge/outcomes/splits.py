"""Which cells are results: those of the splits that are reported, not of those that settings are chosen on."""

from modalmerge.records import Cell

# Of public sets whose reported split is not called test. VQAv2's test answers are not public: the part of its
# validation images that nothing is trained on stands in for them.
REPORTED = {"vqav2": "rest_val", "nlvr2": "test1", "ade20k": "validation", "imagenet": "val"}


def is_reported(cell: Cell) -> bool:
    """Say whether a cell is of the split that its data set is reported on."""
    return cell.split == REPORTED.get(cell.dataset, "test")
