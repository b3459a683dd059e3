"""A model that was exported to .pt2 and read again: its layers, their names and modes, and its outputs in both modes."""

import copy
import io
import json
import zipfile
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

from evennorm.errors import InputError
from evennorm.tools.check import check
from evennorm.tools.fold import fold
from evennorm.tools.models import open_model
from evennorm.tools.programs import open_program
from evennorm.tools.recalibrate import recalibrate
from evennorm.torch import place
from evennorm.torch.exported.operations import operation
from evennorm.torch.exported.values import UnreadError
from evennorm.torch.placement import sites

BATCH = ({0: torch.export.Dim("batch")},)


class Block(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.bn = nn.BatchNorm2d(channels)
        self.act = nn.ReLU(inplace=True)

    def forward(self, x):
        y = self.bn(self.conv(x))
        y += x
        return self.act(y)


class Net(nn.Module):
    """Modules and functions, a block that is called twice, layers made in another order than they are called."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(4, 3)
        self.stem = nn.Conv2d(2, 4, 3)
        self.blocks = nn.Sequential(Block(4), Block(4))
        self.norm = nn.GroupNorm(2, 4)
        self.drop = nn.Dropout(0.4)
        self.slope = nn.PReLU()
        self.register_buffer("scale", torch.full((4,), 0.5))

    def forward(self, x):
        x = F.leaky_relu(self.stem(x), 0.2)
        x = self.blocks[0](self.blocks(x))
        x = self.slope(F.max_pool2d(self.norm(x), 2))
        x = F.dropout(x, 0.3, self.training).mean((2, 3)) * self.scale
        return self.head(self.drop(x.view(x.size(0), -1)))


def exported(model, path, *inputs, shapes=BATCH):
    program = torch.export.export(model, inputs or (torch.randn(3, 2, 8, 8),), dynamic_shapes=shapes)
    torch.export.save(program, path)
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("programs")


@pytest.fixture(scope="module")
def original():
    torch.manual_seed(0)
    model = Net()
    model(torch.randn(16, 2, 8, 8))  # moves the statistics
    return model


@pytest.fixture(scope="module", params=["evaluation", "training"])
def rebuilt(request, original, folder):
    path = exported(original.train(request.param == "training"), folder / f"{request.param}.pt2")
    return open_program(path)


def test_outputs_and_gradients_are_the_models_in_both_modes(original, rebuilt):
    x = torch.randn(5, 2, 8, 8)
    for training in (False, True):
        found = []
        for model in (original, rebuilt.model):
            torch.manual_seed(1)  # of dropout
            model.train(training).zero_grad()
            y = model(x)
            y.square().sum().backward()
            found.append((y, model.get_parameter("stem.weight").grad, model.get_buffer("blocks.0.bn.running_mean").clone()))
        torch.testing.assert_close(found[0], found[1])
    assert int(rebuilt.model.get_buffer("blocks.0.bn.num_batches_tracked")) == int(original.blocks[0].bn.num_batches_tracked)


def test_layers_have_the_models_names_and_the_rest_names_of_their_own(original, rebuilt):
    assert set(original.state_dict()) == set(rebuilt.model.state_dict())
    kinds = {name: type(module).__name__ for name, module in rebuilt.model.named_modules() if not [*module.children()]}
    wanted = {name: type(module).__name__ for name, module in original.named_modules() if not [*module.children()]}
    assert kinds == wanted | {"leaky_relu": "LeakyReLU", "dropout": "Dropout"}
    assert rebuilt.model.get_submodule("leaky_relu").negative_slope == 0.2
    assert rebuilt.model.get_submodule("dropout").p == 0.3
    assert type(rebuilt.model).__name__ == "Net"
    assert rebuilt.undrawn == {}
    # In the order in which the model's code makes them.
    assert [name for name in rebuilt.drawn if "." not in name] == ["head", "stem", "norm", "slope"]


def test_placements_are_those_of_the_model(original, rebuilt):
    wanted = [site.name for site in sites(original.eval(), input_shape=(2, 8, 8)) if site.is_activation]
    found = [site.name for site in sites(rebuilt.model, input_shape=(2, 8, 8)) if site.is_activation]
    assert found == ["leaky_relu" if name == ":leaky_relu" else name for name in wanted]
    x = torch.randn(4, 2, 8, 8)
    for where in ("none", "before", "after", "input"):
        one, other = (place(model, where, input_shape=(2, 8, 8)).eval() for model in (original, rebuilt.model))
        torch.testing.assert_close(one(x), other(x))
        assert [m.num_features for m in one.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)] == [
            m.num_features for m in other.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)
        ]


def test_shared_weights_stay_shared_and_constants_are_kept(folder):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.head = nn.Embedding(7, 4), nn.Linear(4, 7, bias=False)
            self.head.weight = self.embedding.weight

        def forward(self, x):
            return self.head(torch.tanh(self.embedding(x)).mean(1) * torch.tensor(0.5))

    model, x = Tied(), torch.arange(6).reshape(2, 3)
    found = open_program(exported(model.eval(), folder / "tied.pt2", x)).model
    assert found.get_parameter("head.weight") is found.get_parameter("embedding.weight")
    torch.testing.assert_close(found(x), model(x))


LAYERS = {
    "conv transpose": (nn.ConvTranspose1d(4, 6, 3, stride=2, output_padding=1, groups=2, dilation=2), (2, 4, 5)),
    "conv same": (nn.Conv3d(2, 2, 3, padding="same", bias=False), (2, 2, 3, 3, 3)),
    "batch norm": (nn.BatchNorm1d(4, momentum=None, eps=1e-3), (2, 4)),
    "batch norm without weights": (nn.BatchNorm3d(2, affine=False), (2, 2, 2, 2, 2)),
    "batch statistics alone": (nn.BatchNorm2d(2, track_running_stats=False), (2, 2, 3, 3)),
    "layer norm": (nn.LayerNorm((3, 4), bias=False), (2, 3, 4)),
    "rms norm": (nn.RMSNorm(4), (2, 4)),
    "instance norm": (nn.InstanceNorm2d(3, affine=True), (2, 3, 4, 4)),
    "activations": (nn.Sequential(nn.ReLU6(), nn.GELU("tanh"), nn.ELU(0.5), nn.Softplus(2), nn.Hardtanh(-2, 2)), (2, 4)),
    "scores": (nn.Sequential(nn.Hardswish(inplace=True), nn.LogSoftmax(-1)), (2, 4)),
    "dropouts": (nn.Sequential(nn.Dropout2d(0.2), nn.AlphaDropout(0.1), nn.Dropout3d(0.3)), (2, 3, 4, 4)),
    "attention": (nn.TransformerEncoderLayer(4, 2, 8, batch_first=True), (2, 3, 4)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_layers_of_every_kind(name, folder):
    layer, shape = LAYERS[name]
    model = nn.Sequential(layer, nn.Identity()).eval()
    x = torch.randn(shape)
    found = open_program(exported(model, folder / f"{name}.pt2", x)).model
    torch.testing.assert_close(found(x.clone()), model(x.clone()))
    if name not in ("dropouts", "attention"):
        wanted = {str(module) for module in model.modules() if not [*module.children()]} - {"Identity()"}
        assert {str(module) for module in found.modules() if not [*module.children()]} == wanted


def test_a_layer_that_held_an_activation_of_its_own(folder):
    class NormAct(nn.BatchNorm2d):
        """As timm's, whose activation is a module inside the normalization."""

        def __init__(self, channels):
            super().__init__(channels)
            self.act = nn.ReLU()

        def forward(self, x):
            return self.act(super().forward(x))

    model = nn.Sequential(nn.Conv2d(2, 4, 3), NormAct(4), nn.Flatten(), nn.Linear(16, 2)).eval()
    x = torch.randn(2, 2, 4, 4)
    found = open_program(exported(model, folder / "held.pt2", x)).model
    assert type(found.get_submodule("1")) is nn.BatchNorm2d
    assert type(found.get_submodule("1_act")) is nn.ReLU
    torch.testing.assert_close(found(x), model(x))
    assert "ReLU" in str(place(found, "none", input_shape=(2, 4, 4)))


@pytest.mark.parametrize("size", [1, 3])
def test_a_fixed_number_of_samples_where_others_work_too(size, folder):
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 2)).eval()
    found = open_program(exported(model, folder / f"fixed{size}.pt2", torch.randn(size, 2, 4, 4), shapes=None)).model
    x = torch.randn(5, 2, 4, 4)
    torch.testing.assert_close(found(x), model(x))


class View(nn.Linear):
    def forward(self, x):
        return super().forward(x.view(x.shape[0], -1))


class Token(nn.Linear):
    def __init__(self):
        super().__init__(4, 2)
        self.token = nn.Parameter(torch.ones(4))

    def forward(self, x):
        return super().forward(x * self.token)


class Noise(nn.Linear):
    def forward(self, x):
        return super().forward(x + torch.randn_like(x))


class Several(nn.Linear):
    def forward(self, x, y=None):
        return super().forward(x if y is None else x + y), x


class Scaled(nn.BatchNorm1d):
    def forward(self, x):
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight * 2, self.bias)


@pytest.mark.parametrize(
    ("model", "inputs", "shapes", "text"),
    [
        (View(4, 2), [(1, 2, 2)], None, r"exported for 1 sample and takes no other number; export it with dynamic_shapes="),
        (Noise(4, 2), [(2, 4)], BATCH, r"draws random numbers by aten.randn_like, in evaluation too"),
        (Several(4, 2), [(2, 4)], BATCH, r"models that return one tensor are read from a \.pt2 file"),
        (Several(4, 2), [(2, 4), (2, 4)], None, r"models of one input are read from a \.pt2 file; refused.pt2 has 2"),
        (Scaled(4), [(2, 4)], BATCH, r"batch normalization is read with weights of its own"),
    ],
)
def test_what_is_refused(model, inputs, shapes, text, folder):
    path = exported(model.eval(), folder / "refused.pt2", *(torch.randn(shape) for shape in inputs), shapes=shapes)
    refused(path, text)


def refused(path, text):
    with pytest.raises(InputError, match=text) as caught:
        open_program(path)
    assert "\n" not in str(caught.value)


def test_decomposed_programs_are_refused(folder):
    for layer, shape, operation_of in (
        (nn.Linear(4, 2), (2, 4), "addmm"),
        (nn.BatchNorm1d(4), (2, 4), "_native_batch_norm"),
    ):
        program = torch.export.export(layer.eval(), (torch.randn(shape),), dynamic_shapes=BATCH).run_decompositions()
        torch.export.save(program, folder / "core.pt2")
        refused(folder / "core.pt2", rf"by aten\.{operation_of}\w*, as after run_decompositions, where no dropout is left")


def test_parameters_of_no_layer_are_told(folder):
    found = open_program(exported(Token().eval(), folder / "token.pt2", torch.randn(2, 4)))
    assert found.undrawn == {"_token": "mul"} or found.undrawn == {"token": "mul"}
    assert [*found.drawn] == ["linear"]
    assert not found.model.training


def changed(path, member, change):
    """Return the content of a program's file with one JSON document changed."""
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    [name] = [each for each in members if each.endswith(member)]
    document = json.loads(members[name])
    change(document)
    members[name] = json.dumps(document).encode()
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        for each, value in members.items():
            archive.writestr(each, value)
    return content.getvalue()


@pytest.fixture(scope="module")
def small(folder):
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 2), nn.ReLU()).eval()
    return exported(model, folder / "small.pt2", torch.randn(2, 4))


def last_node(**values):
    return "models/model.json", lambda document: document["graph_module"]["graph"]["nodes"][-1].update(values)


def weight(meta=None, **values):
    def change(document):
        entry = document["config"]["1.weight"]
        entry.update(values)
        entry["tensor_meta"].update(meta or {})

    return "weights/model_weights_config.json", change


def sizes(*numbers):
    return [{"as_int": each} for each in numbers]


FOREIGN = "none of torch's own on tensors"
HOSTILE = {
    "a function of the system": (last_node(target="torch.os.system"), "it holds the operation 'torch.os.system', which is"),
    "an operation that writes": (last_node(target="torch.ops.aten.save.default"), FOREIGN),
    "a file as memory": (last_node(target="torch.ops.aten.from_file.default"), FOREIGN),
    "another library's": (last_node(target="torch.ops.torchvision.nms.default"), FOREIGN),
    "more than memory": (
        last_node(inputs=[{"name": "shape", "arg": {"as_ints": [10**6, 10**6]}, "kind": 1}]),
        "asks for 1,000,000,000,000 values",
    ),
    "a graph in an argument": (
        last_node(inputs=[{"name": "x", "arg": {"as_graph": {}}, "kind": 1}]),
        "it holds an argument of kind graph; give module:function",
    ),
    "a newer schema": (
        ("models/model.json", lambda document: document["schema_version"].update(major=9)),
        "small.pt2 has version 9, of torch",
    ),
    "no graph": (("models/model.json", lambda document: document.pop("graph_module")), r"is no whole program .*KeyError"),
    "a name twice": (last_node(name="b\nc", outputs=[{"as_tensor": {"name": "input"}}]), "it holds the name 'input' twice"),
    "a pickle": (weight(use_pickle=True), "holds '1.weight' as a pickle, which runs whatever its author wrote"),
    "an object": (weight(path_name="opaque_obj_0"), "holds '1.weight' as a pickle"),
    "no such values": (weight(path_name="weight_9"), "is no whole program"),
    "ten billion values": (weight({"sizes": sizes(10**5, 10**5), "strides": sizes(0, 0)}), "as bombs do"),
    "more than is stored": (weight({"sizes": sizes(9, 4)}), "is no whole program"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files(name, small, tmp_path):
    (member, change), text = HOSTILE[name]
    (tmp_path / "small.pt2").write_bytes(changed(small, member, change))
    refused(tmp_path / "small.pt2", text)


def test_expressions_and_guards_are_not_evaluated(small, tmp_path):
    """torch.export.load evaluates both."""

    def poison(document):
        document["guards_code"] = ["raise_alarm()"]
        size = document["graph_module"]["graph"]["tensor_values"]["input"]["sizes"][0]
        size["as_expr"]["expr_str"] = "raise_alarm()"

    (tmp_path / "small.pt2").write_bytes(changed(small, "models/model.json", poison))
    x = torch.randn(3, 4)
    torch.testing.assert_close(open_program(tmp_path / "small.pt2").model(x), open_program(small).model(x))


def test_names_that_break_code(small, tmp_path):
    """A name becomes code of torch.fx."""
    name = '1.a")\nraise SystemExit'

    def rename(document):
        document["config"][name] = document["config"].pop("1.weight")

    def refer(document):
        spec = document["graph_module"]["signature"]["input_specs"][0]["parameter"]
        assert spec["parameter_name"] == "1.weight"
        spec["parameter_name"] = name

    path = tmp_path / "small.pt2"
    path.write_bytes(changed(small, "models/model.json", refer))
    path.write_bytes(changed(path, "weights/model_weights_config.json", rename))
    refused(path, "names of layers into code")


@pytest.mark.parametrize(
    ("members", "text"),
    [
        ({"version": b"8.1", "serialized_exported_program.json": b"{}"}, "was written by torch before 2.8"),
        ({"a/data/aotinductor/model/x.so": b""}, "is compiled for one machine, and no layers are left in it"),
        ({"a.txt": b""}, "holds one program, as torch.export.save writes it; .*other.pt2 holds a.txt"),
        ({"a/models/a.json": b"{}", "a/models/b.json": b"{}", "a/archive_format": b"pt2"}, "holds 2 programs"),
        ({"a/models/a.json": b"[" * 100_000}, "is no whole program of torch.export"),
        ({"a/models/a.json": b"{}", "a/byteorder": b"big"}, "the other byte order"),
    ],
)
def test_other_zip_files(members, text, tmp_path):
    with zipfile.ZipFile(tmp_path / "other.pt2", "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    refused(tmp_path / "other.pt2", text)


def test_files_that_are_absent_cut_short_or_no_zip(small, tmp_path):
    path = tmp_path / "a.pt2"
    refused(path, "there is no model file .*a.pt2; save one by torch.export.save")
    for content in (small.read_bytes()[:1000], b"PK", b"\x80\x02", b""):
        path.write_bytes(content)
        refused(path, "is no whole program of torch.export")


def test_the_commands_take_programs(original, folder, tmp_path, monkeypatch):
    """Also under another name, and what fold writes of them; the outputs stay."""
    monkeypatch.chdir(tmp_path)
    path = exported(original.eval(), folder / "commands.pt2")
    opened = open_model(path)
    assert (opened.framework, opened.name, opened.path) == ("torch", "commands.pt2", path)
    assert {(each.code, each.layer) for each in check(path).findings} == {
        (each.code, each.layer) for each in check(original.eval()).findings
    }
    report = fold(path, "folded.pt2", input_shape=[(2, 8, 8)], measure=False)
    wanted = fold(original, input_shape=[(2, 8, 8)], measure=False)
    assert [(each.layer, each.outcome) for each in report.layers] == [(each.layer, each.outcome) for each in wanted.layers]
    x = torch.randn(3, 2, 8, 8)
    torch.testing.assert_close(open_model("folded.pt2").model(x), opened.model(x), atol=1e-5, rtol=1e-4)
    Path("other.zip").write_bytes(path.read_bytes())
    assert open_model("other.zip").framework == "torch"
    moved = copy.deepcopy(original)
    recalibrate(opened, x.numpy())
    recalibrate(moved, x.numpy())
    for name in ("blocks.0.bn.running_var", "blocks.1.bn.running_mean"):
        torch.testing.assert_close(opened.model.get_buffer(name), moved.get_buffer(name))
        assert not torch.equal(opened.model.get_buffer(name), original.get_buffer(name))


def test_names_of_operations():
    assert operation("torch.ops.aten.add.Tensor") is torch.ops.aten.add.Tensor
    assert operation("_operator.floordiv")(7, 2) == 3
    for name in (
        "torch.ops.aten.add",
        "torch.ops.aten.__init__.x",
        "torch.ops.aten._print.default",
        "_operator.methodcaller",
    ):
        with pytest.raises(UnreadError):
            operation(name)


class Positions(nn.Module):
    def __init__(self):
        super().__init__()
        self.out = nn.Linear(4, 2)

    def forward(self, x):
        return self.out(x + torch.arange(x.shape[1], device=x.device) * torch.ones((), device="cpu").to(x))


def test_tensors_are_made_on_the_device_of_the_input(folder):
    model = Positions()
    opened = open_program(exported(model, folder / "positions.pt2", torch.randn(3, 4))).model
    x = torch.randn(5, 4)
    torch.testing.assert_close(opened(x), model(x))
    assert opened.to("meta")(x.to("meta")).is_meta
