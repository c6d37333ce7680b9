"""Commands on a pool that runs: namespaces, nodes, status, and blocks by hand."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cli.conftest import Up, memfabric

pytestmark = pytest.mark.processes

BLOCK = 4096
_names = (f"space-{number}" for number in itertools.count())


@pytest.fixture
def space(pool: Up) -> str:
    """A namespace of its own, with blocks of 4 KiB."""
    name = next(_names)
    result = pool.run("namespace", "create", name, "--block-size", "4KiB")
    assert result.exit_code == 0, result.output
    return name


@pytest.fixture
def put(pool: Up, space: str, tmp_path: Path) -> Callable[..., list[str]]:
    """Stores bytes with ``memfabric put`` and returns the keys."""

    def store(data: bytes, *options: str) -> list[str]:
        file = tmp_path / "data"
        file.write_bytes(data)
        result = pool.run("put", "-n", space, str(file), *directory(pool), *options)
        assert result.exit_code == 0, result.output
        return result.stdout.split()

    return store


def directory(pool: Up) -> list[str]:
    """Where this pool keeps its memory."""
    return ["--directory", str(pool.directory)]


def get(pool: Up, space: str, keys: list[str], *options: str) -> bytes:
    """The bytes that ``memfabric get`` prints."""
    result = pool.run("get", "-n", space, *keys, *directory(pool), *options)
    assert result.exit_code == 0, result.stderr
    return result.stdout_bytes


# --- put and get -------------------------------------------------------------------------------------------------


def test_a_file_comes_back(pool: Up, space: str, put: Callable[..., list[str]]) -> None:
    data = os.urandom(5 * BLOCK)
    keys = put(data)
    assert len(keys) == 5
    assert all(len(bytes.fromhex(key)) == 16 for key in keys)
    assert get(pool, space, keys) == data
    assert get(pool, space, keys[3:1:-1]) == data[3 * BLOCK : 4 * BLOCK] + data[2 * BLOCK : 3 * BLOCK]


def test_keys_follow_from_content_and_the_keys_before(put: Callable[..., list[str]]) -> None:
    same = bytes(BLOCK)
    keys = put(same * 3)
    assert len(set(keys)) == 3, "equal content at another place in the chain has another key"
    assert put(same * 3) == keys
    assert put(same * 2) == keys[:2]
    assert put(same, "--parent", keys[1]) == keys[2:]


def test_the_key_is_the_documented_digest(pool: Up, space: str, put: Callable[..., list[str]]) -> None:
    data = os.urandom(BLOCK)
    shown = pool.json("namespace", "show", space)
    assert isinstance(shown, dict)
    state = hashlib.blake2b(bytes.fromhex(shown["fingerprint_digest"]), digest_size=16, person=b"memfabric-put-1")
    state.update(bytes(16) + data)
    assert put(data) == [state.hexdigest()]


def test_storing_again_says_that_it_is_there(pool: Up, space: str, tmp_path: Path) -> None:
    file = tmp_path / "data"
    file.write_bytes(os.urandom(2 * BLOCK))
    first = pool.run("put", "-n", space, str(file), *directory(pool))
    again = pool.run("put", "-n", space, str(file), *directory(pool))
    assert "2 blocks stored (8 KiB)." in first.stderr
    assert "0 blocks stored (0 B), 2 already there." in again.stderr
    assert first.stdout == again.stdout


@pytest.mark.parametrize("size", [1, BLOCK - 1, 3 * BLOCK + 7])
def test_a_file_of_broken_blocks_needs_pad(pool: Up, space: str, tmp_path: Path, size: int) -> None:
    file = tmp_path / "data"
    file.write_bytes(os.urandom(size))
    refused = pool.run("put", "-n", space, str(file), *directory(pool))
    assert refused.exit_code == 2
    assert f"has {size:,} bytes" in refused.stderr
    assert "--pad" in refused.stderr
    assert pool.json("ls", "-n", space) == [], "nothing is stored when it is refused"

    padded = pool.run("put", "-n", space, str(file), "--pad", *directory(pool))
    assert padded.exit_code == 0
    assert "of padding" in padded.stderr
    keys = padded.stdout.split()
    whole = get(pool, space, keys)
    assert whole == file.read_bytes() + bytes(-size % BLOCK)
    assert get(pool, space, keys, "--bytes", str(size)) == file.read_bytes()


def test_an_empty_file_is_refused(pool: Up, space: str, tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    result = pool.run("put", "-n", space, str(tmp_path / "empty"))
    assert result.exit_code == 2
    assert "is empty" in result.stderr


def test_standard_input_and_output_make_a_pipe(pool: Up, space: str) -> None:
    data = os.urandom(300 * BLOCK)
    common = ["-a", pool.address, "-n", space, *directory(pool)]
    put = subprocess.Popen(memfabric("put", *common, "-"), stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    get = subprocess.Popen(memfabric("get", *common, "--keys", "-"), stdin=put.stdout, stdout=subprocess.PIPE)
    assert put.stdin is not None and put.stdout is not None
    put.stdout.close()
    with put.stdin:
        put.stdin.write(data)
    found, _ = get.communicate()
    assert (put.wait(), get.returncode) == (0, 0)
    assert found == data


def test_a_file_larger_than_a_batch(pool: Up, space: str, put: Callable[..., list[str]], tmp_path: Path) -> None:
    data = os.urandom(4097 * BLOCK)
    keys = put(data)
    assert len(set(keys)) == 4097
    (tmp_path / "keys").write_text("\n".join(keys))
    assert get(pool, space, [], "--keys", str(tmp_path / "keys")) == data
    assert put(data) == keys


def test_a_key_of_ones_own(pool: Up, space: str, put: Callable[..., list[str]], tmp_path: Path) -> None:
    data = os.urandom(BLOCK)
    assert put(data, "--key", "ab" * 16) == ["ab" * 16]
    assert get(pool, space, ["AB" * 16]) == data
    (tmp_path / "two").write_bytes(bytes(2 * BLOCK))
    refused = pool.run("put", "-n", space, str(tmp_path / "two"), "--key", "cd" * 16)
    assert refused.exit_code == 2
    assert "--key names one block" in refused.stderr


@pytest.mark.parametrize(
    "text", [json.dumps(list(range(35))), " ".join(map(str, range(35))), "0,1,2\n" + ",".join(map(str, range(3, 35)))]
)
def test_keys_from_token_ids(pool: Up, space: str, put: Callable[..., list[str]], tmp_path: Path, text: str) -> None:
    import memfabric

    (tmp_path / "tokens").write_text(text)
    keys = put(os.urandom(2 * BLOCK), "--tokens", str(tmp_path / "tokens"))
    with memfabric.connect(pool.address, namespace=space) as client:
        assert keys == client.block_keys(range(35)).hex()
        assert client.match(client.block_keys(range(35))) == 2


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[1, 2, 3]", "3 tokens make 0 whole blocks of 16, but"),
        ("[1, -2]", "item 2 is '-2', not a token id"),
        ("[1, true]", "not a token id"),
        ("1 2 x", "item 3 is 'x', not a token id"),
        ('{"a": 1}', "expected a list of token ids"),
        ("4294967296", "not a token id"),
    ],
)
def test_bad_token_ids(pool: Up, space: str, tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "tokens").write_text(text)
    (tmp_path / "data").write_bytes(bytes(BLOCK))
    result = pool.run("put", "-n", space, str(tmp_path / "data"), "--tokens", str(tmp_path / "tokens"))
    assert result.exit_code == 2
    assert words in result.stderr


def test_a_missing_block_leaves_the_output_as_it_was(
    pool: Up, space: str, put: Callable[..., list[str]], tmp_path: Path
) -> None:
    keys = put(os.urandom(2 * BLOCK))
    out = tmp_path / "out"
    out.write_text("precious")
    result = pool.run("get", "-n", space, *keys, "00" * 16, "-o", str(out), *directory(pool))
    assert result.exit_code == 1
    assert f"1 block missing ({'00' * 16})" in result.stderr
    assert out.read_text() == "precious"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "out"]


def test_a_pool_that_is_full_says_what_holds_the_space(pool: Up, space: str, tmp_path: Path) -> None:
    """Quota is the smaller limit here, and nothing of the chain can be evicted while it is written."""
    name = next(_names)
    assert pool.run("namespace", "create", name, "--block-size", "4KiB", "--quota", "16KiB").exit_code == 0
    (tmp_path / "data").write_bytes(os.urandom(10 * BLOCK))
    result = pool.run("put", "-n", name, str(tmp_path / "data"), *directory(pool))
    assert result.exit_code == 1
    assert "not stored: " in result.stderr
    stored = result.stdout.split()
    assert len(stored) <= 4


def test_put_as_json(pool: Up, space: str, tmp_path: Path) -> None:
    (tmp_path / "data").write_bytes(os.urandom(BLOCK + 1))
    document = pool.json("put", "-n", space, "--pad", str(tmp_path / "data"), *directory(pool))
    assert isinstance(document, dict)
    assert [block["status"] for block in document["blocks"]] == ["stored", "stored"]
    assert document["blocks"][1]["parent"] == document["blocks"][0]["key"]
    assert document["padding_bytes"] == BLOCK - 1
    read = pool.json("get", "-n", space, document["blocks"][0]["key"], "-o", str(tmp_path / "out"), *directory(pool))
    assert isinstance(read, dict)
    assert read["bytes_written"] == BLOCK


def test_a_reader_that_goes_away_is_no_error(pool: Up, space: str, put: Callable[..., list[str]]) -> None:
    keys = put(os.urandom(2000 * BLOCK))
    command = memfabric("ls", "-a", pool.address, "-n", space, "--limit", "0")
    listing = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert listing.stdout is not None and listing.stderr is not None
    listing.stdout.read(10)
    listing.stdout.close()
    with listing.stderr:
        assert b"Traceback" not in listing.stderr.read()
    listing.wait()
    assert len(keys) == 2000


# --- ls, rm, explain ---------------------------------------------------------------------------------------------


def test_ls_shows_the_chain(pool: Up, space: str, put: Callable[..., list[str]]) -> None:
    keys = put(os.urandom(3 * BLOCK))
    rows = pool.json("ls", "-n", space)
    assert isinstance(rows, list)
    parents = {row["key"]: row["parent"] for row in rows}
    assert parents == {keys[0]: None, keys[1]: keys[0], keys[2]: keys[1]}
    assert all(row["tokens"] == 16 for row in rows)
    for row in rows:
        place = pool.json("explain", "-n", space, row["key"])
        assert isinstance(place, dict)
        assert (place["node"], place["region"], place["block_index"]) == (row["node"], row["region"], row["block"])

    text = pool.run("ls", "-n", space, "--limit", "2")
    assert len(text.stdout.splitlines()) == 3
    assert "--limit 0 shows all" in text.stderr
    assert "\x1b" not in text.stdout, "no colour outside a terminal"
    lines = [line.split() for line in pool.run("ls", "-n", space).stdout.splitlines()[1:]]
    assert {line[0] for line in lines} == set(keys), "keys are never cut"


def test_ls_of_nothing(pool: Up, space: str) -> None:
    result = pool.run("ls", "-n", space)
    assert (result.exit_code, result.stdout) == (0, "")
    assert "holds no block" in result.stderr


def test_rm_forgets_blocks(pool: Up, space: str, put: Callable[..., list[str]]) -> None:
    keys = put(os.urandom(3 * BLOCK))
    assert "1 block removed." in pool.run("rm", "-n", space, keys[2]).stderr
    gone = pool.run("rm", "-n", space, keys[2], keys[1])
    assert gone.exit_code == 1
    assert "1 block removed." in gone.stderr
    assert f"1 key not in namespace {space}: {keys[2]}" in gone.stderr
    rows = pool.json("ls", "-n", space)
    assert isinstance(rows, list)
    assert [row["key"] for row in rows] == keys[:1]


def test_rm_all_asks_first(pool: Up, space: str, put: Callable[..., list[str]]) -> None:
    put(os.urandom(3 * BLOCK))
    assert pool.run("rm", "-n", space, "--all", input="n\n").exit_code == 1
    rows = pool.json("ls", "-n", space)
    assert isinstance(rows, list) and len(rows) == 3
    assert pool.run("rm", "-n", space, "--all", input="y\n").exit_code == 0
    assert pool.json("ls", "-n", space) == []
    assert pool.run("rm", "-n", space, "--all", "--yes").exit_code == 0
    assert pool.run("rm", "-n", space, "--all", "00" * 16).exit_code == 2


def test_pin_and_unpin(pool: Up, space: str, put: Callable[..., list[str]]) -> None:
    keys = put(b"p" * 2 * BLOCK)
    assert pool.run("pin", "-n", space, *keys).exit_code == 0
    assert pool.json("explain", "-n", space, keys[1])["not_evictable_because"] == ["it is pinned"]
    result = pool.run("unpin", "-n", space, keys[1], "ab" * 16)
    assert result.exit_code == 1
    assert "1 key not in namespace" in result.stderr
    assert pool.json("explain", "-n", space, keys[1])["evictable"]


def test_explain_tells_where_a_block_is(pool: Up, space: str, put: Callable[..., list[str]]) -> None:
    keys = put(os.urandom(2 * BLOCK))
    story = pool.run("explain", "-n", space, keys[1]).stdout
    assert f"Block {keys[1]} in namespace {space} is readable." in story
    assert "It lies on node node-" in story
    assert f"It continues block {keys[0]} (block 2 of its prompt)." in story
    assert "It may be evicted when space is needed." in story
    document = pool.json("explain", "-n", space, keys[0])
    assert isinstance(document, dict)
    assert (document["state"], document["children"], document["evictable"]) == ("complete", 1, False)


def test_explain_tells_who_holds_a_block(pool: Up, space: str, put: Callable[..., list[str]]) -> None:
    import memfabric

    keys = put(os.urandom(BLOCK))
    with (
        memfabric.connect(pool.address, namespace=space) as client,
        client.acquire([bytes.fromhex(keys[0])], ttl_s=50),
    ):
        story = pool.run("explain", "-n", space, keys[0]).stdout
        assert "holds a read lease that ends in" in story
        assert "It cannot be evicted now: 1 read lease" in story
        assert pool.run("rm", "-n", space, keys[0]).stderr.startswith("1 block removed, 1 of them still being read.")


def test_explain_tells_that_a_block_has_gone(pool: Up, space: str, put: Callable[..., list[str]]) -> None:
    (key,) = put(os.urandom(BLOCK))
    pool.run("rm", "-n", space, key)
    story = pool.run("explain", "-n", space, key).stdout
    assert "is not stored." in story
    assert "1 block removed on request" in story


# --- namespaces --------------------------------------------------------------------------------------------------


def test_block_size_from_the_model(pool: Up) -> None:
    name = next(_names)
    model = ["--model", "m", "--dtype", "bfloat16", "--layers", "4", "--kv-heads", "2", "--head-dim", "8"]
    result = pool.run("namespace", "create", name, *model)
    assert result.exit_code == 0, result.output
    assert "Block size 4 KiB = 4 layers x 2 (K, V) x 2 heads x 8 x 16 tokens x bfloat16" in result.stderr
    shown = pool.json("namespace", "show", name)
    assert isinstance(shown, dict)
    assert (shown["block_bytes"], shown["segments"]) == (4096, 4)
    assert shown["fingerprint"]["kv_heads"] == 2
    assert shown["fingerprint"]["block_tokens"] == 16
    text = pool.run("namespace", "show", name).stdout
    assert "model=m" in text and "layers=4" in text


def test_creating_again_changes_nothing_and_differently_is_refused(pool: Up, space: str) -> None:
    assert pool.run("namespace", "create", space, "--block-size", "4KiB").exit_code == 0
    other = pool.run("namespace", "create", space, "--block-size", "8KiB")
    assert other.exit_code == 1
    assert "block_bytes" in other.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["-x", "--block-size", "4KiB"], "No such option"),
        ([".x", "--block-size", "4KiB"], "is not allowed"),
        (["x" * 65, "--block-size", "4KiB"], "is not allowed"),
        (["x", "--block-size", "0"], "block_bytes must be"),
        (["x", "--block-size", "4GiB"], "block_bytes must be"),
        (["x", "--block-size", "4KiB", "--segments", "3"], "not a multiple of segments"),
        (["x", "--block-size", "4KiB", "--policy", "ttl"], "needs a ttl"),
        (["x", "--block-size", "4KiB", "--quota", "1KiB"], "less than one block"),
    ],
)
def test_impossible_namespaces(pool: Up, arguments: list[str], words: str) -> None:
    result = pool.run("namespace", "create", *arguments)
    assert result.exit_code in (1, 2)
    assert words in result.stderr
    assert "Traceback" not in result.stderr


def test_delete_asks_and_refuses_what_is_in_use(pool: Up, space: str, put: Callable[..., list[str]]) -> None:
    put(os.urandom(BLOCK))
    declined = pool.run("namespace", "delete", space, input="n\n")
    assert declined.exit_code == 1
    assert f"Delete namespace {space} with 1 block?" in declined.stderr
    busy = pool.run("namespace", "delete", space, "--yes")
    assert busy.exit_code == 1
    assert "holds 1 block" in busy.stderr
    assert pool.run("namespace", "delete", space, "--yes", "--force").exit_code == 0
    unknown = pool.run("namespace", "show", space)
    assert unknown.exit_code == 1
    assert f"'{space}'" in unknown.stderr


def test_an_empty_namespace_that_was_used_is_deleted_without_force(
    pool: Up, space: str, put: Callable[..., list[str]]
) -> None:
    """Commands leave no client behind."""
    keys = put(os.urandom(2 * BLOCK))
    get(pool, space, keys)
    assert pool.run("rm", "-n", space, *keys).exit_code == 0
    deleted = pool.run("namespace", "delete", space, "--yes")
    assert deleted.exit_code == 0, deleted.stderr


def test_namespace_list(pool: Up, space: str) -> None:
    assert space in pool.run("namespace", "list").stdout
    listed = pool.json("namespace", "list")
    assert isinstance(listed, list)
    assert space in [entry["name"] for entry in listed]


def test_an_unknown_namespace_is_named(pool: Up, tmp_path: Path) -> None:
    (tmp_path / "data").write_bytes(bytes(BLOCK))
    for command in (["ls"], ["put", str(tmp_path / "data")], ["get", "00" * 16], ["explain", "00" * 16]):
        result = pool.run(command[0], "-n", "no-such", *command[1:])
        assert result.exit_code == 1
        assert "'no-such' does not exist" in result.stderr


# --- nodes and status --------------------------------------------------------------------------------------------


def test_status_shows_everything(pool: Up, space: str, put: Callable[..., list[str]]) -> None:
    keys = put(os.urandom(3 * BLOCK))
    get(pool, space, [*keys[:1], "00" * 16][:1])
    text = pool.run("status").stdout
    for words in ("node-0", "node-1", "active", "64 MiB", space, "3 of ", "100 %"):
        assert words in text
    document = pool.json("status")
    assert isinstance(document, dict)
    assert document["address"] == pool.address
    assert [node["name"] for node in document["nodes"]] == ["node-0", "node-1"]
    entry = next(entry for entry in document["namespaces"] if entry["name"] == space)
    assert entry["blocks"] == 3


def test_status_watch_goes_on_until_it_is_stopped(pool: Up) -> None:
    command = memfabric("status", "-a", pool.address, "--json", "--watch", "50ms")
    watching = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert watching.stdout is not None and watching.stderr is not None
    lines = [json.loads(watching.stdout.readline()) for _ in range(3)]
    assert lines[0]["uptime_ns"] < lines[1]["uptime_ns"] < lines[2]["uptime_ns"]
    watching.send_signal(2)
    _, errors = watching.communicate()
    assert watching.returncode == 0
    assert errors == b""


def test_drain_and_undo(pool: Up) -> None:
    def state(name: str) -> str:
        nodes = pool.json("node", "list")
        assert isinstance(nodes, list)
        return str(next(node["state"] for node in nodes if node["name"] == name))

    assert "node-1 is draining" in pool.run("node", "drain", "node-1").stdout
    assert state("node-1") == "draining"
    assert "draining" in pool.run("node", "list").stdout
    assert pool.run("node", "drain", "node-1", "--undo").exit_code == 0
    assert state("node-1") == "active"
    unknown = pool.run("node", "drain", "node-9")
    assert unknown.exit_code == 1
    assert "no living node 'node-9' (known: node-0, node-1)" in unknown.stderr


def test_new_blocks_avoid_a_draining_node(pool: Up, space: str, put: Callable[..., list[str]]) -> None:
    assert pool.run("node", "drain", "node-0").exit_code == 0
    try:
        keys = put(os.urandom(20 * BLOCK))
        places = [pool.json("explain", "-n", space, key) for key in keys]
        assert {place["node"] for place in places if isinstance(place, dict)} == {"node-1"}
    finally:
        assert pool.run("node", "drain", "node-0", "--undo").exit_code == 0


def test_commands_work_as_processes_too(pool: Up, space: str) -> None:
    """The same through a real process with the address from the environment."""
    environment = {**os.environ, "MEMFABRIC_ADDRESS": pool.address}
    done = subprocess.run(memfabric("status"), env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert space in done.stdout
    assert done.stderr == ""
