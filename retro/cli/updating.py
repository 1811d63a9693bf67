"""The verbs that change or check a datastore: add, remove, compact, verify."""

from __future__ import annotations

from typing import Annotated, Any, Unpack

from cyclopts import Parameter

from retro.cli.datastore import Inputs, print_counts
from retro.cli.options import options
from retro.cli.shared import JsonFile, StoreFolder, stamp, use_device, write_json
from retro.common.devices import DeviceSettings
from retro.retrieval.building.settings import BuildSettings
from retro.retrieval.building.updates import FIXED

AddOptions = options(BuildSettings, DeviceSettings, without=FIXED, defaults=False)
PlaceOptions = options(DeviceSettings)
NoIndex = Annotated[bool, Parameter(help="Leave the indexes of the datastore as they are.")]


def _report(store: Any, file: str | None, did: dict[str, Any]) -> None:
    """Print and write what the store is after an update."""
    removed = len(store.removed_documents)
    print(
        f"{store.path}: generation {store.generation}, {store.num_live_documents} documents, "
        f"{store.num_live_chunks} chunks, {removed} removed document{'s' * (removed != 1)} still on disk"
    )
    counts = {"documents": store.num_live_documents, "chunks": store.num_live_chunks}
    about = {"store": str(store.path), "generation": store.generation, **counts}
    write_json(file, about | {"removed_documents": removed} | did | stamp(store))


def add(
    store: StoreFolder,
    inputs: Inputs,
    /,
    *,
    no_decontaminate: bool = False,
    no_index: NoIndex = False,
    json: JsonFile = None,
    **settings: Unpack[AddOptions],
) -> None:
    """Add documents to a datastore, cut, embedded and filtered as it was built.

    A setting that is not given is that of the build.

    Arguments:
        no_decontaminate: Add to a datastore that was built with --decontaminate without looking at those documents.
    """
    from retro.retrieval import add_documents

    use_device(settings)
    if no_decontaminate:
        settings["decontaminate"] = []
    changed = add_documents(store, inputs, index=not no_index, progress=True, **settings)
    added = changed.manifest["updates"][-1]["counts"]
    print_counts(added, changed.path / "rejects" / f"{changed.generation:05d}")
    _report(changed, json, {"counts": changed.manifest["counts"], "added": added})


def remove(
    store: StoreFolder,
    document_ids: list[str] | None = None,
    /,
    *,
    ids: str | None = None,
    no_index: NoIndex = False,
    json: JsonFile = None,
) -> None:
    """Take documents out of a datastore: no search returns them any more.

    Their text stays on disk until `retro compact` deletes it.

    Arguments:
        document_ids: Ids of documents.
        ids: File of ids, one a line.
    """
    from retro.retrieval import remove_documents

    named = [*(document_ids or []), *(_ids_of(ids) if ids else [])]
    if not named:
        raise ValueError("no id was given; name documents, or a file of ids with --ids")
    _report(remove_documents(store, named, index=not no_index), json, {"ids": len(set(named))})


def _ids_of(file: str) -> list[str]:
    from retro.common.files import read_text

    return [line for line in read_text(file).split("\n") if line.strip()]


def compact(store: StoreFolder, /, *, no_index: NoIndex = False, json: JsonFile = None) -> None:
    """Delete the text of removed documents from disk and merge small shards.

    Rows get new numbers: run `retro neighbors` again afterwards.
    """
    from retro.retrieval import compact as compact_store

    compacted = compact_store(store, index=not no_index, progress=True)
    _report(compacted, json, {"shards": len(compacted.shards)})


def verify(
    store: StoreFolder,
    /,
    *,
    full: bool = False,
    embed: int = 0,
    seed: int = 0,
    json: JsonFile = None,
    **place: Unpack[PlaceOptions],
) -> None:
    """Check that a datastore is whole: every file has the checksums that were recorded when it was written.

    The first file that differs is named.

    Arguments:
        full: Compare what the files say with each other, too, and look at every key.
        embed: Chunks to embed again, whose keys are compared.
        seed: Seed by which those chunks are drawn.
    """
    from retro.retrieval import Store, verify_store

    use_device(place)
    opened = Store.open(store)
    checked = verify_store(opened, "full" if full else "quick", embed, seed)
    counts = f"{checked['documents']} documents, {checked['chunks']} chunks"
    print(f"{opened.path}: generation {opened.generation} is whole: {counts}")
    print(f"the checksums of {checked['files']} files are right" + ", every key is finite" * full)
    if checked["embedded"]:
        print(
            f"{checked['embedded']} chunks embedded again: at most {checked['largest_difference']:.2g} from their keys"
        )
    write_json(json, {"store": str(opened.path), **checked} | stamp(opened))
