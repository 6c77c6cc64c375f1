"""Learner(compile=...): one compilation for each mode, no graph breaks, the same names and numbers as without."""

import copy

import pytest
import torch
from torch import nn

from nbdev_trainer import ActivationStatistics, Learner, NonFinite, NonFiniteError, compile_model, uncompile_model
from nbdev_trainer.testing import assert_same_weights, tiny_loaders, tiny_model


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


class Counting:
    """A backend that compiles nothing and counts what it is given."""

    def __init__(self):
        self.graphs = 0

    def __call__(self, graph, example_inputs):
        self.graphs += 1
        return graph.forward


class Written(nn.Module):
    """A model as a user writes it, with a forward of its own and no randomness."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body, self.norm, self.head = nn.Linear(4, 8, bias=False), nn.BatchNorm1d(8), nn.Linear(8, 3)

    def forward(self, inputs):
        return self.head(torch.tanh(self.norm(self.body(inputs))))


def fit(model, n=2, compile=False, **options):
    torch.manual_seed(0)
    learner = Learner(model, tiny_loaders(), compile=compile, verbose=0, seed=0, **options)
    learner.fit(n)
    return learner


@pytest.mark.parametrize("make", [Written, tiny_model], ids=["a class of one's own", "nn.Sequential"])
@pytest.mark.parametrize("options", [{}, {"accumulate": 2, "clip_norm": 0.5}, {"precision": "bf16"}],
                         ids=["plain", "accumulated and clipped", "bf16"])
def test_a_fit_compiles_three_times_and_never_breaks_the_graph(make, options):
    backend = Counting()
    learner = fit(make(), compile={"backend": backend, "fullgraph": True}, **options)
    assert backend.graphs == 3  # training, any number of samples, evaluation
    learner.fit(1)
    learner.predict()
    learner.validate()
    assert backend.graphs == 3
    assert not torch._dynamo.utils.counters["graph_break"]


def test_dynamo_explains_the_model_of_a_learner_without_breaks():
    model = Written()
    explained = torch._dynamo.explain(lambda inputs: model(inputs))(torch.randn(6, 4))
    assert (explained.graph_break_count, explained.graph_count) == (0, 1)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_weights_are_those_of_the_plain_model(backend):
    plain, compiled = fit(Written()), fit(Written(), compile={"backend": backend})
    assert_same_weights(plain.model, compiled.model, tolerance=1e-5)
    assert torch.allclose(plain.predict().predictions, compiled.predict().predictions, atol=1e-5)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, when it loads its compiler
def test_inductor_gives_the_same_numbers():
    plain, compiled = (Learner(Written(), (tiny_loaders(batch_size=11).train, None), compile=compile, verbose=0)
                       for compile in (False, {"fullgraph": True}))  # one shape, one mode: compiled once
    for learner in (plain, compiled):
        learner.fit(2)
    assert_same_weights(plain.model, compiled.model, tolerance=1e-5)
    assert compiled.model._compiled_call_impl is not None


def test_names_files_and_copies_are_those_of_the_plain_model(tmp_path):
    learner = fit(Written(), compile={"backend": "eager"})
    assert list(learner.model.state_dict()) == list(Written().state_dict())
    learner.save(tmp_path / "model.safetensors")
    plain = Learner(Written(), tiny_loaders(), verbose=0)
    plain.load(tmp_path / "model.safetensors")
    assert_same_weights(plain.model, learner.model)
    twin = copy.deepcopy(learner.model)
    assert twin._compiled_call_impl is None and learner.model._compiled_call_impl is not None
    assert_same_weights(twin, learner.model)


def test_swapped_weights_are_used_without_compiling_again():
    backend = Counting()
    learner = fit(Written(), compile={"backend": backend})
    other = Written()
    learner.model.load_state_dict(other.state_dict())
    with torch.no_grad():
        for p, q in zip(learner.model.parameters(), other.parameters()):
            p.data = q.data * 2
            q.mul_(2)
    expected = Learner(other, tiny_loaders(), verbose=0).predict().predictions
    assert torch.allclose(learner.predict().predictions, expected, atol=1e-6)
    assert backend.graphs == 3


def test_tools_that_need_hooks_run_the_model_as_it_is_written():
    backend, statistics = Counting(), ActivationStatistics(every=4)
    learner = fit(Written(), compile={"backend": backend}, callbacks=[statistics])
    assert {row["module"] for row in statistics.rows} == {"body", "norm", "head"}
    graphs = backend.graphs
    assert "body" in str(learner.summary())
    learner.check(), learner.dry_run(1), learner.overfit(1, steps=3)
    assert backend.graphs == graphs == 3 and learner.model._compiled_call_impl is not None
    broken = Written()
    broken.body.register_forward_hook(lambda module, args, output: output * float("nan"))
    with pytest.raises(NonFiniteError, match="Module 'body'"):
        fit(broken, compile={"backend": "eager"}, callbacks=[NonFinite()])
    assert broken._compiled_call_impl is not None


def test_a_model_can_be_run_as_it_is_written_again():
    backend = Counting()
    learner = fit(Written(), compile={"backend": backend})
    uncompile_model(learner.model)
    learner.fit(1)
    assert (backend.graphs, learner.model._compiled_call_impl) == (3, None)


def test_a_graph_break_of_the_model_is_an_error_where_that_is_asked_for():
    class Reads(Written):
        def forward(self, inputs):
            return super().forward(inputs) if inputs.sum().item() > -1e9 else inputs

    with pytest.raises((torch._dynamo.exc.Unsupported, torch._dynamo.exc.UserError)):
        fit(Reads(), compile={"backend": "eager", "fullgraph": True})
    fit(Reads(), compile={"backend": "eager"})  # else it is cut in two there


def test_what_is_missing_is_said_before_the_model_is_touched(monkeypatch):
    monkeypatch.setenv("CXX", "/nowhere/c++")
    with pytest.raises(RuntimeError, match=r"compile= needs a C\+\+ compiler \(looked for /nowhere/c\+\+\)"):
        Learner(model := Written(), tiny_loaders(), compile=True, verbose=0)
    assert model._compiled_call_impl is None
    Learner(Written(), tiny_loaders(), compile={"backend": "aot_eager"}, verbose=0)
    with pytest.raises(TypeError, match="Did you mean 'backend'"):
        Learner(Written(), tiny_loaders(), compile={"backends": "eager"}, verbose=0)


def test_not_asked_for_nothing_is_compiled():
    model = fit(Written()).model
    compile_model(model, False)
    assert model._compiled_call_impl is None and not torch._dynamo.utils.counters["stats"]
