"""Every YAML of accelerate_configs trains, and the wizard's YAML for CPUs is refused with its fix."""

import re
import sys

import pexpect
import pytest
import yaml
from commands import BIN, QUIET, ROOT, SHORT
from made_configs import make_configs
from run_folders import rows

CONFIGS = ROOT / "accelerate_configs"
LAUNCH = (BIN / "accelerate", "launch", "--config_file")
FLAGS = [*SHORT, *QUIET, "--max-steps", "2"]


@pytest.mark.parametrize(("name", "count"), [("single_process", 1), ("cpu_2_processes", 2), ("multi_gpu", 2)])
def test_a_yaml_for_one_machine_trains_on_its_processes(train, free_port, name, count):
    """multi_gpu uses the CPU on a machine without a GPU."""
    launcher = (*LAUNCH, CONFIGS / f"{name}.yaml", "--main_process_port", free_port)
    folder, ended = train(*FLAGS, launcher=launcher)
    assert ended.code == 0, ended.output
    assert rows(folder)[-1]["num_processes"] == count


@pytest.mark.parametrize("name", ["multi_node", "multi_node_cpu"])
def test_a_yaml_for_several_machines_trains_on_both(start, tmp_path, free_port, name):
    """Two launchers on loopback: only rank and address are given besides the file, as in its README."""
    running = []
    for rank in (0, 1):
        words = [*LAUNCH, CONFIGS / f"{name}.yaml", "--machine_rank", rank]
        words += ["--main_process_ip", "127.0.0.1", "--main_process_port", free_port, "scripts/train.py", *FLAGS]
        running.append(start([*words, "--output-dir", tmp_path / str(rank)], warm=True))
    ended = [each.finish() for each in running]
    assert [each.code for each in ended] == [0, 0], ended[0].output + ended[1].output
    assert rows(tmp_path / "0")[-1]["num_processes"] == 2
    assert not rows(tmp_path / "1") if (tmp_path / "1" / "metrics.jsonl").exists() else True


def test_every_yaml_is_tested_and_contains_only_the_topology():
    names = {path.stem for path in CONFIGS.glob("*.yaml")}
    assert names == {"single_process", "cpu_2_processes", "multi_gpu", "multi_node", "multi_node_cpu"}
    for path in CONFIGS.glob("*.yaml"):
        assert "mixed_precision" not in yaml.safe_load(path.read_text())


@pytest.fixture
def wizard_yaml(tmp_path):
    """What `accelerate config` writes for two CPU processes on one machine."""
    path = tmp_path / "wizard.yaml"
    wizard = pexpect.spawn(
        sys.executable,
        ["-m", "accelerate.commands.accelerate_cli", "config", "--config_file", str(path)],
        encoding="utf-8",
        timeout=60,
        dimensions=(60, 200),
    )
    wizard.expect("compute environment")
    wizard.send("\r")
    wizard.expect("Which type of machine")
    wizard.send("1\r")  # multi-CPU
    for question, answer in [
        ("How many different machines", "1"),
        ("Should distributed operations", "no"),
        ("mpirun", "no"),
        ("torch dynamo", "no"),
        ("How many processes", "2"),
    ]:
        wizard.expect(question)
        wizard.sendline(answer)
    wizard.expect("mixed precision")
    wizard.send("\r")
    wizard.expect(pexpect.EOF)
    return path


def test_the_wizards_yaml_for_cpus_is_refused_and_works_with_the_named_fix(train, wizard_yaml, free_port):
    """train.py and make_configs.py --check name the same two lines; with these changed, both accept the YAML."""
    assert yaml.safe_load(wizard_yaml.read_text())["distributed_type"] == "MULTI_CPU"
    folder, ended = train(*FLAGS, launcher=(*LAUNCH, wizard_yaml))
    assert ended.code != 0
    assert ended.seconds < 30
    assert not (folder / "final").exists()
    fix = r"Change these two lines of the YAML:\n\s+(\S+): (\S+)\n\s+(\S+): (\S+)"
    lines = re.search(fix, ended.output).groups()
    checked = make_configs("--check", wizard_yaml)
    assert checked.returncode == 2
    assert re.search(fix, checked.stderr).groups() == lines
    text = wizard_yaml.read_text()
    for key, value in (lines[:2], lines[2:]):
        text = re.sub(rf"^{key}: .*$", f"{key}: {value}", text, flags=re.MULTILINE)
    wizard_yaml.write_text(text)
    checked = make_configs("--check", wizard_yaml)
    assert (checked.returncode, "no mistakes" in checked.stdout) == (0, True), checked.stderr
    folder, ended = train(*FLAGS, launcher=(*LAUNCH, wizard_yaml, "--main_process_port", free_port))
    assert ended.code == 0, ended.output
    assert rows(folder)[-1]["num_processes"] == 2
