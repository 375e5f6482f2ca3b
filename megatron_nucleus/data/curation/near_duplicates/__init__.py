"""Near-duplicates in a corpus of any size up to 2^31 rows: all pairs of near hashes, and what to keep of each cluster.

    found = search(hashes, folder, SearchConfig(memory_bytes=2 << 30))     # pairs of rows
    rows = np.unique([found.pairs["low"], found.pairs["high"]])            # the only ones that need a rank
    order = rows[keep_order(Candidates(licence_known[rows], pixels[rows], ...))]     # what the best of them is
    clusters = star_clusters(found.pairs, order, hash_check(phash256))     # who stands for whom

Works on arrays and files alone; reading and writing columns is the stage's part.
"""

from megatron_nucleus.data.curation.near_duplicates.clusters import Clusters, components, star_clusters
from megatron_nucleus.data.curation.near_duplicates.forecast import (
    Rates,
    forecast,
    forecast_text,
    rates_of,
    sample_rates,
)
from megatron_nucleus.data.curation.near_duplicates.keep import Candidates, keep_order
from megatron_nucleus.data.curation.near_duplicates.keys import layout
from megatron_nucleus.data.curation.near_duplicates.partitions import PAIR
from megatron_nucleus.data.curation.near_duplicates.search import (
    Found,
    SearchConfig,
    one_by_one,
    open_pairs,
    search,
)
from megatron_nucleus.data.curation.near_duplicates.verify import Check, cosine_check, hash_check

__all__ = [
    "PAIR",
    "Candidates",
    "Check",
    "Clusters",
    "Found",
    "Rates",
    "SearchConfig",
    "components",
    "cosine_check",
    "forecast",
    "forecast_text",
    "hash_check",
    "keep_order",
    "layout",
    "one_by_one",
    "open_pairs",
    "rates_of",
    "sample_rates",
    "search",
    "star_clusters",
]
