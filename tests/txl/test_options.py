"""Whoever types an option of the ancestors is told what to type here, and that is really taken here."""
from __future__ import annotations

import importlib
import os
import shlex
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

import launch
from configs import CONFIGS
from engine.cli import parse
from engine.values import BadValue
from txl import options, train
from txl.options import SECTIONS, advice

CHECKOUT = Path(__file__).parents[2]
OPTIONS = [option for section in SECTIONS.values() for option in section]
ADVICE = [here for option in OPTIONS for here in option.here]

# All that the parsers of the four ancestors know, typed off them.
THEIRS = """
    data dataset vocab bpe manual_vocab n_layer n_head d_head d_model d_inner d_embed dropout dropatt pre_lnorm
    attn_type not_tied tie_weight clamp_len same_length adaptive div_val proj_share_all_but_first tie_projs
    proj_same_dim untie_r sample_softmax init init_range init_std proj_init_std emb_init emb_init_range optim lr
    learning_rate mom wd weight_decay scheduler warmup_step warmup_steps warmup_tokens max_step train_steps
    max_tokens max_step_scheduler eta_min min_lr_ratio lr_min decay_rate patience clip clip_nonemb batch_size
    train_batch_size local_batch_size batch_chunk roll varlen tgt_len ext_len mem_len swap_mem multi_gpu gpu0_bsz
    seed cuda fp16 static_loss_scale dynamic_loss_scale amp apex_amp_opt_level amp_mode jit_optimizer local
    local_rank dist_url dist_backend num_gpu retune_interval finetune_v2 finetune_v3 checkpoint_at_end work_dir
    logdir model_dir append_dataset append_time run_name name restart restart_dir checkpoint checkpoint_secondary
    optim_state_dict freeze_below checkpoint_each_epoch save_all save_steps skip_files valid_custom log_interval
    verbose_log_steps eval_interval eval_tgt_len eval_batch_size max_eval_steps eval_max_steps max_eval_batch
    no_eval no_test debug log_all_ranks dllog_file txtlog_file raport_file no_env target_throughput
    target_perplexity affinity skip_auto_shutdown auto_shutdown_success_delay_mins auto_shutdown_failure_delay_mins
    test config config_file split model manual manual_config type save_torchscript load_torchscript repeat max_size
    percentiles save_data no_log eval_ckpt_path do_train do_eval eval_split horovod num_core_per_host
    corpus_info_path record_info_dir data_dir num_passes num_shuffle num_procs nospot skip_setup launch_tensorboard
    num_rings image_name conda_env wiki git machines instance_type context length top_k temperature terminal_strings
    beam_size num_groups diversity_strength num_iterations cur_file project_files datadir shards lr_finder
"""


@pytest.mark.parametrize("name", THEIRS.split())
def test_every_option_of_the_ancestors_has_its_answer_in_a_line(name):
    answer = advice(name)
    assert answer
    assert "\n" not in answer


def test_an_option_is_answered_once_and_nothing_else_is():
    assert {name: n for name, n in Counter(name for option in OPTIONS for name in option.names).items() if n > 1} == {}
    assert advice("confg") is None


@pytest.mark.parametrize("here", ADVICE)
def test_what_is_advised_is_taken_by_the_program_it_is_for(here):
    program, *words = shlex.split(here)
    if program == "launch.py":
        named = any(word.startswith("--config") for word in words)
        problems = []
        for config in CONFIGS:                    # some options exclude what some configs have
            flags = parse(launch.Flags, words if named else [f"--config={config}", *words], prog="", about="")
            try:
                launch.find_config(flags)
                return
            except BadValue as error:
                problems.append(str(error))
        pytest.fail(f"no config takes it: {set(problems)}")
    flags = importlib.import_module(program).Flags
    run = [] if program == "txl.data" or any(word.startswith("--run") for word in words) else ["--run=x"]
    parse(flags, run + words, prog="", about="")


def test_the_page_is_what_the_table_says():
    assert (CHECKOUT / "docs" / "options.md").read_text() == options.page()


@pytest.mark.parametrize(("program", "typed", "said"), [
    ("launch.py", ["--config=tiny", "--batch-chunk=4"], "--set recipe.batch.micro_size=32 "),
    ("launch.py", ["--config=tiny", "--swap_mem"], "--swap_mem is of an ancestor, and not here: all memories"),
    ("txl.evaluate", ["--run=x", "--batch_size=16"], "txl.evaluate --streams=16"),
    ("txl.generate", ["--run=x", "--beam_size=6"], "txl.generate --beams=6"),
    ("txl.train", ["x/recipe.json", "--fp16"], "--set recipe.precision=fp16"),
])
def test_who_types_one_is_told_in_one_line_and_nothing_is_done(program, typed, said, capsys):
    main = launch.main if program == "launch.py" else importlib.import_module(program).main
    try:
        status = main(typed)
    except SystemExit as ended:
        status = ended.code
    out, err = capsys.readouterr()
    assert status == 2
    assert said in err
    assert len(err.splitlines()) == 1
    assert out == ""


def test_a_stray_word_of_nobodys_shows_how_training_is_started(capsys):
    assert train.main(["--nonsense"]) == 2
    assert "torchrun" in capsys.readouterr().err


def test_the_answers_need_no_torch(tmp_path):
    (tmp_path / "torch.py").write_text("raise ImportError('there is no torch here')\n")
    told = subprocess.run([sys.executable, "launch.py", "--config=tiny", "--fp16"], cwd=CHECKOUT, text=True,
                          capture_output=True, env=os.environ | {"PYTHONPATH": str(tmp_path)})
    assert told.returncode == 2
    assert "recipe.precision=fp16" in told.stderr
