"""What became of the options of this project's ancestors: docs/options.md, and what is said of one typed here.

    python -m txl.options > docs/options.md

The ancestors are kimiyoung's transformer-xl (pytorch), cybertronai's, and NVIDIA's for PyTorch and TensorFlow.
Standard library only.
"""
from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Option:
    """`names` as the ancestors spell them. `here`: what to type, with an example's value; none: there is no such."""
    names: tuple[str, ...]
    here: tuple[str, ...]
    note: str


def _as(names: str, *here: str, note: str = "") -> Option:
    return Option(tuple(names.split()), here, note)


def _set(names: str, *fields: str, note: str = "", also: tuple[str, ...] = ()) -> Option:
    """An option that is a field, or several, of the recipe."""
    return _as(names, "launch.py " + " ".join(f"--set recipe.{field}" for field in fields), *also, note=note)


def _not(names: str, why: str) -> Option:
    return Option(tuple(names.split()), (), why)


SECTIONS: dict[str, tuple[Option, ...]] = {
    "Model": (
        *(_set(name, f"model.{name}={example}", note=note) for name, example, note in (
            ("n_layer", 16, ""), ("n_head", 8, ""), ("d_head", 64, ""), ("d_model", 512, ""), ("d_inner", 2048, ""),
            ("d_embed", 512, "none: d_model; theirs -1"), ("dropout", .1, ""), ("dropatt", .1, "of attention"),
            ("untie_r", "true", "u and v of each layer's own"), ("tie_weight", "true", ""))),
        _set("pre_lnorm", "model.pre_lnorm=true", "model.final_lnorm=true",
             note="the ancestors had no final norm: leave the second out for theirs"),
        _set("attn_type", "model.attn_type=shaw", "model.positions=384",
             note="by name: 0 rel, 1 shaw, 2 abs, 3 learned; shaw and learned need positions, theirs tgt_len + ext_len "
                  "+ mem_len"),
        _set("not_tied", "model.tie_weight=false"),
        _set("adaptive", "model.cutoffs=19997,39997,199997", note="the cutoffs are the choice; none: a plain softmax"),
        _set("div_val", "model.div_val=4", note="with cutoffs"),
        _set("tie_projs proj_share_all_but_first", "model.tie_projs=false,true,true,true",
             note="head first; none: all but the head"),
        _not("proj_same_dim", "embeddings of d_model are not projected, as in the ancestors for PyTorch"),
        _set("sample_softmax", "model.cutoffs=()", "model.sample_softmax=5000",
             note="words drawn; evaluation is exact. Theirs crashed"),
        _set("init", "model.init=normal"), _set("init_range", "model.init_range=0.1"),
        _set("init_std", "model.init_std=0.02"), _set("proj_init_std", "model.proj_init_std=0.01"),
        _not("emb_init emb_init_range", "read nowhere in any ancestor; embeddings begin as model.init says"),
    ),
    "Context": (
        _set("tgt_len", "context.tgt_len=192", also=("txl.evaluate --tgt_len=64",), note="tokens"),
        _set("mem_len", "context.mem_len=192", also=("txl.evaluate --mem_len=640",), note="tokens"),
        _set("ext_len", "context.ext_len=0", note="tokens that are read again"),
        _set("eval_tgt_len", "eval_context.tgt_len=128", "eval_context.mem_len=640",
             note="tokens; the ancestors let mem_len grow by what tgt_len loses, here both are said"),
        _set("clamp_len", "context.clamp_len=400", also=("txl.evaluate --clamp_len=400",),
             note="tokens; none: no cap; theirs -1"),
        _set("same_length", "context.same_length=true", also=("txl.evaluate --same_length",),
             note="NVIDIA's: mem_len tokens and itself"),
        _set("varlen", "varlen=true"), _set("roll", "roll=true", note="each epoch's own, resumed exactly"),
    ),
    "Data": (
        _set("data data_dir datadir", "data.dir=data/wikitext-103",
             note="launch.py's own --data is a place in S3 that machines fetch it from"),
        _set("dataset", "data.dataset=wt2", "data.dir=data/wikitext-2", also=("txl.data --dataset=wt2",)),
        _set("vocab bpe", "data.vocab=bpe", "data.n_token=50257", "data.bpe_files=data/gpt2",
             note="word, char, byte or bpe; without bpe_files one of n_token is made from the text"),
        _not("manual_vocab", "a run knows its vocabulary, and txl.evaluate --text takes it"),
        _set("wiki git", "data.dataset=git", "data.dir=data/git", "data.vocab=bpe", "data.n_token=16384",
             also=("txl.data --dataset=git --source=src",), note="the second makes the texts of a folder's files"),
        _set("valid_custom", "data.eval_sets=mail=data/mail.txt",
             note="any number, NAME=PATH, by name in the log; the best checkpoint is chosen by valid.txt alone"),
        _not("skip_files", "a run goes on at the very token where it stopped"),
        _not("num_passes num_shuffle num_procs corpus_info_path record_info_dir num_core_per_host per_host_train_bsz",
             "tokens are one memory-mapped file, whatever the batch and its length; every epoch may roll"),
        _not("shards", "ranks take their streams from the one token file: nothing has to be cut"),
    ),
    "Optimizer": (
        _set("optim", "optim.name=lamb", note="lamb (jitlamb too), adamw, adam, sgd, adagrad, muon"),
        _set("lr learning_rate", "optim.lr=0.01", note="the peak"),
        _set("base_lr", "optim.lr.base_lr=0.0002", note="cybertronai's configs: lr = base_lr x sequences a step / 32"),
        _set("mom momentum", "optim.momentum=0.9", note="sgd and muon"),
        _set("wd weight_decay", "optim.weight_decay=0.01", note="of all parameters, as theirs"),
        _set("clip", "optim.clip=0.25", note="global norm of the gradient; none: no clipping; theirs 0"),
        _not("clip_nonemb", "read nowhere in any ancestor; optim.clip is of all gradients"),
        _set("fp16 amp", "precision=fp16", note="or bf16, tf32, fp32"),
        _set("tf32", "precision=tf32"),
        _not("dynamic_loss_scale static_loss_scale apex_amp_opt_level amp_mode",
             "fp16 keeps weights in float32, and the scale of the loss finds itself; bf16 needs none"),
        _not("jit_optimizer", "LAMB runs by multi-tensor kernels; recipe.clock.compile=true compiles the layers"),
    ),
    "Schedule and end": (
        _set("scheduler", "schedule.name=cosine", note="cosine, inv_sqrt, constant, plateau (dev_perf), finder"),
        _set("lr_finder", "schedule.name=finder", "stop.max_steps=200",
             note="from a thousandth of optim.lr to 1; the run ends when the loss runs away and suggests a rate"),
        _set("warmup_step warmup_steps", "schedule.warmup_steps=1000", note="steps"),
        _set("warmup_tokens", "schedule.warmup_tokens=50e6", note="tokens over all ranks"),
        _set("max_step train_steps", "stop.max_steps=40000", note="steps; training ends there"),
        _set("max_tokens", "stop.max_tokens=1.8e9", note="tokens over all ranks; training ends there"),
        _set("max_step_scheduler", "schedule.horizon_steps=40000",
             note="steps, or horizon_tokens: where a cosine is lowest; none: the end"),
        _set("eta_min lr_min", "schedule.eta_min=0.001", note="lowest rate of cosine and plateau"),
        _set("min_lr_ratio", "schedule.eta_min=0", "schedule.eta_min_ratio=0.1", 
             note="of the peak, instead of eta_min"),
        _set("decay_rate", "schedule.decay_rate=0.5", note="plateau"),
        _set("patience", "schedule.patience=0", note="plateau: evaluations"),
    ),
    "Batch and ranks": (
        _set("batch_size train_batch_size", "batch.size=256",
             also=("txl.evaluate --streams=16", "txl.generate --batch=4"),
             note="sequences over all ranks; cybertronai's was of each GPU, which is local_size"),
        _set("local_batch_size", "batch.size=none", "batch.local_size=96", note="sequences of each rank"),
        _set("batch_chunk", "batch.micro_size=32",
             note="sequences that a GPU takes at a time: its share / batch_chunk, whatever the number of GPUs"),
        _not("swap_mem", "all memories together are sequences x n_layer x mem_len x d_model numbers, for NVIDIA's "
                         "large model in fp32 3.4 GiB over all GPUs; a smaller recipe.batch.micro_size frees more"),
        _not("multi_gpu gpu0_bsz", "each GPU has a process of its own, which launch.py or torchrun starts: none "
                                   "carries more than another"),
        _not("local_rank dist_url dist_backend", "torchrun's environment says it; nccl on GPUs, gloo on the processor"),
        _not("cuda no_cuda", "GPUs are used where there are any; CUDA_VISIBLE_DEVICES= (empty) leaves them out"),
        _as("local", "launch.py --backend=local", note="one process for each GPU here"),
        _set("affinity", "clock.affinity=socket_unique_interleaved",
             note="NVIDIA's modes by their names; the default is socket"),
        _set("seed", "seed=1111", also=("txl.generate --seed=1",)),
        _not("horovod use_tpu xla", "torch.distributed takes its place; recipe.clock.compile=true compiles"),
        _not("num_gpu", "launch.py uses what there is, or --set machines.gpus=4"),
    ),
    "Log, evaluation, checkpoints": (
        _set("log_interval", "clock.log_interval=100", note="steps"),
        _set("verbose_log_steps", "clock.log_first_steps=60", note="steps at the start that are logged each"),
        _set("eval_interval", "clock.eval_interval=4000", note="steps"),
        _set("eval_batch_size", "eval_streams=16", also=("txl.evaluate --streams=16",)),
        _set("max_eval_steps eval_max_steps max_eval_batch max_size", "eval_max_segments=100",
             also=("txl.evaluate --max_segments=100",),
             note="segments of a validation while training; the test is whole"),
        _set("no_eval", "clock.eval_interval=none", note="checkpoints are written all the same"),
        _set("no_test", "clock.test=false"),
        _set("save_steps", "clock.checkpoint_interval=1000", note="steps; and at every evaluation"),
        _set("save_all", "clock.keep_checkpoints=none", note="else the newest so many, and the best"),
        _set("checkpoint_each_epoch", "clock.checkpoint_epochs=true", note="and they stay"),
        _not("checkpoint_at_end", "there is always one"),
        _set("target_perplexity", "clock.target_perplexity=23.4", also=("txl.evaluate --target_perplexity=23.4",),
             note="training: of the validation with the best weights; exit status 3 where it is missed"),
        _set("target_throughput", "clock.target_tokens_per_s=100000",
             also=("txl.evaluate --target_tokens_per_s=100000",),
             note="over all ranks, without the first log interval of a start; exit status 3 where it is missed"),
        _as("work_dir logdir model_dir run_name job_name", "launch.py --name=mine",
            note="a run is the folder runs/NAME"),
        _not("append_dataset append_time", "a name is a run: the same command goes on with it, and another --name is "
                                           "another"),
        _not("restart restart_dir", "the same command again goes on from the last checkpoint, exactly"),
        _as("checkpoint", "launch.py --checkpoint=runs/first", note="weights of another run, which must fit"),
        _set("checkpoint_secondary", "init_from=runs/first", "init_under=runs/second",
             note="the second's weights, and over them the first's"),
        _set("optim_state_dict", "init_from=runs/first", "init_optim=true"),
        _set("freeze_below", "freeze_below=2", note="layers; recipe.freeze takes patterns of names"),
        _not("debug", "a run that is not worth keeping:  --name=scratch, and remove runs/scratch"),
        _not("log_all_ranks dllog_file txtlog_file raport_file no_log",
             "logs/rank-R.log of every rank and metrics.jsonl are always written; an evaluation only prints"),
        _not("no_env", "machine.json and commit.txt are small and always written"),
        _not("retune_interval finetune_v2 finetune_v3", "read nowhere in any ancestor"),
        _not("wandb", "metrics.jsonl and TensorBoard's files have every number, and need no account"),
    ),
    "Evaluation and text": (
        _as("split eval_split", "txl.evaluate --split=all",
            note="test, valid, train, an evaluation set by its name; all: all but train"),
        _as("model load eval_ckpt_path", "txl.evaluate --run=runs/mine"),
        _as("manual", "txl.evaluate --text=hello", note="--text=- reads stdin"),
        _not("manual_config", "python -m benchmarks.infer --config=NAME times a model that is not trained"),
        _as("percentiles", "txl.evaluate --percentiles=90,95,99"),
        _as("save_data", "txl.evaluate --save=seconds.json", note="every segment's seconds, as JSON"),
        _as("type save_torchscript load_torchscript", "txl.export --output=model.pt2",
            note="a file that needs no code but torch; TorchScript is no longer developed"),
        _not("repeat", "a segment's time is a mean over the split, with percentiles; --split=all has more of them"),
        _not("do_train do_eval", "launch.py trains, txl.evaluate evaluates"),
        _as("context", "txl.generate --prompt=hello"), _as("length", "txl.generate --length=200", note="tokens"),
        _as("top_k", "txl.generate --top_k=40"), _as("temperature", "txl.generate --temperature=0.8"),
        _as("terminal_strings", "txl.generate --stop=return"), _as("beam_size", "txl.generate --beams=6"),
        _as("num_groups", "txl.generate --beams=6 --groups=3"),
        _as("diversity_strength", "txl.generate --beams=6 --groups=3 --diversity=0.5"),
        _as("num_iterations", "txl.generate --length=15", note="tokens"),
        _as("cur_file project_files", "txl.generate --prompts=prompts.txt", note="one prompt a line"),
    ),
    "Launcher": (
        *(_as(name, f"launch.py {typed}") for name, typed in (
            ("config", "--config=tiny"), ("name", "--name=mine"), ("nospot", "--nospot"), ("machines", "--machines=2"),
            ("skip_setup", "--skip_setup"), ("launch_tensorboard", "--launch_tensorboard"),
            ("instance_type", "--instance_type=p3.8xlarge"))),
        _not("config_file", "configs.py has all configs; a run keeps its own in runs/NAME/recipe.json, where unknown "
                            "keys are refused"),
        _as("image_name", "launch.py --image=ami-0123456789abcdef0", note="else what the kind of machine needs"),
        _not("conda_env", "the machines get an environment of the project's own; --skip_setup takes what is there"),
        _not("num_rings nccl_min_rings", "NCCL chooses; its variables may stand in the environment of an image or job"),
        _not("skip_auto_shutdown", "machines always go away: give --max_hours, --minutes_after_success"),
        _as("auto_shutdown_success_delay_mins", "launch.py --minutes_after_success=10"),
        _as("auto_shutdown_failure_delay_mins", "launch.py --minutes_after_failure=60"),
        _not("test", "bash run_tests.sh runs the tests"),
    ),
}
HEAD = """\
# The ancestors' options

Where each option of kimiyoung's, cybertronai's and NVIDIA's (PyTorch, TensorFlow) Transformer-XL went. One that is
typed here is answered with its line below. Values are examples; `engine/config.py` and `txl/config.py` say what each
field means. This page is made by `python -m txl.options`.
"""


def advice(name: str) -> str | None:
    """What to type here for an ancestor's flag, given without dashes, in one line; None: it is none of theirs."""
    option = next((o for options in SECTIONS.values() for o in options if name in o.names), None)
    if option is None:
        return None
    if not option.here:
        return f"of an ancestor, and not here: {option.note}"
    note = f" ({option.note})" if option.note else ""
    return f"of an ancestor. Here:  {'  or  '.join(option.here)}{note}"


def page() -> str:
    """docs/options.md."""
    lines = [HEAD]
    for section, options in SECTIONS.items():
        lines += [f"## {section}", "", "| theirs | here | |", "|---|---|---|"]
        for option in options:
            names, here = (" ".join(f"`{x}`" for x in names) for names in (option.names, option.here))
            lines.append(f"| {names} | {here.replace('` `', '`, `') or 'no'} | {option.note} |")
        lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    print(page(), end="")
