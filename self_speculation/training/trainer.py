"""LayerSkip training (section 4.1 of the paper): layer dropout and early-exit loss in transformers' `Trainer`."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, ProgressCallback, TrainingArguments

from self_speculation.exit_adapter import adapter_of
from self_speculation.training.anchor import anchored
from self_speculation.training.arguments import LayerSkipArguments
from self_speculation.training.checkpoints import LOWER, WholeCheckpointTrainer
from self_speculation.training.checks import check_optimiser
from self_speculation.training.early_exit_loss import EarlyExitLoss
from self_speculation.training.exit_adapter_loss import AdapterTarget, ExitAdapterLoss
from self_speculation.training.exit_measures import exit_metrics, scoring
from self_speculation.training.interruption import OutlivingWorkers
from self_speculation.training.labels import num_labels
from self_speculation.training.layer_dropout import LayerDropout
from self_speculation.training.lora import go_on_from, with_lora
from self_speculation.training.muon import MuonWithAdamW

if TYPE_CHECKING:
    from peft import PeftModel

# Flags that need the weights of a model in one place.
WHOLE_MODEL = ("lora_rank", "anchor_weight", "adapter_vocab", "keep_states_gb")


def prepared(
    model: PreTrainedModel, training: TrainingArguments, layerskip: LayerSkipArguments
) -> "PreTrainedModel | PeftModel":
    """The model as it is trained: with adapters, if a rank is given.

    Raises:
        ValueError: LoRA or an anchor cannot be had, or not with other flags.
    """
    chosen = next((flag for flag in WHOLE_MODEL if getattr(layerskip, flag)), None)
    if chosen and (training.fsdp or training.deepspeed):
        raise ValueError(f"--{chosen} does not go with --fsdp or --deepspeed.")
    if not layerskip.lora_rank:
        return model
    if training.gradient_checkpointing:
        # Frozen embeddings would give layers an input without gradients, which reentrant checkpointing passes over.
        model.enable_input_require_grads()
    adapted = with_lora(model, layerskip.lora_rank, layerskip.lora_alpha, training.seed)
    if layerskip.lora_from:
        go_on_from(adapted, Path(layerskip.lora_from), layerskip.lora_rank, layerskip.lora_alpha)
    return adapted


class LayerSkipTrainer(WholeCheckpointTrainer):
    """transformers' `Trainer` with layer dropout, the early-exit loss, and checkpoints that are whole or absent.

    Its evaluation has the measures of every exit layer, like `eval_exit_3_agreement`.
    """

    def __init__(
        self, model: PreTrainedModel, training: TrainingArguments, layerskip: LayerSkipArguments, **kwargs: Any
    ) -> None:
        trained = prepared(model, training, layerskip)
        super().__init__(trained, training, compute_metrics=exit_metrics, **kwargs)
        self.layerskip = layerskip
        num_steps = self.set_initial_training_values(self.args, self.get_train_dataloader())[-1]
        if num_steps < 1:
            raise ValueError("--max_steps must be at least 1, or negative for --num_train_epochs to decide.")
        check_optimiser(self.args, self.llama, num_steps)
        layers = self.llama.model.layers
        rates = layerskip.dropout_rates(len(layers), num_steps)
        self.dropout = LayerDropout(layers, rates, self.args.seed, layerskip.layer_dropout_rescale)
        self.early_exit_loss = self._exit_loss(num_steps)

    def _exit_loss(self, num_steps: int) -> EarlyExitLoss | ExitAdapterLoss:
        """J of section 4.1.2, or the loss of an exit adapter, which alone is trained."""
        own, adapter = self.layerskip, adapter_of(self.llama)
        if adapter is not None:
            target = AdapterTarget(own.argmax_share, self._drafted_tokens())
            return ExitAdapterLoss(self.llama, adapter, own.loss_chunk_tokens, target, own.keep_states_gb * 2**30)
        schedule = own.exit_schedule(self.llama.config.num_hidden_layers, num_steps)
        loss = EarlyExitLoss(self.llama, schedule, own.exit_target, own.loss_chunk_tokens)
        if own.anchor_weight:
            loss.anchor = anchored(own.anchor_weight, self.llama, self.adapted)
        return loss

    def _drafted_tokens(self) -> Tensor | None:
        """The tokens (N) that an exit adapter learns; None: all.

        Raises:
            ValueError: the vocabulary has fewer.
        """
        num_tokens, vocab_size = self.layerskip.adapter_vocab, self.llama.config.vocab_size
        if num_tokens > vocab_size:
            raise ValueError(f"--adapter_vocab must be at most {vocab_size}, the model's vocabulary, not {num_tokens}.")
        if not num_tokens:
            return None
        counted: Any = self.train_dataset
        counts_V: Tensor = counted.token_counts(vocab_size)
        return counts_V.argsort(descending=True, stable=True)[:num_tokens].sort().values

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train; afterwards the model has its own `forward` again."""
        if self.layerskip.compile_layers:
            for layer in self.dropout.layers:
                layer.forward = torch.compile(layer.forward)
        self.dropout.attach()
        self.early_exit_loss.attach()
        self.dropout.step = -1  # No step yet: the first one begins with micro-batch 0.
        try:
            return super().train(*args, **kwargs)
        finally:
            self.dropout.remove()
            self.early_exit_loss.remove()
            self._close_bars()

    def _close_bars(self) -> None:
        """Let no progress bar that was cut short be drawn once more, under what is said of the reason."""
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, ProgressCallback):
                bars: list[Any] = [callback.training_bar, callback.prediction_bar]
                for bar in filter(None, bars):
                    bar.close()

    def get_train_dataloader(self) -> Any:
        """The Trainer's own, whose processes load data until a step has ended that a signal waits for."""
        loader: Any = super().get_train_dataloader()
        loader.worker_init_fn = OutlivingWorkers(loader.worker_init_fn)
        return loader

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The Trainer's own optimiser, or Muon with AdamW."""
        if self.optimizer is None and self.layerskip.muon:
            betas = (self.args.adam_beta1, self.args.adam_beta2)
            self.optimizer = MuonWithAdamW(self.llama, self.args.learning_rate, self.args.weight_decay, betas)
        return super().create_optimizer(model)

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """Tell the dropout and the loss where training is, t; then the Trainer's forward and backward pass.

        Raises:
            ValueError: the loss is not finite, and so would be the weights.
        """
        step = self.state.global_step
        self.dropout.micro_batch = self.dropout.micro_batch + 1 if step == self.dropout.step else 0
        self.dropout.step = self.early_exit_loss.step = step
        loss = super().training_step(*args, **kwargs)
        # The Trainer itself looks at this number next, so that nothing waits longer for it.
        if not loss.isfinite():
            raise ValueError(f"{self.diverged}: the loss of step {step + 1} is {loss.item()}; {LOWER}.")
        return loss

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """The measures of the last layer and of every exit, on all processes together."""
        with scoring(self.llama, self.layerskip.loss_chunk_tokens):
            return super().evaluate(*args, **kwargs)

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Tensor], *_: Any, **__: Any
    ) -> tuple[None, Tensor, Tensor]:
        """Sums of the measures for each row, and how many tokens they are sums over."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            return None, model(**inputs).logits, num_labels(inputs["labels"])
