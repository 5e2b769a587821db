"""How a peer gets what it lacks from a live one: the model and the data before it joins, the state afterwards."""

import logging
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError

from forge_lib import disk
from forge_lib.config import flag_name
from forge_lib.data.files import data_exists
from forge_lib.data.token_store import is_store, open_store, received_folder
from forge_lib.distributed.transfer_files import Files, list_files, total_bytes
from forge_lib.elastic.fetching import NETWORK_ERRORS, GoneError, RateMeter, StoppedError, download, fetch_facts
from forge_lib.elastic.meeting import Meeting
from forge_lib.elastic.membership import Membership
from forge_lib.elastic.peer_facts import Member, PeerFacts
from forge_lib.elastic.shared_state import SharedState
from forge_lib.elastic.sharing import Shared
from forge_lib.elastic.state_files import FILE_ERRORS, STATE, UPDATES, StateFiles, update_name
from forge_lib.errors import UserError
from forge_lib.models.loading import model_exists
from forge_lib.peers_config import ElasticConfig

logger = logging.getLogger("forge")

STATE_NAME = re.compile(rf"{STATE}-\d+")  # of a folder; a peer must not name another place on this machine
DATA_FLAGS = ("dataset_path", "eval_dataset_path")
FEW_UPDATES, MANY_UPDATES = 2, 16  # weights and momentum in fp32 are 16 times as large as an update in int4
SNAPSHOT_SECONDS = 20.0
RETRY_SECONDS = 1.0
COMMIT_SECONDS = 5.0  # how long a commit may take beyond twice the last exchange
POLL_SECONDS = 0.05


def missing_inputs(config: ElasticConfig) -> list[str]:
    """Returns the flags whose model or data is not on this machine."""
    missing = [] if model_exists(config.model_name) else ["model_name"]
    paths = {name: getattr(config, name) for name in DATA_FLAGS}
    return missing + [name for name, path in paths.items() if path and not data_exists(path)]


def fetch_inputs(
    config: ElasticConfig, membership: Membership, facts: PeerFacts, gives_up: Callable[[], bool]
) -> None:
    """Downloads the model and the token stores that this machine lacks from a live peer; waits until there is one.

    The configuration then names the downloaded stores. If `gives_up` returns true, it waits no longer.

    Raises:
        UserError: the live peer lacks them too, or the download is not possible.
    """
    missing = missing_inputs(config)
    if missing:
        logger.info(f"waiting for a peer that has {', '.join(map(flag_name, missing))}")
    while missing:
        members = membership.quorum(facts, gives_up)
        if members is None:
            return
        sources = [member.facts for member in members if member.facts.has_state]
        membership.leave()
        for source in sources:
            try:
                _fetch_from(source, missing, config, gives_up)
                return
            except StoppedError:
                return
            except (GoneError, *NETWORK_ERRORS) as error:
                logger.warning(f"{source.name} cannot be reached: {error}")
        time.sleep(RETRY_SECONDS)


def _fetch_from(source: PeerFacts, missing: list[str], config: ElasticConfig, gives_up: Callable[[], bool]) -> None:
    served = fetch_facts(source)
    for name in missing:
        files = served["folders"].get(name)
        if files is None:
            raise UserError(
                f"{flag_name(name)} {getattr(config, name)}: not on this machine, and {source.name} cannot send it "
                "(a Hub model or dataset, or a single file): download it here too"
            )
        if name == "model_name":
            target = Path(config.model_name).expanduser()
        else:
            target = received_folder(served["fingerprints"][name])
            setattr(config, name, str(target))
        if not target.exists():
            what = "the model" if name == "model_name" else f"the tokens of {flag_name(name)}"
            download(source, name, files, target, what, gives_up)


def serve_inputs(config: ElasticConfig, shared: Shared, stores: dict[str, Path]) -> None:
    """Serves the model folder and the token stores to peers that lack them.

    Args:
        config: names the model.
        shared: what this peer serves.
        stores: folder of the token store by flag.
    """
    folders = {**stores}
    model = Path(config.model_name).expanduser()
    if model.is_dir():
        folders["model_name"] = model
    fingerprints = {name: open_store(folder).fingerprint for name, folder in stores.items() if is_store(folder)}
    shared.facts["fingerprints"] = fingerprints
    for name, folder in folders.items():
        shared.folders[name] = (folder, list_files(folder))


@dataclass
class CaughtUp:
    """What came of an attempt to catch up.

    Attributes:
        contributed: whether what this peer had computed is in its state now: the others had committed it.
        was_dropped: whether that was dropped.
        update_seconds: that the download of one update takes; 0: not known.
    """

    contributed: bool = False
    was_dropped: bool = False
    update_seconds: float = 0.0


def catch_up(own: StateFiles, meeting: Meeting, ready: list[Member], gives_up: Callable[[], bool]) -> CaughtUp:
    """Brings this peer's state to that of the others: with the updates that it lacks, or else with all of it.

    Args:
        own: files of this peer's state; afterwards it may still be older than that of the others, who go on meanwhile.
        meeting: holds what this peer has sent in a round that it did not see committed.
        ready: the peers with the newest state; the first of them serves it.
        gives_up: called now and then; once it returns true, a download ends.

    """
    found, meter = CaughtUp(), RateMeter()
    commits = any(member.facts.tokens for member in ready)  # they commit a round now: it can be had in a moment
    for source in (member.facts for member in ready):
        if gives_up():
            return found
        try:
            served = _wait_for_update(source, gives_up) if commits else fetch_facts(source)["folders"]
            served = _wait_for_snapshot(own.state, source, served, gives_up)
            updates, newest = served.get(UPDATES, {}), choose_snapshot(own, source, served)
            names = _missing_updates(own.state, source, updates)
            is_smaller = newest and _needs_fewer_bytes(own.state, newest, served[newest], updates, names)
            is_complete = not is_smaller and _apply_updates(
                own, meeting, source, (updates, names), gives_up, meter, found
            )
            if not is_complete and newest:
                _load_state(own, meeting, source, (newest, served[newest]), gives_up, meter)
                found.was_dropped = True
            if is_complete or newest:
                found.update_seconds = meter.seconds_for(max((each["bytes"] for each in updates.values()), default=0))
                return found
        except StoppedError:
            return found
        except (GoneError, UserError, *FILE_ERRORS, *NETWORK_ERRORS) as error:  # UserError: the disk is full
            logger.warning(f"the state of {source.name} cannot be fetched: {error}; trying again")
    time.sleep(RETRY_SECONDS)
    return found


def _missing_updates(state: SharedState, source: PeerFacts, updates: dict) -> list[str]:
    """Returns the names of the updates that this peer lacks, if the source serves all of them; else none."""
    newest = source.round + (update_name(source.round) in updates)
    names = [update_name(each) for each in range(max(0, state.round), newest)]
    return names if all(name in updates for name in names) else []


def _needs_fewer_bytes(state: SharedState, newest: str, files: Files, updates: dict, names: list[str]) -> bool:
    """Returns whether a snapshot and the updates since then are a smaller download than all missing updates.

    The first missing update may contain what this peer has computed; with the snapshot it would count as lost. So a
    peer that lacks only a few never takes the snapshot.
    """
    first = update_name(_round_of(newest))
    if first <= update_name(state.round) or len(names) <= FEW_UPDATES:
        return False
    rest = sum(updates[name]["bytes"] for name in names if name >= first)
    return total_bytes(files) + rest < sum(updates[name]["bytes"] for name in names)


def _wait_for_update(source: PeerFacts, gives_up: Callable[[], bool]) -> dict:
    """Returns the folders that a peer serves, once they have the update of the round that it commits now."""
    until = time.monotonic() + COMMIT_SECONDS + 2 * source.exchange_seconds
    while True:
        served = fetch_facts(source)["folders"]
        updates = served.get(UPDATES)  # there are none with --sync-every 1
        if updates is None or update_name(source.round) in updates or time.monotonic() > until or gives_up():
            return served
        time.sleep(POLL_SECONDS)


def _wait_for_snapshot(state: SharedState, source: PeerFacts, served: dict, gives_up: Callable[[], bool]) -> dict:
    """Returns what a peer serves, once it has a snapshot, if this peer needs one.

    It does if it lacks more updates than a snapshot is large; or if none are served, as with --sync-every 1: then only
    a snapshot of the newest state helps. The peers that have this state write one as soon as they have seen that this
    peer lacks it.
    """
    until = time.monotonic() + SNAPSHOT_SECONDS
    while time.monotonic() < until and not gives_up():
        has_updates = bool(served.get(UPDATES))
        if has_updates and 0 <= source.round - max(0, state.round) <= MANY_UPDATES:
            break
        if max(map(_round_of, _snapshots(served)), default=-1) >= (0 if has_updates else source.round):
            break
        time.sleep(RETRY_SECONDS)
        served = fetch_facts(source)["folders"]
    return served


def choose_snapshot(own: StateFiles, source: PeerFacts, served: dict) -> str:
    """Returns the name of the snapshot to fetch: with the updates that are served, it leads to the newest state.

    One that has been downloaded in part is continued. If none leads there, one that is newer than this peer's state
    helps, too; empty: there is none.
    """
    updates, names = served.get(UPDATES, {}), _snapshots(served)
    whole = [name for name in names if all(update_name(n) in updates for n in range(_round_of(name), source.round))]
    begun = [name for name in whole if disk.partial_path(own.incoming / name).exists()]
    newer = [name for name in names if _round_of(name) > own.state.round]
    return max(begun or whole or newer, default="")


def _snapshots(served: dict) -> list[str]:
    return [name for name in served if STATE_NAME.fullmatch(name)]


def _round_of(snapshot: str) -> int:
    return int(snapshot.removeprefix(f"{STATE}-"))


def _apply_updates(
    own: StateFiles,
    meeting: Meeting,
    source: PeerFacts,
    served: tuple[dict, list[str]],
    gives_up: Callable[[], bool],
    meter: RateMeter,
    found: CaughtUp,
) -> bool:
    """Applies the updates of the rounds that this peer lacks, if the source has all of them.

    Returns:
        Whether the state is now that of the source.
    """
    files, names = served
    state = own.state
    if not names:
        return False
    for name in names:
        target = own.incoming / name.partition(".")[0]
        number = int(target.name) + 1  # of the round in the log
        what = f"the update of round {number}"
        download(source, UPDATES, {name: files[name]}, target, what, gives_up, rate=meter)
        try:
            commit, data, expected = own.read_update(target / name)
        except FILE_ERRORS as error:
            logger.warning(f"an update from {source.name} cannot be used: {error}")
            return False
        before = state.hash
        found.contributed |= meeting.apply_missed(commit, data)
        if state.hash != expected:
            logger.warning(f"the update of round {number} does not fit this peer's state: it gets all of it")
            return False
        try:
            own.keep_update(commit, data, before)
        except (OSError, SafetensorError) as error:
            logger.warning(f"the update of round {number} cannot be kept for others: {error}")
        disk.remove(target)
    return True


def _load_state(
    own: StateFiles,
    meeting: Meeting,
    source: PeerFacts,
    served: tuple[str, dict],
    gives_up: Callable[[], bool],
    meter: RateMeter,
) -> None:
    name, files = served
    target = own.incoming / name
    for old in own.incoming.glob(f"*{STATE}-*"):
        if not old.name.endswith(name):  # of a download that will not go on
            disk.remove(old)
    download(source, name, files, target, f"the state of round {_round_of(name)}", gives_up, rate=meter)
    is_right = own.load_snapshot(target)
    meeting.drop()
    if not is_right:
        logger.warning(f"the state from {source.name} does not have its hash: it is fetched again")
