import json

import pytest

from fluidscale import inputs
from fluidscale.spec import ARMS, InvalidInput
from fluidscale.sweep import load_sweep


def write(tmp_path, body: str) -> str:
    """A sweep file of the user's own beside a copy of the shared recipe."""
    from fluidscale.sweep import SWEEPS

    (tmp_path / "recipe.yaml").write_text((SWEEPS / "recipe.yaml").read_text())
    path = tmp_path / "mine.yaml"
    path.write_text("extends: recipe\n" + body)
    return str(path)


# The recipe gives raster order a rate of its own, which a file's defaults do not reach.
GOOD = "sizes: [50K]\narms: [discrete-random]\nimages: [8192]\n"
OBJECTIVE = (
    "sizes: [50K]\narms: [continuous-raster]\nimages: [8192]\n"
    "by_token_kind: {{continuous: {{model: {{head: {{objective: {}}}}}}}}}\n"
)


def test_local_is_four_arms_by_five_sizes_by_three_data_sizes():
    sweep = load_sweep("local")
    assert {run.arm for run in sweep.runs} == set(ARMS)
    assert len(sweep.runs) == 4 * 5 * 3 and len({run.id for run in sweep.runs}) == 60
    assert len({run.trunk_id for run in sweep.runs}) == 20
    assert not sweep.partial


def test_only_the_largest_data_size_is_evaluated_in_full():
    runs = load_sweep("local", arms=["continuous-random"]).runs
    for run in runs:
        assert (run.evaluate.fd_images > 0) == (run.images == max(run.images for run in runs))


def test_filters_keep_what_they_name_and_say_so():
    sweep = load_sweep("local", sizes=["50K", "930K"], arms=["discrete-random"])
    assert {run.size for run in sweep.runs} == {"50K", "930K"} and sweep.partial
    assert not load_sweep("local", sizes=["all"], arms=["all"]).partial


def test_every_shipped_sweep_resolves():
    from fluidscale.sweep import SWEEPS

    for path in SWEEPS.glob("*.yaml"):
        if path.stem not in ("recipe", "sizes", "worlds"):
            assert load_sweep(path.stem).runs


def test_a_tokenizer_that_is_named_and_trained_takes_the_place_of_what_was_planned(tmp_path, monkeypatch):
    """A sweep plans with nothing trained, cannot start so, and takes the networks once they are there."""
    monkeypatch.setattr(inputs, "CARDS", tmp_path)
    sweep = load_sweep("icons", sizes=["500K"])
    assert all(run.tokenizer_sha256 == "" and run.model.num_tokens == 64 for run in sweep.runs)
    with pytest.raises(InvalidInput, match=r"fluidscale.pretrain vae --world icons64"):
        sweep.require_data()
    cards = {"kind": "continuous", "grid": 8, "channels": 8, "vocab_size": 0, "sha256": "a" * 64}
    (tmp_path / "icons64-vae.json").write_text(json.dumps(cards))
    run, *_ = load_sweep("icons", sizes=["500K"], arms=["continuous-random"]).runs
    assert run.tokenizer_sha256 == "a" * 64 and run.data.images_unique >= 3_000_000
    (tmp_path / "icons64-vae.json").write_text(json.dumps({**cards, "channels": 16}))
    with pytest.raises(InvalidInput, match="icons64-vae has channels 16, the sweep asks for 8"):
        load_sweep("icons", sizes=["500K"], arms=["continuous-random"])


def test_each_size_may_have_seeds_of_its_own(tmp_path):
    body = "sizes: [50K, 80K]\narms: [discrete-raster]\nimages: [8192]\nseeds: {50K: [0, 1, 2], 80K: [0]}\n"
    runs = load_sweep(write(tmp_path, body)).runs
    assert sorted((run.size, run.seed) for run in runs) == [("50K", 0), ("50K", 1), ("50K", 2), ("80K", 0)]


def test_a_size_may_differ_from_its_row(tmp_path):
    body = "sizes: [50K, 80K]\narms: [discrete-raster]\nimages: [8192]\nby_size: {80K: {model: {num_heads: 2}}}\n"
    runs = load_sweep(write(tmp_path, body)).runs
    rows = {run.size: run.model.num_heads for run in load_sweep("local", sizes=["50K", "80K"]).runs}
    assert {run.size: run.model.num_heads for run in runs} == {**rows, "80K": 2} != rows


def test_more_seeds_keep_what_the_ladder_has_run():
    assert {run.id for run in load_sweep("local").runs} < {run.id for run in load_sweep("seeds").runs}


def test_a_dotted_key_varies(tmp_path):
    runs = load_sweep(
        write(tmp_path, GOOD + "vary: {train.weight_decay: [0, 0.1], model.aligner_depth: [0, 1]}\n")
    ).runs
    assert {(run.train.weight_decay, run.model.aligner_depth) for run in runs} == {(0, 0), (0, 1), (0.1, 0), (0.1, 1)}


def test_the_rate_falls_with_width_where_a_width_is_named_for_it(tmp_path):
    rates = {run.size: run.train.lr for run in load_sweep("local", arms=["discrete-random"]).runs}
    assert rates["930K"] == 2e-3 and rates["50K"] == pytest.approx(2e-3 * 96 / 16)
    (own,) = load_sweep(write(tmp_path, GOOD + "defaults: {train: {lr: 1.0e-3, lr_width: 16}}\n")).runs
    assert own.train.lr == 1e-3


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("sizes: [50k]\nimages: [8192]\n", r"sizes: unknown key '50k'; did you mean '50K'"),
        (GOOD + "defaults: {train: {learning_rate: 1}}\n", r"train: unknown key 'learning_rate'"),
        (GOOD + "seed: [1]\n", r"mine.yaml: unknown key 'seed'; did you mean 'seeds'"),
        (GOOD + "seeds: {80K: [0]}\n", r"seeds: no list for size 50K; it has: 80K"),
        (GOOD + "seeds: 3\n", r"seeds: expected a list of numbers, or one for each size, got 3"),
        (GOOD + "vary: {train.lrs: [1]}\n", r"unknown key 'lrs'; did you mean 'lr'"),
        (GOOD + "defaults: {model: {num_heads: 3}, train: {lr: -1}}\n", r"lr .*must be positive"),
        (GOOD + "defaults: {train: {lr_vectors: 0}}\n", r"lr_vectors, where given.*must be positive"),
        ("sizes: [50K]\nimages: [1000]\n", r"1000 is not a multiple of the batch 64"),
        ("sizes: [50K]\nimages: [128]\n", r"2 steps cannot hold 60 of warm-up"),
        (GOOD + "defaults: {data: {world: icons33}}\n", r"unknown key 'icons33'; did you mean 'icons32'"),
        (GOOD + "by_token_kind: {discrete: {tokenizer: nothing}}\n", r"no tokenizer 'nothing'"),
        (
            GOOD + "by_order: {rondom: {model: {mask_law: mar}}}\n",
            r"by_order: unknown key 'rondom'; did you mean 'random'",
        ),
        (GOOD + "by_order: random\n", r"by_order: expected keys and values, got 'random'"),
        (GOOD + "by_size: {50k: {model: {num_heads: 2}}}\n", r"by_size: unknown key '50k'; did you mean '50K'"),
        (GOOD + "by_order: {random: {model: {mask_law: none}}}\n", r"mask_law 'none' is not for random"),
        (GOOD + "by_token_kind: {discrete: {tokenizer: icons32-vae}}\n", r"cannot use the continuous tokenizer"),
        (OBJECTIVE.format("v"), r"solver 'euler' does not draw this head's tokens; choose from ddim, dpmpp_2m"),
        (OBJECTIVE.format("x"), r"model.head.objective 'x': choose from eps, v, flow"),
        (GOOD + "defaults: {evaluate: {sampling: {solver: euler}}}\n", r"solver 'euler' .*choose from none"),
        ("sizes: [50K\n", "not readable as YAML"),
        ("arms: [discrete]\nsizes: [50K]\nimages: [8192]\n", "arms: unknown key 'discrete'"),
    ],
)
def test_what_does_not_fit_is_one_clear_line(tmp_path, body, message):
    with pytest.raises(InvalidInput, match=message) as caught:
        load_sweep(write(tmp_path, body))
    assert "\n" not in str(caught.value)


def test_a_width_that_heads_do_not_divide_is_refused(tmp_path):
    with pytest.raises(InvalidInput, match="width 16 is not divisible by num_heads 3"):
        load_sweep(write(tmp_path, GOOD + "vary: {model.num_heads: [3]}\n"))


@pytest.mark.parametrize(("sizes", "arms"), [(["2M"], None), (None, ["continuous"])])
def test_an_unknown_filter_lists_what_there_is(sizes, arms):
    with pytest.raises(InvalidInput, match="it has: "):
        load_sweep("local", sizes, arms)


def test_an_unknown_sweep_names_the_nearest():
    with pytest.raises(InvalidInput, match="did you mean 'local'"):
        load_sweep("locol")
