"""A study by its name: in a folder that was renamed, in a database with others, and joined by its URL alone."""

import shutil

import pytest

from evennorm.errors import ArgumentError, InputError
from evennorm.tools.compare import join
from evennorm.tools.compare.named import COMPARISON, SETTINGS
from evennorm.tools.compare.settings import Settings
from evennorm.tools.compare.study import Study
from tests.tools.comparing import command, importable, record, refused, settings


@pytest.fixture
def url(tmp_path):
    return f"sqlite:///{tmp_path / 'shared.db'}"


@pytest.fixture(autouse=True)
def hasty(monkeypatch):
    monkeypatch.setattr(join, "FIRST_SECONDS", -1)


def begun(given: Settings, fingerprint=None) -> Study:
    study = Study(given, fingerprint or {"epochs": 2})
    study.enqueue_missing()
    return study


def test_a_folder_that_was_renamed(tmp_path):
    """Also one from before studies had names of their own, when they were named after their folder."""
    for name in (None, "before"):
        (tmp_path / "before").mkdir()
        study = begun(settings(tmp_path / "before", study=name, repeats=1, placements=("none",)))
        study.work_once(lambda run: record())
        (tmp_path / "before").rename(tmp_path / "after")
        moved = Study(settings(tmp_path / "after", repeats=1, placements=("none",)), {"epochs": 2})
        assert len(moved.records()) == 1
        assert moved.name == study.name == (name or study.settings.default_study)
        shutil.rmtree(tmp_path / "after")


def test_a_file_with_several_studies(tmp_path):
    for name in ("one", "two"):
        begun(settings(tmp_path, study=name))
    with pytest.raises(InputError, match="holds the studies 'one', 'two'; name one by --study"):
        Study(settings(tmp_path), {"epochs": 2})
    assert Study(settings(tmp_path, study="two"), {"epochs": 2}).name == "two"


def test_a_name_in_a_database_hangs_on_no_folder(tmp_path, url):
    first = begun(settings(tmp_path / "a", storage=url))
    second = begun(settings(tmp_path / "b", storage=url))
    assert first.name == second.name == first.settings.default_study
    with pytest.raises(InputError, match=r"epochs 2 there, 3 here.*; choose another --study, or the settings"):
        Study(settings(tmp_path / "a", storage=url), {"epochs": 3})
    assert begun(settings(tmp_path / "a", storage=url, study="other"), {"epochs": 3}).name == "other"


def test_a_study_in_a_database_that_is_named_after_its_folder(tmp_path, url):
    begun(settings(tmp_path / "old", storage=url, study="old"))
    assert Study(settings(tmp_path / "old", storage=url), {"epochs": 2}).name == "old"
    assert Study(settings(tmp_path / "old", storage=url), {"epochs": 3}).name == settings(tmp_path).default_study


def test_data_under_another_name(tmp_path, url):
    """They are the same where their digests are."""
    here, there = ({"data": f"{name} (0123456789abcdef)"} for name in ("a.npz", "b.npz"))
    begun(settings(tmp_path, storage=url), here)
    Study(settings(tmp_path, storage=url), there)
    with pytest.raises(InputError, match="made by other settings"):
        Study(settings(tmp_path, storage=url), {"data": "a.npz (0123456789abcdee)"})


@pytest.mark.parametrize("name", ["", " ", "a\nb", "x" * 201])
def test_names_that_are_refused(tmp_path, name):
    with pytest.raises(ArgumentError, match="a study's name is 1 to 200 printable characters; received"):
        settings(tmp_path, study=name)


def test_the_settings_of_a_study(tmp_path, url):
    given = settings(tmp_path, storage=url, study="mine", seed=7)
    begun(given)
    found = join.described(url, None)
    assert found.runs == given.runs
    assert (found.seed, found.study, found.storage) == (7, "mine", url)
    begun(settings(tmp_path, storage=url, study="mine", seed=7, repeats=9))
    assert join.described(url, "mine").repeats == 9, "those of the last command"


def test_studies_that_cannot_be_joined(tmp_path, url):
    with pytest.raises(InputError, match=r"shared.db holds no study 'x'; begin it by evennorm compare --storage URL"):
        join.described(url, "x")
    study = begun(settings(tmp_path, storage=url, study="one"))
    described = study._study.user_attrs[COMPARISON]
    study._study.set_user_attr(COMPARISON, described | {"of a later version": 1})
    with pytest.raises(InputError, match=r"'one' in .* was begun by another version of evennorm; install that version here"):
        join.described(url, None)
    study._study.set_user_attr(COMPARISON, None)
    assert SETTINGS in study._study.user_attrs
    with pytest.raises(InputError, match="begun by an older evennorm, which did not describe it; repeat the command that"):
        join.described(url, None)
    begun(settings(tmp_path, storage=url, study="two"))
    with pytest.raises(InputError, match="holds the studies 'one', 'two'; name one by --study"):
        join.described(url, None)


def test_data_that_are_not_on_this_machine(tmp_path, url):
    (tmp_path / "points.npz").touch()
    begun(settings(tmp_path, storage=url, data=str(tmp_path / "points.npz")))
    (tmp_path / "points.npz").rename(tmp_path / "moved.npz")
    found = join.described(url, None)
    with pytest.raises(InputError, match=r"are at .*points.npz, which is not on this machine; bring them here, and name"):
        join.at_hand(found, None, None)
    assert join.at_hand(found, str(tmp_path / "moved.npz"), None).data == str(tmp_path / "moved.npz")


def test_a_worker_trains_what_is_missing(points, tmp_path, url, monkeypatch):
    """From another folder, by the URL alone; then the command that began the study has nothing left to train."""
    monkeypatch.chdir(tmp_path)
    given = {"storage": url, "study": "mine", "repeats": 1, "epochs": 1, "placements": "before", "learning_rates": "0.1"}
    with importable(points.parent):
        from evennorm.cli import main

        assert command(points, tmp_path / "out", **given).exit_code == 0
        given["repeats"] = 2
        monkeypatch.setattr("evennorm.tools.compare.work.work", lambda *arguments: None)
        command(points, tmp_path / "out", **given)  # tells what is wanted, and trains nothing
        monkeypatch.undo()
        from click.testing import CliRunner

        result = CliRunner().invoke(main, ["compare", "--worker", url])
    assert (result.exit_code, result.stdout) == (
        0,
        "the study mine is complete with 2 runs; the machine that started it has the results\n",
    )


def test_options_that_a_worker_does_not_take(data, url):
    from click.testing import CliRunner

    from evennorm.cli import main

    def refusal(*words):
        return refused(CliRunner().invoke(main, ["compare", *words]))

    assert refusal("--worker", url, "--epochs", "3").endswith(
        "goes with --study, --data, --model, --jobs alone; leave out --epochs"
    )
    assert refusal("--serve", "grpc://x:1", "--jobs", "3").endswith("--serve goes with --storage alone; leave out --jobs")
    assert "--serve passes on to a database; name it by --storage" in refusal("--serve", "grpc://x:1")
    assert "received 'x'" in refusal("--serve", "x", "--storage", url)
    assert "--jobs" not in refusal("--worker", url, "--jobs", "2")
    assert "at least 1; received 0" in refusal("--worker", url, "--jobs", "0")
