"""Pack the corpus into artifacts/corpus/. Run: `puzzle stage prepare_corpus`."""

from prefect import flow

from flows.stage import main
from storage.params import Params
from storage.paths import Paths
from tasks import prepare_corpus as tasks


@flow(name="prepare_corpus", description="Pack documents to token sequences in splits that share no paragraph.")
def prepare_corpus(params: Params, paths: Paths) -> None:
    """Read, split, de-duplicate, tokenise and pack."""
    tasks.pack_corpus(params, paths)


if __name__ == "__main__":
    main(prepare_corpus)
