"""A client's own tensors on disk: versions by round, and nothing lost without a word."""

import os
from pathlib import Path

import pytest
import torch

from fedexperts import client_folder
from fedexperts.algorithms.api import Kept
from fedexperts.errors import UserError
from fedexperts.federation.personal import PersonalStore, kept_sha256

ID = "client-000"


def kept(value, dtype=torch.float32):
    """The same name in two sections: a variate bears the name of its parameter."""
    return Kept(
        parameters={"a/b.weight": torch.full((2,), value)},
        beside={"a/b.weight": torch.full((3,), 7, dtype=torch.int64), "chosen": torch.tensor([True])},
        optimizer={
            "a/b.weight": {"exp_avg": torch.full((2,), value, dtype=dtype), "step": torch.tensor(1.0)}
        },
    )


@pytest.fixture
def store(tmp_path):
    return PersonalStore(tmp_path)


def test_every_section_comes_back_bit_for_bit(store):
    store.save(ID, kept(0.1, torch.bfloat16), round_number=3, kept_round=0)
    found = store.load(ID, 3)
    assert kept_sha256(found) == kept_sha256(kept(0.1))
    assert torch.equal(found.beside["a/b.weight"], torch.full((3,), 7))
    assert found.optimizer["a/b.weight"]["exp_avg"].dtype == torch.bfloat16
    assert found.optimizer["a/b.weight"].keys() == {"exp_avg", "step"}


def test_the_hash_is_of_parameters_and_of_what_stands_beside_them():
    one = kept(1.0)
    assert kept_sha256(one) == kept_sha256(kept(1.0, torch.bfloat16)), "the optimizer's state apart"
    assert kept_sha256(one) != kept_sha256(kept(2.0))
    assert kept_sha256(one) != kept_sha256(Kept(parameters=one.parameters))
    assert kept_sha256(Kept()) == ""


def test_a_client_goes_on_from_the_round_that_counted(store):
    store.save(ID, kept(1.0), round_number=1, kept_round=0)
    store.save(ID, kept(2.0), round_number=2, kept_round=1)
    assert store.load(ID, 1).parameters["a/b.weight"][0] == 1.0, "round 2 was refused"
    store.save(ID, kept(3.0), round_number=3, kept_round=1)
    assert store.load(ID, 3).parameters["a/b.weight"][0] == 3.0
    versions = sorted(path.name for path in store.folder(ID).glob("personal-*"))
    assert versions == ["personal-round-00001.safetensors", "personal-round-00003.safetensors"]


def test_a_version_that_is_missing_is_told(store):
    store.save(ID, Kept(), round_number=5, kept_round=0)
    assert not store.load(ID, 5), "a method that keeps nothing"
    assert not list(store.folder(ID).glob("personal-*")), "and has no file of it"
    store.save(ID, kept(1.0), round_number=6, kept_round=5)
    assert not store.load(ID, 5), "the first version is of round 6"
    with pytest.raises(UserError, match="kept after round 7 are lost"):
        store.load(ID, 7)


def test_a_folder_that_is_missing_is_told(store):
    """A client that took part has a record, also where its method keeps nothing."""
    assert not store.load(ID, 0)
    with pytest.raises(UserError, match=r"client-000/kept\.json does not exist"):
        store.load(ID, 1)


def test_versions_stay_for_every_state_that_is_kept(store):
    """Round 3 was refused; with three states kept, rounds 2 to 4 can be gone back to, and 5 is under way."""
    for number, kept_round in ((1, 0), (2, 1), (3, 2), (4, 2), (5, 4)):
        store.save(ID, kept(float(number)), round_number=number, kept_round=kept_round, keep_states=3)
    assert [number for number in range(1, 6) if is_kept(store, number)] == [2, 4, 5]
    store.save(ID, kept(6.0), round_number=6, kept_round=5, keep_states=3)
    assert [number for number in range(1, 7) if is_kept(store, number)] == [2, 4, 5, 6], (
        "the state of round 3 needs version 2"
    )
    store.save(ID, kept(5.0), round_number=5, kept_round=4, keep_states=3)
    assert [number for number in range(1, 7) if is_kept(store, number)] == [2, 4, 5], "after going back"


def is_kept(store, number):
    return (store.folder(ID) / f"personal-round-{number:05d}.safetensors").exists()


@pytest.mark.parametrize("name", ["personal-round-00001.safetensors", "kept.json"])
def test_a_flipped_bit_is_told(name, store):
    store.save(ID, kept(1.0), round_number=1, kept_round=0)
    path = store.folder(ID) / name
    content = bytearray(path.read_bytes())
    content[-20] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match=f"{name} (is damaged|is not readable JSON)"):
        store.load(ID, 1)


def test_nobody_else_reads_what_a_client_keeps(store, tmp_path):
    store.save(ID, kept(1.0), round_number=1, kept_round=0)
    store.files(ID).write("predictions.json", b"{}")
    folder = store.folder(ID)
    assert [oct(path.stat().st_mode & 0o777) for path in (folder, folder.parent)] == ["0o700"] * 2
    assert {oct(path.stat().st_mode & 0o777) for path in folder.iterdir()} == {"0o600"}
    assert len(list(folder.iterdir())) == 3


def test_a_version_that_is_damaged_is_told(store):
    store.save(ID, kept(1.0), round_number=1, kept_round=0)
    path = store.folder(ID) / "personal-round-00001.safetensors"
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(UserError, match="is damaged: its SHA-256"):
        store.load(ID, 1)


def test_values_that_are_not_finite_are_never_kept(store):
    with pytest.raises(UserError, match=r"its own tensor 'parameters/a/b\.weight' has values"):
        store.save(ID, kept(float("nan")), round_number=1, kept_round=0)
    assert not store.folder(ID).exists()


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="names of descriptors are read there")
def test_a_version_and_its_record_are_on_the_disk_under_their_names(store, monkeypatch):
    """Two files are synced, and then once the folder that has both."""
    synced, fsync = [], os.fsync

    def told(descriptor):
        synced.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", told)
    store.save(ID, kept(1.0), round_number=1, kept_round=0)
    assert synced == [".personal-round-00001.safetensors.partial", ".kept.json.partial", ID]


def test_the_record_is_read_once_in_a_turn_for_each_of_reading_and_writing(store, monkeypatch):
    read, read_sealed = [], client_folder.read_sealed
    store.save(ID, kept(0.1), round_number=1, kept_round=0)
    monkeypatch.setattr(client_folder, "read_sealed", lambda path: read.append(path) or read_sealed(path))
    store.load(ID, 1)
    assert len(read) == 1
    store.save(ID, kept(0.2), round_number=2, kept_round=1)
    assert len(read) == 2
