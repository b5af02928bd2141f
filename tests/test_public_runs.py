"""Every stage and task on public data in the form of its official files: prepare, check, train, evaluate, submit."""

import contextlib
import dataclasses
import json
import shutil
import tarfile

import pytest
import torch
from public_files import WRITERS, write_cc3m_shards
from transformers import BeitConfig, BeitModel

from modalmerge.cli import main
from modalmerge.data.prepare import check, prepare
from modalmerge.data.text import SPECIALS
from modalmerge.data.views import on_device
from modalmerge.evaluate import evaluate
from modalmerge.model import load
from modalmerge.records import Cell, read_lines
from modalmerge.study import paper as studied
from modalmerge.study import public
from modalmerge.study.paper import load_paper, look_at_paper, paper, run_paper, stages
from modalmerge.study.public import evaluate_public, find_set, finetune_recipe, look, pretrain_recipe
from modalmerge.study.recipes import RECIPES, SPLITS, load_recipe
from modalmerge.tasks import TASKS

torch.set_num_threads(1)

WORDS = ["a", "red", "blue", "dog", "bus", "man", "on", "under", "the", "tree", "street", "two", "small", "k", "##ite"]
# What makes a recipe end in a moment; the sizes are the model's that pre-training makes.
QUICK = {
    "training.num_steps": "2",
    "training.batch_size": "4",
    "training.micro_batch_size": "2",
    "training.warmup_steps": "0",
    "training.precision": "32-true",
    "training.accelerator": "cpu",
    "training.checkpoint_steps": "1",
    "training.num_workers": "0",
    "max_text_length": "12",
}
SMALL = {
    "size": "nano",
    "image_size": "32",
    "model.hidden_size": "32",
    "model.num_hidden_layers": "4",
    "model.num_attention_heads": "2",
    "model.patch_size": "16",
    "model.fusion_start": "3",
}
IMAGE_SIZES = {"segmentation": "64"}  # UPerNet halves it; others have 48


def recipe(name, **changes):
    """A recipe made small; keys of `changes` have `__` for a dot."""
    made = RECIPES[name]()
    own = SMALL if made.is_pretraining else {"image_size": IMAGE_SIZES.get(made.task, "48")}
    return load_recipe(name, {**QUICK, **own, **{key.replace("__", "."): value for key, value in changes.items()}})


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """All nine sets, prepared; by name in one folder."""
    root, out = tmp_path_factory.mktemp("files"), tmp_path_factory.mktemp("data")
    for name in SPLITS:
        prepare(name, WRITERS[name](root / name), out / name)
    return out


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("words") / "vocab.txt"
    path.write_text("\n".join([*SPECIALS, ".", "?", *WORDS]) + "\n")
    return str(path)


@pytest.fixture(scope="module")
def beit(tmp_path_factory):
    """BEiT's weights with the names of transformers, as small as the model."""
    torch.manual_seed(0)
    config = BeitConfig(
        hidden_size=32, num_hidden_layers=4, num_attention_heads=2, intermediate_size=128, image_size=32,
        use_relative_position_bias=True, use_mask_token=False,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("beit")
    BeitModel(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def pretrained(data, tokenizer, beit, tmp_path_factory):
    """What the stage before fine-tuning leaves: the seed, and experts from it."""
    folder = tmp_path_factory.mktemp("runs")
    seed = pretrain_recipe(recipe("seed"), folder / "seed", data=data, tokenizer=tokenizer, init=beit)
    experts = pretrain_recipe(
        recipe("experts"), folder / "experts", data=data, seed=folder / "seed" / "model", architecture="ffn"
    )
    return folder, seed, experts


def run(capsys, *words):
    """Call the command line; returns its exit code, what it said, and what it complained about."""
    import sys

    sys.argv = ["modalmerge", *map(str, words)]
    try:
        main()
        code = 0
    except SystemExit as end:
        code = end.code or 0
    said = capsys.readouterr()
    return code, said.out, said.err


def test_the_files_become_prepared_sets_without_problems(data):
    assert {path.name for path in data.iterdir()} == set(SPLITS)
    for folder in data.iterdir():
        known = [problem for problem in check(folder) if "known" not in str(problem)]  # they are too few, of course
        assert known == [], folder.name


# -- pre-training ---------------------------------------------------------------------------------------------------


def test_pretraining_goes_from_beit_to_a_seed_to_experts(pretrained):
    folder, seed, experts = pretrained
    for done in (seed, experts):
        assert done["steps"] == 2 and {"contrastive", "matching", "masked_language", "loss"} <= set(done["losses"])
        assert 0 <= done["metrics"]["recall_mean"] <= 100
    model, words = load(folder / "experts" / "model")
    assert model.config.experts == [["ffn"]] * 4 and model.config.image_size == 32
    assert words.tokenize("kite") == ["k", "##ite"], "the tokenizer goes with the model"


def test_a_finished_run_is_kept(pretrained, data, monkeypatch):
    folder, _, experts = pretrained
    monkeypatch.setattr(public, "pretrain", None)
    settings = dict(data=data, seed=folder / "seed" / "model", architecture="ffn")
    told = dataclasses.replace(recipe("experts"), source="other words", hardware="another", expected="published by all")
    for same in (recipe("experts", training__num_workers="3"), told):
        assert pretrain_recipe(same, folder / "experts", **settings) == experts
    with pytest.raises(ValueError, match="holds a run with other settings"):
        pretrain_recipe(recipe("experts", training__learning_rate="1e-3"), folder / "experts", **settings)


def test_an_interrupted_run_goes_on_to_the_same_model(pretrained, data, tmp_path):
    folder, _, experts = pretrained
    settings = dict(data=data, seed=folder / "seed" / "model", architecture="ffn")

    def stop(step, num_steps, losses):
        raise InterruptedError

    def stop_late(step, num_steps, losses):
        if step == 2:
            raise InterruptedError

    for report in (stop, stop_late):
        with pytest.raises(InterruptedError):
            pretrain_recipe(recipe("experts"), tmp_path / "experts", report=report, **settings)
    assert (tmp_path / "experts.partial" / "last.ckpt").exists() and not (tmp_path / "experts").exists()
    again = pretrain_recipe(recipe("experts", training__num_workers="2"), tmp_path / "experts", **settings)
    assert {**again, "checkpoint": ""} == {**experts, "checkpoint": ""}
    first, second = (load(place / "experts" / "model")[0].state_dict() for place in (folder, tmp_path))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.fixture
def sharded(data, tmp_path, monkeypatch):
    """The prepared sets, but CC3M as shards."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = tmp_path / "data"
    folder.mkdir()
    for path in data.iterdir():
        if path.name != "cc3m":
            (folder / path.name).symlink_to(path)
    write_cc3m_shards(folder / "cc3m")
    return folder


def test_shards_are_read_beside_prepared_sets(pretrained, sharded, tmp_path, monkeypatch):
    told = []

    @contextlib.contextmanager
    def progress(split):
        yield lambda done, total: told.append((split, done, total))

    settings = dict(data=sharded, seed=pretrained[0] / "seed" / "model", architecture="ffn", progress=progress)
    made = recipe("experts", training__num_workers="2")
    done = pretrain_recipe(made, tmp_path / "run", **settings)
    assert done["steps"] == 2 and told == [("train", 1, 2), ("train", 2, 2)], "the shards are listed once"
    monkeypatch.setattr(public, "pretrain", None)
    assert pretrain_recipe(made, tmp_path / "run", **settings) == done
    shutil.copy(sharded / "cc3m" / "00001.tar", sharded / "cc3m" / "00002.tar")
    with pytest.raises(ValueError, match="holds a run with other settings"):
        pretrain_recipe(made, tmp_path / "run", **settings)


def test_what_is_there_of_shards_is_shown(data, sharded, beit, tokenizer, pretrained):
    outlook = look(recipe("seed"), data=sharded, init=beit, tokenizer=tokenizer)
    assert outlook.missing == () and outlook.folders["cc3m"] == sharded / "cc3m"
    assert outlook.samples["cc3m"] == {"train": 5} and not any(note.startswith("cc3m") for note in outlook.notes)
    with tarfile.open(sharded / "cc3m" / "00001.tar", "a") as tar:
        tar.addfile(tarfile.TarInfo("000010009.txt"))
    (note,) = [note for note in look(recipe("seed"), data=sharded).as_dict()["notes"] if note.startswith("cc3m")]
    assert note.startswith("cc3m: train: 1 samples or captions were left out, such as 00001.tar: 000010009: must have")
    (sharded / "cc3m" / "00000.tar").write_bytes(b"cut")
    told = "\n".join(look(recipe("seed"), data=sharded).missing)
    assert "1 of 2 shards in" in told and "cannot be read to their end, the first: 00000.tar" in told
    shards = sharded / "coco"
    shards.unlink()
    write_cc3m_shards(shards / "train")
    told = look(recipe("seed"), data=shards).missing[0]
    assert told == "split val of coco: only train are there; put its shards into a folder val beside"
    _, split, results = evaluate_public(pretrained[0] / "seed" / "model", "retrieval", shards, split="train")
    assert split == "train" and results[0].metric == TASKS["retrieval"].main_metric


def test_a_run_that_fails_in_measuring_is_trained_once(pretrained, data, tmp_path, monkeypatch):
    folder, _, experts = pretrained
    settings = dict(data=data, seed=folder / "seed" / "model", architecture="ffn")

    def fail(*_):
        raise MemoryError

    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr(public, "evaluate", fail)
        pretrain_recipe(recipe("experts"), tmp_path / "experts", **settings)
    monkeypatch.setattr(public, "pretrain", None)
    again = pretrain_recipe(recipe("experts"), tmp_path / "experts", **settings)
    assert {**again, "checkpoint": ""} == {**experts, "checkpoint": ""}
    first, second = (load(place / "experts" / "model")[0].state_dict() for place in (folder, tmp_path))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert (folder / "experts" / "curve.json").read_text() == (tmp_path / "experts" / "curve.json").read_text()
    assert not (tmp_path / "experts.partial").exists()


def test_half_precision_without_an_accelerator_is_told(data, beit, tokenizer):
    outlook = look(recipe("seed", training__precision="16-mixed"), data=data, init=beit, tokenizer=tokenizer)
    with pytest.raises(ValueError, match="no 16-mixed on a CPU; --set training.precision=bf16-mixed or 32-true"):
        outlook.refuse()


def test_a_seed_of_another_size_is_refused(pretrained, data, tmp_path):
    with pytest.raises(ValueError, match=r"does not fit the preset: image_size 32 \(the preset: 48\)"):
        pretrain_recipe(
            recipe("experts", image_size="48"), tmp_path / "run", data=data, seed=pretrained[0] / "seed" / "model"
        )


# -- every task -----------------------------------------------------------------------------------------------------

FINETUNED = [name for name, make in RECIPES.items() if not make().is_pretraining]


@pytest.mark.parametrize("name", FINETUNED)
def test_every_task_is_trained_measured_and_submitted(name, pretrained, data, tmp_path):
    made = recipe(name)
    done = finetune_recipe(made, pretrained[0] / "experts" / "model", tmp_path / "run", data=data)
    main_metric = TASKS[made.task].main_metric
    assert done["steps"] == 2 and main_metric in done["metrics"]
    source = tmp_path / "run" / "model"
    model, _ = load(source)
    assert model.config.image_size == made.image_size and set(TASKS[made.task].heads) == set(model.heads)
    folder, prepared = find_set(data, made.dataset)
    if made.task in ("vqa", "segmentation", "classification"):
        assert tuple(model.config.answers or model.config.classes) == prepared.classes
    submission = tmp_path / "answers" if TASKS[made.task].submit else None
    found, split, results = evaluate_public(source, made.task, folder, submission=submission)
    assert (found, split) == (made.dataset, made.data[made.dataset].report)
    if made.task == "vqa":
        assert results == [], "the answers to the test questions are not public"
        ids = sorted(entry["question_id"] for entry in json.loads(submission.read_text()))
        assert len(ids) == prepared.splits["test"].num_samples == len(set(ids))
    else:
        assert results[0].metric == main_metric
    assert submission is None or submission.exists()


def test_a_split_without_labels_needs_a_file(pretrained, data, tmp_path):
    done = finetune_recipe(recipe("vqav2-480"), pretrained[0] / "seed" / "model", tmp_path / "run", data=data)
    with pytest.raises(ValueError, match="split test of vqav2 has no labels; give --submission FILE"):
        evaluate_public(tmp_path / "run" / "model", "vqa", data)
    _, split, results = evaluate_public(tmp_path / "run" / "model", "vqa", data, split="rest_val")
    assert split == "rest_val" and {r.metric: r.value for r in results} == done["metrics"]


def test_a_model_is_measured_on_inputs_as_it_was_trained_on(pretrained, data, tmp_path, monkeypatch):
    made = recipe("coco-384", max_text_length="6", inputs__normalisation="imagenet", inputs__normalise_answers="true")
    seen = []

    def watched(model, task, split):
        seen.append(split.batch(torch.arange(len(split))))
        return evaluate(model, task, split)

    monkeypatch.setattr(public, "evaluate", watched)
    done = finetune_recipe(made, pretrained[0] / "seed" / "model", tmp_path / "run", data=data)
    source = tmp_path / "run" / "model"
    evaluate_public(source, "retrieval", data / "coco", split="val")
    selected, measured = seen
    assert selected.keys() == measured.keys() and selected["input_ids"].shape[1] == 6
    assert all(torch.equal(selected[key], measured[key]) for key in selected)
    path = source / "inputs.json"
    kept = {"max_text_length": 6, "normalisation": "imagenet", "normalise_answers": True}
    assert json.loads(path.read_text()) == kept and done["checkpoint"] == str(source)
    for content, told in (({"normalisation": "imagnet"}, "nearest: 'imagenet'"), ([], "does not say how the model")):
        path.write_text(json.dumps(content))
        with pytest.raises(ValueError, match=f"(?s)inputs.json.*{told}.*remove it for the defaults"):
            evaluate_public(source, "retrieval", data / "coco")


def test_batches_are_moved_once(pretrained, data, monkeypatch):
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: torch.device("cpu"))
    monkeypatch.setattr(public, "on_device", None)  # what measures moves them
    assert evaluate_public(pretrained[0] / "seed" / "model", "retrieval", data / "flickr30k")[2]


def test_samples_that_were_left_out_are_told(data, tmp_path, capsys, monkeypatch):
    shutil.copytree(data / "vqav2", tmp_path / "vqav2")
    path = tmp_path / "vqav2" / "prepared.json"
    content = json.loads(path.read_text())
    content["problems"] = [
        {"split": "test", "what": "number of images: 3, known are 4", "sample": ""},
        {"split": "test", "what": "no such image", "sample": "17"},
        {"split": "train", "what": "no such image", "sample": "18"},
    ]
    content["splits"]["test"]["num_problems"] = 2001  # of which a thousand are listed
    path.write_text(json.dumps(content))
    monkeypatch.setattr(public, "evaluate_public", lambda *_, **__: ("vqav2", "test", []))
    code, out, err = run(
        capsys, "evaluate", "x", "--task", "vqa", "--data", tmp_path, "--submission", tmp_path / "x.json", "--json"
    )
    assert code == 0 and json.loads(out)["left_out"] == 2000
    assert "2000 samples of test were left out when vqav2 was prepared; the file has no answer for them" in err


def test_what_cannot_be_evaluated_is_told(pretrained, data, tmp_path):
    seed = pretrained[0] / "seed" / "model"
    with pytest.raises(
        ValueError, match="holds several sets for task 'retrieval'; give one of them: --data .*/cc3m or"
    ):
        evaluate_public(seed, "retrieval", data)
    with pytest.raises(ValueError, match="task 'retrieval' has no submission file; leave out --submission"):
        evaluate_public(seed, "retrieval", data / "coco", submission=tmp_path / "x")
    (tmp_path / "there.json").touch()
    with pytest.raises(ValueError, match="there.json exists and is not overwritten"):
        evaluate_public(tmp_path / "no model", "vqa", data, submission=tmp_path / "there.json")
    with pytest.raises(ValueError, match="nothing is reported on cc3m; give --split, one of train, val"):
        evaluate_public(seed, "retrieval", data / "cc3m")
    with pytest.raises(ValueError, match="holds no prepared set of questions, which task 'vqa' reads"):
        evaluate_public(seed, "vqa", data / "coco")
    with pytest.raises(ValueError, match="unknown split of coco 'tests'; nearest: 'test'"):
        evaluate_public(seed, "retrieval", data / "coco", split="tests")
    with pytest.raises(ValueError, match="task 'nlvr2' needs the heads"):
        evaluate_public(seed, "nlvr2", data)


def test_another_tokenizer_must_have_as_many_words(pretrained, data, tmp_path):
    path = tmp_path / "vocab.txt"
    path.write_text("\n".join([*SPECIALS, "dog"]) + "\n")
    with pytest.raises(ValueError, match=r"has 22 words, tokenizer .*vocab.txt has 6"):
        evaluate_public(pretrained[0] / "seed" / "model", "retrieval", data / "coco", tokenizer=str(path))


def test_longer_texts_than_the_model_takes_are_told(pretrained, data, tmp_path):
    start = pretrained[0] / "seed" / "model"
    with pytest.raises(ValueError, match="takes texts of 12 tokens, the recipe has 40; --set max_text_length=12 cuts"):
        finetune_recipe(recipe("coco-384", max_text_length="40"), start, tmp_path / "run", data=data)


def test_batches_lie_where_the_model_is(data, tokenizer):
    words = public.load_tokenizer(tokenizer)
    settings = dict(tokenizer=words, max_text_length=12, image_size=32, settings=recipe("vqav2-480").inputs)
    loaded = on_device(public.load_public("vqa", data / "vqav2", ["train"], **settings), torch.device("meta"))
    for batch in (
        loaded.batch(torch.tensor([0])),
        loaded.train_batch(torch.tensor([0, 1]), torch.Generator().manual_seed(0)),
    ):
        assert {value.device.type for value in batch.values() if isinstance(value, torch.Tensor)} == {"meta"}
    assert len(loaded) == len(loaded.num_texts()) and loaded.dataset == "vqav2" and loaded.classes == ("yes", "no", "2")


# -- what is missing ------------------------------------------------------------------------------------------------


def test_what_is_there_decides_the_steps(data, beit, tokenizer, pretrained):
    outlook = look(recipe("seed"), data=data, init=beit, tokenizer=tokenizer)
    assert outlook.missing == () and outlook.estimate.num_steps == 2
    made = recipe("coco-384", epochs="5")
    (told,) = look(made, data=data / "coco", start=beit).missing
    assert "holds a model of type 'beit'; convert it" in told
    outlook = look(made, data=data / "coco", start=pretrained[0] / "seed" / "model")
    of_images = look(recipe("nlvr2-384", inputs__sample="image"), data=data, start=pretrained[0] / "seed" / "model")
    assert of_images.samples["nlvr2"]["train"] == find_set(data, "nlvr2")[1].splits["train"].num_samples
    captions = find_set(data, "coco")[1].splits["train"].num_samples
    assert outlook.samples["coco"]["train"] == captions
    assert outlook.recipe.training.num_steps == outlook.estimate.num_steps == 5 * captions // 4


def test_all_that_is_missing_is_listed(data, tmp_path):
    outlook = look(recipe("seed"), data=tmp_path, init=tmp_path / "beit.pth", tokenizer=str(tmp_path))
    told = "\n".join(outlook.missing)
    for name in ("coco", "visual_genome", "sbu", "cc3m"):
        assert f"`modalmerge data prepare {name} --root FILES -o {tmp_path / name}` makes it from" in told
    assert f"BEiT's weights: {tmp_path / 'beit.pth'} does not exist" in told and "gives no tokenizer" in told
    with pytest.raises(ValueError, match="(?s)seed cannot start; what is missing:\n  data set coco.*data set cc3m"):
        outlook.refuse()
    told = look(recipe("coco-384"), data=None, start=tmp_path / "model").missing
    assert told[0].startswith("data set coco: give --data FOLDER") and "is no model folder" in told[1]
    told = look(recipe("seed"), data=data, tokenizer="nobody/nothing").missing
    assert "give BEiT's as --init FILE, or a seed as --seed FOLDER" in told[0]
    assert "tokenizer nobody/nothing: no such folder, and not in the hub's cache" in told[1]


def test_a_split_that_is_not_prepared_is_told(data, tmp_path):
    shutil.copytree(data / "nlvr2", tmp_path / "nlvr2")
    path = tmp_path / "nlvr2" / "prepared.json"
    content = json.loads(path.read_text())
    dev = content["splits"].pop("dev")
    path.write_text(json.dumps(content))
    (told, *_) = look(recipe("nlvr2-384"), data=tmp_path, start=tmp_path).missing
    assert "split dev of nlvr2: only train, test1" in told and "modalmerge data prepare nlvr2" in told
    content["splits"] = {"train": content["splits"]["train"], "dev": dev}
    path.write_text(json.dumps(content))
    assert not any("nlvr2" in item for item in look(recipe("nlvr2-384"), data=tmp_path, start=tmp_path).missing)
    study = dataclasses.replace(paper(), tasks=("nlvr2-384",))
    _, missing = look_at_paper(study, tmp_path / "run", data=tmp_path, init=None, tokenizer=None)
    assert any(item.startswith("split test1 of nlvr2: only train, dev are there") for item in missing)


# -- the commands ---------------------------------------------------------------------------------------------------


def sets(changes):
    return [word for key, value in changes.items() for word in ("--set", f"{key}={value}")]


def test_the_commands_take_recipes(pretrained, data, beit, tokenizer, tmp_path, capsys):
    words = ["pretrain", "agnostic", "--data", data, "--init", beit, "--tokenizer", tokenizer, "--json"]
    words += sets({**QUICK, **SMALL})
    code, out, _ = run(capsys, *words, "--dry-run")
    shown = json.loads(out)
    assert code == 0 and shown["missing"] == [] and shown["estimate"]["num_steps"] == 2 and shown["output"] is None
    code, out, err = run(capsys, *words, "-o", tmp_path / "agnostic")
    assert code == 0 and json.loads(out)["steps"] == 2, err
    code, out, err = run(
        capsys, "finetune", "flickr30k-384", tmp_path / "agnostic" / "model", "--data", data, "-o", tmp_path / "tuned",
        "--json", *sets({**QUICK, "image_size": "48"}),
    )  # fmt: skip
    assert code == 0, err
    tuned = json.loads(out)
    words = ["evaluate", tuned["checkpoint"], "--task", "retrieval", "--data", data / "flickr30k", "--json"]
    code, out, _ = run(capsys, *words, "--split", "val")
    assert code == 0 and json.loads(out)["metrics"] == tuned["metrics"]
    code, out, _ = run(capsys, *words)
    assert json.loads(out)["data"] == "flickr30k" and json.loads(out)["split"] == "test"


@pytest.mark.parametrize(
    "words, message",
    [
        ("pretrain coco-384 -o x", "recipe coco-384 is for `modalmerge finetune coco-384`"),
        ("finetune seed x -o x", "recipe seed is for `modalmerge pretrain seed`"),
        ("finetune coco-384 x --task vqa -o x", "recipe coco-384 is for task 'retrieval', got 'vqa'"),
        ("pretrain tiny -o x --init y", "--init: for recipes on public data only"),
        ("finetune tiny x --task vqa -o x --data y", "--data: for recipes on public data only"),
        ("evaluate x --task vqa --submission y", "--submission: for recipes on public data only"),
        ("evaluate x --task vqa --data postcards", "postcards has no task 'vqa'; it has retrieval"),
        ("pretrain seeed -o x", "unknown preset 'seeed'; nearest: 'seed'"),
        ("pretrain seed -o x --set training.rate=1", "unknown setting 'training.rate'"),
        ("study tiny --data x", "--data, --init and --tokenizer are for preset paper"),
        ("study paper --workers 2", "--workers: preset paper runs one stage at a time"),
        ("evaluate x --task vqa --data . --config tiny", "--config and --set are for the embedded world"),
        ("evaluate x --task vqa --data . --set batch=1", "--config and --set are for the embedded world"),
        ("study paper --set recipes.coco-384.training.rate=1", "unknown setting 'recipes.coco-384.training.rate'"),
        ("study paper -o x", "the study cannot start; what is missing:\n  BEiT's weights: give --init FILE"),
    ],
)
def test_a_wrong_command_is_told(words, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, _, err = run(capsys, *words.split())
    assert code == 1 and message in err
    assert list(tmp_path.iterdir()) == []


def test_a_study_shows_the_tasks_that_it_was_asked_for(tmp_path, capsys):
    words = ("study", "tiny", "-o", tmp_path / "run", "--set", "tasks=vqa,nlvr2", "--budget", "0", "--json")
    code, out, err = run(capsys, *words)
    assert code == 0 and "fine-tuned nlvr2" in json.loads(out)["summary"]["columns"], err


# -- the whole study ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(data, beit, tokenizer, tmp_path_factory):
    """The paper's study, made small, on two of its tasks; what it gave, and how to call it again."""
    folder = tmp_path_factory.mktemp("paper")
    names = ("seed", "experts", "specific", "agnostic", "vqav2-480")
    study = dataclasses.replace(
        paper(), recipes={name: recipe(name) for name in names}, tasks=names[-1:], statistics_pairs=4
    )
    settings = dict(data=data, init=beit, tokenizer=tokenizer, command="modalmerge study paper")
    return study, folder / "paper", settings, run_paper(study, folder / "paper", budget_minutes=60, **settings)


def test_the_study_measures_every_stage(whole):
    study, folder, _, (cells, finished, planned) = whole
    assert finished == planned == len(stages(study)) == 4 + 4 + 6
    assert read_lines(folder / "cells.jsonl", Cell) == cells and len({cell.id for cell in cells}) == len(cells)
    rows = {(cell.role, cell.method, cell.stage, cell.task, cell.split): cell for cell in cells}
    for role, method in (("agnostic", "none"), ("specific", "none"), ("naive", "interpolation"),
                         ("recipe", "interpolation"), ("recipe", "arithmetic"), ("other", "regmean")):  # fmt: skip
        assert (role, method, "zero-shot", "retrieval", "test") in rows
        cell = rows[role, method, "fine-tuned", "vqa", "rest_val"]
        seeded = role in ("recipe", "other")
        assert cell.base_fraction == (0.5 if seeded else 0) and cell.initialisation == "BEiT"
        assert cell.steps == (6 if seeded else 4), "its own two, and those of the stages before"
    assert rows["recipe", "interpolation", "zero-shot", "retrieval", "test"].settings == {"ratio": 0.5}
    sizes = {name: load(folder / "stages" / name / "model")[0].num_parameters() for name in ("agnostic", "experts")}
    assert rows["other", "regmean", "zero-shot", "retrieval", "test"].parameters == sizes["agnostic"] < sizes["experts"]
    assert json.loads((folder / "submissions" / "agnostic-vqav2-480.json").read_text())
    for stage in ("experts", "recipe-regmean", "agnostic-vqav2-480"):
        kept = json.loads((folder / "stages" / stage / "model" / "inputs.json").read_text())
        assert kept["max_text_length"] == 12, stage


def test_the_study_goes_on_where_it_stopped(whole, monkeypatch):
    study, folder, settings, (cells, _, planned) = whole
    monkeypatch.setattr(public, "pretrain", None)
    monkeypatch.setattr(public, "finetune", None)
    (folder / "measured" / "agnostic-vqav2-480.json").unlink()  # as if killed between a submission and its cells
    told = {name: dataclasses.replace(made, source="other words") for name, made in study.recipes.items()}
    assert run_paper(dataclasses.replace(study, recipes=told), folder, **settings) == (cells, planned, planned)
    assert run_paper(study, folder, budget_minutes=0, **settings)[1] == 0
    other = dataclasses.replace(study, statistics_pairs=5)
    with pytest.raises(ValueError, match="holds a study with other settings"):
        run_paper(other, folder, **settings)


def test_the_study_is_reported(whole, tmp_path, capsys, monkeypatch):
    study, folder, _, outcome = whole
    monkeypatch.setattr(studied, "run_paper", lambda *_, **__: outcome)
    monkeypatch.setattr(studied, "load_paper", lambda changes: study)
    code, out, err = run(capsys, "study", "paper", "-o", folder)
    assert code == 0 and "regmean" in out.lower() and "page in" in out and (folder / "report.html").exists(), err
    code, out, _ = run(capsys, "study", "paper", "-o", folder, "--json")
    shown = json.loads(out)
    assert shown["report"] == str(folder / "report.html") and shown["summary"]["num_cells"] == len(outcome[0])
    code, _, err = run(capsys, "report", folder, "-o", tmp_path / "report.html")
    assert code == 0, err
    assert "regmean" in (tmp_path / "report.html").read_text()


def test_the_study_shows_what_it_takes(capsys, tmp_path):
    code, out, _ = run(capsys, "study", "paper", "--dry-run", "--json", "--set", "device.utilisation=0.5")
    shown = json.loads(out)
    assert code == 0 and shown["preset"]["name"] == "paper" and "at 50 %" in shown["assumption"]
    jobs = {job["id"]: job for job in shown["jobs"]}
    assert jobs["experts"]["start"] == "seed" and jobs["naive-interpolation"]["start"] == "specific"
    assert {job["start"] for job in shown["jobs"] if job.get("recipe") == "nlvr2-384"} == {
        "agnostic", "specific", "naive-interpolation", "recipe-interpolation", "recipe-arithmetic", "recipe-regmean",
    }  # fmt: skip
    assert shown["hours"] == pytest.approx(sum(job.get("hours", 0) for job in shown["jobs"]), abs=0.1)
    for item in ("BEiT's weights", "data set ade20k", "data set cc3m", "tokenizer bert-base-uncased"):
        assert any(told.startswith(item) for told in shown["missing"]), item


def test_changed_steps_hold_whatever_the_data_are():
    study = load_paper({"recipes.coco-384.training.num_steps": "7"})
    assert (study.recipes["coco-384"].epochs, study.recipes["coco-384"].for_samples(10**6).training.num_steps) == (0, 7)
