"""What cannot be migrated: one clear line, nothing written."""

from __future__ import annotations

import json
import shutil

import h5py
import keras
import numpy as np
import pytest
from click.testing import CliRunner
from safetensors.numpy import load_file

from evennorm.cli import main
from evennorm.errors import ArgumentError, InputError
from evennorm.tools.migrate import migrate
from tests.migration.building import functional, layer, sequential
from tests.migration.keras1 import Keras1


def draw(*shape):
    return np.random.default_rng(1).normal(size=(4, *shape))


def dense(name, units=4, **config):
    return layer("Dense", name, output_dim=units, **config)


def written(tmp_path, model, *shapes, **options):
    old = Keras1()
    old.predict(model, *(draw(*shape) for shape in shapes))
    return old.save(tmp_path / "old.h5", model, **options)


def add_foreign(path, kind, name="odd", at=1, **config):
    """Puts a layer that NumPy does not know into the configuration of a Sequential."""
    with h5py.File(path, "r+") as file:
        model = json.loads(file.attrs["model_config"])
        model["config"].insert(at, {"class_name": kind, "config": {"name": name, "trainable": True, **config}})
        file.attrs["model_config"] = json.dumps(model).encode()


def refused(path, match, tmp_path, **options):
    out = tmp_path / "new.keras"
    out.write_bytes(b"as it was")
    with pytest.raises(InputError, match=match) as error:
        migrate(path, out, **options)
    assert "\n" not in str(error.value)
    assert out.read_bytes() == b"as it was"


@pytest.fixture
def chain(tmp_path):
    return written(tmp_path, sequential((5,), dense("first"), dense("second"), dense("third", 2)), (5,))


def test_an_unknown_layer_is_named(chain, tmp_path):
    add_foreign(chain, "LRN2D")
    refused(chain, r"'odd' is a LRN2D, which migration does not know; rebuild it in Keras 3, or .*--partial", tmp_path)


def test_code_in_a_file_is_never_run(chain, tmp_path):
    function = ["4wEAAAAAAAAAAgAAAEMAAABzCAAAAHwAZAEUAFMAKQJO6QIAAACpACkB2gF4cgIAAAByAgAAAPoCZW4=\n", None, None]
    add_foreign(chain, "Lambda", function=function, function_type="lambda", output_shape=None, arguments={})
    refused(chain, "'odd' is a Lambda, whose code is in the file and is never run", tmp_path)


def test_a_merge_by_a_function(tmp_path):
    model = functional({"a": (5,), "b": (5,)}, [(layer("Merge", "m", mode="sum"), "a", "b"), (dense("out"), "m")], ["out"])
    path = written(tmp_path, model, (5,), (5,))
    with h5py.File(path, "r+") as file:
        text = file.attrs["model_config"].replace('"mode": "sum"', '"mode": ["4wEA", null, null]')
        file.attrs["model_config"] = text.replace('"mode_type": "raw"', '"mode_type": "lambda"').encode()
    refused(path, "'m' merges by a function of Python, and code in a file is never run", tmp_path)


def test_an_activation_of_the_author(tmp_path):
    path = written(tmp_path, sequential((5,), dense("d")), (5,))
    with h5py.File(path, "r+") as file:
        file.attrs["model_config"] = file.attrs["model_config"].replace('"linear"', '"my_swish"').encode()
    refused(path, "'d' applies the activation 'my_swish', which is no function of Keras", tmp_path)


def test_partial_exports_what_stands_before(chain, tmp_path):
    add_foreign(chain, "LRN2D", at=2)
    report = migrate(chain, tmp_path / "new.keras", partial=True)
    assert report.left_out == ("odd", "third")
    assert report.model.output_shape == (None, 4)
    with h5py.File(chain) as file:
        first, second = (
            [np.array(file[f"model_weights/{name}/{name}_{kind}:0"], "float64") for kind in "Wb"]
            for name in ("first", "second")
        )
    x = draw(5).astype("float32")
    expected = (x @ first[0] + first[1]) @ second[0] + second[1]
    new = keras.saving.load_model(tmp_path / "new.keras")
    np.testing.assert_allclose(new.predict_on_batch(x), expected, atol=1e-5)


def test_partial_keeps_the_outputs_that_do_not_depend_on_it(tmp_path):
    model = functional(
        {"a": (5,)}, [(dense("d"), "a"), (dense("left", 2), "d"), (dense("right", 3), "d")], ["left", "right"]
    )
    path = written(tmp_path, model, (5,))
    with h5py.File(path, "r+") as file:
        config = json.loads(file.attrs["model_config"])
        config["config"]["layers"][-1]["class_name"] = "Mystery"
        file.attrs["model_config"] = json.dumps(config).encode()
    report = migrate(path, partial=True)
    assert report.left_out == ("right",)
    assert [tuple(x.shape) for x in report.model.outputs] == [(None, 2), (None, 4)]


def test_weights_without_an_architecture(tmp_path):
    path = written(tmp_path, sequential((5,), dense("d")), (5,), whole=False)
    refused(
        path, "holds weights without their model; .* --architecture FILE.json or --architecture module:function", tmp_path
    )


def test_an_architecture_that_does_not_fit(tmp_path):
    path = written(tmp_path, sequential((5,), dense("d")), (5,), whole=False)
    refused(
        path,
        r"'d' takes a weight of shape \(5, 7\) as a Dense, and the file gives \(5, 4\)",
        tmp_path,
        architecture=sequential((5,), dense("d", 7)),
    )
    refused(
        path,
        "has 1 layers with weights and the architecture 2, of other names",
        tmp_path,
        architecture=sequential((5,), dense("x"), dense("y")),
    )


def test_a_layer_without_some_of_its_weights(tmp_path):
    path = written(tmp_path, sequential((5,), dense("d")), (5,))
    with h5py.File(path, "r+") as file:
        file["model_weights/d"].attrs["weight_names"] = [b"d_W:0"]
    refused(path, "a Dense stores 2 weights as 'd' is set, and the file has 1; it is damaged", tmp_path)


def test_a_weight_that_is_listed_and_missing(tmp_path):
    path = written(tmp_path, sequential((5,), dense("d")), (5,))
    with h5py.File(path, "r+") as file:
        del file["model_weights/d/d_W:0"]
    refused(path, "lists the weight 'd_W:0' of 'd' and does not have it; it is damaged", tmp_path)


def test_no_input_shape(tmp_path):
    path = written(tmp_path, {"class_name": "Sequential", "config": [dense("d")]}, (5,))
    refused(path, r"the first layer 'd' has no batch_input_shape in the configuration", tmp_path)


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (None, "there is no file"),
        (b"", "is empty"),
        (b"PK\x05\x06" + bytes(18), "is a zip archive, as Keras 3 writes .keras files"),
        (b"\x80\x04K\x01.", "an old Keras file is HDF5, and .* is not"),
    ],
)
def test_other_files(content, match, tmp_path):
    path = tmp_path / "old.h5"
    if content is not None:
        path.write_bytes(content)
    refused(path, match, tmp_path)


def test_a_file_that_was_cut_short(chain, tmp_path):
    content = chain.read_bytes()
    for length in (len(content) // 2, len(content) - 100, 600):
        chain.write_bytes(content[:length])
        refused(chain, "damaged", tmp_path)


def test_hdf5_of_another_program(tmp_path):
    with h5py.File(tmp_path / "x.h5", "w") as file:
        file["measurements"] = np.arange(3)
    refused(tmp_path / "x.h5", r"it holds measurements\); it is not a Keras file", tmp_path)


def test_links_out_of_the_file(tmp_path, chain):
    with h5py.File(chain, "r+") as file:
        file["model_weights/first/more"] = h5py.ExternalLink("/etc/passwd", "/")
    refused(chain, "leads out of the file", tmp_path)


def test_keras_3_needs_no_migration(tmp_path):
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)])
    model.save_weights(tmp_path / "x.weights.h5")
    refused(tmp_path / "x.weights.h5", "is a .weights.h5 file of Keras 3; it needs no migration", tmp_path)
    model.save(tmp_path / "x.h5")
    refused(tmp_path / "x.h5", r"was written by Keras 3\.\d+\.\d+; it needs no migration", tmp_path)


def test_damaged_configurations(tmp_path, chain):
    for config in ("{", "[]", '{"class_name": "Sequential"}', '{"class_name": "Graph", "config": {}}', "3", "null"):
        copy = shutil.copy(chain, tmp_path / "copy.h5")
        with h5py.File(copy, "r+") as file:
            file.attrs["model_config"] = config.encode()
        refused(copy, ".", tmp_path)


@pytest.mark.parametrize("word", ["keras==1.0.9", "caffe", "keras==3.0.0", "keras==1.0.4,numpy", ""])
def test_written_by_takes_releases_and_backends(word, chain):
    with pytest.raises(ArgumentError, match="--written-by takes a release of Keras 1 or 2, a backend"):
        migrate(chain, written_by=word)


def command(*arguments):
    plain = {"FORCE_COLOR": None, "TTY_COMPATIBLE": None}
    return CliRunner(env=plain).invoke(main, ["migrate", *map(str, arguments)], prog_name="evennorm")


def test_the_command(chain, tmp_path):
    result = command(chain, "-o", tmp_path / "new.keras")
    assert result.exit_code == 0, result.output
    assert f"{chain}: Keras 1.2.2 on tensorflow" in result.output
    assert "first   Dense  Dense        2" in result.output
    assert keras.saving.load_model(tmp_path / "new.keras").count_params() == 24 + 20 + 10
    as_json = command(chain, "-o", tmp_path / "new.keras", "--json")
    told = json.loads(as_json.output)
    assert told["written_by"] == "Keras 1.2.2 on tensorflow"
    assert told["layers"][0] == {
        "old": "first",
        "old_class": "Dense",
        "new": "Dense",
        "weights": 2,
        "converted": [],
        "assumed": [],
    }


def test_exit_codes(chain, tmp_path):
    add_foreign(chain, "LRN2D")
    out = tmp_path / "new.keras"
    refusal = command(chain, "-o", out)
    assert refusal.exit_code == 2
    assert refusal.output.startswith("evennorm: 'odd' is a LRN2D")
    assert refusal.output.count("\n") == 1
    assert not out.exists()
    assert command(chain, "-o", out, "--partial").exit_code == 1
    assert out.exists()
    assert command(chain, "-o", tmp_path / "new.txt").exit_code == 2
    assert command(tmp_path / "none.h5", "-o", out).exit_code == 2


def test_architecture_of_the_users_own_code(tmp_path, monkeypatch):
    (tmp_path / "my_net.py").write_text(
        "import keras\n\ndef build():\n    return keras.Sequential([keras.Input((5,)), keras.layers.Dense(4)])\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    path = written(tmp_path, sequential((5,), dense("d")), (5,), whole=False)
    result = command(path, "--architecture", "my_net:build", "-o", tmp_path / "new.keras")
    assert result.exit_code == 0, result.output
    with h5py.File(path) as file:
        np.testing.assert_array_equal(
            keras.saving.load_model(tmp_path / "new.keras").layers[0].get_weights()[0], np.array(file["d/d_W:0"])
        )


def test_to_torch(chain, tmp_path):
    assert command(chain, "-o", tmp_path / "new.keras").exit_code == 0
    for source in (chain, tmp_path / "new.keras"):
        result = command(source, "--to", "torch", "-o", tmp_path / "new.safetensors")
        assert result.exit_code == 0, result.output
        with h5py.File(chain) as file:
            kernel = np.array(file["model_weights/first/first_W:0"])
        np.testing.assert_array_equal(load_file(tmp_path / "new.safetensors")["first.weight"], kernel.T)
