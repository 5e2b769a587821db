"""scripts/make_configs.py: the files that it writes, and the commands that it prints."""

import shutil
import stat
import sys

import pytest
from commands import SHORT
from made_configs import LAB, make_configs, printed_commands
from run_folders import losses, rows

from forge_lib.cluster.cluster_file import read_cluster
from forge_lib.cluster.wireguard import read_public_keys
from forge_lib.errors import UserError


def test_a_file_of_another_program_is_not_overwritten(tmp_path):
    """A machine's YAML could have the name of any file, here of cluster.yaml itself."""
    (tmp_path / "cluster.yaml").write_text("name: a\nmachines: [{name: cluster, address: 10.77.0.1}]")
    ended = make_configs(tmp_path / "cluster.yaml", "--output-dir", tmp_path)
    assert (ended.returncode, "exists, and this program did not write it" in ended.stderr) == (2, True)
    assert (tmp_path / "cluster.yaml").read_text().startswith("name: a")


@pytest.mark.skipif(not shutil.which("wg"), reason="needs wireguard-tools")
def test_each_machine_makes_its_own_key_and_only_public_keys_are_shared(tmp_path):
    """Each machine runs the same command with its own output folder; the last one finds the keys of all."""
    (tmp_path / "cluster.yaml").write_text(LAB + "wireguard: {subnet: 10.88.0.0/24}\n")
    keys = tmp_path / "keys"

    def make(name: str) -> str:
        flags = (tmp_path / "cluster.yaml", "--output-dir", tmp_path / name, "--keys", keys, "--machine", name)
        ended = make_configs(*flags)
        assert ended.returncode == 0, ended.stderr
        return ended.stdout

    assert "no public key of bob yet" in make("alice")
    assert not (tmp_path / "alice" / "alice.conf").exists()
    private = (tmp_path / "alice" / "alice.key").read_text()
    make("bob")
    make("alice")
    assert (tmp_path / "alice" / "alice.key").read_text() == private, "an existing key is kept"
    assert sorted(path.name for path in keys.iterdir()) == ["alice.pub", "bob.pub"]
    for name, other in (("alice", "bob"), ("bob", "alice")):
        folder = tmp_path / name
        for secret in (f"{name}.key", f"{name}.conf"):
            assert stat.S_IMODE((folder / secret).stat().st_mode) == 0o600
        text = (folder / f"{name}.conf").read_text()
        assert f"PublicKey = {(keys / f'{other}.pub').read_text().strip()}" in text
        assert (tmp_path / other / f"{other}.key").read_text().strip() not in text
        assert "main_process_ip: 10.88.0.1" in (folder / f"{name}.yaml").read_text()
    assert "Endpoint = 10.77.0.2:51820" in (tmp_path / "alice" / "alice.conf").read_text()
    assert "AllowedIPs = 10.88.0.2/32" in (tmp_path / "alice" / "alice.conf").read_text()
    (keys / "bob.pub").write_text((keys / "alice.pub").read_text())
    with pytest.raises(UserError, match="have the same key"):
        read_public_keys(read_cluster(tmp_path / "cluster.yaml"), keys)


@pytest.mark.netns
def test_the_printed_commands_check_the_cluster_and_train_on_it(hosts, start, tmp_path):
    """2 + 1 processes on two machines whose own names resolve to 127.0.1.1, as on many laptops."""
    machines = hosts(2)
    (tmp_path / "cluster.yaml").write_text(LAB + "mixed_precision: no\n")
    ended = make_configs(tmp_path / "cluster.yaml", "--output-dir", tmp_path / "lab")
    assert ended.returncode == 0, ended.stderr
    (tmp_path / "hosts").write_text("127.0.0.1 localhost\n127.0.1.1 alice bob\n")
    script = 'hostname "$0" && mount --bind "$1" /etc/hosts && shift && exec "$@"'

    def run_on_both(lines: list[list[str]], *flags) -> list:
        running = []
        for n, (name, words) in enumerate(zip(("alice", "bob"), lines, strict=True), 1):
            prefix = [*machines.on(n), "env", "OMP_NUM_THREADS=1", "unshare", "--uts", "--mount", "sh", "-c", script]
            running.append(start([*words, *flags], prefix=[*prefix, name, str(tmp_path / "hosts")]))
        return [each.finish(120) for each in running]

    check, first, second, same, _ = printed_commands(ended.stdout)
    checked = run_on_both([[sys.executable, *check[1:]]] * 2)
    assert [each.code for each in checked] == [0, 0], checked[0].output + checked[1].output
    assert "home-lab: no problems found" in checked[1].output
    flags = [*SHORT, "--batch-size", "12", "--max-steps", "20", "--log-every", "1", "--eval-every", "0"]
    one = start([sys.executable, "scripts/train.py", *flags, "--output-dir", tmp_path / "one"], warm=True).finish()
    assert one.code == 0, one.output
    for number, lines in enumerate(([first, second], [same] * 2)):
        folder = tmp_path / f"run{number}"
        ended = run_on_both(lines, *flags, "--output-dir", folder)
        assert [each.code for each in ended] == [0, 0], ended[0].output + ended[1].output
        assert rows(folder)[-1]["num_processes"] == 3
        assert losses(folder) == pytest.approx(losses(tmp_path / "one"), rel=1e-4)
