"""The training loop, one for all models: steps, evaluation, checkpoints, metrics, until the recipe says it ends."""
from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

from engine import affinity, checkpoint
from engine.config import Recipe, verdicts
from engine.expect import Comparison, expect
from engine.files import write_whole
from engine.finder import slopes, suggestion
from engine.metrics import Metrics, Stopwatch, brief, gpu_memory, peak_flops, ppl
from engine.run import Run
from engine.schedule import lr_at
from engine.step import Learner
from engine.task import Position, Score, Step, Task
from engine.values import to_json
from engine.watch import Diverged, Guard, Timed, Window, to_device
from engine.weights import load_weights, set_weights, span
from engine.world import World


@dataclass
class Progress:
    """How far a run is: everything the next step depends on that is neither a weight nor a rank's own."""
    step: int = 0
    tokens: int = 0                               # targets trained on, over all ranks
    position: Position = field(default_factory=Position)
    valid_losses: list[float] = field(default_factory=list)
    lowest_loss: float = float("inf")             # of a log interval
    seconds: float = 0.0                          # of training, over all starts
    timed_tokens: int = 0                         # of these tokens, all but each start's first log interval,
    timed_seconds: float = 0.0                    # and what they took
    curve: list[tuple[float, float]] = field(default_factory=list)           # the finder's: learning rate, loss

    def state(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def of(state: dict[str, Any]) -> Progress:
        return Progress(**state | {"position": Position(**state["position"])})


@dataclass(frozen=True)
class Outcome:
    """How a start of the run ended."""
    finished: bool                                # False: it was asked to stop
    step: int
    tokens: int
    test: Score | None = None                     # None: there was none
    suggested_lr: float | None = None             # the finder's


def train(world: World, task: Task, recipe: Recipe, run: Run) -> Outcome:
    """Train until recipe.stop, or until asked to stop; then, if it ended by itself, test once with the best weights.

    With the schedule "finder" it ends when the loss runs away, without a test, and suggests a learning rate.
    Goes on from the newest complete checkpoint of the run, if there is one, exactly as if it had never stopped
    (bit for bit on a CPU, with one rank or with the same two; the sums of more depend on the order in which DDP lays
    gradients out, which it chooses anew after the first step of a start). Collective. Raises Diverged, CheckpointError.
    """
    affinity.bind(world, recipe.clock.affinity, run.log)
    training = _Training(world, task, recipe, run)
    if recipe.schedule.name != "finder":
        return training.until_the_end()
    try:
        return training.until_the_end()
    except Diverged as error:
        return training.found(str(error).partition(". ")[0])        # its advice is for a training


class _Training:
    def __init__(self, world: World, task: Task, recipe: Recipe, run: Run):
        self.world, self.task, self.recipe, self.run = world, task, recipe, run
        self.progress, self.saved_step = Progress(), -1
        self.learner = learner = Learner(world, task, recipe)
        self.model, self.optimizer, self.scaler = learner.model, learner.optimizer, learner.scaler
        self.precision, self.batch_size, self.peak_lr = learner.precision, learner.batch_size, learner.peak_lr
        torch.manual_seed(recipe.seed + 1 + world.rank)         # another dropout on each
        self.window = Window(world.device)
        self._resume()
        self.sizes = [sum(p.numel() for p in x) for x in (self.model.parameters(), learner.parameters)]
        self.compared = Comparison(expect(learner, self.progress.position))
        learner.distribute()

        self.guard = Guard(len(learner.parameters), world.device)
        self.metrics = Metrics(run.folder, self.progress.step, self.progress.tokens, active=world.leads)
        self.watch, self.timed, self.warm = Stopwatch(), Timed(), False
        self.finding = recipe.schedule.name == "finder"
        self.eval_interval = None if self.finding else recipe.clock.eval_interval
        self.log_first_steps = math.inf if self.finding else recipe.clock.log_first_steps

    def until_the_end(self) -> Outcome:
        progress, clock, stop = self.progress, self.recipe.clock, self.recipe.stop
        self.run.status("training", progress.step)
        self._introduce()
        steps = self.learner.ahead(self.task.steps(self.world, progress.position))
        requested = self.world.any_later(self.run.stop_requested())
        while not stop.reached(progress.step, progress.tokens):
            with self.timed.part("load"):
                step = next(steps)
            self._step(step)
            stops = requested()                    # asked before this step, so that asking all ranks hides behind it
            requested = self.world.any_later(self.run.stop_requested())
            ends = stop.reached(progress.step, progress.tokens)
            if progress.step % clock.log_interval == 0 or progress.step <= self.log_first_steps or ends:
                self._log()
            epoch_ends = clock.checkpoint_epochs and progress.position.index == 0
            if self.eval_interval and (progress.step % self.eval_interval == 0 or ends):
                self._save(self._validate(), keep=epoch_ends)
            elif progress.step % clock.checkpoint_interval == 0 or epoch_ends or ends:
                self._save(valid_loss=None, keep=epoch_ends)
            if stops and not ends:
                requested()
                return self._stopped()
        requested()
        return self.found("training stops here") if self.finding else self._finished()

    def _step(self, step: Step) -> None:
        progress = self.progress
        self.lr = lr_at(self.recipe.schedule, self.peak_lr, self.recipe.stop, step=progress.step,
                        tokens=progress.tokens, tokens_after=progress.tokens + step.tokens,
                        valid_losses=progress.valid_losses)
        loss, norm, norms = self.learner.take(step, self.lr, self.timed)
        self.guard.watch(progress.step, loss, None if self.precision.scaled else norm, norms)
        self.window.add(loss, norm, step.tokens)
        progress.step += 1
        progress.tokens += step.tokens
        progress.position = step.following

    def _window_loss(self) -> float:
        """The training loss since the last log. Waits for the device, and is the only place of training that does.

        Collective. Raises Diverged where a loss or gradient was not finite, and where the loss has run away.
        """
        progress = self.progress
        self.guard.check(self.world, self.learner.names, self._good_checkpoint)
        nats, = self.world.sum(self.window.nats.item())
        loss = nats / max(1, self.window.tokens)
        if loss > progress.lowest_loss + self.recipe.divergence_nats:
            raise Diverged(f"The training loss rose to {loss:.3f} at step {progress.step}, "
                           f"{loss - progress.lowest_loss:.2f} nats above its lowest. {self._good_checkpoint()} "
                           f"Start a new run (--name=NEW) with a lower learning rate (--set recipe.optim.lr=…) or a "
                           f"longer warm-up; recipe.divergence_nats sets how far is too far.")
        return loss

    def _log(self) -> None:
        """The window since the last log: a line, a record, TensorBoard's tags."""
        progress, world, window, timed = self.progress, self.world, self.window, self.timed
        loss = self._window_loss()
        seconds = self.watch.lap()
        progress.seconds += seconds
        if self.warm:
            progress.timed_tokens += timed.tokens
            progress.timed_seconds += seconds
            if slow := self.compared.add(timed.steps, seconds):
                self.run.log.warning(slow)
        self.warm = True
        rate, norm = timed.tokens / seconds, window.mean_norm()
        peak = peak_flops(torch.cuda.get_device_name(), self.precision.name) if world.device.type == "cuda" else None
        mfu = rate * self.task.flops_per_token / (peak * world.size) if peak else None
        memory = gpu_memory(world.device)
        self.metrics.write("train", progress.step, progress.tokens, epoch=progress.position.epoch, loss=loss,
                           ppl=ppl(loss), lr=self.lr, grad_norm=norm, tokens_per_s=rate, mfu=mfu,
                           seconds=progress.seconds, step_ms=1000 * seconds / timed.steps,
                           loss_scale=self.scaler.get_scale() if self.precision.scaled else None, **memory)
        self.metrics.tags(
            progress.tokens, _loss=loss, learning__loss=loss, learning__ppl=ppl(loss), learning__lr=self.lr,
            learning__base_lr=self.peak_lr, learning__epoch=progress.position.epoch + progress.position.index
            / progress.position.steps, learning__grad_norm=norm, times__step=1000 * seconds / timed.steps,
            times__load=1000 * timed.seconds["load"] / timed.steps,
            times__backwards=1000 * timed.seconds["backward"] / timed.steps,
            times__batches_per_sec=timed.steps / seconds,
            times__samples_per_sec=timed.steps * self.batch_size / seconds / world.size,      # of one GPU, as there
            times__tokens_per_sec=rate / world.size, times__mfu=mfu,
            **{f"memory__{name}": x for name, x in memory.items()})
        for name, values in getattr(self.optimizer, "norms", {}).items():
            self.metrics.histogram(f"lamb/{name}", values, progress.tokens)
        remaining, total = self._remaining(window.tokens / window.steps)
        eta = timedelta(seconds=int(remaining / rate)) if rate else "?"
        self.run.log.info(f"step {progress.step}/{total} | tokens {brief(progress.tokens)} | loss {loss:.3f} | "
                          f"ppl {ppl(loss):.2f} | lr {self.lr:.2e} | {brief(rate)} tok/s"
                          + (f" | mfu {mfu:.1%}" if mfu else "") + f" | eta {eta}")
        self.window, self.timed = Window(world.device), Timed()
        self.run.status("training", progress.step)

        progress.lowest_loss = min(progress.lowest_loss, loss)
        if self.finding:
            progress.curve.append((self.lr, loss))
        if self.precision.scaled and self.scaler.get_scale() < 2.0 ** -10:
            raise Diverged(f"The gradient overflows fp16 at every step up to {progress.step}, whatever the loss scale. "
                           f"{self._good_checkpoint()} Start a new run (--name=NEW) with "
                           f"--set recipe.precision=bf16 or fp32.")

    def _validate(self) -> float:
        """The validation loss of these weights, which are to be saved with it."""
        self._window_loss()                        # what is wrong with the training is said before an evaluation of it
        with self.watch.paused():
            score = self._evaluate("valid")
            progress = self.progress
            if not math.isfinite(score.loss):
                raise Diverged(f"The validation loss at step {progress.step} is {score.loss}. "
                               f"{self._good_checkpoint()} Start a new run (--name=NEW) in another precision or with a "
                               f"lower learning rate.")
            progress.valid_losses.append(score.loss)
            self._report("valid", score)
            for name in self.task.eval_sets:
                self._report(name, self._evaluate(name))
        return score.loss

    def _evaluate(self, split: str) -> Score:
        self.model.eval()
        with torch.no_grad(), self.precision.autocast(), self.learner.whole():
            score = self.task.evaluate(self.model, split, self.world)
        self.model.train()
        return score

    def _report(self, split: str, score: Score) -> None:
        progress, tag = self.progress, {"valid": "val"}.get(split, split)
        self.metrics.write(split, progress.step, progress.tokens, loss=score.loss, ppl=ppl(score.loss),
                           eval_tokens=score.tokens, seconds=score.seconds, protocol=score.protocol)
        self.metrics.tags(progress.tokens, **{f"learning__{tag}_loss": score.loss,
                                              f"learning__{tag}_ppl": ppl(score.loss)})
        self.run.log.info(f"{split} at step {progress.step} | loss {score.loss:.4f} | ppl {ppl(score.loss):.3f} | "
                          f"{score.tokens} tokens in {score.seconds:.1f} s | {score.protocol}")

    def _save(self, valid_loss: float | None, *, keep: bool = False) -> None:
        if self.saved_step == self.progress.step:
            return                                 # it is there already, and may know its validation loss
        self._window_loss()                        # never a checkpoint of bad weights
        with self.watch.paused():
            cuda = self.world.device.type == "cuda"
            with self.learner.whole(optimizer=True):
                shared = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(),
                          "scaler": self.scaler.state_dict(), "progress": self.progress.state()}
            own = {"carries": self.learner.carries, "cpu_rng": torch.get_rng_state(), "window": self.window.state(),
                   "cuda_rng": torch.cuda.get_rng_state() if cuda else None}
            meta = {"tokens": self.progress.tokens, "valid_loss": valid_loss, "vocabulary": self.task.vocabulary,
                    "keep": keep}
            checkpoint.save(self.world, self.run.checkpoints, self.progress.step, shared, own, meta,
                            self.recipe.clock.keep_checkpoints)
            self.saved_step = self.progress.step
            self.run.saved(self.run.checkpoints / checkpoint.name(self.saved_step))

    def _resume(self) -> None:
        """From the newest checkpoint that is complete on the leading rank's disk, which the other ranks need not see.
        Where a rank lacks its own part, and with another number of ranks, memories and generators start anew.
        Where there is no checkpoint the run begins, with the weights of recipe.init_from if it names any."""
        world, folder = self.world, self.run.checkpoints
        found = checkpoint.from_leader(world, lambda: checkpoint.complete(folder))
        if not found:
            if self.recipe.init_from:
                source, under = Path(self.recipe.init_from), self.recipe.init_under
                if under:
                    self._take_weights(lambda: checkpoint.find(Path(under)))
                self._take_weights(lambda: checkpoint.find(source), partly=self.recipe.init_partly or under is not None,
                                   others=f"are those of {under}" if under else "begin anew")
                if self.recipe.init_optim:
                    self._take_optimizer(source)
            return
        newest = found[-1]
        newest.check_vocabulary(self.task.vocabulary)
        shared = checkpoint.from_leader(world, lambda: newest.shared(world.device))
        set_weights(self.model, shared["model"], newest.path)
        self.optimizer.load_state_dict(shared["optimizer"])
        self.scaler.load_state_dict(shared["scaler"])
        self.progress = Progress.of(shared["progress"])
        self.saved_step = newest.step
        self.run.log.info(f"resuming from {newest.path}, step {newest.step}")
        here = replace(newest, path=folder / newest.path.name)
        own = here.of_rank(world.rank) if newest.ranks == world.size else None
        lacking = [rank for rank, lacks in enumerate(world.gather(own is None)) if lacks]
        if own is None or lacking:
            why = (f"the checkpoint is of {newest.ranks} ranks and this is {world.size}"
                   if newest.ranks != world.size else
                   f"rank-R.pt is missing or damaged on the machine of rank(s) {', '.join(map(str, lacking))}")
            self.run.log.info(f"{why}: memories start empty, so the curve is not continued to the last bit")
            return
        self.learner.carries = to_device(own["carries"], world.device)
        torch.set_rng_state(own["cpu_rng"])
        if own["cuda_rng"] is not None and world.device.type == "cuda":
            torch.cuda.set_rng_state(own["cuda_rng"])
        self.window = Window.of(own["window"], world.device)

    def _take_weights(self, find: Callable[[], checkpoint.Checkpoint], *, partly: bool = False,
                      others: str = "") -> checkpoint.Checkpoint:
        """The weights, on every rank, of what the leading rank finds on its disk. `others`: what becomes of those that
        it has not."""
        def load() -> checkpoint.Checkpoint:
            found = find()
            new = load_weights(self.model, found, self.task.vocabulary, partly=partly)
            if new:
                self.run.log.info(f"{found.path} lacks {len(new)} tensors, which {others}: {span(new)}")
            return found
        found = checkpoint.from_leader(self.world, load)
        self.model.load_state_dict(self.world.broadcast(self.model.state_dict()))
        return found

    def _take_optimizer(self, source: Path) -> None:
        """The optimizer's state of what the leading rank finds on its disk; its settings are the recipe's."""
        ours, = self.optimizer.state_dict()["param_groups"]

        def load() -> dict[str, Any]:
            found = checkpoint.find(source)
            state = found.shared(self.world.device)["optimizer"]
            theirs, = state["param_groups"]
            if theirs.keys() != ours.keys() or theirs["param_names"] != ours["param_names"]:
                raise checkpoint.CheckpointError(f"The optimizer of {found.path} is another one, or of other "
                                                 f"parameters. init_optim=false takes the weights alone")
            return state | {"param_groups": [ours]}
        self.optimizer.load_state_dict(checkpoint.from_leader(self.world, load))

    def _stopped(self) -> Outcome:
        progress = self.progress
        self._save(valid_loss=None)
        self.run.log.info(f"stopped at step {progress.step} as asked; the checkpoint is in {self.run.checkpoints}")
        self.run.stop_honoured()
        self.run.status("stopped", progress.step)
        self.metrics.close()
        return Outcome(False, progress.step, progress.tokens)

    def _finished(self) -> Outcome:
        progress, clock, words = self.progress, self.recipe.clock, list[str]()
        with self.learner.whole():
            best = self._take_weights(lambda: checkpoint.find(self.run.folder))
            score = self._evaluate("test") if clock.test else None
        if score is not None:
            self._report("test", score)
            words = [f"test ppl {ppl(score.loss):.3f} with the weights of step {best.step}"]
        perplexity = None if best.valid_loss is None else ppl(best.valid_loss)
        rate = progress.timed_tokens / progress.timed_seconds if progress.timed_seconds else None
        targets = clock.targets(perplexity=perplexity, tokens_per_s=rate)
        return self._end(", ".join(words + verdicts(targets)), Outcome(True, progress.step, progress.tokens, score),
                         reached={"perplexity": perplexity, "tokens_per_s": rate})

    def found(self, why: str) -> Outcome:
        """The finder's end: its curve as lr_finder.json and for TensorBoard, and what it suggests."""
        progress, lr = self.progress, suggestion(self.progress.curve)
        rows = [{"lr": x, "loss": loss, "slope": slope}
                for (x, loss), slope in zip(progress.curve, slopes(progress.curve))]
        if self.world.leads:
            write_whole(self.run.folder / "lr_finder.json",
                        json.dumps({"suggested_lr": lr, "ended": why, "curve": rows}, indent=1) + "\n")
        for i, row in enumerate(rows):
            self.metrics.tags(i, finder__lr=row["lr"], finder__loss=row["loss"], finder__slope=row["slope"])
        self.run.log.info(f"the finder has ended at lr {self.lr:.3g}: {why}")
        message = (f"suggested lr {lr:.3g}, where the loss fell fastest. Start a new run (--name=NEW) with "
                   f"--set recipe.optim.lr={lr:.3g}" if lr else
                   "no lr is suggested, as the loss did not fall: begin lower, or take more steps (recipe.stop)")
        return self._end(message, Outcome(True, progress.step, progress.tokens, suggested_lr=lr))

    def _end(self, message: str, outcome: Outcome, **more: Any) -> Outcome:
        self.run.log.info(message)
        self.run.stop_honoured()
        self.run.status("finished", self.progress.step, message, **more)
        self.metrics.close()
        return outcome

    def _introduce(self) -> None:
        params, trained = self.sizes
        self.run.describe_machine()
        self.metrics.text("args", f"```\n{json.dumps(to_json(self.recipe), indent=1)}\n```")
        self.metrics.tags(self.progress.tokens, sizes__params=params, sizes__batch_size=self.batch_size,
                          **{f"sizes__{key}": x for key, x in self.task.sizes.items()})
        frozen = params - trained
        of_them = f", {frozen:,} of them frozen" if frozen else ""
        self.run.log.info(f"{params:,} parameters{of_them} | {self.world.size} rank(s) on {self.world.device.type}, "
                          f"{self.precision.name} | {self.batch_size} sequences a step | peak lr {self.peak_lr:.4g}")
        if self.compared.expected is not None:
            self.run.log.info(str(self.compared.expected))

    def _remaining(self, tokens_per_step: float) -> tuple[float, int]:
        """Tokens to go, and the step at which the run ends (an estimate where tokens decide)."""
        progress, stop = self.progress, self.recipe.stop
        to_go = [(stop.max_steps - progress.step) * tokens_per_step] if stop.max_steps is not None else []
        to_go += [stop.max_tokens - progress.tokens] if stop.max_tokens is not None else []
        remaining = max(0.0, min(to_go))
        return remaining, progress.step + round(remaining / tokens_per_step)

    def _good_checkpoint(self) -> str:
        if self.saved_step < 0:
            return "No checkpoint had been written yet."
        path = self.run.checkpoints / checkpoint.name(self.saved_step)       # not looked for: it may be another's disk
        return f"The last good checkpoint is {path} (step {self.saved_step})."
