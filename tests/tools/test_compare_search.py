"""The names of placements, and the search for a mixture of places: what it tries, what it claims, and that it goes on."""

import json

import pytest

from evennorm.errors import ArgumentError
from evennorm.tools.compare import compare, search, settings_for
from evennorm.tools.compare.racing import race
from evennorm.tools.compare.settings import SEARCH_REPEAT, Run
from evennorm.tools.compare.variants import LETTERS, choices, expanded, mixture_name, parameters, variant
from tests.tools.comparing import ENGINE, command, record, refused, settings, table_of, trials

DEEP = """
import keras
from keras import layers as L

def network(input_shape, classes):
    return keras.Sequential([keras.Input(input_shape), L.Dense(4, "tanh", name="first"), L.Dense(4, "tanh", name="second"),
                             L.Dense(classes, "softmax")])
"""

DEEP_TORCH = """
from torch import nn

def network(classes: int, input_shape) -> nn.Module:
    return nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, classes))
"""


def quality(places):
    """Of a network that wants normalization before all sites but the last, and there after the activation."""
    wanted = ("before",) * (len(places) - 1) + ("after",)
    return sum(place == best for place, best in zip(places, wanted, strict=True)) / len(places)


def scored(given, runs):
    """Records as that network would give them."""
    found = {}
    for run in runs:
        places = variant(run.placement).mixture or (run.placement,) * given.sites
        found[run] = record(0.5, quality(places) - 0.1 * (run.learning_rate != 0.1))
    return found


def searched(given):
    records = {}
    while (state := search.search(given, records)).mixture is None:
        records |= scored(given, [run for run in state.runs if run not in records])
    return state


def test_names_say_all_there_is_to_know():
    for places in (("before", "none"), ("after",) * 11 + ("before",), ("none", "after", "none")):
        assert variant(mixture_name(places)).mixture == places
    with pytest.raises(ArgumentError, match="received 'mix:'"):
        variant("mix:")
    with pytest.raises(ArgumentError, match="received 'none:layer'"):
        variant("none:layer")
    with pytest.raises(ArgumentError, match=r"norms are one or more of batch, .*; received instance"):
        expanded(["before"], ["instance"])
    for name in ("none", "after:rms", "mix:b2a"):
        assert all(value in choices(parameter) for parameter, value in parameters(name).items())


def test_the_whole_model_comes_first_and_nothing_is_tried_twice(tmp_path):
    given = settings(tmp_path, search=40, sites=4, learning_rates=(0.1, 0.5))
    state = searched(given)
    assert [run.placement for run in state.runs[:6]] == ["none", "before", "after"] * 2
    assert len(state.runs) == len(set(state.runs)) == 40
    assert {run.repeat for run in state.runs} == {SEARCH_REPEAT}
    assert state.runs == searched(given).runs  # proposals are a function of the records
    assert state.runs != searched(settings(tmp_path, search=40, sites=4, learning_rates=(0.1, 0.5), seed=1)).runs


def test_it_finds_the_mixture_that_validation_prefers(tmp_path):
    """Of 81 mixtures at one rate: the best of 40 is the best there is, which 40 at random miss in half of all cases."""
    found = [searched(settings(tmp_path, search=40, sites=4, seed=seed)).mixture for seed in range(4)]
    assert found.count("mix:b3a") >= 3


def test_a_small_space_is_tried_whole(tmp_path):
    state = searched(settings(tmp_path, search=99, sites=2))
    assert len(state.runs) == 9
    assert state.mixture == "mix:ba"


def test_a_mixture_is_claimed_only_above_every_simple_placement(tmp_path):
    given = settings(tmp_path, placements=("none", "before", "mix:ba"), repeats=4)
    layers = search.layers_of("mix:ba", ["first", "second"])
    means = {"none": 0.5, "before": 0.7, "mix:ba": 0.8}
    records = {run: record(means[run.placement] + 0.001 * run.repeat) for run in given.runs}
    lines = search.said(race(given, records, 0.001).pairs, "mix:ba", layers)
    assert lines == [
        "mix:ba normalizes before first; after second",
        "This mixture is above every simple placement.",
    ]
    means["before"] = 0.8
    records = {run: record(means[run.placement] + 0.001 * run.repeat) for run in given.runs}
    assert search.said(race(given, records, 0.001).pairs, "mix:ba", layers)[1] == (
        "No mixture is shown to beat the best simple placement: this one is not shown above before."
    )


def test_what_cannot_be_searched_is_refused(tmp_path):
    for sites, budget, message in (
        (1, 30, "this model has 1 that can"),
        (2, 3, "its budget must be at least 4; received 3"),
    ):
        with pytest.raises(ArgumentError, match=message):
            search.check(settings(tmp_path, search=budget, sites=sites))
    for words in (["search:x"], ["search:0"], ["search", "search:4"]):
        with pytest.raises(ArgumentError, match="search is named once"):
            search.budget_of(words)


def test_the_words_of_the_command(tmp_path):
    def placements(*words, norms=("batch",)):
        return settings_for("points", "paper-mlp", words, 2, None, 1, 16, ENGINE, str(tmp_path), None, 0, norms=norms)

    assert placements("search").placements == ("none", "before", "after", "input")
    assert placements("search:8", "none").search == 8
    assert placements("none", "before", norms=("layer", "none")).placements == ("none", "before:layer")


def test_a_search_end_to_end(data, tmp_path, monkeypatch):
    """The mixture that was found is compared in fresh repeats, and a second command trains nothing more."""
    (tmp_path / "deep_network.py").write_text(DEEP)
    monkeypatch.syspath_prepend(tmp_path)
    out = tmp_path / "results"
    changes = {"model": "deep_network:network", "placements": "search:5,none,before", "learning_rates": "0.5", "epochs": 1}
    result = command(data, out, "--no-model", **changes, repeats=2)
    assert result.exit_code == 0, result.output
    summary = json.loads((out / "summary.json").read_text())
    found = summary["search"]
    assert found["tried"] == 5
    places = dict(zip(("first", "second"), variant(found["mixture"]).mixture, strict=True))
    assert found["layers"] == places
    assert {row["placement"] for row in table_of(out)} == {"none", "before", found["mixture"]}
    assert {row["repeat"] for row in table_of(out)} == {"0", "1"}  # none of the search
    assert trials(out, "COMPLETE") == 5 + 3 * 2
    assert found["lines"][0] in result.stdout
    again = command(data, out, "--no-model", **changes, repeats=2)
    assert again.stdout == result.stdout
    assert trials(out) == 11


def trained(out):
    """Of every finished trial: what was trained, and its value."""
    import optuna

    study = optuna.load_study(study_name=None, storage=f"sqlite:///{out / 'study.sqlite3'}")
    return sorted((str(sorted(each.params.items())), each.value) for each in study.trials if each.state.name == "COMPLETE")


def test_an_interrupted_search_of_a_torch_model_comes_to_the_same(data, tmp_path, monkeypatch):
    """Interrupted in the second and third round of proposals: runs and mixture are those of one that was not."""
    pytest.importorskip("torch")
    (tmp_path / "deep_torch.py").write_text(DEEP_TORCH)
    monkeypatch.syspath_prepend(tmp_path)
    asked = {"placements": ["search:14", "none"], "learning_rates": [0.1, 0.5], "repeats": 1, "epochs": 1, "batch_size": 16}

    def compared(name, progress=None):
        return compare(data, "deep_torch:network", out=str(tmp_path / name), progress=progress, hand_over=False, **asked)

    def stops_at(most):
        def progress(done, total):
            if done >= most:
                raise KeyboardInterrupt

        return progress

    whole = compared("whole")
    for most in (7, 11):
        with pytest.raises(KeyboardInterrupt):
            compared("parts", stops_at(most))
        assert most - 1 <= trials(tmp_path / "parts", "COMPLETE") <= most
    parts = compared("parts")
    assert len(trained(tmp_path / "parts")) == 14 + 2 * 2
    assert trained(tmp_path / "parts") == trained(tmp_path / "whole")
    assert (parts.search, parts.verdict) == (whole.search, whole.verdict)
    assert parts.search.tried == 14
    assert list(parts.search.layers) == ["1", "3"]
    assert parts.search.layers == dict(zip(("1", "3"), variant(parts.search.mixture).mixture, strict=True))


def test_norms_end_to_end(data, tmp_path):
    """Beside a study of batch normalization, which goes on."""
    changes = {"learning_rates": "0.5", "repeats": 2, "epochs": 1}
    assert command(data, tmp_path, "--no-model", placements="before", **changes).exit_code == 0
    result = command(data, tmp_path, placements="none,before", norms="batch,layer,rms", **changes)
    assert result.exit_code == 0, result.output
    names = [row["placement"] for row in table_of(tmp_path)]
    assert list(dict.fromkeys(names)) == ["none", "before", "before:layer", "before:rms"]
    assert trials(tmp_path, "COMPLETE") == 8
    assert "instance" in refused(command(data, tmp_path, norms="instance"))


def test_places_have_one_letter_each():
    assert len(LETTERS) == len(set(LETTERS.values())) == 3


def test_runs_of_another_comparison_are_no_runs_of_this_one(tmp_path):
    plain = settings(tmp_path).possible()
    assert plain(Run("none", 0.1, 1))
    assert not plain(Run("mix:ba", 0.1, 1))
    assert not plain(Run("none", 0.1, SEARCH_REPEAT))
    looking = settings(tmp_path, search=9, sites=2).possible()
    assert looking(Run("mix:ba", 0.1, 1))
    assert looking(Run("none", 0.1, SEARCH_REPEAT))
    assert not looking(Run("mix:ba", 0.3, 1))
