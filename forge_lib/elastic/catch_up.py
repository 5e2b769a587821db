"""How a peer gets what it lacks from a live one: the model and the data before it joins, the state afterwards."""

import logging
import re
import time
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError

from forge_lib import disk
from forge_lib.config import flag_name
from forge_lib.data.files import data_exists
from forge_lib.data.token_store import is_store, open_store, received_folder
from forge_lib.distributed.transfer_files import list_files
from forge_lib.elastic.fetching import NETWORK_ERRORS, GoneError, download, fetch_facts
from forge_lib.elastic.meeting import Meeting
from forge_lib.elastic.membership import Membership
from forge_lib.elastic.peer_facts import Member, PeerFacts
from forge_lib.elastic.shared_state import STATE, UPDATE_ERRORS, UPDATES, SharedState, update_name
from forge_lib.elastic.sharing import Shared
from forge_lib.errors import UserError
from forge_lib.models.loading import model_exists
from forge_lib.peers_config import ElasticConfig

logger = logging.getLogger("forge")

STATE_NAME = re.compile(rf"{STATE}-\d+")  # of a folder; a peer must not name another place on this machine
DATA_FLAGS = ("dataset_path", "eval_dataset_path")
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
            download(source, name, files, target, gives_up)


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


def catch_up(
    state: SharedState, meeting: Meeting, ready: list[Member], folder: Path, gives_up: Callable[[], bool]
) -> bool:
    """Brings this peer's state to that of the others: with the updates that it lacks, or else with all of it.

    Args:
        state: of this peer; afterwards it may still be older than that of the others, who go on meanwhile.
        meeting: holds what this peer has sent in a round that it did not see committed.
        ready: the peers with the newest state; the first of them serves it.
        folder: for the downloads.
        gives_up: called now and then; once it returns true, a download ends.

    Returns:
        Whether what this peer had computed is in the state: the others had committed it.
    """
    is_in = False
    commits = any(member.facts.tokens for member in ready)  # they commit a round now: it can be had in a moment
    for source in (member.facts for member in ready):
        try:
            served = _wait_for_update(source) if commits else fetch_facts(source)["folders"]
            is_complete, is_in = _apply_updates(state, meeting, source, served.get(UPDATES, {}), folder, gives_up)
            newest = max(filter(STATE_NAME.fullmatch, served), default="")
            if not is_complete and newest:
                _load_state(state, meeting, source, (newest, served[newest]), folder, gives_up)
                return is_in
            if is_complete:
                return is_in
        except (GoneError, UserError, SafetensorError, *NETWORK_ERRORS) as error:  # UserError: the disk is full
            logger.warning(f"the state of {source.name} cannot be fetched: {error}; trying again")
    time.sleep(RETRY_SECONDS)
    return is_in


def _wait_for_update(source: PeerFacts) -> dict:
    """Returns the folders that a peer serves, once they have the update of the round that it commits now."""
    until = time.monotonic() + COMMIT_SECONDS + 2 * source.exchange_seconds
    while True:
        served = fetch_facts(source)["folders"]
        updates = served.get(UPDATES)  # there are none with --sync-every 1
        if updates is None or update_name(source.round) in updates or time.monotonic() > until:
            return served
        time.sleep(POLL_SECONDS)


def _apply_updates(
    state: SharedState, meeting: Meeting, source: PeerFacts, served: dict, folder: Path, gives_up: Callable[[], bool]
) -> tuple[bool, bool]:
    """Applies the updates of the rounds that this peer lacks, if the source has all of them.

    Returns:
        Whether the state is now that of the source; and whether it contains what this peer had computed.
    """
    newest = source.round + (update_name(source.round) in served)
    names, is_in = [update_name(each) for each in range(state.round, newest)], False
    if not names or any(name not in served for name in names):
        return False, False
    for name in names:
        target = folder / name.partition(".")[0]
        try:
            download(source, UPDATES, {name: served[name]}, target, gives_up)
            commit, data, expected = state.read_update(target / name)
        except (GoneError, UserError, *NETWORK_ERRORS, *UPDATE_ERRORS) as error:
            logger.warning(f"an update from {source.name} cannot be used: {error}")
            return False, is_in
        before = state.hash
        is_in |= meeting.apply_missed(commit, data)
        if state.hash != expected:
            logger.warning(f"the update of round {commit.round} does not fit this peer's state: it gets all of it")
            return False, is_in
        try:
            state.keep_update(commit, data, before)
        except (OSError, SafetensorError) as error:
            logger.warning(f"the update of round {commit.round} cannot be kept for others: {error}")
        disk.remove(target)
    return True, is_in


def _load_state(
    state: SharedState,
    meeting: Meeting,
    source: PeerFacts,
    served: tuple[str, dict],
    folder: Path,
    gives_up: Callable[[], bool],
) -> None:
    name, files = served
    target = folder / name
    download(source, name, files, target, gives_up)
    meeting.drop()
    is_right = state.load_snapshot(target)
    disk.remove(target)
    if not is_right:
        logger.warning(f"the state from {source.name} does not have its hash: it is fetched again")
