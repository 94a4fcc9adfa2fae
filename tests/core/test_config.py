"""params.yaml, profiles and overrides."""

from pathlib import Path

import pytest

from bitdistill_core.params import list_profiles, load_params, run_name

PARAMS = Path(__file__).parents[2] / "params.yaml"


@pytest.mark.parametrize("profile", list_profiles(PARAMS))
def test_every_profile_validates(profile: str) -> None:
    assert load_params(PARAMS, profile=profile).data.task


def test_the_profiles_of_the_documentation_exist() -> None:
    qwen = {f"qwen3-0.6b-{task}" for task in ("mnli", "qnli", "sst2", "cnndm")}
    assert {"demo", "smollm2-sst2"} | qwen <= set(list_profiles(PARAMS))


def test_the_profile_in_the_readme_validates(tmp_path: Path) -> None:
    text = (PARAMS.parent / "README.md").read_text()
    profile = text.split("# profiles/tickets.yaml\n")[1].split("```")[0]
    (tmp_path / "profiles").mkdir()
    (tmp_path / "profiles" / "tickets.yaml").write_text(profile)
    (tmp_path / "params.yaml").write_text(PARAMS.read_text())
    params = load_params(tmp_path / "params.yaml", profile="tickets")
    assert params.data.resolved_template.label_words == ["billing", "technical", "sales"]
    assert params.teacher.learning_rate < params.bitnet_sft.learning_rate < 1e-3  # not those of the tiny demo model


def test_the_qwen_profiles_hold_the_papers_values() -> None:
    params = load_params(PARAMS, profile="qwen3-0.6b-mnli")
    assert params.base.checkpoint == "Qwen/Qwen3-0.6B"
    assert params.pretrain.num_tokens == 10_000_000_000
    distill = params.distill
    assert (distill.logits_kd_weight, distill.attention_kd_weight, distill.kd_temperature) == (10.0, 1e5, 5.0)
    assert (distill.batch_size, distill.max_length) == (32, 512)
    summarise = load_params(PARAMS, profile="qwen3-0.6b-cnndm").distill
    assert (summarise.logits_kd_weight, summarise.attention_kd_weight) == (1.0, 1e3)


def test_overrides_apply() -> None:
    params = load_params(PARAMS, overrides=["distill.learning_rate=5.0e-5", "base.scratch.num_layers=3"])
    assert params.distill.learning_rate == 5e-5
    assert params.base.scratch.num_layers == 3


def test_a_seed_replaces_every_seed() -> None:
    params = load_params(PARAMS, seed=7)
    seeds = {params.base.scratch.seed, params.teacher.seed, params.pretrain.seed, params.distill.seed}
    assert seeds | {params.bitnet_sft.seed} == {7}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.eval_splits=[test, a/b]", r"a split must be a name .*; got split='a/b'"),
        ("data.eval_splits=[..]", r"a split must be a name .*; got split='\.\.'"),
        ("data.train_split=/train", r"a split must be a name"),
        ("data.eval_splits=[te$t]", r"a split must be a name"),
        ("data.eval_splits=[test, test]", r"must be different splits; got eval_splits="),
        ("runtime.num_threads=1025", r"num_threads"),
        ("teacher.seed=1000000000001", r"seed"),
        ("distill.lr=1", r"unknown key in override 'distill\.lr=1': lr; the keys are seed"),
        ("nothing.lr=1", r"unknown key .*: nothing; the keys are runtime"),
        ("distill.learning_rate=fast", r"distill\.learning_rate: .*valid number.*got 'fast'"),
        ("distill.learning_rate=-1", r"distill\.learning_rate: .*greater than 0 \(got -1\)"),
        ("surgery.subln=both", r"surgery\.subln: .*'none', 'output' or 'all'"),
        ("distill.gradient_accumulation=5", r"must divide batch_size; got gradient_accumulation=5, batch_size=32"),
        ("data.task=imdb", r"data\.task must be one of .*got task=imdb"),
        ("pretrain.task_loss_weight=0", r"pretrain needs a loss: one of task_loss_weight, .* above 0; got 0 for each"),
        ("pretrain.task_loss_weight=0.5", r"got task_loss_weight=0\.5 without any; set it to 1\.0"),
        ("data.eval_splits=[train]", r"and none named train; got \['train'\]"),
        ("data.eval_splits=[validation,train]", r"data\.eval_splits must be other splits than data\.train_split"),
        ("pretrain.quantization_warmup=1.5", r"quantization_warmup: .*less than or equal to 1 \(got 1\.5\)"),
        ("distill.hidden_kd_weight=-1", r"distill\.hidden_kd_weight: .*greater than or equal to 0"),
        (
            "distill.teacher_layers=[0,1]",
            r"as long as distill\.distill_layers; got teacher_layers=\[0, 1\], .*\[-2\]",
        ),
        ("base.num_layers=-1", r"base\.num_layers: .*greater than or equal to 0"),
        (
            "base.scratch.architecture=gpt2",
            r"scratch\.architecture: .*'qwen3', 'qwen2', 'llama', 'mistral' or 'gemma3_text'",
        ),
        ("surgery.weight_block_size=0", r"surgery\.weight_block_size: .*greater than or equal to 16"),
        ("surgery.weight_block_size=24", r"surgery\.weight_block_size: .*multiple of 16"),
        ("surgery.subln_gain=two", r"surgery\.subln_gain: .*'one' or 'preserve'"),
        ("surgery.initializer=absmax", r"surgery\.initializer: .*'none', 'gptq' or 'awq'"),
        ("pretrain.num_tokens=100", r"num_tokens must be 0 or at least one step's tokens, block_size \* batch_size = "),
        ("base.scratch.num_tokens=100", r"num_tokens must be 0 or at least one step's tokens"),
        (
            "pretrain.blockwise={num_epochs: 1,learning_rate: 0.1,batch_size: 0,channel_weights: none,num_tokens: 9}",
            r"got blockwise\.num_tokens=9",
        ),
        ("benchmark.new_tokens=1", r"benchmark\.new_tokens: Input should be greater than or equal to 2"),
        ("learning_rate", r"an override reads section\.key=value"),
    ],
)
def test_a_wrong_override_is_one_clear_error(override: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_params(PARAMS, overrides=[override])


def test_balance_without_measuring_is_refused() -> None:
    with pytest.raises(ValueError, match=r"balance_grad_norms needs grad_norm_every above 0; got grad_norm_every=0"):
        load_params(PARAMS, overrides=["distill.balance_grad_norms=1", "distill.grad_norm_every=0"])


@pytest.mark.parametrize("override", ["surgery.weight_grid=binary", "surgery.initializer=gptq"])
def test_a_least_squares_scale_has_its_own_grid_and_start(override: str) -> None:
    with pytest.raises(ValueError, match="least_squares is for weight_grid ternary and initializer none; got"):
        load_params(PARAMS, overrides=["surgery.weight_scale=least_squares", override])


def test_no_distillation_at_all_is_a_valid_choice() -> None:
    params = load_params(PARAMS, overrides=["distill.logits_kd_weight=0", "distill.attention_kd_weight=0"])
    assert params.distill.hidden_kd_weight == 0


def test_pretraining_may_learn_from_the_base_alone() -> None:
    overrides = ["pretrain.task_loss_weight=0", "pretrain.hidden_kd_weight=1"]
    assert load_params(PARAMS, overrides=overrides).pretrain.logits_kd_weight == 0


def test_unknown_and_missing_keys_are_named(tmp_path: Path) -> None:
    text = PARAMS.read_text()
    path = tmp_path / "params.yaml"
    path.write_text(text.replace("kd_temperature", "temperature"))
    with pytest.raises(ValueError, match=r"distill\.kd_temperature: missing key; distill\.temperature: unknown key"):
        load_params(path)
    with pytest.raises(ValueError, match="unknown profile=none; the profiles are demo"):
        load_params(PARAMS, profile="none")
    with pytest.raises(ValueError, match="no parameter file at path="):
        load_params(tmp_path / "absent.yaml")


def test_run_names() -> None:
    assert run_name("demo", seed=None, name=None) == "demo"
    assert run_name("demo", seed=2, name=None) == "demo-seed2"
    with pytest.raises(ValueError, match="one directory name"):
        run_name("demo", seed=None, name="../x")


@pytest.mark.parametrize("stage", ["pretrain", "distill"])
def test_a_threshold_margin_needs_the_absmean_scale(stage: str) -> None:
    overrides = ["surgery.weight_scale=least_squares", f"{stage}.threshold_margin=0.1"]
    with pytest.raises(ValueError, match=r"got weight_scale=least_squares, threshold_margin=0\.1; set it to 0"):
        load_params(PARAMS, overrides=overrides)
    load_params(PARAMS, overrides=overrides[1:])


def test_a_warm_up_from_weights_that_are_no_model_is_refused() -> None:
    blocks = ["distill.quantization_warmup=0.5", "distill.blockwise.num_epochs=2"]
    with pytest.raises(
        ValueError, match=r"got quantization_warmup=0.5, blockwise.num_epochs=2.0; set one of them to 0"
    ):
        load_params(PARAMS, overrides=blocks)
    late = ["distill.quantization_warmup=0.5", "pretrain.num_tokens=100000"]
    with pytest.raises(ValueError, match=r"got distill.quantization_warmup=0.5, pretrain.num_tokens=100000"):
        load_params(PARAMS, profile="demo", overrides=late)
    load_params(PARAMS, profile="demo", overrides=[late[0], "pretrain.num_tokens=0"])
    gptq = ["pretrain.quantization_warmup=0.5", "surgery.initializer=gptq"]
    with pytest.raises(ValueError, match=r"got quantization_warmup=0.5, surgery.initializer=gptq; set one of them off"):
        load_params(PARAMS, overrides=gptq)
