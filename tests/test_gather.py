"""One run of several machines' runs."""

import dataclasses
import json
import shutil

import micro
import pytest
import quick_study
from quick_study import marked, weights

from modalmerge.records import Cell, read_lines, to_json
from modalmerge.study.gather import gather
from modalmerge.study.plan import plan
from modalmerge.study.reading import to_dict

TWO = {"random_seeds": "[0, 1]", "initialisations": "random,images"}


@pytest.fixture
def quick(monkeypatch):
    return quick_study.install(monkeypatch)


@pytest.fixture
def machines(quick, tmp_path):
    """Each piece of a study run by itself, and all of it run in one place."""
    runs = []
    for piece in ("1/images", "0/random", "0/images", "1/random"):
        runs.append(tmp_path / piece.replace("/", "-"))
        quick.run(runs[-1], **TWO, only=(piece,))
    quick.run(tmp_path / "whole", **TWO)
    return runs


def content(run):
    return {name: (run / name).read_bytes() for name in micro.files(run)}


def edit_cell(run, cell_id, **changes):
    """Change a cell in the file and in its job's folder."""
    path = run / "cells.jsonl"
    cells = [dataclasses.replace(c, **changes) if c.id == cell_id else c for c in read_lines(path, Cell)]
    path.write_text("".join(f"{to_json(cell)}\n" for cell in cells))
    path = run / "jobs" / cell_id / "cells.json"
    path.write_text(json.dumps([{**values, **changes} for values in json.loads(path.read_text())]))


def test_pieces_of_several_machines_give_the_file_of_one(machines, quick, call, tmp_path):
    before = [content(run) for run in machines]
    code, out, err = call("gather", *machines, "-o", tmp_path / "made")
    assert code == 0, err
    num_jobs = len(plan(micro.preset(**TWO)))
    assert f"{num_jobs} cells and {num_jobs} of {num_jobs} jobs in {tmp_path / 'made'}; `modalmerge report" in out
    whole, made = tmp_path / "whole", tmp_path / "made"
    assert (made / "cells.jsonl").read_bytes() == (whole / "cells.jsonl").read_bytes()
    assert (made / "preset.json").read_bytes() == (whole / "preset.json").read_bytes()
    assert micro.files(made) >= {f"jobs/{job.id}/cells.json" for job in plan(micro.preset(**TWO))}
    assert (weights(made), marked(made)) == (set(), weights(whole))
    assert [content(run) for run in machines] == before, "inputs are only read"
    code, _, err = call("report", made, "-o", tmp_path / "page.html")
    assert code == 0, err
    quick.run(made, **TWO)
    assert not quick.began


def test_a_study_goes_on_in_a_gathered_run(machines, quick, tmp_path):
    made = tmp_path / "made"
    gathered = gather(machines[:2], made)
    jobs = plan(micro.preset(**TWO))
    assert gathered.num_jobs == gathered.num_cells < gathered.num_planned == len(jobs)
    lacking = {job.id for job in jobs} - {path.name for path in (made / "jobs").iterdir()}
    quick.run(made, **TWO)
    assert lacking <= set(quick.began)
    assert set(quick.began) - lacking <= set(weights(tmp_path / "whole")), "what lost its weights is trained again"
    assert sorted((made / "cells.jsonl").read_text().splitlines()) == sorted(
        (tmp_path / "whole" / "cells.jsonl").read_text().splitlines()
    )


def test_weights_are_copied_where_that_is_asked_for(machines, quick, tmp_path):
    quick.run(machines[0], **TWO, only=("1/images",), keeps_weights="false")
    gone = marked(machines[0])
    half = machines[0] / "jobs" / min(gone) / "model"
    half.mkdir()
    (half / "model.safetensors").write_text("half")
    gather(machines, tmp_path / "made", with_weights=True)
    assert gone and marked(tmp_path / "made") == gone, "the first run that has a job wins"
    assert weights(tmp_path / "made") == weights(tmp_path / "whole") - gone


def test_what_a_study_can_get_more_of_is_united(quick, tmp_path):
    quick.run(tmp_path / "a", random_seeds="[3]", methods="ties")
    quick.run(tmp_path / "b", random_seeds="[0, 3]", methods="regmean,ties", gpus_per_job="0.5")
    gather([tmp_path / "a", tmp_path / "b"], tmp_path / "made")
    preset = json.loads((tmp_path / "made" / "preset.json").read_text())
    assert (preset["random_seeds"], preset["methods"]) == ([3, 0], ["ties", "regmean"])
    assert preset == to_dict(micro.preset(random_seeds="[3, 0]", methods="ties,regmean"))
    cells = read_lines(tmp_path / "made" / "cells.jsonl", Cell)
    assert len({cell.id for cell in cells}) == len(cells) and {cell.random_seed for cell in cells} == {0, 3}


def test_another_study_is_refused_with_what_differs(quick, tmp_path):
    quick.run(tmp_path / "a")
    quick.run(tmp_path / "b", pretraining__learning_rate="0.5")
    there = micro.preset().pretraining.learning_rate
    with pytest.raises(ValueError, match=r"b and .*a hold different studies \(pretraining.learning_rate: there 0.5, "):
        gather([tmp_path / "a", tmp_path / "b"], tmp_path / "made")
    assert there != 0.5 and not (tmp_path / "made").exists()


def test_a_cell_with_another_number_is_refused_with_both(quick, call, tmp_path):
    quick.run(tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    edit_cell(tmp_path / "b", "0-seed", commit="0123", command="modalmerge study elsewhere")
    gather([tmp_path / "a", tmp_path / "b"], tmp_path / "made")
    assert (tmp_path / "made" / "cells.jsonl").read_bytes() == (tmp_path / "a" / "cells.jsonl").read_bytes()
    edit_cell(tmp_path / "b", "0-seed", value=2.5)
    code, _, err = call("gather", tmp_path / "a", tmp_path / "b", "-o", tmp_path / "other")
    a, b = tmp_path / "a", tmp_path / "b"
    assert code == 1 and f"cell 0-seed is not the same in {a} and {b}: value 1.0 and 2.5; gather runs whose" in err
    assert not (tmp_path / "other").exists()


def test_cells_that_wait_in_the_folders_of_a_killed_study_are_taken(quick, tmp_path):
    quick.run(tmp_path / "a")
    whole = (tmp_path / "a" / "cells.jsonl").read_bytes()
    (tmp_path / "a" / "cells.jsonl").write_bytes(whole[: len(whole) // 2])
    gather([tmp_path / "a"], tmp_path / "made")
    assert (tmp_path / "made" / "cells.jsonl").read_bytes() == whole


def test_what_is_no_study_is_refused(quick, call, tmp_path):
    quick.run(tmp_path / "a")
    code, _, err = call("gather", tmp_path / "a", tmp_path / "none", "-o", tmp_path / "made")
    assert code == 1 and f"{tmp_path / 'none'} holds no preset.json: it is no study folder" in err
    code, _, err = call("gather", tmp_path / "a", "-o", tmp_path / "a")
    assert code == 1 and f"{tmp_path / 'a'} exists and is not overwritten" in err
    (tmp_path / "a" / "preset.json").write_text('{"name": "paper"}')
    code, _, err = call("gather", tmp_path / "a", "-o", tmp_path / "made")
    assert code == 1 and "holds no preset of a study that can be gathered: preset lacks size" in err
