"""What a run writes down for its card."""

import json
from pathlib import Path

import pytest
from transformers import TrainerState

from midimamba.training.run_record import RECORD_FILE, run_record, training_command
from midimamba.training.scripts import save_model
from support import make_generator


def test_the_command_has_no_secrets_and_no_folders_of_this_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "my data").mkdir(parents=True)
    line = [
        *(str(tmp_path / "pretrain.py"), "--data", "runs/my data", f"--output_dir={tmp_path}/model"),
        *("--hub_token", "hf_secret", "--model", "you/bach", "--wandb_api_key=abc", "--bos_token_id", "1"),
        *("--lookback_bars", "1", "2", "--hub_token=hf_other", "--seed", "3"),
    ]
    assert training_command(line) == (
        "accelerate launch -m midimamba.training.pretrain --data 'my data' --output_dir=model --model you/bach "
        "--bos_token_id 1 --lookback_bars 1 2 --seed 3"
    )


def test_the_record_is_saved_with_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["adversarial.py", "--max_steps", "9"])
    state = TrainerState(global_step=9, log_history=[{"loss": 1.0}, {"train_runtime": 12.6}])
    save_model(tmp_path / "model", make_generator(), state=state)
    record = json.loads((tmp_path / "model" / RECORD_FILE).read_text())
    assert record["command"] == "accelerate launch -m midimamba.training.adversarial --max_steps 9"
    assert (record["steps"], record["seconds"]) == (9, 13)
    assert "threads" in record["hardware"] or "NVIDIA" in record["hardware"]
    assert {"midimamba", "torch"} <= set(record["versions"])
    assert "seconds" not in run_record(["pretrain.py"], TrainerState())
