"""A stage of a user's own, for the tests of the report."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from megatron_nucleus.data.curation.stage import Drop, row_stage


@row_stage(reads=("item",), adds={"redness": pa.float32()}, rejects=("too <b>red</b>",))
def redness(rows, config):
    """Measures how red a picture is, and drops the `reddest`.

    More words that are not for the page.
    """
    out = []
    for row in rows:
        red = float(np.asarray(row.picture())[..., 0].mean())
        drop = Drop("too <b>red</b>", f"{red:.0f} & more than <i>190</i>")
        out.append(drop if red > 190 else {"redness": red})
    return out
