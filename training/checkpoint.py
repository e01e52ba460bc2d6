"""What a checkpoint holds beside the files of Trainer, so that a resumed run goes on bit for bit."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import PreTrainedModel

from midimamba.errors import InputError
from midimamba.files import read_json, whole_file, write_whole
from midimamba.training.credit import Credit
from midimamba.training.discriminator_update import DiscriminatorUpdate
from midimamba.training.generator_update import GeneratorLoss
from midimamba.training.guard import Guard
from midimamba.training.judging import Judges
from midimamba.training.policies import load_policy, save_policy, save_tensors
from midimamba.training.whole_checkpoints import seal_of

DISCRIMINATOR_FILE = "discriminator.safetensors"
D_OPTIMIZER_FILE = "discriminator_optimizer.pt"
ROLLOUT_POLICY_FILE = "rollout_policy.safetensors"
REFERENCE_POLICY_FILE = "reference_policy.safetensors"
AVERAGED_POLICY_FILE = "averaged_policy.safetensors"
STATE_FILE = "adversarial_state.json"


class AdversarialState:
    """
    All that a run has beside the generator and its optimizer.

    Args:
        policies (`dict[str, PreTrainedModel]`): the copies of the generator, by the files they are saved in.
        discriminator_update (`DiscriminatorUpdate`): the discriminator, its optimizer, and the old negatives.
        generator_loss (`GeneratorLoss`): has the adaptive weight.
        credit (`Credit`): has a running mean.
        guard (`Guard`): has the reference values and the number of roll-backs.
        judges (`Judges`): may have a discriminator of musical features.
    """

    def __init__(
        self,
        policies: dict[str, PreTrainedModel],
        discriminator_update: DiscriminatorUpdate,
        generator_loss: GeneratorLoss,
        credit: Credit,
        guard: Guard,
        judges: Judges,
    ):
        self.policies = policies
        self.discriminator_update = discriminator_update
        self.generator_loss = generator_loss
        self.credit = credit
        self.guard = guard
        self.judges = judges
        self.args = discriminator_update.args
        accelerator = discriminator_update.accelerator
        self._discriminator = accelerator.unwrap_model(discriminator_update.discriminator)

    def save(self, folder: Path) -> None:
        """Write what this process has to write."""
        folder.mkdir(parents=True, exist_ok=True)
        if self.args.replay_fraction:
            replayed = self.discriminator_update.replay.sequences
            if replayed is None:  # before the first step
                replayed = torch.empty(0, self.args.sequence_length, dtype=torch.long)
            save_tensors({"input_ids": replayed}, folder / self._replay_file)
        if not self.args.should_save:
            return
        save_tensors(self._discriminator.state_dict(), folder / DISCRIMINATOR_FILE)
        with whole_file(folder / D_OPTIMIZER_FILE) as unfinished:
            torch.save(self.discriminator_update.optimizer.state_dict(), unfinished)
        self.judges.save(folder)
        for name, policy in self.policies.items():
            save_policy(policy, folder / name)
        state = {
            "kl_coef": self.generator_loss.kl_coef,
            "baseline": self.credit.state_dict(),
            "guard": self.guard.state_dict(),
        }
        write_whole(folder / STATE_FILE, json.dumps(state))

    def load(self, folder: Path) -> float:
        """Read what was written. Returns what the saved learning rates are to be multiplied by.

        Raises:
            InputError: if the run that wrote it had other options.
        """
        expected = [DISCRIMINATOR_FILE, D_OPTIMIZER_FILE, STATE_FILE, *self.policies]
        # A process that the run did not have before remembers nothing.
        remembers = self.args.replay_fraction and self.args.process_index < seal_of(folder)["processes"]
        if remembers:
            expected.append(self._replay_file)
        missing = [name for name in expected if not (folder / name).exists()]
        if missing:
            raise InputError(f"{folder} lacks {', '.join(missing)}: resume a run with the options it was started with")
        device = self.args.device
        self._discriminator.load_state_dict(load_file(folder / DISCRIMINATOR_FILE))
        optimizer = torch.load(folder / D_OPTIMIZER_FILE, map_location="cpu", weights_only=True)  # loading moves it
        self.discriminator_update.optimizer.load_state_dict(optimizer)
        self.judges.load(folder)
        for name, policy in self.policies.items():
            load_policy(policy, folder / name)
        if remembers:
            self.discriminator_update.replay.sequences = load_file(folder / self._replay_file)["input_ids"].to(device)
        state: dict[str, Any] = read_json(folder / STATE_FILE)
        self.generator_loss.kl_coef = state["kl_coef"]
        self.credit.load_state_dict(state["baseline"], device)
        return self.guard.load_state_dict(state["guard"])

    @property
    def _replay_file(self) -> str:
        """Every process remembers what it sampled itself."""
        return f"replay_{self.args.process_index}.safetensors"
