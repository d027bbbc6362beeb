import json

import pytest

from fluidscale import inputs
from fluidscale.spec import ARMS, InvalidInput
from fluidscale.sweep import SWEEPS, load_sweep, read_yaml


def write(tmp_path, body: str) -> str:
    """A sweep file of the user's own beside a copy of the shared recipe."""
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


@pytest.mark.parametrize(
    ("world", "evaluate", "message"),
    [
        ("{name: mine, world: mine.yaml}", "{fd_images: 0}", r"real: no mine-detector, .*pretrain detector"),
        (
            "{name: mine, world: mine.yaml}",
            "{geneval_images_per_prompt: 0}",
            r"real: no mine-features, .*pretrain feat",
        ),
        ("{name: icons32, world: mine.yaml}", "{}", r"icons32-detector does not know the classes bus, dog; train one"),
    ],
)
def test_a_world_that_its_judges_do_not_know_is_planned_and_not_started(
    tmp_path, monkeypatch, world, evaluate, message
):
    monkeypatch.chdir(tmp_path)
    row = read_yaml(SWEEPS / "worlds.yaml")["icons32"]
    (tmp_path / "mine.yaml").write_text(json.dumps({**row, "classes": ["cat", "dog", "bus"]}))
    body = f"extends: {SWEEPS}/smoke\nimages: [8192]\nsizes: [50K]\narms: [discrete-raster]\n"
    body += f"defaults: {{data: {world}, evaluate: {evaluate}}}\n"
    (tmp_path / "real.yaml").write_text(body)
    sweep = load_sweep("real.yaml")
    with pytest.raises(InvalidInput, match=message):
        sweep.require_data()


def test_a_world_of_another_resolution_than_its_tokenizer_is_refused_when_planned(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    row = read_yaml(SWEEPS / "worlds.yaml")["icons32"]
    (tmp_path / "mine.yaml").write_text(json.dumps({**row, "resolution": 40}))
    body = "extends: smoke\nsizes: [50K]\narms: [discrete-raster]\ndefaults: {data: {world: mine.yaml}}\n"
    (tmp_path / "large.yaml").write_text(body)
    with pytest.raises(
        InvalidInput, match="tokenizer icons32-vq is of pictures of 32 px, the world's have 40; train this world's own"
    ):
        load_sweep("large.yaml")


def test_what_is_extended_lies_beside_the_sweep_or_is_shipped(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("extends: smoke\nsizes: [50K]\n")
    shipped = load_sweep("smoke", sizes=["50K"]).runs
    assert [run.id for run in load_sweep(str(path)).runs] == [run.id for run in shipped]
    (tmp_path / "smoke.yaml").write_text(f"extends: {SWEEPS}/smoke\nseeds: [7]\n")
    assert {run.seed for run in load_sweep(str(path)).runs} == {7}
    path.write_text("extends: smokes\n")
    with pytest.raises(
        InvalidInput, match=r"mine.yaml: extends: no smokes.yaml beside it, nor shipped: .*did you mean 'smoke'"
    ):
        load_sweep(str(path))


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
        (GOOD + "defaults: {model: {num_heads: 3}, train: {lr: -1}}\n", r"train: lr: expected above 0, got -1"),
        (GOOD + "defaults: {train: {lr_vectors: 0}}\n", r"train: lr_vectors: expected above 0, got 0"),
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
        (OBJECTIVE.format("x"), r"model: head: objective: unknown 'x'; .*known: eps, v, flow"),
        (GOOD + "defaults: {evaluate: {sampling: {solver: euler}}}\n", r"solver 'euler' .*choose from none"),
        ("sizes: [50K\n", "not readable as YAML"),
        ("arms: [discrete]\nsizes: [50K]\nimages: [8192]\n", "arms: unknown key 'discrete'"),
        ("sizes: [50K]\nimages: [80K]\n", r"images\[0\]: expected a whole number, got '80K'"),
        ("sizes: [50K]\nimages: [8192, 8192.7]\n", r"images\[1\]: expected a whole number, got 8192.7"),
        ("sizes: [50K]\nimages: [-64]\n", r"images\[0\]: expected at least 1, got -64"),
        ("sizes: [50K]\nimages: 4096\n", r"images: expected a list, got 4096"),
        ("sizes: [50K]\nimages: null\n", r"images: expected a list, got None"),
        ("sizes: [50K]\n", r"no runs; .*`images` must each list at least one value"),
        (GOOD + "seeds: [a]\n", r"seeds\[0\]: expected a whole number, got 'a'"),
        (GOOD + "seeds: [1.5]\n", r"seeds\[0\]: expected a whole number, got 1.5"),
        (GOOD + "seeds: {50k: [0], 50K: [0]}\n", r"seeds: unknown key '50k'; did you mean '50K'"),
        (GOOD + "defaults: 3\n", r"defaults: expected keys and values, got 3"),
        (GOOD + "defaults: {trian: {lr: 1}}\n", r"defaults: unknown key 'trian'; did you mean 'train'"),
        (GOOD + "defaults: {model: 3}\n", r"defaults: model: expected keys and values, got 3"),
        (GOOD + "defaults: {train: 3}\n", r"defaults: train: expected keys and values, got 3"),
        (GOOD + "defaults: {data: 3}\n", r"defaults: data: expected keys and values, got 3"),
        (GOOD + "defaults: {evaluate: [1]}\n", r"defaults: evaluate: expected keys and values, got \[1\]"),
        (GOOD + "defaults: {evaluate: {sampling: 3}}\n", r"evaluate: sampling: expected keys and values, got 3"),
        (GOOD + "defaults: {evaluate: {judges: [foo]}}\n", r"evaluate: judges: it follows from the section `judges`"),
        (GOOD + "defaults: {train: {batch: 0}}\n", r"train: batch: expected at least 1, got 0"),
        (GOOD + "defaults: {train: {lr: fast}}\n", r"train: lr: expected a number, got 'fast'"),
        (GOOD + "defaults: {train: {lr: .nan}}\n", r"train: lr: expected a number, got nan"),
        (GOOD + "defaults: {train: {lr_width: 0}}\n", r"train: lr_width: expected above 0, got 0"),
        (GOOD + "defaults: {train: {lr_vectors: fast}}\n", r"train: lr_vectors: expected a number, got 'fast'"),
        (GOOD + "defaults: {train: {decay_fraction: 2}}\n", r"train: decay_fraction: .*at most 1, got 2"),
        (GOOD + "defaults: {train: {decay_head: 'no'}}\n", r"train: decay_head: expected true or false, got 'no'"),
        (GOOD + "defaults: {train: {3: 4}}\n", r"train: unknown key '?3"),
        (GOOD + "defaults: {data: {world: 3}}\n", r"data: world: expected keys and values, got 3"),
        (GOOD + "vary: {model.num_heads: [0]}\n", r"model: num_heads: expected at least 1, got 0"),
        (GOOD + "vary: {model.width: [wide]}\n", r"model: width: expected a whole number, got 'wide'"),
        (GOOD + "vary: {model.encoder_depth: [99]}\n", r"encoder_depth 99 leaves no block for the decoder"),
        (GOOD + "vary: {evaluate.sampling.num_inference_steps: [64]}\n", r"num_inference_steps must be 1 to 16"),
        (GOOD + "vary: {train: [1]}\n", r"train: expected keys and values, got 1"),
        (GOOD + "vary: {train.lr: [1], train: [{}]}\n", r"vary: train.lr is a part of train"),
        (GOOD + "vary: [a]\n", r"vary: expected keys and values, got \['a'\]"),
        (GOOD + "only: [50K]\n", r"only: expected keys and values, got \['50K'\]"),
        (GOOD + "only: {50k: [discrete-random]}\n", r"only: unknown key '50k'; did you mean '50K'"),
        (GOOD + "judges: [clip]\n", r"judges: expected keys and values, got \['clip'\]"),
        (GOOD + "by_size: {50K: 3}\n", r"by_size: 50K: expected keys and values, got 3"),
        (GOOD + "smaller_images: 3\n", r"smaller_images: expected keys and values, got 3"),
    ],
)
def test_what_does_not_fit_is_one_clear_line(tmp_path, body, message):
    with pytest.raises(InvalidInput, match=message) as caught:
        load_sweep(write(tmp_path, body))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("extends", "message"),
    [("mine", r"mine.yaml: extends: it comes back to .*mine.yaml"), ("[recipe]", r"extends: expected a text"),
     ("nothing", r"extends: no nothing.yaml beside it")],
)  # fmt: skip
def test_a_sweep_that_extends_nothing_that_is_there_is_refused(tmp_path, extends, message):
    path = tmp_path / "mine.yaml"
    path.write_text(f"extends: {extends}\n{GOOD}")
    with pytest.raises(InvalidInput, match=message) as caught:
        load_sweep(str(path))
    assert "\n" not in str(caught.value)


def test_a_sweep_without_sections_says_what_it_lacks(tmp_path):
    (tmp_path / "bare.yaml").write_text(GOOD + "defaults: {tokenizer: icons32-vq}\n")
    with pytest.raises(InvalidInput, match="model: missing text_vocab_size"):
        load_sweep(str(tmp_path / "bare.yaml"))


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
