import json

import pytest
import yaml

from modalmerge.merge.methods import METHODS
from modalmerge.merge.plan import resolve_settings
from modalmerge.merge.procedures import OWN_SETTINGS
from modalmerge.report.run import Run
from modalmerge.study import PRESETS, apply_changes, load_preset, read_preset, to_dict
from modalmerge.study.candidates import CANDIDATES, candidates
from modalmerge.study.presets import BASIC_METHODS, REPAIRS
from modalmerge.study.reading import from_dict, what_differs


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_comes_back_from_its_values(name, tmp_path):
    preset = load_preset(name)
    assert preset.name == name and f"modalmerge study {name}" in PRESETS[name].__doc__
    assert from_dict(to_dict(preset)) == preset
    path = tmp_path / "preset.yaml"
    path.write_text(yaml.safe_dump(to_dict(preset)))
    assert read_preset(path) == preset
    path.write_text(json.dumps({"preset": to_dict(preset), "jobs": [], "output": "runs/x"}))  # of --dry-run
    assert read_preset(path) == preset


def test_changes_are_read_by_the_type_of_their_field():
    changed = apply_changes(
        load_preset("tiny"),
        {
            "pretraining.num_steps": "100",
            "finetuning.vqa.learning_rate": "1",
            "random_seeds": "[3, 4]",
            "ratios": "0.5",
            "name": "mine",
            "model.hidden_size": "48",
            "model.drop_path": "0",
            "num_scenes.test": "7",
            "pretraining.betas": "[0.8, 0.9]",
        },
    )
    assert (changed.pretraining.num_steps, changed.pretraining.betas) == (100, (0.8, 0.9))
    rate = changed.finetuning["vqa"].learning_rate
    assert rate == 1.0 and isinstance(rate, float)
    assert (changed.random_seeds, changed.ratios, changed.name) == ((3, 4), (0.5,), "mine")
    assert changed.model == {"hidden_size": 48, "drop_path": 0}
    assert changed.num_scenes == {**load_preset("tiny").num_scenes, "test": 7}
    untouched = load_preset("tiny")
    assert untouched.finetuning["retrieval"] == changed.finetuning["retrieval"]


@pytest.mark.parametrize(
    "change, message",
    [
        ("pretrainin.num_steps=1", "unknown setting 'pretrainin.num_steps'; nearest: 'pretraining'"),
        ("pretraining.num_step=1", "nearest: 'pretraining.num_steps'"),
        ("finetuning.vqaa.num_steps=1", "unknown setting .*; nearest: 'finetuning.vqa'"),
        ("num_scenes.tests=1", "nearest: 'num_scenes.test'"),
        ("pretraining.num_steps=many", r"'many' is no int; it is \d+ now"),
        ("pretraining.num_steps=1.5", "'1.5' is no int"),
        ("pretraining.num_steps=true", "'true' is no int"),
        ("pretraining.learning_rate=true", "'true' is no float"),
        ("pretraining.num_steps.more=1", "'num_steps' holds a value, it has no fields"),
        ("pretraining=1", "'1' is no TrainSettings"),
        ("random_seeds=[0,0]", "random_seeds must be distinct"),
        ("random_seeds=[]", "at least one"),
        ("random_seeds=[-1]", r"random_seeds must be in \[0, 2\*\*32\), got \[-1\]"),
        ("random_seeds=[0.5]", "is no tuple"),
        ("size=nanno", "unknown model size 'nanno'; nearest: 'nano'"),
        ("architecture=specifik", "unknown architecture 'specifik'; nearest: 'specific'"),
        ("num_scenes.test=0", r"num_scenes.test must be in \[1, 1000\], got 0"),
        ("num_scenes.test=1001", "num_scenes.test must be in"),
        ("seed_fraction=1.0", r"seed_fraction must be in \(0, 1\)"),
        ("seed_fraction=0.0001", "leaves 0 for the seed"),
        ("pretraining.num_steps=1", "leaves 0 for the seed"),
        ("ratios=[]", "ratios and scales must name at least one value each"),
        ("experts_rate_factor=0", "experts_rate_factor must be positive, got 0.0"),
        ("model.hiden_size=32", "unknown setting of the model 'hiden_size'; nearest: 'hidden_size'"),
        ("model.hidden_size=wide", "model.hidden_size must be int, got 'wide'"),
        ("model.image_size=32", "unknown setting of the model 'image_size'"),
        ("pretraining.batch_size=1", "batch_size must be at least 2, got 1"),
    ],
)
def test_a_wrong_change_is_told(change, message):
    key, _, value = change.partition("=")
    with pytest.raises(ValueError, match=message):
        apply_changes(load_preset("tiny"), {key: value})


@pytest.mark.parametrize(
    "edit, message",
    [
        (lambda values: values.pop("size"), "preset lacks size"),
        (lambda values: values.update(sizes="nano"), "unknown key of preset 'sizes'; nearest: 'size'"),
        (lambda values: values.update(num_scenes=5), "preset.num_scenes must hold fields, got 5"),
        (lambda values: values.update(ratios=0.5), "preset.ratios must be a list, got 0.5"),
        (lambda values: values["pretraining"].update(num_steps="4"), "preset.pretraining.num_steps must be int"),
        (lambda values: values["num_scenes"].pop("test"), "num_scenes lacks the split test"),
        (lambda values: values["finetuning"].update(vqaa=values["finetuning"]["vqa"]), "nearest: 'vqa'"),
    ],
)
def test_a_wrong_file_is_told(edit, message, tmp_path):
    values = to_dict(load_preset("tiny"))
    edit(values)
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(values))
    with pytest.raises(ValueError, match=message):
        read_preset(path)


def test_a_file_that_is_no_preset_is_told(tmp_path):
    with pytest.raises(ValueError, match="does not exist; presets by name: tiny"):
        read_preset(tmp_path / "none.yaml")
    for text, message in (("a: [", "is no YAML"), ("[1, 2]", "must hold fields"), ("", "must hold fields")):
        (tmp_path / "mine.yaml").write_text(text)
        with pytest.raises(ValueError, match=message):
            read_preset(tmp_path / "mine.yaml")
    with pytest.raises(ValueError, match="unknown preset 'tinny'; nearest: 'tiny'"):
        load_preset("tinny")


# -- further methods, repairs, the curve --------------------------------------------------------------------


def changed(**changes):
    return apply_changes(load_preset("tiny"), changes)


def test_nothing_further_is_done_by_default():
    preset = load_preset("tiny")
    assert (preset.methods, preset.repairs, preset.keep_fractions) == ((), (), ())
    assert preset.expert_sets == ()


def test_all_is_spelled_out():
    preset = changed(methods="all", repairs="all")
    assert set(preset.methods) == set(METHODS) - set(BASIC_METHODS)
    assert preset.repairs == ("aligned", "healed", "continued", "recipe-healed") == tuple(REPAIRS)
    assert to_dict(preset)["methods"] == list(preset.methods), "what is stored names every one"
    assert from_dict(to_dict(preset)) == preset


@pytest.mark.parametrize(
    ("text", "methods"),
    [("ties,dare", ("ties", "dare")), ('["ties", "dare"]', ("ties", "dare")), ("slerp", ("slerp",)), ("[]", ())],
)
def test_names_are_listed_with_commas_or_as_json(text, methods):
    assert changed(methods=text).methods == methods


def test_fractions_are_numbers():
    assert changed(keep_fractions="[0.25, 1]").keep_fractions == (0.25, 1.0)
    assert changed(keep_fractions="0.5").keep_fractions == (0.5,)


def test_expert_sets_are_every_combination():
    preset = changed(architectures="ffn,specific", seed_fractions="[0, 0.25]", rate_factors="[0.3, 1]")
    names = [expert_set.name for expert_set in preset.expert_sets]
    assert names[:4] == ["ffn-0-0.3", "ffn-0-1", "ffn-0.25-0.3", "ffn-0.25-1"]
    assert len(set(names)) == len(names) == 8
    (alone,) = changed(seed_fractions="[0.25]").expert_sets
    assert alone.name == "specific-0.25-1", "where nothing is named, it is as in the recipe"


def test_the_report_names_the_sets_as_the_study_does():
    for settings in ({}, {"seed_fractions": "[0, 0.25]"}, {"architectures": "ffn,norms", "rate_factors": "[0.3, 1]"}):
        preset = changed(**settings)
        run = Run(name="", preset=to_dict(preset), cells=[], curves=[], predictions=[])
        assert run.asked["expert_sets"] == [expert_set.name for expert_set in preset.expert_sets]


def test_a_file_of_before_the_further_fields_is_read(tmp_path):
    values = to_dict(load_preset("tiny"))
    later = ("methods", "repairs", "keep_fractions", "healing", "continued_steps", "statistics_samples")
    later += ("architectures", "seed_fractions", "rate_factors")
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump({key: value for key, value in values.items() if key not in later}))
    assert read_preset(path) == load_preset("tiny")
    path.write_text(yaml.safe_dump({**values, "methods": "all"}))
    with pytest.raises(ValueError, match="preset.methods must be a list, got 'all'"):
        read_preset(path)
    path.write_text(yaml.safe_dump({**values, "methods": ["all"], "healing": {**values["healing"], "num_steps": 7}}))
    assert read_preset(path).methods == changed(methods="all").methods
    assert read_preset(path).healing.num_steps == 7


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"methods": "tise"}, "unknown further merge method 'tise'; nearest: 'ties'"),
        ({"methods": "interpolation"}, "methods: interpolation is in every study; leave it out"),
        ({"methods": "ties,ties"}, "methods must be distinct, got .'ties', 'ties'."),
        ({"methods": "[1]"}, "is no tuple"),
        ({"repairs": "heeled"}, "unknown repair 'heeled'; nearest: 'healed'"),
        ({"keep_fractions": "[0.5, 0]"}, r"keep_fractions must be in \(0, 1\], got \[0.5, 0.0\]"),
        ({"keep_fractions": "[0.5, 0.5]"}, "keep_fractions must be distinct"),
        ({"keep_fractions": "half"}, "'half' is no tuple"),
        ({"architectures": "agnostic"}, "architecture agnostic has no experts, so that no set can be merged"),
        ({"architectures": "attenton"}, "unknown architecture 'attenton'; nearest: 'attention'"),
        ({"architectures": "ffn,ffn"}, "architectures must be distinct"),
        ({"seed_fractions": "[0, 1]"}, "seed_fractions must be 0 or leave a step for the seed .* got 1.0 of 900 steps"),
        ({"seed_fractions": "[0.0001]"}, "seed_fractions must be 0 or leave a step"),
        ({"seed_fractions": "[NaN]"}, "seed_fractions must be 0 or leave a step for the seed"),
        ({"seed_fractions": "[0.25, 0.2501]"}, "too close to each other: some give the same steps"),
        ({"rate_factors": "[1, 1.0000001]"}, "too close to each other: .* or the same name"),
        ({"rate_factors": "[1, 0]"}, r"rate_factors must be positive and finite, got \[1.0, 0.0\]"),
        ({"rate_factors": "[Infinity]"}, "rate_factors must be positive and finite"),
        ({"continued_steps": "0"}, "continued_steps must be at least 1, got 0"),
        ({"statistics_samples": "1"}, "statistics_samples must be at least 2, got 1"),
        ({"healing.num_step": "1"}, "nearest: 'healing.num_steps'"),
    ],
)
def test_a_wrong_addition_is_told(change, message):
    with pytest.raises(ValueError, match=message):
        changed(**change)


def test_what_differs_is_told():
    there = to_dict(changed(**{"methods": "ties", "healing.num_steps": "5"}))
    assert what_differs(there, changed(**{"methods": "ties", "healing.num_steps": "5"})) == []
    assert what_differs(there, changed(methods="ties,dare"), growing=("methods",)) == [
        "healing.num_steps: there 5, now 60"
    ]
    assert what_differs(there, changed(methods="dare", **{"healing.num_steps": "5"}), growing=("methods",)) == [
        "methods: there ['ties'], now ['dare']"
    ]
    axes = ("architectures", "seed_fractions", "rate_factors")
    some = to_dict(changed(seed_fractions="[0, 0.25]"))
    assert what_differs(some, changed(seed_fractions="[0, 0.25, 0.75]", rate_factors="[0.3, 1]"), growing=axes) == []
    assert what_differs(some, changed(seed_fractions="[0, 0.25]", rate_factors="[0.3]"), growing=axes) == [
        "expert sets: there specific-0-1, specific-0.25-1 too"
    ]
    del there["healing"]  # written before there was such a field
    assert what_differs(there, changed(methods="ties")) == []


@pytest.mark.parametrize("method", METHODS)
def test_every_method_chooses_from_a_few_settings_that_it_takes(method):
    found = candidates(method, load_preset("tiny"))
    assert 1 <= len(found) <= 5
    assert all(settings not in found[:place] for place, settings in enumerate(found))
    for settings in found:
        own = {key: value for key, value in settings.items() if key not in OWN_SETTINGS.get(method, ())}
        resolve_settings(method, own, ("vision", "text", "joint"))


def test_there_are_no_settings_for_methods_that_are_not_there():
    assert set(CANDIDATES) == set(METHODS) - set(BASIC_METHODS)
    with pytest.raises(ValueError, match="unknown merge method of the study 'tise'; nearest: 'ties'"):
        candidates("tise", load_preset("tiny"))


def test_settings_written_down_before_some_existed_are_no_difference():
    preset = load_preset("tiny")
    there = to_dict(preset)
    del there["tasks"], there["finetuning"]["nlvr2"]
    for settings in (there["pretraining"], there["healing"], *there["finetuning"].values()):
        del settings["warmup_steps"], settings["micro_batch_size"]
    assert what_differs(there, preset) == []
    there["pretraining"]["num_steps"] = 7
    assert what_differs(there, preset) == ["pretraining.num_steps: there 7, now 900"]


def test_what_is_fine_tuned_may_grow_with_the_methods_it_names():
    there = to_dict(load_preset("tiny"))
    del there["finetuned"], there["variants"]
    grown = apply_changes(load_preset("tiny"), {"methods": "ties", "finetuned": "ties"})
    assert what_differs(there, grown, growing=("methods", "finetuned")) == []


def test_a_grid_may_change_as_long_as_it_keeps_the_expert_sets():
    axes = {"architectures": "specific,ffn", "seed_fractions": "[0, 0.5]"}
    star, cross = (apply_changes(load_preset("tiny"), {**axes, "grid": grid}) for grid in ("star", "cross"))
    growing = ("architectures", "seed_fractions")
    assert what_differs(to_dict(star), cross, growing=growing) == []
    assert what_differs(to_dict(load_preset("tiny")), star, growing=growing) == []
    assert what_differs(to_dict(cross), star, growing=growing) == ["expert sets: there ffn-0-1 too"]


def test_the_order_of_changes_does_not_matter():
    changes = {"finetuned": "ties", "finetuning": "{}", "tasks": "[]", "length_tasks": "[]", "methods": "ties"}
    one, other = (
        apply_changes(load_preset("tiny"), dict(pairs)) for pairs in (changes.items(), [*changes.items()][::-1])
    )
    assert one == other and one.finetuned == one.methods == ("ties",)
    with pytest.raises(ValueError, match="finetuned: 'dare' is none of the study's methods"):
        apply_changes(load_preset("tiny"), {"finetuned": "dare", "methods": "ties"})
